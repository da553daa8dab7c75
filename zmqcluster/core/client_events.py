"""What goes into ClientCore.handle() and what comes out of it."""

from __future__ import annotations

from msgspec import Struct

from zmqcluster.messages import ClientMessage, TaskEnd, ToClient
from zmqcluster.model import TaskId


class Ask(Struct, frozen=True):
    """Somebody wants an answer to this; its request_id is new."""

    message: ClientMessage


class Drop(Struct, frozen=True):
    """Nobody wants the answer to this request any more."""

    request_id: bytes


class Await(Struct, frozen=True):
    """Somebody waits for the ends of these tasks."""

    task_ids: tuple[TaskId, ...]


class Forget(Struct, frozen=True):
    """Nobody asks for the ends of these tasks any more."""

    task_ids: tuple[TaskId, ...]


class LinkUp(Struct, frozen=True):
    """A connection to the master stands."""


class LinkDown(Struct, frozen=True):
    """The connection is gone; the transport tries again by itself."""


class FromMaster(Struct, frozen=True):
    """A decoded message of the dispatch socket."""

    message: ToClient


ClientEvent = Ask | Drop | Await | Forget | LinkUp | LinkDown | FromMaster

# --- effects, to be carried out in order --------------------------------------------------------


class SendToMaster(Struct, frozen=True):
    """Hand this to the dispatch socket without waiting. Losing it costs time, never truth."""

    message: ClientMessage


class Answered(Struct, frozen=True):
    """The answer to a request, or the master's refusal."""

    request_id: bytes
    answer: ToClient


class Unanswered(Struct, frozen=True):
    """Nobody answered for ANSWER_MS: whether the request was carried out is unknown."""

    request_id: bytes


class Ended(Struct, frozen=True):
    """A task that was submitted or awaited here has ended; told once."""

    end: TaskEnd


ClientEffect = SendToMaster | Answered | Unanswered | Ended
