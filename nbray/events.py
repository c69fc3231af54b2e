"""The facts that a node reports: the vocabulary of history, lineage, timeline and the tables of ``nbray.state``.

A node appends events and ships them in batches (``nbray.gcs.client``); the GCS stores a batch as it came and decodes it only when
somebody asks. So an event must be cheap to make: about 0.15 µs for the struct, 0.2 µs for its share of the encoding.

Task events and the rarer `Fact` events travel as two lists of one batch: a question about tasks never decodes the facts, nor the other
way round, and a list of one type needs no tag per event. The node id is a property of the batch, not of the event.

Times are seconds of the host's monotonic clock; 0.0 means "did not happen (yet)". Ids are bytes (``nbray.ids``). No event holds the
value of an argument, of a result or of an environment variable.
"""

from __future__ import annotations

from typing import Any

import msgspec

from nbray.messages import ACTOR_CALL, CREATE_ACTOR, TASK

TASK_KINDS = {TASK: "TASK", CREATE_ACTOR: "ACTOR_CREATION", ACTOR_CALL: "ACTOR_CALL"}

WAITING, QUEUED, DISPATCHED, RUNNING, FINISHED, FAILED, CANCELLED, RETRIED = range(8)
"""States of a task: for inputs, for resources, sent to a worker, started there; then how it ended. RETRIED: this attempt failed, another follows."""

TASK_STATES = ("WAITING", "QUEUED", "DISPATCHED", "RUNNING", "FINISHED", "FAILED", "CANCELLED", "RETRIED")


class TaskEvent(msgspec.Struct, array_like=True, gc=False):
    """One attempt of a task or actor call that has ended; also the row of a task that has not (`Page.live`), with later phases 0.0.

    ``name``: of the function, or ``Class.method``. ``parent``: id of the task that submitted it, or the execution id of a driver.
    ``deps``: objects whose values were arguments (the data edges of the graph), None for none. ``size``: bytes of all its return values.
    ``error``: class name of the error, empty unless FAILED, CANCELLED or RETRIED.
    """

    task: bytes
    name: str
    kind: int
    state: int
    attempt: int
    pid: int
    job: int
    session: str
    cell: str
    function: bytes
    parent: bytes
    actor: bytes
    deps: list[bytes] | None
    returns: int
    size: int
    error: str
    submitted: float
    inputs_ready: float
    dispatched: float
    started: float
    finished: float
    sealed: float


class _Fact(msgspec.Struct, array_like=True, gc=False):
    """Base of the events that are not about tasks: tagged arrays."""


class ObjectEvent(_Fact, tag=1):
    """What happened to an object that is a ``put``, lies in the arena, escaped its node or has a name; small results have none.

    ``state``: SEALED, SPILLED, RESTORED, FREED or LOST. ``size`` in bytes.
    """

    object: bytes
    state: str
    time: float
    size: int = 0
    job: int = 0
    cell: str = ""


class ActorEvent(_Fact, tag=2):
    """An actor changed its state: PENDING, ALIVE, RESTARTING or DEAD (then ``reason`` says why)."""

    actor: bytes
    state: str
    time: float
    class_name: str
    name: str = ""
    namespace: str = ""
    pid: int = 0
    restarts: int = 0
    job: int = 0
    session: str = ""
    reason: str = ""


class WorkerEvent(_Fact, tag=3):
    """A worker process STARTED or ENDED. ``kind``: "task" or "actor"; ``reason``: why it ended, with the signal or exit status."""

    pid: int
    state: str
    time: float
    session: str = ""
    kind: str = ""
    reason: str = ""


Fact = ObjectEvent | ActorEvent | WorkerEvent


class ObjectRow(msgspec.Struct, array_like=True, gc=False):
    """An object that exists. ``state``: PENDING, INLINE, ERROR (reading it raises), ARENA, SPILLED or LOST; ``holders``: one text per holder, such as ``driver 4711``."""

    object: bytes
    size: int
    state: str
    nodes: list[str]
    holders: list[str]


class ActorRow(msgspec.Struct, array_like=True, gc=False):
    """An actor that is not dead; states as in `ActorEvent`."""

    actor: bytes
    class_name: str
    name: str
    state: str
    pid: int
    restarts: int
    namespace: str = ""
    job: int = 0


class WorkerRow(msgspec.Struct, array_like=True, gc=False):
    """A worker process. ``state``: STARTING, IDLE, RUNNING or BLOCKED; ``task``: name of what it runs; ``kind``: "task" or "actor"."""

    pid: int
    state: str
    task: str
    session: str
    kind: str
    memory: int = 0


class NameRow(msgspec.Struct, array_like=True, gc=False):
    """A name of a notebook's session and what it stands for. ``job``: the kernel run that it belongs to, ``live``: whether that is connected;
    ``cell``: label of the cell that binds it, ``origin``: what was said of how it makes it. ``state``: READY, SPILLED or LOST; RUNNING while ``task`` is
    still to bind it, which was submitted ``age`` seconds ago; FAILED if it has failed (``why``) while its kernel was away. ``size`` in bytes.
    """

    session: str
    name: str
    object: bytes
    task: bytes
    job: int
    cell: str
    version: int
    size: int
    state: str
    live: bool
    origin: bytes = b""
    age: float = 0.0
    why: str = ""


