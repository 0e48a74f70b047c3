"""Which backend and which kernel a call goes to, and why.

A backend asked for by name (the layer's argument first, then `use_backend`, then ELMAN_BACKEND) runs or
raises BackendUnavailableError; nothing else ever runs in its place. "auto" takes what is there:

    a sequence on CUDA    the quicker of triton and cudnn, see choice.py; eager where neither can run
    one on a CPU          native, eager where that can't run
    anything else         eager

In a graph being traced the sizes may be symbols, so Triton is taken where it can run, and which kernel
is found out when the graph runs.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from . import compiled, cores

if TYPE_CHECKING:
    from .kernels.configs import Problem

BACKENDS = ("triton", "cudnn", "native", "eager")
#: The kernels of ops.py that are loops over time: they take packed rows, and make dz in COMPUTE's dtype.
LOOPS = ("eager", "native", "cpu")
KERNELS = ("resident", "cooperative", "step")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("auto", *BACKENDS, *(f"triton:{kernel}" for kernel in KERNELS))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # what an import hook that hides a package raises
        return False


def _no_compiler() -> str | None:
    """None if Triton will find the C compiler that its first launch on a GPU needs, else why not.

    It takes what CC names, otherwise gcc or clang, and builds its driver's module once for each cache folder:
    where that is there already, it needs none. Elsewhere than on POSIX Triton brings a compiler along.
    """
    named = os.environ.get("CC")
    if os.name != "posix" or any(shutil.which(c) for c in (("gcc", "clang") if named is None else (named,))):
        return None
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    if any(glob.glob(os.path.join(glob.escape(cache), "*", name)) for name in ("cuda_utils*", "hip_utils*")):
        return None
    found = "there is no gcc and no clang" if named is None else f"CC is {named!r}, which is no program"
    return (
        f"Triton's first launch needs a C compiler, and {found}; install gcc, or set the environment "
        "variable CC to a compiler, before Python starts, or use 'cudnn' or 'eager'"
    )


def _no_kernels() -> str | None:
    """None if elman/kernels is the folder with the kernels, else why not."""
    folder = Path(__file__).with_name("kernels")
    if folder.is_dir():
        return None
    return (
        f"{folder} is no folder: it is a symlink to ../kernels, which git writes as a text file where it "
        "makes no symlinks, as on Windows; set git config core.symlinks true and check it out again (git "
        "checkout -- elman/kernels), or install the package with pip, or use 'cudnn' or 'eager'"
    )


# Found out once, and Triton not imported: torch.compile can't trace the searches.
TRITON_IS_INSTALLED = _is_installed("triton")
NO_COMPILER = _no_compiler()
NO_KERNELS = _no_kernels()
NO_CUDA = "this machine has no CUDA device (torch.cuda.is_available() is False); use 'eager'"

# A plain global, as PyTorch's own switches are: torch.compile guards on it and so compiles again when it
# changes, while it can't trace a ContextVar and takes a threading.local for a constant.
_chosen = "auto"

# What elman.onnx made to translate our operator and somebody still holds: an export that is given a table
# of it holds that table while it runs, be it a copy.
onnx_translations: weakref.WeakSet[Callable] = weakref.WeakSet()


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't run here; the message says why and what to do."""


@dataclass(frozen=True)
class Route:
    """Where a call goes: backend (one of BACKENDS), kernel, its config, and the reason.

    In a call's own Route, which `explain` completes, the kernel "triton" is the quickest for each pass,
    found when it runs, and the config is empty.
    """

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

    name: "auto", "triton", "cudnn", "native", "eager", or "triton:resident" (":cooperative", ":step") for one
    kernel. It holds for all threads of the process. The environment variable ELMAN_BACKEND does the same for
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
    ragged: bool = False,
    resets: bool = False,
) -> Route:
    """The Route of a call on tensors of this device and dtype; hidden is H, batch B, directions D.

    one_step: the call is `elman_step`, for which "auto" takes nn.RNNCell's own operator everywhere, and
    Triton has one kernel, whatever is forced for sequences. ragged: rows have lengths of their own. resets:
    they begin anew on the way.
    Raises BackendUnavailableError where a backend was asked for by name and can't run, for the
    backward pass too where gradients are enabled.
    """
    arguments = (asked_for(requested), device, dtype, hidden, batch, directions, one_step, ragged, resets)
    if device.type != "cuda" or is_traced() or type(hidden) is not int or type(batch) is not int:
        return _found(*arguments)  # make_fx's sizes, SymInts, can't be looked up
    # All else that the answer follows from and that may change while the process lives.
    key = (
        *arguments,
        torch.is_grad_enabled(),
        torch.backends.cudnn.enabled,
        dtype == torch.float32 and float32_precision(device),
        torch._C._are_functorch_transforms_active(),
        forward_ad._current_level >= 0,
    )
    found = routes.get(key)
    if found is None:
        if len(routes) > 4096:
            routes.clear()
        found = routes[key] = _found(*arguments)
    return found


