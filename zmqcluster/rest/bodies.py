"""Untrusted JSON and query strings to typed structs and messages; what does not fit is a Problem.

A refusal names the field, what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, TypeVar

import msgspec
import msgspec.inspect

from zmqcluster.errors import RequestRefused
from zmqcluster.messages import RateRule, Submit, TaskSpec
from zmqcluster.model import (
    DEVICE_ID_PATTERN,
    LABEL_PATTERN,
    TASK_DATA_BYTES_MAX,
    TASK_TYPE_PATTERN,
    WALL_MS_MAX,
)
from zmqcluster.rest.problems import STATUS_BY_REFUSAL, Problem, bad_request, unprocessable
from zmqcluster.rest.schemas import HOST_PATTERN, BatchBody, RateBody, TaskBody, TaskList

DEPTH_MAX: Final = 32
GIVEN_CHARS_MAX: Final = 80
IDEMPOTENCY_KEY_CHARS_MAX: Final = 255

Check = Callable[[str, bytes], None]
S = TypeVar("S", bound=msgspec.Struct)

_ERROR_PATH: Final = re.compile(r" - at `\$?(?P<path>[^`]*)`$")
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `(?P<name>[^`]*)`")
_QUOTED: Final = re.compile(r"`([^`]*)`")
_TYPE_WORDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "object": "an object",
    "array": "a list",
    "datetime": "date and time",
}
_PATTERN_WORDS: Final = {
    TASK_TYPE_PATTERN: "small letters, digits and '.', '_', '-', first a letter, at most 64",
    DEVICE_ID_PATTERN: "letters, digits and '.', '_', '-', first a letter or digit, at most 64",
    LABEL_PATTERN: "letters, digits and '.', '_', '=', '-', first a letter or digit, at most 64",
    HOST_PATTERN: "a host name or an IP address",
}
_PATH_STEP: Final = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")
_DATA: Final = msgspec.json.Decoder(dict[str, Any])
_PACKER: Final = msgspec.msgpack.Encoder()
_LIST: Final = msgspec.json.Decoder(TaskList)
_BATCH: Final = msgspec.json.Decoder(BatchBody)
_TASK: Final = msgspec.json.Decoder(TaskBody)


class _Shape(msgspec.Struct):
    """Tells a batch from a single task, skipping everything else."""

    tasks: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_SHAPE: Final = msgspec.json.Decoder(_Shape)


def decode_body(decoder: msgspec.json.Decoder[S], body: bytes) -> S:
    """One JSON object as its struct. Raises Problem, and never any other error."""
    result: S = _decode(decoder, body)
    return result


def decode_query(shape: type[S], pairs: Iterable[tuple[str, str]]) -> S:
    """The part after the question mark as its struct. Raises Problem."""
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise bad_request(f"{name}: given twice; once is allowed.")
        given[name] = value
    try:
        return msgspec.convert(given, shape, strict=False)
    except msgspec.ValidationError as error:
        problem = _sentence(str(error), given, "query", shape)
        raise bad_request(problem) from None


def submission(body: bytes, request_id: bytes, check: Check) -> Submit:
    """The body of POST /tasks as the message that queues it.

    body: one task, a list of tasks, or {"tasks": […], …}. check: refuses what no executor takes.

    Raises Problem, which names the first task that does not fit; then nothing is queued.
    """
    batch, single = _batch_of(body)
    specs = tuple(
        _task_spec(each, "" if single else f"tasks[{index}].", check)
        for index, each in enumerate(batch.tasks)
    )
    return Submit(
        request_id=request_id,
        tasks=specs,
        job_id=_common_job(batch),
        job_name=batch.job_name,
        rates=tuple(_rate_rule(each) for each in batch.rates),
    )


def request_id_of(idempotency_key: str | None, fresh: Callable[[int], bytes]) -> bytes:
    """16 bytes that name a request: from the client's own key when it gave one.

    Raises Problem when the key is empty, too long, or not plain ASCII text.
    """
    if idempotency_key is None:
        return fresh(16)
    key = idempotency_key.strip()
    if not (0 < len(key) <= IDEMPOTENCY_KEY_CHARS_MAX and key.isascii() and key.isprintable()):
        raise bad_request(
            f"Idempotency-Key: given {len(idempotency_key)} characters; allowed are 1 to "
            f"{IDEMPOTENCY_KEY_CHARS_MAX} printable ASCII characters."
        )
    return blake2b(key.encode("ascii"), digest_size=16).digest()


def _batch_of(body: bytes) -> tuple[BatchBody, bool]:
    """The tasks of a body, and whether it is one task, not in a list."""
    if body.lstrip(b" \t\r\n")[:1] == b"[":
        return BatchBody(tasks=_decode(_LIST, body)), False
    shape: _Shape = _decode(_SHAPE, body)
    if shape.tasks is msgspec.UNSET:
        return BatchBody(tasks=[_decode(_TASK, body)]), True
    return _decode(_BATCH, body), False


def _task_spec(task: TaskBody, where: str, check: Check) -> TaskSpec:
    data = _packed_data(task.task_data, where)
    try:
        check(task.task_type, data)
    except RequestRefused as refusal:
        status = STATUS_BY_REFUSAL[refusal.code]
        place = where.rstrip(".") + ": " if where else ""
        raise Problem(status, refusal.code, f"{place}{refusal.problem}") from None
    return TaskSpec(
        task.task_type,
        data,
        task.priority,
        task.max_retry_count,
        None if task.timeout_s is None else max(1, round(task.timeout_s * 1000)),
        _wall_ms(task.not_before),
        task.unique_key,
        task.rate_key,
        task.labels,
    )


def _packed_data(raw: msgspec.Raw, where: str) -> bytes:
    """task_data as one MessagePack map."""
    field = f"{where}task_data"
    text = bytes(raw)
    try:
        data = _DATA.decode(text)
        # Fewer brackets than levels cannot be too deep: the walk is for the odd one.
        if text.count(b"{") + text.count(b"[") > DEPTH_MAX and _deeper_than(data, DEPTH_MAX):
            raise unprocessable(f"{field}: given more than {DEPTH_MAX} levels of nesting.")
        packed = _PACKER.encode(data)
    except RecursionError:
        raise unprocessable(f"{field}: given more than {DEPTH_MAX} levels of nesting.") from None
    except msgspec.ValidationError as error:
        raise unprocessable(_sentence(str(error), _loosely(text), field, dict)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"{field}: not valid JSON: {error}.") from None
    except OverflowError:
        raise unprocessable(f"{field}: whole numbers must fit in 64 bits.") from None
    if len(packed) > TASK_DATA_BYTES_MAX:
        raise unprocessable(
            f"{field}: given {len(packed)} bytes as MessagePack; "
            f"allowed are at most {TASK_DATA_BYTES_MAX}."
        )
    return packed


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether a dict or list holds more levels than this, itself counted."""
    if levels == 0:
        return True
    children = value.values() if isinstance(value, dict) else value
    return any(
        _deeper_than(child, levels - 1) for child in children if isinstance(child, dict | list)
    )


