"""A table as a person reads it: plain at the end of a run, Markdown on the published page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import measure
from bench.contenders import AUTO, PEERS_BY_NAME
from bench.rows import BASELINE, FAILURES, LEFT_OUT, SHED, TIMED, UNAVAILABLE, Row, Run
from bench.tables import Mean, Table, digits, judge, times
from bench.workloads import PASSES

ABSENT = (UNAVAILABLE, LEFT_OUT, SHED)
WIDTH = 120  # of a terminal
NEEDS_MATPLOTLIB = "Pictures need matplotlib: pip install 'elman[plots]'"

# What a page shows of a row: a heading, whether numbers stand in the column, and the cell.
Column = tuple[str, bool, Callable[[Row], str]]


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else digits(value * scale)


def _milliseconds(row: Row) -> str:
    if row.status != TIMED or row.median is None or row.p20 is None or row.p80 is None:
        return row.status
    median, p20, p80 = (digits(seconds * 1e3) for seconds in (row.median, row.p20, row.p80))
    return f"{median} [{p20} .. {p80}]"


def _median_interval(row: Row) -> str:
    if row.median_low is None or row.median_high is None:
        return ""
    return f"[{digits(row.median_low * 1e3)}, {digits(row.median_high * 1e3)}]"


def ratio(value: float, low: float, high: float) -> str:
    """A speedup with its interval, or that it is a tie."""
    interval = f"[{times(low)}, {times(high)}]"
    return f"tie {interval}" if judge(low, high) == "tie" else f"{times(value)} {interval}"


def _speedup(row: Row) -> str:
    if row.status != TIMED:
        return ""
    if row.contender == BASELINE:
        return "1"
    if row.speedup is None or row.speedup_low is None or row.speedup_high is None:
        return "-"
    return ratio(row.speedup, row.speedup_low, row.speedup_high)


def _error(row: Row) -> str:
    if not row.worst:
        return "-"
    own, baseline = ("not finite" if e is None else f"{e:.1e}" for e in row.errors[row.worst])
    return f"{own} / {baseline} ({row.worst})"


def _percent(share: float) -> str:
    """Two digits, or all before the point: 0.34%, 3.4%, 34%, 104%."""
    percent = share * 100
    return f"{percent:.{1 if 1 <= percent < 9.95 else 2 if percent < 1 else 0}f}%"


def _contender(row: Row) -> str:
    """The name; of auto also what it chose."""
    chosen = row.route.partition(" (")[0].rpartition(":")[2] if row.contender == AUTO else ""
    return f"{row.contender} ({chosen})" if chosen else row.contender


def _of_floor(table: Table) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        share, floor = table.share(row), table.floor(row)
        return "" if share is None or floor is None else f"{_percent(share)} {floor.bound}"

    return cell


UNITS = {"mhz": "MHz", "c": "°C", "w": "W"}


def _named(values: dict[str, Any]) -> str:
    """sm 1980 MHz, throttle none: a name's unit is its last word."""
    said = []
    for name, value in values.items():
        what, _, unit = name.rpartition("_")
        text = f"{what} {_text(value)} {UNITS[unit]}" if unit in UNITS else f"{name} {_text(value)}"
        said.append(text.replace("_", " "))
    return ", ".join(said)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _named(value) or "unknown"
    if isinstance(value, (list, tuple)):
        return " and ".join(map(_text, value)) or "none"
    return {None: "unknown", True: "yes", False: "no"}.get(value, str(value))


def _where(table: Table) -> list[Column]:
    dtype: list[Column] = [("dtype", False, lambda row: row.workload.dtype)]
    return [
        ("shape", False, lambda row: row.shape),
        *(dtype if len(table.dtypes) > 1 else []),
        ("pass", False, lambda row: PASSES[row.pass_name]),
        ("contender", False, _contender),
    ]


