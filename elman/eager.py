"""The recurrence on plain torch, for any device: a loop over time that allocates and records nothing.

    z_t = W_ih x_t + b          all T at once: one product, into the memory that the output will have
    z_t += W_hh h_{t-1}         in place
    h_t = act(z_t)              in place

and backward, in the opposite order,

    g_t += W_hh^T dz_{t+1}      in place
    dz_t = act'(h_t) * g_t      in place

Rows that have ended are cut off by slicing: the batch is sorted by length first, so that a step
computes its active rows alone. float16 and bfloat16 are computed in float32, the state being rounded
to the storage dtype every step, exactly as `output` holds it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """output (T, B, D * H) of one layer; arguments as `reference.layer`'s."""
    T, B, _ = x.shape
    D, H, _ = w_hh.shape
    dtype, compute = x.dtype, COMPUTE.get(x.dtype, x.dtype)
    act_ = torch.tanh_ if nonlinearity == "tanh" else torch.relu_
    batch = _Batch(lengths, T, B)
    x, h0 = batch.sort(x), batch.sort(h0)
    output = project(x.to(compute), w_ih.to(compute), None if bias is None else bias.to(compute))
    for d in range(D):
        rows = output[..., d * H : (d + 1) * H].unbind(0)
        h = start = h0[d].to(compute)
        add_product = _adder(w_hh[d].to(compute).t(), B if lengths is None else 0)
        for t in range(T) if d == 0 else range(T - 1, -1, -1):
            z = rows[t]
            if lengths is not None:
                n = batch.active[t]
                # Forward, rows leave as t grows; reversed, rows of t + 1 steps begin here with h0.
                h = h[:n] if len(h) >= n else torch.cat([h, start[len(h) : n]])
                z = z[:n]
            add_product(z, h)
            act_(z)
            if compute != dtype:
                z.copy_(z.to(dtype))
            h = z
    return batch.unsort_(output).to(dtype)


def backward(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """dz (T, B, D * H) of one layer, in the compute dtype; arguments as `reference.layer_dz`'s."""
    T, B, _ = output.shape
    D, H, _ = w_hh.shape
    compute = COMPUTE.get(output.dtype, output.dtype)
    batch = _Batch(lengths, T, B)
    output = batch.sort(output).to(compute)
    dz = torch.zeros_like(output) if g_out is None else torch.empty_like(output).copy_(batch.sort(g_out))
    for d in range(D):
        columns = slice(d * H, (d + 1) * H)
        if g_hn is not None:
            last = batch.last if d == 0 else torch.zeros_like(batch.last)
            dz[last, batch.rows, columns] += batch.sort(g_hn)[d].to(compute)
        h, g = output[..., columns].unbind(0), dz[..., columns].unbind(0)
        add_product = _adder(w_hh[d].to(compute), B if lengths is None else 0)
        later = None
        for t in range(T - 1, -1, -1) if d == 0 else range(T):
            g_t, h_t = g[t], h[t]
            if lengths is not None:
                n = batch.active[t]
                g_t, h_t = g_t[:n], h_t[:n]
            if later is not None:
                n = min(len(later), len(g_t))
                add_product(g_t if len(g_t) == n else g_t[:n], later if len(later) == n else later[:n])
            if nonlinearity == "tanh":
                _TANH_BACKWARD(g_t, h_t, grad_input=g_t)
            else:
                _THRESHOLD_BACKWARD(g_t, h_t, 0, grad_input=g_t)
            later = g_t
    return batch.unsort_(dz)


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
    compute = COMPUTE.get(x.dtype, x.dtype)
    cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    biases = (None if b is None else b.to(compute) for b in (b_ih, b_hh))
    return cell(x.to(compute), h.to(compute), w_ih.to(compute), w_hh.to(compute), *biases).to(x.dtype)


def project(x: Tensor, w_ih: Tensor, bias: Tensor | None) -> Tensor:
    """W_ih x + b for all steps and directions: x (T, B, I), w_ih (D, H, I) -> (T, B, D * H)."""
    T, B, I = x.shape
    flat, w = x.reshape(T * B, I), w_ih.flatten(0, 1).t()
    z = x.new_empty(T, B, w.shape[1])
    out = z.view(T * B, w.shape[1])
    torch.mm(flat, w, out=out) if bias is None else torch.addmm(bias.flatten(), flat, w, out=out)
    return z


# Each is one call that reads the output and writes the gradient in place; nothing public does that.
_TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.grad_input


def _adder(m: Tensor, B: int) -> Callable[[Tensor, Tensor], object]:
    """A function add(z, h) that does z += h m in place, for m (H, H) and B rows of h.

    The weights are laid out once for T steps. B = 0 stands for a number of rows that changes.
    """
    H = m.shape[0]
    if m.device.type != "cpu":
        return lambda z, h: z.addmm_(h, m)
    if B == 1:
        # Each element a dot product along contiguous memory: the other way round rounds twice as much.
        columns = m.t().contiguous().t()
        return lambda z, h: z.addmm_(h, columns)
    if ONEDNN and m.dtype == torch.float32 and B >= 4 and H >= 512:
        # A product of few rows packs the weights anew at every call, which from here on costs more
        # than the product; oneDNN takes them packed. Below, its call costs more than is gained.
        packed = torch.ops.mkldnn._reorder_linear_weight(m.t().contiguous(), B)
        linear_add = torch.ops.mkldnn._linear_pointwise.binary
        return lambda z, h: z.copy_(linear_add(h, z, packed, None, "add"))
    # A row pitch that is no power of two: a product of few rows walks down the columns of m, and with
    # a pitch of 4096 bytes every element it touches would fall into the same few cache sets.
    padded = m.new_empty(H, H + 16)[:, :H].copy_(m)
    return lambda z, h: z.addmm_(h, padded)


# The operators that torch.compile itself uses for linear layers on x86; elsewhere they are not measured.
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


class _Batch:
    """The rows of a batch in order of falling length, and how many of them each step has.

    active: number of rows at step t; last (B,): each sorted row's own last step; rows: 0..B-1.
    """

    def __init__(self, lengths: Tensor | None, T: int, B: int) -> None:
        self.lengths, self.order = lengths, None
        if lengths is None:
            self.last = torch.full((B,), T - 1)
        else:
            ordered, order = lengths.sort(descending=True, stable=True)
            if not torch.equal(ordered, lengths):
                self.order = order
            self.last = ordered - 1
            counts = torch.bincount(ordered, minlength=T + 1)[1:]
            self.active: list[int] = counts.flip(0).cumsum(0).flip(0).tolist()
        self.rows = torch.arange(B, device=self.last.device)

    def sort(self, tensor: Tensor) -> Tensor:
        """tensor (N, B, K) with its rows in order of falling length."""
        return tensor if self.order is None else tensor.index_select(1, self.order)

    def unsort_(self, tensor: Tensor) -> Tensor:
        """tensor (T, B, K) with its rows in the caller's order, zero past their lengths."""
        if self.lengths is None:
            return tensor
        ended = torch.arange(len(tensor), device=tensor.device)[:, None] > self.last
        tensor.masked_fill_(ended[..., None], 0)
        return tensor if self.order is None else tensor.index_select(1, self.order.argsort())
