"""PTX text, as Triton writes it, to the instructions of its one entry function.

PTX ISA, sections "Syntax" and "Directives".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: Bits of a fundamental type.
WIDTHS = {f"{kind}{width}": width for kind in "bus" for width in (8, 16, 32, 64)}
WIDTHS |= {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}


class PtxError(Exception):
    """The text has something that the emulator does not know."""


@dataclass(frozen=True)
class Reg:
    index: int
    width: int  # bits; 1 for a predicate
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    text: str

    def value(self, kind: str) -> int:
        """The bits of the immediate as a type of this kind."""
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", self.text) or re.fullmatch(
            r"-?\d+\.\d*([eE][-+]?\d+)?", self.text
        ):
            return _float_bits(self.text, kind)
        return int(self.text.rstrip("U"), 0) & ((1 << WIDTHS[kind]) - 1)


def _float_bits(text: str, kind: str) -> int:
    """0f and eight hexadecimal digits, 0d and sixteen, or a decimal fraction."""
    if text[:2] in ("0f", "0F"):
        number = struct.unpack(">f", bytes.fromhex(text[2:]))[0]
        if WIDTHS[kind] == 32:
            return int(text[2:], 16)  # as it is: a conversion would quiet a signalling NaN
    elif text[:2] in ("0d", "0D"):
        number = struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    else:
        number = float(text)
    return int.from_bytes(struct.pack(">f" if WIDTHS[kind] == 32 else ">d", number), "big")


@dataclass(frozen=True)
class Special:
    name: str  # tid.x, ctaid.y, ...


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Mem:
    """An address in brackets: a register, a symbol or a number, and an offset in bytes."""

    base: Any
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """Two destinations, a|b."""

    first: Any
    second: Any


@dataclass
class Instruction:
    line: int
    text: str
    op: str  # the opcode's first word
    mods: tuple[str, ...]  # the others
    operands: list
    predicate: Reg | None = None


@dataclass
class Function:
    name: str
    target: str
    lines: list[str]
    params: list[tuple[str, str]] = field(default_factory=list)  # names and kinds
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to indices of code
    registers: list[int] = field(default_factory=list)  # widths
    names: list[str] = field(default_factory=list)  # of the registers
    shared: dict[str, int] = field(default_factory=dict)  # symbols' offsets
    static_shared: int = 0  # bytes
    threads: int = 0
    undefined: set[str] = field(default_factory=set)  # registers that the compiler leaves so on purpose


class _Scope:
    """Names of registers in a pair of braces, and in those around it."""

    def __init__(self, parent: _Scope | None = None):
        self.parent = parent
        self.names: dict[str, tuple[int, int]] = {}

    def find(self, name: str) -> tuple[int, int] | None:
        scope: _Scope | None = self
        while scope:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%laneid$|%warpid$")


def parse(text: str) -> Function:
    """The entry function of a PTX module that has nothing else."""
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", text)
    if not target or not entry:
        raise PtxError("no target, or no entry function")
    f = Function(entry.group(1), target.group(1), text.split("\n"))
    before = text[: entry.start()]
    for m in re.finditer(r"^\s*\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\];", before, re.M):
        f.shared[m.group(1)] = 0
    if m := re.search(r"^\s*(?:\.extern\s+)?\.func\b.*", before, re.M):
        raise PtxError(f"a function beside the entry: {m.group(0)}")
    end = text.index(")", entry.end())
    for piece in text[entry.end() : end].split(","):
        if words := piece.split():
            f.params.append((words[-1], words[1].lstrip(".")))
    start = text.index("{", end)
    if m := re.search(r"\.reqntid\s+(\d+)", text[end:start]):
        f.threads = int(m.group(1))
    _body(f, text, start + 1)
    return f


#: Most lines are one statement.
_PLAIN = re.compile(r"(@|[a-z]|\.reg|\.pragma)[^;]*;$")


def _body(f: Function, text: str, start: int) -> None:
    """The statements from `start` to the brace that closes the function."""
    scope, depth = _Scope(), 1
    for line, piece in _pieces(_code_lines(f, text[start:], text.count("\n", 0, start))):
        if piece == "{":
            scope, depth = _Scope(scope), depth + 1
        elif piece == "}":
            depth -= 1
            if not depth:
                return
            scope = scope.parent or scope
        elif piece.endswith(":"):
            f.labels[piece[:-1].strip()] = len(f.code)
        else:
            _statement(f, scope, piece, line)
    raise PtxError("the function does not end")


def _code_lines(f: Function, text: str, first: int) -> Iterator[tuple[int, str]]:
    """Numbered lines that have code, without comments."""
    for line, raw in enumerate(text.split("\n"), first + 1):
        code, _, comment = raw.partition("//")
        if m := re.search(r"implicit-def:\s*(%\w+)", comment):
            f.undefined.add(m.group(1))
        code = re.sub(r"/\*.*?\*/", " ", code).strip()
        if "/*" in code:
            raise PtxError(f"line {line}: a comment over several lines")
        if code and not code.startswith((".loc", ".file")):
            yield line, code


def _pieces(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Braces of scopes, labels with their colon, and statements, with the line on which they begin."""
    buffer, begin, braces = "", 0, 0
    for line, code in lines:
        if not buffer and _PLAIN.match(code):
            yield line, code[:-1].rstrip()
            continue
        for ch in code + " ":
            empty = not buffer.strip()
            if empty and not braces and ch in "{}":
                yield line, ch
                buffer = ""
            elif ch == ":" and re.fullmatch(r"\s*[\w$]+\s*", buffer):
                yield begin, buffer + ":"
                buffer = ""
            elif ch == ";":
                if not empty:
                    yield begin, buffer.strip()
                buffer = ""
            else:
                braces += (ch == "{") - (ch == "}")
                begin = line if empty else begin
                buffer += ch
        buffer = buffer if buffer.strip() else ""