def _latency(table: Table) -> list[Column]:
    return [
        ("ms, median [p20 .. p80]", True, _milliseconds),
        ("95% of the median", True, _median_interval),
        ("samples", True, lambda row: str(len(row.samples) or "")),
        ("us a step", True, lambda row: _scaled(row.us_a_step, 1)),
        ("speedup [95%]", True, _speedup),
        ("% of floor", True, _of_floor(table)),
        ("error / nn.RNN's error", False, _error),
    ]


def _work(table: Table) -> list[Column]:
    unit, scale = table.flop_unit

    def floor_ms(row: Row) -> str:
        floor = table.floor(row)
        return "" if floor is None else digits(floor.seconds * 1e3)

    def bound(row: Row) -> str:
        floor = table.floor(row)
        return "" if floor is None else floor.bound

    def chip(row: Row) -> str:
        """At the first row of each cell: it is of all of them."""
        first = next(iter(table.cells[row.workload, row.pass_name].values()))
        return _named(row.chip) if row is first and row.chip else ""

    return [
        ("ms", True, lambda row: _scaled(row.median, 1e3)),
        ("floor ms", True, floor_ms),
        ("bound", False, bound),
        (unit, True, lambda row: digits(table.flop_rate(row) * scale)),
        ("GB/s", True, lambda row: digits(table.byte_rate(row) * 1e-9)),
        ("peak MiB", True, lambda row: _scaled(row.memory, 2**-20)),
        ("first call s", True, lambda row: _scaled(row.first, 1)),
        ("repaid after calls", True, table.repaid),
        ("cold L2 ms", True, lambda row: _scaled(row.cold, 1e3)),
        ("graph ms", True, lambda row: _scaled(row.graph, 1e3)),
        ("host us", True, lambda row: _scaled(row.host, 1e6)),
        ("chip, after the cell", False, chip),
    ]


