"""cp.async: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy".

A copy is as late as it may be: it reads and writes when it is waited for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..regions import FRESH, Threads, span
from .registers import Registers, form

u8, u32, u64 = np.uint8, np.uint32, np.uint64


class Copies(Registers):
    @form("cp", r"async\.(cg|ca)\.shared\.global(\.L2::\w+)?")
    def cp_async(self, i, to, source, size, given=None):
        spec = self.spec(size=int(size.text, 0))
        given = size if given is None else given
        self.emit(
            f"c.cp_async({spec}, {self.address(to, 'shared')}, {self.address(source, 'global')}, "
            f"{self.val(given, 'u32', full=True)}, {self.condition()})"
        )

    @form("cp", r"async\.commit_group")
    def cp_commit(self, i):
        self.unpredicated(i)
        self.emit(f"c.cp_commit(m, {i.line})")

    @form("cp", r"async\.wait_group")
    def cp_wait(self, i, left):
        self.unpredicated(i)
        self.emit(f"c.cp_wait({int(left.text, 0)}, m, {i.line})")


class Copy(NamedTuple):
    spec: Any
    region: Any
    which: np.ndarray  # threads
    off: np.ndarray
    reads: list  # (region, which of them, offsets, bytes, of each 8 bytes which are to see NaN)


class CopyOperations:
    """A context's copies. cp_open: those of the group that is not closed yet; cp_groups: closed ones."""

    def cp_async(self, spec, to, source, given, m):
        """`given` of the size's bytes come from the source, zeros follow."""
        which = np.arange(self.n) if m is None else np.nonzero(m)[0]
        if not len(which):
            return
        ((region, _, off),) = self.pieces(spec, to[which], which, spec.size, "shared")
        threads = self.of(which)
        given = np.minimum(given[which], u32(spec.size)).astype(np.int64)
        source = source[which]
        if (source[given > 0] & u64(spec.size - 1)).any():
            self.fault(spec.line, f"a copy from an address that is not aligned: {spec.text}")
        reads = []
        for width in np.unique(given[given > 0]).tolist():
            mine = np.nonzero(given == width)[0]
            for r, k, o in self.pieces(spec, source[mine], mine, 1, "global"):
                self.pieces(spec, source[k] + u64(width - 1), k, 1, "global")
                some = Threads(*(x[k] for x in threads))
                r.read(o, width, some, spec)
                words = range(0, width, 8) if r.poison else ()
                poisoned = [r.poisoned(o + n, min(8, width - n), some.gids) for n in words]
                reads.append((r, k, o, width, poisoned))
        region.begin_copy(off, spec.size, threads, spec)
        self.cp_open.append(Copy(spec, region, which, off, reads))

    def cp_commit(self, m, line):
        self.everyone(m, line)
        self.cp_groups.append(self.cp_open)
        self.cp_open = []

    def cp_wait(self, left, m, line):
        self.everyone(m, line)
        while len(self.cp_groups) > left:
            for copy in self.cp_groups.pop(0):
                self.cp_finish(copy)

    def cp_finish(self, copy):
        data = np.zeros((len(copy.off), copy.spec.size), u8)
        for region, k, off, width, poisoned in copy.reads:
            data[k[:, None], span(width)] = region.bytes(off, width, self.cta)
            for n, which in enumerate(poisoned):
                word = slice(8 * n, min(8 * n + 8, width))
                data[k[which], word] = np.resize(np.frombuffer(FRESH, u8), word.stop - word.start)
        copy.region.end_copy(copy.off, data, self.of(copy.which), copy.spec)
