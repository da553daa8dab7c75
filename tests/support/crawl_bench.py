"""Runs crawl tasks without a cluster: the executor alone, with a queue like the master's."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from executors.context import ExecutorSettings, TaskContext
from executors.crawl import Crawl, CrawlParams
from executors.registry import Registry
from zmqcluster.messages import ProgressNote, RateRule, TaskSpec

LOOPBACK = ExecutorSettings(egress_allow=("127.0.0.0/8",))


class CrawlBench:
    """One executor host's worth of `crawl`. rules: what was reported at once, in order.

    is_paced: as if the master knew a limit of every origin. begun: how many tasks said they began.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self.settings = settings
        self.executor = Crawl()
        self.registry = Registry([self.executor])
        self.rules: list[RateRule] = []
        self.is_paced = True
        self.begun = 0
        self.context = self.new_context()

    def new_context(self, job_id: int = 1, timeout_ms: int = 10_000) -> TaskContext:
        def emit(note: ProgressNote | RateRule) -> None:
            if isinstance(note, RateRule):
                self.rules.append(note)

        self.context = TaskContext(
            1,
            task_type="crawl",
            job_id=job_id,
            timeout_ms=timeout_ms,
            settings=self.settings,
            check=self.registry.check,
            emit=emit,
            on_begun=self._count_begun if self.is_paced else None,
        )
        return self.context

    async def crawl(self, params: CrawlParams, job_id: int = 1) -> dict[str, Any]:
        """One task; its context stays in self.context."""
        return await self.executor.run(self.new_context(job_id), params)

    async def crawl_all(self, params: CrawlParams, job_id: int = 1) -> list[dict[str, Any]]:
        """A whole job, breadth first, each unique key once."""
        results = []
        waiting = deque([params])
        known = {params.url}
        while waiting:
            results.append(await self.crawl(waiting.popleft(), job_id))
            for child in self.context.children:
                if child.unique_key not in known:
                    known.add(child.unique_key)
                    waiting.append(self.params_of(child))
        return results

    def params_of(self, child: TaskSpec) -> CrawlParams:
        params = self.registry.decode(child.task_type, child.data)
        assert isinstance(params, CrawlParams)
        assert child.unique_key == params.url
        return params

    def _count_begun(self) -> None:
        self.begun += 1

    @property
    def children(self) -> list[str]:
        """Unique keys queued by the last task."""
        return [child.unique_key for child in self.context.children]

    @property
    def record(self) -> dict[str, Any]:
        """The one record of the last task, unpacked."""
        (record,) = self.context.records
        body = msgspec.msgpack.decode(record.body)
        assert isinstance(body, dict)
        assert (record.table, record.key) == ("pages", body["url"])
        return body


@contextlib.asynccontextmanager
async def crawl_bench(settings: ExecutorSettings = LOOPBACK) -> AsyncIterator[CrawlBench]:
    bench = CrawlBench(settings)
    await bench.executor.setup(settings)
    try:
        yield bench
    finally:
        await bench.executor.close()
