"""ldmatrix, stmatrix, mma.sync: PTX ISA, section "Warp Level Matrix Multiply-Accumulate Instructions"."""

from __future__ import annotations

import numpy as np

from .. import tensor_cores
from ..parser import Vec
from .registers import Registers, form

u8, u16, u32 = np.uint8, np.uint16, np.uint32
FRAGMENTS = r"sync\.aligned\.m8n8\.x[124]\.(trans\.)?shared\.b16"


class Matrices(Registers):
    @form("ldmatrix", FRAGMENTS)
    def ldmatrix(self, i, d, mem):
        self.unpredicated(i)
        spec = self.spec(trans="trans" in i.mods, count=len(d.items))
        loaded = self.name(f"c.ldmatrix({spec}, {self.address(mem, 'shared')}, m)")
        for n, item in enumerate(d.items):
            self.set(item, "u32", f"{loaded}[{n}]")

    @form("stmatrix", FRAGMENTS)
    def stmatrix(self, i, mem, s):
        spec = self.spec(trans="trans" in i.mods, count=len(s.items))
        values = "".join(self.val(x, "u32", full=True) + ", " for x in s.items)
        self.emit(f"c.stmatrix({spec}, {self.address(mem, 'shared')}, {self.condition()}, ({values}))")

    @form("mma", r"sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
    @form("mma", r"sync\.aligned\.m16n8k(4|8)\.row\.col\.f32\.tf32\.tf32\.f32")
    @form("mma", r"sync\.aligned\.(m8n8k4|m16n8k(4|8|16))\.row\.col\.f64\.f64\.f64\.f64")
    def mma(self, i, d, a, b, c):
        self.unpredicated(i)
        shape, kind = i.mods[2], i.mods[6]
        container = "u64" if kind == "f64" else "u32"
        texts = []
        for o in (a, b, c):
            items = o.items if isinstance(o, Vec) else (o,)
            texts.append("(" + "".join(self.val(x, container, full=True) + ", " for x in items) + ")")
        made = self.name(f"c.mma({shape!r}, {kind!r}, {', '.join(texts)}, m, {i.line})")
        for n, item in enumerate(d.items):
            self.set(item, container, f"{made}[{n}]")


class MatrixOperations:
    """A context's loads, stores and products of fragments."""

    def ldmatrix(self, spec, address, m):
        self.whole_warps(m, spec.line)
        out = []
        for rows in tensor_cores.matrix_rows(self.n, spec.count):
            rows = rows if m is None else rows[m[rows]]
            ((region, _, off),) = self.pieces(spec, address[rows], rows, 16, "shared")
            region.read(off, 16, self.of(rows), spec)
            value = tensor_cores.ldmatrix_register(
                region.views[2][off[:, None] // 2 + np.arange(8)], spec.trans
            )
            if m is not None:
                whole = np.zeros(self.n, u32)
                whole[m] = value
                value = whole
            out.append(value)
        return out

    def stmatrix(self, spec, address, m, values):
        self.whole_warps(m, spec.line)
        for rows, register in zip(tensor_cores.matrix_rows(self.n, spec.count), values, strict=True):
            if m is not None:
                rows, register = rows[m[rows]], register[m]
            if len(rows):
                data = tensor_cores.stmatrix_rows(register, spec.trans).view(u8).reshape(len(rows), 16)
                ((region, _, off),) = self.pieces(spec, address[rows], rows, 16, "shared")
                region.write(off, data, self.of(rows), spec)
                region.put(off, data, spec)

    def mma(self, shape, kind, a, b, c, m, line):
        self.whole_warps(m, line)
        return tensor_cores.mma(shape, kind, a, b, c, self.machine.unit)
