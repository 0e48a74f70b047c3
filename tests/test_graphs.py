"""Graphs of any T and B: torch.compile's, and torch.export's saved, loaded, decomposed, trained, compiled."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import elman
from elman import Elman, ElmanCell, ElmanNetwork
from tests.helpers import DEVICE, TRITON, error
from tests.tolerances import tolerance

# torch.export copies a tree of arguments in a way that torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

I, H = 4, 6
SIZES = [(5, 3), (9, 4), (1, 3), (5, 1), (1, 1)]  # (T, B), the first in the export
STACK = {"num_layers": 2, "bidirectional": True}
DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}

# The first has no size in common with the weights: torch.compile takes equal numbers for one.
MORE_SIZES = [(8, 3), (5, 6), (9, 2), (16, 16), (33, 4), (7, 7), (300, 8)]

each_strictness = pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])


def layer_operators(exported: ExportedProgram) -> int:
    return sum(node.target is torch.ops.elman.layer.default for node in exported.graph.nodes)


def assert_equal(actual, expected) -> None:
    """Bit for bit, and of the same kinds."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif expected is not None:
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)


def has_compiler() -> bool:
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def gradients(call, x, weights):
    output, h_n = call(x)
    return output, h_n, *torch.autograd.grad(output.square().sum() + h_n.sin().sum(), [x, *weights])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is (deprecated|not supported)")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bias": False, **STACK}], ids=["plain", "stack"]
)
@pytest.mark.parametrize(
    "compiler",
    ["aot_eager", *(["inductor"] if has_compiler() else [])],
)
def test_one_compiled_graph_for_all_sizes(compiler, options, training):
    """fullgraph, and nothing compiled again; results as without it, to the bit, and gradients near those."""
    layer = Elman(I, H, **options, device=DEVICE)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    compiled_for, before = [], 0
    for T, B in MORE_SIZES:
        x = torch.randn((B, T, I) if layer.batch_first else (T, B, I), device=DEVICE, requires_grad=training)
        if training:
            weights = list(layer.parameters())
            found, expected = gradients(compiled, x, weights), gradients(layer, x, weights)
            # Of few rows native makes them in C where no graph is: there they are torch's products.
            assert all(error(g, e) <= tolerance(torch.float32) for g, e in zip(found, expected, strict=True))
        else:
            with torch.no_grad():
                assert_equal(compiled(x), layer(x))
        if counter.frame_count > before:
            compiled_for.append((T, B))
        before = counter.frame_count
    # torch 2.15 may take as many rows as steps for a case of its own, which is one more compilation.
    again = compiled_for[1:]
    assert again == [] or (torch.__version__ >= "2.15" and len(again) == 1 and again[0][0] == again[0][1])


@pytest.mark.usefixtures("fresh_compiler")
def test_by_itself_the_compiler_settles_after_two_graphs():
    """Without dynamic=True the first graph is of its sizes alone, the second of all from 2 on."""
    layer, counter = Elman(I, H), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for T, B in MORE_SIZES:
        compiled(torch.randn(T, B, I))[0].sum().backward()
    assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_state_and_a_packed_batch():
    layer = Elman(I, H)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    packed, hx = pack_sequence([torch.randn(n, I) for n in (4, 2)]), torch.randn(1, 2, H)
    assert_equal(compiled(packed, hx), layer(packed, hx))


@each_strictness
@pytest.mark.parametrize("kind", ["named", "DYNAMIC", "AUTO"])
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bias": False, **STACK}], ids=["plain", "stack"]
)
def test_a_layer_s_graph_takes_any_size(options, hx, kind, strict):
    layer = Elman(I, H, **options)

    def arguments(T, B):
        x = torch.randn((B, T, I) if layer.batch_first else (T, B, I))
        return (x, torch.randn(layer.num_layers * (1 + layer.bidirectional), B, H)) if hx else (x,)

    T, B = (Dim("T"), Dim("B")) if kind == "named" else (getattr(Dim, kind),) * 2
    shapes = ({0: B, 1: T} if layer.batch_first else {0: T, 1: B}, {1: B})[: 2 if hx else 1]
    exported = torch.export.export(layer, arguments(*SIZES[0]), dynamic_shapes=shapes, strict=strict)
    assert layer_operators(exported) == layer.num_layers
    for size in SIZES:
        args = arguments(*size)
        assert_equal(exported.module()(*args), layer(*args))


