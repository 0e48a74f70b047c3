"""Single rules of memory: what is seen, what is found, and what is not. Most are in PTX written by hand."""

import itertools

import numpy as np
import pytest
import torch

from tests.tools.ptxsim.handwritten import ADDRESSES, PROGRAM, kinds, launch, racy, words
from tests.tools.ptxsim.launch import Emulator
from tests.tools.ptxsim.small_kernels import add_kernel

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")

# Races


def test_every_racing_read_sees_nan():
    """Not the last alone: what an earlier one read is stored."""
    body = (
        ADDRESSES + PROGRAM + "ld.global.b32 %r3, [%rd11];\nst.global.b32 [%rd12], %r3;\nbar.sync 0;\n"
        "ld.global.b32 %r4, [%rd11];\nret;\n$L1:\nst.global.b32 [%rd11], 7;\n"
    )
    results = []
    for seed in range(8):
        y = words(32)
        first = launch(body, words(32, 1), y, grid=(2,), seed=seed)
        if kinds(first) == {"race"} and y[0] == 1 and not first.reports.serious:
            again = words(32)
            launch(body, words(32, 1), again, grid=(2,), seed=seed, poison=racy(first))
            results.append(set(again.tolist()))
    assert results
    assert all(1 not in values for values in results), results


def test_a_store_over_a_release_ends_it():
    """Who acquires what another program has stored there without release is not ordered by the release."""
    body = (
        "mov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 0;\nsetp.eq.u32 %p2, %r2, 1;\n"
        "@%p1 bra $L0;\n@%p2 bra $L1;\n"
        "$LOOP:\nld.volatile.global.b32 %r3, [%rd2+8];\nsetp.ne.u32 %p3, %r3, WANTED;\n@%p3 bra $LOOP;\n"
        "ld.acquire.gpu.global.b32 %r3, [%rd2+8];\n"
        "ld.global.b32 %r4, [%rd1];\nst.global.b32 [%rd2+16], %r4;\nret;\n"
        "$L0:\nst.global.b32 [%rd1], 7;\nst.release.gpu.global.b32 [%rd2+8], 1;\nret;\n"
        "$L1:\nld.volatile.global.b32 %r3, [%rd2+8];\nsetp.ne.u32 %p3, %r3, 1;\n@%p3 bra $L1;\n"
        "LATE"
    )
    stores = (
        (1, "", False),
        (2, "st.relaxed.gpu.global.b32 [%rd2+8], 2;\n", True),
        (2, "mov.u32 %r5, 2;\nst.global.v4.b32 [%rd2], {%r5, %r5, %r5, %r5};\n", True),
        (2, "st.release.gpu.global.b32 [%rd2+8], 2;\n", True),  # of what its own program has done
    )
    for wanted, last, races in stores:
        for seed in range(4):
            text = body.replace("WANTED", str(wanted)).replace("LATE", last)
            machine = launch(text, words(1), words(5), grid=(3,), seed=seed)
            lines = [machine.program.f.lines[line - 1] for _, line, _ in machine.reports.found]
            assert ("ld.global.b32 %r4, [%rd1];" in lines) == races, last


def test_a_warp_s_own_store_over_its_release_keeps_it():
    body = (
        PROGRAM + "st.global.b32 [%rd1], 7;\nst.release.gpu.global.b32 [%rd2], 1;\n"
        "st.relaxed.gpu.global.b32 [%rd2], 2;\nret;\n"
        "$L1:\nld.volatile.global.b32 %r3, [%rd2];\nsetp.ne.u32 %p3, %r3, 2;\n@%p3 bra $L1;\n"
        "ld.acquire.gpu.global.b32 %r3, [%rd2];\nld.global.b32 %r4, [%rd1];\nst.global.b32 [%rd2+4], %r4;\n"
    )
    for seed in range(4):
        assert kinds(launch(body, words(1), words(2), grid=(2,), seed=seed)) == set()


