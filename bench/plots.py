"""The pictures beside a page, and how all pictures look. Imported only where there is a matplotlib.

Contenders differ by marker, line style, hatch and letter as well as by colour: all of it reads in grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from bench.contenders import AUTO, OURS
from bench.rows import TIMED, Row, Run
from bench.tables import Table, digits, fastest, times, verdict
from bench.workloads import PASSES, Workload

PANELS = 6  # the most in a picture that has one for each pass and dtype
DPI = 120
POINTS = 250  # the most in a panel of the roofline

Panel = tuple[str, str]  # a pass and a dtype


@dataclass(frozen=True)
class Look:
    """How a contender is drawn."""

    letter: str
    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    hatch: str


LOOKS = {
    "nn.RNN": Look("N", "#000000", "o", "-", ""),
    "auto": Look("A", "#c1121f", "*", "-", "**"),
    "native": Look("V", "#0b5fa5", "d", (0, (12, 2)), "xx.."),
    "eager": Look("E", "#e07a00", "s", (0, (6, 2)), "//"),
    "cudnn": Look("C", "#6a4c93", "D", (0, (1, 1)), "\\\\"),
    "triton": Look("T", "#0068b5", "^", (0, (6, 2, 1, 2)), "xx"),
    "triton:resident": Look("R", "#0068b5", "^", (0, (6, 2, 1, 2)), "xx"),
    "triton:cooperative": Look("K", "#2a9d5c", "v", (0, (3, 1, 1, 1, 1, 1)), ".."),
    "triton:step": Look("S", "#4cb5d9", ">", (0, (4, 4)), "--"),
    "compiled loop": Look("L", "#a0522d", "P", (0, (2, 2)), "||"),
    "naive loop": Look("l", "#808080", "X", (0, (1, 3)), "++"),
    "flag-gems": Look("G", "#b5179e", "<", (0, (8, 2)), "oo"),
    "xma": Look("X", "#7f8f00", "h", (0, (5, 1, 1, 1)), "OO"),
    "flashrnn": Look("F", "#ff8fa3", "p", (0, (2, 1)), "//.."),
    "haste": Look("H", "#386641", "d", (0, (10, 3)), "\\\\.."),
}
OTHER = Look("?", "#444444", "1", ":", "x-")

# Whatever the reader's own matplotlibrc says, a picture comes out the same.
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "figure.dpi": DPI,
}


def write(folder: Path, table: str, run: Run, rows: Sequence[Row]) -> list[Path]:
    """Draw <table>-us-a-step.png and so on; those that the rows are too few for are left out."""
    read = Table(run, rows)
    pictures = {
        "us-a-step": us_a_step,
        "speedup": speedup_map,
        "winners": winners_map,
        "growth": growth,
        "roofline": roofline,
    }
    written = []
    with style():
        for kind, draw in pictures.items():
            figure = draw(read)
            if figure is not None:
                written.append(save(figure, folder / f"{table}-{kind}.png"))
    return written


def style() -> AbstractContextManager[None]:
    """What every picture of the project is drawn and saved within."""
    return matplotlib.style.context(["default", STYLE])


def save(figure: Figure, path: Path) -> Path:
    """Writes the picture, as a PNG."""
    FigureCanvasAgg(figure)
    # No version of matplotlib in the file: another one that draws the same is no change.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


# --- Which rows --------------------------------------------------------------------------------------


def form(workload: Workload) -> Workload:
    """What is left without sizes and dtype: layers, directions, packed or not."""
    return replace(workload, batch=1, steps=1, input_size=1, hidden_size=1, dtype="float32")


def main_form(table: Table) -> list[Row]:
    """The timed rows of the form that the table has most shapes of: only like is drawn with like."""
    timed = [row for row in table.rows if row.status == TIMED]
    return largest(timed, lambda w: [form(w)], lambda w: w)


def largest(
    rows: Sequence[Row],
    alike: Callable[[Workload], Sequence[Hashable]],
    counted: Callable[[Workload], Hashable],
) -> list[Row]:
    """Of the groups of rows that are alike in something, the one in which `counted` has the most values."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        for key in alike(row.workload):
            groups.setdefault(key, []).append(row)
    if not groups:
        return []
    return max(groups.values(), key=lambda group: len({counted(row.workload) for row in group}))


