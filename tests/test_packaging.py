"""The wheel and the sdist: what is in them, and that an installed copy works away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), the wheel built from the sdist, as for a release."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def modules(folder):
    return sorted(path.name for path in (ROOT / folder).glob("*.py"))


def printed(arguments: list[str], folder: Path, **environment: str) -> str:
    """What Python printed in that folder, once it has ended well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_elman_alone(built):
    names = [name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name]
    expected = [f"elman/{name}" for name in modules("elman")]
    expected += [f"elman/kernels/{name}" for name in modules("kernels")]
    expected += [f"elman/tuned/{table.name}" for table in ROOT.glob("elman/tuned/*.json")]
    # The C source, and nothing that is compiled of it.
    assert sorted(names) == sorted([*expected, "elman/py.typed", "elman/kernels/native.c"])
    assert built[0].name.endswith("-py3-none-any.whl")


def test_wheel_states_licence_and_dependencies(built):
    wheel = zipfile.ZipFile(built[0])
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    requires = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    always = [line for line in requires if "extra ==" not in line]
    assert len(always) == 2
    assert always[0].startswith("Requires-Dist: torch")
    assert always[1].startswith("Requires-Dist: triton")
    assert "platform_machine" in always[1]
    assert "License-Expression: MIT" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_sdist_builds_without_the_checkout(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {f"kernels/{name}" for name in modules("kernels")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "elman/py.typed", "kernels/native.c"} <= names


def test_installed_copy_works_elsewhere(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = """
import importlib.util, pathlib, torch, elman, elman.kernels.step
site = pathlib.Path(elman.__file__).parents[1]
assert pathlib.Path(elman.kernels.step.__file__) == site / "elman" / "kernels" / "step.py"
assert importlib.util.find_spec("kernels") is None
with elman.use_backend("triton"):
    print(elman.Elman(3, 4)(torch.ones(2, 1, 3))[0].shape)
"""
    said = printed(["-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"), TRITON_INTERPRET="1")
    assert said.strip() == "torch.Size([2, 1, 4])"


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler")
def test_an_installed_copy_compiles_its_own_source(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = """
import torch, elman
from elman import compiled
print(compiled.SOURCE)
print(elman.Elman(3, 4, backend="native")(torch.ones(2, 1, 3))[0].shape)
"""
    site, cache = tmp_path / "site", tmp_path / "cache"
    said = printed(["-c", code], tmp_path, PYTHONPATH=str(site), ELMAN_CACHE_DIR=str(cache))
    assert said.splitlines() == [str(site / "elman" / "kernels" / "native.c"), "torch.Size([2, 1, 4])"]
    assert len(list((cache / "native").iterdir())) == 1


def test_a_checkout_without_symlinks_runs_eager(tmp_path):
    """As on Windows, where git writes a text file with the symlink's target."""
    shutil.copytree(
        ROOT / "elman", tmp_path / "elman", ignore=shutil.ignore_patterns("kernels", "__pycache__")
    )
    (tmp_path / "elman" / "kernels").write_text("../kernels")
    code = """
import pathlib, torch, elman
assert pathlib.Path(elman.__file__).parents[1] == pathlib.Path.cwd()
assert issubclass(elman.DeviceHangError, RuntimeError)
layer, x = elman.Elman(3, 4), torch.ones(2, 1, 3)
layer(x)[0].sum().backward()
assert layer.weight_hh_l0.grad.abs().sum() > 0
elman.ElmanCell(3, 4)(x[0])
try:
    elman.Elman(3, 4, backend="triton")(x)
except elman.BackendUnavailableError as error:
    print(error)
"""
    # Without site, which would find the package that is installed from the checkout.
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    for arguments in (["-c", code], ["-m", "elman", "doctor"]):
        said = printed(["-S", *arguments], tmp_path, PYTHONPATH=path)
        assert "is no folder: it is a symlink to ../kernels" in said
        assert "core.symlinks true" in said


def test_runs_in_place_from_the_root():
    done = subprocess.run(
        [sys.executable, "-m", "elman", "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Backends" in done.stdout
