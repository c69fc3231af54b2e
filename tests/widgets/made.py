"""Task graphs for tests, and the fixtures that Python and TypeScript share. ``python -m tests.widgets.made`` writes those anew."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from nbray import ids
from nbray.events import FAILED, FINISHED, QUEUED, RUNNING, WAITING, TaskEvent
from nbray.messages import ACTOR_CALL, CREATE_ACTOR, TASK
from nbray.state.graph import Graph
from nbray.state.layout import Layered
from nbray.widgets.frames import Mark, frames
from tests.gcs.heads import task_event

FIXTURES = Path(__file__).resolve().parents[2] / "extension" / "tests" / "fixtures"
CELL = "In[3] abc 0123 kernel-3"


def made(
    number: int,
    state: int = FINISHED,
    *,
    name: str = "work",
    after: Sequence[int] = (),
    parent: int = -1,
    kind: int = TASK,
    actor: int = -1,
    attempt: int = 0,
    error: str = "",
    cell: str = CELL,
) -> TaskEvent:
    """The record of task ``number``, whose arguments the tasks ``after`` have made."""
    return task_event(
        number,
        name,
        state,
        cell=cell,
        kind=kind,
        attempt=attempt,
        error=error,
        deps=[ids.return_id(task_id(n), 0) for n in after] or None,
        parent=task_id(parent) if parent >= 0 else b"driver",
        actor=task_id(actor) if actor >= 0 else b"",
        started=number + 5.0 if state >= RUNNING else 0.0,
        finished=number + 6.5 if state >= FINISHED else 0.0,
    )


def task_id(number: int) -> bytes:
    return number.to_bytes(16, "little")


def pipeline() -> list[list[TaskEvent]]:
    """A cell's life in four steps: tasks with data, control and stateful edges; one that fails, one that is tried again."""
    begun = [made(n, RUNNING if n < 2 else QUEUED, name="load") for n in range(6)]
    begun += [made(6, WAITING, name="merge", after=[0, 1, 2, 3])]
    begun += [made(7, QUEUED, name="Model.__init__", kind=CREATE_ACTOR)]
    begun += [made(8, WAITING, name="Model.train", kind=ACTOR_CALL, actor=7, after=[6])]
    begun += [made(9, WAITING, name="Model.train", kind=ACTOR_CALL, actor=7, after=[6])]
    return [
        begun,
        [made(n, name="load") for n in range(5)] + [made(7, name="Model.__init__", kind=CREATE_ACTOR)],
        [
            made(5, FAILED, name="load", error="ValueError"),
            made(6, RUNNING, name="merge", attempt=1),
            made(10, RUNNING, name="split", parent=6, cell=""),
        ],
        [made(n, name="split", parent=6, cell="") for n in range(10, 14)]
        + [made(6, name="merge", attempt=1)]
        + [made(n, name="Model.train", kind=ACTOR_CALL, actor=7, after=[6]) for n in (8, 9)],
    ]


def drawn(seed: int, count: int) -> list[list[TaskEvent]]:
    """A random graph that appears in steps and changes its states."""
    chance = random.Random(seed)
    events = [
        made(
            n,
            QUEUED,
            name=f"f{chance.randrange(5)}",
            after=chance.sample(range(n), min(n, chance.randrange(4))),
            parent=chance.randrange(n) if n and chance.random() < 0.2 else -1,
        )
        for n in range(count)
    ]
    steps: list[list[TaskEvent]] = []
    at = 0
    while at < count:
        size = chance.randrange(1, 40)
        steps.append(events[at : at + size])
        at += size
        shown = min(at, count)
        over = chance.sample(range(shown), min(shown, 5))
        steps.append(
            [
                msgspec.structs.replace(events[n], state=FINISHED, started=n + 5.0, finished=n + 6.5)
                for n in over
            ]
        )
    return steps


def told(steps: list[list[TaskEvent]]) -> dict[str, Any]:
    """The fixture of a graph: the frames of its life, and what a reader knows at the end."""
    graph, mark = Graph(), Mark()
    sent: list[bytes] = []
    for number, step in enumerate(steps):
        changed = graph.apply(step)
        sent += frames(graph, mark, changed, origin=1.0, now=10.0 + number, reset=number == 0)
    layout = Layered()
    for parents in graph.parents():
        layout.place(parents)
    return {
        "frames": [base64.b64encode(frame).decode() for frame in sent],
        "nodes": len(graph),
        "states": list(graph.states),
        "attempts": list(graph.attempts),
        "kinds": list(graph.kinds),
        "groups": [[g.name, g.title, g.actor, g.counts] for g in graph.groups],
        "group_of": list(graph.groups_of),
        "edges": [list(edge) for edge in zip(graph.sources, graph.targets, graph.edge_kinds, strict=True)],
        "group_edges": sorted([*edge, count] for edge, count in graph.group_edges.items()),
        "errors": {str(node): error for node, error in graph.errors.items()},
        "columns": layout.columns,
        "rows": layout.rows,
    }


def fixtures() -> dict[str, Any]:
    """By file name."""
    return {"pipeline": told(pipeline()), "drawn": told(drawn(7, 400))}


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name, fixture in fixtures().items():
        (FIXTURES / f"{name}.json").write_text(json.dumps(fixture, separators=(",", ":")) + "\n")
