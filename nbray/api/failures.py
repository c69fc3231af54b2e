"""Exceptions of the user's code, from the worker to the process that calls ``get``.

In the worker `describe_failure` turns an exception into a payload (``nbray.failure_codec``): how to make the exception again and its traceback with
the user's frames only. In the caller `revive` makes of it an object that is an instance of `TaskError` *and* of the user's class, so that
``except ValueError`` works; a fresh one for every ``get``, so that tracebacks do not grow.
"""

from __future__ import annotations

import os
import pickle
import traceback
import types
from collections.abc import Iterator
from typing import Any

from nbray import failure_codec
from nbray.api import readonly, reports
from nbray.api.functions import pickle_alone
from nbray.errors import ActorDiedError, TaskError
from nbray.failure_codec import UserFailure

CAUSE_LIMIT = 8 * 1024 * 1024
"""Bytes of a pickled exception above which only its texts travel."""

TEXT_LIMIT = 16 * 1024
TRACEBACK_LIMIT = 256 * 1024

_LAUNCHERS = tuple(
    os.path.dirname(os.path.abspath(os.__file__)) + os.sep + name
    for name in (
        f"asyncio{os.sep}",
        f"concurrent{os.sep}futures{os.sep}",
        "contextlib.py",
        "runpy.py",
        "threading.py",
    )
)

_HEAP_TYPE = 1 << 9

_KEPT_BY_PYTHON = frozenset({
    "__cause__",
    "__class__",
    "__context__",
    "__dict__",
    "__suppress_context__",
    "__traceback__",
    "__weakref__",
    "args",
})  # fmt: skip


