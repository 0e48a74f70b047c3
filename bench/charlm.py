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
import io
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import elman
from bench import charlm_page, curves, language, machine, measure, ngrams, report
from bench.language import Corpus, Settings, Training
from bench.page import NEEDS_MATPLOTLIB
from bench.rows import BASELINE

ROOT = Path(__file__).parents[1]
LOOK = 10  # steps between two looks at clock, signals and losses
MARKS = 20  # times in a run that the held-out text is read and a checkpoint written
MINUTES = 5.0  # of training, where nothing else is said
ROUNDS = 30  # turns of each backend in a comparison
GENERATED = 500  # characters a turn
GENERATIONS = 12  # turns
ORDER = 5  # of the n-grams
COUNTED = 4_000_000  # characters of which n-grams are counted, in half a minute
PROMPT = 40  # characters of the held-out text, where there is no --prompt

Interrupted = Callable[[], bool]


LOWER = "take a lower --rate or --clip"


class Diverged(Exception):
    """A training has come to a loss that is no number."""


@dataclass
class Run:
    """A training and what came of it so far."""

    training: Training
    seconds: float = 0.0  # of training alone: without reading the held-out text, and without checkpoints
    losses: list[float] = field(default_factory=list)  # of each step, nats a character
    held_out: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, steps, bits a character

    def advance(self, count: int) -> None:
        """`count` steps. Diverged for a loss that is no number."""
        start = time.perf_counter()
        losses = torch.stack([self.training.step() for _ in range(count)]).double()
        found = (self.training.total(losses) / self.training.world).tolist()
        self.seconds += time.perf_counter() - start
        for number, loss in enumerate(found, len(self.losses)):
            if not math.isfinite(loss):
                raise Diverged(f"the loss of step {number} is {loss}; expected a number: {LOWER}")
        self.losses += found

    def check(self) -> None:
        """Diverged where a weight is no number, which the losses tell one step later."""
        if not all(bool(weight.isfinite().all()) for weight in self.training.model.parameters()):
            raise Diverged(f"after step {self.training.steps} a weight is no number; expected one: {LOWER}")

    def evaluate(self) -> None:
        self.held_out.append((self.seconds, self.training.steps, self.training.evaluate()))


