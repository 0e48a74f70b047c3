"""Packed batches of rows that differ in length, laid out as a PackedSequence's data.

(N, K): the first steps of all B rows, then the second steps of those that have one, and so on; the longest
rows come first. sizes, int64 (T,) on the CPU, is how many rows have each step: N is their sum, B the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def from_padded(x: Tensor, lengths: Tensor) -> tuple[PackedSequence, Tensor]:
    """x (T, B, K), whose rows have `lengths` in any order, packed; and `places`, as `pack` takes them."""
    T, B, _ = x.shape
    ordered, order = lengths.sort(descending=True, stable=True)
    there = steps(ordered, T)
    places = (torch.arange(0, T * B, B, device=x.device)[:, None] + order)[there]
    sizes = there.sum(1).cpu()
    return PackedSequence(pack(x, places), sizes[sizes > 0], order, order.argsort()), places


def steps(lengths: Tensor, T: int) -> Tensor:
    """Whether each row has each of T steps, (T, B)."""
    return torch.arange(T, device=lengths.device)[:, None] < lengths


def places(sizes: Tensor, B: int) -> Tensor:
    """Where in T * B the steps of a packed batch belong, its rows staying in their order."""
    return (torch.arange(B, device=sizes.device) < sizes[:, None]).flatten().nonzero().squeeze(1)


def pack(x: Tensor, places: Tensor) -> Tensor:
    """Of x (T, B, K) the steps at `places` in T * B, (N, K)."""
    return x.flatten(0, 1).index_select(0, places)


def pad(data: Tensor, places: Tensor, T: int, B: int) -> Tensor:
    """The opposite of `pack`, with zeros elsewhere."""
    zeros = data.new_zeros(T * B, *data.shape[1:])
    return zeros.index_copy_(0, places, data).unflatten(0, (T, B))


def padded(sizes: Tensor, B: int, data: Tensor, *more: Tensor | None) -> tuple[list[Any], Tensor, Tensor]:
    """The packed tensors (N, ...) padded, on their device their rows' lengths, and `places`."""
    at = places(sizes, B).to(data.device)
    found = [None if t is None else pad(t, at, sizes.shape[0], B) for t in (data, *more)]
    return found, lengths(sizes, B).to(data.device), at


def lengths(sizes: Tensor, B: int) -> Tensor:
    """The rows' lengths (B,)."""
    return sizes.shape[0] - torch.searchsorted(
        sizes.flip(0), torch.arange(B, device=sizes.device), right=True
    )


def last(sizes: Tensor, B: int) -> Tensor:
    """Where in N each row's last step is, (B,)."""
    return (sizes.cumsum(0) - sizes)[lengths(sizes, B) - 1] + torch.arange(B, device=sizes.device)


def before(sizes: Tensor, N: int, B: int) -> Tensor:
    """Where in N the step before each is, for those from the second on, (N - B,)."""
    return torch.arange(B, N, device=sizes.device) - sizes[:-1].repeat_interleave(
        sizes[1:], output_size=N - B
    )
