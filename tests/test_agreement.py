"""Every backend against the float64 reference: outputs, states and all gradients, under every option."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import elman
from elman import ops
from tests.helpers import (
    ANY_BACKEND,
    BACKENDS,
    DEVICE,
    DTYPES,
    OPERATOR,
    TRITON,
    Problem,
    check,
    copy_of,
    dtype_name,
    error,
    forward,
    make,
    make_smooth,
    nearest_to_zero,
    run,
)
from tests.tolerances import LOSS_CURVE, TIMES_NN_RNN, tolerance

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    # Only CUDA's libraries warn, of operators that have no deterministic form; nan_memory wants their memory.
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
]

ROOT = Path(__file__).parents[1]
NONLINEARITIES = ["tanh", "relu"]
ALL_OPTIONS = [
    {"nonlinearity": n, "directions": D, "layers": L, "ragged": ragged, "hx": hx, "bias": bias}
    for n, D, L, ragged, hx, bias in itertools.product(NONLINEARITIES, (1, 2), (1, 2), *[(False, True)] * 3)
]
# A quarter of them, in which every pair of options still takes all of its values together: enough for an
# interpreter that needs milliseconds for what a chip does in nanoseconds.
SOME_OPTIONS = [
    o
    for o in ALL_OPTIONS
    if o["hx"] == (o["nonlinearity"] == "relu") ^ (o["directions"] == 2) ^ (o["layers"] == 2)
    and o["bias"] == (o["directions"] == 2) ^ (o["layers"] == 2) ^ o["ragged"]
]


def slow(backend: str) -> bool:
    return backend in TRITON and DEVICE == "cpu"


def label(value: object) -> str | None:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, dict):
        flags = [name for name, is_set in value.items() if is_set is True]
        return "-".join([value["nonlinearity"], f"{value['directions']}dir", f"{value['layers']}lay", *flags])
    return None


def agree(backend: str, p: Problem, truth_of: Problem | None = None, floor: float = 0.0) -> None:
    truth = run("reference", (truth_of or p).double())
    check(run(backend, p), truth, tolerance(p.x.dtype), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("any_backend", "options"),
    [(b, o) for b in ANY_BACKEND for o in (SOME_OPTIONS if slow(b) else ALL_OPTIONS)],
    ids=label,
)
def test_options(any_backend, options, dtype):
    agree(any_backend, make_smooth(T=3, B=3, I=4, H=4, dtype=dtype, **options))


@pytest.mark.parametrize(
    ("T", "B", "I", "H", "dtype"),
    [
        (1, 1, 1, 1, torch.float32),
        (1, 3, 2, 17, torch.float64),
        (5, 1, 3, 17, torch.float16),
        (2, 17, 5, 63, torch.float32),
        (2, 1, 17, 130, torch.float16),
        (2, 2, 3, 264, torch.bfloat16),
    ],
    ids=label,
)
def test_shapes(any_backend, T, B, I, H, dtype):
    agree(any_backend, make(T, B, I, H, dtype=dtype, ragged=T > 1 and B > 1))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("B", "H"), [(1, 768), (1, 770), (2, 512), (4, 512), (5, 520)])
def test_layouts_of_large_weights(B, H, directions):
    """Eager lays W_hh out by its size and the batch: each way, both passes."""
    agree("eager", make(3, B, 3, H, directions=directions))
    # Of so many units some are at relu's corner, where a rounding decides the derivative: outputs only.
    p = make(3, B, 3, H, directions=directions, nonlinearity="relu")
    output, _ = forward("eager", p, p.x, p.hx, list(p.weights.values()))
    q = p.double()
    truth, _ = forward("reference", q, q.x, q.hx, list(q.weights.values()))
    assert error(output, truth) <= tolerance(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_saturation(any_backend, dtype):
    # Every other unit far out on either side, where its state is exactly +-1 and has no derivative left.
    p = make(dtype=dtype, layers=2)
    for layer in range(2):
        p.weights[f"bias_ih_l{layer}"][::2] = torch.tensor([1000.0, -1000.0, 30.0])
    result = run(any_backend, p)
    assert (result["output"].abs() == 1).sum() == 4 * 3 * 3
    check(result, run("reference", p.double()), tolerance(dtype))


@pytest.mark.parametrize("upstream", ["both", "output", "h_n", "sum"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_upstream(any_backend, upstream, ragged):
    p = make(directions=2, ragged=ragged)
    if upstream == "output":
        p.g_hn = None
    elif upstream == "h_n":
        p.g_out = None
    elif upstream == "sum":  # as sum().backward() hands it over: one element with strides of zero
        p.g_out = torch.ones((), device=DEVICE).expand_as(p.g_out)
        p.g_hn = torch.ones((), device=DEVICE).expand_as(p.g_hn)
    agree(any_backend, p)


def sliced(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(t):
    return t[:1].expand_as(t) if t.dim() < 3 else t[:, :1].expand_as(t)


@pytest.mark.parametrize("change", [sliced, transposed, expanded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_strides(any_backend, change, dtype):
    p = make(dtype=dtype, directions=2)
    for name in ("x", "hx", "g_out", "g_hn"):
        changed = change(getattr(p, name))
        assert not changed.is_contiguous()
        setattr(p, name, changed)
    p.weights = {name: change(w) for name, w in p.weights.items()}
    agree(any_backend, p)


def test_batch_first(backend):
    p = make(layers=2, directions=2, ragged=True)
    weights = list(p.weights.values())
    x = p.x.transpose(0, 1).contiguous().requires_grad_()
    options = {"batch_first": True, "lengths": p.lengths, "backend": backend, **p.options}
    output, h_n = elman.elman(x, p.hx, weights, **options)
    torch.autograd.backward((output, h_n), (p.g_out.transpose(0, 1), p.g_hn))
    truth = run("reference", p.double())
    bound = tolerance(x.dtype)
    assert error(output.transpose(0, 1), truth["output"]) <= bound
    assert error(h_n, truth["h_n"]) <= bound
    assert error(x.grad.transpose(0, 1), truth["gradient of input"]) <= bound


def test_unbatched(backend):
    p = make(B=1, layers=2, directions=2)
    x, hx = p.x[:, 0].requires_grad_(), p.hx[:, 0]
    output, h_n = elman.elman(x, hx, list(p.weights.values()), backend=backend, **p.options)
    torch.autograd.backward((output, h_n), (p.g_out[:, 0], p.g_hn[:, 0]))
    truth = run("reference", p.double())
    bound = tolerance(x.dtype)
    assert error(output, truth["output"][:, 0]) <= bound
    assert error(h_n, truth["h_n"][:, 0]) <= bound
    assert error(x.grad, truth["gradient of input"][:, 0]) <= bound


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_packed(backend, order, batch_first):
    p = make(layers=2, directions=2, ragged=True)
    if order == "sorted":
        p.lengths = p.lengths.sort(descending=True).values
    layer = elman.Elman(4, 6, 2, bidirectional=True, batch_first=batch_first, device=DEVICE, backend=backend)
    layer.load_state_dict(p.weights)
    x = p.x.clone().requires_grad_()
    packed = pack_padded_sequence(
        x.transpose(0, 1) if batch_first else x,
        p.lengths.cpu(),
        batch_first=batch_first,
        enforce_sorted=order == "sorted",
    )
    output, h_n = layer(packed, p.hx)
    output, lengths = pad_packed_sequence(output)
    assert torch.equal(lengths, p.lengths.cpu())
    torch.autograd.backward((output, h_n), (p.g_out, p.g_hn))
    actual = {"output": output, "h_n": h_n, "gradient of input": x.grad}
    actual |= {f"gradient of {name}": w.grad for name, w in layer.named_parameters()}
    truth = run("reference", p.double())
    del truth["gradient of hx"]
    check(actual, truth, tolerance(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_padding_is_not_read(any_backend, nonlinearity, dtype):
    options = {"directions": 2, "layers": 1 if slow(any_backend) else 2, "nonlinearity": nonlinearity}
    clean = make_smooth(T=3, H=4, dtype=dtype, ragged=True, **options)
    past = torch.arange(3, device=DEVICE)[:, None] >= clean.lengths
    assert past.any()
    clean.g_out[past] = 0
    p = Problem(**vars(clean))
    p.x, p.g_out = clean.x.clone(), clean.g_out.clone()
    p.x[past] = p.g_out[past] = torch.nan
    agree(any_backend, p, truth_of=clean)
    assert not run(any_backend, p)["output"][past].any()


def worse_than_nn_rnn(backend, *sizes, dtype, nonlinearity, problems):
    """The results whose error is more than TIMES_NN_RNN times nn.RNN's, each with both errors.

    Errors are root mean squares over some problems: one problem's are a matter of luck.
    """
    squares: dict[str, torch.Tensor] = {}
    for seed in range(problems):
        p = make(*sizes, dtype=dtype, nonlinearity=nonlinearity, seed=seed)
        if nonlinearity == "relu":  # half of the units on, half off, and none near the kink: see make_smooth
            half = torch.tensor([3.0, -3.0], dtype=dtype, device=DEVICE).repeat(sizes[-1] // 2)
            p.weights["bias_ih_l0"] = half
            p.weights["weight_hh_l0"] /= 4
            assert nearest_to_zero(p) > 4 * torch.finfo(dtype).eps
        truth, ours, theirs = (
            run(name, q) for name, q in (("reference", p.double()), (backend, p), ("nn.RNN", p))
        )
        for name, t in truth.items():
            pair = torch.tensor([error(ours[name], t), error(theirs[name], t)]) ** 2
            squares[name] = squares.get(name, 0) + pair
    errors = {name: (pair / problems).sqrt().tolist() for name, pair in squares.items()}
    return {name: pair for name, pair in errors.items() if not pair[0] <= TIMES_NN_RNN * pair[1]}


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_no_worse_than_nn_rnn(any_backend, dtype, nonlinearity):
    options = {"dtype": dtype, "nonlinearity": nonlinearity, "problems": 2}
    assert not worse_than_nn_rnn(any_backend, 8, 8, 16, 16, **options)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("T", "B", "H"), [(64, 1, 64), (64, 8, 64), (64, 32, 64), (5, 1, 256), (5, 3, 256)])
@pytest.mark.parametrize("any_backend", [b for b in ANY_BACKEND if not slow(b)])
def test_float32_no_worse_than_nn_rnn(any_backend, T, B, H, nonlinearity):
    # Rows of the bench's sweep, and few steps: in float32 what counts is how a sum is ordered.
    options = {"dtype": torch.float32, "nonlinearity": nonlinearity, "problems": 4}
    assert not worse_than_nn_rnn(any_backend, T, B, H, H, **options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="TF32 is an NVIDIA GPU's")
def test_tf32_no_worse_than_nn_rnn(any_backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    options = {"dtype": torch.float32, "nonlinearity": "tanh", "problems": 4}
    assert not worse_than_nn_rnn(any_backend, 64, 8, 64, 64, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_same_bits(any_backend, dtype):
    p = make(T=5, H=17, dtype=dtype, ragged=True)
    first, second = run(any_backend, p), run(any_backend, p)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_state_is_rounded_as_output_is(any_backend, dtype):
    """The state goes on as the output holds it: to stop midway and start again changes nothing."""
    p = make(T=4, B=4, H=12, dtype=dtype)
    weights = list(p.weights.values())
    whole, _ = forward(any_backend, p, p.x, p.hx, weights)
    h, steps = p.hx, []
    for x in p.x.split(2):  # a single step is a cell to Triton, which rounds no input product
        output, h = forward(any_backend, p, x, h, weights)
        steps.append(output)
    # Next to nothing: products of another number of rows may be summed in another order.
    assert error(torch.cat(steps), whole) <= 0.05 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backend", ["eager", *TRITON])  # nn.RNN's operator saves what it pleases
def test_saves_only_input_weights_and_output(backend, layers):
    p = make(T=5, B=3, I=4, H=6, layers=layers)
    saved: dict[int, torch.Tensor] = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    leaves = {name: t.requires_grad_() for name, t in p.leaves().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = forward(backend, p, p.x, p.hx, list(p.weights.values()))
    known = {t.data_ptr() for t in (*leaves.values(), *p.hx, output)}  # *: a layer's part of the state
    others = [tuple(t.shape) for pointer, t in saved.items() if pointer not in known]
    # What an upper layer reads is a lower one's output.
    assert others == [(5, 3, 6)] * (layers - 1)
    assert output.data_ptr() in saved


def tiny(backend, nonlinearity, ragged):
    # Two steps, so that gradients cross a step; the fewer numbers, the fewer runs of the interpreter.
    sizes = {"T": 2, "B": 2, "I": 1, "H": 2} if slow(backend) else {"T": 3, "B": 3, "I": 2, "H": 3}
    return make_smooth(**sizes, dtype=torch.float64, directions=2, ragged=ragged, nonlinearity=nonlinearity)


@pytest.mark.parametrize(
    ("any_backend", "derivative", "nonlinearity", "ragged"),
    [
        (b, derivative, n, ragged)
        for b in ANY_BACKEND
        for derivative, n, ragged in itertools.product(("first", "second"), NONLINEARITIES, (False, True))
        # Where a run is slow half of them do: each pair of options still meets.
        if not slow(b) or (derivative == "first") ^ (n == "tanh") ^ ragged
    ],
)
def test_gradcheck(any_backend, derivative, nonlinearity, ragged):
    p = tiny(any_backend, nonlinearity, ragged)
    leaves = {name: t.requires_grad_() for name, t in p.leaves().items()}

    def function(x, hx, *weights):
        return forward(any_backend, p, x, hx, list(weights))

    first = derivative == "first"
    # Where a run is slow, along random directions instead of every element: see test_options for those.
    assert (torch.autograd.gradcheck if first else torch.autograd.gradgradcheck)(
        function, tuple(leaves.values()), fast_mode=not first or slow(any_backend)
    )


def test_a_second_derivative_imports_no_compiler():
    """Which torch.func does, and takes seconds."""
    code = """
