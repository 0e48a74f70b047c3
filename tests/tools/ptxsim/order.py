"""What comes before what, and what was found: vector clocks of warps, and reports.

PTX ISA, section "Memory Consistency Model": a barrier orders what its threads did before it and do after it,
a release what came before it with what follows an acquire that sees it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Report:
    """kind: race, conflict, uninitialised, outside, async, proxy, barrier or lanes (README.md).

    line, other: PTX lines of the two accesses; other 0: there is one only.
    """

    kind: str
    line: int
    other: int
    words: str


Key = tuple[str, int, int]  # kind, line, other


class Reports:
    """Findings by key: how often, and the first of each.

    serious: all but races of reads that can be made to see NaN: if nothing comes of that, nobody uses them.
    """

    def __init__(self) -> None:
        self.found: Counter[Key] = Counter()
        self.first: dict[Key, Report] = {}
        self.serious: set[Key] = set()

    def add(self, kind: str, line: int, other: int, words: str, serious: bool = True) -> None:
        key = (kind, line, other)
        self.found[key] += 1
        if serious:
            self.serious.add(key)
        self.first.setdefault(key, Report(kind, line, other, words))


class Clocks:
    """known[g, w]: up to which clock of warp w warp g knows what it did. A warp is known by its number
    gid."""

    def __init__(self, warps: int):
        self.known = np.zeros((warps, warps), np.int32)
        np.fill_diagonal(self.known, 1)
        #: Likewise: up to which clock its writes are past a fence of the asynchronous proxy.
        self.fenced = np.zeros((warps, warps), np.int32)
        #: By region and byte, the warp that released last, and what who acquires there knows.
        self._released: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def now(self, gids: np.ndarray) -> np.ndarray:
        return self.known[gids, gids]

    def barrier(self, gids: np.ndarray) -> None:
        self.known[gids] = self.known[gids].max(0)
        self.fenced[gids] = self.fenced[gids].max(0)
        self.known[gids, gids] += 1

    def proxy_fence(self, gid: int) -> None:
        np.maximum(self.fenced[gid], self.known[gid], out=self.fenced[gid])
        self.known[gid, gid] += 1

    def release(self, gid: int, place: tuple[int, int]) -> None:
        known = self.known[gid].copy()
        if place in self._released:
            np.maximum(known, self._released[place][1], out=known)
        self._released[place] = gid, known
        self.known[gid, gid] += 1

    def overwrite(self, gids: np.ndarray, region: int, off: np.ndarray, size: int) -> None:
        """Stores of `size` bytes: who finds another warp's in a release's place acquires nothing of it."""
        for place, (gid, _) in [*self._released.items()]:
            over = (off <= place[1]) & (place[1] < off + size)
            if place[0] == region and (gids[over] != gid).any():
                del self._released[place]

    def acquire(self, gid: int, place: tuple[int, int]) -> None:
        if place in self._released:
            np.maximum(self.known[gid], self._released[place][1], out=self.known[gid])
