"""Waiting for tasks and jobs to end, through restarts of the master."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from zmqcluster.cli.call import Call
from zmqcluster.cli.http import NOT_NOW
from zmqcluster.cli.show import list_tasks
from zmqcluster.errors import MasterUnreachable, RequestRefused
from zmqcluster.model import JobState, TaskState
from zmqcluster.rest.schemas import JobView, TaskDetailView
from zmqcluster.runtime.clock import Clock, SystemClock
from zmqcluster.views import ExplainView

T = TypeVar("T")

# A master being restarted by hand is back within this time; longer, and somebody should know.
PATIENCE_S: Final = 600.0
POLL_FIRST_S: Final = 0.05
POLL_MOST_S: Final = 0.5
PAUSE_S: Final = 1.0
# Nothing runs and nothing ends for this long: say why, once.
STUCK_S: Final = 5.0


class Follower:
    """Asks again and again. clock, sleep: for tests."""

    def __init__(
        self,
        call: Call,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.call = call
        self.clock = clock or SystemClock()
        self._sleep = sleep

    def now_s(self) -> float:
        return self.clock.monotonic_ms() / 1000

    def patiently(self, question: Callable[[], T]) -> T:
        """The answer, waiting out a master that is away or busy for up to PATIENCE_S."""
        away_since: float | None = None
        while True:
            try:
                answer = question()
            except (MasterUnreachable, RequestRefused) as error:
                if isinstance(error, RequestRefused) and error.code not in NOT_NOW:
                    raise
                now = self.now_s()
                if away_since is None:
                    away_since = now
                    self.call.out.note("The master does not answer; waiting for it to come back.")
                if now - away_since > PATIENCE_S:
                    raise
                self._sleep(PAUSE_S)
            else:
                if away_since is not None:
                    self.call.out.note("The master is back.")
                return answer

    def job(self, job_id: int, show: Callable[[float, JobView], None]) -> JobView:
        """Follow a job to its end. show: called with the time and the job at each look."""
        pause = POLL_FIRST_S
        stuck = _Stuck(self)
        while True:
            view = self.patiently(lambda: self.call.api.get(f"/jobs/{job_id}", JobView))
            now = self.now_s()
            show(now, view)
            if view.state != JobState.ACTIVE:
                return view
            stuck.look(now, view)
            self._sleep(pause)
            pause = min(pause * 2, POLL_MOST_S)

    def task(self, task_id: int) -> TaskDetailView:
        """Follow one task to its end."""
        pause = POLL_FIRST_S
        while True:
            view = self.patiently(lambda: self.call.api.get(f"/tasks/{task_id}", TaskDetailView))
            if TaskState(view.state).is_terminal:
                return view
            self._sleep(pause)
            pause = min(pause * 1.5, POLL_MOST_S)


class _Stuck:
    """Notices a job in which nothing moves, and asks the master why, once."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._ended = -1
        self._since_s = 0.0
        self._told = False

    def look(self, now_s: float, view: JobView) -> None:
        tasks = view.tasks
        ended = tasks.completed + tasks.failed + tasks.cancelled + tasks.dead
        if ended != self._ended or tasks.running:
            self._ended, self._since_s = ended, now_s
        elif now_s - self._since_s > STUCK_S and not self._told:
            self._told = True
            self._tell(view.job_id)

    def _tell(self, job_id: int) -> None:
        for reason in self._follower.patiently(lambda: self._reasons(job_id)):
            self._follower.call.out.note(f"Nothing runs now: {reason}")

    def _reasons(self, job_id: int) -> list[str]:
        call = self._follower.call
        waiting = list_tasks(call, limit=1, job_id=job_id, state=TaskState.PENDING.value)
        if not waiting:
            return []
        path = f"/tasks/{waiting[0].task_id}/explain"
        return call.api.get(path, ExplainView).reasons[:3]
