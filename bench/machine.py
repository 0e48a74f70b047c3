"""What a table was measured on: the machine, the versions, the commit. No host name, no path."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from elman import routing
from elman.commit import commit

ROOT = Path(__file__).resolve().parents[1]
#: The files of bench/ that work on what was measured, and change no number.
AFTER_THE_FACT = {"tables.py", "page.py", "report.py", "plots.py", "compare.py"}
#: What is asked of nvidia-smi, by our names: its field's name, and the one that older drivers have for it.
STATE_FIELDS = {
    "sm_mhz": ("clocks.sm",),
    "memory_mhz": ("clocks.mem",),
    "temperature_c": ("temperature.gpu",),
    "power_w": ("power.draw",),
    "throttle": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
}
CLOCK_FIELDS = {
    "sm_max": ("clocks.max.sm",),
    "memory_max": ("clocks.max.mem",),
    "sm_application": ("clocks.applications.graphics",),
    "memory_application": ("clocks.applications.memory",),
}
#: The bits of nvidia-smi's reasons for a clock below the highest.
IDLE = 0x1
THROTTLE = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
#: The exit status of a process that can use its GPU no more.
LOST_GPU = 70
#: Seconds that nvidia-smi may take.
NVIDIA_SMI_LIMIT = 10


def record(device: torch.device, root: Path) -> dict[str, Any]:
    """What every measurement is stored with: when, of which commit, on what."""
    return {
        "device": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **commit(root),
        "machine": machine(device),
        "software": software(device),
        "load_average": load_average(),
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes machine.json, by what record() found."""
    described = {**record["machine"], **{name: record[name] for name in ("software", "commit", "dirty")}}
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / "machine.json").write_text(text, encoding="utf-8", newline="\n")


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
        asked = nvidia_smi(device, {"driver": ("driver_version",), **CLOCK_FIELDS})
        described["driver"] = asked.get("driver", f"unknown ({asked.get('unknown')})")
        described["clocks_mhz"] = {name: number(asked[name]) for name in CLOCK_FIELDS if name in asked}
    return described


def chip_state(device: torch.device) -> dict[str, Any]:
    """How a GPU is doing at this moment, as far as nvidia-smi says; {} for a CPU.

    {"sm_mhz": int, "memory_mhz": int, "temperature_c": int, "power_w": float, "throttle": [words, ...],
    "idle": bool}; what it does not say is left out, and "unknown" says why. An idle chip may have lowered its
    clocks since its last work: that is no throttling.
    """
    if device.type != "cuda":
        return {}
    asked = nvidia_smi(device, STATE_FIELDS)
    state: dict[str, Any] = {
        name: number(value) for name, value in asked.items() if name not in ("throttle", "unknown")
    }
    if "throttle" in asked:
        state |= reasons(asked["throttle"])
    return state | {name: value for name, value in asked.items() if name == "unknown"}


def reasons(mask: str) -> dict[str, Any]:
    """What nvidia-smi's bits such as 0x0000000000000004 mean; a bit that is not known as its number."""
    bits = int(mask, 16)
    known = [name for bit, name in THROTTLE.items() if bits & bit]
    rest = bits & ~(IDLE | sum(THROTTLE))
    return {"throttle": known + ([f"reason {rest:#x}"] if rest else []), "idle": bool(bits & IDLE)}


def number(text: str) -> int | float:
    """nvidia-smi's number: it has a point or it is an integer."""
    return float(text) if "." in text else int(text)


def nvidia_smi(device: torch.device, fields: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """nvidia-smi's words for the device, by our names of the fields; "unknown" says what is missing, and why.

    A field may have several names, of which a driver may know only a later one.
    """
    if torch.version.hip:
        return {"unknown": "nvidia-smi knows no AMD GPUs"}
    names = {ours: list(theirs) for ours, theirs in fields.items()}
    while True:
        asked = {ours: theirs[0] for ours, theirs in names.items() if theirs}
        query = ",".join(["uuid", "pci.bus_id", *asked.values()])
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_LIMIT)
        except OSError as error:
            return {"unknown": f"nvidia-smi does not run here: {error.strerror}"}
        except subprocess.TimeoutExpired:
            return {"unknown": f"nvidia-smi said nothing within {NVIDIA_SMI_LIMIT} seconds"}
        said = f"{done.stdout}\n{done.stderr}".strip()
        refused = refused_field(said)
        if refused not in asked.values():
            break
        for theirs in names.values():
            if refused in theirs:
                theirs.remove(refused)
    if done.returncode or not asked:
        return {"unknown": f"nvidia-smi answered: {' '.join(said.split())[:200] or done.returncode}"}
    return parse_nvidia_smi(done.stdout, list(fields), list(asked), identity(device))


