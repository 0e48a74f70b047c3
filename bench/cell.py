"""One cell of the table: one workload and one pass, all its contenders, agreement before timing."""

from __future__ import annotations

import math
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import agreement, contenders, extras, machine, measure
from bench.contenders import Contender, Problem
from bench.measure import Target
from bench.rows import BASELINE, FAILED, LEFT_OUT, SHED, TIMED, UNAVAILABLE, WRONG, Row
from bench.workloads import Workload
from elman import BackendUnavailableError


@dataclass
class Timing:
    """How a cell is sampled: a stopwatch, seconds per contender, rounds, warm-up seconds, time limit.

    limit: a contender whose fewest rounds would take more seconds than this is not sampled; but nn.RNN is.
    """

    stopwatch: measure.Stopwatch
    seconds: float
    min_rounds: int
    warmup: float
    limit: float = math.inf


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
    rows = {name: Row(workload, pass_name, name, *(absent[name] or (TIMED,))) for name in absent}
    built: dict[str, Contender] = {}
    raised: dict[str, Exception] = {}
    with contenders.arithmetic(workload.dtype):
        for name in (name for name in rows if not absent[name]):
            say(f"checking {name}")
            try:
                contender = check(rows[name], problem, truth, rows[BASELINE])
            except Exception as error:  # the row keeps it, and its test raises it
                raised[name] = error
                continue
            if rows[name].status == TIMED:
                built[name] = contender
        say("timing")
        targets = {name: contender.target(pass_name) for name, contender in built.items()}
        found = measure.collect(
            targets,
            timing.stopwatch,
            seconds=timing.seconds,
            min_rounds=timing.min_rounds,
            warmup=timing.warmup,
            limits={name: timing.limit for name in targets if name != BASELINE},
        )
        chip = machine.chip_state(problem.device)  # before it cools down
        if problem.device.type == "cuda":
            for name, taken in found.samples.items():
                say(f"cold, graph and host of {name}")
                measure_beside(rows[name], targets[name], problem.device, len(taken))
        for name in list(found.samples):
            say(f"checking {name} again")
            judge(rows[name], built[name].results(pass_name), truth, rows[BASELINE], problem)
            if rows[name].status != TIMED:
                rows[name].reason = f"It agreed at first, and not after all its calls. {rows[name].reason}"
                del found.samples[name]
    raised |= found.errors
    for name, failure in raised.items():
        traceback.clear_frames(failure.__traceback__)  # they hold the contender and its memory
        refused = isinstance(failure, BackendUnavailableError)
        rows[name].reason = str(failure) if refused else describe(failure)
        rows[name].status = UNAVAILABLE if refused or name in contenders.GUESTS else FAILED
    for name, seconds in found.shed.items():
        rows[name].status = SHED
        rows[name].reason = f"One call took {seconds:.2g} s; the fewest rounds would not fit into the budget."
    for name, taken in found.samples.items():
        row = rows[name]
        row.samples, row.chip = taken, chip
        row.median, row.p20, row.p80 = (measure.quantile(taken, q) for q in (0.5, 0.2, 0.8))
        row.median_low, row.median_high = measure.median_interval(taken)
        if BASELINE in found.samples:
            row.speedup, row.speedup_low, row.speedup_high = measure.speedup(found.samples[BASELINE], taken)
    return rows, raised


def absent_rows(workload: Workload, pass_name: str, names: Iterable[str], device: torch.device) -> list[Row]:
    """The rows of a cell in which no contender can take part, none of any other cell."""
    reasons = {name: contenders.absence(name, workload, device) for name in names}
    return [
        Row(workload, pass_name, name, *reason)
        for name, reason in reasons.items()
        if reason and all(reasons.values())
    ]


def check(row: Row, problem: Problem, truth: dict[str, Tensor], baseline: Row) -> Contender:
    """The row's contender; the row gets what `judge` says, its route, its first call's seconds, its memory.

    baseline: nn.RNN's row, which is checked first.
    """
    row.route = contenders.route(row.contender, problem)
    start = time.perf_counter()
    contender = contenders.build(row.contender, problem)
    results = contender.results(row.pass_name)
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    row.first = time.perf_counter() - start
    judge(row, results, truth, baseline, problem)
    row.memory = extras.peak_bytes(contender.target(row.pass_name), problem.device)
    return contender


def judge(
    row: Row,
    results: dict[str, Tensor | None],
    truth: dict[str, Tensor],
    baseline: Row,
    problem: Problem,
) -> None:
    """The row's errors beside nn.RNN's, and its status if by them it may not be timed."""
    workload = problem.workload
    own = agreement.errors(results, truth)
    if row is baseline:
        yardstick = own
    else:
        yardstick = {key: math.nan if value is None else value for key, (value, _) in baseline.errors.items()}
    if not yardstick:
        row.status = FAILED
        row.reason = "nn.RNN failed on this shape and pass, so there is no error to compare with."
        return
    if workload.nonlinearity == "relu" and results["output"] is not None:
        row.kinks = agreement.kinks(results["output"], truth["output"])
    row.errors = {key: (finite(own[key]), finite(yardstick[key])) for key in own}
    kinks = max(0.0, row.kinks - baseline.kinks)
    verdict = agreement.judge(own, yardstick, workload.steps, problem.dtype, kinks)
    row.worst = verdict.worst
    if verdict.objection and row.contender in contenders.GUESTS:
        row.status, row.reason = LEFT_OUT, f"Too wrong to be timed. {verdict.objection}"
    elif verdict.objection:
        row.status, row.reason = WRONG, verdict.objection


def measure_beside(row: Row, target: Target, device: torch.device, rounds: int) -> None:
    """The row's cold, graph and host; where one can't be had, the reason."""
    samples = min(11, max(3, rounds // 4))  # fewer where the budget has left few of the others
    try:
        row.cold = extras.cold_seconds(target, device, samples)
        row.host = extras.host_seconds(target, samples)
        if row.pass_name != "backward":
            row.graph = extras.graph_seconds(target, samples)
    except Exception as error:  # not every contender can be captured, and the row says why
        row.reason = f"Not measured beside the latency: {describe(error)}"


def describe(error: Exception) -> str:
    """The exception's type and message on one line, of compilers' messages the beginning."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def device_timing(device: torch.device, seconds: float, min_rounds: int) -> Timing:
    """Wall clock on a CPU, CUDA events on a GPU (which also needs longer to reach its clock)."""
    if device.type == "cuda":
        return Timing(measure.cuda_seconds, seconds, min_rounds, warmup=min(0.2, seconds))
    return Timing(measure.wall_seconds, seconds, min_rounds, warmup=min(0.1, seconds))
