"""What PyTorch does with any module, done with ours as with nn.RNN: mixed precision, checkpoints, hooks on
what is saved, modes, optimizers, processes and threads.

What a module is by itself is test_layer.py's matter.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import elman
from elman import eager
from tests.helpers import BACKENDS, DEVICE, check, copy_of, dtype_name
from tests.tolerances import LOSS_CURVE, tolerance

HALVES = [torch.float16, torch.bfloat16]
EACH_HALF = pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
T, B, I, H = 4, 2, 3, 4

# Under the interpreter one kernel stands for all: what is tested here does not depend on which.
RUNNING = [name for name in BACKENDS if DEVICE == "cuda" or name != "triton:resident"]
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(params=[pytest.param(name, marks=MARKS) for name in RUNNING])
def backend(request) -> str:
    """As conftest.py's, but for what is slow."""
    return request.param


@pytest.fixture(params=[pytest.param(n, marks=MARKS) for n in RUNNING if n not in ("cudnn", "auto")])
def own_backend(request) -> str:
    """Those whose backward pass is ours: nn.RNN's operator saves what it pleases."""
    return request.param


def pair(backend: str, **options) -> tuple[elman.Elman, nn.RNN]:
    """Ours on a backend, and an nn.RNN with its weights."""
    ours = elman.Elman(I, H, device=DEVICE, backend=backend, **options)
    return ours, copy_of(ours)


def sequence(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)


def weighed(output: Tensor) -> Tensor:
    """A loss with another gradient for every element."""
    return (output * torch.linspace(-1, 2, output.numel(), device=DEVICE).view_as(output)).sum()


def gradients(layer: nn.RNNBase, call=None, leave=lambda output: None) -> dict[str, Tensor]:
    """The gradients of the input and the parameters; call: what runs the layer, leave: what follows it."""
    layer.zero_grad()
    x = sequence(layer.weight_ih_l0.dtype).requires_grad_()
    output, _ = (call or layer)(x)
    loss = weighed(output)
    leave(output)
    loss.backward()
    return {"input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit, and not nothing."""
    assert all(g.abs().sum() > 0 for g in expected.values())
    assert_close(found, expected, rtol=0, atol=0)


# Mixed precision


def scaled_training(layer: nn.RNNBase, dtype: torch.dtype) -> tuple[list[float], list[dict], list[float]]:
    """Losses, parameters and the scale after each of six steps; the fourth has an infinite input."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, growth_interval=2)
    losses, parameters, scales = [], [], []
    for n in range(6):
        x = sequence()
        if n == 3:
            x[1, 0, 0] = float("inf")
        with torch.autocast(DEVICE, dtype):
            output, h_n = layer(x)
            assert output.dtype == h_n.dtype == dtype
            loss = (output - 0.5).float().square().mean() + h_n.float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
        scaler.unscale_(optimizer)
        clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        parameters.append({name: p.detach().clone() for name, p in layer.named_parameters()})
        scales.append(scaler.get_scale())
    return losses, parameters, scales


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@EACH_HALF
def test_a_scaler_trains_and_skips_a_step_that_overflows(backend, dtype):
    ours, theirs = pair(backend)
    losses, parameters, scales = scaled_training(ours, dtype)
    expected, _, their_scales = scaled_training(theirs, dtype)
    assert_close(losses, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert losses[2] < losses[0]
    assert scales == their_scales == [256, 512, 512, 256, 256, 512]
    assert_close(parameters[3], parameters[2], rtol=0, atol=0)
    assert not torch.equal(parameters[4]["weight_hh_l0"], parameters[3]["weight_hh_l0"])


@EACH_HALF
@pytest.mark.parametrize("weights", [torch.float32, *HALVES], ids=dtype_name)
@pytest.mark.parametrize("given", [torch.float32, *HALVES], ids=dtype_name)
def test_autocast_takes_any_mixture(weights, given, dtype):
    ours, theirs = pair("auto", dtype=weights)
    found = []
    for layer in (ours, theirs):
        x = sequence(given).requires_grad_()
        with torch.autocast(DEVICE, dtype):
            output, h_n = layer(x)
        (output.float().sum() + h_n.float().square().sum()).backward()
        found.append([output, h_n, x.grad, *(p.grad for p in layer.parameters())])
    (mine, expected) = found
    assert [t.dtype for t in mine] == [t.dtype for t in expected]
    eps = max(torch.finfo(d).eps for d in (weights, given, dtype))
    assert_close(mine, expected, rtol=8 * eps, atol=8 * eps)


@EACH_HALF
def test_a_region_without_autocast_is_full_precision(backend, dtype):
    ours, _ = pair(backend, num_layers=2)
    expected = gradients(ours)

    def call(x):
        with torch.autocast(DEVICE, dtype), torch.autocast(DEVICE, enabled=False):
            return ours(x)

    assert_equal(gradients(ours, call), expected)


# What is saved for the backward pass


@BOTH
def test_a_checkpoint_changes_no_bit(own_backend, reentrant):
    ours, _ = pair(own_backend, num_layers=2)
    expected = gradients(ours)
    assert_equal(gradients(ours, partial(checkpoint, ours, use_reentrant=reentrant)), expected)


class Output(nn.Module):
    """A layer's output alone, for nn.Sequential."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@BOTH
def test_checkpoint_sequential(own_backend, reentrant):
    model = nn.Sequential(*(Output(elman.Elman(I, I, device=DEVICE, backend=own_backend)) for _ in range(4)))
    found = []
    for run in (model, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant)):
        model.zero_grad()
        x = sequence().requires_grad_()
        weighed(run(x)).backward()
        found.append({"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("policy", ["MUST_SAVE", "PREFER_RECOMPUTE"])
def test_a_selective_checkpoint_knows_the_operator(policy, monkeypatch):
    ours, _ = pair("eager")
    expected, runs = gradients(ours), []
    real = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *arguments: runs.append(1) or real(*arguments))
    seen = []

    def choose(context, operator, *args, **kwargs):
        seen.append(operator)
        is_ours = operator is torch.ops.elman.layer.default
        return CheckpointPolicy[policy] if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, choose)
    call = partial(checkpoint, ours, use_reentrant=False, context_fn=contexts)
    assert_equal(gradients(ours, call), expected)
    assert torch.ops.elman.layer.default in seen
    assert len(runs) == (1 if policy == "MUST_SAVE" else 2)


