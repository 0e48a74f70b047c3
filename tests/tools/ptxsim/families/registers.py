"""Registers and operands: what every family of instructions is written with.

A block of PTX becomes a Python function of a context, its registers and a mask of threads. There a register
is an array of an element a thread, under one name for each type that it is seen as. PTX ISA, sections
"Instruction Operands", "Operand Type Checking" and "Predicated Execution".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import arithmetic
from ..parser import WIDTHS, Imm, Instruction, Mem, Pair, PtxError, Reg, Special, Symbol, Vec

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
#: NumPy's type by a PTX type's name. Untyped and bf16 are unsigned numbers; f16 is too, until it is
#: converted.
KIND = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
KIND |= {f"{k}{w}": np.dtype(f"u{w // 8}").type for k in "bu" for w in (8, 16, 32, 64)}
KIND |= {f"s{w}": np.dtype(f"i{w // 8}").type for w in (8, 16, 32, 64)}
#: The name that a register of so many bits is kept under.
UNTYPED = {1: "pred", 8: "u8", 16: "u16", 32: "u32", 64: "u64"}
CANONICAL = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16", "f16": "u16"}
#: What a register holds that nobody has written: NaN in every type.
POISON = {1: True, 8: 0xFF, 16: 0xFFFF, 32: 0x7FFFDEAD, 64: 0x7FFFDEADDEADDEAD}
#: Instructions whose first operand is no result.
WITHOUT_RESULT = ("st", "red", "bra", "bar", "ret", "exit", "trap", "stmatrix", "cp", "fence")

INTEGER = "[us](16|32|64)"


def poison(width: int, n: int) -> np.ndarray:
    """The register of n threads that nobody has written."""
    return np.full(n, POISON[width], KIND[UNTYPED[width]])


class Spec:
    """What is known of an instruction before it runs."""

    def __init__(self, i: Instruction, **known: Any):
        self.line, self.text = i.line, i.text
        self.__dict__.update(known)


def form(ops: str, mods: str = "") -> Callable:
    """Marks the method that writes these instructions where a regular expression matches their modifiers."""

    def mark(method: Callable) -> Callable:
        mine = [(op, re.compile(mods)) for op in ops.split()]
        method.forms = [*getattr(method, "forms", ()), *mine]
        return method

    return mark


def registers_of(operand: Any) -> set[int]:
    if isinstance(operand, Reg):
        return {operand.index}
    if isinstance(operand, Vec):
        return set().union(*(registers_of(x) for x in operand.items))
    if isinstance(operand, Mem):
        return registers_of(operand.base)
    if isinstance(operand, Pair):
        return registers_of(operand.first) | registers_of(operand.second)
    return set()


def uses(i: Instruction) -> tuple[set[int], set[int]]:
    """The registers that an instruction reads, and those that it writes."""
    operands = [registers_of(o) for o in i.operands]
    reads = {i.predicate.index} if i.predicate is not None else set()
    if i.op in WITHOUT_RESULT or not operands:
        return reads.union(*operands), set()
    if i.op == "wgmma":
        return reads.union(*operands), operands[0]
    return reads.union(*operands[1:]), operands[0]


def _and(predicate, mask):
    return predicate if mask is None else predicate & mask


def _merge(mask, new, R, index, width):
    """new where the mask is set, the register's old value elsewhere."""
    return np.where(mask, new, _old(R, index, width, len(new)))


def _old(R, index, width, n):
    return poison(width, n) if R[index] is None else R[index]


def _read(R, index, name):
    if R[index] is None:
        raise ValueError(f"{name} is read, and no thread has written it")
    return R[index]


