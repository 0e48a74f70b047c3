"""The gradient over time, measured: how much of a change in h_t is left in h_T.

    python -m bench.gradients [--hidden 128 --steps 100 --seeds 10 --sigma 0.01 --recurrent normal]

prints a table and draws docs/gradients.png: the norm of dh_T/dh_t against T - t, for tanh and relu and for a
W_hh of spectral radius 0.5, 1 and 1.5, from the layer's own backward.

The norm is the spectral one, the largest singular value: by how much the change in h_t that grows most has
grown. All is float64: float32 ends at 1.4e-45, which relu at radius 0.5 comes to.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from bench.page import NEEDS_MATPLOTLIB
from elman import Elman, ElmanCell, initialize
from elman.initialization import RECURRENT

RADII = (0.5, 1.0, 1.5)
NONLINEARITIES = ("tanh", "relu")
# How each radius is drawn: they differ by dashes and in grey too.
LOOKS = {0.5: ("#0068b5", (0, (1, 1))), 1.0: ("#000000", "-"), 1.5: ("#e07a00", (0, (7, 2)))}
THIN = (0, (5, 4))
LOST = torch.finfo(torch.float32).eps / 2  # 1 + LOST is 1 in float32, rounded to even
PICTURE = Path(__file__).parents[1] / "docs" / "gradients.png"

Curves = dict[tuple[str, float], Tensor]  # by nonlinearity and radius: (seeds, T), at T - t = 1, 2 ... T


def make_layer(w_hh: Tensor, nonlinearity: str, backend: str = "auto") -> Elman:
    """A layer without bias, W_hh as given, (H, H), and W_ih the identity: z_t = x_t + W_hh h_{t-1}."""
    H = len(w_hh)
    layer = Elman(
        H, H, nonlinearity=nonlinearity, bias=False, device=w_hh.device, dtype=w_hh.dtype, backend=backend
    )
    layer.load_state_dict({"weight_ih_l0": torch.eye(H), "weight_hh_l0": w_hh})
    return layer


def jacobians(layer: Elman, inputs: Tensor) -> Tensor:
    """dh_T/dh_t at T - t = 1, 2 ... T, (T, H, H), from one backward pass of a layer of make_layer, h_0 = 0.

    inputs (T, H). The batch has H equal rows, and row n is asked for the gradient of the n-th number of
    h_T. As W_ih is the identity, the gradient of x_t is then dh_T/dz_t, with z_t what the activation is
    taken of, and dh_T/dh_{t-1} = dh_T/dz_t W_hh.
    """
    H = layer.hidden_size
    x = inputs[:, None].repeat(1, H, 1).requires_grad_()
    _, h_n = layer(x)
    (dz,) = torch.autograd.grad(h_n[0], x, torch.eye(H, device=x.device, dtype=x.dtype))
    return (dz @ layer.get_parameter("weight_hh_l0").detach()).flip(0)


def norms(
    hidden: int, steps: int, seed: int, nonlinearity: str, radius: float, recurrent: str, sigma: float
) -> Tensor:
    """The spectral norm of dh_T/dh_t at T - t = 1, 2 ... T, (T,), inputs from N(0, sigma^2).

    The same seed gives the same inputs, and the same W_hh but for its scale, whatever the radius and the
    nonlinearity.
    """
    generator = torch.Generator().manual_seed(seed)
    cell = ElmanCell(hidden, hidden, bias=False, dtype=torch.float64)
    initialize(cell, recurrent, radius=radius, generator=generator)
    inputs = sigma * torch.randn(steps, hidden, generator=generator, dtype=torch.float64)
    return torch.linalg.matrix_norm(jacobians(make_layer(cell.weight_hh, nonlinearity), inputs), ord=2)


def spread(curve: Tensor) -> Tensor:
    """The 10th percentile, the median and the 90th percentile over the seeds: (seeds, T) to (3, T)."""
    return curve.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=curve.dtype), dim=0)


def table(curves: Curves) -> str:
    """A line for each nonlinearity and radius: the median (p10 to p90) at some distances."""
    steps = next(iter(curves.values())).shape[1]
    shown = sorted({n for n in (1, 10, 50) if n < steps} | {steps})
    body = []
    for (nonlinearity, radius), curve in curves.items():
        low, middle, high = spread(curve)
        cells = [f"{middle[n - 1]:.2g} ({low[n - 1]:.2g} to {high[n - 1]:.2g})" for n in shown]
        body.append([nonlinearity, f"{radius:g}", *cells, f"{radius**steps:.2g}"])
    headers = ["", "radius", *(f"T - t = {n}" for n in shown), f"radius^{steps}"]
    return tabulate(
        body, headers, "simple", disable_numparse=True, colalign=["left"] + ["right"] * (len(shown) + 2)
    )


def draw(curves: Curves, path: Path, held: Sequence[str]) -> None:
    """The picture, a panel for each nonlinearity. held: what was held constant, lines below the title."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, NullLocator

    from bench import plots

    seeds, steps = next(iter(curves.values())).shape
    distances = range(steps + 1)
    with plots.style():
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        panels = figure.subplots(1, len(NONLINEARITIES), sharey=True)
        for axis, nonlinearity in zip(panels, NONLINEARITIES, strict=True):
            axis.axhline(LOST, color="#777777", lw=0.8)
            for radius, (colour, dashes) in LOOKS.items():
                # dh_T/dh_T is the identity, of norm 1.
                low, middle, high = ([1.0, *line] for line in spread(curves[nonlinearity, radius]).tolist())
                axis.fill_between(distances, low, high, color=colour, alpha=0.2, lw=0)
                axis.plot(distances, [radius**n for n in distances], color=colour, ls=THIN, lw=0.9)
                axis.plot(distances, middle, color=colour, ls=dashes, lw=2.2)
            axis.set_yscale("log")
            axis.set_xlim(0, steps)
            axis.set_title(nonlinearity)
            axis.set_xlabel("$T - t$, in steps")
            axis.grid(True)
            axis.set_axisbelow(True)
        panels[0].set_ylabel(r"norm of $\partial h_T / \partial h_t$ (its largest singular value)")
        bottom, top = (math.log10(limit) for limit in panels[0].get_ylim())
        every = max(1, 10 * round((top - bottom) / 60))
        ticks = range(every * math.ceil(bottom / every), math.floor(top) + 1, every)
        panels[0].yaxis.set_major_locator(FixedLocator([10.0**tick for tick in ticks]))
        panels[0].yaxis.set_minor_locator(NullLocator())
        for axis, nonlinearity in zip(panels, NONLINEARITIES, strict=True):
            # A radius is named where its line ends, and no two names closer than they are high.
            ends = {radius: spread(curves[nonlinearity, radius])[1, -1].item() for radius in RADII}
            place = -math.inf
            for radius, end in sorted(ends.items(), key=lambda item: item[1]):
                if end > 0:
                    place = max((math.log10(end) - bottom) / (top - bottom), place + 0.045)
                    style = {"color": LOOKS[radius][0], "weight": "bold", "va": "center"}
                    axis.text(1.015, place, f"{radius:g}", transform=axis.transAxes, **style)
        said = {
            "s": f"{LOST:.0e}: all below is lost when float32 adds it to 1",
            "ha": "right",
            "va": "bottom",
        }
        panels[0].text(0.985, LOST, fontsize=9, transform=panels[0].get_yaxis_transform(), **said)
        radii = [
            Line2D([], [], color=colour, ls=dashes, lw=2.2, label=f"spectral radius {radius:g}")
            for radius, (colour, dashes) in LOOKS.items()
        ]
        label = f"{seeds} seeds: their median, and p10 to p90" if seeds > 1 else "one seed"
        band = Patch(color="#000000", alpha=0.2, lw=0, label=label)
        power = Line2D([], [], color="#000000", ls=THIN, lw=0.9, label="radius$^{T - t}$")
        handles = [radii[0], band, radii[1], power, radii[2]]  # columns of two
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, handlelength=3.6)
        figure.suptitle("\n".join(["How much of a change in $h_t$ is left in $h_T$", *held]))
        plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gradients",
        description="Measure the norm of dh_T/dh_t for tanh and relu and three spectral radii, and draw it.",
    )
    parser.add_argument("--hidden", type=int, default=128, help="hidden size H (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="sequence length T (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=10, help="draws of W_hh and inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--sigma", type=float, default=0.01, help="standard deviation of the inputs (default: %(default)s)"
    )
    parser.add_argument("--recurrent", choices=RECURRENT, default="normal", help="how W_hh is drawn")
    parser.add_argument(
        "--output", type=Path, default=PICTURE, help="the picture (default: docs/gradients.png)"
    )
    options = parser.parse_args()
    for name, least in (("hidden", 1), ("steps", 2), ("seeds", 1)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name} is {value}; expected at least {least}")
    if not 0 <= options.sigma < math.inf:
        parser.error(f"--sigma is {options.sigma}; expected a number from 0 up")
    if not options.output.parent.is_dir():
        parser.error(f"--output is in {options.output.parent}, which is no folder; make it first")
    H, T, sigma, recurrent = options.hidden, options.steps, options.sigma, options.recurrent
    curves: Curves = {}
    for nonlinearity in NONLINEARITIES:
        for radius in RADII:
            print(f"{nonlinearity}, spectral radius {radius:g}", file=sys.stderr)
            drawn = [
                norms(H, T, seed, nonlinearity, radius, recurrent, sigma) for seed in range(options.seeds)
            ]
            curves[nonlinearity, radius] = torch.stack(drawn)
    print(table(curves))
    held = [
        f"Held constant: H = {H}, T = {T}, $h_0$ = 0, no bias, W_hh {recurrent} and scaled to its radius,",
        f"inputs from N(0, {sigma:g}$^2$), "
        + ("so small that only W_hh can saturate tanh" if sigma <= 0.01 else "which saturate tanh too"),
    ]
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit(NEEDS_MATPLOTLIB)
    draw(curves, options.output, held)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