def over_hidden(rows: Sequence[Row], *same: Callable[[Workload], int]) -> list[Row]:
    """The largest slice over H that is the same in these sizes, its input size either H or one number."""

    def alike(workload: Workload) -> list[Hashable]:
        I, H = workload.input_size, workload.hidden_size
        sizes = tuple(size(workload) for size in same)
        return [(*sizes, "I=H"), (*sizes, I)] if I == H else [(*sizes, I)]

    return largest(rows, alike, _hidden)


def input_rule(slice_: Sequence[Row]) -> str:
    """I=H, or I=64: what a slice over H keeps."""
    if all(row.workload.input_size == row.workload.hidden_size for row in slice_):
        return "I=H"
    return f"I={slice_[0].workload.input_size}"


def _batch(workload: Workload) -> int:
    return workload.batch


def _steps(workload: Workload) -> int:
    return workload.steps


def _hidden(workload: Workload) -> int:
    return workload.hidden_size


def panels(rows: Iterable[Row]) -> list[Panel]:
    """The passes and dtypes that get a panel: without the backward pass where they would be too many."""
    have = dict.fromkeys((row.pass_name, row.workload.dtype) for row in rows)
    dtypes = list(dict.fromkeys(dtype for _, dtype in have))
    found = [(name, dtype) for dtype in dtypes for name in PASSES if (name, dtype) in have]
    if len(found) > PANELS:
        found = [(name, dtype) for name, dtype in found if name != "backward"]
    return found[:PANELS]


def contenders(rows: Iterable[Row]) -> list[str]:
    """Those who have rows, in the order of the legend."""
    names = dict.fromkeys(row.contender for row in rows)
    return [*(name for name in LOOKS if name in names), *(name for name in names if name not in LOOKS)]


def of_panel(rows: Iterable[Row], panel: Panel) -> list[Row]:
    return [row for row in rows if (row.pass_name, row.workload.dtype) == panel]


