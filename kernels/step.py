"""One time step in one launch, for whatever does not fit on chip, for the cell, and for streaming.

    h_t  = act(z_t + h_prev W_hh^T)                     z_t = W_ih x_t + b, made beforehand
    dz_t = act'(h_t) * (g_t + dz_next W_hh)             g_t: gradient of h_t from outside: that of the
                                                        output, plus that of h_n at the last step
    cell: h = act(x W_ih^T + b + h_prev W_hh^T)

Grid (ceil(B / BLOCK_B), ceil(H / BLOCK_N), D): a program makes a (BLOCK_B, BLOCK_N) tile of one direction's
step and takes the sum over H in blocks of BLOCK_K. A scan launches T times; the stream keeps the order.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate, activate_backward
from .common import (
    add_product,
    backward_arguments,
    chip,
    constants,
    expect,
    expect_sequence,
    is_cut,
    launch,
    launch_options,
    on_device,
    problem_of,
    rounded,
    row_arguments,
    row_lengths,
)


@triton.jit(do_not_specialize=["s", "T", "B"])
def forward_kernel(
    z,
    h0,
    w_hh,
    lengths,
    resets,
    s,
    T,
    B,
    z_t,
    z_b,
    H: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(2)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    t = tl.where(d == 0, s, T - 1 - s)
    live = t < length
    first = d * (length - 1) == t
    heard = live
    if HAS_RESETS:
        heard &= is_cut(resets, t + d, rb, T, B) == 0

    rows = z + d * H + rb.to(tl.int64) * z_b
    t_prev = (t + 2 * d - 1).to(tl.int64)
    h_prev, begin = rows + t_prev * z_t, h0 + (d.to(tl.int64) * B + rb) * H
    pointers = rows[:, None] + t.to(tl.int64) * z_t + rn[None, :]
    acc = tl.load(pointers, mask=live[:, None] & (rn[None, :] < H), other=0.0).to(ACC)
    w = w_hh + d.to(tl.int64) * H * H
    acc = add_product(
        acc, h_prev, heard, begin, first, w, 1, H, rn, H, H, BLOCK_K, PRECISION, True, INTERPRET
    )
    # Past the lengths the sum is 0, unless the weight holds NaN or infinity.
    h = rounded(tl.where(live[:, None], activate(acc, RELU), 0.0), z.dtype.element_ty, INTERPRET)
    tl.store(pointers, h, mask=(rb[:, None] < B) & (rn[None, :] < H))


@triton.jit(do_not_specialize=["s", "T", "B"])
def backward_kernel(
    g_out,
    g_hn,
    output,
    w_hh,
    dz,
    lengths,
    resets,
    s,
    T,
    B,
    g_t,
    g_b,
    g_h,
    out_t,
    out_b,
    dz_t,
    dz_b,
    H: tl.constexpr,
    HAS_G_OUT: tl.constexpr,
    HAS_G_HN: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(2)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    t = tl.where(d == 0, T - 1 - s, s)
    live = t < length
    last = (1 - d) * (length - 1) == t

    rb64 = rb.to(tl.int64)
    t64 = t.to(tl.int64)
    mask = live[:, None] & (rn[None, :] < H)
    acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
    if HAS_G_OUT:
        offsets = t64 * g_t + rb64[:, None] * g_b + (d * H + rn)[None, :].to(tl.int64) * g_h
        acc += tl.load(g_out + offsets, mask=mask, other=0.0).to(ACC)
    if HAS_G_HN:
        offsets = (d.to(tl.int64) * B + rb[:, None]) * H + rn[None, :]
        acc += tl.load(g_hn + offsets, mask=last[:, None] & mask, other=0.0).to(ACC)
    rows = dz + d * H + rb64 * dz_b
    t_next = (t + 1 - 2 * d).to(tl.int64)
    w = w_hh + d.to(tl.int64) * H * H
    later = live & (last == 0)  # rows at their last step have no next one to hear from
    if HAS_RESETS:
        later &= is_cut(resets, t + 1 - d, rb, T, B) == 0
    after = rows + t_next * dz_t
    product = add_product(
        tl.zeros((BLOCK_B, BLOCK_N), ACC),
        after, later, after, later, w, H, 1, rn, H, H, BLOCK_K, PRECISION, False, INTERPRET,
    )  # fmt: skip
    acc += tl.where(later[:, None], product, 0.0)  # zeros times infinite weights are none
    h = tl.load(output + t64 * out_t + rb64[:, None] * out_b + (d * H + rn)[None, :], mask=mask, other=0.0)
    g = tl.where(live[:, None], activate_backward(acc, h.to(ACC), RELU), 0.0)
    tl.store(
        rows[:, None] + t64 * dz_t + rn[None, :],
        rounded(g, dz.dtype.element_ty, INTERPRET),
        mask=(rb[:, None] < B) & (rn[None, :] < H),
    )


@triton.jit(do_not_specialize=["B"])
def cell_kernel(
    x,
    h,
    w_ih,
    w_hh,
    bias,
    out,
    B,
    x_b,
    h_b,
    out_b,
    I: tl.constexpr,
    H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rb < B
    rb64 = rb.to(tl.int64)
    acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < H, other=0.0).to(ACC)[None, :]
    x += rb64 * x_b
    h += rb64 * h_b
    acc = add_product(acc, x, ok, x, ok, w_ih, 1, I, rn, H, I, BLOCK_K, PRECISION, False, INTERPRET)
    acc = add_product(acc, h, ok, h, ok, w_hh, 1, H, rn, H, H, BLOCK_K, PRECISION, False, INTERPRET)
    y = rounded(activate(acc, RELU), out.dtype.element_ty, INTERPRET)
    tl.store(out + rb64[:, None] * out_b + rn[None, :], y, mask=ok[:, None] & (rn[None, :] < H))


def scan(
    z: torch.Tensor,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.StepConfig | None = None,
    resets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turns the input products z (T, B, D * H) into the output, in place, one launch a step; returns z.

    h0 (D, B, H), w_hh (D, H, H), all of one dtype and device; lengths None or int64 (B,), 1 <= length <= T.
    z has unit stride in its last dimension and any other strides. Rows past their length become zero.
    resets None or bool (T, B), none of them past a row's length: where rows begin anew, so that no state
    passes, in either direction, between the step and the one before it.
    precision, of float32 products: "tf32", "ieee" (IEEE class: the config says how) or "tf32x3".
    Raises ValueError where shapes, dtypes or devices disagree.
    """
    T, B, D, H = expect_sequence(z, "z", w_hh, lengths)
    expect(h0, "h0", (D, B, H), z)
    options = constants(z, nonlinearity)
    problem = problem_of(z, B, H, D, precision, ragged=lengths is not None or resets is not None)
    rows = row_arguments(lengths, resets, z)
    if 0 in (T, B, D, H):
        return z
    config = configs.checked("step", config, problem, lambda: chip(z.device))
    options |= {"H": H, "HAS_LENGTHS": lengths is not None, "HAS_RESETS": resets is not None}
    options |= {**vars(config), **launch_options()}
    h0, w_hh = h0.contiguous(), w_hh.contiguous()
    grid = (triton.cdiv(B, config.BLOCK_B), triton.cdiv(H, config.BLOCK_N), D)
    with on_device(z):
        for s in range(T):
            launch(forward_kernel, grid, (z, h0, w_hh, *rows, s, T, B, *z.stride()[:2]), options)
    return z


