"""wgmma, fence.proxy.async: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".

A product is as late as it may be: it reads shared memory and gives its result when it is waited for. Until
then its registers hold NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import tensor_cores
from ..parser import Vec
from ..regions import FOREVER, span
from .registers import Registers, form, poison, registers_of

u32 = np.uint32
SHAPES = r"m64n\d+k(16\.f32\.(bf16\.bf16|f16\.f16)|8\.f32\.tf32\.tf32)"


class Wgmma(Registers):
    @form("wgmma", r"fence\.sync\.aligned")
    def wgmma_fence(self, i):
        self.unpredicated(i)
        self.emit(f"c.whole_warps(m, {i.line})")

    @form("wgmma", r"commit_group\.sync\.aligned")
    def wgmma_commit(self, i):
        self.unpredicated(i)
        self.emit(f"c.wgmma_commit(m, {i.line})")

    @form("wgmma", r"wait_group\.sync\.aligned")
    def wgmma_wait(self, i, left):
        self.unpredicated(i)
        self.flush(
            everything=True
        )  # the results come into the registers themselves: nothing may linger in names
        self.emit(f"c.wgmma_wait(R, {int(left.text, 0)}, m, {i.line})")
        self.known.clear()

    @form("wgmma", rf"mma_async\.sync\.aligned\.{SHAPES}")
    def wgmma(self, i, d, a, b, scale, *immediates):
        """immediates: signs of A and B, then whether A (if in memory) and B lie with K outside."""
        self.unpredicated(i)
        flags = [int(x.text, 0) for x in immediates]
        if flags[:2] != [1, 1]:
            raise ValueError("a product with its sign changed")
        spec = self.spec(
            n=int(i.mods[3].split("n")[1].split("k")[0]), k=int(i.mods[3].split("k")[1]), kind=i.mods[5],
            d=tuple(x.index for x in d.items), a=tuple(sorted(registers_of(a))) if isinstance(a, Vec) else (),
            transposed=(len(flags) > 3 and bool(flags[2]), len(flags) > 2 and bool(flags[-1])),
        )  # fmt: skip
        if isinstance(a, Vec):
            left = "(" + "".join(self.val(x, "u32", full=True) + ", " for x in a.items) + ")"
        else:
            left = self.val(a, "u64", full=True)
        right, keep = self.val(b, "u64", full=True), self.val(scale, "pred", full=True)
        self.flush(everything=True)
        self.emit(f"c.wgmma({spec}, R, {left}, {right}, {keep}, m)")
        for x in d.items:
            self.known.pop(x.index, None)

    @form("fence", r"proxy\.async(\.shared)?")
    def proxy_fence(self, i):
        self.emit(f"c.proxy_fence({self.condition()})")


class Product(NamedTuple):
    spec: Any
    sum: Sum
    a: Any  # fragments, or offsets in shared memory in units of elements
    b: np.ndarray
    keep: np.ndarray  # per thread: whether it adds to what was there
    reads: list  # (offsets, warps)
    registers: list  # what A's registers hold


class Sum:
    """Accumulators under way. marks: what the registers hold until the products are waited for."""

    def __init__(self, value: np.ndarray, marks: list):
        self.value, self.marks, self.left = value, marks, 0


class WgmmaOperations:
    """A context's asynchronous products. sums: by their registers."""

    def proxy_fence(self, m):
        for g in self.warps if m is None else np.unique(self.gids[m]):
            self.machine.clocks.proxy_fence(int(g))

    def wgmma_commit(self, m, line):
        self.everyone(m, line)
        self.wgmma_groups.append(self.wgmma_open)
        self.wgmma_open = []

    def wgmma(self, spec, R, left, right, keep, m):
        self.everyone(m, spec.line)
        for operand in (keep, right, *(() if isinstance(left, tuple) else (left,))):
            of_warps = operand.reshape(-1, 32)
            if (of_warps != of_warps[:, :1]).any():
                self.fault(spec.line, "a descriptor or scale-d that differs within a warp")
        reads: list = []
        a = left
        if not isinstance(left, tuple):  # each warp has 16 of a warpgroup's 64 rows
            first = [16 * ((self.first // 32 + w) % 4) for w in range(self.n // 32)]
            a = self._operand(spec, left, first, 16, not spec.transposed[0], reads)
        b = self._operand(spec, right, [0] * (self.n // 32), spec.n, not spec.transposed[1], reads)
        now = [R[i] for i in spec.d]
        total = self.sums.get(spec.d)
        chained = total is not None and all(x is y for x, y in zip(now, total.marks, strict=True))
        if total is not None and not chained:
            self.report("async", spec.line, f"a sum that is under way is written over: {spec.text}")
        # A chain's first product begins with what the registers hold, the next with its result.
        if not chained:
            known = [np.zeros(self.n, u32) if x is None and not keep.any() else x for x in now]
            total = self.sums[spec.d] = Sum(np.stack(known, 1), [poison(32, self.n) for _ in spec.d])
            for i, mark in zip(spec.d, total.marks, strict=True):
                R[i] = mark
        total.left += 1
        self.wgmma_open.append(Product(spec, total, a, b, keep.copy(), reads, [R[i] for i in spec.a]))

    def _operand(self, spec, bits, first, count, major_k, reads):
        """(warps, count, k) elements of an operand in shared memory, as indices; notes the reads of them."""
        region = self.cta.shared
        size = 4 if spec.kind == "tf32" else 2
        each = [
            tensor_cores.descriptor_addresses(int(word), row, count, spec.k, size, major_k)
            for word, row in zip(bits.reshape(-1, 32)[:, 0], first, strict=True)
        ]
        if max(int(e.max()) for e in each) + size > len(region.mem):
            self.fault(spec.line, f"a descriptor leads out of shared memory: {spec.text}")
        off = np.concatenate([e.ravel() for e in each])
        threads = self.of(np.repeat(np.arange(0, self.n, 32), each[0].size))
        region.read(off, size, threads, spec, clock=FOREVER)
        region.proxy_read(off, size, threads.gids, spec)
        np.add.at(region.reading, off[:, None] + span(size), 1)
        reads.append((off, threads.gids))
        return np.stack(each) // size

    def wgmma_wait(self, R, left, m, line):
        self.everyone(m, line)
        while len(self.wgmma_groups) > left:
            for product in self.wgmma_groups.pop(0):
                spec = product.spec
                if any(R[i] is not x for i, x in zip(spec.a, product.registers, strict=True)):
                    self.report("async", line, f"registers that {spec.text} reads were written meanwhile")
                self._finish(product)
        for d, total in list(self.sums.items()):
            if not total.left:
                if any(R[i] is not mark for i, mark in zip(d, total.marks, strict=True)):
                    self.report("async", line, "a sum that was under way has been written over")
                for n, i in enumerate(d):
                    R[i] = np.ascontiguousarray(total.value[:, n])
                del self.sums[d]

    def _finish(self, product):
        spec, total, region = product.spec, product.sum, self.cta.shared
        size = 4 if spec.kind == "tf32" else 2
        memory = region.views[size]
        if isinstance(product.a, tuple):
            a = tensor_cores.matrix(product.a, f"m16n8k{spec.k}", spec.kind, "A")
        else:
            a = tensor_cores.numbers(memory[product.a], spec.kind)
        b = tensor_cores.numbers(memory[product.b], spec.kind).transpose(0, 2, 1)
        old = total.value.view(np.float32).reshape(-1, 32, spec.n // 2)
        old = np.where(product.keep.reshape(-1, 32, 1), old, np.float32(0))
        new = tensor_cores.accumulate(
            old, a, b, tensor_cores.wgmma_accumulator(spec.n), spec.kind, self.machine.unit
        )
        total.value = new.reshape(self.n, -1).view(u32)
        total.left -= 1
        for off, gids in product.reads:
            idx = off[:, None] + span(size)
            np.add.at(region.reading, idx, -1)
            region.note_read(idx, gids, self.machine.clocks.now(gids))
