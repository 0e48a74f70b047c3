"""Which commit this code is, also where the tree was carried to without its .git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE, FILE = "ELMAN_COMMIT", "COMMIT"
#: What is measured with the code, and is no part of it.
MEASURED = ("results", "elman/tuned")


def commit(root: Path = ROOT) -> dict[str, Any]:
    """{"commit": its name, "dirty": whether the tree has changes beside it, None if that is not known}.

    From the variable ELMAN_COMMIT, else from git, else from the file COMMIT in the root. Who carries the tree
    elsewhere sets the one or writes the other: a name such as abc123 or, with changes, abc123-dirty. The
    variable comes first because a .git that was carried along may be older than the tree.
    """
    told = os.environ.get(VARIABLE, "").strip()
    if not told and (root / ".git").exists():  # else git would answer for a repository that this one lies in
        try:
            head = git(root, "rev-parse", "--short=12", "HEAD")
            changes = git(root, "status", "--porcelain", "--", ".", *(f":(exclude){m}" for m in MEASURED))
            return {"commit": head, "dirty": bool(changes)}
        except (OSError, subprocess.CalledProcessError):
            pass
    told = told or _file(root / FILE)
    if not told:
        return {"commit": f"unknown (no git commit, no {VARIABLE}, no file {FILE})", "dirty": None}
    # A plain name may come from someone who did not look for changes.
    return {"commit": told.removesuffix("-dirty"), "dirty": True if told.endswith("-dirty") else None}


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def git(root: Path, *arguments: str) -> str:
    """What git prints; raises OSError without git, CalledProcessError where it fails."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
