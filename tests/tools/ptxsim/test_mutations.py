"""Single barriers, releases, fences and waits taken out of four kernels: at least nine in ten are noticed."""

from dataclasses import replace

import pytest

from elman.kernels import configs
from tests.tools.ptxsim.cases import Case, found
from tests.tools.ptxsim.check import check
from tests.tools.ptxsim.launch import Emulator
from tests.tools.ptxsim.mutations import mutations

#: Four programs, which take two jobs one after the other.
FLAG = configs.CooperativeConfig(8, 16, 64, 1, num_warps=4)
COUNTER = replace(FLAG, FLAG=False)
KERNELS = {
    "resident": Case("resident", "bf16", 64, B=3, T=3, D=2, backward=True),
    "step": Case("step", "bf16", 64, B=3, T=2, D=2, backward=True),
    "cooperative, flag": Case("cooperative", "bf16", 64, FLAG, B=3, D=2, processors=4),
    "cooperative, counter": Case("cooperative", "bf16", 64, COUNTER, B=3, D=2, processors=4, backward=True),
}
#: What may be missing, and why nothing comes of it.
NOT_NEEDED = {
    # Before a job writes its part of W_hh to shared memory: of the part of the job before, the last reads are
    # those of its last step, and that step has barriers after them.
    "cooperative, flag": ["barrier 0"],
    "cooperative, counter": ["barrier 0"],
}


def test_what_is_missing_is_noticed(target):
    chip, made, missed = configs.CHIPS[target], 0, []
    for name, case in KERNELS.items():
        config = case.config or found(case, chip)[0]
        with Emulator(target) as emulator:
            broken = mutations(replace(case, config=config), emulator, chip)
        assert len(broken) >= 5, name
        made += len(broken)
        missed += [(name, m) for m in broken if not m.wrong]
    surprises = [
        f"{name}: {m}" for name, m in missed if f"{m.kind} {m.number}" not in NOT_NEEDED.get(name, ())
    ]
    assert not surprises, surprises
    assert len(missed) <= made / 10, [f"{name}: {m}" for name, m in missed]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_warp_that_runs_ahead_is_noticed(backward, target):
    """Without all of a time loop's barriers some order of the warps gives a wrong result, too."""
    chip = configs.CHIPS[target]
    case = Case("resident", "bf16", 64, B=3, T=4, backward=backward)
    case = replace(case, config=found(case, chip)[0])
    wrong = []
    for seed in range(4):
        with Emulator(target, by_warp=True, seed=seed) as emulator:
            emulator.edit = lambda ptx: ptx.replace("bar.sync", "// ")
            wrong += check(case, emulator, chip).wrong
    assert any(line.startswith("error") for line in wrong), wrong[:3]
    assert any(" x race " in line for line in wrong)
