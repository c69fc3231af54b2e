"""Simulated processes: drivers and workers around the production `ClientMachine` and `WorkerMachine`.

What ``nbray.engine.local`` and ``nbray.worker`` do with threads and sockets is done here by *fibers*: generators that yield `Sleep` or `Until` and are
resumed by events. The verbs follow those of `LocalEngine` message by message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import ids
from nbray.api.machine import ERROR_KIND, LOCATED, PENDING, VALUE, ClientMachine, Entry, Scope, Stream
from nbray.api.refs import ObjectRef
from nbray.failure_codec import read as read_failure
from nbray.messages import (
    Create,
    Created,
    Put,
    Reply,
    Seal,
    Shutdown,
    StreamAck,
    Unblocked,
)
from nbray.testing.world import BrokenInvariantError

if TYPE_CHECKING:
    from nbray.testing.node import SimNode
    from nbray.testing.world import World

IDLE_PIN = 0.1
BACKGROUND_READ = 0.02


@dataclass(slots=True)
class Sleep:
    """Go on after this time."""

    seconds: float


@dataclass(slots=True)
class Until:
    """Wait; resumed with whether ``ready()`` came true before ``deadline``."""

    ready: Callable[[], bool]
    deadline: float | None = None


Verb = Generator[Any, Any, Any]


class SimError(Exception):
    """An error that a program meets: ``name`` of its class, ``data`` its payload if it is the value of an object."""

    def __init__(self, name: str, text: str, data: bytes = b"") -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text
        self.data = data


class Interrupted(BaseException):
    """SIGINT in user code."""


@dataclass(slots=True)
class Val:
    """A value that was read: its digest, borrowed refs, and the view of the arena that it is, if it is one."""

    digest: bytes
    refs: list[ObjectRef[Any]] | None
    release: Callable[[], None] | None = None


class Fiber:
    """A thread of a simulated process."""

    __slots__ = ("finished", "generator", "running", "timer", "until")

    def __init__(self, generator: Verb) -> None:
        self.generator = generator
        self.until: Until | None = None
        self.timer = 0
        self.finished = False
        self.running = False


def encode_value(digest: bytes, size: int) -> bytes:
    """The bytes of a value: its digest over and over, so that a changed byte shows."""
    count = max(size, 16) // 16
    return digest * count


def decode_value(object_id: bytes, data: bytes) -> bytes:
    """The digest, or BrokenInvariantError when the bytes were damaged."""
    digest = data[:16]
    if len(data) < 16 or data[: len(data) // 16 * 16] != digest * (len(data) // 16):
        raise BrokenInvariantError(
            f"the bytes of object {object_id.hex()} have changed: they start with {data[:32].hex()}"
        )
    return digest


class SimClient:
    """A driver's or worker's end of its connection. It is the ``engine`` of its refs."""

    reads_in_background = True

    def __init__(self, world: World, node: SimNode, number: int, pid: int) -> None:
        self.world = world
        self.node = node
        self.number = number
        """Of its connection at the node."""
        self.pid = pid
        self.alive = True
        self.machine = ClientMachine(node.machine.config.inline_limit)
        self.entries = self.machine.entries
        self.fibers: list[Fiber] = []
        self.messages: deque[list[Any]] = deque()
        """Arrived and not read."""
        self.replies: dict[int, Any] = {}
        self.closed = ""
        self._requests = 0
        self._armed = False
        self._woken = False

    # -- being a process

    def start(self, generator: Verb) -> Fiber:
        fiber = Fiber(generator)
        self.fibers.append(fiber)
        self.resume(fiber, None)
        return fiber

    def resume(self, fiber: Fiber, value: Any, error: BaseException | None = None) -> None:
        """Run a fiber until it waits."""
        if not self.alive or fiber.finished:
            return
        fiber.running = True
        fiber.timer += 1
        fiber.until = None
        try:
            while True:
                if error is not None:
                    thrown, error = error, None
                    wish = fiber.generator.throw(thrown)
                else:
                    wish = fiber.generator.send(value)
                if self.ended():
                    return
                if type(wish) is Sleep:
                    self.world.after(wish.seconds, self._timer, fiber, fiber.timer)
                    return
                self.flush()
                if wish.ready() or self.closed:
                    value = True
                    continue
                fiber.until = wish
                if wish.deadline is not None:
                    self.world.after(wish.deadline - self.world.now, self._timer, fiber, fiber.timer)
                if self.messages:
                    self.wake()
                return
        except StopIteration:
            fiber.finished = True
            if fiber in self.fibers:
                self.fibers.remove(fiber)
        finally:
            fiber.running = False

    def _timer(self, fiber: Fiber, timer: int) -> None:
        if self.alive and fiber.timer == timer:
            if fiber.until is not None:
                self.take_in()
                if fiber.timer == timer:
                    self.resume(fiber, fiber.until.ready())
            else:
                self.resume(fiber, None)

    def deliver(self, messages: list[Any]) -> None:
        """Bytes have arrived at the process."""
        if not self.alive:
            return
        self.messages.append(messages)
        self.wake()

    def wake(self) -> None:
        """Something has come: whoever waits reads it soon; if nobody does, the background thread later."""
        if self._woken:
            return
        waiting = any(fiber.until is not None for fiber in self.fibers)
        if waiting or self.reads_in_background:
            self._woken = True
            self.world.after(
                self.world.random.uniform(0, 0.00002) if waiting else BACKGROUND_READ, self._read
            )

    def _read(self) -> None:
        self._woken = False
        if self.alive:
            self.take_in()
            self.flush()

    def take_in(self) -> None:
        """Read what has arrived and resume who waited for it."""
        while self.messages:
            self.machine.receive(self.messages.popleft())
            other = self.machine.other
            while other:
                self.on_message(other.popleft())
        moved = True
        while moved and self.alive:
            moved = False
            for fiber in list(self.fibers):
                until = fiber.until
                if until is not None and not fiber.running and (until.ready() or self.closed):
                    moved = True
                    self.resume(fiber, True)

    def on_message(self, message: Any) -> None:
        kind = type(message)
        if kind is Reply or kind is Created:
            self.replies[message.request] = message
        elif kind is Shutdown:
            self.closed = message.reason

    def ended(self) -> bool:
        """Whether the process is gone: what it does may end it."""
        return not self.alive

    def die(self) -> None:
        """SIGKILL: nothing more happens in this process."""
        self.alive = False
        for fiber in self.fibers:
            if not fiber.running:
                fiber.generator.close()
        self.fibers.clear()

    # -- sending

    def flush(self) -> None:
        if not self.alive:
            return
        self.machine.settle_drops()
        out = self.machine.out
        if out:
            messages = list(out)
            out.clear()
            self.node.say(self.number, messages)

    def later(self) -> None:
        """Send when the burst is over."""
        if self.world.chance(0.4):
            self.flush()
        else:
            self.arm()

    def arm(self) -> None:
        if not self._armed and self.alive:
            self._armed = True
            self.world.after(self.world.random.uniform(0.0, 0.002), self._tidy, True)

    def _tidy(self, armed: bool) -> None:
        if armed:
            self._armed = False
        if not self.alive:
            return
        self.flush()
        if self.machine.idle:
            self.machine.give_back_pins()
            self.flush()
            if self.machine.idle and not self._armed:
                self._armed = True
                self.world.after(IDLE_PIN, self._tidy, True)

    # -- what refs call

    def dropped(self, object_id: bytes) -> None:
        if self.alive:
            self.machine.dropped.append(object_id)
            self.arm()

    def _unviewed(self, object_id: bytes) -> None:
        if self.alive:
            self.machine.unviewed.append(object_id)
            self.arm()

    # -- verbs

    def own(self, object_id: bytes) -> ObjectRef[Any]:
        self.machine.own(object_id)
        return ObjectRef(object_id, self, True)  # type: ignore[arg-type]

    def ref(self, object_id: bytes) -> ObjectRef[Any]:
        self.machine.count(object_id)
        return ObjectRef(object_id, self, True)  # type: ignore[arg-type]

    def entry(self, ref: ObjectRef[Any]) -> Entry:
        return self.machine.promote(ref)

    def borrow(self, refs: list[bytes] | None, scopes: list[Scope]) -> list[ObjectRef[Any]] | None:
        if not refs:
            return None
        made: list[ObjectRef[Any]] = [ObjectRef(object_id, self, False) for object_id in refs]  # type: ignore[arg-type]
        scopes.append(Scope(made))
        return made

    def number_request(self) -> int:
        self._requests += 1
        return self._requests

    def request(self, make: Callable[[int], Any]) -> Verb:
        """Send a request; the reply's data or `Created`. Raises SimError."""
        number = self.number_request()
        self.machine.out.append(make(number))
        yield Until(lambda: number in self.replies)
        reply = self.replies.pop(number, None)
        if reply is None:
            raise SimError("NodeDiedError", self.closed)
        if type(reply) is Reply:
            if reply.error:
                raise SimError(reply.error, reply.data.decode())
            return reply.data
        return reply

    def write(self, object_id: bytes, data: bytes, refs: list[bytes] | None, *, held: bool) -> Verb:
        created = yield from self.request(lambda request: Create(request, object_id, len(data)))
        if type(created) is not Created:
            return
        yield Sleep(self.world.random.uniform(0, 0.0005))
        self.node.memory[created.offset : created.offset + len(data)] = data
        self.machine.out.append(Seal(object_id, 0, refs, held))

    def put(self, source: ids.IdSource, digest: bytes, size: int, refs: list[bytes] | None) -> Verb:
        object_id = source.put_id()
        data = encode_value(digest, size)
        if len(data) > self.machine.inline_limit:
            yield from self.write(object_id, data, refs, held=True)
            entry = self.entries[object_id] = Entry()
            entry.size = len(data)
            entry.state = 2
            return ObjectRef(object_id, self, True)  # type: ignore[arg-type]
        entry = self.entries[object_id] = Entry()
        entry.data, entry.refs, entry.state = data, refs, VALUE
        self.machine.out.append(Put(object_id, 0, data, refs))
        self.later()
        return ObjectRef(object_id, self, True)  # type: ignore[arg-type]

    def read(self, object_id: bytes, entry: Entry) -> Val | None:
        """The value; None when its bytes were given back. Raises SimError for an error."""
        if entry.state == VALUE:
            if entry.kind == ERROR_KIND:
                raise self.error(object_id, entry.data)
            digest = decode_value(object_id, entry.data)
            release = None
        elif entry.state == LOCATED:
            digest = self.view(object_id, entry.offset, entry.size)
            entry.views += 1
            entry.used = True
            release = partial(self._unviewed, object_id)
        else:
            return None
        self.node.checks.value_read(object_id, digest)
        refs = None
        if entry.refs is not None:
            if entry.scopes is None:
                entry.scopes = []
            refs = self.borrow(entry.refs, entry.scopes)
        return Val(digest, refs, release)

    def view(self, object_id: bytes, offset: int, size: int) -> bytes:
        return decode_value(object_id, bytes(self.node.memory[offset : offset + size]))

    def error(self, object_id: bytes, data: bytes) -> SimError:
        failure = read_failure(data)
        # Refs that others have read out of a value end with it when somebody frees it.
        freed = self.node.program.features.frees
        if "is not known to this cluster" in failure.text and failure.name == "ObjectLostError" and not freed:
            raise BrokenInvariantError(
                f"object {object_id.hex()} was freed while process {self.number} could reach it"
            )
        return SimError(failure.name, failure.text, data)

    def get(self, refs: Sequence[ObjectRef[Any]], timeout: float | None, task: bytes = b"") -> Verb:
        """A list of `Val`. Raises SimError (GetTimeoutError when the time is up)."""
        entries = [self.entry(ref) for ref in refs]
        values: list[Val] = []
        if any(e.state not in (VALUE, LOCATED) for e in entries):
            yield from self._fetch(refs, entries, timeout, task)
        try:
            for ref, entry in zip(refs, entries, strict=True):
                while True:
                    value = self.read(ref._id, entry)
                    if value is not None:
                        values.append(value)
                        break
                    yield from self._fetch([ref], [entry], timeout, task)
        except BaseException:
            for value in values:
                if value.release is not None:
                    value.release()
            raise
        return values

    def _fetch(
        self, refs: Sequence[ObjectRef[Any]], entries: list[Entry], timeout: float | None, task: bytes
    ) -> Verb:
        if self.closed:
            raise SimError("NodeDiedError", self.closed)
        missing: dict[bytes, Entry] = {}
        for ref, entry in zip(refs, entries, strict=True):
            if entry.state not in (VALUE, LOCATED):
                missing[ref._id] = entry
            elif entry.state == VALUE and entry.kind == ERROR_KIND:
                return
        for entry in missing.values():
            entry.came = False
        request = self.number_request() if task else 0
        self.machine.ask(list(missing), blocked=bool(task), request=request, task=task)

        def all_here() -> bool:
            return all(e.state == VALUE or e.came for e in missing.values())

        def ready() -> bool:
            return (
                all_here()
                or any(e.kind == ERROR_KIND and e.state == VALUE for e in missing.values())
                or request in self.replies
            )

        deadline = None if timeout is None else self.world.now + timeout
        complete = False
        try:
            complete = yield Until(ready, deadline)
        finally:
            refused = self.replies.pop(request, None) if request else None
            if request and refused is None and not (complete and all_here()):
                self.machine.out.append(Unblocked(request))
                self.flush()
        if refused is not None:
            raise SimError(refused.error, refused.data.decode())
        if not complete:
            raise SimError("GetTimeoutError", "not there")
        for ref, entry in zip(refs, entries, strict=True):
            if entry.kind == ERROR_KIND and entry.state == VALUE:
                raise self.error(ref._id, entry.data)

    def wait(self, refs: Sequence[ObjectRef[Any]], count: int, task: bytes = b"") -> Verb:
        """How many of the refs are ready, at least ``count``."""
        entries = [self.entry(ref) for ref in refs]
        waiting = [ref._id for ref, entry in zip(refs, entries, strict=True) if entry.state == PENDING]
        ready = len(refs) - len(waiting)
        request = 0
        if ready < count:
            request = self.number_request() if task else 0
            self.machine.ask(
                waiting, fetch=False, blocked=bool(task), request=request, task=task, count=count - ready
            )
            try:
                yield Until(
                    lambda: sum(e.state != PENDING for e in entries) >= count or request in self.replies
                )
            finally:
                refused = self.replies.pop(request, None) if request else None
                if request and refused is None and sum(e.state != PENDING for e in entries) < count:
                    self.machine.out.append(Unblocked(request))
                    self.flush()
            if refused is not None:
                raise SimError(refused.error, refused.data.decode())
        return sum(e.state != PENDING for e in entries)

    def open_stream(self, task: bytes) -> Stream:
        stream = self.machine.streams[task] = Stream()
        return stream

    def next_item(self, task: bytes, waiter: bytes = b"") -> Verb:
        """The next item's ref, None at the end."""
        machine = self.machine
        stream = machine.streams.get(task)
        if stream is None:
            return None
        index = stream.taken
        if index not in stream.ready and not 0 <= stream.length <= index:
            request = 0
            if waiter:
                request = self.number_request()
                machine.ask(
                    [ids.return_id(task, index)], fetch=False, blocked=True, request=request, task=waiter
                )
            try:
                yield Until(lambda: index in stream.ready or 0 <= stream.length <= index)
            finally:
                if request:
                    machine.out.append(Unblocked(request))
        if self.closed:
            raise SimError("NodeDiedError", self.closed)
        if 0 <= stream.length <= index:
            machine.streams.pop(task, None)
            machine.out.append(StreamAck(task, index, True))
            return None
        stream.ready.discard(index)
        stream.taken = index + 1
        object_id = ids.return_id(task, index)
        self.entries[object_id].count += 1
        machine.out.append(StreamAck(task, index + 1))
        self.later()
        return ObjectRef(object_id, self, True)  # type: ignore[arg-type]


def encode_arguments(args: list[tuple[str, Any]]) -> bytes:
    """Arguments as (kind, value), as they travel in a submission."""
    return msgspec.msgpack.encode(args)


def decode_arguments(data: bytes) -> list[tuple[str, Any]]:
    """The other way round."""
    return msgspec.msgpack.decode(data, type=list[tuple[str, Any]])
