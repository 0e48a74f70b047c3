"""Training on 2 processes: DDP, FSDP2 and checkpoints."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import elman
from tests.helpers import check
from tests.tolerances import tolerance

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp

from tests import distributed_programs as programs

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """What a launch on 2 processes said; `output` is all of it, of a failed process too."""

    returncode: int
    stdout: str
    output: str

    def lines(self) -> dict[str, dict]:
        """The checks' lines by name."""
        lines = (json.loads(line) for line in self.stdout.splitlines() if line.startswith("{"))
        return {line["check"]: line for line in lines}


def launch(module: str, *arguments: object) -> Run:
    """`torchrun -m module arguments` on 2 processes of this machine, each of one thread.

    The processes end themselves after programs.LIMIT seconds, whatever happens to torchrun.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONWARNINGS")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine may not know its own name
    options = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=programs.LIMIT + 60
    )
    return Run(done.returncode, done.stdout, done.stdout + done.stderr)


ON_TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=ON_TWO_GPUS)])
def trained(request, tmp_path_factory) -> tuple[Run, Path]:
    """One launch for all checks, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    return launch("tests.distributed_programs", folder, "--device", request.param), folder


FACTS = {
    "ddp_of_compiled": {"graphs": 1},
    "fsdp": {"rows": [3, 2]},
    "fsdp_of_nn_rnn": {"rows": [3, 2]},
    "fsdp_in_bfloat16": {"rows": [3, 2], "dtypes": ["torch.bfloat16"]},
}


@pytest.mark.parametrize("name", programs.CHECKS)
def test_two_processes_train_as_one_with_nn_rnn(name, trained):
    """Every gradient, and every parameter after some steps. The errors' bound is that of one process."""
    run, _ = trained
    assert name in run.lines(), run.output
    line = run.lines()[name]
    assert any(what.startswith("gradient of ") for what in line["errors"])
    assert any(what.startswith("trained ") for what in line["errors"])
    wrong = {what: e for what, e in line["errors"].items() if not e <= tolerance(torch.float32)}
    assert not wrong
    facts = line.get("facts")
    if name == "ddp_compiled":
        assert facts["graphs"] > 1, "PyTorch cut no graph between DDP's buckets"
    else:
        assert facts == FACTS.get(name)


def test_the_launch_ends_well(trained):
    run, _ = trained
    assert run.returncode == 0, run.output
    assert run.lines().keys() == programs.CHECKS.keys()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit:UserWarning")
@pytest.mark.parametrize("kind", [elman.Elman, nn.RNN])
def test_a_checkpoint_of_two_processes_is_read_by_one(kind, trained):
    run, folder = trained
    assert "fsdp" in run.lines(), run.output
    model = programs.Tagger(kind)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    check(model.state_dict(), torch.load(folder / "expected.pt"), tolerance(torch.float32))
