"""Models exported to ONNX: valid, of the operators that elman.onnx says, right in onnxruntime at any size."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import onnxruntime

import elman.onnx
from elman import Elman, ElmanCell, ElmanNetwork
from elman.reference import stacked_weights
from tests.helpers import error
from tests.tolerances import tolerance

pytestmark = [
    # torch.export copies a tree of arguments in a way that torch itself deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # Two arguments share a size, so that one name stands for both.
    pytest.mark.filterwarnings("ignore:# The axis name. [BT] will not be used:UserWarning"),
]

I, H = 4, 6
SIZES = [(4, 3), (9, 5), (1, 3), (7, 1), (1, 1)]  # (T, B), the first in the export
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [
    {},
    {"nonlinearity": "relu"},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "nonlinearity": "relu"},
]
STACK = {"num_layers": 2, "bidirectional": True}


class Program:
    """An ONNX file that was checked, as a function of tensors; `operators` are the types of its nodes."""

    def __init__(self, model, args, path, **options):
        elman.onnx.export(model, args, path, verbose=False, **options)
        onnx.checker.check_model(path, full_check=True)
        self.operators = [node.op_type for node in onnx.load(path).graph.node]
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = session.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, session, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Tensor) -> list[Tensor]:
        names = [i.name for i in self.session.get_inputs()]
        feed = {n: a.numpy() for n, a in zip(names, args, strict=True)}
        return [torch.from_numpy(result) for result in self.session.run(None, feed)]


@pytest.fixture
def program(tmp_path):
    def make(model, args, **options) -> Program:
        if isinstance(model, nn.Module):
            model.eval()
        return Program(model, args, tmp_path / "model.onnx", **options)

    return make


def truth(layer: Elman, x: Tensor, hx: Tensor | None = None, **more) -> tuple[Tensor, Tensor]:
    """(output, h_n) by the reference in float64, x padded."""
    return elman.reference.elman(
        x.double(),
        None if hx is None else hx.double(),
        [w.detach().double() for w in layer._flat_weights],
        num_layers=layer.num_layers,
        bias=layer.bias,
        nonlinearity=layer.nonlinearity,
        bidirectional=layer.bidirectional,
        batch_first=layer.batch_first,
        **more,
    )


def assert_right(results, expected, dtype, about=None) -> None:
    for result, right in zip(results, expected, strict=True):
        assert result.shape == right.shape, about
        assert error(result, right) <= tolerance(dtype), about


class Several(nn.Module):
    """A layer of each of OPTIONS in one graph, as an export takes its time.

    x (T, B, I) and hx (4, B, H) are in float32, for numpy has no bfloat16, or float64.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList(Elman(I, H, dtype=dtype, **options) for options in OPTIONS)
        self.dtype = dtype

    def calls(self, x: Tensor, hx: Tensor) -> list[tuple]:
        """Every layer with its arguments, without hx and with it."""
        x, hx = x.to(self.dtype), hx.to(self.dtype)
        calls = []
        for layer in self.layers:
            groups = layer.num_layers * (1 + layer.bidirectional)
            sequence = x.transpose(0, 1) if layer.batch_first else x
            calls += [(layer, sequence, None), (layer, sequence, hx[:groups])]
        return calls

    def forward(self, x: Tensor, hx: Tensor) -> list[Tensor]:
        return [t.to(x.dtype) for layer, *args in self.calls(x, hx) for t in layer(*args)]


@pytest.mark.parametrize(
    ("dtype", "recurrence"), [*((dtype, "RNN") for dtype in DTYPES), (torch.float32, "Scan")], ids=str
)
def test_layers(dtype, recurrence, program):
    model = Several(dtype)
    given = torch.float64 if dtype == torch.float64 else torch.float32
    run = program(
        model,
        (torch.randn(4, 3, I, dtype=given), torch.randn(4, 3, H, dtype=given)),
        dynamic_shapes=({0: "T", 1: "B"}, {1: "B"}),
        recurrence=recurrence,
    )
    layers = 2 * sum(layer.num_layers for layer in model.layers)
    scans = 2 * sum(layer.num_layers * (1 + layer.bidirectional) for layer in model.layers)
    expected = (layers, 0) if recurrence == "RNN" and dtype != torch.float64 else (0, scans)
    assert (run.operators.count("RNN"), run.operators.count("Scan")) == expected
    for T, B in SIZES:
        args = torch.randn(T, B, I, dtype=given), torch.randn(4, B, H, dtype=given)
        results = iter(run(*args))
        for call in model.calls(*args):
            found = next(results), next(results)
            assert all(torch.equal(t, t.to(dtype)) for t in found), "not rounded"
            assert_right(found, truth(*call), dtype, call[0])
        assert next(results, None) is None


class Restarting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Elman(I, H, dtype=dtype, **STACK) for dtype in DTYPES)

    def forward(self, x: Tensor, resets: Tensor) -> list[Tensor]:
        """x (T, B, I) in float64."""
        return [
            t.to(x.dtype)
            for layer in self.layers
            for t in layer(x.to(layer.weight_ih_l0.dtype), None, resets)
        ]


