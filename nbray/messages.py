"""What the processes say to one another: one schema for every transport (design section 3).

A frame is a msgpack array of these messages, each a tagged array. ``ClientToNode`` is what drivers and workers say to their node,
``NodeToClient`` the answers; workers understand a few more in both directions. Ids are bytes (``nbray.ids``). A *value* travels as
``kind, data, refs``: kind of payload (``nbray.store.serialization``), its bytes, ids of the refs contained in it. A value in the arena
travels as ``kind, offset, size, refs``. Times are seconds of the host's monotonic clock.

``gc=False``: a message never takes part in a reference cycle, so the collector need not look at it.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL = 1

TASK, CREATE_ACTOR, ACTOR_CALL = 0, 1, 2
"""Kinds of `TaskClass`."""

STREAMING = -1
"""``num_returns`` of a generator task."""

DRIVER, WORKER, OBSERVER = "driver", "worker", "observer"
"""Roles in `Hello`; an observer only asks (`Query`), it is not counted as a user of the cluster."""


class TaskClass(msgspec.Struct, array_like=True, gc=False):
    """What all submissions of one function with one set of options share; registered once per connection.

    ``resources`` in units of 1/10000. ``function``: content id of the pickled function (or actor class). ``environment``: id of the part
    of the task's world that needs a worker process of its own. For an actor call ``name`` is the method.
    """

    kind: int
    function: bytes
    name: str
    resources: dict[str, int]
    num_returns: int = 1
    max_retries: int = 3
    retry_exceptions: bool = False
    max_calls: int = 0
    priority: int = 0
    environment: bytes = b""
    backpressure: int = 0
    concurrency_group: str = ""


class ActorOptions(msgspec.Struct, array_like=True, gc=False):
    """What only an actor has. ``mode``: "serial", "threaded" or "async"; ``methods``: the table its handles are made of (opaque)."""

    class_name: str
    mode: str
    max_restarts: int = 0
    max_task_retries: int = 0
    max_concurrency: int = 1
    groups: dict[str, int] = {}
    actor_name: str = ""
    namespace: str = ""
    get_if_exists: bool = False
    detached: bool = False
    methods: bytes = b""
    hold_resources: bool = False


class ActorInfo(msgspec.Struct, array_like=True, gc=False):
    """What a handle is made of."""

    actor: bytes
    class_name: str
    mode: str
    methods: bytes
    name: str = ""
    namespace: str = ""


# -- client to node ---------------------------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages: a tagged array."""


class Hello(_Message, tag=1):
    """First message of a connection. ``session`` names the notebook or script; ``token`` is set by workers (the pool's number)."""

    protocol: int
    role: str
    pid: int
    session: str
    token: int = 0
    keep: bool = False
    label: str = ""
    namespace: str = ""


class Register(_Message, tag=2):
    """From now on ``number`` stands for this task class on this connection."""

    number: int
    spec: TaskClass


class Function(_Message, tag=3):
    """A pickled function or class under its content id; sent once per connection, before what uses it."""

    function: bytes
    blob: bytes
    name: str = ""


class World(_Message, tag=4):
    """The task's world as it is from now on for what this client submits; ``blob`` is empty when the node has it already.

    ``process``: id of the part of it that a running worker cannot take on (versions of the user's modules): another id, another process.
    ``sources``: ids of the sources of those modules, each sent as a `Function` before. ``installed``: when the last package was installed where the
    cluster's own processes load theirs from (nanoseconds): later than they did, and they are made anew.
    """

    world: bytes
    blob: bytes = b""
    process: bytes = b""
    sources: list[bytes] | None = None
    installed: int = 0


class Origin(_Message, tag=5):
    """The cell that what follows was submitted from: lineage, output routing, cancel scope."""

    cell: str


class Submit(_Message, tag=6):
    """A task, or a call of an actor's method (then ``task`` ends with the actor id).

    ``deps``: objects whose values are arguments, in order; ``refs``: objects that the arguments merely mention. Arguments above the inline
    limit lie in object ``args_object`` (``args`` is then empty).
    """

    task: bytes
    number: int
    kind: int
    args: bytes
    deps: list[bytes] | None = None
    refs: list[bytes] | None = None
    parent: bytes = b""
    args_object: bytes = b""


class CreateActor(_Message, tag=7):
    """The creation task of an actor: ``submit.task`` is the actor id. With ``request`` the node answers with an `ActorInfo` reply."""

    submit: Submit
    options: ActorOptions
    request: int = 0


class Put(_Message, tag=8):
    """A small object, by value."""

    object: bytes
    kind: int
    data: bytes
    refs: list[bytes] | None = None


class Create(_Message, tag=9):
    """Asks for ``size`` bytes of the arena; answered by `Created`, or by a failed `Reply`."""

    request: int
    object: bytes
    size: int


class Seal(_Message, tag=10):
    """The bytes of a created object are written and will never change again. ``held`` says whether the client keeps a ref."""

    object: bytes
    kind: int
    refs: list[bytes] | None = None
    held: bool = True