def _common_job(batch: BatchBody) -> int:
    """The one job that all tasks of a request go into; 0: none, or a new one."""
    wanted = {task.job_id for task in batch.tasks if task.job_id}
    if batch.job_id:
        wanted.add(batch.job_id)
    if len(wanted) > 1:
        raise unprocessable(
            f"job_id: given {', '.join(map(str, sorted(wanted)[:5]))}; one request fills one job."
        )
    if wanted and batch.job_name:
        raise unprocessable("job_name: given together with job_id; only one of them is allowed.")
    return wanted.pop() if wanted else 0


def _rate_rule(rate: RateBody) -> RateRule:
    return RateRule(
        rate_key=rate.rate_key,
        delay_ms=_ms(rate.delay_s),
        concurrency=rate.concurrency,
        closed_for_ms=_ms(rate.closed_for_s),
    )


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _wall_ms(instant: datetime | float | None) -> int:
    if instant is None:
        return 0
    seconds = instant.timestamp() if isinstance(instant, datetime) else instant
    return min(max(0, round(seconds * 1000)), WALL_MS_MAX)


# --- saying what is wrong -----------------------------------------------------------------------


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        given = _loosely(body)
        raise unprocessable(_sentence(str(error), given, "body", decoder.type)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"body: not valid JSON: {error}.") from None
    except RecursionError:
        raise bad_request("body: JSON nested too deeply.") from None


