"""The time that no implementation can beat on this machine, from what the machine itself was measured to do.

    memory   bytes that must move / bandwidth
    matrix   operations / rate of a matrix product
    step     steps / the rate of the shortest possible step

On a GPU a row's floor is the largest of the three. On a CPU the steps are those of a loop in C with its
multiply-adds, see loops.py, and the other products come on top: the floor is that sum, named after its
larger part, or memory's time where that is longer. A floor depends on the problem alone, not on who solves
it. What is measured is rounded in the floor's favour (the best of several), so a row above 100% of it is an
error here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench import loops
from bench.contenders import arithmetic, storage
from bench.measure import cuda_seconds, wall_seconds
from bench.workloads import PASSES, Workload
from elman import products, timing

KIB, MIB = 1 << 10, 1 << 20
#: Working sets in bytes, each twice the one before.
CPU_SIZES = tuple(64 * KIB << n for n in range(13))
CUDA_SIZES = tuple(MIB << n for n in range(11))
#: Sides of the square products.
CPU_SIDES, CUDA_SIDES = (256, 512, 1024, 2048), (1024, 2048, 4096, 8192)
#: Two lengths of a chain and of a meeting: the launch drops out of their difference.
CHAIN_STEPS, MEETING_STEPS = (1_000, 11_000), (200, 2_200)
#: Programs of a meeting, beside one for each multiprocessor.
PROGRAMS = (2, 4, 8, 16, 32, 64)
#: The seconds that calls timed together take, and how many there are at most.
CPU_SPAN, CUDA_SPAN, MOST_CALLS = 1e-4, 5e-3, 1000


@dataclass(frozen=True)
class Floor:
    """Seconds of a pass at least, and by what: "memory", "matrix" or "step"."""

    seconds: float
    bound: str


def of(workload: Workload, pass_name: str, floor: dict[str, Any]) -> Floor:
    """The floor of a pass ("forward", "backward", "training") of a workload on a machine.

    floor: what measure() returned there. Training is one pass after the other, each with its own bandwidth.
    Raises ValueError for any other pass, and for a dtype whose products were not measured.
    """
    rates = floor["matrix"]
    if workload.dtype not in rates:
        raise ValueError(
            f"The floor has no rate of {workload.dtype} products, only of {', '.join(rates) or 'none'}; "
            f"measure with dtypes=[{workload.dtype!r}] among them."
        )
    kept = pass_name == "training"
    memory = 0.0
    for part in _parts(pass_name):
        moved = _bytes(workload, part, kept)
        memory += moved / loops.read_rate(moved, floor["bandwidth"])
    limits = {"memory": memory}
    if "loop" in floor["step"]:
        backward = [part == "backward" for part in _parts(pass_name)]
        loop, matrix = floor["step"]["loop"], rates[workload.dtype]
        found = [loops.pass_seconds(workload, b, loop, matrix) for b in backward]
        total, others = (sum(each) for each in zip(*found, strict=True))
        limits["matrix" if others > total / 2 else "step"] = total
    else:
        limits["matrix"] = flops(workload, pass_name) / rates[workload.dtype]
        limits["step"] = _steps_seconds(workload, pass_name, floor["step"])
    bound = max(limits, key=lambda name: limits[name])
    return Floor(limits[bound], bound)


def flops(workload: Workload, pass_name: str) -> int:
    """Floating-point operations of a pass, activations left out.

    The backward pass takes each product of the forward twice over: dz W_hh and dz W_ih (dx), and the weights'
    gradients.
    """
    return sum({"forward": 1, "backward": 2}[part] for part in _parts(pass_name)) * workload.flops


def bytes_moved(workload: Workload, pass_name: str) -> int:
    """Bytes that a pass must read and write, each of them once.

    Forward: x, weights and h0; output and h_n. Backward: the gradients of output and h_n, x, h0, the weights
    without biases, every layer's output; dx, dh0 and the weights' gradients. Training is both, and its
    forward pass writes every layer's output; else those of the lower layers need not leave the chip. A cell's
    output is its h_n, counted once. Of rows of unequal lengths, only the steps that there are.
    """
    kept = pass_name == "training"
    return sum(_bytes(workload, part, kept) for part in _parts(pass_name))


def steps(workload: Workload, pass_name: str) -> int:
    """Steps that follow one another: a layer is a step behind the one below it, directions run at once."""
    return len(_parts(pass_name)) * (workload.steps + workload.layers - 1)


def _parts(pass_name: str) -> tuple[str, ...]:
    if pass_name not in PASSES:
        raise ValueError(f"pass_name is {pass_name!r}; expected one of {', '.join(PASSES)}.")
    return ("forward", "backward") if pass_name == "training" else (pass_name,)


def _bytes(w: Workload, part: str, kept: bool) -> int:
    """bytes_moved of one pass; kept: the forward pass keeps what the backward needs."""
    D, H, L = 1 + w.bidirectional, w.hidden_size, w.layers
    x, sequence, state = w.row_steps * w.input_size, w.row_steps * D * H, L * D * w.batch * H
    matrices = D * H * (w.input_size + (L - 1) * D * H + L * H)
    biases = 2 * L * D * H
    h_n = 0 if w.cell else state
    if part == "forward":
        elements = x + matrices + biases + state + (L if kept else 1) * sequence + h_n
    else:
        read = sequence + h_n + x + state + matrices + L * sequence
        elements = read + x + state + matrices + biases
    return elements * _itemsize(w.dtype)


def _itemsize(dtype: str) -> int:
    return storage(dtype).itemsize


def _steps_seconds(workload: Workload, pass_name: str, step: dict[str, Any]) -> float:
    """Seconds of the steps: by torch a call each, on a GPU the shortest one, at least a launch a pass."""
    if "call" in step:
        return steps(workload, pass_name) * step["call"]
    launches = len(_parts(pass_name)) * step["launch"]
    return max(launches, steps(workload, pass_name) * shortest_step(workload, step))


def shortest_step(workload: Workload, step: dict[str, Any]) -> float:
    """Seconds of a step on one multiprocessor or on several that meet, where these have room for W_hh.

    step: of what `measure` returned on a GPU. A launch a step has room always.
    """
    weight = workload.hidden_size**2 * _itemsize(workload.dtype)
    serve = [step["launch"]]
    if weight <= step["on_chip"]:
        serve.append(step["chain"])
    serve += [s for programs, s in step["meeting"].items() if weight <= int(programs) * step["on_chip"]]
    return min(serve)


def measure(
    device: torch.device,
    dtypes: Sequence[str],
    *,
    seconds: float = 0.05,
    sizes: Sequence[int] | None = None,
    sides: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What the device does at best, sampling each thing for about so many seconds.

    Returns, ready for JSON:
        bandwidth   [[bytes of the working set, bytes read and written a second], ...], smallest first
        matrix      {dtype: flop a second of square products}, for each of the dtypes
        step        CPU: {"loop": what loops.measure() returns}; without a C compiler {"call": seconds of a
                    torch call that does nothing, "no_loop": why}
                    CUDA: {"launch": seconds from one launch to the next, "chain": of the shortest step on one
                    multiprocessor, "meeting": {programs: of the shortest one of several},
                    "on_chip": bytes that a multiprocessor keeps in registers and shared memory}

    A call is the shortest step of whoever makes at least one torch call a step, as eager does. On CUDA
    programs meet in L2, by the quicker of the two ways of elman/kernels/cooperative.py, and launches follow
    one another in a CUDA graph, which launches sooner than Python does.
    """
    cuda = device.type == "cuda"
    sizes = sizes or (CUDA_SIZES if cuda else CPU_SIZES)
    sides = sides or (CUDA_SIDES if cuda else CPU_SIDES)
    with torch.no_grad(), torch.cuda.device(device) if cuda else nullcontext():
        step = _cuda_step(device, seconds) if cuda else _cpu_step(seconds)
        return {
            "bandwidth": [[size, _bytes_a_second(size, device, seconds, step)] for size in sorted(sizes)],
            "matrix": _matrix(device, dtypes, sides, seconds),
            "step": step,
        }


