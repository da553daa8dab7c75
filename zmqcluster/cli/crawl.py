"""The verb crawl: queue seeds as one job, and watch it to its end."""

from __future__ import annotations

import argparse
import ipaddress
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from zmqcluster.cli.call import DONE, FAILED, INTERRUPTED, Call, Verb, Words
from zmqcluster.cli.follow import Follower
from zmqcluster.cli.progress import Progress, display_for
from zmqcluster.cli.show import list_tasks
from zmqcluster.cli.tally import Tally
from zmqcluster.cli.times import bytes_text, count_text, duration_text
from zmqcluster.cli.values import duration, task_id, whole
from zmqcluster.config import ClusterConfig, shown
from zmqcluster.errors import ConfigError, MasterUnreachable, RequestRefused
from zmqcluster.model import CONCURRENCY_MAX, NAME_CHARS_MAX, SUBMIT_TASKS_MAX, JobState, TaskState
from zmqcluster.rest.schemas import JobView, RateBody, SubmittedView

if TYPE_CHECKING:
    from executors.urls import Target

LOOK_EVERY_S: Final = 1.0
# As many rate rules as one submission carries (messages.Submit).
RATES_MAX: Final = 256
FAILED_SHOWN: Final = 10
DEPTH_MAX: Final = 1000
DELAY_S_MAX: Final = 3600.0
SCOPES: Final = ("prefix", "host", "domain", "page")


class CrawlReport(Struct):
    """What --json prints at the end. codes: pages by status, or by why they were not fetched."""

    job: JobView
    seconds: float
    codes: dict[str, int]
    codes_complete: bool
    bytes: int


def crawl(call: Call) -> int:
    """Crawl, or follow a crawl begun earlier."""
    args = call.args
    if bool(args.urls) == (args.follow is not None):
        raise ConfigError("crawl", "give URLs to begin at, or a job to look at with --follow")
    if args.follow is not None:
        return _watch(call, args.follow)
    seeds = _seeds(call)
    job_id = _submit(call, seeds)
    call.out.note(f"Job {job_id}: crawling from {', '.join(seed.url for seed in seeds[:3])}")
    if args.detach:
        if call.out.as_json:
            call.out.data({"job_id": job_id})
        else:
            call.out.line(f"Job {job_id} runs. {_ways(job_id)}")
        return DONE
    return _watch(call, job_id)


# --- beginning -----------------------------------------------------------------------------------


def _seeds(call: Call) -> list[Target]:
    """The seeds in canonical form, each once. Raises ConfigError."""
    from executors.urls import BadUrl, canonical

    seeds: dict[Target, None] = {}
    for url in call.args.urls:
        try:
            seeds[canonical(url)] = None
        except BadUrl as error:
            raise ConfigError("URL", f"given {shown(url)}; {error}{_scheme_hint(url)}") from None
    for seed in seeds:
        require_contact(call.config, seed.host)
    if len(seeds) > SUBMIT_TASKS_MAX:
        raise ConfigError("URL", f"{len(seeds)} given; allowed: at most {SUBMIT_TASKS_MAX}")
    return list(seeds)


def _scheme_hint(url: str) -> str:
    return f"; did you mean https://{url[:100]}?" if url and "://" not in url else ""


def require_contact(config: ClusterConfig, host: str) -> None:
    """Whoever visits public sites says who answers for it. Raises ConfigError(contact).

    The worker checks the address it connects to; this only says so before anything is queued.
    """
    if config.contact or not _looks_public(host, config.egress_allow):
        return
    raise ConfigError(
        "contact",
        f"crawling {host} needs a contact for its owner, such as --contact you@example.org "
        "(give it to the workers, too, or set it in the config file)",
    )


def _looks_public(host: str, egress_allow: tuple[str, ...]) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        # A name may be of a network that was opened: the worker will know.
        return host != "localhost" and not host.endswith(".localhost") and not egress_allow
    return address.is_global


