"""What tasks print, on its way to the driver: tagged with the task of the context that writes, in order, soon."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from nbray.api import context
from nbray.messages import Output

SOON = 0.05
"""Seconds a text may wait before it is sent."""

FULL = 32 * 1024


class TaskStream(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr`` in a worker. ``send`` appends a message; ``flush_link`` sends, ``arm`` has it done soon."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(
        self,
        name: str,
        fd: int,
        send: Callable[[Any], None],
        flush_link: Callable[[], None],
        arm: Callable[[], None],
    ) -> None:
        super().__init__()
        self.name = name
        self._fd = fd
        self._send = send
        self._flush_link = flush_link
        self._arm = arm
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._size = 0
        self._task: context.TaskContext | None = None
        self._sent = 0.0
        self._forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """The connection is the parent's: what a child of the user's code prints goes the way that other programs' output goes."""
        self._forked = True
        self._parts.clear()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._fd

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if not text:
            return 0
        if self._forked:
            os.write(self._fd, text.encode(self.encoding, self.errors))
            return len(text)
        task = context.current_task.get()
        with self._lock:
            if task is not self._task and self._parts:
                self._emit()
            self._task = task
            self._parts.append(text)
            self._size += len(text)
            now = time.monotonic()
            if self._size > FULL or now - self._sent > SOON:
                self._sent = now
                self._emit()
                urgent = True
            else:
                urgent = False
        if urgent:
            self._flush_link()
        else:
            self._arm()
        return len(text)

    def flush(self) -> None:
        """Make messages of what was written; they are sent with whatever goes next."""
        if self._parts:
            with self._lock:
                self._emit()

    def _emit(self) -> None:
        if not self._parts:
            return
        text = "".join(self._parts)
        self._parts.clear()
        self._size = 0
        task = self._task
        if task is None:
            self._send(Output(b"", self.name, text))
        else:
            self._send(Output(task.task, self.name, text, task.name, 0, task.cell))
