"""setp, selp: PTX ISA, "Comparison and Selection Instructions" and "Half Precision Comparison
Instructions"."""

from __future__ import annotations

from ..parser import PtxError
from .registers import Registers, form

ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
#: lo, ls, hi, hs: the unsigned lt, le, gt, ge.
SIGNS = ORDERED | {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
JOINED = {"and": "&", "or": "|", "xor": "^"}
FLOAT_COMPARISON = "(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)"


class Comparisons(Registers):
    @form("selp", "[bus](16|32|64)|f32|f64")
    def selp(self, i, d, a, b, p):
        kind = i.mods[-1]
        self.set(d, kind, f"where({self.val(p, 'pred')}, {self.val(a, kind)}, {self.val(b, kind)})")

    @form("setp", r"(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.((and|or|xor)\.)?[bus](16|32|64)")
    def setp_integer(self, i, d, a, b, c=None):
        kind = i.mods[-1]
        self._joined(i, d, f"{self.val(a, kind, full=True)} {SIGNS[i.mods[0]]} {self.val(b, kind)}", c)

    @form("setp", rf"{FLOAT_COMPARISON}\.((and|or|xor)\.)?(f32|f64)")
    def setp_float(self, i, d, a, b, c=None):
        kind = i.mods[-1]
        self._joined(i, d, _compared(i.mods[0], self.val(a, kind, full=True), self.val(b, kind)), c)

    @form("setp", rf"{FLOAT_COMPARISON}\.(bf16|f16)")
    def setp_half(self, i, d, a, b):
        x, y = (self.name(f"A.{i.mods[-1]}_to_f32({self.val(o, 'u16', full=True)})") for o in (a, b))
        self.set(d, "pred", _compared(i.mods[0], x, y))

    @form("setp", rf"{FLOAT_COMPARISON}\.(bf16x2|f16x2)")
    def setp_halves(self, i, d, a, b):
        turn = f"A.{i.mods[-1].removesuffix('x2')}_to_f32"
        x, y = (self.name(f"{turn}({self.halves(o)}).reshape(-1, 2)") for o in (a, b))
        for n, to in enumerate((d.first, d.second)):
            self.set(to, "pred", _compared(i.mods[0], f"{x}[:, {n}]", f"{y}[:, {n}]"))

    def _joined(self, i, d, text, c):
        if c is not None:
            text = f"({text}) {JOINED[i.mods[1]]} {self.val(c, 'pred')}"
        elif i.mods[1] in JOINED:
            raise PtxError(f"line {i.line}: {i.text}")
        self.set(d, "pred", text)


def _compared(how: str, x: str, y: str) -> str:
    """NaN is unequal, less and greater only in equ, neu, ltu and so on."""
    unordered = f"({x} != {x}) | ({y} != {y})"
    if how == "nan":
        return unordered
    if how == "num":
        return f"~({unordered})"
    text = f"({x} {ORDERED[how[:2]]} {y})"
    if how == "ne":
        return f"{text} & ~({unordered})"
    return f"{text} | {unordered}" if len(how) == 3 else text
