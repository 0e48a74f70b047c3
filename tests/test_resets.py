"""Resets: a row begins anew where they say so, as if each segment were a sequence of its own."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import elman
from elman import BackendUnavailableError, Elman, ElmanNetwork, ops, reference, routing
from tests.helpers import BACKENDS, DEVICE, TRITON, check, copy_of, dtype_name, error, make
from tests.tolerances import tolerance

F64 = torch.float64
ABLE = [b for b in BACKENDS if b != "cudnn"]
each_backend = pytest.mark.parametrize("backend", ABLE)
OPTIONS = [
    {"num_layers": L, "bidirectional": both, "nonlinearity": n}
    for L, both, n in itertools.product((1, 2), (False, True), ("tanh", "relu"))
]


def some(T, B, device=DEVICE):
    """Rows that begin anew never, always, at their first step alone, and now and then."""
    resets = torch.rand(T, B, device=device) < 0.4
    resets[:, 0] = False
    resets[:, 1::4] = True
    resets[:, 2::4] = torch.arange(T, device=device)[:, None] == 0
    return resets


def segments(length, resets):
    """The starts and ends of a row's segments."""
    starts = sorted({0, *(t for t in range(length) if resets[t])})
    return list(zip(starts, [*starts[1:], length], strict=True))


def in_segments(layer, x, hx, resets, lengths=None):
    """What nn.RNN makes of one layer's segments, each alone: output and h_n, one layer."""
    T, B, _ = x.shape
    D = 1 + layer.bidirectional
    output, h_n = x.new_zeros(T, B, D * layer.hidden_size), []
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        parts, ends = [], []
        for start, end in segments(length, resets[:, b]):
            h = torch.zeros_like(hx[:, b])
            # hx is where a row begins, and, reversed, where it ends.
            if start == 0 and not resets[0, b]:
                h = torch.cat([hx[:1, b], h[1:]])
            if D == 2 and end == length:
                h = torch.cat([h[:1], hx[1:, b]])
            out, last = layer(x[start:end, b], h)
            parts.append(out)
            ends.append(last)
        output = output.index_put((torch.arange(length), torch.tensor(b)), torch.cat(parts))
        h_n.append(torch.stack([ends[-1][0], *([ends[0][1]] if D == 2 else [])]))
    return output, torch.stack(h_n, 1)


def layers_in_segments(rnn, x, hx, resets, lengths=None):
    """The same through a stack: a reset is one in every layer."""
    D, states = 1 + rnn.bidirectional, []
    for n in range(rnn.num_layers):
        one = nn.RNN(
            x.shape[-1], rnn.hidden_size, nonlinearity=rnn.nonlinearity, bidirectional=D == 2, dtype=F64
        )
        names = [name for name, _ in one.named_parameters()]
        weights = {name: getattr(rnn, name.replace("_l0", f"_l{n}")) for name in names}

        class One:
            bidirectional, hidden_size = one.bidirectional, one.hidden_size

            def __call__(self, x, h, one=one, weights=weights):
                return torch.func.functional_call(one, weights, (x, h))

        x, h_n = in_segments(One(), x, hx[n * D : (n + 1) * D], resets, lengths)
        states.append(h_n)
    return x, torch.cat(states)


