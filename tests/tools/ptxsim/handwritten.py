"""PTX written by hand, for the emulator's tests: it is launched with two tensors, x and y."""

from __future__ import annotations

import numpy as np

from . import parser, tensor_cores
from .machine import Machine, Options, Storage
from .program import Program

#: The element of x or y that is a thread's.
ADDRESSES = """\
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd10, %r1, 4;
add.s64 %rd11, %rd1, %rd10;
add.s64 %rd12, %rd2, %rd10;
"""
#: Program 0 goes on, program 1 jumps.
PROGRAM = """\
mov.u32 %r2, %ctaid.x;
setp.ne.u32 %p1, %r2, 0;
@%p1 bra $L1;
"""


def words(n, value=0):
    return np.full(n, value, np.uint32)


def launch(body, x, y, *, threads=32, grid=(1,), shared=0, fresh=False, poison=None, **options):
    """Runs the body, where %rd1 and %rd2 are the addresses of x and y. fresh: nobody has written x."""
    text = (
        ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
        f".visible .entry k(.param .u64 k_x, .param .u64 k_y) .reqntid {threads} {{\n"
        ".reg .pred %p<20>; .reg .b32 %r<60>; .reg .b64 %rd<40>; .reg .f32 %f<9>;\n"
        f"ld.param.b64 %rd1, [k_x];\nld.param.b64 %rd2, [k_y];\n{body}\nret;\n}}"
    )
    init = np.zeros(x.nbytes, bool) if fresh else None
    bases = {"k_x": 1 << 20, "k_y": 2 << 20}
    storages = {
        bases["k_x"]: Storage(x.view(np.uint8), "x", None, init),
        bases["k_y"]: Storage(y.view(np.uint8), "y", None, None),
    }
    made = Options(**options)
    machine = Machine(
        Program(parser.parse(text), made.by_warp), grid, threads, shared, bases, storages, made,
        unit=tensor_cores.UNITS[90], together=grid[0] > 1,
    )  # fmt: skip
    for region in machine.memory.regions:
        region.poison = (poison or {}).get(region.name, set())
    machine.run()
    return machine


def kinds(machine):
    return {kind for kind, _, _ in machine.reports.found}


def racy(machine):
    return {region.name: region.racy for region in machine.memory.regions if region.racy}