#: What `route` answered on CUDA, where finding it out costs more than a short sequence; emptied by
#: `tuning.forget`.
routes: dict[tuple, Route] = {}


def _found(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    directions: int,
    one_step: bool,
    ragged: bool,
    resets: bool,
) -> Route:
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if name == "auto" and one_step and (device.type != "cpu" or is_traced() or transformed):
        name, reason = "eager", "auto: one step is one call of torch's own operator"
    elif name == "auto" and device.type == "cpu":
        if is_traced():
            return Route("native", "cpu", "auto: a graph is traced; it takes native where that can run")
        why_not = unavailable("native", device, dtype)
        name = "eager" if why_not else "native"
        reason = (
            f"auto: not native, because {why_not}" if why_not else "auto: the C loop for tensors on a CPU"
        )
    elif name == "auto" and device.type != "cuda":
        name, reason = (
            "eager",
            f"auto: the loop on plain torch is the only backend for tensors on {device.type!r}",
        )
    elif name == "auto":
        name, reason = _automatic(device, dtype, (hidden, batch, directions, ragged or resets), resets)
    else:
        reason = "asked for by name"
        backend = name.partition(":")[0]
        why_not = None if backend == "native" and is_traced() else unavailable(backend, device, dtype, resets)
        if name == "triton" and not why_not and not one_step and _sizes_are_known(hidden, batch):
            why_not = _nothing_left(
                _passes(device, dtype, (hidden, batch, directions, ragged or resets)), device
            )
        if why_not:
            raise BackendUnavailableError(f"backend {backend!r} was asked for and can't run: {why_not}")
    if name in ("eager", "native"):
        return Route(name, name, reason)
    if name == "cudnn":
        return Route("cudnn", "nn.RNN", reason)
    kernel = "cell" if one_step else name.partition(":")[2]
    expect_allowed(kernel)
    if one_step:
        return Route("triton", "cell", reason)
    if kernel and not is_traced():
        _expect_runs(kernel, _passes(device, dtype, (hidden, batch, directions, ragged or resets)), device)
    return Route("triton", kernel or "triton", reason)


def asked_for(requested: str | None) -> str:
    """The name that counts: requested, else `use_backend`'s, else ELMAN_BACKEND's; "auto" where none does."""
    name = check_name("auto" if requested is None else requested)
    if name == "auto":
        name = _chosen
    # Where it isn't set, os.environ.get raises and catches, which takes an eighth of a short call. What a
    # test puts in the place of os.environ has no such dict.
    if name == "auto" and _VARIABLE in getattr(os.environ, "_data", (_VARIABLE,)):
        named = os.environ.get("ELMAN_BACKEND") or "auto"
        name = check_name(named, "the environment variable ELMAN_BACKEND")
    return name


_VARIABLE = os.environ.encodekey("ELMAN_BACKEND")


def left_out() -> tuple[str, ...]:
    """The Triton kernels that are never launched: all that ELMAN_KERNELS, where it is set, doesn't list.

    It is for a kernel that crashed or hung on this GPU. Raises ValueError for a word that is no kernel.
    """
    allowed = [word.strip() for word in (os.environ.get("ELMAN_KERNELS") or "").split(",") if word.strip()]
    for word in allowed:
        if word not in KERNELS:
            raise ValueError(
                f"the environment variable ELMAN_KERNELS has {word!r}; expected one or several of "
                f"{', '.join(KERNELS)}, with commas between them, or nothing, which allows all"
            )
    return tuple(kernel for kernel in KERNELS if allowed and kernel not in allowed)


