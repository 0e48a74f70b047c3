"""Each kernel's search space as plain data, and the resource model that prunes and orders it.

    Problem                 what a config is chosen for
    Chip                    what the choice depends on in the hardware
    StepConfig, ...         a kernel's blocks: its constexprs by name, then num_warps and num_stages
    estimate(...)           shared memory, programs, waves and microseconds a step of one config, or why not
    candidates(...)         the configs that the model lets through, the one it likes best first
    choose(...)             its first choice
    checked(...)            a config that a launcher was given, or that choice

The model orders and prunes; it is not a measurement, and no table of results shows it as one.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

KIB = 1024
# Triton's version by its distribution, not by an import: the tables are read where there is no Triton, too.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")
_VERSIONS = [d.version for name in _DISTRIBUTIONS for d in importlib.metadata.distributions(name=name)]
#: (major, minor) of the Triton that is installed; of an unknown one, the newest that the model knows.
TRITON = tuple(int(n) for n in re.findall(r"\d+", next(filter(None, _VERSIONS), "3.9"))[:2])
KERNELS = ("resident", "cooperative", "step")


@dataclass(frozen=True)
class Problem:
    """One kernel's work: B rows, H hidden, D directions, and the arithmetic.

    precision, of float32 products: "tf32", or "ieee" for an IEEE-class product, which leaves the config free
    to take "ieee" or "tf32x3"; "tf32x3" pins that. inputs: I where the kernel makes the input product
    too (the cell, a fused resident forward), else 0. ragged: rows end at lengths of their own.
    """

    B: int
    H: int
    D: int = 1
    dtype: torch.dtype = torch.float32
    precision: str = "ieee"
    backward: bool = False
    inputs: int = 0
    ragged: bool = False


@dataclass(frozen=True)
class Chip:
    """A GPU as the model sees it, from NVIDIA's and AMD's data sheets."""

    name: str
    processors: int
    #: Shared memory in bytes that one program may have.
    shared: int
    ghz: float = 1.7
    #: Whether Triton multiplies float32 in tensor cores there ("tf32", "tf32x3").
    tf32: bool = True
    #: Whether all processors see one L2, which is where cooperative programs meet.
    one_l2: bool = True
    #: What multiplies 64 rows by 16 columns and more; smaller products take mma on all of NVIDIA's.
    unit: str = "mma"


#: Compile targets, each with its commonest GPU: A100, RTX 3090, RTX 4090, H100/H200, B200, MI300X.
CHIPS = {
    "sm_80": Chip("sm_80", 108, 163 * KIB, 1.41),
    "sm_86": Chip("sm_86", 82, 99 * KIB, 1.70),
    "sm_89": Chip("sm_89", 128, 99 * KIB, 2.52),
    "sm_90": Chip("sm_90", 132, 227 * KIB, 1.75, unit="wgmma"),
    "sm_100": Chip("sm_100", 148, 227 * KIB, 1.85, unit="tcgen05"),
    "gfx942": Chip("gfx942", 304, 64 * KIB, 2.10, tf32=False, one_l2=False, unit="mfma"),
}
#: What the interpreter pretends to be.
DEFAULT_CHIP = CHIPS["sm_90"]


@dataclass(frozen=True)
class StepConfig:
    """kernels/step.py: a program makes (BLOCK_B, BLOCK_N) of one step, adding up BLOCK_K at a time."""

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    PRECISION: str = "ieee"
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class ResidentConfig:
    """kernels/resident.py: BLOCK_B batch rows a program, H in tiles of C.

    The first HELD rows of W_hh's tiles stay in registers, the others in shared memory. What a step reads is
    fetched AHEAD steps before it. With one row the kernel is that of kernels/vector.py.
    """

    BLOCK_B: int
    C: int
    HELD: int = 0
    AHEAD: int = 1
    PRECISION: str = "ieee"
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class CooperativeConfig:
    """kernels/cooperative.py: a program makes BLOCK_N columns of the state of BLOCK_B rows at every step.

    It adds up H in chunks of BLOCK_K, each in one part per warp. The last STREAMED chunks of its slice of
    W_hh are read again every step, the others stay on chip. FLAG: the data is its own flag; otherwise
    the programs meet at a counter.
    """

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    CHUNKS: int
    STREAMED: int = 0
    FLAG: bool = True
    PRECISION: str = "ieee"
    num_warps: int = 8
    num_stages: int = 1


Config = StepConfig | ResidentConfig | CooperativeConfig

STEP_SPACE = {
    "BLOCK_B": (16, 32, 64),
    "BLOCK_N": (16, 32, 64),
    "BLOCK_K": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (3,),
}
RESIDENT_SPACE = {
    "BLOCK_B": (1, 8, 16, 32, 64),
    "C": (16, 32, 64, 128),
    "HELD": (0, 1, 2, 3),
    "AHEAD": (1, 2, 4),
    "num_warps": (1, 2, 4, 8),
}
COOPERATIVE_SPACE = {
    "BLOCK_B": (8, 16, 32),
    "BLOCK_N": (16, 32, 64),
    "BLOCK_K": (64, 128, 256, 512, 1024),
    "CHUNKS": (1,),
    "FLAG": (True, False),
    "num_warps": (8, 4),
}
_SPACES = {
    "step": (StepConfig, STEP_SPACE),
    "resident": (ResidentConfig, RESIDENT_SPACE),
    "cooperative": (CooperativeConfig, COOPERATIVE_SPACE),
}
#: Registers a thread may have, by the model's rough count, before it spills.
MAX_REGISTERS = 225
#: What the compiler is told: left alone it saves registers for a second program that never comes.
MAXNREG = 255
#: Fields that choose between ways to do the same, which the model can't tell apart.
VARIANTS = ("FLAG", "AHEAD")
#: A key has at most this many candidates: what a tuner times, and what the compile matrix compiles.
MAX_CANDIDATES = 4


@dataclass(frozen=True)
class Estimate:
    """What the model expects of a config: shared memory in bytes at most, registers a thread, programs
    launched, waves of them, and microseconds a step of the whole launch."""

    shared: int
    registers: int
    programs: int
    waves: int
    us: float


def space(kernel: str, problem: Problem, chip: Chip) -> Iterator[Config]:
    """Every config of the kernel's search space whose arithmetic is the one that the problem asks for."""
    make, axes = _SPACES[kernel]
    for values in itertools.product(*axes.values()):
        for precision in precisions_of(kernel, problem, chip):
            config = make(**dict(zip(axes, values, strict=True)), PRECISION=precision)
            yield _fit_cooperative(config, problem, chip) if kernel == "cooperative" else config