def _declare(f: Function, scope: _Scope, name: str, width: int) -> None:
    scope.names[name] = (len(f.registers), width)
    f.registers.append(width)
    f.names.append(name)


def _statement(f: Function, scope: _Scope, text: str, line: int) -> None:
    if text.startswith(".reg"):
        kind, *names = text[4:].replace(",", " ").split()
        for name in names:
            m = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{m.group(1)}{i}" for i in range(int(m.group(2)))] if m else [name]:
                _declare(f, scope, each, WIDTHS[kind.lstrip(".")])
        return
    if text.startswith(".pragma"):
        return
    if text.startswith(".shared"):
        m = re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
        if not m:
            raise PtxError(f"line {line}: {text}")
        align, size = int(m.group(1)), WIDTHS[m.group(2)] // 8 * int(m.group(4) or 1)
        f.shared[m.group(3)] = -(-f.static_shared // align) * align
        f.static_shared = f.shared[m.group(3)] + size
        return
    if text.startswith("."):
        raise PtxError(f"line {line}: unknown directive {text}")
    predicate, rest = None, text
    if m := re.match(r"@(!?)(%?[\w$]+)\s+", text):
        found = scope.find(m.group(2))
        if not found:
            raise PtxError(f"line {line}: unknown predicate in {text}")
        predicate, rest = Reg(*found, m.group(2), bool(m.group(1))), text[m.end() :]
    m = re.match(r"([a-z][\w.:]*)\s*", rest)
    if not m:
        raise PtxError(f"line {line}: cannot read {text!r}")
    # .shared::cta is the plain window of shared memory.
    op, *mods = m.group(1).replace("shared::cta", "shared").split(".")
    operands = [_operand(scope, part, line) for part in _split(rest[m.end() :])]
    f.code.append(Instruction(line, text, op, tuple(mods), operands, predicate))


def _split(text: str) -> list[str]:
    """At the commas outside of all brackets."""
    parts, depth, last = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    tail = text[last:].strip()
    return [*parts, tail] if tail else parts


def _operand(scope: _Scope, text: str, line: int) -> Any:
    if text.startswith("{"):
        return Vec(tuple(_operand(scope, part, line) for part in _split(text[1:-1])))
    if text.startswith("["):
        m = re.fullmatch(r"\[\s*([^\s+-]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text)
        if not m:
            raise PtxError(f"line {line}: cannot read the address {text!r}")
        offset = int(m.group(3), 0) if m.group(3) else 0
        return Mem(_operand(scope, m.group(1), line), -offset if m.group(2) == "-" else offset)
    if "|" in text:
        return Pair(*(_operand(scope, part.strip(), line) for part in text.split("|")))
    name = text.lstrip("!")
    if found := scope.find(name):
        return Reg(*found, name, text.startswith("!"))
    if text == "_":
        return None
    if _SPECIAL.match(text):
        return Special(text[1:])
    if re.match(r"-?\d", text):
        return Imm(text)
    if re.fullmatch(r"[\w$]+", text):
        return Symbol(text)
    raise PtxError(f"line {line}: cannot read the operand {text!r}")
