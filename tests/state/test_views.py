"""The folds behind the tables: from pages of events to columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbray import state
from nbray.events import (
    CANCELLED,
    FAILED,
    FINISHED,
    QUEUED,
    RETRIED,
    RUNNING,
    ActorEvent,
    ActorRow,
    CountRow,
    NodeRow,
    ObjectRow,
    Page,
    PhaseRow,
    TaskEvent,
    WorkerEvent,
    WorkerRow,
)
from nbray.state import phases, views
from tests.gcs.heads import HeadProcess, NodeSide, number_of, task_event


def encoded(events: list[Any]) -> bytes:
    return msgspec.msgpack.encode(events)


def plain(page: Page) -> Any:
    """As an engine returns it: through the wire, undecoded."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(page))


def one(page: Page) -> views.Ask:
    return lambda what, argument: plain(page)


def paged(total: int, size: int) -> views.Ask:
    """A head with ``total`` tasks in batches of ``size``, one batch per page, numbered from 1."""
    batches = [
        [task_event(n) for n in range(first, min(first + size, total))] for first in range(0, total, size)
    ]

    def ask(what: str, argument: Any) -> Any:
        number = (argument["before"] or len(batches) + 1) - 1
        older = number if number > 1 else 0
        return plain(
            Page(
                history=[("n1", encoded(batches[number - 1]))],
                live=[("n1", [task_event(total, state=RUNNING)])],
                older=older,
            )
        )

    return ask


def rows(columns: views.Columns, *fields: str) -> list[tuple[Any, ...]]:
    return list(zip(*(columns[field] for field in fields), strict=True))


def test_a_task_has_a_row_per_attempt_with_its_phases() -> None:
    first = task_event(1, state=RETRIED, error="WorkerCrashedError", deps=[b"d" * 20], actor=b"a" * 16)
    second = task_event(1, attempt=1)
    waiting = task_event(2, state=QUEUED, pid=0, dispatched=0.0, started=0.0, finished=0.0, sealed=0.0)
    page = Page(history=[("n1", encoded([first])), ("n2", encoded([second]))], live=[("n2", [waiting])])
    columns = views.tasks(one(page), {}, 10)
    assert rows(columns, "task_id", "name", "state", "node_id", "pid", "attempt", "error") == [
        (first.task.hex(), "work", "RETRIED", "n1", 4711, 0, "WorkerCrashedError"),
        (first.task.hex(), "work", "FINISHED", "n2", 4711, 1, None),
        (waiting.task.hex(), "work", "QUEUED", "n2", None, 0, None),
    ]
    assert rows(columns, *views.PHASES)[1:] == [(1.0, 2.0, 3.0, 4.0, 5.0), (1.0, None, None, None, None)]
    assert rows(columns, "submitted", "started", "sealed")[2] == (3.0, None, None)
    assert columns["input_ids"] == [[(b"d" * 20).hex()], [], []]
    assert columns["actor_id"] == [(b"a" * 16).hex(), None, None]


def test_what_ended_while_the_answer_was_put_together_is_there_once() -> None:
    done = task_event(1)
    page = Page(
        history=[("n1", encoded([done])), ("n1", encoded([done]))],
        live=[("n1", [task_event(1, state=RUNNING)])],
    )
    assert views.tasks(one(page), {}, 10)["state"] == ["FINISHED"]


@given(st.integers(1, 60), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 80)))
def test_paging_finds_the_newest_in_order(total: int, size: int, limit: int | None) -> None:
    found = views.task_events(paged(total, size), {}, limit)
    first = 0 if limit is None else max(0, total - limit)
    assert [number_of(e) for _, e in found] == [*range(first, total), total]
    assert found[-1][1].state == RUNNING


def test_every_row_has_what_was_asked_for() -> None:
    events = [task_event(1, "a"), task_event(2, "b", FAILED), task_event(3, "a", FAILED)]
    page = Page(
        history=[("n1", encoded(events))],
        live=[("n1", [task_event(4, "a", RUNNING), task_event(5, "b", RUNNING)])],
    )
    assert views.tasks(one(page), {"name": "a", "state": "", "job": 0}, None)["task_id"] == [
        task_event(n).task.hex() for n in (1, 3, 4)
    ]
    assert views.tasks(one(page), {"state": "FAILED"}, None)["name"] == ["b", "a"]


