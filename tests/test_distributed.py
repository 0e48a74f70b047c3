"""Training on 2 processes: DDP, FSDP2 and checkpoints; and swapped.py, which does all that at once."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

import elman
from bench import charlm
from tests.helpers import RHYME, check
from tests.tolerances import LOSS_CURVE, tolerance

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp

from tests import distributed_programs as programs
from tests import swapped

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
    with start(module, *arguments, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=programs.LIMIT + 60)
    return Run(process.returncode, out, out + err)


def start(module: str, *arguments: object, **options: object) -> subprocess.Popen:
    """What launch() waits for; unless options say otherwise, its errors are among its output."""
    run = [sys.executable, "-m", "torch.distributed.run"]
    run += ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "-m", module]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen([*run, *map(str, arguments)], cwd=ROOT, env=environment(), text=True, **pipes)


def environment() -> dict[str, str]:
    """A process's of a group, as a launch has it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONWARNINGS")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kept["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"  # see the fixture fresh_compiler
    if sys.platform == "linux":
        kept["GLOO_SOCKET_IFNAME"] = "lo"  # the machine may not know its own name
    return kept


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
    """Up to Python's own end, which these processes leave out; those of swapped.py do not."""
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


@pytest.mark.parametrize(
    ("compiler", "device"),
    [
        ("aot_eager", "cpu"),
        pytest.param(
            "inductor", "cpu", marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
        ),
        pytest.param("inductor", "cuda", marks=ON_TWO_GPUS),
    ],
)
def test_a_model_swapped_compiled_trained_and_exported(compiler, device):
    """On 2 processes: the script's own model, two layers, both directions, with dropout."""
    run = launch(
        "tests.swapped", "--compile-backend", compiler, "--device", device, "--limit", programs.LIMIT
    )
    assert run.returncode == 0, run.output
    assert f"replaced rnn; compiled by {compiler}" in run.output
    assert "exported; calls of elman::layer: 2; B and T may change" in run.output
    assert "the export's result 1 of 1, (9, 13, 5)" in run.output


# The script's parts, in this process, which is a group of its own


@pytest.fixture
def alone(fresh_compiler):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def swap(model: str, *arguments: str) -> int:
    """The script's exit status."""
    words = ["--model", f"{__name__}:{model}", "--compile-backend", "aot_eager", "--steps", "3", *arguments]
    return swapped.run(swapped.parser().parse_args(words), torch.device("cpu"))


class Streaming(nn.Module):
    """x (T, B, 3), hx (2, B, 4) -> y (T, B, 4), the next hx; a weight of the layer is parametrized."""

    def __init__(self):
        super().__init__()
        self.rnn = parametrizations.weight_norm(nn.RNN(3, 4, num_layers=2), "weight_hh_l1")

    def forward(self, x, hx):
        return self.rnn(x, hx)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4, nonlinearity="relu")

    def forward(self, x):
        h = None
        for step in x.unbind(0):
            h = self.cell(step, h)
        return {"last": h}


def streaming():
    return Streaming(), (torch.randn(5, 6, 3), torch.randn(2, 6, 4))


def itself():
    return nn.RNN(3, 4, nonlinearity="relu"), (torch.randn(5, 6, 3),)


def loop():
    return Loop(), (torch.randn(5, 6, 3),)


def plain():
    return nn.Linear(3, 4), (torch.randn(5, 3),)


def a_list():
    return Loop(), [torch.randn(5, 6, 3)]


def restless():
    with torch.random.fork_rng():
        torch.seed()
        return nn.RNN(3, 4), (torch.randn(5, 6, 3),)


def counting():
    class Count(Loop):
        def forward(self, x):
            super().forward(x)
            return x.numel()

    return Count(), (torch.randn(5, 6, 3),)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("model", "dims", "said", "calls"),
    [
        ("streaming", ["TBi", "lBh"], "replaced rnn; ", 2),
        ("itself", ["tBi"], "replaced the model itself; ", 1),
        ("loop", ["tBi"], "replaced cell; ", 0),
    ],
)
def test_the_script_takes_other_models(model, dims, said, calls, capsys):
    assert swap(model, "--dims", *dims) == 0
    assert (out := capsys.readouterr().out).startswith(said)
    assert f"exported; calls of elman::layer: {calls}; " in out
    results = 1 if model == "loop" else 2
    assert f"the export's result {results} of {results}, " in out


