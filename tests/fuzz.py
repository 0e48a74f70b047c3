"""Random calls of the layer and the cell, good ones and bad ones, beside nn.RNN's: `make fuzz`.

    python -m tests.fuzz --cases 20000 --seed 0        the exit status is 1 where a case disagrees

A case is the arguments of a constructor, maybe a state_dict to load, the arguments of a call and the modes it
runs in. nn.RNN and Elman (nn.RNNCell and ElmanCell) get the same, with the same weights. Either both raise,
with the same type, or both succeed with the same results: kinds, shapes, dtypes, NaN and infinity where they
are, and numbers within tests/tolerances.py, gradients too. What differs on purpose is in DIFFERENCES.
A case that takes longer than LIMIT seconds ends the process with a traceback; so does a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import elman
from elman import Elman, ElmanCell
from tests.helpers import error
from tests.tolerances import tolerance

#: Seconds that a case may take: thousands of times what one takes.
LIMIT = 60
#: Both sides are rounded, and nn.RNN rounds more often than the float64 truth of the tolerances.
TIMES_TOLERANCE = 3
#: Cases of one seed; a failure ends them and is made as small as it can be.
BATCH = 500
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.bool, torch.complex64, torch.uint8]
#: More elements than a process has addresses for.
HUGE = 2**50
#: What no argument should be, or only some may be.
ODD = [
    *(0, -1, HUGE, -HUGE, 2**63, 2**70, 1.0, 2.5, -0.5, float("nan"), float("inf"), 1 + 2j),
    *("3", "tanh", "relu", "", b"tanh", "cpu", "meta", "nowhere", None, True, False, (), [], {}, [2]),
    *(np.int64(2), np.float32(0.5), np.bool_(True), torch.tensor(2), torch.tensor(0.5), torch.float32),
    torch.int64,
]
JUNK = ["a list", "an array", "None", "a tuple", "a number", "text", "a dict", "a class"]


@dataclass
class Tensors:
    """What an argument is: a tensor of this shape, or the junk that `kind` names."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "tensor"
    layout: str = "dense"
    values: str = "normal"
    requires_grad: bool = False
    device: str = "cpu"


@dataclass
class Packing:
    """The input as a PackedSequence: rows of these lengths, and what is wrong with it."""

    lengths: list[int]
    sort: bool
    fault: str | None = None


@dataclass
class Case:
    cell: bool
    args: tuple
    kwargs: dict
    input: Tensors | None
    hx: Tensors | None
    packing: Packing | None = None
    by_name: bool = False
    training: bool = True
    grad: str = "enable"
    autocast: torch.dtype | None = None
    upstream: str = "both"
    frozen: list[int] = field(default_factory=list)
    state_fault: str | None = None
    strict: bool = True
    seed: int = 0
    faults: int = 0


# What a case is drawn from

LAYOUTS = ["dense", "transposed", "expanded", "every other", "offset", "negated", "parameter"]
VALUES = ["normal", "normal", "normal", "large", "tiny", "zero", "NaN", "infinite"]
PACK_FAULTS = [
    *("sizes grow", "size zero", "size negative", "sizes int32", "sizes float", "no sizes", "sizes 2-d"),
    *("data short", "data long", "data rank", "order long", "order short", "order out of range"),
    *("order float", "order repeats", "one order"),
]
STATE_FAULTS = ["missing", "unexpected", "renamed", "shape", "dtype", "rank", "not a tensor", "other layer"]
CALL_FAULTS = [
    *("input rank", "input size", "input dtype", "input device", "input junk", "input sparse", "no input"),
    *("hx rank", "hx size", "hx dtype", "hx device", "hx junk", "hx sparse", "no steps", "packing", "device"),
    "other dtype",
]


