"""The backend native: a layer on a CPU by kernels/native.c, with eager's arguments and results.

Scans are C, and so are single steps with their gradients; a sequence's products are torch's, see products.py.
Nothing here sets torch's number of threads: a scan takes at most as many, and one where that is best.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled, products
from .cores import SHARED, SHORT, plan
from .reference import COMPUTE, join

# The structs of the C source, all fields of 8 bytes: scan, affine in two parts, affine_backward.
_SCAN, _BACKWARD = struct.Struct("33q"), struct.Struct("26q")
_CONSTANT, _POINTERS = struct.Struct("11q"), struct.Struct("9q")
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}
_ACTS = {"tanh": 0, "relu": 1}
#: Nanoseconds of one call into C; Python sees Ctrl-C after it.
PER_CALL = 4e8
#: No tensor lies below, as a rule, and no storage is as long: what does is asked whether it has memory.
LOW = 2**36
#: Rows, or multiply-adds, up to which a step's gradients are C's too: torch's products of more are as quick.
MOST, FEW = 192, 2**22


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
    check(x, sizes, resets, h0=h0, w_ih=w_ih, w_hh=w_hh, bias=bias)
    b_ih = None if bias is None else bias.unbind(0)
    return _forward(x, h0, w_ih.unbind(0), w_hh.unbind(0), b_ih, None, sizes, resets, nonlinearity)


def plain_forward(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    D: int,
    sizes: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """As `forward`, with nn.RNN's own weights of one layer, which are read where they lie."""
    n = len(weights) // D
    b_ih, b_hh = (weights[2::4], weights[3::4]) if n == 4 else (None, None)
    return _forward(x, h0, weights[::n], weights[1::n], b_ih, b_hh, sizes, resets, nonlinearity)


def _forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    sizes: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """The output; weights and biases for each direction. Without b_hh, b_ih is the sum of both."""
    dtype, D, (H, I) = x.dtype, len(w_hh), w_ih[0].shape
    rounding, compute = _ROUNDING.get(dtype, 0), COMPUTE.get(dtype, dtype)
    one_step = sizes is None and resets is None and len(x) == 1
    if one_step and D * h0.shape[1] * H * (I + H) <= SHORT:
        output = x.new_empty(*x.shape[:-1], D * H)
        _step(x[0], _readable(h0), w_ih, w_hh, b_ih, b_hh, output, nonlinearity, rounding)
        return output
    if compute != dtype:
        x, h0 = x.to(compute), h0.to(compute)
        w_ih, w_hh = [w.to(compute) for w in w_ih], [w.to(compute) for w in w_hh]
        b_ih, b_hh = (None if some is None else [b.to(compute) for b in some] for some in (b_ih, b_hh))
    # torch itself reads what was freed, and crashes.
    x, w_ih = in_memory(x), [in_memory(w) for w in w_ih]
    b_ih, b_hh = (None if some is None else [in_memory(b) for b in some] for some in (b_ih, b_hh))
    if b_ih is not None and b_hh is not None:
        b_ih = [b + b_too for b, b_too in zip(b_ih, b_hh, strict=True)]
    output = products.project(x, join(w_ih), None if b_ih is None else join(b_ih))
    _scan(False, nonlinearity, rounding, output, None, output, h0, w_hh, sizes, resets)
    return output.to(dtype)


