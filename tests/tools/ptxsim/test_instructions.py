"""Single instructions in PTX written by hand: their registers, their lanes, their results."""

import itertools

import numpy as np
import pytest

from tests.tools.ptxsim import parser
from tests.tools.ptxsim.handwritten import ADDRESSES, kinds, launch, words

# Registers and lanes


@pytest.mark.parametrize("text", ["@%p7 st.global.b32 [%rd1], 5;", "@%p7 bra $END;\n$END:"])
def test_a_predicate_that_nobody_wrote_is_an_error(text):
    body = f"mov.u32 %r1, %tid.x;\nsetp.eq.u32 %p1, %r1, 99;\n@%p1 bra $W;\nbra $X;\n$W:\n" \
        f"setp.eq.u32 %p7, %r1, 0;\n$X:\n{text}"  # fmt: skip
    with pytest.raises(parser.PtxError, match="%p7 is read, and no thread has written it"):
        launch(body, words(32), words(1))


def test_a_member_mask_is_that_of_the_lanes_that_are_there():
    body = (
        "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\nselp.b32 %r3, 65535, -65536, %p1;\n"
        "@%p1 bra $END;\nshfl.sync.bfly.b32 %r4, %r1, 1, 31, %r3;\n$END:\n"
    )
    assert kinds(launch(body, words(1), words(1))) == set()
    assert kinds(launch(body.replace("-65536", "-1"), words(1), words(1))) == {"lanes"}
    apart = body.replace("@%p1 bra $END;\n", "")
    assert kinds(launch(apart, words(1), words(1))) == set()
    alone = apart.replace("65535", "-1").replace("-65536", "1").replace(" 16;", " 1;")
    assert kinds(launch(alone, words(1), words(1))) == {"lanes"}
    across = apart.replace("bfly.b32 %r4, %r1, 1,", "bfly.b32 %r4, %r1, 16,")
    assert kinds(launch(across, words(1), words(1))) == {"lanes"}
    halves = apart.replace("shfl.sync.bfly.b32 %r4, %r1, 1, 31,", "bar.warp.sync")
    with pytest.raises(parser.PtxError, match=r"bar\.warp\.sync of a part of a warp"):
        launch(halves, words(1), words(1))


def test_lanes_that_wait_for_one_another_have_one_mask():
    """Lane 0 names itself and lane 1, all others themselves."""
    body = (
        "mov.u32 %r1, %tid.x;\nsetp.eq.u32 %p1, %r1, 0;\nshl.b32 %r2, 1, %r1;\nselp.b32 %r3, 3, %r2, %p1;\n"
        "shfl.sync.idx.b32 %r4, %r1, %r1, 31, %r3;\n"
    )
    assert kinds(launch(body, words(1), words(1))) == {"lanes"}


@pytest.mark.parametrize("barrier", [
    "bar.warp.sync -1;", "redux.sync.add.s32 %r4, %r1, -1;", "shfl.sync.down.b32 %r4, %r1, 9, 31, -1;",
])  # fmt: skip
def test_a_warp_may_be_away(barrier):
    """The second of two warps jumps over it; or nobody comes to it."""
    body = "mov.u32 %r1, %tid.x;\nsetp.ge.u32 %p1, %r1, LIMIT;\n@%p1 bra $END;\n" + barrier + "\n$END:\n"
    for limit, by_warp in itertools.product(("32", "0"), (False, True)):
        text = body.replace("LIMIT", limit)
        assert kinds(launch(text, words(1), words(1), threads=64, by_warp=by_warp)) == set()


# Instructions


def test_relu_of_an_fma():
    """A half's fused product below zero is zero: -1.0 * 1.0 + 0.5, and 1.0 * 1.0 + 0.5."""
    body = ADDRESSES + (
        "ld.global.b32 %r3, [%rd11];\nmov.b32 %r4, 0x3F803F80;\nmov.b32 %r5, 0x3F003F00;\n"
        "fma.rn.relu.bf16x2 %r6, %r3, %r4, %r5;\nst.global.b32 [%rd12], %r6;\n"
    )
    y = words(32)
    launch(body, words(32, 0x3F80BF80), y)
    assert set(y.tolist()) == {0x3FC00000}


def test_subnormals_and_ftz():
    """.ftz makes zeros of small operands and of small results; without it they count."""
    body = ADDRESSES + (
        "ld.global.b32 %r3, [%rd11];\nmov.b32 %f1, %r3;\nmov.b32 %f2, 0fFACTOR;\n"
        "mul.MODIFIER.f32 %f3, %f1, %f2;\nmov.b32 %r4, %f3;\nst.global.b32 [%rd12], %r4;\n"
    )
    for modifier, small, factor, product in (
        ("rn", 2.0**-130, 4.0, 2.0**-128),
        ("rn.ftz", 2.0**-130, 4.0, 0.0),
        ("rn.ftz", 2.0**-126, 0.5, 0.0),
    ):
        y = words(32)
        bits = f"{np.float32(factor).view(np.uint32):08X}"
        text = body.replace("MODIFIER", modifier).replace("FACTOR", bits)
        launch(text, np.full(32, small, np.float32), y)
        assert set(y.view(np.float32).tolist()) == {product}
