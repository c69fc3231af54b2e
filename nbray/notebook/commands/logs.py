"""``%cluster logs``: the whole of what tasks printed, however much of it their cell shows. In plain Python: ``nbray.state.logs``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from nbray import ids, logs
from nbray.api import context
from nbray.errors import NotInitializedError
from nbray.notebook import arguments, targets
from nbray.notebook.arguments import BadUsageError, Parser, human
from nbray.notebook.cards import Card, counted
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described
from nbray.state.lines import Line, lines, of_last_run, wanted

SHOWN = 2000
"""Lines that are shown where ``--tail`` does not say how many: more would make the notebook slow."""

WIDTH = 2000


def _parser() -> Parser:
    parser = Parser("%cluster logs", described("logs"))
    add = parser.add_argument
    add(
        "which",
        nargs="*",
        metavar="TASK",
        help="In[7] (or 7), a short id, a variable with refs; without: what there is",
    )
    add("--tail", type=arguments.whole, metavar="N", help=f"the last N lines (all, up to {SHOWN})")
    add("--save", metavar="FILE", help="write them to a file instead")
    parser.kinds["which"] = "tasks"
    return parser


def _logs(cockpit: Cockpit, options: argparse.Namespace) -> None:
    directory = _directory()
    if not options.which:
        cockpit.show(Card(_contents(directory), ""))
        return
    found: list[logs.Record] = []
    for word in options.which:
        found += _records(cockpit, directory, word)
    what = ", ".join(options.which)
    if not found:
        raise BadUsageError(f"{what} has printed nothing (that is still in the logs, {directory})")
    every = lines(found)
    marked = _marked(every)
    if options.save:
        path = os.path.expanduser(options.save)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in marked)
        cockpit.say(f"{counted(len(every), 'line')} of {what} written to {path}")
        return
    last = options.tail if options.tail is not None else SHOWN
    shown = marked[len(marked) - last :] if last < len(marked) else marked
    text = "\n".join(line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in shown)
    if options.tail is None and len(shown) < len(marked):
        text = (
            f"... the last {len(shown):,} of {len(marked):,} lines; %cluster logs {what} --save FILE writes all, "
            f"nbray.state.logs() has them as a table\n{text}"
        )
    cockpit.router.text(cockpit.cell.label, f"{text}\n")


def _directory() -> str:
    runtime = context.current()
    if runtime is None:
        raise NotInitializedError(
            "there is no cluster, so there are no logs: %cluster start, or %cluster attach"
        )
    return str(runtime.engine.details()["logs"])


def _records(cockpit: Cockpit, directory: str, word: str) -> list[logs.Record]:
    number = int(word) if word.isdigit() and len(word) < ids_length() else targets.cell_number(word)
    if number is not None:
        found = list(logs.read(directory, wanted(f"In[{number}]")))
        mine = [record for record in found if cockpit.is_own(record.cell)]
        return mine or of_last_run(found)
    chosen = _chosen(cockpit, word)
    return list(logs.read(directory, chosen))


def ids_length() -> int:
    """Digits of a short id."""
    return len(ids.short(b""))


def _chosen(cockpit: Cockpit, word: str) -> Callable[[bytes, str], bool]:
    if word not in cockpit.shell.user_ns:
        try:
            return wanted(word)
        except ValueError:
            pass
    tasks = {event.task for event in targets.find_tasks(cockpit, word)}
    return lambda task, _cell: task in tasks


def _marked(every: Sequence[Line]) -> list[str]:
    """With the task in front, where there are several."""
    if len({line.task for line in every}) <= 1:
        return [line.text for line in every]
    marks: dict[bytes, str] = {}
    for line in every:
        if line.task not in marks:
            marks[line.task] = f"({line.name or 'worker'} {ids.short(line.task)}) "
    return [marks[line.task] + line.text for line in every]


def _contents(directory: str) -> str:
    """Which cells have printed how much."""
    found: dict[str, list[Any]] = {}
    for record in logs.read(directory, lambda _task, _cell: True):
        row = found.setdefault(record.cell.partition(" ")[0] or "(no cell)", [set(), 0, 0])
        row[0].add(record.task)
        row[1] += record.text.count("\n")
        row[2] += len(record.text)
    if not found:
        return "Nothing was printed by tasks so far."
    rows = [
        (cell, counted(len(tasks), "task"), f"{count:,} lines", human(size))
        for cell, (tasks, count, size) in found.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


COMMANDS = {"logs": Command(_parser, _logs)}
