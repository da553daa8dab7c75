"""Which URLs of a job were handed to this process: they are in its queue already, for certain."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from zmqcluster.model import NO_JOB

URLS_MAX: Final = 200_000


class Visited:
    """URLs whose own crawl task ran here, by job; the oldest jobs go first when it is full.

    A task that was handed out is on the master's disk under its URL, so a link to it need not be
    sent again. Nothing may be added for any other reason: children of an attempt whose result the
    master refused are not queued, and leaving them out later would lose them.
    """

    def __init__(self, urls_max: int = URLS_MAX) -> None:
        self._urls_max = urls_max
        self._jobs: OrderedDict[int, set[str]] = OrderedDict()
        self._count = 0

    def add(self, job_id: int, url: str) -> None:
        """The task of this URL runs here. Tasks without a job have no common queue: forgotten."""
        if job_id == NO_JOB:
            return
        urls = self._jobs.setdefault(job_id, set())
        self._jobs.move_to_end(job_id)
        self._count += url not in urls
        urls.add(url)
        while self._count > self._urls_max:
            _, oldest = self._jobs.popitem(last=False)
            self._count -= len(oldest)

    def of(self, job_id: int) -> frozenset[str] | set[str]:
        """The URLs of a job, to look up in, not to change."""
        return self._jobs.get(job_id, frozenset())
