"""What tells views of the task graph what changes, while somebody looks. Pure; part of the node's machine.

A transition of a task costs a look at one attribute when nobody watches, and one entry of a dictionary per watcher when somebody does; rows are made and
sent when the watcher asks, which it does about ten times per second. A task that changes three times between two questions is told once.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from nbray.events import TaskEvent
from nbray.messages import Reply
from nbray.scheduler.task import Task

if TYPE_CHECKING:
    from nbray.messages import Query
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer

PATIENCE = 30.0
"""Seconds without a question after which a watcher is forgotten."""

MOST = 4_000
"""Rows of one answer: some 10 ms of the node's time."""

_encode = msgspec.msgpack.Encoder().encode


class WatchRequest(msgspec.Struct):
    """The argument of ``engine.query("watch", ...)``. ``token``: chosen by the watcher; its first question begins the watch, with ``end`` the last one ends it.

    ``cell``: only tasks of this cell of the asking session; all when empty.
    """

    token: str
    cell: str = ""
    end: bool = False


class WatchAnswer(msgspec.Struct):
    """``rows``: an encoded list of `TaskEvent`, of tasks that are new or have changed, each as its latest state; ``more``: there are more, ask again at once.
    ``now``: the node's clock.
    """

    rows: bytes
    more: bool
    now: float


class _Watcher:
    __slots__ = ("asked", "cell", "changed", "session")

    def __init__(self, session: str, cell: str, now: float) -> None:
        self.session = session
        self.cell = cell
        self.asked = now
        self.changed: dict[bytes, Task | TaskEvent] = {}


class Watches:
    """All watchers. ``watchers`` is empty when nobody looks: that is what the rest of the node asks."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.watchers: dict[tuple[int, str], _Watcher] = {}

    def changed(self, task: Task) -> None:
        """A task is new, or in another state."""
        for watcher in self.watchers.values():
            watcher.changed[task.id] = task

    def ended(self, task: Task, event: TaskEvent) -> None:
        """An attempt is over; what its worker has before it now runs."""
        worker = task.worker
        following = worker.pending[0] if worker is not None and worker.pending else None
        for watcher in self.watchers.values():
            watcher.changed[event.task] = event
            if following is not None and following is not task:
                watcher.changed[following.id] = following

    def ask(self, peer: Peer, message: Query) -> None:
        """Answer a watcher."""
        node = self.node
        wanted = msgspec.msgpack.decode(message.argument, type=WatchRequest)
        key = (peer.number, wanted.token)
        watcher = self.watchers.get(key)
        if watcher is None and not wanted.end:
            watcher = self.watchers[key] = _Watcher(peer.session, wanted.cell, node.now)
            watcher.changed.update(node.tasks.tasks)
        if watcher is None:
            answer = WatchAnswer(_encode([]), False, node.now)
        else:
            watcher.asked = node.now
            answer = self._answer(watcher)
            if wanted.end:
                del self.watchers[key]
        node.send(peer, Reply(message.request, "", _encode(answer)))

    def _answer(self, watcher: _Watcher) -> WatchAnswer:
        node, changed = self.node, watcher.changed
        rows: list[TaskEvent] = []
        # From the front: parents were there before their children.
        taken = list(islice(changed.items(), MOST))
        if len(taken) == len(changed):
            watcher.changed = {}
        else:
            for task_id, _ in taken:
                del changed[task_id]
        for _, item in taken:
            if watcher.cell and (item.cell != watcher.cell or item.session != watcher.session):
                continue
            rows.append(item if isinstance(item, TaskEvent) else node._task_row(item))
        return WatchAnswer(_encode(rows), bool(watcher.changed), node.now)

    def expire(self, now: float) -> None:
        """Forget those who do not ask any more."""
        gone = [
            key
            for key, watcher in self.watchers.items()
            if watcher.asked + PATIENCE < now or key[0] not in self.node.peers
        ]
        for key in gone:
            del self.watchers[key]