def not_allowed(kernel: str) -> str | None:
    """None if ELMAN_KERNELS lets the kernel be launched, else why not; "cell" is one of step's."""
    name = "step" if kernel == "cell" else kernel
    if name not in left_out():
        return None
    return (
        f"the environment variable ELMAN_KERNELS is {os.environ.get('ELMAN_KERNELS')!r}, which leaves "
        f"{name!r} out; add it there, or unset the variable, or use another backend"
    )


def expect_allowed(kernel: str) -> None:
    """Raises BackendUnavailableError where ELMAN_KERNELS leaves the kernel out."""
    why_not = not_allowed(kernel)
    if why_not:
        raise BackendUnavailableError(f"kernel {kernel!r} was asked for and can't run: {why_not}")


def _nothing_left(passes: tuple[Problem, ...], device: torch.device) -> str | None:
    """None if for each pass there is a kernel that ELMAN_KERNELS allows and that can run it, else why not."""
    if "step" not in left_out():  # which can run anything
        return None
    from . import choice

    return next(filter(None, (choice.none_runs(problem, device) for problem in passes)), None)


def _sizes_are_known(hidden: int, batch: int) -> bool:
    """Whether H and B are those of the launch: in a graph they may be symbols, and torch.vmap adds rows."""
    if is_traced() or torch._C._are_functorch_transforms_active():
        return False
    return type(hidden) is int and type(batch) is int


@contextmanager
def untraced() -> Iterator[None]:
    """Within the block torch.jit.trace records nothing, and sizes are numbers: for checks, which a trace
    would warn of one by one.
    """
    torch_c: Any = torch._C  # its stubs have only one of the two
    tracing = torch_c._get_tracing_state()
    torch_c._set_tracing_state(None)
    try:
        yield
    finally:
        torch_c._set_tracing_state(tracing)


def is_exported_as_nn_rnn() -> bool:
    """Whether torch.onnx.export looks on and wasn't told of our operator, by elman.onnx.

    The older exporter, which traces, can't be told of it.
    """
    traces = torch.jit.is_tracing()
    if not traces and not (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()):
        return False
    exporter = sys.modules.get("torch.onnx")
    if exporter is None or not exporter.is_in_onnx_export():
        return False
    return traces or not onnx_translations


def is_traced() -> bool:
    """Whether a graph is being traced, whose tensors have no numbers and may have no sizes."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


# Asked once: a graph that torch 2.11 traces can't.
_AUTOCASTING = {
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia")
    if torch.amp.is_autocast_available(name)
}


def is_autocast(device: str) -> bool:
    """Whether autocast is on for tensors of that type of device."""
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


def _passes(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, bool]
) -> tuple[Problem, ...]:
    """The forward's problem and, where gradients are enabled, the backward's; sizes: H, B, D, ragged."""
    from .kernels.configs import Problem  # not above: importing elman imports no kernel

    hidden, batch, directions, ragged = sizes
    precision = float32_precision(device) if dtype == torch.float32 else "ieee"
    forward = Problem(max(batch, 1), max(hidden, 1), directions, dtype, precision, ragged=ragged)
    return (forward, replace(forward, backward=True)) if torch.is_grad_enabled() else (forward,)


def _expect_runs(kernel: str, passes: tuple[Problem, ...], device: torch.device) -> None:
    from . import choice

    for problem in passes:
        why_not = choice.why_not(kernel, problem, device)
        if why_not:
            which = " backward" if problem.backward else ""
            raise BackendUnavailableError(
                f"kernel {kernel!r} was asked for and can't run{which}: {why_not}; use 'triton' or "
                "'triton:step'"
            )


def unavailable(backend: str, device: torch.device, dtype: torch.dtype, resets: bool = False) -> str | None:
    """None if `backend` can run on tensors of this device and dtype, else why not and what to do."""
    if backend == "eager":
        return None
    if backend == "native":
        if device.type not in ("cpu", "meta"):
            return f"the tensors are on {device.type!r}; native is for a CPU's, so use 'auto' or 'eager'"
        return compiled.unavailable(dtype == torch.float64)
    if backend == "cudnn":
        if resets:
            return "it has no resets; use 'auto', 'triton' or 'eager'"
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return (
                "it has no way through torch.func's transforms and no forward-mode derivative; use 'auto', "
                "'triton' or 'eager'"
            )
        return _cudnn_unavailable(device, dtype)
    if NO_KERNELS:
        return NO_KERNELS
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
    if NO_COMPILER:
        return NO_COMPILER
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


def _automatic(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, bool], resets: bool
) -> tuple[str, str]:
    """The backend that "auto" takes for a sequence on CUDA, and why."""
    no_triton, no_cudnn = (unavailable(backend, device, dtype, resets) for backend in ("triton", "cudnn"))
    if not no_triton and _sizes_are_known(*sizes[:2]):
        no_triton = _nothing_left(_passes(device, dtype, sizes), device)
    elif not no_triton:  # the one kernel that is sure to run
        no_triton = not_allowed("step")
    if no_triton and no_cudnn:
        return "eager", f"auto: not cudnn, because {no_cudnn}; not triton, because {no_triton}"
    if no_triton:
        return "cudnn", f"auto: not triton, because {no_triton}"
    if no_cudnn:
        return "triton", f"auto: not cudnn, because {no_cudnn}"
    if is_traced():
        return "triton", "auto: a graph is traced, and Triton's kernels are operators that it can hold"
    from . import choice

    compared = choice.compare(_passes(device, dtype, sizes), device)
    return "triton" if compared.triton <= compared.cudnn else "cudnn", f"auto: {compared.text}"


def float32_precision(device: torch.device) -> str:
    """ "tf32" or "ieee": float32 products in Triton there; on CUDA by PyTorch's switch for RNNs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


