"""Everything a master process is made of, in the order in which it must come up."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import socket
from contextlib import ExitStack
from typing import Final

from msgspec import structs
from sqlite_utils import Database

from executors.registry import Registry
from storage import database, recovery, writer
from storage.queries import Queries
from zmqcluster import __version__
from zmqcluster.config import ClusterConfig
from zmqcluster.core.admin import principal_of
from zmqcluster.core.effects import Changes
from zmqcluster.core.events import Principal
from zmqcluster.core.master import MasterCore
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import Past
from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import CreateToken
from zmqcluster.model import Role
from zmqcluster.rest.app import create_app
from zmqcluster.rest.server import RestServer
from zmqcluster.runtime.clock import Clock
from zmqcluster.runtime.master import MasterRuntime
from zmqcluster.runtime.transport import MasterSockets
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import KeyPair, load_or_create_key_pair
from zmqcluster.security.selftest import check_doors
from zmqcluster.security.tokens import (
    load_join_token,
    load_or_create_api_token,
    new_join_token,
    save_join_token,
)
from zmqcluster.security.zap import Allowlist
from zmqcluster.services.backend import MasterBackend

log = logging.getLogger(__name__)

LOCAL_TOKEN_USES: Final = 1_000_000
TOKEN_S: Final = 10.0


class MasterNode:
    """One master: open() claims files and ports, start() serves, close() undoes open().

    The loop itself (runtime.run) is run by a TaskScheduler between open() and start().
    """

    def __init__(self, config: ClusterConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._stack = ExitStack()
        self.data_dir = DataDir(config.data_dir)

    def open(self) -> MasterRuntime:
        """Claim everything a second master must not have; nothing is served yet.

        Raises StartError, StorageError or ConfigError, in one sentence; then nothing is held.
        """
        try:
            return self._open()
        except BaseException:
            self.close()
            raise

    @property
    def rest_port(self) -> int:
        return self._rest.port

    def start(self) -> None:
        """Let workers and clients in. The loop must be running."""
        self._offer_local_join()
        self._rest.start()
        self.backend.problem = ""

    def stop_serving(self) -> None:
        """Close the REST door, before the loop behind it ends. Again: nothing happens."""
        self.backend.problem = "the master is stopping"
        self._rest.stop()

    def close(self) -> None:
        """Give everything back; harmless when done twice."""
        self._stack.close()

    def _open(self) -> MasterRuntime:
        config, clock, stack = self._config, self._clock, self._stack
        stack.enter_context(self.data_dir.lock_master())
        registry = Registry.load(config.executors)
        rng = random.Random(secrets.randbits(64))
        self.device_id = self.data_dir.master_device_id(config.device_id, clock.wall_ms(), rng)
        base = database.open_writer(self.data_dir.database, config.durability)
        stack.callback(base.close)
        place = database.Place(self.data_dir.database)
        past = _past(base, clock)
        self._spent_tokens = {
            one.token_id for one in past.tokens if one.revoked_wall or one.uses_left <= 0
        }
        self._keys = load_or_create_key_pair(self.data_dir.keys_folder(), "server")
        allowlist = self._allowlist(past)
        sockets = MasterSockets(
            config.bind, config.dispatch_port, config.control_port, self._keys, allowlist
        )
        stack.callback(sockets.close)
        check_doors(
            config.bind,
            sockets.dispatch_port,
            sockets.control_port,
            self._keys.public,
            sockets.serve_door,
            clock.monotonic_ms,
        )
        core = MasterCore(_settings(config, registry, self.device_id), past, rng)
        queries = Queries(self.data_dir.database)
        stack.callback(queries.close)
        self.runtime = MasterRuntime(
            core=core,
            sockets=sockets,
            allowlist=allowlist,
            queries=queries,
            apply=lambda changes: _apply(base, place, changes, past.epoch),
            check=registry.check,
            clock=clock,
            clock_ms=past.clock_ms,
            tick_ms=int(1000 * min(config.dispatch_interval, config.heartbeat_interval / 2)),
        )
        stack.callback(self.runtime.close)
        self._open_rest()
        return self.runtime

    def _open_rest(self) -> None:
        config = self._config
        queries = Queries(self.data_dir.database)
        self._stack.callback(queries.close)
        self.backend = MasterBackend(config, self.runtime, queries, self._keys.public, self._clock)
        self._stack.callback(self.backend.close)
        app = create_app(
            self.backend,
            api_token=load_or_create_api_token(self.data_dir),
            hosts=(*config.allowed_hosts, config.master_host, socket.gethostname()),
            version=__version__,
        )
        self._rest = RestServer(app, config.rest_bind, config.master_port)
        self._rest.bind()
        self._stack.callback(self._rest.stop)

    def _allowlist(self, past: Past) -> Allowlist:
        """Whoever passed before passes again, from the first moment the door is there.

        A key refused at that moment would stay away until its owner begins anew. Keys and tokens
        made or revoked from now on are the core's to name.
        """
        allowlist = Allowlist()
        for key in past.keys:
            if not key.revoked_wall:
                allowlist.allow(key.public_key, principal_of(key))
        for token in past.tokens:
            if not token.revoked_wall:
                principal = Principal(Role.ENROL, token_id=token.token_id)
                allowlist.allow(token.public_key, principal)
        client: KeyPair = load_or_create_key_pair(self.data_dir.keys_folder(), "client")
        allowlist.allow(client.public, Principal(Role.CLIENT))
        return allowlist

    def _offer_local_join(self) -> None:
        """Workers started with the same data directory find a token there and need no other.

        It is the same one at each start, until the operator revokes it.
        """
        config = self._config
        token = None
        with contextlib.suppress(ConfigError):
            token = load_join_token(self.data_dir)
        wanted = (self._keys.public, config.dispatch_port, config.control_port)
        known = token and (token.server_public, token.dispatch_port, token.control_port)
        if token is None or known != wanted or token.token_id in self._spent_tokens:
            token = new_join_token(
                host="",
                dispatch_port=config.dispatch_port,
                control_port=config.control_port,
                server_public=self._keys.public,
                expires_wall_ms=0,
            )
        message = CreateToken(
            request_id=secrets.token_bytes(16),
            token_id=token.token_id,
            public_key=token.bootstrap_keys.public,
            role=token.role,
            expires_wall_ms=0,
            uses=LOCAL_TOKEN_USES,
        )
        try:
            self.runtime.post(message).result(TOKEN_S)
        except TimeoutError:
            raise StartError("the master's loop does not answer: see its last lines") from None
        save_join_token(self.data_dir, token)


def _apply(base: Database, place: database.Place, changes: Changes, epoch: int) -> bool:
    """Commit, as the newest master; afterwards it is certain where to."""
    prune_more = writer.apply(base, changes, epoch)
    place.require()
    return prune_more


def _past(base: Database, clock: Clock) -> Past:
    """What the former master left, and the next epoch.

    Cluster time goes on from where it was, plus the time this machine says we were away; a wall
    clock that was set back meanwhile only makes waits longer.
    """
    epoch = recovery.begin_epoch(base)
    old = recovery.load(base)
    now_wall = clock.wall_ms()
    away_ms = max(0, now_wall - old.wall_ms) if old.wall_ms else 0
    return Past(
        epoch=epoch,
        clock_ms=old.clock_ms + away_ms if old.clock_ms else now_wall,
        next_task_id=old.next_task_id,
        next_job_id=old.next_job_id,
        in_flight=old.held,
        jobs=old.jobs,
        devices=old.devices,
        rate_keys=old.rate_keys,
        keys=old.keys,
        tokens=old.tokens,
        totals=structs.asdict(old.totals),
    )


def _settings(config: ClusterConfig, registry: Registry, device_id: str) -> Settings:
    return Settings(
        heartbeat_interval_ms=int(config.heartbeat_interval * 1000),
        device_timeout_ms=int(config.device_timeout * 1000),
        task_timeout_ms=int(config.task_timeout * 1000),
        max_retry_count=config.max_retry_count,
        max_tasks_per_device=config.max_tasks_per_device,
        strategy=config.load_balance_strategy,
        durability=config.durability,
        retention_ms=int(config.retention_days * 24 * 3_600_000),
        task_types=registry.types(),
        device_id=device_id,
    )
