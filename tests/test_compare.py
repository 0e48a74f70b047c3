"""The comparison of two runs: what it finds in known samples, where it finds a baseline, how it ends."""

from __future__ import annotations

import copy
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare, measure
from bench import rows as records
from bench.rows import BASELINE, FAILED, TIMED, UNAVAILABLE, WRONG, Row, Run
from bench.workloads import Workload

SHAPE = Workload(8, 256, 512, 512)
OTHER = replace(SHAPE, batch=16, dtype="bfloat16")
ROUNDS = 40

RUN: Run = {
    "sweep": "quick",
    "device": "cpu",
    "date": "2026-11-23 12:15 UTC",
    "commit": "0123456789ab",
    "dirty": False,
    "machine": {"cpu": "Some CPU", "cores": 2},
    "software": {"python": "3.11.2", "torch": "2.13.0"},
    "float32": "IEEE",
    "timing": {"clock": "time.perf_counter", "threads": 2, "seconds": 1.0, "min_rounds": 6, "cache": "warm"},
    "plan": {"dtypes": ["float32"], "passes": ["forward"], "contenders": [BASELINE, "eager"]},
    "partial": "",
}


def cell(
    times: dict[str, float],
    seed: int,
    noise: float = 0.02,
    shape: Workload = SHAPE,
    rounds: int = ROUNDS,
    calm: bool = False,
) -> list[Row]:
    """One cell's rows, contender to seconds, with noise; unless calm, a third of the rounds is slow."""
    draw = random.Random(seed)
    slow = [1.0 if calm else draw.choice((1.0, 1.0, 1.5)) for _ in range(rounds)]
    return [
        Row(shape, "forward", name, TIMED, samples=[time * s * draw.gauss(1, noise) for s in slow])
        for name, time in times.items()
    ]


def of(changes: list[compare.Change], contender: str) -> compare.Change:
    (found,) = (change for change in changes if change.new.contender == contender)
    return found


# What counts as a change


def test_ten_percent_slower_is_found():
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = cell({BASELINE: 2e-3, "eager": 1.1e-3}, seed=2)
    change = of(compare.changes(old, new), "eager")
    assert change.low < 1.1 < change.high
    assert change.ratio == pytest.approx(1.1, rel=0.02)
    assert change.beyond_noise
    assert compare.slower([change], 5) == [change]


def test_a_change_is_that_of_the_medians():
    """Known samples, outliers without weight: (3 / 10) / (2 / 8), and for nn.RNN, in seconds, 10 / 8."""
    before = {BASELINE: [6.0, 7.0, 8.0, 9.0, 90.0], "eager": [1.0, 1.5, 2.0, 40.0, 50.0]}
    now = {BASELINE: [8.0, 9.0, 10.0, 11.0, 12.0], "eager": [0.1, 3.0, 0.2, 9.0, 8.0]}
    old, new = (
        [Row(SHAPE, "forward", name, TIMED, samples=taken) for name, taken in run.items()]
        for run in (before, now)
    )
    changes = compare.changes(old, new)
    assert of(changes, "eager").ratio == pytest.approx(1.2)
    assert of(changes, BASELINE).ratio == pytest.approx(1.25)


def test_the_whole_interval_has_to_lie_beyond_the_limit():
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = cell({BASELINE: 2e-3, "eager": 1.1e-3}, seed=2)
    change = of(compare.changes(old, new), "eager")
    just_below, just_above = ((change.low - 1) * 100 + step for step in (-0.1, 0.1))
    assert compare.slower([change], just_below) == [change]
    assert compare.slower([change], just_above) == []


def test_faster_is_a_change_that_never_fails():
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = cell({BASELINE: 2e-3, "eager": 0.8e-3}, seed=2)
    change = of(compare.changes(old, new), "eager")
    assert change.beyond_noise
    assert change.high < 1
    assert compare.slower([change], 0) == []


def test_the_same_distribution_is_seldom_a_change():
    """An interval of 95%: among 200 cells that have not changed there are about ten outside, or fewer."""
    times = {BASELINE: 2e-3, "eager": 1e-3}
    pairs = [[cell(times, seed, calm=True) for seed in (2 * n, 2 * n + 1)] for n in range(200)]
    found = [of(compare.changes(old, new), "eager") for old, new in pairs]
    assert 1 <= sum(change.beyond_noise for change in found) < 20
    assert not compare.slower(found, 5)


