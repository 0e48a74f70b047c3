"""Random calls beside nn.RNN's agree; and the fuzzer of tests/fuzz.py finds what does not."""

from collections import Counter

import pytest
import torch

import elman
from elman import Elman, ElmanCell
from tests import fuzz
from tests.fuzz import Case, Packing, Tensors

F32 = torch.float32


@pytest.mark.parametrize(("backend", "cases"), [("native", 1000), ("eager", 300)])
def test_random_calls(backend, cases):
    """The same ones on every machine; `make fuzz` runs more."""
    with elman.use_backend(backend):
        report = fuzz.fuzz(cases, seed=0)
    assert report.found == []
    assert report.cases == cases
    for outcome in ("both succeed", "both raise the same type"):
        assert report.counts[outcome] > 0.3 * cases, report.counts


class Off(Elman):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, h_n * (1 + 1e-3)


class Unchecked(Elman):
    def forward(self, input, hx=None):
        return super().forward(input, None)


class NoGradient(Elman):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, h_n.detach()


class Forgetful(Elman):
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict=False)


class OtherError(Elman):
    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            raise ValueError(str(error)) from None


@pytest.mark.parametrize("broken", [Off, Unchecked, NoGradient, Forgetful, OtherError])
def test_what_is_broken_is_found(broken, monkeypatch):
    monkeypatch.setattr(fuzz, "Elman", broken)
    report = fuzz.fuzz(500, seed=0)
    assert len(report.found) == 1
    assert "Case(cell=False" in report.found[0]


def case(cell=False, shape=(3, 2, 3), input=None, hx=None, dtype=F32, packing=None, **more):
    modes = {name: more.pop(name) for name in list(more) if name in Case.__dataclass_fields__}
    hx = Tensors(hx, dtype) if isinstance(hx, tuple) else hx
    return Case(cell, (3, 4), {"dtype": dtype, **more}, input or Tensors(shape, dtype), hx, packing, **modes)


HALF, TUPLE = torch.float16, Tensors((1, 2, 4), F32, kind="a tuple")
META = Tensors((2, 3), F32, device="meta")
SPARSE = Tensors((3,), torch.bfloat16, layout="sparse", requires_grad=True)
# One for each of fuzz.DIFFERENCES, in their order.
ON_PURPOSE = [
    case(hx=TUPLE),
    case(shape=(3, 2, 4), hx=TUPLE, faults=2),
    case(cell=True, bias=False, input=META, hx=(2, 4), grad="no_grad"),
    case(num_layers=-0.5),
    case(num_layers=True),
    case(bidirectional=1, hx=(1, 2, 4)),
    case(packing=Packing([3, 2], True, "data long")),
    case(packing=Packing([3, 2], False), hx=()),
    case(dtype=HALF, bidirectional=True, packing=Packing([3, 2], True), autocast=torch.bfloat16),
    case(cell=True, input=SPARSE, dtype=torch.bfloat16),
]


@pytest.mark.parametrize(("difference", "one"), list(zip(fuzz.DIFFERENCES, ON_PURPOSE, strict=True)))
def test_each_difference_is_there(difference, one, monkeypatch):
    """It differs, and nothing but this entry excuses it."""
    counts = Counter()
    assert fuzz.disagreement(one, counts) is None
    assert counts == {f"differ on purpose: {difference.reason}": 1}
    monkeypatch.setattr(fuzz, "DIFFERENCES", [d for d in fuzz.DIFFERENCES if d is not difference])
    assert fuzz.disagreement(one, counts)


def test_a_case_is_repeated_to_the_bit():
    one = case(num_layers=2, dropout=0.5, hx=(2, 2, 4))
    first, second = (fuzz.run(one, Elman, None) for _ in range(2))
    assert torch.equal(first["output"], second["output"])
    assert isinstance(fuzz.run(case(cell=True, shape=(2, 3)), ElmanCell, None), fuzz.Results)
