"""Loads and stores of single elements by whichever thread has them or wants them.

tl.load and tl.store spread a tile over the threads so that each access is wide, which is never how a
matrix product spreads it: between the two lies a trip through shared memory, with two barriers. Where a
tile is a few kilobytes and the next product waits for it, narrow accesses cost less than that trip. The
compiler gives inline assembly whatever layout its neighbours have, so that is what these are.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.constexpr_function
def load_code(bits):
    return f"ld.global.b{bits} $0, [$1];"


@triton.constexpr_function
def register(bits):
    """A register of so many bits, as inline assembly calls it."""
    return {16: "h", 32: "r", 64: "l"}[bits]


@triton.constexpr_function
def load_operands(bits):
    return f"={register(bits)},l"


@triton.constexpr_function
def store_code(bits, past_l1):
    """Inline assembly must have a result: a zero."""
    cache = ".cg" if past_l1 else ""
    return f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global{cache}.b{bits} [$1], $2; mov.b32 $0, 0; }}"


@triton.constexpr_function
def store_operands(bits):
    return f"=r,l,{register(bits)},r"


@triton.jit
def load(pointers, INTERPRET: tl.constexpr):
    """What lies at the pointers, all of which must be valid.

    Pure, so that a change of layout moves to the pointers; so nothing but the value's use keeps it in its
    place. resident, which writes over what it reads, needs it before the step's last barrier: the compile
    matrix looks.
    """
    if INTERPRET or not is_cuda():
        return tl.load(pointers)
    else:
        dtype: tl.constexpr = pointers.dtype.element_ty
        bits: tl.constexpr = dtype.primitive_bitwidth
        integer = tl.core.get_int_dtype(bits, True)
        x = tl.inline_asm_elementwise(
            load_code(bits), load_operands(bits), [pointers], integer, is_pure=True, pack=1
        )
        return x.to(dtype, bitcast=True)


@triton.jit
def store(pointers, x, mask, INTERPRET: tl.constexpr, PAST_L1: tl.constexpr = False):
    """Writes x, of the pointers' dtype, where mask."""
    if INTERPRET or not is_cuda():
        tl.store(pointers, x, mask=mask, cache_modifier=".cg" if PAST_L1 else "")
    else:
        bits: tl.constexpr = x.dtype.primitive_bitwidth
        # As numbers: pointers don't go into one piece of assembly together with anything else.
        x = x.to(tl.core.get_int_dtype(bits, True), bitcast=True)
        operands = [pointers.to(tl.int64), x, mask.to(tl.int32)]
        tl.inline_asm_elementwise(
            store_code(bits, PAST_L1), store_operands(bits), operands, tl.int32, is_pure=False, pack=1
        )
