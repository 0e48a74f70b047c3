"""Kernels that are broken on purpose: is it noticed that a barrier, a release or a fence is missing?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from elman.kernels.configs import Chip

from .cases import Case
from .check import check
from .launch import Emulator

#: What is taken away, and what stands in its place.
SITES = {
    "barrier": (r"bar\.sync\s+\d+;", ""),
    "release": (r"\.release\.", ".relaxed."),
    "acquire": (r"\.acquire\.", ".relaxed."),
    "proxy fence": (r"fence\.proxy\.async\S*;", ""),
    "wgmma wait": (r"wgmma\.wait_group\S*\s+\d+;", ""),
    "copy wait": (r"cp\.async\.wait_group\s+\S+;", ""),
}


@dataclass(frozen=True)
class Mutation:
    """number: which of its kind, from 0 on. of: how many there are. wrong: what was found without it."""

    kind: str
    number: int
    of: int
    line: int
    in_loop: bool
    wrong: list[str]

    def __str__(self) -> str:
        where = "in the loop" if self.in_loop else "outside"
        return f"{self.kind} {self.number} of {self.of}, PTX line {self.line}, {where}"


def mutations(case: Case, emulator: Emulator, chip: Chip) -> list[Mutation]:
    """Each synchronisation of the case's kernel taken out by itself. The kernel as it is must be right."""
    outcome = check(case, emulator, chip)
    if outcome.wrong:
        raise AssertionError(f"{case} is wrong as it is: {outcome.wrong[:2]}")
    ptx = emulator.kernels[-1][1]
    out = []
    try:
        for kind, (pattern, instead) in SITES.items():
            sites = _sites(ptx, pattern)
            for n, hits in enumerate(sites):
                broken = ptx
                for hit in reversed(hits):
                    broken = broken[: hit.start()] + instead + broken[hit.end() :]
                emulator.edit = lambda text, broken=broken: broken if text == ptx else text
                wrong = check(case, emulator, chip).wrong
                start = hits[0].start()
                line = ptx.count("\n", 0, start) + 1
                out.append(Mutation(kind, n, len(sites), line, _in_loop(ptx, start), wrong))
    finally:
        emulator.edit = None
    return out


def without(pattern: str, which: int = 0) -> Callable[[str], str]:
    """An edit that takes the which-th line that matches away."""

    def edit(ptx: str) -> str:
        lines = ptx.split("\n")
        lines[[n for n, line in enumerate(lines) if re.search(pattern, line)][which]] = ""
        return "\n".join(lines)

    return edit


def _sites(ptx: str, pattern: str) -> list[list[re.Match]]:
    """What matches; two with no access to memory between them are one, because either does.

    Triton 3.9 puts a barrier before a release, beside the kernel's own.
    """
    sites: list[list[re.Match]] = []
    for hit in re.finditer(pattern, ptx):
        between = ptx[sites[-1][-1].end() : hit.start()] if sites else "ld."
        if re.search(r"\b(ld|st|atom|red|ldmatrix|stmatrix|cp|wgmma)\.|bra|^\$L__BB", between, re.M):
            sites.append([])
        sites[-1].append(hit)
    return sites


def _in_loop(ptx: str, at: int) -> bool:
    """Whether some jump behind leads to a label before."""
    before = set(re.findall(r"^(\$[\w$]+):", ptx[:at], re.M))
    return any(target in before for target in re.findall(r"bra\S*\s+(\$[\w$]+);", ptx[at:]))