class Abort(_Message, tag=11):
    """Gives a created but unsealed object back."""

    object: bytes


class Get(_Message, tag=12):
    """Asks for objects. Each is answered by `Value` or `Located` when it is there (`Ready` if not ``fetch``).

    ``blocked``: the task ``task`` of the sending worker stops until ``count`` of them (0: all) are answered, or until `Unblocked` with the same
    ``request``. A failed `Reply` to ``request`` means that the wait can never end (a circle of waits). ``ends``: it ends by itself some time
    (it has a timeout, or is a thread's beside the task's own), so it is in no such circle.
    """

    objects: list[bytes]
    fetch: bool = True
    blocked: bool = False
    request: int = 0
    task: bytes = b""
    count: int = 0
    ends: bool = False


class Unblocked(_Message, tag=13):
    """The wait of a `Get` has ended early: the worker's task goes on."""

    request: int


class Hold(_Message, tag=14):
    """This process holds these objects from now on."""

    objects: list[bytes]


class Drop(_Message, tag=15):
    """This process no longer holds these objects."""

    objects: list[bytes]


class Unpin(_Message, tag=16):
    """No view of these arena objects is left in this process. ``counts``: how many `Located` of each it has received."""

    objects: list[bytes]
    counts: list[int]


class Cancel(_Message, tag=17):
    """Cancels a task or call (and with ``recursive`` what it submitted). ``cell`` instead of ``task``: all that the cell submitted."""

    task: bytes
    force: bool = False
    recursive: bool = True
    cell: str = ""


class KillActor(_Message, tag=18):
    """End the actor's process; ``no_restart``: for good."""

    actor: bytes
    no_restart: bool = True


class GetActor(_Message, tag=20):
    """Answered by a `Reply` with an encoded `ActorInfo`."""

    request: int
    name: str
    namespace: str


class Query(_Message, tag=21):
    """Asks for a table or a fact by name; answered by `Reply`."""

    request: int
    what: str
    argument: bytes = b""


class Free(_Message, tag=22):
    """Releases the values now, whoever holds them."""

    objects: list[bytes]


class StreamAck(_Message, tag=24):
    """The consumer has taken ``consumed`` items of a generator; ``drop``: it wants no more."""

    task: bytes
    consumed: int
    drop: bool = False


class Bye(_Message, tag=25):
    """The client leaves on purpose. Answered by `Reply`, whose data is not empty if the cluster ends.

    ``stop``: end the cluster; if somebody else uses it and not ``force``, the answer is an error and the client stays (``yielding``: it leaves).
    ``save``: what names hold is written to disk first.
    """

    request: int
    stop: bool = False
    force: bool = False
    yielding: bool = False
    save: bool = False


class Transient(_Message, tag=26):
    """Nobody will come back for this client: when its connection is lost, that is its end (unless it asked to ``keep`` the cluster).

    Not ``on``: somebody will, after all.
    """

    on: bool = True


class Names(_Message, tag=27):
    """This task will bind names of the session when it succeeds (`Bound`), these at least. ``version``: of this run of a cell, larger than that of
    every run before it in the session. ``origin``: kept with the names, for whoever asks how they were made.
    """

    task: bytes
    version: int
    names: list[str]
    origin: bytes = b""


class Unbind(_Message, tag=28):
    """The notebook has bound or deleted these names: what cells up to ``version`` bind them to is not held by them any more."""

    names: list[str]
    version: int


class Take(_Message, tag=29):
    """These names, bound or to be bound by an earlier job of the session, are this one's from now on; so are these named actors."""

    names: list[str]
    actors: list[str] = []


# -- worker to node ---------------------------------------------------------------------------------------------------------------


class Done(_Message, tag=40):
    """A task returned one small value. ``run``: the number under which the node dispatched it."""

    run: int
    started: float
    seconds: float
    kind: int
    data: bytes
    refs: list[bytes] | None = None


class DoneMany(_Message, tag=41):
    """A task returned other than one small value: per return a (kind, data, refs), kind -1 where the object was sealed before."""

    run: int
    started: float
    seconds: float
    values: list[tuple[int, bytes, list[bytes] | None]]


class Failed(_Message, tag=42):
    """User code raised (or its arguments could not be read): an error payload; ``retriable``: `retry_exceptions` allows another attempt."""

    run: int
    started: float
    seconds: float
    data: bytes
    retriable: bool
    refs: list[bytes] | None = None
    actor_exit: bool = False
    cancelled: bool = False


class Item(_Message, tag=43):
    """The next item of a generator; kind -1: sealed before."""

    run: int
    index: int
    kind: int
    data: bytes
    refs: list[bytes] | None = None


class Output(_Message, tag=45):
    """What a task wrote; in both directions. ``stream``: "stdout", "stderr", "log" or "display" (then ``text`` is JSON, see ``nbray.worker.display``).

    ``skipped``: lines that the task wrote before this text and that are not sent (its log has them); ``tasks``: other tasks all of whose output
    is among them. ``end``: the task has ended, after having been held back.
    """

    task: bytes
    stream: str
    text: str
    name: str = ""
    pid: int = 0
    cell: str = ""
    skipped: int = 0
    tasks: int = 0
    end: bool = False


