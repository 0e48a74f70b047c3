"""The truth: the Elman recurrence as a naive loop over time, in plain differentiable torch.

    h_t = act(W_ih x_t + b + W_hh h_{t-1})        act = tanh or relu, b = b_ih + b_hh

Nothing here is fast. Every backend is compared with it in float64, and second derivatives are taken
through it, so it is written to be read beside the formula: any dtype, any device, differentiable any
number of times.

Shapes, here and in every other file: T time steps, B batch rows, I input size, H hidden size,
D directions (1, or 2 with the reversed one). Of an output's D * H columns the last H are the reversed
direction's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
# The dtype in which every backend adds products up, where it is not the tensors' own.
COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    nonlinearity: str = "tanh",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer, all its directions.

    x (T, B, I), h0 (D, B, H), w_ih (D, H, I), w_hh (D, H, H), bias (D, H) or None, lengths int64 (B,)
    or None, resets bool (T, B) or None. Returns output (T, B, D * H), zero past a row's length, and
    h_n (D, B, H), each row's state at its own last step (for the reversed direction that is t = 0).

    Where resets[t, b], row b begins anew at step t: no state passes between it and step t - 1. Forward
    the state before step t is zero (h0 too, at t = 0), reversed the one before step t - 1.
    """
    act = ACTIVATIONS[nonlinearity]
    cuts = _cuts(resets, lengths, len(x))
    # unbind, not x[t]: the gradient of an index is a whole sequence of zeros, once a step.
    steps, outputs, states = x.unbind(0), [], []
    for d in range(w_hh.shape[0]):
        h, rows = h0[d], []
        for t in _order(d, len(steps)):
            b = None if bias is None else bias[d]
            if cuts is not None:
                h = torch.where(cuts[t + d], 0.0, h)
            new = act(F.linear(steps[t], w_ih[d], b) + F.linear(h, w_hh[d]))
            if lengths is None:
                h = new
                rows.append(new)
            else:
                active = (t < lengths)[:, None]
                h = torch.where(active, new, h)
                rows.append(torch.where(active, new, 0.0))
        outputs.append(torch.stack(rows if d == 0 else rows[::-1]))
        states.append(h)
    return torch.cat(outputs, -1), torch.stack(states)


def layer_dz(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None = None,
    nonlinearity: str = "tanh",
    resets: Tensor | None = None,
) -> Tensor:
    """The backward scan of `layer`: dz (T, B, D * H), the gradient before the activation.

        dz_t = act'(h_t) * (g_t + W_hh^T dz_{t+1})        act' = 1 - h^2, or h > 0

    g_out (T, B, D * H) and g_hn (D, B, H) are the gradients of `layer`'s two results (None is zero).
    Plain torch, so differentiable with respect to every argument.
    """
    T, B, _ = output.shape
    D, H, _ = w_hh.shape
    steps = torch.arange(T, device=output.device)[:, None]
    last = torch.full((B,), T - 1, device=output.device) if lengths is None else lengths - 1
    cuts = _cuts(resets, lengths, T)
    columns = []
    for d in range(D):
        h = output[..., d * H : (d + 1) * H]
        g = torch.zeros_like(h) if g_out is None else g_out[..., d * H : (d + 1) * H]
        if g_hn is not None:
            g = g + torch.where((steps == (last if d == 0 else 0))[..., None], g_hn[d], 0.0)
        act_grad = 1 - h * h if nonlinearity == "tanh" else (h > 0).to(h.dtype)
        act_grad = torch.where((steps <= last)[..., None], act_grad, 0.0)
        dz, rows = torch.zeros_like(h[0]), []
        g_steps, act_steps = g.unbind(0), act_grad.unbind(0)
        for t in reversed(_order(d, T)):
            heard = ((t < last) if d == 0 else (t <= last) & (t > 0))[:, None]
            if cuts is not None:
                heard = heard & ~cuts[t + 1 - d]
            dz = act_steps[t] * (g_steps[t] + torch.where(heard, dz @ w_hh[d], 0.0))
            rows.append(dz)
        columns.append(torch.stack(rows[::-1] if d == 0 else rows))
    return torch.cat(columns, -1)


def elman(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole stack without dropout, arguments and results as `elman.elman`'s."""
    D = 2 if bidirectional else 1
    x = input.transpose(0, 1) if batch_first else input
    if resets is not None and batch_first:
        resets = resets.transpose(0, 1)
    layers = stacked_weights(weights, num_layers, D, bias)
    if hx is None:
        hx = x.new_zeros(num_layers * D, x.shape[1], layers[0][1].shape[-1])
    states = []
    for n, (w_ih, w_hh, b) in enumerate(layers):
        x, h_n = layer(x, hx[n * D : (n + 1) * D], w_ih, w_hh, b, lengths, nonlinearity, resets)
        states.append(h_n)
    return x.transpose(0, 1) if batch_first else x, torch.cat(states)


def stacked_weights(
    weights: Sequence[Tensor], num_layers: int, D: int, bias: bool
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """nn.RNN's flat weights as one (w_ih (D, H, I), w_hh (D, H, H), b_ih + b_hh (D, H)) a layer.

    A single direction is a view; two directions are copied together once a call, a small price beside
    T steps with them.
    """
    size = 4 if bias else 2
    layers = []
    for start in range(0, num_layers * D * size, D * size):
        w_ih, w_hh, *biases = (weights[start + i : start + D * size : size] for i in range(size))
        # b_ih + b_hh, but that both get a gradient in memory of its own: what works on gradients in place
        # (clipping, hooks) would else do it twice.
        pairs = zip(*biases, strict=True) if bias else ()
        b = join([torch.sub(b_ih, b_hh, alpha=-1) for b_ih, b_hh in pairs]) if bias else None
        layers.append((join(w_ih), join(w_hh), b))
    return layers


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The directions' tensors as one, a direction a row."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _cuts(resets: Tensor | None, lengths: Tensor | None, T: int) -> tuple[Tensor, ...] | None:
    """For t from 0 to T, (B, 1): whether no state passes between the steps t - 1 and t of a row."""
    if resets is None:
        return None
    if lengths is not None:
        resets = resets & (torch.arange(T, device=resets.device)[:, None] < lengths)
    return (*resets[..., None].unbind(0), torch.zeros_like(resets[0, :, None]))


def _order(d: int, T: int) -> range:
    """The steps of direction d in the order in which it takes them."""
    return range(T) if d == 0 else range(T - 1, -1, -1)
