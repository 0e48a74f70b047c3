"""Every mistake raises nn.RNN's type where nn.RNN raises for it, in a sentence, and before anything ran.

Where nn.RNN and nn.RNNCell raise, they are run on the same mistake and their type is the expected one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import elman
from elman import Elman, ElmanCell, ElmanNetwork

I, H = 5, 7


def rand(*shape, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device) / 3


def packed(dtype=torch.float32, I=I, ordered=True) -> PackedSequence:
    lengths = (3, 2) if ordered else (2, 3)
    return pack_sequence([rand(n, I, dtype=dtype) for n in lengths], enforce_sorted=ordered)


F64, I64, BF16 = torch.float64, torch.int64, torch.bfloat16
X, HX = rand(3, 2, I), rand(1, 2, H)
META = HX.to("meta")
BROKEN = PackedSequence(rand(5, 2, I), torch.tensor([2, 2, 1]))


@dataclass
class Bad:
    """A call that must fail: what it is, the call, and words that the message must hold."""

    id: str
    call: Callable
    words: tuple[str, ...]
    options: dict = field(default_factory=dict)
    # nn.RNN's type is asked for unless it is an accident, an AttributeError out of the middle of it.
    accident: bool = False


def each(bads: list[Bad]):
    return pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in bads])


class Computed(TorchDispatchMode):
    """Notes the name of each operator that computes something."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "elman" or name in ("mm", "addmm", "addmm_", "bmm", "tanh", "relu", "linear"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def message_of(call: Callable, expected: type | tuple[type, ...], *words: str) -> str:
    """call() raises `expected` itself, with a message that is a sentence and holds these words."""
    before = torch.get_rng_state()
    with Computed() as computed, pytest.raises(Exception) as raised:  # noqa: PT011 (the type is compared below)
        call()
    message = str(raised.value)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert raised.type in expected, f"{raised.type.__name__}: {message}"
    for word in words:
        assert word in message, message
    assert computed.seen == [], "something ran before the error"
    assert torch.equal(torch.get_rng_state(), before)
    assert "\n" not in message
    assert 20 < len(message) < 400, "a sentence"
    return message


def same_mistake(bad: Bad, ours: nn.Module, theirs: nn.Module) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 (any type: it is the one asked of ours)
        bad.call(theirs)
    if bad.accident:
        assert raised.type is AttributeError
    for p in ours.parameters():
        p.grad = torch.full_like(p, 3)
    weights = {key: w.clone() for key, w in ours.state_dict().items()}
    message = message_of(lambda: bad.call(ours), TypeError if bad.accident else raised.type, *bad.words)
    assert "expected" in message
    for key, weight in ours.named_parameters():
        assert weight.is_meta or torch.equal(weight, weights[key])
        assert weight.is_meta or (weight.grad == 3).all()