def test_a_late_store_over_a_release_ends_it_when_it_comes():
    """The third reads x only if it has acquired what the first released, whatever is on its way."""
    body = (
        "mov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 0;\nsetp.eq.u32 %p2, %r2, 1;\n"
        "@%p1 bra $L0;\n@%p2 bra $L1;\nmov.u32 %r9, 0;\n"
        "$LOOP:\nld.acquire.gpu.global.b32 %r3, [%rd2];\nadd.u32 %r9, %r9, 1;\nsetp.ne.u32 %p3, %r3, 1;\n"
        "setp.lt.and.u32 %p3, %r9, 60, %p3;\n@%p3 bra $LOOP;\nsetp.ne.u32 %p3, %r3, 1;\n@%p3 bra $END;\n"
        "ld.global.b32 %r4, [%rd1];\nst.global.b32 [%rd2+4], %r4;\n$END:\nret;\n"
        "$L0:\nst.global.b32 [%rd1], 7;\nst.release.gpu.global.b32 [%rd2], 1;\nret;\n"
        "$L1:\nld.acquire.gpu.global.b32 %r3, [%rd2];\nsetp.ne.u32 %p3, %r3, 1;\n@%p3 bra $L1;\n"
        "st.relaxed.gpu.global.b32 [%rd2], 2;\n"
    )
    for seed in range(40):
        assert kinds(launch(body, words(1), words(2), grid=(3,), seed=seed, weak=True, by_warp=True)) == set()


def test_the_same_value_late_is_the_same_value():
    """Programs that store one value in one place do not race, others do, whether stores come late or not."""
    body = PROGRAM + "st.global.b32 [%rd1], 7;\nret;\n$L1:\nst.global.b32 [%rd1], VALUE;\n"
    for seed, weak in itertools.product(range(6), (False, True)):
        for value, found in ((7, set()), (8, {"race"})):
            text = body.replace("VALUE", str(value))
            assert kinds(launch(text, words(1), words(1), grid=(2,), seed=seed, weak=weak)) == found
    clash = "mov.u32 %r1, %tid.x;\nst.global.b32 [%rd1], %r1;\n"
    assert kinds(launch(clash, words(1), words(1), weak=True)) == {"conflict"}


def test_polling_sees_no_nan():
    """It may race: a rerun must end, too."""
    body = (
        PROGRAM + "ld.global.b32 %r3, [%rd1];\n$W:\nld.volatile.global.b32 %r4, [%rd1];\n"
        "setp.ne.u32 %p3, %r4, 7;\n@%p3 bra $W;\nret;\n$L1:\nst.global.b32 [%rd1], 7;\n"
    )
    for seed in range(6):
        first = launch(body, words(1), words(1), grid=(2,), seed=seed)
        launch(body, words(1), words(1), grid=(2,), seed=seed, poison=racy(first))


def test_an_atomic_operation_on_fresh_memory_is_found():
    body = ADDRESSES + "atom.global.gpu.relaxed.add.u32 %r3, [%rd11], 1;\n"
    assert kinds(launch(body, words(32), words(32))) == set()
    assert kinds(launch(body, words(32), words(32), fresh=True)) == {"uninitialised"}


@pytest.mark.parametrize("copied", [False, True])
def test_a_read_that_is_to_see_nan_sees_it(copied):
    """Program 0 sends its reads of x on, program 1 writes x."""
    load = "ld.global.b32 %r3, [%rd11];\n"
    if copied:
        load = (
            "mov.u32 %r5, smem;\nshl.b32 %r6, %r1, 2;\nadd.u32 %r5, %r5, %r6;\n"
            "cp.async.ca.shared.global [%r5], [%rd11], 4;\ncp.async.commit_group;\n"
            "cp.async.wait_group 0;\nld.shared.b32 %r3, [%r5];\n"
        )
    store = "st.global.b32 [%rd12], %r3;\nret;\n$L1:\nst.global.b32 [%rd11], 5;"
    body = ADDRESSES + PROGRAM + load + store
    first = launch(body, words(32, 1), words(32), grid=(2,), shared=128)
    y = words(32)
    launch(body, words(32, 1), y, grid=(2,), shared=128, poison=racy(first))
    assert kinds(first) == {"race"}
    assert np.isnan(y.view(np.float32)).all()
    assert np.isnan(y.view(np.float16)).all()
    assert set((y & 0x7F80).tolist()) == {0x7F80}  # bfloat16


