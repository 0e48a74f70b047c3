"""Faults that are no wrong argument: NaN, sizes past 32 bits, no memory, Ctrl-C, what a machine lacks.

docs/faults.md has all faults, each with its test; those of wrong arguments are in test_errors.py.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import elman
from elman import Elman, ElmanCell, cli, eager, tables, tuning
from elman.kernels import configs
from tests.helpers import DEVICE, OPERATOR, TRITON, Problem, copy_of, error, make_smooth, run
from tests.machines import simulate_gpu
from tests.tolerances import tolerance

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
NAN, INF = math.nan, math.inf
F64 = torch.float64


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A new interpreter in the root that runs the code, without the variables that name a backend."""
    ours = ("ELMAN_BACKEND", "TRITON_INTERPRET", "PYTHONWARNINGS")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(code: str, *arguments: str, **environment: str) -> str:
    """What the code printed, once it has ended well."""
    process = python(code, *arguments, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# NaN and infinity


def spoilt(p: Problem, name: str, value: float) -> Problem:
    """p with one element in the middle of an argument or an upstream gradient replaced."""
    p = dataclasses.replace(p, weights=dict(p.weights))
    holder = p.weights if name in p.weights else vars(p)
    holder[name] = holder[name].clone()
    holder[name][tuple(n // 2 for n in holder[name].shape)] = value
    return p


def on_cpu(p: Problem) -> Problem:
    moved = {name: t.cpu() for name, t in vars(p).items() if isinstance(t, Tensor)}
    return dataclasses.replace(p, **moved, weights={name: w.cpu() for name, w in p.weights.items()})


def smooth(nonlinearity: str, **options: object) -> Problem:
    return make_smooth(
        T=3, B=3, I=2, H=5, directions=2, nonlinearity=nonlinearity, dtype=torch.float32, **options
    )


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    """NaN and infinity at the same places, and the same numbers elsewhere."""
    assert found.keys() == expected.keys()
    for result, truth in expected.items():
        t, truth = found[result].cpu(), truth.cpu()
        for special in (NAN, INF, -INF):
            where = [s.isnan() if special != special else s == special for s in (t, truth)]
            assert torch.equal(*where), f"{special} where {name} is spoilt: {result} is {t}, not {truth}"
        finite = truth.isfinite()
        assert error(t[finite], truth[finite], floor=1.0) <= tolerance(t.dtype), f"{name}: {result}"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_and_infinity_go_where_nn_rnn_s_go(backend, nonlinearity, value):
    """In every argument and upstream gradient, to the output and every gradient, and nowhere else."""
    slow = DEVICE == "cpu" and backend in TRITON
    p = smooth(nonlinearity, layers=1 if slow else 2)
    for name in ("x", "hx", *p.weights, "g_out", "g_hn"):
        if slow and name.endswith("_reverse"):
            continue
        if backend == "triton:step" and name == "weight_hh_l0":
            continue  # test_w_hh_stays_out_of_a_row_s_last_step
        bad = spoilt(p, name, value)
        expected, found = run("nn.RNN", on_cpu(bad)), run(backend, bad)
        # Infinity may end in a tanh of 1, a gradient at a relu that is off.
        may_end = value == INF or name in ("g_out", "g_hn")
        assert may_end or any(t.isnan().any() for t in expected.values()), name
        assert_alike(found, expected, name)
        if name in ("x", "hx"):  # row 1 of 3 is the spoilt one
            for row in (0, 2):
                assert found["output"][:, row].isfinite().all()
                assert found["gradient of input"][:, row].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(("nonlinearity", "value"), [("tanh", INF), ("relu", NAN)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["eager", *TRITON],
)
def test_w_hh_stays_out_of_a_row_s_last_step(name, nonlinearity, value, ragged):
    """The state may be finite beside it, or relu's derivative; only later steps' gradients go through it."""
    p = spoilt(smooth(nonlinearity, ragged=ragged), "weight_hh_l0", value)
    if ragged:
        p.g_out[torch.arange(3, device=DEVICE)[:, None] >= p.lengths] = 0
    assert_alike(run(name, p), run(OPERATOR, on_cpu(p)), "weight_hh_l0")


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_a_cell_passes_nan_on_as_nn_rnn_cell(value):
    ours, theirs = ElmanCell(3, 4), nn.RNNCell(3, 4)
    for name in ("x", "hx", *dict(ours.named_parameters())):
        state = {key: w.clone() for key, w in ours.state_dict().items()}
        tensors = {"x": torch.randn(3, 3), "hx": torch.randn(3, 4)}
        holder = tensors if name in tensors else state
        holder[name].view(-1)[holder[name].numel() // 2] = value
        results = []
        for kind in (ours, theirs):
            cell = type(kind)(3, 4)
            cell.load_state_dict(state)
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            h = cell(*leaves)
            h.sum().backward()
            results.append([h, *(t.grad for t in (*leaves, *cell.parameters()))])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_weights_of_nan_end(backend):
    """Every step is NaN, and the passes end."""
    layer = Elman(3, 4, bidirectional=True, device=DEVICE, backend=backend)
    for p in layer.parameters():
        p.data.fill_(NAN)
    output, h_n = layer(torch.ones(9, 2, 3, device=DEVICE))
    (output.sum() + h_n.sum()).backward()
    assert output.isnan().all()
    assert all(p.grad.isnan().all() for p in layer.parameters())


# Sizes past 32 bits


@pytest.mark.parametrize("kind", [(nn.RNN, Elman), (nn.RNNCell, ElmanCell)], ids=["layer", "cell"])
@pytest.mark.parametrize(
    "sizes", [(1, 2**31), (2**31, 2**31), (2**48, 1), (1, 2**62), (2**63, 1), (1, 2**63), (2**70, 2)], ids=str
)
def test_more_weights_than_there_is_memory(kind, sizes):
    """The type of nn.RNN's own error, and no memory touched on the way to it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raised = []
    for cls in kind:
        with pytest.raises(Exception) as found:  # noqa: PT011 (the type is compared below)
            cls(*sizes)
        raised.append(found.type)
    assert raised[0] is raised[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


@pytest.mark.parametrize("grad", [True, False])
def test_shapes_past_32_bits(grad):
    """Without numbers: 2^33 rows, each result's shape as nn.RNN has it."""
    B, options = 2**33, {"num_layers": 2, "bidirectional": True, "device": "meta"}
    x, hx = torch.empty(2, B, 3, device="meta"), torch.empty(4, B, 4, device="meta")
    with torch.set_grad_enabled(grad):
        for inputs in ((x,), (x, hx)):
            ours, theirs = (cls(3, 4, **options)(*inputs) for cls in (Elman, nn.RNN))
            assert [t.shape for t in ours] == [t.shape for t in theirs] == [(2, B, 8), (4, B, 4)]
        cell = ElmanCell(3, 4, device="meta")
        assert cell(x[0], hx[0]).shape == (B, 4)


def far(t: Tensor, dim: int, apart: int) -> Tensor:
    """A copy whose elements along dim lie so many apart; the memory between is only reserved."""
    strides = [1] * t.dim()
    for i in range(t.dim() - 2, -1, -1):
        strides[i] = strides[i + 1] * t.shape[i + 1]
    strides[dim] = apart
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


# The first fits in 32 bits, so that Triton takes it for an int32, and twice it does not; the second does not.
APART = pytest.mark.parametrize("apart", [2**30 + 16, 2**31 + 32], ids=["twice", "once"])
RESERVES = pytest.mark.skipif(DEVICE == "cuda", reason="there the memory would be taken; see test_gpu.py")


@RESERVES
@APART
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["eager", *TRITON])
def test_arguments_past_32_bits(name, dim, apart):
    """Elements of the input, of hx and of the output's gradient far apart, through the whole layer."""
    layer = Elman(3, 3, dtype=torch.float16, backend=name)
    x, hx, g = torch.randn(3, 3, 3).half(), torch.randn(1, 3, 3).half(), torch.randn(3, 3, 3).half()
    results = []
    for move in (lambda t: t, lambda t: far(t, dim, apart)):
        layer.zero_grad()
        leaves = [move(t.detach()).requires_grad_() for t in (x, hx)]
        output, h_n = layer(*leaves)
        output.backward(move(g))
        results.append([output, h_n, *(t.grad for t in (*leaves, *layer.parameters()))])
    for dense, apart_ in zip(*results, strict=True):
        assert torch.equal(dense, apart_)


@RESERVES
@APART
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("dim", [0, 1])
def test_a_cell_s_arguments_past_32_bits(dim, apart):
    cell = ElmanCell(3, 3, dtype=torch.float16, backend="triton")
    x, hx = torch.randn(3, 3).half(), torch.randn(3, 3).half()
    assert torch.equal(cell(far(x, dim, apart), far(hx, dim, apart)), cell(x, hx))


@RESERVES
@APART
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", TRITON)
def test_scans_past_32_bits(name, dim, apart):
    """The launchers' own tensors, which the layer makes dense."""
    module = importlib.import_module(f"elman.kernels.{name.partition(':')[2]}")
    z, g_out, dz = (torch.randn(3, 3, 6).half() for _ in range(3))
    h0, w_hh, g_hn = torch.randn(2, 3, 3).half(), torch.randn(2, 3, 3).half(), torch.randn(2, 3, 3).half()
    results = []
    for move in (Tensor.clone, lambda t: far(t, dim, apart)):
        output, into = module.scan(move(z), h0, w_hh, None, "tanh", "ieee"), move(dz)
        module.scan_backward(move(g_out), g_hn, move(output), w_hh, into, None, "tanh", "ieee")
        results.append((output, into))
    for dense, apart_ in zip(*results, strict=True):
        assert torch.equal(dense, apart_)


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is launched; the tensors have more rows than memory")
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("kernel", ["step", "resident", "cooperative"])
def test_many_tiles_lie_along_the_grid_s_first_axis(kernel, monkeypatch):
    """CUDA counts 2^31 - 1 programs along that one, and 65535 along the other two."""
    module = importlib.import_module(f"elman.kernels.{kernel}")
    T, B, H, D = 1, 2**22, 8, 2
    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("forward_kernel", "backward_kernel", "cell_kernel"):
        monkeypatch.setattr(module, name, Launcher(), raising=False)
    z, h0, w_hh = (torch.empty(s, dtype=torch.float16) for s in ((T, B, D * H), (D, B, H), (D, H, H)))
    if kernel == "cooperative":  # as many groups as the chip holds take one tile after another
        problem = configs.Problem(B, H, D, torch.float16)
        for config, _ in configs.candidates(kernel, problem, configs.DEFAULT_CHIP):
            grids.append(module.groups(problem, config, configs.DEFAULT_CHIP))
    else:
        module.scan(z, h0, w_hh, None, "tanh", "ieee")
        module.scan_backward(z, h0, z, w_hh, torch.empty_like(z), None, "tanh", "ieee")
    if kernel == "step":
        module.cell(h0[0], h0[1], w_hh[0], w_hh[1], None, torch.empty_like(h0[0]), "tanh", "ieee")
    assert grids
    for first, *others in grids:
        assert max(others) <= 65535
        assert first < 2**31
        assert kernel == "cooperative" or first > 65535


# Out of memory


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}{what}": t.clone()
        for name, p in layer.named_parameters()
        for what, t in (("", p), (".grad", p.grad))
    }


@contextmanager
def unchanged(layer: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """In the end parameters, gradients, inputs and the number of threads are as before; the layer works."""
    for p in layer.parameters():
        p.grad = torch.full_like(p, 3)
    before, kept, threads = state_of(layer), [t.detach().clone() for t in inputs], torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
    assert all(torch.equal(t, before[name]) for name, t in state_of(layer).items())
    assert all(torch.equal(t, k) and t.grad is None for t, k in zip(inputs, kept, strict=True))
    layer.zero_grad()
    x, hx = (
        torch.randn(3, 2, layer.input_size, device=DEVICE),
        torch.randn(1, 2, layer.hidden_size, device=DEVICE),
    )
    theirs = copy_of(layer)
    for each in (layer, theirs):
        each(x, hx)[0].sum().backward()
    for a, b in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def inputs_of(layer: Elman, T: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(T, 2, layer.input_size, requires_grad=True)
    return x, torch.randn(1, 2, layer.hidden_size, requires_grad=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="the eager loop on the CPU")
@pytest.mark.parametrize("during", ["forward", "backward"])
@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_a_step_that_fails_changes_nothing(during, fault, monkeypatch):
    """Memory that ends, or Ctrl-C that comes, in the middle of the loop over time."""
    layer = Elman(3, 4, backend="eager")
    x, hx = inputs_of(layer)
    real, seen = Tensor.addmm_, []

    def failing(z: Tensor, *args: Tensor) -> Tensor:
        seen.append(z)
        if len(seen) == 3:
            raise fault
        return real(z, *args)

    with unchanged(layer, x, hx):
        if during == "backward":
            output, _ = layer(x, hx)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "addmm_", failing)
            with pytest.raises(type(fault)):
                layer(x, hx) if during == "forward" else output.sum().backward()
        assert len(seen) == 3, "in the middle of the steps"


@pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "lengths"])
def test_a_result_larger_than_memory(packed):
    """2^46 steps of one number: the first allocation fails, at once."""
    layer = Elman(1, 2)
    x = torch.ones(1, 1, 1).expand(2**46, 1, 1)
    start = time.monotonic()
    with (
        unchanged(layer),
        pytest.raises(RuntimeError, match=r"allocate memory|invalid|out of memory|overflow") as raised,
    ):
        elman.elman(x, None, list(layer.parameters()), lengths=torch.tensor([2**46]) if packed else None)
    assert raised.type in (RuntimeError, torch.OutOfMemoryError)
    assert time.monotonic() - start < 10


MEMORY = """
import json, resource, torch
from elman import Elman

def limited(call):
    used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
    try:
        call()
        return "no error"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

torch.set_num_threads(1)
layer, x = Elman(1, 4), torch.ones(16, 2**18, 1)  # an output of 64 MiB
layer(x[:, :8])[0].backward(torch.ones(16, 8, 4))  # torch imports modules for a gradient that it is given
before = [p.grad.clone() for p in layer.parameters()]
forward = limited(lambda: layer(x))
output, _ = layer(x)
g = torch.ones_like(output)
backward = limited(lambda: output.backward(g))
same = all(torch.equal(p.grad, b) for p, b in zip(layer.parameters(), before))
layer(x)[0].backward(g)
changed = not torch.equal(layer.bias_ih_l0.grad, before[2])
print(json.dumps({"forward": forward, "backward": backward, "same": same, "changed": changed}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_no_memory_is_torch_s_error_and_the_next_call_works():
    found = json.loads(printed(MEMORY))
    for during in ("forward", "backward"):
        assert re.match("(RuntimeError|OutOfMemoryError): .*allocate memory", found[during]), found
    assert found["same"], "the gradients after a backward pass that failed"
    assert found["changed"], "the next backward pass"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_no_gpu_memory(backend, during):
    """An output of 1 GiB on a share of the GPU that holds one but not two."""
    layer = Elman(32, 128, device="cuda", backend=backend)
    x = torch.randn(2**13, 256, 32, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    with unchanged(layer):
        if during == "backward":
            output, _ = layer(x)
            g = torch.ones_like(output)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
        try:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                layer(x) if during == "forward" else output.backward(g)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


# Ctrl-C

INTERRUPTED = """
import sys, torch
from elman import Elman

torch.set_num_threads(1)
layer, x = Elman(4, 4), torch.randn(4, 1, 4).repeat(250_000, 1, 1)
if sys.argv[1] == "backward":
    output, _ = layer(x)
print("begins", flush=True)
for _ in range(1000):
    layer(x) if sys.argv[1] == "forward" else output.backward(output, retain_graph=True)
print("ended", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_ctrl_c_ends_a_process(during):
    process = python(INTERRUPTED, during)
    try:
        assert process.stdout.readline() == "begins\n", process.stderr.read()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert out == ""
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode in (-signal.SIGINT, 1, 130)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.skipif(DEVICE == "cuda", reason="the eager loop on the CPU")
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_process_that_was_interrupted_goes_on(during, monkeypatch):
    """As in a notebook: the signal arrives in the loop, and the next cell runs."""
    layer = Elman(3, 4, backend="eager")
    x, hx = inputs_of(layer, T=200_000)

    class Timed:
        """The signal comes once the loop has begun, however long the way there takes."""

        def __call__(self, *args):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return real(*args)

    def interrupt(*_):
        raise KeyboardInterrupt

    real, before = eager._columns, signal.signal(signal.SIGALRM, interrupt)
    try:
        with unchanged(layer, x, hx):
            if during == "backward":
                output, _ = layer(x, hx)
            monkeypatch.setattr(eager, "_columns", Timed())
            with pytest.raises(KeyboardInterrupt):
                layer(x, hx) if during == "forward" else output.sum().backward()
            monkeypatch.setattr(eager, "_columns", real)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The tuning cache

PROBLEM = configs.Problem(16, 1024, 1, torch.bfloat16)


class Tuner:
    """Instead of timing.measure: the last config is the quickest; `interrupt` comes before an answer."""

    def __init__(self) -> None:
        self.calls = 0
        self.interrupt = False

    def __call__(self, kernel, problem, tried, device):
        self.calls += 1
        if self.interrupt:
            signal.raise_signal(signal.SIGINT)
        return [[9.0 - i, 9.0 - i] for i in range(len(tried))]


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """A simulated GPU whose tables are in tmp_path."""
    simulate_gpu(monkeypatch)
    monkeypatch.delenv("ELMAN_AUTOTUNE", raising=False)
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "shipped_path", lambda gpu: tmp_path / "shipped.json")
    tuner = Tuner()
    monkeypatch.setattr(tuning, "measure", tuner)
    tuning.forget()
    yield tuner
    tuning.forget()


def configs_of(problem: configs.Problem) -> tuple:
    """The model's first choice, and what the tuner makes the quickest."""
    found = [config for config, _ in configs.candidates("step", problem, tuning.chip(CUDA))]
    return found[0], found[-1]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("at", ["measure", "write", "replace"])
def test_ctrl_c_while_tuning_leaves_the_table_whole(at, tuner, monkeypatch):
    other = dataclasses.replace(PROBLEM, H=64)
    tuning.config_for("step", other, CUDA)
    path = tables.user_path("Simulated GPU")
    before = path.read_text()

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        if at == "measure":
            patch.setattr(tuner, "interrupt", True)
        elif at == "write":
            patch.setattr(Path, "write_text", interrupted)
        else:
            patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuning.config_for("step", PROBLEM, CUDA)
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["simulated-gpu.json", "simulated-gpu.lock"]
    with tables.locked(path, 0.1):
        pass
    assert tuning.config_for("step", PROBLEM, CUDA) == configs_of(PROBLEM)[1], "the next call tunes"
    assert len(tables.read(path, "Simulated GPU").entries) == 2


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """As a user whom permissions bind, which root is not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def open_folder(monkeypatch):
    """A folder that any user may enter, as pytest's own are not, for the tables."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("ELMAN_CACHE_DIR", folder)
        monkeypatch.setattr(tables, "shipped_path", lambda gpu: Path(folder) / "shipped.json")
        yield Path(folder)


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("what", ["folder", "file and lock", "unreadable file"])
def test_a_read_only_cache(what, tuner, open_folder):
    """What it holds is used; what it lacks is not tuned, with one warning; no call fails."""
    known, unknown = PROBLEM, dataclasses.replace(PROBLEM, H=64)
    tuning.config_for("step", known, CUDA)
    tuning.config_for("step", dataclasses.replace(PROBLEM, H=2048), CUDA)
    path = tables.user_path("Simulated GPU")
    content = path.read_text()
    path.chmod(0o000 if what == "unreadable file" else 0o444)
    if what != "folder":
        path.with_suffix(".lock").chmod(0o444)
    else:
        path.with_suffix(".lock").unlink()
    path.parent.chmod(0o555)
    tuner.calls = 0
    tuning.forget()
    try:
        with bound_by_permissions():
            if what == "unreadable file":
                with pytest.warns(UserWarning, match="make .* a file that can be read") as warned:
                    found = tuning.config_for("step", known, CUDA)
                assert found == configs_of(known)[0]
            else:
                assert tuning.config_for("step", known, CUDA) == configs_of(known)[1]
                with pytest.warns(UserWarning, match="ELMAN_CACHE_DIR names the tables' folder") as warned:
                    found = tuning.config_for("step", unknown, CUDA)
                assert found == configs_of(unknown)[0]
            assert len(warned) == 1
            assert tuning.config_for("step", unknown, CUDA) == configs_of(unknown)[0]
    finally:
        path.parent.chmod(0o755)
    assert tuner.calls == 0
    path.chmod(0o644)
    assert path.read_text() == content


def test_a_user_without_a_home(tuner, monkeypatch, tmp_path, capsys):
    """As in a container run under a number that is no one's: tables are among temporary files."""
    for name in ("ELMAN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456)  # in no list of users
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert os.path.expanduser("~") == "~"
    assert tuning.config_for("step", PROBLEM, CUDA) == configs_of(PROBLEM)[1]
    assert (tmp_path / "elman-123456" / "elman" / "tuned" / "simulated-gpu.json").exists()
    assert cli.main(["doctor"]) == 0
    assert "elman-123456" in capsys.readouterr().out


# What a machine lacks

WITHOUT_TRITON = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch, elman
from torch.nn.utils.rnn import pack_sequence

x = torch.randn(3, 2, 5)
rnn, cell = torch.nn.RNN(5, 7, 2, bidirectional=True), torch.nn.RNNCell(5, 7)
ours = elman.Elman(5, 7, 2, bidirectional=True), elman.ElmanCell(5, 7)
packed = pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False)
expected = [rnn(x)[0], rnn(packed)[0].data, cell(x[0])]
for a, b in zip(ours, (rnn, cell)):
    a.load_state_dict(b.state_dict())
rnn, cell = ours
for a, b in zip([rnn(x)[0], rnn(packed)[0].data, cell(x[0])], expected):
    torch.testing.assert_close(a, b)
    a.sum().backward()
y, _ = elman.ElmanNetwork(5, 7, 2)(x)
y.sum().backward()
with torch.no_grad():
    torch.testing.assert_close(torch.compile(rnn, backend="aot_eager", fullgraph=True)(x)[0], expected[0])
print(elman.explain(batch=1, seq=2, input=3, hidden=4))
for backend in ("triton", "triton:step"):
    rnn.backend = backend
    try:
        rnn(x)
    except elman.BackendUnavailableError as error:
        print(error)
from elman import cli
assert cli.main(["doctor"]) == 0
assert cli.main(["tune"]) == 1
"""


def test_without_triton_all_but_triton_works():
    out = printed(WITHOUT_TRITON)
    assert re.match(r"native, kernel native .*: auto: |eager: auto: ", out)
    assert "triton: no: Triton is not installed; install the triton package" in out
    assert out.count("backend 'triton' was asked for and can't run: Triton is not installed; install") == 2
    assert "Traceback" not in out


WITHOUT_CXX = """
import torch
from elman import Elman

layer, x = Elman(3, 4), torch.randn(2, 2, 3)
expected = layer(x)[0]
try:
    torch.compile(layer)(x)
except Exception as error:
    print(type(error).__name__, error)
assert torch.equal(layer(x)[0], expected)
layer(x)[0].sum().backward()
assert layer.weight_hh_l0.grad is not None
print("and the layer runs")
"""


def test_without_a_c_compiler_inductor_says_so_and_the_layer_runs(tmp_path):
    out = printed(WITHOUT_CXX, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert re.search(r"no-such-compiler|C\+\+ compiler", out.splitlines()[0]), out
    assert out.endswith("and the layer runs\n")


# Nothing to compute with, and tensors that stand for other numbers than their memory holds


@pytest.mark.parametrize(("I", "H"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["eager", *TRITON])
def test_no_columns(name, bidirectional, I, H):
    """The functional form takes sizes of 0, as torch.rnn_tanh does; the layer refuses them as nn.RNN does."""
    D = 1 + bidirectional
    weights = [torch.randn(s, requires_grad=True) for _ in range(D) for s in ((H, I), (H, H), (H,), (H,))]
    x = torch.randn(3, 2, I, requires_grad=True)
    results = [
        elman.elman(x, None, weights, bidirectional=bidirectional, backend=name),
        torch.rnn_tanh(x, torch.zeros(D, 2, H), weights, True, 1, 0.0, True, bidirectional, False),
    ]
    grads = [torch.autograd.grad(output.sum() + h_n.sum(), [x, *weights]) for output, h_n in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["eager", *TRITON])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_cell_without_columns(name, size):
    ours, theirs = ElmanCell(*size, dtype=F64, backend=name), nn.RNNCell(*size, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for cell in (ours, theirs):
        x = torch.ones(2, size[0], dtype=F64, requires_grad=True)
        h = cell(x)
        h.sum().backward()
        results.append([h, x.grad, *(p.grad for p in cell.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["eager", *TRITON])
@pytest.mark.parametrize("T", [1, 3])
def test_a_lazy_negation(name, T):
    """A real tensor whose memory holds the opposite numbers, as the imaginary part of a conjugate."""
    layer = Elman(3, 4, device=DEVICE, backend=name)
    x, hx = torch.randn(T, 2, 3, device=DEVICE), torch.randn(1, 2, 4, device=DEVICE)
    lazy = [torch._neg_view(-t) for t in (x, hx)]
    assert all(t.is_neg() for t in lazy)
    with torch.no_grad():
        torch.testing.assert_close(layer(*lazy)[0], layer(x, hx)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lengths_on_either_device(backend, device):
    """Checked there too: what they are is no matter of where they lie."""
    weights = list(Elman(3, 4, device="cuda").parameters())
    x = torch.randn(5, 3, 3, device="cuda")
    lengths = torch.tensor([2, 5, 1], device=device)
    output, h_n = elman.elman(x, None, weights, lengths=lengths, backend=backend)
    assert not output[2:, 0].any()
    torch.testing.assert_close(h_n[0], output[lengths.to("cuda") - 1, torch.arange(3, device="cuda")])
    for wrong in ([0, 5, 1], [2, 6, 1], [-1, 5, 1]):
        with pytest.raises(ValueError, match="lengths runs from"):
            elman.elman(x, None, weights, lengths=torch.tensor(wrong, device=device), backend=backend)


# docs/faults.md


def test_every_fault_names_tests_that_there_are():
    """Each line of its tables names at least one, as `file.py::function`."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith("| Tests |")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(\w+)\.py::(\w+)`", row.split("|")[3])
        assert named, row
        for file, function in named:
            assert function in functions_of(file), function


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    return {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
