"""mov, cvt, prmt: PTX ISA, section "Data Movement and Conversion Instructions"."""

from __future__ import annotations

from ..parser import WIDTHS, Reg, Vec
from .registers import CANONICAL, UNTYPED, Registers, form


class Moves(Registers):
    @form("mov", "pred|[bus](16|32|64)|f32|f64")
    def mov(self, i, d, s):
        kind = i.mods[-1]
        if isinstance(d, Vec):
            part = UNTYPED[WIDTHS[kind] // len(d.items)]
            source = self.val(s, UNTYPED[WIDTHS[kind]], full=True)
            parts = self.name(f"np.ascontiguousarray({source}).view({part}).reshape(-1, {len(d.items)})")
            for n, item in enumerate(d.items):
                self.set(item, part, f"np.ascontiguousarray({parts}[:, {n}])")
        elif isinstance(s, Vec):
            whole, part = UNTYPED[WIDTHS[kind]], UNTYPED[WIDTHS[kind] // len(s.items)]
            values = ", ".join(self.val(x, part, full=True) for x in s.items)
            self.set(d, whole, f"np.stack(({values}), 1).view({whole}).reshape(-1)")
        else:
            self.set(d, kind, self.val(s, kind, full=True))

    @form("cvt", r"[us](8|16|32|64)\.[us](8|16|32|64)")
    def cvt_integer(self, i, d, s):
        to, of = i.mods
        self._widened(d, to, f"{self._narrowed(s, of)}.astype({to})")

    @form("cvt", r"rna\.tf32\.f32")
    def cvt_tf32(self, i, d, s):
        self.set(d, "u32", f"A.rna_tf32({self.val(s, 'f32', full=True)})")

    @form("cvt", r"f32\.(bf16|f16)")
    def cvt_from_half(self, i, d, s):
        self.set(d, "f32", f"A.{i.mods[-1]}_to_f32({self.val(s, 'u16', full=True)})")

    @form("cvt", r"rn\.(bf16|f16)\.f32")
    def cvt_to_half(self, i, d, s):
        self.set(d, "u16", f"A.f32_to_{i.mods[-2]}({self.val(s, 'f32', full=True)})")

    @form("cvt", r"rn\.(bf16x2|f16x2)\.f32")
    def cvt_to_halves(self, i, d, high, low):
        turn = "A.f32_to_" + i.mods[1][:-2]
        a, b = (f"{turn}({self.val(o, 'f32', full=True)}).astype(u32)" for o in (high, low))
        self.set(d, "u32", f"({a} << u32(16)) | {b}")

    @form("prmt", "b32")
    def prmt(self, i, d, a, b, s):
        self.set(
            d,
            "u32",
            f"A.prmt({self.val(a, 'u32', full=True)}, {self.val(b, 'u32', full=True)}, {self.val(s, 'u32')})",
        )

    def _narrowed(self, s, kind):
        """The lowest bits of an operand that may be wider than its type."""
        if isinstance(s, Reg) and s.width > WIDTHS[kind]:
            wide = self.val(s, UNTYPED[s.width], full=True)
            return f"{wide}.astype({UNTYPED[WIDTHS[kind]]}).view({CANONICAL.get(kind, kind)})"
        return self.val(s, kind, full=True)

    def _widened(self, d, kind, text):
        """d = text; a d that is wider than the type is filled up with its sign, or zeros."""
        if d.width > WIDTHS[kind]:
            kind = kind[0] + str(d.width)
            text = f"({text}).astype({kind})"
        self.set(d, kind, text)
