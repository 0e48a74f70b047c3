"""One command for a new GPU: are the kernels right on it, how fast are they, which configs are the best.

    python -m bench.gpu [--minutes 9] [--output DIR] [--stages machine,compile,verify,tune,sweep,tools,report]
    python -m bench.gpu --unpack DIR

It runs from the root of the project as it lies: no installation, no package index, no git. Each stage writes
what it finds line by line below results/<gpu>/gpu/, so that a kill at any moment loses at most the row in
flight, and a second call goes on where the first stopped. DIR also gets all of it in few files to be carried
home, which --unpack puts in their places.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import floor, machine, precompile, verify
from bench.precompile import Launch
from elman import cli, tables, timing, tuning
from elman.kernels import common, configs
from elman.kernels.configs import Chip, Config, Problem

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("machine", "compile", "verify", "floor", "tune", "sweep", "tools", "report")
#: The part of the minutes that are left which a stage may take.
SHARES = {"compile": 0.2, "verify": 0.2, "tune": 0.45, "sweep": 0.85, "tools": 0.9}
#: (B, H) of the keys that are tuned, most wanted first.
TUNED_B = cli.TUNED_B
TUNED_H = (64, 128, 256, 512, 1024, 264, 2048, 384, 768, 336, 224, 1760, 2560, 320)
TUNED_ARITHMETIC = ("bfloat16", "float32", "tf32", "float16")
#: Families that are verified at once, each in a process of its own; how often one is started at most.
AT_ONCE, MOST_STARTS = 14, 5
#: A case that takes longer hangs: it compiles for some seconds and runs for milliseconds.
HANG_SECONDS = 30.0


@dataclass
class Run:
    """Where a run writes, on what, and until when (time.monotonic)."""

    device: torch.device
    chip: Chip
    folder: Path
    deadline: float
    output: Path | None = None
    hidden: tuple[int, ...] = TUNED_H
    batches: tuple[int, ...] = TUNED_B
    arithmetic: tuple[str, ...] = TUNED_ARITHMETIC
    kernels: tuple[str, ...] = (*configs.KERNELS, "cudnn")
    workers: int = 0
    stages: tuple[str, ...] = STAGES

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def share(self, stage: str) -> float:
        """The moment at which a stage that begins now ends; the last one has all that is left."""
        part = 1.0 if stage == self.stages[-1] else SHARES[stage]
        return time.monotonic() + max(0.0, part * self.left)

    def say(self, text: str) -> None:
        print(f"[{self.left:5.0f} s left] {text}", flush=True)


class Journal:
    """A file of JSON lines: what it holds, and what is added, which is on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # what a killed run was writing
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        self.rows = [json.loads(line) for line in text.splitlines()]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


# compile


