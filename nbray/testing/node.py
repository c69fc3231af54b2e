"""The simulated shell of a node: what ``nbray.node.server`` does with sockets, pipes, a zygote and a disk, done with streams and events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nbray.gcs.client import GcsClient
from nbray.gcs.messages import PROTOCOL as GCS_PROTOCOL
from nbray.gcs.messages import (
    Ack,
    Batch,
    HeadToNode,
    NodeRegistered,
    NodeToHead,
    Op,
    OpReply,
    Query,
    QueryReply,
    RegisterNode,
)
from nbray.gcs.tables import Tables
from nbray.messages import CREATE_ACTOR, TASK, CreateActor, Largest, Submit
from nbray.node.machine import Close, NodeConfig, NodeMachine, Signal, Stop, TakeTokens
from nbray.node.pool import Fork, Kill
from nbray.node.scarcity import AskLargest
from nbray.store.objects import DeleteSpilled, Punch, Restore, Spill
from nbray.testing.checks import Checks
from nbray.testing.clients import SimClient
from nbray.testing.naming import Naming
from nbray.testing.processes import SimWorker
from nbray.testing.programs import Program
from nbray.testing.world import Stream, World

if TYPE_CHECKING:
    from nbray.testing.faults import Plan


class SimHead:
    """The head: production tables, a disk that commits later, crashes in between."""

    def __init__(self, world: World, node: SimNode) -> None:
        self.world = world
        self.node = node
        self.rows: dict[tuple[str, bytes], bytes] = {}
        self.tables = Tables()
        self.batches: list[Batch] = []
        """What is on disk."""
        self.epoch = 0
        self.up = True
        self._name = ""
        self._last = 0.0

    def receive(self, epoch: int, messages: list[NodeToHead]) -> None:
        if epoch != self.epoch or not self.up:
            return
        for message in messages:
            rows: list[Any] = []
            reply: HeadToNode | None = None
            batch: Batch | None = None
            if type(message) is RegisterNode:
                self._name = message.node
                error, rows = self.tables.register(message)
                reply = NodeRegistered(error, self.tables.sequence(message.node), 1)
            elif type(message) is Batch:
                row = self.tables.admit(self._name, message.sequence)
                if row is not None:
                    rows, batch = [row], message
                reply = Ack(message.sequence)
            elif type(message) is Op:
                outcome = self.tables.operate(self._name, message)
                rows, reply = outcome.rows, OpReply(message.request, outcome.ok, outcome.data)
            elif type(message) is Query:
                reply = QueryReply(message.request, "the simulated head answers no questions", b"")
            self._last = max(self._last, self.world.now + self.world.random.uniform(0.0001, 0.003))
            self.world.after(self._last - self.world.now, self._commit, epoch, rows, batch, reply)

    def _commit(self, epoch: int, rows: list[Any], batch: Batch | None, reply: HeadToNode | None) -> None:
        if epoch != self.epoch or not self.up:
            return
        for row in rows:
            if row.value is None:
                self.rows.pop((row.table, row.key), None)
            else:
                self.rows[row.table, row.key] = row.value
        if batch is not None:
            self.batches.append(batch)
        if reply is not None:
            self.node.head_says(epoch, [reply])

    def crash(self) -> None:
        if not self.up:
            return
        self.world.log("fault: the head dies")
        self.up = False
        self.node.lose_head()
        self.world.after(self.world.random.uniform(0.01, 1.0), self._restart)

    def _restart(self) -> None:
        self.up = True
        self.epoch += 1
        self.tables = Tables([(table, key, value) for (table, key), value in self.rows.items()])
        self.node.wake(0.0)


class Connection:
    """A connection as the node sees it. ``peer``: its number is also the connection's."""

    __slots__ = ("client", "down", "number", "open", "up", "worker")

    def __init__(self, number: int, worker: int) -> None:
        self.number = number
        self.worker = worker
        self.client: SimClient | None = None
        self.down: Stream | None = None
        self.up: Stream | None = None
        self.open = True


