"""The backend native: a layer on a CPU by kernels/native.c, with eager's arguments and results.

The scans are C. Products over the whole sequence are torch's, see products.py. Nothing here sets torch's number
of threads: a call has threads of its own, at most as many as torch has, and one where that is quickest.
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compiled, eager
from .reference import COMPUTE

#: `struct scan` of the C source: 33 fields of 8 bytes.
_FIELDS = struct.Struct("33q")
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}
#: Nanoseconds of one call into C, after which Ctrl-C is heard.
PER_CALL = 4e8


class Plan(NamedTuple):
    """How a scan is shared out: threads, rows of a work item, and groups that the columns are cut into."""

    threads: int
    rows: int
    groups: int


def plan(B: int, H: int, T: int, D: int, itemsize: int = 4) -> Plan:
    """The quickest by the model below."""
    threads = torch.get_num_threads()
    forced = os.environ.get("NATIVE_PLAN")
    if forced:
        return Plan(*map(int, forced.split(",")))
    return Plan(1, min(B, 32), 1) if threads == 1 else Plan(1, min(B, 32), 1)


def forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    sizes: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """As `eager.forward`."""
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    if compute != dtype:
        x, h0, w_ih, w_hh = x.to(compute), h0.to(compute), w_ih.to(compute), w_hh.to(compute)
        bias = None if bias is None else bias.to(compute)
    output = eager.project(x, w_ih, bias)
    _scan(False, nonlinearity, _ROUNDING.get(dtype, 0), output, None, output, h0, w_hh, sizes, resets)
    return output.to(dtype)


def backward(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    sizes: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """As `eager.backward`."""
    compute = COMPUTE.get(output.dtype, output.dtype)
    output, w_hh = output.to(compute), w_hh.to(compute)
    g_out, g_hn = (None if g is None else g.to(compute) for g in (g_out, g_hn))
    dz = torch.empty_like(output, memory_format=torch.contiguous_format)
    _scan(True, nonlinearity, 0, g_out, output, dz, g_hn, w_hh, sizes, resets)
    return dz


def _scan(
    backward: bool,
    nonlinearity: str,
    rounding: int,
    given: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    start: Tensor | None,
    w_hh: Tensor,
    sizes: Tensor | None,
    resets: Tensor | None,
) -> None:
    """One pass in as many calls as let Ctrl-C through; the tensors as the fields of `struct scan`."""
    D, H, _ = w_hh.shape
    if sizes is None:
        T, B = out.shape[:2]
        offsets = None
    else:
        T, B = len(sizes), int(sizes[0])
        offsets = sizes.cumsum(0) - sizes
        sizes = sizes.contiguous()
    if B == 0 or T == 0 or H == 0:
        return
    given, h, start = (None if t is None else _readable(t) for t in (given, h, start))
    w_hh = w_hh.resolve_neg()
    threads, rows, groups = plan(B, H, T, D, out.element_size())
    per_call = _steps(B, H, D, out.element_size())
    scan = compiled.library(out.dtype == torch.float64).scan
    for begin in range(0, T, per_call):
        fields = _FIELDS.pack(
            backward,
            nonlinearity == "relu",
            rounding,
            D,
            T,
            B,
            H,
            begin,
            min(begin + per_call, T),
            threads,
            rows,
            groups,
            0 if sizes is None else sizes.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            *_rows(resets, sizes),
            *_rows(given, sizes),
            *_rows(h, sizes),
            *_rows(out, sizes),
            *((0, 0, 0) if start is None else (start.data_ptr(), *start.stride()[:2])),
            w_hh.data_ptr(),
            *w_hh.stride(),
        )
        if scan(fields):
            raise MemoryError(
                f"no memory for a scan's copy of W_hh, {D} x {H} x {H}; free some, or use 'eager'"
            )


def _steps(B: int, H: int, D: int, itemsize: int) -> int:
    """As many as one thread of a slow CPU does in PER_CALL: each reads W from memory, multiplies and begins."""
    ns = D * (H * H * itemsize / 4 * (0.5 + 0.1 * B) + B * H + 200)
    return max(1, int(PER_CALL / ns))


def _readable(t: Tensor) -> Tensor:
    """With its numbers in memory as they are, and a row's columns side by side."""
    t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows(t: Tensor | None, sizes: Tensor | None) -> tuple[int, int, int]:
    """Where it begins, and how far apart its steps and rows are, in elements."""
    if t is None:
        return 0, 0, 0
    if sizes is not None:
        return t.data_ptr(), 0, t.stride(0)
    return t.data_ptr(), *t.stride()[:2]
