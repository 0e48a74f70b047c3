"""Elman, ElmanCell and ElmanNetwork are all that nn.RNN and nn.RNNCell are, as modules.

How right the numbers are is test_agreement.py's matter; here a plain nn.RNN with the same weights says
what every feature of a module has to give.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing import assert_close

import elman
from elman import Elman, ElmanCell, ElmanNetwork

F64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PEER = {Elman: nn.RNN, ElmanCell: nn.RNNCell}
OPTIONS = [
    {},
    {"nonlinearity": "relu"},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "nonlinearity": "relu"},
]
CELL_OPTIONS = [{}, {"nonlinearity": "relu"}, {"bias": False}]


def name(options: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "plain"


each_option = pytest.mark.parametrize("options", OPTIONS, ids=name)
each_cell = pytest.mark.parametrize("options", CELL_OPTIONS, ids=name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pair(cls=Elman, dtype=F64, size=(3, 4), **options):
    """Ours and theirs, made after the same seed and so of the same weights."""
    made = []
    for module in (cls, PEER[cls]):
        torch.manual_seed(0)
        made.append(module(*size, dtype=dtype, **options))
    return made


def tensors(result) -> list[Tensor]:
    """All tensors of a result, PackedSequences opened."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for r in result for t in tensors(r)]


def gradients(module: nn.Module, *inputs) -> dict[str, Tensor | None]:
    """The gradient of every parameter and of every input tensor, of a loss that weighs each result."""
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = 0.0
    for n, result in enumerate(tensors(module(*leaves))):
        loss = (
            loss
            + (result * torch.linspace(-1, 1 + n, result.numel(), dtype=result.dtype).view_as(result)).sum()
        )
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters()}
    return found | {f"input {n}": leaf.grad for n, leaf in enumerate(leaves)}


def assert_same(ours, theirs, *inputs) -> None:
    """The same results and the same gradients, by name."""
    assert_close(tensors(ours(*inputs)), tensors(theirs(*inputs)))
    mine, expected = gradients(ours, *inputs), gradients(theirs, *inputs)
    assert mine.keys() == expected.keys()
    assert any(g is not None and g.abs().sum() > 0 for g in mine.values())
    assert_close(mine, expected)


def sequence(options: dict = {}, T=5, B=2, I=3, dtype=F64) -> Tensor:  # noqa: B006 (never written)
    shape = (B, T, I) if options.get("batch_first") else (T, B, I)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


def state(options: dict = {}, B=2, H=4, dtype=F64) -> Tensor:  # noqa: B006
    groups = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    return torch.randn(groups, B, H, dtype=dtype, generator=torch.Generator().manual_seed(8))


# Construction


def test_signature_is_nn_rnn_s_order():
    names = list(inspect.signature(Elman).parameters)
    order = (
        "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional device dtype"
    )
    assert names[:10] == order.split()
    assert names[10] == "backend"
    cell = list(inspect.signature(nn.RNNCell).parameters)
    assert list(inspect.signature(ElmanCell).parameters) == [*cell, "backend"]
    assert list(inspect.signature(Elman.forward).parameters)[:3] == ["self", "input", "hx"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 4), {}),
        ((3, 4, 2, "relu", False, True, 0.25, True), {}),
        ((3,), {"hidden_size": 4, "nonlinearity": "relu"}),
        ((), {"input_size": 3, "hidden_size": 4, "num_layers": 2, "dropout": 0.5, "dtype": F64}),
    ],
)
def test_attributes_parameters_and_initial_weights(args, kwargs):
    torch.manual_seed(1)
    ours = Elman(*args, **kwargs)
    torch.manual_seed(1)
    theirs = nn.RNN(*args, **kwargs)
    same = ["mode", "input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first"]
    for attribute in [*same, "dropout", "bidirectional", "proj_size", "training"]:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert isinstance(ours, nn.RNNBase)
    assert ours.backend == "auto"
    mine, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(expected)
    for key, weight in expected.items():
        assert torch.equal(mine[key], weight), key
        assert mine[key].dtype == weight.dtype


def test_device_and_dtype_come_last_by_position():
    layer = Elman(3, 4, 1, "tanh", True, False, 0.0, False, "cpu", F64)
    assert layer.weight_hh_l0.dtype == F64
    assert ElmanCell(3, 4, True, "relu", "cpu", F64).weight_hh.dtype == F64


def test_dropout_on_one_layer_warns_as_nn_rnn_does():
    for module in (Elman, nn.RNN):
        with pytest.warns(UserWarning, match="num_layers greater than 1"):
            module(3, 4, dropout=0.5)


@each_option
def test_repr_is_nn_rnn_s_with_what_it_leaves_out(options):
    ours, theirs = pair(**options)
    text = repr(ours)
    own = ", nonlinearity='relu'" if "nonlinearity" in options else ""
    assert text == repr(theirs).replace("RNN(", "Elman(")[:-1] + own + ")"
    assert "backend" not in text
    assert "backend='eager'" in repr(Elman(3, 4, backend="eager"))


