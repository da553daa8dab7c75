"""Routes of jobs."""

from __future__ import annotations

import secrets

from litestar import get, post

from zmqcluster.messages import CancelTasks
from zmqcluster.rest.asking import QUERY, Asked, Master, PathInt, known_id, order, query_of
from zmqcluster.rest.backend import Reader
from zmqcluster.rest.problems import not_found
from zmqcluster.rest.rendering import changed_view, job_view
from zmqcluster.rest.schemas import ChangedView, JobPage, JobView, PageQuery


@get("/jobs", opt={QUERY: PageQuery})
async def list_jobs(request: Asked, backend: Master) -> JobPage:
    """List jobs, newest first, a page at a time."""
    query = query_of(request, PageQuery)
    return await backend.read(lambda reader: _page(reader, query))


@get("/jobs/{job_id:int}")
async def get_job(job_id: PathInt, backend: Master) -> JobView:
    """One job, with how many of its tasks are in each state."""
    return await backend.read(lambda reader: _job(reader, job_id))


@post("/jobs/{job_id:int}/cancel", status_code=200)
async def cancel_job(job_id: PathInt, backend: Master) -> ChangedView:
    """Cancel every open task of a job: none starts any more, and the counts tell the rest."""
    message = CancelTasks(secrets.token_bytes(16), job_id=known_id(job_id, "job"))
    return changed_view(await order(backend, message))


def _page(reader: Reader, query: PageQuery) -> JobPage:
    # One more than asked for tells whether there is a next page.
    rows = reader.list_jobs(query.cursor or None, query.limit + 1)
    more = len(rows) > query.limit
    rows = rows[: query.limit]
    return JobPage(
        jobs=[job_view(row) for row in rows], next_cursor=rows[-1].job_id if more else None
    )


def _job(reader: Reader, job_id: int) -> JobView:
    row = reader.job(known_id(job_id, "job"))
    if row is None:
        raise not_found(f"There is no job {job_id}.")
    return job_view(row)
