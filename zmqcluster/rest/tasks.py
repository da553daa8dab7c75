"""Routes of tasks."""

from __future__ import annotations

import asyncio
import secrets
from typing import Final

from litestar import Response, get, post

from storage.task_listing import TaskFilter
from zmqcluster.errors import LocalProtocolError
from zmqcluster.messages import (
    AskExplain,
    CancelTasks,
    ClientMessage,
    RetryTasks,
    Submit,
    Submitted,
)
from zmqcluster.rest.asking import (
    BODY,
    HEADER,
    QUERY,
    Asked,
    Master,
    PathInt,
    Shapes,
    ask,
    known_id,
    order,
    query_of,
)
from zmqcluster.rest.backend import Backend, Reader
from zmqcluster.rest.bodies import IDEMPOTENCY_KEY_CHARS_MAX, request_id_of, submission
from zmqcluster.rest.problems import conflict, not_found
from zmqcluster.rest.rendering import (
    changed_view,
    event_view,
    json_value,
    task_detail_view,
    task_view,
)
from zmqcluster.rest.schemas import (
    BatchBody,
    ChangedView,
    EventList,
    SubmittedView,
    TaskBody,
    TaskDetailView,
    TaskList,
    TaskPage,
    TaskQuery,
)
from zmqcluster.views import ExplainView, TaskCounts

# A body above this (about 500 tasks, 1 ms) is decoded beside the loop, which others wait for.
BESIDE_LOOP_BYTES: Final = 64 * 1024
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
_KEY_SCHEMA: Final = {
    "type": "string",
    "minLength": 1,
    "maxLength": IDEMPOTENCY_KEY_CHARS_MAX,
    "pattern": "^[!-~]([ -~]*[!-~])?$",
}
# The storage looks at 20,000 tasks a time; a filter that fits few gets this many tries a page.
LOOKS_MAX: Final = 10


@get("/tasks", opt={QUERY: TaskQuery})
async def list_tasks(request: Asked, backend: Master) -> TaskPage:
    """List tasks, newest first, a page at a time."""
    query = query_of(request, TaskQuery)
    return await backend.read(lambda reader: _page(reader, query))


@post(
    "/tasks",
    opt={BODY: Shapes((TaskBody, TaskList, BatchBody)), HEADER: {IDEMPOTENCY_KEY: _KEY_SCHEMA}},
)
async def submit_tasks(request: Asked, backend: Master) -> Response[SubmittedView]:
    """Queue one task, a list of tasks, or a batch with a job; all of them or none.

    Send an Idempotency-Key to be able to ask again safely: the same key gets the same answer.
    """
    body = await request.body()
    request_id = request_id_of(request.headers.get(IDEMPOTENCY_KEY), secrets.token_bytes)
    message = await _submission(body, request_id, backend)
    reply = await backend.request(message)
    if not isinstance(reply, Submitted):
        raise LocalProtocolError(f"Submit was answered by {type(reply).__name__}")
    view = SubmittedView(job_id=reply.job_id, task_ids=reply.task_ids, existing=reply.existing)
    only_one = len(reply.task_ids) == 1
    headers = {"Location": f"{request.url.path}/{reply.task_ids[0]}"} if only_one else None
    return Response(view, status_code=201, headers=headers)


@get("/tasks/stats")
async def task_stats(backend: Master) -> TaskCounts:
    """How many tasks are in each state, since the database began."""
    return await backend.read(lambda reader: reader.counts())


@get("/tasks/{task_id:int}")
async def get_task(task_id: PathInt, backend: Master) -> TaskDetailView:
    """One task, whole: data, result and the latest attempts."""
    return await backend.read(lambda reader: _detail(reader, task_id))


@get("/tasks/{task_id:int}/events")
async def task_events(task_id: PathInt, backend: Master) -> EventList:
    """What happened to a task, oldest first."""
    return await backend.read(lambda reader: _events(reader, task_id))


@get("/tasks/{task_id:int}/explain")
async def explain_task(task_id: PathInt, backend: Master) -> ExplainView:
    """Why a task is where it is, most telling reason first."""
    message = AskExplain(secrets.token_bytes(16), known_id(task_id, "task"))
    return await ask(backend, message, ExplainView)


@post("/tasks/{task_id:int}/cancel", status_code=200)
async def cancel_task(task_id: PathInt, backend: Master) -> ChangedView:
    """Cancel a task: no new attempt starts, and it is never completed."""
    task_ids = (known_id(task_id, "task"),)
    return await _change_one(backend, CancelTasks(secrets.token_bytes(16), task_ids), task_id)


@post("/tasks/{task_id:int}/retry", status_code=200)
async def retry_task(task_id: PathInt, backend: Master) -> ChangedView:
    """Put a failed, dead or cancelled task back into the queue, with its counts at zero."""
    task_ids = (known_id(task_id, "task"),)
    return await _change_one(backend, RetryTasks(secrets.token_bytes(16), task_ids), task_id)


async def _submission(body: bytes, request_id: bytes, backend: Backend) -> Submit:
    if len(body) <= BESIDE_LOOP_BYTES:
        return submission(body, request_id, backend.check)
    return await asyncio.to_thread(submission, body, request_id, backend.check)


async def _change_one(backend: Backend, message: ClientMessage, task_id: int) -> ChangedView:
    """Raises Problem when the task was left as it was: 404 or 409."""
    changed = await order(backend, message)
    for untouched in changed.untouched:
        if not await backend.read(lambda reader: reader.tasks_by_id([task_id])):
            raise not_found(f"There is no task {task_id}.")
        raise conflict(f"Task {task_id} is left as it is: {untouched.why}.")
    return changed_view(changed)


def _page(reader: Reader, query: TaskQuery) -> TaskPage:
    """One page; pages the storage leaves empty are skipped, within bounds."""
    wanted = TaskFilter(
        states=(query.state,) if query.state else (),
        task_type=query.task_type,
        job_id=query.job_id,
        device_id=query.device_id,
        rate_key=query.rate_key,
    )
    newest_first = query.order == "newest"
    cursor = query.cursor
    for _ in range(LOOKS_MAX):
        page = reader.list_tasks(
            wanted, cursor=cursor, limit=query.limit, newest_first=newest_first
        )
        cursor = page.next_cursor
        if page.rows or cursor is None:
            break
    return TaskPage(tasks=[task_view(row) for row in page.rows], next_cursor=cursor)


def _detail(reader: Reader, task_id: int) -> TaskDetailView:
    detail = reader.task_detail(known_id(task_id, "task"))
    if detail is None:
        raise not_found(f"There is no task {task_id}.")
    task = detail.task
    return task_detail_view(
        task, detail.attempts, json_value(task.task_data), json_value(task.result)
    )


def _events(reader: Reader, task_id: int) -> EventList:
    detail = reader.task_detail(known_id(task_id, "task"))
    if detail is None:
        raise not_found(f"There is no task {task_id}.")
    return EventList(events=[event_view(each) for each in detail.events])
