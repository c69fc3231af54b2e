"""The node as a deterministic machine: messages and facts in, messages and effects out. No I/O, no clock, no randomness.

This file routes; the decisions are in its parts: `Tasks`, `Actors`, `Values` (beside this file), `LocalScheduler`, `WorkerPool`, `ObjectTable`.
The shell (``nbray.node.server``) calls `receive` with what a connection said, the ``*_`` facts with what happened to processes and files,
`settle` once per loop, and then sends each dirty peer's ``out`` and carries out ``effects`` in order. The simulator
(``nbray.testing.sim``) is another shell around the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from nbray import ids
from nbray.config import INLINE_LIMIT, INLINE_TOTAL, WORLDS
from nbray.events import NodeRow, ObjectRow, Page, TaskEvent, WorkerEvent, WorkerRow
from nbray.gcs.client import GcsClient, Settled
from nbray.gcs.messages import EndJob, RegisterJob
from nbray.messages import (
    CREATE_ACTOR,
    DRIVER,
    OBSERVER,
    PROTOCOL,
    WORKER,
    Abort,
    Adopt,
    Bound,
    Bye,
    Cancel,
    Create,
    CreateActor,
    Done,
    DoneMany,
    Drop,
    Exit,
    Failed,
    Free,
    Function,
    Get,
    GetActor,
    Hello,
    Hold,
    Item,
    KillActor,
    Largest,
    Leaving,
    Names,
    Origin,
    Output,
    Places,
    Put,
    Query,
    Register,
    Reply,
    Revoke,
    Seal,
    Shutdown,
    StreamAck,
    Submit,
    Take,
    Transient,
    Unbind,
    Unblocked,
    Unpin,
    Welcome,
    World,
)
from nbray.node import pool as pools
from nbray.node.actors import SESSION, Actors
from nbray.node.counts import Counts
from nbray.node.deadlock import find_deadlock
from nbray.node.looks import Look, Looks
from nbray.node.names import Names as HeldNames
from nbray.node.names import Save
from nbray.node.outputs import Outputs
from nbray.node.peer import Peer
from nbray.node.pool import Home, PoolEffect, Worker, WorkerPool
from nbray.node.scarcity import AskLargest, Scarcity
from nbray.node.tasks import Tasks
from nbray.node.values import Values
from nbray.node.watching import Watches
from nbray.scheduler.local import LocalScheduler
from nbray.scheduler.resources import CPU, UNIT, Ledger
from nbray.scheduler.task import RUNNING, Kind, Task
from nbray.store import holders as holder_sets
from nbray.store import objects as store
from nbray.store.arena import Arena
from nbray.store.objects import ObjectTable, StoreEffect

ORPHAN_SECONDS = 1800.0
"""Seconds after which what a crashed driver held is freed (protocol section 4)."""

IDLE_SECONDS = 30.0
"""Seconds after which idle workers beyond one per CPU end."""

STARTS = 8
"""Workers in a row that may end before they have said hello; then what waits for a worker fails instead of waiting for ever."""

MOST_WORLDS = 4 * WORLDS
"""Worlds, of some kilobytes each, from which on the node lets go of those that nobody needs any more."""

STUCK_SECONDS = 0.5
"""Seconds between looks for circles of waits."""


@dataclass(slots=True, frozen=True)
class TakeTokens:
    """Read the unread tokens of this worker back; report them with `NodeMachine.tokens_returned`."""

    worker: int


@dataclass(slots=True, frozen=True)
class Signal:
    """Write the run's number into the worker's interrupt pipe, then SIGINT."""

    worker: int
    pid: int
    run: int


@dataclass(slots=True, frozen=True)
class Renew:
    """Packages were installed: workers are from now on forked from a new zygote; the old one ends with its last worker."""


@dataclass(slots=True, frozen=True)
class Close:
    """Close this connection once its messages are sent."""

    peer: int


@dataclass(slots=True, frozen=True)
class Stop:
    """The node ends."""

    reason: str


NodeEffect = Save | TakeTokens | Signal | Look | AskLargest | Renew | Close | Stop | PoolEffect | StoreEffect


@dataclass(frozen=True)
class NodeConfig:
    """What a node is told at its start. ``resources`` in ledger units; ``store_limit`` in bytes; ``seed``: bytes that task seeds are made from."""

    node: str
    name: str
    cluster: bytes
    resources: dict[str, int]
    store_limit: int
    span: int
    details: dict[str, str] = field(default_factory=dict)
    ttl: float = 1800.0
    pid: int = 0
    socket: str = ""
    log: str = ""
    spares: int = 2
    worker_limit: int = 512
    inline_limit: int = INLINE_LIMIT
    store_patience: float = 10.0
    inline_total: int = INLINE_TOTAL
    data: str = ""
    """Directory of values that outlive the cluster; without one none does."""
    installed: int = 0
    """When the last package was installed before the zygote was started: nanoseconds."""


class NodeMachine:
    """One node: its connections and the parts that decide."""

    def __init__(
        self,
        config: NodeConfig,
        gcs: GcsClient,
        now: float,
        reserve: Callable[[int, int], str] | None = None,
    ) -> None:
        """``reserve``: as for `ObjectTable`."""
        self.config = config
        self.gcs = gcs
        self.now = now
        self.peers: dict[int, Peer] = {}
        self.dirty: list[Peer] = []
        self.effects: list[NodeEffect] = []
        self.functions: dict[bytes, bytes] = {}
        self.worlds: dict[bytes, World] = {}
        self._most_worlds = MOST_WORLDS
        self._kinds: dict[bytes, Kind] = {}
        self._numbers = 0
        self.objects = ObjectTable(
            Arena(config.store_limit, config.span),
            config.store_patience,
            config.inline_total,
            self.name_of,
            reserve,
        )
        self.pool = WorkerPool(config.spares, config.worker_limit)
        self.scheduler = LocalScheduler(
            Ledger(config.resources),
            self.pool,
            lambda worker, task, started: self.tasks.run(worker, task, started),  # noqa: PLW0108  (made below)
            self._adopt,
            lambda task: self.values.fetch(task),  # noqa: PLW0108
            self.revoke,
        )
        self.values = Values(self)
        self.names = HeldNames(self)
        self.looks = Looks(self)
        self.watches = Watches(self)
        self.scarcity = Scarcity(self)
        self.outputs = Outputs(self)
        self.counts = Counts(self)
        self.tasks = Tasks(self)
        self.actors = Actors(self)
        self.installed = config.installed
        self.complaints: list[str] = []
        """What workers without a session have written: for the log."""
        self.drivers = 0
        self.orphans: list[tuple[float, Peer]] = []
        self.unused_since = now
        self._unmapped: dict[int, None] = {}
        """Connections of processes whose memory is gone and whose end is not reported yet."""
        self.stopping = ""
        self._stuck_check = now + STUCK_SECONDS
        self._expire_check = now
        self._failed_starts = 0
        self._handlers: dict[type, Callable[[Peer, Any], None]] = {
            Submit: self.tasks.on_submit,
            Done: self.tasks.on_done,
            DoneMany: self.tasks.on_done_many,
            Failed: self.tasks.on_failed,
            Item: self.tasks.on_item,
            Cancel: self.tasks.on_cancel,
            StreamAck: self.tasks.on_stream_ack,
            Get: self.values.on_get,
            Put: self.values.on_put,
            Drop: self.values.on_drop,
            Hold: self.values.on_hold,
            Create: self.values.on_create,
            Seal: self.values.on_seal,
            Abort: self.values.on_abort,
            Unpin: self.values.on_unpin,
            Unblocked: self.values.on_unblocked,
            Free: self.values.on_free,
            CreateActor: self.actors.on_create,
            KillActor: self.actors.on_kill,
            GetActor: self.actors.on_get,
            Hello: self._on_hello,
            Register: self._on_register,
            Function: self._on_function,
            World: self._on_world,
            Origin: self._on_origin,
            Output: self.outputs.on_output,
            Query: self._on_query,
            Leaving: self._on_leaving,
            Bye: self._on_bye,
            Names: self.names.on_names,
            Bound: self.names.on_bound,
            Unbind: self.names.on_unbind,
            Take: self.names.on_take,
            Transient: self._on_transient,
            Places: self.looks.on_places,
            Largest: self.scarcity.told,
        }
        self.pool.settle()

    # -- what the shell calls

    def connected(self, number: int) -> Peer:
        peer = self.peers[number] = Peer(number)
        return peer

    def receive(self, peer: Peer, messages: Iterable[Any], now: float) -> None:
        """All messages of one frame of a connection."""
        self.now = now
        handlers = self._handlers
        for message in messages:
            handlers[type(message)](peer, message)

    def settle(self, now: float) -> None:
        """Dispatch, and turn what the parts have decided into messages and effects. Once per loop, after all `receive`."""
        self.now = now
        objects = self.objects
        if objects.effects or objects.available or objects.lost or objects.refused or objects.unheld:
            self.values.settle()
        self.scheduler.dispatch(now)
        if self.outputs.late:
            self.outputs.settle()
        if self.objects.effects:
            self.values.settle()
        if self.pool.effects:
            self.effects += self.pool.effects
            self.pool.effects.clear()

    def tick(self, now: float) -> float:
        """Everything that depends on time; returns the seconds after which to call again at the latest."""
        self.now = now
        wait = 5.0
        if self.scheduler.ahead:
            self.scheduler.patience(now)
            wait = 0.01
        if self.tasks.graces:
            self.tasks.end_graces(now)
            wait = min(wait, 0.05)
        if self.outputs.raw:
            wait = min(wait, self.outputs.tick(now))
        if self.looks.open:
            self.looks.expire(now)
            wait = min(wait, 0.05)
        if self.scarcity.asked is not None:
            self.scarcity.expire(now)
            wait = min(wait, 0.02)
        if self.objects.waiting_for_memory:
            self.objects.expire(now, busy=self._busy())
            self.values.settle()
            wait = min(wait, 0.1)
        if self.values.waits or self.actors.actors:
            wait = min(wait, STUCK_SECONDS)
            if now >= self._stuck_check:
                self._stuck_check = now + STUCK_SECONDS
                self._break_circles()
        if now >= self._expire_check:
            self._expire_check = now + min(1.0, self.config.ttl / 4)
            self.watches.expire(now)
            self.pool.retire(
                now, self.config.resources.get(CPU, UNIT) // UNIT + self.config.spares, IDLE_SECONDS
            )
            while self.orphans and self.orphans[0][0] <= now:
                self.values.forget(self.orphans.pop(0)[1])
            wait = min(wait, self._lifetime(now))
        elif not self.drivers:
            wait = min(wait, self._expire_check - now)
        return wait

    def _busy(self) -> bool:
        """Whether some task runs and is not waiting for something."""
        return any(worker.pending and not worker.blocked for worker in self.pool.workers.values())

    def _lifetime(self, now: float) -> float:
        if self.drivers or self.tasks.tasks:
            self.unused_since = now
            return 1.0
        left = self.unused_since + self.config.ttl - now
        if left <= 0 and not self.names.saving:
            self.names.save_all(self._end_unused)
        return max(min(left, 1.0), 0.05)

    def _end_unused(self) -> None:
        """What should outlive the cluster is on disk."""
        if not self.drivers and not self.tasks.tasks:
            self.stop(f"nobody used it for {self.config.ttl:g} s")

    def disconnected(self, peer: Peer, now: float) -> None:
        """The connection is closed."""
        self.now = now
        if self.peers.pop(peer.number, None) is None:
            return
        if peer.role == DRIVER:
            self.drivers -= 1
            self.unused_since = now
            self.operate(EndJob(peer.job, False), None)
            self.orphans.append((now + ORPHAN_SECONDS, peer))
            self.names.away[peer.session] = now
            self.actors.driver_lost(peer)
            self._abort_unsealed(peer)
            # Another driver can take up its results, but not the iteration over a generator: that must not wait for it.
            self.tasks.owner_gone(peer.number)
            if peer.transient and not peer.keep and not self.drivers:
                self.stop("the run that used it has ended")
        elif peer.role == WORKER:
            self.values.forget(peer)
        if peer.role != WORKER and peer.number in self._unmapped:
            del self._unmapped[peer.number]
            self.objects.drop_pins(peer.number)

    def worker_exited(self, number: int, how: str, unread: list[int], now: float) -> None:
        """A worker process has ended; ``how`` for people, ``unread``: the tokens it did not read."""
        self.now = now
        if number in self.outputs.raw:
            self.outputs.worker_gone(number)
        worker = self.pool.gone(number)
        if worker is None:
            return
        worker.unread = {
            task.run for task in worker.pending if (task.run & 0xFF) in {*unread, *worker.tokens}
        }
        how = worker.why or how
        self.gcs.facts.append(
            WorkerEvent(worker.pid, "ENDED", now, worker.home[0] if worker.home else "", "", how)
        )
        peer = worker.peer
        if peer is not None:
            peer.worker = None
            self.peers.pop(peer.number, None)
        elif not worker.why:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                self.tasks.no_worker(
                    f"{self._failed_starts} worker processes in a row ended before they could run anything; the last one {how}. "
                    f"Their last words are in {self.config.log or 'the log of the node'}; nbray doctor tells about this installation"
                )
        if worker.actor:
            self.actors.worker_lost(worker, how)
        else:
            self.tasks.worker_lost(worker, how)
        if peer is not None:
            self._abort_unsealed(peer)
            self.values.forget(peer)
            if peer.number in self._unmapped:
                del self._unmapped[peer.number]
                self.objects.drop_pins(peer.number)
        # A task knows its worker: the node's collector would come by too seldom for such circles.
        worker.last = None

    def _abort_unsealed(self, peer: Peer) -> None:
        for entry in self.objects.created_by(peer.number):
            self.objects.abort(entry.id)

    def raw_output(self, number: int, stream: str, text: str, now: float) -> Output | None:
        """A worker wrote to its file descriptors: what is to go to its log file."""
        self.now = now
        worker = self.pool.workers.get(number)
        message = None if worker is None else self.outputs.raw_output(worker, stream, text)
        if message is None:
            self.complaints.append(f"worker {number}: {text}")
        return message

    def memory_released(self, number: int, now: float) -> None:
        """Nothing of this peer's mapping is looked at any more, by no child of it either: its pins go."""
        self.now = now
        self.objects.drop_pins(number)
        if number in self.peers:
            # Its end is not reported yet: what it said last, or is still sent to it, may pin again.
            self._unmapped[number] = None

    def tokens_returned(self, number: int, tokens: list[int], now: float) -> None:
        """The unread tokens of a worker, read back: those runs will not start there."""
        self.now = now
        worker = self.pool.workers.get(number)
        if worker is None:
            return
        waiting = {*tokens, *worker.tokens}
        worker.tokens.clear()
        back = [task for task in worker.pending if (task.run & 0xFF) in waiting]
        if not back:
            return
        runs = [task.run for task in back]
        if worker.actor:
            for task in back:
                worker.pending.remove(task)
            self._tell_revoked(worker, runs)
            self.actors.returned(worker, back)
        else:
            self._tell_revoked(worker, runs)
            self.scheduler.returned(worker, runs, now)
        for task in back:
            if task.cancelled and not task.terminal:
                self.tasks.fail(task, self.tasks.cancelled_error(task))

    def _tell_revoked(self, worker: Worker, runs: list[int]) -> None:
        if worker.peer is not None:
            self.send(worker.peer, Revoke(runs))

    def gcs_settled(self, settled: list[Settled], now: float) -> None:
        """Answers of the head to operations and queries."""
        self.now = now
        for answer in settled:
            if answer.context is not None:
                answer.context(answer)

    def pressure(self, used: int, limit: int, now: float, sizes: Mapping[int, int] | None = None) -> None:
        """Memory is nearly used up; ``sizes``: bytes by process id."""
        self.now = now
        self.scarcity.begins(used, limit, sizes or {})

    def relief(self) -> None:
        """Memory is not scarce any more."""
        self.scarcity.ends()

    # -- what the parts call

    def send(self, peer: Peer, message: Any) -> None:
        """Something that the peer waits for or acts on."""
        peer.urgent = True
        out = peer.out
        if not out:
            self.dirty.append(peer)
        out.append(message)

    def send_unasked(self, peer: Peer, message: Any) -> None:
        """Something that the peer will want, but has not asked for: the shell may send it a little later."""
        out = peer.out
        if not out:
            self.dirty.append(peer)
        out.append(message)

    def operate(self, operation: Any, done: Callable[[str, bool, bytes], None] | None) -> None:
        """An operation of the GCS; ``done`` gets (error class or "", ok, data)."""
        context = None if done is None else lambda answer: done(answer.error, answer.ok, answer.data)
        self.gcs.operate(operation, self.now, context)

    def revoke(self, worker: Worker) -> None:
        self.effects.append(TakeTokens(worker.number))

    def interrupt(self, worker: Worker, run: int) -> None:
        self.effects.append(Signal(worker.number, worker.pid, run))

    def end_worker(self, worker: Worker, why: str) -> None:
        self.pool.end(worker, why)

    def retire_worker(self, worker: Worker, why: str) -> None:
        """Let a worker that runs nothing end by itself."""
        worker.state = pools.ENDING
        worker.why = why
        if worker.peer is not None:
            self.send(worker.peer, Exit(True))

    def job_of(self, task: Task) -> int:
        peer = self.peers.get(task.owner)
        return peer.job if peer is not None else 0

    def _adopt(self, worker: Worker, home: Home) -> None:
        session, environment, gpus, threads = home
        worker.home = home
        peer = worker.peer
        assert peer is not None
        peer.session = session
        own = environment[:16] if environment[:16] in self.functions else b""
        peer.environment, peer.process = own, environment[len(own) :]
        blob = self.functions[own] if own else b""
        self.send(peer, Adopt(session, own, blob, threads, list(gpus), self.config.cluster, b""))

    def stop(self, reason: str) -> None:
        """End the cluster."""
        if self.stopping:
            return
        self.stopping = reason
        for peer in list(self.peers.values()):
            if peer.role in {DRIVER, OBSERVER}:
                self.send(peer, Shutdown(reason))
        self.effects.append(Stop(reason))

    # -- connections

    def _on_hello(self, peer: Peer, message: Hello) -> None:
        peer.role, peer.pid, peer.session = message.role, message.pid, message.session
        peer.label, peer.keep, peer.namespace = message.label, message.keep, message.namespace
        if message.protocol != PROTOCOL:
            self.send(
                peer,
                Shutdown(
                    f"this cluster speaks protocol {PROTOCOL}, you speak {message.protocol}: both need the same nbray version"
                ),
            )
            self.effects.append(Close(peer.number))
        elif message.role == WORKER:
            worker = self.pool.greet(message.token, peer, message.pid)
            if worker is None:
                self.effects.append(Close(peer.number))
                return
            peer.worker = worker
            peer.held = {}
            self._failed_starts = 0
            self.gcs.facts.append(WorkerEvent(worker.pid, "STARTED", self.now))
            self._welcome(peer, 0)
        elif message.role == OBSERVER:
            self._welcome(peer, 0)
        else:
            self.drivers += 1

            def registered(error: str, _ok: bool, data: bytes) -> None:
                if error:
                    self.send(peer, Shutdown(data.decode()))
                elif peer.number in self.peers:
                    self._welcome(peer, msgspec.msgpack.decode(data))
                else:
                    # It could not wait for the head.
                    self.operate(EndJob(msgspec.msgpack.decode(data), False), None)

            self.operate(RegisterJob(message.session, message.label, message.pid, message.role), registered)

    def _welcome(self, peer: Peer, job: int) -> None:
        config = self.config
        peer.job = job
        peer.execution = ids.driver_execution_id(config.cluster, job) if peer.role == DRIVER else b""
        self.send(
            peer,
            Welcome(
                PROTOCOL,
                config.node,
                config.cluster,
                config.name,
                peer.execution,
                config.span,
                config.inline_limit,
                dict(config.resources),
                dict(config.details),
                job,
            ),
        )

    def _on_register(self, peer: Peer, message: Register) -> None:
        key = msgspec.msgpack.encode(message.spec)
        kind = self._kinds.get(key)
        if kind is None:
            self._numbers += 1
            kind = self._kinds[key] = Kind(self._numbers, message.spec)
        peer.kinds[message.number] = kind

    def _on_function(self, peer: Peer, message: Function) -> None:
        self.functions.setdefault(message.function, message.blob)

    def _on_world(self, peer: Peer, message: World) -> None:
        if message.installed > self.installed:
            self.installed = message.installed
            self.pool.renew()
            self.effects.append(Renew())
        if peer.process and message.process != peer.process:
            # They have imported modules that the driver has reloaded since.
            self.pool.dismiss(peer.session, peer.process)
        peer.world = message.world
        recent = peer.worlds
        recent.pop(message.world, None)
        recent[message.world] = None
        if len(recent) > WORLDS:
            del recent[next(iter(recent))]
        peer.process = message.process
        if message.blob:
            self.worlds.setdefault(message.world, message)
            if len(self.worlds) > self._most_worlds:
                self._forget_worlds()

    def _forget_worlds(self) -> None:
        """Let go of worlds that nobody returns to: no client, no task that waits or runs or may run again, no actor that may restart."""
        used: set[bytes] = set()
        for peer in self.peers.values():
            used.add(peer.world)
            used.update(peer.worlds)
        used.update(task.world for task in self.tasks.tasks.values())
        used.update(actor.creation.world for actor in self.actors.actors.values())
        used.update(e.producer.world for e in self.objects.objects.values() if e.producer is not None)
        self.worlds = {name: world for name, world in self.worlds.items() if name in used}
        self._most_worlds = max(MOST_WORLDS, 2 * len(self.worlds))

    def _on_origin(self, peer: Peer, message: Origin) -> None:
        peer.cell = message.cell
        peer.count = None

    def _on_transient(self, peer: Peer, message: Transient) -> None:
        peer.transient = message.on

    def _on_leaving(self, peer: Peer, message: Leaving) -> None:
        worker = peer.worker
        if worker is None:
            return
        actor = self.actors.actors.get(worker.actor)
        if actor is not None:
            actor.killed = True
            worker.why = message.reason
        else:
            worker.why = worker.why or message.reason

    def _on_bye(self, peer: Peer, message: Bye) -> None:
        others = [p for p in self.peers.values() if p.role == DRIVER and p is not peer]
        stop = message.stop
        if stop and others and not message.force:
            if not message.yielding:
                names = ", ".join(sorted({p.label or p.session for p in others}))
                text = (
                    f"the cluster {self.config.name!r} is in use by {names}; stop it anyway with force "
                    "(%cluster stop --force, nbray.shutdown(stop=True, force=True)), or only leave it (nbray.shutdown())"
                )
                self.send(peer, Reply(message.request, "in use", text.encode()))
                return
            stop = False
        session = "" if stop else peer.session
        saves = message.save and self.names.worth_saving(session)
        self._leave(peer, saves=saves)
        self.send(peer, Reply(message.request, "", b"ends" if stop and not saves else b""))
        if saves:
            self.names.save_all(partial(self._saved, peer.session, stop), session)
        elif stop:
            self.stop("it was stopped")

    def _saved(self, session: str, stop: bool) -> None:
        """What a driver's session has left is on disk."""
        drivers = [peer for peer in self.peers.values() if peer.role == DRIVER]
        if stop and not drivers:
            self.stop("it was stopped")
        elif all(peer.session != session for peer in drivers):
            self.names.end_session(session)

    def _leave(self, peer: Peer, *, saves: bool = False) -> None:
        """A driver ends its session on purpose: what it ran and held goes, but for detached actors (``saves``: its names go later)."""
        if peer.role != DRIVER:
            return
        self.operate(EndJob(peer.job, True), None)
        same = [
            p for p in self.peers.values() if p.role == DRIVER and p.session == peer.session and p is not peer
        ]
        peer.role = OBSERVER
        self.drivers -= 1
        self.unused_since = self.now
        if not same:
            if not peer.keep and not saves:
                self.names.end_session(peer.session)
            self.actors.end_session(peer.session)
            self.tasks.end_session(peer.session)
            self.pool.dismiss(peer.session)
            self.scheduler.queue.forget(peer.session)
        self.values.forget(peer)

    # -- circles of waits

    def _break_circles(self) -> None:
        found = find_deadlock(self)
        if found is not None:
            peer, request, text = found
            self.values._resume(peer, request)
            self.send(peer, Reply(request, "DeadlockError", text.encode()))

    # -- questions

    def _on_query(self, peer: Peer, message: Query) -> None:
        what = message.what
        if what == "where":
            self.looks.where(peer, message)
            return
        if what == "watch":
            self.watches.ask(peer, message)
            return
        if what == "keep":
            self.names.on_keep(peer, message)
            return
        if what == "cells":
            cell = msgspec.msgpack.decode(message.argument, type=str) if message.argument else ""
            rows = self.counts.rows(peer.session, cell)
            self.send(peer, Reply(message.request, "", msgspec.msgpack.encode(rows)))
            return
        if what == "why":
            page = self.looks.why(msgspec.msgpack.decode(message.argument))
            self.send(peer, Reply(message.request, "", msgspec.msgpack.encode(page)))
            return
        if what in {"objects", "nodes", "resources", "memory", "held", "origins", "away"}:
            data = msgspec.msgpack.encode(self._answer(what, message.argument))
            self.send(peer, Reply(message.request, "", data))
            return

        def answered(answer: Settled) -> None:
            if answer.error:
                self.send(peer, Reply(message.request, answer.error, answer.data))
                return
            if answer.page is None:
                self.send(peer, Reply(message.request, "", answer.data))
                return
            page = answer.page
            page.live = [(self.config.node, self._rows(what))]
            self.send(peer, Reply(message.request, "", msgspec.msgpack.encode(page)))

        self.gcs.query(what, message.argument, self.now, answered)

    def _answer(self, what: str, argument: bytes) -> Any:
        config = self.config
        if what == "away":
            since = self.names.away.get(msgspec.msgpack.decode(argument, type=str))
            return None if since is None else self.now - since
        if what in ("held", "origins"):
            session = msgspec.msgpack.decode(argument, type=str) if argument else ""
            return self.names.rows(session, origins=what == "origins")
        if what == "resources":
            return {"total": self.scheduler.ledger.total, "available": self.scheduler.ledger.free}
        if what == "memory":
            table = self.objects
            return {
                "used": table.arena.used, "limit": table.arena.limit, "inline": table.inline_bytes, "spilled": table.spilled_bytes,
                "spilled_total": table.spilled_total, "restored_total": table.restored_total, "objects": len(table.objects),
            }  # fmt: skip
        return Page(live=[(config.node, self._rows(what))])

    def _rows(self, what: str) -> list[Any]:
        config = self.config
        if what == "nodes":
            ledger = self.scheduler.ledger
            return [NodeRow(config.node, "ALIVE", ledger.total, ledger.free, config.pid, config.socket)]
        if what == "objects":
            return [self._object_row(entry) for entry in self.objects.objects.values()]
        if what == "actors":
            return list(self.actors.rows())
        if what == "workers":
            return [self._worker_row(worker) for worker in self.pool.workers.values()]
        if what == "tasks":
            return [self._task_row(task) for task in list(self.tasks.tasks.values())[:10_000]]
        return []

    def name_of(self, holder: int | bytes) -> str:
        """A holder of objects, for people."""
        if isinstance(holder, bytes):
            name = self.names.name_of(holder)
            if name:
                return name
            if holder.startswith(SESSION):
                return f"session {holder.removeprefix(SESSION).decode()}"
            task = self.tasks.tasks.get(holder)
            return f"task {ids.short(holder)}" if task is not None else f"object {ids.short(holder)}"
        peer = self.peers.get(holder)
        return f"{peer.role} {peer.pid}" if peer is not None else "a process that has ended"

    def _object_row(self, entry: store.Object) -> ObjectRow:
        names = [self.name_of(holder) for holder in holder_sets.each(entry.holders)]
        names += [f"views in {self.name_of(number)}" for number in sorted(entry.pins or ())]
        state = "ERROR" if entry.is_error else store.STATE_NAMES[entry.state]
        return ObjectRow(
            entry.id,
            entry.size,
            {"CREATED": "PENDING", "SPILLING": "ARENA", "RESTORING": "SPILLED"}.get(state, state),
            [self.config.node],
            names,
        )

    def _worker_row(self, worker: Worker) -> WorkerRow:
        state = (
            "BLOCKED"
            if worker.blocked
            else "RUNNING"
            if worker.pending
            else "STARTING"
            if worker.state == pools.STARTING
            else "IDLE"
        )
        task = worker.pending[0].name if worker.pending else ""
        return WorkerRow(
            worker.pid,
            state,
            task,
            worker.home[0] if worker.home else "",
            "actor" if worker.actor else "task",
        )

    def _task_row(self, task: Task) -> TaskEvent:
        spec, worker = task.kind.spec, task.worker
        state = (
            task.state
            if task.state < RUNNING
            else (3 if worker is not None and worker.pending and worker.pending[0] is task else 2)
        )
        return TaskEvent(
            task.id, spec.name, spec.kind, state, task.attempt, worker.pid if worker is not None else 0, self.job_of(task), task.session, task.cell,
            spec.function, task.submit.parent, task.actor, task.submit.deps, spec.num_returns, 0, "", task.submitted, task.ready, task.dispatched,
            task.dispatched if state == 3 else 0.0, 0.0, 0.0,
        )  # fmt: skip

    def check(self) -> None:
        """Assert the invariants of all parts (the simulator does after every step)."""
        self.objects.check()
        self.names.check()
        self.scheduler.check()
        for task in self.tasks.tasks.values():
            assert not task.terminal, f"{task} is terminal and still live"
        for worker in self.pool.workers.values():
            runs = [task.run for task in worker.pending]
            assert len(set(runs)) == len(runs), f"{worker} has a run twice"
            for task in worker.pending:
                assert task.worker is worker, f"{task} is pending at {worker}, which is not its worker"
        for entry in self.objects.objects.values():
            waiting = [number for number, _, _ in entry.waiters or ()]
            for holder in (*holder_sets.each(entry.holders), *waiting):
                known = self.peers.get(holder) if isinstance(holder, int) else None
                if known is not None and known.held is not None:
                    assert entry.id in known.held, (
                        f"{known} holds {entry.id.hex()}, which its end would not free"
                    )


assert CREATE_ACTOR, "kinds of task classes are distinct from a plain task's 0"
