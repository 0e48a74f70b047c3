"""Small Triton kernels with known answers, for the emulator's tests."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def dot_kernel(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr,
    TA: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    rm, rn = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    if TA:
        x = tl.load(a + rm + tl.arange(0, K)[None, :] * M)
    else:
        x = tl.load(a + rm * K + tl.arange(0, K)[None, :])
    if TB:
        y = tl.load(b + tl.arange(0, K)[:, None] + rn * K)
    else:
        y = tl.load(b + tl.arange(0, K)[:, None] * N + rn)
    tl.store(c + rm * N + rn, tl.dot(x, y, input_precision=P, out_dtype=ACC))


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr = 1
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    rn = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(a + rm * K + rk[None, :], mask=(rm < M) & (rk[None, :] < K), other=0.0)
        y = tl.load(b + rk[:, None] * N + rn, mask=(rk[:, None] < K) & (rn < N), other=0.0)
        if SCALE != 1:  # wgmma takes what has been computed from registers
            x = (x * SCALE).to(x.dtype)
        acc = tl.dot(x, y, acc)
    tl.store(c + rm * N + rn, acc.to(c.dtype.element_ty), mask=(rm < M) & (rn < N))


@triton.jit
def sums_kernel(x, rows, cols, total, M: tl.constexpr, N: tl.constexpr):
    rm, rn = tl.arange(0, M), tl.arange(0, N)
    t = tl.load(x + rm[:, None] * N + rn[None, :])
    tl.store(rows + rm, tl.sum(t, 1))
    tl.store(cols + rn, tl.max(t, 0))
    tl.store(total, tl.sum(t))


@triton.jit
def transpose_kernel(x, y, M: tl.constexpr, N: tl.constexpr):
    rm, rn = tl.arange(0, M), tl.arange(0, N)
    t = tl.load(x + rm[:, None] * N + rn[None, :])
    tl.store(y + rn[:, None] * M + rm[None, :], tl.trans(t))


@triton.jit
def softmax_kernel(x, y, N: tl.constexpr):
    r = tl.program_id(0) * N + tl.arange(0, N)
    t = tl.load(x + r).to(tl.float32)
    e = tl.exp(t - tl.max(t, 0))
    tl.store(y + r, (e / tl.sum(e, 0)).to(y.dtype.element_ty))


@triton.jit
def scan_kernel(x, y, N: tl.constexpr):
    r = tl.arange(0, N)
    tl.store(y + r, tl.cumsum(tl.load(x + r), 0))


@triton.jit
def count_kernel(out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK) % 7, tl.arange(0, BLOCK))


@triton.jit
def integers_kernel(x, y, q, r, s, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(q + i, a // b)
    tl.store(r + i, a % b)
    tl.store(s + i, (a >> (b & 15)) ^ (a << (b & 7)) | (a & b))


@triton.jit
def pass_on_kernel(x, count, out, RELEASE: tl.constexpr, BLOCK: tl.constexpr):
    """Program 0 writes x, the others wait for it."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(x + i, i)
        tl.debug_barrier()
        tl.atomic_add(count, 1, sem="release" if RELEASE else "relaxed", scope="gpu")
    else:
        seen = 0
        while seen == 0:
            seen = tl.atomic_add(count, 0, sem="acquire", scope="gpu")
        tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(x + i, cache_modifier=".cg"))


@triton.jit
def collide_kernel(x):
    tl.store(x + tl.arange(0, 32), tl.program_id(0))


@triton.jit
def peek_kernel(x, out, n, BLOCK: tl.constexpr):
    """Program 1 reads what program 0 writes, and stores it where there are n elements."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(x + i, i)
    else:
        tl.store(out + i, tl.load(x + i), mask=i < n)


@triton.jit
def unknown_kernel(x):
    """An instruction that no kernel of the project has."""
    i = tl.arange(0, 32)
    y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [tl.load(x + i)], tl.float32, True, 1)
    tl.store(x + i, y)
