"""What other people's code does with an nn.RNN, done with ours: tracers, exporters, quantizers, counters.

Each test is a snippet that succeeds with nn.RNN, or a sentence where ours can't follow.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import elman
from elman import Elman, ElmanCell, ElmanNetwork, Stream
from tests.helpers import copy_of

T, B, I, H = 5, 2, 3, 4
# What torch says of its older parts, which people still use; the category differs from version to version.
OF_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit")
OF_QUANTIZATION = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor",
    "ignore:Please use quant_min",
)


class Tagger(nn.Module):
    """A model that holds a layer, as people write them."""

    def __init__(self, kind: type[nn.RNNBase] = Elman, **options):
        super().__init__()
        self.rnn = kind(I, H, **options)
        self.head = nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x)
        return self.head(h)


class Stepper(nn.Module):
    """A model that holds a cell."""

    def __init__(self, kind: type[nn.RNNCellBase] = ElmanCell):
        super().__init__()
        self.cell = kind(I, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x))


def sequence() -> Tensor:
    return torch.randn(T, B, I)


# Options and attributes


def test_a_bool_of_numpy_is_a_bool():
    numpy = pytest.importorskip("numpy")
    layer = Elman(I, H, bidirectional=numpy.bool_(True))
    assert layer.bidirectional is True
    assert layer(sequence())[0].shape == (T, B, 2 * H)


def test_assigned_flat_weights_are_computed_with():
    ours, x = Elman(I, H), sequence()
    theirs = copy_of(ours)
    before = ours(x)
    for layer in (ours, theirs):
        layer._flat_weights = [0.5 * w for w in layer._flat_weights]
    assert_close(ours(x), theirs(x))
    assert not torch.equal(ours(x)[0], before[0])
    for layer in (ours, theirs):
        layer.float()  # nn.RNN takes its parameters up again
    assert_close(ours(x), before)
    assert_close(theirs(x), before)


def test_a_parameter_set_later_ends_the_assignment():
    ours, x = Elman(I, H), sequence()
    theirs = copy_of(ours)
    for layer in (ours, theirs):
        layer._flat_weights = [0.5 * w for w in layer._flat_weights]
        layer.bias_hh_l0 = nn.Parameter(torch.ones(H))
    assert_close(ours(x), theirs(x))


def test_flat_weights_assigned_before_replace():
    model, x = Tagger(nn.RNN), sequence()
    model.rnn._flat_weights = [0.5 * w for w in model.rnn._flat_weights]
    expected = model(x)
    elman.replace(model)
    assert_close(model(x), expected)


def test_initialisers_belong_before_replace(caplog):
    def initialise(model):
        for module in model.modules():
            if isinstance(module, nn.RNN):
                nn.init.zeros_(module.weight_hh_l0)

    before, after = Tagger(nn.RNN), Tagger(nn.RNN)
    initialise(before)
    with caplog.at_level(logging.INFO, "elman"):
        assert len(elman.replace(before)) == len(elman.replace(after)) == 1
    initialise(after)
    assert before.rnn.weight_hh_l0.abs().sum() == 0
    assert after.rnn.weight_hh_l0.abs().sum() > 0
    assert [record.getMessage() for record in caplog.records] == [
        "replace made 1 of nn.RNN and nn.RNNCell ours: ['rnn']"
    ] * 2
    assert "initialise before replace" in elman.replace.__doc__


# Files


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("module", [Elman(I, H, 2), ElmanCell(I, H), Stream(Elman(I, H))], ids=str)
def test_a_whole_module_is_loaded_as_weights_only(module):
    x = sequence()[0] if isinstance(module, ElmanCell) else sequence()
    loaded = torch.load(_saved(module))  # weights_only is True by default
    assert type(loaded) is type(module)
    assert_close(loaded(x), module(x))


def test_a_whole_network_needs_leave_for_torch_s_linear_alone():
    network, x = ElmanNetwork(I, H, 2), sequence()
    with torch.serialization.safe_globals([nn.Linear]):
        loaded = torch.load(_saved(network))
    assert_close(loaded(x), network(x))


# torch.fx, and what else overrides torch's functions


def assert_same_graphs(ours: torch.fx.Graph, theirs: torch.fx.Graph) -> None:
    """Node by node; str(node.args) names the nodes that a node reads."""
    names = [[(n.op, n.name, n.target, str(n.args), n.kwargs) for n in g.nodes] for g in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}])
def test_fx_takes_a_layer_for_one_node(options):
    ours, theirs = Tagger(**options), Tagger(nn.RNN, **options)
    theirs.load_state_dict(ours.state_dict())
    x, traced = sequence(), [torch.fx.symbolic_trace(model) for model in (ours, theirs)]
    assert_same_graphs(traced[0].graph, traced[1].graph)
    for module in (ours, theirs, *traced):
        module.eval()  # the graph has no mode of its own
    assert_close(traced[0](x), ours(x))
    assert_close(traced[0](x), traced[1](x))
    traced[0](x).sum().backward()
    assert ours.rnn.weight_hh_l0.grad.abs().sum() > 0


def test_fx_takes_a_cell_for_one_node():
    ours = Stepper()
    graphs = [torch.fx.symbolic_trace(model) for model in (ours, Stepper(nn.RNNCell))]
    assert_same_graphs(graphs[0].graph, graphs[1].graph)
    x = sequence()[0]
    assert_close(graphs[0](x), ours(x))


class Calling(nn.Module):
    """A model whose forward is a call of a layer and arguments, and which holds constants."""

    def __init__(self, layer: nn.Module, call):
        super().__init__()
        self.layer, self.call = layer, call
        size = (T, B, I) if isinstance(layer, nn.RNNBase) else (B, I)
        self.register_buffer("x", torch.randn(size))

    def forward(self, given: Tensor) -> Tensor:
        result = self.call(self, given)
        return result[1] if isinstance(self.layer, nn.RNNBase) else result


def _replaced(kind):
    model = nn.Sequential(kind(I, H))
    elman.replace(model)
    return model[0]


def _without(layer):
    """As an elman pickled it whose layers told the tracers nothing."""
    vars(layer).pop("__module__", None)
    return layer


HOOKED = {
    "layer": lambda: Elman(I, H),
    "cell": lambda: ElmanCell(I, H),
    "replaced layer": lambda: _replaced(nn.RNN),
    "replaced cell": lambda: _replaced(nn.RNNCell),
    "deep copy": lambda: copy.deepcopy(Elman(I, H)),
    "pickled long ago": lambda: pickle.loads(pickle.dumps(_without(Elman(I, H)))),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(Elman(I, H), "weight_hh_l0"),
}


@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
def test_fx_runs_hooks_once(make):
    model = Calling(make(), lambda model, x: model.layer(x))
    calls = []

    def double(layer, arguments, result):
        calls.append("after")
        return (result[0], 2 * result[1]) if isinstance(result, tuple) else 2 * result

    def add(layer, arguments):
        calls.append("before")
        return (arguments[0] + 1, *arguments[1:])

    model.layer.register_forward_hook(double)
    model.layer.register_forward_pre_hook(add)
    traced = torch.fx.symbolic_trace(model)
    assert calls == []
    assert [node.op for node in traced.graph.nodes][1] == "call_module"
    found = traced(model.x)
    assert calls == ["before", "after"]
    assert_close(found, model(model.x))


GIVEN = {
    "hx": (lambda model, h: model.layer(model.x, h), (2, B, H)),
    "hx by name": (lambda model, h: model.layer(input=model.x, hx=h), (2, B, H)),
    "resets": (lambda model, resets: model.layer(model.x, None, resets > 0), (T, B)),
    "packed": (lambda model, data: model.layer(PackedSequence(data, SIZES)), (T + 1, I)),
}
SIZES = torch.tensor([2, 2, 1, 1])


@pytest.mark.parametrize(("call", "size"), GIVEN.values(), ids=GIVEN)
def test_fx_keeps_no_mode_whatever_it_traces(call, size):
    model, given = Calling(Elman(I, H, 2, dropout=0.5), call), torch.randn(size)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    assert not torch.equal(traced(given), traced(given))  # dropout's draws
    traced.eval()
    assert_close(traced(given), model.eval()(given))


def test_fx_takes_a_cell_for_one_node_by_its_state():
    model, h = Calling(ElmanCell(I, H), lambda model, h: model.layer(model.x, h)), torch.randn(B, H)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    assert_close(traced(h), model(h))


@pytest.mark.parametrize("module", [Elman(I, H, 2), ElmanCell(I, H), ElmanNetwork(I, H, 2)], ids=str)
def test_fx_traces_our_modules_alone(module):
    """Which nn.RNN and nn.RNNCell are not able to."""
    traced = torch.fx.symbolic_trace(module, concrete_args={"hx": None, "resets": None})
    x = sequence()[0] if isinstance(module, ElmanCell) else sequence()
    assert_close(traced(x), module(x))


def test_fx_refuses_a_stream():
    with pytest.raises(RuntimeError, match=r"the stream is traced, .*use stream.layer"):
        torch.fx.symbolic_trace(nn.Sequential(Stream(Elman(I, H))))


@OF_QUANTIZATION
def test_prepare_fx_and_convert_fx():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    ours, x = Tagger().eval(), sequence()
    expected = ours(x)
    prepared = prepare_fx(ours, get_default_qconfig_mapping(), (x,))
    assert_close(prepared(x), expected)
    converted = convert_fx(prepared)
    assert type(converted.rnn) is Elman
    assert type(converted.head) is torch.ao.nn.quantized.Linear
    assert_close(converted(x), expected, rtol=0, atol=0.05)


class Overriding:
    """An object that is no tensor and answers for torch's functions."""

    calls: list[tuple]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append((function, types, args, kwargs))
        return "answer", "h_n"


