"""Is a kernel right on this device? Each family against the float64 reference, in a process of its own.

    python -m bench.gpu.verify KERNEL ARITHMETIC ROWS.jsonl

A family is a kernel and an arithmetic, such as "resident bfloat16". It goes on behind the cases that have a
row; whoever started the process learns from the journal what an illegal access, an abort or a hang has cost.
Rows: see `Case` and `judge`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import agreement, contenders, interpreter, machine
from bench.gpu.journal import Journal, plain
from bench.precompile import Launch, candidates
from elman import cudnn, reference
from elman.kernels import configs, cooperative
from elman.kernels.configs import Chip, Config, Problem
from elman.kernels.errors import DeviceHangError

#: Arithmetic by name: dtype, and the class of a float32 product; float32's candidates are of both ways to
#: multiply in that class.
ARITHMETIC = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "float64": (torch.float64, "ieee"),
}
#: Hidden sizes by kernel; those that a kernel has no config for are left out. Of float16 and float64, which
#: differ from others in little, every other one.
HIDDEN = {
    "resident": (64, 17, 130, 264),
    "fused": (64, 17),
    "cooperative": (512, 130, 2048, 1024),
    "step": (264,),
    "cell": (264,),
}
FEWER = ("float16", "float64")
#: Input size of the kernels that make the input product too.
INPUTS = {"fused": 24, "cell": 48}
STEPS = 20
#: What a case is beside its sizes. "saturated": pre-activations of 30, where tanh is 1.
MODES = ("full", "lengths", "resets", "saturated")
#: In tf32 nn.RNN's input product alone is off by 2.5e-4, whatever its recurrence is (measured on an H200).
TF32_BAR = 1.5 * 2.5e-4
#: An error up to so many times its bar is imprecise; above it the result is wrong.
IMPRECISE = 10.0


@dataclass(frozen=True)
class Case:
    """One launch to verify, forward and, but for cell and fused, the backward pass of what it has made."""

    kernel: str
    arithmetic: str
    B: int
    H: int
    D: int
    mode: str
    backward: bool
    config: Config
    g_hn: bool = True

    @property
    def problem(self) -> Problem:
        dtype, precision = ARITHMETIC[self.arithmetic]
        inputs, ragged = INPUTS.get(self.kernel, 0), self.mode in ("lengths", "resets")
        return Problem(self.B, self.H, self.D, dtype, precision, self.backward, inputs, ragged)

    @property
    def launch(self) -> Launch:
        both = self.mode == "resets"  # rows of all lengths, and resets
        lengths = both or self.mode == "lengths"
        return Launch(self.kernel, self.problem, self.config, lengths, both, self.g_hn and self.backward)

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} D={self.D} {self.mode}: {self.launch}"


def cases(kernel: str, arithmetic: str, chip: Chip, interpreted: bool = False) -> Iterator[Case]:
    """Every candidate on full rows, 9 and 64; the first with lengths, resets, saturated, both directions.

    interpreted: one config of each and the smallest hidden size, which takes the interpreter seconds a case.
    """
    one_way, dtype = kernel in INPUTS, ARITHMETIC[arithmetic][0]
    if kernel == "cooperative" and (dtype == torch.float64 or interpreted):
        return
    sizes = HIDDEN[kernel][:: 2 if arithmetic in FEWER else 1]
    if interpreted:
        sizes = (17,)
    for H, backward in itertools.product(sizes, (False,) if one_way else (False, True)):
        for (B, D), mode in itertools.product(((9, 1), (9, 2), (1, 1), (64, 1)), MODES):
            if kernel == "cell" and (D > 1 or mode in ("lengths", "resets")):
                continue
            if (B == 1 and mode != "full") or (D == 2 and mode not in ("full", "resets")):
                continue
            if (B == 64 and mode != "full") or (mode == "lengths" and arithmetic in FEWER):
                continue
            if (mode == "saturated" and backward) or (B == 64 and interpreted):
                continue
            case = Case(kernel, arithmetic, B, H, D, mode, backward, configs.StepConfig(16, 16, 16))
            found = candidates(kernel, case.problem, chip)
            if (B, D) == (64, 1) and kernel == "resident":
                found += wide(case.problem, chip)
            every = D == 1 and mode == "full" and B > 1 and not interpreted
            for config in found if every else found[:1]:
                yield replace(case, config=config, g_hn=mode != "full" or D == 2)


def wide(problem: Problem, chip: Chip) -> list[Config]:
    """Configs of resident with 16 and 64 rows a program, which wgmma multiplies: the model offers none."""
    found: dict[int, Config] = {}
    for config in configs.space("resident", problem, chip):
        assert isinstance(config, configs.ResidentConfig)
        large = config.BLOCK_B in (16, 64) and config.C >= 64 and config.BLOCK_B not in found
        if large and isinstance(configs.estimate("resident", config, problem, chip), configs.Estimate):
            found[config.BLOCK_B] = config
    return list(found.values())


@dataclass(frozen=True)
class Numbers:
    """A problem's tensors, the reference's results, and nn.RNN's own error of the output where it can run."""

    x: Tensor
    w_ih: Tensor
    bias: Tensor
    z: Tensor
    h0: Tensor
    w_hh: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    g_out: Tensor
    g_hn: Tensor
    output: Tensor
    nn_rnn: float | None


