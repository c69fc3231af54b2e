"""Answers questions about history from the database, in a thread of its own: asking never holds up the head's loop or its writer."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nbray.events import TASK_STATES, ActorEvent, Fact, Page, PhaseRow, TaskEvent, WorkerEvent
from nbray.gcs.messages import HistoryFilter
from nbray.gcs.storage import Storage
from nbray.gcs.tables import FUNCTION_BLOBS

PAGE_BYTES = 8 << 20
"""A page stops growing here, whatever its limit: neither node nor head ever holds much more than this for a question."""

NEVER = (1 << 63) - 1
"""`Page.sequence` of all but the newest page: the asking node has nothing to add to it."""

TASKS, ACTORS, WORKERS, SUMMARY, FUNCTION = "tasks", "actors", "workers", "summary", "function"
QUESTIONS = frozenset({TASKS, ACTORS, WORKERS, SUMMARY, FUNCTION})

_encode = msgspec.msgpack.Encoder().encode
_decode_tasks = msgspec.msgpack.Decoder(list[TaskEvent]).decode
_decode_facts = msgspec.msgpack.Decoder(list[Fact]).decode


def task_matches(event: TaskEvent, chosen: HistoryFilter) -> bool:
    """Whether a task event has all that the filter gives."""
    return (
        (not chosen.name or event.name == chosen.name)
        and (not chosen.state or TASK_STATES[event.state] == chosen.state)
        and (not chosen.session or event.session == chosen.session)
        and (not chosen.job or event.job == chosen.job)
        and (not chosen.cell or event.cell == chosen.cell)
        and (not chosen.parent or event.parent == chosen.parent)
        and (not chosen.task or event.task == chosen.task)
    )


def fact_matches(event: Fact, kind: type[Fact], chosen: HistoryFilter) -> bool:
    """Whether an event is of this kind and has all that the filter gives."""
    if type(event) is not kind:
        return False
    wanted = (("name", chosen.name), ("session", chosen.session), ("job", chosen.job))
    return all(not value or getattr(event, field, value) == value for field, value in wanted)


class Historian:
    """Takes questions with `ask`; ``answer(token, error, data)`` is called from its thread, ``error`` a text for people or empty."""

    def __init__(self, path: Path, answer: Callable[[object, str, bytes], None]) -> None:
        self._path = path
        self._answer = answer
        self._questions: queue.SimpleQueue[tuple[object, str, str, bytes]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._phases: dict[str, PhaseRow] = {}
        self._added_up = 0

    def ask(self, token: object, node: str, what: str, argument: bytes) -> None:
        """Answer one of `QUESTIONS` for this node, later."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="historian", daemon=True)
            self._thread.start()
        self._questions.put((token, node, what, argument))

    def _run(self) -> None:
        while True:
            token, node, what, argument = self._questions.get()
            try:
                storage = Storage(self._path, read_only=True)
                try:
                    data = self.look_up(storage, node, what, argument)
                finally:
                    storage.close()
            except (sqlite3.Error, msgspec.MsgspecError) as error:
                self._answer(token, f"the head could not answer {what!r}: {error}", b"")
            else:
                self._answer(token, "", data)

    def look_up(self, storage: Storage, node: str, what: str, argument: bytes) -> bytes:
        """The encoded answer, from one consistent state of the database."""
        if what == FUNCTION:
            return storage.row(FUNCTION_BLOBS, argument) or b""
        with storage.snapshot():
            page = Page(sequence=storage.sequence(node))
            if what == SUMMARY:
                page.rows = self._sum(storage)
                return _encode(page)
            chosen = msgspec.msgpack.decode(argument, type=HistoryFilter) if argument else HistoryFilter()
            if chosen.before:
                page.sequence = NEVER
            _fill(page, storage, what, chosen)
            return _encode(page)

    def _sum(self, storage: Storage) -> list[PhaseRow]:
        from nbray.state.phases import add_up

        for batch in storage.news(self._added_up):
            add_up(_decode_tasks(batch.blob), self._phases)
            self._added_up = batch.id
        return list(self._phases.values())


def _fill(page: Page, storage: Storage, what: str, chosen: HistoryFilter) -> None:
    narrow = chosen != HistoryFilter(limit=chosen.limit, before=chosen.before)
    kind: type[Fact] = ActorEvent if what == ACTORS else WorkerEvent
    found, size = 0, 0
    for batch in storage.history("tasks" if what == TASKS else "facts", chosen.before):
        blob, matching = batch.blob, batch.events
        if what != TASKS:
            facts = [event for event in _decode_facts(blob) if fact_matches(event, kind, chosen)]
            blob, matching = _pack(facts)
        elif narrow:
            blob, matching = _pack([event for event in _decode_tasks(blob) if task_matches(event, chosen)])
        if matching:
            page.history.append((batch.node, blob))
            found += matching
            size += len(blob)
        if found >= chosen.limit or size >= PAGE_BYTES:
            page.older = batch.id
            break
    page.history.reverse()


def _pack(events: list[Any]) -> tuple[bytes, int]:
    return (_encode(events) if events else b""), len(events)
