"""What an interrupt of the notebook means for the cluster: it cancels what the interrupted cell has started, and nothing else.

What ipykernel does with SIGINT (read in and measured on 6.31, 7.3, 7.4): it is ignored while no cell runs, raises KeyboardInterrupt in a cell, and in
a cell with a top-level ``await`` only asks the event loop to cancel the cell: without waking the loop, so that a cell that awaits
something slow does not notice, and never while such a cell blocks.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from nbray.api import context
from nbray.config import CANCEL_GRACE
from nbray.notebook import lifecycle

RESTART_SECONDS = 0.1
"""Seconds after an interrupt in which the request to restart the kernel must come, if it belongs to one."""

AGAIN_SECONDS = 0.005
"""Seconds after which an interrupt that a finalizer has swallowed is sent again."""

_ASYNC_CELL = "IPythonKernel._cancel_on_sigint"


class Interrupts:
    """Of one notebook. `begin` and `end` are called around each cell."""

    def __init__(self, shell: Any, say: Callable[[str, str], None]) -> None:
        """``say``: shows a line in the cell of a label."""
        self._shell = shell
        self._kernel: Any = getattr(shell, "kernel", None)
        self._say = say
        self._pressed = False
        self._request = ""
        self._stopped = ""
        """The request in which a cell inside of a cell (``%%capture``) was interrupted."""
        self._stopping: tuple[str, float] = ("", 0.0)
        """The cell whose tasks have been asked to stop, and until when they may take their time."""
        self._unfinished = 0
        self._hook = sys.unraisablehook

    def load(self) -> None:
        """Notice interrupts that Python drops."""
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._dropped

    def unload(self) -> None:
        """The opposite."""
        if sys.unraisablehook == self._dropped:
            sys.unraisablehook = self._hook

    def _dropped(self, what: Any) -> None:
        """An exception in a finalizer is lost; if it is an interrupt (references have finalizers, and may go in thousands), press again."""
        main = threading.main_thread()
        if issubclass(what.exc_type, KeyboardInterrupt) and threading.current_thread() is main:
            again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main.ident, signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            self._hook(what)

    def begin(self) -> None:
        """A cell begins."""
        self._pressed = False
        self._request = self._of_request()
        self._unfinished = _unfinished()
        if self._kernel is not None and threading.current_thread() is threading.main_thread():
            self._hear_async_cell()

    def end(self, cell: str, result: Any) -> None:
        """The cell of that label has ended: if by an interrupt, what it has started is cancelled."""
        error = getattr(result, "error_in_exec", None)
        if isinstance(error, asyncio.CancelledError):
            interrupted = self._pressed
        else:
            interrupted = isinstance(error, KeyboardInterrupt)
        request = self._of_request()
        if interrupted:
            self._stopped = request
            self._cancel(cell)
        elif error is None and result is not None and request and request == self._stopped:
            # The magic around the interrupted cell has shown the error and gone on; what the user has queued must not.
            result.error_in_exec = KeyboardInterrupt("the cell was interrupted")

    def unless_restart(self, cancel: Callable[[], None]) -> None:
        """Call it soon, in a thread of its own, unless the interrupt is how a restart of the kernel begins: then what runs goes on.

        jupyter_client sends SIGINT before it asks the kernel to shut down; the request is there milliseconds later.
        """

        def decide() -> None:
            end = time.monotonic() + RESTART_SECONDS
            while not self._restarts() and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, 0.005))
            if not self._restarts():
                cancel()

        threading.Thread(target=decide, name="nbray-interrupt", daemon=True).start()

    def _restarts(self) -> bool:
        return self._shell is not None and lifecycle.ended_for_restart(self._shell) is True

    def _cancel(self, cell: str) -> None:
        runtime = context.current()
        if runtime is None:
            return
        if self._stopping[1] > time.monotonic():
            self._force()
        engine: Any = runtime.engine
        if engine.closed or engine.link.dead:
            return
        unfinished = _unfinished() > self._unfinished

        def cancel() -> None:
            if engine.closed or engine.link.dead:
                return
            engine.cancel_cell(cell)
            if unfinished:
                self._say(
                    "the tasks that this cell started are cancelled (one more interrupt ends their processes at once)",
                    cell,
                )

        self._stopping = (cell, time.monotonic() + CANCEL_GRACE)
        if hasattr(self._kernel, "saved_sigint_handler"):
            # While no cell runs the kernel ignores interrupts; this is what it goes back to when the cell has ended.
            self._kernel.saved_sigint_handler = self._pressed_again
        self.unless_restart(cancel)

    def _pressed_again(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping[1] > time.monotonic():
            # A signal's handler must not wait for locks that the code it interrupts may hold.
            threading.Thread(target=self._force, name="nbray-interrupt", daemon=True).start()

    def _force(self) -> None:
        cell, self._stopping = self._stopping[0], ("", 0.0)
        runtime = context.current()
        if runtime is not None and cell:
            engine: Any = runtime.engine
            engine.cancel_cell(cell, force=True)

    def _hear_async_cell(self) -> None:
        """If this is a cell with a top-level ``await``: an interrupt wakes its loop, and raises where the cell blocks for the cluster."""
        asks = signal.getsignal(signal.SIGINT)
        if not callable(asks) or not getattr(asks, "__qualname__", "").startswith(_ASYNC_CELL):
            return
        loop = asyncio.get_running_loop()

        def pressed(number: int, frame: FrameType | None) -> None:
            self._pressed = True
            runtime = context.current()
            engine: Any = runtime.engine if runtime is not None else None
            if engine is not None and engine.link.interrupts.depth:
                # The link passes signals on only where it waits.
                raise KeyboardInterrupt
            asks(number, frame)
            loop.call_soon_threadsafe(_nothing)

        # ipykernel puts its own back when the cell has ended.
        signal.signal(signal.SIGINT, pressed)

    def _of_request(self) -> str:
        if self._kernel is None:
            return ""
        parent = self._kernel.get_parent("shell") or {}
        return str(parent.get("header", {}).get("msg_id", ""))


def _nothing() -> None:
    """What wakes a loop."""


def _unfinished() -> int:
    """Results that this process still waits for."""
    runtime = context.current()
    engine: Any = runtime.engine if runtime is not None else None
    return 0 if engine is None else int(engine.machine.pending)
