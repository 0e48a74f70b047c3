"""Which Triton kernel runs a problem, by tuned times, else by predicted ones; and cudnn's times beside them.

    plan(...)      the kernel of a launch, and whether it makes the input product too
    config(...)    its config, tuned if that is due
    launch(...)    both of a pass over tensors, cached by plain sizes
    why_not(...)   why a kernel can't run a problem
    none_runs(...) why none can
    times(...)     microseconds a step of each kernel that can
    compare(...)   the same beside cudnn's, as numbers and as text
    fuses(...)     whether the resident forward makes the input product too

What was chosen stays for the lifetime of the process: the same call takes the same kernel. So ELMAN_KERNELS,
the kernels that may be launched, is to be set before the first call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from . import routing, tables, tuning
from .kernels import configs
from .kernels.common import chip
from .kernels.resident import MAX_INPUTS


def plan(
    kernel: str, problem: configs.Problem, device: torch.device, steps: int, inputs: int = 0
) -> tuple[str, configs.Problem]:
    """The kernel of a pass over T = steps, and its problem, with inputs = I where it makes the input product.

    kernel as in `ops`; "triton" is the quickest. "cell" comes back for a forward pass that is one launch
    of step.cell, which a sequence of one step is too for the kernels that may take a launch a step.
    Raises BackendUnavailableError for a kernel that ELMAN_KERNELS leaves out: a graph may name one that it
    was made with.
    """
    if kernel != "triton" and problem.B and problem.H:
        routing.expect_allowed(kernel)
    may_step = kernel == "step" or (kernel == "triton" and not routing.not_allowed("step"))
    one = steps == 1 and problem.D == 1 and may_step
    if not problem.backward and (kernel == "cell" or one):
        return "cell", replace(problem, inputs=inputs)
    if kernel == "cell" or not problem.B or not problem.H:
        return "step", problem
    name = quickest(problem, device, steps) if kernel == "triton" else kernel
    if name == "resident" and not problem.backward and fuses(problem, inputs, steps, device):
        problem = replace(problem, inputs=inputs)
    return name, problem


def config(
    kernel: str, problem: configs.Problem, device: torch.device, tuned: bool = True
) -> configs.Config | None:
    """The config of a plan; None if nothing is launched. tuned=False: what is known without tuning."""
    if not problem.B or not problem.H:
        return None
    find = tuning.config_for if tuned else tuning.known_config
    return find("step" if kernel == "cell" else kernel, problem, device)


def launch(
    kernel: str,
    B: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    ragged: bool,
    device: torch.device,
    steps: int,
    inputs: int = 0,
) -> tuple[str, configs.Problem, configs.Config | None]:
    """The kernel, the problem and the config of a pass: plan's and config's answers.

    By plain numbers, which cost a fraction of a Problem to hash, and one look-up instead of four.
    """
    precision = precision if dtype == torch.float32 else "ieee"
    problem = configs.Problem(B, H, D, dtype, precision, backward, ragged=ragged)
    name, problem = plan(kernel, problem, device, steps, inputs)
    return name, problem, config(name, problem, device)


cached_launch = tuning.remembered(launch)


@tuning.remembered
def why_not(kernel: str, problem: configs.Problem, device: torch.device) -> str | None:
    """None if the kernel can and may run the problem there, else why not."""
    not_allowed = routing.not_allowed(kernel)
    if not_allowed:
        return not_allowed
    if kernel == "cooperative" and device.type != "cuda":
        return "its programs wait for one another, and Triton's interpreter runs them one after another"
    on = chip(device)
    if configs.candidates(kernel, problem, on):
        return None
    reasons = Counter(
        configs.estimate(kernel, config, problem, on) for config in configs.space(kernel, problem, on)
    )
    most = f"; of most, {reasons.most_common(1)[0][0]}" if reasons else ""
    return f"none of its configs fits on {on.name} with hidden size {problem.H} in {problem.dtype}{most}"


def none_runs(problem: configs.Problem, device: torch.device) -> str | None:
    """None if some Triton kernel can run the problem there, else why each can't."""
    reasons = {kernel: why_not(kernel, problem, device) for kernel in configs.KERNELS}
    if None in reasons.values():
        return None
    return ". ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())


@tuning.remembered
def times(problem: configs.Problem, device: torch.device) -> tuple[Mapping[str, float], bool]:
    """Microseconds a step of every Triton kernel that can run the problem, and whether they were tuned.

    They were if a table has all of them: a measured time and a predicted one are not compared. It may lack
    step, a launch a step, where another kernel can run.
    """
    on = chip(device)
    able = [kernel for kernel in configs.KERNELS if why_not(kernel, problem, device) is None]
    entries = {kernel: tuning.lookup(kernel, problem, device) for kernel in able}
    if able and all(entries[kernel] for kernel in able if kernel != "step" or able == ["step"]):
        return {kernel: entry.us for kernel, entry in entries.items() if entry}, True
    return {kernel: configs.candidates(kernel, problem, on)[0][1].us for kernel in able}, False


