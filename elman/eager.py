"""The recurrence on plain torch, for any device: a loop over time that records nothing.

    z_t = W_ih x_t + b          all T at once: one product, into the memory that the output will have
    z_t += W_hh h_{t-1}         in place
    h_t = act(z_t)              in place

and backward, in the opposite order,

    g_t += W_hh^T dz_{t+1}      in place
    dz_t = act'(h_t) * g_t      in place

oneDNN's product is not in place: it comes in memory of its own.

Rows that differ in length are packed (see packing.py), so that a step computes the rows that it has and
no others, and there is no padding. float16 and bfloat16 are computed in float32, the state being rounded
to the storage dtype every step, exactly as `output` holds it.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from . import packing
from .reference import ACTIVATIONS, COMPUTE


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
    """output (T, B, D * H) of one layer; arguments as `reference.layer`'s.

    With sizes, those of a packed batch, x is (N, I), resets (N,) and the output (N, D * H).
    """
    T, B = x.shape[0] if sizes is None else len(sizes), h0.shape[1]
    if T == 1 and sizes is None:
        return _forward_one(x, h0, w_ih, w_hh, bias, resets, nonlinearity)
    D, H, _ = w_hh.shape
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    act_, act = (torch.tanh_, torch.tanh) if nonlinearity == "tanh" else (torch.relu_, _RELU)
    if compute != dtype:
        x, h0, w_ih, w_hh = x.to(compute), h0.to(compute), w_ih.to(compute), w_hh.to(compute)
        bias = None if bias is None else bias.to(compute)
    output = project(x, w_ih, bias)
    counts = None if sizes is None else sizes.tolist()
    cuts = _cuts(resets, sizes, B)
    # With nothing to do between the steps, the host's time is that of two operations a step.
    plain = counts is None and not cuts and compute == dtype and not _adds_apart(w_hh, B, T)
    with _threads_for(output, B * H * H):
        for d in range(D):
            rows = _rows(output, d, H, counts)
            h = start = h0[d, 0] if B == 1 and counts is None else h0[d]
            add_product = _adder(w_hh[d].t(), B, T, counts is not None)
            if plain:
                for z in rows if d == 0 else rows[::-1]:
                    h = act_(add_product(z, h))
                continue
            for t in range(T) if d == 0 else range(T - 1, -1, -1):
                z = rows[t]
                if counts is not None and counts[t] != len(h):
                    # Forward, rows leave as t grows; reversed, rows of t + 1 steps begin here with h0.
                    n, had = counts[t], len(h)
                    h = h[:n] if had > n else torch.cat([h, start[had:n]])
                if t + d in cuts:
                    h = h.masked_fill(_of_rows(cuts[t + d], len(h)), 0)
                total = add_product(z, h)
                if total is z:
                    act_(z)
                else:
                    act(total, out=z)
                if compute != dtype:
                    z.copy_(z.to(dtype))
                h = z
    return output.to(dtype)


def _forward_one(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """forward() of one step, where preparing a loop would cost more than the step does."""
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    if compute != dtype:
        x, h0, w_ih, w_hh = x.to(compute), h0.to(compute), w_ih.to(compute), w_hh.to(compute)
        bias = None if bias is None else bias.to(compute)
    x = x[0]
    states = []
    linear = product if x.shape[0] >= ROWS else F.linear  # which is product's choice for fewer rows
    for d in range(w_hh.shape[0]):
        h = h0[d]
        if resets is not None and d == 0:  # reversed, a row's only step begins nothing: h0 stays
            h = h.masked_fill(resets[0, :, None], 0)
        z = linear(x, w_ih[d], None if bias is None else bias[d])
        states.append(z.addmm_(h, w_hh[d].t()))
    output = states[0] if len(states) == 1 else torch.cat(states, dim=1)
    (torch.tanh_ if nonlinearity == "tanh" else torch.relu_)(output)
    return torch.ops.aten._unsafe_view(output.to(dtype), [1, *output.shape])  # not a view: see project


def backward(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    sizes: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """dz (T, B, D * H) of one layer, in the compute dtype; arguments as `reference.layer_dz`'s.

    With sizes, those of a packed batch, (N, D * H), as the output and its gradient are; resets then is (N,).
    """
    counts = None if sizes is None else sizes.tolist()
    T, B = output.shape[:2] if counts is None else (len(counts), counts[0])
    D, H, _ = w_hh.shape
    compute = COMPUTE.get(output.dtype, output.dtype)
    tanh = nonlinearity == "tanh"
    cuts = _cuts(resets, sizes, B)
    output = output.to(compute)
    if g_out is None or sizes is not None or not _adds_apart(w_hh, B, T):
        # The products are added to a copy of g_out, in place; in a packed batch rows end at any step.
        dz = torch.zeros_like(output) if g_out is None else torch.empty_like(output).copy_(g_out)
        g_out = dz
    else:
        dz, g_out = torch.empty_like(output), g_out.to(compute)
    with _threads_for(dz, B * H * H):
        for d in range(D):
            if g_hn is not None and sizes is not None:
                last = packing.last(sizes, B) if d == 0 else torch.arange(B, device=sizes.device)
                dz[:, d * H : (d + 1) * H].index_add_(0, last.to(dz.device), g_hn[d].to(compute))
            h, out = (_rows(sequence, d, H, counts) for sequence in (output, dz))
            g = out if g_out is dz else _rows(g_out, d, H, counts)
            if T > 1:
                add_product = _adder(w_hh[d].to(compute), B, T, counts is not None)
            later = None
            for t in range(T - 1, -1, -1) if d == 0 else range(T):
                total, dz_t, h_t = g[t], out[t], h[t]
                cut: Tensor | None = None if later is None else cuts.get(t + 1 - d)
                if cut is not None:
                    alone = total.clone()  # what follows may write over it
                if later is None:
                    if g_hn is not None and counts is None:
                        total = total + g_hn[d].view_as(total)
                elif counts is None or len(later) == counts[t]:
                    total = add_product(total, later)
                else:
                    # Forward, some of the rows here are at their last step; reversed, later has new ones.
                    n = min(counts[t], len(later))
                    part = total[:n]
                    added = add_product(part, later[:n])
                    if added is not part:
                        part.copy_(added)
                if cut is not None:  # zeros for `later` would not do: times infinite weights they are none
                    total = torch.where(_of_rows(cut, len(total)), alone, total)
                if tanh:
                    _TANH_BACKWARD(total, h_t, grad_input=dz_t)
                else:
                    _THRESHOLD_BACKWARD(total, h_t, 0, grad_input=dz_t)
                later = dz_t
    return dz


def backward_vjp(
    u: Tensor,
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    dz: Tensor,
    nonlinearity: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of backward()'s g_out, g_hn, output and w_hh, from u (T, B, D * H), that of its dz.

    None for those that `needs` doesn't name.

    With s_t = act'(h_t), and a bar for a gradient, in the order of the forward pass,

        a_t = g_t + W_hh^T dz_{t+1}                what dz_t = s_t * a_t is made of
        u_t += W_hh abar_{t-1}
        abar_t = s_t * u_t                         g_t's gradient
        hbar_t = -2 h_t * a_t * u_t                for tanh; zero for relu
        Wbar_hh = sum_t dz_{t+1} abar_t^T

    One scan, as forward and backward are, and whole products. All tensors are of the compute dtype; rows have
    T steps each.
    """
    T, B, _ = output.shape
    D, H, _ = w_hh.shape
    if nonlinearity == "tanh":
        slope = (1 - output) * (1 + output)  # 1 - h^2 cancels where h is near 1
    else:
        slope = (output <= 0).logical_not().to(output.dtype)  # 1 of a NaN, as torch has it
    u, a_bar = u.clone(), torch.empty_like(output)
    with _threads_for(u, B * H * H):
        for d in range(D):
            sums, slopes, results = (_rows(sequence, d, H, None) for sequence in (u, slope, a_bar))
            add_product = _adder(w_hh[d].t(), B, T, False)
            before = None
            for t in range(T) if d == 0 else range(T - 1, -1, -1):
                if before is not None:
                    total = add_product(sums[t], before)
                    if total is not sums[t]:
                        sums[t].copy_(total)
                before = torch.mul(sums[t], slopes[t], out=results[t])
    # For each direction: the steps that another follows, those that follow them, and its last step.
    followed, following, last = [slice(-1), slice(1, None)], [slice(1, None), slice(-1)], [-1, 0]
    columns = [slice(d * H, (d + 1) * H) for d in range(D)]
    g_hn_bar = h_bar = w_bar = None
    if needs[1]:
        g_hn_bar = torch.stack([a_bar[last[d], :, columns[d]] for d in range(D)])
    if needs[2] and nonlinearity == "tanh":
        a = torch.zeros_like(output) if g_out is None else g_out.clone()
        for d in range(D):
            if T > 1:
                total = product(dz[following[d], :, columns[d]].reshape(-1, H), w_hh[d].t())
                a[followed[d], :, columns[d]].add_(total.view(T - 1, B, H))
            if g_hn is not None:
                a[last[d], :, columns[d]].add_(g_hn[d])
        h_bar = output * a * u * -2
    elif needs[2]:
        h_bar = torch.zeros_like(output)
    if needs[3] and T > 1:
        found = [
            sums_of_products(dz[following[d], :, columns[d]], [a_bar[followed[d], :, columns[d]]], T)
            for d in range(D)
        ]
        w_bar = torch.stack([total for (total,) in found])
    elif needs[3]:
        w_bar = torch.zeros_like(w_hh)
    return a_bar if needs[0] else None, g_hn_bar, h_bar, w_bar


