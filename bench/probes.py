"""What a step can't do without, as kernels that do nothing else. bench/floor.py times them.

    empty_kernel     nothing: what a launch costs
    chain_kernel     a step on one multiprocessor: the smallest product, tanh, rounding, the state handed over
    meeting_kernel   a step on several: every program says that it is there, and waits for all the others

They are made of the real kernels' own parts, so that none of these can do the same in less time.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from elman.kernels import cooperative
from elman.kernels.common import INTERPRETED, activated, dot, launch_options
from elman.kernels.errors import DeviceHangError
from elman.kernels.resident import held

#: Rows of the chain's state for each of its warps: the fewest that a tensor core takes.
CHAIN_ROWS = 16


@triton.jit
def empty_kernel():
    pass


@triton.jit(do_not_specialize=["T"])
def chain_kernel(
    state,
    weight,
    T,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HELD: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """state (SIZE, BLOCK_B) after T steps of h = act(weight @ h), rounded at each, in its own memory."""
    rn, rb = tl.arange(0, SIZE), tl.arange(0, BLOCK_B)
    w = tl.load(weight + rn[:, None] * SIZE + rn[None, :])
    if HELD:
        w = held(w, BLOCK_B)
    tile = state + rn[:, None] * BLOCK_B + rb[None, :]
    h = tl.load(tile)
    for _ in range(T):
        product = dot(w, h, tl.zeros((SIZE, BLOCK_B), tl.float32), "ieee", INTERPRET)
        h = activated(product, RELU, state.dtype.element_ty, INTERPRET)
    tl.store(tile, h)


@triton.jit(do_not_specialize=["T", "patience"])
def meeting_kernel(
    slots,
    count,
    status,
    T,
    patience,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAG: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """T meetings of all programs. FLAG: by a number of each in the step's row of slots, else by count."""
    EMPTY: tl.constexpr = -1
    CHUNKS: tl.constexpr = 1 if FLAG else 0  # the counter needs no data
    row = slots + tl.arange(0, 1)
    there = tl.full((1,), 1, tl.int1)
    target = tl.full([], 0, tl.int64)
    for _ in range(T):
        own = row[:, None] + tl.program_id(0)
        number = tl.zeros((1, 1), tl.float32)
        cooperative.send(
            own, number, there[:, None] & FLAG, count, patience, FLAG, tl.int32, EMPTY, INTERPRET
        )  # fmt: skip
        target += PROGRAMS
        _, patience = cooperative.receive(
            row, there, there, count, target, status, patience, 0, CHUNKS,
            PROGRAMS, 1, BLOCK, 1, FLAG, tl.int32, EMPTY, INTERPRET,
        )  # fmt: skip
        row += PROGRAMS


def empty() -> None:
    """One launch of nothing on the current CUDA device."""
    empty_kernel[(1,)](num_warps=1)


class Chain:
    """chain_kernel on numbers of its own: Chain(device)(steps) is a launch that is ready to go.

    One warp hands its state over by itself; two are the fewest that need a barrier for it.
    """

    def __init__(self, device: torch.device, warps: int = 2, relu: bool = False) -> None:
        self.warps, self.relu = warps, relu
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> torch.Tensor:
            values = 2 * torch.rand(shape, generator=generator) - 1
            return values.to(device, torch.bfloat16)

        # AMD's matrix instructions have 16 columns, NVIDIA's 8.
        size = CHAIN_ROWS * warps
        self.state = uniform(size, 16 if torch.version.hip else 8)
        self.weight = uniform(size, size)

    def __call__(self, steps: int) -> Callable[[], object]:
        SIZE, BLOCK_B = self.state.shape
        constants = {"SIZE": SIZE, "BLOCK_B": BLOCK_B, "RELU": self.relu, "INTERPRET": INTERPRETED}
        constants["HELD"] = not (INTERPRETED or torch.version.hip)
        options = {"num_warps": self.warps, "num_stages": 1, **launch_options()}
        return lambda: chain_kernel[(1,)](self.state, self.weight, steps, **constants, **options)


class Meeting:
    """meeting_kernel with so many programs: Meeting(...)(steps) is a launch, good for once.

    flag: which of cooperative's two ways to meet. Triton raises RuntimeError where so many programs can't be
    on the chip together.
    """

    def __init__(self, device: torch.device, programs: int, flag: bool) -> None:
        self.device, self.programs, self.flag = device, programs, flag
        self.patience = cooperative.PATIENCE
        self.status = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(self, steps: int) -> Callable[[], object]:
        count = torch.zeros(2, dtype=torch.int64, device=self.device)
        shape = (steps if self.flag else 1, self.programs)
        slots = torch.full(shape, -1, dtype=torch.int32, device=self.device).view(torch.float32)
        constants = {
            "PROGRAMS": self.programs,
            "BLOCK": triton.next_power_of_2(self.programs),
            "FLAG": self.flag,
            "INTERPRET": INTERPRETED,
        }
        options = {} if INTERPRETED else {"launch_cooperative_grid": True, **launch_options()}
        options |= {"num_warps": 1, "num_stages": 1}
        tensors = slots, count, self.status
        programs = 1 if INTERPRETED else self.programs  # the interpreter runs one after another
        return lambda: meeting_kernel[(programs,)](*tensors, steps, self.patience, **constants, **options)

    def check(self) -> None:
        """Raises DeviceHangError if programs of a launch waited in vain, so that its time means nothing."""
        if self.status[0].item():
            raise DeviceHangError(
                f"{self.programs} programs that do nothing but meet waited in vain for one of their own and "
                f"gave up after {self.patience} looks, so there is no floor. A debugger that holds a program "
                "does this; if none did, report it."
            )
