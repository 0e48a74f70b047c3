"""A whole sequence in one launch, W_hh on chip throughout.

    h_t  = act(z_t + W_hh h_prev)               z_t = W_ih x_t + b, made beforehand, or here if I is small
    dz_t = act'(h_t) * (g_t + W_hh^T dz_next)   g_t: gradient of h_t from outside: that of the output, plus
                                                that of h_n at the last step

One program per (batch tile, direction): grid (ceil(B / BLOCK_B), D). A state is (H, BLOCK_B), the weight the
left operand: H fills a tensor core's 16 rows at any batch, and 8 batch rows are enough for its columns. H is
cut in tiles of C, the last no wider than what is left needs: a state is a tuple of NC tiles, W_hh one of
NC x NC. Rows past H are kept zero.

A step is a chain of latencies, so as little as possible lies between one product and the next
(docs/tuning-notes.md): the first HELD rows of W_hh's tiles stay in registers and the others in shared memory,
elements come and go in the product's own layout (elements.py), and each step fetches what the step AHEAD
of it reads.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from . import configs, elements, vector
from .activations import activate_backward
from .common import (
    activated,
    backward_arguments,
    chip,
    clear,
    constants,
    dot,
    expect,
    expect_sequence,
    is_cut,
    is_step,
    launch,
    launch_options,
    moved_up,
    on_device,
    operand,
    problem_of,
    rounded,
    row_arguments,
    row_lengths,
    within,
)

#: As wide as an input may be for the fused scan, which keeps W_ih on chip beside W_hh.
MAX_INPUTS = 64
_MAX_INPUTS = tl.constexpr(MAX_INPUTS)
width = triton.constexpr_function(configs.tile_width)


@triton.jit
def load_weight(
    w,
    M: tl.constexpr,
    K: tl.constexpr,
    w_m: tl.constexpr,
    w_k: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The tiles, row by row, of the (M, K) weight whose element (m, k) lies at w + m * w_m + k * w_k.

    Zero past the edges. The first HELD rows of tiles stay in registers. With HALVES a tile is two, each with
    every other 8 of its columns, as `halves` cuts the state.
    """
    tiles = ()
    for m in tl.static_range((M + BLOCK_M - 1) // BLOCK_M):
        for k in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            rm = m * BLOCK_M + tl.arange(0, width(m, M, BLOCK_M))[:, None]
            for half in tl.static_range(1 + (HALVES and width(k, K, BLOCK_K) >= 32)):
                if HALVES and width(k, K, BLOCK_K) >= 32:
                    rk = tl.arange(0, width(k, K, BLOCK_K) // 2)[None, :]
                    rk = k * BLOCK_K + rk // 8 * 16 + half * 8 + rk % 8
                else:
                    rk = k * BLOCK_K + tl.arange(0, width(k, K, BLOCK_K))[None, :]
                tile = tl.load(w + rm * w_m + rk * w_k, mask=(rm < M) & (rk < K), other=0.0)
                if m < HELD and not INTERPRET:
                    tile = held(tile, BLOCK_B)
                tiles += (operand(tile, PRECISION, INTERPRET),)
    return tiles


@triton.jit
def halves(hs, H: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr):
    """A state's tiles, each in two: every other 8 of its rows. A thread has equally many of both."""
    parts = ()
    for k in tl.static_range(len(hs)):
        if HALVES and width(k, H, C) >= 32:
            h = tl.reshape(hs[k], (hs[k].shape[0] // 16, 2, 8, hs[k].shape[1]))
            for part in tl.static_range(2):
                half = tl.split(tl.permute(h, (0, 2, 3, 1)))[part]
                parts += (tl.reshape(half, (hs[k].shape[0] // 2, hs[k].shape[1])),)
        else:
            parts += (hs[k],)
    return parts


@triton.jit
def held(tile, BLOCK_B: tl.constexpr):
    """A 16-bit tile in the layout of a product's result, where a left operand needs no shared memory.

    Left to itself, the compiler puts a tile that it has loaded into shared memory and reads it there again
    at every step. The sum with a zero that comes out of a product has that product's layout.
    """
    nothing = tl.zeros((tile.shape[0], 16), tile.dtype)
    zero = tl.dot(nothing, tl.zeros((16, BLOCK_B), tile.dtype), out_dtype=tl.float32)
    return tile + tl.max(zero, 1).to(tile.dtype)[:, None]


@triton.jit
def load_state(columns, stride, H: tl.constexpr, C: tl.constexpr, INTERPRET: tl.constexpr):
    """The H elements from each of the pointers `columns` (BLOCK_B,) on, as tiles; zero past H."""
    tiles = ()
    for n in tl.static_range((H + C - 1) // C):
        rn = tl.minimum(n * C + tl.arange(0, width(n, H, C)), H - 1)
        tile = elements.load(columns[None, :] + rn[:, None].to(tl.int64) * stride, INTERPRET)
        tiles += (without_padding(tile, n * C, H),)
    return tiles


@triton.jit
def load_input(columns, ok, stride, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """The I elements from each of the pointers `columns` on, as a state of one tile; zero where not ok."""
    ri = tl.arange(0, BLOCK_I)[:, None]
    tile = tl.load(columns[None, :] + ri.to(tl.int64) * stride, mask=ok[None, :] & (ri < I), other=0.0)
    return (tile,)


@triton.jit
def load_bias(bias, H: tl.constexpr, C: tl.constexpr, BLOCK_B: tl.constexpr, dtype: tl.constexpr):
    """A state of which every column is the bias (H,)."""
    tiles = ()
    for n in tl.static_range((H + C - 1) // C):
        rn = n * C + tl.arange(0, width(n, H, C))
        b = tl.load(bias + rn, mask=rn < H, other=0.0).to(dtype)
        tiles += (tl.broadcast_to(b[:, None], (width(n, H, C), BLOCK_B)),)
    return tiles


@triton.jit
def store_tile(columns, tile, ok, N0: tl.constexpr, H: tl.constexpr, INTERPRET: tl.constexpr):
    """Writes a state's tile, whose first row is N0, behind those of the pointers `columns` that are ok."""
    rn = N0 + tl.arange(0, tile.shape[0])
    elements.store(columns[None, :] + rn[:, None], tile, ok[None, :] & (rn[:, None] < H), INTERPRET)


@triton.jit
def without_padding(tile, N0: tl.constexpr, H: tl.constexpr):
    """A state's tile, whose first row is N0, with zeros past H: inf * 0 = NaN must not return from there."""
    if N0 + tile.shape[0] > H:
        rn = N0 + tl.arange(0, tile.shape[0])
        tile = tl.where(rn[:, None] < H, tile, 0.0)
    return tile


@triton.jit
def add_product(accs, ws, hs, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """accs + the weight ws @ the state hs, all three as tuples of tiles."""
    sums = ()
    operands = ()
    for k in tl.static_range(len(hs)):
        operands += (operand(hs[k], PRECISION, INTERPRET),)
    hs = operands
    for n in tl.static_range(len(accs)):
        acc = accs[n]
        if PRECISION == "tf32x3" and not INTERPRET and is_cuda():
            acc = tf32x3_product(ws[n * len(hs) : (n + 1) * len(hs)], hs, acc)
        else:
            for k in tl.static_range(len(hs)):
                acc = dot(ws[n * len(hs) + k], hs[k], acc, PRECISION, INTERPRET)
        sums += (acc,)
    return sums


@triton.jit
def tf32x3_product(ws, hs, acc):
    """acc + a row of tiles @ the state, as tl.dot's tf32x3, in chains that don't wait for one another.

    A tensor core cuts off what does not fit into a sum, so the large parts' sums begin again with each half
    of a tile. All parts are made before the first product: made between two, they would take turns in shared
    memory.
    """
    ones = tl.full(acc.shape, 1.0, acc.dtype)
    one, other = tl.zeros(acc.shape, acc.dtype), tl.zeros(acc.shape, acc.dtype)
    parts = ()
    for k in tl.static_range(len(hs)):
        parts += (operand(hs[k], "tf32", False),)
    for k in tl.static_range(len(hs)):
        parts += (operand(hs[k] - parts[k], "tf32", False),)
    bigs = ()
    for k in tl.static_range(len(hs)):
        w = operand(ws[k], "tf32", False)
        one = tl.dot(operand(ws[k] - w, "tf32", False), parts[k], one, input_precision="tf32")
        other = tl.dot(w, parts[len(hs) + k], other, input_precision="tf32")
        bigs += (tl.dot(w, parts[k], tl.zeros(acc.shape, acc.dtype), input_precision="tf32"),)
    small = tl.fma(one, ones, other)
    acc += tl.where(small == small, small, 0.0)  # infinity less itself is NaN
    for k in tl.static_range(len(hs)):
        acc = tl.fma(bigs[k], ones, acc)
    return acc


@triton.jit
def zeros(H: tl.constexpr, C: tl.constexpr, BLOCK_B: tl.constexpr, dtype: tl.constexpr):
    """A state of zeros."""
    tiles = ()
    for n in tl.static_range((H + C - 1) // C):
        tiles += (tl.zeros((width(n, H, C), BLOCK_B), dtype),)
    return tiles


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
    NC: tl.constexpr = (H + C - 1) // C
    HALVES: tl.constexpr = PRECISION == "tf32x3"
    BLOCK_I: tl.constexpr = width(0, I, _MAX_INPUTS)
    d = tl.program_id(1)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    ok = rb < B
    rb = tl.minimum(rb, B - 1).to(tl.int64)  # rows past the batch repeat its last one, and are not written
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    steps = tl.max(length, 0)  # the tile's own end: rows that are all shorter than T don't wait for it
    sign = 1 - 2 * d
    t = d * (steps - 1)

    d64 = d.to(tl.int64)
    ws = load_weight(w_hh + d64 * H * H, H, H, H, 1, C, C, HELD, HALVES, BLOCK_B, PRECISION, INTERPRET)
    hs = load_state(h0 + (d64 * B + rb) * H, 1, H, C, INTERPRET)
    out_columns = output + d * H + rb * out_b
    start = zeros(H, C, BLOCK_B, ACC)
    accs = start
    queue = ()
    if I > 0:
        x_columns = x + rb * x_b
        us = load_weight(
            w_ih + d64 * H * I, H, I, I, 1, C, BLOCK_I, HELD, False, BLOCK_B, PRECISION, INTERPRET
        )
        if HAS_BIAS:
            start = load_bias(bias + d * H, H, C, BLOCK_B, ACC)
        xs = load_input(x_columns + t.to(tl.int64) * x_t, t < length, x_i, I, BLOCK_I)
        accs = add_product(start, us, xs, PRECISION, INTERPRET)
        for i in tl.static_range(AHEAD):
            t_next = t + (i + 1) * sign
            inside = is_step(t_next, length, length)
            queue += load_input(x_columns + t_next.to(tl.int64) * x_t, inside, x_i, I, BLOCK_I)
    else:
        x_columns = x + d * H + rb * x_b
        for i in tl.static_range(AHEAD):
            queue += load_state(x_columns + within(t + i * sign, steps) * x_t, 1, H, C, INTERPRET)
    if HAS_RESETS:
        cut = is_cut(resets, t + sign + d, rb, T, B)
    for _ in range(tl.minimum(steps, 1)):  # once; outside a loop it would read all the tiles before it starts
        accs = add_product(accs, ws, halves(hs, H, C, HALVES), PRECISION, INTERPRET)
    for _ in range(steps):
        live = t < length
        if HAS_RESETS:
            cut_later = is_cut(resets, t + 2 * sign + d, rb, T, B)
        if I > 0:
            t_next = t + (AHEAD + 1) * sign
            inside = is_step(t_next, length, length)
            later = load_input(x_columns + t_next.to(tl.int64) * x_t, inside, x_i, I, BLOCK_I)
        else:
            later = load_state(x_columns + within(t + AHEAD * sign, steps) * x_t, 1, H, C, INTERPRET)
        if HALVES or (I == 0 and width(0, H, C) < 16 * WARPS):
            # HALVES: else the compiler sets one between the halves, for h0's before the loop. And warps that
            # have the same rows need nothing of each other: one a step ahead would write over z before others
            # read it.
            tl.debug_barrier()
        new = ()
        for n in tl.static_range(NC):
            acc = accs[n]
            if I == 0:
                acc += queue[n].to(ACC)
            h = activated(acc, RELU, output.dtype.element_ty, INTERPRET)
            h = without_padding(h, n * C, H)
            out = h
            if HAS_LENGTHS:
                out = tl.where(live[None, :], h, 0.0)
                h = tl.where(live[None, :], h, hs[n])  # reverse: h0 until the row begins
            store_tile(out_columns + t.to(tl.int64) * out_t, out, ok, n * C, H, INTERPRET)
            if HAS_RESETS:
                h = tl.where(cut[None, :], 0.0, h)
            new += (h,)
        hs = new
        if HAS_RESETS:
            cut = cut_later
        accs = start
        if I > 0:
            accs = add_product(start, us, queue[:1], PRECISION, INTERPRET)
        accs = add_product(accs, ws, halves(hs, H, C, HALVES), PRECISION, INTERPRET)
        queue = moved_up(queue, later)
        t += sign
    if HAS_LENGTHS:
        clear_state(out_columns, ok, steps, T, out_t, H, C)


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
    NC: tl.constexpr = (H + C - 1) // C
    HALVES: tl.constexpr = PRECISION == "tf32x3"
    d = tl.program_id(1)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    ok = rb < B
    rb = tl.minimum(rb, B - 1).to(tl.int64)
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    steps = tl.max(length, 0)
    sign = 2 * d - 1  # against the scan
    t = (1 - d) * (steps - 1)
    last = (1 - d) * (length - 1)

    d64 = d.to(tl.int64)
    ws = load_weight(w_hh + d64 * H * H, H, H, 1, H, C, C, HELD, HALVES, BLOCK_B, PRECISION, INTERPRET)
    out_columns = output + d * H + rb * out_b
    g_columns = g_out + d64 * H * g_h + rb * g_b
    dz_columns = dz + d * H + rb * dz_b
    start = zeros(H, C, BLOCK_B, ACC)
    accs = start
    queue = ()
    g_queue = ()
    for i in tl.static_range(AHEAD):
        t_next = within(t + i * sign, steps)
        queue += load_state(out_columns + t_next * out_t, 1, H, C, INTERPRET)
        if HAS_G_OUT:
            g_queue += load_state(g_columns + t_next * g_t, g_h, H, C, INTERPRET)
    if HAS_RESETS:
        cut = is_cut(resets, t - sign + d, rb, T, B)
    if HAS_G_HN:
        ends = load_state(g_hn + (d64 * B + rb) * H, 1, H, C, INTERPRET)
    for _ in range(steps):
        live = t < length
        t_next = within(t + AHEAD * sign, steps)
        later = load_state(out_columns + t_next * out_t, 1, H, C, INTERPRET)
        if HAS_RESETS:
            cut_later = is_cut(resets, t + d, rb, T, B)
        if HAS_G_OUT:
            g_later = load_state(g_columns + t_next * g_t, g_h, H, C, INTERPRET)
        new = ()
        for n in tl.static_range(NC):
            acc = accs[n]
            # Not of the state before the product: zeros times infinite weights are none.
            if HAS_LENGTHS:
                acc = tl.where((last == t)[None, :], 0.0, acc)
            if HAS_RESETS:
                acc = tl.where(cut[None, :], 0.0, acc)
            if HAS_G_OUT:
                acc += g_queue[n].to(ACC)
            if HAS_G_HN:
                acc += tl.where((last == t)[None, :], ends[n], 0.0).to(ACC)
            g = activate_backward(acc, queue[n].to(ACC), RELU)
            g = without_padding(rounded(g, dz.dtype.element_ty, INTERPRET), n * C, H)
            if HAS_LENGTHS:
                g = tl.where(live[None, :], g, 0.0)
            new += (g,)
        if HAS_RESETS:
            cut = cut_later
        accs = add_product(start, ws, halves(new, H, C, HALVES), PRECISION, INTERPRET)
        # After the product: before it the stores would stand in the queue in which it waits for its operands.
        for n in tl.static_range(NC):
            store_tile(dz_columns + t.to(tl.int64) * dz_t, new[n], ok, n * C, H, INTERPRET)
        queue = moved_up(queue, later)
        if HAS_G_OUT:
            g_queue = moved_up(g_queue, g_later)
        t += sign
    if HAS_LENGTHS:
        clear_state(dz_columns, ok, steps, T, dz_t, H, C)


@triton.jit
def clear_state(columns, ok, start, stop, stride, H: tl.constexpr, C: tl.constexpr):
    """Zeros in the H elements from each of the pointers `columns` that are ok on, at steps start to stop."""
    for n in tl.static_range((H + C - 1) // C):
        rn = n * C + tl.arange(0, width(n, H, C))
        clear(columns[None, :] + rn[:, None], ok[None, :] & (rn[:, None] < H), start, stop, stride)


def scan(
    z: torch.Tensor,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.ResidentConfig | None = None,
    resets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turns the input products z (T, B, D * H) into the output, in place, and returns it.

    h0 (D, B, H), w_hh (D, H, H), all of one dtype and device; lengths None or int64 (B,), 1 <= length <= T.
    z has unit stride in its last dimension and any other strides. Rows past their length become zero.
    resets None or bool (T, B), none of them past a row's length: where rows begin anew, so that no state
    passes, in either direction, between the step and the one before it.
    precision, of float32 products: "tf32", "ieee" (IEEE class: the config says how) or "tf32x3".
    Raises ValueError where shapes, dtypes or devices disagree, or where no config fits on the chip.
    """
    _, B, D, H = expect_sequence(z, "z", w_hh, lengths)
    problem = problem_of(z, B, H, D, precision, ragged=lengths is not None or resets is not None)
    return _forward(z, None, None, h0, w_hh, z, lengths, nonlinearity, problem, config, resets)


def scan_fused(
    x: torch.Tensor,
    w_ih: torch.Tensor,
    bias: torch.Tensor | None,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.ResidentConfig | None = None,
    resets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output (T, B, D * H) from the input x (T, B, I), 1 <= I <= MAX_INPUTS, with any strides.

    w_ih (D, H, I), bias (D, H) or None. The rest is as in scan.
    """
    if x.dim() != 3 or not 1 <= x.shape[2] <= MAX_INPUTS:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (time, batch, 1 to {MAX_INPUTS} inputs).")
    D, H = w_hh.shape[:2]
    output = x.new_empty(*x.shape[:2], D * H)
    expect_sequence(output, "output", w_hh, lengths)
    expect(w_ih, "w_ih", (D, H, x.shape[2]), x)
    expect(bias, "bias", (D, H), x)
    B, I, ragged = x.shape[1], x.shape[2], lengths is not None or resets is not None
    problem = problem_of(x, B, H, D, precision, inputs=I, ragged=ragged)
    return _forward(x, w_ih, bias, h0, w_hh, output, lengths, nonlinearity, problem, config, resets)


def _forward(
    x: torch.Tensor,
    w_ih: torch.Tensor | None,
    bias: torch.Tensor | None,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    output: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    problem: configs.Problem,
    config: configs.ResidentConfig | None,
    resets: torch.Tensor | None,
) -> torch.Tensor:
    B, H, D = problem.B, problem.H, problem.D
    expect(h0, "h0", (D, B, H), x)
    options = constants(x, nonlinearity)
    rows = row_arguments(lengths, resets, x)
    if output.numel() == 0:
        return output
    if resets is not None:  # in the kernel another layout of h0 would need memory that there is none of
        h0 = torch.cat([h0[:1].masked_fill(resets[0, :, None], 0), h0[1:]])
    config = configs.checked("resident", config, problem, lambda: chip(x.device))
    kernel = vector.forward_kernel if config.BLOCK_B == 1 else forward_kernel
    with on_device(x):
        arguments: tuple[torch.Tensor | int, ...] = (
            x,
            w_ih.contiguous() if w_ih is not None else x,
            bias.contiguous() if bias is not None else x,
            h0.contiguous(),
            w_hh.contiguous(),
            output,
            *rows,
            len(x),
            B,
            *x.stride(),
            *output.stride()[:2],
        )
        options |= {
            "H": H,
            "I": problem.inputs,
            "HAS_BIAS": bias is not None,
            "HAS_LENGTHS": lengths is not None,
            "HAS_RESETS": resets is not None,
            "WARPS": config.num_warps,
            **vars(config),
            **launch_options(),
        }
        launch(kernel, (triton.cdiv(B, config.BLOCK_B), D), arguments, options)
    return output


def scan_backward(
    g_out: torch.Tensor | None,
    g_hn: torch.Tensor | None,
    output: torch.Tensor,
    w_hh: torch.Tensor,
    dz: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.ResidentConfig | None = None,
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
    config = configs.checked("resident", config, problem, lambda: chip(dz.device))
    options |= {**vars(config), **launch_options()}
    kernel = vector.backward_kernel if config.BLOCK_B == 1 else backward_kernel
    with on_device(dz):
        grid = (triton.cdiv(problem.B, config.BLOCK_B), problem.D)
        launch(kernel, grid, (*tensors, len(dz), problem.B, *strides), options)
