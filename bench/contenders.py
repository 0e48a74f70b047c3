"""Who takes part, all on the same numbers: ours on each backend, nn.RNN, and the naive loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.measure import Target
from bench.rows import BASELINE, LEFT_OUT, UNAVAILABLE
from bench.workloads import NAIVE_MAX_FLOPS, Workload
from elman import Elman, available_backends, reference

NAIVE = "naive loop"
BACKENDS = ("eager", "triton", "cudnn")
CONTENDERS = (BASELINE, *BACKENDS, NAIVE)

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Problem:
    """The numbers of one shape, drawn on the CPU from a fixed seed: the same on every machine.

    x (T, B, I), h0 (1, B, H) and the upstream gradients g_output (T, B, H) and g_h_n (1, B, H) are
    standard normal; `weights` maps nn.RNN's parameter names to uniform values within 1 / sqrt(H), as
    nn.RNN draws them, so tanh works in its curved part.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        B, T, I, H = workload[:4]
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        def uniform(*shape: int) -> Tensor:
            values = torch.rand(shape, generator=generator) * 2 - 1
            return (values / H**0.5).to(device, self.dtype)

        self.x, self.h0 = normal(T, B, I), normal(1, B, H)
        self.g_output, self.g_h_n = normal(T, B, H), normal(1, B, H)
        self.weights = {
            "weight_ih_l0": uniform(H, I),
            "weight_hh_l0": uniform(H, H),
            "bias_ih_l0": uniform(H),
            "bias_hh_l0": uniform(H),
        }

    def truth(self) -> dict[str, Tensor]:
        """Every result and gradient by the reference in float64, from the same (rounded) numbers."""
        weights = {name: weight.double().requires_grad_() for name, weight in self.weights.items()}
        naive = Contender(
            lambda x, h0: reference.elman(x, h0, list(weights.values())),
            x=self.x.double().requires_grad_(),
            h0=self.h0.double().requires_grad_(),
            weights=weights,
            upstream=(self.g_output.double(), self.g_h_n.double()),
        )
        results = naive.results("training")
        return {name: result for name, result in results.items() if result is not None}


@dataclass
class Contender:
    """A layer with its own copy of a problem's numbers, ready to run either pass."""

    layer: Forward
    x: Tensor
    h0: Tensor
    weights: dict[str, Tensor]
    upstream: tuple[Tensor, Tensor]

    def target(self, pass_name: str) -> Target:
        """What is timed. A training pass starts without old gradients, which is not timed."""
        if pass_name == "forward":
            return Target(self.forward, prepare=lambda: None)
        return Target(self.training, self.forget)

    def results(self, pass_name: str) -> dict[str, Tensor | None]:
        """output and h_n, and when training the gradients: by the very calls that are timed."""
        if pass_name == "forward":
            output, h_n = self.forward()
            return {"output": output, "h_n": h_n}
        self.forget()
        output, h_n = self.training()
        leaves = {"x": self.x, "h0": self.h0, **self.weights}
        gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
        return {"output": output.detach(), "h_n": h_n.detach(), **gradients}

    def forward(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.layer(self.x, self.h0)

    def training(self) -> tuple[Tensor, Tensor]:
        results = self.layer(self.x, self.h0)
        torch.autograd.backward(results, self.upstream)
        return results

    def forget(self) -> None:
        for leaf in (self.x, self.h0, *self.weights.values()):
            leaf.grad = None


def build(name: str, problem: Problem) -> Contender:
    """The contender of that name on that problem, with leaves of its own."""
    _, _, I, H = problem.workload[:4]
    if name == NAIVE:
        weights = {key: weight.clone().requires_grad_() for key, weight in problem.weights.items()}
        flat = list(weights.values())

        def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            return reference.elman(x, h0, flat)

    else:
        if name == BASELINE:
            layer = nn.RNN(I, H, device=problem.device, dtype=problem.dtype)
        else:
            layer = Elman(I, H, device=problem.device, dtype=problem.dtype, backend=name)
        layer.load_state_dict(problem.weights)
        weights = dict(layer.named_parameters())
    return Contender(
        layer,
        x=problem.x.clone().requires_grad_(),
        h0=problem.h0.clone().requires_grad_(),
        weights=weights,
        upstream=(problem.g_output, problem.g_h_n),
    )


def absence(name: str, workload: Workload, device: torch.device) -> tuple[str, str] | None:
    """(status, reason) if this contender takes no part in this shape here, otherwise None."""
    if name == NAIVE and workload.flops > NAIVE_MAX_FLOPS:
        return LEFT_OUT, f"The naive loop runs only shapes of up to {NAIVE_MAX_FLOPS / 1e9:g} GFLOP a pass."
    if name in BACKENDS:
        available = available_backends()[name]
        if available is not True:
            return UNAVAILABLE, str(available)
        if name != "eager" and device.type != "cuda":
            return UNAVAILABLE, f"{name} is timed on a CUDA device only, and this run is on {device.type}."
    return None