def available_backends() -> dict[str, bool | str]:
    """For each backend True, or a sentence that says why it can't run on this machine.

    It is asked for float32 tensors on the first CUDA device, or on the CPU where there is none; native is
    asked for the CPU's, and compiled if it never was.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    devices = {"native": torch.device("cpu")}
    return {b: unavailable(b, devices.get(b, device), torch.float32) or True for b in BACKENDS}


def explain(
    *,
    batch: int,
    seq: int,
    input: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    bidirectional: bool = False,
    lengths: bool = False,
    resets: bool = False,
    backend: str = "auto",
) -> Route:
    """The Route that a call of this shape would take; nothing is run and nothing is allocated.

    batch B, seq T, input I, hidden H; device defaults to the GPU if there is one. lengths, resets: whether
    the rows have lengths of their own (a PackedSequence too), or begin anew on the way. Raises TypeError
    or ValueError for a wrong argument, BackendUnavailableError as the call itself would.
    """
    for name, flag in (("lengths", lengths), ("resets", resets)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is a {type(flag).__name__}; expected a bool, whether there are any")
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
    device, D = torch.device(device), 2 if bidirectional else 1
    found = route(backend, device, dtype, hidden, batch, D, ragged=lengths, resets=resets)
    if found.backend == "native":
        shared, estimate = cores.explain(batch, input, hidden, seq, D, dtype, not (lengths or resets))
        return replace(found, reason=f"{found.reason}; {estimate}", config=shared)
    if found.backend != "triton":
        return found
    passes = _passes(device, dtype, (hidden, batch, D, lengths or resets))
    return _completed(found, passes, input, seq, device)


def _completed(
    found: Route, passes: tuple[Problem, ...], inputs: int, steps: int, device: torch.device
) -> Route:
    """The Route with the kernel and the config that its forward pass takes by what is known now."""
    from . import choice

    reason = found.reason
    kernel, problem = choice.plan(found.kernel, passes[0], device, steps, inputs)
    if kernel == "cell":
        reason += "; a sequence of one step is one launch of the cell"
    elif found.kernel == "triton":
        if "us a step" not in reason:
            reason += f"; {choice.compare(passes, device, with_cudnn=False).text}"
        us, _ = choice.times(passes[0], device)
        if us[kernel] > min(us.values()):
            reason += f"; over {steps} steps a launch's fixed time tells"
    if problem.inputs:
        reason += "; it makes the input product too"
    return Route("triton", kernel, reason, dict(vars(choice.config(kernel, problem, device, tuned=False))))
