"""How the notebook shows an error: nbray's own by its text, that of a cell or task by the user's frames; never the frames of a magic.

After an error of remote code ``%debug`` opens the remote frames: they are made again, with the variables that came along (``nbray.api.reports``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any

from nbray.api import reports
from nbray.api.reports import Report
from nbray.errors import TaskError

_REPORT = "__nbray_report__"


def shown_as(error: BaseException, lines: list[str]) -> None:
    """Have IPython show these lines for the error, instead of the frames of the magic."""
    with contextlib.suppress(AttributeError):
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


def briefly(error: Exception) -> Exception:
    """An error of nbray's own: its class and its text say all, frames of the magic would hide them."""
    name = "TaskError" if isinstance(error, TaskError) else type(error).__name__
    shown_as(error, f"{name}: {error}".splitlines())
    return error


def debugged_by(error: BaseException, report: Report) -> None:
    """``%debug`` is to open the frames of this report."""
    with contextlib.suppress(AttributeError):
        setattr(error, _REPORT, report)


def rendered(shell: Any, error: BaseException, *, static: bool = False) -> list[str]:
    """The lines that show an error of nbray, or of a task, that the notebook's own code has met: its lines here, then those of the task."""
    from nbray.notebook import render

    report = reports.describe(error, variables=False)
    report.frames = [frame for frame in report.frames if not _of_ipython(frame.filename)]
    where = ""
    if report.inner is not None and isinstance(error, TaskError):
        debugged_by(error, report.inner)
        where = "This ran on the cluster"
        if not static:
            where += f" ({report.where}, worker pid {error.pid}, node {error.node})"

    style = render.Style(coloured=shell.colors.lower() != "nocolor")
    return render.traceback_lines(report, namer(shell), where, style)


def met_in_nbray(error: BaseException) -> bool:
    """Whether it was raised while nbray's own code ran, most likely in a wait."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return os.path.abspath(trace.tb_frame.f_code.co_filename).startswith(reports.OWN_FRAMES)


def namer(shell: Any) -> Any:
    """What the notebook calls a file: ``Cell In[7]``, None for files that are no cells."""

    def name(filename: str) -> str | None:
        named = shell.compile.format_code_name(filename)
        return None if named is None else " ".join(named)

    return name


def shown_class(error: BaseException) -> type[BaseException]:
    """The class that front ends are told: the user's own, for an error of the user's code."""
    cause = error.cause if isinstance(error, TaskError) else None
    return type(error) if cause is None else type(cause)


def shown_value(error: BaseException) -> BaseException:
    """The exception whose text front ends are told."""
    cause = error.cause if isinstance(error, TaskError) else None
    return error if cause is None else cause


def open_to_debugger(shell: Any, error: BaseException) -> None:
    """Have ``%debug`` open the remote frames of an error that was just shown, below those of the notebook."""
    report: Report | None = getattr(error, _REPORT, None)
    if report is None:
        return
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        remote = reports.traceback_of(report, dict(shell.user_ns))
        found = _local(error.__traceback__, remote)
        error.__traceback__ = found
        # Where IPython's debugger looks, in the order in which its versions do.
        sys.last_traceback = found
        shell.InteractiveTB.tb = found


def _local(found: types.TracebackType | None, then: types.TracebackType | None) -> types.TracebackType | None:
    """The frames of a traceback that are not nbray's, then others. The first, IPython's own, stays: the debugger skips it."""
    entries = []
    while found is not None:
        entries.append(found)
        found = found.tb_next
    for number, entry in reversed(list(enumerate(entries))):
        file = os.path.abspath(entry.tb_frame.f_code.co_filename)
        if number and (file.startswith(reports.OWN_FRAMES) or _of_ipython(file)):
            continue
        then = types.TracebackType(then, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return then


def _of_ipython(filename: str) -> bool:
    import IPython

    return os.path.abspath(filename).startswith(os.path.dirname(os.path.abspath(IPython.__file__)) + os.sep)
