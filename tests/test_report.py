"""What a person reads of a run: pages, CSV, pictures and the index, from rows that were stored."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import measure, report, tables
from bench import page as pages
from bench import rows as records
from bench.peers import PEERS
from bench.rows import BASELINE, FAILED, LEFT_OUT, SHED, TIMED, UNAVAILABLE, WRONG, Row
from bench.workloads import Workload

ROOT = Path(__file__).parents[1]

CPU = {
    "sweep": "quick",
    "device": "cpu",
    "date": "2026-11-23 12:15 UTC",
    "commit": "0123456789ab",
    "dirty": True,
    "source": "0" * 12,
    "machine": {
        "cpu": "Some CPU 3000",
        "cores": 2,
        "instructions": "AVX2",
        "memory_gib": 24,
        "os": "Linux 6.1 x86_64",
    },
    "software": {"python": "3.11.7", "torch": "2.13.0+cpu", "triton": "3.7.1"},
    "float32": "IEEE float32 (CPU)",
    "load_average": 0.25,
    "timing": {
        "clock": "time.perf_counter",
        "threads": 2,
        "seconds": 1.0,
        "min_rounds": 6,
        "cache": "warm",
    },
    "plan": {"dtypes": ["float32"], "passes": ["forward", "training"], "contenders": [BASELINE, "eager"]},
    "floor": {
        "bandwidth": [[65536, 8e10], [2**28, 1e10]],
        "matrix": {"float32": 1e11},
        "step": {"call": 1e-6},
    },
    "partial": "",
}
GPU = {
    **CPU,
    "sweep": "standard",
    "device": "cuda",
    "machine": {
        **CPU["machine"],
        "gpu": "Some GPU 9000",
        "gpu_memory_gib": 140,
        "multiprocessors": 132,
        "compute_capability": "9.0",
        "driver": "570.1",
        "clocks_mhz": {"sm": 1980, "memory": 3201},
    },
    "software": {**CPU["software"], "cuda": "13.0", "cudnn": "91300"},
    "timing": {**CPU["timing"], "clock": "CUDA events", "cache": "warm"},
    "floor": {
        "bandwidth": [[2**20, 5e12], [2**30, 4e12]],
        "matrix": {"bfloat16": 8e14, "float32": 5e13, "tf32": 4e14},
        "step": {"launch": 2e-6, "chain": 1e-7, "meeting": {"32": 1e-6, "132": 1.2e-6}, "on_chip": 400_000},
    },
}
# Twelve rounds whose median is that of the middle: what slows a round slows all contenders.
ROUNDS = (0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06)


def timed(workload: Workload, pass_name: str, seconds: dict[str, float], **fields: object) -> list[Row]:
    """A cell's rows, whose medians are these; ratios of the same row of ROUNDS are exact."""
    rows = []
    for name, median in seconds.items():
        samples = [median * each for each in ROUNDS]
        row = Row(workload, pass_name, name, TIMED, samples=samples, median=median, **fields)
        row.errors, row.worst = {"output": (1.5e-7, 1e-7), "h_n": (1e-7, None)}, "output"
        row.p20, row.p80 = measure.quantile(samples, 0.2), measure.quantile(samples, 0.8)
        row.median_low, row.median_high = measure.median_interval(samples)
        rows.append(row)
    for row in rows:
        row.speedup, row.speedup_low, row.speedup_high = measure.speedup(rows[0].samples, row.samples)
    return rows


def line_of(page: str, *parts: str) -> str:
    """The one line of a page that has all of the parts, in that order, each a whole cell."""
    start = "| " + " | ".join(parts) + " |"
    found = [line for line in page.split("\n") if line.startswith(start)]
    assert len(found) == 1, f"{len(found)} lines start with {start!r}"
    return found[0]