def _bytes_a_second(size: int, device: torch.device, seconds: float, step: dict[str, Any]) -> float:
    """The better of a copy and of mere reading, which are all that a small batch does with large weights.

    On a CPU also of C's reading, where a torch call takes longer than the bytes.
    """
    whole = torch.ones(size // 4, device=device)
    source, target = whole.chunk(2)
    total = torch.zeros(1, device=device)
    taken = _shortest(lambda: target.copy_(source), device, seconds)
    taken = min(taken, _shortest(lambda: torch.sum(whole, 0, keepdim=True, out=total), device, seconds))
    read = step["loop"]["read"].values() if "loop" in step else ()
    return max(size / taken, *(loops.read_rate(size, measured) for measured in read), 0.0)


def _matrix(
    device: torch.device, dtypes: Sequence[str], sides: Sequence[int], seconds: float
) -> dict[str, float]:
    """Flop a second by dtype.

    On CUDA a third of tf32's will do for float32: tf32x3 is three of these. On a CPU 16 bits can also be
    multiplied in float32, as eager does.
    """
    found = {dtype: _flops_a_second(device, dtype, sides, seconds) for dtype in dtypes}
    if device.type == "cuda" and "float32" in found:
        tf32 = found.get("tf32") or _flops_a_second(device, "tf32", sides, seconds)
        found["float32"] = max(found["float32"], tf32 / 3)
    if device.type == "cpu" and ("float16" in found or "bfloat16" in found):
        float32 = found.get("float32") or _flops_a_second(device, "float32", sides, seconds)
        for dtype in found.keys() & {"float16", "bfloat16"}:
            found[dtype] = max(found[dtype], float32)
    return found


def _flops_a_second(device: torch.device, dtype: str, sides: Sequence[int], seconds: float) -> float:
    """The best rate of the sides, from the smallest up to the last one that fits the time.

    On a CPU PyTorch's products of float32 are MKL's; oneDNN's are the quicker ones on some processors. Both
    are measured, as a provider may use either.
    """
    best, taken = 0.0, 0.0
    for side in sorted(sides):
        if best and taken * 8 > seconds:
            break
        a, b, out = torch.rand(3, side, side, device=device).to(storage(dtype))
        ways: list[Callable[[], object]] = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]  # type: ignore[misc]
        if device.type == "cpu" and dtype == "float32" and products.HAS_ONEDNN:
            ways.append(lambda a=a, b=b: products.LINEAR(a, b, None, "none", [], ""))  # type: ignore[misc]
        with arithmetic(dtype):
            taken = min(_shortest(way, device, seconds) for way in ways)
        best = max(best, 2 * side**3 / taken)
    return best


