"""The stages of a run, in their order. Each returns what it left undone, in words; "" for nothing.

machine   what it runs on; rows of other code are put aside
compile   what verify, first and tune launch, by processes that see no GPU; meanwhile the floor and cuDNN's
          times are measured
verify    every kernel against the float64 reference
first     the times of one batch at the sizes at which kernels hand over to one another
tune      the times of all keys, most wanted first
sweep     the benchmark's sweeps, most wanted first
tools     a soak, two launches that fill the chip at once, a profile, a race detector
report    gpu.md
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from bench import machine, precompile
from bench.gpu import page, tuner, verify
from bench.gpu.journal import Journal, plain, read
from bench.gpu.run import FATAL, ROOT, Ended, Run, stopping, supervise
from bench.precompile import Launch
from bench.rows import replace as write
from elman import tables, tuning
from elman.kernels import configs

#: Families that are verified at once, each in a process of its own, which takes half a GiB of the GPU.
AT_ONCE, GIB_EACH = 14, 0.5
#: The sweeps that are published, most wanted first, and each one's part of the time that is left then.
SWEPT = {"kernels": 0.35, "layer": 0.7, "small-h": 0.4, "deepbench": 0.5, "flashrnn": 1.0}
#: Seconds that a sweep needs for what is neither its rows nor its budget: to start, and to draw its pictures.
AROUND_A_SWEEP = 20.0
#: Seconds below which a sweep is not begun.
WORTH_A_SWEEP = 40.0
#: Seconds that one tool may take.
TOOL_SECONDS = 60.0
#: What the rows of verify, first and tune depend on beside the kernels.
DEPENDS = (
    *("elman/timing.py", "elman/tuning.py", "elman/cudnn.py", "elman/reference.py", "bench/agreement.py"),
    *("bench/floor.py", "bench/probes.py", "bench/gpu/verify.py", "bench/gpu/tuner.py"),
)


def code() -> str:
    """A digest of what those rows depend on."""
    return machine.digest([*ROOT.glob("kernels/*.py"), *(ROOT / name for name in DEPENDS)])


def stage_machine(run: Run) -> str:
    path = run.folder / "machine.json"
    record = {**machine.record(run.device, ROOT), "source": code(), "state": machine.chip_state(run.device)}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before.get(key) != record[key] for key in ("source", "software")):
            stamp = re.sub(r"\W+", "-", before["date"].removesuffix(" UTC"))
            stale = run.folder.with_name(f"gpu.{stamp}.stale")
            for n in itertools.count(2):
                if not stale.exists():
                    break
                stale = stale.with_name(f"gpu.{stamp}-{n}.stale")
            run.folder.rename(stale)
            run.say(f"rows of other code or versions are kept as {stale.name}")
    run.folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=1) + "\n")
    name = record["machine"].get("gpu", record["machine"]["cpu"])
    run.say(f"{name}, commit {record['commit']}, {record['state']}")
    return ""


# compile


def stage_compile(run: Run) -> str:
    end = run.until("compile")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(_compile, run, end)
        ended = ""
        with stopping(run):
            if run.device.type == "cuda":
                ended = _time_keys(run, end, "--floor", "--busy", "--kernels", "cudnn")
            left = compiling.result()
    return _sentence(left, ended and f"cuDNN's times: {ended}")


def _compile(run: Run, end: float) -> str:
    """What verify, first and tune launch, in that order, without the kernel step's keys: they are many."""
    from triton.backends.compiler import GPUTarget

    if torch.version.hip:
        return "on ROCm kernels are compiled where they are launched"
    by_code: dict[tuple, Launch] = {}
    for launch in itertools.chain(_verified(run), _tuned(run)):
        by_code.setdefault(_same_code(launch), launch)
    wanted = list(by_code.values())
    target = GPUTarget("cuda", run.capability, 32)
    # One core for this process, one for the one that times cuDNN meanwhile.
    workers = run.workers or max(1, machine.cores() - (2 if run.device.type == "cuda" else 0))
    run.say(f"compile: {len(wanted)} kernels in {workers} processes")
    journal, counts = Journal(run.folder / "compile.jsonl"), {"compiled": 0, "failed": 0, "left": 0}
    compiled = precompile.compile_all(
        wanted, run.chip, target, workers, deadline=end, with_host_code=run.device.type == "cuda"
    )
    for found in compiled:
        if run.stopped.is_set():
            break
        late = found.error == precompile.NO_TIME
        counts["left" if late else "failed" if found.error else "compiled"] += 1
        if found.error and not late:
            journal.add(launch=str(found.launch), reason=plain(found.error), seconds=round(found.seconds, 1))
    run.say(f"compile: {counts}")
    return _sentence(
        counts["left"] and f"{counts['left']} of {len(wanted)} kernels were not compiled ahead",
        counts["failed"] and f"{counts['failed']} did not compile, see compile.jsonl",
    )


