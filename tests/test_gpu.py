"""What only a GPU can show: programs that are on the chip together, CUDA graphs, streams, the same bits run
after run.

The other tests run on the GPU too where there is one. Under compute-sanitizer: `python -m tests.sanitize`.
"""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import elman
from elman import reference
from tests.helpers import check, dtype_name, error, make, run
from tests.tolerances import tolerance

pytest.importorskip("triton")

from elman.kernels import common, configs, cooperative, resident, step
from tests.scans import clean, problem, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULES = {"step": step, "resident": resident, "cooperative": cooperative}
KERNELS = pytest.mark.parametrize("kernel", MODULES)
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)


def candidates(kernel, B, H, D, dtype, backward):
    found = configs.candidates(
        kernel,
        configs.Problem(B, H, D, dtype, "ieee", backward),
        common.chip(torch.device("cuda", torch.cuda.current_device())),
    )
    return [config for config, _ in found]


@HALF_AND_SINGLE
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("H", [64, 130, 264, 512, 1024, 2048])
@KERNELS
def test_every_candidate_agrees_with_the_reference(kernel, H, ragged, dtype):
    """Each pass with each config that a tuner would try, on the device."""
    z, h0, w_hh, lengths, g_out, g_hn = problem(20, 9, H, 2, dtype, ragged)
    forward, backward = (candidates(kernel, 9, H, 2, dtype, b) for b in (False, True))
    if kernel == "resident" and H * H * dtype.itemsize > 230_000:  # W_hh alone fills the chip
        assert not forward
        return
    assert forward
    assert backward
    expected, _ = truth(clean(z, lengths), h0, w_hh, lengths, "tanh")
    for config in forward:
        output = MODULES[kernel].scan(z.clone(), h0, w_hh, lengths, "tanh", "ieee", config)
        assert error(output, expected) <= tolerance(dtype), config
    g = clean(g_out, lengths).double()
    expected = reference.layer_dz(g, g_hn.double(), output.double(), w_hh.double(), lengths, "tanh")
    for config in backward:
        dz = torch.full_like(output, float("nan"))
        MODULES[kernel].scan_backward(g_out, g_hn, output, w_hh, dz, lengths, "tanh", "ieee", config)
        assert error(dz, expected) <= tolerance(dtype), config


@HALF_AND_SINGLE
@KERNELS
def test_the_same_bits_a_hundred_times(kernel, dtype):
    z, h0, w_hh, lengths, g_out, g_hn = problem(
        50, 17, 256 if dtype == torch.bfloat16 else 128, 2, dtype, True
    )

    def run():
        output = MODULES[kernel].scan(z.clone(), h0, w_hh, lengths, "tanh", "ieee")
        dz = torch.empty_like(output)
        MODULES[kernel].scan_backward(g_out, g_hn, output, w_hh, dz, lengths, "tanh", "ieee")
        return output, dz

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@HALF_AND_SINGLE
def test_all_kernels_in_one_cuda_graph(dtype):
    """The scans of all three and a cell, captured together and replayed on other numbers."""
    T, B, H = 12, 5, 64
    z, h0, w_hh, _, g_out, g_hn = problem(T, B, H, 1, dtype, False)
    x, w_ih = torch.randn(B, H, device="cuda", dtype=dtype), torch.randn(H, H, device="cuda", dtype=dtype) / 8

    def run():
        results = []
        for module in MODULES.values():
            output = module.scan(z.clone(), h0, w_hh, None, "tanh", "ieee")
            dz = torch.empty_like(output)
            module.scan_backward(g_out, g_hn, output, w_hh, dz, None, "tanh", "ieee")
            results += [output, dz]
        cell = torch.empty_like(x)
        step.cell(x, h0[0], w_ih, w_hh[0], None, cell, "tanh", "ieee")
        return [*results, cell]

    run()  # compiles, which a capture can't
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in (z, x, h0):
        tensor.normal_()
    graph.replay()
    for replayed, expected in zip(captured, run(), strict=True):
        assert torch.equal(replayed, expected)
    expected, _ = truth(z, h0, w_hh, None, "tanh")
    for output in captured[:6:2]:
        assert error(output, expected) <= tolerance(dtype)


