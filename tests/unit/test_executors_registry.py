"""What may be an executor, and what a submission to one is told."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import msgpack  # type: ignore[import-untyped]  # ships no types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from executors.base import TaskContext, TaskExecutor, executor_of, task
from executors.registry import Registry
from zmqcluster.errors import ConfigError, RequestRefused
from zmqcluster.messages import TypeOffer
from zmqcluster.model import Pool, RefusalCode


class PageParams(Struct):
    """Does not itself forbid unknown fields."""

    url: str
    depth: Annotated[int, Meta(ge=0, le=9)] = 3
    how: Literal["fast", "slow"] = "fast"
    day: date | None = None
    mood: Literal["glad"] | None = None
    tags: list[Annotated[str, Meta(max_length=3)]] = []


class Page(TaskExecutor):
    task_type = "page"
    params = PageParams

    async def run(self, context: TaskContext, params: PageParams) -> str:
        return params.url


@task("add")
def add(context: TaskContext, left: int, right: int = 2) -> int:
    return left + right


@task("typed")
async def typed(context: TaskContext, params: PageParams) -> int:
    return params.depth


class PickyParams(Struct):
    value: str = ""

    def __post_init__(self) -> None:
        raise KeyError("not what one raises there")


@task("picky")
def picky(context: TaskContext, params: PickyParams) -> None:
    return None


REGISTRY = Registry([found for one in (Page, add, typed, picky) if (found := executor_of(one))])


def refusal(task_type: str, data: bytes) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        REGISTRY.check(task_type, data)
    return caught.value


def test_pool_follows_from_whether_run_is_async() -> None:
    assert REGISTRY.offers() == (
        TypeOffer("add", Pool.SYNC),
        TypeOffer("page", Pool.ASYNC),
        TypeOffer("picky", Pool.SYNC),
        TypeOffer("typed", Pool.ASYNC),
    )


def test_decorated_function_gets_its_parameters_and_stays_callable() -> None:
    context = TaskContext(1)

    params = REGISTRY.decode("add", msgpack.packb({"left": 40}))

    assert REGISTRY.get("add").run(context, params) == 42
    assert add(context, 1, right=1) == 2


def test_parameters_that_fit_are_typed() -> None:
    params = REGISTRY.decode("page", msgpack.packb({"url": "x", "day": "2024-02-29"}))

    assert isinstance(params, PageParams)
    assert (params.url, params.depth, params.day) == ("x", 3, date(2024, 2, 29))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"url": "x", "depth": 12}, ["depth", "12 given", "<= 9"]),
        ({"url": 7}, ["url", "7 given", "expected `str`"]),
        ({"url": "x", "how": "soon"}, ["how", "'soon' given", "'fast', 'slow'"]),
        (
            {"url": "x", "dept": 1},
            ["'dept'", "Did you mean 'depth'", "url, depth, how, day, mood, tags"],
        ),
        ({"depth": 1}, ["'url' is missing"]),
        ({"url": "x", "day": "2024-02-30"}, ["day", "'2024-02-30' given"]),
        ([1, 2], ["must be a map", "got `array`"]),
        ({"url": "x", "mood": "sad"}, ["'sad' given", "allowed are 'glad'"]),
        ({"url": "x", "tags": ["a", "toolong"]}, ["tags[1]", "'toolong' given"]),
    ],
)
def test_refusal_names_field_value_and_what_is_allowed(data: Any, words: list[str]) -> None:
    error = refusal("page", msgpack.packb(data))

    assert error.code == RefusalCode.BAD_PARAMETERS
    assert error.problem.startswith("page: ")
    for word in words:
        assert word.lower() in error.problem.lower()


def test_unknown_type_is_refused_with_a_hint() -> None:
    error = refusal("pages", b"\x80")

    assert error.code == RefusalCode.UNKNOWN_TASK_TYPE
    assert "Did you mean 'page'?" in error.problem


def test_error_of_the_authors_own_check_stays_a_refusal() -> None:
    assert refusal("picky", b"\x80").code == RefusalCode.BAD_PARAMETERS


@given(st.binary(max_size=200))
def test_any_bytes_are_parameters_or_a_refusal(data: bytes) -> None:
    problem = ""
    try:
        REGISTRY.check("page", data)
    except RequestRefused as error:
        problem = error.problem

    assert "\n" not in problem


def test_deep_nesting_is_a_refusal() -> None:
    assert refusal("page", b"\x91" * 100_000).code == RefusalCode.BAD_PARAMETERS


def test_two_executors_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'page' is defined twice, by .*\.Page and .*\.Page"):
        Registry([Page(), Page()])


def test_executor_with_a_bad_name_or_params_is_refused() -> None:
    class Loud(TaskExecutor):
        task_type = "LOUD"

    class Untyped(TaskExecutor):
        task_type = "untyped"
        params = dict  # type: ignore[assignment]  # the mistake this is about

    class Idle(TaskExecutor):
        task_type = "idle"

    for executor, problem in [
        (Loud(), "must fit"),
        (Untyped(), "must be a msgspec.Struct"),
        (Idle(), "has no run"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            Registry([executor])


def test_function_that_cannot_be_checked_is_refused_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match="must take the TaskContext first"):

        @task("none")
        def nothing() -> None: ...

    with pytest.raises(TypeError, match="cannot be checked"):

        @task("any")
        def anything(context: TaskContext, **rest: int) -> None: ...


def test_module_of_the_operator_is_found_and_may_be_named_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from executors.base import TaskExecutor, task\n"
        "from executors.builtin import Noop\n"
        "@task('mine')\n"
        "def mine(context): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    registry = Registry.load(["my_tasks", "my_tasks"], built_in=())

    assert registry.types() == ("mine",), "what is only imported there is not its own"
    del sys.modules["my_tasks"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("1 +", "SyntaxError"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("x = 1", "has no TaskExecutor class"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        (
            "from executors.base import TaskExecutor\n"
            "class Broken(TaskExecutor):\n"
            "    task_type = 'broken'\n"
            "    def __init__(self): raise RuntimeError('no database')\n",
            "RuntimeError: no database",
        ),
    ],
)
def test_module_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str
) -> None:
    (tmp_path / "bad_tasks.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError, match=problem) as caught:
        Registry.load(["bad_tasks"], built_in=())

    assert caught.value.key == "executors"
    assert "\n" not in str(caught.value)
    sys.modules.pop("bad_tasks", None)


def test_installed_package_is_found_by_its_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_tasks.py").write_text(
        "from executors.base import task\n"
        "@task('plugged')\n"
        "def plugged(context): return 1\n"
        "NOTHING = 1\n"
    )
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    points = info / "entry_points.txt"
    points.write_text("[zmqcluster.executors]\nplugged = plugin_tasks:plugged\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert Registry.load(["plugin_tasks"], built_in=()).types() == ("plugged",)

    points.write_text("[zmqcluster.executors]\nplugged = plugin_tasks:NOTHING\n")
    with pytest.raises(ConfigError, match="plugin_tasks:NOTHING is no executor"):
        Registry.load(built_in=())
    del sys.modules["plugin_tasks"]


def test_example_of_the_documentation_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "executors.md").read_text()
    (tmp_path / "documented.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry.load(["documented"], built_in=())

    with pytest.raises(RequestRefused) as refused:
        registry.check("word_count", msgpack.packb({"text": "to be", "least": 200}))

    assert refused.value.problem in page
    params = registry.decode("word_count", msgpack.packb({"text": "to be or not", "least": 3}))
    assert registry.get("word_count").run(TaskContext(1), params) == {"words": 1}
    del sys.modules["documented"]


def test_everything_built_in_loads() -> None:
    types = Registry.load().types()

    assert {"noop", "echo", "sleep", "crawl", "user_apps", "app_sync", "data_sync"} <= set(types)
