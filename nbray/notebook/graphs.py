"""``%graph``: the task graph in the notebook, live where somebody looks at it, a picture where it is saved or nobody is there."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.errors import NbrayError
from nbray.notebook import targets
from nbray.notebook.arguments import BadUsageError, Parser
from nbray.widgets import drawing
from nbray.widgets.feed import Feed

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit
    from nbray.state.graph import Graph
    from nbray.widgets.live import Live

MOST = 8
"""Live graphs of a notebook; the oldest becomes a picture when there are more."""


def parser() -> Parser:
    """Of the line of ``%graph``."""
    made = Parser("%graph", "Show the task graph: of the cluster, of a cell, or of what made a value.")
    made.add_argument(
        "what", nargs="?", default="", metavar="NAME|In[n]", help="a variable, a cell, a short id of a task"
    )
    made.add_argument(
        "--freeze", action="store_true", help="as a picture; with nothing else, all open graphs"
    )
    return made


class OpenGraph:
    """One graph that a cell shows. ``command``: the line that shows it."""

    def __init__(self, cockpit: Cockpit, feed: Feed, title: str, command: str, display_id: str) -> None:
        self._cockpit = cockpit
        self.feed = feed
        self.title = title
        self.command = command
        self.cell = cockpit.cell.label
        self._id = display_id
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._shown = ""
        self.over = False

    def show(self, *, freeze: bool) -> None:
        """Put it into the cell that runs."""
        graph = self.feed.once()
        bundle = picture(graph, self.title, self.command)
        if freeze:
            self.over = True
        elif not self._cockpit.router.headless:
            # Keys in this order: front ends take the richest one they know, exporters without widgets the picture.
            try:
                widget = self._start()
            except ImportError as error:
                self.over = True
                self._cockpit.say(
                    f"a picture only: the live view needs anywidget ({error}); pip install anywidget"
                )
            else:
                svg = bundle.pop("image/svg+xml")
                bundle |= {**widget, "image/svg+xml": svg}
        self._shown = bundle["text/plain"]
        identity = "" if self._cockpit.static else self._id
        self._cockpit.router.display(self.cell, bundle, display_id=identity)

    def freeze(self) -> None:
        """Replace the view by a picture of the present."""
        if not self.over:
            self._settle(self.feed.copy(), ask=True)

    def refresh(self) -> None:
        """Without anybody there: the picture of the present, if it is another one."""
        graph = self.feed.once()
        bundle = picture(graph, self.title, self.command)
        if bundle["text/plain"] != self._shown:
            self._shown = bundle["text/plain"]
            self._update(bundle)
            # What comes after the end of the cell that runs is not read.
            self._cockpit.router.flush(self.cell)
        if self.feed.chosen and self.feed.finished:
            self.over = True

    def close(self) -> None:
        """The thread ends; what is shown stays."""
        self.over = True
        if self._live is not None:
            self._live.close()

    def _start(self) -> dict[str, Any]:
        from nbray.widgets.live import Live

        self._live = Live(
            self.feed,
            self.title,
            busy=lambda: self._cockpit.graphs.busy,
            settle=self._settle,
            lonely=self._lonely,
        )
        found = self._live.widget._repr_mimebundle_()
        data = found[0] if isinstance(found, tuple) else found
        return {key: value for key, value in (data or {}).items() if key != "text/plain"}

    def _settle(self, feed: Feed, *, ask: bool = False) -> None:
        with self._lock:
            if self.over:
                return
            self.over = True
        graph = feed.graph
        if ask:
            try:
                graph = feed.once()
            except NbrayError:
                # The cluster has gone: what was seen last.
                graph = self.feed.graph
        self._update(picture(graph, self.title, self.command))
        if self._live is not None:
            self._live.close()

    def _lonely(self, feed: Feed) -> None:
        bundle = picture(feed.graph, self.title, self.command)
        if bundle["text/plain"] != self._shown:
            self._shown = bundle["text/plain"]
            self._update(bundle)

    def _update(self, bundle: dict[str, Any]) -> None:
        self._cockpit.router.display(self.cell, bundle, display_id=self._id, update=True)


class Graphs:
    """The graphs of one notebook."""

    def __init__(self, cockpit: Cockpit) -> None:
        self._cockpit = cockpit
        self._open: list[OpenGraph] = []
        self._numbers = itertools.count(1)
        self.busy = False
        """Whether a cell runs."""

    def load(self) -> None:
        """Listen to the shell's cells, before the cockpit, which ends their output."""
        events = self._cockpit.shell.events
        events.register("pre_run_cell", self._begin)
        events.register("post_run_cell", self._end)

    def unload(self) -> None:
        """The opposite of `load`."""
        events = self._cockpit.shell.events
        events.unregister("pre_run_cell", self._begin)
        events.unregister("post_run_cell", self._end)
        for graph in self._open:
            graph.close()
        self._open.clear()

    def run(self, what: str, *, freeze: bool) -> None:
        """What ``%graph`` does. Raises BadUsageError for a word that means nothing, NotInitializedError without a cluster."""
        cockpit = self._cockpit
        engine = context.require().engine
        if freeze and not what and self._live():
            for graph in self._live():
                graph.freeze()
            return
        cell, tasks = "", frozenset[bytes]()
        if what:
            events = targets.find_tasks(cockpit, what)
            if targets.cell_number(what) is not None:
                cell = events[0].cell
            else:
                tasks = frozenset(event.task for event in events)
        title = f"Tasks of {what}" if cell else f"What made {what}" if what else "Tasks of the cluster"
        feed = Feed(engine, cell, tasks)
        graph = OpenGraph(
            cockpit,
            feed,
            title,
            f"%graph {what}".strip(),
            f"nbray-graph-{cockpit.cell.number}-{next(self._numbers)}",
        )
        graph.show(freeze=freeze or cockpit.static)
        if not graph.over:
            self._open = [*self._live(), graph]
            while len(self._open) > MOST:
                self._open.pop(0).freeze()

    def _live(self) -> list[OpenGraph]:
        return [graph for graph in self._open if not graph.over]

    def _begin(self, _info: Any) -> None:
        self.busy = True

    def _end(self, _result: Any) -> None:
        self.busy = False
        if not self._cockpit.router.headless or context.current() is None:
            return
        for graph in self._live():
            try:
                graph.refresh()
            except NbrayError:
                graph.close()


