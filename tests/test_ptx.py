"""The kernels as the compiler makes them, emulated on the CPU: tools/ptxsim, in processes of its own."""

import re

import pytest

from tests.helpers import compiling

pytest.importorskip("triton")

#: The tensors are the CPU's.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def emulated(what):
    """pytest, with the kernels of these tests emulated."""
    return compiling(
        "-m", "pytest", "--ptx", "sm_90", "-q", "-p", "no:cacheprovider", what, timeout=900, **NO_GPU
    )


@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("test_emulator.py", 35),
        ("test_arithmetic.py", 5),
        ("test_rules.py", 16),
        ("test_kernels.py", 65),
        ("test_mutations.py", 3),
        ("test_report.py", 4),
    ],
)
def test_on_emulated_ptx(file, least):
    made = emulated(f"tests/tools/ptxsim/{file}")
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", made.stdout)[1]) >= least


@pytest.mark.parametrize(
    ("test", "least"),
    [
        ("test_resident.py::test_fetching_ahead_of_short_sequences", 20),
        ("test_gradients.py::test_without_input_tanh_is_linear", 10),  # by way of the layer
    ],
)
def test_a_test_of_the_project_runs_on_emulated_ptx(test, least):
    """The option --ptx: results come from compiled code, and what is found beside them fails the test."""
    made = emulated(f"tests/{test}")
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    launches = re.search(r"(\d+) launches were emulated as PTX for sm_90", made.stdout)
    assert int(launches[1]) >= least