@each_cell
def test_cell_repr(options):
    ours, theirs = pair(ElmanCell, **options)
    assert repr(ours) == repr(theirs).replace("RNNCell(", "ElmanCell(")
    assert "backend='eager'" in repr(ElmanCell(3, 4, backend="eager"))


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
def test_reset_parameters_draws_nn_rnn_s_weights(cls):
    ours, theirs = pair(cls)
    before = copy.deepcopy(ours.state_dict())
    for module in (ours, theirs):
        torch.manual_seed(5)
        module.reset_parameters()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight)
        assert not torch.equal(before[key], weight)


@each_option
def test_all_weights_and_flatten_parameters(options):
    ours, theirs = pair(**options)
    ours.flatten_parameters()
    assert [[w.shape for w in g] for g in ours.all_weights] == [
        [w.shape for w in g] for g in theirs.all_weights
    ]
    flat = [w for group in ours.all_weights for w in group]
    assert [id(w) for w in flat] == [id(w) for w in ours.parameters()]
    x = sequence(options)
    assert_close(elman.elman(x, None, flat, **options), tuple(ours(x)))


# Saving, copying, moving


@each_option
def test_state_dict_moves_both_ways(options):
    ours, _ = pair(**options)
    theirs = nn.RNN(3, 4, dtype=F64, **options)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, sequence(options))
    fresh = Elman(3, 4, dtype=F64, **options)
    assert fresh.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    assert_same(fresh, theirs, sequence(options))
    assigned = Elman(3, 4, dtype=F64, **options)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(assigned, theirs, sequence(options))


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        Elman(3, 4, num_layers=2).load_state_dict(nn.RNN(3, 4).state_dict())


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file], ids=lambda f: f.__name__)
@each_option
def test_copies_are_whole_and_independent(copied, options):
    ours, theirs = pair(**options)
    ours.eval()
    ours.backend = "eager"
    twin = copied(ours)
    assert type(twin) is Elman
    assert repr(twin) == repr(ours)
    assert not twin.training
    assert_same(twin, theirs, sequence(options))
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert_same(ours, theirs, sequence(options))
    theirs.load_state_dict(twin.state_dict())
    assert_same(twin, theirs, sequence(options))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [lambda: ElmanCell(3, 4), lambda: ElmanNetwork(3, 4, 2, readout=None)])
def test_cell_and_network_are_copied(copied, make):
    module = make()
    twin = copied(module)
    assert repr(twin) == repr(module)
    x = torch.randn(2, 3)
    assert_close(tensors(twin(x)), tensors(module(x)), rtol=0, atol=0)


def test_state_dict_through_a_file_of_weights_only():
    ours, theirs = pair(num_layers=2)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.reset_parameters()
    ours.load_state_dict(torch.load(file, weights_only=True))
    assert_same(ours, theirs, sequence())


@each_dtype
def test_dtypes_and_their_moves(dtype):
    x, hx = sequence(dtype=dtype), state(dtype=dtype)
    theirs = nn.RNN(3, 4, dtype=dtype)
    built = Elman(3, 4, dtype=dtype)
    moved = Elman(3, 4).to(dtype)
    short = {"float64": "double", "float16": "half", "bfloat16": "bfloat16", "float32": "float"}
    called = getattr(Elman(3, 4, dtype=F64), short[str(dtype).removeprefix("torch.")])()
    for layer in (built, moved, called):
        layer.load_state_dict(theirs.state_dict())
        results = layer(x, hx)
        assert [t.dtype for t in results] == [t.dtype for t in theirs(x, hx)] == [dtype, dtype]
        assert {g.dtype for g in gradients(layer, x, hx).values()} == {dtype}
        # A move must reach the weights that run, not only the parameters that are listed.
        assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert torch.equal(built(x, hx)[0], moved(x, hx)[0])
    assert torch.equal(built(x, hx)[0], called(x, hx)[0])


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
def test_built_on_meta_and_brought_to_life(cls):
    ours, theirs = cls(3, 4, device="meta"), PEER[cls](3, 4, device="meta")
    x = torch.empty(5, 3, device="meta")
    for mine, expected in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
        assert mine.shape == expected.shape
        assert mine.is_meta
    real = ours.to_empty(device="cpu")
    real.load_state_dict(PEER[cls](3, 4).state_dict())
    assert all(t.isfinite().all() for t in tensors(real(torch.randn(5, 3))))


# Weights that are not plain parameters


def effective(layer: nn.RNNBase, **options) -> nn.RNN:
    """A plain nn.RNN with the weights that `layer` computes with."""
    theirs = nn.RNN(3, 4, dtype=F64, **options)
    with torch.no_grad():
        for key, weight in theirs.named_parameters():
            weight.copy_(getattr(layer, key))
    return theirs