class SavedName(msgspec.Struct, array_like=True, gc=False):
    """A name whose value is on disk to outlive the cluster; fields as in `NameRow`."""

    name: str
    cell: str
    version: int
    size: int
    origin: bytes = b""


class NodeRow(msgspec.Struct, array_like=True, gc=False):
    """A node. ``resources`` and ``available`` in units of 1/10000; ``state``: ALIVE, DRAINING or DEAD."""

    node: str
    state: str
    resources: dict[str, int]
    available: dict[str, int]
    pid: int
    socket: str = ""


class PlaceRow(msgspec.Struct, array_like=True, gc=False):
    """Where the code of a running task is. ``seconds``: since it started; ``blocked``: it waits in ``get`` or ``wait``.

    ``frames``: file, line, function of the user's frames, the innermost last; None when its worker has not answered.
    """

    task: bytes
    name: str
    cell: str
    session: str
    pid: int
    seconds: float
    blocked: bool
    frames: list[tuple[str, int, str]] | None


class WaitRow(msgspec.Struct, array_like=True, gc=False):
    """What a task that has not ended waits for.

    ``reason``: INPUTS (``objects`` do not exist yet), RESOURCES (``needs``, of which too few are ``free``; ``tasks`` hold them), INFEASIBLE (the
    cluster never has that many), MEMORY (room for its inputs), STARTING (a worker), BEHIND or ACTOR (``tasks`` run before it in its process; ``ahead``:
    how many; ``actor_state``), BLOCKED (it runs, and waits for ``objects``), RUNNING. Amounts in units of 1/10000; ``tasks``: (id, name, what it holds).
    """

    task: bytes
    name: str
    reason: str
    objects: list[bytes] = []
    needs: dict[str, int] = {}
    total: dict[str, int] = {}
    free: dict[str, int] = {}
    ahead: int = 0
    tasks: list[tuple[bytes, str, dict[str, int]]] = []
    actor_state: str = ""


class PhaseRow(msgspec.Struct, array_like=True, gc=False):
    """Tasks of one name added up: how many ended how, and the seconds that they spent in each phase."""

    name: str
    tasks: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    waiting_for_inputs: float = 0.0
    queued: float = 0.0
    starting: float = 0.0
    running: float = 0.0
    sealing: float = 0.0


class CountRow(msgspec.Struct, array_like=True, gc=False):
    """How many tasks of one name are in one state (an upper-case name) now."""

    name: str
    state: str
    tasks: int


class FailureRow(msgspec.Struct, array_like=True, gc=False):
    """An error of a cell's tasks: ``tasks`` of them raised it, ``dependants`` failed because they needed one of those. ``task``: the first one."""

    name: str
    text: str
    tasks: int
    dependants: int
    task: bytes
    task_name: str


class CellRow(msgspec.Struct, array_like=True, gc=False):
    """The tasks of a cell in numbers (``engine.query("cells", label)``). ``ran``: how many have run and ended, in ``seconds`` of run time together.

    ``out``, ``read``: bytes of their results and inputs. ``first``, ``last``: when the first was submitted and the last one ended, ``now``: the
    moment of the answer. ``running``: process id of each worker at it, and its task; what is neither running nor over is queued.
    """

    cell: str
    submitted: int
    finished: int
    failed: int
    cancelled: int
    ran: int
    seconds: float
    out: int
    read: int
    first: float
    last: float
    now: float
    running: list[tuple[int, bytes]]
    failures: list[FailureRow]


class Page(msgspec.Struct):
    """The answer to ``engine.query("tasks" | "actors" | "workers" | "objects" | "nodes" | "summary", argument)``, as a map.

    ``argument``: a dict with fields of `nbray.gcs.messages.HistoryFilter`. The head fills in all but ``live``.

    ``history``: per batch its node id and its events, encoded (task events or facts, by the question), oldest first; from the head and, what
    it has not acknowledged yet, from the node itself (``nbray.gcs.client`` merges them). ``live``: per node its id and the rows of what
    exists now: `TaskEvent` (tasks; at most ``limit`` of them), `ObjectRow`, `ActorRow`, `WorkerRow`, `NodeRow`, `CountRow` (summary; tasks that have
    not ended). ``rows``: records of a table of the head, or `PhaseRow` (summary).
    ``sequence``: the last batch of the asking node that the head had stored when it looked (a huge number in all but the newest page).
    ``older``: pass it as ``before`` to get the page before this one, 0 when there is none.
    """

    history: list[tuple[str, bytes]] = []
    live: list[tuple[str, list[Any]]] = []
    rows: list[Any] = []
    sequence: int = 0
    older: int = 0
