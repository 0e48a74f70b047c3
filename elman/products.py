"""Products over a whole sequence, which every backend and the backward pass of ops.py share.

    project             W_ih x + b for all steps at once
    product             a w^T + bias
    sums_of_products    a^T b over all rows: the gradients of the weights

They are the vendor's library's work: cuBLAS on a GPU; on a CPU MKL, as in nn.RNN, or oneDNN where that is
faster, see `_onednn_pays`; those of a few hundred rows native makes itself. What is written out here is how a
sum is split, so that no error exceeds 1.5 times nn.RNN's.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# The operators that torch.compile itself uses for linear layers on x86, and the one behind the derivative of
# torch's own mkldnn_linear.
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
)
if HAS_ONEDNN:
    LINEAR = torch.ops.mkldnn._linear_pointwise.default
    _LINEAR_ADD = torch.ops.mkldnn._linear_pointwise.binary
    _WEIGHTS = torch.ops.aten.mkldnn_linear_backward_weights.default

ROWS = 128  # fewer do not repay the copies of the weights that oneDNN makes
# oneDNN adds up to 512 products and more one after another, which rounds up to twice as much as nn.RNN does.
# So many in one sum keep it within the 1.5 times that a backend may have: of W_ih's products, and of a
# weight's gradient over few steps.
LONGEST = 288
LONGEST_GRADIENT = 224

# Rows in one sum of a weight's gradient by MKL: T of them, in B sums, where nn.RNN adds up B rows T times.
# In both the longest chain of additions has T + B links, and terms of random sign lose 0.14 sqrt(T + B) of
# float32's eps. Below 64 rows the calls cost more than the sums; above 256 the library cuts them itself.
SHORTEST_SUM = 64
LONGEST_SUM = 256


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
    return [_sum_by_parts(a, b, longest) for b in others]


def _sum_by_parts(a: Tensor, b: Tensor, longest: int) -> Tensor:
    """a^T b as the sum of products of at most `longest` rows.

    MKL cuts long sums too, but at another length on each maker's processors. Small results are made in one
    call, a batch of products. Many calls cost more, on a busy machine far more: each, however small, waits
    until all of its threads have had their turn, 8 ms on two cores that other programs share. Large results
    are added to in place, because a batch of them leaves the cache.
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
        return total + a[rest].t() @ b[rest] if traced or count * n < N else total
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