def test_old_weight_norm_trains_as_with_nn_rnn():
    # Deprecated by torch and in use all the same.
    ours, theirs = pair(num_layers=2)
    for module in (ours, theirs):
        for key in ("weight_hh_l0", "weight_ih_l1"):
            nn.utils.weight_norm(module, key)
    for _ in range(2):
        assert_same(ours, theirs, sequence())
        for module in (ours, theirs):
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad
    assert "weight_hh_l0_g" in dict(ours.named_parameters())
    nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    assert_close(ours(sequence())[0], theirs(sequence())[0])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "register": lambda layer, key: parametrize.register_parametrization(layer, key, Doubled()),
}


@pytest.mark.parametrize("method", PARAMETRIZATIONS)
def test_parametrized_weights_are_computed_with_and_trained(method):
    torch.manual_seed(0)
    layer = Elman(3, 4, num_layers=2, dtype=F64)
    before = layer(sequence())[0]
    for key in ("weight_hh_l0", "weight_hh_l1"):
        PARAMETRIZATIONS[method](layer, key)
    layer.eval()  # spectral_norm moves at every look while it trains
    x = sequence()
    assert_close(layer(x), effective(layer, num_layers=2)(x))
    if method != "weight_norm":
        assert not torch.allclose(layer(x)[0], before)
    found = gradients(layer, x)
    assert len(found) == len([*layer.parameters()]) + 1
    assert all(g is not None and g.isfinite().all() for g in found.values())
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.1 * p.grad
    assert_close(layer(x), effective(layer, num_layers=2)(x))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        next(iter(twin.parametrizations.weight_hh_l0.parameters())).mul_(-3)
        twin.bias_ih_l0.add_(1)
    assert_close(twin(x), effective(twin, num_layers=2)(x))
    assert not torch.allclose(twin(x)[0], layer(x)[0])
    assert_close(layer(x), effective(layer, num_layers=2)(x))


def test_parametrization_removed_leaves_the_value():
    layer = Elman(3, 4, dtype=F64)
    parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    inside = layer(sequence())[0]
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert_close(layer(sequence())[0], inside)
    assert gradients(layer, sequence())["weight_hh_l0"] is not None


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
def test_functional_call_with_other_weights(cls):
    ours, _ = pair(cls)
    theirs = PEER[cls](3, 4, dtype=F64)
    swapped = {k: p.detach().clone().requires_grad_() for k, p in theirs.named_parameters()}
    x = torch.randn(5, 3, dtype=F64)
    result = tensors(functional_call(ours, swapped, (x,)))[0]
    assert_close(result, tensors(theirs(x))[0])
    result.square().sum().backward()
    tensors(theirs(x))[0].square().sum().backward()
    assert_close({k: p.grad for k, p in swapped.items()}, {k: p.grad for k, p in theirs.named_parameters()})
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
def test_torch_func_grad_of_weights(cls):
    ours, theirs = pair(cls)
    x = torch.randn(5, 3, dtype=F64)

    def by_functional(module):
        def loss(weights):
            return tensors(functional_call(module, weights, (x,)))[0].square().sum()

        return torch.func.grad(loss)({k: p.detach() for k, p in module.named_parameters()})

    assert_close(by_functional(ours), by_functional(theirs))


def test_weights_shared_between_layers_sum_their_gradients():
    stacks = []
    for first, second in zip(pair(), pair(size=(4, 4)), strict=True):
        second.weight_hh_l0 = first.weight_hh_l0
        stacks.append(nn.ModuleList([first, second]))
    x = sequence()
    found = []
    for first, second in stacks:
        second(first(x)[0])[0].square().sum().backward()
        assert first.weight_hh_l0 is second.weight_hh_l0
        found.append(first.weight_hh_l0.grad)
    assert_close(*found)


def test_a_parameter_that_was_replaced_is_the_one_that_runs():
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.weight_hh_l0 = nn.Parameter(torch.eye(4, dtype=F64))
        layer.bias_ih_l0.data = torch.ones(4, dtype=F64)
    assert_same(ours, theirs, sequence())


@pytest.mark.parametrize("frozen", [["weight_hh_l0"], ["weight_ih_l0", "bias_ih_l1"], "all"], ids=str)
def test_frozen_parameters_get_no_gradient(frozen):
    ours, theirs = pair(num_layers=2)
    for layer in (ours, theirs):
        for key, p in layer.named_parameters():
            p.requires_grad_(frozen != "all" and key not in frozen)
    assert_same(ours, theirs, sequence())
    for key, grad in gradients(ours, sequence()).items():
        assert (grad is None) == (key != "input 0" and (frozen == "all" or key in frozen)), key


# Dropout


