"""Threads that go in step: how they part at branches, meet again, and wait at barriers.

A context is a set of whole warps: a program, or one warp where every interleaving is tried. Threads that part
at a branch are groups, which wait for each other at its immediate post-dominator, as ptxas makes them. PTX
ISA, sections "Control Flow Instructions" and "Parallel Synchronization and Communication Instructions: bar".
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .families import Operations, poison
from .parser import Function, PtxError
from .regions import SHARED, Region, Threads

u8, u32 = np.uint8, np.uint32


class Fault(Exception):
    """What the emulated program did that no program may."""


@dataclass
class Frame:
    """Threads that have parted and meet again at a block: those that must come, and those that have."""

    block: int
    need: np.ndarray
    have: np.ndarray


@dataclass(eq=False)
class Group:
    """Threads of a context at one block. mask None: all of them. frames: where they meet the others again."""

    block: int
    mask: np.ndarray | None
    frames: tuple[Frame, ...] = ()
    blocked: bool = False


@dataclass
class Barrier:
    count: int = 0
    who: list[tuple[Context, Group]] = field(default_factory=list)
    warps: set[int] = field(default_factory=set)


class Cta:
    """One program of a launch: its shared memory, barriers and contexts."""

    def __init__(self, machine: Any, index: tuple[int, int, int], number: int):
        self.index, self.number = index, number
        size, warps = machine.shared, machine.threads // 32
        self.shared = Region(
            np.full(size, 0xFF, u8), SHARED, machine.clocks, number * warps, warps, machine.reports,
            init=np.zeros(size, bool), lanes=machine.lanes,
        )  # fmt: skip
        self.barriers: defaultdict[int, Barrier] = defaultdict(Barrier)
        step = 32 if machine.by_warp else machine.threads
        self.contexts = [Context(machine, self, first, step) for first in range(0, machine.threads, step)]


class Context(Operations):
    """n threads of a program, from `first` on. A register is an array of an element for each."""

    def __init__(self, machine: Any, cta: Cta, first: int, n: int):
        self.machine, self.cta, self.first, self.n = machine, cta, first, n
        self.approximate = machine.approximate
        self.tid = np.arange(first, first + n, dtype=u32)
        self.gids = (cta.number * machine.threads // 32 + self.tid // 32).astype(np.int64)
        self.warps = np.unique(self.gids)
        self.lane = (self.tid & 31).astype(np.int16)
        self.epoch = np.zeros(n, np.int32)
        places = {
            "tid": (0, 0, 0),
            "ntid": (machine.threads, 1, 1),
            "ctaid": cta.index,
            "nctaid": machine.grid,
        }
        self.special = {
            f"{name}.{axis}": np.full(n, place, u32)
            for name, three in places.items()
            for axis, place in zip("xyz", three, strict=True)
        }
        self.special |= {"tid.x": self.tid, "laneid": self.tid & u32(31), "warpid": self.tid // u32(32)}
        f: Function = machine.program.f
        self.R: list[np.ndarray | None] = [None] * len(f.registers)
        for k in machine.program.undefined:
            self.R[k] = poison(f.registers[k], n)
        self.groups = [Group(0, None)]
        self.exited: np.ndarray | None = None
        self._full: dict[tuple, np.ndarray] = {}
        self.cp_open: list = []
        self.cp_groups: list[list] = []
        self.wgmma_open: list = []
        self.wgmma_groups: list[list] = []
        self.sums: dict = {}
        self.done = False
        #: Polling loads since its last store, and how many stores there had been at the last of them.
        self.polls, self.polled_at = 0, -1

    def full(self, value: Any) -> np.ndarray:
        """A register that has this value in every thread."""
        key = (value.dtype, value.tobytes())
        if key not in self._full:
            self._full[key] = np.full(self.n, value)
            self._full[key].flags.writeable = False
        return self._full[key]

    def of(self, k: np.ndarray | None) -> Threads:
        """Some of the threads, by their indices; None: all."""
        if k is None:
            return Threads(self.gids, self.lane, self.epoch)
        return Threads(self.gids[k], self.lane[k], self.epoch[k])

    def report(self, kind: str, line: int, words: str, other: int = 0) -> None:
        self.machine.reports.add(kind, line, other, words)

    def fault(self, line: int, words: str) -> NoReturn:
        raise Fault(f"line {line}: {words}")

    @property
    def blocked(self) -> bool:
        return all(g.blocked for g in self.groups)

    @property
    def waits(self) -> bool:
        """Whether it polls and nothing has been stored since it last did."""
        return self.polls > 0 and self.polled_at == self.machine.stores

    def run(self, budget: int, polls: int) -> None:
        """Runs blocks until the budget or the polls are spent, all wait at a barrier, or all have ended."""
        blocks, polls = self.machine.program.blocks, self.polls + polls
        while budget > 0 and self.polls < polls:
            g = next((g for g in reversed(self.groups) if not g.blocked), None)
            if g is None:
                return
            block = blocks[g.block]
            self.machine.steps += 1
            budget -= 1
            try:
                result = block.run(self, self.R, g.mask)
            except (Fault, PtxError):
                raise
            except Exception as error:  # a register that nobody has written is None
                raise self._explained(error, block) from error
            if block.kind == "fall":
                g.block += 1
            elif block.kind == "bra":
                self._branch(g, block, result)
            elif block.kind == "bar":
                self._arrive(g, result, block.last.line)
            elif block.kind == "ret":
                self._end(g, block.last.line)
                continue
            else:
                self.fault(block.last.line, "trap")
            if g.frames:
                self.meet(g)

    def _branch(self, g: Group, block: Any, condition: np.ndarray | None) -> None:
        if condition is None:
            g.block = block.target
            return
        taken = condition if g.mask is None else condition & g.mask
        rest = ~condition if g.mask is None else g.mask & ~condition
        if not rest.any():
            g.block = block.target
        elif not taken.any():
            g.block += 1
        else:
            frames = g.frames
            if block.meets is not None:
                frames = (*frames, Frame(block.meets, rest | taken, np.zeros_like(rest)))
            other = Group(g.block + 1, rest, frames)
            self.groups.append(other)
            g.mask, g.block, g.frames = taken, block.target, frames
            self.meet(other)

    def meet(self, g: Group) -> None:
        """Parks a group that has come to where it meets others; the last to come goes on with all of them."""
        while g.frames and g.block == g.frames[-1].block and not g.blocked:
            frame = g.frames[-1]
            frame.have = frame.have | g.mask
            self.groups.remove(g)
            whole = self._completed(frame, g.frames[:-1])
            if whole is None:
                return
            g = whole

    def _completed(self, frame: Frame, outer: tuple[Frame, ...]) -> Group | None:
        if (frame.have != frame.need).any():
            return None
        mask = None if self.exited is None and frame.need.all() else frame.need
        self.groups.append(Group(frame.block, mask, outer))
        return self.groups[-1]

    def _end(self, g: Group, line: int) -> None:
        """The group's threads end, and those that wait for them go on."""
        if self.wgmma_open or self.wgmma_groups:
            self.report("async", line, "the program ends with wgmma under way")
        for copy in [copy for group in [*self.cp_groups, self.cp_open] for copy in group]:
            self.cp_finish(copy)
        self.cp_groups, self.cp_open = [], []
        self.groups.remove(g)
        if g.mask is not None:
            self.exited = g.mask if self.exited is None else self.exited | g.mask
            for frame in g.frames:
                frame.need = frame.need & ~g.mask
            left = [n for n, frame in enumerate(g.frames) if frame.need.any()]
            if left:
                self._completed(g.frames[left[-1]], g.frames[: left[-1]])
        self.done = not self.groups

    def _arrive(self, g: Group, operands: tuple, line: int) -> None:
        """At a barrier of the program. operands: its number and, if not all threads, how many come to it."""
        number, count = (
            int(operands[0][0]),
            int(operands[1][0]) if len(operands) > 1 else self.machine.threads,
        )
        live = np.ones(self.n, bool) if self.exited is None else ~self.exited
        mask = live if g.mask is None else g.mask
        come, want = mask.reshape(-1, 32), live.reshape(-1, 32)
        if (come.any(1) & (come != want).any(1)).any():
            self.report("barrier", line, "lanes of one warp come to a barrier apart")
        barrier = self.cta.barriers[number]
        barrier.count += int(mask.sum())
        barrier.who.append((self, g))
        barrier.warps.update(self.gids[mask].tolist())
        g.blocked = True
        if barrier.count > count:
            self.fault(line, f"{barrier.count} threads at a barrier for {count}")
        if barrier.count == count:
            del self.cta.barriers[number]
            self.machine.clocks.barrier(np.array(sorted(barrier.warps)))
            for context, group in barrier.who:
                context.pass_barrier(group)

    def pass_barrier(self, g: Group) -> None:
        g.blocked = False
        g.block += 1
        self.epoch[slice(None) if g.mask is None else g.mask] += 1
        if g.frames:
            self.meet(g)

    def _explained(self, error: Exception, block: Any) -> PtxError:
        """The error, with the line of the PTX at which it came."""
        trace, line = error.__traceback__, 0
        while trace:
            if trace.tb_frame.f_code.co_filename.startswith("<ptx"):
                line = block.lines[trace.tb_lineno - 2]
            trace = trace.tb_next
        text = self.machine.program.f.lines[line - 1].strip() if line else ""
        return PtxError(f"line {line}: {text}: {type(error).__name__}: {error}")