#: Guesses of a launch's microseconds beside its steps: for resident the launch and W_hh's way onto the chip,
#: for cooperative a buffer to fill and a cooperative launch too.
FIXED_US = {"resident": 5.0, "cooperative": 30.0, "step": 0.0}


def quickest(problem: configs.Problem, device: torch.device, steps: int) -> str:
    """The Triton kernel that `times` and FIXED_US make the quickest.

    Raises BackendUnavailableError where none can run.
    """
    us, _ = times(problem, device)
    if not us:
        raise routing.BackendUnavailableError(
            f"no Triton kernel can run {problem}: {none_runs(problem, device)}"
        )
    return min(us, key=lambda kernel: steps * us[kernel] + FIXED_US[kernel])


@dataclass(frozen=True)
class Comparison:
    """Microseconds a step of Triton's quickest and of cudnn, summed over the passes; text names them all."""

    triton: float
    cudnn: float
    text: str


@tuning.remembered
def compare(passes: tuple[configs.Problem, ...], device: torch.device, with_cudnn: bool = True) -> Comparison:
    """Triton's kernels against cudnn, summed over the passes (the forward's problem, the backward's).

    The length T is no part of it: what a launch costs beside its steps is left out on both sides.
    """
    triton = cudnn_total = 0.0
    parts: list[str] = []
    sources: dict[str, None] = {}
    for problem in passes:
        us, tuned = times(problem, device)
        triton += min(us.values(), default=math.inf)
        ranking = [f"{kernel} {us[kernel]:.2f}" for kernel in sorted(us, key=us.__getitem__)]
        sources["tuned table" if tuned else "resource model"] = None
        if with_cudnn:
            entry = None if problem.ragged else tuning.lookup("cudnn", problem, device)
            figure = entry.us if entry else cudnn_us(problem)
            cudnn_total += figure
            ranking.append(f"cudnn {figure:.2f}")
            sources["tuned table" if entry else "published figures"] = None
        parts.append(f"{', '.join(ranking)} us a step {'backward' if problem.backward else 'forward'}")
    untuned = set(sources) != {"tuned table"}
    source = " and ".join(sources) + (f"; {_no_table(device)}" if untuned else "")
    if routing.left_out():
        source += f"; ELMAN_KERNELS leaves out {', '.join(routing.left_out())}"
    return Comparison(triton, cudnn_total, f"{'; '.join(parts)} ({source})")


def _no_table(device: torch.device) -> str:
    if not tuning.autotunes():
        return "ELMAN_AUTOTUNE is off"
    gpu = chip(device).name
    found = any(tuning.table(path(gpu), gpu).entries for path in (tables.user_path, tables.shipped_path))
    return f"the tuned table of {gpu} lacks this shape" if found else f"no tuned table for {gpu}"


#: Largest H -> cuDNN's microseconds a step forward, 16 bits and 32 bits, where its persistent algorithm runs.
CUDNN_SMALL = {160: (0.62, 0.62), 224: (0.93, 0.93), 264: (3.9, 9.5), 336: (8.3, 8.3), 384: (10.2, 10.2)}
CUDNN_STANDARD = (7.9, 9.3)
#: Backward, up to H = 256 and above.
CUDNN_BACKWARD = (1.85, 15.2)


def cudnn_us(problem: configs.Problem) -> float:
    """cuDNN's microseconds a step, from what is published: the figures behind PyTorch's pull request 62143.

    They are of tanh in fp16 and fp32, and stand for any GPU and batch for want of others. Rows of
    differing lengths, float64 and H > 384 take its STANDARD algorithm, a launch or more a step.
    """
    persistent = not problem.ragged and problem.dtype != torch.float64
    if problem.backward:
        return CUDNN_BACKWARD[0 if persistent and problem.H <= 256 else 1]
    figures = next((us for most, us in CUDNN_SMALL.items() if most >= problem.H), CUDNN_STANDARD)
    return (figures if persistent else CUDNN_STANDARD)[0 if problem.dtype.itemsize == 2 else 1]


#: A separate product: its launch in microseconds, and the bytes a microsecond that it writes z with.
PRODUCT_US, PRODUCT_BYTES = 5.0, 2e6


@tuning.remembered
def fuses(problem: configs.Problem, inputs: int, steps: int, device: torch.device) -> bool:
    """Whether the resident forward should make the input product (I = inputs) of T = steps itself."""
    if not 0 < inputs <= MAX_INPUTS or not problem.B or not problem.H:
        return False
    on = chip(device)
    fused = configs.candidates("resident", replace(problem, inputs=inputs), on)
    apart = configs.candidates("resident", problem, on)
    if not fused or not apart:
        return False
    z_us = problem.B * problem.D * problem.H * problem.dtype.itemsize / PRODUCT_BYTES
    return steps * fused[0][1].us < steps * (apart[0][1].us + z_us) + PRODUCT_US
