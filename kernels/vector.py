"""resident for a batch of few rows: one row a program, W_hh in registers, its product in plain multiply-adds.

The equations and the launch arguments are those of resident.py, whose launchers start these for BLOCK_B = 1.

There is a thread for each of the C elements of a state (H padded). A weight (C, K) is a tile (K / LANES, C,
LANES), and the compiler lays the first index out inside a thread: it has LANES rows, of each of which it
adds up K / LANES terms out of registers. LANES lanes add up what they have of these rows, and each goes on
with one of them. So a step goes through shared memory once, with two barriers: from there the next product
reads the state. That depends on how the compiler lays out a tile by default; the results don't.
"""

import triton
import triton.language as tl

from . import elements
from .activations import activate_backward
from .common import activated, clear, is_cut, moved_up, rounded, within

#: Lanes that share a row's sum, and rows that they add up: together they have one of each at its end.
LANES = tl.constexpr(4)


@triton.jit
def spread(K: tl.constexpr):
    """The indices (K / LANES, LANES) of K elements: a thread has four next to each other, read as one."""
    i, lane = tl.arange(0, K // LANES)[:, None], tl.arange(0, LANES)[None, :]
    return i // 4 * (4 * LANES) + lane * 4 + i % 4


@triton.jit
def load_weight(
    w,
    M: tl.constexpr,
    K: tl.constexpr,
    w_m: tl.constexpr,
    w_k: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The (M, K) weight whose element (m, k) lies at w + m * w_m + k * w_k; zero past its edges."""
    i = tl.arange(0, C)  # in a tile the rows that a thread has lie C / LANES apart
    rm = (i % (C // LANES) * LANES + i // (C // LANES))[None, :, None]
    rk = spread(BLOCK_K)[:, None, :]
    tile = elements.load(w + tl.minimum(rm, M - 1) * w_m + tl.minimum(rk, K - 1) * w_k, INTERPRET)
    return tl.where((rm < M) & (rk < K), tile, 0.0)


@triton.jit
def load_state(row, stride, H: tl.constexpr, C: tl.constexpr):
    """The H elements from the pointer `row` on; zero past H."""
    rn = tl.arange(0, C)
    return tl.load(row + rn.to(tl.int64) * stride, mask=rn < H, other=0.0)


@triton.jit
def load_input(row, stride, I: tl.constexpr, BLOCK_I: tl.constexpr, INTERPRET: tl.constexpr):
    """The I elements from the pointer `row` on as an operand; zero past I."""
    ri = spread(BLOCK_I)
    x = elements.load(row + tl.minimum(ri, I - 1).to(tl.int64) * stride, INTERPRET)
    return tl.where(ri < I, x, 0.0)


@triton.jit
def operand(h):
    """A state (C,) as an operand (C / LANES, LANES): once through shared memory."""
    h = tl.reshape(h, (h.shape[0] // (4 * LANES), LANES, 4))
    return tl.reshape(tl.permute(h, (0, 2, 1)), (h.shape[0] * 4, LANES))


@triton.jit
def store_state(row, h, H: tl.constexpr, C: tl.constexpr):
    rn = tl.arange(0, C)
    tl.store(row + rn, h, mask=rn < H)


@triton.jit
def rows_sum(sums):
    """The sums (C, LANES) over the lanes, as a state (C,): each lane keeps its own row's."""
    C: tl.constexpr = sums.shape[0]
    acc = tl.sum(tl.reshape(sums, (LANES, C // LANES, LANES)), 2)[:, :, None]
    own = tl.arange(0, LANES)[:, None, None] == tl.arange(0, LANES)[None, None, :]
    return tl.reshape(tl.sum(tl.where(own, acc, 0.0), 0), (C,))


@triton.jit
def without_padding(h, H: tl.constexpr, C: tl.constexpr):
    """A state with zeros past H: inf * 0 = NaN must not return from there."""
    if C > H:
        h = tl.where(tl.arange(0, C) < H, h, 0.0)
    return h


@triton.jit
def row_steps(lengths, b, T, HAS_LENGTHS: tl.constexpr):
    """The row's own steps."""
    if HAS_LENGTHS:
        return tl.load(lengths + b).to(tl.int32)
    else:
        return T


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    x,
    w_ih,
    bias,
    h0,
    w_hh,
    output,
    lengths,
    resets,
    T,
    B,
    x_t,
    x_b,
    x_i,
    out_t,
    out_b,
    H: tl.constexpr,
    I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    C: tl.constexpr,
    HELD: tl.constexpr,
    AHEAD: tl.constexpr,
    WARPS: tl.constexpr,
):
    """x is (T, B, I); or, where I is 0, it is z (T, B, D * H) in the output's own memory."""
    BLOCK_I: tl.constexpr = 16 if I <= 16 else 32 if I <= 32 else 64
    b = tl.program_id(0)
    d = tl.program_id(1)
    b64, d64 = b.to(tl.int64), d.to(tl.int64)
    steps = row_steps(lengths, b, T, HAS_LENGTHS)
    sign = 1 - 2 * d
    t = d * (steps - 1)
    w = load_weight(w_hh + d64 * H * H, H, H, H, 1, C, C, INTERPRET)
    h = without_padding(load_state(h0 + (d64 * B + b) * H, 1, H, C), H, C)
    out_row = output + d * H + b64 * out_b
    queue = ()
    if I > 0:
        x_row = x + b64 * x_b
        u = load_weight(w_ih + d64 * H * I, H, I, I, 1, C, BLOCK_I, INTERPRET)
        if HAS_BIAS:
            start = load_state(bias + d * H, 1, H, C)
    else:
        x_row = x + d * H + b64 * x_b
    for i in tl.static_range(AHEAD):
        row = x_row + within(t + i * sign, steps) * x_t
        if I > 0:
            queue += (load_input(row, x_i, I, BLOCK_I, INTERPRET),)
        else:
            queue += (load_state(row, 1, H, C),)
    if HAS_RESETS:
        cut = is_cut(resets, t + sign + d, b, T, B)
    for _ in range(steps):
        row = x_row + within(t + AHEAD * sign, steps) * x_t
        later = load_input(row, x_i, I, BLOCK_I, INTERPRET) if I > 0 else load_state(row, 1, H, C)
        if HAS_RESETS:
            cut_later = is_cut(resets, t + 2 * sign + d, b, T, B)
        sums = tl.sum(w * operand(h)[:, None, :], 0)
        if I > 0:
            sums += tl.sum(u * queue[0][:, None, :], 0)  # type: ignore[misc]
        acc = rows_sum(sums)
        if I == 0:
            acc += queue[0].to(ACC)  # type: ignore[misc]
        elif HAS_BIAS:
            acc += start
        h = without_padding(activated(acc, RELU, output.dtype.element_ty, INTERPRET), H, C)
        store_state(out_row + t.to(tl.int64) * out_t, h, H, C)
        if HAS_RESETS:
            h = tl.where(cut, 0.0, h)
            cut = cut_later
        queue = moved_up(queue, (later,))
        t += sign
    if HAS_LENGTHS:
        clear_state(out_row, steps, T, out_t, H, C)


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    g_out,
    g_hn,
    output,
    w_hh,
    dz,
    lengths,
    resets,
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
    C: tl.constexpr,
    HELD: tl.constexpr,
    AHEAD: tl.constexpr,
):
    b = tl.program_id(0)
    d = tl.program_id(1)
    b64, d64 = b.to(tl.int64), d.to(tl.int64)
    steps = row_steps(lengths, b, T, HAS_LENGTHS)
    sign = 2 * d - 1  # against the scan
    t = (1 - d) * (steps - 1)
    w = load_weight(w_hh + d64 * H * H, H, H, 1, H, C, C, INTERPRET)
    out_row = output + d * H + b64 * out_b
    g_row = g_out + d64 * H * g_h + b64 * g_b
    dz_row = dz + d * H + b64 * dz_b
    acc = tl.zeros((C,), ACC)
    if HAS_G_HN:
        acc += load_state(g_hn + (d64 * B + b) * H, 1, H, C).to(ACC)
    queue = ()
    g_queue = ()
    for i in tl.static_range(AHEAD):
        t_next = within(t + i * sign, steps)
        queue += (load_state(out_row + t_next * out_t, 1, H, C),)
        if HAS_G_OUT:
            g_queue += (load_state(g_row + t_next * g_t, g_h, H, C),)
    if HAS_RESETS:
        cut = is_cut(resets, t + d, b, T, B)
    for _ in range(steps):
        t_next = within(t + AHEAD * sign, steps)
        later = load_state(out_row + t_next * out_t, 1, H, C)
        if HAS_RESETS:
            cut_later = is_cut(resets, t + sign + d, b, T, B)
        if HAS_G_OUT:
            g_later = load_state(g_row + t_next * g_t, g_h, H, C)
            acc += g_queue[0].to(ACC)  # type: ignore[misc]
        g = rounded(activate_backward(acc, queue[0].to(ACC), RELU), dz.dtype.element_ty, INTERPRET)  # type: ignore[misc]
        g = without_padding(g, H, C)
        acc = rows_sum(tl.sum(w * operand(g)[:, None, :], 0))
        store_state(dz_row + t.to(tl.int64) * dz_t, g, H, C)
        if HAS_RESETS:
            acc = tl.where(cut, 0.0, acc)
            cut = cut_later
        queue = moved_up(queue, (later,))
        if HAS_G_OUT:
            g_queue = moved_up(g_queue, (g_later,))
        t += sign
    if HAS_LENGTHS:
        clear_state(dz_row, steps, T, dz_t, H, C)


@triton.jit
def clear_state(row, start, stop, stride, H: tl.constexpr, C: tl.constexpr):
    """Zeros in the H elements from the pointer `row` on, at steps start to stop."""
    rn = tl.arange(0, C)
    clear(row + rn, rn < H, start, stop, stride)
