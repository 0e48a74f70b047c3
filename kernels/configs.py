"""Each kernel's search space as plain data, what fits on a chip, and one config per call.

Nothing is tuned yet: `choose_*` follows rules of thumb taken from the compiler's resource reports
(tests/cross_compile.py prints them), and the search spaces are what a tuner may try.
"""

from dataclasses import dataclass

KIB = 1024
#: Shared memory one program may have: sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99 KiB, gfx942 64 KiB.
DEFAULT_LIMIT = 227 * KIB
#: Multiprocessors to keep busy, where the caller names no number.
DEFAULT_PROCESSORS = 132


@dataclass(frozen=True)
class StepConfig:
    """kernels/step.py: a program makes (BLOCK_B, BLOCK_N) of one step, adding up BLOCK_K at a time."""

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class ResidentConfig:
    """kernels/resident.py: BLOCK_B rows a program, W_hh in tiles of C x C."""

    BLOCK_B: int
    C: int
    num_warps: int = 4
    num_stages: int = 1


STEP_SPACE = {
    "BLOCK_B": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK_K": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
RESIDENT_SPACE = {"BLOCK_B": (16, 32, 64), "C": (16, 32, 64, 128), "num_warps": (4, 8)}
#: The tiles are unrolled: above 6 x 6 of them a kernel takes 10 to 20 seconds to compile.
MAX_CHUNKS = 6
#: float32 "ieee" has no tensor core. Above this H its operands do not fit in registers, whatever the blocks.
MAX_FMA_HIDDEN = 128


def choose_step(B: int, H: int, D: int, itemsize: int, processors: int = DEFAULT_PROCESSORS) -> StepConfig:
    """A forward or backward step: narrower column blocks until there is a program for each processor."""
    block_b = _power_of_two(B, 16, 64 if itemsize == 2 else 32)
    tiles = D * _ceil(B, block_b)
    # float32 without a tensor core ("ieee") spills kilobytes in larger blocks than these.
    block_n = _power_of_two(H, 16, 64 if itemsize == 2 else 32)
    while block_n > 16 and tiles * _ceil(H, block_n) < processors:
        block_n //= 2
    return StepConfig(block_b, block_n, _power_of_two(H, 16, 128 if itemsize == 2 else 32))


def choose_cell(B: int, I: int, H: int, itemsize: int, processors: int = DEFAULT_PROCESSORS) -> StepConfig:
    """The cell: the step's blocks; one BLOCK_K serves both of its sums."""
    step = choose_step(B, H, 1, itemsize, processors)
    return StepConfig(step.BLOCK_B, step.BLOCK_N, _power_of_two(max(I, H), 16, 128 if itemsize == 2 else 32))


def choose_resident(
    B: int,
    H: int,
    D: int,
    itemsize: int,
    processors: int = DEFAULT_PROCESSORS,
    limit_bytes: int = DEFAULT_LIMIT,
    precision: str = "ieee",
) -> ResidentConfig:
    """Resident: 16 rows a program, the least a tensor core takes, or more where programs would queue.

    More rows only while the state (BLOCK_B, H) stays in registers. precision as in the launchers; it
    matters for float32 alone.
    """
    chunk = _chunk(H, itemsize, precision)
    padded = _ceil(H, chunk) * chunk
    block_b = 16
    while (
        D * _ceil(B, block_b) > processors
        and block_b < (64 if itemsize == 2 else 32)
        and 2 * block_b * padded * itemsize <= 8 * KIB
        and resident_bytes(H, itemsize, precision, 2 * block_b) <= limit_bytes
    ):
        block_b *= 2
    # 8 warps for twice the registers. They share out columns, so narrow tiles leave half of them idle.
    wide = chunk >= 64 and block_b * padded > 2048
    return ResidentConfig(block_b, chunk, 8 if wide or (itemsize >= 4 and block_b * padded > 1024) else 4)


def resident_fits(
    H: int, dtype_itemsize: int, limit_bytes: int = DEFAULT_LIMIT, precision: str = "ieee"
) -> bool:
    """Whether W_hh (H, H) stays on one multiprocessor that grants limit_bytes of shared memory a program."""
    if dtype_itemsize == 4 and precision == "ieee" and H > MAX_FMA_HIDDEN:
        return False
    return resident_bytes(H, dtype_itemsize, precision) <= limit_bytes


def resident_bytes(H: int, dtype_itemsize: int, precision: str = "ieee", block_b: int = 16) -> int:
    """Shared memory of one resident program, at most: the tiles of W_hh, those of the state, and one more."""
    chunk = _chunk(H, dtype_itemsize, precision)
    chunks = _ceil(H, chunk)
    # tf32x3 splits a float32 into two, and the compiler keeps both halves of W_hh.
    copies = 2 if dtype_itemsize == 4 and precision == "tf32x3" else 1
    state = (chunks + 1) * block_b * chunk
    return (copies * (chunks * chunk) ** 2 + state) * dtype_itemsize


def _chunk(H: int, itemsize: int, precision: str) -> int:
    """The tile edge C: the least padding first, then the largest tile; at most MAX_CHUNKS a side."""
    if itemsize == 4 and precision == "ieee" and 64 < H <= MAX_FMA_HIDDEN:
        return 16  # larger tiles spill
    if H <= 16:
        return 16
    # Tiles of 16 columns would leave most warps idle.
    edges = [c for c in RESIDENT_SPACE["C"] if c >= 32 and _ceil(H, c) <= MAX_CHUNKS]
    return min(edges or RESIDENT_SPACE["C"][-1:], key=lambda c: (_ceil(H, c) * c, -c))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, kept between low and high."""
    return min(max(low, 1 << max(n - 1, 0).bit_length()), high)
