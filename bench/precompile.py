"""Compiles kernels ahead of their launches, by processes that see no GPU, into Triton's cache.

    Launch            what a launcher is called with, as far as the compiled code depends on it
    call(...)         calls the launcher on tensors without content
    build(...)        the compiled kernel that it would launch on a target
    compile_all(...)  compiles launches in parallel, each within a time limit

What is compiled is what the launchers launch: they are called, and Triton compiles for the target where it
would have launched. A kernel's key in Triton's cache holds neither the process nor the device's number, so a
later launch finds the code there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from elman.kernels import configs
from elman.kernels.configs import Chip, Config, Problem

#: Seconds that one compile may take.
LIMIT = 60.0
#: The error of what was not compiled before the deadline.
NO_TIME = "no time was left for it"


@dataclass(frozen=True)
class Launch:
    """A kernel's launch. kernel: "resident", "fused", "cooperative", "step" or "cell".

    lengths, resets: whether there are any; problem.ragged says so too. g_hn: backward, whether h_n has a
    gradient.
    """

    kernel: str
    problem: Problem
    config: Config
    lengths: bool = False
    resets: bool = False
    g_hn: bool = False
    relu: bool = False

    @property
    def module(self) -> str:
        """The module of elman.kernels that has the kernel, its search space and its model."""
        return module_of(self.kernel)

    def __str__(self) -> str:
        p = self.problem
        words = [self.kernel, "backward" if p.backward else "forward", str(p.dtype).removeprefix("torch.")]
        words += [p.precision] * (p.dtype == torch.float32) + [f"B={p.B} H={p.H} D={p.D}"]
        words += [name for name in ("lengths", "resets", "g_hn", "relu") if getattr(self, name)]
        return f"{' '.join(words)} {self.config}"


def module_of(kernel: str) -> str:
    """Whose module, search space and model a kernel has."""
    return {"cell": "step", "fused": "resident"}.get(kernel, kernel)


def call(launch: Launch, steps: int = 2) -> None:
    """Calls the kernel's launcher on CPU tensors without content."""
    p = launch.problem

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=p.dtype)

    module = importlib.import_module(f"elman.kernels.{launch.module}")
    sequence, state, w_hh = empty(steps, p.B, p.D * p.H), empty(p.D, p.B, p.H), empty(p.D, p.H, p.H)
    lengths = torch.ones(p.B, dtype=torch.int64) if launch.lengths else None
    resets = torch.ones(steps, p.B, dtype=torch.bool) if launch.resets else None
    nonlinearity = "relu" if launch.relu else "tanh"
    options = (lengths, nonlinearity, p.precision, launch.config, resets)
    if launch.kernel == "cell":
        x, w_ih, bias = empty(p.B, p.inputs), empty(p.H, p.inputs), empty(p.H)
        module.cell(x, state[0], w_ih, w_hh[0], bias, empty(p.B, p.H), *options[1:-1])
    elif launch.kernel == "fused":
        x, w_ih, bias = empty(steps, p.B, p.inputs), empty(p.D, p.H, p.inputs), empty(p.D, p.H)
        module.scan_fused(x, w_ih, bias, state, w_hh, *options)
    elif p.backward:
        g_hn = state if launch.g_hn else None
        module.scan_backward(empty(*sequence.shape), g_hn, sequence, w_hh, empty(*sequence.shape), *options)
    else:
        module.scan(sequence, state, w_hh, *options)


class Driver:
    """Stands in for a GPU's driver where Triton asks what it is to compile for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def build(launch: Launch, target: GPUTarget, chip: Chip) -> Any:
    """The compiled kernel that the launcher would launch on such a chip. Raises what the compiler raises."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
        if kernel.fn.__name__ not in found:  # step launches it once a step
            found[kernel.fn.__name__] = run(kernel, *arguments, **{**options, "warmup": True})

    triton.runtime.driver.set_active(Driver(target))
    module = importlib.import_module(f"elman.kernels.{launch.module}")
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(module, "chip", return_value=chip),
        mock.patch.object(torch.version, "hip", "any" if target.backend == "hip" else None),
    ):
        call(launch)
    (kernel,) = found.values()
    return kernel


@dataclass(frozen=True)
class Compiled:
    """A launch's compile: its seconds, or why there is none."""

    launch: Launch
    seconds: float
    error: str = ""


def compile_all(
    launches: Iterable[Launch],
    chip: Chip,
    target: GPUTarget,
    workers: int,
    *,
    limit: float = LIMIT,
    deadline: float = float("inf"),
    with_host_code: bool = False,
) -> Iterator[Compiled]:
    """Compiles the launches, in their order as far as there are free processes, and yields each when done.

    A compile that takes longer than `limit` seconds is ended, a compiler that dies is replaced. At the
    deadline (time.monotonic) what is being compiled and the next launch are yielded with NO_TIME as their
    error, and no more is asked for. with_host_code: also what Triton compiles with the C compiler for a
    launch.
    """
    todo = iter(launches)
    coming = next(todo, None)
    busy: dict[Any, tuple[Any, Launch, float]] = {}
    context = multiprocessing.get_context("spawn")
    idle: list[tuple[Any, Any]] = []

    def start() -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        with mock.patch.dict(os.environ, hidden):
            process = context.Process(target=_work, args=(theirs, chip, target, with_host_code), daemon=True)
            process.start()
        theirs.close()
        return process, ours

    try:
        while coming or busy:
            while coming and (idle or len(busy) < workers) and time.monotonic() < deadline:
                process, connection = idle.pop() if idle else start()
                try:
                    connection.send(coming)
                    busy[connection] = (process, coming, time.monotonic())
                except OSError:  # while it had nothing to do
                    yield Compiled(coming, 0.0, "the compiler died")
                coming = next(todo, None)
            if time.monotonic() >= deadline:
                break
            ready: list[Any] = wait(list(busy), timeout=0.2)
            for connection in ready:
                process, launch, since = busy.pop(connection)
                try:
                    error = connection.recv()
                    idle.append((process, connection))
                except (EOFError, OSError):
                    error = "the compiler died"
                yield Compiled(launch, time.monotonic() - since, error)
            for connection, (process, launch, since) in list(busy.items()):
                if time.monotonic() - since > limit:
                    process.kill()
                    del busy[connection]
                    yield Compiled(launch, limit, f"not compiled after {limit:g} s")
        for launch in [*(launch for _, launch, _ in busy.values()), *([coming] if coming else [])]:
            yield Compiled(launch, 0.0, NO_TIME)
    finally:
        for process in [process for process, _ in idle] + [process for process, _, _ in busy.values()]:
            process.kill()


def _work(connection: Connection, chip: Chip, target: GPUTarget, with_host_code: bool) -> None:
    """A process's work: launches come in, an empty string or an error goes out."""
    while True:
        try:
            launch = connection.recv()
        except EOFError:  # whom it works for was killed
            return
        try:
            kernel = build(launch, target, chip)
            if with_host_code:
                from triton.backends.nvidia.driver import CudaLauncher

                CudaLauncher(kernel.src, kernel.metadata)
            error = ""
        except Exception as caught:
            innermost: BaseException = caught
            while innermost.__cause__:  # what was wrong in the innermost device function
                innermost = innermost.__cause__
            error = f"{type(innermost).__name__}: {' '.join(str(innermost).split())}"[:500]
        connection.send(error)


def candidates(kernel: str, problem: Problem, chip: Chip) -> list[Config]:
    """The configs that a tuner tries, its first choice first."""
    return [config for config, _ in configs.candidates(module_of(kernel), problem, chip)]
