"""One run of the suite: its plan, its rows as they are measured, its budget, its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import floor, machine, measure, report
from bench import rows as records
from bench.cell import Timing, absent_rows, describe, device_timing, measure_cell
from bench.contenders import AUTO, CONTENDERS, Problem, absence, taken_by_auto
from bench.rows import BASELINE, FAILED, FAILURES, LEFT_OUT, SHED, TIMED, UNAVAILABLE, WRONG, Key, Row
from bench.workloads import DTYPES, PASSES, SWEEPS, Sweep, Workload, by_hand

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
# Where tables go that are never published: git ignores it, and bench/report.py does not read it.
SCRATCH = ROOT / ".benchmarks" / "unpublished"

Cell = tuple[Workload, str]

# Seconds of sampling on a GPU, whose calls take milliseconds and differ little.
GPU_SECONDS = 0.25

# What a finished cell may consist of; one with any other row is measured again by the next run.
SETTLED = (TIMED, UNAVAILABLE, LEFT_OUT)


@dataclass(frozen=True)
class Plan:
    """What is to be measured: workloads with their dtypes, passes and contenders, under a table's name.

    table: the sweep's name, and whatever was asked for that is not the sweep's own, so that a part of a
    sweep never takes the place of the whole, nor one set of shapes that of another.
    """

    sweep: str
    table: str
    seconds: float
    device: torch.device
    workloads: tuple[Workload, ...]
    passes: tuple[str, ...]
    contenders: tuple[str, ...]

    @property
    def takes(self) -> str:
        """How long a run takes, in words: known of a whole sweep on a CPU, else its sampling alone."""
        sweep = SWEEPS.get(self.table)
        if sweep and sweep.takes and self.device.type == "cpu":
            return sweep.takes
        rows = sum(not absence(name, workload, self.device) for workload, _, name in self.keys)
        minutes = max(1, round(self.seconds * rows / 60))
        return f"sampling alone takes {minutes} min ({rows} rows of {self.seconds:g} s), checks come on top"

    def destination(self, results: Path) -> Path:
        """The folder of the machines' folders: the one that was asked for, unless it is the repository's
        results/ and the sweep is one that is never published there; then SCRATCH."""
        never = self.sweep in SWEEPS and not SWEEPS[self.sweep].published
        return SCRATCH if never and results.resolve().is_relative_to(RESULTS) else results

    @property
    def keys(self) -> list[Key]:
        """Every row, in the order of the table."""
        return [(w, p, c) for w in self.workloads for p in self.passes for c in self.contenders]

    @classmethod
    def make(
        cls,
        sweep: str = "quick",
        shapes: str = "",
        device: str = "",
        dtypes: str = "",
        passes: str = "",
        contenders: str = "",
    ) -> Plan:
        """The plan of the command line's words, lists separated by commas; "" stands for the sweep's own.

        Raises ValueError for a word that is none, or a device or dtype that this machine hasn't.
        """
        name, chosen = ("shapes", by_hand(shapes)) if shapes else (sweep, SWEEPS[sweep])
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda"):
            raise ValueError(
                f"--device is {device!r}; expected cpu or cuda (CUDA_VISIBLE_DEVICES chooses which)"
            )
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda and this machine has no CUDA device; expected --device cpu")
        own_dtypes = chosen.gpu_dtypes if found.type == "cuda" else ("float32",)
        own = {
            "--dtype": (dtypes, own_dtypes, DTYPES),
            "--passes": (passes, chosen.passes, tuple(PASSES)),
            "--backends": (contenders, _contenders(chosen, found), CONTENDERS),
        }
        taken = {option: _words(option, *words) for option, words in own.items()}
        if "tf32" in taken["--dtype"] and found.type != "cuda":
            raise ValueError(
                "--dtype has tf32, which is arithmetic of NVIDIA GPUs; expected float32 on a CPU"
            )
        if BASELINE not in taken["--backends"]:  # every row needs its error and its time
            taken["--backends"] = (BASELINE, *taken["--backends"])
        words = [taken[option] for option, (_, default, _) in own.items() if taken[option] != default]
        suffix = ["+".join([w for w in some if w != BASELINE] or [BASELINE]) for some in words]
        if shapes:
            suffix.insert(0, hashlib.sha256(repr(chosen.workloads).encode()).hexdigest()[:6])
        return cls(
            name,
            re.sub("[: ]", "-", "-".join([name, *suffix])),
            chosen.seconds if found.type == "cpu" else min(chosen.seconds, GPU_SECONDS),
            found,
            tuple(dataclasses.replace(w, dtype=d) for d in taken["--dtype"] for w in chosen.workloads),
            taken["--passes"],
            taken["--backends"],
        )


def _contenders(sweep: Sweep, device: torch.device) -> tuple[str, ...]:
    """The sweep's own; on a CPU what auto takes stands in its place, unless it is among them anyway."""
    own = sweep.contenders or CONTENDERS
    if device.type != "cpu" or AUTO not in own or not sweep.contenders:
        return own
    taken = {taken_by_auto(workload, device) for workload in sweep.workloads}
    return tuple(name for name in CONTENDERS if name in taken or (name in own and name != AUTO))


