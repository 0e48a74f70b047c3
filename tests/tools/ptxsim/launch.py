"""Triton launches on CPU tensors, compiled for a GPU that is not here and run by the emulator.

    with Emulator("sm_90") as emulator:
        kernel[grid](...)          # any @triton.jit kernel, or a launcher that calls one
    emulator.lines()               # what was found

The compiler is the installed Triton's, up to the PTX; ptxas is not run. A process has one target: Triton
keeps compiled kernels by device, and the emulated one is always device 0.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from bench.precompile import Driver

from . import parser
from .context import Fault
from .global_memory import memory_of
from .machine import Machine, Options, Storage
from .order import Key, Report
from .program import Program
from .regions import FRESH, LARGE
from .tensor_cores import UNITS

T = TypeVar("T")


@lru_cache(maxsize=16)
def program_of(ptx: str, fine: bool) -> Program:
    return Program(parser.parse(ptx), fine)


class Emulator:
    """Takes Triton's launches over while it is entered. target: "sm_80" or "sm_90"."""

    def __init__(self, target: str, **options: Any):
        self.capability = int(target.removeprefix("sm_"))
        self.options = Options(**options)
        #: The PTX of each launch, with the kernel's name; and how it is changed before it is run.
        self.kernels: list[tuple[str, str]] = []
        self.edit: Callable[[str], str] | None = None
        self.launches = 0
        self._jitted: set[JITFunction] = set()
        #: Reads that are to see NaN, by launch and tensor.
        self._poison: dict[tuple[int, str], set] = {}
        self._fresh: dict[int, torch.UntypedStorage] = {}
        self._stack = contextlib.ExitStack()
        self.reset()

    def reset(self) -> None:
        """Forgets what was found, and which memory was fresh."""
        self.found: Counter[Key] = Counter()
        self.first: dict[Key, tuple[Report, str, str]] = {}
        self.serious: set[Key] = set()
        self.racy: dict[tuple[int, str], set] = {}
        #: Of the tensors' memory after each launch from the first on that raced; and why launches came to
        #: no end.
        self.digest = hashlib.sha256()
        self.faults: list[str] = []
        self.since = self.launches
        self._fresh.clear()
        #: Of memory that was fresh, by its address: which bytes kernels have written.
        self._init: dict[int, np.ndarray] = {}

    def __enter__(self) -> Emulator:
        run = JITFunction.run

        def emulate(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self._jitted.add(kernel)
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
            try:
                self._execute(kernel, compiled, grid, arguments, options)
            except (Fault, parser.PtxError) as error:  # who launches may catch it
                self.faults.append(f"{type(error).__name__}: {error}")
                raise
            # None: nothing that could be launched again

        patch = lambda *what: self._stack.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(triton.runtime.driver, "_active", Driver(GPUTarget("cuda", self.capability, 32)))
        patch(JITFunction, "run", emulate)
        patch(CUDABackend, "make_cubin", lambda *_, **__: b"")
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch(owner, name, self._noting(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for kernel in self._jitted:  # what Triton keeps of them is no code for any device, and megabytes
            kernel.device_caches.clear()
        self._jitted.clear()

    def _noting(self, make: Callable) -> Callable:
        def made(*arguments: Any, **options: Any) -> torch.Tensor:
            t = make(*arguments, **options)
            return self.uninitialised(t) if t.device.type == "cpu" else t

        return made

    def uninitialised(self, t: torch.Tensor) -> torch.Tensor:
        """The whole storage of t counts as memory that nobody has written, and is filled with NaN."""
        storage = t.untyped_storage()
        if storage.nbytes():
            mem = memory_of(storage.data_ptr(), storage.nbytes())
            mem[0::2], mem[1::2] = FRESH
            self._fresh[storage.data_ptr()] = storage  # kept, so that no other tensor gets its address
            self._init[storage.data_ptr()] = np.zeros(len(mem), bool)
        return t

    def rerun(self, run: Callable[[], T]) -> T | None:
        """Runs once more what was run since the last reset; reads that raced see NaN.

        Returns what run() does, or None: if nothing was run, since no read raced or something else was found;
        or if this time other reads raced or something else was found.
        """
        racy = self.racy
        if not racy or self.serious or self.faults:
            return None
        self.reset()
        self._poison = racy
        try:
            made = run()
        finally:
            self._poison = {}
        return made if self.racy == racy and not self.serious and not self.faults else None

    def _execute(
        self, kernel: JITFunction, compiled: Any, grid: Any, arguments: tuple, options: dict
    ) -> None:
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        bound |= {name: value for name, value in options.items() if name in kernel.arg_names}
        ptx = compiled.asm["ptx"]
        program = program_of(self.edit(ptx) if self.edit else ptx, self.options.by_warp)
        metadata, f = compiled.metadata, program.f
        if getattr(metadata, "global_scratch_size", 0) or f.threads != 32 * metadata.num_warps:
            raise parser.PtxError("the kernel wants scratch memory, or other threads than it says")
        params, tensors = _parameters(kernel, compiled, bound, f)
        number = self.launches - self.since
        self.launches += 1
        self.kernels.append((kernel.fn.__name__, ptx))
        machine = Machine(
            program, tuple(grid(bound) if callable(grid) else grid), f.threads, metadata.shared, params,
            self._storages(tensors), replace(self.options, seed=self.options.seed + 7919 * number),
            unit=UNITS.get(self.capability), together=bool(getattr(metadata, "launch_cooperative_grid",
            False)),
        )  # fmt: skip
        for region in machine.memory.regions:
            region.poison = self._poison.get((number, region.name), set())
        try:
            machine.run()
        finally:
            self.found.update(machine.reports.found)
            self.serious |= machine.reports.serious
            for key, report in machine.reports.first.items():
                texts = [f.lines[line - 1].strip() if line else "" for line in (report.line, report.other)]
                self.first.setdefault(key, (report, texts[0], texts[1]))
            self.racy |= {(number, r.name): r.racy for r in machine.memory.regions if r.racy}
            if self.racy:
                for region in sorted(machine.memory.regions, key=lambda r: r.name):  # addresses differ
                    self.digest.update(region.mem if region.valid is None else region.mem[region.valid])

    def _storages(self, tensors: list[tuple[str, torch.Tensor]]) -> dict[int, Storage]:
        """The memory of a launch's tensors. Several tensors may share a storage."""
        sharing: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, t in tensors:
            if t.untyped_storage().nbytes():
                sharing.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))
        found = {}
        for base, named in sharing.items():
            size = named[0][1].untyped_storage().nbytes()
            mem, name = memory_of(base, size), "+".join(name for name, _ in named)
            if size > LARGE:
                found[base] = Storage(mem, name)
                continue
            elements = [(t.element_size(), _bytes_of(t, size)) for _, t in named]
            valid = np.logical_or.reduce([mine for _, mine in elements])
            init, host = self._init.get(base), None
            if init is not None:  # what no kernel has written, and is another pattern by now, the host has
                host = ~init
                host[0::2] &= mem[0::2] != FRESH[0]
                host[1::2] &= mem[1::2] != FRESH[1]
                host = _whole_elements(host, elements)
            found[base] = Storage(mem, name, None if valid.all() else valid, init, host)
        return found

    def lines(self) -> list[str]:
        """The findings, one a line, the most frequent first."""
        out = []
        for key, n in self.found.most_common():
            report, text, other = self.first[key]
            against = f" against line {report.other} `{other}`" if report.other else ""
            out.append(f"{n} x {report.kind} at line {report.line} `{text}`{against}: {report.words}")
        return out

    def kinds(self) -> set[str]:
        return {kind for kind, _, _ in self.found}


def _parameters(kernel: JITFunction, compiled: Any, bound: dict, f: parser.Function) -> tuple[dict, list]:
    """The bits of each of the entry's parameters, and the arguments that are tensors."""
    constants = {kernel.arg_names[k[0]] if isinstance(k, tuple) else k for k in compiled.src.constants}
    bits, tensors = [], []
    for name in kernel.arg_names:
        kind = compiled.src.signature[name]
        if kind == "constexpr" or name in constants:
            continue
        value = bound[name]
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise ValueError(
                    f"{name} is on {value.device}; expected a CPU tensor, which can be emulated."
                )
            tensors.append((name, value))
            bits.append((value.data_ptr(), 64))
        else:
            width = int(kind.lstrip("iu"))
            bits.append((int(value) & ((1 << width) - 1), width))
    bits += [(0, 64)] * (len(f.params) - len(bits))  # addresses of scratch memory that there is none of
    if [parser.WIDTHS[kind] for _, kind in f.params] != [width for _, width in bits]:
        raise parser.PtxError(f"the entry's parameters are {f.params}, the arguments' widths {bits}")
    return {name: value for (name, _), (value, _) in zip(f.params, bits, strict=True)}, tensors


def _whole_elements(changed: np.ndarray, elements: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """`changed`, grown to whole elements. A byte is of the narrowest tensor that has it.

    An element of which a narrower tensor has a part stays as it is.
    elements: of each tensor the size of an element, and which bytes are its own.
    """
    out, taken = changed.copy(), np.zeros(len(changed), bool)
    for e, mine in sorted(elements, key=lambda pair: pair[0]):
        whole = len(changed) // e * e
        there = (mine & ~taken)[:whole].reshape(-1, e).all(1)
        there &= changed[:whole].reshape(-1, e).any(1)
        out[:whole].reshape(-1, e)[there] = True
        taken |= mine
    return out


def _bytes_of(t: torch.Tensor, size: int) -> np.ndarray:
    """Which of the `size` bytes of its storage belong to the tensor."""
    mine = torch.zeros(size, dtype=torch.bool)
    e = t.element_size()
    strides = (*(s * e for s in t.stride()), 1)
    mine.as_strided((*t.shape, e), strides, t.storage_offset() * e).fill_(True)
    return mine.numpy()
