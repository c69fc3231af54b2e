"""What becomes of a cell's result in the notebook: names are bound, and an error is raised as if it had happened here."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from nbray.errors import NbrayError, SerializationError, TaskError
from nbray.notebook import failing

if TYPE_CHECKING:
    from nbray.notebook.cell import Returned
    from nbray.notebook.cockpit import Cockpit
    from nbray.notebook.remote_cell import Run
    from nbray.notebook.runner import CellError, CellResult


def read(cockpit: Cockpit, result: CellResult) -> Returned:
    """The values of a result. Raises SerializationError when they cannot be unpickled here."""
    from nbray.notebook.cell import returned

    try:
        return returned(result, cockpit.shell.user_ns)
    except Exception as error:
        text = f"the cell ran, but what it bound cannot be read here: {type(error).__name__}: {error}"
        raise failing.briefly(SerializationError(text)) from error


def bind(cockpit: Cockpit, run: Run, back: Returned, only: Collection[str] | None = None) -> None:
    """Put what came back into the notebook (``only`` these names), and say what did not."""
    from nbray.notebook.cell import changed_note

    values, deleted = back.values, back.deleted
    if only is not None:
        values = {name: value for name, value in values.items() if name in only}
        deleted = [name for name in deleted if name in only]
    cockpit.shell.push(values)
    for name in deleted:
        cockpit.shell.user_ns.pop(name, None)
    for follower in cockpit.followers:
        follower.bound(run, values, deleted)
    cockpit.names.left(back.left)
    if not run.options.quiet:
        for note in back.notes:
            cockpit.say(note, run.cell)
        changed = [name for name in back.changed if name not in cockpit.told_changed]
        if changed:
            cockpit.told_changed.update(changed)
            cockpit.say(changed_note(changed), run.cell)


def failed(cockpit: Cockpit, error: NbrayError, back: Returned | None = None, title: str = "") -> Exception:
    """What to raise for an error that a cell's task has ended with.

    ``back``: what the cell had bound until then, if its own code raised. ``title``: what to put above the traceback.
    """
    from nbray.notebook.runner import CellError

    above = [title] if title else []
    cause = error.cause if isinstance(error, TaskError) else None
    if not isinstance(cause, CellError):
        brief = failing.briefly(error)
        if title:
            failing.shown_as(brief, [*above, f"{type(error).__name__}: {error}"])
        return brief
    assert isinstance(error, TaskError)
    value = back.value if back is not None else None
    raised: Any = value if isinstance(value, Exception) else TaskError(*cause.args)
    raised.__traceback__ = None
    failing.shown_as(raised, above + traceback_lines(cockpit, error, cause))
    failing.debugged_by(raised, cause.report)
    return raised  # type: ignore[no-any-return]


def traceback_lines(cockpit: Cockpit, error: TaskError, cause: CellError) -> list[str]:
    """The traceback of a cell's own error, and where it ran."""
    from nbray.notebook import render

    where = "This ran on the cluster"
    if not cockpit.static:
        where += f" (task {error.task}, worker pid {error.pid}, node {error.node})"
    shell = cockpit.shell
    style = render.Style(coloured=shell.colors.lower() != "nocolor")
    return render.traceback_lines(cause.report, failing.namer(shell), where, style)