def refused_field(said: str) -> str | None:
    """The field that this nvidia-smi does not know, if that is what it says."""
    found = re.search(r'[Ff]ield "([^"]+)" is not a valid field', said)
    return found[1] if found else None


def identity(device: torch.device) -> tuple[str, ...]:
    """What nvidia-smi may call the device, in lower case: its UUID, and its place on the PCI bus.

    Its number there is another than ours where CUDA_VISIBLE_DEVICES is set or the order differs.
    """
    gpu: Any = torch.cuda.get_device_properties(device)
    names = [f"gpu-{gpu.uuid}"] if hasattr(gpu, "uuid") else []
    if hasattr(gpu, "pci_bus_id"):  # not in all versions of torch
        names.append(f"{gpu.pci_domain_id:08x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")
    return tuple(name.lower() for name in names)


def parse_nvidia_smi(
    text: str, wanted: list[str], columns: list[str], identity: tuple[str, ...]
) -> dict[str, str]:
    """The answer's line for the GPU of that identity, as `columns` after its UUID and bus id.

    A machine's only GPU is taken whatever it is called. What is no number but words, such as [N/A], and what
    is wanted but no column, is named in "unknown".
    """
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if len(line) == len(columns) + 2]
    ours = [line for line in lines if {line[0].lower(), line[1].lower()} & set(identity)]
    if not ours and len(lines) == 1:
        ours = lines
    if not ours:
        return {"unknown": f"nvidia-smi lists {len(lines)} GPUs, and this one is not among them"}
    said = dict(zip(columns, ours[0][2:], strict=True))
    found = {name: value for name, value in said.items() if value[:1].isdigit()}
    missing = [f"{name} {said[name]}" if said.get(name) else name for name in wanted if name not in found]
    return found | ({"unknown": f"nvidia-smi does not say: {', '.join(missing)}"} if missing else {})


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


def source() -> str:
    """A digest of the code that a number depends on: the packages, and how is measured."""
    measuring = [path for path in ROOT.glob("bench/*.py") if path.name not in AFTER_THE_FACT]
    kernels = [*ROOT.glob("kernels/*.py"), *ROOT.glob("kernels/*.c"), *ROOT.glob("bench/*.c")]
    return digest([*ROOT.glob("elman/*.py"), *kernels, *measuring])


def digest(files: Iterable[Path]) -> str:
    """A digest of what code does: a changed comment, docstring or layout must not cost a run on a GPU."""
    found = hashlib.sha256()
    for name, path in sorted((Path(os.path.relpath(path, ROOT)).as_posix(), path) for path in files):
        found.update(name.encode() + b"\0" + _syntax(path.read_bytes()) + b"\0")
    return found.hexdigest()[:12]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache  # a session asks once, but the tests start many
def _syntax(text: bytes) -> bytes:
    """What Python makes of a file, its docstrings left out; of a file that it can't parse, the bytes."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return text
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree).encode()


def tuned(device: torch.device) -> dict[str, str]:
    """What the tuned tables in force say, a digest an entry: it decides on kernels and their configs.

    {"ELMAN_AUTOTUNE": "on", "user: resident forward bfloat16 B=16 H=256": "0a1b2c3d", "shipped: ...": ...};
    "ELMAN_KERNELS" too where it is set. {} where no table is used: on a CPU, and without the kernels.
    """
    if device.type != "cuda" or routing.NO_KERNELS:
        return {}
    from elman import tables, tuning  # these import kernels

    found, gpu = {"ELMAN_AUTOTUNE": "on"}, torch.cuda.get_device_name(device)
    if os.environ.get("ELMAN_KERNELS"):
        found["ELMAN_KERNELS"] = os.environ["ELMAN_KERNELS"]
    if not tuning.autotunes():
        return found | {"ELMAN_AUTOTUNE": "off"}
    for owner, path in (("user", tables.user_path(gpu)), ("shipped", tables.shipped_path(gpu))):
        try:
            entries = tables.read(path, gpu).entries
        except (OSError, ValueError):  # it counts as empty, and the first call warns
            continue
        for key, entry in entries.items():
            text = repr((entry.config, entry.us))
            found[f"{owner}: {key}"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return found


def lost(device: torch.device) -> str:
    """What a GPU says that is lost to this process, as after an illegal access; empty while it is not."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


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