@pytest.mark.usefixtures("alone")
def test_the_script_fails_beyond_its_tolerance(capsys):
    assert swap("streaming", "--dims", "TBi", "lBh", "--tolerance", "1e-12") == 1
    assert "  too much\n" in capsys.readouterr().out


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_the_script_finds_a_layer_that_computes_something_else(wrong, capsys):
    """By one thousandth, in the output or only in its gradients, which one step of training shows."""
    true = elman.Elman.forward

    def off(self, *arguments):
        output, h_n = true(self, *arguments)
        more = output.detach() if wrong == "forward" else output - output.detach()
        return output + 1e-3 * more, h_n

    with mock.patch.object(elman.Elman, "forward", off):
        status = swap("streaming", "--dims", "TBi", "lBh", "--compile-backend", "eager", "--steps", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("  too much")]
    assert status == 1
    found = {line.partition(",")[0] for line in lines}
    assert found >= {"first gradient", "trained parameter"}
    assert ("loss" in found) is (wrong == "forward")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("model", "dims", "message"),
    [
        ("plain", ["Bi"], "has no nn.RNN and no nn.RNNCell in it; expected one at least"),
        ("a_list", ["tBi"], "returned a list of inputs; expected a tuple of tensors"),
        ("restless", ["TBi"], "made other weights when called again"),
        ("counting", ["tBi"], "the model returned no floating tensor"),
        (
            "streaming",
            ["TBi"],
            r"--dims is TBi; expected a word for each input, of shapes \(5, 6, 3\), \(2, 6, 4\)",
        ),
        ("loop", ["tBi", "B"], "--dims is tBi B; expected a word for each input"),
        ("loop", ["tBij"], "--dims is tBij; expected a word for each input"),
        ("loop", ["tbi"], "--dims is tbi, and B is in none; expected one size"),
        ("streaming", ["TBi", "TBh"], "--dims is TBi TBh, and T is 2 and 5; expected one size"),
    ],
)
def test_the_script_says_what_is_wrong(model, dims, message):
    with pytest.raises(SystemExit, match=message):
        swap(model, "--dims", *dims)


def test_the_script_needs_a_row_for_each_process():
    with mock.patch.object(dist, "get_world_size", return_value=7):
        swapped.check_sizes((torch.empty(5, 7),), ["TB"])
        with pytest.raises(SystemExit, match="the batch has 6 rows; expected one for each process at least"):
            swapped.check_sizes((torch.empty(5, 6),), ["TB"])


def test_the_script_switches_cudnn_s_dropout_off(capsys):
    models = [nn.Sequential(nn.RNN(3, 4, 2, dropout=0.5), nn.RNNCell(3, 4)) for _ in range(2)]
    with mock.patch.object(dist, "get_rank", return_value=0):
        swapped.switch_dropout_off(models, ["0", "1"])
    assert [model[0].dropout for model in models] == [0, 0]
    assert capsys.readouterr().out == "the dropout of 0 is off: cuDNN draws masks of its own\n"


def test_without_a_compiler_the_script_says_what_it_takes(capsys):
    with mock.patch.object(dist, "get_rank", return_value=0):
        with mock.patch.object(shutil, "which", lambda name: name if name == "clang++" else None):
            assert swapped.default_backend() == "inductor"
        assert capsys.readouterr().out == ""
        with mock.patch.object(shutil, "which", return_value=None):
            assert swapped.default_backend() == "aot_eager"
    assert "aot_eager in place of inductor: neither of " in capsys.readouterr().out


def test_a_failed_process_is_shown():
    """And torchrun's status says so."""
    run = launch("tests.swapped", "--model", "nowhere")
    assert run.returncode != 0
    assert "--model is 'nowhere'; expected package.module:function" in run.output


SIZES = {"hidden": 16, "layers": 2, "embedding": 4, "batch": 4, "window": 7, "length": 20}
MODEL = [f"--{name}={size}" for name, size in SIZES.items()]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=ON_TWO_GPUS)])
def language_models(request, tmp_path_factory) -> tuple[Run, Path]:
    """Language models of one process and of two, 60 steps: past the columns' end; and what two said."""
    folder = tmp_path_factory.mktemp("charlm")
    text = folder / "rhyme.txt"
    text.write_text(RHYME, encoding="utf-8")
    options = ["--device", request.param, "--text", str(text), *MODEL]
    assert charlm.main([*options, "--folder", str(folder / "one"), "--steps", "60"]) == 0
    shutil.copytree(folder / "one", folder / "begun")
    options += ["--folder", str(folder / "two"), "--steps", "60"]
    watched = ["tests.threads_left", "bench.charlm"] if sys.platform == "linux" else ["bench.charlm"]
    return launch(*watched, *options), folder


