"""A model with Elman layers as an ONNX file: each layer becomes ONNX's own RNN operator.

>>> import elman.onnx
>>> elman.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=({0: "T", 1: "B"},))

T and B may be dynamic; the runtime runs its own kernel for RNN. Where RNN can't say it, a layer is one Scan
over time for each direction: with resets, and in float64, for which onnxruntime has no RNN. recurrence="Scan"
makes it one everywhere: onnxruntime 1.32 on a CPU takes 1.5 to 4 times as long for its RNN from a batch of 4
on, but a quarter of the time for a single row. float16 and bfloat16 layers are computed in float32, and
what they return is rounded. Packed batches are padded on the way. A cell is two products and an
activation, which torch.onnx.export knows by itself.

Needs the packages onnx and onnxscript, which importing elman alone does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from onnxscript import FLOAT, graph, ir, opset18, script, values
except ImportError as error:
    raise ImportError(
        f"elman.onnx needs the packages onnx and onnxscript, and they can't be imported: {error}; "
        "install them with pip install 'elman[onnx]'"
    ) from error

from . import routing
from .functional import check_option

# torch.onnx.export's oldest; nothing used here changed later. Any: the stubs know no numbers as arguments.
op: Any = opset18


def export(
    model: Any, args: tuple[Any, ...] = (), f: Any = None, *, recurrence: str = "RNN", **options: Any
) -> Any:
    """torch.onnx.export(model, args, f, **options) with `translations(recurrence)` in its table.

    model is a module or an ExportedProgram, args its example inputs, f the file or None. Sizes that the
    option dynamic_shapes doesn't name are fixed at those of args. A custom_translation_table is asked
    before ours. recurrence: "RNN" or "Scan", see above. Returns torch.onnx.export's ONNXProgram; raises
    what it raises, and a ValueError for dynamo=False.

    torch.export can't take a model that calls pack_padded_sequence: call elman.elman with lengths instead.
    """
    if not options.pop("dynamo", True):
        raise ValueError(
            "dynamo is False, torch's older exporter, which can't be told of the operator; expected True: "
            "leave it out"
        )
    ours = translations(recurrence)
    table = ours | (options.pop("custom_translation_table", None) or {})
    try:
        return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)
    finally:  # a traceback may hold it for long
        routing.onnx_translations.discard(ours[torch.ops.elman.layer.default])


def translations(recurrence: str = "RNN") -> dict[Callable, Callable]:
    """What torch.onnx.export needs to know of this package, for its option custom_translation_table.

    While somebody holds the table, every torch.onnx.export keeps our operator and so has to be given it.
    """
    check_option("recurrence", recurrence, ("RNN", "Scan"))

    def layer(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, kernel, precision):
        # kernel and precision say how to run it, not what it is.
        return _layer(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, recurrence)

    routing.onnx_translations.add(layer)
    return {torch.ops.elman.layer.default: layer, torch.ops.aten.sort.stable: _sort}


# x and the rest are onnxscript's values, and an annotation of them would be taken for a constraint.


def _layer(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, recurrence):
    """The operator elman::layer, see ops.py."""
    if counts is None:
        return _padded(x, h0, w_ih, w_hh, bias, None, resets, nonlinearity, recurrence)
    if len(x.shape) == 3:
        output, h_n = _padded(x, h0, w_ih, w_hh, bias, counts, resets, nonlinearity, recurrence)
        return op.Where(_there(x, counts), output, op.CastLike(0.0, output)), h_n
    B = op.Squeeze(op.Shape(h0, start=1, end=2))
    there = op.Less(op.Range(0, B, 1), op.Unsqueeze(counts, [1]))  # (T, B)
    places = op.Transpose(op.NonZero(there), perm=[1, 0])  # (N, 2)
    lengths = op.ReduceSum(op.Cast(there, to=ir.DataType.INT64), [0], keepdims=0)
    shape = op.Concat(op.Shape(there), op.Shape(x, start=1), axis=0)
    x = op.ScatterND(op.CastLike(op.ConstantOfShape(shape), x), places, x)
    if resets is not None:
        resets = op.ScatterND(_nowhere(there), places, resets)
    output, h_n = _padded(x, h0, w_ih, w_hh, bias, lengths, resets, nonlinearity, recurrence)
    return op.GatherND(output, places), h_n


def _padded(x, h0, w_ih, w_hh, bias, lengths, resets, nonlinearity, recurrence):
    """As reference.layer, but that output past a row's length may be anything."""
    dtype, (D, H, _) = w_hh.dtype, w_hh.shape  # what is made here, as x may be, knows neither
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        x, h0, w_ih, w_hh = (op.Cast(t, to=ir.DataType.FLOAT) for t in (x, h0, w_ih, w_hh))
        bias = None if bias is None else op.Cast(bias, to=ir.DataType.FLOAT)
    if recurrence == "RNN" and resets is None and dtype != ir.DataType.DOUBLE:
        output, h_n = op.RNN(
            x,
            w_ih,
            w_hh,
            None if bias is None else op.Pad(bias, [0, 0, 0, H]),  # the layer's is both of nn.RNN's, added
            None if lengths is None else op.Cast(lengths, to=ir.DataType.INT32),
            h0,
            activations=[nonlinearity.title()] * D,
            direction="bidirectional" if D == 2 else "forward",
            hidden_size=H,
        )
        output = op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), [0, 0, D * H])
    else:
        if lengths is None:
            lengths = op.Expand(op.Shape(x, start=0, end=1), op.Shape(x, start=1, end=2))
        there = _there(x, lengths)
        nowhere = _nowhere(there)
        resets = nowhere if resets is None else op.And(there, op.Unsqueeze(resets, [2]))
        outputs, states = [], []
        for d in range(D):
            w, r = (op.Transpose(op.Gather(weight, d, axis=0), perm=[1, 0]) for weight in (w_ih, w_hh))
            z = op.MatMul(x, w)
            z = z if bias is None else op.Add(z, op.Gather(bias, d, axis=0))
            if d == 1:  # reversed, the step before a reset is the one that begins anew
                later = op.Slice(resets, [1], op.Shape(resets, start=0, end=1), [0])
                resets = op.Concat(later, op.Slice(nowhere, [0], [1], [0]), axis=0)
            columns, state = _SCANS[nonlinearity](
                z, op.Gather(h0, d, axis=0), r, there, resets, input_directions=[d] * 3, output_directions=[d]
            )
            outputs.append(columns)
            states.append(op.Unsqueeze(state, [0]))
        output, h_n = op.Concat(*outputs, axis=2), op.Concat(*states, axis=0)
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        output, h_n = op.Cast(output, to=dtype), op.Cast(h_n, to=dtype)
    return output, h_n


