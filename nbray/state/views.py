"""The tables of ``nbray.state`` as folds of events and rows: from `Page` to columns.

No I/O and no Arrow here: ``ask(what, argument)`` is the engine's ``query``, and what comes out are lists, one per column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from nbray.events import (
    FINISHED,
    TASK_KINDS,
    TASK_STATES,
    ActorEvent,
    ActorRow,
    CountRow,
    Fact,
    NodeRow,
    ObjectRow,
    Page,
    PhaseRow,
    TaskEvent,
    WorkerEvent,
    WorkerRow,
)
from nbray.state.phases import add_up, merge

Ask = Callable[[str, Any], Any]
Columns = dict[str, list[Any]]

UNITS = 10_000
"""Resources are counted in 1/10000."""

PHASES = {
    "waiting_for_inputs": ("submitted", "inputs_ready"),
    "queued": ("inputs_ready", "dispatched"),
    "starting": ("dispatched", "started"),
    "running": ("started", "finished"),
    "sealing": ("finished", "sealed"),
}
"""Each phase lies between two moments of a `TaskEvent`."""

R = TypeVar("R")

_tasks = msgspec.msgpack.Decoder(list[TaskEvent]).decode
# What the head has not recorded yet comes unsorted: facts of all kinds in one list.
_facts = msgspec.msgpack.Decoder(list[Fact]).decode


def pages(ask: Ask, what: str, argument: Mapping[str, Any], limit: int | None) -> list[Page]:
    """As many pages as it takes for ``limit`` batched events (None: all there are), oldest first. Only the last one has ``live`` rows."""
    found: list[Page] = []
    events, before = 0, 0
    while True:
        wanted = (
            {**argument, "before": before}
            if limit is None
            else {**argument, "before": before, "limit": limit - events}
        )
        page = msgspec.convert(ask(what, wanted), Page)
        if before:
            page.live = []
        found.append(page)
        events += sum(_length(blob) for _, blob in page.history)
        before = page.older
        if not before or (limit is not None and events >= limit):
            return found[::-1]


def task_events(ask: Ask, chosen: Mapping[str, Any], limit: int | None) -> list[tuple[str, TaskEvent]]:
    """(node id, record) of the newest ``limit`` attempts that have ended, in the order of their ends, then of those that have not.

    ``chosen``: fields of `HistoryFilter`; every record has all that it gives.
    """
    wanted = {field: value for field, value in chosen.items() if value}
    found = pages(ask, "tasks", wanted, limit)
    # An attempt may be in two batches of an answer, or both ended and live: it moved on while the answer was put together.
    ended: dict[tuple[bytes, int], tuple[str, TaskEvent]] = {}
    for page in found:
        for node, blob in page.history:
            for event in _tasks(blob):
                if _matches(event, wanted):
                    ended[event.task, event.attempt] = node, event
    rows = list(ended.values())
    if limit is not None:
        rows = rows[max(0, len(rows) - limit) :]
    for node, event in _live(found[-1], TaskEvent):
        if (event.task, event.attempt) not in ended and _matches(event, wanted):
            rows.append((node, event))
    return rows


def tasks(ask: Ask, chosen: Mapping[str, Any], limit: int | None) -> Columns:
    """One row per attempt of a task or actor call."""
    rows = task_events(ask, chosen, limit)
    columns: Columns = {
        "task_id": [e.task.hex() for _, e in rows],
        "name": [e.name for _, e in rows],
        "state": [TASK_STATES[e.state] for _, e in rows],
        "node_id": [node for node, _ in rows],
        "pid": [e.pid or None for _, e in rows],
        "attempt": [e.attempt for _, e in rows],
    }
    for phase, (start, end) in PHASES.items():
        columns[phase] = [_between(getattr(e, start), getattr(e, end)) for _, e in rows]
    columns |= {
        "kind": [TASK_KINDS[e.kind] for _, e in rows],
        "error": [e.error or None for _, e in rows],
        "job": [e.job for _, e in rows],
        "session": [e.session for _, e in rows],
        "cell": [e.cell for _, e in rows],
        "parent_id": [e.parent.hex() for _, e in rows],
        "actor_id": [e.actor.hex() or None for _, e in rows],
        "input_ids": [[d.hex() for d in e.deps or ()] for _, e in rows],
        "returns": [e.returns for _, e in rows],
        "size_bytes": [e.size for _, e in rows],
    }
    for moment in ("submitted", "inputs_ready", "dispatched", "started", "finished", "sealed"):
        columns[moment] = [getattr(e, moment) or None for _, e in rows]
    return columns


def objects(ask: Ask) -> Columns:
    """One row per object that exists, however many nodes have it."""
    found: dict[bytes, ObjectRow] = {}
    for _, row in _live(msgspec.convert(ask("objects", None), Page), ObjectRow):
        known = found.setdefault(row.object, row)
        if known is not row:
            known.nodes += row.nodes
            known.holders += row.holders
    rows = list(found.values())
    return {
        "object_id": [r.object.hex() for r in rows],
        "size_bytes": [r.size for r in rows],
        "state": [r.state for r in rows],
        "node_ids": [r.nodes for r in rows],
        "holders": [r.holders for r in rows],
    }


def actors(ask: Ask, limit: int | None) -> Columns:
    """One row per actor: those that live, and of the others the newest ``limit`` events' worth, in the order of their creation."""
    found = pages(ask, "actors", {}, limit)
    last: dict[bytes, tuple[str, ActorEvent]] = {}
    for page in found:
        for node, blob in page.history:
            for event in _facts(blob):
                if isinstance(event, ActorEvent):
                    last[event.actor] = node, event
    live = {row.actor: (node, row) for node, row in _live(found[-1], ActorRow)}
    rows: list[tuple[str, ActorEvent | ActorRow]] = [live.pop(actor, entry) for actor, entry in last.items()]
    rows += live.values()
    return {
        "actor_id": [r.actor.hex() for _, r in rows],
        "class_name": [r.class_name for _, r in rows],
        "name": [r.name or None for _, r in rows],
        "state": [r.state for _, r in rows],
        "node_id": [node for node, _ in rows],
        "pid": [r.pid or None for _, r in rows],
        "restarts": [r.restarts for _, r in rows],
        "namespace": [r.namespace for _, r in rows],
        "job": [r.job for _, r in rows],
        "reason": [(r.reason or None) if isinstance(r, ActorEvent) else None for _, r in rows],
    }


