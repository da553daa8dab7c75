"""Strangers at the door, devices gone bad, and programs that misuse the REST API."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import psutil  # type: ignore[import-untyped]  # ships no types

from tests.chaos.catalogue import Tier, fault
from tests.chaos.own_tasks import counted, end_of, events, has_begun, submit
from tests.chaos.rig import Load, Rig, now_ms
from tests.support.cgroups import Group
from tests.support.cluster import wait_until
from tests.support.history import Answer, Submission, Told
from tests.support.raw_peer import (
    COMMAND,
    GREETING,
    Door,
    Peer,
    beat,
    connected,
    hello,
    is_closed_by_peer,
    knock,
    mangled,
)
from zmqcluster import codec
from zmqcluster.client import DistributionClient
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Enrol,
    HeartbeatAck,
    Held,
    Progress,
    ProgressNote,
    Refused,
    Results,
    Returned,
    Started,
    Submit,
    TaskResult,
    TaskSpec,
    Welcome,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Outcome, RefusalCode
from zmqcluster.runtime.socket_options import raise_descriptor_limit
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import new_key_pair
from zmqcluster.security.tokens import load_join_token

API: Final = "/api/distribution"
MIB: Final = 1024 * 1024
MASTER_GROWS_BYTES_MAX: Final = 60 * MIB
HANDSHAKE_S: Final = 15.0
STRANGERS: Final = 10_000
# Until the master has looked and written down what it saw.
SLACK_S: Final = 5.0
# What counts up when words get past the door.
REACHED: Final = ("socket_dropped_unknown_key", "socket_dropped_shape", "frame_refused")


@contextlib.contextmanager
def at_work(rig: Rig, grows_max: int = MASTER_GROWS_BYTES_MAX) -> Iterator[tuple[Load, Door]]:
    """A cluster under load; afterwards it is the same master, no larger, and all has ended well."""
    cluster = rig.cluster
    master = cluster.start_master()
    worker = cluster.start_worker()
    process = psutil.Process(master.pid)
    with rig.load() as load:
        rig.flows(load, 10)
        before = process.memory_info().rss
        yield load, Door(cluster.data_dir, cluster.port + 1)
        rig.flows(load, 10)
        grown = process.memory_info().rss - before
    rig.judge()
    assert master.process.poll() is None, "the master ended"
    assert worker.process.poll() is None, "the worker ended"
    assert grown < grows_max, f"the master grew by {grown:,} bytes"


# --- strangers ------------------------------------------------------------------------------------


@fault(38, "ten thousand strangers connect and say nothing", needs=("descriptors",))
def silent_strangers(rig: Rig) -> None:
    cluster = rig.cluster
    raise_descriptor_limit()
    with at_work(rig) as (load, door):
        [master] = [one for one in cluster.nodes if one.says("Starting master")]
        ports = [door.port, door.port + 1]
        began = time.monotonic()
        with connected(itertools.islice(itertools.cycle(ports), STRANGERS)) as lines:
            assert len(lines) == STRANGERS
            wait_until(
                lambda: psutil.Process(master.pid).num_fds() > STRANGERS, "all are at the door"
            )
            cluster.start_worker()
            rig.flows(load, 50)
            wait_until(
                lambda: all(map(is_closed_by_peer, lines)), "all are hung up on", HANDSHAKE_S + 5
            )
            assert time.monotonic() - began > HANDSHAKE_S / 2, "it was the deadline that did it"


@fault(39, "the master runs out of descriptors")
def no_descriptors(rig: Rig) -> None:
    cluster = rig.cluster
    with at_work(rig) as (load, door):
        [master] = [one for one in cluster.nodes if one.says("Starting master")]
        open_now = psutil.Process(master.pid).num_fds()
        limit = 2 * open_now
        resource.prlimit(master.pid, resource.RLIMIT_NOFILE, (limit, limit))
        ports = itertools.cycle([door.port, door.port + 1, cluster.port])
        # Nine tenths of all: more than it takes to be told, and some are left.
        with connected(itertools.islice(ports, limit * 9 // 10 - open_now)):
            wait_until(lambda: events(rig, "descriptors_scarce"), "there is time yet", SLACK_S)
            assert master.says("soon nobody can connect"), master.log.read_text()
            assert not events(rig, "descriptors_gone")
            with connected(itertools.islice(ports, 300)):
                wait_until(lambda: events(rig, "descriptors_gone"), "it is on record", SLACK_S)
                assert master.says(f"all {limit} descriptors are in use"), master.log.read_text()
                rig.flows(load, 50)
        # Whoever wants in now gets in.
        cluster.start_worker()
        wait_until(lambda: events(rig, "descriptors_enough"), "that is over", SLACK_S)
    assert events(rig, "device_lost") == 0


@fault(40, "greetings and handshakes with bytes flipped, and of older protocols")
def malformed_greetings(rig: Rig) -> None:
    rng = Random(rig.seed)
    old = (b"\x01\x00", b"\xff" + bytes(7) + b"\x01\x7f\x01\x05", GREETING[:10] + b"\x02\x05\x00")
    with at_work(rig) as (_, door):
        devices = rig.cluster.rows("SELECT device_id, state FROM devices")
        keys = rig.cluster.rows("SELECT count(*) FROM keys")
        let_in = _counts(rig, *REACHED)
        for port in (door.port, door.port + 1):
            for words in (*old, b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\xff" * 70_000):
                knock(port, words)
            for _ in range(1500):
                knock(port, mangled(GREETING + COMMAND, rng))
        assert rig.cluster.rows("SELECT device_id, state FROM devices") == devices
        assert rig.cluster.rows("SELECT count(*) FROM keys") == keys
        assert _counts(rig, *REACHED) == let_in, "no byte of a stranger reaches the decoder"


@fault(41, "a frame header that announces a terabyte")
def oversize_frame(rig: Rig) -> None:
    header = b"\x02" + (2**40).to_bytes(8)
    with at_work(rig) as (_, door):
        for words in (header, GREETING + header, GREETING + b"\x06" + (2**40).to_bytes(8)):
            for _ in range(50):
                began = time.monotonic()
                knock(door.port, words + bytes(1000), patience_s=5)
                assert time.monotonic() - began < 4, "closed at once"
        # A known key gets no further: its frame is one byte more than there may be.
        with door.peer(door.enrol("large")) as peer:
            peer.say(hello("large"))
            peer.hears(Welcome)
            peer.say(b"\xc1" * (4 * MIB + 1))
            wait_until(lambda: _is_offline(rig, "large"), "its connection is closed", 10)


@fault(
    42,
    "an enrolled device sends a message without end, until memory is gone",
    needs=("memory group",),
)
def endless_message(rig: Rig) -> None:
    """R1 of docs/security.md: the limit of its service ends the master, and nothing is lost."""
    cluster = rig.cluster
    group = rig.keep(Group("memory"))
    master = cluster.start_master(prefix=group.prefix)
    cluster.start_worker()
    door = Door(cluster.data_dir, cluster.port + 1)
    with rig.load() as load, door.peer(door.enrol("endless")) as peer:
        rig.flows(load, 20)
        group.limit_memory(group.memory_bytes + 200 * MIB)
        rig.step("a message of 375 MiB")
        peer.socket.send_multipart([os.urandom(64 * 1024)] * 6000, copy=False)
        wait_until(lambda: master.process.poll() is not None, "the kernel kills it")
        assert master.process.returncode == -signal.SIGKILL
        cluster.start_master()
        _revoke(rig, "endless")
        rig.flows(load, 20)
    rig.judge()


@fault(47, "strangers with another key, without security, and without the master's key")
def strangers_keys(rig: Rig) -> None:
    with at_work(rig) as (load, door):
        let_in = _counts(rig, *REACHED)
        doors = [
            Peer(door.port, door.server_public, new_key_pair()),
            Peer(door.port, new_key_pair().public, door.enrol("mistaken")),
            Peer(door.port, None, None),
        ]
        with contextlib.ExitStack() as stack:
            for peer in doors:
                stack.enter_context(peer)
                for _ in range(100):
                    peer.try_say(b"x" * 1000)
                peer.try_say(b"")
            rig.flows(load, 30)
            assert all(peer.hear(0.1) is None for peer in doors), "nobody is answered"
        assert _counts(rig, *REACHED) == let_in
        wait_until(lambda: events(rig, "handshake_denied"), "it is on record")


@fault(48, "nobody answers at the door: the thread that does is frozen", needs=("thread freezer",))
def dead_doorman(rig: Rig) -> None:
    with at_work(rig) as (load, door):
        [master] = [one for one in rig.cluster.nodes if one.says("Starting master")]
        known = door.enrol("known")
        group = rig.keep(Group("freezer"))
        group.take_thread(_loop_thread(master.pid))
        with contextlib.ExitStack() as stack:
            rig.step("frozen")
            group.freeze()
            frozen = time.monotonic()
            try:
                peers = [
                    stack.enter_context(one)
                    for one in (
                        door.peer(known),
                        door.peer(new_key_pair()),
                        Peer(door.port, None, None),
                    )
                ]
                for peer in peers:
                    peer.try_say(codec.encode(hello("known")))
                wait_until(lambda: ask(rig, "GET", "/readyz", prefix="")[0] == 503, "it is told", 9)
                wait_until(lambda: time.monotonic() - frozen > 6, "longer than device_timeout")
                assert all(peer.hear(0.1) is None for peer in peers), "nobody got in"
            finally:
                group.thaw()
            rig.step("thawed")
            peers[0].hears(Welcome)
            assert all(peer.hear(0.5) is None for peer in peers[1:]), "no stranger got in since"
        wait_until(lambda: ask(rig, "GET", "/readyz", prefix="")[0] == 200, "it is ready", 5)
        rig.flows(load, 20)
    lost = "SELECT count(*) FROM events WHERE kind = 'device_lost' AND device_id <> 'known'"
    assert rig.cluster.rows(lost) == [(0,)], "its own pause is nobody's silence"


# --- devices gone bad -----------------------------------------------------------------------------


@fault(43, "messages of no frame, of two, and of a thousand")
def odd_shapes(rig: Rig) -> None:
    with at_work(rig) as (_, door), door.peer(door.enrol("shapes")) as peer:
        peer.say(hello("shapes"))
        peer.hears(Welcome)
        before = counted(rig, "socket_dropped_shape")
        for parts in ([b"", b""], [b"x"] * 1000, [b"", b"\xc0", b""]):
            peer.socket.send_multipart(parts)
        peer.say(b"")
        wait_until(lambda: counted(rig, "socket_dropped_shape") == before + 3, "they are counted")
        wait_until(lambda: counted(rig, "frame_refused") >= 1, "the empty one is refused")
        peer.say(beat())
        peer.hears(HeartbeatAck)


@fault(44, "an enrolled device sends bad MessagePack of every kind")
def bad_msgpack(rig: Rig) -> None:
    rng = Random(rig.seed)
    good = [
        msgpack.packb(one)
        for one in (
            ["beat", 1, 1, [0.0], 0, 0, 0, [[1, 1, 0]]],
            ["results", [[1, 1, "completed", b"\xc0"]]],
            ["started", [[1, 1]]],
            ["progress", [[1, 1, 0.5, "n"]]],
            ["rates", [["http://x", 1, 1, 1]]],
        )
    ]
    odd: list[bytes] = [
        b"\xc1",
        b"\x81\xa4beat\x01" + b"\x82\xa1a\x01\xa1a\x02",
        msgpack.packb(["progress", [[1, 1, float("nan")]]]),
        msgpack.packb(["beat", 2**64 - 1, 0, [], 0, 0, 0]),
        msgpack.packb(["results", [[-1, 1, "completed"]]]),
        msgpack.packb(["goodbye", msgpack.ExtType(5, b"x")]),
        msgpack.packb(["goodbye"]) + b"\0",
        b"\x92\xa7goodbye\xa3\xed\xa0\x80",
        b"\x92\xa7goodbye\xa1\xff",
        b"\x92\xa7goodbye\xdb\xff\xff\xff\xff",
    ]
    with at_work(rig) as (_, door), door.peer(door.enrol("mumble")) as peer:
        peer.say(hello("mumble"))
        peer.hears(Welcome)
        before = counted(rig, "frame_refused")
        for frame in odd:
            peer.say(frame)
        wait_until(lambda: counted(rig, "frame_refused") == before + len(odd), "each is refused")
        for frame in good:
            for end in range(len(frame)):
                peer.say(frame[:end])
            for _ in range(400):
                peer.say(mangled(frame, rng))
        peer.say(beat())
        peer.hears(HeartbeatAck)


@fault(45, "an enrolled device sends MessagePack that grows when it is read")
def msgpack_bombs(rig: Rig) -> None:
    size = 4 * MIB - 16
    bombs = [
        b"\xdd" + (size).to_bytes(4) + b"\xc0" * size,
        b"\x92\xa8progress\xdd" + (size).to_bytes(4) + b"\x90" * (size - 32),
        b"\x91" * size,
        b"\x81" * size,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x92\xa7started\xdd\xff\xff\xff\xff",
    ]
    with at_work(rig) as (_, door), door.peer(door.enrol("bomber")) as peer:
        peer.say(hello("bomber"))
        peer.hears(Welcome)
        before = counted(rig, "frame_refused")
        for _ in range(4):
            peer.say(*bombs)
        wait_until(lambda: counted(rig, "frame_refused") == before + 28, "each is refused")
        peer.say(beat())
        peer.hears(HeartbeatAck)


@fault(46, "a message nobody knows, and a device of another version", tier=Tier.QUICK)
def unknown_messages(rig: Rig) -> None:
    with at_work(rig) as (_, door), door.peer(door.enrol("future")) as peer:
        peer.say(hello("future", version=PROTOCOL_VERSION + 1))
        refused = peer.hears(Refused)
        assert refused.code is RefusalCode.VERSION, refused
        peer.say(hello("future"))
        peer.hears(Welcome)
        before = counted(rig, "frame_refused")
        # The right words from the wrong mouth are unknown as well.
        peer.say(msgpack.packb(["teleport", 1]), Submit(b"r", (TaskSpec("noop", b"\x80"),)))
        wait_until(lambda: counted(rig, "frame_refused") == before + 2, "both are refused")
        assert events(rig, "frame_refused")


@fault(49, "a device is revoked while it is connected and works")
def revoked_at_work(rig: Rig) -> None:
    with at_work(rig) as (_, door), door.peer(keys := door.enrol("revoked")) as peer:
        task_id = _taken(rig, peer, "revoked")
        peer.say(Started((AttemptRef(task_id, 1),)))
        _revoke(rig, "revoked")
        peer.say(Results((TaskResult(task_id, 1, Outcome.COMPLETED, b"\xc0"),)))
        end = end_of(rig, task_id)
        assert (end.state, end.outcomes[-1]) == ("completed", "completed"), end
        assert len(end.outcomes) == 2, "somebody else did it"
        with door.peer(keys) as again:
            again.try_say(codec.encode(hello("revoked")))
            assert again.hear(0.5) is None, "its key opens nothing any more"


@fault(50, "a device says that it is another one")
def impostor(rig: Rig) -> None:
    with at_work(rig) as (_, door), door.peer(door.enrol("impostor")) as peer:
        [(honest,)] = rig.cluster.rows("SELECT device_id FROM devices WHERE state = 'online'")
        peer.say(hello(honest, "trace", slots=100))
        assert peer.hears(Refused).code is RefusalCode.FORBIDDEN
        token = load_join_token(DataDir(rig.cluster.data_dir))
        assert token is not None
        with door.peer(token.bootstrap_keys) as thief:
            thief.say(Enrol(PROTOCOL_VERSION, new_key_pair().public, DeviceId(honest)))
            assert thief.hears(Refused).code in (RefusalCode.CONFLICT, RefusalCode.FORBIDDEN)
        states = rig.cluster.rows("SELECT state FROM devices WHERE device_id = ?", honest)
        assert states == [("online",)], "the honest one did not notice"


@fault(51, "a worker runs twice, from a copied folder")
def cloned_worker(rig: Rig) -> None:
    cluster = rig.cluster
    cluster.start_master()
    first = cluster.start_worker()
    twin = rig.folder / "twin"
    with rig.load() as load:
        rig.flows(load, 20)
        shutil.copytree(cluster.data_dir / "workers", twin / "workers", copy_function=shutil.copy)
        twin.chmod(0o700)
        port = str(cluster.port)
        second = cluster._start("worker", "--master-port", port, "--data-dir", str(twin))
        rig.flows(load, 100)
        # Only one of them is in the cluster, and a device that is live elsewhere is told so.
        assert len([one for one in cluster.devices() if one.state == "online"]) == 1
        wait_until(
            lambda: first.process.poll() is not None or second.process.poll() is not None,
            "one of them ends",
            20,
        )
        rig.flows(load, 20)
    rig.judge()


@fault(52, "a device reports results of tasks that are not its own")
def foreign_results(rig: Rig) -> None:
    with at_work(rig) as (load, door), door.peer(door.enrol("forger")) as peer:
        peer.say(hello("forger"))
        peer.hears(Welcome)
        [victim] = submit(rig, "trace", data={"path": str(rig.trace), "seconds": 2.0})
        has_begun(rig, victim)
        ended = next(one.task_ids[0] for one in load.submissions if one.task_ids)
        forged = [
            TaskResult(task_id, attempt, outcome, b"\xa6forged")
            for task_id in (victim, ended, 10**15)
            for attempt in (1, 2, 2**31 - 1)
            for outcome in (Outcome.COMPLETED, Outcome.CANCELLED, Outcome.DIED)
        ]
        refs = tuple(AttemptRef(one.task_id, one.attempt) for one in forged)
        notes = tuple(ProgressNote(one.task_id, one.attempt, 0.5) for one in refs)
        peer.say(*(Results((one,)) for one in forged), Results(tuple(forged)))
        peer.say(Returned(refs, "mine"), Started(refs), Progress(notes))
        peer.say(beat(held=tuple(Held(one.task_id, one.attempt, 1) for one in refs)))
        peer.hears(HeartbeatAck)
        end = end_of(rig, victim)
        assert (end.state, end.outcomes) == ("completed", ("completed",)), end
        assert counted(rig, "result_fenced") >= len(forged)
    taken = "SELECT count(*) FROM tasks WHERE result = ?"
    assert rig.cluster.rows(taken, b"\xa6forged") == [(0,)]


@fault(53, "a device lies about its credit and its inventory, to hoard tasks")
def hoarding_device(rig: Rig) -> None:
    cap = 8
    rig.cluster.config["max_tasks_per_device"] = cap
    with at_work(rig) as (load, door), door.peer(door.enrol("hoarder")) as peer:
        peer.say(hello("hoarder", "trace", "trace_sync", slots=4096))
        peer.hears(Welcome)
        for lie in (-1, 10**9):
            peer.say(msgpack.packb(["beat", 1, 1, [], 0, lie, 0]))
        rig.flows(load, 50)
        most = 0
        for seq in range(30):
            # It keeps what it was given, and says it holds nothing and wants more.
            peer.say(beat(seq + 2, credit=4096))
            peer.hears(HeartbeatAck)
            held = "SELECT count(*) FROM tasks WHERE device_id = 'hoarder' AND state IN (?, ?)"
            most = max(most, rig.cluster.rows(held, "assigned", "running")[0][0])
        assert 0 < most <= cap, f"it got hold of {most} tasks"
        _revoke(rig, "hoarder")
        peer.try_say(b"")


@fault(54, "a device floods the master with heartbeats")
def beat_flood(rig: Rig) -> None:
    with at_work(rig) as (load, door), door.peer(door.enrol("flood")) as peer:
        quiet = _round_trip_s(rig)
        peer.say(hello("flood"))
        peer.hears(Welcome)
        frames = [codec.encode(beat(seq)) for seq in range(100)]
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(_flood, peer, frames, 4.0)
            flooded = _round_trip_s(rig)
            count = sent.result()
        assert count > 4_000, f"only {count} beats went out: no flood"
        assert flooded < quiet + 0.5, f"a round trip took {flooded:.3f} s, {quiet:.3f} s before"
        assert load.acknowledged


@fault(59, "a hundred programs submit one unique key at once")
def one_key_race(rig: Rig) -> None:
    body = {"task_type": "trace", "task_data": {"path": str(rig.trace)}, "unique_key": "the one"}
    with at_work(rig):
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: ask(rig, "POST", "/tasks", body), range(100)))
        assert {status for status, _ in answers} == {201}
        [task_id] = {answer["task_ids"][0] for _, answer in answers}
        for _ in answers:
            rig.extra.submissions.append(Submission(Answer.OK, ("the one",), (task_id,)))
        assert end_of(rig, task_id).state == "completed"
        # The same name for another request is answered as the first one was.
        keyed = [
            ask(rig, "POST", "/tasks", body | {"unique_key": key}, idempotency_key="twice")
            for key in ("the one", "another")
        ]
        assert keyed[0] == keyed[1], keyed


@fault(60, "tasks are cancelled while they wait, and in the moment in which they end")
def cancelled_at_the_end(rig: Rig) -> None:
    rig.cluster.config["max_tasks_per_device"] = 16
    with at_work(rig):
        data = {"path": str(rig.trace)}
        ids = [
            task_id
            for seconds in (0.1, 0.3)
            for task_id in submit(rig, "trace", 40, data=data | {"seconds": seconds})
        ]
        # The last of them wait at the master, and are cancelled from the end.
        ids += reversed(submit(rig, "trace_sync", 80, data=data | {"seconds": 0.05}))

        async def work(client: DistributionClient) -> None:
            for task_id in ids:
                await asyncio.sleep(0.004)
                asked_ms = now_ms()
                changed = await client.cancel([task_id])
                rig.note_cancel(changed.task_ids, asked_ms)

        rig.cluster.ask(work)
        ends = [end_of(rig, task_id) for task_id in ids]
        assert {one.state for one in ends} == {"completed", "cancelled"}
        cancelled = [one.outcomes for one in ends if one.state == "cancelled"]
        assert () in cancelled, "some of them waited"
        assert any(cancelled), "some of them were given out"


# --- REST -----------------------------------------------------------------------------------------


@fault(55, "slow, huge, compressed and deep requests, and a thousand that only connect")
def hostile_http(rig: Rig) -> None:
    port = rig.cluster.port
    with at_work(rig) as (load, _):
        auth = f"Host: localhost\r\nAuthorization: Bearer {_token(rig)}\r\nConnection: close\r\n"
        post = f"POST {API}/tasks HTTP/1.1\r\n{auth}Content-Type: application/json\r\n"
        statuses = {
            "1 GB": _status(port, f"{post}Content-Length: {10**9}\r\n\r\n"),
            "gzip": _status(port, f"{post}Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n"),
            "text": _status(port, post.replace("json", "xml") + "Content-Length: 2\r\n\r\n{}"),
            "header": _status(port, f"GET / HTTP/1.1\r\n{auth}X: {'a' * 70_000}\r\n\r\n"),
            "deep": ask(rig, "POST", "/tasks", b"[" * 100_000)[0],
            "deep data": ask(rig, "POST", "/tasks", _deep_task())[0],
            "garbage": _status(port, "\x00\xff\x00\r\n\r\n"),
        }
        assert statuses == {
            "1 GB": 413, "gzip": 415, "text": 415, "header": 400, "deep": 422, "deep data": 422,
            "garbage": 400,
        }, statuses  # fmt: skip
        with connected([port] * 1000) as idle, connected([port] * 20, b"GET / HT") as slow:
            rig.flows(load, 20)
            wait_until(lambda: all(map(is_closed_by_peer, slow)), "the slow ones are cut off", 15)
            wait_until(lambda: all(map(is_closed_by_peer, idle)), "the idle ones as well", 15)
        assert ask(rig, "GET", "/tasks/stats")[0] == 200


@fault(56, "every route is asked with a wrong token, and with none")
def wrong_tokens(rig: Rig) -> None:
    with at_work(rig):
        status, described = ask(rig, "GET", "/openapi.json", prefix="")
        assert status == 200
        before = rig.cluster.rows("SELECT kind, count(*) FROM events WHERE kind LIKE 'token%'")
        asked = 0
        for path, methods in described["paths"].items():
            place = path.replace("{", "").replace("}", "").replace("task_id", "1")
            for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
                for token in ("", "w" * 43, _token(rig)[:-1], "é", " "):
                    status, _ = ask(rig, method, place, {}, prefix="", token=token)
                    is_open = method in ("GET", "HEAD", "OPTIONS") and not token
                    assert is_open or status == 401 or place == "/healthz", (method, place, status)
                    asked += 1
            assert methods
        assert asked > 500
        after = rig.cluster.rows("SELECT kind, count(*) FROM events WHERE kind LIKE 'token%'")
        assert after == before


@fault(57, "a web page asks through a browser: foreign Host, foreign Origin", tier=Tier.QUICK)
def rebinding(rig: Rig) -> None:
    port = rig.cluster.port
    with at_work(rig):
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            for method in ("GET", "POST", "DELETE"):
                assert ask(rig, method, "/tasks", {}, host=host)[0] in (400, 421), host
        for origin in ("http://evil.example", "null", "http://localhost:1", "file://"):
            for method, path in (("GET", "/tasks"), ("POST", "/tasks"), ("DELETE", "/devices/a")):
                assert ask(rig, method, path, {}, origin=origin)[0] == 403, origin


@fault(58, "the answer to a submission is lost after its commit")
def lost_answer(rig: Rig) -> None:
    body = {"task_type": "trace", "task_data": {"path": str(rig.trace)}}
    with at_work(rig):
        for number in range(20):
            key = f"order-{number}"
            before = rig.cluster.rows("SELECT count(*) FROM submissions")[0][0]
            with socket.create_connection(("127.0.0.1", rig.cluster.port)) as line:
                line.sendall(_request(rig, "POST", "/tasks", json.dumps(body).encode(), key))
                wait_until(
                    lambda: rig.cluster.rows("SELECT count(*) FROM submissions")[0][0] > before,  # noqa: B023
                    "it is on disk",
                )
            status, first = ask(rig, "POST", "/tasks", body, idempotency_key=key)
            again = ask(rig, "POST", "/tasks", body, idempotency_key=key)
            assert (status, first) == again, "the same request, the same answer"
            ids = tuple(first["task_ids"])
            rig.extra.submissions.append(Submission(Answer.OK, ("",), ids))
        mine = [one.task_ids for one in rig.extra.submissions]
        assert len(set(mine)) == 20


def ask(
    rig: Rig,
    method: str,
    path: str,
    body: Any = None,
    *,
    prefix: str = API,
    token: str | None = None,
    **headers: str,
) -> tuple[int, Any]:
    """One request on a connection of its own; status and what came back, decoded if it is JSON."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    told.setdefault("content-type", "application/json")
    token = _token(rig) if token is None else token
    if token:
        told["authorization"] = f"Bearer {token}"
    payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    if method in ("GET", "HEAD", "OPTIONS"):
        payload = None
    line = http.client.HTTPConnection("localhost", rig.cluster.port, timeout=20)
    try:
        line.putrequest(method, prefix + path, skip_host="host" in told)
        for name, value in told.items():
            line.putheader(name, value.encode("latin-1"))
        if payload is not None:
            line.putheader("content-length", str(len(payload)))
        line.endheaders(payload)
        answer = line.getresponse()
        text = answer.read()
    finally:
        line.close()
    is_json = "json" in (answer.getheader("content-type") or "") and text
    return answer.status, json.loads(text) if is_json else text


