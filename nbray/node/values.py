"""Values on their way: puts, gets, results pushed to whoever submitted, pins, holders. Pure; part of the node's machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.config import PUSH_WINDOW
from nbray.events import ObjectEvent
from nbray.failure_codec import encode_system_error
from nbray.messages import Created, Located, Ready, Reply, Value
from nbray.store import holders as holder_sets
from nbray.store import objects as store
from nbray.store.objects import ARENA, CREATED, ERROR_KIND, INLINE, PENDING, Granted, Object, Refused

if TYPE_CHECKING:
    from nbray import messages as m
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.scheduler.task import Task


class Wait:
    """A blocking `Get` of a worker: how many answers are left until it goes on."""

    __slots__ = ("left", "objects", "request", "task")

    def __init__(self, request: int, task: bytes, left: int, objects: list[bytes]) -> None:
        self.request = request
        self.task = task
        self.left = left
        self.objects = objects


class Values:
    """What the node does with objects on behalf of its peers."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.table = node.objects
        self.waits: dict[tuple[int, int], Wait] = {}
        self.fetching: dict[bytes, list[Task]] = {}
        """Spilled inputs on their way back -> the tasks at the head of the queue that wait for them."""

    # -- messages

    def on_put(self, peer: Peer, message: m.Put) -> None:
        entry = self.table.entry(message.object)
        if entry.state == PENDING:
            entry.holders = holder_sets.add(entry.holders, peer.number)
            self.table.seal_inline(entry, message.kind, message.data, message.refs)
            self.sealed(entry)

    def on_create(self, peer: Peer, message: m.Create) -> None:
        self.table.create(message.object, message.size, peer.number, message.request, self.node.now)

    def on_seal(self, peer: Peer, message: m.Seal) -> None:
        if not message.held:
            # A return value or an item: until the task reports it, a retry may still make another one.
            self.table.written(message.object, message.kind, message.refs)
            return
        entry = self.table.seal(message.object, message.kind, message.refs)
        if entry is None:
            return
        entry.holders = holder_sets.add(entry.holders, peer.number)
        self._event(entry, peer)
        self.sealed(entry)

    def reported(self, entry: Object, peer: Peer) -> None:
        """The task that has written this return value or item says that it is what it returns."""
        if entry.state == CREATED:
            self.table.seal(entry.id, entry.kind, entry.refs)
            self._event(entry, peer)

    def _event(self, entry: Object, peer: Peer) -> None:
        self.node.gcs.facts.append(
            ObjectEvent(entry.id, "SEALED", self.node.now, entry.size, peer.job, peer.cell)
        )

    def on_abort(self, peer: Peer, message: m.Abort) -> None:
        self.table.abort(message.object)

    def on_get(self, peer: Peer, message: m.Get) -> None:
        blocked = message.blocked and peer.worker is not None
        answered = 0
        for object_id in message.objects:
            entry = self.table.objects.get(object_id)
            stream = self.node.tasks.streams.get(ids.task_of(object_id)) if entry is None else None
            if stream is not None and ids.index_of(object_id) >= stream.made and not stream.unwanted:
                if stream.length >= 0:
                    continue  # It will never be made; the end of the stream is on its way to whoever asks.
                entry = self.table.entry(object_id)
            if entry is None:
                answered += 1
                self.node.send(peer, Value(object_id, ERROR_KIND, self.unknown(object_id)))
            elif entry.state == INLINE:
                answered += 1
                if not entry.pushed or entry.producer is None or entry.producer.owner != peer.number:
                    self.node.send(peer, Value(object_id, entry.kind, entry.data, entry.refs))
            elif entry.state >= ARENA and not message.fetch:
                answered += 1
                self.node.send(peer, Ready(object_id, entry.size))
            elif entry.state in (ARENA, store.SPILLING):
                answered += 1
                self._locate(peer, entry)
            else:
                if entry.state == store.SPILLED:
                    self.table.want(entry, self.node.now)
                waiter = (peer.number, message.fetch, message.request if blocked else 0)
                if entry.waiters is None:
                    entry.waiters = [waiter]
                else:
                    entry.waiters.append(waiter)
        if blocked and answered < (message.count or len(message.objects)):
            worker = peer.worker
            assert worker is not None
            left = (message.count or len(message.objects)) - answered
            self.waits[peer.number, message.request] = Wait(
                message.request, message.task, left, message.objects
            )
            self.node.scheduler.blocked(worker, message.task)
            if len(worker.pending) > 1 and not worker.actor:
                self.node.revoke(worker)
            self.node.tasks.hurry(message.task, message.objects)

    def abandon(self, object_id: bytes) -> None:
        """This object will never be made; who waits for it hears that by other means."""
        entry = self.table.objects.get(object_id)
        if entry is not None and entry.state == PENDING and entry.holders is None:
            del self.table.objects[object_id]

    def on_unblocked(self, peer: Peer, message: m.Unblocked) -> None:
        self._resume(peer, message.request)

    def _resume(self, peer: Peer, request: int) -> None:
        wait = self.waits.pop((peer.number, request), None)
        if wait is not None and peer.worker is not None:
            self.node.scheduler.unblocked(peer.worker, wait.task)

    def on_hold(self, peer: Peer, message: m.Hold) -> None:
        for object_id in message.objects:
            self.table.hold(object_id, peer.number)

    def on_drop(self, peer: Peer, message: m.Drop) -> None:
        objects, number = self.table.objects, peer.number
        collect = self.table.collect
        for object_id in message.objects:
            entry = objects.get(object_id)
            if entry is None:
                continue
            # Without its ref it has forgotten the value: if it meets the object again, it needs it again.
            entry.pushed = False
            if entry.holders == number:
                entry.holders = None
            else:
                entry.holders = holder_sets.remove(entry.holders, number)
                if entry.holders is not None:
                    continue
            if entry.state >= INLINE:
                collect(entry)
            if (
                entry.producer is not None
                and entry.producer.actor
                and entry.id == ids.return_id(entry.producer.actor, 0)
            ):
                self.node.actors.released(entry.producer.actor)

    def on_unpin(self, peer: Peer, message: m.Unpin) -> None:
        for object_id, count in zip(message.objects, message.counts, strict=True):
            self.table.unpin(object_id, peer.number, count)

    def on_free(self, peer: Peer, message: m.Free) -> None:
        for object_id in message.objects:
            entry = self.table.objects.get(object_id)
            if entry is not None and entry.sealed and not entry.pins:
                self.table.reset(entry)
                entry.producer = None
                text = (
                    f"object {ids.short(object_id)} was released by free(); run the code that made it again"
                )
                self.table.seal_inline(entry, ERROR_KIND, encode_system_error("ObjectFreedError", text), None)
                self.node.gcs.facts.append(ObjectEvent(object_id, "FREED", self.node.now))

    # -- a value is there

    def sealed(self, entry: Object) -> None:
        """Tell who waits: processes get the value (or where it lies), tasks count their missing inputs down."""
        waiters = entry.waiters
        if waiters is not None:
            entry.waiters = None
            peers = self.node.peers
            for number, fetch, request in waiters:
                peer = peers.get(number)
                if peer is not None:
                    self._answer(peer, entry, fetch)
                    if request:
                        wait = self.waits.get((number, request))
                        if wait is not None:
                            wait.left -= 1
                            if wait.left <= 0:
                                self._resume(peer, request)
        dependants = entry.dependants
        if dependants is not None:
            entry.dependants = None
            for task in dependants:
                task.missing -= 1
                if task.missing == 0 and not task.terminal:
                    self.node.tasks.inputs_ready(task)
        if entry.holders is None:
            self.table.collect(entry)

    def push(self, owner: Peer, entry: Object, *, announce: bool = False) -> None:
        """A result goes to whoever submitted its task, unasked, unless it has more than enough to read already.

        ``announce``: it cannot ask, because it knows of an item only what it is told.
        """
        if entry.waiters is not None:
            for waiter in entry.waiters:
                if waiter[0] == owner.number:
                    entry.pushed = True
                    return
        if not holder_sets.contains(entry.holders, owner.number):
            return
        room = owner.unsent < PUSH_WINDOW
        if room and entry.state == INLINE:
            entry.pushed = True
            self.node.send(owner, Value(entry.id, entry.kind, entry.data, entry.refs))
        elif room or announce:
            self.node.send(owner, Ready(entry.id, entry.size))

    def _answer(self, peer: Peer, entry: Object, fetch: bool) -> None:
        if entry.state == INLINE:
            self.node.send(peer, Value(entry.id, entry.kind, entry.data, entry.refs))
        elif fetch:
            self._locate(peer, entry)
        else:
            self.node.send(peer, Ready(entry.id, entry.size))

    def _locate(self, peer: Peer, entry: Object) -> None:
        assert entry.block is not None
        self.table.pin(entry, peer.number)
        self.node.send(peer, Located(entry.id, entry.kind, entry.block.offset, entry.size, entry.refs))

    def unknown(self, object_id: bytes) -> bytes:
        text = (
            f"object {ids.short(object_id)} is not known to this cluster: its last reference is gone, it was made in another cluster, "
            "or its cluster was restarted. Keep a reference to what is still needed, or run the code that made it again."
        )
        return encode_system_error("ObjectLostError", text)

    # -- inputs of tasks

    def argument(self, entry: Object, worker: Peer) -> tuple[Any, ...]:
        """What a worker is told of an argument that was a ref."""
        if entry.state == INLINE:
            return (entry.id, entry.kind, entry.data, entry.refs)
        assert entry.block is not None
        self.table.pin(entry, worker.number)
        return (entry.id, entry.kind, entry.block.offset, entry.size, entry.refs)

    def fetch(self, task: Task) -> bool:
        """Whether all inputs of a task at the head of the queue are in memory; if not, they are being brought and pinned for it."""
        missing = 0
        for object_id in task.inputs():
            entry = self.table.objects.get(object_id)
            if entry is None:
                continue
            if entry.state in (store.SPILLED, store.RESTORING):
                missing += 1
                self.fetching.setdefault(object_id, []).append(task)
                self.table.want(entry, self.node.now)
        task.missing = missing
        return missing == 0

    def settle(self) -> None:
        """Turn what the object table has to say into messages and effects of the node."""
        table = self.table
        unheld, table.unheld = table.unheld, []
        for entry in unheld:
            if entry.producer is not None and entry.producer.actor:
                self.node.actors.released(entry.producer.actor)
        while table.available or table.lost:
            available, table.available = table.available, []
            for entry in available:
                tasks = self.fetching.pop(entry.id, [])
                if entry.state == ARENA:
                    self.sealed(entry)
                for task in tasks:
                    task.missing -= 1
                    if task.missing == 0 and not task.terminal:
                        if task.kind.is_call:
                            self.node.actors.inputs_ready(task)
                        else:
                            self.node.scheduler.ready(task, self.node.now, front=True)
            lost, table.lost = table.lost, []
            for entry in lost:
                fetching = self.fetching.pop(entry.id, [])
                if fetching:
                    entry.dependants = [*(entry.dependants or ()), *fetching]
                self.node.tasks.lost(entry, entry.data.decode())
        if not table.effects:
            return
        effects, table.effects = table.effects, []
        for effect in effects:
            if isinstance(effect, Granted):
                peer = self.node.peers.get(effect.request.client)
                if peer is None:
                    table.abort(effect.request.object)
                else:
                    self.node.send(
                        peer,
                        Created(effect.request.number, effect.request.object, effect.offset, effect.warm),
                    )
            elif isinstance(effect, Refused):
                peer = self.node.peers.get(effect.request.client)
                if peer is not None:
                    self.node.send(peer, Reply(effect.request.number, effect.error, effect.text.encode()))
            else:
                self.node.effects.append(effect)

    def forget(self, peer: Peer) -> None:
        """The process is gone: what it held, pinned and waited for."""
        number = peer.number
        for key in [key for key in self.waits if key[0] == number]:
            del self.waits[key]
        self.node.tasks.owner_gone(number)
        self.table.drop_requests(number)
        for entry in list(self.table.objects.values()):
            if entry.waiters:
                entry.waiters = [w for w in entry.waiters if w[0] != number] or None
            if entry.holders is not None and holder_sets.contains(entry.holders, number):
                self.release(entry, number)
            elif entry.holders is None and entry.waiters is None and entry.sealed:
                self.table.collect(entry)

    def release(self, entry: Object, holder: int | bytes) -> None:
        """Remove a holder, with what follows for actors whose last handle it was."""
        self.table.release(entry.id, holder)
        if entry.holders is None and entry.producer is not None and entry.producer.actor:
            self.node.actors.released(entry.producer.actor)
