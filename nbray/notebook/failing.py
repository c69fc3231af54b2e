"""How the notebook shows an error: nbray's own by its text, a cell's by the cell's frames; never the frames of a magic."""

from __future__ import annotations

import contextlib

from nbray.errors import TaskError


def shown_as(error: BaseException, lines: list[str]) -> None:
    """Have IPython show these lines for the error, instead of the frames of the magic."""
    with contextlib.suppress(AttributeError):
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


def briefly(error: Exception) -> Exception:
    """An error of nbray's own: its class and its text say all, frames of the magic would hide them."""
    name = "TaskError" if isinstance(error, TaskError) else type(error).__name__
    shown_as(error, f"{name}: {error}".splitlines())
    return error
