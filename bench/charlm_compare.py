"""The same character model trained with nn.RNN and with every backend: --compare of bench/charlm.py."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import elman
from bench import charlm_page, machine, measure, report
from bench.corpus import Corpus
from bench.language import Settings, Training
from bench.rows import BASELINE
from bench.training import Interrupted, Limits, Progress, Run, baselines_of, curve_of, introduction, task_of

ROOT = Path(__file__).parents[1]
ROUNDS = 30  # turns of each backend
GENERATED = 500  # characters a turn
GENERATIONS = 12  # turns


def prepare(
    corpus: Corpus,
    settings: Settings,
    device: torch.device,
    limits: Limits,
    *,
    backend: str | None,
    prompt: Tensor,
    length: int,
    results: Path,
) -> Callable[[Interrupted], int]:
    """What has to be run, made and tried; raises before anything is written if it can't be.

    backend: the only one beside nn.RNN, or None for all. length: of the samples, in characters.
    """
    names, absent = contenders(device, backend)
    runs = {name: Run(Training(corpus, settings, name, device)) for name in names}
    for run in runs.values():
        run.training.warm()
    results.mkdir(parents=True, exist_ok=True)

    def work(interrupted: Interrupted) -> int:
        record = machine.record(device, ROOT)
        for run in runs.values():
            print(introduction(run))
        baselines = baselines_of(corpus)
        print(task_of(corpus, baselines), flush=True)
        trained = race(runs, limits, interrupted)
        generated = write_by_turns(runs, prompt, interrupted)
        samples = {
            name: corpus.text(run.training.sample(prompt, length, seed=settings.seed))
            for name, run in runs.items()
            if not interrupted()
        }
        if interrupted():
            print("Stopped: nothing is published.", file=sys.stderr)
            return 130
        record |= {
            "threads": torch.get_num_threads(),
            "settings": dataclasses.asdict(settings),
            "text": {
                "name": corpus.name,
                "digest": corpus.digest,
                "characters": corpus.size,
                "held_out": len(corpus.held_out),
                "alphabet": len(corpus.alphabet),
            },
            "minutes": limits.seconds / 60 if math.isfinite(limits.seconds) else None,
            "steps": limits.steps if math.isfinite(limits.steps) else None,
            "baselines": baselines,
            "absent": absent,
            "prompt": corpus.text(prompt.tolist()),
            "runs": [
                {
                    **curve_of(run, least=min(len(run.losses) for run in runs.values())),
                    "route": run.training.route(),
                    "training": trained[name],
                    "generation": generated[name],
                    "apart": apart(run.losses, runs[BASELINE].losses),
                    "sample": samples[name],
                }
                for name, run in runs.items()
            ],
        }
        for path in charlm_page.publish(results, record):
            print(f"Wrote {path}")
        report.index(results)
        return 0

    return work


def contenders(device: torch.device, only: str | None) -> tuple[list[str], dict[str, str]]:
    """nn.RNN and the backends to compare it with, and why others take no part."""
    if only:
        return [BASELINE, only], {}
    names, absent = [BASELINE], {}
    for name, available in elman.available_backends().items():
        if available is not True:
            absent[name] = str(available)
        elif name == "native" and device.type != "cpu":
            absent[name] = "It is for tensors on a CPU."
        elif name == "triton" and device.type == "cpu":
            absent[name] = "On a CPU it runs in Triton's interpreter, which is for tests."
        else:
            names.append(name)
    return names, absent


def race(runs: dict[str, Run], limits: Limits, interrupted: Interrupted) -> dict[str, list[float]]:
    """All trained by turns, ROUNDS of them or until interrupted; each turn's seconds a character.

    What slows the machine down for a while so meets all of them, and a turn's numbers belong together. A
    turn in which one of them has nothing to do, having been slow to stop in the last, has no numbers.
    """
    taken: list[dict[str, float]] = []
    progress = Progress(limits)
    for turn in range(ROUNDS):
        taken.append({})
        for name in measure.order(list(runs), turn):
            run, share = runs[name], (turn + 1) / ROUNDS
            before = run.seconds, run.training.characters
            while limits.share(run) < share:
                run.advance(limits.count(run))
                progress.show(run, [other for other in runs.values() if other is not run])
                if interrupted():
                    progress.end()
                    return {}
            if run.training.characters > before[1]:
                seconds, characters = run.seconds - before[0], run.training.characters - before[1]
                taken[turn][name] = seconds / characters
            run.check()
            if not run.evaluate():
                raise run.nothing
    progress.end()
    whole = [numbers for numbers in taken if numbers.keys() == runs.keys()]
    return {name: [numbers[name] for numbers in whole] for name in runs}


def write_by_turns(runs: dict[str, Run], prompt: Tensor, interrupted: Interrupted) -> dict[str, list[float]]:
    """Seconds a character of generation, each turn's, until interrupted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(GENERATIONS + 1):
        for name in measure.order(list(runs), turn):
            if interrupted():
                return {}
            seconds = measure.wall_seconds(lambda: runs[name].training.sample(prompt, GENERATED))  # noqa: B023
            if turn:  # the first one warms up
                taken[name].append(seconds / GENERATED)
    return taken


def apart(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The largest relative difference of two runs' losses, over the first 10, 100, 1,000 ... steps."""
    most, found = 0.0, {}
    for step, (loss, other) in enumerate(zip(losses, others, strict=False), 1):
        most = max(most, abs(loss - other) / other)
        if step in (10, 100, 1000, 10000):
            found[str(step)] = most
    return found
