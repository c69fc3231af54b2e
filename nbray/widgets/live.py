"""The widget of the task graph. Imported only where one is shown: it loads anywidget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from nbray.errors import NbrayError
from nbray.widgets.feed import EVERY, Feed
from nbray.widgets.frames import Mark, frames

STATIC = Path(__file__).parent / "static"

PATIENCE = 30.0
"""Seconds without a sign of life, while the kernel could hear one, after which a view is taken for gone: a closed tab says nothing."""

UNASKED = (0.3, 1.0, 3.0, 8.0)
"""Seconds after which the whole is sent although no view has said hello: a kernel that runs a cell may not hear it, and cannot know."""

REST = 60.0
"""Seconds without an interaction after which a finished graph becomes a picture."""


class GraphWidget(anywidget.AnyWidget):
    """A live task graph. All of the graph travels in messages: nothing of it is saved with the notebook."""

    _esm = STATIC / "graph.js"
    _css = STATIC / "graph.css"
    title = traitlets.Unicode().tag(sync=True)

    def __repr__(self) -> str:
        return "<nbray task graph>"


class Live:
    """Feeds one widget from a thread of its own.

    ``busy``: whether the kernel runs a cell, so that it may not hear the views. ``settle(feed)`` is called when the graph is finished and nobody has touched it
    for `REST` seconds, or the cluster has gone, and ``lonely(feed)``, about once per second, as long as no view has ever said hello.
    """

    def __init__(
        self,
        feed: Feed,
        title: str,
        *,
        busy: Callable[[], bool],
        settle: Callable[[Feed], None],
        lonely: Callable[[Feed], None],
    ) -> None:
        self.widget = GraphWidget(title=title)
        self.feed = feed
        self._busy = busy
        self._settle = settle
        self._lonely = lonely
        self._mark = Mark()
        self._changed = threading.Condition()
        self._closed = False
        self._whole = False
        self._views = False
        self._greeted = False
        self._heard = self._touched = self._began = self._idle = time.monotonic()
        self.sent = 0
        """Bytes of all frames."""
        self.widget.on_msg(self._on_message)
        _answer_at_once(self.widget)
        self._thread = threading.Thread(target=self._run, name="nbray-graph", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _on_message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """Comes in the kernel's main thread or in one of a subshell."""
        kind = content.get("kind") if isinstance(content, dict) else None
        with self._changed:
            now = self._heard = time.monotonic()
            if kind in ("hello", "whole"):
                self._whole = self._views = self._greeted = True
                self._touched = now
            elif kind == "alive":
                self._views = True
                if content.get("touched"):
                    self._touched = now
            elif kind == "bye":
                self._views = False
            self._changed.notify()

    # -- in the thread

    def _run(self) -> None:
        watching = False
        asked = 0
        told = 0.0
        try:
            while True:
                with self._changed:
                    if not self._closed and not self._whole:
                        self._changed.wait(EVERY if self._wanted() else 1.0)
                    if self._closed:
                        break
                    whole, self._whole = self._whole, False
                    wanted = self._wanted()
                    now = time.monotonic()
                    if self._busy():
                        # What views say now is heard later.
                        self._idle = now
                    if not self._greeted and asked < len(UNASKED) and now - self._began > UNASKED[asked]:
                        whole = True
                        asked += 1
                    lonely = not self._greeted and now - self._idle > 2.0 and now - told > 1.0
                    rests = self._touched + REST < now and not self._busy()
                if not wanted:
                    if watching:
                        self.feed.end()
                        watching = False
                    continue
                changed: list[int] = []
                if not watching:
                    self.feed.begin()
                    watching = whole = True
                else:
                    changed = self.feed.look()
                if changed:
                    self._touched = max(self._touched, now)
                self._send(changed, whole)
                if lonely:
                    told = now
                    self._lonely(self.feed)
                if rests and self.feed.finished:
                    self._settle(self.feed)
                    break
        except NbrayError:
            # The cluster has gone: what was seen last stays.
            self._settle(self.feed)
            return
        if watching:
            try:
                self.feed.end()
            except NbrayError:
                return

    def _wanted(self) -> bool:
        """Whether somebody looks, as far as the kernel can know."""
        if not self._greeted:
            return time.monotonic() - self._began < 2 * UNASKED[-1] or self._busy()
        if self._busy():
            self._heard = time.monotonic()
        return self._views and time.monotonic() - self._heard < PATIENCE

    def _send(self, changed: list[int], whole: bool) -> None:
        feed = self.feed
        for frame in frames(feed.graph, self._mark, changed, origin=feed.origin, now=feed.now, reset=whole):
            self.sent += len(frame)
            self.widget.send({"kind": "frames"}, buffers=[frame])


def _answer_at_once(widget: Any) -> None:
    """Let the front end decide in which subshell it is heard, so that a view is heard while a cell runs.

    ipykernel 7.4 overrides it with the one in which the kernel sent last (``BaseComm._reply_subshell_for``): the main one, which is busy.
    """
    comm: Any = getattr(widget, "comm", None)
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default
