"""The verbs of the API: what programs call besides ``.remote()``. Each checks its arguments and asks the engine.

As in Ray, they start or join a cluster when there is none, except those that ask about the cluster.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, overload

from nbray import ids
from nbray.api import context
from nbray.api.actor import ActorHandle
from nbray.api.refs import ObjectRef, ObjectRefGenerator
from nbray.errors import NbrayError, NotInitializedError
from nbray.messages import ActorInfo

if TYPE_CHECKING:
    from nbray.api.runtime_context import RuntimeContext

T = TypeVar("T")
G = TypeVar("G", bound=ObjectRefGenerator[Any])

_REFS = (ObjectRef, ObjectRefGenerator)


@overload
def get(refs: ObjectRef[T], *, timeout: float | None = None, writable: bool = False) -> T: ...
@overload
def get(refs: G, *, timeout: float | None = None, writable: bool = False) -> G: ...
@overload
def get(refs: list[ObjectRef[T]], *, timeout: float | None = None, writable: bool = False) -> list[T]: ...


def get(refs: Any, *, timeout: float | None = None, writable: bool = False) -> Any:
    """The value of a ref, or the values of a list of refs in its order; waits until they are there.

    ``timeout``: seconds, 0 to look only. ``writable``: arrays are private copies (copied page by page when written) instead of read-only
    views of shared memory. Raises what a task raised (also as TaskError), at once, without waiting for the rest; GetTimeoutError; ValueError
    for what is no ref. A generator's `ObjectRefGenerator` is returned unchanged.
    """
    __tracebackhide__ = True
    runtime = _of_refs(refs)
    kind = type(refs)
    if timeout is not None:
        _check_timeout("get", timeout)
    if runtime.worker and "asyncio" in sys.modules:
        _warn_if_in_event_loop()
    # Without this, each frame of nbray below would stand in the user's traceback.
    try:
        if kind is ObjectRef:
            return runtime.engine.get((refs,), timeout, writable=writable)[0]
        if kind is list:
            for ref in refs:
                if type(ref) is not ObjectRef:
                    raise ValueError(
                        f"get() takes an ObjectRef or a list of them; this list has {_shown(ref)} in it"
                    )
            return runtime.engine.get(refs, timeout, writable=writable) if refs else []
    except NbrayError as error:
        raise error.with_traceback(None)  # noqa: B904  (the chain is the error's own)
    if isinstance(refs, ObjectRefGenerator):
        return refs
    hint = "; make a list of it: get(list(refs))" if isinstance(refs, tuple | set | frozenset | dict) else ""
    raise ValueError(f"get() takes an ObjectRef or a list of them, not {_shown(refs)}{hint}")


def put(value: T) -> ObjectRef[T]:
    """Put a value into the store: always a new object. Raises TypeError for a ref, SerializationError, StoreFullError."""
    if isinstance(value, ObjectRef | ObjectRefGenerator):
        raise TypeError(
            f"put({value!r}): a ref is a name for a value in the store already. To get a ref to a ref, put it into a list: nbray.put([ref])"
        )
    return context.require().engine.put(value)


_ID = attrgetter("_id")


def wait(
    refs: list[ObjectRef[T]], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[ObjectRef[T]], list[ObjectRef[T]]]:
    """Wait until ``num_returns`` of the refs are ready: (ready, not ready), both in the order given, at most ``num_returns`` ready.

    ``timeout``: seconds, 0 to look only; after it fewer may be ready. ``fetch_local``: ready means that the value is on this node.
    An `ObjectRefGenerator` in the list is ready when its next item is. Raises TypeError (no list of refs), ValueError (a ref twice,
    ``num_returns`` or ``timeout`` out of range).
    """
    given: Any = refs
    if type(given) is not list:
        hint = "; a single ref goes in a list: wait([ref])" if isinstance(given, _REFS) else ""
        raise TypeError(f"wait() takes a list of refs, not {_shown(given)}{hint}")
    try:
        # Called in loops over thousands of refs: one pass that touches nothing but their ids.
        distinct = len(set(map(_ID, given)))
    except AttributeError:
        distinct = _distinct(given)
    if timeout is not None:
        _check_timeout("wait", timeout)
    runtime = _of_refs(given)
    if not refs:
        return [], []
    if distinct != len(refs):
        twice = next(ref for index, ref in enumerate(refs) if ref in refs[:index])
        raise ValueError(f"wait() takes each ref once; {twice!r} is in the list more than once")
    count: Any = num_returns
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"wait(num_returns={_shown(count)}): expected a whole number")
    if not 1 <= num_returns <= len(refs):
        raise ValueError(f"wait(num_returns={num_returns}): expected 1 to {len(refs)}, the number of refs")
    return runtime.engine.wait(refs, num_returns, timeout, fetch_local)


def _distinct(refs: list[Any]) -> int:
    for ref in refs:
        if not isinstance(ref, _REFS):
            raise TypeError(f"wait() takes a list of refs; this one has {_shown(ref)} in it")
    return len(set(refs))


def cancel(
    ref: ObjectRef[Any] | ObjectRefGenerator[Any], *, force: bool = False, recursive: bool = True
) -> None:
    """Cancel the task or method call that makes the ref's value; its ``get`` then raises TaskCancelledError. No effect once it has finished.

    A queued task is dropped; in a running one KeyboardInterrupt is raised, or with ``force`` its process is ended. Of actors, queued calls are
    dropped and running async ones interrupted; others see it in ``get_runtime_context().is_canceled()``. ``recursive``: also what the task
    submitted. Raises TypeError (no ref), ValueError (``force`` for an actor's call).
    """
    given: Any = ref
    if not isinstance(given, _REFS):
        hint = "; nbray.kill(handle) ends an actor" if isinstance(given, ActorHandle) else ""
        raise TypeError(
            f"cancel() takes the ref that a task or method call returned, not {_shown(given)}{hint}"
        )
    if force and len(given.task_id()) == ids.CALL_BYTES:
        raise ValueError(
            f"cancel({given!r}, force=True): it is the call of an actor's method, and ending its process would end the actor. "
            "Use force=False, or nbray.kill(handle) to end the actor."
        )
    _of_refs(given).engine.cancel(given, force, recursive)


def kill(actor: ActorHandle[Any], *, no_restart: bool = True) -> None:
    """End an actor's process at once. With ``no_restart=False`` it restarts if its ``max_restarts`` allows. Raises ValueError for what is no handle."""
    given: Any = actor
    if not isinstance(given, ActorHandle):
        hint = "; nbray.cancel(ref) cancels a task" if isinstance(given, ObjectRef) else ""
        raise ValueError(f"kill() takes an actor's handle, not {_shown(given)}{hint}")
    runtime = context.current()
    if runtime is None or runtime.engine is not given._nbray_engine:
        raise _gone(given)
    runtime.engine.kill_actor(given._nbray_id, no_restart)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """A weak handle (it does not keep the actor alive) to the actor of that name. Raises ValueError when there is none."""
    given: tuple[Any, Any] = (name, namespace)
    if not isinstance(given[0], str) or not name:
        raise ValueError(
            f"get_actor({_shown(name)}): expected the name of an actor, a string that is not empty"
        )
    if namespace is not None and not (isinstance(given[1], str) and namespace):
        raise ValueError(
            f"get_actor(namespace={_shown(namespace)}): expected a string that is not empty, or None"
        )
    runtime = context.require()
    info: ActorInfo = runtime.engine.get_actor(name, namespace or runtime.namespace)
    return ActorHandle.weak(runtime.engine, info)


def free(refs: ObjectRef[Any] | list[ObjectRef[Any]]) -> None:
    """Release values now, whoever holds refs to them; a later ``get`` raises ObjectFreedError. Raises TypeError for what is no ref."""
    listed: Any = [refs] if isinstance(refs, ObjectRef) else refs
    if not isinstance(listed, list) or not all(isinstance(ref, ObjectRef) for ref in listed):
        raise TypeError(f"free() takes an ObjectRef or a list of them, not {_shown(refs)}")
    _of_refs(listed).engine.free(listed)


def is_initialized() -> bool:
    """Whether this process is connected to a cluster."""
    return context.current() is not None


def get_runtime_context() -> RuntimeContext:
    """What the calling code can know of where it runs: node, task, actor, ..."""
    from nbray.api.runtime_context import RuntimeContext

    return RuntimeContext(context.require())


def get_gpu_ids() -> list[int]:
    """Ids of the GPUs that the running task or actor was given; empty outside of tasks."""
    context.require()
    task = context.current_task.get()
    return list(task.gpus) if task is not None else []


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, with Ray's keys: NodeID, Alive, Resources, NodeManagerHostname. Raises NotInitializedError."""
    import socket

    from nbray.state import views

    columns = views.nodes(_connected().engine.query)
    host = socket.gethostname()
    return [
        {"NodeID": node, "Alive": state == "ALIVE", "Resources": dict(resources), "NodeManagerHostname": host}
        for node, state, resources in zip(
            columns["node_id"], columns["state"], columns["resources"], strict=True
        )
    ]


def cluster_resources() -> dict[str, float]:
    """Amounts of all resources of the cluster: {"CPU": 2.0, "memory": bytes, ...}. Raises NotInitializedError."""
    return _amounts("total")


def available_resources() -> dict[str, float]:
    """Amounts that no task or actor holds now; what is used up is left out. Raises NotInitializedError."""
    return {name: amount for name, amount in _amounts("available").items() if amount}


def _amounts(which: str) -> dict[str, float]:
    from nbray.api.options import UNIT

    amounts: dict[str, int] = _connected().engine.query("resources")[which]
    return {name: units / UNIT for name, units in amounts.items()}


def _connected() -> context.Runtime:
    runtime = context.current()
    if runtime is None:
        raise NotInitializedError(
            "nbray is not connected to a cluster: call nbray.init() first (in a notebook: %cluster start)"
        )
    return runtime


def _of_refs(refs: Any) -> context.Runtime:
    """The runtime that refs are to be looked up in; a ref of a cluster that has ended is no reason to start another."""
    runtime = context.current()
    if runtime is None:
        first = refs[0] if isinstance(refs, list) and refs else refs
        if isinstance(first, _REFS):
            raise _gone(first)
    return context.require()


def _gone(what: Any) -> NotInitializedError:
    return NotInitializedError(
        f"{what!r} belongs to a cluster that this process is no longer connected to (nbray was shut down or started anew since): "
        "run the code that made it again"
    )


def _check_timeout(verb: str, timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"{verb}(timeout={_shown(timeout)}): expected seconds, or None to wait without limit")
    if not float(timeout) >= 0:
        raise ValueError(f"{verb}(timeout={timeout}): expected seconds >= 0, or None to wait without limit")


_warned_of_event_loop = False


def _warn_if_in_event_loop() -> None:
    global _warned_of_event_loop
    import asyncio

    if not _warned_of_event_loop and asyncio._get_running_loop() is not None:
        _warned_of_event_loop = True
        warnings.warn(
            "nbray.get() in an async method stops all methods of the actor until the value is there; use `await ref` instead",
            UserWarning,
            stacklevel=3,
        )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (a broken repr must not hide the error that is being explained)
        return f"a {type(value).__name__}"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


__all__: Sequence[str] = [
    "available_resources",
    "cancel",
    "cluster_resources",
    "free",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "is_initialized",
    "kill",
    "nodes",
    "put",
    "wait",
]
