"""References to objects and to streams of objects, as users hold them.

A ref is a name for a value that the cluster owns. It is counted per process: the last ref of an object that goes away in a process makes that
process drop the object (protocol section 2). Finalizers only append to a deque; nothing is sent from them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nbray import ids
from nbray.store import serialization

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbray.engine.base import Engine

T = TypeVar("T")


class ObjectRef(Generic[T]):
    """A reference to a value in the cluster, there now or later. Awaitable; ``.future()`` gives a `concurrent.futures.Future`."""

    __slots__ = ("__weakref__", "_counted", "_engine", "_id")

    def __init__(self, object_id: bytes, engine: Engine, counted: bool) -> None:
        self._id = object_id
        self._engine = engine
        self._counted = counted

    def __del__(self) -> None:
        if self._counted:
            self._engine.dropped(self._id)

    def hex(self) -> str:
        """The full id."""
        return self._id.hex()

    def binary(self) -> bytes:
        return self._id

    def task_id(self) -> bytes:
        """Id of the task, call or put that made the object."""
        return ids.task_of(self._id)

    def future(self) -> Future[T]:
        """A future of the value; cancelling it does not cancel the task."""
        return self._engine.future(self)

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        return asyncio.wrap_future(self.future()).__await__()

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._id == self._id

    def __repr__(self) -> str:
        return f"ObjectRef({ids.short(self._id)})"

    def __reduce__(self) -> Any:
        return serialization.reduce_ref(self)

    def __copy__(self) -> ObjectRef[T]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectRef[T]:
        return self


class ObjectRefGenerator(Generic[T]):
    """The items of a generator task, as refs, in order, as they are made. Iterate it, also with ``async for``; works in ``wait``.

    An exception in the middle of the stream is one more ref whose ``get`` raises; then the stream ends.
    """

    def __init__(self, task_id: bytes, engine: Engine) -> None:
        self._task = task_id
        self._engine = engine
        self._taken = 0
        self._ended = False

    def __del__(self) -> None:
        if not self._ended:
            self._engine.dropped(self._task)

    def __iter__(self) -> Iterator[ObjectRef[T]]:
        return self

    def __next__(self) -> ObjectRef[T]:
        ref = self._next(None)
        if ref is None:
            raise StopIteration
        return ref

    def _next(self, timeout: float | None) -> ObjectRef[T] | None:
        if self._ended:
            return None
        ref = self._engine.next_item(self, timeout)
        if ref is None:
            self._ended = True
        else:
            self._taken += 1
        return ref

    def __aiter__(self) -> AsyncIterator[ObjectRef[T]]:
        return self

    async def __anext__(self) -> ObjectRef[T]:
        import asyncio

        ref = await asyncio.to_thread(self._next, None)
        if ref is None:
            raise StopAsyncIteration
        return ref

    def task_id(self) -> bytes:
        return self._task

    def completed(self) -> bool:
        """Whether the last item has been taken."""
        return self._ended

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({ids.short(self._task)}, {self._taken} taken{', ended' if self._ended else ''})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "an ObjectRefGenerator cannot be sent to another process: its items are taken by the process that called the task. "
            "Send the refs that it yields instead, for instance list(generator)."
        )