def test_a_machine_half_as_fast_is_no_change():
    times = {BASELINE: 2e-3, "eager": 1e-3}
    old, new = cell(times, seed=1), cell({name: 2 * time for name, time in times.items()}, seed=2)
    changes = compare.changes(old, new)
    assert not of(changes, "eager").beyond_noise
    assert of(changes, BASELINE).ratio == pytest.approx(2, rel=0.05)
    assert compare.slower(changes, 5) == []  # nn.RNN took twice as long, which fails nobody


def test_a_contender_as_slow_as_before_beside_a_faster_baseline_is_slower():
    """Relative to nn.RNN, which on a machine twice as fast is all that can be told."""
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = cell({BASELINE: 1e-3, "eager": 1e-3}, seed=2)
    assert of(compare.changes(old, new), "eager").ratio == pytest.approx(2, rel=0.05)


def test_what_slows_a_whole_round_cancels():
    """The rounds are resampled in pairs: with noise only of whole rounds the interval has no width."""
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1, noise=0)
    new = cell({BASELINE: 2e-3, "eager": 1.001e-3}, seed=2, noise=0)
    change = of(compare.changes(old, new), "eager")
    assert (change.low, change.high) == pytest.approx((1.001, 1.001), rel=1e-9)


def test_the_same_samples_give_the_same_interval():
    old = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=2)
    assert compare.changes(old, new) == compare.changes(old, new)


def test_the_runs_are_resampled_independently():
    """A run against itself: with the same rounds drawn for both, its interval would be a point."""
    rows = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    change = of(compare.changes(rows, rows), "eager")
    assert change.ratio == 1
    assert change.low < 0.999
    assert change.high > 1.001


@pytest.mark.parametrize("rounds", [6, 7, 200])
def test_medians_by_counting_are_the_medians_of_the_resamples(rounds: int):
    samples = [sample for row in cell({BASELINE: 1.0}, seed=3, rounds=rounds) for sample in row.samples]
    drawn = compare._draws(rounds, 0)
    assert drawn.shape == (rounds, measure.RESAMPLES)
    assert (drawn.sum(0) == rounds).all()
    found = compare._medians(samples, 0)
    for n in (0, 1, measure.RESAMPLES - 1):
        resample = [s for s, times in zip(samples, drawn[:, n].tolist(), strict=True) for _ in range(times)]
        assert found[n].item() == pytest.approx(measure.quantile(resample, 0.5), rel=1e-12)


def test_what_is_not_timed_in_both_or_has_no_yardstick_is_not_judged():
    old = cell({BASELINE: 2e-3, "eager": 1e-3, "gone": 1e-3}, seed=1)
    old += cell({"eager": 1e-3}, seed=3, shape=OTHER)
    new = cell({BASELINE: 2e-3, "eager": 1e-3, "added": 1e-3}, seed=2)
    new += cell({BASELINE: 2e-3, "eager": 1e-3}, seed=4, shape=OTHER)
    new.append(Row(SHAPE, "forward", "gone", UNAVAILABLE))
    assert [change.new.contender for change in compare.changes(old, new)] == [BASELINE, "eager"]
    text = compare.report((RUN, old), (RUN, new))
    # gone, added, and nn.RNN at the other shape
    assert "0 faster, 1 unchanged, 0 slower, 3 timed in only one" in text
    assert "1 not judged: nn.RNN was not timed" in text


def test_samples_that_are_not_paired_are_refused():
    rows = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    rows[1].samples.pop()
    with pytest.raises(ValueError, match=r"B8-T256-I512-H512-float32 eager has 39 and nn.RNN 40"):
        compare.changes(rows, rows)


# The report


def test_the_report_lists_what_changed_the_worst_first():
    times = {BASELINE: 2e-3, "eager": 1e-3, "cudnn": 1e-3, "auto": 1e-3, "naive loop": 1e-2}
    changed = {BASELINE: 2e-3, "eager": 1.2e-3, "cudnn": 1.5e-3, "auto": 0.5e-3, "naive loop": 1e-2}
    old, new = cell(times, seed=1, shape=OTHER), cell(changed, seed=2, shape=OTHER)
    text = compare.report((RUN, old), (RUN, new), 5.0)
    table = [line.split("  ") for line in text.split("\n") if "forward" in line and "ms" not in line]
    listed = [name.strip() for line in table for name in line if name.strip() in times]
    assert listed[:3] == ["cudnn", "eager", "auto"]
    assert "B=16 T=256 I=512 H=512 bfloat16" in text
    assert "1 faster, 1 unchanged, 2 slower, 0 timed in only one of the runs." in text
    assert "--fail-slower 5%: 2 rows are slower by more than that" in text
    assert "nn.RNN takes 1." in text or "nn.RNN takes 0.9" in text
    (line,) = (line for line in text.split("\n") if line.startswith("B=16") and "eager" in line)
    change = of(compare.changes(old, new), "eager")
    assert f"{change.ratio - 1:+.1%} [{change.low - 1:+.1%}, {change.high - 1:+.1%}]" in line
    assert "differ" not in text


