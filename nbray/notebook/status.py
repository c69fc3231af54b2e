"""The status line of a cell: appears when the notebook waits for tasks, is kept up to date, and ends as a summary.

A thread looks a few times per second whether the notebook waits (``Link`` knows) and asks the node for the cell's numbers: one small query,
whatever the number of tasks. It sleeps while no cell runs. The words are in `nbray.notebook.figures`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import platform
from nbray.api import context, progress
from nbray.errors import NbrayError
from nbray.events import CellRow
from nbray.notebook import figures
from nbray.notebook.following import Follower

if TYPE_CHECKING:
    from collections.abc import Collection

    from nbray.notebook.cockpit import CellRun, Cockpit
    from nbray.notebook.remote_cell import Run

AFTER = 0.3
"""Seconds that a cell waits before there is a line."""

EVERY = 0.33
"""Seconds between two versions of it."""

BACKGROUND = 1.0
"""The same for cells in the background."""

KEEP_ALIVE = 50.0
"""Seconds without any message after which one is sent while work runs: hubs end kernels that seem idle."""


class _Line:
    """What is shown of one cell."""

    def __init__(self, cell: CellRun) -> None:
        self.cell = cell
        self.began = time.monotonic()
        self.after = AFTER
        self.quiet = False
        self.hidden = False
        """Something else says how far it is."""
        self.reason = ""
        """What the cell waits for, where somebody has said it."""
        self.shown = False
        self.cleared = 0
        self.text = ""
        self.at = 0.0
        self.inputs = ""
        self.before = ""
        """The other cells whose tasks it waited for."""
        self.remote = False
        self.usage = figures.Usage()
        self.looked: dict[int, tuple[float, float]] = {}
        """Process id -> CPU seconds and the moment they were read."""


class Status(Follower):
    """The status lines of one notebook."""

    def __init__(self, cockpit: Cockpit) -> None:
        self._cockpit = cockpit
        self._line: _Line | None = None
        self._background: dict[str, _Line] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- what happens in the notebook

    def begin(self, cell: CellRun) -> None:
        """A cell begins."""
        if self._cockpit.static:
            return
        with self._changed:
            self._line = _Line(cell)
            if self._thread is None and context.current() is not None:
                self._start()
            self._changed.notify()

    def connected(self) -> None:
        """The notebook has joined a cluster."""
        if not self._cockpit.static:
            with self._changed:
                self._start()
                self._changed.notify()

    def end(self, *, failed: bool) -> None:
        """The cell has ended; ``failed``: by an error."""
        with self._changed:
            line, self._line = self._line, None
        if line is None or line.quiet or line.cell.label in self._background:
            return
        waited = time.monotonic() - line.began
        if not line.shown and not (failed or waited > AFTER):
            return
        row = self._row(line.cell.label)
        if row is not None:
            self._finish(line, row, failed=failed)
        elif line.shown:
            self._show(line, figures.shown(figures.waited(line.reason, line.before, waited)))

    @contextlib.contextmanager
    def waiting_for(self, reason: str) -> Iterator[None]:
        """The cell waits for this now, instead of for its own tasks."""
        line = self._line
        if line is not None:
            line.reason = reason
        yield

    def goes_on(self, label: str) -> bool:
        """Whether tasks of a cell have not ended."""
        row = None if self._cockpit.static else self._row(label)
        return row is not None and figures.unfinished(row) > 0

    def close(self) -> None:
        """No more lines."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)

    @contextlib.contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """The line of a ``%%remote`` cell."""
        line = self._line
        if line is not None and line.cell is run.cell:
            line.remote = True
            line.quiet = run.options.quiet
            line.inputs = run.prepared.inputs.words()
            if run.options.progress_after is not None:
                line.after = run.options.progress_after
                line.hidden = line.after < 0
                with self._changed:
                    self._changed.notify()
        yield

    def promised(self, run: Run, names: Collection[str]) -> None:
        """It goes on in the background, and so does its line."""
        if self._cockpit.static or run.options.quiet:
            return
        with self._changed:
            line = self._line if self._line is not None and self._line.cell is run.cell else _Line(run.cell)
            prepared: Any = run.prepared
            line.inputs = prepared.inputs.words() if prepared is not None else ""
            line.remote = True
            self._background[run.cell.label] = line
            self._changed.notify()

    def ended(self, run: Run) -> None:
        """The summary of a cell in the background."""
        line = self._background.pop(run.cell.label, None)
        if line is not None:
            row = self._row(run.cell.label)
            if row is not None:
                self._finish(line, row, failed=run.state == "failed")

    def bar(self) -> progress.Bar:
        """Where `nbray.progress` shows its bar: instead of the status line."""
        router, line = self._cockpit.router, self._line
        label = self._cockpit.cell.label
        if line is not None and not line.shown:
            line.hidden = True
        display_id = f"nbray-progress-{secrets.token_hex(8)}"

        def show(data: dict[str, str], update: bool) -> None:
            router.display(label, data, display_id="" if self._cockpit.static else display_id, update=update)

        return progress.DisplayBar(show, seconds=EVERY, plain=self._cockpit.static)

    # -- the thread

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="nbray-status", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        alive = time.monotonic()
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                pause = self._pause(now)
                if pause > 0:
                    self._changed.wait(min(pause, max(0.0, alive + KEEP_ALIVE - now)))
                if self._over():
                    return
                line = self._line
                background = list(self._background.values())
            now = time.monotonic()
            with contextlib.suppress(NbrayError, OSError):
                if (
                    line is not None
                    and not (line.quiet or line.hidden)
                    and now >= max(line.began + line.after, line.at + EVERY)
                ):
                    self._look(line, now)
                for other in background:
                    if now >= other.at + BACKGROUND and now >= other.began + other.after:
                        self._look(other, now, waits=True)
            if now >= alive + KEEP_ALIVE - 0.01:
                alive = now
                with contextlib.suppress(NbrayError, OSError):
                    self._stay_alive(now)

    def _over(self) -> bool:
        return self._closed

    def _pause(self, now: float) -> float:
        """Seconds until there is something to look at."""
        line, pauses = self._line, [KEEP_ALIVE]
        if line is not None and not (line.quiet or line.hidden):
            pauses.append(max(line.began + line.after, line.at + EVERY) - now)
        pauses += [
            max(other.at + BACKGROUND, other.began + other.after) - now for other in self._background.values()
        ]
        return min(pauses)

    def _look(self, line: _Line, now: float, *, waits: bool = False) -> None:
        line.at = now
        runtime = context.current()
        if runtime is None:
            return
        engine: Any = runtime.engine
        if not waits and not engine.link.waited_for:
            return
        rows = self._rows(line.cell.label)
        mine = next((row for row in rows if row.cell == line.cell.label), None)
        if mine is not None and not (line.reason and not figures.unfinished(mine)):
            self._measure(line, mine)
            text = figures.live(mine, now - line.began)
        elif rows or line.reason:
            line.before = figures.cells(rows)
            text = figures.others(line.reason, rows, now - line.began)
        else:
            return
        with self._changed:
            # It may have ended while the node was asked.
            if line is self._line or line.cell.label in self._background:
                self._show(line, figures.shown(text))

    def _show(self, line: _Line, data: dict[str, str]) -> None:
        if data["text/plain"] == line.text:
            return
        router, label = self._cockpit.router, line.cell.label
        cleared = router.cleared.get(label, 0)
        update = line.shown and cleared == line.cleared
        line.shown, line.cleared, line.text = True, cleared, data["text/plain"]
        router.display(label, data, display_id=f"nbray-status-{line.cell.run}", update=update)

    def _finish(self, line: _Line, row: CellRow, *, failed: bool) -> None:
        """The line becomes the summary, if there was one; and errors of many tasks are told of."""
        self._measure(line, row)
        if line.shown:
            text = figures.summary(row, line.inputs)
            self._show(line, figures.shown(text, figures.hint(row, line.usage)))
        # What one task has raised is the cell's error.
        if row.failed > 1 and not (line.remote and failed and row.submitted == row.failed == 1):
            card = figures.failures_card(row)
            self._cockpit.router.display(line.cell.label, card.bundle(static=self._cockpit.static))

    def _measure(self, line: _Line, row: CellRow) -> None:
        """How much CPU the workers have used since the last look."""
        import psutil

        if not line.usage.cores:
            line.usage.cores = float(platform.available_cpus())
        looked: dict[int, tuple[float, float]] = {}
        for pid, _ in row.running[:64]:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:
                continue
            cpu, now = times.user + times.system, time.monotonic()
            looked[pid] = cpu, now
            if pid in line.looked:
                before, moment = line.looked[pid]
                line.usage.add(cpu - before, now - moment, len(row.running))
        line.looked = looked

    def _rows(self, label: str) -> list[CellRow]:
        runtime = context.current()
        if runtime is None:
            return []
        return msgspec.convert(runtime.engine.query("cells", label), list[CellRow])

    def _row(self, label: str) -> CellRow | None:
        with contextlib.suppress(NbrayError, OSError):
            return next((row for row in self._rows(label) if row.cell == label), None)
        return None

    def _stay_alive(self, now: float) -> None:
        """While work runs, somebody who watches the kernel hears of it."""
        if now - self._cockpit.router.sent >= KEEP_ALIVE and any(map(figures.unfinished, self._rows(""))):
            self._cockpit.router.alive()
