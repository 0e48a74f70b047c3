"""python -m elman doctor | explain | tune: what runs here, where a call would go and why, tuned tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import __version__, compiled, routing

if TYPE_CHECKING:
    from .kernels.configs import Problem

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in routing.DTYPES}

#: What `tune` tunes by itself, the most wanted first: the sizes of the benchmark's sweeps.
TUNED_H = (64, 128, 256, 512, 1024, 264, 2048, 384, 768, 336, 224, 1760, 2560, 320)
TUNED_B = (16, 1, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 where what was asked for can't run here."""
    parser = argparse.ArgumentParser(prog="python -m elman", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, what can run and why not, where caches are")
    explain = commands.add_parser("explain", help="the backend and kernel that a call would take, and why")
    for size in ("batch", "seq", "input", "hidden"):
        explain.add_argument(f"--{size}", type=int, required=True, metavar=size[0].upper())
    explain.add_argument("--dtype", choices=DTYPES, default="float32")
    explain.add_argument("--device", help="a torch device; default: the GPU if there is one, else the CPU")
    explain.add_argument("--lengths", action="store_true", help="rows have lengths of their own")
    explain.add_argument("--resets", action="store_true", help="rows begin anew on the way")
    explain.add_argument("--backend", choices=routing.NAMES, default="auto")
    tuner = commands.add_parser("tune", help="times the kernels' configs on this GPU and keeps the quickest")
    sizes = [", ".join(map(str, some)) for some in (TUNED_B, TUNED_H)]
    tuner.add_argument(
        "--shapes",
        type=_shapes,
        metavar='"B,H;..."',
        help=f"default: each B of {sizes[0]} with each H of {sizes[1]}, forward and backward, for every "
        "kernel that can run it, step last. B is rounded up to a power of two, at least 8. A step's time "
        "holds for every T. A call of another size takes what is nearest: H within an eighth, B within a "
        "factor of two",
    )
    tuner.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["bfloat16", "float32"],
        help="default: bfloat16 float32; float32 is tuned in IEEE's arithmetic and in TF32",
    )
    tuner.add_argument("--directions", type=int, choices=(1, 2), nargs="+", default=[1], help="default: 1")
    tuner.add_argument("--budget", type=float, metavar="MINUTES", help="stop then; the same command goes on")
    tuner.add_argument("--device", default="cuda", help="a CUDA device; default: the current one")
    tuner.add_argument("--output", type=Path, metavar="FILE", help="the table; default: the user's own")
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        print(doctor())
        return 0
    try:
        if arguments.command == "tune":
            return tune(arguments)
        route = routing.explain(
            batch=arguments.batch,
            seq=arguments.seq,
            input=arguments.input,
            hidden=arguments.hidden,
            dtype=DTYPES[arguments.dtype],
            device=arguments.device,
            lengths=arguments.lengths,
            resets=arguments.resets,
            backend=arguments.backend,
        )
    except (OSError, RuntimeError, ValueError) as error:  # no such device, a size below 1, a broken table
        print(error)
        return 1
    print(route)
    return 0


def doctor() -> str:
    """What a report of a problem should hold: versions, devices, backends, caches."""
    lines = [f"elman {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in ("torch", "triton", "numpy"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    lines.append(f"cuDNN {torch.backends.cudnn.version() or 'is not in this torch'}")
    lines += ["", "Devices"]
    lines.append(f"  cpu: {os.cpu_count()} processors, {torch.get_num_threads()} threads in torch")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"  cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
            f"multiprocessors, {p.total_memory / 2**30:.0f} GiB, "
            f"float32 products in RNNs: {routing.float32_precision(torch.device('cuda', i))}"
        )
    if not torch.cuda.device_count():
        lines.append("  no CUDA device")
    lines += ["", "Backends"]
    for backend, available in routing.available_backends().items():
        lines.append(f"  {backend}: {'runs' if available is True else f'no: {available}'}")
    variables = ("ELMAN_BACKEND", "ELMAN_KERNELS", "ELMAN_AUTOTUNE", "ELMAN_CACHE_DIR", "TRITON_INTERPRET")
    for variable in variables:
        lines.append(f"  {variable} is {os.environ.get(variable, 'not set')}")
    cache = os.environ.get("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))
    lines += ["", "Caches", f"  compiled Triton kernels: {cache}"]
    folder = compiled.cache_folder() or "nowhere, as this user has no home"
    lines += [f"  the compiled C loop of native: {folder}", *_tables()]
    return "\n".join(lines)


def _tables() -> list[str]:
    """Where the tuned tables of this machine's GPUs are, and how many entries they have."""
    if routing.NO_KERNELS:
        return ["  tuned tables: they can't be read without the kernels, see above"]
    from . import tables  # these import kernels, which importing elman must not

    gpus = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    if not gpus:
        folders = (tables.user_path("gpu").parent, tables.shipped_path("gpu").parent)
        return [f"  tuned tables: for GPUs, in {folders[0]}, then {folders[1]}"]
    lines = []
    for gpu in gpus:
        for kind, path in (("yours", tables.user_path(gpu)), ("shipped", tables.shipped_path(gpu))):
            try:
                found = tables.read(path, gpu)
                count = f"{len(found.entries)} entries" if path.exists() else "there is none"
                lines.append(f"  tuned table, {kind}: {path}: {count}")
                lines += [f"    {sentence}" for sentence in found.refused]
            except (OSError, ValueError) as error:
                lines.append(f"  tuned table, {kind}: {error}")
    return lines


def _shapes(text: str) -> list[tuple[int, int]]:
    """(B, H) pairs from "B,H;B,H"."""
    try:
        pairs = [tuple(int(size) for size in pair.split(",")) for pair in text.split(";") if pair.strip()]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of shapes; expected B,H pairs as in '16,1024;64,256'"
        )
    return pairs  # type: ignore[return-value]


