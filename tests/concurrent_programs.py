"""Real concurrency without a GPU: each program of a cooperative launch in a process of its own, interpreted.

    with Programs() as programs, programs.at_once(4):
        output = cooperative.scan(...)

Within `at_once` the launchers of kernels/cooperative.py find a chip of so many processors and launch on
worker processes. A launch's tensors lie in one block of memory that all of them share, and the
interpreter's atomics are real ones there. Nothing waits without a limit: a launch that doesn't end, and a
worker that dies, raise a LaunchError, and all workers are killed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

MEMORY = 1 << 24
#: Seconds: for the workers to import torch and triton, and for one launch.
START_LIMIT, LAUNCH_LIMIT = 180, 60


class LaunchError(AssertionError):
    """A launch on worker processes did not come to its end."""


@dataclass(frozen=True)
class Late:
    """One program that loses time: `start` seconds before its first step, then some at random."""

    program: int
    seed: int = 0
    start: float = 0.0


@dataclass(frozen=True)
class _Place:
    """A tensor in the shared memory; offset in bytes."""

    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    def tensor(self, memory: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        start = self.offset // self.dtype.itemsize
        return empty.set_(memory.untyped_storage(), start, self.shape, self.strides)


@dataclass(frozen=True)
class _Work:
    """What a worker is to run: program `index` of the grid, `late` where it is the one that loses time."""

    kernel: str
    grid: tuple[int, int]
    index: tuple[int, int]
    arguments: list
    options: dict
    late: Late | None


class Programs:
    """Worker processes, started at the first launch and again at the first one after a failure."""

    def __init__(self, workers: int = 4) -> None:
        self._workers = workers
        self.processes: list = []
        self._connections: list[Connection] = []
        self._memory = torch.empty(MEMORY, dtype=torch.uint8).share_memory_()
        #: The arguments of the latest launch by name, as it left them.
        self.arguments: dict[str, Any] = {}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    @contextmanager
    def at_once(
        self,
        processors: int,
        *,
        late: Late | None = None,
        missing: int | None = None,
        patience: int | None = None,
    ) -> Iterator[None]:
        """Launches run their programs on that many processes, but for the missing one, which nobody runs."""
        from elman.kernels import configs, cooperative

        def run(kernel: Any, grid: tuple[int, int], arguments: tuple, options: dict) -> None:
            self.arguments = dict(zip(kernel.arg_names, arguments, strict=False))
            self._launch(kernel.__name__, grid, arguments, options, late, missing)

        chip = replace(configs.DEFAULT_CHIP, processors=processors)
        waits = cooperative.PATIENCE if patience is None else patience
        with mock.patch.multiple(cooperative, _run=run, chip=lambda device: chip, PATIENCE=waits):
            yield

    def _launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        arguments: tuple,
        options: dict,
        late: Late | None,
        missing: int | None,
    ) -> None:
        indices = [(n, g) for g in range(grid[1]) for n in range(grid[0])]
        assert len(indices) <= self._workers, f"a grid of {grid} on {self._workers} workers"
        self.start()
        storages, places = self._lay_out(arguments)
        running = [i for i in range(len(indices)) if i != missing]
        for i in running:
            mine = late if late is not None and late.program == i else None
            self._tell(i, _Work(kernel, grid, indices[i], places, options, mine))
        self._gather(running, LAUNCH_LIMIT)
        for offset, storage in storages:
            _bytes(storage).copy_(self._memory[offset : offset + storage.nbytes()])

    def _lay_out(self, arguments: tuple) -> tuple[list, list]:
        """Copies the tensors' storages into the shared memory, each once: several tensors may lie in one."""
        offsets: dict[int, int] = {}
        storages, places, end = [], [], 0
        for argument in arguments:
            if not isinstance(argument, Tensor):
                places.append(argument)
                continue
            storage = argument.untyped_storage()
            if storage.data_ptr() not in offsets:
                offsets[storage.data_ptr()] = end
                storages.append((end, storage))
                assert end + storage.nbytes() <= MEMORY, "the tensors take more memory than is shared"
                self._memory[end : end + storage.nbytes()].copy_(_bytes(storage))
                end += -(-storage.nbytes() // 64) * 64
            offset = offsets[storage.data_ptr()] + int(argument.storage_offset()) * argument.element_size()
            places.append(_Place(argument.dtype, offset, argument.shape, argument.stride()))
        return storages, places

    def start(self) -> None:
        """Starts the workers where none run, and waits until all are ready."""
        if self.processes:
            return
        spawn = mp.get_context("spawn")
        for _ in range(self._workers):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(there, self._memory), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._connections.append(here)
        self._gather(range(self._workers), START_LIMIT)

    def _gather(self, workers: Any, limit: float) -> None:
        """Waits until each of these workers has said that it is done."""
        waiting = {self._connections[i]: i for i in workers}
        end = time.monotonic() + limit
        try:
            while waiting:
                ready = wait(list(waiting), max(0, end - time.monotonic()))
                if not ready:
                    names = ", ".join(map(str, waiting.values()))
                    raise LaunchError(f"Programs {names} are still at work after {limit} seconds.")
                for connection in ready:
                    self._hear(waiting.pop(connection))
        except BaseException:
            self._kill()
            raise

    def _tell(self, worker: int, work: _Work) -> None:
        try:
            self._connections[worker].send(work)
        except ConnectionError:  # it may die before as well as after
            self._kill()
            raise LaunchError(f"The process of program {worker} died.") from None

    def _hear(self, worker: int) -> None:
        try:
            said = self._connections[worker].recv()
        except (EOFError, ConnectionError):
            raise LaunchError(f"The process of program {worker} died.") from None
        if said:
            raise LaunchError(f"Program {worker} failed:\n{said}")

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self._connections, strict=True):
            process.join(10)
            connection.close()
        self.processes, self._connections = [], []


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _work(connection: Connection, memory: Tensor) -> None:
    """A worker's life: runs what it is sent and answers "", or what went wrong, until it is killed."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # NumPy's, about NaN and infinity
    from triton.runtime import interpreter

    from elman.kernels import cooperative

    _patch_once(interpreter)
    connection.send("")
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        try:
            arguments = [a.tensor(memory) if isinstance(a, _Place) else a for a in work.arguments]
            with _one_program(work):
                getattr(cooperative, work.kernel)[(1, 1)](*arguments, **work.options)
            connection.send("")
        except Exception:
            connection.send(traceback.format_exc())


def _die_with_parent() -> None:
    """A worker that waits for the others in a kernel hears of nothing else."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def dot_in_order(a: Any, b: Any, acc: Any, *_: Any) -> Any:
    """The interpreter's product without BLAS, whose order of summation differs with the widths of a tile."""
    total = acc.data.copy()
    for k in range(a.data.shape[-1]):
        total += a.data[..., k, None] * b.data[..., k, None, :]
    return replace(acc, data=total)


