"""The resident kernel by itself: every variant of its space, and the scan fused with its input product."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import elman.reference
from tests.helpers import DEVICE, DTYPES, dtype_name, error
from tests.scans import check, clean, problem, some_resets
from tests.tolerances import tolerance

pytest.importorskip("triton")

from elman.kernels import configs, resident

# Triton 3.6's interpreter reads a run-time loop bound in a way that NumPy deprecates (and 2.4 refuses).
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def fused_problem(T, B, I, H, D, dtype, ragged=False):
    """x, w_ih, bias, h0, w_hh, lengths; NaN in x past the lengths: nothing may come of it."""
    shapes = [(T, B, I), (D, H, I), (D, H), (D, B, H), (D, H, H)]
    x, w_ih, bias, h0, w_hh = (torch.randn(s, dtype=torch.float64) for s in shapes)
    w_ih /= max(I, 1) ** 0.5
    w_hh /= H**0.5
    lengths = None
    if ragged:
        lengths = torch.tensor([(T // 2 or 1, T, 1)[b % 3] for b in range(B)])
        x[torch.arange(T)[:, None] >= lengths] = float("nan")
        lengths = lengths.to(DEVICE)
    return (*(t.to(DEVICE, dtype) for t in (x, w_ih, bias, h0, w_hh)), lengths)


def fused_truth(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, resets=None):
    wide = [None if t is None else t.double() for t in (clean(x, lengths), h0, w_ih, w_hh, bias)]
    return elman.reference.layer(*wide, lengths, nonlinearity, resets)[0]


def check_fused(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, config=None, resets=None):
    output = resident.scan_fused(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, "ieee", config, resets)
    expected = fused_truth(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, resets)
    assert output.dtype == x.dtype
    assert error(output, expected) <= tolerance(x.dtype)
    if lengths is not None:
        assert (output[torch.arange(len(x), device=DEVICE)[:, None] >= lengths] == 0).all()


def check_with(config, *arguments, resets=None):
    kernel = SimpleNamespace(
        scan=partial(resident.scan, config=config),
        scan_backward=partial(resident.scan_backward, config=config),
    )
    check(kernel, *arguments, "tanh", resets)


def variants(H, dtype):
    """One config of each way through the kernel that there is at this size."""
    problems = [configs.Problem(64, H, 2, dtype, backward=b) for b in (False, True)]
    fitting = [
        c
        for p in problems
        for c in configs.space("resident", p, configs.DEFAULT_CHIP)
        if isinstance(configs.estimate("resident", c, p), configs.Estimate)
    ]
    # Under the interpreter HELD and num_warps change nothing, and AHEAD has a test of its own.
    return list({(c.BLOCK_B, c.C): c for c in fitting}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("H", [1, 17, 63, 72])
def test_every_variant(H, dtype):
    arguments = problem(4, 9, H, 2, dtype, ragged=True)
    for config in variants(H, dtype):
        check_with(config, *arguments)


@pytest.mark.parametrize("H", [1, 33, 128])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "resets"])
def test_one_row_a_program(H, ragged, cut):
    """kernels/vector.py, with its every AHEAD, also for fewer steps than are fetched ahead."""
    asked = [configs.Problem(16, H, 2, torch.float32, p) for p in ("ieee", "tf32")]
    offered = [{c for c, _ in configs.candidates("resident", p) if c.BLOCK_B == 1} for p in asked]
    assert offered[0] == offered[1]
    assert {c.AHEAD for c in offered[0]} == {2, 4}
    for T, config in itertools.product((1, 6), offered[0]):
        arguments = problem(T, 3, H, 2, torch.float32, ragged)
        check_with(config, *arguments, resets=some_resets(T, 3, arguments[3]) if cut else None)
        fused = fused_problem(T, 3, 5, H, 2, torch.float32, ragged)
        resets = some_resets(T, 3, fused[-1]) if cut else None
        check_fused(*fused, "tanh", config, resets)


@pytest.mark.parametrize(("B", "H"), [(1, 130), (8, 264), (33, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_sizes(B, H, dtype):
    if not configs.candidates("resident", configs.Problem(B, H, 1, dtype)):
        pytest.skip("does not fit on one multiprocessor")
    check(resident, *problem(3, B, H, 1, dtype, ragged=False), "tanh")


def test_fetching_ahead_of_short_sequences():
    """Fewer steps than are fetched ahead, in both directions."""
    for T, ahead in itertools.product((1, 2), (1, 2)):
        config = configs.ResidentConfig(8, 16, AHEAD=ahead)
        check_with(config, *problem(T, 3, 17, 2, torch.float64, ragged=True))
        check_fused(*fused_problem(T, 3, 5, 17, 2, torch.float64, ragged=True), "tanh", config)
        resets = some_resets(T, 3, None)
        check_with(config, *problem(T, 3, 17, 2, torch.float64, ragged=False), resets=resets)
        check_fused(*fused_problem(T, 3, 5, 17, 2, torch.float64), "tanh", config, resets)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (configs.ResidentConfig(8, 16, num_warps=4), configs.REPEATED),
        (configs.ResidentConfig(8, 16, HELD=2, num_warps=1), "there are no 2 rows of tiles to hold"),
    ],
)
def test_blocks_that_do_not_go_together_are_refused(config, words):
    """Before any launch: z, in whose place the output would stand, is as it was."""
    z, h0, w_hh, *_, g_out, g_hn = problem(4, 3, 16, 1, torch.bfloat16, ragged=False)
    before, dz = z.clone(), torch.zeros_like(z)
    with pytest.raises(ValueError, match=words):
        resident.scan(z, h0, w_hh, None, "tanh", "ieee", config)
    assert torch.equal(z, before)
    with pytest.raises(ValueError, match=words):
        resident.scan_backward(g_out, g_hn, z, w_hh, dz, None, "tanh", "ieee", config)
    assert not dz.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_fused(dtype, nonlinearity, ragged):
    check_fused(*fused_problem(4, 9, 5, 17, 2, dtype, ragged), nonlinearity)


@pytest.mark.parametrize("I", [1, 5, 64])
@pytest.mark.parametrize("H", [1, 40, 72])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_fused_sizes(I, H, bias):
    x, w_ih, b, h0, w_hh, _ = fused_problem(3, 2, I, H, 1, torch.float32)
    for config in variants(H, torch.float32):
        check_fused(x, w_ih, b if bias else None, h0, w_hh, None, "tanh", config)


def test_fused_strides():
    """x expanded, transposed, or every other column of memory that holds NaN elsewhere."""
    x, *rest = fused_problem(3, 4, 5, 17, 2, torch.float32, ragged=True)
    T, B, I = x.shape
    spread = torch.full((T, B, 2 * I), float("nan"), device=DEVICE)
    spread[..., ::2] = x
    batch_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    inputs_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    one = torch.randn(1, 1, 1, device=DEVICE).expand(T, B, I)
    for view in (spread[..., ::2], batch_first, inputs_first, one):
        check_fused(view, *rest, "tanh")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_a_bad_input_spoils_no_other_row():
    """NaN in one row, infinity in another: the blocks' zeros past I and H make no NaN of it."""
    x, w_ih, bias, h0, w_hh, _ = fused_problem(4, 5, 1, 17, 2, torch.float32)
    x[1, 2], x[2, 4] = float("nan"), float("inf")
    output = resident.scan_fused(x, w_ih, bias, h0, w_hh, None, "tanh", "ieee")
    expected = fused_truth(x, w_ih, bias, h0, w_hh, None, "tanh")
    assert torch.equal(output.isnan(), expected.isnan())
    assert error(output[:, [0, 1, 3, 4]], expected[:, [0, 1, 3, 4]]) <= tolerance(torch.float32)