def stage_machine(run: Run) -> None:
    record = machine.record(run.device, ROOT) | {"state": machine.chip_state(run.device)}
    (run.folder / "machine.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    name = record["machine"].get("gpu", record["machine"]["cpu"])
    run.say(f"{name}, commit {record['commit']}, {record['state']}")


def stage_compile(run: Run) -> None:
    """What verify and tune launch, in that order."""
    from triton.backends.compiler import GPUTarget

    major, minor = torch.cuda.get_device_capability(run.device)
    target = GPUTarget("cuda", 10 * major + minor, 32)
    launches = [_launches_verified(run)] * ("verify" in run.stages) + [_launches_tuned(run)]
    by_code: dict[tuple, Launch] = {}
    for launch in itertools.chain(*launches):
        by_code.setdefault(_compile_key(launch), launch)
    wanted = list(by_code.values())
    order = list(verify.ARITHMETIC.values())
    wanted.sort(key=lambda launch: order.index((launch.problem.dtype, launch.problem.precision)))
    workers = run.workers or max(1, (os.cpu_count() or 2) - 1)
    journal, start, end = Journal(run.folder / "compile.jsonl"), time.monotonic(), run.share("compile")
    run.say(f"compile: {len(wanted)} kernels in {workers} processes")
    done, failed = 0, 0
    compiled = precompile.compile_all(wanted, run.chip, target, workers, deadline=end, with_host_code=True)
    for found in compiled:
        done += not found.error
        if found.error:
            failed += 1
            journal.add(launch=str(found.launch), error=found.error, seconds=round(found.seconds, 1))
    run.say(f"compile: {done} compiled, {failed} not, in {time.monotonic() - start:.0f} s")


def _compile_key(launch: Launch) -> tuple:
    """Launches with the same key are the same code: B and D are numbers of run time, but for strides.

    A stride that 16 divides is compiled for; B and D change that of the time's stride alone.
    """
    p = launch.problem
    aligned = p.B * p.D * p.H % 16 == 0, p.D * p.H % 16 == 0
    return (replace(launch, problem=replace(p, B=1, D=1)), aligned)


def _launches_verified(run: Run) -> Iterator[Launch]:
    for kernel, arithmetic in _families():
        for case in verify.cases(kernel, arithmetic, run.chip):
            yield case.launch


def _launches_tuned(run: Run) -> Iterator[Launch]:
    for kernel, problem in _keys(run):
        if kernel != "cudnn":
            for config in tuning.work(kernel, problem, run.chip)[1]:
                assert config
                yield Launch(kernel, problem, config)


# verify


def _families() -> list[tuple[str, str]]:
    return [(kernel, arithmetic) for arithmetic in verify.ARITHMETIC for kernel in verify.HIDDEN]


def stage_verify(run: Run) -> None:
    """All families, AT_ONCE at a time; one that crashes or hangs goes on behind what it fell over."""
    end = run.share("verify")
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(_verify, run, *family, end) for family in _families()]
        for future in futures:
            run.say(f"verify: {future.result()}")


def _verify(run: Run, kernel: str, arithmetic: str, end: float) -> str:
    """The family's cases, by as many processes as it takes: what ends one is a row, and the next goes on."""
    path = run.folder / f"verify.{kernel}.{arithmetic}.jsonl"
    starts = 0
    while time.monotonic() < end and starts < MOST_STARTS:
        starts += 1
        begun = [row["n"] for row in Journal(path).rows if "begins" in row]
        minutes = max(0.05, (end - time.monotonic() - 5) / 60)
        command = [sys.executable, "-m", "bench.verify", kernel, arithmetic, str(path)]
        command += ["--minutes", f"{minutes:.3f}", "--skip", str(max(begun, default=-1) + 1)]
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        limit = max(5.0, end - time.monotonic() + 10)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit
            )
            crashed, ended, said = True, f"its process ended with status {done.returncode}", done.stderr
            if done.returncode == 0:
                break
        except subprocess.TimeoutExpired:
            crashed, ended, said = False, f"it ran into the limit of {limit:.0f} s", ""
        _blame(Journal(path), ended, crashed)
        with (run.folder / "verify.log").open("a", encoding="utf-8") as log:
            log.write(f"{kernel} {arithmetic}: {ended}\n{said[-3000:]}\n")
    rows = [row["row"] for row in Journal(path).rows if "row" in row]
    counts = {v: sum(row["verdict"] == v for row in rows) for v in sorted({row["verdict"] for row in rows})}
    return f"{kernel} {arithmetic}: {counts}, {starts} processes"


def _blame(journal: Journal, ended: str, crashed: bool) -> None:
    """A row for the case that was running when its process ended: it crashed, hung, or time was up."""
    finished = {row["n"] for row in journal.rows if "row" in row}
    for row in [row for row in journal.rows if "begins" in row and row["n"] not in finished]:
        seconds = time.time() - row["at"]
        verdict = "crashed" if crashed else "hung" if seconds > HANG_SECONDS else "unfinished"
        reason = f"{ended}, {seconds:.0f} s after this case began"
        journal.add(n=row["n"], row={**row["begins"], "verdict": verdict, "reason": reason})


