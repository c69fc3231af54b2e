"""The timeline as other programs read it."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nbray.events import FAILED, RUNNING, TaskEvent
from nbray.messages import ACTOR_CALL
from nbray.state.timeline import trace
from tests.gcs.heads import task_event


def bars(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["ph"] == "X"]


def test_a_task_is_a_bar_on_its_worker() -> None:
    event = task_event(1, "fit", FAILED, error="ValueError", started=2.5, finished=4.0)
    found = trace([("n1", event)])
    assert bars(found) == [
        {
            "name": "fit",
            "cat": "TASK",
            "ph": "X",
            "pid": 1,
            "tid": 4711,
            "ts": 2.5e6,
            "dur": 1.5e6,
            "args": {
                "task_id": event.task.hex(),
                "state": "FAILED",
                "attempt": 0,
                "node_id": "n1",
                "job": 1,
                "cell": "cell-1",
                "error": "ValueError",
            },
        }
    ]
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in found if e["ph"] == "M"}
    assert names == {("process_name", 1, 0): "node n1", ("thread_name", 1, 4711): "worker 4711"}
    assert json.loads(msgspec.json.encode(found)) == found


def test_what_never_started_is_left_out_and_what_runs_lasts_until_now() -> None:
    never = task_event(1, started=0.0)
    runs = task_event(2, state=RUNNING, started=10.0, finished=0.0, sealed=0.0)
    ended = task_event(3, started=11.0, finished=30.0, pid=2)
    assert [
        (e["name"], e["ts"], e["dur"]) for e in bars(trace([("n1", never), ("n1", runs), ("n1", ended)]))
    ] == [
        ("work", 10e6, 20e6),
        ("work", 11e6, 19e6),
    ]
    assert trace([]) == trace([("n1", never)]) == []


spans = st.tuples(st.sampled_from(["n1", "n2"]), st.integers(1, 3), st.integers(1, 30), st.integers(0, 9))


@given(st.lists(spans, max_size=30))
def test_bars_of_one_lane_never_overlap_and_none_is_lost(drawn: list[tuple[str, int, int, int]]) -> None:
    events: list[tuple[str, TaskEvent]] = [
        (node, task_event(n, kind=ACTOR_CALL, pid=pid, started=float(start), finished=float(start + length)))
        for n, (node, pid, start, length) in enumerate(drawn)
    ]
    found = trace(events)
    lanes = defaultdict(list)
    for bar in bars(found):
        lanes[bar["pid"], bar["tid"]].append((bar["ts"], bar["ts"] + bar["dur"]))
    for taken in lanes.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert sorted(bar["args"]["task_id"] for bar in bars(found)) == sorted(e.task.hex() for _, e in events)
    named = {(e["pid"], e["tid"]) for e in found if e["name"] == "thread_name"}
    assert named == set(lanes)