def revealing(module: type, **options) -> nn.RNN:
    """A stack whose result is its dropout's masks: layer 1 gives a constant, the others hand it on."""
    layer = module(3, 4, num_layers=3, dropout=0.5, nonlinearity="relu", dtype=F64, **options)
    D = 2 if layer.bidirectional else 1
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for key, p in layer.named_parameters():
            if key.startswith("bias_ih_l0"):
                p.fill_(1)
            elif key.startswith("weight_ih") and "_l0" not in key:
                first = 4 * (key.endswith("_reverse") and D == 2)
                p[:, first : first + 4] = torch.eye(4)
    return layer


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=name)
def test_dropout_has_nn_rnn_s_mask_bit_for_bit(options):
    ours, theirs = revealing(Elman, **options), revealing(nn.RNN, **options)
    x = sequence(options, T=7, B=5)
    results, states = [], []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(layer(x))
        states.append(torch.get_rng_state())
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(*states), "the generator was advanced by another amount"
    kept = (results[0][0] != 0).double().mean()
    assert 0.1 < kept < 0.4, "two masks of 0.5"
    ours.eval()
    assert (ours(x)[0] == 1).all()


def test_dropout_gradients_follow_the_mask():
    ours, theirs = pair(num_layers=2, dropout=0.4)
    found = []
    for layer in (ours, theirs):
        leaf = sequence(T=6).requires_grad_()
        torch.manual_seed(3)
        layer(leaf, state({"num_layers": 2}))[0].square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    assert_close(*found)
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, sequence())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    ours, theirs = pair(num_layers=2, dropout=p)
    assert_close(ours(sequence()), theirs(sequence()))


# Inputs


@each_option
def test_training_with_an_initial_state(options):
    ours, theirs = pair(**options)
    assert_same(ours, theirs, sequence(options), state(options))
    x, hx = sequence(options), state(options)
    assert_close(ours(input=x, hx=hx), ours(x, hx), rtol=0, atol=0)


@each_option
def test_unbatched(options):
    ours, theirs = pair(**options)
    x, hx = sequence(B=1).squeeze(1), state(options)[:, 0]
    assert [t.shape for t in ours(x)] == [t.shape for t in theirs(x)]
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x, hx)


@each_option
def test_one_step(options):
    ours, theirs = pair(**options)
    assert_same(ours, theirs, sequence(options, T=1), state(options))


