"""The history of tasks as a Chrome trace: for ``chrome://tracing``, Perfetto and whatever reads their format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbray.events import TASK_KINDS, TASK_STATES, TaskEvent

LANE = 10_000_000
"""Above any pid: calls that overlap in one worker go to thread ids of their own, this far apart."""


def trace(events: Iterable[tuple[str, TaskEvent]]) -> list[dict[str, Any]]:
    """Trace events (``ph`` X; ``ts`` and ``dur`` in µs of the host's monotonic clock) of (node id, record) pairs.

    A trace process is a node, a trace thread a worker; ``args`` has the ids as hexadecimal text. Attempts that never started are left out; one
    that still runs lasts until the latest moment in ``events``.
    """
    started = sorted(((node, e) for node, e in events if e.started), key=lambda entry: entry[1].started)
    latest = max((max(e.started, e.finished) for _, e in started), default=0.0)
    processes: dict[str, int] = {}
    lanes: dict[tuple[int, int], list[float]] = {}
    found: list[dict[str, Any]] = []
    for node, event in started:
        process = processes.setdefault(node, len(processes) + 1)
        end = event.finished or latest
        free = lanes.setdefault((process, event.pid), [])
        lane = next((n for n, busy_until in enumerate(free) if busy_until <= event.started), len(free))
        free[lane : lane + 1] = [end]
        found.append(
            {
                "name": event.name,
                "cat": TASK_KINDS[event.kind],
                "ph": "X",
                "pid": process,
                "tid": event.pid + LANE * lane,
                "ts": event.started * 1e6,
                "dur": (end - event.started) * 1e6,
                "args": _arguments(node, event),
            }
        )
    return _names(processes, lanes) + found


def _arguments(node: str, event: TaskEvent) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "task_id": event.task.hex(),
        "state": TASK_STATES[event.state],
        "attempt": event.attempt,
        "node_id": node,
        "job": event.job,
    }
    optional = {"cell": event.cell, "error": event.error, "actor_id": event.actor.hex()}
    return arguments | {field: value for field, value in optional.items() if value}


def _names(processes: dict[str, int], lanes: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": f"node {node}"}}
        for node, process in processes.items()
    ]
    for (process, pid), ends in lanes.items():
        for lane in range(len(ends)):
            name = f"worker {pid}" if not lane else f"worker {pid} ({lane + 1})"
            found.append(
                {
                    "name": "thread_name",
                    "ph": "M",
                    "pid": process,
                    "tid": pid + LANE * lane,
                    "args": {"name": name},
                }
            )
    return found


def timeline(
    filename: str | Path | None = None, *, limit: int | None = 100_000
) -> list[dict[str, Any]] | None:
    """The newest ``limit`` tasks (None: all) as Chrome trace events, or, with ``filename``, written there as JSON.

    Open the file with https://ui.perfetto.dev or chrome://tracing. Raises OSError if it cannot be written.
    """
    from nbray.api.context import require
    from nbray.state.views import task_events

    events = trace(task_events(require().engine.query, {}, limit))
    if filename is None:
        return events
    import msgspec

    Path(filename).write_bytes(msgspec.json.encode(events))
    return None
