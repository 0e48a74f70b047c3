"""The project's kernels as cases for the emulator: which are run, and how."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import precompile
from elman.kernels import configs
from elman.kernels.configs import Chip, Config, Problem
from tests import cross_compile

#: The compile matrix's arithmetic, and float32 as three products in tf32, whatever the model would choose.
ARITHMETIC = {**cross_compile.ARITHMETIC, "tf32x3": (torch.float32, "tf32x3")}
#: Hidden sizes and arithmetic by kernel. vector is resident with one row a program.
SIZES = {
    "resident": (1, 17, 40, 64, 72, 128, 130, 256, 264, 320),
    "vector": (1, 17, 64, 128),
    "fused": (17, 64, 130, 264),
    "cooperative": (64, 136, 264, 512, 1024),
    "step": (17, 64, 300),
    "cell": (17, 64, 300),
}
KINDS = {
    "resident": ("bf16", "fp16", "fp32", "tf32", "tf32x3", "fp64"),
    "vector": ("bf16", "fp16", "fp32"),
    "fused": ("bf16", "fp16", "fp32", "tf32"),
    "cooperative": ("bf16", "fp16", "fp32", "tf32", "tf32x3"),
    "step": ("bf16", "fp16", "fp32", "tf32", "tf32x3", "fp64"),
    "cell": ("bf16", "fp16", "fp32", "tf32", "fp64"),
}
ONE_WAY = ("fused", "cell")
#: Options that go together, so that each pair of them is met somewhere.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"D": 2, "lengths": True, "T": 4},
    {"relu": True, "resets": True, "g_out": False, "T": 4},
    {"g_hn": False, "T": 3, "layout": "part"},
    {"D": 2, "lengths": True, "resets": True, "T": 4, "relu": True, "layout": "part"},
    {"D": 2, "T": 3, "scale": 50.0},
    {"lengths": True, "T": 5, "g_hn": False, "scale": 0.01, "layout": "expanded"},
    {"T": 1, "D": 2, "g_out": False},
)

#: How cases are run, by name: machine.Options.
WAYS: dict[str, dict[str, Any]] = {
    "in step": {},
    "by warp": {"by_warp": True, "lanes": True},
    "weak memory": {"weak": True},
    "approximate": {"error": 1.0},
    "truncated sums": {"truncate": True},
    "a program withheld": {},
}
#: Of the drawn cases, every so many are run once more in this way.
EVERY = {"by warp": 12, "weak memory": 4, "approximate": 15, "truncated sums": 8, "a program withheld": 8}


@dataclass(frozen=True)
class Case:
    """One launch. layout: "part", views into larger memory; "expanded", g_out of stride zero; or "plain".

    scale: of the pre-activations. processors: of a chip that has fewer, so that groups of cooperative take
    several jobs; 0: the target's. withheld: a program of cooperative that never starts, or -1.
    """

    kernel: str
    arithmetic: str
    H: int
    config: Config | None = None
    B: int = 5
    T: int = 3
    D: int = 1
    I: int = 0
    backward: bool = False
    relu: bool = False
    lengths: bool = False
    resets: bool = False
    g_out: bool = True
    g_hn: bool = True
    bias: bool = True
    layout: str = "plain"
    scale: float = 1.0
    processors: int = 0
    withheld: int = -1
    seed: int = 0

    @property
    def module(self) -> str:
        """The module of elman.kernels whose launcher it is, and whose search space and model it has."""
        return "resident" if self.kernel == "vector" else precompile.module_of(self.kernel)

    @property
    def problem(self) -> Problem:
        dtype, precision = ARITHMETIC[self.arithmetic]
        ragged = self.lengths or self.resets
        return Problem(self.B, self.H, self.D, dtype, precision, self.backward, self.I, ragged)

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    def __str__(self) -> str:
        words = [self.kernel, self.direction, self.arithmetic, f"H={self.H} B={self.B} T={self.T} D={self.D}"]
        words += [f"I={self.I}"] * bool(self.I) + ["relu" if self.relu else "tanh"]
        words += [name for name in ("lengths", "resets") if getattr(self, name)]
        words += [f"no {name}" for name in ("g_out", "g_hn", "bias") if not getattr(self, name)]
        words += [self.layout] * (self.layout != "plain") + [f"x{self.scale:g}"] * (self.scale != 1)
        words += [f"{self.processors} processors"] * bool(self.processors)
        words += [f"without program {self.withheld}"] * (self.withheld >= 0) + [f"seed {self.seed}"]
        blocks = (
            " ".join(f"{name}={value}" for name, value in vars(self.config).items()) if self.config else ""
        )
        return f"{' '.join(words)} [{blocks}]"


def found(case: Case, chip: Chip) -> list[Config]:
    """The configs of the case's problem, the model's first choice first."""
    if case.kernel == "vector":  # the model prefers a wider tile where the batch has more rows
        space = configs.space("resident", case.problem, chip)
        judged = [(c, configs.estimate("resident", c, case.problem, chip)) for c in space if c.BLOCK_B == 1]
        return [config for config, expected in judged if isinstance(expected, configs.Estimate)]
    return [config for config, _ in configs.candidates(case.module, case.problem, chip)]


def every(kernels: list[str], chip: Chip, seed: int = 0) -> list[Case]:
    """Every kernel, size, arithmetic, direction and variant; configs take turns, and the order is drawn.

    A kernel's cases are the same whatever kernels are asked for.
    """
    out: list[Case] = []
    for kernel in kernels:
        draw = random.Random(f"{kernel} {seed}")
        for H, arithmetic, backward in itertools.product(SIZES[kernel], KINDS[kernel], (False, True)):
            for n in range(len(VARIANTS)) if not (backward and kernel in ONE_WAY) else ():
                if H < 1024 or n in (0, 4):  # larger ones take a minute
                    out += _case(Case(kernel, arithmetic, H, backward=backward, seed=n), n, n, chip, draw)
    if "cooperative" in kernels:  # chunks of W_hh that are read again at each step, as for H of 4096
        for backward, flag, arithmetic in itertools.product((False, True), (True, False), ("bf16", "fp32")):
            config = configs.CooperativeConfig(8, 16, 64, 2, STREAMED=2, FLAG=flag, num_warps=4)
            out.append(
                Case("cooperative", arithmetic, 136, config, B=9, D=2, lengths=True, backward=backward)
            )
    random.Random(seed).shuffle(out)
    return out


def _case(case: Case, variant: int, turn: int, chip: Chip, draw: random.Random) -> list[Case]:
    """The case with the options of a variant and the config whose turn it is; none if there is no config."""
    H, kernel, options = case.H, case.kernel, dict(VARIANTS[variant])
    small = H <= (136 if kernel == "cooperative" else 264)
    B = draw.choice((1, 5, 9, 16) if small and kernel != "cooperative" else (3, 8, 20) if small else (3, 9))
    if kernel == "vector":
        B = draw.choice((1, 3))
    if B == 1 and (options.get("lengths") or options.get("resets")):
        B = 3  # of a single row little is left
    if kernel == "cooperative":
        options["T"] = min(options["T"], 4 if H <= 264 else 3)
    if kernel == "fused":
        options |= {"I": draw.choice((1, 16, 20, 64)), "bias": draw.random() < 0.6}
    if kernel == "cell":
        options = {name: value for name, value in options.items() if name in ("relu", "scale", "layout")}
        options |= {"I": draw.choice((0, 1, 40, 70)), "bias": draw.random() < 0.6, "T": 1}
    if not case.backward:
        options = {name: value for name, value in options.items() if name not in ("g_out", "g_hn")}
    case = replace(case, B=B, **options)
    choices = found(case, chip)
    if not choices:
        return []
    config = choices[turn % len(choices)]
    if kernel == "cooperative" and variant % 3 == 2 and case.D * -(-B // config.BLOCK_B) > 1:
        case = replace(case, processors=-(-H // config.BLOCK_N))
    return [replace(case, config=config)]


def plan(target: str) -> dict[tuple[str, str], Case]:
    """What is run, by its text and how it is run. This Triton's version decides which configs there are."""
    out: dict[tuple[str, str], Case] = {}
    for case in every([*SIZES], configs.CHIPS[target]):
        out[str(case), "in step"] = case
        for way, each in EVERY.items():
            draw = random.Random(f"{case} {way}")
            if draw.randrange(each) or not _applies(way, case):
                continue
            drawn = case
            if way == "a program withheld":
                drawn = replace(case, withheld=draw.choice((0, _programs(case) - 1)), T=3)
            out[str(drawn), way] = drawn
    return out


