"""Runs a module, as `python -m` does, or a program, for as long as the process lives that started it.

    python -m bench.gpu.tether MODULE ARGUMENTS...
    python -m bench.gpu.tether -- PROGRAM ARGUMENTS...

Whoever starts it holds the other end of its stdin, and gives it a process group of its own. However the
starter dies, stdin ends then, and the group is killed: nobody goes on computing on the GPU, or writing rows,
beside the run that comes after.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading


def tie() -> None:
    """From now on this process, and its group with it, ends when stdin does."""
    # A descriptor of its own: pytest puts something else in stdin's place.
    threading.Thread(target=_wait, args=(os.dup(0),), daemon=True).start()


def _wait(stdin: int) -> None:
    while os.read(stdin, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    tie()
    del sys.argv[0]
    if sys.argv[0] == "--":
        sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
