"""The kernels as the compiler makes them, emulated on the CPU: tools/ptxsim, in processes of its own."""

import re
from pathlib import Path

import pytest

from tests.helpers import compiling

pytest.importorskip("triton")

#: The tensors are the CPU's.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def emulated(*what):
    """What pytest says of these tests, with their kernels emulated: all pass."""
    made = compiling(
        "-m", "pytest", "--ptx", "sm_90", "-p", "no:cacheprovider", *what, timeout=900, **NO_GPU
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    return made.stdout


def test_on_emulated_ptx():
    """The emulator, a sample of the kernels, and kernels that are broken on purpose."""
    said = emulated("tests/tools/ptxsim")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 140
    for path in (Path(__file__).parent / "tools/ptxsim").glob("test_*.py"):
        assert path.name in said


def test_the_project_s_own_tests_run_on_emulated_ptx():
    """The option --ptx: results come from compiled code, launched by themselves and by way of the layer."""
    said = emulated(
        "tests/test_resident.py::test_fetching_ahead_of_short_sequences",
        "tests/test_gradients.py::test_without_input_tanh_is_linear",
    )
    assert int(re.search(r"(\d+) launches were emulated as PTX for sm_90", said)[1]) >= 30
