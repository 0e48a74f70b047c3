"""A parsed function as blocks of Python over arrays of threads, and where parted threads meet again.

PTX ISA, section "Control Flow Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .families import Writer, registers_of, uses
from .parser import Function, Instruction

#: Instructions that reach memory, after each of which another warp may take its turn.
MEMORY = ("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp", "wgmma")


@dataclass
class Block:
    """Instructions start to stop of the code, of which only the last may jump, end or wait for others.

    kind: what that is: "bra", "ret", "trap", "bar", or "fall". run(context, registers, mask) does what they
    do, and returns a branch's condition or a barrier's operands. meets: of a branch, the block where the
    threads of both ways are together again.
    """

    start: int
    stop: int
    kind: str
    last: Instruction
    target: int = -1
    meets: int | None = None
    run: Any = None
    source: str = ""
    lines: list[int] = field(default_factory=list)  # of the PTX, by line of the source


class Program:
    """fine: a block ends at every access to memory, for interleavings of warps."""

    def __init__(self, f: Function, fine: bool = False):
        self.f, self.fine = f, fine
        starts = self._starts()
        self.at = {start: n for n, start in enumerate(starts)}
        self.blocks = [
            self._block(start, stop) for start, stop in zip(starts, [*starts[1:], len(f.code)], strict=True)
        ]
        for block in self.blocks:
            if block.kind == "bra":
                block.target = self.at[f.labels[block.last.operands[0].name]]
        self._find_meets()
        self._find_exposed()
        writer = Writer(self)
        for block in self.blocks:
            writer.write(block)

    def _starts(self) -> list[int]:
        code = self.f.code
        starts = {0, *self.f.labels.values()}
        for n, i in enumerate(code):
            barrier = i.op == "bar" and i.mods[0] != "warp"
            if barrier or i.op in ("bra", "ret", "exit", "trap"):
                starts.add(n + 1)
            shared_out = i.op in ("atom", "red") or {"volatile", "acquire"} & set(i.mods)
            if shared_out and not self.fine and n and "volatile" in code[n - 1].mods:
                shared_out = False  # polls several places at once; fine takes them apart
            if barrier or shared_out or (self.fine and i.op in MEMORY and "param" not in i.mods):
                starts.add(n)
        return sorted(s for s in starts if s < len(code))

    def _block(self, start: int, stop: int) -> Block:
        last = self.f.code[stop - 1]
        kind = {"bra": "bra", "ret": "ret", "exit": "ret", "trap": "trap"}.get(last.op, "fall")
        if last.op == "bar" and last.mods[0] != "warp":
            kind = "bar"
        return Block(start, stop, kind, last)

    def _find_meets(self) -> None:
        """Of each branch the immediate post-dominator, after Cooper, Harvey and Kennedy."""
        end = len(self.blocks)  # a block after all
        after = [self._after(n, end) for n in range(end)]
        before: list[list[int]] = [[] for _ in range(end + 1)]
        for n, following in enumerate(after):
            for x in following:
                before[x].append(n)
        order = _postorder(end, before)
        number = {node: n for n, node in enumerate(order)}
        up = {end: end}

        def common(a: int, b: int) -> int:
            while a != b:
                while number[a] < number[b]:
                    a = up[a]
                while number[b] < number[a]:
                    b = up[b]
            return a

        changed = True
        while changed:
            changed = False
            for node in reversed(order[:-1]):
                known = [x for x in after[node] if x in up]
                best = known[0]
                for x in known[1:]:
                    best = common(best, x)
                if up.get(node) != best:
                    up[node], changed = best, True
        for n, block in enumerate(self.blocks):
            if block.kind == "bra" and up.get(n, end) != end:
                block.meets = up[n]

    def _after(self, n: int, end: int) -> list[int]:
        block, following = self.blocks[n], min(n + 1, end)
        if block.kind in ("ret", "trap"):
            return [end]
        if block.kind == "bra":
            return [block.target] if block.last.predicate is None else [block.target, following]
        return [following]

    def _find_exposed(self) -> None:
        """Which registers are read in a block before it writes them: all others stay within their block."""
        self.exposed: set[int] = set()
        #: Registers that nothing writes: the compiler means that any value will do.
        self.undefined = {n for n, name in enumerate(self.f.names) if name in self.f.undefined}
        never = set(range(len(self.f.registers)))
        for block in self.blocks:
            written: set[int] = set()
            for i in self.f.code[block.start : block.stop]:
                reads, writes = uses(i)
                never -= writes
                self.exposed |= reads - written
                if i.predicate is not None:
                    self.exposed |= writes - written  # the old value shows through
                if i.op == "wgmma" and i.mods[0] == "mma_async":
                    # The sum comes when it is waited for, and until then A is being read.
                    self.exposed |= registers_of(i.operands[0]) | registers_of(i.operands[1])
                written |= writes
        self.undefined |= never


def _postorder(root: int, edges: list[list[int]]) -> list[int]:
    order, seen, stack = [], {root}, [(root, iter(edges[root]))]
    while stack:
        node, rest = stack[-1]
        fresh = next((x for x in rest if x not in seen), None)
        if fresh is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(edges[fresh])))
    return order
