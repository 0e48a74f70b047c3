"""The record of a run: one row per shape, pass and contender, and how it is stored (JSON lines)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BASELINE = "nn.RNN"

TIMED = "timed"  # agreed with the reference, then sampled
UNAVAILABLE = "not available"  # cannot run on this machine
LEFT_OUT = "left out"  # could run, but the sweep leaves it out on purpose
WRONG = "wrong"  # disagreed with the reference, so it was not timed
FAILED = "failed"  # raised

FAILURES = (WRONG, FAILED)


@dataclass
class Row:
    """One measurement, or the reason why there is none.

    Times are in seconds. `samples` are in the order in which they were taken, interleaved with those of
    the cell's other contenders: the n-th samples of a shape and pass belong together. `speedup` is
    median(nn.RNN) / median(own), with its 95% interval; None without a timed nn.RNN in the same cell.
    `errors` maps "output", "h_n" and each gradient to ||own - ref|| / ||ref|| against the float64
    reference and nn.RNN's; None stands for a number that is not finite.
    """

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: str
    pass_name: str
    contender: str
    status: str
    reason: str = ""
    errors: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    worst: str = ""  # the quantity that comes nearest to its bar, or exceeds it most
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def shape(self) -> str:
        return f"B={self.batch} T={self.steps} I={self.input_size} H={self.hidden_size}"


def write(path: Path, run: dict[str, Any], rows: list[Row]) -> None:
    """Store the run's own record (first line) and its rows."""
    lines = [run, *(asdict(row) for row in rows)]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The run's own record and its rows, as `write` stored them."""
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    return json.loads(first), [Row(**json.loads(line)) for line in rest]
