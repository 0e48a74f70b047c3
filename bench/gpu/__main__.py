"""One command for a new GPU: are the kernels right on it, how fast are they, which configs are the best.

    python -m bench.gpu [--minutes 9] [--output DIR] [--stages LIST]
    python -m bench.gpu --unpack DIR
    python -m bench.gpu --device cpu

It runs from the root of the project as it lies: no installation, no package index, no git. Every row is on
the disk, below results/<gpu>/, as soon as it is made: a kill at any moment loses at most the one in flight,
and the same command goes on where it stopped. DIR also gets all that is new, every few seconds, in few files
to be carried home; --unpack puts them in their places there.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from bench import machine
from bench.gpu import carry, page, stages, tuner
from bench.gpu.run import ROOT, STAGES, Run, every
from bench.session import SCRATCH
from elman import tables
from elman.kernels import common

#: Stages that make sense without a GPU, and the minutes that they take then.
WITHOUT_GPU, MINUTES_WITHOUT = ("machine", "compile", "verify", "sweep", "report"), 3.0
#: Seconds between two looks at what is new, for --output.
PACK_SECONDS = 5.0
#: What is not right, and what `make` is told with status 1. An imprecise launch stands on the page alone.
BAD = ("wrong", "crashed", "hung", "failed", "other bits")


def main(argv: Iterable[str] | None = None) -> int:
    options = options_of(argv)
    if options.unpack:
        print(f"{carry.unpack(options.unpack, ROOT)} files are in their places: git status shows them")
        return 0
    if options.page:
        print(page.write(options.page / "gpu"))
        return 0
    run = _run(options)
    if run.device.type == "cpu":
        run.say(
            "no GPU is measured: Triton's interpreter shows whether the kernels are right, the compiler "
            f"whether they compile for sm_{run.capability}. Nothing of it is published, it goes to "
            f"{_shown(run.folder)}"
        )

    def pack() -> None:
        if run.output:
            carry.pack(run.output, ROOT, run.folder.parent, run.table, run.since)

    try:
        with every(PACK_SECONDS, pack) if run.output else contextlib.nullcontext():
            well = stages.go(run)
    except KeyboardInterrupt:
        print("Stopped. What is done is kept, and the same command goes on.")
        return 130
    bad = page.launches(run.folder, BAD)
    if run.device.type == "cuda":
        index = run.folder.parents[1] / "README.md"
        files = f"{_shown(run.folder.parent)}/, {_shown(index)} and {_shown(run.table)}"
        print(f"Commit {files} to publish this GPU. The same command goes on with what is not done.")
    return 1 if bad or not well else 0


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _run(options: argparse.Namespace) -> Run:
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        properties = torch.cuda.get_device_properties(device)
        capability, gib = 10 * properties.major + properties.minor, properties.total_memory / 2**30
    else:
        capability, gib = 90, 0.0
    results = options.results if device.type == "cuda" else SCRATCH
    chip = common.chip(device)
    names = ("kernels", "hidden", "batches", "arithmetic")
    asked = {name: getattr(options, name) for name in names if getattr(options, name)}
    return Run(
        device,
        chip,
        results.resolve() / machine.slug(machine.machine(device)) / "gpu",
        tables.shipped_path(chip.name),
        time.monotonic() + 60 * options.minutes,
        options.stages,
        tuple(word for name, value in asked.items() for word in (f"--{name}", value)),
        capability,
        gib,
        options.workers,
        output=options.output.resolve() if options.output else None,
    )


def options_of(argv: Iterable[str] | None) -> argparse.Namespace:
    head, *_, tail = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=head, epilog=tail)

    def add(option: str, explained: str, **more) -> None:
        parser.add_argument(option, help=explained, **more)

    add("--minutes", "for all of it; default: 9, without a GPU 3", type=float)
    add("--output", "also put what is new into few files there", type=Path, metavar="DIR")
    add("--stages", f"of {','.join(STAGES)}; default: all", type=tuner.words, default=STAGES, metavar="LIST")
    add(
        "--device",
        "default: cuda; cpu runs what needs no GPU, and publishes nothing",
        choices=("cuda", "cpu"),
    )
    add("--unpack", "put what --output DIR has in its places, and do nothing else", type=Path, metavar="DIR")
    add("--page", "make gpu.md again from its rows, and do nothing else", type=Path, metavar="results/GPU")
    keys = parser.add_argument_group("which keys are timed; lists are separated by commas")
    for name, known in (("kernels", tuner.KERNELS), ("arithmetic", tuner.ARITHMETIC)):
        keys.add_argument(f"--{name}", metavar="LIST", help=f"of {','.join(known)}; default: all")
    keys.add_argument("--hidden", metavar="LIST", help=f"default: {','.join(map(str, tuner.HIDDEN))}")
    keys.add_argument("--batches", metavar="LIST", help=f"default: {','.join(map(str, tuner.BATCHES))}")
    add("--workers", "processes that compile; default: all cores but two", type=int, default=0)
    add("--results", "default: results/", type=Path, default=ROOT / "results", metavar="DIR")
    options = parser.parse_args(list(argv) if argv is not None else None)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages has {unknown[0]!r}; expected some of {', '.join(STAGES)}")
    for name in ("kernels", "arithmetic", "hidden", "batches"):
        _check(parser, name, getattr(options, name))
    if options.device is None:
        options.device = "cuda"
        if not torch.cuda.is_available() and not (options.unpack or options.page):
            parser.error(
                "this machine has no CUDA device, and this command measures one; --device cpu runs the "
                "stages that need none, in three minutes"
            )
    if options.output and not options.results.resolve().is_relative_to(ROOT):
        parser.error(
            f"--output packs files to be unpacked at the same places of the project, and --results is "
            f"{options.results}, which is none of them; leave one of the two out"
        )
    if options.device == "cpu":
        options.stages = tuple(stage for stage in options.stages if stage in WITHOUT_GPU)
    if options.minutes is None:
        options.minutes = 9.0 if options.device == "cuda" else MINUTES_WITHOUT
    if not options.stages:
        parser.error(f"none of these --stages needs no GPU; --device cpu has {', '.join(WITHOUT_GPU)}")
    # In their order, whatever was typed, and each after the first: it sees to it that rows are of this code.
    options.stages = tuple(stage for stage in STAGES if stage in (STAGES[0], *options.stages))
    return options


def _check(parser: argparse.ArgumentParser, name: str, text: str | None) -> None:
    """Now, and not in a process an hour later."""
    known = {"kernels": tuner.KERNELS, "arithmetic": tuner.ARITHMETIC}.get(name)
    for word in tuner.words(text or ""):
        if word not in known if known else not word.isdigit() or word == "0":
            expected = f"some of {', '.join(known)}" if known else "positive integers"
            parser.error(f"--{name} has {word!r}; expected {expected}, separated by commas")


if __name__ == "__main__":
    sys.exit(main())