def stage_floor(run: Run) -> None:
    """What the GPU does at best: bandwidth, products, the shortest step, grid barriers."""
    found = floor.measure(run.device, run.arithmetic)
    (run.folder / "floor.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    run.say(f"floor: {found['step']}")


# tune


def _keys(run: Run) -> Iterator[tuple[str, Problem]]:
    """(kernel, problem) of each key, most wanted first, as `python -m elman tune` goes through them."""
    wanted = [verify.ARITHMETIC[arithmetic] for arithmetic in run.arithmetic]
    dtypes = list(dict.fromkeys(dtype for dtype, _ in wanted))
    for kernel, problem in cli.jobs([*itertools.product(run.batches, run.hidden)], dtypes, [1], run.device):
        if kernel in run.kernels and (problem.dtype, problem.precision) in wanted:
            yield kernel, problem


def stage_tune(run: Run) -> None:
    """Every candidate of every key, checked first; all times go to tune.jsonl, the best to the table."""
    end, journal = run.share("tune"), Journal(run.folder / "tune.jsonl")
    known = {row["key"] for row in journal.rows}
    path = tables.shipped_path(run.chip.name)
    todo = [job for job in _keys(run) if str(tables.key_of(*job)) not in known]
    run.say(f"tune: {len(todo)} keys, {len(known)} are there")
    done = 0
    for kernel, problem in todo:
        if time.monotonic() >= end:
            break
        row = _tuned(run, kernel, problem)
        journal.add(**row)
        if "us" in row:
            table = tables.read(path, run.chip.name)
            tables.write(path, table.with_entry(row_entry(kernel, problem, row), tuning.provenance()))
        done += 1
    run.say(f"tune: {done} of {len(todo)} keys")


def _tuned(run: Run, kernel: str, problem: Problem) -> dict[str, Any]:
    """A key's row: each candidate's microseconds a step or why it has none, the model's, and the best."""
    key = tables.key_of(kernel, problem)
    whole, tried = tuning.work(kernel, problem, run.chip)
    arithmetic = next(a for a, p in verify.ARITHMETIC.items() if p == (problem.dtype, problem.precision))
    start, found = time.perf_counter(), []
    right: list[Config | None] = []
    for config in tried:
        candidate: dict[str, Any] = {"config": asdict(config) if config else {}}
        if config is not None:
            expected = configs.estimate(kernel, config, whole, run.chip)
            candidate["model_us"] = round(expected.us, 3) if isinstance(expected, configs.Estimate) else None
            case = verify.Case(
                kernel, arithmetic, whole.B, whole.H, whole.D, "full", whole.backward, config, False
            )
            try:
                candidate |= verify.judge(case, run.device)
            except Exception as caught:  # a candidate that can't run is a row, the others may
                candidate |= {"verdict": "failed", "reason": f"{type(caught).__name__}: {caught}"[:300]}
        if candidate.get("verdict") in (None, "right"):  # an imprecise one must not win either
            right.append(config)
        found.append(candidate)
    results = timing.measure(kernel, whole, right, run.device)
    for config, samples in zip(right, results, strict=True):
        candidate = found[tried.index(config)]
        if isinstance(samples, str):
            candidate["reason"] = samples
        else:
            us, p20, p80 = (round(value, 4) for value in tuning.quantiles(samples).values())
            candidate |= {"us": us, "p20": p20, "p80": p80}
    timed = [c for c in found if "us" in c]
    best = min(timed, key=lambda c: c["us"]) if timed else {}
    return {
        "key": str(key), "kernel": kernel, "B": key.B, "H": key.H, "backward": key.backward,
        "arithmetic": arithmetic, **{name: best[name] for name in ("us", "p20", "p80", "config") if best},
        "candidates": found, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def row_entry(kernel: str, problem: Problem, row: dict[str, Any]) -> tables.Entry:
    """The table's entry of a key's row."""
    key, first = tables.key_of(kernel, problem), row["candidates"][0]
    config = tables.config_of(key, row["config"])
    assert not isinstance(config, str), config
    failed = {
        str(tables.config_of(key, c["config"])): c["reason"]
        for c in row["candidates"]
        if "us" not in c and "reason" in c
    }
    times = {
        str(tables.config_of(key, c["config"])): {"median": c["us"], "p20": c["p20"], "p80": c["p80"]}
        for c in row["candidates"]
        if "us" in c and config
    }
    return tables.Entry(
        key,
        config,
        row["us"],
        row["p20"],
        row["p80"],
        first.get("us"),
        len(row["candidates"]),
        failed,
        times=times,
    )


# sweep


def stage_sweep(run: Run) -> None:
    """The bench's sweep of this name, within its part of the time; what it leaves out its page names."""
    minutes = (run.share("sweep") - time.monotonic()) / 60
    command = [
        sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "--sweep", "layer",
        "--results", str(run.folder.parents[1]), "--budget", f"{max(0.1, minutes - 0.3):.2f}",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    with (run.folder / "sweep.log").open("a", encoding="utf-8") as file:
        try:
            subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=60 * minutes + 30
            )
        except subprocess.TimeoutExpired:
            run.say("sweep: it was ended; its rows are kept, and the same command goes on")


# report


def stage_report(run: Run) -> None:
    """What a person reads first: results/<gpu>/gpu.md, also on the terminal."""
    text = page(run.folder)
    (run.folder.parent / "gpu.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def page(folder: Path) -> str:
    """The page of a run, made of nothing but its rows."""
    record = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    on, software = record["machine"], ", ".join(f"{k} {v}" for k, v in record["software"].items())
    lines = [
        f"# {on.get('gpu', on['cpu'])}: are the kernels right, and how long does a step take",
        "",
        f"{record['date']}, commit {record['commit']}; {software}, driver {on.get('driver', 'unknown')}. "
        "Made by `python -m bench.gpu` from the rows in gpu/. Only the last column is an estimate.",
        "",
        "## Right or wrong",
        "",
        "Each launch against the float64 reference. Right is an error of at most 1.5 times nn.RNN's own, or "
        "of the rounding that no order of summation avoids. Errors are given as a part of that bar.",
        "",
        *_report_verify(folder),
        "",
        "## Microseconds a step",
        "",
        "The quickest config of each kernel, and nn.RNN's operator (cudnn), both without what a call costs "
        "beside its steps. Where cuDNN launches kernels for each step, the host that launches them bounds "
        "it: in a CUDA graph it is quicker. expected: the resource model's time of our quickest.",
        "",
        *_report_tune(folder),
    ]
    return "\n".join(lines) + "\n"


def _report_verify(folder: Path) -> Iterator[str]:
    yield "| kernel | arithmetic | launches | right | others | largest error | nn.RNN's largest |"
    yield "|---|---|---:|---:|---|---:|---:|"
    for path in sorted(folder.glob("verify.*.jsonl")):
        rows = [row["row"] for row in Journal(path).rows if "row" in row]
        if not rows:
            continue
        others = sorted({row["verdict"] for row in rows} - {"right"})
        words = ", ".join(f"{sum(row['verdict'] == v for row in rows)} {v}" for v in others)
        judged = [row for row in rows if row.get("error") is not None]
        worst = max((row["error"] / row["bar"] for row in judged), default=math.nan)
        theirs = max((row["nn_rnn"] for row in judged if row["nn_rnn"]), default=None)
        _, kernel, arithmetic, _ = path.name.split(".")
        right = sum(row["verdict"] == "right" for row in rows)
        yield (
            f"| {kernel} | {arithmetic} | {len(rows)} | {right} | {words} | {worst:.2f} | "
            f"{'' if theirs is None else f'{theirs:.1e}'} |"
        )


def _report_tune(folder: Path) -> Iterator[str]:
    rows = [row for row in Journal(folder / "tune.jsonl").rows if "us" in row]
    shapes = sorted({(r["arithmetic"], r["B"], r["H"], r["backward"]) for r in rows})
    shapes.sort(key=lambda s: (list(verify.ARITHMETIC).index(s[0]), *s[1:]))
    kernels = (*configs.KERNELS, "cudnn")
    yield f"| | B | H | pass | {' | '.join(kernels)} | cudnn over ours | expected |"
    yield f"|---|---:|---:|---|{'---:|' * (len(kernels) + 2)}"
    for shape in shapes:
        here = {r["kernel"]: r for r in rows if (r["arithmetic"], r["B"], r["H"], r["backward"]) == shape}
        ours = min((r for k, r in here.items() if k != "cudnn"), key=lambda r: r["us"], default=None)
        cells = [f"{here[k]['us']:.2f}" if k in here else "" for k in kernels]
        ratio = f"{here['cudnn']['us'] / ours['us']:.2f}" if "cudnn" in here and ours else ""
        model = (
            next((c.get("model_us") for c in ours["candidates"] if c["config"] == ours["config"]), None)
            if ours
            else None
        )
        arithmetic, B, H, backward = shape
        which = "backward" if backward else "forward"
        expected = "" if model is None else f"{model:.2f}"
        yield f"| {arithmetic} | {B} | {H} | {which} | {' | '.join(cells)} | {ratio} | {expected} |"


def stage_tools(run: Run) -> None:
    """The tests that only a GPU can run."""
    end = run.share("tools")
    command = [
        sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-k", "graph or stream or thread or bits",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    with (run.folder / "tests.log").open("a", encoding="utf-8") as file:
        try:
            subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                timeout=max(5.0, end - time.monotonic()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            run.say("tools: the tests were ended")


STAGE: dict[str, Callable[[Run], None]] = {
    "machine": stage_machine,
    "compile": stage_compile,
    "verify": stage_verify,
    "floor": stage_floor,
    "tune": stage_tune,
    "sweep": stage_sweep,
    "tools": stage_tools,
    "report": stage_report,
}


def pack(run: Run) -> None:
    """All that is new as one tar in the output folder."""
    if run.output is None:
        return
    run.output.mkdir(parents=True, exist_ok=True)
    with tarfile.open(run.output / f"{run.folder.parent.name}.tar.gz", "w:gz") as tar:
        for path in (run.folder.parent, tables.shipped_path(run.chip.name)):
            if path.exists():
                tar.add(path, arcname=str(path.relative_to(ROOT)))


def unpack(folder: Path) -> None:
    """Puts the files of a packed run in their places."""
    for path in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            tar.extractall(ROOT, filter="data")
            print(f"{path.name}: {len(tar.getnames())} files")


def _list(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _list(text))


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; default: 9")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also pack what is new into few files there"
    )
    parser.add_argument("--stages", type=_list, default=STAGES, help=f"default: {','.join(STAGES)}")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="put what --output DIR has in its places")
    parser.add_argument("--page", type=Path, metavar="results/GPU", help="make gpu.md again from its rows")
    parser.add_argument("--hidden", type=_numbers, default=TUNED_H)
    parser.add_argument("--batches", type=_numbers, default=TUNED_B)
    parser.add_argument("--arithmetic", type=_list, default=TUNED_ARITHMETIC)
    parser.add_argument("--kernels", type=_list, default=(*configs.KERNELS, "cudnn"))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(list(argv) if argv is not None else None)
    if options.unpack:
        unpack(options.unpack)
        return 0
    if options.page:
        (options.page / "gpu.md").write_text(page(options.page / "gpu"), encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device, and this command measures one")
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.results / machine.slug(machine.machine(device)) / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        device, common.chip(device), folder, deadline, options.output, options.hidden, options.batches,
        options.arithmetic, options.kernels, options.workers, tuple(options.stages),
    )  # fmt: skip
    for stage in options.stages:
        if run.left <= 0:
            run.say(f"no time for {stage}")
            continue
        start = time.monotonic()
        STAGE[stage](run)
        run.say(f"{stage} took {time.monotonic() - start:.1f} s")
        pack(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
