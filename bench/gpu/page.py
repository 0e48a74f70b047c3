"""gpu.md: what a person reads first of a GPU, in two minutes, made from nothing but the rows.

write(folder)   results/<gpu>/gpu.md of results/<gpu>/gpu, and the index
text(folder)    the page
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import floor as floors
from bench import report, rows, tables
from bench.gpu import verify
from bench.gpu.journal import Row, read
from bench.page import pipes, ratio
from bench.workloads import PASSES, Workload
from elman.kernels import configs

KERNELS = (*configs.KERNELS, "cudnn")
#: Rows of what is wrong, what lost and what was predicted worst.
MOST = 10


def write(folder: Path) -> str:
    found = text(folder)
    rows.replace(folder.parent / "gpu.md", found)
    report.index(folder.parents[1])
    return found


def text(folder: Path) -> str:
    record = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    on, software = record["machine"], ", ".join(f"{k} {v}" for k, v in record["software"].items())
    driver = f", driver {on['driver']}" if "driver" in on else ""
    most = on.get("clocks_mhz", {}).get("sm_max")
    clock = f", up to {most} MHz" if most else ""
    throttle = record.get("state", {}).get("throttle")
    slowed = f", throttled at the start ({', '.join(throttle)})" if throttle else ""
    verified, timed, sweeps, floor = _verified(folder), _timed(folder), _sweeps(folder), _floor(folder)
    tuned = [row for row in _keys(timed) if "us" in row]
    lines = [
        f"# {on.get('gpu', on['cpu'])}: are the kernels right, and how fast are they",
        "",
        f"{record['date']}, commit {record['commit']}{'-dirty' if record.get('dirty') else ''}; {software}"
        f"{driver}{clock}{slowed}. Made by `python -m bench.gpu` from the rows beside it.",
        "",
        *(f"- {line}" for line in _summary(record, verified, tuned, sweeps, floor)),
        *(f"- {line}" for line in _not_reached(folder)),
        "",
        "## Right or wrong",
        "",
        *_matrix(verified),
        *_not_right(verified, _fatal(timed)),
    ]
    if tuned:
        lines += ["", "## Microseconds a step", "", *_times(tuned, floor)]
    lost = list(_lost(sweeps, tuned))
    if lost:
        lines += ["", "## What lost to nn.RNN", "", *lost]
    predicted = list(_predictions(tuned))
    if predicted:
        lines += ["", "## Prediction and measurement", "", *predicted]
    return "\n".join(lines) + "\n"


def _verified(folder: Path) -> dict[tuple[str, str], tuple[list[Row], int]]:
    """By kernel and arithmetic: the rows, and how many there should be."""
    found = {}
    for path in sorted(folder.glob("verify.*.jsonl")):
        lines = read(path)
        done = [line["row"] for line in lines if "row" in line]
        total = max([line["total"] for line in lines if "total" in line], default=len(done))
        if total:
            _, kernel, arithmetic, _ = path.name.split(".")
            found[kernel, arithmetic] = (done, total)
    return found


def _timed(folder: Path) -> list[Row]:
    """The lines of first and tune: keys, and what their processes died of."""
    return read(folder / "tune.jsonl")


def _keys(timed: list[Row]) -> list[Row]:
    """The last row of each key that was timed, or tried."""
    return list({row["key"]: row for row in timed if "key" in row}.values())


def _fatal(timed: list[Row]) -> list[Row]:
    """The configs that were not right when they were to be timed, in verify's form.

    A key has no row of its own if its kernel was left alone after its first crash or hang.
    """
    more, keys = {"D": 1, "mode": "full", "bar": math.nan}, _keys(timed)
    done = {row["key"] for row in keys}
    found = [{**more, **line["row"]} for line in timed if "row" in line and line["n"][0] not in done]
    for row in keys:
        same = {name: row[name] for name in ("kernel", "arithmetic", "backward", "B", "H")}
        found += [
            {**same, **more, **candidate}
            for candidate in row["candidates"]
            if candidate.get("verdict") not in (None, "right")
        ]
    return found


def launches(folder: Path, wanted: tuple[str, ...]) -> list[Row]:
    """The launches of verify, first and tune that were judged so."""
    rows_of = [row for done, _ in _verified(folder).values() for row in done]
    return [row for row in (*rows_of, *_fatal(_timed(folder))) if row["verdict"] in wanted]


def _summary(
    record: dict[str, Any],
    verified: dict,
    tuned: list[Row],
    sweeps: dict[str, tables.Table],
    floor: dict[str, Any],
) -> Iterator[str]:
    """The page in a few sentences."""
    done = [row for some, _ in verified.values() for row in some]
    if done:
        right = sum(row["verdict"] == "right" for row in done)
        others = _counted(row["verdict"] for row in done if row["verdict"] != "right")
        yield f"**{right} of {len(done)} launches are right**{f'; {others}' if others else ''}."
    for name, table in sweeps.items():
        means = [mean for mean in table.means() if mean.contender == table.leader()]
        for mean in means:
            yield (
                f"**{name}**, {mean.dtype}, {PASSES[mean.pass_name]}: {mean.ratio:.2f} times nn.RNN's speed "
                f"(geometric mean of {len(mean.rows)} shapes of {mean.shapes}; faster / tie / slower: "
                f"{mean.counts}). [Table]({name}.md){_when(table.run, record)}"
            )
    if tuned:
        parts = [row["us"] / expected for row in tuned if (expected := _expected(row))]
        yield f"**{len(tuned)} keys are timed**{_predicted(parts)}."
    if "failed" in floor:
        yield f"There is no floor: {floor['failed']}."


def _predicted(parts: list[float]) -> str:
    if not parts:  # cuDNN's keys alone
        return ""
    return f"; a kernel's step takes {statistics.median(parts):.2f} times what the cost model says (median)"


def _when(run: dict[str, Any], record: dict[str, Any]) -> str:
    """Whose table it is, if it is not of this run's code."""
    if run.get("commit") in (None, record["commit"]):
        return ""
    return f", of commit {run['commit']}, {run['date']}"