def workers(ask: Ask, limit: int | None) -> Columns:
    """One row per worker process: those that live, and those that have ended and why."""
    found = pages(ask, "workers", {}, limit)
    rows: list[tuple[str, WorkerEvent | WorkerRow]] = []
    for page in found:
        for node, blob in page.history:
            rows += [
                (node, event)
                for event in _facts(blob)
                if isinstance(event, WorkerEvent) and event.state == "ENDED"
            ]
    rows += _live(found[-1], WorkerRow)
    return {
        "pid": [r.pid for _, r in rows],
        "state": [r.state for _, r in rows],
        "task": [(r.task or None) if isinstance(r, WorkerRow) else None for _, r in rows],
        "session": [r.session or None for _, r in rows],
        "kind": [r.kind for _, r in rows],
        "node_id": [node for node, _ in rows],
        "memory_bytes": [(r.memory or None) if isinstance(r, WorkerRow) else None for _, r in rows],
        "reason": [(r.reason or None) if isinstance(r, WorkerEvent) else None for _, r in rows],
    }


def nodes(ask: Ask) -> Columns:
    """One row per node; resources as numbers of CPUs, GPUs, bytes of memory."""
    rows = [row for _, row in _live(msgspec.convert(ask("nodes", None), Page), NodeRow)]
    return {
        "node_id": [r.node for r in rows],
        "state": [r.state for r in rows],
        "resources": [[(name, amount / UNITS) for name, amount in r.resources.items()] for r in rows],
        "available": [[(name, amount / UNITS) for name, amount in r.available.items()] for r in rows],
        "pid": [r.pid for r in rows],
        "socket": [r.socket for r in rows],
    }


def phases(ask: Ask) -> Columns:
    """Ended tasks added up per name, the costliest first."""
    rows = sorted(_summed(msgspec.convert(ask("summary", None), Page)), key=_total, reverse=True)
    columns: Columns = {field: [getattr(row, field) for row in rows] for field in PhaseRow.__struct_fields__}
    columns["total"] = [_total(row) for row in rows]
    return columns


def counts(ask: Ask) -> Columns:
    """How many tasks of each name are in each state."""
    page = msgspec.convert(ask("summary", None), Page)
    rows: list[CountRow] = []
    for summed in _summed(page):
        for state in TASK_STATES[FINISHED:]:
            number = getattr(summed, state.lower())
            if number:
                rows.append(CountRow(summed.name, state, number))
    rows += [row for _, row in _live(page, CountRow)]
    rows.sort(key=lambda row: (row.name, TASK_STATES.index(row.state)))
    return {
        "name": [r.name for r in rows],
        "state": [r.state for r in rows],
        "tasks": [r.tasks for r in rows],
    }


# -- inside


def _summed(page: Page) -> list[PhaseRow]:
    by_name: dict[str, PhaseRow] = {}
    merge(msgspec.convert(page.rows, list[PhaseRow]), by_name)
    for _, blob in page.history:
        add_up(_tasks(blob), by_name)
    return list(by_name.values())


def _total(row: PhaseRow) -> float:
    return row.waiting_for_inputs + row.queued + row.starting + row.running + row.sealing


def _live(page: Page, kind: type[R]) -> Iterator[tuple[str, R]]:
    for node, rows in page.live:
        for row in msgspec.convert(rows, list[kind]):  # type: ignore[valid-type]
            yield node, row


def _between(start: float, end: float) -> float | None:
    return end - start if start and end else None


def _matches(event: TaskEvent, chosen: Mapping[str, Any]) -> bool:
    return all(
        (TASK_STATES[event.state] if field == "state" else getattr(event, field)) == value
        for field, value in chosen.items()
    )


def _length(blob: bytes) -> int:
    """Length of an encoded list, from its first bytes."""
    first = blob[0]
    if first == 0xDC:
        return int.from_bytes(blob[1:3], "big")
    return int.from_bytes(blob[1:5], "big") if first == 0xDD else first & 0x0F
