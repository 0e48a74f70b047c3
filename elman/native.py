"""The backend native: a layer on a CPU by kernels/native.c, with eager's arguments and results.

The scans are C, and so are short products; long ones are torch's, see products.py. Nothing here sets torch's
number of threads: a scan has threads of its own, at most as many as torch has, and one where that is best.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled, products
from .cores import LARGEST, NARROWEST, SHARED, SHORT, Plan, plan
from .reference import COMPUTE, join

# The structs of the C source, all fields of 8 bytes: scan, affine in two parts, affine_backward.
_SCAN, _BACKWARD = struct.Struct("35q"), struct.Struct("26q")
_CONSTANT, _POINTERS = struct.Struct("11q"), struct.Struct("9q")
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}
_ACTS = {"tanh": 0, "relu": 1, "none": 2}
#: Nanoseconds of one call into C; Python sees Ctrl-C after it.
PER_CALL = 4e8
#: No tensor lies below, as a rule, and no storage is as long: what does is asked whether it has memory.
LOW = 2**36
#: Rows up to which a step's gradients are the memory's work, not the multiplier's.
FEW = 4
#: Multiply-adds up to which a product longer than SHORT stays on one core, and up to which it is C's at all.
ALONE, LONG = 2**22, 2**27


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
    rows = x.shape[0] if sizes is not None else x.shape[0] * x.shape[1]
    work = rows * D * H * (I + H if one_step else I)
    if compute != dtype and not (one_step and work <= SHORT):
        x, h0 = x.to(compute), h0.to(compute)
        w_ih, w_hh = [w.to(compute) for w in w_ih], [w.to(compute) for w in w_hh]
        b_ih, b_hh = (None if some is None else [b.to(compute) for b in some] for some in (b_ih, b_hh))
    if work > SHORT:
        if b_ih is not None and b_hh is not None:
            b_ih = [b + b_too for b, b_too in zip(b_ih, b_hh, strict=True)]
        if work > LONG:
            output = products.project(x, join(w_ih), None if b_ih is None else join(b_ih))
        else:
            output = x.new_empty(*x.shape[:-1], D * H)
            flat, out = x.reshape(rows, I), output.view(rows, D * H)
            for d in range(D):
                product(flat, w_ih[d], out[:, d * H : (d + 1) * H], None if b_ih is None else b_ih[d])
    else:
        output = x.new_empty(*x.shape[:-1], D * H)
        h = _readable(h0) if one_step else None
        # For one step this is all that is to do.
        act, stored = (nonlinearity, rounding) if one_step else ("none", 0)
        _affine(_readable(x.reshape(rows, I)), h, w_ih, w_hh, b_ih, b_hh, output, act, stored)
        if one_step:
            return output
    _scan(False, nonlinearity, rounding, output, None, output, h0, w_hh, sizes, resets)
    return output.to(dtype)


class Step:
    """One step of tensors whose shapes, strides and dtype are known: what it is made from, and no others.

    x (B, I) and h (B, H), or each with a 1 before; weights w_ih, w_hh and, with biases, b_ih and b_hh.
    """

    def __init__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor], nonlinearity: str) -> None:
        (B, I), H, self.nonlinearity = x.shape[-2:], h.shape[-1], nonlinearity
        self.shape, self.dtype = (*x.shape[:-1], H), x.dtype
        (w_ih, w_hh), self.biased = weights[:2], len(weights) == 4
        strides = x.stride(-2), h.stride(-2), w_ih.stride(0), w_hh.stride(0), H
        self.constant = _CONSTANT.pack(_ACTS[nonlinearity], _ROUNDING.get(x.dtype, 0), B, H, I, H, *strides)
        library = compiled.library(x.dtype == torch.float64)
        self.function, self.backward_function = library.affine, library.affine_backward
        self.sizes = B, I, H
        self.shapes = x.shape, h.shape, w_ih.shape, w_hh.shape, self.shape
        self.is_short = B * H * (I + H) <= SHARED
        import os
        self.has_backward = B * H * (I + H) <= LONG
        self.is_short_backward = (1+B) * H * (I + H) <= int(os.environ.get("SB",2**18))

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
        out = x.new_empty(self.shape)
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
            raise MemoryError(
                f"no memory for the threads of a step of {self.sizes}; free some, or use 'eager'"
            )
        return out

    def backward(
        self, g: Tensor, new: Tensor, x: Tensor, h: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients that `needs` names, of x, h and the weights, from g, that of `new`."""
        (B, I, H), (w_ih, w_hh) = self.sizes, weights
        g = _readable(g)
        room = g.new_empty(2 * B + 1, H, dtype=COMPUTE.get(g.dtype, g.dtype))
        shapes = *self.shapes[:4], (H,), (H,)
        found = [g.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs, strict=False)]
        pointers = _pointers(x, h, w_ih, w_hh, g, new, *found)
        strides = x.stride(-2), h.stride(-2), w_ih.stride(0), w_hh.stride(0), g.stride(-2), new.stride(-2)
        numbers = (_ACTS[self.nonlinearity], _ROUNDING.get(g.dtype, 0), B, H, I, H, *strides)
        pointers += [0] * (12 - len(pointers))
        threads = 1 if self.is_short_backward else torch.get_num_threads()
        if self.backward_function(_BACKWARD.pack(*numbers, *pointers, room.data_ptr(), threads)):
            raise MemoryError(
                f"no memory for the threads of a step of {self.sizes}; free some, or use 'eager'"
            )
        return found


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
    B = rows[1] if sizes is None else int(sizes[0]) if sizes.numel() else 0
    expected = {
        "h0": (D, B, H),
        "g_hn": (D, B, H),
        "w_ih": (D, H, sequence.shape[-1]),
        "w_hh": (D, H, H),
        "bias": (D, H),
        **dict.fromkeys(("g_out", "output", "dz"), (*rows, D * H)),
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
    if sizes is None:
        return
    right = sizes.dim() == 1 and sizes.dtype == torch.int64 and sizes.is_cpu and sizes.numel() > 0
    if not right or sizes[-1] < 1 or int(sizes.sum()) != rows[0] or bool((sizes.diff() > 0).any()):
        raise RuntimeError(
            f"the packed rows' sizes are {sizes.dtype} of {tuple(sizes.shape)}; expected torch.int64 on the "
            f"CPU, none above the one before, at least 1, and {rows[0]} together, as the input has rows"
        )


def _affine(
    x: Tensor,
    h: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    out: Tensor,
    act: str,
    rounding: int,
) -> None:
    """out (..., D * H) = act(x w_ih^T + h w_hh^T + b_ih + b_hh) for x (N, I) and h (D, N, H), or None."""
    (N, I), (H, _), size = x.shape, w_ih[0].shape, out.element_size()
    function = compiled.library(out.dtype == torch.float64).affine
    for d in range(len(w_ih)):
        w = _readable(w_ih[d])
        second: tuple[int, ...] = (0, 0, 0, 0, 0)
        if h is not None:
            w2 = _readable(w_hh[d])
            second = (H, h.data_ptr() + d * h.stride(0) * size, h.stride(1), w2.data_ptr(), w2.stride(0))
        biases = [None if some is None else _readable(some[d]) for some in (b_ih, b_hh)]
        constant = (_ACTS[act], rounding, N, H, I, second[0], x.stride(0), second[2], w.stride(0), second[4])
        pointers = [x.data_ptr(), second[1], w.data_ptr(), second[3], *_pointers(*biases)]
        pointers += [out.data_ptr() + d * H * size, 1, 0]
        if function(_CONSTANT.pack(*constant, len(w_ih) * H) + _POINTERS.pack(*pointers)):
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
    resets = None if resets is None else _in_memory(resets)
    w_hh = [_in_memory(w) for w in w_hh]
    if D == 2 and w_hh[0].stride() != w_hh[1].stride():
        w_hh = [w.contiguous() for w in w_hh]
    starts = (0, 0, 0) if start is None else (start.data_ptr(), *start.stride()[:2])
    weights = 0, w_hh[0].data_ptr(), w_hh[-1].data_ptr(), *w_hh[0].stride()
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
        numbers = (backward, _ACTS[nonlinearity], rounding, D, T, B, H, H, begin, end)
        if function(_SCAN.pack(*numbers, *shared, *tensors)):
            raise MemoryError(
                f"no memory for a scan's copy of W_hh, {D} x {H} x {H}; free some, or use 'eager'"
            )


def _steps(B: int, H: int, D: int, itemsize: int) -> int:
    """As many as one thread of a slow CPU does in PER_CALL: each reads W, multiplies and begins."""
    ns = D * (H * H * itemsize / 4 * (0.5 + 0.1 * B) + B * H + 200)
    return max(1, int(PER_CALL / ns))


def _readable(t: Tensor) -> Tensor:
    """With a row's columns side by side, as `_in_memory`."""
    t = _in_memory(t)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _has_memory(t: Tensor) -> bool:
    """Not so where it was freed, or is all zeros: its address is then how far it lies within its storage."""
    return t.data_ptr() != t.storage_offset() * t.element_size()


def _in_memory(t: Tensor) -> Tensor:
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


def product(
    a: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, added_to: Tensor | None = None
) -> Tensor:
    """out (N, H) = a w^T + bias or + added_to, which may be out; a (N, K), w (H, K) of any strides."""
    (N, K), H = a.shape, w.shape[0]
    a, w, bias = _readable(a), _in_memory(w), None if bias is None else _readable(bias)
    if not (N and H):
        return out
    most = torch.get_num_threads() if N * K * H > ALONE else 1
    blocks = -(-N // LARGEST)
    groups = 1 if blocks >= most else min(most, -(-H // NARROWEST))
    shared = Plan(most, min(N, LARGEST), groups)
    numbers = (False, _ACTS["none"], 0, 1, 1, N, H, K, 0, 1, *shared, 0, 0, 0, 0, 0)
    given = (0, 0, 0) if added_to is None else (added_to.data_ptr(), 0, added_to.stride(0))
    places = (*given, 0, 0, 0, out.data_ptr(), 0, out.stride(0), a.data_ptr(), 0, a.stride(0))
    weights = (0 if bias is None else bias.data_ptr(), w.data_ptr(), w.data_ptr(), *w.stride())
    if compiled.library(out.dtype == torch.float64).scan(_SCAN.pack(*numbers, *places, *weights)):
        raise MemoryError(f"no memory for a product's copy of {H} x {K} weights; free some, or use 'eager'")
    return out


def takes_gradients(dz: Tensor, *others: Tensor) -> bool:
    """Whether `gradients` is for these, x first: the products are no longer than C's are to be."""
    if dz.numel() * (others[0].shape[-1] + 2 * dz.shape[-1]) > 4 * LONG:
        return False
    return all(t.is_cpu and t.dtype == dz.dtype for t in others)


def gradients(
    dz: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, output: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As `ops._layer_products` where all rows have T steps: the gradients of x, h0, w_ih, w_hh and bias."""
    check(x, None, None, dz=dz, h0=h0, w_ih=w_ih, w_hh=w_hh, output=output)
    (D, H, I), (T, B, _) = w_ih.shape, dz.shape
    dz, output, h0 = _readable(dz), _readable(output), _readable(h0)
    N, transpose = T * B, compiled.library(dz.dtype == torch.float64).transpose
    flat, rows, states = dz.reshape(N, D * H), x.reshape(N, I), output.reshape(N, D * H)
    results = [dz.new_empty(t.shape) if n else None for t, n in zip((x, h0, w_ih, w_hh), needs, strict=False)]
    dx, dh0, dw_ih, dw_hh = results
    db = dz.new_empty(D, H) if needs[4] else None
    if dx is not None:
        product(flat, w_ih.flatten(0, 1).t(), dx.view(N, I))
    by_column = dz.new_empty(H, N)
    for d in range(D):
        columns = slice(d * H, (d + 1) * H)
        g = flat[:, columns]
        # The rows that begin with h0, those that another row follows, and those that follow one.
        begin, before, after = slice(B), slice(N - B), slice(B, N)
        if d == 1:
            begin, before, after = slice(N - B, N), after, before
        if dh0 is not None:
            product(g[begin], w_hh[d].t(), dh0[d])
        if dw_ih is None and dw_hh is None and db is None:
            continue
        sums = 0 if db is None else db[d].data_ptr()
        transpose(*map(ctypes.c_int64, (g.data_ptr(), g.stride(0), N, H, by_column.data_ptr(), sums)))
        if dw_ih is not None:
            product(by_column, rows.t(), dw_ih[d])
        if dw_hh is not None:
            product(by_column[:, begin], h0[d].t(), dw_hh[d])
            if T > 1:
                product(by_column[:, after], states[before, columns].t(), dw_hh[d], added_to=dw_hh[d])
    return dx, dh0, dw_ih, dw_hh, db
