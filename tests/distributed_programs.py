"""Training on 2 processes beside one process with nn.RNN: what test_distributed.py starts and reads.

    torchrun --standalone --nproc-per-node 2 -m tests.distributed_programs FOLDER [--device cuda]

Every process has the same global batches, trains on its own rows of them, and compares with what one process
makes of all rows, on an nn.RNN with the same weights. For each check rank 0 prints one line, {"check": name,
"errors": {what: error, the worst rank's, as helpers.error}, "facts": {...}}. FOLDER gets a checkpoint that
both processes wrote, checkpoint/, and what is in it, expected.pt.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.rnn import pack_sequence

from elman import Elman, ElmanCell, replace
from tests.helpers import error

#: Seconds until a process ends itself, whatever it does or waits for.
LIMIT = 180
STEPS = 4
T, B, I, H, O = 7, 6, 3, 5, 2
LENGTHS = (3, 7, 1, 5, 4, 2)

Found = dict[str, Tensor]


@contextmanager
def process_group(device: str, limit: float = LIMIT) -> Iterator[torch.device]:
    """This process in its group, nccl for "cuda" and gloo for "cpu"; yields its device. limit: seconds."""
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=limit))
    here = torch.device("cpu")
    if device == "cuda":
        here = torch.device("cuda", dist.get_rank())
        torch.cuda.set_device(here)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield here
    gc.collect()  # DDP may be left in a cycle and hold the group: see bench.charlm.process_group
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


class Tagger(nn.Module):
    """Two layers, D directions, and a head for every step; x (T, B, I) -> y (T * B, O)."""

    D, H = 2, H

    def __init__(self, kind: type[nn.RNNBase] = Elman) -> None:
        super().__init__()
        self.rnn = kind(I, self.H, num_layers=2, bidirectional=self.D == 2)
        self.head = nn.Linear(self.D * self.H, O)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].flatten(0, 1))


class Wide(Tagger):
    """One whose second layer has more than a MiB of parameters: DDP's first bucket is full after it.

    One direction: PyTorch doesn't count the parameters that a graph stacks first.
    """

    D, H = 1, 512


class Packed(nn.Module):
    """A batch of lengths of its own; a PackedSequence -> y (N, O)."""

    def __init__(self, kind: type[nn.RNNBase] = Elman) -> None:
        super().__init__()
        self.rnn = kind(I, H, bidirectional=True)
        self.head = nn.Linear(2 * H, O)

    def forward(self, packed: Any) -> Tensor:
        return self.head(self.rnn(packed)[0].data)


class Steps(nn.Module):
    """A cell, step by step; x (T, B, I) -> y (B, O)."""

    def __init__(self, kind: type[nn.Module] = ElmanCell) -> None:
        super().__init__()
        self.cell = kind(I, H)
        self.head = nn.Linear(H, O)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for step in x.unbind(0):
            h = self.cell(step, h)
        return self.head(h)


def padded(step: int, rows: slice, device: torch.device) -> Tensor:
    """Rows of the step's global batch, (T, B, I)."""
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(step))[:, rows].to(device)


def packed(step: int, rows: slice, device: torch.device) -> Any:
    x = padded(step, rows, device)
    return pack_sequence([x[:n, b] for b, n in enumerate(LENGTHS[rows])], enforce_sorted=False)


