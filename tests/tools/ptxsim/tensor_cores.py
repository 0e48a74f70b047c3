"""What tensor cores multiply: fragments, ldmatrix, wgmma's descriptors and swizzles, and how sums are
rounded.

PTX ISA, sections "Matrix Fragments for mma", "Warp-level matrix load instruction: ldmatrix",
"Matrix-Descriptor Format" and "Shared Memory Matrix Layout".

Products are exact. A sum is exact and rounded once; or, for a Unit, as NVIDIA's hardware adds: a group of
products and the sum so far are aligned to the largest of them, the bits below are cut off, and the result is
rounded towards zero (F. Khattak and M. Mikaitis, Accurate Models of NVIDIA Tensor Cores, arXiv 2512.07004).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .arithmetic import bf16_to_f32
from .parser import PtxError

u16, u32, u64 = np.uint16, np.uint32, np.uint64
f16, f32, f64 = np.float16, np.float32, np.float64
LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3


@dataclass(frozen=True)
class Unit:
    """group: 16-bit products that are added at once, half as many of tf32; extra: bits below float32's that
    are kept."""

    group: int
    extra: int


#: A100, and H100 with H200, by arXiv 2512.07004.
UNITS = {80: Unit(8, 1), 90: Unit(16, 2)}


def accumulate(c, a, b, places, kind, unit):
    """float32 c (warps, 32, elements) + a (warps, m, k) @ b (warps, k, n), of which places are a thread's."""
    rows, cols = places
    if unit is None:
        return (c.astype(f64) + (a @ b)[:, rows, cols]).astype(f32)
    group = unit.group // 2 if kind == "tf32" else unit.group
    with np.errstate(invalid="ignore"):
        for k in range(0, a.shape[2], group):
            products = a[:, :, None, k : k + group] * b.transpose(0, 2, 1)[:, None, :, k : k + group]
            c = _truncated_sum(c, products[:, rows, cols], unit.extra)
    return c


def _truncated_sum(c, products, extra):
    """c + the sum over the last axis: each cut where the largest's 24 bits and `extra` more end."""
    terms = np.concatenate([c.astype(f64)[..., None], products], -1)
    finite = np.isfinite(terms).all(-1)
    safe = np.where(finite[..., None], terms, 0.0)
    largest = np.frexp(np.abs(safe).max(-1))[1]  # of a number in [2^(e - 1), 2^e)
    unit = np.ldexp(1.0, np.maximum(largest, -125) - 24 - extra)
    total = (np.trunc(safe / unit[..., None]).sum(-1)) * unit
    return np.where(finite, toward_zero(total), terms.sum(-1).astype(f32))


def toward_zero(x):
    """float64 to float32, rounded towards zero."""
    r = x.astype(f32)
    over = np.abs(r.astype(f64)) > np.abs(x)
    return np.where(over, np.nextafter(r, f32(0)), r)


def _stack(rows, cols):
    return np.stack(rows, 1), np.stack(cols, 1)


