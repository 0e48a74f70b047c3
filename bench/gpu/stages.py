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
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench import machine, precompile, rows
from bench.gpu import carry, page, tuner, verify
from bench.gpu.journal import Journal, plain, read
from bench.gpu.run import FATAL, MOST_STARTS, ROOT, Ended, Run, stopping, supervise
from bench.gpu.tools import stage_tools
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
#: What the rows of verify, first and tune depend on beside the kernels.
DEPENDS = (
    *("elman/timing.py", "elman/tuning.py", "elman/cudnn.py", "elman/reference.py", "bench/agreement.py"),
    *("bench/floor.py", "bench/probes.py", "bench/contenders.py", "bench/precompile.py"),
    *("bench/gpu/verify.py", "bench/gpu/tuner.py"),
)


def code() -> str:
    """A digest of what those rows depend on."""
    return machine.digest([*ROOT.glob("kernels/*.py"), *(ROOT / name for name in DEPENDS)])


def stage_machine(run: Run) -> str:
    path = run.folder / "machine.json"
    record = {**machine.record(run.device, ROOT), "source": code(), "state": machine.chip_state(run.device)}
    record["began"] = run.since
    if carry.differs(path, record):
        run.say(f"rows of other code or versions are kept as {carry.put_aside(run.folder).name}")
    elif path.exists():  # gone on with
        record["began"] = run.since = json.loads(path.read_text(encoding="utf-8")).get("began", run.since)
    run.folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=1) + "\n")
    name = record["machine"].get("gpu", record["machine"]["cpu"])
    state = ", ".join(f"{k} {v}" for k, v in record["state"].items())
    run.say(f"{name}, commit {record['commit']}{f', {state}' if state else ''}")
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
    target = GPUTarget("cuda", run.capability, 32)
    # One core for this process, one for the one that times cuDNN meanwhile.
    workers = run.workers or max(1, machine.cores() - (2 if run.device.type == "cuda" else 0))
    run.say(f"compile: in {workers} processes")
    journal, done, failed, late = Journal(run.folder / "compile.jsonl"), 0, 0, False
    compiled = precompile.compile_all(
        _wanted(run), run.chip, target, workers, deadline=end, with_host_code=run.device.type == "cuda"
    )
    for found in compiled:
        if run.stopped.is_set():
            break
        if found.error == precompile.NO_TIME:
            late = True
        elif found.error:
            failed += 1
            journal.add(launch=str(found.launch), reason=plain(found.error), seconds=round(found.seconds, 1))
        else:
            done += 1
    run.say(f"compile: {done} kernels compiled, {failed} did not")
    return _sentence(
        late and f"{done} kernels are compiled, the rest is where it is launched",
        failed and f"{failed} did not compile, see compile.jsonl",
    )


def _wanted(run: Run) -> Iterator[Launch]:
    """Of launches that are the same code the first one."""
    known = set()
    for launch in itertools.chain(_verified(run), _tuned(run)):
        if _same_code(launch) not in known:
            known.add(_same_code(launch))
            yield launch


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
    every = [(kernel, name) for name in arithmetic for kernel in kernels]
    interpreted = run.device.type == "cpu"
    return [family for family in every if any(verify.cases(*family, run.chip, interpreted))]


# verify


def stage_verify(run: Run) -> str:
    end = run.until("verify")
    with concurrent.futures.ThreadPoolExecutor(at_once(run)) as pool:
        futures = [pool.submit(_verify, run, *family, end) for family in families(run)]
        with stopping(run):
            done, total, ended = zip(*(future.result() for future in futures), strict=True)
    left, begun = sum(total) - sum(done), sum(map(bool, total))
    return _sentence(
        left and f"{left} launches",
        begun < len(total) and f"{len(total) - begun} of {len(total)} families were not begun",
        *ended,
    )


def at_once(run: Run) -> int:
    """How many families: by the cores, and on a GPU by half of its memory."""
    most = min(AT_ONCE, machine.cores())
    return max(1, min(most, int(run.memory_gib / 2 / GIB_EACH))) if run.device.type == "cuda" else most