ALL, HALVES = slice(0, B), (slice(0, B // 2), slice(B // 2, B))


def train(
    model: nn.Module, batch: Callable, parts: Sequence[slice], share: int, forward: Callable | None = None
) -> Found:
    """Gradients of the first step and parameters after the last, by name.

    The loss is the squares' sum over the rows in `parts`, over the number of all rows' elements, times
    `share`: as many as the processes whose gradients are averaged. forward: in place of the model's own.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run, found = model if forward is None else forward, {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in parts:
            y = run(batch(step, part, device))
            loss = share * (y.float() - 0.5).square().sum() / (T * B * O)
            loss.backward()
        if step == 0:
            found = {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    return found | {f"trained {name}": whole(p) for name, p in model.named_parameters()}


def mine() -> tuple[list[slice], int]:
    """This process's part of the rows, and its share of the loss, for `train`."""
    return [HALVES[dist.get_rank()]], dist.get_world_size()


def whole(tensor: Tensor | None) -> Tensor:
    """A copy, gathered from all processes where each has a shard."""
    assert tensor is not None, "a parameter got no gradient"
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def pair(kind: type[nn.Module], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model on our layer, and on nn.RNN or nn.RNNCell with the same weights."""
    torch.manual_seed(0)
    ours, theirs = kind(), kind(nn.RNNCell if kind is Steps else nn.RNN)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def worst(found: Found, truth: Found) -> dict[str, float]:
    """The error of each tensor, the largest of all processes' (NaN counts as the largest)."""
    assert found.keys() == truth.keys()
    mine = torch.tensor([error(found[name].cpu(), truth[name].cpu()) for name in truth], dtype=torch.float64)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine.nan_to_num(torch.inf))
    return dict(zip(truth, torch.stack(everyone).amax(0).tolist(), strict=True))


def trained_by_ddp(
    kind: type[nn.Module], batch: Callable, device: torch.device, wrap: Callable[[nn.Module], nn.Module] = DDP
) -> dict[str, float]:
    ours, theirs = pair(kind, device)
    truth = train(theirs, batch, [ALL], 1)
    parallel = wrap(ours)
    return worst(train(ours, batch, *mine(), parallel), truth)


CHECKS: dict[str, Callable[[torch.device, Path], dict]] = {}


def check(function: Callable[[torch.device, Path], dict]) -> Callable:
    """Registers a check: device, folder -> what the line says besides its name."""
    CHECKS[function.__name__] = function
    return function


@check
def ddp_layer(device: torch.device, folder: Path) -> dict:
    return {"errors": trained_by_ddp(Tagger, padded, device)}


@check
def ddp_packed(device: torch.device, folder: Path) -> dict:
    return {"errors": trained_by_ddp(Packed, packed, device)}


@check
def ddp_cell(device: torch.device, folder: Path) -> dict:
    return {"errors": trained_by_ddp(Steps, padded, device)}


@check
def ddp_gradients_in_buckets(device: torch.device, folder: Path) -> dict:
    def wrap(model: nn.Module) -> nn.Module:
        return DDP(model, gradient_as_bucket_view=True)

    return {"errors": trained_by_ddp(Tagger, padded, device, wrap)}


@check
def ddp_swapped(device: torch.device, folder: Path) -> dict:
    """A model on nn.RNN that is in DDP already when its layer is replaced."""
    (_, theirs), (_, model) = pair(Tagger, device), pair(Tagger, device)
    truth = train(theirs, padded, [ALL], 1)
    parallel = DDP(model)
    assert list(replace(parallel)) == ["module.rnn"]
    return {"errors": worst(train(model, padded, *mine(), parallel), truth)}


def counting(graphs: list) -> Callable:
    """aot_eager as a compiler's backend, which adds to the list what it compiles."""

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    return backend


@check
def ddp_compiled(device: torch.device, folder: Path) -> dict:
    """The DDP model compiled; PyTorch cuts its graph where a bucket is full."""
    graphs: list = []

    def wrap(model: nn.Module) -> nn.Module:
        # Not fullgraph: DDP's own forward is never part of a graph.
        return torch.compile(DDP(model), backend=counting(graphs))

    return {"errors": trained_by_ddp(Wide, padded, device, wrap), "facts": {"graphs": len(graphs)}}


@check
def ddp_of_compiled(device: torch.device, folder: Path) -> dict:
    """A model compiled whole, in DDP."""
    graphs: list = []

    def wrap(model: nn.Module) -> nn.Module:
        return DDP(torch.compile(model, fullgraph=True, backend=counting(graphs)))

    return {"errors": trained_by_ddp(Tagger, padded, device, wrap), "facts": {"graphs": len(graphs)}}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """The layer and the rest as two groups of FSDP2's, each gathered when it runs."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def local_rows(model: nn.Module) -> list[int]:
    """How many of weight_hh_l0's H rows each process holds."""
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, len(model.rnn.weight_hh_l0.to_local()))
    return rows


@check
def fsdp(device: torch.device, folder: Path) -> dict:
    """Trained in shards, and the checkpoint of it."""
    ours, theirs = pair(Tagger, device)
    truth = train(theirs, padded, [ALL], 1)
    shard(ours)
    found = train(ours, padded, *mine())
    dcp.save({"model": get_model_state_dict(ours)}, checkpoint_id=folder / "checkpoint")
    if dist.get_rank() == 0:
        torch.save({k: v.cpu() for k, v in theirs.state_dict().items()}, folder / "expected.pt")
    return {"errors": worst(found, truth), "facts": {"rows": local_rows(ours)}}


@check
def fsdp_of_nn_rnn(device: torch.device, folder: Path) -> dict:
    """The same of nn.RNN: what ours is measured by."""
    _, theirs = pair(Tagger, device)
    _, alone = pair(Tagger, device)
    truth = train(alone, padded, [ALL], 1)
    shard(theirs)
    found = train(theirs, padded, *mine())
    return {"errors": worst(found, truth), "facts": {"rows": local_rows(theirs)}}


@check
def fsdp_in_bfloat16(device: torch.device, folder: Path) -> dict:
    """Weights gathered and used in bfloat16, gradients averaged in float32; alone, both halves one by one."""
    ours, _ = pair(Tagger, device)
    alone, _ = pair(Tagger, device)

    def low(x: Tensor) -> Tensor:
        weights = {name: p.to(torch.bfloat16) for name, p in alone.named_parameters()}
        return functional_call(alone, weights, x.to(torch.bfloat16))

    truth = train(alone, padded, HALVES, 1, low)
    shard(ours, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen: list = []
    hook = ours.rnn.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    found = train(ours, padded, *mine())
    hook.remove()
    facts = {"rows": local_rows(ours), "dtypes": sorted({str(dtype) for dtype in seen})}
    return {"errors": worst(found, truth), "facts": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("error")
    # Dynamo looks at an attribute of every tensor, and hides the warning about it only from the screen.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    # nn.RNN on CUDA, when FSDP2 has gathered its weights.
    warnings.filterwarnings("ignore", "RNN module weights are not part of single", UserWarning)
    with process_group(options.device) as device:
        for name, function in CHECKS.items():
            line = {"check": name} | function(device, options.folder)
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
    # DTensor's caches hold FSDP's group beyond its end, so Python's own end could be an abort; all is said.
    os._exit(0)


if __name__ == "__main__":
    main()