def _submit(call: Call, seeds: list[Target]) -> int:
    """Queue the seeds as one job; its number."""
    from executors.crawl import CrawlParams

    params = _params(call.args)
    for seed in seeds:
        data = {"url": seed.url, "scope_base": seed.url, **params}
        try:
            msgspec.convert(data, CrawlParams)
        except msgspec.ValidationError as error:
            raise ConfigError("crawl", str(error)) from None
    job_id = 0
    # A submission carries so many rates; no seed may come without the limit of its origin.
    for start in range(0, len(seeds), RATES_MAX):
        some = seeds[start : start + RATES_MAX]
        body = {
            "tasks": [_seed_task(seed, params) for seed in some],
            "rates": _rates(call, some),
            **({"job_id": job_id} if job_id else {"job_name": _job_name(seeds)}),
        }
        key = secrets.token_hex(16)
        job_id = call.api.ask("POST", "/tasks", SubmittedView, body, key=key).job_id
    return job_id


def _seed_task(seed: Target, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "task_type": "crawl",
        "task_data": {"url": seed.url, "scope_base": seed.url, **params},
        "unique_key": seed.url,
        "rate_key": seed.origin,
    }


def _params(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "scope": args.scope,
        "depth": args.depth,
        "delay_s": args.delay,
        "concurrency": args.concurrency,
    }
    return {name: value for name, value in given.items() if value is not None}


def _rates(call: Call, seeds: list[Target]) -> list[RateBody]:
    """Limits that hold from the first request on; workers repeat them as they learn more."""
    from executors.crawl import POLITE_CONCURRENCY, POLITE_DELAY_S

    rates: dict[str, RateBody] = {}
    for seed in seeds:
        public = _looks_public(seed.host, call.config.egress_allow)
        delay = POLITE_DELAY_S if public else None
        at_once = POLITE_CONCURRENCY if public else None
        delay = call.args.delay if call.args.delay is not None else delay
        at_once = call.args.concurrency if call.args.concurrency is not None else at_once
        if delay is not None or at_once is not None:
            rates[seed.origin] = RateBody(seed.origin, delay_s=delay, concurrency=at_once)
    return list(rates.values())


def _job_name(seeds: list[Target]) -> str:
    more = f" and {len(seeds) - 1} more" if len(seeds) > 1 else ""
    return "crawl " + seeds[0].url[: NAME_CHARS_MAX - len("crawl ") - len(more)] + more


# --- watching ------------------------------------------------------------------------------------


def _watch(call: Call, job_id: int) -> int:
    """Show progress to the end of the job, then what came of it."""
    follower = Follower(call)
    progress, tally = Progress(), Tally(job_id)
    progress.codes = tally.codes
    display = display_for(call.out)
    try:
        try:
            job = follower.job(job_id, _shower(call, progress, tally, display.show))
            complete = follower.patiently(lambda: tally.complete(call))
            display.show(progress)
        finally:
            display.close()
    except KeyboardInterrupt:
        call.out.note(f"Job {job_id} goes on without you. {_ways(job_id)}")
        return INTERRUPTED
    _report(call, job, progress, tally, complete)
    done = job.state == JobState.FINISHED and job.tasks.completed > 0
    return DONE if done else FAILED


def _shower(
    call: Call, progress: Progress, tally: Tally, show: Callable[[Progress], None]
) -> Callable[[float, JobView], None]:
    """Feeds each look at the job to the display, and now and then looks at single pages."""
    next_look_s = 0.0

    def on_look(now_s: float, view: JobView) -> None:
        nonlocal next_look_s
        progress.feed(now_s, view)
        if now_s >= next_look_s and view.state == JobState.ACTIVE:
            next_look_s = now_s + LOOK_EVERY_S
            _look_closer(call, progress, tally, view.job_id)
        show(progress)

    return on_look


