"""A whole sequence in one launch, W_hh cut by output columns over programs that meet at every step.

    h_t  = act(z_t + h_prev W_hh^T)                     z_t = W_ih x_t + b, made beforehand
    dz_t = act'(h_t) * (g_t + dz_next W_hh)             g_t: gradient of h_t from outside: that of the
                                                        output, plus that of h_n at the last step

Grid (ceil(H / BLOCK_N), groups). A job is a batch tile of one direction; a group of ceil(H / BLOCK_N)
programs takes one job after another, each program BLOCK_N columns of it. The product is transposed, so
that the batch may be as narrow as 8: (BLOCK_N, H) of W_hh times the state (H, BLOCK_B). H comes in chunks
of BLOCK_K, a chunk in PART = BLOCK_K / WARPS for each warp: (WARPS, BLOCK_N, PART) by (WARPS, PART, BLOCK_B).

The state goes from program to program through L2, by way of `output` (backward: dz) itself. Two ways to
meet:

    flag      the buffer arrives filled with a NaN pattern that no kernel writes, and readers poll the data
              itself until none of it is left; a NaN that comes out as that pattern is stored as another
    counter   each program adds one when its columns are out, and waits until all of its group have

All programs must be on the chip at once, which a cooperative launch checks. Who waits longer than `patience`
looks gives up: it sets `status`, computes NaN from there on and waits no more, so the launch ends.
"""

import atexit
import os
import sys

import torch
import triton
import triton.language as tl

from . import configs, elements
from .activations import activate_backward
from .common import (
    INTERPRETED,
    activated,
    backward_arguments,
    chip,
    clear,
    constants,
    dot,
    expect,
    expect_sequence,
    is_cut,
    launch,
    launch_options,
    on_device,
    operand,
    problem_of,
    rounded,
    row_arguments,
    row_lengths,
)
from .errors import DeviceHangError

#: Looks at the others' data before a waiter gives up. A look is a trip to L2, about a microsecond.
PATIENCE = 1 << 22

#: What who gave up adds to the counter at each step. It is more than any group counts to in earnest (steps
#: times programs): a waiter sees that the columns it waits for may be missing although the count is full.
GAVE_UP = tl.constexpr(1 << 40)

#: Words of the weight that a thread may hold in registers.
HELD = tl.constexpr(128)


@triton.jit
def in_order(i, DIRECT: tl.constexpr):
    """Where in a warp's part the product's i-th element lies. DIRECT, else 0: the bits of an element.

    A lane takes 16 bytes at once, and the product has them for the lane's elements of two instructions.
    """
    if DIRECT == 16:  # lane q of four has elements 4q to 4q + 3 of 16
        return i // 32 * 32 + i // 4 % 4 * 8 + i // 16 % 2 * 4 + i % 4
    elif DIRECT == 32:  # 2q and 2q + 1 of 8
        return i // 16 * 16 + i // 2 % 4 * 4 + i // 8 % 2 * 2 + i % 2
    else:
        return i


@triton.jit
def weight_chunk(
    w,
    rn,
    k: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    DIRECT: tl.constexpr = 0,
):
    """Chunk k of the rows rn of w (H, H): (WARPS, BLOCK_N, BLOCK_K / WARPS)."""
    PART: tl.constexpr = BLOCK_K // WARPS
    i = in_order(tl.arange(0, PART), DIRECT)
    rk = k * BLOCK_K + tl.arange(0, WARPS)[:, None, None] * PART + i[None, None, :]
    return tl.load(w + rn[None, :, None] * H + rk, mask=(rk < H) & (rn[None, :, None] < H), other=0.0)