@pytest.mark.parametrize("where", ["input", "hx", "weights"])
def test_an_overriding_object_gets_the_call(where):
    Overriding.calls = []
    layer, x, hx = Elman(I, H), sequence(), torch.zeros(1, B, H)
    weights = list(layer.parameters())
    arguments = {"input": x, "hx": hx, "weights": weights}
    arguments[where] = Overriding() if where != "weights" else [Overriding(), *weights[1:]]
    assert elman.elman(**arguments, dropout=0.5) == ("answer", "h_n")
    function, types, args, kwargs = Overriding.calls.pop()
    assert function is elman.elman
    assert set(types) == {Overriding}
    assert dict(zip(arguments, args, strict=True)) == arguments
    assert kwargs["dropout"] == 0.5
    if where != "weights":
        assert layer(*[arguments[name] for name in ("input", "hx")]) == ("answer", "h_n")


@pytest.mark.parametrize("where", ["input", "hx", "weight"])
def test_an_overriding_object_gets_the_step(where):
    Overriding.calls = []
    cell, x, h = ElmanCell(I, H), sequence()[0], torch.zeros(B, H)
    arguments = {"input": x, "hx": h, "weight": cell.weight_ih} | {where: Overriding()}
    result = elman.elman_step(*arguments.values(), cell.weight_hh, cell.bias_ih, cell.bias_hh)
    assert result == ("answer", "h_n")
    assert Overriding.calls.pop()[0] is elman.elman_step


