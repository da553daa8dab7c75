"""The verb submit: one task from arguments, or many from a file of JSON lines."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Struct

from zmqcluster.cli.call import DONE, FAILED, INTERRUPTED, Call, Verb, Words
from zmqcluster.cli.follow import Follower
from zmqcluster.cli.times import count_text
from zmqcluster.cli.values import (
    duration,
    instant,
    key,
    label,
    pair,
    read_json,
    task_id,
    task_type,
    whole,
)
from zmqcluster.config import shown
from zmqcluster.errors import ClusterError, ConfigError, RequestRefused
from zmqcluster.model import (
    NAME_CHARS_MAX,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    RATE_KEY_CHARS_MAX,
    RETRIES_MAX,
    SUBMIT_TASKS_MAX,
    TIMEOUT_MS_MAX,
    UNIQUE_KEY_CHARS_MAX,
    TaskState,
)
from zmqcluster.rest.schemas import JobView, SubmittedView, TaskDetailView

# The REST door takes bodies of 8 MiB; half of it leaves room for the frame around the tasks.
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
LINE_BYTES_MAX: Final = 1024 * 1024
_PLACE: Final = re.compile(r"tasks\[([0-9]+)\](?:\.|: )")


class Sent(Struct):
    """What submit queued, over all its requests."""

    job_id: int
    task_ids: list[int]
    existing: list[int]


class Line(Struct, frozen=True):
    """One task as a JSON object. where: its place for people; empty for the task of the flags."""

    where: str
    task: bytes


def submit(call: Call) -> int:
    """Queue tasks, and wait for their ends if asked to."""
    args = call.args
    if (args.type is None) == (args.file is None):
        raise ConfigError("submit", "give a task type, or tasks with --file; not both")
    if args.job is not None and args.job_id is not None:
        raise ConfigError("--job", "--job starts a new job, --job-id adds to one; give one of them")
    sent = Sent(args.job_id or 0, [], [])
    with ExitStack() as stack:
        if args.file is None:
            batches: Iterator[list[Line]] = iter([[Line("", _one_task(args))]])
        else:
            batches = _batches(_opened(args.file, stack), args.file)
        try:
            for batch in batches:
                _send(call, sent, batch)
        except (ClusterError, KeyboardInterrupt):
            if sent.task_ids:
                _tell_some(call, sent)
            raise
    if not sent.task_ids:
        raise ConfigError("--file", f"{shown(args.file)} holds no task")
    if not args.wait:
        _tell_sent(call, sent)
        return DONE
    return _wait(call, sent)


def _one_task(args: argparse.Namespace) -> bytes:
    data = _given_data(args)
    task: dict[str, Any] = {
        "task_type": args.type,
        "task_data": data,
        "priority": args.priority,
        "unique_key": args.unique_key or "",
        "rate_key": args.rate_key or "",
        "labels": args.label or [],
    }
    if args.max_retries is not None:
        task["max_retry_count"] = args.max_retries
    if args.timeout is not None:
        task["timeout_s"] = args.timeout
    if args.not_before is not None:
        task["not_before"] = args.not_before
    return json.dumps(task).encode()


def _given_data(args: argparse.Namespace) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if args.data is not None:
        try:
            document = read_json(args.data)
        except ValueError as error:
            raise ConfigError("--data", str(error)) from None
        if not isinstance(document, dict):
            raise ConfigError("--data", f"given {shown(document)}; allowed: a JSON object")
        data = document
    for name, value in args.pairs:
        if name in data:
            raise ConfigError(shown(name, quote=False), "given twice")
        data[name] = value
    return data


def _opened(name: str, stack: ExitStack) -> BinaryIO:
    if name == "-":
        return sys.stdin.buffer
    try:
        return stack.enter_context(Path(name).open("rb"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("--file", f"cannot read {shown(name)}: {reason}") from None


def _batches(stream: BinaryIO, name: str) -> Iterator[list[Line]]:
    """The lines of the file in requests of bounded size; each line one task as a JSON object."""
    batch: list[Line] = []
    size = 0
    for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES_MAX + 1), b""), 1):
        task = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not task:
            continue
        where = f"{name}, line {number}"
        _check_line(task, where)
        if batch and (len(batch) >= SUBMIT_TASKS_MAX or size + len(task) > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(Line(where, task))
        size += len(task) + 1
    if batch:
        yield batch


def _check_line(line: bytes, where: str) -> None:
    """Raises ConfigError unless this is one JSON object; the master checks what is in it."""
    if len(line) > LINE_BYTES_MAX:
        raise ConfigError(where, f"longer than {LINE_BYTES_MAX} bytes")
    try:
        document = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(where, f"no JSON object: {error}") from None
    if "task_type" not in document:
        raise ConfigError(where, 'no "task_type" in it')


def _send(call: Call, sent: Sent, batch: list[Line]) -> None:
    """Queue one batch; the first may start the job that the others then join."""
    frame: dict[str, Any] = {"tasks": [msgspec.Raw(line.task) for line in batch]}
    name = _job_name(call.args)
    if sent.job_id:
        frame["job_id"] = sent.job_id
    elif name:
        frame["job_name"] = name
    try:
        answer = call.api.ask("POST", "/tasks", SubmittedView, frame, key=secrets.token_hex(16))
    except RequestRefused as error:
        raise RequestRefused(error.code, _placed(error.problem, batch)) from None
    sent.job_id = answer.job_id
    offset = len(sent.task_ids)
    sent.task_ids += answer.task_ids
    sent.existing += [offset + position for position in answer.existing]


def _placed(problem: str, batch: list[Line]) -> str:
    """The master's words, with the task it means named as the user knows it."""
    found = _PLACE.match(problem)
    if found is None or int(found[1]) >= len(batch):
        return problem
    where = batch[int(found[1])].where
    return (f"{where}: " if where else "") + problem[found.end() :]


