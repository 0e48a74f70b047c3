"""The layer as two torch.library operators, with their fake implementations and their derivatives.

    elman::layer      x, h0, weights -> output, h_n      one layer, all its directions, any kernel
    elman::layer_dz   g_out, g_hn, output, w_hh -> dz    its backward scan

Where rows differ in length, `counts` is int64 and says how: the kernels take a padded x (T, B, I) and the
rows' lengths (B,), eager a packed x (N, I) and its sizes (T,), see packing.py; otherwise it is None.

Only the scans depend on the kernel. What is left of the backward pass is products over the whole
sequence, the vendor's library's work. Saved for it are the input, the weights and the output, nothing
else: act' follows from the output.

`kernel` is "eager", the name of a module of elman.kernels ("resident", "cooperative", "step"), "triton": the
quickest of these for each pass, or "cell": the step kernel with the input product in the same launch,
for T = 1 and D = 1, where "triton" and "step" take it too. The config is chosen when a kernel runs: an
operator's schema holds none.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import eager, packing, reference

if TYPE_CHECKING:
    from .kernels import configs


def layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """output (T, B, D * H), or packed, and h_n (D, B, H) of one layer, arguments as `reference.layer`'s.

    counts and kernel as above; precision, "ieee", "tf32" or "tf32x3", is that of a float32 product in Triton.
    """
    arguments = (x, h0, w_ih, w_hh, bias, counts, nonlinearity, kernel, precision)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.elman.layer(*arguments)
    if forward_ad._current_level >= 0:
        # The operator has no forward-mode derivative, and would drop a tangent without a word.
        if x.dim() == 3:
            return reference.layer(x, h0, w_ih, w_hh, bias, counts, nonlinearity)
        assert counts is not None
        x, lengths, places = _pad(x, counts, h0.shape[1])
        output, h_n = reference.layer(x, h0, w_ih, w_hh, bias, lengths, nonlinearity)
        return packing.pack(output, places), h_n
    if torch._C._are_functorch_transforms_active():
        return _Layer.apply(*arguments)
    if torch.is_grad_enabled() or type(x) is not Tensor:
        return torch.ops.elman.layer.default(*arguments)
    return _layer(*arguments)  # with nothing to record, the dispatcher only costs time


def _layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    if kernel == "eager":
        output = eager.forward(x, h0, w_ih, w_hh, bias, counts, nonlinearity)
    else:
        output = _scan(x, h0, w_ih, w_hh, bias, counts, nonlinearity, kernel, precision)
    B, (D, H, _) = h0.shape[1], w_hh.shape
    # Reversed, the last step is the first; a copy even of one, as h_n may be written into.
    ends = [_last(B, counts, output), _first(B, output)][:D]
    return output, torch.cat([output[end][None, :, d * H : (d + 1) * H] for d, end in enumerate(ends)])


def _scan(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> Tensor:
    """The output (T, B, D * H) by a Triton kernel."""
    from . import choice  # not above: importing elman must not import Triton

    T, _, I = x.shape
    name, problem = choice.plan(kernel, _problem(x, w_hh, lengths, precision), x.device, T, I)
    config = choice.config(name, problem, x.device)
    if name == "cell":
        output, b = x.new_empty(1, x.shape[1], w_hh.shape[1]), None if bias is None else bias[0]
        _module("step").cell(x[0], h0[0], w_ih[0], w_hh[0], b, output[0], nonlinearity, precision, config)
        return output
    module = _module(name)
    if problem.inputs:
        return module.scan_fused(x, w_ih, bias, h0, w_hh, lengths, nonlinearity, precision, config)
    z = eager.project(x, w_ih, bias)
    return module.scan(z, h0, w_hh, lengths, nonlinearity, precision, config)


def _layer_dz(
    g_out: Tensor | None,
    g_hn: Tensor | None,
    output: Tensor,
    w_hh: Tensor,
    counts: Tensor | None,
    nonlinearity: str,
    kernel: str,
    precision: str,
) -> Tensor:
    if kernel == "eager":
        return eager.backward(g_out, g_hn, output, w_hh, counts, nonlinearity)
    from . import choice

    dz = torch.empty_like(output)
    problem = _problem(output, w_hh, counts, precision, backward=True)
    name, problem = choice.plan(kernel, problem, output.device, len(output))
    config = choice.config(name, problem, output.device)
    _module(name).scan_backward(g_out, g_hn, output, w_hh, dz, counts, nonlinearity, precision, config)
    return dz


def _problem(
    sequence: Tensor, w_hh: Tensor, lengths: Tensor | None, precision: str, **more: Any
) -> configs.Problem:
    """What a scan over (T, B, ...) with w_hh (D, H, H) chooses its kernel and config for."""
    from .kernels.configs import Problem

    D, H, _ = w_hh.shape
    precision = precision if sequence.dtype == torch.float32 else "ieee"
    return Problem(sequence.shape[1], H, D, sequence.dtype, precision, ragged=lengths is not None, **more)


def _module(kernel: str) -> ModuleType:
    # On first use: importing the package must not import Triton.
    return importlib.import_module(f"elman.kernels.{kernel}")


def _pad(x: Tensor, sizes: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor]:
    """A packed x (N, K) padded, its rows' lengths, and the places of what was packed."""
    places = packing.places(sizes, B).to(x.device)
    return packing.pad(x, places, len(sizes), B), packing.lengths(sizes, B).to(x.device), places


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


