"""bench/floor.py, its probes, and what bench/machine.py asks nvidia-smi."""

import importlib.util
import itertools
import json
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import floor, loops, machine
from bench.contenders import Problem, build
from bench.workloads import PASSES, SWEEPS, Workload
from elman import compiled, products
from tests.helpers import DEVICE, compiling, error
from tests.machines import simulate_gpu
from tests.tolerances import tolerance

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")

PLAIN = Workload(2, 3, 5, 4)  # B, T, I, H
FORMS = {
    "plain": PLAIN,
    "stacked both ways": replace(PLAIN, layers=2, bidirectional=True),
    "cell": replace(PLAIN, steps=1, cell=True),
}
#: Of a machine that moves 1 kB/s and multiplies 1 kflop/s, with caches of 1000 and 2000 bytes.
SLOW = {
    "bandwidth": [[1000, 4000.0], [2000, 2000.0], [4000, 1000.0], [8000, 1000.0]],
    "matrix": {"float32": 1000.0, "bfloat16": 4000.0},
    "step": {"call": 0.25},
}
#: Of two cores that move anything at once. W_hh of 4 x 4 float32 is 64 bytes.
LOOP = {
    "read": {"1": [[64, 32.0], [256, 16.0]], "2": [[64, 64.0], [256, 16.0]]},
    "multiply_add": {"1": [100.0], "2": [200.0]},
    "tanh": {"1": [40.0], "2": [80.0]},
    "core_to_core": [0.5],
}
LOOPS = {
    "bandwidth": [[1, 1e30]],
    "matrix": {"float32": 1000.0, "bfloat16": 1000.0, "float64": 500.0},
    "step": {"loop": LOOP},
}
GPU = {
    "bandwidth": [[1 << 20, 1e12], [1 << 30, 3e12]],
    "matrix": {"bfloat16": 6e14, "float32": 1e14},
    "step": {
        "launch": 1.5e-6,
        "chain": 0.2e-6,
        "meeting": {"32": 0.9e-6, "64": 1.0e-6, "132": 1.1e-6},
        "on_chip": 480_000,
    },
}


# What a pass is: by hand


@pytest.mark.parametrize(
    ("form", "flops", "forward", "backward", "training"),
    [
        # Elements: x 30, W 36, biases 8, h0 8, output 24, h_n 8; then g's 32, x 30, h0 8, W 36, output 24,
        # and dx 30, dh0 8, dW 36, biases 8.
        ("plain", 2 * 6 * 4 * 9, 114, 212, 114 + 212),
        # W of each direction 36 and 48, biases 32, states 32, output of a layer 48: once more if it is kept.
        ("stacked both ways", 2 * 6 * 2 * (36 + 48), 342, 668, 342 + 48 + 668),
        # x 10, W 36, biases 8, h 8, h' 8; then g 8, x 10, h 8, W 36, h' 8, and dx 10, dh 8, dW 36, biases 8.
        ("cell", 2 * 2 * 4 * 9, 70, 132, 70 + 132),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("float32", 4), ("tf32", 4), ("bfloat16", 2)])
def test_operations_and_bytes(form, flops, forward, backward, training, dtype, size):
    workload = replace(FORMS[form], dtype=dtype)
    assert [floor.flops(workload, p) for p in PASSES] == [flops, 2 * flops, 3 * flops]
    moved = [floor.bytes_moved(workload, p) for p in PASSES]
    assert moved == [size * elements for elements in (forward, backward, training)]


def test_steps_overlap_across_layers_and_directions():
    workload = Workload(2, 10, 5, 4)
    for change, expected in [
        ({}, 10),
        ({"layers": 3}, 12),
        ({"bidirectional": True}, 10),
        ({"packed": True}, 10),
    ]:
        counted = [floor.steps(replace(workload, **change), p) for p in PASSES]
        assert counted == [expected, expected, 2 * expected]


def test_a_packed_batch_counts_the_steps_that_there_are():
    full = Workload(8, 668, 5, 4)
    packed = replace(full, packed=True)
    missing = full.row_steps - packed.row_steps
    assert missing > 0
    assert floor.flops(full, "backward") - floor.flops(packed, "backward") == 2 * missing * 2 * 4 * 9
    for pass_name, sequences in {"forward": 5 + 4, "backward": 2 * 5 + 2 * 4}.items():
        fewer = floor.bytes_moved(full, pass_name) - floor.bytes_moved(packed, pass_name)
        assert fewer == 4 * missing * sequences


def test_another_pass_or_dtype_is_refused():
    with pytest.raises(
        ValueError, match="pass_name is 'sideways'; expected one of forward, backward, training"
    ):
        floor.flops(PLAIN, "sideways")
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float32, tf32"):
        floor.bytes_moved(replace(PLAIN, dtype="int8"), "forward")
    with pytest.raises(ValueError, match="no rate of float16 products, only of float32, bfloat16"):
        floor.of(replace(PLAIN, dtype="float16"), "forward", SLOW)


