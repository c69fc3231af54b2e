"""Where output of tasks goes: to the cell that started them, whatever runs meanwhile.

ipykernel attributes what is printed to the cell that runs *now*, and how far that can be steered differs between 6.31, 7.3 and 7.4. A message
sent with a saved parent arrives in its cell on all of them, from any thread (notebook facts, section 0), so this is the one way out.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from nbray.notebook.shell import DISPLAY

CELLS_KEPT = 1000
"""Cells whose output can still be placed; later output of older ones goes to the newest cell."""


class _Line:
    """Where the output of a cell stands: which task wrote last, and whether it ended its line."""

    __slots__ = ("complete", "task")

    def __init__(self) -> None:
        self.task = b""
        self.complete = True


class Router:
    """Sends text and displays into cells; outside of a kernel it prints. Safe to call from any thread."""

    def __init__(self, shell: Any, *, plain: bool = False) -> None:
        """``plain``: leave process numbers out, so that a saved notebook does not change from run to run."""
        self._kernel: Any = getattr(shell, "kernel", None)
        self._plain = plain
        self._parents: OrderedDict[str, Any] = OrderedDict()
        self._lines: dict[tuple[str, str], _Line] = {}
        self._own: dict[str, str] = {}
        self._lock = threading.Lock()
        self.latest = ""

    def remember(self, cell: str) -> None:
        """``cell`` is the one that runs now."""
        with self._lock:
            self._parents[cell] = self._kernel.get_parent("shell") if self._kernel is not None else None
            self.latest = cell
            while len(self._parents) > CELLS_KEPT:
                old, _ = self._parents.popitem(last=False)
                self._own.pop(old, None)
                for stream in ("stdout", "stderr"):
                    self._lines.pop((old, stream), None)

    def own(self, cell: str, task_name: str) -> None:
        """What the task of that name writes in that cell is the cell's own: it is not marked with the task."""
        self._own[cell] = task_name

    def write(self, cell: str, stream: str, text: str, task_name: str, pid: int, task: bytes) -> None:
        """Output of a task, as the engine hands it over. ``stream``: "stdout", "stderr", "log", or "display" (a bundle as JSON)."""
        if not text:
            return
        with self._lock:
            if stream == DISPLAY:
                self.display(cell if cell in self._parents else self.latest, json.loads(text))
                return
            channel = "stdout" if stream == "stdout" else "stderr"
            if cell not in self._parents:
                cell = self.latest
            if not (self._own.get(cell) == task_name and task_name):
                text = self._marked(cell, channel, text, task_name, pid, task)
            else:
                text = self._after(cell, channel, text, task)
            self._send_text(cell, channel, text)

    def _after(self, cell: str, channel: str, text: str, task: bytes) -> str:
        """Text of one task after that of another: what the other left of a line is ended first."""
        line = self._lines.setdefault((cell, channel), _Line())
        start = "\n" if not line.complete and line.task != task else ""
        line.task, line.complete = task, text.endswith("\n")
        return start + text

    def _marked(self, cell: str, channel: str, text: str, task_name: str, pid: int, task: bytes) -> str:
        """The text with ``(task)`` before each line."""
        line = self._lines.get((cell, channel))
        continues = line is not None and not line.complete and line.task == task
        text = self._after(cell, channel, text, task)
        mark = f"({task_name}) " if self._plain or not pid else f"({task_name}, pid {pid}) "
        body = text.removeprefix("\n") if not continues else text
        start = text[: len(text) - len(body)]
        lines = body.splitlines(keepends=True)
        first = lines[0] if continues else mark + lines[0]
        return start + first + "".join(mark + other for other in lines[1:])

    def _send_text(self, cell: str, channel: str, text: str) -> None:
        if self._kernel is None:
            target = sys.stdout if channel == "stdout" else sys.stderr
            target.write(text)
            target.flush()
            return
        if cell == self.latest:
            # What the cell itself has printed before waits in ipykernel's buffer.
            sys.stdout.flush()
            sys.stderr.flush()
        self._send(cell, "stream", {"name": channel, "text": text}, f"stream.{channel}")

    def display(self, cell: str, data: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Show a bundle of representations (``text/plain``, ``text/html``, ...) in a cell."""
        if self._kernel is None:
            sys.stdout.write(f"{data.get('text/plain', '')}\n")
            return
        content = {"data": dict(data), "metadata": dict(metadata or {}), "transient": {}}
        self._send(cell, "display_data", content, "display_data")

    def _send(self, cell: str, kind: str, content: dict[str, Any], topic: str) -> None:
        kernel = self._kernel
        parent = self._parents.get(cell)
        kernel.session.send(kernel.iopub_socket, kind, content, parent=parent, ident=topic.encode())