def _patch_once(interpreter: Any) -> None:
    """Looking at every call of a function for what to patch takes a third of the interpreter's time."""
    patch, patched = interpreter._patch_lang, set()

    def patch_for_good(function: Any) -> Any:
        module = function.__module__
        if module not in patched:
            patch(function)
            patched.add(module)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_for_good


@contextmanager
def _one_program(work: _Work) -> Iterator[None]:
    """The interpreter takes a launch of one program for the one that `work` names, in its grid."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_index, load = builder.set_grid_dim, builder.set_grid_idx, builder.create_masked_load

    def polite_load(*arguments: Any) -> Any:
        time.sleep(0.0005)  # there are fewer cores than programs
        return load(*arguments)

    with ExitStack() as patches:
        for name, function in {
            "set_grid_dim": lambda x, y, z: set_dim(*work.grid, 1),
            "set_grid_idx": lambda x, y, z: set_index(*work.index, 0),
            "create_masked_load": polite_load,
            "create_dot": dot_in_order,
        }.items():
            patches.enter_context(mock.patch.object(builder, name, function))
        if work.late is not None:
            time.sleep(work.late.start)
            patches.enter_context(_delays(builder, work.late.seed))
        yield


@contextmanager
def _delays(builder: Any, seed: int) -> Iterator[None]:
    """Waits of up to 10 ms before some loads, and in the middle of some stores: a tile's is not atomic."""
    random = np.random.default_rng(seed)
    load, store = builder.create_masked_load, builder.create_masked_store

    def late_load(*arguments: Any) -> Any:
        if random.random() < 0.1:
            time.sleep(0.01 * random.random())
        return load(*arguments)

    def late_store(pointers: Any, values: Any, mask: Any, *rest: Any) -> None:
        first = replace(mask, data=mask.data & (random.random(mask.data.shape) < random.random()))
        store(pointers, values, first, *rest)
        if random.random() < 0.5:
            time.sleep(0.01 * random.random())
        store(pointers, values, replace(mask, data=mask.data & ~first.data), *rest)

    with mock.patch.multiple(builder, create_masked_load=late_load, create_masked_store=late_store):
        yield
