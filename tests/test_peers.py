"""The peers, on packages that stand in for them: their signatures and layouts, computed in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.contenders import Contender, Problem
from bench.peers import PEERS, Peer
from bench.workloads import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BY_NAME = {peer.name: peer for peer in PEERS}
# Sizes that all differ, so that no two axes can be mistaken for each other.
SHAPE = Workload(3, 5, 4, 16, dtype="float64")

# What each stands for was read in the versions that bench/peers.py names. They take what the real ones take
# and no more, and return what those return; the arithmetic is the naive loop's.

FLAG_GEMS = {
    "__init__.py": """
        from .ops import rnn_tanh, rnn_tanh_data

        def enable(*arguments, **options):
            raise AssertionError("it would patch all of torch")

        only_enable = use_gems = enable
    """,
    "ops/__init__.py": "from .rnn_tanh import rnn_tanh, rnn_tanh_data",
    "ops/rnn_tanh.py": """
        import torch

        def rnn_tanh(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
            assert isinstance(params, tuple) and has_biases and dropout == 0 and not batch_first
            return torch.rnn_tanh(input, hx, params, True, num_layers, 0.0, train, bidirectional, False)

        def rnn_tanh_data(
            data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional
        ):
            assert data.ndim == 2 and batch_sizes.device.type == "cpu" and hx.shape[1] == batch_sizes[0]
            return torch.rnn_tanh(
                data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional
            )
    """,
}

XMA = {
    "__init__.py": "",
    "layers/__init__.py": "from .rnn import rnn",
    "layers/rnn/__init__.py": "from .op import rnn",
    "layers/rnn/op.py": """
        import torch

        def rnn(
            input,
            weight,
            input_state=None,
            gradient_clipping=None,
            cu_seqlens=None,
            max_seqlen=None,
            *,
            kernel_backend=None,
        ):
            assert gradient_clipping is None and cu_seqlens is None and kernel_backend is None
            B, S, N, H = input.shape
            assert N == 1 and weight.shape == (1, H, H) and input_state.shape == (B, N, H)
            state, states = input_state, []
            for s in range(S):
                state = torch.tanh((state[:, :, None] @ weight)[:, :, 0] + input[:, s])
                states.append(state)
            return torch.stack(states, 1), state
    """,
}

FLASHRNN = {
    "__init__.py": "from .flashrnn import flashrnn",
    "flashrnn/__init__.py": "from .flashrnn import flashrnn",
    "flashrnn/flashrnn.py": """
        import torch

        DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
                  "float64": torch.float64}

        def flashrnn(
            Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"
        ):
            assert function == "elman" and backend == "cuda_fused" and config is None
            B, T, G, N, D = Wx.shape
            assert (G, N) == (1, 1) and R.shape == (G, N, D, D) and b.shape == (G, N, D)
            assert states.shape == (1, B, 1, N, D) and DTYPES[dtype] == Wx.dtype
            state, found = states[0, :, 0], []
            for t in range(T):
                raw = Wx[:, t, 0] + torch.einsum("ndp,bnp->bnd", R[0], state) + b[0]
                state = torch.tanh(raw)
                found.append(state)
            return torch.stack(found, 1)[None], state[None, :, None]
    """,
}

PACKAGES = {"flag_gems": FLAG_GEMS, "xma": XMA, "flashrnn": FLASHRNN}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that holds all three, importable; afterwards nothing of them is left."""
    for package, files in PACKAGES.items():
        for name, text in files.items():
            file = tmp_path / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = text.strip("\n").split("\n")
            indent = len(lines[0]) - len(lines[0].lstrip())
            file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in PACKAGES:
            del sys.modules[name]


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA toolkit, as far as absence() looks."""
    monkeypatch.setattr(peers, "_cuda_toolkit", lambda: True)


def built(peer: Peer, problem: Problem) -> Contender:
    weights = {name: weight.clone().requires_grad_() for name, weight in problem.weights.items()}
    return Contender(
        peer.build(problem, weights),
        x=problem.x.clone().requires_grad_(),
        h0=problem.h0.clone().requires_grad_(),
        weights=weights,
        upstream=problem.upstream,
    )


def assert_right(peer: Peer, workload: Workload) -> None:
    """Results and every gradient of a training step are the reference's, in the forms that nn.RNN has."""
    problem = Problem(workload, CPU)
    truth = problem.truth()
    for pass_name in ("forward", "backward", "training"):
        contender = built(peer, problem)
        found = contender.results(pass_name)
        assert set(found) == ({"output", "h_n"} if pass_name == "forward" else set(truth))
        for name, result in found.items():
            assert isinstance(result, Tensor), f"{name} has no gradient"
            assert result.shape == truth[name].shape, name
            torch.testing.assert_close(
                result, truth[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["flag-gems", "xma", "flashrnn"])
def test_results_and_gradients_are_the_references(name: str):
    assert_right(BY_NAME[name], SHAPE)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "form", [{"layers": 2}, {"bidirectional": True}, {"layers": 2, "bidirectional": True}, {"packed": True}]
)
def test_flag_gems_takes_stacks_both_directions_and_packed_batches(form: dict[str, int]):
    sizes = {"batch": 3, "steps": 5, "input_size": 4, "hidden_size": 16, "dtype": "float64"}
    assert_right(BY_NAME["flag-gems"], Workload(**{**sizes, **form}))


