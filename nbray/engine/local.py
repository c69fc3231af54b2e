"""The engine of the bundled runtime: a driver's or worker's connection to its node.

What the process knows is in a pure machine (``nbray.api.machine``), how bytes move in ``nbray.transport.link``; this file joins them with the arena's
memory and turns the engine's verbs into messages and waits.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import ids, platform
from nbray.api import context
from nbray.api.machine import ERROR_KIND, LOCATED, PENDING, READY, VALUE, ClientMachine, Entry, Scope, Stream
from nbray.api.refs import ObjectRef, ObjectRefGenerator
from nbray.config import HEAD_PATIENCE, IDLE_PIN, NODE_PATIENCE, PENDING_LIMIT, SPAN
from nbray.engine.awaited import Awaited
from nbray.engine.base import Engine
from nbray.engine.forks import Forks
from nbray.errors import GetTimeoutError, NbrayError, NodeDiedError, NotInitializedError, StoreFullError
from nbray.failure_codec import decode_error, system_error
from nbray.ids import FIRST_INDEX, IdSource
from nbray.messages import (
    STREAMING,
    WORKER,
    ActorInfo,
    ActorOptions,
    Bound,
    Bye,
    Cancel,
    Create,
    CreateActor,
    Created,
    Function,
    GetActor,
    Hello,
    KillActor,
    Names,
    NodeToClient,
    Origin,
    Output,
    Put,
    Query,
    Register,
    Reply,
    Seal,
    Shutdown,
    StreamAck,
    Submit,
    Take,
    TaskClass,
    Transient,
    Unbind,
    Unblocked,
    Welcome,
)
from nbray.store import serialization
from nbray.store.memory import SharedMemory
from nbray.transport.link import Interrupts, Link, greet

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbray.api.context import TaskContext

_DETAIL_LIMIT = 200
_SCOPES = 8
_engines: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


class LocalEngine(Engine):
    """A connection to the node of this machine. ``welcome``: what the node said of itself and of this client."""

    def __init__(
        self,
        sock: socket.socket,
        arena: int | SharedMemory,
        hello: Hello,
        interrupts: Interrupts | None = None,
        *,
        life: int = -1,
    ) -> None:
        """Says ``hello`` over ``sock`` and waits for the answer; ``arena``: the shared memory, or a descriptor of it, owned from now on;
        ``life``: as for `SharedMemory.attach`.

        Raises OSError when the node does not answer, NbrayError when it refuses.
        """
        welcome, early, reader = greet(sock, hello, NodeToClient, (Welcome, Shutdown))
        if isinstance(welcome, Shutdown):
            raise NbrayError(welcome.reason)
        self.welcome: Welcome = welcome
        self._patience = float(welcome.details.get("head_patience", HEAD_PATIENCE)) + NODE_PATIENCE
        worker = hello.role == WORKER
        self.worker = worker
        self.memory = SharedMemory.attach(arena, welcome.span, life) if isinstance(arena, int) else arena
        self.machine = ClientMachine(welcome.inline_limit)
        self.entries = self.machine.entries
        self.link = Link(
            sock,
            reader,
            self.machine.out,
            self._receive,
            self._before_send,
            self._lost,
            interrupts or Interrupts(),
            background_reads=not worker,
            spins=not worker and platform.available_cpus() > 1,
        )
        self.link.tidy = self._tidy
        self.link.after_read = self._call_back
        self.inbox: deque[Any] = deque()
        """Messages for the worker's own loop."""
        self.on_output: Callable[[Output], None] | None = None
        self.on_message: Callable[[Any], bool] | None = None
        """Takes messages that concern what a worker runs already; True when it has."""
        self.on_lost: Callable[[str], None] | None = None
        self.before_submit: Callable[[], None] | None = None
        self.closed = ""
        self.saves = False
        """Whether the results that names hold are written to disk when this process leaves."""
        self.running: TaskContext | None = None
        """What a worker's main thread runs: threads that the user's code starts work for it."""
        # A worker's own are for threads that outlive their task.
        self._ids = IdSource(welcome.execution or ids.execution_id(os.urandom(16), 0))
        self._specs: list[TaskClass] = []
        self._numbers: dict[bytes, int] = {}
        self._functions: set[bytes] = set()
        self._requests = iter(range(1, 1 << 62)).__next__
        self._replies: dict[int, Any] = {}
        self._abandoned: set[int] = set()
        """Requests whose answer nobody waits for any more."""
        self._lock = threading.Lock()
        self._fork_holds = False
        self._forks = Forks()
        self._tidied = 0.0
        self._origin = ""
        self._receive(early)
        _engines.add(self)

    # -- what comes in

    def look(self) -> None:
        """Take in what has come, without waiting: for code that runs long and wants to know."""
        self.link.poll_now()

    def _receive(self, messages: list[Any]) -> None:
        machine = self.machine
        machine.receive(messages)
        other = machine.other
        while other:
            message = other.popleft()
            kind = type(message)
            if kind is Reply or kind is Created:
                if message.request in self._abandoned:
                    self._abandoned.discard(message.request)
                else:
                    self._replies[message.request] = message
            elif kind is Output:
                if self.on_output is not None:
                    self.on_output(message)
            elif kind is Shutdown:
                self.closed = self.closed or f"the cluster has ended: {message.reason}"
            elif self.on_message is None or not self.on_message(message):
                self.inbox.append(message)

    def _call_back(self) -> None:
        due = self.machine.due
        while due:
            try:
                callback = due.popleft()
            except IndexError:
                return  # Another thread has taken it.
            callback()

    def _before_send(self) -> None:
        if self.machine.dropped or self.machine.unviewed:
            with self._lock:
                self.machine.settle_drops()

    def _tidy(self) -> bool:
        """In the background: give back what nobody uses. True while there is something to look at again."""
        machine = self.machine
        if self._forks:
            machine.unviewed.extend(self._forks.ended())
        if machine.dropped or machine.unviewed or machine.idle:
            now = time.monotonic()
            with self._lock:
                machine.settle_drops()
                if now - self._tidied >= IDLE_PIN:
                    self._tidied = now
                    machine.give_back_pins()
        return bool(machine.idle or self._forks)

    def _lost(self) -> None:
        if self.on_lost is not None:
            self.on_lost(self.link.dead)
        self._fail_futures()

    def _fail_futures(self) -> None:
        """Nothing will come any more: futures end with the error that says why."""
        for entry in list(self.entries.values()):
            if entry.callbacks:
                self.machine.call_back(entry)
        if self.machine.due:
            # What they call is the program's, and the caller holds locks.
            threading.Thread(target=self._call_back, name="nbray-futures", daemon=True).start()

    def _check(self) -> None:
        """Raises what explains why this engine cannot be used."""
        if self.closed:
            raise NotInitializedError(
                f"{self.closed}. Start again with nbray.init() (in a notebook: %cluster start); refs and handles of before are invalid."
            )
        if self.link.dead:
            raise NodeDiedError(
                f"the node process (pid {self.welcome.details.get('node_pid', '?')}) is gone: {self.link.dead}. Its log: "
                f"{self.welcome.details.get('failed_log', '?')} if it failed by itself. Start again with nbray.init() (in a notebook: %cluster start)."
            )

    def _wait(self, satisfied: Callable[[], bool], deadline: float | None) -> bool:
        done = self.link.wait(satisfied, deadline)
        if not done and (self.link.dead or self.closed):
            self._check()
        return done

    def _request(self, make: Callable[[int], Any], timeout: float | None = None) -> Any:
        """Send a request and wait for its reply: a `Created`, or the bytes of a `Reply`. Raises the error that the reply names."""
        number = self._requests()
        replies = self._replies
        self.machine.out.append(make(number))
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not self._wait(lambda: number in replies, deadline):
                raise GetTimeoutError(f"the node did not answer within {timeout:g} s")
        except BaseException:
            self._abandoned.add(number)
            if replies.pop(number, None) is not None:
                self._abandoned.discard(number)
            raise
        reply = replies.pop(number, None)
        if type(reply) is Reply:
            if reply.error:
                raise system_error(reply.error, reply.data.decode())
            return reply.data
        return reply

    # -- refs

    def dropped(self, object_id: bytes) -> None:
        self.machine.dropped.append(object_id)
        if self.link.cold and not self.closed:
            self.link.arm()

    def _unviewed(self, object_id: bytes) -> None:
        self.machine.unviewed.append(object_id)
        if self.link.cold and not self.closed:
            self.link.arm()

    def ref(self, object_id: bytes) -> ObjectRef[Any]:
        with self._lock:
            self.machine.count(object_id)
        return ObjectRef(object_id, self, True)

    def another_ref(self, object_id: bytes) -> ObjectRef[Any] | None:
        """A further ref of an object that this process has a ref of; None for any other, which may be gone."""
        with self._lock:
            entry = self.entries.get(object_id)
            if entry is None or entry.count <= 0 or self.closed:
                return None
            self.machine.count(object_id, borrowed=True)
        return ObjectRef(object_id, self, True)

    def raw(self, ref: ObjectRef[Any]) -> tuple[int, memoryview]:
        """Kind and bytes of an object as it lies in the store, read-only and pinned while a view of them lives. Raises as `get`."""
        entry = self._entry(ref)
        while True:
            if entry.state not in (VALUE, LOCATED):
                self._fetch([ref], [entry], None)
            if entry.state == VALUE:
                if entry.kind == ERROR_KIND:
                    raise self._error(entry)
                return entry.kind, memoryview(entry.data)
            view = self._pinned(ref._id, entry)
            if view is not None:
                return entry.kind, view

    def _pinned(self, object_id: bytes, entry: Entry) -> memoryview | None:
        """The bytes of an entry; None when they have been given back meanwhile."""
        with self._lock:
            if entry.state != LOCATED:
                return None
            entry.views += 1
            entry.used = True
        return self.memory.pinned(entry.offset, entry.size, partial(self._unviewed, object_id))

    def _entry(self, ref: ObjectRef[Any]) -> Entry:
        if ref._engine is not self:
            raise NotInitializedError(
                f"{ref!r} belongs to a cluster that this process is no longer connected to: run the code that made it again"
            )
        if ref._counted:
            entry = self.entries.get(ref._id)
            if entry is not None:
                return entry
        with self._lock:
            return self.machine.promote(ref)

    def borrow(self, refs: list[bytes] | None, scopes: list[Scope]) -> list[ObjectRef[Any]] | None:
        """Refs for a value that contains them; they live as long as the container whose ``scopes`` these are, or are held when it goes."""
        if not refs:
            return None
        made: list[ObjectRef[Any]] = [ObjectRef(object_id, self, False) for object_id in refs]
        scopes.append(Scope(made))
        return made

    def pinned_argument(self, object_id: bytes) -> Callable[[], None]:
        """The node has pinned this argument for us once: what to call when its last view is gone."""
        with self._lock:
            entry = self.entries.get(object_id)
            if entry is None:
                entry = self.entries[object_id] = Entry(0, False)
                entry.state = READY
            entry.pins += 1
            entry.views += 1
        return partial(self._unviewed, object_id)

    def close_scopes(self, scopes: list[Scope]) -> None:
        """A task has ended: hold what is left of the refs in its arguments."""
        with self._lock:
            self.machine.end_scopes(scopes)

    # -- tasks

    def register(self, spec: TaskClass, blob: bytes | None) -> int:
        key = msgspec.msgpack.encode(spec)
        number = self._numbers.get(key)
        if number is not None:
            return number
        with self._lock:
            number = self._numbers.get(key)
            if number is not None:
                return number
            out = self.machine.out
            self.add_blob(spec.function, blob, spec.name)
            number = len(self._specs)
            self._specs.append(spec)
            out.append(Register(number, spec))
            self._numbers[key] = number
            return number

    def add_blob(self, content: bytes, blob: bytes | None, name: str = "") -> None:
        """Make a blob (a pickled function, an environment) known to the node under its content id."""
        if blob is not None and content not in self._functions:
            self._functions.add(content)
            self.machine.out.append(Function(content, blob, name))

    def submit(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        spec = self._specs[number]
        task = self.ids().task_id()
        return self._submit(task, number, spec, args, kwargs)

    def call(self, actor: bytes, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        spec = self._specs[number]
        task = self.ids().call_id(actor)
        return self._submit(task, number, spec, args, kwargs)

    def _task(self) -> TaskContext | None:
        """The task that waits when this thread does: the thread's own, or the one that a worker of tasks runs beside it; None in a driver."""
        if not self.worker:
            return None
        return context.current_task.get() or self.running

    def ids(self) -> IdSource:
        """Where the ids of what this thread of execution makes come from: its task, or the driver."""
        running = context.current_task.get() or self.running
        if running is None:
            return self._ids
        source = running.ids
        if source is None:
            source = running.ids = IdSource(ids.execution_id(running.task, running.attempt))
        return source

    def _message(
        self, task: bytes, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Submit, ObjectRef[Any] | None]:
        """The submission, and a ref that keeps large arguments alive until it is sent."""
        if self.before_submit is not None:
            self.before_submit()
        if self.closed or self.link.dead:
            self._check()
        running = context.current_task.get() or self.running
        parent = b"" if running is None else running.task
        if not args and not kwargs:
            return Submit(task, number, 0, b"", None, None, parent), None
        self._promote_arguments(args, kwargs)
        packed = serialization.serialize_args(args, kwargs, self._specs[number].name)
        if packed.size <= self.machine.inline_limit:
            return Submit(task, number, packed.kind, packed.flat(), packed.deps, packed.refs, parent), None
        stored = self._store(packed)
        return Submit(task, number, packed.kind, b"", packed.deps, packed.refs, parent, stored._id), stored

    def _promote_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if type(value) is ObjectRef:
                self._entry(value)

    def _submit(
        self, task: bytes, number: int, spec: TaskClass, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        message, _kept = self._message(task, number, args, kwargs)
        machine = self.machine
        returns = spec.num_returns
        result: Any
        if returns == 1:
            object_id = task + FIRST_INDEX
            machine.own(object_id)
            result = ObjectRef(object_id, self, True)
        elif returns == STREAMING:
            machine.streams[task] = Stream()
            result = ObjectRefGenerator(task, self)
        elif returns == 0:
            result = None
        else:
            names = [ids.return_id(task, index) for index in range(returns)]
            for object_id in names:
                machine.own(object_id)
            result = [ObjectRef(object_id, self, True) for object_id in names]
        machine.out.append(message)
        self.link.later()
        if machine.pending > PENDING_LIMIT:
            self._wait(lambda: machine.pending <= PENDING_LIMIT, None)
        return result

    # -- actors

    def create_actor(
        self, number: int, options: ActorOptions, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, ActorInfo | None]:
        actor = self.ids().task_id()
        message, _kept = self._message(actor, number, args, kwargs)
        # The node counts the creator as a holder; `hold_actor` counts the handle.
        created = Entry(0, True)
        if not options.actor_name:
            self.entries[actor + FIRST_INDEX] = created
            self.machine.out.append(CreateActor(message, options))
            self.link.later()
            return actor, None
        data = self._request(lambda request: CreateActor(message, options, request), self._patience)
        info = msgspec.msgpack.decode(data, type=ActorInfo)
        if info.actor == actor:
            self.entries[actor + FIRST_INDEX] = created
        return actor, info

    def hold_actor(self, actor: bytes) -> ObjectRef[Any]:
        return self.ref(actor + FIRST_INDEX)

    def kill_actor(self, actor: bytes, no_restart: bool) -> None:
        self._check()
        self.machine.out.append(KillActor(actor, no_restart))
        self.link.flush()

    def get_actor(self, name: str, namespace: str) -> ActorInfo:
        self._check()
        data = self._request(lambda request: GetActor(request, name, namespace), self._patience)
        return msgspec.msgpack.decode(data, type=ActorInfo)

    # -- objects

    def put(self, value: Any) -> ObjectRef[Any]:
        if self.closed or self.link.dead:
            self._check()
        packed = serialization.serialize(value)
        if packed.size > self.machine.inline_limit:
            return self._store(packed)
        object_id = self.ids().put_id()
        entry = self.entries[object_id] = Entry()
        # Made before anything can be interrupted: whatever happens below, it is let go with this ref.
        ref: ObjectRef[Any] = ObjectRef(object_id, self, True)
        entry.kind = packed.kind
        entry.data = packed.flat()
        entry.refs = packed.refs
        entry.state = VALUE
        self.machine.out.append(Put(object_id, packed.kind, entry.data, packed.refs))
        self.link.later()
        return ref

    def _store(self, packed: serialization.Serialized) -> ObjectRef[Any]:
        """Write a large value into the arena: a new object that this process holds."""
        object_id = self.ids().put_id()
        entry = self.entries[object_id] = Entry()
        ref: ObjectRef[Any] = ObjectRef(object_id, self, True)
        self.write(object_id, packed, held=True)
        entry.size = packed.size
        entry.state = READY
        return ref

    def write(self, object_id: bytes, packed: serialization.Serialized, *, held: bool) -> None:
        """Create an object in the arena, write it, seal it. Raises StoreFullError."""
        from nbray.messages import Abort

        if self.machine.idle:
            self._make_room()
        try:
            created = self._request(lambda request: Create(request, object_id, packed.size))
        except NbrayError:
            raise
        except BaseException:
            # Interrupted: the room may be granted all the same.
            self.machine.out.append(Abort(object_id))
            raise
        if type(created) is not Created:
            return  # An earlier execution of the task has made it, and it was seen: that one stays.
        try:
            packed.write_into(self.memory, created.offset, warm=created.warm)
        except BaseException:
            self.machine.out.append(Abort(object_id))
            raise
        self.machine.out.append(Seal(object_id, packed.kind, packed.refs, held))

    def get(
        self, refs: Sequence[ObjectRef[Any]], timeout: float | None, *, writable: bool = False
    ) -> list[Any]:
        if self.closed:
            self._check()
        entries = [self._entry(ref) for ref in refs]
        try:
            return self._get(refs, entries, timeout, writable)
        except StoreFullError as error:
            if type(error) is not StoreFullError or _bytes_at_once(entries) < self.welcome.span // SPAN // 2:
                raise
            raise StoreFullError(f"{error} {_in_pieces(entries)}") from None

    def _get(
        self, refs: Sequence[ObjectRef[Any]], entries: list[Entry], timeout: float | None, writable: bool
    ) -> list[Any]:
        for entry in entries:
            if entry.state != VALUE and entry.state != LOCATED:
                self._fetch(refs, entries, timeout)
                break
        values = []
        for ref, entry in zip(refs, entries, strict=True):
            while True:
                found, value = self.read(ref._id, entry, writable)
                if found:
                    values.append(value)
                    break
                self._fetch([ref], [entry], timeout)
        return values

    def read(self, object_id: bytes, entry: Entry, writable: bool) -> tuple[bool, Any]:
        """The value of an entry whose bytes are here; (False, None) when they have been given back meanwhile. Raises the error that the value is."""
        if entry.state == VALUE:
            if entry.kind == ERROR_KIND:
                raise self._error(entry)
            if entry.refs is None:
                return True, serialization.deserialize(
                    entry.kind, entry.data, None, writable=writable or None
                )
            return True, serialization.deserialize(
                entry.kind, entry.data, self._contained(entry), writable=writable or None
            )
        with self._lock:
            if entry.state != LOCATED:
                return False, None
            entry.views += 1
            entry.used = True
        release = partial(self._unviewed, object_id)
        if writable:
            view = self.memory.private(entry.offset, entry.size, release)
        else:
            view = self.memory.pinned(entry.offset, entry.size, release)
        return True, serialization.deserialize(entry.kind, view, self._contained(entry))

    def _error(self, entry: Entry) -> BaseException:
        """The error that a value is."""
        error = decode_error(entry.data)
        if isinstance(error, StoreFullError):
            # There was no room to bring it into memory: next time there may be.
            entry.state = READY
        return error

    def _contained(self, entry: Entry) -> list[ObjectRef[Any]] | None:
        if entry.refs is None:
            return None
        if entry.scopes is None:
            entry.scopes = []
        elif len(entry.scopes) > _SCOPES:
            entry.scopes = [scope for scope in entry.scopes if scope.survivors()]
        return self.borrow(entry.refs, entry.scopes)

    def _fetch(self, refs: Sequence[ObjectRef[Any]], entries: list[Entry], timeout: float | None) -> None:
        """Wait until all bytes are here, or one of the values is an error."""
        if self.closed or self.link.dead:
            self._check()
        missing: dict[bytes, Entry] = {}
        for ref, entry in zip(refs, entries, strict=True):
            if entry.state != VALUE and entry.state != LOCATED:
                missing[ref._id] = entry
            elif entry.state == VALUE and entry.kind == ERROR_KIND:
                return
        machine = self.machine
        if len(missing) > 1 and _bytes_at_once(entries) > (store := self.welcome.span // SPAN):
            raise StoreFullError(f"the object store holds {store / 2**20:.1f} MB in all.")
        if machine.idle:
            self._make_room(entries)
        for entry in missing.values():
            entry.came = False
        running = self._task()
        request = 0
        if running is not None:
            request = self._requests()
            ends = timeout is not None or running.thread != threading.get_ident()
            machine.ask(list(missing), blocked=True, request=request, task=running.task, ends=ends)
        else:
            machine.ask(list(missing))
        waiting = iter(missing.values())
        current = next(waiting)
        errors = machine.errors
        single = len(missing) == 1

        def satisfied() -> bool:
            nonlocal current, errors
            # Bytes that came count even when they have been given back meanwhile: `get` asks for them again.
            while current.state == VALUE or current.came:
                following = next(waiting, None)
                if following is None:
                    return True
                current = following
            if not single and machine.errors != errors:
                errors = machine.errors
                return any(entry.kind == ERROR_KIND and entry.state == VALUE for entry in missing.values())
            return request in self._replies

        deadline = None if timeout is None else time.monotonic() + timeout
        complete = False
        try:
            complete = self._wait(satisfied, deadline)
        finally:
            if request:
                refused = self._replies.pop(request, None)
                if refused is not None:
                    raise system_error(refused.error, refused.data.decode())
                if not complete or not (current.state == VALUE or current.came):
                    machine.out.append(Unblocked(request))
                    self.link.flush()
        if not complete:
            raise self._timeout(missing, timeout)
        if any(entry.kind == ERROR_KIND and entry.state == VALUE for entry in missing.values()):
            for entry in entries:
                if entry.kind == ERROR_KIND and entry.state == VALUE:
                    raise self._error(entry)

    def _make_room(self, entries: Sequence[Entry] = ()) -> None:
        """Before more memory is asked for: give back what has not been used since the last time, but for these."""
        with self._lock:
            for entry in entries:
                entry.used = True
            self.machine.settle_drops()
            self.machine.give_back_pins()

    def pause(self, task: bytes) -> int:
        """This task of a worker waits for something that is no object; others may use its CPU until `resume` with this number."""
        request = self._requests()
        self.machine.ask([], fetch=False, blocked=True, request=request, task=task, count=1)
        return request

    def resume(self, request: int) -> None:
        """A paused task goes on."""
        self.machine.out.append(Unblocked(request))

    def _timeout(self, missing: dict[bytes, Entry], timeout: float | None) -> GetTimeoutError:
        late = [ids.short(object_id) for object_id, entry in missing.items() if entry.state == PENDING]
        shown = ", ".join(late[:5]) + (f" and {len(late) - 5} more" if len(late) > 5 else "")
        return GetTimeoutError(
            f"not there after {timeout:g} s: {shown or 'the bytes of the values'}. The tasks go on; get them again later."
        )

    def wait(
        self, refs: Sequence[Any], num_returns: int, timeout: float | None, fetch_local: bool
    ) -> tuple[list[Any], list[Any]]:
        entries = self.entries
        found: list[int] = []
        for index, ref in enumerate(refs):
            entry = entries.get(ref._id) if type(ref) is ObjectRef else None
            if entry.state if entry is not None else self._has_item(ref):
                found.append(index)
                if len(found) == num_returns:
                    break
        else:
            if timeout == 0:
                self.link.flush()
                self.link.poll_now()
            found = self._wait_more(refs, num_returns, timeout)
        if self.link.dead or self.closed:
            self._check()
        if len(found) == 1:
            index = found[0]
            rest = list(refs)
            return [rest.pop(index)], rest
        chosen = set(found)
        return [refs[index] for index in found], [
            ref for index, ref in enumerate(refs) if index not in chosen
        ]

    def failed(self, refs: Sequence[ObjectRef[Any]]) -> int:
        entries = [self.entries.get(ref._id) for ref in refs]
        return sum(
            entry is not None and entry.state == VALUE and entry.kind == ERROR_KIND for entry in entries
        )

    def _has_item(self, ref: Any) -> bool:
        if isinstance(ref, ObjectRefGenerator):
            stream = self.machine.streams.get(ref._task)
            return stream is None or stream.taken in stream.ready or 0 <= stream.length <= stream.taken
        return self._entry(ref).state != PENDING

    def _awaited(self, ref: Any) -> bytes:
        """The object that makes a ref or a generator ready."""
        if isinstance(ref, ObjectRefGenerator):
            return ids.return_id(ref._task, self.machine.streams[ref._task].taken)
        object_id: bytes = ref._id
        return object_id

    def _wait_more(self, refs: Sequence[Any], num_returns: int, timeout: float | None) -> list[int]:
        entries = [self._entry(ref) if type(ref) is ObjectRef else None for ref in refs]
        asked: list[bytes] = []
        for ref, entry in zip(refs, entries, strict=True):
            if entry is not None and entry.state == PENDING and not entry.asked:
                entry.asked = True
                asked.append(ref._id)
        running = self._task()
        request = 0
        ready = sum(
            1
            for ref, entry in zip(refs, entries, strict=True)
            if (entry.state if entry is not None else self._has_item(ref))
        )
        if running is not None and ready < num_returns:
            request = self._requests()
            self.machine.ask(
                [self._awaited(ref) for ref in refs if not self._has_item(ref)],
                fetch=False,
                blocked=True,
                request=request,
                task=running.task,
                count=num_returns - ready,
                ends=timeout is not None or running.thread != threading.get_ident(),
            )
        elif asked:
            self.machine.ask(asked, fetch=False)
        found: list[int] = []

        def satisfied() -> bool:
            found.clear()
            for index, entry in enumerate(entries):
                if entry.state if entry is not None else self._has_item(refs[index]):
                    found.append(index)
                    if len(found) == num_returns:
                        return True
            return request != 0 and request in self._replies

        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._wait(satisfied, deadline)
        finally:
            if request:
                refused = self._replies.pop(request, None)
                if refused is not None:
                    raise system_error(refused.error, refused.data.decode())
                if len(found) < num_returns:
                    self.machine.out.append(Unblocked(request))
                    self.link.flush()
        return list(found)

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        entry = self._entry(ref)
        if self.closed or self.link.dead:
            self._check()
        Awaited(self, ref, entry, future).ask()
        return future

    def next_item(self, generator: ObjectRefGenerator[Any], timeout: float | None) -> ObjectRef[Any] | None:
        machine = self.machine
        stream = machine.streams.get(generator._task)
        if stream is None:
            self._check()
            return None
        index = stream.taken
        deadline = None if timeout is None else time.monotonic() + timeout
        if index not in stream.ready and not 0 <= stream.length <= index:
            running = self._task()
            request = 0
            if running is not None:
                request = self._requests()
                machine.ask(
                    [ids.return_id(generator._task, index)],
                    fetch=False,
                    blocked=True,
                    request=request,
                    task=running.task,
                    ends=timeout is not None or running.thread != threading.get_ident(),
                )

            def satisfied() -> bool:
                return index in stream.ready or 0 <= stream.length <= index or request in self._replies

            refused = None
            try:
                if not self._wait(satisfied, deadline):
                    raise GetTimeoutError(f"no further item within {timeout:g} s")
            finally:
                if request:
                    refused = self._replies.pop(request, None)
                    machine.out.append(Unblocked(request))
            if refused is not None:
                raise system_error(refused.error, refused.data.decode())
        if 0 <= stream.length <= index:
            machine.streams.pop(generator._task, None)
            machine.out.append(StreamAck(generator._task, index, True))
            return None
        # What could be interrupted comes first: an item that is taken must reach the program.
        self.link.later()
        object_id = ids.return_id(generator._task, index)
        stream.ready.discard(index)
        stream.taken = index + 1
        self.entries[object_id].count += 1
        machine.out.append(StreamAck(generator._task, index + 1))
        self.link.arm()
        return ObjectRef(object_id, self, True)

    def free(self, refs: Sequence[ObjectRef[Any]]) -> None:
        for ref in refs:
            self._entry(ref)
        with self._lock:
            self.machine.free([ref._id for ref in refs])
        self.link.flush()

    # -- control

    def cancel(self, ref: Any, force: bool, recursive: bool) -> None:
        self._check()
        task = ref._task if isinstance(ref, ObjectRefGenerator) else ids.task_of(ref._id)
        self.machine.out.append(Cancel(task, force, recursive))
        self.link.flush()

    def cancel_task(self, task: bytes, *, force: bool = False) -> None:
        """Cancel a task, whoever submitted it, and what it has started."""
        self.machine.out.append(Cancel(task, force, True))
        self.link.flush()

    def cancel_cell(self, cell: str, *, force: bool = False) -> None:
        """Cancel all that was submitted from a cell."""
        self.machine.out.append(Cancel(b"", force, True, cell))
        self.link.flush()

    def set_origin(self, cell: str) -> None:
        """What is submitted from now on comes from this cell (an opaque text)."""
        if cell != self._origin:
            self._origin = cell
            self.machine.out.append(Origin(cell))

    def expect_names(
        self, ref: ObjectRef[Any], version: int, names: Sequence[str], origin: bytes = b""
    ) -> None:
        """The task that makes ``ref`` will bind these names of the session; ``version`` grows with each run of a cell, ``origin`` is kept with them."""
        self.machine.out.append(Names(ids.task_of(ref._id), version, list(names), origin))
        self.link.later()

    def bind_names(
        self, version: int, values: Mapping[str, tuple[ObjectRef[Any] | None, int]], deleted: Sequence[str]
    ) -> None:
        """These names stand for these objects, each with the bytes of its value: in a driver from now on; in a task when it has succeeded, and None is
        what it returns.
        """
        running = context.current_task.get() or self.running
        objects = [b"" if ref is None else ref._id for ref, _ in values.values()]
        sizes = [size for _, size in values.values()]
        task, attempt = (b"", 0) if running is None else (running.task, running.attempt)
        self.machine.out.append(Bound(task, attempt, version, list(values), objects, sizes, list(deleted)))
        if running is None:
            self.link.flush()

    def unbind_names(self, names: Sequence[str], version: int) -> None:
        """The session holds no longer what these names stand for, nor what cells up to ``version`` will bind them to."""
        self.machine.out.append(Unbind(list(names), version))
        self.link.later()

    def take_names(self, names: Sequence[str], actors: Sequence[str] = ()) -> None:
        """These names and named actors of the session, which an earlier run of its kernel has left, are this one's."""
        self.machine.out.append(Take(list(names), list(actors)))
        self.link.flush()

    def set_transient(self, on: bool) -> None:
        """Whether nobody will come back for this connection, so that the cluster need not wait when it is lost."""
        self.machine.out.append(Transient(on))
        self.link.flush()

    def query(self, what: str, argument: Any = None) -> Any:
        self._check()
        encoded = msgspec.msgpack.encode(argument) if argument is not None else b""
        return msgspec.msgpack.decode(
            self._request(lambda request: Query(request, what, encoded), self._patience)
        )

    def details(self) -> Mapping[str, Any]:
        welcome = self.welcome
        return {
            "name": welcome.name,
            "node_id": welcome.node,
            "job": welcome.job,
            "resources": welcome.resources,
            **welcome.details,
        }

    def shutdown(self, *, stop: bool | None = None, force: bool = False) -> bool:
        ends = False
        if not self.closed and not self.link.dead:
            try:
                ends = bool(
                    self._request(
                        lambda request: Bye(request, stop is not False, force, stop is None, self.saves), 5.0
                    )
                )
            except (NodeDiedError, NotInitializedError):
                pass
            except GetTimeoutError:
                ends = stop is not False
        self.closed = self.closed or "nbray was shut down"
        self._fail_futures()
        self.link.close()
        self._forks.close()
        self.memory.close()
        return ends

    # -- forked children

    def before_fork(self) -> None:
        """See `Forks`. Held until `after_fork`, so that the child's copy of the books is whole."""
        self._lock.acquire()
        self._fork_holds = True
        if not self.closed:
            self._forks.begin([object_id for object_id, entry in list(self.entries.items()) if entry.views])

    def after_fork(self, *, child: bool) -> None:
        """In the parent the child's views are counted."""
        viewed = self._forks.end(child=child)
        if not child:
            for object_id in viewed:
                self.entries[object_id].views += 1
        if self._fork_holds:
            self._fork_holds = False
            self._lock.release()
        if viewed and not child:
            self.link.arm()

    def abandon(self) -> None:
        """In a forked child: this connection is the parent's; nothing of it may be used."""
        self.closed = "this process was forked from one that is connected to nbray"
        self.link.dead = self.closed
        # Else the node would not notice the end of the parent while this process lives.
        self.link.sock.close()


def _bytes_at_once(entries: Iterable[Entry]) -> int:
    """Bytes of the store that are looked at while all of these values are, as far as is known."""
    return sum({id(entry): entry.size for entry in entries if entry.state in (READY, LOCATED)}.values())


def _in_pieces(entries: Sequence[Entry]) -> str:
    """What to do when values do not fit into the store together."""
    return (
        f"This get asks for {len(entries)} values at once, {_bytes_at_once(entries) / 2**20:.1f} MB or more, and all of them stay in the store while arrays "
        "made from them live. Get them one by one, and let go of each before the next (for ref in refs: use(nbray.get(ref))), pass the refs to tasks that "
        "make them smaller, or start the cluster with a larger store."
    )


def _before_fork() -> None:
    for engine in list(_engines):
        engine.before_fork()


def _after_fork_in_parent() -> None:
    for engine in list(_engines):
        engine.after_fork(child=False)


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine.after_fork(child=True)
        engine.abandon()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
