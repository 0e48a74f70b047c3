"""The emulator itself: small Triton kernels with known answers, and broken code that must be noticed."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tests.tools.ptxsim import parser
from tests.tools.ptxsim.context import Fault
from tests.tools.ptxsim.global_memory import GlobalMemory
from tests.tools.ptxsim.launch import Emulator
from tests.tools.ptxsim.mutations import without
from tests.tools.ptxsim.program import Program
from tests.tools.ptxsim.small_kernels import (
    add_kernel,
    collide_kernel,
    count_kernel,
    dot_kernel,
    integers_kernel,
    matmul_kernel,
    pass_on_kernel,
    scan_kernel,
    softmax_kernel,
    sums_kernel,
    transpose_kernel,
)

#: Triton 3.9 says so of kernels that leave it to choose; the project's do not.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")


@pytest.fixture
def emulate(target):
    """Makes emulators for the target."""
    return lambda **options: Emulator(target, **options)


def far(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def expect_clean(emulator):
    assert not emulator.found, emulator.lines()[:3]


# Right code


@pytest.mark.parametrize("by_warp", [False, True])
def test_add(emulate, by_warp):
    with emulate(by_warp=by_warp, lanes=True) as e:
        x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
        add_kernel[(triton.cdiv(1000, 256),)](x, y, out, 1000, BLOCK=256)
        assert torch.equal(out, x + y)
        expect_clean(e)


DOTS = {
    "16 bits": ([(16, 16, 16), (64, 16, 64), (128, 64, 32)], ["bf16", "fp16"], [4, 8], {}),
    "tf32": ([(16, 16, 16), (64, 64, 32)], ["tf32", "tf32x3"], [4, 8], {}),
    "multiply-add": ([(16, 16, 32), (32, 32, 16)], ["fp32", "fp64"], [1, 4], {}),
    "few warps": ([(16, 16, 32), (64, 16, 64)], ["bf16", "tf32"], [1, 2], {}),
    "by warp": ([(64, 16, 64)], ["bf16", "tf32"], [4, 8], {"by_warp": True, "lanes": True}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@pytest.mark.parametrize("name", DOTS)
def test_dot(emulate, name):
    """Every layout of both operands: mma.sync and wgmma, ldmatrix and descriptors."""
    shapes, kinds, warps, options = DOTS[name]
    with emulate(**options) as e:
        for (M, N, K), kind, w, ta, tb in itertools.product(
            shapes, kinds, warps, (False, True), (False, True)
        ):
            dtype = DTYPES.get(kind, torch.float32)
            a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
            wide = kind == "fp64"
            c = torch.full((M, N), float("nan"), dtype=torch.float64 if wide else torch.float32)
            dot_kernel[(1,)](
                a.t().contiguous() if ta else a, b.t().contiguous() if tb else b, c, M=M, N=N, K=K,
                P=kind if kind in ("tf32", "tf32x3") else "ieee",
                ACC=tl.float64 if wide else tl.float32, TA=ta, TB=tb, num_warps=w,
            )  # fmt: skip
            allowed = {"tf32": 1e-3, "fp64": 1e-14}.get(kind, 1e-6)
            assert far(c, a.double() @ b.double()) <= allowed, (M, N, K, kind)
            expect_clean(e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul_in_a_pipeline(emulate, dtype):
    with emulate() as e:
        for blocks, stages in itertools.product(((16, 16, 32), (64, 64, 64)), (1, 3)):
            M, N, K = 80, 72, 200
            a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
            c = torch.full((M, N), float("nan"), dtype=dtype)
            grid = (triton.cdiv(M, blocks[0]), triton.cdiv(N, blocks[1]))
            matmul_kernel[grid](a, b, c, M, N, K, *blocks, num_stages=stages)
            assert far(c, a.double() @ b.double()) <= (1e-2 if dtype == torch.bfloat16 else 1e-3)
            expect_clean(e)
        # Rows of 200 numbers are aligned to 16 bytes in float32 only.
        assert dtype == torch.bfloat16 or any("cp.async" in ptx for _, ptx in e.kernels)


@pytest.mark.parametrize("by_warp", [False, True])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_reductions(emulate, by_warp, warps):
    with emulate(by_warp=by_warp, lanes=True) as e:
        x = torch.randn(64, 32)
        rows, cols, total = torch.empty(64), torch.empty(32), torch.empty(1)
        sums_kernel[(1,)](x, rows, cols, total, M=64, N=32, num_warps=warps)
        assert far(rows, x.double().sum(1)) <= 1e-6
        assert torch.equal(cols, x.max(0).values)
        assert far(total, x.double().sum()[None]) <= 1e-5
        expect_clean(e)


@pytest.mark.parametrize("by_warp", [False, True])
@pytest.mark.parametrize("warps", [1, 4])
def test_transpose_softmax_scan(emulate, by_warp, warps):
    with emulate(by_warp=by_warp, lanes=True) as e:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            x = torch.randint(-99, 99, (64, 32)).to(dtype)
            y = torch.empty(32, 64, dtype=dtype)
            transpose_kernel[(1,)](x, y, M=64, N=32, num_warps=warps)
            assert torch.equal(y, x.t())
        x = torch.randn(6, 256)
        y = torch.empty_like(x)
        softmax_kernel[(6,)](x, y, N=256, num_warps=warps)
        assert far(y, x.double().softmax(1)) <= 1e-6
        x = torch.randint(0, 9, (512,), dtype=torch.int32)
        y = torch.empty_like(x)
        scan_kernel[(1,)](x, y, N=512, num_warps=warps)
        assert torch.equal(y, x.cumsum(0).int())
        expect_clean(e)


def test_atomics_and_integers(emulate):
    with emulate() as e:
        out = torch.zeros(7, dtype=torch.int32)
        count_kernel[(3,)](out, BLOCK=128)
        assert torch.equal(out, 3 * torch.stack([torch.arange(k, 128, 7).sum() for k in range(7)]).int())
        x = torch.randint(-(2**31), 2**31 - 1, (128,), dtype=torch.int64).int()
        size = torch.tensor([1, 1 << 16, 1 << 28, 1]).repeat(32)
        y = (torch.randint(1, 2**31 - 1, (128,), dtype=torch.int64) // size).int().clamp(min=1)
        q, r, s = (torch.empty(128, dtype=torch.int32) for _ in range(3))
        integers_kernel[(1,)](x, y, q, r, s, 128, BLOCK=128)
        assert torch.equal(q, torch.div(x.long(), y.long(), rounding_mode="trunc").int())
        assert torch.equal(r, torch.fmod(x.long(), y.long()).int())
        assert torch.equal(s, (x.long() >> (y & 15).long()).int() ^ (x << (y & 7)).int() | (x & y))
        expect_clean(e)


def pass_on(emulator, *, release=True):
    """Whether all got what was passed on, and what was found."""
    with emulator as e:
        x, count = torch.zeros(256, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        out = torch.full((4, 256), -1, dtype=torch.int32)
        pass_on_kernel[(4,)](
            x, count, out, RELEASE=release, BLOCK=256, num_warps=4, launch_cooperative_grid=True
        )
        return bool((out[1:] == torch.arange(256, dtype=torch.int32)).all()), e.kinds()


def test_release_and_acquire(emulate):
    for seed, by_warp, weak in itertools.product(range(3), (False, True), (False, True)):
        assert pass_on(emulate(seed=seed, by_warp=by_warp, weak=weak)) == (True, set())


# Broken code


def test_no_release_is_a_race(emulate):
    assert "race" in pass_on(emulate(), release=False)[1]
    assert not all(pass_on(emulate(weak=True, seed=seed), release=False)[0] for seed in range(8))


def test_no_barrier_before_the_release_is_a_race(emulate):
    e = emulate()
    e.edit = without(r"bar\.sync")
    assert "race" in pass_on(e)[1]


def test_no_barrier_in_a_reduction_is_a_race(emulate):
    wrong = 0
    for by_warp, seed in [(False, 0), *((True, seed) for seed in range(8))]:
        with emulate(by_warp=by_warp, seed=seed) as e:
            e.edit = without(r"bar\.sync")
            x = torch.randn(64, 32)
            rows, cols, total = torch.empty(64), torch.empty(32), torch.empty(1)
            sums_kernel[(1,)](x, rows, cols, total, M=64, N=32, num_warps=4)
            assert e.kinds() & {"race", "uninitialised"}
            wrong += not (torch.equal(cols, x.max(0).values) and torch.allclose(rows, x.sum(1), atol=1e-4))
    assert wrong, "no order of the warps showed it"


def test_no_barrier_in_a_transpose_is_a_race(emulate):
    with emulate() as e:
        e.edit = lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx)
        x, y = torch.randn(64, 32), torch.empty(32, 64)
        transpose_kernel[(1,)](x, y, M=64, N=32, num_warps=4)
        assert "race" in e.kinds()


def found_in_a_pipeline(emulator, edit, stages=3, scale=1):
    """What is found in a product with asynchronous copies whose PTX was edited; "wrong": its result."""
    with emulator as e:
        e.edit = edit
        a, b = torch.randn(64, 512).bfloat16(), torch.randn(512, 64).bfloat16()
        c = torch.full((64, 64), float("nan"), dtype=torch.bfloat16)
        try:
            matmul_kernel[(1, 1)](a, b, c, 64, 64, 512, 64, 64, 64, scale, num_stages=stages)
        except Fault as fault:
            return {str(fault)}
        right = far(c, scale * a.double() @ b.double()) < 1e-2
        return e.kinds() | (set() if right else {"wrong"})


def test_no_wait_for_copies_is_noticed(emulate):
    assert found_in_a_pipeline(emulate(), None) == set()
    edit = lambda ptx: re.sub(r"cp\.async\.wait_group\s+\S+;", "", ptx)  # noqa: E731
    assert "async" in found_in_a_pipeline(emulate(), edit)


def test_barriers_of_a_pipeline_count(emulate):
    e = emulate()
    found_in_a_pipeline(e, None)
    n = len(re.findall(r"bar\.sync", e.kernels[-1][1]))
    found = []
    for k in range(n):
        e = emulate()
        found.append(found_in_a_pipeline(e, without(r"bar\.sync", k)))
        assert not found[-1] or e.serious  # in shared memory: it cannot be that nobody uses what is read
    assert any(kinds & {"race", "async"} for kinds in found), found


def test_no_proxy_fence_and_no_wgmma_wait_are_noticed(emulate, target):
    if target != "sm_90":
        pytest.skip("only Hopper has wgmma")
    assert found_in_a_pipeline(emulate(), None, stages=1) == set()
    edit = lambda ptx: re.sub(r"fence\.proxy\.async\S*;", "", ptx)  # noqa: E731
    assert "proxy" in found_in_a_pipeline(emulate(), edit, stages=1)
    edit = lambda ptx: re.sub(r"wgmma\.wait_group\S*\s+\d+;", "", ptx)  # noqa: E731
    assert found_in_a_pipeline(emulate(), edit, stages=1) & {"async", "wrong"}


@pytest.mark.parametrize("operand", ["sum", "A"])
def test_registers_written_under_a_wgmma_are_noticed(emulate, target, operand):
    if target != "sm_90":
        pytest.skip("only Hopper has wgmma")

    def edit(ptx):
        lists = re.search(r"wgmma\.mma_async[^{]*\{(%r\d+)[^}]*\}, \{(%r\d+)", ptx)
        register = lists[1 if operand == "sum" else 2]
        return ptx.replace("wgmma.commit_group", f"mov.b32 {register}, 0;\nwgmma.commit_group", 1)

    assert found_in_a_pipeline(emulate(), None, stages=1, scale=2) == set()
    assert "async" in found_in_a_pipeline(emulate(), edit, stages=1, scale=2)


def test_out_of_bounds(emulate):
    with emulate(), pytest.raises(Fault, match=r"out of bounds.*y has 3996 bytes, this is at 3996"):
        add_kernel[(4,)](torch.randn(1000), torch.randn(999), torch.empty(1000), 1000, BLOCK=256)


def test_out_of_bounds_names_the_nearest():
    x, y = SimpleNamespace(name="x", mem=bytes(4000)), SimpleNamespace(name="y", mem=bytes(3996))
    near = GlobalMemory({4096: x, 8192: y}).near
    assert near(8192 + 3996) == "y has 3996 bytes, this is at 3996"
    assert near(4096 + 4000) == "x has 4000 bytes, this is at 4000"
    assert near(4090) == "x has 4000 bytes, this is at -6"
    assert near(1 << 20) == "no tensor near"


def test_uninitialised_and_outside(emulate):
    with emulate() as e:
        add_kernel[(1,)](torch.randn(256), torch.empty(256), torch.empty(256), 256, BLOCK=256)
        assert e.kinds() == {"uninitialised"}
        e.reset()
        add_kernel[(1,)](torch.randn(256), torch.randn(300)[:200], torch.empty(256), 256, BLOCK=256)
        assert e.kinds() == {"outside"}


def test_programs_that_collide(emulate):
    with emulate() as e:
        collide_kernel[(2,)](torch.zeros(32, dtype=torch.int32), num_warps=1)
        assert e.kinds() == {"race"}
        assert e.serious  # no read's value is to blame


# What it does not know


HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k() .reqntid 32 {\n"


@pytest.mark.parametrize(
    "text", ["cp.async.wait_group 0;", "cp.async.commit_group;", "wgmma.wait_group.sync.aligned 0;"]
)
def test_a_predicate_that_is_not_followed_is_an_error(text):
    with pytest.raises(parser.PtxError, match="predicated"):
        Program(parser.parse(HEADER + ".reg .pred %p<2>;\n@%p1 " + text + "\nret;\n}"))


@pytest.mark.parametrize(
    "text",
    [
        "fma.rn.sat.f32 %f1, %f1, %f1, %f1;",  # a modifier that no kernel has
        "add.f32.unheard %f1, %f1, %f1;",
        "tcgen05.wait %f1;",
        "mbarrier.init.shared.b64 [%rd1], 1;",
    ],
)
def test_what_is_not_known_is_an_error(text):
    declared = ".reg .f32 %f<4>; .reg .b64 %rd<4>;\n"
    good = parser.parse(HEADER + declared + "add.f32 %f1, %f2, %f3;\nret;\n}")
    assert len(Program(good).blocks) == 1
    with pytest.raises(parser.PtxError, match="unknown instruction"):
        Program(parser.parse(HEADER + declared + text + "\nret;\n}"))
