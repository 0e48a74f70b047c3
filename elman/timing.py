"""Times the configs of one key on the GPU, warmed up, in turns, by CUDA events.

A launch costs time beside its steps (Python, the launch, what is filled before it and waited for after it).
So two lengths are timed, one after the other, and a step's time is the slope between them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cudnn
from .kernels import configs

#: The steps of the longer run, and the most elements that (T, B, D * H) may then have.
STEPS, MAX_ELEMENTS = 320, 1 << 25
#: How many times shorter the shorter run is.
SHORTER = 5
WARM_UPS, ROUNDS = 3, 25
#: Both for the kernel step, each of whose steps is a launch that costs the host 18 us: at 320 steps and 25
#: rounds its many candidates would take longer than all other kernels' together.
STEPS_LAUNCHED, ROUNDS_LAUNCHED = 40, 8
#: The input size that cudnn is timed with: small, and the multiple of 128 that one of its algorithms wants.
CUDNN_INPUT = 128

#: (kernel, problem, configs, device) -> each config's microseconds a step, once a round, or why it failed.
Timer = Callable[
    [str, configs.Problem, Sequence[configs.Config | None], torch.device], list[list[float] | str]
]


def clock(launch: Callable[[], object]) -> float:
    """Microseconds of a launch on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def measure(
    kernel: str,
    problem: configs.Problem,
    tried: Sequence[configs.Config | None],
    device: torch.device,
    clock: Callable[[Callable[[], object]], float] = clock,
) -> list[list[float] | str]:
    """The Timer on a device: warmed up, then in turns, so that the chip's clock changes for all of them."""
    longer, rounds = (STEPS_LAUNCHED, ROUNDS_LAUNCHED) if kernel == "step" else (STEPS, ROUNDS)
    most = max(4 * SHORTER, min(longer, MAX_ELEMENTS // (problem.B * problem.D * problem.H)))
    lengths = (most // SHORTER, most)
    work = _cudnn_work if kernel == "cudnn" else functools.partial(launch_of, kernel)
    results: list[list[float] | str] = [[] for _ in tried]
    with (
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
        _switched(problem) if kernel == "cudnn" else contextlib.nullcontext(),
    ):
        launches = [work(problem, steps, device) for steps in lengths]
        for turn in range(WARM_UPS + rounds):
            for i, config in enumerate(tried):
                samples = results[i]
                if isinstance(samples, str):
                    continue
                try:
                    if turn == 0:
                        finite = all(torch.isfinite(launch(config)).all() for launch in launches)
                        _expect_no_hang(kernel, device)
                        if not finite:
                            raise ArithmeticError("its result is not finite")
                    short, long = (clock(functools.partial(launch, config)) for launch in launches)
                    _expect_no_hang(kernel, device)
                    if turn >= WARM_UPS:
                        samples.append((long - short) / (lengths[1] - lengths[0]))
                except Exception as error:  # a config that can't be compiled or launched is no candidate
                    results[i] = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500]
    return [_expect_slope(samples) for samples in results]


def _expect_no_hang(kernel: str, device: torch.device) -> None:
    """Raises DeviceHangError if a launch that has been waited for hung: else the next config's would."""
    if kernel == "cooperative":
        importlib.import_module("elman.kernels.cooperative").check(device)


@contextlib.contextmanager
def _switched(problem: configs.Problem) -> Iterator[None]:
    """PyTorch's switch for float32 RNNs as the problem's class says: cuDNN follows it, the kernels do not."""
    if problem.dtype != torch.float32:
        yield
        return
    switch: Any = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if problem.precision == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _expect_slope(samples: list[float] | str) -> list[float] | str:
    """The samples, unless so many are noise that the median or the 20th percentile may be no time at all."""
    if not isinstance(samples, str) and sorted(samples)[(len(samples) - 1) // 5] <= 0:
        return "its longer run often took no longer than its shorter one: the GPU is busy with other work"
    return samples


def _uniform(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes tensors in (-1, 1) from a generator of its own: tuning must not move the caller's."""
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
        return values.to(dtype)

    return make


def launch_of(
    kernel: str, problem: configs.Problem, steps: int, device: torch.device
) -> Callable[[Any], Tensor]:
    """A launch of the kernel's scan or backward scan, by config, that returns what it wrote."""
    module = importlib.import_module(f"elman.kernels.{kernel}")
    B, H, D, uniform = problem.B, problem.H, problem.D, _uniform(device, problem.dtype)
    w_hh, state = uniform(D, H, H) / math.sqrt(H), uniform(steps, B, D * H)
    if not problem.backward:
        h0 = uniform(D, B, H)
        return lambda config: module.scan(state, h0, w_hh, None, "tanh", problem.precision, config)
    g_out, dz = uniform(steps, B, D * H), torch.empty_like(state)

    def launch(config: Any) -> Tensor:
        module.scan_backward(g_out, None, state, w_hh, dz, None, "tanh", problem.precision, config)
        return dz

    return launch


def _cudnn_work(problem: configs.Problem, steps: int, device: torch.device) -> Callable[[Any], Tensor]:
    """nn.RNN's operator; backward without the gradients of weights, which no scan of ours makes either.

    The weights lie in one piece of memory, as a real nn.RNN's do: none are gathered in what is timed.
    """
    B, H, D, uniform = problem.B, problem.H, problem.D, _uniform(device, problem.dtype)
    shapes = D * [(H, CUDNN_INPUT), (H, H)]
    x, h0 = uniform(steps, B, CUDNN_INPUT), uniform(D, B, H)
    options = cudnn.Options(False, 1, "tanh", 0.0, False, D == 2)
    weights = cudnn.in_one_chunk([uniform(*shape) / math.sqrt(H) for shape in shapes], options)
    if not problem.backward:
        return lambda _: cudnn.elman(x, h0, weights, None, options)[0]
    with torch.enable_grad():
        output, _ = cudnn.elman(x.requires_grad_(), h0, weights, None, options)
    g_out = uniform(steps, B, D * H)
    return lambda _: torch.autograd.grad(output, x, g_out, retain_graph=True)[0]
