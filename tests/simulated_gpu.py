"""A GPU that is not there, for `python -m bench.gpu`: the stages are real, their processes only write rows.

    python tests/simulated_gpu.py MODULE ARGUMENTS...    a process: the rows that the module would write
    python tests/simulated_gpu.py --kills 30 FOLDER      runs that are killed at random moments and go on

`run` makes a Run of it, `patches` the rest of the project fit for it. What happens to the processes is in
<card>/events.json; each of them tells <card>/witness.jsonl what it was started with, and each row that is on
the disk. Nothing of it lies in results/.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.gpu import tether
from bench.gpu.journal import Journal, read

CARD = "simulated-gpu-2-cores"
#: Seconds of a row, and how many a family and a sweep have.
SECONDS, CASES, ROWS = 0.01, 6, 12


# A process. It imports no torch: thirty kills start some five hundred of them.


def process(module: str, arguments: list[str]) -> int:
    folder = {
        "bench.gpu.verify": lambda: Path(arguments[2]).parent,
        "bench.gpu.tuner": lambda: Path(arguments[0]),
        "pytest": lambda: Path(_option(arguments, "--results")) / CARD / "gpu",
        "tool": lambda: Path(arguments[1]),
    }[module]()
    events = json.loads((folder.parent / "events.json").read_text())
    witness = folder.parent / "witness.jsonl"
    _tell(witness, started=[module, *arguments], pid=os.getpid(), kernels=os.environ.get("ELMAN_KERNELS"))
    work = {"bench.gpu.verify": _verify, "bench.gpu.tuner": _tune, "pytest": _sweep, "tool": _tool}[module]
    return work(folder, arguments, events, witness)


def _verify(folder: Path, arguments: list[str], events: dict, witness: Path) -> int:
    kernel, arithmetic, path, *_ = arguments
    time.sleep(events.get("start", 0))  # as importing torch takes
    journal, end = Journal(Path(path)), float(_option(arguments, "--until"))
    if not journal.rows:
        journal.add(total=CASES)
    done = {row["n"] for row in journal.rows if "row" in row}
    for n in range(CASES):
        if n in done:
            continue
        if time.monotonic() >= end:
            break
        case = {"kernel": kernel, "arithmetic": arithmetic, "B": 9, "H": 64 + n, "D": 1, "mode": "full"}
        case |= {"backward": False, "config": {"BLOCK_B": 8}}
        journal.begin(n, **case)
        verdict = _happen(events.get(f"{kernel} {arithmetic} {n}", "right"))
        row = {
            **case,
            "verdict": verdict,
            "error": 0.5 if verdict == "right" else 50.0,
            "bar": 1.0,
            "nn_rnn": 0.4,
        }
        journal.add(n=n, row=row)
        _tell(witness, file=journal.path.name, n=n)
    return 0


def _tune(folder: Path, arguments: list[str], events: dict, witness: Path) -> int:
    journal, end = Journal(folder / "tune.jsonl"), float(_option(arguments, "--until"))
    if "--floor" in arguments and not (folder / "floor.json").exists():
        step = {"launch": 7e-7, "chain": 5e-8, "meeting": {"2": 2e-7, "132": 9e-7}, "on_chip": 494592}
        (folder / "floor.json").write_text(json.dumps({"bandwidth": [], "matrix": {}, "step": step}))
    kernels = arguments[len(arguments) - 1 - arguments[::-1].index("--kernels") + 1].split(",")
    known = {row["key"] for row in journal.rows if "key" in row}
    dead = [row["n"] for row in journal.rows if "row" in row]
    for row in json.loads((folder.parent / "keys.json").read_text()):
        if (
            row["key"] in known
            or row["kernel"] not in kernels
            or ("--first" in arguments and not row["first"])
        ):
            continue
        if time.monotonic() >= end:
            break
        config = {"BLOCK_B": 8}
        for place in [n for n in (0, "times") if [row["key"], n] not in dead]:
            names = ("kernel", "B", "H", "backward", "arithmetic")
            journal.begin([row["key"], place], config=config, **{name: row[name] for name in names})
            _happen(events.get(f"{row['key']} {place}", "right"))
        us = 3.0 if row["kernel"] == "cudnn" else 1.5
        candidate = {"config": config, "us": us, "p20": us, "p80": us, "verdict": "right"}
        candidate |= {"model_us": 1.0} if row["kernel"] != "cudnn" else {}
        best = {name: candidate[name] for name in ("us", "p20", "p80", "config")}
        row = {name: row[name] for name in ("key", "kernel", "B", "H", "backward", "arithmetic")} | best
        journal.add(n=[row["key"], "times"], **row, candidates=[candidate])
        _tell(witness, file="tune.jsonl", key=row["key"])
    return 0


def _sweep(folder: Path, arguments: list[str], events: dict, witness: Path) -> int:
    name, end = _option(arguments, "--sweep"), time.monotonic() + 60 * float(_option(arguments, "--budget"))
    journal = Journal(folder.parent / f"{name}.partial.jsonl")
    for n in range(len(journal.rows), ROWS):
        if time.monotonic() >= end:
            break
        _happen(events.get(f"{name} {n}", "right"))
        journal.add(n=n)
        _tell(witness, file=journal.path.name, n=n)
    (folder.parent / f"{name}.md").write_text(f"{len(journal.rows)} rows")
    return 0


def _tool(folder: Path, arguments: list[str], events: dict, witness: Path) -> int:
    _happen(events.get(arguments[0], "right"))
    print("of a tool, from /some/where/tool.py")
    return 0


def _happen(event: str) -> str:
    """The verdict of an event, unless it ends the process: "right", "wrong", "crashed", "hung", "status"."""
    time.sleep(SECONDS)
    if event == "crashed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if event == "hung":
        time.sleep(3600)
    if event == "status":
        sys.exit(3)
    return event


def _tell(witness: Path, **what: object) -> None:
    with witness.open("a") as file:
        file.write(json.dumps(what) + "\n")


def _option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


# A run


def run(folder: Path, minutes: float = 1.0, **fields):
    """A Run of bench.gpu whose processes are simulated. folder: what results/ is to a real one."""
    import torch

    from bench.gpu import run as runs
    from elman import tables
    from elman.kernels import configs

    card = folder / CARD
    (card / "gpu").mkdir(parents=True, exist_ok=True)
    for name, text in (("events.json", "{}"), ("witness.jsonl", "")):
        if not (card / name).exists():
            (card / name).write_text(text)
    rows = [
        {"key": str(tables.key_of(kernel, p)), "kernel": kernel, "B": tables.bucket(p.B), "H": p.H}
        | {"backward": p.backward, "arithmetic": "bfloat16", "first": p.B == 16}
        for kernel, p in _keys()
    ]
    (card / "keys.json").write_text(json.dumps(rows))
    fields = {"python": (sys.executable, __file__), "memory_gib": 100.0} | fields
    table = card / "table.json"
    deadline = time.monotonic() + 60 * minutes
    return runs.Run(torch.device("cuda"), configs.CHIPS["sm_90"], card / "gpu", table, deadline, **fields)


def _keys():
    import torch

    from elman.kernels.configs import Problem

    return [
        (kernel, Problem(B, H, 1, torch.bfloat16, backward=backward))
        for B in (16, 1)
        for H in (64, 128)
        for backward in (False, True)
        for kernel in ("resident", "cooperative", "cudnn")
    ]


def patches() -> list[tuple[object, str, object]]:
    """(object, attribute, value): what of the project asks a GPU, or compiles, or would take minutes."""
    import torch

    from bench import machine, precompile
    from bench.gpu import stages, tools, tuner, verify
    from elman.kernels.configs import CHIPS, Problem

    on = {"gpu": "Simulated GPU", "cpu": "a CPU", "cores": 2, "driver": "1.0"}
    record = {
        "device": "cuda",
        "date": "2026-01-31 12:00 UTC",
        "commit": "abc",
        "dirty": False,
        "machine": on,
    }
    problem = Problem(16, 64, 1, torch.bfloat16)
    config, *_ = precompile.candidates("resident", problem, CHIPS["sm_90"])
    launch = precompile.Launch("resident", problem, config)

    def compile_all(launches, *_, **__):
        for launch in launches:
            time.sleep(SECONDS)
            yield precompile.Compiled(launch, SECONDS)

    def simulated_tools():
        # As bench.gpu.tools.tools: the command is no module of the run's, so it says where it is itself.
        folder = os.environ["SIMULATED_FOLDER"]
        return {
            name: tools.Tool([sys.executable, __file__, "tool", name, folder], "of a tool", kernels)
            for name, kernels in (("soak", ("cooperative",)), ("racecheck", ("resident",)))
        }

    def keys(options, device):
        return [
            (kernel, problem)
            for kernel, problem in _keys()
            if kernel in options.kernels and (problem.B == 16 or not options.first)
        ]

    return [
        (machine, "record", lambda device, root: {**record, "software": {"torch": "2.11.0"}}),
        (machine, "chip_state", lambda device: {"sm_mhz": 1980, "throttle": [], "idle": False}),
        (precompile, "compile_all", compile_all),
        (stages, "_verified", lambda run: [launch]),
        (stages, "families", lambda run: [(k, a) for a in verify.ARITHMETIC for k in verify.HIDDEN]),
        (stages, "_tuned", lambda run: []),
        (tools, "tools", simulated_tools),
        (stages, "WORTH_A_SWEEP", 0.5),
        (stages, "AROUND_A_SWEEP", 0.1),
        (tuner, "keys", keys),
    ]


def dying_compiler(connection, *_) -> None:
    """In place of bench.precompile's: it dies of what it is given."""
    connection.recv()
    os._exit(1)


