"""What is measured: the shapes and the sweeps. Data, not code.

Shapes: B batch rows, T time steps, I input size, H hidden size. Every weight, input, state and upstream
gradient is random; tanh unless said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Characters a paragraph of pydoc_data.topics (Python 3.11, 2608 paragraphs): its 1/64, 3/64, ... 63/64
# quantiles. Batches of real text look like this: a third of the rows is over before a tenth of the time.
PARAGRAPHS = (
    *(5, 9, 16, 20, 25, 30, 33, 39, 45, 52, 57, 65, 71, 80, 90, 99),
    *(111, 120, 131, 145, 161, 177, 195, 217, 237, 257, 287, 314, 351, 406, 505, 668),
)

# What a row's arithmetic is called: the storage dtype, but for tf32, which is float32 with PyTorch's switches
# for RNNs and matrix products on; "float32" is with both off.
DTYPES = ("float32", "tf32", "float16", "bfloat16", "float64")

# What the command line calls a pass, and what the table calls it.
PASSES = {"forward": "forward", "backward": "backward", "training": "forward+backward"}

# Large shapes say nothing new about the naive loop, and cost it minutes.
NAIVE_MAX_FLOPS = 1_000_000_000
# torch.compile unrolls the loop: from here on it compiles for minutes.
COMPILED_MAX_STEPS = 64
# The CPU's slice of a sweep: what two cores do in about a second. The rest is for a GPU.
CPU_MAX_FLOPS = 40_000_000_000


@dataclass(frozen=True)
class Workload:
    """One problem: x (T, B, I) to output (T, B, D * H), or for a cell x (B, I) to h (B, H).

    D is 2 if bidirectional. With `packed`, the rows' lengths are spread as PARAGRAPHS are, the longest
    being T, and the batch is a PackedSequence.
    """

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    cell: bool = False
    nonlinearity: str = "tanh"

    @property
    def shape(self) -> str:
        """As a person reads it: B=8 T=256 I=512 H=512, and whatever is unusual. The dtype is not in it."""
        parts = [f"B={self.batch} T={self.steps} I={self.input_size} H={self.hidden_size}"]
        if self.layers > 1:
            parts.append(f"layers={self.layers}")
        parts += [name for name in ("bidirectional", "packed", "cell") if getattr(self, name)]
        if self.nonlinearity != "tanh":
            parts.append(self.nonlinearity)
        return " ".join(parts)

    @property
    def id(self) -> str:
        """As pytest's -k takes it: B8-T256-I512-H512-float32."""
        return f"{self.shape} {self.dtype}".replace("=", "").replace(" ", "-")

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The rows' lengths, the longest first; None if all are T."""
        if not self.packed:
            return None
        B, T, most = self.batch, self.steps, len(PARAGRAPHS)
        picks = [PARAGRAPHS[-1 - i * most // B] for i in range(B)]
        return tuple(max(1, T * pick // PARAGRAPHS[-1]) for pick in picks)

    @property
    def row_steps(self) -> int:
        """Steps, added up over the rows."""
        return self.batch * self.steps if self.lengths is None else sum(self.lengths)

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass, the activation left out."""
        D, H = 1 + self.bidirectional, self.hidden_size
        inputs = self.input_size + (self.layers - 1) * D * H
        return 2 * self.row_steps * D * H * (inputs + self.layers * H)


@dataclass(frozen=True)
class Sweep:
    """Shapes, the seconds of sampling that each contender gets per shape and pass, and what is run of it.

    gpu_dtypes: the dtypes of the shapes on a GPU unless --dtype says others; on a CPU it is float32.
    contenders: names, if not all take part. published: whether its table may stand in results/. takes: how
    long all of it takes, where that is known.
    """

    workloads: tuple[Workload, ...]
    seconds: float = 1.0
    passes: tuple[str, ...] = ("forward", "training")
    gpu_dtypes: tuple[str, ...] = ("bfloat16", "float32", "tf32")
    contenders: tuple[str, ...] | None = None
    published: bool = True
    takes: str = ""


def _square(B: int, T: int, *sizes: int) -> tuple[Workload, ...]:
    """Shapes with I = H."""
    return tuple(Workload(B, T, H, H) for H in sizes)


def _forms(workload: Workload) -> tuple[Workload, ...]:
    """Two layers, both directions, both, and rows of unequal lengths."""
    return (
        replace(workload, layers=2),
        replace(workload, bidirectional=True),
        replace(workload, layers=2, bidirectional=True),
        replace(workload, packed=True),
    )


def _standard() -> tuple[Workload, ...]:
    """Slices through B 1 to 256, H 64 to 2560 and T 50 to 4096: one size changes, the others stay.

    A grid over B and H; then each of H, B and T by itself; the sizes that only fit a GPU's cooperative
    kernel; a narrow input; stacks, both directions, packed batches.
    """
    shapes = [Workload(B, 256, H, H) for B in (1, 8, 32, 128) for H in (64, 128, 256, 512, 1024)]
    shapes += _square(16, 1024, 64, 128, 224, 256, 264, 336, 384, 512, 768, 1024, 1760, 2048, 2560)
    shapes += [Workload(B, 256, 256, 256) for B in (4, 16, 64, 256)]
    shapes += [Workload(16, T, 256, 256) for T in (50, 4096)]
    shapes += _square(16, 50, 1024, 1760, 2048, 2560)
    shapes += [Workload(32, 256, 64, H) for H in (128, 512, 1024)]
    for H in (256, 768):
        shapes += _forms(Workload(16, 256, H, H))
    return tuple(shapes)


SWEEPS = {
    # For continuous integration: it shows that everything runs, and its numbers mean little.
    "smallest": Sweep(
        (Workload(1, 16, 32, 32), Workload(8, 32, 64, 64)),
        seconds=0.1,
        gpu_dtypes=("float32",),
        contenders=("nn.RNN", "native", "eager", "triton:resident", "cudnn", "naive loop"),
        published=False,
        takes="less than a minute",
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
        gpu_dtypes=("bfloat16", "float32"),
        takes="about five minutes on two slow cores",
    ),
    "standard": Sweep(_standard(), passes=("forward", "backward", "training")),
    # What `make gpu` publishes of a new card: the standard shapes, the layer as it is used beside nn.RNN.
    "layer": Sweep(
        _standard(),
        passes=("forward", "training"),
        gpu_dtypes=("bfloat16", "float32", "tf32", "float16"),
        contenders=("nn.RNN", "auto"),
    ),
    # Where the kernels hand over to one another, and where cuDNN has its cliffs; no loop takes part.
    "kernels": Sweep(
        _square(16, 1024, 64, 128, 256, 264, 384, 512, 1024, 2048),
        contenders=("nn.RNN", "auto", "triton:resident", "triton:cooperative", "cudnn"),
    ),
    # DeepBench's vanilla RNNs (training, then its two for devices).
    "deepbench": Sweep(
        (
            *(
                Workload(B, 50, H, H, nonlinearity="relu")
                for H in (1760, 2048, 2560)
                for B in (16, 32, 64, 128)
            ),
            Workload(1, 672, 32, 32, nonlinearity="relu"),
            Workload(1, 96, 64, 64, nonlinearity="relu"),
        ),
        gpu_dtypes=("float16", "float32", "tf32"),
    ),
    # The shapes behind the choice of cuDNN's algorithm for small H (PyTorch's pull request 62143).
    "small-h": Sweep(
        (
            Workload(34, 1406, 120, 120),
            Workload(1, 5826, 160, 160, layers=4),
            Workload(20, 2391, 224, 224, layers=3),
            Workload(16, 4600, 264, 264),
            Workload(3, 1824, 336, 336, layers=3),
            Workload(6, 4814, 360, 360),
            *(Workload(16, 1000, 16, H) for H in (16, 32, 64, 128)),
        ),
        gpu_dtypes=("float16", "bfloat16", "float32"),
    ),
    # FlashRNN's: one head of its 768 / (number of heads), then its batches and its lengths.
    "flashrnn": Sweep(
        (
            *_square(16, 1024, 16, 32, 64, 128, 256, 384, 768),
            *(Workload(B, 1024, 768, 768) for B in (2, 4, 8, 32, 64, 128, 256)),
            *(Workload(16, T, 768, 768) for T in (256, 512, 2048)),
        ),
        gpu_dtypes=("bfloat16",),
    ),
    "haste": Sweep(
        tuple(Workload(B, 50, H, H) for B in (1, 16, 32, 64, 128) for H in (128, 256, 512, 1024, 2048, 4096)),
        gpu_dtypes=("float32", "tf32"),
    ),
    "stacked": Sweep(
        tuple(form for H in (128, 256, 512, 1024) for form in _forms(Workload(32, 256, H, H))[:3]),
    ),
    "packed": Sweep(
        tuple(
            replace(workload, packed=True)
            for B in (8, 32, 128)
            for workload in _square(B, 668, 64, 256, 512, 1024)
        ),
    ),
    # One step, or a few: what generation and reinforcement learning call, once a token or a frame.
    "step": Sweep(
        (
            *(Workload(B, 1, 256, 256, cell=True) for B in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
            *(Workload(B, 1, H, H, cell=True) for H in (64, 1024) for B in (1, 16, 256)),
            *(Workload(B, 1, H, H) for H in (256, 1024) for B in (1, 16, 256)),
            *(Workload(B, T, H, H) for H in (64, 256) for B in (1, 16, 128) for T in (2, 4, 8)),
        ),
        seconds=0.5,
    ),
}


def by_hand(text: str) -> Sweep:
    """The sweep that --shapes "B,T,I,H;B,T,I,H" asks for.

    Raises ValueError for anything else, with the part that is wrong.
    """
    workloads = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            sizes = [int(size) for size in part.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(
                f"--shapes has {part!r}; expected four positive integers B,T,I,H, and ; between shapes: "
                f"--shapes '16,1024,256,256;1,50,64,64'"
            )
        workloads.append(Workload(sizes[0], sizes[1], sizes[2], sizes[3]))
    if not workloads:
        raise ValueError("--shapes is empty; expected B,T,I,H, such as --shapes '16,1024,256,256'")
    return Sweep(tuple(dict.fromkeys(workloads)))
