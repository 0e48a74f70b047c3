"""Sampling and statistics. Nothing here knows what it measures."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elman import timing

Stopwatch = Callable[[Callable[[], object]], float]

MIN_ROUNDS = 6  # the fewest samples whose range holds the median with 95% probability
MAX_ROUNDS = 200
WARM_BELOW = 0.002  # seconds
RESAMPLES = 2000


@dataclass
class Target:
    """What is timed, and what has to happen, untimed, before each sample."""

    call: Callable[[], Any]
    prepare: Callable[[], object]


def wall_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call by time.perf_counter: for synchronous work (CPU)."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call between two CUDA events on the current stream."""
    torch.cuda.synchronize()
    return timing.clock(call) / 1e6


@dataclass
class Collected:
    """What sampling came to: equally many samples of each target that stayed, and why others did not."""

    samples: dict[str, list[float]]
    errors: dict[str, Exception]  # what raised
    shed: dict[str, float]  # what was too slow for its limit, and the seconds that one call took


def collect(
    targets: Mapping[str, Target],
    stopwatch: Stopwatch,
    *,
    seconds: float,
    min_rounds: int,
    warmup: float,
    limits: Mapping[str, float] | None = None,
) -> Collected:
    """Sample all targets interleaved: each round takes one sample of every target.

    Drift of the machine (clock, temperature, other tenants) so reaches all of them alike. The order
    rotates with every round, and its direction turns after each full turn, so that no target always
    follows the same one. Every target is warmed up for `warmup` seconds, at least once; one whose rounds,
    the fewest that there may be, would by that take more than its limit of seconds is shed. A call of less
    than WARM_BELOW seconds is preceded by another, untimed: a longer one has itself brought into the caches
    most of what it finds there, a shorter one would find what other targets have left. Sampling ends after
    `seconds` per target, but not before `min_rounds` rounds (MIN_ROUNDS at least), and after MAX_ROUNDS in
    any case. The garbage collector is off meanwhile. What raises is dropped from the rounds.
    """
    names = list(targets)
    found = Collected({name: [] for name in targets}, {}, {})
    warmed: set[str] = set()
    min_rounds = max(min_rounds, MIN_ROUNDS)

    def drop(name: str) -> None:
        del found.samples[name]
        names.remove(name)

    def sample(name: str) -> float:
        """Seconds of one call, infinity if it raised."""
        try:
            if name in warmed:
                targets[name].prepare()
                targets[name].call()
            targets[name].prepare()
            return round(stopwatch(targets[name].call), 9)  # no clock here resolves less than a ns
        except Exception as error:  # the caller gets it
            found.errors[name] = error
            drop(name)
            return math.inf

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name in list(names):
            start, least, calls = time.perf_counter(), math.inf, 0
            while name in names and (calls < 1 or time.perf_counter() - start < warmup):
                least = min(least, sample(name))
                calls += 1
            if name in names and least * min_rounds > (limits or {}).get(name, math.inf):
                found.shed[name] = least
                drop(name)
            if least < WARM_BELOW:
                warmed.add(name)
        start, rounds = time.perf_counter(), 0
        while names and rounds < MAX_ROUNDS:
            enough = time.perf_counter() - start >= seconds * len(names)
            if enough and rounds >= min_rounds:
                break
            for name in order(names, rounds):
                taken = sample(name)
                if name in names:
                    found.samples[name].append(taken)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return found


def order(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of this round: rotated by `turn`, backwards every other full turn."""
    shift = turn % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if turn // len(names) % 2 else rotated


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1), with linear interpolation between neighbours."""
    return torch.tensor(samples, dtype=torch.float64).quantile(q).item()


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95% interval of the median (low, high)."""
    taken = torch.tensor(samples, dtype=torch.float64)
    low, high = _interval(taken[_resampled(len(samples))].quantile(0.5, dim=-1))
    return low, high


def speedup(baseline: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """median(baseline) / median(own), and its bootstrap 95% interval (low, high).

    The samples are paired (taken in the same round), so rounds are resampled, not samples: what slowed
    a whole round down cancels in the ratio, as it should. The seed is fixed: the same samples give the
    same interval.
    """
    if len(baseline) != len(own):
        raise ValueError(
            f"The samples must be paired round by round, but there are {len(baseline)} and {len(own)}."
        )
    pairs = torch.tensor([baseline, own], dtype=torch.float64)
    base_medians, own_medians = pairs[:, _resampled(len(own))].quantile(0.5, dim=-1)
    return quantile(baseline, 0.5) / quantile(own, 0.5), *_interval(base_medians / own_medians)


def _resampled(count: int) -> torch.Tensor:
    """RESAMPLES draws of `count` samples' indices, (RESAMPLES, count), the same ones every time."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def _interval(estimates: torch.Tensor) -> tuple[float, float]:
    low, high = estimates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()
