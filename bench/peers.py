"""Other people's layers, timed beside ours where they are installed; each is called as it documents.

None is a dependency: absence() looks for the package without importing it, build() imports it, and what
that raises is the caller's to record. All start from the same x, input product included.

Read, in November 2026, to write this:
- flag-gems: https://github.com/flagos-ai/FlagGems at 842a3a77. The 5.0.2 of PyPI has no rnn_tanh.
- xma: https://github.com/open-lm-engine/accelerated-model-architectures at 384ed0a7 (0.1.0). It is not on
  PyPI: the Xma 0.1 there is a stream cipher.
- FlashRNN: https://github.com/NX-AI/flashrnn, 1.0.8 of PyPI.
- haste: https://github.com/lmnt-com/haste at ceba32ec (0.5.0rc0 on PyPI).
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.workloads import Workload

if TYPE_CHECKING:
    from bench.contenders import Problem

# x (T, B, I), h0 (L * D, B, H) to output (T, B, D * H), h_n (L * D, B, H); packed as in contenders.Problem.
Layer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# nn.RNN's parameter names, in its order, to leaves that receive gradients.
Weights = dict[str, Tensor]

# What a workload may ask for beyond one tanh layer in one direction.
FORMS: dict[str, Callable[[Workload], bool]] = {
    "cells": lambda w: w.cell,
    "packed batches": lambda w: w.packed,
    "several layers": lambda w: w.layers > 1,
    "both directions": lambda w: w.bidirectional,
    "relu": lambda w: w.nonlinearity != "tanh",
}
# The most shared memory that a program can have on the largest multiprocessors that there are (sm_90).
SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Peer:
    """One of them, on CUDA devices only, as they all are.

    name: its contender's. package: what is imported. source: the file in it, seen from the package, that
    some versions lack. install: how to get it. differs: what the table's reader has to know. build: see
    below. dtypes: of Workload. takes: names of FORMS. limit: a sentence on a size that it can't do. never:
    a sentence, if it can do nothing that is measured here.

    build(problem, weights) imports it and returns a Layer of that problem with these weights.
    """

    name: str
    package: str
    source: str
    install: str
    differs: str
    build: Callable[[Problem, Weights], Layer]
    dtypes: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    limit: Callable[[Workload], str | None] = lambda workload: None
    never: str = ""

    def absence(self, workload: Workload, device: torch.device) -> str | None:
        """Why it takes no part in this workload on that device, as a sentence; None if it can."""
        if self.never:
            return self.never
        spec = find_spec(self.package)
        if spec is None:
            return f"{self.name} is not installed; {self.install}."
        if not any((Path(folder) / self.source).exists() for folder in spec.submodule_search_locations or ()):
            return f"The {self.package} that is installed has no {self.source}; {self.install}."
        if device.type != "cuda":
            return f"{self.name} needs a CUDA device, and this run is on {device.type}."
        for form, asked in FORMS.items():
            if asked(workload) and form not in self.takes:
                return f"{self.name} has nothing for {form}."
        if workload.dtype not in self.dtypes:
            return f"{self.name} computes in {', '.join(self.dtypes)}, and this is {workload.dtype}."
        return self.limit(workload)


def _flag_gems(problem: Problem, weights: Weights) -> Layer:
    """torch.rnn_tanh's arguments. By name, not through flag_gems.enable(), which would patch all of torch."""
    gems = importlib.import_module("flag_gems")
    w, params = problem.workload, tuple(weights.values())
    # has_biases, num_layers, dropout, train, bidirectional
    options = (True, w.layers, 0.0, True, w.bidirectional)

    def padded(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = gems.rnn_tanh(x, h0, params, *options, False)
        return output, h_n

    def packed(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = gems.rnn_tanh_data(x, problem.batch_sizes, h0, params, *options)
        return output, h_n

    return packed if w.packed else padded


def _xma(problem: Problem, weights: Weights) -> Layer:
    """Its batches come first, its heads (one here) before H, and it multiplies the state from the left."""
    rnn = importlib.import_module("xma.layers").rnn
    w_ih, w_hh, b_ih, b_hh = weights.values()

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        inputs = F.linear(x, w_ih, b_ih + b_hh).transpose(0, 1).unsqueeze(2)
        output, h_n = rnn(inputs, w_hh.t().unsqueeze(0), h0.transpose(0, 1))
        return output.squeeze(2).transpose(0, 1), h_n.transpose(0, 1)

    return layer


def _xma_limit(workload: Workload) -> str | None:
    padded = 1 << (workload.hidden_size - 1).bit_length()
    size = padded * padded * (2 if workload.dtype in ("float16", "bfloat16") else 4)
    if size <= SHARED_MEMORY:
        return None
    return (
        f"xma keeps all of W_hh, padded to a power of two, in one program: at H = {workload.hidden_size} "
        f"that is {size >> 10} KiB, and a multiprocessor has at most {SHARED_MEMORY >> 10}."
    )


def _flashrnn(problem: Problem, weights: Weights) -> Layer:
    """Its fused kernels, its default: inputs (B, T, gates, heads, H), states (1, B, T, heads, H)."""
    flashrnn = importlib.import_module("flashrnn").flashrnn
    w_ih, w_hh, b_ih, b_hh = weights.values()
    dtype = str(problem.dtype).removeprefix("torch.")

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        inputs = F.linear(x, w_ih).transpose(0, 1)[:, :, None, None]
        states, last = flashrnn(
            inputs,
            w_hh[None, None],
            (b_ih + b_hh)[None, None],
            states=h0[:, :, None, None],
            function="elman",
            backend="cuda_fused",
            dtype=dtype,
        )
        return states[0, :, :, 0].transpose(0, 1), last[:, :, 0, 0]

    return layer


def _flashrnn_limit(workload: Workload) -> str | None:
    """Its tiles are 16 x 16, in the narrow dtypes also 8 rows x 32 columns; it pads the rows to 8."""
    if not _cuda_toolkit():
        return "flashrnn compiles CUDA code when called, and no CUDA toolkit (nvcc) is found; set CUDA_HOME."
    eights = -(-workload.batch // 8)
    multiple = 32 if eights % 2 and workload.dtype != "tf32" else 16
    if workload.hidden_size % multiple:
        return f"flashrnn's fused kernels take only hidden sizes that are multiples of {multiple} here."
    return None


def _cuda_toolkit() -> bool:
    """Where torch.utils.cpp_extension, which flashrnn compiles with, looks for one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or (Path(home) / "bin" / "nvcc").exists()


def _haste(problem: Problem, weights: Weights) -> Layer:
    raise NotImplementedError(HASTE)


HASTE = (
    "haste has no Elman RNN: its layers are GRU, LSTM, IndRNN (a vector in the place of W_hh) and their "
    "forms with layer normalization."
)

PEERS: tuple[Peer, ...] = (
    Peer(
        "flag-gems",
        "flag_gems",
        "ops/rnn_tanh.py",
        "pip install git+https://github.com/flagos-ai/FlagGems (newer than 5.0.2, which has no rnn_tanh)",
        "Triton. For 64 < H <= 256 and I <= 256 one program per 16 rows keeps the weights for all steps; "
        "otherwise one per row reads them again each step, without matrix units. float32 products are three "
        "TF32 ones, also where the row says tf32. A packed batch is one launch a step.",
        _flag_gems,
        ("float32", "tf32", "float16", "bfloat16"),
        takes=("packed batches", "several layers", "both directions"),
    ),
    Peer(
        "xma",
        "xma",
        "layers/rnn/op.py",
        "pip install git+https://github.com/open-lm-engine/accelerated-model-architectures (the Xma of PyPI "
        "is another project)",
        "Triton. One program per 1, 16 or 32 rows keeps all of W_hh, padded to a power of two. Input product "
        "and bias are torch's linear layer here. dW_hh is added up by atomics, so its last bits vary; dh is "
        "rounded to the dtype each step. float32 products are TF32. Tuned once per padded H, on the batch "
        "that comes first.",
        _xma,
        ("tf32", "float16", "bfloat16"),
        limit=_xma_limit,
    ),
    Peer(
        "flashrnn",
        "flashrnn",
        "flashrnn/flashrnn.py",
        "pip install flashrnn, beside a CUDA toolkit and g++",
        "CUDA, compiled by nvcc for each batch and hidden size. The input product is torch's linear layer "
        "here. The sum before tanh and its gradient are rounded to the dtype; float32 products are TF32.",
        _flashrnn,
        ("tf32", "float16", "bfloat16"),
        limit=_flashrnn_limit,
    ),
    Peer("haste", "haste_pytorch", "", "", HASTE, _haste, never=HASTE),
)