@lru_cache(maxsize=4096)
def candidates(
    kernel: str, problem: Problem, chip: Chip = DEFAULT_CHIP
) -> tuple[tuple[Config, Estimate], ...]:
    """The configs that the model lets through with what it expects of them, quickest first; () if none fits.

    At most MAX_CANDIDATES, taken in turn from the variants that only a GPU can compare, and of those
    that differ in BLOCK_K or num_warps alone the best.
    """
    judged = ((config, estimate(kernel, config, problem, chip)) for config in space(kernel, problem, chip))
    fitting = sorted(((c, e) for c, e in judged if isinstance(e, Estimate)), key=lambda pair: pair[1].us)
    variants: dict[tuple, dict[tuple, tuple[Config, Estimate]]] = {}
    for config, expected in fitting:
        blocks = tuple(getattr(config, name, None) for name in ("BLOCK_B", "BLOCK_N", "C"))
        variant = tuple(getattr(config, name, None) for name in VARIANTS)
        variants.setdefault(variant, {}).setdefault(blocks, (config, expected))
    turns = itertools.zip_longest(*(v.values() for v in variants.values()))
    chosen = [pair for turn in turns for pair in turn if pair][:MAX_CANDIDATES]
    return tuple(sorted(chosen, key=lambda pair: pair[1].us))


def choose(kernel: str, problem: Problem, chip: Chip = DEFAULT_CHIP) -> Any:
    """The model's first choice, of the kernel's class of config. Raises ValueError where no config fits."""
    found = candidates(kernel, problem, chip)
    if not found:
        raise ValueError(f"kernel {kernel!r} has no config for {problem} that fits on {chip.name}.")
    return found[0][0]