def cpu_rows() -> list[Row]:
    """Sizes of powers of two, and power laws: 10 us * T * B * (H / 64)**2, eager twice as fast."""
    rows = []
    for B, T, H in ((1, 64, 64), (1, 256, 64), (1, 256, 128), (1, 256, 256), (4, 256, 64), (16, 256, 64)):
        for pass_name, factor in (("forward", 1), ("training", 3)):
            seconds = factor * 1e-5 * T * B * (H / 64) ** 2
            rows += timed(Workload(B, T, H, H), pass_name, {BASELINE: seconds, "eager": seconds / 2})
    last = Workload(16, 1024, 512, 512)
    rows += timed(last, "forward", {BASELINE: 2.0, "eager": 2.0})
    for workload, pass_name in dict.fromkeys((row.workload, row.pass_name) for row in rows):
        rows.append(Row(workload, pass_name, "cudnn", UNAVAILABLE, "cuDNN needs a CUDA GPU."))
    rows.append(Row(last, "forward", "naive loop", LEFT_OUT, "Only small shapes."))
    rows.append(Row(last, "training", BASELINE, SHED, "The budget did not reach."))
    rows.append(Row(rows[0].workload, "forward", "naive loop", WRONG, "off by ||x|| > 1", worst="output"))
    rows[-1].errors = {"output": (0.5, 1e-7)}
    rows.append(Row(rows[0].workload, "training", "naive loop", FAILED, "RuntimeError: first\nsecond"))
    return rows


def gpu_rows() -> list[Row]:
    rows = []
    for dtype, factor in (("bfloat16", 1.0), ("float32", 4.0), ("tf32", 2.0)):
        for B in (1, 16):
            for H in (64, 256, 1024):
                for pass_name in ("forward", "backward", "training"):
                    seconds = {BASELINE: 8e-3, "auto": 2e-3, "triton:resident": 2e-3, "naive loop": 0.1}
                    seconds = {name: each * factor * H / 64 for name, each in seconds.items()}
                    found = timed(Workload(B, 1024, H, H, dtype), pass_name, seconds, cold=3e-3, graph=1e-3)
                    for row in found:
                        row.host, row.first, row.memory = 5e-5, 1.5, 3 * 2**20
                        row.chip = {"sm_mhz": 1980, "temperature_c": 40 + B, "throttle": [], "idle": False}
                        if B == 1:
                            row.chip["throttle"] = ["power cap"]
                    found[1].route = "triton:resident (BLOCK_B=16)"
                    rows += found
    return rows


# --- Numbers and verdicts ----------------------------------------------------------------------------


def test_a_tie_is_called_one():
    row = Row(
        Workload(2, 5, 3, 4), "forward", "eager", TIMED, speedup=1.1, speedup_low=0.99, speedup_high=1.2
    )
    assert tables.verdict(row) == "tie"
    row.speedup_low = 1.004  # printed as 1.00
    assert tables.verdict(row) == "tie"
    row.speedup_low = 1.01
    assert tables.verdict(row) == "faster"
    row.speedup_low, row.speedup_high = 0.8, 0.99
    assert tables.verdict(row) == "slower"


def test_a_row_without_a_speedup_has_no_verdict():
    with pytest.raises(ValueError, match=r"eager at B=2 T=5 I=3 H=4 has no speedup"):
        tables.verdict(Row(Workload(2, 5, 3, 4), "forward", "eager", FAILED))


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.234, "1.23"), (123.4, "123"), (12345.6, "12346"), (0, "0")]
)
def test_digits(value, text):
    assert tables.digits(value) == text


@pytest.mark.parametrize(("ratio", "text"), [(12.345, "12.35"), (0.914, "0.91"), (0.0414, "0.041")])
def test_times(ratio, text):
    assert tables.times(ratio) == text


@pytest.mark.parametrize(
    ("first", "median", "calls"),
    [
        (0.101, 0.001, "100"),  # 100 ms more than a call, each call saves 1 ms
        (0.1014, 0.001, "101"),
        (0.010, 0.001, "-"),  # ten calls: nothing was compiled
        (0.101, 0.002, "never"),  # as fast as nn.RNN
        (0.101, 0.004, "never"),
        (None, 0.001, ""),
    ],
)
def test_when_the_first_call_is_repaid(first, median, calls):
    rows = timed(Workload(2, 5, 3, 4), "forward", {BASELINE: 0.002, "eager": median})
    rows[1].first = first
    assert tables.Table(CPU, rows).repaid(rows[1]) == calls