@each_option
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"])
def test_batch_of_no_rows(options, given):
    ours, theirs = pair(**options)
    inputs = [sequence(options, B=0)] + [state(options, B=0)] * given
    for layer in (ours, theirs):
        layer.zero_grad()
        leaves = [t.clone().requires_grad_() for t in inputs]
        output, h_n = layer(*leaves)
        (output.sum() + h_n.sum()).backward()
        assert h_n.shape == state(options, B=0).shape
        assert output.numel() == 0
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert ours(*inputs)[0].shape == theirs(*inputs)[0].shape
    for p in ours.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("order", ["sorted", "unsorted", "padded unsorted"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"])
@each_option
def test_packed_sequence(order, given, options):
    ours, theirs = pair(**options)
    lengths = [5, 3, 3, 1] if order == "sorted" else [3, 1, 5, 3]
    rows = [torch.randn(n, 3, dtype=F64) for n in lengths]
    if order == "padded unsorted":
        padded = nn.utils.rnn.pad_sequence(rows)
        packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
    else:
        packed = pack_sequence(rows, enforce_sorted=order == "sorted")
    hx = [state(options, B=4)] * given
    mine, expected = ours(packed, *hx)[0], theirs(packed, *hx)[0]
    assert type(mine) is PackedSequence
    assert torch.equal(mine.batch_sizes, expected.batch_sizes)
    for indices in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(mine, indices), getattr(expected, indices)
        assert (a is None) == (b is None) == (order == "sorted")
        assert a is None or torch.equal(a, b)

    class Packed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, data, *hx):
            return self.layer(packed._replace(data=data), *hx)

    assert_same(Packed(ours), Packed(theirs), packed.data, *hx)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequence_has_second_and_forward_derivatives(bidirectional):
    layer = Elman(3, 4, bidirectional=bidirectional, dtype=F64)
    packed = pack_sequence([torch.randn(n, 3, dtype=F64) for n in (3, 1, 5, 3)], enforce_sorted=False)

    def run(data, hx):
        output, h_n = layer(packed._replace(data=data), hx)
        return output.data, h_n

    hx = torch.randn(1 + bidirectional, 4, 4, dtype=F64, requires_grad=True)
    inputs = packed.data.clone().requires_grad_(), hx
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_lengths_of_no_rows():
    layer = Elman(3, 4, dtype=F64)
    none = torch.zeros(0, dtype=torch.int64)
    output, h_n = elman.elman(sequence(B=0), None, list(layer.parameters()), lengths=none)
    assert (output.shape, h_n.shape) == ((len(sequence()), 0, 4), (1, 0, 4))


def test_packed_sequence_through_two_layers_of_modules():
    first, second = Elman(3, 4, bidirectional=True, dtype=F64), Elman(8, 2, dtype=F64)
    packed = pack_sequence([torch.randn(n, 3, dtype=F64) for n in (2, 4)], enforce_sorted=False)
    got, h_n = second(first(packed)[0])
    alone = [second(first(row)[0])[1] for row in nn.utils.rnn.unpack_sequence(packed)]
    assert_close(h_n, torch.stack(alone, 1))
    assert torch.equal(got.batch_sizes, packed.batch_sizes)


# Modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [Elman, ElmanCell])
@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, cls, given):
    ours, theirs = pair(cls, dtype=torch.float32)
    x = torch.randn(5, 3)
    hx = None if given is None else torch.randn(1 if cls is Elman else 5, 4, dtype=given)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        mine, expected = tensors(ours(leaf, hx)), tensors(theirs(x, hx))
        assert [t.dtype for t in mine] == [t.dtype for t in expected] == [dtype] * len(mine)
        assert_close(mine[0], expected[0], atol=0.02, rtol=0.02)
        loss = mine[0].float().square().sum()
        their_loss = expected[0].float().square().sum()
    loss.backward()
    their_loss.backward()
    assert leaf.grad.dtype == torch.float32
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert_close(p.grad, q.grad, atol=0.02 * q.grad.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
def test_autocast_leaves_float64_as_nn_rnn_does(cls):
    ours, theirs = pair(cls)
    x = torch.randn(5, 3, dtype=F64)
    with torch.autocast("cpu", torch.bfloat16):
        mine, expected = tensors(ours(x)), tensors(theirs(x))
    assert [t.dtype for t in mine] == [F64] * len(mine)
    assert_close(mine, expected)


def test_autocast_with_a_packed_sequence():
    ours, theirs = pair(dtype=torch.float32)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4)], enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        mine, expected = tensors(ours(packed)), tensors(theirs(packed))
    assert [t.dtype for t in mine] == [t.dtype for t in expected]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_without_gradients_nothing_is_saved(mode):
    ours, theirs = pair(num_layers=2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with mode():
            output, h_n = ours(sequence())
        assert saved == []
        ours(sequence())
        assert saved != [], "the hook sees what training saves"
    assert_close(output, theirs(sequence())[0])
    assert not output.requires_grad
    assert not h_n.requires_grad
    assert output.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=name)
def test_training_keeps_the_input_the_weights_and_the_output(options):
    ours, _ = pair(**options)
    x = sequence(T=50, B=8)
    kept: dict[int, int] = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours(x)
    L, D = ours.num_layers, 2 if ours.bidirectional else 1
    needed = x.nbytes + L * 50 * 8 * D * 4 * 8 + sum(p.nbytes for p in ours.parameters())
    assert sum(kept.values()) <= needed + L * D * 8 * 4 * 8, "and the initial state"


def test_results_may_be_written_over():
    ours, theirs = pair()
    x = sequence()
    with torch.no_grad():
        output, h_n = ours(x)
        expected = h_n.clone()
        output.zero_()
        assert torch.equal(h_n, expected), "h_n is no view of output"
    for layer in (ours, theirs):
        layer.zero_grad()
        output, h_n = layer(x)
        h_n.mul_(3)
        (output.sum() + h_n.sum()).backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    # The backward pass reads the output, as nn.RNN's does on CUDA: it must refuse, not go wrong.
    output = ours(x)[0]
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_a_parameter_may_be_added_to_a_result_that_records_nothing(T, frozen):
    """As to nn.RNN's: a view, made where nothing was recorded, would refuse."""
    ours, _ = pair()
    ours.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        output, h_n = ours(torch.randn(T, 2, 3, dtype=F64))
    bias = nn.Parameter(torch.ones(output.shape[-1], dtype=F64))
    for result in (output, h_n):
        assert result._base is None
        result.add_(bias)
    output.sum().backward()
    assert bias.grad.eq(T * 2).all()


@each_option
def test_a_bias_may_be_written_over_before_the_backward_pass(options):
    """The backward pass reads none, nn.RNN's neither; of the weights both say so."""
    ours, theirs = pair(**options)
    x, found = sequence(options), []
    for layer in (ours, theirs):
        output, _ = layer(x)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if "bias" in name:
                    p.add_(1)
        output.square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert_close(*found)


def test_a_result_that_was_dropped_frees_the_graph():
    ours, _ = pair()
    output, _ = ours(sequence())
    node = weakref.ref(output)
    del output, _
    assert node() is None


@each_option
def test_backward_in_eval_mode(options):
    ours, theirs = pair(**options)
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, sequence(options), state(options))