def _words(option: str, text: str, default: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a list, in the known order; the default for none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise ValueError(f"{option} has {word!r}; expected one or several of {', '.join(known)}")
    return tuple(word for word in known if word in words) if words else default


# Where pytest keeps the plan: here, because it imports conftest.py by another name than anyone else would.
PLAN = pytest.StashKey[Plan]()


class Session:
    """All rows of one run. Cells are measured when first asked for, and kept on the disk from then on.

    A run that was stopped is gone on with by the next one with the same plan, code, machine and versions. It
    leaves a cell out in which two processes have died: the same command must get past it.
    selected: the cells to measure and the contenders of each (after pytest's -k). budget: minutes for the
    whole run, or None. begin(title), say(phase) and end(rows) tell whoever watches.
    """

    def __init__(
        self,
        plan: Plan,
        selected: Mapping[Cell, list[str]],
        results: Path,
        *,
        min_rounds: int = 0,
        scale: float = 1.0,
        budget: float | None = None,
        restart: bool = False,
        begin: Callable[[str], None] = lambda title: None,
        say: Callable[[str], None] = lambda phase: None,
        end: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        self.plan, self.selected = plan, dict(selected)
        self.begin, self.say, self.end = begin, say, end
        rounds = max(measure.MIN_ROUNDS, min_rounds)
        self.timing = device_timing(plan.device, plan.seconds * scale, rounds)
        self.deadline = math.inf if budget is None else time.monotonic() + 60 * budget
        self.budget = budget
        self.raised: dict[Key, Exception] = {}
        self.problem: Problem | None = None
        self.truth: dict[str, torch.Tensor] = {}
        self.record = self._record()
        self.folder = results / machine.slug(self.record["machine"])
        self.journal = self.folder / f"{plan.table}.partial.jsonl"
        self.notes = self.folder / f"{plan.table}.partial.begun"
        self.died: dict[str, int] = {}  # how many processes began a cell and did not end it
        self.lost = ""  # why this process can use its GPU no more
        self.published = self.folder / "rows.jsonl"
        if self.published.exists():
            records.read(self.published)  # if that fails, then now, and not after an hour of measuring
        self.first: dict[str, float] = {}  # seconds of the last first call of each contender
        self.rows: dict[Key, Row] = {}
        self.started = ""  # a sentence on what an unfinished run has left
        if not (self.journal.exists() and not restart and self._resume()):
            self.notes.unlink(missing_ok=True)
        self.measured: set[Cell] = set()  # by this run
        resumed = sum(self._settled(cell) for cell in self.selected)
        if resumed:
            there = f"{resumed} of {len(self.selected)} cells are there"
            self.started = f"Going on with a run of {self.record['date']}: {there}."
        for cell in self.selected:
            absent = absent_rows(*cell, self.selected[cell], plan.device)
            self.rows.update({row.key: row for row in absent})
        self.to_measure = sum(not self._settled(cell) for cell in self.selected)

    def _record(self) -> records.Run:
        """What the rows are measured on and how; the floor is added when the first cell is measured."""
        device = self.plan.device
        return {
            "sweep": self.plan.sweep,
            **machine.record(device, ROOT),
            "source": machine.source(),
            "tables": machine.tuned(device),  # as the run begins: what it tunes itself is added to them
            "float32": "IEEE" if device.type == "cpu" else "IEEE in rows of float32, TF32 in rows of tf32",
            "timing": {
                "clock": "CUDA events" if device.type == "cuda" else "time.perf_counter",
                "threads": torch.get_num_threads(),
                "seconds": self.timing.seconds,
                "min_rounds": self.timing.min_rounds,
                "cache": f"warm: a call below {measure.WARM_BELOW * 1e3:g} ms comes after another, untimed",
            },
            "plan": {
                "dtypes": list(dict.fromkeys(w.dtype for w in self.plan.workloads)),
                "passes": list(self.plan.passes),
                "contenders": list(self.plan.contenders),
            },
            "budget": self.budget,  # minutes; what it costs is samples, and each row says how many it has
            "floor": {},
            "partial": "",
            "missing": "",
        }

    def _resume(self) -> bool:
        """Take over an unfinished run's rows, if they are this run's in all but the hour; whether they are.

        Else its file is put aside: a run on a rare machine must not be lost to a changed line.
        """
        try:
            stored = records.read(self.journal)
        except ValueError as error:
            self.started = f"An unfinished run can't be read and is kept as {self._stale('').name}: {error}"
            return False
        if self.plan.table not in stored:
            return False
        run, rows = stored[self.plan.table]
        same = ("sweep", "source", "machine", "software", "timing", "plan")
        # nvidia-smi tells of these, if it answers.
        unsure = {"driver", "clocks_mhz"}
        run = {**run, "machine": {k: v for k, v in run["machine"].items() if k not in unsure}}
        own = {k: v for k, v in self.record["machine"].items() if k not in unsure}
        differing = [key for key in same if run.get(key) != (own if key == "machine" else self.record[key])]
        # The run itself may have tuned more, up to the moment in which it was killed.
        before, now = run.get("tables", {}), self.record["tables"]
        if not before.items() <= now.items() or "ELMAN_KERNELS" in now.keys() - before.keys():
            differing.append("tables")
        if differing:
            self.started = (
                f"An unfinished run of {run['date']} differs in {', '.join(differing)}, so it is not gone on "
                f"with; its {len(rows)} rows are kept as {self._stale(run['date']).name}."
            )
            return False
        keys = set(self.plan.keys)
        self.record = {**self.record, "date": run["date"], "floor": run["floor"]}
        self.record["tables"] = run.get("tables", {})
        if "no_floor" in run:
            self.record["no_floor"] = run["no_floor"]
        self.rows = {row.key: row for row in rows if row.key in keys}
        self.died = json.loads(self.notes.read_text(encoding="utf-8")) if self.notes.exists() else {}
        return True

    def _stale(self, date: str) -> Path:
        """Renames the journal to <table>.<date>.stale.jsonl, never over another."""
        date = date or time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.journal.stat().st_mtime))
        return records.put_aside(self.journal, self.plan.table, date)

    def _settled(self, cell: Cell) -> bool:
        return not self._unsettled(cell)

    def _unsettled(self, cell: Cell) -> list[str]:
        rows = {name: self.rows.get((*cell, name)) for name in self.selected[cell]}
        return [name for name, row in rows.items() if row is None or row.status not in SETTLED]

    def row(self, workload: Workload, pass_name: str, contender: str) -> Row:
        """The row of that contender; its whole cell is measured if neither this nor a former run has."""
        cell = (workload, pass_name)
        if cell not in self.measured and not self._settled(cell):
            self._measure(cell)
        return self.rows[(*cell, contender)]

    def _measure(self, cell: Cell) -> None:
        workload, pass_name = cell
        dtype = "" if workload.dtype == "float32" else f"{workload.dtype} "
        self.begin(f"{workload.shape} {dtype}{PASSES[pass_name]}")
        if not self.measured:
            self._open()
        name = f"{workload.id}-{pass_name}"
        if self.died.get(name, 0) >= 2:
            reason = "Two processes ended while they measured it: this run tries it no more."
            rows = [Row(*cell, contender, FAILED, reason) for contender in self._unsettled(cell)]
        elif time.monotonic() >= self.deadline:
            rows = self._shed(cell)
        else:
            with self._begun(name):
                rows = self._rows(cell)
        self.first.update({row.contender: row.first for row in rows if row.first is not None})
        self.rows.update({row.key: row for row in rows})
        records.append(self.journal, self.plan.table, rows)
        self.measured.add(cell)
        self.end([row for row in rows if row.status in FAILURES])
        if self.lost:  # each further cell would fail too, and keep nothing from doing so in the next run
            pytest.exit(
                f"This process can use its GPU no more: {self.lost}. The same command goes on.",
                machine.LOST_GPU,
            )

    @contextmanager
    def _begun(self, name: str) -> Iterator[None]:
        """Within it a file says that a process measures that cell; where it dies, the next one finds that."""
        others = {cell: died for cell, died in self.died.items() if cell != name}
        self._note({**others, name: self.died.get(name, 0) + 1})
        try:
            yield
        finally:
            self.lost = machine.lost(self.plan.device)
            if not self.lost:
                self._note(others)

    def _note(self, died: dict[str, int]) -> None:
        self.died = died
        if died:
            records.replace(self.notes, json.dumps(died) + "\n")
        else:
            self.notes.unlink(missing_ok=True)

    def _open(self) -> None:
        """Before the first cell: the floor, and the journal with what is known so far, in one move."""
        if not self.record["floor"]:
            self.say("the machine's floor")
            self.record.pop("no_floor", None)
            try:
                self.record["floor"] = floor.measure(self.plan.device, self.record["plan"]["dtypes"])
            except Exception as error:  # the rows are worth having without, and the page says so
                self.record["no_floor"] = describe(error)
        self.folder.mkdir(parents=True, exist_ok=True)
        records.write(self.journal, {self.plan.table: (self.record, list(self.rows.values()))})

    def _shed(self, cell: Cell) -> list[Row]:
        """The rows of a cell that comes too late; what a former run has of it stays."""
        reason = f"The budget of {self.budget:g} minutes was spent."
        return [
            Row(*cell, name, *(absence(name, cell[0], self.plan.device) or (SHED, reason)))
            for name in self.selected[cell]
            if (*cell, name) not in self.rows
        ]

    def _rows(self, cell: Cell) -> list[Row]:
        """The cell's rows, measured, and with them what a former run has of it: samples are paired."""
        workload, pass_name = cell
        names = [c for c in self.plan.contenders if c in self.selected[cell] or (*cell, c) in self.rows]
        able = [name for name in names if not absence(name, workload, self.plan.device)]
        timing = self._share(len({BASELINE, *able}))
        late = [name for name in able if name != BASELINE and self.first.get(name, 0) > timing.limit]
        reason = "Its last first call took {:.2g} s, more than its part of the budget."
        rows = [Row(*cell, name, SHED, reason.format(self.first[name])) for name in late]
        names = [name for name in names if name not in late]
        try:
            if self.problem is None or self.problem.workload != workload:
                self.say("reference")
                self.problem, self.truth = None, {}  # its memory first
                self.problem = Problem(workload, self.plan.device)
                self.truth = self.problem.truth()
            found, raised = measure_cell(self.problem, self.truth, pass_name, names, timing, self.say)
        except Exception as error:  # no contender's own: of the reference, or of the bench itself
            found = {name: Row(*cell, name, FAILED, f"Not measured. {describe(error)}") for name in names}
            raised = dict.fromkeys(names, error)
            self.problem = None
        self.raised.update({(*cell, name): error for name, error in raised.items()})
        return [*found.values(), *rows]

    def _share(self, contenders: int) -> Timing:
        """This cell's part of what is left of the budget: fewer seconds first, then fewer contenders.

        Half of a part is for what comes before the sampling: reference, checks, warming up. A contender may
        take more than its part, but no more than a tenth of all that is left.
        """
        if self.budget is None:
            return self.timing
        cells = sum(cell not in self.measured and not self._settled(cell) for cell in self.selected)
        left = max(0.0, self.deadline - time.monotonic())
        part = left / max(1, cells) / contenders
        return dataclasses.replace(
            self.timing,
            seconds=min(self.timing.seconds, part / 2),
            warmup=min(self.timing.warmup, part / 8),
            limit=max(part, left / 10),
        )

    def partial(self) -> str:
        """Why this run is not published, in a sentence; empty if it is."""
        rows, plan = list(self.rows.values()), len(self.plan.keys)
        reasons = []
        if self.timing.seconds < self.plan.seconds:
            reasons.append(
                f"each contender was sampled for {self.timing.seconds:g} s, not {self.plan.seconds:g}"
            )
        if len(rows) < plan:
            reasons.append(f"{len(rows)} of {plan} rows were run")
        timed, before = (_count(some, TIMED) for some in (rows, self._published_rows()))
        # A small budget must not cost what a longer run has measured; a row that fails is news.
        if _count(rows, SHED) and timed < before:
            reasons.append(f"{timed} rows were timed within the budget, of the published table {before}")
        return f"{' and '.join(reasons)}." if reasons else ""

    def missing(self) -> str:
        """What a table of this run lacks, in a sentence that its page begins with; empty if nothing."""
        rows = list(self.rows.values())
        counts = [
            (_count(rows, SHED), "left out for want of time"),
            (_count(rows, WRONG), "wrong"),
            (_count(rows, FAILED), "failed"),
        ]
        lost = sum(count for count, _ in counts)
        reasons = []
        if lost:
            why = ", ".join(f"{count} {word}" for count, word in counts if count)
            are = "is" if lost == 1 else "are"
            reasons.append(f"{lost} of {len(self.plan.keys)} rows {are} missing: {why}.")
        if "no_floor" in self.record:
            reasons.append(f"There is no floor: {self.record['no_floor'].rstrip('.')}.")
        return " ".join(reasons)

    def _published_rows(self) -> list[Row]:
        tables = records.read(self.published) if self.published.exists() else {}
        return tables[self.plan.table][1] if self.plan.table in tables else []

    def ordered(self) -> list[Row]:
        """The rows in the table's order, whatever order they were run in."""
        return [self.rows[key] for key in self.plan.keys if key in self.rows]

    def write(self) -> list[Path]:
        """Write the table, pages, pictures, machine.json and the index; returns the paths, the page first.

        A run whose every row was tried takes its table's place in rows.jsonl, and its page says which rows
        are missing. A run that was interrupted, or selected with -k, stays in <table>.partial.jsonl, with a
        page <table>.partial.md. The journal stays as long as a row is missing: the same command goes on.
        """
        table, rows = self.plan.table, self.ordered()
        self.record["partial"], self.record["missing"] = self.partial(), self.missing()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.record["partial"] or self.record["missing"]:
            records.write(self.journal, {table: (self.record, rows)})
        if self.record["partial"]:
            return [*report.publish(self.folder, table, self.record, rows, partial=True), self.journal]
        tables = records.read(self.published) if self.published.exists() else {}
        records.write(self.published, {**tables, table: (self.record, rows)})
        machine.write(self.folder, self.record)
        pages = report.publish(self.folder, table, self.record, rows)
        report.index(self.folder.parent)
        if not self.record["missing"]:
            self.journal.unlink(missing_ok=True)
        self._note({})
        (self.folder / f"{table}.partial.md").unlink(missing_ok=True)
        return [*pages, self.published]


def _count(rows: list[Row], status: str) -> int:
    return sum(row.status == status for row in rows)