def test_the_fastest_and_who_ties_with_it():
    cell = {
        row.contender: row for row in timed(Workload(2, 5, 3, 4), "forward", {BASELINE: 2.0, "eager": 1.0})
    }
    assert tables.fastest(cell) == ["eager"]
    noisy = Row(Workload(2, 5, 3, 4), "forward", "auto", TIMED, median=1.005)
    noisy.samples = [1.005 * each for each in reversed(ROUNDS)]
    assert tables.fastest({**cell, "auto": noisy}) == ["eager", "auto"]
    # The same medians, but paired: a percent in each and every round is no tie.
    noisy.samples = [1.01 * each for each in ROUNDS]
    noisy.median = 1.01
    assert tables.fastest({**cell, "auto": noisy}) == ["eager"]


def test_auto_stands_for_elman_where_it_was_timed():
    cell = {BASELINE: 2.0, "auto": 1.0, "eager": 0.5, "naive loop": 0.1}
    rows = timed(Workload(1, 5, 3, 4), "forward", cell)
    assert tables.Table(CPU, rows).leader() == "auto"
    assert tables.Table(CPU, [row for row in rows if row.contender != "auto"]).leader() == "eager"
    assert tables.Table(CPU, rows[:1]).leader() == ""


def test_geometric_means_and_their_worst_cells():
    rows = timed(Workload(1, 5, 3, 4), "forward", {BASELINE: 4.0, "eager": 1.0})
    rows += timed(Workload(2, 5, 3, 4), "forward", {BASELINE: 1.0, "eager": 1.0})
    rows += timed(Workload(3, 5, 3, 4), "forward", {BASELINE: 1.0, "eager": 2.0})
    rows.append(Row(Workload(4, 5, 3, 4), "forward", "eager", FAILED, "RuntimeError"))
    (mean,) = tables.Table(CPU, rows).means()
    assert mean.ratio == pytest.approx(2 ** (1 / 3))  # of 4, 1 and 1/2
    assert (mean.counts, len(mean.rows), mean.shapes) == ("1 / 1 / 1", 3, 4)
    assert mean.worst.workload.batch == 3
    page = pages.markdown(CPU, rows)
    assert "| forward | eager | 1.26 | 3 of 4 | 1 / 1 / 1 | 0.50 [0.50, 0.50] at B=3 T=5 I=3 H=4 |" in page


# --- Pages -------------------------------------------------------------------------------------------


def test_the_page_of_a_cpu():
    """Every number here was worked out by hand from the formulas in bench/floor.py."""
    workload = Workload(1, 100, 8, 8)
    rows = timed(workload, "forward", {BASELINE: 2e-3, "eager": 1e-3}, first=0.101, memory=3 * 2**20)
    page = pages.markdown(CPU, rows)
    assert page.startswith("# quick: Some CPU 3000, 2 cores\n\n|  |  |\n")
    assert "| commit | 0123456789ab, with uncommitted changes |" in page
    assert "| cache | warm |" in page
    assert "| threads | 2 |" in page
    assert "| measured bandwidth | 10.0 GB/s (256 MiB) |" in page
    assert "| measured matrix rate, GFLOP/s | float32 100 |" in page
    assert "| shortest step, us | empty call 1.00 |" in page
    low, high = measure.median_interval(rows[1].samples)
    # p20 of twelve samples lies between the third and the fourth: 0.96 + 0.2 * 0.01.
    assert line_of(page, "B=1 T=100 I=8 H=8", "forward", "eager", "1.00 [0.962 .. 1.04]").split(" | ")[
        4:
    ] == [
        f"[{low * 1e3:.3f}, {high * 1e3:.2f}]",
        "12",
        "10.0",  # us a step: 1 ms over 100
        "2.00 [2.00, 2.00]",
        "10% step",  # 100 calls of 1 us
        "1.5e-07 / 1.0e-07 (output) |",
    ]
    # In 1 ms: 2 * 100 * 8 * 16 = 25,600 flop; and of four bytes each x 800, matrices 128, biases 16, h0 8,
    # output 800, h_n 8, which is 7040 bytes.
    work = line_of(page, "B=1 T=100 I=8 H=8", "forward", "eager", "1.00", "0.100", "step", "0.0256")
    assert work.endswith("| 0.00704 | 3.00 | 0.101 | 100 |")
    assert line_of(page, "B=1 T=100 I=8 H=8", "forward", BASELINE, "2.00", "0.100").endswith("| 0.101 | - |")
    for absent in (
        "dtype |",
        "cold L2",
        "graph ms",
        "host us",
        "chip",
        "Failures",
        "Not measured",
        "TFLOP/s",
    ):
        assert absent not in page


