"""What a person means by a word after a subcommand: a variable, ``In[7]``, a short id. One place, so that all subcommands understand the same words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import ids
from nbray.api import context
from nbray.api.refs import ObjectRef, ObjectRefGenerator
from nbray.events import NameRow, ObjectRow, Page, TaskEvent
from nbray.notebook.arguments import BadUsageError, did_you_mean

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

LOOKED_AT = 10_000
"""Tasks that have ended, the newest ones, among which a short id is looked for."""

DEPTH = 3
"""Containers inside of containers in which refs of a variable are looked for."""

MANY = 10_000
"""Elements of a container that are looked at."""

_CELL = re.compile(r"In\s*\[\s*(\d+)\s*\]?")
_HEX = re.compile(r"[0-9a-f]{2,8}(\.\d+)?")


def task_events(**chosen: Any) -> list[TaskEvent]:
    """The newest tasks of the cluster, those that have not ended last; ``chosen`` as in `nbray.state.tasks`. Raises NotInitializedError."""
    from nbray.state import views

    return [event for _, event in views.task_events(_ask, chosen, LOOKED_AT)]


def object_rows() -> list[ObjectRow]:
    """The objects that exist."""
    page = msgspec.convert(_ask("objects", None), Page)
    return [row for _, rows in page.live for row in msgspec.convert(rows, list[ObjectRow])]


def find_tasks(cockpit: Cockpit, word: str, events: list[TaskEvent] | None = None) -> list[TaskEvent]:
    """The tasks meant by a short id (or the start of one), ``In[7]``, or a variable that holds refs; the newest attempt of each.

    Raises BadUsageError when there is none, naming the nearest, or when several ids start so.
    """
    known = latest(task_events() if events is None else events)
    number = cell_number(word)
    if number is not None:
        found = of_cell(known, number)
        if not found:
            raise BadUsageError(f"In[{number}] has started no tasks")
        return found
    held = _held(word)
    if word in cockpit.shell.user_ns or held:
        makers = {ids.task_of(ref) for ref in refs_in(cockpit.shell.user_ns.get(word))}
        makers |= {row[0] for row in held}
        found = [event for event in known if event.task in makers]
        if not found:
            raise BadUsageError(
                f"{word} is an ordinary value of this notebook: no task that is known here made it"
            )
        return found
    if _HEX.fullmatch(word):
        start = word.partition(".")[0]
        found = [event for event in known if ids.short(event.task).startswith(start)]
        if len(found) == 1:
            return found
        if found:
            shown = ", ".join(f"{ids.short(each.task)} ({each.name})" for each in found[:5])
            raise BadUsageError(f"{len(found)} tasks start with {word!r}: {shown}; give more of the id")
    raise unknown(cockpit, word, [event.name for event in known])


def find_objects(cockpit: Cockpit, word: str, rows: list[ObjectRow] | None = None) -> list[ObjectRow]:
    """The objects meant by a short id (or the start of one), or by a variable that holds refs or whose value a cell on the cluster made.

    Raises BadUsageError as `find_tasks`.
    """
    there = object_rows() if rows is None else rows
    if word in cockpit.shell.user_ns or _held(word):
        wanted = set(refs_in(cockpit.shell.user_ns.get(word))) | {row[1] for row in _held(word)}
        if not wanted:
            raise BadUsageError(
                f"{word} is an ordinary value of this notebook, in no object of the cluster; `del {word}` lets it go"
            )
        return [row for row in there if row.object in wanted]
    if _HEX.fullmatch(word):
        found = [row for row in there if ids.short(row.object).startswith(word)]
        if len({ids.short(row.object) for row in found}) == 1:
            return found
        if found:
            shown = ", ".join(sorted(ids.short(each.object) for each in found)[:5])
            raise BadUsageError(f"{len(found)} objects start with {word!r}: {shown}; give more of the id")
    raise unknown(cockpit, word, ())


def unknown(cockpit: Cockpit, word: str, more: Any) -> BadUsageError:
    """There is nothing of that name; says what is nearest."""
    near = did_you_mean(word, [*variables(cockpit), *dict.fromkeys(more)]) if word.isidentifier() else ""
    if near.startswith("; there are"):
        near = ""
    return BadUsageError(
        f"there is no variable, task or cell {word!r}{near} Give a variable, In[7], or an id as %cluster tasks and %cluster objects show them"
    )


def variables(cockpit: Cockpit) -> list[str]:
    """The notebook's own names."""
    shell = cockpit.shell
    return [name for name in shell.user_ns if not name.startswith("_") and name not in shell.user_ns_hidden]


def refs_in(value: Any, depth: int = DEPTH) -> Iterator[bytes]:
    """Ids of the objects that a value refers to: a ref, an actor's handle, a container of them."""
    from nbray.api.actor import ActorHandle

    if isinstance(value, ObjectRef):
        yield value.binary()
    elif isinstance(value, ObjectRefGenerator):
        yield ids.return_id(value.task_id(), 0)
    elif isinstance(value, ActorHandle):
        yield ids.return_id(value._nbray_id, 0)
    elif depth and type(value) in (list, tuple, set, frozenset, dict):
        elements = value.values() if type(value) is dict else value
        for number, element in enumerate(elements):
            if number >= MANY:
                return
            yield from refs_in(element, depth - 1)


def cell_number(word: str) -> int | None:
    """7 for ``In[7]``."""
    match = _CELL.fullmatch(word)
    return int(match[1]) if match else None


def cell_title(label: str) -> str:
    """``In[7]`` of a cell's label (`CellRun.label`), "" for what no cell has started."""
    return label.partition(" ")[0]


def of_cell(events: list[TaskEvent], number: int) -> list[TaskEvent]:
    """What the newest run of the cell with that number has started, in this notebook."""
    found = [
        event for event in events if cell_title(event.cell) == f"In[{number}]" and event.session == session()
    ]
    newest = max((event.submitted for event in found), default=0.0)
    label = next((event.cell for event in found if event.submitted == newest), "")
    return [event for event in found if event.cell == label]


def latest(events: list[TaskEvent]) -> list[TaskEvent]:
    """The newest attempt of each task, in the order of submission."""
    last: dict[bytes, TaskEvent] = {}
    for event in events:
        known = last.get(event.task)
        if known is None or event.attempt >= known.attempt:
            last[event.task] = event
    # What one process submits in one go has one time, and its ids count up.
    return sorted(last.values(), key=lambda event: (event.submitted, event.task[:12], event.task[15:11:-1]))


def session() -> str:
    """What the cluster calls this notebook."""
    return str(context.require().engine.details().get("session", ""))


def _held(name: str) -> list[tuple[bytes, bytes]]:
    """(task, object) of what the cluster holds under a name for this notebook."""
    runtime = context.current()
    if runtime is None:
        return []
    return [(row.task or ids.task_of(row.object), row.object) for row in held_rows() if row.name == name]


def held_rows() -> list[NameRow]:
    """What the cluster holds under names of this notebook, and what running cells will bind."""
    return msgspec.convert(_ask("held", session()), list[NameRow])


def _ask(what: str, argument: Any) -> Any:
    return context.require().engine.query(what, argument)