def estimate(kernel: str, config: Config, problem: Problem, chip: Chip = DEFAULT_CHIP) -> Estimate | str:
    """What the model expects of a config of `kernel`, or why it is not for this problem."""
    judge: dict[str, Callable[..., Estimate | str]] = {
        "step": _estimate_step,
        "resident": _estimate_resident,
        "cooperative": _estimate_cooperative,
    }
    return judge[kernel](config, problem, chip)


#: Why tensor cores want C = 16 * num_warps of resident, and what one row a program wants of it.
REPEATED = "each warp has 16 rows of a tile to itself; others would repeat its work"
ONE_TILE = "the state is one tile, with a thread for each of its elements"


def misfit(config: Config, problem: Problem) -> str | None:
    """Why no launcher takes the config, on whatever GPU: its blocks don't go together. None if they do."""
    if isinstance(config, ResidentConfig) and config.BLOCK_B == 1:
        if problem.dtype != torch.float32 or config.PRECISION != "ieee":
            return "one row a program is for float32 in plain multiply-adds"
        if config.C < problem.H or config.C != 32 * config.num_warps:
            return ONE_TILE
    elif isinstance(config, ResidentConfig):
        tensor_cores = problem.dtype.itemsize == 2 or config.PRECISION != "ieee"
        if config.C > max(16, _power_of_two(problem.H)):
            return f"a tile of {config.C} is wider than the {problem.H} it cuts"
        if tensor_cores and config.C < 16 * config.num_warps:
            return REPEATED
        if config.HELD > _ceil(problem.H, config.C):
            return f"there are no {config.HELD} rows of tiles to hold"
    if isinstance(config, CooperativeConfig) and config.num_warps * 16 > config.BLOCK_K:
        return f"a chunk of {config.BLOCK_K} leaves some of {config.num_warps} warps without a part"
    return None


def checked(kernel: str, config: Any, problem: Problem, chip: Callable[[], Chip]) -> Any:
    """The config, or where there is none the model's first choice for the chip.

    Raises ValueError for a config whose blocks don't go together, and where no config fits.
    """
    if config is None:
        return choose(kernel, problem, chip())
    if reason := misfit(config, problem):
        raise ValueError(
            f"config is {config}; expected blocks that go together for {problem}, but {reason}. Leave config "
            f"out, or take one of configs.candidates({kernel!r}, problem, chip)."
        )
    return config


def precisions_of(kernel: str, problem: Problem, chip: Chip) -> tuple[str, ...]:
    """The kernel's PRECISIONs whose product is of the problem's class, or of a better one and quicker."""
    if problem.dtype != torch.float32:
        return ("ieee",)
    if problem.precision == "ieee" and chip.tf32:
        return ("tf32x3", "ieee")
    if problem.precision == "tf32" and kernel == "resident":
        return ("tf32", "ieee")
    return (problem.precision,)


def _product_cycles(rows: int, inner: int, columns: int, precision: str, dtype: torch.dtype) -> float:
    """Clock cycles of one multiprocessor for a (rows, inner) by (inner, columns) product, blocks as padded.

    mma.sync reaches some 600 of the 1024 (sm_80) to 2048 (sm_90) multiply-adds of 16 bits that data
    sheets give a cycle, half of that in tf32. Without tensor cores a small product waits for its operands
    half of the time: 64 of 128 in float32, 32 of 64 in float64.
    """
    rate = {"ieee": 64, "tf32": 400, "tf32x3": 133}[precision]
    if dtype == torch.float64:
        rate = 32
    elif dtype.itemsize == 2:
        rate = 800
    return rows * inner * columns / rate


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


#: Microseconds: a launch that the next one waits for, and a trip to L2 and back.
LAUNCH_US, L2_US = 2.5, 0.6


