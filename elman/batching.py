"""torch.vmap of the operators in ops.py: a batch of V calls becomes one with V times the rows.

Where the weights differ, or the sizes of packed rows, it becomes V calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def layer(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
    """torch.vmap of elman::layer: more rows in one call, or, where the weights differ, a call for each."""
    rule = _Rule(torch.ops.elman.layer, info.batch_size, in_dims, arguments)
    x, h0, *weights, counts, resets = range(7)
    if rule.is_batched(*weights) or (rule.is_packed(x) and rule.is_batched(counts)):
        return rule.one_by_one()
    return rule.as_rows((x, h0), counts, resets, packed=rule.is_packed(x))


def layer_dz(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
    """torch.vmap of elman::layer_dz, likewise."""
    rule = _Rule(torch.ops.elman.layer_dz, info.batch_size, in_dims, arguments)
    g_out, g_hn, output, w_hh, counts, resets = range(6)
    if rule.is_batched(w_hh) or (rule.is_packed(output) and rule.is_batched(counts)):
        return rule.one_by_one()
    return rule.as_rows((g_out, g_hn, output), counts, resets, packed=rule.is_packed(output))


class _Rule:
    """How a batch of V calls of an operator becomes one, or V."""

    def __init__(self, operator: Any, V: int, in_dims: tuple, arguments: tuple) -> None:
        self.operator, self.V, self.in_dims, self.arguments = operator, V, in_dims, arguments

    def is_batched(self, *positions: int) -> bool:
        return any(self.in_dims[i] is not None for i in positions)

    def is_packed(self, i: int) -> bool:
        """Whether a sequence, padded (T, B, K) or packed (N, K), is packed."""
        return self.arguments[i].dim() - self.is_batched(i) == 2

    def one_by_one(self) -> tuple[Any, Any]:
        results = [self.operator(*self._call(v)) for v in range(self.V)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    def _call(self, v: int) -> list[Any]:
        pairs = zip(self.arguments, self.in_dims, strict=True)
        return [a if dim is None else a.select(dim, v) for a, dim in pairs]

    def as_rows(self, rows: tuple[int, ...], counts: int, resets: int, packed: bool) -> tuple[Any, Any]:
        """Each row becomes V rows side by side, so that rows that are sorted by length stay so."""
        arguments = list(self.arguments)
        for i in rows:
            arguments[i] = self._beside(i, -2)
        arguments[resets] = self._beside(resets, -1)
        if packed:
            arguments[counts] = self.arguments[counts] * self.V
        else:
            arguments[counts] = self._beside(counts, -1)
        results = self.operator(*arguments)
        if isinstance(results, Tensor):
            return results.unflatten(-2, (-1, self.V)), results.dim() - 1
        apart = tuple(r.unflatten(-2, (-1, self.V)) for r in results)
        return apart, tuple(r.dim() - 1 for r in results)

    def _beside(self, i: int, at: int) -> Tensor | None:
        """An argument whose dimension before `at` is the rows: V of each, next to one another."""
        tensor, dim = self.arguments[i], self.in_dims[i]
        if tensor is None:
            return None
        if dim is None:
            shape = list(tensor.unsqueeze(at).shape)
            shape[at] = self.V
            tensor = tensor.unsqueeze(at).expand(shape)
        else:
            tensor = tensor.movedim(dim, at)
        return tensor.flatten(at - 1, at)
