"""Rows to text: the table at the end of a run, and the published Markdown.

    python -m bench.report results/<machine>/quick.jsonl

rebuilds quick.md beside it from the stored rows alone, byte by byte as the run wrote it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import rows as records
from bench.rows import BASELINE, FAILURES, LEFT_OUT, TIMED, UNAVAILABLE, Row
from bench.workloads import PASSES

HEADERS = [
    "shape",
    "pass",
    "contender",
    "ms, median [p20 .. p80]",
    "samples",
    "us a step",
    "speedup [95% interval]",
    "error / nn.RNN's error",
]
ALIGN = ("left", "left", "left", "right", "right", "right", "right", "left")


def terminal(rows: list[Row]) -> str:
    """The whole report as plain text."""
    return "\n\n".join(_parts(rows, "simple"))


def markdown(run: dict[str, Any], rows: list[Row]) -> str:
    """The whole report as a Markdown page, headed by what it was measured on."""
    machine = run["machine"]
    name = machine.get("gpu") or machine["cpu"]
    parts = [f"# {run['sweep']}: {name}, {machine['cores']} cores"]
    if run["partial"]:
        parts.append(f"**Not a complete run: {run['partial']}**")
    parts += [tabulate(_facts(run), ("", ""), tablefmt="github", disable_numparse=True), READING]
    return "\n\n".join([*parts, *_parts(rows, "github")]) + "\n"


READING = """\
Each row agreed with the float64 reference before it was timed: output, h_n and, for forward+backward,
every gradient under random upstream gradients; at most 1.5 times nn.RNN's own error, or the rounding
floor (see bench/agreement.py). The error shown is ||own - ref|| / ||ref|| of the quantity nearest to its
bar, and nn.RNN's error of the same quantity. The contenders of a shape and pass were sampled interleaved,
in rotating order; caches are warm. The interval is the 95% bootstrap interval of the ratio of medians; one
that contains 1 is a tie."""


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and conditions, each as a name and a text."""
    machine, timing = run["machine"], run["timing"]
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[run["dirty"]]
    facts = [
        ("CPU", f"{machine['cpu']}, {machine['instructions']}"),
        ("cores, threads", f"{machine['cores']}, {timing['threads']}"),
        ("memory", f"{machine['memory_gib'] or '?'} GiB"),
    ]
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, {machine['multiprocessors']} multiprocessors"
            f", compute capability {machine['compute_capability']}"
        )
        facts.append(("GPU", gpu))
    facts += [
        ("OS", machine["os"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["software"].items())),
        ("float32 products", run["float32"]),
        ("commit", f"{run['commit']}{dirty}"),
        ("date", run["date"]),
        ("clock", timing["clock"]),
        ("sampling", f"{timing['seconds']:g} s per contender, at least {timing['min_rounds']} rounds"),
    ]
    if run["load_average"] is not None:
        facts.append(("load average at the start", f"{run['load_average']:.2f}"))
    return facts


def _parts(rows: list[Row], style: str) -> list[str]:
    """The tables that both reports consist of: latency, geometric means, failures, not measured."""
    head = "## {}" if style == "github" else "{}"
    parts = []

    def add(title: str, headers: list[str], body: list[list[str]], align: tuple[str, ...]) -> None:
        if body:
            table = tabulate(body, headers, tablefmt=style, colalign=align, disable_numparse=True)
            parts.extend([head.format(title), table])

    shown = [row for row in rows if row.status not in (UNAVAILABLE, LEFT_OUT)]
    add("Latency", HEADERS, [_latency(row) for row in shown], ALIGN)
    means = ["pass", "contender", "geometric mean", "shapes", "faster / tie / slower", "worst cell"]
    add(
        "Speed against nn.RNN (above 1 is faster)",
        means,
        list(_means(rows)),
        ("left", "left", "right", "right", "right", "left"),
    )
    failed = [[r.shape, PASSES[r.pass_name], r.contender, r.reason] for r in rows if r.status in FAILURES]
    add("Failures", ["shape", "pass", "contender", "reason"], failed, ("left",) * 4)
    add("Not measured", ["contender", "where", "reason"], list(_absent(rows)), ("left",) * 3)
    return parts