def _estimate_step(config: StepConfig, problem: Problem, chip: Chip) -> Estimate | str:
    B, H, itemsize = problem.B, problem.H, problem.dtype.itemsize
    inner = max(H, problem.inputs)
    for block, size, least in (
        (config.BLOCK_B, B, 16),
        (config.BLOCK_N, H, 16),
        (config.BLOCK_K, inner, 16),
    ):
        if block > max(_power_of_two(size), least):
            return f"a block of {block} is wider than the {size} it cuts"
    accumulator = config.BLOCK_B * config.BLOCK_N * max(4, itemsize)
    if accumulator > 32 * 32 * config.num_warps * 4:
        return f"the sums of {config.num_warps} warps do not stay in registers"
    if (
        itemsize > 2
        and config.PRECISION == "ieee"
        and max(config.BLOCK_B, config.BLOCK_N, config.BLOCK_K) > 32
    ):
        return "without a tensor core its operands do not stay in registers"
    if config.PRECISION == "tf32x3" and config.BLOCK_K > 64:
        return "the halves of its operands do not stay in registers"
    rows, columns = (config.BLOCK_K * n * itemsize for n in (config.BLOCK_B, config.BLOCK_N))
    # The compiler keeps a buffer less than stages. The forward scan's rows come from two places.
    shared = (config.num_stages - 1) * (rows + columns)
    if not problem.backward and not problem.inputs:
        shared += (config.num_stages - 1 + (2 if config.PRECISION == "tf32x3" else 1)) * rows
    if shared > chip.shared:
        return f"it takes {shared} bytes of shared memory and {chip.name} grants {chip.shared}"
    programs = problem.D * _ceil(B, config.BLOCK_B) * _ceil(H, config.BLOCK_N)
    waves = _ceil(programs, chip.processors)
    # A processor draws some 64 bytes a cycle from L2.
    blocks = _ceil(inner, config.BLOCK_K) * (2 if problem.inputs else 1)
    read = blocks * config.BLOCK_K * (config.BLOCK_B + config.BLOCK_N) * itemsize / 64
    inner = blocks * config.BLOCK_K
    product = _product_cycles(config.BLOCK_B, inner, config.BLOCK_N, config.PRECISION, problem.dtype)
    # Each block of the sum waits for its operands some 100 cycles even when they are fetched ahead.
    cycles = max(read, product) + 100 * blocks
    registers = 48 + 2 * accumulator // (4 * 32 * config.num_warps)
    return Estimate(
        shared, registers, programs, waves, LAUNCH_US + L2_US + waves * cycles / (1000 * chip.ghz)
    )


#: The tiles are unrolled: above 5 x 5 of them a kernel may take 10 seconds and more to compile, and 5 x 5
#: spill under Triton 3.9, and took twice cooperative's time on an H200.
MAX_CHUNKS = 4
#: Registers that Triton 3.9 takes more with wide tiles in three rows: its reports at H = 264 with resets.
NEWER_REGISTERS = 52
#: Microseconds until what a program asks for is there, from L2; and what a resident step takes of the cycles
#: that the model counts: both as an H200 did it (results/nvidia-h200-16-cores, 2026-11-27, B = 16).
FETCH_US, RESIDENT_SCALE = 0.2, 0.85


def tile_width(n: int, size: int, block: int) -> int:
    """Elements of tile n of `size` elements in tiles of `block`: of the last, a power of two above them."""
    return min(block, max(16, 1 << max(size - n * block - 1, 0).bit_length()))


def _in_tensor_cores(config: ResidentConfig, problem: Problem, chip: Chip) -> bool:
    """Not float64 either, which only some chips multiply there."""
    return chip.unit == "mfma" or problem.dtype.itemsize == 2 or config.PRECISION != "ieee"


def _large(config: ResidentConfig) -> bool:
    """Whether its products go to Chip.unit."""
    return config.BLOCK_B >= 16 and config.C >= 64


def _without_tensor_cores(problem: Problem) -> tuple[int, int, int]:
    """The one (BLOCK_B, C, num_warps) with which neither operand spills."""
    wide = problem.dtype == torch.float64
    C = min(32 if wide else 64, max(16, _power_of_two(problem.H)))
    return 8, C, 8 if wide or problem.H > 128 else 4


#: The widest state of kernels/vector.py: W_hh takes a register a thread for each of its columns.
MAX_VECTOR = 128


