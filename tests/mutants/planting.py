"""Plants a bug: replaces text in the source of one module before Python sees it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

from msgspec import Struct


class Mutant(Struct, frozen=True):
    """old: text that is in the module exactly once; new: what stands there instead.

    breaks: the promise that is broken, for people. options: of the runs that look for it, as
    "name=value" words, where the swarm alone would take long; none is best.
    """

    name: str
    module: str
    old: str
    new: str
    breaks: str
    options: tuple[str, ...] = ()


class NotPlanted(Exception):
    """The table and the source do not fit any more."""


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the bug in it. Raises NotPlanted."""
    found = source.count(mutant.old)
    if found != 1:
        raise NotPlanted(f"{mutant.name}: its text is {found} times in {mutant.module}, not once")
    return source.replace(mutant.old, mutant.new)


def plant(mutant: Mutant) -> None:
    """From now on importing its module brings the bug. Raises NotPlanted."""
    if mutant.module in sys.modules:
        raise NotPlanted(f"{mutant.name}: {mutant.module} was imported before")
    # Found once here, so that a table that is out of date is told before any run.
    mutated(mutant, source_of(mutant.module))
    sys.meta_path.insert(0, _Finder(mutant))


def source_of(module: str) -> str:
    spec = importlib.machinery.PathFinder.find_spec(module, [_folder(module)])
    if spec is None or spec.origin is None:
        raise NotPlanted(f"there is no module {module}")
    with open(spec.origin, encoding="utf-8") as file:
        return file.read()


def _folder(module: str) -> str:
    package, _, _ = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    return next(iter(spec.submodule_search_locations))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None, fullname
        assert spec.origin is not None, fullname
        spec.loader = _Loader(fullname, spec.origin, self._mutant)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Never reads or writes compiled files: what is compiled has the bug."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = mutated(self._mutant, self.get_data(self.path).decode())
        return self.source_to_code(source.encode(), self.path)
