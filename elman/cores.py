"""How native shares its work out over cores: a scan by a model of its time, a product by its multiply-adds.

One core does all of a scan, or each thread has rows of its own, or columns of its own. The first two need no
synchronisation; for the third the threads synchronise at every step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .reference import COMPUTE

#: Multiply-adds up to which a product is one core's: more repay the moment that another one takes to begin.
SHARED = 2**18
#: Rows of all steps up to which W_hh is read where it lies: copied into panels it is read faster, more often.
UNPACKED = 16
LARGEST = 32  # ROWS of the C source: rows of a work item, at most
NARROWEST = 64  # columns of a group: PANEL of the C source, at most


class Plan(NamedTuple):
    """How a scan is shared out: threads, rows of a work item, and groups that the columns are cut into."""

    threads: int
    rows: int
    groups: int


# The model of a scan's time, in nanoseconds, measured on an AMD EPYC (family 25, model 17, AVX2). It decides
# on threads and on nothing else, and no bit of a result depends on it.
MULTIPLY_ADD = 0.043, 0.028  # of up to eight rows, and of more
READ = 0.0125, 0.017  # of W_hh, a byte, from a core's own caches and from beyond them
CACHE = 2**20  # bytes of a core's own caches
ELEMENT = 0.5  # a tanh, and what goes with it
STEP = 80.0  # where a step's rows lie
SYNCHRONISATION = 400.0  # where each thread has columns of its own, a step
THREAD = 25_000.0  # to have a thread made, and to wait for it


def plan(B: int, H: int, T: int, D: int, itemsize: int = 4) -> Plan:
    """The quickest by the model, of at most as many threads as torch has."""
    return _plan(B, H, T, D, itemsize, torch.get_num_threads())


@functools.lru_cache(1024)
def _plan(*problem: int) -> Plan:
    return min(estimates(*problem).items(), key=lambda pair: pair[1])[0]


def estimates(B: int, H: int, T: int, D: int, itemsize: int, most: int) -> dict[Plan, float]:
    """What a step of a scan takes in each way of sharing it out, in microseconds by the model."""

    def step(rows: int, columns: int) -> float:
        size = columns * H * itemsize
        read = READ[size > CACHE] * size * -(-rows // LARGEST)
        product = max(read, rows * columns * H * MULTIPLY_ADD[rows > 8] * itemsize / 4)
        return STEP + product + rows * columns * ELEMENT * itemsize / 4

    alone = Plan(1, min(B, LARGEST), 1)
    found = {alone: D * step(B, H)}
    if T * found[alone] > 4 * THREAD and most > 1:  # else a thread has hardly begun
        for n in sorted({min(2**i, most) for i in range(1, most.bit_length() + 1)}):
            made = (n - 1) * THREAD / T
            rows = -(-B // -(-n // D))  # a block of rows for each thread and direction
            if n <= D * B:
                found[Plan(n, min(rows, LARGEST), 1)] = -(-D * -(-B // rows) // n) * step(rows, H) + made
            groups = min(n, -(-H // NARROWEST))
            if groups > 1:
                found[Plan(n, min(B, LARGEST), groups)] = (
                    D * step(B, -(-H // groups)) + SYNCHRONISATION + made
                )
    return {shared: time / 1000 for shared, time in found.items()}


def explain(
    B: int, I: int, H: int, T: int, D: int, dtype: torch.dtype, plain: bool
) -> tuple[dict[str, int], str]:
    """How a forward pass is shared out, and why, in words; plain: it has no lengths and no resets."""
    if plain and (T == 1 or (T * B <= UNPACKED and dtype not in COMPUTE)):
        work = B * H * (H + I * (T == 1))
        n = 1 if work <= SHARED else torch.get_num_threads()
        few = "one step is no scan:" if T == 1 else f"W_hh, which {T * B} rows use, is read where it lies:"
        which = "one thread, as up to" if n == 1 else f"as many threads as torch has, {n}, as more than"
        return {"threads": n}, f"{few} a step's {work} multiply-adds are on {which} {SHARED} are"
    itemsize = 8 if dtype == torch.float64 else 4
    found = estimates(B, H, T, D, itemsize, torch.get_num_threads())
    chosen, one = plan(B, H, T, D, itemsize), next(iter(found))
    text = f"by its model {found[one]:.2f} us a step on one core"
    if chosen.threads > 1:
        what = "columns" if chosen.groups > 1 else "rows or directions"
        text += f", {found[chosen]:.2f} with the {what} over {chosen.threads}"
    return chosen._asdict(), f"{text}, the input product not counted"
