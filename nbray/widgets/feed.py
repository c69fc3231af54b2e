"""Keeps a graph up to date from a cluster: its history once, then what changes, about ten times per second, only while somebody looks."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec

from nbray.events import FINISHED, RETRIED, TaskEvent
from nbray.node.watching import WatchAnswer
from nbray.state.graph import Graph
from nbray.state.views import task_events

if TYPE_CHECKING:
    from nbray.engine.base import Engine

EVERY = 0.1
"""Seconds between two questions."""

HISTORY = 100_000
"""Tasks that have ended when the watch begins, the newest ones, that are in the graph."""

ROUNDS = 25
"""Answers that are taken at most in one look, so that one look at 100,000 tasks is one frame."""

_rows = msgspec.msgpack.Decoder(list[TaskEvent]).decode


class Feed:
    """The graph of a cell's tasks (``cell``: its label), of these tasks and what they were made from (``tasks``), or of all that the cluster knows.

    Not thread-safe: one thread at a time. All methods raise the engine's errors (NotInitializedError, NodeDiedError) when the cluster has gone.
    """

    def __init__(self, engine: Engine, cell: str = "", tasks: Collection[bytes] = ()) -> None:
        self._engine = engine
        self._cell = cell
        self._tasks = tasks
        self._token = ""
        self._wanted: set[bytes] | None = None
        self.graph = Graph()
        self.now = 0.0
        """The node's clock at the last look."""
        self.origin = 0.0
        """When the first task was submitted that was known when the watch began; else when it began."""

    def copy(self) -> Feed:
        """A feed of the same tasks, with nothing in it yet."""
        return Feed(self._engine, self._cell, self._tasks)

    @property
    def chosen(self) -> bool:
        """Whether it is of some of the cluster's tasks only."""
        return bool(self._cell or self._tasks)

    @property
    def finished(self) -> bool:
        """Whether there are tasks, and all have ended."""
        counts = self.graph.counts()
        return bool(sum(counts)) and not sum(counts[:FINISHED]) and not counts[RETRIED]

    def begin(self) -> None:
        """Make the graph anew and watch from now on."""
        self.end()
        self._token = secrets.token_hex(4)
        # First the watch, then what was before: nothing falls between the two.
        rows = self._look()
        session = str(self._engine.details().get("session", "")) if self._cell else ""
        chosen = {"cell": self._cell, "session": session}
        before = [event for _, event in task_events(self._engine.query, chosen, HISTORY)]
        self.graph = Graph()
        self._wanted = None
        if self._tasks:
            self._choose([*before, *rows])
        self._apply([*before, *rows])
        self.origin = min(self.graph.submitted, default=self.now)

    def look(self) -> list[int]:
        """Take in what has changed; returns the nodes that are new or have changed."""
        return self._apply(self._look())

    def end(self) -> None:
        """Watch no longer."""
        if self._token:
            token, self._token = self._token, ""
            self._engine.query("watch", {"token": token, "end": True})

    def once(self) -> Graph:
        """The graph as it is now, without watching it."""
        self.begin()
        self.end()
        return self.graph

    def _look(self) -> list[TaskEvent]:
        rows: list[TaskEvent] = []
        for _ in range(ROUNDS):
            asked = {"token": self._token, "cell": self._cell}
            answer = msgspec.convert(self._engine.query("watch", asked), WatchAnswer)
            self.now = answer.now
            rows += _rows(answer.rows)
            if not answer.more:
                break
        return rows

    def _choose(self, events: list[TaskEvent]) -> None:
        whole = Graph()
        whole.apply(events)
        nodes = [whole.index[task] for task in self._tasks if task in whole.index]
        self._wanted = {whole.tasks[node] for node in whole.ancestors(nodes)} | set(self._tasks)

    def _apply(self, rows: list[TaskEvent]) -> list[int]:
        if self._wanted is not None:
            rows = [row for row in rows if row.task in self._wanted]
        return self.graph.apply(rows)