def tune(arguments: argparse.Namespace) -> int:
    """Tunes every key of the shapes that the table lacks; returns the exit status.

    What is done is kept, whenever it ends: at the budget, at Ctrl-C, or killed.
    """
    if not torch.cuda.is_available():
        print(
            "there is nothing to tune: tables hold times on a GPU, and this machine has no CUDA device; "
            "TRITON_INTERPRET=1 python -m elman explain --backend triton ... shows what the model chooses"
        )
        return 1
    device = torch.device(arguments.device)
    why_not = routing.unavailable("triton", device, torch.float32)
    if why_not:
        print(f"there is nothing to tune on {device}: {why_not}")
        return 1
    from . import tables, tuning
    from .kernels.common import chip

    gpu = chip(device).name
    path = arguments.output or tables.user_path(gpu)
    done = tables.read(path, gpu).entries
    shapes = arguments.shapes or [(B, H) for B in TUNED_B for H in TUNED_H]
    dtypes = [DTYPES[name] for name in arguments.dtype]
    work = {tables.key_of(*job): job for job in jobs(shapes, dtypes, arguments.directions, device)}
    work = {key: job for key, job in work.items() if key not in done}
    print(f"{path}: {len(done)} entries are there, {len(work)} to do", file=sys.stderr)
    start, finished, failures = time.monotonic(), 0, 0
    try:
        for n, (key, (kernel, problem)) in enumerate(work.items(), 1):
            if arguments.budget is not None and time.monotonic() - start >= 60 * arguments.budget:
                print(f"the budget of {arguments.budget:g} minutes is spent", end=": ", file=sys.stderr)
                break
            try:
                us = f"{tuning.tune(kernel, problem, device, path=path, wait=600.0).us:.2f} us"
            except RuntimeError as error:  # none of its candidates runs; the others may
                us, failures = f"failed: {error}", failures + 1
            finished = n
            eta = (time.monotonic() - start) / n * (len(work) - n) / 60
            bar = "#" * (20 * n // len(work))
            print(f"[{bar:20}] {n}/{len(work)}  {key}  {us}  eta {eta:.0f} min", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", end=": ", file=sys.stderr)
    left = len(work) - finished
    print(
        f"{finished - failures} keys tuned, {failures} failed, {left} left"
        + ("; the same command goes on from there" if left else ""),
        file=sys.stderr,
    )
    return 1 if failures else 0


def jobs(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    directions: Sequence[int],
    device: torch.device,
) -> Iterator[tuple[str, Problem]]:
    """(kernel, problem) of what can run, cudnn too, the most wanted first: a budget may end it anywhere.

    That is B = 16, and bfloat16 before all other dtypes; then the order that was asked for. The kernel step
    comes last of all, for it takes the longest and is seldom the quickest.
    """
    from . import choice
    from .kernels import configs

    classes = [(dtype, precision) for dtype in dtypes for precision in _precisions(dtype, device)]
    classes.sort(key=lambda pair: pair[0] != torch.bfloat16)
    batches = sorted(dict.fromkeys(B for B, _ in shapes), key=lambda B: B != 16)
    problems = [
        configs.Problem(B, H, D, dtype, precision, backward)
        for batch in batches
        for dtype, precision in classes
        for B, H in shapes
        if B == batch
        for D in directions
        for backward in (False, True)
    ]
    for kernels in ([k for k in (*configs.KERNELS, "cudnn") if k != "step"], ["step"]):
        for problem, kernel in itertools.product(problems, kernels):
            if kernel == "cudnn":
                why_not = routing.unavailable("cudnn", device, problem.dtype)
            else:
                why_not = choice.why_not(kernel, problem, device)
            if why_not is None:
                yield kernel, problem


def _precisions(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """The classes of products that a dtype has on the device, whatever PyTorch's switch says."""
    from .kernels.common import chip

    both = dtype == torch.float32 and torch.version.hip is None and chip(device).tf32
    return ("ieee", "tf32") if both else ("ieee",)