def _not_reached(folder: Path) -> Iterator[str]:
    """What the time did not suffice for, or what went wrong, by the last words of each stage."""
    last = {row["stage"]: row for row in read(folder / "stages.jsonl")}
    for stage, row in last.items():
        if row["left"]:
            yield f"Not done, {stage}: {row['left']}."


def _counted(words: Iterator[str]) -> str:
    found = list(words)
    return ", ".join(f"{found.count(word)} {word}" for word in sorted(set(found)))


def _matrix(verified: dict) -> Iterator[str]:
    yield (
        "Each launch against the float64 reference. Right: an error of at most 1.5 times nn.RNN's own, or of "
        "the rounding that no order of summation avoids; in brackets the largest error as a part of that "
        "bar. Imprecise: up to 10 times the bar. Wrong: above it, or NaN. Other bits: right, but not twice "
        "the same. Failed: it raised. Crashed, hung: it took its process with it."
    )
    yield ""
    kernels = list(dict.fromkeys(kernel for kernel, _ in verified))
    present = [name for name in verify.ARITHMETIC if any(name == a for _, a in verified)]

    def cell(kernel: str, arithmetic: str) -> str:
        done, total = verified.get((kernel, arithmetic), ([], 0))
        if not total:
            return ""
        right = sum(row["verdict"] == "right" for row in done)
        words = [f"{right} right" + (f" of {total}" if total > len(done) else "")]
        words += [_counted(row["verdict"] for row in done if row["verdict"] != "right")]
        errors = [row["error"] / row["bar"] for row in done if row.get("error") is not None]
        return ", ".join(filter(None, words)) + (f" ({max(errors):.2f})" if errors else "")

    yield from pipes(
        ("kernel", *present),
        (False, *(False for _ in present)),
        [[kernel, *(cell(kernel, arithmetic) for arithmetic in present)] for kernel in kernels],
    ).splitlines()


def _not_right(verified: dict, fatal: list[Row]) -> Iterator[str]:
    bad = [row for done, _ in verified.values() for row in done if row["verdict"] != "right"] + fatal
    if not bad:
        return
    yield ""
    for row in bad[:MOST]:
        sizes = f"B={row['B']} H={row['H']} D={row['D']} {row['mode']}"
        where = f"{row['kernel']} {row['arithmetic']} {_pass(row)} {sizes}"
        yield f"- {row['verdict']}: {where}, {row.get('reason') or _error(row)}; {_named(row['config'])}"
    if len(bad) > MOST:
        yield f"- and {len(bad) - MOST} more, in the rows of gpu/"


def _error(row: Row) -> str:
    if row.get("error") is None:
        return f"NaN or infinite ({row.get('nan', 1):.0%} NaN)"
    return f"error {row['error']:.2g}, bar {row['bar']:.2g}"


def _pass(row: Row) -> str:
    return "backward" if row["backward"] else "forward"


def _named(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items())


