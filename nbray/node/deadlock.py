"""Circles of waits: found by asking who can still make progress.

Everything that runs and is not blocked can. A blocked task can when the makers of as much as it waits for can, or when its wait ends by itself; a task
that waits for inputs, when all their makers can; a call queued at a serial actor, when the actor's running calls can; a ready task, when its resources are
free, or when somebody who holds some of them can. What is left is waiting for itself (protocol section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbray import ids
from nbray.node import pool as pools
from nbray.scheduler.resources import CPU, readable
from nbray.scheduler.task import READY, RUNNING, WAITING, Task
from nbray.store import holders as holder_sets
from nbray.store.objects import INLINE

if TYPE_CHECKING:
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.values import Wait

Need = tuple[int, list[bytes]]
"""How many of these tasks must come to an end."""


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
    blocked: dict[bytes, list[Wait]] = {}
    for wait in waits.values():
        if wait.task:
            blocked.setdefault(wait.task, []).append(wait)
    stuck: dict[bytes, list[Need]] = {}
    for task in tasks.values():
        needs = _needs(node, task, blocked)
        if needs:
            stuck[task.id] = needs
    changed = True
    while changed:
        changed = False
        for task_id, needs in list(stuck.items()):
            if any(sum(maker not in stuck for maker in makers) >= count for count, makers in needs):
                del stuck[task_id]
                changed = True
    for (number, request), wait in sorted(waits.items(), reverse=True):
        peer = node.peers.get(number)
        if peer is not None and wait.task in stuck:
            return peer, request, _words(node, wait.task, stuck)
    return None


def _needs(node: NodeMachine, task: Task, blocked: dict[bytes, list[Wait]]) -> list[Need]:
    """What this task waits for: it can progress when one of these needs is met. Empty when it can progress by itself."""
    if task.kind.is_call and task.state != RUNNING:
        if task.missing:
            return _all(_makers(node, task.inputs()))
        actor = node.actors.actors.get(task.actor)
        if actor is None or not actor.serial:
            return []
        if actor.worker is None:
            return [] if actor.creation.terminal else [(1, [actor.creation.id])]
        return _all([running.id for running in actor.worker.pending])
    if task.state == RUNNING:
        worker = task.worker
        if (
            worker is not None
            and worker.pending
            and worker.pending[0] is not task
            and (not worker.actor or worker.blocked)
        ):
            return [(1, [worker.pending[0].id])] if task.kind.is_call else []
        found = []
        for wait in blocked.get(task.id, ()):
            makers = _makers(node, wait.objects)
            if wait.ends or not makers:
                return []
            found.append((min(wait.left, len(makers)), makers))
        return found
    if task.state == WAITING:
        return _all(_makers(node, task.inputs()))
    shape = task.shape
    if task.state != READY or shape is None or node.scheduler.ledger.fits(shape.resources):
        return []
    free = node.scheduler.ledger.free
    wanted = [name for name in shape.resources if free.get(name, 0) < shape.resources[name]]
    if wanted == [CPU]:
        return []
    holders: list[bytes] = []
    for worker in node.pool.workers.values():
        if worker.held and any(worker.held.get(name) for name in wanted if name != CPU):
            if worker.actor and not worker.pending:
                users = _users(node, worker.actor)
                if users is None:
                    return []
                holders += users
            holders += [running.id for running in worker.pending]
    return [(1, holders)] if holders else []


def _users(node: NodeMachine, actor_id: bytes) -> list[bytes] | None:
    """The tasks whose end takes the last handles of an idle actor away; None where that is somebody else's to decide."""
    actor = node.actors.actors.get(actor_id)
    entry = node.objects.objects.get(ids.return_id(actor_id, 0))
    if actor is None or actor.options.actor_name or entry is None:
        return None
    users: list[bytes] = []
    for holder in holder_sets.each(entry.holders):
        if isinstance(holder, int):
            peer = node.peers.get(holder)
            worker = peer.worker if peer is not None else None
            if worker is None or not worker.pending or worker.actor:
                return None
            users += [running.id for running in worker.pending]
        elif holder in node.tasks.tasks:
            users.append(holder)
        else:
            return None
    return users


def _all(makers: list[bytes] | None) -> list[Need]:
    return [(len(makers), makers)] if makers else []


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


def _behind(task: Task) -> bool:
    """Whether a dispatched call waits for the one that runs."""
    return task.worker is not None and task.worker.pending[0] is not task


def _words(node: NodeMachine, start: bytes, stuck: dict[bytes, list[Need]]) -> str:
    path = [start]
    while True:
        onward = next((n for _, makers in stuck[path[-1]] for n in makers if n in stuck), None)
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
        elif task.kind.is_call and (task.state != RUNNING or _behind(task)):
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