@lru_cache
def fragment(shape: str, kind: str, operand: str):
    """(rows, columns), each (32, elements): where the elements of a thread's fragment lie in the matrix."""
    g, t = G, T
    if operand == "C":
        if shape == "m8n8k4":
            return _stack([g, g], [2 * t, 2 * t + 1])
        return _stack([g + 8 * (i >> 1) for i in range(4)], [2 * t + (i & 1) for i in range(4)])
    k = int(shape.split("k")[1])
    if kind in ("f16", "bf16"):  # pairs along K
        if operand == "A":
            n = range(k // 2)
            return _stack([g + 8 * (i >> 1 & 1) for i in n], [2 * t + (i & 1) + 8 * (i >> 2) for i in n])
        return _stack([2 * t + (i & 1) + 8 * (i >> 1) for i in range(k // 4)], [g] * (k // 4))
    if kind in ("tf32", "f64"):
        if shape == "m8n8k4":
            return (g[:, None], t[:, None]) if operand == "A" else (t[:, None], g[:, None])
        if operand == "A":
            return _stack([g + 8 * (i & 1) for i in range(k // 2)], [t + 4 * (i >> 1) for i in range(k // 2)])
        return _stack([t + 4 * i for i in range(k // 4)], [g] * (k // 4))
    raise PtxError(f"no layout for {operand} of {shape} {kind}")


def numbers(bits, kind):
    """float64 from elements in their own bits: of tf32 a tensor core sees the upper 19 of 32."""
    if kind == "bf16":
        return bf16_to_f32(bits).astype(f64)
    if kind == "f16":
        return bits.view(f16).astype(f64)
    if kind == "tf32":
        return (bits & u32(0xFFFFE000)).view(f32).astype(f64)
    return bits.view(f64)


@lru_cache
def _places(shape, kind, operand, height, width):
    """For each element of the matrix its place in the fragments of a warp, flattened."""
    rows, cols = fragment(shape, kind, operand)
    places = np.full((height, width), -1)
    places[rows, cols] = np.arange(rows.size).reshape(rows.shape)
    if (places < 0).any():
        raise PtxError(f"{operand} of {shape} {kind} has elements in no fragment")
    return places


def matrix(registers, shape, kind, operand):
    """(warps, height, width) from the registers of each thread."""
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    height, width = {"A": (m, k), "B": (k, n)}[operand]
    bits = np.ascontiguousarray(np.stack(registers, 1))
    x = numbers(bits.view(u16) if kind in ("f16", "bf16") else bits, kind)
    return x.reshape(len(x) // 32, -1)[:, _places(shape, kind, operand, height, width)]


def mma(shape, kind, a, b, c, unit):
    """The registers of D from those of A, B and C."""
    x, y = matrix(a, shape, kind, "A"), matrix(b, shape, kind, "B")
    places = fragment(shape, kind, "C")
    old = np.stack(c, 1)
    if kind == "f64":
        rows, cols = places
        new = old.view(f64).reshape(-1, 32, rows.shape[1]) + (x @ y)[:, rows, cols]
    else:
        new = accumulate(old.view(f32).reshape(-1, 32, places[0].shape[1]), x, y, places, kind, unit)
    bits = new.reshape(len(old), -1).view(old.dtype)
    return [np.ascontiguousarray(bits[:, i]) for i in range(bits.shape[1])]


# ldmatrix and stmatrix


def matrix_rows(n, count):
    """For each of `count` matrices the threads, of n, that give the addresses of its rows."""
    first = np.arange(0, n, 32)[:, None]
    return [(first + 8 * i + np.arange(8)).ravel() for i in range(count)]


def ldmatrix_register(rows, trans):
    """The register that each thread gets, from one matrix's rows (warps * 8, 8) of 16 bits."""
    m = rows.reshape(-1, 8, 8)
    return np.ascontiguousarray(m.transpose(0, 2, 1) if trans else m).view(u32).reshape(-1)


def stmatrix_rows(register, trans):
    """The reverse."""
    m = np.ascontiguousarray(register.reshape(-1, 8, 4)).view(u16)
    return np.ascontiguousarray(m.transpose(0, 2, 1) if trans else m).reshape(-1, 8)


# wgmma


@lru_cache(maxsize=4096)
def descriptor_addresses(bits: int, first: int, count: int, width: int, size: int, major_k: bool):
    """Byte addresses (count, width) of the elements, of `size` bytes, that a descriptor leads to.

    Rows first to first + count along M or N, columns along K; major_k: elements along K lie next to each
    other.
    """
    start, leading, stride = (((bits >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    pattern = {0: 16, 1: 128, 2: 64, 3: 32}[bits >> 62 & 3]  # bytes of a row of the swizzle's pattern
    if bits >> 49 & 7 and pattern > 16:  # without a swizzle it says nothing
        raise PtxError("a descriptor with a base offset")
    outer, inner = first + np.arange(count)[:, None], np.arange(width)[None, :]
    rows, byte = (outer, inner * size) if major_k else (inner, outer * size)
    linear = rows % 8 * pattern + byte % pattern
    if major_k:
        linear = linear + rows // 8 * stride + byte // pattern * (leading if pattern == 16 else pattern)
    elif pattern == 16:
        linear = linear + rows // 8 * leading + byte // pattern * stride
    else:
        linear = linear + rows // 8 * stride + byte // pattern * leading
    address = start + linear
    if pattern > 16:  # the row within the pattern is mixed into the place within a row
        address = address ^ ((address >> 7 & (pattern // 16 - 1)) << 4)
    return address


@lru_cache
def wgmma_accumulator(n: int):
    """(rows, columns), each (32, n / 2), of a warp's 16 x n part."""
    i = np.arange(n // 2)
    return G[:, None] + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * T[:, None] + (i & 1)
