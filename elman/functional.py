"""The functions beneath the modules: check, route, call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from . import compiled, cudnn, eager, native, ops, packing, routing
from .reference import ACTIVATIONS, stacked_weights
from .routing import DTYPES, LOOPS

Input = TypeVar("Input", Tensor, PackedSequence)


def elman(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    nonlinearity: str = "tanh",
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Input, Tensor]:
    """The Elman recurrence over a whole sequence, h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    input (T, B, I), with batch_first (B, T, I), without a batch (T, I), or a PackedSequence of any
    order. hx (L * D, B, H), or (L * D, H) without a batch, or None for zeros; L layers, D directions.
    weights is nn.RNN's flat list: for each layer and direction weight_ih (H, I or D * H), weight_hh
    (H, H) and, with bias, bias_ih (H,) and bias_hh (H,). nonlinearity "tanh" or "relu". dropout acts
    between layers while training.
    lengths: int64 (B,), 1 <= length <= T in any order, or None. A row stops at its length: output is
    zero past it, input past it is not read, the reversed direction begins there.
    resets: bool, shaped as the input without its last dimension (of a PackedSequence: as it would be
    padded), or None. Where it is True a row begins anew at that step: the state before it, hx too, is
    taken as zero, and no gradient passes. Reversed, likewise, nothing passes from that step to the one
    before it: the segments between resets are sequences of their own. All in the same launch.
    backend: one of elman.routing.NAMES, None for "auto"; cudnn has no resets. torch.onnx.export and
    call_for_per_sample_grads take nn.RNN's operator: there "auto" alone, and cudnn on CUDA.
    Objects with a __torch_function__ that are no tensors, such as torch.fx's proxies, take the call over; a
    subclass of Tensor sees the operators beneath.

    dtypes: float64, float32, float16, bfloat16, all tensors alike; under autocast its dtype.
    Returns output (T, B, D * H), of the input's kind and layout, and h_n, shaped as hx.

    Raises, before anything runs: TypeError or ValueError for a wrong kind, rank, dtype or option,
    RuntimeError for sizes or devices that don't fit each other, as nn.RNN does; and
    BackendUnavailableError for a backend that can't run. While torch.compile or torch.export looks on, a
    PackedSequence's numbers and lengths are not checked.
    """
    options = cudnn.Options(bias, num_layers, nonlinearity, dropout, training, bidirectional)
    key = None
    if lengths is None and resets is None:
        key = _key(input, hx, weights, backend, options, batch_first)
        call = None if key is None else _checked.get(key)
        if call is not None:
            return call(input, hx, weights)
    if type(weights) is list or (
        isinstance(weights, Iterable)
        and not isinstance(weights, Tensor)
        and not (has_torch_function((weights,)) and _overriding(weights))
    ):
        weights = list(weights)  # before anything looks at them: an iterator can be read only once
    listed = weights if type(weights) is list else []
    tensors = (input, hx, weights, lengths, resets)
    exported = routing.is_exported_as_nn_rnn()
    if exported or has_torch_function(tensors) or has_torch_function(listed):
        overriding = _overriding(*tensors, *listed)
        given: dict[str, Any] = {
            "num_layers": num_layers,
            "bias": bias,
            "nonlinearity": nonlinearity,
            "dropout": dropout,
            "training": training,
            "bidirectional": bidirectional,
            "batch_first": batch_first,
            "lengths": lengths,
            "resets": resets,
        }
        if overriding:
            given["backend"] = backend
            function: Callable[..., Any] = elman
            return handle_torch_function(function, overriding, input, hx, weights, **given)
        if listed and (exported or any(map(_is_expanded, listed))):
            return _by_nn_rnn(input, hx, weights, backend=backend, **given)
    D = 2 if bidirectional else 1
    check_option("nonlinearity", nonlinearity, tuple(ACTIVATIONS))
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; expected a probability, 0 to 1")
    if type(weights) is not list:
        raise TypeError(f"weights is a {type(weights).__name__}; expected a list of tensors, as nn.RNN keeps")
    packed = input if isinstance(input, PackedSequence) else None
    if packed is not None and lengths is not None:
        raise ValueError("lengths came with a PackedSequence; expected None, it has its own: leave them out")
    data = input if packed is None else packed.data
    _check_sequence(data, hx, weights, num_layers, D, bias, batch_first, packed)
    x, hx, weights, plain = _prepare(data, hx, weights, ValueError)
    batched = packed is not None or x.dim() == 3
    if key is not None:
        B = x.shape[0 if batch_first else 1] if batched else 1
        route = routing.route(backend, x.device, x.dtype, weights[1].shape[0], B, D)
        return _remember(key, route, _call(x, hx, weights, route, options, batch_first))(x, hx, weights)
    if not batched:
        x, hx = x.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
    elif batch_first and packed is None:
        x = x.transpose(0, 1)
    B = x.shape[1] if packed is None else _first_number(packed.batch_sizes)
    H = weights[1].shape[0]
    if lengths is not None:
        _check_lengths(lengths, x.shape[0], B, x.device)
        lengths = lengths.to(x.device)
    if resets is not None:
        _check_resets(resets, x, batched, batch_first, packed)
        if not batched:
            resets = resets.unsqueeze(1)
        elif batch_first:
            resets = resets.transpose(0, 1)
    if hx is None:
        # Of a packed batch by its tensor: torch.jit.trace would keep a number for good.
        rows: Any = B if packed is None else packed.batch_sizes[0]
        hx = x.new_zeros(num_layers * D, rows, H)
    ragged, cut = packed is not None or lengths is not None, resets is not None
    route = routing.route(backend, x.device, x.dtype, H, B, D, ragged=ragged, resets=cut)
    with plain:
        if packed is not None:
            data, h_n = _run_packed(PackedSequence(x, *packed[1:]), hx, weights, resets, route, options)
            return PackedSequence(data, *packed[1:]), h_n  # not _replace, which torch.compile gets wrong
        if lengths is None or B == 0:
            x, h_n = _run(x, hx, weights, None, resets, route, options)
        else:
            x, h_n = _run_padded(x, hx, weights, lengths, resets, route, options)
    if not batched:
        return x.squeeze(1), h_n.squeeze(1)
    return x.transpose(0, 1) if batch_first else x, h_n


#: What does a call whose arguments were checked, on a CPU, by all that the checks and the Route follow from.
#: Checking costs more than a short sequence.
_checked: dict[tuple, Callable[..., Any]] = {}
compiled.dependents.append(_checked.clear)


#: The types of the options that a key may hold. Others are equal to these and mean something else: 1.0 to 1.
_OPTIONS = {(bool, int, str, kind, bool, bool, bool) for kind in (int, float)} | {(str,)}


def _key(input: Any, hx: Any, weights: Any, backend: str | None, options: tuple, *more: bool) -> tuple | None:
    """A call's key in `_checked`, or None where its answer follows from more than can be said here."""
    if type(weights) is not list or tuple(map(type, (*options, *more))) not in _OPTIONS:
        return None
    tensors = [input, *weights] if hx is None else [input, hx, *weights]
    if not ops.is_unobserved(tensors) or torch._C._is_any_autocast_enabled():
        return None
    seen: list[Any] = []
    strided = torch.strided
    for t in tensors:
        if t is None or not t.is_cpu or t.layout is not strided or t.is_neg():
            return None
        seen.append(t.shape)  # thrice is quicker than a tuple, and a short call's time is its Python's
        seen.append(t.stride())
        seen.append(t.dtype)
    return hx is None, routing.asked_for(backend), options, *more, *seen