def _grid(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[list[str], list[bool], list[list[str]]]:
    """Headings, which of them stand over numbers, and the body, without the columns that are empty."""
    body = [[cell(row) for _, _, cell in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(cells[i] for cells in body)]
    headings = [columns[i][0] for i in kept]
    return headings, [columns[i][1] for i in kept], [[cells[i] for i in kept] for cells in body]


# --- At the end of a run -----------------------------------------------------------------------------


def terminal(run: Run, rows: Sequence[Row]) -> str:
    """Latency, geometric means, failures and what was not measured, as plain text."""
    table = Table(run, rows)
    shown = [row for row in rows if row.status not in ABSENT]
    parts = []
    if shown:
        # As wide as a terminal: the rest is on the page.
        narrow = [column for column in _latency(table) if column[0] not in ("95% of the median", "samples")]
        narrow[-1] = ("error / nn.RNN's", False, lambda row: _error(row).partition(" (")[0])
        headings, numbers, body = _grid([("contender", False, _contender), *narrow], shown)
        titles = [f"{row.shape}{_dtype(table, row.workload.dtype)}, {PASSES[row.pass_name]}" for row in shown]
        parts += ["Latency", _grouped(titles, headings, numbers, body)]
    means = table.means()
    if means:
        headings = ["contender", "geometric mean", "shapes", "faster / tie / slower", "worst cell"]
        numbers = [False, True, True, True, False]
        body = [[mean.contender, *_mean(mean)] for mean in means]
        titles = [f"{PASSES[mean.pass_name]}{_dtype(table, mean.dtype)}" for mean in means]
        parts += ["Speed against nn.RNN (above 1 is faster)", _grouped(titles, headings, numbers, body)]
    failed = [
        f"{_place(table, row)}, {row.contender}: {row.reason}" for row in rows if row.status in FAILURES
    ]
    if failed:
        parts += ["Failures", "\n".join(map(_wrapped, failed))]
    absent = [f"{contender} ({where}): {reason}" for contender, where, reason in _absent(table)]
    if absent:
        parts += ["Not measured", "\n".join(map(_wrapped, absent))]
    return "\n\n".join(parts)


def _grouped(
    titles: Sequence[str], headings: Sequence[str], numbers: Sequence[bool], body: Sequence[Sequence[str]]
) -> str:
    """An aligned table, with a line of its own wherever the title changes: that keeps it narrow."""
    align = ["right" if number else "left" for number in numbers]
    indented = [list(headings), *([f"  {first}", *rest] for first, *rest in body)]
    # tabulate would strip the indent, and otherwise read numbers out of the text.
    text = tabulate(
        indented, tablefmt="plain", colalign=align, disable_numparse=True, preserve_whitespace=True
    )
    head, *lines = text.split("\n")
    told = [head.rstrip()]
    for i, line in enumerate(lines):
        if i == 0 or titles[i] != titles[i - 1]:
            told.append(titles[i])
        told.append(line.rstrip())
    return "\n".join(told)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, subsequent_indent="  ")


def _dtype(table: Table, dtype: str) -> str:
    return f" {dtype}" if len(table.dtypes) > 1 else ""


def _place(table: Table, row: Row) -> str:
    return f"{row.shape}{_dtype(table, row.workload.dtype)} {PASSES[row.pass_name]}"


def _mean(mean: Mean) -> list[str]:
    worst = mean.worst
    interval = f"[{times(worst.speedup_low or 0)}, {times(worst.speedup_high or 0)}]"
    return [
        times(mean.ratio),
        f"{len(mean.rows)} of {mean.shapes}",
        mean.counts,
        f"{times(worst.speedup or 0)} {interval} at {worst.shape}",
    ]


def _absent(table: Table) -> Iterable[tuple[str, str, str]]:
    """Who took no part, where and why: one per contender and reason."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in table.rows:
        if row.status in ABSENT:
            places.setdefault((row.contender, row.reason or row.status), []).append(row)
    for (contender, reason), absent in places.items():
        own = [row for row in table.rows if row.contender == contender]
        if len(absent) == len(own):
            yield contender, "everywhere", reason
        elif len(absent) <= 2:
            yield contender, " and ".join(_place(table, row) for row in absent), reason
        else:
            yield contender, _narrowed(absent, own), reason


def _narrowed(some: list[Row], all_: list[Row]) -> str:
    """5 of 11 shapes, bfloat16, forward: what these rows have in common and the others have not."""
    shapes, every = {row.shape for row in some}, {row.shape for row in all_}
    parts = [f"{len(shapes)} of {len(every)} shapes"]
    kinds: tuple[Callable[[Row], str], ...] = (
        lambda row: row.workload.dtype,
        lambda row: PASSES[row.pass_name],
    )
    for kind in kinds:
        found = list(dict.fromkeys(map(kind, some)))
        if len(found) < len(set(map(kind, all_))):
            parts.append(" and ".join(found))
    return ", ".join(parts)


# --- The published page ------------------------------------------------------------------------------


READING = """\
Each row agreed with the float64 reference before it was timed: output, h_n and, where there is a backward
pass, every gradient under random upstream gradients; at most 1.5 times nn.RNN's own error, or the rounding
floor (see bench/agreement.py). The error shown is ||own - ref|| / ||ref|| of the quantity nearest to its
bar, and nn.RNN's error of the same quantity. Input products are part of every time.

The contenders of a shape and pass were sampled interleaved, in rotating order. Speedup is nn.RNN's median
over the contender's own: above 1 is faster. The intervals are 95% bootstrap intervals, the speedup's from
whole rounds; one that contains 1 is a tie. A step's microseconds are the time over T."""

FLOOR = """\
The floor is the longest of three times, all measured in the same run: what has to move at least over the
bandwidth ("memory"), the operations over the matrix rate ("matrix"), and T times the shortest possible step
("step"). None of the contenders can beat it: on a CPU the shortest step is one torch call, on a GPU the
smallest product on one multiprocessor, or a meeting of several in L2."""

FLOOR_OF_A_LOOP = """\
The floor is what a loop in C needs at least, by the rates above, which were measured in the same run. A
step reads W_hh from the cache that holds it or does its multiply-adds, whichever takes longer; then it
takes tanh. Threads share the rows, or the columns of W_hh; in the second case each step also waits for
another core. The other products come on top, at the matrix rate. The floor is called "step" or "matrix"
after its larger part, and "memory" where the bytes that have to move take longer than all of it."""

REPAID = """\
The first call builds the layer, and compiles and tunes what no earlier row of the same process has. It is
repaid after so many calls as make up for it against nn.RNN; "-" where it cost no more than ten ordinary
calls, "never" where the contender is not the faster one."""

CUDA = """\
Cold L2: the L2 cache was overwritten before each call. Graph: a replayed CUDA graph, without the cost of
launching. Host: until the call returned, the device still at work."""


def markdown(run: Run, rows: Sequence[Row], pictures: Sequence[str] = (), missing: str = "") -> str:
    """The page of a table, headed by what it was measured on.

    pictures: the files to show, beside the page. missing: the sentence in their place if there are none.
    """
    table = Table(run, rows)
    parts = [f"# {run['sweep']}: {table.name}"]
    if run["partial"]:
        parts.append(f"**Not a complete run: {run['partial']}**")
    if run.get("missing"):  # older runs have none
        parts.append(f"**{run['missing']}**")
    parts += [pipes(("", ""), (False, False), _facts(table)), READING]
    if run["floor"]:
        parts.append(FLOOR_OF_A_LOOP if "loop" in run["floor"]["step"] else FLOOR)
    parts += _means(table)
    parts += [f"![{alternative(picture, table)}]({picture})" for picture in pictures] or (
        [missing] if missing else []
    )
    if table.cuda:
        parts += _worst(table)
    shown = [row for row in rows if row.status not in ABSENT]
    if shown:
        parts += ["## Latency", *_peers(shown), pipes(*_grid(_where(table) + _latency(table), shown))]
    timed = [row for row in rows if row.status == TIMED]
    if timed:
        parts += ["## Work and memory", REPAID, *([CUDA] if table.cuda else [])]
        parts.append(pipes(*_grid(_where(table) + _work(table), timed)))
    failed = [row for row in rows if row.status in FAILURES]
    if failed:
        reason: Column = ("reason", False, lambda row: row.reason)
        parts += ["## Failures", pipes(*_grid([*_where(table), reason], failed))]
    absent = list(_absent(table))
    if absent:
        parts += ["## Not measured", pipes(("contender", "where", "reason"), (False,) * 3, absent)]
    return "\n\n".join(parts) + "\n"


def pipes(headings: Sequence[str], numbers: Sequence[bool], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without padding: a page may have thousands of rows."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    rule = "| " + " | ".join("---:" if number else "---" for number in numbers) + " |"
    return "\n".join([line(headings), rule, *map(line, body)])


def conditions(run: Run, chip: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Machine, versions, commit and date of a record, each as a name and a text; chip: lines of a GPU's."""
    machine = run["machine"]
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[run["dirty"]]
    facts = []
    if "gpu" in machine:
        gpu = [machine["gpu"], f"{machine['gpu_memory_gib']} GiB"]
        gpu.append(f"{machine['multiprocessors']} multiprocessors")
        gpu.append(f"compute capability {machine['compute_capability']}")
        facts += [
            ("GPU", ", ".join(gpu)),
            ("driver", _text(machine.get("driver"))),
            ("clocks, MHz", _text(machine.get("clocks_mhz"))),
            *chip,
        ]
    return [
        *facts,
        ("CPU", f"{machine['cpu']}, {machine['instructions']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_gib'] or '?'} GiB"),
        ("OS", machine["os"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["software"].items())),
        ("commit", f"{run['commit']}{dirty}"),
        ("date", run["date"]),
    ]


def load(run: Run) -> list[tuple[str, str]]:
    """As conditions(): how busy the machine was."""
    if run["load_average"] is None:
        return []
    return [("load average at the start", f"{run['load_average']:.2f}")]


def _facts(table: Table) -> list[tuple[str, str]]:
    """conditions(), and how was measured."""
    run, timing = table.run, table.run["timing"]
    cold = "; cold L2 in a column of its own" if any(row.cold is not None for row in table.rows) else ""
    return [
        *conditions(run, _chip(table.rows)),
        ("dtypes", ", ".join(table.dtypes)),
        ("float32 products", run["float32"]),
        ("threads", str(timing["threads"])),
        ("clock", timing["clock"]),
        ("cache", f"{timing['cache']}{cold}"),
        ("sampling", _sampling(run)),
        *_tables(run),
        *load(run),
        *_measured_floor(table),
    ]


def _tables(run: Run) -> list[tuple[str, str]]:
    """How many entries the tuned tables had as the run began, and what ELMAN_KERNELS allowed, if set."""
    names = run.get("tables")
    if not names:
        return []
    counts = [f"{owner} {sum(n.startswith(f'{owner}: ') for n in names)}" for owner in ("user", "shipped")]
    off = names.get("ELMAN_AUTOTUNE") == "off"
    allowed = [("kernels allowed", names["ELMAN_KERNELS"])] if "ELMAN_KERNELS" in names else []
    return [("entries of tuned tables", "off" if off else ", ".join(counts)), *allowed]


def _sampling(run: Run) -> str:
    timing = run["timing"]
    text = f"{timing['seconds']:g} s per contender, at least {timing['min_rounds']} rounds"
    return text + (f", within {run['budget']:g} minutes for all" if run.get("budget") else "")


def _chip(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the chip reported over the run: the range of each number, how often each word."""
    seen: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.chip.items():
            seen.setdefault(name, []).append(value)
    ranges: dict[str, str] = {}
    for name, values in seen.items():
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            ranges[name] = f"{min(values):g} to {max(values):g}"
        else:
            words = [_text(value) for value in values]
            counts = [f"{word} in {words.count(word)} rows" for word in dict.fromkeys(words)]
            ranges[name] = " and ".join(counts)
    return [("chip during the run", _named(ranges))] if ranges else []


def _measured_floor(table: Table) -> list[tuple[str, str]]:
    """The rates and latencies that the floors were made of."""
    floor = table.run["floor"]
    if not floor:
        return []
    unit, scale = table.flop_unit
    size, bandwidth = max(floor["bandwidth"])
    rates = [f"{dtype} {digits(rate * scale)}" for dtype, rate in floor["matrix"].items()]
    names = {"call": "empty call", "launch": "launch", "chain": "on one multiprocessor"}
    step = floor["step"]
    lines = _measured_loop(step["loop"]) if "loop" in step else []
    steps = [f"{name} {digits(step[key] * 1e6)}" for key, name in names.items() if key in step]
    for programs, seconds in step.get("meeting", {}).items():
        steps.append(f"meeting of {programs} {digits(seconds * 1e6)}")
    if steps:
        lines = [("shortest step, us", ", ".join(steps))]
    if "no_loop" in step:
        lines.append(("loop in C", f"not measured, so the shortest step is a torch call: {step['no_loop']}"))
    return [
        ("measured bandwidth", f"{digits(bandwidth * 1e-9)} GB/s ({digits(size / 2**20)} MiB)"),
        (f"measured matrix rate, {unit}", ", ".join(rates)),
        *lines,
    ]


def _measured_loop(loop: dict[str, Any]) -> list[tuple[str, str]]:
    """By cores, the best of each rate and its median: at sizes that lie in one cache and in the next."""

    def of_cores(said: Callable[[str], str]) -> str:
        return "; ".join(f"{n} core{'s' * (n != '1')}: {said(n)}" for n in loop["multiply_add"])

    def read(n: str) -> str:
        sizes = [row for row in loop["read"][n] if row[0] & (row[0] - 1) == 0][::2]
        return ", ".join(f"{digits(size / 2**10)} KiB {best_and_median(rate)}" for size, *rate in sizes)

    def best_and_median(rate: Sequence[float], scale: float = 1e-9) -> str:
        return f"{digits(rate[0] * scale)} ({digits(rate[1] * scale)})"

    found = [
        ("read, GB/s: best (median)", of_cores(read)),
        ("multiply-adds, 10^9/s", of_cores(lambda n: best_and_median(loop["multiply_add"][n]))),
        ("tanh, 10^9/s", of_cores(lambda n: best_and_median(loop["tanh"][n]))),
    ]
    if loop["core_to_core"]:
        found.append(("core to core, ns", best_and_median(loop["core_to_core"], 1e9)))
    return found


def _means(table: Table) -> list[str]:
    means = table.means()
    if not means:
        return []
    dtype = len(table.dtypes) > 1
    headings = ["pass", *(["dtype"] if dtype else []), "contender", "geometric mean", "shapes"]
    headings += ["faster / tie / slower", "worst cell"]
    numbers = [heading in ("geometric mean", "shapes", "faster / tie / slower") for heading in headings]
    body = [
        [PASSES[mean.pass_name], *([mean.dtype] if dtype else []), mean.contender, *_mean(mean)]
        for mean in means
    ]
    return ["## Speed against nn.RNN (above 1 is faster)", pipes(headings, numbers, body)]


def _peers(rows: Sequence[Row]) -> list[str]:
    """What the reader has to know of other people's layers here."""
    there = dict.fromkeys(row.contender for row in rows if row.contender in PEERS_BY_NAME)
    return ["\n".join(f"- {name}: {PEERS_BY_NAME[name].differs}" for name in there)] if there else []


def _worst(table: Table, most: int = 10) -> list[str]:
    """Where auto is furthest behind the best contender of its cell."""
    behind = []
    for cell in table.cells.values():
        others = [row for name, row in cell.items() if name != AUTO]
        if AUTO in cell and others:
            best = min(others, key=lambda row: row.median or math.inf)
            behind.append(((best.median or 0) / (cell[AUTO].median or math.inf), best, cell[AUTO]))
    if not behind:
        return []
    bests = {id(own): best for _, best, own in behind}
    worst = [own for _, _, own in sorted(behind, key=lambda entry: entry[0])[:most]]
    columns: list[Column] = [
        *_where(table)[:-1],
        ("auto ran", False, lambda row: row.route),
        ("ms", True, lambda row: _scaled(row.median, 1e3)),
        ("best", False, lambda row: bests[id(row)].contender),
        ("its ms", True, lambda row: _scaled(bests[id(row)].median, 1e3)),
        (
            "speedup against it",
            True,
            lambda row: ratio(*measure.speedup(bests[id(row)].samples, row.samples)),
        ),
        ("% of floor", True, _of_floor(table)),
    ]
    text = f"The {len(worst)} cells where auto is furthest behind the best other contender, or least ahead."
    return ["## Worst rows of auto", text, pipes(*_grid(columns, worst))]


def alternative(picture: str, table: Table) -> str:
    """What a picture shows, for who does not see it."""
    kind = Path(picture).stem.removeprefix(f"{table.run['sweep']}-")
    leader = table.leader() or "Elman"
    shows = {
        "us-a-step": "Microseconds a step over the hidden size H, a line per contender",
        "speedup": f"Speedup of {leader} against nn.RNN over batch B and hidden size H",
        "winners": "The contender with the shortest time at each batch B and hidden size H, ties together",
        "growth": "Milliseconds over T, over B and over H, with fitted exponents",
        "roofline": "FLOP/s over FLOP a byte, under the measured roofs",
    }
    return f"{shows.get(kind, kind)}, on {table.name}"
