"""The record of a run: one row per workload, pass and contender, and how rows are stored (JSON lines).

A machine's rows.jsonl holds the tables that are published, each as one line {"table": name, "run": {...}}
followed by lines {"table": name, "row": {...}}. A run that is not finished keeps a file of the same
form, <table>.partial.jsonl, to which each cell is added as soon as it is measured.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.workloads import Workload

BASELINE = "nn.RNN"

TIMED = "timed"  # agreed with the reference, then sampled
UNAVAILABLE = "not available"  # cannot run on this machine
LEFT_OUT = "left out"  # could run, but the sweep leaves it out on purpose
SHED = "out of time"  # the budget did not reach
WRONG = "wrong"  # disagreed with the reference, so it was not timed
FAILED = "failed"  # raised

FAILURES = (WRONG, FAILED)

Key = tuple[Workload, str, str]
Run = dict[str, Any]


@dataclass
class Row:
    """One measurement, or the reason why there is none.

    Times are in seconds. `samples` are in the order in which they were taken, interleaved with those of
    the cell's other contenders: the n-th samples of a shape and pass belong together. `speedup` is
    median(nn.RNN) / median(own), with its 95% interval; None without a timed nn.RNN in the same cell.
    `errors` maps "output", "h_n" and each gradient to ||own - ref|| / ||ref|| against the float64
    reference and nn.RNN's; None stands for a number that is not finite.

    What is None was not measured: `cold`, `graph` and `host` are of CUDA only.
    """

    workload: Workload
    pass_name: str
    contender: str
    status: str
    reason: str = ""
    route: str = ""  # what an Elman layer ran: backend, kernel and config
    errors: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    kinks: float = 0.0  # share of the states on the other side of relu's kink than the reference's
    worst: str = ""  # the quantity that comes nearest to its bar, or exceeds it most
    median: float | None = None
    median_low: float | None = None  # its 95% interval
    median_high: float | None = None
    p20: float | None = None
    p80: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    first: float | None = None  # the first call, which compiles and tunes
    memory: int | None = None  # bytes that one call has allocated at its peak, results included
    cold: float | None = None  # median with the L2 cache overwritten before each call
    graph: float | None = None  # median of a replayed CUDA graph: without the cost of launching
    host: float | None = None  # median until the call returns, the device still working
    chip: dict[str, Any] = field(default_factory=dict)  # clocks, temperature and throttling, after the cell
    samples: list[float] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.workload, self.pass_name, self.contender

    @property
    def shape(self) -> str:
        return self.workload.shape

    @property
    def us_a_step(self) -> float | None:
        return None if self.median is None else self.median * 1e6 / self.workload.steps


def line(table: str, **record: Run | Row) -> str:
    """One line of a file of rows: line("quick", run=...) or line("quick", row=...)."""
    (kind, value), *_ = record.items()
    stored = asdict(value) if isinstance(value, Row) else value
    return json.dumps({"table": table, kind: stored}, ensure_ascii=False, allow_nan=False) + "\n"


def append(path: Path, table: str, rows: Iterable[Row]) -> None:
    """Add rows to the file."""
    append_text(path, "".join(line(table, row=row) for row in rows))


def append_text(path: Path, text: str) -> None:
    """Adds to the file, and returns when it is on the disk: a run may be killed at any moment."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file. A last one without its end is left out: it is what a killed run was writing."""
    text = path.read_bytes()
    # Not splitlines: a text in a row may have others.
    return text[: text.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]


def read(path: Path) -> dict[str, tuple[Run, list[Row]]]:
    """The tables of a file: each one's run, and its rows, the later of two with the same key.

    Raises ValueError, with file and line, for a whole line that is no line of such a file.
    """
    tables: dict[str, tuple[Run, dict[Key, Row]]] = {}
    for number, stored in enumerate(whole_lines(path), 1):
        try:
            record = json.loads(stored)
            if "run" in record:
                tables[record["table"]] = record["run"], {}
            else:
                fields = record["row"]
                row = Row(**{**fields, "workload": Workload(**fields["workload"])})
                tables[record["table"]][1][row.key] = row
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path.name}, line {number}, is no row of this version of the benchmarks "
                f"({type(error).__name__}: {error}). Move the file away and measure again, or use the commit "
                f"that wrote it."
            ) from error
    return {table: (run, list(rows.values())) for table, (run, rows) in tables.items()}


def write(path: Path, tables: dict[str, tuple[Run, list[Row]]]) -> None:
    """Store the tables, in the order of their names, in one move: no reader sees half a file."""
    lines = []
    for table, (run, rows) in sorted(tables.items()):
        lines += [line(table, run=run), *(line(table, row=row) for row in rows)]
    replace(path, "".join(lines))


def put_aside(path: Path, name: str, date: str) -> Path:
    """Renames the file or folder to <name>.<date>.stale and its suffix, never over another."""
    stamp = re.sub(r"\W+", "-", date.removesuffix(" UTC"))
    numbers = ("" if n == 1 else f"-{n}" for n in itertools.count(1))
    names = (path.with_name(f"{name}.{stamp}{number}.stale{path.suffix}") for number in numbers)
    return path.rename(next(stale for stale in names if not stale.exists()))


def replace(path: Path, text: str) -> None:
    """Writes the file in one move."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8", newline="\n")
    fresh.replace(path)
