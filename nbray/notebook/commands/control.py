"""``%cluster why free cancel``: questions about one thing, and what is done to it. In plain Python: ``nbray.state.why``, `nbray.free`, `nbray.cancel`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from nbray import ids
from nbray.api import context
from nbray.errors import GetTimeoutError, NbrayError
from nbray.events import FINISHED, TaskEvent
from nbray.notebook import targets
from nbray.notebook.arguments import BadUsageError, Parser, human
from nbray.notebook.cards import Card, counted
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described
from nbray.notebook.commands.tables import current_line, holders_of
from nbray.state.explaining import Explainer, called

ASKED = 10
"""Tasks of a cell that ``why`` speaks about one by one."""


def _why_parser() -> Parser:
    parser = Parser("%cluster why", described("why"))
    parser.add_argument("what", metavar="X", help="a variable, a short id, In[7]")
    parser.kinds["what"] = "anything"
    return parser


def _free_parser() -> Parser:
    parser = Parser("%cluster free", described("free"))
    parser.add_argument(
        "what", nargs="+", metavar="NAME|ID", help="variables that hold refs or kept names, or ids of objects"
    )
    parser.kinds["what"] = "objects"
    return parser


def _cancel_parser() -> Parser:
    parser = Parser("%cluster cancel", described("cancel"))
    parser.add_argument(
        "what", nargs="+", metavar="TASK|In[n]", help="short ids, cells, variables that hold refs"
    )
    parser.add_argument(
        "--force", action="store_true", help="end the process at once, without the grace of 2 s"
    )
    parser.kinds["what"] = "tasks"
    return parser


def _why(cockpit: Cockpit, options: argparse.Namespace) -> None:
    cockpit.show(Card("\n".join(reasons(cockpit, options.what)), ""))


def reasons(cockpit: Cockpit, word: str) -> list[str]:
    """What ``why`` answers. Raises BadUsageError for a word that means nothing here."""
    events = targets.latest(targets.task_events())
    explain = Explainer(
        context.require().engine.query,
        events,
        time.monotonic(),
        lambda place: f"at {current_line(cockpit, place)}",
    )
    if targets.cell_number(word) is not None:
        return _of_cell(explain, targets.find_tasks(cockpit, word, events))
    stale = cockpit.trace.lineage.stale(word)
    if stale is not None:
        return [f"{stale.text}.", *_present(cockpit, explain, word, events)]
    return _present(cockpit, explain, word, events)


def _present(cockpit: Cockpit, explain: Explainer, word: str, events: list[TaskEvent]) -> list[str]:
    rows = targets.object_rows()
    try:
        objects = targets.find_objects(cockpit, word, rows)
    except BadUsageError:
        objects = []
        if word in cockpit.shell.user_ns and not any(targets.refs_in(cockpit.shell.user_ns[word])):
            return [
                f"{word} is an ordinary value of this notebook: a {type(cockpit.shell.user_ns[word]).__name__}. `del {word}` lets it go."
            ]
    known = {event.task: event for event in events}
    lines: list[str] = []
    for row, holders in zip(objects[:ASKED], holders_of(cockpit, objects[:ASKED], known), strict=True):
        lines += explain.object(row, row.object, holders)
        maker = known.get(ids.task_of(row.object))
        if row.state == "ERROR":
            lines += _error(row.object)
        elif row.state != "PENDING" and maker is not None and maker.state >= FINISHED:
            lines += explain.task(maker)
    if objects:
        return _with_rest(lines, len(objects), "objects")
    if word in cockpit.shell.user_ns:
        gone = list(dict.fromkeys(targets.refs_in(cockpit.shell.user_ns[word])))
        return _with_rest(
            [line for each in gone[:ASKED] for line in explain.object(None, each, ())], len(gone), "objects"
        )
    return [line for event in targets.find_tasks(cockpit, word, events) for line in explain.task(event)]


def _error(object_id: bytes) -> list[str]:
    """What reading an object raises: its last line."""
    engine = context.require().engine
    try:
        engine.get([engine.ref(object_id)], 1.0)
    except GetTimeoutError:
        return []
    except NbrayError as error:
        return [
            f"  {type(error).__name__}: {line}" if ":" not in line else f"  {line}"
            for line in str(error).splitlines()[-1:]
        ]
    return []


def _of_cell(explain: Explainer, events: list[TaskEvent]) -> list[str]:
    waiting = [event for event in events if event.state < FINISHED]
    if not waiting:
        slowest = max(events, key=lambda event: event.finished - event.submitted)
        return [
            f"{counted(len(events), 'task')} of this cell have ended; the one that took longest:"
            if len(events) > 1
            else "",
            *explain.task(slowest),
        ][len(events) == 1 :]
    lines = [line for event in waiting[:ASKED] for line in explain.task(event)]
    return _with_rest(list(dict.fromkeys(lines)), len(waiting), "tasks")


def _with_rest(lines: list[str], count: int, noun: str) -> list[str]:
    return lines if count <= ASKED else [*lines, f"... and {count - ASKED} more {noun}"]


def _free(cockpit: Cockpit, options: argparse.Namespace) -> None:
    rows = targets.object_rows()
    found = {row.object: row for word in options.what for row in targets.find_objects(cockpit, word, rows)}
    if not found:
        cockpit.say("there is nothing to free: the values are gone already")
        return
    engine = context.require().engine
    engine.free([engine.ref(each) for each in found])
    cockpit.say(
        f"{counted(len(found), 'object')} freed, {human(sum(row.size for row in found.values()))}; get of their refs raises an error from now on"
    )


def _cancel(cockpit: Cockpit, options: argparse.Namespace) -> None:
    events = targets.latest(targets.task_events())
    chosen: dict[bytes, TaskEvent] = {}
    for word in options.what:
        chosen |= {event.task: event for event in targets.find_tasks(cockpit, word, events)}
    open_ = [event for event in chosen.values() if event.state < FINISHED]
    engine: Any = context.require().engine
    for event in open_:
        engine.cancel_task(event.task, force=options.force)
    if not open_:
        cockpit.say(
            "nothing to cancel: "
            + ", ".join(f"{called(e.task, e.name)} has ended" for e in list(chosen.values())[:3])
        )
    elif cockpit.static:
        cockpit.say(f"{counted(len(open_), 'task')} cancelled")
    else:
        names = ", ".join(called(event.task, event.name) for event in open_[:3])
        cockpit.say(f"{counted(len(open_), 'task')} cancelled: {names}{', ...' if len(open_) > 3 else ''}")


COMMANDS = {
    "why": Command(_why_parser, _why),
    "free": Command(_free_parser, _free),
    "cancel": Command(_cancel_parser, _cancel),
}
