"""A pool of actors that share out work, as in ``ray.util``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from nbray.api import verbs
from nbray.api.actor import ActorHandle
from nbray.api.refs import ObjectRef
from nbray.errors import GetTimeoutError

A = TypeVar("A")
V = TypeVar("V")


class ActorPool(Generic[A]):
    """Gives each piece of work to an idle actor: ``fn(actor, value)`` submits it and returns its ref.

    What is submitted while no actor is idle waits in the pool until a result is taken. Not to be shared between threads.
    """

    def __init__(self, actors: Iterable[ActorHandle[A]]) -> None:
        self._idle: deque[ActorHandle[A]] = deque(actors)
        self._running: dict[ObjectRef[Any], tuple[int, ActorHandle[A]]] = {}
        self._ref_of: dict[int, ObjectRef[Any]] = {}
        self._queued: deque[tuple[Callable[[Any, Any], Any], Any]] = deque()
        self._submitted = 0
        self._taken = 0

    def map(self, fn: Callable[[Any, V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Results in the order of ``values``. Raises what a call raises, at its place."""
        for value in values:
            self.submit(fn, value)
        return self._each(self.get_next)

    def map_unordered(self, fn: Callable[[Any, V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Results as they come."""
        for value in values:
            self.submit(fn, value)
        return self._each(self.get_next_unordered)

    def _each(self, take: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield take()

    def submit(self, fn: Callable[[Any, V], Any], value: V) -> None:
        """Give work to an idle actor, or keep it until one is."""
        if not self._idle:
            self._queued.append((fn, value))
            return
        actor = self._idle.popleft()
        ref = fn(actor, value)
        if not isinstance(ref, ObjectRef):
            self._idle.append(actor)
            raise TypeError(
                f"ActorPool: fn(actor, value) returned {ref!r}; expected the ref of a call, for instance lambda actor, value: actor.f.remote(value)"
            )
        self._running[ref] = (self._submitted, actor)
        self._ref_of[self._submitted] = ref
        self._submitted += 1

    def has_next(self) -> bool:
        """Whether a result is still to be taken."""
        return bool(self._running)

    def has_free(self) -> bool:
        """Whether an actor is idle and nothing waits for one."""
        return bool(self._idle) and not self._queued

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The result of the earliest work whose result was not taken.

        Raises StopIteration (nothing is left), GetTimeoutError after ``timeout`` seconds; with ``ignore_if_timedout`` the work is given up
        then, and None returned.
        """
        self._some_left()
        while self._taken not in self._ref_of:  # taken out of order
            self._taken += 1
        ref = self._ref_of[self._taken]
        if timeout is not None and not verbs.wait([ref], timeout=timeout)[0]:
            return self._late(ref, timeout, ignore_if_timedout)
        return self._take(ref)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The result of any work that is done; as `get_next` otherwise."""
        self._some_left()
        ready, _ = verbs.wait(list(self._running), timeout=timeout)
        if not ready:
            assert timeout is not None
            return self._late(next(iter(self._running)), timeout, ignore_if_timedout)
        return self._take(ready[0])

    def push(self, actor: ActorHandle[A]) -> None:
        """Add an idle actor. Raises ValueError when it is in the pool."""
        if actor in self._idle or any(actor == other for _, other in self._running.values()):
            raise ValueError(f"{actor!r} is in the pool already")
        self._put_back(actor)

    def pop_idle(self) -> ActorHandle[A] | None:
        """Take an idle actor out of the pool; None when there is none."""
        return self._idle.popleft() if self.has_free() else None

    def _some_left(self) -> None:
        if not self._running:
            raise StopIteration("no more results to take from the pool")

    def _late(self, ref: ObjectRef[Any], timeout: float, ignore: bool) -> None:
        if not ignore:
            raise GetTimeoutError(f"no result within {timeout:g} s; the call goes on, take its result later")
        self._forget(ref)

    def _take(self, ref: ObjectRef[Any]) -> Any:
        self._forget(ref)
        return verbs.get(ref)

    def _forget(self, ref: ObjectRef[Any]) -> None:
        number, actor = self._running.pop(ref)
        del self._ref_of[number]
        self._put_back(actor)

    def _put_back(self, actor: ActorHandle[A]) -> None:
        self._idle.append(actor)
        if self._queued:
            self.submit(*self._queued.popleft())
