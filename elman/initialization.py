"""initialize(module): how the weights of every Elman layer in a module begin."""

from __future__ import annotations

import math
import sys
from numbers import Real

import torch
from torch import Tensor, nn

from .functional import check_option
from .layer import Elman, ElmanCell

KINDS = (Elman, ElmanCell, nn.RNN, nn.RNNCell)
RECURRENT = ("uniform", "normal", "orthogonal", "identity")

Weights = dict[str, nn.Parameter]


def initialize(
    module: nn.Module,
    recurrent: str = "orthogonal",
    *,
    radius: float | None = None,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draws the weights of every Elman layer in the module anew, in place, and returns the module.

    module: an Elman, ElmanCell, nn.RNN or nn.RNNCell, or any model with such modules inside, an
    ElmanNetwork, a Stream or your own. Every layer and both directions are drawn; nn.LSTM, nn.GRU and all
    else in a model stay as they are.

    recurrent: how each W_hh (H, H) is drawn.

    - "uniform": from U(-1/sqrt(H), 1/sqrt(H)), as nn.RNN does. Its spectral radius is near 0.58.
    - "normal": from N(0, sigma^2), sigma 1/sqrt(H) if None, which gives a spectral radius near 1
      (the circular law: J. Ginibre, Journal of Mathematical Physics 6, 1965).
    - "orthogonal": uniform among the orthogonal matrices. Every eigenvalue and every singular value has
      size 1: in a linear layer it keeps the length of every gradient (A. Saxe, J. McClelland, S. Ganguli,
      2013, arXiv 1312.6120).
    - "identity": ones on the diagonal.

    radius: each W_hh is scaled to this spectral radius, the largest absolute value of its eigenvalues;
    None: it stays as drawn. A gradient through n steps of a linear layer goes as radius^n in the long run;
    tanh and relu, whose slopes are at most 1, take away from that (R. Pascanu, T. Mikolov, Y. Bengio, 2013,
    arXiv 1211.5063; `python -m bench.gradients` measures it). For "uniform" and
    "normal" it takes the eigenvalues of each W_hh, some seconds at H = 1024
    and some minutes at H = 4096.

    sigma: the standard deviation of every W_ih, drawn from N(0, sigma^2), and of W_hh where recurrent is
    "normal" and radius None. None: W_ih is drawn from U(-1/sqrt(H), 1/sqrt(H)), as nn.RNN does.

    Biases become zero.

    generator: a torch.Generator on the CPU; None: torch's own. The numbers are drawn on the CPU in float64,
    layer by layer in the order of named_modules(), and then cast: every device and every dtype gets the same
    ones, but for its rounding. In 16 bits that moves the spectral radius too.

    Parameters stay the same objects on the same memory, with their requires_grad; an optimizer that was made
    before goes on. Its own state, and a Stream's, are left alone.

    Two recipes. The cell of a character language model, all of W_ih and W_hh from N(0, 0.01^2):

    >>> import elman
    >>> layer = elman.initialize(elman.Elman(65, 128), "normal", sigma=0.01)

    The IRNN of Q. Le, N. Jaitly and G. Hinton (2015, arXiv 1504.00941), which at first carries every state
    on unchanged:

    >>> layer = elman.initialize(elman.Elman(65, 128, nonlinearity="relu"), "identity", sigma=0.001)

    Raises TypeError for what is no nn.Module, no number or no torch.Generator. ValueError: an unknown
    `recurrent`; a radius or sigma below zero, infinite or NaN; a generator of another device; a module
    without any such layer; numbers too large for the weights' dtype; a weight that is parametrized
    (weight_norm, spectral_norm, pruning), a DTensor, on the meta device, or made in torch.inference_mode;
    a W_hh drawn so that no scale gives it the radius, such as zero. In each case every parameter is as
    it was.
    """
    if not isinstance(module, nn.Module):
        named = f"class, {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"module is a {named}; expected an nn.Module: pass the module, not its class")
    check_option("recurrent", recurrent, RECURRENT)
    _check_number("radius", radius)
    _check_number("sigma", sigma)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator or None")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}; expected one on the CPU, where the numbers are drawn: "
            "torch.Generator().manual_seed(...)"
        )
    layers = [_weights(name, inner) for name, inner in module.named_modules() if isinstance(inner, KINDS)]
    if not layers:
        raise ValueError(
            f"module is a {type(module).__name__} without any Elman, ElmanCell, nn.RNN or nn.RNNCell inside; "
            "expected at least one"
        )
    # All numbers before the first change: what can't be drawn leaves every layer as it was.
    drawn = [
        (weight, _draw(name, weight, recurrent, radius, sigma, generator))
        for layer in layers
        for name, weight in layer.items()
    ]
    with torch.no_grad():
        for weight, numbers in drawn:
            weight.copy_(numbers)
    return module


def _check_number(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number or None")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value}; expected a number from 0 up, or None")


def _weights(name: str, module: nn.Module) -> Weights:
    """The parameters of a layer or cell by their names; ValueError where one can't be written to."""
    if isinstance(module, nn.RNNBase):
        names: list[str] = module._flat_weights_names
    else:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    found = {}
    for kind in names:
        weight = module._parameters.get(kind)
        objection = _objection(weight)
        if weight is None or objection:
            raise ValueError(f"{f'{name}.{kind}' if name else kind} {objection}")
        found[kind] = weight
    return found


def _objection(weight: nn.Parameter | None) -> str:
    """Why the weight can't be written to, empty if it can."""
    if weight is None:
        return (
            "is computed from other parameters (weight_norm, spectral_norm, pruning); expected a parameter: "
            "call initialize before those"
        )
    # If that module was never imported there is no DTensor; importing it would take longer than all else.
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(weight, tensors.DTensor):
        return "is a DTensor; expected a tensor of one process: call initialize before it is distributed"
    if weight.is_meta:
        return "is on the meta device and holds no numbers; call module.to_empty(device=...) first"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode and can't be changed outside it; call initialize within it"
    return ""


def _draw(
    name: str,
    weight: Tensor,
    recurrent: str,
    radius: float | None,
    sigma: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The numbers for a parameter, on the CPU in its dtype."""
    if name.startswith("bias"):
        return torch.zeros(weight.shape, dtype=weight.dtype, device="cpu")
    numbers = torch.empty(weight.shape, dtype=torch.float64, device="cpu")
    H = weight.shape[0]
    if not numbers.numel():  # a cell may have H = 0 or I = 0, as nn.RNNCell
        return numbers
    bound = 1 / math.sqrt(H)
    if name.startswith("weight_ih"):
        if sigma is None:
            numbers.uniform_(-bound, bound, generator=generator)
        else:
            numbers.normal_(0, sigma, generator=generator)
    elif recurrent == "uniform":
        numbers.uniform_(-bound, bound, generator=generator)
    elif recurrent == "normal":
        # The size of what is scaled afterwards doesn't matter, but zero would.
        numbers.normal_(0, bound if sigma is None or radius is not None else sigma, generator=generator)
    elif recurrent == "orthogonal":
        nn.init.orthogonal_(numbers, generator=generator)
    else:
        nn.init.eye_(numbers)
    if name.startswith("weight_hh") and radius is not None:
        # Of the other two it is 1, exactly.
        found = spectral_radius(numbers) if recurrent in ("uniform", "normal") else 1.0
        scale = radius / found if found else math.inf
        if not math.isfinite(scale):
            raise ValueError(
                f"radius is {radius}, and {name} was drawn with a spectral radius of {found}, which no scale "
                "brings there; draw again"
            )
        numbers *= scale
    cast = numbers.to(weight.dtype)
    if not cast.isfinite().all():
        raise ValueError(
            f"sigma {sigma} and radius {radius} give a {name} beyond the largest number of {weight.dtype}; "
            "expected smaller ones"
        )
    return cast


def spectral_radius(matrix: Tensor) -> float:
    """The largest absolute value of the eigenvalues of a square matrix (H, H), H at least 1, in float64."""
    return torch.linalg.eigvals(matrix.detach().double()).abs().max().item()
