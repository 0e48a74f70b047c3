"""Global memory: a launch's regions at their addresses, and stores that other programs see late.

PTX ISA, section "Memory Consistency Model".
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .regions import Region, span, views_of

u64 = np.uint64


class WeakStores:
    """Stores that other programs see only later, and in any order, unless a release comes after them."""

    def __init__(self, region: Region):
        self.region = region
        region.latest = views_of(region.mem.copy())
        self.pending: list[tuple[int, int, np.ndarray, int]] = []  # program, offset, bytes, warp
        #: Of each program and byte, how many of its stores are pending, and what the last of them wrote.
        self.own: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def delay(self, program: int, off: np.ndarray, data: np.ndarray, size: int, gids: np.ndarray) -> None:
        """data: (n, bytes), elements of `size` bytes, which come one by one."""
        gids = np.repeat(gids, data.shape[1] // size)
        off = (off[:, None] + np.arange(0, data.shape[1], size)).ravel()
        data = data.reshape(-1, size).copy()
        items = zip(off.tolist(), data, gids.tolist(), strict=True)
        self.pending += [(program, o, d, g) for o, d, g in items]
        if program not in self.own:
            self.own[program] = np.zeros(len(self.region.mem), np.int32), np.zeros_like(self.region.mem)
        count, last = self.own[program]
        idx = off[:, None] + span(size)
        np.add.at(count, idx, 1)
        last[idx] = data

    def seen_by(self, program: int, idx: np.ndarray) -> np.ndarray:
        """These bytes, as the program has stored them itself, or as all see them."""
        if program not in self.own:
            return self.region.mem[idx]
        count, last = self.own[program]
        return np.where(count[idx] > 0, last[idx], self.region.mem[idx])

    def some(self, random: Any) -> int:
        """A few of them, drawn, become visible to all: how many."""
        most = random.choice((0, random.randint(0, min(64, len(self.pending)))))
        for _ in range(most):
            k = random.randrange(len(self.pending))
            while (older := self._older(k)) is not None:
                k = older
            self._land(*self.pending.pop(k))
        return most

    def _older(self, k: int) -> int | None:
        """One of the same bytes, which the k-th may not pass."""
        _, off, data, _ = self.pending[k]
        if sum(count[off : off + len(data)].max() for count, _ in self.own.values()) == 1:
            return None
        before = enumerate(self.pending[:k])
        return next((n for n, (_, o, d, _) in before if o < off + len(data) and off < o + len(d)), None)

    def settle(self, program: int, off: np.ndarray, size: int) -> None:
        """What the program itself has stored there is visible to all: an atomic operation comes after it."""
        if program in self.own and self.own[program][0][off[:, None] + span(size)].any():
            self.flush(program)

    def flush(self, program: int | None = None) -> None:
        """All of a program's, or of all programs'."""
        for item in self.pending:
            if program in (None, item[0]):
                self._land(*item)
        self.pending = [item for item in self.pending if program not in (None, item[0])]

    def _land(self, program: int, off: int, data: np.ndarray, gid: int) -> None:
        self.region.mem[off : off + len(data)] = data
        self.region.clocks.overwrite(np.array([gid]), id(self.region), np.array([off]), len(data))
        self.own[program][0][off : off + len(data)] -= 1


class GlobalMemory:
    """The regions of a launch, at their own addresses."""

    def __init__(self, regions: dict[int, Region]):
        self.regions = [regions[base] for base in sorted(regions)]
        self._bases = np.array(sorted(regions), np.uint64)
        self._ends = self._bases + np.array([len(r.mem) for r in self.regions], np.uint64)

    def find(self, address: np.ndarray, width: int) -> tuple[list, np.ndarray | None]:
        """[(region, which of the addresses, their offsets)]; or which of them are out of bounds."""
        k = np.searchsorted(self._bases, address, side="right") - 1
        bad = (k < 0) | (address + u64(width) > self._ends[np.maximum(k, 0)])
        if bad.any():
            return [], bad
        if (k == k[0]).all():
            return [(self.regions[k[0]], None, (address - self._bases[k[0]]).astype(np.int64))], None
        groups = [(i, np.nonzero(k == i)[0]) for i in np.unique(k)]
        return [(self.regions[i], n, (address[n] - self._bases[i]).astype(np.int64)) for i, n in groups], None

    def near(self, address: int) -> str:
        """The tensor nearest to an address out of bounds."""
        places = zip(self._bases.tolist(), self._ends.tolist(), self.regions, strict=True)
        away, base, end, name = min((max(b - address, address - e), b, e, r.name) for b, e, r in places)
        if away >= 4096:
            return "no tensor near"
        return f"{name} has {end - base} bytes, this is at {address - base}"

    def flush(self, program: int | None = None) -> None:
        for region in self.regions:
            if region.weak is not None:
                region.weak.flush(program)


def memory_of(base: int, size: int) -> np.ndarray:
    """The bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