def _unfit_vector(config: ResidentConfig, problem: Problem, chip: Chip) -> str | None:
    """Why the config is not for kernels/vector.py, if it isn't."""
    if reason := misfit(config, problem):
        return reason
    if chip.unit == "mfma":
        return "one row a program was never tried on AMD's wider wavefronts"
    if problem.H > MAX_VECTOR:
        return f"W_hh stays in registers up to {MAX_VECTOR}"
    if config.C != max(32, _power_of_two(problem.H)):
        return ONE_TILE
    if config.HELD:
        return "W_hh is all in registers"
    if config.AHEAD == 1:
        return "its steps are shorter than a fetch"
    return None


def _unfit_resident(config: ResidentConfig, problem: Problem, chip: Chip) -> str | None:
    """Why the config's blocks don't go together, if they don't."""
    if config.BLOCK_B == 1:
        return _unfit_vector(config, problem, chip)
    chunks, amd = _ceil(problem.H, config.C), chip.unit == "mfma"
    if config.AHEAD > 2:
        return "its steps are no shorter than half a fetch"
    if problem.dtype == torch.float32 and problem.precision == "tf32" != config.PRECISION:
        return "tf32 was asked for, and is quicker"
    if chunks > MAX_CHUNKS:
        return f"{chunks} x {chunks} tiles take too long to compile"
    if config.BLOCK_B > max(16 if amd else 8, _power_of_two(problem.B)):
        return f"{config.BLOCK_B} batch rows are more than the {problem.B} there are"
    if reason := misfit(config, problem):
        return reason
    if _in_tensor_cores(config, problem, chip):
        if config.C != 16 * config.num_warps:
            return REPEATED
    elif (config.BLOCK_B, config.C, config.num_warps) != _without_tensor_cores(problem):
        return "without tensor cores other tiles spill"
    elif problem.dtype == torch.float64 and problem.H > 64:
        return "float64 spills above 64"
    if config.HELD and (problem.dtype.itemsize != 2 or amd):
        return "only NVIDIA's 16-bit products take an operand from registers"
    if config.HELD and config.BLOCK_B >= 32 and not (chip.unit == "wgmma" and _large(config)):
        return "with so many columns several warps share a tile's rows and read them from shared memory"
    if amd and config.BLOCK_B != 16:
        return "its matrix instructions have 16 columns, and with more of them registers spill"
    if _large(config) and chip.unit == "tcgen05":
        return "the way to tensor memory and back takes longer than these products"
    if _large(config) and chip.unit == "wgmma" and config.HELD and problem.H % config.C and chunks > 2:
        return "a narrower last tile, in another layout, leaves no registers for held tiles"
    if _large(config) and chip.unit == "wgmma" and config.PRECISION == "tf32x3":
        return "both halves of W_hh do not stay in registers beside such a product"
    return None


