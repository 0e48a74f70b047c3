"""Is it right? Every contender's results against the float64 reference, before anything is timed.

    error = ||own - ref|| / ||ref||        over all elements of one quantity

The quantities are the output, h_n and, but for the forward pass, the gradients of x, h0 and every
parameter under random upstream gradients of both results. The bar is 1.5 times nn.RNN's own
error, or the rounding floor where that is higher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 1.5

PARAMETER_GRADIENTS = ("d weight", "d bias")

# nn.RNN and the reference that disagree by more than this do not compute the same function, and then
# nn.RNN is no yardstick. Rounding alone stays far below it in every dtype (bfloat16: about 0.01).
SANE = 0.1


def floor(name: str, steps: int, dtype: torch.dtype) -> float:
    """The error below which two results differ by the luck or the order of rounding, not by quality.

    Three parts. A correctly rounded result may be off by eps / 2 of its storage dtype. Behind it are
    sums in float32 (float64 for float64) whose order nobody fixes: 2 eps, which is what the two least
    exact quantities of nn.RNN itself come to at H = 64, and lets a vector of 64 numbers be unlucky. And
    a parameter's gradient is a sum over T steps: added up one step after another, terms of random sign
    lose 0.14 sqrt(T) eps (rms; 4.5 eps at T = 1024). nn.RNN adds W_hh's and b_hh's that way and W_ih's
    and b_ih's in one product, so that for two gradients that are equal by mathematics, b_ih's and
    b_hh's, its own errors were measured as 1.3 and 6.3 eps (B=8 T=1024 H=64). Both ways are honest.

    In float64 the reference is no better than what is compared with it, so all of that counts twice.

    In float32 that is 3e-7, and 8e-7 for a parameter's gradient over 1024 steps; a real mistake (one
    step missing, a product in TF32) is 1e-4 and more.
    """
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    sequential = 0.14 * math.sqrt(steps) if name.startswith(PARAMETER_GRADIENTS) else 0.0
    sides = 2 if dtype == torch.float64 else 1
    return sides * (torch.finfo(dtype).eps / 2 + (2 + sequential) * eps)


def kinks(own: Tensor, ref: Tensor) -> float:
    """The share of the states that are on the other side of relu's kink than the truth's.

    A state that is zero but for rounding may come out as zero or not, and its gradient is then passed on or
    not: an error of one whole element, which says nothing of the arithmetic.
    """
    return ((own > 0) != (ref > 0)).double().mean().item()


def errors(results: Mapping[str, Tensor | None], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each result against the truth of the same name; NaN or inf if not finite."""
    measured = {}
    for name, own in results.items():
        ref = truth[name]
        if own is None:
            raise ValueError(f"{name} is missing: expected a tensor of shape {tuple(ref.shape)}.")
        if own.shape != ref.shape:
            raise ValueError(f"{name} has shape {tuple(own.shape)}, expected {tuple(ref.shape)}.")
        measured[name] = ((own.double() - ref).norm() / ref.norm()).item()
    return measured


@dataclass
class Verdict:
    """The quantity nearest to its bar (or furthest above it), and the objection to it, if any."""

    worst: str
    objection: str | None


def judge(
    own: Mapping[str, float],
    baseline: Mapping[str, float],
    steps: int,
    dtype: torch.dtype,
    kinks: float = 0.0,
) -> Verdict:
    """May these errors be timed, given nn.RNN's own on the same problem of `steps` steps in `dtype`?

    kinks: the share of states that `kinks` counts, as far as it is above nn.RNN's (whose error has its own
    in it): such a share of wholly wrong elements is a relative error of its root. The gradients' bars are
    raised by three times that, as one gradient may be less lucky than all together; no other bar is moved.
    """
    bars = {name: max(FACTOR * baseline[name], floor(name, steps, dtype)) for name in own}
    for name in own:
        if name.startswith("d "):
            bars[name] += 3 * math.sqrt(kinks)
    share = {name: own[name] / bars[name] for name in own}
    worst = max(share, key=lambda name: share[name] if math.isfinite(share[name]) else math.inf)
    error, yardstick, bar = own[worst], baseline[worst], bars[worst]
    objection = None
    if not math.isfinite(error):
        objection = f"{worst} is not finite."
    elif not yardstick <= SANE:  # written so that NaN is caught too
        objection = (
            f"nn.RNN's own error of {worst} against the float64 reference is {yardstick:.1e}; above {SANE} "
            f"it is no yardstick."
        )
    elif error > bar:
        objection = (
            f"The error of {worst} against the float64 reference is {error:.1e}, nn.RNN's own is "
            f"{yardstick:.1e}; at most {bar:.1e} is allowed."
        )
    return Verdict(worst, objection)