def scan_backward(
    g_out: torch.Tensor | None,
    g_hn: torch.Tensor | None,
    output: torch.Tensor,
    w_hh: torch.Tensor,
    dz: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.StepConfig | None = None,
    resets: torch.Tensor | None = None,
) -> None:
    """Fills dz (T, B, D * H), the gradient of the pre-activations, from those of the output and of h_n.

    g_out (T, B, D * H) with any strides (an expanded one stays expanded) or None, g_hn (D, B, H) or None,
    output (T, B, D * H) as scan left it; output and dz have unit stride in their last dimension.
    dz is zero past a row's length. The rest is as in scan.
    """
    problem, tensors, strides, options = backward_arguments(
        g_out, g_hn, output, w_hh, dz, lengths, nonlinearity, precision, resets
    )
    if dz.numel() == 0:
        return
    T, B, D, H = len(dz), problem.B, problem.D, problem.H
    config = configs.checked("step", config, problem, lambda: chip(dz.device))
    options |= {**vars(config), **launch_options()}
    grid = (triton.cdiv(B, config.BLOCK_B), triton.cdiv(H, config.BLOCK_N), D)
    with on_device(dz):
        for s in range(T):
            launch(backward_kernel, grid, (*tensors, s, T, B, *strides), options)


def cell(
    x: torch.Tensor,
    h: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    nonlinearity: str,
    precision: str,
    config: configs.StepConfig | None = None,
) -> None:
    """Writes act(x W_ih^T + bias + h W_hh^T) into out (B, H), in one launch.

    x (B, I), h (B, H), w_ih (H, I), w_hh (H, H), bias (H,) or None, all of one dtype and device.
    out has unit stride in its last dimension and shares no memory with x or h. precision as in scan.
    Raises ValueError where shapes, dtypes or devices disagree.
    """
    (B, I), H = x.shape, w_hh.shape[0]
    expect(h, "h", (B, H), x)
    expect(w_ih, "w_ih", (H, I), x)
    expect(w_hh, "w_hh", (H, H), x)
    expect(bias, "bias", (H,), x)
    expect(out, "out", (B, H), x)
    if out.stride(1) != 1 and H > 1:
        raise ValueError(f"out has stride {out.stride(1)} in its last dimension; expected 1.")
    options = constants(x, nonlinearity)
    problem = problem_of(x, B, H, 1, precision, inputs=I)
    if 0 in (B, H):
        return
    config = configs.checked("step", config, problem, lambda: chip(x.device))
    x = x if x.stride(1) == 1 else x.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    with on_device(x):
        arguments = (
            x,
            h,
            w_ih.contiguous(),
            w_hh.contiguous(),
            bias.contiguous() if bias is not None else out,
            out,
            B,
            x.stride(0),
            h.stride(0),
            out.stride(0),
        )
        options |= {"I": I, "H": H, "HAS_BIAS": bias is not None, **vars(config), **launch_options()}
        launch(
            cell_kernel, (triton.cdiv(B, config.BLOCK_B), triton.cdiv(H, config.BLOCK_N)), arguments, options
        )