@pytest.mark.parametrize("length", [1, 15, 16, 65535, 65536])
def test_the_length_of_an_encoded_list_is_read_from_its_head(length: int) -> None:
    assert views._length(encoded([0] * length)) == length


def test_objects_on_several_nodes_are_one_row() -> None:
    row = ObjectRow(b"o" * 20, 100, "ARENA", ["n1"], ["driver 1"])
    copy = ObjectRow(b"o" * 20, 100, "ARENA", ["n2"], ["task t"])
    columns = views.objects(one(Page(live=[("n1", [row]), ("n2", [copy])])))
    assert columns == {
        "object_id": [(b"o" * 20).hex()],
        "size_bytes": [100],
        "state": ["ARENA"],
        "node_ids": [["n1", "n2"]],
        "holders": [["driver 1", "task t"]],
    }


def test_actors_that_died_keep_their_row_and_their_reason() -> None:
    events = [
        ActorEvent(b"a" * 16, "ALIVE", 1.0, "Counter", pid=1),
        ActorEvent(b"b" * 16, "ALIVE", 2.0, "Model", "net", "notebook", pid=2),
        ActorEvent(b"a" * 16, "DEAD", 3.0, "Counter", pid=1, restarts=2, reason="killed"),
    ]
    live = [
        ActorRow(b"b" * 16, "Model", "net", "ALIVE", 2, 1, "notebook"),
        ActorRow(b"c" * 16, "Late", "", "PENDING", 0, 0),
    ]
    columns = views.actors(one(Page(history=[("n1", encoded(events))], live=[("n1", live)])), 10)
    assert rows(
        columns, "actor_id", "class_name", "name", "state", "node_id", "pid", "restarts", "reason"
    ) == [
        ((b"a" * 16).hex(), "Counter", None, "DEAD", "n1", 1, 2, "killed"),
        ((b"b" * 16).hex(), "Model", "net", "ALIVE", "n1", 2, 1, None),
        ((b"c" * 16).hex(), "Late", None, "PENDING", "n1", None, 0, None),
    ]


def test_workers_that_ended_say_why() -> None:
    events = [
        WorkerEvent(1, "STARTED", 1.0),
        WorkerEvent(2, "STARTED", 1.0),
        WorkerEvent(1, "ENDED", 2.0, "nb", "task", "SIGKILL"),
    ]
    page = Page(
        history=[("n1", encoded(events))], live=[("n1", [WorkerRow(2, "RUNNING", "work", "nb", "task", 5)])]
    )
    assert rows(
        views.workers(one(page), 10), "pid", "state", "task", "session", "kind", "memory_bytes", "reason"
    ) == [
        (1, "ENDED", None, "nb", "task", None, "SIGKILL"),
        (2, "RUNNING", "work", "nb", "task", 5, None),
    ]


def test_resources_of_nodes_are_whole_numbers_again() -> None:
    row = NodeRow("n1", "ALIVE", {"CPU": 20000, "GPU": 5000}, {"CPU": 2500}, 7, "/run/node.sock")
    columns = views.nodes(one(Page(live=[("n1", [row])])))
    assert (columns["resources"], columns["available"]) == ([[("CPU", 2.0), ("GPU", 0.5)]], [[("CPU", 0.25)]])


def test_phases_are_added_up_and_counted_where_both_ends_happened() -> None:
    never_started = task_event(2, state=CANCELLED, dispatched=0.0, started=0.0)
    page = Page(
        rows=[PhaseRow("work", 1, 1, running=40.0)],
        history=[("n1", encoded([task_event(1), never_started, task_event(3, "slow", sealed=500.0)]))],
    )
    columns = views.phases(one(page))
    assert rows(
        columns, "name", "tasks", "finished", "cancelled", "running", "waiting_for_inputs", "queued"
    ) == [
        ("slow", 1, 1, 0, 4.0, 1.0, 2.0),
        ("work", 3, 2, 1, 44.0, 2.0, 2.0),
    ]
    assert columns["total"][0] == 1.0 + 2.0 + 3.0 + 4.0 + 486.0


states = st.sampled_from([FINISHED, FAILED, CANCELLED, RETRIED, RUNNING])
events = st.lists(st.builds(task_event, st.integers(0, 99), st.sampled_from("ab"), states))


