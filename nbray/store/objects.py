"""The objects of a node: where each lies, who holds it, who waits for it, what moves to disk. Pure: no I/O, no clock.

States of an object::

    PENDING --value--> INLINE
       |
       +--create--> CREATED --seal--> ARENA --spill--> SPILLING --written--> SPILLED --get--> RESTORING --read--> ARENA

Rules: a sealed object never changes; a pinned one is never evicted; an object without holders is freed as soon as it is sealed, unpinned and
awaited by nobody. Requests for arena memory are served in the order in which they came, each gets all of its bytes or none; those of running
code (new objects, restores for ``get``) before those for the inputs of queued tasks, whose *reserved* inputs they may also push out again: what
runs can always go on before something else is started (protocol section 10).

What the shell must do is appended to ``effects``, in order; what it must do before any other process hears of it, to ``first``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from nbray import ids
from nbray.config import INLINE_TOTAL
from nbray.store import holders as holder_sets
from nbray.store.holders import Holder, Holders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbray.scheduler.task import Task
    from nbray.store.arena import Arena, Block

PENDING, CREATED, INLINE, ARENA, SPILLING, SPILLED, RESTORING = range(7)
STATE_NAMES = ("PENDING", "CREATED", "INLINE", "ARENA", "SPILLING", "SPILLED", "RESTORING")
ERROR_KIND = 4

PAGE = 4096

WORTH_MOVING = 256
"""Bytes from which on a small value is worth a place in the arena."""

MOST_STALE = 65536
"""Entries of the list of small values from which on it is cleaned of freed ones."""


class Object:
    """One object. ``pins``: client number -> how often it was told the location and has not given it back."""

    __slots__ = (
        "block", "data", "dependants", "holders", "id", "kind", "on_disk", "pins", "producer", "pushed", "refs", "size", "state", "waiters",
    )  # fmt: skip

    def __init__(self, object_id: bytes, holders: Holders = None, producer: Task | None = None) -> None:
        self.id = object_id
        self.state = PENDING
        self.kind = 0
        self.data = b""
        self.refs: list[bytes] | None = None
        self.block: Block | None = None
        self.size = 0
        self.holders = holders
        self.producer = producer
        self.waiters: list[tuple[int, bool, int]] | None = None
        self.dependants: list[Task] | None = None
        self.pins: dict[int, int] | None = None
        self.on_disk = False
        self.pushed = False

    @property
    def sealed(self) -> bool:
        return self.state >= INLINE

    @property
    def is_error(self) -> bool:
        return self.kind == ERROR_KIND and self.state >= INLINE


@dataclass(slots=True)
class Request:
    """Somebody waits for arena memory: a client that creates (``client``, ``number``), or a spilled object that is wanted back (client -1)."""

    object: bytes
    size: int
    client: int
    number: int


@dataclass(slots=True, frozen=True)
class Spill:
    """Write the bytes to disk; report with `ObjectTable.spilled`."""

    object: bytes
    offset: int
    size: int


@dataclass(slots=True, frozen=True)
class Restore:
    """Read the bytes back from disk; report with `ObjectTable.restored`."""

    object: bytes
    offset: int
    size: int


@dataclass(slots=True, frozen=True)
class DeleteSpilled:
    """The copy on disk is not needed any more."""

    object: bytes


@dataclass(slots=True, frozen=True)
class Punch:
    """Give the memory of these (offset, length) ranges back to the system."""

    ranges: list[tuple[int, int]]


@dataclass(slots=True, frozen=True)
class Granted:
    """A client's creation has its memory."""

    request: Request
    offset: int
    warm: bool


@dataclass(slots=True, frozen=True)
class Refused:
    """A client's creation cannot be served; ``error`` names a class of ``nbray.errors``, or is empty: the object is there already."""

    request: Request
    error: str
    text: str


@dataclass(slots=True, frozen=True)
class Write:
    """A small value moves into the arena."""

    offset: int
    data: bytes


StoreEffect = Spill | Restore | DeleteSpilled | Punch | Granted | Refused


