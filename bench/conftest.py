"""The command line of the suite, its progress line, what it prints at the end, and its exit status."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path

import pytest

from bench import compare, machine, page
from bench.rows import Row, Run
from bench.session import PLAN, RESULTS, ROOT, Cell, Plan, Session
from bench.workloads import PASSES, SWEEPS
from elman import available_backends

SESSION = pytest.StashKey[Session]()
BASE = pytest.StashKey[tuple[Run, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("elman bench", "what is measured; lists are separated by commas")

    def add(option: str, words: str, explained: str) -> None:
        group.addoption(option, default="", metavar=words, help=explained)

    group.addoption("--sweep", choices=sorted(SWEEPS), default="quick", help="shapes to run (default: quick)")
    add("--shapes", "B,T,I,H;...", "shapes by hand, in place of a sweep's")
    add("--device", "cpu|cuda", "default: cuda where there is one")
    add("--dtype", "LIST", "float32, tf32, float16, bfloat16, float64; default on a CPU: float32")
    add("--passes", "LIST", f"{', '.join(PASSES)}; default: the sweep's")
    add("--backends", "LIST", "contenders, such as eager,triton:resident; nn.RNN is always there")
    group.addoption(
        "--budget",
        type=float,
        default=None,
        metavar="MINUTES",
        help="time for the whole run: takes fewer samples first, leaves rows out last",
    )
    group.addoption(
        "--restart", action="store_true", help="measure all anew, do not go on with a stopped run"
    )
    add("--baseline", "WHAT", "print what changed against results/<machine>, a rows.jsonl or a git commit")
    add("--fail-slower", "PERCENT", "with --baseline: fail if a row is slower by more than this beyond noise")
    group.addoption(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where <machine>/ is written (default: results/ in the repository)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's own table repeats ours in two hundred columns: shown only to who uses its options.
    arguments = [str(argument) for argument in config.invocation_params.args]
    own = [a for a in arguments if a.startswith("--benchmark-") and a != "--benchmark-only"]
    config.option.benchmark_quiet = config.option.benchmark_quiet or not own
    words = {"dtypes": "dtype", "contenders": "backends"}
    names = ("sweep", "shapes", "device", "dtypes", "passes", "contenders")
    try:
        if config.getoption("fail_slower"):
            compare.parse_percent(config.getoption("fail_slower"))
            if not config.getoption("baseline"):
                raise ValueError("--fail-slower needs --baseline, which says slower than what")
        budget = config.getoption("budget")
        if budget is not None and not 0 < budget < math.inf:
            raise ValueError(f"--budget is {budget:g}; expected minutes, a number above 0")
        plan = Plan.make(**{name: config.getoption(words.get(name, name)) for name in names})
        config.stash[PLAN] = plan
        if config.getoption("baseline"):  # now, and not after an hour of measuring
            folder = machine.slug(machine.machine(plan.device))
            config.stash[BASE] = compare.load(config.getoption("baseline"), ROOT, folder, plan.table)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What is about to run, how long it takes and where it is written, before anything is measured."""
    plan, budget = config.stash[PLAN], config.getoption("budget")
    if config.option.collectonly:
        return []
    takes = plan.takes if budget is None else f"{plan.takes}; --budget ends it after {budget:g} min"
    folder = plan.destination(config.getoption("results"))
    unpublished = "" if folder == config.getoption("results") else f" ({plan.sweep} is never published)"
    lines = [
        f"elman bench: {plan.table}, {len(plan.workloads)} shapes on {plan.device.type}: {takes}",
        f"writes {folder}/<machine>/{unpublished}; after Ctrl-C the same command goes on",
    ]
    native = available_backends()["native"]
    if plan.device.type == "cpu" and native is not True:
        lines.append(f"native can't run here, so that auto is eager: {native}")
    return lines


