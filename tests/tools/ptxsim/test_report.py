"""Where rows and reports come from and go to: the program, its pages, and the option --ptx."""

import json
import subprocess

from tests.helpers import compiling
from tests.tools.ptxsim import __main__ as program
from tests.tools.ptxsim import report

#: Tests of a user: one races and uses what it read, others hide that a kernel went out
#: of bounds, or could not be run.
USER = """
import torch
from tests.tools.ptxsim.small_kernels import add_kernel, peek_kernel, unknown_kernel

def test_right():
    x, out = torch.ones(256), torch.empty(256)
    add_kernel[(1,)](x, x, out, 256, BLOCK=256)
    assert (out == 2).all()

def test_unused():
    out = torch.zeros(32, dtype=torch.int32)
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 0, BLOCK=32)
    assert (out == 0).all()

def test_race():
    out = torch.zeros(32, dtype=torch.int32)
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 32, BLOCK=32)
    assert out.shape == (32,)

def test_fault():
    try:
        add_kernel[(1,)](torch.ones(255), torch.ones(256), torch.empty(256), 256, BLOCK=256)
    except Exception:
        pass

def test_unknown():
    try:
        unknown_kernel[(1,)](torch.ones(32), num_warps=1)
    except Exception:
        pass
"""


def row(**changes):
    made = {
        "case": "step forward bf16 H=17", "how": "in step", "error": 0.25, "wrong": [], "unused": [],
        "seconds": 1.0, "planned": 2, "code": report.code(), "commit": "abc", "dirty": False,
    }  # fmt: skip
    return made | changes


def page(folder, *rows):
    """The page of these rows, and whether there is nothing wrong with them."""
    (folder / "sm_90.3.9.0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    good = report.write(folder, ["sm_90"]) == 0
    return (folder / "sm_90.md").read_text(), good


def test_a_page_is_of_the_code_as_it_is(tmp_path):
    text, good = page(tmp_path, row())
    assert good
    assert "1 of the 2 cases that are planned, 0 with findings" in text
    assert "at commit abc." in text
    assert "| step forward | 3.9.0 | in step | bf16 | 1 | 0.25 | 0 | 0 |" in text
    old = row(code="0", case="step forward bf16 H=64", commit="old", wrong=["an old one"])
    assert page(tmp_path, row(), old) == (text, True)
    with (tmp_path / "sm_90.3.9.0.jsonl").open("a") as file:
        file.write('{"a line that a kill cut')
    assert report.write(tmp_path, ["sm_90"]) == 0
    assert "with changes" in page(tmp_path, row(dirty=True))[0]


def test_a_finding_and_no_rows_at_all_fail(tmp_path):
    text, good = page(tmp_path, row(), row(case="step forward bf16 H=64", wrong=["a race"]))
    assert not good
    assert "- step forward bf16 H=64, in step (Triton 3.9.0): a race\n" in text
    assert not page(tmp_path)[1]
    assert not page(tmp_path, row(code="0"))[1]


def test_rows_that_a_signal_ended_fail(monkeypatch):
    codes = iter([-11, 0])
    monkeypatch.setattr(subprocess, "call", lambda command: next(codes))
    assert program.main(["rows"]) == 1


def test_the_option_accepts_no_race_and_no_hidden_fault(tmp_path, target):
    (tmp_path / "test_user.py").write_text(USER)
    made = compiling(
        "-m", "pytest", "-p", "tests.conftest", "--ptx", target, "-q", "-p", "no:cacheprovider",
        tmp_path / "test_user.py", CUDA_VISIBLE_DEVICES="", TRITON_DEFAULT_FP_FUSION="1",
    )  # fmt: skip
    failed = {
        line.split("::")[1].split()[0] for line in made.stdout.splitlines() if line.startswith("FAILED")
    }
    assert failed == {"test_race", "test_fault", "test_unknown"}, made.stdout + made.stderr
    assert "3 failed, 2 passed" in made.stdout