def _job_name(args: argparse.Namespace) -> str:
    # Waiting for many tasks is waiting for their job, so a file that is waited for gets one.
    if args.job is None and args.wait and args.file is not None:
        return f"submit {args.file}"[:NAME_CHARS_MAX]
    return args.job or ""


def _tell_some(call: Call, sent: Sent) -> None:
    """What earlier requests of a file queued, before one of them went wrong."""
    job = f" in job {sent.job_id}" if sent.job_id else ""
    call.out.note(f"{count_text(len(sent.task_ids), 'task')} before that were queued{job}.")


def _tell_sent(call: Call, sent: Sent) -> None:
    if call.out.as_json:
        call.out.data(sent)
        return
    job = f" in job {sent.job_id}" if sent.job_id else ""
    if len(sent.task_ids) == 1:
        word = "was there already" if sent.existing else "queued"
        call.out.line(f"Task {sent.task_ids[0]} {word}{job}.")
        return
    known = f", {len(sent.existing)} of them there already" if sent.existing else ""
    call.out.line(f"{len(sent.task_ids)} tasks queued{job}{known}.")


def _wait(call: Call, sent: Sent) -> int:
    follower = Follower(call)
    try:
        if len(sent.task_ids) == 1:
            return _tell_end(call, follower.task(sent.task_ids[0]))
        return _tell_job(call, follower.job(sent.job_id, lambda now_s, view: None))
    except KeyboardInterrupt:
        what = f"--job {sent.job_id}" if sent.job_id else str(sent.task_ids[0])
        call.out.note(
            "Not waiting any more; the work goes on. "
            f"To stop it: python main.py distribute cancel {what}"
        )
        return INTERRUPTED


def _tell_end(call: Call, view: TaskDetailView) -> int:
    if call.out.as_json:
        call.out.data(view)
    else:
        call.out.note(f"Task {view.task_id} is {view.state}.")
        is_good = view.state == TaskState.COMPLETED
        call.out.line(json.dumps(view.result, ensure_ascii=False) if is_good else view.error)
    return DONE if view.state == TaskState.COMPLETED else FAILED


def _tell_job(call: Call, view: JobView) -> int:
    tasks = view.tasks
    bad = tasks.failed + tasks.dead + tasks.cancelled
    if call.out.as_json:
        call.out.data(view)
    else:
        call.out.line(
            f"Job {view.job_id} is {view.state}: {tasks.completed} completed, {tasks.failed} "
            f"failed, {tasks.dead} dead, {tasks.cancelled} cancelled."
        )
    return FAILED if bad else DONE


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("type", type=task_type, nargs="?", metavar="TYPE", help="task type, such as echo")
    add("pairs", type=pair, nargs="*", metavar="KEY=VALUE", help="parameters; JSON or text")
    add("--data", metavar="JSON", help="parameters as one JSON object")
    add("--file", metavar="FILE", help="a task a line, as REST takes them; - is stdin")
    add(
        "--job",
        metavar="NAME",
        type=key(NAME_CHARS_MAX),
        help="start a job of this name for the tasks",
    )
    add("--job-id", metavar="JOB", type=task_id, help="add the tasks to this job")
    add("--wait", action="store_true", help="wait for the end; exit code 1 if any task failed")
    add(
        "--priority",
        type=whole(0, PRIORITY_MAX),
        default=PRIORITY_DEFAULT,
        metavar="N",
        help="0 to 9; 9 goes first (5)",
    )
    add("--max-retries", type=whole(0, RETRIES_MAX), metavar="N", help="how often to try again")
    add(
        "--timeout",
        type=duration(TIMEOUT_MS_MAX / 1000),
        metavar="TIME",
        help="longest run, such as 90 or 15m",
    )
    add(
        "--not-before",
        type=instant,
        metavar="INSTANT",
        help="start no sooner, such as 2030-01-31T08:00:00Z",
    )
    add(
        "--unique-key",
        type=key(UNIQUE_KEY_CHARS_MAX),
        metavar="KEY",
        help="one task of this key in its job, ever",
    )
    add(
        "--rate-key",
        type=key(RATE_KEY_CHARS_MAX),
        metavar="KEY",
        help="share the limits of this key",
    )
    add("--label", type=label, action="append", metavar="LABEL", help="a device must have it")


VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "submit",
        "queue tasks",
        "submit echo value=hello --wait",
        submit,
        _arguments,
        words=Words("pairs", pair),
    ),
)