class Leaving(_Message, tag=46):
    """The worker ends after this message (``max_calls`` reached, or the actor left by ``exit_actor``)."""

    reason: str


class Places(_Message, tag=48):
    """Where the code of this worker's running tasks is: per task its frames (file, line, function), the innermost last. No values."""

    places: list[tuple[bytes, list[tuple[str, int, str]]]]


class Largest(_Message, tag=49):
    """The largest variables of what this worker runs: name, type and bytes of each."""

    variables: list[tuple[str, str, int]]


class Bound(_Message, tag=47):
    """Before the report of a task that succeeds: it binds ``names`` to these objects (empty: to its own return value) and deletes others. From a driver,
    without a task: they are bound now.

    ``sizes``: bytes of each value, -1 for a module; ``version`` as in `Names`.
    """

    task: bytes
    attempt: int
    version: int
    names: list[str]
    objects: list[bytes]
    sizes: list[int]
    deleted: list[str]


# -- node to client ---------------------------------------------------------------------------------------------------------------


class Welcome(_Message, tag=60):
    """Answer to `Hello`; the arena's file descriptor comes along. ``execution``: what this client's ids are made of (drivers)."""

    protocol: int
    node: str
    cluster: bytes
    name: str
    execution: bytes
    span: int
    inline_limit: int
    resources: dict[str, int]
    details: dict[str, str]
    job: int = 0


class Created(_Message, tag=61):
    """Here the object's bytes go. ``warm``: these pages have been written before."""

    request: int
    object: bytes
    offset: int
    warm: bool


class Value(_Message, tag=62):
    """A small value."""

    object: bytes
    kind: int
    data: bytes
    refs: list[bytes] | None = None


class Located(_Message, tag=63):
    """The object lies in the arena and is pinned for this client until `Unpin`."""

    object: bytes
    kind: int
    offset: int
    size: int
    refs: list[bytes] | None = None


class Ready(_Message, tag=64):
    """The object is there, ``size`` bytes in the arena; ask for it with `Get`."""

    object: bytes
    size: int


class Reply(_Message, tag=65):
    """Answer to a request: ``error`` is empty, or the name of a class of ``nbray.errors`` and ``data`` its text."""

    request: int
    error: str
    data: bytes


class StreamEnd(_Message, tag=66):
    """A generator task has ended after ``length`` items (a last one that is an error included)."""

    task: bytes
    length: int


class Shutdown(_Message, tag=68):
    """The cluster ends."""

    reason: str


# -- node to worker ---------------------------------------------------------------------------------------------------------------


class Adopt(_Message, tag=80):
    """A fresh worker becomes one of this session; ``cpus``: threads that numeric libraries may use, ``gpus``: the ids it may see."""

    session: str
    environment: bytes
    blob: bytes
    cpus: int
    gpus: list[int]
    cluster: bytes
    seed: bytes
    actor: bytes = b""


class Run(_Message, tag=81):
    """Run a task. ``started``: at once; else when its byte comes through the token pipe. ``deps``: the values of the arguments that were refs,
    as (object, kind, data, refs) or, in the arena, (object, kind, offset, size, refs).
    """

    run: int
    task: bytes
    number: int
    kind: int
    args: bytes
    refs: list[bytes] | None = None
    deps: list[tuple[Any, ...]] | None = None
    attempt: int = 0
    started: bool = True
    args_at: tuple[int, int] | None = None
    cell: str = ""
    args_object: bytes = b""


class Interrupt(_Message, tag=82):
    """Cancel a running call of an async or threaded actor, or drop one that is queued in the worker."""

    task: bytes


class Revoke(_Message, tag=83):
    """These dispatched runs were taken back."""

    runs: list[int]


class Configure(_Message, tag=84):
    """The actor that this worker is: how it runs its calls."""

    actor: bytes
    options: ActorOptions
    restarts: int


class Exit(_Message, tag=85):
    """End after what runs (``graceful``), or now."""

    graceful: bool


class StreamRoom(_Message, tag=86):
    """The consumer of a generator has taken ``consumed`` items; -1: it wants no more."""

    task: bytes
    consumed: int


ClientToNode = (
    Hello | Register | Function | World | Origin | Submit | CreateActor | Put | Create | Seal | Abort | Get | Unblocked | Hold | Drop | Unpin
    | Cancel | KillActor | GetActor | Query | Free | StreamAck | Bye | Transient | Names | Unbind | Take
    | Done | DoneMany | Failed | Item | Output | Leaving | Bound | Places | Largest
)  # fmt: skip

NodeToClient = (
    Welcome | Created | Value | Located | Ready | Reply | StreamEnd | Shutdown | Output | Register | Function | World
    | Adopt | Run | Interrupt | Revoke | Configure | Exit | StreamRoom
)  # fmt: skip
