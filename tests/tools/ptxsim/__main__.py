"""The project's kernels as compiled PTX, emulated on the CPU. Nothing runs on a GPU.

    python -m tests.tools.ptxsim rows [--targets sm_80,sm_90] [--kernels resident,step] [--minutes 30]
    python -m tests.tools.ptxsim report

`rows` runs cases compiled by this interpreter's Triton and adds them to results/ptx/<target>.<triton>.jsonl.
Those that it has of the same kernels and the same emulator are not run again, all others are dropped.
`report` makes <target>.md of the rows of all Triton versions there, and fails if they show a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import triton

from bench import rows
from bench.machine import commit

from . import cases, report
from .check import row

TARGETS = ("sm_80", "sm_90")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.ptxsim", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("action", choices=("rows", "report"))
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--kernels", default=",".join(cases.SIZES), help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=60, help="for each target, at most; default: %(default)g"
    )
    parser.add_argument(
        "--only", type=_pattern, default="", help="a regular expression on a case's text and how it is run"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/ptx"),
        help="two runs at a time want a folder each; default: %(default)s",
    )  # fmt: skip
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    if {*options.kernels.split(",")} - {*cases.SIZES}:
        parser.error(f"--kernels is {options.kernels}; expected some of {', '.join(cases.SIZES)}")
    if {*targets} - {*TARGETS}:
        parser.error(f"--targets is {options.targets}; expected some of {', '.join(TARGETS)}")
    if options.action == "report":
        return report.write(options.output, targets)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: there is nothing to compile. Unset it.")
    if len(targets) > 1:  # a process has one target
        command = [sys.executable, "-m", "tests.tools.ptxsim", *(argv or sys.argv[1:]), "--targets"]
        codes = [subprocess.call([*command, target]) for target in targets]  # below 0: a signal ended it
        return int(any(codes))
    return _rows(targets[0], options)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _rows(target: str, options: argparse.Namespace) -> int:
    planned, kernels = cases.plan(target), options.kernels.split(",")
    named = [
        key for key, case in planned.items()
        if case.kernel in kernels and options.only.search(" ".join(key))
    ]  # fmt: skip
    if not named:
        asked = f"--only, the regular expression {options.only.pattern!r}"
        print(f"{target}: no case of {options.kernels} matches {asked}")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{target}.{triton.__version__}.jsonl"
    stamp = {"triton": triton.__version__, "planned": len(planned), "code": report.code(), **commit()}
    there = report.current(path)
    text = "".join(json.dumps(made) + "\n" for made in there)
    if path.exists() and path.read_text() != text:
        rows.replace(path, text)
    known = {(made["case"], made["how"]) for made in there}
    todo = [key for key in named if key not in known]
    end, bad, ran = time.monotonic() + 60 * options.minutes, 0, 0
    for key in todo:
        if time.monotonic() >= end:
            print(f"{target}: time is up after {ran} of {len(todo)} cases", flush=True)
            break
        made, ran = row(planned[key], key[1], target), ran + 1
        rows.append_text(path, json.dumps(made | stamp) + "\n")
        if made["wrong"]:
            bad += 1
            print(f"{target} {', '.join(key)}:", *made["wrong"][:4], sep="\n    ", flush=True)
    print(f"{target}, Triton {triton.__version__}: {ran} cases ran, {bad} with findings", flush=True)
    return 0  # report, which comes next, fails for findings


if __name__ == "__main__":
    sys.exit(main())
