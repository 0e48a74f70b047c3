"""Every kernel at a small size under compute-sanitizer's memcheck and racecheck, a process for each.

    python -m tests.sanitize

Needs a CUDA device, and the CUDA toolkit's compute-sanitizer on PATH. Exit status 1 if it finds something.
racecheck sees shared memory alone: of the programs' meeting in L2 it says nothing.
"""

import shutil
import subprocess
import sys

import torch

from elman.kernels import cooperative, resident, step
from tests.scans import Cooperative, check, problem

MODULES = {"step": step, "resident": resident, "cooperative": cooperative}
TOOLS = ("memcheck", "racecheck")


def launch(kernel: str, dtype: str) -> None:
    """Forward and backward of one kernel, ragged, in both directions, compared with the reference."""
    numbers = problem(5, 9, 40, 2, getattr(torch, dtype), ragged=True)
    check(MODULES[kernel], *numbers, "tanh")
    if kernel == "cooperative":  # the other way to meet
        check(Cooperative(FLAG=False), *numbers, "tanh")
    torch.cuda.synchronize()


def main() -> int:
    if not torch.cuda.is_available():
        print("This machine has no CUDA device; there is nothing to sanitize.")
        return 1
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit, in its bin folder.")
        return 1
    failed = []
    for kernel in MODULES:
        for dtype in ("bfloat16", "float32"):
            for tool in TOOLS:
                command = [
                    sanitizer,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "9",
                    sys.executable,
                    "-m",
                    __spec__.name,
                ]
                done = subprocess.run([*command, kernel, dtype], timeout=600)
                print(f"{kernel} {dtype} {tool}: {'clean' if done.returncode == 0 else 'FAILED'}", flush=True)
                failed += [(kernel, dtype, tool)] if done.returncode else []
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        launch(*sys.argv[1:])
    else:
        sys.exit(main())
