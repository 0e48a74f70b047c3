"""NumPy for what it lacks: integers, rounding, and the sums of tensor cores."""

import numpy as np

from tests.tools.ptxsim import arithmetic, tensor_cores


def test_division_is_towards_zero():
    a = np.array([-(2**31), -7, 7, -7, 7], np.int32)
    b = np.array([10, 2, -2, -2, 2], np.int32)
    assert arithmetic.div_int(a, b).tolist() == [-214748364, -3, -3, 3, 3]
    assert arithmetic.rem_int(a, b).tolist() == [-8, -1, 1, -1, 1]
    assert arithmetic.div_int(np.array([-(2**63)]), np.array([10])).tolist() == [-922337203685477580]


def test_a_fused_product_is_rounded_once():
    """152 * 240 lies between two bfloat16 numbers; what is added decides, and float32 would lose it."""
    f32 = np.float32
    a, b, c = np.array([152, 152], f32), np.array([240, 240], f32), np.array([2.0**-30, -(2.0**-30)], f32)
    assert arithmetic.bf16_to_f32(arithmetic.f32_to_bf16(arithmetic.fma_half(a, b, c))).tolist() == [
        36608,
        36352,
    ]
    one, tiny = f32(1 + 2.0**-23), f32(2.0**-23)
    exact = arithmetic.fma32(np.array([one]), np.array([f32(1 + 2.0**-23)]), np.array([-tiny]))
    assert exact.tolist() == [float(f32(1 + 2.0**-23))]
    # 2^-60 below a tie, which float64 does not hold beside 1.
    a, b = np.array([f32(2.0**-12 * (1 + 2.0**-18))]), np.array([f32(2.0**-12 * (1 - 2.0**-18))])
    assert arithmetic.fma32(a, b, np.array([f32(1 + 2.0**-23)])).tolist() == [1 + 2.0**-23]
    wide = arithmetic.fma32(np.array([f32(2.0**-30)]), np.array([f32(2.0**-50)]), np.array([f32(1)]))
    assert wide.tolist() == [1.0]


def test_zeros_have_an_order():
    zeros = np.array([-0.0, 0.0], np.float32)
    assert not np.signbit(arithmetic.maximum(zeros, zeros[::-1], False)).any()
    assert np.signbit(arithmetic.minimum(zeros, zeros[::-1], False)).all()
    nan = np.array([np.nan], np.float32)
    assert arithmetic.maximum(nan, zeros[:1] + 1, False).tolist() == [1.0]
    assert np.isnan(arithmetic.maximum(nan, zeros[:1], True)).all()


def test_subnormals_become_zeros_of_their_sign():
    tiny = np.array([1e-40, -1e-40, 1e-38, 1.0, np.inf], np.float32)
    assert np.array_equal(arithmetic.flushed(tiny), np.array([0, 0, 0, 1, np.inf], np.float32))
    assert np.signbit(arithmetic.flushed(tiny)[1])


# Tensor cores' sums


def tensor_core(a, b, c, unit):
    """c + a . b of vectors, as one element of a product."""
    places = tensor_cores.fragment("m16n8k16", "bf16", "C")
    left, right = np.zeros((1, 16, len(a))), np.zeros((1, len(a), 8))
    left[0, 0], right[0, :, 0] = a, b
    old = np.full((1, 32, 4), c, np.float32)
    return float(tensor_cores.accumulate(old, left, right, places, "bf16", unit)[0, 0, 0])


def test_a_truncated_sum():
    """By arXiv 2512.07004: towards zero, one (A100) or two (H100) bits below float32's last are kept."""
    ones, small = np.ones(16), np.full(16, 2.0**-24)
    for capability, extra in ((80, 1), (90, 2)):
        unit = tensor_cores.UNITS[capability]
        # Each term is half of the sum's last bit. Kept, eight of them together are four of its last bits.
        assert tensor_core(small[:8], ones[:8], 1.0, unit) == 1.0 + 4 * 2.0**-23
        lost = 2.0 ** -(24 + extra)
        assert tensor_core(np.full(8, lost), ones[:8], 1.0, unit) == 1.0
        assert tensor_core([2.0**-24], [1.0], -1.0, unit) == -1.0 + 2.0**-24
        assert tensor_core([-(2.0**-25)], [1.0], 1.0, unit) == (1.0 if extra == 1 else 1.0 - 2.0**-24)
    assert tensor_core(small, ones, 1.0, None) == np.float32(1.0 + 16 * 2.0**-24)
    assert np.isnan(tensor_core([np.inf], [0.0], 1.0, tensor_cores.UNITS[90]))