LAYER = [
    Bad("rank 0", lambda m: m(rand()), ("input", "0 dimensions", "(T, B, I)")),
    Bad("rank 1", lambda m: m(rand(I)), ("input", "1 dimensions", "(5,)", "(T, B, I)", "(T, I)")),
    Bad("rank 4", lambda m: m(rand(1, 2, 3, I)), ("input", "4 dimensions", "(1, 2, 3, 5)")),
    Bad("rank 4 batch first", lambda m: m(rand(1, 2, 3, I)), ("(B, T, I)",), {"batch_first": True}),
    Bad("input size", lambda m: m(rand(3, 2, 6)), ("input", "6", "expected", "5")),
    Bad("input size unbatched", lambda m: m(rand(3, 6)), ("input", "6", "5")),
    Bad("input float64", lambda m: m(X.double()), ("input", "torch.float64", "input.to(torch.float32)")),
    Bad("input bfloat16", lambda m: m(X.bfloat16()), ("torch.bfloat16", "input.to(torch.float32)")),
    Bad("input int64", lambda m: m(X.long()), ("input", "torch.int64", "input.to(torch.float32)")),
    Bad("input bool", lambda m: m(X.bool()), ("input", "torch.bool", "torch.float32")),
    Bad("input complex", lambda m: m(X.cfloat()), ("input", "torch.complex64", "torch.float32")),
    Bad("weights complex", lambda m: m(X), ("torch.complex64", "float32"), {"dtype": torch.complex64}),
    Bad("input on meta", lambda m: m(X.to("meta")), ("cpu", "meta", "expected one", ".to(")),
    Bad("weights on meta", lambda m: m(X), ("cpu", "meta", "expected one"), {"device": "meta"}),
    Bad("hx on meta", lambda m: m(X, META), ("hx", "meta", "cpu", ".to(")),
    Bad("hx rank 2", lambda m: m(X, rand(2, H)), ("hx", "2 dimensions", "(2, 7)", "expected 3")),
    Bad("hx rank 4", lambda m: m(X, rand(1, 1, 2, H)), ("hx", "4 dimensions", "expected 3")),
    Bad("hx rank 3 unbatched", lambda m: m(rand(3, I), rand(1, 1, H)), ("hx", "3 dimensions", "expected 2")),
    Bad("hx rank 1 unbatched", lambda m: m(rand(3, I), rand(H)), ("hx", "1 dimensions", "expected 2")),
    Bad("hx layers", lambda m: m(X, rand(2, 2, H)), ("hx", "(2, 2, 7)", "expected (1, 2, 7)", "layers")),
    Bad("hx directions", lambda m: m(X, HX), ("(1, 2, 7)", "expected (2, 2, 7)"), {"bidirectional": True}),
    Bad("hx batch", lambda m: m(X, rand(1, 3, H)), ("hx", "(1, 3, 7)", "expected (1, 2, 7)", "batch")),
    Bad("hx batch first", lambda m: m(X, HX), ("(1, 2, 7)", "expected (1, 3, 7)"), {"batch_first": True}),
    Bad("hx hidden", lambda m: m(X, rand(1, 2, 8)), ("hx", "(1, 2, 8)", "expected (1, 2, 7)", "hidden size")),
    Bad("hx unbatched", lambda m: m(rand(3, I), rand(2, H)), ("hx", "(2, 7)", "expected (1, 7)")),
    Bad("hx float64", lambda m: m(X, HX.double()), ("hx", "torch.float64", "torch.float32", ".to(")),
    Bad("hx int64", lambda m: m(X, HX.long()), ("hx", "torch.int64", "torch.float32")),
    Bad("no steps", lambda m: m(rand(0, 2, I)), ("input", "(0, 2, 5)", "sequence length", "at least 1")),
    Bad("no steps unbatched", lambda m: m(rand(0, I)), ("input", "(0, 5)", "sequence length")),
    Bad("no steps, no rows", lambda m: m(rand(0, 0, I)), ("input", "(0, 0, 5)", "sequence length")),
    Bad("no steps batch first", lambda m: m(rand(2, 0, I)), ("(2, 0, 5)",), {"batch_first": True}),
    Bad("input a list", lambda m: m([[1.0] * I]), ("input", "list", "torch.Tensor"), accident=True),
    Bad("input an array", lambda m: m(X.numpy()), ("input", "ndarray", "torch.Tensor"), accident=True),
    Bad("input None", lambda m: m(None), ("input", "NoneType", "torch.Tensor"), accident=True),
    Bad("input a tuple", lambda m: m((X, HX)), ("input", "tuple", "torch.Tensor"), accident=True),
    Bad("hx a tuple", lambda m: m(X, (HX, HX)), ("hx", "tuple", "torch.Tensor"), accident=True),
    Bad("hx a number", lambda m: m(X, 0.0), ("hx", "float", "torch.Tensor"), accident=True),
    Bad("packed size", lambda m: m(packed(I=6)), ("input", "6", "5")),
    Bad("packed float64", lambda m: m(packed(F64)), ("torch.float64", "torch.float32", ".to(")),
    Bad("packed rank", lambda m: m(BROKEN), ("PackedSequence", "3 dimensions", "expected 2")),
    *(
        Bad(
            f"packed {what}",
            lambda m, fields=fields: m(PackedSequence(*fields)),
            ("PackedSequence", *words, "pack_sequence"),
        )
        for what, fields, words in (
            ("sizes that grow", (rand(5, I), torch.tensor([2, 3])), ("run from 2 to 3", "none above")),
            ("sizes that return", (rand(5, I), torch.tensor([2, 1, 2])), ("run from 2 to 2", "none above")),
            ("sizes int32", (rand(2, I), torch.tensor([2], dtype=torch.int32)), ("int32", "torch.int64")),
            ("data too short", (rand(4, I), torch.tensor([3, 2])), ("5 together", "4 together")),
            (
                "order too long",
                (rand(5, I), torch.tensor([3, 2]), torch.arange(4), torch.arange(4)),
                ("sorted_indices", "(4,)", "(3,)"),
            ),
        )
    ),
    Bad("packed hx rank", lambda m: m(packed(), rand(2, H)), ("hx", "(2, 7)", "expected (1, 2, 7)")),
    Bad("packed hx batch", lambda m: m(packed(), rand(1, 3, H)), ("hx", "(1, 3, 7)", "expected (1, 2, 7)")),
    Bad("packed hx hidden", lambda m: m(packed(), rand(1, 2, 8)), ("hx", "(1, 2, 8)", "expected (1, 2, 7)")),
    Bad("packed hx float64", lambda m: m(packed(), HX.double()), ("hx", "torch.float64", "torch.float32")),
    Bad("packed hx on meta", lambda m: m(packed(), META), ("hx", "meta", "cpu")),
    Bad("packed hx a tuple", lambda m: m(packed(), (HX,)), ("hx", "tuple", "torch.Tensor"), accident=True),
    Bad(
        "unsorted hx rank",
        lambda m: m(packed(ordered=False), rand(2, H)),
        ("hx", "(2, 7)", "expected (1, 2, 7)"),
    ),
    Bad(
        "unsorted hx batch",
        lambda m: m(packed(ordered=False), rand(1, 1, H)),
        ("hx", "(1, 1, 7)", "expected (1, 2, 7)"),
    ),
    Bad(
        "unsorted hx a tuple",
        lambda m: m(packed(ordered=False), (HX,)),
        ("hx", "tuple", "torch.Tensor"),
        accident=True,
    ),
]


