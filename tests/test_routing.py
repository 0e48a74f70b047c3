"""Which backend a call goes to and why; the command line; the import."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import elman
from elman import (
    BackendUnavailableError,
    Elman,
    ElmanCell,
    ElmanNetwork,
    choice,
    cli,
    compiled,
    functional,
    native,
    ops,
    routing,
    tuning,
)
from elman.kernels import configs, resident, step
from elman.kernels.common import chip
from tests.machines import simulate_gpu

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = {"batch": 16, "seq": 64, "input": 32, "hidden": 64}
NO_GCC = "Triton's first launch needs a C compiler, and there is none; install gcc"
#: Whether native can run on this machine, and what auto takes for tensors on a CPU.
NATIVE = compiled.unavailable() or True
ON_CPU = "native" if NATIVE is True else "eager"
X = torch.ones(3, 2, 5)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No variable of the caller's decides; conftest.py sets TRITON_INTERPRET for all other tests."""
    for variable in ("ELMAN_BACKEND", "ELMAN_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def no_tuned_tables(monkeypatch, tmp_path):
    """None of the caller's own, and nothing remembered from one test to the next."""
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ELMAN_AUTOTUNE", raising=False)
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def machine(monkeypatch):
    """Makes this look like another machine to routing; nothing is run there."""

    def make(triton=True, **what):
        simulate_gpu(monkeypatch, **what)
        monkeypatch.setattr(routing, "TRITON_IS_INSTALLED", triton)
        monkeypatch.setattr(choice, "cudnn_us", lambda problem: 0.0)  # where both can run, auto takes cudnn
        tuning.forget()

    return make


# Precedence

# argument, use_backend (None: not used), ELMAN_BACKEND (None: not set) -> backend, on a machine that has all
PRECEDENCE = [
    (None, None, None, "cudnn"),
    ("auto", None, None, "cudnn"),
    ("auto", None, "eager", "eager"),
    ("auto", None, "triton", "triton"),
    ("auto", None, "auto", "cudnn"),
    ("auto", "triton", None, "triton"),
    ("auto", "triton", "eager", "triton"),
    ("auto", "auto", "eager", "eager"),
    ("eager", None, None, "eager"),
    ("eager", "triton", None, "eager"),
    ("eager", None, "triton", "eager"),
    ("cudnn", "triton", "eager", "cudnn"),
    ("triton:step", "cudnn", "eager", "triton"),
    (None, "eager", "triton", "eager"),
]


@pytest.mark.parametrize(("argument", "chosen", "variable", "expected"), PRECEDENCE)
def test_precedence(machine, monkeypatch, argument, chosen, variable, expected):
    machine()
    if variable is not None:
        monkeypatch.setenv("ELMAN_BACKEND", variable)
    with elman.use_backend(chosen or "auto"):
        route = routing.route(argument, CUDA, torch.float32, 64, 16)
    assert route.backend == expected
    by_name = [name for name in (argument, chosen, variable) if name not in (None, "auto")]
    assert ("asked for by name" in route.reason) == bool(by_name)
    assert route.reason.startswith("auto: ") == (not by_name)


W = [torch.ones(7, 5), torch.ones(7, 7), torch.ones(7), torch.ones(7)]
CALLS = {
    "Elman": lambda backend: Elman(5, 7, backend=backend)(X),
    "ElmanCell": lambda backend: ElmanCell(5, 7, backend=backend)(X[0]),
    "ElmanNetwork": lambda backend: ElmanNetwork(5, 7, 2, backend=backend)(X),
    "elman": lambda backend: elman.elman(X, None, W, backend=backend),
    "elman_step": lambda backend: elman.elman_step(X[0], None, *W, backend=backend),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_entry_obeys(call, monkeypatch):
    # cudnn can't run on CPU tensors, so whoever listens to it raises.
    call("auto")
    with pytest.raises(BackendUnavailableError, match="cuDNN needs a CUDA GPU"):
        call("cudnn")
    with elman.use_backend("cudnn"):
        call("eager")
        with pytest.raises(BackendUnavailableError, match="cuDNN"):
            call("auto")
    monkeypatch.setenv("ELMAN_BACKEND", "cudnn")
    with pytest.raises(BackendUnavailableError, match="cuDNN"):
        call("auto")
    with elman.use_backend("eager"):
        call("auto")


def chosen() -> str:
    try:
        elman.elman(X, None, W)
    except BackendUnavailableError as error:
        return "cudnn" if "cuDNN" in str(error) else "triton"
    return "eager"


def test_use_backend_nests_and_is_put_back_after_an_exception():
    with elman.use_backend("cudnn"):
        with elman.use_backend("triton"):
            assert chosen() == "triton"
            with elman.use_backend("eager"):
                assert chosen() == "eager"
            assert chosen() == "triton"
        assert chosen() == "cudnn"
        with pytest.raises(ZeroDivisionError), elman.use_backend("eager"):
            raise ZeroDivisionError
        assert chosen() == "cudnn"
        with pytest.raises(ValueError, match="backend"), elman.use_backend("gpu"):
            pytest.fail("the block was entered")
        assert chosen() == "cudnn"
    assert chosen() == "eager"


def test_use_backend_holds_for_all_threads():
    seen = []
    with elman.use_backend("cudnn"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cudnn"]


def test_use_backend_decorates():
    assert elman.use_backend("cudnn")(chosen)() == "cudnn"
    assert chosen() == "eager"


# Named backends that can't run: (backend, device, reason, remedy)
REFUSED = [
    ("cudnn", CPU, "tensors are on 'cpu'", "use 'eager'"),
    ("triton", CPU, "on the CPU", "TRITON_INTERPRET=1"),
    ("triton:step", CPU, "on the CPU", "TRITON_INTERPRET=1"),
    ("triton", torch.device("xpu"), "'xpu'", "use 'eager'"),
    ("cudnn", torch.device("xpu"), "'xpu'", "use 'eager'"),
]


@pytest.mark.parametrize(("backend", "device", "reason", "remedy"), REFUSED, ids=str)
def test_a_named_backend_that_cannot_run_says_so(backend, device, reason, remedy):
    with pytest.raises(BackendUnavailableError) as raised:
        elman.explain(**SHAPE, device=device, backend=backend)
    message = str(raised.value)
    assert isinstance(raised.value, RuntimeError)
    for words in (repr(backend.partition(":")[0]), "was asked for and can't run", reason, remedy):
        assert words in message


def test_the_error_stands_in_no_context():
    # A sentence, not the tail of an ImportError's traceback.
    with pytest.raises(BackendUnavailableError) as raised:
        Elman(5, 7, backend="triton")(X)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


def test_triton_on_the_cpu_under_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert elman.explain(**SHAPE, device="cpu", backend="triton").backend == "triton"
    assert elman.explain(**SHAPE, device="cpu").backend == ON_CPU, "the interpreter is no choice of auto's"
    layer = Elman(5, 7, backend="triton")
    layer(X)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError):
        elman.explain(**SHAPE, device="cpu", backend="triton")
    with pytest.raises(BackendUnavailableError):
        layer(X)


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_auto_without_cuda_is_eager(device):
    route = elman.explain(**SHAPE, device=device)
    assert route.backend == "eager"
    assert route.reason.startswith("auto: ")
    assert repr(device) in route.reason


def test_auto_on_a_cpu_is_native_where_that_can_run(monkeypatch):
    assert elman.explain(**SHAPE, device="cpu").backend == ON_CPU
    monkeypatch.setattr(compiled, "unavailable", lambda double=False: "there is no gcc")
    route = elman.explain(**SHAPE, device="cpu")
    assert (route.backend, route.reason) == ("eager", "auto: not native, because there is no gcc")
    with pytest.raises(
        BackendUnavailableError, match="'native' was asked for and can't run: there is no gcc"
    ):
        elman.explain(**SHAPE, device="cpu", backend="native")


# Simulated machines

# machine, dtype -> auto's backend, words of its reason
MACHINES = {
    "all there": ({}, torch.float32, "cudnn", ("cudnn 0.00 us a step", "no tuned table for Simulated GPU")),
    "no cuDNN": ({"cudnn": None}, torch.float32, "triton", ("not cudnn", "no cuDNN")),
    "no triton": ({"triton": False}, torch.float32, "cudnn", ("not triton", "not installed")),
    "old GPU": ({"capability": (7, 5)}, torch.float32, "cudnn", ()),
    "old GPU, no cuDNN": (
        {"capability": (7, 5), "cudnn": None},
        torch.float32,
        "eager",
        ("not cudnn", "not triton", "Simulated GPU", "7.5", "8.0"),
    ),
    "nothing": (
        {"triton": False, "cudnn": None},
        torch.float32,
        "eager",
        ("no cuDNN", "Triton is not installed"),
    ),
    "old cuDNN, bfloat16": ({"cudnn": 90100}, torch.bfloat16, "triton", ("90100", "bfloat16", "9.13")),
    "old cuDNN, float16": ({"cudnn": 90100}, torch.float16, "cudnn", ()),
    "new cuDNN, bfloat16": ({"cudnn": 91300}, torch.bfloat16, "cudnn", ()),
    "ROCm, no MIOpen": ({"hip": "6.4", "capability": (9, 4), "cudnn": None}, torch.float32, "triton", ()),
    # A gfx number is no CUDA capability.
    "ROCm, gfx7": ({"hip": "6.4", "capability": (7, 0), "cudnn": None}, torch.float32, "triton", ()),
}


@pytest.mark.parametrize(("what", "dtype", "backend", "words"), MACHINES.values(), ids=MACHINES.keys())
def test_auto_on(machine, what, dtype, backend, words):
    machine(**what)
    route = elman.explain(**SHAPE, dtype=dtype, device="cuda")
    assert route.backend == backend
    assert route.reason.startswith("auto: ")
    for word in words:
        assert word in route.reason
    assert elman.explain(**SHAPE, dtype=dtype) == route, "the GPU is the device unless another is named"


def test_without_a_compiler_auto_takes_cudnn(machine):
    machine(no_compiler=NO_GCC)
    route = elman.explain(**SHAPE, device="cuda")
    assert (route.backend, route.reason) == ("cudnn", f"auto: not triton, because {NO_GCC}")
    assert elman.available_backends() == {"triton": NO_GCC, "cudnn": True, "native": NATIVE, "eager": True}
    machine(no_compiler=NO_GCC, cudnn=None)
    assert elman.explain(**SHAPE, device="cuda").backend == "eager"


# CC, programs on the PATH, files in Triton's cache -> words of why Triton can't build, None if it can
COMPILERS = {
    "gcc": (None, ["gcc"], [], None),
    "clang": (None, ["clang"], [], None),
    "none": (None, [], [], "no gcc and no clang"),
    "another": (None, ["cc"], [], "no gcc and no clang"),
    "CC": ("icx", ["icx"], [], None),
    "CC is first": ("icx", ["gcc"], [], "CC is 'icx', which is no program"),
    "CC is empty": ("", ["gcc"], [], "CC is '', which is no program"),
    "built before": (None, [], ["ABC/cuda_utils.cpython-311-x86_64-linux-gnu.so"], None),
    "built before, AMD": ("icx", [], ["ABC/hip_utils.so"], None),
    "only kernels": (None, [], ["ABC/forward_kernel.cubin"], "no gcc and no clang"),
}


@pytest.mark.skipif(os.name != "posix", reason="Triton brings a compiler along there")
@pytest.mark.parametrize(("named", "programs", "cached", "words"), COMPILERS.values(), ids=COMPILERS.keys())
@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_the_compiler_that_triton_would_find(monkeypatch, tmp_path, variable, named, programs, cached, words):
    cache = tmp_path / "a [cache]" / (".triton/cache" if variable != "TRITON_CACHE_DIR" else "")
    for file in (*(tmp_path / "bin" / name for name in programs), *(cache / name for name in cached)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o755)
    for name in ("CC", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv(variable, str(tmp_path / "a [cache]"))
    if named is not None:
        monkeypatch.setenv("CC", named)
    why_not = routing._no_compiler()
    assert (why_not is None) == (words is None)
    if words:
        for part in (words, "install gcc", "set the environment variable CC", "'cudnn' or 'eager'"):
            assert part in why_not


# machine, dtype, backend -> words of the refusal
REFUSALS = {
    "no cuDNN": ({"cudnn": None}, torch.float32, "cudnn", ("no cuDNN", "torch.backends.cudnn.enabled")),
    "no triton": (
        {"triton": False},
        torch.float32,
        "triton",
        ("not installed", "install the triton package"),
    ),
    "no compiler": ({"no_compiler": NO_GCC}, torch.float32, "triton", ("needs a C compiler", "install gcc")),
    "old GPU": ({"capability": (7, 5)}, torch.float32, "triton", ("7.5", "8.0 or newer", "use 'cudnn'")),
    "old cuDNN": ({"cudnn": 90100}, torch.bfloat16, "cudnn", ("90100", "9.13", "use 'triton'")),
    "too large": ({}, torch.float32, "triton:resident", ("4096", "Simulated GPU", "triton:step")),
}


@pytest.mark.parametrize(("what", "dtype", "backend", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_named_on(machine, what, dtype, backend, words):
    machine(**what)
    with pytest.raises(BackendUnavailableError, match="can't run") as raised:
        elman.explain(**{**SHAPE, "hidden": 4096}, dtype=dtype, device="cuda", backend=backend)
    for word in words:
        assert word in str(raised.value)


def test_cudnn_switched_off(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert elman.explain(**SHAPE, device="cuda").backend == "triton"
    with pytest.raises(BackendUnavailableError, match="switched off"):
        elman.explain(**SHAPE, device="cuda", backend="cudnn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [64, 128, 224, 256, 264, 384, 512, 1024, 2048])
def test_triton_takes_the_kernel_that_the_model_makes_the_quickest(machine, hidden, dtype):
    machine(name="A GPU without a table")
    call = {**SHAPE, "seq": 1024, "dtype": dtype, "device": "cuda", "backend": "triton"}
    route = elman.explain(**{**call, "hidden": hidden, "input": hidden})
    problem = configs.Problem(16, hidden, 1, dtype, routing.float32_precision(CUDA))
    us = {}
    for kernel in configs.KERNELS:
        found = configs.candidates(kernel, problem, chip(CUDA))
        us |= {kernel: found[0][1].us} if found else {}
    assert us[route.kernel] == min(us.values())
    assert f"{route.kernel} {us[route.kernel]:.2f}" in route.reason
    if "makes the input product too" in route.reason:
        problem = dataclasses.replace(problem, inputs=hidden)
    assert dict(route.config) == vars(configs.choose(route.kernel, problem, chip(CUDA)))
    if dtype == torch.bfloat16:
        assert route.kernel == (
            "resident" if hidden <= 256 else "cooperative" if hidden >= 512 else route.kernel
        )


def test_a_kernel_asked_for_by_name_is_taken(machine):
    machine()
    for kernel in configs.KERNELS:
        call = {**SHAPE, "dtype": torch.bfloat16, "device": "cuda", "backend": f"triton:{kernel}"}
        assert elman.explain(**call).kernel == kernel


# machine, device, dtype -> words of the refusal of triton:cooperative
ALONE = {
    "interpreter": ({}, CPU, torch.float32, "one after another"),
    "ROCm": ({"hip": "6.4", "capability": (9, 4)}, CUDA, torch.float32, "one for each die"),
    "float64": ({}, CUDA, torch.float64, "float64"),
}


@pytest.mark.parametrize(("what", "device", "dtype", "words"), ALONE.values(), ids=ALONE.keys())
def test_where_cooperative_is_not_on_offer(machine, monkeypatch, what, device, dtype, words):
    machine(**what)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    call = {**SHAPE, "hidden": 1024, "dtype": dtype, "device": device}
    with pytest.raises(BackendUnavailableError, match=words):
        elman.explain(**call, backend="triton:cooperative")
    route = elman.explain(**call, backend="triton")
    assert route.kernel != "cooperative"
    assert "cooperative" not in route.reason


def test_a_kernel_by_name_must_have_a_backward_only_where_gradients_are_enabled(machine, monkeypatch):
    machine()
    real = configs.candidates
    forward_only = lambda k, p, chip: () if k == "resident" and p.backward else real(k, p, chip)  # noqa: E731
    monkeypatch.setattr(configs, "candidates", forward_only)
    call = {**SHAPE, "device": "cuda", "backend": "triton:resident"}
    with pytest.raises(BackendUnavailableError, match="can't run backward"):
        elman.explain(**call)
    with torch.no_grad():
        assert elman.explain(**call).kernel == "resident"


def test_explain_knows_lengths_and_resets(machine):
    machine()
    call = {**SHAPE, "device": "cuda"}
    assert elman.explain(**call).backend == elman.explain(**call, lengths=True).backend == "cudnn"
    assert elman.explain(**call, resets=True).backend == "triton"
    with pytest.raises(BackendUnavailableError, match="it has no resets"):
        elman.explain(**call, resets=True, backend="cudnn")
    with pytest.raises(TypeError, match="lengths is a Tensor; expected a bool"):
        elman.explain(**call, lengths=torch.tensor([1, 2]))


def test_within_a_transform_auto_leaves_cudnn_alone(machine):
    """Neither vmap nor a dual number knows a way through nn.RNN's operator."""
    machine()
    arguments = torch.device("cuda"), torch.float32, 64, 8

    def backend(x):
        routes.append(routing.route(None, *arguments).backend)
        with pytest.raises(BackendUnavailableError, match="no way through torch"):
            routing.route("cudnn", *arguments)
        return x

    routes = [routing.route(None, *arguments, resets=True).backend]
    torch.func.vmap(backend)(torch.ones(2))
    torch.func.jvp(backend, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        backend(torch.ones(2))
    assert routes == ["triton"] * 4
    assert routing.route("cudnn", *arguments).backend == "cudnn"


@pytest.mark.parametrize(("cudnn_us", "backend"), [(0.0, "cudnn"), (1e6, "triton")])
def test_auto_takes_the_quicker(machine, monkeypatch, cudnn_us, backend):
    machine()
    monkeypatch.setattr(choice, "cudnn_us", lambda problem: cudnn_us)
    route = elman.explain(**SHAPE, device="cuda")
    assert route.backend == backend
    assert f"cudnn {cudnn_us:.2f} us a step forward; " in route.reason
    assert f"cudnn {cudnn_us:.2f} us a step backward (resource model and published figures" in route.reason
    with torch.no_grad():
        assert "backward" not in elman.explain(**SHAPE, device="cuda").reason


# dtype, H, ragged, backward -> what is published for cuDNN
PUBLISHED = [
    (torch.float16, 120, False, False, 0.62),
    (torch.bfloat16, 224, False, False, 0.93),
    (torch.float16, 264, False, False, 3.9),
    (torch.float32, 264, False, False, 9.5),
    (torch.float16, 336, False, False, 8.3),
    (torch.bfloat16, 512, False, False, 7.9),
    (torch.float32, 2048, False, False, 9.3),
    (torch.float16, 120, True, False, 7.9),
    (torch.float64, 120, False, False, 9.3),
    (torch.float16, 120, False, True, 1.85),
    (torch.float16, 264, False, True, 15.2),
    (torch.float16, 120, True, True, 15.2),
]


@pytest.mark.parametrize(("dtype", "hidden", "ragged", "backward", "us"), PUBLISHED)
def test_published_figures_of_cudnn(dtype, hidden, ragged, backward, us):
    problem = configs.Problem(16, hidden, 1, dtype, "ieee", backward, ragged=ragged)
    assert choice.cudnn_us(problem) == us


def test_rows_of_differing_lengths_count_against_cudnn(machine, monkeypatch):
    machine()
    monkeypatch.setattr(choice, "cudnn_us", lambda problem: 1e6 if problem.ragged else 0.0)
    for ragged, backend in ((False, "cudnn"), (True, "triton")):
        assert routing.route(None, CUDA, torch.float32, 64, 16, ragged=ragged).backend == backend


def test_a_traced_graph_takes_triton_and_asks_no_size(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(choice, "compare", None)
    route = routing.route(None, CUDA, torch.float32, "a symbol", "a symbol")
    assert (route.backend, route.kernel) == ("triton", "triton")
    named = routing.route("triton:resident", CUDA, torch.float32, "a symbol", "a symbol")
    assert named.kernel == "resident"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["triton", "triton:step"])
def test_a_graph_holds_triton_s_kernels(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = Elman(5, 7, backend=backend)
    expected = layer(X)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(X)[0], expected)
    compiled(X)[0].sum().backward()
    exported = torch.export.export(layer, (X,), dynamic_shapes=({1: torch.export.Dim("batch")},))
    wider = torch.ones(3, 4, 5)
    assert torch.equal(exported.module()(wider)[0], layer(wider)[0])


def test_a_fused_input_product_is_explained(machine):
    machine()
    call = {
        **SHAPE,
        "seq": 2,
        "input": 1,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "backend": "triton:resident",
    }
    problem = configs.Problem(16, 64, 1, torch.bfloat16)
    if not configs.candidates("resident", dataclasses.replace(problem, inputs=1), chip(CUDA)):
        pytest.skip("no config makes the input product")
    assert choice.fuses(problem, 1, 1, CUDA), "a launch saved is more than a step"
    assert "input product too" in elman.explain(**call).reason
    for inputs in (0, 65):
        assert not choice.fuses(problem, inputs, 1, CUDA)
    assert "input product" not in elman.explain(**{**call, "input": 65}).reason


# backend, seq, bidirectional -> whether the call is one launch of the cell
CELLS = [
    ("triton", 1, False, True),
    ("triton:step", 1, False, True),
    ("triton:resident", 1, False, False),
    ("triton", 2, False, False),
    ("triton:step", 1, True, False),
]


@pytest.mark.parametrize(("backend", "seq", "bidirectional", "cell"), CELLS)
def test_one_step_is_explained_as_what_it_launches(backend, seq, bidirectional, cell, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched, real = [], step.cell
    monkeypatch.setattr(step, "cell", lambda *arguments: (launched.append(arguments[-1]), real(*arguments)))
    sizes = {"input": 5, "hidden": 7, "bidirectional": bidirectional, "backend": backend}
    route = elman.explain(batch=2, seq=seq, device="cpu", **sizes)
    with torch.no_grad():
        Elman(5, 7, bidirectional=bidirectional, backend=backend)(X[:seq])
    assert (route.kernel == "cell") == ("one launch of the cell" in route.reason) == bool(launched) == cell
    if cell:
        assert dict(route.config) == vars(launched[0])
        assert "input product too" in route.reason


# B, dtype, bidirectional, packed; I = H = 64, torch has 3 threads -> threads of one step, None for a scan
STEPS = {
    (32, torch.float32, False, False): (1, "262144 multiply-adds are on one thread, as up to 262144 are"),
    (33, torch.float32, False, False): (3, "270336 multiply-adds are on as many threads as torch has, 3, as"),
    (33, torch.bfloat16, False, False): (
        3,
        "270336 multiply-adds are on as many threads as torch has, 3, as",
    ),
    (32, torch.float32, True, False): (1, "262144 multiply-adds are on one thread, as up to 262144 are"),
    (33, torch.float32, True, False): (3, "270336 multiply-adds are on as many threads as torch has, 3, as"),
    (32, torch.float32, False, True): (None, "us a step on one core"),
}


@pytest.mark.skipif(NATIVE is not True, reason=f"native: {NATIVE}")
@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_one_step_on_a_cpu_is_explained_as_what_c_is_told(monkeypatch, shape):
    (B, dtype, bidirectional, packed), (threads, words) = shape, STEPS[shape]
    library, told, scans = compiled.library(), [], []
    affine, scan = library.affine, native._scan
    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(library, "affine", lambda given: told.append(given[-16:-8]) or affine(given))
    monkeypatch.setattr(native, "_scan", lambda *arguments: scans.append(1) or scan(*arguments))
    sizes = {"input": 64, "hidden": 64, "dtype": dtype, "device": "cpu", "bidirectional": bidirectional}
    route = elman.explain(batch=B, seq=1, lengths=packed, **sizes)
    x = torch.ones(1, B, 64, dtype=dtype)
    with torch.no_grad():
        layer = Elman(64, 64, bidirectional=bidirectional, dtype=dtype)
        layer(torch.nn.utils.rnn.pack_padded_sequence(x, torch.ones(B)) if packed else x)
    assert words in route.reason
    assert (threads is None) == bool(scans) == ("us a step" in route.reason)
    if threads:
        assert dict(route.config) == {"threads": threads}
        assert {int.from_bytes(last, sys.byteorder) for last in told} == {threads}


def test_a_few_steps_are_explained(machine):
    machine()
    call = {**SHAPE, "hidden": 1024, "dtype": torch.bfloat16, "device": "cuda", "backend": "triton"}
    few, many = (elman.explain(**{**call, "seq": seq}) for seq in (4, 1024))
    assert (few.kernel, many.kernel) == ("step", "cooperative")
    assert "over 4 steps a launch's fixed time tells" in few.reason
    assert "fixed time" not in many.reason


def test_the_kernels_that_can_be_named_are_those_there_are():
    assert routing.KERNELS == configs.KERNELS


# ELMAN_KERNELS


@pytest.fixture
def allow(monkeypatch):
    """allow(kernels): what ELMAN_KERNELS lists, and nothing cached from before."""

    def set_variable(kernels: str) -> None:
        monkeypatch.setenv("ELMAN_KERNELS", kernels)
        tuning.forget()

    return set_variable


def test_a_kernel_that_is_left_out_is_not_taken(machine, allow, monkeypatch):
    machine()
    monkeypatch.setattr(choice, "cudnn_us", lambda problem: 1e6)
    call = {**SHAPE, "hidden": 1024, "seq": 1024, "dtype": torch.bfloat16, "device": "cuda"}
    assert elman.explain(**call).kernel == "cooperative"
    allow("resident, step")
    for backend in ("auto", "triton"):
        route = elman.explain(**call, backend=backend)
        assert (route.backend, route.kernel) == ("triton", "step")
        assert "ELMAN_KERNELS leaves out cooperative" in route.reason
    with pytest.raises(BackendUnavailableError, match="ELMAN_KERNELS is 'resident, step', which leaves"):
        elman.explain(**call, backend="triton:cooperative")
    allow("")
    assert elman.explain(**call).kernel == "cooperative"


def test_where_no_kernel_is_left(machine, allow):
    machine()
    call = {**SHAPE, "hidden": 2048, "dtype": torch.bfloat16, "device": "cuda"}
    allow("resident")
    route = elman.explain(**call)
    assert route.backend == "cudnn"
    for words in ("not triton", "resident: none of its configs fits", "ELMAN_KERNELS is 'resident'"):
        assert words in route.reason
    with pytest.raises(
        BackendUnavailableError, match=r"asked for and can't run: .* ELMAN_KERNELS is 'resident'"
    ):
        elman.explain(**call, backend="triton")
    machine(cudnn=None)
    assert elman.explain(**call).backend == "eager"
    assert elman.explain(**{**call, "hidden": 64}).kernel == "resident"


@pytest.mark.parametrize("why", ["traced", "vmap", "symbols"])
def test_before_the_sizes_are_known_the_kernel_step_alone_is_sure_to_run(machine, allow, monkeypatch, why):
    machine(cudnn=None)
    hidden = 64
    if why == "traced":
        monkeypatch.setattr(routing, "is_traced", lambda: True)
    elif why == "vmap":
        monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    else:
        hidden = type("Symbol", (int,), {})(hidden)
    arguments = (CUDA, torch.bfloat16, hidden, 16)
    allow("step")
    assert routing.route("auto", *arguments).backend == "triton"
    allow("resident")
    route = routing.route("auto", *arguments)
    assert route.backend == "eager"
    assert "ELMAN_KERNELS is 'resident'" in route.reason
    assert routing.route("triton", *arguments).backend == "triton", "who names it has the launch decide"
    with pytest.raises(BackendUnavailableError, match="ELMAN_KERNELS"):
        routing.route("triton:step", *arguments)


@pytest.mark.parametrize("kernel", ["resident", "step"])
def test_only_what_is_allowed_is_launched(allow, monkeypatch, kernel):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched = set()
    for module in (resident, step):
        for name in {"cell", "scan", "scan_fused", "scan_backward"} & set(vars(module)):
            real, own = getattr(module, name), module.__name__.rpartition(".")[2]
            monkeypatch.setattr(
                module, name, lambda *a, own=own, real=real: launched.add(own) or real(*a), raising=True
            )
    allow(kernel)
    for T in (1, 3):
        for bidirectional in (False, True):
            output, _ = Elman(5, 7, bidirectional=bidirectional, backend="triton")(X[:T])
            output.sum().backward()
    assert launched == {kernel}


OPERATORS = [("step", 3), ("step", 1), ("cell", 1), ("resident", 3)]


@pytest.mark.parametrize(("kernel", "T"), OPERATORS)
def test_an_operator_that_names_a_kernel_that_is_left_out_raises(allow, monkeypatch, kernel, T):
    """As a graph's does that was made before."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    allow("resident" if kernel != "resident" else "step")
    w_ih, w_hh, h0, rest = (
        torch.ones(1, 7, 5),
        torch.ones(1, 7, 7),
        torch.zeros(1, 2, 7),
        ("tanh", kernel, "ieee"),
    )
    with pytest.raises(BackendUnavailableError, match="ELMAN_KERNELS"):
        ops.layer(X[:T], h0, w_ih, w_hh, None, None, None, *rest)
    with pytest.raises(BackendUnavailableError, match="ELMAN_KERNELS"):
        torch.ops.elman.layer_dz(torch.ones(T, 2, 7), None, torch.ones(T, 2, 7), w_hh, None, None, *rest)
    empty = torch.ops.elman.layer(X[:T, :0], h0[:, :0], w_ih, w_hh, None, None, None, *rest)
    assert empty[0].shape == (T, 0, 7), "nothing is launched for no rows"


def test_a_graph_s_operator_for_which_no_kernel_is_left_raises(allow, machine):
    machine()
    allow("resident")
    with pytest.raises(
        BackendUnavailableError, match=r"no Triton kernel can run .* ELMAN_KERNELS is 'resident'"
    ):
        choice.plan("triton", configs.Problem(16, 2048, 1, torch.bfloat16), CUDA, 64)


def test_one_step_is_the_kernel_step_s(allow, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kernels, backend in (("step", "triton"), ("step", "triton:resident"), ("resident", "auto")):
        allow(kernels)
        elman.elman_step(X[0], None, *W, backend=backend)
    for backend in ("triton", "triton:resident"):
        with pytest.raises(
            BackendUnavailableError, match="ELMAN_KERNELS is 'resident', which leaves 'step' out"
        ):
            elman.elman_step(X[0], None, *W, backend=backend)


def test_a_kernel_that_is_none_is_a_sentence(allow, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    allow("step,residnet")
    with pytest.raises(
        ValueError, match="ELMAN_KERNELS has 'residnet'; expected one or several of resident, "
    ):
        elman.explain(**SHAPE, device="cpu", backend="triton")
    assert elman.explain(**SHAPE, device="cpu").backend == ON_CPU, "where it decides nothing it isn't read"


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("ELMAN_BACKEND", "")
    assert elman.explain(**SHAPE, device="cpu").backend == ON_CPU


def test_one_step_is_torch_s_own_operator(machine):
    """cuDNN has no cell: for one step it would gather the weights anew at every call."""
    machine()
    route = routing.route("auto", CUDA, torch.float32, 64, 16, one_step=True)
    assert route.backend == "eager"
    assert "own operator" in route.reason
    assert routing.route("cudnn", CUDA, torch.float32, 64, 16, one_step=True).backend == "cudnn"


def test_available_backends_on(machine):
    machine(cudnn=None, capability=(7, 5))
    available = elman.available_backends()
    assert list(available) == ["triton", "cudnn", "native", "eager"]
    assert available["eager"] is True
    assert "7.5" in available["triton"]
    assert "cuDNN" in available["cudnn"]
    machine()
    assert elman.available_backends() == {"triton": True, "cudnn": True, "native": NATIVE, "eager": True}


def test_available_backends_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    available = elman.available_backends()
    assert available["eager"] is True
    assert "TRITON_INTERPRET=1" in available["triton"]
    assert "CUDA" in available["cudnn"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert elman.available_backends()["triton"] is True


# explain


def test_explain_fields(machine):
    machine()
    route = elman.explain(**SHAPE, dtype=torch.bfloat16, device="cuda", backend="triton")
    assert isinstance(route, elman.Route)
    assert route.backend == "triton"
    assert route.kernel in configs.KERNELS
    assert "asked for by name" in route.reason
    assert route.config
    assert all(isinstance(value, (int, str)) for value in route.config.values())
    for part in ("triton", "resident", *map(str, route.config.values()), route.reason):
        assert part in str(route)
    with pytest.raises(dataclasses.FrozenInstanceError):
        route.backend = "eager"
    eager = elman.explain(**SHAPE, device="cpu", backend="eager")
    assert (eager.backend, dict(eager.config)) == ("eager", {})
    assert str(eager).startswith("eager")


def test_explain_listens_to_use_backend_and_the_variable(monkeypatch):
    with elman.use_backend("cudnn"), pytest.raises(BackendUnavailableError):
        elman.explain(**SHAPE, device="cpu")
    monkeypatch.setenv("ELMAN_BACKEND", "eager")
    assert "asked for by name" in elman.explain(**SHAPE, device="cpu").reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
def test_explain_of_a_cuda_device_that_is_not_there(backend):
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        elman.explain(**SHAPE, device="cuda", backend=backend)
    assert elman.explain(**SHAPE, device="cuda").backend == "eager", "auto never fails for want of a backend"


# float32


@pytest.fixture
def tf32_switches():
    before = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.rnn.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("tf32_switches")
def test_float32_precision_follows_both_switches():
    for allowed, expected in ((True, "tf32"), (False, "ieee"), (True, "tf32")):
        torch.backends.cudnn.allow_tf32 = allowed
        assert routing.float32_precision(CUDA) == expected
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        assert routing.float32_precision(CUDA) == precision
    # Convolutions have a switch of their own.
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert routing.float32_precision(CUDA) == "ieee"


@pytest.mark.usefixtures("tf32_switches")
def test_float32_precision_on_the_cpu_is_ieee():
    torch.backends.cudnn.allow_tf32 = True
    assert routing.float32_precision(CPU) == "ieee"


# The command line

SIZES = ["--batch", "16", "--seq", "1024", "--input", "768", "--hidden", "768"]
EXPLAIN = ["explain", *SIZES, "--dtype", "bfloat16", "--device", "cpu"]


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """A new interpreter in the root, without the variables that decide between backends."""
    ours = ("ELMAN_BACKEND", "TRITON_INTERPRET", "PYTHONWARNINGS")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_doctor():
    done = python("-m", "elman", "doctor")
    assert done.returncode == 0, done.stderr
    for words in (
        f"elman {elman.__version__}",
        f"torch {torch.__version__.split('+')[0]}",
        "triton",
        "cuDNN",
        "Devices",
        "cpu:",
        "Backends",
        f"native: {'runs' if NATIVE is True else NATIVE}",
        "eager: runs",
        "ELMAN_BACKEND is not set",
        "TRITON_INTERPRET is not set",
        "Caches",
    ):
        assert words in done.stdout
    assert done.stderr == ""


def test_explain_as_a_command():
    done = python("-m", "elman", *EXPLAIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(ON_CPU)
    assert done.stdout.count("\n") == 1
    done = python("-m", "elman", *EXPLAIN, ELMAN_BACKEND="cudnn")
    assert done.returncode == 1
    assert "can't run" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# arguments added to EXPLAIN (the last of a kind counts) -> exit status, words
COMMANDS = [
    ((), 0, ON_CPU),
    (("--backend", "eager"), 0, "asked for by name"),
    (("--backend", "cudnn"), 1, "cuDNN needs a CUDA GPU"),
    (("--backend", "triton"), 1, "TRITON_INTERPRET=1"),
    (("--batch", "0"), 1, "batch is 0"),
    (("--hidden", "-5"), 1, "hidden is -5"),
    (("--device", "nowhere"), 1, "nowhere"),
    (("--backend", "gpu"), 2, "gpu"),
    (("--dtype", "int8"), 2, "int8"),
    (("--batch", "two"), 2, "two"),
]


@pytest.mark.parametrize(("added", "status", "words"), COMMANDS, ids=str)
def test_explain_exit_status(capsys, added, status, words):
    try:
        got = cli.main([*EXPLAIN, *added])
    except SystemExit as exit:  # argparse's own way out
        got = exit.code
    assert got == status
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


@pytest.mark.parametrize("arguments", [[], ["heal"], ["explain", "--batch", "1"]], ids=str)
def test_wrong_commands_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert "usage: python -m elman" in capsys.readouterr().err


def test_doctor_names_the_variables_that_decide(monkeypatch, capsys):
    monkeypatch.setenv("ELMAN_BACKEND", "eager")
    monkeypatch.setenv("ELMAN_KERNELS", "step")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "ELMAN_BACKEND is eager" in printed
    assert "ELMAN_KERNELS is step" in printed


# The import

IMPORT = """
import json, os, sys
import torch

def queried(*args, **kwargs):
    raise AssertionError("import elman asked a device something")

for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "init"):
    setattr(torch.cuda, name, queried)
before, environment, state = set(sys.modules), dict(os.environ), torch.get_rng_state()
import elman
new = set(sys.modules) - before
print(json.dumps({
    "others": sorted(m for m in new if m.split(".")[0] != "elman"),
    "kernels": sorted(m for m in new if "kernels" in m),
    "same environment": dict(os.environ) == environment,
    "same generator": torch.equal(torch.get_rng_state(), state),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_is_light_and_changes_nothing():
    """Light: after torch, no module but ours. A limit in seconds would be the limit of one machine."""
    done = python("-c", IMPORT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "others": [],
        "kernels": ["elman.kernels", "elman.kernels.errors"],  # the exception alone
        "same environment": True,
        "same generator": True,
        "cuda": False,
    }