def _counts(rig: Rig, *names: str) -> list[float]:
    return [counted(rig, name) for name in names]


def _token(rig: Rig) -> str:
    return (rig.cluster.data_dir / "api-token").read_text().strip()


def _request(rig: Rig, method: str, path: str, body: bytes, key: str) -> bytes:
    head = (
        f"{method} {API}{path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {_token(rig)}\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _status(port: int, words: str) -> int:
    answer = knock(port, words.encode("latin-1"), patience_s=8)
    return int(answer.split()[1])


def _deep_task() -> bytes:
    return b'{"task_type": "trace", "task_data": {"path": ' + b"[" * 100 + b"]" * 100 + b"}}"


def _is_offline(rig: Rig, device_id: str) -> bool:
    sql = "SELECT state FROM devices WHERE device_id = ?"
    return rig.cluster.rows(sql, device_id) == [("offline",)]


def _revoke(rig: Rig, device_id: str) -> None:
    assert ask(rig, "DELETE", f"/devices/{device_id}")[0] in (200, 204)


def _taken(rig: Rig, peer: Peer, device_id: str) -> int:
    """A task that only this device could take, and has; another can do it as well from then on."""
    peer.say(hello(device_id, "trace", slots=1, labels=("bait",)))
    peer.hears(Welcome)
    [task_id] = submit(rig, "trace", data={"path": str(rig.trace)}, labels=["bait"])
    order = peer.hears(Assign).orders[0]
    assert order.task_id == task_id
    rig.cluster.start_worker("--labels", "bait")
    return task_id


def _loop_thread(pid: int) -> int:
    """The only one that waits in poll(2); all others wait for locks, or in epoll_wait(2)."""
    threads = Path(f"/proc/{pid}/task")

    def found() -> list[str]:
        return [one.name for one in threads.iterdir() if "poll_sch" in (one / "wchan").read_text()]

    [thread_id] = wait_until(found, "the loop waits")
    return int(thread_id)


def _flood(peer: Peer, frames: list[bytes], seconds: float) -> int:
    """Say these again and again; how many went out."""
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        count += sum(peer.try_say(frame) for frame in frames)
        while peer.socket.poll(1):
            peer.socket.recv()
    return count


def _round_trip_s(rig: Rig) -> float:
    """The median of some submissions, each with its result."""

    async def work(client: DistributionClient) -> list[float]:
        times = []
        for _ in range(20):
            began = time.monotonic()
            task_id = await client.submit("trace", {"path": str(rig.trace)})
            rig.extra.submissions.append(Submission(Answer.OK, ("",), (task_id,)))
            [end] = await client.wait([task_id], timeout_s=20)
            rig.extra.told.append(Told(task_id, end.state, end.attempt, now_ms()))
            times.append(time.monotonic() - began)
        return sorted(times)

    return rig.cluster.ask(work)[10]