@each(LAYER)
def test_layer(bad):
    same_mistake(bad, Elman(I, H, **bad.options), nn.RNN(I, H, **bad.options))


CELL = [
    Bad("rank 0", lambda m: m(rand()), ("input", "0 dimensions", "(B, I)")),
    Bad("rank 3", lambda m: m(rand(1, 2, I)), ("input", "3 dimensions", "(1, 2, 5)", "(B, I)", "(I,)")),
    Bad("input size", lambda m: m(rand(2, 6)), ("input", "6", "5")),
    Bad("input size unbatched", lambda m: m(rand(6)), ("input", "6", "5")),
    Bad("input float64", lambda m: m(X[0].double()), ("input", "torch.float64", "torch.float32", ".to(")),
    Bad("input int64", lambda m: m(X[0].long()), ("input", "torch.int64", "torch.float32", ".to(")),
    Bad("input on meta", lambda m: m(X[0].to("meta")), ("cpu", "meta", "expected one")),
    Bad("hx rank 3", lambda m: m(X[0], HX), ("hx", "3 dimensions", "(B, H)")),
    Bad("hx rank 1", lambda m: m(X[0], rand(H)), ("hx", "(7,)", "expected (2, 7)")),
    Bad("hx rank 2 unbatched", lambda m: m(rand(I), rand(1, H)), ("hx", "(1, 7)", "expected (7,)")),
    Bad("hx batch", lambda m: m(X[0], rand(3, H)), ("hx", "(3, 7)", "expected (2, 7)")),
    Bad("hx batch of 1", lambda m: m(X[0], rand(1, H)), ("hx", "(1, 7)", "expected (2, 7)")),
    Bad("hx hidden", lambda m: m(X[0], rand(2, 8)), ("hx", "(2, 8)", "expected (2, 7)")),
    Bad("hx float64", lambda m: m(X[0], rand(2, H, dtype=F64)), ("hx", "torch.float64", "torch.float32")),
    Bad("hx on meta", lambda m: m(X[0], META[0]), ("hx", "meta", "cpu")),
    Bad("input a list", lambda m: m([1.0] * I), ("input", "list", "torch.Tensor"), accident=True),
    Bad("input None", lambda m: m(None), ("input", "NoneType", "torch.Tensor"), accident=True),
    Bad("hx a tuple", lambda m: m(X[0], (HX,)), ("hx", "tuple", "torch.Tensor"), accident=True),
    Bad("nonlinearity", lambda m: m(X[0]), ("nonlinearity", "'gelu'", "'tanh'"), {"nonlinearity": "gelu"}),
    Bad("nonlinearity None", lambda m: m(X[0]), ("nonlinearity", "None", "'relu'"), {"nonlinearity": None}),
]


