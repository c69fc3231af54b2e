"""The GCS on disk: one SQLite file in WAL mode, written by a thread of its own.

Two tables. ``rows`` holds the rows of ``nbray.gcs.tables``. ``batches`` holds the events of the nodes as they came, one row per batch (0.5 µs
per task event against 5.4 µs for a row each), bounded: the oldest are dropped. What was reported as written survives a SIGKILL of
any process; with ``synchronous=NORMAL`` a power failure may lose the last transactions, but never their order.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from nbray.gcs.tables import FUNCTION_BLOBS, SEQUENCES, Row

SCHEMA = 1
RETRY_SECONDS = 1.0

_CREATE = """
CREATE TABLE IF NOT EXISTS rows (tab TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tab, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, node TEXT NOT NULL, sequence INTEGER NOT NULL, count INTEGER NOT NULL, facts BLOB NOT NULL, tasks BLOB NOT NULL
);
"""


class StoredBatch(NamedTuple):
    """A batch as it is on disk; ``id`` grows with the order of arrival. ``events``: how many task events it has; ``blob``: these or its facts."""

    id: int
    node: str
    events: int
    blob: bytes


class Write(NamedTuple):
    """What goes to disk together. ``batch``: node, sequence, count, facts, tasks. ``token``: handed back when it is there."""

    rows: Sequence[Row]
    batch: tuple[str, int, int, bytes, bytes] | None
    token: object


class Storage:
    """The database file; each thread that uses it makes its own.

    Raises sqlite3.Error when it cannot be opened, ValueError when another version of nbray made it.
    """

    def __init__(self, path: Path, *, history_bytes: int = 1 << 30, read_only: bool = False) -> None:
        self.path = path
        self._history_bytes = history_bytes
        self._read_only = read_only
        self._written = 0
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        if self._read_only:
            db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            db.execute("PRAGMA cache_size=-512")
            return db
        db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise ValueError(
                    f"{self.path} was written by another version of nbray (schema {version}, this one has {SCHEMA}): move it away"
                )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA wal_autocheckpoint=2000")
            db.execute("PRAGMA journal_size_limit=16777216")
            db.execute("PRAGMA cache_size=-1024")
            if version == 0:
                db.executescript(f"BEGIN; {_CREATE} PRAGMA user_version={SCHEMA}; COMMIT;")
        except BaseException:
            db.close()
            raise
        return db

    def rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        """All rows that `nbray.gcs.tables.Tables` is rebuilt from."""
        return iter(self._db.execute("SELECT tab, key, value FROM rows WHERE tab <> ?", (FUNCTION_BLOBS,)))

    def row(self, table: str, key: bytes) -> bytes | None:
        """The value of one row, None if there is none."""
        found: tuple[bytes] | None = self._db.execute(
            "SELECT value FROM rows WHERE tab = ? AND key = ?", (table, key)
        ).fetchone()
        return None if found is None else found[0]

    def sequence(self, node: str) -> int:
        """The last batch of a node that is on disk."""
        value = self.row(SEQUENCES, node.encode())
        return 0 if value is None else msgspec.msgpack.decode(value, type=int)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads inside see one state of the database."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def write(self, writes: Sequence[Write]) -> None:
        """Write all of it in one transaction, or nothing: then raises sqlite3.Error, and the file is opened anew for the next attempt."""
        changed: dict[tuple[str, bytes], bytes | None] = {}
        batches = []
        for write in writes:
            for table, key, value in write.rows:
                changed[table, key] = value
            if write.batch is not None:
                batches.append(write.batch)
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            if batches:
                db.executemany(
                    "INSERT INTO batches (node, sequence, count, facts, tasks) VALUES (?, ?, ?, ?, ?)",
                    batches,
                )
            for (table, key), value in changed.items():
                if value is None:
                    db.execute("DELETE FROM rows WHERE tab = ? AND key = ?", (table, key))
                else:
                    db.execute(
                        "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                        (table, key, value),
                    )
            self._written += sum(len(b[3]) + len(b[4]) for b in batches)
            if self._written > self._history_bytes >> 4:
                self._written = 0
                self._trim()
            db.execute("COMMIT")
        except sqlite3.Error:
            db.close()
            self._db = self._open()
            raise

    def history(self, what: str, before: int) -> Iterator[StoredBatch]:
        """The batches that have any of ``what`` ("tasks" or "facts"), newest first, from the one before id ``before`` (0: the newest)."""
        column, chosen = ("tasks", "count > 0") if what == "tasks" else ("facts", "length(facts) > 0")
        where = f"WHERE {chosen} AND id < {before}" if before else f"WHERE {chosen}"
        return map(
            StoredBatch._make,
            self._db.execute(f"SELECT id, node, count, {column} FROM batches {where} ORDER BY id DESC"),
        )

    def news(self, after: int) -> Iterator[StoredBatch]:
        """The batches with task events after id ``after``, oldest first."""
        cursor = self._db.execute(
            "SELECT id, node, count, tasks FROM batches WHERE id > ? AND count > 0 ORDER BY id", (after,)
        )
        return map(StoredBatch._make, cursor)

    def sizes(self) -> tuple[int, int, int]:
        """(bytes in use, batches, task events)."""
        batches, events = self._db.execute("SELECT count(*), coalesce(sum(count), 0) FROM batches").fetchone()
        return self._used(), batches, events

    def close(self) -> None:
        """Close the file; the last one to do so leaves no journal beside it."""
        self._db.close()

    def _used(self) -> int:
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        used: int = (pages - free) * size
        return used

    def _trim(self) -> None:
        """Drop the oldest batches beyond the bound; their pages are used again, so the file stops growing."""
        excess = self._used() - self._history_bytes
        if excess <= 0:
            return
        last = 0
        for number, size in self._db.execute(
            "SELECT id, length(facts) + length(tasks) FROM batches ORDER BY id"
        ):
            last = number
            excess -= size
            if excess <= 0:
                break
        self._db.execute("DELETE FROM batches WHERE id <= ?", (last,))


class Writer:
    """The thread that writes. All that is put while it is busy goes into its next transaction.

    ``written(tokens)`` and ``trouble(text)`` are called from it: what is on disk now, and what keeps it from writing (it tries again each second;
    empty text: it could again).
    """

    def __init__(
        self, storage: Storage, written: Callable[[list[object]], None], trouble: Callable[[str], None]
    ) -> None:
        self._storage = storage
        self._written = written
        self._trouble = trouble
        self._queue: deque[Write] = deque()
        self._wake = threading.Condition()
        self._ending = False
        self._abandon = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, write: Write) -> None:
        with self._wake:
            self._queue.append(write)
            self._wake.notify()

    def end(self, patience: float) -> bool:
        """Write what is left, for at most ``patience`` seconds; whether all is on disk. Closes the database."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        self._thread.join(patience)
        if self._thread.is_alive():
            with self._wake:
                self._abandon = True
                self._wake.notify()
            self._thread.join(RETRY_SECONDS)
            return False
        return not self._queue

    def _run(self) -> None:
        troubled = False
        while True:
            with self._wake:
                while not self._queue and not self._ending:
                    self._wake.wait()
                writes = list(self._queue)
                if self._abandon or not writes:
                    self._storage.close()
                    return
            try:
                self._storage.write(writes)
            except sqlite3.Error as error:
                troubled = True
                self._trouble(f"{self._storage.path}: {error}")
                with self._wake:
                    self._wake.wait(RETRY_SECONDS)
                continue
            for _ in writes:
                self._queue.popleft()
            if troubled:
                troubled = False
                self._trouble("")
            self._written([write.token for write in writes])
