"""What bounds a loop in C over the steps of a layer on a CPU: its rates, measured by loops.c, and its time.

A step reads W_hh, from the cache that holds it, or does its multiply-adds, whichever takes longer; then it
takes tanh. Threads share the work in one of two ways: each has rows (of a layer and direction) to itself,
or all share every row's columns, and then a step begins with what another core has written.

loops.c is compiled as kernels/native.c is, which it includes.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.contenders import storage
from bench.measure import quantile
from bench.workloads import Workload
from elman import compiled

SOURCE = Path(__file__).with_suffix(".c")
READ, MULTIPLY_ADD, TANH = range(3)
KIB, MIB = 1 << 10, 1 << 20
#: Bytes that all threads read together: 4 KiB to 64 MiB, each about 1.4 times the one before.
SIZES = tuple(round(4 * KIB * 2 ** (n / 2)) for n in range(29))
#: Bytes of a thread's numbers whose tanh is taken: within the first cache.
SMALL = 8 * KIB
#: Seconds of one call, and the fewest calls of each probe.
CALL, LEAST = 1e-3, 7
TURNS = 2000

#: The best of several calls, their median, their 20% and their 80% quantile.
Rate = list[float]


def unavailable() -> str | None:
    """None if the C code can be compiled and loaded, else why not."""
    try:
        compiled.library(source=SOURCE)
    except compiled.CompileError as error:
        return str(error)
    return None


# --- The time --------------------------------------------------------------------------------------------


def pass_seconds(w: Workload, backward: bool, rates: dict[str, Any], matrix: float) -> tuple[float, float]:
    """Seconds of a pass at least, and of these the ones of products over the whole sequence.

    rates: what measure() returned. matrix: flop a second of large products, of all cores.

    Rows may be few enough for one core alone, while the others do the products: then those take no time of
    their own, as long as all cores together do all the work in that time.
    """
    threads = max(map(int, rates["multiply_add"]))
    matrices = w.layers * (1 + w.bidirectional)
    apart = busy = together = 0.0
    for rows, steps in _rows(w).items():
        chains = rows * matrices
        each = math.ceil(chains / threads)
        apart += steps * _step(w, each, math.ceil(each / rows), backward, rates, "1", matrix)
        busy += steps * _step(w, chains, matrices, backward, rates, "1", matrix) / threads
        together += steps * _step(w, chains, matrices, backward, rates, str(threads), matrix)
    recurrent = 2 * w.row_steps * matrices * w.hidden_size**2
    products = ((2 if backward else 1) * w.flops - recurrent) / matrix
    seconds = max(apart, busy + products)
    if rates["core_to_core"]:
        seconds = min(seconds, together + w.steps * rates["core_to_core"][0] + products)
    return seconds, products


def _rows(w: Workload) -> Counter[int]:
    """How many steps have so many rows."""
    if w.lengths is None:
        return Counter({w.batch: w.steps})
    return Counter(sum(length > t for length in w.lengths) for t in range(w.steps))


def _step(
    w: Workload, rows: int, matrices: int, backward: bool, rates: dict[str, Any], threads: str, matrix: float
) -> float:
    """Seconds of a step of so many rows by so many threads, which read so many W_hh.

    The rates are float32's. In other dtypes a vector has more or fewer numbers, and some CPUs have units of
    their own for products of 16 bits.
    """
    itemsize, H = storage(w.dtype).itemsize, w.hidden_size
    more = 4 / itemsize
    multiply_adds = max(more * _fastest(rates["multiply_add"], threads), matrix / 2 if itemsize == 2 else 0)
    weights = matrices * H * H * itemsize
    product = max(weights / _fastest(rates["read"], threads, weights), rows * H * H / multiply_adds)
    free = backward or w.nonlinearity == "relu"
    return product if free else product + rows * H / (more * _fastest(rates["tanh"], threads))


def _fastest(rates: dict[str, Any], threads: str, size: int = 0) -> float:
    """What so many cores did at best, or their part of what more did: other programs slow one or the other.

    size: bytes that they read together, if the rates are those of reading.
    """
    found = []
    for n, measured in rates.items():
        cores = int(n) / int(threads)
        if cores >= 1:
            found.append((read_rate(round(cores * size), measured) if size else measured[0]) / cores)
    return max(found)


def read_rate(size: int, measured: Sequence[Sequence[float]]) -> float:
    """Bytes a second where so many are read: the best of all sizes not smaller, and of the one below.

    The one below, because between the two a cache may end; beyond the largest it is the largest's.
    """
    below = max((at for at, *_ in measured if at <= size), default=0)
    return max(rate for at, rate, *_ in measured if at >= below)


# --- The rates -------------------------------------------------------------------------------------------


def measure(threads: int, *, seconds: float = 0.02, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """What one core and `threads` cores do, each thing sampled for about so many seconds; ready for JSON.

        read            {threads: [[bytes, *Rate of bytes a second], ...]}, each thread with its part of them
        multiply_add    {threads: Rate of multiply-adds a second}
        tanh            {threads: Rate of numbers a second}
        core_to_core    Rate in seconds, the best the shortest; None with one thread, or if two did not
                        run at once

    All in float32; the keys are "1" and, if there are more, str(threads). Raises CompileError.
    """
    sides = sorted({1, threads})
    most = max(*sizes, SMALL) // 4
    data = torch.rand(most + Loop.at_once())
    with ThreadPoolExecutor(threads) as pool:

        def rate(kind: int, count: int, n: int) -> Rate:
            return _rate(Loop(kind, data, count // n, n, pool), seconds)

        return {
            "read": {
                str(n): [[size, *_bytes(rate(READ, size // 4, n))] for size in sorted(sizes)] for n in sides
            },
            "multiply_add": {str(n): rate(MULTIPLY_ADD, n * SMALL // 4, n) for n in sides},
            "tanh": {str(n): rate(TANH, n * SMALL // 4, n) for n in sides},
            "core_to_core": _core_to_core(pool, seconds) if threads > 1 else None,
        }


def _bytes(rate: Rate) -> Rate:
    return [4 * each for each in rate]


class Loop:
    """One kind of loop by so many threads at once, each over `count` numbers of its own."""

    def __init__(
        self, kind: int, data: torch.Tensor, count: int, threads: int, pool: ThreadPoolExecutor
    ) -> None:
        self.kind, self.threads, self.pool = kind, threads, pool
        self.count = max(1, count // self.at_once()) * self.at_once()
        self.data = data
        self.out = torch.empty(threads, self.count if kind == TANH else 0)
        self.probe = compiled.library(source=SOURCE).probe

    @staticmethod
    def at_once() -> int:
        """Numbers that a loop takes at once: it works on multiples."""
        return int(compiled.library(source=SOURCE).at_once())

    def __call__(self, passes: int) -> float:
        """Numbers a second: those of each thread, added up."""
        arrived = ctypes.c_int64(0)

        def thread(n: int) -> float:
            span = (ctypes.c_double * 2)()
            begin = min(n * self.count, len(self.data) - self.count) if self.kind == READ else 0
            self.probe(
                ctypes.c_int64(self.kind),
                ctypes.c_void_p(self.data[begin:].data_ptr()),
                ctypes.c_void_p(self.out[n].data_ptr()),
                ctypes.c_int64(self.count),
                ctypes.c_int64(passes),
                ctypes.byref(arrived),
                ctypes.c_int64(self.threads),
                span,
            )
            return self.count * passes / max(span[1] - span[0], 1e-9)

        return sum(self.pool.map(thread, range(self.threads)))


def _rate(loop: Loop, seconds: float) -> Rate:
    passes, work = 1, loop.count * loop.threads
    while passes * work / (found := loop(passes)) < CALL / 2:
        passes = math.ceil(passes * min(64, CALL * found / (passes * work)))
    rates = _sampled(lambda: loop(passes), seconds)
    return [max(rates), *(quantile(rates, q) for q in (0.5, 0.2, 0.8))]


def _core_to_core(pool: ThreadPoolExecutor, seconds: float) -> Rate | None:
    function = compiled.library(source=SOURCE).core_to_core
    function.restype = ctypes.c_double

    def both() -> float:
        turn = ctypes.c_int64(0)
        threads = [
            pool.submit(function, ctypes.byref(turn), ctypes.c_int64(self), ctypes.c_int64(TURNS))
            for self in (0, 1)
        ]
        return max(thread.result() for thread in threads)

    found = [taken for taken in _sampled(both, seconds) if math.isfinite(taken)]
    return [min(found), *(quantile(found, q) for q in (0.5, 0.2, 0.8))] if found else None


def _sampled(call: Callable[[], float], seconds: float) -> list[float]:
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < LEAST or time.perf_counter() < end:
        found.append(call())
    return found
