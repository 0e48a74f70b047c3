"""`python -m bench.gpu` without a GPU: its files, its processes, its choice of configs, its page."""

import json
import subprocess
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from bench import gpu, precompile, verify
from elman import tables, timing, tuning
from elman.kernels import configs

CHIP = replace(configs.CHIPS["sm_90"], name="Test GPU")
BF16 = configs.Problem(16, 32, 1, torch.bfloat16)
LAUNCH = precompile.Launch("resident", BF16, precompile.candidates("resident", BF16, CHIP)[0])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A Run on the interpreter that tunes one key into a table of its own."""
    monkeypatch.setattr(tables, "shipped_path", lambda name: tmp_path / "table.json")
    folder = tmp_path / "card" / "gpu"
    folder.mkdir(parents=True)
    options = {"hidden": (17,), "batches": (1,), "arithmetic": ("bfloat16",), "kernels": ("resident",)}
    return gpu.Run(torch.device("cpu"), CHIP, folder, time.monotonic() + 100, None, **options)


def test_a_killed_run_loses_the_row_in_flight_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    gpu.Journal(path).add(n=1)
    with path.open("a") as file:
        file.write('{"n": 2, "half')
    assert gpu.Journal(path).rows == [{"n": 1}]
    gpu.Journal(path).add(n=3)
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3]


def test_launches_compile_in_processes_that_see_no_gpu():
    """One compiles, one takes too long, one comes after the deadline."""
    target = GPUTarget("cuda", 90, 32)
    (compiled,) = precompile.compile_all([LAUNCH], CHIP, target, 1)
    assert compiled.error == ""
    (late,) = precompile.compile_all([LAUNCH], CHIP, target, 1, limit=0.0)
    assert "not compiled after 0 s" in late.error
    (never,) = precompile.compile_all([LAUNCH], CHIP, target, 1, deadline=time.monotonic())
    assert never.error == "no time was left for it"


def test_a_launch_that_does_not_compile_says_why():
    wrong = replace(LAUNCH, config=replace(LAUNCH.config, BLOCK_B=12))
    (found,) = precompile.compile_all([wrong], CHIP, GPUTarget("cuda", 90, 32), 1)
    assert "power of 2" in found.error


def test_verify_calls_right_right_and_wrong_wrong(monkeypatch):
    cases = list(verify.cases("resident", "bfloat16", CHIP))
    case = next(c for c in cases if c.H == 17 and c.mode == "resets" and not c.backward)
    device = torch.device("cpu")
    assert verify.judge(case, device)["verdict"] == "right"
    sound = verify.run
    for harm, verdict in ((1.01, "imprecise"), (2.0, "wrong"), (float("nan"), "wrong")):
        monkeypatch.setattr(verify, "run", lambda c, n, harm=harm: (sound(c, n)[0] * harm, sound(c, n)[1]))
        assert verify.judge(case, device)["verdict"] == verdict


@pytest.mark.parametrize(
    ("ended", "ago", "verdict"),
    [("status -11", 1, "crashed"), ("the limit", 60, "hung"), ("the limit", 1, "unfinished")],
)
def test_what_ends_a_process_is_a_row_and_the_next_goes_on(run, monkeypatch, ended, ago, verdict):
    path = run.folder / "verify.resident.bfloat16.jsonl"
    case = verify.described(next(verify.cases("resident", "bfloat16", CHIP)))
    skipped = []

    def process(command, timeout, **options):
        skipped.append(int(command[-1]))
        journal = gpu.Journal(path)
        if len(skipped) == 1:
            journal.add(n=0, begins=case, at=time.time() - ago)
            if "limit" in ended:
                raise subprocess.TimeoutExpired(command, timeout)
            return SimpleNamespace(returncode=-11, stderr="Segmentation fault")
        journal.add(n=1, begins=case, at=time.time())
        journal.add(n=1, row={**case, "verdict": "right", "error": 0.0, "bar": 1.0, "nn_rnn": None})
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", process)
    said = gpu._verify(run, "resident", "bfloat16", time.monotonic() + 60)
    assert skipped == [0, 1]
    assert f"'{verdict}': 1, 'right': 1" in said or f"'right': 1, '{verdict}': 1" in said


def test_tune_keeps_every_time_and_a_wrong_candidate_never_wins(run, monkeypatch):
    first, second = tuning.work("resident", replace(BF16, B=8, H=17), CHIP)[1][:2]

    def measure(kernel, problem, tried, device):
        return [[1.0 + tried.index(config)] * 25 for config in tried]

    def judge(case, device):
        return {
            "verdict": "wrong" if case.config == first else "right",
            "error": 1.0,
            "bar": 1.0,
            "nn_rnn": None,
        }

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(verify, "judge", judge)
    gpu.stage_tune(run)
    rows = gpu.Journal(run.folder / "tune.jsonl").rows
    assert [row["backward"] for row in rows] == [False, True]
    assert rows[0]["config"] == asdict(second)
    entry = tables.read(tables.shipped_path(""), CHIP.name).entries[
        tables.key_of("resident", replace(BF16, B=8, H=17))
    ]
    assert entry.config == second
    assert len(entry.times) == len(rows[0]["candidates"]) - 1
    gpu.stage_tune(run)  # goes on: nothing is left to do
    assert gpu.Journal(run.folder / "tune.jsonl").rows == rows
    (run.folder / "machine.json").write_text(
        json.dumps(
            {"machine": {"gpu": "Test GPU", "cpu": ""}, "software": {}, "date": "now", "commit": "abc"}
        )
    )
    text = gpu.page(run.folder)
    assert "# Test GPU" in text
    assert "| bfloat16 | 8 | 17 | forward | 1.00 |" in text


def test_what_is_packed_comes_home(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.Journal(run.folder / "rows.jsonl").add(n=1)
    gpu.pack(replace(run, output=tmp_path / "out"))
    (packed,) = (tmp_path / "out").iterdir()
    assert packed.stat().st_size < 2**24
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(gpu, "ROOT", home)
    gpu.unpack(tmp_path / "out")
    assert gpu.Journal(home / "card" / "gpu" / "rows.jsonl").rows == [{"n": 1}]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err