def _programs(case: Case) -> int:
    """How many share a sequence."""
    return -(-case.H // getattr(case.config, "BLOCK_N", case.H)) if case.kernel == "cooperative" else 1


def _applies(way: str, case: Case) -> bool:
    if way == "weak memory":
        return case.kernel == "cooperative"
    if way == "approximate":
        return not case.relu
    if way == "a program withheld":
        return _programs(case) > 1 and not case.lengths and not case.resets
    return True


def sample(chip: Chip, seed: int = 0) -> list[tuple[Case, dict[str, bool]]]:
    """A few small cases with how they are run (machine.Options): what `make test` has time for.

    Each kernel both ways with the model's first choice, both ways that cooperative's programs synchronise,
    four of them at once, and once each warp by itself, and stores that come late.
    """
    draw = random.Random(seed)
    sizes = {
        "resident": (40, 72, 136),
        "vector": (17, 64),
        "fused": (17, 64),
        "step": (17, 40),
        "cell": (17, 40),
    }
    out: list[tuple[Case, dict[str, bool]]] = []
    for kernel, backward in itertools.product(sizes, (False, True)):
        if not (backward and kernel in ONE_WAY):
            for arithmetic in KINDS[kernel]:
                n = draw.randrange(len(VARIANTS) - 1)  # of one step dz has nothing of W_hh
                case = Case(kernel, arithmetic, draw.choice(sizes[kernel]), backward=backward, seed=n)
                out += [(made, {}) for made in _case(case, n, 0, chip, draw)]
    for flag, backward in itertools.product((True, False), (False, True)):
        config = configs.CooperativeConfig(8, 16, 64, 1, FLAG=flag, num_warps=4)  # four programs
        case = Case("cooperative", draw.choice(("bf16", "fp32")), 64, config, B=3, T=3, backward=backward)
        out.append((case, {"weak": flag != backward}))
    config = configs.choose("resident", Case("resident", "bf16", 64, B=3).problem, chip)
    out.append((Case("resident", "bf16", 64, config, B=3, T=4), {"by_warp": True}))
    return out
