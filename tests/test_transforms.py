"""torch.func's transforms and higher derivatives: vmap, grad, jacobians, ensembles, per-sample gradients.

Truths are loops over single calls, and torch.autograd's own derivatives of nn.RNN. All in float64.
"""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

from elman import Elman, ElmanCell, ElmanNetwork
from tests.helpers import BACKENDS, DEVICE, OPERATOR, TRITON, copy_of, error

F64 = torch.float64
EXACT = 1e-12  # float64, a handful of steps: what another order of summation may cost
OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "relu": {"nonlinearity": "relu", "bias": False, "batch_first": True},
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# cuDNN's operator has no batching rule. Under the interpreter one kernel stands for all of Triton's: what is
# tested here doesn't know them apart.
ABLE = [b for b in BACKENDS if b not in (OPERATOR, "cudnn", "auto", *(TRITON[1:] if DEVICE == "cpu" else []))]
each_backend = pytest.mark.parametrize("backend", ABLE)
# Of Triton's kernels, which the interpreter runs slowly, the options that have the most to get wrong.
each_backend_and_options = pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(backend, options, id=f"{backend}-{name}")
        for backend in ABLE
        for name, options in OPTIONS.items()
        if backend not in TRITON or name == "deep"
    ],
)


def same(actual, expected):
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert error(a, e) <= EXACT


def layer_of(backend="eager", **options):
    return Elman(3, 4, dtype=F64, device=DEVICE, backend=backend, **options)


def inputs(V=3, T=4, B=2):
    return torch.randn(V, T, B, 3, dtype=F64, device=DEVICE)


def loss(layer, x, *more):
    output, h_n = layer(x, *more)
    return output.square().sum() + h_n.sin().sum()


def one_by_one(function, *batched):
    """function over the first dimension of its arguments, by a loop."""
    results = [function(*each) for each in zip(*batched, strict=True)]
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *results)


@each_backend_and_options
def test_vmap_over_inputs(backend, options):
    layer, x = layer_of(backend, **options), inputs()
    expected = one_by_one(layer, x)
    same(vmap(layer)(x), expected)
    moved = vmap(layer, in_dims=3, out_dims=1)(x.movedim(0, 3))
    same([t.movedim(1, 0) for t in moved], expected)


@each_backend_and_options
def test_vmap_over_states_and_resets(backend, options):
    layer, x = layer_of(backend, **options), inputs()
    L, B = layer.num_layers * (1 + layer.bidirectional), x.shape[1 if layer.batch_first else 2]
    hx = torch.randn(len(x), L, B, 4, dtype=F64, device=DEVICE)
    resets = torch.rand(x.shape[:-1], device=DEVICE) < 0.4
    same(vmap(layer)(x, hx, resets), one_by_one(layer, x, hx, resets))
    same(vmap(lambda h: layer(x[0], h))(hx), one_by_one(lambda h: layer(x[0], h), hx))
    same(vmap(lambda r: layer(x[0], hx[0], r))(resets), one_by_one(lambda r: layer(x[0], hx[0], r), resets))


def test_vmap_of_vmap():
    layer, x = layer_of(), torch.randn(2, 3, 5, 2, 3, dtype=F64, device=DEVICE)
    same(vmap(vmap(layer))(x), one_by_one(lambda each: one_by_one(layer, each), x))


@each_backend
def test_vmap_is_one_call_with_more_rows(backend):
    """A batch of V inputs is V * B rows of one scan, not V scans; of the backward pass too."""
    layer, x = layer_of(backend), inputs(V=4, T=3, B=2)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        vmap(grad(lambda a: loss(layer, a)))(x)
    for name, place in (("elman::layer", 0), ("elman::layer_dz", 2)):
        rows = [event.input_shapes[place][1] for event in profile.events() if event.name == name]
        # The call of a sample's 2 rows that was batched is seen too.
        assert sorted(set(rows)) == [2, 8], name
        assert rows.count(8) == 1, name
        assert rows.count(2) < len(x), name


@each_backend_and_options
def test_per_sample_gradients(backend, options):
    layer, x = layer_of(backend, **options), inputs()
    parameters = dict(layer.named_parameters())

    def of(p, each):
        return loss(lambda a: functional_call(layer, p, (a,)), each)

    expected = one_by_one(lambda each: torch.autograd.grad(loss(layer, each), list(parameters.values())), x)
    same(list(vmap(grad(of), (None, 0))(parameters, x).values()), expected)