@dataclass(frozen=True)
class Limits:
    """When a run is over: after so many seconds of training, or so many steps."""

    seconds: float
    steps: float

    def share(self, run: Run) -> float:
        """How much of it is done; 1 when it is over."""
        return max(run.seconds / self.seconds, run.training.steps / self.steps)

    def left(self, run: Run) -> float:
        """Seconds to go, at the speed until now."""
        by_steps = (self.steps / max(1, run.training.steps) - 1) * run.seconds
        return max(0.0, min(self.seconds - run.seconds, by_steps))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.charlm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="a UTF-8 file; pydoc's help texts if left out")
    parser.add_argument(
        "--backend", help=f"of the layer: auto, eager, cudnn, triton, triton:KERNEL, or {BASELINE} itself"
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
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where --compare publishes")
    parser.add_argument(
        "--prompt", help=f"what the sample begins with; {PROMPT} characters held out if left out"
    )
    parser.add_argument(
        "--length", type=int, default=1000, help="characters of the sample (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sample (default: %(default)s)")
    group = parser.add_argument_group("the model and its training")
    for one in dataclasses.fields(Settings):
        kind = {"float | None": float}.get(str(one.type)) or {"int": int, "float": float, "str": str}[
            str(one.type)
        ]
        # Left out of the namespace where not given: a checkpoint has its own.
        group.add_argument(
            f"--{one.name}",
            type=kind,
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
        device = device_of(options)
    except ValueError as error:
        known.error(str(error))
    # Signals first: torchrun sends its own to a process that is already done, too.
    with interrupts() as interrupted, process_group(device) as (rank, world, device):
        try:
            work = (prepare_all if options.compare else prepare)(options, device, rank, world)
        except (ValueError, OSError, elman.BackendUnavailableError) as error:
            known.error(str(error))
        try:
            return work(interrupted)
        except Diverged as error:
            if rank == 0:
                print(f"\n{known.prog}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\n{known.prog}: ended at once", file=sys.stderr)
            return 130


def device_of(options: argparse.Namespace) -> torch.device:
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
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is {options.device!r}; expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {device}, which this machine has not; expected cpu")
    if device.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs, fewer than processes; expected one for "
            "each: start fewer, or take --device cpu"
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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
        dist.barrier()  # none ends while the first one still writes its sample
    finally:
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
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A line that is written anew on a terminal, and every ten seconds in a file."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.terminal, self.shown = limits, sys.stderr.isatty(), time.monotonic()

    def show(self, run: Run, others: Sequence[Run] = ()) -> None:
        """The run's line; others: what has to be trained beside it, which takes time too."""
        if not self.terminal and time.monotonic() - self.shown < 10:
            return
        self.shown = time.monotonic()
        share = min(1.0, self.limits.share(run))
        bar = "#" * int(20 * share)
        loss = sum(run.losses[-100:]) / len(run.losses[-100:])
        held_out = f" (held out {run.held_out[-1][2]:.3f})" if run.held_out else ""
        speed = run.training.characters / run.seconds
        left = sum(self.limits.left(each) for each in (run, *others))
        name = f"{run.training.backend:6} " if others else ""
        said = (
            f"{name}[{bar:.<20}] {share:4.0%}  loss {loss:.3f}  {loss / math.log(2):.3f} bits/char"
            f"{held_out}  {speed:,.0f} chars/s  {clock(left)} left"
        )
        width = shutil.get_terminal_size().columns - 1
        print(
            f"\r{said[:width]}\x1b[K" if self.terminal else said,
            end="" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


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
    """What train() needs, made and tried; raises before anything is written if it can't be."""
    corpus = language.read(options.text)
    path = options.folder / "checkpoint.pt"
    given = settings_of(options)
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
    prompt = prompt_of(options, corpus)
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
    limits = limits_of(options)

    def work(interrupted: Interrupted) -> int:
        baselines = {}
        if rank == 0:
            print(introduction(run))
            baselines = baselines_of(corpus)
            print(f"Held out: {len(corpus.held_out):,} characters. {said_of(baselines)}.", flush=True)
        stopped = train(run, limits, path, interrupted, first=rank == 0)
        if rank == 0:
            # Who has stopped the training gets a sample too; who stops the sample, what there is of it.
            finish(run, baselines, prompt, options, enough=lambda: not stopped and interrupted())
            if stopped:
                print(f"Stopped at step {run.training.steps:,}. --resume goes on from there.")
        return 130 if interrupted() else 0

    return work


def train(run: Run, limits: Limits, path: Path, interrupted: Interrupted, first: bool) -> bool:
    """Trains until the limits are reached; whether it was stopped before. Leaves a checkpoint at `path`."""
    training, progress = run.training, Progress(limits)
    over = training.any(first and limits.share(run) >= 1)
    stopped, mark = False, int(limits.share(run) * MARKS) + 1
    while not over and not stopped:
        run.advance(min(LOOK, int(min(limits.steps, sys.maxsize)) - training.steps))
        share = limits.share(run)
        # The clock is the first process's, the signal anyone's.
        stopped = training.any(interrupted())
        over = training.any(first and share >= 1)
        due = training.any(first and share * MARKS >= mark)
        if first:
            progress.show(run)
        if due or over or stopped:
            mark = int(share * MARKS) + 1
            run.check()
            if first and not stopped:
                run.evaluate()
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
        return language.numbers(options.prompt, corpus.alphabet)
    except ValueError as error:
        raise ValueError(f"--prompt can't be read: {error}") from None


def baselines_of(corpus: Corpus) -> dict[str, float]:
    """Bits a character of the held-out text, by what counts can tell; none of a text too long for that."""
    if len(corpus.training) > COUNTED:
        return {}
    V = len(corpus.alphabet)
    return {
        name: ngrams.NGram(corpus.training, V, order).bits_per_character(corpus.held_out)
        for name, order in (("unigram", 1), (f"{ORDER}-gram", ORDER))
    }


def said_of(baselines: dict[str, float]) -> str:
    if not baselines:
        return f"of more than {COUNTED:,} characters no n-grams are counted"
    return ", ".join(f"{name} {value:.3f} bits a character" for name, value in baselines.items())


def introduction(run: Run) -> str:
    """The text, the model, and what computes it."""
    training, corpus, s = run.training, run.training.corpus, run.training.settings
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    inputs = f"embedding of {s.embedding}" if s.embedding else "one-hot"
    processes = f", {training.world} processes" if training.world > 1 else ""
    begun = f"\nGoing on from step {training.steps:,}." if training.steps else ""
    return (
        f"Text: {corpus.name}, {corpus.size:,} characters, {len(corpus.alphabet)} of them distinct.\n"
        f"Model: {inputs}, {s.layers} x {s.hidden} {s.nonlinearity}, {parameters:,} parameters, {s.dtype}; "
        f"B={s.batch}, T={s.window}.\n"
        f"Backend: {training.route()}, on {training.device}{processes}.{begun}"
    )


def finish(
    run: Run,
    baselines: dict[str, float],
    prompt: Tensor,
    options: argparse.Namespace,
    enough: Callable[[], bool],
) -> None:
    """The sample and the picture, and in a few lines what came out."""
    training, corpus = run.training, run.training.corpus
    passes = training.characters / len(corpus.training)
    print(
        f"\n{training.steps:,} steps, {training.characters:,} characters, {passes:.1f} times the text, in "
        f"{clock(run.seconds)} minutes: {training.characters / run.seconds:,.0f} characters a second."
    )
    if run.held_out:
        reached = run.held_out[-1][2]
        beaten = [name for name, value in baselines.items() if reached < value]
        missed = [name for name in baselines if name not in beaten]
        below = f"; below the {' and the '.join(beaten)}" if beaten else ""
        above = f"; not below the {' nor the '.join(missed)}: train longer, or on more text" if missed else ""
        when = "" if run.held_out[-1][1] == training.steps else f" at step {run.held_out[-1][1]:,}"
        print(f"Held out{when}: {reached:.3f} bits a character{below}{above}.")

    folder = options.folder
    title = f"{corpus.name}, {training.settings.layers} x {training.settings.hidden}"
    picture = curves.losses(folder / "loss.png", title, [curve_of(run)], baselines)
    if picture is None:
        print(NEEDS_MATPLOTLIB)
    begin = "".join(corpus.alphabet[i] for i in prompt.tolist())
    print(f"\nIt writes, after {begin!r}:\n\n{begin}", end="")
    with (folder / "sample.txt").open("w", encoding="utf-8", newline="") as sample:
        sample.write(begin)

        def show(character: int) -> bool:
            sample.write(corpus.alphabet[character])
            print(corpus.alphabet[character], end="", flush=True)
            return enough()

        start = time.perf_counter()
        drawn = training.sample(
            prompt, options.length, show, temperature=options.temperature, seed=training.settings.seed
        )
        seconds = time.perf_counter() - start
    print(f"\n\n{len(drawn) / seconds:,.0f} characters a second, one call each.")
    names = ["checkpoint.pt", "sample.txt", *([picture.name] if picture else [])]
    print(f"Wrote {', '.join(str(folder / name) for name in names)}.")


# --- A comparison -------------------------------------------------------------------------------------


def contenders(device: torch.device, only: str | None) -> tuple[list[str], dict[str, str]]:
    """nn.RNN and the backends to compare it with, and why others take no part."""
    if only and only != BASELINE:
        return [BASELINE, only], {}
    names, absent = [BASELINE], {}
    for name, available in elman.available_backends().items():
        if available is not True:
            absent[name] = str(available)
        elif name == "triton" and device.type == "cpu":
            absent[name] = "On a CPU it runs in Triton's interpreter, which is for tests."
        else:
            names.append(name)
    return names, absent


def prepare_all(
    options: argparse.Namespace, device: torch.device, rank: int, world: int
) -> Callable[[Interrupted], int]:
    """What compare() needs, made and tried."""
    corpus, settings = language.read(options.text), Settings(**settings_of(options))
    prompt = prompt_of(options, corpus)
    names, absent = contenders(device, options.backend)
    runs = {name: Run(Training(corpus, settings, name, device)) for name in names}
    for run in runs.values():
        run.training.warm()
    options.results.mkdir(parents=True, exist_ok=True)
    limits = limits_of(options)

    def work(interrupted: Interrupted) -> int:
        record = machine.record(device, ROOT)
        for run in runs.values():
            print(introduction(run))
        baselines = baselines_of(corpus)
        print(f"Held out: {said_of(baselines)}.", flush=True)
        rounds = race(runs, limits, interrupted)
        generated = write_by_turns(runs, prompt, interrupted)
        if interrupted():
            print("Stopped: nothing is published.", file=sys.stderr)
            return 130
        record |= {
            "threads": torch.get_num_threads(),
            "settings": dataclasses.asdict(settings),
            "text": {
                "name": corpus.name,
                "digest": corpus.digest,
                "characters": corpus.size,
                "held_out": len(corpus.held_out),
                "alphabet": len(corpus.alphabet),
            },
            "minutes": limits.seconds / 60 if math.isfinite(limits.seconds) else None,
            "steps": options.steps,
            "baselines": baselines,
            "absent": absent,
            "prompt": "".join(corpus.alphabet[i] for i in prompt.tolist()),
            "runs": [
                {
                    **curve_of(run, least=min(len(run.losses) for run in runs.values())),
                    "route": run.training.route(),
                    "training": rounds[name],
                    "generation": generated[name],
                    "apart": apart(run.losses, runs[BASELINE].losses),
                    "sample": "".join(
                        corpus.alphabet[i]
                        for i in run.training.sample(
                            prompt, options.length, temperature=options.temperature, seed=settings.seed
                        )
                    ),
                }
                for name, run in runs.items()
            ],
        }
        for path in charlm_page.publish(options.results, record):
            print(f"Wrote {path}")
        report.index(options.results)
        return 0

    return work


def race(runs: dict[str, Run], limits: Limits, interrupted: Interrupted) -> dict[str, list[float]]:
    """All trained by turns, ROUNDS of them or until interrupted; each turn's seconds a character.

    What slows the machine down for a while so meets all of them, and a turn's numbers belong together. A
    turn in which one of them has nothing to do, having been slow to stop in the last, has no numbers.
    """
    taken: list[dict[str, float]] = []
    progress = Progress(limits)
    for turn in range(ROUNDS):
        taken.append({})
        for name in measure.order(list(runs), turn):
            run, share = runs[name], (turn + 1) / ROUNDS
            before = run.seconds, run.training.characters
            while limits.share(run) < share:
                steps = int(min(limits.steps, sys.maxsize)) - run.training.steps
                run.advance(min(LOOK, steps))
                progress.show(run, [other for other in runs.values() if other is not run])
                if interrupted():
                    progress.end()
                    return {}
            if run.training.characters > before[1]:
                seconds, characters = run.seconds - before[0], run.training.characters - before[1]
                taken[turn][name] = seconds / characters
            run.check()
            run.evaluate()
    progress.end()
    whole = [numbers for numbers in taken if numbers.keys() == runs.keys()]
    return {name: [numbers[name] for numbers in whole] for name in runs}


def write_by_turns(runs: dict[str, Run], prompt: Tensor, interrupted: Interrupted) -> dict[str, list[float]]:
    """Seconds a character of generation, each turn's, until interrupted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(GENERATIONS + 1):
        for name in measure.order(list(runs), turn):
            if interrupted():
                return {}
            seconds = measure.wall_seconds(lambda: runs[name].training.sample(prompt, GENERATED))  # noqa: B023
            if turn:  # the first one warms up
                taken[name].append(seconds / GENERATED)
    return taken


def curve_of(run: Run, least: int | None = None) -> dict[str, Any]:
    """A run's losses as they are drawn, in bits: 200 means and the readings of the held-out text.

    least: of the runs that are drawn together, the fewest steps: their means are over as many each.
    """
    each = max(1, (least or len(run.losses)) // 200)
    whole = range(0, len(run.losses) - each + 1, each)
    return {
        "name": run.training.backend,
        "seconds": run.seconds,
        "characters": run.training.characters,
        "steps": run.training.steps,
        "steps_a_mean": each,
        "losses": [round(language.bits(run.losses[start : start + each]), 5) for start in whole],
        "held_out": [(round(seconds, 3), steps, round(found, 5)) for seconds, steps, found in run.held_out],
    }


def apart(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The largest relative difference of two runs' losses, over the first 10, 100, 1,000 ... steps."""
    most, found = 0.0, {}
    for step, (loss, other) in enumerate(zip(losses, others, strict=False), 1):
        most = max(most, abs(loss - other) / other)
        if step in (10, 100, 1000, 10000):
            found[str(step)] = most
    return found


if __name__ == "__main__":
    sys.exit(main())
