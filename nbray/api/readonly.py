"""Writing into a shared array: says whose it is and what to do instead.

Results are read-only views of memory that all processes share. Numpy raises "assignment destination is read-only" from C, where nothing can be
intercepted; so the error is explained where it surfaces (in a task's failure, a script's end, a notebook's cell) by a note that names the ref
and the way out.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from nbray import ids

_WORDS = ("read-only", "readonly", "WRITEABLE")
_MOST_ITEMS = 1000
_WAY_OUT = "nbray.get(ref, writable=True), which copies only what is written."


def explain(error: BaseException | None) -> None:
    """Add a note to ``error`` if it comes from writing into a value that `get` returned. Never raises."""
    try:
        if isinstance(error, ValueError | TypeError) and any(word in str(error) for word in _WORDS):
            found = None if _explained(error) else _culprit(error.__traceback__)
            if found is not None:
                error.add_note(_note(*found))
    except Exception:  # noqa: BLE001  (users' objects may do anything when looked at; their own error is what counts)
        return


def _explained(error: BaseException) -> bool:
    return any(_WAY_OUT in note for note in getattr(error, "__notes__", ()))


def _note(name: str, object_id: bytes) -> str:
    shown = name or "the value"
    copy = f"{name} = {name}.copy()" if name else "a copy of it (.copy())"
    if object_id:
        what = f"{shown} is a read-only view of ObjectRef({ids.short(object_id)}): its memory is shared by all processes, so nobody may write into it."
    else:
        what = f"{shown} is read-only, as all values from nbray.get are: they may be shared by all processes."
    return f"{what} Work on {copy}, or get it as {_WAY_OUT}"


def _culprit(trace: TracebackType | None) -> tuple[str, bytes] | None:
    """Name (empty: it has none) and object of the shared array nearest to where the error was raised."""
    steps: list[tuple[FrameType, int]] = []
    while trace is not None:
        steps.append((trace.tb_frame, trace.tb_lasti))
        trace = trace.tb_next
    found: bytes | None = None
    for frame, position in reversed(steps):
        own = "site-packages" not in frame.f_code.co_filename
        for name, value in _mentioned(frame, position):
            for path, each in _within(name, value):
                object_id = _object_of(each)
                if object_id is not None and found in (None, object_id):
                    if own:
                        return path, object_id
                    found = object_id
    return None if found is None else ("", found)


def _mentioned(frame: FrameType, position: int) -> Iterator[tuple[str, Any]]:
    """The names in the source of the statement that was executing, with their values."""
    code = frame.f_code
    lines = [line for line in list(code.co_positions())[position // 2][:2] if line is not None]
    text = "".join(
        linecache.getline(code.co_filename, line, frame.f_globals)
        for line in range(min(lines, default=0), max(lines, default=-1) + 1)
    )
    names = dict.fromkeys(re.findall(r"[^\W\d]\w*", text) if text else code.co_varnames + code.co_names)
    for name in names:
        for space in (frame.f_locals, frame.f_globals):
            if name in space:
                yield name, space[name]
                break


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The value and what it directly contains."""
    yield name, value
    if isinstance(value, dict):
        for key, each in list(value.items())[:_MOST_ITEMS]:
            yield f"{name}[{key!r}]", each
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value[:_MOST_ITEMS]):
            yield f"{name}[{index}]", each
    elif hasattr(value, "__dict__") and not isinstance(value, type | type(sys)):
        for key, each in list(vars(value).items())[:_MOST_ITEMS]:
            yield f"{name}.{key}", each


def _object_of(value: Any) -> bytes | None:
    """The object whose shared memory an array, column or frame shows, b"" for one that came in a message; None for everything else."""
    numpy: Any = sys.modules.get("numpy")
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series):
        columns = (
            [value] if isinstance(value, pandas.Series) else [value.iloc[:, i] for i in range(value.shape[1])]
        )
        for column in columns:
            found = _object_of(column.array.to_numpy() if column.dtype.kind in "iufbcmM" else None)
            if found is not None:
                return found
        return None
    if numpy is None or not isinstance(value, numpy.ndarray) or value.flags.writeable:
        return None
    base: Any = value
    for _ in range(64):
        release = getattr(base, "release", None)
        if isinstance(base, numpy.ndarray) and release is not None:
            object_id = release.args[0]
            return object_id if isinstance(object_id, bytes) else None
        following = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
        if following is None:
            return b"" if type(base) is bytes else None
        base = following
    return None


_watching = False


def watch() -> None:
    """Explain such errors of this process from now on: what ends a script, and what a notebook's cell raises."""
    global _watching
    if not _watching:
        _watching = True
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            explain(error)
            before(kind, error, trace)

        sys.excepthook = hook
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    if shell is None or "showtraceback" in vars(shell):
        return
    show = shell.showtraceback

    def showtraceback(exc_tuple: Any = None, *args: Any, **options: Any) -> Any:
        explain(exc_tuple[1] if exc_tuple else sys.exc_info()[1])
        return show(exc_tuple, *args, **options)

    shell.showtraceback = showtraceback