import sys, torch
from elman import Elman
x = torch.ones(2, 1, 3, requires_grad=True)
(g,) = torch.autograd.grad(Elman(3, 4)(x)[0].sum(), x, create_graph=True)
g.sum().backward()
assert x.grad.any()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("given", ["both", "output", "h_n"])
@pytest.mark.parametrize(
    ("T", "B", "H", "D"), [(1, 1, 1, 1), (1, 3, 17, 2), (5, 1, 63, 2), (9, 4, 17, 1), (70, 2, 130, 2)]
)
def test_scan_of_second_derivatives(T, B, H, D, given, nonlinearity, dtype):
    """The scan that eager has for them, beside what torch makes of the reference's backward scan."""
    torch.manual_seed(0)
    output, w_hh = torch.randn(T, B, D * H).mul(3).tanh(), torch.randn(D, H, H) / H**0.5
    if nonlinearity == "relu":
        output = output.relu()
    g_out = None if given == "h_n" else torch.randn(B, T, D * H).transpose(0, 1)
    g_hn = None if given == "output" else torch.randn(D, B, H)
    u = torch.randn(T, D * H, B).transpose(1, 2)
    inputs = [None if t is None else t.double().requires_grad_() for t in (g_out, g_hn, output, w_hh)]
    dz = elman.reference.layer_dz(*inputs, nonlinearity=nonlinearity)
    there = [t for t in inputs if t is not None]
    expected = torch.autograd.grad(dz, there, u.double(), materialize_grads=True)
    own = [None if t is None else t.to(dtype) for t in (g_out, g_hn, output, w_hh)]
    dz, needs = dz.detach().to(dtype), [t is not None for t in inputs]
    found = [g for g in elman.eager.backward_vjp(u.to(dtype), *own, dz, nonlinearity, needs) if g is not None]
    for g, truth in zip(found, expected, strict=True):
        assert (g.dtype, g.shape) == (dtype, truth.shape)
        assert error(g, truth) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_second_derivatives_of_a_kernel_are_accumulated_in_float32(dtype):
    """Its dz is of the storage dtype: one rounding of the results is all that is lost."""
    if not TRITON:
        pytest.skip("no Triton here")
    output, w_hh = torch.randn(40, 3, 16).tanh(), torch.randn(1, 16, 16) / 4
    given = [t.to(DEVICE, dtype) for t in (torch.randn(40, 3, 16), output, w_hh)]
    u = torch.randn(40, 3, 16).to(DEVICE, dtype)
    leaves = [t.clone().requires_grad_() for t in given]
    dz = torch.ops.elman.layer_dz(leaves[0], None, *leaves[1:], None, None, "tanh", "step", "ieee")
    found = torch.autograd.grad(dz, leaves, u)
    leaves = [t.double().requires_grad_() for t in given]
    dz = elman.reference.layer_dz(leaves[0], None, *leaves[1:])
    for g, truth in zip(found, torch.autograd.grad(dz, leaves, u.double()), strict=True):
        assert error(g, truth) <= 0.3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("T", "B"), [(3, 2), (40, 3)], ids=str)