def test_a_mode_that_overrides_sees_the_operators():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, cell, x = Elman(I, H), ElmanCell(I, H, backend="eager"), sequence()
    with Mode():
        found = layer(x), cell(x[0])
    assert_close(found, (layer(x), cell(x[0])))
    assert [name for name in seen if "layer" in name]
    assert [name for name in seen if "rnn_tanh_cell" in name]
    seen.clear()
    cell.backend = "auto"
    with Mode():
        found = cell(x[0])
    assert_close(found, cell(x[0]))
    assert [name for name in seen if "layer" in name or "rnn_tanh_cell" in name]


# TorchScript


@OF_TORCHSCRIPT
@pytest.mark.parametrize(
    ("model", "kind", "original"),
    [(Tagger(), "Elman", "nn.RNN"), (Elman(I, H), "Elman", "nn.RNN"), (Stepper(), "ElmanCell", "nn.RNNCell")],
    ids=["inside a model", "alone", "cell"],
)
def test_script_names_what_to_use(model, kind, original):
    with pytest.raises(RuntimeError, match=f"an {kind}, .*use one of these, .*{original} in its place"):
        torch.jit.script(model)


@OF_TORCHSCRIPT
def test_the_remedy_for_script():
    ours, x = Tagger(), sequence()
    theirs = Tagger(nn.RNN)
    theirs.load_state_dict(ours.state_dict())
    assert_close(torch.jit.script(theirs)(x), ours(x))