def dead_compiler(*_) -> None:
    """It is gone before it is given anything."""
    os._exit(1)


# Kills


def kill(times: int, folder: Path, seed: int) -> None:
    """Runs that are killed, each one gone on with: at random moments, and at last once in each stage.

    Fails where a row is lost, or made twice, or where a process outlives its run.
    """
    from bench.gpu import run as runs
    from bench.gpu import stages

    for owner, name, value in patches():
        setattr(owner, name, value)
    chance, kills, begun = random.Random(seed), 0, 0
    while kills < times:
        begun += 1
        results, over = folder / f"run{begun}", False
        os.environ["SIMULATED_FOLDER"] = str(results / CARD / "gpu")
        while not over:
            made = run(results)
            rest = times - kills
            stage = runs.STAGES[-rest] if 0 < rest <= len(runs.STAGES) else None
            child = os.fork()
            if not child:
                with (results / "out.txt").open("a") as out:
                    os.dup2(out.fileno(), 1)
                if stage:
                    stages.STAGE[stage] = _killed_in(stages.STAGE[stage])
                stages.go(made)
                os._exit(0)
            if rest > len(runs.STAGES):
                time.sleep(chance.uniform(0.0, 1.0))
                os.kill(child, signal.SIGKILL)
            over = os.waitpid(child, 0)[1] == 0
            kills += not over
            _expect_nobody(made.folder.parent)
            _expect_all_rows(made.folder)
        _expect_complete(made.folder)
    print(f"{kills} kills, {begun} runs complete")


