"""The five documents that the project starts from, each computed plainly and then with this package."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from elman import Elman, ElmanCell, ElmanNetwork, elman
from tests.helpers import DEVICE, DTYPES, TRITON, error
from tests.tolerances import CHAOTIC, PRINTED, tolerance

FLOAT64 = {"device": DEVICE, "dtype": torch.float64}


def tensor(rows, dtype=torch.float64):
    return torch.tensor(rows, device=DEVICE, dtype=dtype)


def fitting(backend):
    """The backend for document 0: resident has no room for 128 x 128 in float64, so the kernel that has."""
    return "triton" if backend == "triton:resident" else backend


class Document0:
    """h_t = tanh(W_h x_t + U_h h_{t-1} + b_h), y_t = tanh(W_y h_t + b_y); sizes 100, 128, 10."""

    def __init__(self):
        self.W_h, self.U_h = torch.randn(128, 100, **FLOAT64), torch.randn(128, 128, **FLOAT64)
        self.W_y = torch.randn(10, 128, **FLOAT64)
        self.b_h, self.b_y = torch.zeros(128, **FLOAT64), torch.zeros(10, **FLOAT64)

    def step(self, x, h):
        h = torch.tanh(self.W_h @ x + self.U_h @ h + self.b_h)
        return torch.tanh(self.W_y @ h + self.b_y), h

    def sequence(self, xs, h):
        ys, hs = [], []
        for x in xs:
            y, h = self.step(x, h)
            ys.append(y)
            hs.append(h)
        return torch.stack(ys), torch.stack(hs)

    def uniform(self):
        for parameter in (self.W_h, self.U_h, self.W_y, self.b_h, self.b_y):
            nn.init.uniform_(parameter, -1, 1)

    def recurrence(self, suffix=""):
        """Its weights under nn.RNN's names ("_l0") or nn.RNNCell's (""): of two biases one is zero."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        values = (self.W_h, self.U_h, self.b_h, torch.zeros_like(self.b_h))
        return {name + suffix: value for name, value in zip(names, values, strict=True)}

    def network(self, backend):
        network = ElmanNetwork(100, 128, 10, backend=fitting(backend), **FLOAT64)
        network.rnn.load_state_dict(self.recurrence("_l0"))
        network.output.load_state_dict({"weight": self.W_y, "bias": self.b_y})
        return network


def test_0_one_step(backend):
    document = Document0()
    x, h = torch.randn(100, **FLOAT64), torch.zeros(128, **FLOAT64)
    y, h_n = document.network(backend)(x, h)
    assert y.shape == (10,)
    assert h_n.shape == (128,)
    assert (h_n.abs() > 0.99).double().mean() > 0.7  # standard normal weights: tanh saturates
    expected = document.step(x, h)
    assert error(y, expected[0]) <= tolerance(torch.float64)
    assert error(h_n, expected[1]) <= tolerance(torch.float64)


@pytest.mark.parametrize("weights", ["normal", "uniform"])
def test_0_ten_steps(backend, weights):
    document = Document0()
    if weights == "uniform":
        document.uniform()
    network = document.network(backend)
    xs, h = torch.randn(10, 100, **FLOAT64), torch.zeros(128, **FLOAT64)
    ys, hs = document.sequence(xs, h)
    y, h_n = network(xs, h[None])  # all at once
    assert y.shape == (10, 10)
    assert error(y, ys) <= CHAOTIC
    assert error(h_n[0], hs[-1]) <= CHAOTIC
    collected = []
    for x in xs:  # and step by step, the state carried by hand, as the document does
        y, h = network(x, h)
        collected.append(y)
    assert error(torch.stack(collected), ys) <= CHAOTIC
    assert error(h, hs[-1]) <= CHAOTIC