@st.composite
def cases(draw: Callable) -> Case:
    """A case with no, one or two faults, so that one is not always hidden by another."""
    faults = draw(
        st.sampled_from([(), (), ("call",), ("options",), ("call", "call"), ("options", "call"), ("state",)])
    )
    cell = draw(st.sampled_from([False, False, False, True]))
    T, B, I, H = (
        draw(st.integers(low, high)) for low, high in ((1, 6), (0, 5), (0 if cell else 1, 5), (1, 9))
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *FLOATS]))
    kwargs: dict[str, Any] = {"dtype": dtype}
    flags = st.booleans()
    choices: dict[str, st.SearchStrategy] = {"nonlinearity": st.sampled_from(["tanh", "relu"]), "bias": flags}
    if not cell:
        choices |= {
            "num_layers": st.integers(1, 3),
            "batch_first": flags,
            "bidirectional": flags,
            "dropout": st.sampled_from([0.0, 0.5, 1.0, 1, 0]),
        }
    for name, values in choices.items():
        if draw(flags):
            kwargs[name] = draw(values)
    L, D = kwargs.get("num_layers", 1), 2 if kwargs.get("bidirectional") else 1
    batched = draw(st.sampled_from([True, True, True, False]))
    packing = None
    if not cell and batched and B and draw(st.sampled_from([False, False, True])):
        lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
        packing = Packing(lengths, draw(flags))
    rows = (B,) if batched else ()
    if cell:
        shape, states = (*rows, I), (*rows, H)
    else:
        shape = (B, T, I) if batched and kwargs.get("batch_first") and not packing else (T, *rows, I)
        states = (L * D, *rows, H)

    def tensors(shape: tuple[int, ...]) -> Tensors:
        layout, values = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(VALUES))
        return Tensors(shape, dtype, "tensor", layout, values, draw(flags))

    case = Case(
        cell,
        (I, H),
        kwargs,
        tensors(shape),
        tensors(states) if draw(flags) else None,
        packing,
        training=draw(flags),
        grad=draw(st.sampled_from(["enable", "enable", "enable", "no_grad", "inference"])),
        autocast=draw(st.sampled_from([None, None, None, torch.bfloat16, torch.float16])),
        by_name=draw(flags),
        upstream=draw(st.sampled_from(["both", "output", "h_n", "expanded"])),
        frozen=draw(st.lists(st.integers(0, 11), max_size=3)),
        seed=draw(st.integers(0, 2**16)),
    )
    case.faults = len(faults)
    for fault in faults:
        if fault == "options":
            spoil_options(draw, case)
        elif fault == "call":
            spoil_call(draw, case)
        else:
            case.state_fault, case.strict = draw(st.sampled_from(STATE_FAULTS)), draw(flags)
    return case


def spoil_options(draw: Callable, case: Case) -> None:
    names = [
        "input_size",
        "hidden_size",
        "nonlinearity",
        "bias",
        "device",
        "dtype",
        "unknown",
        "missing",
        "more",
    ]
    names += [] if case.cell else ["num_layers", "batch_first", "bidirectional", "dropout", "proj_size"]
    name, value = draw(st.sampled_from(names)), draw(st.sampled_from(ODD))
    if name in ("num_layers", "more") and isinstance(value, (int, float)) and value > 9:
        value = 0  # nn.RNN makes so many layers, until the end of time
    if name == "input_size":
        case.args = (value, *case.args[1:])
    elif name == "hidden_size":
        case.args = (case.args[0], value, *case.args[2:])
    elif name == "missing":
        case.args = case.args[:1]
    elif name == "more":
        case.args = (*case.args, value)
    else:
        case.kwargs = {**case.kwargs, name: value}


def spoil_call(draw: Callable, case: Case) -> None:
    fault = draw(st.sampled_from(CALL_FAULTS))
    if fault == "no input":
        case.input = None
    elif fault == "packing":
        if case.packing:
            case.packing.fault = draw(st.sampled_from(PACK_FAULTS))
    elif fault == "device":
        case.kwargs["device"] = draw(st.sampled_from(["meta", "cpu"]))
    elif fault == "other dtype":
        case.kwargs["dtype"] = draw(st.sampled_from(FLOATS))
    elif fault == "no steps":
        if case.input and not case.cell:
            T = 1 if case.kwargs.get("batch_first") and len(case.input.shape) == 3 else 0
            case.input.shape = tuple(0 if i == T else n for i, n in enumerate(case.input.shape))
    else:
        which, what = fault.split()
        tensors = case.input if which == "input" else case.hx
        if tensors is None:
            return
        if what == "rank":
            tensors.shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        elif what == "size" and tensors.shape:
            at = draw(st.integers(0, len(tensors.shape) - 1))
            tensors.shape = (*tensors.shape[:at], draw(st.integers(0, 6)), *tensors.shape[at + 1 :])
        elif what == "dtype":
            tensors.dtype = draw(st.sampled_from([*FLOATS, *OTHERS]))
        elif what == "device":
            tensors.device = "meta"
        elif what == "junk":
            tensors.kind = draw(st.sampled_from(JUNK))
        elif what == "sparse":
            tensors.layout = "sparse"