@each_backend_and_options
def test_ensembles(backend, options):
    """Stacked weights, on the same input and on one of each's own, and their gradients."""
    layers = [layer_of(backend, **options) for _ in range(2)]
    weights, _ = stack_module_state(layers)
    x = inputs(V=2)

    def run(p, each):
        return functional_call(layers[0], p, (each,))

    same(vmap(run, (0, None))(weights, x[0]), one_by_one(lambda layer: layer(x[0]), layers))
    same(vmap(run)(weights, x), one_by_one(lambda layer, each: layer(each), layers, x))
    found = vmap(grad(lambda p, each: loss(lambda a: run(p, a), each)))(weights, x)
    expected = one_by_one(
        lambda layer, each: torch.autograd.grad(loss(layer, each), list(layer.parameters())), layers, x
    )
    same(list(found.values()), expected)


@each_options
@pytest.mark.parametrize("backend", [b for b in ABLE if b not in TRITON])
def test_jacobians(backend, options):
    layer, x = layer_of(backend, **options), inputs()[0]
    expected = torch.autograd.functional.jacobian(lambda a: copy_of(layer)(a)[0], x)
    same(jacrev(lambda a: layer(a)[0])(x), expected)
    same(jacfwd(lambda a: layer(a)[0])(x), expected)
    for strategy in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(
            lambda a: layer(a)[0], x, vectorize=True, strategy=strategy
        )
        same(found, expected)


@each_backend
def test_jacobian_by_rows(backend):
    layer, x = layer_of(backend), inputs(T=2, B=1)[0]
    same(jacrev(lambda a: layer(a)[0])(x), torch.autograd.functional.jacobian(lambda a: layer(a)[0], x))


def test_vectorized_hessian_of_a_state_alone():
    """relu's gradient of the output is plain zeros there, beside a batch of the state's."""
    ours, x = layer_of(**OPTIONS["relu"]), inputs(T=3)[0]

    def of(layer):
        return torch.autograd.functional.hessian(lambda a: layer(a)[1].exp().sum(), x, vectorize=True)

    same(of(ours), of(copy_of(ours)))


@each_options
def test_a_batch_of_gradients_at_once(options):
    """torch.autograd.grad(is_grads_batched=True), of the input and of every weight, and again through it."""
    layer, x = layer_of(**options), inputs(T=9)[0].requires_grad_()
    leaves = [x, *layer.parameters()]
    output, _ = layer(x)
    g = torch.randn(3, *output.shape, dtype=F64, device=DEVICE)
    found = torch.autograd.grad(output, leaves, g, is_grads_batched=True, retain_graph=True)
    same(found, one_by_one(lambda each: torch.autograd.grad(output, leaves, each, retain_graph=True), g))
    nonlinear = torch.autograd.grad(output, x, g, is_grads_batched=True, create_graph=True)[0]
    second = torch.autograd.grad(nonlinear.square().sum(), x, retain_graph=True)
    loop = torch.stack([torch.autograd.grad(output, x, each, create_graph=True)[0] for each in g])
    same(second, torch.autograd.grad(loop.square().sum(), x))