class RevivedError(TaskError):
    """What ``get`` raises for an exception of the user's code; in most cases a subclass of it, `dual_class`."""

    _payload: bytes = b""
    _text: str = ""

    def __str__(self) -> str:
        return self._text

    @property
    def report(self) -> reports.Report | None:
        """Its frames, for who shows or debugs it."""
        failure = failure_codec.read(self._payload) if self._payload else None
        found = failure.report if isinstance(failure, UserFailure) else b""
        return reports.decode(found) if found else None

    def __reduce__(self) -> tuple[Any, ...]:
        notes = self.__dict__.get("__notes__")
        return failure_codec.decode_error, (self._payload,), {"__notes__": notes} if notes else None

    def __getattr__(self, name: str) -> Any:
        if self.cause is not None and not name.startswith("__"):
            return getattr(self.cause, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class RevivedActorError(RevivedError, ActorDiedError):
    """What the calls of an actor raise whose constructor raised."""


for _class, _name in ((RevivedError, "TaskError"), (RevivedActorError, "ActorDiedError")):
    _class.__name__ = _class.__qualname__ = _name
    _class.__module__ = "nbray.exceptions"


# -- in the worker


def describe_failure(
    error: BaseException, *, task: str, node: str, pid: int, attempt: int = 0, actor: str = ""
) -> bytes:
    """Payload for an exception that the user's code raised. Never raises: what cannot be pickled travels as text.

    ``task``: its name; ``node``, ``pid``, ``attempt``: where it ran, for the message. ``actor``: name of the actor class whose constructor
    this was; its calls then raise an ActorDiedError that is an instance of the user's class too.
    """
    readonly.explain(error)
    cause, why = _freeze(error)
    return failure_codec.encode_user_failure(
        UserFailure(
            cause=cause,
            why=why,
            name=type(error).__name__,
            text=_shorten(_text_of(error), TEXT_LIMIT),
            traceback=_shorten(user_traceback(error), TRACEBACK_LIMIT),
            task=task,
            node=node,
            pid=pid,
            attempt=attempt,
            actor=actor,
            report=_reported(error),
        )
    )


def _reported(error: BaseException) -> bytes:
    """The report of an exception; empty if all its frames are nbray's (what a cell raised brings its own)."""
    try:
        report = reports.describe(error)
        return reports.encode(report) if report.frames else b""
    except Exception:  # noqa: BLE001  (the error itself matters more)
        return b""


def allows_retry(
    error: BaseException, retry_exceptions: bool | tuple[type[BaseException], ...] | None
) -> bool:
    """Whether the option ``retry_exceptions`` lets a task that raised ``error`` run again."""
    if isinstance(retry_exceptions, tuple):
        return isinstance(error, retry_exceptions)
    return bool(retry_exceptions) and isinstance(error, Exception)


def user_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, with chained exceptions, without the frames of nbray and of what launched the user's code."""
    try:
        description = traceback.TracebackException.from_exception(error, compact=True)
        _keep_user_frames(description, set())
        return "".join(description.format()).rstrip("\n")
    except Exception as problem:  # noqa: BLE001  (a __str__ or source file of the user's may do anything)
        return f"{type(error).__name__} (its traceback could not be formatted: {type(problem).__name__})"


def _keep_user_frames(description: traceback.TracebackException, seen: set[int]) -> None:
    if id(description) in seen:
        return
    seen.add(id(description))
    frames = [
        frame
        for frame in description.stack or ()
        if not os.path.abspath(frame.filename).startswith(reports.OWN_FRAMES)
    ]
    first = next(
        (i for i, frame in enumerate(frames) if not os.path.abspath(frame.filename).startswith(_LAUNCHERS)),
        len(frames),
    )
    # Without a stack no "Traceback" line is printed above nothing.
    description.stack = traceback.StackSummary.from_list(frames[first:]) if frames[first:] else None  # type: ignore[assignment]
    for other in (description.__cause__, description.__context__, *(description.exceptions or ())):
        if other is not None:
            _keep_user_frames(other, seen)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:  # noqa: BLE001  (a __str__ of the user's may do anything)
        return f"<its __str__ raised {type(problem).__name__}>"


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... {len(text) - limit} characters left out ...\n{text[-limit // 2 :]}"


def _freeze(error: BaseException) -> tuple[bytes, str]:
    """A pickle from which `_thaw` makes the exception again, and why there is none."""
    try:
        if _pickles_itself(type(error)):
            frozen = pickle_alone((None, error))
        else:
            frozen = pickle_alone((type(error), *_parts(error)))
    except Exception:  # noqa: BLE001  (users' objects may raise anything when pickled)
        try:
            frozen = pickle_alone((type(error), *_picklable(*_parts(error))))
        except Exception as problem:  # noqa: BLE001
            return b"", f"it cannot be pickled: {type(problem).__name__}: {_text_of(problem)}"
    if len(frozen) > CAUSE_LIMIT:
        return b"", f"it takes {len(frozen) / 2**20:.0f} MiB pickled"
    return frozen, ""


def _pickles_itself(kind: type[BaseException]) -> bool:
    """Whether a class of the user's says how it is pickled; else its ``__init__`` need not accept its ``args``, and is not called."""
    methods = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    return any(
        isinstance(vars(base).get(method), types.FunctionType) for base in kind.__mro__ for method in methods
    )


def _members(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if name not in _KEPT_BY_PYTHON and isinstance(
                member, types.MemberDescriptorType | types.GetSetDescriptorType
            ):
                yield name


def _parts(error: BaseException) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Arguments, attributes, and what C code or ``__slots__`` keep outside of ``__dict__`` (errno, filename, ...)."""
    members = {}
    for name in _members(type(error)):
        try:
            members[name] = getattr(error, name)
        except Exception:  # noqa: BLE001  (unset)
            continue
    return error.args, dict(error.__dict__), members


def _picklable(
    args: tuple[Any, ...], attributes: dict[str, Any], members: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The same, arguments that cannot be pickled as their repr, other things that cannot left out."""
    return (
        tuple(value if _can_pickle(value) else _repr_of(value) for value in args),
        {name: value for name, value in attributes.items() if _can_pickle(value)},
        {name: value for name, value in members.items() if _can_pickle(value)},
    )


def _can_pickle(value: Any) -> bool:
    try:
        pickle_alone(value)
    except Exception:  # noqa: BLE001
        return False
    return True


def _repr_of(value: Any) -> str:
    try:
        return _shorten(repr(value), 1000)
    except Exception:  # noqa: BLE001
        return f"<{type(value).__name__}>"


# -- in the caller


def revive(failure: UserFailure, payload: bytes) -> Exception:
    """A fresh exception for a failure: an instance of `TaskError` and, where possible, of the class that the user's code raised."""
    cause, why = _thaw(failure.cause) if failure.cause else (None, failure.why)
    if isinstance(cause, TaskError) and cause.cause is not None:
        # The task failed because of another one: what the user's code raised in the first place is what callers look for.
        cause = cause.cause
    error = _instance(cause, RevivedActorError if failure.actor else RevivedError)
    error.cause = cause
    error.remote_traceback = failure.traceback
    error.task = failure.task
    error.node = failure.node
    error.pid = failure.pid
    error._payload = payload
    error._text = _message(failure, why)
    error.__suppress_context__ = True
    return error


def _message(failure: UserFailure, why: str) -> str:
    repeated = f", attempt {failure.attempt + 1}" if failure.attempt else ""
    what = f"the constructor of actor {failure.actor} raised" if failure.actor else f"task {failure.task}"
    text = f"{what} (pid {failure.pid}, node {failure.node}{repeated})\n{failure.traceback}"
    return f"{text}\n(The {failure.name} itself could not be brought here: {why})" if why else text


def _thaw(frozen: bytes) -> tuple[BaseException | None, str]:
    try:
        kind, *parts = pickle.loads(frozen)
        cause = parts[0] if kind is None else _make(kind, *parts)
    except Exception as problem:  # noqa: BLE001  (a module may be missing here, a constructor may raise anything)
        return None, f"{type(problem).__name__}: {_text_of(problem)}"
    if not isinstance(cause, BaseException):
        return None, f"its __reduce__ made a {type(cause).__name__}"
    return cause, ""


def _blank(kind: type[Any], args: tuple[Any, ...]) -> Any:
    built_in = [base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE and base is not object]
    for base in built_in[:-1]:
        try:
            return base.__new__(kind, *args)
        except TypeError:  # of several built-in bases only one has the layout of the instances
            continue
    return built_in[-1].__new__(kind, *args)


def _make(kind: type[Any], args: tuple[Any, ...], attributes: dict[str, Any], members: dict[str, Any]) -> Any:
    """An exception without a call of its ``__init__``, which need not accept ``args``."""
    error = _blank(kind, args)
    error.args = args
    error.__dict__.update(attributes)
    for name, value in members.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):  # read-only: set by __new__
            continue
    return error


def _instance(cause: BaseException | None, plain: type[RevivedError]) -> RevivedError:
    kind = None if cause is None else dual_class(type(cause), plain)
    if cause is not None and kind is not None:
        try:
            error = _make(kind, *_parts(cause))
        except Exception:  # noqa: BLE001  (a class may refuse to be made in this way: the plain TaskError remains)
            pass
        else:
            assert isinstance(error, RevivedError)
            return error
    error = plain()
    if cause is not None:
        error.args = cause.args
    return error


_dual_classes: dict[tuple[type[BaseException], type[RevivedError]], type[RevivedError] | None] = {}
_DUAL_CLASSES_LIMIT = 1000


def dual_class(
    kind: type[BaseException], plain: type[RevivedError] = RevivedError
) -> type[RevivedError] | None:
    """The class ``TaskError(ValueError)`` for ValueError, derived from ``plain`` and it; None where there can or should be none.

    There is none for what is not an Exception (SystemExit, KeyboardInterrupt) or ends iterations (StopIteration): raised in the caller they
    would do there what the task wanted to do to itself. Nor for classes that cannot be subclassed.
    """
    if not issubclass(kind, Exception) or issubclass(kind, StopIteration | StopAsyncIteration | RevivedError):
        return None
    try:
        return _dual_classes[kind, plain]
    except KeyError:
        pass
    name = f"{plain.__name__}({kind.__name__})"
    body = {
        "__module__": "nbray.exceptions",
        "__qualname__": name,
        "__doc__": f"A task raised {kind.__name__}.",
    }
    dual: type[RevivedError] | None
    try:
        dual = types.new_class(name, (plain, kind), exec_body=lambda namespace: namespace.update(body))
    except Exception:  # noqa: BLE001  (final classes, layouts that cannot be combined, __init_subclass__ that raises)
        dual = None
    if len(_dual_classes) >= _DUAL_CLASSES_LIMIT:
        _dual_classes.clear()
    _dual_classes[kind, plain] = dual
    return dual
