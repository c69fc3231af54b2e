"""The queue of tasks that could run: by shape, by priority, fair between sessions.

A *shape* is what tasks must share to be interchangeable for a worker: session, environment and resources. Within a shape the highest priority
goes first, then the oldest. Between shapes: the highest priority; then the session that holds the least CPU; then the shape that was
served longest ago. A task whose resources are not free never blocks those of another shape.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from nbray.scheduler.resources import CPU, Amounts
from nbray.scheduler.task import Task

ShapeKey = tuple[str, bytes, tuple[tuple[str, int], ...]]


class Shape:
    """All ready tasks of one shape."""

    __slots__ = (
        "buckets",
        "environment",
        "feasible",
        "gpu",
        "key",
        "priorities",
        "resources",
        "served",
        "session",
        "size",
        "top",
    )

    def __init__(self, session: str, environment: bytes, resources: Amounts) -> None:
        self.session = session
        self.environment = environment
        self.resources = resources
        self.key: ShapeKey = (session, environment, tuple(resources.items()))
        self.buckets: dict[int, deque[Task]] = {0: deque()}
        self.priorities = [0]
        self.top = self.buckets[0]
        self.size = 0
        self.served = 0
        self.gpu = "GPU" in resources
        self.feasible = True

    def push(self, task: Task, *, front: bool = False) -> None:
        bucket = self.buckets.get(task.priority)
        if bucket is None:
            bucket = self.buckets[task.priority] = deque()
            self.priorities.append(task.priority)
            self.priorities.sort(reverse=True)
        if front:
            bucket.appendleft(task)
        else:
            bucket.append(task)
        self.size += 1

    def pop(self) -> Task:
        self.size -= 1
        for priority in self.priorities:
            bucket = self.buckets[priority]
            if bucket:
                return bucket.popleft()
        raise IndexError("pop from an empty shape")

    def priority(self) -> int:
        """Of the task that `pop` would return."""
        return next(priority for priority in self.priorities if self.buckets[priority])

    def remove(self, task: Task) -> bool:
        bucket = self.buckets.get(task.priority)
        if bucket is None or task not in bucket:
            return False
        bucket.remove(task)
        self.size -= 1
        return True

    def __iter__(self) -> Iterator[Task]:
        for priority in self.priorities:
            yield from self.buckets[priority]


class ReadyQueue:
    """All shapes of a node."""

    __slots__ = ("_clock", "_held", "shapes")

    def __init__(self) -> None:
        self.shapes: dict[ShapeKey, Shape] = {}
        self._held: dict[str, int] = {}
        self._clock = 0

    def backlog(self) -> int:
        """How many tasks are ready."""
        return sum(shape.size for shape in self.shapes.values())

    def shape(self, session: str, environment: bytes, resources: Amounts) -> Shape:
        key = (session, environment, tuple(resources.items()))
        found = self.shapes.get(key)
        if found is None:
            found = self.shapes[key] = Shape(session, environment, resources)
        return found

    def forget(self, session: str) -> None:
        """Drop the shapes of a session that has ended (they are empty)."""
        for key in [key for key, shape in self.shapes.items() if shape.session == session and not shape.size]:
            del self.shapes[key]
        self._held.pop(session, None)

    def holds(self, session: str, cpu: int) -> None:
        """Account ``cpu`` units (negative: given back) to a session, for fairness."""
        self._held[session] = self._held.get(session, 0) + cpu

    def choose(self, fits: Callable[[Amounts], bool], skipped: set[ShapeKey]) -> Shape | None:
        """The shape whose first task goes next among those with resources free, None if there is none."""
        best: Shape | None = None
        best_rank: tuple[int, int, int] | None = None
        for key, shape in self.shapes.items():
            if not shape.size or key in skipped or not fits(shape.resources):
                continue
            rank = (-shape.priority(), self._held.get(shape.session, 0), shape.served)
            if best_rank is None or rank < best_rank:
                best, best_rank = shape, rank
        if best is not None:
            self._clock += 1
            best.served = self._clock
        return best

    def others_wait(self, shape: Shape) -> bool:
        """Whether tasks of another shape are ready: then a worker must not be kept by prefetching for this one."""
        return any(other.size and other is not shape for other in self.shapes.values())


def cpu_of(shape: Shape) -> int:
    """CPU units that a task of this shape takes."""
    return shape.resources.get(CPU, 0)
