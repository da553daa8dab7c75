"""The wire's vocabulary: one frozen struct a message, every bound in its type.

A message is a MessagePack array whose first element is its tag; docs/protocol.md lists them with
positions and units. Who may send what is the union a decoder is made for: see codec.py.

Instants and durations are integers in ms. `wall` marks wall-clock time; everything else is a
duration or a sender's own monotonic clock, which only its sender may interpret.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from zmqcluster.model import (
    CHILDREN_MAX,
    CONCURRENCY_MAX,
    CREDIT_MAX,
    DELAY_MS_MAX,
    DEVICE_ID_PATTERN,
    ERROR_CHARS_MAX,
    INVENTORY_MAX,
    LABEL_PATTERN,
    LABELS_MAX,
    NAME_CHARS_MAX,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    RATE_KEY_CHARS_MAX,
    RECORDS_BYTES_MAX,
    RESULT_BYTES_MAX,
    RESULTS_PER_FRAME_MAX,
    RETRIES_MAX,
    SLOTS_MAX,
    SUBMIT_TASKS_MAX,
    TASK_DATA_BYTES_MAX,
    TASK_TYPE_PATTERN,
    TASK_TYPES_MAX,
    TIMEOUT_MS_MAX,
    UNIQUE_KEY_CHARS_MAX,
    WALL_MS_MAX,
    Outcome,
    Pool,
    RefusalCode,
    Role,
    Strategy,
    TaskState,
)

Int63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
TaskRefId = Annotated[int, Meta(ge=1, le=2**63 - 1)]
AttemptNo = Annotated[int, Meta(ge=1, le=2**31 - 1)]
DurationMs = Annotated[int, Meta(ge=0, le=WALL_MS_MAX)]
WallMs = Annotated[int, Meta(ge=0, le=WALL_MS_MAX)]
DeviceName = Annotated[str, Meta(pattern=DEVICE_ID_PATTERN)]
TaskTypeName = Annotated[str, Meta(pattern=TASK_TYPE_PATTERN)]
Label = Annotated[str, Meta(pattern=LABEL_PATTERN)]
Labels = Annotated[tuple[Label, ...], Meta(max_length=LABELS_MAX)]
ShortText = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
ErrorText = Annotated[str, Meta(max_length=ERROR_CHARS_MAX)]
RequestId = Annotated[bytes, Meta(min_length=1, max_length=32)]
BootId = Annotated[bytes, Meta(min_length=16, max_length=16)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Percent = Annotated[float, Meta(ge=0, le=100 * 4096)]


class Wire(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Shared shape of everything on the wire: a positional array, nothing beyond its fields."""


# --- parts of messages --------------------------------------------------------------------------


