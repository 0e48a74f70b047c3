"""`python -m bench.gpu` without a GPU: its stages on simulated processes, its rows, page and real parts."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from bench import machine, precompile, rows
from bench.gpu import __main__ as command
from bench.gpu import carry, page, stages, tools, tuner, verify
from bench.gpu import run as runs
from bench.gpu.journal import Journal, in_flight, plain, read
from bench.workloads import Workload
from elman import tables, timing, tuning
from elman.kernels import configs
from elman.kernels.errors import DeviceHangError
from tests import simulated_gpu

ROOT = Path(__file__).parents[1]
CHIP = replace(configs.CHIPS["sm_90"], name="Test GPU")
BF16 = configs.Problem(16, 32, 1, torch.bfloat16)
LAUNCH = precompile.Launch("resident", BF16, precompile.candidates("resident", BF16, CHIP)[0])


# Rows


def test_a_killed_process_loses_the_row_in_flight_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path).add(n=1)
    with path.open("ab") as file:
        file.write('{"n": 2, "half é'.encode()[:-1])
    assert read(path) == [{"n": 1}]
    assert Journal(path).rows == [{"n": 1}]
    Journal(path).add(n=3)
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3]


def test_what_a_process_is_at_is_known_until_it_has_a_row(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    assert in_flight(journal.path) is None
    journal.begin([1, "times"], kernel="resident")
    begun = in_flight(journal.path)
    assert (begun["n"], begun["what"]) == ([1, "times"], {"kernel": "resident"})
    assert 0 <= time.time() - begun["at"] < 60
    journal.add(n=[1, "times"])
    assert in_flight(journal.path) is None


def test_an_error_in_a_row_names_no_path():
    error = RuntimeError(
        "no ptxas at\n/some/where/.triton/bin/ptxas-12.8, see https://a.b/c/d and kernels/x.py"
    )
    assert plain(error) == "RuntimeError: no ptxas at ptxas-12.8, see https://a.b/c/d and kernels/x.py"
    assert len(plain("x" * 1000)) == 500


# Processes


@pytest.mark.parametrize(
    "words", [["endless"], ["--", sys.executable, "endless.py"]], ids=["module", "program"]
)
def test_a_tethered_process_and_its_own_end_with_their_starter(tmp_path, words):
    """The starter is killed; what it started, and what that started, must be gone at once."""
    (tmp_path / "endless.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    starter = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-m', 'bench.gpu.tether', *{words}], stdin=subprocess.PIPE,"
        " start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    paths = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=paths
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    try:
        while left := [pid for pid in pids if _runs(pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.01)
    finally:
        for pid in filter(_runs, pids):
            os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return "(python" in Path(f"/proc/{pid}/stat").read_text() and _state(pid) != "Z"
    except OSError:
        return False


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_launches_compile_in_processes_that_see_no_gpu():
    """One compiles, one takes too long, one comes after the deadline."""
    target = GPUTarget("cuda", 90, 32)
    (compiled,) = precompile.compile_all([LAUNCH], CHIP, target, 1)
    assert compiled.error == ""
    (late,) = precompile.compile_all([LAUNCH], CHIP, target, 1, limit=0.0)
    assert "not compiled after 0 s" in late.error
    (never,) = precompile.compile_all([LAUNCH], CHIP, target, 1, deadline=time.monotonic())
    assert never.error == precompile.NO_TIME


def test_a_launch_that_does_not_compile_says_why():
    wrong = replace(LAUNCH, config=replace(LAUNCH.config, BLOCK_B=12))
    (found,) = precompile.compile_all([wrong], CHIP, GPUTarget("cuda", 90, 32), 1)
    assert "power of 2" in found.error


# The stages, on a GPU that is simulated


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """Makes a Run whose processes are simulated: simulated(minutes, event=...)."""
    for owner, name, value in simulated_gpu.patches():
        monkeypatch.setattr(owner, name, value)

    def make(minutes=1.0, events=(), **fields):
        made = simulated_gpu.run(tmp_path, minutes, **fields)
        monkeypatch.setenv("SIMULATED_FOLDER", str(made.folder))
        (made.folder.parent / "events.json").write_text(json.dumps(dict(events)))
        return made

    return make


def started(run):
    """The command lines of the run's processes, in the order in which they began."""
    return [row for row in read(run.folder.parent / "witness.jsonl") if "started" in row]


def test_stages_run_in_their_order_each_within_its_share(simulated, capsys):
    run = simulated(minutes=1.0)
    assert stages.go(run)
    modules = [row["started"] for row in started(run)]
    kinds = list(dict.fromkeys((m[0], "--first" in m, "--busy" in m) for m in modules))
    names = ["bench.gpu.tuner", "bench.gpu.verify", "bench.gpu.tuner", "bench.gpu.tuner", "pytest", "tool"]
    assert [kind[0] for kind in kinds] == names
    assert [kind[1:] for kind in kinds] == [
        (False, True), (False, False), (True, False), (False, False), (False, False), (False, False),
    ]  # fmt: skip
    # cuDNN alone while the kernels compile, and the floor is never measured twice.
    assert modules[0][modules[0].index("--kernels") + 1] == "cudnn"
    # Every family; the sweeps in their order; what each may take at most.
    assert sorted((m[1], m[2]) for m in modules if m[0] == "bench.gpu.verify") == sorted(stages.families(run))
    sweeps = [m[m.index("--sweep") + 1] for m in modules if m[0] == "pytest"]
    assert sweeps == ["kernels", "layer", "small-h", "deepbench", "flashrnn"]
    # Of what is left when it begins each stage has its share among those that come.
    whole, begin = 60 - runs.KEPT, run.deadline - 60
    ends = {
        m[0] + " --first" * ("--first" in m): float(m[m.index("--until") + 1])
        for m in modules
        if "--until" in m
    }
    verify_, first = (runs.SHARES[name] for name in ("verify", "first"))
    coming = sum(runs.SHARES.values()) - runs.SHARES["compile"]
    assert ends["bench.gpu.verify"] - begin == pytest.approx(whole * verify_ / coming, abs=5)
    assert ends["bench.gpu.tuner --first"] - begin == pytest.approx(whole * first / (coming - verify_), abs=8)
    assert [row["stage"] for row in read(run.folder / "stages.jsonl")] == list(runs.STAGES[1:-1])
    assert "150 of 150 launches are right" in capsys.readouterr().out


