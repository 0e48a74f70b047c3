"""Threads, signals, processes and a busy machine around calls of the backend native."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import elman
from elman import compiled, cores, native
from tests.helpers import make, run
from tests.test_native import assert_same_bits
from tests.test_native_build import printed, python

ROOT = Path(__file__).parents[1]
TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.skipif(
    compiled.unavailable() is not None, reason=f"native: {compiled.unavailable()}"
)


@pytest.fixture
def force(monkeypatch):
    """Has all calls shared out in one way."""

    def plan(*numbers: int) -> None:
        monkeypatch.setattr(native, "plan", lambda *_: cores.Plan(*numbers))

    return plan


@contextmanager
def busy(count: int = 2):
    """So many processes that do nothing but run."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def long_scan(steps: int, B: int = 32, H: int = 256) -> tuple[elman.Elman, Tensor]:
    return elman.Elman(2, H, backend="native").requires_grad_(False), torch.zeros(1, B, 2).expand(steps, B, 2)


# The GIL and Ctrl-C


def test_other_python_threads_run_meanwhile(force, monkeypatch):
    """One call into C, as long as it may be: the longest pause of another thread is a part of it."""
    force(1, 32, 1)
    monkeypatch.setattr(native, "PER_CALL", 1e15)
    layer, x = long_scan(200)
    of_one = seconds(lambda: layer(x)) / 200
    layer, x = long_scan(min(20_000, int(1 / of_one)))
    ended, pauses = threading.Event(), []

    def count() -> None:
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.002)
            pauses.append(time.perf_counter() - last)
            last += pauses[-1]

    thread = threading.Thread(target=count)
    thread.start()
    try:
        took = seconds(lambda: layer(x))
    finally:
        ended.set()
        thread.join()
    assert took > 0.1
    assert max(pauses) < took / 2


@pytest.mark.parametrize("itemsize", [4, 8])
def test_a_call_into_c_is_short(itemsize):
    """By the model of a core that is slower than any with AVX2, unless one step is long."""
    for B in (1, 16, 256):
        for H in (1, 16, 64, 512, 2048, 4096):
            steps = native._steps(B, H, 1, itemsize)
            multiply, memory = B * H * H * itemsize / 4 * 0.1e-9, H * H * itemsize / 12e9
            assert steps == 1 or steps * max(multiply, memory, B * H * 1e-9, 2e-7) < 0.5, (B, H)
            assert steps > 1 or multiply + memory > 0.1


INTERRUPTED = """
import sys, time, torch
from elman import Elman, cores, native

threads, during = int(sys.argv[1]), sys.argv[2]
native.plan = lambda *_: cores.Plan(threads, 8, threads)
layer = Elman(2, 2048, backend="native")
x = torch.zeros(1, 1, 2).expand(10, 1, 2)
g = layer(x)[0].detach()  # it is compiled
x = torch.zeros(1, 1, 2).expand(20_000, 1, 2)  # half a minute
if during == "backward":
    scan, native._scan = native._scan, lambda *_: None
    output, _ = layer(x)
    output.data.zero_()
    native._scan = scan
print("begins", flush=True)
try:
    layer(x) if during == "forward" else output.backward(output)
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
    print(torch.equal(layer(x[:10])[0], g))  # and all is well
"""


@pytest.mark.parametrize(("threads", "during"), [(1, "forward"), (2, "backward")])
def test_ctrl_c_stops_a_long_call_within_a_second(threads, during):
    process = python(f"import sys; sys.argv[1:] = ['{threads}', '{during}']\n{INTERRUPTED}")
    try:
        assert process.stdout.readline() == "begins\n", process.stderr.read()
        time.sleep(0.7)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    stopped, well = out.splitlines()
    assert well == "True"
    assert 0 < float(stopped) - sent < 3, "a second, on a machine that others use too"


# Several threads, a fork, a busy machine