def test_resets(program):
    model = Restarting()
    dynamic = {0: "T", 1: "B"}
    given = torch.randn(4, 3, I, dtype=torch.float64), torch.rand(4, 3) < 0.5
    run = program(model, given, dynamic_shapes=(dynamic, dynamic))
    assert run.operators.count("RNN") == 0
    for T, B in SIZES:
        x = torch.randn(T, B, I, dtype=torch.float64).bfloat16().double()
        resets = torch.rand(T, B) < 0.5
        results = iter(run(x, resets))
        for layer in model.layers:
            found = next(results), next(results)
            assert_right(found, truth(layer, x, resets=resets), layer.weight_ih_l0.dtype, layer)


def test_unbatched(program):
    layer = Elman(I, H, **STACK)
    run = program(layer, (torch.randn(4, I),), dynamic_shapes=({0: "T"},))
    for T in (4, 1, 9):
        x = torch.randn(T, I)
        assert_right(run(x), [t.squeeze(1) for t in truth(layer, x[:, None])], torch.float32)


def test_network(program):
    network = ElmanNetwork(I, H, 3, num_layers=2)
    run = program(network, (torch.randn(4, 3, I),), dynamic_shapes=({0: "T", 1: "B"},))
    for T, B in SIZES:
        x = torch.randn(T, B, I)
        h, h_n = truth(network.rnn, x)
        y = torch.tanh(h @ network.output.weight.double().t() + network.output.bias.double())
        assert_right(run(x), (y.detach(), h_n), torch.float32)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        options = [{}, {"nonlinearity": "relu"}, {"bias": False}, {"dtype": torch.float64}]
        self.cells = nn.ModuleList(ElmanCell(I, H, **o) for o in options)

    def forward(self, x: Tensor, h: Tensor) -> list[Tensor]:
        return [cell(*(t.to(cell.weight_ih.dtype) for t in (x, h))) for cell in self.cells]


def test_cells(program):
    model = Cells()
    run = program(model, (torch.randn(3, I), torch.randn(3, H)), dynamic_shapes=({0: "B"}, {0: "B"}))
    for B in (3, 1, 8):
        x, h = torch.randn(B, I), torch.randn(B, H)
        for cell, result in zip(model.cells, run(x, h), strict=True):
            weights = [p.detach().double() for p in cell.parameters()]
            (layer,) = stacked_weights(weights, 1, 1, cell.bias)
            arguments = x.double()[None], h.double()[None], *layer, None, cell.nonlinearity
            right = elman.reference.layer(*arguments)[1]
            assert_right([result[None]], [right], cell.weight_ih.dtype, cell)


class Tagger(nn.Module):
    """Words in, their classes' scores out: a model of which little is ours."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, I)
        self.rnn = Elman(I, H, batch_first=True, dropout=0.5, **STACK)
        self.scores = nn.Linear(2 * H, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.rnn(self.words(words))[0]).log_softmax(-1)


def test_inside_a_model_that_was_exported_already(program):
    model = Tagger().eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (torch.randint(11, (3, 4)),), dynamic_shapes=(dynamic,))
    run = program(exported, ())
    assert run.operators.count("RNN") == 2
    model.double()
    for T, B in SIZES:
        words = torch.randint(11, (B, T))
        assert_right(run(words), [model(words).detach()], torch.float32)


class Ragged(nn.Module):
    """Rows of their own lengths, through float32 and float64 layers; what is given is in float32."""

    def __init__(self, packed: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            Elman(I, H, dtype=dtype, **STACK) for dtype in (torch.float32, torch.float64)
        )
        self.packed = packed

    def forward(self, x: Tensor, counts: Tensor) -> list[Tensor]:
        """x and counts: a PackedSequence's data and sizes, or a padded sequence and lengths."""
        results: list[Tensor] = []
        for layer in self.layers:
            data = x.to(layer.weight_ih_l0.dtype)
            if self.packed:
                output, h_n = layer(PackedSequence(data, counts))
                results += [output.data, h_n]
            else:
                results += elman.elman(data, None, layer._flat_weights, lengths=counts, **STACK)
        return results


def test_lengths(program):
    model = Ragged(packed=False)
    args = torch.randn(4, 3, I), torch.tensor([2, 4, 1])
    run = program(model, args, dynamic_shapes=({0: "T", 1: "B"}, {0: "B"}))
    for lengths in ([2, 4, 1], [1, 5, 7, 7, 3], [2]):
        x, lengths = torch.randn(max(lengths) + 1, len(lengths), I), torch.tensor(lengths)
        results = run(x, lengths)
        for layer, found in zip(model.layers, (results[:2], results[2:]), strict=True):
            assert_right(found, truth(layer, x, lengths=lengths), layer.weight_ih_l0.dtype)


