"""`nbray.map`: a function over many items, in batches of a size that is learned, with a bounded number of them under way.

Tiny items cost more to send than to compute. The first batches have one item; each reports how long an item took and how large its result is, and
the next ones are made to take about `TARGET_SECONDS`. Results come in the order of the items. What one item raises is that item's result only:
when a whole batch fails (its worker died, a result cannot be pickled), its items are tried again one by one.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, overload

from nbray import failure_codec
from nbray.api import context, failures, options
from nbray.api.actor import ActorClass, ActorMethod
from nbray.api.options import INFINITE
from nbray.api.refs import ObjectRef
from nbray.api.remote import RemoteFunction
from nbray.errors import SerializationError, TaskCancelledError

T = TypeVar("T")
R = TypeVar("R")

TARGET_SECONDS = 0.01
"""What a batch should take: long against the 20-100 µs that a task costs, short against what anyone waits for."""

BATCH_LIMIT = 10_000
BATCH_BYTES = 4 * 2**20
GROWTH = 8
"""A batch is at most this many times the one before, because the first items may be faster than the rest."""

BATCHES_PER_CPU = 4
ITEMS_PER_WINDOW = 1_000_000
"""Most items under way when no ``window`` is given."""


class _Batch:
    """Runs a function over the items of one batch, in the worker."""

    def __init__(self, function: Callable[..., Any], name: str, retries: int, retry_exceptions: Any) -> None:
        self.function = function
        self.__name__ = name
        self.retries = retries
        self.retry_exceptions = retry_exceptions

    @property
    def __nbray_target__(self) -> Callable[..., Any]:
        return self.function

    def __call__(self, *items: Any) -> tuple[list[Any], dict[int, bytes], float, int]:
        """Results; payloads of the errors by place (there the result is None); seconds per item; bytes of the largest of a few results."""
        function = self.function
        results: list[Any] = []
        errors: dict[int, bytes] = {}
        started = time.perf_counter()
        for place, item in enumerate(items):
            try:
                results.append(function(item))
            except Exception as error:  # noqa: BLE001  (it becomes the item's result)
                again, value = self._again(item, error)
                if again is not None:
                    errors[place] = self._payload(again)
                results.append(value)
        seconds = (time.perf_counter() - started) / len(items)
        return results, errors, seconds, max(map(_size, results[:: max(1, len(results) // 8)]))

    def _again(self, item: Any, error: Exception) -> tuple[Exception | None, Any]:
        """More attempts, as ``retry_exceptions`` gives a task: the last error, or None and the result."""
        left = self.retries
        while left and failures.allows_retry(error, self.retry_exceptions):
            left -= 1
            try:
                return None, self.function(item)
            except Exception as another:  # noqa: BLE001
                error = another
        return error, None

    def _payload(self, error: Exception) -> bytes:
        task = context.current_task.get()
        node = str(context.require().engine.details()["node_id"])
        name = task.name if task is not None else self.__name__
        return failures.describe_failure(error, task=name, node=node, pid=os.getpid())


def _size(value: Any) -> int:
    return int(getattr(value, "nbytes", 0)) or sys.getsizeof(value)


class _Sizes:
    """How many items the next batch should have."""

    def __init__(self, fixed: int | None, most: int) -> None:
        self._fixed = fixed
        self._most = max(1, min(most, BATCH_LIMIT))
        self._next = 1
        self._seconds = 0.0

    def next(self) -> int:
        return self._fixed or self._next

    def learn(self, count: int, seconds: float, size: int) -> None:
        """A batch of ``count`` items took ``seconds`` per item; a result has ``size`` bytes."""
        # The slowest of late counts most: a batch that is too long delays its whole window.
        self._seconds = max(seconds, 0.7 * self._seconds)
        wanted = int(TARGET_SECONDS / self._seconds) if self._seconds else self._most
        wanted = min(wanted, count * GROWTH, self._most, max(1, BATCH_BYTES // max(size, 1)))
        self._next = max(1, wanted)


@overload
def map_items(
    f: RemoteFunction[[T], ObjectRef[R]],
    items: Iterable[T],
    on_error: Literal["raise", "return"] = "raise",
    *,
    window: int | None = None,
    batch: int | None = None,
    **given: Any,
) -> Iterator[R]: ...
@overload
def map_items(
    f: Callable[[T], R],
    items: Iterable[T],
    on_error: Literal["raise"] = "raise",
    *,
    window: int | None = None,
    batch: int | None = None,
    **given: Any,
) -> Iterator[R]: ...
@overload
def map_items(
    f: Callable[[T], R],
    items: Iterable[T],
    on_error: Literal["return"],
    *,
    window: int | None = None,
    batch: int | None = None,
    **given: Any,
) -> Iterator[R | Exception]: ...


def map_items(
    f: Any,
    items: Iterable[Any],
    on_error: str = "raise",
    *,
    window: int | None = None,
    batch: int | None = None,
    **given: Any,
) -> Iterator[Any]:
    """``f`` of each item, computed in the cluster: an iterator over the results in the order of the items.

    ``items`` is consumed as results are, and may be infinite; an item that is a ref stands for its value. ``on_error``: "raise" raises what
    an item raised at its place and ends there, "return" yields the exception in its place. ``window``: most items under way, results not yet
    consumed included (default: some batches per CPU). ``batch``: items per task (default: learned, so that a task takes about 10 ms).
    ``given``: options of tasks (`nbray.remote`). Closing the iterator cancels what is under way.

    Raises ValueError or TypeError for wrong arguments, at once.
    """
    if on_error not in {"raise", "return"}:
        raise ValueError(f'map(on_error={on_error!r}): expected "raise" or "return"')
    for name, number in (("window", window), ("batch", batch)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"map({name}={number!r}): expected a whole number of items")
        if number is not None and number < 1:
            raise ValueError(f"map({name}={number}): expected at least one item")
    function, all_options = _function(f, given)
    if not isinstance(items, Iterable):
        raise TypeError(f"map() takes an iterable of items, not {type(items).__name__}")
    return _run(_runner(function, all_options), iter(items), on_error == "raise", window, batch)


def _function(f: Any, given: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    if isinstance(f, ActorClass | ActorMethod) or not callable(f):
        raise TypeError(
            f"map() takes a function, plain or remote, not {f!r}; to spread items over actors use nbray.util.ActorPool"
        )
    own: dict[str, Any] = {}
    function: Callable[..., Any] = f
    if isinstance(f, RemoteFunction):
        function, own = f.__nbray_target__, dict(f._options)
    what = f"map({getattr(function, '__name__', type(function).__name__)})"
    code = inspect.unwrap(function) if not isinstance(function, type) else function
    if inspect.iscoroutinefunction(code):
        raise ValueError(
            f"{what}: it is `async def`; use a plain function, with asyncio.run(...) inside if needed"
        )
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise ValueError(
            f"{what}: it is a generator function; let it return a list, or call f.remote(item) for each item and read the streams"
        )
    all_options = {**own, **options.check(options.TASK, given, what, decorator=True)}
    if all_options.pop("num_returns", 1) != 1:
        raise ValueError(f"{what}: num_returns is always 1, one result per item")
    return function, all_options


def _runner(function: Callable[..., Any], all_options: dict[str, Any]) -> RemoteFunction[..., Any]:
    retry_exceptions = all_options.pop("retry_exceptions", False)
    retries = all_options.get("max_retries", options.TASK_RETRIES)
    name = all_options.setdefault("name", getattr(function, "__name__", type(function).__name__))
    return RemoteFunction(
        _Batch(function, name, INFINITE if retries == INFINITE else retries, retry_exceptions), all_options
    )


def _run(
    runner: RemoteFunction[..., Any],
    items: Iterator[Any],
    raises: bool,
    window: int | None,
    fixed: int | None,
) -> Iterator[Any]:
    engine = context.require().engine
    cpus = max(1, engine.details()["resources"].get("CPU", options.UNIT) // options.UNIT)
    batches = BATCHES_PER_CPU * cpus
    room = window or ITEMS_PER_WINDOW
    sizes = _Sizes(fixed, max(1, room // batches))
    under_way: deque[tuple[Any, list[Any]]] = deque()
    waiting = 0
    exhausted = False
    try:
        while True:
            while not exhausted and waiting < room and (window or len(under_way) < batches):
                chunk = list(itertools.islice(items, min(sizes.next(), room - waiting)))
                if not chunk:
                    exhausted = True
                    break
                waiting += len(chunk)
                under_way.extend(_submit(runner, chunk))
            if not under_way:
                return
            submitted, chunk = under_way[0]
            try:
                if isinstance(submitted, Exception):
                    raise submitted
                results, errors, seconds, size = engine.get((submitted,), None)[0]
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the result of these items)
                if len(chunk) > 1 and not isinstance(error, TaskCancelledError):
                    under_way.popleft()
                    alone = [each for item in chunk for each in _submit(runner, [item])]
                    under_way.extendleft(reversed(alone))
                    continue
                results, errors = [error] * len(chunk), dict.fromkeys(range(len(chunk)), b"")
            else:
                sizes.learn(len(chunk), seconds, size)
            under_way.popleft()
            del submitted
            for place, result in enumerate(results):
                waiting -= 1
                if place not in errors:
                    yield result
                    continue
                failed = failure_codec.decode_error(errors[place]) if errors[place] else result
                if raises:
                    raise failed
                yield failed
    finally:
        for submitted, _ in under_way:
            if isinstance(submitted, ObjectRef):
                engine.cancel(submitted, False, True)


def _submit(runner: RemoteFunction[..., Any], chunk: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Refs and their items; an item that cannot be sent has its error instead of a ref."""
    try:
        return [(runner.remote(*chunk), chunk)]
    except SerializationError as error:
        if len(chunk) == 1:
            return [(error, chunk)]
        return [each for item in chunk for each in _submit(runner, [item])]
