"""The fold of events to a graph, its layout, its frames and its picture."""

from __future__ import annotations

import json
import struct
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbray.events import FINISHED, QUEUED, RETRIED, RUNNING, WAITING, TaskEvent
from nbray.messages import ACTOR_CALL, CREATE_ACTOR
from nbray.state.graph import CONTROL, DATA, STATEFUL, Graph, summary
from nbray.state.layout import Layered
from nbray.widgets import drawing
from nbray.widgets.frames import HEADER, MOST, RESET, Mark, frames
from tests.widgets.made import FIXTURES, drawn, fixtures, made, pipeline, task_id


def of(*steps: Iterable[TaskEvent]) -> Graph:
    graph = Graph()
    for step in steps:
        graph.apply(step)
    return graph


def edges(graph: Graph) -> set[tuple[int, int, int]]:
    return set(zip(graph.sources, graph.targets, graph.edge_kinds, strict=True))


def test_edges_are_of_data_control_and_state() -> None:
    graph = of([made(0), made(1, after=[0]), made(2, parent=1), made(3, kind=CREATE_ACTOR)])
    graph.apply([made(n, kind=ACTOR_CALL, actor=3) for n in (4, 5)])
    assert edges(graph) == {(0, 1, DATA), (1, 2, CONTROL), (3, 4, STATEFUL), (4, 5, STATEFUL)}


def test_parents_come_before_children_whatever_the_order_of_the_events() -> None:
    graph = of([made(2, after=[1]), made(1, after=[0]), made(0)])
    assert edges(graph) == {(0, 1, DATA), (1, 2, DATA)}
    assert graph.tasks == [task_id(n) for n in range(3)]


def test_what_is_submitted_in_one_go_is_in_the_order_of_its_ids() -> None:
    def counted(number: int, **fields: Any) -> TaskEvent:
        task = b"e" * 12 + number.to_bytes(4, "little")
        return msgspec.structs.replace(made(0), task=task, submitted=1.0, **fields)

    second = counted(300, deps=[b"e" * 12 + (255).to_bytes(4, "little") + bytes(4)])
    graph = of([second, counted(255)])
    assert edges(graph) == {(0, 1, DATA)}


def test_an_edge_from_what_is_not_known_is_left_out() -> None:
    assert edges(of([made(5, after=[1])])) == set()


@pytest.mark.parametrize(
    ("first", "then", "state"),
    [
        (made(0, QUEUED), made(0, RUNNING), RUNNING),
        (made(0, FINISHED), made(0, RUNNING), FINISHED),
        (made(0, RETRIED, error="E"), made(0, WAITING, attempt=1), WAITING),
        (made(0, RUNNING, attempt=1), made(0, RETRIED, error="E"), RUNNING),
    ],
)
def test_the_latest_attempt_counts_and_of_it_the_end(first: TaskEvent, then: TaskEvent, state: int) -> None:
    apart, together, turned = of([first], [then]), of([first, then]), of([then], [first])
    assert apart.states[0] == together.states[0] == state
    assert apart.groups[0].counts[state] == 1
    if then.state != RUNNING or first.state == FINISHED:
        assert turned.states[0] == state
    assert sum(apart.counts()) == 1


def test_an_error_is_known_until_another_attempt_succeeds() -> None:
    graph = of([made(0, RETRIED, error="ValueError")])
    assert graph.errors == {0: "ValueError"}
    graph.apply([made(0, FINISHED, attempt=1)])
    assert graph.errors == {}


def test_apply_says_what_has_changed_once() -> None:
    graph = Graph()
    assert graph.apply([made(0, QUEUED), made(0, RUNNING), made(1, QUEUED)]) == [0, 1]
    assert graph.apply([made(0, RUNNING)]) == []
    assert graph.apply([made(0), made(1, RUNNING)]) == [0, 1]


def test_groups_are_of_function_and_cell() -> None:
    graph = of([made(0), made(1), made(2, name="other"), made(3, cell="In[4] x y z")])
    assert [(g.name, g.title, g.size) for g in graph.groups] == [
        ("work", "In[3]", 2),
        ("other", "In[3]", 1),
        ("work", "In[4]", 1),
    ]


def test_ancestors() -> None:
    graph = of([made(0), made(1), made(2, after=[0]), made(3, after=[2]), made(4, after=[1])])
    assert graph.ancestors([3]) == [0, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 120))
