"""The option --ptx of the project's tests: their kernels run as emulated PTX instead of interpreted.

python -m pytest --ptx sm_90 tests/test_resident.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is decorated

from elman.kernels import configs

from .launch import Emulator


class Emulation:
    def __init__(self, target: str):
        configs.DEFAULT_CHIP = configs.CHIPS[target]  # what a launcher takes a CPU for
        self.emulator = Emulator(target)
        self.target = target
        self.raced: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """What is found beside wrong results fails the test."""
        if item.path.is_relative_to(Path(__file__).parent):  # these have emulators of their own
            return (yield)
        self.emulator.reset()
        self.emulator.kernels.clear()
        with self.emulator:
            result = yield
        found = self.emulator.lines()
        # A resident kernel that works in place fetches ahead what it won't use. `rows` runs such cases again.
        raced = [line for line in found if " x race at line" in line and ": shared+" not in line]
        self.raced += [f"{item.nodeid}: {line}" for line in raced]
        if len(raced) < len(found):
            pytest.fail("\n".join(line for line in found if line not in raced), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(
            f"{self.emulator.launches} launches were emulated as PTX for {self.target}"
        )
        for line in self.raced:
            terminalreporter.write_line(f"reads that race, if their values are used: {line[:300]}")
