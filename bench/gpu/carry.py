"""What a run has made, in few files that are carried home from a lent machine, and back in its place there.

    pack(...)     <machine>.tar.gz, gpu.md and gpu.log in a folder
    unpack(...)   the tar's files, where the repository has them

Nothing is lost that was committed here meanwhile: a file comes home only if the run has written it.
"""

from __future__ import annotations

import contextlib
import shutil
import tarfile
from pathlib import Path

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
        for path in (*sorted(folder.rglob("*")), folder.parent / "README.md", table):
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
    """Puts the files of each tar in the folder in their places; returns how many."""
    count = 0
    for path in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(root, filter="data")
            count += len(tar.getnames())
    return count