def _remember(key: tuple, route: routing.Route, call: Callable[..., Any]) -> Callable[..., Any]:
    if route.backend == "triton":  # in its interpreter, as long as the environment's variables allow it
        return call
    if len(_checked) >= 512:
        _checked.clear()
    _checked[key] = call
    return call


def _call(
    x: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    route: routing.Route,
    options: cudnn.Options,
    batch_first: bool,
) -> Callable[..., Any]:
    """What makes output and h_n of such tensors."""
    layers = None
    if route.backend == "native":
        layers = _layers(*_whole(x, hx, weights, options, batch_first), weights, options)
        if layers and len(layers) == 1 and hx is not None and x.dim() == 3 and not batch_first:
            return partial(ops.prepared_layer, layers[0])  # with nothing around it
    return partial(_run_whole, layers=layers, route=route, options=options, batch_first=batch_first)


def _layers(
    x: Tensor, hx: Tensor, weights: list[Tensor], options: cudnn.Options
) -> list[native.Layer] | None:
    """The native layers for such tensors; None where one of them doesn't fit."""
    D, size, layers = 1 + options.bidirectional, len(weights) // options.num_layers, []
    for n, h0 in enumerate(hx.split(D)):
        own = weights[n * size : (n + 1) * size]
        if not native.Layer.fits(x, h0, own, D):
            return None
        layers.append(native.Layer(x, h0, own, options.nonlinearity))
        x = x.new_empty(layers[-1].shape)
    return layers


