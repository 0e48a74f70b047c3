"""The recurrence on plain torch, for any device: a loop over time that records nothing.

    z_t = W_ih x_t + b          all T at once: one product, into the memory that the output will have
    z_t += W_hh h_{t-1}         in place
    h_t = act(z_t)              in place

and backward, in the opposite order,

    g_t += W_hh^T dz_{t+1}      in place
    dz_t = act'(h_t) * g_t      in place

Rows that differ in length are packed (see packing.py), so that a step computes the rows that it has and
no others, and there is no padding. float16 and bfloat16 are computed in float32, the state being rounded
to the storage dtype every step, exactly as `output` holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import packing
from .products import product, project, sums_of_products
from .reference import ACTIVATIONS, COMPUTE

FEW = 8  # steps that do not repay a copy of W_hh for its pitch alone

# One call each that writes where it is told to; torch has no public name for them.
_TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.grad_input


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
    D, H, _ = w_hh.shape
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    act_ = torch.tanh_ if nonlinearity == "tanh" else torch.relu_
    if compute != dtype:
        x, h0, w_ih, w_hh = x.to(compute), h0.to(compute), w_ih.to(compute), w_hh.to(compute)
        bias = None if bias is None else bias.to(compute)
    output = project(x, w_ih, bias)
    counts = None if sizes is None else sizes.tolist()
    masks = _reset_masks(resets, sizes)
    for d in range(D):
        rows, h = _rows(output, d, H, counts), h0[d]
        T, columns = len(rows), _columns(w_hh[d].t(), len(rows))
        for t in range(T) if d == 0 else range(T - 1, -1, -1):
            if counts is not None:
                h = h[: counts[t]]  # forward, rows end as t grows
            if t + d in masks:
                h = h.masked_fill(masks[t + d], 0)
            if counts is not None and len(h) < counts[t]:  # reversed, rows of t + 1 steps begin here
                h = torch.cat([h, h0[d, len(h) : counts[t]]])
            h = act_(rows[t].addmm_(h, columns))
            if compute != dtype:
                h.copy_(h.to(dtype))
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
    """dz (T, B, D * H) of one layer, in the compute dtype; arguments as `reference.layer_dz`'s.

    With sizes, those of a packed batch, (N, D * H), as the output and its gradient are; resets then is (N,).
    """
    D, H, _ = w_hh.shape
    compute = COMPUTE.get(output.dtype, output.dtype)
    output = output.to(compute)
    dz = torch.zeros_like(output) if g_out is None else torch.empty_like(output).copy_(g_out)
    counts = None if sizes is None else sizes.tolist()
    masks = _reset_masks(resets, sizes)
    for d in range(D):
        states, rows = _rows(output, d, H, counts), _rows(dz, d, H, counts)
        T, columns = len(rows), w_hh[d].to(compute)
        if T > 1:
            columns = _columns(columns, T)
        if g_hn is not None and sizes is None:
            rows[-1 if d == 0 else 0].add_(g_hn[d])
        elif g_hn is not None and sizes is not None:
            B = int(sizes[0])
            last = packing.last(sizes, B) if d == 0 else torch.arange(B, device=sizes.device)
            dz[:, d * H : (d + 1) * H].index_add_(0, last.to(dz.device), g_hn[d].to(compute))
        following = None  # dz of the step that follows
        for t in range(T - 1, -1, -1) if d == 0 else range(T):
            dz_t = rows[t]
            if following is not None:
                total = dz_t
                if counts is not None:  # either step may have rows that the other has not
                    n = min(len(dz_t), len(following))
                    total, following = dz_t[:n], following[:n]
                mask = masks.get(t + 1 - d)
                if mask is None:
                    total.addmm_(following, columns)
                else:  # not zeros for `following`: 0 * inf = NaN
                    total.add_((following @ columns).masked_fill_(mask, 0))
            if nonlinearity == "tanh":
                _TANH_BACKWARD(dz_t, states[t], grad_input=dz_t)
            else:
                _THRESHOLD_BACKWARD(dz_t, states[t], 0, grad_input=dz_t)
            following = dz_t
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
    for d in range(D):
        sums, slopes, results = (_rows(sequence, d, H, None) for sequence in (u, slope, a_bar))
        columns, previous = _columns(w_hh[d].t(), T), None
        for t in range(T) if d == 0 else range(T - 1, -1, -1):
            if previous is not None:
                sums[t].addmm_(previous, columns)
            previous = torch.mul(sums[t], slopes[t], out=results[t])
    # For each direction: the steps that another follows, those that follow them, and its last step.
    followed, following, last = [slice(-1), slice(1, None)], [slice(1, None), slice(-1)], [-1, 0]
    parts = [slice(d * H, (d + 1) * H) for d in range(D)]
    g_hn_bar = h_bar = w_bar = None
    if needs[1]:
        g_hn_bar = torch.stack([a_bar[last[d], :, parts[d]] for d in range(D)])
    if needs[2] and nonlinearity == "tanh":
        a = torch.zeros_like(output) if g_out is None else g_out.clone()
        for d in range(D):
            if T > 1:
                total = product(dz[following[d], :, parts[d]].reshape(-1, H), w_hh[d].t())
                a[followed[d], :, parts[d]].add_(total.view(T - 1, B, H))
            if g_hn is not None:
                a[last[d], :, parts[d]].add_(g_hn[d])
        h_bar = output * a * u * -2
    elif needs[2]:
        h_bar = torch.zeros_like(output)
    if needs[3] and T > 1:
        found = [
            sums_of_products(dz[following[d], :, parts[d]], [a_bar[followed[d], :, parts[d]]], T)
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


def _rows(sequence: Tensor, d: int, H: int, counts: list[int] | None) -> tuple[Tensor, ...]:
    """T views (rows, H) of direction d's columns."""
    columns = sequence if sequence.shape[-1] == H else sequence[..., d * H : (d + 1) * H]
    return columns.unbind(0) if counts is None else columns.split(counts)


def _reset_masks(resets: Tensor | None, sizes: Tensor | None) -> dict[int, Tensor]:
    """The steps t at which rows are reset, and which rows, (rows, 1): read on the host, once a pass."""
    if resets is None:
        return {}
    if sizes is None:
        return {t: resets[t, :, None] for t in resets.any(1).nonzero().flatten().tolist()}
    steps = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    masks = resets[:, None].split(sizes.tolist())
    return {t: masks[t] for t in steps[resets.to(sizes.device)].unique().tolist()}


def _columns(m: Tensor, T: int) -> Tensor:
    """m (H, H) for T products h m, laid out for MKL: each sum a dot product along contiguous memory.

    Otherwise MKL adds the terms of what is left of four rows of h, one by one, to what is there already,
    which rounds up to five times as much as nn.RNN does. The pitch is no power of two: 4096 bytes apart, m's
    elements would fall into the same few cache sets.
    """
    if m.device.type != "cpu":
        return m
    if T < FEW:
        return m.t().contiguous().t()
    H = m.shape[0]
    return m.new_empty(H, H + 16)[:, :H].copy_(m.t()).t()
