"""Which config a launch takes: of a tuned table, by timing candidates once, or the model's first choice.

    config_for(...)  the config: from the user's table, else the shipped one (the exact key, else the nearest
                     within `tables.NEAR_H` and `NEAR_B`, if the model lets its config through for the
                     problem), else tuned now and kept in the user's table, else the model's first choice
    tune(...)        an entry of a table, made if it is not there yet
    tune_key(...)    the candidates of one key, timed on a short sequence

In a torch.distributed job one rank decides on a key for all whose GPUs have the same name, see sharing.py.

Only CUDA tensors are tuned for, never while a CUDA graph is captured, and not where the input product is
part of the launch (the cell, a fused forward). ELMAN_AUTOTUNE=off pins the model's first choice: it
tunes nothing and reads no table. What this process chose for a problem stays for its lifetime, also if it was
chosen during a capture, so that the graph and calls outside it take the same config. What is tuned later
serves the next process.
"""

from __future__ import annotations

import datetime
import functools
import os
import re
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from . import routing, sharing, tables
from .commit import commit
from .kernels import configs
from .kernels.common import chip
from .timing import Timer, measure

#: Seconds that a launch waits for another process to tune the same GPU's keys.
WAIT = 60.0
#: Seconds that a rank of a job waits for another to decide on a key: that one may wait first, then compiles
#: and times the candidates.
WAIT_FOR_RANK = WAIT + 120.0
_Function = TypeVar("_Function", bound=Callable)
_caches: list[Any] = []
_chosen: dict[tuple, configs.Config] = {}
_unusable: set[Path] = set()


def remembered(function: _Function) -> _Function:
    """lru_cache, emptied by `forget`."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Forgets what this process has read, chosen and compared; the next calls read the tables anew.

    What a job's ranks have decided on stays, in the job's store.
    """
    _chosen.clear()
    _unusable.clear()
    routing.routes.clear()
    for cached in _caches:
        cached.cache_clear()


def autotunes() -> bool:
    """Whether ELMAN_AUTOTUNE allows tables and tuning; ValueError unless it is unset, "on" or "off"."""
    value = os.environ.get("ELMAN_AUTOTUNE") or "on"
    if value not in ("on", "off"):
        raise ValueError(f"the environment variable ELMAN_AUTOTUNE is {value!r}; expected 'on' or 'off'")
    return value == "on"


def config_for(kernel: str, problem: configs.Problem, device: torch.device) -> configs.Config:
    """The config of a launch, tuned now if that is due; a dict lookup from the second time on.

    A table that can't be read, locked or written, or a key none of whose candidates runs, is a warning, and
    the model's first choice is taken. During a CUDA graph's capture nothing is tuned, and what is chosen
    there stays for the process. In a job of several ranks the config may be another rank's, which is waited
    for for at most WAIT_FOR_RANK. Raises ValueError where the kernel has no config that fits.
    """
    memo = (kernel, problem, device)
    config = _chosen.get(memo)
    if config is None:
        _chosen[memo] = config = _decided(kernel, problem, device)
    return config


def _decided(kernel: str, problem: configs.Problem, device: torch.device) -> configs.Config:
    if not _may_tune(problem, device):
        return known_config(kernel, problem, device)
    key = tables.key_of(kernel, problem)
    own = functools.cache(lambda: _own_config(kernel, problem, device))
    # By the key, which holds a bucket of B: ranks whose batches differ a little agree too.
    values = sharing.first_decides(f"{key} on {chip(device).name}", lambda: asdict(own()), WAIT_FOR_RANK)
    config = tables.config_of(key, values)
    if config is None or isinstance(config, str) or not _lets_through(kernel, config, problem, device):
        return own()
    return config


def _own_config(kernel: str, problem: configs.Problem, device: torch.device) -> configs.Config:
    """As config_for, for this rank alone."""
    config = known_config(kernel, problem, device)
    # What was tuned could not be kept in a table that can't be read.
    if lookup(kernel, problem, device) is None and tables.user_path(chip(device).name) not in _unusable:
        config = _tuned(kernel, problem, device) or config
    return config


def _may_tune(problem: configs.Problem, device: torch.device) -> bool:
    if device.type != "cuda" or problem.inputs or not autotunes():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _tuned(kernel: str, problem: configs.Problem, device: torch.device) -> configs.Config | None:
    try:
        entry = tune(kernel, problem, device)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"{tables.key_of(kernel, problem)} is not tuned and takes the model's first choice: {error}. "
            "ELMAN_CACHE_DIR names the tables' folder; ELMAN_AUTOTUNE=off tunes nothing.",
            stacklevel=4,
        )
        return None
    return entry.config if fits(entry, problem, device) else None


def known_config(kernel: str, problem: configs.Problem, device: torch.device) -> configs.Config:
    """As config_for, without tuning."""
    entry = lookup(kernel, problem, device)
    return (entry and entry.config) or configs.choose(kernel, problem, chip(device))


