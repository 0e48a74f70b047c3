"""Train a character language model, and let it write; or compare backends at it.

    python -m bench.charlm [--text FILE] [--minutes 5] [--backend NAME] [--resume]
    python -m bench.charlm --compare
    torchrun --standalone --nproc-per-node 2 -m bench.charlm

A run leaves a checkpoint, a sample of text and a picture of its losses in --folder. Ctrl-C ends it there as
its time would. --compare trains the same model with nn.RNN and with every backend that can run, by turns,
each for so many minutes, and publishes results/<machine>/charlm.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import io
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import elman
from bench import charlm_compare, curves
from bench import corpus as texts
from bench.corpus import Corpus
from bench.language import Diverged, Settings, Training
from bench.page import NEEDS_MATPLOTLIB
from bench.rows import BASELINE
from bench.training import (
    Interrupted,
    Limits,
    Progress,
    Run,
    baselines_of,
    clock,
    curve_of,
    introduction,
    task_of,
)

MARKS = 20  # times in a run that the held-out text is read and a checkpoint written
MINUTES = 5.0  # of training, where nothing else is said
PROMPT = 40  # characters of the held-out text, where there is no --prompt
KINDS = {"int": int, "float": float, "float | None": float, "str": str}  # of Settings' fields


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.charlm",
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="a UTF-8 file; pydoc's help texts if left out")
    parser.add_argument(
        "--backend",
        help=f"of the layer: auto, native, eager, cudnn, triton, triton:KERNEL, or {BASELINE} itself",
    )
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--minutes", type=float, help="of training in all, 5 unless --steps is given")
    parser.add_argument("--steps", type=int, help="of training in all")
    parser.add_argument("--folder", type=Path, default=Path("runs/charlm"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with the checkpoint in the folder")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that has one")
    parser.add_argument(
        "--compare", action="store_true", help="nn.RNN and every backend, or that of --backend"
    )
    parser.add_argument(
        "--results", type=Path, default=charlm_compare.ROOT / "results", help="where --compare publishes"
    )
    parser.add_argument(
        "--prompt", help=f"what the sample begins with; {PROMPT} characters held out if left out"
    )
    parser.add_argument(
        "--length", type=int, default=1000, help="characters of the sample (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sample (default: %(default)s)")
    group = parser.add_argument_group("the model and its training")
    for one in dataclasses.fields(Settings):
        # Left out of the namespace where not given: a checkpoint has its own.
        group.add_argument(
            f"--{one.name}",
            type=KINDS[str(one.type)],
            default=argparse.SUPPRESS,
            help=f"{one.metadata['help']} (default: {one.default})",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 if a training diverged, 2 for wrong arguments, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may have characters that a terminal has not
    known = parser()
    options = known.parse_args(arguments)
    try:
        check(options)
        device = device_of(options.device)
    except ValueError as error:
        known.error(str(error))
    # Signals first: torchrun sends its own to a process that is already done, too.
    with interrupts() as interrupted:
        try:
            with process_group(device) as group:
                return answer(known, options, *group, interrupted)
        except KeyboardInterrupt:
            print(f"\n{known.prog}: ended at once", file=sys.stderr, flush=True)
            if "RANK" in os.environ:
                os._exit(130)  # the group is still there, and Python's own end could be an abort
            return 130


def answer(
    known: argparse.ArgumentParser,
    options: argparse.Namespace,
    rank: int,
    world: int,
    device: torch.device,
    interrupted: Interrupted,
) -> int:
    """The exit status; a function, as no training may be left where the group is destroyed."""
    try:
        work = prepare(options, device, rank, world)
    except (ValueError, OSError, elman.BackendUnavailableError) as error:
        known.error(str(error))
    try:
        return work(interrupted)
    except Diverged as error:
        if rank == 0:
            print(f"\n{known.prog}: {error}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> None:
    """ValueError for options that no run can have."""
    for name in ("minutes", "steps", "length"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; expected a number above 0")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature is {options.temperature}; expected a number from 0 up")
    if options.prompt == "":
        raise ValueError("--prompt is empty; expected one character at least, or no --prompt")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite came both; expected one: go on, or begin anew")
    if options.compare and (options.resume or options.overwrite or "RANK" in os.environ):
        raise ValueError(
            "--compare is for one process, and leaves no checkpoint; expected no torchrun, no --resume and "
            "no --overwrite"
        )
    if options.compare and options.backend == BASELINE:
        raise ValueError(f"--backend is {BASELINE}, which is what --compare compares with; expected another")
    if not -(2**63) <= getattr(options, "seed", 0) < 2**63:
        raise ValueError(f"--seed is {options.seed}; expected a number of 64 bits")
    if options.folder.exists() and not options.folder.is_dir():
        raise ValueError(f"--folder is {options.folder}, a file; expected a folder, or a name for one")


def device_of(name: str | None) -> torch.device:
    """ValueError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {device}, which this machine has not; expected cpu")
    count, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", device.index or 0))
    if device.type == "cuda" and number >= count:
        raise ValueError(
            f"this machine has {count} GPUs, and number {number} was asked for; expected a lower number, "
            "fewer processes, or --device cpu"
        )
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """This process's number, that of all, and its device: as torchrun has started it, or alone."""
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Imported later, as by DistributedDataParallel, its functions have the group as a default argument. (An
    # import statement would make `torch` a local name.)
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dist.get_rank(), dist.get_world_size(), device
    dist.barrier()  # none ends while the first one still writes its sample
    # The last reference goes here, so the training has to be gone. Kept longer, gloo's threads run into
    # Python's end, and PyTorch aborts (pytorch/pytorch#190489); dropped later by DistributedDataParallel,
    # Python waits for them while they wait for its lock. So not after an exception, which holds the training:
    # better now and then an abort, beside the traceback, than never an end.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def interrupts() -> Iterator[Interrupted]:
    """Ctrl-C, and being told to end, become a question; a second Ctrl-C is what it always was.

    Under torchrun the third: it sends its processes once more what the terminal has sent them too.
    """
    asked: list[int] = []
    patience = 2 if "RANK" in os.environ else 1

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        if number == signal.SIGINT and asked.count(number) > patience:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: len(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- One run ------------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    names = [one.name for one in dataclasses.fields(Settings)]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def limits_of(options: argparse.Namespace) -> Limits:
    minutes = options.minutes or (math.inf if options.steps else MINUTES)
    return Limits(60 * minutes, options.steps or math.inf)


def prepare(
    options: argparse.Namespace, device: torch.device, rank: int, world: int
) -> Callable[[Interrupted], int]:
    """What has to be run, made and tried; raises before anything is written if it can't be."""
    corpus = texts.read(options.text)
    prompt, limits, given = prompt_of(options, corpus), limits_of(options), settings_of(options)
    if options.compare:
        return charlm_compare.prepare(
            corpus,
            Settings(**given),
            device,
            limits,
            backend=options.backend,
            prompt=prompt,
            length=options.length,
            results=options.results,
        )
    path = options.folder / "checkpoint.pt"
    saved = None
    if options.resume:
        saved = load(path, corpus, given)
        settings = Settings(**saved["settings"])
    else:
        if path.exists() and not options.overwrite:
            raise ValueError(
                f"{path} is the checkpoint of an earlier run; expected --resume to go on with it, "
                "--overwrite to begin anew, or another --folder"
            )
        settings = Settings(**given)
    backend = options.backend or (saved["backend"] if saved else "auto")
    run = Run(Training(corpus, settings, backend, device, rank, world))
    run.training.warm()
    if saved:
        try:
            run.training.load_state_dict(saved["training"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not go with the settings it names: {error}") from error
        run.seconds, run.losses, run.held_out = saved["seconds"], saved["losses"], saved["held_out"]
    options.folder.mkdir(parents=True, exist_ok=True)

    def work(interrupted: Interrupted) -> int:
        baselines = {}
        if rank == 0:
            say(introduction(run))
            baselines = baselines_of(corpus)
            say(task_of(corpus, baselines))
        stopped = train(run, limits, path, interrupted, first=rank == 0)
        before = interrupted()
        if rank == 0:
            # Who has stopped the training gets a sample too; who stops the sample, what there is of it.
            finish(run, baselines, prompt, options, enough=lambda: not stopped and interrupted() > before)
            if stopped:
                say(f"Stopped at step {run.training.steps:,}. --resume goes on from there.")
        return 130 if stopped or interrupted() else 0

    return work


def train(run: Run, limits: Limits, path: Path, interrupted: Interrupted, first: bool) -> bool:
    """Trains until the limits are reached; whether it was stopped before. Leaves a checkpoint at `path`.

    The clock is the first process's, a signal anyone's.
    """
    training, progress = run.training, Progress(limits)
    mark = int(limits.share(run) * MARKS) + 1
    stopped, (over,) = False, training.any(first and limits.share(run) >= 1)
    while not over and not stopped:
        run.advance(limits.count(run))
        share = limits.share(run) if first else 0.0
        stopped, over, due = training.any(bool(interrupted()), share >= 1, share * MARKS >= mark)
        if first:
            progress.show(run)
        if due or stopped:
            mark = int(share * MARKS) + 1
            run.check()
            reads = first and (over or not stopped)
            if training.any(reads and not run.evaluate(None if over else interrupted))[0]:
                raise run.nothing
            save(path, run, first)
    if first:
        progress.end()
    return stopped and not over


def save(path: Path, run: Run, first: bool) -> None:
    """The checkpoint, in one move; all processes have to call it, the first one writes."""
    training = run.training
    state = training.state_dict()
    if not first:
        return
    fresh = path.with_suffix(".new")
    torch.save(
        {
            "settings": dataclasses.asdict(training.settings),
            "backend": training.backend,
            "text": {"name": training.corpus.name, "digest": training.corpus.digest},
            "seconds": run.seconds,
            "losses": run.losses,
            "held_out": run.held_out,
            "training": state,
        },
        fresh,
    )
    fresh.replace(path)


def load(path: Path, corpus: Corpus, given: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint; ValueError if it is none, of another text, or of other settings than those given."""
    if not path.exists():
        raise ValueError(f"there is no {path} to go on with; expected a checkpoint there, or no --resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        name, digest = saved["text"]["name"], saved["text"]["digest"]
        settings = dataclasses.asdict(Settings(**saved["settings"]))
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(
            f"{path} is no checkpoint of this program ({type(error).__name__}: {error})"
        ) from error
    if digest != corpus.digest:
        raise ValueError(
            f"{path} was trained on {name}, of another content than {corpus.name}; expected that text"
        )
    other = {name: value for name, value in given.items() if settings[name] != value}
    if other:
        said = ", ".join(f"--{name} {settings[name]}, not {value}" for name, value in other.items())
        raise ValueError(f"{path} was trained with {said}; expected its settings, or none beside --resume")
    return saved


def prompt_of(options: argparse.Namespace, corpus: Corpus) -> Tensor:
    """int64 (N,); ValueError for characters that the text has not."""
    if options.prompt is None:
        return corpus.held_out[:PROMPT]
    try:
        return texts.numbers(options.prompt, corpus.alphabet)
    except ValueError as error:
        raise ValueError(f"--prompt can't be read: {error}") from None


def finish(
    run: Run,
    baselines: dict[str, float],
    prompt: Tensor,
    options: argparse.Namespace,
    enough: Callable[[], bool],
) -> None:
    """The sample and the picture, and in a few lines what came out."""
    training, corpus, folder = run.training, run.training.corpus, options.folder
    title = f"{corpus.name}, {training.settings.layers} x {training.settings.hidden}"
    picture = curves.losses(folder / "loss.png", title, [curve_of(run)], baselines)
    passes = training.characters / len(corpus.training)
    say(
        f"\n{training.steps:,} steps, {training.characters:,} characters, {passes:.1f} times the text, in "
        f"{clock(run.seconds)} minutes: {training.characters / run.seconds:,.0f} characters a second."
    )
    if run.held_out:
        _, steps, reached = run.held_out[-1]
        beaten = [name for name, value in baselines.items() if reached < value]
        missed = [name for name in baselines if name not in beaten]
        below = f"; below the {' and the '.join(beaten)}" if beaten else ""
        above = f"; not below the {' nor the '.join(missed)}: train longer, or on more text" if missed else ""
        when = "" if steps == training.steps else f" at step {steps:,}"
        say(f"Held out{when}: {reached:.3f} bits a character{below}{above}.")
    begin = corpus.text(prompt.tolist())
    say(f"\nIt writes, after {begin!r}:\n\n{begin}", end="")
    with (folder / "sample.txt").open("w", encoding="utf-8", newline="") as sample:
        sample.write(begin)

        def show(character: int) -> bool:
            sample.write(corpus.alphabet[character])
            say(corpus.alphabet[character], end="")
            return enough()

        start = time.perf_counter()
        drawn = training.sample(
            prompt, options.length, show, temperature=options.temperature, seed=training.settings.seed
        )
        seconds = time.perf_counter() - start
    say(f"\n\n{len(drawn) / seconds:,.0f} characters a second, one call each.")
    if picture is None:
        say(NEEDS_MATPLOTLIB)
    names = ["checkpoint.pt", "sample.txt", *([picture.name] if picture else [])]
    say(f"Wrote {', '.join(str(folder / name) for name in names)}.")


def say(text: str, end: str = "\n") -> None:
    """Prints at once. Where nobody reads any more, as behind `| head`, files are still to be written."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