def test_python_threads_at_once(force):
    """Eight, each with threads of its own, in both libraries."""
    force(3, 5, 2)
    problems = [
        make(T=9, B=11, I=3, H=40 + n, directions=1 + n % 2, dtype=dtype, seed=n)
        for n in range(4)
        for dtype in (torch.float32, torch.float64)
    ]
    expected = [run("native", p) for p in problems]
    found: dict[int, list] = {n: [] for n in range(len(problems))}

    def work(n: int) -> None:
        torch.set_num_threads(1)  # torch's products too have the bits of one thread
        for _ in range(10):
            found[n].append(run("native", problems[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n, results in found.items():
        assert len(results) == 10
        for result in results:
            assert_same_bits(result, expected[n])


@pytest.mark.skipif(not TASKS.exists(), reason="reads Linux's /proc")
def test_no_thread_is_left(force):
    p = make(T=20, B=16, I=3, H=64)
    run("native", p)  # torch's own are there
    before = len(list(TASKS.iterdir())) + 3  # OpenMP keeps those of a team of 4
    force(4, 4, 2)
    for _ in range(20):
        run("native", p)
    limit = time.monotonic() + 10
    while len(list(TASKS.iterdir())) > before and time.monotonic() < limit:
        time.sleep(0.01)
    assert len(list(TASKS.iterdir())) <= before


FORKED = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")  # of Python 3.12: that there are threads is what is tested
import torch
from elman import Elman, compiled, cores, native

torch.set_num_threads(1)
native.plan = lambda *_: cores.Plan(3, 4, 2)
layer, x = Elman(3, 40, backend="native"), torch.randn(50, 9, 3)

def gradient():
    layer.zero_grad()
    output, _ = layer(x)
    output.square().sum().backward()
    return torch.cat([output.detach().flatten(), layer.weight_hh_l0.grad.flatten()])

def forked(ended):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(0 if torch.equal(gradient(), expected) and ended() else 1)

expected = gradient()
print("after use", forked(lambda: True))

big, stop = Elman(3, 300, backend="native").requires_grad_(False), threading.Event()
def work():
    while not stop.is_set():
        big(torch.zeros(200, 16, 3))
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
print("while others call", *(forked(lambda: True) for _ in range(5)))
stop.set()
for thread in threads:
    thread.join()

compiled.forget()
load, entered, leave = compiled._load, threading.Event(), threading.Event()
def slow(*arguments):
    entered.set()
    leave.wait()
    return load(*arguments)
compiled._load = slow
thread = threading.Thread(target=compiled.library)
thread.start()
entered.wait()
child = os.fork()
if not child:
    compiled._load = load
    os._exit(0 if torch.equal(gradient(), expected) else 1)
print("while another compiles", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
leave.set()
thread.join()
print("parent", torch.equal(gradient(), expected))
"""


FORKED_FIRST = """
import os, signal, warnings
warnings.simplefilter("ignore")
import torch

torch.set_num_threads(2)
torch.randn(1_000_000).tanh()  # now torch's OpenMP has a thread, which the child has not
child = os.fork()
if not child:
    signal.alarm(20)
    from elman import cores, native
    native.plan = lambda *_: cores.Plan(2, 1, 1)
    # MKL, whose products of more rows are taken, would wait for the thread too.
    weights = [torch.randn(40, 1), torch.randn(40, 40), torch.randn(40), torch.randn(40)]
    native.plain_forward(torch.randn(250, 2, 1), torch.zeros(1, 2, 40), weights, 1, None, None, "tanh")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_is_the_first_to_import():
    assert printed(python(FORKED_FIRST)) == "0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_calls_too():
    process = python(FORKED)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert out.splitlines() == [
        "after use 0",
        "while others call 0 0 0 0 0",
        "while another compiles 0",
        "parent True",
    ]


def test_processes_train_one_layer_in_shared_memory():
    """Weights that another process writes into while a scan reads them: numbers, and no worse."""
    code = """
import torch
from torch import multiprocessing
from elman import Elman

def loss_of(layer):
    return (layer(torch.ones(6, 3, 4))[0] - 0.3).square().mean()

def train(layer):
    torch.set_num_threads(1)
    for _ in range(50):
        for p, g in zip(layer.parameters(), torch.autograd.grad(loss_of(layer), [*layer.parameters()])):
            p.data.sub_(0.05 * g)

if __name__ == "__main__":
    torch.manual_seed(0)
    layer = Elman(4, 8, backend="native").share_memory()
    before = loss_of(layer).item()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(layer,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print([process.exitcode for process in processes], loss_of(layer).item() < 0.7 * before)
"""
    process = python(code)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "[0, 0] True\n"), err


@pytest.mark.parametrize("plan", [(2, 8, 1), (2, 16, 2), (4, 4, 3)], ids=str)
def test_a_busy_machine(force, plan):
    """Two processes take the cores: the bits are the same, and the wait has a bound."""
    force(*plan)
    p = make(T=100, B=16, I=3, H=256)
    expected = run("native", p)
    idle = min(seconds(lambda: run("native", p)) for _ in range(3))
    with busy():
        found: list = []
        took = seconds(lambda: found.extend(run("native", p) for _ in range(3)))
    for result in found:
        assert_same_bits(result, expected)
    assert took < 3 * 20 * idle + 1


def test_a_partner_that_loses_its_core(force):
    """More threads than cores, and as many groups: whoever waits does the work of one that was put aside."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    p = make(T=300, B=4, I=3, H=192)
    force(1, 4, 1)
    expected, alone = run("native", p), min(seconds(lambda: run("native", p)) for _ in range(3))
    force(4 * cores, 4, 4)
    took = seconds(lambda: assert_same_bits(run("native", p), expected))
    assert took < 40 * alone + 2