class ObjectTable:
    """All objects of a node. ``patience``: seconds a request waits when nothing can be moved out of its way; ``inline_total``: bytes of small values
    above which the oldest of them move into the arena; ``name_of``: a holder's name for people; ``reserve``: where memory has to be reserved before it is
    written, reserves (offset, size) or says why it cannot.
    """

    def __init__(
        self,
        arena: Arena,
        patience: float = 10.0,
        inline_total: int = INLINE_TOTAL,
        name_of: Callable[[Holder], str] = str,
        reserve: Callable[[int, int], str] | None = None,
    ) -> None:
        self.arena = arena
        self.patience = patience
        self._inline_total = inline_total
        self._small: deque[bytes] = deque()
        """Small values in the order in which they came, freed ones among them."""
        self._outgrown = False
        """Whether some of them wait for room in the arena."""
        self._name_of = name_of
        self._reserve_block = reserve
        self.objects: dict[bytes, Object] = {}
        self.effects: list[StoreEffect] = []
        self.first: list[Punch | Write] = []
        self.available: list[Object] = []
        """Objects that became readable through a restore since the machine last looked."""
        self.lost: list[Object] = []
        """Objects whose spilled copy could not be read back."""
        self.refused: list[tuple[Object, str, str]] = []
        """Spilled objects that cannot be brought back now: error class and text."""
        self.unheld: list[Object] = []
        """Objects that only a freed object held: the last handles of actors may be among them."""
        self.inline_bytes = 0
        self.spilled_bytes = 0
        self.spilled_total = 0
        self.restored_total = 0
        self._resident: dict[bytes, Object] = {}
        self._created: dict[bytes, Object] = {}
        """What is being written."""
        self._pinned: dict[int, dict[bytes, None]] = {}
        """Client -> what it has pinned, freed objects among them."""
        self._requests: deque[Request] = deque()
        """Of running code."""
        self._later: deque[Request] = deque()
        """For the inputs of queued tasks."""
        self._wanted: dict[bytes, Request] = {}
        """Objects that are to come back."""
        self._head: Request | None = None
        """The request that waits for memory, and since when."""
        self._head_since = 0.0
        self._reserved: dict[bytes, int] = {}
        """Inputs of tasks that are about to start -> of how many."""
        self._ghosts: dict[bytes, Object] = {}
        """Freed objects whose memory is still looked at."""
        self._spilling = 0
        """Bytes of blocks that are being written to disk and will then be free."""
        self._disk_full = ""
        self._moving: dict[bytes, int] = {}
        self._orphans: dict[bytes, Block] = {}

    # -- holders

    def entry(self, object_id: bytes) -> Object:
        """The object's entry, made when it is not known yet."""
        found = self.objects.get(object_id)
        if found is None:
            found = self.objects[object_id] = Object(object_id)
        return found

    def hold(self, object_id: bytes, holder: Holder) -> None:
        entry = self.objects.get(object_id)
        if entry is not None:
            entry.holders = holder_sets.add(entry.holders, holder)

    def release(self, object_id: bytes, holder: Holder) -> None:
        """Remove a holder; frees the object when it was the last one."""
        entry = self.objects.get(object_id)
        if entry is None:
            return
        entry.holders = left = holder_sets.remove(entry.holders, holder)
        if left is None:
            self.collect(entry)

    def collect(self, entry: Object) -> None:
        """Free the object if nothing can reach it any more (and with it what only it held)."""
        doomed = [entry]
        while doomed:
            gone = doomed.pop()
            if (
                gone.holders is not None
                or gone.waiters
                or gone.dependants
                or gone.pins
                or gone.state < INLINE
            ):
                continue
            if self.objects.pop(gone.id, None) is None:
                continue
            self._discard(gone)
            for inner in gone.refs or ():
                contained = self.objects.get(inner)
                if contained is not None:
                    contained.holders = holder_sets.remove(contained.holders, gone.id)
                    if contained.holders is None:
                        doomed.append(contained)
                        self.unheld.append(contained)

    def _discard(self, entry: Object) -> None:
        if entry.state == INLINE:
            self.inline_bytes -= len(entry.data)
        elif entry.block is not None:
            self._resident.pop(entry.id, None)
            self._give_back(entry)
        if entry.on_disk:
            entry.on_disk = False
            self.spilled_bytes -= entry.size
            self._disk_full = ""
            self.effects.append(DeleteSpilled(entry.id))
        self.serve()

    # -- values

    def seal_inline(self, entry: Object, kind: int, data: bytes, refs: list[bytes] | None) -> None:
        """Give a pending object its small value. The caller looks at its waiters and dependants."""
        entry.state = INLINE
        entry.kind = kind
        entry.data = data
        entry.size = len(data)
        self.inline_bytes += len(data)
        if refs:
            self._contain(entry, refs)
        if len(data) >= WORTH_MOVING:
            self._small.append(entry.id)
            if self.inline_bytes > self._inline_total:
                self._outgrow()
            elif len(self._small) > MOST_STALE and len(self._small) > 4 * len(self.objects):
                self._small = deque(i for i in self._small if i in self.objects)

    def _outgrow(self) -> None:
        """Move the oldest small values into the arena, from where they can go to disk; goes on when there is room again."""
        self._outgrown = False
        while self._small and self.inline_bytes > self._inline_total * 3 // 4:
            entry = self.objects.get(self._small[0])
            if entry is not None and entry.state == INLINE and not entry.is_error:
                data = entry.data
                block = self.arena.allocate(len(data), 0)
                if block is None:
                    self._make_room(self.arena.limit // 4, urgent=False)
                    block = self.arena.allocate(len(data), 0)
                if block is None or self._unreservable(block):
                    self._outgrown = True
                    return
                self._punch()
                self.first.append(Write(block.offset, data))
                self.inline_bytes -= len(data)
                entry.data = b""
                entry.block = block
                entry.state = ARENA
                self._resident[entry.id] = entry
            self._small.popleft()

    def _contain(self, entry: Object, refs: list[bytes]) -> None:
        entry.refs = refs
        for inner in refs:
            contained = self.objects.get(inner)
            if contained is not None:
                contained.holders = holder_sets.add(contained.holders, entry.id)

    def create(self, object_id: bytes, size: int, client: int, number: int) -> None:
        """Ask for arena memory; answered by the effect `Granted` or `Refused`, now or later."""
        request = Request(object_id, size, client, number)
        if not self.arena.fits(size):
            self.effects.append(
                Refused(
                    request,
                    "StoreFullError",
                    f"a value of {_bytes(size)} does not fit into the object store, which has {_bytes(self.arena.limit)} in all. "
                    "Start the cluster with a larger one (%cluster start --store-memory, nbray.init(object_store_memory=...)), or pass the value in parts.",
                )
            )
            return
        self._requests.append(request)
        self.serve()

    def seal(self, object_id: bytes, kind: int, refs: list[bytes] | None) -> Object | None:
        """The client has written the bytes. None when the object was given up meanwhile."""
        entry = self.objects.get(object_id)
        if entry is None or entry.state != CREATED:
            return None
        entry.state = ARENA
        entry.kind = kind
        del self._created[object_id]
        self._resident[object_id] = entry
        if refs:
            self._contain(entry, refs)
        return entry

    def written(self, object_id: bytes, kind: int, refs: list[bytes] | None) -> None:
        """The bytes of a return value are there; it is sealed, with this kind and these refs, when its task reports it."""
        entry = self.objects.get(object_id)
        if entry is not None and entry.state == CREATED:
            entry.kind, entry.refs = kind, refs

    def abort(self, object_id: bytes) -> None:
        """A created object will not be sealed: its memory is free again. It stays pending. One that waits for memory needs it no longer."""
        if self._requests or self._later:
            self._requests = deque(request for request in self._requests if request.object != object_id)
            self._later = deque(request for request in self._later if request.object != object_id)
        entry = self.objects.get(object_id)
        if entry is not None and entry.state == CREATED and entry.block is not None:
            self.arena.free(entry.block)
            entry.block = None
            entry.state = PENDING
            del self._created[object_id]
            entry.kind, entry.refs = 0, None
            if (
                entry.holders is None
                and entry.producer is None
                and not entry.waiters
                and not entry.dependants
            ):
                del self.objects[object_id]
            self.serve()

    def created_by(self, client: int) -> list[Object]:
        """What this client is writing."""
        return [e for e in self._created.values() if e.block is not None and e.block.client == client]

    def drop_requests(self, client: int) -> None:
        """The client is gone: it needs no more memory."""
        if any(request.client == client for request in self._requests):
            self._requests = deque(request for request in self._requests if request.client != client)
            self.serve()

    def unmake(self, object_id: bytes) -> None:
        """Back to pending: the producer runs again before anybody could see the value."""
        entry = self.objects.get(object_id)
        if entry is not None and entry.state == CREATED:
            self.abort(object_id)

    def reset(self, entry: Object) -> None:
        """The value is lost or released: the entry is pending again, for a reconstruction or an error."""
        if entry.state >= INLINE:
            self._discard(entry)
            for inner in entry.refs or ():
                self.release(inner, entry.id)
            entry.state = PENDING
            entry.data, entry.refs, entry.block, entry.kind = b"", None, None, 0
            entry.pushed = False

    def free(self, entry: Object) -> None:
        """Let go of a value although it is held: the entry is pending again. Its memory stays as it is until nobody looks at it any more."""
        if entry.pins and entry.block is not None:
            ghost = self._ghosts[entry.id] = Object(entry.id)
            ghost.block, ghost.pins = entry.block, entry.pins
            entry.block, entry.pins = None, None
            self._resident.pop(entry.id, None)
        self.reset(entry)

    # -- pins

    def pin(self, entry: Object, client: int) -> None:
        """The client is told where the object lies; it stays there until as many `unpin`."""
        pins = entry.pins
        if pins is None:
            pins = entry.pins = {}
        pins[client] = pins.get(client, 0) + 1
        self._pinned.setdefault(client, {})[entry.id] = None
        if entry.state == SPILLING:
            entry.state = ARENA
        self._resident.pop(entry.id, None)
        self._resident[entry.id] = entry

    def unpin(self, object_id: bytes, client: int, count: int) -> None:
        entry = self.objects.get(object_id)
        if entry is None or not entry.pins or client not in entry.pins:
            entry = self._ghosts.get(object_id)
            if entry is None or not entry.pins or client not in entry.pins:
                return
        entry.pins[client] -= count
        if entry.pins[client] <= 0:
            del entry.pins[client]
            self._unindex(object_id, client)
            if not entry.pins:
                entry.pins = None
                if self._ghosts.get(object_id) is entry:
                    del self._ghosts[object_id]
                    self._give_back(entry)
                elif entry.holders is None:
                    self.collect(entry)
                self.serve()

    def _unindex(self, object_id: bytes, client: int) -> None:
        for table in (self.objects, self._ghosts):
            entry = table.get(object_id)
            if entry is not None and entry.pins and client in entry.pins:
                return
        mine = self._pinned[client]
        del mine[object_id]
        if not mine:
            del self._pinned[client]

    def _give_back(self, entry: Object) -> None:
        """The entry's block is free, as soon as the disk thread does not use it any more."""
        assert entry.block is not None
        if entry.id in self._moving:
            self._orphans[entry.id] = entry.block
        else:
            self.arena.free(entry.block)
        entry.block = None

    def drop_pins(self, client: int) -> None:
        """The client and every process that inherited its mapping are gone."""
        for object_id in list(self._pinned.get(client, ())):
            # Once more for one that was freed while it was looked at.
            self.unpin(object_id, client, 1 << 30)
            self.unpin(object_id, client, 1 << 30)

    def reserve(self, objects: Iterable[bytes]) -> None:
        """A task needs these together: they leave memory again only for the sake of running code."""
        for object_id in objects:
            self._reserved[object_id] = self._reserved.get(object_id, 0) + 1

    def unreserve(self, objects: Iterable[bytes]) -> None:
        for object_id in objects:
            self._reserved[object_id] -= 1
            if not self._reserved[object_id]:
                del self._reserved[object_id]

    # -- memory

    def serve(self) -> None:
        """Serve requests for memory in their order, moving the least recently used objects to disk where needed."""
        if self._outgrown and not self._requests:
            self._outgrow()
        while queue := self._requests or self._later:
            request = queue[0]
            block = self.arena.allocate(request.size, max(request.client, 0))
            if block is None:
                self._make_room(request.size, urgent=queue is self._requests)
                block = self.arena.allocate(request.size, max(request.client, 0))
                if block is None:
                    break
            self._punch()
            queue.popleft()
            entry = self.objects.get(request.object)
            error = self._unreservable(block)
            if error:
                self._refuse(request, "DiskFullError", error)
                continue
            if request.client < 0:
                del self._wanted[request.object]
                if entry is None or entry.state != SPILLED:
                    self.arena.free(block)
                    continue
                entry.block = block
                entry.state = RESTORING
                self._moving[entry.id] = 0
                self.effects.append(Restore(request.object, block.offset, entry.size))
            else:
                entry = self.entry(request.object)
                if entry.state != PENDING:
                    # An earlier execution of the task has made it, and it was seen: that one stays.
                    self.arena.free(block)
                    self.effects.append(Refused(request, "", ""))
                    continue
                entry.block = block
                entry.size = request.size
                entry.state = CREATED
                self._created[entry.id] = entry
                self.effects.append(Granted(request, block.offset, block.warm))

    def _unreservable(self, block: Block) -> str:
        """Why nobody may write to the block, which is free again then; empty: they may."""
        if self._reserve_block is None:
            return ""
        self._punch()
        if not self._reserve_block(block.offset, block.size):
            return ""
        # Memory that was used and is free still takes its place on the disk.
        self.arena.cool(block.size)
        self._punch()
        if not (error := self._reserve_block(block.offset, block.size)):
            return ""
        self.arena.free(block)
        return error

    def _refuse(self, request: Request, error: str, text: str) -> None:
        if request.client >= 0:
            self.effects.append(Refused(request, error, text))
            return
        del self._wanted[request.object]
        entry = self.objects.get(request.object)
        if entry is not None:
            self.refused.append((entry, error, text))

    def _punch(self) -> None:
        """Before anybody can write to a block: what is punched later than that may be in it."""
        punches = self.arena.take_punches()
        if punches:
            self.first.append(Punch(punches))

    def _make_room(self, size: int, *, urgent: bool) -> None:
        """Start moving objects out until ``size`` bytes will be free; ``urgent``: what is reserved for queued tasks too, last."""
        needed = -(-size // PAGE) * PAGE
        for reserved in (False, True) if urgent and self._reserved else (False,):
            for entry in list(self._resident.values()):
                if self.arena.used - self._spilling + needed <= self.arena.limit:
                    return
                if (entry.id in self._reserved) == reserved:
                    self._move_out(entry)

    def _move_out(self, entry: Object) -> None:
        """Have the object leave memory, if nobody looks at it."""
        if entry.pins or entry.state != ARENA or entry.block is None or entry.id in self._moving:
            return
        if entry.on_disk:
            self.arena.free(entry.block)
            entry.block = None
            entry.state = SPILLED
            del self._resident[entry.id]
        elif not self._disk_full:
            entry.state = SPILLING
            self._moving[entry.id] = entry.block.size
            self._spilling += entry.block.size
            self.effects.append(Spill(entry.id, entry.block.offset, entry.size))

    def shrink(self, size: int) -> int:
        """The machine's memory is nearly used up: give free memory back to it and move ``size`` bytes of objects to disk; how many bytes that will be."""
        gained = self.arena.cool(size)
        self._punch()
        for entry in list(self._resident.values()):
            if gained + self._spilling >= size:
                break
            if entry.id not in self._reserved:
                self._move_out(entry)
        return gained + self._spilling

    def spilled(self, object_id: bytes, error: str = "") -> None:
        """The shell wrote the object to disk, or failed with ``error``."""
        entry = self.objects.get(object_id)
        self._spilling -= self._moving.pop(object_id, 0)
        orphan = self._orphans.pop(object_id, None)
        if orphan is not None:
            self.arena.free(orphan)
            if not error:
                self.effects.append(DeleteSpilled(object_id))
            self.serve()
            return
        if entry is None or entry.block is None:
            # It was freed while somebody looks at it.
            if not error:
                self.effects.append(DeleteSpilled(object_id))
            self.serve()
            return
        if error:
            self._disk_full = error
            entry.state = ARENA
        else:
            entry.on_disk = True
            self.spilled_bytes += entry.size
            self.spilled_total += entry.size
            if entry.state == SPILLING:
                self.arena.free(entry.block)
                entry.block = None
                entry.state = SPILLED
                self._resident.pop(object_id, None)
        self.serve()

    def want(self, entry: Object, *, urgent: bool) -> None:
        """Somebody needs a spilled object back; it is in ``available`` once read. ``urgent``: running code, else the inputs of a queued task."""
        if entry.state != SPILLED:
            return
        request = self._wanted.get(entry.id)
        if request is None:
            request = self._wanted[entry.id] = Request(entry.id, entry.size, -1, 0)
        elif urgent and request in self._later:
            self._later.remove(request)
        else:
            return
        (self._requests if urgent else self._later).append(request)
        self.serve()

    def restored(self, object_id: bytes, error: str = "") -> None:
        """The shell read the object back from disk, or failed with ``error``."""
        self._moving.pop(object_id, None)
        orphan = self._orphans.pop(object_id, None)
        if orphan is not None:
            self.arena.free(orphan)
            self.effects.append(DeleteSpilled(object_id))
            self.serve()
            return
        entry = self.objects.get(object_id)
        if entry is None or entry.state != RESTORING:
            return
        if error:
            assert entry.block is not None
            self.arena.free(entry.block)
            entry.block = None
            entry.state = SPILLED
            entry.data = error.encode()
            self.lost.append(entry)
            self.serve()
            return
        entry.state = ARENA
        self.restored_total += entry.size
        self._resident[object_id] = entry
        self.available.append(entry)

    def expire(self, now: float, *, busy: bool) -> None:
        """Refuse the first request when it has waited too long and nothing more can be moved out of its way.

        ``busy``: something runs, so that the inputs of queued tasks may find room when it ends.
        """
        queue = self._requests or self._later
        if not queue or self._spilling:
            return
        request = queue[0]
        if request is not self._head or (busy and queue is self._later):
            self._head, self._head_since = request, now
            if not self._disk_full or (busy and queue is self._later):
                return
        if self._disk_full or now - self._head_since > self.patience:
            queue.popleft()
            self._head = None
            error = "DiskFullError" if self._disk_full else "StoreFullError"
            self._refuse(request, error, self._full_text(request))
            self._disk_full = ""
            self.serve()

    @property
    def waiting_for_memory(self) -> bool:
        return bool(self._requests or self._later)

    def _full_text(self, request: Request) -> str:
        resident = [*self._resident.values(), *self._ghosts.values()]
        largest = sorted((e for e in resident if e.block is not None), key=lambda e: -e.size)[:5]
        shown = "; ".join(
            f"{ids.short(e.id)} {_bytes(e.size)} "
            + (
                "in use by " + self._names(sorted(e.pins))
                if e.pins
                else "held by " + self._names(holder_sets.each(e.holders))
            )
            for e in largest
        )
        why = (
            f"objects cannot be moved to disk: {self._disk_full}"
            if self._disk_full
            else "everything in it is in use (arrays made from it are still alive), so nothing can be moved to disk"
        )
        return (
            f"no room for {_bytes(request.size)} in the object store ({_bytes(self.arena.used)} of {_bytes(self.arena.limit)} used): {why}. "
            f"Largest: {shown or 'none'}. Delete arrays or refs that are no longer needed, or start the cluster with a larger store."
        )

    def _names(self, holders: Iterable[Holder]) -> str:
        names = [self._name_of(holder) for holder in holders]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nobody"

    # -- questions

    def check(self) -> None:
        """Assert the table's rules."""
        self.arena.check()
        inline = 0
        spans: list[tuple[int, int]] = []
        created = [object_id for object_id, entry in self.objects.items() if entry.state == CREATED]
        assert sorted(created) == sorted(self._created), "what is being written is not what is known of it"
        pinned = {
            (client, object_id)
            for table in (self.objects, self._ghosts)
            for object_id, entry in table.items()
            for client in entry.pins or ()
        }
        indexed = {(client, object_id) for client, mine in self._pinned.items() for object_id in mine}
        assert pinned == indexed, f"pins {sorted(pinned ^ indexed)} are not known by both"
        for object_id, entry in self.objects.items():
            assert entry.id == object_id
            if entry.state == INLINE:
                inline += len(entry.data)
            if entry.pins:
                assert entry.state == ARENA, f"pinned object in state {STATE_NAMES[entry.state]}"
                assert entry.block is not None, "pinned object without memory"
            if entry.state in (CREATED, ARENA, SPILLING, RESTORING):
                assert entry.block is not None, f"{STATE_NAMES[entry.state]} without memory"
                spans.append((entry.block.offset, entry.block.size))
            else:
                assert entry.block is None, f"{STATE_NAMES[entry.state]} with memory"
            if entry.state == SPILLED:
                assert entry.on_disk
        for ghost in self._ghosts.values():
            assert ghost.block is not None, "freed object without memory"
            spans.append((ghost.block.offset, ghost.block.size))
        spans += [(block.offset, block.size) for block in self._orphans.values()]
        assert inline == self.inline_bytes, f"inline bytes {self.inline_bytes}, counted {inline}"
        spans.sort()
        for (a, length), (b, _) in pairwise(spans):
            assert a + length <= b, "arena blocks overlap"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GB"
