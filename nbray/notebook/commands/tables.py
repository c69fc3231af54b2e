"""``%cluster tasks actors objects where``: what there is and what it does now, as frames. The same in plain Python: ``nbray.state``."""

from __future__ import annotations

import argparse
import linecache
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.api import context
from nbray.events import DISPATCHED, RUNNING, TASK_STATES, PlaceRow, TaskEvent
from nbray.notebook import arguments, holding, targets
from nbray.notebook.arguments import Parser, human
from nbray.notebook.cards import counted
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described
from nbray.state.explaining import called, duration, places

if TYPE_CHECKING:
    import pandas as pd

ROWS = 20
"""Rows of a frame if ``-n`` does not say how many."""


def _parser(name: str) -> Parser:
    parser = Parser(f"%cluster {name}", described(name))
    parser.add_argument(
        "-n", type=arguments.whole, default=ROWS, metavar="N", help=f"at most N rows ({ROWS})"
    )
    return parser


def _tasks_parser() -> Parser:
    parser = _parser("tasks")
    add = parser.add_argument
    add("which", nargs="*", metavar="TASK", help="only these: In[7], a short id, a variable with refs")
    add("--state", choices=[state.lower() for state in TASK_STATES], help="only those in this state")
    add("--all", action="store_true", help="those of other notebooks and scripts too")
    parser.kinds["which"] = "tasks"
    return parser


def _objects_parser() -> Parser:
    parser = _parser("objects")
    parser.add_argument("which", nargs="*", metavar="OBJECT", help="only these: a short id, a variable")
    parser.kinds["which"] = "objects"
    return parser


def _actors_parser() -> Parser:
    parser = _parser("actors")
    parser.add_argument("--all", action="store_true", help="those that have ended too")
    return parser


def _tasks(cockpit: Cockpit, options: argparse.Namespace) -> pd.DataFrame:
    events = targets.latest(
        targets.task_events(**({"state": options.state.upper()} if options.state else {}))
    )
    if options.which:
        wanted = {event.task for word in options.which for event in targets.find_tasks(cockpit, word, events)}
        events = [event for event in events if event.task in wanted]
    elif not options.all:
        mine = targets.session()
        events = [event for event in events if event.session == mine]
    states = Counter(event.state for event in events)
    cockpit.say(
        ", ".join(
            [
                counted(len(events), "task"),
                *(f"{states[state]} {TASK_STATES[state].lower()}" for state in sorted(states)),
            ]
        )
    )
    return task_frame(events[max(0, len(events) - options.n) :], static=cockpit.static)


def task_frame(events: Sequence[TaskEvent], *, static: bool = False) -> pd.DataFrame:
    """One row per task. ``static``: only what is the same in every run of a notebook."""
    columns: dict[str, list[Any]] = {
        "name": [event.name for event in events],
        "state": [TASK_STATES[event.state].lower() for event in events],
        "cell": [targets.cell_title(event.cell) for event in events],
    }
    if not static:
        now = time.monotonic()
        columns["waited"] = [
            _span(event.submitted, event.dispatched or (event.state < DISPATCHED and now) or event.finished)
            for event in events
        ]
        columns["ran"] = [
            _span(event.started, event.finished or (event.state == RUNNING and now) or 0.0)
            for event in events
        ]
        columns["pid"] = [str(event.pid) if event.pid else "" for event in events]
    if any(event.attempt for event in events):
        columns["attempt"] = [event.attempt + 1 for event in events]
    if any(event.error for event in events):
        columns["error"] = [event.error for event in events]
    return _frame(columns, [ids.short(event.task) for event in events], static=static)


def _actors(cockpit: Cockpit, options: argparse.Namespace) -> pd.DataFrame:
    from nbray.state import views

    table = views.actors(context.require().engine.query, 10_000)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    rows = [row for row in rows if options.all or row["state"] != "DEAD"]
    rows = rows[max(0, len(rows) - options.n) :]
    names = holding.names_by_object(cockpit)
    held = [names.get(ids.return_id(bytes.fromhex(row["actor_id"]), 0), []) for row in rows]
    columns: dict[str, list[Any]] = {
        "class": [row["class_name"] for row in rows],
        "name": [row["name"] or "" for row in rows],
        "state": [row["state"].lower() for row in rows],
        "held by": [", ".join(each) for each in held],
    }
    if not cockpit.static:
        columns["pid"] = [str(row["pid"] or "") for row in rows]
    if any(row["restarts"] for row in rows):
        columns["restarts"] = [row["restarts"] for row in rows]
    if any(row["reason"] for row in rows):
        columns["reason"] = [row["reason"] or "" for row in rows]
    short = [ids.short(bytes.fromhex(row["actor_id"])) for row in rows]
    return _frame(columns, short, static=cockpit.static)


def _objects(cockpit: Cockpit, options: argparse.Namespace) -> pd.DataFrame:
    rows = targets.object_rows()
    events = {event.task: event for event in targets.task_events()}
    if options.which:
        wanted = {row.object for word in options.which for row in targets.find_objects(cockpit, word, rows)}
        rows = [row for row in rows if row.object in wanted]
    cockpit.say(f"{counted(len(rows), 'object')}, {human(sum(row.size for row in rows))}")
    rows = sorted(rows, key=lambda row: -row.size)[: options.n]
    holders = holders_of(cockpit, rows, events)
    columns: dict[str, list[Any]] = {
        "size": [human(row.size) for row in rows],
        "where": [_WHERE.get(row.state, row.state.lower()) for row in rows],
        "made by": [_maker(row.object, events, static=cockpit.static) for row in rows],
        "held by": [", ".join(held) or "nobody" for held in holders],
    }
    return _frame(columns, [ids.short(row.object) for row in rows], static=cockpit.static)


