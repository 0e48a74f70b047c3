"""The compile matrix: every kernel and every config that the model lets through, compiled for GPUs that are
not here. Nothing runs on a GPU.

    python -m tests.cross_compile rows [--targets sm_80,sm_90] [--kernels resident,step] [--small]
    python -m tests.cross_compile report

`rows` compiles with this interpreter's Triton into results/compile/<target>.<triton>.jsonl; `report` puts the
rows of all Triton versions found there together as <target>.md, and fails if they show a problem.

What is compiled is what the launchers launch: they are called on tensors without content, and Triton compiles
for the target where it would have launched. Each compile has its own process, which can be killed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import precompile
from bench.machine import commit
from elman.kernels import configs, cooperative, resident, step
from elman.kernels.configs import Config, Problem
from tests import assembly, compile_report

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MODULES = {"resident": resident, "cooperative": cooperative, "step": step}
#: Arithmetic by name: dtype, and the precision class that it asks for.
ARITHMETIC = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp64": (torch.float64, "ieee"),
}
#: Of these, every config: kernel -> (arithmetic, hidden sizes, rows). Forward, and backward if there is one.
SHAPES = {
    "resident": (("bf16", (64, 128, 256, 264, 320), 16), ("fp32", (128, 160), 16)),
    "fused": (("bf16", (64, 264), 16),),
    "cooperative": (("bf16", (256, 512, 1024, 2048, 4096), 16), ("fp32", (512, 2048), 16)),
    "step": (("bf16", (64, 1024), 16), ("fp32", (1024,), 16)),
    "cell": (("bf16", (256,), 16), ("fp32", (256,), 16)),
}
#: Of these, the first choice for rows with lengths.
MORE_SHAPES = {
    "resident": (
        ("fp32", (64, 72, 136), 16),
        ("tf32", (128, 136), 16),
        ("fp16", (128, 264), 16),
        ("fp64", (64,), 16),
        ("bf16", (256,), 1),
        ("bf16", (256,), 64),
    ),
    "fused": (("fp32", (64,), 16),),
    "cooperative": (
        ("tf32", (1024,), 16),
        ("fp16", (1024,), 16),
        ("bf16", (1024,), 1),
        ("bf16", (1024,), 64),
    ),
    "step": (("fp64", (64,), 16), ("tf32", (1024,), 16), ("bf16", (1024,), 64)),
    "cell": (("bf16", (256,), 1),),
}
#: Likewise: what the tests compile.
SMALL_SHAPES = {
    "resident": (("bf16", (40, 264), 16), ("fp32", (40,), 16)),
    "fused": (("bf16", (40,), 16),),
    "cooperative": (("bf16", (264,), 16), ("fp32", (136,), 16)),
    "step": (("bf16", (40,), 16), ("fp64", (17,), 16)),
    "cell": (("bf16", (40,), 16),),
}
#: The input size of the fused kernel.
FUSED_INPUTS = 16


@dataclass(frozen=True)
class Case:
    """One compile. kernel: a key of SHAPES; config None: the model lets none through.

    A problem that is ragged has rows of lengths of their own; with resets they also begin anew.
    """

    target: str
    kernel: str
    problem: Problem
    config: Config | None
    resets: bool = False


def cases(target: str, kernels: list[str], small: bool) -> Iterator[Case]:
    """What is compiled: with lengths every config, without them and with resets beside them the first."""
    for kernel in kernels:
        for problem in () if small else problems(kernel, SHAPES[kernel]):
            found = _configs(target, kernel, problem)
            first_only = not problem.ragged and kernel != "cell"
            yield from (
                Case(target, kernel, problem, config) for config in found[: 1 if first_only else None]
            )
            if problem.ragged:
                yield Case(target, kernel, problem, found[0], resets=True)
        for problem in problems(kernel, (SMALL_SHAPES if small else MORE_SHAPES)[kernel]):
            if problem.ragged or kernel == "cell":
                first = _configs(target, kernel, problem)[0]
                yield Case(target, kernel, problem, first)
                if small and problem.ragged:
                    yield Case(target, kernel, problem, first, resets=True)


def _configs(target: str, kernel: str, problem: Problem) -> list[Config | None]:
    """The configs that the model lets through, its first choice first; [None] if there are none."""
    found = configs.candidates(precompile.module_of(kernel), problem, configs.CHIPS[target])
    return [config for config, _ in found] or [None]


def problems(kernel: str, shapes: tuple) -> Iterator[Problem]:
    """The problems of a kernel's shapes, forward first."""
    one_way = kernel in ("cell", "fused")
    for backward in (False,) if one_way else (False, True):
        for arithmetic, sizes, B in shapes:
            dtype, precision = ARITHMETIC[arithmetic]
            for H, ragged in itertools.product(sizes, (False,) if kernel == "cell" else (True, False)):
                inputs = {"cell": H, "fused": FUSED_INPUTS}.get(kernel, 0)
                yield Problem(B, H, 1, dtype, precision, backward, inputs, ragged)


