"""Exceptions as data: the user's frames with their lines and, for debuggers, their local variables.

A report is made where the exception was raised and travels with it; the notebook shows it as if the code had run there, and ``%debug`` opens its
frames. Variables are bounded in number, size and time; what is large or cannot be pickled travels as a short text. Values of environment
variables whose names sound secret never travel.
"""

from __future__ import annotations

import io
import linecache
import os
import pickle
import reprlib
import time
import traceback
import types
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

import nbray
from nbray import config

VALUE_LIMIT = 16 * 1024
"""Bytes of one pickled variable."""

TOTAL_LIMIT = 128 * 1024
"""Bytes of all variables of one exception."""

TEXT_LIMIT = 500
SECONDS = 0.1
"""Time after which no further variable is looked at."""

VARIABLES = 200
"""Variables of one frame."""

FRAMES = 40
"""Frames that are kept at both ends of a deep stack."""

CHAIN = 10
"""Exceptions that led to one another, or members of a group, which are told of."""

OFTEN = 20
"""Exceptions from one line of which a process captures the variables: thousands of tasks that fail alike need them once."""

OWN_FRAMES = os.path.dirname(os.path.abspath(nbray.__file__)) + os.sep
_LAUNCHERS = os.path.dirname(os.path.abspath(os.__file__)) + os.sep + "asyncio" + os.sep
_UNTOLD = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_seen: dict[tuple[str, int], int] = {}


class Frame(msgspec.Struct, array_like=True):
    """One line of a traceback; ``text``: the line's source. ``values``: local variables as (name, text, pickle); one of the two is empty."""

    filename: str
    line: int
    name: str
    text: str
    values: list[tuple[str, str, bytes]] = []


class Report(msgspec.Struct, array_like=True):
    """An exception for people: its class, its final line(s), its frames, and what led to it (``link`` says how).

    ``left_out``: frames missing in the middle of a deep stack, after the first `FRAMES`. ``inner``: of the task ``where`` in which it was raised in the first place.
    """

    kind: str
    lines: list[str]
    frames: list[Frame]
    before: Report | None = None
    link: str = ""
    group: list[Report] = []
    left_out: int = 0
    inner: Report | None = None
    where: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Report).decode


def encode(report: Report) -> bytes:
    """Its bytes, for the way."""
    return _encode(report)


def decode(data: bytes) -> Report:
    """The opposite of `encode`."""
    return _decode(data)


def describe(error: BaseException, *, variables: bool = True) -> Report:
    """The exception without the frames of nbray, and of what started the user's code. Never raises because of the user's objects."""
    return _report(error, set(), _Capture(variables and config.settings().capture_locals))


def frames_of(found: types.TracebackType | None) -> list[tuple[types.FrameType, int]]:
    """The user's frames of a traceback."""
    kept = [
        (frame, line)
        for frame, line in traceback.walk_tb(found)
        if not os.path.abspath(frame.f_code.co_filename).startswith(OWN_FRAMES)
    ]
    while kept and os.path.abspath(kept[0][0].f_code.co_filename).startswith(_LAUNCHERS):
        kept.pop(0)
    return kept


def _report(error: BaseException, seen: set[int], capture: _Capture) -> Report:
    seen.add(id(error))
    stack = frames_of(error.__traceback__)
    left_out = max(0, len(stack) - 2 * FRAMES)
    if left_out:
        stack = [*stack[:FRAMES], *stack[-FRAMES:]]
    # The innermost first: what they have matters most, and what may be captured is bounded.
    frames = [_frame(frame, line, capture) for frame, line in reversed(stack)][::-1]
    inner: Report | None = (
        getattr(error, "report", None) if hasattr(type(error), "remote_traceback") else None
    )
    if inner is not None:
        where = f"task {getattr(error, 'task', '')}"
        return Report(inner.kind, inner.lines, frames, left_out=left_out, inner=inner, where=where)
    report = Report(type(error).__name__, _final_lines(error), frames, left_out=left_out)
    if len(seen) > CHAIN:
        return report
    cause, related = error.__cause__, error.__context__
    if cause is not None and id(cause) not in seen:
        report.before = _report(cause, seen, capture)
        report.link = "The above exception was the direct cause of the following exception:"
    elif related is not None and not error.__suppress_context__ and id(related) not in seen:
        report.before = _report(related, seen, capture)
        report.link = "During handling of the above exception, another exception occurred:"
    if isinstance(error, BaseExceptionGroup):
        report.group = [
            _report(each, seen, capture) for each in error.exceptions[:CHAIN] if id(each) not in seen
        ]
    return report


def _final_lines(error: BaseException) -> list[str]:
    try:
        return [line.rstrip("\n") for line in traceback.format_exception_only(error)]
    except Exception:  # noqa: BLE001  (a user's __str__ may raise anything)
        return [f"{type(error).__name__}: <its __str__ raised>"]


def _frame(frame: types.FrameType, line: int, capture: _Capture) -> Frame:
    code = frame.f_code
    linecache.lazycache(code.co_filename, frame.f_globals)
    text = linecache.getline(code.co_filename, line).strip()
    return Frame(code.co_filename, line, code.co_name, text, capture.of(frame, line))


# -- local variables


class _TooLargeError(Exception):
    pass