def _registers_resident(config: ResidentConfig, problem: Problem, chip: Chip, rows: int, inner: int) -> int:
    """Registers a thread, fitted to the compiler's reports; rows, inner: the weight's padded size."""
    plain = not problem.backward and not _in_tensor_cores(config, problem, chip)
    if TRITON >= (3, 9) and plain and problem.dtype == torch.float32 and problem.H >= 128:
        return MAXNREG  # and it spills: a tenth of the time loop's instructions
    threads, words = 32 * config.num_warps, max(1, problem.dtype.itemsize // 4)
    elements = rows * config.BLOCK_B / threads
    each = 4.6 if problem.backward else 3.6
    if config.PRECISION == "tf32x3":
        each = 25 if problem.backward else each + 2
    each += 2.5 * problem.ragged + 2 * (config.AHEAD - 1)
    each += (2.5 if problem.backward else 1.5) * (_large(config) and chip.unit == "wgmma")
    weights = sum(max(tile_width(n, problem.H, config.C), config.C) for n in range(config.HELD)) * inner / 2
    if config.PRECISION == "tf32x3" and not problem.backward:
        # The compiler holds both halves by itself.
        weights = 2.4 * rows * inner
    tiles = 32 * max(0, _ceil(problem.H, config.C) + bool(problem.inputs) - 3)
    if TRITON >= (3, 9) and config.HELD and config.C > 64 and problem.H > 2 * config.C:
        tiles += NEWER_REGISTERS
    return int(40 * words + words * each * elements + weights / threads + tiles)


def _shared_resident(config: ResidentConfig, problem: Problem, chip: Chip, inner: int) -> int:
    """Bytes of shared memory: a state and the tiles that are not held; before that, a tile to be held."""
    H, C, itemsize = problem.H, config.C, problem.dtype.itemsize
    widths = [tile_width(n, H, C) for n in range(_ceil(H, C))]
    copies = 2 if config.PRECISION == "tf32x3" else 1
    states = 2 if chip.unit != "mfma" and config.BLOCK_B >= 16 and widths[-1] < 64 <= C else 1
    if TRITON >= (3, 9) and widths[-1] != widths[0]:
        states += 1  # for the narrower tile's product, by its reports
    # Both halves of a weight: Triton 3.9 puts them here forward, too.
    in_registers = copies == 2 and not problem.backward and TRITON < (3, 9)
    weights = 0 if in_registers else copies * sum(widths[config.HELD :]) * inner
    tile = (widths[0] ** 2 + 16 * config.BLOCK_B) if weights == 0 or config.HELD else 0
    state = copies * states * inner * config.BLOCK_B
    if chip.unit == "wgmma" and _large(config) and widths[-1] != widths[0]:
        state += C * config.BLOCK_B  # from the one instruction's layout to the other's
    return max(tile, weights + state) * itemsize


def _estimate_resident(config: ResidentConfig, problem: Problem, chip: Chip) -> Estimate | str:
    why_not = _unfit_resident(config, problem, chip)
    if why_not:
        return why_not
    if config.BLOCK_B == 1:
        return _estimate_vector(config, problem, chip)
    H, C, itemsize, warps = problem.H, config.C, problem.dtype.itemsize, config.num_warps
    widths = [tile_width(n, H, C) for n in range(_ceil(H, C))]
    inner = sum(widths) + (tile_width(0, problem.inputs, 64) if problem.inputs else 0)
    # A tile with less than 16 rows a warp is several warps' work alike.
    rows = C * len(widths) if _in_tensor_cores(config, problem, chip) else sum(widths)
    registers = _registers_resident(config, problem, chip, rows, inner)
    if registers > 255:
        return f"it takes {registers} registers a thread and there are 255"
    shared = _shared_resident(config, problem, chip, inner)
    if shared > chip.shared:
        return f"it takes {shared} bytes of shared memory and {chip.name} grants {chip.shared}"
    programs = problem.D * _ceil(problem.B, config.BLOCK_B)
    waves = _ceil(programs, chip.processors)
    read = config.num_warps * inner * config.BLOCK_B * itemsize
    if _in_tensor_cores(config, problem, chip):
        held = len(widths) if config.PRECISION == "tf32x3" and not problem.backward else config.HELD
        copies = 2 if config.PRECISION == "tf32x3" else 1
        read += copies * max(0, rows - C * held) * inner * itemsize
    else:
        read += 5 * rows * inner * itemsize
    few = max(1.0, 4 / warps)  # a processor has four schedulers, and each its tensor core
    product = few * _product_cycles(config.BLOCK_B, inner, rows, config.PRECISION, problem.dtype)
    # Instructions for each element of a state: most of them are tanh's, which for bfloat16 is one.
    each = 20 if problem.backward else 14 if problem.dtype == torch.bfloat16 else 36
    elements = each * few * rows * config.BLOCK_B / 128
    cycles = max(product, 1.5 * inner) + read / 128 + elements + (130 if warps > 1 else 70)
    # What was asked for AHEAD steps ago must have come.
    step, fetch = RESIDENT_SCALE * cycles / (1000 * chip.ghz), FETCH_US / config.AHEAD
    us = max(step, fetch) + 0.1 * min(step, fetch)
    return Estimate(shared, registers, programs, waves, waves * us)


#: Clock cycles of its step, and of a column of W_hh: fitted to 0.14 us at H = 64 and 0.23 at 128 on an H200.
VECTOR_CYCLES, VECTOR_COLUMN_CYCLES = 95, 2.25


def _estimate_vector(config: ResidentConfig, problem: Problem, chip: Chip) -> Estimate | str:
    C = config.C
    # A register for each column of W_hh and W_ih, and a quarter as many for what each step fetches.
    inputs = tile_width(0, problem.inputs, 64) if problem.inputs else 0
    registers = 56 + C + inputs + (config.AHEAD + 1) * inputs // 4
    if registers > 255:
        return f"it takes {registers} registers a thread and there are 255"
    programs = problem.D * problem.B
    waves = _ceil(programs, chip.processors)
    us = max((VECTOR_CYCLES + VECTOR_COLUMN_CYCLES * C) / (1000 * chip.ghz), FETCH_US / config.AHEAD)
    us += 0.02 / config.AHEAD
    return Estimate(C * problem.dtype.itemsize, registers, programs, waves, waves * us)


def _fit_cooperative(config: CooperativeConfig, problem: Problem, chip: Chip) -> CooperativeConfig:
    """config with the most CHUNKS, and for them the fewest STREAMED, that there is room for."""
    chunks = _ceil(problem.H, config.BLOCK_K)
    for together in (n for n in (8, 4, 2, 1) if n < 2 * chunks):
        for streamed in range(chunks + 1):
            fitted = replace(config, CHUNKS=together, STREAMED=streamed)
            if _shared_cooperative(fitted, problem) <= chip.shared:
                break
        if _registers_cooperative(fitted, problem) <= MAX_REGISTERS:
            break
    return fitted


def _shared_cooperative(config: CooperativeConfig, problem: Problem) -> int:
    """Bytes, at most: the chunks of W_hh that stay, and what passes through or the parts of the sum."""
    itemsize = problem.dtype.itemsize * (2 if config.PRECISION == "tf32x3" else 1)
    chunks = _ceil(problem.H, config.BLOCK_K)
    weight = config.BLOCK_K * config.BLOCK_N * itemsize
    state = config.BLOCK_K * config.BLOCK_B * itemsize
    passing = min(config.CHUNKS, config.STREAMED) * weight
    passing += state * (1 if config.FLAG else min(config.CHUNKS, chunks))
    parts = config.num_warps * config.BLOCK_N * config.BLOCK_B * 4
    return (chunks - config.STREAMED) * weight + max(passing, parts)


def _registers_cooperative(config: CooperativeConfig, problem: Problem) -> int:
    """Registers a thread, roughly: the state's chunks, streamed ones of W_hh, and each warp's sums."""
    threads = 32 * config.num_warps
    held = config.CHUNKS * config.BLOCK_K * config.BLOCK_B
    copies = 2 if config.PRECISION == "tf32x3" else 1
    # A streamed chunk is asked for early and waits for the state; what is split is held as it came, too.
    held += copies**2 * min(config.CHUNKS, config.STREAMED) * config.BLOCK_K * config.BLOCK_N
    sums = config.BLOCK_N * config.BLOCK_B // 32
    # A warp's part of a chunk of W_hh, as the tensor cores take it: the compiler asks for much of it at once.
    operand = config.BLOCK_N * config.BLOCK_K // config.num_warps * problem.dtype.itemsize * copies // 128
    fma = problem.dtype == torch.float32 and config.PRECISION == "ieee"
    held = held * problem.dtype.itemsize * 3 // (2 * 4 * threads)
    products = 45 + operand if fma else max(0, operand - 64) // 2 + 20 * problem.backward
    # The counter's state comes in one piece with what is streamed; a split weight is held whole, too.
    streams = (25 if not config.FLAG else 0) + (40 if copies == 2 else 0) if config.STREAMED else 0
    return 90 + held + 5 * sums + products + streams


#: Microseconds of a cooperative step, fitted to 120 candidates on an H200 (results/nvidia-h200-16-cores,
#: 2026-11-27, B = 16). MEETING_US: of two programs, whose threads poll their own vectors; who read a whole
#: tile until it is complete; who wait at a counter. MEETING_DOUBLED_US: what twice the programs add.
MEETING_US, MEETING_DOUBLED_US = (0.28, 0.45, 0.83), 0.07
#: For each byte of the state, in the same order; and half of it more where four warps do the work of eight.
STATE_US, FOUR_WARPS_US = (4e-5, 6e-5, 3e-5), 7e-5
#: A further look at the state, a further chunk of it, and a column of the result.
LOOK_US, CHUNK_US, COLUMN_US = 0.15, 0.02, 0.006
#: Cycles of a program's multiply-add without tensor cores, there too: its operands don't stay in registers.
FMA_CYCLES = 0.075


def polls_directly(config: CooperativeConfig, problem: Problem) -> bool:
    """Whether each thread polls by 16 bytes what it multiplies, as far as config and problem decide that."""
    itemsize = problem.dtype.itemsize
    return (
        config.FLAG
        and config.BLOCK_B == 8
        and not config.STREAMED
        and config.CHUNKS <= 4
        and not (itemsize == 4 and config.PRECISION == "ieee")
        and problem.H * itemsize % 16 == 0
        and config.BLOCK_K // config.num_warps * itemsize >= 64
    )


def _estimate_cooperative(config: CooperativeConfig, problem: Problem, chip: Chip) -> Estimate | str:
    B, H, itemsize = problem.B, problem.H, problem.dtype.itemsize
    chunks = _ceil(H, config.BLOCK_K)
    if problem.dtype == torch.float64:
        return "there is no cooperative kernel for float64"
    if not chip.one_l2:
        return f"its programs meet in L2, of which {chip.name} has one for each die: never tried"
    if chip.unit == "tcgen05" and not config.FLAG and H * itemsize >= 8 * KIB:
        return "with a state so wide the counter's form spills before its loop"
    if reason := misfit(config, problem):
        return reason
    if config.PRECISION == "tf32x3" and problem.backward and config.BLOCK_K // config.num_warps > 64:
        return "a tensor core cuts too much off such long sums: 1.25 times the bar at H = 1024 on an H200"
    if chunks > 32:
        return f"{chunks} unrolled chunks take too long to compile"
    for block, size, least in ((config.BLOCK_B, B, 8), (config.BLOCK_N, H, 16), (config.BLOCK_K, H, 64)):
        if block > max(_power_of_two(size), least):
            return f"a block of {block} is wider than the {size} it cuts"
    group = _ceil(H, config.BLOCK_N)
    if group > chip.processors:
        return f"{group} programs can't be on {chip.processors} processors at once"
    shared = _shared_cooperative(config, problem)
    if shared > chip.shared:
        return f"it takes {shared} bytes of shared memory and {chip.name} grants {chip.shared}"
    registers = _registers_cooperative(config, problem)
    if registers > MAX_REGISTERS:
        return f"it takes some {registers} registers a thread"
    jobs = problem.D * _ceil(B, config.BLOCK_B)
    groups = min(jobs, chip.processors // group)
    padded = chunks * config.BLOCK_K
    state = padded * config.BLOCK_B * itemsize
    way = 0 if polls_directly(config, problem) else 1 if config.FLAG else 2
    us = MEETING_US[way] + MEETING_DOUBLED_US * math.log2(group) + COLUMN_US * config.BLOCK_N
    us += state * STATE_US[way] * (1.3 if config.PRECISION == "tf32x3" else 1.0)
    us += padded * itemsize * FOUR_WARPS_US * (config.num_warps < 8)
    us += LOOK_US * (_ceil(chunks, config.CHUNKS) - 1) + CHUNK_US * (chunks - 1)
    # L2 gives some 64 bytes a cycle to one processor and 3,000 to all.
    streamed = config.STREAMED * config.BLOCK_K * config.BLOCK_N * itemsize
    cycles = max(streamed / 64, group * groups * streamed / 3000)
    if itemsize > 2 and config.PRECISION == "ieee":
        cycles += FMA_CYCLES * padded * config.BLOCK_N * config.BLOCK_B
    us += cycles / (1000 * chip.ghz)
    waves = _ceil(jobs, groups)
    return Estimate(shared, registers, group * groups, waves, waves * us)