def test_the_report_says_how_far_the_naive_loop_moved():
    times = {BASELINE: 2e-3, "eager": 1e-3, "naive loop": 1e-2}
    old, new = cell(times, seed=1), cell({**times, "eager": 9e-3, "naive loop": 0.9e-2}, seed=2)
    (moved,) = (abs(c.ratio - 1) for c in compare.changes(old, new) if c.new.contender == "naive loop")
    assert 0.05 < moved < 0.15
    text = compare.report((RUN, old), (RUN, new))
    assert f"none of whose code is elman's, moved by up to {moved:.1%}" in text
    without = [[row for row in rows if row.contender != "naive loop"] for rows in (old, new)]
    assert "moved" not in compare.report((RUN, without[0]), (RUN, without[1]))


def test_the_report_of_the_same_rows_has_no_table():
    rows = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    text = compare.report((RUN, rows), (RUN, rows), 5.0)
    assert "ms before" not in text
    assert "0 faster, 1 unchanged, 0 slower, 0 timed in only one" in text
    assert "--fail-slower 5%: no rows are slower" in text


@pytest.mark.parametrize("status", [WRONG, FAILED])
def test_a_row_that_fails_now_is_told(status: str):
    old = cell({BASELINE: 2e-3, "eager": 1e-3, "cudnn": 1e-3}, seed=1)
    new = cell({BASELINE: 2e-3, "cudnn": 1e-3}, seed=2)
    new.append(Row(SHAPE, "forward", "eager", status, "It broke."))
    new.append(Row(SHAPE, "forward", "auto", FAILED, "It was never there."))
    text = compare.report((RUN, old), (RUN, new))
    assert f"Timed before, now {status}: eager, B=8 T=256 I=512 H=512, forward. It broke." in text
    assert "never there" not in text


def test_a_row_that_failed_before_is_no_new_failure():
    rows = cell({BASELINE: 2e-3}, seed=1)
    failed = Row(SHAPE, "forward", "eager", FAILED, "It broke.")
    assert "It broke" not in compare.report((RUN, [*rows, failed]), (RUN, [*rows, failed]))


def test_the_report_says_first_in_what_the_runs_differ():
    rows = cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)
    new = copy.deepcopy(RUN)
    new["machine"]["gpu"] = "Some GPU"
    new["software"]["torch"] = "2.14.0"
    new["timing"]["threads"] = 4
    new["timing"]["seconds"] = 9.0  # more samples are no other condition
    new["float32"] = "TF32"
    new["dirty"], new["commit"] = True, "ba9876543210"
    first, runs, *_ = compare.report((RUN, rows), (new, rows)).split("\n\n")
    assert first.startswith("The two runs are not of the same conditions.")
    for difference in (
        "gpu (nothing before, Some GPU now)",
        "torch (2.13.0 before, 2.14.0 now)",
        "threads (2 before, 4 now)",
        "float32 (IEEE before, TF32 now)",
    ):
        assert difference in first
    assert "seconds" not in first
    assert "cores" not in first
    assert runs == (
        "Before: 0123456789ab of 2026-11-23 12:15 UTC. "
        "Now: ba9876543210 with changes of 2026-11-23 12:15 UTC."
    )


# Where a baseline is


@pytest.fixture
def rows() -> list[Row]:
    return cell({BASELINE: 2e-3, "eager": 1e-3}, seed=1)


