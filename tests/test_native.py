"""The numbers of the backend native: bits, functions, roundings, errors; its C source under sanitizers.

What all backends have in common is in test_agreement.py, test_resets.py and others, which run on native too.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import elman
from elman import compiled, cores, functional, native
from tests.helpers import DTYPES, Problem, check, dtype_name, error, forward, make, run
from tests.tolerances import TIMES_NN_RNN, tolerance

F32, F64 = torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
BOTH = pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])

pytestmark = pytest.mark.skipif(
    compiled.unavailable() is not None, reason=f"native: {compiled.unavailable()}"
)

# threads, rows of a work item, groups of columns; the first is one thread's
PLANS = [(1, 32, 1), (1, 1, 1), (2, 8, 1), (2, 6, 2), (3, 5, 1), (4, 32, 3), (4, 7, 2), (2, 32, 40)]


@pytest.fixture
def force(monkeypatch):
    """Has all calls shared out in one way."""

    def plan(*numbers: int) -> None:
        monkeypatch.setattr(native, "plan", lambda *_: cores.Plan(*numbers))

    return plan


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# Bits

# T, B, H, directions, more
SHAPES = [
    (1, 1, 1, 1, {}),
    (1, 3, 17, 2, {}),
    (3, 1, 63, 1, {}),
    (4, 1, 130, 2, {}),
    (7, 33, 64, 1, {}),
    (3, 70, 130, 2, {"hx": False}),
    (2, 64, 264, 1, {"bias": False}),
    (6, 35, 17, 2, {"ragged": True}),
    (5, 70, 63, 1, {"ragged": True, "layers": 2}),
]


@pytest.mark.usefixtures("nan_memory")
@BOTH
@EACH_DTYPE
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
def test_bits_are_the_same_for_any_plan(force, dtype, nonlinearity, resets):
    """Forward and backward, and those of the first plan are near the truth."""
    for T, B, H, D, more in SHAPES:
        p = make(T=T, B=B, I=3, H=H, directions=D, dtype=dtype, nonlinearity=nonlinearity, **more)
        if resets:
            p.options["resets"] = torch.rand(T, B) < 0.3
            if p.lengths is not None:
                p.options["resets"] &= torch.arange(T)[:, None] < p.lengths
        force(*PLANS[0])
        expected = run("native", p)
        truth = run("reference", p.double())
        if nonlinearity == "relu":  # whose derivative jumps: test_agreement.py has numbers that are not near
            truth = {name: truth[name] for name in ("output", "h_n")}
        check({name: expected[name] for name in truth}, truth, tolerance(dtype), floor=1e-2)
        for plan in PLANS[1:]:
            force(*plan)
            assert_same_bits(run("native", p), expected)


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("B", "D"), [(32, 1), (3, 2)])
def test_bits_are_the_same_for_any_number_of_torch_s_threads(monkeypatch, dtype, B, D):
    """By the plans that native makes itself; torch's products around a scan are of one thread here."""
    p = make(T=1200 // B, B=B, I=64, H=96, directions=D, dtype=dtype)
    found, plans = [], set()
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        plans.add(native.plan(B, 96, 1200 // B, D))
        found.append(run("native", p))
    assert len(plans) > 1
    for other in found[1:]:
        assert_same_bits(other, found[0])


FEW_STEPS = [(1, B) for B in (1, 4, 5, 12, 13, 97, 192)]
# On both sides of what has W packed, and of what has its products in C.
FEW_STEPS += [(T, B) for T in (2, 4, 16) for B in (native.UNPACKED // T, native.UNPACKED // T + 1)]
FEW_STEPS += [(8, native.MOST // 8), (3, native.MOST // 3 + 1)]


@pytest.mark.usefixtures("nan_memory")
@EACH_DTYPE
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("T", "B"), FEW_STEPS)
def test_bits_of_a_few_steps_are_the_same_for_any_number_of_threads(monkeypatch, dtype, T, B, D):
    """And they are near the truth."""
    monkeypatch.setattr(native, "SHARED", 0)  # so that each product is shared out
    p, found = make(T=T, B=B, I=37, H=130, directions=D, dtype=dtype), []
    for threads in (1, 3):
        monkeypatch.setattr(functional, "_checked", {})
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(run("native", p))
    assert_same_bits(*found)
    check(found[0], run("reference", p.double()), tolerance(dtype), floor=1e-2)


@EACH_DTYPE
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("T", "B"), [(1, 3), (4, 3), (3, native.MOST // 3 + 1)])
def test_bits_of_the_operator(dtype, T, B, D):
    """It is given the sum of both biases, and a graph's weights."""
    p = make(T=T, B=B, I=5, H=17, directions=D, dtype=dtype)
    weights = list(p.weights.values())
    w_ih, w_hh, b_ih, b_hh = (torch.stack(weights[i::4]) for i in range(4))
    bias = (b_ih.double() + b_hh.double()).to(dtype)
    halves = [t for d in range(D) for t in (w_ih[d], w_hh[d], bias[d], torch.zeros_like(bias[d]))]
    expected = elman.elman(p.x, p.hx, halves, bidirectional=D == 2, backend="native")
    found = torch.ops.elman.layer(p.x, p.hx, w_ih, w_hh, bias, None, None, "tanh", "native", "ieee")
    assert all(map(torch.equal, found, expected))


@EACH_DTYPE
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (3, 1), (3, 4)])
def test_h_n_has_memory_of_its_own(dtype, T, B, D):
    layer = elman.Elman(3, 4, dtype=dtype, bidirectional=D == 2, backend="native")
    x = torch.randn(T, B, 3, dtype=dtype)
    expected = layer(x)[0].detach()
    output, h_n = layer(x)
    h_n.mul_(2)
    assert h_n.is_contiguous()
    assert torch.equal(output, expected)
    odd = torch.zeros(B, D, 4, dtype=dtype).transpose(0, 1)
    assert [t.stride() for t in layer(x, odd)] == [t.stride() for t in (output, h_n)]


@EACH_DTYPE
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("which", ["batch first", "one direction's weights"])
def test_rows_that_lie_unevenly(dtype, T, which):
    p = make(T=T, B=3, I=5, H=6, directions=2, dtype=dtype)
    expected = run("native", p)
    if which == "batch first":
        p = replace(p, x=p.x.transpose(0, 1).contiguous().transpose(0, 1))
        assert_same_bits(run("native", p), expected)
        return
    for name in ("weight_ih_l0_reverse", "weight_hh_l0"):
        other = replace(p, weights={**p.weights, name: apart(p.weights[name])})
        check(run("native", other), expected, tolerance(dtype))


@pytest.mark.parametrize("twice", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("B", [native.MOST, native.MOST + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("ends", [True, False], ids=["both", "g_out"])
def test_gradients_of_a_step_in_16_bits_are_computed_in_float32(dtype, B, D, twice, ends):
    """Whichever code makes them: rounded once, at the end."""

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        layer = elman.Elman(70, 64, dtype=dtype, backend=backend, bidirectional=D == 2)
        layer.load_state_dict(weights)
        given = [t.to(dtype).requires_grad_() for t in (x, h0)]
        output, h_n = layer(*given)
        total = (output * g.to(dtype)).sum()
        if ends:
            total = total + (h_n * g_hn.to(dtype)).sum()
        return list(torch.autograd.grad(total, [*given, *layer.parameters()], create_graph=twice))

    weights = elman.Elman(70, 64, dtype=dtype, bidirectional=D == 2).state_dict()
    x, g = (torch.randn(1, B, n, dtype=dtype) for n in (70, D * 64))
    h0, g_hn = (torch.randn(D, B, 64, dtype=dtype) for _ in range(2))
    for found, eager, right in zip(
        gradients("native", dtype), gradients("eager", dtype), gradients("eager", F64), strict=True
    ):
        error, allowed = ((t.double() - right).norm() for t in (found, eager))
        # Of a bias 64 numbers, whose error is more of luck; rounded twice, dx has 1.25 times as much.
        assert error <= (1.1 if right.dim() > 1 else 1.3) * allowed


@BOTH
@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_name)
def test_bits_do_not_depend_on_where_a_row_lies(force, dtype, nonlinearity):
    """Rows of one batch that hold the same numbers get the same bits, in whatever tile."""
    force(2, 7, 2)
    p = make(T=5, B=1, I=1, H=70, bias=False, hx=False, dtype=dtype, nonlinearity=nonlinearity)
    weights = list(p.weights.values())
    output, _ = forward("native", p, p.x.expand(5, 33, 1), None, weights)
    g_out = p.g_out.expand(5, 33, 70)
    dz = native.backward(g_out, None, output, weights[1][None], None, None, nonlinearity)
    for found in (output, dz):
        assert torch.equal(found, found[:, :1].expand_as(found))
        assert found.count_nonzero() > 0


def transposed(t: Tensor) -> Tensor:
    """The same numbers, no two of a row side by side."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def apart(t: Tensor) -> Tensor:
    """The same numbers, with NaN between the rows."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), NAN)
    wide[..., 2:-3] = t
    return wide[..., 2:-3]


def negated(t: Tensor) -> Tensor:
    """The same numbers, the memory holding their negatives."""
    return torch._neg_view(-t)


@EACH_DTYPE
@pytest.mark.parametrize("layout", [transposed, apart, negated])
@pytest.mark.parametrize(
    ("T", "D", "ragged"),
    [(4, 2, False), (4, 2, True), (1, 1, False), (1, 2, False)],
    ids=["", "packed", "one step", "one step, two directions"],
)
def test_bits_do_not_depend_on_the_layout(force, dtype, layout, T, D, ragged):
    force(2, 8, 2)
    p = make(T=T, B=9, I=5, H=40, directions=D, dtype=dtype, ragged=ragged)
    expected = run("native", p)
    other = replace(
        p,
        x=layout(p.x),
        hx=layout(p.hx),
        g_out=layout(p.g_out),
        g_hn=layout(p.g_hn),
        weights={name: layout(w) if w.dim() == 2 else w for name, w in p.weights.items()},
    )
    found = run("native", other)
    # C takes no transposed matrix: torch does, in another order.
    for name, t in expected.items():
        assert error(found[name], t) <= tolerance(dtype), name
    if layout is not transposed:
        return
    scans = {**vars(p), "g_out": layout(p.g_out), "g_hn": layout(p.g_hn)}
    assert_same_bits(run("native", Problem(**scans)), expected)


@EACH_DTYPE
@pytest.mark.parametrize("layout", [transposed, apart, negated])
@pytest.mark.parametrize("T", [None, 1, 4], ids=["cell", "one step", "sequence"])
def test_each_argument_s_layout(dtype, layout, T):
    """One at a time: what was found out of a call's tensors doesn't hold for others of the same shapes."""
    p = make(T=T or 1, B=3, I=5, H=6, dtype=dtype)
    kind = elman.ElmanCell if T is None else elman.Elman
    layer = kind(5, 6, dtype=dtype, backend="native")
    x, hx, g = (p.x[0], p.hx[0], p.g_out[0]) if T is None else (p.x, p.hx, p.g_out)

    def call(changed: int = -1) -> list[Tensor]:
        given = [layout(t) if n == changed else t for n, t in enumerate((x, hx, g))]
        hidden = layer(*given[:2])
        output = hidden if T is None else hidden[0]
        return [output.detach(), *torch.autograd.grad(output, [*layer.parameters()], given[2])]

    expected = call()
    for n in (0, -1, 1, -1, 2, -1):
        for found, known in zip(call(n), expected, strict=True):
            assert error(found, known) <= tolerance(dtype), n
    for weight in layer.parameters():
        with torch.no_grad():
            weight.set_(apart(weight) if layout is negated or weight.dim() == 1 else layout(weight))
        for found, known in zip(call(), expected, strict=True):
            assert error(found, known) <= tolerance(dtype), weight.shape


@EACH_DTYPE
@pytest.mark.parametrize("which", ["g_out", "g_hn", "both"])
def test_a_gradient_that_is_one_number(force, dtype, which):
    """Of a sum: expanded from one element, and one that isn't there."""
    force(2, 8, 2)
    p = make(T=3, B=9, I=4, H=20, directions=2, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    g = {name: one.expand_as(getattr(p, name)) for name in ("g_out", "g_hn") if which in (name, "both")}
    given = replace(p, g_out=g.get("g_out"), g_hn=g.get("g_hn"))
    filled = replace(p, **{name: t.contiguous() for name, t in g.items()})
    filled = replace(filled, **dict.fromkeys({"g_out", "g_hn"} - g.keys()))
    assert_same_bits(run("native", given), run("native", filled))
    check(run("native", given), run("reference", given.double()), tolerance(dtype))


@pytest.mark.parametrize(
    ("B", "ragged"), [(6, True), (6, False), (1, False)], ids=["packed", "", "W_hh not packed"]
)
def test_bits_of_a_long_scan_in_many_calls(force, monkeypatch, B, ragged):
    """A call into C ends now and then, so that Ctrl-C stops a long scan within a second."""
    force(2, 4, 2)
    p = make(T=native.UNPACKED, B=B, I=3, H=40, directions=2, ragged=ragged)
    expected = run("native", p)
    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(native, "PER_CALL", 1)
    library, ends = compiled.library(), []
    scan = library.scan
    # Whether it is a backward scan, and where it ends.
    monkeypatch.setattr(library, "scan", lambda given: ends.append(given[:8] + given[160:168]) or scan(given))
    assert_same_bits(run("native", p), expected)
    assert len(set(ends)) == 2 * native.UNPACKED


@pytest.mark.parametrize("flush", [False, True])
def test_bits_where_denormals_are_flushed(force, flush):
    """Threads of a call do as the caller does."""
    p = make(T=3, B=40, I=3, H=40, bias=False)
    p = replace(p, x=p.x * 1e-38, hx=p.hx * 1e-38)
    try:
        if not torch.set_flush_denormal(flush):
            pytest.skip("this CPU has no switch for denormals")
        force(*PLANS[0])
        expected = run("native", p)
        denormal = (expected["output"] != 0) & (expected["output"].abs() < torch.finfo(F32).tiny)
        assert denormal.any() != flush
        for plan in PLANS[1:]:
            force(*plan)
            assert_same_bits(run("native", p), expected)
    finally:
        torch.set_flush_denormal(False)


# Functions of one element


def activated(z: Tensor, nonlinearity: str, rounding: torch.dtype | None = None) -> Tensor:
    """act(z) by a scan of one step with weights that are zeros, rounded as a state of that dtype is."""
    H = 64
    rows = torch.nn.functional.pad(z, (0, -len(z) % H)).view(1, -1, H).clone()
    zeros = rows.new_zeros(1, rows.shape[1], H)
    native._scan(
        *(False, nonlinearity, native._ROUNDING.get(rounding, 0)),
        *(rows, None, rows, zeros, [rows.new_zeros(H, H)], None, None),
    )
    return rows.flatten()[: len(z)]


def sweep(dtype: torch.dtype) -> Tensor:
    """Numbers of both signs, equally many in each octave, and every 2^-16 where tanh bends."""
    info = torch.finfo(dtype)
    lowest = -149 if dtype == F32 else -1074
    octaves = torch.arange(lowest, 12, dtype=F64)
    some = torch.cat([2.0**octaves * m for m in (1, 1.25, 1.4142135623730951, 1.75, 2 - 1e-9)])
    dense = torch.cat(
        [torch.arange(0, 22, 2.0**-14, dtype=F64), torch.logspace(-12, 1.5, 200_001, dtype=F64)]
    )
    odd = torch.tensor([0.0, info.tiny, info.max, INF, NAN], dtype=F64)
    z = torch.cat([some, dense, odd]).to(dtype)
    return torch.cat([z, -z])


def ulps(actual: Tensor, truth: Tensor) -> Tensor:
    """|actual - truth| in units of the last place of actual's dtype at truth; truth in float64."""
    digits, smallest = (24, -149) if actual.dtype == F32 else (53, -1074)
    exponent = torch.frexp(truth.abs())[1].clamp(min=smallest + digits) - digits
    # In two steps: 2^-1074 has no inverse.
    return torch.ldexp(
        torch.ldexp(actual.double() - truth, -(exponent // 2)), -(exponent - exponent // 2)
    ).abs()


@pytest.mark.parametrize(("dtype", "most"), [(F32, 2.5), (F64, 4.0)], ids=["float32", "float64"])
def test_tanh(dtype, most):
    """float64's beside torch's own, which is right to one unit."""
    z = sweep(dtype)
    found, truth = activated(z, "tanh"), torch.tanh(z.double())
    assert found[z.isnan()].isnan().all()
    z, found, truth = z[~z.isnan()], found[~z.isnan()], truth[~z.isnan()]
    assert found.abs().max() == 1, "no more than 1, and 1 in the end"
    assert torch.equal(found[z.isinf()], z[z.isinf()].sign())
    assert torch.equal(found[z == 0].abs(), torch.zeros(int((z == 0).sum()), dtype=dtype))
    assert torch.equal(found.sign(), z.sign()), "a denormal is not zero"
    half = len(z) // 2
    assert torch.equal(found[half:], -found[:half]), "odd to the bit"
    off = ulps(found, truth)
    assert off.max() <= most, (z[off.argmax()], off.max())


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_name)
def test_relu(dtype):
    z = sweep(dtype)
    found = activated(z, "relu")
    assert torch.equal(found.nan_to_num(7), torch.relu(z).nan_to_num(7))
    assert torch.equal(found.isnan(), z.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_rounding_is_torch_s(dtype):
    """Around each number of the dtype, and halfway to the next: subnormals, ties, overflow, NaN."""
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = numbers[~numbers.isnan()].view(torch.int32)
    half = (bits[1:] - bits[:-1]) // 2  # of the step to the next number
    near = [bits[:-1] + (half if tie else 0) + step for tie in (0, 1) for step in (-1, 0, 1)]
    past = torch.tensor(
        [65519.0, 65520.0, 1e5, 3.3895314e38, 3.39e38, 3.4028235e38, INF, 1e-45, 2e-8, 2.99e-8, 3e-8]
    )
    z = torch.cat([*(n.clamp(min=0).view(F32) for n in near), past])
    found, expected = activated(z, "relu", dtype), z.to(dtype).float()
    wrong = found.view(torch.int32) != expected.view(torch.int32)
    assert not wrong.any(), (z[wrong][:5], found[wrong][:5], expected[wrong][:5])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32).view(F32)
    assert activated(nans, "relu", dtype).isnan().all()
    # Negative ones by tanh, which rounds what it would have returned.
    z = sweep(F32)
    assert torch.equal(
        activated(z, "tanh", dtype).nan_to_num(7), activated(z, "tanh").to(dtype).float().nan_to_num(7)
    )


# The precision rule

# T, B, H, the number of seeds whose errors are added up: one number's error is luck
PRECISE = [
    (100, 1, 16, 6),
    (100, 1, 256, 2),
    (100, 2, 64, 4),
    (100, 6, 128, 2),
    (100, 33, 96, 2),
    (60, 1, 1024, 1),
]
PRECISE += [(25, 33, 512, 1), (20, 4, 1024, 1), (2, 1, 512, 6), (4, 4, 256, 4), (8, 64, 256, 1)]


@pytest.mark.parametrize(("T", "B", "H", "seeds"), PRECISE)
def test_error_is_at_most_that_of_nn_rnn_and_a_half(T, B, H, seeds):
    """float32, forward and all gradients; nn.RNN's error is what it has on this machine."""
    squares: dict[str, list[float]] = {}
    for seed in range(seeds):
        p = make(T=T, B=B, I=H, H=H, seed=seed)
        truth = run("nn.RNN", p.double())
        for which, found in enumerate((run("native", p), run("nn.RNN", p))):
            for name, t in truth.items():
                squares.setdefault(name, [0.0, 0.0])[which] += error(found[name], t) ** 2
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in squares.items()}
    print({name: round(ratio, 2) for name, ratio in ratios.items()})  # for who reads a failure
    assert all(ratio <= TIMES_NN_RNN for ratio in ratios.values()), ratios


# Infinity and NaN as the reference has them


@BOTH
def test_infinite_weights_and_nan_rows(force, nonlinearity):
    """Zeros times infinity are NaN where the reference has one, and a row's NaN stays in its row."""
    p = make(T=4, B=7, I=3, H=20, nonlinearity=nonlinearity)
    p.weights["weight_hh_l0"][3, 5] = INF
    p.x[1, 2, 0] = NAN
    p.options["resets"] = torch.rand(4, 7) < 0.4
    truth = run("reference", p.double())
    for plan in PLANS:
        force(*plan)
        found = run("native", p)
        for name in ("output", "h_n", "gradient of input", "gradient of hx"):
            assert torch.equal(found[name].isnan(), truth[name].isnan()), name
            assert torch.equal(found[name].isinf(), truth[name].isinf()), name
            assert error(found[name].nan_to_num(0, 0, 0), truth[name].nan_to_num(0, 0, 0)) <= tolerance(
                F32
            ), name
        assert found["output"][:, 0].isfinite().any() or nonlinearity == "relu"


def test_sizes_that_are_zero():
    for T, B in ((3, 0), (1, 0)):
        layer = elman.Elman(4, 5, backend="native")
        x = torch.ones(T, B, 4, requires_grad=True)
        output, h_n = layer(x)
        output.sum().backward()
        assert (output.shape, h_n.shape, x.grad.shape) == ((T, B, 5), (1, B, 5), (T, B, 4))
        assert layer.weight_hh_l0.grad.abs().sum() == 0


# Sanitizers

DRIVER = Path(__file__).with_name("native_sanitized.c")
SANITIZE = ["-std=gnu11", "-O1", "-g", "-ffp-contract=fast", "-Wall", "-Wextra", "-pthread"]
SANITIZE += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def sanitized(folder: Path, source: Path, *options: str) -> Path:
    """The program; skips the test where the compiler comes without its sanitizers' libraries."""
    cc = compiled.compiler() or []
    machine = next(f for m, f in compiled.MACHINES.items() if m == compiled.platform.machine())
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    program = folder / "program"
    command = [*cc, *SANITIZE, machine, *options, "-o", str(program)]
    made = subprocess.run([*command, str(empty)], capture_output=True, text=True)
    if made.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"{cc} can't make a program with its sanitizers: {made.stderr.strip()[-200:]}")
    made = subprocess.run([*command, str(source), "-lm"], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    return program


@pytest.mark.parametrize("options", [[], ["-DDOUBLE"]], ids=["float32", "float64"])
def test_sanitizers_find_nothing(tmp_path, options):
    """Addresses, undefined behaviour and leaks, in scans over memory of exactly their size."""
    program = sanitized(tmp_path, DRIVER, *options)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "512 scans, 0 wrong\n"


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("*w = numbers(z.D * z.H * z.H,", "*w = numbers(z.D * z.H * z.H - 1,", "native.c"),
        ("(1 - h * h) : tanh(total)", "(1 - h * h) : tanh(total) + 1e-4", "off by 0.0001"),
    ],
    ids=["a weight too few", "another function"],
)
def test_sanitizers_find_what_is_wrong(tmp_path, right, wrong, found):
    source = DRIVER.read_text()
    assert source.count(right) == 1
    (tmp_path / "tests").mkdir()
    (tmp_path / "kernels").symlink_to(compiled.SOURCE.parent)
    driver = tmp_path / "tests" / DRIVER.name
    driver.write_text(source.replace(right, wrong))
    done = subprocess.run([sanitized(tmp_path, driver), "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert found in done.stdout + done.stderr


# What is not in memory as C expects it


def _freed(t, offset):
    t = torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)
    t.untyped_storage().resize_(0)  # as FSDP does to parameters, of which a storage holds several
    return t


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("T", [1, 3], ids=["one step", "a sequence"])
@pytest.mark.parametrize("which", range(6))
def test_a_tensor_without_memory(T, which, offset):
    """An error, or the numbers that it stands for: C would read at address zero, or a little above."""
    p = make(T, 3, 4, 6)
    tensors = [p.x, p.hx, *p.weights.values()]
    expected, _ = elman.elman(*tensors[:2], tensors[2:], backend="native")
    zeros = [*tensors[:which], torch.zeros_like(tensors[which]), *tensors[which + 1 :]]
    nothing = torch._efficientzerotensor(offset + tensors[which].numel())[offset:]
    stands = [*tensors[:which], nothing.view(tensors[which].shape), *tensors[which + 1 :]]
    right, _ = elman.elman(*zeros[:2], zeros[2:], backend="native")
    assert not torch.equal(right, expected)
    assert torch.equal(elman.elman(*stands[:2], stands[2:], backend="native")[0], right)
    freed = [*tensors[:which], _freed(tensors[which], offset), *tensors[which + 1 :]]
    with pytest.raises(RuntimeError, match=r"no memory|storage"):
        elman.elman(*freed[:2], freed[2:], backend="native")


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize(
    ("T", "D", "which"),
    [(T, D, n) for T, D in ((None, 1), (1, 1), (1, 2), (3, 1), (3, 2)) for n in range(3 + 2 * D)],
)
def test_a_saved_tensor_without_memory(which, D, T, offset):
    """T None: of a cell."""
    if T is None:
        layer, x = elman.ElmanCell(4, 6, backend="native"), torch.randn(3, 4)
    else:
        layer, x = elman.Elman(4, 6, bidirectional=D == 2, backend="native"), torch.randn(T, 3, 4)
    kept = []

    def pack(t: Tensor) -> int:
        kept.append(t.detach())
        return len(kept) - 1

    def unpack(i: int) -> Tensor:
        return _freed(kept[i], offset) if i == which else kept[i]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = layer(x)
    assert len(kept) == 3 + 2 * D
    with pytest.raises(RuntimeError, match="has no memory"):
        (output if T is None else output[0]).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_memory_at_low_addresses(bias, monkeypatch):
    """Where a program and its heap lie there, a tensor that has memory is no freed one."""
    p = make(1, 3, 4, 6, bias=bias)
    expected = run("native", p)
    monkeypatch.setattr(native, "LOW", 2**64)
    assert_same_bits(run("native", p), expected)


def _by_column(t):
    return t.t().contiguous().t() if t.dim() == 2 else t


@pytest.mark.parametrize(
    "keep", [torch.clone, _by_column, negated], ids=["a copy", "by column", "its negative"]
)
@pytest.mark.parametrize("T", [1, 3])
def test_saved_tensors_that_were_kept_elsewhere(keep, T):
    p = make(T, 3, 4, 6)
    truth = run("reference", p.double())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        check(run("native", p), truth, tolerance(torch.float32))


@pytest.mark.parametrize("T", [None, 1, 3], ids=["cell", "one step", "sequence"])
@pytest.mark.parametrize("which", range(5))
def test_saved_tensors_of_other_shapes(which, T):
    """A hook may give back a part by mistake: an error as of nn.RNN's, where C would read past it."""
    saved: list[Tensor] = []

    def keep(t: Tensor) -> int:
        saved.append(t.detach())
        return len(saved) - 1

    def unpack(n: int) -> Tensor:
        return saved[n][..., :2, :2].contiguous() if n == which else saved[n]

    layer = (elman.ElmanCell if T is None else elman.Elman)(64, 64, backend="native")
    x, h = torch.randn(*([] if T is None else [T]), 4, 64), torch.randn(*([] if T is None else [1]), 4, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        output = layer(x.requires_grad_(), h.requires_grad_())
    output = output if T is None else output[0]
    with pytest.raises(RuntimeError):
        output.backward(torch.ones_like(output))
    assert len(saved) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"h0": (1, 1, 2)},
        {"w_ih": (1, 6, 5)},
        {"w_hh": (1, 5, 5)},
        {"bias": (1, 5)},
        {"sizes": [2000] * 3},
        {"sizes": [2, 3, 4]},
        {"sizes": [4, 3, 2, 0]},
        {"resets": (5,)},
        {"device": "meta"},
        {"x": (9, 1, 4), "resets": (9, 1)},
        {"h0": (3, 4, 6), "w_ih": (3, 6, 4), "w_hh": (3, 6, 6), "bias": (3, 6)},
    ],
    ids=str,
)
def test_an_operator_s_arguments_are_checked(wrong):
    """A graph's come from anywhere, and are checked nowhere else."""
    right = {"x": (9, 4), "h0": (1, 4, 6), "w_ih": (1, 6, 4), "w_hh": (1, 6, 6), "bias": (1, 6)}

    def arguments(sizes, resets, device="cpu", **shapes):
        tensors = [torch.randn(shapes[name]) for name in right]
        mask = torch.zeros(resets, dtype=torch.bool, device=device)
        return *tensors, torch.tensor(sizes), mask, "tanh"

    packed = {"sizes": [4, 3, 2], "resets": (9,), **right}
    assert torch.ops.elman.layer(*arguments(**packed), "native", "ieee")[0].shape == (9, 6)
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.elman.layer(*arguments(**{**packed, **wrong}), "native", "ieee")
    with pytest.raises(RuntimeError, match="expected"):
        native.forward(*arguments(**{**packed, **wrong}))


@pytest.mark.parametrize(
    "wrong",
    [{"output": (3, 4, 5)}, {"output": (3, 1, 6)}, {"g_out": (3, 4, 5)}, {"g_hn": (1, 1, 6)}],
    ids=str,
)
def test_the_backward_scan_s_arguments_are_checked(wrong):
    right = {"g_out": (3, 4, 6), "g_hn": (1, 4, 6), "output": (3, 4, 6), "w_hh": (1, 6, 6)}

    def call(**shapes):
        tensors = [torch.randn(shapes[name]) for name in right]
        return torch.ops.elman.layer_dz(*tensors, None, None, "tanh", "native", "ieee")

    assert call(**right).shape == (3, 4, 6)
    with pytest.raises(RuntimeError, match="expected"):
        call(**{**right, **wrong})


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("T", [1, 3])
def test_resets_without_memory(T, offset):
    layer, x = elman.Elman(4, 6, backend="native"), torch.randn(T, 2, 4)
    with pytest.raises(RuntimeError, match=r"no memory|storage"):
        layer(x, resets=_freed(torch.ones(T, 2, dtype=torch.bool), offset))


def test_an_operator_s_dtypes_are_checked():
    p = make(3, 2, 4, 6)
    w_ih, w_hh, *_ = (w[None] for w in p.weights.values())
    for wrong in range(4):
        tensors = [p.x, p.hx, w_ih, w_hh]
        tensors[wrong] = tensors[wrong].double()
        with pytest.raises(RuntimeError, match="one dtype"):
            torch.ops.elman.layer(*tensors, None, None, None, "tanh", "native", "ieee")