# The floor: the largest of three


@pytest.mark.parametrize(
    ("change", "seconds", "bound"),
    [
        # 456 bytes at 4000 a second: 0.11 s. 432 operations at 1000: 0.43. 3 calls of 0.25 s: 0.75.
        ({}, 0.75, "step"),
        # As many steps, 21,600 operations.
        ({"batch": 100}, 21.6, "matrix"),
        # 4 times the rate, and 2 * (1500 + 36 + 8 + 400 + 1200 + 400) = 7088 bytes at 1000 a second.
        ({"batch": 100, "dtype": "bfloat16"}, 7.088, "memory"),
    ],
)
def test_the_largest_is_the_bound(change, seconds, bound):
    found = floor.of(replace(PLAIN, **change), "forward", SLOW)
    assert found == floor.Floor(pytest.approx(seconds), bound)


@pytest.mark.parametrize(
    ("moved", "rate"),
    [(1, 5.0), (1000, 5.0), (1999, 5.0), (2000, 3.0), (4000, 3.0), (7999, 3.0), (8000, 2.0), (9000, 2.0)],
)
def test_bandwidth_is_the_best_that_the_bytes_may_get(moved, rate):
    """A size that is measured as slower than a larger one gets what that got; between two, the smaller's."""
    assert loops.read_rate(moved, [[1000, 5.0], [2000, 1.0], [4000, 3.0], [8000, 2.0]]) == rate


def test_training_is_both_passes_each_with_its_own_bandwidth():
    """Not the sum of the bytes with the bandwidth of so many: 456 and 848 bytes fit where 1304 do not."""
    rates = {**SLOW, "bandwidth": [[500, 100.0], [1000, 10.0], [2000, 1.0]]}
    expected = 456 / 100 + 848 / 100
    assert floor.of(PLAIN, "training", rates) == floor.Floor(pytest.approx(expected), "memory")


@pytest.mark.parametrize(
    ("H", "dtype", "step"),
    [
        (64, "bfloat16", 0.2e-6),
        (489, "bfloat16", 0.2e-6),  # 478,242 bytes
        (490, "bfloat16", 0.9e-6),  # 480,200
        (346, "float32", 0.2e-6),  # 478,864
        (347, "float32", 0.9e-6),
        (2560, "bfloat16", 0.9e-6),  # 13 MB, and 32 programs have 15
        (3000, "bfloat16", 1.0e-6),
        (5000, "bfloat16", 1.1e-6),
        (6000, "bfloat16", 1.5e-6),  # 72 MB, and all have 63: a launch each
    ],
)
def test_the_shortest_step_that_has_room_for_the_weight(H, dtype, step):
    """With so few rows that nothing else counts."""
    rates = {**GPU, "bandwidth": [[1, 1e30]], "matrix": dict.fromkeys(GPU["matrix"], 1e30)}
    workload = Workload(1, 100, H, H, dtype=dtype)
    assert floor.of(workload, "forward", rates) == floor.Floor(pytest.approx(100 * step), "step")
    assert floor.of(workload, "training", rates).seconds == pytest.approx(200 * step)
    stacked = replace(workload, layers=4, bidirectional=True)
    assert floor.of(stacked, "backward", rates).seconds == pytest.approx(103 * step)


@pytest.mark.parametrize("H", [64, 1024])
def test_a_single_step_is_a_launch_a_pass(H):
    for workload in (Workload(1, 1, H, H, "bfloat16", cell=True), Workload(1, 1, H, H, "bfloat16")):
        rates = {**GPU, "bandwidth": [[1, 1e30]]}
        assert floor.of(workload, "forward", rates) == floor.Floor(1.5e-6, "step")
        assert floor.of(workload, "training", rates) == floor.Floor(3.0e-6, "step")
    two = Workload(1, 2, 64, 64, "bfloat16")
    assert floor.of(two, "forward", rates).seconds == 1.5e-6  # more than two steps on the chip


def test_without_meetings_a_step_of_several_is_a_launch():
    rates = {**GPU, "step": {**GPU["step"], "meeting": {}}}
    assert floor.of(Workload(1, 100, 1024, 1024, "bfloat16"), "forward", rates).seconds == pytest.approx(
        150e-6
    )


# The loop in C, of T = 10 steps with I = H = 4: all by hand

SMALL_LOOP = Workload(1, 10, 4, 4)
ROWS_40 = replace(SMALL_LOOP, batch=40)