class Step:
    """One step of tensors whose shapes, strides and dtype are known: what it is made from, and no others.

    x (B, I) and h (B, H), or each with a 1 before; weights w_ih, w_hh and, with biases, b_ih and b_hh.
    """

    def __init__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor], nonlinearity: str) -> None:
        (B, I), H, self.nonlinearity = x.shape[-2:], h.shape[-1], nonlinearity
        self.shape, self.dtype, self.compute = (*x.shape[:-1], H), x.dtype, COMPUTE.get(x.dtype, x.dtype)
        (w_ih, w_hh), self.biased = weights[:2], len(weights) == 4
        strides = x.stride(-2), h.stride(-2), w_ih.stride(0), w_hh.stride(0), H
        self.constant = _CONSTANT.pack(_ACTS[nonlinearity], _ROUNDING.get(x.dtype, 0), B, H, I, H, *strides)
        library = compiled.library(x.dtype == torch.float64)
        self.function, self.backward_function = library.affine, library.affine_backward
        self.sizes = B, I, H
        self.no_memory = f"no memory for a step of {B} rows, {I} x {H}; free some, or use 'eager'"
        self.shapes = x.shape, h.shape, w_ih.shape, w_hh.shape, self.shape
        self.is_short = B * H * (I + H) <= SHARED
        self.has_backward = B <= MOST or B * H * (I + H) <= FEW
        # A weight's gradient takes as long to write as one row's products.
        self.is_short_backward = (1 + B) * H * (I + H) <= SHARED

    @staticmethod
    def fits(x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> bool:
        """Whether C can do it at once: nothing of size 0, the tensors as they lie."""
        return h.numel() * x.shape[-1] > 0 and all(t.stride(-1) == 1 for t in (x, h, *weights))

    def may_read(self, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, new: Tensor) -> bool:
        """Whether `backward` is for these: a hook for saved tensors may bring others back, of any kind.

        Not so the gradient: torch itself sees to its shape, dtype and device.
        """
        if not self.has_backward or self.shapes != (x.shape, h.shape, w_ih.shape, w_hh.shape, new.shape):
            return False
        return all(
            t.is_cpu
            and t.dtype == self.dtype
            and t.stride(-1) == 1
            and not t.is_neg()
            and (t.data_ptr() >= LOW or _has_memory(t))
            for t in (x, h, w_ih, w_hh, new)
        )

    def __call__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
        out = _like(h)  # its shape, and created in half of new_empty's time
        if self.biased:
            w_ih, w_hh, b_ih, b_hh = weights
            biases = b_ih.data_ptr(), b_hh.data_ptr()
        else:
            (w_ih, w_hh), biases = weights, (0, 0)
        threads = 1 if self.is_short else torch.get_num_threads()
        tensors = x.data_ptr(), h.data_ptr(), w_ih.data_ptr(), w_hh.data_ptr(), *biases, out.data_ptr()
        if min(tensors[: 6 if self.biased else 4]) < LOW and not all(map(_has_memory, (x, h, *weights))):
            x, h = x.reshape(1, *x.shape[-2:]), h.reshape(1, *h.shape[-2:])
            return plain_forward(x, h, weights, 1, None, None, self.nonlinearity).reshape(self.shape)
        if self.function(self.constant + _POINTERS.pack(*tensors, threads, 0)):
            raise MemoryError(self.no_memory)
        return out

    def backward(
        self, g: Tensor, new: Tensor, x: Tensor, h: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients that `needs` names, of x, h and the weights, from g, that of `new`."""
        (B, I, H), (w_ih, w_hh) = self.sizes, weights
        g = _readable(g)
        room = g.new_empty(2 * B + 1, H, dtype=self.compute)
        found = [_like(t) if needed else None for t, needed in zip((x, h, w_ih, w_hh), needs, strict=False)]
        found += [g.new_empty(H) if needed else None for needed in needs[4:]]
        pointers = _pointers(x, h, w_ih, w_hh, g, new, *found)
        strides = x.stride(-2), h.stride(-2), w_ih.stride(0), w_hh.stride(0), g.stride(-2), new.stride(-2)
        numbers = (_ACTS[self.nonlinearity], _ROUNDING.get(g.dtype, 0), B, H, I, H, *strides)
        pointers += [0] * (12 - len(pointers))
        threads = 1 if self.is_short_backward else torch.get_num_threads()
        if self.backward_function(_BACKWARD.pack(*numbers, *pointers, room.data_ptr(), threads)):
            raise MemoryError(self.no_memory)
        return found


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


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
    check(output, sizes, resets, g_out=g_out, g_hn=g_hn, output=output, w_hh=w_hh)
    compute = COMPUTE.get(output.dtype, output.dtype)
    output, w_hh = output.to(compute), w_hh.to(compute)
    g_out, g_hn = (None if g is None else g.to(compute) for g in (g_out, g_hn))
    dz = torch.empty_like(output, memory_format=torch.contiguous_format)
    _scan(True, nonlinearity, 0, g_out, output, dz, g_hn, w_hh.unbind(0), sizes, resets)
    return dz


def check(sequence: Tensor, sizes: Tensor | None, resets: Tensor | None, **tensors: Tensor | None) -> None:
    """Raises RuntimeError where C would read past an operator's arguments: none else checks a graph's.

    sequence is x or the output, padded (T, B, ...) or, with sizes, packed (N, ...).
    """
    w_hh = tensors["w_hh"]
    assert w_hh is not None
    D, H, _ = w_hh.shape
    rows = tuple(sequence.shape[:-1])
    if D not in (1, 2) or len(rows) != 1 + (sizes is None):
        raise RuntimeError(
            f"{D} directions came with a sequence of {sequence.dim()} dimensions; expected 1 or 2, with 3 "
            "dimensions or, where it is packed, 2"
        )
    if sizes is not None:
        right = sizes.dim() == 1 and sizes.dtype == torch.int64 and sizes.is_cpu and sizes.numel() > 0
        if not right or sizes[-1] < 1 or int(sizes.sum()) != rows[0] or bool((sizes.diff() > 0).any()):
            raise RuntimeError(
                f"the packed rows' sizes are {sizes.dtype} of {tuple(sizes.shape)}; expected torch.int64 on "
                f"the CPU, none above the one before, at least 1, and {rows[0]} together, as the input has "
                "rows"
            )
    B = rows[1] if sizes is None else int(sizes[0])
    expected = {
        "h0": (D, B, H),
        "g_hn": (D, B, H),
        "w_ih": (D, H, sequence.shape[-1]),
        "w_hh": (D, H, H),
        "bias": (D, H),
        **dict.fromkeys(("g_out", "output"), (*rows, D * H)),
    }
    for name, t in tensors.items():
        if t is not None and (t.shape != expected[name] or t.device.type != "cpu"):
            raise RuntimeError(f"{name} is {t.device}, {tuple(t.shape)}; expected cpu, {expected[name]}")
        if t is not None and t.dtype != sequence.dtype and not name.startswith("g_"):
            raise RuntimeError(f"{name} is {t.dtype} beside {sequence.dtype}; expected one dtype")
    if resets is not None and (resets.shape != rows or resets.dtype != torch.bool or not resets.is_cpu):
        raise RuntimeError(
            f"resets is {resets.device}, {resets.dtype} of {tuple(resets.shape)}; expected cpu, torch.bool "
            f"of {rows}"
        )


def _step(
    x: Tensor,
    h: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    out: Tensor,
    nonlinearity: str,
    rounding: int,
) -> None:
    """out (1, B, D * H) = act(x w_ih^T + h w_hh^T + b_ih + b_hh) for x (B, I) and h (D, B, H)."""
    x, (B, I), H, size = _readable(x), x.shape, h.shape[2], out.element_size()
    function = compiled.library(out.dtype == torch.float64).affine
    for d in range(len(w_ih)):
        w, w_too = _readable(w_ih[d]), _readable(w_hh[d])
        biases = [None if some is None else _readable(some[d]) for some in (b_ih, b_hh)]
        strides = x.stride(0), h.stride(1), w.stride(0), w_too.stride(0), len(w_ih) * H
        pointers = [x.data_ptr(), h.data_ptr() + d * h.stride(0) * size, w.data_ptr(), w_too.data_ptr()]
        pointers += [*_pointers(*biases), out.data_ptr() + d * H * size, 1, 0]
        constant = _CONSTANT.pack(_ACTS[nonlinearity], rounding, B, H, I, H, *strides)
        if function(constant + _POINTERS.pack(*pointers)):
            raise MemoryError(f"no memory for a copy of {I} x {H} weights; free some, or use 'eager'")


def _scan(
    backward: bool,
    nonlinearity: str,
    rounding: int,
    given: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    start: Tensor | None,
    w_hh: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
) -> None:
    """One pass in as many calls as let Ctrl-C through; the tensors as the fields of `struct scan`."""
    D, H = len(w_hh), w_hh[0].shape[0]
    if sizes is None:
        T, B = out.shape[:2]
        rows_of_steps = 0, 0
    else:
        T, B = len(sizes), int(sizes[0])
        sizes = sizes.contiguous()
        offsets = sizes.cumsum(0) - sizes
        rows_of_steps = sizes.data_ptr(), offsets.data_ptr()
    if not (T and B and H):
        return
    given, h, start = (None if t is None else _readable(t) for t in (given, h, start))
    resets = None if resets is None else in_memory(resets)
    w_hh = [in_memory(w) for w in w_hh]
    if D == 2 and w_hh[0].stride() != w_hh[1].stride():
        w_hh = [w.contiguous() for w in w_hh]
    starts = (0, 0, 0) if start is None else (start.data_ptr(), *start.stride()[:2])
    weights = w_hh[0].data_ptr(), w_hh[-1].data_ptr(), *w_hh[0].stride()
    shared = plan(B, H, T, D, out.element_size())
    tensors = (
        *rows_of_steps,
        *(i for t in (resets, given, h, out) for i in _rows(t, sizes)),
        *starts,
        *weights,
    )
    per_call = _steps(B, H, D, out.element_size())
    function = compiled.library(out.dtype == torch.float64).scan
    for begin in range(0, T, per_call):
        end = min(begin + per_call, T)
        numbers = (backward, _ACTS[nonlinearity], rounding, D, T, B, H, begin, end)
        if function(_SCAN.pack(*numbers, *shared, *tensors)):
            raise MemoryError(
                f"no memory for a scan's copy of W_hh, {D} x {H} x {H}; free some, or use 'eager'"
            )


def _steps(B: int, H: int, D: int, itemsize: int) -> int:
    """As many as one thread of a slow CPU does in PER_CALL: each reads W, multiplies and begins."""
    ns = D * (H * H * itemsize / 4 * (0.5 + 0.1 * B) + B * H + 200)
    return max(1, int(PER_CALL / ns))


def _readable(t: Tensor) -> Tensor:
    """With a row's columns side by side, as `in_memory`."""
    t = in_memory(t)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _has_memory(t: Tensor) -> bool:
    """Not so where it was freed, or is all zeros: its address is then how far it lies within its storage."""
    return t.data_ptr() != t.storage_offset() * t.element_size()


def in_memory(t: Tensor) -> Tensor:
    """With its numbers in memory, as they are."""
    if t.is_neg():
        t = t.resolve_neg()
    if t.numel() and not _has_memory(t):
        if not t._is_zerotensor():
            raise RuntimeError(
                f"a tensor of shape {tuple(t.shape)} has no memory; expected numbers: its storage was freed, "
                "or it stands for another tensor"
            )
        t = torch.zeros(t.shape, dtype=t.dtype)
    return t


def _rows(t: Tensor | None, sizes: Tensor | None) -> tuple[int, ...]:
    """Where it begins, and how far apart its steps and rows are, in elements."""
    if t is None:
        return 0, 0, 0
    strides = t.stride()
    return (t.data_ptr(), 0, strides[0]) if sizes is not None else (t.data_ptr(), *strides[:2])
