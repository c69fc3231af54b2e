"""What a node and the head say to one another.

Frames as everywhere (``nbray.transport.frames``): a msgpack array of tagged arrays. Two ways to change state (protocol section 8):

- `Batch`: events, appended unread; identified by (node incarnation, sequence), acknowledged once they are on disk.
- `Op`: a compare-and-swap on one row of a table, answered by `OpReply` once it is on disk; identified by (node incarnation, request),
  so that one sent again after a lost connection is carried out once and answered with the same reply.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 1

ALIVE, DRAINING, DEAD = "ALIVE", "DRAINING", "DEAD"
"""States of a node."""


# -- operations -------------------------------------------------------------------------------------------------------------------


class _Operation(msgspec.Struct, array_like=True, gc=False):
    """Base of all operations: a tagged array."""


class RegisterJob(_Operation, tag=1):
    """A driver has connected. Always succeeds; data: the msgpack-encoded job number, larger than any before in this cluster."""

    session: str
    label: str
    pid: int
    role: str
    time: float = 0.0


class EndJob(_Operation, tag=2):
    """A driver has left; ``clean``: on purpose. Fails if the job is unknown or has ended before."""

    job: int
    clean: bool
    time: float = 0.0


class ActorNamed(_Operation, tag=3):
    """Give an actor a name, if it is free in the namespace (or the actor has it already).

    ``info``: encoded `nbray.messages.ActorInfo`. Fails if the name is taken; data: the ``info`` of the actor that has it.
    """

    namespace: str
    name: str
    actor: bytes
    info: bytes
    job: int
    session: str = ""
    detached: bool = False


class ActorRemoved(_Operation, tag=4):
    """Free the name if this actor has it; fails if another one has, or nobody."""

    namespace: str
    name: str
    actor: bytes


class NameBind(_Operation, tag=5):
    """A name of a session now stands for this object. Always succeeds; data: the id of the object it stood for before, or empty."""

    session: str
    name: str
    object: bytes
    job: int
    cell: str = ""


class NameUnbind(_Operation, tag=6):
    """A name is no more. With ``object``, only if it stands for that. Fails otherwise; data: the id of the object it stood for."""

    session: str
    name: str
    object: bytes = b""


class NodeState(_Operation, tag=7):
    """A node is ALIVE, DRAINING or DEAD. Fails if the incarnation is not the current one, or is DEAD already.

    Death ends the node's jobs and frees the names of its actors.
    """

    node: str
    incarnation: int
    state: str
    reason: str = ""
    time: float = 0.0


class PutFunction(_Operation, tag=8):
    """Keep a pickled function or class under its content id. Fails (harmlessly) if it is there already."""

    function: bytes
    name: str
    blob: bytes


Operation = RegisterJob | EndJob | ActorNamed | ActorRemoved | NameBind | NameUnbind | NodeState | PutFunction


# -- records of the tables (answers to `Query`) -----------------------------------------------------------------------------------


class NodeRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A node, in its last known incarnation. ``resources`` in units of 1/10000; ``reason``: why it is not ALIVE."""

    node: str
    incarnation: int
    state: str
    pid: int
    resources: dict[str, int]
    socket: str
    reason: str = ""


class JobRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One driver's run. ``ended``: 0.0 while it is connected."""

    job: int
    session: str
    label: str
    pid: int
    role: str
    node: str
    started: float
    ended: float = 0.0
    clean: bool = False


class ActorRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """An actor that has a name."""

    namespace: str
    name: str
    actor: bytes
    info: bytes
    job: int
    session: str
    detached: bool
    node: str


class NameRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What a name of a session stands for; ``version`` grows by one with each binding."""

    session: str
    name: str
    object: bytes
    job: int
    cell: str
    version: int


class FunctionRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A function or class that the head keeps; its ``size`` pickled bytes are asked for with ``Query("function", id)``."""

    function: bytes
    name: str
    size: int


# -- node to head -----------------------------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages: a tagged array."""


class RegisterNode(_Message, tag=1):
    """First message of a connection, and of every later one of the same incarnation.

    ``incarnation`` grows with each start of the node (its start time in ns): the largest known fences all others, and ends the jobs and
    frees the actor names of the earlier ones. The head serves one cluster: the first ``cluster`` it hears of.
    """

    protocol: int
    node: str
    incarnation: int
    pid: int
    cluster: bytes
    resources: dict[str, int]
    socket: str = ""
    time: float = 0.0


class Batch(_Message, tag=2):
    """Events of a node; ``sequence`` counts from 1. ``tasks``: an encoded list of `nbray.events.TaskEvent`, ``facts`` one of
    `nbray.events.Fact`; empty bytes for an empty list. ``count``: how many task events.
    """

    incarnation: int
    sequence: int
    count: int
    tasks: bytes
    facts: bytes


class Op(_Message, tag=3):
    """Carry out an operation. All requests up to ``settled`` are answered and will not be sent again: their replies can be forgotten."""

    request: int
    settled: int
    operation: Operation


class Query(_Message, tag=4):
    """Ask without changing anything. ``argument``: msgpack, a map of the fields of `HistoryFilter` or `TableFilter`.

    ``what``: tasks, actors, workers, summary (answered by an encoded `nbray.events.Page` with ``history`` or ``rows``); jobs, nodes, names,
    named_actors, functions (a Page with the records as ``rows``); function (argument: id; the pickled bytes); head (a map of facts
    about the head itself).
    """

    request: int
    what: str
    argument: bytes = b""


class Stop(_Message, tag=5):
    """End: all that was received is written first."""

    reason: str = ""


class HistoryFilter(msgspec.Struct):
    """Which events: the newest ``limit`` of those that match all that is given. ``state``: an upper-case name. ``before``: `Page.older`."""

    limit: int = 10_000
    before: int = 0
    name: str = ""
    state: str = ""
    session: str = ""
    job: int = 0
    cell: str = ""
    parent: bytes = b""
    task: bytes = b""


class TableFilter(msgspec.Struct):
    """Which records of a table: those in this session or namespace, with this name; all, when nothing is given."""

    session: str = ""
    namespace: str = ""
    name: str = ""


# -- head to node -----------------------------------------------------------------------------------------------------------------


class NodeRegistered(_Message, tag=20):
    """Answer to `RegisterNode`. ``error``: why the node is refused (fenced, another cluster, another protocol), else empty.

    ``sequence``: the last batch of this incarnation that is on disk: what came after is to be sent again. ``head``: pid of the head.
    """

    error: str
    sequence: int
    head: int


class Ack(_Message, tag=21):
    """All batches up to this one are on disk."""

    sequence: int


class OpReply(_Message, tag=22):
    """``ok`` and ``data`` as the operation says."""

    request: int
    ok: bool
    data: bytes


class QueryReply(_Message, tag=23):
    """``error`` is empty, or a text for people."""

    request: int
    error: str
    data: bytes


class Trouble(_Message, tag=24):
    """The head cannot write (a full disk, say) and acknowledges nothing until it can; empty text: it can again."""

    text: str


NodeToHead = RegisterNode | Batch | Op | Query | Stop
HeadToNode = NodeRegistered | Ack | OpReply | QueryReply | Trouble
