"""A kernel's forward launch alone, for a profiler: the config that it takes here, B = 16, bfloat16.

ncu --launch-skip 3 --launch-count 1 python -m bench.gpu.one_launch KERNEL H
"""

from __future__ import annotations

import sys

import torch

from elman import timing, tuning
from elman.kernels.configs import Problem

#: Launches before the one that is looked at: the first one compiles.
WARM_UPS = 3


def main(kernel: str, hidden: int, steps: int = 128) -> None:
    device, problem = torch.device("cuda"), Problem(16, hidden, 1, torch.bfloat16)
    config = tuning.known_config(kernel, problem, device)
    launch = timing.launch_of(kernel, problem, steps, device)
    for _ in range(WARM_UPS + 1):
        launch(config)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
