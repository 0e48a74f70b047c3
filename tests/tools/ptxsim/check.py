"""Runs a case in the emulator and compares what it computes with the float64 reference."""

from __future__ import annotations

import hashlib
import importlib
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from elman import reference
from elman.kernels import configs, cooperative
from elman.kernels.configs import Chip
from elman.kernels.errors import DeviceHangError
from tests.helpers import error
from tests.scans import clean, problem, some_resets, truth
from tests.tolerances import tolerance

from .cases import ARITHMETIC, WAYS, Case
from .launch import Emulator

#: Of tf32 products, relative to the norm: operands are rounded to 11 bits.
TF32_BOUND = 2e-3


@dataclass(frozen=True)
class Outcome:
    """error: over the tolerance; None where there is no result. digest: of the result's bits.

    wrong: what was found, in words. unused: races of reads whose values go nowhere: the results are the same
    to the bit if they see NaN.
    """

    error: float | None
    digest: str
    wrong: list[str]
    unused: list[str]


def row(case: Case, way: str, target: str) -> dict[str, Any]:
    """What is kept of a case that is run in this way, and how long it took."""
    start = time.perf_counter()
    with Emulator(target, **WAYS[way]) as emulator:
        outcome = check(case, emulator, configs.CHIPS[target])
    return {
        "case": str(case), "how": way, "error": outcome.error and float(f"{outcome.error:.3g}"),
        "wrong": outcome.wrong, "unused": outcome.unused, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def check(case: Case, emulator: Emulator, chip: Chip) -> Outcome:
    """Runs the case; and once more where all that was found is reads that race, which then see NaN."""
    emulator.reset()
    first = _run(case, emulator, chip)
    if len(first.wrong) != len(emulator.found):  # the result is wrong, too; or all is excused already
        return first
    again = emulator.rerun(lambda: _run(case, emulator, chip))
    if again and again.digest == first.digest and len(again.wrong) == len(emulator.found):
        return replace(first, wrong=[], unused=first.wrong)
    return first


def _run(case: Case, emulator: Emulator, chip: Chip) -> Outcome:
    chip = replace(chip, processors=case.processors) if case.processors else chip
    wrong: list[str] = []
    error, digest, gave_up = None, "", False
    module = importlib.import_module(f"elman.kernels.{case.module}")
    withheld = frozenset({(case.withheld, 0, 0)} if case.withheld >= 0 else ())
    options = emulator.options
    emulator.options = replace(options, withheld=withheld)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "chip", return_value=chip))
        if withheld:
            stack.enter_context(mock.patch.object(cooperative, "PATIENCE", 20))
        try:
            error, digest = _results(case, emulator, wrong)
        except DeviceHangError as hang:
            gave_up = bool(withheld)
            wrong += [] if gave_up else [f"{type(hang).__name__}: {hang}"]
        except Exception as caught:  # whatever it is, it belongs to this case, and the next one can run
            wrong.append(f"{type(caught).__name__}: {caught}")
        else:
            if withheld:
                wrong.append("a program was missing and nobody noticed")
        finally:
            emulator.options = options
    wrong += [fault for fault in emulator.faults if fault not in wrong]  # which the launcher has caught
    if emulator.launches == emulator.since and not wrong:
        wrong.append("nothing was launched")
    found = emulator.lines()
    serious = {kind for kind, _, _ in emulator.serious}
    if gave_up and serious <= {"uninitialised"}:  # all that it reads then is thrown away
        return Outcome(error, digest, wrong, found)
    return Outcome(error, digest, wrong + found, [])


def _results(case: Case, emulator: Emulator, wrong: list[str]) -> tuple[float, str]:
    torch.manual_seed(case.seed)
    launch = {"cell": _cell, "fused": _fused}.get(case.kernel, _backward if case.backward else _forward)
    actual, expected, lengths, around = launch(case, emulator)
    dtype, precision = ARITHMETIC[case.arithmetic]
    bound = TF32_BOUND if precision == "tf32" else tolerance(dtype)
    off = error(actual, expected)
    # The norm of everything would hide an element that is wholly wrong. Where large terms of an input's
    # product cancel, what is left of them has their error.
    cancels = case.I and dtype in (torch.float32, torch.float64)  # a half's result is rounded more roughly
    each = 4 * bound * (max(1.0, case.scale) if cancels else 1.0)
    worst = ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()
    if not worst <= each:
        wrong.append(f"{worst:.3g} of the largest > {each:.3g}; {_where(actual, expected)}")
    if not off <= bound:
        wrong.append(f"error {off:.3g} > {bound:.3g}; {_where(actual, expected)}")
    if lengths is not None and not (actual[torch.arange(len(actual))[:, None] >= lengths] == 0).all():
        wrong.append("not zero past the lengths")
    if around is not None and not around.isnan().all():
        wrong.append("wrote outside of the view")
    raw = actual.contiguous().view(torch.uint8).numpy().tobytes()
    return off / bound, hashlib.sha256(raw).hexdigest()[:12]


#: The result, the truth, the lengths, and the memory around the result.
Launched = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _forward(case: Case, emulator: Emulator) -> Launched:
    z, h0, w_hh, lengths, _, _, resets = _numbers(case)
    expected, _ = truth(clean(z, lengths), h0, w_hh, lengths, _word(case), resets)
    memory, z = _part(z) if case.layout == "part" else (None, z.clone())
    kernel: Any = importlib.import_module(f"elman.kernels.{case.module}")
    actual = kernel.scan(
        z, h0, w_hh, lengths, _word(case), ARITHMETIC[case.arithmetic][1], case.config, resets
    )
    return actual, expected, lengths, None if case.kernel == "cooperative" else _around(memory)