@each(CELL)
def test_cell(bad):
    same_mistake(bad, ElmanCell(I, H, **bad.options), nn.RNNCell(I, H, **bad.options))


@pytest.mark.parametrize(
    ("rows", "sizes", "words"),
    [
        (6, [3, 2], "5 together.*6 together"),
        (2, [2, 0], "from 2 to 0.*at least 1"),
        (0, [], r"\(0,\).*T at least 1"),
    ],
)
def test_a_packed_sequence_that_does_not_add_up(rows, sizes, words):
    # nn.RNN leaves the rest of the data out; without sizes it has an IndexError.
    with pytest.raises(RuntimeError, match=words):
        Elman(I, H)(PackedSequence(rand(rows, I), torch.tensor(sizes, dtype=I64)))


# Under autocast the floating dtypes below float64 are one; nothing else may be mixed.
AUTOCAST = [
    Bad("input int64", lambda m, x, hx: m(x.long()), ("input", "torch.int64")),
    Bad("input float64", lambda m, x, hx: m(x.double()), ("torch.float64",)),
    Bad("hx float64", lambda m, x, hx: m(x, hx.double()), ("torch.float64",)),
    Bad("hx int64", lambda m, x, hx: m(x, hx.long()), ("torch.int64",)),
    Bad("weights float64", lambda m, x, hx: m(x), ("torch.float64",), {"dtype": F64}),
]


@pytest.mark.parametrize(("cls", "peer"), [(Elman, nn.RNN), (ElmanCell, nn.RNNCell)])
@each(AUTOCAST)
def test_autocast(bad, cls, peer):
    x, hx = (X, HX) if cls is Elman else (X[0], HX[0])
    call = Bad(bad.id, lambda m: bad.call(m, x, hx), bad.words)
    with torch.autocast("cpu", BF16):
        same_mistake(call, cls(I, H, **bad.options), peer(I, H, **bad.options))


# (arguments, keywords, words): a constructor that nn.RNN refuses too. Its own messages are kept.
CONSTRUCTORS = [
    ((0, H), {}, ("input_size", "greater than zero")),
    ((-1, H), {}, ("input_size", "greater than zero")),
    ((I, 0), {}, ("hidden_size", "greater than zero")),
    ((5.0, H), {}, ("input_size", "int", "float")),
    ((I, "7"), {}, ("hidden_size", "int", "str")),
    ((I, None), {}, ("hidden_size", "int", "NoneType")),
    ((I,), {}, ("hidden_size",)),
    ((), {}, ("input_size", "hidden_size")),
    ((I, H), {"num_layers": 0}, ("num_layers", "greater than zero")),
    ((I, H), {"num_layers": -1}, ("num_layers", "greater than zero")),
    ((I, H), {"dropout": 1.5}, ("dropout", "[0, 1]")),
    ((I, H), {"dropout": -0.5}, ("dropout", "[0, 1]")),
    ((I, H), {"dropout": True}, ("dropout", "number")),
    ((I, H), {"bias": 1}, ("bias", "bool", "int")),
    ((I, H), {"bias": None}, ("bias", "bool")),
    ((I, H), {"batch_first": 1}, ("batch_first", "bool", "int")),
    ((I, H), {"nonlinearity": "gelu"}, ("nonlinearity", "'gelu'", "'tanh'", "'relu'")),
    ((I, H), {"nonlinearity": None}, ("nonlinearity", "None", "'tanh'")),
    ((I, H), {"nonlinearity": ["tanh"]}, ("nonlinearity", "['tanh']", "'tanh'")),
    ((I, H), {"proj_size": 2}, ("proj_size", "LSTM", "leave it out")),
    ((I, H), {"proj_size": 0}, ("proj_size", "LSTM", "leave it out")),
    ((I, H), {"hidden": 2}, ("Elman", "hidden", "help(elman.Elman)")),
    ((I, H), {"mode": "RNN_TANH"}, ("Elman", "mode", "help(elman.Elman)")),
    ((I, H), {"dtype": I64}, ("floating point",)),
    ((I, H), {"dtype": "float32"}, ("dtype", "str")),
    ((I, H), {"device": "nowhere"}, ("nowhere",)),
    ((I, H, 1, "tanh", True, False, 0.0, False, None, None, 1), {}, ("Elman", "positional")),
]


