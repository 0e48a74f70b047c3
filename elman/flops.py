"""The floating-point operations of the operators in ops.py, for torch.utils.flop_counter."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def tell_counters() -> None:
    """Gives the formulas to torch, for counters to come, and to every FlopCounterMode that is on.

    Both, as a counter copies the formulas that torch has when it is made. Not at import alone, as
    torch.utils.flop_counter may be imported later, and we don't import it: it imports Triton.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    counting.flop_registry.update(_FORMULAS)
    for mode in _get_current_dispatch_mode_stack():
        counter: Any = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):
            counter.flop_registry.update(_FORMULAS)


def _layer(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Any, **__: Any) -> int:
    D, H, I = w_ih.shape
    return 2 * math.prod(x.shape[:-1]) * D * H * (I + H)


def _layer_dz(
    g_out: Tensor | None, g_hn: Tensor | None, output: Tensor, w_hh: Tensor, counts: Any, *_: Any, **__: Any
) -> int:
    D, H, _H = w_hh.shape
    rows = output.shape[1] if output.dim() == 3 else int(counts[0])
    return 2 * (output.numel() // (D * H) - rows) * D * H * H  # after its last step a row has none


def _layer_products(
    dz: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, output: Tensor, *rest: Any, **_: Any
) -> int:
    D, H, I = w_ih.shape
    needs, steps = rest[2], math.prod(x.shape[:-1])
    products = (steps * I, h0.shape[1] * H, steps * I, steps * H)  # of x, h0, w_ih, w_hh
    return 2 * D * H * sum(n for n, needed in zip(products, needs, strict=False) if needed)


_FORMULAS = {
    torch.ops.elman.layer: _layer,
    torch.ops.elman.layer_dz: _layer_dz,
    torch.ops.elman.layer_products: _layer_products,
}
