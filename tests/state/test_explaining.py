"""The words of ``why``, from facts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nbray import ids
from nbray.events import ObjectRow, Page, PhaseRow, PlaceRow, TaskEvent, WaitRow
from nbray.state.explaining import Explainer, amounts, duration, listed

A, B = b"a" * 12 + b"\1\0\0\0", b"b" * 12 + b"\2\0\0\0"
FINISHED, FAILED, QUEUED = 4, 5, 1


def event(task: bytes, name: str, state: int, *moments: float, error: str = "") -> TaskEvent:
    times = [*moments, *[0.0] * (6 - len(moments))]
    return TaskEvent(task, name, 0, state, 0, 7, 1, "s", "", b"", b"", b"", None, 1, 0, error, *times)


def explainer(
    waits: dict[bytes, WaitRow],
    *events: TaskEvent,
    places: tuple[PlaceRow, ...] = (),
    phases: tuple[PhaseRow, ...] = (),
) -> Explainer:
    def ask(what: str, argument: Any) -> Any:
        if what == "why":
            page = Page(live=[("n", [waits[argument]] if argument in waits else [])])
        elif what == "where":
            page = Page(live=[("n", list(places))])
        else:
            page = Page(rows=list(phases))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(page))

    return Explainer(ask, events, now=100.0)


def test_a_wait_for_inputs_is_followed_to_its_cause() -> None:
    waits = {
        A: WaitRow(A, "fit", "INPUTS", [ids.return_id(B, 0)]),
        B: WaitRow(
            B,
            "load",
            "RESOURCES",
            needs={"GPU": 10_000},
            total={"GPU": 10_000},
            free={"GPU": 0},
            tasks=[(b"c" * 16, "train", {})],
            ahead=3,
        ),
    }
    fit, load = event(A, "fit", 0, 90.0), event(B, "load", QUEUED, 90.0)
    assert explainer(waits, fit, load).task(fit) == [
        f"fit ({ids.short(A)}) waits for the result of load ({ids.short(B)}), in line.",
        f"load ({ids.short(B)}) has its inputs and waits for 1 GPU: 0 GPU free; train ({ids.short(b'c' * 16)}) holds the rest; 3 before it in line.",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (WaitRow(A, "f", "INFEASIBLE", needs={"CPU": 640_000}, total={"CPU": 20_000}), "can never run: it needs 64 CPUs, and the cluster has 2 CPUs in all"),
        (WaitRow(A, "f", "MEMORY"), "waits for room in the object store"),
        (WaitRow(A, "f", "STARTING"), "is about to start"),
        (WaitRow(A, "f", "BEHIND", tasks=[(B, "g", {})]), f"behind g ({ids.short(B)})"),
        (WaitRow(A, "f", "ACTOR", actor_state="PENDING"), "waits until its actor is created"),
        (WaitRow(A, "f", "ACTOR", actor_state="ALIVE", tasks=[(B, "g", {})], ahead=1), "waits for its turn at its actor, behind g"),
        (WaitRow(A, "f", "BLOCKED", [ids.return_id(B, 0)]), "waits in get or wait for object"),
        (WaitRow(A, "f", "RUNNING"), "has run for 3.0 s, at x.py, line 7, in f; tasks of this name took 500 ms on average"),
    ],
)  # fmt: skip
def test_each_reason(row: WaitRow, words: str) -> None:
    place = PlaceRow(A, "f", "", "s", 1, 3.0, False, [("x.py", 7, "f")])
    waiting = event(A, "f", QUEUED, 90.0)
    text = " ".join(
        explainer({A: row}, waiting, places=(place,), phases=(PhaseRow("f", tasks=2, running=1.0),)).task(
            waiting
        )
    )
    assert words in text


def test_where_the_time_of_an_ended_task_went() -> None:
    slow = event(A, "f", FINISHED, 10.0, 10.0, 19.0, 19.1, 20.1, 20.1)
    lines = explainer({}, slow).task(slow)
    assert lines[0] == f"f ({ids.short(A)}) finished 1 min 20 s ago."
    assert (
        lines[1]
        == "Of 10.1 s: 9.0 s waiting for free resources, 100 ms on the way to its first line, 1.0 s running."
    )
    assert "more CPUs" in lines[2]
    failed = event(A, "f", FAILED, 10.0, error="ValueError")
    assert "failed with ValueError" in explainer({}, failed).task(failed)[0]


def test_objects() -> None:
    one = ids.return_id(A, 0)
    explain = explainer({}, event(A, "f", FAILED, 1.0, error="KeyError"))
    assert explain.object(ObjectRow(one, 5 << 20, "SPILLED", ["n"], []), one, ["x", "y"]) == [
        f"Object {ids.short(one)} is on disk (moved out of memory, read back when needed), 5.0 MB.",
        "It stays because it is held by x, y.",
    ]
    assert "is lost" in explain.object(ObjectRow(one, 1, "LOST", ["n"], []), one, ())[0]
    assert "KeyError" in explain.object(ObjectRow(one, 1, "ERROR", ["n"], []), one, ())[0]
    assert "not there any more" in explain.object(None, one, ())[0]


def test_words() -> None:
    assert [duration(s) for s in (0.0123, 3.44, 125, 7300)] == ["12 ms", "3.4 s", "2 min 5 s", "2 h 1 min"]
    assert (
        amounts({"CPU": 5_000, "GPU": 20_000, "memory": 3 * 2**30 * 10_000}) == "0.5 CPU, 2 GPUs, 3 GB memory"
    )
    assert listed(["a", "b", "c", "d", "e"], "tasks") == "a, b, c and 2 more tasks"