def test_what_failed_and_what_was_not_measured():
    page = pages.markdown(CPU, cpu_rows())
    assert "## Failures" in page
    assert "| B=1 T=64 I=64 H=64 | forward | naive loop | off by \\|\\|x\\|\\| > 1 |" in page
    assert "| B=1 T=64 I=64 H=64 | forward+backward | naive loop | RuntimeError: first second |" in page
    assert line_of(page, "B=1 T=64 I=64 H=64", "forward", "naive loop", "wrong").endswith(
        "| 5.0e-01 / 1.0e-07 (output) |"
    )
    assert "| cudnn | everywhere | cuDNN needs a CUDA GPU. |" in page
    assert "| naive loop | B=16 T=1024 I=512 H=512 forward | Only small shapes. |" in page
    assert "| nn.RNN | B=16 T=1024 I=512 H=512 forward+backward | The budget did not reach. |" in page


def test_where_a_contender_is_missing_is_told_by_what_sets_it_apart():
    rows = []
    for dtype in ("bfloat16", "float32"):
        for B in (1, 2, 4):
            for pass_name in ("forward", "training"):
                workload = Workload(B, 5, 4, 4, dtype)
                rows += timed(workload, pass_name, {BASELINE: 1.0})
                if dtype == "bfloat16" and pass_name == "training":
                    rows.append(Row(workload, pass_name, "xma", UNAVAILABLE, "No bfloat16 gradients."))
                else:
                    rows += timed(workload, pass_name, {"xma": 1.0})
    page = pages.markdown({**CPU, "floor": {}}, rows)
    assert "| xma | 3 of 3 shapes, bfloat16, forward+backward | No bfloat16 gradients. |" in page


def test_a_run_without_a_floor_has_no_percent():
    page = pages.markdown({**CPU, "floor": {}}, timed(Workload(1, 100, 8, 8), "forward", {BASELINE: 2e-3}))
    assert "floor" not in page.replace("rounding\nfloor", "")
    assert line_of(page, "B=1 T=100 I=8 H=8", "forward", BASELINE, "2.00", "0.0128", "0.00352")


