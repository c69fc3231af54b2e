"""The local scheduler: which ready task goes to which worker, when, and how far ahead (R6, protocol section 5). Pure.

A *slot* is a worker that holds the resources of one shape; it keeps them while tasks of that shape follow one another. Tasks shorter than a
millisecond are dispatched up to `PREFETCH` ahead, because a round trip costs more than they do; what has not started can be taken back:
the first task of a slot starts at once, each later one when the worker reads its byte from the token pipe, and a byte that the node reads back is a
task that will never start there. That happens when the worker blocks, when a task runs longer than `PREFETCH_PATIENCE`, when a task is cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nbray.config import PREFETCH, PREFETCH_PATIENCE
from nbray.node import pool as pools
from nbray.scheduler.queue import ReadyQueue, Shape, ShapeKey, cpu_of
from nbray.scheduler.resources import CPU, UNIT, Amounts, Ledger
from nbray.scheduler.task import READY, RUNNING, Task

if TYPE_CHECKING:
    from nbray.node.pool import Home, Worker, WorkerPool

SHORT = 0.001
"""Mean seconds under which a function's tasks are dispatched ahead."""


def home_of(shape: Shape, gpus: tuple[int, ...]) -> Home:
    """What a worker must be to run tasks of this shape."""
    return (shape.session, shape.environment, gpus, max(1, cpu_of(shape) // UNIT))


class LocalScheduler:
    """Decides; the callbacks carry out: ``send`` gives a task to a worker, ``adopt`` gives a spare worker its home, ``fetch`` starts to bring missing
    inputs and says whether all are there, ``revoke`` asks for the tokens of a worker's unstarted tasks back.
    """

    def __init__(
        self,
        ledger: Ledger,
        pool: WorkerPool,
        send: Callable[[Worker, Task, bool], None],
        adopt: Callable[[Worker, Home], None],
        fetch: Callable[[Task], bool],
        revoke: Callable[[Worker], None],
    ) -> None:
        self.ledger = ledger
        self.pool = pool
        self.queue = ReadyQueue()
        self._send = send
        self._adopt = adopt
        self._fetch = fetch
        self._revoke = revoke
        self.paused = False
        """Whether nothing more is started while something runs: memory is scarce."""
        self.slots: dict[int, Worker] = {}
        """Workers that hold resources for tasks, by number."""
        self.ahead: dict[int, Worker] = {}
        """Workers with dispatched tasks that have not started."""

    # -- tasks

    def shape(self, session: str, environment: bytes, resources: Amounts) -> Shape:
        """The shape of tasks with these needs; it knows whether this node could ever satisfy them."""
        shape = self.queue.shape(session, environment, resources)
        if not shape.size:
            shape.feasible = self.ledger.feasible(resources)
        return shape

    def ready(self, task: Task, now: float, *, front: bool = False) -> None:
        """All inputs are there: the task waits for resources."""
        task.state = READY
        task.ready = now
        shape = task.shape
        assert shape is not None
        shape.push(task, front=front)

    def hurry(self, task: Task, priority: int) -> None:
        """A blocked worker waits for this task: to the front, with at least the waiter's priority."""
        shape = task.shape
        if task.state == READY and shape is not None and shape.remove(task):
            task.priority = max(task.priority, priority)
            shape.push(task, front=True)

    def drop(self, task: Task) -> bool:
        """Take a queued task out of the queue."""
        return task.shape is not None and task.shape.remove(task)

    # -- dispatch

    def dispatch(self, now: float) -> None:
        """Give ready tasks to workers until resources, workers or tasks run out."""
        if self.paused and any(not worker.blocked for worker in self.slots.values()):
            self.pool.settle()
            return
        queue = self.queue
        skipped: set[ShapeKey] = set()
        while True:
            shape = queue.choose(self.ledger.fits, skipped)
            if shape is None:
                break
            if not self._start(shape, now):
                skipped.add(shape.key)
        self.pool.settle()

    def _start(self, shape: Shape, now: float) -> bool:
        """Open a slot with the first task of ``shape``; False when there is no worker for it yet."""
        gpus = self.ledger.acquire(shape.resources)
        home = home_of(shape, gpus)
        worker = self.pool.take(home)
        if worker is None:
            self.ledger.release(shape.resources, gpus)
            return False
        while shape.size:
            task = shape.pop()
            if (not task.submit.deps and not task.submit.args_object) or self._fetch(task):
                break
        else:
            self.ledger.release(shape.resources, gpus)
            if worker.home is None:
                self._adopt(worker, home)
            self.pool.rest(worker, now)
            return True
        if worker.home is None:
            self._adopt(worker, home)
        worker.state = pools.BUSY
        worker.shape = shape
        worker.held = shape.resources
        worker.gpus = gpus
        self.slots[worker.number] = worker
        self.queue.holds(shape.session, cpu_of(shape))
        worker.since = now
        self._give(worker, task, now, True)
        if shape.size:
            self.prefetch(worker, now)
        return True

    def _give(self, worker: Worker, task: Task, now: float, started: bool) -> None:
        task.state = RUNNING
        task.dispatched = now
        task.worker = worker
        worker.run += 1
        task.run = worker.run
        task.held = worker.held
        task.gpus = worker.gpus
        worker.pending.append(task)
        self._send(worker, task, started)

    def prefetch(self, worker: Worker, now: float) -> None:
        """Dispatch more tasks of the slot's shape ahead, if they are short and nobody else would wait because of it."""
        shape = worker.shape
        pending = worker.pending
        if shape is None or not shape.size or len(pending) > PREFETCH // 2 or worker.blocked or shape.gpu:
            return
        if self.queue.others_wait(shape) or self.ledger.owed:
            return
        if pending and not pending[0].kind.ahead:
            return  # The worker may be no worker for tasks any more when this one is over.
        depth = min(PREFETCH, 1 + shape.size // max(1, len(self.slots)))
        while len(pending) < depth and shape.size:
            task = shape.pop()
            mean = task.kind.seconds
            if not 0 <= mean < SHORT or not task.kind.ahead or task.submit.deps or task.submit.args_object:
                shape.push(task, front=True)
                break
            self._give(worker, task, now, False)
            worker.tokens.append(task.run & 0xFF)
        if len(pending) > 1:
            self.ahead[worker.number] = worker

    # -- facts about workers

    def finished(self, worker: Worker, now: float) -> None:
        """The first of the worker's pending tasks, already removed from them, is over."""
        worker.since = now
        pending = worker.pending
        if len(pending) <= PREFETCH // 2:
            if len(pending) <= 1:
                self.ahead.pop(worker.number, None)
            shape = worker.shape
            if shape is not None and shape.size:
                self.prefetch(worker, now)
        if not worker.pending:
            self.close(worker, now)

    def close(self, worker: Worker, now: float, *, rest: bool = True) -> None:
        """The slot has no more tasks: its resources are free."""
        shape = worker.shape
        if shape is None or worker.held is None:
            return
        self.ledger.release(worker.held, worker.gpus, cpu_given=worker.cpu_given)
        self.queue.holds(shape.session, -cpu_of(shape))
        worker.shape = None
        worker.held = None
        worker.gpus = ()
        worker.cpu_given = False
        worker.blocked.clear()
        self.slots.pop(worker.number, None)
        self.ahead.pop(worker.number, None)
        if rest and worker.state == pools.BUSY:
            self.pool.rest(worker, now)

    def returned(self, worker: Worker, runs: list[int], now: float) -> list[Task]:
        """These dispatched tasks did not start and will not: back to the front of the queue, in their order. Returns them."""
        wanted = set(runs)
        back = [task for task in worker.pending if task.run in wanted]
        if not back:
            return back
        kept = [task for task in worker.pending if task.run not in wanted]
        worker.pending.clear()
        worker.pending.extend(kept)
        for task in reversed(back):
            task.worker = None
            task.held = None
            if not task.cancelled:
                ready = task.ready
                self.ready(task, now, front=True)
                task.ready = ready
        if len(kept) <= 1:
            self.ahead.pop(worker.number, None)
        if not kept:
            self.close(worker, now)
        return back

    def blocked(self, worker: Worker, task: bytes) -> None:
        """A task of this worker waits in ``get``: its CPU may go to others until it resumes."""
        worker.blocked[task] = worker.blocked.get(task, 0) + 1
        if worker.held is not None and not worker.cpu_given:
            worker.cpu_given = True
            self.ledger.give_cpu(worker.held)
            if worker.shape is not None:
                self.queue.holds(worker.shape.session, -worker.held.get(CPU, 0))

    def unblocked(self, worker: Worker, task: bytes) -> None:
        count = worker.blocked.get(task, 0)
        if count > 1:
            worker.blocked[task] = count - 1
            return
        worker.blocked.pop(task, None)
        if not worker.blocked and worker.cpu_given and worker.held is not None:
            worker.cpu_given = False
            self.ledger.take_cpu(worker.held)
            if worker.shape is not None:
                self.queue.holds(worker.shape.session, worker.held.get(CPU, 0))

    def patience(self, now: float) -> None:
        """Take back what waits behind tasks that run longer than expected."""
        for worker in list(self.ahead.values()):
            if now - worker.since > PREFETCH_PATIENCE:
                self._revoke(worker)

    def check(self) -> None:
        """Assert the scheduler's rules."""
        self.ledger.check(
            [
                {name: amount for name, amount in (w.held or {}).items() if not (name == CPU and w.cpu_given)}
                for w in self.slots.values()
            ]
        )
        for worker in self.slots.values():
            assert worker.pending, f"{worker} holds resources without a task"
        for shape in self.queue.shapes.values():
            assert shape.size == sum(1 for _ in shape), f"a shape says {shape.size} tasks"
            for task in shape:
                assert task.state == READY, f"{task} is queued"
