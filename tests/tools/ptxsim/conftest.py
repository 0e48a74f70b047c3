"""These tests run compiled kernels: they are collected only where --ptx names what they are compiled for."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("ptx") else True


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    """The GPU that kernels are compiled for, such as "sm_90"."""
    return request.config.getoption("ptx")
