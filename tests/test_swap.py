"""elman.replace: a model computes, trains and is saved as before, on our layers."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import elman
from tests.helpers import check, error
from tests.tolerances import tolerance

OPTIONS = [
    {},
    {"nonlinearity": "relu", "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


class Model(nn.Module):
    """A layer, a cell that runs over its output, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.RNN(3, 4, **options)
        D = 2 if self.rnn.bidirectional else 1
        nonlinearity, bias = self.rnn.nonlinearity, self.rnn.bias
        self.cell = nn.RNNCell(D * 4, 5, nonlinearity=nonlinearity, bias=bias)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = None
        for step in self.rnn(x)[0].unbind(0):
            h = self.cell(step, h)
        return self.head(h)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (6, 2, 3)), dtype=dtype)


def results(model, x):
    """The output and every gradient, of the parameters and of the input."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads}


def check_same(swapped, original, x):
    check(results(swapped, x), results(original, x), tolerance(x.dtype))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_model_computes_what_it_did(options):
    original = Model(**options)
    swapped = copy.deepcopy(original)
    layers = {"rnn": swapped.rnn, "cell": swapped.cell}
    assert elman.replace(swapped) == layers
    assert [type(layer) for layer in layers.values()] == [elman.Elman, elman.ElmanCell]
    assert layers == {"rnn": swapped.rnn, "cell": swapped.cell}
    check_same(swapped, original, inputs())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kinds", [(nn.RNN, elman.Elman), (nn.RNNCell, elman.ElmanCell)])
def test_the_model_itself(kinds, options):
    """It has all that a layer of its new class has, and prints as one."""
    old, new = kinds
    options = (
        options if old is nn.RNN else {k: v for k, v in options.items() if k in ("nonlinearity", "bias")}
    )
    model, made = old(3, 4, **options), new(3, 4, **options, backend="eager")
    assert elman.replace(model, "eager") == {"": model}
    assert type(model) is new
    assert repr(model) == repr(made)
    assert vars(model).keys() == vars(made).keys()
    plain = {k: v for k, v in vars(made).items() if isinstance(v, int | float | str | bool)}
    assert {k: vars(model)[k] for k in plain} == plain


def test_what_isinstance_says():
    model = Model()
    elman.replace(model)
    assert isinstance(model.rnn, nn.RNNBase)
    assert not isinstance(model.rnn, nn.RNN)
    assert isinstance(model.cell, nn.modules.rnn.RNNCellBase)
    assert not isinstance(model.cell, nn.RNNCell)


def test_packed_sequences_and_states():
    original = nn.RNN(3, 4, 2)
    swapped = copy.deepcopy(original)
    elman.replace(swapped)
    packed, hx = pack_sequence([inputs(4, 3), inputs(6, 3)], enforce_sorted=False), inputs(2, 2, 4)
    (ours, h), (theirs, g) = swapped(packed, hx), original(packed, hx)
    assert error(ours.data, theirs.data) <= tolerance(torch.float32)
    assert error(h, g) <= tolerance(torch.float32)


def test_a_layer_in_several_places_is_replaced_once():
    rnn = nn.RNN(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleList([rnn, nn.Linear(2, 2)]), "b": rnn})
    assert elman.replace(model) == {"a.0": rnn}
    assert model["a"][0] is model["b"] is rnn
    assert type(rnn) is elman.Elman


def test_other_layers_are_left_as_they_are():
    ours = elman.Elman(3, 4, backend="eager")
    model = nn.Sequential(nn.LSTM(3, 4), nn.GRU(3, 4), nn.LSTMCell(3, 4), nn.GRUCell(3, 4), ours)
    before = [type(m) for m in model]
    assert elman.replace(model) == {}
    assert [type(m) for m in model] == before
    assert ours.backend == "eager"


def test_replacing_again_finds_nothing():
    model = Model()
    assert elman.replace(model, "eager")
    assert elman.replace(model) == {}
    assert model.rnn.backend == model.cell.backend == "eager"


@pytest.mark.parametrize(
    ("model", "backend", "kind", "message"),
    [
        (
            nn.RNN,
            "auto",
            TypeError,
            "model is a class, RNN; expected an nn.Module: pass the model, not its class",
        ),
        ([nn.RNN(3, 4)], "auto", TypeError, "model is a list; expected an nn.Module"),
        (None, "auto", TypeError, "model is a NoneType; expected an nn.Module"),
        (nn.RNN(3, 4), "cuda", ValueError, "backend is 'cuda'; expected one of auto, triton"),
        (nn.RNN(3, 4), None, ValueError, "backend is None; expected one of auto, triton"),
    ],
    ids=["class", "list", "None", "unknown backend", "no backend"],
)
def test_wrong_arguments_change_nothing(model, backend, kind, message):
    with pytest.raises(kind, match=message):
        elman.replace(model, backend)
    assert not isinstance(model, nn.Module) or type(model) is nn.RNN


class Doubled(nn.RNN):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnCell(nn.RNNCell):
    pass


def test_subclasses_are_named_and_left_alone():
    model = nn.ModuleDict({"mine": Doubled(3, 4), "cell": OwnCell(3, 4), "rnn": nn.RNN(3, 4)})
    parametrizations.orthogonal(model["mine"], "weight_hh_l0")
    before = [type(model["mine"]), OwnCell]
    with pytest.warns(UserWarning, match=r"left 'mine' \(ParametrizedDoubled\), 'cell' \(OwnCell\) alone: "):
        assert elman.replace(model) == {"rnn": model["rnn"]}
    assert [type(model[name]) for name in ("mine", "cell")] == before


def test_a_model_that_is_a_subclass():
    model = Doubled(3, 4)
    with pytest.warns(UserWarning, match=r"left the model \(Doubled\) alone") as caught:
        assert elman.replace(model) == {}
    assert caught[0].filename == __file__


def test_a_forward_set_on_the_object_is_left_alone():
    """As wrappers of modules do: it would go on calling nn.RNN's."""
    model = nn.Sequential(nn.RNN(3, 4))
    model[0].forward = mock.Mock(wraps=model[0].forward)
    with pytest.warns(UserWarning, match=r"left '0' \(RNN\) alone"):
        assert elman.replace(model) == {}
    assert type(model[0]) is nn.RNN


