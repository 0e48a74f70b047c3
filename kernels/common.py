"""What the kernels share: the product, row masks, tiles of rows, and the launchers' checks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from . import configs
from .activations import activate

PRECISIONS = ("ieee", "tf32", "tf32x3")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b in acc's dtype."""
    if INTERPRET and a.dtype.primitive_bitwidth == 16:  # its 16-bit products are wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def operand(x, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """x as a product in PRECISION takes it: in tf32, rounded to nearest.

    mma.sync and wgmma cut the low bits of what they are given, and Triton rounds for tf32x3 alone.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32 and not INTERPRET and is_cuda():
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x in dtype, rounded to nearest, ties to even, as the hardware rounds."""
    if INTERPRET and dtype == tl.bfloat16:  # it only cuts the low bits off, so round them away first
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def activated(x, RELU: tl.constexpr, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """activate(x) rounded to dtype. bfloat16's tanh is the hardware's, 2^-11 off; half a unit is 2^-9.

    It is one instruction instead of two dozen, which were half of a short step.
    """
    if dtype == tl.bfloat16 and not RELU and not INTERPRET and is_cuda():
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
        return y.to(dtype)
    else:
        return rounded(activate(x, RELU), dtype, INTERPRET)


@triton.jit
def row_lengths(lengths, rb, T, B, HAS_LENGTHS: tl.constexpr):
    """Own steps of the rows rb, int32; 0 for rows past the batch: `t < length` is all the mask they need."""
    if HAS_LENGTHS:
        return tl.load(lengths + rb, mask=rb < B, other=0).to(tl.int32)
    else:
        return tl.where(rb < B, T, 0)


@triton.jit
def is_step(t, ends, rows):
    """Whether t lies in a sequence that ends at `ends`, for each of the rows.

    Compared as often as there are rows: in the interpreter of Triton 3.9 a scalar's comparison keeps the
    scalar's integer type, and is no mask.
    """
    t = tl.broadcast_to(t, rows.shape)
    return (t >= 0) & (t < ends)


@triton.jit
def is_cut(resets, t, rb, T, B):
    """Whether the rows rb begin anew at step t, so that no state passes between it and the step before."""
    return tl.load(resets + t.to(tl.int64) * B + rb, mask=(rb < B) & is_step(t, T, rb), other=0) != 0


@triton.jit
def add_product(
    acc,
    rows,
    ok,
    other_rows,
    other,
    w,
    w_k: tl.constexpr,
    w_n: tl.constexpr,
    rn,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc (BLOCK_B, BLOCK_N) + rows (BLOCK_B, K; pointers to their first elements) @ w's columns rn.

    Element (k, n) of the weight lies at w + k * w_k + n * w_n. Rows that are not ok count as zero, and with
    HAS_OTHER those that are `other` come from other_rows: not by a choice of pointers, which the AMD compiler
    can't make between two buffers.
    """
    for k in range(0, K, BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        mask = ok[:, None] & (rk[None, :] < K)
        if HAS_OTHER:
            a = tl.load(rows[:, None] + rk[None, :], mask=mask & (other == 0)[:, None], other=0.0)
            b = tl.load(other_rows[:, None] + rk[None, :], mask=mask & other[:, None], other=0.0)
            a = tl.where(other[:, None], b, a)
        else:
            a = tl.load(rows[:, None] + rk[None, :], mask=mask, other=0.0)
        offsets = rk[:, None].to(tl.int64) * w_k + rn[None, :].to(tl.int64) * w_n
        b = tl.load(w + offsets, mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        a = operand(a, PRECISION, INTERPRET)
        b = operand(b, PRECISION, INTERPRET)
        acc = dot(a, b, acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def within(t, steps):
    """The step t, or the nearest one that there is, as a 64-bit factor of a stride.

    0 where there is none: in a graph nobody has looked at the lengths, and the buffer begins there.
    """
    return tl.maximum(tl.minimum(t, steps - 1), 0).to(tl.int64)


@triton.jit
def moved_up(queue, new):
    """The queue of tiles without its first len(new), and the new ones at its end."""
    rest = ()
    for i in tl.static_range(len(new), len(queue)):
        rest += (queue[i],)
    return rest + new


@triton.jit
def clear(pointers, mask, start, stop, stride):
    """Zeros where mask, at the steps from start to stop."""
    t = start  # not the loop's own variable, which the interpreter makes a Python int
    for _ in range(stop - start):
        tl.store(
            pointers + t.to(tl.int64) * stride, tl.zeros(mask.shape, pointers.dtype.element_ty), mask=mask
        )
        t += 1


# Triton decides when a kernel is decorated; reading the environment later could disagree with it.
INTERPRETED = not isinstance(dot, triton.JITFunction)


def constants(tensor: torch.Tensor, nonlinearity: str) -> dict:
    """The constexprs that every kernel takes and that follow from the dtype and the options."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}; expected 'tanh' or 'relu'.")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"dtype {tensor.dtype} has no kernel; expected float64, float32, float16 or bfloat16."
        )
    return {
        "RELU": nonlinearity == "relu",
        "ACC": tl.float64 if tensor.dtype == torch.float64 else tl.float32,
        "INTERPRET": INTERPRETED,
    }


def expect(tensor: torch.Tensor | None, name: str, shape: tuple, like: torch.Tensor) -> None:
    """Raises unless the tensor (if there is one) has that shape and the dtype and device of `like`."""
    if tensor is not None and (
        tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device
    ):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"expected {like.dtype} {tuple(shape)} on {like.device}."
        )


def expect_sequence(
    tensor: torch.Tensor, name: str, w_hh: torch.Tensor, lengths: torch.Tensor | None
) -> tuple:
    """(T, B, D, H) of a kernel's sequence (T, B, D * H), after checking it, its weight and its lengths."""
    if w_hh.dim() != 3 or w_hh.shape[1] != w_hh.shape[2]:
        raise ValueError(f"w_hh has shape {tuple(w_hh.shape)}; expected (directions, hidden, hidden).")
    directions, hidden = w_hh.shape[:2]
    if tensor.dim() != 3:
        raise ValueError(
            f"{name} has {tensor.dim()} dimensions; expected (time, batch, directions * hidden)."
        )
    steps, batch = tensor.shape[:2]
    expect(tensor, name, (steps, batch, directions * hidden), w_hh)
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(2)} in its last dimension; expected 1.")
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int64):
        raise ValueError(
            f"lengths is {lengths.dtype} {tuple(lengths.shape)}; expected torch.int64 ({batch},)."
        )
    if lengths is not None and lengths.device != tensor.device:
        raise ValueError(f"lengths is on {lengths.device}; expected {tensor.device}, where {name} is.")
    return steps, batch, directions, hidden


def launch_options() -> dict[str, int]:
    """What the compiler is told beside the config; the registers, NVIDIA's alone.

    Triton 3.9 warns where nobody says whether multiply-adds are fused, and 3.10 no longer fuses them.
    """
    if INTERPRETED:
        return {}
    registers = {} if torch.version.hip else {"maxnreg": configs.MAXNREG}
    return {"enable_fp_fusion": True, **registers}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict,
) -> None:
    """kernel[grid](*arguments, **options), from the second time on without Triton's way to what it compiled.

    That costs the host more than a torch operation does, most of it to find out what the arguments are. The
    tensors come first, then the numbers that the kernel isn't specialized for, then the others. Only what
    Triton compiles the same for all is cached: aligned pointers, and these others by their very values.
    """
    if INTERPRETED or torch.version.hip or type(kernel) is not triton.JITFunction or kernel.pre_run_hooks:
        kernel[grid](*arguments, **options)
        return
    tensors = [a for a in arguments if not isinstance(a, int)]
    numbers = arguments[len(tensors) :]
    if id(kernel) not in _known:  # which holds it, so that the number stays its own
        _known[id(kernel)] = kernel, sum(p.do_not_specialize for p in kernel.params), {}
    _, free, compiled = _known[id(kernel)]
    places = 0
    for t in tensors:
        places |= t.data_ptr()
    if places % 16 or max(numbers[:free]) >= 2**31:
        kernel[grid](*arguments, **options)
        return
    dtypes = tuple([t.dtype for t in tensors])
    key = (tensors[0].device.index, dtypes, numbers[free:], tuple(options.values()))
    found = compiled.get(key)
    if found is None:
        binary = kernel[grid](*arguments, **options)
        constexprs = tuple(options.get(name) for name in kernel.arg_names[len(arguments) :])
        if len(compiled) > 4096:
            compiled.clear()
        if binary is not None:
            compiled[key] = binary, constexprs
        return
    binary, constexprs = found
    binary[(*grid, 1, 1)[:3]](*arguments, *constexprs)


