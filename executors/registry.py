"""Which task types there are: built in, from `--executors my.module`, from installed packages.

The master checks submissions against a registry, a worker's hosts run tasks from one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any, Final

import msgspec
import msgspec.inspect
from msgspec import Struct
from msgspec.inspect import UnionType

from executors.base import FunctionExecutor, TaskExecutor, executor_of
from zmqcluster.errors import ConfigError, RequestRefused
from zmqcluster.messages import TypeOffer
from zmqcluster.model import TASK_TYPES_MAX, RefusalCode

ENTRY_POINT_GROUP: Final = "zmqcluster.executors"
BUILT_IN: Final = (
    "executors.builtin",
    "executors.crawl",
    "executors.user_apps",
    "executors.app_sync",
    "executors.data_sync",
)
SHOWN_CHARS_MAX: Final = 80
# A name, or an index in brackets; msgspec writes [...] where it does not know which.
_STEP: Final = re.compile(r"([^.\[\]]+)(?![^\[]*\])|\[([^\]]*)\]")


class Registry:
    """Task types by name. Filled once, then only read."""

    def __init__(self, executors: Iterable[TaskExecutor] = ()) -> None:
        """Raises ConfigError("executors", …) for an unusable executor or a name given twice."""
        self._executors: dict[str, TaskExecutor] = {}
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}
        for executor in executors:
            self._add(executor)

    @classmethod
    def load(cls, modules: Sequence[str] = (), built_in: Sequence[str] = BUILT_IN) -> Registry:
        """Everything there is: built in, installed, and these modules.

        Raises ConfigError("executors", …), one clear sentence, when a module cannot be imported or
        holds no executor.
        """
        # A module may be named twice, or be installed and named: that is one executor, not two.
        found: dict[object, TaskExecutor] = {}
        for executor in _everything(modules, built_in):
            found.setdefault(_source(executor), executor)
        return cls(found.values())

    def types(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._executors))

    def get(self, task_type: str) -> TaskExecutor:
        """Raises RequestRefused(UNKNOWN_TASK_TYPE)."""
        try:
            return self._executors[task_type]
        except KeyError:
            raise self._unknown(task_type) from None

    def decode(self, task_type: str, data: bytes) -> Any:
        """The parameters, as the executor's Struct.

        data: untrusted, one MessagePack map. Raises RequestRefused(UNKNOWN_TASK_TYPE |
        BAD_PARAMETERS) naming the field, what was given and what is allowed.
        """
        decoder = self._decoders.get(task_type)
        if decoder is None:
            raise self._unknown(task_type)
        try:
            return decoder.decode(data)
        # A Struct's __post_init__ is the author's code: the same door as a run.
        except Exception as error:  # noqa: BLE001
            problem = self._explain(task_type, data, error)
            raise RequestRefused(RefusalCode.BAD_PARAMETERS, f"{task_type}: {problem}") from None

    def check(self, task_type: str, data: bytes) -> None:
        """Like decode, for a submission: returns when the parameters fit."""
        self.decode(task_type, data)

    def offers(self) -> tuple[TypeOffer, ...]:
        """What a worker with these executors can run."""
        return tuple(TypeOffer(name, self._executors[name].pool) for name in self.types())

    def _add(self, executor: TaskExecutor) -> None:
        problem = executor.problem()
        name = executor.task_type
        if not problem and name in self._executors:
            places = f"{_place(self._executors[name])} and {_place(executor)}"
            problem = f"task type {name!r} is defined twice, by {places}"
        if not problem and len(self._executors) >= TASK_TYPES_MAX:
            problem = f"more than {TASK_TYPES_MAX} task types"
        if problem:
            raise ConfigError("executors", problem)
        try:
            self._decoders[name] = msgspec.msgpack.Decoder(_closed(executor.params))
        except TypeError as error:
            raise ConfigError("executors", f"parameters of {name!r}: {error}") from None
        self._executors[name] = executor

    def _unknown(self, task_type: str) -> RequestRefused:
        close = difflib.get_close_matches(task_type, self._executors, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(self.types())
        shown = repr(task_type)[:SHOWN_CHARS_MAX]
        return RequestRefused(
            RefusalCode.UNKNOWN_TASK_TYPE, f"unknown task type {shown}.{hint} Known are: {known}"
        )

    def _explain(self, task_type: str, data: bytes, error: Exception) -> str:
        """One sentence: which field, what was given, what is allowed."""
        text = str(error) or type(error).__name__
        if not isinstance(error, msgspec.ValidationError):
            return f"not one MessagePack map of parameters ({text})"
        fields = self._executors[task_type].params.__struct_encode_fields__
        reason, _, path = text.partition(" - at `$.")
        path = path.rstrip("`")
        if reason.startswith("Object contains unknown field") and not path:
            unknown = reason.split("`")[1]
            close = difflib.get_close_matches(unknown, fields, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(fields) or "none"
            return f"unknown parameter {unknown!r:.80}.{hint} Allowed are: {allowed}"
        if reason.startswith("Object missing required field") and not path:
            return f"parameter {reason.split('`')[1]!r} is missing"
        if not path:
            is_no_map = reason.startswith("Expected `object`")
            return f"parameters must be a map; {reason}" if is_no_map else reason
        if reason.startswith("Invalid enum value"):
            reason = f"allowed are {_allowed(self._executors[task_type].params, path)}"
        return f"{path}: {_given(data, path)} given; {reason[:1].lower()}{reason[1:]}"


def _closed(params: type[Struct]) -> type[Struct]:
    """The same Struct, refusing fields it does not have."""
    if params.__struct_config__.forbid_unknown_fields:
        return params
    return msgspec.defstruct(
        params.__name__,
        [],
        bases=(params,),
        module=params.__module__,
        forbid_unknown_fields=True,
    )


def _allowed(params: type[Struct], path: str) -> str:
    """The values of a top-level enum or literal parameter."""
    info = msgspec.inspect.type_info(params)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if field.encode_name != path:
            continue
        kinds = field.type.types if isinstance(field.type, UnionType) else (field.type,)
        return ", ".join(repr(value) for kind in kinds for value in _values_of(kind))
    return "other values"


def _values_of(kind: msgspec.inspect.Type) -> list[object]:
    match kind:
        case msgspec.inspect.LiteralType(values=values):
            return list(values)
        case msgspec.inspect.EnumType(cls=enum):
            return [member.value for member in enum]
    return []


def _given(data: bytes, path: str) -> str:
    """The value at a msgspec error path such as `items[0].name`, shortened for people."""
    try:
        value = msgspec.msgpack.decode(data)
        for name, index in _STEP.findall(path):
            value = value[name] if name else value[int(index)]
    except (
        msgspec.MsgspecError,
        UnicodeDecodeError,
        RecursionError,
        LookupError,
        TypeError,
        ValueError,
    ):
        return "a wrong value"
    shown = repr(value)
    return shown if len(shown) <= SHOWN_CHARS_MAX else f"{shown[:SHOWN_CHARS_MAX]}…"


def _source(executor: TaskExecutor) -> Callable[..., Any]:
    return executor.function if isinstance(executor, FunctionExecutor) else type(executor)


def _place(executor: TaskExecutor) -> str:
    source = _source(executor)
    return f"{source.__module__}.{source.__qualname__}"


def _everything(modules: Sequence[str], built_in: Sequence[str]) -> Iterator[TaskExecutor]:
    for name in built_in:
        yield from _from_module(name)
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        yield from _from_foreign(entry.value, entry.load)
    for name in dict.fromkeys(modules):
        yield from _from_module(name)


def _from_module(name: str) -> list[TaskExecutor]:
    return _from_foreign(name, lambda: importlib.import_module(name))


def _from_foreign(name: str, load: Callable[[], object]) -> list[TaskExecutor]:
    """Importing and making executors runs foreign code: whatever it raises becomes one sentence."""
    try:
        return _from_thing(name, load())
    except ConfigError:
        raise
    # A module that calls sys.exit() must not end a master without a word.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        raise _import_failed(name, error) from None


def _from_thing(name: str, thing: object) -> list[TaskExecutor]:
    """Executors in a module (those defined there), or the one thing an entry point names."""
    if not inspect.ismodule(thing):
        executor = executor_of(thing)
        if executor is None:
            raise ConfigError("executors", f"{name} is no executor, module or decorated function")
        return [executor]
    found = [
        executor
        for member in vars(thing).values()
        if getattr(member, "__module__", None) == thing.__name__
        and (executor := executor_of(member)) is not None
    ]
    if not found:
        raise ConfigError(
            "executors",
            f"module {name} has no TaskExecutor class with a task_type and no @task function",
        )
    return found


def _import_failed(name: str, error: BaseException) -> ConfigError:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
        return ConfigError(
            "executors",
            f"there is no module {name!r}: put it beside main.py or into PYTHONPATH, or install it",
        )
    return ConfigError("executors", f"cannot import {name}: {type(error).__name__}: {text}")
