"""The exceptions that need no kernel to be caught, and the wait for those that come late."""

from __future__ import annotations

import sys

import torch

try:
    from .kernels.errors import DeviceHangError
except ModuleNotFoundError:  # a checkout without symlinks, which has no kernels to raise it

    class DeviceHangError(RuntimeError):  # type: ignore[no-redef]
        """Programs of one launch waited in vain for one another; see kernels/errors.py."""


__all__ = ["DeviceHangError", "synchronize"]


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Waits for a CUDA device's work (default: the current one's), and raises what only its end can show.

    That is DeviceHangError, if a launch of the cooperative kernel gave up. Otherwise it comes with the next
    such launch, or is printed at the interpreter's exit; the results are NaN from the step on where the
    programs missed one another. The environment variable ELMAN_SYNC=1 waits after each of these launches.
    On a machine without CUDA there is nothing to wait for.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize(device)
    kernel = sys.modules.get(f"{__package__}.kernels.cooperative")
    if kernel is not None:
        index = torch.cuda._utils._get_device_index(device, optional=True)
        kernel.check(torch.device("cuda", index))