# A case run


def build(what: Tensors, generator: torch.Generator) -> Any:
    """The tensor, or what is there instead of it; fresh memory at every call."""
    shape = what.shape
    t = torch.randn(shape, dtype=torch.float64, generator=generator)
    t = {"large": t * 8, "tiny": t * 1e-20, "zero": t * 0}.get(what.values, t)
    if what.values in ("NaN", "infinite") and t.numel():
        t.view(-1)[::5] = torch.nan if what.values == "NaN" else torch.inf
    t = t.to(what.dtype)
    junk = {
        "a list": t.tolist(),
        "None": None,
        "a tuple": (t, t),
        "a number": 1.5,
        "text": "input",
        "a dict": {"input": t},
        "a class": Tensor,
    }
    if what.kind in junk:
        return junk[what.kind]
    if what.kind == "an array":
        return t.float().numpy()
    if what.layout == "transposed":
        t = t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    elif what.layout == "expanded" and t.dim() and t.shape[0]:
        t = t[:1].expand(shape)
    elif what.layout == "every other":
        t = torch.stack([t, t], -1)[..., 0]
    elif what.layout == "offset":
        t = torch.cat([t.new_ones(3), t.flatten()])[3:].view(shape)
    elif what.layout == "negated" and what.dtype in FLOATS:
        t = torch._neg_view(t)
    elif what.layout == "sparse":
        t = t.to_sparse()
    t = t.to(what.device)
    can = t.is_floating_point() or t.is_complex()
    if what.layout == "parameter":
        return nn.Parameter(t, requires_grad=what.requires_grad and can)
    return t.requires_grad_(what.requires_grad and can)


def pack(t: Tensor, packing: Packing) -> PackedSequence:
    """t (T, B, I), rows cut to their lengths, packed; then spoilt."""
    lengths = sorted(packing.lengths, reverse=True) if packing.sort else packing.lengths
    data, sizes, *orders = pack_padded_sequence(t, torch.tensor(lengths), enforce_sorted=packing.sort)
    a, b = orders
    B = len(lengths)
    order = torch.arange(B) if a is None else a
    sizes = {
        "sizes grow": torch.cat([sizes, sizes[:1] + 1]),
        "size zero": torch.cat([sizes, sizes[:1] * 0]),
        "size negative": torch.cat([sizes, sizes[:1] * -1]),
        "sizes int32": sizes.int(),
        "sizes float": sizes.double(),
        "no sizes": sizes[:0],
        "sizes 2-d": sizes[None],
    }.get(packing.fault or "", sizes)
    data = {"data short": data[:-1], "data long": torch.cat([data, data[:1]]), "data rank": data[None]}.get(
        packing.fault or "", data
    )
    a, b = {
        "order long": (torch.arange(B + 1), torch.arange(B + 1)),
        "order short": (order[:-1], order[:-1]),
        "order out of range": (order + B, order + B),
        "order float": (order.double(), order.double()),
        "order repeats": (order * 0, order * 0),
        "one order": (order, None),
    }.get(packing.fault or "", (a, b))
    return PackedSequence(data, sizes, a, b)


def spoilt_state(fault: str, state: dict[str, Any], kind: type) -> dict[str, Any]:
    """The state_dict with one thing wrong, or another layer's."""
    first = next(iter(state))
    w = state[first]
    if fault == "missing":
        return {name: t for name, t in state.items() if name != first}
    if fault == "other layer":
        return kind(4, 7).state_dict()
    return {
        "unexpected": {**state, "weight_xx": w},
        "renamed": {("weight" if name == first else name): t for name, t in state.items()},
        "shape": {**state, first: w.new_zeros(w.shape[0] + 1, *w.shape[1:])},
        "dtype": {**state, first: w.double()},
        "rank": {**state, first: w[None]},
        "not a tensor": {**state, first: 3.0},
    }[fault]


