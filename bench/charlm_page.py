"""The published comparisons of character models: a machine's charlm.jsonl, and the page made of it.

A line of charlm.jsonl is a comparison, what bench/charlm_compare.py has recorded; a later one with the same
text, layers, hidden size, nonlinearity and dtype takes its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import curves, machine, measure, rows
from bench.page import NEEDS_MATPLOTLIB, conditions, load, pipes, ratio
from bench.rows import BASELINE
from bench.tables import digits, machine_name, times

Record = dict[str, Any]
SHARES = (1 / 30, 1 / 10, 1 / 5, 1 / 2, 1)  # of a run, at which its bits are told
SAMPLE = 600  # characters shown

TOP = """\
The same character model, trained by turns with each contender, from the same weights on the same windows of
text. Seconds are of training alone. Bits a character are of text held out, which the running average of the
weights reads every thirtieth of a run; the baselines are fitted on the same training text. The default
settings were picked by the bits of the same held-out text. Speeds are medians over the turns, with their 95%
interval; a ratio above 1 is faster than nn.RNN. `python -m bench.charlm --compare` measures it, `python -m
bench.report` makes this page of charlm.jsonl."""


def name_of(record: Record) -> str:
    """The model in a few letters: what tells a machine's comparisons apart."""
    s, text = record["settings"], record["text"]["name"]
    nonlinearity = "" if s["nonlinearity"] == "tanh" else f"-{s['nonlinearity']}"
    source = ""
    if text != "pydoc_data.topics":  # two files may have the same name
        source = f"-{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')}-{record['text']['digest'][:6]}"
    return f"{s['layers']}x{s['hidden']}{nonlinearity}-{s['dtype']}{source}"


def read(path: Path) -> list[Record]:
    """The comparisons of a file, none if there is no file. ValueError for a line that is none."""
    if not path.exists():
        return []
    try:
        return _ordered([json.loads(line) for line in rows.whole_lines(path)])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name} has a line that is no comparison ({type(error).__name__}: {error}). Move the file "
            "away and compare again, or use the commit that wrote it."
        ) from error


def _ordered(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record["settings"]["dtype"], name_of(record)))