def test_steps_and_one_go_give_the_same_graph(seed: int, count: int) -> None:
    steps = drawn(seed, count)
    apart, together = of(*steps), of([event for step in steps for event in step])
    assert apart.states == together.states
    assert edges(apart) == edges(together)
    assert [g.counts for g in apart.groups] == [g.counts for g in together.groups]
    assert apart.group_edges == together.group_edges
    assert all(source < target for source, target, _ in edges(apart))
    for number, group in enumerate(apart.groups):
        states = [s for s, g in zip(apart.states, apart.groups_of, strict=True) if g == number]
        assert group.counts == [states.count(state) for state in range(8)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layout_has_no_overlaps_and_leads_forward(data: st.DataObject) -> None:
    layout = Layered()
    parents: list[list[int]] = []
    for node in range(data.draw(st.integers(1, 80))):
        parents.append(data.draw(st.lists(st.integers(0, node - 1), max_size=4)) if node else [])
        before = list(zip(layout.columns, layout.rows, strict=True))
        assert layout.place(parents[-1]) == node
        assert list(zip(layout.columns, layout.rows, strict=True))[:node] == before
    places = list(zip(layout.columns, layout.rows, strict=True))
    assert len(set(places)) == len(places)
    assert all(row >= 0 for _, row in places)
    for node, above in enumerate(parents):
        assert layout.columns[node] == max((layout.columns[p] + 1 for p in above), default=0)


def test_a_row_is_the_nearest_free_one() -> None:
    layout = Layered()
    for _ in range(5):
        layout.place([])
    for _ in range(4):
        layout.place([2])
    assert layout.rows[5:] == [2, 3, 1, 4]


def test_many_children_of_one_task_are_no_quadratic_work() -> None:
    def seconds(count: int) -> float:
        layout = Layered()
        layout.place([])
        began = time.process_time()
        for _ in range(count):
            layout.place([0])
        return time.process_time() - began

    seconds(1000)
    assert seconds(20_000) < 40 * max(seconds(2_000), 0.001)


# -- frames


def test_fixtures_are_those_that_typescript_is_tested_with() -> None:
    for name, fixture in fixtures().items():
        saved = json.loads((FIXTURES / f"{name}.json").read_text())
        assert saved == json.loads(json.dumps(fixture)), "run: python -m tests.widgets.made"


def test_nothing_to_say_is_no_frame() -> None:
    graph, mark = of([made(0)]), Mark()
    assert len(frames(graph, mark, [], origin=0.0, now=0.0, reset=True)) == 1
    assert frames(graph, mark, [], origin=0.0, now=0.0) == []
    assert len(frames(graph, mark, [0], origin=0.0, now=0.0)) == 1


def test_an_empty_graph_is_one_frame_when_asked_for() -> None:
    (frame,) = frames(Graph(), Mark(), [], origin=0.0, now=3.0, reset=True)
    assert HEADER.unpack_from(frame)[1:10] == (RESET, 0, 0, 0, 0, 0, 0, 0, 0)


def test_large_graphs_go_in_small_frames_with_all_edges_of_their_nodes() -> None:
    count = 3 * MOST
    graph = of([made(n, after=[max(0, n - 2), max(0, n - 1)] if n else []) for n in range(count)])
    graph.apply([made(count, after=list(range(count)))])
    found = frames(graph, Mark(), [], origin=0.0, now=0.0, reset=True)
    nodes = many = 0
    for number, frame in enumerate(found):
        _, flags, sequence, first, new, first_edge, new_edges, changes, *_ = HEADER.unpack_from(frame)
        assert (flags, sequence, first, first_edge) == (RESET if number == 0 else 0, number, nodes, many)
        assert changes == new
        assert len(frame) < 256 * 1024
        targets = struct.unpack_from(f"<{new_edges}I", frame, HEADER.size + 4 * new + 4 * new_edges)
        assert all(first <= target < first + new for target in targets)
        nodes, many = nodes + new, many + new_edges
    assert (nodes, many) == (len(graph), len(graph.sources))


# -- pictures


def test_a_picture_has_presentation_attributes_only() -> None:
    for steps in (pipeline(), drawn(3, 900)):
        graph = of(*steps)
        picture = drawing.svg(graph, "Tasks of <In[3]>", "%graph In[3]")
        root = ET.fromstring(picture)
        kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert kinds <= {"svg", "g", "rect", "text", "path", "title"}
        assert not {key for element in root.iter() for key in element.attrib} & {
            "style",
            "class",
            "id",
            "href",
        }
        said = "".join(root.itertext())
        assert "Live again: %graph In[3]" in said
        assert all(group.name[:10] in said for group in graph.groups)


def test_a_picture_of_many_tasks_is_small() -> None:
    names = [f"function_with_a_long_name_{n}" for n in range(500)]
    graph = of([made(n, name=names[n % 500], after=range(max(0, n - 3), n)) for n in range(20_000)])
    picture = drawing.svg(graph, "Tasks", "%graph")
    assert len(picture.encode()) <= drawing.LIMIT
    assert "20,000 tasks" in picture
    assert "more functions" in picture


def test_text_says_what_is_there() -> None:
    graph = of(*pipeline())
    assert drawing.text(graph, "Tasks of In[3]").splitlines() == [
        "Tasks of In[3]: 14 tasks: 1 failed, 13 finished",
        "  load (In[3])            6 tasks: 1 failed, 5 finished",
        "  merge (In[3])           1 task: 1 finished",
        "  Model.__init__ (In[3])  1 task: 1 finished",
        "  Model.train (In[3])     2 tasks: 2 finished",
        "  split                   4 tasks: 4 finished",
    ]
    assert summary([0] * 8) == "0 tasks"
    assert drawing.svg(Graph(), "Nothing", "%graph").startswith("<svg")