def test_what_of_a_copy_sees_nan():
    """The 8 bytes of which one races; not the next ones, nor the zeros that fill the rest."""
    body = ADDRESSES + PROGRAM + (
        "mov.u32 %r5, smem;\nshl.b32 %r6, %r1, 4;\nadd.u32 %r5, %r5, %r6;\nmul.wide.u32 %rd13, %r1, 16;\n"
        "add.s64 %rd11, %rd1, %rd13;\nadd.s64 %rd12, %rd2, %rd13;\n"
        "cp.async.ca.shared.global [%r5], [%rd11], 16, 12;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
        "ld.shared.v4.b32 {%r3, %r4, %r6, %r7}, [%r5];\nst.global.v4.b32 [%rd12], {%r3, %r4, %r6, %r7};\n"
        "ret;\n$L1:\nmul.wide.u32 %rd13, %r1, 16;\nadd.s64 %rd11, %rd1, %rd13;\nst.global.b32 [%rd11], 5;"
    )  # fmt: skip
    first = launch(body, words(128, 1), words(128), grid=(2,), shared=512)
    y = words(128)
    launch(body, words(128, 1), y, grid=(2,), shared=512, poison=racy(first))
    assert kinds(first) == {"race"}
    assert np.unique(y.reshape(32, 4), axis=0).tolist() == [[0x7FFE7FFE, 0x7FFE7FFE, 1, 0]]


# Stores that come late

WAIT = "$LOOP:\nld.volatile.global.b32 %r20, [%rd1+8];\nadd.u32 %r9, %r9, 1;\nsetp.lt.u32 %p2, %r9, 60;\n"
WAIT += "@%p2 bra $LOOP;\n"


def test_a_program_s_stores_of_one_place_stay_in_order():
    body = (
        "mov.u32 %r9, 0;\nmov.u32 %r3, 2;\n" + PROGRAM + "st.global.b32 [%rd1], 1;\n"
        "st.global.v2.b32 [%rd1], {%r3, %r3};\nst.global.b32 [%rd1+4], 3;\n$L1:\n" + WAIT
    )
    chain = (
        "mov.u32 %r9, 0;\nmov.b32 %r3, 0x20002;\n" + PROGRAM + "st.global.b16 [%rd1], 1;\n"
        "st.global.b32 [%rd1], %r3;\nst.global.b16 [%rd1+2], 3;\n$L1:\n" + WAIT
    )  # the third may not pass the second, nor that the first
    for seed in range(30):
        x = words(4)
        launch(body, x, words(1), grid=(2,), weak=True, by_warp=True, seed=seed)
        assert x[:2].tolist() == [2, 3]
        x = words(4)
        launch(chain, x, words(1), grid=(2,), weak=True, by_warp=True, seed=seed)
        assert x.view(np.uint16)[:2].tolist() == [2, 3]


def test_elements_of_a_late_store_come_one_by_one():
    """Of a pair some program sees the second before the first."""
    body = (
        "mov.u32 %r9, 0;\nmov.u32 %r3, 7;\nmov.u32 %r1, %tid.x;\nsetp.eq.u32 %p3, %r1, 0;\n" + PROGRAM
        + "@%p3 st.global.v2.b32 [%rd1], {%r3, %r3};\n" + WAIT
        + "ret;\n$L1:\nld.volatile.global.b32 %r4, [%rd1+4];\nadd.u32 %r9, %r9, 1;\n"
        "setp.eq.u32 %p2, %r4, 0;\nsetp.lt.and.u32 %p2, %r9, 60, %p2;\n@%p2 bra $L1;\n"
        "ld.volatile.global.b32 %r5, [%rd1];\nst.global.b32 [%rd2], %r4;\nst.global.b32 [%rd2+4], %r5;\n"
    )  # fmt: skip
    seen = set()
    for seed in range(60):
        y = words(2, 9)
        launch(body, words(4), y, grid=(2,), weak=True, by_warp=True, seed=seed)
        seen.add(tuple(y.tolist()))
    assert {(7, 7), (7, 0)} <= seen