def lookup(kernel: str, problem: configs.Problem, device: torch.device) -> tables.Entry | None:
    """The tuned entry for the problem: user's table before shipped one, exact key before near ones."""
    if device.type != "cuda" or problem.inputs or not autotunes():
        return None
    gpu, key = chip(device).name, tables.key_of(kernel, problem)
    both = [table(path(gpu), gpu) for path in (tables.user_path, tables.shipped_path)]
    exact = [found.entries[key] for found in both if key in found.entries]
    near = [entry for found in both for entry in found.near(key)]
    return next((entry for entry in (*exact, *near) if fits(entry, problem, device)), None)


def fits(entry: tables.Entry, problem: configs.Problem, device: torch.device) -> bool:
    """Whether the model lets the entry's config through for this very problem."""
    return entry.config is None or _lets_through(entry.key.kernel, entry.config, problem, device)


def _lets_through(
    kernel: str, config: configs.Config, problem: configs.Problem, device: torch.device
) -> bool:
    return isinstance(configs.estimate(kernel, config, problem, chip(device)), configs.Estimate)


@remembered
def table(path: Path, gpu: str) -> tables.Table:
    """The table at `path`, read once; a warning for each entry that this version refuses.

    A table that can't be used is a warning, once, and counts as empty: no forward pass fails for it.
    """
    try:
        found = tables.read(path, gpu)
    except (OSError, ValueError) as error:
        if path not in _unusable:
            _unusable.add(path)
            remedy = "" if isinstance(error, ValueError) else f"; make {path} a file that can be read"
            warnings.warn(
                f"{error}{remedy}. Until then it counts as empty, and no key is tuned into it.",
                stacklevel=2,
            )
        return tables.Table(gpu)
    for sentence in found.refused:
        warnings.warn(sentence, stacklevel=2)
    return found


# Tuning


def tune(
    kernel: str,
    problem: configs.Problem,
    device: torch.device,
    *,
    path: Path | None = None,
    timer: Timer | None = None,
    wait: float = WAIT,
) -> tables.Entry:
    """The key's entry in the table at `path` (default: the user's), tuned and written if it has none.

    It holds the table's lock, so that no key is tuned twice, whatever the processes. Raises OSError where
    the table can't be read, locked or written, ValueError where it is none, RuntimeError where no candidate
    runs.
    """
    gpu = chip(device).name
    path = path or tables.user_path(gpu)
    with tables.locked(path, wait):
        found = tables.read(path, gpu)
        entry = found.entries.get(tables.key_of(kernel, problem))
        if entry is None:
            entry = tune_key(kernel, problem, device, timer or measure)
            tables.write(path, found.with_entry(entry, provenance()))
            table.cache_clear()  # type: ignore[attr-defined]
    return entry


def tune_key(
    kernel: str, problem: configs.Problem, device: torch.device, timer: Timer | None = None
) -> tables.Entry:
    """Times the key's candidates (for "cudnn" itself alone), names the quickest by its median, keeps all.

    The work is the key's, not the problem's: full rows, and as many as the bucket holds where the kernel can
    run that. Raises RuntimeError where no candidate runs, or ELMAN_KERNELS leaves the kernel out.
    """
    routing.expect_allowed(kernel)
    on, key = chip(device), tables.key_of(kernel, problem)
    whole, tried = work(kernel, replace(problem, ragged=False), on)
    results = (timer or measure)(kernel, whole, tried, device)
    failed = {str(c): r for c, r in zip(tried, results, strict=True) if isinstance(r, str)}
    timed = {c: r for c, r in zip(tried, results, strict=True) if not isinstance(r, str)}
    if not timed:
        raise RuntimeError(
            f"no candidate of {key} runs: {'; '.join(failed.values()) or 'the model has none'}"
        )
    found = {config: quantiles(samples) for config, samples in timed.items()}
    best = min(found, key=lambda config: found[config]["median"])
    default = found[tried[0]]["median"] if tried[0] in found else None
    times = {str(config): all_ for config, all_ in found.items() if config is not None}
    us, p20, p80 = found[best].values()
    return tables.Entry(key, best, us, p20, p80, default, len(tried), failed, times=times)


def work(
    kernel: str, problem: configs.Problem, on: configs.Chip
) -> tuple[configs.Problem, list[configs.Config | None]]:
    """What the key of a problem is tuned on, and the configs to try, None standing for cudnn itself.

    As many rows as the bucket holds, where the kernel can run that.
    """
    whole = replace(problem, B=tables.bucket(problem.B))
    if kernel == "cudnn":
        return whole, [None]
    whole = whole if configs.candidates(kernel, whole, on) else problem
    return whole, [config for config, _ in configs.candidates(kernel, whole, on)]


def quantiles(samples: list[float]) -> dict[str, float]:
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": p20, "p80": p80}


def provenance() -> dict[str, str]:
    """What an entry was made with."""
    from . import __version__

    driver, module = "unknown", Path("/proc/driver/nvidia/version")
    if module.exists():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", module.read_text(encoding="utf-8"))
        driver = found.group() if found else driver
    made = commit()
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver,
        "date": datetime.date.today().isoformat(),
        "elman": __version__,
        "commit": f"{made['commit']}{'-dirty' if made['dirty'] else ''}",
    }
