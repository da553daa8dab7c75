"""How a task type is written: a class, or a decorated function; sync or async; typed parameters.

    class Thumbnail(TaskExecutor):
        task_type = "thumbnail"
        params = ThumbnailParams

        async def run(self, context: TaskContext, params: ThumbnailParams) -> dict[str, object]: ...

    @task("word_count")
    def word_count(context: TaskContext, text: str, limit: int = 100) -> int: ...

An `async` run shares one asyncio host process with others of its kind; a plain one has a process to
itself while it runs. What it returns is packed as MessagePack and kept as the task's result.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeVar

import msgspec
from msgspec import Struct

from executors.context import ExecutorSettings, TaskContext
from zmqcluster.model import TASK_TYPE_PATTERN, Pool

__all__ = [
    "ExecutorSettings",
    "NoParams",
    "TaskContext",
    "TaskExecutor",
    "executor_of",
    "task",
]

F = TypeVar("F", bound=Callable[..., Any])

EXECUTOR_ATTRIBUTE: Final = "__task_executor__"


class NoParams(Struct, frozen=True, forbid_unknown_fields=True):
    """A task that takes nothing."""


class TaskExecutor:
    """Runs the tasks of one type. One instance a host process, made without arguments.

    task_type: its name on the wire, fitting TASK_TYPE_PATTERN.
    params: a msgspec.Struct whose bounds and defaults say what may be submitted; fields it does not
    have are refused whether or not the Struct itself says so.
    tells_begin: run() itself calls context.tell_begun(), at the moment that counts for the rate
    key: until then, no other attempt of a key with a delay starts anywhere.
    """

    task_type: ClassVar[str] = ""
    params: ClassVar[type[Struct]] = NoParams
    tells_begin: ClassVar[bool] = False

    def setup(self, settings: ExecutorSettings) -> Any:
        """Open what all tasks of this host share; may be async. Called before the first task."""

    def close(self) -> Any:
        """Give it back; may be async. Called when the host ends in good order."""

    def run(self, context: TaskContext, params: Any) -> Any:
        """Do one task and return its result; may be async (then it must not block).

        Raise TaskRetryable for "not now", TaskRejected for "never"; any other exception is a
        failed attempt.
        """
        raise NotImplementedError

    @property
    def pool(self) -> Pool:
        """Which hosts run it: told by whether run is async."""
        return Pool.ASYNC if inspect.iscoroutinefunction(self.run) else Pool.SYNC

    @property
    def name(self) -> str:
        """What its author calls it."""
        return type(self).__qualname__

    def problem(self) -> str:
        """Why this executor cannot be used, in one sentence; empty when it can."""
        name = self.name
        if not re.fullmatch(TASK_TYPE_PATTERN.strip("^$"), str(self.task_type)):
            return f"{name}.task_type is {self.task_type!r}; it must fit {TASK_TYPE_PATTERN}"
        params: object = self.params
        if not (isinstance(params, type) and issubclass(params, Struct)):
            return f"{name}.params must be a msgspec.Struct class, not {params!r}"
        if params.__struct_config__.array_like:
            return f"{name}.params is array_like; parameters travel as a map"
        return f"{name} has no run()" if type(self).run is TaskExecutor.run else ""


class FunctionExecutor(TaskExecutor):
    """A decorated function as an executor. unpack: its parameters are the fields of params."""

    def __init__(
        self, task_type: str, function: Callable[..., Any], params: type[Struct], unpack: bool
    ) -> None:
        # Instances, not classes, carry what a class body would say.
        self.task_type = task_type  # type: ignore[misc]  # one instance is one task type here
        self.params = params  # type: ignore[misc]  # as above
        self.function = function
        self._call = _unpacking(function) if unpack else function

    @property
    def name(self) -> str:
        return self.function.__qualname__


class SyncFunction(FunctionExecutor):
    """A plain function."""

    def run(self, context: TaskContext, params: Any) -> Any:
        return self._call(context, params)


class AsyncFunction(FunctionExecutor):
    """An async function."""

    async def run(self, context: TaskContext, params: Any) -> Any:
        return await self._call(context, params)


def task(name: str) -> Callable[[F], F]:
    """Make a function the executor of task type `name`; the function itself stays as it is.

    The function takes the TaskContext first, then either one msgspec.Struct, or plain annotated
    parameters of which a Struct is made.

    Raises TypeError, when the module is imported, for a function it cannot read.
    """

    def decorate(function: F) -> F:
        params, unpack = _params_of(name, function)
        kind = AsyncFunction if inspect.iscoroutinefunction(function) else SyncFunction
        executor = kind(name, function, params, unpack)
        setattr(function, EXECUTOR_ATTRIBUTE, executor)
        return function

    return decorate


def executor_of(thing: object) -> TaskExecutor | None:
    """The executor behind a class, a decorated function or an instance; None when there is none."""
    if isinstance(thing, TaskExecutor):
        return thing
    if isinstance(thing, type) and issubclass(thing, TaskExecutor):
        return thing() if thing.task_type else None
    found = getattr(thing, EXECUTOR_ATTRIBUTE, None)
    return found if isinstance(found, TaskExecutor) else None


def _unpacking(function: Callable[..., Any]) -> Callable[[TaskContext, Any], Any]:
    def call(context: TaskContext, params: Struct) -> Any:
        fields = {name: getattr(params, name) for name in params.__struct_fields__}
        return function(context, **fields)

    return call


def _params_of(name: str, function: Callable[..., Any]) -> tuple[type[Struct], bool]:
    """The parameters' Struct, and whether it was made from single parameters."""
    where = f"task {name!r} ({function.__qualname__})"
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"{where}: {error}") from None
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise TypeError(f"{where} must take the TaskContext first")
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{where}: *{parameter.name} cannot be checked; name the parameters")
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in hints:
            raise TypeError(f"{where}: parameter {parameter.name} needs a name and a type")
        hint = hints[parameter.name]
        if len(parameters) == 2 and isinstance(hint, type) and issubclass(hint, Struct):
            return hint, False
        has_default = parameter.default is not parameter.empty
        fields.append(
            (parameter.name, hint, parameter.default) if has_default else (parameter.name, hint)
        )
    struct_name = "".join(part.title() for part in re.split(r"[_.-]", name)) + "Params"
    made = msgspec.defstruct(struct_name, fields, kw_only=True, frozen=True)
    return made, True