@pytest.mark.parametrize(
    ("workload", "pass_name", "seconds", "bound"),
    [
        # One core: 64 bytes at 32 a second, 16 multiply-adds at 100 in less, tanh of 4 at 40: 2.1 s a step,
        # 21 in all. Both: 64 bytes at 64 a second, 4 at 80 and half a second from core to core: 1.55 s. The
        # input's products are 320 operations, 0.32 s.
        (SMALL_LOOP, "forward", 15.5 + 0.32, "step"),
        # 1.5 s, and 2 * 640 - 320 operations.
        (SMALL_LOOP, "backward", 15.0 + 0.96, "step"),
        (SMALL_LOOP, "training", 15.5 + 0.32 + 15.0 + 0.96, "step"),
        (replace(SMALL_LOOP, nonlinearity="relu"), "forward", 15.0 + 0.32, "step"),
        # A core has 20 rows: 320 multiply-adds in 3.2 s, tanh of 80 in 2 s: 5.2 s a step without waiting for
        # the other one. The products: 12,800 operations.
        (ROWS_40, "forward", 52 + 12.8, "step"),
        # 3.2 s a step, and 38,400 operations.
        (ROWS_40, "backward", 32 + 38.4, "matrix"),
        (replace(ROWS_40, nonlinearity="relu"), "forward", 32 + 12.8, "step"),
        # Two directions: a core each, 2.1 s a step, and then twice the products.
        (replace(SMALL_LOOP, bidirectional=True), "forward", 21 + 0.64, "step"),
        # Half the numbers in a vector, tanh at 40. W_hh of 128 bytes is read at 64, as one of 64 bytes.
        (replace(SMALL_LOOP, dtype="float64"), "forward", 10 * (2 + 4 / 40 + 0.5) + 320 / 500, "step"),
        # One core: 32 bytes at 32 a second, tanh at 80. The other one has time for the products.
        (replace(SMALL_LOOP, dtype="bfloat16"), "forward", 10 * (1 + 4 / 80), "step"),
    ],
)
def test_a_loop_on_a_cpu(workload, pass_name, seconds, bound):
    assert floor.of(workload, pass_name, LOOPS) == floor.Floor(pytest.approx(seconds), bound)


def test_a_loop_on_one_core_waits_for_no_other():
    one = {key: value and {"1": value["1"]} for key, value in {**LOOP, "core_to_core": None}.items()}
    rates = {**LOOPS, "step": {"loop": one}}
    # One core does the products too.
    assert floor.of(SMALL_LOOP, "forward", rates).seconds == pytest.approx(21 + 0.32)
    # Of two that can't be compared, one has the row, and the other the products meanwhile.
    rates = {**LOOPS, "step": {"loop": {**LOOP, "core_to_core": None}}}
    assert floor.of(SMALL_LOOP, "forward", rates).seconds == pytest.approx(21)
    # Products that take longer than that are done by both: 21 s of one core, half a second of both.
    wide = replace(SMALL_LOOP, input_size=400)
    assert floor.of(wide, "forward", rates).seconds == pytest.approx(21 / 2 + 32)


def test_a_core_that_was_slowed_down_is_as_fast_as_each_of_several():
    slowed = {**LOOP, "multiply_add": {"1": [1.0], "2": [200.0]}, "tanh": {"1": [4.0], "2": [80.0]}}
    slowed["read"] = {"1": [[64, 0.1], [256, 0.1]], "2": LOOP["read"]["2"]}
    rates = {**LOOPS, "step": {"loop": slowed}}
    assert floor.of(ROWS_40, "forward", rates) == floor.of(ROWS_40, "forward", LOOPS)


def test_a_loop_does_the_steps_that_packed_rows_have():
    packed = replace(SMALL_LOOP, batch=8, packed=True)
    rates = {**LOOPS, "step": {"loop": {**LOOP, "read": {"1": [[1, 1e30]], "2": [[1, 1e30]]}}}}
    assert packed.lengths == (10, 4, 3, 2, 1, 1, 1, 1)
    # Rows of each step: 8, 4, 3, 2 and six times 1. Each core has half of them, or one more: 4 + 2 + 2 + 1
    # + 6 are 15 of 0.16 + 0.1 s. That is longer than both cores' 23 / 2 of these and 23 * 32 operations.
    assert floor.of(packed, "forward", rates).seconds == pytest.approx(15 * 0.26)
    # With 128 operations more a row it is not: 23 * 160.
    wide = replace(packed, input_size=20)
    assert floor.of(wide, "forward", rates).seconds == pytest.approx(11.5 * 0.26 + 23 * 0.16)