def _whole(
    x: Tensor, hx: Tensor | None, weights: list[Tensor], options: cudnn.Options, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """x (T, B, I) and hx (L * D, B, H), zeros for None."""
    if x.dim() == 2:
        x, hx = x.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
    elif batch_first:
        x = x.transpose(0, 1)
    if hx is None:
        groups = options.num_layers * (1 + options.bidirectional)
        hx = x.new_zeros(groups, x.shape[1], weights[1].shape[0])
    return x, hx


def _run_whole(
    x: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    layers: list[native.Layer] | None,
    route: routing.Route,
    options: cudnn.Options,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """The output and h_n of checked tensors of which `ops.is_unobserved`, rows having T steps each."""
    batched = x.dim() == 3
    x, hx = _whole(x, hx, weights, options, batch_first)
    if layers is not None and len(layers) == 1:
        x, h_n = ops.prepared_layer(layers[0], x, hx, weights)
    else:
        x, h_n = _run(x, hx, weights, None, None, route, options, plain=True, prepared=layers)
    if not batched:
        return x.squeeze(1), h_n.squeeze(1)
    return x.transpose(0, 1) if batch_first else x, h_n


def _run_packed(
    batch: PackedSequence,
    hx: Tensor,
    weights: list[Tensor],
    resets: Tensor | None,
    route: routing.Route,
    options: cudnn.Options,
) -> tuple[Tensor, Tensor]:
    """The output's data and h_n: packed all the way in eager and native, padded for the other backends."""
    x, sizes, order, back = batch
    if order is not None:
        hx = hx.index_select(1, order)
        resets = None if resets is None else resets.index_select(1, order)
    if route.kernel in LOOPS:
        if resets is not None:
            resets = packing.pack(resets, packing.places(sizes, resets.shape[1]).to(x.device))
        output, h_n = _run(x, hx, weights, sizes, resets, route, options)
    else:
        (padded,), lengths, places = packing.padded(sizes, hx.shape[1], x)
        if resets is not None:
            resets = resets & packing.steps(lengths, sizes.shape[0])
        output, h_n = _run(padded, hx, weights, lengths, resets, route, options)
        output = packing.pack(output, places)
    return output, h_n if back is None else h_n.index_select(1, back)


def _run_padded(
    x: Tensor,
    hx: Tensor,
    weights: list[Tensor],
    lengths: Tensor,
    resets: Tensor | None,
    route: routing.Route,
    options: cudnn.Options,
) -> tuple[Tensor, Tensor]:
    """The output and h_n for x (T, B, I), whose rows have these lengths: packed for eager and native."""
    T, B, _ = x.shape
    if route.kernel in LOOPS:
        batch, places = packing.from_padded(x, lengths)
        resets = None if resets is None else resets[: batch.batch_sizes.shape[0]]
        output, h_n = _run_packed(batch, hx, weights, resets, route, options)
        return packing.pad(output, places, T, B), h_n
    there = packing.steps(lengths, T)
    resets = None if resets is None else resets & there
    return _run(x.masked_fill(~there[..., None], 0), hx, weights, lengths, resets, route, options)


def _run(
    x: Tensor,
    hx: Tensor,
    weights: list[Tensor],
    counts: Tensor | None,
    resets: Tensor | None,
    route: routing.Route,
    options: cudnn.Options,
    plain: bool = False,
    prepared: list[native.Layer] | None = None,
) -> tuple[Tensor, Tensor]:
    """The layers' output and h_n, for x, counts and resets as `ops.layer` takes them.

    plain: `ops.is_unobserved` is known to hold; prepared: a `native.Layer` for each, counts and resets None.
    """
    if route.backend == "cudnn":
        return cudnn.elman(x, hx, weights, counts, options)
    num_layers, D = options.num_layers, 1 + options.bidirectional
    precision = routing.float32_precision(x.device) if x.dtype == torch.float32 else "ieee"
    states = []
    h0s = hx.split(D) if num_layers > 1 else (hx,)
    plain = plain or ops.is_unobserved((x, hx, counts, resets, *weights))
    size = len(weights) // num_layers
    layers: Sequence[Any] = h0s if plain else stacked_weights(weights, num_layers, D, options.bias)
    for n, (h0, layer) in enumerate(zip(h0s, layers, strict=True)):
        if n and options.dropout:
            x = F.dropout(x, options.dropout, options.training)
        own = weights[n * size : (n + 1) * size]
        if prepared is not None:
            x, h = ops.prepared_layer(prepared[n], x, h0, own)
        elif plain:
            x, h = ops.plain_layer(
                x, h0, counts, resets, options.nonlinearity, route.kernel, precision, D, own
            )
        else:
            w_ih, w_hh, b = layer
            x, h = ops.layer(
                x, h0, w_ih, w_hh, b, counts, resets, options.nonlinearity, route.kernel, precision
            )
        states.append(h)
    return x, states[0] if num_layers == 1 else torch.cat(states)


def elman_step(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step, h' = act(W_ih x + b_ih + W_hh h + b_hh).

    input (B, I) or (I,), hx (B, H) or (H,) or None for zeros, w_ih (H, I), w_hh (H, H), b_ih and b_hh
    (H,) or both None. Returns h', shaped as hx. dtypes, autocast and errors as `elman`'s, but that
    tensors of different dtypes are a RuntimeError, as nn.RNNCell's are.
    """
    tensors = (input, hx, w_ih, w_hh, b_ih, b_hh)
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    key = None if (b_ih is None) != (b_hh is None) else _key(input, hx, weights, backend, (nonlinearity,))
    call = None if key is None else _checked.get(key)
    if call is not None:
        return call(input, hx, weights)
    if has_torch_function(tensors):
        overriding = _overriding(*tensors)
        if overriding:
            return handle_torch_function(
                elman_step, overriding, *tensors, nonlinearity=nonlinearity, backend=backend
            )
    if (b_ih is None) != (b_hh is None):
        raise ValueError("one of b_ih and b_hh is None; expected both or neither: pass zeros for it")
    check_option("nonlinearity", nonlinearity, tuple(ACTIVATIONS))
    _check_step(input, hx, weights)
    x, h, weights, plain = _prepare(input, hx, weights, RuntimeError)
    B = x.shape[0] if x.dim() == 2 else 1
    route = routing.route(backend, x.device, x.dtype, weights[1].shape[0], B, one_step=True)
    if key is not None:
        call = partial(_run_step, nonlinearity=nonlinearity, route=route)
        if route.backend == "native":
            rows = x if x.dim() == 2 else x[None]
            state = x.new_zeros(B, weights[1].shape[0]) if h is None else h if h.dim() == 2 else h[None]
            if native.Layer.fits(rows, state, weights, 1):
                layer = native.Layer(rows, state, weights, nonlinearity)
                whole = h is not None and x.dim() == 2
                call = partial(ops.prepared_layer, layer) if whole else partial(_run_cell, layer=layer)
        return _remember(key, route, call)(x, h, weights)
    with plain:
        return _run_step(x, h, weights, nonlinearity, route)


def _run_cell(x: Tensor, h: Tensor | None, weights: list[Tensor], layer: native.Layer) -> Tensor:
    """The state after one step of checked tensors, x (B, I) or (I,), h None for zeros."""
    batched = x.dim() == 2
    if not batched:
        x, h = x[None], None if h is None else h[None]
    if h is None:
        h = x.new_zeros(x.shape[0], weights[1].shape[0])
    new = ops.prepared_layer(layer, x, h, weights)
    return new if batched else new.squeeze(0)


def _run_step(
    x: Tensor,
    h: Tensor | None,
    weights: list[Tensor],
    nonlinearity: str,
    route: routing.Route,
) -> Tensor:
    """The state after one step of checked tensors."""
    batched = x.dim() == 2
    if not batched:
        x, h = x.unsqueeze(0), None if h is None else h.unsqueeze(0)
    if h is None:
        h = x.new_zeros(x.shape[0], weights[1].shape[0])
    if route.backend == "eager":
        new = eager.step(x, h, *weights, nonlinearity=nonlinearity)
    elif route.backend == "cudnn":
        options = cudnn.Options(len(weights) == 4, 1, nonlinearity, 0.0, False, False)
        new = cudnn.elman(x[None], h[None], weights, None, options)[0][0]
    else:
        ((w1, w2, b),) = stacked_weights(weights, 1, 1, len(weights) == 4)
        precision = routing.float32_precision(x.device)
        sequence = ops.layer(x[None], h[None], w1, w2, b, None, None, nonlinearity, route.kernel, precision)
        new = sequence[0][0]
    return new if batched else new.squeeze(0)


def _overriding(*arguments: object) -> list[Any]:
    """The arguments whose class takes the whole call over, by torch's protocol, such as a torch.fx.Proxy.

    A subclass of Tensor does not: it is given to the operators, as it is by nn.RNN.
    """
    return [a for a in arguments if not isinstance(a, Tensor) and hasattr(type(a), "__torch_function__")]


def _is_expanded(weight: object) -> bool:
    """Whether torch's call_for_per_sample_grads made it, which computes with the functions it knows alone."""
    return type(weight).__name__ == "ExpandedWeight"


def _by_nn_rnn(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bias: bool,
    nonlinearity: str,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    backend: str | None,
) -> tuple[Input, Tensor]:
    """elman() by nn.RNN itself, for what knows its operator and not ours.

    On CUDA that operator is the backend cudnn. It is none of the others, which so can't be had by name.
    """
    if lengths is not None or resets is not None:
        raise NotImplementedError(
            "lengths or resets came within torch.onnx.export or call_for_per_sample_grads, where nn.RNN's "
            "operator is taken, which has none; expected None: use elman.onnx.export, or torch.func's vmap of"
            " grad"
        )
    name = routing.asked_for(backend)
    if name == "cudnn":
        w = weights[0]
        routing.route(name, w.device, w.dtype, w.shape[0], batch=1)  # for what it raises, whatever the sizes
    elif name != "auto":
        raise routing.BackendUnavailableError(
            f"backend {name!r} was asked for and can't run within torch.onnx.export or "
            "call_for_per_sample_grads, where nn.RNN's operator is taken; use 'auto' there, or "
            "elman.onnx.export, or torch.func's vmap of grad"
        )
    with routing.untraced(), torch.device("meta"):  # its own weights are not computed with
        H, I = weights[0].shape
        between = dropout if num_layers > 1 else 0.0  # of a single layer nn.RNN would warn at every call
        rnn = nn.RNN(I, H, num_layers, nonlinearity, bias, batch_first, between, bidirectional)
    rnn.train(training)
    rnn._flat_weights = list(weights)
    return rnn.forward(input, hx)


def check_hx(hx: object, shape: tuple[int, ...], dims: str) -> None:
    """Raises unless hx is a tensor of that shape, whose dimensions `dims` names."""
    _check_tensor("hx", hx)
    assert isinstance(hx, Tensor)
    if hx.shape != shape:
        raise RuntimeError(f"hx has shape {tuple(hx.shape)}; expected {shape}, {dims}")


def check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the options."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, options))}")


def _untraced(check: Callable[..., Any]) -> Callable[..., Any]:
    """The check, of which torch.jit.trace sees nothing: it would warn of every size that is compared."""

    @wraps(check)
    def untraced(*arguments: Any) -> Any:
        if not torch.jit.is_tracing():
            return check(*arguments)
        with routing.untraced():
            return check(*arguments)

    return untraced


@_untraced
def _first_number(sizes: Tensor) -> Any:
    return sizes[0].item()  # not int(), which torch.export can't leave to the run


@_untraced
def _check_sequence(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    D: int,
    bias: bool,
    batch_first: bool,
    packed: PackedSequence | None,
) -> None:
    _check_tensor("input", input)
    dims = "(B, T, I)" if batch_first else "(T, B, I)"
    if packed is not None:
        _check_packed(packed)
    elif input.dim() not in (2, 3):
        raise ValueError(
            f"input has {input.dim()} dimensions, shape {tuple(input.shape)}; expected 3, {dims}, or 2 "
            "without a batch, (T, I)"
        )
    per_group, groups = 4 if bias else 2, num_layers * D
    if len(weights) != groups * per_group:
        raise ValueError(
            f"weights is {len(weights)} tensors; expected a list of {groups * per_group} tensors, "
            f"{per_group} for each of {num_layers} layers and {D} directions"
        )
    H = _check_weights(weights, input, per_group, D)
    batched = packed is not None or input.dim() == 3
    if hx is not None:
        if packed is None and isinstance(hx, Tensor) and hx.dim() != input.dim():
            raise RuntimeError(
                f"hx has {hx.dim()} dimensions, shape {tuple(hx.shape)}; expected {input.dim()}, as the "
                f"input of shape {tuple(input.shape)} has"
            )
        if batched:
            if packed is None:
                B = input.shape[0 if batch_first else 1]
            elif routing.is_traced() and isinstance(hx, Tensor) and hx.dim() == 3:
                B = hx.shape[1]  # a graph does not have the packed number
            else:
                B = int(packed.batch_sizes[0])
            check_hx(hx, (groups, B, H), "(layers * directions, batch, hidden size)")
        else:
            check_hx(hx, (groups, H), "(layers * directions, hidden size)")
    if packed is None and input.shape[1 if batched and batch_first else 0] == 0:
        raise RuntimeError(
            f"input has no time steps, shape {tuple(input.shape)}; expected a sequence length of at least "
            "1: leave empty sequences out"
        )


def _check_packed(packed: PackedSequence) -> None:
    data, sizes, *orders = packed
    if data.dim() != 2:
        raise RuntimeError(
            f"the PackedSequence's data has {data.dim()} dimensions, shape {tuple(data.shape)}; "
            "expected 2, (sum of the lengths, I)"
        )
    if routing.is_traced():
        return  # what follows looks at numbers, which a graph does not have
    remedy = "make it with pack_sequence or pack_padded_sequence"
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu" or not len(sizes):
        raise RuntimeError(
            f"the PackedSequence's batch_sizes is {sizes.dtype} of shape {tuple(sizes.shape)} on "
            f"{sizes.device}; expected torch.int64 of shape (T,), T at least 1, on the CPU: {remedy}"
        )
    B, total = int(sizes[0]), int(sizes.sum())
    if sizes[-1] < 1 or total != len(data) or bool((sizes.diff() > 0).any()):
        raise RuntimeError(
            f"the PackedSequence's batch_sizes run from {B} to {int(sizes[-1])}, {total} together; expected "
            f"none above the one before, at least 1, and {len(data)} together, as data has rows: {remedy}"
        )
    for name, order in zip(("sorted_indices", "unsorted_indices"), orders, strict=True):
        if order is not None and order.shape != (B,):
            raise RuntimeError(
                f"the PackedSequence's {name} has shape {tuple(order.shape)}; expected {(B,)}, as its first "
                f"step has rows: {remedy}"
            )


@_untraced
def _check_step(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> None:
    _check_tensor("input", input)
    if input.dim() not in (1, 2):
        raise ValueError(
            f"input has {input.dim()} dimensions, shape {tuple(input.shape)}; expected 2, (B, I), or 1, (I,)"
        )
    if isinstance(hx, Tensor) and hx.dim() not in (1, 2):
        raise ValueError(
            f"hx has {hx.dim()} dimensions, shape {tuple(hx.shape)}; expected 2, (B, H), or 1, (H,)"
        )
    H = _check_weights(weights, input, len(weights), 1)
    if hx is not None:
        dims = "(batch, hidden size)" if input.dim() == 2 else "(hidden size,)"
        check_hx(hx, (*input.shape[:-1], H), dims)


def _check_weights(weights: Sequence[Tensor], input: Tensor, per_group: int, D: int) -> int:
    """The hidden size H, after checking every weight's kind and shape and the input's last size."""
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor) or weight.layout != torch.strided:
            _check_tensor(f"weights[{i}]", weight)
    if weights[0].dim() != 2:
        raise RuntimeError(f"weights[0] has shape {tuple(weights[0].shape)}; expected 2 dimensions, (H, I)")
    H, I = weights[0].shape
    sizes = ((H, I), (H, H), (H,), (H,))
    for i, weight in enumerate(weights):
        if i == per_group * D:
            sizes = ((H, D * H), (H, H), (H,), (H,))  # from the second layer on
        expected = sizes[i % per_group]
        if weight.shape != expected:
            raise RuntimeError(
                f"weights[{i}] has shape {tuple(weight.shape)}; expected {expected}, from input size {I}, "
                f"hidden size {H} and {D} directions"
            )
    if input.shape[-1] != I:
        raise RuntimeError(
            f"input has size {input.shape[-1]} in its last dimension, shape {tuple(input.shape)}; expected "
            f"the input size of the weights, {I}"
        )
    return H


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.layout != torch.strided:
        raise NotImplementedError(
            f"{name} is {value.layout}; expected torch.strided: convert it with .to_dense()"
        )


@_untraced
def _check_lengths(lengths: Tensor, T: int, B: int, device: torch.device) -> None:
    _check_tensor("lengths", lengths)
    if lengths.shape != (B,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; expected torch.int64 of shape "
            f"{(B,)}, one length for each row"
        )
    if lengths.device.type != "cpu" and lengths.device != device:
        raise RuntimeError(
            f"lengths is on {lengths.device}; expected the CPU or the input's {device}: move it with .to()"
        )
    if routing.is_traced():
        return  # what follows looks at numbers, which a graph does not have
    if B and not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise ValueError(
            f"lengths runs from {int(lengths.min())} to {int(lengths.max())}; expected 1 to {T}, the "
            "sequence length: leave empty rows out"
        )


@_untraced
def _check_resets(
    resets: Tensor, x: Tensor, batched: bool, batch_first: bool, packed: PackedSequence | None
) -> None:
    _check_tensor("resets", resets)
    if packed is None:
        T, B = x.shape[:2]
    elif routing.is_traced():  # a graph does not have the packed number
        T, B = packed.batch_sizes.shape[0], resets.shape[0 if batch_first else -1]
    else:
        T, B = len(packed.batch_sizes), int(packed.batch_sizes[0])
    shape: tuple[int, ...] = (T,) if not batched else (B, T) if batch_first else (T, B)
    if resets.dtype != torch.bool or resets.shape != shape:
        raise ValueError(
            f"resets is {resets.dtype} of shape {tuple(resets.shape)}; expected torch.bool of shape "
            f"{shape}, one for each step of each row"
        )
    if resets.device != x.device:
        raise RuntimeError(
            f"resets is on {resets.device} and the input on {x.device}; expected one: move with .to()"
        )


def _prepare(
    input: Tensor, hx: Tensor | None, weights: list[Tensor], mismatch: type[Exception]
) -> tuple[Tensor, Tensor | None, list[Tensor], AbstractContextManager]:
    """The tensors in one dtype, on one device, and a context in which they stay in it.

    Under autocast they are cast here, once, to its dtype (float64 stays, as everywhere under autocast),
    and the context switches it off. mismatch is the error for an input of another dtype.
    """
    device = input.device
    plain: AbstractContextManager = nullcontext()
    if routing.is_autocast(device.type):
        low = torch.get_autocast_dtype(device.type)

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(low) if tensor.dtype in DTYPES[1:] else tensor

        input, hx, weights = cast(input), None if hx is None else cast(hx), [cast(w) for w in weights]
        plain, mismatch = torch.autocast(device.type, enabled=False), RuntimeError
    dtype = weights[0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"weights[0] is {dtype}; expected {', '.join(map(str, DTYPES))}")
    if input.dtype != dtype:
        raise mismatch(
            f"input is {input.dtype} and the weights are {dtype}; expected one dtype: convert the input "
            f"with input.to({dtype}), or the model with model.to({input.dtype})"
        )
    for i, tensor in enumerate((hx, *weights), -1):
        if tensor is None or (tensor.dtype == dtype and tensor.device == device):
            continue
        name = f"weights[{i}]" if i >= 0 else "hx"
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"{name} is {tensor.dtype} and the input {dtype}; expected one dtype: convert with .to()"
            )
        raise RuntimeError(
            f"{name} is on {tensor.device} and the input on {device}; expected one: move with .to()"
        )
    return input, hx, weights, plain
