"""Two runs of one table: what changed beyond the noise.

    python -m bench.compare results/<machine> --baseline HEAD~3 [--table quick] [--fail-slower 5%]

A machine is not the same on two days (clocks, temperature, other tenants). So a contender's time counts in
units of nn.RNN's of the same cell and run, whose code has not changed:

    change = (own now / nn.RNN now) / (own before / nn.RNN before)        above 1 is slower

with a 95% bootstrap interval: rounds are resampled within each run, own and nn.RNN's samples together, the
two runs independently. Beyond the noise means that 1 is outside. The noise is that within the runs: what
slows one contender alone through a whole run (another tenant of the caches, say) looks like a change, so
measure again before believing one. How far that goes shows in the naive loop, none of whose code is elman's.
nn.RNN's own change is that of its plain time; it is told, and judged by nobody.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from bench import measure
from bench import rows as records
from bench.contenders import NAIVE
from bench.rows import BASELINE, FAILURES, TIMED, UNAVAILABLE, Key, Row, Run
from bench.tables import digits
from bench.workloads import PASSES
from elman.commit import git

ROOT = Path(__file__).resolve().parents[1]

Tables = dict[str, tuple[Run, list[Row]]]


@dataclass(frozen=True)
class Change:
    """One key's rows of both runs, and how many times as long it takes now, with its 95% interval.

    For nn.RNN that is its plain time, for all others their time in units of nn.RNN's.
    """

    old: Row
    new: Row
    ratio: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        return not self.low <= 1 <= self.high

    @property
    def percent(self) -> str:
        """+10.0% [+8.1%, +12.3%]."""
        ratio, low, high = (f"{value - 1:+.1%}" for value in (self.ratio, self.low, self.high))
        return f"{ratio} [{low}, {high}]"


# Finding the rows


def load(baseline: str, root: Path, folder: str, table: str) -> tuple[Run, list[Row]]:
    """The table's run and rows in a folder with a rows.jsonl, in such a file, or in a commit.

    A path is looked for from the working directory, then from `root`; a commit, branch or tag in the
    repository at `root`, where it is results/<folder>/rows.jsonl that is read. Raises ValueError with what
    was looked for and what is there.
    """
    tables = _tables(baseline, root, folder)
    if table not in tables:
        raise ValueError(f"{baseline} has no table {table!r}; it has {_listed(tables)}")
    return tables[table]


def _tables(baseline: str, root: Path, folder: str) -> Tables:
    path = next((path for path in (Path(baseline), root / baseline) if path.exists()), None)
    if path is None:
        return _committed(baseline, root, folder)
    file = path / "rows.jsonl" if path.is_dir() else path
    if not file.exists():
        inside = sorted(entry.name for entry in path.iterdir())
        raise ValueError(f"{baseline} is a folder without rows.jsonl; it has {_listed(inside)}")
    return records.read(file)


def _committed(commit: str, root: Path, folder: str) -> Tables:
    file = f"results/{folder}/rows.jsonl"
    try:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        there = sorted(f"results/{path.parent.name}" for path in root.glob("results/*/rows.jsonl"))
        raise ValueError(
            f"{commit!r} is neither a file nor a folder nor a commit of this repository; "
            "expected a commit, or a folder with rows.jsonl, such as "
            f"{_listed(there or ['results/<machine>'])}"
        ) from None
    try:
        text = git(root, "show", f"{found}:{file}")
    except subprocess.CalledProcessError:
        names = git(root, "ls-tree", "-r", "--name-only", "--full-tree", found, "results/").split("\n")
        there = [name for name in names if name.endswith("/rows.jsonl")]
        raise ValueError(f"Commit {commit} has no {file}; it has {_listed(there)}") from None
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "rows.jsonl"
        copy.write_text(text + "\n", encoding="utf-8", newline="\n")
        return records.read(copy)


def _listed(names: Sequence[str] | Tables) -> str:
    return ", ".join(names) or "nothing"


# Judging them


def changes(old: list[Row], new: list[Row]) -> list[Change]:
    """What was timed in both runs, in the order of `new`.

    Left out is what can't be judged: a row without a timed nn.RNN in its cell, in one run or the other.
    """
    runs = _timed(old), _timed(new)
    yardsticks: dict[tuple[int, Key], tuple[float, Tensor]] = {}

    def relative(run: int, key: Key) -> tuple[float, Tensor]:
        """The row's median in units of nn.RNN's, and the same of each resample; nn.RNN's own in seconds."""
        if (run, key) in yardsticks:
            return yardsticks[run, key]
        own = runs[run][key].samples
        median, resampled = measure.quantile(own, 0.5), _medians(own, run)
        if key[2] == BASELINE:  # wanted again, for each row of its cell
            yardsticks[run, key] = median, resampled
            return median, resampled
        other = len(runs[run][_yardstick(key)].samples)
        if len(own) != other:
            raise ValueError(
                f"The samples must be paired round by round, but at {key[0].id} {key[2]} has {len(own)} and "
                f"nn.RNN {other}."
            )
        unit, units = relative(run, _yardstick(key))
        return median / unit, resampled / units

    found = []
    for key in runs[1]:
        if key in runs[0] and all(_yardstick(key) in run for run in runs):
            (before, before_resampled), (now, now_resampled) = relative(0, key), relative(1, key)
            edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
            low, high = (now_resampled / before_resampled).quantile(edges).tolist()
            found.append(Change(runs[0][key], runs[1][key], now / before, low, high))
    return found


