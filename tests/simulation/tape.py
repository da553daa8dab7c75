"""What a core was given, written down: replayed without a world, and told as a plain test.

A tape survives changes of the simulator, as a seed does not. It holds what came from outside only:
what the core looks up and reads is looked up and read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from random import Random
from typing import Any, Final

import msgspec
from msgspec import Struct

from tests.simulation.disk import Disk
from tests.simulation.options import Options
from tests.simulation.oracle.face import Oracle
from tests.simulation.world import World
from zmqcluster.core.effects import AllowKey, Changes, DenyKey, Log, Publish, Send
from zmqcluster.core.events import (
    BacklogLoaded,
    Committed,
    DelayedLoaded,
    Event,
    LanesListed,
    MessageReceived,
    OpenTasksLoaded,
)
from zmqcluster.core.master import MasterCore
from zmqcluster.core.pipeline import Pipeline
from zmqcluster.core.settings import Settings
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import WorkerEvent, WorkerSettings
from zmqcluster.messages import (
    CancelTasks,
    Changed,
    Finished,
    Results,
    RetryTasks,
    Submit,
    Submitted,
    TaskResult,
)
from zmqcluster.model import TaskId

_READ: Final = (BacklogLoaded, Committed, DelayedLoaded, LanesListed, OpenTasksLoaded)
_COLUMNS: Final = 100


class Boot(Struct, frozen=True):
    """A master begins; whatever was not on disk is gone."""

    wall_ms: int


class Turned(Struct, frozen=True):
    """One turn of the loop, with what came from outside."""

    now_ms: int
    events: tuple[Event, ...]


class Landed(Struct, frozen=True):
    """The commit under way is on disk."""


MasterOp = Boot | Turned | Landed


class Woken(Struct, frozen=True):
    """A turn of a worker."""

    now_ms: int
    events: tuple[WorkerEvent, ...]


class WorkerTape(Struct):
    """One process of a worker, from its start."""

    settings: WorkerSettings
    chance: str
    kept: tuple[TaskResult, ...]
    turns: list[Woken] = []


def from_outside(events: Iterable[Event]) -> tuple[Event, ...]:
    """Without what the core itself asked for."""
    return tuple(
        MessageReceived(one.peer, one.principal, one.message)
        if isinstance(one, MessageReceived)
        else one
        for one in events
        if not isinstance(one, _READ)
    )


class Replay:
    """A master core, its pipeline and a disk, driven by hand, with the oracle looking on.

    Whoever sends a result is believed to have run that attempt, if it was given to him.
    """

    def __init__(self, settings: Settings) -> None:
        self.disk = Disk()
        self._settings = settings
        self._world = World(Options(0))
        self._oracle = Oracle(self._world, self.disk)
        self._boots = 0
        self._asked: dict[bytes, Submit | CancelTasks | RetryTasks] = {}

    def boot(self, wall_ms: int) -> None:
        self._boots += 1
        self._core = MasterCore(self._settings, self.disk.boot(wall_ms), Random(self._boots))
        self._pipeline = Pipeline()
        self._answers: list[Event] = []
        self._under_way: Changes | None = None
        self._is_landed = self._has_old = False
        self._oracle.master_started(self._core.state.epoch)

    def turn(self, now_ms: int, *events: Event) -> None:
        committed: list[Event] = []
        if self._is_landed:
            self._is_landed = False
            committed.append(Committed(self._pipeline.done(), prune_more=self._has_old))
            self._release()
        given = [*self._answers, *map(self._with_facts, events), *committed]
        self._answers = []
        turn = self._core.handle(now_ms, given)
        self._pipeline.add(turn)
        self._oracle.master_turned(self._core.state, is_due=True)
        self._oracle.turn_over(turn, self._core.state)
        batch = self._pipeline.begin()
        if batch is not None:
            self._under_way = batch
        else:
            self._release()

    def landed(self) -> None:
        if self._under_way is not None:
            batch, self._under_way = self._under_way, None
            self._oracle.committing(batch)
            self._has_old = self.disk.save(batch)
            self._is_landed = True

    def judge(self) -> None:
        """What was asked and answered so far, held against the disk."""
        self._oracle.judge_history()

    def play(self, ops: Iterable[MasterOp]) -> None:
        """All of it, and the verdict."""
        for op in ops:
            match op:
                case Boot(wall_ms):
                    self.boot(wall_ms)
                case Turned(now_ms, events):
                    self.turn(now_ms, *events)
                case Landed():
                    self.landed()
        self.judge()

    def _with_facts(self, event: Event) -> Event:
        if not isinstance(event, MessageReceived):
            return event
        message = event.message
        match message:
            case Results():
                self._oracle.ends_heard()
                for result in message.results:
                    self._believe(event.principal.device_id, result)
            case Submit() | CancelTasks() | RetryTasks():
                if message.request_id not in self._asked and isinstance(message, CancelTasks):
                    self._oracle.cancel_asked(message)
                is_new = self._asked.setdefault(message.request_id, message) is message
                if isinstance(message, RetryTasks) and is_new:
                    self._oracle.retry_asked(message)
                elif isinstance(message, Submit) and is_new:
                    self._oracle.submit_asked(message)
        facts = self.disk.facts(self._core, message)
        return MessageReceived(event.peer, event.principal, message, facts)

    def _believe(self, device_id: str, result: TaskResult) -> None:
        row = self.disk.assignments.get((TaskId(result.task_id), result.attempt))
        if row is not None and row.device_id == device_id:
            self._oracle.assume_ended(device_id, result)

    def _release(self) -> None:
        for action in self._pipeline.take():
            match action:
                case Send(_, message):
                    self._hear(message)
                case Publish() | AllowKey() | DenyKey() | Log():
                    pass
                case _:
                    answer = self.disk.read(action)
                    assert answer is not None, action
                    self._answers.append(answer)

    def _hear(self, message: object) -> None:
        match message:
            case Finished():
                for end in message.ends:
                    if end.state.is_terminal and TaskId(end.task_id) in self.disk.whole.tasks:
                        self._oracle.heard_end(end)
            case Submitted() | Changed():
                match self._asked.get(message.request_id), message:
                    case Submit() as asked, Submitted() as answer:
                        self._oracle.submitted(asked, answer)
                    case CancelTasks() as asked, Changed() as changed:
                        self._oracle.cancel_acked(asked, changed.task_ids)
                    case RetryTasks() as asked, Changed() as changed:
                        self._oracle.retry_answered(asked, changed.task_ids)


def replay_worker(tape: WorkerTape) -> None:
    """The same core, given the same; raises whatever it raised."""
    core = WorkerCore(tape.settings, Random(tape.chance), tape.kept)
    for turn in tape.turns:
        core.handle(turn.now_ms, *turn.events)
        core.next_ms(turn.now_ms)


# --- a test in plain words ----------------------------------------------------------------------


def master_test(name: str, why: str, settings: Settings, ops: Sequence[MasterOp]) -> str:
    """A pytest file that plays ops and fails as they do."""
    written = Written()
    lines = [f"master = Replay({written.words(settings)})"]
    for op in ops:
        match op:
            case Boot(wall_ms):
                lines.append(f"master.boot({wall_ms})")
            case Turned(now_ms, events):
                lines.append(written.call("master.turn", now_ms, *events))
            case Landed():
                lines.append("master.landed()")
    lines.append("master.judge()")
    written.imports.setdefault("tests.simulation.tape", set()).add("Replay")
    return written.file(name, why, lines)


def worker_test(name: str, why: str, tape: WorkerTape) -> str:
    """The same for a worker."""
    written = Written()
    kept = written.words(tape.kept)
    lines = [
        f"core = WorkerCore({written.words(tape.settings)}, Random({tape.chance!r}), {kept})",
        *(written.call("core.handle", one.now_ms, *one.events) for one in tape.turns),
    ]
    written.imports.setdefault("zmqcluster.core.worker", set()).add("WorkerCore")
    written.imports.setdefault("random", set()).add("Random")
    return written.file(name, why, lines)


class Written:
    """Values as source text, and what that text has to import."""

    def __init__(self) -> None:
        self.imports: dict[str, set[str]] = {}

    def words(self, value: Any) -> str:
        """An expression that makes this value again; fields as by default are left out."""
        match value:
            case Enum():
                return f"{self._named(type(value))}.{value.name}"
            case Struct():
                return f"{self._named(type(value))}({', '.join(self._fields(value))})"
            case tuple():
                inside = ", ".join(map(self.words, value))
                return f"({inside},)" if len(value) == 1 else f"({inside})"
            case list():
                return f"[{', '.join(map(self.words, value))}]"
            case dict():
                pairs = (f"{self.words(key)}: {self.words(one)}" for key, one in value.items())
                return f"{{{', '.join(pairs)}}}"
            case _:
                return repr(value)

    def call(self, name: str, *arguments: object) -> str:
        whole = f"{name}({', '.join(map(self.words, arguments))})"
        if len(whole) + 4 <= _COLUMNS:
            return whole
        inside = "".join(f"        {self.words(one)},\n" for one in arguments)
        return f"{name}(\n{inside}    )"

    def file(self, name: str, why: str, lines: Sequence[str]) -> str:
        imports = "".join(
            f"from {module} import {', '.join(sorted(names))}\n"
            for module, names in sorted(self.imports.items())
        )
        body = "\n    ".join(lines)
        return (
            f'"""{why}"""\n\nfrom __future__ import annotations\n\n{imports}\n\n'
            f"def test_{name}() -> None:\n    {body}\n"
        )

    def _fields(self, value: Struct) -> Iterable[str]:
        for field in msgspec.structs.fields(value):
            given = getattr(value, field.name)
            if field.default is not msgspec.NODEFAULT and given == field.default:
                continue
            if field.default_factory is not msgspec.NODEFAULT and given == field.default_factory():
                continue
            yield f"{field.name}={self.words(given)}"

    def _named(self, kind: type) -> str:
        self.imports.setdefault(kind.__module__, set()).add(kind.__name__)
        return kind.__name__