_known: dict[int, tuple[triton.JITFunction, int, dict]] = {}
_NOTHING = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def backward_arguments(
    g_out: torch.Tensor | None,
    g_hn: torch.Tensor | None,
    output: torch.Tensor,
    w_hh: torch.Tensor,
    dz: torch.Tensor,
    lengths: torch.Tensor | None,
    nonlinearity: str,
    precision: str,
    resets: torch.Tensor | None,
    *,
    transposed: bool = False,
) -> tuple[configs.Problem, tuple[torch.Tensor, ...], tuple[int, ...], dict]:
    """After checking them, a scan_backward's Problem, and its kernel's tensors, their strides and constexprs.

    dz stands in for a tensor that there is none of: a constexpr says that it isn't read. transposed: the
    kernel takes W_hh transposed.
    """
    _, B, D, H = expect_sequence(output, "output", w_hh, lengths)
    expect_sequence(dz, "dz", w_hh, lengths)
    expect(dz, "dz", output.shape, output)
    expect(g_out, "g_out", output.shape, output)
    expect(g_hn, "g_hn", (D, B, H), output)
    options = constants(dz, nonlinearity) | {
        "H": H,
        "HAS_G_OUT": g_out is not None,
        "HAS_G_HN": g_hn is not None,
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESETS": resets is not None,
    }
    ragged = lengths is not None or resets is not None
    problem = problem_of(dz, B, H, D, precision, backward=True, ragged=ragged)
    g_out = g_out if g_out is not None else dz
    g_hn = g_hn.contiguous() if g_hn is not None else dz
    w_hh = (w_hh.mT if transposed else w_hh).contiguous()
    rows = row_arguments(lengths, resets, dz)
    strides = (*g_out.stride(), *output.stride()[:2], *dz.stride()[:2])
    return problem, (g_out, g_hn, output, w_hh, dz, *rows), strides, options


