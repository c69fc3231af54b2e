"""The node's bookkeeping against a head of a few lines that loses connections."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nbray.events import Page, TaskEvent, WorkerEvent
from nbray.gcs.client import GcsClient
from nbray.gcs.messages import (
    PROTOCOL,
    Ack,
    Batch,
    NodeRegistered,
    NodeToHead,
    Op,
    OpReply,
    Query,
    QueryReply,
    RegisterJob,
    RegisterNode,
    Stop,
    Trouble,
)
from tests.gcs.heads import number_of, task_event

JOB = RegisterJob("s", "nb", 1, "driver")


def make(**options: float) -> GcsClient:
    registration = RegisterNode(PROTOCOL, "n1", 1, 7, b"cluster", {})
    return GcsClient(registration, **{"interval": 0.05, **options})  # type: ignore[arg-type]


def connect(client: GcsClient, sequence: int = 0) -> GcsClient:
    assert [type(m) for m in client.connected()] == [RegisterNode]
    client.receive([NodeRegistered("", sequence, 1)])
    return client


def batches(messages: list[NodeToHead]) -> list[int]:
    return [m.sequence for m in messages if isinstance(m, Batch)]


def requests(messages: list[NodeToHead]) -> list[int]:
    return [m.request for m in messages if isinstance(m, Op | Query)]


def test_a_batch_is_closed_by_time_or_by_size() -> None:
    client = connect(make(batch=3))
    client.tasks.append(task_event(1))
    assert batches(client.output(10.0)) == [1]
    client.tasks.append(task_event(2))
    assert client.output(10.01) == []
    assert client.deadline() == 10.05
    client.tasks.append(task_event(3))
    client.facts.append(WorkerEvent(4711, "STARTED", 1.0))
    (batch,) = client.output(10.02)
    assert isinstance(batch, Batch)
    assert [number_of(e) for e in msgspec.msgpack.decode(batch.tasks, type=list[TaskEvent])] == [2, 3]
    assert msgspec.msgpack.decode(batch.facts, type=list[WorkerEvent]) == [WorkerEvent(4711, "STARTED", 1.0)]
    assert (batch.sequence, batch.count) == (2, 2)
    assert client.deadline() is None


def test_nothing_is_sent_before_the_head_has_accepted() -> None:
    client = make()
    client.tasks.append(task_event(1))
    client.operate(JOB, 0.0)
    assert client.output(1.0) == []
    client.connected()
    assert client.output(2.0) == []
    client.receive([NodeRegistered("", 0, 1)])
    assert [type(m) for m in client.output(2.0)] == [Batch, Op]


def test_the_window_and_the_limit_bound_what_is_under_way_and_what_waits() -> None:
    client = connect(make(batch=1, window=500, limit=2000))
    for number in range(1, 9):
        client.tasks.append(task_event(number))
        client.output(0.0)
    sent = 500 // (client.backlog // 8) + 1
    client.disconnected()
    connect(client)
    assert batches(client.output(0.0)) == list(range(1, sent + 1))
    assert client.output(0.0) == []
    while not client.full:
        client.tasks.append(task_event(0))
        client.output(0.0)
    client.receive([Ack(sent)])
    assert batches(client.output(0.0))[0] == sent + 1
    client.receive([Ack(1000)])
    assert (client.full, client.backlog) == (False, 0)


def test_what_the_head_has_not_is_sent_again_and_what_it_has_is_not() -> None:
    client = connect(make(batch=1, window=1 << 20))
    for number in range(1, 6):
        client.tasks.append(task_event(number))
        client.output(0.0)
    client.receive([Ack(2)])
    client.operate(JOB, 0.0, "first")
    client.operate(JOB, 0.0, "second")
    assert requests(client.output(0.0)) == [1, 2]
    client.receive([OpReply(1, True, b"")])
    client.disconnected()
    connect(client, sequence=4)
    again = client.output(0.0)
    assert batches(again) == [5]
    assert requests(again) == [2]


@given(st.lists(st.sampled_from(["event", "send", "ack", "lose"]), max_size=60), st.integers(200, 2000))
def test_every_batch_arrives_once_and_in_order_whatever_is_lost(script: list[str], window: int) -> None:
    client = connect(make(batch=1, window=window))
    stored: list[int] = []
    number = 0
    for step in [*script, "lose", *["send", "ack"] * len(script)]:
        if step == "event":
            number += 1
            client.tasks.append(task_event(number))
        elif step == "ack":
            client.receive([Ack(len(stored))])
        elif step == "lose":
            client.disconnected()
            connect(client, len(stored))
        else:
            for message in client.output(0.0):
                assert isinstance(message, Batch)
                assert message.sequence <= len(stored) + 1
                if message.sequence > len(stored):
                    stored.append(message.sequence)
    total = sum(step == "event" for step in script)
    assert len(stored) <= total
    assert client.tasks == []
    assert client.backlog == 0
    assert client.acknowledged == len(stored)


def test_a_refused_node_learns_why() -> None:
    client = make()
    client.connected()
    client.receive([NodeRegistered("fenced", 0, 1)])
    assert (client.registered, client.refused) == (False, "fenced")


def test_requests_are_settled_with_their_context() -> None:
    client = connect(make())
    client.operate(JOB, 0.0, "job")
    client.query("head", b"", 0.0, "head")
    client.query("nonsense", b"", 0.0, "nonsense")
    client.output(0.0)
    settled = client.receive(
        [
            QueryReply(2, "", b"facts"),
            OpReply(1, False, b"x"),
            QueryReply(3, "unknown", b""),
            OpReply(1, True, b"late"),
        ]
    )
    assert [tuple(s) for s in settled] == [
        ("head", "", True, b"facts", None),
        ("job", "", False, b"x", None),
        ("nonsense", "ValueError", False, b"unknown", None),
    ]


def test_a_head_that_never_comes_back_is_an_error_that_says_what_is_wrong() -> None:
    client = make(patience=60.0)
    client.operate(JOB, 0.0, "early")
    assert client.deadline() == 60.0
    assert client.expire(59.0) == []
    client.receive([Trouble("the disk is full")])
    client.operate(JOB, 30.0, "late")
    (settled,) = client.expire(60.0)
    assert (settled.context, settled.error, settled.ok) == ("early", "GcsUnavailableError", False)
    assert "within 60 s" in settled.data.decode()
    assert "the disk is full" in settled.data.decode()
    connect(client)
    (message,) = client.output(61.0)
    assert isinstance(message, Op)
    assert (message.request, message.settled) == (2, 0)


def test_an_answer_about_history_includes_what_the_head_does_not_have() -> None:
    client = connect(make(batch=1))
    for number in (1, 2):
        client.tasks.append(task_event(number))
        client.output(0.0)
    client.tasks.append(task_event(3))
    client.query("tasks", b"", 0.0, "tasks")
    client.output(0.0)
    # Whatever is acknowledged or happens while the question is under way must not be lost from the answer.
    client.receive([Ack(3)])
    client.tasks.append(task_event(4))
    first = msgspec.msgpack.encode([task_event(1)])
    (settled,) = client.receive(
        [QueryReply(1, "", msgspec.msgpack.encode(Page(history=[("n1", first)], sequence=1)))]
    )
    assert settled.page is not None
    assert settled.page == msgspec.msgpack.decode(settled.data, type=Page)
    events = [
        e for _, blob in settled.page.history for e in msgspec.msgpack.decode(blob, type=list[TaskEvent])
    ]
    assert [number_of(e) for e in events] == [1, 2, 3, 4]


def test_stop_sends_all_that_is_left_whatever_the_window() -> None:
    client = connect(make(batch=1, window=1))
    for number in range(1, 5):
        client.tasks.append(task_event(number))
        client.output(0.0)
    client.tasks.append(task_event(5))
    messages = client.stop(0.0, "done")
    assert batches(messages) == [2, 3, 4, 5]
    assert messages[-1] == Stop("done")