def test_0_rnn_and_cell_are_the_formula(backend):
    """nn.RNN takes a sequence, nn.RNNCell a step; neither has the output layer, both have two biases."""
    document = Document0()
    document.b_h = torch.randn(128, **FLOAT64)
    xs, h = torch.randn(10, 100, **FLOAT64), torch.zeros(128, **FLOAT64)
    _, hs = document.sequence(xs, h)

    for rnn in (nn.RNN(100, 128, **FLOAT64), Elman(100, 128, backend=fitting(backend), **FLOAT64)):
        rnn.load_state_dict(document.recurrence("_l0"))
        output, h_n = rnn(xs, h[None])
        assert output.shape == (10, 128)
        assert error(output, hs) <= CHAOTIC
        assert torch.equal(output[-1], h_n[0])

    for cell in (nn.RNNCell(100, 128, **FLOAT64), ElmanCell(100, 128, backend=backend, **FLOAT64)):
        cell.load_state_dict(document.recurrence())
        state, states = h, []
        for x in xs:
            state = cell(x, state)
            states.append(state)
        assert error(torch.stack(states), hs) <= CHAOTIC


TEXT = (
    """the clock struck one and down he ran. the clock struck two and up she flew. the clock struck three
and so did we. the clock struck four and shut the door. the clock struck five and came alive. """
    * 8
)
ALPHABET = sorted(set(TEXT))
CHARACTERS = torch.tensor([ALPHABET.index(c) for c in TEXT])


