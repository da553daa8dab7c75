"""For every test: bounded hypothesis runs, no thread that outlives it, and totals at the end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support.tiers import PROFILE

THREAD_END_S = 3.0

Tried = Callable[[Mapping[str, int]], None]
_TRIED: Final = pytest.StashKey[Counter[str]]()

# Deadlines measure this machine's load, not our code: pytest-timeout bounds the whole test.
settings.register_profile(
    "cluster",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    # To explain a failure it is traced line by line: minutes, for what a debugger tells.
    phases=[each for each in Phase if each is not Phase.explain],
)
settings.register_profile("deep", parent=settings.get_profile("cluster"), max_examples=300)
settings.register_profile("thorough", parent=settings.get_profile("cluster"), max_examples=2000)
settings.load_profile(PROFILE)


@pytest.fixture(autouse=True)
def _no_thread_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a thread running fails; threads of wider fixtures began before it."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + THREAD_END_S
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    left = [
        thread.name
        for thread in set(threading.enumerate()) - before
        if thread.is_alive() and not thread.daemon
    ]
    assert not left, f"{request.node.nodeid} left threads running: {left}"


@pytest.fixture(scope="session")
def tried(request: pytest.FixtureRequest) -> Tried:
    """Call it with how much of what was tried; the totals are told at the end."""
    counter = request.config.stash.setdefault(_TRIED, Counter())
    return counter.update


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    totals: Counter[str] = config.stash.get(_TRIED, Counter())
    if totals:
        terminalreporter.write_line(
            "tried: " + ", ".join(f"{totals[what]:,} {what}" for what in sorted(totals))
        )
