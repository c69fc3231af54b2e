"""The largest variables of what runs here, for the error of a task that is ended because memory runs out.

Asked by a signal (SIGWINCH: without a handler it is ignored, and a worker has no window), answered by the thread beside the user's code. Names, types and
sizes only: no value is printed, and none of the user's code is called. Containers count with what lies directly in them, objects with their attributes.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the functions behind ``signal``: those make enums, which costs each worker memory pages
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from nbray.api.reports import OWN_FRAMES
from nbray.messages import Largest

if TYPE_CHECKING:
    from nbray.transport.link import Link
    from nbray.worker.executor import Executor

ASK = int(signal.SIGWINCH)
SHOWN = 5
SMALLEST = 100_000
"""Bytes below which a variable is not worth a word."""
SECONDS = 0.1
"""What is found within this time is told."""

_VARIABLES = 5_000
"""Variables of a scope, and attributes of an object, that are looked at."""
_SAMPLE = 1_000
"""Elements of a container that are measured; the others count as much on average."""
_EXECUTOR = os.path.join(OWN_FRAMES, "worker", "executor.py")
_NOT_DATA = (ModuleType, type, FunctionType, MethodType, BuiltinFunctionType)
_PLAIN = frozenset({bytes, bytearray, str, int, float, complex, bool, memoryview, range, type(None)})
_CONTAINERS = (list, tuple, set, frozenset, deque)
_ARRAYS = frozenset({"numpy", "pyarrow", "torch", "cupy", "jax", "jaxlib"})


def answer_asks(executor: Executor, link: Link) -> None:
    """From now on the signal is answered. Called in the main thread."""

    def answer() -> None:
        found: list[tuple[str, str, int]] = []
        try:
            found = largest(executor)
        except Exception:  # noqa: BLE001  (the task is ended all the same, and this thread must go on)
            pass
        link.out.append(Largest(found))

    link.on_wake[ASK] = answer
    _signal.signal(ASK, lambda *_: None)
    # A system call of the user's goes on as if nothing had been.
    signal.siginterrupt(ASK, False)


def largest(executor: Executor) -> list[tuple[str, str, int]]:
    """(name, type, bytes) of the largest variables of all that runs in this process, the largest first."""
    deadline = time.monotonic() + SECONDS
    sizes: dict[int, tuple[str, str, int]] = {}
    for name, value in _variables(_frames(executor)):
        if time.monotonic() > deadline:
            break
        if id(value) not in sizes:
            size = size_of(value)
            if size >= SMALLEST:
                sizes[id(value)] = (name, type(value).__name__, size)
    return sorted(sizes.values(), key=lambda each: -each[2])[:SHOWN]


def _frames(executor: Executor) -> Iterator[FrameType]:
    """The frames of the user's code, outermost first for each thread or coroutine."""
    stacks = sys._current_frames()
    threads = []
    if executor.engine.running is not None:
        threads.append(executor.engine.running.thread)
    for context, coroutine in list(executor.running.values()):
        frame = getattr(coroutine.get_coro(), "cr_frame", None) if coroutine is not None else None
        if coroutine is None:
            threads.append(context.thread)
        elif frame is not None:
            yield from _outermost_first(frame, getattr(coroutine.get_coro(), "cr_await", None))
    for thread in threads:
        frames = []
        frame = stacks.get(thread)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        # What lies outside of the executor is the interpreter's way to it.
        inside = next((at for at, each in enumerate(frames) if each.f_code.co_filename == _EXECUTOR), 0)
        yield from (frame for frame in reversed(frames[:inside]) if _is_users(frame))


def _outermost_first(frame: FrameType | None, awaits: Any) -> Iterator[FrameType]:
    while frame is not None:
        if _is_users(frame):
            yield frame
        frame = getattr(awaits, "cr_frame", None) or getattr(awaits, "ag_frame", None)
        awaits = getattr(awaits, "cr_await", None) or getattr(awaits, "ag_await", None)


def _is_users(frame: FrameType) -> bool:
    return not os.path.abspath(frame.f_code.co_filename).startswith(OWN_FRAMES)


def _variables(frames: Iterable[FrameType]) -> Iterator[tuple[str, Any]]:
    """Locals first, under the name that the outermost frame has for them; then globals; then the attributes of objects among them."""
    objects: list[tuple[str, Any]] = []
    scopes: dict[int, dict[str, Any]] = {}
    outermost = True
    for frame in frames:
        inside = "" if outermost else f" in {frame.f_code.co_name}"
        outermost = False
        if frame.f_locals is not frame.f_globals:
            for name, value in islice(list(frame.f_locals.items()), _VARIABLES):
                if not isinstance(value, _NOT_DATA):
                    yield name + inside, value
                    objects.append((name, value))
        scopes[id(frame.f_globals)] = frame.f_globals
    for scope in scopes.values():
        for name, value in islice(list(scope.items()), _VARIABLES):
            if not name.startswith("__") and not isinstance(value, _NOT_DATA):
                yield name, value
                objects.append((name, value))
    for name, value in objects:
        if _is_own(value):
            for attribute, inner in islice(list(value.__dict__.items()), _VARIABLES):
                yield f"{name}.{attribute}", inner


def _is_own(value: Any) -> bool:
    """Whether it is an object of a class written in Python that is not a library's array or table."""
    kind = type(value)
    return (
        kind not in _PLAIN
        and not isinstance(value, _CONTAINERS)
        and _library(kind) not in _ARRAYS | {"pandas", "polars"}
        and type(getattr(value, "__dict__", None)) is dict
    )


def _library(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def size_of(value: Any) -> int:
    """Bytes of a value and of what lies directly in it."""
    kind = type(value)
    if kind is dict:
        return sys.getsizeof(value) + _sample(value.keys(), len(value)) + _sample(value.values(), len(value))
    if kind in _CONTAINERS:
        return sys.getsizeof(value) + _sample(value, len(value))
    return _shallow(value)


def _sample(elements: Iterable[Any], count: int) -> int:
    seen = list(islice(elements, _SAMPLE))
    return sum(map(_shallow, seen)) * count // len(seen) if seen else 0


def _shallow(value: Any) -> int:
    kind = type(value)
    if kind in _PLAIN or kind is dict or kind in _CONTAINERS:
        return value.nbytes if kind is memoryview else sys.getsizeof(value)
    library = _library(kind)
    try:
        if library in _ARRAYS or _has_array_base(kind):
            return int(getattr(value, "nbytes", 0))
        if library == "pandas":
            # Without ``deep`` it adds up what its arrays say.
            used = value.memory_usage(index=True) if hasattr(value, "memory_usage") else 0
            return int(getattr(used, "sum", lambda: used)())
        if library == "polars":
            return int(value.estimated_size()) if hasattr(value, "estimated_size") else 0
    except Exception:  # noqa: BLE001  (half-made, or not what it seems)
        return 0
    return object.__sizeof__(value)


def _has_array_base(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, numpy.ndarray)
