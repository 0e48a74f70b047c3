"""Where rows and reports come from and go to: the program, its pages, and the option --ptx."""

import json
import math
import re
import subprocess

import pytest
import torch

from elman.kernels import configs, resident
from tests import helpers
from tests.scans import truth
from tests.tools.ptxsim import __main__ as program
from tests.tools.ptxsim import report
from tests.tools.ptxsim.cases import Case
from tests.tools.ptxsim.check import check
from tests.tools.ptxsim.context import Fault
from tests.tools.ptxsim.launch import Emulator
from tests.tools.ptxsim.small_kernels import add_kernel

#: Tests of a user: some race and use what they read, others hide that a kernel went out
#: of bounds, or could not be run.
USER = """
import unittest
import pytest
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

@pytest.fixture
def drawn():
    return torch.rand(3)

def read_and_used():
    out = torch.zeros(32, dtype=torch.int32)
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 32, BLOCK=32)
    return int(out.max())

def test_skips_for_what_it_read():
    if read_and_used() > 31:
        pytest.skip()

def test_fails_for_what_it_read():
    assert read_and_used() < 32

@pytest.mark.parametrize(
    "leave", [pytest.skip, pytest.xfail, unittest.SkipTest], ids=["skip", "xfail", "SkipTest"]
)
def test_race_before_a_skip(leave):
    read_and_used()
    raise leave("")

@pytest.mark.xfail
def test_race_of_an_xfail():
    assert read_and_used() > 32

def test_race_of_a_late_xfail(request):
    request.applymarker(pytest.mark.xfail)
    read_and_used()
    raise SystemExit(1)

def test_race_in_large_memory():
    out = torch.zeros(2**26 + 32, dtype=torch.int32)[:32]
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 32, BLOCK=32)

def test_draws(drawn):
    out = torch.randint(99, (32,), dtype=torch.int32)
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 0, BLOCK=32)

def test_skip():
    out = torch.zeros(32, dtype=torch.int32)
    peek_kernel[(2,)](torch.zeros(32, dtype=torch.int32), out, 0, BLOCK=32)
    raise unittest.SkipTest("after a race whose values go nowhere")

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
        "seconds": 1.0,
        "triton": "3.9.0", "planned": 2, "code": report.code(), "commit": "abc", "dirty": False,
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
    assert page(tmp_path, row(), row()) == (text, True)
    assert page(tmp_path, row(), row(triton="3.6.0")) == (text, True)
    assert "| nan | 0 | 0 |" in page(tmp_path, row(), row(case="step forward bf16 H=64", error=math.nan))[0]


def test_a_finding_and_no_rows_at_all_fail(tmp_path):
    text, good = page(tmp_path, row(), row(case="step forward bf16 H=64", wrong=["a race"]))
    assert not good
    assert "- step forward bf16 H=64, in step (Triton 3.9.0): a race\n" in text
    for rows in ((row(), row(wrong=["a race"])), (row(wrong=["a race"]), row())):
        assert "- step forward bf16 H=17, in step (Triton 3.9.0): a race\n" in page(tmp_path, *rows)[0]
    text = page(tmp_path, row())[0]
    assert page(tmp_path) == (text, False)
    assert page(tmp_path, row(code="0")) == (text, False)
    (tmp_path / "sm_90.3.6.0.jsonl").write_text(json.dumps(row(triton="3.6.0", code="0")) + "\n")
    assert not page(tmp_path, row())[1]


def test_ways_and_tritons_are_rows_of_their_own(tmp_path):
    (tmp_path / "sm_90.3.6.0.jsonl").write_text(json.dumps(row(triton="3.6.0", planned=7)) + "\n")
    text, good = page(tmp_path, row(), row(how="by warp"))
    assert good
    assert "3 of the 9 cases that are planned" in text
    assert len(re.findall(r"^\| step forward \|", text, re.M)) == 3


def test_what_judges_a_result_is_part_of_the_code(monkeypatch):
    before = report.code.__wrapped__()
    monkeypatch.setattr(helpers, "error", lambda actual, truth: 0.0)
    assert report.code.__wrapped__() != before


def test_rows_go_on_after_a_kill(tmp_path, monkeypatch, target):
    three = [Case("step", "bf16", H) for H in (1, 2, 3)]
    planned = {(str(case), "in step"): case for case in three}
    ran = []

    def made(case, way, target):
        ran.append(case.H)
        return row(case=str(case), how=way)

    monkeypatch.setattr(program.cases, "plan", lambda target: planned)
    monkeypatch.setattr(program, "row", made)
    make = ["rows", "--targets", target, "--output", str(tmp_path)]
    assert program.main(make) == 0
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert program.main(make) == 0
    assert ran == [1, 2, 3, 3]
    assert len(report.current(path)) == len(path.read_text().splitlines()) == 3


def test_rows_of_nothing_are_an_error(tmp_path, target, capsys):
    assert program.main(["rows", "--targets", target, "--only", "no such", "--output", str(tmp_path)]) == 1
    assert "matches --only, the regular expression 'no such'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["rows", "--only", "["])
    assert "'[' is no regular expression: unterminated" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["rows", "--kernels", "resident,coperative"])
    assert "--kernels is resident,coperative; expected some of resident, " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_fault_that_the_launcher_hides_is_wrong(monkeypatch, target):
    def scan(z, *_):
        try:
            add_kernel[(1,)](torch.ones(255), torch.ones(256), torch.empty(256), 256, BLOCK=256)
        except Fault:
            return torch.zeros_like(z)

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of a kernel that doesn't say
    monkeypatch.setattr(resident, "scan", scan)
    with Emulator(target) as emulator:
        outcome = check(Case("resident", "bf16", 17), emulator, configs.CHIPS[target])
    assert any("out of bounds" in what for what in outcome.wrong), outcome


def test_a_case_that_launches_nothing_is_wrong(monkeypatch, target):
    monkeypatch.setattr(resident, "scan", lambda z, h0, w, lengths, act, *_: truth(z, h0, w, lengths, act)[0])
    with Emulator(target) as emulator:
        outcome = check(Case("resident", "bf16", 17), emulator, configs.CHIPS[target])
    assert outcome.wrong == ["nothing was launched"]


def test_rows_that_a_signal_ended_fail(monkeypatch):
    codes = iter([-11, 0])
    monkeypatch.setattr(subprocess, "call", lambda command: next(codes))
    assert program.main(["rows"]) == 1


def test_the_option_accepts_no_race_and_no_hidden_fault(tmp_path, target):
    (tmp_path / "test_user.py").write_text(USER)
    made = helpers.compiling(
        "-m", "pytest", "-p", "tests.conftest", "--ptx", target, "-q", "-p", "no:cacheprovider",
        "--color=no", tmp_path / "test_user.py",
        PYTEST_ADDOPTS="", CUDA_VISIBLE_DEVICES="", TRITON_DEFAULT_FP_FUSION="1",
    )  # fmt: skip
    ends, _, summary = made.stdout.partition("short test summary info")  # which may say it all again
    failed = {line.split("::")[1].split()[0] for line in summary.splitlines() if line.startswith("FAILED")}
    races = {
        "test_race",
        "test_race_before_a_skip[skip]",
        "test_race_before_a_skip[xfail]",
        "test_race_before_a_skip[SkipTest]",
        "test_race_in_large_memory",
        "test_race_of_an_xfail",
        "test_race_of_a_late_xfail",
        "test_skips_for_what_it_read",
        "test_fails_for_what_it_read",
    }
    assert failed == races | {"test_fault", "test_unknown"}, made.stdout + made.stderr
    assert "11 failed, 3 passed, 1 skipped" in summary
    assert ends.count(" x race at line ") == len(races), made.stdout