def _there(x, lengths):
    """Whether a row of x (T, B, I) has a step, (T, B, 1)."""
    steps = op.Range(0, op.Squeeze(op.Shape(x, start=0, end=1)), 1)
    return op.Unsqueeze(op.Less(op.Unsqueeze(steps, [1]), lengths), [2])


def _sort(values, *, stable, dim=-1, descending=False):
    """torch.sort, which torch.onnx.export knows in its other form alone: `lengths` are sorted by it."""
    length = op.Gather(op.Shape(values), [dim], axis=0)
    return op.TopK(values, length, axis=dim, largest=descending)  # of equal values the first comes first


def _nowhere(there):
    """False, everywhere."""
    return op.Cast(op.ConstantOfShape(op.Shape(there)), to=ir.DataType.BOOL)


def _scan(activation: str) -> Any:
    """A function of z (T, B, H), h0 (B, H), W_hh^T, and (T, B, 1) the steps that rows have and the resets.

    It returns output (T, B, H), past a row's length its last state, and h_n (B, H). directions: 0 for
    forward, 1 for reversed. FLOAT stands for any type: onnxscript counts the results by it.
    """
    act = values.Op(op, activation)

    @script(values.Opset(f"elman.{activation.lower()}", 1), default_opset=op)
    def scan(
        z, h0, r, there, resets, input_directions: Sequence[int], output_directions: Sequence[int]
    ) -> tuple[FLOAT, FLOAT]:
        @graph()
        def step(h, z_t, there_t, reset_t):
            before = op.Where(reset_t, op.CastLike(0.0, h), h)
            after = op.Where(there_t, act(op.Add(z_t, op.MatMul(before, r))), h)
            return after, op.Identity(after)

        h_n, output = op.Scan(
            h0,
            z,
            there,
            resets,
            body=step,
            num_scan_inputs=3,
            scan_input_directions=input_directions,
            scan_output_directions=output_directions,
        )
        return output, h_n

    return scan


_SCANS = {"tanh": _scan("Tanh"), "relu": _scan("Relu")}
