"""The worker processes of a node: which exist, which are free, when to fork another. Pure.

States of a worker::

    STARTING --hello--> SPARE --adopt--> IDLE <--> BUSY --> (gone)
                                          |
                                          +--> ACTOR (for the rest of its life)

A worker serves one *home*: session, environment and GPUs. A spare one has no home yet; taking it costs one message, forking one costs milliseconds,
so a few spares are kept. Busy workers may block; how many processes exist follows the depth of nesting, bounded by ``limit``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbray.node.peer import Peer
    from nbray.scheduler.queue import Shape
    from nbray.scheduler.task import Task

STARTING, SPARE, IDLE, BUSY, ACTOR, ENDING, GONE = range(7)
STATE_NAMES = ("STARTING", "SPARE", "IDLE", "BUSY", "ACTOR", "ENDING", "GONE")

OUTDATED = "packages were installed since it was started"

Home = tuple[str, bytes, tuple[int, ...], int]
"""Session, environment, GPU ids, threads for numeric libraries."""


class Worker:
    """A worker process. ``pending``: tasks dispatched to it and not reported, in the order of their runs; the first one is running."""

    __slots__ = (
        "actor", "blocked", "calls", "cpu_given", "functions", "generation", "gpus", "held", "home", "idle_since", "kinds", "last", "number", "peer", "pending", "pid", "run",
        "shape", "since", "state", "tokens", "unread", "why", "world",
    )  # fmt: skip

    def __init__(self, number: int, generation: int = 0) -> None:
        self.number = number
        self.pid = 0
        self.state = STARTING
        self.peer: Peer | None = None
        self.home: Home | None = None
        self.pending: deque[Task] = deque()
        self.last: Task | None = None
        """The task that it has reported last."""
        self.run = 0
        self.shape: Shape | None = None
        self.held: dict[str, int] | None = None
        self.gpus: tuple[int, ...] = ()
        self.blocked: dict[bytes, int] = {}
        self.cpu_given = False
        self.calls: dict[int, int] = {}
        self.kinds: set[int] = set()
        self.functions: set[bytes] = set()
        self.world = b""
        self.actor = b""
        self.since = 0.0
        self.idle_since = 0.0
        self.tokens = bytearray()
        self.unread: set[int] = set()
        """Once it has died: the runs whose tokens it never read, so they never started."""
        self.why = ""
        self.generation = generation
        """How often packages had been installed when it was forked."""

    def __repr__(self) -> str:
        return f"<Worker {self.number} pid {self.pid} {STATE_NAMES[self.state]}>"


@dataclass(slots=True, frozen=True)
class Fork:
    """Fork a worker process that says hello with this number."""

    worker: int


@dataclass(slots=True, frozen=True)
class Kill:
    """SIGKILL the worker's process group."""

    worker: int
    pid: int


PoolEffect = Fork | Kill


class WorkerPool:
    """All workers of a node. ``spares``: how many homeless workers to keep; ``limit``: most processes at a time."""

    def __init__(self, spares: int, limit: int) -> None:
        self.workers: dict[int, Worker] = {}
        self.effects: list[PoolEffect] = []
        self.spares_wanted = spares
        self.limit = limit
        self.generation = 0
        self._numbers = 0
        self._spare: list[Worker] = []
        self._idle: dict[Home, list[Worker]] = {}
        self._starting = 0
        self.wanted = 0
        """Workers that the scheduler asked for and did not get, since the last `settle`."""

    def take(self, home: Home) -> Worker | None:
        """A worker of this home, or a spare one (then its ``home`` is None and the caller adopts it)."""
        idle = self._idle.get(home)
        if idle:
            return idle.pop()
        if self._spare:
            return self._spare.pop()
        self.wanted += 1
        return None

    def settle(self) -> None:
        """Fork what was asked for and what keeps the spares in stock."""
        missing = self.wanted + self.spares_wanted - len(self._spare) - self._starting
        self.wanted = 0
        room = self.limit - len(self.workers)
        for _ in range(min(missing, max(room, 0))):
            self._numbers += 1
            worker = self.workers[self._numbers] = Worker(self._numbers, self.generation)
            self._starting += 1
            self.effects.append(Fork(worker.number))

    def greet(self, number: int, peer: Peer, pid: int) -> Worker | None:
        """The worker has said hello; None when it was given up meanwhile."""
        worker = self.workers.get(number)
        if worker is None or worker.state != STARTING:
            return None
        self._starting -= 1
        worker.peer = peer
        worker.pid = pid
        worker.state = SPARE
        self._spare.append(worker)
        return worker

    def rest(self, worker: Worker, now: float) -> None:
        """The worker has nothing more to do for now."""
        assert worker.home is not None
        if worker.generation != self.generation:
            self.end(worker, OUTDATED)
            return
        worker.state = IDLE
        worker.idle_since = now
        self._idle.setdefault(worker.home, []).append(worker)

    def end(self, worker: Worker, why: str = "") -> None:
        """The worker is to die; nothing more is given to it."""
        if worker.state in (ENDING, GONE):
            return
        self._forget(worker)
        worker.state = ENDING
        worker.why = worker.why or why
        self.effects.append(Kill(worker.number, worker.pid))

    def gone(self, number: int) -> Worker | None:
        """The process has ended."""
        worker = self.workers.pop(number, None)
        if worker is None:
            return None
        self._forget(worker)
        worker.state = GONE
        return worker

    def _forget(self, worker: Worker) -> None:
        if worker.state == STARTING:
            self._starting -= 1
        elif worker.state == SPARE and worker in self._spare:
            self._spare.remove(worker)
        elif worker.state == IDLE and worker.home is not None:
            same = self._idle[worker.home]
            if worker in same:
                same.remove(worker)
            if not same:
                del self._idle[worker.home]

    def retire(self, now: float, keep: int, after: float) -> None:
        """End idle workers beyond ``keep`` that have been idle for ``after`` seconds."""
        idle = sorted((w for same in self._idle.values() for w in same), key=lambda w: w.idle_since)
        for worker in idle[: max(len(idle) - keep, 0)]:
            if now - worker.idle_since >= after:
                self.end(worker, "idle")

    def renew(self) -> None:
        """Packages were installed: nothing is given to workers that may have loaded what was there before. Those that run something go on."""
        self.generation += 1
        for worker in list(self.workers.values()):
            if worker.state in (STARTING, SPARE, IDLE):
                self.end(worker, OUTDATED)

    def idle_count(self) -> int:
        return sum(len(same) for same in self._idle.values())

    def dismiss(self, session: str, process: bytes = b"") -> None:
        """End the idle workers of a session that is over, or those whose environment ends with ``process``, which is."""
        for home in [home for home in self._idle if home[0] == session and home[1].endswith(process)]:
            for worker in list(self._idle[home]):
                self.end(
                    worker, "another version of its modules is used" if process else "its session has ended"
                )