_WHERE = {
    "PENDING": "not made yet",
    "INLINE": "node",
    "ERROR": "(an error)",
    "ARENA": "shared memory",
    "SPILLED": "disk",
    "LOST": "lost",
}


def _maker(object_id: bytes, events: dict[bytes, TaskEvent], *, static: bool) -> str:
    if ids.is_put(object_id):
        return "put"
    event = events.get(ids.task_of(object_id))
    if event is None:
        return ""
    cell = targets.cell_title(event.cell)
    name = event.name if static else called(event.task, event.name)
    return f"{name} in {cell}" if cell and cell != event.name else name


def holders_of(cockpit: Cockpit, rows: Sequence[Any], events: dict[bytes, TaskEvent]) -> list[list[str]]:
    """Who holds each object: variables and ``Out[n]`` of this notebook, tasks by name, other processes."""
    names = holding.names_by_object(cockpit)
    short = {ids.short(task): event.name for task, event in events.items()}
    me = f"driver {os.getpid()}"
    found = []
    for row in rows:
        mine = names.get(row.object, [])
        held = list(mine)
        here = False
        for holder in row.holders:
            views = holder.startswith("views in ")
            who = holder.removeprefix("views in ")
            if who == me:
                here = True
                continue
            kind, _, rest = who.partition(" ")
            if kind == "task":
                held.append(f"task {short[rest]} ({rest})" if rest in short else who)
            elif kind == "driver":
                held.append(f"another notebook or script (pid {rest})")
            elif kind == "name":
                if rest.partition(" ")[0] not in held:
                    held.append(f"{rest} (kept for the session)")
            elif kind == "worker":
                held.append(f"a running task (pid {rest})")
            else:
                held.append(who if not views else f"a view in {who}")
        if here and not mine:
            held.append("this notebook, in no variable of its own")
        found.append(list(dict.fromkeys(held)))
    return found


def _where(cockpit: Cockpit, _options: argparse.Namespace) -> pd.DataFrame | None:
    rows = places(context.require().engine.query)
    if not rows:
        cockpit.say("no task is running")
        return None
    columns: dict[str, list[Any]] = {
        "name": [row.name for row in rows],
        "cell": [targets.cell_title(row.cell) for row in rows],
        "for": [duration(row.seconds) for row in rows],
        "line": [current_line(cockpit, row) for row in rows],
        "code": [_code(cockpit, row) for row in rows],
        "inside": [_inside(cockpit, row) for row in rows],
    }
    return _frame(columns, [ids.short(row.task) for row in rows], static=False)


def current_line(cockpit: Cockpit, row: PlaceRow) -> str:
    """``Cell In[7], line 3, in fit``: the innermost line of the notebook's own."""
    if row.frames is None:
        return "(it does not answer: in a call that keeps the interpreter)"
    at = _own(cockpit, row)
    if at is None:
        return "waits in get or wait" if row.blocked else "(not in the user's code)"
    file, line, function = row.frames[at]
    place = _cell(cockpit, file) or os.path.basename(file)
    inside = "" if function == "<module>" else f", in {function}"
    return f"{place}, line {line}{inside}{' (waits)' if row.blocked else ''}"


def _code(cockpit: Cockpit, row: PlaceRow) -> str:
    at = _own(cockpit, row)
    if at is None or row.frames is None:
        return ""
    file, line, _ = row.frames[at]
    return linecache.getline(file, line).strip()


def _inside(cockpit: Cockpit, row: PlaceRow) -> str:
    """The innermost frame, where that is a library's."""
    at = _own(cockpit, row)
    if row.frames is None or not row.frames or at == len(row.frames) - 1:
        return ""
    file, line, function = row.frames[-1]
    return f"{function}, {os.path.basename(file)}:{line}"


def _own(cockpit: Cockpit, row: PlaceRow) -> int | None:
    frames = row.frames or []
    cells = [n for n, (file, _, _) in enumerate(frames) if _cell(cockpit, file)]
    if cells:
        return cells[-1]
    own = [
        n
        for n, (file, _, _) in enumerate(frames)
        if "site-packages" not in file and f"{os.sep}lib{os.sep}python" not in file
    ]
    return own[-1] if own else (len(frames) - 1 if frames else None)


def _cell(cockpit: Cockpit, file: str) -> str:
    named = getattr(cockpit.shell.compile, "format_code_name", lambda _: None)(file)
    return " ".join(named) if named else ""


def _span(start: float, end: float) -> str:
    return duration(end - start) if start and end else ""


def _frame(columns: dict[str, list[Any]], index: list[str], *, static: bool) -> pd.DataFrame:
    import pandas as pd

    if static:
        return pd.DataFrame(columns)
    return pd.DataFrame(columns, index=pd.Index(index))


COMMANDS = {
    "tasks": Command(_tasks_parser, _tasks),
    "actors": Command(_actors_parser, _actors),
    "objects": Command(_objects_parser, _objects),
    "where": Command(lambda: Parser("%cluster where", described("where")), _where),
}