class Results(dict):
    """What a case left, by name."""


def run(case: Case, kind: type, weights: dict[str, Tensor] | None, wide: bool = False) -> Results | Exception:
    """What the case leaves, or what it raised; wide: once more in float64, layer and tensors."""
    torch.manual_seed(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    try:
        layer = kind(*case.args, **case.kwargs)
        layer.train(case.training)
        if weights is not None and not any(p.is_meta for p in layer.parameters()):
            layer.load_state_dict(weights)
        results = Results(weights={name: p.detach().clone() for name, p in layer.state_dict().items()})
        if case.state_fault:
            missing = layer.load_state_dict(
                spoilt_state(case.state_fault, dict(layer.state_dict()), kind), strict=case.strict
            )
            results["keys"] = str(missing)
            results |= {f"loaded {name}": p for name, p in layer.state_dict().items()}
        for i, p in enumerate(layer.parameters()):
            p.requires_grad_(i not in case.frozen)
        leaves = {
            "input": case.input and build(case.input, generator),
            "hx": case.hx and build(case.hx, generator),
        }
        if wide:
            layer = layer.double()
            leaves = {
                name: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
                for name, t in leaves.items()
            }
        x, hx = leaves["input"], leaves["hx"]
        if case.packing and isinstance(x, Tensor) and x.dim() == 3 and not x.is_sparse:
            if x.shape[:2] != (max(case.packing.lengths), len(case.packing.lengths)):
                x = x.new_zeros(max(case.packing.lengths), len(case.packing.lengths), x.shape[2])
            x = pack(x, case.packing)
        torch.manual_seed(case.seed)
        with modes(case):
            if case.input is None:
                result = layer()
            elif hx is None and (case.hx is None or case.hx.kind == "tensor"):
                result = layer(input=x) if case.by_name else layer(x)
            else:
                result = layer(input=x, hx=hx) if case.by_name else layer(x, hx)
        output, h_n = (result, None) if case.cell else result
        results["kind"] = type(output).__name__
        if isinstance(output, PackedSequence):
            results |= {f"packed {name}": t for name, t in output._asdict().items() if name != "data"}
            output = output.data
        results |= {"output": output, "h_n": h_n}
        results["require gradients"] = [t.requires_grad for t in (output, h_n) if t is not None]
        pairs = upstream(case, output, h_n, generator)
        if case.grad == "enable" and any(t.requires_grad for t, _ in pairs):
            torch.autograd.backward(
                [t for t, _ in pairs if t.requires_grad], [g for t, g in pairs if t.requires_grad]
            )
            found = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.is_leaf}
            found |= dict(layer.named_parameters())
            results |= {f"gradient of {name}": t.grad for name, t in found.items()}
        return results
    except Exception as raised:
        return raised


def upstream(
    case: Case, output: Tensor, h_n: Tensor | None, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    wanted = {"output": [output], "h_n": [h_n]}.get(case.upstream, [output, h_n])
    pairs = []
    for t in (output,) if h_n is None else wanted:
        if t is not None:
            g = torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device, t.dtype)
            pairs.append((t, g[..., :1].expand(t.shape) if case.upstream == "expanded" else g))
    return pairs


@contextlib.contextmanager
def modes(case: Case) -> Iterator[None]:
    grad = {"enable": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[
        case.grad
    ]
    with grad(), torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None):
        yield


# Both compared


@dataclass
class Difference:
    """What differs on purpose: whether it is this one, and the reason."""

    reason: str
    holds: Callable[[Case, Any, Any], bool]


def raised(outcome: Results | Exception, *types: type) -> bool:
    return type(outcome) in types


def of(case: Case, argument: str) -> Any:
    """The argument of the constructor, by name or position."""
    names = ["input_size", "hidden_size", *(["bias", "nonlinearity"] if case.cell else ["num_layers"])]
    return case.kwargs.get(argument, dict(zip(names, case.args, strict=False)).get(argument))