@each_options
@pytest.mark.parametrize("backend", [b for b in ABLE if b not in TRITON])
def test_hessians(backend, options):
    layer, x = layer_of(backend, **options), inputs(T=3, B=1)[0]
    expected = torch.autograd.functional.hessian(lambda a: loss(copy_of(layer), a), x)
    of = lambda a: loss(layer, a)  # noqa: E731
    for found in (hessian(of), jacrev(jacrev(of)), jacrev(jacfwd(of)), jacfwd(jacfwd(of))):
        same(found(x), expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("linear", [False, True], ids=["squares", "sum"])
@pytest.mark.parametrize(("backend", "nonlinearity"), [*((b, "tanh") for b in ABLE), ("eager", "relu")])
def test_third_derivative(backend, nonlinearity, linear, frozen):
    """Of losses whose gradient is a constant too, and with weights that ask for none."""
    layer = layer_of(backend, nonlinearity=nonlinearity)
    for p in layer.parameters():
        p.requires_grad_(not frozen)

    def derivatives(layer):
        x = torch.linspace(-1, 1, 6, dtype=F64, device=DEVICE).view(2, 1, 3).requires_grad_()
        value = layer(x)[0].sum() if linear else loss(layer, x)
        found = []
        for _ in range(3):
            found += torch.autograd.grad(value, x, create_graph=True)
            value = found[-1].sum() if linear else found[-1].square().sum()
        if not frozen:
            value.backward()
            found += [p.grad for p in layer.parameters() if p.grad is not None]
        return found

    theirs = copy_of(layer)
    for p in theirs.parameters():
        p.requires_grad_(not frozen)
    same(derivatives(layer), derivatives(theirs))


@each_options
def test_jvp_and_vjp_are_transposes(options):
    layer, x = layer_of(**options), inputs()[0]
    v = torch.randn_like(x)
    output, tangent = jvp(lambda a: layer(a)[0], (x,), (v,))
    u = torch.randn_like(output)
    _, pull = vjp(lambda a: layer(a)[0], x)
    assert torch.isclose((tangent * u).sum(), (pull(u)[0] * v).sum(), rtol=1e-10)


def test_packed_sequences():
    layer, x = layer_of(num_layers=2, bidirectional=True), inputs()[0]
    packed = pack_padded_sequence(x, [2, 4], enforce_sorted=False)

    def run(data):
        return layer(PackedSequence(data, *packed[1:]))[0].data

    def total(data):
        return run(data).square().sum()

    data = torch.stack([packed.data, -packed.data])
    same(vmap(run)(data), one_by_one(run, data))
    same(vmap(grad(total))(data), one_by_one(grad(total), data))
    expected = torch.autograd.functional.jacobian(run, packed.data)
    same(jacrev(run)(packed.data), expected)
    same(jacfwd(run)(packed.data), expected)
    same(jacrev(grad(total))(packed.data), torch.autograd.functional.hessian(total, packed.data))


@pytest.mark.skipif(not TRITON, reason="the operator of a kernel")
def test_lengths_of_each_in_the_batch():
    """Padded rows whose lengths differ from sample to sample, by the kernels' operator."""
    from elman import ops

    layer, x = layer_of(), inputs()
    lengths = torch.tensor([[4, 2], [1, 4], [3, 3]], device=DEVICE)
    w_ih, w_hh, *_ = (w[None] for w in layer.parameters())
    h0 = torch.zeros(1, 2, 4, dtype=F64, device=DEVICE)

    def run(x, counts):
        return ops.layer(x, h0, w_ih, w_hh, None, counts, None, "tanh", "step", "ieee")

    same(vmap(run)(x, lengths), one_by_one(run, x, lengths))


@pytest.mark.parametrize("batched", [True, False])
def test_cell(batched):
    cell = ElmanCell(3, 4, dtype=F64, device=DEVICE)
    x = torch.randn(5, *([2] * batched), 3, dtype=F64, device=DEVICE)
    same(vmap(cell)(x), one_by_one(cell, x))
    same(jacrev(cell)(x[0]), torch.autograd.functional.jacobian(cell, x[0]))
    same(jacfwd(cell)(x[0]), torch.autograd.functional.jacobian(cell, x[0]))
    same(
        vmap(grad(lambda a: cell(a).square().sum()))(x), one_by_one(grad(lambda a: cell(a).square().sum()), x)
    )


def test_network_and_unbatched():
    network = ElmanNetwork(3, 4, 2, dtype=F64, device=DEVICE)
    x = inputs()
    same(vmap(network)(x), one_by_one(network, x))
    same(vmap(network)(x[:, :, 0]), one_by_one(network, x[:, :, 0]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_transforms():
    layer, x = layer_of(), inputs()
    parameters = dict(layer.named_parameters())

    def of(p, each):
        return loss(lambda a: functional_call(layer, p, (a,)), each)

    for function, arguments in [
        (vmap(lambda a: layer(a)), (x,)),
        (grad(of), (parameters, x[0])),
        (vmap(grad(of), (None, 0)), (parameters, x)),
    ]:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        same(compiled(*arguments), function(*arguments))