def _same_code(launch: Launch) -> tuple:
    """Launches with the same key are the same code: B and D are numbers of run time, but for strides.

    A stride that 16 divides is compiled for; B and D change that of the time's stride alone.
    """
    p = launch.problem
    aligned = p.B * p.D * p.H % 16 == 0, p.D * p.H % 16 == 0
    return (replace(launch, problem=replace(p, B=1, D=1)), aligned)


def _verified(run: Run) -> Iterator[Launch]:
    if "verify" in run.stages:
        for kernel, arithmetic in families(run):
            for case in verify.cases(kernel, arithmetic, run.chip, run.device.type == "cpu"):
                yield case.launch


def _tuned(run: Run) -> Iterator[Launch]:
    if run.device.type != "cuda":
        return
    for stage, more in (("first", ["--first"]), ("tune", [])):
        if stage in run.stages:
            options = tuner.options_of([str(run.folder), *run.keys, *more])
            for kernel, problem in tuner.keys(options, run.device):
                if kernel not in ("cudnn", "step"):
                    for config in tuning.work(kernel, problem, run.chip)[1]:
                        assert config
                        yield Launch(kernel, problem, config)


def families(run: Run) -> list[tuple[str, str]]:
    """(kernel, arithmetic), most wanted first; without a GPU those that the interpreter tells apart."""
    kernels, arithmetic = list(verify.HIDDEN), list(verify.ARITHMETIC)
    if run.device.type == "cpu":
        # Its programs wait for one another, the interpreter's follow one another.
        kernels.remove("cooperative")
        arithmetic = ["bfloat16", "float32", "float64"]
    return [(kernel, name) for name in arithmetic for kernel in kernels]


# verify


def stage_verify(run: Run) -> str:
    end, at_once = run.until("verify"), min(AT_ONCE, machine.cores())
    if run.device.type == "cuda":
        at_once = max(1, min(at_once, int(run.memory_gib / 2 / GIB_EACH)))
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(_verify, run, *family, end) for family in families(run)]
        with stopping(run):
            done, total, ended = zip(*(future.result() for future in futures), strict=True)
    left, begun = sum(total) - sum(done), sum(map(bool, total))
    return _sentence(
        left and f"{left} launches",
        begun < len(total) and f"{len(total) - begun} of {len(total)} families were not begun",
        *ended,
    )


def _verify(run: Run, kernel: str, arithmetic: str, end: float) -> tuple[int, int, str]:
    """How many launches of the family are judged, of how many; what kept on ending its process, if it did."""
    path = run.folder / f"verify.{kernel}.{arithmetic}.jsonl"
    ended = supervise(run, path, end, "bench.gpu.verify", kernel, arithmetic, str(path))
    rows = read(path)
    done = [row["row"]["verdict"] for row in rows if "row" in row]
    total = max((row["total"] for row in rows if "total" in row), default=0)
    counts = ", ".join(f"{done.count(verdict)} {verdict}" for verdict in sorted(set(done)))
    left = f", {total - len(done)} left" if len(done) < total else ""
    run.say(f"verify: {kernel} {arithmetic}: {counts or ended.reason}{left}")
    return len(done), total, f"{kernel} {arithmetic}: {ended.reason}" if ended.verdict in FATAL else ""


# times


def stage_first(run: Run) -> str:
    return _keys_left(run, "first", "--first")


def stage_tune(run: Run) -> str:
    return _keys_left(run, "tune")


def _keys_left(run: Run, stage: str, *more: str) -> str:
    ended = _time_keys(run, run.until(stage), "--floor", *more)
    options = tuner.options_of([str(run.folder), *run.keys, *more])
    known = {row["key"] for row in read(run.folder / "tune.jsonl") if "key" in row}
    wanted = [str(tables.key_of(*key)) for key in tuner.keys(options, run.device)]
    left = sum(key not in known for key in wanted)
    run.say(f"{stage}: {len(wanted) - left} of {len(wanted)} keys are timed")
    return _sentence(left and f"{left} of {len(wanted)} keys", left and ended)


def _time_keys(run: Run, end: float, *more: str) -> str:
    """The keys that the run's options and these name, without kernels that have crashed or hung."""
    asked = [*run.keys, *more]
    kernels = tuner.options_of([str(run.folder), *asked]).kernels
    able = ",".join(kernel for kernel in kernels if kernel in (*run.trusted(), "cudnn"))
    command = ["bench.gpu.tuner", str(run.folder), "--table", str(run.table), *asked, "--kernels", able]
    ended = supervise(run, run.folder / "tune.jsonl", end, *command)
    return ended.reason if ended.verdict in FATAL else ""


# sweep


def stage_sweep(run: Run) -> str:
    """The bench's sweeps, each within its part of the time; on a CPU the one that is never published."""
    end, left = run.until("sweep"), []
    kernels = run.trusted()
    if not kernels:
        return "every kernel has crashed or hung"
    some = len(kernels) < len(configs.KERNELS)
    allowed = {"ELMAN_KERNELS": ",".join(kernels)} if some else {}
    swept = SWEPT if run.device.type == "cuda" else {"smallest": 1.0}
    for name, part in swept.items():
        seconds = end - time.monotonic()
        if (1 - part) * seconds > WORTH_A_SWEEP:
            seconds *= part
        if seconds < WORTH_A_SWEEP:
            left.append(f"{name}: no time was left")
            continue
        run.say(f"sweep: {name}, {seconds:.0f} s")
        ended = _sweep(run, name, time.monotonic() + seconds, allowed)
        if not _published(run, name):
            fewer = f"fewer rows than the published table, see {name}.partial.md"
            left.append(f"{name}: {ended.reason or fewer}")
    if some:
        left.append(f"of the kernels only {', '.join(kernels)} took part, as others crashed or hung")
    return _sentence(*left)