@functools.lru_cache(maxsize=2)
def numbers(kernel: str, arithmetic: str, B: int, H: int, D: int, mode: str, device: torch.device) -> Numbers:
    """Drawn from a fixed seed. z has so few bits that a product with the unit matrix keeps it exactly."""
    dtype, _ = ARITHMETIC[arithmetic]
    generator = torch.Generator().manual_seed(H + 10 * B)
    T, I = (1 if kernel == "cell" else STEPS), INPUTS.get(kernel, 0)
    scale = 30.0 if mode == "saturated" else 1.0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w_ih, bias = normal(T, B, max(I, 1)), normal(D, H, max(I, 1)) / max(I, 1) ** 0.5, normal(D, H)
    z, h0, w_hh = scale * normal(T, B, D * H).bfloat16().float(), normal(D, B, H), normal(D, H, H) / H**0.5
    g_out, g_hn, cut = normal(T, B, D * H), normal(D, B, H), torch.rand(T, B, generator=generator) < 0.3
    lengths = resets = None
    if mode in ("lengths", "resets"):
        lengths = torch.tensor([(T // 2 or 1, T, 1)[b % 3] for b in range(B)])
        past = torch.arange(T)[:, None] >= lengths
        for tensor in (z, g_out):  # nothing may read it
            tensor[past] = float("nan")
        if mode == "resets":
            resets = (cut & ~past).to(device)
        x[past] = 0.0
        lengths = lengths.to(device)
    moved = [t.to(device, dtype) for t in (x, scale * w_ih, bias, z, h0, w_hh, g_out, g_hn)]
    x, w_ih, bias, z, h0, w_hh, g_out, g_hn = moved
    wide_: tuple[Tensor | None, ...]
    if I:
        wide_ = (x.double(), h0.double(), w_ih.double(), w_hh.double(), bias.double())
    else:
        pick = torch.eye(D * H, dtype=torch.float64, device=device).view(D, H, D * H)
        wide_ = (_clean(z, lengths).double(), h0.double(), pick, w_hh.double(), None)
    output, _ = reference.layer(*wide_, lengths, "tanh", resets)  # type: ignore[arg-type]
    found = Numbers(x, w_ih, bias, z, h0, w_hh, lengths, resets, g_out, g_hn, output, None)
    if device.type == "cuda" and lengths is None and dtype != torch.float64:
        found = replace(found, nn_rnn=_nn_rnn(found, arithmetic, bool(I)))
    return found


def _clean(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t with zeros past the lengths, for the reference, which takes 0 * NaN as it comes."""
    if lengths is None:
        return t
    past = torch.arange(t.shape[0], device=t.device)[:, None] >= lengths
    return t.masked_fill(past[..., None], 0.0)


def _nn_rnn(n: Numbers, arithmetic: str, has_inputs: bool) -> float:
    """||nn.RNN's output - reference|| / ||reference||; its input product, with the unit matrix, is exact."""
    D, H = n.w_hh.shape[:2]
    x, w_ih = n.x, n.w_ih
    if not has_inputs:
        x = n.z
        w_ih = torch.eye(D * H, dtype=x.dtype, device=x.device).view(D, H, D * H)
    weights = []
    for d in range(D):
        bias = n.bias[d] if has_inputs else torch.zeros_like(n.bias[d])
        weights += [t.clone() for t in (w_ih[d], n.w_hh[d], bias, torch.zeros_like(bias))]
    weights = cudnn.in_one_chunk(weights, cudnn.Options(True, 1, "tanh", 0.0, False, D == 2))
    with contenders.arithmetic(arithmetic):
        output, _ = torch.rnn_tanh(x, n.h0, weights, True, 1, 0.0, False, D == 2, False)
    return error(output, n.output)


def error(own: Tensor, truth: Tensor) -> float:
    """||own - truth|| / ||truth||; NaN for a NaN."""
    return ((own.double() - truth).norm() / truth.norm()).item()


def run(case: Case, n: Numbers) -> tuple[Tensor, Tensor]:
    """What the case's launch writes, and what the reference says it should be."""
    module = importlib.import_module(f"elman.kernels.{case.launch.module}")
    precision = case.problem.precision
    options = (n.lengths, "tanh", precision, case.config, n.resets)
    if case.kernel == "cell":
        out = torch.empty_like(n.h0[0])
        module.cell(n.x[0], n.h0[0], n.w_ih[0], n.w_hh[0], n.bias[0], out, "tanh", precision, case.config)
        return out, n.output[0]
    if case.kernel == "fused":
        return module.scan_fused(n.x, n.w_ih, n.bias, n.h0, n.w_hh, *options), n.output
    if not case.backward:
        return module.scan(n.z.clone(), n.h0, n.w_hh, *options), n.output
    # Of the reference's output, rounded: the pass is verified whatever the forward one makes.
    output, dz = n.output.to(n.z.dtype), torch.empty_like(n.z)
    g_hn = n.g_hn if case.g_hn else None
    module.scan_backward(n.g_out, g_hn, output, n.w_hh, dz, *options)
    g_out = _clean(n.g_out, n.lengths).double()
    given = (g_out, None if g_hn is None else g_hn.double(), output.double(), n.w_hh.double())
    return dz, reference.layer_dz(*given, n.lengths, "tanh", n.resets)


def judge(case: Case, device: torch.device) -> dict[str, Any]:
    """The case's row: its error, nn.RNN's, its bar, and "right", "imprecise", "wrong" or "other bits"."""
    n = numbers(case.kernel, case.arithmetic, case.B, case.H, case.D, case.mode, device)
    own, truth = run(case, n)
    again, _ = run(case, n)
    found, nn_rnn = error(own, truth), n.nn_rnn
    if case.kernel == "cooperative":  # its launches have been waited for: a hang is not the next case's
        cooperative.check(device)
    bar = agreement.floor("d x" if case.backward else "output", STEPS, case.problem.dtype)
    if case.arithmetic == "tf32":
        bar = TF32_BAR
    bar = max(bar, agreement.FACTOR * (nn_rnn or 0.0))
    verdict = "right" if found <= bar else "imprecise" if found <= IMPRECISE * bar else "wrong"
    if verdict == "right" and not torch.equal(own, again):
        verdict = "other bits"
    nothing = own.isnan().double().mean().item()
    return {
        "error": _finite(found),
        "nn_rnn": _finite(nn_rnn or 0.0),
        "bar": bar,
        "verdict": verdict,
        "nan": nothing,
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def described(case: Case) -> dict[str, Any]:
    """The case as JSON."""
    return {**asdict(case), "config": asdict(case.config)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("kernel", choices=HIDDEN)
    parser.add_argument("arithmetic", choices=ARITHMETIC)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--until", type=float, default=math.inf, help="time.monotonic() at its end")
    options = parser.parse_args(argv)
    from elman.kernels.common import chip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        interpreter.mend()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what the next line asks for
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that fresh memory is filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    journal = Journal(options.rows)
    todo = list(cases(options.kernel, options.arithmetic, chip(device), device.type == "cpu"))
    if not any("total" in row for row in journal.rows):
        journal.add(total=len(todo))
    done = {row["n"] for row in journal.rows if "row" in row}
    for n, case in enumerate(todo):
        if n in done:
            continue
        if time.monotonic() >= options.until:
            break
        journal.begin(n, patience=2, **described(case))
        start = time.perf_counter()
        row = judged(case, device)
        journal.add(n=n, row={**described(case), **row, "seconds": round(time.perf_counter() - start, 3)})
        if row["verdict"] == "crashed":
            return machine.LOST_GPU
    return 0


def judged(case: Case, device: torch.device) -> dict[str, Any]:
    """As `judge`; a case that raises is "failed", "hung" if its programs waited in vain, or "crashed".

    After a crash the process can use its GPU no more.
    """
    try:
        return judge(case, device)
    except DeviceHangError as caught:
        return {"verdict": "hung", "reason": plain(caught)}
    except Exception as caught:
        return {"verdict": "crashed" if machine.lost(device) else "failed", "reason": plain(caught)}


if __name__ == "__main__":
    sys.exit(main())
