"""The faults that are injected for real, by number and name; each is a function that gets a rig."""

from __future__ import annotations

import importlib
import pkgutil
import resource
import shutil
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

import tests.chaos
from tests.support.cgroups import can_group, can_part_threads
from tests.support.netns import can_lay_cables
from tests.support.wall_clock import can_fake_time

if TYPE_CHECKING:
    from tests.chaos.rig import Rig

# What ten thousand connections and a bit of everything take.
DESCRIPTORS: Final = 12_000

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

    @property
    def why_not(self) -> str:
        """The same for people; empty when it can."""
        return "; ".join(WHY.get(one, f"{one} is missing") for one in self.missing)


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
    "netns": can_lay_cables,
    "freezer": lambda: can_group("freezer"),
    "thread freezer": can_part_threads,
    "cpu group": lambda: can_group("cpu"),
    "memory group": lambda: can_group("memory"),
    "wall clock": can_fake_time,
    "descriptors": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= DESCRIPTORS,
}

# Why a machine may not be able to, for people.
WHY: Final[dict[str, str]] = {
    "gcc": "no C compiler",
    "netns": "no right to make network namespaces, or no ip, tc and nft (iproute2, nftables)",
    "freezer": "no right to make a freezer control group",
    "thread freezer": "no right to make a freezer control group of version 1",
    "cpu group": "no right to make a cpu control group",
    "memory group": "no right to make a memory control group",
    "descriptors": f"a process may not have {DESCRIPTORS:,} descriptors",
    "wall clock": "no C compiler, or it makes nothing that can be preloaded",
}


def load_all() -> dict[int, Fault]:
    """The whole catalogue, by number: every module of this folder enters its own."""
    for module in pkgutil.iter_modules(tests.chaos.__path__):
        if not module.name.startswith("test_"):
            importlib.import_module(f"tests.chaos.{module.name}")
    return dict(sorted(CATALOGUE.items()))
