"""A training as it runs: its clock, what came of it so far, when it is over, and the line that tells."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import language, ngrams
from bench.corpus import Corpus
from bench.language import Diverged, Training

LOOK = 10  # steps between two looks at clock, signals and losses
ORDER = 5  # of the n-grams
COUNTED = 4_000_000  # characters of which n-grams are counted, in half a minute
BAR = 20  # characters of a progress bar
LOWER = "take a lower --rate or --clip"

Interrupted = Callable[[], int]  # how many signals have come that ask for an end


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

    def evaluate(self, enough: Callable[[], object] | None = None) -> bool:
        """Reads the held-out text, if it is not enough before; whether that gave a number."""
        found = self.training.evaluate(enough)
        if found is None:
            return True
        if math.isfinite(found):
            self.held_out.append((self.seconds, self.training.steps, found))
        return math.isfinite(found)

    @property
    def nothing(self) -> Diverged:
        """What to raise where evaluate() gave no number."""
        return Diverged(f"at step {self.training.steps} the held-out text has no finite bits: {LOWER}")


@dataclass(frozen=True)
class Limits:
    """When a run is over: after so many seconds of training, or so many steps."""

    seconds: float
    steps: float

    def share(self, run: Run) -> float:
        """How much of it is done; 1 when it is over."""
        return max(run.seconds / self.seconds, run.training.steps / self.steps)

    def count(self, run: Run) -> int:
        """Steps until the next look."""
        return min(LOOK, int(min(self.steps, sys.maxsize)) - run.training.steps)

    def left(self, run: Run) -> float:
        """Seconds to go, at the speed until now."""
        by_steps = (self.steps / max(1, run.training.steps) - 1) * run.seconds
        return max(0.0, min(self.seconds - run.seconds, by_steps))


class Progress:
    """A line that is written anew on a terminal, and every ten seconds in a file."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.terminal, self.shown = limits, sys.stderr.isatty(), time.monotonic()

    def show(self, run: Run, others: Sequence[Run] = ()) -> None:
        """The run's line; others: what has to be trained beside it, which takes time too."""
        if not self.terminal and time.monotonic() - self.shown < 10:
            return
        self.shown = time.monotonic()
        columns = shutil.get_terminal_size().columns - 1 if self.terminal else 1000
        line = self.line(run, others, columns)
        start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def line(self, run: Run, others: Sequence[Run], columns: int) -> str:
        """All of it if there are so many columns; else without the held-out text, then without a bar."""
        share = min(1.0, self.limits.share(run))
        loss = sum(run.losses[-100:]) / len(run.losses[-100:])
        left = sum(self.limits.left(each) for each in (run, *others))
        name = f"{run.training.backend:6} " if others else ""
        said = (
            f" {share:4.0%}  loss {loss:.3f}  {loss / math.log(2):.3f} bits/char"
            f"  {run.training.characters / run.seconds:,.0f} chars/s  {clock(left)} left"
        )
        held_out = f"  held out {run.held_out[-1][2]:.3f}" if run.held_out else ""
        room = columns - len(name) - len("[]") - len(said)
        if room >= BAR + len(held_out):
            said, room = said + held_out, BAR
        if room < 1:
            return said[1 : columns + 1]
        cells = min(BAR, room)
        return f"{name}[{'#' * int(cells * share):.<{cells}}]{said}"

    def end(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def baselines_of(corpus: Corpus) -> dict[str, float]:
    """Bits a character of the held-out text, by what counts can tell; none of a text too long for that."""
    if len(corpus.training) > COUNTED:
        return {}
    V = len(corpus.alphabet)
    return {
        name: ngrams.NGram(corpus.training, V, order).bits_per_character(corpus.held_out)
        for name, order in (("unigram", 1), (f"{ORDER}-gram", ORDER))
    }


def task_of(corpus: Corpus, baselines: dict[str, float]) -> str:
    """How much is held out, and what counts alone can tell of it."""
    said = ", ".join(f"{name} {value:.3f} bits a character" for name, value in baselines.items())
    counted = said or f"of more than {COUNTED:,} characters no n-grams are counted"
    return f"Held out: {len(corpus.held_out):,} characters. {counted}."


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
