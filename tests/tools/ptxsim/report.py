"""The emulator's rows as a page: what ran, how far off it was, and what was found."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench import precompile
from bench.rows import whole_lines
from tests import cross_compile, helpers

Row = dict[str, Any]

HEAD = """\
# Emulated PTX: {target}

The kernels as compiled by Triton {versions} for {target}, up to PTX, run on a CPU by
[tests/tools/ptxsim](../../tests/tools/ptxsim/README.md), which also looks for races, and for reads of memory
that is uninitialised or not the tensor's. **Nothing here was run on a GPU, and no number says how fast a GPU
is.**

Made by `make ptx`, at {commits}. {cases} of the {planned} cases that are planned, {bad} with findings.

- cases: up to seven sets of options for each combination of kernel, hidden size, arithmetic and direction for
  which the model in kernels/configs.py has a config. Batch and input sizes are drawn; the model's first
  configs take turns. Eight more cases of cooperative have a config of their own, which reads W_hh in chunks.
- how: in step, and for a part of the cases once more: each warp by itself in a drawn order (then the lanes'
  order is looked at too); with weak memory, where other programs see stores late and out of order;
  approximate: tanh.approx, ex2.approx and div.full as far off as the ISA allows; with truncated sums, where
  tensor cores cut the bits that the hardware cuts; a program withheld: it never starts, and the others must
  give up.
- error: of a result against the float64 reference, over the tests' tolerance; the worst.
- unused: cases in which reads raced whose values go nowhere: with NaN in their place the result is the same
  to the bit, or programs had given up, and all results are thrown away.

"""
NOT_MODELLED = """
## What this does not say

Nothing about time, registers or spills, nor about what ptxas makes of the PTX. A warp's lanes go in step
between branches. Polling loads may race: that is what they are for. Tensor cores' truncation is close to the
hardware's, not to the bit. Clusters, TMA and tcgen05 are not known: a kernel that used them would stop with
an error.
"""


#: Modules that change no row.
LOOK_ON = (
    "__main__.py",
    "report.py",
    "plugin.py",
    "mutations.py",
    "conftest.py",
    "small_kernels.py",
    "handwritten.py",
)


@cache
def code() -> str:
    """A digest of the kernels, of the emulator, and of what makes a case and judges its result."""
    here = Path(__file__).parent
    root = here.parents[2]
    emulator = [p for p in here.rglob("*.py") if not p.name.startswith("test_") and p.name not in LOOK_ON]
    judges = [root / name for name in ("elman/reference.py", "tests/scans.py", "tests/tolerances.py")]
    # Of files that change for other reasons, too.
    pieces = (helpers.error, precompile.Driver, precompile.module_of)
    digest = hashlib.sha256(repr(cross_compile.ARITHMETIC).encode())
    for piece in pieces:
        digest.update(inspect.getsource(piece).encode())
    for path in (*sorted((root / "kernels").glob("*.py")), *sorted(emulator), *judges):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def current(path: Path) -> list[Row]:
    """The rows of a file that come from the code as it is, and from the Triton that the file's name says."""
    there = [json.loads(line) for line in whole_lines(path)] if path.exists() else []
    return [
        row for row in there if row.get("code") == code() and path.name.endswith(f".{row['triton']}.jsonl")
    ]


def write(folder: Path, targets: list[str]) -> int:
    """<target>.md from all <target>.<triton>.jsonl in `folder`.

    Returns 1 for a finding, and where a file has no row of the code as it is. If none has, the page stays.
    """
    failed = False
    for target in targets:
        files = {path: current(path) for path in sorted(folder.glob(f"{target}.*.jsonl"), reverse=True)}
        wrong = [
            f"{path.name} has no row of the code as it is; run its cases or, if its Triton is gone, delete it"
            for path, there in files.items()
            if not there
        ]
        rows: dict[tuple, Row] = {}
        for row in itertools.chain(*files.values()):
            key = row["triton"], row["case"], row["how"]
            if key not in rows or row["wrong"]:  # of two that differ the one with a finding
                rows[key] = row
        if rows:
            text, findings = markdown(target, [*rows.values()])
            (folder / f"{target}.md").write_text(text)
            wrong += findings
        elif not files:
            wrong.append("there are no rows: nothing was run")
        for line in wrong:
            print(f"{target}: {line}")
        failed |= bool(wrong)
    return int(failed)


def markdown(target: str, rows: list[Row]) -> tuple[str, list[str]]:
    """The page of a target, and what is wrong with its rows."""
    wrong = [
        f"{row['case']}, {row['how']} (Triton {row['triton']}): {what}"
        for row in rows
        for what in row["wrong"]
    ]
    versions = " and ".join(dict.fromkeys(row["triton"] for row in rows))
    planned = sum({row["triton"]: row["planned"] for row in rows}.values())
    commits = sorted({f"{row['commit']}{' with changes' * bool(row['dirty'])}" for row in rows})
    at = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    bad = sum(bool(row["wrong"]) for row in rows)
    page = HEAD.format(
        target=target, versions=versions, commits=at, cases=len(rows), planned=planned, bad=bad
    )
    page += "| kernel | Triton | how | arithmetic | cases | error | unused | findings |\n"
    page += "|---|---|---|---|---:|---:|---:|---:|\n"
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        kernel, direction, _ = row["case"].split(maxsplit=2)
        groups.setdefault((f"{kernel} {direction}", row["triton"], row["how"]), []).append(row)
    for (kernel, version, how), same in sorted(groups.items()):
        arithmetic = ", ".join(sorted({row["case"].split()[2] for row in same}))
        errors = [row["error"] for row in same if row["error"] is not None]
        worst = f"{np.max(errors):.2f}" if errors else ""  # NaN, if one is
        unused, found = (sum(bool(row[name]) for row in same) for name in ("unused", "wrong"))
        page += (
            f"| {kernel} | {version} | {how} | {arithmetic} | {len(same)} | {worst} | {unused} | {found} |\n"
        )
    page += "\n## Findings\n\n" + ("".join(f"- {line}\n" for line in wrong) or "None.\n") + NOT_MODELLED
    return page, wrong
