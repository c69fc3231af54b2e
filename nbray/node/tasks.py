"""The tasks of a node from submission to their end: inputs, attempts, results, errors, cancellation. Pure; part of the node's machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.config import CANCEL_GRACE, INLINE_LIMIT
from nbray.events import TaskEvent
from nbray.failure_codec import encode_system_error, summary
from nbray.messages import (
    ACTOR_CALL,
    CREATE_ACTOR,
    STREAMING,
    TASK,
    Register,
    Run,
    StreamAck,
    StreamEnd,
    StreamRoom,
)
from nbray.messages import Function as FunctionMessage
from nbray.messages import World as WorldMessage
from nbray.node import pool as pools
from nbray.scheduler.resources import readable
from nbray.scheduler.task import CANCELLED, FAILED, FINISHED, READY, RUNNING, WAITING, Task
from nbray.store import holders as holder_sets
from nbray.store.objects import ERROR_KIND, INLINE, PENDING, Object

if TYPE_CHECKING:
    from nbray import messages as m
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.pool import Worker

_EVENT_STATES = {FINISHED: 4, FAILED: 5, CANCELLED: 6}
_RETRIED = 7

REMADE = 1 << 31
"""``made`` and ``consumed`` of a stream whose generator runs again only for items that were lost."""


class Stream:
    """A generator task's items: how many are sealed and taken; the owner's hold on items it has not taken is the node's to drop."""

    __slots__ = ("consumed", "length", "made", "owner", "unwanted")

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.made = 0
        self.consumed = 0
        self.length = -1
        self.unwanted = False


