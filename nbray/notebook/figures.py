"""A cell's tasks in words: the status line while they run, the summary after, a hint where one matters, one card for many equal errors. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from nbray import ids
from nbray.events import CellRow, FailureRow
from nbray.notebook.arguments import human
from nbray.notebook.cards import Card
from nbray.state.explaining import duration

SMALL_TASK = 0.001
MANY_TASKS = 500
"""So many tasks shorter than `SMALL_TASK` seconds are worth a hint."""

BUSY = 1.5
"""Cores that a task uses from which on its libraries have threads of their own."""

IDS = 3
"""Running tasks whose short ids are shown: the words that `%cluster logs` and the like understand."""

OUT_SHOWN = 100_000
"""Bytes of results that are worth a word."""


@dataclass
class Usage:
    """CPU that the workers of a cell have used: ``cpu`` seconds within ``seconds`` of their run time, on a machine with ``cores``; ``workers`` at a time."""

    cores: float = 0.0
    cpu: float = 0.0
    seconds: float = 0.0
    workers: int = 0

    def add(self, cpu: float, seconds: float, workers: int) -> None:
        """A worker has used ``cpu`` seconds in ``seconds``."""
        self.cpu += cpu
        self.seconds += seconds
        self.workers = max(self.workers, workers)


def unfinished(row: CellRow) -> int:
    """Tasks that are not over."""
    return max(0, row.submitted - row.finished - row.failed - row.cancelled)


def seconds_left(row: CellRow) -> float | None:
    """An estimate from what is done; None where that says nothing."""
    done, left = row.finished + row.failed, unfinished(row)
    if done < 3 or not left or row.now - row.first < 0.5:
        return None
    return left * (row.now - row.first) / done


def live(row: CellRow, waited: float) -> str:
    """``2 running (1a2b3c4d, 5e6f7a8b), 12 queued, 85 done, 1 failed; 12.0 s, about 8 s left``. ``waited``: seconds since the cell began."""
    left = unfinished(row)
    running = min(len(row.running), left)
    parts = [
        f"{number:,} {word}"
        for number, word in (
            (running, "running"),
            (left - running, "queued"),
            (row.finished, "done"),
            (row.failed, "failed"),
            (row.cancelled, "cancelled"),
        )
        if number
    ]
    if running:
        shown_ids = [ids.short(task) for _, task in row.running[:IDS]]
        parts[0] += f" ({', '.join(shown_ids)}{', ...' if running > IDS else ''})"
    time = duration(waited)
    estimate = seconds_left(row)
    if estimate is not None:
        time += f", about {duration(round(estimate) or estimate)} left"
    return f"{', '.join(parts) or 'waiting'}; {time}"


def others(reason: str, rows: Sequence[CellRow], passed: float) -> str:
    """A cell that has no tasks of its own waits for those of others, or for what somebody has named."""
    if reason:
        return f"waiting for {reason}; {duration(passed)}"
    named = [f"{_title(row)}: {unfinished(row):,} left" for row in rows[:3]]
    return f"waiting for tasks of {', '.join(named)}; {duration(passed)}"


def cells(rows: Sequence[CellRow]) -> str:
    """Titles of cells."""
    return ", ".join(map(_title, rows[:3]))


def waited(reason: str, before: str, passed: float) -> str:
    """What is left of `others` when the wait is over."""
    return f"waited {duration(passed)} for {reason or f'tasks of {before}'}"


def _title(row: CellRow) -> str:
    return row.cell.partition(" ")[0] or "no cell"


def summary(row: CellRow, inputs: str = "") -> str:
    """``100 tasks: 12.4 s of work in 3.3 s (3.8x), in 1.2 GB (reused), out 3 MB``; ``inputs``: the words about them, if somebody knows more."""
    ended = row.finished + row.failed + row.cancelled
    wall = max(row.last - row.first, 1e-9)
    parts = []
    if row.ran:
        work = f"{duration(row.seconds)} of work in {duration(wall)}"
        if row.ran > 1:
            work += f" ({row.seconds / wall:.1f}x)"
        parts.append(work)
    if inputs:
        parts.append(inputs)
    elif row.read >= OUT_SHOWN:
        parts.append(f"in {human(row.read)}")
    if row.out >= OUT_SHOWN:
        parts.append(f"out {human(row.out)}")
    if row.failed:
        parts.append(f"{row.failed:,} failed")
    if row.cancelled:
        parts.append(f"{row.cancelled:,} cancelled")
    if unfinished(row):
        parts.append(f"{unfinished(row):,} still running or queued")
    tasks = f"{ended + unfinished(row):,} tasks: " if row.submitted > 1 else ""
    return tasks + ", ".join(parts or ["nothing ran"])


def hint(row: CellRow, usage: Usage) -> str:
    """The one thing that is worth changing, or nothing."""
    if row.ran >= MANY_TASKS and row.seconds / row.ran < SMALL_TASK:
        mean = row.seconds / row.ran * 1000
        return f"tasks take {mean:.2g} ms: nbray.map(f, items) sends many at once"
    if usage.seconds >= 0.5 and usage.cores > 1:
        each = usage.cpu / usage.seconds
        if each >= BUSY and each * usage.workers >= 0.8 * usage.cores:
            return (
                f"a task used {each:.1f} cores: numeric libraries (BLAS) already used all {usage.cores:g}, "
                "so more tasks at once will not be faster"
            )
    return ""


def failures_card(row: CellRow) -> Card:
    """One card for all errors of a cell's tasks: equal ones are one line with a count, the most frequent first."""
    rows = sorted(row.failures, key=lambda failure: -(failure.tasks + failure.dependants))
    title = f"{row.failed:,} of {row.submitted:,} tasks failed"
    lines = [_failure(failure) for failure in rows]
    known = sum(failure.tasks + failure.dependants for failure in rows)
    if known < row.failed:
        lines.append(f"{row.failed - known:,} x other errors")
    text = "\n".join([title, *(f"  {line}" for line in lines)])
    items = "".join(f"<div style='margin-left:1em'>{html.escape(line)}</div>" for line in lines)
    return Card(text, f"<div><strong>{html.escape(title)}</strong>{items}</div>")


def _failure(failure: FailureRow) -> str:
    what = f"{failure.name}: {failure.text}" if failure.text else failure.name
    where = f"{failure.task_name} {ids.short(failure.task)}"
    if not failure.tasks:
        return f"{failure.dependants:,} x {what} (in something that they depended on; first {where})"
    more = f", and {failure.dependants:,} that depended on them" if failure.dependants else ""
    place = where if failure.tasks == 1 else f"first {where}"
    return f"{failure.tasks:,} x {what} ({place}{more})"


def shown(text: str, advice: str = "") -> dict[str, str]:
    """A status line as a bundle of representations."""
    hinted = f"{text}\n  hint: {advice}" if advice else text
    page = f"<span style='opacity:.7'>{html.escape(text)}</span>"
    if advice:
        page += f"<br><span style='opacity:.7'>hint: {html.escape(advice)}</span>"
    return {"text/plain": hinted, "text/html": page}
