"""Verbs that change something: cancel, retry, drain, resume, token."""

from __future__ import annotations

import argparse
import socket
from typing import Final

from msgspec import Struct

from zmqcluster.cli.call import DONE, FAILED, Call, Verb, Words
from zmqcluster.cli.show import list_tasks
from zmqcluster.cli.times import count_text, wall_text
from zmqcluster.cli.values import device_id, duration, host, task_id, token_id, whole
from zmqcluster.config import DEFAULTS
from zmqcluster.errors import ConfigError, RequestRefused
from zmqcluster.model import RefusalCode, Role
from zmqcluster.rest.schemas import (
    TOKEN_TTL_S_MAX,
    TOKEN_USES_MAX,
    ChangedView,
    DoneView,
    IssuedTokenView,
    JobView,
    TokenBody,
    TokenList,
    UntouchedView,
)

RETRY_TASKS_MAX: Final = 10_000
TOKEN_TTL_S: Final = 24 * 3600.0


class ActedView(Struct):
    """What a command changed, over all its requests."""

    task_ids: list[int]
    untouched: list[UntouchedView]


def cancel(call: Call) -> int:
    """Cancel tasks, or every open task of a job."""
    args = call.args
    if bool(args.ids) == (args.job is not None):
        raise ConfigError("cancel", "name tasks, or one job with --job; not both")
    if args.job is not None:
        return _cancel_job(call, args.job)
    return _told(call, args.ids, "cancel", "cancelled")


def _cancel_job(call: Call, job_id: int) -> int:
    """The master takes the open tasks of a job in steps, so its answer names none of them."""
    call.api.ask("POST", f"/jobs/{job_id}/cancel", ChangedView)
    job = call.api.get(f"/jobs/{job_id}", JobView)
    if call.out.as_json:
        call.out.data(job)
    else:
        left = job.tasks.pending + job.tasks.running
        rest = f", {left} still to go" if left else ""
        call.out.line(f"Job {job_id} is {job.state}: {job.tasks.cancelled} cancelled{rest}.")
    return DONE


def retry(call: Call) -> int:
    """Put tasks back into the queue."""
    args = call.args
    if args.job is not None and args.status is None:
        raise ConfigError("--job", "goes with --status; it says which tasks of that state")
    if bool(args.ids) == (args.status is not None):
        raise ConfigError("retry", "name tasks, or all of a state with --status; not both")
    numbers = args.ids
    if args.status is not None:
        found = list_tasks(call, limit=RETRY_TASKS_MAX, state=args.status, job_id=args.job)
        numbers = [each.task_id for each in found]
    code = _told(call, numbers, "retry", "queued again")
    if len(numbers) == RETRY_TASKS_MAX and args.status is not None:
        call.out.note(f"At most {RETRY_TASKS_MAX} at once; there may be more: run it again.")
    return code


def _told(call: Call, numbers: list[int], verb: str, word: str) -> int:
    """Do it to each task and say what changed; failed when something named did not."""
    acted = ActedView([], [])
    for number in numbers:
        try:
            changed = call.api.ask("POST", f"/tasks/{number}/{verb}", ChangedView)
        except RequestRefused as error:
            # One that cannot be changed is no reason to leave the others, or what was done, untold.
            if error.code not in (RefusalCode.NOT_FOUND, RefusalCode.CONFLICT):
                raise
            acted.untouched.append(UntouchedView(number, error.problem))
            continue
        acted.task_ids += changed.task_ids
    if call.out.as_json:
        call.out.data(acted)
    else:
        call.out.line(f"{len(acted.task_ids)} {word}.")
        for each in acted.untouched:
            call.out.line(each.why)
    return FAILED if acted.untouched else DONE


def drain(call: Call) -> int:
    """Give a device nothing new."""
    return _device(call, "POST", "/drain", "gets nothing new; what it runs, it finishes")


def resume(call: Call) -> int:
    """Give a drained device work again."""
    return _device(call, "POST", "/resume", "gets work again")


def revoke(call: Call) -> int:
    """Shut a device out."""
    return _device(call, "DELETE", "", "is shut out; its tasks go elsewhere")


def _device(call: Call, method: str, end: str, told: str) -> int:
    call.api.ask(method, f"/devices/{call.args.id}{end}", DoneView)
    if call.out.as_json:
        call.out.data({"device_id": call.args.id, "done": True})
    else:
        call.out.line(f"Device {call.args.id} {told}.")
    return DONE


