"""The kernels as the compiler makes them, emulated on the CPU: tools/ptxsim, in processes of its own.

Triton's interpreter, which the other tests use, is chosen once for a process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def run(*arguments, timeout=900):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # the tensors are the CPU's
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("file", "least"), [("test_emulator.py", 35), ("test_kernels.py", 60), ("test_mutations.py", 3)]
)
def test_on_emulated_ptx(file, least):
    made = run("-m", "pytest", "--ptx", "sm_90", "-q", "-p", "no:cacheprovider", f"tests/tools/ptxsim/{file}")
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", made.stdout)[1]) >= least


def test_a_test_of_the_kernels_runs_on_emulated_ptx():
    """The option --ptx: results come from compiled code, and what is found beside them fails the test."""
    which = "tests/test_resident.py::test_fetching_ahead_of_short_sequences"
    made = run("-m", "pytest", "--ptx", "sm_90", "-q", "-p", "no:cacheprovider", which)
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    launches = re.search(r"(\d+) launches were emulated as PTX for sm_90", made.stdout)
    assert int(launches[1]) >= 20
