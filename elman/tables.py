"""Tuned tables on disk: one JSON file per GPU model, the quickest config found there for each key.

    {"schema": 1,
     "gpu": "NVIDIA H200",                           as torch.cuda.get_device_name says
     "provenance": [{"torch": "2.11.0", "triton": "3.6.0", "driver": "580.65", "date": "2026-01-31",
                     "elman": "0.1.0", "commit": "1b24396"}],
     "entries": [
      {"kernel": "cooperative",                      resident, cooperative, step or, to compare with, cudnn
       "pass": "forward",                            or backward
       "dtype": "bfloat16",
       "precision": "ieee",                          float32's class: ieee, tf32, or tf32x3 if that is pinned
       "H": 1024, "D": 1,
       "B": 16,                                      the bucket: a power of two, at least 8, rows rounded up
       "config": {"BLOCK_B": 16, ...},               every field of the kernel's config; {} for cudnn
       "us": {"median": 1.43, "p20": 1.41, "p80": 1.49},      microseconds a step
       "default_us": 1.61,                           of the model's first choice; null if that failed
       "candidates": 4,                              how many were tried
       "times": {"CooperativeConfig(...)": {"median": 1.43, "p20": 1.41, "p80": 1.49}},     of each that ran
       "failed": {"CooperativeConfig(...)": "OutOfResources: ..."},
       "provenance": 0}]}                            which of the file's provenances

"times" is absent where an older elman tuned, and empty for cudnn, which has no candidates. The length T is in
no key, and rows of differing lengths share the key of full ones.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import compiled
from .kernels import configs

SCHEMA = 1
CONFIGS: dict[str, Any] = {kernel: configs._SPACES[kernel][0] for kernel in configs.KERNELS}
#: How near a key must be to stand in for another: H within an eighth, the bucket of B within a factor of two.
NEAR_H, NEAR_B = 1 / 8, 2
DTYPES = ("float64", "float32", "float16", "bfloat16")
PRECISIONS = ("ieee", "tf32", "tf32x3")


class Key(NamedTuple):
    """What the answer depends on; B is a bucket."""

    kernel: str
    backward: bool
    dtype: str
    precision: str
    H: int
    D: int
    B: int

    def __str__(self) -> str:
        dtype = self.dtype if self.dtype != "float32" else f"float32 ({self.precision})"
        directions = "" if self.D == 1 else f" D={self.D}"
        which = "backward" if self.backward else "forward"
        return f"{self.kernel} {which} {dtype} B={self.B} H={self.H}{directions}"


@dataclass(frozen=True)
class Entry:
    """What tuning found for a key: times in microseconds a step; config is None for cudnn.

    times and failed are by str(config): the median, p20 and p80 of each candidate that ran, and why each
    other did not.
    """

    key: Key
    config: configs.Config | None
    us: float
    p20: float
    p80: float
    default_us: float | None
    candidates: int
    failed: Mapping[str, str] = field(default_factory=dict)
    provenance: int = 0
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A file's content; refused holds a sentence for each entry that was left out."""

    gpu: str
    provenance: tuple[Mapping[str, str], ...] = ()
    entries: Mapping[Key, Entry] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def near(self, key: Key) -> list[Entry]:
        """The entries of other keys that may stand in for this one, the nearest H first, then B."""

        def distance(found: Key) -> tuple[float, float]:
            return abs(found.H - key.H) / key.H, abs(math.log2(found.B / key.B))

        similar = [k for k in self.entries if k != key and k._replace(H=key.H, B=key.B) == key]
        near = [k for k in similar if distance(k)[0] <= NEAR_H and distance(k)[1] <= math.log2(NEAR_B)]
        return [self.entries[k] for k in sorted(near, key=distance)]

    def with_entry(self, entry: Entry, provenance: Mapping[str, str]) -> Table:
        """The table with this entry, made under this provenance."""
        known = (*self.provenance, *([] if provenance in self.provenance else [provenance]))
        entry = replace(entry, provenance=known.index(provenance))
        return replace(self, provenance=known, entries={**self.entries, entry.key: entry})


def key_of(kernel: str, problem: configs.Problem) -> Key:
    """The key of a kernel's work on a problem."""
    dtype = str(problem.dtype).removeprefix("torch.")
    precision = problem.precision if dtype == "float32" else "ieee"
    return Key(kernel, problem.backward, dtype, precision, problem.H, problem.D, bucket(problem.B))


def bucket(B: int) -> int:
    """The smallest power of two that is at least B and at least 8."""
    return max(8, 1 << (B - 1).bit_length())


def user_path(gpu: str) -> Path:
    """The user's table: in $ELMAN_CACHE_DIR, else in elman/ of $XDG_CACHE_HOME or ~/.cache.

    A user without a home, as in a container run under a number of no one's, has it among temporary files.
    """
    folder = compiled.user_folder() or Path(tempfile.gettempdir(), f"elman-{os.getuid()}", "elman")
    return folder / "tuned" / _file_name(gpu)