@given(events, events)
def test_adding_up_in_two_places_equals_adding_up_in_one(
    first: list[TaskEvent], second: list[TaskEvent]
) -> None:
    whole: dict[str, PhaseRow] = {}
    phases.add_up([*first, *second], whole)
    left: dict[str, PhaseRow] = {}
    right: dict[str, PhaseRow] = {}
    phases.add_up(first, left)
    phases.add_up(second, right)
    phases.merge(right.values(), left)
    assert left == whole
    assert sum(row.tasks for row in whole.values()) == sum(e.state >= FINISHED for e in [*first, *second])


def test_the_summary_counts_ended_and_live_tasks() -> None:
    page = Page(
        rows=[PhaseRow("b", 3, 2, 1)],
        history=[("n1", encoded([task_event(1, "b")]))],
        live=[("n1", [CountRow("a", "QUEUED", 9), CountRow("b", "RUNNING", 1)])],
    )
    assert rows(views.counts(one(page)), "name", "state", "tasks") == [
        ("a", "QUEUED", 9),
        ("b", "RUNNING", 1),
        ("b", "FINISHED", 3),
        ("b", "FAILED", 1),
    ]


# -- Arrow


FOLDS: dict[str, Callable[[views.Ask], views.Columns]] = {
    "tasks": lambda ask: views.tasks(ask, {}, 10),
    "phases": views.phases,
    "summary": views.counts,
    "actors": lambda ask: views.actors(ask, 10),
    "workers": lambda ask: views.workers(ask, 10),
    "objects": views.objects,
    "nodes": views.nodes,
}
ONE_TASK = Page(history=[("n1", encoded([task_event(1, error="E", actor=b"a" * 16, deps=[b"d" * 20])]))])
FULL = {
    "tasks": ONE_TASK,
    "phases": ONE_TASK,
    "summary": ONE_TASK,
    "actors": Page(
        history=[("n1", encoded([ActorEvent(b"a" * 16, "DEAD", 1.0, "C", "n", pid=1, reason="r")]))]
    ),
    "workers": Page(
        history=[("n1", encoded([WorkerEvent(1, "ENDED", 1.0, reason="r")]))],
        live=[("n1", [WorkerRow(1, "IDLE", "t", "s", "task", 1)])],
    ),
    "objects": Page(live=[("n1", [ObjectRow(b"o" * 20, 1, "ARENA", ["n1"], ["h"])])]),
    "nodes": Page(live=[("n1", [NodeRow("n1", "ALIVE", {"CPU": 1}, {"CPU": 1}, 1)])]),
}


@pytest.mark.parametrize("kind", FOLDS)
def test_an_empty_table_has_the_types_of_a_full_one(kind: str) -> None:
    full, empty = (state._table(kind, FOLDS[kind](one(page))) for page in (FULL[kind], Page()))
    assert full.num_rows >= 1
    assert empty.num_rows == 0
    assert full.schema == empty.schema
    assert not [field.name for field in empty.schema if str(field.type) == "null"]


def test_limits_and_states_that_cannot_be_are_explained() -> None:
    with pytest.raises(ValueError, match=r"limit=0: pass a number of rows, 1 or more, or None for all"):
        state.tasks(limit=0)
    with pytest.raises(ValueError, match=r"there is no task state 'runing': did you mean 'RUNNING'\?"):
        state.tasks(state="runing")


# -- with a real head


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeSide]:
    head = HeadProcess(tmp_path)
    side = NodeSide(tmp_path, batch=100)
    try:
        yield side.register()
    finally:
        side.close()
        head.close()


def test_tables_of_a_real_head(node: NodeSide) -> None:
    def ask(what: str, argument: Any) -> Any:
        return plain(node.page(what, **(argument or {})))

    for number in range(1000):
        node.client.tasks.append(task_event(number, "ab"[number % 2]))
        node.step()
    table = state._table("tasks", views.tasks(ask, {}, None))
    assert table.column("task_id").to_pylist() == [task_event(n).task.hex() for n in range(1000)]
    newest = views.tasks(ask, {"name": "a"}, 30)
    assert newest["task_id"] == [task_event(n).task.hex() for n in range(940, 1000, 2)]
    went = views.phases(ask)
    assert (went["name"], went["tasks"], went["running"]) == (["a", "b"], [500, 500], [2000.0, 2000.0])
