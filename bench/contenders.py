"""Who takes part, all on the same numbers: ours on each backend, nn.RNN, the naive loop, peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench.measure import Target
from bench.peers import PEERS
from bench.rows import BASELINE, LEFT_OUT, UNAVAILABLE
from bench.workloads import COMPILED_MAX_STEPS, CPU_MAX_FLOPS, DTYPES, NAIVE_MAX_FLOPS, Workload
from elman import Elman, ElmanCell, Route, available_backends, explain, reference, routing

AUTO = "auto"
BACKENDS = ("native", "eager", "cudnn", "triton:resident", "triton:cooperative", "triton:step")
COMPILED = "compiled loop"
NAIVE = "naive loop"
OURS = (AUTO, *BACKENDS)
PEERS_BY_NAME = {peer.name: peer for peer in PEERS}
CONTENDERS = (BASELINE, *OURS, COMPILED, NAIVE, *PEERS_BY_NAME)
# What is wrong with these is their row's reason, and no failure of a run of ours. The naive loop is one: in
# 16 bits autograd adds up its weights' gradients step by step, rounding each.
GUESTS = (COMPILED, NAIVE, *PEERS_BY_NAME)

# (x, h0) -> (output, h_n), or for a cell (h,)
Layer = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def storage(dtype: str) -> torch.dtype:
    """What numbers of one of a Workload's dtypes are kept in: "tf32" is arithmetic, on float32."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