def _killed_in(stage):
    """The stage, killed while it is at work."""

    def work(run):
        threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGKILL)).start()
        stage(run)
        time.sleep(1)  # machine and report take less

    return work


def _expect_nobody(card: Path) -> None:
    """No process outlives its run by more than a moment."""
    pids = [row["pid"] for row in read(card / "witness.jsonl") if "pid" in row]
    end = time.monotonic() + 10
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < end, f"processes {left} outlive their run"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return "simulated_gpu" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def _expect_all_rows(folder: Path) -> None:
    """Every row that a process was told is on the disk is there, once."""
    for told in read(folder.parent / "witness.jsonl"):
        if "file" in told:
            path = folder / told["file"]
            rows = read(path if path.exists() else folder.parent / told["file"])
            name = "key" if "key" in told else "n"
            found = [row for row in rows if row.get(name) == told[name] and "total" not in row]
            assert len(found) == 1, f"{told} is there {len(found)} times"


def _expect_complete(folder: Path) -> None:
    from bench.gpu import stages
    from bench.gpu.verify import ARITHMETIC, HIDDEN

    for kernel in HIDDEN:
        for arithmetic in ARITHMETIC:
            rows = read(folder / f"verify.{kernel}.{arithmetic}.jsonl")
            assert len(rows) == 1 + CASES, (kernel, arithmetic, rows)
    keys = [row["key"] for row in read(folder / "tune.jsonl")]
    assert len(keys) == len(set(keys)) == len(_keys())
    for name in stages.SWEPT:
        assert len(read(folder.parent / f"{name}.partial.jsonl")) == ROWS
    assert "150 of 150 launches are right" in (folder.parent / "gpu.md").read_text()


if __name__ == "__main__":
    if sys.argv[1] == "--kills":
        kill(int(sys.argv[2]), Path(sys.argv[3]), seed=int(sys.argv[4]))
    elif sys.argv[1] == "tool":  # a program, which knows nothing of the run
        sys.exit(process(sys.argv[1], sys.argv[2:]))
    else:
        tether.tie()
        module, *arguments = sys.argv[1:]
        sys.exit(subprocess.call(arguments) if module == "--" else process(module, arguments))
