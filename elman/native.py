"""The backend native: a layer on a CPU by kernels/native.c, with eager's arguments and results.

Scans and single steps are C; other products are C's as `Layer` says, else torch's, see products.py.
Nothing here sets torch's number of threads: a scan takes at most as many, and one where that is best.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import compiled, products
from .cores import SHARED, UNPACKED, plan
from .reference import COMPUTE, join

# The structs of the C source, all fields of 8 bytes: scan and affine, each in two parts, and affine_backward.
_SCAN, _SCANNED = struct.Struct("19q"), struct.Struct("15q")
_AFFINE, _MAPPED = struct.Struct("12q"), struct.Struct("9q")
_BACKWARD = struct.Struct("28q")
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}
_ACTS = {"tanh": 0, "relu": 1}
_NO_ACT = 2
#: Nanoseconds of one call into C; Python sees Ctrl-C after it.
PER_CALL = 4e8
#: No tensor lies below, as a rule, and no storage is as long: what does is asked whether it has memory.
LOW = 2**36
#: Rows of all steps up to which the products beside a scan are C's too: torch's of more are as quick.
MOST = 512


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
    dtype, D = x.dtype, len(w_hh)
    rounding, compute = _ROUNDING.get(dtype, 0), COMPUTE.get(dtype, dtype)
    if sizes is None and resets is None:
        kinds = [kind for kind in (w_ih, w_hh, b_ih, b_hh) if kind is not None]
        weights = [kind[d] for d in range(D) for kind in kinds]
        if not Layer.fits(x, h0, weights, D):
            x, h0, *weights = map(_readable, (x, h0, *weights))
        if Layer.fits(x, h0, weights, D):
            return Layer(x, h0, weights, nonlinearity)(x, h0, weights)[0]
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


class Layer:
    """A layer for tensors whose shapes, strides and dtype are known: what it is made from, and no others.

    x (T, B, I) and h (D, B, H), or of a cell (B, I) and (B, H); weights w_ih, w_hh and, with biases, b_ih and
    b_hh, of each direction; or, where there is no backward pass, in place of both biases their sum.
    Products of up to MOST rows, of all steps, are C's, and so are the gradients.
    """

    def __init__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor], nonlinearity: str) -> None:
        self.is_cell = x.dim() == 2
        T, B, I = (1, *x.shape) if self.is_cell else x.shape
        D, _, H = (1, *h.shape) if self.is_cell else h.shape
        self.sizes, self.D, self.nonlinearity, self.dtype = (T, B, I, D, H), D, nonlinearity, x.dtype
        self.shape = (B, H) if self.is_cell else (T, B, D * H)
        self.compute, self.per_direction = COMPUTE.get(x.dtype, x.dtype), len(weights) // D
        self.kept = tuple(d * self.per_direction + i for d in range(D) for i in (0, 1))  # for `backward`
        w_ih, w_hh = weights[:2]
        self.shapes = (x.shape, h.shape, self.shape, *(w_ih.shape, w_hh.shape) * D)
        self.act, self.rounding = _ACTS[nonlinearity], _ROUNDING.get(x.dtype, 0)
        by_d = 0 if D == 1 else h.stride(0)
        by_x, by_h, by_w = _row_stride(x), h.stride(-2), w_hh.stride(0)
        self.is_even = by_x is not None
        # One step adds both products and ends with act; of several it is W_ih x + b, and a scan comes after.
        of_h = H if T == 1 else 0
        self.affine = _AFFINE.pack(
            *(self.act if of_h else _NO_ACT, self.rounding, T * B, H, I, of_h),
            *(I if by_x is None else by_x, by_h, w_ih.stride(0), by_w, D * H, 0),
        )
        self.is_one, self.is_whole = T == D == 1, h.stride() == ((H, 1) if self.is_cell else (B * H, H, 1))
        self.no_biases = (0,) * (4 - self.per_direction)
        if T > 1:
            apart = B * D * H, D * H
            strides = 0, 0, *apart, 0, 0, *apart, by_d, by_h, *w_hh.stride()
            self.scan = _SCAN.pack(False, self.act, 0, D, T, B, H, *strides)
            self.per_call = _steps(B, H, D, x.element_size())
        self.bytes_of_h, self.bytes_of_row = by_d * x.element_size(), H * x.element_size()
        self.library = compiled.library(x.dtype == torch.float64)
        self.no_memory = f"no memory for {B} rows of {D} x {H} x ({I} + {H}); free some, or use 'eager'"
        self.has_products = T * B <= MOST
        self.has_backward = self.has_products and (D == 1 or self.dtype == self.compute)  # dx rounded once
        self.is_short = T * B * H * (I + of_h) <= SHARED
        # A weight's gradient takes as long to write as one row's products.
        self.is_short_backward = (1 + T * B) * H * (I + H) <= SHARED

    @staticmethod
    def fits(x: Tensor, h: Tensor, weights: Sequence[Tensor], D: int) -> bool:
        """Whether C takes them as they lie: nothing of size 0, and 16 bits in one step alone."""
        if x.dtype in COMPUTE and x.dim() == 3 and x.shape[0] > 1:
            return False
        n = len(weights) // D
        alike = D == 1 or all(weights[i].stride() == weights[n + i].stride() for i in (0, 1))
        tensors = (x, h, *weights)
        in_order = all(t.stride(-1) == 1 and not t.is_neg() for t in tensors)
        return alike and in_order and x.numel() * h.numel() > 0

    def may_read(self, saved: Sequence[Tensor]) -> bool:
        """Whether `backward` is for these: a hook for saved tensors may bring others back, of any kind.

        Not so the gradients: torch itself sees to their shape, dtype and device.
        """
        return (
            self.has_backward
            and self.shapes == tuple([t.shape for t in saved])
            and all(
                t.is_cpu
                and t.dtype == self.dtype
                and t.stride(-1) == 1
                and not t.is_neg()
                and (t.data_ptr() >= LOW or _has_memory(t))
                for t in saved
            )
        )

    def __call__(self, x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The output and h_n (D, B, H); of a cell the state, twice."""
        pointers = [*map(Tensor.data_ptr, (x, h, *weights))]
        if min(pointers) < LOW and not all(map(_has_memory, (x, h, *weights))):
            x, h, *weights = (in_memory(t).contiguous() for t in (x, h, *weights))
            return Layer(x, h, weights, self.nonlinearity)(x, h, weights)
        if self.is_one:
            output = torch.empty_like(h) if self.is_whole else _like(h)  # takes less time than by a shape
            threads = 1 if self.is_short else torch.get_num_threads()
            mapped = _MAPPED.pack(*pointers, *self.no_biases, output.data_ptr(), threads, 0)
            if self.library.affine(self.affine + mapped):  # not by _project: a call less
                raise MemoryError(self.no_memory)
            return output, output if self.is_cell else output.clone()
        (T, B, _, D, H), n = self.sizes, self.per_direction
        if not self.is_even:
            x = x.contiguous()
            pointers[0] = x.data_ptr()
        if T == 1 or self.has_products:
            output = x.new_empty(self.shape)
            for d in range(D):
                own = pointers[2 + d * n : 2 + d * n + n]
                at_h, out = pointers[1] + d * self.bytes_of_h, output.data_ptr() + d * self.bytes_of_row
                self._project(out, pointers[0], at_h, *own)
        else:
            biases = [join(weights[i::n]) for i in range(2, n)]
            bias = biases[0] + biases[1] if n == 4 else biases[0] if biases else None
            output = products.project(x, join(weights[::n]), bias)
        if T == 1:
            return output, output.view(B, D, H).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        h_n = x.new_empty(D, B, H)
        if T * B <= UNPACKED:
            shared = 1 if B * H * H <= SHARED else torch.get_num_threads(), B, 0
        else:
            shared = plan(B, H, T, D, x.element_size())
        out = output.data_ptr()
        tensors = 0, 0, 0, out, 0, out, pointers[1], pointers[3], pointers[1 - n], h_n.data_ptr()
        if _in_calls(self.library.scan, self.scan, T, self.per_call, (*shared, *tensors)):
            raise MemoryError(self.no_memory)
        return output, h_n

    def _project(self, out: int, *pointers: int) -> None:
        """W_ih x + b of one direction and all steps, or all of its single step, into memory at `out`."""
        threads = 1 if self.is_short else torch.get_num_threads()
        if self.library.affine(self.affine + _MAPPED.pack(*pointers, *self.no_biases, out, threads, 0)):
            raise MemoryError(self.no_memory)

    def backward(
        self, g_out: Tensor | None, g_hn: Tensor | None, saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients that `needs` names, of x, h and the weights.

        saved: x, h, the output, and each direction's w_ih and w_hh, for all of which `may_read` holds. At
        least one of g_out and g_hn is there, both only in the precision that is computed in.
        """
        (T, B, I, D, H), n = self.sizes, self.per_direction
        x, h, output, *weights = saved
        if T == 1:  # g; of several steps what is before act
            if g_hn is not None and D == 2:
                g_hn = in_memory(g_hn).transpose(0, 1).reshape(self.shape)
            if g_out is not None and g_hn is not None:
                g = _readable(in_memory(g_out) + in_memory(g_hn))
            else:
                g = _readable(g_hn if g_out is None else g_out)  # type: ignore[arg-type]
            by_x, by_output, by_g = x.stride(-2), output.stride(-2), g.stride(-2)
        else:
            g, by_g = _like(output), D * H
            _scan(True, self.nonlinearity, 0, g_out, output, g, g_hn, weights[1::2], None, None)
            (x, by_x), (output, by_output) = _evenly(x), _evenly(output)
        dx, dh = _like(x) if needs[0] else None, _like(h) if needs[1] else None
        found, room = [dx, dh], x.new_empty(2 * T * B + 1, H, dtype=self.compute)
        threads = 1 if self.is_short_backward else torch.get_num_threads()
        for d in range(D):
            w_ih, w_hh = weights[2 * d], weights[2 * d + 1]
            into = _like(x) if d and dx is not None else dx  # dx is the sum over both directions
            first = 2 + d * n
            own = [_like(w_ih) if needs[first] else None, _like(w_hh) if needs[first + 1] else None]
            if n == 4:
                own += [x.new_empty(H) if needed else None for needed in needs[first + 2 : first + 4]]
            found += own
            at_x, at_h, at_g, at_out, at_dx, at_dh, *places = _pointers(x, h, g, output, into, dh, *own)
            if d:
                row = self.bytes_of_row
                at_h, at_g, at_out = at_h + h.stride(0) * x.element_size(), at_g + row, at_out + row
                at_dh += 0 if dh is None else B * row
            # All in one tuple: this is a third of what a short step's gradients take.
            given = _BACKWARD.pack(
                self.act, self.rounding, T * B, H, I, H, by_x, h.stride(-2), w_ih.stride(0), w_hh.stride(0),
                by_g, by_output, B, d, at_x, at_h, w_ih.data_ptr(), w_hh.data_ptr(), at_g, at_out,
                at_dx, at_dh, *places, *self.no_biases, room.data_ptr(), threads,
            )  # fmt: skip
            if self.library.affine_backward(given):
                raise MemoryError(self.no_memory)
            if d and dx is not None and into is not None:
                dx += into
        return found


def _row_stride(t: Tensor) -> int | None:
    """How far apart the rows of all steps are, or None where that is not one number."""
    if t.dim() == 2:
        return t.stride(0)
    (steps, rows, _), (by_step, by_row, _) = t.shape, t.stride()
    if rows == 1 and steps > 1:
        return by_step
    return by_row if steps == 1 or by_step == rows * by_row else None


def _evenly(t: Tensor) -> tuple[Tensor, int]:
    """t with its rows evenly apart, and how far."""
    stride = _row_stride(t)
    return (t, stride) if stride is not None else (t.contiguous(), t.shape[-1])


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
    shared = plan(B, H, T, D, out.element_size())
    strides = [stride for t in (resets, given, h, out) for stride in _strides(t, sizes)]
    constant = _SCAN.pack(
        *(backward, _ACTS[nonlinearity], rounding, D, T, B, H, *strides),
        *((0, 0) if start is None else start.stride()[:2]),
        *w_hh[0].stride(),
    )
    tensors = *rows_of_steps, *_pointers(resets, given, h, out, start, w_hh[0], w_hh[-1]), 0
    function = compiled.library(out.dtype == torch.float64).scan
    per_call = _steps(B, H, D, out.element_size())
    if _in_calls(function, constant, T, per_call, (*shared, *tensors)):
        raise MemoryError(f"no memory for a scan's copy of W_hh, {D} x {H} x {H}; free some, or use 'eager'")


def _in_calls(
    function: Callable[[bytes], int], constant: bytes, T: int, per_call: int, rest: tuple[int, ...]
) -> bool:
    """A scan in as many calls as let Ctrl-C through; whether there was no memory for one."""
    return any(
        function(constant + _SCANNED.pack(begin, min(begin + per_call, T), *rest))
        for begin in range(0, T, per_call)
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


def _strides(t: Tensor | None, sizes: Tensor | None) -> tuple[int, int]:
    """How far apart its steps and rows are, in elements."""
    if t is None:
        return 0, 0
    return (t.stride(0), t.stride(1)) if sizes is None else (0, t.stride(0))