def row_arguments(
    lengths: torch.Tensor | None, resets: torch.Tensor | None, sequence: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' lengths and resets, the sequence standing in for what there is none of.

    Raises unless resets is bool (T, B), on the device of the sequence (T, B, ...).
    """
    lengths = lengths.contiguous() if lengths is not None else sequence
    if resets is None:
        return lengths, sequence
    shape = sequence.shape[:2]
    if resets.shape != shape or resets.dtype != torch.bool:
        raise ValueError(
            f"resets is {resets.dtype} {tuple(resets.shape)}; expected torch.bool {tuple(shape)}."
        )
    if resets.device != sequence.device:
        raise ValueError(f"resets is on {resets.device}; expected {sequence.device}, where the sequence is.")
    # Of 32 bits: a product whose operand depends on a load of fewer is laid out for these, and of float64 not
    # at all. A copy also because Triton compiles anew for a pointer that is aligned less.
    return lengths, resets.to(torch.int32).contiguous()


def problem_of(
    tensor: torch.Tensor,
    B: int,
    H: int,
    D: int,
    precision: str,
    *,
    backward: bool = False,
    inputs: int = 0,
    ragged: bool = False,
) -> configs.Problem:
    """The Problem of a launch on tensors like this one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    return configs.Problem(B, H, D, tensor.dtype, precision, backward, inputs, ragged)


def chip(device: torch.device) -> configs.Chip:
    """The Chip that a device is; on a CPU, for the interpreter, the default one."""
    if device.type != "cuda":
        return configs.DEFAULT_CHIP
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    known = properties.gcnArchName.split(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
    like = configs.CHIPS.get(known, configs.CHIPS["gfx942" if amd else "sm_80"])
    # ROCm's properties have no opt-in limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return _chip(like, properties.name, properties.multi_processor_count, shared)


@lru_cache
def _chip(like: configs.Chip, name: str, processors: int, shared: int) -> configs.Chip:
    return replace(like, name=name, processors=processors, shared=shared)
