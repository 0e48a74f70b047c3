"""What only a kernel can find out, in a file that needs no Triton."""


class DeviceHangError(RuntimeError):
    """Programs of one launch waited in vain for one another, gave up and said so; there are no results."""