# Quantization


@OF_QUANTIZATION
def test_quantize_dynamic_leaves_a_cell_in_float():
    kinds = {}
    for kind in (ElmanCell, nn.RNNCell):
        quantized = torch.ao.quantization.quantize_dynamic(Stepper(kind), {nn.RNNCell, nn.Linear, ElmanCell})
        assert quantized(sequence()[0]).shape == (B, 2)
        kinds[kind] = [type(quantized.cell), type(quantized.head)]
    assert kinds[ElmanCell][0] is ElmanCell
    assert kinds[nn.RNNCell][0] is torch.ao.nn.quantized.dynamic.RNNCell
    assert kinds[ElmanCell][1] is kinds[nn.RNNCell][1] is torch.ao.nn.quantized.dynamic.Linear
    assert "leaves it in float" in ElmanCell.__doc__


@OF_TORCHSCRIPT
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_trace_warns_of_nothing(packed):
    """nn.RNN warns of the sizes that it compares; other warnings than these are errors here anyway."""
    layer, cell, x = Elman(I, H, 2, bidirectional=True), ElmanCell(I, H), sequence()
    with torch.no_grad():
        if packed:
            sizes = torch.tensor([2, 2, 1])
            weights = [p.detach() for p in Elman(I, H).parameters()]

            def run(data, sizes):
                return elman.elman(PackedSequence(data, sizes), None, weights)[1]

            traced = torch.jit.trace(run, (x.flatten(0, 1)[:5], sizes))
            other = x.flatten(0, 1)[:6], torch.tensor([3, 2, 1])
            assert_close(traced(*other), run(*other))
        else:
            hx = torch.randn(4, B, H)
            assert_close(torch.jit.trace(layer, (x, hx))(x[:3], hx), layer(x[:3], hx))
            assert_close(torch.jit.trace(layer, (x,))(x[:, :1]), layer(x[:, :1]))
            assert_close(torch.jit.trace(cell, (x[0],))(x[1]), cell(x[1]))


@OF_TORCHSCRIPT
def test_a_trace_still_checks():
    with pytest.raises(RuntimeError, match="input has size 4 in its last dimension"):
        torch.jit.trace(Elman(I, H), (torch.randn(T, B, 4),))


# ONNX


@pytest.fixture
def plain_exporter():
    """torch's own, told of nothing; elman.onnx may be imported."""
    pytest.importorskip("onnxscript")


@OF_TORCHSCRIPT
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the exporters', of nn.RNN too
@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "newer"])
@pytest.mark.parametrize(
    "model", [Tagger(num_layers=2, bidirectional=True), Stepper()], ids=["layer", "cell"]
)
def test_torch_s_own_onnx_export(model, dynamo, plain_exporter, tmp_path):
    """As Lightning's and darts' to_onnx call it."""
    runtime = pytest.importorskip("onnxruntime")
    x = sequence()[0] if isinstance(model, Stepper) else sequence()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, input_names=["x"], verbose=False)
    found = runtime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