def test_a_stage_s_share_is_of_what_is_left_among_those_that_come(simulated):
    run = simulated(minutes=10)
    for stage, coming in (("compile", 100), ("verify", 82), ("tune", 59), ("tools", 9)):
        part = (600 - runs.KEPT) * runs.SHARES[stage] / coming
        assert run.until(stage) - time.monotonic() == pytest.approx(part, abs=1)
    alone = simulated(minutes=10, stages=("machine", "verify", "report"))
    assert alone.until("verify") - time.monotonic() == pytest.approx(600 - runs.KEPT, abs=1)


def test_as_many_families_at_once_as_cores_and_memory_hold(simulated, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 64)
    assert [stages.at_once(simulated(memory_gib=gib)) for gib in (80.0, 8.0, 0.5)] == [14, 8, 1]
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert stages.at_once(simulated(memory_gib=80.0)) == 4


def test_what_the_time_does_not_suffice_for_is_named(simulated, capsys):
    run = simulated(minutes=0.11)  # 6.6 s, of which 6 are kept
    stages.go(run)
    assert time.monotonic() < run.deadline + runs.GRACE
    text = (run.folder.parent / "gpu.md").read_text()
    assert re.search(r"Not done, verify: .*families were not begun", text)
    for name in ("first", "tune", "sweep"):
        assert f"Not done, {name}: " in text
    before = len(read(run.folder / "tune.jsonl"))
    again = simulated(minutes=1.0)
    assert stages.go(again)
    text = (run.folder.parent / "gpu.md").read_text()
    assert "150 of 150 launches are right" in text
    assert "Not done" not in text
    assert len(read(run.folder / "tune.jsonl")) == len(simulated_gpu._keys()) > before


def test_a_family_that_crashes_hangs_or_is_wrong_costs_its_own_rows(simulated, monkeypatch, capsys):
    monkeypatch.setattr(runs, "HANG_SECONDS", 2.0)
    events = {
        "cooperative bfloat16 2": "crashed",
        "step float32 1": "hung",
        "resident bfloat16 4": "wrong",
        "cell float64 0": "status",
    }
    run = simulated(events=events)
    assert stages.go(run)
    text = (run.folder.parent / "gpu.md").read_text()
    assert "146 of 150 launches are right**; 1 crashed, 1 failed, 1 hung, 1 wrong" in text
    assert "| cooperative | 5 right, 1 crashed (0.50) |" in text
    assert "| 5 right, 1 wrong (50.00) |" in text
    assert "crashed: cooperative bfloat16 forward B=9 H=66 D=1 full, its process was ended by SIGSEGV" in text
    assert "hung: step float32 forward B=9 H=65 D=1 full, it took more than 2 s" in text
    assert "failed: cell float64 forward B=9 H=64 D=1 full, its process ended with status 3" in text
    # What crashed or hung is launched no more, what was wrong is: each row of a sweep is checked.
    for row in started(run):
        if row["started"][0] == "pytest":
            assert row["kernels"] == "resident"  # ELMAN_KERNELS
        if "--first" in row["started"]:
            assert row["started"][row["started"].index("--kernels") + 1] == "resident,cudnn"
    assert "of the kernels only resident took part" in text
    assert {row["kernel"] for row in read(run.folder / "tune.jsonl")} == {"resident", "cudnn"}
    bad = {row["verdict"] for row in page.launches(run.folder, command.BAD)}
    assert bad == {"crashed", "failed", "hung", "wrong"}


def test_a_config_that_kills_the_tuner_is_left_out_and_its_kernel_then(simulated, capsys):
    key = "resident forward bfloat16 B=16 H=64"
    run = simulated(events={f"{key} 0": "crashed"})
    stages.go(run)
    (fatal,) = [row for row in read(run.folder / "tune.jsonl") if "row" in row]
    assert fatal["n"] == [key, 0]
    assert fatal["row"]["verdict"] == "crashed"
    keys = [row["key"] for row in read(run.folder / "tune.jsonl") if "key" in row]
    assert len(keys) == len(set(keys))
    assert run.trusted() == ["cooperative", "step"]
    stages.go(simulated(stages=("machine", "report")))
    text = (run.folder.parent / "gpu.md").read_text()
    assert (
        "- crashed: resident bfloat16 forward B=16 H=64 D=1 full, its process was ended by SIGSEGV; BLOCK_B=8"
        in text
    )
    assert page.launches(run.folder, command.BAD)
    # The process that goes on leaves the kernel alone, in the same stage.
    first = [row["started"] for row in started(run) if "--first" in row["started"]]
    assert [words[words.index("--kernels") + 1] for words in first] == [
        "resident,cooperative,step,cudnn",
        "cooperative,step,cudnn",
    ]


