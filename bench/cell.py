"""One cell of the table: one shape and one pass, all its contenders, agreement before timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import agreement, contenders, measure
from bench.contenders import Contender, Problem
from bench.rows import BASELINE, FAILED, TIMED, UNAVAILABLE, WRONG, Row
from elman import BackendUnavailableError


@dataclass
class Timing:
    """How a cell is sampled: a stopwatch, seconds per contender, rounds, warm-up seconds."""

    stopwatch: measure.Stopwatch
    seconds: float
    min_rounds: int
    warmup: float


def measure_cell(
    problem: Problem,
    truth: dict[str, Tensor],
    pass_name: str,
    names: Iterable[str],
    timing: Timing,
    say: Callable[[str], None] = lambda phase: None,
) -> tuple[dict[str, Row], dict[str, Exception]]:
    """Check every named contender against the truth, then sample those that agree, interleaved.

    nn.RNN takes part, asked for or not, if any other can: its error is the bar, its time the yardstick.
    Returns a row per contender, and what those that raised have raised; their rows say it in words.
    """
    workload = problem.workload
    absent = {name: contenders.absence(name, workload, problem.device) for name in names}
    if not all(absent.values()):
        absent = {BASELINE: None, **absent}
    rows = {name: Row(*workload, pass_name, name, status=TIMED) for name in absent}
    built: dict[str, Contender] = {}
    raised: dict[str, Exception] = {}
    baseline: dict[str, float] = {}
    for name, row in rows.items():
        reason = absent[name]
        if reason:
            row.status, row.reason = reason
            continue
        say(f"checking {name}")
        try:
            contender = contenders.build(name, problem)
            own = agreement.errors(contender.results(pass_name), truth)
        except BackendUnavailableError as error:
            row.status, row.reason = UNAVAILABLE, str(error)
            continue
        except Exception as error:  # the row keeps it, and its test raises it
            row.status, row.reason, raised[name] = FAILED, describe(error), error
            continue
        if name == BASELINE:
            baseline = own
        if not baseline:
            row.status = FAILED
            row.reason = "nn.RNN failed on this shape and pass, so there is no error to compare with."
            continue
        row.errors = {key: (finite(own[key]), finite(baseline[key])) for key in own}
        verdict = agreement.judge(own, baseline, workload.steps, problem.dtype)
        row.worst = verdict.worst
        if verdict.objection:
            row.status, row.reason = WRONG, verdict.objection
            continue
        built[name] = contender
    say("timing")
    samples, dropped = measure.collect(
        {name: contender.target(pass_name) for name, contender in built.items()},
        timing.stopwatch,
        seconds=timing.seconds,
        min_rounds=timing.min_rounds,
        warmup=timing.warmup,
    )
    raised.update(dropped)
    for name, failure in dropped.items():
        rows[name].status, rows[name].reason = FAILED, describe(failure)
    for name, taken in samples.items():
        row = rows[name]
        row.samples = taken
        row.median, row.p20, row.p80 = (measure.quantile(taken, q) for q in (0.5, 0.2, 0.8))
        if BASELINE in samples:
            row.speedup, row.speedup_low, row.speedup_high = measure.speedup(samples[BASELINE], taken)
    return rows, raised


def describe(error: Exception) -> str:
    """The exception's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def device_timing(device: torch.device, seconds: float, min_rounds: int) -> Timing:
    """Wall clock on a CPU, CUDA events on a GPU (which also needs longer to reach its clock)."""
    if device.type == "cuda":
        return Timing(measure.cuda_seconds, seconds, min_rounds, warmup=0.5)
    return Timing(measure.wall_seconds, seconds, min_rounds, warmup=min(0.1, seconds))
