"""The exceptions that need no kernel to be caught."""

try:
    from .kernels.errors import DeviceHangError
except ModuleNotFoundError:  # a checkout without symlinks, which has no kernels to raise it

    class DeviceHangError(RuntimeError):  # type: ignore[no-redef]
        """Programs of one launch waited in vain for one another; see kernels/errors.py."""


__all__ = ["DeviceHangError"]
