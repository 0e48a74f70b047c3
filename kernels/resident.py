"""A whole sequence in one launch, W_hh on chip throughout.

    h_t  = act(z_t + h_prev W_hh^T)                     z_t = W_ih x_t + b, made beforehand
    dz_t = act'(h_t) * (g_t + dz_next W_hh)             g_t: gradient of h_t from outside: that of the
                                                        output, plus that of h_n at the last step

One program per (batch tile, direction): grid (ceil(B / BLOCK_B), D). W_hh is a tuple of NC x NC tiles
(C, C), the state a tuple of NC tiles (BLOCK_B, C), H <= NC * C; columns past H are kept zero, so H needs no
power of two. Each step loads the next step's rows before it multiplies, so that memory latency hides
behind the product.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate, activate_backward
from .common import (
    chip,
    constants,
    dot,
    expect,
    expect_sequence,
    load_tiles,
    load_weight,
    on_device,
    rounded,
    row_lengths,
)


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    z,
    h0,
    w_hh,
    lengths,
    T,
    B,
    z_t,
    z_b,
    H: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    C: tl.constexpr,
):
    NC: tl.constexpr = (H + C - 1) // C
    d = tl.program_id(1)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rc = tl.arange(0, C)
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    steps = tl.max(length, 0)  # the tile's own end: rows that are all shorter than T don't wait for it
    sign = 1 - 2 * d
    t = d * (steps - 1)

    w = w_hh + d.to(tl.int64) * H * H
    ws = ()
    for n in tl.static_range(NC):
        for k in tl.static_range(NC):
            ws += (load_weight(w, k * C, n * C, H, C, True),)
    hs = load_tiles(h0 + (d.to(tl.int64) * B + rb) * H, rb < B, 1, H, C)
    rows = z + d * H + rb.to(tl.int64) * z_b
    zs = load_tiles(rows + t.to(tl.int64) * z_t, t < length, 1, H, C)
    for _ in range(steps):
        live = t < length
        t_next = t + sign
        zs_next = load_tiles(rows + t_next.to(tl.int64) * z_t, (t_next >= 0) & (t_next < length), 1, H, C)
        new = ()
        for n in tl.static_range(NC):
            rn = n * C + rc
            acc = zs[n].to(ACC)
            for k in tl.static_range(NC):
                acc = dot(hs[k], ws[n * NC + k], acc, PRECISION, INTERPRET)
            h = rounded(activate(acc, RELU), z.dtype.element_ty, INTERPRET)
            if (n + 1) * C > H:
                h = tl.where(rn[None, :] < H, h, 0.0)  # inf * 0 = NaN must not come back from the padding
            out = h
            if HAS_LENGTHS:
                out = tl.where(live[:, None], h, 0.0)
                h = tl.where(live[:, None], h, hs[n])  # reverse: h0 until the row begins
            pointers = rows[:, None] + t.to(tl.int64) * z_t + rn[None, :]
            tl.store(pointers, out, mask=(rb[:, None] < B) & (rn[None, :] < H))
            new += (h,)
        hs = new
        zs = zs_next
        t = t_next
    if HAS_LENGTHS:
        clear(rows, rb < B, steps, T, z_t, H, BLOCK_B, C)


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    g_out,
    g_hn,
    output,
    w_hh,
    dz,
    lengths,
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
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    C: tl.constexpr,
):
    NC: tl.constexpr = (H + C - 1) // C
    d = tl.program_id(1)
    rb = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rc = tl.arange(0, C)
    length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
    steps = tl.max(length, 0)
    sign = 2 * d - 1  # against the scan
    t = (1 - d) * (steps - 1)
    last = (1 - d) * (length - 1)

    w = w_hh + d.to(tl.int64) * H * H
    ws = ()
    for n in tl.static_range(NC):
        for k in tl.static_range(NC):
            ws += (load_weight(w, k * C, n * C, H, C, False),)
    rb64 = rb.to(tl.int64)
    out_rows = output + d * H + rb64 * out_b
    dz_rows = dz + d * H + rb64 * dz_b
    hs = load_tiles(out_rows + t.to(tl.int64) * out_t, t < length, 1, H, C)
    dzs = ()
    for _ in tl.static_range(NC):
        dzs += (tl.zeros((BLOCK_B, C), dz.dtype.element_ty),)
    gs = dzs
    if HAS_G_OUT:
        g_rows = g_out + d.to(tl.int64) * H * g_h + rb64 * g_b
        gs = load_tiles(g_rows + t.to(tl.int64) * g_t, t < length, g_h, H, C)
    if HAS_G_HN:
        ends = load_tiles(g_hn + (d.to(tl.int64) * B + rb) * H, rb < B, 1, H, C)
    for _ in range(steps):
        live = t < length
        t_next = t + sign
        ok = (t_next >= 0) & (t_next < length)
        hs_next = load_tiles(out_rows + t_next.to(tl.int64) * out_t, ok, 1, H, C)
        if HAS_G_OUT:
            gs_next = load_tiles(g_rows + t_next.to(tl.int64) * g_t, ok, g_h, H, C)
        new = ()
        for n in tl.static_range(NC):
            rn = n * C + rc
            acc = gs[n].to(ACC)
            if HAS_G_HN:
                acc += tl.where((last == t)[:, None], ends[n], 0.0).to(ACC)
            for k in tl.static_range(NC):
                acc = dot(dzs[k], ws[n * NC + k], acc, PRECISION, INTERPRET)
            g = rounded(activate_backward(acc, hs[n].to(ACC), RELU), dz.dtype.element_ty, INTERPRET)
            if HAS_LENGTHS:
                g = tl.where(live[:, None], g, 0.0)
            if (n + 1) * C > H:
                g = tl.where(rn[None, :] < H, g, 0.0)
            pointers = dz_rows[:, None] + t.to(tl.int64) * dz_t + rn[None, :]
            tl.store(pointers, g, mask=(rb[:, None] < B) & (rn[None, :] < H))
            new += (g,)
        dzs = new
        hs = hs_next
        if HAS_G_OUT:
            gs = gs_next
        t = t_next
    if HAS_LENGTHS:
        clear(dz_rows, rb < B, steps, T, dz_t, H, BLOCK_B, C)


@triton.jit
def clear(rows, ok, start, stop, stride, H: tl.constexpr, BLOCK_B: tl.constexpr, C: tl.constexpr):
    """Zeros in the rows' H columns at the steps from start to stop."""
    zero = tl.zeros((BLOCK_B, C), rows.dtype.element_ty)
    t = start  # not the loop's own variable, which the interpreter makes a Python int
    for _ in range(stop - start):
        for n in tl.static_range((H + C - 1) // C):
            rn = n * C + tl.arange(0, C)
            pointers = rows[:, None] + t.to(tl.int64) * stride + rn[None, :]
            tl.store(pointers, zero, mask=ok[:, None] & (rn[None, :] < H))
        t += 1


def scan(
    z: torch.Tensor,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.ResidentConfig | None = None,
) -> None:
    """Turns the input products z (T, B, D * H) into the output, in place.

    h0 (D, B, H), w_hh (D, H, H), all of one dtype and device; lengths None or int64 (B,), 1 <= length <= T.
    z has unit stride in its last dimension and any other strides. Rows past their length become zero.
    precision, of float32 products: "ieee", "tf32" or "tf32x3".
    Raises ValueError where shapes, dtypes or devices disagree, and Triton's OutOfResources where W_hh does
    not fit on the chip: ask configs.resident_fits first.
    """
    T, B, D, H = expect_sequence(z, "z", w_hh, lengths)
    expect(h0, "h0", (D, B, H), z)
    options = constants(z, nonlinearity, precision)
    if 0 in (T, B, D, H):
        return
    config = config or configs.choose_resident(B, H, D, z.element_size(), *chip(z.device), precision)
    with on_device(z):
        forward_kernel[triton.cdiv(B, config.BLOCK_B), D](
            z,
            h0.contiguous(),
            w_hh.contiguous(),
            lengths.contiguous() if lengths is not None else z,
            T,
            B,
            *z.stride()[:2],
            H=H,
            HAS_LENGTHS=lengths is not None,
            **options,
            **vars(config),
        )


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
) -> None:
    """Fills dz (T, B, D * H), the gradient of the pre-activations, from those of the output and of h_n.

    g_out (T, B, D * H) with any strides (an expanded one stays expanded) or None, g_hn (D, B, H) or None,
    output (T, B, D * H) as scan left it; output and dz have unit stride in their last dimension.
    dz is zero past a row's length. The rest is as in scan.
    """
    T, B, D, H = expect_sequence(output, "output", w_hh, lengths)
    expect_sequence(dz, "dz", w_hh, lengths)
    expect(dz, "dz", output.shape, output)
    expect(g_out, "g_out", output.shape, output)
    expect(g_hn, "g_hn", (D, B, H), output)
    options = constants(dz, nonlinearity, precision)
    if 0 in (T, B, D, H):
        return
    config = config or configs.choose_resident(B, H, D, dz.element_size(), *chip(dz.device), precision)
    with on_device(dz):
        backward_kernel[triton.cdiv(B, config.BLOCK_B), D](
            g_out if g_out is not None else dz,
            g_hn.contiguous() if g_hn is not None else dz,
            output,
            w_hh.contiguous(),
            dz,
            lengths.contiguous() if lengths is not None else dz,
            T,
            B,
            *(g_out if g_out is not None else dz).stride(),
            *output.stride()[:2],
            *dz.stride()[:2],
            H=H,
            HAS_G_OUT=g_out is not None,
            HAS_G_HN=g_hn is not None,
            HAS_LENGTHS=lengths is not None,
            **options,
            **vars(config),
        )