class Tasks:
    """All unfinished tasks of a node."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self._announced = node.names.announced
        self._watchers = node.watches.watchers
        self.tasks: dict[bytes, Task] = {}
        self.streams: dict[bytes, Stream] = {}
        self.tombstones: dict[bytes, None] = {}
        """Cancelled tasks, so that what they still submit is refused."""
        self.executions: dict[bytes, Task] = {}
        self.graces: list[tuple[float, Task, int]] = []
        """Cancelled running tasks: when their worker is ended if they have not stopped, and the attempt meant."""

    # -- submission

    def make(self, peer: Peer, submit: m.Submit) -> Task:
        kind = peer.kinds[submit.number]
        session, world, cell = peer.session, peer.world, peer.cell
        process = peer.process
        task = Task(submit, kind, peer.number, session, world, cell, self.node.now)
        self.tasks[task.id] = task
        if submit.parent:
            parent = self.tasks.get(submit.parent)
            if parent is not None:
                if parent.children is None:
                    parent.children = {}
                parent.children[task.id] = None
                task.priority = max(task.priority, parent.priority)
                task.cell = parent.cell
                task.world = parent.world
                task.count = parent.count
        count = task.count
        if count is None:
            count = peer.count
            if count is None:
                count = peer.count = self.node.counts.of(session, cell)
            task.count = count
        count.submitted += 1
        if not kind.is_call:
            spec = kind.spec
            task.shape = self.node.scheduler.shape(
                session, (spec.environment or peer.environment) + process, spec.resources
            )
        return task

    def on_submit(self, peer: Peer, submit: m.Submit) -> None:
        task = self.make(peer, submit)
        kind = task.kind
        returns = kind.spec.num_returns
        if returns == 1:
            object_id = submit.task + ids.FIRST_INDEX
            known = self.node.objects.objects.get(object_id)
            if known is None:
                self.node.objects.objects[object_id] = Object(object_id, peer.number, task)
            else:
                known.holders = holder_sets.add(known.holders, peer.number)
                known.producer = task
            if peer.held is not None:
                peer.held[object_id] = None
        self.admit(task)

    def admit(self, task: Task, *, again: bool = False) -> None:
        """Make the entries of what the task returns, hold what it needs, queue it when its inputs are there. ``again``: it ran before."""
        submit, spec = task.submit, task.kind.spec
        objects = self.node.objects
        if self._watchers:
            self.node.watches.changed(task)
        if not again:
            returns = spec.num_returns
            if returns == STREAMING:
                self.streams[task.id] = Stream(task.owner)
            elif returns != 1 or spec.kind == CREATE_ACTOR:
                for index in range(1 if spec.kind == CREATE_ACTOR else returns):
                    made = objects.entry(ids.return_id(task.id, index))
                    self.node.values.hold(made, task.owner)
                    made.producer = task
            if submit.parent and (submit.parent in self.tombstones):
                task.cancelled = True
                self.fail(task, self.cancelled_error(task))
                return
        missing = 0
        if submit.deps is not None or submit.refs is not None or submit.args_object:
            for object_id in submit.refs or ():
                objects.hold(object_id, task.id)
            failed: Object | None = None
            for object_id in task.inputs():
                entry = objects.objects.get(object_id)
                if entry is None:
                    self.fail(task, self.node.values.unknown(object_id))
                    return
                entry.holders = holder_sets.add(entry.holders, task.id)
                if entry.state < INLINE:
                    missing += 1
                    if entry.dependants is None:
                        entry.dependants = [task]
                    else:
                        entry.dependants.append(task)
                elif entry.is_error and failed is None:
                    failed = entry
            if failed is not None:
                self.fail(task, failed.data)
                return
        task.missing = missing
        if task.kind.is_call:
            self.node.actors.submit(task)
        elif missing:
            task.state = WAITING
        else:
            self._queue(task)

    def inputs_ready(self, task: Task) -> None:
        """The last missing input of a task is there (or has failed)."""
        for object_id in task.inputs():
            entry = self.node.objects.objects.get(object_id)
            if entry is not None and entry.is_error:
                if task.kind.is_call:
                    self.fail(task, entry.data)
                    self.node.actors.dequeue(task)
                else:
                    self.fail(task, entry.data)
                return
        if task.kind.is_call:
            self.node.actors.inputs_ready(task)
        else:
            self._queue(task)

    def _queue(self, task: Task) -> None:
        shape = task.shape
        assert shape is not None
        if not shape.feasible:
            text = (
                f"{task.name} asks for {readable(shape.resources)}, the cluster has {readable(self.node.scheduler.ledger.total)} in all, so it could never "
                "run. Ask for less, or start a cluster that has it (%cluster start --cpus/--gpus, nbray.init(num_cpus=, num_gpus=, resources=))."
            )
            self.fail(task, encode_system_error("UnschedulableError", text))
            return
        if self._watchers:
            self.node.watches.changed(task)
        self.node.scheduler.ready(task, self.node.now)

    def hurry(self, waiter: bytes, wanted: list[bytes]) -> None:
        """A blocked task waits for these objects: those who make them, transitively, go to the front with its priority (protocol section 5)."""
        task = self.tasks.get(waiter)
        priority = task.priority if task is not None else 0
        seen: set[bytes] = set()
        found: list[Task] = []
        stack = list(wanted)
        while stack and len(seen) < 1000:
            producer = self.tasks.get(ids.task_of(stack.pop()))
            if producer is None or producer.id in seen:
                continue
            seen.add(producer.id)
            if producer.state == READY:
                found.append(producer)
            elif producer.state == WAITING:
                stack.extend(producer.inputs())
                self.node.values.hurry(producer)
        if len(found) < self.node.scheduler.queue.backlog():
            for producer in reversed(found):
                self.node.scheduler.hurry(producer, priority)

    # -- running

    def run(self, worker: Worker, task: Task, started: bool) -> None:
        """Tell a worker to run a task, and first what it does not know yet."""
        peer = worker.peer
        assert peer is not None
        if self._watchers:
            self.node.watches.changed(task)
        submit, kind, send = task.submit, task.kind, self.node.send
        if kind.number not in worker.kinds:
            worker.kinds.add(kind.number)
            function = kind.spec.function
            if function not in worker.functions:
                worker.functions.add(function)
                send(peer, FunctionMessage(function, self.node.functions.get(function, b""), kind.spec.name))
            send(peer, Register(kind.number, kind.spec))
        if task.world != worker.world:
            # What a task submits lives in the world of the task.
            worker.world = peer.world = task.world
            self._send_world(peer, worker)
        if kind.spec.kind == CREATE_ACTOR:
            self.node.actors.configure(worker, task)
        deps: list[tuple[Any, ...]] | None = None
        args, args_at = submit.args, None
        if submit.deps or submit.args_object:
            values, objects = self.node.values, self.node.objects.objects
            if task.count is not None:
                for object_id in task.inputs():
                    task.count.reads(objects[object_id])
            deps = [values.argument(objects[object_id], peer) for object_id in submit.deps or ()]
            if submit.args_object:
                located = values.argument(objects[submit.args_object], peer)
                args_at = (located[2], located[3])
            # Only now that its inputs are pinned may those of others take their room.
            values.leave(task)
        if kind.spec.num_returns == STREAMING:
            self.executions[task.id] = task
            stream = self.streams.get(task.id)
            if stream is not None and (stream.consumed or stream.unwanted):
                # An earlier attempt, or the wait in the queue: the consumer will not say again what it has said.
                send(peer, StreamRoom(task.id, -1 if stream.unwanted else stream.consumed))
        send(
            peer,
            Run(
                task.run,
                task.id,
                kind.number,
                submit.kind,
                args,
                submit.refs,
                deps,
                task.attempt,
                started,
                args_at,
                task.cell,
                submit.args_object,
            ),
        )

    def _send_world(self, peer: Peer, worker: Worker) -> None:
        """Tell a worker the world of the runs that follow, and first the sources of modules in it that it does not have."""
        world = self.node.worlds.get(worker.world)
        if world is None:
            return
        for source in world.sources or ():
            if source not in worker.functions:
                worker.functions.add(source)
                self.node.send(peer, FunctionMessage(source, self.node.functions.get(source, b"")))
        self.node.send(peer, WorldMessage(worker.world, world.blob))

    def _take(self, peer: Peer, run: int) -> Task | None:
        """The task that a worker reports on, removed from its pending ones."""
        worker = peer.worker
        if worker is None:
            return None
        pending = worker.pending
        if pending and pending[0].run == run:
            worker.last = pending[0]
            return pending.popleft()
        for task in pending:
            if task.run == run:
                pending.remove(task)
                worker.last = task
                return task
        return None

    def on_done(self, peer: Peer, message: m.Done) -> None:
        task = self._take(peer, message.run)
        if task is None:
            return
        kind = task.kind
        kind.runs += 1
        seconds = message.seconds
        mean = kind.seconds
        kind.seconds = seconds if mean < 0 else mean + 0.1 * (seconds - mean)
        task.started = message.started
        if self._announced:
            self._bind_names(task)
        object_id = task.id + ids.FIRST_INDEX
        entry = self.node.objects.objects.get(object_id)
        if entry is not None and entry.state == PENDING:
            self.node.objects.seal_inline(entry, message.kind, message.data, message.refs)
            owner = self.node.peers.get(task.owner)
            if owner is not None and entry.holders is not None:
                self.node.values.push(owner, entry)
            self.node.values.sealed(entry)
        self._ended(task, FINISHED, message.started + seconds, len(message.data), "")
        self._after(peer, task)

    def _bind_names(self, task: Task) -> None:
        if task.id in self._announced:
            self.node.names.finished(task)

    def _after(self, peer: Peer, task: Task) -> None:
        """The worker is free for its next task."""
        worker = peer.worker
        assert worker is not None
        spec = task.kind.spec
        if spec.max_calls:
            calls = worker.calls[task.kind.number] = worker.calls.get(task.kind.number, 0) + 1
            if calls >= spec.max_calls and worker.state == pools.BUSY:
                self.node.scheduler.close(worker, self.node.now, rest=False)
                self.node.retire_worker(worker, "max_calls")
                return
        if spec.kind == TASK:
            self.node.scheduler.finished(worker, self.node.now)
            if worker.home is not None and worker.home[2] and worker.state == pools.IDLE:
                self.node.end_worker(worker, "a GPU worker runs one task")
        elif spec.kind == ACTOR_CALL:
            worker.since = self.node.now
            self.node.actors.finished(worker)
        elif task.state == FINISHED:
            self.node.actors.created(worker, task)

    def on_done_many(self, peer: Peer, message: m.DoneMany) -> None:
        task = self._take(peer, message.run)
        if task is None:
            return
        task.started = message.started
        task.kind.learn(message.seconds)
        if self._announced:
            self._bind_names(task)
        owner = self.node.peers.get(task.owner)
        size = 0
        gone: list[Object] = []
        for index, (kind, data, refs) in enumerate(message.values):
            entry = self.node.objects.objects.get(ids.return_id(task.id, index))
            if entry is None:
                continue
            if kind < 0:
                self.node.values.reported(entry, peer)
            elif entry.state == PENDING:
                self.node.objects.seal_inline(entry, kind, data, refs)
            if entry.sealed:
                size += entry.size
                if owner is not None:
                    self.node.values.push(owner, entry)
                self.node.values.sealed(entry)
            else:
                gone.append(entry)
        stream = self.streams.get(task.id)
        if stream is not None:
            self._end_stream(task, stream)
        self._ended(task, FINISHED, message.started + message.seconds, size, "")
        self._after(peer, task)
        for entry in gone:
            # It was there when this attempt began to write it, so it did not.
            self.lost(entry, "its spilled copy was lost while its task ran again")

    def on_failed(self, peer: Peer, message: m.Failed) -> None:
        task = self._take(peer, message.run)
        if task is None:
            return
        task.started = message.started
        task.kind.learn(message.seconds)
        finished = message.started + message.seconds
        worker = peer.worker
        assert worker is not None
        if task.cancelled:
            self.fail(task, self.cancelled_error(task), finished=finished)
        elif message.retriable and task.retries != 0:
            self._event(task, _RETRIED, finished, 0, summary(message.data)[0])
            self.again(task)
            if task.kind.is_call:
                self.node.actors.requeue(task)
            else:
                self._queue(task)
        elif task.kind.spec.kind == CREATE_ACTOR:
            name, text = summary(message.data)
            if task.count is not None:
                task.count.failure(task, name, text, ran=True)
            self._ended(task, FAILED, finished, 0, name)
            self.node.actors.creation_failed(task, message.data)
            self._seal_error(task, message.data)
            self.node.end_worker(worker, "the actor's constructor raised")
            return
        else:
            self.fail(task, message.data, finished=finished, refs=message.refs)
        self._after(peer, task)

    def on_item(self, peer: Peer, message: m.Item) -> None:
        """An item of a generator."""
        worker = peer.worker
        task = next((t for t in worker.pending if t.run == message.run), None) if worker is not None else None
        stream = self.streams.get(task.id) if task is not None else None
        if task is None or stream is None:
            return
        object_id = ids.return_id(task.id, message.index)
        made = message.index < stream.made
        stream.made = max(stream.made, message.index + 1)
        if made or stream.unwanted:
            # Of an earlier attempt, or dropped: worth something only if somebody still knows it.
            known = self.node.objects.objects.get(object_id)
            if known is None:
                return
            entry = known
        else:
            entry = self.node.objects.entry(object_id)
            self.node.values.hold(entry, task.owner)
            entry.producer = task
        if message.kind < 0:
            self.node.values.reported(entry, peer)
        elif entry.state == PENDING:
            self.node.objects.seal_inline(entry, message.kind, message.data, message.refs)
        if entry.sealed:
            owner = self.node.peers.get(task.owner)
            if owner is not None:
                self.node.values.push(owner, entry, announce=True)
            self.node.values.sealed(entry)

    def on_stream_ack(self, peer: Peer, message: m.StreamAck) -> None:
        self._take_items(peer.number, message)

    def owner_gone(self, number: int) -> None:
        """Nobody will take the items of this process's generators any more."""
        for task_id, stream in list(self.streams.items()):
            if stream.owner == number and not stream.unwanted:
                self._take_items(number, StreamAck(task_id, stream.consumed, True))

    def _take_items(self, number: int, message: m.StreamAck) -> None:
        stream = self.streams.get(message.task)
        if stream is None:
            return
        stream.consumed = max(stream.consumed, message.consumed)
        task = self.tasks.get(message.task)
        if message.drop:
            stream.unwanted = True
            for index in range(message.consumed, stream.made):
                entry = self.node.objects.objects.get(ids.return_id(message.task, index))
                if entry is not None:
                    self.node.values.release(entry, number)
            if task is None:
                del self.streams[message.task]
        if task is not None and task.worker is not None and task.worker.peer is not None:
            self.node.send(
                task.worker.peer, StreamRoom(message.task, -1 if message.drop else message.consumed)
            )

    def _end_stream(self, task: Task, stream: Stream) -> None:
        if stream.consumed >= REMADE:
            self._end_remaking(task)
        if stream.made >= REMADE:
            self.streams.pop(task.id, None)
            return
        stream.length = stream.made
        self.node.values.abandon(ids.return_id(task.id, stream.length))
        owner = self.node.peers.get(task.owner)
        if owner is not None and not stream.unwanted:
            self.node.send(owner, StreamEnd(task.id, stream.length))
        if stream.unwanted or owner is None:
            self.streams.pop(task.id, None)

    def _end_remaking(self, task: Task) -> None:
        """Lost items that the generator has not made again stay lost."""
        for entry in list(self.node.objects.objects.values()):
            if entry.state == PENDING and ids.task_of(entry.id) == task.id:
                text = f"item {ids.index_of(entry.id)} of {task.name} is lost, and the generator did not make it when it ran again"
                self.node.objects.seal_inline(
                    entry, ERROR_KIND, encode_system_error("ObjectLostError", text), None
                )
                self.node.values.sealed(entry)

    # -- ends

    def again(self, task: Task) -> None:
        """Another attempt: the same id and results, a new execution."""
        if task.retries > 0:
            task.retries -= 1
        task.attempt += 1
        task.worker = None
        task.held = None
        task.oom = False
        task.state = READY
        self._announced.pop(task.id, None)
        for index in range(max(task.kind.spec.num_returns, 0)):
            self.node.objects.unmake(ids.return_id(task.id, index))

    def fail(
        self, task: Task, error: bytes, *, finished: float = 0.0, refs: list[bytes] | None = None
    ) -> None:
        """The task is over with this error (an encoded payload); it becomes the value of everything that the task should have returned."""
        if task.terminal:
            return
        if task.id in self.node.names.expected:
            self.node.names.failed(task, error)
        name, text = summary(error)
        state = CANCELLED if name == "TaskCancelledError" and task.cancelled else FAILED
        if state == FAILED and task.count is not None:
            task.count.failure(task, name, text, ran=task.worker is not None)
        self._ended(task, state, finished, 0, name)
        self._seal_error(task, error, refs)
        if task.kind.spec.kind == CREATE_ACTOR:
            self.node.actors.creation_failed(task, error)

    def _seal_error(self, task: Task, error: bytes, refs: list[bytes] | None = None) -> None:
        spec = task.kind.spec
        owner = self.node.peers.get(task.owner)
        stream = self.streams.get(task.id)
        if stream is not None and stream.consumed >= REMADE:
            first = last = 0
        elif stream is not None:
            first, last = stream.made, stream.made + 1
            stream.made += 1
        else:
            first, last = 0, 1 if spec.kind == CREATE_ACTOR else spec.num_returns
        for index in range(first, last):
            entry = self.node.objects.objects.get(ids.return_id(task.id, index))
            if stream is not None and not stream.unwanted:
                entry = self.node.objects.entry(ids.return_id(task.id, index))
                self.node.values.hold(entry, task.owner)
            if entry is None:
                continue
            self.node.objects.unmake(entry.id)
            if entry.state == PENDING:
                self.node.objects.seal_inline(entry, ERROR_KIND, error, refs)
                if owner is not None:
                    self.node.values.push(owner, entry, announce=stream is not None)
                self.node.values.sealed(entry)
        if stream is not None:
            self._end_stream(task, stream)

    def _ended(self, task: Task, state: int, finished: float, size: int, error: str) -> None:
        """The task is terminal: it holds nothing any more; its history goes to the GCS."""
        if self.node.outputs.raw and task.worker is not None:
            self.node.outputs.ended(task.id, task.worker)
        task.state = state
        self.tasks.pop(task.id, None)
        self.node.values.over(task)
        names = self.node.names
        if names.expected or names.announced or names.remade:
            names.ended(task)
        submit = task.submit
        if submit.deps is not None or submit.refs is not None or submit.args_object:
            if task.kind.spec.kind != CREATE_ACTOR or not self.node.actors.may_restart(task):
                self.release_inputs(task)
        if task.count is not None:
            task.count.ended(task, state, finished, size, self.node.now)
        if task.children is not None and state != FINISHED:
            self._orphan_children(task)
        task.children = None
        if submit.parent:
            parent = self.tasks.get(submit.parent)
            if parent is not None and parent.children is not None:
                parent.children.pop(task.id, None)
        self.executions.pop(task.id, None)
        self._event(task, _EVENT_STATES[state], finished or self.node.now, size, error)

    def release_inputs(self, task: Task) -> None:
        """It will not run again: it holds its arguments no longer."""
        objects = self.node.objects.objects
        for object_id in (*task.inputs(), *(task.submit.refs or ())):
            entry = objects.get(object_id)
            if entry is not None:
                self.node.values.release(entry, task.id)

    def _orphan_children(self, task: Task) -> None:
        """Children of a failed attempt that nobody holds are cancelled (protocol section 1)."""
        for child_id in list(task.children or ()):
            child = self.tasks.get(child_id)
            if child is not None and child.kind.spec.kind == TASK and child.state != RUNNING:
                entry = self.node.objects.objects.get(ids.return_id(child_id, 0))
                if entry is not None and entry.holders is None:
                    self.cancel(child)

    def _event(self, task: Task, state: int, finished: float, size: int, error: str) -> None:
        spec = task.kind.spec
        submit = task.submit
        worker = task.worker
        event = TaskEvent(
            task.id,
            spec.name,
            spec.kind,
            state,
            task.attempt,
            worker.pid if worker is not None else 0,
            self.node.job_of(task),
            task.session,
            task.cell,
            spec.function,
            submit.parent,
            task.actor,
            submit.deps,
            spec.num_returns,
            size,
            error,
            task.submitted,
            task.ready,
            task.dispatched,
            task.started,
            finished,
            self.node.now,
        )
        self.node.gcs.tasks.append(event)
        if self._watchers:
            self.node.watches.ended(task, event)

    def lost(self, entry: Object, why: str) -> None:
        """The value of an object cannot be read back: make it again from its lineage, or say that it is lost (R12)."""
        producer = entry.producer
        self.node.objects.reset(entry)
        # A generator that still runs will not make an item again, and may be waiting for whoever waits for this one.
        streaming = producer is not None and producer.kind.spec.num_returns == STREAMING
        can_rerun = (
            producer is not None
            and producer.kind.spec.kind == TASK
            and not (streaming and not producer.terminal)
            and all(
                i in self.node.objects.objects for i in (*producer.inputs(), *(producer.submit.refs or ()))
            )
            and not ids.is_put(entry.id)
        )
        if can_rerun and producer is not None:
            if producer.terminal:
                producer.attempt += 1
                producer.worker = None
                producer.cancelled = False
                producer.state = WAITING
                if producer.count is not None:
                    producer.count.submitted += 1
                self.tasks[producer.id] = producer
                self.node.names.remade[producer.id] = None
                if streaming:
                    stream = self.streams.get(producer.id)
                    if stream is None:
                        stream = self.streams[producer.id] = Stream(producer.owner)
                        stream.made = REMADE
                    stream.consumed = REMADE
                self.admit(producer, again=True)
            return
        if producer is None:
            reason = "it was made by put, which has no lineage"
        elif producer.kind.is_call:
            reason = "an actor's method made it, and the actor's state may be another one now"
        else:
            reason = (
                "its generator has not ended"
                if streaming and not producer.terminal
                else "its inputs are gone"
            )
        text = f"the value of {ids.short(entry.id)} is lost ({why}) and cannot be made again: {reason}"
        self.node.objects.seal_inline(entry, ERROR_KIND, encode_system_error("ObjectLostError", text), None)
        self.node.values.sealed(entry)

    # -- workers die

    def worker_lost(self, worker: Worker, how: str) -> None:
        """The process of a worker is gone: what it ran is tried again or fails, what had not started goes back to the queue."""
        pending = list(worker.pending)
        worker.pending.clear()
        self.node.scheduler.close(worker, self.node.now, rest=False)
        unstarted = [task for task in pending if task.run in worker.unread]
        for task in reversed(unstarted):
            task.worker = None
            if task.cancelled:
                self.fail(task, self.cancelled_error(task))
            else:
                self.node.scheduler.ready(task, self.node.now, front=True)
        for task in pending:
            if task.run in worker.unread:
                continue
            if task.cancelled:
                self.fail(task, self.cancelled_error(task))
            elif task.retries != 0:
                self._event(
                    task, _RETRIED, self.node.now, 0, "OutOfMemoryError" if task.oom else "WorkerCrashedError"
                )
                self.again(task)
                self._queue(task)
            else:
                tries = f" in {task.attempt + 1} attempts" if task.attempt else ""
                text = (
                    f"the worker process (pid {worker.pid}) that ran {task.name} {how}{tries}; max_retries={task.kind.spec.max_retries} "
                    "allows no further attempt"
                )
                self.fail(
                    task, encode_system_error("OutOfMemoryError" if task.oom else "WorkerCrashedError", text)
                )

    def no_worker(self, why: str) -> None:
        """No worker process can be started: what waits for one fails."""
        for task in [t for t in self.tasks.values() if t.state == READY and not t.kind.is_call]:
            self.node.scheduler.drop(task)
            self.fail(task, encode_system_error("WorkerCrashedError", f"{task.name} could not be run: {why}"))

    # -- cancel

    def cancelled_error(self, task: Task) -> bytes:
        return encode_system_error("TaskCancelledError", f"{task.name} ({ids.short(task.id)}) was cancelled")

    def on_cancel(self, peer: Peer, message: m.Cancel) -> None:
        if message.cell:
            for task in [
                t for t in self.tasks.values() if t.cell == message.cell and t.session == peer.session
            ]:
                self.cancel(task, force=message.force, recursive=message.recursive)
            return
        found = self.tasks.get(message.task)
        if found is not None:
            self.cancel(found, force=message.force, recursive=message.recursive)

    def cancel(self, task: Task, *, force: bool = False, recursive: bool = True) -> None:
        """Stop a task before or while it runs (protocol section 9); a finished one stays as it is."""
        if task.terminal:
            return
        if recursive:
            self.tombstones[task.id] = None
            for child_id in list(task.children or ()):
                child = self.tasks.get(child_id)
                if child is not None:
                    self.cancel(child, force=force)
        already = task.cancelled
        task.cancelled = True
        task.retries = 0
        if task.kind.is_call:
            self.node.actors.cancel(task)
            return
        worker = task.worker
        if task.state != RUNNING or worker is None:
            self.node.scheduler.drop(task)
            self.fail(task, self.cancelled_error(task))
        elif worker.pending and worker.pending[0] is not task:
            self.node.revoke(worker)
        elif force:
            self.node.end_worker(worker, "cancelled with force=True")
        elif not already:
            self.node.interrupt(worker, task.run)
            self.graces.append((self.node.now + CANCEL_GRACE, task, task.attempt))

    def end_graces(self, now: float) -> None:
        """End the workers of cancelled tasks that did not stop in time."""
        due = [g for g in self.graces if g[0] <= now]
        if due:
            self.graces = [g for g in self.graces if g[0] > now]
            for _, task, attempt in due:
                if (
                    not task.terminal
                    and task.attempt == attempt
                    and task.worker is not None
                    and task.state == RUNNING
                ):
                    self.node.end_worker(
                        task.worker, f"{task.name} did not stop within {CANCEL_GRACE:g} s of being cancelled"
                    )

    def end_session(self, session: str) -> None:
        """The session's driver has left for good: its tasks end."""
        for task in [t for t in self.tasks.values() if t.session == session and not t.kind.is_call]:
            self.cancel(task, force=True)


assert INLINE_LIMIT < 1 << 20, "results up to the inline limit are pushed unasked"
