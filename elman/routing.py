"""Which backend and which kernel a call goes to, and why.

A backend asked for by name (the layer's argument first, then `use_backend`, then ELMAN_BACKEND) runs or
raises BackendUnavailableError; nothing else ever runs in its place. "auto" takes what is there:

    a sequence on CUDA    cudnn, else triton, else eager    (no Triton kernel has been timed yet)
    anything else         eager
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

BACKENDS = ("triton", "cudnn", "eager")
KERNELS = ("resident", "step")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("auto", *BACKENDS, *(f"triton:{kernel}" for kernel in KERNELS))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # what an import hook that hides a package raises
        return False


# Found out once, and not imported: torch.compile can't trace the search.
TRITON_IS_INSTALLED = _is_installed("triton")
NO_CUDA = "this machine has no CUDA device (torch.cuda.is_available() is False); use 'eager'"

# A plain global, as PyTorch's own switches are: torch.compile guards on it and so compiles again when it
# changes, while it can't trace a ContextVar and takes a threading.local for a constant.
_chosen = "auto"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't run here; the message says why and what to do."""


@dataclass(frozen=True)
class Route:
    """Where a call goes: backend ("triton", "cudnn", "eager"), kernel, its config, and the reason."""

    backend: str
    kernel: str
    reason: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        config = ", ".join(f"{name}={value}" for name, value in self.config.items())
        kernel = f", kernel {self.kernel} ({config})" if config else ""
        return f"{self.backend}{kernel}: {self.reason}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, layers that were built with backend="auto" use `name`.

    name: "auto", "triton", "cudnn", "eager", or "triton:resident" / "triton:step" to force a kernel.
    It holds for all threads of the process. The environment variable ELMAN_BACKEND does the same for
    a whole run. Raises ValueError for another name; whether the backend can run is found out by the
    call that needs it.
    """
    global _chosen
    before, _chosen = _chosen, check_name(name)
    try:
        yield
    finally:
        _chosen = before


def check_name(name: str, source: str = "backend") -> str:
    """name, if it is one of NAMES, else a ValueError naming its source."""
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(NAMES)}")
    return name


def route(
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    directions: int = 1,
    one_step: bool = False,
) -> Route:
    """The Route of a call on tensors of this device and dtype; hidden is H, batch B, directions D.

    one_step: the call is `elman_step`, for which "auto" takes nn.RNNCell's own operator everywhere, and
    Triton has one kernel, whatever is forced for sequences.
    Raises BackendUnavailableError where a backend was asked for by name and can't run.
    """
    name = check_name("auto" if requested is None else requested)
    if name == "auto":
        name = _chosen
    if name == "auto":
        named = os.environ.get("ELMAN_BACKEND") or "auto"
        name = check_name(named, "the environment variable ELMAN_BACKEND")
    if name == "auto" and one_step:
        name, reason = "eager", "auto: one step is one call of torch's own operator"
    elif name == "auto":
        name, reason = _automatic(device, dtype)
    else:
        reason = "asked for by name"
        backend = name.partition(":")[0]
        why_not = unavailable(backend, device, dtype)
        if why_not:
            raise BackendUnavailableError(f"backend {backend!r} was asked for and can't run: {why_not}")
    if name == "eager":
        return Route("eager", "eager", reason)
    if name == "cudnn":
        return Route("cudnn", "nn.RNN", reason)
    kernel = "cell" if one_step else name.partition(":")[2]
    return _triton_route(kernel, reason, device, dtype, (batch, hidden, directions))


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `backend` can run on tensors of this device and dtype, else why not and what to do."""
    if backend == "eager":
        return None
    if backend == "cudnn":
        return _cudnn_unavailable(device, dtype)
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed; install the triton package, or use backend 'eager'"
    if device.type == "cpu":
        kernels = sys.modules.get("elman.kernels.common")
        if os.environ.get("TRITON_INTERPRET") == "1" and (kernels is None or kernels.INTERPRETED):
            return None
        return (
            "the tensors are on the CPU, where Triton kernels run in Triton's interpreter only; set "
            "TRITON_INTERPRET=1 before the first use of triton (slow, for testing), or use 'eager'"
        )
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}; Triton needs a CUDA or ROCm GPU, so use 'eager'"
    if not torch.cuda.is_available():
        return NO_CUDA
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the kernels "
            "need 8.0 or newer, so use 'cudnn' or 'eager'"
        )
    return None


