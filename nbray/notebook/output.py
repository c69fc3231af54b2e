"""Where output of tasks goes: to the cell that started them, whatever runs meanwhile.

ipykernel attributes what is printed to the cell that runs *now*, and how far that can be steered differs between 6.31, 7.3 and 7.4. A message
sent with a saved parent arrives in its cell on all of them, from any thread (notebook facts, section 0), so this is the one way out. How much goes
out, and what of a flood is shown, `nbray.notebook.folding` decides.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from nbray.messages import Output
from nbray.notebook.folding import Outlet, Send, size_of

CELLS_KEPT = 1000
"""Cells whose output can still be placed; later output of older ones is in the logs only."""

PATIENCE = 0.25
"""Seconds for which a cell's end waits until its last lines are sent, where they may also come later."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

LATE_LIMIT = 20_000
"""Characters of late output that a saved notebook gets, the last ones."""


class Router:
    """Sends text and displays into cells; outside of a kernel it prints. Safe to call from any thread."""

    def __init__(self, shell: Any, *, plain: bool = False, headless: bool = False) -> None:
        """``plain``: nothing that changes from run to run, so no process numbers and nothing that is replaced later. ``headless``: whoever
        runs the cells (nbclient, papermill, nbval) takes no notice of what comes after their end, and needs no protection from floods.
        """
        self._kernel: Any = getattr(shell, "kernel", None)
        self._plain = plain
        self.headless = headless
        self._outlet = Outlet(plain=plain or self._kernel is None)
        self._parents: OrderedDict[str, Any] = OrderedDict()
        self._own: dict[str, str] = {}
        self._adopted: dict[str, str] = {}
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._publisher = getattr(shell, "display_pub", None)
        self._lock = threading.RLock()
        self._due = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._ended: set[str] = set()
        self._late: dict[str, str] = {}
        """Of cells that have ended with a place for late output: what has come."""
        self._changed: dict[str, None] = {}
        self._waiting: dict[str, tuple[str, dict[str, Any]]] = {}
        """Display id -> the cell and its newest version, where that could not be sent."""
        self.cleared: dict[str, int] = {}
        """Cells whose output was cleared by a task: how often."""
        self.sent = 0.0
        """When something was sent last (monotonic seconds)."""
        self.latest = ""

    def remember(self, cell: str) -> None:
        """``cell`` is the one that runs now."""
        with self._lock:
            self._parents[cell] = self._kernel.get_parent("shell") if self._kernel is not None else None
            self._outlet.cell(cell, cell.partition(" ")[0])
            self.latest = cell
            while len(self._parents) > CELLS_KEPT:
                old, _ = self._parents.popitem(last=False)
                self._own.pop(old, None)
                self._outlet.forget(old)
                self._ended.discard(old)
                self._late.pop(old, None)
                self._changed.pop(old, None)
                self.cleared.pop(old, None)
            # An update of an earlier output arrives only as a message of the cell that runs.
            self._send_late()

    def own(self, cell: str, task_name: str) -> None:
        """What the task of that name writes in that cell is the cell's own: it is not marked with the task."""
        self._own[cell] = task_name

    def hold(self, cell: str) -> None:
        """Keep back what the tasks of a cell say until `release`."""
        with self._lock:
            self._outlet.hold(cell, True)

    def release(self, cell: str) -> None:
        """Show what was kept back."""
        with self._lock:
            self._outlet.hold(cell, False)
        self.flush(cell)

    def adopt(self, old: str, cell: str = "") -> None:
        """Output of a cell of an earlier run of the kernel goes to this one from now on (default: the one that runs)."""
        with self._lock:
            self._adopted[old] = cell or self.latest

    # -- what tasks say

    def receive(self, message: Output) -> None:
        """Output of a task, as the engine hands it over."""
        with self._lock:
            cell = self._placed(message.cell)
            if cell is None:
                return
            now = time.monotonic()
            own = bool(message.name) and self._own.get(cell) == message.name
            if message.stream == "display":
                self._show(now, cell, message.task, json.loads(message.text))
            else:
                mark = "" if own else self._mark(message)
                self._outlet.text(
                    now, cell, message.task, mark, "stdout" if message.stream == "stdout" else "stderr", message.text,
                    skipped=message.skipped, tasks=message.tasks, end=message.end,
                )  # fmt: skip
            self._send_all(self._outlet.take(now))
            if self._outlet.due(now) is not None:
                self._wake()

    def _placed(self, cell: str) -> str | None:
        if cell in self._parents:
            return cell
        if cell in self._adopted:
            return self._adopted[cell]
        return self.latest if not cell or self._kernel is None else None

    def _mark(self, message: Output) -> str:
        name = message.name or "worker"
        return f"({name}) " if self._plain or not message.pid else f"({name}, pid {message.pid}) "

    def _show(self, now: float, cell: str, task: bytes, said: dict[str, Any]) -> None:
        kind = said.get("kind", "display_data")
        if kind == "clear_output":
            content: dict[str, Any] = {"wait": bool(said.get("wait"))}
            self.cleared[cell] = self.cleared.get(cell, 0) + 1
        else:
            content = {
                "data": said["data"],
                "metadata": said.get("metadata", {}),
                "transient": said.get("transient", {}),
            }
        self._outlet.display(now, cell, task, kind, content, size_of(content.get("data", {})))

    # -- what the notebook says itself

    def display(
        self,
        cell: str,
        data: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        display_id: str = "",
        update: bool = False,
    ) -> None:
        """Show a bundle of representations (``text/plain``, ``text/html``, ...) in a cell, after what its tasks have said; or replace what was
        shown under that id.
        """
        content = {
            "data": dict(data),
            "metadata": dict(metadata or {}),
            "transient": {"display_id": display_id} if display_id else {},
        }
        kind = "update_display_data" if update else "display_data"
        with self._lock:
            now = time.monotonic()
            if cell not in self._parents:
                cell = self.latest
            self._outlet.display(now, cell, b"", kind, content, size_of(data))
            self._send_all(self._outlet.take(now, cell))
            if self._outlet.due(now) is not None:
                self._wake()

    def text(self, cell: str, text: str) -> None:
        """Text of nbray's own, asked for by the user: not folded, but sent no faster than a front end takes it."""
        with self._lock:
            now = time.monotonic()
            self._outlet.plain_text(cell if cell in self._parents else self.latest, text)
            self._send_all(self._outlet.take(now))
            if self._outlet.due(now) is not None:
                self._wake()

    def error(self, cell: str, name: str, text: str, lines: Sequence[str]) -> None:
        """Show an error in a cell that may have ended. ``lines``: its traceback."""
        with self._lock:
            self._send_all(self._outlet.take(time.monotonic(), cell, final=True))
            if self._kernel is None:
                sys.stderr.write("\n".join(lines) + "\n")
                return
            if cell in self._late:
                shown = _COLOURS.sub("", "\n".join(lines))
                self._late[cell] = f"{self._late[cell]}{shown}\n"[-LATE_LIMIT:]
                self._changed[cell] = None
                return
            self._send(cell, "error", {"ename": name, "evalue": text, "traceback": list(lines)}, "error")

    def flush(self, cell: str, *, ended: bool = False, late: bool = False) -> None:
        """Send what a cell's tasks have said, with the last lines of what was folded. ``ended``: the cell is over; ``late``: its tasks are not."""
        deadline = time.monotonic() + PATIENCE
        with self._lock:
            while True:
                now = time.monotonic()
                unbounded = self.headless or self._kernel is None
                self._send_all(self._outlet.take(now, cell, final=True, unbounded=unbounded))
                if not self._outlet.waiting(cell) or now >= deadline:
                    break
                self._due.wait(min(0.05, self._outlet.due(now) or 0.05))
            if self._outlet.due(now) is not None:
                self._wake()
            self._send_late()
            if ended:
                if late and self.headless and not self._plain and self._kernel is not None:
                    self._late[cell] = ""
                    self._send(cell, "display_data", self._late_content(cell), "display_data")
                self._ended.add(cell)

    def alive(self) -> None:
        """Send a message that changes nothing: whoever watches the kernel sees that it works."""
        with self._lock:
            content = {"data": {}, "metadata": {}, "transient": {"display_id": "nbray-alive"}}
            if self._kernel is not None:
                self._send(self.latest, "update_display_data", content, "display_data")

    # -- sending

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nbray-output", daemon=True)
            self._thread.start()
        self._due.notify_all()

    def _run(self) -> None:
        """Send what had to wait, when its time has come."""
        with self._due:
            while True:
                now = time.monotonic()
                self._send_all(self._outlet.take(now))
                due = self._outlet.due(now)
                if due is None:
                    self._thread = None
                    return
                self._due.wait(due)

    def _send_all(self, messages: Sequence[Send]) -> None:
        if not messages:
            return
        if self._kernel is None:
            for message in messages:
                _print(message)
            return
        if any(message.cell == self.latest for message in messages) and self.latest not in self._ended:
            # What the cell itself has printed before waits in ipykernel's buffer.
            sys.stdout.flush()
            sys.stderr.flush()
        for message in messages:
            if message.cell in self._late:
                self._keep_late(message)
                continue
            if message.cell == self.latest and message.cell not in self._ended and self._captured(message):
                continue
            topic = f"stream.{message.content['name']}" if message.kind == "stream" else "display_data"
            self._send(message.cell, message.kind, message.content, topic)

    def _captured(self, message: Send) -> bool:
        """Give it to whoever captures the output of the cell that runs (``%%capture``, ``redirect_stdout``), if somebody does."""
        content = message.content
        if message.kind == "stream":
            stream = getattr(sys, content["name"])
            if stream is self._streams[content["name"]]:
                return False
            stream.write(content["text"])
            return True
        publisher = self._kernel.shell.display_pub
        if publisher is self._publisher:
            return False
        if message.kind == "clear_output":
            publisher.clear_output(content["wait"])
        else:
            publisher.publish(**content, update=message.kind == "update_display_data")
        return True

    def _send(self, cell: str, kind: str, content: dict[str, Any], topic: str) -> None:
        kernel = self._kernel
        parent = self._parents.get(cell)
        if kind == "update_display_data" and self.headless and cell in self._ended:
            if self.latest in self._ended:
                # Nobody listens between cells: it goes with the next one.
                self._waiting[content["transient"].get("display_id", "")] = cell, content
                return
            parent = self._parents.get(self.latest)
        self.sent = time.monotonic()
        kernel.session.send(kernel.iopub_socket, kind, content, parent=parent, ident=topic.encode())

    # -- late output where nobody looks at what comes after a cell's end

    def _keep_late(self, message: Send) -> None:
        cell = message.cell
        if message.kind == "stream":
            self._late[cell] = (self._late[cell] + message.content["text"])[-LATE_LIMIT:]
        elif message.kind == "display_data" and "data" in message.content:
            text = str(message.content["data"].get("text/plain", ""))
            self._late[cell] = f"{self._late[cell]}{text}\n"[-LATE_LIMIT:]
        else:
            self._send(cell, message.kind, message.content, "display_data")
            return
        self._changed[cell] = None

    def _send_late(self) -> None:
        changed = [(cell, self._late_content(cell)) for cell in self._changed]
        waiting = list(self._waiting.values())
        self._changed.clear()
        self._waiting.clear()
        for cell, content in (*waiting, *changed):
            self._send(cell, "update_display_data", content, "display_data")

    def _late_content(self, cell: str) -> dict[str, Any]:
        return {
            "data": {"text/plain": self._late[cell].rstrip("\n")},
            "metadata": {},
            "transient": {"display_id": f"nbray-late-{cell.rpartition(' ')[2]}"},
        }


def _print(message: Send) -> None:
    if message.kind == "stream":
        target = sys.stdout if message.content["name"] == "stdout" else sys.stderr
        target.write(message.content["text"])
        target.flush()
    elif message.kind == "display_data":
        sys.stdout.write(f"{message.content['data'].get('text/plain', '')}\n")