def test_hooks_are_called():
    ours, _ = pair()
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, result: seen.append(result[0].shape))
    ours.register_full_backward_hook(lambda m, g_in, g_out: seen.append([g.shape for g in g_out]))
    ours.weight_hh_l0.register_hook(lambda g: 0 * g)
    ours.weight_ih_l0.register_post_accumulate_grad_hook(lambda p: seen.append("ih"))
    x = sequence().requires_grad_()
    output, h_n = ours(x)
    (output.sum() + h_n.sum()).backward()
    assert seen[:2] == ["pre", (5, 2, 4)]
    assert {"ih"} < {s for s in seen if isinstance(s, str)}
    assert [(5, 2, 4), (1, 2, 4)] in seen
    assert (ours.weight_hh_l0.grad == 0).all()


def test_checkpointing():
    ours, theirs = pair()
    x = sequence().requires_grad_()
    torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)[0].square().sum().backward()
    theirs(sequence())[0].square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


class Last(nn.Module):
    def forward(self, result):
        return result[0][-1]


def test_inside_other_modules():
    model = nn.Sequential(Elman(3, 4), Last(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, losses = sequence(dtype=torch.float32), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert len([*model.modules()]) == 4
    assert all(k.startswith(("0.", "2.")) for k in model.state_dict())


def test_two_threads_at_once():
    layers = [Elman(16, 32, num_layers=2, dtype=F64), Elman(16, 24, bidirectional=True, dtype=F64)]
    x = torch.randn(40, 4, 16, dtype=F64)
    expected = [gradients(layer, x) for layer in layers]
    expected = [{k: g.clone() for k, g in found.items()} for found in expected]
    got: dict[int, list] = {0: [], 1: []}

    def work(n):
        for _ in range(8):
            got[n].append({k: g.clone() for k, g in gradients(layers[n], x).items()})

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n in (0, 1):
        assert len(got[n]) == 8, "the thread raised"
        for found in got[n]:
            assert_close(found, expected[n], rtol=0, atol=0)


# torch.compile and torch.library


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=name)
def test_compiles_whole(options):
    ours, theirs = pair(**options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, hx = sequence(options), state(options)
    assert_close(compiled(x, hx), theirs(x, hx))
    compiled(x, hx)[0].square().sum().backward()
    theirs(x, hx)[0].square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_follows_use_backend():
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = sequence()
    expected = ours(x)[0]
    assert_close(compiled(x)[0], expected)
    with elman.use_backend("eager"):
        assert_close(compiled(x)[0], expected)
    with elman.use_backend("cudnn"), pytest.raises(Exception, match="cuDNN needs a CUDA GPU"):
        compiled(x)
    assert_close(compiled(x)[0], expected)


def pack(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.randn(n, 3, dtype=F64) for n in lengths], enforce_sorted=False)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=name)
def test_compiles_with_a_packed_sequence(options):
    ours, theirs = pair(**options)
    compiled = torch.compile(ours, backend="aot_eager")
    for lengths in ((3, 1, 5), (2, 4)):
        packed = pack(*lengths)
        (output, h_n), (expected, expected_h_n) = compiled(packed), theirs(packed)
        assert_close(tuple(output), tuple(expected))  # all four of its fields
        assert_close(h_n, expected_h_n)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_network_compiles_with_a_packed_sequence():
    network, packed = ElmanNetwork(3, 4, 2, dtype=F64), pack(3, 1, 5)
    compiled = torch.compile(network, backend="aot_eager")
    assert_close(tuple(compiled(packed)[0]), tuple(network(packed)[0]))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_dropout_still_drops():
    layer = revealing(Elman)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    kept = (compiled(sequence(T=20, B=8))[0] != 0).double().mean()
    assert 0.15 < kept < 0.35
    layer.eval()
    assert (compiled(sequence(T=20, B=8))[0] == 1).all()


@pytest.mark.usefixtures("fresh_compiler")
def test_cell_compiles_whole():
    ours, theirs = pair(ElmanCell)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, dtype=F64)
    assert_close(compiled(x), theirs(x))


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=name)
def test_exports(options):
    ours, theirs = pair(**options)
    x = sequence(options)
    exported = torch.export.export(ours, (x,))
    assert_close(exported.module()(x), theirs(x))
    assert "elman.layer" in str(exported.graph), "one operator a layer, not a traced loop"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_traces_as_one_operator():
    ours, theirs = pair(num_layers=2)
    with torch.no_grad():
        traced = torch.jit.trace(ours, sequence())
        longer = torch.randn(9, *sequence().shape[1:], dtype=F64)
        assert_close(traced(longer), theirs(longer))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_a_trace_takes_other_lengths():
    weights = [p.detach() for p in Elman(3, 4, dtype=F64).parameters()]

    def packed(data, sizes):
        return elman.elman(PackedSequence(data, sizes), None, weights)[1]

    def padded(x, lengths):
        return elman.elman(x, None, weights, lengths=lengths)

    with torch.no_grad():
        traced = torch.jit.trace(packed, (torch.randn(4, 3, dtype=F64), torch.tensor([2, 1, 1])))
        other = torch.randn(9, 3, dtype=F64), torch.tensor([4, 3, 2])
        assert_close(traced(*other), packed(*other))
        x = torch.randn(5, 3, 3, dtype=F64)
        traced = torch.jit.trace(padded, (x, torch.tensor([3, 1, 2])))
        assert_close(traced(x, torch.tensor([1, 5, 2])), padded(x, torch.tensor([1, 5, 2])))