def test_a_process_that_dies_before_its_first_row_is_named_and_not_started_for_ever(simulated, capsys):
    run = simulated(
        python=(sys.executable, "-c", "raise SystemExit(7)"), stages=("machine", "verify", "report")
    )
    assert stages.go(run)
    log = run.log.read_text()
    assert log.count("bench.gpu.verify resident bfloat16") == runs.MOST_STARTS
    assert "resident bfloat16: its process ended with status 7" in (run.folder.parent / "gpu.md").read_text()


@pytest.mark.parametrize("stage", ["compile", "verify", "tune"])
def test_ctrl_c_ends_the_processes_and_the_run(simulated, monkeypatch, capsys, stage):
    """Within moments, in a stage of threads too, and nothing counts as crashed or hung."""
    events = {"step tf32 2": "hung", "resident backward bfloat16 B=8 H=64 0": "hung"}
    run = simulated(events=events, stages=("machine", stage))
    sound = stages.STAGE[stage]

    def compile_until_stopped(run, end):
        assert run.stopped.wait(60)

    def interrupted(run):
        main = threading.main_thread().ident
        threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
        return sound(run)

    # A shell that starts the tests in the background lets them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(stages, "_compile", compile_until_stopped if stage == "compile" else stages._compile)
    monkeypatch.setitem(stages.STAGE, stage, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            stages.go(run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() < run.deadline - 30
    simulated_gpu._expect_nobody(run.folder.parent)
    assert not page.launches(run.folder, command.BAD)


def test_a_stage_that_raises_is_a_word_on_the_page_and_the_next_one_runs(simulated, monkeypatch, capsys):
    def broken(run):
        raise ValueError("out of luck")

    monkeypatch.setitem(stages.STAGE, "verify", broken)
    run = simulated()
    assert not stages.go(run)
    text = (run.folder.parent / "gpu.md").read_text()
    assert "Not done, verify: ValueError: out of luck." in text
    assert "**24 keys are timed**" in text
    assert "in broken" in run.log.read_text()


def test_what_an_earlier_run_was_at_is_no_hang_of_this_one(simulated, monkeypatch, capsys):
    """The machine was gone for minutes, and processes take a while to start."""
    monkeypatch.setattr(runs, "HANG_SECONDS", 2.0)
    run = simulated(events={"start": 0.5}, stages=("machine", "verify", "report"))
    path = run.folder / "verify.resident.bfloat16.jsonl"
    Journal(path).begin(0, kernel="resident", arithmetic="bfloat16")
    begun = path.with_name(path.name + ".begun")
    begun.write_text(begun.read_text().replace('"at": ', '"at": 1'))
    begun.write_text(re.sub(r'"at": [0-9.]+', '"at": 1.0', begun.read_text()))
    stages.go(run)
    assert "150 of 150 launches are right" in (run.folder.parent / "gpu.md").read_text()


@pytest.mark.parametrize("stage", ["compile", "verify"])
def test_what_raises_in_a_stage_of_threads_stops_no_later_one(simulated, monkeypatch, capsys, stage):
    def broken(*_):
        raise ValueError("out of luck")

    monkeypatch.setattr(stages, {"compile": "_wanted", "verify": "_verify"}[stage], broken)
    run = simulated()
    assert not stages.go(run)
    text = (run.folder.parent / "gpu.md").read_text()
    assert f"Not done, {stage}: ValueError: out of luck." in text
    assert text.count("Not done") == 1
    assert "**24 keys are timed**" in text


def test_cudnn_s_times_alone_make_a_page(simulated, capsys):
    run = simulated(stages=("machine", "compile", "report"))
    assert stages.go(run)
    assert "**8 keys are timed**." in (run.folder.parent / "gpu.md").read_text()


def test_a_hang_that_the_end_of_its_stage_cuts_short_is_one(simulated, monkeypatch, capsys):
    """Else the next stage would walk into it again."""
    monkeypatch.setattr(runs, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(runs, "GRACE", 0.1)
    run = simulated()
    path = run.folder / "verify.step.tf32.jsonl"
    process = run.start("--", sys.executable, "-c", "import time; time.sleep(600)")
    Journal(path).begin(0, patience=100)
    ended = run.finish(process, time.monotonic() + 2, path)
    assert ended == runs.Ended("hung", "it took more than 1 s, and the time was over")


@pytest.mark.parametrize("compiler", [simulated_gpu.dying_compiler, simulated_gpu.dead_compiler])
def test_a_compiler_that_died_is_a_reason_and_the_next_one_goes_on(monkeypatch, compiler):
    monkeypatch.setattr(precompile, "_work", compiler)
    found = list(precompile.compile_all([LAUNCH] * 2, CHIP, GPUTarget("cuda", 90, 32), 1))
    assert [compiled.error for compiled in found] == ["the compiler died"] * 2


def test_a_sweep_that_is_complete_is_not_made_again(simulated, monkeypatch, capsys):
    run = simulated(stages=("machine", "sweep", "report"))
    monkeypatch.setattr(stages.machine, "software", lambda device: {"torch": "2.11.0"})
    record = {"sweep": "kernels", "device": "cuda", "floor": {}, "partial": "", "missing": "", "date": "now"}
    record |= {"machine": {"gpu": "Simulated GPU", "cpu": "", "cores": 2}, "commit": "abc"}
    record |= {"source": machine.source(), "software": {"torch": "2.11.0"}}
    for name, missing in (("kernels", ""), ("layer", "1 of 2 rows is missing.")):
        table = {name: ({**record, "sweep": name, "missing": missing}, [])}
        path = run.folder.parent / "rows.jsonl"
        rows.write(path, {**(rows.read(path) if path.exists() else {}), **table})
    stages.go(run)
    sweeps = [row["started"][row["started"].index("--sweep") + 1] for row in started(run)]
    assert sweeps == ["layer", "small-h", "deepbench", "flashrnn"]


def test_only_kernels_that_were_right_are_launched_later(simulated, monkeypatch, capsys):
    run = simulated()
    assert run.trusted() == ["resident", "cooperative", "step"]  # nothing is known yet
    journal = Journal(run.folder / "verify.cooperative.bfloat16.jsonl")
    journal.add(n=0, row={"kernel": "cooperative", "verdict": "right"})
    Journal(run.folder / "verify.cell.bfloat16.jsonl").add(n=0, row={"kernel": "cell", "verdict": "right"})
    Journal(run.folder / "verify.resident.bfloat16.jsonl").add(
        n=0, row={"kernel": "resident", "verdict": "wrong"}
    )
    assert run.trusted() == ["cooperative", "step"]
    monkeypatch.setenv("ELMAN_KERNELS", "resident,step")
    assert run.trusted() == ["step"]
    monkeypatch.delenv("ELMAN_KERNELS")
    hung = [{"config": {}, "verdict": "hung"}]
    Journal(run.folder / "tune.jsonl").add(key="a", kernel="cooperative", candidates=hung)
    assert run.trusted() == ["step"]
    sound = tools.tools()["soak"]
    assert (
        tools._tool(run, "soak", sound, time.monotonic() + 9)[1]
        == "cooperative crashed, hung or was not right"
    )


def test_a_family_without_cases_is_none():
    """float64 has no cooperative kernel; the interpreter none at all."""
    gpu = stages.families(SimpleNamespace(chip=CHIP, device=torch.device("cuda")))
    assert ("cooperative", "float64") not in gpu
    assert len(gpu) == len(verify.HIDDEN) * len(verify.ARITHMETIC) - 1
    cpu = stages.families(SimpleNamespace(chip=configs.DEFAULT_CHIP, device=torch.device("cpu")))
    assert {kernel for kernel, _ in cpu} == {"resident", "fused", "step", "cell"}


def test_a_sweep_whose_process_dies_is_started_again(simulated, monkeypatch, capsys):
    run = simulated(events={"layer 3": "crashed"}, stages=("machine", "sweep", "report"))
    stages.go(run)
    sweeps = [row["started"] for row in started(run) if row["started"][0] == "pytest"]
    assert sum("layer" in words for words in sweeps) == runs.MOST_STARTS
    budgets = [float(words[words.index("--budget") + 1]) for words in sweeps if "layer" in words]
    assert budgets == sorted(budgets, reverse=True), "they share the time of one"
    assert budgets[-1] < budgets[0]
    assert (
        "Not done, sweep: layer: its process was ended by SIGSEGV."
        in (run.folder.parent / "gpu.md").read_text()
    )
    assert len(read(run.folder.parent / "flashrnn.partial.jsonl")) == simulated_gpu.ROWS


def test_tools_keep_what_they_say_and_are_not_run_twice(simulated, monkeypatch, capsys):
    run = simulated(events={"soak": "status"}, stages=("machine", "tools", "report"))
    own = tools.tools()
    silent = replace(own["racecheck"], says="no such words")
    more = {"ncu": tools.Tool(["no-such-program"], "", ()), "silent": silent}
    monkeypatch.setattr(tools, "tools", lambda: {**own, **more})
    stages.go(run)
    found = {row["tool"]: row for row in read(run.folder / "tools.jsonl")}
    assert {name: row["status"] for name, row in found.items()} == {
        "soak": "failed",
        "racecheck": "passed",
        "ncu": "not run",
        "silent": "failed",
    }
    assert found["silent"]["reason"] == "it ended well and did not say 'no such words'"
    assert found["ncu"]["reason"] == "no-such-program is not on PATH"
    assert (run.folder / "racecheck.txt").read_text() == "of a tool, from tool.py\n"
    assert (
        "Not done, tools: soak: its process ended with status 3; ncu: no-such-program"
        in (run.folder.parent / "gpu.md").read_text()
    )
    stages.go(simulated(stages=("machine", "tools")))
    assert [row["tool"] for row in read(run.folder / "tools.jsonl")].count("racecheck") == 1


def test_rows_of_other_code_are_put_aside(simulated, monkeypatch, capsys):
    run = simulated(stages=("machine",))
    stages.go(run)
    Journal(run.folder / "tune.jsonl").add(key="a key")
    stages.go(simulated(stages=("machine",)))
    assert not list(run.folder.parent.glob("gpu.*.stale"))
    monkeypatch.setattr(stages, "code", lambda: "other")
    for _ in range(2):
        stages.go(simulated(stages=("machine",)))
    (stale,) = run.folder.parent.glob("gpu.*.stale")
    assert stale.name == "gpu.2026-01-31-12-00.stale"
    assert read(stale / "tune.jsonl") == [{"key": "a key"}]
    assert not read(run.folder / "tune.jsonl")
    monkeypatch.setattr(stages, "code", lambda: "a third")
    stages.go(simulated(stages=("machine",)))
    assert len(list(run.folder.parent.glob("gpu.*.stale"))) == 2


def test_rows_depend_on_the_kernels_and_on_how_they_are_timed_not_on_the_page(monkeypatch):
    files = []
    monkeypatch.setattr(machine, "digest", lambda some: files.extend(some) or "abc")
    assert stages.code() == "abc"
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"kernels/resident.py", "kernels/common.py", "elman/timing.py", "bench/gpu/verify.py"} < names
    assert not {"bench/gpu/page.py", "bench/gpu/stages.py", "elman/layer.py"} & names
    assert all(path.exists() for path in files)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_kills_lose_no_row(tmp_path):
    """At random moments and in each stage; the runs go on and end as if nothing had been."""
    command = [sys.executable, str(ROOT / "tests" / "simulated_gpu.py"), "--kills", "30", str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 kills" in done.stdout


# What the processes do


def test_verify_calls_right_right_and_wrong_wrong(monkeypatch):
    cases = list(verify.cases("resident", "bfloat16", CHIP))
    case = next(c for c in cases if c.H == 17 and c.mode == "resets" and not c.backward)
    device = torch.device("cpu")
    assert verify.judge(case, device)["verdict"] == "right"
    sound = verify.run
    for harm, verdict in ((1.01, "imprecise"), (2.0, "wrong"), (float("nan"), "wrong")):
        monkeypatch.setattr(verify, "run", lambda c, n, harm=harm: (sound(c, n)[0] * harm, sound(c, n)[1]))
        assert verify.judge(case, device)["verdict"] == verdict


def test_verify_goes_on_behind_the_rows_that_are_there(tmp_path, monkeypatch):
    todo = list(verify.cases("resident", "bfloat16", CHIP, interpreted=True))[:4]
    monkeypatch.setattr(verify, "cases", lambda *_: todo)
    # What a process of its own sets for good.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(verify.interpreter, "mend", lambda: None)
    judged = []

    def judge(case, device):
        judged.append(case)
        if len(judged) == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if len(judged) == 2:
            raise ValueError("no such config, which is illegal")
        if len(judged) == 3:
            raise DeviceHangError("waited in vain")
        return {"verdict": "right", "error": 0.0, "bar": 1.0, "nn_rnn": 0.0}

    monkeypatch.setattr(verify, "judge", judge)
    arguments = ["resident", "bfloat16", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(
        machine, "lost", lambda device: "an illegal memory access" if len(judged) == 1 else ""
    )
    assert verify.main(arguments) == machine.LOST_GPU
    assert verify.main(arguments) == 0
    assert judged == todo
    assert verify.main(arguments) == 0
    assert len(judged) == 4
    total, *found = read(tmp_path / "rows.jsonl")
    assert total == {"total": 4}
    assert [row["row"]["verdict"] for row in found] == ["crashed", "failed", "hung", "right"]
    assert found[0]["row"]["H"] == todo[0].H


def test_the_cases_of_a_gpu_have_what_the_issue_of_a_new_one_is():
    """Wide launches, many work items, every mode; each family at least one case."""
    of = {k: list(verify.cases(k, "bfloat16", CHIP)) for k in verify.HIDDEN}
    assert all(of.values())
    programs = {case.H // case.config.BLOCK_N for case in of["cooperative"]}
    assert {64, 128} <= programs
    assert any(case.B == 64 for case in of["cooperative"])
    assert {case.mode for case in of["resident"]} == set(verify.MODES)
    assert {case.D for case in of["resident"]} == {1, 2}
    assert any(case.backward for case in of["step"])
    assert len(list(verify.cases("resident", "bfloat16", CHIP, interpreted=True))) < len(of["resident"])


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """tuned(): runs the tuner on the interpreter, whose times are made up, for two keys of resident."""
    problems = [replace(BF16, B=8, H=17, backward=backward) for backward in (False, True)]
    monkeypatch.setattr(tuner, "keys", lambda options, device: [("resident", p) for p in problems])
    monkeypatch.setattr(tuner.common, "chip", lambda device: CHIP)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "lost", lambda device: "")
    monkeypatch.setattr(
        timing, "measure", lambda kernel, problem, tried, device: [[1.0 + tried.index(c)] * 25 for c in tried]
    )
    right = {"verdict": "right", "error": 1.0, "bar": 1.0, "nn_rnn": None}
    monkeypatch.setattr(verify, "judge", lambda case, device: right)

    def main():
        assert tuner.main([str(tmp_path), "--table", str(tmp_path / "table.json")]) == 0
        return [row for row in read(tmp_path / "tune.jsonl") if "key" in row]

    return main


def test_tune_keeps_every_time_and_a_wrong_candidate_never_wins(tuned, tmp_path, monkeypatch):
    first, second = tuning.work("resident", replace(BF16, B=8, H=17), CHIP)[1][:2]
    sound = verify.judge

    def judge(case, device):
        return sound(case, device) | ({"verdict": "imprecise"} if case.config == first else {})

    monkeypatch.setattr(verify, "judge", judge)
    found = tuned()
    assert [row["backward"] for row in found] == [False, True]
    assert found[0]["config"] == asdict(second)
    assert found[0]["candidates"][0]["verdict"] == "imprecise"
    entry = tables.read(tmp_path / "table.json", CHIP.name).entries[
        tables.key_of("resident", replace(BF16, B=8, H=17))
    ]
    assert entry.config == second
    assert len(entry.times) == len(found[0]["candidates"]) - 1
    assert tuned() == found  # goes on: nothing is left to do


def test_a_candidate_that_a_process_died_of_is_not_launched_again(tuned, tmp_path, monkeypatch):
    key = str(tables.key_of("resident", replace(BF16, B=8, H=17)))
    other = str(tables.key_of("resident", replace(BF16, B=8, H=17, backward=True)))
    journal, reason = Journal(tmp_path / "tune.jsonl"), "its process was ended by SIGSEGV"
    dead = {"kernel": "resident", "verdict": "crashed", "reason": reason}
    journal.add(n=[key, 0], row=dead)
    journal.add(n=[other, "times", 0], row=dead)
    judged, sound = [], verify.judge
    monkeypatch.setattr(verify, "judge", lambda case, device: judged.append(case) or sound(case, device))
    one, two = tuned()
    assert one["candidates"][0]["verdict"] == "crashed"
    assert one["candidates"][0]["reason"] == reason
    assert one["config"] == one["candidates"][1]["config"]
    assert one["candidates"][0]["config"] not in [asdict(case.config) for case in judged if not case.backward]
    assert "us" not in two
    assert two["reason"] == reason


@pytest.mark.parametrize("at", ["judge", "measure"])
def test_what_takes_the_gpu_with_it_ends_the_tuner_and_is_blamed(tuned, tmp_path, monkeypatch, at):
    """timing.measure keeps an error as a config's reason: that key would look harmless, the next guilty."""
    lost = []

    def illegal(*_):
        lost.append("an illegal memory access")
        if at == "judge":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return ["RuntimeError: CUDA error"] * 9

    monkeypatch.setattr(verify if at == "judge" else timing, at, illegal)
    monkeypatch.setattr(machine, "lost", lambda device: "".join(lost))
    assert tuner.main([str(tmp_path), "--table", str(tmp_path / "table.json")]) == machine.LOST_GPU
    key = str(tables.key_of("resident", replace(BF16, B=8, H=17)))
    assert in_flight(tmp_path / "tune.jsonl")["n"] == ([key, 0] if at == "judge" else [key, "times", 0])
    assert read(tmp_path / "tune.jsonl") == []


def test_a_config_that_hangs_in_timing_is_hung(tuned, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda kernel, problem, tried, device: [
        "DeviceHangError: waited in vain" if i == 0 else [2.0] * 25 for i, _ in enumerate(tried)
    ])  # fmt: skip
    row, _ = tuned()
    assert row["candidates"][0]["verdict"] == "hung"
    assert row["config"] == row["candidates"][1]["config"]


def test_times_taken_beside_compilers_are_taken_again_when_all_else_is_done(tuned, tmp_path):
    first, second = tuned()
    again = {**first, "busy": True, "us": 99.0}
    Journal(tmp_path / "tune.jsonl").add(**again)
    rows_of = tuned()
    assert [row["us"] for row in rows_of if row["key"] == first["key"]] == [1.0, 99.0, 1.0]
    assert len([row for row in rows_of if row["key"] == second["key"]]) == 1
    assert len(tuned()) == len(rows_of)


def test_the_first_times_are_of_one_batch_without_the_kernel_step(monkeypatch):
    monkeypatch.setattr(tuner.cli, "jobs", lambda shapes, dtypes, directions, device: [
        (kernel, configs.Problem(B, H, 1, dtype, precision))
        for B, H in shapes for dtype in dtypes for precision in ("ieee", "tf32")
        for kernel in ("resident", "step", "cudnn")
    ])  # fmt: skip
    device = torch.device("cuda")

    def keys(*words):
        return list(tuner.keys(tuner.options_of(["folder", *words]), device))

    first = keys("--first")
    assert {kernel for kernel, _ in first} == {"resident", "cudnn"}
    assert {problem.B for _, problem in first} == {16}
    assert {problem.H for _, problem in first} == {H for H in tuner.HIDDEN if H <= 2048}
    assert {(p.dtype, p.precision) for _, p in first} == {(torch.bfloat16, "ieee"), (torch.float32, "ieee")}
    assert {p.H for _, p in keys("--first", "--hidden", "64,5000")} == {64}
    every = keys()
    assert {p.B for _, p in every} == {16, 1, 64}
    assert {p.precision for _, p in every if p.dtype == torch.float32} == {"ieee", "tf32"}


def test_no_floor_is_no_end(tmp_path, monkeypatch):
    def measure(device, dtypes):
        raise RuntimeError("the GPU is busy")

    monkeypatch.setattr(tuner.floor, "measure", measure)
    monkeypatch.setattr(machine, "lost", lambda device: "")
    tuner.write_floor(tmp_path / "floor.json", torch.device("cuda"), ("bfloat16",))
    assert json.loads((tmp_path / "floor.json").read_text()) == {"failed": "RuntimeError: the GPU is busy"}
    assert not tuner.has_floor(tmp_path / "floor.json")  # the next process tries again


# The page and the way home


def test_the_page_says_what_is_fast_what_lost_and_what_was_predicted(simulated, capsys):
    run = simulated(stages=("machine", "verify", "first", "tune"))
    stages.go(run)
    journal = Journal(run.folder / "tune.jsonl")
    row = {
        "kernel": "step",
        "B": 16,
        "H": 2048,
        "backward": False,
        "arithmetic": "float32",
        "us": 9.0,
        "config": {},
    }
    journal.add(key="step", **row, candidates=[{"config": {}, "model_us": 3.0, "us": 9.0}])
    theirs = {**row, "kernel": "cudnn", "us": 4.5, "busy": True}
    workload = Workload(16, 50, 64, 64, "float32")
    times = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "samples": [1e-3]}
    swept = [
        rows.Row(workload, "forward", "nn.RNN", rows.TIMED, **times, speedup=1.0),
        rows.Row(
            workload, "forward", "auto", rows.TIMED, **times, route="triton:resident",
            speedup=0.8, speedup_low=0.75, speedup_high=0.85,
        ),
    ]  # fmt: skip
    record = {"sweep": "layer", "device": "cuda", "floor": {}, "partial": "", "date": "now"}
    record["machine"] = {"gpu": "Simulated GPU", "cpu": "a CPU", "cores": 2}
    rows.write(run.folder.parent / "rows.jsonl", {"layer": (record, swept)})
    assert "cuDNN was timed while" not in page.text(run.folder)
    journal.add(key="cudnn", **theirs, candidates=[{"config": {}}])
    text = page.write(run.folder)
    assert (run.folder.parent / "gpu.md").read_text() == text
    assert "cuDNN was timed while the machine's other cores compiled kernels." in text
    assert "| bfloat16 | 64 | 1.50 / 1.50 | 1.50 / 1.50 |  | 3.00 / 3.00 | 2.00 / 2.00 | 0.05 |" in text
    assert "| float32 | 2048 |  |  | 9.00 / - | 4.50 / - | 0.50 / - |" in text
    assert "**layer**, float32, forward: 0.80 times nn.RNN's speed (geometric mean of 1 shapes of 1; " in text
    assert (
        "- layer: B=16 T=50 I=64 H=64 float32 forward: 0.80 [0.75, 0.85] of nn.RNN's speed; triton:res"
        in text
    )
    assert "- a step: float32 B=16 H=2048 forward: 9.00 us, cuDNN 4.50, 0.50 of it" in text
    assert "| step | float32 | 1 | 3.00 | 3.00 (B=16 H=2048 forward) |" in text
    index = (run.folder.parents[1] / "README.md").read_text()
    assert f"[gpu]({run.folder.parent.name}/gpu.md)" in index


def test_a_result_of_nan_is_a_line_of_the_page(simulated, capsys):
    run = simulated(stages=("machine", "report"))
    case = {"kernel": "resident", "arithmetic": "bfloat16", "B": 9, "H": 64, "D": 1, "mode": "full"}
    row = {
        **case,
        "backward": False,
        "config": {},
        "verdict": "wrong",
        "error": None,
        "bar": 1e-3,
        "nan": 0.25,
    }
    Journal(run.folder / "verify.resident.bfloat16.jsonl").add(n=0, row=row)
    hung = {"config": {"FLAG": True}, "verdict": "hung", "reason": "waited in vain"}
    key = {"kernel": "cooperative", "arithmetic": "float32", "B": 16, "H": 512, "backward": True}
    Journal(run.folder / "tune.jsonl").add(key="a key", **key, candidates=[hung])
    assert stages.go(run)
    text = (run.folder.parent / "gpu.md").read_text()
    assert "- wrong: resident bfloat16 forward B=9 H=64 D=1 full, NaN or infinite (25% NaN); " in text
    assert "- hung: cooperative float32 backward B=16 H=512 D=1 full, waited in vain; FLAG=True" in text
    assert len(page.launches(run.folder, command.BAD)) == 2


def test_a_table_of_other_code_says_so_on_the_page(simulated, capsys):
    run = simulated(stages=("machine",))
    stages.go(run)
    record = {"commit": "abc", "date": "then"}
    assert page._when({"commit": "abc", "date": "then"}, record) == ""
    assert page._when({"commit": "old", "date": "then"}, record) == ", of commit old, then"


def test_a_run_without_a_sweep_is_in_the_index(simulated, capsys):
    run = simulated(stages=("machine", "verify", "report"))
    stages.go(run)
    index = (run.folder.parents[1] / "README.md").read_text()
    name = run.folder.parent.name
    assert f"**Simulated GPU, 2 cores**: [gpu]({name}/gpu.md). Measured 2026-01-31 12:00 UTC." in index
    assert "No GPU has been measured" not in index


def test_the_published_page_is_that_of_its_rows():
    """What an earlier version of the command has measured, too."""
    folders = [path.parent / "gpu" for path in ROOT.glob("results/*/gpu.md")]
    assert folders
    for folder in folders:
        assert page.text(folder) == (folder.parent / "gpu.md").read_text()


def test_what_is_packed_comes_home(tmp_path):
    root, home = tmp_path / "there", tmp_path / "home"
    folder, table = root / "results" / "card", root / "elman" / "tuned" / "card.json"
    for path in (folder / "rows.jsonl", folder / "gpu" / "tune.jsonl", folder / "gpu" / "gpu.log", table):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name} of the run")
    for name in ("old.md", "gpu/old.jsonl"):
        (folder / name).write_text("from before")
        os.utime(folder / name, (1, 1))
    (folder / "gpu.md").write_text("the page")
    carry.pack(tmp_path / "out", root, folder, table, began=time.time() - 60)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["card.tar.gz", "gpu.log", "gpu.md"]
    (home / "results" / "card").mkdir(parents=True)
    (home / "results" / "card" / "old.md").write_text("changed at home")
    assert carry.unpack(tmp_path / "out", home) == 4
    assert (home / "results" / "card" / "old.md").read_text() == "changed at home"
    assert (home / "results" / "card" / "gpu" / "tune.jsonl").read_text() == "tune.jsonl of the run"
    assert (home / "elman" / "tuned" / "card.json").read_text() == "card.json of the run"
    assert not (home / "results" / "card" / "gpu" / "gpu.log").exists()


def test_what_comes_home_does_not_mix_with_rows_of_other_code(tmp_path):
    root, home = tmp_path / "there", tmp_path / "home"
    for place, source, name in ((root, "new", "tune"), (home, "old", "verify.step.tf32")):
        folder = place / "results" / "card" / "gpu"
        folder.mkdir(parents=True)
        record = {"source": source, "software": {}, "machine": {"gpu": "X", "cpu": "", "cores": 1}}
        record |= {"device": "cuda", "date": "2026-01-31 12:00 UTC"}
        (folder / "machine.json").write_text(json.dumps(record))
        Journal(folder / f"{name}.jsonl").add(key=source)
    carry.pack(tmp_path / "out", root, root / "results" / "card", root / "none.json", began=0)
    for _ in range(2):  # the second time it is the same code
        carry.unpack(tmp_path / "out", home)
        card = home / "results" / "card"
        assert {path.name for path in card.iterdir()} == {"gpu", "gpu.2026-01-31-12-00.stale"}
        assert {path.name for path in (card / "gpu").iterdir()} == {"machine.json", "tune.jsonl"}
    assert "**X, 1 cores**" in (home / "results" / "README.md").read_text()


def test_what_is_new_is_packed_while_a_stage_is_at_work(simulated, monkeypatch, tmp_path, capsys):
    """A machine that is taken back in the middle has handed over all but the last moments."""
    run = simulated(stages=("machine", "verify", "report"), output=tmp_path / "out")
    packs = []
    monkeypatch.setattr(command, "PACK_SECONDS", 0.1)
    monkeypatch.setattr(command, "_run", lambda options: run)
    monkeypatch.setattr(
        carry, "pack", lambda *arguments: packs.append(len(list(run.folder.glob("verify.*"))))
    )
    assert command.main(["--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    assert len(set(packs)) > 2
    assert "Commit " in capsys.readouterr().out


# The command line


def test_the_whole_command_on_a_simulated_gpu(simulated, tmp_path, monkeypatch, capsys):
    """From the words to the tar: a bare machine's whole way to a page, and home."""
    card, home = simulated().folder.parent, tmp_path / "home"
    properties = SimpleNamespace(major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "machine", lambda device: {"gpu": "Simulated GPU", "cpu": "", "cores": 2})
    monkeypatch.setattr(command.common, "chip", lambda device: CHIP)
    monkeypatch.setattr(command.tables, "shipped_path", lambda name: tmp_path / "tuned.json")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    simulation = (sys.executable, simulated_gpu.__file__)
    monkeypatch.setattr(command, "Run", functools.partial(runs.Run, python=simulation))
    words = ["--minutes", "1", "--results", str(tmp_path), "--output", str(tmp_path / "out")]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "150 of 150 launches are right" in said
    assert f"Commit {card.name}/, README.md and tuned.json to publish this GPU." in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{card.name}.tar.gz",
        "gpu.log",
        "gpu.md",
    }
    monkeypatch.setattr(command, "ROOT", home)
    assert command.main(["--unpack", str(tmp_path / "out")]) == 0
    for name in ("gpu.md", "gpu/tune.jsonl", "gpu/verify.cell.tf32.jsonl", "layer.md"):
        assert (home / card.name / name).read_text() == (card / name).read_text()


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit):
        command.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stages", "verfy"], "--stages has 'verfy'; expected some of machine, compile, verify"),
        (["--kernels", "resident,fast"], "--kernels has 'fast'; expected some of resident, cooperative"),
        (
            ["--stages", "tune"],
            "none of these --stages needs no GPU; --device cpu has machine, compile, verify",
        ),
        (["--hidden", "64,x"], "--hidden has 'x'; expected positive integers, separated by commas"),
        (["--output", "x", "--results", "/"], "--results is /, which is none of them; leave one of the two"),
        (["--batches", "0"], "--batches has '0'; expected positive integers, separated by commas"),
    ],
)
def test_a_word_that_is_none(words, sentence, capsys):
    with pytest.raises(SystemExit):
        command.main([*words, "--device", "cpu"])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_without_a_gpu_the_stages_that_make_sense_run_and_nothing_is_published(tmp_path, monkeypatch, capfd):
    """The real processes: a family compiles for sm_90, and runs in Triton's interpreter."""

    def published():
        files = [*ROOT.glob("results/**/*"), *ROOT.glob("elman/tuned/*")]
        return sorted((str(path), path.stat().st_mtime_ns) for path in files)

    before = published()
    monkeypatch.setattr(command, "SCRATCH", tmp_path)
    monkeypatch.setattr(stages, "families", lambda run: [("fused", "bfloat16")])
    words = ["--device", "cpu", "--minutes", "10", "--stages", "compile,verify,report,tune"]
    assert command.main(words) == 0
    said = capfd.readouterr().out
    assert "no GPU is measured" in said
    assert "Nothing of it is published" in said
    (folder,) = tmp_path.glob("*/gpu")
    total, *found = read(folder / "verify.fused.bfloat16.jsonl")
    assert [line["row"]["verdict"] for line in found] == ["right"] * total["total"]
    assert f"**{len(found)} of {len(found)} launches are right**" in (folder.parent / "gpu.md").read_text()
    assert not (folder / "tune.jsonl").exists()
    assert re.search(r"compile: \d+ kernels compiled, 0 did not", said)
    assert published() == before


def test_a_killed_process_group_is_waited_for(tmp_path, simulated):
    """What a run ends itself is gone when it goes on."""
    run = simulated()
    process = run.start("--", sys.executable, "-c", "import time; time.sleep(600)")
    ended = run.finish(process, time.monotonic() - runs.GRACE)
    assert ended == runs.Ended("unfinished", "the time for it was over")
    assert process.returncode == -signal.SIGKILL
    process.stdin.close()
