"""What tasks print, on its way to the driver: tagged with the task of the context that writes, in order, soon, and bounded.

All of it goes to the worker's log file; what the driver gets of a flood is decided by `nbray.flow.Feed`.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.flow import Feed
from nbray.logs import LogFile
from nbray.messages import Output
from nbray.worker.display import DISPLAY

if TYPE_CHECKING:
    from nbray.engine.local import LocalEngine

SOON = 0.05
"""Seconds a text may wait before it is sent."""

FULL = 32 * 1024

KEPT = 1000
"""Threads of the user's whose tasks are remembered after these have ended."""


class Channel:
    """The one way out of a worker for what its tasks write, so that the order of a task's writes is kept across its streams."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._send: Callable[[Any], None] = engine.machine.out.append
        self._lock = threading.RLock()
        self._parts: list[str] = []
        self._stream = ""
        self._task: context.TaskContext | None = None
        self._pending: list[Output] = []
        """Texts and displays in order, before what is in ``_parts``."""
        self._updates: dict[str, Output] = {}
        """Display id -> the one of them that a later update replaces."""
        self._clear: Output | None = None
        """Goes before them."""
        self._size = 0
        self._sent = 0.0
        self._written = 0.0
        """When the line was begun that is being written."""
        self._threads: dict[int, context.TaskContext] = {}
        self.forked = False
        self.feed = Feed()
        self.log = LogFile(engine.welcome.details.get("logs", ""), str(os.getpid()))
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """The connection is the parent's: what a child of the user's code prints goes the way that other programs' output goes."""
        self.forked = True
        self._lock = threading.RLock()
        self._parts.clear()
        self._pending.clear()
        self._updates.clear()

    def task(self) -> context.TaskContext | None:
        """Whose output it is: the task of the context, else that of the worker, else (a thread that has outlived its task) the thread's last one."""
        task = context.current_task.get()
        if task is not None:
            return task
        task = self._engine.running
        thread = threading.get_ident()
        if task is None:
            return self._threads.get(thread, self._task)
        if self._threads.get(thread) is not task:
            if len(self._threads) >= KEPT:
                self._threads.clear()
            self._threads[thread] = task
        return task

    def write(self, stream: str, text: str) -> None:
        """Something printed."""
        task = self.task()
        with self._lock:
            if (task is not self._task or stream != self._stream) and self._parts:
                self._close_part()
            self._task = task
            self._stream = stream
            if not self._parts:
                self._written = time.monotonic()
            self._parts.append(text)
            self._size += len(text)
            urgent = self._urgent()
        if urgent:
            self._engine.link.flush()
        else:
            self._engine.link.arm()

    def _close_part(self) -> None:
        task = self._task
        text = "".join(self._parts)
        self._parts.clear()
        self._pending.append(
            Output(b"", self._stream, text)
            if task is None
            else Output(task.task, self._stream, text, task.name, 0, task.cell)
        )

    def _emit(self, now: float) -> None:
        interrupts = self._engine.link.interrupts
        shielded = interrupts.enter()
        try:
            if self._parts:
                self._close_part()
            self._size = 0
            if self._clear is not None:
                self._send(self._clear)
                self._clear = None
            for message in self._pending:
                if message.stream == DISPLAY:
                    # What was held back of the task goes before it.
                    for sent in self.feed.ended(now, message.task):
                        sent.end = False
                        self._send(sent)
                    self._send(message)
                    continue
                self.log.write(message.task, message.name, message.cell, message.stream, message.text)
                for sent in self.feed.text(now, message):
                    self._send(sent)
            self._pending.clear()
            self._updates.clear()
        finally:
            if shielded:
                interrupts.leave()

    @property
    def busy(self) -> bool:
        """Whether something has not been sent."""
        return bool(self._parts or self._pending or self._clear or self.feed.held)

    def flush(self) -> None:
        """Make messages of what was written; they are sent with whatever goes next."""
        if self._parts or self._pending or self._clear:
            with self._lock:
                self._emit(time.monotonic())

    def settle(self) -> bool:
        """From time to time: `flush`, and what there is room for by now. True while something is held back."""
        if not self.busy:
            return False
        with self._lock:
            now = time.monotonic()
            waits = not self._emit_lines(now)
            for message in self.feed.tick(now):
                self._send(message)
            return waits or bool(self._parts or self.feed.held)

    def ended(self, task: bytes) -> None:
        """A task has ended: all it wrote goes before its report."""
        with self._lock:
            now = time.monotonic()
            self._emit(now)
            for message in self.feed.ended(now, task):
                self._send(message)

    def waits(self, display_id: str) -> bool:
        """Whether an update of this display would replace something that has not been sent."""
        return display_id in self._updates

    def show(self, message: Output, display_id: str, *, update: bool, plain: str) -> None:
        """A display, in order with what was printed; ``plain``: what the log gets of it."""
        with self._lock:
            waiting = self._updates.get(display_id) if update else None
            if waiting is not None:
                said, shown = json.loads(waiting.text), json.loads(message.text)
                waiting.text = json.dumps({**shown, "kind": said["kind"]})
            else:
                if self._parts:
                    self._close_part()
                self._pending.append(message)
                self._size += len(message.text)
                if display_id:
                    self._updates[display_id] = message
                if plain:
                    self.log.write(message.task, message.name, message.cell, "display", plain + "\n")
            urgent = self._urgent()
        if urgent:
            self._engine.link.flush()
        else:
            self._engine.link.arm()

    def _urgent(self) -> bool:
        """Emit what has waited long enough, or is much; then it is to be sent."""
        now = time.monotonic()
        if self._size <= FULL and now - self._sent <= SOON:
            return False
        return self._emit_lines(now)

    def _emit_lines(self, now: float) -> bool:
        """Emit all but a line that is being written: that goes with its end, or a little later. False if that is all there is."""
        last = self._parts[-1] if self._parts else "\n"
        end = last.rfind("\n") + 1
        if not end and self._size <= 2 * FULL and now - self._written <= SOON:
            return False
        rest = last[end:] if end else ""
        if rest:
            self._parts[-1] = last[:end]
        self._sent = now
        self._emit(now)
        if rest:
            self._parts.append(rest)
            self._size = len(rest)
        return True

    def clear(self, message: Output) -> None:
        """Clear the cell: what was not sent need not be."""
        with self._lock:
            if self._parts:
                self._close_part()
            for other in self._pending:
                if other.stream != DISPLAY:
                    self.log.write(other.task, other.name, other.cell, other.stream, other.text)
            self._pending.clear()
            self._updates.clear()
            self._clear = message
        self._engine.link.arm()


class TaskStream(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr`` in a worker."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, name: str, fd: int, channel: Channel) -> None:
        super().__init__()
        self.name = name
        self._fd = fd
        self._channel = channel

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._fd

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            if self._channel.forked:
                os.write(self._fd, text.encode(self.encoding, self.errors))
            else:
                self._channel.write(self.name, text)
        return len(text)

    def flush(self) -> None:
        """Make messages of what was written; they are sent with whatever goes next."""
        self._channel.flush()
