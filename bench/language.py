"""A character language model on a recurrent layer, and how it is trained: what bench/charlm.py runs.

    e_t = the embedding of character t, or its one-hot vector
    h_t = the recurrent layers' state, carried on from window to window
    p(character t + 1) = softmax(W_y h_t + b_y)

The text lies in B columns, one after the other; a step of training takes a window of T characters of each,
(T, B), and gradients stay within it: truncated backpropagation through time. All that happens is a
function of the settings and of the number of steps so far, never of the clock: so a run goes on after a
stop as if there had been none, and with every backend, and on several processes, it makes the same steps.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import elman
from bench.contenders import arithmetic, described
from bench.corpus import Corpus, Windows
from bench.rows import BASELINE

EVALUATED = 1024  # characters of the held-out text at a time
DTYPES = ("float32", "tf32", "bfloat16")


class Diverged(Exception):
    """A training has come to what is no number."""


@dataclass(frozen=True)
class Settings:
    """All that a training depends on but for the text; nothing of what computes it.

    metadata["help"] is what the command line says of a field. Raises ValueError for what can't be.
    """

    hidden: int = field(default=768, metadata={"help": "units of a layer, H"})
    layers: int = field(default=1, metadata={"help": "recurrent layers"})
    nonlinearity: str = field(default="relu", metadata={"help": "tanh or relu"})
    embedding: int = field(default=64, metadata={"help": "size of a character's vector; 0: one-hot"})
    recurrent: str = field(default="uniform", metadata={"help": "W_hh at first: see elman.initialize"})
    radius: float | None = field(default=None, metadata={"help": "its spectral radius at first"})
    sigma: float | None = field(default=None, metadata={"help": "standard deviation of W_ih at first"})
    batch: int = field(default=32, metadata={"help": "columns of text side by side, B"})
    window: int = field(default=64, metadata={"help": "steps that gradients go back, T"})
    rate: float = field(default=2e-3, metadata={"help": "Adam's, at its highest"})
    warmup: int = field(default=300, metadata={"help": "steps until the rate is at its highest"})
    decay: float = field(default=3000, metadata={"help": "steps after which the rate falls, as 1/sqrt"})
    dropout: float = field(default=0.6, metadata={"help": "share of the states that the output misses"})
    blanks: float = field(default=0.2, metadata={"help": "share of the inputs that the layers miss"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    average: float = field(default=0.999, metadata={"help": "decay of the weights' average; 0: the last"})
    dtype: str = field(default="float32", metadata={"help": f"{', '.join(DTYPES)} (by autocast)"})
    seed: int = field(default=0, metadata={"help": "of weights, dropout and the text's turns"})

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("embedding", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.rate == math.inf:
            raise ValueError("rate is inf; expected a number")
        for name in ("rate", "decay", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("dropout", "blanks", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more and less than 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    def rate_at(self, step: int) -> float:
        """The learning rate of that step, the first being 0."""
        return self.rate * min(1.0, (step + 1) / (self.warmup + 1)) / math.sqrt(1 + step / self.decay)


# --- The model ----------------------------------------------------------------------------------------


class CharacterModel(nn.Module):
    """Characters (T, B) to the scores (T, B, V) of each next one. The state stays from call to call."""

    def __init__(self, V: int, settings: Settings, backend: str) -> None:
        """backend: one of Elman's, or "nn.RNN" for that layer itself."""
        super().__init__()
        self.V, E = V, settings.embedding
        self.embedding = nn.Embedding(V, E) if E else None
        sizes = (E or V, settings.hidden, settings.layers)
        layer: nn.Module
        if backend == BASELINE:
            layer = nn.RNN(*sizes, nonlinearity=settings.nonlinearity)
        else:
            layer = elman.Elman(*sizes, nonlinearity=settings.nonlinearity, backend=backend)
        elman.initialize(layer, settings.recurrent, radius=settings.radius, sigma=settings.sigma)
        self.rnn = elman.Stream(layer)
        self.head = nn.Linear(settings.hidden, V)

    def forward(self, ids: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids int64 (T, B); masks (1, B, I) and (1, B, H): what inputs and outputs are multiplied by.

        They are the same for all steps: Y. Gal and Z. Ghahramani, 2016, arXiv 1512.05287.
        """
        x = (
            F.one_hot(ids, self.V).to(self.head.weight.dtype)
            if self.embedding is None
            else self.embedding(ids)
        )
        if masks is None:
            return self.head(self.rnn(x)[0])
        h, _ = self.rnn(x * masks[0])
        return self.head(h * masks[1].to(h.dtype))


def generate(
    model: CharacterModel,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """`length` characters after the prompt, int64 (N,): each drawn, and fed back by a call of one step.

    The model begins with a state of zero. temperature: 1 as the model believes,
    less for the likelier characters more often, 0 for the likeliest always.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    model.rnn.reset()
    ids = prompt
    for place in range(length):
        with torch.no_grad():
            scores = model(ids.to(device)[:, None])[-1, 0].double().cpu()
        if not scores.isfinite().all():
            raise Diverged(f"after {place} characters of a sample the scores are no numbers; train otherwise")
        if temperature:
            chances = ((scores - scores.max()) / temperature).softmax(0)
            ids = chances.multinomial(1, generator=generator)
        else:
            ids = scores.argmax().view(1)
        yield int(ids)


# --- Training -----------------------------------------------------------------------------------------


class Training:
    """A model and all that its next step depends on.

    rank, world: this process's number and that of all; each takes its part of the B columns, and
    DistributedDataParallel averages their gradients. All draw the same dropout, for all columns.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        backend: str,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if settings.batch % world:
            raise ValueError(
                f"batch is {settings.batch} and there are {world} processes; expected columns for each: a "
                "multiple of that"
            )
        if settings.dtype == "tf32" and device.type != "cuda":
            raise ValueError(f"dtype is tf32 and the device {device}; expected float32, or an NVIDIA GPU")
        self.corpus, self.settings, self.backend, self.device = corpus, settings, backend, device
        self.world = world
        self.part = slice(rank * settings.batch // world, (rank + 1) * settings.batch // world)
        self.windows = Windows(corpus.training, settings.window, settings.batch)
        self.generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = CharacterModel(len(corpus.alphabet), settings, backend)
        # The output begins as the unigram: learnt through W_hh first, it drives relu's states up without end.
        counts = torch.bincount(corpus.training, minlength=len(corpus.alphabet)) + 1
        with torch.no_grad():
            self.model.head.bias.copy_((counts / counts.sum()).log())
        self.average = copy.deepcopy(self.model).to(device).eval()
        self.model.to(device)
        self.module: nn.Module = self.model
        if world > 1:
            self.module = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None
            )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.rate, fused=True)
        self.steps = 0

    def route(self) -> str:
        """What computes a window here: backend, kernel and config."""
        if self.backend == BASELINE:
            return BASELINE
        s = self.settings
        return described(
            elman.explain(
                batch=s.batch // self.world,
                seq=s.window,
                input=s.embedding or len(self.corpus.alphabet),
                hidden=s.hidden,
                dtype=torch.bfloat16 if s.dtype == "bfloat16" else torch.float32,
                device=self.device,
                backend=self.backend,
            )
        )

    @property
    def characters(self) -> int:
        """That were learnt from so far, by all processes."""
        return self.steps * self.settings.window * self.settings.batch

    def step(self) -> Tensor:
        """One window; the loss of this process's columns, in nats a character, not yet read."""
        s = self.settings
        window, begins = self.windows.next(self.generator)
        if begins:
            self.model.rnn.reset()
        inputs = s.embedding or len(self.corpus.alphabet)
        masks = self._mask(s.blanks, inputs), self._mask(s.dropout, s.hidden)
        window = window[:, self.part].to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate_at(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with arithmetic(s.dtype):  # the backward pass too, which autocast is not for
            with self.autocast():
                scores = self.module(window[:-1], masks)
                loss = F.cross_entropy(scores.flatten(0, 1), window[1:].flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self.steps += 1
        self._average()
        return loss.detach()

    def _mask(self, dropped: float, size: int) -> Tensor:
        """(1, B, size), of this process's columns; drawn for all of them, as by any number of processes."""
        s = self.settings
        kept = torch.rand(1, s.batch, size, generator=self.generator) >= dropped
        return (kept[:, self.part] / (1 - dropped)).to(self.device)

    def _average(self) -> None:
        """The weights' average, of which the first steps are forgotten sooner."""
        decay = min(self.settings.average, self.steps / (self.steps + 10))
        with torch.no_grad():
            for mean, last in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(last, 1 - decay)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, *here: bool) -> list[bool]:
        """What of this is so in any process; every one has to ask."""
        if self.world == 1:
            return list(here)
        return [
            count > 0
            for count in self.total(torch.tensor(here, dtype=torch.float32, device=self.device)).tolist()
        ]

    def autocast(self) -> contextlib.AbstractContextManager:
        """What a forward pass in the settings' dtype is within."""
        half = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    @torch.no_grad()
    def evaluate(self, enough: Callable[[], object] | None = None) -> float | None:
        """Bits a character of the held-out text, by the average of the weights; None if enough() before.

        In one row from beginning to end, after a window of the training text.
        """
        context = self.corpus.training[-self.settings.window :]
        ids = torch.cat([context, self.corpus.held_out]).to(self.device)
        rnn = self.average.rnn
        rnn.reset()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        first = len(context) - 1  # whose next one is the first that counts
        with arithmetic(self.settings.dtype), self.autocast():
            if first:
                self.average(ids[:first, None])
            for start in range(first, len(ids) - 1, EVALUATED):
                if enough and enough():
                    return None
                part = ids[start : start + EVALUATED + 1]
                scores = self.average(part[:-1, None])[:, 0]
                nats += F.cross_entropy(scores.float(), part[1:], reduction="sum")
        rnn.reset()
        return nats.item() / math.log(2) / len(self.corpus.held_out)

    def sample(
        self,
        prompt: Tensor,
        length: int,
        each: Callable[[int], object] = lambda character: None,
        **options: Any,
    ) -> list[int]:
        """generate(), in the settings' dtype, by the weights' average, until `each` says it is enough."""
        characters = []
        with arithmetic(self.settings.dtype), self.autocast():
            for character in generate(self.average, prompt, length, **options):
                characters.append(character)
                if each(character):
                    break
        return characters

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on but for text and settings; every process has to call it.

        The columns' states are those of all processes, so that another number of them may go on.
        """
        state = self.model.rnn.state
        if self.world > 1 and state is not None:
            parts = [torch.empty_like(state) for _ in range(self.world)]
            dist.all_gather(parts, state.contiguous())
            state = torch.cat(parts, dim=1)
        return {
            "steps": self.steps,
            "offset": self.windows.offset,
            "at": self.windows.at,
            "generator": self.generator.get_state(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": state,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Goes on from there. RuntimeError or KeyError where it is not of such a model."""
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.windows.turn(saved["offset"], saved["at"])
        self.generator.set_state(saved["generator"])
        self.steps = saved["steps"]
        state = saved["state"]
        self.model.rnn.state = None if state is None else state[:, self.part].to(self.device).contiguous()

    def warm(self) -> None:
        """What a first call does, such as compiling, before any clock runs. Nothing is learnt by it."""
        ids = self.windows.columns[: self.settings.window, self.part].to(self.device)
        with arithmetic(self.settings.dtype):
            with self.autocast():
                loss = self.module(ids).float().square().mean()
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.rnn.reset()


def bits(nats: Sequence[float]) -> float:
    """The mean of losses in nats a character, in bits."""
    return sum(nats) / len(nats) / math.log(2)