def test_the_page_of_a_gpu():
    rows = gpu_rows()
    # One cell where auto is behind: the worst one has to come first.
    slow = replace(rows[0].workload, hidden_size=2048, input_size=2048)
    rows += timed(slow, "forward", {BASELINE: 3e-3, "auto": 4e-3}, route="triton:step")
    page = pages.markdown(GPU, rows)
    assert page.startswith("# standard: Some GPU 9000, 2 cores\n")
    assert "| clocks, MHz | sm 1980, memory 3201 |" in page
    assert "| cache | warm; cold L2 in a column of its own |" in page
    assert (
        "| chip during the run | sm 1980 to 1980 MHz, temperature 41 to 56 °C, "
        "throttle power cap in 108 rows and none in 108 rows, idle no in 216 rows |" in page
    )
    assert "meeting of 132 1.20" in page
    worst = page.split("## Worst rows of auto")[1].split("\n")
    # Its floor is 1024 meetings of 32, 1.02 ms: W_hh (8 MiB) is too large for one multiprocessor.
    assert worst[6].startswith(
        "| B=1 T=1024 I=2048 H=2048 | bfloat16 | forward | triton:step | 4.00 | nn.RNN |"
    )
    assert worst[6].endswith("| 3.00 | 0.75 [0.75, 0.75] | 26% step |")
    assert worst[7].count("tie [1.00, 1.00]") == 1
    assert len([line for line in worst[6:] if line.startswith("| B=")][:11]) >= 10
    assert worst[16] == ""  # ten of them
    cells = line_of(
        page, "B=16 T=1024 I=64 H=64", "tf32", "forward", "auto (resident)", "4.00", "0.102"
    ).split(" | ")
    # 1024 steps of 0.1 us; 2 * 16 * 1024 * 64 * 128 flop in 4 ms; (1.5 - 0.004) / (0.016 - 0.004) calls.
    assert cells[6:] == ["step", "0.0671", "2.11", "3.00", "1.50", "125", "3.00", "1.00", "50.0", " |"]
    assert "sm 1980 MHz, temperature 56 °C, throttle none, idle no" in line_of(
        page, "B=16 T=1024 I=64 H=64", "tf32", "forward", "nn.RNN", "16.0", "0.102"
    )


def test_the_page_says_which_kernels_were_allowed():
    tuned = {"ELMAN_AUTOTUNE": "on", "shipped: a": "1"}
    page = pages.markdown({**GPU, "tables": tuned}, gpu_rows())
    assert "| entries of tuned tables | user 0, shipped 1 |" in page
    assert "kernels allowed" not in page
    page = pages.markdown({**GPU, "tables": {**tuned, "ELMAN_KERNELS": "resident,step"}}, gpu_rows())
    assert "| kernels allowed | resident,step |" in page


def test_the_page_says_how_the_peers_that_took_part_differ():
    first, second = PEERS[0], PEERS[1]
    rows = timed(Workload(2, 5, 3, 4), "forward", {BASELINE: 2.0, first.name: 1.0})
    rows.append(Row(rows[0].workload, "forward", second.name, UNAVAILABLE, "It is not installed."))
    page = pages.markdown(GPU, rows)
    assert f"- {first.name}: {first.differs}\n" in page
    assert second.differs not in page


def test_the_terminal_shows_it_all_within_its_width():
    rows = cpu_rows()
    text = pages.terminal(CPU, rows)
    assert max(map(len, text.split("\n"))) <= pages.WIDTH
    lines = text.split("\n")
    at = lines.index("B=1 T=256 I=128 H=128, forward+backward")
    assert lines[at + 1].split()[0] == BASELINE
    # 3 * 10 us * 256 * 4, halved; the floor: 3 * 4 * 256 * 128**2 flop at 100 GFLOP/s, or 512 calls of 1 us.
    assert lines[at + 2].startswith("  eager")
    assert "15.4 [14.8 .. 15.9]" in lines[at + 2]
    assert " 60.0  2.00 [2.00, 2.00] " in lines[at + 2]
    assert lines[at + 2].endswith(" 3.3% step  1.5e-07 / 1.0e-07")
    assert "naive loop" in lines[lines.index("Failures") + 2]
    assert "cudnn (everywhere): cuDNN needs a CUDA GPU." in lines
    assert max(map(len, pages.terminal(GPU, gpu_rows()).split("\n"))) <= pages.WIDTH


