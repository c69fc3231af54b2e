"""What can go wrong, for people: few classes, each says what was passed or happened, what was expected, what to do next.

``nbray.exceptions`` re-exports these names. Errors of the user's own code arrive as `TaskError`, which is at the same time
an instance of the user's exception class (made by ``nbray.api.failures``).
"""

from __future__ import annotations

from typing import Any


class NbrayError(Exception):
    """Base class of every error that nbray itself raises."""


class TaskError(NbrayError):
    """A task or method raised. The object raised by ``get`` is an instance of this class and of the user's own class.

    ``cause``: the user's exception; ``remote_traceback``: text with the user's frames only; ``task``, ``node``, ``pid``:
    where it ran.
    """

    cause: BaseException | None = None
    remote_traceback: str = ""
    task: str = ""
    node: str = ""
    pid: int = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)


class SerializationError(NbrayError, TypeError):
    """A value cannot be sent to another process; names the argument or variable and the part of it that cannot."""


class TaskCancelledError(NbrayError):
    """The task was cancelled before it finished, or depends on one that was."""


class GetTimeoutError(NbrayError, TimeoutError):
    """``get`` or ``wait`` ran out of its timeout; the task goes on."""


class WorkerCrashedError(NbrayError):
    """The process that ran the task died (killed by a signal, or it left by ``os._exit``) more often than ``max_retries``."""


class OutOfMemoryError(WorkerCrashedError):
    """The machine was near its memory limit and the node ended the newest retriable task; names its size."""


class ActorError(NbrayError):
    """A method call could not be carried out because of the state of its actor."""


class ActorDiedError(ActorError):
    """The actor is dead: its constructor raised, it was killed, it exited, or its process died with no restart left."""


class ActorUnavailableError(ActorError):
    """The actor's process died while it ran this call; the actor restarts, the call is not repeated."""


class ActorAlreadyExistsError(NbrayError, ValueError):
    """An actor of that name lives in this session; use ``get_if_exists=True`` or another name."""


class PendingCallsLimitExceededError(NbrayError):
    """More than ``max_pending_calls`` calls of this handle wait for the actor."""


class ObjectLostError(NbrayError):
    """The value is gone and cannot be made again; says which and why."""


class ObjectFreedError(ObjectLostError):
    """The value was released by ``free`` or belongs to a cluster that was shut down."""


class StoreFullError(NbrayError, MemoryError):
    """The object store cannot take the value: larger than the store, or the rest is pinned; names sizes and holders."""


class DiskFullError(StoreFullError):
    """Nothing more can be moved out of memory because the disk with the spill directory is full."""


class UnschedulableError(NbrayError):
    """No node of the cluster can ever satisfy the resources that were asked for; names both."""


class DeadlockError(NbrayError):
    """Tasks or actors wait for one another in a circle; names the circle."""


class NodeDiedError(NbrayError, ConnectionError):
    """The node process that this driver or worker talks to has ended."""


class GcsUnavailableError(NbrayError, ConnectionError):
    """The head process did not come back within its time limit."""


class RuntimeEnvError(NbrayError):
    """The environment asked for in ``runtime_env`` could not be set up."""


class NotInitializedError(NbrayError, RuntimeError):
    """nbray was used after ``shutdown``, or from a forked child, where no cluster is connected."""
