"""The one tolerance table of all tests. Errors are ||actual - truth|| / ||truth||, the truth in float64."""

import torch

# In units of the dtype's eps, the spacing at 1. A state that is rounded once a step is off by about a
# quarter of eps in this norm, and the next steps and layers add theirs. The worst of all options of
# test_agreement (two layers, two directions) was, over every backend on the CPU:
TOLERANCES = {
    torch.float64: 10,  # 3.0 eps for a gradient, 1.2 eps for a state
    torch.float32: 10,  # 2.4 eps for a gradient, 1.3 eps for a state
    torch.float16: 5,  # 1.9 eps for a gradient (nn.RNN's operator; eager 1.2), 0.7 eps for a state
    torch.bfloat16: 5,  # 1.8 eps for a gradient (nn.RNN's operator; eager 1.1), 0.6 eps for a state
}

# design.md, "Numbers": no kernel may be worse than this many times nn.RNN's own error.
TIMES_NN_RNN = 1.5

# Issue 2: the loss curve of a training script beside nn.RNN's, float32, 100 steps, absolute.
LOSS_CURVE = 1e-5

# Document 2 prints float32 numbers below 1 with 7 or 8 digits: two units in the last place of float32.
PRINTED = 1.2e-7

# Document 0's weights are standard normal: the recurrence is chaotic, so a difference of one rounding
# grows from step to step. Two orders of summation in float64 differ by 4e-13 after its 10 steps.
CHAOTIC = 1e-10


def tolerance(dtype: torch.dtype) -> float:
    """The largest error of a result in this dtype, relative to the norm of the truth."""
    return TOLERANCES[dtype] * torch.finfo(dtype).eps