def step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str,
) -> Tensor:
    """h (B, H) after one step, x (B, I), differentiable any number of times by torch itself."""
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    if compute != dtype:
        x, h, w_ih, w_hh = x.to(compute), h.to(compute), w_ih.to(compute), w_hh.to(compute)
        b_ih, b_hh = (None if b is None else b.to(compute) for b in (b_ih, b_hh))
    if torch._C._are_functorch_transforms_active():  # torch's cells have no batching rule
        return ACTIVATIONS[nonlinearity](F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).to(dtype)
    cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    return cell(x, h, w_ih, w_hh, b_ih, b_hh).to(dtype)


def project(x: Tensor, w_ih: Tensor, bias: Tensor | None) -> Tensor:
    """W_ih x + b for all steps and directions: x (..., I), w_ih (D, H, I) -> (..., D * H)."""
    z = product(x.flatten(0, -2), w_ih.flatten(0, 1), None if bias is None else bias.flatten())
    # Not view: autograd would take the output for a view of this product, and forbid writing into it.
    return torch.ops.aten._unsafe_view(z, [*x.shape[:-1], z.shape[1]])


def product(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """a w^T + bias, for a (N, K) and w (M, K)."""
    if not _is_onednns(a, w) or a.numel() * len(w) < 2**21 or len(a) < ROWS:
        return F.linear(a, w, bias)
    parts = _parts(a.shape[1], LONGEST)
    weights = [w[:, part].contiguous() for part in parts]
    if len(parts) == 1:
        return LINEAR(a, weights[0], bias, "none", [], "")
    out = a.new_empty(len(a), len(w))
    for rows, into in zip(a.split(512), out.split(512), strict=True):  # the sums stay in cache
        total = LINEAR(rows[:, parts[0]], weights[0], bias, "none", [], "")
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total = _LINEAR_ADD(rows[:, part], total, weight, None, "add")
        into.copy_(total)
    return out


def sums_of_products(a: Tensor, others: list[Tensor], T: int) -> list[Tensor]:
    """a^T b for each b of others: a (..., P), b (..., Q), summed over all but P and Q.

    On the CPU as partial sums: one long sum in float32 rounds half as much again as nn.RNN does. That adds
    the products of its T steps one by one, and is the less exact the more steps there are.
    """
    a, others = a.flatten(0, -2), [b.flatten(0, -2) for b in others]
    N, P = a.shape
    if a.device.type != "cpu":
        return [a.t() @ b for b in others]
    if _is_onednns(a, *others) and N * P * min(b.shape[1] for b in others) >= 2**24:
        if T >= 192 and N >= 3072:
            return _sums_by_its_operator(a, others)
        if P >= 128:
            return _sums_by_linear_layers(a, others)
    longest = min(max(T, SHORTEST_SUM), LONGEST_SUM)
    # One thread for more work than in a step: a pass has one such product, and T steps.
    with _threads_for(a, N * P * max(b.shape[1] for b in others) // 16):
        return [_sum_by_parts(a, b, longest) for b in others]


def _sum_by_parts(a: Tensor, b: Tensor, longest: int) -> Tensor:
    """a^T b as the sum of products of at most `longest` rows.

    MKL cuts long sums too, but at another length on each maker's processors. Small results are made in one
    call, which costs less than many calls do; large ones are added to in place, because a batch of them
    leaves the cache.
    """
    N, P = a.shape
    # A graph that torch.func traces must not grow with N.
    traced = torch._C._are_functorch_transforms_active()
    count = min(8, max(N, 1)) if traced else -(-N // longest)
    if traced or (count > 1 and count * P * b.shape[1] <= 2**20):
        n = N // count
        blocks, rest = slice(count * n), slice(count * n, None)
        columns = a[blocks].unflatten(0, (count, n)).transpose(1, 2)
        total = torch.bmm(columns, b[blocks].unflatten(0, (count, n))).sum(0)
        return total + a[rest].t() @ b[rest]
    # Parts by split, because the derivative of each slice would be of a's size.
    (first, other), *parts = zip(a.split(longest), b.split(longest), strict=True)
    total = first.t() @ other
    for rows, others in parts:
        total.addmm_(rows.t(), others)
    return total


def _sums_by_its_operator(a: Tensor, others: list[Tensor]) -> list[Tensor]:
    """By oneDNN's operator for a layer's weights, the quickest; but it adds some 500 products in one sum."""
    P = a.shape[1]
    sums = [a.new_zeros(P, b.shape[1]) for b in others]
    for part in _parts(len(a), max(1024, 2**19 // P)):  # 2 MB of a: with as much of b it stays in cache
        g = a[part].to_mkldnn()
        for s, b in zip(sums, others, strict=True):
            s += _WEIGHTS(g, b[part].to_mkldnn(), s, False)[0]
    return sums


def _sums_by_linear_layers(a: Tensor, others: list[Tensor]) -> list[Tensor]:
    """By oneDNN's linear layers, in sums that are short enough for few steps.

    They want a^T row by row: it is copied so once for all the products. Weights that are neither dense nor
    the transpose of dense ones they would reorder for seconds.
    """
    sums = [a.new_zeros(a.shape[1], b.shape[1]) for b in others]
    for part in _parts(len(a), LONGEST_GRADIENT):
        columns = a[part].t().contiguous()
        sums = [
            _LINEAR_ADD(columns, s, b[part].contiguous().t(), None, "add")
            for s, b in zip(sums, others, strict=True)
        ]
    return sums


def _parts(K: int, longest: int) -> list[slice]:
    """K summands in as few parts of about `longest` as there can be, multiples of 16 but for the last."""
    count = -(-K // longest)
    size = -(-K // (16 * count)) * 16
    return [slice(k, min(k + size, K)) for k in range(0, K, size)]


# oneDNN adds up to 512 products and more one after another, which rounds up to twice as much as nn.RNN does.
# So many in one sum keep it within the 1.5 times that a backend may have: of W_ih's products, of W_hh's,
# and of a weight's gradient over few steps.
LONGEST = 288
LONGEST_STEP = 384
LONGEST_GRADIENT = 224

# Rows in one sum of a weight's gradient by MKL: T of them, in B sums, where nn.RNN adds up B rows T times.
# In both the longest chain of additions has T + B links, and terms of random sign lose 0.14 sqrt(T + B) of
# float32's eps. Below 64 rows the calls cost more than the sums; above 256 the library cuts them itself.
SHORTEST_SUM = 64
LONGEST_SUM = 256


def _is_onednns(*tensors: Tensor) -> bool:
    """Whether these go to oneDNN's operators, which have no derivatives; type first, sizes never.

    A graph that is traced, and a batch under vmap, have tensors that stand for others.
    """
    return (
        ONEDNN
        and all(type(t) is Tensor and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


# One call each that writes where it is told to; torch has no public name for them.
_RELU = torch.ops.aten.relu.out
_TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.grad_input


@contextmanager
def _threads_for(tensor: Tensor, work: int) -> Iterator[None]:
    """One thread for steps of so few multiply-adds that two would spend them on meeting each other.

    At B = 8, H = 64 a step so takes half the time; the limit was measured on two cores. The setting is
    the process's, and a thread that starts meanwhile would keep it, so only a lone thread changes it.
    """
    threads = torch.get_num_threads()
    if tensor.device.type != "cpu" or threads == 1 or work > 2**18 or threading.active_count() > 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(sequence: Tensor, d: int, H: int, counts: list[int] | None) -> tuple[Tensor, ...]:
    """T views (rows, H) of direction d's columns, or (H,) where the only row makes vectors of them."""
    columns = sequence if sequence.shape[-1] == H else sequence[..., d * H : (d + 1) * H]
    if counts is not None:
        return columns.split(counts)
    return (columns.squeeze(1) if columns.shape[1] == 1 else columns).unbind(0)


def _cuts(resets: Tensor | None, sizes: Tensor | None, B: int) -> dict[int, Tensor]:
    """At which steps t rows begin anew, and which: (rows, 1), or (1,) where `_rows` has vectors.

    The steps are read on the host, once a pass.
    """
    if resets is None:
        return {}
    if sizes is not None:
        found = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)[
            resets.to(sizes.device)
        ]
        cuts = resets[:, None].split(sizes.tolist())
        return {t: cuts[t] for t in found.unique().tolist()}
    found = resets.any(1).nonzero().flatten()
    return {t: resets[t] if B == 1 else resets[t, :, None] for t in found.tolist()}


def _of_rows(cut: Tensor, rows: int) -> Tensor:
    """A step's cut for the state of so many rows: at the step before, in time, there may be more."""
    if cut.dim() == 1 or len(cut) == rows:
        return cut
    return F.pad(cut, (0, 0, 0, rows - len(cut)))


def _adder(m: Tensor, B: int, T: int, changing: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function add(z, h) that returns z + h m, in z's memory or not, for m (H, H) and B rows of h.

    The weights are laid out once for T steps, unless these are too few. changing: B is the most rows that a
    step has; otherwise B = 1 stands for vectors.
    """
    H = m.shape[0]
    if B == 1 and not changing:
        # Each element a dot product along contiguous memory: the other way round rounds twice as much.
        rows = m.t().contiguous()
        if m.device.type != "cpu" or H < 768 or H % BLOCKS:
            return lambda z, h: z.addmv_(rows, h)
        # A batch of blocks of rows: MKL shares a batch out over its threads, which it does badly with one
        # matrix and a vector. Each sum is the same, to the bit.
        blocks = rows.unflatten(0, (BLOCKS, -1)).transpose(1, 2)

        def add(z: Tensor, h: Tensor) -> Tensor:
            z.view(BLOCKS, 1, -1).baddbmm_(h.expand(BLOCKS, 1, H), blocks)
            return z

        return add
    if m.device.type != "cpu" or T < FEW:
        return lambda z, h: z.addmm_(h, m)
    if not _adds_apart(m, B, T):
        columns = _columns(m)
        return lambda z, h: z.addmm_(h, columns)
    # A product of few rows packs the weights anew at every call, which from here on costs more
    # than the product; oneDNN takes them packed. Below, its call costs more than is gained.
    parts = _parts(H, LONGEST_STEP)
    packed = [torch.ops.mkldnn._reorder_linear_weight(m[part].t().contiguous(), B) for part in parts]

    def add_parts(z: Tensor, h: Tensor) -> Tensor:
        for part, weights in zip(parts, packed, strict=True):
            z = _LINEAR_ADD(h[:, part], z, weights, None, "add")
        return z

    if changing:
        columns = _columns(m)  # for one row, where all others have ended: there is nothing to pack for it
        return lambda z, h: z.addmm_(h, columns) if len(h) == 1 else add_parts(z, h)
    if len(parts) == 1:
        return lambda z, h: _LINEAR_ADD(h, z, packed[0], None, "add")
    return add_parts


def _columns(m: Tensor) -> Tensor:
    """m laid out for MKL, each sum a dot product: otherwise what is left of four rows rounds twice as much.

    The pitch is no power of two: 4096 bytes apart, its elements would fall into the same few cache sets.
    """
    H = m.shape[0]
    return m.new_empty(H, H + 16)[:, :H].copy_(m.t()).t()


def _adds_apart(m: Tensor, B: int, T: int) -> bool:
    """Whether the sum of `_adder` for float32 m (..., H, H) is oneDNN's, in memory of its own.

    The limits were measured on two cores, H from 192 to 1024 and B from 2 to 128, and are not smooth: each
    call costs 11 us, MKL gets slower where W_hh leaves a cache (from 337, and again from 576), and above
    LONGEST_STEP there are two calls.
    """
    H = m.shape[-1]
    least = 2**22 if H <= 336 else 2**19 if H <= LONGEST_STEP else 2**23 if H < 576 else 2**20
    pays = T >= FEW and B > 1 and B * H**2 >= least
    return ONEDNN and pays and m.device.type == "cpu" and m.dtype == torch.float32


BLOCKS = 8  # for a vector's product; 4 and 16 are as fast on two cores
ROWS = 128  # fewer do not repay the copies of the weights that oneDNN makes
FEW = 8  # steps of several rows that do not repay a copy of W_hh

# The operators that torch.compile itself uses for linear layers on x86, and the one behind the derivative of
# torch's own mkldnn_linear.
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
)
if HAS_ONEDNN:
    LINEAR = torch.ops.mkldnn._linear_pointwise.default
    _LINEAR_ADD = torch.ops.mkldnn._linear_pointwise.binary
    _WEIGHTS = torch.ops.aten.mkldnn_linear_backward_weights.default


_CPUINFO = Path("/proc/cpuinfo")


def _onednn_pays() -> bool:
    """Whether oneDNN's products are the quicker ones: on AMD's processors with AVX-512.

    oneDNN has AVX-512 kernels for every maker's processor. MKL has them for Intel's alone, where it is the
    quicker one; without AVX-512 they are equal. The choice is not measured: one that depends on the moment
    would change a result's bits from one process to the next.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if _CPUINFO.exists():  # Linux
        with _CPUINFO.open(errors="replace") as file:
            return "AuthenticAMD" in file.read(1024)  # the first core's lines
    return "AuthenticAMD" in os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows


ONEDNN = HAS_ONEDNN and _onednn_pays()
