"""Ways that are slow, lossy, cut or crowded; some in a network namespace, some through a proxy.

A proxy cannot forge what CURVE protects: a frame that comes twice or changed costs its connection,
and that, and nothing else, must be all it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Final

import psutil  # type: ignore[import-untyped]  # ships no types

from tests.chaos.catalogue import Tier, fault
from tests.chaos.rig import Rig
from tests.support.cluster import Node, family, holder, trace_lines, wait_until
from tests.support.netns import Cable
from tests.support.proxy import Edit, Proxy, Way
from tests.support.raw_devices import RawDevices
from zmqcluster.core.worker_outbox import RESEND_MS

# The rig's heartbeat_interval and device_timeout, and what a promise adds to it.
BEAT_S: Final = 1.0
TIMEOUT_S: Final = 3.0
SLACK_S: Final = 2.0
# A bound that a device which takes all it can get would reach within seconds.
HELD_MAX: Final = 8
# Until a way that is whole again is used again: by then a connection has given up and begun anew.
BACK_S: Final = 10.0
# Until a worker tells a result again that nobody acknowledged.
RESEND_S: Final = RESEND_MS / 1000
DEAD_PORT: Final = 1
# Until the kernel gives up a silent connection: socket_options.KEEPALIVE_*.
GIVEN_UP_S: Final = 30.0


@fault(19, "delay of 200 ms, give or take 100")
def delayed(rig: Rig) -> None:
    proxy = _behind_proxy(rig, workers=2)
    with rig.load() as load:
        rig.flows(load)
        rig.step("slow")
        proxy.weather.delay_ms, proxy.weather.jitter_ms = 200.0, 100.0
        began = time.monotonic()
        task_id = rig.submit("trace", {"path": str(rig.trace)})
        rig.cluster.wait_state(task_id, "completed")
        took_s = time.monotonic() - began
        rig.flows(load, 200)
    rig.judge()
    assert took_s >= 0.2, "there and back again"
    assert rig.events("device_lost") == 0


@fault(20, "loss of 30 percent of all packets", needs=("netns",))
def lossy(rig: Rig) -> None:
    cable = _behind_cable(rig)
    far = rig.cluster.nodes[-1]
    with rig.load() as load:
        rig.flows(load)
        rig.step("lossy")
        for hook in ("input", "output"):
            cable.lose(hook, "numgen random mod 100 < 30")
        time.sleep(8)
        lost = cable.mend()
        rig.step(f"mended; {lost} packets were lost")
        _works_again(rig, far, BACK_S)
        rig.flows(load)
    rig.judge()
    assert lost > 30, "packets were lost"


@fault(21, "a line of 64 kbit/s", needs=("netns",))
def narrow(rig: Rig) -> None:
    rig.cluster.config["executors"] = ["tests.support.accept_tasks", "tests.support.odd_tasks"]
    # A line that narrow holds up to two seconds of what is sent.
    rig.cluster.config |= {"heartbeat_interval": 2.0, "device_timeout": 9.0}
    cable = _behind_cable(rig, others=0)
    rig.step("narrow")
    cable.narrow("64kbit")
    # Three seconds of line each; all together they are longer than device_timeout.
    runs = rig.running("bulky", 4, size=24_000)
    began = min(rig.starts_of(one.task_id)[0] for one in runs)
    data = {"path": str(rig.trace)}
    for _ in range(20):
        rig.submit("trace", data)
    rig.rests()
    took_s = time.monotonic() - began
    rig.judge()
    assert took_s > 4 * 24_000 * 8 / 64_000 * 0.8, "the line was slow"
    assert rig.events("device_lost") == 0, "a slow line is not a silent device"


@fault(22, "partition both ways, longer than device_timeout", needs=("netns",))
def partitioned(rig: Rig) -> None:
    _partition(rig)


@fault(23, "partition one way, longer than device_timeout; then the other way", needs=("netns",))
def partitioned_one_way(rig: Rig) -> None:
    _partition(rig, "input", "output")


@fault(24, "half-open: the far host vanishes without a word", tier=Tier.LONG, needs=("netns",))
def half_open(rig: Rig) -> None:
    cable = rig.keep(Cable())
    master = _master_for(rig, cable)
    before = _connections(master)
    victim = _far_worker(rig, cable)
    [run] = rig.running("trace", seconds=600.0)
    rig.step("power cut")
    cable.cut()
    victim.kill()
    assert _connections(master) > before, "the dead connection is still there"
    cut = time.monotonic()
    rig.cluster.start_worker("--master-host", cable.near)
    wait_until(lambda: len(rig.starts_of(run.task_id)) == 2, "its task runs elsewhere")
    took_s = rig.starts_of(run.task_id)[1] - cut
    rig.cancel(run.task_id)
    rig.step("waiting for the kernel to give up")
    wait_until(
        lambda: _connections(master) <= before + 2,
        "the dead connection is closed",
        GIVEN_UP_S,
    )
    rig.judge()
    assert took_s < TIMEOUT_S + SLACK_S + 2.0, "the other worker was started meanwhile"


@fault(25, "connections reset again and again")
def reset_storm(rig: Rig) -> None:
    proxy = _behind_proxy(rig, workers=2)
    with rig.load() as load:
        rig.flows(load)
        before = proxy.connections
        for number in range(8):
            rig.step(f"reset {number + 1}")
            proxy.reset_all()
            rig.pause(0.1, 0.6)
        rig.flows(load)
    rig.judge()
    again = proxy.connections - before
    assert 8 <= again < 60, f"they come back, and not too often: {again} times"


@fault(26, "link that flaps every second", needs=("netns",))
def flapping(rig: Rig) -> None:
    cable = _behind_cable(rig)
    with rig.load() as load:
        runs = rig.running("trace", 4, seconds=6.0)
        for _ in range(3):
            rig.step("down")
            cable.cut()
            time.sleep(1.0)
            lost = cable.mend()
            rig.step(f"up; {lost} packets were lost")
            assert lost > 0, "the link was down"
            time.sleep(1.0)
        rig.flows(load)
    rig.judge()
    assert rig.events("device_lost") == 0, "a second of silence is not a loss"
    assert all(len(rig.starts_of(one.task_id)) == 1 for one in runs)


@fault(27, "frames repeated, changed and cut off", tier=Tier.QUICK)
def frames_spoiled(rig: Rig) -> None:
    proxy = _behind_proxy(rig, workers=2)
    with rig.load() as load:
        rig.flows(load)
        for name, edit in (("repeated", _twice), ("changed", _flipped)):
            rig.step(name)
            before = proxy.connections
            proxy.weather.edit = _now_and_then(rig.rng, edit)
            wait_until(lambda: proxy.connections > before + 2, "connections were lost")  # noqa: B023
            proxy.clear()
            rig.flows(load)
        rig.step("cut off")
        before = proxy.connections
        proxy.weather.cut_after = 5_000
        wait_until(lambda: proxy.connections > before + 2, "connections were lost")
        proxy.clear()
        rig.flows(load)
    rig.judge()
    assert rig.events("task_died") == 0


@fault(28, "frames that come in another order, or once more much later")
def frames_reordered(rig: Rig) -> None:
    proxy = _behind_proxy(rig, workers=2)
    kept: list[bytes] = []

    def swap(frame: bytes) -> list[bytes]:
        """This one waits, and comes after the next one that is chosen."""
        if not kept:
            kept.append(frame)
            return []
        return [frame, kept.pop()]

    old: list[bytes] = []

    def replay(frame: bytes) -> list[bytes]:
        """The oldest ever seen comes again before it."""
        old.append(frame)
        return [old[0], frame]

    with rig.load() as load:
        rig.flows(load)
        for name, edit in (("swapped", swap), ("replayed", replay)):
            rig.step(name)
            before = proxy.connections
            proxy.weather.edit = _now_and_then(rig.rng, edit)
            wait_until(lambda: proxy.connections > before + 2, "connections were lost")  # noqa: B023
            proxy.clear()
            rig.flows(load)
    rig.judge()


@fault(29, "dispatches lost, and the session lives", tier=Tier.QUICK)
def dispatches_lost(rig: Rig) -> None:
    _lose(rig, Way.DOWN)
    lost_ms = _held_ms(rig, "dispatch_lost")
    assert lost_ms, "orders were lost"
    # The beat that shows it, and what the master waits for one that is late.
    assert max(lost_ms) < 1000 * (2 * BEAT_S + SLACK_S)


@fault(30, "results lost, and the session lives")
def results_lost(rig: Rig) -> None:
    _lose(rig, Way.UP)
    took_ms = _held_ms(rig, "completed")
    # No task of the load takes longer than half a second.
    assert max(took_ms) > 1000 * (RESEND_S - 1), "results were lost"
    assert max(took_ms) < 1000 * (2 * RESEND_S + SLACK_S), "told again, once more if need be"


@fault(31, "500 devices come back at once, three times")
def reconnect_storm(rig: Rig) -> None:
    master = rig.cluster.start_master()
    rig.cluster.start_worker()
    devices = rig.keep(RawDevices(rig.cluster, 500))
    with rig.load() as load:
        devices.wait_welcome(60)
        for number in range(3):
            rig.step(f"master killed, {number + 1}")
            master.kill()
            master = rig.cluster.start_master()
            began = time.monotonic()
            devices.wait_welcome(15)
            rig.step(f"all back after {time.monotonic() - began:.1f} s")
            rig.flows(load)
    rig.judge()


@fault(32, "control socket that never connects")
def no_hints(rig: Rig) -> None:
    rig.cluster.start_master()
    rig.cluster.start_worker("--control-port", str(DEAD_PORT))
    with rig.load() as load:
        rig.flows(load)
        [run] = rig.running("trace_sync", seconds=600.0)
        cancelled = time.monotonic()
        rig.cancel(run.task_id)
        rig.cluster.wait_state(run.task_id, "cancelled")
        took_s = time.monotonic() - cancelled
        rig.flows(load)
    rig.judge()
    assert took_s < BEAT_S + SLACK_S, "the next beat tells it"


@fault(33, "worker that reads nothing while others work")
def deaf_worker(rig: Rig) -> None:
    rig.cluster.config["max_tasks_per_device"] = HELD_MAX
    proxy = _behind_proxy(rig, workers=1)
    deaf = rig.cluster.nodes[-1]
    [device] = rig.cluster.devices()
    rig.cluster.start_worker()
    held = "SELECT count(*) FROM tasks WHERE device_id = ? AND state IN ('assigned', 'running')"
    most = 0
    with rig.load() as load:
        rig.flows(load)
        rig.step("deaf")
        acknowledged, began = load.acknowledged, time.monotonic()
        proxy.weather.stalled = {Way.DOWN}
        while time.monotonic() - began < 2 * TIMEOUT_S:
            most = max(most, rig.cluster.rows(held, device.device_id)[0][0])
            time.sleep(0.02)
        assert load.acknowledged - acknowledged > 100, "nobody else waits"
        proxy.clear()
        rig.step(f"hears again; it was given {most}")
        _works_again(rig, deaf, BACK_S)
        rig.flows(load)
    rig.judge()
    assert 0 < most <= HELD_MAX, f"it was given {most} tasks"


@fault(34, "black hole for large packets", needs=("netns",))
def black_hole(rig: Rig) -> None:
    rig.cluster.config["executors"] = ["tests.support.accept_tasks", "tests.support.odd_tasks"]
    cable = _behind_cable(rig)
    far = rig.cluster.nodes[-1]
    data = {"path": str(rig.trace)}
    with rig.load() as load:
        rig.flows(load)
        rig.step("large packets vanish")
        for hook in ("input", "output"):
            cable.lose(hook, "meta length > 600")
        large = [
            *(rig.submit("bulky", data | {"size": 24_000}) for _ in range(8)),
            *(rig.submit("trace", data | {"note": "x" * 24_000}) for _ in range(8)),
        ]
        began = time.monotonic()
        wait_until(lambda: _completed(rig, large), "all done", 3 * (TIMEOUT_S + SLACK_S))
        rig.step(f"done after {time.monotonic() - began:.1f} s all the same")
        lost = cable.mend()
        rig.step(f"mended; {lost} packets were lost")
        _works_again(rig, far, BACK_S)
        rig.flows(load)
    rig.judge()
    assert lost > 0, "large packets vanished"
    assert rig.events("device_lost") > 0, "it is on record"


@fault(35, "the worker's address changes", needs=("netns",))
def address_changes(rig: Rig) -> None:
    cable = _behind_cable(rig, others=0)
    far = rig.cluster.nodes[-1]
    with rig.load() as load:
        rig.flows(load)
        device_ids = {one.device_id for one in rig.cluster.devices()}
        rig.step("moved")
        cable.move()
        rig.flows(load)
        _works_again(rig, far, GIVEN_UP_S)
    rig.judge()
    assert {one.device_id for one in rig.cluster.devices()} == device_ids, "the same device"


@fault(36, "the master's name fails, then leads elsewhere", needs=("netns",))
def name_moves(rig: Rig) -> None:
    cable = rig.keep(Cable())
    hosts = rig.keep(cable.names())
    hosts.say("master.test", cable.near)
    master = _master_for(rig, cable)
    worker = rig.cluster.start_worker("--master-host", "master.test", prefix=hosts.prefix)
    with rig.load() as load:
        rig.flows(load)
        [run] = rig.running("trace", seconds=6.0)
    rig.step("the name is gone, and so is the master")
    hosts.say("", "")
    master.kill()
    rig.pause(1.0, 2.0)
    rig.step("both are elsewhere")
    rig.cluster.host = cable.second_near()
    rig.cluster.config["bind"] = rig.cluster.host
    hosts.say("master.test", rig.cluster.host)
    rig.cluster.start_master()
    with rig.load() as load:
        rig.flows(load)
        _works_again(rig, worker, GIVEN_UP_S)
    rig.judge()
    assert len(rig.starts_of(run.task_id)) == 1, "what ran went on"


@fault(37, "queue of new connections that overflows", needs=("netns",))
def backlog_overflows(rig: Rig) -> None:
    cable = rig.keep(Cable())
    cable.inside("sysctl", "-q", "-w", "net.core.somaxconn=4")
    rig.cluster.host = cable.far
    rig.cluster.config["bind"] = cable.far
    rig.cluster.start_master(prefix=cable.prefix)
    rig.cluster.start_worker("--master-host", cable.far)
    before = cable.refused()
    devices = rig.keep(RawDevices(rig.cluster, 100))
    with rig.load() as load:
        devices.wait_welcome(60)
        rig.flows(load)
    rig.judge()
    assert cable.refused() > before, "the queue overflowed"


# --- what the faults have in common ---------------------------------------------------------------


def _behind_proxy(rig: Rig, workers: int) -> Proxy:
    """A master, and workers that reach it through a proxy."""
    rig.cluster.start_master()
    proxy = rig.keep(Proxy(rig.cluster.port + 1, rig.seed))
    for _ in range(workers):
        rig.cluster.start_worker("--dispatch-port", str(proxy.port))
    return proxy


def _behind_cable(rig: Rig, others: int = 1) -> Cable:
    """A master, a worker at the far end of a cable, and others at this end."""
    cable = rig.keep(Cable())
    _master_for(rig, cable)
    for _ in range(others):
        rig.cluster.start_worker("--master-host", cable.near)
    _far_worker(rig, cable)
    return cable


def _master_for(rig: Rig, cable: Cable) -> Node:
    rig.cluster.host = cable.near
    rig.cluster.config["bind"] = cable.near
    return rig.cluster.start_master()


def _far_worker(rig: Rig, cable: Cable) -> Node:
    return rig.cluster.start_worker("--master-host", cable.near, prefix=cable.prefix)


def _partition(rig: Rig, *hooks: str) -> None:
    """Cut the far worker off, by each of the hooks in turn or by all at once."""
    cable = _behind_cable(rig)
    near, far = rig.cluster.nodes[1:3]
    with rig.load() as load:
        rig.flows(load)
        for one in hooks or ("",):
            runs = rig.running("trace", 4, seconds=TIMEOUT_S + SLACK_S + 1)
            ours = [each.task_id for each in runs if holder([near, far], each.pid) is far]
            rig.step(f"cut ({one or 'both ways'})")
            cable.cut(*filter(None, (one,)))
            cut = time.monotonic()
            wait_until(lambda: _all_again(rig, ours), "they run elsewhere")  # noqa: B023
            took_s = max(rig.starts_of(each)[1] for each in ours) - cut
            lost = cable.mend()
            rig.step(f"mended; {lost} packets were lost")
            assert lost > 0, "the cable was cut"
            assert took_s < TIMEOUT_S + SLACK_S
            _works_again(rig, far, BACK_S)
            rig.flows(load)
    rig.judge()


def _works_again(rig: Rig, node: Node, within_s: float) -> None:
    """Until it begins a task; one that began before does not count."""
    since = time.monotonic()

    def begun() -> bool:
        hosts = {one.pid for one in family(node.pid)}
        lines = trace_lines(rig.trace, "start")
        return any(float(line[4]) > since and int(line[3]) in hosts for line in lines)

    wait_until(begun, f"{node.log.name} works again", within_s)


def _completed(rig: Rig, task_ids: list[int]) -> bool:
    return all(rig.cluster.state(one) == "completed" for one in task_ids)


def _all_again(rig: Rig, task_ids: list[int]) -> bool:
    return all(len(rig.starts_of(one)) >= 2 for one in task_ids)


def _held_ms(rig: Rig, outcome: str) -> list[int]:
    """How long each attempt that ended so was in the hands of its device."""
    sql = "SELECT ended_wall - assigned_wall FROM task_assignments WHERE outcome = ?"
    return [row[0] for row in rig.cluster.rows(sql, outcome)]


def _lose(rig: Rig, way: Way) -> None:
    """Every fourth frame of this way."""
    proxy = _behind_proxy(rig, workers=2)
    lost = 0

    def lose(which: Way, frame: bytes) -> list[bytes]:
        nonlocal lost
        if which is way and rig.rng.random() < 0.25:
            lost += 1
            return []
        return [frame]

    with rig.load() as load:
        rig.flows(load)
        rig.step(f"frames {way} are lost")
        proxy.weather.edit = lose
        rig.flows(load, 100)
        wait_until(lambda: lost >= 10, "frames were lost")
        rig.step(f"{lost} frames are lost")
        proxy.clear()
    rig.judge()
    assert rig.events("device_lost") == 0
    assert proxy.connections == 2 + 2, "no connection was lost (two enrolments, two sessions)"


def _twice(frame: bytes) -> list[bytes]:
    return [frame, frame]


def _flipped(frame: bytes) -> list[bytes]:
    return [frame[:-1] + bytes([frame[-1] ^ 1])]


def _now_and_then(rng: Random, spoil: Callable[[bytes], list[bytes]]) -> Edit:
    """One frame in ten, either way."""
    return lambda _, frame: spoil(frame) if rng.random() < 0.1 else [frame]


def _connections(node: Node) -> int:
    return len(psutil.Process(node.pid).net_connections("tcp"))
