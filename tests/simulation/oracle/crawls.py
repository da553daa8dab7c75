"""What a crawl came to: its site, each page once."""

from __future__ import annotations

import msgpack  # type: ignore[import-untyped]  # ships no types

from tests.simulation.oracle.room import Room, story
from tests.simulation.workload import links_of, url_of
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import JobId, TaskState


class Crawls(Room):
    """Of all jobs."""

    def judge_sites(self) -> None:
        """In each crawl: what completed pages link to, once each, and nothing else."""
        options = self.world.options
        crawls: dict[JobId, dict[int, TaskRow]] = {}
        for row in self.disk.tasks.values():
            if row.task_type == "page":
                page = msgpack.unpackb(row.task_data)["page"]
                if crawls.setdefault(row.job_id, {}).setdefault(page, row) is not row:
                    self.fail(f"page {page} is twice in job {row.job_id}")
        for job_id, rows in crawls.items():
            reached = {0}
            for page, row in rows.items():
                if row.state is TaskState.COMPLETED:
                    reached.update(links_of(page, options))
            if reached != set(rows):
                self.fail(f"job {job_id} has pages {sorted(rows)}, linked are {sorted(reached)}")
            for page, row in rows.items():
                has_record = ("pages", f"{job_id} {page}") in self.disk.records
                if has_record != (row.state is TaskState.COMPLETED):
                    self.fail(f"{story(row)}: {url_of(page, options)} has a record: {has_record}")