def _verify(run: Run, kernel: str, arithmetic: str, end: float) -> tuple[int, int, str]:
    """How many launches of the family are judged, of how many; what kept on ending its process, if it did."""
    path = run.folder / f"verify.{kernel}.{arithmetic}.jsonl"
    command = ["bench.gpu.verify", kernel, arithmetic, str(path)]
    ended = supervise(run, path, end, lambda: command)
    rows = read(path)
    done = [row["row"]["verdict"] for row in rows if "row" in row]
    total = max((row["total"] for row in rows if "total" in row), default=0)
    counts = ", ".join(f"{done.count(verdict)} {verdict}" for verdict in sorted(set(done)))
    left = f", {total - len(done)} left" if len(done) < total else ""
    run.say(f"verify: {kernel} {arithmetic}: {counts or ended.reason or 'none'}{left}")
    return len(done), total, f"{kernel} {arithmetic}: {ended.reason}" if ended.died else ""


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
    """The keys that the run's options and these name, of kernels that are trusted by then."""
    asked = [*run.keys, *more]
    kernels = tuner.options_of([str(run.folder), *asked]).kernels

    def command() -> list[str]:
        able = ",".join(kernel for kernel in kernels if kernel in (*run.trusted(), "cudnn"))
        return ["bench.gpu.tuner", str(run.folder), "--table", str(run.table), *asked, "--kernels", able]

    ended = supervise(run, run.folder / "tune.jsonl", end, command)
    return ended.reason if ended.died else ""


# sweep


def stage_sweep(run: Run) -> str:
    """The bench's sweeps, each within its part of the time; on a CPU the one that is never published."""
    end, left = run.until("sweep"), []
    kernels = run.trusted()
    if not kernels:
        return "no kernel is right here, or each has crashed or hung"
    some = run.device.type == "cuda" and len(kernels) < len(configs.KERNELS)
    allowed = {"ELMAN_KERNELS": ",".join(kernels)} if some else {}
    swept = SWEPT if run.device.type == "cuda" else {"smallest": 1.0}
    for name, part in swept.items():
        if _complete(run, name):
            continue
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
        left.append(f"of the kernels only {', '.join(kernels)} took part")
    return _sentence(*left)


def _sweep(run: Run, name: str, end: float, allowed: dict[str, str]) -> Ended:
    """How the sweep's process ended. One that dies is followed by another, which goes on.

    A cell that two have died of is a failed row of the third.
    """
    command = ["pytest", "bench", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--sweep", name]
    command += ["--results", str(run.folder.parents[1])]
    for _ in range(MOST_STARTS):
        minutes = max(0.02, (end - time.monotonic() - AROUND_A_SWEEP) / 60)
        ended = run.finish(run.start(*command, "--budget", f"{minutes:.3f}", variables=allowed), end)
        if ended.verdict not in FATAL or end - time.monotonic() < AROUND_A_SWEEP:
            break
    return ended


def _complete(run: Run, sweep: str) -> bool:
    """Whether all rows of the sweep are there, made by this code on these versions."""
    path = run.folder.parent / "rows.jsonl"
    record, _ = rows.read(path).get(sweep, ({}, [])) if path.exists() else ({}, [])
    own = machine.source(), machine.software(run.device)
    return (record.get("source"), record.get("software")) == own and not record.get("missing")


def _published(run: Run, sweep: str) -> bool:
    """A table with failed or missing rows says so itself, and the process's status of 1 is no news then."""
    path = run.folder.parent / f"{sweep}.md"
    return path.exists() and path.stat().st_mtime >= run.began


# report


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
            run.stopped.clear()  # its threads have ended
            run.folder.mkdir(parents=True, exist_ok=True)
            with run.log.open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        if stage not in ("machine", "report"):
            journal = Journal(run.folder / "stages.jsonl")
            journal.add(stage=stage, seconds=round(time.monotonic() - start, 1), left=left)
        run.say(f"{stage}: {time.monotonic() - start:.1f} s{f'; not done: {left}' if left else ''}")
    return well