@pytest.mark.parametrize("rates", [SLOW, LOOPS, GPU], ids=["calls", "loop", "gpu"])
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("size", ["batch", "steps", "input_size", "hidden_size", "layers"])
def test_more_work_has_no_lower_floor(rates, pass_name, size):
    for start in (Workload(1, 1, 8, 8, "bfloat16"), Workload(64, 50, 300, 3000, "bfloat16")):
        grown = [replace(start, **{size: getattr(start, size) * 2**n}) for n in range(8)]
        found = [floor.of(workload, pass_name, rates).seconds for workload in grown]
        assert found == sorted(found)
    assert found[-1] > found[0]


def test_every_row_of_every_sweep_has_a_floor():
    rates = {**GPU, "matrix": dict.fromkeys(("float32", "tf32", "float16", "bfloat16"), 1e14)}
    for sweep in SWEEPS.values():
        for workload in sweep.workloads:
            for dtype in sweep.gpu_dtypes:
                assert floor.of(replace(workload, dtype=dtype), "training", rates).seconds > 1e-7


# Measuring


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_cpu_is_measured():
    sizes = (1 << 16, 1 << 18, 1 << 22)
    found = floor.measure(CPU, ["float32", "bfloat16"], seconds=0.01, sizes=sizes[::-1], sides=(32, 64))
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["bandwidth", "matrix", "step"]
    assert [size for size, _ in found["bandwidth"]] == list(sizes)
    assert all(1e7 < rate < 1e13 for _, rate in found["bandwidth"])
    assert list(found["matrix"]) == ["float32", "bfloat16"]
    assert all(1e6 < rate < 1e14 for rate in found["matrix"].values())
    assert list(found["step"]) == ["loop"]
    assert floor.of(PLAIN, "training", found).seconds > 0


NEEDS_C = pytest.mark.skipif(compiled.unavailable() is not None, reason="needs a C compiler")


@NEEDS_C
def test_the_rates_of_a_loop_are_measured():
    sizes = (1 << 14, 1 << 16)
    found = loops.measure(2, seconds=0.005, sizes=sizes[::-1])
    assert json.loads(json.dumps(found)) == found
    assert [[size for size, *_ in rows] for rows in found["read"].values()] == [list(sizes)] * 2
    rates = [rate for rows in found["read"].values() for _, *rate in rows]
    rates += [*found["multiply_add"].values(), *found["tanh"].values()]
    assert all(1e8 < best < 1e13 for best, *_ in rates)
    assert all(best >= high >= median >= low for best, median, low, high in rates)
    for name in ("read", "multiply_add", "tanh"):
        assert list(found[name]) == ["1", "2"]
    # A CPU reads about as many vectors as it multiplies and adds; tanh takes ten times as long.
    one = {name: found[name]["1"][0] for name in ("multiply_add", "tanh")}
    numbers = found["read"]["1"][0][1] / 4
    assert one["multiply_add"] / 3 < numbers < one["multiply_add"] * 5
    assert one["tanh"] < one["multiply_add"] / 3
    if found["core_to_core"]:
        best, median, low, high = found["core_to_core"]
        assert 5e-9 < best <= low <= median <= high


@NEEDS_C
def test_a_loop_alone_is_measured_without_another_core():
    found = loops.measure(1, seconds=0.001, sizes=(1 << 14,))
    assert list(found["read"]) == list(found["tanh"]) == ["1"]
    assert found["core_to_core"] is None


@NEEDS_C
def test_no_product_is_faster_than_multiply_adds():
    """Rates that count too little would make floors that something can beat."""
    found = loops.measure(torch.get_num_threads(), seconds=0.05, sizes=(1 << 14,))
    matrix = floor._matrix(CPU, ["float32"], (256, 512), 0.05)["float32"]
    threads = torch.get_num_threads()
    most = max(found["multiply_add"][str(threads)][0], threads * found["multiply_add"]["1"][0])
    assert matrix < 1.1 * 2 * most


@NEEDS_C
def test_a_thread_whose_partner_does_not_come_gives_up():
    start = time.perf_counter()
    with loops.ThreadPoolExecutor(1) as pool:  # one after the other
        assert loops._core_to_core(pool, 0.0) is None
        both = loops.Loop(loops.READ, torch.rand(1 << 14), 1 << 12, 2, pool)
        assert both(10) > 0
    assert 0.1 < time.perf_counter() - start < 20


@NEEDS_C
def test_native_does_not_beat_the_floor():
    workload = Workload(1, 128, 128, 128)
    contender = build("native", Problem(workload, CPU))
    contender.forward()
    for _ in range(3):  # other programs may have slowed the probes, and then not the layer
        best = min(floor.wall_seconds(contender.forward) for _ in range(20))
        if floor.of(workload, "forward", floor.measure(CPU, ["float32"], sizes=(1 << 16,))).seconds < best:
            return
    pytest.fail("native is faster than its floor")


