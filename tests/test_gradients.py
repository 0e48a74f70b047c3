"""The seeds' lesson on gradients over time: what bench.gradients measures is what autograd says."""

import sys
from pathlib import Path

import pytest
import torch

from bench import gradients
from elman import ElmanCell, initialize, reference
from tests.helpers import DEVICE, check, error
from tests.tolerances import tolerance

ROOT = Path(gradients.__file__).parents[1]
FLOAT64 = {"device": DEVICE, "dtype": torch.float64}


def drawn(H, recurrent="normal", radius=1.0):
    cell = initialize(ElmanCell(H, H, **FLOAT64), recurrent, radius=radius)
    return cell.weight_hh.detach()


def by_reference(w_hh, inputs, nonlinearity):
    """dh_T/dh_t at T - t = 1, 2 ... T: the reference's loop from h_t on, differentiated for each t."""
    T, H = inputs.shape

    def onwards(h, t):
        output, h_n = reference.layer(
            inputs[t:, None],
            h[None, None],
            torch.eye(H, **FLOAT64)[None],
            w_hh[None],
            None,
            None,
            nonlinearity,
        )
        return h_n[0, 0], output[0, 0]

    found, h = [], torch.zeros(H, **FLOAT64)
    for t in range(T):
        found.append(torch.autograd.functional.jacobian(lambda h, t=t: onwards(h, t)[0], h))
        h = onwards(h, t)[1]
    return torch.stack(found).flip(0)


@pytest.mark.parametrize("radius", [0.5, 1.5])
@pytest.mark.parametrize("nonlinearity", gradients.NONLINEARITIES)
def test_jacobians_are_the_reference_s(backend, nonlinearity, radius):
    w_hh, inputs = drawn(6, radius=radius), torch.randn(5, 6, **FLOAT64)
    layer = gradients.make_layer(w_hh, nonlinearity, backend)
    expected = by_reference(w_hh, inputs, nonlinearity)
    actual = gradients.jacobians(layer, inputs)
    assert error(
        torch.linalg.matrix_norm(actual, ord=2), torch.linalg.matrix_norm(expected, ord=2)
    ) <= tolerance(torch.float64)
    for n in range(5):  # each by itself: the largest would hide the smallest
        check({"dh_T/dh_t": actual[n]}, {"dh_T/dh_t": expected[n]}, tolerance(torch.float64))


@pytest.mark.parametrize("radius", gradients.RADII)
def test_without_input_tanh_is_linear(backend, radius):
    """h stays zero, where tanh's slope is 1; all singular values of an orthogonal W_hh are its radius."""
    layer = gradients.make_layer(drawn(6, "orthogonal", radius), "tanh", backend)
    jacobians = gradients.jacobians(layer, torch.zeros(10, 6, **FLOAT64))
    powers = radius ** torch.arange(1, 11, **FLOAT64)
    for singular in torch.linalg.svdvals(jacobians).t():
        torch.testing.assert_close(singular, powers, rtol=1e-13, atol=0)


@pytest.mark.parametrize("radius", gradients.RADII)
def test_an_irnn_of_positive_states_is_linear(backend, radius):
    layer = gradients.make_layer(drawn(6, "identity", radius), "relu", backend)
    norms = torch.linalg.matrix_norm(gradients.jacobians(layer, torch.rand(10, 6, **FLOAT64)), ord=2)
    torch.testing.assert_close(norms, radius ** torch.arange(1, 11, **FLOAT64), rtol=1e-13, atol=0)


def test_a_seed_is_the_same_problem_for_every_radius():
    """Relu's gradients don't depend on the inputs' size, tanh's do."""
    small, large = (
        {act: gradients.norms(8, 5, 0, act, 1.0, "normal", sigma) for act in gradients.NONLINEARITIES}
        for sigma in (0.5, 1.0)
    )
    torch.testing.assert_close(small["relu"], large["relu"], rtol=1e-12, atol=0)
    assert (small["tanh"] > large["tanh"]).all()
    assert not torch.equal(small["relu"], gradients.norms(8, 5, 1, "relu", 1.0, "normal", 0.5))
    # The first step back, where the input is too small for tanh to bend: only the radius differs.
    first = [gradients.norms(8, 2, 0, "tanh", radius, "normal", 1e-9)[0] for radius in (1.0, 0.5)]
    torch.testing.assert_close(first[0], 2 * first[1])


def test_percentiles():
    low, middle, high = gradients.spread(torch.arange(11.0)[:, None].expand(11, 2))
    assert (low.tolist(), middle.tolist(), high.tolist()) == ([1, 1], [5, 5], [9, 9])


def test_table():
    curves = {(act, radius): torch.full((3, 60), radius) for act in ("tanh", "relu") for radius in (0.5, 1.0)}
    lines = gradients.table(curves).splitlines()
    assert [word for word in lines[0].split("  ") if word.strip()][-1].strip() == "radius^60"
    assert [f"T - t = {n}" in lines[0] for n in (1, 10, 50, 60, 100)] == [True, True, True, True, False]
    assert lines[2].split() == ["tanh", "0.5", *["0.5", "(0.5", "to", "0.5)"] * 4, "8.7e-19"]
    assert len(lines) == 6


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench.gradients", "--hidden", "5", "--steps", "12", *options])
    gradients.main()


@pytest.mark.parametrize("recurrent", ["normal", "identity"])
def test_main_draws_the_picture(monkeypatch, capsys, tmp_path, recurrent):
    """Identity with relu and radius 0.5 comes to zeros, which a logarithm has no place for."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    main(monkeypatch, "--seeds", "2", "--recurrent", recurrent, "--output", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split()[-1] == "radius^12"
    assert said.out.splitlines()[-1] == f"Wrote {path}"
    assert said.err.splitlines() == [
        f"{act}, spectral radius {radius:g}" for act in ("tanh", "relu") for radius in (0.5, 1, 1.5)
    ]


def test_one_seed_and_one_unit(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    main(monkeypatch, "--seeds", "1", "--hidden", "1", "--sigma", "0", "--steps", "2", "--output", str(path))
    assert path.exists()


def test_without_matplotlib_there_is_the_table_and_a_word(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--seeds", "1", "--output", str(tmp_path / "picture.png"))
    assert stopped.value.code == "Pictures need matplotlib: pip install 'elman[plots]'"
    assert "T - t = 12" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--hidden", "0"], "--hidden is 0; expected at least 1"),
        (["--steps", "1"], "--steps is 1; expected at least 2"),
        (["--seeds", "0"], "--seeds is 0; expected at least 1"),
        (["--sigma", "-1"], "--sigma is -1.0; expected a number from 0 up"),
        (["--sigma", "nan"], "--sigma is nan; expected a number from 0 up"),
        (["--output", "nowhere/at/all.png"], "--output is in nowhere/at, which is no folder; make it first"),
    ],
    ids=str,
)
def test_wrong_options(monkeypatch, capsys, tmp_path, options, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--output", str(tmp_path / "picture.png"), *options)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_picture_is_there():
    assert gradients.PICTURE == ROOT / "docs" / "gradients.png"
    assert gradients.PICTURE.read_bytes().startswith(b"\x89PNG")
