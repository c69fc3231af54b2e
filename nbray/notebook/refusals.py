"""Why a variable cannot be sent to a cell on the cluster: which part of it, what that is, and what to do instead."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Callable, Sized
from typing import Any

from nbray.errors import SerializationError
from nbray.notebook import transfer
from nbray.notebook.arguments import human
from nbray.store import culprit

_Kind = tuple[str, str]
"""What it is, and what to do."""

_LOCK = ("a lock, which guards threads of this process only", "Make one in the cell, or leave it out")
_FILE = ("an open file, which belongs to this process", "Send its path and open it in the cell")
_SOCKET = ("a network connection, which belongs to this process", "Open it in the cell")
_THREAD = ("a thread of this process", "Start one in the cell")
_PROCESS = ("a handle of another process", "Start one in the cell")
_POOL = ("a pool of workers of this process", "Use nbray.map, or make one in the cell")
_QUEUE = ("a queue between threads of this process", "Send list(...) of its items, or make one in the cell")
_LOOP = ("an event loop of this process", "Use await in the cell: it has a loop of its own")
_DATABASE = (
    "a database connection, which belongs to this process",
    "Connect in the cell, or send what was read",
)
_WIDGET = (
    "a widget, which lives in the notebook",
    "Read what you need from it (.value) in a cell before, and use that",
)
_SHELL = ("the notebook's own shell", "Use get_ipython() in the cell: it has one of its own")
_GENERATOR = (
    "a generator, which can go on in one process only",
    "Send list(...) of it, or make it in the cell",
)
_COROUTINE = ("a coroutine", "Await it first and send its result, or make it in the cell")
_MODULE = ("a module that no other process can import", "Put it into a file and import it, or make it in the cell")  # fmt: skip
_TRACEBACK = ("a part of a running program", "Send what you need of it as text (traceback.format_exc())")

_BY_TYPE: tuple[tuple[tuple[type, ...], _Kind], ...] = (
    ((types.GeneratorType, types.AsyncGeneratorType), _GENERATOR),
    ((types.CoroutineType,), _COROUTINE),
    ((types.FrameType, types.TracebackType), _TRACEBACK),
)

_BY_NAME: dict[str, _Kind] = {
    "_thread.lock": _LOCK,
    "_thread.RLock": _LOCK,
    "threading.Condition": _LOCK,
    "threading.Event": _LOCK,
    "threading.Semaphore": _LOCK,
    "threading.Barrier": _LOCK,
    "asyncio.locks.Lock": _LOCK,
    "threading.Thread": _THREAD,
    "_thread._local": ("data of the threads of this process", "Make it in the cell"),
    "socket.socket": _SOCKET,
    "ssl.SSLContext": _SOCKET,
    "http.client.HTTPConnection": _SOCKET,
    "io.IOBase": _FILE,
    "_io._IOBase": _FILE,
    "tempfile._TemporaryFileWrapper": _FILE,
    "zipfile.ZipFile": _FILE,
    "h5py._hl.base.HLObject": _FILE,
    "mmap.mmap": _FILE,
    "subprocess.Popen": _PROCESS,
    "multiprocessing.process.BaseProcess": _PROCESS,
    "concurrent.futures._base.Executor": _POOL,
    "multiprocessing.pool.Pool": _POOL,
    "concurrent.futures._base.Future": ("a result that this process waits for", "Send its result()"),
    "_asyncio.Future": ("a result that this process waits for", "Await it first and send its result"),
    "queue.Queue": _QUEUE,
    "_queue.SimpleQueue": _QUEUE,
    "asyncio.queues.Queue": _QUEUE,
    "asyncio.events.AbstractEventLoop": _LOOP,
    "ipywidgets.widgets.widget.Widget": _WIDGET,
    "IPython.core.interactiveshell.InteractiveShell": _SHELL,
    "_contextvars.ContextVar": ("a variable of this process's contexts", "Send its value"),
    "sqlalchemy.engine.base.Engine": _DATABASE,
    "sqlalchemy.orm.session.Session": _DATABASE,
}
"""By the full names of the classes that an object is an instance of."""

_DATABASES = frozenset(
    [
        "sqlite3",
        "_sqlite3",
        "psycopg",
        "psycopg2",
        "psycopg_pool",
        "asyncpg",
        "pymysql",
        "MySQLdb",
        "mysql",
        "duckdb",
        "_duckdb",
        "pyodbc",
        "oracledb",
        "cx_Oracle",
        "pymongo",
        "redis",
        "snowflake",
        "aiosqlite",
        "clickhouse_connect",
        "sqlalchemy",
        "neo4j",
        "cassandra",
        "elasticsearch",
    ]
)
"""Packages whose objects, if they cannot be pickled, are connections and what hangs on them."""


def kind_of(value: Any) -> _Kind | None:
    """What a value is and what to do, if it is of a kind that never leaves its process."""
    for kinds, found in _BY_TYPE:
        if isinstance(value, kinds):
            return found
    if isinstance(value, types.ModuleType):
        return None if transfer.is_importable_module(value) else _MODULE
    if isinstance(value, io.BytesIO | io.StringIO | type):
        return None
    for base in type(value).__mro__:
        kind = _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    return _DATABASE if type(value).__module__.partition(".")[0] in _DATABASES else None


def explain(
    error: BaseException, value: Any, name: str, needed_by: str, namespace: dict[str, Any]
) -> SerializationError:
    """The error to raise for the variable ``name``, which cannot be sent because of ``error``. ``needed_by``: the function that reads it, or ""."""
    return SerializationError(
        f"the variable {name!r}{_reader(needed_by)} ({describe(value)}) cannot be sent to the cluster: "
        f"{reason(error, value, name, namespace)}"
    )


def _reader(needed_by: str) -> str:
    return f", which {needed_by!r} reads," if needed_by else ""


def reason(error: BaseException, value: Any, name: str, namespace: dict[str, Any]) -> str:
    """What of ``value`` stays here, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError) or "recursion" in text:
        return "it is nested too deeply (a linked list, or a tree of thousands of levels). Send a flat form of it, for instance a list or an array."
    path, part, found = culprit.locate(
        value, error, lambda each: failure(each, namespace), lambda each: kind_of(each) is not None
    )
    where = f"{name}{path}" if path else "it"
    if path.startswith(" "):
        where = f"{path.strip()} of {name}"
    kind = kind_of(part)
    title = _title(type(part))
    if kind is not None:
        what, advice = kind
        return f"{where} is {what} ({title}). {advice}."
    advice = culprit.advice(part, "Make it in the cell, keep it in an actor, or leave it out (a class can do so with __getstate__).")  # fmt: skip
    return f"{where} is of type {title}, which cannot be pickled ({type(found).__name__}: {transfer.reason(found)}). {advice}"


def failure(value: Any, namespace: dict[str, Any]) -> Exception | None:
    """What packing a value raises, if it does."""
    try:
        transfer.NamespacePickler(io.BytesIO(), namespace, transfer.carried_types()).dump(value)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is why the value cannot be sent)
        return error
    return None


def describe(value: Any) -> str:
    """Type and size for people: ``dict, 3 items, 184 bytes``."""
    parts = [_title(type(value))]
    # A user's classes may raise anything.
    with contextlib.suppress(Exception):
        if isinstance(value, Sized) and not isinstance(value, str | bytes | type):
            count = len(value)
            parts.append(f"{count} item{'' if count == 1 else 's'}")
    with contextlib.suppress(Exception):
        parts.append(human(size_here(value)))
    return ", ".join(parts)


def size_here(value: Any) -> int:
    """Bytes that a value takes here, without what it contains if it cannot say."""
    count: Callable[[], int] | int | None = getattr(value, "nbytes", None)
    return count if isinstance(count, int) else sys.getsizeof(value)


def _title(kind: type) -> str:
    return (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


type_name = _title