def test_packed(program):
    model = Ragged(packed=True)
    args = torch.randn(6, I), torch.tensor([3, 2, 1])
    run = program(model, args, dynamic_shapes=({0: "N"}, {0: "T"}))
    for lengths in ([3, 2, 1], [7, 7, 4, 1, 1], [2]):
        packed = pack_sequence([torch.randn(length, I) for length in lengths])
        x, lengths = pad_packed_sequence(packed)
        results = run(*packed[:2])
        for layer, found in zip(model.layers, (results[:2], results[2:]), strict=True):
            output, h_n = truth(layer, x, lengths=lengths)
            right = pack_padded_sequence(output, lengths).data, h_n
            assert_right(found, right, layer.weight_ih_l0.dtype)


class Operators(nn.Module):
    """The operator with rows' lengths as graphs hold it: packed for eager, padded for Triton."""

    def __init__(self, packed: bool, resets: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            Elman(I, H, bidirectional=True, dtype=dtype) for dtype in (torch.float32, torch.float64)
        )
        self.kernel, self.resets = "eager" if packed else "triton", resets

    def forward(self, x: Tensor, h0: Tensor, counts: Tensor, resets: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for layer in self.layers:
            (weights,) = stacked_weights(layer._flat_weights, 1, 2, True)
            data, state = x.to(weights[0].dtype), h0.to(weights[0].dtype)
            begins = resets if self.resets else None
            options = counts, begins, "tanh", self.kernel, "ieee"
            results += torch.ops.elman.layer(data, state, *weights, *options)
        return results


@pytest.mark.parametrize("resets", [False, True], ids=["plain", "resets"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_operator_with_lengths(packed, resets, program):
    def arguments(*lengths: int):
        """(the reference's, the operator's): rows from the longest on; nothing past a length is of use."""
        T, B, ends = lengths[0], len(lengths), torch.tensor(lengths)
        there = torch.arange(T)[:, None] < ends
        x, h0, begins = torch.randn(T, B, I), torch.randn(2, B, H), there & (torch.rand(T, B) < 0.5)
        x[~there] = float("nan")
        right = x.nan_to_num(), h0, begins, ends
        return right, (x[there], h0, there.sum(1), begins[there]) if packed else (x, h0, ends, begins)

    model = Operators(packed, resets)
    steps = {0: "N"} if packed else {0: "T", 1: "B"}
    run = program(
        model,
        arguments(4, 2, 1)[1],
        dynamic_shapes=(steps, {1: "B"}, {0: "T"} if packed else {0: "B"}, steps),
    )
    for lengths in ((4, 2, 1), (7, 7, 5, 3, 1), (2,)):
        (x, h0, begins, ends), given = arguments(*lengths)
        results = run(*given)
        there = torch.arange(len(x))[:, None] < ends
        for layer, found in zip(model.layers, (results[:2], results[2:]), strict=True):
            output, h_n = truth(layer, x, h0, lengths=ends, resets=begins if resets else None)
            right = output[there] if packed else output, h_n
            assert_right(found, right, layer.weight_ih_l0.dtype)


def test_a_table_of_one_s_own_goes_first(program):
    def zeros(x, h0, *rest):
        return elman.onnx.op.Mul(x, 0.0), elman.onnx.op.Mul(h0, 0.0)

    table = {torch.ops.elman.layer.default: zeros}
    run = program(Elman(H, H), (torch.randn(2, 3, H),), custom_translation_table=table)
    assert all((result == 0).all() for result in run(torch.randn(2, 3, H)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's exporter's, of nn.RNN too
@pytest.mark.parametrize("recurrence", [None, "RNN", "Scan"])
def test_torch_s_own_export_beside_ours(recurrence, tmp_path):
    """With a table of ours it writes our operator, and without one what it writes of nn.RNN."""
    model, x, path = Elman(I, H).eval(), torch.randn(3, 2, I), tmp_path / "model.onnx"
    if recurrence is not None:
        elman.onnx.export(model, (x,), path, verbose=False)
        table = {**elman.onnx.translations(recurrence)}
        dynamic = {"dynamic_shapes": ({0: "T", 1: "B"},)}
        torch.onnx.export(model, (x,), path, verbose=False, custom_translation_table=table, **dynamic)
        assert [n.op_type for n in onnx.load(path).graph.node].count("RNN") == (recurrence == "RNN")
        x = torch.randn(5, 4, I)
        del table
    torch.onnx.export(model, (x,), path, verbose=False)
    assert "RNN" not in {n.op_type for n in onnx.load(path).graph.node}
    found = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0]
    assert_right([torch.from_numpy(found)], [model(x)[0].detach()], torch.float32)


def test_the_older_exporter_is_refused():
    with pytest.raises(ValueError, match=r"dynamo is False.*leave it out"):
        elman.onnx.export(Elman(I, H), (torch.randn(2, 3, I),), dynamo=False)


def test_another_recurrence_is_refused():
    with pytest.raises(ValueError, match="recurrence is 'GRU'; expected 'RNN' or 'Scan'"):
        elman.onnx.translations("GRU")


def test_only_elman_onnx_imports_onnx():
    code = """
import sys, elman
assert not {"onnx", "onnxruntime", "onnxscript"} & set(sys.modules)
sys.modules["onnxscript"] = None
import elman.onnx
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "AssertionError" not in done.stderr
    assert "pip install 'elman[onnx]'" in done.stderr.splitlines()[-1]
