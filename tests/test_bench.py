"""The benchmark suite itself: its statistics, its refusal to time what is wrong, its files."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import agreement, contenders, measure, report
from bench import rows as records
from bench.cell import Timing, measure_cell
from bench.contenders import NAIVE, Contender, Problem
from bench.rows import BASELINE, FAILED, TIMED, UNAVAILABLE, WRONG, Row
from bench.workloads import SWEEPS, Workload
from elman import BackendUnavailableError

ROOT = Path(__file__).parents[1]
TINY = Workload(2, 5, 3, 4)


def pytest_bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a complete smallest sweep wrote, and what it printed."""
    results = tmp_path_factory.mktemp("results")
    done = pytest_bench("--sweep", "smallest", "--results", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = results.iterdir()
    return folder, done.stdout


# Statistics


def test_quantiles_of_known_samples():
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [measure.quantile(samples, q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert measure.quantile([1.0, 2.0], 0.5) == 1.5


def test_speedup_of_exactly_twice_has_no_width():
    own = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert measure.speedup([2 * s for s in own], own) == pytest.approx((2, 2, 2))


def test_speedup_interval_holds_the_truth_and_repeats():
    noise = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(50):
        base, own = (1 + 0.1 * torch.randn(2, 40, generator=noise, dtype=torch.float64)).tolist()
        _, low, high = measure.speedup([1.5 * s for s in base], own)
        held += low <= 1.5 <= high
    assert 43 <= held <= 50, "a 95% interval must hold the true ratio in about 95% of the runs"
    assert measure.speedup(base, own) == measure.speedup(base, own)


def test_common_noise_cancels_because_rounds_are_paired():
    drift = [float(2 ** (i % 5)) for i in range(20)]
    own = [d * (1 + 0.001 * (i % 3)) for i, d in enumerate(drift)]
    ratio, low, high = measure.speedup([1.2 * d for d in drift], own)
    assert 1.19 < low <= ratio <= high < 1.21


def test_unpaired_samples_are_refused():
    with pytest.raises(ValueError, match="paired round by round, but there are 2 and 1"):
        measure.speedup([1.0, 2.0], [1.0])


def test_rounds_are_interleaved_in_every_order_with_gc_off():
    seen: list[str] = []

    def stopwatch(call):
        call()
        assert not gc.isenabled(), "the garbage collector must be off while sampling"
        return 1.0

    targets = {n: measure.Target(lambda n=n: seen.append(n), prepare=lambda: None) for n in "abc"}
    samples, errors = measure.collect(targets, stopwatch, seconds=0, min_rounds=12, warmup=0)
    assert gc.isenabled()
    assert not errors
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = ["".join(seen[i : i + 3]) for i in range(3, len(seen), 3)]
    assert rounds[:6] == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_a_target_that_raises_while_sampled_leaves_the_others_in():
    calls = iter(range(100))

    def breaks():
        if next(calls) > 3:
            raise RuntimeError("out of luck")

    targets = {
        "good": measure.Target(lambda: None, prepare=lambda: None),
        "bad": measure.Target(breaks, prepare=lambda: None),
    }
    samples, errors = measure.collect(targets, measure.wall_seconds, seconds=0, min_rounds=8, warmup=0)
    assert len(samples["good"]) == 8
    assert "bad" not in samples
    assert str(errors["bad"]) == "out of luck"


# Agreement


def cell(pass_name: str, *names: str) -> dict[str, Row]:
    problem = Problem(TINY, torch.device("cpu"))
    timing = Timing(measure.wall_seconds, seconds=0.01, min_rounds=3, warmup=0)
    rows, _ = measure_cell(problem, problem.truth(), pass_name, names, timing)
    return rows


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch):
    """spoil(layer): the eager contender becomes layer(x, h0, its own results)."""

    def install(layer):
        honest = contenders.build

        def build(name: str, problem: Problem) -> Contender:
            contender = honest(name, problem)
            if name == "eager":
                inner = contender.layer
                contender.layer = lambda x, h0: layer(x, h0, *inner(x, h0))
            return contender

        monkeypatch.setattr(contenders, "build", build)

    return install


@pytest.mark.parametrize("pass_name", ["forward", "training"])
def test_a_right_contender_is_timed_beside_nn_rnn(pass_name):
    rows = cell(pass_name, "eager", NAIVE)
    for name in (BASELINE, "eager", NAIVE):
        assert rows[name].status == TIMED, rows[name].reason
        assert len(rows[name].samples) == len(rows[BASELINE].samples) >= measure.MIN_ROUNDS
        assert rows[name].median > 0
    assert rows[BASELINE].speedup == 1
    gradients = {"d x", "d h0", "d weight_ih_l0", "d weight_hh_l0", "d bias_ih_l0", "d bias_hh_l0"}
    assert set(rows["eager"].errors) == {"output", "h_n"} | (gradients if pass_name == "training" else set())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda x, h0, output, h_n: (output * 1.00001, h_n),
            r"The error of output .* is 1\.\de-05, nn.RNN's",
        ),
        (lambda x, h0, output, h_n: (output, h_n + float("nan")), r"^h_n is not finite\.$"),
        (lambda x, h0, output, h_n: (output, h_n / 0), r"^h_n is not finite\.$"),
    ],
    ids=["wrong", "nan", "inf"],
)
def test_a_wrong_contender_is_not_timed(spoil, layer, reason):
    spoil(layer)
    rows = cell("forward", "eager")
    assert rows["eager"].status == WRONG
    assert rows["eager"].samples == []
    assert rows["eager"].median is None
    assert re.search(reason, rows["eager"].reason), rows["eager"].reason
    assert rows[BASELINE].status == TIMED


