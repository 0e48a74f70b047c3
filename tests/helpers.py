"""Problems with known answers: make one, run it on a backend, compare with the float64 reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import elman
from elman import cudnn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: A text that is easily learnt by heart.
RHYME = "the clock struck one and down he ran; the clock struck two and up she flew. " * 8
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# Not asked of elman.available_backends(): a fault there must not make tests vanish.
TRITON = ["triton:step", "triton:resident"] if importlib.util.find_spec("triton") else []
BACKENDS = ["native", "eager", *TRITON, *(["cudnn", "auto"] if DEVICE == "cuda" else [])]

# nn.RNN's operator runs on CPU tensors too, and so does our wrapper around it when called directly.
OPERATOR = "cudnn wrapper"
ANY_BACKEND = BACKENDS if DEVICE == "cuda" else [*BACKENDS, OPERATOR]


def compiling(*arguments: Any, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter in the root where Triton compiles its kernels: whether it interprets them is chosen
    once for a process.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Problem:
    """Arguments of the functional form, and the gradients that reach its two results."""

    x: Tensor
    hx: Tensor | None
    weights: dict[str, Tensor]
    lengths: Tensor | None
    g_out: Tensor | None
    g_hn: Tensor | None
    options: dict = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        hx = {} if self.hx is None else {"hx": self.hx}
        return {"input": self.x, **hx, **self.weights}

    def double(self) -> Problem:
        """The same numbers in float64."""
        up = {name: None if t is None else t.double() for name, t in vars(self).items() if _floating(t)}
        return replace(self, **up, weights={name: w.double() for name, w in self.weights.items()})


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def weight_shapes(I: int, H: int, layers: int, directions: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """nn.RNN's parameters in nn.RNN's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            shapes[f"weight_ih_l{n}{suffix}"] = (H, directions * H if n else I)
            shapes[f"weight_hh_l{n}{suffix}"] = (H, H)
            if bias:
                shapes[f"bias_ih_l{n}{suffix}"] = shapes[f"bias_hh_l{n}{suffix}"] = (H,)
    return shapes


def make(
    T: int = 4,
    B: int = 3,
    I: int = 4,
    H: int = 6,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
    directions: int = 1,
    bias: bool = True,
    hx: bool = True,
    ragged: bool = False,
    nonlinearity: str = "tanh",
    seed: int = 0,
) -> Problem:
    """A random problem, the same for the same arguments; ragged: lengths from 1 to T, unsorted."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def uniform(*shape: int) -> Tensor:
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (numbers / H**0.5).to(DEVICE, dtype)

    lengths = None
    if ragged:
        # From the middle outwards, so that neither end of the batch is the longest or the shortest row.
        lengths = torch.tensor([(2 * T, 1, T + 1)[b % 3] // 2 or 1 for b in range(B)], device=DEVICE)
    return Problem(
        x=normal(T, B, I),
        hx=normal(layers * directions, B, H) if hx else None,
        weights={name: uniform(*s) for name, s in weight_shapes(I, H, layers, directions, bias).items()},
        lengths=lengths,
        g_out=normal(T, B, directions * H),
        g_hn=normal(layers * directions, B, H),
        options={
            "num_layers": layers,
            "bias": bias,
            "nonlinearity": nonlinearity,
            "bidirectional": directions == 2,
        },
    )


def make_smooth(**options: Any) -> Problem:
    """make(), for relu with the first seed of which no pre-activation is too close to zero for its dtype.

    There relu's derivative jumps, and one rounding of the forward pass decides between 0 and 1.
    """
    if options["nonlinearity"] != "relu":
        return make(**options)
    return make(**options, seed=_first_seed(tuple(options.items())))


@cache
def _first_seed(options: tuple) -> int:
    margin = max(2 * torch.finfo(dict(options)["dtype"]).eps, 1e-4)
    return next(s for s in range(1000) if nearest_to_zero(make(**dict(options), seed=s)) > margin)


def nearest_to_zero(p: Problem) -> float:
    """The smallest pre-activation; not those that are zero without any rounding, from zeros alone."""
    nearest = []

    def relu(z: Tensor) -> Tensor:
        nearest.append(z.abs()[z != 0])
        return torch.relu(z)

    p = p.double()
    with mock.patch.dict(elman.reference.ACTIVATIONS, relu=relu), torch.no_grad():
        forward("reference", p, p.x, p.hx, list(p.weights.values()))
    return torch.cat(nearest).min().item()


def forward(
    backend: str, p: Problem, x: Tensor, hx: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """p's (output, h_n) on these tensors by a backend, the wrapper, "reference" or "nn.RNN" itself."""
    if backend == "reference":
        return elman.reference.elman(x, hx, weights, lengths=p.lengths, **p.options)
    if backend in (OPERATOR, "nn.RNN"):
        o = p.options
        if hx is None:
            D = 2 if o["bidirectional"] else 1
            hx = x.new_zeros(o["num_layers"] * D, x.shape[1], weights[1].shape[0])
        if backend == OPERATOR:
            options = cudnn.Options(
                o["bias"], o["num_layers"], o["nonlinearity"], 0.0, False, o["bidirectional"]
            )
            return cudnn.elman(x, hx, weights, p.lengths, options)
        assert p.lengths is None
        operator = torch.rnn_tanh if o["nonlinearity"] == "tanh" else torch.rnn_relu
        return operator(x, hx, weights, o["bias"], o["num_layers"], 0.0, True, o["bidirectional"], False)
    return elman.elman(x, hx, weights, lengths=p.lengths, backend=backend, **p.options)


def run(backend: str, p: Problem) -> dict[str, Tensor]:
    """output, h_n and the gradient of everything that has one, by name."""
    # A view keeps the strides of an expanded or transposed argument, which detach().clone() would not.
    leaves = {name: t.detach().requires_grad_() for name, t in p.leaves().items()}
    output, h_n = forward(backend, p, leaves["input"], leaves.get("hx"), [leaves[n] for n in p.weights])
    pairs = [(r, g) for r, g in ((output, p.g_out), (h_n, p.g_hn)) if g is not None]
    grads = torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [g for _, g in pairs])
    return {
        "output": output.detach(),
        "h_n": h_n.detach(),
        **{f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)},
    }


def error(actual: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """||actual - truth|| / max(||truth||, floor) in float64; a NaN gives NaN, which passes no bound."""
    difference = (actual.double() - truth.double()).norm().item()
    scale = max(truth.double().norm().item(), floor)
    return difference / scale if scale else difference


def check(actual: dict[str, Tensor], truth: dict[str, Tensor], bound: float, floor: float = 0.0) -> None:
    """Every tensor of `truth` is there, of that shape, with an error of at most `bound`."""
    assert actual.keys() == truth.keys()
    for name, tensor in truth.items():
        assert actual[name].shape == tensor.shape, name
    errors = {name: error(actual[name], tensor, floor) for name, tensor in truth.items()}
    assert all(e <= bound for e in errors.values()), {n: e for n, e in errors.items() if not e <= bound}


def copy_of(layer: nn.RNNBase, kind: type = nn.RNN, **options: object) -> nn.RNNBase:
    """An nn.RNN (or another kind) with the layer's options and state_dict."""
    other = kind(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        nonlinearity=layer.nonlinearity,
        bias=layer.bias,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        **{"device": DEVICE, "dtype": layer.weight_ih_l0.dtype, **options},
    )
    other.load_state_dict(layer.state_dict())
    return other