def shipped_path(gpu: str) -> Path:
    """The table that ships with elman, if there is one."""
    return Path(__file__).parent / "tuned" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read(path: Path, gpu: str) -> Table:
    """The table at `path`, an empty one if there is no file.

    Raises ValueError, naming the file and what to do, where it is no table or another GPU's. An entry that
    another version of elman made, with a kernel or a config that this one has not, is refused alone.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Table(gpu)
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error)) from None
    try:
        return _parse(json.loads(text), path, gpu)
    except ValueError as error:  # JSONDecodeError is one
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"the tuned table {path} can't be used: {why}. Delete it or move it away; `python -m elman tune` "
        "makes it anew."
    )


def write(path: Path, table: Table) -> None:
    """Puts the table at `path` in one piece: who reads meanwhile sees the old one or the new one.

    Raises ValueError, with the file left as it is, for a table that `read` would not take.
    """
    entries = [_to_json(table.entries[key]) for key in sorted(table.entries)]
    data = {
        "schema": SCHEMA,
        "gpu": table.gpu,
        "provenance": [dict(p) for p in table.provenance],
        "entries": entries,
    }
    _parse(data, path, table.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Holds the table at `path` against all other processes and threads.

    Raises TimeoutError after `wait` seconds in which another held it. A process that dies lets go.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        raise OSError(
            f"{path} can't be locked: Python has no fcntl on this system, so nothing is tuned on it"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"the tuned table {path} has been locked by another process for {wait:.0f} seconds; "
                        "wait for that one to finish its tuning, or end it"
                    ) from None
                time.sleep(0.02)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # said, not left to close(): a forked child may hold a copy


def _to_json(entry: Entry) -> dict[str, Any]:
    kernel, backward, *rest = entry.key
    return {
        "kernel": kernel,
        "pass": "backward" if backward else "forward",
        **dict(zip(Key._fields[2:], rest, strict=True)),
        "config": asdict(entry.config) if entry.config else {},
        "us": {"median": entry.us, "p20": entry.p20, "p80": entry.p80},
        "default_us": entry.default_us,
        "candidates": entry.candidates,
        "times": {config: dict(times) for config, times in entry.times.items()},
        "failed": dict(entry.failed),
        "provenance": entry.provenance,
    }


def _parse(data: Any, path: Path, gpu: str) -> Table:
    schema = _take(data, "schema", int)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema}; expected {SCHEMA}, this elman's")
    if _take(data, "gpu", str) != gpu:
        raise ValueError(f"its gpu is {data['gpu']!r}; expected {gpu!r}")
    provenance = tuple(_take(data, "provenance", list))
    entries, refused = {}, []
    for item in _take(data, "entries", list):
        entry = _entry(item, len(provenance))
        if isinstance(entry, str):
            refused.append(
                f"{path}: {entry}, so the entry is not used; make it anew with `python -m elman tune`"
            )
        else:
            entries[entry.key] = entry
    return Table(gpu, provenance, entries, tuple(refused))


def _entry(item: Any, provenances: int) -> Entry | str:
    """The entry, or why this version of elman can't use it; ValueError for what no version wrote."""
    sizes = {name: _take(item, name, int) for name in ("H", "D", "B")}
    candidates, provenance = _take(item, "candidates", int), _take(item, "provenance", int)
    if min(*sizes.values(), candidates) < 1 or sizes["B"] != bucket(sizes["B"]):
        raise ValueError(f"an entry has {sizes}, {candidates} candidates; expected sizes, and a bucket for B")
    if not 0 <= provenance < provenances:
        raise ValueError(f"an entry has provenance {provenance}; expected one of the {provenances} there")
    key = Key(
        _take(item, "kernel", str),
        _one_of(item, "pass", ("forward", "backward")) == "backward",
        _one_of(item, "dtype", DTYPES),
        _one_of(item, "precision", PRECISIONS),
        **sizes,
    )
    us, p20, p80 = _quantiles(_take(item, "us", dict)).values()
    each = _take(item, "times", dict) if "times" in item else {}
    times = {config: _quantiles(found) for config, found in each.items()}
    default_us = None if _take(item, "default_us", object) is None else _microseconds(item, "default_us")
    config = config_of(key, _take(item, "config", dict))
    if isinstance(config, str):
        return config
    failed = _take(item, "failed", dict)
    return Entry(key, config, us, p20, p80, default_us, candidates, failed, provenance, times)


def config_of(key: Key, values: Mapping[str, Any]) -> configs.Config | str | None:
    """The config with these values (None for cudnn), or why it is none."""
    if key.kernel == "cudnn":
        return None
    if key.kernel not in CONFIGS:
        return f"its kernel {key.kernel!r} is none of {', '.join(CONFIGS)}"
    expected = {f.name: f.type for f in fields(CONFIGS[key.kernel])}
    found = {name: type(value).__name__ for name, value in values.items()}
    if found != expected:
        odd = sorted(dict(found.items() ^ expected.items()))
        return f"the config of {key} does not have this version's fields; they differ in {', '.join(odd)}"
    asked = configs.Problem(key.B, key.H, key.D, getattr(torch, key.dtype), key.precision)
    if values["PRECISION"] not in configs.precisions_of(key.kernel, asked, configs.DEFAULT_CHIP):
        return (
            f"the config of {key} has PRECISION {values['PRECISION']!r}; that is not of class {key.precision}"
        )
    return CONFIGS[key.kernel](**values)


def _take(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"it has no {name!r} where one is expected")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {name!r} is {value!r}; expected a JSON {kind.__name__}")
    return value


def _one_of(data: Any, name: str, names: tuple[str, ...]) -> str:
    if _take(data, name, str) not in names:
        raise ValueError(f"its {name!r} is {data[name]!r}; expected one of {', '.join(names)}")
    return data[name]


def _quantiles(data: Any) -> dict[str, float]:
    return {name: _microseconds(data, name) for name in ("median", "p20", "p80")}


def _microseconds(data: Any, name: str) -> float:
    value = _take(data, name, object)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"its {name!r} is {value!r}; expected microseconds")
    return float(value)
