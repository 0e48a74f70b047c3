"""nn.RNN's own operator, on the parameters it has there: cuDNN on CUDA.

Two things are added to it. cuDNN refuses a backward pass outside training mode, so the operator is told
that it trains whenever a gradient is wanted, with the dropout of the mode it is really in. And it has
no second derivative, so that one is taken through `reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import reference


class Options(NamedTuple):
    """What the operator needs beside tensors; names and meaning as nn.RNN's."""

    bias: bool
    num_layers: int
    nonlinearity: str
    dropout: float
    training: bool
    bidirectional: bool


def elman(
    x: Tensor, hx: Tensor, weights: list[Tensor], lengths: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """x (T, B, I), hx (L * D, B, H), nn.RNN's flat weights -> output (T, B, D * H), h_n as hx."""
    tensors = (x, hx, *weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Operator.apply(options, lengths, *tensors)
    return _call(options, lengths, False, x, hx, *in_one_chunk([w.detach() for w in weights], options))


def _call(
    options: Options, lengths: Tensor | None, wants_gradient: bool, x: Tensor, hx: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    operator = torch.rnn_tanh if options.nonlinearity == "tanh" else torch.rnn_relu
    dropout = options.dropout if options.training else 0.0
    train = options.training or wants_gradient
    scalars = (options.bias, options.num_layers, dropout, train, options.bidirectional)
    hx = hx.contiguous()  # cuDNN takes no other
    if lengths is None:
        return operator(x, hx, weights, *scalars, False)
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    assert packed.sorted_indices is not None
    assert packed.unsorted_indices is not None
    hx = hx.index_select(1, packed.sorted_indices)
    data, h_n = operator(packed.data, packed.batch_sizes, hx, weights, *scalars)
    output, _ = pad_packed_sequence(packed._replace(data=data), total_length=len(x))
    return output, h_n.index_select(1, packed.unsorted_indices)


def in_one_chunk(weights: list[Tensor], options: Options) -> list[Tensor]:
    """The (detached) weights in the one piece of memory that cuDNN wants, as nn.RNN keeps its own.

    Weights from elsewhere (the functional form, autocast, a parametrization) lie apart, and the operator
    would gather them itself at every call, with a warning. What nn.RNN leaves alone is left alone.
    """
    apart = len({w.untyped_storage().data_ptr() for w in weights}) > 1
    if not apart or not all(torch.backends.cudnn.is_acceptable(w) for w in weights):
        return weights
    mode = torch.backends.cudnn.rnn.get_cudnn_mode(f"RNN_{options.nonlinearity.upper()}")
    per_group, (H, I) = 4 if options.bias else 2, weights[0].shape
    with torch.no_grad(), torch.cuda.device_of(weights[0]):
        torch._cudnn_rnn_flatten_weight(
            weights, per_group, I, mode, H, 0, options.num_layers, False, options.bidirectional
        )
    return weights


class _Operator(torch.autograd.Function):
    """The operator with its own graph kept inside, so that the backward pass can choose."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, lengths: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.lengths = options, lengths
        x, hx, *weights = (t.detach() for t in tensors)
        inner = [x, hx, *in_one_chunk(weights, options)]
        ctx.inner = [t.requires_grad_(n) for t, n in zip(inner, ctx.needs_input_grad[2:], strict=True)]
        with torch.enable_grad():
            ctx.results = _call(options, lengths, True, *ctx.inner)
        return ctx.results[0].detach(), ctx.results[1].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, second = ctx.saved_tensors, torch.is_grad_enabled()
        inner, results = ctx.inner, ctx.results
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:  # the memory goes with the graph, as it does for any operator
            del ctx.inner, ctx.results
        if second:
            if ctx.options.dropout and ctx.options.training:
                raise RuntimeError(
                    "a second derivative was asked for through dropout on the 'cudnn' backend, whose "
                    "dropout mask can't be had again; use backend 'eager' or 'triton', or dropout 0"
                )
            # Views, so that where one argument was computed from another each gets its own part.
            inner = [t.view_as(t) for t in saved]
            compute = reference.COMPUTE.get(saved[0].dtype, saved[0].dtype)
            x, hx, *weights = (t.to(compute) for t in inner)
            o = ctx.options
            results = reference.elman(
                x,
                hx,
                weights,
                num_layers=o.num_layers,
                bias=o.bias,
                nonlinearity=o.nonlinearity,
                bidirectional=o.bidirectional,
                lengths=ctx.lengths,
            )
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        needs = ctx.needs_input_grad[2:]
        wanted = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                [t for t, n in zip(inner, needs, strict=True) if n],
                [g.to(r.dtype) for r, g in pairs],
                create_graph=second,
                retain_graph=keep or second,
                allow_unused=True,
            )
        )
        return None, None, *(next(wanted) if n else None for n in needs)
