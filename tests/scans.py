"""A kernel's scan and scan_backward on a random problem, beside the float64 reference.

A kernel is anything that has these two: a module of kernels/, or Cooperative with blocks of one's choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import elman.reference
from tests.helpers import DEVICE, error
from tests.tolerances import tolerance


def problem(
    T: int, B: int, H: int, D: int, dtype: torch.dtype, ragged: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """z, h0, w_hh, lengths, g_out, g_hn; NaN in z and g_out past the lengths: nothing may read it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    z, h0, w_hh = scale * normal(T, B, D * H), normal(D, B, H), normal(D, H, H) / H**0.5
    g_out, g_hn = normal(T, B, D * H), normal(D, B, H)
    lengths = None
    if ragged:
        lengths = torch.tensor([(T // 2 or 1, T, 1)[b % 3] for b in range(B)])
        past = torch.arange(T)[:, None] >= lengths
        z[past] = g_out[past] = float("nan")
        lengths = lengths.to(DEVICE)
    z, h0, w_hh, g_out, g_hn = (t.to(DEVICE, dtype) for t in (z, h0, w_hh, g_out, g_hn))
    return z, h0, w_hh, lengths, g_out, g_hn


def some_resets(T: int, B: int, lengths: Tensor | None) -> Tensor:
    """Rows that begin anew now and then, before every step, and never; none past a row's length."""
    resets = torch.rand(T, B) < 0.4
    resets[:, 1::4], resets[:, 3::4] = True, False
    return resets.to(DEVICE) & (
        True if lengths is None else torch.arange(T, device=DEVICE)[:, None] < lengths
    )


def truth(
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference's output in float64, as a function of z: each direction's W_ih picks its columns of z."""
    D, H = w_hh.shape[:2]
    pick = torch.eye(D * H, dtype=torch.float64, device=z.device).view(D, H, D * H)
    wide = (z.double(), h0.double(), pick, w_hh.double())
    return elman.reference.layer(*wide, None, lengths, nonlinearity, resets)


def clean(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t with zeros past the lengths, for the reference, which takes 0 * NaN as it comes."""
    if lengths is None:
        return t
    past = torch.arange(t.shape[0], device=t.device)[:, None] >= lengths
    return t.masked_fill(past[..., None], 0.0)


class Cooperative:
    """kernels/cooperative.py with these of its blocks, the others so small that any problem fits."""

    def __init__(self, **blocks: Any) -> None:
        self._blocks = blocks

    def config(self, H: int) -> Any:
        from elman.kernels import configs

        # The interpreter runs one program after another, so a program must make all columns.
        width = 16 if DEVICE == "cuda" else max(16, 1 << (H - 1).bit_length())
        blocks = {"BLOCK_B": 16, "BLOCK_N": width, "BLOCK_K": 64, "CHUNKS": 1, "num_warps": 4, **self._blocks}
        return configs.CooperativeConfig(**blocks)

    def scan(self, z: Tensor, h0: Tensor, w_hh: Tensor, *more: Any, **options: Any) -> Tensor:
        from elman.kernels import cooperative

        return cooperative.scan(z, h0, w_hh, *more, self.config(w_hh.shape[-1]), **options)

    def scan_backward(
        self, g_out: Any, g_hn: Any, output: Tensor, w_hh: Tensor, *more: Any, **options: Any
    ) -> None:
        from elman.kernels import cooperative

        config = self.config(w_hh.shape[-1])
        cooperative.scan_backward(g_out, g_hn, output, w_hh, *more, config, **options)


def check(
    kernel: Any,
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    g_out: Tensor | None,
    g_hn: Tensor | None,
    nonlinearity: str,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one kernel against the reference; returns both results."""
    dtype, bound = z.dtype, tolerance(z.dtype)
    expected, _ = truth(clean(z, lengths), h0, w_hh, lengths, nonlinearity, resets)
    output = kernel.scan(z.clone(), h0, w_hh, lengths, nonlinearity, "ieee", resets=resets)
    assert error(output, expected) <= bound
    dz = torch.full_like(output, float("nan"))
    kernel.scan_backward(g_out, g_hn, output, w_hh, dz, lengths, nonlinearity, "ieee", resets=resets)
    # From the kernel's own output: where rounding has moved a relu across zero, the derivative jumps.
    g_o = None if g_out is None else clean(g_out, lengths).double()
    g_h = None if g_hn is None else g_hn.double()
    wide = (g_o, g_h, output.double(), w_hh.double())
    expected = elman.reference.layer_dz(*wide, lengths, nonlinearity, resets)
    assert error(dz, expected) <= bound
    if lengths is not None:
        past = torch.arange(z.shape[0], device=z.device)[:, None] >= lengths
        assert (output[past] == 0).all()
        assert (dz[past] == 0).all()
    assert output.dtype == dz.dtype == dtype
    return output, dz