def picture(graph: Graph, title: str, command: str) -> dict[str, Any]:
    """Text and SVG."""
    return {"text/plain": drawing.text(graph, title), "image/svg+xml": drawing.svg(graph, title, command)}


class GraphPicture:
    """A graph as it was at one moment: what `nbray.graph` returns. Notebooks show the picture; ``svg`` and ``text`` give it."""

    def __init__(self, graph: Graph, title: str, command: str) -> None:
        self.graph = graph
        self.text = drawing.text(graph, title)
        self.svg = drawing.svg(graph, title, command)

    def __repr__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the SVG to a file. Raises OSError."""
        Path(path).write_text(self.svg, encoding="utf-8")


def graph(what: str = "") -> GraphPicture | None:
    """What ``%graph`` does with this word. In a notebook it shows the live graph in the cell and returns None; elsewhere it returns a `GraphPicture`.

    Raises ValueError for a word that means nothing, NotInitializedError without a cluster.
    """
    from nbray.notebook import extension
    from nbray.notebook.twins import notebook

    engine = context.require().engine
    shell = notebook()
    try:
        if shell is not None and getattr(shell, "kernel", None) is not None:
            extension.load_ipython_extension(shell)
            cockpit = extension.cockpit_of(shell)
            assert cockpit is not None
            cockpit.graphs.run(what, freeze=False)
            return None
    except BadUsageError as error:
        raise ValueError(str(error)) from None
    if what:
        raise ValueError(
            f"nbray.graph({what!r}): cells and variables are known in a notebook only; nbray.graph() shows all tasks"
        )
    return GraphPicture(Feed(engine).once(), "Tasks of the cluster", "nbray.graph()")
