"""What running code can know of where it runs."""

from __future__ import annotations

from typing import Any

from nbray import ids
from nbray.api import actor, context


class RuntimeContext:
    """Where the calling code runs. Ids are hexadecimal; None where there is none (no task in a driver, no actor in a task)."""

    def __init__(self, runtime: context.Runtime) -> None:
        self._runtime = runtime

    def get_node_id(self) -> str:
        """The node that this process is connected to."""
        return str(self._runtime.engine.details()["node_id"])

    def get_job_id(self) -> str:
        """The run of the driver that this code belongs to."""
        return str(self._runtime.engine.details()["job"])

    def get_worker_id(self) -> str:
        """The process: its node and pid."""
        return f"{self.get_node_id()}-{self._runtime.pid}"

    def get_task_id(self) -> str | None:
        """The running task or method call."""
        task = context.current_task.get()
        return task.task.hex() if task is not None else None

    def get_task_name(self) -> str | None:
        """Name of the running task or method."""
        task = context.current_task.get()
        return task.name if task is not None else None

    def get_attempt(self) -> int:
        """How often the running task was tried before."""
        task = context.current_task.get()
        return task.attempt if task is not None else 0

    def get_actor_id(self) -> str | None:
        """The actor that this code runs in."""
        task = context.current_task.get()
        return task.actor.hex() if task is not None and task.actor else None

    def get_actor_name(self) -> str | None:
        """Name of the actor that this code runs in, "" if it has none."""
        own = actor.own_info()
        return own.name if own is not None else None

    @property
    def current_actor(self) -> actor.ActorHandle[Any]:
        """A weak handle to the actor that this code runs in. Raises RuntimeError outside of actors."""
        handle = actor.own_handle()
        if handle is None:
            raise RuntimeError("this code does not run in an actor")
        return handle

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether the actor that this code runs in was restarted."""
        task = context.current_task.get()
        return task is not None and bool(task.actor) and task.restarts > 0

    @property
    def namespace(self) -> str:
        """Where names of actors are looked up."""
        return self._runtime.namespace

    def is_canceled(self) -> bool:
        """Whether the running task was cancelled: methods of serial and threaded actors, which are not interrupted, look here."""
        task = context.current_task.get()
        if task is None:
            return False
        look = getattr(self._runtime.engine, "look", None)
        if look is not None and not task.cancelled:
            look()
        return task.cancelled

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Ids of the GPUs that the running task or actor was given."""
        task = context.current_task.get()
        return {"GPU": [str(gpu) for gpu in task.gpus] if task is not None else []}

    def __repr__(self) -> str:
        task = context.current_task.get()
        where = f"task {task.name} {ids.short(task.task)}" if task is not None else "driver"
        return f"<RuntimeContext {where}, node {self.get_node_id()}>"