def test_the_csv_has_every_row_in_plain_units():
    rows = cpu_rows()
    rows[1].first = 0.5
    stored = list(csv.DictReader(io.StringIO(report.csv(CPU, rows))))
    assert len(stored) == len(rows)
    eager = stored[1]
    assert (eager["contender"], eager["status"], eager["batch"], eager["steps"]) == (
        "eager",
        TIMED,
        "1",
        "64",
    )
    assert float(eager["median_s"]) == rows[1].median == 0.00032
    assert float(eager["step_s"]) == 5e-6
    assert float(eager["speedup"]) == 2
    assert (eager["verdict"], eager["bound"], eager["floor_s"]) == ("faster", "step", "6.4e-05")
    assert float(eager["share_of_floor"]) == pytest.approx(0.2)
    assert float(eager["flop_per_s"]) == pytest.approx(2 * 64 * 64 * 128 / 0.00032)
    assert eager["repaid_after_calls"] == str(-(-(500_000 - 320) // 320))
    failed = stored[-1]
    assert (failed["status"], failed["reason"]) == (FAILED, "RuntimeError: first\nsecond")
    assert failed["median_s"] == failed["flop_per_s"] == ""
    assert not any(len(cell) > 200 for row in stored for cell in row.values())
    chip = next(csv.DictReader(io.StringIO(report.csv(GPU, gpu_rows()))))["chip"]
    assert json.loads(chip)["throttle"] == ["power cap"]


# --- Files -------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A folder of results with a CPU's and a GPU's stored rows, nothing else."""
    folders = {"some-cpu": ("quick", CPU, cpu_rows()), "some-gpu": ("standard", GPU, gpu_rows())}
    for name, (table, run, rows) in folders.items():
        (tmp_path / name).mkdir()
        records.write(tmp_path / name / "rows.jsonl", {table: (run, rows)})
    return tmp_path


def rebuild(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.report", str(folder)])
    report.main()


def test_stored_rows_give_the_same_files_byte_by_byte(results):
    pytest.importorskip("matplotlib")
    shutil.rmtree(results / "some-gpu")
    folder = results / "some-cpu"
    paths = report.publish(folder, "quick", CPU, cpu_rows())
    assert [path.name for path in paths] == [
        "quick.md",
        "quick.csv",
        *(f"quick-{kind}.png" for kind in report.PICTURES),
    ]
    written = {path.name: path.read_bytes() for path in paths}
    assert b"\r" not in written["quick.md"] + written["quick.csv"]
    for path in paths:
        path.unlink()
    command = [sys.executable, "-m", "bench.report", str(results)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert [Path(line.removeprefix("Wrote ")).name for line in told.stdout.splitlines()] == [
        *written,
        "README.md",
    ]
    assert {name: (folder / name).read_bytes() for name in written} == written


def test_a_folder_without_rows_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        rebuild(monkeypatch, tmp_path)
    assert stopped.value.code == 2
    assert "there is no rows.jsonl and no charlm.jsonl in" in capsys.readouterr().err


def test_rows_of_another_version_are_an_error(results, monkeypatch, capsys):
    with (results / "some-cpu" / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"table": "quick", "row": {"batch": 1}}\n')
    with pytest.raises(SystemExit) as stopped:
        rebuild(monkeypatch, results)
    assert stopped.value.code == 2
    assert "is no row of this version" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_word_in_place_of_pictures(results, monkeypatch):
    old = results / "some-cpu" / "quick-speedup.png"
    old.touch()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = report.publish(results / "some-cpu", "quick", CPU, cpu_rows())
    assert [path.name for path in paths] == ["quick.md", "quick.csv"]
    page = paths[0].read_text(encoding="utf-8")
    assert pages.NEEDS_MATPLOTLIB in page
    assert "![" not in page
    assert not old.exists()  # it showed other rows


def test_a_partial_table_writes_its_page_alone(tmp_path):
    run = {**CPU, "partial": "3 of 4 rows were run."}
    paths = report.publish(tmp_path, "quick", run, cpu_rows(), partial=True)
    assert paths == [tmp_path / "quick.partial.md"]
    assert list(tmp_path.iterdir()) == paths
    page = paths[0].read_text(encoding="utf-8")
    assert "**Not a complete run: 3 of 4 rows were run.**" in page
    assert pages.NEEDS_MATPLOTLIB not in page


def test_the_index(results):
    (results / "some-gpu" / "standard-us-a-step.png").touch()
    (results / "compile").mkdir()
    (results / "compile" / "sm_90.md").touch()
    report.index(results)
    gpu, picture, cpu, compiled = (results / "README.md").read_text(encoding="utf-8").split("\n\n")[2:]
    assert gpu == (
        "**Some GPU 9000, 2 cores**: [standard](some-gpu/standard.md). "
        "Geometric means of auto over standard: bfloat16 forward 4.00, forward+backward 4.00; "
        "float32 forward 4.00, forward+backward 4.00; "
        "tf32 forward 4.00, forward+backward 4.00. Measured 2026-11-23 12:15 UTC."
    )
    assert picture.startswith("![Microseconds a step")
    assert picture.endswith("](some-gpu/standard-us-a-step.png)")
    # Six shapes at 2 and one tie at 1: 2 ** (6 / 7).
    assert "Geometric means of eager over quick: float32 forward 1.81, forward+backward 2.00." in cpu
    assert compiled.endswith(": [sm_90](compile/sm_90.md).\n")


def test_the_index_says_that_no_gpu_was_measured(results):
    shutil.rmtree(results / "some-gpu")
    report.index(results)
    assert "No GPU has been measured yet." in (results / "README.md").read_text(encoding="utf-8")


# --- Pictures ----------------------------------------------------------------------------------------


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from bench import plots

    return plots


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_an_exact_power_law_has_its_exponent(plots):
    sizes = (1, 4, 16, 64)
    assert plots.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert plots.exponent(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-12)


def test_growth_fits_the_slices(plots):
    figure = plots.growth(tables.Table(CPU, cpu_rows()))
    panels = {
        (axis.get_title(), axis.get_xlabel()): [text.get_text() for text in axis.get_legend().get_texts()]
        for axis in figure.axes
    }
    assert panels["forward, B=1 I=64 H=64", "time steps T"] == ["nn.RNN ~ T^1.00", "eager ~ T^1.00"]
    assert panels["forward, T=256 I=64 H=64", "batch rows B"] == ["nn.RNN ~ B^1.00", "eager ~ B^1.00"]
    assert panels["forward+backward, B=1 T=256 I=H", "hidden size H"] == ["nn.RNN ~ H^2.00", "eager ~ H^2.00"]
    assert len(panels) == 6


def test_the_heat_map_shows_the_speedups(plots):
    rows = cpu_rows()
    figure = plots.speedup_map(tables.Table(CPU, rows))
    forward, backward = figure.axes[:2]
    assert (forward.get_title(), backward.get_title()) == ("forward", "forward+backward")
    # (H, B) in the middle of a cell, read off the axes' own labels.
    hidden = [label.get_text() for label in forward.get_xticklabels()]
    batch = [label.get_text() for label in forward.get_yticklabels()]
    assert (hidden, batch) == (["64", "128", "256", "512"], ["1", "4", "16"])
    said: dict[tuple[str, str], list[str]] = {}
    for text in forward.texts:
        x, y = text.get_position()
        said.setdefault((batch[round(y)], hidden[round(x)]), []).append(text.get_text())
    assert said["1", "64"] == ["2.00", "T=256"]  # most have T=256
    assert said["16", "512"] == ["1.00", "tie", "T=1024"]
    assert len(said) == 6
    assert "eager" in figure.get_suptitle()


def test_the_map_of_winners_names_ties(plots):
    rows = []
    for B, eager in ((1, 1.0), (2, 4.0), (4, 2.0)):
        rows += timed(
            Workload(B, 8, 4, 4), "forward", {BASELINE: 2.0, "auto": 0.1, "eager": eager, "naive loop": 9.0}
        )
    figure = plots.winners_map(tables.Table(CPU, rows))
    assert texts(figure.axes[0]) == ["E", "N", "N=E"]  # auto is one of the others
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["N: nn.RNN", "E: eager"]


def test_us_a_step_takes_the_longest_slice_and_draws_the_floor(plots):
    figure = plots.us_a_step(tables.Table(CPU, cpu_rows()))
    assert "B=1, T=256, I=H" in figure.get_suptitle()
    baseline, eager, floor = figure.axes[0].lines
    assert list(baseline.get_xdata()) == [64, 128, 256]
    assert list(baseline.get_ydata()) == pytest.approx([10, 40, 160])
    assert list(eager.get_ydata()) == pytest.approx([5, 20, 80])
    # A call of 1 us, then 4 H**2 flop a step at 100 GFLOP/s.
    assert list(floor.get_ydata()) == pytest.approx([1, 1, 4 * 256**2 / 1e5])
    assert len({line.get_marker() for line in (baseline, eager)}) == 2
    bare = plots.us_a_step(tables.Table({**CPU, "floor": {}}, cpu_rows()))
    assert len(bare.axes[0].lines) == 2


def test_the_roofline_has_rates_and_roofs(plots):
    rows = timed(Workload(1, 100, 8, 8), "forward", {BASELINE: 2e-3, "eager": 1e-3})
    rows += timed(Workload(1, 100, 8, 8), "training", {BASELINE: 2e-3, "eager": 1e-3})
    (axis,) = plots.roofline(tables.Table(CPU, rows)).axes
    points, roofs = axis.lines[:4], axis.lines[4:]
    assert points[1].get_xdata() == pytest.approx([25_600 / 7040])
    assert points[1].get_ydata() == pytest.approx([0.0256])  # GFLOP/s
    assert [point.get_fillstyle() for point in points] == ["full", "full", "none", "none"]
    memory = roofs[1]
    assert max(memory.get_ydata()) == pytest.approx(100)
    assert memory.get_ydata()[0] == pytest.approx(memory.get_xdata()[0] * 10)  # GB/s
    assert plots.roofline(tables.Table({**CPU, "floor": {}}, rows)) is None


def test_a_gpu_has_a_panel_for_each_dtype_and_no_more_than_six(plots):
    table = tables.Table(GPU, gpu_rows())
    titles = [axis.get_title() for axis in plots.us_a_step(table).axes]
    assert titles[:3] == ["forward, bfloat16", "forward, float32", "forward, tf32"]
    assert len(titles) == 6
    assert [axis.get_title() for axis in plots.roofline(table).axes] == [
        "bfloat16: 4000 GB/s, 800 TFLOP/s",
        "float32: 4000 GB/s, 50.0 TFLOP/s",
        "tf32: 4000 GB/s, 400 TFLOP/s",
    ]


def test_rows_that_are_too_few_make_no_picture(plots, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "axes.spines.top", True)  # the pictures have none
    rows = timed(Workload(1, 100, 8, 8), "forward", {BASELINE: 2e-3, "eager": 1e-3})
    assert [path.name for path in plots.write(tmp_path, "quick", CPU, rows)] == ["quick-roofline.png"]
    assert plots.write(tmp_path, "none", CPU, [Row(rows[0].workload, "forward", "eager", FAILED)]) == []
    assert matplotlib.rcParams["axes.spines.top"] is True
    assert b"Software" not in (tmp_path / "quick-roofline.png").read_bytes()


def test_a_place_of_a_map_has_the_shape_that_is_most_like_the_others(plots):
    square, narrow = Workload(1, 8, 4, 4), Workload(1, 8, 2, 4)
    rare, long = Workload(1, 64, 4, 4), Workload(2, 32, 4, 4)
    others = [long, Workload(2, 16, 4, 4), Workload(4, 8, 4, 4)]
    rows = [Row(w, "forward", "eager", TIMED) for w in (narrow, square, rare, *others)]
    chosen = plots.at_batch_and_hidden(rows)
    assert (chosen[1, 4], chosen[2, 4]) == (square, long)


def test_like_is_drawn_with_like(plots):
    stacked = [Workload(B, 8, 4, 4, layers=2) for B in (1, 2, 4)]
    rows = [row for workload in stacked for row in timed(workload, "forward", {BASELINE: 2.0, "eager": 1.0})]
    rows += timed(Workload(8, 8, 4, 4), "forward", {BASELINE: 2.0, "eager": 1.0})
    figure = plots.speedup_map(tables.Table(CPU, rows))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "2", "4"]
    assert "layers=2" in figure.get_suptitle()
