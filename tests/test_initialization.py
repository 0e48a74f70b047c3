"""elman.initialize: what is drawn, in which modules, and what stays as it is."""

import copy
import doctest
import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import elman
from elman import Elman, ElmanCell, ElmanNetwork, Stream, initialize
from tests.helpers import DEVICE, DTYPES, dtype_name

KINDS = ["uniform", "normal", "orthogonal", "identity"]
FLOAT64 = {"device": DEVICE, "dtype": torch.float64}
H = 48


class Mixed(nn.Module):
    """A model with everything inside that is found, and what is not."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(5, 6)
        self.blocks = nn.ModuleList([Elman(6, 6, nonlinearity="relu"), ElmanCell(6, 6)])
        self.lstm, self.gru, self.cell = nn.LSTM(6, 6), nn.GRU(6, 6), nn.LSTMCell(6, 6)
        self.head = nn.Linear(6, 3)


MODULES = {
    "Elman": lambda **options: Elman(5, 6, **options),
    "bidirectional": lambda **options: Elman(5, 6, num_layers=2, bidirectional=True, **options),
    "ElmanCell": lambda **options: ElmanCell(5, 6, **options),
    "nn.RNN": lambda **options: nn.RNN(5, 6, num_layers=2, bidirectional=True, **options),
    "nn.RNNCell": lambda **options: nn.RNNCell(5, 6, **options),
    "ElmanNetwork": lambda **options: ElmanNetwork(5, 6, 3, **options),
    "Stream": lambda **options: Stream(Elman(5, 6, num_layers=2, **options)),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(H, **options):
    """W_ih and W_hh of a layer with as many inputs."""
    options = {"generator": seeded(), **options}
    layer = initialize(Elman(H, H, **FLOAT64), **options)
    return layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()


def radius_of(weight):
    return torch.linalg.eigvals(weight.detach().double()).abs().max().item()


def numbers(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is drawn


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_random_kinds_have_their_distribution(kind):
    w_ih, w_hh = drawn(200, recurrent=kind)
    bound = 1 / math.sqrt(200)
    deviation = bound / math.sqrt(3) if kind == "uniform" else bound
    # 40000 numbers: the standard deviation is off by 0.4 %, the mean by 0.5 % of that.
    for weight, expected in ((w_ih, bound / math.sqrt(3)), (w_hh, deviation)):
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * expected
    largest = w_hh.abs().max().item()
    assert largest <= bound if kind == "uniform" else largest > 3 * bound
    assert bound * 0.999 < w_ih.abs().max().item() <= bound
    # What the docstring says of the spectral radius.
    assert radius_of(w_hh) == pytest.approx(0.58 if kind == "uniform" else 1, rel=0.1)


def test_orthogonal():
    _, w_hh = drawn(H, recurrent="orthogonal")
    torch.testing.assert_close(w_hh @ w_hh.t(), torch.eye(H, **FLOAT64))
    assert radius_of(w_hh) == pytest.approx(1, abs=1e-12)
    assert w_hh.diagonal().abs().max() < 0.9  # and not the identity


def test_orthogonal_is_the_default():
    assert torch.equal(drawn(H)[1], drawn(H, recurrent="orthogonal")[1])


def test_identity():
    assert torch.equal(drawn(H, recurrent="identity")[1], torch.eye(H, **FLOAT64))


@pytest.mark.parametrize("radius", [0, 0.5, 1, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_radius(kind, radius):
    _, w_hh = drawn(H, recurrent=kind, radius=radius)
    assert radius_of(w_hh) == pytest.approx(radius, rel=1e-12)
    _, unscaled = drawn(H, recurrent=kind)
    torch.testing.assert_close(w_hh, unscaled * (radius / radius_of(unscaled)))


@pytest.mark.parametrize("kind", KINDS)
def test_sigma(kind):
    w_ih, w_hh = drawn(200, recurrent=kind, sigma=0.01)
    assert w_ih.std().item() == pytest.approx(0.01, rel=0.02)
    assert w_ih.abs().max() > 0.03  # normal, with tails
    _, without = drawn(200, recurrent=kind)
    if kind == "normal":
        assert w_hh.std().item() == pytest.approx(0.01, rel=0.02)
    else:
        assert w_hh.std().item() == pytest.approx(without.std().item(), rel=0.02)


def test_sigma_zero():
    w_ih, w_hh = drawn(H, recurrent="normal", sigma=0)
    assert not w_ih.any()
    assert not w_hh.any()


def test_radius_decides_where_sigma_is_given_too():
    w_ih, w_hh = drawn(200, recurrent="normal", sigma=0, radius=1.5)
    assert not w_ih.any()
    assert radius_of(w_hh) == pytest.approx(1.5, rel=1e-12)


def test_document_1():
    """Wx and Wh from N(0, 0.01^2), one zero bias."""
    layer = initialize(Elman(65, 128), "normal", sigma=0.01)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not layer.bias_ih_l0.any()
    assert not layer.bias_hh_l0.any()


def test_irnn_carries_its_state_on():
    """At first an IRNN adds up its inputs where they are positive, and its gradient stays what it was."""
    layer = initialize(Elman(3, 8, nonlinearity="relu", **FLOAT64), "identity", sigma=0.001)
    with torch.no_grad():
        layer.weight_ih_l0.abs_()
    x = torch.rand(50, 1, 3, **FLOAT64).requires_grad_()
    _, h_n = layer(x)
    torch.testing.assert_close(h_n[0, 0], (x[:, 0] @ layer.weight_ih_l0.t()).sum(0))
    (gradient,) = torch.autograd.grad(h_n.sum(), x)
    torch.testing.assert_close(gradient, gradient[-1:].expand_as(gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_one_hidden_unit(kind):
    _, w_hh = drawn(1, recurrent=kind, radius=0.7)
    assert w_hh.abs().item() == pytest.approx(0.7)


def test_one_hidden_unit_of_either_sign():
    for kind in ("uniform", "normal", "orthogonal"):
        weights = [drawn(1, recurrent=kind, radius=1, generator=seeded(s))[1].item() for s in range(20)]
        assert {round(weight, 12) for weight in weights} == {-1, 1}


def test_no_columns():
    """Cells take I = 0 and H = 0, as nn.RNNCell."""
    cells = nn.ModuleList([ElmanCell(3, 0), ElmanCell(0, 3)])
    for kind in KINDS:
        initialize(cells, kind, radius=0.5, sigma=1)
        assert radius_of(cells[1].weight_hh) == pytest.approx(0.5, rel=1e-6)


# From which generator


@pytest.mark.parametrize("sigma", [None, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_gives_the_same_numbers_in_any_dtype(kind, sigma):
    options = {"recurrent": kind, "sigma": sigma, "radius": None if sigma else 0.9}
    truth = initialize(Elman(5, H, 2, dtype=torch.float64), **options, generator=seeded(3))
    for dtype in DTYPES:
        layer = Elman(5, H, 2, device=DEVICE, dtype=dtype)
        initialize(layer, **options, generator=seeded(3))
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter.cpu(), truth.get_parameter(name).to(dtype)), (
                dtype_name(dtype),
                name,
            )


def test_another_seed_gives_other_numbers():
    first, again, other = (initialize(Elman(5, H), generator=seeded(s)) for s in (0, 0, 1))
    assert same(numbers(first), numbers(again))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_without_a_generator_it_is_torch_s():
    default = Elman(5, H)
    torch.manual_seed(3)
    initialize(default)
    assert same(numbers(default), numbers(initialize(Elman(5, H), generator=seeded(3))))
    state = torch.get_rng_state()
    initialize(default, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_and_directions_differ():
    layer = initialize(Elman(H, H, num_layers=2, bidirectional=True))
    weights = [parameter for name, parameter in layer.named_parameters() if "weight_hh" in name]
    assert len(weights) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize("context", ["default dtype", "default device", "autocast", "inference mode"])
def test_the_surroundings_change_no_number(context):
    layer, expected = (Elman(5, H, dtype=torch.float64) for _ in range(2))
    initialize(expected, "normal", radius=0.9, generator=seeded())
    old = torch.get_default_dtype()
    try:
        if context == "default dtype":
            torch.set_default_dtype(torch.float16)
        surroundings = {
            "default device": torch.device("meta"),
            "autocast": torch.autocast("cpu", torch.bfloat16),
            "inference mode": torch.inference_mode(),
        }.get(context, mock.MagicMock())
        with surroundings:
            initialize(layer, "normal", radius=0.9, generator=seeded())
    finally:
        torch.set_default_dtype(old)
    assert same(numbers(layer), numbers(expected))


# In which modules


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_every_module(name, bias):
    module = MODULES[name](bias=bias, device=DEVICE)
    readout = numbers(module.output) if name == "ElmanNetwork" else {}
    before = numbers(module)
    assert initialize(module, "orthogonal", radius=0.9, sigma=0.1) is module
    recurrent = [parameter for name, parameter in module.named_parameters() if "weight_hh" in name]
    layers = {"bidirectional": 4, "nn.RNN": 4, "Stream": 2}.get(name, 1)
    assert len(recurrent) == layers
    for weight in recurrent:
        torch.testing.assert_close(weight @ weight.t(), 0.81 * torch.eye(6, device=DEVICE))
    for parameter, value in module.state_dict().items():
        if "bias" in parameter and "output" not in parameter:
            assert bias
            assert not value.any(), parameter
        elif "output" not in parameter:
            assert not torch.equal(value, before[parameter]), parameter
    if readout:
        assert same(numbers(module.output), readout)


def test_other_modules_of_a_model_stay():
    model = Mixed()
    before = numbers(model)
    initialize(model, "identity")
    for name, value in numbers(model).items():
        ours = name.split(".")[0] in ("rnn", "blocks")
        assert torch.equal(value, before[name]) != ours, name
    for layer in (model.rnn.weight_hh_l0, model.blocks[0].weight_hh_l0, model.blocks[1].weight_hh):
        assert torch.equal(layer, torch.eye(6))


def test_a_subclass_and_a_wrapped_model():
    class Mine(nn.RNN):
        pass

    model = nn.DataParallel(nn.Sequential(Mine(3, 4)))
    initialize(model, "identity")
    assert torch.equal(model.module[0].weight_hh_l0, torch.eye(4))


def test_parameters_stay_the_same_objects():
    layer = Elman(5, 6, num_layers=2, device=DEVICE)
    layer.weight_ih_l0.requires_grad_(False)
    before = [(p, p.data_ptr(), p.requires_grad) for p in layer.parameters()]
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    initialize(layer)
    after = [(p, p.data_ptr(), p.requires_grad) for p in layer.parameters()]
    for (one, at, grad), (other, still_at, still) in zip(before, after, strict=True):
        assert one is other
        assert at == still_at
        assert grad == still
        assert other.is_leaf
        assert other.grad is None
    start = numbers(layer)
    layer(torch.randn(4, 2, 5, device=DEVICE))[0].sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        changed = not torch.equal(parameter, start[name])
        assert changed == parameter.requires_grad, name


# What is refused, with nothing changed


def refused(module, error, match, **options):
    before, state = numbers(module), torch.get_rng_state()
    with pytest.raises(error, match=match):
        initialize(module, **options)
    assert same(numbers(module), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"recurrent": "xavier"}, ValueError, "recurrent is 'xavier'; expected 'uniform' or 'normal' or"),
        ({"recurrent": None}, ValueError, "recurrent is None; expected"),
        ({"radius": -0.5}, ValueError, "radius is -0.5; expected a number from 0 up, or None"),
        ({"radius": math.nan}, ValueError, "radius is nan; expected"),
        ({"radius": math.inf}, ValueError, "radius is inf; expected"),
        ({"radius": "1"}, TypeError, "radius is a str; expected a number or None"),
        ({"radius": True}, TypeError, "radius is a bool; expected"),
        ({"sigma": -1}, ValueError, "sigma is -1; expected a number from 0 up, or None"),
        ({"sigma": math.nan}, ValueError, "sigma is nan; expected"),
        ({"sigma": torch.tensor(1.0)}, TypeError, "sigma is a Tensor; expected a number"),
        ({"generator": 3}, TypeError, "generator is a int; expected a torch.Generator or None"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, match):
    refused(Mixed(), error, match, **options)


def test_a_generator_of_another_device():
    with mock.patch.object(torch, "Generator", mock.MagicMock) as kind:
        generator = kind()
        generator.device = torch.device("cuda", 0)
        refused(Mixed(), ValueError, "generator is on cuda:0; expected one on the CPU", generator=generator)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        ([1], "module is a list; expected an nn.Module"),
        (Elman, "module is a class, Elman; expected an nn.Module: pass the module, not its class"),
    ],
)
def test_no_module(module, match):
    with pytest.raises(TypeError, match=match):
        initialize(module)


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 2))], ids=str)
def test_nothing_to_initialize(module):
    refused(module, ValueError, f"module is a {type(module).__name__} without any Elman")


def after(layer):
    """A model whose second layer is the given one: the first must not have changed."""
    return nn.Sequential(Elman(4, 4), layer)


@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.weight_norm,
        lambda layer, name: prune.l1_unstructured(layer, name, amount=2),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "prune"],
)
def test_a_parametrized_weight(parametrize):
    layer = Elman(4, 4)
    parametrize(layer, "weight_hh_l0")
    refused(after(layer), ValueError, "1.weight_hh_l0 is computed from other parameters")


def test_the_meta_device():
    model = after(Elman(4, 4, device="meta"))
    before = numbers(model[0])
    with pytest.raises(ValueError, match=r"1.weight_ih_l0 is on the meta device .* module.to_empty"):
        initialize(model)
    assert same(numbers(model[0]), before)
    initialize(model.to_empty(device="cpu"), "identity")
    assert torch.equal(model[1].weight_hh_l0, torch.eye(4))


def test_a_distributed_tensor(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        layer = Elman(4, 4)
        whole = numbers(layer)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"^weight_ih_l0 is a DTensor; .* before it is distributed"):
            initialize(layer)
        assert all(torch.equal(p.full_tensor(), whole[name]) for name, p in layer.named_parameters())
    finally:
        distributed.destroy_process_group()


def test_an_inference_tensor():
    with torch.inference_mode():
        layer = Elman(4, 4)
    refused(after(layer), ValueError, "1.weight_ih_l0 was made in torch.inference_mode")
    with torch.inference_mode():
        initialize(layer, "identity")
    assert torch.equal(layer.weight_hh_l0, torch.eye(4))


@pytest.mark.parametrize("options", [{"sigma": 1e6}, {"radius": 1e6}], ids=str)
def test_numbers_beyond_the_dtype(options):
    model = nn.Sequential(Elman(4, 4), Elman(4, 4, dtype=torch.float16))
    before = numbers(model)
    with pytest.raises(
        ValueError, match=r"beyond the largest number of torch.float16; expected smaller ones"
    ):
        initialize(model, "identity", **options)
    assert same(numbers(model), before)


def test_a_draw_that_no_scale_brings_to_the_radius():
    """Zero, and what is nilpotent: its eigenvalues are all zero."""
    model = after(Elman(4, 2))
    before = numbers(model)

    def nilpotent(self, *_, **__):
        return self.copy_(torch.ones_like(self).tril(-1))

    with (
        mock.patch.object(torch.Tensor, "normal_", nilpotent),
        pytest.raises(
            ValueError, match=r"radius is 1, and weight_hh_l0 was drawn with a spectral radius of 0.0"
        ),
    ):
        initialize(model, "normal", radius=1)
    assert same(numbers(model), before)


def test_a_copy_is_untouched():
    layer = Elman(5, 6)
    other = copy.deepcopy(layer)
    before = numbers(other)
    initialize(layer)
    assert same(numbers(other), before)


def test_it_is_public():
    assert "initialize" in elman.__all__
    assert elman.initialize.__module__ == "elman.initialization"


def test_the_docstring_s_recipes():
    test = doctest.DocTestFinder().find(initialize, "initialize")[0]
    results = doctest.DocTestRunner().run(test)
    assert results.attempted == 3
    assert results.failed == 0
