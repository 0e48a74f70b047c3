"""The picture of a training: its losses, and the held-out text's over time. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.plots import BELOW, DPI, LOOKS, OTHER, STYLE

BASELINE_LINES = ((0, (1, 2)), (0, (4, 2)))


def losses(path: Path, title: str, runs: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> Path:
    """Draws the runs, each as bench/charlm.py's curve_of(), to that file. baselines: bits a character."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        by_characters, by_time = figure.subplots(1, 2, sharey=True)
        for number, run in enumerate(runs):
            _by_characters(by_characters, run, below=number == 0 and len(runs) > 1)
            look = LOOKS.get(run["name"], OTHER)
            times = [seconds for seconds, *_ in run["held_out"]]
            found = [value for *_, value in run["held_out"]]
            by_time.plot(
                times,
                found,
                color=look.colour,
                marker=look.marker,
                markersize=3.5,
                ls=look.line,
                label=run["name"],
            )
        for (name, value), line in zip(baselines.items(), BASELINE_LINES, strict=True):
            by_time.axhline(value, color="#777777", ls=line, lw=1.2)
            by_time.annotate(
                f"{name} {value:.2f}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=9,
                color="#444444",
            )
        most = max(baselines.values(), default=math.inf)
        if by_time.get_ylim()[1] > most + 1:
            by_time.set_ylim(top=most + 1)  # the first steps, of guesses, say nothing
        by_characters.set_xlabel("characters learnt from, millions")
        by_characters.set_ylabel("bits a character")
        by_characters.set_title("training text, means over steps")
        by_time.set_xlabel("seconds of training")
        by_time.set_title("held-out text")
        for axis in (by_characters, by_time):
            axis.set_xlim(left=0)
            axis.grid(True)
            axis.set_axisbelow(True)
        if len(runs) > 1:
            by_characters.legend(frameon=False)
        figure.suptitle(title, parse_math=False)  # it has a file's name
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _by_characters(axis: Axes, run: Mapping[str, Any], below: bool) -> None:
    """The training loss; below: wide and pale, under another one's that is to lie on it."""
    look = LOOKS.get(run["name"], OTHER)
    a_mean = run["characters"] / max(1, run["steps"]) * run["steps_a_mean"] / 1e6
    x = [(place + 0.5) * a_mean for place in range(len(run["losses"]))]
    more: dict[str, Any] = BELOW if below else {"ls": look.line}
    axis.plot(x, run["losses"], color=look.colour, label=run["name"], **more)