def _yardstick(key: Key) -> Key:
    return key[0], key[1], BASELINE


def lost(old: list[Row], new: list[Row]) -> list[Row]:
    """The new rows that can't be timed any more: they fail, or their backend is gone."""
    before = _timed(old)
    return [row for row in new if row.status in (*FAILURES, UNAVAILABLE) and row.key in before]


def slower(changes: Sequence[Change], percent: float) -> list[Change]:
    """Those, nn.RNN left out, whose whole interval lies beyond the limit."""
    return [c for c in changes if c.new.contender != BASELINE and c.low > 1 + percent / 100]


def parse_percent(text: str) -> float:
    """The number of "5%" or "5". Raises ValueError for anything else and for a negative one."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < math.inf:
        raise ValueError(f"--fail-slower is {text!r}; expected a percentage that is not negative, such as 5%")
    return percent


def _timed(rows: list[Row]) -> dict[Key, Row]:
    return {row.key: row for row in rows if row.status == TIMED and row.samples}


def _medians(samples: Sequence[float], run: int) -> Tensor:
    """The medians of RESAMPLES resamples, (RESAMPLES,): of the same rounds for equally many samples.

    By counting: the sorted samples are walked until half of the draws is passed, which takes a third of
    the time of sorting each resample.
    """
    n, draws = len(samples), _draws(len(samples), run)
    values, order = torch.tensor(samples, dtype=torch.float64).sort()
    passed = draws[order].cumsum(0, dtype=torch.int32)
    below, above = ((passed <= rank).sum(0) for rank in ((n - 1) // 2, n // 2))
    return (values[below] + values[above]) / 2


@lru_cache(maxsize=16)
def _draws(count: int, run: int) -> Tensor:
    """How often each round is drawn, (count, RESAMPLES); the same for one run every time."""
    picks = torch.randint(
        count, (measure.RESAMPLES, count), generator=torch.Generator().manual_seed(1 + run), dtype=torch.int64
    )
    drawn = torch.zeros(measure.RESAMPLES, count, dtype=torch.int32)
    return drawn.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.int32)).t().contiguous()


# Telling of them


def report(old: tuple[Run, list[Row]], new: tuple[Run, list[Row]], percent: float | None = None) -> str:
    """As plain text: how the runs differ, what changed beyond the noise, counts, new failures.

    percent: what --fail-slower allows, if it was given.
    """
    found = changes(old[1], new[1])
    judged = [change for change in found if change.new.contender != BASELINE]
    listed = sorted((c for c in judged if c.beyond_noise), key=lambda change: -change.ratio)
    plain = {(c.new.workload, c.new.pass_name): c for c in found if c.new.contender == BASELINE}
    before, now = _timed(old[1]), _timed(new[1])
    more, less = (sum(change.ratio > 1 for change in listed), sum(change.ratio < 1 for change in listed))
    alone = len(before.keys() ^ now.keys())
    parts = [*_runs(old[0], new[0])]
    if plain:
        times = [change.ratio for change in plain.values()]
        parts.append(
            f"nn.RNN takes {measure.quantile(times, 0.5):.2f} times as long as before ({min(times):.2f} to "
            f"{max(times):.2f} over {len(times)} shapes and passes). All else is judged relative to it."
        )
    controls = [abs(c.ratio - 1) for c in judged if c.new.contender == NAIVE]
    if controls:
        parts.append(
            f"The naive loop, none of whose code is elman's, moved by up to {max(controls):.1%} against it: "
            "a change of that size may be the machine's."
        )
    if listed:
        headers = ["shape", "pass", "contender", "ms before", "ms now", "relative to nn.RNN", "nn.RNN"]
        body = [_line(change, plain[change.new.workload, change.new.pass_name]) for change in listed]
        align = ("left", "left", "left", "right", "right", "right", "right")
        parts.append(tabulate(body, headers, "simple", colalign=align, disable_numparse=True))
    parts.append(
        f"{less} faster, {len(judged) - less - more} unchanged, {more} slower, {alone} timed in only one of "
        "the runs. By chance alone, up to one row in twenty is listed that has not changed."
    )
    unjudged = len(before.keys() & now.keys()) - len(found)
    if unjudged:
        parts.append(f"{unjudged} not judged: nn.RNN was not timed beside them in both runs.")
    parts += [f"Timed before, now {row.status}: {_named(row)}. {row.reason}" for row in lost(old[1], new[1])]
    if percent is not None:
        beyond = slower(found, percent)
        rows = "1 row is" if len(beyond) == 1 else f"{len(beyond) or 'no'} rows are"
        lines = [f"--fail-slower {percent:g}%: {rows} slower by more than that, the noise deducted."]
        parts.append("\n".join([*lines, *(f"  {_named(change.new)}: {change.percent}" for change in beyond)]))
    return "\n\n".join(parts)


def _line(change: Change, yardstick: Change) -> list[str]:
    new, times = change.new, [measure.quantile(row.samples, 0.5) for row in (change.old, change.new)]
    return [
        _shape(new),
        PASSES[new.pass_name],
        new.contender,
        *(digits(time * 1e3) for time in times),
        change.percent,
        f"{yardstick.ratio - 1:+.1%}",
    ]


def _named(row: Row) -> str:
    return f"{row.contender}, {_shape(row)}, {PASSES[row.pass_name]}"


def _shape(row: Row) -> str:
    return row.shape if row.workload.dtype == "float32" else f"{row.shape} {row.workload.dtype}"


def _runs(old: Run, new: Run) -> Iterator[str]:
    """In what two runs differ other than their code, if they do; then which runs they are."""
    differences = [
        f"{name} ({before} before, {now} now)" for name, before, now in _differing(old, new) if before != now
    ]
    if differences:
        yield f"The two runs are not of the same conditions. They differ in {'; '.join(differences)}."
    names = [
        f"{run['commit']}{' with changes' if run['dirty'] else ''} of {run['date']}" for run in (old, new)
    ]
    yield f"Before: {names[0]}. Now: {names[1]}."


def _differing(old: Run, new: Run) -> Iterator[tuple[str, object, object]]:
    """Each condition, and what it is in either run; "nothing" where it is not recorded."""
    for part, keys in (("machine", ()), ("software", ()), ("timing", ("threads", "clock", "cache"))):
        for key in keys or dict.fromkeys([*old[part], *new[part]]):
            yield key, old[part].get(key, "nothing"), new[part].get(key, "nothing")
    yield "float32", old["float32"], new["float32"]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command. Returns 1 if a row is slower than --fail-slower allows; a bad argument exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description="What changed between two runs, beyond the noise."
    )
    parser.add_argument("new", help="results/<machine>, or a rows.jsonl")
    parser.add_argument("--baseline", required=True, help="the same of an older run, or a git commit")
    parser.add_argument("--table", help="which table, if there are several")
    parser.add_argument(
        "--fail-slower", metavar="PERCENT", help="fail if a row is slower by more, such as 5%%"
    )
    options = parser.parse_args(arguments)
    try:
        percent = parse_percent(options.fail_slower) if options.fail_slower else None
        folder = Path(options.new).resolve()
        if not folder.exists():
            raise ValueError(f"{options.new} does not exist; expected results/<machine>, or a rows.jsonl")
        name = folder.name if folder.is_dir() else folder.parent.name
        tables = _tables(options.new, root, name)
        if options.table is None and len(tables) != 1:
            raise ValueError(
                f"{options.new} has the tables {_listed(tables)}; expected one of them as --table"
            )
        table = options.table or next(iter(tables))
        new = load(options.new, root, name, table)
        old = load(options.baseline, root, name, table)
    except ValueError as error:
        parser.error(str(error))
    print(report(old, new, percent))
    worse = percent is not None and (slower(changes(old[1], new[1]), percent) or lost(old[1], new[1]))
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
