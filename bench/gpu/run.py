"""A run's folder, its clock, and the processes that do its work.

    Run             where it writes, on what, until when
    supervise(...)  a process for as many pieces of work as it survives, then the next one behind that

The process of the run itself launches nothing on the GPU. What an illegal access, an abort or a hang ends is
a process of its own, and costs the row that it was at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import machine
from bench.gpu.journal import Journal, forget, in_flight, read
from bench.precompile import module_of
from elman import routing
from elman.kernels import configs
from elman.kernels.configs import Chip

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("machine", "compile", "verify", "first", "tune", "sweep", "tools", "report")
#: A stage's part of the minutes that are left, among it and those that come after: what one leaves over, the
#: later ones share.
SHARES = {"compile": 18, "verify": 14, "first": 9, "tune": 14, "sweep": 36, "tools": 9}
#: Without a GPU: the interpreter is slow, and the sweep is small.
SHARES_WITHOUT = {"compile": 20, "verify": 48, "sweep": 32}
#: Seconds that are kept for machine and report.
KEPT = 6.0
#: How often a process is started at most that goes on where one before it died.
MOST_STARTS = 5
#: A launch that takes longer hangs: it compiles for some seconds, and runs for milliseconds.
HANG_SECONDS = 30.0
#: Seconds beyond its time in which a process may end by itself.
GRACE = 8.0
#: What a kernel's launches must not have done if it is to be launched again.
FATAL = ("crashed", "hung")


@dataclass(frozen=True)
class Ended:
    """How a process ended, and why.

    verdict: "" if well; "crashed" by a signal or without its GPU; "failed" with another status; "hung";
    "unfinished" for want of time. status: what it returned itself, None if it was ended.
    """

    verdict: str
    reason: str
    status: int | None = None

    @property
    def died(self) -> bool:
        """Whether what it was at is to blame, and not the time."""
        return self.verdict in (*FATAL, "failed")


WELL = Ended("", "", 0)


@dataclass
class Run:
    """Where a run writes, on what, and until when (time.monotonic).

    folder: results/<machine>/gpu. table: the tuned table. keys: the tuner's options that say which keys it
    times. capability: what is compiled for, 90 for sm_90. workers: processes that compile, 0 for all cores
    but two. python: what runs a module, tethered to this process.
    """

    device: torch.device
    chip: Chip
    folder: Path
    table: Path
    deadline: float
    stages: tuple[str, ...] = STAGES
    keys: tuple[str, ...] = ()
    capability: int = 90
    memory_gib: float = 0.0
    workers: int = 0
    python: tuple[str, ...] = (sys.executable, "-m", "bench.gpu.tether")
    output: Path | None = None
    #: When this run began, and when the first one did whose rows it goes on with, in seconds since 1970.
    began: float = field(default_factory=time.time)
    since: float = field(default_factory=time.time)
    #: Of processes. bench/precompile.py changes ours for moments, to start those that compile and see no GPU.
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    #: Set by `stopping`: threads end their processes and begin no more.
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def until(self, stage: str) -> float:
        """The moment at which a stage that begins now ends."""
        coming = self.stages[self.stages.index(stage) :]
        shares = SHARES if self.device.type == "cuda" else SHARES_WITHOUT
        part = shares[stage] / sum(shares.get(name, 0) for name in coming)
        return time.monotonic() + max(0.0, part * (self.left - KEPT))

    def say(self, text: str) -> None:
        print(f"[{max(0.0, self.left):4.0f} s left] {text}", flush=True)

    @property
    def log(self) -> Path:
        """Where processes put what they print."""
        return self.folder / "gpu.log"

    def start(self, *command: str, variables: dict[str, str] | None = None) -> subprocess.Popen:
        """A process in the root of the project, its output in the log. command: what tether.py takes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**self.environment, **self._device_variables(), **(variables or {})}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            return subprocess.Popen(
                [*self.python, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    def _device_variables(self) -> dict[str, str]:
        if self.device.type == "cuda":
            return {}
        return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

    def finish(self, process: subprocess.Popen, end: float, journal: Path | None = None) -> Ended:
        """Waits until the process ends; ends it GRACE after `end`, or when what it is at hangs."""
        assert process.stdin
        with process.stdin:  # the tether
            try:
                return self._wait(process, end, journal)
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may not let go of it
                        process.wait(timeout=10)

    def _wait(self, process: subprocess.Popen, end: float, journal: Path | None) -> Ended:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=0.2)
                if status < 0:
                    return Ended("crashed", f"its process was ended by {signal.Signals(-status).name}")
                if status == machine.LOST_GPU:
                    return Ended("crashed", "its process lost the GPU", status)
                return Ended("failed", f"its process ended with status {status}", status) if status else WELL
            begun = in_flight(journal) if journal else None
            patience = HANG_SECONDS * begun["patience"] if begun else 0.0
            if begun and time.time() - begun["at"] > patience:
                return Ended("hung", f"it took more than {patience:g} s")
            if self.stopped.is_set():
                return Ended("unfinished", "the run was stopped")
            if time.monotonic() > end + GRACE:
                if begun and time.time() - begun["at"] > HANG_SECONDS:
                    return Ended("hung", f"it took more than {HANG_SECONDS:g} s, and the time was over")
                return Ended("unfinished", "the time for it was over")

    def trusted(self) -> list[str]:
        """The kernels that were right once and never crashed or hung; before any was verified, all of them.

        Without those that ELMAN_KERNELS leaves out.
        """
        bad, right, some = set(), set(), False
        for path in (*self.folder.glob("verify.*.jsonl"), self.folder / "tune.jsonl"):
            for row in read(path):
                found = row.get("row", row)
                name = module_of(found.get("kernel", ""))
                verdicts = {found.get("verdict"), *(c.get("verdict") for c in found.get("candidates", ()))}
                some |= path.name != "tune.jsonl" and "row" in row
                right |= {name} if "right" in verdicts else set()
                bad |= {name} if verdicts & set(FATAL) else set()
        able = [kernel for kernel in configs.KERNELS if not routing.not_allowed(kernel)]
        return [kernel for kernel in able if kernel not in bad and (kernel in right or not some)]


def supervise(run: Run, journal: Path, end: float, command: Callable[[], list[str]]) -> Ended:
    """Runs a command, which goes on behind its journal's rows, until it ends well; how the last one ended.

    What a process died of or hung at gets a row that says so. What was cut short for want of time gets none:
    the next run does it. command: of the next process, by what is known by then.
    """
    ended = Ended("unfinished", "no time was left for it")
    for _ in range(MOST_STARTS):
        if time.monotonic() >= end or run.stopped.is_set():
            break
        forget(journal)  # else the next process would be taken for one that has hung since then
        ended = run.finish(run.start(*command(), "--until", f"{end:.1f}"), end, journal)
        begun = in_flight(journal)
        if begun and ended.died:
            row = {**begun["what"], "verdict": ended.verdict, "reason": ended.reason}
            Journal(journal).add(n=begun["n"], row=row)
        if not ended.died:
            break
    return ended


@contextlib.contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Where the block is left by Ctrl-C or an error, the threads that it waits for end within moments."""
    try:
        yield
    except BaseException:
        run.stopped.set()
        raise


@contextlib.contextmanager
def every(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """Does the work every so many seconds, beside what the block does, and once more at its end."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            try:
                work()
            except Exception as error:  # such as a folder that is being renamed: the next time is soon
                print(f"not now: {type(error).__name__}: {error}", flush=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        work()