class _Bounded(io.RawIOBase):
    """Takes `VALUE_LIMIT` bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, chunk: Any) -> int:
        size = memoryview(chunk).nbytes
        if len(self.data) + size > VALUE_LIMIT:
            raise _TooLargeError
        self.data += chunk
        return size


class _Capture:
    """The variables of the frames of one exception."""

    def __init__(self, wanted: bool) -> None:
        self._left = TOTAL_LIMIT if wanted else 0
        self._until = time.monotonic() + SECONDS
        self._started = False
        self._secrets: dict[bytes, str] | None = None

    def of(self, frame: types.FrameType, line: int) -> list[tuple[str, str, bytes]]:
        if not self._started:
            self._started = True
            place = (frame.f_code.co_filename, line)
            _seen[place] = _seen.get(place, 0) + 1
            if _seen[place] > OFTEN:
                self._left = 0
        if self._left <= 0:
            return []
        found = []
        for name, value in list(frame.f_locals.items())[:VARIABLES]:
            if self._left <= 0 or time.monotonic() > self._until:
                break
            if isinstance(value, _UNTOLD) or (name.startswith("__") and name.endswith("__")):
                continue
            text, data = self._value(value)
            found.append((name, text, data))
            self._left -= len(text) + len(data)
        return found

    def _value(self, value: Any) -> tuple[str, bytes]:
        if isinstance(value, os._Environ):
            return "<the environment, which does not travel>", b""
        size = getattr(value, "nbytes", 0)
        try:
            if isinstance(size, int) and size > VALUE_LIMIT:
                raise _TooLargeError
            data = _pickled(value)
        except _TooLargeError:
            text = _outline(value)
        except Exception:  # noqa: BLE001  (users' objects may raise anything when pickled)
            text = _shown(value)
        else:
            secret = self._secret_in(data)
            return (
                (f"<left out: it has the value of the environment variable {secret} in it>", b"")
                if secret
                else ("", data)
            )
        secret = self._secret_in(text.encode(errors="replace"))
        return (
            f"<left out: it has the value of the environment variable {secret} in it>" if secret else text
        ), b""

    def _secret_in(self, data: bytes) -> str:
        if self._secrets is None:
            self._secrets = config.secret_values()
        return next((name for secret, name in self._secrets.items() if secret in data), "")


def _pickled(value: Any) -> bytes:
    import cloudpickle

    from nbray.api.actor import ActorHandle
    from nbray.api.refs import ObjectRef, ObjectRefGenerator

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, ObjectRef | ObjectRefGenerator | ActorHandle):
                # Nobody would count it.
                raise pickle.PicklingError
            return super().reducer_override(obj)

    target = _Bounded()
    Pickler(target, protocol=5).dump(value)
    return bytes(target.data)


def _outline(value: Any) -> str:
    """Something large, in a few words."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"<{kind} of shape {shape}, too large to be sent>"
    if type(value) in (list, tuple, dict, set, frozenset, str, bytes, bytearray):
        return f"<{kind} of length {len(value)}, too large to be sent: {reprlib.repr(value)}>"
    return f"<{kind}, too large to be sent>"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001
        text = f"<{type(value).__name__}>"
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "..."


class NotHere:
    """Stands for a variable whose value stayed where the code ran."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class Values(dict[str, Any]):
    """Captured variables; each is unpickled when somebody looks at it."""

    def __init__(self, captured: Iterable[tuple[str, str, bytes]]) -> None:
        super().__init__((name, data or NotHere(text)) for name, text, data in captured)
        self._sealed = {name for name, _, data in captured if data}

    def __getitem__(self, name: str) -> Any:
        if name in self._sealed:
            self._sealed.discard(name)
            try:
                value = pickle.loads(super().__getitem__(name))
            except Exception as error:  # noqa: BLE001  (a module may be missing here, a constructor may raise anything)
                value = NotHere(f"<it cannot be read here: {type(error).__name__}: {error}>")
            super().__setitem__(name, value)
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._sealed.discard(name)
        super().__setitem__(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (that is this method)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


# -- frames for a debugger


def traceback_of(
    report: Report, namespace: dict[str, Any], after: types.TracebackType | None = None
) -> types.TracebackType | None:
    """A traceback with a frame per frame of the report, with its variables, followed by those of the tasks inside. ``namespace``: their globals."""
    frames = list(_all_frames(report))
    found = after
    for frame in reversed(frames):
        stand_in = _stand_in(frame, namespace)
        if stand_in is not None:
            found = types.TracebackType(found, stand_in, stand_in.f_lasti, frame.line)
    return found


def _all_frames(report: Report) -> Iterator[Frame]:
    yield from report.frames
    if report.inner is not None:
        yield from _all_frames(report.inner)


class _Made(Exception):  # noqa: N818  (never seen)
    pass


def _stand_in(frame: Frame, namespace: dict[str, Any]) -> types.FrameType | None:
    """A frame object that says it is in that line of that function, with those variables."""
    source = compile("raise __nbray_made__", frame.filename, "exec")
    code = source.replace(co_name=frame.name, co_qualname=frame.name, co_firstlineno=max(1, frame.line))
    try:
        exec(code, {**namespace, "__nbray_made__": _Made}, Values(frame.values))
    except _Made as made:
        inside = made.__traceback__.tb_next if made.__traceback__ is not None else None
        return inside.tb_frame if inside is not None else None
    return None
