"""Log records as lines: what was written in pieces is put together again, task by task. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nbray import ids
from nbray.logs import Record

_CELL = re.compile(r"In\[(\d+)\]")


@dataclass(slots=True)
class Line(Record):
    """One line of a task: without its end, and as it is seen when it was written over."""


def lines(records: Iterable[Record]) -> list[Line]:
    """The lines of records, in the order of time; what a task wrote to one stream stays in order."""
    return sorted(_lines(records), key=lambda line: line.time)


def _lines(records: Iterable[Record]) -> Iterator[Line]:
    parts: dict[tuple[bytes, str], Line] = {}
    for record in records:
        key = (record.task, record.stream)
        pieces = record.text.split("\n")
        for index, piece in enumerate(pieces):
            line = parts.get(key)
            if line is None:
                line = parts[key] = Line(
                    record.task, record.name, record.cell, record.stream, record.time, record.pid, piece
                )
            else:
                line.text += piece
            if index < len(pieces) - 1:
                yield _seen(parts.pop(key))
        if key in parts and not parts[key].text:
            del parts[key]
    for line in parts.values():
        yield _seen(line)


def _seen(line: Line) -> Line:
    """A progress bar is what it showed last."""
    if "\r" in line.text:
        line.text = line.text.rstrip("\r").rpartition("\r")[2]
    return line


def wanted(which: str) -> Callable[[bytes, str], bool]:
    """What a text chooses: ``In[7]`` a cell, else the start of a short id or of a task id in hexadecimal; "" everything.

    Raises ValueError for what is neither.
    """
    if not which:
        return lambda _task, _cell: True
    if _CELL.fullmatch(which):
        return lambda _task, cell: cell.partition(" ")[0] == which
    if not re.fullmatch(r"[0-9a-f]+", which):
        raise ValueError(
            f"logs({which!r}): give a cell (In[7]), or a task's id as nbray.state.tasks() or %cluster tasks show it"
        )
    return lambda task, _cell: ids.short(task).startswith(which) or task.hex().startswith(which)


def of_last_run(found: list[Record]) -> list[Record]:
    """Of records of one cell number, those of the run that wrote last: numbers start again with the kernel."""
    if not found:
        return found
    newest = max(found, key=lambda record: record.time).cell
    return [record for record in found if record.cell == newest]