@each_strictness
def test_the_other_modules_graphs_take_any_size(strict):
    cell, network = ElmanCell(I, H), ElmanNetwork(I, H, 2)
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    of_cell = torch.export.export(
        cell, (torch.randn(3, I), torch.randn(3, H)), dynamic_shapes=shapes, strict=strict
    )
    of_network = torch.export.export(
        network, (torch.randn(5, 3, I),), dynamic_shapes=(DYNAMIC,), strict=strict
    )
    of_rows = torch.export.export(
        Elman(I, H), (torch.randn(5, I),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=strict
    )
    for T, B in SIZES:
        args = torch.randn(B, I), torch.randn(B, H)
        # A cell's graph is torch's own operator on every machine; by itself the cell may be native's.
        torch.testing.assert_close(of_cell.module()(*args), cell(*args))
        x = torch.randn(T, B, I)
        assert_equal(of_network.module()(x), network(x))
        assert of_rows.module()(x[:, 0])[0].shape == (T, H)


class Ragged(nn.Module):
    """A layer's functional form, for rows of their own lengths or that begin anew."""

    def __init__(self):
        super().__init__()
        self.layer = Elman(I, H, **STACK)

    def forward(self, x: Tensor, lengths: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = [getattr(self.layer, name) for name in self.layer._flat_weights_names]
        return elman.elman(x, None, weights, lengths=lengths, resets=resets, **STACK)


@each_strictness
def test_lengths_and_resets(strict):
    model, x = Ragged(), torch.randn(5, 3, I)
    rows = {0: Dim.DYNAMIC}
    given = x, torch.tensor([2, 5, 1]), None
    of_lengths = torch.export.export(model, given, dynamic_shapes=(DYNAMIC, rows, None), strict=strict)
    given = x, torch.tensor([2, 5, 1]), torch.rand(5, 3) < 0.5
    of_both = torch.export.export(model, given, dynamic_shapes=(DYNAMIC, rows, DYNAMIC), strict=strict)
    given = x, None, torch.rand(5, 3) < 0.5
    of_resets = torch.export.export(model, given, dynamic_shapes=(DYNAMIC, None, DYNAMIC), strict=strict)
    for lengths in ([2, 5, 1], [1, 7, 7, 4], [3]):
        x, lengths = torch.randn(max(lengths) + 1, len(lengths), I), torch.tensor(lengths)
        assert_equal(of_lengths.module()(x, lengths, None), model(x, lengths, None))
        resets = torch.rand(x.shape[:2]) < 0.5
        assert_equal(of_resets.module()(x, None, resets), model(x, None, resets))
        assert_equal(of_both.module()(x, lengths, resets), model(x, lengths, resets))


class Packed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = Elman(I, H, **STACK, **options)

    def forward(
        self, data: Tensor, sizes: Tensor, resets: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        return self.layer(PackedSequence(data, sizes), None, resets)


@each_strictness
def test_packed(strict):
    """Any lengths where data and sizes are the graph's inputs; a PackedSequence itself is of one size."""
    rows = [torch.randn(n, I) for n in (4, 2, 1)]
    model = Packed()
    data, sizes, *_ = pack_sequence(rows)
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    plain = torch.export.export(model, (data, sizes), dynamic_shapes=shapes, strict=strict)
    given = data, sizes, torch.rand(4, 3) < 0.5
    of_resets = torch.export.export(model, given, dynamic_shapes=(*shapes, DYNAMIC), strict=strict)
    for lengths in ((4, 2, 1), (7, 7, 3, 1), (2,)):
        packed = pack_sequence([torch.randn(n, I) for n in lengths])
        assert_equal(plain.module()(*packed[:2]), model(*packed[:2]))
        resets = torch.rand(lengths[0], len(lengths)) < 0.5
        assert_equal(of_resets.module()(*packed[:2], resets), model(*packed[:2], resets))
    packed = pack_sequence(rows[::-1], enforce_sorted=False)
    exported = torch.export.export(model.layer, (packed,), strict=strict)
    assert_equal(exported.module()(packed), model.layer(packed))


@pytest.mark.parametrize("backend", TRITON)
def test_packed_for_triton(backend):
    model = Packed(backend=backend)
    data, sizes, *_ = pack_sequence([torch.randn(n, I) for n in (3, 1)])
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    exported = torch.export.export(model, (data, sizes), dynamic_shapes=shapes)
    for lengths in ((3, 1), (4, 4, 2)):
        packed = pack_sequence([torch.randn(n, I) for n in lengths])
        assert_equal(exported.module()(*packed[:2]), model(*packed[:2]))


class Tagger(nn.Module):
    """Words in, their classes' scores out: a model of which little is ours."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, I)
        self.rnn = Elman(I, H, batch_first=True, **STACK)
        self.scores = nn.Linear(2 * H, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.rnn(self.words(words))[0]).log_softmax(-1)


def unrolled(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision):
    """The operator in plain torch, a step after the other: T is then fixed."""
    return elman.reference.layer(x, h0, w_ih, w_hh, bias, counts, nonlinearity, resets)


def test_decompositions():
    layer = Elman(I, H, **STACK)
    core = torch.export.export(layer, (torch.randn(5, 3, I),), dynamic_shapes=(DYNAMIC,)).run_decompositions()
    assert layer_operators(core) == 2, "still one operator a layer"
    for T, B in SIZES:
        x = torch.randn(T, B, I)
        assert_equal(core.module()(x), layer(x))


IN_A_FRESH_PROCESS = """
import sys, torch
words, whole, plain, results = sys.argv[1:]
words = torch.load(words)
found = [torch.export.load(plain).module()(words)]
try:
    torch.export.load(whole)
except RuntimeError:
    pass
else:
    sys.exit("loaded without elman")
import elman
found.append(torch.export.load(whole).module()(words))
torch.save(found, results)
"""


def test_saved_and_loaded_in_another_process(tmp_path):
    """A process must import elman first, unless the operator was decomposed, which fixes T."""
    model = Tagger().eval()
    exported = torch.export.export(model, (torch.randint(11, (3, 5)),), dynamic_shapes=(DYNAMIC,))
    fixed = torch.export.export(
        model, (torch.randint(11, (3, 7)),), dynamic_shapes=({0: Dim.DYNAMIC},)
    ).run_decompositions({torch.ops.elman.layer.default: unrolled})
    assert layer_operators(fixed) == 0
    words, files = (
        torch.randint(11, (2, 7)),
        [tmp_path / name for name in ("words", "a.pt2", "b.pt2", "results")],
    )
    torch.save(words, files[0])
    torch.export.save(exported, files[1])
    torch.export.save(fixed, files[2])
    assert_equal(torch.export.load(files[1]).module()(words), model(words))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, whole = torch.load(files[3])
    assert_equal(whole, model(words))
    truth = model.double()(words)
    assert error(plain, truth) <= tolerance(torch.float32)


def test_a_graph_trains():
    model = Tagger()
    trained = torch.export.export(model, (torch.randint(11, (3, 5)),), dynamic_shapes=(DYNAMIC,)).module()
    assert {n: p.shape for n, p in trained.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    words, classes = torch.randint(11, (4, 9)), torch.randint(3, (4, 9))
    gradients = []
    for module in (trained, model):
        loss = nn.functional.nll_loss(module(words).flatten(0, 1), classes.flatten())
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values()))
        gradients.append(dict(zip(parameters, found, strict=True)))
    for name, gradient in gradients[1].items():
        assert gradient.abs().sum() > 0
        assert error(gradients[0][name], gradient) <= tolerance(torch.float32), name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is (deprecated|not supported)")
@pytest.mark.skipif(not has_compiler(), reason="AOTInductor needs a C++ compiler")
def test_compiled_ahead_of_time(tmp_path):
    """AOTInductor calls the operator as it is: its package needs a Python process that imported elman."""
    model = Tagger().eval()
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randint(11, (3, 5)),), dynamic_shapes=(DYNAMIC,))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        compiled = torch._inductor.aoti_load_package(package)
        for T, B in SIZES:
            words = torch.randint(11, (B, T))
            expected = model.double()(words)
            model.float()
            assert error(compiled(words), expected) <= tolerance(torch.float32)
