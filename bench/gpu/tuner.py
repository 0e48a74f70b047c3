"""How long does a step take? Every config of each key, checked, then timed; the table gets the best.

    python -m bench.gpu.tuner FOLDER --table FILE [--kernels LIST] [--hidden LIST] ...

A key's row in FOLDER/tune.jsonl has each candidate's microseconds a step, or why it has none, and the cost
model's. Keys that have a row are not timed again, but for those that were timed while other cores compiled:
they come last, and the later row counts. A candidate that a process before this one died of is left
out: that row has n = [key, its place among the candidates], or n = [key, "times", 0] if timing was
fatal, 1 the second time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import floor, machine
from bench.gpu import verify
from bench.gpu.journal import Journal, Row, plain
from bench.rows import replace
from elman import cli, tables, timing, tuning
from elman.kernels import common, configs
from elman.kernels.configs import Config, Problem

KERNELS = (*configs.KERNELS, "cudnn")
ARITHMETIC = ("bfloat16", "float32", "tf32", "float16")
HIDDEN, BATCHES = cli.TUNED_H, cli.TUNED_B
#: What "--first" times: the sizes at which one kernel hands over to the next, of one batch.
FIRST_B = (16,)
FIRST_ARITHMETIC = ("bfloat16", "float32")
FIRST_KERNELS = ("resident", "cooperative", "cudnn")
FIRST_H = tuple(H for H in HIDDEN if H <= 2048)


class LostGPU(Exception):
    """The process can use its GPU no more. What it was at is its journal's `in_flight`."""


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tuner", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--until", type=float, default=math.inf, help="time.monotonic() at its end")
    parser.add_argument("--floor", action="store_true", help="measure the floor first, if FOLDER has none")
    parser.add_argument("--first", action="store_true", help="only the keys of the first times")
    parser.add_argument("--busy", action="store_true", help="rows say that the other cores were compiling")
    parser.add_argument("--kernels", type=words, default=KERNELS)
    parser.add_argument("--arithmetic", type=words, default=ARITHMETIC)
    parser.add_argument("--hidden", type=numbers, default=HIDDEN)
    parser.add_argument("--batches", type=numbers, default=BATCHES)
    return parser.parse_args(argv)


def words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


def keys(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Problem]]:
    """(kernel, problem) of each key, most wanted first, as `python -m elman tune` goes through them."""
    kernels, arithmetic, hidden, batches = (
        [part for part in asked if not options.first or part in first]
        for asked, first in (
            (options.kernels, FIRST_KERNELS),
            (options.arithmetic, FIRST_ARITHMETIC),
            (options.hidden, FIRST_H),
            (options.batches, FIRST_B),
        )
    )
    wanted = [verify.ARITHMETIC[name] for name in arithmetic]
    dtypes = list(dict.fromkeys(dtype for dtype, _ in wanted))
    for kernel, problem in cli.jobs([*itertools.product(batches, hidden)], dtypes, [1], device):
        if kernel in kernels and (problem.dtype, problem.precision) in wanted:
            yield kernel, problem


