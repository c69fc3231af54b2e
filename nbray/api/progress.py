"""`nbray.progress`: wait for refs with a progress bar, in notebooks, in scripts and in tasks."""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from nbray.api import context
from nbray.api.refs import ObjectRef
from nbray.config import settings
from nbray.errors import GetTimeoutError

T = TypeVar("T")

LOOK = 0.1
"""Seconds between looks at what is done, at least."""

QUIET_LINE = 60.0
"""Seconds between lines where nobody watches (no terminal): enough for whoever ends what seems idle."""

WIDTH = 30


class Bar(Protocol):
    """Where a progress bar is shown. ``seconds``: at least so long between two calls of `show`."""

    seconds: float

    def show(self, text: str, page: str) -> None:
        """The bar as it is now, as text and as HTML."""

    def end(self, text: str, page: str) -> None:
        """As it was last."""


def progress(
    refs: Sequence[ObjectRef[T]], *, label: str = "", timeout: float | None = None
) -> list[ObjectRef[T]]:
    """Wait until all refs are ready, with a bar that says how many are; returns them as a list, for ``nbray.get(nbray.progress(refs))``.

    An error of a task is counted, not raised. In a notebook the bar is in the cell, in a script on stderr (a terminal gets one line that is written
    over, anything else a line per minute and one at the end). ``label``: what stands before it; ``timeout``: seconds.
    Raises TypeError for what is no list of refs, GetTimeoutError when they are not ready in time (the tasks go on).
    """
    given: Any = refs
    if isinstance(given, ObjectRef):
        given = [given]
    try:
        listed: list[ObjectRef[T]] = list(given)
    except TypeError:
        raise TypeError(f"progress() takes a list of refs, not {type(given).__name__}") from None
    for ref in listed:
        if not isinstance(ref, ObjectRef):
            raise TypeError(
                f"progress() takes a list of refs; this one has {ref!r} ({type(ref).__name__}) in it"
            )
    static = settings().static
    bar: Bar = make_bar() if make_bar is not None else StderrBar()
    engine = context.require().engine
    began = time.monotonic()
    waiting = list(dict.fromkeys(listed))
    total = len(waiting)
    failed = 0
    shown = -math.inf
    try:
        while waiting:
            looked = time.monotonic()
            left = math.inf if timeout is None else began + timeout - looked
            ready, waiting = engine.wait(waiting, len(waiting), max(0.0, min(bar_pause(total), left)), True)
            failed += engine.failed(ready)
            now = time.monotonic()
            if waiting and left <= 0:
                raise GetTimeoutError(
                    f"{len(waiting)} of {total} are not ready after {timeout:g} s; the tasks go on"
                )
            if waiting and not static and now - shown >= bar.seconds:
                shown = now
                bar.show(*_drawn(label, total - len(waiting), total, failed, now - began, ended=False))
    finally:
        if total:
            bar.end(
                *_drawn(
                    label,
                    total - len(waiting),
                    total,
                    failed,
                    None if static else time.monotonic() - began,
                    ended=True,
                )
            )
    return listed


def bar_pause(total: int) -> float:
    """Seconds between looks: a look costs about 0.5 µs per ref."""
    return max(LOOK, total * 5e-6)


def _drawn(
    label: str, done: int, total: int, failed: int, seconds: float | None, *, ended: bool
) -> tuple[str, str]:
    """The bar as text and as HTML. ``seconds``: None to leave times out."""
    from nbray.state.explaining import duration

    full = int(WIDTH * done / total)
    words = f"{done:,} of {total:,} done"
    if failed:
        words += f", {failed:,} failed"
    if seconds is not None:
        words += f", {duration(seconds)}"
        if not ended and done >= 3 and seconds >= 0.5:
            left = seconds * (total - done) / done
            words += f", about {duration(round(left) or left)} left"
    before = f"{label} " if label else ""
    text = f"{before}[{'#' * full}{'-' * (WIDTH - full)}] {words}"
    page = f"{html.escape(before)}<progress value='{done}' max='{total}'></progress> {html.escape(words)}"
    return text, page


make_bar: Callable[[], Bar] | None = None
"""Makes the bar where there is something better than stderr: set by the notebook, and in workers."""


class StderrBar:
    """In a script."""

    def __init__(self) -> None:
        self._terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        self._width = 0
        self._quiet_since = time.monotonic()
        self.seconds = LOOK if self._terminal else QUIET_LINE

    def show(self, text: str, page: str) -> None:
        del page
        if self._terminal:
            self._write_over(text)
        elif time.monotonic() - self._quiet_since >= QUIET_LINE:
            self._quiet_since = time.monotonic()
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def end(self, text: str, page: str) -> None:
        del page
        if self._terminal:
            self._write_over(text)
            text = ""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _write_over(self, text: str) -> None:
        sys.stderr.write(f"\r{text.ljust(self._width)}")
        self._width = len(text)


class DisplayBar:
    """Where there are displays that can be updated. ``display(data, update)`` shows a bundle of representations."""

    def __init__(
        self, display: Callable[[dict[str, str], bool], None], *, seconds: float, plain: bool
    ) -> None:
        self._display = display
        self._plain = plain
        self._shown = False
        self.seconds = seconds

    def show(self, text: str, page: str) -> None:
        data = {"text/plain": text} if self._plain else {"text/plain": text, "text/html": page}
        self._display(data, self._shown)
        self._shown = True

    end = show
