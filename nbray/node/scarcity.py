"""The machine's memory is nearly used up: what is done before the kernel would do something. Pure; part of the node's machine.

First the store gives memory back. Then the newest task that matters is ended, one that may be tried again if there is one; an actor only when no task
runs. Its worker is asked what its largest variables are, and has a moment to answer (``nbray.worker.largest``): the error names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbray.node import pool as pools

if TYPE_CHECKING:
    from nbray.messages import Largest
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.pool import Worker
    from nbray.scheduler.task import Task

MEMORY_HIGH = 0.94
"""Share of the memory limit below which the node tries to get when memory is scarce."""

MEMORY_CRITICAL = 0.98
"""Share of the memory limit from which on moving objects to disk takes too long."""

RELIEF_SECONDS = 1.0
"""Seconds that the end of a task is given to show in the memory that is used, unless that grows further."""

PATIENCE = 0.2
"""Seconds that a worker has for saying what its task holds, while the memory that is used grows."""

LONGEST_PATIENCE = 1.0
"""The same while it does not."""

SILENT = "Its code did not let go of the interpreter to say what its variables hold"


@dataclass(slots=True, frozen=True)
class AskLargest:
    """Send the worker the signal that asks for its task's largest variables."""

    worker: int


class _Asked:
    """The worker that is to be ended, the attempt that it runs, and what is known of the memory."""

    __slots__ = ("attempt", "limit", "since", "size", "task", "used", "worker")

    def __init__(self, worker: Worker, used: int, limit: int, size: int, now: float) -> None:
        self.worker = worker
        self.task: Task = worker.pending[0]
        self.attempt = self.task.attempt
        self.used = used
        self.limit = limit
        self.size = size
        self.since = now


class Scarcity:
    """Decides who has to give memory back."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.asked: _Asked | None = None
        self._relieved = (-RELIEF_SECONDS, 0)
        """When a task was ended for lack of memory, and how much was used then."""

    def begins(self, used: int, limit: int, sizes: Mapping[int, int]) -> None:
        """``used`` of ``limit`` bytes are in use. ``sizes``: bytes by process id; who has less than a quarter of what the largest one has would be ended
        in vain.
        """
        node = self.node
        node.scheduler.paused = True
        over = used - int(limit * MEMORY_HIGH)
        if node.objects.shrink(over) >= over and used < limit * MEMORY_CRITICAL:
            return
        if self.asked is not None:
            if used > self.asked.used and node.now - self.asked.since >= PATIENCE:
                self._end(self.asked, SILENT)
            return
        since, before = self._relieved
        if node.now - since < RELIEF_SECONDS and used <= before:
            return
        running = self._running()
        if not running:
            return
        most = max(sizes.get(w.pid, 0) for w in running)
        large = [w for w in running if sizes.get(w.pid, 0) * 4 >= most]
        newest = max(large, key=lambda w: (w.pending[0].retries != 0, w.pending[0].dispatched))
        self.asked = _Asked(newest, used, limit, sizes.get(newest.pid, 0), node.now)
        node.effects.append(AskLargest(newest.number))

    def _running(self) -> list[Worker]:
        node = self.node
        running = [
            w for w in node.scheduler.slots.values() if w.pending and not w.actor and w.state == pools.BUSY
        ]
        return running or [
            w for w in node.pool.workers.values() if w.actor and w.pending and w.state == pools.ACTOR
        ]

    def ends(self) -> None:
        """Memory is not scarce any more, and nobody has to be ended."""
        self.node.scheduler.paused = False
        self.asked = None

    def told(self, peer: Peer, message: Largest) -> None:
        """A worker says what its task holds."""
        asked = self.asked
        if asked is not None and asked.worker is peer.worker:
            shown = ", ".join(f"{name} ({kind}, {_bytes(size)})" for name, kind, size in message.variables)
            self._end(asked, f"Its largest variables: {shown}" if shown else "None of its variables is large")

    def expire(self, now: float) -> None:
        """End a worker that does not answer."""
        asked = self.asked
        if asked is not None and now - asked.since >= LONGEST_PATIENCE:
            self._end(asked, SILENT)

    def _end(self, asked: _Asked, variables: str) -> None:
        self.asked = None
        worker, task = asked.worker, asked.task
        if not worker.pending or worker.pending[0] is not task or task.attempt != asked.attempt:
            return  # It has ended by itself.
        task.oom = True
        self._relieved = self.node.now, asked.used
        size = f" and used {asked.size / 2**30:.2f} GB" if asked.size else ""
        self.node.end_worker(
            worker,
            f"was ended because the machine's memory was nearly used up ({asked.used / 2**30:.2f} of {asked.limit / 2**30:.2f} GB): {task.name} was the "
            f"newest task that may be tried again{size}. {variables}. Use fewer parallel tasks (num_cpus=2 per task), smaller pieces, or more memory",
        )


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 1 << 30 else f"{size / 2**20:.1f} MB"
