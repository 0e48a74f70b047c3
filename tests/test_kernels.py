"""The Triton kernels by themselves, against the reference in float64."""

import itertools

import pytest
import torch

import elman.reference
from tests.helpers import DEVICE, DTYPES, dtype_name, error
from tests.scans import Cooperative, check, clean, problem, some_resets, truth
from tests.tolerances import tolerance

pytest.importorskip("triton")

import triton
import triton.language as tl

from elman.kernels import activations, common, configs, resident, step

# Triton 3.6's interpreter reads a run-time loop bound in a way that NumPy deprecates (and 2.4 refuses).
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
KERNELS = {
    "step": step,
    "resident": resident,
    "flag": Cooperative(FLAG=True),
    "counter": Cooperative(FLAG=False),
}
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
EACH_KERNEL_AND_DTYPE = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{name}-{dtype_name(dtype)}")
        for name, kernel in KERNELS.items()
        for dtype in DTYPES
        if dtype != torch.float64 or not isinstance(kernel, Cooperative)
    ],
)


@EACH_KERNEL_AND_DTYPE
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_options(kernel, dtype, nonlinearity, ragged):
    check(kernel, *problem(3, 3, 17, 2, dtype, ragged), nonlinearity)


@EACH_KERNEL_AND_DTYPE
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_resets(kernel, dtype, ragged, directions):
    p = problem(5, 9, 17, directions, dtype, ragged)
    check(kernel, *p, "tanh" if ragged else "relu", some_resets(5, 9, p[3]))


@EACH_KERNEL
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_nothing_passes_a_reset(kernel):
    """Neither NaN nor infinity, of the state or of a gradient: zero times these would be NaN."""
    z, h0, w_hh, _, g_out, _ = problem(4, 3, 17, 2, torch.float32, ragged=False)
    resets = torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)
    resets[2] = True
    expected = kernel.scan(z.clone(), h0, w_hh, None, "tanh", "ieee", resets=resets)
    for t, direction, kept in [(1, 0, slice(2, 4)), (2, 1, slice(0, 2))]:
        columns = slice(17 * direction, 17 * direction + 17)
        bad = z.clone()
        bad[t, :, columns] = float("nan")
        output = kernel.scan(bad, h0, w_hh, None, "tanh", "ieee", resets=resets)
        assert output[t, :, columns].isnan().all()
        assert torch.equal(output[kept, :, columns], expected[kept, :, columns])
    dz, spoilt = torch.empty_like(expected), torch.empty_like(expected)
    kernel.scan_backward(g_out, None, expected, w_hh, dz, None, "tanh", "ieee", resets=resets)
    g_out[2, :, :17] = g_out[1, :, 17:] = float("inf")
    kernel.scan_backward(g_out, None, expected, w_hh, spoilt, None, "tanh", "ieee", resets=resets)
    assert torch.equal(spoilt[:2, :, :17], dz[:2, :, :17])
    assert torch.equal(spoilt[2:, :, 17:], dz[2:, :, 17:])
    assert not spoilt[2, :, :17].isfinite().any()


