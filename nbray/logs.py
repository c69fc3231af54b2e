"""The whole of what tasks print, in files: each worker appends to its own, and whoever asks reads them.

A record is a line with a JSON array, started by the character RS (0x1e), and then the bytes of the text: readable by people, and unambiguous
whatever the text contains. The array: [task id (hex), name of the task, cell, stream, time (seconds of the wall clock), bytes of the text].

A file that has grown to `SEGMENT` bytes is followed by the next one. Above `TOTAL` bytes in all, the oldest file of the process that has most of
them is removed: a task that floods the logs displaces its own beginning, not what others wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SEGMENT = 8 * 1024 * 1024
TOTAL = 1024 * 1024 * 1024

MARK = b"\x1e"


class LogFile:
    """Appends records; ``writer`` names the process. A disk that is full, or a directory that is gone, silences it: printing must not fail for that."""

    def __init__(self, directory: str, writer: str, *, segment: int = SEGMENT, total: int = TOTAL) -> None:
        self._directory = directory
        self._writer = writer
        self._segment = segment
        self._total = total
        self._fd = -1
        self._size = 0
        self._number = 0
        self._heads: dict[tuple[bytes, str], bytes] = {}

    def write(self, task: bytes, name: str, cell: str, stream: str, text: str) -> None:
        """Append what a task has written."""
        data = text.encode("utf-8", "replace")
        head = self._heads.get((task, stream))
        if head is None:
            if len(self._heads) >= 64:
                self._heads.clear()
            # Without the closing bracket: time and length follow.
            head = json.dumps([task.hex(), name, cell, stream])[:-1].encode()
            self._heads[task, stream] = head
        record = b"%b%b,%.3f,%d]\n%b" % (MARK, head, time.time(), len(data), data)
        try:
            if self._fd < 0 or self._size > self._segment:
                self._next()
            os.write(self._fd, record)
        except OSError:
            return
        self._size += len(record)

    def _next(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._number += 1
            _make_room(self._directory, self._total - self._segment, self._name())
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(os.path.join(self._directory, self._name()), flags, 0o600)

    def _name(self) -> str:
        return f"{self._writer}-{self._number:05}.log"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make_room(directory: str, limit: int, keep: str) -> None:
    """Remove the oldest files of whoever has most, until no more than ``limit`` bytes are left."""
    sizes: dict[str, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat().st_size
    total = sum(sizes.values())
    by_writer: dict[str, list[str]] = {}
    for name in sorted(sizes):
        if name != keep:
            by_writer.setdefault(name.rpartition("-")[0], []).append(name)
    while total > limit and by_writer:
        writer = max(by_writer, key=lambda w: (len(by_writer[w]), w))
        name = by_writer[writer].pop(0)
        if not by_writer[writer]:
            del by_writer[writer]
        total -= sizes[name]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


@dataclass(slots=True)
class Record:
    """Something that a task wrote. ``task``: its id; ``time``: seconds of the wall clock; ``pid``: of the process that ran it."""

    task: bytes
    name: str
    cell: str
    stream: str
    time: float
    pid: int
    text: str


def read(
    directory: str,
    chosen: Callable[[bytes, str], bool],
) -> Iterator[Record]:
    """The records whose (task id, cell) are ``chosen``, file by file, each in the order of writing."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".log"))
    except FileNotFoundError:
        return
    decided: dict[bytes, tuple[bytes, str, str, bool]] = {}
    for name in names:
        pid = int("".join(filter(str.isdigit, name.partition("-")[0])) or 0)
        try:
            with open(os.path.join(directory, name), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            continue
        yield from _records(data, pid, chosen, decided)


def _records(
    data: bytes,
    pid: int,
    chosen: Callable[[bytes, str], bool],
    decided: dict[bytes, tuple[bytes, str, str, bool]],
) -> Iterator[Record]:
    at = 0
    while at < len(data) and data[at : at + 1] == MARK:
        end = data.find(b"\n", at)
        if end < 0:
            return
        rest, _, size = data[at + 1 : end - 1].rpartition(b",")
        head, _, moment = rest.rpartition(b",")
        length = int(size)
        text = data[end + 1 : end + 1 + length]
        at = end + 1 + length
        known = decided.get(head)
        if known is None:
            task_hex, task_name, cell, stream = json.loads(head + b"]")
            task = bytes.fromhex(task_hex)
            known = decided[head] = (task, task_name, cell, chosen(task, cell))
        if known[3]:
            stream = json.loads(head[head.rindex(b",") + 1 :])
            yield Record(
                known[0], known[1], known[2], stream, float(moment), pid, text.decode("utf-8", "replace")
            )


def present(directory: str) -> bool:
    """Whether anything was written there."""
    try:
        return any(name.endswith(".log") for name in os.listdir(directory))
    except FileNotFoundError:
        return False