def _latency(row: Row) -> list[str]:
    shape = row.shape if row.dtype == "float32" else f"{row.shape} {row.dtype}"
    start = [shape, PASSES[row.pass_name], row.contender]
    if row.status != TIMED or row.median is None or row.p20 is None or row.p80 is None:
        return [*start, row.status, "", "", "", _error(row)]
    median, p20, p80 = (digits(seconds * 1e3) for seconds in (row.median, row.p20, row.p80))
    return [
        *start,
        f"{median} [{p20} .. {p80}]",
        str(len(row.samples)),
        digits(row.median * 1e6 / row.steps),
        "1" if row.contender == BASELINE else _speedup(row),
        _error(row),
    ]


def _speedup(row: Row) -> str:
    if row.speedup is None or row.speedup_low is None or row.speedup_high is None:
        return "-"
    interval = f"[{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    return f"tie {interval}" if verdict(row) == "tie" else f"{row.speedup:.2f} {interval}"


def _error(row: Row) -> str:
    if not row.worst:
        return "-"
    own, baseline = ("not finite" if e is None else f"{e:.1e}" for e in row.errors[row.worst])
    return f"{own} / {baseline} ({row.worst})"


def verdict(row: Row) -> str:
    """faster, slower or tie: a tie's interval contains 1, as printed, with two decimals."""
    if row.speedup_low is None or row.speedup_high is None:
        raise ValueError(f"The row of {row.contender} at {row.shape} has no speedup to judge.")
    if round(row.speedup_low, 2) > 1:
        return "faster"
    return "slower" if round(row.speedup_high, 2) < 1 else "tie"


def _means(rows: list[Row]) -> Iterable[list[str]]:
    """Per pass and contender: geometric mean of the measured ratios (a tie's too), and its worst cell."""
    for pass_name, title in PASSES.items():
        for contender in dict.fromkeys(row.contender for row in rows if row.contender != BASELINE):
            cells = [
                (row.speedup, row)
                for row in rows
                if (row.pass_name, row.contender) == (pass_name, contender) and row.speedup is not None
            ]
            if not cells:
                continue
            mean = math.exp(sum(math.log(ratio) for ratio, _ in cells) / len(cells))
            shapes = len({row[:5] for row in map(_key, rows) if row[5] == pass_name})
            counts = [sum(verdict(row) == word for _, row in cells) for word in ("faster", "tie", "slower")]
            ratio, worst = min(cells, key=lambda cell: cell[0])
            yield [
                title,
                contender,
                f"{mean:.2f}",
                f"{len(cells)} of {shapes}",
                " / ".join(map(str, counts)),
                f"{ratio:.2f} [{worst.speedup_low:.2f}, {worst.speedup_high:.2f}] at {worst.shape}",
            ]


def _key(row: Row) -> tuple[Any, ...]:
    return (row.batch, row.steps, row.input_size, row.hidden_size, row.dtype, row.pass_name)


def _absent(rows: list[Row]) -> Iterable[list[str]]:
    """Who took no part, where and why: one line per contender and reason."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status in (UNAVAILABLE, LEFT_OUT):
            places.setdefault((row.contender, row.reason), []).append(row)
    for (contender, reason), absent in places.items():
        everywhere = all(row in absent for row in rows if row.contender == contender)
        shapes = dict.fromkeys(row.shape for row in absent)
        yield [contender, "everywhere" if everywhere else f"{len(shapes)} larger shapes", reason]


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 123, 12345."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Rebuild a table's Markdown page from its stored rows."
    )
    parser.add_argument("rows", type=Path, help="results/<machine>/<sweep>.jsonl")
    source: Path = parser.parse_args().rows
    page = source.with_suffix(".md")
    page.write_text(markdown(*records.read(source)), encoding="utf-8", newline="\n")
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()