def _backward(case: Case, emulator: Emulator) -> Launched:
    z, h0, w_hh, lengths, g_out, g_hn, resets = _numbers(case)
    output, _ = truth(clean(z, lengths), h0, w_hh, lengths, _word(case), resets)
    output = clean(output.to(z.dtype), lengths)
    g_o, g_h = _gradients(case, g_out, g_hn, z.dtype)
    expected = _dz(case, g_o, g_h, output, w_hh, lengths, resets)
    memory = None
    if case.layout == "part":
        memory, dz = _part(torch.full_like(output, float("nan")))
        output = _part(output)[1]
    else:
        dz = emulator.uninitialised(torch.zeros_like(output))
    kernel: Any = importlib.import_module(f"elman.kernels.{case.module}")
    precision = ARITHMETIC[case.arithmetic][1]
    kernel.scan_backward(g_o, g_h, output, w_hh, dz, lengths, _word(case), precision, case.config, resets)
    return dz, expected, lengths, _around(memory)


def _gradients(
    case: Case, g_out: Tensor, g_hn: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Those that the case has, g_out in its layout."""
    if case.layout == "expanded":
        g_out = torch.ones((), dtype=dtype).expand(g_out.shape)
    elif case.layout == "part":
        g_out = g_out.transpose(0, 1).contiguous().transpose(0, 1)
    return g_out if case.g_out else None, g_hn if case.g_hn else None


def _dz(
    case: Case, g_out: Tensor | None, g_hn: Tensor | None, output: Tensor, w_hh: Tensor,
    lengths: Tensor | None, resets: Tensor | None,
) -> Tensor:  # fmt: skip
    """The reference's."""
    wide = (
        None if g_out is None else clean(g_out, lengths).double(), None if g_hn is None else g_hn.double()
    )  # fmt: skip
    return reference.layer_dz(*wide, output.double(), w_hh.double(), lengths, _word(case), resets)


def _fused(case: Case, emulator: Emulator) -> Launched:
    z, h0, w_hh, lengths, _, _, resets = _numbers(case)
    dtype = z.dtype
    x = torch.randn(case.T, case.B, case.I, dtype=torch.float64).mul(case.scale)
    w_ih = torch.randn(case.D, case.H, case.I, dtype=torch.float64) / case.I**0.5
    bias = torch.randn(case.D, case.H, dtype=torch.float64).to(dtype) if case.bias else None
    if lengths is not None:
        x[torch.arange(case.T)[:, None] >= lengths] = float("nan")
    x, w_ih = x.to(dtype), w_ih.to(dtype)
    if case.layout == "part":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = [None if t is None else t.double() for t in (clean(x, lengths), h0, w_ih, w_hh, bias)]
    expected, _ = reference.layer(*wide, lengths, _word(case), resets)
    kernel: Any = importlib.import_module("elman.kernels.resident")
    precision = ARITHMETIC[case.arithmetic][1]
    actual = kernel.scan_fused(x, w_ih, bias, h0, w_hh, lengths, _word(case), precision, case.config, resets)
    return actual, expected, lengths, None


def _cell(case: Case, emulator: Emulator) -> Launched:
    dtype, precision = ARITHMETIC[case.arithmetic]
    B, I, H = case.B, case.I, case.H
    x, h, w_ih, w_hh, b = (
        torch.randn(s, dtype=torch.float64) for s in ((B, I), (B, H), (H, I), (H, H), (H,))
    )
    x, w_hh, w_ih = x * case.scale, w_hh / H**0.5, w_ih / max(I, 1) ** 0.5
    x, h, w_ih, w_hh, b = (t.to(dtype) for t in (x, h, w_ih, w_hh, b))
    bias = b if case.bias else None
    if case.layout == "part":
        x, h = x.t().contiguous().t(), torch.cat([h, h], 1)[:, :H]
    out = emulator.uninitialised(torch.zeros(B, H, dtype=dtype))
    kernel: Any = importlib.import_module("elman.kernels.step")
    kernel.cell(x, h, w_ih, w_hh, bias, out, _word(case), precision, case.config)
    wide = [None if t is None else t.double()[None] for t in (x, h, w_ih, w_hh, bias)]
    return out, reference.layer(*wide, None, _word(case))[0][0], None, None


def _word(case: Case) -> str:
    return "relu" if case.relu else "tanh"


def _numbers(case: Case) -> tuple:
    dtype = ARITHMETIC[case.arithmetic][0]
    z, h0, w_hh, lengths, g_out, g_hn = problem(
        case.T, case.B, case.H, case.D, dtype, case.lengths, case.scale
    )
    return z, h0, w_hh, lengths, g_out, g_hn, some_resets(case.T, case.B, lengths) if case.resets else None


def _part(t: Tensor) -> tuple[Tensor, Tensor]:
    """Larger memory of NaN, batch first, and a view of it that holds t."""
    T, B, N = t.shape
    memory = torch.full((B, T + 2, N + 3), float("nan"), dtype=t.dtype)
    view = memory.transpose(0, 1)[1:-1, :, 2:-1]
    view.copy_(t)
    return memory, view


def _around(memory: Tensor | None) -> Tensor | None:
    """What of it lies outside of the view."""
    if memory is None:
        return None
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.transpose(0, 1)[1:-1, :, 2:-1] = False
    return memory[outside]


def _where(actual: Tensor, expected: Tensor) -> str:
    far = (actual.double() - expected).abs().nan_to_num(nan=torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(far.argmax(), far.shape))
    nans = int(actual.isnan().sum())
    return f"worst at {place}: {actual[place].item():g} for {expected[place].item():g}; {nans} NaN"