@pytest.mark.parametrize(("args", "kwargs", "words"), CONSTRUCTORS, ids=str)
def test_constructor(args, kwargs, words):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (any type: it is the one asked of ours)
        nn.RNN(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        Elman(*args, **kwargs)
    assert ours.type is theirs.type
    for word in words:
        assert word in str(ours.value)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_bidirectional_is_a_bool(value):
    # nn.RNN finds out at the call, where its operator refuses it, or breaks before that.
    with pytest.raises(TypeError):
        nn.RNN(I, H, bidirectional=value)(X)
    with pytest.raises(TypeError, match=r"bidirectional.*bool"):
        Elman(I, H, bidirectional=value)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [({"num_layers": 2}, TypeError), ({"dtype": I64}, RuntimeError), ({"device": "nowhere"}, RuntimeError)],
    ids=str,
)
def test_cell_constructor(kwargs, error):
    with pytest.raises(error) as theirs:
        nn.RNNCell(I, H, **kwargs)
    with pytest.raises(error) as ours:
        ElmanCell(I, H, **kwargs)
    assert ours.type is theirs.type


@pytest.mark.parametrize("cls", [Elman, ElmanCell])
@pytest.mark.parametrize("backend", ["gpu", "Eager", "triton:fast", "", None, ["eager"]], ids=str)
def test_unknown_backend(cls, backend):
    words = ("backend", repr(backend), "auto, triton, cudnn, native, eager")
    message_of(lambda: cls(I, H, backend=backend), ValueError, *words)


# The functional form

W = [rand(H, I), rand(H, H), rand(H), rand(H)]
DEEP = [*W, rand(H, H), *W[1:]]