def test_without_a_compiler_a_step_is_a_torch_call(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled.forget()
    try:
        found = floor.measure(CPU, ["float32"], seconds=0.001, sizes=(1 << 16,), sides=(32,))
    finally:
        compiled.forget()
    assert list(found["step"]) == ["call", "no_loop"]
    assert 1e-8 < found["step"]["call"] < 1e-3
    assert "CC is 'no-such-compiler', which is no program" in found["step"]["no_loop"]
    assert floor.of(PLAIN, "training", found).seconds > 0


@NEEDS_C
def test_a_library_is_made_anew_when_what_its_source_includes_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path))
    source, included = tmp_path / "one.c", tmp_path / "other.c"
    source.write_text('#include "other.c"\nint own(void) { return number; }\n')
    try:
        for number in (1, 2, 1):
            included.write_text(f"enum {{ number = {number} }};\n")
            compiled.forget()
            assert compiled.library(source=source).own() == number
    finally:
        compiled.forget()
    assert len(list((tmp_path / "native").glob("*.so"))) == 2


@pytest.mark.usefixtures("two_threads")
def test_a_cpu_works_with_all_threads_and_with_one():
    seen = []
    floor._shortest(lambda: seen.append(torch.get_num_threads()), CPU, 0.0)
    assert set(seen[4:]) == {1, 2}  # after those that show how long a call takes


@pytest.mark.parametrize("before", [False, True])
def test_products_are_of_their_own_arithmetic(before, monkeypatch):
    """TF32's switch is on for tf32 alone, whatever it was, and is as it was afterwards."""
    seen, mm = [], torch.mm

    def spy(a, b, out):
        seen.append((torch.backends.cuda.matmul.allow_tf32, a.dtype))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    outside = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before
    floor._matrix(CPU, ["tf32", "float32", "float64"], (4,), 0.0)
    after, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, outside
    assert after is before
    assert list(dict.fromkeys(seen)) == [
        (True, torch.float32),
        (False, torch.float32),
        (False, torch.float64),
    ]


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN operators")
@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_a_cpus_rate_is_that_of_the_quicker_library(seconds, monkeypatch):
    taken = list(seconds)

    def shortest(way, device, span):
        way()
        return taken.pop(0)

    monkeypatch.setattr(floor, "_shortest", shortest)
    assert floor._matrix(CPU, ["float32"], (4,), 0.0) == {"float32": 2 * 4**3 / 1.0}
    assert not taken


@pytest.mark.parametrize(("own", "expected"), [(10.0, 60.0), (90.0, 90.0)])
def test_16_bits_are_at_least_as_fast_as_float32_on_a_cpu(own, expected, monkeypatch):
    rates = {"float32": 60.0, "bfloat16": own, "float16": own}
    monkeypatch.setattr(floor, "_flops_a_second", lambda device, dtype, sides, seconds: rates[dtype])
    both = floor._matrix(CPU, ["bfloat16", "float32"], (4,), 0.0)
    assert both == {"bfloat16": expected, "float32": 60.0}
    assert floor._matrix(CPU, ["float16"], (4,), 0.0) == {"float16": expected}


@pytest.mark.parametrize(("tf32", "float32"), [(300.0, 100.0), (90.0, 60.0)])
def test_float32_is_at_least_a_third_of_tf32(tf32, float32, monkeypatch):
    """That is how the kernels make it where the chip has tensor cores, also in a run without tf32 rows."""
    rates = {"tf32": tf32, "float32": 60.0, "bfloat16": 600.0}
    monkeypatch.setattr(floor, "_flops_a_second", lambda device, dtype, sides, seconds: rates[dtype])
    for dtypes in (["float32", "bfloat16"], ["tf32", "float32"]):
        expected = {dtype: float32 if dtype == "float32" else rates[dtype] for dtype in dtypes}
        assert floor._matrix(CUDA, dtypes, (4,), 0.0) == expected
    assert floor._matrix(CUDA, ["bfloat16"], (4,), 0.0) == {"bfloat16": 600.0}


def test_products_grow_while_there_is_time(monkeypatch):
    sides = []

    def product(call, device, seconds):
        side = call.__defaults__[0].shape[0]
        sides.append(side)
        return side**3 * 1e-9

    monkeypatch.setattr(floor, "_shortest", product)
    assert floor._flops_a_second(CPU, "float64", (64, 32, 16), 1e-4) == pytest.approx(2e9)
    assert sides == [16, 32]  # 64 would take 262 microseconds