def tune(kernel: str, problem: Problem, device: torch.device, journal: Journal, **more: Any) -> Row:
    """The key's row: "us", "p20", "p80" and "config" of the best, and "candidates". `more` is added to it."""
    on, start = common.chip(device), time.perf_counter()
    at, (whole, tried) = tables.key_of(kernel, problem), tuning.work(kernel, problem, on)
    key = str(at)
    arithmetic = next(a for a, p in verify.ARITHMETIC.items() if p == (problem.dtype, problem.precision))
    fatal = {str(row["n"]): row["row"] for row in journal.rows if "row" in row}
    described = {"kernel": kernel, "arithmetic": arithmetic, "B": at.B, "H": at.H, "backward": at.backward}
    # A time that is taken again is a process's work of its own.
    times = ["times", sum(row.get("key") == key for row in journal.rows)]
    found: list[Row] = []
    for place, config in enumerate(tried):
        candidate: Row = {"config": asdict(config) if config else {}}
        if config is not None:
            expected = configs.estimate(kernel, config, whole, on)
            candidate["model_us"] = round(expected.us, 3) if isinstance(expected, configs.Estimate) else None
            dead = fatal.get(str([key, place]))
            if dead:
                candidate |= {name: dead[name] for name in ("verdict", "reason")}
            else:
                sizes = whole.B, whole.H, whole.D
                case = verify.Case(kernel, arithmetic, *sizes, "full", whole.backward, config, False)
                journal.begin([key, place], patience=2, **described, **candidate)
                candidate |= verify.judged(case, device)
                if candidate["verdict"] == "crashed":
                    raise LostGPU(candidate["reason"])
        found.append(candidate)
    # An imprecise one must not win either.
    right = [config for config, c in zip(tried, found, strict=True) if c.get("verdict") in (None, "right")]
    dead = fatal.get(str([key, *times]))
    if dead:
        right = []
    else:
        journal.begin([key, *times], patience=5, **described, config={})
    results = timing.measure(kernel, whole, right, device) if right else []
    lost = machine.lost(device)
    if lost:  # a row now would say that it did no harm
        raise LostGPU(lost)
    for config, samples in zip(right, results, strict=True):
        candidate = found[tried.index(config)]
        if isinstance(samples, str):
            candidate["reason"] = plain(samples)
            if samples.startswith("DeviceHangError"):
                candidate["verdict"] = "hung"
        else:
            us, p20, p80 = (round(value, 4) for value in tuning.quantiles(samples).values())
            candidate |= {"us": us, "p20": p20, "p80": p80}
    timed = [c for c in found if "us" in c]
    best = min(timed, key=lambda c: c["us"]) if timed else {}
    return {
        "n": [key, *times], "key": key, **described,
        **{name: best[name] for name in ("us", "p20", "p80", "config") if best},
        **({"reason": dead["reason"]} if dead else {}),
        "candidates": found, "seconds": round(time.perf_counter() - start, 2), **more,
    }  # fmt: skip


def entry(kernel: str, problem: Problem, row: Row) -> tables.Entry:
    """The table's entry of a key's row."""
    key, first = tables.key_of(kernel, problem), row["candidates"][0]
    config = _config(key, row["config"])
    named = {str(_config(key, c["config"])): c for c in row["candidates"]}
    failed = {name: c["reason"] for name, c in named.items() if "us" not in c and "reason" in c}
    times = {
        name: {"median": c["us"], "p20": c["p20"], "p80": c["p80"]} for name, c in named.items() if "us" in c
    }
    return tables.Entry(
        key, config, row["us"], row["p20"], row["p80"], first.get("us"), len(row["candidates"]), failed,
        times=times if config else {},
    )  # fmt: skip


def _config(key: tables.Key, values: dict[str, Any]) -> Config | None:
    config = tables.config_of(key, values)
    assert not isinstance(config, str), config
    return config


def main(argv: list[str] | None = None) -> int:
    options = options_of(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    journal = Journal(options.folder / "tune.jsonl")
    try:
        if options.floor and not has_floor(options.folder / "floor.json"):
            write_floor(options.folder / "floor.json", device, options.arithmetic)
        for kernel, problem in todo(options, device, journal):
            if time.monotonic() >= options.until:
                break
            row = tune(kernel, problem, device, journal, **({"busy": True} if options.busy else {}))
            if "us" in row:
                table = tables.read(options.table, common.chip(device).name)
                table = table.with_entry(entry(kernel, problem, row), tuning.provenance())
                tables.write(options.table, table)
            journal.add(**row)
    except LostGPU as lost:
        print(lost)
        return machine.LOST_GPU
    return 0


def todo(options: argparse.Namespace, device: torch.device, journal: Journal) -> list[tuple[str, Problem]]:
    """The keys without a row; then those whose row says that other cores were compiling."""
    last = {row["key"]: row for row in journal.rows if "key" in row}
    wanted = [(str(tables.key_of(*key)), key) for key in keys(options, device)]
    new = [key for name, key in wanted if name not in last]
    again = [key for name, key in wanted if name in last and last[name].get("busy")]
    return new if options.busy else new + again


def has_floor(path: Path) -> bool:
    return path.exists() and "failed" not in json.loads(path.read_text(encoding="utf-8"))


def write_floor(path: Path, device: torch.device, dtypes: tuple[str, ...]) -> None:
    """What the GPU does at best: bandwidth, products, the shortest step; or why that is not known."""
    try:
        found: dict[str, Any] = floor.measure(device, dtypes)
    except Exception as caught:  # times are worth having without
        if machine.lost(device):
            raise LostGPU(plain(caught)) from caught
        found = {"failed": plain(caught)}
    replace(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