def is_sparse(case: Case) -> bool:
    return any(t is not None and t.layout == "sparse" for t in (case.input, case.hx))


OUR_CHECKS = (TypeError, ValueError, RuntimeError)
DIFFERENCES = [
    Difference(
        "an argument of another kind: nn.RNN breaks with an AttributeError, Elman has a TypeError",
        lambda case, theirs, ours: raised(theirs, AttributeError) and raised(ours, TypeError),
    ),
    Difference(
        "several faults: each says the one that it finds first",
        lambda case, theirs, ours: (
            case.faults > 1 and isinstance(theirs, Exception) and raised(ours, *OUR_CHECKS)
        ),
    ),
    Difference(
        "tensors on different devices: where nothing has to be read nn.RNN does not notice",
        lambda case, theirs, ours: (
            raised(ours, RuntimeError) and "expected one: move with .to()" in str(ours)
        ),
    ),
    Difference(
        "num_layers is no int: nn.RNN looks at the number first, or takes a tensor; Elman at the type",
        lambda case, theirs, ours: raised(ours, TypeError) and str(ours).startswith("num_layers is a"),
    ),
    Difference(
        "num_layers is a bool: nn.RNN's operator refuses it at the call; Elman takes it for a number",
        lambda case, theirs, ours: isinstance(of(case, "num_layers"), bool) and raised(theirs, TypeError),
    ),
    Difference(
        "bidirectional is no bool: nn.RNN breaks at it, or its operator refuses it; Elman at once",
        lambda case, theirs, ours: raised(ours, TypeError) and "bidirectional is a" in str(ours),
    ),
    Difference(
        "a PackedSequence that does not add up: nn.RNN leaves rows out, or fails somewhere in its operator",
        lambda case, theirs, ours: (
            raised(ours, RuntimeError) and str(ours).startswith("the PackedSequence's")
        ),
    ),
    Difference(
        "hx of another shape: nn.RNN takes of it what it needs, broadcasts it, or has an IndexError",
        lambda case, theirs, ours: raised(ours, RuntimeError) and str(ours).startswith("hx has shape"),
    ),
    Difference(
        "float16 beside bfloat16 under autocast: its casts refuse one of them for nn.RNN; Elman casts both",
        lambda case, theirs, ours: raised(theirs, RuntimeError) and "at::autocast::prioritize" in str(theirs),
    ),
    Difference(
        "a sparse tensor: neither is made for it; some of nn.RNN's operators happen to take one",
        lambda case, theirs, ours: is_sparse(case),
    ),
]


def disagreement(case: Case, counts: Counter[str]) -> str | None:
    """What Elman does otherwise than nn.RNN and should not, None if nothing; counts notes what came of it."""
    theirs = run(case, nn.RNNCell if case.cell else nn.RNN, None)
    weights = theirs["weights"] if isinstance(theirs, Results) else None
    ours = run(case, ElmanCell if case.cell else Elman, weights)
    if isinstance(theirs, Results) and isinstance(ours, Results):
        found, agreement = unlike(case, ours, theirs), "both succeed"
        if found and "gradient" in found and at_a_kink(case, theirs, weights):
            found, agreement = None, "both succeed; relu's derivative jumps where a rounding decides"
    else:
        found = f"nn.RNN: {told(theirs)}; Elman: {told(ours)}" if type(theirs) is not type(ours) else None
        agreement = "both raise the same type"
    if found is None:
        counts[agreement] += 1
        return None
    for difference in DIFFERENCES:
        if difference.holds(case, theirs, ours):
            counts[f"differ on purpose: {difference.reason}"] += 1
            return None
    return found


def told(outcome: Results | Exception) -> str:
    return "no error" if isinstance(outcome, Results) else f"{type(outcome).__name__}({outcome})"


