"""The core decides from its arguments alone: nothing in it reads, waits, or depends on chance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "zmqcluster" / "core"
FILES = sorted(CORE.rglob("*.py"))

# hash() and id() differ from run to run; the others talk to the world.
FORBIDDEN_CALLS = frozenset(
    {"open", "print", "input", "hash", "id", "eval", "exec", "compile", "breakpoint", "__import__"}
)
# Modules that would bring a clock, the disk, the network, threads or chance of their own. `random`
# may be imported for the type of the generator that is passed in; its functions are caught below.
FORBIDDEN_IMPORTS = frozenset(
    {
        *("asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue"),
        *("secrets", "select", "shutil", "signal", "socket", "sqlite3", "subprocess", "sys"),
        *("tempfile", "threading", "time", "urllib", "uuid", "weakref", "zmq", "requests"),
    }
)
SET_TYPES = frozenset({"set", "frozenset", "Set", "AbstractSet", "MutableSet"})
# What turns a set into an order; sorted(), len(), min(), any() and the like do not.
ORDERING_CALLS = frozenset({"list", "tuple", "iter", "enumerate", "zip", "map", "filter", "next"})


def problems(source: str) -> list[str]:
    """What makes this source impure, as "line: what"."""
    tree = ast.parse(source)
    sets = set(names_of_sets(tree))
    return [f"{line}: {what}" for line, what in sorted(find(tree, sets))]


def find(tree: ast.AST, sets: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                yield node.lineno, "async"
            case ast.Global():
                yield node.lineno, "global state"
            case ast.Import(names=names):
                for name in names:
                    if name.name.partition(".")[0] in FORBIDDEN_IMPORTS:
                        yield node.lineno, f"import {name.name}"
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] in FORBIDDEN_IMPORTS:
                    yield node.lineno, f"import {module}"
                if module == "random" and {name.name for name in names} != {"Random"}:
                    yield node.lineno, "chance of its own"
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                yield node.lineno, f"{name}()"
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if (
                name in ORDERING_CALLS and is_set(first, sets)
            ):
                yield node.lineno, f"{name}() of a set"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="random"))):
                yield node.lineno, "chance of its own"
            case ast.Call(func=ast.Attribute(value=whole, attr="pop"), args=[]) if is_set(
                whole, sets
            ):
                yield node.lineno, "pop() of a set"
            case ast.For(iter=whole) | ast.comprehension(iter=whole) if is_set(whole, sets):
                yield whole.lineno, "iteration over a set"
            case ast.Starred(value=whole) if is_set(whole, sets):
                yield node.lineno, "unpacking of a set"


def names_of_sets(tree: ast.AST) -> Iterator[str]:
    """Names (of variables, arguments and attributes) annotated or assigned as sets."""
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=target, annotation=annotation) if is_set_type(annotation):
                yield name_of(target)
            case ast.arg(arg=name, annotation=ast.expr() as annotation) if is_set_type(annotation):
                yield name
            case ast.Assign(targets=[target], value=value) if is_set(value, set()):
                yield name_of(target)


def is_set(node: ast.expr, sets: set[str]) -> bool:
    match node:
        case ast.Set() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in SET_TYPES
        case ast.BinOp(op=ast.BitOr() | ast.BitAnd() | ast.Sub(), left=left, right=right):
            return is_set(left, sets) or is_set(right, sets)
        case ast.Name() | ast.Attribute():
            return name_of(node) in sets
        case _:
            return False


def is_set_type(node: ast.expr) -> bool:
    match node:
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name):
            return name in SET_TYPES
        case _:
            return False


def name_of(node: ast.expr) -> str:
    """`seen` for both seen and self.seen: one name, one kind of thing."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_module_of_the_core_is_pure(file: Path) -> None:
    assert problems(file.read_text(encoding="utf-8")) == []


def test_there_is_a_core() -> None:
    assert len(FILES) > 5


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from os import path",
        "import sqlite3.dbapi2",
        "import random\nrandom.random()",
        "from random import choice",
        "print(1)",
        "open('x')",
        "x = hash('a')",
        "x = id(a)",
        "async def f(): ...",
        "def f():\n    global x",
        "for x in {1, 2}: pass",
        "y = [x for x in set(a)]",
        "s: set[int] = set()\nfor x in s: pass",
        "s = {1}\ny = list(s)",
        "def f(s: frozenset[int]):\n    return tuple(s)",
        "class A:\n    def f(self):\n        self.s: set[int] = set()\n        self.s.pop()",
        "a = {1}\nb = [*a]",
        "a = {1}\nfor x in a - b: pass",
    ],
)
def test_impure_source_is_seen(source: str) -> None:
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "from random import Random\ndef f(rng: Random) -> float:\n    return rng.random()",
        "s = {1}\nfor x in sorted(s): pass",
        "s = {1}\nn = len(s)\nok = 1 in s",
        "d = {1: 2}\nfor x in d: pass\nd.pop(1)",
        "def f(x: list[int]):\n    return list(x)",
    ],
)
def test_pure_source_is_left_alone(source: str) -> None:
    assert problems(source) == []
