"""A task as its node knows it, from submission to its terminal state, and the kinds of task.

States::

    WAITING --inputs there--> READY --dispatched--> RUNNING --> FINISHED | FAILED | CANCELLED
       ^                        ^                      |
       +---- (retry) -----------+----------------------+

A task dispatched ahead (prefetched) is RUNNING with ``started`` still 0 until its worker reports. Terminal tasks live on only as lineage of the
objects they made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbray.messages import ACTOR_CALL, TASK, Submit, TaskClass

if TYPE_CHECKING:
    from nbray.node.counts import CellCount
    from nbray.node.pool import Worker
    from nbray.scheduler.queue import Shape

WAITING, READY, RUNNING, FINISHED, FAILED, CANCELLED = range(6)
STATE_NAMES = ("WAITING", "READY", "RUNNING", "FINISHED", "FAILED", "CANCELLED")


class Kind:
    """A task class as the node knows it: shared by all connections that registered the same one.

    ``seconds``: exponential average of its run time (R6), -1 before the first.
    """

    __slots__ = ("ahead", "is_call", "number", "runs", "seconds", "spec")

    def __init__(self, number: int, spec: TaskClass) -> None:
        self.number = number
        self.spec = spec
        self.seconds = -1.0
        self.runs = 0
        self.is_call = spec.kind == ACTOR_CALL
        self.ahead = spec.kind == TASK and not spec.max_calls
        """Whether tasks of this kind may be dispatched ahead."""

    def learn(self, seconds: float) -> None:
        mean = self.seconds
        self.seconds = seconds if mean < 0 else mean + 0.1 * (seconds - mean)


class Task:
    """One task, or one call of an actor's method."""

    __slots__ = (
        "actor", "attempt", "cancelled", "cell", "children", "count", "dispatched", "gpus", "held", "id", "kind", "missing", "oom", "owner", "priority",
        "ready", "retries", "run", "session", "shape", "started", "state", "submit", "submitted", "worker", "world",
    )  # fmt: skip

    def __init__(
        self, submit: Submit, kind: Kind, owner: int, session: str, world: bytes, cell: str, now: float
    ) -> None:
        self.id = submit.task
        self.submit = submit
        self.kind = kind
        self.owner = owner
        self.session = session
        self.world = world
        self.cell = cell
        self.state = WAITING
        self.attempt = 0
        self.retries = kind.spec.max_retries
        self.priority = kind.spec.priority
        self.missing = 0
        self.submitted = now
        self.ready = now
        self.dispatched = 0.0
        self.started = 0.0
        self.run = 0
        self.worker: Worker | None = None
        self.shape: Shape | None = None
        self.held: dict[str, int] | None = None
        self.gpus: tuple[int, ...] = ()
        self.children: dict[bytes, None] | None = None
        self.count: CellCount | None = None
        """Where its cell's tasks are counted."""
        self.cancelled = False
        self.oom = False
        self.actor: bytes = b""

    def inputs(self) -> list[bytes]:
        """The objects that must be in memory before it can run."""
        deps, args_object = self.submit.deps, self.submit.args_object
        if args_object:
            return [*deps, args_object] if deps else [args_object]
        return deps or []

    @property
    def terminal(self) -> bool:
        return self.state >= FINISHED

    @property
    def name(self) -> str:
        return self.kind.spec.name

    def __repr__(self) -> str:
        return f"<Task {self.name} {self.id.hex()[-8:]} {STATE_NAMES[self.state]} attempt {self.attempt}>"
