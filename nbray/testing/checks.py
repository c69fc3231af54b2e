"""What must hold after every step, and what must be gone at rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from nbray import ids
from nbray.events import TaskEvent
from nbray.messages import ACTOR_CALL, CREATE_ACTOR, Run, TaskClass
from nbray.node import pool as pools
from nbray.scheduler.task import READY, RUNNING, STATE_NAMES, WAITING, Task
from nbray.store import holders
from nbray.store import objects as store
from nbray.testing.clients import SimClient, decode_value
from nbray.testing.world import BrokenInvariantError, World

if TYPE_CHECKING:
    from nbray.testing.node import SimNode

_EVERY = 8
"""Steps between comparisons of what processes hold with what the node thinks they hold."""


class Checks:
    """The invariants of one run, and what it has to remember for them."""

    def __init__(self, world: World, node: SimNode) -> None:
        self.world = world
        self.node = node
        self.digests: dict[bytes, bytes] = {}
        """What each object was when it was first read."""
        self.executing: dict[bytes, SimClient] = {}
        """Tasks that run now, and where."""
        self.hosts: dict[bytes, SimClient] = {}
        """The live process of each actor."""
        self.last_call: dict[tuple[bytes, bytes], int] = {}
        self._steps = 0

    def fail(self, text: str) -> None:
        raise BrokenInvariantError(text)

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            self.fail(text)

    def note(self, text: str) -> None:
        self.world.log(text)

    # -- what processes see

    def decode(self, object_id: bytes, data: bytes) -> bytes:
        return decode_value(object_id, data)

    def value_read(self, object_id: bytes, digest: bytes) -> None:
        """A sealed object never changes."""
        known = self.digests.setdefault(object_id, digest)
        if known != digest:
            self.fail(f"object {object_id.hex()} was {known.hex()} and is {digest.hex()} now")

    def run_starts(self, client: Any, run: Run, spec: TaskClass) -> None:
        """One live run per task; calls of one caller in order; one incarnation of an actor."""
        self.world.log(
            f"worker {client.worker} starts {spec.name} {run.task.hex()} attempt {run.attempt} run {run.run}"
        )
        other = self.executing.get(run.task)
        self.expect(
            other is None,
            f"{spec.name} {run.task.hex()} starts in process {client.pid} while it runs in {other.pid if other else 0}",
        )
        self.executing[run.task] = client
        if spec.kind == CREATE_ACTOR:
            host = self.hosts.get(run.task)
            self.expect(
                host is None,
                f"actor {run.task.hex()} starts in process {client.pid} while it lives in {host.pid if host else 0}",
            )
            self.hosts[run.task] = client
        elif spec.kind == ACTOR_CALL:
            actor = ids.actor_of(run.task)
            self.expect(
                self.hosts.get(actor) is client,
                f"a call of actor {actor.hex()} runs in process {client.pid}, which is not its",
            )
            if run.attempt == 0:
                caller, number = run.task[: ids.EXECUTION_BYTES], int.from_bytes(run.task[12:16], "little")
                last = self.last_call.get((actor, caller), -1)
                self.expect(
                    number > last,
                    f"call {number} of {caller.hex()} to actor {actor.hex()} starts after call {last}",
                )
                self.last_call[actor, caller] = number

    def run_ends(self, client: SimClient, run: Run) -> None:
        self.executing.pop(run.task, None)

    def worker_died(self, client: SimClient) -> None:
        for table in (self.executing, self.hosts):
            for key in [key for key, where in table.items() if where is client]:
                del table[key]

    # -- the machines

    def after_step(self, moved: bool) -> None:
        """All invariants of the machines; ``moved``: whether there was any input."""
        if not moved:
            return
        machine = self.node.machine
        machine.check()
        self.node.naming.check(machine)
        self._objects()
        for task in machine.tasks.tasks.values():
            self._task(task)
        self._pool()
        self._steps += 1
        if self._steps % _EVERY == 0:
            self._processes()

    def _objects(self) -> None:
        """What a sealed object contains is there, held by it; who pins still has the arena mapped."""
        objects = self.node.machine.objects.objects
        for entry in objects.values():
            if entry.refs and entry.state >= store.INLINE:
                for inner in entry.refs:
                    contained = objects.get(inner)
                    if contained is None and self.node.program.features.frees:
                        continue
                    self.expect(
                        contained is not None,
                        f"object {inner.hex()} was freed while object {entry.id.hex()} contains it",
                    )
                    assert contained is not None
                    self.expect(
                        holders.contains(contained.holders, entry.id),
                        f"object {inner.hex()} is not held by {entry.id.hex()}, which contains it",
                    )
            if (
                entry.state >= store.INLINE
                and entry.holders is None
                and not entry.pins
                and not entry.waiters
                and not entry.dependants
            ):
                producer = entry.producer
                unfinished = producer is not None and not producer.terminal
                if not unfinished and entry.id[:-4] not in self.node.machine.tasks.tasks:
                    self.fail(
                        f"object {entry.id.hex()} ({store.STATE_NAMES[entry.state]}) is kept although nobody can reach it"
                    )

    def _task(self, task: Task) -> None:
        """Its inputs are held for it; somebody has it: nothing is forgotten."""
        machine = self.node.machine
        objects = machine.objects.objects
        for object_id in [*task.inputs(), *(task.submit.refs or ())]:
            entry = objects.get(object_id)
            self.expect(
                (entry is not None and holders.contains(entry.holders, task.id))
                or (entry is None and self.node.program.features.frees),
                f"object {object_id.hex()} is {'not held by' if entry is not None else 'freed before the end of'} {task}, which needs it",
            )
        if task.state == RUNNING:
            worker = task.worker
            self.expect(
                worker is not None and task in worker.pending and worker.number in machine.pool.workers,
                f"{task} runs nowhere",
            )
            return
        if task.missing:
            waits = any(task in (objects[o].dependants or ()) for o in task.inputs())
            fetches = any(task in tasks for tasks in machine.values.fetching.values())
            self.expect(
                waits or fetches or machine.values.in_line(task),
                f"{task} misses {task.missing} inputs and waits for none",
            )
        if task.kind.is_call:
            actor = machine.actors.actors.get(task.actor)
            queued = actor is not None and (
                task in actor.backlog or any(task in queue for queue in actor.callers.values())
            )
            self.expect(queued, f"{task} is in no queue of its actor")
        elif task.state == READY and not task.missing:
            shape = task.shape
            self.expect(
                shape is not None and any(task is queued for queued in shape), f"{task} is in no queue"
            )
        elif task.state == WAITING:
            self.expect(bool(task.missing), f"{task} waits for nothing")

    def _pool(self) -> None:
        machine = self.node.machine
        for worker in machine.pool.workers.values():
            if worker.state in (pools.IDLE, pools.SPARE, pools.STARTING):
                self.expect(not worker.pending, f"{worker} has {list(worker.pending)}")
                self.expect(worker.held is None, f"{worker} holds resources")
        idle = [w for same in machine.pool._idle.values() for w in same]
        self.expect(len({w.number for w in idle}) == len(idle), "a worker is idle twice")
        for worker in idle:
            self.expect(worker.state == pools.IDLE, f"{worker} is listed as idle")

    def _processes(self) -> None:
        """What a process with nothing under way holds, the node knows to be held by it."""
        objects = self.node.machine.objects.objects
        for connection in self.node.connections.values():
            client = connection.client
            if (
                client is None
                or not client.alive
                or connection.up is None
                or connection.up.flight
                or client.machine.out
                or client.machine.dropped
            ):
                continue
            if self.node._inbox.get(f"peer {connection.number}"):
                continue
            for object_id, entry in client.entries.items():
                if entry.count > 0 and entry.held:
                    known = objects.get(object_id)
                    self.expect(
                        known is not None and holders.contains(known.holders, connection.number),
                        f"process {connection.number} holds object {object_id.hex()}, the node {'does not know that' if known else 'has freed it'}",
                    )

    # -- the end

    def at_rest(self) -> None:
        """All drivers have let go of everything: nothing is left."""
        machine = self.node.machine
        machine.check()
        table = machine.objects
        left = [
            f"{o.hex()} {store.STATE_NAMES[e.state]} holders {list(holders.each(e.holders))!r} pins {e.pins} waiters {e.waiters} dependants {e.dependants}"
            for o, e in table.objects.items()
        ]
        self.expect(not left, "objects are left at rest: " + "; ".join(left[:5]))
        for name, value in (
            ("bytes used in the arena", table.arena.used),
            ("inline bytes", table.inline_bytes),
            ("spilled bytes", table.spilled_bytes),
            ("requests for memory", len(table._requests)),
            ("moves to disk", len(table._moving) + len(table._orphans)),
            ("spill files", len(self.node.files)),
            ("tasks", len(machine.tasks.tasks)),
            ("streams", len(machine.tasks.streams)),
            ("executions", len(machine.tasks.executions)),
            ("waits", len(machine.values.waits)),
            ("fetches", len(machine.values.fetching)),
            ("slots", len(machine.scheduler.slots)),
            ("workers with tasks ahead", len(machine.scheduler.ahead)),
            ("ready tasks", machine.scheduler.queue.backlog()),
            ("owed CPU", machine.scheduler.ledger.owed),
            ("graces", len(machine.tasks.graces)),
            ("names", len(machine.names.bound)),
            ("names to come", len(machine.names.expected) + len(machine.names.announced)),
        ):
            self.expect(not value, f"at rest there are {value} {name} left")
        ledger = machine.scheduler.ledger
        self.expect(ledger.free == ledger.total, f"at rest {ledger.free} of {ledger.total} are free")
        alive = [a.id.hex() for a in machine.actors.actors.values() if a.state != "DEAD"]
        self.expect(not alive, f"actors live on without handles: {alive}")
        for worker in machine.pool.workers.values():
            self.expect(
                worker.state in (pools.IDLE, pools.SPARE, pools.STARTING), f"at rest {worker} is not idle"
            )
        for connection in self.node.connections.values():
            client = connection.client
            if client is not None and client.alive:
                machinery = client.machine
                self.expect(
                    not machinery.entries,
                    f"process {connection.number} keeps {[o.hex() for o in machinery.entries][:5]}",
                )
                self.expect(not machinery.streams, f"process {connection.number} keeps streams")
                self.expect(
                    machinery.pending == 0,
                    f"process {connection.number} counts {machinery.pending} pending results",
                )

    def history(self, submitted: dict[bytes, int], *, reconstructed: bool) -> None:
        """The head has every batch once, in order, and one terminal event per task."""
        batches = self.node.head.batches
        numbers = [batch.sequence for batch in batches]
        self.expect(numbers == list(range(1, len(numbers) + 1)), f"the head has batches {numbers}")
        ends: dict[bytes, int] = {}
        for batch in batches:
            if batch.tasks:
                for event in msgspec.msgpack.decode(batch.tasks, type=list[TaskEvent]):
                    if event.state in (4, 5, 6):
                        ends[event.task] = ends.get(event.task, 0) + 1
        for task, kind in submitted.items():
            count = ends.get(task, 0)
            self.expect(count >= 1, f"the history does not say how task {task.hex()} ended")
            if kind != CREATE_ACTOR and not reconstructed:
                self.expect(count == 1, f"the history says {count} times how task {task.hex()} ended")

    def story(self) -> str:
        """Who waits for what."""
        machine = self.node.machine
        lines = []
        for task in list(machine.tasks.tasks.values())[:20]:
            where = f"at {task.worker!r}, blocked {task.worker.blocked!r}" if task.worker is not None else ""
            lines.append(
                f"  task {task.name} {task.id.hex()} {STATE_NAMES[task.state]} attempt {task.attempt} missing {task.missing} {where}"
            )
        for worker in machine.pool.workers.values():
            if worker.pending or worker.state not in (pools.IDLE, pools.SPARE):
                lines.append(
                    f"  {worker!r} pending {[t.run for t in worker.pending]} held {worker.held} actor {worker.actor.hex()}"
                )
        for actor in machine.actors.actors.values():
            lines.append(
                f"  actor {actor.id.hex()} {actor.state} backlog {len(actor.backlog)} callers {len(actor.callers)} restarts {actor.restarts}"
            )
        for request in list(machine.objects._requests)[:5]:
            lines.append(f"  memory wanted: {request}")
        lines.append(
            f"  resources free {machine.scheduler.ledger.free} owed {machine.scheduler.ledger.owed} of {machine.scheduler.ledger.total}"
        )
        return "\n".join(lines)
