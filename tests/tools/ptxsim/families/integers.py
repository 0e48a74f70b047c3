"""Whole numbers and bits: PTX ISA, "Integer Arithmetic Instructions" and "Logic and Shift Instructions"."""

from __future__ import annotations

from ..parser import WIDTHS, Imm
from .registers import CANONICAL, INTEGER, KIND, UNTYPED, Registers, form

SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}


class Integers(Registers):
    @form("add sub", INTEGER)
    @form("mul", rf"lo\.{INTEGER}")
    def integer_binary(self, i, d, a, b):
        kind = i.mods[-1]
        self.set(d, kind, f"{self.val(a, kind, full=True)} {SIGNS[i.op]} {self.val(b, kind)}")

    @form("mul mad", r"wide\.[us](16|32)")
    def mul_wide(self, i, d, a, b, c=None):
        """Twice as wide as the factors; of mad, so is what is added."""
        kind = i.mods[-1]
        wide = kind[0] + str(2 * WIDTHS[kind])
        a, b = (f"{self.val(o, kind, full=True)}.astype({wide})" for o in (a, b))
        self.set(d, wide, f"{a} * {b}" if c is None else f"{a} * {b} + {self.val(c, wide)}")

    @form("mad", rf"lo\.{INTEGER}")
    def mad_lo(self, i, d, a, b, c):
        kind = i.mods[-1]
        self.set(d, kind, f"{self.val(a, kind, full=True)} * {self.val(b, kind)} + {self.val(c, kind)}")

    @form("div rem", INTEGER)
    def div(self, i, d, a, b):
        kind = i.mods[-1]
        self.set(d, kind, f"A.{i.op}_int({self.val(a, kind, full=True)}, {self.val(b, kind, full=True)})")

    @form("max min", rf"{INTEGER}|relu\.s32")
    def integer_max(self, i, d, a, b):
        """.relu: and no less than 0."""
        kind = i.mods[-1]
        text = f"np.{i.op}imum({self.val(a, kind, full=True)}, {self.val(b, kind)})"
        self.set(d, kind, f"np.maximum({text}, s32(0))" if "relu" in i.mods else text)

    @form("neg", "s(16|32|64)")
    def integer_neg(self, i, d, a):
        self.set(d, i.mods[-1], f"-{self.val(a, i.mods[-1], full=True)}")

    @form("and or xor", "pred|b(16|32|64)")
    def logic(self, i, d, a, b):
        kind = i.mods[-1]
        self.set(d, kind, f"{self.val(a, kind, full=True)} {SIGNS[i.op]} {self.val(b, kind)}")

    @form("not", "pred|b(16|32|64)")
    def bit_not(self, i, d, a):
        self.set(d, i.mods[-1], f"~{self.val(a, i.mods[-1], full=True)}")

    @form("shl", "b(16|32|64)")
    @form("shr", "[bus](16|32|64)")
    def shift(self, i, d, a, b):
        kind = CANONICAL.get(i.mods[-1], i.mods[-1])
        width = WIDTHS[kind]
        if isinstance(b, Imm) and int(b.text, 0) < width:
            amount = self.constant(KIND[kind](int(b.text, 0)))
            self.set(d, kind, f"{self.val(a, kind, full=True)} {SIGNS[i.op]} {amount}")
        else:
            self.set(
                d, kind, f"A.{i.op}({self.val(a, kind, full=True)}, {self.val(b, 'u32', full=True)}, {width})"
            )

    @form("bfe", "[us](32|64)")
    def bfe(self, i, d, a, position, length):
        kind = i.mods[-1]
        plain = UNTYPED[WIDTHS[kind]]
        bits = f"{self.val(position, 'u32')}, {self.val(length, 'u32')}"
        self.set(d, plain, f"A.bfe({self.val(a, plain, full=True)}, {bits}, {kind[0] == 's'})")

    @form("popc", "b(32|64)")
    def popc(self, i, d, a):
        self.set(d, "u32", f"A.popc({self.val(a, i.mods[-1], full=True)})")
