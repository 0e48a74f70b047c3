"""The picture of a training: its losses, and the held-out text's bits a character over time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASELINE_LINES = ((0, (1, 2)), (0, (4, 2)))


def losses(
    path: Path, title: str, runs: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]
) -> Path | None:
    """Draws the runs, each as bench/training.py's curve_of(), to that file; None if there is no matplotlib.

    baselines: bits a character, by name.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    from bench import plots

    with plots.style():
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        by_characters, by_time = figure.subplots(1, 2, sharey=True)
        for number, run in enumerate(runs):
            look = plots.LOOKS.get(run["name"], plots.OTHER)
            style: dict[str, Any] = {"color": look.colour, "ls": look.line, "label": run["name"]}
            # The first one lies wide and pale under the others, which are to lie on it.
            below = plots.BELOW if number == 0 and len(runs) > 1 else {}
            each = run["characters"] / max(1, run["steps"]) * run["steps_a_mean"] / 1e6
            x = [(place + 0.5) * each for place in range(len(run["losses"]))]
            by_characters.plot(x, run["losses"], **style, **below)
            x = [seconds for seconds, *_ in run["held_out"]]
            y = [value for *_, value in run["held_out"]]
            by_time.plot(x, y, marker=look.marker, markersize=3.5, **style)
        for (name, value), line in zip(baselines.items(), BASELINE_LINES, strict=False):
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
        figure.suptitle(title, parse_math=False)  # a file's name is in it
        return plots.save(figure, path)
