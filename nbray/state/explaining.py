"""Why a task waits or was slow, why a value is still there: answers in words. Pure folds of what the node and the head tell.

``ask(what, argument)`` is the engine's ``query``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from nbray import ids
from nbray.events import (
    CANCELLED,
    FAILED,
    FINISHED,
    QUEUED,
    RETRIED,
    TASK_STATES,
    WAITING,
    ObjectRow,
    Page,
    PlaceRow,
    TaskEvent,
    WaitRow,
)
from nbray.state.views import PHASES, UNITS, Ask, phases

NAMED = 3
"""Tasks, inputs or holders that a sentence names; the others are counted."""

CHAIN = 20
"""Tasks along which the cause of a wait is followed."""

SLOW = 2.0
"""So many times the average is worth saying."""

WORDS = {
    "waiting_for_inputs": "waiting for its inputs",
    "queued": "waiting for free resources",
    "starting": "on the way to its first line",
    "running": "running",
    "sealing": "storing its result",
}


def duration(seconds: float) -> str:
    """``12 ms``, ``3.4 s``, ``2 min 5 s``, ``3 h 2 min``."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def amounts(resources: Mapping[str, int]) -> str:
    """``2 CPUs, 1 GPU``; memory in GB."""
    parts = []
    for name, amount in resources.items():
        number = amount / UNITS
        if name == "memory":
            parts.append(f"{number / 2**30:.3g} GB memory")
        else:
            parts.append(f"{number:g} {name}{'s' if number > 1 and name in ('CPU', 'GPU') else ''}")
    return ", ".join(parts) or "nothing"


def called(task: bytes, name: str) -> str:
    """How tasks are named to people: ``fit (1a2b3c4d)``."""
    return f"{name} ({ids.short(task)})"


def listed(parts: Iterable[str], noun: str) -> str:
    """The first few, and how many more."""
    names = list(parts)
    text = ", ".join(names[:NAMED])
    return text if len(names) <= NAMED else f"{text} and {len(names) - NAMED} more {noun}"


