"""The option --ptx of the project's tests: their kernels run as emulated PTX instead of interpreted.

python -m pytest --ptx sm_90 tests/test_resident.py
"""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is decorated

from elman import routing
from elman.kernels import configs

from .launch import Emulator

#: How a test ends that neither passes nor fails; one that is marked xfail may also fail. Of a TestCase,
#: pytest takes the ending from elsewhere: there they excuse findings.
SKIPS = pytest.skip.Exception, pytest.xfail.Exception, unittest.SkipTest
#: What ends all tests.
STOPS = KeyboardInterrupt, pytest.exit.Exception


class Found(pytest.fail.Exception):
    """What was found beside wrong results. No mark makes a test with it pass."""


def _available_on_a_cpu(unavailable: Callable[..., str | None]) -> Callable[..., str | None]:
    """Routing's own answer, but on a CPU's tensors the backend triton is always available."""

    def answer(backend: str, device: torch.device, *more: Any) -> str | None:
        return None if (backend, device.type) == ("triton", "cpu") else unavailable(backend, device, *more)

    return answer


class Emulation:
    def __init__(self, target: str):
        configs.DEFAULT_CHIP = configs.CHIPS[target]  # what a launcher takes a CPU for
        routing.unavailable = _available_on_a_cpu(routing.unavailable)
        self.emulator = Emulator(target)
        self.target = target

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """What is found beside wrong results fails the test.

        A resident kernel that works in place fetches ahead what it won't use. Where reads race and nothing
        else was found, the test runs again, and those reads see NaN: the tensors must be the same to the bit.
        """
        if item.path.is_relative_to(Path(__file__).parent):  # these have emulators of their own
            return (yield)
        emulator, state = self.emulator, torch.get_rng_state()
        with emulator:
            emulator.reset()
            emulator.kernels.clear()
            excused, result = None, None
            try:
                result = yield
            except STOPS:
                raise
            except BaseException as end:  # where it excuses the test, it hides nothing that was found before
                if not (isinstance(end, SKIPS) or item.get_closest_marker("xfail")):
                    raise
                excused = end
            wrong, digest = emulator.faults + emulator.lines(), emulator.digest.digest()

            def again() -> bytes:
                torch.set_rng_state(state)
                try:
                    item.runtest()
                except STOPS:
                    raise
                except BaseException:  # how it ends follows from what it saw, which is in the digest
                    pass
                return emulator.digest.digest()

            if emulator.rerun(again) == digest:
                wrong = []
        if wrong:
            raise Found("\n".join(wrong), pytrace=False)
        if excused:
            raise excused
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside pytest's own, which excuses what is marked xfail
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if call.excinfo and isinstance(call.excinfo.value, Found):
            report.outcome = "failed"
            vars(report).pop("wasxfail", None)
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.emulator.launches:  # xdist's workers have made them, and say nothing here
            text = f"{self.emulator.launches} launches were emulated as PTX for {self.target}"
            terminalreporter.write_line(text)
