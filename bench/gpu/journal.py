"""Rows that are on the disk as soon as they are made: a kill at any moment loses at most the one in flight.

Journal(path)       a file of JSON lines that one process writes
read(path)          its rows, for everyone else
in_flight(path)     what its process was at when it ended, or is at now
plain(error)        an error as a row keeps it: in one line, without this machine's paths
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from bench.rows import append_text, replace, whole_lines

Row = dict[str, Any]


class Journal:
    """A file of rows, which it holds as a list too; a line that a killed process left half is taken off.

    Before a process begins something that may end it, `begin` writes a number n and a description into a
    file beside this one. A row with the same n says how it ended. Where the process is dead without such a
    row, its supervisor writes one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read(path)
        if path.exists():
            text = path.read_bytes()
            if text and not text.endswith(b"\n"):
                os.truncate(path, text.rfind(b"\n") + 1)

    def add(self, **row: Any) -> None:
        append_text(self.path, json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)

    def begin(self, n: Any, patience: int = 1, **what: Any) -> None:
        """patience: how many times as long as a launch it may take before it counts as hung."""
        begun = {"n": n, "at": time.time(), "patience": patience, "what": what}
        replace(_beside(self.path), json.dumps(begun))


def read(path: Path) -> list[Row]:
    """The rows of a journal that may be being written, without a last line that has no end yet."""
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def in_flight(path: Path) -> Row | None:
    """{"n", "at": seconds since 1970, "patience", "what"} of what was begun and has no row yet."""
    beside = _beside(path)
    if not beside.exists():
        return None
    begun = json.loads(beside.read_text(encoding="utf-8"))
    return None if any(row.get("n") == begun["n"] for row in read(path)) else begun


def forget(path: Path) -> None:
    """What an earlier process of the journal was at is no longer in flight."""
    _beside(path).unlink(missing_ok=True)


def plain(error: object, most: int = 500) -> str:
    """An error's name and words; of a path, the file's name alone."""
    words = " ".join(str(error).split())
    name = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+@-]+/)+", "", name + words)[:most]


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".begun")
