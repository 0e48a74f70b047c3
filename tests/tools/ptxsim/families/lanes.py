"""shfl, redux, bar.warp.sync: PTX ISA, "Parallel Synchronization and Communication Instructions"."""

from __future__ import annotations

import numpy as np

from ..parser import PtxError
from .registers import Registers, form

u32 = np.uint32
LANES = np.arange(32)
ALL = u32(0xFFFFFFFF)
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


class Lanes(Registers):
    @form("shfl", r"sync\.(bfly|idx|up|down)\.b32")
    def shfl(self, i, d, a, b, c, members):
        values = ", ".join(self.val(o, "u32", full=True) for o in (a, b, c, members))
        first, second = (d.first, d.second) if hasattr(d, "first") else (d, None)
        value, inside = self.name("None"), self.name("None")
        self.emit(f"{value}, {inside} = c.shfl({i.mods[1]!r}, {values}, {self.condition()}, {i.line})")
        self.set(first, "u32", value)
        self.set(second, "pred", inside)

    @form("redux", r"sync\.(add|min|max|and|or|xor)\.[bus]32")
    def redux(self, i, d, a, members):
        kind = i.mods[2].replace("b", "u")
        values = f"{self.val(a, kind, full=True)}, {self.val(members, 'u32', full=True)}"
        self.set(d, kind, f"c.redux({i.mods[1]!r}, {values}, {self.condition()}, {i.line})")

    @form("bar", r"warp\.sync")
    def warp_sync(self, i, members):
        self.emit(f"c.warp_sync({self.val(members, 'u32', full=True)}, {self.condition()}, {i.line})")


class LaneOperations:
    """A context's exchanges within warps. m: a mask of its threads, or None for all."""

    def shfl(self, mode, a, b, c, members, m, line):
        named, here = self._members(members, m, line)
        a, b, c = (x.reshape(-1, 32).astype(np.int64) for x in (a, b, c))
        b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
        top, low = (LANES & segment) | (clamp & ~segment), LANES & segment
        source = {"bfly": LANES ^ b, "idx": low | (b & ~segment), "up": LANES - b, "down": LANES + b}[mode]
        inside = source >= top if mode == "up" else source <= top
        source = np.where(inside, source, LANES)
        if (here & ~np.take_along_axis(here, source, 1)).any():
            self.report("lanes", line, "a shuffle reads from a lane that is not there")
        if (here & ~np.take_along_axis(named, source[:, :, None], 2)[:, :, 0]).any():
            self.report("lanes", line, "a shuffle reads from a lane that its mask leaves out")
        return np.take_along_axis(a, source, 1).reshape(-1).astype(u32), inside.reshape(-1)

    def redux(self, what, a, members, m, line):
        named, here = self._members(members, m, line)
        self._whole(named, here, f"redux.{what}", line)
        return np.repeat(REDUCTIONS[what].reduce(a.reshape(-1, 32), axis=1, dtype=a.dtype), 32)

    def _members(self, members, m, line):
        """Which lanes each lane's mask names, (warps, 32, 32), and which are there, (warps, 32).

        A mask should name its own lane, and only lanes that are there.
        """
        members = members.reshape(-1, 32)
        if m is None and (members == ALL).all():
            return np.broadcast_to(True, (len(members), 32, 32)), np.broadcast_to(True, members.shape)
        here = np.ones(members.shape, bool) if m is None else m.reshape(-1, 32)
        named = ((members[:, :, None] >> LANES.astype(u32)) & u32(1)).astype(bool) & here[:, :, None]
        if (named & ~here[:, None, :]).any():
            self.report("lanes", line, "it waits for a lane that is not there")
        if (here & ~np.diagonal(named, axis1=1, axis2=2)).any():
            self.report("lanes", line, "a lane that its mask leaves out")
        if (named & here[:, None, :] & (members[:, :, None] != members[:, None, :])).any():
            self.report("lanes", line, "lanes that wait for one another and whose masks differ")
        return named, here

    def _whole(self, named, here, what, line):
        if not named[here.any(1)].all():
            raise PtxError(f"line {line}: {what} is known only of a whole warp, with a mask of all lanes")

    def everyone(self, m, line):
        """Faults where only a part of the threads is at an instruction whose effect is all threads' alike."""
        if m is not None and not m.all():
            self.fault(line, "a part of the threads waits for, or closes, what all have begun")

    def warp_sync(self, members, m, line):
        named, here = self._members(members, m, line)
        self._whole(named, here, "bar.warp.sync", line)
        self.epoch[slice(None) if m is None else m] += 1

    def whole_warps(self, m, line):
        """Faults where a mask has a part of a warp at an instruction of whole warps."""
        if m is not None:
            w = m.reshape(-1, 32)
            if (w.any(1) & ~w.all(1)).any():
                self.fault(line, "a warp-wide instruction without all of the warp's lanes")