def test_a_program_sees_its_own_late_stores():
    """Atomic operations and cp.async do, too."""
    atomic = ADDRESSES + (
        "st.global.b32 [%rd11], 9;\natom.global.gpu.relaxed.add.u32 %r3, [%rd11], 1;\n"
        "st.global.b32 [%rd12], %r3;\n"
    )
    x, y = words(32, 1), words(32)
    launch(atomic, x, y, weak=True)
    assert set(y.tolist()) == {9}
    assert set(x.tolist()) == {10}
    copy = ADDRESSES + (
        "mov.u32 %r5, smem;\nshl.b32 %r6, %r1, 2;\nadd.u32 %r5, %r5, %r6;\nst.global.b32 [%rd11], 9;\n"
        "cp.async.ca.shared.global [%r5], [%rd11], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
        "ld.shared.b32 %r8, [%r5];\nst.global.b32 [%rd12], %r8;\n"
    )
    y = words(32)
    launch(copy, words(32, 1), y, shared=128, weak=True)
    assert set(y.tolist()) == {9}


def test_who_does_not_see_a_release_is_not_ordered_by_it():
    body = (
        "mov.u32 %r9, 0;\n" + PROGRAM + "st.global.b32 [%rd1], 7;\nst.release.gpu.global.b32 [%rd2], 1;\n"
        + WAIT + "ret;\n$L1:\nld.acquire.gpu.global.b32 %r4, [%rd2];\nld.global.b32 %r5, [%rd1];\n"
        "st.global.b32 [%rd2+4], %r4;\nst.global.b32 [%rd2+8], %r5;\n"
    )  # fmt: skip
    saw = []
    for seed in range(30):
        y = words(3)
        found = kinds(launch(body, words(4), y, grid=(2,), weak=True, by_warp=True, seed=seed))
        assert (y[1], y[2]) != (1, 0), "the release has come before what it releases"
        saw.append((int(y[1]), found))
    assert (1, set()) in saw
    assert (0, {"race"}) in saw
    # It may have read before anybody stored. What it read then, a later store races with.
    assert (0, set()) not in saw


# Fresh memory under tensors of two dtypes


def found(target, n, make):
    """What n additions find, after what make(floats, halves of the same memory) has done and returned."""
    with Emulator(target) as e:
        floats = torch.empty(256)
        x, y, out = make(floats, floats.view(torch.bfloat16))
        add_kernel[(1,)](x, y, out, n, BLOCK=128)
        return e.kinds()


def test_every_second_half_is_unwritten(target):
    def beside(floats, halves):
        halves[:128:2] = 1
        return halves, torch.ones(128), floats[128:]

    def passed_now(floats, halves):
        halves[:128:2], floats[64:] = 1, 1
        return halves, floats[64:], torch.empty(128)

    def passed_before(floats, halves):
        halves[::2] = 1
        add_kernel[(1,)](floats, floats, torch.empty(1), 0, BLOCK=128)  # nothing is read or written
        return halves, torch.ones(128), torch.empty(128)

    def strided(floats, halves):
        halves[::2] = 1
        return halves[::2], floats, torch.empty(128)

    for make in (beside, passed_now, passed_before, strided):
        assert found(target, 128, make) == {"uninitialised"}, make


def test_the_host_has_written_every_byte(target):
    def make(floats, halves):
        halves[:128] = 1
        floats[128:].view(torch.int32).fill_(0x3F807FFE)  # its lower half is what unwritten memory holds
        return halves[:128], floats[128:], torch.empty(128)

    assert found(target, 128, make) == set()


def test_a_kernel_writes_what_unwritten_memory_holds(target):
    def make(floats, halves):
        numbers = floats.view(torch.int16)
        numbers.fill_(0)  # the host's, until the kernel writes there
        add_kernel[(1,)](torch.full((128,), 0x7FFE).short(), numbers[256:], numbers, 128, BLOCK=128)
        return numbers, numbers, torch.empty_like(numbers)

    assert found(target, 128, make) == set()


def test_a_kernel_has_written_half_an_element(target):
    def make(floats, halves):
        ones = torch.ones(32).bfloat16()
        add_kernel[(1,)](ones, ones, halves, written, BLOCK=32)
        return floats, floats, torch.empty(16)

    for written in (31, 32):
        assert (found(target, 16, make) == {"uninitialised"}) == (written == 31)