def lengths(*values, dtype=I64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def swap(n: int, value: object) -> list:
    return [*W[:n], value, *W[n + 1 :]]


# (what, call, type, words)
FUNCTIONAL = [
    ("nonlinearity", lambda: elman.elman(X, None, W, nonlinearity="gelu"), ValueError, ("'gelu'", "'relu'")),
    ("num_layers 0", lambda: elman.elman(X, None, [], num_layers=0), ValueError, ("num_layers", "0")),
    ("dropout", lambda: elman.elman(X, None, W, dropout=1.5), ValueError, ("dropout", "1.5", "1")),
    ("backend", lambda: elman.elman(X, None, W, backend="gpu"), ValueError, ("backend", "'gpu'", "eager")),
    ("3 weights", lambda: elman.elman(X, None, W[:3]), ValueError, ("weights", "3 tensors", "4 tensors")),
    ("2 layers", lambda: elman.elman(X, None, W, num_layers=2), ValueError, ("4 tensors", "8 tensors")),
    ("no bias", lambda: elman.elman(X, None, W, bias=False), ValueError, ("4 tensors", "2 tensors")),
    ("weights None", lambda: elman.elman(X, None, None), TypeError, ("weights", "NoneType", "expected")),
    (
        "weight 3 a number",
        lambda: elman.elman(X, None, swap(3, 1.0)),
        TypeError,
        ("weight", "float", "Tensor"),
    ),
    (
        "weight 1 a number",
        lambda: elman.elman(X, None, swap(1, 1.0)),
        TypeError,
        ("weight", "float", "Tensor"),
    ),
    ("w_hh a scalar", lambda: elman.elman(X, None, swap(1, rand())), RuntimeError, ("weights[1]", "()")),
    (
        "w_hh not square",
        lambda: elman.elman(X, None, swap(1, rand(H, 8))),
        RuntimeError,
        ("(7, 8)", "(7, 7)"),
    ),
    ("w_ih rows", lambda: elman.elman(X, None, swap(0, rand(8, I))), RuntimeError, ("weights[1]", "(8, 8)")),
    ("b_hh", lambda: elman.elman(X, None, swap(3, rand(8))), RuntimeError, ("weight", "(8,)", "(7,)")),
    (
        "second layer",
        lambda: elman.elman(X, None, W * 2, num_layers=2),
        RuntimeError,
        ("weight", "(7, 5)", "expected (7, 7)"),
    ),
    (
        "w_hh float64",
        lambda: elman.elman(X, None, swap(1, W[1].double())),
        RuntimeError,
        ("weight", "float64"),
    ),
    ("w_hh on meta", lambda: elman.elman(X, None, swap(1, W[1].to("meta"))), RuntimeError, ("meta", ".to(")),
    (
        "length 0",
        lambda: elman.elman(X, None, W, lengths=lengths(0, 3)),
        ValueError,
        ("lengths", "0", "1 to 3"),
    ),
    ("length -1", lambda: elman.elman(X, None, W, lengths=lengths(-1, 3)), ValueError, ("lengths", "-1")),
    (
        "length 4",
        lambda: elman.elman(X, None, W, lengths=lengths(1, 4)),
        ValueError,
        ("lengths", "4", "1 to 3"),
    ),
    (
        "lengths with a PackedSequence",
        lambda: elman.elman(packed(), None, W, lengths=lengths(3, 2)),
        ValueError,
        ("lengths", "PackedSequence", "leave them out"),
    ),
    (
        "lengths int32",
        lambda: elman.elman(X, None, W, lengths=lengths(1, 2, dtype=torch.int32)),
        ValueError,
        ("lengths", "torch.int32", "torch.int64"),
    ),
    (
        "lengths float",
        lambda: elman.elman(X, None, W, lengths=lengths(1, 2, dtype=F64)),
        ValueError,
        ("lengths", "torch.float64", "torch.int64"),
    ),
    (
        "lengths of 3 rows",
        lambda: elman.elman(X, None, W, lengths=lengths(1, 2, 3)),
        ValueError,
        ("lengths", "(3,)", "(2,)", "each row"),
    ),
    (
        "lengths a scalar",
        lambda: elman.elman(X, None, W, lengths=lengths(3).sum()),
        ValueError,
        ("()", "(2,)"),
    ),
    (
        "lengths text",
        lambda: elman.elman(X, None, W, lengths="ab"),
        TypeError,
        ("lengths", "str", "expected"),
    ),
    (
        "lengths on meta",
        lambda: elman.elman(X, None, W, lengths=lengths(1, 2).to("meta")),
        RuntimeError,
        ("lengths", "meta", "cpu"),
    ),
    (
        "step nonlinearity",
        lambda: elman.elman_step(X[0], None, *W, nonlinearity="x"),
        None,
        ("'x'", "'tanh'"),
    ),
    ("step backend", lambda: elman.elman_step(X[0], None, *W, backend="gpu"), ValueError, ("'gpu'", "eager")),
    ("step without b_hh", lambda: elman.elman_step(X[0], None, *W[:3]), ValueError, ("b_ih", "b_hh")),
    (
        "step without b_ih",
        lambda: elman.elman_step(X[0], None, *W[:2], None, W[3]),
        ValueError,
        ("b_ih", "b_hh"),
    ),
    ("step w_hh a number", lambda: elman.elman_step(X[0], None, W[0], 1.0), TypeError, ("float", "Tensor")),
    (
        "step w_hh not square",
        lambda: elman.elman_step(X[0], None, W[0], rand(H, 8)),
        RuntimeError,
        ("(7, 8)", "(7, 7)"),
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in FUNCTIONAL]
)
def test_functional(call, error, words):
    # The cell's unknown nonlinearity is nn.RNNCell's RuntimeError; the step may choose either.
    message = message_of(call, error or (RuntimeError, ValueError), *words)
    assert "expected" in message


def test_deep_weights_that_fit_are_taken():
    assert elman.elman(X, None, DEEP, num_layers=2)[0].shape == (3, 2, H)


# The network

NETWORK = [
    (
        "readout",
        lambda: ElmanNetwork(I, H, 3, readout="softmax"),
        ValueError,
        ("readout", "'softmax'", "'tanh'"),
    ),
    (
        "readout a list",
        lambda: ElmanNetwork(I, H, 3, readout=["tanh"]),
        ValueError,
        ("readout", "'identity'"),
    ),
    ("option", lambda: ElmanNetwork(I, H, 3, hidden=2), TypeError, ("hidden",)),
    ("proj_size", lambda: ElmanNetwork(I, H, 3, proj_size=2), ValueError, ("proj_size",)),
    ("rank 4", lambda: ElmanNetwork(I, H, 3)(rand(1, 2, 3, I)), ValueError, ("input", "4 dimensions")),
    ("rank 0", lambda: ElmanNetwork(I, H, 3)(rand()), ValueError, ("input", "0 dimensions")),
    ("a list", lambda: ElmanNetwork(I, H, 3)([1.0] * I), TypeError, ("input", "list", "torch.Tensor")),
    ("one step size", lambda: ElmanNetwork(I, H, 3)(rand(6)), RuntimeError, ("input", "6", "5")),
    ("one step hx size", lambda: ElmanNetwork(I, H, 3)(rand(I), rand(8)), RuntimeError, ("hx", "8", "7")),
    ("one step hx number", lambda: ElmanNetwork(I, H, 3)(rand(I), 0.0), TypeError, ("hx", "float", "Tensor")),
    ("one step hx rank", lambda: ElmanNetwork(I, H, 3)(rand(I), HX), RuntimeError, ("hx", "3 dimensions")),
]


@pytest.mark.parametrize(("call", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in NETWORK])
def test_network(call, error, words):
    torch.manual_seed(0)
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error
    for word in words:
        assert word in str(raised.value)


# Names of backends

SIZES = {"batch": 1, "seq": 2, "input": 3, "hidden": 4}


@pytest.mark.parametrize("backend", ["gpu", "triton:fast", "", None], ids=str)
def test_use_backend_unknown(backend):
    def enter():
        with elman.use_backend(backend):
            pytest.fail("the block was entered")

    message_of(enter, ValueError, "backend", repr(backend), "auto, triton, cudnn, native, eager")
    assert Elman(I, H)(X)[0].shape == (3, 2, H)


@pytest.mark.parametrize("value", ["gpu", "Eager", "eager,triton"])
def test_environment_variable_with_nonsense(monkeypatch, value):
    monkeypatch.setenv("ELMAN_BACKEND", value)
    words = ("environment variable ELMAN_BACKEND", repr(value), "auto, triton, cudnn, native, eager")
    layer, cell = Elman(I, H), ElmanCell(I, H)
    message_of(lambda: layer(X), ValueError, *words)
    message_of(lambda: cell(X[0]), ValueError, *words)
    message_of(lambda: elman.explain(**SIZES, device="cpu"), ValueError, *words)


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("1", TypeError)]
)
def test_explain_sizes(size, value, error):
    call = {**SIZES, size: value}
    got = str(value) if error is ValueError else type(value).__name__
    message_of(lambda: elman.explain(**call), error, size, got, "expected")


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"dtype": "float32"}, TypeError, ("dtype", "float32", "expected")),
        ({"dtype": torch.int32}, ValueError, ("dtype", "torch.int32", "float32")),
        ({"backend": "gpu"}, ValueError, ("backend", "'gpu'", "eager")),
    ],
    ids=str,
)
def test_explain_options(kwargs, error, words):
    message_of(lambda: elman.explain(**SIZES, device="cpu", **kwargs), error, *words)


def test_a_wrong_call_spoils_no_right_one():
    """Checked calls are cached by their arguments, and 1.0 is equal to 1."""
    weights = [torch.randn(6, 4), torch.randn(6, 6), torch.randn(6), torch.randn(6)]
    x = torch.randn(3, 2, 4)
    for wrong in ({"num_layers": 1.0}, {"bidirectional": 0.0}, {"batch_first": 0.0}, {"dropout": False}):
        with contextlib.suppress(TypeError):
            elman.elman(x, None, weights, **wrong)
        output, h_n = elman.elman(x, None, weights)
        assert output.shape == (3, 2, 6)
        assert h_n.shape == (1, 2, 6)
    assert elman.elman(x, None, weights, batch_first=np.array(True))[0].shape == (3, 2, 6)