def test_backward_reads_what_the_hooks_hand_back(own_backend):
    ours, _ = pair(own_backend, num_layers=2)
    expected, count = gradients(ours), Counter()

    def pack(t):
        count["packed"] += 1
        return t.detach().clone()

    def unpack(t):
        count["unpacked"] += 1
        return t

    def call(x):
        with graph.saved_tensors_hooks(pack, unpack):
            return ours(x)

    def spoil(output):
        output.data.fill_(float("nan"))  # as if its memory were another's by now

    assert_equal(gradients(ours, call, spoil), expected)
    assert count["packed"] == count["unpacked"] > 0


def test_saved_on_the_cpu(own_backend):
    ours, _ = pair(own_backend, num_layers=2)
    expected = gradients(ours)

    def call(x):
        with graph.save_on_cpu(pin_memory=DEVICE == "cuda"):
            return ours(x)

    assert_equal(gradients(ours, call), expected)


def test_hooks_may_be_forbidden(own_backend):
    ours, _ = pair(own_backend)
    expected = gradients(ours)
    with graph.disable_saved_tensors_hooks("no hooks here"):
        assert_equal(gradients(ours), expected)


def test_what_was_saved_may_be_written_over_where_that_is_allowed(own_backend):
    ours, _ = pair(own_backend)
    expected = gradients(ours)
    x = sequence().requires_grad_()
    ours.zero_grad()
    with graph.allow_mutation_on_saved_tensors():
        output, _ = ours(x)
        loss = weighed(output)
        with torch.no_grad():
            output.zero_()
            for p in ours.parameters():
                p.zero_()
        loss.backward()
    found = {"input": x.grad, **{name: p.grad for name, p in ours.named_parameters()}}
    # torch sees each operation there: the products for native's gradients are torch's then, not C's.
    check(found, expected, tolerance(torch.float32))