@EACH_KERNEL
@pytest.mark.parametrize(
    ("resets", "words"),
    [
        (torch.zeros(3, 4, dtype=torch.bool), r"resets is torch.bool \(3, 4\); expected torch.bool \(4, 3\)"),
        (torch.zeros(4, 3), r"resets is torch.float32 \(4, 3\); expected torch.bool \(4, 3\)"),
        (torch.zeros(4, 3, dtype=torch.bool, device="meta"), "resets is on meta; expected"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_wrong_resets(kernel, resets, words):
    z, h0, w_hh, _, g_out, g_hn = problem(4, 3, 17, 1, torch.float32, ragged=False)
    if resets.device.type != "meta":
        resets = resets.to(DEVICE)
    with pytest.raises(ValueError, match=words):
        kernel.scan(z, h0, w_hh, None, "tanh", "ieee", resets=resets)
    with pytest.raises(ValueError, match=words):
        kernel.scan_backward(g_out, g_hn, z, w_hh, z.clone(), None, "tanh", "ieee", resets=resets)


@EACH_KERNEL
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_one_direction(kernel, ragged):
    check(kernel, *problem(4, 3, 17, 1, torch.float32, ragged), "tanh")


@EACH_KERNEL
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 1), (3, 18, 63), (3, 2, 130), (2, 2, 264), (9, 33, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_sizes(kernel, T, B, H, dtype):
    numbers = problem(T, B, H, 2 if H < 100 else 1, dtype, ragged=True)
    if kernel is resident and H == 264 and dtype == torch.float32:
        with pytest.raises(ValueError, match="'resident' has no config for Problem"):
            check(kernel, *numbers, "tanh")
    else:
        check(kernel, *numbers, "tanh")


@EACH_KERNEL
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_backward_is_the_derivative_of_the_forward(kernel, nonlinearity):
    """Against autograd of the reference, not its hand-written backward; each gradient by itself too."""
    dtype = torch.float32 if isinstance(kernel, Cooperative) else torch.float64
    z, h0, w_hh, lengths, g_out, g_hn = problem(3, 3, 9, 2, dtype, ragged=True)
    for g_o, g_h in [(g_out, g_hn), (g_out, None), (None, g_hn)]:
        leaf = clean(z, lengths).requires_grad_()
        results = truth(leaf, h0, w_hh, lengths, nonlinearity)
        pairs = zip(results, (None if g_o is None else clean(g_o, lengths), g_h), strict=True)
        wanted = [(r, g) for r, g in pairs if g is not None]
        (expected,) = torch.autograd.grad([r for r, _ in wanted], leaf, [g for _, g in wanted])
        _, dz = check(kernel, z, h0, w_hh, lengths, g_o, g_h, nonlinearity)
        assert error(dz, expected) <= tolerance(dtype)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@EACH_KERNEL_AND_DTYPE
def test_kernels_agree(kernel, dtype, ragged):
    p = problem(4, 5, 20, 2, dtype, ragged)
    for a, b in zip(check(kernel, *p, "tanh"), check(step, *p, "tanh"), strict=True):
        assert error(a, b) <= tolerance(dtype)


@EACH_KERNEL
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_saturating_inputs(kernel, nonlinearity):
    output, _ = check(kernel, *problem(4, 3, 17, 2, torch.float32, False, scale=50.0), nonlinearity)
    if nonlinearity == "tanh":
        assert output.abs().max() == 1


@EACH_KERNEL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_a_bad_row_spoils_no_other(kernel, bad, nonlinearity):
    _, h0, w_hh, _, g_out, g_hn = problem(4, 5, 17, 2, torch.float32, ragged=False)
    # One input column: a product with more of them would turn infinity into NaN before the kernel sees it.
    x, w_ih = torch.randn(4, 5, 1, device=DEVICE), torch.randn(2, 17, 1, device=DEVICE)
    x[1, 2] = bad
    z = torch.cat([x * w_ih[0, :, 0], x * w_ih[1, :, 0]], -1)
    output = kernel.scan(z.clone(), h0, w_hh, None, nonlinearity, "ieee")
    wide = [t.double() for t in (x, h0, w_ih, w_hh)]
    expected, _ = elman.reference.layer(*wide, None, None, nonlinearity)
    rest = [0, 1, 3, 4]
    assert error(output[:, rest], expected[:, rest]) <= tolerance(torch.float32)
    # In the bad row NaN and infinity are where the reference has them: padding adds none, relu loses none.
    assert torch.equal(output[:, 2].isnan(), expected[:, 2].isnan())
    assert torch.equal(output[:, 2].isinf(), expected[:, 2].isinf())
    dz = torch.full_like(z, float("nan"))
    g_out[2, 2] = float("nan")
    kernel.scan_backward(g_out, g_hn, output, w_hh, dz, None, nonlinearity, "ieee")
    assert dz[:, rest].isfinite().all()


@EACH_KERNEL
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_infinity_stays_infinity(kernel):
    """17 columns lie in a block of 32: infinity times its zeros is NaN, and must not come back from there."""
    z, h0, w_hh, _, g_out, _ = problem(4, 2, 17, 2, torch.float32, ragged=False)
    w_hh = w_hh.abs() + 0.1
    z = z.abs() + 1
    z[1:3, 0] = g_out[1:3, 0] = float("inf")  # for each direction a step in the middle
    output = kernel.scan(z, h0, w_hh, None, "relu", "ieee")
    assert not output.isnan().any()
    assert output[2, 0].isinf().all()
    assert output[:, 1].isfinite().all()
    half = torch.full_like(z, 0.5)
    for nonlinearity in ("relu", "tanh"):  # relu's derivative is 0 in the padding and would hide a NaN there
        dz = torch.full_like(z, float("nan"))
        kernel.scan_backward(g_out, None, half, w_hh, dz, None, nonlinearity, "ieee")
        assert not dz.isnan().any()
        assert dz[0, 0, :17].isinf().all()
        assert dz[:, 1].isfinite().all()


@EACH_KERNEL
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_in_the_weights_leaves_the_padding_zero(kernel):
    z, h0, w_hh, lengths, g_out, g_hn = problem(3, 3, 17, 2, torch.float32, ragged=True)
    w_hh[:] = float("nan")
    past = torch.arange(3, device=DEVICE)[:, None] >= lengths
    output = kernel.scan(z, h0, w_hh, lengths, "tanh", "ieee")
    dz = torch.full_like(z, float("nan"))
    kernel.scan_backward(g_out, g_hn, output, w_hh, dz, lengths, "tanh", "ieee")
    assert (output[past] == 0).all()
    assert (dz[past] == 0).all()
    assert output[~past].isnan().all()


@EACH_KERNEL
@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py has as many elements in truth")
def test_offsets_beyond_an_int32(kernel):
    """Steps and rows 2^31 elements apart; the memory between is only reserved."""

    def far(t, dim):
        stride = [t.shape[2] * t.shape[1], t.shape[2], 1]
        stride[dim] = 2**31 + 32
        return torch.empty_strided(t.shape, stride, dtype=t.dtype).copy_(t)

    z, h0, w_hh, lengths, g_out, g_hn = problem(2, 2, 17, 2, torch.float16, ragged=True)
    expected, _ = truth(clean(z, lengths), h0, w_hh, lengths, "tanh")
    for dim in (0, 1):
        output = far(kernel.scan(far(z, dim), h0, w_hh, lengths, "tanh", "ieee"), dim)
        assert error(output, expected) <= tolerance(torch.float16)
        dz = far(torch.full_like(z, float("nan")), dim)
        kernel.scan_backward(far(g_out, dim), g_hn, output, w_hh, dz, lengths, "tanh", "ieee")
        wide = (clean(g_out, lengths).double(), g_hn.double(), output.double(), w_hh.double())
        assert error(dz, elman.reference.layer_dz(*wide, lengths, "tanh")) <= tolerance(torch.float16)


@EACH_KERNEL
def test_strides(kernel):
    """z, output and dz as parts of larger memory; g_out expanded, transposed, or every other column."""
    T, B, H, D = 3, 4, 17, 2
    z, h0, w_hh, lengths, g_out, g_hn = problem(T, B, H, D, torch.float32, ragged=True)

    def part(t):
        memory = torch.full((B, T + 2, D * H + 3), float("nan"), device=DEVICE)
        view = memory.transpose(0, 1)[1:-1, :, 2:-1]
        view.copy_(t)
        return memory, view

    memory, view = part(z)
    before = memory.clone()
    output = kernel.scan(view, h0, w_hh, lengths, "tanh", "ieee")
    expected, _ = truth(clean(z, lengths), h0, w_hh, lengths, "tanh")
    assert error(output, expected) <= tolerance(torch.float32)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.transpose(0, 1)[1:-1, :, 2:-1] = False
    assert torch.equal(memory[outside].isnan(), before[outside].isnan())
    spread = torch.full((T, B, 2 * D * H), float("nan"), device=DEVICE)
    spread[..., ::2] = g_out
    batch_first = g_out.transpose(0, 1).contiguous().transpose(0, 1)
    for g in (torch.ones((), device=DEVICE).expand(T, B, D * H), batch_first, spread[..., ::2]):
        memory, dz = part(torch.zeros_like(z))
        kernel.scan_backward(g, g_hn, output, w_hh, dz, lengths, "tanh", "ieee")
        wide = (clean(g, lengths).double(), g_hn.double(), output.double(), w_hh.double())
        assert error(dz, elman.reference.layer_dz(*wide, lengths, "tanh")) <= tolerance(torch.float32)
        assert memory[outside].isnan().all()


@ALL_DTYPES
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 17), (18, 70, 33), (2, 0, 4)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cell(dtype, B, I, H, bias):
    shapes = [(B, I), (B, H), (H, I), (H, H), (H,)]
    x, h, w_ih, w_hh, b = (torch.randn(s, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)
    b = b if bias else None
    for nonlinearity in ("tanh", "relu"):
        out = torch.full((B, H), float("nan"), dtype=dtype, device=DEVICE)
        step.cell(x, h, w_ih, w_hh, b, out, nonlinearity, "ieee")
        wide = [None if t is None else t.double()[None] for t in (x, h, w_ih, w_hh, b)]
        expected, _ = elman.reference.layer(*wide, None, nonlinearity)
        assert error(out, expected[0]) <= tolerance(dtype)


@triton.jit
def apply_kernel(x, y, dy, N, RELU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = activations.activate(tl.load(x + i, mask=i < N, other=0.0), RELU)
    tl.store(y + i, h, mask=i < N)
    g = tl.full((BLOCK,), 3.0, h.dtype)
    tl.store(dy + i, activations.activate_backward(g, h, RELU), mask=i < N)


def apply(x, relu):
    y, dy = torch.empty_like(x), torch.empty_like(x)
    apply_kernel[triton.cdiv(x.numel(), 1024),](x, y, dy, x.numel(), RELU=relu, BLOCK=1024)
    return y, dy


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-37), (torch.float64, 1e-300)], ids=str)
def test_tanh_is_right_to_a_few_ulp(dtype, tiny):
    exponents = torch.linspace(torch.tensor(tiny).log10().item() if dtype == torch.float32 else -300, 2, 4000)
    x = torch.cat([10.0 ** exponents.double(), torch.linspace(0.6, 0.65, 2000).double()]).to(DEVICE, dtype)
    x = torch.cat([x, -x, torch.tensor([0.0, 20.0, 1e4, float("inf")], dtype=dtype, device=DEVICE)])
    y, dy = apply(x, relu=False)
    expected = x.double().tanh()
    ulp = torch.finfo(dtype).eps * expected.abs()
    # Float64's own tanh, the truth here, is off by up to an ulp itself.
    assert ((y.double() - expected).abs() <= 4 * ulp).all()
    assert (y.abs() <= 1).all()
    assert y[-1] == 1
    assert torch.allclose(dy, 3 * (1 - y * y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_activations_follow_torch_at_the_edges(dtype):
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, -1e-30], dtype=dtype, device=DEVICE
    )
    for relu in (True, False):
        y, dy = apply(x, relu)
        expected = x.relu() if relu else x.tanh()
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
        g = torch.full_like(x, 3.0)
        expected = torch.ops.aten.threshold_backward(g, y, 0) if relu else torch.ops.aten.tanh_backward(g, y)
        assert torch.equal(dy.nan_to_num(7.0), expected.nan_to_num(7.0))


@triton.jit
def within_kernel(found, t, steps):
    tl.store(found, common.within(t, steps))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_fetched_ahead_lies_in_the_buffer(steps):
    """For a length of 0 too, which nobody has looked at in a graph: before step 0 is other memory."""
    found = torch.empty(1, dtype=torch.int64, device=DEVICE)
    for t in range(-2, 6):
        within_kernel[1,](found, t, steps)
        assert found.item() == max(min(t, steps - 1), 0)


@pytest.mark.skipif(not common.INTERPRETED, reason="the interpreter's rounding")
def test_bfloat16_rounds_to_nearest_under_the_interpreter():
    """Triton's interpreter cuts; the error would be twice the hardware's and biased."""
    z = torch.randn(1, 4, 16).to(torch.bfloat16)
    output, zero = z.clone(), torch.zeros(1, 16, 16, dtype=z.dtype)
    step.scan(output, torch.zeros(1, 4, 16, dtype=z.dtype), zero, None, "tanh", "ieee")
    assert torch.equal(output, z.double().tanh().to(torch.bfloat16))


@EACH_KERNEL
def test_launchers_say_what_is_wrong(kernel):
    z, h0, w_hh, lengths, _, _ = problem(3, 2, 4, 1, torch.float32, ragged=True)
    for message, arguments in {
        "nonlinearity is 'gelu'": (z, h0, w_hh, None, "gelu", "ieee"),
        "precision is 'fp8'": (z, h0, w_hh, None, "tanh", "fp8"),
        "h0 is": (z, h0[:, :1], w_hh, None, "tanh", "ieee"),
        "in its last dimension": (
            z.transpose(1, 2).contiguous().transpose(1, 2),
            h0,
            w_hh,
            None,
            "tanh",
            "ieee",
        ),
        "lengths is torch.int32": (z, h0, w_hh, lengths.int(), "tanh", "ieee"),
        "w_hh has shape": (z, h0, w_hh[0], None, "tanh", "ieee"),
    }.items():
        with pytest.raises(ValueError, match=message):
            kernel.scan(*arguments)


def test_empty_sequences_launch_nothing():
    for shape in [(0, 2, 4), (3, 0, 4)]:
        z = torch.zeros(shape, device=DEVICE)
        h0, w_hh = torch.zeros(1, shape[1], 4, device=DEVICE), torch.zeros(1, 4, 4, device=DEVICE)
        for kernel in KERNELS.values():
            kernel.scan(z, h0, w_hh, None, "tanh", "ieee")
            kernel.scan_backward(None, None, z, w_hh, z.clone(), None, "tanh", "ieee")


@pytest.mark.parametrize("target", configs.CHIPS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_resource_model(target, backward):
    """What the model lets through is what the problem asks for, and within what it knows of the chip."""
    chip = configs.CHIPS[target]
    for kernel, H, B, (dtype, precision) in itertools.product(
        configs.KERNELS,
        (1, 17, 64, 264, 512, 1024, 2560, 4096),
        (1, 16, 300),
        ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")),
    ):
        p = configs.Problem(B, H, 2, dtype, precision, backward)
        found = configs.candidates(kernel, p, chip)
        assert len(found) <= configs.MAX_CANDIDATES
        assert [e.us for _, e in found] == sorted(e.us for _, e in found)
        for config, expected in found:
            assert configs.estimate(kernel, config, p, chip) == expected
            assert expected.shared <= chip.shared
            assert kernel != "cooperative" or expected.programs <= chip.processors
            allowed = {"ieee": ("ieee", "tf32x3") if chip.tf32 else ("ieee",), "tf32": ("tf32",)}[precision]
            if getattr(config, "BLOCK_B", 0) == 1:
                allowed = ("ieee",)  # in plain multiply-adds, also where tf32 would do
            assert config.PRECISION in (allowed if dtype == torch.float32 else ("ieee",))
        if kernel == "step":
            assert found, p  # the kernel for whatever does not fit elsewhere
        if kernel == "cooperative" and (not chip.one_l2 or dtype == torch.float64):
            assert not found, p
        elif kernel == "cooperative" and H <= (4096 if dtype == torch.bfloat16 else 2560):
            assert found, p


def test_both_ways_to_meet_are_candidates():
    for H in (64, 264, 1024, 4096):
        found = configs.candidates("cooperative", configs.Problem(16, H, 1, torch.bfloat16))
        assert {config.FLAG for config, _ in found} == {True, False}
