"""What a driver or worker knows of objects: which it holds, which values have come, what is to be told to the node. Pure: no I/O, no clock.

One `Entry` per object and process, while the process has a counted ref of it or a view of its bytes. Rules (protocol section 2):

* the first counted ref makes the process a holder, the last one that goes away sends `Drop`;
* refs that were read out of a value are *borrowed*: they send nothing and are not counted, because the value's object (or the task whose argument it was)
  keeps them alive. When the container is dropped or the task ends, the survivors are held in one message, before the container is let go;
* a borrowed ref that is used (waited for, passed on) becomes counted, but the process need not hold it while the container does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from nbray.messages import Drop, Free, Get, Hold, Located, Ready, StreamAck, StreamEnd, Unpin, Value

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef

PENDING, VALUE, READY, LOCATED = range(4)
ERROR_KIND = 4


class Entry(msgspec.Struct, gc=False, eq=False):
    """An object as this process knows it.

    ``count``: counted refs; ``held``: the node counts this process among the holders; ``pins``: how often the node pinned it for us; ``came``: its
    bytes have, since that was last set to False; ``views``: of its bytes
    that are alive; ``scopes``: of refs that were read out of it.

    Not tracked by the collector, whose passes over a million of them took half a second: nothing here refers back to an entry.
    """

    count: int = 1
    held: bool = True
    state: int = PENDING
    kind: int = 0
    data: bytes = b""
    refs: list[bytes] | None = None
    offset: int = 0
    size: int = 0
    pins: int = 0
    views: int = 0
    used: bool = False
    came: bool = False
    mine: bool = False
    asked: bool = False
    callbacks: list[Callable[[], None]] | None = None
    scopes: list[Scope] | None = None


class Scope:
    """Borrowed refs that one container (an object, or a task's arguments) keeps alive."""

    __slots__ = ("members",)

    def __init__(self, refs: Iterable[ObjectRef[Any]]) -> None:
        self.members = list(map(weakref.ref, refs))

    def survivors(self) -> list[ObjectRef[Any]]:
        return [ref for ref in (member() for member in self.members) if ref is not None]


class Stream:
    """A generator task of this process: items announced, and the length once it has ended."""

    __slots__ = ("length", "ready", "taken")

    def __init__(self) -> None:
        self.ready: set[int] = set()
        self.taken = 0
        self.length = -1


class ClientMachine:
    """``out``: what is to be sent, in order. Only one thread at a time may call `receive` and `settle_drops`; the rest may be called by any."""

    def __init__(self, inline_limit: int) -> None:
        self.inline_limit = inline_limit
        self.entries: dict[bytes, Entry] = {}
        self.streams: dict[bytes, Stream] = {}
        self.out: list[Any] = []
        self.dropped: deque[bytes] = deque()
        """Ids whose counted ref has gone away; filled by finalizers."""
        self.unviewed: deque[bytes] = deque()
        """Ids of which a view of the bytes has gone away; filled by finalizers."""
        self.other: deque[Any] = deque()
        """Messages that are not about objects."""
        self.pending = 0
        """Returns of own tasks that have not come."""
        self.due: deque[Callable[[], None]] = deque()
        """Callbacks whose object has come; the shell calls them."""
        self.errors = 0
        """How many values that are errors have come."""
        self.idle: dict[bytes, None] = {}
        """Objects whose pins no view uses."""

    # -- refs

    def own(self, object_id: bytes) -> None:
        """A new object of this process: a return of a task it submits, or a put. The message that makes it also makes the process a holder."""
        entry = self.entries[object_id] = Entry()
        entry.mine = True
        self.pending += 1

    def count(self, object_id: bytes, *, borrowed: bool = False) -> Entry:
        """A counted ref more; ``borrowed``: something else keeps the object alive, so nothing is sent."""
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self.entries[object_id] = Entry(1, not borrowed)
            if not borrowed:
                self.out.append(Hold([object_id]))
        else:
            entry.count += 1
            if not borrowed and not entry.held:
                entry.held = True
                self.out.append(Hold([object_id]))
        return entry

    def settle_drops(self) -> None:
        """Turn what finalizers have noted into messages."""
        dropped, entries = self.dropped, self.entries
        gone: list[bytes] = []
        unused: list[bytes] = []
        for _ in range(len(dropped)):
            object_id = dropped.popleft()
            entry = entries.get(object_id)
            if entry is None:
                if object_id in self.streams:
                    self._drop_stream(object_id)
                continue
            entry.count -= 1
            if entry.count > 0 or entry.callbacks:
                continue
            if entry.scopes:
                if gone:
                    # One of them may live on inside of this container and be held anew.
                    self.out.append(Drop(gone))
                    gone = []
                self.end_scopes(entry.scopes)
                entry.scopes = None
            if entry.held:
                entry.held = False
                gone.append(object_id)
            if entry.state == PENDING and entry.mine:
                self.pending -= 1
            if not entry.pins:
                del entries[object_id]
            elif not entry.views:
                unused.append(object_id)
        unviewed = self.unviewed
        for _ in range(len(unviewed)):
            object_id = unviewed.popleft()
            entry = entries.get(object_id)
            if entry is None:
                continue
            entry.views -= 1
            if entry.views:
                continue
            if entry.count > 0:
                self.idle[object_id] = None
                entry.used = True
            else:
                unused.append(object_id)
        if gone:
            self.out.append(Drop(gone))
        if unused:
            # Without a ref nobody here can ask for them again: others may need the room.
            self._unpin(unused)

    def _drop_stream(self, task: bytes) -> None:
        """Nobody will take further items of this generator."""
        stream = self.streams.pop(task)
        self.out.append(StreamAck(task, stream.taken, True))
        for index in stream.ready:
            self.entries.pop(task + index.to_bytes(4, "little"), None)

    def give_back_pins(self) -> bool:
        """Give back pins that no view has used since the last call; whether some are left to look at again."""
        unused: list[bytes] = []
        for object_id in list(self.idle):
            entry = self.entries.get(object_id)
            if entry is None or entry.views or not entry.pins:
                self.idle.pop(object_id, None)
            elif entry.used and entry.count > 0:
                entry.used = False
            else:
                unused.append(object_id)
        if unused:
            self._unpin(unused)
        return bool(self.idle)

    def _unpin(self, unused: list[bytes]) -> None:
        """Give the pins of these back: no view of them is left."""
        objects: list[bytes] = []
        counts: list[int] = []
        for object_id in unused:
            self.idle.pop(object_id, None)
            entry = self.entries.get(object_id)
            if entry is None or entry.views or not entry.pins:
                continue
            objects.append(object_id)
            counts.append(entry.pins)
            entry.pins = 0
            if entry.state == LOCATED:
                entry.state = READY
            if entry.count <= 0:
                del self.entries[object_id]
        if objects:
            self.out.append(Unpin(objects, counts))

    def end_scopes(self, scopes: Sequence[Scope]) -> None:
        """Their container is about to be let go: hold what is still referred to."""
        survivors: dict[bytes, None] = {}
        for scope in scopes:
            for ref in scope.survivors():
                entry = self.promote(ref)
                if not entry.held:
                    entry.held = True
                    survivors[ref._id] = None
        if survivors:
            self.out.append(Hold(list(survivors)))

    def promote(self, ref: ObjectRef[Any]) -> Entry:
        """Count a borrowed ref, because it is used or outlives its container."""
        if ref._counted:
            entry = self.entries.get(ref._id)
            if entry is not None:
                return entry
        ref._counted = True
        return self.count(ref._id, borrowed=True)

    def free(self, objects: list[bytes]) -> None:
        """Release these values, whoever holds them; refs that this process has read out of them go on being good."""
        for object_id in objects:
            entry = self.entries[object_id]
            if entry.scopes:
                self.end_scopes(entry.scopes)
                entry.scopes = None
            if entry.state != PENDING:
                entry.state = PENDING
                entry.data = b""
                entry.mine = False
        self.out.append(Free(objects))

    # -- asking

    def ask(
        self,
        objects: list[bytes],
        *,
        fetch: bool = True,
        blocked: bool = False,
        request: int = 0,
        task: bytes = b"",
        count: int = 0,
        ends: bool = False,
    ) -> None:
        self.out.append(Get(objects, fetch, blocked, request, task, count, ends))

    # -- what the node says

    def receive(self, messages: Iterable[Any]) -> None:
        """Take in what the node said; `other` gets what is not about objects."""
        entries = self.entries
        for message in messages:
            kind = type(message)
            if kind is Value:
                entry = entries.get(message.object)
                if entry is None:
                    entry = self._unexpected(message.object)
                    if entry is None:
                        continue
                if entry.mine and entry.state == PENDING:
                    self.pending -= 1
                entry.kind = message.kind
                entry.data = message.data
                entry.refs = message.refs
                entry.state = VALUE
                if message.kind == ERROR_KIND:
                    self.errors += 1
                if entry.callbacks is not None:
                    self.call_back(entry)
            elif kind is Ready:
                entry = entries.get(message.object)
                if entry is None:
                    entry = self._unexpected(message.object)
                if entry is not None and entry.state == PENDING:
                    if entry.mine:
                        self.pending -= 1
                    entry.size = message.size
                    entry.state = READY
                    if entry.callbacks is not None:
                        self.call_back(entry)
            elif kind is Located:
                entry = entries.get(message.object)
                if entry is None:
                    self.out.append(Unpin([message.object], [1]))
                    continue
                if entry.mine and entry.state == PENDING:
                    self.pending -= 1
                entry.kind = message.kind
                entry.offset = message.offset
                entry.size = message.size
                entry.refs = message.refs
                entry.pins += 1
                entry.used = True
                entry.came = True
                entry.state = LOCATED
                self.idle[message.object] = None
                if entry.callbacks is not None:
                    self.call_back(entry)
            elif kind is StreamEnd:
                stream = self.streams.get(message.task)
                if stream is not None:
                    stream.length = message.length
            else:
                self.other.append(message)

    def _unexpected(self, object_id: bytes) -> Entry | None:
        """An item of a stream comes before its ref exists."""
        task, index = object_id[:-4], int.from_bytes(object_id[-4:], "little")
        stream = self.streams.get(task)
        if stream is None or index < stream.taken:
            return None
        stream.ready.add(index)
        entry = self.entries[object_id] = Entry(0, True)
        return entry

    def call_back(self, entry: Entry) -> None:
        """Have those called who wait for this entry: they are `due`."""
        callbacks, entry.callbacks = entry.callbacks, None
        self.due.extend(callbacks or ())