def _look_closer(call: Call, progress: Progress, tally: Tally, job_id: int) -> None:
    # Decoration: the counts are there without it, and the next look at the job says what is wrong.
    try:
        tally.look(call)
        running = list_tasks(call, limit=3, job_id=job_id, state=TaskState.RUNNING.value)
        progress.current = [task.unique_key for task in running]
    except (MasterUnreachable, RequestRefused):
        progress.current = []


def _report(call: Call, job: JobView, progress: Progress, tally: Tally, complete: bool) -> None:
    if call.out.as_json:
        report = CrawlReport(job, progress.elapsed_s, dict(tally.codes), complete, tally.bytes)
        call.out.data(report)
        return
    out = call.out
    if tally.first:
        out.table(
            ("status", "links", "bytes", "title", "page"),
            (
                (line.status or line.skipped, line.links, line.bytes, line.title, line.url)
                for line in tally.first
            ),
            title=f"The first {len(tally.first)} pages",
        )
        out.line()
    if tally.codes:
        out.table(
            ("result", "pages"),
            sorted(tally.codes.items()),
            title="Pages by HTTP status" if complete else "Status of the first pages",
        )
        out.line()
    _report_failed(call, job)
    seconds = _job_seconds(job) or progress.elapsed_s
    tasks = job.tasks
    rate = f", {tasks.completed / seconds:.0f} a second" if seconds >= 1 else ""
    out.line(
        f"Job {job.job_id} is {job.state}: {count_text(tasks.completed, 'page')}, "
        f"{bytes_text(tally.bytes)}, {tasks.failed + tasks.dead} failed, "
        f"in {duration_text(seconds)}{rate}."
    )
    if not tasks.completed:
        return
    out.line(
        f"The data: table records (table_name 'pages', MessagePack in body) of "
        f"{call.config.data_dir}/cluster.db on the master's machine; "
        "one page: python main.py distribute task ID"
    )


def _report_failed(call: Call, job: JobView) -> None:
    if not job.tasks.failed + job.tasks.dead:
        return
    failed = [
        task
        for state in (TaskState.FAILED, TaskState.DEAD)
        for task in list_tasks(call, limit=FAILED_SHOWN, job_id=job.job_id, state=state.value)
    ]
    call.out.table(
        ("task", "state", "page", "error"),
        ((task.task_id, task.state, task.unique_key, task.error) for task in failed),
        title="Failed",
    )
    call.out.line()


def _job_seconds(job: JobView) -> float:
    return max(0, job.finished_wall - job.created_wall) / 1000 if job.finished_wall else 0.0


def _ways(job_id: int) -> str:
    return (
        f"To follow it: python main.py crawl --follow {job_id}; "
        f"to stop it: python main.py distribute cancel --job {job_id}"
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("urls", nargs="*", metavar="URL", help="where to begin")
    add(
        "--scope",
        choices=SCOPES,
        help="how far to go: below the URL's folder (prefix), its host,"
        " its domain, or this page alone; prefix unless told",
    )
    add(
        "--depth",
        type=whole(0, DEPTH_MAX),
        metavar="N",
        help="most links away from where it began (20)",
    )
    add(
        "--delay",
        type=duration(DELAY_S_MAX, zero=True),
        metavar="TIME",
        help="least time between two requests to a site, by the whole fleet (1 for public sites)",
    )
    add(
        "--concurrency",
        type=whole(0, CONCURRENCY_MAX),
        metavar="N",
        help="most requests to a site at once, by the"
        " whole fleet; 0: any number (4 for public sites)",
    )
    add("--detach", action="store_true", help="do not wait: print the job's number")
    add("--follow", type=task_id, metavar="JOB", help="watch a crawl begun earlier")


VERB: Final = Verb(
    "crawl",
    "fetch pages and follow their links",
    "crawl https://docs.example.org/ --contact you@example.org",
    crawl,
    _arguments,
    keys=("master_host", "master_port", "data_dir", "contact", "egress_allow"),
    words=Words("urls", str),
)