def test_a_retained_graph_serves_twice_and_no_third_time(own_backend):
    ours, _ = pair(own_backend)
    expected = gradients(ours)
    ours.zero_grad()
    x = sequence().requires_grad_()
    loss = weighed(ours(x)[0])
    leaves = [x, *ours.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for found in (first, second):
        assert_equal(dict(zip(expected, found, strict=True)), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_an_inference_tensor_is_an_input_where_nothing_is_recorded(backend):
    ours, theirs = pair(backend)
    with torch.inference_mode():
        x = sequence() * 1
    assert x.is_inference()
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            layer(x)
    expected = theirs(x.clone())[0].detach()
    with torch.no_grad():
        assert_close(ours(x)[0], expected)
    assert_close(ours.requires_grad_(False)(x)[0], expected)


# Gradients in place


@pytest.mark.parametrize("cls", ["layer", "both directions", "cell"])
def test_no_two_gradients_share_memory(backend, cls):
    """What works on gradients in place must not do it twice, as it did to both biases once."""
    if cls == "cell":
        module = elman.ElmanCell(I, H, device=DEVICE, backend=backend)
        output = module(sequence()[0])
    else:
        module, _ = pair(backend, num_layers=2, bidirectional=cls == "both directions")
        output, _ = module(sequence())
    found = torch.autograd.grad(weighed(output), list(module.parameters()), retain_graph=True)
    weighed(output).backward()
    for gradients in (found, [p.grad for p in module.parameters()]):
        for n, g in enumerate(gradients):
            before = [h.clone() for h in gradients]
            g.add_(1)
            changed = [not torch.equal(h, b) for h, b in zip(gradients, before, strict=True)]
            assert [i for i, c in enumerate(changed) if c] == [n]


def test_gradients_of_several_backward_passes_add_up(backend):
    ours, theirs = pair(backend, num_layers=2, bidirectional=True)
    for layer in (ours, theirs):
        for n in range(3):
            weighed(layer((n + 1) * sequence())[0]).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=name)


def test_the_norm_of_all_gradients_is_clipped(backend):
    ours, theirs = pair(backend, num_layers=2)
    norms = []
    for layer in (ours, theirs):
        gradients(layer)
        norms.append(clip_grad_norm_(layer.parameters(), 0.01, error_if_nonfinite=True))
        clipped = parameters_to_vector([p.grad for p in layer.parameters()]).norm().item()
        assert_close(clipped, 0.01, rtol=1e-3, atol=0)
    assert_close(*norms)


def test_a_scaler_unscales_each_gradient_once(backend):
    """Without autocast, where no cast stands between the weights and the operator."""
    ours, theirs = pair(backend)
    for layer in (ours, theirs):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler.scale(weighed(layer(sequence())[0])).backward()
        scaler.step(optimizer)
    assert_close(ours.state_dict(), theirs.state_dict())


# Modes


def test_anomaly_detection(backend):
    ours, theirs = pair(backend)
    expected = gradients(ours)
    with torch.autograd.set_detect_anomaly(True):
        assert_equal(gradients(ours), expected)
        for layer in (ours, theirs):
            with (
                pytest.warns(UserWarning, match="Error detected in"),
                pytest.raises(RuntimeError, match="returned nan values"),
            ):
                gradients(layer, leave=lambda output: output.register_hook(lambda g: g * float("nan")))


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's products are refused without it
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_all_there_is(own_backend, deterministic):
    ours, _ = pair(own_backend, num_layers=2, bidirectional=True)
    expected = gradients(ours)
    assert_equal(gradients(ours), expected)
    lengths = [4, 2]

    def packed(x):
        batch = nn.utils.rnn.pack_padded_sequence(x, lengths)
        output, h_n = ours(batch)
        return nn.utils.rnn.pad_packed_sequence(output)[0], h_n

    assert_equal(gradients(ours, packed), gradients(ours, packed))


@pytest.mark.filterwarnings("ignore:.*profiler:UserWarning")
def test_a_profile_names_the_operators(own_backend):
    ours, _ = pair(own_backend)
    with torch.profiler.profile() as profile:
        gradients(ours)
    names = [event.key for event in profile.key_averages() if "elman" in event.key]
    assert "elman::layer" in names
    assert any("Backward" in name for name in names)


class Tagged(Tensor):
    """A subclass that only passes its type on."""


class Noting(Tensor):
    """A subclass that notes what it is given to."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
def test_a_subclass_of_tensor_stays_one(own_backend, options):
    ours, theirs = pair(own_backend, **options)
    groups = ours.num_layers * (2 if ours.bidirectional else 1)
    x, hx = sequence(), torch.ones(groups, B, H, device=DEVICE)
    weights = {"weight_hh_l0": ours.weight_hh_l0.detach().as_subclass(Tagged)}
    calls = [
        lambda layer: layer(x.as_subclass(Tagged)),
        lambda layer: layer(x, hx.as_subclass(Tagged)),
        lambda layer: torch.func.functional_call(layer, weights, (x,)),
    ]
    for call in calls:
        mine, expected = call(ours), call(theirs)
        assert [type(t) for t in mine] == [type(t) for t in expected] == [Tagged, Tagged]
        assert_close(mine, expected)
    with torch.no_grad():
        assert [type(t) for t in calls[0](ours)] == [Tagged, Tagged]


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no grad"])
def test_a_subclass_of_tensor_sees_one_call(recorded):
    ours, _ = pair("eager")
    Noting.seen = []
    with torch.set_grad_enabled(recorded):
        ours(sequence().as_subclass(Noting))
    assert len([name for name in Noting.seen if "layer" in name]) == 1
    assert not [name for name in Noting.seen if "tanh" in name]


# Optimizers and what goes over parameters


def train(layer: nn.RNNBase, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (layer(sequence())[0] - 0.3).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


OPTIMIZERS = {
    "foreach": partial(torch.optim.Adam, lr=0.02, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=0.02, fused=True),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.2, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer):
    curves = [train(m, OPTIMIZERS[optimizer](m.parameters()), 8) for m in pair("auto")]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert_close(*curves, rtol=0, atol=LOSS_CURVE)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")  # cuDNN's
def test_parameters_as_one_vector(backend):
    """They become views of it: as an optimizer over one flat vector has them."""
    ours, theirs = pair(backend, num_layers=2, bidirectional=True)
    vector = 2 * parameters_to_vector(theirs.parameters()).detach()
    for layer in (ours, theirs):
        vector_to_parameters(vector, layer.parameters())
    assert ours.weight_hh_l0.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    assert_close(gradients(ours), gradients(theirs))
    vector.zero_()
    assert ours(sequence())[0].abs().sum() == 0


def test_pruned_weights():
    ours, theirs = pair("auto")
    for layer in (ours, theirs):
        prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    x = sequence()
    assert_close(ours(x), theirs(x))
    found, expected = gradients(ours), gradients(theirs)
    assert_close(found, expected)
    assert (found["weight_hh_l0_orig"] == 0).sum() == H * H // 2
    curves = [train(m, torch.optim.SGD(m.parameters(), 0.1), 5) for m in (ours, theirs)]
    assert_close(*curves, rtol=0, atol=LOSS_CURVE)
    prune.remove(ours, "weight_hh_l0")
    assert (ours.weight_hh_l0 == 0).sum() == H * H // 2
    assert_close(ours(x), theirs(x))


def test_averaged_weights():
    averages = []
    for layer in pair("auto"):
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        for _ in range(3):
            train(layer, optimizer, 1)
            average.update_parameters(layer)
        averages.append(average(sequence()))
        assert not torch.equal(averages[-1][0], layer(sequence())[0])
    assert_close(*averages)


def test_a_replica_s_weights_are_plain_tensors(backend):
    """As nn.DataParallel makes them, which here has no devices."""
    ours, _ = pair(backend, num_layers=2)
    expected = gradients(ours)

    def call(x):
        replica = ours._replicate_for_data_parallel()
        for name, parameter in ours.named_parameters():
            setattr(replica, name, parameter * 1)
        assert not [*replica.parameters()]
        return replica(x)

    assert_equal(gradients(ours, call), expected)


# Processes and threads


def train_in_place(layer: nn.RNNBase, steps: int) -> None:
    """SGD on weights that others train at the same time: no version of them is looked at."""
    for _ in range(steps):
        loss = (layer(sequence())[0] - 0.3).square().mean()
        for p, g in zip(layer.parameters(), torch.autograd.grad(loss, [*layer.parameters()]), strict=True):
            p.data.sub_(0.05 * g)


def loss_of(layer: nn.RNNBase) -> float:
    return (layer(sequence())[0] - 0.3).square().mean().item()


@pytest.mark.skipif(DEVICE == "cuda", reason="memory of a GPU is shared by other means")
def test_processes_train_one_layer_in_shared_memory():
    ours, _ = pair("eager")
    ours.share_memory()
    assert ours.weight_hh_l0.is_shared()
    before = loss_of(ours)
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    processes = [context.Process(target=train_in_place, args=(ours, 20), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert loss_of(ours) < 0.8 * before


def test_threads_train_one_layer():
    ours, _ = pair("auto")
    before = loss_of(ours)
    threads = [threading.Thread(target=train_in_place, args=(ours, 20)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert loss_of(ours) < 0.7 * before