Publish = Callable[[list[Row]], Path]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Writes rows as results/box/rows.jsonl under tmp_path, and returns the folder."""

    def write(rows: list[Row], table: str = "quick") -> Path:
        folder = tmp_path / "results" / "box"
        folder.mkdir(parents=True, exist_ok=True)
        records.write(folder / "rows.jsonl", {table: (RUN, rows)})
        return folder

    return write


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def commit(root: Path) -> None:
    if not (root / ".git").exists():
        git(root, "init", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--message", "Measured")


def test_a_folder_or_a_file_is_a_baseline(rows: list[Row], publish: Publish, tmp_path: Path):
    folder = publish(rows)
    for baseline in (str(folder), str(folder / "rows.jsonl"), "results/box"):  # the last from the root
        run, found = compare.load(baseline, tmp_path, "elsewhere", "quick")
        assert (run, found) == (RUN, rows)


def test_a_commit_a_branch_and_a_tag_are_baselines(rows: list[Row], publish: Publish, tmp_path: Path):
    publish(rows)
    commit(tmp_path)
    git(tmp_path, "tag", "before")
    later = cell({BASELINE: 2e-3, "eager": 2e-3}, seed=5)
    publish(later)
    commit(tmp_path)
    publish(cell({BASELINE: 1.0}, seed=6))  # not committed: nobody's baseline
    for baseline, expected in (("before", rows), ("HEAD~1", rows), ("main", later), ("HEAD", later)):
        run, found = compare.load(baseline, tmp_path, "box", "quick")
        assert (run, found) == (RUN, expected), baseline


def test_what_is_no_baseline_gets_a_sentence(rows: list[Row], publish: Publish, tmp_path: Path):
    folder = publish(rows)
    commit(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "quick.md").touch()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"table": "quick", "row": {}}\n')
    sentences = {
        "nonsense": r"'nonsense' is neither a file nor a folder nor a commit .* such as results/box$",
        "-nonsense": "'-nonsense' is neither a file nor a folder nor a commit",
        str(tmp_path / "empty"): "is a folder without rows.jsonl; it has quick.md$",
        str(broken): "broken.jsonl, line 1, is no row",
    }
    for baseline, sentence in sentences.items():
        with pytest.raises(ValueError, match=sentence):
            compare.load(baseline, tmp_path, "box", "quick")
    with pytest.raises(ValueError, match=r"no table 'standard'; it has quick$"):
        compare.load(str(folder), tmp_path, "box", "standard")
    with pytest.raises(
        ValueError, match=r"HEAD has no results/other/rows.jsonl; it has results/box/rows.jsonl$"
    ):
        compare.load("HEAD", tmp_path, "other", "quick")


def test_without_a_repository_a_commit_is_no_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match=r"'HEAD' is neither .* such as results/<machine>$"):
        compare.load("HEAD", tmp_path, "box", "quick")


# The command


@pytest.fixture
def command(
    rows: list[Row], publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Compares 10% slower rows with HEAD's; returns the exit status and what was printed."""
    publish(rows)
    commit(tmp_path)
    folder = publish(cell({BASELINE: 2e-3, "eager": 1.1e-3}, seed=2))

    def run(*arguments: str) -> tuple[int, str]:
        try:
            status = compare.main([str(folder), *arguments], root=tmp_path)
        except SystemExit as left:
            status = int(left.code or 0)
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("limit", "status"), [([], 0), (["--fail-slower", "5%"], 1), (["--fail-slower", "20"], 0)]
)
def test_the_exit_status(command: Callable[..., tuple[int, str]], limit: list[str], status: int):
    found, printed = command("--baseline", "HEAD", *limit)
    assert found == status
    assert "0 faster, 0 unchanged, 1 slower" in printed
    assert ("--fail-slower" in printed) == bool(limit)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--baseline", "nonsense"), "'nonsense' is neither a file"),
        (("--baseline", "HEAD", "--fail-slower", "much"), "--fail-slower is 'much'; expected a percentage"),
        (("--baseline", "HEAD", "--table", "standard"), "no table 'standard'; it has quick"),
        ((), "--baseline"),
    ],
)
def test_a_bad_argument_exits_with_2(
    command: Callable[..., tuple[int, str]], arguments: tuple[str, ...], sentence: str
):
    status, printed = command(*arguments)
    assert status == 2
    assert sentence in printed


def test_which_of_several_tables_has_to_be_said(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rows.jsonl"
    records.write(file, {"quick": (RUN, rows), "step": (RUN, rows)})
    with pytest.raises(SystemExit) as left:
        compare.main([str(file), "--baseline", str(file)], root=tmp_path)
    assert left.value.code == 2
    assert "has the tables quick, step; expected one of them as --table" in capsys.readouterr().err
    assert compare.main([str(file), "--baseline", str(file), "--table", "step"], root=tmp_path) == 0


def test_a_new_run_that_does_not_exist_is_a_bad_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        compare.main(["HEAD", "--baseline", "HEAD"], root=tmp_path)
    assert left.value.code == 2
    assert "HEAD does not exist; expected results/<machine>" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "percent"), [("5%", 5), ("5", 5), (" 7.5 % ", 7.5), ("0", 0)])
def test_percentages(text: str, percent: float):
    assert compare.parse_percent(text) == percent


@pytest.mark.parametrize("text", ["", "%", "much", "-5%", "nan", "inf", "5%%"])
def test_what_is_no_percentage(text: str):
    with pytest.raises(ValueError, match="expected a percentage that is not negative, such as 5%"):
        compare.parse_percent(text)