def test_a_wrong_gradient_is_found(spoil):
    spoil(lambda x, h0, output, h_n: (output + (x - x.detach()).sum() * 1e-4, h_n))
    assert cell("forward", "eager")["eager"].status == TIMED
    row = cell("training", "eager")["eager"]
    assert row.status == WRONG
    assert row.worst == "d x"


def test_a_contender_that_raises_is_a_row_with_the_reason(spoil):
    def broken(x, h0, output, h_n):
        raise RuntimeError("the launch\nfailed")

    spoil(broken)
    row = cell("forward", "eager")["eager"]
    assert (row.status, row.reason, row.samples) == (FAILED, "RuntimeError: the launch failed", [])


def test_an_unavailable_backend_is_a_row_and_no_failure(spoil):
    def refuses(x, h0, output, h_n):
        raise BackendUnavailableError("no such device here")

    spoil(refuses)
    row = cell("forward", "eager")["eager"]
    assert (row.status, row.reason) == (UNAVAILABLE, "no such device here")


def test_without_nn_rnn_nothing_is_timed(monkeypatch):
    honest = contenders.build

    def build(name, problem):
        if name == BASELINE:
            raise MemoryError("no room")
        return honest(name, problem)

    monkeypatch.setattr(contenders, "build", build)
    rows = cell("forward", "eager")
    assert rows[BASELINE].reason == "MemoryError: no room"
    assert rows["eager"].status == FAILED
    assert "no error to compare with" in rows["eager"].reason


def test_a_missing_or_misshapen_result_is_an_error():
    truth = {"output": torch.ones(2, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"output is missing: expected a tensor of shape \(2, 3\)"):
        agreement.errors({"output": None}, truth)
    with pytest.raises(ValueError, match=r"output has shape \(3,\), expected \(2, 3\)"):
        agreement.errors({"output": torch.ones(3)}, truth)


@pytest.mark.parametrize(
    ("own", "baseline", "passes"),
    [
        (1.5e-6, 1.0e-6, True),  # 1.5 times nn.RNN's own
        (1.6e-6, 1.0e-6, False),
        (2.9e-7, 1.0e-8, True),  # below the floor
        (3.1e-7, 1.0e-8, False),
        (0.2, 0.2, False),  # nn.RNN itself is no yardstick
        (1e-7, float("nan"), False),
        (float("inf"), 1e-7, False),
    ],
)
def test_the_bar(own, baseline, passes):
    verdict = agreement.judge({"output": own}, {"output": baseline}, 64, torch.float32)
    assert (verdict.objection is None) == passes, verdict.objection


# The run and its files


def test_the_smallest_sweep_ends_with_a_table_and_files(published):
    folder, printed = published
    assert sorted(path.name for path in folder.iterdir()) == ["machine.json", "smallest.jsonl", "smallest.md"]
    assert "[1/4] B=1 T=16 I=32 H=32 forward ... 0:00 elapsed" in printed
    assert "us a step" in printed
    run, rows = records.read(folder / "smallest.jsonl")
    assert run["partial"] == ""
    assert len(rows) == len(SWEEPS["smallest"].workloads) * 2 * len(contenders.CONTENDERS)
    assert {row.contender for row in rows if row.status == TIMED} >= {BASELINE, "eager", NAIVE}
    assert all(row.reason for row in rows if row.status != TIMED)


def test_the_files_name_neither_host_nor_path(published):
    folder, _ = published
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        for private in (str(ROOT), str(Path.home()), platform.node()):
            assert f"{private}/" not in text
            assert f'"{private}"' not in text


def test_the_page_is_rebuilt_byte_by_byte(published, tmp_path):
    folder, _ = published
    copy = tmp_path / "smallest.jsonl"
    copy.write_bytes((folder / "smallest.jsonl").read_bytes())
    command = [sys.executable, "-m", "bench.report", str(copy)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "smallest.md").read_bytes() == (folder / "smallest.md").read_bytes()


def test_a_partial_or_wrong_run_fails_and_leaves_the_published_table_alone(published, tmp_path):
    folder, _ = published
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "spoiler.py").write_text(
        "def pytest_configure():\n"
        "    from bench.contenders import Contender\n"
        "    forward = Contender.forward\n"
        "    def spoiled(self):\n"
        "        output, h_n = forward(self)\n"
        "        return (output if 'RNN' == type(self.layer).__name__ else output + 1e-3), h_n\n"
        "    Contender.forward = spoiled\n"
    )
    # nn.RNN is not selected, and measured all the same: without it there is no bar and no speedup.
    options = ["--sweep", "smallest", "--results", str(folder.parent), "-k", "B1-T16 and forward and eager"]
    done = pytest_bench(*options, "-p", "spoiler", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eager: wrong. The error of output against the float64 reference" in done.stdout
    assert "2 of 20 rows were run and 1 row failed." in done.stdout
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"smallest.partial.jsonl", "smallest.partial.md"}
    _, rows = records.read(folder / "smallest.partial.jsonl")
    assert [(row.contender, row.status) for row in rows] == [(BASELINE, TIMED), ("eager", WRONG)]
    for path in folder.glob("*.partial.*"):
        path.unlink()


def test_a_tie_is_called_one():
    row = Row(*TINY, "forward", "eager", TIMED, speedup=1.1, speedup_low=0.99, speedup_high=1.2)
    assert report.verdict(row) == "tie"
    row.speedup_low = 1.004  # printed as 1.00
    assert report.verdict(row) == "tie"
    row.speedup_low = 1.01
    assert report.verdict(row) == "faster"
    row.speedup_low, row.speedup_high = 0.8, 0.99
    assert report.verdict(row) == "slower"


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.234, "1.23"), (123.4, "123"), (12345.6, "12346")]
)
def test_digits(value, text):
    assert report.digits(value) == text
