"""What a run has made, in few files that are carried home from a lent machine, and back in its place there.

    pack(...)     <machine>.tar.gz, gpu.md and gpu.log in a folder
    unpack(...)   the tar's files, where the repository has them

A file comes home only if the run, or one that it went on with, has written it: what was changed at home
meanwhile stays. Rows of other code or versions are put aside, here and there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from bench import report, rows

#: Bytes of a file that the machine which lends a GPU carries home at most.
MOST_BYTES = 16 << 20
#: Files that are nothing to keep.
PASSING = (".new", ".log", ".begun")


def pack(output: Path, root: Path, folder: Path, table: Path, began: float) -> Path:
    """Writes the files; returns the tar, which is written in one move.

    folder: results/<machine>. began: when the run did, in seconds since 1970.
    """
    output.mkdir(parents=True, exist_ok=True)
    tar = output / f"{folder.name}.tar.gz"
    fresh = tar.with_suffix(".new")
    with tarfile.open(fresh, "w:gz", compresslevel=3) as packed:
        for path in (*sorted(folder.rglob("*")), table):
            # Processes are at work meanwhile: a journal may be published, a file moved into place.
            with contextlib.suppress(FileNotFoundError):
                if path.suffix not in PASSING and path.is_file() and path.stat().st_mtime >= began:
                    packed.add(path, arcname=path.relative_to(root).as_posix())
    if fresh.stat().st_size > MOST_BYTES:
        print(f"{tar.name} has {fresh.stat().st_size >> 20} MiB; above 16 it may not be carried home")
    fresh.replace(tar)
    for path in (folder / "gpu.md", folder / "gpu" / "gpu.log"):
        if path.exists() and path.stat().st_mtime >= began:
            shutil.copyfile(path, output / path.name)
    return tar


def unpack(folder: Path, root: Path) -> int:
    """Puts the files of each tar in the folder in their places; returns how many. The index is made again."""
    count = 0
    for path in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith("/gpu/machine.json"):
                    record = tar.extractfile(name)
                    assert record
                    if differs(root / name, json.load(record)):
                        put_aside((root / name).parent)
            tar.extractall(root, filter="data")
            count += len(tar.getnames())
        results = root / "results"
        if results.exists():
            report.index(results)
    return count


def differs(path: Path, record: dict[str, Any]) -> bool:
    """Whether the rows beside that machine.json were made by other code or versions than this record's."""
    if not path.exists():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    return any(before.get(key) != record.get(key) for key in ("source", "software"))


def put_aside(folder: Path) -> Path:
    """results/<machine>/gpu by the date of its rows."""
    before = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    return rows.put_aside(folder, folder.name, before["date"])