def test_functorch_derivatives():
    ours, theirs = pair()
    x = sequence()
    jacobian = torch.func.jacrev(lambda v: ours(v)[0])(x)
    assert_close(jacobian, torch.autograd.functional.jacobian(lambda v: theirs(v)[0], x))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_forward_mode_derivatives(frozen):
    ours, theirs = pair()
    x, tangent = sequence(), sequence()
    found = []
    for module in (ours.requires_grad_(not frozen), theirs.requires_grad_(not frozen)):
        with forward_ad.dual_level():
            output, h_n = module(forward_ad.make_dual(x, tangent))
            found.append([forward_ad.unpack_dual(t).tangent for t in (output, h_n)])
    assert_close(*found)


def test_no_pass_sets_the_number_of_threads(monkeypatch):
    """It is the process's: a thread that starts meanwhile would keep the new number."""
    layer, x = Elman(8, 8), torch.randn(400, 1, 8, requires_grad=True)

    def refuse(number: int) -> None:
        raise AssertionError(f"torch.set_num_threads({number})")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    g.square().sum().backward()


def operands(D: int, bias: bool, packed: bool, resets: bool, dtype=F64, T=3, B=2, I=3, H=4) -> list:
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return [
        leaf(T + 1, I) if packed else leaf(T, B, I),
        leaf(D, B, H),
        leaf(D, H, I),
        leaf(D, H, H),
        leaf(D, H) if bias else None,
        torch.tensor([B, *[1] * (T - 1)]) if packed else None,
        torch.rand((T + 1,) if packed else (T, B)) < 0.5 if resets else None,
    ]


# opcheck reads the .grad of its own copies of the arguments; torch 2.14 and newer warn of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("D", "bias", "packed", "resets"),
    [(1, True, False, False), (2, False, True, False), (2, True, False, True), (1, True, True, True)],
)
def test_operators_pass_opcheck(D, bias, packed, resets, dtype):
    args = operands(D, bias, packed, resets, dtype)
    tail = ("tanh", "eager", "ieee")
    # Dynamic shapes specialize on the loop's length; fake, schema and autograd registration are what counts.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.elman.layer.default, (*args, *tail), test_utils=checks)
    output = torch.ops.elman.layer(*args, *tail)[0].detach()
    # A graph of a packed batch's second derivative would need its sizes' numbers.
    for g_out, g_hn in ((output, None), (None, args[1].detach()), (output, args[1].detach())):
        torch.library.opcheck(
            torch.ops.elman.layer_dz.default,
            (g_out, g_hn, output.requires_grad_(not packed), args[3].detach(), *args[5:], *tail),
            test_utils=checks,
        )
    x, h0, w_ih, w_hh = (t.detach() for t in args[:4])
    for needs in ([True] * 5, [False, True, False, True, False], [True, False, True, False, True]):
        torch.library.opcheck(
            torch.ops.elman.layer_products.default,
            (torch.randn_like(output), x, h0, w_ih, w_hh, output.detach(), *args[5:], needs),
            test_utils=checks,
        )


# ElmanCell


@each_cell
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"])
def test_cell_is_nn_rnn_cell(options, shape, given):
    ours, theirs = pair(ElmanCell, **options)
    x = torch.randn(shape, dtype=F64)
    hx = [torch.randn(*shape[:-1], 4, dtype=F64)] * given
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours(x, *hx).shape == theirs(x, *hx).shape
    assert_close(ours(x, *hx), theirs(x, *hx))
    if x.numel():
        assert_same(ours, theirs, x, *hx)
    else:
        assert_close(gradients(ours, x, *hx), gradients(theirs, x, *hx))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("size", [(10, 0), (0, 4)], ids=str)
def test_cell_of_size_zero(size):
    ours, theirs = pair(ElmanCell, size=size)
    x = torch.randn(2, size[0], dtype=F64)
    assert ours(x).shape == theirs(x).shape == (2, size[1])
    assert_close(ours(x), theirs(x))