def _cpu_step(seconds: float) -> dict[str, Any]:
    reason = loops.unavailable()
    if reason:
        return {"call": _empty_call(seconds), "no_loop": reason}
    return {"loop": loops.measure(torch.get_num_threads(), seconds=seconds / 5)}


def _empty_call(seconds: float) -> float:
    """The median of many: zero_() of one element."""
    element = torch.zeros(1)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(MOST_CALLS):
            element.zero_()
        taken.append((time.perf_counter() - start) / MOST_CALLS)
    return statistics.median(taken)


def _cuda_step(device: torch.device, seconds: float) -> dict[str, Any]:
    from bench import probes
    from elman.kernels import common

    chip, properties = common.chip(device), torch.cuda.get_device_properties(device)
    meeting = {}
    if chip.one_l2:
        for programs in sorted({p for p in PROGRAMS if p < chip.processors} | {chip.processors}):
            ways = [probes.Meeting(device, programs, flag) for flag in (True, False)]
            meeting[str(programs)] = min(_slope(way, MEETING_STEPS, seconds) for way in ways)
            for way in ways:
                way.check()
    registers = getattr(properties, "regs_per_multiprocessor", 65536)
    return {
        "launch": _shortest(probes.empty, device, seconds),
        "chain": min(
            _slope(probes.Chain(device, warps, relu), CHAIN_STEPS, seconds)
            for warps in (1, 2)
            for relu in (False, True)
        ),
        "meeting": meeting,
        "on_chip": chip.shared + 4 * registers,
    }


def _slope(probe: Callable[[int], Callable[[], object]], lengths: tuple[int, int], seconds: float) -> float:
    """Seconds of one step: what the longer launch takes more than the shorter, each at its best.

    That is never the first, which compiles. Raises RuntimeError where that is nothing.
    """
    best = [math.inf, math.inf]
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 6 or time.perf_counter() < end:
        for i, length in enumerate(lengths):
            launch = probe(length)
            torch.cuda.synchronize()
            best[i] = min(best[i], timing.clock(launch) / 1e6)
        rounds += 1
    slope = (best[1] - best[0]) / (lengths[1] - lengths[0])
    if slope <= 0:
        raise RuntimeError(
            f"{lengths[1]} steps of {type(probe).__name__} took {best[1]:.2e} s and {lengths[0]} took "
            f"{best[0]:.2e} s: the GPU is busy with other work. Measure again without it."
        )
    return slope


def _shortest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The fewest seconds of a call among others like it.

    On a CPU by all threads and by one in turn: little work is sooner done by one, and where something else
    keeps the machine busy threads wait long for one another. On CUDA the calls follow one another in a graph.
    """
    cuda = device.type == "cuda"
    clock, span = (cuda_seconds, CUDA_SPAN) if cuda else (wall_seconds, CPU_SPAN)
    threads = torch.get_num_threads()
    call()  # the first one allocates
    calls = max(1, min(MOST_CALLS, int(span / min(clock(call) for _ in range(3)))))
    block = _in_a_row(call, calls, device)
    best, rounds = math.inf, 0
    end = time.perf_counter() + seconds
    try:
        while rounds < 4 or time.perf_counter() < end:
            if not cuda:
                torch.set_num_threads(1 if rounds % 2 else threads)
            best = min(best, clock(block) / calls)
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    return best


def _in_a_row(call: Callable[[], object], calls: int, device: torch.device) -> Callable[[], object]:
    def block() -> None:
        for _ in range(calls):
            call()

    if device.type != "cuda":
        return block
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block()
    return graph.replay
