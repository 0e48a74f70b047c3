"""Arithmetic that NumPy does not have, on arrays of bits, as the PTX ISA says.

Sections "Integer Arithmetic Instructions", "Logic and Shift Instructions", "Floating Point Instructions" and
"Data Movement and Conversion Instructions".
"""

from __future__ import annotations

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i64 = np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
UINT = {f32: u32, f64: u64}

# Floats


def bf16_to_f32(x):
    return (x.astype(u32) << u32(16)).view(f32)


def f16_to_f32(x):
    return x.view(f16).astype(f32)


def f32_to_bf16(x):
    """To nearest even; NaN to 0x7FFF."""
    b = np.ascontiguousarray(x).view(u32)
    r = ((b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(x != x, u16(0x7FFF), r)


def f32_to_f16(x):
    """To nearest even; NaN to 0x7FFF."""
    return np.where(x != x, u16(0x7FFF), x.astype(f16).view(u16))


def rna_tf32(x):
    """cvt.rna.tf32.f32: to nearest, ties away from zero; the low 13 bits become zero."""
    b = x.view(u32)
    r = (b + u32(0x1000)) & u32(0xFFFFE000)
    special = (b & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, np.where(x != x, u32(0x7FFFFFFF), b), r)


def flushed(x):
    """float32 with subnormals as zeros of their sign: the modifier .ftz."""
    b = x.view(u32)
    return np.where((b & u32(0x7F800000)) == 0, b & u32(0x80000000), b).view(f32)


def _odd(y, rest):
    """y, which was rounded to nearest, rounded to odd instead: what rounds that again rounds rightly.

    rest: what the rounding of y took away.
    """
    even = (y.view(UINT[y.dtype.type]) & 1) == 0
    other = np.nextafter(y, np.copysign(y.dtype.type(np.inf), rest.astype(y.dtype)))
    return np.where((rest != 0) & even & np.isfinite(y), other, y)


def _fma(a, b, c):
    """Of float32 numbers, in float64, rounded to odd. The product is exact there."""
    product, c = a.astype(f64) * b, c.astype(f64)
    y = product + c
    back = y - product
    return _odd(y, (product - (y - back)) + (c - back))


def fma32(a, b, c):
    return _fma(a, b, c).astype(f32)


def fma_half(a, b, c):
    """Of halves as float32; what it gives rounds to a half as the exact result does."""
    wide = _fma(a, b, c)
    y = wide.astype(f32)
    return _odd(y, wide - y)


def fma64(a, b, c):
    """With 11 bits more, not exact: where terms cancel, little of what is left is right."""
    return (a.astype(np.longdouble) * b + c).astype(f64)


def maximum(a, b, nan):
    """nan: of a number and NaN NaN, else the number. +0 is more than -0."""
    return np.where((a == 0) & (b == 0), a + b, (np.maximum if nan else np.fmax)(a, b))


def minimum(a, b, nan):
    return -maximum(-a, -b, nan)


class Approximate:
    """The instructions of which the ISA only bounds the error: exact, or as far off as it allows.

    error 1: div.full by up to 2 ulp, ex2 by a factor of 1 +- 2^-22.5, tanh of 1 +- 2^-11, in a direction that
    hangs on the argument's bits.
    """

    def __init__(self, error: float = 0.0):
        self.error = error

    def _off(self, y, x, relative):
        if self.error:
            b = np.ascontiguousarray(x, f32).view(u32)
            odd = ((b * u32(2654435761)) >> u32(16)) & u32(1)
            y = y * (1.0 + self.error * relative * np.where(odd, 1.0, -1.0))
        return y.astype(f32)

    def tanh(self, x):
        return np.clip(self._off(np.tanh(x.astype(f64)), x, 2.0**-11), f32(-1), f32(1))

    def ex2(self, x):
        return self._off(np.exp2(x.astype(f64)), x, 2.0**-22.5)

    def div_full(self, a, b):
        y = a.astype(f64) / b.astype(f64)
        return self._off(y, np.broadcast_to(b, y.shape), 1.5 * 2.0**-24)


# Integers


def shl(x, s, width):
    """By more than the width: zero."""
    r = x << np.minimum(s, u32(width - 1)).astype(x.dtype)
    return np.where(s >= u32(width), x.dtype.type(0), r)


def shr(x, s, width):
    """By more than the width: zero, or of a negative number -1."""
    r = x >> np.minimum(s, u32(width - 1)).astype(x.dtype)
    return r if x.dtype.kind == "i" else np.where(s >= u32(width), x.dtype.type(0), r)


def div_int(a, b):
    """Towards zero; by zero all ones, as the hardware's routine happens to give."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    q = a // safe  # downwards
    q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), q)


def rem_int(a, b):
    return (a - div_int(a, b) * b).astype(a.dtype)


def bfe(x, pos, length, signed):
    """Bits pos .. pos + length - 1, sign-extended if signed; x, the result: unsigned of 32 or 64 bits."""
    width = x.dtype.itemsize * 8
    pos, length = (np.broadcast_to(n, x.shape).astype(i64) & 0xFF for n in (pos, length))
    wide = x.astype(u64)
    field = np.where(pos >= width, u64(0), wide >> np.minimum(pos, 63).astype(u64))
    r = field & _ones(length)
    if signed:
        top = np.clip(pos + length - 1, 0, width - 1)
        negative = ((wide >> top.astype(u64)) & u64(1)).astype(bool) & (length > 0)
        r = np.where(negative, r | ~_ones(np.minimum(length, np.clip(width - pos, 0, None))), r)
    return r.astype(x.dtype)


def _ones(n):
    """n bits of ones, in 64."""
    return np.where(n >= 64, ~u64(0), (u64(1) << np.minimum(n, 63).astype(u64)) - u64(1))


def prmt(a, b, s):
    """Of the default mode: each of 4 nibbles chooses one of 8 bytes, or its sign."""
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    s = np.broadcast_to(s, a.shape).astype(u64)
    r = np.zeros(a.shape, u32)
    for i in range(4):
        nibble = (s >> u64(4 * i)) & u64(0xF)
        byte = (both >> ((nibble & u64(7)) * u64(8))) & u64(0xFF)
        sign = np.where(byte & u64(0x80), u64(0xFF), u64(0))
        r |= (np.where(nibble & u64(8), sign, byte) << u64(8 * i)).astype(u32)
    return r


def popc(x):
    return np.bitwise_count(x).astype(u32)