def _cudnn_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}; cuDNN needs a CUDA GPU, so use 'eager'"
    if not torch.cuda.is_available():
        return NO_CUDA
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "this torch has no cuDNN or it is switched off; see torch.backends.cudnn.enabled"
    version = torch.backends.cudnn.version() or 0
    if dtype == torch.bfloat16 and torch.version.hip is None and version < 91300:
        return f"cuDNN {version} has no bfloat16 RNN; update to 9.13 or newer, or use 'triton'"
    return None


def _automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that "auto" takes, and why."""
    if device.type != "cuda":
        return "eager", f"auto: the loop on plain torch is the only backend for tensors on {device.type!r}"
    why_not = {b: unavailable(b, device, dtype) for b in ("cudnn", "triton", "eager")}
    backend = next(b for b, reason in why_not.items() if reason is None)
    reasons = {
        "cudnn": "no Triton kernel has been timed on this GPU yet; ask for 'triton' to use them",
        "triton": f"not cudnn, because {why_not['cudnn']}",
        "eager": f"not cudnn, because {why_not['cudnn']}; not triton, because {why_not['triton']}",
    }
    return backend, f"auto: {reasons[backend]}"


def _triton_route(
    kernel: str, reason: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> Route:
    from .kernels import configs
    from .kernels.common import chip

    (B, H, D), itemsize, precision = sizes, dtype.itemsize, float32_precision(device)
    processors, limit = chip(device)
    fits = configs.resident_fits(H, itemsize, limit, precision)
    room = f"on one multiprocessor, which grants {limit} bytes"
    if kernel == "resident" and not fits:
        raise BackendUnavailableError(
            f"kernel 'resident' was asked for and can't run: W_hh with hidden size {H} in {dtype} does not "
            f"fit {room}; use 'triton' or 'triton:step'"
        )
    if not kernel:
        kernel = "resident" if fits else "step"
        reason += f"; W_hh {'fits' if fits else 'does not fit'} {room}"
    if kernel == "resident":
        resident = configs.choose_resident(B, H, D, itemsize, processors, limit, precision)
        return Route("triton", kernel, reason, asdict(resident))
    return Route("triton", kernel, reason, asdict(configs.choose_step(B, H, D, itemsize, processors)))


def float32_precision(device: torch.device) -> str:
    """ "tf32" or "ieee": float32 products in Triton there; on CUDA by PyTorch's switch for RNNs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


def available_backends() -> dict[str, bool | str]:
    """For each backend True, or a sentence that says why it can't run on this machine.

    It is asked for float32 tensors on the first CUDA device, or on the CPU where there is none.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return {b: unavailable(b, device, torch.float32) or True for b in BACKENDS}


def explain(
    *,
    batch: int,
    seq: int,
    input: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    bidirectional: bool = False,
    backend: str = "auto",
) -> Route:
    """The Route that a call of this shape would take; nothing is run and nothing is allocated.

    batch B, seq T, input I, hidden H; device defaults to the GPU if there is one. Raises TypeError
    or ValueError for a wrong argument, BackendUnavailableError as the call itself would.
    """
    for name, size in (("batch", batch), ("seq", seq), ("input", input), ("hidden", hidden)):
        if not isinstance(size, int):
            raise TypeError(f"{name} is a {type(size).__name__}; expected an int, a size of at least 1")
        if size < 1:
            raise ValueError(f"{name} is {size}; expected a size of at least 1")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; expected a torch.dtype such as torch.bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected {', '.join(map(str, DTYPES))}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return route(backend, torch.device(device), dtype, hidden, batch, 2 if bidirectional else 1)
