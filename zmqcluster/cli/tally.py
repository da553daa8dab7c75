"""Counting what pages of a crawl came back as, a bounded number of questions at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from msgspec import Struct, field

from zmqcluster.cli.call import Call
from zmqcluster.model import TaskState
from zmqcluster.rest.schemas import LIST_MAX, TaskDetailView, TaskPage

# Above this the table at the end is made of a sample, and says so.
PAGES_MAX: Final = 5_000
PAGES_SHOWN: Final = 10
# While a crawl runs, a look costs the master this many small questions.
LOOK_PAGES: Final = 8


class PageLine(Struct):
    """What one crawl task found."""

    url: str
    status: int
    skipped: str = ""
    title: str = ""
    bytes: int = 0
    links: int = 0


class Tally(Struct):
    """Status codes of pages seen so far. Each task is counted once."""

    job_id: int
    codes: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    first: list[PageLine] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    _cursor: int = 0

    def look(self, call: Call) -> None:
        """Count a few more, oldest first."""
        page = self._page(call, self._cursor, LOOK_PAGES)
        self._take(call, page)
        if page.tasks:
            self._cursor = page.tasks[-1].task_id

    def complete(self, call: Call) -> bool:
        """Count all that is left; False when there were more than PAGES_MAX."""
        cursor = 0
        while len(self.seen) < PAGES_MAX:
            page = self._page(call, cursor, LIST_MAX)
            self._take(call, page)
            if not page.tasks or page.next_cursor is None:
                return True
            cursor = page.tasks[-1].task_id
        return False

    def _page(self, call: Call, cursor: int, limit: int) -> TaskPage:
        query = {
            "job_id": self.job_id,
            "task_type": "crawl",
            "state": TaskState.COMPLETED.value,
            "order": "oldest",
            "cursor": cursor,
            "limit": limit,
        }
        return call.api.get("/tasks", TaskPage, query)

    def _take(self, call: Call, page: TaskPage) -> None:
        for task in page.tasks:
            if task.task_id in self.seen or len(self.seen) >= PAGES_MAX:
                continue
            detail = call.api.get(f"/tasks/{task.task_id}", TaskDetailView)
            self.seen.add(task.task_id)
            line = page_line(detail.result, task.unique_key)
            self.codes[code_of(line)] += 1
            self.bytes += line.bytes
            if len(self.first) < PAGES_SHOWN:
                self.first.append(line)


def code_of(line: PageLine) -> str:
    """How a page is counted: its status, or why it was never asked for."""
    return str(line.status) if line.status else line.skipped or "none"


def page_line(result: Any, url: str) -> PageLine:
    """A crawl result as a line; a result of another shape is a line without facts."""
    row: dict[str, Any] = result if isinstance(result, dict) else {}
    return PageLine(
        url=str(row.get("url", url)),
        status=_number(row, "status"),
        skipped=str(row.get("skipped") or ""),
        title=str(row.get("title") or ""),
        bytes=_number(row, "bytes"),
        links=_number(row, "links"),
    )


def _number(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) else 0