@pytest.mark.parametrize("flag", [True, False], ids=["flag", "counter"])
def test_a_million_meetings(flag):
    """The soak: 10^6 steps in launches of 10^5, the last state of one the first of the next."""
    H, B, T = 512, 4, 100_000
    torch.manual_seed(0)
    w_hh = torch.randn(1, H, H, device="cuda", dtype=torch.bfloat16) / H**0.5
    config = next(c for c in candidates("cooperative", B, H, 1, torch.bfloat16, False) if flag == c.FLAG)
    ends = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(1)
        h = torch.zeros(1, B, H, device="cuda", dtype=torch.bfloat16)
        for _ in range(10):
            z = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16, generator=generator)
            output = cooperative.scan(z, h, w_hh, None, "tanh", "ieee", config)
            assert output.isfinite().all()
            h = output[-1:].clone()
        ends.append(h)
    assert torch.equal(*ends)


@pytest.mark.parametrize("flag", [True, False], ids=["flag", "counter"])
def test_two_launches_that_fill_the_chip_on_two_streams(flag):
    """Programs that wait for one another, of two launches without room beside each other: no deadlock."""
    H, B, T = 2048, 16, 2000
    found = [c for c in candidates("cooperative", B, H, 1, torch.bfloat16, False) if flag == c.FLAG]
    config = min(found, key=lambda config: config.BLOCK_N)  # the most programs
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert 2 * (H // config.BLOCK_N) > processors
    w_hh = torch.randn(1, H, H, device="cuda", dtype=torch.bfloat16) / H**0.5
    h0 = torch.zeros(1, B, H, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [cooperative.scan(z.clone(), h0, w_hh, None, "tanh", "ieee", config) for z in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(5):
        for stream, z, own in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                own.append(cooperative.scan(z.clone(), h0, w_hh, None, "tanh", "ieee", config))
    torch.cuda.synchronize()
    cooperative.check(torch.device("cuda", torch.cuda.current_device()))
    for own, output in zip(found, expected, strict=True):
        for again in own:
            assert torch.equal(again, output)


@KERNELS
def test_more_elements_than_an_int32_counts(kernel):
    """T * B * H = 2^31 + 2^22, the last steps against a scan that starts from the state before them."""
    T, B, H = 2049, 2**14, 64
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    z = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16)
    w_hh = torch.randn(1, H, H, device="cuda", dtype=torch.bfloat16) / H**0.5
    last = z[-8:].clone()
    output = MODULES[kernel].scan(z, torch.zeros_like(z[:1]), w_hh, None, "tanh", "ieee")
    expected = MODULES[kernel].scan(last, output[-9:-8].clone(), w_hh, None, "tanh", "ieee")
    assert torch.equal(output[-8:], expected)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@KERNELS
def test_float32_in_tensor_cores_is_as_exact_as_it_says(kernel, precision):
    """tf32x3 is of the IEEE class: within the tolerance of float32; tf32 alone is not."""
    z, h0, w_hh, _, _, _ = problem(20, 9, 128, 1, torch.float32, False)
    output = MODULES[kernel].scan(z.clone(), h0, w_hh, None, "tanh", precision)
    expected, _ = truth(z, h0, w_hh, None, "tanh")
    if precision == "tf32":
        assert tolerance(torch.float32) < error(output, expected) < 2e-3
    else:
        assert error(output, expected) <= tolerance(torch.float32)


@HALF_AND_SINGLE
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("H", [40, 300])
def test_a_model_on_the_cooperative_kernel(H, ragged, dtype):
    """Output, h_n and every gradient, two layers, both directions: the others are in test_agreement.py."""
    p = make(T=7, B=5, I=12, H=H, dtype=dtype, layers=2, directions=2, ragged=ragged)
    check(run("triton:cooperative", p), run("reference", p.double()), tolerance(dtype))


# A model in graphs, streams, threads and on several GPUs

EACH_BACKEND = pytest.mark.parametrize("backend", ["eager", *(f"triton:{kernel}" for kernel in MODULES)])
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
equal = partial(assert_close, rtol=0, atol=0)


def model(backend, device="cuda", seed=0):
    torch.manual_seed(seed)
    return elman.Elman(24, 64, num_layers=2, bidirectional=True, device=device, backend=backend)


def batches(n, T=12, B=5):
    generator = torch.Generator("cuda").manual_seed(3)
    return [torch.randn(T, B, 24, device="cuda", generator=generator) for _ in range(n)]


def loss_of(results):
    output, h_n = results
    return (output - 0.5).square().mean() + h_n.square().mean()


def gradients(layer, x):
    """The gradients of the input and of every parameter, in memory of their own."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_of(layer(x)), [x, *layer.parameters()])


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")  # and is called too
@EACH_BACKEND
def test_a_whole_training_step_in_one_cuda_graph(backend):
    """Forward, loss, backward and the optimizer: replayed, they are to the bit what calls do."""

    def make_step():
        layer = model(backend)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, capturable=True)

        def step(x):
            optimizer.zero_grad()
            loss = loss_of(layer(x))
            loss.backward()
            optimizer.step()
            return loss

        return layer, step

    (captured, captured_step), (called, step) = make_step(), make_step()
    first, *others = batches(5)
    x = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and fills what the optimizer keeps, which a capture can't
        for _ in range(2):
            captured_step(x)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(2):
        step(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured_step(x)
    for batch in others:
        x.copy_(batch)
        graph.replay()
        equal(loss, step(batch))
    equal([*captured.parameters()], [*called.parameters()])
    assert not torch.equal(captured.weight_hh_l0, model(backend).weight_hh_l0)


@EACH_BACKEND
def test_a_graphed_callable(backend):
    layer = model(backend)
    sample, *others = batches(3)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (sample.requires_grad_(),))
    for batch in others:
        equal(gradients(graphed, batch), gradients(layer, batch))


@EACH_BACKEND
def test_a_stream_of_its_own(backend):
    """What is late there is waited for, and what is late elsewhere is not read."""
    layer, (source,) = model(backend), batches(1)
    expected = gradients(layer, source)
    x = torch.full_like(source, float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tensor in (x, source):
            tensor.record_stream(side)
        x.copy_(source)  # a launch on another stream would have read NaN by now
        found = gradients(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    for gradient in found:
        gradient.record_stream(torch.cuda.current_stream())
    equal(found, expected)


@EACH_BACKEND
def test_two_threads_on_two_streams(backend):
    layers, (x,) = [model(backend, seed=n) for n in range(2)], batches(1, T=100)
    expected = [gradients(layer, x) for layer in layers]
    torch.cuda.synchronize()
    found = {0: [], 1: []}

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found[n].append(gradients(layers[n], x))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for n, runs in found.items():
        assert len(runs) == 10, "the thread raised or hangs"
        for found_then in runs:
            equal(found_then, expected[n])


@TWO_GPUS
@EACH_BACKEND
def test_a_layer_on_a_device_that_is_not_the_current_one(backend):
    (x,) = batches(1)
    expected = gradients(model(backend), x)
    layer = model(backend, device="cuda:1")
    layer.load_state_dict(model(backend).state_dict())
    found = gradients(layer, x.to("cuda:1"))
    assert {g.device for g in found} == {torch.device("cuda", 1)}
    assert torch.cuda.current_device() == 0
    assert_close([g.to("cuda:0") for g in found], list(expected))


@TWO_GPUS
@EACH_BACKEND
def test_data_parallel(backend):
    layer, (x,) = model(backend), batches(1)
    expected = gradients(layer, x)
    parallel = nn.DataParallel(layer, device_ids=[0, 1], dim=1)
    assert_close(gradients(parallel, x), expected)
