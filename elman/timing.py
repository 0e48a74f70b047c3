"""Times the configs of one key on the GPU: a short sequence, warmed up, in turns, by CUDA events."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cudnn
from .kernels import configs

#: The steps that a config is timed on, and the most elements that (T, B, D * H) may then have.
STEPS, MAX_ELEMENTS = 128, 1 << 24
WARM_UPS, ROUNDS = 3, 25
#: The input size that cudnn is timed with: small, and the multiple of 128 that one of its algorithms wants.
CUDNN_INPUT = 128

#: (kernel, problem, configs, device) -> each config's microseconds a step, ROUNDS times, or why it failed.
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
    steps = max(16, min(STEPS, MAX_ELEMENTS // (problem.B * problem.D * problem.H)))
    work = _cudnn_work if kernel == "cudnn" else functools.partial(_work, kernel)
    results: list[list[float] | str] = [[] for _ in tried]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch = work(problem, steps, device)
        for turn in range(WARM_UPS + ROUNDS):
            for i, config in enumerate(tried):
                samples = results[i]
                if isinstance(samples, str):
                    continue
                try:
                    if turn == 0 and not torch.isfinite(launch(config)).all():
                        raise ArithmeticError("its result is not finite")
                    us = clock(functools.partial(launch, config)) / steps
                    if turn >= WARM_UPS:
                        samples.append(us)
                except Exception as error:  # a config that can't be compiled or launched is no candidate
                    results[i] = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500]
    return results


def _uniform(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes tensors in (-1, 1) from a generator of its own: tuning must not move the caller's."""
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
        return values.to(dtype)

    return make


def _work(kernel: str, problem: configs.Problem, steps: int, device: torch.device) -> Callable[[Any], Tensor]:
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
    """nn.RNN's operator; backward without the gradients of weights, which no scan of ours makes either."""
    B, H, D, uniform = problem.B, problem.H, problem.D, _uniform(device, problem.dtype)
    shapes = D * [(H, CUDNN_INPUT), (H, H)]
    x, h0 = uniform(steps, B, CUDNN_INPUT), uniform(D, B, H)
    weights = [uniform(*shape) / math.sqrt(H) for shape in shapes]
    options = cudnn.Options(False, 1, "tanh", 0.0, False, D == 2)
    if not problem.backward:
        return lambda _: cudnn.elman(x, h0, weights, None, options)[0]
    with torch.enable_grad():
        output, _ = cudnn.elman(x.requires_grad_(), h0, weights, None, options)
    g_out = uniform(steps, B, D * H)
    return lambda _: torch.autograd.grad(output, x, g_out, retain_graph=True)[0]
