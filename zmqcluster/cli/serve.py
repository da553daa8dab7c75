"""The verbs that are the cluster: master, worker, standalone. They run until told to stop."""

from __future__ import annotations

from typing import Final

from zmqcluster.cli.call import Call, Verb
from zmqcluster.config import KEYS
from zmqcluster.model import SchedulerMode
from zmqcluster.runtime.logs import logging_to


def serve(call: Call) -> int:
    """Be what the config's mode says, in this thread, until a signal. Its exit code."""
    with logging_to(call.out.stderr, call.config.log_level):
        # Here, not above: only these verbs need sockets, database and web server loaded.
        from zmqcluster.services import run

        return run(call.config)


def keys_of(mode: SchedulerMode) -> tuple[str, ...]:
    """The config keys that mean something to a process of this mode."""
    return tuple(key.name for key in KEYS if mode in key.used_by and key.name != "mode")


def _verb(mode: SchedulerMode, help: str, example: str) -> Verb:
    return Verb(
        mode.value, help, example, serve, keys=keys_of(mode), prints_data=False, talks=False
    )


VERBS: Final[tuple[Verb, ...]] = (
    _verb(SchedulerMode.MASTER, "queue and hand out tasks", "master --bind 0.0.0.0"),
    _verb(
        SchedulerMode.WORKER,
        "run tasks for a master",
        "worker --master-host m1.example.org --join-token ck1.AbC…",
    ),
    _verb(
        SchedulerMode.STANDALONE,
        "master and worker in one",
        "standalone --egress-allow 127.0.0.0/8",
    ),
)
