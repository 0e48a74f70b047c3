"""What is measured beside the latency: memory; on CUDA a cold cache, a replayed graph, the host's time."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.measure import Target, cuda_seconds

REPLAYS = 5


def peak_bytes(target: Target, device: torch.device) -> int:
    """The most bytes that one call has allocated at a time, what it returns included; prepared untimed."""
    target.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        target.call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # else torch 2.11 warns that it clears events between cycles, of which this has one
    )
    with _profilers_lines_hidden(), profiler as found:
        target.call()
    events = found.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, size in allocations:
        now += size
        peak = max(peak, now)
    return peak


@contextmanager
def _profilers_lines_hidden() -> Iterator[None]:
    """Some builds of torch's profiler print two lines straight to file descriptor 2."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cold_seconds(target: Target, device: torch.device, samples: int) -> float:
    """Median seconds of a call that finds nothing of its own in the GPU's L2 cache."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def sample() -> float:
        target.prepare()
        flush.zero_()
        return cuda_seconds(target.call)

    return statistics.median(sample() for _ in range(samples))


def host_seconds(target: Target, samples: int) -> float:
    """Median seconds until a call on an idle GPU returns, whatever the GPU still has to do."""

    def sample() -> float:
        target.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.call()
        return time.perf_counter() - start

    return statistics.median(sample() for _ in range(samples))


def graph_seconds(target: Target, samples: int) -> float:
    """Median seconds of a call replayed as a CUDA graph: what it takes when launching costs nothing.

    Not for the backward pass alone, whose forward pass would have to be in the graph too. Raises whatever
    the capture raises.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first call on the stream that is captured: it may allocate and compile
        target.prepare()
        target.call()
    torch.cuda.current_stream().wait_stream(side)
    target.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = target.call()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    replay()
    taken = [cuda_seconds(replay) / REPLAYS for _ in range(samples)]
    if not all(torch.isfinite(result).all() for result in results):  # of programs that waited in vain
        raise ArithmeticError("its results, replayed, are not finite")
    return statistics.median(taken)
