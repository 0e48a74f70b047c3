"""The run as a whole: its options, its rows, the progress line, the table at the end, the files."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, measure, report
from bench import rows as records
from bench.cell import device_timing, measure_cell
from bench.contenders import CONTENDERS, Problem
from bench.rows import FAILURES, Row
from bench.workloads import PASSES, SWEEPS, Workload

Cell = tuple[Workload, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("elman bench")
    group.addoption("--sweep", choices=sorted(SWEEPS), default="quick", help="shapes to run (default: quick)")
    group.addoption(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="where <machine>/<sweep>.md and .jsonl are written (default: results/ in the repository)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's own table repeats ours in two hundred columns: shown only to who uses its options.
    arguments = [str(argument) for argument in config.invocation_params.args]
    own = [a for a in arguments if a.startswith("--benchmark-") and a != "--benchmark-only"]
    config.option.benchmark_quiet = config.option.benchmark_quiet or not own


class Run:
    """All rows of one pytest session. Cells are measured when first asked for."""

    def __init__(self, session: pytest.Session) -> None:
        config = session.config
        self.config = config
        self.sweep = config.getoption("sweep")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cells = selected(session)
        self.rows: dict[tuple[Workload, str, str], Row] = {}
        self.raised: dict[tuple[Workload, str, str], Exception] = {}
        self.progress = Progress(config, len(self.cells))
        self.problem: Problem | None = None
        self.truth: dict[str, torch.Tensor] = {}
        # --benchmark-max-time, one second unless told, scales the sweep's seconds.
        scale = float(config.getoption("benchmark_max_time"))
        rounds = max(measure.MIN_ROUNDS, config.getoption("benchmark_min_rounds"))
        self.timing = device_timing(self.device, SWEEPS[self.sweep].seconds * scale, rounds)
        self.record = self._record()

    def row(self, workload: Workload, pass_name: str, contender: str) -> Row:
        """The row of that contender; its whole cell is measured if it has not been yet."""
        cell = (workload, pass_name)
        if (*cell, contender) not in self.rows:
            self.progress.begin(f"{workload.shape} {PASSES[pass_name]}")
            if self.problem is None or self.problem.workload != workload:
                self.progress.say("reference")
                self.problem = Problem(workload, self.device)
                self.truth = self.problem.truth()
            rows, raised = measure_cell(
                self.problem, self.truth, pass_name, self.cells[cell], self.timing, self.progress.say
            )
            self.rows.update({(*cell, name): row for name, row in rows.items()})
            self.raised.update({(*cell, name): error for name, error in raised.items()})
            self.progress.end([row for row in rows.values() if row.status in FAILURES])
        return self.rows[(*cell, contender)]

    def _record(self) -> dict[str, Any]:
        """What the rows were measured on and how; `finish` adds whether they are complete."""
        clock = "CUDA events" if self.device.type == "cuda" else "time.perf_counter"
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "sweep": self.sweep,
            "date": now.strftime("%Y-%m-%d %H:%M UTC"),
            **machine.commit(self.config.rootpath),
            "machine": machine.machine(self.device),
            "software": machine.software(self.device),
            "float32": machine.float32_state(self.device),
            "load_average": machine.load_average(),
            "timing": {
                "clock": clock,
                "threads": torch.get_num_threads(),
                "seconds": self.timing.seconds,
                "min_rounds": self.timing.min_rounds,
            },
        }

    def partial(self) -> str:
        """Why this run is no complete table of its sweep, in a sentence; empty if it is one."""
        plan = len(SWEEPS[self.sweep].workloads) * len(PASSES) * len(CONTENDERS)
        failed = sum(row.status in FAILURES for row in self.rows.values())
        reasons = []
        if len(self.rows) < plan:
            reasons.append(f"{len(self.rows)} of {plan} rows were run")
        if failed:
            reasons.append(f"{failed} {'row' if failed == 1 else 'rows'} failed")
        return f"{' and '.join(reasons)}." if reasons else ""

    def ordered(self) -> list[Row]:
        """The rows in the sweep's order, whatever order they were run in."""
        plan = [
            (workload, pass_name, name)
            for workload in SWEEPS[self.sweep].workloads
            for pass_name in PASSES
            for name in CONTENDERS
        ]
        return [self.rows[key] for key in plan if key in self.rows]

    def write(self) -> Path:
        """Write rows, page and machine.json; returns the page's path.

        Only a complete run without failures writes <sweep>.md and .jsonl. Any other goes to
        <sweep>.partial.md and .jsonl, so that it never replaces a complete table.
        """
        record = {**self.record, "partial": self.partial()}
        root = self.config.getoption("results") or self.config.rootpath / "results"
        folder = Path(root) / machine.slug(record["machine"])
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.sweep}.partial" if record["partial"] else self.sweep
        rows = self.ordered()
        records.write(folder / f"{stem}.jsonl", record, rows)
        page = folder / f"{stem}.md"
        page.write_text(report.markdown(record, rows), encoding="utf-8", newline="\n")
        described = folder / "machine.json"
        if not record["partial"] or not described.exists():
            text = json.dumps(record["machine"], indent=2, ensure_ascii=False) + "\n"
            described.write_text(text, encoding="utf-8", newline="\n")
        return page


