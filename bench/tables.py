"""A run's rows, and what follows from them: cells, means, floors, who is fastest. No text but numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench import floor as floors
from bench import measure
from bench.contenders import AUTO, OURS
from bench.rows import BASELINE, TIMED, Row, Run
from bench.workloads import PASSES, Workload

# What was asked of the contenders together: a workload (with its dtype) and a pass.
Cell = tuple[Workload, str]


@dataclass
class Mean:
    """A contender's speedups against nn.RNN over the shapes of one pass and dtype."""

    pass_name: str
    dtype: str
    contender: str
    rows: list[Row]  # the ones with a speedup
    shapes: int  # that there are, with one or without

    @property
    def ratio(self) -> float:
        """The geometric mean; a tie counts as what was measured."""
        return math.exp(sum(math.log(row.speedup or 1) for row in self.rows) / len(self.rows))

    @property
    def worst(self) -> Row:
        return min(self.rows, key=lambda row: row.speedup or 1)

    @property
    def counts(self) -> str:
        """faster / tie / slower."""
        verdicts = [verdict(row) for row in self.rows]
        return " / ".join(str(verdicts.count(word)) for word in ("faster", "tie", "slower"))


class Table:
    """A run's record and its rows, and what follows from both."""

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, list(rows)
        self.dtypes = list(dict.fromkeys(row.workload.dtype for row in rows))
        self.cells: dict[Cell, dict[str, Row]] = {}  # the timed rows of each, in their order
        for row in rows:
            cell = self.cells.setdefault((row.workload, row.pass_name), {})
            if row.status == TIMED:
                cell[row.contender] = row

    @property
    def name(self) -> str:
        return machine_name(self.run)

    @property
    def cuda(self) -> bool:
        return self.run["device"] == "cuda"

    @property
    def flop_unit(self) -> tuple[str, float]:
        """What rates are given in here, and how many of it one flop/s is."""
        return ("TFLOP/s", 1e-12) if self.cuda else ("GFLOP/s", 1e-9)

    def baseline(self, row: Row) -> Row | None:
        """nn.RNN's timed row in the same cell."""
        return self.cells[row.workload, row.pass_name].get(BASELINE)

    def floor(self, row: Row) -> floors.Floor | None:
        """The shortest time that this machine could take; None if the run measured no floor."""
        return floors.of(row.workload, row.pass_name, self.run["floor"]) if self.run["floor"] else None

    def share(self, row: Row) -> float | None:
        """Floor over median: 1 cannot be beaten."""
        floor = self.floor(row)
        return None if floor is None or row.median is None else floor.seconds / row.median

    def flop_rate(self, row: Row) -> float:
        """flop/s, the activation left out."""
        return floors.flops(row.workload, row.pass_name) / (row.median or math.inf)

    def byte_rate(self, row: Row) -> float:
        """B/s of what has to move at least."""
        return floors.bytes_moved(row.workload, row.pass_name) / (row.median or math.inf)

    def repaid(self, row: Row) -> str:
        """The calls after which a slow first call has paid against nn.RNN.

        "never" if the row is no faster; "-" if its first call cost no more than ten others.
        """
        baseline = self.baseline(row)
        if row.first is None or row.median is None or baseline is None or baseline.median is None:
            return ""
        if row is baseline or row.first <= 10 * row.median:
            return "-"
        if verdict(row) != "faster":
            return "never"
        return str(math.ceil((row.first - row.median) / (baseline.median - row.median)))

    def means(self) -> list[Mean]:
        """By pass, dtype and contender, those without a single speedup left out."""
        groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
        shapes: dict[tuple[str, str], set[Workload]] = {}
        for row in self.rows:
            group = row.pass_name, row.workload.dtype
            shapes.setdefault(group, set()).add(row.workload)
            of = groups.setdefault(group, {}).setdefault(row.contender, [])
            if row.contender != BASELINE and row.speedup is not None:
                of.append(row)
        return [
            Mean(pass_name, dtype, contender, found, len(shapes[pass_name, dtype]))
            for pass_name in PASSES
            for dtype in self.dtypes
            for contender, found in groups.get((pass_name, dtype), {}).items()
            if found
        ]

    def leader(self) -> str:
        """The contender that stands for Elman: auto if timed, else the fastest of the most measured ones."""
        ratios: dict[str, list[float]] = {}
        for row in self.rows:
            if row.contender in OURS and row.speedup is not None:
                ratios.setdefault(row.contender, []).append(math.log(row.speedup))
        if AUTO in ratios or not ratios:
            return AUTO if ratios else ""
        return max(ratios, key=lambda name: (len(ratios[name]), sum(ratios[name])))


def machine_name(run: Run) -> str:
    """NVIDIA H200, 16 cores."""
    machine = run["machine"]
    return f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores"


def verdict(row: Row) -> str:
    """faster, slower or tie: a tie's interval contains 1, as printed, with two decimals."""
    if row.speedup_low is None or row.speedup_high is None:
        raise ValueError(f"The row of {row.contender} at {row.shape} has no speedup to judge.")
    return judge(row.speedup_low, row.speedup_high)


def judge(low: float, high: float) -> str:
    """What an interval of a speedup says, as printed, with two decimals."""
    if round(low, 2) > 1:
        return "faster"
    return "slower" if round(high, 2) < 1 else "tie"


def fastest(cell: dict[str, Row]) -> list[str]:
    """The fastest of a cell's timed contenders, then those that tie with it, the faster first.

    The paired samples decide: a tie's interval of median(fastest) / median(own) contains 1.
    """
    first, *others = sorted(cell, key=lambda name: cell[name].median or math.inf)
    best = cell[first].samples

    def ties(own: list[float]) -> bool:
        if max(best) < 0.99 * min(own):  # whatever is drawn of these, the ratio stays below 1
            return False
        return judge(*measure.speedup(best, own)[1:]) == "tie"

    return [first, *(name for name in others if ties(cell[name].samples))]


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 123, 12345."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


def times(ratio: float) -> str:
    """A speedup: two decimals, three below a tenth."""
    return f"{ratio:.{2 if ratio >= 0.1 else 3}f}"
