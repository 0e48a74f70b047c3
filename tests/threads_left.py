"""Runs a module as `python -m` does, and says on stderr how many of gloo's threads outlive their group.

    torchrun --standalone --nproc-per-node 2 -m tests.threads_left MODULE [arguments]

There are some if anybody else holds the group, see bench.charlm.process_group. Python collects no garbage
meanwhile unless it is told to: nobody lets go of the group by luck. Reads Linux's /proc.
"""

import gc
import runpy
import sys
from pathlib import Path

import torch.distributed as dist


def threads() -> int:
    names = ((task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
    return sum("gloo" in name for name in names)


def destroy_process_group() -> None:
    before = threads()
    destroy()
    sys.stderr.write(f"threads of gloo: {before}, then {threads()}\n")


if __name__ == "__main__":
    gc.disable()
    destroy, dist.destroy_process_group = dist.destroy_process_group, destroy_process_group
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
