"""python -m elman doctor | explain: what runs on this machine, where a call would go, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, routing

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in routing.DTYPES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 where a backend asked for can't run."""
    parser = argparse.ArgumentParser(prog="python -m elman", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, what can run and why not, where caches are")
    explain = commands.add_parser("explain", help="the backend and kernel that a call would take, and why")
    for size in ("batch", "seq", "input", "hidden"):
        explain.add_argument(f"--{size}", type=int, required=True, metavar=size[0].upper())
    explain.add_argument("--dtype", choices=DTYPES, default="float32")
    explain.add_argument("--device", help="a torch device; default: the GPU if there is one, else the CPU")
    explain.add_argument("--backend", choices=routing.NAMES, default="auto")
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        print(doctor())
        return 0
    try:
        route = routing.explain(
            batch=arguments.batch,
            seq=arguments.seq,
            input=arguments.input,
            hidden=arguments.hidden,
            dtype=DTYPES[arguments.dtype],
            device=arguments.device,
            backend=arguments.backend,
        )
    except (RuntimeError, ValueError) as error:  # no such device or backend, a size below 1
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
    for variable in ("ELMAN_BACKEND", "TRITON_INTERPRET"):
        lines.append(f"  {variable} is {os.environ.get(variable, 'not set')}")
    cache = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    lines += ["", "Caches", f"  compiled Triton kernels: {cache}", "  tuned tables: none are made yet"]
    return "\n".join(lines)
