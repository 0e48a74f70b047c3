"""A drawn sample of the project's kernels, as compiled: right, without races, and as exact as nn.RNN."""

import importlib
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton

from bench.agreement import FACTOR, floor
from elman import reference
from elman.kernels import configs
from tests.helpers import error
from tests.scans import clean, problem, truth
from tests.tools.ptxsim import cases, check
from tests.tools.ptxsim.cases import Case
from tests.tools.ptxsim.launch import Emulator

SEED = 0


def pytest_generate_tests(metafunc):
    if "drawn" in metafunc.fixturenames:
        drawn = cases.sample(configs.CHIPS[metafunc.config.getoption("ptx")], SEED)
        names = [" ".join([str(case), *options]).replace(" ", "_") for case, options in drawn]
        metafunc.parametrize("drawn", drawn, ids=names)


def test_sample(drawn, target):
    case, options = drawn
    with Emulator(target, **options) as emulator:
        outcome = check.check(case, emulator, configs.CHIPS[target])
    assert not outcome.wrong, outcome.wrong[:4]
    assert emulator.launches


def test_what_the_sample_computes_depends_on_w_hh(target):
    for case, _ in cases.sample(configs.CHIPS[target], SEED):
        if case.backward:
            torch.manual_seed(case.seed)
            z, h0, w_hh, lengths, g_out, g_hn, resets = check._numbers(case)
            output, _ = truth(clean(z, lengths), h0, w_hh, lengths, check._word(case), resets)
            g_o, g_h = check._gradients(case, g_out, g_hn, z.dtype)
            with_w, without = (
                check._dz(case, g_o, g_h, output, w, lengths, resets) for w in (w_hh, 0 * w_hh)
            )
            assert error(without, with_w) > 0.02, case


def test_an_element_that_is_wrong_is_noticed_whatever_the_others_are(monkeypatch, target):
    """One of 8,448 adds little to the norm of the error."""
    chip = configs.CHIPS[target]
    case = Case("resident", "bf16", 264, B=16, T=2)
    case = replace(case, config=cases.found(case, chip)[0])
    right = check._forward

    def with_an_error(*arguments):
        actual, expected, *rest = right(*arguments)
        actual[1, 3, 5] = -expected[1, 3, 5].sign()
        return actual, expected, *rest

    monkeypatch.setattr(check, "_forward", with_an_error)
    with Emulator(target) as emulator:
        assert "worst at (1, 3, 5)" in check.check(case, emulator, chip).wrong[0]


@pytest.mark.parametrize("flag", [True, False], ids=["flag", "counter"])
def test_giving_up_excuses_no_missing_barrier(flag, target):
    """Programs that wait in vain read what is not there; that a program's warps collide is wrong as ever."""
    chip = configs.CHIPS[target]
    config = configs.CooperativeConfig(8, 16, 64, 1, FLAG=flag, num_warps=4)
    case = Case("cooperative", "bf16", 64, config, B=3, T=3, withheld=3)
    with Emulator(target) as emulator:
        assert not check.check(case, emulator, chip).wrong
        emulator.edit = lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx)
        assert any(" x race " in line for line in check.check(case, emulator, chip).wrong)


def test_the_driver_is_that_of_before(target):
    before = triton.runtime.driver._active
    with Emulator(target):
        assert triton.runtime.driver.active is not before
    assert triton.runtime.driver._active is before


#: Of each the arithmetic, the hidden size, and why launchers refuse it; None: they don't.
SAME_ROWS = (
    ("fp64", 17, configs.ResidentConfig(8, 16, num_warps=4), None),
    ("bf16", 17, configs.ResidentConfig(8, 16, num_warps=4), configs.REPEATED),
    ("tf32", 17, configs.ResidentConfig(8, 16, PRECISION="tf32", num_warps=4), configs.REPEATED),
    (
        "bf16",
        16,
        configs.ResidentConfig(8, 64, HELD=1, num_warps=4),
        "a tile of 64 is wider than the 16 it cuts",
    ),
)


@pytest.mark.parametrize(("arithmetic", "H", "config", "refused"), SAME_ROWS)
def test_warps_with_the_same_rows_wait_for_one_another(arithmetic, H, config, refused, target):
    """A tile of 16 rows is every warp's work alike: one that is a step ahead would write over z, in place."""
    case, chip = Case("resident", arithmetic, H, config, B=3, T=6), configs.CHIPS[target]
    if refused:
        with Emulator(target) as emulator:
            (wrong,) = check.check(case, emulator, chip).wrong
        assert "ValueError" in wrong
        assert refused in wrong
    with mock.patch.object(configs, "misfit", return_value=None):
        for seed in range(3):
            with Emulator(target, by_warp=True, seed=seed) as emulator:
                assert not check.check(case, emulator, chip).wrong
        with Emulator(target) as emulator:
            emulator.edit = lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx)
            assert any(" x race " in line for line in check.check(case, emulator, chip).wrong)


# The 1.5 rule, with sums as tensor cores round them.

#: Hidden sizes by kernel.
FORMS = {"resident": (64, 256), "cooperative": (256,), "step": (136,)}


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("arithmetic", ["bf16", "fp16", "fp32", "tf32x3"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_truncated_sums_are_as_exact_as_nn_rnn(kernel, arithmetic, backward, target):
    """fp32 is what the model chooses for an IEEE-class product, whose default on a GPU is tf32x3."""
    chip = configs.CHIPS[target]
    for H in FORMS[kernel]:
        case = Case(kernel, arithmetic, H, B=8, T=6, backward=backward)
        found = cases.found(case, chip)
        if not found:
            continue
        own, baseline = errors(replace(case, config=found[0]), Emulator(target, truncate=True), chip)
        assert own <= max(FACTOR * baseline, floor("output", case.T, cases.ARITHMETIC[arithmetic][0])), (
            H, found[0], own, baseline,
        )  # fmt: skip


def errors(case, emulator, chip):
    """The kernel's error of the output, or of dz, and nn.RNN's of the same numbers."""
    dtype, precision = cases.ARITHMETIC[case.arithmetic]
    z, h0, w_hh, _, g_out, g_hn = problem(case.T, case.B, case.H, 1, dtype, False)
    w_hh = w_hh / 3**0.5  # as large as nn.RNN's are at first
    kernel = importlib.import_module(f"elman.kernels.{case.module}")
    eye, none = torch.eye(case.H, dtype=dtype), torch.zeros(case.H, dtype=dtype)
    leaf = z.clone().requires_grad_()
    output, h_n = torch.rnn_tanh(leaf, h0, [eye, w_hh[0], none, none], True, 1, 0.0, True, False, False)
    expected, _ = truth(z, h0, w_hh, None, "tanh")
    with emulator, mock.patch.object(kernel, "chip", return_value=chip):
        if not case.backward:
            own = kernel.scan(z.clone(), h0, w_hh, None, "tanh", precision, case.config)
            return error(own, expected), error(output.detach(), expected)
        own = torch.full_like(z, float("nan"))
        kernel.scan_backward(g_out, g_hn, output.detach(), w_hh, own, None, "tanh", precision, case.config)
    (dz,) = torch.autograd.grad([output, h_n], [leaf], [g_out, g_hn])
    wide = (t.double() for t in (g_out, g_hn, output.detach(), w_hh))
    expected = reference.layer_dz(*wide, None, "tanh")
    return error(own, expected), error(dz, expected)