def results(run, layer, x, hx, g_out, g_hn):
    """Output, state and every gradient of run(x, hx)."""
    x, hx = x.detach().requires_grad_(), hx.detach().requires_grad_()
    layer.zero_grad()
    output, h_n = run(x, hx)
    torch.autograd.backward([output, h_n], [g_out, g_hn])
    named = {"output": output, "h_n": h_n, "input": x.grad, "hx": hx.grad}
    return named | {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_segments_are_sequences_of_their_own(options, ragged):
    """The eager layer in float64 and nn.RNN on each segment: the same in every number."""
    T, B, H = 6, 5, 4
    layer = Elman(3, H, **options, dtype=F64)
    rnn = copy_of(layer, device="cpu")
    L = layer.num_layers * (1 + layer.bidirectional)
    x, hx, resets = torch.randn(T, B, 3, dtype=F64), torch.randn(L, B, H, dtype=F64), some(T, B, "cpu")
    g_out = torch.randn(T, B, H * (1 + layer.bidirectional), dtype=F64)
    g_hn = torch.randn_like(hx)
    lengths = torch.tensor([6, 3, 1, 6, 4]) if ragged else None

    def ours(x, hx):
        if lengths is None:
            return layer(x, hx, resets)
        output, h_n = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx, resets)
        return pad_packed_sequence(output, total_length=T)[0], h_n

    if ragged:
        g_out[torch.arange(T)[:, None] >= lengths] = 0
    theirs = results(lambda x, hx: layers_in_segments(rnn, x, hx, resets, lengths), rnn, x, hx, g_out, g_hn)
    check(results(ours, layer, x, hx, g_out, g_hn), theirs, 1e-13)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    "shape", [(5, 5, 3, 6), (1, 1, 1, 1), (4, 1, 2, 17), (1, 6, 3, 5), (3, 4, 2, 63)], ids=str
)
def test_every_backend_agrees(backend, shape, ragged, dtype):
    T, B, I, H = shape
    p = make(T, B, I, H, layers=2 if H < 17 else 1, directions=2, dtype=dtype, ragged=ragged)
    resets = some(T, B)
    compare_with_reference(p, resets, backend, tolerance(dtype))


def compare_with_reference(p, resets, backend, bound):
    def run(q, call, **more):
        leaves = {name: t.detach().requires_grad_() for name, t in q.leaves().items()}
        weights = [leaves[name] for name in q.weights]
        output, h_n = call(
            leaves["input"], leaves["hx"], weights, lengths=q.lengths, resets=resets, **q.options, **more
        )
        grads = torch.autograd.grad((output, h_n), list(leaves.values()), (q.g_out, q.g_hn))
        return {"output": output, "h_n": h_n, **dict(zip(leaves, grads, strict=True))}

    check(run(p, elman.elman, backend=backend), run(p.double(), reference.elman), bound, floor=1.0)


@pytest.mark.parametrize(("B", "H"), [(4, 384), (1, 768), (2, 520), (32, 64), (128, 128)])
@pytest.mark.parametrize("T", [3, 40])
def test_large_weights(T, B, H):
    """Where eager lays the weights out in other ways, and adds gradients up in others."""
    compare_with_reference(
        make(T, B, 16, H, directions=1 if H > 200 else 2), some(T, B), "eager", tolerance(torch.float32)
    )


@each_backend
def test_the_layouts_of_resets(backend):
    layer = Elman(3, 4, bidirectional=True, dtype=F64, device=DEVICE, backend=backend)
    first = Elman(3, 4, bidirectional=True, batch_first=True, dtype=F64, device=DEVICE, backend=backend)
    first.load_state_dict(layer.state_dict())
    x, resets = torch.randn(5, 4, 3, dtype=F64, device=DEVICE), some(5, 4)
    output, h_n = layer(x, None, resets)
    other, _ = first(x.transpose(0, 1), None, resets.transpose(0, 1))
    assert torch.equal(other.transpose(0, 1), output)
    alone, last = layer(x[:, 3], None, resets[:, 3])
    assert error(alone, output[:, 3]) <= tolerance(F64)
    assert error(last, h_n[:, 3]) <= tolerance(F64)
    assert torch.equal(layer(x, resets=resets.contiguous().t().contiguous().t())[0], output)