@OF_TORCHSCRIPT
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_nn_rnn_has_not_is_elman_onnx_s_matter(plain_exporter, tmp_path):
    class Resetting(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = Elman(I, H)

        def forward(self, x, resets):
            return self.rnn(x, None, resets)

    arguments = sequence(), torch.zeros(T, B, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"use elman\.onnx\.export"):
        torch.onnx.export(Resetting().eval(), arguments, tmp_path / "model.onnx", dynamo=False)


# Gradients of each sample


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"}])
def test_call_for_per_sample_grads(options, packed):
    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.rnn = kind(I, H, batch_first=True, **options)

        def forward(self, x):
            if packed:
                x = pack_padded_sequence(x, [T, T - 2], batch_first=True)
                return self.rnn(x)[0].data.square()
            return self.rnn(x)[0].square()

    ours, theirs = Model(Elman), Model(nn.RNN)
    theirs.load_state_dict(ours.state_dict())
    x = sequence().transpose(0, 1)
    for model in (ours, theirs):
        call_for_per_sample_grads(model)(x).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad_sample.shape == (B, *p.shape)
        assert_close(p.grad_sample, q.grad_sample, msg=name)
    ours.zero_grad()
    ours(x).sum().backward()
    for name, p in ours.named_parameters():
        assert_close(p.grad_sample.sum(0), p.grad, msg=name)


def test_expanded_weights_have_no_resets():
    layer, x = Elman(I, H, batch_first=True), sequence().transpose(0, 1)
    with pytest.raises(NotImplementedError, match=r"expected None: .*torch\.func's vmap"):
        call_for_per_sample_grads(layer)(x, resets=torch.zeros(B, T, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore")  # Opacus's own
def test_opacus_s_expanded_weights():
    opacus = pytest.importorskip("opacus")
    ours = Tagger(batch_first=True)
    model = opacus.grad_sample.GradSampleModuleExpandedWeights(ours, loss_reduction="sum")
    x = sequence().transpose(0, 1)
    model(x).square().sum().backward()
    for p in ours.parameters():
        assert p.grad_sample.shape == (B, *p.shape)
    found = ours.rnn.weight_hh_l0.grad_sample.sum(0)
    plain = Tagger(batch_first=True)
    plain.load_state_dict(ours.state_dict())
    plain(x).square().sum().backward()
    assert_close(found, plain.rnn.weight_hh_l0.grad)


# Operations counted


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both passes"])
def test_flops_are_counted_as_nn_rnn_s(options, backward):
    ours, x = Elman(I, H, **options), sequence()
    counts = []
    for layer in (ours, copy_of(ours)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output, _ = layer(x)
            if backward:
                output.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_tensors_without_numbers():
    counts = []
    for kind in (Elman, nn.RNN):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            kind(I, H)(torch.randn(T, B, I))[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# Weights by any iterable


@pytest.mark.parametrize("kind", [iter, tuple, list])
def test_weights_by_any_iterable_where_a_mode_or_a_subclass_is_about(kind):
    class Marked(torch.Tensor):
        pass

    layer, x = Elman(I, H), sequence()
    expected = layer(x)[0]
    with torch.device("cpu"):
        found = elman.elman(x, None, kind(layer._flat_weights))[0]
    assert_close(found, expected)
    found = elman.elman(x.as_subclass(Marked), None, kind(layer._flat_weights))[0]
    assert_close(found, expected, check_device=False)


@pytest.mark.parametrize("kind", [iter, tuple, list])
def test_proxies_among_the_weights_alone(kind):
    layer, x = Elman(I, H), sequence()
    traced = torch.fx.symbolic_trace(lambda a, b, c, d: elman.elman(x, None, kind([a, b, c, d]))[0])
    assert_close(traced(*layer._flat_weights), layer(x)[0])


def test_make_fx_with_sizes_that_are_symbols_on_cuda():
    """Of fake tensors, so that no GPU is needed: a route is looked up by sizes, and symbols have no hash."""

    def run(rows):
        shapes = [(H, I), (H, H), (H,), (H,)]
        weights = [torch.empty(shape, device="cuda") for shape in shapes]
        x = torch.empty(T, rows.shape[0], I, device="cuda")
        return elman.elman(x, None, weights, backend="eager")[0]

    graph = make_fx(run, tracing_mode="symbolic")(torch.empty(B, 2))
    assert any(node.target is torch.ops.elman.layer.default for node in graph.graph.nodes)


# A backend by name, where nn.RNN's operator is taken


@pytest.mark.parametrize("backend", ["cudnn", "eager", "triton", "triton:step"])
@pytest.mark.parametrize("by", ["argument", "use_backend", "environment"])
def test_a_backend_by_name_is_not_replaced_by_nn_rnn_s_operator(backend, by, monkeypatch):
    layer, x = Elman(I, H, batch_first=True, backend=backend if by == "argument" else "auto"), sequence()
    if by == "environment":
        monkeypatch.setenv("ELMAN_BACKEND", backend)
    used = elman.use_backend(backend if by == "use_backend" else "auto")
    with used, pytest.raises(elman.BackendUnavailableError, match=f"'{backend}' was asked for .*use '"):
        call_for_per_sample_grads(layer)(x)


@OF_TORCHSCRIPT
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["cudnn", "eager"])
def test_an_export_does_not_replace_a_backend_by_name(backend, plain_exporter, tmp_path):
    model = Elman(I, H, backend=backend).eval()
    with pytest.raises(elman.BackendUnavailableError, match=f"'{backend}' was asked for"):
        torch.onnx.export(model, (sequence(),), tmp_path / "model.onnx", dynamo=False)


def test_dropout_of_a_single_layer_is_warned_of_when_it_is_made_alone():
    with pytest.warns(UserWarning, match="dropout"):
        layer = Elman(I, H, dropout=0.5, batch_first=True)
    call_for_per_sample_grads(layer)(sequence())  # a warning is an error here


# Operations counted where the layer itself isn't called


def test_flops_of_a_backward_pass_alone():
    ours, x = Elman(I, H), sequence()
    counts = []
    for layer in (ours, copy_of(ours)):
        loss = layer(x)[0].sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def gradient_penalty(layer, x):
    x = x.clone().requires_grad_()
    # Not a leaf: FlopCounterMode's hooks refuse one.
    (g,) = torch.autograd.grad(layer(x * 1)[0].pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), [x, *layer.parameters()])


def test_flops_of_a_second_derivative():
    """None is lost. The backward scan is made once more than nn.RNN makes it."""
    ours, x = Elman(16, 64), torch.randn(12, 32, 16)
    counts = []
    for layer in (ours, copy_of(ours)):
        with FlopCounterMode(display=False) as counter:
            gradient_penalty(layer, x)
        counts.append(counter.get_total_flops())
    assert counts[1] <= counts[0] <= 1.5 * counts[1]


def test_a_traced_second_derivative():
    """By make_fx with real numbers: what is traced may not be written into."""
    layer, x = Elman(I, H), sequence()
    graph = make_fx(lambda x: gradient_penalty(layer, x), tracing_mode="real")(x)
    assert_close(graph(2 * x), gradient_penalty(layer, 2 * x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch.export's, of nn.RNN too
def test_flops_of_an_exported_graph(monkeypatch):
    for name in ("layer", "layer_dz", "layer_products"):  # which another test's counter may have left there
        monkeypatch.delitem(flop_registry, getattr(torch.ops.elman, name), raising=False)
    ours, x = Elman(I, H), sequence()
    counts = []
    for layer in (ours, copy_of(ours)):
        exported = torch.export.export(layer, (x,)).module()
        with FlopCounterMode(display=False) as counter:
            exported(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
