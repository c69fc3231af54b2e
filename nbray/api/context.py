"""Which cluster this process talks to, and which task it runs: the only process-wide state of the API.

A driver has one runtime between ``init`` and ``shutdown``; a worker has one for life. What a task knows of itself lives in a context variable,
so that threads and coroutines of an actor each see their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from typing import TYPE_CHECKING

from nbray.errors import NotInitializedError

if TYPE_CHECKING:
    from nbray.engine.base import Engine
    from nbray.ids import IdSource


class TaskContext:
    """What a running task knows of itself. ``thread``: the one that it was started in."""

    __slots__ = ("actor", "attempt", "cancelled", "cell", "gpus", "ids", "name", "restarts", "task", "thread")

    def __init__(
        self,
        task: bytes,
        name: str,
        *,
        actor: bytes = b"",
        attempt: int = 0,
        restarts: int = 0,
        gpus: tuple[int, ...] = (),
        cell: str = "",
    ) -> None:
        self.task = task
        self.name = name
        self.actor = actor
        self.attempt = attempt
        self.restarts = restarts
        self.gpus = gpus
        self.cell = cell
        self.cancelled = False
        self.ids: IdSource | None = None
        self.thread = get_ident()


class Runtime:
    """A process's connection and what the API remembers beside it."""

    def __init__(self, engine: Engine, *, namespace: str = "", worker: bool = False) -> None:
        self.engine = engine
        self.namespace = namespace
        self.worker = worker
        self.epoch = 0
        """Grows with each notebook cell: in-place changes of a function's captured values are looked for once per epoch."""
        self.pid = os.getpid()
        self.forked = False
        """Whether this is a forked child's copy of its parent's runtime."""
        self.on_close: list[Callable[[], None]] = []


current_task: ContextVar[TaskContext | None] = ContextVar("nbray_task", default=None)

on_install: list[Callable[[Runtime], None]] = []
"""Called when this process has joined a cluster: how a notebook comes to know, whoever called ``init``."""

_runtime: Runtime | None = None
_ended = False


def current() -> Runtime | None:
    """The runtime of this process, None before ``init`` and after ``shutdown``."""
    return _runtime


def install(runtime: Runtime) -> None:
    """This process has joined a cluster."""
    global _runtime, _ended
    _runtime = runtime
    _ended = False
    for hook in on_install:
        hook(runtime)


def clear() -> None:
    """This process has left its cluster."""
    global _runtime, _ended
    if _runtime is not None:
        _ended = True
    _runtime = None


def require() -> Runtime:
    """The runtime of this process; starts or joins a cluster when there has been none (as Ray's API does).

    Raises NotInitializedError after `shutdown`, and in a forked child of a connected process.
    """
    runtime = _runtime
    if runtime is None:
        if _ended:
            raise NotInitializedError(
                "nbray was shut down in this process; call nbray.init() (in a notebook: %cluster start) to go on. "
                "References and handles of before are no longer valid."
            )
        from nbray.api.session import init

        init()
        runtime = _runtime
        assert runtime is not None
    if runtime.forked:
        raise NotInitializedError(
            f"this process (pid {os.getpid()}) was forked from pid {runtime.pid}, which is connected to nbray; a forked child cannot use its "
            "parent's connection. Call nbray.init() in it, or use nbray tasks instead of forking."
        )
    return runtime


def _after_fork() -> None:
    if _runtime is not None:
        _runtime.forked = True


os.register_at_fork(after_in_child=_after_fork)
