"""The compile matrix's rows to Markdown, and what in them is a problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from elman.kernels import configs

Row = dict[str, Any]

HEAD = """\
# Compile matrix: {target}

The configs that the model in kernels/configs.py lets through at representative shapes (its first choice at
a few more), compiled for {target} with Triton {versions}. **Nothing here was run on a GPU, and no
number is a measurement of one.** Where the Triton versions differ, a cell has a value for each, in that
order.

Made by `make compile-matrix`{commits}.
"""
COLUMNS = {
    "problem": "arithmetic, rows B, hidden size H, and input size I where the kernel makes that product too",
    "rows": "lengths: they end at lengths of their own; resets: they begin anew at steps of their own",
    "config": "blocks, warps and stages: kernels/configs.py says what each means",
    "registers": "a thread's, of those that the model expects",
    "spills": "bytes a thread that did not fit into registers; how many instructions in the loop move them",
    "shared": "shared memory in bytes, of those that the model expects at most; a program may have {limit:,}",
    "loop": "machine instructions of the loop that makes the products, inner loops included: the time "
    "loop, in step and cell the sum over H; none if it is unrolled",
    "tensor": "those of them that are tensor-core products; without a loop, the whole kernel's",
    "loads": "likewise, loads from shared memory (tensor-core products of four warps read it by themselves)",
    "barriers": "likewise, barriers of the whole program",
    "compile s": "seconds to compile",
    "predicted us": "microseconds a step: **predicted by the model in kernels/configs.py, never measured**",
}


def problems(row: Row) -> list[str]:
    """Sentences: what is wrong with a row; [] if nothing is."""
    if "error" in row or not row["config"]:
        return [row["error"]] if "error" in row else []
    found = []
    shared, expected = row["shared"], row["expected"]["shared"]
    if shared > row["limit"]:
        found.append(f"takes {shared} bytes of shared memory; {row['target']} grants {row['limit']}")
    elif shared > expected:
        found.append(f"takes {shared} bytes of shared memory; the model expects at most {expected}")
    if row["spills"] and _counted(row)["spills"]:  # those before the loop cost cycles of a launch alone
        found.append(f"spills {_spills(row)}")
    if not _counted(row)["tensor"] and _on_tensor_cores(row):
        found.append("makes its products without a tensor core")
    time_loop = row["loop"] and not row["kernel"].startswith(("step", "cell"))
    if time_loop and row["config"]["num_warps"] > 1 and not row["loop"]["barriers"]:
        found.append(f"has no barrier in its time loop, and {row['config']['num_warps']} warps drift apart")
    if row["kernel"] == "resident forward" and row["late loads"]:
        found.append(
            f"reads memory {row['late loads']} times after a step's last barrier, when other warps may have "
            "written over it: it works in place"
        )
    return found


def title(row: Row) -> str:
    """A row's name in one line."""
    rows = " lengths" * row["problem"]["ragged"] + " resets" * row["resets"]
    return f"{row['kernel']} {_problem(row)}{rows}: {_config(row) if row['config'] else 'no config'}"


def write(folder: Path, targets: list[str]) -> int:
    """<target>.md in `folder` from all <target>.<triton>.jsonl there; 1 if they show a problem, else 0."""
    failed = 0
    for target in targets:
        paths = sorted(folder.glob(f"{target}.*.jsonl"), reverse=True)
        rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        text, wrong = markdown(target, rows)
        (folder / f"{target}.md").write_text(text)
        for line in wrong:
            print(f"{target}: {line}")
        failed += bool(wrong)
    return min(failed, 1)


def markdown(target: str, rows: list[Row]) -> tuple[str, list[str]]:
    """The page of a target, and its problems."""
    wrong = [f"{title(row)} (Triton {row['triton']}): {what}" for row in rows for what in problems(row)]
    wrong += _wrong_together(rows)
    versions = list(dict.fromkeys(row["triton"] for row in rows))
    commits = sorted({f"{row['commit']}{' with changes' * bool(row['dirty'])}" for row in rows})
    made = "".join(f", at commit {commit}" for commit in commits)
    limit = rows[0]["limit"] if rows else 0
    columns = [(name, text.format(limit=limit)) for name, text in COLUMNS.items()]
    parts = [
        HEAD.format(target=target, versions=" and ".join(versions), commits=made),
        _table(("column", "what it is"), columns),
    ]
    for kernel in _kernels(rows):
        parts += [f"## {kernel}\n", *_section(_same(row for row in rows if row["kernel"] == kernel))]
    parts += ["## Problems\n", "".join(f"- {line}\n" for line in wrong) or "None.\n"]
    return "\n".join(parts), wrong


