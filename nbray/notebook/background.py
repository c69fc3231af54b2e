"""Cells that the notebook does not wait for: ``%%remote -a``, and those that an interrupt has sent to the background."""

from __future__ import annotations

import ast
import functools
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.errors import NodeDiedError, NotInitializedError, TaskCancelledError, TaskError
from nbray.notebook import outcome

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbray.api.refs import ObjectRef
    from nbray.notebook.cockpit import Cockpit
    from nbray.notebook.remote_cell import Run


def leave(cockpit: Cockpit, run: Run) -> None:
    """The notebook does not wait (any more) for a run that was submitted: its names are late."""
    assert run.ref is not None
    run.left = True
    names = _late_names(run, cockpit.shell.user_ns)
    cockpit.late.promise(run, names)
    if run.options.timeout is not None:
        left = run.began + run.options.timeout - time.monotonic()
        run.alarm = threading.Timer(max(left, 0.0), _cancel, (run, run.ref))
        run.alarm.daemon = True
        run.alarm.start()
    watch(cockpit, run)
    if not run.options.quiet:
        # The number of a cell is not the same in every run of a notebook.
        text = f"{'it' if cockpit.static else run.cell.title} runs in the background"
        cockpit.say(f"{text}; a cell that reads {_listed(names)} waits for it" if names else text)


def watch(cockpit: Cockpit, run: Run) -> None:
    """When the task of ``run.ref`` ends: set ``run.state``, show an error in the run's own cell, tell the followers. In a thread of the engine's."""
    assert run.ref is not None
    context.require().engine.future(run.ref).add_done_callback(functools.partial(_ended, cockpit, run))


def out_of_time(run: Run) -> str:
    """What to say of a run that was cancelled because of its ``timeout``."""
    return f"the cell was cancelled because it did not end within {run.options.timeout:g} s (--timeout)"


def _cancel(run: Run, ref: ObjectRef[Any]) -> None:
    run.timed_out = True
    runtime = context.current()
    if runtime is not None and not runtime.engine.closed:
        runtime.engine.cancel(ref, False, True)


def _ended(cockpit: Cockpit, run: Run, future: Future[Any]) -> None:
    error = future.exception()
    if run.alarm is not None:
        run.alarm.cancel()
    if error is None:
        run.state = "done"
    else:
        run.state = "cancelled" if isinstance(error, TaskCancelledError) else "failed"
        # Whoever reads its names meets the error too; but perhaps nobody does.
        if not isinstance(error, NotInitializedError | NodeDiedError):
            _show_failure(cockpit, run, error)
    for follower in cockpit.followers:
        follower.ended(run)


def _show_failure(cockpit: Cockpit, run: Run, error: BaseException) -> None:
    from nbray.notebook.runner import CellError

    name, text = type(error).__name__, str(error)
    if run.timed_out:
        name, text = "GetTimeoutError", out_of_time(run)
    lines = [f"{name}: {text}"]
    if isinstance(error, TaskError) and isinstance(error.cause, CellError):
        name, text = error.cause.report.kind, "\n".join(error.cause.report.lines)
        text = text.removeprefix(f"{name}: ")
        lines = outcome.traceback_lines(cockpit, error, error.cause)
    cockpit.router.error(run.cell.label, name, text, lines)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _late_names(run: Run, namespace: dict[str, Any]) -> list[str]:
    """The names that a cell is going to bind, less those that it merely imports and the notebook has already."""
    imported: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(run.prepared.task.source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
    mere = imported - bound
    return [name for name in run.names if not (name in mere and name in namespace)]