@triton.constexpr_function
def fetch_code(bits):
    """A vector of 16 bytes, or zeros; of the elements of a word the first one's operands are taken."""
    share = 32 // bits
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return (
        f"{{ .reg .pred p; {zeros} setp.ne.b32 p, ${4 + share}, 0; "
        "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )


@triton.constexpr_function
def fetch_operands(bits):
    return ",".join(["=&r"] * 4 + ["l"] * (32 // bits) + ["r"] * (32 // bits))


@triton.constexpr_function
def held_chunks(BLOCK_N, BLOCK_K, WARPS, bits, PRECISION, DIRECT, limit):
    """Chunks of the weight that stay in registers: as the product wants them, at most `limit` a thread."""
    words = BLOCK_N * (BLOCK_K // WARPS) * bits // 1024 * (2 if PRECISION == "tf32x3" else 1)
    return limit // words if DIRECT else 0


@triton.jit
def held_chunk(
    w, rn, k: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr
):
    """weight_chunk in the product's own layout, as poll's state."""
    dtype: tl.constexpr = w.dtype.element_ty
    PART: tl.constexpr = BLOCK_K // WARPS
    SIZE: tl.constexpr = dtype.primitive_bitwidth
    SHARE: tl.constexpr = 32 // SIZE
    VECTORS: tl.constexpr = PART * SIZE // 512
    v = tl.arange(0, VECTORS * SHARE)[None, :, None, None, None] // SHARE * 4
    v += tl.arange(0, 4)[None, None, None, None, :]
    rk = k * BLOCK_K + tl.arange(0, WARPS)[None, None, :, None, None] * PART + v * (128 // SIZE)
    n = tl.arange(0, BLOCK_N // 8)[:, None, None, None, None] * 8
    n += tl.program_id(0) * BLOCK_N + tl.arange(0, 8)[None, None, None, :, None]
    ok = ((rk < H) & (n < H)).to(tl.int32)
    E = tl.core.get_int_dtype(SIZE, True)
    words = tl.inline_asm_elementwise(
        fetch_code(SIZE),
        fetch_operands(SIZE),
        [(w + n * H + rk).to(tl.int64), ok],
        [E, E, E, E],
        is_pure=True,
        pack=SHARE,
    )
    x = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
    x = tl.reshape(x, (BLOCK_N // 8, VECTORS, SHARE, WARPS, 8, 4, 2, 2))
    x = tl.reshape(tl.permute(x, (3, 0, 4, 1, 7, 5, 6, 2)), (WARPS, BLOCK_N, PART))
    return x.to(dtype, bitcast=True)


@triton.jit
def chunks_on_chip(
    w,
    rn,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STREAMED: tl.constexpr,
    SIZE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The chunks of the rows rn of w (H, H) that stay on chip, in registers first. SIZE: bits an element."""
    ws = ()
    for k in tl.static_range((H + BLOCK_K - 1) // BLOCK_K - STREAMED):
        if k < held_chunks(BLOCK_N, BLOCK_K, WARPS, SIZE, PRECISION, DIRECT, HELD):
            chunk = held_chunk(w, rn, k, H, BLOCK_N, BLOCK_K, WARPS)
        else:
            chunk = weight_chunk(w, rn, k, H, BLOCK_K, WARPS, DIRECT)
        ws += (operand(chunk, PRECISION, INTERPRET),)
    return ws


@triton.jit
def look(
    rows,
    ok,
    K0: tl.constexpr,
    CHUNKS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    FLAG: tl.constexpr,
):
    """CHUNKS chunks (WARPS, BLOCK_K / WARPS, BLOCK_B) from K0 of the rows at `rows` (BLOCK_B,), past L1."""
    PART: tl.constexpr = BLOCK_K // WARPS
    chunks = ()
    for k in tl.static_range(K0, K0 + CHUNKS):
        if k * BLOCK_K < H:
            rk = k * BLOCK_K + tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
            mask = ok[None, None, :] & (rk < H)
            if FLAG:
                chunks += (tl.load(rows[None, None, :] + rk, mask=mask, other=0, volatile=True),)
            else:
                chunks += (tl.load(rows[None, None, :] + rk, mask=mask, other=0.0, cache_modifier=".cg"),)
    return chunks


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def empty(chunks, awaited, EMPTY: tl.constexpr, INTERPRET: tl.constexpr):
    """How many of the awaited rows' elements nobody has written yet.

    Of a value below 2 the highest bit of the exponent is zero, so most often one look at all bits together
    says that nothing is empty.
    """
    missing = 1
    if not INTERPRET:
        bits = chunks[0]
        for k in tl.static_range(1, len(chunks)):
            bits |= chunks[k]
        bits = tl.reduce(bits, None, _or)
        missing = (bits.to(tl.int32) >> (bits.dtype.primitive_bitwidth - 2)) & 1
    if missing > 0:
        count = ((chunks[0] == EMPTY) & awaited[None, None, :]).to(tl.int32)
        for k in tl.static_range(1, len(chunks)):
            count += ((chunks[k] == EMPTY) & awaited[None, None, :]).to(tl.int32)
        missing = tl.sum(count)
    return missing


@triton.constexpr_function
def poll_code(chunks, vectors, bits):
    """Looks at a thread's vectors of 16 bytes until none of them has an element that nobody has written.

    Operands: 4 words of each vector, by chunk, then by place in the vector; the vectors' addresses; how often
    to look at each at most, 0 for once, waiting for nothing, -1 for not at all (zeros); and the status. Who
    has looked in vain, or finds every 64 looks that somebody has, sets the status and leaves what is
    unwritten, a NaN, in its place.
    """
    each = 32 // bits  # elements a word, which share a vector
    total = chunks * vectors * each
    words = 4 * chunks * vectors
    numbers = range(chunks * vectors)
    parts = [[f"${(4 * (v // vectors) + i) * vectors + v % vectors}" for i in range(4)] for v in numbers]
    address = [f"${words + v * each}" for v in numbers]
    most = [f"${words + total + v * each}" for v in numbers]
    status = f"${words + 2 * total}"
    code = ["{ .reg .pred q, more, late; .reg .b32 n, t, u; .reg .b64 s;"]
    code += [f".reg .pred m{v};" for v in numbers]
    code += [f"mov.b32 ${w}, 0;" for w in range(words)]
    code += [f"setp.ge.s32 m{v}, {most[v]}, 0;" for v in numbers]
    code += ["mov.b32 n, 0;", "LOOK:"]
    for v in numbers:
        code += [f"@m{v} ld.volatile.global.v4.b32 {{{', '.join(parts[v])}}}, [{address[v]}];"]
    # Of a value below 2 the highest bit of the exponent is zero: most often one test of all together will do.
    code += ["mov.b32 t, 0;", *(f"or.b32 t, t, ${w};" for w in range(words))]
    code += [f"and.b32 t, t, {0x40004000 if bits == 16 else 0x40000000};"]
    code += ["setp.eq.b32 q, t, 0;", "@q bra DONE;", "add.u32 n, n, 1;"]
    code += ["setp.ne.b32 more, n, n;", "setp.ne.b32 late, n, n;"]
    for v in numbers:
        w = parts[v]
        if bits == 16:  # a half of w that is all ones borrows from the bit above ~w's half, which is 0
            code += ["mov.b32 t, 0;"]
            for x in w:
                code += [f"sub.u32 u, {0xFFFEFFFE}, {x};", f"and.b32 u, u, {x};", "or.b32 t, t, u;"]
            code += [f"and.b32 t, t, {0x80008000};", "setp.ne.b32 q, t, 0;"]
        else:
            code += [f"max.u32 t, {w[0]}, {w[1]};", f"max.u32 u, {w[2]}, {w[3]};", "max.u32 t, t, u;"]
            code += ["setp.eq.b32 q, t, -1;"]
        code += [f"setp.lt.and.s32 m{v}, n, {most[v]}, q;", f"or.pred more, more, m{v};"]
        code += [f"setp.eq.and.s32 q, n, {most[v]}, q;", "or.pred late, late, q;"]
    code += ["@late bra LATE;", "@!more bra DONE;"]
    code += ["and.b32 t, n, 63;", "setp.ne.b32 q, t, 0;", "@q bra LOOK;"]
    code += [f"ld.volatile.global.b64 s, [{status}];", "setp.eq.s64 q, s, 0;", "@q bra LOOK;"]
    code += ["LATE:", "mov.b64 s, 1;", f"st.volatile.global.b64 [{status}], s;"]
    code += ["DONE:", "bar.warp.sync -1;", "}"]
    return "\n".join(code)


@triton.constexpr_function
def poll_operands(chunks, vectors, bits):
    total = vectors * 32 // bits
    operands = ["=&r"] * (4 * chunks * vectors) + (["l"] * chunks + ["r"] * chunks) * total
    operands.sort(key=["=&r", "l", "r"].index)
    return ",".join(operands + ["l"] * total)


@triton.jit
def poll(
    rows,
    ok,
    awaited,
    status,
    patience,
    K0: tl.constexpr,
    CHUNKS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    BITS: tl.constexpr,
):
    """receive's chunks by flags, each thread waiting for what it multiplies alone: in in_order's order.

    A thread's vectors are the first axis; the others are dealt out to warps and lanes as the compiler deals
    out any tile of this shape, which is how the product wants its right operand: nothing is exchanged.
    """
    PART: tl.constexpr = BLOCK_K // WARPS
    SIZE: tl.constexpr = BITS.primitive_bitwidth
    SHARE: tl.constexpr = 32 // SIZE  # elements a word
    NK: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    N: tl.constexpr = min(CHUNKS, NK - K0)
    VECTORS: tl.constexpr = PART * SIZE // 512
    row = rows.to(tl.int64)[None, None, :, None]
    most = tl.where(ok, tl.where(awaited, patience, 0), -1)[None, None, :, None]
    vector = (
        tl.arange(0, VECTORS * SHARE)[:, None, None, None] // SHARE * 4 + tl.arange(0, 4)[None, None, None, :]
    )
    warp = tl.arange(0, WARPS)[None, :, None, None]
    where = ()
    often = ()
    E = tl.core.get_int_dtype(SIZE, True)
    for k in tl.static_range(K0, K0 + N):
        rk = k * BLOCK_K + warp * PART + vector * (128 // SIZE)
        where += (row + (rk * (SIZE // 8)).to(tl.int64),)
        often += (tl.where(rk < H, most, -1),)
    word = (status.to(tl.int64) + tl.zeros((VECTORS * SHARE, WARPS, BLOCK_B, 4), tl.int64),)
    CODE: tl.constexpr = poll_code(N, VECTORS, SIZE)
    OPERANDS: tl.constexpr = poll_operands(N, VECTORS, SIZE)
    PACK: tl.constexpr = VECTORS * SHARE
    operands = where + often + word
    if N == 1:
        words = tl.inline_asm_elementwise(CODE, OPERANDS, operands, [E, E, E, E], is_pure=True, pack=PACK)
    elif N == 2:
        words = tl.inline_asm_elementwise(
            CODE, OPERANDS, operands, [E, E, E, E, E, E, E, E], is_pure=True, pack=PACK
        )
    elif N == 3:
        words = tl.inline_asm_elementwise(
            CODE, OPERANDS, operands, [E, E, E, E, E, E, E, E, E, E, E, E], is_pure=True, pack=PACK
        )
    else:
        tl.static_assert(N == 4)
        words = tl.inline_asm_elementwise(
            CODE,
            OPERANDS,
            operands,
            [E, E, E, E, E, E, E, E, E, E, E, E, E, E, E, E],
            is_pure=True,
            pack=PACK,
        )
    chunks = ()
    for k in tl.static_range(N):
        x = tl.join(tl.join(words[4 * k], words[4 * k + 1]), tl.join(words[4 * k + 2], words[4 * k + 3]))
        x = tl.reshape(x, (VECTORS, SHARE, WARPS, BLOCK_B, 4, 2, 2))
        chunks += (tl.reshape(tl.permute(x, (2, 0, 6, 4, 5, 1, 3)), (WARPS, PART, BLOCK_B)),)
    return chunks


@triton.jit
def receive(
    rows,
    ok,
    awaited,
    count,
    target,
    status,
    patience,
    K0: tl.constexpr,
    CHUNKS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    FLAG: tl.constexpr,
    BITS: tl.constexpr,
    EMPTY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """CHUNKS chunks from K0 of the rows that are ok, once the awaited are complete, and the patience left.

    flag: of elements, as BITS. counter: once `count` has reached target.
    """
    looks = 0
    if FLAG:
        bits = rows.to(tl.pointer_type(BITS), bitcast=True)
        missing = 1
        chunks = ()
        for k in tl.static_range(K0, K0 + CHUNKS):
            if k * BLOCK_K < H:
                chunks += (tl.zeros((WARPS, BLOCK_K // WARPS, BLOCK_B), BITS),)
        while (missing > 0) & (looks < patience):
            chunks = look(bits, ok, K0, CHUNKS, H, BLOCK_K, WARPS, FLAG)
            missing = empty(chunks, awaited, EMPTY, INTERPRET)
            looks += 1
        late = missing > 0
    else:
        late = False
        if K0 == 0:
            reached = target - 1
            while (reached < target) & (looks < patience):
                reached = tl.atomic_add(count, 0, sem="acquire", scope="gpu")
                looks += 1
            late = (reached < target) | (reached >= GAVE_UP)
        chunks = look(rows, ok, K0, CHUNKS, H, BLOCK_K, WARPS, FLAG)
    if late:
        tl.store(status, 1)  # it may be the host's
        patience = 0
    return chunks, patience


@triton.jit
def send(
    pointers,
    tile,
    mask,
    count,
    patience,
    FLAG: tl.constexpr,
    BITS: tl.constexpr,
    EMPTY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Stores a tile where the others look for it."""
    if FLAG:
        OTHER: tl.constexpr = (1 << (BITS.primitive_bitwidth - 1)) - 1  # a NaN of the other sign
        bits = tile.to(BITS, bitcast=True)
        bits = tl.where(bits == EMPTY, tl.full(bits.shape, OTHER, BITS), bits)
        elements.store(pointers.to(tl.pointer_type(BITS), bitcast=True), bits, mask, INTERPRET, PAST_L1=True)
    else:
        elements.store(pointers, tile, mask, INTERPRET, PAST_L1=True)
        tl.debug_barrier()  # the release is one thread's: it must come after all threads' stores
        tl.atomic_add(count, tl.where(patience > 0, 1, GAVE_UP), sem="release", scope="gpu")


@triton.constexpr_function
def places(BLOCK_N, BLOCK_B, WARPS, INTERPRET):
    """The shape of a program's tile of the state as its threads have it: see sum_of_parts."""
    rows = BLOCK_N // 8 if INTERPRET else max(BLOCK_N // 8, 4 * WARPS // BLOCK_B)
    return [rows, 2, BLOCK_B // 2, 8]


@triton.jit
def columns_of(BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr):
    """The columns of a program's tile in `places`; above BLOCK_N they repeat, and are not to be stored."""
    PLACES: tl.constexpr = places(BLOCK_N, BLOCK_B, WARPS, INTERPRET)
    i = tl.arange(0, PLACES[0])[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    return tl.program_id(0) * BLOCK_N + i % BLOCK_N, i < BLOCK_N


@triton.jit
def rows_of(BLOCK_B: tl.constexpr):
    return tl.arange(0, 2)[None, :, None, None] + 2 * tl.arange(0, BLOCK_B // 2)[None, None, :, None]


@triton.jit
def sum_of_parts(acc, INTERPRET: tl.constexpr):
    """acc (WARPS, BLOCK_N, BLOCK_B), a part a warp, added up, in `places`: (BLOCK_N / 8, 2, BLOCK_B / 2, 8).

    tl.sum would go through shared memory twice and leave every warp with every sum. Here each thread fetches
    the parts of its own elements: the compiler lets a gather's result be dealt out as any tile is. The places
    are such that lanes write and read different banks of shared memory.
    """
    WARPS: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    BLOCK_B: tl.constexpr = acc.shape[2]
    SIZE: tl.constexpr = BLOCK_N * BLOCK_B
    if INTERPRET:
        x = tl.reshape(tl.sum(acc, 0), (BLOCK_N // 8, 8, BLOCK_B // 2, 2))
        return tl.permute(x, (0, 3, 2, 1))
    else:
        PLACES: tl.constexpr = places(BLOCK_N, BLOCK_B, WARPS, INTERPRET)
        THREADS: tl.constexpr = PLACES[0] * 8 * BLOCK_B
        x = tl.reshape(acc, (WARPS, BLOCK_N // 8, 8, BLOCK_B // 2, 2))
        x = tl.reshape(tl.permute(x, (0, 1, 4, 3, 2)), (WARPS * SIZE,))
        i = tl.arange(0, WARPS * THREADS)
        x = tl.gather(x, i // THREADS * SIZE + i % SIZE, 0)
        x = tl.sum(tl.reshape(x, (WARPS, THREADS)), 0)
        return tl.reshape(x, (PLACES[0], 2, BLOCK_B // 2, 8))


@triton.jit
def meet_and_multiply(
    rows,
    ok,
    awaited,
    ws,
    w,
    rn,
    count,
    target,
    status,
    patience,
    dtype: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLAG: tl.constexpr,
    BITS: tl.constexpr,
    EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    WARPS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Rows rn of w (H, H) times the state at `rows`: (BLOCK_N, BLOCK_B) in float32, and the patience left.

    ws: the chunks of w that are on chip. The others are asked for before the state, which may take its time.
    """
    acc = tl.zeros((WARPS, BLOCK_N, BLOCK_B), tl.float32)
    NK: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    for k0 in tl.static_range(0, NK, CHUNKS):
        parts = ()
        for k in tl.static_range(k0, k0 + CHUNKS):
            if k < len(ws):
                parts += (ws[k],)
            elif k < NK:
                chunk = weight_chunk(w, rn, k, H, BLOCK_K, WARPS, DIRECT)
                parts += (operand(chunk, PRECISION, INTERPRET),)
        if DIRECT:
            chunks = poll(rows, ok, awaited, status, patience, k0, CHUNKS, H, BLOCK_B, BLOCK_K, WARPS, BITS)
        else:
            chunks, patience = receive(
                rows, ok, awaited, count, target, status, patience, k0, CHUNKS,
                H, BLOCK_B, BLOCK_K, WARPS, FLAG, BITS, EMPTY, INTERPRET,
            )  # fmt: skip
        for k in tl.static_range(len(chunks)):
            chunk = operand(chunks[k].to(dtype, bitcast=True), PRECISION, INTERPRET)
            acc = dot(parts[k], chunk, acc, PRECISION, INTERPRET)
    return sum_of_parts(acc, INTERPRET), patience


@triton.jit(do_not_specialize=["T", "B", "jobs", "patience"])
def forward_kernel(
    z,
    out,
    h0,
    w_hh,
    lengths,
    resets,
    count,
    status,
    T,
    B,
    jobs,
    patience,
    z_t,
    z_b,
    out_t,
    out_b,
    H: tl.constexpr,
    RELU: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STREAMED: tl.constexpr,
    FLAG: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    EMPTY: tl.constexpr = -1
    dtype: tl.constexpr = z.dtype.element_ty
    NP: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Of a program's tile as its threads have it: columns, and below rows and their lengths.
    cn, once = columns_of(BLOCK_N, BLOCK_B, WARPS, INTERPRET)
    job = tl.program_id(1)
    while job < jobs:
        tiles = (B + BLOCK_B - 1) // BLOCK_B
        d = job // tiles
        rb = (job % tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
        cb = (job % tiles) * BLOCK_B + rows_of(BLOCK_B)
        own = row_lengths(lengths, cb, T, B, HAS_LENGTHS)
        length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
        steps = tl.max(length, 0)
        t = d * (steps - 1)
        w = w_hh + d.to(tl.int64) * H * H
        ws = chunks_on_chip(
            w, rn, H, BLOCK_N, BLOCK_K, STREAMED, BITS.primitive_bitwidth, DIRECT, PRECISION, INTERPRET, WARPS
        )
        z_tile = z + d * H + cb.to(tl.int64) * z_b + cn
        out_tile = out + d * H + cb.to(tl.int64) * out_b + cn
        rows = out + d * H + rb.to(tl.int64) * out_b
        begin = h0 + (d.to(tl.int64) * B + rb) * H
        columns = (rb[None, :] < B) & (rn[:, None] < H)
        stored = (cb < B) & (cn < H) & once
        target = tl.full([], 0, tl.int64)
        for _ in range(steps):
            live = t < length
            first = d * (length - 1) == t
            heard = live
            if HAS_RESETS:
                heard &= is_cut(resets, t + d, rb, T, B) == 0
            t64 = t.to(tl.int64)
            # On its way while the others are waited for: to convert it here would wait for it first.
            here = (t < own) & (cn < H)
            z_now = elements.load(tl.where(here, z_tile + t64 * z_t, z), INTERPRET)
            before = tl.where(first, begin, rows + (t + 2 * d - 1).to(tl.int64) * out_t)
            product, patience = meet_and_multiply(
                before, heard, heard & (first == 0), ws, w, rn, count + job, target, status, patience,
                dtype, H, BLOCK_B, BLOCK_N, BLOCK_K, CHUNKS, FLAG, BITS, EMPTY, PRECISION, INTERPRET, WARPS,
                DIRECT,
            )  # fmt: skip
            a = tl.where(t < own, z_now.to(ACC) + product, 0.0)
            h = activated(tl.where(patience > 0, a, float("nan")), RELU, dtype, INTERPRET)
            send(out_tile + t64 * out_t, h, stored, count + job, patience, FLAG, BITS, EMPTY, INTERPRET)
            t += 1 - 2 * d
            target += NP
        if HAS_LENGTHS:
            clear(rows[None, :] + rn[:, None], columns, steps, T, out_t)
        job += tl.num_programs(1)


@triton.jit(do_not_specialize=["T", "B", "jobs", "patience"])
def backward_kernel(
    g_out,
    g_hn,
    output,
    w_hh,
    dz,
    lengths,
    resets,
    count,
    status,
    T,
    B,
    jobs,
    patience,
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
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STREAMED: tl.constexpr,
    FLAG: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    EMPTY: tl.constexpr = -1
    dtype: tl.constexpr = dz.dtype.element_ty
    NP: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Of a program's tile as its threads have it: columns, and below rows and their lengths.
    cn, once = columns_of(BLOCK_N, BLOCK_B, WARPS, INTERPRET)
    job = tl.program_id(1)
    while job < jobs:
        tiles = (B + BLOCK_B - 1) // BLOCK_B
        d = job // tiles
        rb = (job % tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
        cb = (job % tiles) * BLOCK_B + rows_of(BLOCK_B)
        own = row_lengths(lengths, cb, T, B, HAS_LENGTHS)
        rb64 = rb.to(tl.int64)
        length = row_lengths(lengths, rb, T, B, HAS_LENGTHS)
        steps = tl.max(length, 0)
        t = (1 - d) * (steps - 1)
        w = w_hh + d.to(tl.int64) * H * H
        ws = chunks_on_chip(
            w, rn, H, BLOCK_N, BLOCK_K, STREAMED, BITS.primitive_bitwidth, DIRECT, PRECISION, INTERPRET, WARPS
        )
        cb64 = cb.to(tl.int64)
        g_tile = g_out + (d * H + cn).to(tl.int64) * g_h + cb64 * g_b
        out_tile = output + d * H + cb64 * out_b + cn
        dz_tile = dz + d * H + cb64 * dz_b + cn
        rows = dz + d * H + rb64 * dz_b
        columns = (rb[None, :] < B) & (rn[:, None] < H)
        stored = (cb < B) & (cn < H) & once
        if HAS_G_HN:
            end_tile = g_hn + (d * B + cb64) * H + cn
            end = elements.load(tl.where((cb < B) & (cn < H), end_tile, g_hn), INTERPRET)
        target = tl.full([], 0, tl.int64)
        for _ in range(steps):
            live = t < length
            last = (1 - d) * (length - 1) == t
            later = live & (last == 0)  # rows at their last step have no next one to hear from
            ends = (1 - d) * (own - 1) == t
            heard = (t < own) & (ends == 0)
            if HAS_RESETS:
                later &= is_cut(resets, t + 1 - d, rb, T, B) == 0
                heard &= is_cut(resets, t + 1 - d, cb, T, B) == 0
            t64 = t.to(tl.int64)
            here = (t < own) & (cn < H)
            # On their way while the others are waited for: to convert them here would wait for them first.
            if HAS_G_OUT:
                g_now = elements.load(tl.where(here, g_tile + t64 * g_t, g_out), INTERPRET)
            h_now = elements.load(tl.where(here, out_tile + t64 * out_t, output), INTERPRET)
            after = rows + (t + 1 - 2 * d).to(tl.int64) * dz_t
            product, patience = meet_and_multiply(
                after, later, later, ws, w, rn, count + job, target, status, patience,
                dtype, H, BLOCK_B, BLOCK_N, BLOCK_K, CHUNKS, FLAG, BITS, EMPTY, PRECISION, INTERPRET, WARPS,
                DIRECT,
            )  # fmt: skip
            product = tl.where(heard, product, 0.0)  # zeros times infinite weights are none
            if HAS_G_OUT:
                product += g_now.to(ACC)
            if HAS_G_HN:
                product += tl.where(ends, end.to(ACC), 0.0)
            g = tl.where(t < own, activate_backward(product, h_now.to(ACC), RELU), 0.0)
            g = rounded(tl.where(patience > 0, g, float("nan")), dtype, INTERPRET)
            send(dz_tile + t64 * dz_t, g, stored, count + job, patience, FLAG, BITS, EMPTY, INTERPRET)
            t += 2 * d - 1
            target += NP
        if HAS_LENGTHS:
            clear(rows[None, :] + rn[:, None], columns, steps, T, dz_t)
        job += tl.num_programs(1)


def scan(
    z: torch.Tensor,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.CooperativeConfig | None = None,
    resets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output for the input products z (T, B, D * H): z itself, written over, or with flags a new tensor.

    h0 (D, B, H), w_hh (D, H, H), all of one dtype (not float64) and device; lengths None or int64 (B,),
    1 <= length <= T. z has unit stride in its last dimension and any other strides. Rows past their length
    become zero. precision, of float32 products: "tf32", "ieee" (IEEE class: the config says how) or "tf32x3".
    resets None or bool (T, B), none of them past a row's length: where rows begin anew, so that no state
    passes, in either direction, between the step and the one before it.
    Raises ValueError where shapes, dtypes or devices disagree, Triton's RuntimeError where the programs don't
    all fit on the chip at once, and DeviceHangError where those of an earlier launch on this device waited in
    vain for one another: this launch's own are not waited for. The results of the launch that hung are NaN.
    """
    T, B, D, H = expect_sequence(z, "z", w_hh, lengths)
    expect(h0, "h0", (D, B, H), z)
    problem = problem_of(z, B, H, D, precision, ragged=lengths is not None or resets is not None)
    rows = row_arguments(lengths, resets, z)
    options = {"H": H, "HAS_LENGTHS": lengths is not None, "HAS_RESETS": resets is not None}
    options |= constants(z, nonlinearity)
    config, options = _options(z, problem, options, config)
    if 0 in (T, B, D, H):
        return z
    out = torch.empty(T, B, D * H, dtype=z.dtype, device=z.device) if config.FLAG else z
    _launch(
        forward_kernel,
        out,
        (z, out, h0.contiguous(), w_hh.contiguous(), *rows),
        (*z.stride()[:2], *out.stride()[:2]),
        problem,
        config,
        options,
    )
    return out


def scan_backward(
    g_out: torch.Tensor | None,
    g_hn: torch.Tensor | None,
    output: torch.Tensor,
    w_hh: torch.Tensor,
    dz: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    config: configs.CooperativeConfig | None = None,
    resets: torch.Tensor | None = None,
) -> None:
    """Fills dz (T, B, D * H), the gradient of the pre-activations, from those of the output and of h_n.

    g_out (T, B, D * H) with any strides (an expanded one stays expanded) or None, g_hn (D, B, H) or None,
    output (T, B, D * H) as scan left it; output and dz have unit stride in their last dimension.
    dz is zero past a row's length. The rest is as in scan.
    """
    problem, tensors, strides, options = backward_arguments(
        g_out, g_hn, output, w_hh, dz, lengths, nonlinearity, precision, resets, transposed=True
    )
    config, options = _options(dz, problem, options, config)
    if dz.numel() == 0:
        return
    _launch(backward_kernel, dz, tensors, strides, problem, config, options)


def groups(
    problem: configs.Problem, config: configs.CooperativeConfig, chip: configs.Chip
) -> tuple[int, int]:
    """(programs a group, groups): as many groups as there are jobs, or as the chip holds, a program each."""
    programs = triton.cdiv(problem.H, config.BLOCK_N)
    jobs = problem.D * triton.cdiv(problem.B, config.BLOCK_B)
    return programs, max(1, min(jobs, chip.processors // programs))


def _options(tensor, problem, options, config):
    """The config, and the options with what it and this kernel add to them."""
    if tensor.dtype == torch.float64:
        raise ValueError(
            "dtype torch.float64 has no cooperative kernel; expected float32 or 16 bits: use step."
        )
    config = configs.checked("cooperative", config, problem, lambda: chip(tensor.device))
    bits = tl.int16 if tensor.element_size() == 2 else tl.int32
    return config, {**options, **vars(config), "WARPS": config.num_warps, "BITS": bits}


def _launch(kernel, buffer, tensors, strides, problem, config, options) -> None:
    """Launches a kernel that passes the state on through `buffer`; who gives up says so in the status word.

    On a GPU nothing waits for that word: `check` reads it at the next launch. ELMAN_SYNC=1 waits.
    """
    if buffer.is_cuda:
        check(buffer.device)
    T, B, _ = buffer.shape
    programs, number = groups(problem, config, chip(buffer.device))
    jobs = problem.D * triton.cdiv(B, config.BLOCK_B)
    options = {**options, "DIRECT": _direct(buffer, tensors, problem, config)}
    with on_device(buffer):
        if config.FLAG:
            buffer.view(torch.int16 if buffer.element_size() == 2 else torch.int32).fill_(-1)
        launched = programs, T, problem, config
        status = _status(buffer.device)
        if buffer.is_cuda:
            _launched[buffer.device.index] = launched
        # What counts is aligned as any tensor is: Triton compiles anew for a pointer that is aligned less.
        count = status if config.FLAG else torch.zeros(jobs, dtype=torch.int64, device=buffer.device)
        _run(kernel, (programs, number), (*tensors, count, status, T, B, jobs, PATIENCE, *strides), options)
        if not buffer.is_cuda and status[0].item():
            raise DeviceHangError(_about(*launched))
        waits = buffer.is_cuda and os.environ.get("ELMAN_SYNC") == "1"
        if waits and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
            check(buffer.device)


def _about(programs, T, problem, config) -> str:
    return (
        f"a group of {programs} programs waited in vain for one of its own and gave up after "
        f"{PATIENCE} looks: {T} steps of {problem} with {config}. The results are thrown away. A "
        "debugger that holds a program does this; if none did, report it, and take 'triton:step'."
    )


#: A word a device, in the host's memory, where a launch that gives up says so; and what was launched last.
_words: dict[int, torch.Tensor] = {}
_launched: dict[int, tuple] = {}


def _status(device: torch.device) -> torch.Tensor:
    # "cpu" in so many words: the default device, which torch.set_default_device sets, may be another.
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int64, device="cpu")
    if device.index not in _words:
        if not _words:
            atexit.register(_at_exit)
        _words[device.index] = torch.zeros(2, dtype=torch.int64, device="cpu").pin_memory()
    return _words[device.index]


def _at_exit() -> None:
    """The last launches' word, for which no call came any more."""
    for index in list(_words):
        torch.cuda.synchronize(index)
        try:
            check(torch.device("cuda", index))
        except DeviceHangError as error:  # nobody is there to catch it
            print(f"elman: {error}", file=sys.stderr)


def check(device: torch.device) -> None:
    """Raises DeviceHangError, once, if an earlier launch on the device is known by now to have given up."""
    word = _words.get(device.index)
    if word is not None and word[0].item():
        word.zero_()
        raise DeviceHangError(
            f"In an earlier launch, perhaps the last one, {_about(*_launched[device.index])}"
        )


def _direct(buffer, tensors, problem, config) -> int:
    """The bits of an element where threads can poll by 16 bytes what they multiply, else 0."""
    if INTERPRETED or torch.version.hip or not configs.polls_directly(config, problem):
        return 0
    size = buffer.element_size()
    places = [t.data_ptr() for t in (buffer, *tensors[2:4])] + [n * size for n in buffer.stride()[:2]]
    return 0 if any(n % 16 for n in places) else 8 * size


def _run(kernel, grid: tuple[int, int], arguments: tuple, options: dict) -> None:
    if not INTERPRETED:
        options = options | launch_options() | {"launch_cooperative_grid": True}
    elif grid[0] > 1:
        raise ValueError(
            f"H = {options['H']} with BLOCK_N = {options['BLOCK_N']} takes {grid[0]} programs at once, and "
            "the interpreter runs one after another; take a BLOCK_N of at least H."
        )
    launch(kernel, grid, arguments, options)