def build(case: Case) -> Any:
    """The compiled kernel that the launcher would launch for `case`."""
    assert case.config
    launch = precompile.Launch(
        case.kernel, case.problem, case.config, lengths=case.problem.ragged, resets=case.resets, g_hn=True
    )
    return precompile.build(launch, TARGETS[case.target], configs.CHIPS[case.target])


def measure(case: Case) -> dict[str, Any]:
    """What the compiled kernel takes, as the part of its row that needs the compiler."""
    start = time.perf_counter()
    kernel = build(case)
    seconds = time.perf_counter() - start
    known = {"seconds": round(seconds, 2), "shared": kernel.metadata.shared, **assembly.resources(kernel)}
    code = assembly.instructions(kernel)
    loop = assembly.time_loop(code)
    known["late loads"] = assembly.late_loads(loop)
    return {**known, "loop": assembly.count(loop) if loop else None, "code": assembly.count(code)}


def row(case: Case, limit_s: float) -> dict[str, Any]:
    """A line of <target>.<triton>.jsonl: the case, what the model expected of it, and what came out."""
    chip, problem = configs.CHIPS[case.target], case.problem
    direction = "" if case.kernel == "cell" else " backward" if problem.backward else " forward"
    known = {
        "target": case.target,
        "triton": triton.__version__,
        "kernel": case.kernel + direction,
        "problem": {**vars(problem), "dtype": str(problem.dtype).removeprefix("torch.")},
        "resets": case.resets,
        "limit": chip.shared,
    }
    if not case.config:
        return {**known, "config": None}
    expected = configs.estimate(precompile.module_of(case.kernel), case.config, problem, chip)
    out = _in_own_process(case, limit_s)
    return {**known, "config": vars(case.config), "expected": vars(expected), **out}


def _in_own_process(case: Case, limit_s: float) -> dict[str, Any]:
    """measure(case), or {"error": why not}: a compiler that crashes or never ends is an answer too."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        log.touch()
        process = context.Process(target=_answer, args=(case, sender, scratch))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit_s):
                return {"error": f"not compiled after {limit_s:g} s"}
            return receiver.recv()
        except EOFError:
            return {"error": f"the compiler crashed: {_reason(log.read_text())}"}
        finally:
            _end(process)


def _answer(case: Case, sender: Connection, scratch: str) -> None:
    os.setpgid(0, 0)  # so that what the compiler has started can be ended with it
    os.environ["TRITON_CACHE_DIR"] = tempfile.tempdir = scratch
    log = os.open(f"{scratch}/log", os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        sender.send(measure(case))
    except Exception as caught:
        error: BaseException = caught
        while error.__cause__:  # what was wrong in the innermost device function
            error = error.__cause__
        printed = Path(scratch, "log").read_text()
        sender.send({"error": f"{type(error).__name__}: {_reason(printed) or _reason(str(error))}"})


def _reason(text: str) -> str:
    """The line of a compiler's output that says what went wrong, if it has one; else its last with words."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    telling = [line for line in lines if re.search(r"error|Assertion|fatal", line, re.IGNORECASE)]
    return (telling or lines[-1:] or [""])[0]


def _end(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet a group of its own, or just gone
            process.kill()
    process.join()


def rows(todo: list[Case], jobs: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """The rows of `todo`, in its order."""
    loaded = [module.__name__ for module in MODULES.values()]
    multiprocessing.get_context("forkserver").set_forkserver_preload(loaded)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(row, todo, itertools.repeat(limit_s))


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.cross_compile", description=about)
    parser.add_argument("action", choices=("rows", "report"))
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--kernels", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="only what the tests compile")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=60, help="for one compile; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results/compile"))
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    if options.action == "report":
        return compile_report.write(options.output, targets)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: there is nothing to compile. Unset it.")
    options.output.mkdir(parents=True, exist_ok=True)
    for target in targets:
        _write_rows(target, options)
    return 0


def _write_rows(target: str, options: argparse.Namespace) -> None:
    todo = list(cases(target, options.kernels.split(","), options.small))
    stamp = commit()
    start = time.perf_counter()
    with (options.output / f"{target}.{triton.__version__}.jsonl").open("w") as file:
        for i, made in enumerate(rows(todo, options.jobs, options.limit_s), 1):
            file.write(json.dumps({**made, **stamp}) + "\n")
            file.flush()
            found = "; ".join(compile_report.problems(made)) or "ok"
            print(f"{target} {i}/{len(todo)} {compile_report.title(made)}: {found}", flush=True)
    print(f"{target}: {len(todo)} compiled in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
