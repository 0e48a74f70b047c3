"""Floating point: PTX ISA, sections "Floating Point Instructions" and "Half Precision Floating Point
Instructions".

.ftz makes zeros of subnormals, of the operands and of the result.
"""

from __future__ import annotations

from ..parser import WIDTHS
from .integers import SIGNS
from .registers import Registers, form

FLOAT = r"((rn\.)?(ftz\.)?f32|(rn\.)?f64)"
HALF = r"((rn\.)?(relu\.)?(bf16|f16)(x2)?)"


class Floats(Registers):
    @form("add sub mul", FLOAT)
    def float_binary(self, i, d, a, b):
        x, y = self._operands(i, a, b)
        self._result(i, d, f"{x} {SIGNS[i.op]} {y}")

    @form("fma", FLOAT)
    def fma(self, i, d, a, b, c):
        self._result(i, d, f"A.fma{WIDTHS[i.mods[-1]]}({', '.join(self._operands(i, a, b, c))})")

    @form("add sub mul", HALF)
    def half_binary(self, i, d, a, b):
        x, y = self._halves(i, a, b)
        self._half_result(i, d, f"{x} {SIGNS[i.op]} {y}")

    @form("fma", HALF)
    def half_fma(self, i, d, a, b, c):
        self._half_result(i, d, f"A.fma_half({', '.join(self._halves(i, a, b, c))})")

    @form("max min", r"(ftz\.)?(NaN\.)?f32|f64")
    def float_max(self, i, d, a, b):
        """Of a number and NaN the number, or with .NaN NaN."""
        self._result(i, d, f"A.{i.op}imum({', '.join(self._operands(i, a, b))}, {'NaN' in i.mods})")

    @form("abs", r"(ftz\.)?f32|f64")
    def abs(self, i, d, a):
        self._result(i, d, f"np.abs({self._operands(i, a)[0]})")

    @form("neg", r"(ftz\.)?f32|f64")
    def float_neg(self, i, d, a):
        self._result(i, d, f"-{self._operands(i, a)[0]}")

    @form("div", r"rn\.(f32|f64)")
    def float_div(self, i, d, a, b):
        self._result(i, d, " / ".join(self._operands(i, a, b)))

    @form("div", r"(full|approx)\.(ftz\.)?f32")
    def div_full(self, i, d, a, b):
        self._result(i, d, f"c.approximate.div_full({', '.join(self._operands(i, a, b))})")

    @form("ex2 tanh", r"approx\.(ftz\.)?f32")
    def approximate(self, i, d, a):
        self._result(i, d, f"c.approximate.{i.op}({self._operands(i, a)[0]})")

    def _operands(self, i, *operands):
        values = [self.val(o, i.mods[-1], full=True) for o in operands]
        return [f"A.flushed({v})" for v in values] if "ftz" in i.mods else values

    def _result(self, i, d, text):
        self.set(d, i.mods[-1], f"A.flushed({text})" if "ftz" in i.mods else text)

    def _halves(self, i, *operands):
        kind = i.mods[-1]
        values = [self.halves(o) if kind.endswith("x2") else self.val(o, "u16", full=True) for o in operands]
        return [f"A.{kind.removesuffix('x2')}_to_f32({v})" for v in values]

    def _half_result(self, i, d, text):
        """Rounded from float32, which has more than twice a half's bits: as if from the exact result."""
        kind = i.mods[-1]
        if "relu" in i.mods:
            text = f"np.maximum({text}, f32(0))"
        text = f"A.f32_to_{kind.removesuffix('x2')}({text})"
        self.set(d, *(("u32", f"{text}.view(u32)") if kind.endswith("x2") else ("u16", text)))