@pytest.mark.parametrize("kind", [nn.RNN, nn.RNNCell])
def test_state_dict_and_parameters_are_the_same_objects(kind):
    model = kind(3, 4)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    elman.replace(model)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(model.state_dict()) == keys
    kind(3, 4).load_state_dict(model.state_dict())
    model.load_state_dict(kind(3, 4).state_dict())


def train(model, optimizer, steps):
    for seed in range(steps):
        x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_an_optimizer_goes_on():
    """Its state too: momentum gathered by nn.RNN moves our weights."""
    original = Model(num_layers=2)
    swapped = copy.deepcopy(original)
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in (original, swapped)]
    for pair in pairs:
        train(*pair, steps=3)
    elman.replace(swapped)
    for pair in pairs:
        train(*pair, steps=3)
    check(swapped.state_dict(), original.state_dict(), tolerance(torch.float32))


def test_shared_and_frozen_parameters():
    original = nn.Sequential(nn.RNN(4, 4), nn.RNN(4, 4))
    original[1].weight_hh_l0 = original[0].weight_hh_l0
    original[0].bias_ih_l0.requires_grad_(False)

    def forward(model, x):
        return model[1](model[0](x)[0])[0]

    swapped = copy.deepcopy(original)
    elman.replace(swapped)
    assert swapped[0].weight_hh_l0 is swapped[1].weight_hh_l0
    x, grads = inputs(6, 2, 4), []
    for model in (swapped, original):
        forward(model, x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    check(*grads, tolerance(torch.float32))
    assert "0.bias_ih_l0" not in grads[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = nn.RNN(3, 16, num_layers=2, dropout=0.5).train(training)
    original = copy.deepcopy(model)
    elman.replace(model)
    assert model.training is training
    x = inputs(20, 4, 3)
    out, other = model(x)[0], model(x)[0]
    assert bool((out != other).any()) is training
    if not training:
        assert error(out, original(x)[0]) <= tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    original = nn.RNN(3, 4).to(dtype)
    swapped = copy.deepcopy(original)
    elman.replace(swapped)
    check_same(swapped, original, inputs(dtype=dtype))
    check_same(swapped.to(torch.float32), original.to(torch.float32), inputs())


def test_meta():
    with torch.device("meta"):
        model = Model()
    elman.replace(model)
    assert model(torch.empty(6, 2, 3, device="meta")).shape == (2, 2)
    model.to_empty(device="cpu")
    original = Model()
    model.load_state_dict(original.state_dict())
    check_same(model, original, inputs())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight):
        return self.scale * weight


def parametrized():
    """Two parametrizations on one weight, one on another, of the layer and of the cell; always the same.

    Of a parametrized nn.RNN that has run, or was moved, torch can't make a copy.
    """
    torch.manual_seed(1)
    model = Model()
    for name, layer in (("weight_hh_l0", model.rnn), ("weight_hh", model.cell)):
        parametrizations.weight_norm(layer, name)
        parametrize.register_parametrization(layer, name, Scaled())
        parametrizations.orthogonal(layer, name.replace("hh", "ih"))
    return model


def test_parametrized_layers():
    """The class that parametrize made for a layer is no subclass of the user's."""
    original, swapped = parametrized(), parametrized()
    layers, keys = {"rnn": swapped.rnn, "cell": swapped.cell}, list(swapped.state_dict())
    assert elman.replace(swapped) == layers
    assert isinstance(layers["rnn"], elman.Elman)
    assert isinstance(layers["cell"], elman.ElmanCell)
    assert list(swapped.state_dict()) == keys
    check_same(swapped, original, inputs())


def test_copies_of_a_parametrized_layer():
    """A copy made before, which has the class that parametrize made too, stays what it was."""
    swapped = parametrized()
    before = copy.deepcopy(swapped)
    elman.replace(swapped)
    assert isinstance(before.rnn, nn.RNN)
    assert isinstance(before.cell, nn.RNNCell)
    for other in (before, copy.deepcopy(swapped)):
        check_same(other, swapped, inputs())


def test_parametrizations_removed_afterwards():
    original, swapped = parametrized(), parametrized()
    elman.replace(swapped)
    for name, layer in (("weight_hh_l0", swapped.rnn), ("weight_hh", swapped.cell)):
        for weight in (name, name.replace("hh", "ih")):
            parametrize.remove_parametrizations(layer, weight)
    assert type(swapped.rnn) is elman.Elman
    assert type(swapped.cell) is elman.ElmanCell
    assert error(swapped(x := inputs()), original(x)) <= tolerance(torch.float32)


def test_parametrized_after_it():
    original, swapped = Model(), Model()
    swapped.load_state_dict(original.state_dict())
    elman.replace(swapped)
    for model in (original, swapped):
        parametrizations.weight_norm(model.rnn, "weight_hh_l0")
        parametrizations.weight_norm(model.cell, "weight_ih")
    check_same(swapped, original, inputs())


def test_old_weight_norm_and_pruning():
    def make():
        torch.manual_seed(1)
        model = Model()
        nn.utils.weight_norm(model.rnn, "weight_hh_l0")
        prune.random_unstructured(model.cell, "weight_hh", 0.5)
        return model

    original, swapped = make(), make()
    elman.replace(swapped)
    check_same(swapped, original, inputs())
    prune.remove(swapped.cell, "weight_hh")
    nn.utils.remove_weight_norm(swapped.rnn, "weight_hh_l0")
    assert error(swapped(x := inputs()), original(x)) <= tolerance(torch.float32)


def test_hooks_fire():
    model = Model()
    seen = []
    for layer in (model.rnn, model.cell):
        layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
        layer.register_forward_hook(lambda module, args, output: seen.append("after"))
        layer.register_full_backward_hook(lambda module, *grads: seen.append("backward"))
        layer.register_state_dict_pre_hook(lambda *args: seen.append("saved"))
    elman.replace(model)
    results(model, inputs(2, 2, 3))
    model.state_dict()
    assert [seen.count(hook) for hook in ("before", "after", "backward", "saved")] == [3, 3, 3, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_it(copied):
    """Of a layer that has run as an nn.RNN before."""
    model = Model(num_layers=2)
    model(x := inputs())
    elman.replace(model, "eager")
    other = copied(model)
    assert type(other.rnn) is elman.Elman
    assert type(other.cell) is elman.ElmanCell
    assert other.rnn.backend == other.cell.backend == "eager"
    check_same(other, model, x)
    with torch.no_grad():
        other.rnn.weight_hh_l0.add_(1)
    assert error(other(x), model(x)) > tolerance(torch.float32)


def test_saved_and_loaded_whole():
    model = Model()
    elman.replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    check_same(torch.load(file, weights_only=False), model, inputs())


def test_the_nonlinearity_is_the_one_that_ran():
    """nn.RNN goes by its mode, whatever its attribute nonlinearity says or doesn't."""
    original = nn.RNN(3, 4, nonlinearity="relu")
    swapped = copy.deepcopy(original)
    del swapped.nonlinearity
    elman.replace(swapped)
    assert swapped.nonlinearity == "relu"
    check_same(swapped, original, inputs())


class First(nn.Module):
    def forward(self, results: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return results[0]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_whole(when):
    """nn.RNN breaks the graph; a model that was compiled before the swap follows it."""
    model = nn.Sequential(nn.RNN(3, 4), First(), nn.Linear(4, 2))
    expected = model(x := inputs())
    if when == "before":
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        assert list(elman.replace(compiled)) == ["_orig_mod.0"]
    else:
        elman.replace(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mock.patch.object(nn.RNN, "forward"):
        assert error(compiled(x), expected) <= tolerance(torch.float32)


def test_exported():
    model = Model().eval()
    x = inputs()
    expected = model(x)
    elman.replace(model)
    program = torch.export.export(model, (x,))
    assert error(program.module()(x), expected) <= tolerance(torch.float32)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("compiled", ["scripted", "traced"])
def test_torchscript_is_left_alone(compiled):
    model, x = nn.Sequential(nn.RNN(3, 4), First()), inputs()
    scripted = torch.jit.script(model) if compiled == "scripted" else torch.jit.trace(model, x)
    before = scripted(x)
    assert elman.replace(nn.ModuleList([scripted])) == {}
    torch.testing.assert_close(scripted(x), before, rtol=0, atol=0)


def test_the_backend_is_given_to_every_layer():
    model = Model()
    elman.replace(model, backend="cudnn")
    assert [model.rnn.backend, model.cell.backend] == ["cudnn", "cudnn"]
    with pytest.raises(elman.BackendUnavailableError):
        model(inputs())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS)
def test_a_model_on_cuda(options):
    original = Model(**options).cuda()
    swapped = copy.deepcopy(original)
    elman.replace(swapped)
    check_same(swapped, original, inputs().cuda())
    check_same(swapped.cpu(), original.cpu(), inputs())
