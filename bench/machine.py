"""What a table was measured on: the machine, the versions, the commit. No host name, no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from elman import routing


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and operating system, as stored in machine.json."""
    described: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory_gib(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        described["gpu"] = gpu.name
        described["gpu_memory_gib"] = round(gpu.total_memory / 2**30)
        described["multiprocessors"] = gpu.multi_processor_count
        described["compute_capability"] = f"{gpu.major}.{gpu.minor}"
    return described


def slug(described: dict[str, Any]) -> str:
    """The machine's folder: its GPU's or CPU's model and its cores, such as amd-epyc-7763-8-cores."""
    model = described.get("gpu") or described["cpu"]
    model = re.sub(r"\((r|tm)\)|\bcpu\b|\b\d+-core\b|\bprocessor\b|@.*", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {described['cores']} cores").strip("-")


def software(device: torch.device) -> dict[str, str]:
    """The versions that a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def float32_state(device: torch.device) -> str:
    """How float32 products are made here, which on CUDA is a switch."""
    if device.type != "cuda":
        return "IEEE float32 (CPU)"
    rnn = routing.float32_precision(device).upper()
    plain = "TF32" if torch.backends.cuda.matmul.allow_tf32 else "IEEE"
    return f"RNNs {rnn} (torch.backends.cudnn.allow_tf32), other products {plain}"


def commit(root: Path) -> dict[str, Any]:
    """The git commit of the working tree and whether it has changes (results/ left out)."""
    try:
        head = git(root, "rev-parse", "--short=12", "HEAD")
        changes = git(root, "status", "--porcelain", "--", ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown (no git commit here)", "dirty": None}
    return {"commit": head, "dirty": bool(changes)}


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def load_average() -> float | None:
    """Processes that wanted to run in the last minute: above 0.5 or so, someone else was there too."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """The CPU's model; its family, model and stepping too where the name is a mere brand (a guest's)."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
        if "model name" in fields:
            name = fields["model name"].strip()
            if not re.search(r"\d", name):
                name += f" (family {fields.get('cpu family')}, model {fields.get('model')})"
            return name
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