def saved_in(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_language_model_on_two_processes_has_the_losses_of_one(language_models):
    """The same global batches, state carried over in each process, one dropout for all."""
    run, folder = language_models
    assert run.returncode == 0, run.output
    one, two = saved_in(folder / "one"), saved_in(folder / "two")
    assert one["training"]["offset"] != 0, "the columns were not cut anew"
    assert two["losses"] == pytest.approx(one["losses"], abs=LOSS_CURVE)
    assert two["training"]["state"].shape == one["training"]["state"].shape == (2, 4, 16)
    assert two["held_out"][-1][2] == pytest.approx(one["held_out"][-1][2], abs=1e-4)
    assert run.stdout.count("Held out: ") == 2, "one process speaks, at the beginning and at the end"
    assert re.search(r"Backend: (native|eager|.*cuda:0).*, 2 processes\.", run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_holds_the_group_when_it_is_destroyed(language_models):
    """Or PyTorch aborts the process, or hangs; seldom, so the cause is looked for, not the effect."""
    run, _ = language_models
    if "on cpu" not in run.stdout:
        pytest.skip("nccl's threads are no concern of Python's")
    found = re.findall(r"^threads of gloo: (\d+), then (\d+)$", run.output, re.MULTILINE)
    assert len(found) == 2, run.output
    for before, after in found:
        assert int(before) > 0, "gloo's threads have other names now"
        assert int(after) == 0


def test_after_an_exception_the_group_is_left_alone(monkeypatch):
    """What is raised holds the training, which would drop the destroyed group, and hang."""
    monkeypatch.setenv("RANK", "0")
    group = dict.fromkeys(
        ["init_process_group", "get_rank", "get_world_size", "barrier", "destroy_process_group"], mock.DEFAULT
    )
    with mock.patch.multiple(dist, **group) as calls:
        with pytest.raises(KeyboardInterrupt), charlm.process_group(torch.device("cpu")):
            raise KeyboardInterrupt
        assert not calls["barrier"].called
        assert not calls["destroy_process_group"].called
        with charlm.process_group(torch.device("cpu")):
            pass
        assert calls["barrier"].called
        assert calls["destroy_process_group"].called


INTERRUPTED = """
import atexit, signal, sys
from unittest import mock
from bench import charlm, language

def interrupt(training):
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)

atexit.register(print, "Python's own end")
with mock.patch.object(language.Training, "step", interrupt):
    sys.exit(charlm.main(sys.argv[1:]))
"""


def test_the_third_ctrl_c_keeps_its_status(language_models, tmp_path):
    """Python's own end, with the group left behind, would now and then be an abort."""
    _, folder = language_models
    options = ["--text", folder / "rhyme.txt", "--device", "cpu", *MODEL, "--steps=9", "--folder", tmp_path]
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, options)],
        cwd=ROOT,
        env=environment() | group,
        capture_output=True,
        text=True,
        timeout=programs.LIMIT,
    )
    assert run.returncode == 130, run.stderr
    assert run.stderr.endswith("ended at once\n")
    assert "Python's own end" not in run.stdout


def test_two_processes_go_on_where_one_has_stopped(language_models):
    _, folder = language_models
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    options = ["--device", device, "--text", folder / "rhyme.txt", "--resume", "--steps", "90"]
    run = launch("bench.charlm", *options, "--folder", folder / "begun")
    assert run.returncode == 0, run.output
    options = list(map(str, options))
    assert charlm.main([*options, "--folder", str(folder / "two")]) == 0
    begun, two = saved_in(folder / "begun"), saved_in(folder / "two")
    assert len(two["losses"]) == 90
    assert begun["losses"] == pytest.approx(two["losses"], abs=LOSS_CURVE)


def test_columns_that_two_processes_can_not_share(language_models):
    _, folder = language_models
    run = launch(
        "bench.charlm",
        "--text",
        folder / "rhyme.txt",
        "--batch",
        "3",
        "--window",
        "7",
        "--folder",
        folder / "none",
    )
    assert run.returncode != 0
    assert "batch is 3 and there are 2 processes; expected columns for each" in run.output


@pytest.mark.skipif(sys.platform == "win32", reason="signals to other processes are of POSIX")
def test_ctrl_c_ends_both_processes_with_one_checkpoint(language_models, tmp_path):
    """The terminal sends it to torchrun and to both processes, and torchrun sends it to both again."""
    _, folder = language_models
    options = [
        "--device",
        "cpu",
        "--text",
        folder / "rhyme.txt",
        *MODEL,
        "--folder",
        tmp_path,
        "--minutes",
        "3",
    ]
    with start("bench.charlm", *options, start_new_session=True) as process:
        seen = list(itertools.takewhile(lambda line: not line.startswith("Held out: "), process.stdout))
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert "Stopped at step " in said, [*seen, said]
    assert "terminate called" not in said
    assert len(saved_in(tmp_path)["losses"]) % 10 == 0