class SimNode:
    """One node: `NodeMachine` and `GcsClient`, their inputs in any order that real sockets allow, their effects carried out."""

    def __init__(self, world: World, config: NodeConfig, plan: Plan, program: Program) -> None:
        self.world = world
        self.plan = plan
        self.program = program
        self.disk_full = False
        self.gcs = GcsClient(RegisterNode(GCS_PROTOCOL, config.node, 1, 1, config.cluster, config.resources))
        self.machine = NodeMachine(config, self.gcs, world.now, self._reserve if plan.portable else None)
        self.memory = bytearray(config.span)
        self.head = SimHead(world, self)
        self.checks = Checks(world, self)
        self.connections: dict[int, Connection] = {}
        self.workers: dict[int, Connection] = {}
        """By worker number, until their exit is reported."""
        self.files: dict[bytes, bytes] = {}
        self.stopped = ""
        self.naming = Naming(world.seed)
        self.submitted: dict[bytes, int] = {}
        """Tasks that have arrived, with their kind."""
        self._numbers = 0
        self._pids = 100
        self._inbox: dict[str, deque[Callable[[], None]]] = {}
        self._wake_at = float("inf")
        self._next_tick = world.now
        self._disk: deque[Callable[[], None]] = deque()
        self._disk_busy = False
        self._head_up: Stream | None = None
        self._head_down: Stream | None = None

    # -- the loop

    def post(self, source: str, call: Callable[[], None]) -> None:
        """An input of the node's loop; order is kept within a source only."""
        self._inbox.setdefault(source, deque()).append(call)
        self.wake(self.world.random.uniform(0.0, 0.00005))

    def wake(self, delay: float) -> None:
        at = self.world.now + delay
        if at < self._wake_at:
            self._wake_at = at
            self.world.after(delay, self._loop, at)

    def _loop(self, at: float) -> None:
        if at != self._wake_at or self.stopped:
            return
        self._wake_at = float("inf")
        machine, world = self.machine, self.world
        inbox, self._inbox = self._inbox, {}
        sources = list(inbox)
        world.random.shuffle(sources)
        for source in sources:
            for call in inbox[source]:
                call()
        machine.settle(world.now)
        self._perform()
        if world.now >= self._next_tick:
            self._next_tick = world.now + machine.tick(world.now)
            machine.settle(world.now)
            self._perform()
        elif (
            machine.scheduler.ahead
            or machine.tasks.graces
            or machine.objects.waiting_for_memory
            or machine.scarcity.asked is not None
        ):
            self._next_tick = min(self._next_tick, world.now + 0.01)
        self._talk_to_head()
        self.checks.after_step(bool(inbox))
        self.wake(max(self._next_tick - world.now, 0.0))

    def _perform(self) -> None:
        machine = self.machine
        while machine.dirty or machine.effects:
            for first in machine.objects.first:
                if isinstance(first, Punch):
                    for offset, length in first.ranges:
                        self.memory[offset : offset + length] = bytes(length)
                else:
                    self.memory[first.offset : first.offset + len(first.data)] = first.data
            machine.objects.first.clear()
            dirty, machine.dirty = machine.dirty, []
            for peer in dirty:
                out, peer.out = peer.out, []
                connection = self.connections.get(peer.number)
                if connection is None or not connection.open or connection.down is None:
                    continue
                if self.plan.busy and self.world.chance(self.plan.busy):
                    peer.unsent = 1 << 30
                    self.world.after(0.002, setattr, peer, "unsent", 0)
                if self.world.echo is not None:
                    self.world.echo_only(f"node -> {peer.number}: {' '.join(describe(m) for m in out)}")
                connection.down.send(out)
                if peer.worker is not None and peer.worker.tokens:
                    self._grant(peer.worker.number, peer.worker.tokens)
            effects, machine.effects = machine.effects, []
            for effect in effects:
                self._carry_out(effect)
            if effects:
                machine.settle(self.world.now)

    def _grant(self, number: int, tokens: bytearray) -> None:
        connection = self.workers.get(number)
        if connection is not None and isinstance(connection.client, SimWorker):
            connection.client.pipe.extend(tokens)
            self.world.after(self.world.random.uniform(0, 0.00003), connection.client.token)
        tokens.clear()

    def _carry_out(self, effect: Any) -> None:
        kind = type(effect)
        world = self.world
        world.log(
            f"effect {kind.__name__} {getattr(effect, 'worker', '') or getattr(effect, 'object', b'').hex()}"
        )
        if kind is Fork:
            self._fork(effect.worker)
        elif kind is Kill:
            connection = self.workers.get(effect.worker)
            if connection is not None and isinstance(connection.client, SimWorker):
                self.kill(connection.client)
        elif kind is TakeTokens:
            connection = self.workers.get(effect.worker)
            if connection is not None and isinstance(connection.client, SimWorker):
                tokens = list(connection.client.pipe)
                connection.client.pipe.clear()
                self.machine.tokens_returned(effect.worker, tokens, world.now)
        elif kind is Signal:
            connection = self.workers.get(effect.worker)
            if connection is not None and isinstance(connection.client, SimWorker):
                connection.client.interrupts.append(effect.run)
                world.after(world.random.uniform(0, 0.00005), connection.client.signal)
        elif kind is AskLargest:
            # Some are too busy to answer in time.
            if world.chance(0.5):
                world.after(world.random.uniform(0, 0.3), self._tell_largest, effect.worker)
        elif kind is Spill:
            self._queue_disk(partial(self._spill, effect))
        elif kind is Restore:
            self._queue_disk(partial(self._restore, effect))
        elif kind is DeleteSpilled:
            self._queue_disk(partial(self._delete, effect.object))
        elif kind is Close:
            self.drop(effect.peer)
        elif kind is Stop:
            self.stopped = effect.reason

    # -- connections

    def connect(self, worker: int = 0) -> Connection:
        self._numbers += 1
        connection = self.connections[self._numbers] = Connection(self._numbers, worker)
        self.machine.connected(connection.number)
        slow = self.plan.latency()
        connection.up = Stream(self.world, partial(self._arrived, connection), slow)
        connection.down = Stream(
            self.world,
            lambda messages: connection.client.deliver(messages) if connection.client is not None else None,
            slow,
        )
        return connection

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def say(self, number: int, messages: list[Any]) -> None:
        """A client sends."""
        connection = self.connections.get(number)
        if connection is not None and connection.up is not None:
            connection.up.send(messages)

    def _arrived(self, connection: Connection, messages: list[Any]) -> None:
        self.post(f"peer {connection.number}", partial(self._receive, connection, messages))

    def _receive(self, connection: Connection, messages: list[Any]) -> None:
        peer = self.machine.peers.get(connection.number)
        if peer is not None and connection.open:
            if self.world.echo is not None:
                self.world.echo_only(
                    f"{connection.number} -> node: {' '.join(describe(m) for m in messages)}"
                )
            for message in messages:
                if type(message) is Submit:
                    self.submitted[message.task] = TASK
                elif type(message) is CreateActor:
                    self.submitted[message.submit.task] = CREATE_ACTOR
            self.machine.receive(peer, messages, self.world.now)

    def drop(self, number: int) -> None:
        """End of file from a connection, or the node closes it."""
        connection = self.connections.pop(number, None)
        if connection is None:
            return
        connection.open = False
        peer = self.machine.peers.get(number)
        if peer is not None:
            if peer.worker is not None:
                self.machine.end_worker(peer.worker, "it closed its connection")
            else:
                self.machine.disconnected(peer, self.world.now)

    def driver_dies(self, client: SimClient) -> None:
        self.world.log(f"fault: driver {client.number} dies")
        connection = self.connections[client.number]
        client.die()
        assert connection.up is not None
        for messages in connection.up.cut():
            self._arrived(connection, messages)
        self.post(f"peer {client.number}", partial(self.drop, client.number))
        self.unmap(client.number)

    def unmap(self, number: int) -> None:
        """The process looks at no object any more; what it has forked may do so for a while."""
        forked = 3.0 if self.plan.forks and self.world.chance(0.3) else 0.002
        self.world.after(
            self.world.random.uniform(0, forked),
            self.post,
            f"life {number}",
            partial(self._released, number),
        )

    # -- workers

    def _fork(self, number: int) -> None:
        connection = self.workers[number] = self.connect(number)
        client = connection.client = SimWorker(
            self.world, self, connection.number, self.next_pid(), number, self.program
        )
        self.world.after(
            self.world.random.uniform(0.0005, 0.004), lambda: client.boot() if client.alive else None
        )

    def kill(self, client: SimWorker) -> None:
        if client.alive:
            self.world.log(f"worker {client.worker} is killed")
            client.die()
            self._ended(client)

    def worker_ends(self, client: SimWorker, status: int) -> None:
        """The process ends by itself."""
        self.world.log(f"worker {client.worker} exits {status}")
        client.alive = False
        client.fibers.clear()
        self._ended(client)

    def _ended(self, client: SimWorker) -> None:
        """End of file on its socket, end of its life pipe and the zygote's report come in any order."""
        world = self.world
        self.checks.worker_died(client)
        connection = self.workers[client.worker]
        assert connection.up is not None
        for messages in connection.up.cut():
            self._arrived(connection, messages)
        if world.chance(0.5):
            world.after(
                world.random.uniform(0, 0.001),
                self.post,
                f"peer {client.number}",
                partial(self.drop, client.number),
            )
        world.after(world.random.uniform(0, 0.002), self.post, "zygote", partial(self._exited, client))
        self.unmap(client.number)

    def _exited(self, client: SimWorker) -> None:
        """Read what it had said before, then tell the machine."""
        connection = self.workers.pop(client.worker)
        self.connections.pop(connection.number, None)
        source = f"peer {connection.number}"
        for call in self._inbox.pop(source, ()):
            call()
        connection.open = False
        unread = list(client.pipe)
        client.pipe.clear()
        self.world.log(f"worker {client.worker} is reported dead, {len(unread)} tokens unread")
        self.machine.worker_exited(client.worker, "was ended by signal 9", unread, self.world.now)

    def _released(self, number: int) -> None:
        self.machine.memory_released(number, self.world.now)

    # -- disk

    def _tell_largest(self, number: int) -> None:
        connection = self.workers.get(number)
        if connection is not None and connection.client is not None and connection.client.alive:
            self.say(connection.number, [Largest([("data", "ndarray", 1 << 20)])])

    def _reserve(self, _offset: int, _size: int) -> str:
        return "No space left on device" if self.disk_full else ""

    def _queue_disk(self, call: Callable[[], None]) -> None:
        self._disk.append(call)
        if not self._disk_busy:
            self._disk_busy = True
            self.world.after(self.world.random.uniform(0.0001, self.plan.disk_seconds), self._disk_works)

    def _disk_works(self) -> None:
        call = self._disk.popleft()
        call()
        if self._disk:
            self.world.after(self.world.random.uniform(0.0001, self.plan.disk_seconds), self._disk_works)
        else:
            self._disk_busy = False

    def _spill(self, effect: Spill) -> None:
        error = "No space left on device" if self.disk_full else ""
        if not error:
            self.files[effect.object] = bytes(self.memory[effect.offset : effect.offset + effect.size])
        self.post("disk", lambda: self.machine.objects.spilled(effect.object, error))

    def _restore(self, effect: Restore) -> None:
        error = "Input/output error" if self.plan.bad_disk and self.world.chance(self.plan.bad_disk) else ""
        data = self.files.get(effect.object)
        if data is None:
            error = "the file is gone"
        if not error and data is not None:
            self.memory[effect.offset : effect.offset + effect.size] = data
        self.post("disk", lambda: self.machine.objects.restored(effect.object, error))

    def _delete(self, object_id: bytes) -> None:
        self.files.pop(object_id, None)

    # -- the head

    def _talk_to_head(self) -> None:
        now = self.world.now
        if self._head_up is None:
            if self.head.up:
                epoch = self.head.epoch
                self._head_up = Stream(self.world, partial(self.head.receive, epoch), self.plan.latency())
                self._head_down = Stream(
                    self.world,
                    lambda messages: self.post("head", partial(self._head_said, epoch, messages)),
                    self.plan.latency(),
                )
                self._head_up.send(self.gcs.connected())
        else:
            messages = self.gcs.output(now)
            if messages:
                self._head_up.send(messages)
        settled = self.gcs.expire(now)
        if settled:
            self.machine.gcs_settled(settled, now)
        due = self.gcs.deadline()
        if due is not None and self._head_up is not None:
            self.wake(max(due - now, 0.001))

    def head_says(self, epoch: int, messages: list[HeadToNode]) -> None:
        if self._head_down is not None and epoch == self.head.epoch:
            self._head_down.send(messages)

    def _head_said(self, epoch: int, messages: list[HeadToNode]) -> None:
        if epoch == self.head.epoch and self._head_down is not None:
            self.machine.gcs_settled(self.gcs.receive(messages), self.world.now)

    def lose_head(self) -> None:
        for stream in (self._head_up, self._head_down):
            if stream is not None:
                stream.cut()
        self._head_up = self._head_down = None
        self.gcs.disconnected()


def describe(message: Any) -> str:
    """A message in a word or two, for traces."""
    words = [type(message).__name__]
    for name in ("task", "object", "run", "runs", "objects", "error", "started"):
        value = getattr(message, name, None)
        if isinstance(value, bytes) and value:
            words.append(value.hex()[-18:])
        elif isinstance(value, list):
            words.append(",".join(v.hex()[-18:] if isinstance(v, bytes) else str(v) for v in value))
        elif isinstance(value, int | str) and value != "":
            words.append(f"{name}={value}" if name != "started" or isinstance(value, bool) else "")
    return "(" + " ".join(w for w in words if w) + ")"