def _section(groups: list[list[Row]]) -> Iterator[str]:
    yield _table(COLUMNS, [_cells(same) for same in groups if same[0]["config"]])
    if without := dict.fromkeys(_problem(same[0]) for same in groups if not same[0]["config"]):
        yield f"The model lets no config through for: {', '.join(without)}.\n"


def _wrong_together(rows: list[Row]) -> list[str]:
    """What is wrong with the rows as a whole: a page must not pass for want of something to look at."""
    if not rows:
        return ["there are no rows: nothing was compiled"]
    found = []
    if len({row["commit"] for row in rows}) > 1:
        found.append("the rows were made at different commits: make them again")
    compiled = {row["kernel"] for row in rows if row["config"]}
    if not configs.CHIPS[rows[0]["target"]].one_l2:
        compiled |= {"cooperative forward", "cooperative backward"}  # not on offer there
    found += [f"{kernel}: nothing was compiled" for kernel in _kernels(rows) if kernel not in compiled]
    versions = {row["triton"] for row in rows}
    alone = [same[0] for same in _same(rows) if len(same) < len(versions)]
    found += [f"{title(row)}: compiled with Triton {row['triton']} only" for row in alone]
    return found


def _kernels(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["kernel"] for row in rows))


def _same(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case, one for each Triton version, in the order of the first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row["kernel"], row["problem"], row["resets"], row["config"]], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _cells(same: list[Row]) -> list[str]:
    row = same[0]
    cells = {
        "problem": _problem(row),
        "rows": "lengths" * row["problem"]["ragged"] + " and resets" * row["resets"],
        "config": _config(row),
        "registers": f"{_each(same, lambda r: r['registers'])} of {row['expected']['registers']}",
        "spills": _each(same, _spills),
        "shared": f"{_each(same, lambda r: format(r['shared'], ','))} of {row['expected']['shared']:,}",
        "loop": _each(same, lambda r: r["loop"]["instructions"] if r["loop"] else "none"),
        "tensor": _each(same, lambda r: _counted(r)["tensor"]),
        "loads": _each(same, lambda r: _counted(r)["loads"]),
        "barriers": _each(same, lambda r: _counted(r)["barriers"]),
        "compile s": _each(same, lambda r: r["seconds"]),
        "predicted us": f"{row['expected']['us']:.2f}",
    }
    return [cells[name] for name in COLUMNS]


def _each(same: list[Row], value: Callable[[Row], Any]) -> str:
    """What the versions' rows have there, once if they agree."""
    values = ["failed" if "error" in row else str(value(row)) for row in same]
    return " / ".join(values if len(set(values)) > 1 else values[:1])


def _counted(row: Row) -> dict[str, int]:
    """The instructions of the time loop, or of the kernel if it has none."""
    return row["loop"] or row["code"]


def _spills(row: Row) -> str:
    if not row["spills"]:
        return "0"
    return f"{row['spills']} bytes, {_counted(row)['spills']} in the loop"


def _problem(row: Row) -> str:
    problem = row["problem"]
    arithmetic = problem["dtype"] if problem["dtype"] != "float32" else f"float32 {problem['precision']}"
    directions = f" D{problem['D']}" if problem["D"] > 1 else ""
    inputs = f" I{problem['inputs']}" if problem["inputs"] else ""
    return f"{arithmetic} B{problem['B']} H{problem['H']}{inputs}{directions}"


def _config(row: Row) -> str:
    shown = {
        k: v for k, v in row["config"].items() if k != "PRECISION" or row["problem"]["dtype"] == "float32"
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _on_tensor_cores(row: Row) -> bool:
    sixteen = row["problem"]["dtype"] in ("float16", "bfloat16")
    return sixteen or row["config"]["PRECISION"].startswith("tf32")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
