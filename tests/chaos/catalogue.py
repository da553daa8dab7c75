"""The faults that are injected for real, by number and name; each is a function that gets a rig."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from tests.chaos.rig import Rig

Inject = Callable[["Rig"], None]


class Tier(StrEnum):
    """How often a fault is tried: QUICK with all tests, CI before each release, LONG by hand."""

    QUICK = "quick"
    CI = "ci"
    LONG = "long"


class Fault(Struct, frozen=True):
    """One entry. needs: what this machine must be able to do, by name in CAN."""

    number: int
    name: str
    group: str
    tier: Tier
    needs: tuple[str, ...]
    inject: Inject

    @property
    def missing(self) -> list[str]:
        """What keeps this machine from injecting it."""
        return [one for one in self.needs if not CAN[one]()]


CATALOGUE: Final[dict[int, Fault]] = {}


def fault(
    number: int, name: str, *, tier: Tier = Tier.CI, needs: tuple[str, ...] = ()
) -> Callable[[Inject], Inject]:
    """Enter a function into the catalogue. Its module's name is its group."""

    def enter(inject: Inject) -> Inject:
        assert number not in CATALOGUE, f"fault {number} is entered twice"
        group = inject.__module__.rpartition(".")[2]
        CATALOGUE[number] = Fault(number, name, group, tier, needs, inject)
        return inject

    return enter


def _has(*programs: str) -> bool:
    return all(map(shutil.which, programs))


# What a fault may need; probed, never assumed.
CAN: Final[dict[str, Callable[[], bool]]] = {
    "gcc": lambda: _has("gcc"),
    "netns": lambda: _has("ip", "nft"),
    "faketime": lambda: _has("faketime"),
}
