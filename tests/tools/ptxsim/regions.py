"""Memory with shadows: its bounds, and who wrote and read each byte.

Two accesses of a byte, one of them a write, of which neither is known to the other's warp (order.py), are a
race, in whatever order they came.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .order import Clocks, Reports

u8 = np.uint8
UINT = {size: np.dtype(f"u{size}").type for size in (1, 2, 4, 8)}
#: A clock of what has not ended yet.
FOREVER = 1 << 30
#: Memory that nobody has written holds these two bytes by turns: NaN in every floating dtype, and nothing
#: that a kernel writes. So does a read that is to see NaN.
FRESH = b"\xfe\x7f"
#: As a number of so many bytes.
NAN = {size: int.from_bytes((FRESH * 4)[:size], "little") for size in UINT}
#: Larger memory is an expanded tensor's or a stride's of 2^31 elements: only its bounds are checked.
LARGE = 1 << 28
#: Bytes times warps up to which each reader of each byte is recorded.
READERS = 1 << 28
#: The name of a program's own memory.
SHARED = "shared memory"  # no tensor has such a name


@lru_cache
def span(n: int) -> np.ndarray:
    return np.arange(n)


def views_of(mem: np.ndarray) -> dict[int, np.ndarray]:
    """The bytes as numbers, by their size."""
    return {size: mem[: len(mem) // size * size].view(t) for size, t in UINT.items()}


class Threads(NamedTuple):
    """Of each thread of an access: its warp, its lane, and how often its warp has been synchronised."""

    gids: np.ndarray
    lane: np.ndarray
    epoch: np.ndarray


class Access(NamedTuple):
    """idx: the bytes of each thread; gids: their warps."""

    idx: np.ndarray
    gids: np.ndarray
    spec: Any


class Region:
    """Bytes that `warps` warps from gid0 on can reach.

    init: which bytes kernels have written, host: which the host; no init: all hold something. valid: which
    belong to a tensor; None: all. lanes: whether the order between a warp's lanes is looked at too.
    """

    def __init__(
        self, mem: np.ndarray, name: str, clocks: Clocks, gid0: int, warps: int, reports: Reports,
        *, init: np.ndarray | None = None, host: np.ndarray | None = None, valid: np.ndarray | None = None,
        lanes: bool = False,
    ):  # fmt: skip
        self.mem, self.name, self.clocks, self.gid0, self.warps = mem, name, clocks, gid0, warps
        self.reports, self.init, self.host, self.valid, self.lanes = reports, init, host, valid, lanes
        self.views = views_of(mem)
        #: What is there once all stores that are under way have come.
        self.latest = self.views
        self.large = len(mem) > LARGE
        n = 1 if self.large else len(mem)
        self.written = False
        self.writer, self.write_clock, self.write_line = (np.zeros(n, np.int32) for _ in range(3))  # gid + 1
        self.copied = np.zeros(n, bool)  # by cp.async
        self.read_line = np.zeros(n, np.int32)
        #: Of each reader its clock; where those are too many the last reader's alone, as gid + 1.
        few = n * warps <= READERS
        self.reader = None if few else np.zeros(n, np.int32)
        self.read_clock = np.zeros((n, warps) if few else n, np.int32)
        #: Bytes that wgmma is reading and cp.async is writing.
        self.reading, self.writing = np.zeros(n, np.int16), np.zeros(n, np.int16)
        if lanes:
            self.write_lane, self.read_lane = np.zeros(n, np.int16), np.zeros(n, np.int16)
            self.write_epoch, self.read_epoch = np.zeros(n, np.int32), np.zeros(n, np.int32)
        #: Reads that race, as (warp, byte, clock), and those that are to see NaN. They can in global memory,
        #: if all of a byte's readers are known.
        self.can_poison = name != SHARED and self.reader is None
        self.racy: set[tuple[int, int, int]] = set()
        self.poison: set[tuple[int, int, int]] = set()
        self.weak: Any = None  # global_memory.WeakStores

    def report(
        self, kind: str, words: str, bad: np.ndarray, access: Access, others: Any = None, serious: bool = True
    ) -> None:
        """Says which of an access's bytes are bad, if any. others: lines of what they clash with."""
        if bad.any():
            where = tuple(np.argwhere(bad)[0])
            byte, warp = int(access.idx[where]), int(access.gids[where[0]])
            text = f"{words}: {self.name}+{byte}, warp {warp}, {int(bad.sum())} bytes"
            other = 0 if others is None else int(others[where])
            self.reports.add(kind, access.spec.line, other, text, serious)

    def read(
        self, off: np.ndarray, width: int, threads: Threads, spec: Any, *, ordered: bool = True,
        clock: int | None = None,
    ) -> None:  # fmt: skip
        """Checks and notes a read of `width` bytes from each offset.

        Not ordered: it may race, as polling does. clock: when it ends, if not now.
        """
        if self.large:
            return
        idx, gids = off[:, None] + span(width), threads.gids
        access, lines = Access(idx, gids, spec), self.write_line[idx]
        if self.valid is not None:
            self.report("outside", "a read outside its tensor", ~self.valid[idx], access)
        if self.init is not None:
            bad = ~self.init[idx] if self.host is None else ~(self.init[idx] | self.host[idx])
            self.report("uninitialised", "a read of what nobody wrote", bad, access)
        self.report("async", "a read of what cp.async is still writing", self.writing[idx] > 0, access, lines)
        if not ordered:
            return
        if self.written:
            bad, writer = self._unknown_writes(idx, gids), self.writer[idx]
            if bad.any():
                words = "a read that no barrier puts after the write"
                self.report("race", words, bad, access, lines, serious=self.name == SHARED)
                now = self.clocks.now(gids)
                self.racy |= {(int(gids[k]), int(idx[k, b]), int(now[k])) for k, b in np.argwhere(bad)}
            if self.lanes:
                bad = (writer == gids[:, None] + 1) & (self.write_lane[idx] != threads.lane[:, None])
                bad &= self.write_epoch[idx] == threads.epoch[:, None]
                self.report("lanes", "another lane's write, no bar.warp.sync between", bad, access, lines)
        now = self.clocks.now(gids) if clock is None else np.full(len(gids), clock, np.int32)
        self.note_read(idx, gids, now)
        self.read_line[idx] = spec.line
        if self.lanes:
            self.read_lane[idx] = threads.lane[:, None]
            self.read_epoch[idx] = threads.epoch[:, None]

    def _unknown_writes(self, idx: np.ndarray, gids: np.ndarray) -> np.ndarray:
        """Whether a byte's last writer is one that the warps don't know to be done."""
        writer = self.writer[idx]
        return (self.write_clock[idx] > self.clocks.known[gids[:, None], writer - 1]) & (writer > 0)

    def note_read(self, idx: np.ndarray, gids: np.ndarray, clocks: np.ndarray) -> None:
        if self.reader is None:
            self.read_clock[idx, (gids - self.gid0)[:, None]] = clocks[:, None]
        else:
            self.reader[idx] = gids[:, None] + 1
            self.read_clock[idx] = clocks[:, None]

    def write(self, off: np.ndarray, data: np.ndarray, threads: Threads, spec: Any) -> None:
        """Checks and notes a write of data (n, bytes), before it is done."""
        if self.large:
            return
        idx, gids = off[:, None] + span(data.shape[1]), threads.gids
        access, reads, writes = Access(idx, gids, spec), self.read_line[idx], self.write_line[idx]
        if self.valid is not None:
            self.report("outside", "a write outside its tensor", ~self.valid[idx], access)
        self.report("async", "a write to what wgmma is still reading", self.reading[idx] > 0, access, reads)
        self.report(
            "async", "a write to what cp.async is still writing", self.writing[idx] > 0, access, writes
        )
        changes = self.latest[1][idx] != data  # the same value twice does no harm
        if self.written:
            bad = self._unknown_writes(idx, gids) & changes
            self.report("race", "two writes, no barrier between", bad, access, writes)
        bad = self.unknown_reads(idx, gids) & changes
        if bad.any():
            words = "a write that no barrier puts after the read"
            self.report("race", words, bad, access, reads, serious=not self.can_poison)
            if self.can_poison:
                self.racy.update(self._racy_reads(bad, idx, gids))
        if self.lanes and self.reader is None:
            bad = self.read_epoch[idx] == threads.epoch[:, None]
            bad &= self.read_lane[idx] != threads.lane[:, None]
            bad &= self.read_clock[idx, (gids - self.gid0)[:, None]] == self.clocks.now(gids)[:, None]
            words = "a write after another lane's read, no bar.warp.sync between"
            self.report("lanes", words, bad & changes, access, reads)
        self.written = True
        self.writer[idx] = gids[:, None] + 1
        self.write_clock[idx] = self.clocks.now(gids)[:, None]
        self.write_line[idx] = spec.line
        self.copied[idx] = False
        if self.init is not None:
            self.init[idx] = True
        if self.lanes:
            self.write_lane[idx] = threads.lane[:, None]
            self.write_epoch[idx] = threads.epoch[:, None]

    def unknown_reads(self, idx: np.ndarray, gids: np.ndarray, *, own: bool = True) -> np.ndarray:
        """Whether a byte has readers that the warps don't know to be done; own: or are it themselves."""
        if self.reader is not None:
            reader = self.reader[idx]
            return (self.read_clock[idx] > self.clocks.known[gids[:, None], reader - 1]) & (reader > 0)
        known = self.clocks.known[gids, self.gid0 : self.gid0 + self.warps]
        late = self.read_clock[idx] > known[:, None, :]
        if not own:
            late &= (np.arange(self.warps) != (gids - self.gid0)[:, None])[:, None, :]
        return late.any(-1)

    def _racy_reads(
        self, bad: np.ndarray, idx: np.ndarray, gids: np.ndarray
    ) -> Iterator[tuple[int, int, int]]:
        known = self.clocks.known[gids, self.gid0 : self.gid0 + self.warps]
        for k, b in np.argwhere(bad):
            clocks = self.read_clock[idx[k, b]]
            for w in np.nonzero(clocks > known[k])[0]:
                for clock in range(int(known[k, w]) + 1, int(clocks[w]) + 1):  # it may have read before, too
                    yield int(w) + self.gid0, int(idx[k, b]), clock

    def proxy_read(self, off: np.ndarray, width: int, gids: np.ndarray, spec: Any) -> None:
        """A read by the asynchronous proxy: what the generic one wrote must be past a fence.

        Not what cp.async wrote: the compiler, as CUTLASS, puts no proxy fence after that.
        """
        idx = off[:, None] + span(width)
        writer = self.writer[idx]
        bad = (self.write_clock[idx] > self.clocks.fenced[gids[:, None], writer - 1]) & (writer > 0)
        words = "wgmma reads a write that no fence.proxy.async covers"
        bad &= ~self.copied[idx]
        self.report("proxy", words, bad, Access(idx, gids, spec), self.write_line[idx])

    def begin_copy(self, off: np.ndarray, size: int, threads: Threads, spec: Any) -> None:
        """cp.async may write from now on: who reads or writes there must have finished."""
        idx, gids = off[:, None] + span(size), threads.gids
        access, reads = Access(idx, gids, spec), self.read_line[idx]
        bad = self.unknown_reads(idx, gids, own=False)
        self.report("race", "cp.async to what others may still read", bad, access, reads)
        self.report("async", "cp.async to what wgmma is still reading", self.reading[idx] > 0, access, reads)
        bad = self._unknown_writes(idx, gids)
        self.report("race", "cp.async to what others may still write", bad, access, self.write_line[idx])
        self.writing[idx] += 1

    def end_copy(self, off: np.ndarray, data: np.ndarray, threads: Threads, spec: Any) -> None:
        idx = off[:, None] + span(data.shape[1])
        self.writing[idx] -= 1
        self.write(off, data, threads, spec)
        self.copied[idx] = True
        self.mem[idx] = data

    def value(self, off: np.ndarray, size: int, cta: Any, gids: np.ndarray | None) -> np.ndarray:
        """What a program sees at the offsets. gids: the warps whose reads may be to see NaN."""
        if self.weak is None:
            value = self.views[size][off // size]
        else:
            value = self.bytes(off, size, cta).view(UINT[size]).reshape(-1)
        if self.poison and gids is not None:
            value = np.where(self.poisoned(off, size, gids), value.dtype.type(NAN[size]), value)
        return value

    def bytes(self, off: np.ndarray, size: int, cta: Any) -> np.ndarray:
        """What a program sees at the offsets, (n, size)."""
        idx = off[:, None] + span(size)
        return self.mem[idx] if self.weak is None else self.weak.seen_by(cta.number, idx)

    def poisoned(self, off: np.ndarray, size: int, gids: np.ndarray) -> np.ndarray:
        """Which of the warps' reads are to see NaN."""
        where = zip(gids.tolist(), off.tolist(), self.clocks.now(gids).tolist(), strict=True)
        return np.array([any((g, o + b, c) in self.poison for b in range(size)) for g, o, c in where])

    def put(self, off: np.ndarray, data: np.ndarray, spec: Any) -> None:
        """Notes the store of data (n, bytes); threads may not want different values in one place."""
        size = min(data.shape[1], 8)
        place = off[:, None] // size + np.arange(data.shape[1] // size)
        new, view = data.view(UINT[size]), self.latest[size]
        view[place] = new
        clash = (view[place] != new).any(1)
        if clash.any():
            at = int(off[int(np.argmax(clash))])
            self.reports.add(
                "conflict", spec.line, 0, f"two threads write different values to {self.name}+{at}"
            )

    def made(self, off: int, size: int) -> None:
        """An atomic operation has written there."""
        if self.init is not None:
            self.init[off : off + size] = True
        self.latest[1][off : off + size] = self.mem[off : off + size]
