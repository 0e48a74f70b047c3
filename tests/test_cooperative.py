"""kernels/cooperative.py with programs that run at once, each in a process of its own under the interpreter.

One program by itself is in test_kernels.py. Every program adds up in the same order however the columns are
cut, so several programs must give the very bits of one.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor

from elman import reference
from tests import concurrent_programs
from tests.concurrent_programs import Late, LaunchError, Programs
from tests.helpers import dtype_name, error
from tests.scans import Cooperative, check, problem, some_resets
from tests.tolerances import tolerance

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

import elman
from elman.kernels import common, configs, cooperative
from elman.kernels.errors import DeviceHangError

pytestmark = [
    # Triton 3.6's interpreter reads a run-time loop bound in a way that NumPy deprecates (and 2.4 refuses).
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.skipif(
        not common.INTERPRETED, reason="runs under Triton's interpreter; test_gpu.py has the GPU's"
    ),
]
BOTH_WAYS = pytest.mark.parametrize("flag", [True, False], ids=["flag", "counter"])
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
EMPTY = -1  # all bits set: what nobody has written yet, as an integer
INTEGERS = {FP32: torch.int32, FP16: torch.int16, BF16: torch.int16}


@pytest.fixture(scope="session")
def programs():
    with Programs() as running:
        yield running


@pytest.fixture(autouse=True)
def same_order(monkeypatch):
    """One program, in this process, multiplies as the workers do."""
    monkeypatch.setattr(interpreter_builder, "create_dot", concurrent_programs.dot_in_order)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(INTEGERS[t.dtype])


def assert_same_bits(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


# (processors, T, B, H, D, dtype, ragged), nonlinearity, blocks; each program has 16 columns and 8 rows.
CASES = {
    "2 programs": (2, (6, 1, 17, 1, FP32, False), "tanh", {}),
    "3 programs, 2 jobs in turn": (3, (6, 9, 40, 1, FP32, True), "relu", {}),
    "4 programs, 4 jobs in turn": (4, (5, 9, 63, 2, BF16, True), "tanh", {}),
    "2 groups of 2, 6 jobs": (4, (4, 17, 17, 2, FP32, True), "tanh", {}),
    "2 groups of 2, relu": (4, (4, 3, 32, 2, BF16, False), "relu", {}),
    "float16": (2, (6, 8, 32, 1, FP16, True), "tanh", {}),
    "streamed in part": (
        3,
        (5, 3, 40, 2, FP32, True),
        "tanh",
        {"BLOCK_K": 16, "num_warps": 1, "CHUNKS": 2, "STREAMED": 2},
    ),
    "streamed whole": (
        4,
        (5, 3, 63, 1, BF16, True),
        "tanh",
        {"BLOCK_K": 16, "num_warps": 1, "CHUNKS": 1, "STREAMED": 4},
    ),
    "chunks all at once": (
        4,
        (5, 9, 63, 1, FP32, False),
        "relu",
        {"BLOCK_K": 16, "num_warps": 1, "CHUNKS": 4},
    ),
    "values over 2": (2, (5, 3, 17, 1, FP32, False, 50.0), "relu", {}),
    "40 steps": (3, (40, 8, 40, 1, FP32, False), "tanh", {}),
    "resets": (4, (9, 9, 40, 2, FP32, True), "tanh", {"resets": True}),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_programs_are_one(programs, case, flag):
    processors, sizes, nonlinearity, blocks = case
    blocks = {"FLAG": flag, "BLOCK_B": 8, **blocks}
    p = problem(*sizes)
    resets = some_resets(*sizes[:2], p[3]) if blocks.pop("resets", False) else None
    with programs.at_once(processors):
        several = check(Cooperative(BLOCK_N=16, **blocks), *p, nonlinearity, resets)
    assert_same_bits(several, check(Cooperative(**blocks), *p, nonlinearity, resets))


@BOTH_WAYS
def test_a_late_program_changes_nothing(programs, flag):
    """By turns one group of 3 programs and 2 groups of 2, each program late now and then."""
    sizes = {3: problem(5, 9, 40, 1, BF16, ragged=True), 4: problem(5, 9, 17, 1, FP32, ragged=True)}
    expected = {n: check(Cooperative(FLAG=flag, BLOCK_B=8), *p, "tanh") for n, p in sizes.items()}
    for seed in range(12):
        processors = 3 + seed % 2
        with programs.at_once(processors, late=Late(seed % processors, seed)):
            results = check(Cooperative(FLAG=flag, BLOCK_B=8, BLOCK_N=16), *sizes[processors], "tanh")
        assert_same_bits(results, expected[processors])


def nan_patterns(dtype):
    """Every NaN of bfloat16, as integers; of float32 those with one bit in the fraction, or with all."""
    integers = torch.iinfo(INTEGERS[dtype])
    infinity = bits(torch.tensor(float("inf"), dtype=dtype)).item()
    all_ones = integers.max - infinity
    fractions = range(1, all_ones + 1) if dtype == BF16 else [*(1 << i for i in range(23)), all_ones]
    positive = infinity + torch.tensor(list(fractions))
    return torch.cat([positive, positive + integers.min]).to(INTEGERS[dtype])


def fill_with_nans(t: Tensor, H: int, steps: tuple[int, int]) -> None:
    """Every pattern into rows 4 on of t (T, B, 2 * H), for each direction at its step; EMPTY into row 2."""
    patterns, raw = nan_patterns(t.dtype), t.view(INTEGERS[t.dtype])
    for d, step in enumerate(steps):
        columns = raw[step, 4:, d * H : (d + 1) * H]
        assert len(patterns) <= columns.numel()
        columns.copy_(patterns[torch.arange(columns.numel()) % len(patterns)].view(columns.shape))
        raw[1, 2, d * H + 3] = EMPTY


def nan_truth(z: Tensor, h0: Tensor, w_hh: Tensor, nonlinearity: str) -> Tensor:
    """scans.truth without its product with z, which would spread each NaN over both directions."""
    T, H = len(z), w_hh.shape[1]
    z, h0, w_hh = z.double(), h0.double(), w_hh.double()
    output = torch.empty_like(z)
    for d, order in enumerate((range(T), reversed(range(T)))):
        h, columns = h0[d], slice(d * H, (d + 1) * H)
        for t in order:
            h = reference.ACTIVATIONS[nonlinearity](z[t, :, columns] + h @ w_hh[d].T)
            output[t, :, columns] = h
    return output


def assert_agrees_and_is_nan_where(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert error(actual.nan_to_num(0.0), expected.nan_to_num(0.0)) <= tolerance(actual.dtype)


@BOTH_WAYS
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_nan_comes_out_as_nan_and_hangs_nothing(programs, dtype, nonlinearity, flag):
    T, B, H = 3, 20, 17
    z, h0, w_hh, _, g_out, g_hn = problem(T, B, H, 2, dtype, ragged=False)
    fill_with_nans(z, H, (T - 1, 0))
    fill_with_nans(g_out, H, (0, T - 1))
    h0.view(INTEGERS[dtype])[:, 3] = g_hn.view(INTEGERS[dtype])[:, 3] = EMPTY
    kernel = Cooperative(FLAG=flag, BLOCK_B=8, BLOCK_N=16)
    output = z.clone().fill_(0.5)  # the backward pass's: no NaN from there
    dz = torch.empty_like(z)
    with programs.at_once(4):
        result = kernel.scan(z.clone(), h0, w_hh, None, nonlinearity, "ieee")
        kernel.scan_backward(g_out, g_hn, output, w_hh, dz, None, nonlinearity, "ieee")
    expected = nan_truth(z, h0, w_hh, nonlinearity)
    assert_agrees_and_is_nan_where(result, expected)
    wide = (t.double() for t in (g_out, g_hn, output, w_hh))
    assert_agrees_and_is_nan_where(dz, reference.layer_dz(*wide, None, nonlinearity))
    assert not flag or (bits(result) != EMPTY).all()
    assert not flag or (bits(dz) != EMPTY).all()


@triton.jit
def empty_kernel(state, awaited, missing, BLOCK: tl.constexpr, EMPTY: tl.constexpr):
    i = tl.arange(0, BLOCK)
    chunks = (tl.load(state + i)[None, None, :], tl.load(state + BLOCK + i)[None, None, :])
    tl.store(missing, cooperative.empty(chunks, tl.load(awaited + i) > 0, EMPTY, INTERPRET=False))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=dtype_name)
def test_the_quick_look_misses_nothing(dtype):
    """One look at all bits together, which the interpreter skips in the kernels, for it takes its time."""
    top, inf = torch.finfo(dtype).max, float("inf")
    calm = [0.0, -0.0, 1.0, -1.0, 1.9921875, -1.9921875, torch.finfo(dtype).tiny]
    rough = [2.0, -2.0, 3.0, -1000.0, top, -top, inf, -inf, float("nan")]
    for values in (calm, rough, calm + rough):
        for holes in ([], [0], [5, 7], list(range(16))):
            state = torch.tensor(values, dtype=dtype).repeat(16)[:16]
            bits(state)[holes] = EMPTY
            for awaited in (torch.ones(8), torch.zeros(8), torch.arange(8) % 2):
                missing = torch.full((1,), -1, dtype=torch.int32)
                empty_kernel[(1,)](bits(state), awaited.int(), missing, BLOCK=8, EMPTY=EMPTY)
                assert missing.item() == sum(awaited[i % 8].item() for i in holes)


def run_one_pass(kernel, p, backward):
    """The forward pass alone, or the backward pass with z for its output: any numbers will do."""
    z, h0, w_hh, _, g_out, g_hn = p
    if not backward:
        return kernel.scan(z.clone(), h0, w_hh, None, "tanh", "ieee")
    dz = torch.zeros_like(z)
    kernel.scan_backward(g_out, g_hn, z, w_hh, dz, None, "tanh", "ieee")
    return dz


def what_it_left(programs, backward):
    """The buffer of a launch that hung, the first step that the pass took in front."""
    return programs.arguments["dz"].flip(0) if backward else programs.arguments["out"]


BOTH_PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@BOTH_WAYS
@BOTH_PASSES
@pytest.mark.parametrize("processors", [2, 4])
def test_who_waits_for_a_program_that_never_starts_gives_up(programs, processors, backward, flag):
    p = problem(4, 3, 16 * processors - 1, 1, FP32, ragged=False)
    kernel, one = Cooperative(FLAG=flag, BLOCK_N=16), Cooperative(FLAG=flag)
    expected = run_one_pass(one, p, backward)
    for missing in (0, processors - 1):
        with (
            programs.at_once(processors, missing=missing, patience=20),
            pytest.raises(DeviceHangError) as raised,
        ):
            run_one_pass(kernel, p, backward)
        for part in ("20 looks", f"H={16 * processors - 1}", "BLOCK_N=16", f"FLAG={flag}"):
            assert part in str(raised.value)
        left, first = what_it_left(programs, backward), expected.flip(0) if backward else expected
        present = torch.arange(left.shape[-1]) // 16 != missing
        # The first step waits for nobody: right, or NaN where the others gave up before it.
        assert torch.equal(left[0].where(~left[0].isnan(), first[0])[:, present], first[0][:, present])
        assert left[1:, :, present].isnan().all()
        if flag:  # nobody wrote the others: they are NaN from the start
            assert left[:, :, ~present].isnan().all()
    with programs.at_once(processors):
        assert_same_bits([run_one_pass(kernel, p, backward)], [expected])


@BOTH_WAYS
@BOTH_PASSES
def test_a_program_that_comes_too_late_finds_nan(programs, backward, flag):
    p = problem(5, 3, 33, 1, FP32, ragged=False)
    late = Late(1, start=2.0)
    with programs.at_once(3, late=late, patience=5), pytest.raises(DeviceHangError):
        run_one_pass(Cooperative(FLAG=flag, BLOCK_N=16), p, backward)
    left = what_it_left(programs, backward)
    assert left[1].isnan().any(-1).all()  # the late one's columns come from a first step that was right
    assert left[2:].isnan().all()


def test_no_gradient_at_all_is_zero(programs):
    _, _, w_hh, lengths, _, _ = problem(3, 3, 20, 2, FP32, ragged=True)
    for flag in (True, False):
        dz = torch.full((3, 3, 40), float("nan"))
        with programs.at_once(2):
            Cooperative(FLAG=flag, BLOCK_N=16).scan_backward(
                None, None, torch.rand(3, 3, 40), w_hh, dz, lengths, "tanh", "ieee"
            )
        assert (dz == 0).all()


def test_launchers_say_what_they_cannot():
    z, h0, w_hh, _, g_out, g_hn = problem(2, 2, 17, 1, FP32, ragged=False)
    with pytest.raises(ValueError, match="takes 2 programs at once"):
        Cooperative(BLOCK_N=16).scan(z, h0, w_hh, None, "tanh", "ieee")
    with pytest.raises(ValueError, match="takes 2 programs at once"):
        Cooperative(BLOCK_N=16).scan_backward(g_out, g_hn, z, w_hh, z.clone(), None, "tanh", "ieee")
    for g_o, g_h, dz in ((g_out[:1], g_hn, z), (g_out, g_hn[:, :1], z), (g_out, g_hn, z[:1])):
        with pytest.raises(ValueError, match=r"is torch.float32 .*expected torch.float32"):
            Cooperative().scan_backward(g_o, g_h, z, w_hh, dz, None, "tanh", "ieee")
    z, h0, w_hh, g_out = (t.double() for t in (z, h0, w_hh, g_out))
    with pytest.raises(ValueError, match=r"float64 has no cooperative kernel.*use step"):
        Cooperative().scan(z, h0, w_hh, None, "tanh", "ieee")
    with pytest.raises(ValueError, match=r"float64 has no cooperative kernel.*use step"):
        Cooperative().scan_backward(g_out, None, z, w_hh, z.clone(), None, "tanh", "ieee")


def test_the_status_is_the_host_s_whatever_the_default_device(monkeypatch):
    monkeypatch.setattr(cooperative, "_words", {})
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        found = [cooperative._status(torch.device(*d)) for d in (("cuda", 0), ("cpu",))]
    assert [(t.device.type, t.tolist()) for t in found] == [("cpu", [0, 0])] * 2


def test_a_hang_and_a_dead_worker_fail_in_time():
    """The harness itself; it starts its workers anew."""
    kernel, p = Cooperative(BLOCK_N=16), problem(2, 1, 17, 1, FP32, ragged=False)
    with Programs(workers=2) as few:
        with (
            mock.patch.object(concurrent_programs, "LAUNCH_LIMIT", 1),
            few.at_once(2, missing=1),
            pytest.raises(LaunchError, match="Programs 0 are still at work after 1 seconds"),
        ):
            run_one_pass(kernel, p, backward=False)
        assert not few.processes
        for dead_before in (True, False):
            few.start()
            few.processes[1].kill()
            if dead_before:
                few.processes[1].join()
            with few.at_once(2), pytest.raises(LaunchError, match="process of program 1 died"):
                run_one_pass(kernel, p, backward=False)
            assert not few.processes


@pytest.fixture
def gave_up(monkeypatch):
    """A status word of a GPU that no machine needs to have, on which a launch has given up."""
    word = torch.tensor([1, 0])
    monkeypatch.setattr(cooperative, "_words", {0: word})
    problem = configs.Problem(8, 64)
    launched = (4, 10, problem, configs.choose("cooperative", problem))
    monkeypatch.setattr(cooperative, "_launched", {0: launched})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return word


def test_a_launch_that_gave_up_is_reported_once(gave_up):
    device = torch.device("cuda", 0)
    with pytest.raises(DeviceHangError, match="earlier launch, perhaps the last one, a group of 4 programs"):
        cooperative.check(device)
    cooperative.check(device)
    assert gave_up[0] == 0


def test_synchronize_raises_what_only_the_end_shows(gave_up):
    with pytest.raises(DeviceHangError, match="10 steps of Problem"):
        elman.synchronize("cuda:0")
    elman.synchronize("cuda:0")
    gave_up[0] = 1
    with pytest.raises(DeviceHangError):
        elman.synchronize()


def test_the_last_word_is_printed_at_exit(gave_up, capsys):
    cooperative._at_exit()
    assert "elman: In an earlier launch" in capsys.readouterr().err
    cooperative._at_exit()
    assert capsys.readouterr().err == ""
