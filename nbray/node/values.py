"""Values on their way: puts, gets, results pushed to whoever submitted, pins, holders. Pure; part of the node's machine."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.config import PUSH_WINDOW
from nbray.events import ObjectEvent
from nbray.failure_codec import encode_system_error
from nbray.messages import Created, Located, Ready, Reply, Value
from nbray.scheduler.task import WAITING
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

    __slots__ = ("ends", "left", "objects", "request", "task")

    def __init__(self, request: int, task: bytes, left: int, objects: list[bytes], ends: bool) -> None:
        self.request = request
        self.task = task
        self.left = left
        self.objects = objects
        self.ends = ends


class Values:
    """What the node does with objects on behalf of its peers."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.table = node.objects
        self.waits: dict[tuple[int, int], Wait] = {}
        self.fetching: dict[bytes, list[Task]] = {}
        """Spilled inputs on their way back -> the tasks at the head of the queue that wait for them."""
        self._admitted: dict[bytes, tuple[int, list[bytes]]] = {}
        """Tasks whose inputs are being brought, all of them reserved until the task starts -> bytes, inputs."""
        self._line: deque[Task] = deque()
        """Tasks whose inputs are to be brought after those."""
        self._unwanted: dict[bytes, None] = {}
        """Objects that were freed before they were made."""

    def hold(self, entry: Object, process: int) -> None:
        """This process (the number of its connection) holds the object."""
        entry.holders = holder_sets.add(entry.holders, process)
        peer = self.node.peers.get(process)
        if peer is not None and peer.held is not None:
            peer.held[entry.id] = None

    # -- messages

    def on_put(self, peer: Peer, message: m.Put) -> None:
        entry = self.table.entry(message.object)
        if entry.state == PENDING:
            self.hold(entry, peer.number)
            self.table.seal_inline(entry, message.kind, message.data, message.refs)
            self.sealed(entry)

    def on_create(self, peer: Peer, message: m.Create) -> None:
        self.table.create(message.object, message.size, peer.number, message.request)

    def on_seal(self, peer: Peer, message: m.Seal) -> None:
        if not message.held:
            # A return value or an item: until the task reports it, a retry may still make another one.
            self.table.written(message.object, message.kind, message.refs)
            return
        entry = self.table.seal(message.object, message.kind, message.refs)
        if entry is None:
            return
        self.hold(entry, peer.number)
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
                self.table.want(entry, urgent=True)
                if peer.held is not None:
                    peer.held[object_id] = None
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
                message.request, message.task, left, message.objects, message.ends
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
            entry = self.table.objects.get(object_id)
            if entry is not None:
                self.hold(entry, peer.number)

    def on_drop(self, peer: Peer, message: m.Drop) -> None:
        objects, number = self.table.objects, peer.number
        collect = self.table.collect
        held = peer.held
        for object_id in message.objects:
            entry = objects.get(object_id)
            if entry is None:
                if held is not None:
                    held.pop(object_id, None)
                continue
            if held is not None and not entry.waiters:
                held.pop(object_id, None)
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
            if entry is None:
                continue
            if entry.sealed:
                self._free(entry)
            else:
                self._unwanted[object_id] = None

    def _free(self, entry: Object) -> None:
        self.table.free(entry)
        entry.producer = None
        text = f"object {ids.short(entry.id)} was released by free(); run the code that made it again"
        self.table.seal_inline(entry, ERROR_KIND, encode_system_error("ObjectFreedError", text), None)
        self.node.gcs.facts.append(ObjectEvent(entry.id, "FREED", self.node.now))
        self.node.names.freed(entry)

    # -- a value is there

    def sealed(self, entry: Object) -> None:
        """Tell who waits: processes get the value (or where it lies), tasks count their missing inputs down."""
        if self._unwanted and entry.id in self._unwanted:
            del self._unwanted[entry.id]
            self._free(entry)
        waiters = entry.waiters
        if waiters is not None:
            entry.waiters = None
            peers = self.node.peers
            for number, fetch, request in waiters:
                peer = peers.get(number)
                if peer is not None:
                    if peer.held is not None and not holder_sets.contains(entry.holders, number):
                        peer.held.pop(entry.id, None)
                    self._answer(peer, entry, fetch)
                    self._count_down(peer, request)
        dependants = entry.dependants
        if dependants is not None:
            entry.dependants = None
            for task in dependants:
                task.missing -= 1
                if task.missing == 0 and not task.terminal:
                    self.node.tasks.inputs_ready(task)
        if entry.holders is None:
            self.table.collect(entry)

    def _count_down(self, peer: Peer, request: int) -> None:
        """One of the objects that a blocked task waits for is answered."""
        wait = self.waits.get((peer.number, request)) if request else None
        if wait is not None:
            wait.left -= 1
            if wait.left <= 0:
                self._resume(peer, request)

    def push(self, owner: Peer, entry: Object, *, announce: bool = False) -> None:
        """A result goes to whoever submitted its task, unasked, unless it has more than enough to read already.

        ``announce``: it cannot ask, because it knows of an item only what it is told.
        """
        if not holder_sets.contains(entry.holders, owner.number):
            return  # It would not keep it, and not say when it has let go of it.
        if entry.waiters is not None:
            for waiter in entry.waiters:
                if waiter[0] == owner.number:
                    entry.pushed = True
                    return
        room = owner.unsent < PUSH_WINDOW
        if room and entry.state == INLINE:
            entry.pushed = True
            self.node.send_unasked(owner, Value(entry.id, entry.kind, entry.data, entry.refs))
        elif room or announce:
            self.node.send_unasked(owner, Ready(entry.id, entry.size))

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
        """Whether all inputs of a task at the head of the queue are in memory; if not, they are brought before it is queued again.

        At most half of the store is reserved for tasks that are about to start, so that they do not push one another's inputs out.
        """
        return self._fetch(task, task.id in self._admitted)

    def _fetch(self, task: Task, admitted: bool) -> bool:
        objects = self.table.objects
        inputs = task.inputs()
        away: list[Object] = []
        unmade: list[Object] = []
        size = 0
        for object_id in inputs:
            entry = objects.get(object_id)
            if entry is None or entry.is_error:
                self.node.tasks.fail(task, self.unknown(object_id) if entry is None else entry.data)
                return False
            if entry.state < INLINE:
                unmade.append(entry)
            elif entry.state in (store.SPILLED, store.RESTORING):
                away.append(entry)
            if entry.state > INLINE:
                size += entry.size
        if not away and not unmade:
            return True
        if unmade:
            self._await(task, unmade)
            return False
        task.state = WAITING
        task.missing = len(away)
        if not admitted and self._admitted and self._taken() + size > self.table.arena.limit // 2:
            # The first one is always admitted; these wait for a task that starts or ends.
            task.missing += 1
            self._line.append(task)
            return False
        self._admit(task, size, away)
        return False

    def _await(self, task: Task, unmade: list[Object]) -> None:
        """Inputs have to be made again first, perhaps by tasks that stand in line: it must not keep its place before them."""
        self.leave(task)
        task.state = WAITING
        task.missing = len(unmade)
        for entry in unmade:
            if entry.dependants is None:
                entry.dependants = [task]
            else:
                entry.dependants.append(task)

    def _taken(self) -> int:
        return sum(size for size, _ in self._admitted.values())

    def _admit(self, task: Task, size: int, away: list[Object], *, urgent: bool = False) -> None:
        if task.id not in self._admitted:
            inputs = task.inputs()
            self._admitted[task.id] = (size, inputs)
            self.table.reserve(inputs)
        for entry in away:
            self.fetching.setdefault(entry.id, []).append(task)
            self.table.want(entry, urgent=urgent)

    def leave(self, task: Task) -> None:
        """The task starts, or is over: its inputs need not be kept in memory for it, and others may have theirs brought."""
        if not self._admitted or task.id not in self._admitted:
            return
        _, inputs = self._admitted.pop(task.id)
        self.table.unreserve(inputs)
        while self._line:
            following = self._line[0]
            if not following.terminal:
                size = sum(self.table.objects[i].size for i in following.inputs() if i in self.table.objects)
                if self._admitted and self._taken() + size > self.table.arena.limit // 2:
                    break
            self._line.popleft()
            if not following.terminal:
                self._bring(following, size)

    def over(self, task: Task) -> None:
        """The task is terminal: nothing is brought for it any more."""
        if task.missing and self.fetching:
            for object_id in task.inputs():
                tasks = self.fetching.get(object_id)
                if tasks is not None and task in tasks:
                    tasks.remove(task)
                    if not tasks:
                        del self.fetching[object_id]
        self.leave(task)

    def _bring(self, task: Task, size: int, *, urgent: bool = False) -> None:
        """A task in the line gets its turn."""
        objects = self.table.objects
        away = [
            objects[i]
            for i in task.inputs()
            if i in objects and objects[i].state in (store.SPILLED, store.RESTORING)
        ]
        # What was away when it joined the line may be back, and the other way round.
        unmade = [objects[i] for i in task.inputs() if i in objects and objects[i].state < INLINE]
        task.missing = len(away)
        if unmade:
            self._await(task, unmade)
        elif away:
            self._admit(task, size, away, urgent=urgent)
        else:
            self._go(task)

    def hurry(self, task: Task) -> None:
        """Running code waits for this task: it need not stand in line."""
        if task in self._line:
            self._line.remove(task)
            size = sum(self.table.objects[i].size for i in task.inputs() if i in self.table.objects)
            self._bring(task, size, urgent=True)
        elif task.id in self._admitted:
            for object_id in task.inputs():
                entry = self.table.objects.get(object_id)
                if entry is not None:
                    self.table.want(entry, urgent=True)

    def in_line(self, task: Task) -> bool:
        """Whether it waits for others to start before its inputs are brought."""
        return task in self._line

    def _go(self, task: Task) -> None:
        """All inputs are in memory again."""
        if task.kind.is_call:
            self.node.actors.inputs_ready(task)
        else:
            self.node.scheduler.ready(task, self.node.now, front=True)

    def settle(self) -> None:
        """Turn what the object table has to say into messages and effects of the node."""
        table = self.table
        unheld, table.unheld = table.unheld, []
        for entry in unheld:
            if entry.producer is not None and entry.producer.actor:
                self.node.actors.released(entry.producer.actor)
        while table.available or table.lost or table.refused:
            available, table.available = table.available, []
            for entry in available:
                self._restored(entry)
            lost, table.lost = table.lost, []
            for entry in lost:
                self._lost(entry)
            refused, table.refused = table.refused, []
            for entry, error, text in refused:
                self._refused(entry, encode_system_error(error, text))
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

    def large_inputs(self, task: Task) -> bool:
        """Whether some of its inputs lie in the arena."""
        objects = self.table.objects
        return any(objects[i].state > INLINE for i in task.inputs() if i in objects)

    def _restored(self, entry: Object) -> None:
        if entry.state != ARENA:
            # Pushed out again before it was looked at, or freed.
            if entry.waiters or entry.id in self.fetching:
                self.table.want(entry, urgent=bool(entry.waiters))
            return
        tasks = self.fetching.pop(entry.id, [])
        self.sealed(entry)
        for task in tasks:
            task.missing -= 1
            if task.missing == 0 and not task.terminal:
                self._go(task)

    def _lost(self, entry: Object) -> None:
        tasks = [task for task in self.fetching.pop(entry.id, []) if not task.terminal]
        # They wait for it as for an object that is being made: it will be, or fail.
        entry.dependants = (entry.dependants or []) + tasks or None
        self.node.tasks.lost(entry, entry.data.decode())
        # Only now: those whose turn comes may need the same object, and must not wait for what is not on disk any more.
        for task in tasks:
            self.leave(task)

    def _refused(self, entry: Object, error: bytes) -> None:
        """A spilled value finds no room in memory: who waits for it now is told; the value stays where it is."""
        waiters, entry.waiters = entry.waiters or [], None
        for number, _, request in waiters:
            peer = self.node.peers.get(number)
            if peer is not None:
                self.node.send(peer, Value(entry.id, ERROR_KIND, error))
                self._count_down(peer, request)
        for task in self.fetching.pop(entry.id, []):
            if task.terminal:
                continue
            if waiters:
                self.fetching.setdefault(entry.id, []).append(task)
                self.table.want(entry, urgent=False)
            else:
                self.node.tasks.fail(task, error)
                if task.kind.is_call:
                    self.node.actors.dequeue(task)
        if entry.holders is None:
            self.table.collect(entry)

    def forget(self, peer: Peer) -> None:
        """The process is gone: what it held, pinned and waited for."""
        number = peer.number
        for key in [key for key in self.waits if key[0] == number]:
            del self.waits[key]
        self.node.tasks.owner_gone(number)
        self.table.drop_requests(number)
        objects = self.table.objects
        if peer.held is None:
            entries = list(objects.values())
        else:
            entries = [objects[object_id] for object_id in peer.held if object_id in objects]
            peer.held = {}
        for entry in entries:
            if objects.get(entry.id) is not entry:
                continue  # What held it has just gone.
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
