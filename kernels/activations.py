"""tanh and relu, and their derivatives taken from the output, as device functions.

    tanh(x), 1 - tanh(x)^2          relu(x), 1 where relu(x) > 0

Both are written out because the interpreter has no libdevice. NaN goes in and comes out.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of a float32 or float64 tile, right to a few ulp from the smallest subnormal to infinity.

    1 - e^-2|x| cancels for small |x|, so below 0.625 the odd approximations of the Cephes library take over
    (S. Moshier, single/tanhf.c and double/tanh.c; relative error 1.3e-7 and 2.5e-16).
    """
    a = tl.abs(x)
    small = a < 0.625
    e = tl.exp(-2.0 * a)  # never overflows; 0 at infinity
    r = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -r, r)
    y = tl.where(small, x, 0.0)  # keeps infinity out of the branch that is not taken
    s = y * y
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
        q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
        p = p / q
    else:
        p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s
        p = (p + 1.33314422036e-1) * s - 3.33332819422e-1
    return tl.where(small, y + y * (s * p), far)


@triton.jit
def relu(x):
    """max(x, 0). Not tl.maximum, which loses a NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def activate(x, RELU: tl.constexpr):
    if RELU:
        return relu(x)
    else:
        return tanh(x)


@triton.jit
def activate_backward(g, h, RELU: tl.constexpr):
    """g times the derivative at the step whose output is h; for relu exactly torch's threshold_backward."""
    if RELU:
        return tl.where(h <= 0, 0.0, g)  # a NaN in h lets g through, as there
    else:
        return g * (1.0 - h * h)
