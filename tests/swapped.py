"""Is a model with nn.RNN in it the same model on our layer?  Swap, compile, train, export, and compare.

    torchrun --standalone --nproc-per-node 2 -m tests.swapped [--model package.module:function] [options]

The function takes nothing and returns the model and an example batch, a tuple of tensors. It is called twice
from one seed. The first model stays as it is, the second goes through elman.replace, and torch.compile with
fullgraph=True. Both are trained under DDP, each process on its share of the batch's rows; they learn to
return one half. Then the swapped one is exported, with any number of rows and steps, saved, loaded and run
on another batch.

Compared are every step's loss, the gradients of the first step, the parameters after the last, and what the
export returns with what the original does. An error is relative to the norm (the losses': to the largest).
The bound is that of tests/tolerances.py for one call in the parameters' dtype, times 1 + the number of steps:
each step adds the rounding of one gradient, and a model that learns doesn't enlarge what is there. The exit
status is 1 if an error is beyond it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils import _pytree as pytree

import elman
from tests.distributed_programs import process_group
from tests.helpers import error
from tests.tolerances import TOLERANCES, tolerance

Made = tuple[nn.Module, tuple]
Errors = dict[str, float]
COMPILERS = [os.environ.get("CXX") or "g++", "clang++"]


class Tagger(nn.Module):
    """tokens (B, T) -> scores (B, T, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.rnn = nn.RNN(8, 16, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def tagger() -> Made:
    """What runs if --model names nothing else."""
    return Tagger(), (torch.randint(11, (8, 12)),)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tests.swapped:tagger", help="package.module:function")
    parser.add_argument(
        "--dims",
        nargs="*",
        help="a word for each input, a letter for each dimension: B the rows, another capital a size that "
        "may change, such as T the steps, anything else one that stays; BT for each input if left out",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="of our layers: elman.replace's")
    parser.add_argument(
        "--compile-backend",
        choices=["inductor", "aot_eager", "eager"],
        help="inductor if left out, or aot_eager where there is no C++ compiler",
    )
    parser.add_argument("--tolerance", type=float, help="in place of the bound above")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU for each process"
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds until a process ends itself")
    return parser


def main() -> int:
    options = parser().parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("there is no RANK in the environment; start it with torchrun, as --help shows")
    with process_group(options.device, options.limit) as device:
        return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """The exit status. Rank 0 exports and prints."""
    first = dist.get_rank() == 0
    original, inputs, swapped = make(options.model, options.seed, device)
    dims = options.dims or ["BT"[: x.dim()] for x in inputs]
    check_sizes(inputs, dims)
    replaced = elman.replace(swapped, options.backend)
    if not replaced:
        raise SystemExit(f"{options.model} has no nn.RNN and no nn.RNNCell in it; expected one at least")
    backend = options.compile_backend or default_backend()
    if device.type == "cuda":
        switch_dropout_off([original, swapped], replaced)
    if first:
        print(f"replaced {', '.join(name or 'the model itself' for name in replaced)}; compiled by {backend}")
    # Dropout has torch's masks: inductor would draw its own.
    more: dict = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(swapped, fullgraph=True, backend=backend, **more)
    theirs = train(original, original, inputs, dims, options)
    ours = train(swapped, compiled, inputs, dims, options)
    if not first:
        return 0
    errors = compare(ours, theirs) | compare_export(swapped, original, inputs, dims)
    dtype = max((p.dtype for p in swapped.parameters() if p.dtype in TOLERANCES), key=tolerance)
    bound = tolerance(dtype) * (1 + options.steps) if options.tolerance is None else options.tolerance
    print(f"loss {theirs[0][0]:.6f} at first, {theirs[0][-1]:.6f} at last")
    print(table(errors, bound))
    return 0 if all(e <= bound for e in errors.values()) else 1


def make(name: str, seed: int, device: torch.device) -> tuple[nn.Module, tuple, nn.Module]:
    """The model, the example batch, and the model once more."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise SystemExit(f"--model is {name!r}; expected package.module:function")
    function = getattr(importlib.import_module(module), function)

    def once() -> Made:
        torch.manual_seed(seed)
        model, inputs = function()
        if not isinstance(inputs, tuple) or not all(isinstance(x, Tensor) for x in inputs):
            raise SystemExit(
                f"{name} returned a {type(inputs).__name__} of inputs; expected a tuple of tensors"
            )
        return model.to(device), tuple(x.to(device) for x in inputs)

    (model, inputs), (other, _) = once(), once()
    if not all(map(torch.equal, model.parameters(), other.parameters())):
        raise SystemExit(
            f"{name} made other weights when called again; expected the same from torch's one seed"
        )
    return model, inputs, other


def switch_dropout_off(models: list[nn.Module], names: Iterable[str]) -> None:
    """In these layers of both models, and says so: cuDNN draws masks that nothing else can draw."""
    for name in names:
        layers: list[Any] = [model.get_submodule(name) for model in models]
        if getattr(layers[0], "dropout", 0) and dist.get_rank() == 0:
            print(f"the dropout of {name or 'the model'} is off: cuDNN draws masks of its own")
        for layer in layers:
            layer.dropout = 0.0


def check_sizes(inputs: tuple, dims: list[str]) -> None:
    """Raises SystemExit unless dims names the inputs' dimensions, B among them."""
    too_long = any(len(d) > x.dim() for x, d in zip(inputs, dims, strict=False))
    if len(dims) != len(inputs) or too_long:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise SystemExit(f"--dims is {' '.join(dims)}; expected a word for each input, of shapes {shapes}")
    sizes: dict[str, set[int]] = {"B": set()}
    for x, d in zip(inputs, dims, strict=True):
        for letter, size in zip(d, x.shape, strict=False):
            sizes.setdefault(letter, set()).add(size)
    for letter, found in sizes.items():
        numbers = " and ".join(map(str, sorted(found))) or "in none"
        if letter.isupper() and len(found) != 1:
            raise SystemExit(
                f"--dims is {' '.join(dims)}, and {letter} is {numbers}; expected one size: name sizes that "
                "differ by different letters"
            )
    if min(sizes["B"]) < dist.get_world_size():
        raise SystemExit(f"the batch has {min(sizes['B'])} rows; expected one for each process at least")


def default_backend() -> str:
    """inductor if it can compile here; says so where not."""
    if any(map(shutil.which, COMPILERS)):
        return "inductor"
    if dist.get_rank() == 0:
        print(f"aot_eager in place of inductor: neither of {', '.join(COMPILERS)} is on the PATH")
    return "aot_eager"


def train(
    model: nn.Module, run: nn.Module, inputs: tuple, dims: list[str], options: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The losses' means over the processes (steps,), the first step's gradients, the parameters at the end.

    run: what is trained, the model or what torch.compile made of it.
    """
    parallel = DDP(run)
    optimizer, losses, grads = torch.optim.SGD(model.parameters(), lr=options.lr), [], {}
    for step in range(options.steps):
        optimizer.zero_grad()
        torch.manual_seed(options.seed + step)  # dropout's mask
        loss = loss_of(parallel(*share(inputs, dims, step)))
        loss.backward()
        if step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).double()
    dist.all_reduce(mean)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return mean / dist.get_world_size(), grads, parameters


def share(inputs: tuple, dims: list[str], step: int) -> tuple:
    """This process's rows at this step: of the batch's, in another order each time."""
    B = next(x.shape[d.index("B")] for x, d in zip(inputs, dims, strict=True) if "B" in d)
    rows = torch.arange(B).roll(step).tensor_split(dist.get_world_size())[dist.get_rank()]
    return tuple(take(x, d, "B", rows) for x, d in zip(inputs, dims, strict=True))


def take(x: Tensor, dims: str, letter: str, which: Tensor) -> Tensor:
    """These entries of the dimension of that letter, if x has one."""
    return x.index_select(dims.index(letter), which.to(x.device)) if letter in dims else x


def loss_of(results: Any) -> Tensor:
    """The mean squared distance from one half, added up over the tensors that the model returns."""
    tensors = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise SystemExit("the model returned no floating tensor; expected one at least, to train on")
    return torch.stack([(t.float() - 0.5).square().mean() for t in tensors]).sum()


def compare(ours: tuple, theirs: tuple) -> Errors:
    """The errors of what `train` returns: the losses', the worst gradient's and the worst parameter's."""
    difference = (ours[0] - theirs[0]).abs().max() / theirs[0].abs().max()
    errors = {f"loss, the worst of {len(theirs[0])} steps": difference.item()}
    kinds = zip(("first gradient", "trained parameter"), ours[1:], theirs[1:], strict=True)
    for kind, found, expected in kinds:
        if found.keys() != expected.keys():
            raise SystemExit(f"{kind}: {sorted(found.keys() ^ expected.keys())} has one with one model only")
        each = {name: error(found[name], expected[name]) for name in expected}
        name = max(each, key=lambda name: (each[name] != each[name], each[name]))  # a NaN is the worst
        errors[f"{kind}, the worst of {len(each)}: {name}"] = each[name]
    return errors


def compare_export(ours: nn.Module, theirs: nn.Module, inputs: tuple, dims: list[str]) -> Errors:
    """The errors of what ours, exported in eval mode, returns for a batch with other sizes."""
    program = exported(ours.eval(), inputs, dims)
    other = other_sizes(inputs, dims)
    with torch.no_grad():
        results = [pytree.tree_leaves(run(*other)) for run in (program, theirs.eval())]
    found, expected = ([t for t in leaves if isinstance(t, Tensor)] for leaves in results)
    return {
        f"the export's result {i + 1} of {len(expected)}, {tuple(e.shape)}": error(f, e)
        for i, (f, e) in enumerate(zip(found, expected, strict=True))
    }


def other_sizes(inputs: tuple, dims: list[str]) -> tuple:
    """The batch in reverse, each size that may change by one larger: its last entries come again."""
    found = []
    for x, d in zip(inputs, dims, strict=True):
        for letter, size in zip(d, x.shape, strict=False):
            if letter.isupper():
                x = take(x, d, letter, torch.arange(size + 1).flip(0) % size)
        found.append(x)
    return tuple(found)


def exported(model: nn.Module, inputs: tuple, dims: list[str]) -> nn.Module:
    """The model through torch.export and a file; sizes with a capital letter may change."""
    names = {letter: torch.export.Dim(letter) for letter in set("".join(dims)) if letter.isupper()}
    shapes = tuple({i: names[letter] for i, letter in enumerate(d) if letter in names} for d in dims)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    count = sum(node.target == torch.ops.elman.layer.default for node in program.graph.nodes)
    print(f"exported; calls of elman::layer: {count}; {' and '.join(sorted(names))} may change")
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "model.pt2")
        return torch.export.load(Path(folder) / "model.pt2").module()


def table(errors: Errors, bound: float) -> str:
    width = max(map(len, errors))
    lines = [f"{'error, relative to the norm':{width}}  at most {bound:.1e}"]
    for what, e in errors.items():
        lines.append(f"{what:{width}}  {e:15.1e}{'' if e <= bound else '  too much'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