class TaskSpec(Wire, frozen=True):
    """A task somebody wants done. data: one MessagePack map, opaque to the master's hot path.

    max_retry_count and timeout_ms: None takes the master's configured default.
    not_before_ms: wall clock; 0 is at once. Empty strings mean "none".
    """

    task_type: TaskTypeName
    data: Annotated[bytes, Meta(max_length=TASK_DATA_BYTES_MAX)]
    priority: Annotated[int, Meta(ge=0, le=PRIORITY_MAX)] = PRIORITY_DEFAULT
    max_retry_count: Annotated[int, Meta(ge=0, le=RETRIES_MAX)] | None = None
    timeout_ms: Annotated[int, Meta(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    not_before_ms: WallMs = 0
    unique_key: Annotated[str, Meta(max_length=UNIQUE_KEY_CHARS_MAX)] = ""
    rate_key: Annotated[str, Meta(max_length=RATE_KEY_CHARS_MAX)] = ""
    labels: Labels = ()


class AttemptRef(Wire, frozen=True):
    """Names one attempt of one task."""

    task_id: TaskRefId
    attempt: AttemptNo


class Held(Wire, frozen=True):
    """One line of a worker's inventory: an attempt it queued, runs, or keeps the result of.

    phase: 0 queued, 1 running, 2 done and unacknowledged. elapsed_ms: since the run began.
    """

    task_id: TaskRefId
    attempt: AttemptNo
    phase: Annotated[int, Meta(ge=0, le=2)]
    elapsed_ms: DurationMs = 0


class TaskOrder(Wire, frozen=True):
    """One attempt handed to a worker.

    start_within_ms: 0 is "whenever"; else the worker starts the run within this many ms of
    receiving it, by its own clock and while its lease holds, or returns it (politeness).
    """

    task_id: TaskRefId
    attempt: AttemptNo
    task_type: TaskTypeName
    data: Annotated[bytes, Meta(max_length=TASK_DATA_BYTES_MAX)]
    timeout_ms: Annotated[int, Meta(ge=1, le=TIMEOUT_MS_MAX)]
    job_id: Int63 = 0
    start_within_ms: DurationMs = 0


class Record(Wire, frozen=True):
    """A row for the catalogue: upserted by key within table. body: one MessagePack map."""

    table: TaskTypeName
    key: Annotated[str, Meta(max_length=UNIQUE_KEY_CHARS_MAX)]
    body: Annotated[bytes, Meta(max_length=RECORDS_BYTES_MAX)]


class RateRule(Wire, frozen=True):
    """What somebody learned about a rate key. None leaves that part as it is.

    delay_ms: least time between two starts. concurrency: most at once, 0 is unbounded.
    closed_for_ms: nothing starts for this long (Retry-After); a longer closure in force wins.
    """

    rate_key: Annotated[str, Meta(min_length=1, max_length=RATE_KEY_CHARS_MAX)]
    delay_ms: Annotated[int, Meta(ge=0, le=DELAY_MS_MAX)] | None = None
    concurrency: Annotated[int, Meta(ge=0, le=CONCURRENCY_MAX)] | None = None
    closed_for_ms: Annotated[int, Meta(ge=0, le=DELAY_MS_MAX)] | None = None


class TaskResult(Wire, frozen=True):
    """How an attempt ended. Accepted whole, with children and records, or not at all.

    result: MessagePack, opaque. run_us: time in the executor. retry_after_ms: outcome "retry".
    """

    task_id: TaskRefId
    attempt: AttemptNo
    outcome: Outcome
    result: Annotated[bytes, Meta(max_length=RESULT_BYTES_MAX)] = b""
    error: ErrorText = ""
    run_us: DurationMs = 0
    retry_after_ms: Annotated[int, Meta(ge=0, le=DELAY_MS_MAX)] = 0
    children: Annotated[tuple[TaskSpec, ...], Meta(max_length=CHILDREN_MAX)] = ()
    records: Annotated[tuple[Record, ...], Meta(max_length=CHILDREN_MAX)] = ()
    rates: Annotated[tuple[RateRule, ...], Meta(max_length=64)] = ()


class ProgressNote(Wire, frozen=True):
    """A running task's own word: done is 0..1."""

    task_id: TaskRefId
    attempt: AttemptNo
    done: Annotated[float, Meta(ge=0, le=1)]
    note: ShortText = ""


class TypeOffer(Wire, frozen=True):
    """A task type a device can run, and in which pool."""

    task_type: TaskTypeName
    pool: Pool


class PoolOffer(Wire, frozen=True):
    """How many tasks of a pool a device runs at once."""

    pool: Pool
    slots: Annotated[int, Meta(ge=0, le=SLOTS_MAX)]


class Capabilities(Wire, frozen=True):
    """What a device is: shown to people, and the weight of the weighted strategy."""

    host: ShortText = ""
    platform: ShortText = ""
    cpu_count: Annotated[int, Meta(ge=0, le=100_000)] = 0
    memory_bytes: Int63 = 0
    addresses: Annotated[tuple[ShortText, ...], Meta(max_length=16)] = ()
    version: ShortText = ""


class Resources(Wire, frozen=True):
    """What a device uses right now. net_* are bytes/s since its last beat."""

    cpu_pct: Percent = 0.0
    memory_pct: Percent = 0.0
    memory_bytes: Int63 = 0
    disk_pct: Percent = 0.0
    net_sent_bps: Int63 = 0
    net_received_bps: Int63 = 0


class Control(Wire, frozen=True):
    """Standing orders, level-triggered: repeated in every heartbeat reply until obeyed."""

    version: Int63 = 0
    drain: bool = False
    stop: bool = False


Refs = Annotated[tuple[AttemptRef, ...], Meta(max_length=INVENTORY_MAX)]
Inventory = Annotated[tuple[Held, ...], Meta(max_length=INVENTORY_MAX)]
TaskIds = Annotated[tuple[TaskRefId, ...], Meta(max_length=SUBMIT_TASKS_MAX)]

# --- a device to the master ---------------------------------------------------------------------


class Enrol(Wire, frozen=True, tag="enrol"):
    """The only message of a bootstrap key: remember my own key, and bind it to this device."""

    version: Count32
    public_key: PublicKey
    device_id: DeviceName
    name: ShortText = ""


class Hello(Wire, frozen=True, tag="hello"):
    """Opens a session. boot_id: random for each agent process. inventory: all it still holds."""

    version: Count32
    device_id: DeviceName
    boot_id: BootId
    name: ShortText
    capabilities: Capabilities
    task_types: Annotated[tuple[TypeOffer, ...], Meta(max_length=TASK_TYPES_MAX)]
    pools: Annotated[tuple[PoolOffer, ...], Meta(max_length=len(Pool))]
    labels: Labels
    credit: Annotated[int, Meta(ge=0, le=CREDIT_MAX)]
    inventory: Inventory = ()
    draining: bool = False


class Heartbeat(Wire, frozen=True, tag="beat"):
    """I live. sent_ms: the worker's clock, echoed. assign_seq: the last Assign it has seen.

    credit: the most attempts the master may have in this device's hands, running and waiting.
    """

    seq: Int63
    sent_ms: DurationMs
    resources: Resources
    running: Annotated[int, Meta(ge=0, le=INVENTORY_MAX)]
    credit: Annotated[int, Meta(ge=0, le=CREDIT_MAX)]
    assign_seq: Int63
    inventory: Inventory = ()
    draining: bool = False


class Started(Wire, frozen=True, tag="started"):
    """These attempts began to run."""

    refs: Refs


class Results(Wire, frozen=True, tag="results"):
    """These attempts ended; kept and repeated by the worker until acknowledged."""

    results: Annotated[tuple[TaskResult, ...], Meta(max_length=RESULTS_PER_FRAME_MAX)]


class Returned(Wire, frozen=True, tag="returned"):
    """These attempts never began here; take them back (drain, too slow, start window missed)."""

    refs: Refs
    reason: ShortText = ""


class Progress(Wire, frozen=True, tag="progress"):
    """Notes of running tasks; only the newest of each matters, none is kept for ever."""

    notes: Annotated[tuple[ProgressNote, ...], Meta(max_length=RESULTS_PER_FRAME_MAX)]


class RateReport(Wire, frozen=True, tag="rates"):
    """Rules learned in mid-task (Retry-After, Crawl-delay), too urgent to wait for the result."""

    rates: Annotated[tuple[RateRule, ...], Meta(max_length=256)]


class Goodbye(Wire, frozen=True, tag="goodbye"):
    """This device leaves on purpose: what it still held comes back at once."""

    reason: ShortText = ""


# --- the master to a device ---------------------------------------------------------------------


class Enrolled(Wire, frozen=True, tag="enrolled"):
    """Your key is known from now on: connect again with it."""

    device_id: DeviceName


class Welcome(Wire, frozen=True, tag="welcome"):
    """The session is open. abort: what you hold and must drop."""

    epoch: Int63
    session: Int63
    heartbeat_interval_ms: Annotated[int, Meta(ge=1, le=3_600_000)]
    device_timeout_ms: Annotated[int, Meta(ge=1, le=3_600_000)]
    control: Control
    abort: Refs = ()


class Assign(Wire, frozen=True, tag="assign"):
    """Run these. seq rises with each Assign to this device, over its sessions with a master."""

    epoch: Int63
    seq: Int63
    orders: Annotated[tuple[TaskOrder, ...], Meta(max_length=CREDIT_MAX)]


class ResultAck(Wire, frozen=True, tag="ack"):
    """These results are on disk (or refused for good): forget them."""

    refs: Refs


class HeartbeatAck(Wire, frozen=True, tag="beat_ack"):
    """Echoes seq and sent_ms: the master counted you alive no earlier than sent_ms."""

    seq: Int63
    sent_ms: DurationMs
    epoch: Int63
    control: Control
    abort: Refs = ()


class Abort(Wire, frozen=True, tag="abort"):
    """Stop these, kill what runs, and report outcome "cancelled" once the process is gone."""

    refs: Refs


class HelloAgain(Wire, frozen=True, tag="hello_again"):
    """The master does not know this session (it restarted, or expired you): say Hello."""

    epoch: Int63


class Hint(Wire, frozen=True, tag="hint"):
    """The only message of the PUB socket. Missing one costs latency, never truth."""

    epoch: Int63
    control_version: Int63 = 0
    abort: Refs = ()


# --- a client (CLI, REST, library) to the master ------------------------------------------------


class Submit(Wire, frozen=True, tag="submit"):
    """Queue these. The same request_id again gives the same answer, whatever happened between.

    job_id: an existing job, or 0. job_name: not empty starts a new job of this name.
    rates: rules set together with the tasks. watch: as if a Watch of the new tasks followed.
    """

    request_id: RequestId
    tasks: Annotated[tuple[TaskSpec, ...], Meta(max_length=SUBMIT_TASKS_MAX)]
    job_id: Int63 = 0
    job_name: ShortText = ""
    rates: Annotated[tuple[RateRule, ...], Meta(max_length=256)] = ()
    watch: bool = False


class CancelTasks(Wire, frozen=True, tag="cancel"):
    """Cancel these, or every open task of job_id."""

    request_id: RequestId
    task_ids: TaskIds = ()
    job_id: Int63 = 0


class RetryTasks(Wire, frozen=True, tag="retry"):
    """Put failed, dead or cancelled tasks back into the queue, with their counts at zero."""

    request_id: RequestId
    task_ids: TaskIds


class DrainDevice(Wire, frozen=True, tag="drain"):
    """on: give it nothing new and take back what has not begun. off: resume."""

    request_id: RequestId
    device_id: DeviceName
    on: bool = True


class SetStrategy(Wire, frozen=True, tag="strategy"):
    """Change how devices are picked, from the next dispatch on."""

    request_id: RequestId
    strategy: Strategy


class CreateToken(Wire, frozen=True, tag="token"):
    """Let the holder of this bootstrap key enrol keys of role, uses times, until expires (wall)."""

    request_id: RequestId
    token_id: ShortText
    public_key: PublicKey
    role: Role
    expires_wall_ms: WallMs
    uses: Annotated[int, Meta(ge=1, le=1_000_000)]


class RevokeToken(Wire, frozen=True, tag="revoke_token"):
    """Nobody enrols with this token from now on."""

    request_id: RequestId
    token_id: ShortText


class RevokeDevice(Wire, frozen=True, tag="revoke_device"):
    """Its key is refused from the next message on; its tasks go elsewhere."""

    request_id: RequestId
    device_id: DeviceName


class Watch(Wire, frozen=True, tag="watch"):
    """Tell me when these end (or all of job_id), until I go away. Already ended: told at once."""

    request_id: RequestId
    task_ids: TaskIds = ()
    job_id: Int63 = 0


class AskOverview(Wire, frozen=True, tag="ask_overview"):
    """How is the cluster?"""

    request_id: RequestId


class AskDevices(Wire, frozen=True, tag="ask_devices"):
    """Which devices are there? device_id: only this one."""

    request_id: RequestId
    device_id: Annotated[str, Meta(max_length=64)] = ""


class AskExplain(Wire, frozen=True, tag="ask_explain"):
    """Why is this task not running yet?"""

    request_id: RequestId
    task_id: TaskRefId


# --- the master to a client ---------------------------------------------------------------------


class Refused(Wire, frozen=True, tag="refused"):
    """No, and why. request_id: empty when the refused thing had none (a Hello)."""

    request_id: Annotated[bytes, Meta(max_length=32)]
    code: RefusalCode
    problem: ErrorText


class Submitted(Wire, frozen=True, tag="submitted"):
    """On disk. task_ids: one for each submitted task, in order. existing: positions (from 0) that
    were not queued, because a task with that unique key was there already."""

    request_id: RequestId
    job_id: Int63
    task_ids: TaskIds
    existing: Annotated[tuple[Count32, ...], Meta(max_length=SUBMIT_TASKS_MAX)] = ()


class Untouched(Wire, frozen=True):
    """A task a request did not change, and why."""

    task_id: TaskRefId
    why: ShortText


class Changed(Wire, frozen=True, tag="changed"):
    """On disk. For requests on devices and tokens both lists are empty."""

    request_id: RequestId
    task_ids: Annotated[tuple[TaskRefId, ...], Meta(max_length=100_000)] = ()
    untouched: Annotated[tuple[Untouched, ...], Meta(max_length=100_000)] = ()


class TaskEnd(Wire, frozen=True):
    """A task that reached a terminal state."""

    task_id: TaskRefId
    state: TaskState
    result: Annotated[bytes, Meta(max_length=RESULT_BYTES_MAX)] = b""
    error: ErrorText = ""
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class Finished(Wire, frozen=True, tag="finished"):
    """Ends of watched tasks. Repeats are possible after a reconnect; task_id tells them apart."""

    request_id: RequestId
    ends: Annotated[tuple[TaskEnd, ...], Meta(max_length=SUBMIT_TASKS_MAX)]


class Answer(Wire, frozen=True, tag="answer"):
    """The answer to an Ask: one MessagePack map of the shape in views.py."""

    request_id: RequestId
    body: Annotated[bytes, Meta(max_length=3 * 1024 * 1024)]


WorkerMessage = Hello | Heartbeat | Started | Results | Returned | Progress | RateReport | Goodbye
ClientMessage = (
    Submit
    | CancelTasks
    | RetryTasks
    | DrainDevice
    | SetStrategy
    | CreateToken
    | RevokeToken
    | RevokeDevice
    | Watch
    | AskOverview
    | AskDevices
    | AskExplain
)
ToWorker = Enrolled | Welcome | Assign | ResultAck | HeartbeatAck | Abort | HelloAgain | Refused
ToClient = Submitted | Changed | Finished | Answer | Refused | Enrolled
Inbound = Enrol | WorkerMessage | ClientMessage
Outbound = ToWorker | ToClient
Message = Inbound | Outbound | Hint