def _times(tuned: list[Row], floor: dict[str, Any]) -> Iterator[str]:
    yield (
        "B = 16, forward / backward: the quickest config of each kernel, and cuDNN's operator; T drops out. "
        "Where cuDNN launches kernels for each step, the host bounds it. floor: the shortest step of this "
        "GPU that has room for W_hh. [The rows](gpu/tune.jsonl) have every key and candidate."
    )
    busy = any(row.get("busy") for row in tuned)
    if busy:
        yield "cuDNN was timed while the machine's other cores compiled kernels."
    yield ""
    step = floor.get("step")
    here = [row for row in tuned if row["B"] == 16]
    kernels = [name for name in KERNELS if any(row["kernel"] == name for row in here)]
    shapes = sorted({(list(verify.ARITHMETIC).index(row["arithmetic"]), row["H"]) for row in here})
    body = []
    for index, H in shapes:
        arithmetic = list(verify.ARITHMETIC)[index]
        found = {
            (row["kernel"], row["backward"]): row["us"]
            for row in here
            if (row["arithmetic"], row["H"]) == (arithmetic, H)
        }
        cells = [_both(found.get((kernel, False)), found.get((kernel, True))) for kernel in kernels]
        over = [_over(found, backward) for backward in (False, True)]
        least = f"{1e6 * floors.shortest_step(Workload(16, 1, H, H, arithmetic), step):.2f}" if step else ""
        body.append([arithmetic, str(H), *cells, _both(*over), least])
    headings = ("", "H", *kernels, "cudnn over ours", "floor")
    yield from pipes(headings, (False, *(True for _ in headings[1:])), body).splitlines()


def _both(forward: float | None, backward: float | None) -> str:
    if forward is None and backward is None:
        return ""
    return " / ".join("-" if us is None else f"{us:.2f}" for us in (forward, backward))


def _over(found: dict[tuple[str, bool], float], backward: bool) -> float | None:
    """cuDNN's time over the quickest kernel's."""
    ours = [us for (kernel, b), us in found.items() if b == backward and kernel != "cudnn"]
    theirs = found.get(("cudnn", backward))
    return theirs / min(ours) if theirs and ours else None


def _floor(folder: Path) -> dict[str, Any]:
    path = folder / "floor.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _sweeps(folder: Path) -> dict[str, tables.Table]:
    path = folder.parent / "rows.jsonl"
    return {name: tables.Table(*found) for name, found in rows.read(path).items()} if path.exists() else {}


def _lost(sweeps: dict[str, tables.Table], tuned: list[Row]) -> Iterator[str]:
    """The sweeps' rows of the layer that are slower than nn.RNN, the slowest first, then the keys."""
    slower = []
    for name, table in sweeps.items():
        for swept in table.rows:
            if swept.contender == table.leader() and swept.speedup and tables.verdict(swept) == "slower":
                slower.append((swept.speedup, name, swept))
    slower.sort(key=lambda found: found[0])
    for speedup, name, swept in slower[:MOST]:
        interval = ratio(speedup, swept.speedup_low or 0, swept.speedup_high or 0)
        what = f"{swept.shape} {swept.workload.dtype} {PASSES[swept.pass_name]}"
        yield f"- {name}: {what}: {interval} of nn.RNN's speed; {swept.route}"
    if len(slower) > MOST:
        yield f"- and {len(slower) - MOST} more rows"
    keys: dict[tuple, dict[str, float]] = {}
    for row in tuned:
        place = row["arithmetic"], row["B"], row["H"], row["backward"]
        keys.setdefault(place, {})[row["kernel"]] = row["us"]
    behind = []
    for place, found in keys.items():
        ours = [us for kernel, us in found.items() if kernel != "cudnn"]
        if ours and found.get("cudnn", math.inf) < min(ours):
            behind.append((found["cudnn"] / min(ours), place, found["cudnn"], min(ours)))
    for part, (arithmetic, B, H, backward), theirs, us in sorted(behind)[:MOST]:
        which = "backward" if backward else "forward"
        yield f"- a step: {arithmetic} B={B} H={H} {which}: {us:.2f} us, cuDNN {theirs:.2f}, {part:.2f} of it"
    if len(behind) > MOST:
        yield f"- and {len(behind) - MOST} more keys"


def _expected(row: Row) -> float | None:
    """What the cost model says of a key's quickest config."""
    return next((c.get("model_us") for c in row["candidates"] if c["config"] == row["config"]), None)


def _predictions(tuned: list[Row]) -> Iterator[str]:
    """By kernel and arithmetic: measured over predicted, of the quickest configs."""
    groups: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in tuned:
        model = _expected(row)
        if model:
            groups.setdefault((row["kernel"], row["arithmetic"]), []).append((row["us"] / model, row))
    if not groups:
        return
    yield "Measured over what the cost model says, of the quickest config of each key."
    yield ""
    body = []
    for (kernel, arithmetic), some in groups.items():
        some.sort(key=lambda pair: pair[0])
        first, last = some[0], some[-1]
        middle = statistics.median(part for part, _ in some)
        body.append(
            [kernel, arithmetic, str(len(some)), f"{middle:.2f}"]
            + [f"{part:.2f} (B={row['B']} H={row['H']} {_pass(row)})" for part, row in (first, last)]
        )
    headings = ("kernel", "arithmetic", "keys", "median", "least", "most")
    yield from pipes(headings, (False, False, True, True, False, False), body).splitlines()