class Explainer:
    """Answers for one moment. ``events``: the tasks that are known, the newest attempt of each; ``now``: the host's monotonic clock."""

    def __init__(
        self, ask: Ask, events: Iterable[TaskEvent], now: float, line: Callable[[PlaceRow], str] | None = None
    ) -> None:
        """``line``: says at which line a task is (default: file, line and function of its innermost frame)."""
        self._ask = ask
        self._events = {event.task: event for event in events}
        self._now = now
        self._places: dict[bytes, PlaceRow] | None = None
        self._line = line or _innermost

    # -- tasks

    def task(self, event: TaskEvent) -> list[str]:
        """Sentences about one task: what it waits for, what it does, or where its time went."""
        if event.state < FINISHED:
            found = self._unfinished(event.task, set())
            if found:
                return found
        return self._ended(event)

    def _unfinished(self, task: bytes, seen: set[bytes]) -> list[str]:
        """Follows the chain of waits to its end."""
        row = self._waits(task)
        event = self._events.get(task)
        if row is None or len(seen) >= CHAIN or task in seen:
            return []
        seen.add(task)
        who = called(task, row.name)
        free = {name: row.free.get(name, 0) for name in row.needs if row.free.get(name, 0) < row.needs[name]}
        if row.reason == "INPUTS":
            lines = [f"{who} waits for {self._objects(row.objects)}."]
            for each in row.objects[:NAMED]:
                lines += self._unfinished(ids.task_of(each), seen)
            return lines
        if row.reason == "INFEASIBLE":
            total = {name: row.total.get(name, 0) for name in row.needs}
            return [
                f"{who} can never run: it needs {amounts(row.needs)}, and the cluster has {amounts(total)} in all.",
                f"Cancel it (%cluster cancel {ids.short(task)}), ask for less (num_cpus=, --num-cpus), or start a larger cluster.",
            ]
        if row.reason == "RESOURCES":
            held = listed((f"{called(t, name)}{self._since(t)}" for t, name, _ in row.tasks), "tasks")
            line = f"{who} has its inputs and waits for {amounts(row.needs)}: {amounts(free)} free"
            line += f"; {held} hold{'s' if len(row.tasks) == 1 else ''} the rest" if held else ""
            return [f"{line}; {row.ahead} before it in line." if row.ahead else f"{line}; it is next."]
        if row.reason == "MEMORY":
            return [
                f"{who} waits for room in the object store for its inputs; free what is not needed (%cluster objects)."
            ]
        if row.reason == "STARTING":
            return [f"{who} has all it needs; it is about to start."]
        if row.reason == "BEHIND":
            return [
                f"{who} is next in its process, behind {listed((called(t, n) for t, n, _ in row.tasks), 'tasks')}."
            ]
        if row.reason == "ACTOR":
            return self._at_actor(who, row, seen)
        place = self._place(task)
        at = f", {self._line(place)}" if place is not None and place.frames else ""
        since = (
            duration(place.seconds)
            if place is not None
            else duration(self._now - (event.started if event else self._now))
        )
        if row.reason == "BLOCKED":
            lines = [f"{who} has run for {since} and waits in get or wait for {self._objects(row.objects)}."]
            for each in row.objects[:NAMED]:
                lines += self._unfinished(ids.task_of(each), seen)
            return lines
        usual = self._usual(row.name)
        compared = f"; tasks of this name took {duration(usual)} on average" if usual is not None else ""
        return [f"{who} has run for {since}{at}{compared}."]

    def _at_actor(self, who: str, row: WaitRow, seen: set[bytes]) -> list[str]:
        if row.actor_state in ("PENDING", "RESTARTING"):
            state = "created" if row.actor_state == "PENDING" else "restarted"
            lines = [f"{who} waits until its actor is {state}."]
        elif row.ahead or row.tasks:
            lines = [
                f"{who} waits for its turn at its actor, behind {listed((called(t, n) for t, n, _ in row.tasks), 'calls')}."
            ]
        else:
            return [f"{who} is about to start in its actor."]
        for task, _, _ in row.tasks[:1]:
            lines += self._unfinished(task, seen)
        return lines

    def _ended(self, event: TaskEvent) -> list[str]:
        who = called(event.task, event.name)
        took = {
            phase: getattr(event, end) - getattr(event, start)
            for phase, (start, end) in PHASES.items()
            if getattr(event, end) and getattr(event, start)
        }
        attempt = f" (attempt {event.attempt + 1})" if event.attempt else ""
        if event.state == FAILED:
            lines = [
                f"{who} failed with {event.error or 'an error'}{attempt}; get of its result raises that."
            ]
        elif event.state == CANCELLED:
            lines = [f"{who} was cancelled{attempt}."]
        elif event.state == RETRIED:
            lines = [f"{who} failed with {event.error or 'an error'} and runs again{attempt}."]
        elif event.state == FINISHED:
            ago = f" {duration(self._now - event.finished)} ago" if event.finished else ""
            lines = [f"{who} finished{ago}{attempt}."]
        else:
            lines = [f"{who} is {TASK_STATES[event.state]}."]
        spent = [(WORDS[phase], seconds) for phase, seconds in took.items() if seconds >= 0.0005]
        if spent:
            lines.append(
                f"Of {duration(sum(seconds for _, seconds in spent))}: "
                + ", ".join(f"{duration(s)} {what}" for what, s in spent)
                + "."
            )
            lines += self._advice(event, took)
        return lines

    def _advice(self, event: TaskEvent, took: Mapping[str, float]) -> list[str]:
        worst = max(took, key=lambda phase: took[phase])
        usual = self._usual(event.name)
        if worst == "queued" and took[worst] > 0.1:
            return ["Most of it stood in line: more CPUs, or fewer CPUs per task (num_cpus=), would help."]
        if worst == "starting" and took[worst] > 0.1:
            return [
                "Most of it was the way to its first line: a process started, modules were imported, inputs were brought."
            ]
        if worst == "sealing" and took[worst] > 0.1:
            return ["Most of it was storing the result: return less, or return references."]
        if worst == "running" and usual is not None and took[worst] > SLOW * usual and took[worst] > 0.1:
            return [
                f"That is {took[worst] / usual:.1f} times what tasks of this name took on average ({duration(usual)})."
            ]
        return []

    # -- objects

    def object(self, row: ObjectRow | None, object_id: bytes, holders: Iterable[str]) -> list[str]:
        """Sentences about one object: whether it is there, where, and who holds it."""
        who = ids.short(object_id)
        if row is None:
            maker = self._events.get(ids.task_of(object_id))
            if maker is not None and maker.state < FINISHED:
                return self.task(maker)
            return [f"Object {who} is not there any more: nobody held it, or it was freed."]
        if row.state == "PENDING":
            maker = self._events.get(ids.task_of(object_id))
            return self.task(maker) if maker is not None else [f"Object {who} does not exist yet."]
        if row.state == "ERROR":
            maker = self._events.get(ids.task_of(object_id))
            if maker is not None and maker.state == FAILED:
                return self._ended(maker)
            return [f"Object {who} has no value: get of it raises an error."]
        if row.state == "LOST":
            return [
                f"Object {who} is lost: its copy could not be read, and what made it cannot be run again."
            ]
        where = {
            "INLINE": "in the node's table",
            "ARENA": "in shared memory",
            "SPILLED": "on disk (moved out of memory, read back when needed)",
        }
        names = list(holders)
        lines = [f"Object {who} is {where.get(row.state, row.state)}, {_size(row.size)}."]
        if names:
            lines.append(f"It stays because it is held by {listed(names, 'holders')}.")
        else:
            lines.append("Nobody holds it: it goes as soon as memory is needed.")
        return lines

    # -- inside

    def _objects(self, objects: list[bytes]) -> str:
        if not objects:
            return "a value"
        return listed((self._made_by(each) for each in objects), "inputs")

    def _made_by(self, object_id: bytes) -> str:
        event = self._events.get(ids.task_of(object_id))
        if event is None:
            return f"object {ids.short(object_id)}"
        state = {WAITING: "waiting itself", QUEUED: "in line"}.get(
            event.state, TASK_STATES[event.state].lower()
        )
        return f"the result of {called(event.task, event.name)}, {state}"

    def _waits(self, task: bytes) -> WaitRow | None:
        page = msgspec.convert(self._ask("why", task), Page)
        rows = [row for _, rows in page.live for row in msgspec.convert(rows, list[WaitRow])]
        return rows[0] if rows else None

    def _place(self, task: bytes) -> PlaceRow | None:
        if self._places is None:
            self._places = {row.task: row for row in places(self._ask)}
        return self._places.get(task)

    def _since(self, task: bytes) -> str:
        event = self._events.get(task)
        return f" for {duration(self._now - event.started)}" if event is not None and event.started else ""

    def _usual(self, name: str) -> float | None:
        """Seconds that tasks of this name have run, on average."""
        columns = phases(self._ask)
        for known, tasks, running in zip(columns["name"], columns["tasks"], columns["running"], strict=True):
            if known == name and tasks > 1:
                return float(running / tasks)
        return None


def _innermost(place: PlaceRow) -> str:
    if not place.frames:
        return ""
    file, line, function = place.frames[-1]
    return f"at {file}, line {line}, in {function}"


def places(ask: Ask) -> list[PlaceRow]:
    """Where running tasks are."""
    page = msgspec.convert(ask("where", None), Page)
    return [row for _, rows in page.live for row in msgspec.convert(rows, list[PlaceRow])]


def _size(size: int) -> str:
    number, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1024 or unit == "GB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"