class Problem:
    """The numbers of one workload, drawn on the CPU from a fixed seed: the same on every machine.

    x (T, B, I), h0 (L * D, B, H) and the upstream gradients of output (T, B, D * H) and h_n are standard
    normal; a packed batch has the data of its PackedSequence in place of T and B, a cell has no T, L and D.
    `weights` maps nn.RNN's parameter names to uniform values within 1 / sqrt(H), as nn.RNN draws them, so
    tanh works in its curved part.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self.dtype = storage(workload.dtype)
        T, B, I, H = workload.steps, workload.batch, workload.input_size, workload.hidden_size
        D = 1 + workload.bidirectional
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        def uniform(*shape: int) -> Tensor:
            values = torch.rand(shape, generator=generator) * 2 - 1
            return (values / H**0.5).to(device, self.dtype)

        self.batch_sizes: Tensor | None = None
        if workload.packed:
            lengths = torch.tensor(workload.lengths)
            self.batch_sizes = (torch.arange(T)[:, None] < lengths).sum(1)
        rows = (B,) if workload.cell else (T, B) if self.batch_sizes is None else (workload.row_steps,)
        states = (B, H) if workload.cell else (workload.layers * D, B, H)
        self.x, self.h0 = normal(*rows, I), normal(*states)
        self.upstream = (normal(*states),) if workload.cell else (normal(*rows, D * H), normal(*states))
        shapes = {name: weight.shape for name, weight in self.module("meta").named_parameters()}
        self.weights = {name: uniform(*shape) for name, shape in shapes.items()}

    def module(self, device: torch.device | str) -> nn.RNN | nn.RNNCell:
        """nn.RNN, or nn.RNNCell, of this problem's sizes."""
        return self._made(nn.RNN, nn.RNNCell, device=device)

    def ours(self, backend: str) -> Elman | ElmanCell:
        """The layer that stands in for it."""
        return self._made(Elman, ElmanCell, device=self.device, backend=backend)

    def _made(self, layer: Callable[..., Any], cell: Callable[..., Any], **options: Any) -> Any:
        w = self.workload
        options = {**options, "nonlinearity": w.nonlinearity, "dtype": self.dtype}
        if w.cell:
            return cell(w.input_size, w.hidden_size, **options)
        return layer(w.input_size, w.hidden_size, w.layers, bidirectional=w.bidirectional, **options)

    def as_packed(self, layer: Callable[..., tuple[PackedSequence, Tensor]]) -> Layer:
        """A layer of PackedSequences as one of their data, whose gradient is x's."""
        sizes = self.batch_sizes

        def packed(x: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
            output, h_n = layer(PackedSequence(x, sizes), h0)
            return output.data, h_n

        return packed

    def naive(self, weights: list[Tensor]) -> Layer:
        """The reference on this problem, in whatever dtype it is called with."""
        w = self.workload

        def sequence(x: Tensor, h0: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return reference.elman(
                x,
                h0,
                weights,
                num_layers=w.layers,
                nonlinearity=w.nonlinearity,
                bidirectional=w.bidirectional,
                lengths=lengths,
            )

        def cell(x: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
            return (sequence(x[None], h0[None])[1][0],)

        def packed(x: PackedSequence, h0: Tensor) -> tuple[PackedSequence, Tensor]:
            padded, lengths = pad_packed_sequence(x)
            output, h_n = sequence(padded, h0, lengths.to(h0.device))
            return pack_padded_sequence(output, lengths), h_n

        return cell if w.cell else self.as_packed(packed) if w.packed else sequence

    def truth(self) -> dict[str, Tensor]:
        """Every result and gradient by the reference in float64, from the same (rounded) numbers."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.to(torch.float64, copy=True).requires_grad_()

        weights = {name: leaf(weight) for name, weight in self.weights.items()}
        naive = Contender(
            self.naive(list(weights.values())),
            x=leaf(self.x),
            h0=leaf(self.h0),
            weights=weights,
            upstream=tuple(upstream.double() for upstream in self.upstream),
        )
        results = naive.results("training")
        return {name: result for name, result in results.items() if result is not None}


@dataclass
class Contender:
    """A layer with its own copy of a problem's numbers, ready to run any pass."""

    layer: Layer
    x: Tensor
    h0: Tensor
    weights: dict[str, Tensor]
    upstream: tuple[Tensor, ...]
    results_of: tuple[Tensor, ...] = ()  # what the backward pass starts from

    def target(self, pass_name: str) -> Target:
        """What is timed. A backward pass starts without old gradients; that, and its forward pass, is not."""
        if pass_name == "forward":
            return Target(self.forward, prepare=lambda: None)
        if pass_name == "backward":
            return Target(self.backward, self.record)
        return Target(self.training, self.forget)

    def results(self, pass_name: str) -> dict[str, Tensor | None]:
        """output and h_n, and but for forward the gradients: by the very calls that are timed."""
        names = ("output", "h_n")
        if pass_name == "forward":
            return dict(zip(names, self.forward(), strict=False))
        target = self.target(pass_name)
        target.prepare()
        target.call()
        outputs = (result.detach() for result in self.results_of)
        leaves = {"x": self.x, "h0": self.h0, **self.weights}
        gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
        return {**dict(zip(names, outputs, strict=False)), **gradients}

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.layer(self.x, self.h0)

    def training(self) -> tuple[Tensor, ...]:
        self.results_of = self.layer(self.x, self.h0)
        self.backward()
        return self.results_of

    def backward(self) -> None:
        torch.autograd.backward(self.results_of, self.upstream)

    def record(self) -> None:
        """The forward pass of a backward pass."""
        self.forget()
        self.results_of = self.layer(self.x, self.h0)

    def forget(self) -> None:
        self.results_of = ()
        for leaf in (self.x, self.h0, *self.weights.values()):
            leaf.grad = None


def build(name: str, problem: Problem) -> Contender:
    """The contender of that name on that problem, with leaves of its own."""
    weights = {key: weight.clone().requires_grad_() for key, weight in problem.weights.items()}
    if name in (NAIVE, COMPILED):
        layer = problem.naive(list(weights.values()))
        if name == COMPILED:
            torch.compiler.reset()  # else other shapes count as its recompiling, which has a limit
            layer = torch.compile(layer)
    elif name in PEERS_BY_NAME:
        layer = PEERS_BY_NAME[name].build(problem, weights)
    else:
        module = problem.module(problem.device) if name == BASELINE else problem.ours(name)
        module.load_state_dict(problem.weights)
        weights = dict(module.named_parameters())
        layer = problem.as_packed(module) if problem.workload.packed else module
        if problem.workload.cell:
            layer = lambda x, h0: (module(x, h0),)  # noqa: E731
    return Contender(
        layer,
        x=problem.x.clone().requires_grad_(),
        h0=problem.h0.clone().requires_grad_(),
        weights=weights,
        upstream=problem.upstream,
    )


def absence(name: str, workload: Workload, device: torch.device) -> tuple[str, str] | None:
    """(status, reason) if this contender takes no part in this workload here, otherwise None."""
    if device.type == "cpu" and workload.flops > CPU_MAX_FLOPS:
        return (
            LEFT_OUT,
            f"On a CPU only shapes of up to {CPU_MAX_FLOPS / 1e9:g} GFLOP a forward pass are run.",
        )
    if name == NAIVE and workload.flops > NAIVE_MAX_FLOPS:
        return LEFT_OUT, f"The naive loop runs only shapes of up to {NAIVE_MAX_FLOPS / 1e9:g} GFLOP a pass."
    if name == COMPILED and workload.steps > COMPILED_MAX_STEPS:
        return LEFT_OUT, f"torch.compile unrolls the loop: only up to {COMPILED_MAX_STEPS} steps are tried."
    if name == AUTO and device.type == "cpu":
        return LEFT_OUT, f"Here auto is {taken_by_auto(workload, device)}: the same code."
    if name in BACKENDS:
        available = available_backends()[name.partition(":")[0]]
        if available is not True:
            return UNAVAILABLE, str(available)
        if name != "eager" and device.type != ("cpu" if name == "native" else "cuda"):
            where = "a CPU" if name == "native" else "a CUDA device"
            return UNAVAILABLE, f"{name} is timed on {where} only, and this run is on {device.type}."
    if name in PEERS_BY_NAME:
        reason = PEERS_BY_NAME[name].absence(workload, device)
        if reason:
            return UNAVAILABLE, reason
    return None


def taken_by_auto(workload: Workload, device: torch.device) -> str:
    """The backend that auto takes for a workload on a CPU: native, or eager."""
    return routing.route(
        AUTO,
        device,
        storage(workload.dtype),
        workload.hidden_size,
        workload.batch,
        1 + workload.bidirectional,
        one_step=workload.cell,
        ragged=workload.packed,
    ).backend


def route(name: str, problem: Problem) -> str:
    """What a sequence takes in an Elman layer of that name: backend, kernel, config; empty for all else."""
    w = problem.workload
    if name not in OURS or w.cell:
        return ""
    found = explain(
        batch=w.batch,
        seq=w.steps,
        input=w.input_size,
        hidden=w.hidden_size,
        dtype=problem.dtype,
        device=problem.device,
        bidirectional=w.bidirectional,
        backend=name,
    )
    return described(found)


def described(route: Route) -> str:
    """Backend, kernel and config in a few words."""
    config = ", ".join(f"{key}={value}" for key, value in route.config.items())
    kernel = "" if route.kernel == route.backend else f":{route.kernel}"
    return f"{route.backend}{kernel}{f' ({config})' if config else ''}"


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """PyTorch's switches for TF32, on for "tf32" and off for anything else, as they were afterwards.

    One for RNNs, which nn.RNN and Elman follow, one for matrix products, which all others follow.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
