"""Rows to what a person reads: the tables at the end of a run, and the published pages.

    python -m bench.report [results/]

rebuilds every machine's pages, CSV files and pictures, and the index, from the stored rows alone, byte by
byte as the runs wrote them.
"""

from __future__ import annotations

import argparse
import csv as comma_separated
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import charlm_page
from bench import floor as floors
from bench import page as pages
from bench import rows as records
from bench.rows import BASELINE, TIMED, Row, Run
from bench.tables import Table, machine_name, verdict
from bench.workloads import PASSES


def csv(run: Run, rows: Sequence[Row]) -> str:
    """A line per row, in SI units (seconds, bytes, flop/s); no raw samples."""
    table = Table(run, rows)
    lines = [_plain(table, row) for row in rows]
    text = io.StringIO()
    writer = comma_separated.DictWriter(text, lines[0] if lines else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _plain(table: Table, row: Row) -> dict[str, object]:
    """What csv says of a row."""
    timed = row.status == TIMED
    own, baseline = row.errors[row.worst] if row.worst else (None, None)
    floor = table.floor(row)
    found: dict[str, object] = {
        **asdict(row.workload),
        "pass": PASSES[row.pass_name],
        "contender": row.contender,
        "status": row.status,
        "reason": row.reason,
        "route": row.route,
        "worst_error_of": row.worst,
        "error": own,
        "nn_rnn_error": baseline,
        "samples": len(row.samples),
        "median_s": row.median,
        "median_low_s": row.median_low,
        "median_high_s": row.median_high,
        "p20_s": row.p20,
        "p80_s": row.p80,
        "step_s": None if row.median is None else row.median / row.workload.steps,
        "speedup": row.speedup,
        "speedup_low": row.speedup_low,
        "speedup_high": row.speedup_high,
        "verdict": None if row.speedup is None or row.contender == BASELINE else verdict(row),
        "floor_s": floor and floor.seconds,
        "bound": floor and floor.bound,
        "share_of_floor": table.share(row),
        "flops": floors.flops(row.workload, row.pass_name),
        "bytes_moved": floors.bytes_moved(row.workload, row.pass_name),
        "flop_per_s": table.flop_rate(row) if timed else None,
        "byte_per_s": table.byte_rate(row) if timed else None,
        "peak_bytes": row.memory,
        "first_call_s": row.first,
        "repaid_after_calls": table.repaid(row),
        "cold_s": row.cold,
        "graph_s": row.graph,
        "host_s": row.host,
        "chip": json.dumps(row.chip) if row.chip else None,
    }
    # Nine digits: more than any clock has.
    return {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in found.items()}


def publish(folder: Path, table: str, run: Run, rows: Sequence[Row], partial: bool = False) -> list[Path]:
    """Write <table>.md, .csv and pictures, and remove pictures that are no longer made.

    Of a partial table, only <table>.partial.md is written. Without matplotlib, there are no pictures. Returns
    the paths, the page first.
    """
    page = folder / (f"{table}.partial.md" if partial else f"{table}.md")
    if partial:
        return [_write(page, pages.markdown(run, rows))]
    pictures: list[Path] = []
    missing = pages.NEEDS_MATPLOTLIB
    if importlib.util.find_spec("matplotlib") is not None:
        from bench import plots  # imports matplotlib, which may be absent

        pictures, missing = plots.write(folder, table, run, rows), ""
    for kind in PICTURES:
        path = folder / f"{table}-{kind}.png"
        if path not in pictures:
            path.unlink(missing_ok=True)
    _write(page, pages.markdown(run, rows, [path.name for path in pictures], missing))
    return [page, _write(page.with_suffix(".csv"), csv(run, rows)), *pictures]


STORED = ("rows.jsonl", "charlm.jsonl")
PICTURES = ("us-a-step", "speedup", "winners", "growth", "roofline")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


INDEX = """\
# Results

One line and one picture for each machine; the tables behind the links say how they were measured and what
was not. Every speedup is against nn.RNN on the same machine: above 1 is faster. `python -m bench.report`
rebuilds all of it from what is stored (rows.jsonl, charlm.jsonl)."""


def index(results: Path) -> None:
    """Write README.md: what was measured on each machine, the GPUs first."""
    machines = []
    # bench/gpu/ has a page also where the time sufficed for no table.
    verified = {path.parents[1] for path in results.glob("*/gpu/machine.json")}
    for folder in sorted({*_measured(results), *verified}):
        tables = _tables(folder)
        models = charlm_page.read(folder / "charlm.jsonl")
        runs = [run for run, _ in tables.values()] + models
        if not runs and folder in verified:
            runs = [json.loads((folder / "gpu" / "machine.json").read_text(encoding="utf-8"))]
        if runs:
            machines.append((runs[0]["device"] != "cuda", folder.name, runs[0], tables, models))
    parts = [INDEX]
    if all(cpu for cpu, *_ in machines):
        parts.append("No GPU has been measured yet.")
    for _, name, run, tables, models in sorted(machines, key=lambda machine: machine[:2]):
        parts += _machine(results, name, run, tables, models)
    for kind, what in (
        ("compile", "What the compiler says of the kernels, by target, nothing of it run"),
        ("ptx", "The kernels as compiled for a GPU, run by an emulator on a CPU"),
    ):
        if names := sorted(path.stem for path in (results / kind).glob("*.md")):
            parts.append(f"{what}: {', '.join(f'[{name}]({kind}/{name}.md)' for name in names)}.")
    _write(results / "README.md", "\n\n".join(parts) + "\n")


def _machine(
    results: Path,
    folder: str,
    run: Run,
    tables: dict[str, tuple[Run, list[Row]]],
    models: list[charlm_page.Record],
) -> list[str]:
    """A machine's line and its picture. run: a record of it, also where there is no table."""
    pages_of = [*tables, *(["charlm"] if models else [])]
    if (results / folder / "gpu.md").exists():  # bench/gpu/'s: right or wrong, and each kernel's steps
        pages_of.insert(0, "gpu")
    links = [f"[{name}]({folder}/{name}.md)" for name in pages_of]
    if not tables:
        return [f"**{machine_name(run)}**: {', '.join(links)}. Measured {run['date']}."]
    first = next(iter(tables))
    chosen = next((name for name in ("standard", "layer", "quick") if name in tables), first)
    table = Table(*tables[chosen])
    leader = table.leader()
    means = [m for m in table.means() if m.contender == leader and m.pass_name != "backward"]
    said = []
    for dtype in table.dtypes:
        ratios = [f"{PASSES[m.pass_name]} {m.ratio:.2f}" for m in means if m.dtype == dtype]
        said += [f"{dtype} {', '.join(ratios)}"] if ratios else []
    speed = f" Geometric means of {leader} over {chosen}: {'; '.join(said)}." if said else ""
    missing = f" {table.run['missing']}" if table.run.get("missing") else ""
    line = f"**{table.name}**: {', '.join(links)}.{speed}{missing} Measured {table.run['date']}."
    for kind in ("speedup", "us-a-step"):
        picture = f"{chosen}-{kind}.png"
        if (results / folder / picture).exists():
            return [line, f"![{pages.alternative(picture, table)}]({folder}/{picture})"]
    return [line]


def _measured(results: Path) -> list[Path]:
    """The machines' folders in there, or that folder itself if it is one."""
    if any((results / name).exists() for name in STORED):
        return [results]
    return sorted({path.parent for name in STORED for path in results.glob(f"*/{name}")})


def _tables(folder: Path) -> dict[str, tuple[Run, list[Row]]]:
    path = folder / "rows.jsonl"
    return records.read(path) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Rebuild pages, CSV files, pictures and the index from the stored rows.",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        default=Path(__file__).parents[1] / "results",
        help="the folder of the machines' folders, or one of these (default: results/ in the repository)",
    )
    results: Path = parser.parse_args().results
    folders = _measured(results)
    if not folders:
        parser.error(
            f"there is no {' and no '.join(STORED)} in {results} or in a folder in it; expected what a "
            "complete run of `pytest bench --benchmark-only`, or of `python -m bench.charlm --compare`, has "
            "written: run that first, or name its folder"
        )
    try:
        stored = {folder: (_tables(folder), charlm_page.read(folder / "charlm.jsonl")) for folder in folders}
    except ValueError as error:
        parser.error(str(error))
    for folder, (tables, models) in stored.items():
        written = [path for name, found in tables.items() for path in publish(folder, name, *found)]
        for path in (*written, *charlm_page.write(folder, models)):
            print(f"Wrote {path}")
    if folders != [results]:
        index(results)
        print(f"Wrote {results / 'README.md'}")


if __name__ == "__main__":
    main()
