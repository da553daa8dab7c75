"""What becomes of the tasks of a host that died: who is blamed, who is given back.

A death counts against a task only when it is certain that it was this task's: it ran alone in its
host. When an asyncio host dies with several running, all of them are *suspects*: they are given
back to the master without blame, and if one comes here again, it runs alone in a host of its own.
So a poisonous task kills the others' host at most once a worker, then it is found out, and its
company is never blamed. SUSPICIONS_MAX is the backstop for a task that kills in a way that no host
of its own contains.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from executors.outcome import one_line, returned
from executors.packing import pack
from zmqcluster.messages import TaskOrder, TaskResult
from zmqcluster.model import RESULT_BYTES_MAX, Outcome
from zmqcluster.runtime.hosts_link import Entry, HostLink

SUSPICIONS_MAX: Final = 3
SUSPECTS_MAX: Final = 10_000


class Suspects:
    """Tasks that were there when a host died, by id; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, task_id: int) -> bool:
        return task_id in self._seen

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, task_id: int) -> int:
        """One more death beside this task; how many that makes."""
        seen = self._seen.pop(task_id, 0) + 1
        self._seen[task_id] = seen
        if len(self._seen) > SUSPECTS_MAX:
            self._seen.popitem(last=False)
        return seen

    def clear(self, task_id: int) -> None:
        """It ran and its host lived, or its guilt is told."""
        self._seen.pop(task_id, None)


def after_death(
    link: HostLink, status: int, problem: str, suspects: Suspects
) -> tuple[list[TaskResult], bool]:
    """Results for everything that still ran in a dead host, and whether it died unprovoked.

    status: exit code, or the negative signal. problem: why it never came to life.
    """
    why = problem or link.why_killed or f"it {describe_exit(status)}"
    if link.is_shown and (place := link.output.standing_in()):
        why += f"; it stood in {place}"
    ended = [entry for entry in link.running.values() if _has_own_end(entry, link)]
    others = [entry for entry in link.running.values() if not _has_own_end(entry, link)]
    results = [killed(entry, link, status) for entry in ended]
    is_unprovoked = not ended and not link.is_retiring
    if not link.is_ready:
        results += [returned(entry.order, f"its host did not start: {why}") for entry in others]
    elif not is_unprovoked and not link.was_silent:
        results += [returned(entry.order, "its host was stopped") for entry in others]
    elif len(others) == 1 and not ended and not link.has_company:
        suspects.clear(others[0].order.task_id)
        results.append(died(others[0].order, link, status, why))
    else:
        results += suspected(others, link, status, why, suspects)
    return results, is_unprovoked


def _has_own_end(entry: Entry, link: HostLink) -> bool:
    """Was it ended, and by what it did itself? A deadline that passed while the loop stood still
    may have been missed because of somebody else in it."""
    is_doubtful = link.was_silent and len(link.running) > 1
    return entry.ending is not None and not (is_doubtful and entry.ending is Outcome.TIMED_OUT)


def suspected(
    entries: Sequence[Entry], link: HostLink, status: int, why: str, suspects: Suspects
) -> list[TaskResult]:
    """Nobody knows which of these did it."""
    results = []
    for entry in entries:
        if suspects.add(entry.order.task_id) >= SUSPICIONS_MAX:
            suspects.clear(entry.order.task_id)
            results.append(died(entry.order, link, status, why))
        else:
            text = f"its {link.kind} host died with {len(entries)} tasks in it: {why}"
            results.append(returned(entry.order, text))
    return results


def died(order: TaskOrder, link: HostLink, status: int, why: str) -> TaskResult:
    """The task killed its host. The result is the evidence, one MessagePack map."""
    last = "" if link.is_shown else link.output.last_line()
    text = f"the host process died under this task: {why}" + (
        f"; last output: {last}" if last else ""
    )
    return TaskResult(
        order.task_id,
        order.attempt,
        Outcome.DIED,
        result=evidence(link, status),
        error=one_line(text),
    )


def killed(entry: Entry, link: HostLink, status: int) -> TaskResult:
    """The task was ended by us together with its host."""
    assert entry.ending is not None
    order, outcome = entry.order, entry.ending
    if outcome is not Outcome.TIMED_OUT:
        return TaskResult(order.task_id, order.attempt, outcome)
    return TaskResult(
        order.task_id,
        order.attempt,
        outcome,
        result=evidence(link, status),
        error=timeout_text(order, "its host process was killed"),
    )


def as_ended(entry: Entry, result: TaskResult) -> TaskResult:
    """What a result means that arrived after the task was told to end."""
    assert entry.ending is not None
    if entry.ending is Outcome.TIMED_OUT and result.outcome is Outcome.COMPLETED:
        return result  # it just made it
    error = ""
    if entry.ending is Outcome.TIMED_OUT:
        error = timeout_text(entry.order, "it was cancelled")
    return TaskResult(
        result.task_id,
        result.attempt,
        entry.ending,
        error=error,
        run_us=result.run_us,
        rates=result.rates,
    )


def timeout_text(order: TaskOrder, what_was_done: str) -> str:
    return f"ran longer than its {order.timeout_ms / 1000:g} s; {what_was_done}"


def evidence(link: HostLink, status: int) -> bytes:
    """What is known about the end of a host, for people: one MessagePack map."""
    facts = {
        "host": str(link.kind),
        "pid": link.pid,
        "exit": describe_exit(status),
        "tasks_before": link.tasks_done,
        "output": link.output.text(),
    }
    return pack(facts, RESULT_BYTES_MAX, "evidence")


def describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