@each_backend
@pytest.mark.parametrize("order", [True, False], ids=["sorted", "unsorted"])
def test_packed(backend, order):
    layer = Elman(3, 4, 2, bidirectional=True, dtype=F64, device=DEVICE, backend=backend)
    x, resets = torch.randn(5, 4, 3, dtype=F64, device=DEVICE), some(5, 4)
    lengths = torch.tensor([5, 4, 4, 2] if order else [2, 4, 5, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=order)
    output, h_n = layer(packed, None, resets)
    weights = list(layer.parameters())
    padded, last = reference.elman(
        x, None, weights, num_layers=2, bidirectional=True, lengths=lengths.to(DEVICE), resets=resets
    )
    assert error(pad_packed_sequence(output)[0], padded) <= tolerance(F64)
    assert error(h_n, last) <= tolerance(F64)


@each_backend
def test_what_is_before_a_reset_does_not_reach_what_is_after(backend):
    """Not even as NaN: results, and gradients either way."""
    layer = Elman(3, 4, dtype=torch.float32, device=DEVICE, backend=backend)
    x, resets = torch.randn(4, 3, 3, device=DEVICE), torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)
    resets[2] = True
    x[:2] = float("nan")
    hx = torch.full((1, 3, 4), float("nan"), device=DEVICE)
    output, h_n = layer(x, hx, resets)
    alone, last = layer(x[2:])
    # Not to the bit: native makes products of few rows in C, but not beside resets.
    assert error(output[2:], alone) <= tolerance(torch.float32)
    assert error(h_n, last) <= tolerance(torch.float32)
    resets[0] = True
    hx.requires_grad_()
    for x in (torch.randn(4, 3, 3, device=DEVICE), torch.randn(1, 3, 3, device=DEVICE)):
        output, h_n = layer(x, hx, resets[: len(x)])
        found = torch.autograd.grad((output.sum() + h_n.sum()), [hx, *layer.parameters()])
        assert all(g.isfinite().all() for g in found)
        assert (found[0] == 0).all()
    resets[0] = False
    x = torch.randn(4, 3, 3, device=DEVICE).requires_grad_()
    output, _ = layer(x, None, resets)
    g = torch.zeros_like(output)
    g[3] = float("nan")
    (dx,) = torch.autograd.grad(output, x, g)
    assert (dx[:2] == 0).all()
    assert dx[2:].isnan().all()


@each_backend
def test_second_derivatives(backend):
    sizes = (2, 2, 1, 1) if backend in TRITON and DEVICE == "cpu" else (3, 2, 2, 2)
    p = make(*sizes, dtype=F64, directions=2)
    resets = torch.tensor([[True, False], [False, True], [False, False]], device=DEVICE)[: sizes[0]]
    leaves = [t.requires_grad_() for t in p.leaves().values()]

    def run(x, hx, *weights):
        return elman.elman(x, hx, weights, resets=resets, backend=backend, **p.options)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    if backend not in TRITON:  # theirs is eager's, and the interpreter would take half a minute
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_forward_mode_derivatives():
    layer = Elman(3, 4, 2, bidirectional=True, dtype=F64)
    x, v, resets = torch.randn(5, 4, 3, dtype=F64), torch.randn(5, 4, 3, dtype=F64), some(5, 4, "cpu")
    _, tangent = torch.func.jvp(lambda a: layer(a, None, resets)[0], (x,), (v,))
    _, expected = torch.autograd.functional.jvp(lambda a: layer(a, None, resets)[0], x, v)
    assert error(tangent, expected) <= tolerance(F64)


def test_resets_that_are_all_false():
    """They and None mean the same."""
    layer, x = Elman(3, 4, bidirectional=True), torch.randn(5, 4, 3)
    none = torch.zeros(5, 4, dtype=torch.bool)
    assert error(layer(x, None, none)[0], layer(x)[0]) <= tolerance(torch.float32)


@pytest.mark.usefixtures("fresh_compiler")
def test_in_a_compiled_graph():
    layer = Elman(3, 4, 2, bidirectional=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, resets = torch.randn(5, 4, 3), some(5, 4, "cpu")
    for run in (layer, compiled):
        layer.zero_grad()
        output, _ = run(x, None, resets)
        output.square().sum().backward()
        found = [output, *(p.grad for p in layer.parameters())]
        if run is layer:
            expected = found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    packed = pack_padded_sequence(x, [5, 2, 4, 1], enforce_sorted=False)
    assert torch.equal(compiled(packed, None, resets)[0].data, layer(packed, None, resets)[0].data)


@pytest.mark.skipif(DEVICE == "cuda", reason="any other default device shows it, and this one has none")
def test_packed_batches_whatever_the_default_device():
    """Sizes are on the CPU, and what is made beside them has to be too."""
    layer = Elman(3, 4, 2, bidirectional=True)
    packed, resets = pack_padded_sequence(torch.randn(5, 4, 3), [5, 4, 2, 1]), some(5, 4)
    expected = layer(packed, None, resets)[0].data
    with torch.device("meta"):
        output = layer(packed, None, resets)[0].data
        output.sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(packed, None, resets)[0].data, expected)
    assert torch.equal(output, expected)


