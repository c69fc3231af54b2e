"""Answers about what has not ended: where the code of running tasks is, and what each task waits for. Pure; part of the node's machine.

Only the worker knows where its code is. It is asked by a signal, because it reads its socket again only when the user's code is done; it answers from a
thread beside that code (``nbray.worker.places``). A worker that does not answer in time, because its code keeps the interpreter to itself, is reported without lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from nbray.events import Page, PlaceRow, WaitRow
from nbray.messages import Places, Reply
from nbray.scheduler.resources import Amounts
from nbray.scheduler.task import READY, RUNNING, WAITING, Task
from nbray.store.objects import INLINE

if TYPE_CHECKING:
    from nbray.messages import Query
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.pool import Worker

PATIENCE = 1.0
"""Seconds that workers have for saying where their code is."""

SHOWN = 100
"""Tasks that one answer about waiting names for each reason."""


@dataclass(slots=True, frozen=True)
class Look:
    """Send the worker the signal that asks where its code is."""

    worker: int


class _Question:
    __slots__ = ("deadline", "missing", "peer", "places", "request")

    def __init__(self, peer: Peer, request: int, deadline: float, missing: set[int]) -> None:
        self.peer = peer
        self.request = request
        self.deadline = deadline
        self.missing = missing
        self.places: dict[bytes, list[tuple[str, int, str]]] = {}


class Looks:
    """Questions about running and waiting tasks; those that are open."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.open: list[_Question] = []

    # -- where

    def where(self, peer: Peer, message: Query) -> None:
        """Ask all workers that run something; answered when all have said where, or after `PATIENCE`."""
        node = self.node
        asked = {
            worker.number
            for worker in node.pool.workers.values()
            if worker.pending and worker.peer is not None
        }
        node.effects += [Look(number) for number in sorted(asked)]
        question = _Question(peer, message.request, node.now + PATIENCE, asked)
        if asked:
            self.open.append(question)
        else:
            self._answer(question)

    def on_places(self, peer: Peer, message: Places) -> None:
        """A worker says where its tasks are."""
        if peer.worker is None:
            return
        for question in self.open:
            question.missing.discard(peer.worker.number)
            question.places.update(message.places)
        self.expire(self.node.now)

    def expire(self, now: float) -> None:
        """Answer what is complete or has waited long enough."""
        done = [each for each in self.open if not each.missing or each.deadline <= now]
        if done:
            self.open = [each for each in self.open if each not in done]
            for question in done:
                self._answer(question)

    def _answer(self, question: _Question) -> None:
        node = self.node
        if node.peers.get(question.peer.number) is not question.peer:
            return
        rows = []
        for worker in sorted(node.pool.workers.values(), key=lambda worker: worker.number):
            for task in self._running(worker):
                rows.append(
                    PlaceRow(
                        task.id,
                        task.name,
                        task.cell,
                        task.session,
                        worker.pid,
                        node.now - (task.started or task.dispatched),
                        bool(worker.blocked),
                        question.places.get(task.id),
                    )
                )
        page = Page(live=[(node.config.node, rows)])
        node.send(question.peer, Reply(question.request, "", msgspec.msgpack.encode(page)))

    def _running(self, worker: Worker) -> list[Task]:
        """What a worker runs: the first of what it has, or all of an actor that runs calls side by side."""
        if not worker.pending:
            return []
        actor = self.node.actors.actors.get(worker.actor) if worker.actor else None
        return list(worker.pending)[:SHOWN] if actor is not None and not actor.serial else [worker.pending[0]]

    # -- why

    def why(self, task_id: bytes) -> Page:
        """What a task that has not ended waits for: no row, or one `WaitRow`."""
        node = self.node
        task = node.tasks.tasks.get(task_id)
        return Page(live=[(node.config.node, [] if task is None else [self._waits(task)])])

    def _waits(self, task: Task) -> WaitRow:
        node = self.node
        ledger = node.scheduler.ledger
        row = WaitRow(task.id, task.name, "", total=dict(ledger.total), free=dict(ledger.free))
        if task.state == WAITING:
            row.reason, row.objects = "INPUTS", self._absent(task.inputs())
        elif task.kind.is_call and (task.state != RUNNING or self._behind(task)):
            self._at_actor(task, row)
        elif task.state == RUNNING:
            if self._behind(task):
                row.reason, row.tasks = (
                    "BEHIND",
                    self._named(list(task.worker.pending)[:1] if task.worker else []),
                )
                return row
            waits = [wait for wait in node.values.waits.values() if wait.task == task.id]
            row.reason = "BLOCKED" if waits else "RUNNING"
            row.objects = [each for wait in waits for each in self._absent(wait.objects)]
        elif task.state == READY:
            self._in_line(task, row)
        return row

    def _in_line(self, task: Task, row: WaitRow) -> None:
        node = self.node
        row.needs = dict(task.shape.resources) if task.shape is not None else dict(task.kind.spec.resources)
        ledger = node.scheduler.ledger
        if any(task in waiting for waiting in node.values.fetching.values()):
            row.reason, row.objects = "MEMORY", task.inputs()
        elif not ledger.feasible(row.needs):
            row.reason = "INFEASIBLE"
        elif not ledger.fits(row.needs):
            row.reason = "RESOURCES"
        else:
            row.reason = "STARTING"
        short = [name for name in row.needs if ledger.free.get(name, 0) < row.needs[name]]
        for worker in node.pool.workers.values():
            if worker.held and worker.pending and any(worker.held.get(name) for name in short):
                row.tasks += self._named([worker.pending[0]], worker.held)
            elif worker.held and worker.actor and any(worker.held.get(name) for name in short):
                actor = node.actors.actors[worker.actor]
                row.tasks += self._named([actor.creation], worker.held)
        row.tasks = row.tasks[:SHOWN]
        if task.shape is not None:
            for ahead, other in enumerate(task.shape):
                if other is task:
                    row.ahead = ahead
                    break

    def _at_actor(self, task: Task, row: WaitRow) -> None:
        actor = self.node.actors.actors.get(task.actor)
        row.reason = "ACTOR"
        if actor is None:
            return
        row.actor_state = actor.state
        running = list(actor.worker.pending) if actor.worker is not None else [actor.creation]
        row.tasks = self._named([each for each in running if each is not task][:SHOWN])
        row.ahead = next((n for n, each in enumerate(running) if each is task), len(running))

    @staticmethod
    def _behind(task: Task) -> bool:
        worker = task.worker
        return (
            worker is not None and bool(worker.pending) and worker.pending[0] is not task and not worker.actor
        )

    def _absent(self, objects: list[bytes]) -> list[bytes]:
        table = self.node.objects.objects
        return [each for each in objects if each not in table or table[each].state < INLINE]

    @staticmethod
    def _named(tasks: list[Task], held: Amounts | None = None) -> list[tuple[bytes, str, dict[str, int]]]:
        return [(task.id, task.name, dict(held or {})) for task in tasks]
