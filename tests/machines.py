"""Machines that this one is not: their answers, for what only asks and runs nothing."""

from types import SimpleNamespace

import pytest
import torch

from elman import routing


def simulate_gpu(
    monkeypatch: pytest.MonkeyPatch,
    name: str = "Simulated GPU",
    cudnn: int | None = 91300,
    capability: tuple[int, int] = (9, 0),
    hip: str | None = None,
    shared: int = 232448,
    processors: int = 132,
    no_compiler: str | None = None,
) -> None:
    """One GPU with these properties; cudnn is its version or None, hip ROCm's; a C compiler, or why not."""
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        gcnArchName="gfx942:sramecc+:xnack-",
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        multi_processor_count=processors,
        total_memory=1 << 37,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(routing, "NO_COMPILER", no_compiler)