def publish(results: Path, record: Record) -> list[Path]:
    """Adds the comparison to its machine's folder; returns the paths, the page first."""
    folder = results / machine.slug(record["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "charlm.jsonl"
    kept = [other for other in read(path) if name_of(other) != name_of(record)]
    records = _ordered([*kept, record])
    (folder / f"charlm-{name_of(record)}.png").unlink(missing_ok=True)  # it shows the one before
    lines = [json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in records]
    rows.replace(path, "".join(lines))
    if not (folder / "machine.json").exists():
        machine.write(folder, record)
    return [*write(folder, records), path]


def write(folder: Path, records: Sequence[Record]) -> list[Path]:
    """charlm.md and its pictures, of the folder's comparisons; nothing where there are none."""
    if not records:
        return []
    pictures = {name_of(record): folder / f"charlm-{name_of(record)}.png" for record in records}
    for record in records:
        title = f"{record['text']['name']}, {_model(record)}; {machine_name(record)}"
        curves.losses(pictures[name_of(record)], title, record["runs"], record["baselines"])
    for old in folder.glob("charlm-*.png"):
        if old not in pictures.values():
            old.unlink()
    pictures = {name: path for name, path in pictures.items() if path.exists()}
    page = folder / "charlm.md"
    parts = [f"# A character language model: {machine_name(records[0])}", TOP]
    for record in records:
        parts += _section(record, pictures.get(name_of(record)))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    return [page, *pictures.values()]


def _model(record: Record) -> str:
    s = record["settings"]
    return f"{s['layers']} x {s['hidden']} {s['nonlinearity']}, {s['dtype']}"


def _section(record: Record, picture: Path | None) -> list[str]:
    text, runs = record["text"], record["runs"]
    baseline = next(run for run in runs if run["name"] == BASELINE)
    parts = [
        f"## {_model(record)}, on {text['name']}",
        *verdicts(record),
        _speeds(runs, baseline),
        "Bits a character of the held-out text:",
        _bits(record),
    ]
    names = " and ".join(run["name"] for run in runs)
    parts.append(
        f"![Training loss over characters, and bits a character of the held-out text over time, of {names}]"
        f"({picture.name})"
        if picture
        else NEEDS_MATPLOTLIB
    )
    parts += [
        "How far the losses of each step are from nn.RNN's, the largest relative difference up to that step. "
        "Sums in another order round otherwise, and training multiplies every difference:",
        _apart(runs),
    ]
    best = min(runs, key=lambda run: run["held_out"][-1][2])
    prompt = record["prompt"]
    parts += [
        f"What {best['name']}'s model writes, a call for each character, after the first {len(prompt)}:",
        _fenced(prompt + best["sample"][:SAMPLE]),
    ]
    facts = [
        (
            "text",
            f"{text['characters']:,} characters, {text['alphabet']} distinct, sha256 {text['digest']}...",
        ),
        ("held out", f"the last {text['held_out']:,}"),
        ("settings", ", ".join(f"{k} {v}" for k, v in record["settings"].items() if v is not None)),
        *((run["name"], run["route"]) for run in runs if run["route"] != run["name"]),
        *((name, f"not compared. {reason}") for name, reason in record["absent"].items()),
        *conditions(record),
        ("threads", str(record["threads"])),
        *load(record),
    ]
    return [*parts, pipes(("", ""), (False, False), facts)]


def verdicts(record: Record) -> list[str]:
    """When each run came below each baseline, in sentences."""
    said = []
    for run in record["runs"]:
        words = []
        for name, value in record["baselines"].items():
            below = next((seconds for seconds, _, found in run["held_out"] if found < value), None)
            words.append(
                f"not below the {name}'s in {digits(run['seconds'])} s"
                if below is None
                else f"below the {name}'s after {digits(below)} s"
            )
        said.append(f"- {run['name']}: {', '.join(words)}.")
    return ["\n".join(said)]


def _speeds(runs: Sequence[Record], baseline: Record) -> str:
    """Characters a second, training and generation."""
    headings = ["", "training, characters/s", "against nn.RNN", "generation, characters/s", "against nn.RNN"]

    def cells(run: Record) -> list[str]:
        said = [run["name"]]
        for kind in ("training", "generation"):
            found = measure.speedup(baseline[kind], run[kind])
            if len(run[kind]) >= measure.MIN_ROUNDS:
                low, high = measure.median_interval(run[kind])
                interval, against = f" [{_rate(high)} .. {_rate(low)}]", ratio(*found)
            else:  # so few have no such interval
                interval, against = "", times(found[0])
            said.append(_rate(measure.quantile(run[kind], 0.5)) + interval)
            said.append("1" if run is baseline else against)
        return said

    return pipes(headings, (False, *(True,) * 4), [cells(run) for run in runs])


def _rate(seconds: float) -> str:
    return f"{float(digits(1 / seconds)):,.0f}"


def _bits(record: Record) -> str:
    runs, longest = record["runs"], len(record["runs"][0]["held_out"])
    places = list(dict.fromkeys(max(1, round(share * longest)) - 1 for share in SHARES))
    if len({run["steps"] for run in runs}) == 1:
        when = [f"after {runs[0]['held_out'][place][1]:,} steps" for place in places]
    else:
        when = [f"after {digits(max(run['held_out'][place][0] for run in runs))} s" for place in places]
    headings = ["", *when, "characters learnt from"]
    body = [
        [run["name"], *(f"{run['held_out'][place][2]:.3f}" for place in places), f"{run['characters']:,}"]
        for run in runs
    ]
    for name, value in record["baselines"].items():
        body.append([name, *[""] * (len(places) - 1), f"{value:.3f}", ""])
    return pipes(headings, (False, *(True,) * (len(places) + 1)), body)


def _apart(runs: Sequence[Record]) -> str:
    steps = sorted({step for run in runs for step in run["apart"]}, key=int)
    body = [
        [run["name"], *(f"{run['apart'][step]:.1e}" if step in run["apart"] else "" for step in steps)]
        for run in runs
        if run["name"] != BASELINE
    ]
    headings = ["", *(f"{int(step):,} steps" for step in steps)]
    return pipes(headings, (False, *(True,) * len(steps)), body)


def _fenced(text: str) -> str:
    """A block of code that no backticks in the text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
