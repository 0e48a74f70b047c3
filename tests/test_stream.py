"""Stream: windows together are one sequence, and nothing else of the state gets out of a call."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.testing import assert_close

import elman
from elman import Elman, ElmanNetwork, Stream
from tests.helpers import DEVICE, copy_of

F64 = torch.float64
WINDOWS = (4, 1, 1, 3)  # a few steps, generation, a few steps

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
each_static = pytest.mark.parametrize("static", [False, True], ids=["moving", "static"])


def layer(kind: type = Elman, **options: object) -> nn.Module:
    sizes = (3, 4, 2) if kind is ElmanNetwork else (3, 4)
    return kind(*sizes, **{"device": DEVICE, "dtype": F64, **options})


def numbers(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


class Recorder(nn.Module):
    """A module of the user's own: characters in, hidden states out, and what came with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, device=DEVICE, dtype=F64)
        self.rnn = layer(batch_first=True)
        self.seen: list = []

    def forward(self, input: Tensor, hx: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
        self.seen.append((hx, options))
        return self.rnn(self.embedding(input), hx)


class Broadcasting(nn.Module):
    """A loop by hand, which adds a state of one row to any batch without a word."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = input.new_zeros(1, *input.shape[1:]) if hx is None else hx
        output = []
        for x in input:
            h = torch.tanh(x + h)
            output.append(h[0])
        return torch.stack(output), h


@each_static
@pytest.mark.parametrize(
    ("kind", "options", "batch"),
    [
        (Elman, {}, 2),
        (Elman, {}, None),
        (Elman, {"num_layers": 3, "nonlinearity": "relu"}, 2),
        (Elman, {"batch_first": True}, 2),
        (Elman, {"num_layers": 2, "batch_first": True, "bias": False}, None),
        (ElmanNetwork, {"num_layers": 2}, 2),
        (ElmanNetwork, {"batch_first": True}, 2),
        (nn.RNN, {}, 2),
        (nn.GRU, {"num_layers": 2}, None),
    ],
)
def test_windows_together_are_one_sequence(kind, options, batch, static):
    stream = Stream(layer(kind, **options), static=static)
    time = 1 if batch and "batch_first" in options else 0
    x = numbers(*{0: (9, batch, 3) if batch else (9, 3), 1: (batch, 9, 3)}[time])
    whole, last = stream.layer(x)
    for _ in range(2):  # the second time after a reset
        results = [stream(window) for window in x.split(WINDOWS, time)]
        assert_close(torch.cat([output for output, _ in results], time), whole)
        assert_close(results[-1][1], last)
        assert_close(stream.state, last)
        stream.reset()


def test_one_step_of_a_network_without_a_time():
    stream = Stream(layer(ElmanNetwork))
    x = numbers(5, 3)
    whole, last = stream.layer(x)
    assert_close(torch.stack([stream(x_t)[0] for x_t in x]), whole)
    assert_close(stream.state, last[0])
    stream.reset()
    stream(x[:4])
    assert_close(stream(x[4])[0], whole[4])


@each_static
def test_each_windows_gradients_are_those_of_nn_rnn_with_detach(static):
    """The backward passes only after all the windows, the last first: no window spoils another's."""
    stream = Stream(layer(num_layers=2), static=static)
    by_hand = copy_of(stream.layer)
    x, hx, losses = numbers(9, 2, 3).requires_grad_(), None, []
    for window in x.split(WINDOWS):
        ours, theirs = stream(window), by_hand(window, hx)
        hx = theirs[1].detach()
        losses.append([output.square().sum() + h_n.sin().sum() for output, h_n in (ours, theirs)])
        assert not stream.state.requires_grad
    for ours, theirs in reversed(losses):
        assert_close(
            torch.autograd.grad(ours, [x, *stream.layer.parameters()]),
            torch.autograd.grad(theirs, [x, *by_hand.parameters()]),
        )


def test_no_gradient_reaches_the_window_before():
    stream = Stream(layer())
    first, second = numbers(4, 2, 3).requires_grad_(), numbers(4, 2, 3).requires_grad_()
    stream(first)
    output, h_n = stream(second)
    g1, g2 = torch.autograd.grad(output.sum() + h_n.sum(), [first, second], allow_unused=True)
    assert g1 is None
    assert g2.abs().min() > 0


@each_static
@pytest.mark.parametrize(
    ("rows", "ended"),
    [
        (torch.tensor([False, True, False, True]), [1, 3]),
        (torch.tensor([False] * 4), []),
        (torch.tensor([3, 1]), [1, 3]),
        (torch.tensor([-1, 1, 1]), [1, 3]),
        (torch.tensor(0), [0]),
        (torch.tensor([], dtype=torch.int64), []),
        (2, [2]),
        (-1, [3]),
    ],
    ids=["mask", "no mask", "numbers", "from the end", "scalar", "no numbers", "one", "the last"],
)
def test_reset_of_rows(rows, ended, static):
    """Those rows go on as if they began, the others as if nothing were; NaN is gone too."""
    stream = Stream(layer(num_layers=2), static=static)
    stream.reset(rows)  # before any call there is nothing to reset
    assert stream.state is None
    x = numbers(6, 4, 3)
    _, h_n = stream(x[:3])
    before = h_n.detach().clone()
    spoilt, expected = before.clone(), before.clone()
    spoilt[:, ended] = float("nan")
    expected[:, ended] = 0
    stream.state = spoilt
    stream.reset(rows)
    assert_close(stream.state, expected, rtol=0, atol=0)
    assert_close(h_n.detach(), before, rtol=0, atol=0)
    assert_close(stream(x[3:]), stream.layer(x[3:], expected))
    if isinstance(rows, Tensor):  # where the state lies as well as on the CPU
        stream.state = spoilt
        stream.reset(rows.to(DEVICE))
        assert_close(stream.state, expected, rtol=0, atol=0)


@each_static
def test_reset_leaves_the_graphs_of_earlier_windows_alone(static):
    stream = Stream(layer(), static=static)
    x = numbers(6, 2, 3)
    _, hx = stream(x[:3])
    losses = []
    for output, h_n in (stream(x[3:]), stream.layer(x[3:], hx.detach())):
        losses.append(output.sum() + h_n.square().sum())  # h_n is saved too
    stream.reset(1)
    stream.reset()
    assert_close(*(torch.autograd.grad(loss, list(stream.parameters())) for loss in losses))


def test_reset_says_what_is_wrong():
    stream = Stream(layer())
    stream(numbers(2, 4, 3))
    for rows in (True, [0], "all"):
        with pytest.raises(TypeError, match=r"rows is a \w+; expected None, an int or a tensor"):
            stream.reset(rows)
    with pytest.raises(TypeError, match=r"rows is torch.float32; expected torch.bool or torch.int64"):
        stream.reset(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"rows is a mask of shape \(3,\); expected \(4,\)"):
        stream.reset(torch.ones(3, dtype=torch.bool))
    for rows in (4, -5):
        with pytest.raises(IndexError, match=rf"rows is {rows}; expected -4 to 3, as the state has 4 rows"):
            stream.reset(rows)
    stream.reset()
    stream(numbers(2, 3))
    with pytest.raises(
        RuntimeError, match=r"state without a batch, shape \(1, 4\); expected none: reset\(\)"
    ):
        stream.reset(0)


@each_static
def test_a_state_that_is_set(static):
    stream = Stream(layer(), static=static)
    x, h = numbers(3, 2, 3), numbers(1, 2, 4)
    for _ in range(2):
        stream.state = h
        assert_close(stream(x), stream.layer(x, h))
    with pytest.raises(TypeError, match=r"state is a list; expected a torch.Tensor, or None for zeros"):
        stream.state = [0.0]
    stream.state = None
    assert stream.state is None


def test_a_learned_state_gets_its_gradient_from_the_first_window():
    stream = Stream(layer())
    start = nn.Parameter(numbers(1, 2, 4))
    x = numbers(6, 2, 3)
    stream.state = start
    assert {name for name, _ in stream.named_parameters()} == {
        f"layer.{name}" for name, _ in stream.layer.named_parameters()
    }
    first, second = stream(x[:3])[0], stream(x[3:])[0]
    expected = torch.autograd.grad(stream.layer(x[:3], start)[0].sum(), start)
    assert_close(torch.autograd.grad(first.sum(), start), expected)
    assert torch.autograd.grad(second.sum(), start, allow_unused=True) == (None,)


def test_the_state_is_no_parameter_and_no_buffer():
    """A buffer would be broadcast by DistributedDataParallel: every process would go on with the first's."""
    stream = Stream(layer())
    stream(numbers(2, 4, 3))
    assert list(stream.buffers()) == []
    assert set(stream.state_dict()) == {f"layer.{name}" for name in stream.layer.state_dict()}
    kept = stream.state.clone()
    stream.load_state_dict(Stream(layer()).state_dict())
    assert_close(stream.state, kept, rtol=0, atol=0)


@each_static
def test_the_state_goes_with_the_module(static):
    stream = Stream(layer(), static=static)
    x = numbers(6, 2, 3)
    stream(x[:3])
    kept = stream.state.clone()
    for other in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert other.static == static
        assert_close(other.state, kept, rtol=0, atol=0)
        other(x[3:])
        assert_close(stream.state, kept, rtol=0, atol=0)
    assert stream.float().state.dtype == torch.float32
    assert stream(x[3:].float())[0].dtype == torch.float32
    assert nn.Sequential(stream).to("meta")[0].state.device.type == "meta"


def test_options_and_other_inputs_are_handed_on():
    stream = Stream(Recorder())
    tokens, resets = torch.randint(5, (2, 7), device=DEVICE), object()
    whole, _ = stream.layer(tokens)
    first, h_n = stream(tokens[:, :3], resets=resets)
    second, _ = stream(tokens[:, 3:])
    assert_close(torch.cat([first, second], 1), whole)
    (none, options), (hx, no_options) = stream.layer.seen[1:]
    assert none is None
    assert options == {"resets": resets}
    assert_close(hx, h_n.detach(), rtol=0, atol=0)
    assert no_options == {}


@pytest.mark.parametrize("kind", [Elman, ElmanNetwork])
def test_rows_that_end_within_a_window_and_between(kind):
    stream = Stream(layer(kind, num_layers=2, batch_first=True))
    x, resets = numbers(2, 9, 3), torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    resets[0, [2, 4]] = resets[1, 7] = True
    first, _ = stream(x[:, :4], resets=resets[:, :4])
    stream.reset(0)  # what resets[0, 4] says
    second, _ = stream(x[:, 4:], resets=resets[:, 4:] & torch.tensor([[False], [True]], device=DEVICE))
    for row, ends in enumerate(([2, 2, 5], [7, 2])):
        whole = torch.cat([stream.layer(part)[0] for part in x[row].split(ends)])
        assert_close(torch.cat([first[row], second[row]]), whole)


def test_rows_of_packed_sequences_keep_their_order_and_their_own_last_steps():
    stream = Stream(layer(num_layers=2))
    lengths = [(2, 4, 1), (3, 1, 5), (1, 1, 1)]
    rows = [numbers(sum(n), 3) for n in zip(*lengths, strict=True)]
    windows = zip(*(row.split([n[i] for n in lengths]) for i, row in enumerate(rows)), strict=True)
    outputs = []
    for window in windows:
        output, h_n = stream(pack_sequence(window, enforce_sorted=False))
        outputs.append(unpack_sequence(output))
    for i, row in enumerate(rows):
        whole, last = stream.layer(row)
        assert_close(torch.cat([output[i] for output in outputs]), whole)
        assert_close(h_n[:, i], last)
    message = r"the input has a batch of 2 and the state of the call before a batch of 3"
    with pytest.raises(RuntimeError, match=message):
        stream(pack_sequence(rows[:2], enforce_sorted=False))


@pytest.mark.parametrize(
    ("before", "now", "to", "message"),
    [
        ((5, 3, 3), (5, 2, 3), F64, r"has a batch of 2 and the state .* a batch of 3, shape \(2, 3, 4\)"),
        ((5, 3, 3), (5, 3), F64, r"has no batch and the state .* a batch of 3, shape \(2, 3, 4\)"),
        ((5, 3), (5, 3, 3), F64, r"has a batch of 3 and the state .* no batch, shape \(2, 4\)"),
        ((5, 3, 3), (5, 3, 3), torch.float32, "is torch.float32 and the state .* torch.float64"),
        ((5, 3, 3), (5, 3, 3), "meta", f"is on meta and the state .* on {DEVICE}"),
    ],
    ids=["another batch", "no batch", "a batch", "dtype", "device"],
)
@pytest.mark.parametrize("kind", [Elman, ElmanNetwork, nn.RNN])
def test_an_input_that_does_not_go_with_the_state(kind, before, now, to, message):
    stream = Stream(layer(kind, num_layers=2))
    static = Stream(stream.layer, static=True)
    before, now = numbers(*before), numbers(*now).to(to)
    for module, remedy in (
        (stream, r"call stream.reset\(\) first"),
        (static, "set stream.state = None first, and capture CUDA graphs anew"),
    ):
        module(before)
        kept = module.state
        with pytest.raises(RuntimeError, match=rf"^the input {message}.*; expected .*{remedy}$"):
            module(now)
        assert module.state is kept
    stream.reset()
    static.state = None
    if to == F64:
        assert_close(stream(now), stream.layer(now))
        assert_close(static(now), stream.layer(now))


def test_batch_first_says_which_size_is_the_batch():
    stream = Stream(layer(batch_first=True))
    stream(numbers(3, 5, 3))
    with pytest.raises(RuntimeError, match="a batch of 2 and the state of the call before a batch of 3"):
        stream(numbers(2, 5, 3))
    stream(numbers(3, 7, 3))


def test_a_module_that_would_broadcast_the_state():
    stream = Stream(Broadcasting())
    stream(numbers(2, 1, 3))
    kept = stream.state
    with pytest.raises(RuntimeError, match=r"made h_n of shape \(1, 4, 3\) of a state of shape \(1, 1, 3\)"):
        stream(numbers(2, 4, 3))
    assert stream.state is kept


def test_what_can_not_be_streamed():
    for kind in (Elman, ElmanNetwork, nn.RNN):
        with pytest.raises(ValueError, match="layer is bidirectional; expected one direction"):
            Stream(layer(kind, bidirectional=True))
    with pytest.raises(TypeError, match=r"layer is a function; expected a module such as elman.Elman"):
        Stream(layer)
    with pytest.raises(TypeError, match=r"LSTM returned \(Tensor, tuple\); expected \(output, h_n\)"):
        Stream(layer(nn.LSTM))(numbers(2, 2, 3))
    with pytest.raises(TypeError, match=r"RNNCell returned a Tensor; expected \(output, h_n\)"):
        Stream(layer(nn.RNNCell))(numbers(2, 3))
    with pytest.raises(TypeError, match=r"hx came with the call; expected none, .* set stream.state = hx"):
        Stream(layer())(numbers(2, 2, 3), hx=numbers(1, 2, 4))
    stream = Stream(layer())
    for _ in range(2):
        with pytest.raises(TypeError, match=r"input is a list; expected a torch.Tensor"):
            stream([numbers(2, 3)])
        stream(numbers(2, 2, 3))


@each_static
def test_training_after_inference_mode_and_no_grad(static):
    """A state that was made in inference mode can't be saved for a backward pass: the next call copies it."""
    stream = Stream(layer(), static=static)
    x = numbers(12, 2, 3)
    with torch.inference_mode():
        stream(x[:3])
    assert stream.state.is_inference()
    output, _ = stream.train()(x[3:6])
    output.sum().backward()
    with torch.no_grad():
        stream.eval()(x[6:9])
    last, h_n = stream.train()(x[9:])
    whole, end = stream.layer(x)
    assert_close(torch.cat([output, last]), torch.cat([whole[3:6], whole[9:]]))
    assert_close(h_n, end)
    with torch.inference_mode():
        stream(x[:3])
    stream.reset(0)
    stream(x[3:6])[0].sum().backward()


def test_autocast():
    stream = Stream(layer(dtype=torch.float32))
    x = numbers(6, 2, 3, dtype=torch.float32)
    stream(x[:3])
    with torch.autocast(DEVICE, torch.bfloat16):
        output, h_n = stream(x[3:])
        assert output.dtype == h_n.dtype == stream.state.dtype == torch.bfloat16
        stream(x[3:])
    with pytest.raises(
        RuntimeError, match=r"the input is torch.float32 and the state .* torch.bfloat16; expected"
    ):
        stream(x)
    stream.float()
    stream(x)
    static = Stream(stream.layer, static=True)
    static(x)
    place = static.state.data_ptr()
    with torch.autocast(DEVICE, torch.bfloat16):
        _, h_n = static(x)
    assert static.state.data_ptr() == place
    assert_close(static.state, h_n.float(), rtol=0, atol=0)


@pytest.fixture
def counter(fresh_compiler):
    """A backend for torch.compile, which counts what it compiled."""
    return CompileCounterWithBackend("aot_eager")


def carry_on(compiled: nn.Module, plain: Stream, grad: bool) -> None:
    """Both called alike, with resets between, give the same, states and gradients included."""
    for i in range(8):
        x = numbers(3, 2, 3)
        results = []
        for module in (compiled, plain):
            output, h_n = module(x)
            parameters = list(module.parameters()) if grad else []
            found = torch.autograd.grad(output.sum() + h_n.sum(), parameters) if grad else ()
            results.append((output, h_n, *found))
            assert not module.state.requires_grad
            if i == 3:
                module.reset()
            elif i == 5:
                module.reset(1)
        assert_close(*results)
        assert_close(compiled.state, plain.state)


@pytest.mark.parametrize(("static", "grad"), [(False, True), (False, False), (True, False)])
def test_compiled_whole_and_once(counter, static, grad):
    """One graph for the first call, which has no state, and one for all that follow, resets between."""
    stream = Stream(layer(ElmanNetwork, num_layers=2), static=static)
    compiled = torch.compile(stream, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad):
        carry_on(compiled, copy.deepcopy(stream), grad)
        assert counter.frame_count == 2
        x, h = numbers(3, 2, 3), numbers(2, 2, 4)
        compiled.state = h
        assert_close(compiled(x), stream.layer(x, h))


def test_compiled_on_packed_sequences(counter):
    stream = Stream(layer())
    plain = copy.deepcopy(stream)
    compiled = torch.compile(stream, backend=counter, fullgraph=True)
    for _ in range(3):
        packed = pack_sequence([numbers(n, 3) for n in (2, 4, 3)], enforce_sorted=False)
        (output, h_n), (expected, last) = compiled(packed), plain(packed)
        assert_close((output.data, h_n), (expected.data, last))
        assert_close(stream.state, plain.state)
    assert counter.frame_count == 2


def test_static_and_compiled_and_training(counter):
    """torch.compile's backward pass would read the state after it was written over."""
    stream = Stream(layer(num_layers=2), static=True)
    plain = copy.deepcopy(stream)
    with pytest.raises(Exception, match="the stream is static, compiled and training"):
        torch.compile(stream, backend=counter, fullgraph=True)(numbers(3, 2, 3))
    carry_on(torch.compile(stream, backend=counter), plain, grad=True)  # the stream in Python, then


@each_static
def test_a_compiled_layer_within_a_stream(counter, static):
    stream = Stream(layer(num_layers=2), static=static)
    plain = copy.deepcopy(stream)
    stream.layer.compile(backend=counter, fullgraph=True)
    carry_on(stream, plain, grad=True)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_training_step_with_its_reset():
    stream = Stream(layer())
    plain = Stream(stream.layer)

    def step(stream, x, ended):
        output, _ = stream(x)
        stream.reset(ended)
        return output

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        x, ended = numbers(3, 2, 3), torch.tensor([True, False], device=DEVICE)
        assert_close(compiled(stream, x, ended), step(plain, x, ended))
        assert_close(stream.state, plain.state)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_where_a_state_would_be_lost(monkeypatch):
    stream = Stream(layer())
    x = numbers(3, 2, 3)
    with pytest.raises(RuntimeError, match=r"the stream is exported, .* use stream.layer there"):
        torch.export.export(stream, (x,))
    with pytest.raises(RuntimeError, match=r"the stream is traced, .* use stream.layer there"):
        torch.jit.trace(stream, (x,))
    with pytest.raises(RuntimeError, match=r"within a transform of torch.func, .* use stream.layer there"):
        torch.func.grad(lambda x: stream(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match=r"nn.DataParallel makes a copy .*: use nn.parallel.Distributed"):
        stream._replicate_for_data_parallel()
    assert stream.state is None
    static = Stream(layer(), static=True)
    monkeypatch.setattr(elman.stream, "_is_capturing", lambda input: True)
    for module in (stream, static):
        with pytest.raises(RuntimeError, match=r"the state is None while a CUDA graph is captured"):
            module(x)
    stream.state = static.state = numbers(1, 2, 4)
    with pytest.raises(RuntimeError, match=r"the state is not static while .* Stream\(layer, static=True\)"):
        stream(x)
    static(x)


def test_a_static_state_stays_where_it_is():
    stream = Stream(layer(), static=True)
    assert repr(stream).splitlines()[1].strip() == "static=True"
    x = numbers(3, 2, 3)
    _, first = stream(x)
    place, kept = stream.state.data_ptr(), first.detach().clone()
    assert place != first.data_ptr()
    stream(x)
    assert_close(first.detach(), kept, rtol=0, atol=0)
    with torch.no_grad():
        stream(x)
    with torch.inference_mode():
        stream(x)
    stream.reset(1)
    stream.reset()
    assert_close(stream.state, torch.zeros_like(kept), rtol=0, atol=0)
    stream.state = kept
    assert stream.state.data_ptr() == place
    assert_close(stream.state, kept, rtol=0, atol=0)
    stream.state = numbers(1, 1, 4)  # not broadcast
    assert stream.state.shape == (1, 1, 4)
    stream.state = None
    stream(numbers(3, 5, 3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("grad", [False, True], ids=["generation", "training"])
def test_a_cuda_graph_goes_on_from_replay_to_replay(grad):
    stream = Stream(layer(dtype=torch.float32), static=True)
    parameters = list(stream.parameters()) if grad else []
    x = numbers(6, 2, 3, dtype=torch.float32)
    window = torch.zeros_like(x[:2])

    def step():
        output, _ = stream(window)
        return output, torch.autograd.grad(output.square().sum(), parameters) if grad else ()

    with torch.set_grad_enabled(grad):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and makes the state
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            stream.reset()
            hx = None
            for i in range(0, 6, 2):
                window.copy_(x[i : i + 2])
                graph.replay()
                output, h_n = stream.layer(window, hx)
                expected = torch.autograd.grad(output.square().sum(), parameters) if grad else ()
                hx = h_n.detach()
                assert_close(captured, (output, expected))
                assert_close(stream.state, hx)
                if i == 2:
                    stream.reset(1)
                    hx[:, 1] = 0


def test_the_examples_of_the_docstring_run():
    test = doctest.DocTestFinder(recurse=False).find(Stream, "Stream")[0]
    assert len(test.examples) > 10
    results = doctest.DocTestRunner().run(test)
    assert results.attempted == len(test.examples)
    assert results.failed == 0
