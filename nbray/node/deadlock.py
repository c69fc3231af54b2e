"""Circles of waits: found by asking who can still make progress.

Everything that runs and is not blocked can. A blocked task can when the makers of all it waits for can; a task that waits for inputs, likewise; a
call queued at a serial actor can when the actor's running calls can; a ready task can when its resources are free, or when somebody who holds
some of them can. What is left is waiting for itself (protocol section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbray import ids
from nbray.messages import CREATE_ACTOR
from nbray.node import pool as pools
from nbray.scheduler.resources import CPU, readable
from nbray.scheduler.task import READY, RUNNING, WAITING, Task
from nbray.store.objects import INLINE

if TYPE_CHECKING:
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer


def find_deadlock(node: NodeMachine) -> tuple[Peer, int, str] | None:
    """The blocked wait to end with an error: its connection, its request, and the circle in words. None when all can progress."""
    waits = node.values.waits
    if (
        not waits
        or node.pool.wanted
        or (any(w.state == pools.STARTING for w in node.pool.workers.values()) and not node.pool.idle_count())
    ):
        return None
    tasks = node.tasks.tasks
    blocked: dict[bytes, list[bytes]] = {}
    for wait in waits.values():
        if wait.task:
            blocked.setdefault(wait.task, []).extend(wait.objects)
    stuck: dict[bytes, list[bytes]] = {}
    for task in tasks.values():
        needs = _needs(node, task, blocked)
        if needs is not None:
            stuck[task.id] = needs
    changed = True
    while changed:
        changed = False
        for task_id, needs in list(stuck.items()):
            task = tasks[task_id]
            left = [n for n in needs if n in stuck]
            free = not left if task.state != READY or task.kind.is_call else len(left) < len(needs)
            if free:
                del stuck[task_id]
                changed = True
    for (number, request), wait in sorted(waits.items(), reverse=True):
        peer = node.peers.get(number)
        if peer is not None and wait.task in stuck:
            return peer, request, _words(node, wait.task, stuck)
    return None


def _needs(node: NodeMachine, task: Task, blocked: dict[bytes, list[bytes]]) -> list[bytes] | None:
    """Ids of the tasks that this one waits for; None when it can progress by itself. For a READY task any one of them suffices, else all are needed."""
    if task.kind.is_call and task.state != RUNNING:
        if task.missing:
            return _makers(node, task.inputs())
        actor = node.actors.actors.get(task.actor)
        if actor is None or not actor.serial:
            return None
        if actor.worker is None:
            return [actor.creation.id] if not actor.creation.terminal else None
        return [running.id for running in actor.worker.pending] or None
    if task.state == RUNNING:
        worker = task.worker
        if (
            worker is not None
            and worker.pending
            and worker.pending[0] is not task
            and (not worker.actor or worker.blocked)
        ):
            return [worker.pending[0].id] if task.kind.is_call else None
        return _makers(node, blocked[task.id]) if task.id in blocked else None
    if task.state == WAITING:
        return _makers(node, task.inputs())
    shape = task.shape
    if task.state != READY or shape is None or node.scheduler.ledger.fits(shape.resources):
        return None
    wanted = [
        name for name in shape.resources if node.scheduler.ledger.free.get(name, 0) < shape.resources[name]
    ]
    if wanted == [CPU]:
        return None
    holders: list[bytes] = []
    for worker in node.pool.workers.values():
        if worker.held and any(worker.held.get(name) for name in wanted if name != CPU):
            if worker.actor and not worker.pending:
                actor = node.actors.actors.get(worker.actor)
                return None if actor is None or actor.options.actor_name else holders
            holders += [running.id for running in worker.pending]
    return holders or None


def _makers(node: NodeMachine, objects: list[bytes]) -> list[bytes] | None:
    makers = []
    for object_id in objects:
        entry = node.objects.objects.get(object_id)
        if entry is not None and entry.state >= INLINE:
            continue
        maker = ids.task_of(object_id)
        if maker not in node.tasks.tasks:
            return None
        makers.append(maker)
    return makers or None


def _words(node: NodeMachine, start: bytes, stuck: dict[bytes, list[bytes]]) -> str:
    path = [start]
    while True:
        onward = next((n for n in stuck[path[-1]] if n in stuck), None)
        if onward is None or onward in path:
            circle = path[path.index(onward) :] if onward in path else path
            break
        path.append(onward)
    parts = []
    for task_id in circle:
        task = node.tasks.tasks[task_id]
        name = f"{task.name} ({ids.short(task_id)})"
        if task.state == READY and task.shape is not None and not task.kind.is_call:
            parts.append(f"{name} needs {readable(task.shape.resources)}, held by")
        elif (task.kind.is_call and task.state != RUNNING) or task.kind.spec.kind == CREATE_ACTOR:
            parts.append(f"{name} is queued at its actor behind")
        else:
            parts.append(f"{name} waits in get or wait for")
    first = node.tasks.tasks[circle[0]]
    return (
        "these wait for one another and could wait for ever: "
        + " ".join(parts)
        + f" {first.name} ({ids.short(circle[0])}). Return the reference instead of waiting for it inside, ask for fewer resources, or make the actor "
        "async or threaded (max_concurrency)."
    )