def test_gradient_penalty_is_nn_rnns(T, B, bidirectional):
    """Every gradient of a loss that holds gradients: the whole way through both scans, on plain tensors."""
    theirs = nn.RNN(5, 17, bidirectional=bidirectional, dtype=torch.float64)
    ours = elman.Elman(5, 17, bidirectional=bidirectional, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(T, B, 5, dtype=torch.float64), torch.randn(1 + bidirectional, B, 17).double()

    def penalty(layer):
        leaves = [x.clone().requires_grad_(), hx.clone().requires_grad_(), *layer.parameters()]
        output, h_n = layer(*leaves[:2])
        first = torch.autograd.grad(output.square().sum() + h_n.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)

    for found, expected in zip(penalty(ours), penalty(theirs), strict=True):
        assert error(found, expected) <= tolerance(torch.float64)


def test_argument_computed_from_another(any_backend):
    """The state comes from the input: under create_graph each path to it is counted once."""
    p = make(T=3, dtype=torch.float64, ragged=True, directions=2)

    def derivatives(backend):
        leaves = {name: t.detach().requires_grad_() for name, t in p.leaves().items() if name != "hx"}
        hx = leaves["input"].mean() * p.hx
        weights = [leaves[name] for name in p.weights]
        weights[1] = weights[1] + leaves["input"].std() * weights[5]
        results = forward(backend, p, leaves["input"], hx, weights)
        loss = sum((r * g).sum() for r, g in zip(results, (p.g_out, p.g_hn), strict=True))
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), list(leaves.values()))
        names = [f"{order} {name}" for order in ("first", "second") for name in leaves]
        return dict(zip(names, (*first, *second), strict=True))

    # Sums of sums of rounded numbers, and as many cancellations: ten times what one pass may be off.
    check(derivatives(any_backend), derivatives("reference"), 10 * tolerance(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_create_graph_changes_no_gradient(any_backend, dtype):
    p = make(T=3, dtype=dtype, ragged=True)
    leaves = {name: t.requires_grad_() for name, t in p.leaves().items()}
    results = forward(any_backend, p, p.x, p.hx, list(p.weights.values()))
    grads = torch.autograd.grad(results, list(leaves.values()), (p.g_out, p.g_hn), create_graph=True)
    truth = run("reference", p.double())
    actual = {name: r.detach() for name, r in zip(("output", "h_n"), results, strict=True)}
    actual |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    assert all(g.dtype == dtype for g in grads)
    check(actual, truth, tolerance(dtype))


@pytest.mark.parametrize("wanted", ["input", "hx", "weight_hh_l0", "bias_hh_l0"])
def test_one_gradient_alone(any_backend, wanted):
    p = make(T=3)
    leaf = p.leaves()[wanted].requires_grad_()
    results = forward(any_backend, p, p.x, p.hx, list(p.weights.values()))
    (grad,) = torch.autograd.grad(results, leaf, (p.g_out, p.g_hn))
    truth = run("reference", p.double())[f"gradient of {wanted}"]
    assert error(grad, truth) <= tolerance(grad.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_step(backend, dtype, bias):
    p = make(T=1, B=3, I=4, H=17, dtype=dtype, bias=bias)
    p.g_out = None
    leaves = {name: t.requires_grad_() for name, t in p.leaves().items()}
    h = elman.elman_step(p.x[0], p.hx[0], *p.weights.values(), backend=backend)
    grads = torch.autograd.grad(h, list(leaves.values()), p.g_hn[0])
    truth = run("reference", p.double())
    del truth["output"]
    actual = {"h_n": h[None].detach()}
    actual |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    check(actual, truth, tolerance(dtype))


def loss_curve(layer, optimizer, steps):
    """The losses of a regression: the mean of a sequence, told from its last state."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 3, generator=generator).to(DEVICE)
    target = x.mean((0, 2))[:, None]
    torch.manual_seed(2)
    model = nn.ModuleList([layer, nn.Linear(layer.hidden_size, 1, device=DEVICE)])
    update = optimizer(model.parameters())
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model[1](layer(x)[1][-1]), target)
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return torch.tensor(losses)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


@pytest.mark.parametrize(
    ("backend", "optimizer"),
    [(b, o) for b in BACKENDS for o in OPTIMIZERS if o == "sgd" or not slow(b)],
)
def test_loss_curve(backend, optimizer):
    ours = elman.Elman(3, 8, device=DEVICE, backend=backend)
    steps = 25 if slow(backend) else 100
    theirs, ours = (loss_curve(layer, OPTIMIZERS[optimizer], steps) for layer in (copy_of(ours), ours))
    assert theirs[-1] < theirs[0] / 2  # it learns
    assert (theirs - ours).abs().max() <= LOSS_CURVE


def test_every_backend_is_tested():
    running = [name for name, runs in elman.available_backends().items() if runs is True]
    assert sorted(running) == sorted({name.partition(":")[0] for name in BACKENDS} - {"auto"})


def test_wrapper_frees_its_graph_and_refuses_a_second_backward():
    p = make(T=3, B=2, I=3, H=4)
    x = p.x.detach().requires_grad_()
    output, _ = forward(OPERATOR, p, x, p.hx, list(p.weights.values()))
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()
    assert not hasattr(output.grad_fn, "inner")


def test_wrapper_takes_a_state_of_any_strides():
    p = make(T=3, B=5, I=3, H=4)
    weights = list(p.weights.values())
    strided = p.hx.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(*(forward(OPERATOR, p, p.x, h, weights)[0] for h in (p.hx, strided)))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("T", [1, 5])
def test_the_products_of_a_gpu_are_those_of_the_cpu(T, D, monkeypatch):
    monkeypatch.setattr(elman.products, "SHORTEST_SUM", 0)  # so few rows are one product on the CPU, too
    sizes = [(T, 3, D * 6), (T, 3, 4), (D, 3, 6), (D, 6, 4), (D, 6, 6), (T, 3, D * 6)]
    tensors, needs = [torch.randn(*size, dtype=torch.float64) for size in sizes], [True] * 5
    expected = ops._layer_products(*tensors, None, None, needs)
    for found, by_parts in zip(ops.whole_products(*tensors, needs), expected, strict=True):
        torch.testing.assert_close(found, by_parts)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(("H", "D"), [(17, 2), (600, 1)])
def test_a_backward_pass_within_autocast_rounds_no_more(H, D, second):
    """It may be called there: with sums of one part and of several, in place or not."""
    layer = elman.Elman(5, H, bidirectional=D == 2)
    x = torch.randn(30, 20, 5, requires_grad=True)
    found = []
    for inside in (False, True):
        loss = layer(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            if second:
                loss = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
            found.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    # Between the two scans of a second derivative stand products that torch records, and rounds as its own.
    bound = 4 * torch.finfo(torch.bfloat16).eps if second else 0
    for a, b in zip(*found, strict=True):
        assert error(b, a) <= bound
