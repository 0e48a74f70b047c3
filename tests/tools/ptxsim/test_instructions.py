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


def said(body):
    """The words of what is found, the first at each line."""
    return {report.words for report in launch(body, words(1), words(1)).reports.first.values()}


def test_a_member_mask_is_that_of_the_lanes_that_are_there():
    body = (
        "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\nselp.b32 %r3, 65535, -65536, %p1;\n"
        "@%p1 bra $END;\nshfl.sync.bfly.b32 %r4, %r1, 1, 31, %r3;\n$END:\n"
    )
    assert said(body) == set()
    assert said(body.replace("-65536", "-1")) == {"it waits for a lane that is not there"}
    assert said(body.replace(" 1, 31,", " 16, 31,")) == {"a shuffle reads from a lane that is not there"}
    apart = body.replace("@%p1 bra $END;\n", "")
    assert said(apart) == set()
    assert said(apart.replace("-65536", "65535")) == {"a lane that its mask leaves out"}
    assert said(apart.replace("65535", "-1")) == {"lanes that wait for one another and whose masks differ"}
    across = apart.replace(" 1, 31,", " 16, 31,")
    assert said(across) == {"a shuffle reads from a lane that its mask leaves out"}
    for what, operands in (("bar.warp.sync", ""), ("redux.sync.add.s32", "%r4, %r1,")):
        halves = apart.replace("shfl.sync.bfly.b32 %r4, %r1, 1, 31,", f"{what} {operands}")
        with pytest.raises(parser.PtxError, match="is known only of a whole warp, with a mask of all lanes"):
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
    """The second of two warps jumps over it; or a predicate is false for all, or for the second."""
    first = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, LIMIT;\n"
    for text, limit, by_warp in itertools.product(("@!%p1 bra $END;\n", "@%p1 "), ("32", "0"), (False, True)):
        body = first.replace("LIMIT", limit) + text + barrier + "\n$END:\n"
        assert kinds(launch(body, words(1), words(1), threads=64, by_warp=by_warp)) == set()


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
