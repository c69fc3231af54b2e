"""The task graph as a fold of task events: tasks, the edges between them, and groups of them. No I/O; each event costs O(its edges).

Tasks of one function that one cell has started are a group: what a large graph shows first. Nodes, edges and groups are numbered in the order of
their appearance and never go; only states change. So what has changed since some moment is a tail of each list and a set of nodes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from nbray import ids
from nbray.events import FAILED, FINISHED, RETRIED, RUNNING, TASK_STATES, TaskEvent
from nbray.messages import TASK

DATA, CONTROL, STATEFUL = range(3)
"""Kinds of edges: a result is an argument, a task starts another one, a call follows the one before it on its actor."""

EDGE_KINDS = ("data", "control", "stateful")


class Group:
    """Tasks of one function and cell. ``counts``: by state; ``actor``: they are calls of methods or creations of actors."""

    __slots__ = ("actor", "cell", "counts", "name")

    def __init__(self, name: str, cell: str, actor: bool) -> None:
        self.name = name
        self.cell = cell
        self.actor = actor
        self.counts = [0] * len(TASK_STATES)

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def title(self) -> str:
        """Of the cell: ``In[3]``, empty outside of notebooks."""
        return self.cell.partition(" ")[0]


class Graph:
    """Columns over nodes (``tasks``, ``groups_of``, ``states``, ``kinds``, ``attempts``, ``started``, ``finished``: seconds of the host's monotonic clock)
    and over edges (``sources``, ``targets``, ``edge_kinds``). ``errors``: class name of the error, of nodes that have one.

    An edge leads from an earlier node to a later one; one whose source is not known when its target comes is left out.
    """

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.tasks: list[bytes] = []
        self.groups_of = array("I")
        self.states = bytearray()
        self.kinds = bytearray()
        self.attempts = bytearray()
        self.submitted = array("d")
        self.started = array("d")
        self.finished = array("d")
        self.sources = array("I")
        self.targets = array("I")
        self.edge_kinds = bytearray()
        self.groups: list[Group] = []
        self.group_edges: dict[tuple[int, int, int], int] = {}
        """(source group, target group, kind) -> how many edges; none of a group to itself."""
        self.errors: dict[int, str] = {}
        self._group_index: dict[tuple[str, str], int] = {}
        self._last_call: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    def apply(self, events: Iterable[TaskEvent]) -> list[int]:
        """Take in events or rows of tasks, in any order; returns the nodes that are new or changed, in their order, each once.

        The latest attempt of a task counts, and of an attempt its end. Within one call parents are taken before their children.
        """
        changed: dict[int, None] = {}
        fresh: dict[bytes, TaskEvent] = {}
        for event in events:
            number = self.index.get(event.task)
            if number is not None:
                if self._update(number, event):
                    changed[number] = None
                continue
            known = fresh.get(event.task)
            if known is None or _supersedes(event.attempt, event.state, known.attempt, known.state):
                fresh[event.task] = event
        for event in sorted(fresh.values(), key=_order):
            changed[self._add(event)] = None
        return sorted(changed)

    def counts(self) -> list[int]:
        """How many tasks are in each state."""
        return [sum(group.counts[state] for group in self.groups) for state in range(len(TASK_STATES))]

    def ancestors(self, nodes: Iterable[int]) -> list[int]:
        """These nodes and all from which an edge leads to them, in their order."""
        before: dict[int, list[int]] = {}
        for source, target in zip(self.sources, self.targets, strict=True):
            before.setdefault(target, []).append(source)
        found: dict[int, None] = {}
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in found:
                found[node] = None
                stack += before.get(node, ())
        return sorted(found)

    def parents(self) -> list[list[int]]:
        """Of each node, the nodes from which an edge leads to it."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for source, target in zip(self.sources, self.targets, strict=True):
            found[target].append(source)
        return found

    def seconds(self, node: int, now: float = 0.0) -> float:
        """Its run time; until ``now`` if it runs; 0 if it has not started."""
        started = self.started[node]
        return max(0.0, (self.finished[node] or now or started) - started) if started else 0.0

    # -- inside

    def _add(self, event: TaskEvent) -> int:
        number = len(self.tasks)
        self.index[event.task] = number
        self.tasks.append(event.task)
        group = self._group(event)
        self.groups_of.append(group)
        self.states.append(event.state)
        self.kinds.append(event.kind)
        self.attempts.append(min(event.attempt, 255))
        self.submitted.append(event.submitted)
        self.started.append(event.started)
        self.finished.append(event.finished)
        self.groups[group].counts[event.state] += 1
        if event.error:
            self.errors[number] = event.error
        index = self.index
        sources: dict[int, int] = {}
        for dep in event.deps or ():
            # What `put` made has the id of no task, and is found in no index.
            source = index.get(ids.task_of(dep))
            if source is not None and source != number:
                sources.setdefault(source, DATA)
        if event.actor:
            before = self._last_call.get(event.actor)
            if before is not None:
                sources.setdefault(before, STATEFUL)
            self._last_call[event.actor] = number
        elif event.kind != TASK:
            self._last_call[event.task] = number
        starter = index.get(event.parent)
        if starter is not None and starter != number:
            sources.setdefault(starter, CONTROL)
        for source, kind in sources.items():
            self.sources.append(source)
            self.targets.append(number)
            self.edge_kinds.append(kind)
            other = self.groups_of[source]
            if other != group:
                edge = (other, group, kind)
                self.group_edges[edge] = self.group_edges.get(edge, 0) + 1
        return number

    def _update(self, number: int, event: TaskEvent) -> bool:
        state, attempt = self.states[number], self.attempts[number]
        if not _supersedes(event.attempt, event.state, attempt, state):
            return False
        counts = self.groups[self.groups_of[number]].counts
        counts[state] -= 1
        counts[event.state] += 1
        self.states[number] = event.state
        self.attempts[number] = min(event.attempt, 255)
        self.started[number] = event.started
        self.finished[number] = event.finished
        if event.error:
            self.errors[number] = event.error
        elif event.state != RETRIED:
            self.errors.pop(number, None)
        return True

    def _group(self, event: TaskEvent) -> int:
        key = (event.name, event.cell)
        number = self._group_index.get(key)
        if number is None:
            number = self._group_index[key] = len(self.groups)
            self.groups.append(Group(event.name, event.cell, event.kind != TASK))
        return number


def _order(event: TaskEvent) -> tuple[float, bytes, bytes]:
    """Of submission. What one process submits in one go has one time, and its ids count up."""
    return event.submitted, event.task[:12], event.task[15:11:-1]


def _supersedes(attempt: int, state: int, known_attempt: int, known: int) -> bool:
    if min(attempt, 255) != known_attempt:
        return attempt > known_attempt
    return known < FINISHED and known != state


def summary(counts: Sequence[int]) -> str:
    """``1,000 tasks: 3 failed, 2 running, 995 finished``."""
    total = sum(counts)
    words = [
        (FAILED, "failed"),
        (RUNNING, "running"),
        (2, "sent to a worker"),
        (1, "queued"),
        (0, "waiting for inputs"),
        (RETRIED, "to be tried again"),
        (6, "cancelled"),
        (FINISHED, "finished"),
    ]
    said = ", ".join(f"{counts[state]:,} {word}" for state, word in words if counts[state])
    return f"{total:,} task{'' if total == 1 else 's'}" + (f": {said}" if said else "")
