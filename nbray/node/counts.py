"""What the tasks of each cell do, in numbers: the facts of a notebook's status lines. O(1) per task, and nothing per task that is kept. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from nbray.events import CellRow, FailureRow
from nbray.scheduler.task import CANCELLED, FINISHED

if TYPE_CHECKING:
    from nbray.node.machine import NodeMachine
    from nbray.scheduler.task import Task
    from nbray.store.objects import Object

CELLS = 1000
"""Cells that are remembered; more only while their tasks have not ended."""

ROWS = 20
"""Other cells with unfinished tasks that an answer tells of."""

FAILURES = 20
"""Different errors that a cell remembers."""

LARGE = 1 << 20
"""Bytes from which an input is counted once per cell, however many tasks read it."""

INPUTS = 10_000


class CellCount:
    """The tasks of one cell of one session. ``seconds``: of run time of those that have started no others, ``out``: bytes of results, ``read``: bytes of inputs."""

    __slots__ = (
        "cancelled", "cell", "failed", "failures", "finished", "first", "inputs", "last", "out", "ran", "read", "seconds", "session", "submitted",
    )  # fmt: skip

    def __init__(self, session: str, cell: str, now: float) -> None:
        self.session = session
        self.cell = cell
        self.submitted = 0
        self.finished = 0
        self.failed = 0
        self.cancelled = 0
        self.ran = 0
        self.seconds = 0.0
        self.out = 0
        self.read = 0
        self.first = now
        self.last = now
        self.inputs: dict[bytes, None] = {}
        self.failures: dict[tuple[str, str], FailureRow] = {}

    @property
    def unfinished(self) -> int:
        return max(0, self.submitted - self.finished - self.failed - self.cancelled)

    def ended(self, task: Task, state: int, finished: float, size: int, now: float) -> None:
        """A task of the cell is over."""
        if state == FINISHED:
            self.finished += 1
        elif state == CANCELLED:
            self.cancelled += 1
        else:
            self.failed += 1
        # Who starts others mostly waits for them: that is no work.
        if task.started and finished > task.started and task.children is None:
            self.ran += 1
            self.seconds += finished - task.started
        self.out += size
        self.last = now

    def reads(self, entry: Object) -> None:
        """A task of the cell is given this object."""
        if entry.size < LARGE:
            self.read += entry.size
        elif entry.id not in self.inputs and len(self.inputs) < INPUTS:
            self.inputs[entry.id] = None
            self.read += entry.size

    def failure(self, task: Task, name: str, text: str, *, ran: bool) -> None:
        """A task has failed with this error; not ``ran``: because of one that it depended on."""
        row = self.failures.get((name, text))
        if row is None:
            if len(self.failures) >= FAILURES:
                return
            row = self.failures[name, text] = FailureRow(name, text, 0, 0, task.id, task.name)
        if ran:
            row.tasks += 1
        else:
            row.dependants += 1


class Counts:
    """All cells of a node's sessions."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.cells: OrderedDict[tuple[str, str], CellCount] = OrderedDict()

    def of(self, session: str, cell: str) -> CellCount:
        """The count of a cell; made when its first task comes."""
        key = (session, cell)
        count = self.cells.get(key)
        if count is None:
            count = self.cells[key] = CellCount(session, cell, self.node.now)
            if len(self.cells) > CELLS:
                for old, other in list(self.cells.items())[: len(self.cells) - CELLS]:
                    if not other.unfinished:
                        del self.cells[old]
        return count

    def rows(self, session: str, cell: str) -> list[CellRow]:
        """The cell, if it has submitted anything, then the newest other ones of its session that have unfinished tasks."""
        running: dict[str, list[tuple[int, bytes]]] = {}
        for worker in self.node.pool.workers.values():
            if worker.pending and worker.pending[0].session == session:
                task = worker.pending[0]
                running.setdefault(task.cell, []).append((worker.pid, task.id))
        wanted = [self.cells[session, cell]] if (session, cell) in self.cells else []
        for (of, label), count in reversed(self.cells.items()):
            if len(wanted) > ROWS:
                break
            if of == session and label != cell and count.unfinished:
                wanted.append(count)
        return [
            CellRow(
                count.cell, count.submitted, count.finished, count.failed, count.cancelled, count.ran, count.seconds, count.out, count.read,
                count.first, count.last, self.node.now, running.get(count.cell, []), list(count.failures.values()),
            )
            for count in wanted
        ]  # fmt: skip
