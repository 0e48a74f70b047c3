"""replace(model): every nn.RNN and nn.RNNCell of a model becomes an Elman or an ElmanCell, in place."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from .layer import MODES, Elman, ElmanCell, take_for_torch_s
from .routing import check_name

KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: Elman, nn.RNNCell: ElmanCell}
LOGGER = logging.getLogger("elman")
NONLINEARITIES = {mode: name for name, mode in MODES.items()}


def replace(model: nn.Module, backend: str = "auto") -> dict[str, nn.Module]:
    """Makes every nn.RNN of the model an Elman and every nn.RNNCell an ElmanCell, the model itself too.

    In place: each stays the same object with the same parameters, and keeps its hooks, parametrizations,
    buffers, mode, dtype and device, so optimizers, shared weights, checkpoints and references to the layer
    go on as they were. Only its class changes, and with it isinstance(layer, nn.RNN), which is False
    afterwards: isinstance(layer, nn.RNNBase) holds before and after. So initialise before replace: code that
    draws weights where isinstance(layer, nn.RNN) finds nothing afterwards. Quantize before it too:
    quantize_dynamic leaves an ElmanCell in float. torch.jit.script can't compile our classes. backend: one
    of elman.routing.NAMES, for every layer replaced.

    Returns the replaced layers by their qualified names, "" for the model itself; of several names the
    first, as in model.named_modules(). Its len() is how many, which the logger "elman" says too, at INFO.
    What is no registered submodule isn't found, just as model.parameters() doesn't find it. An Elman that
    was there before stays as it is.

    A subclass of nn.RNN or nn.RNNCell, and a layer whose forward was set on the object, may compute
    something else: they are left alone, and a UserWarning names them. Scripted and traced modules keep the
    code that they were compiled to. Call it before fully_shard, which makes subclasses.

    Raises TypeError for a model that is no nn.Module and ValueError for an unknown backend, before
    anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {_named(model)}; expected an nn.Module: pass the model, not its class")
    check_name(backend)
    replaced: dict[str, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        # parametrize makes a class of its own for each module that it is given, with nothing new in forward.
        kind = KINDS.get(parametrize.type_before_parametrizations(module))
        if kind is not None and "forward" not in vars(module):
            replaced[name] = module
        elif isinstance(module, tuple(KINDS)):
            left.append(
                f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            )
    for module in replaced.values():
        _become(module, KINDS[parametrize.type_before_parametrizations(module)], backend)
    LOGGER.info("replace made %d of nn.RNN and nn.RNNCell ours: %s", len(replaced), [*replaced])
    if left:
        warnings.warn(
            f"replace left {', '.join(left)} alone: a subclass of nn.RNN or nn.RNNCell, or a layer whose "
            "forward was set on the object, may compute something else; derive the class from elman.Elman or "
            "elman.ElmanCell, or call replace first, before fully_shard for one",
            stacklevel=2,
        )
    return replaced


def _become(module: nn.Module, kind: type[nn.Module], backend: str) -> None:
    if parametrize.is_parametrized(module):
        # A new class and not new bases for the old one: copies of the module elsewhere have that too.
        kind = type(f"Parametrized{kind.__name__}", (kind,), dict(vars(type(module))))
    cast(Any, module).__class__ = kind
    if isinstance(module, Elman):
        module.nonlinearity = NONLINEARITIES[module.mode]  # what nn.RNN runs by
        module._flat_weights = module._flat_weights  # Elman looks at what is assigned, and so at this
    cast(Any, module).backend = backend
    take_for_torch_s(module)


def _named(value: object) -> str:
    return f"class, {value.__name__}" if isinstance(value, type) else type(value).__name__
