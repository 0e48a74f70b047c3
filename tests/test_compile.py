"""The kernels compiled for GPUs that are not here, and the compile matrix's own logic."""

import json

import pytest

pytest.importorskip("triton")

from tests import assembly, compile_report
from tests.helpers import compiling


def run(folder, *arguments):
    """The compile matrix as a program."""
    return compiling("-m", "tests.cross_compile", *arguments, "--output", folder)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_for_a_gpu(target, tmp_path):
    """Within the chip's and the model's shared memory, without spills, on tensor cores."""
    made = run(tmp_path, "rows", "--targets", target, "--small")
    assert made.returncode == 0, made.stderr
    checked = run(tmp_path, "report", "--targets", target)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert (tmp_path / f"{target}.md").read_text().endswith("## Problems\n\nNone.\n")


def test_a_compile_that_takes_too_long_is_ended(tmp_path):
    options = ("--targets", "sm_90", "--small", "--kernels", "cell", "--limit-s", "0.001")
    assert run(tmp_path, "rows", *options).returncode == 0
    checked = run(tmp_path, "report", "--targets", "sm_90")
    assert checked.returncode == 1
    assert "not compiled after 0.001 s" in checked.stdout


def row(**changes):
    counted = {"instructions": 100, "tensor": 8, "loads": 4, "barriers": 2, "spills": 3}
    made = {
        "target": "sm_90",
        "triton": "3.7.1",
        "kernel": "resident forward",
        "problem": {"B": 16, "H": 64, "D": 1, "dtype": "bfloat16", "precision": "ieee", "inputs": 0}
        | {"ragged": True, "backward": False},
        "resets": False,
        "config": {"BLOCK_B": 16, "PRECISION": "ieee", "num_warps": 4},
        "expected": {"shared": 1000, "registers": 128, "us": 0.5},
        "limit": 2000,
        "seconds": 1.5,
        "shared": 900,
        "registers": 64,
        "spills": 0,
        "late loads": 0,
        "loop": counted,
        "code": counted,
        "commit": "abc",
        "dirty": False,
    }
    return made | changes


NO_BARRIER = {"instructions": 100, "tensor": 8, "loads": 4, "barriers": 0, "spills": 3}
NO_TENSOR = {"instructions": 100, "tensor": 0, "loads": 4, "barriers": 2, "spills": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 2001}, "takes 2001 bytes of shared memory; sm_90 grants 2000"),
        ({"shared": 1001}, "takes 1001 bytes of shared memory; the model expects at most 1000"),
        ({"spills": 8}, "spills 8 bytes, 3 in the loop"),
        (
            {"late loads": 2},
            "reads memory 2 times after a step's last barrier, when other warps may have written over it: it "
            "works in place",
        ),
        ({"loop": NO_BARRIER}, "has no barrier in its time loop, and 4 warps drift apart"),
        ({"loop": NO_TENSOR}, "makes its products without a tensor core"),
        ({"loop": None, "code": NO_TENSOR}, "makes its products without a tensor core"),
        ({"error": "not compiled after 60 s"}, "not compiled after 60 s"),
    ],
)
def test_a_problem_is_found_and_fails(changes, message, tmp_path):
    assert compile_report.problems(row()) == []
    assert compile_report.problems(row(**changes)) == [message]
    (tmp_path / "sm_90.3.7.1.jsonl").write_text(json.dumps(row()) + "\n")
    assert compile_report.write(tmp_path, ["sm_90"]) == 0
    (tmp_path / "sm_90.3.7.1.jsonl").write_text(json.dumps(row(**changes)) + "\n")
    assert compile_report.write(tmp_path, ["sm_90"]) == 1
    assert message in (tmp_path / "sm_90.md").read_text().split("## Problems")[1]


def test_a_spill_before_the_time_loop_is_shown_and_is_no_problem():
    before = row(spills=8, loop=row()["loop"] | {"spills": 0})
    assert compile_report.problems(before) == []
    page, wrong = compile_report.markdown("sm_90", [before])
    assert "8 bytes, 0 in the loop" in page
    assert not wrong


def test_one_warp_needs_no_barrier_and_no_step_has_a_time_loop():
    alone = {"BLOCK_B": 16, "PRECISION": "ieee", "num_warps": 1}
    assert not compile_report.problems(row(loop=NO_BARRIER, config=alone))
    assert not compile_report.problems(row(loop=NO_BARRIER, kernel="step forward"))


def test_float32_needs_tensor_cores_only_where_it_asks_for_them():
    problem = row()["problem"] | {"dtype": "float32"}
    for precision, found in {"ieee": 0, "tf32": 1, "tf32x3": 1}.items():
        made = row(problem=problem, config={"PRECISION": precision, "num_warps": 4}, loop=NO_TENSOR)
        assert len(compile_report.problems(made)) == found
    assert not compile_report.problems(row(problem=problem | {"dtype": "float64"}, loop=NO_TENSOR))


def test_rows_that_do_not_belong_together_fail():
    def wrong(*rows):
        return " ".join(compile_report.markdown("sm_90", list(rows))[1])

    assert "nothing was compiled" in wrong()
    assert "nothing was compiled" in wrong(row(config=None))
    assert not wrong(row(), row(triton="3.6.0"))
    assert "different commits" in wrong(row(), row(triton="3.6.0", commit="def"))
    other = row(kernel="resident backward")
    assert (
        "resident backward bfloat16 B16 H64 lengths: BLOCK_B 16, num_warps 4: compiled with Triton 3.7.1 only"
        in wrong(row(), row(triton="3.6.0"), other)
    )


def test_a_cell_shows_both_versions_where_they_differ():
    page, wrong = compile_report.markdown("sm_90", [row(), row(triton="3.6.0", registers=72, loop=None)])
    assert not wrong
    assert "| 64 / 72 of 128 | 0 | 900 of 1,000 | 100 / none | 8 |" in page


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;      /* 0x0 */
                                                           /* 0x0 */
        /*0010*/                   LDS R1, [R0] ;          /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x0 */
        /*0030*/              @P1 BRA 0xb0 ;               /* 0x0 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   LDG.E R2, [R0] ;
        /*0060*/             @!P2 BRA 0x50 ;
        /*0070*/                   MOV R3, R2 ;
        /*0080*/                   BRA.U UP0, 0x10 ;
        /*0090*/               @P0 BRA 0x0 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   MUFU.RCP R2, R2 ;
        /*00c0*/                   BRA 0x40 ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""

GCN = """
forward_kernel:                         ; @forward_kernel
; %bb.0:
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
\tds_read_b128 v[0:3], v4
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
.Lfunc_end0:
\ts_nop 0
"""


def test_the_time_loop_is_found_in_machine_code():
    """Within a loop over tiles, a waiting loop and rare code laid out behind the end in it."""
    code = assembly.parse_sass(SASS)
    assert len(code) == 13
    loop = assembly.time_loop(code)
    names = " ".join(i.mnemonic.split(".")[0] for i in loop)
    assert names == "LDS HMMA BRA BAR LDG BRA MOV BRA MUFU BRA"
    alike = {"tensor": 1, "loads": 1, "barriers": 1, "spills": 0}
    assert assembly.count(loop) == {"instructions": 10, **alike}
    assert assembly.late_loads(loop) == 1
    assert assembly.late_loads([i for i in loop if i.mnemonic.split(".")[0] != "BAR"]) == 0
    code = assembly.parse_gcn(GCN)
    assert len(code) == 6
    assert assembly.count(assembly.time_loop(code)) == {"instructions": 4, **alike}
    assert assembly.time_loop([i for i in code if not i.mnemonic.startswith("s_cbranch")]) == []