class Progress:
    """Where the run is: one line that rewrites itself on a terminal, otherwise one line per cell."""

    def __init__(self, config: pytest.Config) -> None:
        self.reporter = config.pluginmanager.getplugin("terminalreporter")
        self.live = self.reporter.isatty and config.get_verbosity() <= 0
        self.total = self.done = 0
        self.start = time.perf_counter()
        self.line = self.note = ""

    def begin(self, title: str) -> None:
        elapsed = time.perf_counter() - self.start
        left = ""
        if self.done:
            left = f", about {clock_time(elapsed / self.done * (self.total - self.done))} left"
        self.line = f"[{self.done + 1}/{self.total}] {title} ... {clock_time(elapsed)} elapsed{left}"
        if not self.done:
            self.reporter.write("\n")  # ends pytest's own line, the file's name
            if self.note:
                self.reporter.write(f"{self.note}\n")
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


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Session:
    config = request.config
    plan, progress = config.stash[PLAN], Progress(config)
    results = plan.destination(config.getoption("results"))
    try:
        alone(results)
        session = Session(
            plan,
            selected(request.session),
            results,
            # pytest-benchmark's own options count too: one second unless told scales the sweep's seconds.
            scale=float(config.getoption("benchmark_max_time")),
            min_rounds=config.getoption("benchmark_min_rounds"),
            budget=config.getoption("budget"),
            restart=config.getoption("restart"),
            begin=progress.begin,
            say=progress.say,
            end=progress.end,
        )
    except ValueError as error:  # a file that can't be read, another run
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    progress.total = session.to_measure
    progress.note = session.started
    config.stash[SESSION] = session
    return session


def alone(results: Path) -> None:
    """Raises ValueError if another run writes into the same folder; holds it until this process ends."""
    if importlib.util.find_spec("fcntl") is None:  # not on Windows
        return
    import fcntl

    results.mkdir(parents=True, exist_ok=True)
    held = os.open(results / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"Another run writes into {results}, and two at a time would disturb each other's times. "
            f"Wait for it, or give this one a --results of its own on another machine."
        ) from None


def selected(session: pytest.Session) -> dict[Cell, list[str]]:
    """The contenders to run of each cell, after -k and the like."""
    cells: dict[Cell, list[str]] = {}
    for item in session.items:
        case = getattr(getattr(item, "callspec", None), "params", {})
        if "contender" in case:
            cells.setdefault((case["workload"], case["pass_name"]), []).append(case["contender"])
    return cells


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots between the progress lines, which also tell of failures: a row counts, but prints nothing."""
    if SESSION in config.stash and config.get_verbosity() <= 0 and report.when == "call":
        return report.outcome, "", report.outcome.upper()
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """--fail-slower: a run in which nothing else failed fails."""
    config, measured = session.config, session.config.stash.get(SESSION, None)
    limit = config.getoption("fail_slower")
    if measured and limit and session.exitstatus == pytest.ExitCode.OK:
        old, new = config.stash[BASE][1], measured.ordered()
        if compare.slower(compare.changes(old, new), compare.parse_percent(limit)) or compare.lost(old, new):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or (session.to_measure and not session.measured):  # such as --benchmark-disable
        return
    rows = session.ordered()
    timing = session.record["timing"]
    terminalreporter.section(f"{session.plan.table}: {timing['clock']}, torch threads: {timing['threads']}")
    written = session.write()
    terminalreporter.write_line(page.terminal(session.record, rows))
    if BASE in config.stash:
        terminalreporter.section(f"against {config.getoption('baseline')}")
        old, limit = config.stash[BASE], config.getoption("fail_slower")
        percent = compare.parse_percent(limit) if limit else None
        terminalreporter.write_line(compare.report(old, (session.record, rows), percent))
    terminalreporter.write_line("")
    if session.record["partial"]:
        what = f"Not a complete run, so no published table was touched: {session.record['partial']}"
        terminalreporter.write_line(f"{what} The same command goes on from here.")
    elif session.record["missing"]:
        terminalreporter.write_line(f"{session.record['missing']} The same command tries these again.")
    terminalreporter.write_line(f"Wrote {', '.join([str(written[0]), *(path.name for path in written[1:])])}")
    asked = config.getoption("results")
    if session.plan.destination(asked) != asked:
        terminalreporter.write_line(
            f"The sweep {session.plan.sweep} is never published: {asked} is as it was. It shows that all of "
            f"this runs, and its numbers mean little."
        )