def _sweep(run: Run, name: str, end: float, allowed: dict[str, str]) -> Ended:
    """How the sweep's process ended. One that dies is followed by another, which goes on.

    A cell that two have died of is a failed row of the third.
    """
    command = ["pytest", "bench", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--sweep", name]
    command += ["--results", str(run.folder.parents[1])]
    for _ in range(3):
        minutes = max(0.02, (end - time.monotonic() - AROUND_A_SWEEP) / 60)
        ended = run.finish(run.start(*command, "--budget", f"{minutes:.3f}", variables=allowed), end)
        failed_rows = ended.status == pytest.ExitCode.TESTS_FAILED
        if ended.verdict != "crashed" or failed_rows or end - time.monotonic() < AROUND_A_SWEEP:
            break
    return ended


def _published(run: Run, sweep: str) -> bool:
    """A table with failed or missing rows says so itself, and the run's status of 1 is no news then."""
    page_of = run.folder.parent / f"{sweep}.md"
    return page_of.exists() and page_of.stat().st_mtime >= run.began


# tools


def stage_tools(run: Run) -> str:
    """Each a process of its own, its status and its last words a row of tools.jsonl."""
    end, journal, left = run.until("tools"), Journal(run.folder / "tools.jsonl"), []
    for name, command in tools().items():
        if any(row["tool"] == name and row["status"] == "passed" for row in journal.rows):
            continue
        limit = min(end, time.monotonic() + TOOL_SECONDS)
        program = shutil.which(command[0])
        if not program:
            status, reason = "not run", f"{command[0]} is not on PATH"
        elif time.monotonic() >= end:
            status, reason = "not run", "no time was left"
        else:
            place = run.log.stat().st_size if run.log.exists() else 0
            ended = run.finish(run.start("--", program, *command[1:]), limit)
            said = run.log.read_bytes()[place:].decode(errors="replace")
            write(run.folder / f"{name}.txt", plain_lines(said.split("\n", 2)[2]))  # after the command
            status = {"": "passed", "crashed": "failed"}.get(ended.verdict, ended.verdict)
            reason = ended.reason
        run.say(f"tools: {name}: {status}{f', {reason}' if reason else ''}")
        journal.add(tool=name, status=status, reason=reason)
        if status != "passed":
            left.append(f"{name}: {reason}")
    return _sentence(*left)


def tools() -> dict[str, list[str]]:
    """By name, the command lines."""
    module = [sys.executable, "-m"]
    tests = [*module, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k"]
    profile = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-name", "regex:forward_kernel"]
    profile += ["--launch-skip", "3", "--launch-count", "1", *module, "bench.gpu.one_launch"]
    racecheck = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *module]
    return {
        "soak": [*tests, "million_meetings"],
        "two-streams": [*tests, "fill_the_chip"],
        "ncu.resident.256": [*profile, "resident", "256"],
        "ncu.cooperative.1024": [*profile, "cooperative", "1024"],
        "racecheck": [*racecheck, "tests.sanitize", "resident", "bfloat16"],
        "tests": [*tests, "(graph or stream or thread or bits) and not fill_the_chip"],
    }


def plain_lines(text: str) -> str:
    """A tool's output without this machine's paths."""
    return "\n".join(plain(line, 2000) if "/" in line else line for line in text.splitlines()) + "\n"


def stage_report(run: Run) -> str:
    print(page.write(run.folder), flush=True)
    return ""


def _sentence(*parts: object) -> str:
    return "; ".join(str(part) for part in parts if part)


STAGE: dict[str, Callable[[Run], str]] = {
    "machine": stage_machine,
    "compile": stage_compile,
    "verify": stage_verify,
    "first": stage_first,
    "tune": stage_tune,
    "sweep": stage_sweep,
    "tools": stage_tools,
    "report": stage_report,
}


def go(run: Run) -> bool:
    """Runs the stages; whether all went well. What one raises is its last word, and the next one runs."""
    well = True
    for stage in run.stages:
        start = time.monotonic()
        try:
            left = "no time was left" if run.left <= 0 and stage != "report" else STAGE[stage](run)
        except Exception as caught:
            left, well = plain(caught), False
            with run.log.open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        if stage not in ("machine", "report"):
            journal = Journal(run.folder / "stages.jsonl")
            journal.add(stage=stage, seconds=round(time.monotonic() - start, 1), left=left)
        run.say(f"{stage}: {time.monotonic() - start:.1f} s{f'; not done: {left}' if left else ''}")
    return well