@pytest.fixture
def gpu_clock(monkeypatch):
    """A GPU's clock: what a launch says that it takes."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(floor.timing, "clock", lambda launch: launch())


def test_a_launch_drops_out_of_the_slope(gpu_clock):
    """Nor does it matter that the first one compiles, and that others are disturbed."""
    disturbed = {100: iter((1e6, 0.0, 9.0, 9.0, 9.0, 50.0)), 1100: iter((1e6, 9.0, 9.0, 0.0, 9.0, 900.0))}

    def probe(steps):
        return lambda: 20.0 + 0.5 * steps + next(disturbed[steps])

    assert floor._slope(probe, (100, 1100), 0.0) == pytest.approx(0.5e-6)


def test_a_slope_that_is_noise_is_refused(gpu_clock):
    with pytest.raises(RuntimeError, match=r"1100 steps of function took .* the GPU is busy"):
        floor._slope(lambda steps: lambda: 20.0, (100, 1100), 0.0)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("processors", "counts"),
    [(132, [2, 4, 8, 16, 32, 64, 132]), (64, [2, 4, 8, 16, 32, 64]), (24, [2, 4, 8, 16, 24])],
)
def test_a_gpu_is_measured_by_the_cheaper_meeting(processors, counts, monkeypatch):
    from bench import probes

    simulate_gpu(monkeypatch, processors=processors)
    checked = []

    class Meeting:
        def __init__(self, device, programs, flag):
            self.seconds = (1.0 if flag else 2.0) if programs == counts[-1] else (4.0 if flag else 3.0)
            self.ways = programs, flag

        def check(self):
            checked.append(self.ways)

    monkeypatch.setattr(probes, "Meeting", Meeting)
    chains = {(1, False): 0.7, (1, True): 0.6, (2, False): 0.9, (2, True): 0.8}
    monkeypatch.setattr(probes, "Chain", lambda device, *kind: SimpleNamespace(seconds=chains[kind]))
    monkeypatch.setattr(floor, "_slope", lambda probe, lengths, seconds: probe.seconds)
    monkeypatch.setattr(floor, "_shortest", lambda call, device, seconds: 7.0 * (call is probes.empty))
    meeting = {str(programs): 1.0 if programs == counts[-1] else 3.0 for programs in counts}
    on_chip = 232448 + 4 * 65536
    expected = {"launch": 7.0, "chain": 0.6, "meeting": meeting, "on_chip": on_chip}
    assert floor._cuda_step(CUDA, 0.0) == expected
    assert checked == [(programs, flag) for programs in counts for flag in (True, False)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_this_gpu_is_measured():
    found = floor.measure(CUDA, ["bfloat16", "float32"], seconds=0.02, sizes=(1 << 20, 1 << 26))
    assert json.loads(json.dumps(found)) == found
    assert all(1e10 < rate < 1e14 for _, rate in found["bandwidth"])
    assert all(1e11 < rate < 1e16 for rate in found["matrix"].values())
    step = found["step"]
    assert 1e-7 < step["launch"] < 2e-5
    assert 2e-8 < step["chain"] < 2e-6
    assert all(step["chain"] < meeting < 2e-5 for meeting in step["meeting"].values())
    assert floor.of(Workload(16, 100, 256, 256, "bfloat16"), "forward", found).bound == "step"


# The probes, interpreted and compiled


@NEEDS_TRITON
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("relu", [False, True], ids=["tanh", "relu"])
def test_the_chain_is_a_recurrence(warps, relu):
    from bench import probes

    chain = probes.Chain(torch.device(DEVICE), warps, relu)
    h, w = chain.state.double(), chain.weight.double()
    assert len(h) == 16 * warps
    for _ in range(3):
        h = (w @ h).relu() if relu else (w @ h).tanh()
    chain(3)()
    assert error(chain.state, h) <= tolerance(torch.bfloat16)
    assert chain.state.std() > 0.1


@NEEDS_TRITON
@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter runs one program of a launch")
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "counter"])
def test_who_is_alone_meets_nobody_and_who_waits_in_vain_gives_up(flag):
    from bench import probes
    from elman.kernels.errors import DeviceHangError

    alone = probes.Meeting(CPU, 1, flag)
    alone(5)()
    alone.check()
    deserted = probes.Meeting(CPU, 2, flag)
    deserted.patience = 3
    deserted(5)()  # the interpreter runs the first of two
    with pytest.raises(DeviceHangError, match=r"2 programs that do nothing but meet .* after 3 looks"):
        deserted.check()


@NEEDS_TRITON
@pytest.mark.skipif(DEVICE != "cpu", reason="on tensors of the CPU")
@pytest.mark.parametrize(("flag", "count"), [(True, 0), (False, 5)], ids=["flag", "counter"])
def test_a_meeting_says_so_at_every_step(flag, count):
    from bench import probes

    slots = torch.full((5, 1), -1, dtype=torch.int32)
    counted, status = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    arguments = slots.view(torch.float32), counted, status, 5, 10
    probes.meeting_kernel[(1,)](*arguments, PROGRAMS=1, BLOCK=1, FLAG=flag, INTERPRET=True)
    assert slots.flatten().tolist() == [0 if flag else -1] * 5
    assert counted.tolist() == [count, 0]
    assert status.tolist() == [0, 0]


def compiled_for(target: str) -> list[dict]:
    """What the probes take when compiled for a GPU that is not here; not under the interpreter."""
    from unittest import mock

    import triton
    from triton.runtime.jit import JITFunction

    from bench import probes
    from bench.precompile import Driver
    from tests import assembly
    from tests.cross_compile import TARGETS

    made, run = [], JITFunction.run

    def compile_only(kernel, *arguments, **options):
        kernel.device_caches.clear()  # of another target
        made.append(run(kernel, *arguments, **{**options, "warmup": True}))

    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    with mock.patch.object(JITFunction, "run", compile_only):
        probes.empty()
        for warps, relu in itertools.product((1, 2), (False, True)):
            probes.Chain(CPU, warps, relu)(5)()
        for flag in (True, False):
            probes.Meeting(CPU, 132, flag)(5)()
    return [
        {
            "target": kernel.metadata.target.arch,
            "together": kernel.metadata.launch_cooperative_grid,
            "shared": kernel.metadata.shared,
            **assembly.resources(kernel),
            **assembly.count(assembly.instructions(kernel)),
        }
        for kernel in made
    ]


@NEEDS_TRITON
def test_the_probes_compile_for_gpus(tmp_path):
    """Without spills: the chain on tensor cores with its barriers, the meetings to be launched together."""
    code = (
        "import json; from tests.test_floor import compiled_for; "
        "print(json.dumps([compiled_for(target) for target in ('sm_80', 'sm_90')]))"
    )
    done = compiling("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for arch, kernels in zip((80, 90), json.loads(done.stdout), strict=True):
        for kernel in kernels:
            assert kernel["target"] == arch
            assert kernel["spills"] == 0
            assert kernel["registers"] <= 64
            assert kernel["shared"] <= 4096
        empty, *chains, flag, _ = kernels
        assert empty["instructions"] <= 8
        assert all(chain["tensor"] >= 1 for chain in chains)
        assert [chain["barriers"] >= 2 for chain in chains] == [False, False, True, True], (
            "one warp needs none"
        )
        assert flag["barriers"] == 0
        together = [kernel["together"] for kernel in kernels]
        assert together == [False] * 5 + [True] * 2


# nvidia-smi

UUID = "GPU-0a1b2c3d-1111-2222-3333-444455556666"
OTHER = "GPU-99999999-1111-2222-3333-444455556666"
ANSWERS = {
    "uuid": UUID,
    "pci.bus_id": "00000000:1B:00.0",
    "clocks.sm": "1980",
    "clocks.mem": "2619",
    "temperature.gpu": "61",
    "power.draw": "402.57",
    "clocks_event_reasons.active": "0x0000000000000004",
    "clocks_throttle_reasons.active": "0x0000000000000004",
    "driver_version": "580.65.06",
    "clocks.max.sm": "1980",
    "clocks.max.mem": "2619",
    "clocks.applications.graphics": "[Requested functionality has been deprecated]",
    "clocks.applications.memory": "[N/A]",
}
STATE = {
    "sm_mhz": 1980,
    "memory_mhz": 2619,
    "temperature_c": 61,
    "power_w": 402.57,
    "throttle": ["power cap"],
    "idle": False,
}


@pytest.fixture
def smi(monkeypatch):
    """An nvidia-smi of one GPU, whose answers may be changed; a field without one is not known to it."""
    simulate_gpu(monkeypatch)
    gpu = torch.cuda.get_device_properties(CUDA)
    gpu.uuid, gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id = UUID[4:], 0, 0x1B, 0
    answers = dict(ANSWERS)
    answers["asked"] = 0

    def run(command, **options):
        assert options["timeout"] <= 10
        assert command[0] == "nvidia-smi"
        assert command[2] == "--format=csv,noheader,nounits"
        answers["asked"] += 1
        for field in command[1].removeprefix("--query-gpu=").split(","):
            if field not in answers:
                said = f'Field "{field}" is not a valid field to query.\n\n'
                return subprocess.CompletedProcess(command, 2, said, "")
        line = ", ".join(answers[f] for f in command[1].removeprefix("--query-gpu=").split(","))
        return subprocess.CompletedProcess(command, 0, line + "\n", "")

    monkeypatch.setattr(machine.subprocess, "run", run)
    return answers


def test_chip_state_of_a_gpu(smi):
    assert machine.chip_state(CUDA) == STATE
    assert smi["asked"] == 1
    assert json.loads(json.dumps(STATE)) == STATE


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", None])
def test_a_driver_that_knows_one_name_of_a_field(known, smi):
    for name in machine.STATE_FIELDS["throttle"]:
        if name != known:
            del smi[name]
    expected = dict(STATE)
    if known is None:
        del expected["throttle"], expected["idle"]
        expected["unknown"] = "nvidia-smi does not say: throttle"
    assert machine.chip_state(CUDA) == expected


def test_what_nvidia_smi_does_not_know_is_left_out(smi):
    smi["power.draw"], smi["temperature.gpu"] = "[N/A]", "[GPU requires reset]"
    found = machine.chip_state(CUDA)
    assert (
        found.pop("unknown") == "nvidia-smi does not say: temperature_c [GPU requires reset], power_w [N/A]"
    )
    assert found == {k: v for k, v in STATE.items() if k not in ("temperature_c", "power_w")}


@pytest.mark.parametrize(
    ("mask", "words", "idle"),
    [
        ("0x0000000000000000", [], False),
        ("0x0000000000000001", [], True),
        ("0x0000000000000024", ["power cap", "software thermal slowdown"], False),
        ("0x00000000000000C9", ["hardware slowdown", "hardware thermal slowdown", "power brake"], True),
        ("0x0000000000000112", ["application clocks", "sync boost", "display clocks"], False),
        ("0x0000000000001004", ["power cap", "reason 0x1000"], False),
    ],
)
def test_reasons_for_a_lower_clock_are_words(mask, words, idle):
    assert machine.reasons(mask) == {"throttle": words, "idle": idle}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (FileNotFoundError(2, "No such file or directory"), "nvidia-smi does not run here: No such file"),
        (PermissionError(13, "Permission denied"), "nvidia-smi does not run here: Permission denied"),
        (subprocess.TimeoutExpired("nvidia-smi", 10), "nvidia-smi said nothing within 10 seconds"),
        (
            (9, "NVIDIA-SMI has failed because it couldn't\ncommunicate."),
            "has failed because it couldn't comm",
        ),
        ((0, ""), "nvidia-smi lists 0 GPUs, and this one is not among them"),
        ((255, ""), "nvidia-smi answered: 255"),
    ],
)
def test_no_nvidia_smi_to_ask(said, message, smi, monkeypatch):
    def run(command, **options):
        if isinstance(said, Exception):
            raise said
        return subprocess.CompletedProcess(command, said[0], said[1], "")

    monkeypatch.setattr(machine.subprocess, "run", run)
    found = machine.chip_state(CUDA)
    assert list(found) == ["unknown"]
    assert message in found["unknown"]
    described = machine.machine(CUDA)
    assert described["driver"].startswith("unknown (nvidia-smi")
    assert described["clocks_mhz"] == {}


def test_a_cpu_and_an_amd_gpu_are_not_asked(smi, monkeypatch):
    assert machine.chip_state(CPU) == {}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.chip_state(CUDA) == {"unknown": "nvidia-smi knows no AMD GPUs"}
    assert smi["asked"] == 0


def test_the_right_one_of_several_gpus():
    """By UUID or by its place on the bus, in any case of letters; a MIG slice has a UUID of its own."""
    text = f"{OTHER}, 00000000:1A:00.0, 345\n{UUID}, 00000000:1B:00.0, 1980\n"
    for names in [(UUID.lower(),), ("gpu-of-a-slice", "00000000:1b:00.0")]:
        assert machine.parse_nvidia_smi(text, ["sm_mhz"], ["sm_mhz"], names) == {"sm_mhz": "1980"}
    found = machine.parse_nvidia_smi(text, ["sm_mhz"], ["sm_mhz"], ("gpu-of-a-slice",))
    assert found == {"unknown": "nvidia-smi lists 2 GPUs, and this one is not among them"}
    only = text.splitlines()[0]
    assert machine.parse_nvidia_smi(only, ["sm_mhz"], ["sm_mhz"], ()) == {"sm_mhz": "345"}


def test_a_torch_that_tells_no_bus_id(smi, monkeypatch):
    gpu = torch.cuda.get_device_properties(CUDA)
    assert machine.identity(CUDA) == (UUID.lower(), "00000000:1b:00.0")
    for name in ("pci_bus_id", "uuid"):
        delattr(gpu, name)
    assert machine.identity(CUDA) == ()


def test_the_machine_says_its_driver_and_clocks(smi):
    described = machine.machine(CUDA)
    assert described["driver"] == "580.65.06"
    assert described["clocks_mhz"] == {"sm_max": 1980, "memory_max": 2619}
    smi["clocks.applications.graphics"] = "1410"
    assert machine.machine(CUDA)["clocks_mhz"]["sm_application"] == 1410
    assert "driver" not in machine.machine(CPU)
