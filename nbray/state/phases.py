"""Where the time of tasks goes: a fold of task events into seconds per phase and function name."""

from __future__ import annotations

from collections.abc import Iterable

from nbray.events import CANCELLED, FAILED, FINISHED, RETRIED, PhaseRow, TaskEvent


def add_up(events: Iterable[TaskEvent], into: dict[str, PhaseRow]) -> None:
    """Add ended tasks to the rows of their names; tasks that have not ended are left out.

    A phase is the time between two neighbouring moments of a task, and counts only where both happened (a task cancelled in the
    queue never started). Phases overlap between tasks: a sum may exceed the time on the clock.
    """
    for event in events:
        if event.state < FINISHED:
            continue
        row = into.get(event.name)
        if row is None:
            row = into[event.name] = PhaseRow(event.name)
        row.tasks += 1
        if event.state == FINISHED:
            row.finished += 1
        elif event.state == FAILED:
            row.failed += 1
        elif event.state == CANCELLED:
            row.cancelled += 1
        elif event.state == RETRIED:
            row.retried += 1
        submitted, ready, dispatched, started, finished = (
            event.submitted,
            event.inputs_ready,
            event.dispatched,
            event.started,
            event.finished,
        )
        if ready and submitted:
            row.waiting_for_inputs += ready - submitted
        if dispatched and ready:
            row.queued += dispatched - ready
        if started and dispatched:
            row.starting += started - dispatched
        if finished and started:
            row.running += finished - started
        if event.sealed and finished:
            row.sealing += event.sealed - finished


def merge(rows: Iterable[PhaseRow], into: dict[str, PhaseRow]) -> None:
    """Add rows that were added up elsewhere."""
    for row in rows:
        known = into.get(row.name)
        if known is None:
            into[row.name] = row
            continue
        for field in PhaseRow.__struct_fields__[1:]:
            setattr(known, field, getattr(known, field) + getattr(row, field))
