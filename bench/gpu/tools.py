"""The stage tools: what other programs say of the kernels on this GPU. Each is a process of its own.

Its words are gpu/<name>.txt, its status is a row of gpu/tools.jsonl.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass

from bench.gpu.journal import Journal, plain
from bench.gpu.run import Run
from bench.rows import replace as write
from elman.kernels import configs

#: Seconds that one may take.
SECONDS = 60.0


@dataclass(frozen=True)
class Tool:
    """A command line, what it says if it did its work, and the kernels that it launches."""

    command: list[str]
    says: str
    kernels: tuple[str, ...]


def stage_tools(run: Run) -> str:
    """Runs those that have not passed yet; says which did not pass, and why."""
    end, journal, left = run.until("tools"), Journal(run.folder / "tools.jsonl"), []
    for name, tool in tools().items():
        if any(row["tool"] == name and row["status"] == "passed" for row in journal.rows):
            continue
        status, reason = _tool(run, name, tool, min(end, time.monotonic() + SECONDS))
        run.say(f"tools: {name}: {status}{f', {reason}' if reason else ''}")
        journal.add(tool=name, status=status, reason=reason)
        if status != "passed":
            left.append(f"{name}: {reason}")
    return "; ".join(left)


def _tool(run: Run, name: str, tool: Tool, limit: float) -> tuple[str, str]:
    """Its status and, unless it passed, why."""
    program = shutil.which(tool.command[0])
    bad = [kernel for kernel in tool.kernels if kernel not in run.trusted()]
    if not program:
        return "not run", f"{tool.command[0]} is not on PATH"
    if bad:
        return "not run", f"{' and '.join(bad)} crashed, hung or was not right"
    if time.monotonic() >= limit:
        return "not run", "no time was left"
    place = run.log.stat().st_size if run.log.exists() else 0
    ended = run.finish(run.start("--", program, *tool.command[1:]), limit)
    said = run.log.read_bytes()[place:].decode(errors="replace").split("\n", 2)[2]  # after the command
    write(run.folder / f"{name}.txt", plain_lines(said))
    if not ended.verdict and tool.says not in said:
        return "failed", f"it ended well and did not say {tool.says!r}"
    return ended.verdict or "passed", ended.reason


def tools() -> dict[str, Tool]:
    module = [sys.executable, "-m"]
    profile = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-name", "regex:forward_kernel"]
    profile += ["--launch-skip", "3", "--launch-count", "1", *module, "bench.gpu.one_launch"]
    racecheck = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *module]

    def tests(words: str, *kernels: str) -> Tool:
        command = [*module, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", words]
        return Tool(command, " passed", kernels)

    return {
        "soak": tests("million_meetings", "cooperative"),
        "two-streams": tests("fill_the_chip", "cooperative"),
        "ncu.resident.256": Tool([*profile, "resident", "256"], "Duration", ("resident",)),
        "ncu.cooperative.1024": Tool([*profile, "cooperative", "1024"], "Duration", ("cooperative",)),
        "racecheck": Tool([*racecheck, "tests.sanitize", "resident", "bfloat16"], "RACECHECK", ("resident",)),
        "tests": tests("(graph or stream or thread or bits) and not fill_the_chip", *configs.KERNELS),
    }


def plain_lines(text: str) -> str:
    """A tool's output without this machine's paths."""
    return "\n".join(plain(line, 2000) if "/" in line else line for line in text.splitlines()) + "\n"