def unlike(case: Case, ours: Results, theirs: Results) -> str | None:
    """The first result that is not nn.RNN's, and how."""
    if ours.keys() != theirs.keys():
        return f"results {sorted(ours.keys() ^ theirs.keys())} are one's alone"
    dtype = theirs["output"].dtype
    for name, b in theirs.items():
        a = ours[name]
        if name == "weights":
            continue
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if (a is None) != (b is None) or (not isinstance(b, Tensor) and a != b):
                return f"{name} is {a}, nn.RNN's {b}"
            continue
        for what in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            mine, other = getattr(a, what), getattr(b, what)
            if mine != other:
                return f"{name} has {what} {mine}, nn.RNN's {other}"
        if a.is_meta:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{name} is {a}, nn.RNN's {b}"
            continue
        # A gradient's own dtype may be a coarser one, under autocast.
        bound = TIMES_TOLERANCE * max(tolerance(dtype), tolerance(b.dtype))
        a, b = a.detach().double(), b.detach().double()
        if not torch.equal(
            a.nan_to_num(0, 1, -1) * ~a.isfinite(), b.nan_to_num(0, 1, -1) * ~b.isfinite()
        ) or (not torch.equal(a.isnan(), b.isnan())):
            return f"{name} has NaN or infinity elsewhere: {a}, nn.RNN's {b}"
        # Where large inputs saturate tanh, its derivative is what rounding leaves of it, times the input.
        large = any(t is not None and t.values == "large" for t in (case.input, case.hx))
        off = error(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), floor=8.0 if large else 1.0)
        if not off <= bound:
            return f"{name} is off by {off:.1e}: {a}, nn.RNN's {b}"
    return None


def at_a_kink(case: Case, theirs: Results, weights: dict[str, Tensor]) -> bool:
    """Whether the case is relu's, and nn.RNN and Elman agree on it in float64, or it can't be had there."""
    if of(case, "nonlinearity") != "relu" or theirs["output"].dtype == torch.float64:
        return False
    if case.autocast:
        return True
    kinds = (nn.RNNCell, ElmanCell) if case.cell else (nn.RNN, Elman)
    expected, found = (run(case, kind, weights, wide=True) for kind in kinds)
    both = isinstance(expected, Results) and isinstance(found, Results)
    return both and unlike(case, found, expected) is None


# Many cases


@dataclass
class Report:
    """What a run found: its cases, the seconds it took, the smallest case of each failure."""

    cases: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)


def fuzz(cases_wanted: int, seed: int, note: Path | None = None) -> Report:
    """Runs so many cases from this seed on. note: a file that holds the case being run, for a crash."""
    report, start = Report(), time.monotonic()
    for first in range(0, cases_wanted, BATCH):
        _batch(report, min(BATCH, cases_wanted - first), seed + first // BATCH, note)
        if note is not None:
            print(f"{report.cases} cases, {len(report.found)} disagreements", file=sys.stderr, flush=True)
    report.seconds = time.monotonic() - start
    return report


def _batch(report: Report, count: int, seed: int, note: Path | None) -> None:
    failed = False

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(cases())
    def one(case: Case) -> None:
        nonlocal failed
        report.cases += not failed
        if note is not None:
            note.write_text(f"seed {seed}: {case!r}\n", encoding="utf-8")
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = disagreement(case, report.counts)
        finally:
            faulthandler.cancel_dump_traceback_later()
        failed = failed or found is not None
        if found is not None:
            raise AssertionError(f"{found}\n    {case!r}")

    try:
        one()
    except AssertionError as smallest:
        report.found.append(f"seed {seed}: {smallest}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--backend", choices=elman.routing.NAMES, default="auto", help="Elman's; default: auto"
    )
    arguments = parser.parse_args()
    note = Path(".hypothesis") / "fuzz-case.txt"
    note.parent.mkdir(exist_ok=True)
    faulthandler.enable()
    torch.set_num_threads(1)
    with elman.use_backend(arguments.backend):
        report = fuzz(arguments.cases, arguments.seed, note)
    for failure in report.found:
        print(failure, end="\n\n")
    rate = report.cases / report.seconds
    print(f"{report.cases} cases from seed {arguments.seed} in {report.seconds:.0f} s, {rate:.0f} a second")
    for what, count in report.counts.most_common():
        print(f"{count:6} {what}")
    print(f"{len(report.found)} disagreements")
    return 1 if report.found else 0


if __name__ == "__main__":
    raise SystemExit(main())
