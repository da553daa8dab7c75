"""How long the random tests may take: a normal run is short, a thorough one is for the night."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings

# Names a profile of tests/conftest.py: HYPOTHESIS_PROFILE=thorough pytest tests/model
PROFILE: Final = os.environ.get("HYPOTHESIS_PROFILE", "cluster")
IS_USUAL: Final = PROFILE == "cluster"
# A deep one is part of the proof.
_TIMES: Final = {"cluster": 1, "deep": 5, "thorough": 40}


def scaled(count: int) -> int:
    """So many in a normal run, and more in a deep or thorough one."""
    return count * _TIMES[PROFILE]


def stateful(examples: int, steps: int) -> settings:
    """The settings of a state machine."""
    return settings(max_examples=scaled(examples), stateful_step_count=steps)