class Registers:
    """Writes blocks. A family's methods, marked with `form`, take an instruction and its operands."""

    forms: dict[str, list[tuple[re.Pattern, str]]]

    def __init__(self, program: Any):
        self.p = program
        self.space: dict[str, Any] = {
            "np": np, "A": arithmetic, "where": np.where, "AND": _and, "MERGE": _merge, "OLD": _old,
            "READ": _read,
            "pred": np.bool_, **{UNTYPED[w]: KIND[UNTYPED[w]] for w in (8, 16, 32, 64)},
            **{f"s{w}": KIND[f"s{w}"] for w in (8, 16, 32, 64)}, "f32": np.float32, "f64": np.float64,
        }  # fmt: skip

    def write(self, block: Any) -> None:
        """Gives the block its function."""
        self.out: list[str] = []
        self.lines: list[int] = []
        self.known: dict[int, dict[str, str]] = {}  # a register's names, by type
        self.dirty: dict[int, Reg] = {}
        self.count = 0
        result = "None"
        for i in self.p.f.code[block.start : block.stop]:
            self.i = i
            if i is block.last and block.kind != "fall":
                result = self._end(block.kind)
            else:
                self._write(i)
        self.flush()
        self.emit(f"return {result}")
        name = f"block{block.start}"
        block.source = f"def {name}(c, R, m):\n" + "".join(f"    {line}\n" for line in self.out)
        block.lines = self.lines
        exec(compile(block.source, f"<ptx {name}>", "exec"), self.space)
        block.run = self.space[name]

    def _end(self, kind: str) -> str:
        """What a block returns: a branch's condition, or a barrier's operands."""
        i = self.i
        if kind == "bra":
            return "None" if i.predicate is None else self.get(i.predicate, "pred")
        self.unpredicated(i)
        if kind == "bar" and i.mods != ("sync",):
            raise PtxError(f"line {i.line}: unknown instruction {i.text}")
        return (
            f"({''.join(self.val(o, 'u32', full=True) + ', ' for o in i.operands)})"
            if kind == "bar"
            else "None"
        )

    def _write(self, i: Instruction) -> None:
        mods = ".".join(i.mods)
        methods = [method for pattern, method in self.forms.get(i.op, ()) if pattern.fullmatch(mods)]
        if not methods:
            raise PtxError(f"line {i.line}: unknown instruction {i.text}")
        try:
            getattr(self, methods[0])(i, *i.operands)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise PtxError(f"line {i.line}: cannot run {i.text} ({error!r})") from error

    def emit(self, text: str) -> None:
        self.out.append(text)
        self.lines.append(self.i.line)

    def name(self, text: str) -> str:
        """A new name for the value of an expression."""
        self.count += 1
        self.emit(f"x{self.count} = {text}")
        return f"x{self.count}"

    def constant(self, value: Any) -> str:
        name = f"K{len(self.space)}"
        self.space[name] = value
        return name

    def spec(self, **known: Any) -> str:
        return self.constant(Spec(self.i, **known))

    def get(self, reg: Reg, kind: str) -> str:
        """The register as an array of this type."""
        kind = CANONICAL.get(kind, kind)
        if WIDTHS[kind] != reg.width:
            raise PtxError(f"line {self.i.line}: {reg.name} of {reg.width} bits as {kind}: {self.i.text}")
        if reg.index not in self.known:
            self.known[reg.index] = {UNTYPED[reg.width]: self.name(f"READ(R, {reg.index}, {reg.name!r})")}
        names = self.known[reg.index]
        if kind not in names:
            names[kind] = self.name(f"{next(iter(names.values()))}.view({kind})")
        return f"(~{names[kind]})" if reg.negated else names[kind]

    def val(self, operand: Any, kind: str, full: bool = False) -> str:
        """An operand as an array of this type; an immediate as a scalar unless full."""
        kind = CANONICAL.get(kind, kind)
        if isinstance(operand, Reg):
            return self.get(operand, kind)
        if isinstance(operand, Imm):
            if kind == "pred":
                value = np.bool_(int(operand.text, 0))
            else:
                value = np.array(operand.value(kind), KIND[UNTYPED[WIDTHS[kind]]]).view(KIND[kind])[()]
            name = self.constant(value)
            return f"c.full({name})" if full else name
        if isinstance(operand, Special):
            name = f"c.special[{operand.name!r}]"
            return name if kind == "u32" else f"{name}.astype({kind})"
        if isinstance(operand, Symbol) and operand.name in self.p.f.shared:
            return f"c.full({self.constant(KIND[kind](self.p.f.shared[operand.name]))})"
        raise PtxError(f"line {self.i.line}: operand {operand} in {self.i.text}")

    def set(self, d: Any, kind: str, text: str, *, merged: bool = False) -> None:
        """The register d = text, an array of this type; merged: with the predicate taken into account."""
        if d is None:
            return
        kind = CANONICAL.get(kind, kind)
        if not isinstance(d, Reg) or WIDTHS[kind] != d.width:
            raise PtxError(f"line {self.i.line}: {d} as {kind}: {self.i.text}")
        if self.i.predicate is not None and not merged:
            text = f"where({self.get(self.i.predicate, 'pred')}, {text}, {self.old(d, kind)})"
        self.known[d.index] = {kind: self.name(text)}
        self.dirty[d.index] = d

    def old(self, d: Reg, kind: str) -> str:
        """What d holds so far, if anything."""
        if d.index not in self.known:
            self.known[d.index] = {UNTYPED[d.width]: self.name(f"OLD(R, {d.index}, {d.width}, c.n)")}
        return self.get(d, kind)

    def condition(self) -> str:
        """The mask of threads that do the instruction."""
        return "m" if self.i.predicate is None else f"AND({self.get(self.i.predicate, 'pred')}, m)"

    def unpredicated(self, i: Instruction) -> None:
        """What a predicate would do to the instruction is not known."""
        if i.predicate is not None:
            raise PtxError(f"line {i.line}: a predicated {i.op}: {i.text}")

    def flush(self, everything: bool = False) -> None:
        """Writes back what other blocks read, or everything."""
        for index, reg in self.dirty.items():
            if everything or index in self.p.exposed:
                value = self.get(Reg(index, reg.width, reg.name), UNTYPED[reg.width])
                self.emit(
                    f"R[{index}] = {value} if m is None else MERGE(m, {value}, R, {index}, {reg.width})"
                )
        self.dirty.clear()

    def halves(self, operand: Any) -> str:
        """A 32-bit operand as 16-bit numbers: two of each thread, one after the other."""
        return f"np.ascontiguousarray({self.val(operand, 'u32', full=True)}).view(u16)"

    def address(self, mem: Mem, space: str) -> str:
        kind = "u32" if space == "shared" else "u64"
        if isinstance(mem.base, Symbol):
            return f"c.full({self.constant(u32(self.p.f.shared[mem.base.name] + mem.offset))})"
        if isinstance(mem.base, Imm):
            return f"c.full({self.constant(KIND[kind](int(mem.base.text, 0) + mem.offset))})"
        text = self.get(mem.base, kind)
        if mem.offset:
            text += f" + {self.constant(np.array(mem.offset, np.int64).astype(KIND[kind])[()])}"
        return text
