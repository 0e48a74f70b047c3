"""The products over a whole sequence: which library multiplies, and how long a sum may be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from elman import Elman, products
from tests.tolerances import tolerance


@pytest.mark.parametrize(
    ("batch", "hidden", "options"),
    [
        (16, 384, {}),
        (16, 384, {"num_layers": 2, "bidirectional": True}),
        (16, 384, {"nonlinearity": "relu", "bias": False, "batch_first": True}),
        (16, 384, {"packed": True, "bidirectional": True}),
        (32, 768, {"packed": True}),
        (32, 512, {}),
        (128, 256, {"bidirectional": True}),
        (16, 128, {"bidirectional": True, "steps": 200}),
        (16, 128, {"inputs": 70, "steps": 200}),
        (32, 64, {"steps": 200}),
        (40, 128, {"packed": True, "steps": 200}),
        (128, 256, {"nonlinearity": "relu", "bias": False, "batch_first": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("onednn", [False, True] if products.HAS_ONEDNN else [False])
def test_agrees_with_nn_rnn_where_onednn_multiplies(onednn, batch, hidden, options, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", onednn)
    options = dict(options)
    packed, steps = options.pop("packed", False), options.pop("steps", 9)
    inputs = options.pop("inputs", hidden)
    torch.manual_seed(0)
    theirs = nn.RNN(inputs, hidden, **options).double()
    ours = Elman(inputs, hidden, backend="eager", **options)
    theirs.load_state_dict(ours.state_dict())
    shape = (batch, steps) if options.get("batch_first") else (steps, batch)
    x = torch.randn(*shape, inputs)
    lengths = steps - torch.arange(batch) % steps
    groups = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h0 = torch.randn(groups, batch, hidden)
    results = []
    for layer in (ours, theirs):
        dtype = layer.weight_ih_l0.dtype
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, h0)]
        input = leaves[0]
        if packed:
            input = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, h_n = layer(input, leaves[1])
        output = output.data if packed else output
        upstream = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        torch.autograd.backward((output, h_n), (upstream, torch.ones_like(h_n)))
        with torch.no_grad():
            again, _ = layer(input, leaves[1])
        again = again.data if packed else again
        results.append([output, h_n, again, *(leaf.grad for leaf in (*leaves, *layer.parameters()))])
    for own, expected in zip(*results, strict=True):
        assert (own - expected).abs().max() <= 1e-6 * steps**0.5 * (1 + expected.abs().max())


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN operators")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("shape", "used"),
    [
        ((9, 16, 384), {"LINEAR", "_LINEAR_ADD"}),
        ((50, 16, 256), {"LINEAR", "_LINEAR_ADD"}),  # the gradients alone
        ((200, 16, 128), {"LINEAR", "_WEIGHTS"}),
        ((20, 4, 32), set()),
    ],
)
def test_where_onednn_multiplies(shape, used, onednn, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", onednn)
    seen = set()

    def spy(name):
        operator = getattr(products, name)

        def called(*arguments):
            seen.add(name)
            return operator(*arguments)

        return called

    for name in ("LINEAR", "_LINEAR_ADD", "_WEIGHTS"):
        monkeypatch.setattr(products, name, spy(name))
    T, B, H = shape
    Elman(H, H, backend="eager")(torch.randn(T, B, H))[0].sum().backward()
    assert seen == (used if onednn else set())


@pytest.mark.parametrize(
    ("maker", "instructions", "chosen"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_onednn_is_chosen_by_maker_and_instructions(
    system, maker, instructions, chosen, monkeypatch, tmp_path
):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "_CPUINFO", info)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    if system == "Linux":
        info.write_text(f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: 25\n")
    else:
        monkeypatch.setenv("PROCESSOR_IDENTIFIER", f"AMD64 Family 25 Model 17 Stepping 1, {maker}")
    assert products._onednn_pays() is chosen


class Products(TorchDispatchMode):
    """Sees each matrix product: its operator and its summands."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.seen.append((func.overloadpacket, args[-1].shape[-2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("T", "B", "H"), [(64, 8, 32), (256, 4, 32), (256, 32, 128)])
def test_small_sums_are_one_call(T, B, H, monkeypatch):
    """On a busy machine two threads wait some 8 ms for each other in each product, however small."""
    monkeypatch.setattr(products, "ONEDNN", False)
    with Products() as calls:
        products.sums_of_products(torch.randn(T, B, H), [torch.randn(T, B, H)], T)
    assert [operator for operator, _ in calls.seen] == [torch.ops.aten.bmm]


@pytest.mark.parametrize(("T", "B", "H"), [(64, 32, 64), (16, 1, 32), (300, 8, 16), (64, 8, 320)])
def test_no_gradient_is_a_longer_sum_than_the_recurrence(T, B, H, monkeypatch):
    """On any processor: the libraries cut long sums as they like, or not at all."""
    monkeypatch.setattr(products, "ONEDNN", False)
    a, b = torch.randn(T, B, H), torch.randn(T, B, H)
    with Products() as calls:
        (total,) = products.sums_of_products(a, [b], T)
    truth = a.flatten(0, 1).double().t() @ b.flatten(0, 1).double()
    assert (total - truth).norm() <= tolerance(torch.float32) * truth.norm()
    rows = [summands for _, summands in calls.seen]
    assert max(rows) <= min(max(T, 64), 256)
    assert len(rows) == 1 or T * B > 64  # a short sum is one product: many cost more than they add