def test_fused_agrees_with_the_scan():
    x, w_ih, bias, h0, w_hh, lengths = fused_problem(5, 3, 16, 33, 2, torch.float64, ragged=True)
    z = torch.einsum("tbi,dhi->tbdh", x, w_ih).add(bias).flatten(2)
    output = resident.scan(z, h0, w_hh, lengths, "tanh", "ieee")
    fused = resident.scan_fused(x, w_ih, bias, h0, w_hh, lengths, "tanh", "ieee")
    assert error(fused, output) <= tolerance(torch.float64)


def test_fused_says_what_is_wrong():
    x, w_ih, bias, h0, w_hh, _ = fused_problem(3, 2, 65, 4, 1, torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 65\); expected .*1 to 64 inputs"):
        resident.scan_fused(x, w_ih, bias, h0, w_hh, None, "tanh", "ieee")
    x = x[..., :5]
    with pytest.raises(ValueError, match="w_ih is"):
        resident.scan_fused(x, w_ih, bias, h0, w_hh, None, "tanh", "ieee")
    with pytest.raises(ValueError, match="bias is"):
        resident.scan_fused(x, w_ih[..., :5].contiguous(), bias[:, :3], h0, w_hh, None, "tanh", "ieee")
    output = resident.scan_fused(x[:0], w_ih[..., :5], bias, h0, w_hh, None, "tanh", "ieee")
    assert output.shape == (0, 2, 4)


def fits(H, dtype, precision="ieee", chip="sm_90", **more):
    problem = configs.Problem(16, H, 1, dtype, precision, **more)
    return bool(configs.candidates("resident", problem, configs.CHIPS[chip]))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_fits(backward):
    for dtype in (torch.bfloat16, torch.float16):
        assert fits(320, dtype, backward=backward)
        assert not fits(512, dtype, backward=backward)
    assert fits(160, torch.float32, backward=backward)
    assert fits(192, torch.float32, "tf32", backward=backward)
    assert fits(64, torch.float64, backward=backward)
    assert fits(256, torch.bfloat16, chip="sm_86", backward=backward)  # in registers: no tile is shared


def test_no_cliff():
    """The model sees no power of two between 256 and 264, whichever kernel is the quicker there.

    An H200 took 0.60 and 0.87 us a step forward, 0.69 and 0.70 backward (B 16, bfloat16).
    """
    for backward in (False, True):
        problems = [configs.Problem(16, H, 1, torch.bfloat16, backward=backward) for H in (256, 264)]
        kernels = ("resident", "cooperative")
        whole, more = (min(configs.candidates(k, p)[0][1].us for k in kernels) for p in problems)
        assert more < 1.7 * whole
