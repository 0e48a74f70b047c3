"""The layer as torch.library operators, with their fake implementations, derivatives and batching rules.

    elman::layer            x, h0, weights -> output, h_n      one layer, all its directions, any kernel
    elman::layer_dz         g_out, g_hn, output, w_hh -> dz    its backward scan
    elman::layer_products   dz, x, h0, ... -> the gradients    what is left of the backward pass

Where rows differ in length, `counts` is int64 and says how: the kernels take a padded x (T, B, I) and the
rows' lengths (B,), LOOPS a packed x (N, I) and its sizes (T,), see packing.py; otherwise it is None.
`resets`, bool, of x's shape without its last dimension, or None: where rows begin anew, see reference.layer;
none lies past a row's length.

Only the scans depend on the kernel. What is left of the backward pass is products over the whole
sequence, the vendor's library's work; they are an operator in graphs alone, which so need not be made anew
for each T. Saved are the input, h0, the weights, the output, and counts and resets if there are any: act'
follows from the output.

`kernel` is one of LOOPS: "eager", "native", or "cpu", native where it can run when the time comes, else
eager; or the name of a module of elman.kernels ("resident", "cooperative", "step"), "triton": the quickest of
these for each pass, or "cell": the step kernel with the input product in the same launch, for T = 1 and
D = 1, where "triton" and "step" take it too. The config is chosen when a kernel runs: an operator's schema
holds none.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import batching, eager, native, packing, products, reference, routing
from .routing import LOOPS

if TYPE_CHECKING:
    from .kernels import configs


def layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """output (T, B, D * H), or packed, and h_n (D, B, H) of one layer, arguments as `reference.layer`'s.

    counts, resets and kernel as above; precision, "ieee", "tf32" or "tf32x3", is that of a float32 product in
    Triton.
    """
    arguments = (x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision)
    in_transform = torch._C._are_functorch_transforms_active()
    if routing.is_traced() and not in_transform:
        return torch.ops.elman.layer(*arguments)
    if forward_ad._current_level >= 0:
        # The operator has no forward-mode derivative, and would drop a tangent without a word.
        if x.dim() == 3:
            return reference.layer(x, h0, w_ih, w_hh, bias, counts, nonlinearity, resets)
        assert counts is not None
        (x, resets), lengths, places = packing.padded(counts, h0.shape[1], x, resets)
        output, h_n = reference.layer(x, h0, w_ih, w_hh, bias, lengths, nonlinearity, resets)
        return packing.pack(output, places), h_n
    if in_transform:
        if torch.compiler.is_compiling():
            _hold_whole()
        return _in_transform(*arguments)
    watched = _is_watched()
    if torch.is_grad_enabled() or type(x) is not Tensor or watched:
        return torch.ops.elman.layer.default(*arguments)
    return _layer(*arguments)  # with nothing to record, the dispatcher only costs time


def _is_watched() -> bool:
    """Whether a mode sees each operation. Those that count operations are told of ours on the way."""
    watched = torch._C._len_torch_dispatch_stack() > 0
    if watched:
        _tell_counters()
    return watched


def is_unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these are plain tensors and nothing looks on, so that `plain_layer` may stand for `layer`."""
    return (
        not routing.is_traced()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()  # it shall find the operators' names
        and _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def plain_layer(
    x: Tensor,
    h0: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
    D: int,
    weights: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """As `layer`, by nn.RNN's own weights of one layer, where `is_unobserved`: with the least of the host.

    The dispatcher's way to an operator and its derivative cost more than a short sequence, and so does a node
    of autograd for each view of a weight.
    """
    arguments: tuple[Any, ...] = (x, h0, counts, resets, nonlinearity, kernel, precision, D, *weights)
    if torch.is_grad_enabled():
        return _Recorded.apply(*arguments)
    return _plain_layer(*arguments)


def prepared_layer(layer: native.Layer, x: Tensor, h0: Tensor, weights: Sequence[Tensor]) -> Any:
    """As `plain_layer`, by what was prepared for such tensors; of a cell, x (B, I), the state (B, H)."""
    if torch.is_grad_enabled():
        return _Prepared.apply(layer, x, h0, *weights)
    output, h_n = layer(x, h0, weights)
    return output if layer.is_cell else (output, h_n)


def _plain_layer(
    x: Tensor,
    h0: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
    D: int,
    *weights: Tensor,
) -> tuple[Tensor, Tensor]:
    if kernel in LOOPS and _loop(kernel, x) is native:
        output = native.plain_forward(x, h0, weights, D, counts, resets, nonlinearity)
        return output, _h_n(output, h0, counts)
    ((w_ih, w_hh, bias),) = reference.stacked_weights(weights, 1, D, len(weights) == 4 * D)
    return _layer(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision)


class _Recorded(torch.autograd.Function):
    """`plain_layer` with its derivative, the operator's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, h0, counts, resets, *ctx.options, ctx.D = arguments[:8]
        weights = arguments[8:]
        output, h_n = _plain_layer(*arguments)
        ctx.set_materialize_grads(False)
        # Not the biases: who writes into one before the backward pass changes nothing that it reads.
        ctx.size = len(weights) // ctx.D
        kept = [w for i, w in enumerate(weights) if i % ctx.size < 2]
        ctx.save_for_backward(counts, resets, x, h0, output, *kept)
        return output, h_n

    @staticmethod
    def backward(ctx: Any, g_out: Tensor | None, g_hn: Tensor | None) -> tuple[Tensor | None, ...]:
        counts, resets, *saved = ctx.saved_tensors
        saved = _in_memory(saved)
        needs = ctx.needs_input_grad[:2] + ctx.needs_input_grad[8:]
        dx, dh0, *rest = _by_weight(g_out, g_hn, saved, counts, resets, ctx.D, ctx.size, ctx.options, needs)
        return dx, dh0, None, None, None, None, None, None, *rest


class _Prepared(torch.autograd.Function):
    """`prepared_layer` with its derivative: C's, or the operator's where more than autograd looks on."""

    @staticmethod
    def forward(ctx: Any, layer: native.Layer, x: Tensor, h0: Tensor, *weights: Tensor) -> Any:
        output, h_n = layer(x, h0, weights)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, output, *[weights[i] for i in layer.kept])
        return output if layer.is_cell else (output, h_n)

    @staticmethod
    def backward(ctx: Any, g_out: Tensor | None, g_hn: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layer, saved, needs = ctx.layer, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if g_out is None and g_hn is None:
            return (None,) * (1 + len(needs))
        if _may_call(layer, g_out, g_hn, saved):
            return None, *layer.backward(g_out, g_hn, saved, needs)
        saved = _in_memory(saved)
        if layer.is_cell:  # for the operator a sequence of one step
            saved = [*(t[None] for t in saved[:3]), *saved[3:]]
            g_out = None if g_out is None else g_out[None]
        options = layer.nonlinearity, "native", "ieee"
        found = _by_weight(g_out, g_hn, saved, None, None, layer.D, layer.per_direction, options, needs)
        if layer.is_cell:
            found[:2] = [None if g is None else g[0] for g in found[:2]]
        return None, *found


def _may_call(
    layer: native.Layer, g_out: Tensor | None, g_hn: Tensor | None, saved: Sequence[Tensor]
) -> bool:
    """Whether C's gradients are for these: torch shall not differentiate them again, and nothing look on."""
    for g in (g_out, g_hn):
        if g is not None and (g.dtype != layer.dtype or _stands_for_another(g)):
            return False
    if g_out is not None and g_hn is not None and layer.dtype != layer.compute:
        return False  # their sum is not rounded
    return not torch.is_grad_enabled() and is_unobserved((g_out, g_hn, *saved)) and layer.may_read(saved)


def _in_memory(saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """`saved`, after an error for what was freed: torch reads it, and crashes."""
    if not is_unobserved(saved):
        return saved
    return [native.in_memory(t) if t.is_cpu else t for t in saved]


def _by_weight(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    saved: Sequence[Tensor],
    counts: Tensor | None,
    resets: Tensor | None,
    D: int,
    size: int,
    options: Sequence[str],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of x, h0 and nn.RNN's own weights, `size` a direction, by the operator's derivative.

    saved: x, h0, the output, and each direction's w_ih and w_hh; options: nonlinearity, kernel, precision.
    """
    x, h0, output, *weights = saved
    # Joined here again, so that second derivatives find their way to the weights.
    w_ih, w_hh = reference.join(weights[::2]), reference.join(weights[1::2])
    of_biases = size == 4 and any(needs[4::4] + needs[5::4])
    wanted = [*needs[:2], any(needs[2::size]), any(needs[3::size]), of_biases]
    arguments: tuple[Any, ...] = (g_out, g_hn, x, h0, w_ih, w_hh, counts, resets, output, *options, wanted)
    dx, dh0, *found = _gradients(*arguments)
    by_weight: list[Tensor | None] = []
    for d in range(D):
        dw_ih, dw_hh, db = (None if g is None else g[d] for g in found)
        by_weight += [dw_ih, dw_hh]
        if size == 4:
            # Both get memory of their own: what works on gradients in place would else do it twice.
            by_weight += [db, None if db is None or not needs[5 + d * size] else db.clone()]
    return [dx, dh0, *(g if needed else None for g, needed in zip(by_weight, needs[2:], strict=True))]


def _tell_counters() -> None:
    from . import flops  # not above: it names the operators, which this file makes

    flops.tell_counters()


def _layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    if kernel in LOOPS:
        output = _loop(kernel, x).forward(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity)
    else:
        output = _scan(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision)
    return output, _h_n(output, h0, counts)


def _h_n(output: Tensor, h0: Tensor, counts: Tensor | None) -> Tensor:
    """Each direction's last states (D, B, H): a copy, as h_n may be written into."""
    D, B, H = h0.shape
    if D == 1 and counts is None:
        return output[-1:].clone()
    ends = [_last(B, counts, output), _first(B, output)][:D]  # reversed, the last step is the first
    return torch.cat([output[end][None, :, d * H : (d + 1) * H] for d, end in enumerate(ends)])


def _loop(kernel: str, sequence: Tensor) -> ModuleType:
    """native or eager, by what can run now: a graph may have been made on another machine."""
    if kernel == "eager" or sequence.is_meta:  # which has shapes alone
        return eager
    why_not = routing.unavailable("native", sequence.device, sequence.dtype)
    if why_not and kernel == "native":
        raise routing.BackendUnavailableError(f"backend 'native' was asked for and can't run: {why_not}")
    return eager if why_not else native


def _scan(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> Tensor:
    """The output (T, B, D * H) by a Triton kernel."""
    # A tensor may be negated lazily, which torch's operators see to and a kernel doesn't.
    x, h0, w_ih, w_hh = (t.resolve_neg() if t.is_neg() else t for t in (x, h0, w_ih, w_hh))
    bias = None if bias is None else bias.resolve_neg()
    ragged = lengths is not None or resets is not None
    name, problem, config = _launch(x, w_hh, kernel, precision, ragged, x.shape[2])
    if name == "cell":
        output, b = x.new_empty(1, x.shape[1], w_hh.shape[1]), None if bias is None else bias[0]
        h = h0[0] if resets is None else h0[0].masked_fill(resets[0, :, None], 0)
        _module("kernels.step").cell(x[0], h, w_ih[0], w_hh[0], b, output[0], nonlinearity, precision, config)
        return output
    module = _module(f"kernels.{name}")
    if problem.inputs:
        return module.scan_fused(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, precision, config, resets)
    z = products.project(x, w_ih, bias)
    return module.scan(z, h0, w_hh, lengths, nonlinearity, precision, config, resets)


def _layer_dz(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> Tensor:
    """dz, of the output's shape, by the backward scan of any kernel."""
    if kernel in LOOPS:
        return _loop(kernel, output).backward(g_out, g_hn, output, w_hh, counts, resets, nonlinearity)
    output, w_hh = (t.resolve_neg() if t.is_neg() else t for t in (output, w_hh))
    g_out, g_hn = (g.resolve_neg() if g is not None and g.is_neg() else g for g in (g_out, g_hn))
    dz = torch.empty_like(output)
    ragged = counts is not None or resets is not None
    name, _, config = _launch(output, w_hh, kernel, precision, ragged)
    _module(f"kernels.{name}").scan_backward(
        g_out, g_hn, output, w_hh, dz, counts, nonlinearity, precision, config, resets
    )
    return dz


def _launch(
    sequence: Tensor, w_hh: Tensor, kernel: str, precision: str, ragged: bool, inputs: int | None = None
) -> tuple[str, configs.Problem, configs.Config | None]:
    """What scans a sequence (T, B, ...) with w_hh (D, H, H), forward over `inputs`, or, at None, backward."""
    choice = _module("choice")
    # The interpreter, whose launches take a thousand times as long, remembers nothing: tests watch it choose.
    find = choice.cached_launch if sequence.is_cuda else choice.launch
    (T, B, _), (D, H, _), backward = sequence.shape, w_hh.shape, inputs is None
    return find(kernel, B, H, D, sequence.dtype, precision, backward, ragged, sequence.device, T, inputs or 0)


@functools.cache
def _module(name: str) -> ModuleType:
    # On first use: importing the package must not import Triton.
    return importlib.import_module(f"elman.{name}")


def _last(B: int, counts: Tensor | None, sequence: Tensor) -> Any:
    """What picks the rows' last steps, (B, K), out of a sequence, padded or packed."""
    if counts is None:
        return -1
    if sequence.dim() == 2:
        return packing.last(counts, B).to(sequence.device)
    return counts - 1, torch.arange(B, device=counts.device)


def _first(B: int, sequence: Tensor) -> Any:
    """What picks the rows' first steps, (B, K), out of a sequence, padded or packed."""
    return slice(B) if sequence.dim() == 2 else 0


def _later(B: int, sequence: Tensor) -> Any:
    """What picks the steps that have one before them, out of a sequence, padded or packed."""
    return slice(B if sequence.dim() == 2 else 1, None)


def _neighbours(
    B: int, counts: Tensor | None, sequence: Tensor, starts: list[Any]
) -> list[tuple[Any, Any, Any]]:
    """For each direction, what picks the steps that follow another, those that they follow, and the rest.

    In a padded batch steps past a row's length count: of a product with them either factor is zero.
    """
    later, rest = _later(B, sequence), [0, -1]
    earlier: Any = slice(None, -1)
    if sequence.dim() == 2:
        assert counts is not None
        earlier = packing.before(counts, sequence.shape[0], B).to(sequence.device)
        rest = starts
    return [(later, earlier, rest[0]), (earlier, later, rest[-1])][: len(starts)]


def _layer_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, h0, w_ih, w_hh, _, counts, resets, ctx.nonlinearity, ctx.kernel, ctx.precision = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, w_ih, w_hh, counts, resets, output[0])


def _layer_gradients(ctx: Any, g_out: Tensor | None, g_hn: Tensor | None) -> tuple[Tensor | None, ...]:
    options = (ctx.nonlinearity, ctx.kernel, ctx.precision, list(ctx.needs_input_grad[:5]))
    arguments: tuple[Any, ...] = (g_out, g_hn, *ctx.saved_tensors, *options)
    return *_gradients(*arguments), *(None,) * 5


def _gradients(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    nonlinearity: str,
    kernel: str,
    precision: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h0, w_ih, w_hh and the bias that `needs` names, None for the others."""
    if g_out is None and g_hn is None:
        return (None,) * 5
    arguments = (g_out, g_hn, output, w_hh, counts, resets, nonlinearity, kernel, precision)
    in_transform = torch._C._are_functorch_transforms_active()
    opaque = not in_transform and any(_stands_for_another(g) for g in (g_out, g_hn) if g is not None)
    with _uncast(x.device):
        if forward_ad._current_level >= 0:
            dz = _differentiable_dz(*arguments)
        elif in_transform:
            dz = _Dz.apply(*arguments)
        else:
            # What watches each operation sees ours as one, which it can do whatever is written into what.
            operator = _is_watched() or opaque or torch.is_grad_enabled()
            dz = (torch.ops.elman.layer_dz.default if operator else _layer_dz)(*arguments)
        # They have derivatives and batching rules of their own, but make a graph's code depend on T.
        rest = torch.ops.elman.layer_products if opaque else _layer_products
        found = rest(dz, x, h0, w_ih, w_hh, output, counts, resets, needs)
    return tuple(t if needed else None for t, needed in zip(found, needs, strict=True))


def _uncast(device: torch.device) -> AbstractContextManager:
    """Switches autocast off, within which a backward pass may run: it would round the products' factors."""
    if torch._C._is_any_autocast_enabled() and routing.is_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _stands_for_another(t: Tensor) -> bool:
    """Whether t is in a graph that is traced, or a batch of torch.autograd.grad(is_grads_batched=True)."""
    if torch.compiler.is_compiling() or type(t) is not Tensor:
        return True
    return torch._C._functorch.is_legacy_batchedtensor(t)


def _setup_vjp(ctx: Any, inputs: tuple, output: Any, *kept: Tensor) -> None:
    ctx.places = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
    ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places), *kept)


def _vjp_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an operator whose results `function` makes in torch's own: second derivatives."""

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments = _arguments(ctx)
        in_transform = torch._C._are_functorch_transforms_active()
        floating = [i for i in ctx.places if arguments[i].is_floating_point()]
        wanted = [i for i in floating if in_transform or ctx.needs_input_grad[i]]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            for i, tensor in zip(wanted, tensors, strict=True):
                arguments[i] = tensor
            results = function(*arguments)
            return (results,) if isinstance(results, Tensor) else results

        tensors = [arguments[i] for i in wanted]
        with _uncast(gradients[0].device):
            if in_transform:
                results, vjp, *_ = torch.func.vjp(call, *tensors)
                found = vjp(tuple(g.to(r.dtype) for g, r in zip(gradients, results, strict=True)))
            else:  # torch.func would import torch's compiler
                again = torch.is_grad_enabled()
                with torch.enable_grad():
                    tensors = [t.view_as(t) if again else t.detach().requires_grad_() for t in tensors]
                    made = zip(call(*tensors), gradients, strict=True)
                    pairs = [(r, g) for r, g in made if r.requires_grad]
                found = torch.autograd.grad(
                    [r for r, _ in pairs],
                    tensors,
                    [g.to(r.dtype) for r, g in pairs],
                    create_graph=again,
                    materialize_grads=True,  # of relu's: zeros are what nn.RNN has
                )
        by_place = dict(zip(wanted, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(arguments)))

    return backward


def _arguments(ctx: Any) -> list[Any]:
    """What an operator was called with, as `_setup_vjp` kept it."""
    arguments: list[Any] = list(ctx.others)
    for i, tensor in zip(ctx.places, ctx.saved_tensors[: len(ctx.places)], strict=True):
        arguments[i] = tensor
    return arguments


def _setup_dz(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _setup_vjp(ctx, inputs, output, output)


def _dz_gradients(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of layer_dz: a scan of its own, where nothing looks on or differentiates it again."""
    g_out, g_hn, output, w_hh, counts, resets, nonlinearity, *_ = _arguments(ctx)
    whole = counts is None and resets is None and output.dtype not in reference.COMPUTE
    plain = is_unobserved((u, *ctx.saved_tensors)) and not _stands_for_another(u)
    if not whole or not plain or torch.is_grad_enabled():
        return _vjp_of(_differentiable_dz)(ctx, u)
    needs = list(ctx.needs_input_grad[:4])
    with _uncast(u.device):
        found = eager.backward_vjp(u, g_out, g_hn, output, w_hh, ctx.saved_tensors[-1], nonlinearity, needs)
    return *found, *(None,) * 5


def _differentiable_dz(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    nonlinearity: str,
    *_: str,
) -> Tensor:
    """What `_layer_dz` returns, in torch's own operators and the precision that the kernels accumulate in."""
    compute = reference.COMPUTE.get(output.dtype, output.dtype)
    output, w_hh = output.to(compute), w_hh.to(compute)
    g_out, g_hn = (None if g is None else g.to(compute) for g in (g_out, g_hn))
    if output.dim() == 3:
        return reference.layer_dz(g_out, g_hn, output, w_hh, counts, nonlinearity, resets)
    assert counts is not None
    (output, g_out, resets), lengths, places = packing.padded(counts, int(counts[0]), output, g_out, resets)
    return packing.pack(reference.layer_dz(g_out, g_hn, output, w_hh, lengths, nonlinearity, resets), places)


def _layer_products(
    dz: Tensor,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    output: Tensor,
    counts: Tensor | None,
    resets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h0, w_ih, w_hh and bias that `needs` names, in x's dtype; None for the others.

    From dz (T, B, D * H), or packed: products over the whole sequence.
    """
    dtype, compute = x.dtype, dz.dtype
    if dtype == compute and counts is None and resets is None and _sums_well(dz):
        return whole_products(dz, x, h0, w_ih, w_hh, output, needs)
    needs_x, needs_h0, needs_w_ih, needs_w_hh, needs_bias = needs
    D, H, I = w_ih.shape
    x, h0, w_ih, w_hh, output = (t.to(compute) for t in (x, h0, w_ih, w_hh, output))
    flat, T, B = dz.flatten(0, -2), len(dz if counts is None or dz.dim() == 3 else counts), h0.shape[1]
    starts = [_first(B, dz), *([_last(B, counts, dz)] if D == 2 else [])]
    first = [dz[start][:, d * H : (d + 1) * H] for d, start in enumerate(starts)]
    if resets is not None:  # reversed, none begins anew after its last step
        anew = resets[starts[0]][:, None]
        h0 = torch.cat([h0[:1].masked_fill(anew, 0), h0[1:]])
    dx = dh0 = dw_ih = dw_hh = db = None
    if needs_x:
        dx = products.product(flat, w_ih.flatten(0, 1).t()).view(x.shape).to(dtype)
    if needs_h0:
        dh0 = _stack([f @ w for f, w in zip(first, w_hh, strict=True)])
        if resets is not None:  # not of the factor alone: zeros times infinite weights are none
            dh0 = torch.cat([dh0[:1].masked_fill(anew, 0), dh0[1:]])
        dh0 = dh0.to(dtype)
    # On the CPU both weights' products share what is prepared of dz, a direction at a time. Elsewhere W_ih's
    # is one product, for speed and for float16, which rounds every partial sum.
    together = needs_w_ih and dz.device.type == "cpu" and dtype == torch.float32
    if needs_w_ih and not together:
        dw_ih = products.sums_of_products(dz, [x], T)[0].view(D, H, I).to(dtype)
    if needs_w_hh or together:
        sums = []
        for d, (following, before, rest) in enumerate(_neighbours(B, counts, dz, starts)):
            columns = slice(d * H, (d + 1) * H)
            g = dz[..., columns]
            # h0, and the input where the direction begins, are added.
            begins = [(g[rest], x[rest])] * together + [(first[d], h0[d])] * needs_w_hh
            if T == 1:  # there is nothing else, and zeros of the weights' size would cost as much
                sums.append([a.t() @ b for a, b in begins])
                continue
            others = [x[following]] * together
            if needs_w_hh:
                h = output[..., columns][before]
                if resets is not None:
                    h = h.masked_fill(resets[_later(B, dz)][..., None], 0)
                others.append(h)
            found = products.sums_of_products(g[following], others, T)
            sums.append([torch.addmm(f, a.t(), b) for f, (a, b) in zip(found, begins, strict=True)])
        if together:
            dw_ih = _stack([found[0] for found in sums])
        if needs_w_hh:
            dw_hh = _stack([found[-1] for found in sums]).to(dtype)
    if needs_bias:
        db = flat.sum(0).view(D, H).to(dtype)
    return dx, dh0, dw_ih, dw_hh, db


def _sums_well(dz: Tensor) -> bool:
    """Whether one product adds up all rows of dz (T, B, D * H) exactly and quickly enough."""
    if dz.device.type != "cpu":
        return True  # the vendor's library does, whatever the length
    if torch._C._are_functorch_transforms_active() or type(dz) is not Tensor:
        return False  # a graph that is traced must not depend on T
    # Longer sums are cut into parts, and larger ones go to oneDNN where it is quicker: both by products.py.
    return dz.shape[0] * dz.shape[1] <= products.SHORTEST_SUM and dz.numel() * dz.shape[2] < 2**24


def whole_products(
    dz: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, output: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """As `_layer_products` where all rows have T steps, in as few operations as there can be.

    On a GPU each costs its launch.
    """
    needs_x, needs_h0, needs_w_ih, needs_w_hh, needs_bias = needs
    (D, H, I), B, T = w_ih.shape, h0.shape[1], len(dz)
    flat = dz.flatten(0, 1)
    columns = [flat] if D == 1 else [flat[:, :H], flat[:, H:]]
    begins = [slice(B), slice((T - 1) * B, None)][:D]
    others = [slice(B, None), slice((T - 1) * B)][:D]
    dx = dh0 = dw_ih = dw_hh = db = None
    if needs_x:
        dx = (flat @ w_ih.flatten(0, 1)).view(x.shape)
    if needs_h0:
        dh0 = _stack([g[begin] @ w for g, begin, w in zip(columns, begins, w_hh, strict=True)])
    if needs_w_ih:
        dw_ih = (flat.t() @ x.flatten(0, 1)).view(D, H, I)
    if needs_w_hh:
        states, sums = output.flatten(0, 1), []
        in_transform = torch._C._are_functorch_transforms_active()
        for d, (g, begin, later) in enumerate(zip(columns, begins, others, strict=True)):
            total = g[begin].t() @ h0[d]
            if T > 1:
                # In place it needs no copy, but torch.func's transforms and counters don't know that.
                add = torch.addmm if in_transform or _is_watched() else Tensor.addmm_
                before = states[others[1 - d] if D == 2 else slice((T - 1) * B)]
                total = add(total, g[later].t(), before if D == 1 else before[:, d * H : (d + 1) * H])
            sums.append(total)
        dw_hh = _stack(sums)
    if needs_bias:
        db = flat.sum(0).view(D, H)
    return dx, dh0, dw_ih, dw_hh, db


def _all_products(*arguments: Any) -> tuple[Tensor, ...]:
    """As `_layer_products`, with an empty tensor in place of None, which an operator can't return."""
    dz = arguments[0]
    return tuple(dz.new_empty(0) if t is None else t for t in _layer_products(*arguments))


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


class _Form(torch.autograd.Function):
    """An operator for torch.func's transforms, which take a Function of this form alone.

    Elsewhere the operator itself is called: this form's way through Python costs more than a short
    sequence.
    """

    generate_vmap_rule = True


class _Layer(_Form):
    forward = staticmethod(lambda *arguments: torch.ops.elman.layer(*arguments))
    setup_context = staticmethod(_layer_setup)
    backward = staticmethod(_layer_gradients)


def _in_transform(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _Layer.apply(*arguments)


def _hold_whole() -> None:
    """Has torch.compile take `_in_transform` as it is: it can't trace the backward pass of such a Function.

    It calls this while it traces, by the mark that torch.compiler.assume_constant_result makes. To say that,
    or allow_in_graph, when this file is imported would import the compiler: seconds.
    """
    torch.compiler.allow_in_graph(_in_transform)


_hold_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Dz(_Form):
    forward = staticmethod(lambda *arguments: torch.ops.elman.layer_dz(*arguments))
    setup_context = staticmethod(_setup_vjp)
    backward = staticmethod(_vjp_of(_differentiable_dz))


def _expect_one_device(first: Tensor, *others: Tensor | None) -> None:
    """For fake implementations, which torch calls where one tensor is "meta": they write no numbers."""
    for t in others:
        if t is not None and t.device != first.device:
            raise RuntimeError(
                f"a tensor of shape {tuple(t.shape)} is on {t.device} beside one on {first.device}; expected "
                "one device: move it with .to()"
            )


def _register() -> torch.library.Library:
    library = torch.library.Library("elman", "DEF")
    rest = "Tensor? counts, Tensor? resets, str nonlinearity, str kernel, str precision"
    library.define(
        f"layer(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? bias, {rest}) -> (Tensor, Tensor)"
    )
    library.define(f"layer_dz(Tensor? g_out, Tensor? g_hn, Tensor output, Tensor w_hh, {rest}) -> Tensor")
    library.define(
        "layer_products(Tensor dz, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor output, "
        "Tensor? counts, Tensor? resets, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    for name, function in (("layer", _layer), ("layer_dz", _layer_dz), ("layer_products", _all_products)):
        library.impl(name, function, "CompositeExplicitAutograd")

    @torch.library.register_fake("elman::layer", lib=library)
    def _(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision):
        _expect_one_device(x, h0, w_ih, w_hh, bias, resets)
        _tell_counters()  # a graph is made, which a counter may see later: this file isn't asked then
        D, H, _ = w_hh.shape
        return x.new_empty(*x.shape[:-1], D * H), x.new_empty(h0.shape)

    @torch.library.register_fake("elman::layer_dz", lib=library)
    def _(g_out, g_hn, output, w_hh, counts, resets, nonlinearity, kernel, precision):
        _expect_one_device(output, g_out, g_hn, w_hh, resets)
        compute = reference.COMPUTE.get(output.dtype, output.dtype) if kernel in LOOPS else output.dtype
        return output.new_empty(output.shape, dtype=compute)

    @torch.library.register_fake("elman::layer_products", lib=library)
    def _(dz, x, h0, w_ih, w_hh, output, counts, resets, needs):
        _expect_one_device(x, dz, h0, w_ih, w_hh, output, resets)
        shapes = (x.shape, h0.shape, w_ih.shape, w_hh.shape, w_hh.shape[:2])
        return tuple(
            x.new_empty(shape) if needed else dz.new_empty(0)
            for shape, needed in zip(shapes, needs, strict=True)
        )

    for name, setup, backward in (
        ("elman::layer", _layer_setup, _layer_gradients),
        ("elman::layer_dz", _setup_dz, _dz_gradients),
        ("elman::layer_products", _setup_vjp, _vjp_of(_all_products)),
    ):
        torch.library.register_autograd(name, backward, setup_context=setup, lib=library)
    torch.library.register_vmap("elman::layer", batching.layer, lib=library)
    torch.library.register_vmap("elman::layer_dz", batching.layer_dz, lib=library)
    return library


_LIBRARY = _register()
if "torch.utils.flop_counter" in sys.modules:  # for graphs that were exported elsewhere
    _tell_counters()