def _loosely(body: bytes) -> Any:
    """The same JSON without types, only to quote what was given; UNSET when it cannot be read."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET


def _sentence(message: str, given: Any, root: str, shape: Any) -> str:
    """msgspec's message as: field, what is allowed, what was given."""
    found = _ERROR_PATH.search(message)
    path = found["path"] if found else ""
    reason = _ERROR_PATH.sub("", message)
    reason = reason[:1].lower() + reason[1:]
    field = _field(path, root)
    if unknown := _UNKNOWN_FIELD.search(reason):
        return f"{field}: {_unknown_field(unknown['name'], path, shape)}"
    if "enum value" in reason:
        reason = f"allowed are {', '.join(_choices(path, shape))}"
    reason = _in_words(reason)
    value = _at(given, path)
    quoted = "" if value is msgspec.UNSET else f"; given {_quoted(value)}"
    return f"{field}: {reason}{quoted}."


def _field(path: str, root: str) -> str:
    """What people call the place at a path of msgspec's."""
    if path.startswith("[...]"):
        # Some value of a map whose names are not ours: its name is not told.
        return root
    # A bare list of tasks is called what it is called in a batch.
    return f"tasks{path}" if path.startswith("[") else path.removeprefix(".") or root


def _in_words(reason: str) -> str:
    """Types and patterns as people call them."""
    for pattern, words in _PATTERN_WORDS.items():
        reason = reason.replace(f"matching regex {pattern!r}", f"of {words}")
    return _QUOTED.sub(
        lambda found: " or ".join(_TYPE_WORDS.get(each, each) for each in found[1].split(" | ")),
        reason,
    )


def _unknown_field(name: str, path: str, shape: Any) -> str:
    allowed = getattr(_struct_at(path, shape), "__struct_encode_fields__", ())
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    known = ", ".join(allowed) if allowed else "none"
    return f"there is no {_quoted(name)}; allowed are {known}{hint}"


def _choices(path: str, shape: Any) -> list[str]:
    """The values an enum or literal field at this path may have."""
    name = path.rpartition(".")[2]
    for field in msgspec.inspect.type_info(_struct_at(path, shape)).fields:  # type: ignore[attr-defined]  # of a struct
        if field.encode_name == name:
            kinds = getattr(field.type, "types", (field.type,))
            return [str(value) for kind in kinds for value in _values(kind)]
    return []


def _values(kind: msgspec.inspect.Type) -> Iterable[Any]:
    match kind:
        case msgspec.inspect.EnumType(cls):
            return [each.value for each in cls]
        case msgspec.inspect.LiteralType(values):
            return values
        case _:
            return ()


def _struct_at(path: str, shape: Any) -> Any:
    """The struct that holds the field at this path of a body."""
    nested: Mapping[str, type[msgspec.Struct]] = {"tasks": TaskBody, "rates": RateBody}
    return TaskBody if path.startswith("[") else nested.get(path.strip(".").split("[")[0], shape)


def _at(value: Any, path: str) -> Any:
    """What stands at a path such as .tasks[3].priority; UNSET when nothing does."""
    for step in _PATH_STEP.finditer(path):
        try:
            value = value[step["key"]] if step["key"] else value[int(step["index"])]
        except (KeyError, IndexError, TypeError):
            return msgspec.UNSET
    return value


def _quoted(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= GIVEN_CHARS_MAX else f"{text[:GIVEN_CHARS_MAX]}…"
