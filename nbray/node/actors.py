"""The actors of a node: their creation, the order of their calls, their end. Pure; part of the node's machine.

A handle is a reference to the return value of the actor's creation task, so all rules for references hold for handles: when nobody holds that
object any more and no call is queued, the actor ends. Calls of one caller wait in one queue and leave it in order; a call whose arguments are not
there yet holds up its own caller only (protocol section 6).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from nbray import ids
from nbray.events import ActorEvent, ActorRow
from nbray.failure_codec import encode_system_error
from nbray.gcs.messages import ActorNamed, ActorRemoved
from nbray.messages import ActorInfo, ActorOptions, Configure, Exit, Interrupt, Reply
from nbray.node import pool as pools
from nbray.scheduler.task import READY, RUNNING, WAITING, Task

if TYPE_CHECKING:
    from nbray import messages as m
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.pool import Worker

AHEAD = 64
"""Calls dispatched ahead to a serial actor; below 256, because a token is one byte."""

FEW = 4
"""Calls with large arguments dispatched ahead."""

WIDE = 10_000
"""Calls dispatched to an async or threaded actor, which itself bounds how many run at once."""

SESSION = b"session\0"
"""Holders that are sessions start with this."""

PENDING, ALIVE, RESTARTING, DEAD = "PENDING", "ALIVE", "RESTARTING", "DEAD"


class Actor:
    """One actor. ``backlog``: calls that could run; ``callers``: calls in order per calling execution, only of callers whose first call waits."""

    __slots__ = (
        "backlog", "callers", "creation", "detached", "id", "job", "killed", "name", "namespace", "options", "reason", "restarts", "restarts_left", "session",
        "state", "worker",
    )  # fmt: skip

    def __init__(self, creation: Task, options: ActorOptions) -> None:
        self.id = creation.id
        self.creation = creation
        self.options = options
        self.session = creation.session
        self.job = 0
        """Of a named one: the kernel run or script that has made it, or taken it over."""
        self.name = options.actor_name
        self.namespace = options.namespace
        self.detached = options.detached
        self.state = PENDING
        self.worker: Worker | None = None
        self.restarts = 0
        self.restarts_left = options.max_restarts
        self.callers: dict[bytes, deque[Task]] = {}
        self.backlog: deque[Task] = deque()
        self.reason = b""
        self.killed = False

    @property
    def serial(self) -> bool:
        return self.options.mode == "serial"

    @property
    def busy(self) -> bool:
        return bool(self.backlog or self.callers or (self.worker is not None and self.worker.pending))

    def info(self) -> ActorInfo:
        return ActorInfo(
            self.id,
            self.options.class_name,
            self.options.mode,
            self.options.methods,
            self.name,
            self.namespace,
        )


class Actors:
    """All actors of a node, alive or dead and still referred to."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.actors: dict[bytes, Actor] = {}
        self.names: dict[tuple[str, str], Actor] = {}

    # -- creation

    def on_create(self, peer: Peer, message: m.CreateActor) -> None:
        options = message.options
        if not options.actor_name:
            self._create(peer, message)
            return
        key = (options.namespace, options.actor_name)
        known = self.names.get(key)
        if known is not None and known.state != DEAD and self._left_behind(known, peer):
            self.kill(known, "a later run of its notebook's kernel has made another one of that name")
        elif known is not None and known.state != DEAD:
            self._taken(peer, message, known)
            return
        info = ActorInfo(
            message.submit.task,
            options.class_name,
            options.mode,
            options.methods,
            options.actor_name,
            options.namespace,
        )
        operation = ActorNamed(
            options.namespace,
            options.actor_name,
            message.submit.task,
            msgspec.msgpack.encode(info),
            peer.job,
            peer.session,
            options.detached,
        )
        actor = self._create(peer, message)
        actor.job = peer.job
        self.names[key] = actor

        def named(error: str, _ok: bool, data: bytes) -> None:
            self.node.send(
                peer, Reply(message.request, error, data if error else msgspec.msgpack.encode(info))
            )

        self.node.operate(operation, named)

    def _taken(self, peer: Peer, message: m.CreateActor, known: Actor) -> None:
        if message.options.get_if_exists:
            self.node.send(peer, Reply(message.request, "", msgspec.msgpack.encode(known.info())))
            return
        text = (
            f"an actor named {known.name!r} ({known.options.class_name}, {known.state.lower()}) exists already in namespace {known.namespace!r}; "
            "use get_if_exists=True to get it, another name, or nbray.kill it first"
        )
        self.node.send(peer, Reply(message.request, "ActorAlreadyExistsError", text.encode()))

    def _create(self, peer: Peer, message: m.CreateActor) -> Actor:
        task = self.node.tasks.make(peer, message.submit)
        task.actor = task.id
        actor = self.actors[task.id] = Actor(task, message.options)
        self._event(actor)
        self.node.tasks.admit(task)
        return actor

    def on_get(self, peer: Peer, message: m.GetActor) -> None:
        actor = self.names.get((message.namespace, message.name))
        if actor is None or actor.state == DEAD:
            names = sorted(name for space, name in self.names if space == message.namespace)
            text = f"no actor is named {message.name!r} in namespace {message.namespace!r}; named actors there: {', '.join(names) or 'none'}"
            self.node.send(peer, Reply(message.request, "ValueError", text.encode()))
        elif self._left_behind(actor, peer):
            text = f"the actor named {actor.name!r} was made by an earlier run of this notebook's kernel; %cluster attach (nbray.attach()) brings it back"
            self.node.send(peer, Reply(message.request, "ValueError", text.encode()))
        else:
            self.node.send(peer, Reply(message.request, "", msgspec.msgpack.encode(actor.info())))

    def _left_behind(self, actor: Actor, peer: Peer) -> bool:
        """Whether an earlier run of this kernel has left the actor, and this one has not attached it: it starts clean."""
        if (
            actor.detached
            or not actor.job
            or not peer.job
            or actor.job == peer.job
            or actor.session != peer.session
        ):
            return False
        return all(other.job != actor.job for other in self.node.peers.values())

    def driver_lost(self, peer: Peer) -> None:
        """A driver has gone without a goodbye: its session keeps the named actors."""
        for actor in self.names.values():
            if actor.job == peer.job and actor.state != DEAD:
                self.node.objects.hold(ids.return_id(actor.id, 0), SESSION + actor.session.encode())

    def take(self, peer: Peer, names: list[str]) -> None:
        """An attached driver takes over named actors of its session; it holds them itself from now on."""
        for actor in list(self.names.values()):
            if actor.name in names and actor.session == peer.session and actor.state != DEAD:
                actor.job = peer.job
                entry = self.node.objects.objects.get(ids.return_id(actor.id, 0))
                if entry is not None:
                    self.node.values.hold(entry, peer.number)
                    self.node.values.release(entry, SESSION + actor.session.encode())

    def created(self, worker: Worker, task: Task) -> None:
        """The constructor has returned."""
        actor = self.actors[task.id]
        actor.worker = worker
        actor.state = ALIVE
        if not actor.options.hold_resources:
            self.node.scheduler.close(worker, self.node.now, rest=False)
        worker.state = pools.ACTOR
        self._event(actor)
        self.pump(actor)
        self._end_unless_needed(actor)

    def creation_failed(self, task: Task, error: bytes) -> None:
        """The constructor raised, or could never run."""
        actor = self.actors.get(task.id)
        if actor is not None:
            self._die(actor, error)

    def configure(self, worker: Worker, task: Task) -> None:
        """Before the constructor runs: what kind of actor this worker becomes."""
        actor = self.actors[task.id]
        worker.actor = actor.id
        actor.worker = worker
        assert worker.peer is not None
        self.node.send(worker.peer, Configure(actor.id, actor.options, actor.restarts))

    def may_restart(self, creation: Task) -> bool:
        """Whether the constructor may have to run again, with the same arguments."""
        actor = self.actors.get(creation.id)
        return actor is not None and actor.state != DEAD and actor.restarts_left != 0 and not actor.killed

    # -- calls

    def submit(self, task: Task) -> None:
        """A method call has arrived."""
        actor = self.actors.get(ids.actor_of(task.id))
        if actor is None:
            text = f"actor {ids.short(ids.actor_of(task.id))} is not known to this cluster: it ended, or belongs to another cluster"
            self.node.tasks.fail(task, encode_system_error("ActorDiedError", text))
            return
        task.actor = actor.id
        if actor.state == DEAD:
            self.node.tasks.fail(task, actor.reason)
            return
        caller = task.id[: ids.EXECUTION_BYTES]
        queue = actor.callers.get(caller)
        if queue is not None:
            queue.append(task)
        elif task.missing:
            actor.callers[caller] = deque((task,))
        else:
            actor.backlog.append(task)
            if actor.state == ALIVE:
                self.pump(actor)

    def inputs_ready(self, task: Task) -> None:
        """The arguments of a call are there: it and those behind it can go, up to the next one that waits."""
        actor = self.actors.get(task.actor)
        if actor is None:
            return
        caller = task.id[: ids.EXECUTION_BYTES]
        queue = actor.callers.get(caller)
        while queue and not queue[0].missing:
            actor.backlog.append(queue.popleft())
        if queue is not None and not queue:
            del actor.callers[caller]
        if actor.state == ALIVE:
            self.pump(actor)

    def pump(self, actor: Actor) -> None:
        """Dispatch what may be dispatched."""
        worker, backlog = actor.worker, actor.backlog
        if worker is None or not backlog or worker.state != pools.ACTOR:
            return
        pending = worker.pending
        serial = actor.serial
        ahead = AHEAD if serial else WIDE
        if len(pending) > ahead // 2:
            return
        now, node = self.node.now, self.node
        while backlog and len(pending) < ahead:
            task = backlog[0]
            if task.submit.deps or task.submit.args_object:
                there = node.values.fetch(task)
                if not backlog or backlog[0] is not task:
                    continue  # Others could go because of that and went first, or the actor has ended.
                if task.terminal:
                    backlog.popleft()
                    continue
                if not there:
                    self._hold_back(actor, task.id[: ids.EXECUTION_BYTES])
                    continue
            if pending and len(pending) >= FEW and node.values.large_inputs(task):
                # Those dispatched have theirs in memory until they have run.
                break
            backlog.popleft()
            started = not (serial and pending)
            task.state = RUNNING
            task.dispatched = now
            task.worker = worker
            worker.run += 1
            task.run = worker.run
            pending.append(task)
            node.tasks.run(worker, task, started)
            if not started:
                worker.tokens.append(task.run & 0xFF)

    def _hold_back(self, actor: Actor, caller: bytes) -> None:
        """The next call of this caller waits for its arguments, and so do those behind it."""
        held: deque[Task] = deque()
        others: deque[Task] = deque()
        for task in actor.backlog:
            (held if task.id[: ids.EXECUTION_BYTES] == caller else others).append(task)
        held.extend(actor.callers.get(caller, ()))
        actor.callers[caller] = held
        actor.backlog.clear()
        actor.backlog.extend(others)

    def finished(self, worker: Worker) -> None:
        """A call is over; room for the next ones."""
        actor = self.actors.get(worker.actor)
        if actor is None:
            return
        if actor.backlog:
            self.pump(actor)
        elif not worker.pending:
            self._end_unless_needed(actor)

    def returned(self, worker: Worker, tasks: list[Task]) -> None:
        """Dispatched calls that have not started come back: to the front, in order, less the cancelled ones."""
        actor = self.actors.get(worker.actor)
        if actor is None:
            return
        for task in reversed(tasks):
            task.worker = None
            task.state = READY
            if not task.cancelled:
                actor.backlog.appendleft(task)
        self.pump(actor)

    def dequeue(self, task: Task) -> None:
        """A call has failed before it ran: it leaves its caller's queue, and those behind it may go."""
        actor = self.actors.get(task.actor)
        if actor is None:
            return
        caller = task.id[: ids.EXECUTION_BYTES]
        queue = actor.callers.get(caller)
        if queue is not None and task in queue:
            queue.remove(task)
        elif task in actor.backlog:
            actor.backlog.remove(task)
        self.inputs_ready(task)
        self._end_unless_needed(actor)

    def requeue(self, task: Task) -> None:
        """A call that failed is tried again, behind what is queued already (retries are out of order)."""
        actor = self.actors.get(task.actor)
        if actor is not None:
            actor.backlog.append(task)

    def cancel(self, task: Task) -> None:
        """Drop a queued call; interrupt a running one where its actor allows that."""
        actor = self.actors.get(task.actor)
        if actor is None or task.terminal:
            return
        if task.state != RUNNING:
            self.node.tasks.fail(task, self.node.tasks.cancelled_error(task))
            self.dequeue(task)
            return
        worker = task.worker
        if worker is None or worker.peer is None:
            return
        if actor.serial and worker.pending and worker.pending[0] is not task:
            self.node.revoke(worker)
        self.node.send(worker.peer, Interrupt(task.id))

    # -- the end

    def released(self, actor_id: bytes) -> None:
        """Nobody holds a handle any more."""
        actor = self.actors.get(actor_id)
        if actor is not None:
            self._end_unless_needed(actor)

    def _end_unless_needed(self, actor: Actor) -> None:
        if actor.state != ALIVE or actor.detached or actor.busy:
            return
        entry = self.node.objects.objects.get(ids.return_id(actor.id, 0))
        if entry is None or entry.holders is None:
            self.kill(actor, "all handles to it are gone", graceful=True)

    def on_kill(self, peer: Peer, message: m.KillActor) -> None:
        actor = self.actors.get(message.actor)
        if actor is not None and actor.state != DEAD:
            if not message.no_restart and actor.worker is not None:
                self.node.end_worker(actor.worker, "it was killed by nbray.kill(no_restart=False)")
            else:
                self.kill(actor, "it was killed by nbray.kill")

    def kill(self, actor: Actor, why: str, *, graceful: bool = False) -> None:
        """End the actor for good."""
        actor.killed = True
        worker, creation = actor.worker, actor.creation
        self._die(actor, self._died(actor, why))
        if worker is not None:
            if graceful and worker.peer is not None:
                self.node.send(worker.peer, Exit(True))
            else:
                self.node.end_worker(worker, why)
        elif not creation.terminal:
            self.node.tasks.cancel(creation, force=True)

    def _died(self, actor: Actor, why: str) -> bytes:
        name = f" named {actor.name!r}" if actor.name else ""
        pid = f" (pid {actor.worker.pid})" if actor.worker is not None else ""
        return encode_system_error(
            "ActorDiedError",
            f"the actor {actor.options.class_name}{name}{pid} is dead: {why}. Create a new one, or allow restarts with max_restarts.",
        )

    def _die(self, actor: Actor, error: bytes) -> None:
        if actor.state == DEAD:
            return
        actor.state = DEAD
        actor.reason = error
        worker = actor.worker
        if actor.name and self.names.get((actor.namespace, actor.name)) is actor:
            del self.names[actor.namespace, actor.name]
            self.node.operate(ActorRemoved(actor.namespace, actor.name, actor.id), None)
        calls = list(worker.pending) if worker is not None and worker.actor == actor.id else []
        calls += list(actor.backlog) + [task for queue in actor.callers.values() for task in queue]
        actor.backlog.clear()
        actor.callers.clear()
        if worker is not None:
            worker.pending.clear()
            if worker.held is not None:
                self.node.scheduler.close(worker, self.node.now, rest=False)
        actor.worker = None
        for call in calls:
            if not call.terminal and call is not actor.creation:
                self.node.tasks.fail(call, error)
        if not actor.creation.terminal:
            self.node.scheduler.drop(actor.creation)
            self.node.tasks.fail(actor.creation, error)
        self.node.tasks.release_inputs(actor.creation)
        self._event(actor)

    def worker_lost(self, worker: Worker, how: str) -> None:
        """The actor's process is gone: restart it, or declare it dead."""
        actor = self.actors.get(worker.actor)
        if actor is None or actor.state == DEAD:
            return
        pending = list(worker.pending)
        worker.pending.clear()
        if worker.held is not None:
            self.node.scheduler.close(worker, self.node.now, rest=False)
        if actor.killed or actor.restarts_left == 0:
            worker.pending.extend(pending)
            self._die(actor, self._died(actor, how))
            return
        if actor.restarts_left > 0:
            actor.restarts_left -= 1
        actor.restarts += 1
        actor.state = RESTARTING
        unavailable = encode_system_error(
            "ActorUnavailableError",
            f"the actor {actor.options.class_name} lost its process (pid {worker.pid}): {how}. It restarts; this call was running or dispatched and is "
            "not repeated. Allow that with max_task_retries.",
        )
        actor.worker = None
        front: list[Task] = []
        for call in pending:
            if call is actor.creation:
                continue
            call.worker = None
            if call.cancelled:
                self.node.tasks.fail(call, self.node.tasks.cancelled_error(call))
            elif call.run in worker.unread:
                call.state = READY
                front.append(call)
            elif call.retries != 0:
                self.node.tasks.again(call)
                front.append(call)
            else:
                self.node.tasks.fail(call, unavailable)
        actor.backlog.extendleft(reversed(front))
        self._event(actor)
        creation = actor.creation
        creation.attempt += 1
        creation.worker = None
        creation.state = WAITING
        self.node.tasks.tasks[creation.id] = creation
        self.node.tasks.admit(creation, again=True)

    def end_session(self, session: str) -> None:
        """The session's driver left for good: its actors end, but for the detached ones."""
        for actor in list(self.actors.values()):
            if actor.session == session and not actor.detached and actor.state != DEAD:
                self.kill(actor, "its driver has ended")

    def _event(self, actor: Actor) -> None:
        pid = actor.worker.pid if actor.worker is not None else 0
        reason = "" if actor.state != DEAD else "see the error of its calls"
        self.node.gcs.facts.append(
            ActorEvent(
                actor.id,
                actor.state,
                self.node.now,
                actor.options.class_name,
                actor.name,
                actor.namespace,
                pid,
                actor.restarts,
                self.node.job_of(actor.creation),
                actor.session,
                reason,
            )
        )

    def rows(self) -> list[ActorRow]:
        return [
            ActorRow(
                a.id,
                a.options.class_name,
                a.name,
                a.state,
                a.worker.pid if a.worker else 0,
                a.restarts,
                a.namespace,
                self.node.job_of(a.creation),
            )
            for a in self.actors.values()
            if a.state != DEAD
        ]
