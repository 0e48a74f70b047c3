"""What all tests share: Triton's interpreter where there is no GPU, one seed, the backends that can run."""

import importlib.util
import os
import sys
import warnings

import pytest
import torch

if not sys.warnoptions:
    warnings.simplefilter("error")  # for the project's own imports; pytest takes it back after this file

# The tests choose what is tuned and where tables lie: each shape would be tuned, and the user's tables used.
os.environ["ELMAN_AUTOTUNE"] = "off"

from bench import machine
from tests.helpers import ANY_BACKEND, BACKENDS, DEVICE

#: What becomes of a warning in a test. It is not in pyproject.toml, which the benchmark reads too: there one
#: warning of a driver or a plugin would end the run.
WARNINGS = (
    "error",
    # torch.autograd.forward_ad's first use scripts its own decompositions: a FutureWarning from torch 2.14,
    # in other words on Python 3.14.
    "ignore:`torch.jit.script` is (deprecated|not supported)",
    # torch.compile on Python 3.13.0.
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
    # torch.export.load of torch 2.11.
    "ignore:The given buffer is not writable:UserWarning",
    # Triton 3.6's interpreter with NumPy 2.
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
    # Tests of the old weight_norm: torch says it is deprecated, and people still use it.
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
)

# The tests' matrices are small: threads cost more than they bring, and the machine may be shared.
torch.set_num_threads(1)
if torch.cuda.is_available():
    # The float32 tolerances are those of float32 products; TF32 has a test of its own.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "run Triton kernels as PTX compiled for this GPU, emulated on the CPU, instead of interpreted"
    parser.addoption("--ptx", choices=("sm_80", "sm_90"), help=words)


def _set_triton_up(config: pytest.Config) -> None:
    """How kernels run where there is no GPU: before any module that has one is imported."""
    if target := config.getoption("ptx"):
        if torch.cuda.is_available():
            raise pytest.UsageError(
                "--ptx emulates launches on CPU tensors; set CUDA_VISIBLE_DEVICES to nothing."
            )
        plugin = importlib.import_module("tests.tools.ptxsim.plugin")
        config.pluginmanager.register(plugin.Emulation(target))
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton"):
            importlib.import_module("elman.kernels.common")  # now: some tests take the variable away
            importlib.import_module("bench.interpreter").mend()


@pytest.hookimpl(trylast=True)  # pytest-benchmark warns while it is configured, beside xdist
def pytest_configure(config: pytest.Config) -> None:
    _set_triton_up(config)
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    warnings.simplefilter("error")  # for what no hook of pytest's records, such as the end of the session


def pytest_report_header() -> str:
    """Which processor the tests run on: libraries order their sums by its maker and instructions."""
    instructions = torch.backends.cpu.get_cpu_capability()
    versions = ", ".join(
        f"{name} {version}" for name, version in machine.software(torch.device(DEVICE)).items()
    )
    return f"CPU: {machine.cpu_model()}, {machine.cores()} cores, {instructions}; {versions}"


def _params(names: list[str]) -> list:
    marks = [pytest.mark.gpu] if torch.cuda.is_available() else []
    return [pytest.param(name, marks=marks) for name in names]


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that every test starts from, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(params=_params(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here, by the name that `backend=` takes."""
    return request.param


@pytest.fixture(params=_params(ANY_BACKEND))
def any_backend(request: pytest.FixtureRequest) -> str:
    """As `backend`, and without CUDA also nn.RNN's operator in our wrapper: for helpers.forward."""
    return request.param


@pytest.fixture
def fresh_compiler():
    """torch.compile without what earlier tests compiled, nor later ones with what this one did.

    Nor with backward graphs that torch keeps on the disk: their key has our operators' names, not their code.
    """
    torch.compiler.reset()
    with importlib.import_module("torch._functorch.config").patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that an element nobody wrote shows in the result."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