def test_the_network_hands_them_on():
    network = ElmanNetwork(3, 4, 2)
    x, resets = torch.randn(5, 4, 3), some(5, 4, "cpu")
    h, _ = network.rnn(x, None, resets)
    assert torch.equal(network(x, None, resets)[0], torch.tanh(network.output(h)))
    packed = pack_padded_sequence(x, [5, 4, 2, 1])
    assert isinstance(network(packed, None, resets)[0], PackedSequence)
    h = torch.randn(4)
    y, _ = network(x[0, 0], h, torch.tensor(True))
    # Another way through the layer, whose products may be added up in another order.
    assert error(y, network(x[0, 0], torch.zeros(4))[0]) <= tolerance(y.dtype)
    y, _ = network(x[0, 0], h, torch.tensor(False))
    assert error(y, network(x[0, 0], h)[0]) <= tolerance(y.dtype)


BAD = {
    "shape": (
        torch.zeros(4, 5, dtype=torch.bool),
        ValueError,
        "resets is torch.bool of shape (4, 5); expected",
    ),
    "rank": (torch.zeros(5, dtype=torch.bool), ValueError, "expected torch.bool of shape (5, 4)"),
    "dtype": (torch.zeros(5, 4), ValueError, "resets is torch.float32 of shape (5, 4); expected torch.bool"),
    "kind": ([[True] * 4] * 5, TypeError, "resets is a list; expected a torch.Tensor"),
    "device": (torch.zeros(5, 4, dtype=torch.bool, device="meta"), RuntimeError, "resets is on meta and the"),
}


@pytest.mark.parametrize(("resets", "kind", "words"), BAD.values(), ids=BAD)
def test_wrong_resets(resets, kind, words):
    layer, x = Elman(3, 4), torch.randn(5, 4, 3)
    with pytest.raises(kind, match=re.escape(words)):
        layer(x, None, resets)
    if isinstance(resets, torch.Tensor) and resets.shape != (5, 4):
        with pytest.raises(kind, match=re.escape(words)):
            layer(pack_padded_sequence(x, [5, 4, 2, 1]), None, resets)


def test_cudnn_has_none():
    with pytest.raises(BackendUnavailableError, match="it has no resets; use 'auto', 'triton' or 'eager'"):
        routing.route("cudnn", torch.device("cuda"), torch.float32, 64, 8, resets=True)


@pytest.mark.parametrize("backend", [b for b in ABLE if b != "auto"])  # by a kernel's name
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_infinite_weights_stay_out_of_a_segment_s_last_step(backend):
    """Nothing is heard there, and zeros times infinity would not be nothing."""
    resets = torch.ones(4, 2, dtype=torch.bool, device=DEVICE)
    numbers = torch.ones(4, 2, 3, dtype=F64, device=DEVICE)
    w_hh = torch.full((1, 3, 3), float("inf"), dtype=F64, device=DEVICE)
    dz = ops._layer_dz(numbers, None, numbers, w_hh, None, resets, "relu", backend.rpartition(":")[2], "ieee")
    assert (dz == 1).all()
    assert (reference.layer_dz(numbers, None, numbers, w_hh, None, "relu", resets) == 1).all()
    needs = [False, True, False, False, False]
    found = ops._layer_products(dz, numbers, numbers[:1], w_hh, w_hh, numbers, None, resets, needs)
    assert (found[1] == 0).all()