def by_size(rows: Iterable[Row], size: Callable[[Workload], int]) -> dict[str, list[Row]]:
    """Each contender's rows from the smallest size up; of equal sizes the longest sequence."""
    lines: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row.workload.steps):
        lines.setdefault(row.contender, {})[size(row.workload)] = row
    return {name: [found[at] for at in sorted(found)] for name, found in lines.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of the power law c * size**p that is nearest to the values, by least squares in log-log."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - mean_x) ** 2 for a in x)


def at_batch_and_hidden(rows: Sequence[Row]) -> dict[tuple[int, int], Workload]:
    """One workload for each (B, H): I=H before others, then the T that most have, then the longest."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    often = [w.steps for w in workloads]

    def preference(workload: Workload) -> tuple[bool, int, int]:
        return workload.input_size == workload.hidden_size, often.count(workload.steps), workload.steps

    chosen: dict[tuple[int, int], Workload] = {}
    for workload in workloads:
        place = workload.batch, workload.hidden_size
        if place not in chosen or preference(workload) > preference(chosen[place]):
            chosen[place] = workload
    return chosen


# --- The pictures ------------------------------------------------------------------------------------


def us_a_step(table: Table) -> Figure | None:
    """Microseconds a step over H, a panel for each pass and dtype: p20 to p80 shaded, the floor dashed."""
    shapes = main_form(table)
    # All at the same B and T, if any two H are; otherwise at the same B: a step's time depends little on T.
    rows = over_hidden(shapes, _batch, _steps)
    if len({row.workload.hidden_size for row in rows}) < 2:
        rows = over_hidden(shapes, _batch)
    sizes = sorted({row.workload.hidden_size for row in rows})
    if len(sizes) < 2:
        return None
    like = rows[0].workload
    steps = sorted({row.workload.steps for row in rows})
    shown = sorted(panels(rows), key=lambda panel: list(PASSES).index(panel[0]))
    passes = len({name for name, _ in shown})
    across = len(shown) // passes if len(shown) % passes == 0 and len(shown) > passes else 3
    figure, axes = _panels(len(shown), 5.4 if len(shown) < 3 else 4.3, 4.2, across)
    for axis, panel in zip(axes, shown, strict=True):
        here = of_panel(rows, panel)
        lines = by_size(here, _hidden)
        for name, line in lines.items():
            look, x = LOOKS.get(name, OTHER), [row.workload.hidden_size for row in line]
            _draw(axis, name, x, [row.us_a_step or 0 for row in line])
            scale = [1e6 / row.workload.steps for row in line]
            low = [(row.p20 or 0) * each for row, each in zip(line, scale, strict=True)]
            high = [(row.p80 or 0) * each for row, each in zip(line, scale, strict=True)]
            axis.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
        most = max(lines.values(), key=len)
        floors = [(row, table.floor(row)) for row in most]
        known = [(row.workload, floor.seconds) for row, floor in floors if floor is not None]
        if known:
            axis.plot(
                [w.hidden_size for w, _ in known],
                [seconds * 1e6 / w.steps for w, seconds in known],
                color="#555555",
                ls=(0, (2, 2)),
                lw=2.2,
            )
        _log_axes(axis, sizes)
        axis.set_xlabel("hidden size H")
        axis.set_title(_panel_title(panel, shown))
    _sparse_labels(axes, "us a step")
    handles = [_line(name) for name in contenders(rows)]
    if table.run["floor"]:
        handles.append(Line2D([], [], color="#555555", ls=(0, (2, 2)), lw=2.2, label="floor"))
    _legend(figure, handles)
    length = f"T={steps[0]}" if len(steps) == 1 else f"T={steps[0]} to {steps[-1]}, one for each H"
    slice_ = f"B={like.batch}, {length}, {input_rule(rows)}{_form_text(like)}; shaded: p20 to p80"
    _title(figure, table, "microseconds a step over H", slice_, shown)
    return figure


def speedup_map(table: Table) -> Figure | None:
    """How many times as fast as nn.RNN the leading contender is, over B and H."""
    leader = table.leader()
    rows = [row for row in main_form(table) if row.contender == leader and row.speedup is not None]
    places = _places(rows)
    if places is None:
        return None
    shown, batches, hiddens, lengths = places
    figure, axes = _map_panels(len(shown), batches, hiddens)
    most = max(2.0, *(max(row.speedup or 1, 1 / (row.speedup or 1)) for row in rows))
    norm, colours = LogNorm(1 / most, most), matplotlib.colormaps["RdBu"]
    for axis, panel in zip(axes, shown, strict=True):
        here = of_panel(rows, panel)
        found = {row.workload: row for row in here}
        for (batch, hidden), workload in at_batch_and_hidden(here).items():
            row = found[workload]
            colour = to_rgb(colours(norm(row.speedup or 1)))
            said = [times(row.speedup or 0)]
            if verdict(row) == "tie":
                said.append("tie")
            if len(lengths) > 1:
                said.append(f"T={workload.steps}")
            place = hiddens.index(hidden), batches.index(batch)
            _cell(axis, place, said, facecolor=colour, ink="black" if _luminance(colour) > 0.18 else "white")
        _map_axes(axis, batches, hiddens, _panel_title(panel, shown))
    marks = (
        (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if most < 3 else (1, 2, 4, 8, 16, 32, 64, 128)
    )
    steps = sorted({step for mark in marks if mark <= most for step in (mark, 1 / mark)})
    tall = figure.get_figheight()
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        ticks=FixedLocator(steps),
        shrink=min(0.9, 4 / tall),
        aspect=16,
        pad=0.02,
    )
    bar.ax.yaxis.set_major_formatter(
        FixedFormatter([f"{step:.2f}".rstrip("0").rstrip(".") for step in steps])
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("times as fast as nn.RNN")
    detail = f"{_lengths_text(lengths)}{_form_text(rows[0].workload)}; tie: the 95% interval contains 1"
    _title(figure, table, f"speedup of {leader} against nn.RNN", detail, shown)
    return figure


def winners_map(table: Table) -> Figure | None:
    """The contender with the shortest time over B and H; those that tie with it beside it."""
    rows = main_form(table)
    # auto runs what one of the others runs.
    others = {
        (row.workload, row.pass_name) for row in rows if row.contender in OURS and row.contender != AUTO
    }
    rows = [row for row in rows if row.contender != AUTO or (row.workload, row.pass_name) not in others]
    places = _places(rows)
    if places is None or len(contenders(rows)) < 2:
        return None
    shown, batches, hiddens, lengths = places
    figure, axes = _map_panels(len(shown), batches, hiddens)
    named: list[str] = []
    for axis, panel in zip(axes, shown, strict=True):
        here = of_panel(rows, panel)
        for (batch, hidden), workload in at_batch_and_hidden(here).items():
            names = fastest({row.contender: row for row in here if row.workload == workload})
            named += names
            look = LOOKS.get(names[0], OTHER)
            letters = [LOOKS.get(name, OTHER).letter for name in names]
            said = [f"{'='.join(letters[i : i + 3])}=" for i in range(0, len(letters), 3)]
            said[-1] = said[-1][:-1]
            if len(lengths) > 1:
                said.append(f"T={workload.steps}")
            place = hiddens.index(hidden), batches.index(batch)
            _cell(axis, place, said, facecolor=_pale(look.colour), hatch=look.hatch, boxed=True)
        _map_axes(axis, batches, hiddens, _panel_title(panel, shown))
    order = [name for name in contenders(rows) if name in named]
    handles = [_patch(name) for name in order]
    _legend(figure, handles)
    detail = (
        f"{_lengths_text(lengths)}{_form_text(rows[0].workload)}; "
        f"E=N: a tie of E, the faster, with N (95% interval of the ratio)"
    )
    _title(figure, table, "the shortest time", detail, shown)
    return figure


def growth(table: Table) -> Figure | None:
    """Milliseconds over T, over B and over H, everything else equal; a row of panels for each pass."""
    rows = main_form(table)
    dtype = table.dtypes[0] if table.dtypes else ""
    rows = [row for row in rows if row.workload.dtype == dtype]
    sizes = {"T": _steps, "B": _batch, "H": _hidden}
    slices = {
        "T": largest(rows, lambda w: [(w.batch, w.input_size, w.hidden_size)], _steps),
        "B": largest(rows, lambda w: [(w.steps, w.input_size, w.hidden_size)], _batch),
        "H": over_hidden(rows, _batch, _steps),
    }
    slices = {
        name: found for name, found in slices.items() if len({sizes[name](r.workload) for r in found}) > 1
    }
    if not slices:
        return None
    passes = [name for name in PASSES if any(row.pass_name == name for row in rows)]
    figure, axes = _panels(len(slices) * len(passes), 4.3, 4.4, across=len(slices))
    for i, axis in enumerate(axes):
        pass_name, name = passes[i // len(slices)], list(slices)[i % len(slices)]
        size = sizes[name]
        here = [row for row in slices[name] if row.pass_name == pass_name]
        handles = []
        for contender, line in by_size(here, size).items():
            x, y = [size(row.workload) for row in line], [(row.median or 0) * 1e3 for row in line]
            _draw(axis, contender, x, y)
            # + 0: no minus before a zero
            fitted = f" ~ {name}^{round(exponent(x, y), 2) + 0:.2f}" if len(x) > 1 else ""
            handles.append(_line(contender, f"{contender}{fitted}"))
        _log_axes(axis, sorted({size(row.workload) for row in slices[name]}))
        axis.set_xlabel({"T": "time steps T", "B": "batch rows B", "H": "hidden size H"}[name])
        axis.set_ylabel("ms")
        like = slices[name][0].workload
        fixed = {
            "B": f"B={like.batch}",
            "T": f"T={like.steps}",
            "I": input_rule(slices[name]) if name == "H" else f"I={like.input_size}",
            "H": f"H={like.hidden_size}",
        }
        axis.set_title(f"{PASSES[pass_name]}, {' '.join(text for at, text in fixed.items() if at != name)}")
        columns = 1 if len(handles) < 4 else 2
        axis.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=columns,
            fontsize=8,
            frameon=False,
            handlelength=3.2,
        )
    what = f"ms over {', '.join(slices)}"
    detail = f"exponents by least squares in log-log{_form_text(rows[0].workload)}"
    _title(figure, table, what, detail, [("", dtype)])
    return figure


def roofline(table: Table) -> Figure | None:
    """Rates over operations a byte, under the roofs that the run measured; a panel for each dtype."""
    floor = table.run["floor"]
    rows = [row for row in main_form(table) if row.workload.dtype in floor.get("matrix", {})]
    dtypes = list(dict.fromkeys(row.workload.dtype for row in rows))[:3]
    if not dtypes:
        return None
    if len({row.pass_name for row in rows}) == len(PASSES):
        rows = [row for row in rows if row.pass_name != "backward"]
    rows, which = _fewer(rows, POINTS * len(dtypes))
    unit, scale = table.flop_unit
    figure, axes = _panels(len(dtypes), 7.5 if len(dtypes) == 1 else 5.0, 4.6)
    for axis, dtype in zip(axes, dtypes, strict=True):
        for row in rows:
            if row.workload.dtype == dtype:
                rate = table.flop_rate(row)
                _point(axis, row, rate / table.byte_rate(row), rate * scale)
        _roofs(axis, floor["bandwidth"], floor["matrix"][dtype], scale)
        bandwidth, peak = max(floor["bandwidth"])[1] * 1e-9, floor["matrix"][dtype] * scale
        axis.set_title(f"{dtype}: {digits(bandwidth)} GB/s, {digits(peak)} {unit}")
        axis.set_xlabel("FLOP a byte that has to move")
    _sparse_labels(axes, unit)
    handles = [_line(name, only_marker=True) for name in contenders(rows)]
    for name in dict.fromkeys(row.pass_name for row in rows):
        look = {"color": "#555555", "marker": "o", "ls": ""}
        handles.append(Line2D([], [], **look, **FILLS[name], label=PASSES[name]))  # type: ignore[arg-type]
    handles.append(Line2D([], [], color="black", lw=2, label="roofs"))
    handles.append(Line2D([], [], color="black", lw=1, ls=(0, (1, 2)), label="in cache"))
    _legend(figure, handles)
    detail = f"{which}; roofs: this run's own, the bandwidth of the largest working set"
    _title(figure, table, "roofline", detail, [("", dtype) for dtype in dtypes])
    return figure


FILLS = {
    "forward": {"fillstyle": "full"},
    "backward": {"fillstyle": "left", "markerfacecoloralt": "white"},
    "training": {"fillstyle": "none"},
}


def _point(axis: Axes, row: Row, x: float, y: float) -> None:
    look = LOOKS.get(row.contender, OTHER)
    drawn = {"color": look.colour, "marker": look.marker, "ls": "", "markersize": 5, "markeredgewidth": 0.9}
    axis.plot(x, y, **drawn, **FILLS[row.pass_name])  # type: ignore[arg-type]


def _fewer(rows: list[Row], most: int) -> tuple[list[Row], str]:
    """At most so many rows if that can be: else one shape for each B and H, or those of one slice over H."""
    if len(rows) <= most:
        return rows, "all shapes"
    chosen = {(w.batch, w.steps, w.input_size, w.hidden_size) for w in at_batch_and_hidden(rows).values()}
    found = [
        row
        for row in rows
        for w in [row.workload]
        if (w.batch, w.steps, w.input_size, w.hidden_size) in chosen
    ]
    if len(found) <= most:
        return found, "one shape for each B and H"
    found = over_hidden(rows, _batch, _steps)
    like = found[0].workload
    return found, f"B={like.batch} T={like.steps} {input_rule(found)}"


def _roofs(axis: Axes, bandwidths: Sequence[Sequence[float]], peak: float, scale: float) -> None:
    """Bandwidth and matrix rate, to both sides of where they meet and of the points; in cache dotted."""
    _, bandwidth = max((size, rate) for size, rate in bandwidths)
    cached = max(rate for _, rate in bandwidths)
    axis.set_xscale("log")
    axis.set_yscale("log")
    left, right = axis.get_xlim()
    left, right = min(left, peak / bandwidth / 2), max(right, peak / bandwidth * 2)
    for rate, width, dashes in ((cached, 1.0, (0, (1, 2))), (bandwidth, 2.0, "-")):
        x = [left, peak / rate, right] if left < peak / rate else [left, right]
        axis.plot(x, [min(at * rate, peak) * scale for at in x], color="black", lw=width, ls=dashes, zorder=1)
    axis.set_xlim(left, right)
    for which, ends in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        _number_ticks(which, _log_steps(*ends))
    axis.grid(True)
    axis.set_axisbelow(True)


# --- Drawing -----------------------------------------------------------------------------------------


def _panels(count: int, width: float, height: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, three in a row unless told, each of that size in inches."""
    across = 2 if count == 4 and across == 3 else min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(7.5, width * across), height * down + 1.4), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def _map_panels(count: int, batches: Sequence[int], hiddens: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Panels for maps: their size follows the number of cells."""
    across = 1 if count == 1 or (count < 4 and len(hiddens) > 8) else 2
    width, height = 0.62 * len(hiddens) + 1.2, 0.52 * len(batches) + 0.9
    down = math.ceil(count / across)
    size = max(7.5, width * across + 1.2), height * down + 1.7
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def _places(
    rows: Sequence[Row],
) -> tuple[list[Panel], list[int], list[int], list[int]] | None:
    """Panels, batches, hidden sizes and lengths of a map; None if there is nothing to map."""
    shown = panels(rows)
    workloads = [w for panel in shown for w in at_batch_and_hidden(of_panel(rows, panel)).values()]
    batches, hiddens = sorted({w.batch for w in workloads}), sorted({w.hidden_size for w in workloads})
    if len(batches) * len(hiddens) < 2:
        return None
    return shown, batches, hiddens, sorted({w.steps for w in workloads})


def _cell(
    axis: Axes,
    place: tuple[int, int],
    said: Sequence[str],
    facecolor: tuple[float, float, float],
    ink: str = "black",
    hatch: str = "",
    boxed: bool = False,
) -> None:
    """A cell of a map: its first line large, the rest small."""
    x, y = place
    axis.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=facecolor, edgecolor="#666666", hatch=hatch, lw=0.4)
    )
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if boxed else None
    spread = 0.27 if len(said) > 2 else 0.32
    for i, text in enumerate(said):
        offset = spread * ((len(said) - 1) / 2 - i)
        size = 9 if i == 0 else 7.5
        axis.text(x, y + offset, text, ha="center", va="center", fontsize=size, color=ink, bbox=box)


def _map_axes(axis: Axes, batches: Sequence[int], hiddens: Sequence[int], title: str) -> None:
    axis.set_xlim(-0.5, len(hiddens) - 0.5)
    axis.set_ylim(-0.5, len(batches) - 0.5)
    axis.set_xticks(range(len(hiddens)), [str(hidden) for hidden in hiddens])
    axis.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlabel("hidden size H")
    axis.set_ylabel("batch rows B")
    axis.set_title(title)


BELOW = {"lw": 5.0, "alpha": 0.4, "zorder": 1.5}


def _draw(axis: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    """A contender's line. What auto runs is another one's: it lies wide and pale below that."""
    look = LOOKS.get(name, OTHER)
    below = BELOW if name == AUTO else {}
    axis.plot(x, y, color=look.colour, marker=look.marker, ls=look.line, **below)  # type: ignore[arg-type]


def _log_axes(axis: Axes, sizes: Sequence[int]) -> None:
    """Logarithmic axes: ticks at the sizes, as many of them named as fit, and plain numbers upwards."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    grid = axis.get_subplotspec()
    inches = axis.figure.get_figwidth() / (grid.get_gridspec().ncols if grid else 1) - 0.9  # type: ignore[union-attr]
    digit = 0.1 * math.log(sizes[-1] / sizes[0]) / inches  # its width on the axis
    named: list[int] = []

    def apart(one: int, other: int) -> bool:
        return abs(math.log(one / other)) > digit * (len(f"{one}{other}") / 2 + 1)

    # The ends first, then powers of two: what else fits is named between them.
    for size in sorted(sizes, key=lambda size: (size not in (sizes[0], sizes[-1]), size & (size - 1) != 0)):
        if all(apart(size, other) for other in named):
            named.append(size)
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_major_formatter(FixedFormatter([str(size) if size in named else "" for size in sizes]))
    axis.xaxis.set_minor_locator(NullLocator())
    _number_ticks(axis.yaxis, _log_steps(*axis.get_ylim()))
    axis.grid(True)
    axis.set_axisbelow(True)


def _number_ticks(axis: object, steps: Sequence[float]) -> None:
    """Named ticks there and nowhere else; the limits stay."""
    axis.set_major_locator(FixedLocator(steps))  # type: ignore[attr-defined]
    axis.set_major_formatter(FixedFormatter([f"{step:g}" for step in steps]))  # type: ignore[attr-defined]
    axis.set_minor_formatter(NullFormatter())  # type: ignore[attr-defined]


def _log_steps(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... within the limits; more of them in less than a decade, fewer in more than three."""
    decades = math.log10(high / low)
    heads = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 3 else (1,)
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [float(f"{head}e{power}") for power in range(start, end + 1) for head in heads]
    return [step for step in steps if low * 0.999 <= step <= high * 1.001]


def _sparse_labels(axes: Sequence[Axes], label: str) -> None:
    """The y axis is named once in each row of panels."""
    for axis in axes:
        spec = axis.get_subplotspec()
        if spec is None or spec.is_first_col():
            axis.set_ylabel(label)


def _line(name: str, label: str = "", only_marker: bool = False) -> Line2D:
    look = LOOKS.get(name, OTHER)
    line = "" if only_marker else look.line
    below = BELOW if name == AUTO and not only_marker else {}
    return Line2D([], [], color=look.colour, marker=look.marker, ls=line, label=label or name, **below)  # type: ignore[arg-type]


def _patch(name: str) -> Patch:
    look = LOOKS.get(name, OTHER)
    label = f"{look.letter}: {name}"
    return Patch(facecolor=_pale(look.colour), hatch=look.hatch, edgecolor="#666666", label=label)


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    columns = max(3, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        handleheight=1.2,
    )


def _title(figure: Figure, table: Table, what: str, detail: str, shown: Sequence[Panel]) -> None:
    """Table and quantity, machine and threads, and what is held constant, within the figure's width."""
    dtypes = list(dict.fromkeys(dtype for _, dtype in shown))
    passes = list(dict.fromkeys(PASSES[name] for name, _ in shown if name))
    where = [table.name, ", ".join(dtypes)]
    if not table.cuda:
        where.append(f"{table.run['timing']['threads']} threads")
    if len(passes) == 1:
        where.append(passes[0])
    lines = [f"{table.run['sweep']}: {what}", "; ".join(where), detail]
    width = int(figure.get_figwidth() * 11)
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in lines))


def _panel_title(panel: Panel, shown: Sequence[Panel]) -> str:
    """The pass, and the dtype if panels differ in it."""
    name, dtype = panel
    return f"{PASSES[name]}, {dtype}" if len({dtype for _, dtype in shown}) > 1 else PASSES[name]


def _form_text(workload: Workload) -> str:
    """; layers=2 bidirectional: empty for one tanh layer in one direction."""
    words = form(workload).shape.split(" ")[4:]
    return f"; {' '.join(words)}" if words else ""


def _lengths_text(lengths: Sequence[int]) -> str:
    return f"T={lengths[0]}" if len(lengths) == 1 else "T as in the cells"


def _pale(colour: str) -> tuple[float, float, float]:
    """Light enough for black letters and a hatch."""
    red, green, blue = (0.5 + 0.5 * part for part in to_rgb(colour))
    return red, green, blue


def _luminance(colour: Sequence[float]) -> float:
    red, green, blue = (part**2.2 for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