def selected(session: pytest.Session) -> dict[Cell, list[str]]:
    """The contenders to run of each cell, after -k and the like."""
    cells: dict[Cell, list[str]] = {}
    for item in session.items:
        case: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "contender" in case:
            cells.setdefault((case["workload"], case["pass_name"]), []).append(case["contender"])
    return cells


class Progress:
    """Where the run is: one line that rewrites itself on a terminal, otherwise one line per cell."""

    def __init__(self, config: pytest.Config, total: int) -> None:
        self.reporter = config.pluginmanager.getplugin("terminalreporter")
        self.live = self.reporter.isatty and config.get_verbosity() <= 0
        self.total, self.done = total, 0
        self.start = time.perf_counter()
        self.line = ""

    def begin(self, title: str) -> None:
        elapsed = time.perf_counter() - self.start
        left = ""
        if self.done:
            left = f", about {clock_time(elapsed / self.done * (self.total - self.done))} left"
        self.line = f"[{self.done + 1}/{self.total}] {title} ... {clock_time(elapsed)} elapsed{left}"
        if not self.done:
            self.reporter.write("\n")  # ends pytest's own line, the file's name
        if not self.live:
            self.reporter.write(f"{self.line}\n", flush=True)

    def say(self, phase: str) -> None:
        if self.live:
            self.reporter.rewrite(f"{self.line}, {phase}", erase=True)

    def end(self, failures: list[Row]) -> None:
        self.done += 1
        if self.live and (failures or self.done == self.total):
            self.reporter.rewrite(f"{self.line}\n", erase=True)
        for row in failures:
            self.reporter.write(f"  {row.contender}: {row.status}. {row.reason}\n", red=True)


def clock_time(seconds: float) -> str:
    """0:07, 12:34."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


RUN = pytest.StashKey[Run]()


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    request.config.stash[RUN] = Run(request.session)
    return request.config.stash[RUN]


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots between the progress lines, which also tell of failures: a row counts, but prints nothing."""
    if RUN in config.stash and config.get_verbosity() <= 0 and report.when == "call":
        return report.outcome, "", report.outcome.upper()
    return None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is None or not run.rows:
        return
    timing = run.record["timing"]
    terminalreporter.section(f"{run.sweep}: {timing['clock']}, torch threads: {timing['threads']}")
    terminalreporter.write_line(report.terminal(run.ordered()))
    terminalreporter.write_line("")
    page = run.write()
    if run.partial():
        terminalreporter.write_line(f"Not a complete run, so no published table was touched: {run.partial()}")
    terminalreporter.write_line(f"Wrote {page} and {page.with_suffix('.jsonl').name}")