def _neighbours(
    B: int, counts: Tensor | None, sequence: Tensor, starts: list[Any]
) -> list[tuple[Any, Any, Any]]:
    """For each direction, what picks the steps that follow another, those that they follow, and the rest.

    In a padded batch steps past a row's length count: of a product with them either factor is zero.
    """
    later: Any = slice(1, None)
    earlier: Any = slice(None, -1)
    rest = [0, -1]
    if sequence.dim() == 2:
        assert counts is not None
        later, earlier = slice(B, None), packing.before(counts, sequence.shape[0], B).to(sequence.device)
        rest = starts
    return [(later, earlier, rest[0]), (earlier, later, rest[-1])][: len(starts)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, h0, w_ih, w_hh, bias, counts, ctx.nonlinearity, ctx.kernel, ctx.precision = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, w_ih, w_hh, bias, counts, output[0])


def _backward(ctx: Any, g_out: Tensor | None, g_hn: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h0, w_ih, w_hh, bias, counts, output = ctx.saved_tensors
    needs_x, needs_h0, needs_w_ih, needs_w_hh, needs_bias = ctx.needs_input_grad[:5]
    none: tuple[Tensor | None, ...] = (None,) * 9
    if g_out is None and g_hn is None:
        return none
    dtype, places = x.dtype, None
    if torch.is_grad_enabled():
        # A second derivative is wanted, and it flows through the state too: redo both scans in
        # differentiable torch, in the precision that the kernels accumulate in.
        compute = reference.COMPUTE.get(x.dtype, x.dtype)
        x, h0, w_ih, w_hh = (t.to(compute) for t in (x, h0, w_ih, w_hh))
        b = None if bias is None else bias.to(compute)
        g_out, g_hn = (None if g is None else g.to(compute) for g in (g_out, g_hn))
        if x.dim() == 2:
            g_out = None if g_out is None else _pad(g_out, counts, h0.shape[1])[0]
            x, counts, places = _pad(x, counts, h0.shape[1])
        output, _ = reference.layer(x, h0, w_ih, w_hh, b, counts, ctx.nonlinearity)
        dz = reference.layer_dz(g_out, g_hn, output, w_hh, counts, ctx.nonlinearity)
    else:
        dz = torch.ops.elman.layer_dz(
            g_out, g_hn, output, w_hh, counts, ctx.nonlinearity, ctx.kernel, ctx.precision
        )
    compute = dz.dtype
    D, H, I = w_ih.shape
    x, h0, w_ih, w_hh, output = (t.to(compute) for t in (x, h0, w_ih, w_hh, output))
    flat, T, B = dz.reshape(-1, D * H), (dz if dz.dim() == 3 else counts).shape[0], h0.shape[1]
    starts = [_first(B, dz), *([_last(B, counts, dz)] if D == 2 else [])]
    first = [dz[start][:, d * H : (d + 1) * H] for d, start in enumerate(starts)]
    dx = dh0 = dw_ih = dw_hh = db = None
    if needs_x:
        dx = eager.product(flat, w_ih.flatten(0, 1).t()).view(x.shape).to(dtype)
        dx = dx if places is None else packing.pack(dx, places)
    if needs_h0:
        dh0 = _stack([f @ w for f, w in zip(first, w_hh, strict=True)]).to(dtype)
    # On the CPU both weights' products share what is prepared of dz, a direction at a time. Elsewhere W_ih's
    # is one product, for speed and for float16, which rounds every partial sum.
    together = needs_w_ih and dz.device.type == "cpu" and dtype == torch.float32
    if needs_w_ih and not together:
        dw_ih = eager.sums_of_products(dz, [x], T)[0].view(D, H, I).to(dtype)
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
            others = [x[following]] * together + [output[..., columns][before]] * needs_w_hh
            found = eager.sums_of_products(g[following], others, T)
            sums.append([torch.addmm(f, a.t(), b) for f, (a, b) in zip(found, begins, strict=True)])
        if together:
            dw_ih = _stack([found[0] for found in sums])
        if needs_w_hh:
            dw_hh = _stack([found[-1] for found in sums]).to(dtype)
    if needs_bias:
        db = flat.sum(0).view(D, H).to(dtype)
    return dx, dh0, dw_ih, dw_hh, db, *none[5:]


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


class _Layer(torch.autograd.Function):
    """The operator for torch.func's transforms, which take a Function of this form alone.

    Elsewhere the operator itself is called: this form's way through Python costs more than a short
    sequence.
    """

    forward = staticmethod(lambda *arguments: torch.ops.elman.layer(*arguments))
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    generate_vmap_rule = True


def _register() -> torch.library.Library:
    library = torch.library.Library("elman", "DEF")
    library.define(
        "layer(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? bias, Tensor? counts, "
        "str nonlinearity, str kernel, str precision) -> (Tensor, Tensor)"
    )
    library.define(
        "layer_dz(Tensor? g_out, Tensor? g_hn, Tensor output, Tensor w_hh, Tensor? counts, "
        "str nonlinearity, str kernel, str precision) -> Tensor"
    )
    library.impl("layer", _layer, "CompositeExplicitAutograd")
    library.impl("layer_dz", _layer_dz, "CompositeExplicitAutograd")

    @torch.library.register_fake("elman::layer", lib=library)
    def _(x, h0, w_ih, w_hh, bias, counts, nonlinearity, kernel, precision):
        D, H, _ = w_hh.shape
        return x.new_empty(*x.shape[:-1], D * H), x.new_empty(h0.shape)

    @torch.library.register_fake("elman::layer_dz", lib=library)
    def _(g_out, g_hn, output, w_hh, counts, nonlinearity, kernel, precision):
        compute = reference.COMPUTE.get(output.dtype, output.dtype) if kernel == "eager" else output.dtype
        return output.new_empty(output.shape, dtype=compute)

    torch.library.register_autograd("elman::layer", _backward, setup_context=_setup_context, lib=library)
    return library


_LIBRARY = _register()
