"""What clients, workers and origins saw, and whether a cluster that did it kept its promises.

One checker for simulated and real clusters. A request is `ok` (answered), `fail` (refused: nothing
may have come of it) or `unknown` (no answer: it may have been carried out, once, or not at all), as
in Jepsen's histories. Whatever is `unknown` may be true or not; whatever is `ok` must be.

A rule is a function that yields what is wrong, in words; its name is the name of the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct

from tests.support.history.kept import KEPT, unfinished, untold
from tests.support.history.seen import SEEN, crowded, impolite
from tests.support.history.shapes import (
    Answer,
    Arrival,
    Cancel,
    End,
    Final,
    FinalAttempt,
    FinalJob,
    FinalTask,
    History,
    Retry,
    Start,
    Submission,
    Told,
)

__all__ = [
    "Answer",
    "Arrival",
    "Cancel",
    "End",
    "Final",
    "FinalAttempt",
    "FinalJob",
    "FinalTask",
    "History",
    "Problem",
    "Retry",
    "Start",
    "Submission",
    "Told",
    "kept_problems",
    "problems",
]


class Problem(Struct, frozen=True):
    """A broken promise: the name of its rule, and what happened."""

    promise: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.promise})"


def problems(
    history: History,
    final: Final,
    *,
    is_at_rest: bool = True,
    delays_ms: dict[str, float] | None = None,
    concurrency: dict[str, int] | None = None,
) -> list[Problem]:
    """Every broken promise; empty when all were kept.

    is_at_rest: everything had the time to end. delays_ms: least time between two arrivals at an
    origin, tolerance taken off. concurrency: most requests at once at an origin.
    """
    found = kept_problems(final)
    for rule in SEEN:
        found += _named(rule, rule(history, final))
    found += _named(impolite, impolite(history, delays_ms or {}))
    found += _named(crowded, crowded(history, concurrency or {}))
    found += _named(untold, untold(final))
    if is_at_rest:
        found += _named(unfinished, unfinished(final))
    return found


def kept_problems(final: Final) -> list[Problem]:
    """What is wrong with what is kept, whatever was seen; at any commit boundary."""
    return [problem for rule in KEPT for problem in _named(rule, rule(final))]


def _named(rule: Callable[..., object], texts: Iterable[str]) -> list[Problem]:
    return [Problem(rule.__name__, text) for text in texts]
