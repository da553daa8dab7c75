"""The bugs that are planted, and the promise each of them breaks.

What is caught shows that the oracle and the faults of the simulation can see that kind of bug.
"""

from __future__ import annotations

from typing import Final

from tests.mutants.planting import Mutant

_CORE: Final = "zmqcluster.core."

MUTANTS: Final = (
    # --- the fence, and what counts ----------------------------------------------------------
    Mutant(
        "no_fence",
        _CORE + "results",
        "if flight is None or flight.task.attempt != attempt or flight.device_id "
        "!= device.device_id:",
        "if flight is None or flight.device_id != device.device_id:",
        "the end of a superseded attempt counts for the current one",
        ("devices=1",),
    ),
    Mutant(
        "anybody_may_end_it",
        _CORE + "results",
        "if flight is None or flight.task.attempt != attempt or flight.device_id "
        "!= device.device_id:",
        "if flight is None or flight.task.attempt != attempt:",
        "a device ends what another one runs",
    ),
    Mutant(
        "salvage_from_anybody",
        _CORE + "results",
        "        and task.device_id == device.device_id\n        and task.given_up",
        "        and task.given_up",
        "the late end of a device that never held the attempt counts",
        ("hostile=1",),
    ),
    Mutant(
        "salvage_twice",
        _CORE + "results",
        "        and task.given_up != GivenUp.NO\n",
        "",
        "an end that was counted already counts again when it is repeated",
    ),
    Mutant(
        "deaths_not_taken_back",
        _CORE + "dispatcher",
        "task.deaths -= task.given_up == GivenUp.DIED",
        "task.deaths -= 0",
        "an attempt that came back is still counted as a death",
        (
            "endless=3",
            "devices=1",
            "worker_pauses_every_ms=3000",
            "worker_kills_every_ms=0",
            "cancels_every_ms=0",
            "breaks_every_ms=0",
            "hostile=0",
        ),
    ),
    Mutant(
        "poison_count_reset",
        _CORE + "dispatcher",
        "            task.deaths += 1\n",
        "            task.deaths = 1\n",
        "what kills its process is tried for ever",
    ),
    Mutant(
        "failures_not_counted",
        _CORE + "dispatcher",
        "            task.failures += 1\n",
        "            task.failures = max(1, task.failures)\n",
        "a task that fails is tried for ever",
    ),
    Mutant(
        "children_without_the_result",
        _CORE + "results",
        "    if outcome is not Outcome.COMPLETED:\n        if outcome not in",
        "    if outcome is not Outcome.COMPLETED:\n"
        "        for spec in result.children:\n"
        "            add_task(state, spec, task.job_id, task.task_id, facts)\n"
        "        if outcome not in",
        "children of an attempt that was not accepted are queued",
    ),
    Mutant(
        "children_lost",
        _CORE + "results",
        "    for spec in result.children:\n        if not state",
        "    for spec in result.children[1:]:\n        if not state",
        "a page that was found is never fetched",
    ),
    Mutant(
        "blind_children",
        _CORE + "results",
        "return bool(result.children) and TaskId(result.task_id) in facts.tasks",
        "return False",
        "children are queued twice: their keys were not looked up",
        (
            "window_tasks=4",
            "lane_tasks=2",
            "delayed_tasks=2",
            "devices=1",
            "pages=40",
            "task_failures=0",
            "cancels_every_ms=0",
            "master_crashes_every_ms=2400",
            "worker_pauses_every_ms=3000",
            "clones=0",
            "hostile=0",
        ),
    ),
    # --- commit before send ------------------------------------------------------------------
    Mutant(
        "ack_before_commit",
        _CORE + "pipeline",
        "self._held[0][0] <= self._safe_turn:",
        "self._held[0][0] <= self._safe_turn + 1:",
        "an answer leaves before its cause is on disk",
    ),
    Mutant(
        "everything_before_commit",
        _CORE + "pipeline",
        "while self._held and self._held[0][0] <= self._safe_turn:",
        "while self._held:",
        "an attempt is handed out before its number is on disk",
    ),
    Mutant(
        "batch_forgotten",
        _CORE + "pipeline",
        "            self._batch.add(turn.changes)\n            self._is_batch_empty = False\n",
        "            if not (self.is_busy and len(self._held) > 3):\n"
        "                self._batch.add(turn.changes)\n"
        "            self._is_batch_empty = False\n",
        "a turn decided while a long commit runs is not written",
    ),
    # --- dispatch, leases, sessions -----------------------------------------------------------
    Mutant(
        "attempt_not_persisted",
        _CORE + "dispatcher",
        "        state.record_open(task)\n",
        "",
        "an attempt is sent that no disk knows of",
    ),
    Mutant(
        "attempt_number_reused",
        _CORE + "dispatcher",
        "        task.attempt += 1\n",
        "        task.attempt = max(1, task.attempt)\n",
        "two attempts have the same number: nothing can tell them apart",
    ),
    Mutant(
        "requeue_twice",
        _CORE + "dispatcher",
        "            state.wait(task, first=True)\n",
        "            state.wait(task, first=True)\n            state.wait(task, first=True)\n",
        "what comes back is queued twice",
    ),
    Mutant(
        "credit_leak",
        _CORE + "fleet",
        "        at.in_hand -= 1\n",
        "",
        "a slot that was used once is never free again, for the master",
    ),
    Mutant(
        "slot_leak",
        _CORE + "worker_queue",
        "        self._lanes[work.pool].running -= 1\n",
        "",
        "a slot that was used once is never free again, for the worker",
    ),
    Mutant(
        "no_reconciliation",
        _CORE + "sessions",
        "    if matched != len(device.flights):\n",
        "    if False:\n",
        "a dispatch that got lost is never found",
    ),
    Mutant(
        "hello_without_inventory",
        _CORE + "sessions",
        "        message.inventory,\n        is_hello=True,\n",
        "        (),\n        is_hello=True,\n",
        "running work is thrown away because a connection broke",
    ),
    Mutant(
        "lease_not_rearmed",
        _CORE + "sessions",
        '        state.timers.set(f"lease {device_id}", expires_ms)\n    elif',
        "        pass\n    elif",
        "a host that falls silent keeps its tasks",
    ),
    Mutant(
        "pause_kills_all",
        _CORE + "sessions",
        "        device.heard_ms = state.now_ms\n    for flight in state.flights.values():\n",
        "        pass\n    for flight in state.flights.values():\n",
        "a master that was stopped for a while gives up every device",
    ),
    Mutant(
        "no_brake",
        _CORE + "sessions",
        "    return len(online) >= BRAKE_DEVICES_MIN and",
        "    return False and",
        "a switch that restarts costs the whole fleet its tasks",
    ),
    Mutant(
        "adopts_what_was_not_given_up",
        _CORE + "sessions",
        "        or not task.given_up\n",
        "",
        "an attempt that ended by its own word goes on",
    ),
    Mutant(
        "clone_is_let_in",
        _CORE + "sessions",
        "    if is_same_process or device.lost_at_ms is not None or not is_alive:\n",
        "    if True:\n",
        "two machines with one device id take turns for ever",
    ),
    # --- what clients ask for -----------------------------------------------------------------
    Mutant(
        "cancel_lost_on_restart",
        _CORE + "intake",
        "    task.cancel_requested = True\n    state.save(task)\n",
        "    task.cancel_requested = True\n",
        "a master that dies forgets that a running task was cancelled",
    ),
    Mutant(
        "job_cancel_lost_on_restart",
        _CORE + "intake",
        "        job.state = JobState.CANCELLED\n        state.save_job(job)\n",
        "        job.state = JobState.CANCELLED\n",
        "a master that dies forgets that a job was cancelled",
        (
            "master_crashes_every_ms=2400",
            "cancels_every_ms=600",
            "retries_every_ms=0",
            "hostile=0",
            "commit_crashes=0.01",
            "slow_commits=0.2",
        ),
    ),
    Mutant(
        "cancelled_job_is_dispatched",
        _CORE + "dispatcher",
        "            if state.job(task.job_id).state is JobState.CANCELLED:\n",
        "            if False:\n",
        "tasks of a cancelled job still start",
        ("cancels_every_ms=600", "retries_every_ms=0", "slow_commits=0.2"),
    ),
    Mutant(
        "cancel_said_once",
        _CORE + "sessions",
        "        if flight.task.cancel_requested and held",
        "        if False and held",
        "a lost abort leaves a cancelled task running",
    ),
    Mutant(
        "cancelled_completes",
        _CORE + "results",
        "    if result.outcome is Outcome.COMPLETED and task.cancel_requested:\n",
        "    if False:\n",
        "a task is completed after its cancel was acknowledged",
    ),
    Mutant(
        "submit_not_idempotent",
        _CORE + "intake",
        "    if _is_answered(state, peer, message, facts):\n"
        "        return\n"
        "    if not message.tasks:\n",
        "    if not message.tasks:\n",
        "a request that is repeated is carried out twice",
    ),
    Mutant(
        "retry_not_idempotent",
        _CORE + "intake",
        "    if _is_answered(state, peer, message, facts):\n"
        "        return\n"
        "    changed, untouched = [], []\n"
        "    for task_id in map(TaskId, message.task_ids):\n"
        "        task = find(state, task_id, facts)\n"
        "        why",
        "    changed, untouched = [], []\n"
        "    for task_id in map(TaskId, message.task_ids):\n"
        "        task = find(state, task_id, facts)\n"
        "        why",
        "an old retry that comes again revives what has ended since",
        (
            "duplicates=0.2",
            "loss=0.1",
            "retries_every_ms=900",
            "cancels_every_ms=600",
            "hostile=0",
            "task_failures=0.3",
        ),
    ),
    Mutant(
        "cancel_not_idempotent",
        _CORE + "intake",
        "    if _is_answered(state, peer, message, facts):\n"
        "        return\n"
        "    if message.job_id:\n",
        "    if message.job_id:\n",
        "an old cancel that comes again cancels what was revived since",
        ("duplicates=0.2", "loss=0.1", "retries_every_ms=900", "cancels_every_ms=600", "hostile=0"),
    ),
    Mutant(
        "submission_not_on_disk",
        _CORE + "intake",
        "    state.changes.submissions.append(\n",
        "    [].append(\n",
        "a master that dies forgets which requests it has carried out",
    ),
    Mutant(
        "unique_keys_not_looked_up",
        _CORE + "intake",
        "state.holder_of(key) or facts.keys.get(key)",
        "state.holder_of(key)",
        "after a restart a page is queued again",
    ),
    Mutant(
        "unique_keys_not_on_disk",
        _CORE + "intake",
        "        state.changes.unique_keys.append(UniqueKeyRow(job_id, key[1], task_id))\n",
        "        pass\n",
        "after a restart a page is queued again",
    ),
    # --- politeness ---------------------------------------------------------------------------
    Mutant(
        "key_open_after_restart",
        _CORE + "rates",
        "            next_at_ms = max(next_at_ms, started_ms + row.delay_ms)\n",
        "            next_at_ms = min(next_at_ms, started_ms)\n",
        "a site is hit too early after a restart",
    ),
    Mutant(
        "limits_not_on_disk",
        _CORE + "state",
        "        self._changes.rate_keys[rate.name] = rate.row(self.epoch, self.wall_ms)\n",
        "",
        "a master that dies forgets the limits of a site",
    ),
    Mutant(
        "key_opens_before_it_began",
        _CORE + "rates",
        "            and not self.starting\n",
        "",
        "two starts at a site may come together, however far apart they were ordered",
    ),
    Mutant(
        "lost_key_opens_at_once",
        _CORE + "rates",
        "max(self.next_at_ms, now_ms + start_within_ms + self.delay_ms)",
        "self.next_at_ms",
        "a lost attempt hits the site beside the next one",
        ("slow_commits=0.3", "duplicates=0.2", "breaks_every_ms=1500", "delay_ms=500", "hostile=0"),
    ),
    Mutant(
        "concurrency_ignored",
        _CORE + "rates",
        "and (not self.concurrency or self.running < self.concurrency)",
        "",
        "more run at a site at once than it allows",
    ),
    Mutant(
        "closure_ignored",
        _CORE + "rates",
        "            and now_ms >= self.closed_until_ms\n",
        "",
        "Retry-After is not honoured",
    ),
    Mutant(
        "start_window_ignored",
        _CORE + "worker_queue",
        "            if work is not None and work.phase == QUEUED:\n                refs.append",
        "            if False:\n                refs.append",
        "an order that waited too long still hits the site",
        ("slots=1", "task_hangs=0.2", "delay_ms=0", "concurrency=1"),
    ),
    # --- the backlog --------------------------------------------------------------------------
    Mutant(
        "start_told_too_early",
        _CORE + "worker_queue",
        "                self._starting[work.order.task_id] = work\n",
        "                self._starting[work.order.task_id] = work\n"
        "                self._at_once.append(work.ref)\n",
        "the delay of a site counts from before it was hit",
    ),
    Mutant(
        "start_on_its_way_forgotten",
        _CORE + "sessions",
        "    within_ms = lease_ms if may_begin else None\n",
        "    within_ms = None\n",
        "an order that is still on its way hits the site beside the next one",
        ("slow_commits=0.3", "duplicates=0.2", "breaks_every_ms=1500", "delay_ms=500", "hostile=0"),
    ),
    Mutant(
        "cursor_skips_a_task",
        _CORE + "queue",
        "lane.cursor = max(lane.cursor, task.task_id - 1)",
        "lane.cursor = max(lane.cursor, task.task_id)",
        "a task in the backlog is never read",
    ),
    Mutant(
        "spilled_lane_not_read",
        _CORE + "queue",
        "            lane.spilled = True\n",
        "",
        "a task that came during a read is never read",
        (
            "window_tasks=4",
            "lane_tasks=2",
            "slow_commits=0.1",
            "master_crashes_every_ms=0",
            "hostile=0",
        ),
    ),
    Mutant(
        "delayed_task_forgotten",
        _CORE + "delays",
        "        self.reached(entries[count][0])\n",
        "",
        "a delayed task that left memory never comes back",
    ),
    Mutant(
        "idle_job_forgotten_early",
        _CORE + "state",
        "        self.until_committed(partial(self._forget_job, job, self.turn))\n",
        "        self._forget_job(job, self.turn)\n",
        "a job is read from the disk before its last change is there",
    ),
    Mutant(
        "departed_forgotten_early",
        _CORE + "state",
        "        self._departures.append((self.turn, task_id))\n",
        "        self.departed.pop(task_id)\n",
        "an old row is read and believed",
    ),
    # --- workers ------------------------------------------------------------------------------
    Mutant(
        "drain_lost_on_restart",
        _CORE + "sessions",
        "    device.row.drained = former.drained\n",
        "",
        "a drained device takes part again after a hiccup",
    ),
    Mutant(
        "drained_device_is_used",
        _CORE + "fleet",
        "            and not (self.row.drained or self.draining)\n",
        "",
        "a drained device is given new tasks",
    ),
    Mutant(
        "overtaken_orders_run",
        _CORE + "worker",
        "        is_past = message.epoch < session.epoch or message.seq <= session.assign_seq\n",
        "        is_past = message.epoch < session.epoch\n",
        "an order the master has given up is carried out",
    ),
    Mutant(
        "result_dropped_before_ack",
        _CORE + "worker_outbox",
        "                kept.sent_ms = now_ms\n",
        "                kept.sent_ms = now_ms\n                self._kept.pop(kept.key)\n",
        "a result that gets lost on the way is gone",
    ),
    Mutant(
        "spool_not_written",
        _CORE + "worker",
        "        results = self._outbox.take_unspooled(now_ms, at_once=at_once)\n"
        "        if results:\n",
        "        results = self._outbox.take_unspooled(now_ms, at_once=at_once)\n"
        "        if False:\n",
        "a worker that dies loses ends it had",
    ),
    Mutant(
        "ack_of_what_was_not_kept",
        _CORE + "results",
        "            continue\n        else:\n",
        "            continue\n        elif state.now_ms % 7:\n",
        "a worker drops a result the master has not taken",
    ),
    Mutant(
        "ack_never",
        _CORE + "worker",
        "        spooled = self._outbox.ack(now_ms, message.refs)\n",
        "        spooled = self._outbox.ack(now_ms, message.refs[1:])\n",
        "what is settled is sent for ever",
    ),
    Mutant(
        "draining_worker_starts_more",
        _CORE + "worker",
        '            self._give_back(queue.take_queued(), "draining")\n',
        "            pass\n",
        "a draining worker goes on with what it holds",
    ),
    # --- clients ------------------------------------------------------------------------------
    Mutant(
        "client_gives_up_on_lost_frames",
        _CORE + "client",
        "                self._put(now_ms, question, effects)\n                continue\n",
        "                question.again_ms = now_ms + ASK_AGAIN_MS\n"
        "                repeats.append((question.again_ms, request_id))\n"
        "                continue\n",
        "a request that gets lost is never answered",
    ),
    Mutant(
        "what_ended_before_is_not_told",
        _CORE + "watching",
        "        elif known.state.is_terminal:\n",
        "        elif False:\n",
        "who asks about a task that has ended waits for ever",
    ),
    Mutant(
        "client_never_asks_again_for_ends",
        _CORE + "client",
        "        if self._awaited and now_ms - self._heard_ms >= self._patience_ms:\n",
        "        if False:\n",
        "an end that gets lost is never told",
    ),
)