@pytest.mark.usefixtures("installed")
def test_flashrnn_is_told_the_dtype():
    """Its default is bfloat16, whatever the tensors are: the stand-in checks it."""
    for dtype in ("float32", "bfloat16", "float16"):
        contender = built(BY_NAME["flashrnn"], Problem(Workload(2, 3, 4, 16, dtype=dtype), CPU))
        assert contender.results("forward")["output"].dtype == getattr(torch, dtype)


# Who takes no part, and why


def reason(name: str, device: torch.device = CUDA, **form: object) -> str | None:
    fields = {"batch": 16, "steps": 5, "input_size": 64, "hidden_size": 64, "dtype": "bfloat16", **form}
    return BY_NAME[name].absence(Workload(**fields), device)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("flag-gems", "pip install git+https://github.com/flagos-ai/FlagGems (newer than 5.0.2"),
        ("xma", "accelerated-model-architectures (the Xma of PyPI is another project)."),
        ("flashrnn", "pip install flashrnn, beside a CUDA toolkit and g++."),
    ],
)
def test_what_is_not_installed_says_how_to(name: str, how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    for device in (CPU, CUDA):
        said = reason(name, device)
        assert said is not None
        assert said.startswith(f"{name} is not installed; ")
        assert how in said


def test_haste_has_no_elman_rnn():
    for device in (CPU, CUDA):
        said = reason("haste", device)
        assert said is not None
        assert said.startswith("haste has no Elman RNN: its layers are GRU, LSTM, IndRNN")
    with pytest.raises(NotImplementedError, match="haste has no Elman RNN"):
        built(BY_NAME["haste"], Problem(SHAPE, CPU))


@pytest.mark.parametrize(("name", "file"), [("flag-gems", "ops/rnn_tanh.py"), ("xma", "layers/rnn/op.py")])
def test_a_version_without_the_layer_says_so(name: str, file: str, installed: Path):
    """flag-gems 5.0.2 has no rnn_tanh; what PyPI calls Xma has nothing of xma."""
    package = BY_NAME[name].package
    (installed / package / file).unlink()
    said = reason(name)
    assert said is not None
    assert said.startswith(f"The {package} that is installed has no {file}; pip install")


@pytest.mark.usefixtures("installed", "toolkit")
@pytest.mark.parametrize("name", ["flag-gems", "xma", "flashrnn"])
def test_they_need_a_cuda_device(name: str):
    assert reason(name) is None
    assert reason(name, CPU) == f"{name} needs a CUDA device, and this run is on cpu."


@pytest.mark.usefixtures("installed", "toolkit")
@pytest.mark.parametrize(
    ("form", "word", "takers"),
    [
        ({"cell": True, "steps": 1}, "cells", ()),
        ({"packed": True}, "packed batches", ("flag-gems",)),
        ({"layers": 2}, "several layers", ("flag-gems",)),
        ({"bidirectional": True}, "both directions", ("flag-gems",)),
        ({"nonlinearity": "relu"}, "relu", ()),
    ],
)
def test_the_forms_they_have_nothing_for(form: dict[str, object], word: str, takers: tuple[str, ...]):
    for name in ("flag-gems", "xma", "flashrnn"):
        assert reason(name, **form) == (None if name in takers else f"{name} has nothing for {word}.")


@pytest.mark.usefixtures("installed", "toolkit")
def test_the_dtypes_they_have():
    """xma and flashrnn multiply float32 in TF32: beside IEEE products they would be wrong."""
    names, dtypes = ("flag-gems", "xma", "flashrnn"), ("float32", "tf32", "float16", "bfloat16", "float64")
    taken = {name: [dtype for dtype in dtypes if not reason(name, dtype=dtype)] for name in names}
    assert taken == {
        "flag-gems": ["float32", "tf32", "float16", "bfloat16"],
        "xma": ["tf32", "float16", "bfloat16"],
        "flashrnn": ["tf32", "float16", "bfloat16"],
    }
    assert reason("xma", dtype="float32") == "xma computes in tf32, float16, bfloat16, and this is float32."


@pytest.mark.usefixtures("installed", "toolkit")
def test_xma_takes_what_fits_one_program():
    for dtype, most in (("bfloat16", 256), ("tf32", 128)):
        assert reason("xma", dtype=dtype, hidden_size=most) is None
        said = reason("xma", dtype=dtype, hidden_size=most + 1)
        assert said is not None
        assert f"at H = {most + 1} that is" in said
    assert "512 KiB" in str(reason("xma", hidden_size=512))


@pytest.mark.usefixtures("installed", "toolkit")
@pytest.mark.parametrize(
    ("batch", "dtype", "multiple"),
    # Rows are padded to 8, and tiles are 16 x 16, or in the narrow dtypes 8 rows x 32 columns.
    [(16, "bfloat16", 16), (10, "float16", 16), (8, "bfloat16", 32), (1, "float16", 32), (1, "tf32", 16)],
)
def test_flashrnn_takes_multiples_of_its_tiles(batch: int, dtype: str, multiple: int):
    sizes = [H for H in range(8, 100, 8) if not reason("flashrnn", batch=batch, dtype=dtype, hidden_size=H)]
    assert sizes == list(range(multiple, 100, multiple))
    assert f"multiples of {multiple} here" in str(
        reason("flashrnn", batch=batch, dtype=dtype, hidden_size=multiple + 8)
    )


@pytest.mark.usefixtures("installed")
def test_flashrnn_needs_a_cuda_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.shutil, "which", lambda program: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "no CUDA toolkit (nvcc) is found; set CUDA_HOME." in str(reason("flashrnn"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert reason("flashrnn") is None


# Nothing is imported before its time


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("name", ["flag-gems", "xma", "flashrnn"])
def test_absence_imports_nothing_and_build_raises_what_the_import_raises(name: str, installed: Path):
    package = BY_NAME[name].package
    (installed / package / "__init__.py").write_text("raise OSError('libcuda.so.1 is missing')\n")
    assert reason(name) is None
    assert package not in sys.modules
    with pytest.raises(OSError, match=r"libcuda.so.1 is missing"):
        built(BY_NAME[name], Problem(SHAPE, CPU))


def test_each_says_what_differs():
    for peer in PEERS:
        assert peer.differs.endswith(".")
        assert len(peer.differs) > 40