def test_cell_state_dict_moves_both_ways():
    ours, theirs = ElmanCell(3, 4, dtype=F64), nn.RNNCell(3, 4, dtype=F64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours, theirs, torch.randn(2, 3, dtype=F64))
    ours.reset_parameters()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, torch.randn(2, 3, dtype=F64))


def test_cell_attributes():
    ours, theirs = pair(ElmanCell, nonlinearity="relu", bias=False)
    for attribute in ("input_size", "hidden_size", "bias", "nonlinearity", "bias_ih", "bias_hh"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert isinstance(ours, nn.RNNCellBase)


def test_cell_in_a_loop_is_the_layer():
    torch.manual_seed(0)
    cell, layer = ElmanCell(3, 4, dtype=F64), Elman(3, 4, dtype=F64)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, h = sequence(), None
    for x_t, expected in zip(x, layer(x)[0], strict=True):
        h = cell(x_t, h)
        assert_close(h, expected)


@each_dtype
def test_cell_dtypes(dtype):
    cell = ElmanCell(3, 4).to(dtype)
    assert cell(torch.randn(2, 3, dtype=dtype)).dtype == dtype


# ElmanNetwork


@pytest.mark.parametrize("readout", ["tanh", "identity", "none", None])
def test_network_is_a_layer_and_a_readout(readout):
    torch.manual_seed(0)
    network = ElmanNetwork(3, 4, 2, readout=readout, dtype=F64)
    x = sequence()
    h, h_n = network.rnn(x)
    y = h @ network.output.weight.t() + network.output.bias
    assert_close(network(x), ((y.tanh() if readout == "tanh" else y), h_n))
    assert repr(readout or "none") in repr(network)
    assert all(g.abs().sum() > 0 for g in gradients(network, x).values())


def test_network_default_readout_is_tanh():
    assert ElmanNetwork(3, 4, 2).readout == "tanh"


def test_one_step_of_the_network_of_document_0():
    network = ElmanNetwork(100, 128, 10)
    x, h = torch.randn(100), torch.randn(128)
    y, new = network(x, h)
    assert (y.shape, new.shape) == ((10,), (128,))
    assert_close(new, network.rnn(x[None], h[None])[1][0])
    assert_close(y, torch.tanh(network.output(new)))
    y, new = network(x)
    assert (y.shape, new.shape) == ((10,), (128,))
    kept = network(x, h[None])
    assert kept[1].shape == (1, 128), "as hx"


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bias": False, "nonlinearity": "relu"}], ids=name
)
@pytest.mark.parametrize("start", [True, False], ids=["hx", "no hx"])
def test_state_carried_between_calls_is_one_sequence(options, start):
    torch.manual_seed(0)
    network = ElmanNetwork(3, 4, 2, dtype=F64, **options)
    x = sequence(T=6, B=1).squeeze(1)
    h = state(options, B=1).squeeze(1) if start else None
    whole, last = network(x, h)
    if start and "num_layers" not in options:
        h = h[0]
    ys = []
    for x_t in x:
        y, h = network(x_t, h)
        ys.append(y)
    assert_close(torch.stack(ys), whole)
    assert_close(h.reshape_as(last), last)
    (first, middle), (second, end) = network(x[:2]), (None, None)
    second, end = network(x[2:], middle)
    assert_close(torch.cat([first, second]), network(x)[0])
    assert_close(end, network(x)[1])


def test_network_on_batches_unbatched_and_packed():
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True}
    network = ElmanNetwork(3, 4, 2, dtype=F64, readout="identity", **options)
    assert network.output.weight.shape == (2, 8)
    rows = [torch.randn(n, 3, dtype=F64) for n in (2, 4)]
    hx = state(options)
    y, h_n = network(pack_sequence(rows, enforce_sorted=False), hx)
    assert type(y) is PackedSequence
    for n, (row, got) in enumerate(zip(rows, nn.utils.rnn.unpack_sequence(y), strict=True)):
        alone, last = network(row, hx[:, n])
        assert_close(got, alone)
        assert_close(h_n[:, n], last)
    first = ElmanNetwork(3, 4, 2, batch_first=True, dtype=F64, **options)
    x = sequence({"batch_first": True})
    assert [t.shape for t in first(x)] == [(2, 5, 2), (4, 2, 4)]
    assert [t.shape for t in first(x[0, 0])] == [(2,), (4, 4)]


def test_network_passes_its_options_on():
    network = ElmanNetwork(
        3, 4, 2, num_layers=2, nonlinearity="relu", dropout=0.5, backend="eager", dtype=F64
    )
    assert network.rnn.nonlinearity == "relu"
    assert network.rnn.dropout == 0.5
    assert network.rnn.backend == "eager"
    assert {p.dtype for p in network.parameters()} == {F64}
    assert ElmanNetwork(3, 4, 2, device="meta").output.weight.is_meta
    twin = copy.deepcopy(network).eval()
    assert_close(twin(sequence()), network.eval()(sequence()))
