"""The runner: one benchmark per shape, pass and contender, replaying what its cell has sampled.

The first test of a shape and pass measures the whole cell (see cell.py), so that its contenders are
sampled interleaved; each test then hands its own samples to pytest-benchmark, whose clock is the one
below. So -k, --benchmark-json, --benchmark-compare and the rest work as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.rows import FAILURES, TIMED
from bench.session import PLAN
from bench.workloads import PASSES, Workload

if TYPE_CHECKING:
    from bench.session import Session


class ReplayClock:
    """A clock that stands still except when a recorded sample is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = ReplayClock()


def refuse(sentence: str, error: Exception | None) -> None:
    """Fail a row: with the traceback of what its contender raised, or with the sentence alone."""
    if error is not None:
        raise RuntimeError(sentence) from error
    pytest.fail(sentence, pytrace=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(workload, pass_name, name, id=f"{workload.id}-{pass_name}-{name.replace(' ', '-')}")
        for workload, pass_name, name in metafunc.config.stash[PLAN].keys
    ]
    metafunc.parametrize(("workload", "pass_name", "contender"), cases)


@pytest.mark.filterwarnings("default")  # what torch's compiler or a peer warns of is no failure of its row
@pytest.mark.benchmark(timer=clock)
def test_latency(
    workload: Workload,
    pass_name: str,
    contender: str,
    run: Session,
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if benchmark.disabled:
        pytest.skip("timing is off (--benchmark-disable, or pytest-xdist)")
    benchmark.skipped = True  # until it is used: interrupting the measurement must not count as misuse
    with capsys.disabled():  # for the progress line
        row = run.row(workload, pass_name, contender)
    benchmark.group = f"{workload.shape} {workload.dtype} {PASSES[pass_name]}"
    benchmark.extra_info = {"speedup": row.speedup, "errors": row.errors}
    if row.status in FAILURES:
        sentence = f"{contender}, {workload.shape}, {PASSES[pass_name]}: {row.status}. {row.reason}"
        benchmark.has_error = True  # keeps the row out of --benchmark-json
        benchmark.pedantic(refuse, args=(sentence, run.raised.get((workload, pass_name, contender))))
    if row.status != TIMED:
        pytest.skip(row.reason)
    clock.now = 0.0
    samples = iter(row.samples)
    benchmark.pedantic(lambda: clock.advance(next(samples)), rounds=len(row.samples), iterations=1)