def token_create(call: Call) -> int:
    """Make a join token, and print the command that uses it."""
    args = call.args
    body = TokenBody(role=args.role, uses=args.uses, ttl_s=args.ttl, host=args.advertise or "")
    issued = call.api.ask("POST", "/tokens", IssuedTokenView, body)
    if call.out.as_json:
        call.out.data(issued)
        return DONE
    call.out.note(
        f"Token {issued.token_id}: {count_text(issued.uses, 'machine')} may join until "
        f"{wall_text(issued.expires_wall)}. It is shown this once. On the other machine:"
    )
    call.out.line(" ".join(_join_command(call, issued)))
    return DONE


def _join_command(call: Call, issued: IssuedTokenView) -> list[str]:
    """The token knows the ports, and the host when it was told one; else we guess."""
    words = ["python", "main.py", "distribute", "worker"]
    if not call.args.advertise:
        host = call.config.master_host
        if host == DEFAULTS.master_host or host.startswith("127.") or host == "::1":
            host = socket.gethostname()
        call.out.note(f"(Change {host} if the other machine knows this one by another name.)")
        words += ["--master-host", host]
    return [*words, "--join-token", issued.token]


def token_list(call: Call) -> int:
    """List join tokens."""
    found = call.api.get("/tokens", TokenList)
    if call.out.as_json:
        call.out.data(found.tokens)
        return DONE
    call.out.table(
        ("token", "role", "uses left", "created", "expires", "revoked"),
        (
            (
                each.token_id,
                each.role,
                each.uses_left,
                wall_text(each.created_wall),
                wall_text(each.expires_wall),
                wall_text(each.revoked_wall),
            )
            for each in found.tokens
        ),
    )
    return DONE


def token_revoke(call: Call) -> int:
    """Let nobody join with a token from now on."""
    call.api.ask("DELETE", f"/tokens/{call.args.id}", DoneView)
    if call.out.as_json:
        call.out.data({"token_id": call.args.id, "done": True})
    else:
        call.out.line(f"Nobody joins with token {call.args.id} from now on.")
    return DONE


def _some_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", type=task_id, nargs="*", metavar="ID", help="numbers of tasks")


def _cancel_arguments(parser: argparse.ArgumentParser) -> None:
    _some_tasks(parser)
    parser.add_argument("--job", type=task_id, metavar="JOB", help="every open task of this job")


def _retry_arguments(parser: argparse.ArgumentParser) -> None:
    _some_tasks(parser)
    states = ["failed", "dead", "cancelled"]
    parser.add_argument("--status", choices=states, help="every task in this state")
    parser.add_argument("--job", type=task_id, metavar="JOB", help="with --status: of this job")


def _one_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=device_id, metavar="DEVICE", help="its device id")


def _create_arguments(parser: argparse.ArgumentParser) -> None:
    roles = [str(Role.WORKER), str(Role.CLIENT)]
    parser.add_argument("--role", choices=roles, default=roles[0], help="what joins (worker)")
    parser.add_argument(
        "--uses",
        type=whole(1, TOKEN_USES_MAX),
        default=1,
        metavar="N",
        help="how many machines may join (1)",
    )
    parser.add_argument(
        "--ttl",
        type=duration(TOKEN_TTL_S_MAX),
        default=TOKEN_TTL_S,
        metavar="TIME",
        help="good for so long (24h)",
    )
    parser.add_argument(
        "--advertise",
        type=host,
        metavar="HOST",
        help="name or address at which others reach the master",
    )


def _one_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=token_id, metavar="TOKEN", help="its id, as the list shows it")


_IDS: Final = Words("ids", task_id)

VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "cancel", "cancel tasks or a job", "cancel --job 3", cancel, _cancel_arguments, words=_IDS
    ),
    Verb(
        "retry",
        "queue tasks again",
        "retry --status failed --job 3",
        retry,
        _retry_arguments,
        words=_IDS,
    ),
    Verb("drain", "give a device nothing new", "drain worker-7", drain, _one_device),
    Verb("resume", "give a drained device work again", "resume worker-7", resume, _one_device),
    Verb("revoke", "shut a device out for good", "revoke worker-7", revoke, _one_device),
)
TOKEN_VERBS: Final[tuple[Verb, ...]] = (
    Verb("create", "make a join token", "token create --uses 5", token_create, _create_arguments),
    Verb("list", "list join tokens", "token list", token_list),
    Verb("revoke", "make a join token useless", "token revoke 4f2a", token_revoke, _one_token),
)
