"""What is measured: the shapes and the sweeps. Data, not code.

Shapes: B batch rows, T time steps, I input size, H hidden size. Every weight, input, state and upstream
gradient is random; one layer, one direction, tanh.
"""

from __future__ import annotations

from typing import NamedTuple


class Workload(NamedTuple):
    """One shape: x (T, B, I) to output (T, B, H)."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: str = "float32"

    @property
    def shape(self) -> str:
        """As a person reads it: B=8 T=256 I=512 H=512."""
        return f"B={self.batch} T={self.steps} I={self.input_size} H={self.hidden_size}"

    @property
    def id(self) -> str:
        """As pytest's -k takes it: B8-T256-I512-H512."""
        return self.shape.replace("=", "").replace(" ", "-")

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass, the activation left out."""
        return 2 * self.batch * self.steps * (self.input_size + self.hidden_size) * self.hidden_size


class Sweep(NamedTuple):
    """Shapes, and the seconds of sampling that each contender gets per shape and pass."""

    workloads: tuple[Workload, ...]
    seconds: float


SWEEPS = {
    # For continuous integration: it shows that everything runs, and its numbers mean little.
    "smallest": Sweep(
        (Workload(1, 16, 32, 32), Workload(8, 32, 64, 64)),
        seconds=0.1,
    ),
    # Every B with small, middle and large H; T from 64 to 1024; one H that is no power of two; one
    # narrow input. On two slow cores it has to end within five minutes.
    "quick": Sweep(
        (
            Workload(1, 64, 64, 64),
            Workload(1, 1024, 128, 128),
            Workload(1, 256, 1024, 1024),
            Workload(8, 1024, 64, 64),
            Workload(8, 256, 320, 320),
            Workload(8, 512, 64, 512),
            Workload(32, 128, 128, 128),
            Workload(32, 1024, 256, 256),
            Workload(32, 64, 1024, 1024),
            Workload(128, 256, 64, 64),
            Workload(128, 128, 512, 512),
        ),
        seconds=1.0,
    ),
    # Where the kernels hand over to one another, and where cuDNN has its cliffs. For a GPU.
    "kernels": Sweep(
        tuple(
            Workload(16, 1024, H, H, dtype)
            for dtype in ("bfloat16", "float32")
            for H in (64, 128, 256, 264, 384, 512, 1024, 2048)
        ),
        seconds=1.0,
    ),
}

# What the command line calls a pass, and what the table calls it.
PASSES = {"forward": "forward", "training": "forward+backward"}

# The naive loop says nothing new about large shapes, where it only costs time.
NAIVE_MAX_FLOPS = 1_000_000_000