class Document1:
    """h_t = tanh(x_t Wx + h_{t-1} Wh + b), logits from a linear layer; weights (in, out), sigma 0.01."""

    def __init__(self, hidden, seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return (torch.randn(shape, generator=generator) * 0.01).to(DEVICE).requires_grad_()

        self.Wx, self.Wh = normal(len(ALPHABET), hidden), normal(hidden, hidden)
        self.b = torch.zeros(hidden, device=DEVICE, requires_grad=True)
        self.Wo, self.bo = normal(hidden, len(ALPHABET)), torch.zeros(len(ALPHABET), device=DEVICE)
        self.parameters = [self.Wx, self.Wh, self.b, self.Wo, self.bo.requires_grad_()]

    def states_by_hand(self, xs, h):
        hs = []
        for x in xs:
            h = torch.tanh(x @ self.Wx + h @ self.Wh + self.b)
            hs.append(h)
        return torch.stack(hs), h

    def states(self, xs, h, backend):
        weights = [self.Wx.t(), self.Wh.t(), self.b, torch.zeros_like(self.b)]
        hs, h_n = elman(xs, None if h is None else h[None], weights, backend=backend)
        return hs, h_n[0]

    def train(self, batch, steps, chunks, rate, backend=None):
        """Truncated backpropagation with clipped gradients; the loss of every chunk."""
        columns = CHARACTERS[: len(CHARACTERS) // batch * batch].view(batch, -1).t().to(DEVICE)
        optimizer = torch.optim.Adam(self.parameters, lr=rate)
        losses = []
        h, start = None, 0
        for _ in range(chunks):
            if start + steps >= len(columns):
                h, start = None, 0
            xs = nn.functional.one_hot(columns[start : start + steps], len(ALPHABET)).float()
            targets = columns[start + 1 : start + steps + 1]
            start += steps
            if backend is None:
                hs, h = self.states_by_hand(xs, torch.zeros(batch, len(self.b)).to(xs) if h is None else h)
            else:
                hs, h = self.states(xs, h, backend)
            logits = hs @ self.Wo + self.bo
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            h = h.detach()
            losses.append(loss.item())
        return losses


def test_1_recurrence(backend):
    document = Document1(16, seed=0)
    assert (document.Wx.shape, document.Wh.shape) == ((len(ALPHABET), 16), (16, 16))
    xs = torch.randn(5, 2, len(ALPHABET), device=DEVICE)
    expected, last = document.states_by_hand(xs, torch.zeros(2, 16, device=DEVICE))
    hs, h = document.states(xs, None, backend)  # the state defaults to zeros
    bound = tolerance(torch.float32)
    assert error(hs, expected) <= bound
    assert error(h, last) <= bound
    # The transpose of nn.RNN's layout, and so of its parameters.
    rnn = nn.RNN(len(ALPHABET), 16, device=DEVICE)
    weights = (document.Wx.t(), document.Wh.t(), document.b, torch.zeros_like(document.b))
    rnn.load_state_dict(dict(zip(rnn.state_dict(), weights, strict=True)))
    assert error(hs, rnn(xs)[0]) <= bound


def test_1_training(backend):
    """The losses of a few chunks are those of the recurrence written out."""
    few = backend in TRITON and DEVICE == "cpu"
    sizes = {"batch": 2, "steps": 3, "chunks": 3} if few else {"batch": 4, "steps": 16, "chunks": 20}
    losses = Document1(8, seed=1).train(**sizes, rate=0.01, backend=backend)
    by_hand = Document1(8, seed=1).train(**sizes, rate=0.01)
    assert by_hand[0] == pytest.approx(math.log(len(ALPHABET)), rel=1e-3)  # sigma 0.01: uniform at first
    assert losses == pytest.approx(by_hand, rel=1e-5)


def test_1_perplexity():
    losses = Document1(64, seed=2).train(batch=8, steps=24, chunks=300, rate=0.01, backend="eager")
    perplexity = math.exp(sum(losses[-25:]) / 25)
    assert math.exp(losses[0]) == pytest.approx(len(ALPHABET), rel=0.01)
    assert perplexity < 3, f"uniform is {len(ALPHABET)}"


PRINTED_2 = [[-0.3519801, 0.52525216], [-0.68424344, 0.76074266], [-0.8649416, 0.90466356]]


def test_2_printed_numbers(backend):
    torch.manual_seed(1)
    layer = Elman(input_size=5, hidden_size=2, num_layers=1, batch_first=True, backend=backend).to(DEVICE)
    xs = tensor([[[1.0] * 5, [2.0] * 5, [3.0] * 5]], torch.float32)
    output, h_n = layer(xs)
    assert output.shape == (1, 3, 2)
    assert torch.equal(output[:, -1], h_n[0])
    assert (output[0] - tensor(PRINTED_2)).abs().max() <= PRINTED
    h = torch.zeros(2, device=DEVICE)
    for x, expected in zip(xs[0], PRINTED_2, strict=True):  # the same by unrolling
        h = torch.tanh(layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ h + layer.bias_hh_l0)
        assert (h - tensor(expected)).abs().max() <= PRINTED


@pytest.mark.parametrize("size", [0.5, 1.0, 1.5])
def test_2_gradient_over_time(backend, size):
    """|W_hh| to the power of the distance in time is what is left of a gradient; tanh can only shrink it."""
    T, H = 6, 4
    w_hh = size * torch.linalg.qr(torch.randn(H, H, **FLOAT64)).Q
    layer = Elman(H, H, bias=False, backend=backend, **FLOAT64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(H))
        layer.weight_hh_l0.copy_(w_hh)

    def norms(xs):
        xs = xs.requires_grad_()
        (grad,) = torch.autograd.grad(layer(xs)[1][0, 0], xs, torch.ones(H, **FLOAT64) / H**0.5)
        return grad[:, 0].norm(dim=-1)

    distance = torch.arange(T - 1, -1, -1, **FLOAT64)
    linear = norms(torch.zeros(T, 1, H, **FLOAT64))  # a state of zero, where the derivative of tanh is one
    assert error(linear, size**distance) <= tolerance(torch.float64)
    saturated = norms(torch.randn(T, 1, H, **FLOAT64))
    assert (saturated < size**distance).all()


def test_2_one_unit_alone(backend):
    """A scalar recurrence: the gradient is the product of w (1 - h^2) over the steps."""
    layer = Elman(1, 1, bias=False, backend=backend, **FLOAT64)
    xs = tensor([0.3, -0.2, 0.1]).view(3, 1, 1).requires_grad_()
    output, _ = layer(xs)
    (grad,) = torch.autograd.grad(output[-1].sum(), xs)
    w, u = layer.weight_hh_l0.item(), layer.weight_ih_l0.item()
    slopes = [1 - h.item() ** 2 for h in output.flatten()]
    expected = [u * w * w * math.prod(slopes), u * w * math.prod(slopes[1:]), u * slopes[2]]
    assert error(grad.flatten(), tensor(expected)) <= tolerance(torch.float64)


X0 = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]
X1 = [[9, 8, 7], [0, 0, 0], [6, 5, 4], [3, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("inputs", "neurons"), [(4, 1), (3, 5)])
def test_3_two_steps_unrolled(backend, inputs, neurons, dtype):
    x0, x1 = (nn.functional.pad(tensor(x, dtype), (0, inputs - 3)) for x in (X0, X1))
    Wx = torch.randn(inputs, neurons, device=DEVICE, dtype=dtype)
    Wy = torch.randn(neurons, neurons, device=DEVICE, dtype=dtype)
    b = torch.zeros(neurons, device=DEVICE, dtype=dtype)
    y0 = torch.tanh(x0 @ Wx + b)
    y1 = torch.tanh(y0 @ Wy + x1 @ Wx + b)

    xs = torch.stack([x0, x1])
    weights = {"weight_ih_l0": Wx.t(), "weight_hh_l0": Wy.t(), "bias_ih_l0": b, "bias_hh_l0": b}
    layer = Elman(inputs, neurons, device=DEVICE, dtype=dtype, backend=backend)
    layer.load_state_dict(weights)
    output, h_n = layer(xs)
    assert output.shape == (2, 4, neurons)
    for actual, expected in ((output[0], y0), (output[1], y1), (h_n[0], y1)):
        assert error(actual, expected) <= tolerance(dtype)


class Document4:
    def __init__(self, backend, dtype=torch.float64):
        self.layer = Elman(1, 1, bias=False, batch_first=True, device=DEVICE, dtype=dtype, backend=backend)

    def by_hand(self, *xs):
        w, u = (float(self.layer.state_dict()[name]) for name in ("weight_ih_l0", "weight_hh_l0"))
        h, hs = 0.0, []
        for x in xs:
            h = math.tanh(w * x + u * h)
            hs.append(h)
        return hs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4_three_numbers(backend, dtype):
    document = Document4(backend, dtype)
    assert list(document.layer.state_dict()) == ["weight_ih_l0", "weight_hh_l0"]
    assert [name for name, _ in document.layer.named_parameters()] == ["weight_ih_l0", "weight_hh_l0"]
    output, h_n = document.layer(tensor([3, 4, 5], dtype).view(1, 3, 1))
    assert output.shape == (1, 3, 1)
    assert h_n.shape == (1, 1, 1)
    h1, h2, h3 = document.by_hand(3, 4, 5)
    assert error(output.flatten(), tensor([h1, h2, h3])) <= tolerance(dtype)
    assert error(h_n.flatten(), tensor([h3])) <= tolerance(dtype)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_4_packed_sequences(backend, enforce_sorted):
    document = Document4(backend)
    rows = [(3, 4, 5), (6, 7), (8,)] if enforce_sorted else [(8,), (3, 4, 5), (6, 7)]
    padded = nn.utils.rnn.pad_sequence([tensor(row) for row in rows], batch_first=True)[..., None]
    lengths = [len(row) for row in rows]
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    output, h_n = document.layer(packed)
    assert output.batch_sizes.tolist() == [3, 2, 1]
    unpacked, unpacked_lengths = pad_packed_sequence(output, batch_first=True)
    assert unpacked_lengths.tolist() == lengths
    for row, states, last in zip(rows, unpacked[..., 0], h_n[0, :, 0], strict=True):
        expected = document.by_hand(*row)
        assert error(states, tensor(expected + [0.0] * (3 - len(row)))) <= tolerance(torch.float64)
        assert error(last, tensor(expected[-1])) <= tolerance(torch.float64)
