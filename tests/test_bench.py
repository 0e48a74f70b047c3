"""The benchmark suite itself: its statistics, its refusal to time what is wrong, its files."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import elman
from bench import agreement, contenders, extras, machine, measure, session
from bench import cell as bench_cell
from bench import rows as records
from bench.cell import Timing, measure_cell
from bench.contenders import AUTO, COMPILED, NAIVE, Contender, Problem
from bench.rows import BASELINE, FAILED, LEFT_OUT, SHED, TIMED, UNAVAILABLE, WRONG, Row
from bench.session import Plan, Session
from bench.workloads import CPU_MAX_FLOPS, SWEEPS, Workload, by_hand
from elman import BackendUnavailableError, compiled
from elman.commit import commit
from tests.machines import simulate_gpu

ROOT = Path(__file__).parents[1]
TINY = Workload(2, 5, 3, 4)
CPU = torch.device("cpu")
#: Of our backends those that run on this machine's CPU, what auto takes first.
LOOPS = ("eager",) if compiled.unavailable() else ("native", "eager")


def pytest_bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    env = {**one_thread(), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def one_thread() -> dict[str, str]:
    """The environment of a run of the suite; pytest-benchmark measures nothing in a worker of xdist."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {**own, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a complete smallest sweep wrote, and what it printed."""
    results = tmp_path_factory.mktemp("results")
    done = pytest_bench("--sweep", "smallest", "--results", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    return folder, done.stdout


# Statistics


def test_quantiles_of_known_samples():
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [measure.quantile(samples, q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert measure.quantile([1.0, 2.0], 0.5) == 1.5


def test_speedup_of_exactly_twice_has_no_width():
    own = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert measure.speedup([2 * s for s in own], own) == pytest.approx((2, 2, 2))


def test_speedup_interval_holds_the_truth_and_repeats():
    noise = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(50):
        base, own = (1 + 0.1 * torch.randn(2, 40, generator=noise, dtype=torch.float64)).tolist()
        _, low, high = measure.speedup([1.5 * s for s in base], own)
        held += low <= 1.5 <= high
    assert 43 <= held <= 50, "a 95% interval must hold the true ratio in about 95% of the runs"
    assert measure.speedup(base, own) == measure.speedup(base, own)


def test_common_noise_cancels_because_rounds_are_paired():
    drift = [float(2 ** (i % 5)) for i in range(20)]
    own = [d * (1 + 0.001 * (i % 3)) for i, d in enumerate(drift)]
    ratio, low, high = measure.speedup([1.2 * d for d in drift], own)
    assert 1.19 < low <= ratio <= high < 1.21


def test_unpaired_samples_are_refused():
    with pytest.raises(ValueError, match="paired round by round, but there are 2 and 1"):
        measure.speedup([1.0, 2.0], [1.0])


def test_rounds_are_interleaved_in_every_order_with_gc_off():
    seen: list[str] = []

    def stopwatch(call):
        call()
        assert not gc.isenabled(), "the garbage collector must be off while sampling"
        return 1.0

    targets = {n: measure.Target(lambda n=n: seen.append(n), prepare=lambda: None) for n in "abc"}
    found = measure.collect(targets, stopwatch, seconds=0, min_rounds=12, warmup=0)
    assert gc.isenabled()
    assert not found.errors
    assert not found.shed
    assert {name: len(taken) for name, taken in found.samples.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = ["".join(seen[i : i + 3]) for i in range(3, len(seen), 3)]
    assert rounds[:6] == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_a_target_that_raises_while_sampled_leaves_the_others_in():
    calls = iter(range(100))

    def breaks():
        if next(calls) > 3:
            raise RuntimeError("out of luck")

    targets = {
        "good": measure.Target(lambda: None, prepare=lambda: None),
        "bad": measure.Target(breaks, prepare=lambda: None),
    }
    found = measure.collect(targets, measure.wall_seconds, seconds=0, min_rounds=8, warmup=0)
    assert len(found.samples["good"]) == 8
    assert "bad" not in found.samples
    assert str(found.errors["bad"]) == "out of luck"


def test_a_target_too_slow_for_its_limit_is_shed_and_the_others_stay():
    seconds = {"quick": 0.001, "slow": 2.0}
    calls = []

    def stopwatch(call):
        calls.append(call())
        return seconds[calls[-1]]

    targets = {n: measure.Target(lambda n=n: n, prepare=lambda: None) for n in seconds}
    limits = {"quick": 10.0, "slow": 10.0}
    found = measure.collect(targets, stopwatch, seconds=0, min_rounds=6, warmup=0, limits=limits)
    assert found.shed == {"slow": 2.0}
    assert found.samples == {"quick": [0.001] * 6}
    assert calls.count("slow") == 1
    limits["slow"] = 12.0
    found = measure.collect(targets, stopwatch, seconds=0, min_rounds=6, warmup=0, limits=limits)
    assert not found.shed


def test_a_short_call_comes_after_another_untimed():
    calls, timed = [], []

    def stopwatch(call):
        timed.append(call())
        return {"short": 0.0001, "long": 0.1}[timed[-1]]

    def target(name):
        return measure.Target(lambda: calls.append(name) or name, prepare=lambda: None)

    targets = {name: target(name) for name in ("short", "long")}
    measure.collect(targets, stopwatch, seconds=0, min_rounds=6, warmup=0)
    assert (timed.count("short"), timed.count("long")) == (7, 7)
    assert (calls.count("short"), calls.count("long")) == (7 + 6, 7)


def test_the_interval_of_a_median():
    assert measure.median_interval([2.0] * 9) == (2.0, 2.0)
    noise = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(50):
        low, high = measure.median_interval((5 + torch.randn(30, generator=noise)).tolist())
        assert low < high
        held += low <= 5 <= high
    assert 43 <= held <= 50, "a 95% interval must hold the true median in about 95% of the runs"


# Agreement


TIMING = Timing(measure.wall_seconds, seconds=0.01, min_rounds=3, warmup=0)


def cell(pass_name: str, *names: str, workload: Workload = TINY) -> dict[str, Row]:
    problem = Problem(workload, torch.device("cpu"))
    rows, _ = measure_cell(problem, problem.truth(), pass_name, names, TIMING)
    return rows


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch):
    """spoil(layer): the eager contender becomes layer(x, h0, its own results)."""

    def install(layer):
        honest = contenders.build

        def build(name: str, problem: Problem) -> Contender:
            contender = honest(name, problem)
            if name == "eager":
                inner = contender.layer
                contender.layer = lambda x, h0: layer(x, h0, *inner(x, h0))
            return contender

        monkeypatch.setattr(contenders, "build", build)

    return install


@pytest.mark.parametrize("pass_name", ["forward", "backward", "training"])
def test_a_right_contender_is_timed_beside_nn_rnn(pass_name):
    rows = cell(pass_name, "eager", NAIVE)
    for name in (BASELINE, "eager", NAIVE):
        assert rows[name].status == TIMED, rows[name].reason
        assert len(rows[name].samples) == len(rows[BASELINE].samples) >= measure.MIN_ROUNDS
        assert rows[name].median > 0
    assert rows[BASELINE].speedup == 1
    gradients = {"d x", "d h0", "d weight_ih_l0", "d weight_hh_l0", "d bias_ih_l0", "d bias_hh_l0"}
    assert set(rows["eager"].errors) == {"output", "h_n"} | (gradients if pass_name != "forward" else set())
    for row in rows.values():
        assert row.median_low <= row.median <= row.median_high
        assert row.first > 0
        assert row.memory >= (0 if pass_name == "forward" else 2 * 5 * 3 * 4), "at least dx is made"


@pytest.mark.parametrize("pass_name", ["forward", "training"])
@pytest.mark.parametrize(
    "workload",
    [
        Workload(3, 7, 5, 6, layers=2),
        Workload(3, 7, 5, 6, bidirectional=True),
        Workload(3, 7, 5, 6, layers=2, bidirectional=True, packed=True),
        Workload(5, 40, 5, 6, packed=True),
        Workload(3, 1, 5, 6, cell=True),
        Workload(3, 40, 5, 6, nonlinearity="relu"),
        Workload(3, 1, 5, 6, cell=True, nonlinearity="relu"),
        Workload(3, 7, 5, 6, "float64"),
        Workload(8, 32, 64, 64, "float64"),
        Workload(3, 7, 5, 6, "bfloat16"),
    ],
    ids=lambda workload: workload.id,
)
def test_every_form_agrees(workload, pass_name):
    rows = cell(pass_name, "native", "eager", NAIVE, AUTO, "triton:step", workload=workload)
    for name in (BASELINE, *LOOPS):
        assert rows[name].status == TIMED, (name, rows[name].reason)
    assert rows[NAIVE].status in (TIMED, LEFT_OUT), rows[NAIVE].reason  # too wrong, in 16 bits
    assert (rows[AUTO].status, rows["triton:step"].status) == (LEFT_OUT, UNAVAILABLE)
    results = 1 if workload.cell else 2
    parameters = 4 * workload.layers * (1 + workload.bidirectional)
    for name in LOOPS:
        assert len(rows[name].errors) == results + (0 if pass_name == "forward" else 2 + parameters)


@pytest.mark.parametrize("without", [False, True], ids=["as it is", "without a compiler"])
def test_on_a_cpu_auto_is_the_row_of_what_it_takes(without, monkeypatch):
    if without:
        monkeypatch.setenv("CC", "no-such-compiler")
    compiled.forget()
    try:
        found = {name: contenders.absence(name, TINY, CPU) for name in (AUTO, "native", "eager")}
        own = elman.explain(batch=2, seq=5, input=3, hidden=4, device="cpu").backend
        layer = Plan.make("layer", device="cpu")
        quick = Plan.make("quick", device="cpu")
    finally:
        compiled.forget()
    assert own == ("eager" if without or LOOPS == ("eager",) else "native")
    assert found[AUTO] == (LEFT_OUT, f"Here auto is {own}: the same code.")
    assert found["eager"] is None
    if own == "native":
        assert found["native"] is None
    else:
        status, reason = found["native"]
        assert status == UNAVAILABLE
        assert not without or "CC is 'no-such-compiler', which is no program" in reason
    assert layer.contenders == (BASELINE, own)
    assert {AUTO, "native", "eager"} < set(quick.contenders)


def test_native_is_for_a_cpu():
    status, reason = contenders.absence("native", TINY, torch.device("cuda"))
    assert status == UNAVAILABLE
    if LOOPS != ("eager",):
        assert reason == "native is timed on a CPU only, and this run is on cuda."


def test_a_run_without_a_compiler_says_so_and_goes_on_with_eager(tmp_path):
    options = ["--shapes", "1,4,2,2", "--passes", "forward", "--backends", "native,eager"]
    done = pytest_bench(*options, "--results", str(tmp_path), CC="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native can't run here, so that auto is eager: it needs a C compiler, and CC is" in done.stdout
    (path,) = tmp_path.glob("*/rows.jsonl")
    ((run, rows),) = records.read(path).values()
    assert {row.contender: row.status for row in rows} == {
        BASELINE: TIMED,
        "native": UNAVAILABLE,
        "eager": TIMED,
    }
    assert "call" in run["floor"]["step"]


def test_packed_rows_are_spread_as_paragraphs_are():
    workload = Workload(16, 668, 4, 4, packed=True)
    lengths = workload.lengths
    assert len(lengths) == 16
    assert lengths[0] == 668
    assert list(lengths) == sorted(lengths, reverse=True)
    assert 0.15 < sum(lengths) / 16 / 668 < 0.35
    assert min(Workload(64, 10, 4, 4, packed=True).lengths) == 1
    assert workload.flops == 2 * sum(lengths) * 4 * 8


def test_what_was_measured_beside_stays_and_a_graph_that_fails_is_told(monkeypatch):
    target, row = measure.Target(lambda: None, lambda: None), Row(TINY, "training", "eager", TIMED)
    asked = []
    monkeypatch.setattr(extras, "cold_seconds", lambda target, device, samples: asked.append(samples) or 1.0)
    monkeypatch.setattr(extras, "host_seconds", lambda target, samples: 2.0)

    def graph(target, samples):
        raise RuntimeError("not\npermitted")

    monkeypatch.setattr(extras, "graph_seconds", graph)
    bench_cell.measure_beside(row, target, torch.device("cpu"), rounds=6)
    bench_cell.measure_beside(row, target, torch.device("cpu"), rounds=200)
    assert asked == [3, 11]
    assert (row.cold, row.host, row.graph) == (1.0, 2.0, None)
    assert row.reason == "Not measured beside the latency: RuntimeError: not permitted"
    row = Row(TINY, "backward", "eager", TIMED)
    bench_cell.measure_beside(row, target, torch.device("cpu"), rounds=6)
    assert row.reason == "", "a graph of the backward pass alone is not tried"


def test_a_contender_that_goes_wrong_while_it_is_timed_is_found(spoil):
    calls = []

    def tiring(x, h0, output, h_n):
        calls.append(1)
        return (output if len(calls) < 5 else output + 1), h_n

    spoil(tiring)
    row = cell("forward", "eager")["eager"]
    assert row.status == WRONG
    assert row.reason.startswith("It agreed at first, and not after all its calls. The error of output")
    assert not row.samples


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_smallest_sweep_on_a_gpu(tmp_path):
    done = pytest_bench("--sweep", "smallest", "--device", "cuda", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/rows.jsonl")
    ((run, rows),) = records.read(path).values()
    assert run["device"] == "cuda"
    timed = {row.contender: row for row in rows if row.status == TIMED and row.pass_name == "forward"}
    assert {BASELINE, "eager", "cudnn", "triton:resident"} <= timed.keys()
    for name in (BASELINE, "cudnn", "triton:resident"):
        assert None not in (timed[name].cold, timed[name].host, timed[name].graph), timed[name].reason


def test_flops_of_known_shapes():
    assert Workload(2, 3, 5, 7).flops == 2 * 2 * 3 * 7 * (5 + 7)
    assert Workload(2, 3, 5, 7, layers=2).flops == 2 * 2 * 3 * 7 * (5 + 7 + 7 + 7)
    assert Workload(2, 3, 5, 7, bidirectional=True).flops == 2 * 2 * 2 * 3 * 7 * (5 + 7)
    assert Workload(2, 3, 5, 7, layers=2, bidirectional=True).flops == 4 * 2 * 3 * 7 * (5 + 14 + 14)


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_compiled_loop_takes_part():
    row = cell("training", COMPILED, workload=Workload(2, 3, 4, 4))[COMPILED]
    assert row.status == TIMED, row.reason
    assert row.first > 10 * row.median, "the first call compiles"


def test_memory_is_what_a_call_allocates():
    target = measure.Target(lambda: torch.ones(1000, 1000).add(1).sum(), prepare=lambda: None)
    assert 8_000_000 <= extras.peak_bytes(target, torch.device("cpu")) < 9_000_000


def test_switches_for_tf32_are_left_as_they_were():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for dtype in ("tf32", "float32"):
        with contenders.arithmetic(dtype):
            within = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        assert within == (dtype == "tf32",) * 2
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda x, h0, output, h_n: (output * 1.00001, h_n),
            r"The error of output .* is 1\.\de-05, nn.RNN's",
        ),
        (lambda x, h0, output, h_n: (output, h_n + float("nan")), r"^h_n is not finite\.$"),
        (lambda x, h0, output, h_n: (output, h_n / 0), r"^h_n is not finite\.$"),
    ],
    ids=["wrong", "nan", "inf"],
)
def test_a_wrong_contender_is_not_timed(spoil, layer, reason):
    spoil(layer)
    rows = cell("forward", "eager")
    assert rows["eager"].status == WRONG
    assert rows["eager"].samples == []
    assert rows["eager"].median is None
    assert re.search(reason, rows["eager"].reason), rows["eager"].reason
    assert rows[BASELINE].status == TIMED


def test_a_wrong_gradient_is_found(spoil):
    spoil(lambda x, h0, output, h_n: (output + (x - x.detach()).sum() * 1e-4, h_n))
    assert cell("forward", "eager")["eager"].status == TIMED
    row = cell("training", "eager")["eager"]
    assert row.status == WRONG
    assert row.worst == "d x"


def test_a_contender_that_raises_is_a_row_with_the_reason(spoil):
    def broken(x, h0, output, h_n):
        raise RuntimeError("the launch\nfailed")

    spoil(broken)
    row = cell("forward", "eager")["eager"]
    assert (row.status, row.reason, row.samples) == (FAILED, "RuntimeError: the launch failed", [])


@pytest.mark.parametrize(
    ("layer", "status", "reason"),
    [
        (lambda x, h0, output, h_n: 1 / 0, UNAVAILABLE, "ZeroDivisionError: division by zero"),
        (
            lambda x, h0, output, h_n: (output + 1, h_n),
            LEFT_OUT,
            "Too wrong to be timed. The error of output",
        ),
    ],
)
def test_a_guest_that_raises_or_is_wrong_is_a_row_and_no_failure(spoil, monkeypatch, layer, status, reason):
    monkeypatch.setattr(contenders, "GUESTS", ("eager",))
    spoil(layer)
    row = cell("forward", "eager")["eager"]
    assert row.status == status
    assert row.reason.startswith(reason)
    assert not row.samples


def test_an_unavailable_backend_is_a_row_and_no_failure(spoil):
    def refuses(x, h0, output, h_n):
        raise BackendUnavailableError("no such device here")

    spoil(refuses)
    row = cell("forward", "eager")["eager"]
    assert (row.status, row.reason) == (UNAVAILABLE, "no such device here")


def test_without_nn_rnn_nothing_is_timed(monkeypatch):
    honest = contenders.build

    def build(name, problem):
        if name == BASELINE:
            raise MemoryError("no room")
        return honest(name, problem)

    monkeypatch.setattr(contenders, "build", build)
    rows = cell("forward", "eager")
    assert rows[BASELINE].reason == "MemoryError: no room"
    assert rows["eager"].status == FAILED
    assert "no error to compare with" in rows["eager"].reason


def test_a_missing_or_misshapen_result_is_an_error():
    truth = {"output": torch.ones(2, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"output is missing: expected a tensor of shape \(2, 3\)"):
        agreement.errors({"output": None}, truth)
    with pytest.raises(ValueError, match=r"output has shape \(3,\), expected \(2, 3\)"):
        agreement.errors({"output": torch.ones(3)}, truth)


@pytest.mark.parametrize(
    ("own", "baseline", "passes"),
    [
        (1.5e-6, 1.0e-6, True),  # 1.5 times nn.RNN's own
        (1.6e-6, 1.0e-6, False),
        (2.9e-7, 1.0e-8, True),  # below the floor
        (3.1e-7, 1.0e-8, False),
        (0.2, 0.2, False),  # nn.RNN itself is no yardstick
        (1e-7, float("nan"), False),
        (float("inf"), 1e-7, False),
    ],
)
def test_the_bar(own, baseline, passes):
    verdict = agreement.judge({"output": own}, {"output": baseline}, 64, torch.float32)
    assert (verdict.objection is None) == passes, verdict.objection


def test_a_state_on_the_other_side_of_relus_kink_is_no_wrong_gradient():
    ref = torch.tensor([[1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    assert agreement.kinks(ref.float(), ref) == 0
    allowed = agreement.kinks(torch.tensor([[1.0, 1e-8, 2.0, 0.0]]), ref)
    assert allowed == 0.25
    own, baseline = {"output": 1e-7, "d x": 1.4}, {"output": 1e-7, "d x": 1e-7}
    assert agreement.judge(own, baseline, 8, torch.float32).objection
    assert not agreement.judge(own, baseline, 8, torch.float32, allowed).objection
    own["output"] = 1e-3
    assert agreement.judge(own, baseline, 8, torch.float32, allowed).worst == "output"


# The plan


def test_a_plan_of_the_sweeps_own_has_its_name():
    plan = Plan.make("quick", device="cpu")
    assert plan.table == "quick"
    assert plan.passes == ("forward", "training")
    assert {workload.dtype for workload in plan.workloads} == {"float32"}
    assert len(plan.keys) == len(SWEEPS["quick"].workloads) * 2 * len(contenders.CONTENDERS)


def test_what_is_asked_for_beside_is_in_the_tables_name():
    plan = Plan.make("quick", "", "cpu", "bfloat16,float32", "training", "eager,triton:step")
    assert plan.table == "quick-float32+bfloat16-training-eager+triton-step"
    assert plan.contenders == (BASELINE, "eager", "triton:step")
    assert Plan.make("quick", device="cpu", contenders=BASELINE).table == "quick-nn.RNN"
    assert [w.dtype for w in plan.workloads[:1] + plan.workloads[-1:]] == ["float32", "bfloat16"]


def test_shapes_by_hand():
    plan = Plan.make(shapes="2, 3,4,5;1,1,1,1;", device="cpu")
    assert plan.workloads == (Workload(2, 3, 4, 5), Workload(1, 1, 1, 1))
    other = Plan.make(shapes="2,3,4,5", device="cpu")
    assert re.fullmatch("shapes-[0-9a-f]{6}", plan.table)
    assert plan.table != other.table, "one set of shapes must not take the place of another"


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "0,1,1,1", "1,2,3,4,5"])
def test_shapes_that_are_none(text):
    with pytest.raises(ValueError, match=f"--shapes has '{text}'; expected four positive integers"):
        by_hand(text)


@pytest.mark.parametrize(
    ("option", "words", "sentence"),
    [
        ("dtypes", "float8", r"--dtype has 'float8'; expected one or several of float32, tf32"),
        ("dtypes", "tf32", "--dtype has tf32, which is arithmetic of NVIDIA GPUs; expected float32"),
        (
            "passes",
            "sideways",
            "--passes has 'sideways'; expected one or several of forward, backward, training",
        ),
        (
            "contenders",
            "cuda",
            "--backends has 'cuda'; expected one or several of nn.RNN, auto, native, eager",
        ),
        ("shapes", ";", r"--shapes is empty; expected B,T,I,H"),
        ("device", "cuda:1", "--device is 'cuda:1'; expected cpu or cuda"),
    ],
)
def test_a_word_that_is_none(option, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan.make(**{"device": "cpu", option: words})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="--device is cuda and this machine has no CUDA device"):
        Plan.make(device="cuda")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_work_for_a_cpu_and_no_shape_twice(sweep):
    workloads = SWEEPS[sweep].workloads
    assert len(set(workloads)) == len(workloads)
    assert any(workload.flops <= CPU_MAX_FLOPS for workload in workloads)
    assert len({workload.id for workload in workloads}) == len(workloads)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_s_contenders_are_known(sweep):
    assert set(SWEEPS[sweep].contenders or ()) <= set(contenders.CONTENDERS)
    assert BASELINE in Plan.make(sweep, device="cpu").contenders


def test_the_sweep_of_the_kernels_runs_no_loop_but_on_a_cpu():
    gpu = SWEEPS["kernels"].contenders
    assert not {"eager", COMPILED, NAIVE} & set(gpu)
    assert {AUTO, "triton:resident", "triton:cooperative", "cudnn"} < set(gpu)
    for sweep in ("kernels", "layer"):
        plan = Plan.make(sweep, device="cpu")
        assert plan.table == sweep, "these are its own"
        assert LOOPS[0] in plan.contenders
        assert AUTO not in plan.contenders


def test_how_long_a_run_takes_is_known_before_it():
    assert Plan.make("quick", device="cpu").takes == "about five minutes on two slow cores"
    own = Plan.make(shapes="1,1000,8,8;1,1001,8,8", device="cpu", passes="forward", contenders="eager")
    # nn.RNN and eager at two shapes
    assert own.takes == "sampling alone takes 1 min (4 rows of 1 s), checks come on top"
    quick = dataclasses.replace(Plan.make("quick", device="cpu"), device=torch.device("cuda"))
    assert quick.takes.startswith("sampling alone takes ")  # what two cores need says nothing of a GPU


def test_the_smallest_sweep_is_never_published():
    for plan in (Plan.make("smallest", device="cpu"), Plan.make("smallest", device="cpu", passes="forward")):
        for published in (session.RESULTS, session.RESULTS / "own", Path(os.path.relpath(session.RESULTS))):
            assert plan.destination(published) == session.SCRATCH
        assert plan.destination(Path("elsewhere")) == Path("elsewhere")
    assert not session.SCRATCH.is_relative_to(session.RESULTS)
    ignored = subprocess.run(["git", "check-ignore", "-q", str(session.SCRATCH / "a")], cwd=ROOT, check=False)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout
    by_hand = Plan.make("smallest", shapes="1,16,32,32", device="cpu")
    for plan in (Plan.make("quick", device="cpu"), by_hand):
        assert plan.destination(session.RESULTS) == session.RESULTS


# The session: what is measured once is not measured again


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """started(**options): a session of two shapes, three contenders and one pass, in the same folder."""
    monkeypatch.setattr(session.floor, "measure", lambda device, dtypes: {})
    plan = Plan.make(shapes="2,5,3,4;2,6,3,4", device="cpu", passes="forward", contenders=f"eager,{NAIVE}")
    plan = dataclasses.replace(plan, seconds=0.01)

    def start(**options) -> Session:
        cells: dict = {}
        for workload, pass_name, name in plan.keys:
            cells.setdefault((workload, pass_name), []).append(name)
        return Session(plan, cells, tmp_path, **options)

    return start


def measure_all(run: Session) -> None:
    for key in run.plan.keys:
        run.row(*key)


def test_a_stopped_run_is_gone_on_with(started, monkeypatch):
    first = started()
    first.row(*first.plan.keys[0])
    assert len(first.rows) == 3, "a cell is measured as a whole"
    second = started()
    assert second.to_measure == 1
    assert "1 of 2 cells are there" in second.started
    measured = []
    honest = session.measure_cell
    monkeypatch.setattr(session, "measure_cell", lambda *a: measured.append(a[0].workload) or honest(*a))
    measure_all(second)
    assert measured == [second.plan.workloads[1]]
    assert second.rows[first.plan.keys[0]].samples == first.rows[first.plan.keys[0]].samples
    page, *_ = second.write()
    tables = records.read(second.folder / "rows.jsonl")
    assert [row.key for row in tables[second.plan.table][1]] == second.plan.keys
    assert page.name == f"{second.plan.table}.md"
    assert not list(second.folder.glob("*.partial.*")), "a complete run leaves none"
    assert started().to_measure == 2, "a complete run is not gone on with"


@pytest.mark.parametrize("key", ["source", "software", "machine", "timing"])
def test_a_run_of_other_code_or_another_machine_is_not_gone_on_with(started, key):
    first = started()
    first.row(*first.plan.keys[0])
    table, (run, rows) = first.plan.table, records.read(first.journal)[first.plan.table]
    another = {"machine": {"cpu": "another"}}.get(key, "another")
    records.write(first.journal, {table: ({**run, key: another}, rows)})
    before = first.journal.read_bytes()
    second = started()
    assert second.to_measure == 2
    assert f"differs in {key}," in second.started
    (stale,) = second.folder.glob("*.stale.jsonl")
    stamp = run["date"].removesuffix(" UTC").replace(" ", "-").replace(":", "-")
    assert stale.name == f"{table}.{stamp}.stale.jsonl"
    assert f"its 3 rows are kept as {stale.name}." in second.started
    measure_all(second)
    assert stale.read_bytes() == before
    records.write(second.journal, {table: ({**second.record, key: another}, rows)})
    started()
    assert len(list(second.folder.glob("*.stale.jsonl"))) == 2, "one does not overwrite another"
    ignored = ["git", "check-ignore", "-q", f"results/machine/{stale.name}"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode in (0, 128)  # 128: not a git checkout


CODE = """
# A comment.
def twice(x):
    \"\"\"A docstring.\"\"\"
    return 2 * x
"""


@pytest.mark.parametrize("folder", ["elman", "kernels", "bench"])
def test_the_digest_of_the_code_is_of_what_it_does(tmp_path, monkeypatch, folder):
    """A comment in a file must not cost a run on a GPU."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    path = tmp_path / folder / "code.py"
    path.parent.mkdir()

    def digest(text: str) -> str:
        path.write_text(text)
        return machine.source()

    first = digest(CODE)
    for before, after in (
        ("# A comment.", "# Another, and a blank line.\n"),
        ("# A comment.", '"""A docstring of the file."""'),
        ("A docstring.", "Another."),
        ('    """A docstring."""\n', ""),
        ("2 * x", "(2  *  x)  # of two factors"),
        ("return 2 * x", "return (\n        2 * x\n    )"),
    ):
        assert digest(CODE.replace(before, after)) == first, after
    assert digest(CODE.replace("2 * x", "3 * x")) != first
    broken = digest(CODE.replace("return", "retur n"))
    assert broken != first
    assert digest(CODE.replace("return", "retur n") + "# a comment") != broken, "it can't be parsed"
    assert digest(CODE) == first
    path.rename(path.with_name("renamed.py"))
    assert machine.source() != first, "a number may depend on a module's name"


def test_what_works_on_results_is_no_part_of_the_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    before = machine.source()
    (tmp_path / "bench" / "report.py").write_text("x = 1")
    assert machine.source() == before
    (tmp_path / "bench" / "cell.py").write_text("x = 1")
    assert machine.source() != before


def test_an_unfinished_run_that_cannot_be_read_is_kept(started):
    first = started()
    first.folder.mkdir()
    first.journal.write_text("what?\n")
    second = started()
    (stale,) = second.folder.glob("*.stale.jsonl")
    assert stale.read_text() == "what?\n"
    assert stale.name in second.started
    assert second.to_measure == 2


def test_a_run_of_other_tuned_tables_is_not_gone_on_with(started, monkeypatch):
    now = {"user: a": "1", "shipped: b": "2"}
    monkeypatch.setattr(machine, "tuned", lambda device: dict(now))
    first = started()
    first.row(*first.plan.keys[0])
    now["user: c"] = "3"
    second = started()
    assert second.to_measure == 1, "the run itself may have tuned more before it was killed"
    assert second.record["tables"] == {"user: a": "1", "shipped: b": "2"}
    now["user: a"] = "4"
    third = started()
    assert third.to_measure == 2
    assert "differs in tables," in third.started
    third.row(*third.plan.keys[0])
    now["ELMAN_KERNELS"] = "step"
    fourth = started()
    assert fourth.to_measure == 2, "a run with fewer kernels is another"
    assert "differs in tables," in fourth.started


def test_what_the_tuned_tables_in_force_say(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from elman import tables
    from elman.kernels import configs

    gpu, cuda = "Simulated GPU", torch.device("cuda", 0)
    assert machine.tuned(torch.device("cpu")) == {}
    simulate_gpu(monkeypatch, gpu)
    monkeypatch.setenv("ELMAN_AUTOTUNE", "on")
    monkeypatch.delenv("ELMAN_KERNELS", raising=False)
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "shipped_path", lambda gpu: tmp_path / "shipped.json")
    assert machine.tuned(cuda) == {"ELMAN_AUTOTUNE": "on"}
    key = tables.key_of("cudnn", configs.Problem(16, 256, 1, torch.bfloat16))
    found = []
    for path, us in (
        (tables.user_path(gpu), 2.0),
        (tmp_path / "shipped.json", 2.0),
        (tables.user_path(gpu), 3.0),
    ):
        entry = tables.Entry(key, None, us, us, us, us, 1)
        tables.write(path, tables.Table(gpu).with_entry(entry, {}))
        found.append(machine.tuned(cuda))
    assert list(found[1]) == ["ELMAN_AUTOTUNE", f"user: {key}", f"shipped: {key}"]
    assert found[0].items() < found[1].items()
    assert not found[1].items() <= found[2].items(), "the user's entry has changed"
    (tmp_path / "shipped.json").write_text("{")
    assert f"shipped: {key}" not in machine.tuned(cuda)
    monkeypatch.setenv("ELMAN_AUTOTUNE", "off")
    assert machine.tuned(cuda) == {"ELMAN_AUTOTUNE": "off"}
    monkeypatch.setenv("ELMAN_KERNELS", "step")
    assert machine.tuned(cuda) == {"ELMAN_AUTOTUNE": "off", "ELMAN_KERNELS": "step"}


def test_restart_measures_all_anew(started):
    first = started()
    first.row(*first.plan.keys[0])
    assert started(restart=True).to_measure == 2


def test_a_line_that_a_kill_cut_short_costs_its_row_only(started):
    first = started()
    measure_all(first)
    whole = first.journal.read_bytes()
    first.journal.write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    second = started()
    assert second.to_measure == 1, "the last cell lacks a row"
    measure_all(second)
    assert second.partial() == ""


def test_a_failed_row_is_tried_again_by_the_next_run_only(started, spoil, monkeypatch):
    calls = []

    def broken(x, h0, output, h_n):
        calls.append(1)
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(contenders, "build", contenders.build)
        spoil(broken)
        first = started()
        measure_all(first)
        measure_all(first)
    assert len(calls) == 2, "once a cell"
    assert first.partial() == ""
    assert first.missing() == "2 of 6 rows are missing: 2 failed."
    assert started().to_measure == 2


def test_a_spent_budget_leaves_rows_out_and_says_so(started):
    run = started(budget=1.0)
    run.deadline = time.monotonic()
    measure_all(run)
    assert {row.status for row in run.rows.values()} == {SHED}
    assert {row.reason for row in run.rows.values()} == {"The budget of 1 minutes was spent."}
    assert run.missing() == "6 of 6 rows are missing: 6 left out for want of time."
    assert started(budget=1.0).to_measure == 2


@pytest.fixture
def spoilt_run(started, spoil, monkeypatch):
    """Makes a run whose Elman layers are wrong; afterwards they are right again."""

    def measured():
        with monkeypatch.context() as patch:
            patch.setattr(contenders, "build", contenders.build)
            spoil(lambda x, h0, output, h_n: (output + 1, h_n))
            run = started()
            measure_all(run)
        return run

    return measured


def test_a_spent_budget_takes_no_row_away(started, spoilt_run):
    first = spoilt_run()
    second = started(budget=1.0)
    second.deadline = time.monotonic()
    measure_all(second)
    assert [row.status for row in second.ordered()] == [TIMED, WRONG, TIMED] * 2
    assert second.ordered()[0].samples == first.ordered()[0].samples


def published_page(run: Session) -> tuple[str, list[Row]]:
    """What write() published: the page, and the rows."""
    page, *_ = run.write()
    assert page.name == f"{run.plan.table}.md", run.partial()
    assert not page.with_suffix(".partial.md").exists()
    return page.read_text(encoding="utf-8"), records.read(run.published)[run.plan.table][1]


def test_wrong_rows_are_published_and_marked_and_tried_again(started, spoilt_run):
    run = spoilt_run()
    page, rows = published_page(run)
    assert [row.status for row in rows] == [TIMED, WRONG, TIMED] * 2
    assert "**2 of 6 rows are missing: 2 wrong.**" in page
    assert len(re.findall(r"^\| B=2 .*\| eager \| wrong \|", page, re.M)) == 2, "in the table too"
    assert "2 of 6 rows are missing: 2 wrong." in (run.folder.parent / "README.md").read_text()
    second = started()
    assert second.to_measure == 2
    measure_all(second)
    page, rows = published_page(second)
    assert {row.status for row in rows} == {TIMED}
    assert "missing" not in page
    assert not list(second.folder.glob("*.partial.*"))


def test_rows_out_of_time_are_published_and_marked_and_tried_again(started):
    run = started(budget=1.0)
    run.row(*run.plan.keys[0])
    run.deadline = time.monotonic()
    measure_all(run)
    page, rows = published_page(run)
    assert [row.status for row in rows] == [TIMED] * 3 + [SHED] * 3
    assert "**3 of 6 rows are missing: 3 left out for want of time.**" in page
    assert "The budget of 1 minutes was spent." in page
    second = started()
    assert second.to_measure == 1
    measure_all(second)
    assert "missing" not in published_page(second)[0]


def test_a_small_budget_takes_no_published_row_away(started):
    first = started()
    measure_all(first)
    first.write()
    run = started(budget=1.0)
    run.deadline = time.monotonic()
    measure_all(run)
    assert run.partial() == "0 rows were timed within the budget, of the published table 6."
    page, *_ = run.write()
    assert page.name == f"{run.plan.table}.partial.md"
    assert {row.status for row in records.read(run.published)[run.plan.table][1]} == {TIMED}


def test_an_interrupted_run_is_not_published_whatever_it_lacks(started, spoil):
    spoil(lambda x, h0, output, h_n: (output + 1, h_n))
    run = started()
    run.row(*run.plan.keys[0])
    assert run.partial() == "3 of 6 rows were run."
    page, *_ = run.write()
    assert page.name == f"{run.plan.table}.partial.md"
    assert "1 of 6 rows is missing: 1 wrong." in page.read_text()
    assert not run.published.exists()


def test_a_cell_that_is_measured_again_is_so_as_a_whole(started, spoilt_run):
    first = spoilt_run()
    second = started()
    second.selected = {cell: ["eager"] for cell in second.selected}
    second.row(*second.plan.keys[1])
    rows = [second.rows[key] for key in second.plan.keys[:3]]
    assert [row.status for row in rows] == [TIMED] * 3
    assert all(row.samples != old.samples for row, old in zip(rows, first.ordered(), strict=False))
    assert len({len(row.samples) for row in rows}) == 1, "the n-th samples of a cell belong together"


def test_a_first_call_that_takes_the_whole_budget_is_not_made_again(started):
    run = started(budget=1.0)
    run.row(*run.plan.keys[0])
    run.first["eager"] = 100.0
    measure_all(run)
    assert [row.status for row in run.ordered()[3:]] == [TIMED, SHED, TIMED]
    assert "Its last first call took 1e+02 s" in run.ordered()[4].reason


def test_what_the_reference_raises_is_a_row(started, monkeypatch):
    def no_room(self):
        raise MemoryError("no room")

    monkeypatch.setattr(Problem, "truth", no_room)
    run = started()
    measure_all(run)
    assert {row.status for row in run.rows.values()} == {FAILED}
    assert {row.reason for row in run.rows.values()} == {"Not measured. MemoryError: no room"}
    assert len(run.raised) == 6


def test_without_a_floor_the_rows_are_published_and_the_page_says_so(started, monkeypatch):
    def broken(device, dtypes):
        raise RuntimeError("the GPU is busy")

    monkeypatch.setattr(session.floor, "measure", broken)
    run = started()
    measure_all(run)
    assert {row.status for row in run.rows.values()} == {TIMED}
    assert (run.partial(), run.missing()) == ("", "There is no floor: RuntimeError: the GPU is busy.")
    run.write()
    assert started().to_measure == 0
    assert started().missing() == run.missing(), "nothing is measured that could mend it"


def test_a_run_with_fewer_seconds_than_its_sweep_is_partial(started):
    run = started(scale=0.5)
    measure_all(run)
    assert run.partial() == "each contender was sampled for 0.005 s, not 0.01."


def test_what_a_failure_held_is_freed(started, spoil):
    held = []

    def broken(x, h0, output, h_n):
        big = torch.zeros(1000)
        held.append(weakref.ref(big))
        raise RuntimeError("no")

    spoil(broken)
    run = started()
    measure_all(run)
    assert len(run.raised) == 2
    assert [ref() for ref in held] == [None, None]


def test_a_budget_takes_samples_before_rows(started):
    run = started(budget=1.0)
    free = started().timing
    share = run._share(3)
    assert share.seconds == free.seconds, "a minute is plenty for two cells"
    assert 9 < share.limit <= 60 / 2 / 3
    run.deadline = run.deadline - 60 + 0.02
    hurried = run._share(3)
    assert hurried.seconds < free.seconds
    assert hurried.min_rounds == free.min_rounds


def test_a_slow_contender_hits_the_budget(started, spoil):
    def slow(x, h0, output, h_n):
        time.sleep(0.4)
        return output, h_n

    spoil(slow)
    run = started(budget=4 / 60)
    measure_all(run)
    slow_rows = [row for row in run.rows.values() if row.contender == "eager"]
    assert {row.status for row in slow_rows} == {SHED}
    assert "One call took 0.4" in slow_rows[0].reason
    assert run.rows[run.plan.keys[0]].status == TIMED
    assert "left out for want of time" in run.missing()


def test_shapes_for_a_gpu_are_rows_with_the_reason(started):
    workload = Workload(64, 4096, 1024, 1024)
    run = started()
    run = Session(run.plan, {(workload, "forward"): [BASELINE, "eager"]}, run.folder.parent)
    assert run.to_measure == 0
    row = run.row(workload, "forward", "eager")
    assert (row.status, row.reason) == (
        LEFT_OUT,
        "On a CPU only shapes of up to 40 GFLOP a forward pass are run.",
    )


def test_rows_survive_storage(tmp_path):
    rows = [Row(TINY, "forward", "eager", TIMED, errors={"output": (1e-7, None)}, samples=[0.5, 0.25])]
    run = {"sweep": "quick"}
    records.write(tmp_path / "rows.jsonl", {"b": (run, rows), "a": (run, [])})
    (name, (stored_run, stored)), *_ = reversed(records.read(tmp_path / "rows.jsonl").items())
    assert (name, stored_run) == ("b", run)
    assert stored[0].key == rows[0].key
    assert stored[0].samples == [0.5, 0.25]
    assert stored[0].errors == {"output": [1e-7, None]}


def test_a_file_of_rows_that_is_none_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"table": "quick", "run": {}}\n{"table": "quick", "row": {"batch": 1}}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2, is no row of this version"):
        records.read(path)


# The commit


def test_the_commit_of_a_tree_that_was_carried_without_git(monkeypatch, tmp_path):
    monkeypatch.delenv("ELMAN_COMMIT", raising=False)
    unknown = commit(tmp_path)
    assert unknown["commit"].startswith("unknown")
    assert unknown["dirty"] is None
    (tmp_path / "COMMIT").write_text("abc123\n")
    assert commit(tmp_path) == {"commit": "abc123", "dirty": None}
    monkeypatch.setenv("ELMAN_COMMIT", "def456-dirty")
    assert commit(tmp_path) == {"commit": "def456", "dirty": True}


def test_git_knows_the_commit_better_than_a_file_and_the_variable_best(monkeypatch, tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.delenv("ELMAN_COMMIT", raising=False)
    (tmp_path / "COMMIT").write_text("def456")
    git("init")
    assert commit(tmp_path)["commit"] == "def456", "there is no commit yet"
    git("add", "COMMIT")
    git("commit", "--message", "First")
    found = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", found["commit"])
    assert found["dirty"] is False
    for name in ("results", "elman/tuned"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "measured").touch()
    assert commit(tmp_path)["dirty"] is False, "what was measured is no change of the code"
    (tmp_path / "COMMIT").write_text("changed")
    assert commit(tmp_path)["dirty"] is True
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "COMMIT").write_text("aaa")
    assert commit(tmp_path / "inner") == {"commit": "aaa", "dirty": None}, "not the outer repository's"
    monkeypatch.setenv("ELMAN_COMMIT", "abc123")
    assert commit(tmp_path) == {"commit": "abc123", "dirty": None}


def test_bench_and_tuner_tell_the_same_commit(monkeypatch):
    monkeypatch.setattr("elman.commit.git", lambda *_: subprocess.run(["false"], check=True) and "")
    monkeypatch.setenv("ELMAN_COMMIT", "abc123-dirty")
    record = machine.record(torch.device("cpu"), ROOT)
    assert (record["commit"], record["dirty"]) == ("abc123", True)
    pytest.importorskip("triton")
    from elman import tuning

    assert tuning.provenance()["commit"] == "abc123-dirty"


# The run and its files


def test_the_smallest_sweep_ends_with_a_table_and_files(published):
    folder, printed = published
    names = {path.name for path in folder.iterdir()}
    assert {"machine.json", "rows.jsonl", "smallest.csv", "smallest.md"} <= names
    assert any(name.endswith(".png") for name in names)
    assert not any("partial" in name for name in names)
    assert (folder.parent / "README.md").exists()
    assert re.search(r"\[1/4\] B=1 T=16 I=32 H=32 forward \.\.\. 0:0\d elapsed", printed)
    assert "us a step" in printed
    ((table, (run, rows)),) = records.read(folder / "rows.jsonl").items()
    assert (table, run["partial"]) == ("smallest", "")
    assert run["floor"]["matrix"]["float32"] > 1e9
    assert len(rows) == 2 * 2 * len(SWEEPS["smallest"].contenders)
    assert {row.contender for row in rows if row.status == TIMED} >= {BASELINE, "eager", NAIVE}
    assert all(row.reason for row in rows if row.status != TIMED)


def test_the_smallest_sweep_leaves_the_published_results_as_they_are(published):
    def contents():
        return {path: path.read_bytes() for path in (ROOT / "results").rglob("*") if path.is_file()}

    before = contents()
    done = pytest_bench("--sweep", "smallest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents() == before
    assert "The sweep smallest is never published" in done.stdout
    assert f"writes {session.SCRATCH}/<machine>/ (smallest is never published)" in done.stdout
    (wrote,) = re.findall(r"^Wrote (.*?smallest\.md), ", done.stdout, re.M)
    assert Path(wrote).is_relative_to(session.SCRATCH)
    folder, printed = published
    assert f"writes {folder.parent}/<machine>/; after" in printed  # a --results of its own is its own


def test_the_run_says_first_how_long_it_takes(published):
    _, printed = published
    said = printed.index("elman bench: smallest, 2 shapes on ")
    assert said < printed.index("collected ") < printed.index("[1/4]")
    done = pytest_bench("--collect-only", "-k", "nothing")
    assert "collected " in done.stdout
    assert "elman bench" not in done.stdout


def test_the_files_name_neither_host_nor_path(published):
    folder, _ = published
    for path in [folder.parent / "README.md", *(p for p in folder.iterdir() if p.suffix != ".png")]:
        text = path.read_text(encoding="utf-8")
        for private in (str(ROOT), str(Path.home()), platform.node()):
            assert f"{private}/" not in text
            assert f'"{private}"' not in text


def test_everything_is_rebuilt_from_the_rows(published, tmp_path):
    folder, _ = published
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    command = [sys.executable, "-m", "bench.report", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    for path in [folder.parent / "README.md", *folder.iterdir()]:
        if path.name != "machine.json":
            rebuilt = tmp_path / path.relative_to(folder.parent)
            assert rebuilt.read_bytes() == path.read_bytes(), path.name


NOISY = """
import gc, warnings
import bench.floor
warnings.warn("noise of the import")

def warns(name):
    def hook():
        warnings.warn(f"noise of {name}")
    return hook

for when in ("configure", "report_header", "sessionstart", "collection_modifyitems", "collection_finish",
             "runtest_setup", "runtest_teardown", "sessionfinish", "terminal_summary", "unconfigure"):
    globals()[f"pytest_{when}"] = warns(when)

class Lost:
    def __del__(self):
        raise RuntimeError("nobody catches it")

honest = bench.floor.measure
def measure(*arguments):
    Lost()
    gc.collect()
    warnings.warn("noise of the driver")
    return honest(*arguments)
bench.floor.measure = measure
"""


def test_no_warning_ends_a_run_or_a_row(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    options = ["--shapes", "1,4,2,2", "--passes", "forward", "--backends", "eager"]
    done = pytest_bench(*options, "--results", str(tmp_path), "-p", "noisy", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("runtest_setup", "sessionfinish", "terminal_summary", "the driver"):
        assert f"UserWarning: noise of {name}" in done.stdout, "it is in the report"
    assert "nobody catches it" in done.stdout
    ((_, rows),) = records.read(next(tmp_path.glob("*/rows.jsonl"))).values()
    assert [row.status for row in rows] == [TIMED, TIMED]


def test_the_tests_take_every_warning_for_an_error():
    with pytest.raises(UserWarning, match="noise"):
        warnings.warn("noise", stacklevel=1)


def test_a_killed_run_is_gone_on_with(tmp_path):
    options = ["--shapes", "1,16,8,8;1,17,8,8;2,18,8,8", "--passes", "forward", "--backends", "eager"]
    options += ["--results", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    try:
        while not (
            stored := [p for p in tmp_path.glob("*/*.partial.jsonl") if p.read_text().count('"row"') > 1]
        ):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline, "no cell was stored"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ((run, before),) = records.read(stored[0]).values()
    assert 2 <= len(before) < 6
    done = pytest_bench(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Going on with a run of {run['date']}: {len(before) // 2} of 3 cells are there." in done.stdout
    ((_, after),) = records.read(stored[0].with_name("rows.jsonl")).values()
    assert [row.samples for row in after[: len(before)]] == [row.samples for row in before]
    assert len(after) == 6


KILLED = """
import os, signal
import bench.session

honest = bench.session.measure_cell
def measure_cell(problem, *rest):
    if problem.workload.steps == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(problem, *rest)
bench.session.measure_cell = measure_cell
"""


def test_a_cell_that_kills_its_process_is_left_out_from_the_third_run_on(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    options = ["--shapes", "1,16,8,8;1,17,8,8;2,18,8,8", "--passes", "forward", "--backends", "eager"]
    options += ["--results", str(tmp_path)]
    for died in (1, 2):
        done = pytest_bench(*options, "-p", "killed", PYTHONPATH=str(tmp_path))
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        (notes,) = tmp_path.glob("*/*.partial.begun")
        assert json.loads(notes.read_text()) == {"B1-T17-I8-H8-float32-forward": died}
    done = pytest_bench(*options, "-p", "killed", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Two processes ended while they measured it: " in done.stdout
    ((_, rows),) = records.read(notes.with_name("rows.jsonl")).values()
    assert [row.status for row in rows] == 2 * [TIMED] + 2 * [FAILED] + 2 * [TIMED]
    assert rows[2].reason.startswith("Two processes ended while they measured it: ")
    assert not notes.exists(), "the table is published"
    done = pytest_bench(*options)
    assert done.returncode == 0, "and the next run tries the cell again"


def test_only_a_process_that_dies_leaves_a_note(started, monkeypatch):
    def stop(*arguments):
        assert json.loads(first.notes.read_text()) == {"B2-T5-I3-H4-float32-forward": 1}
        raise KeyboardInterrupt

    first = started()
    with monkeypatch.context() as patch:
        patch.setattr(session, "measure_cell", stop)
        with pytest.raises(KeyboardInterrupt):
            first.row(*first.plan.keys[0])
    assert not first.notes.exists()
    first.row(*first.plan.keys[0])
    assert not first.notes.exists()
    first.died = {"another": 1, "B2-T6-I3-H4-float32-forward": 1}
    first.row(*first.plan.keys[-1])
    assert json.loads(first.notes.read_text()) == first.died == {"another": 1}, "that one is not done yet"


def test_what_a_cell_has_cost_is_remembered_until_the_run_is_another(started, monkeypatch):
    first = started()
    first.row(*first.plan.keys[0])
    name = "B2-T6-I3-H4-float32-forward"
    first.notes.write_text(json.dumps({name: 2, "another": 1}))
    second = started()
    measure_all(second)
    assert [row.status for row in second.ordered()] == 3 * [TIMED] + 3 * [FAILED]
    assert second.missing() == "3 of 6 rows are missing: 3 failed."
    assert json.loads(second.notes.read_text()) == {name: 2, "another": 1}, "the run goes on without it"
    assert started().died == {name: 2, "another": 1}
    assert started(restart=True).died == {}
    assert not first.notes.exists()
    first.notes.write_text(json.dumps({name: 2}))
    monkeypatch.setattr(machine, "source", lambda: "another")
    assert started().died == {}, "other code may do better"
    assert not first.notes.exists()


def test_a_cell_that_costs_the_process_its_gpu_ends_it(started, monkeypatch):
    """As an illegal access does: every later call fails, so the cell counts as one that a process died in."""

    def raises(*arguments):
        raise RuntimeError("an illegal access")

    monkeypatch.setattr(session, "measure_cell", raises)
    monkeypatch.setattr(machine, "lost", lambda device: "an illegal access")
    for died in (1, 2):
        run = started()
        with pytest.raises(pytest.exit.Exception, match="its GPU no more: an illegal access"):
            run.row(*run.plan.keys[0])
        assert json.loads(run.notes.read_text()) == {"B2-T5-I3-H4-float32-forward": died}
    third = started()
    assert third.row(*third.plan.keys[0]).reason.startswith("Two processes ended while they measured it: ")


def test_a_gpu_that_is_lost(monkeypatch):
    def raises(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", raises)
    assert machine.lost(torch.device("cpu")) == ""
    assert "an illegal memory access" in machine.lost(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert machine.lost(torch.device("cuda", 0)) == ""


def test_a_second_run_at_the_same_time_and_rows_that_are_none_are_sentences(tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl = pytest.importorskip("fcntl", reason="no locks of this kind on this system")
        fcntl.flock(held, fcntl.LOCK_EX)
        done = pytest_bench("--sweep", "smallest", "--results", str(tmp_path))
    assert done.returncode == 4
    assert f"Another run writes into {tmp_path}" in done.stdout + done.stderr
    folder = tmp_path / machine.slug(machine.machine(torch.device("cpu")))
    folder.mkdir()
    (folder / "rows.jsonl").write_text("what?\n")
    done = pytest_bench("--sweep", "smallest", "--device", "cpu", "--results", str(tmp_path))
    assert done.returncode == 4
    assert "rows.jsonl, line 1, is no row of this version" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_slower_run_fails_where_it_is_asked_to(published, tmp_path):
    folder, _ = published
    (table, (run, rows)), *_ = records.read(folder / "rows.jsonl").items()
    for row in rows:  # as if eager had taken a third of the time
        if row.contender == "eager" and row.median:
            row.samples = [sample / 3 for sample in row.samples]
            row.median /= 3
    records.write(tmp_path / "rows.jsonl", {table: (run, rows)})
    options = ["--sweep", "smallest", "--results", str(tmp_path / "results"), "--baseline", str(tmp_path)]
    options += ["-k", "B1-T16 and forward"]
    done = pytest_bench(*options, "--fail-slower", "50%")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" not in done.stdout.splitlines()[-1], "the rows themselves are fine"
    done = pytest_bench(*options, "--fail-slower", "1000%")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--fail-slower", "5%"], "--fail-slower needs --baseline, which says slower than what"),
        (["--baseline", "no-such-commit"], "no-such-commit"),
        (["--dtype", "int8"], "--dtype has 'int8'; expected one or several of"),
    ],
)
def test_a_wrong_option_is_a_sentence_and_nothing_runs(options, sentence):
    done = pytest_bench("--sweep", "smallest", *options)
    assert done.returncode == 4
    assert f"ERROR: {sentence}" in done.stderr or sentence in done.stderr
    assert "Traceback" not in done.stderr


SPOILER = """
def pytest_configure():
    from bench.contenders import Contender
    forward = Contender.forward
    def spoiled(self):
        output, h_n = forward(self)
        return (output if 'RNN' == type(self.layer).__name__ else output + 1e-3), h_n
    Contender.forward = spoiled
"""


def test_a_wrong_row_fails_the_run_that_publishes_all_others(tmp_path):
    (tmp_path / "spoiler.py").write_text(SPOILER)
    options = ["--shapes", "1,4,2,2", "--passes", "forward", "--backends", "eager", "-p", "spoiler"]
    done = pytest_bench(*options, "--results", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 rows is missing: 1 wrong. The same command tries these again." in done.stdout
    ((_, rows),) = records.read(next(tmp_path.glob("*/rows.jsonl"))).values()
    assert [row.status for row in rows] == [TIMED, WRONG]


def test_a_partial_or_wrong_run_fails_and_leaves_the_published_table_alone(published, tmp_path):
    folder, _ = published
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "spoiler.py").write_text(SPOILER)
    # nn.RNN is not selected, and measured all the same: without it there is no bar and no speedup.
    options = ["--sweep", "smallest", "--results", str(folder.parent), "-k", "B1-T16 and forward and eager"]
    done = pytest_bench(*options, "-p", "spoiler", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eager: wrong. The error of output against the float64 reference" in done.stdout
    assert "no published table was touched: 2 of 24 rows were run." in done.stdout
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"smallest.partial.jsonl", "smallest.partial.md"}
    ((_, rows),) = records.read(folder / "smallest.partial.jsonl").values()
    assert [(row.contender, row.status) for row in rows] == [(BASELINE, TIMED), ("eager", WRONG)]
    for path in folder.glob("*.partial.*"):
        path.unlink()
