"""The head as a real process: killed, starved of disk, fenced, asked."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from nbray.events import CANCELLED, FAILED, ActorEvent, ObjectEvent, PhaseRow, TaskEvent, WorkerEvent
from nbray.gcs.messages import (
    ALIVE,
    DEAD,
    DRAINING,
    PROTOCOL,
    ActorNamed,
    Batch,
    EndJob,
    JobRecord,
    NameBind,
    NodeState,
    PutFunction,
    RegisterJob,
    RegisterNode,
)
from nbray.platform import proportional_memory
from nbray.transport.frames import encode_frame
from tests.gcs.heads import CLUSTER, PATIENCE, HeadProcess, NodeSide, number_of, task_event

JOB = RegisterJob("notebook", "analysis.ipynb", 4711, "driver", 5.0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., HeadProcess]]:
    heads: list[HeadProcess] = []

    def start(*options: str, life: bool = False, directory: Path = tmp_path) -> HeadProcess:
        heads.append(HeadProcess(directory, *options, life=life))
        return heads[-1]

    yield start
    for head in heads:
        head.close()


@pytest.fixture
def nodes() -> Iterator[Callable[..., NodeSide]]:
    sides: list[NodeSide] = []

    def make(head: HeadProcess, *args: Any, **options: Any) -> NodeSide:
        sides.append(NodeSide(head.directory, *args, **options))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


Start = Callable[..., HeadProcess]
Nodes = Callable[..., NodeSide]


def stored(head: HeadProcess) -> list[int]:
    """Sequence numbers of the batches on disk, read beside the head."""
    db = sqlite3.connect(head.database)
    try:
        return [n for (n,) in db.execute("SELECT sequence FROM batches ORDER BY id")]
    finally:
        db.close()


def all_tasks(node: NodeSide, **chosen: Any) -> list[TaskEvent]:
    """The whole history, page by page."""
    events: list[TaskEvent] = []
    before = 0
    while True:
        page = node.page("tasks", before=before, **chosen)
        found = [e for _, blob in page.history for e in msgspec.msgpack.decode(blob, type=list[TaskEvent])]
        events = found + events
        before = page.older
        if not before:
            return events


# -- life and death


def test_it_starts_serves_and_leaves_only_the_database(start: Start, nodes: Nodes, tmp_path: Path) -> None:
    head = start()
    assert stat.S_IMODE((tmp_path / "head.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(head.database.stat().st_mode) == 0o600
    assert os.getsid(head.process.pid) == head.process.pid
    command = Path(f"/proc/{head.process.pid}/cmdline").read_bytes()
    assert command.rstrip(b"\0") == b"nbray head"
    node = nodes(head).register()
    node.client.tasks.append(task_event(1))
    for message in node.client.stop(time.monotonic(), "the test is over"):
        node.send(message)
    while node.step(0.05):
        pass
    assert head.wait() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gcs.sqlite", "head.log"]
    assert stored(head) == [1]
    assert "the test is over" in head.log.read_text()


def test_it_ends_at_the_end_of_its_life_line(start: Start, nodes: Nodes) -> None:
    head = start(life=True)
    nodes(head).register()
    os.close(head.life_writer)
    head.life_writer = -1
    assert head.wait() == 0
    assert "the node has ended" in head.log.read_text()


def test_what_was_sent_before_the_life_line_ended_is_written(start: Start, nodes: Nodes) -> None:
    head = start(life=True)
    node = nodes(head, window=1 << 30).register()
    node.client.tasks += [task_event(n) for n in range(20_000)]
    for message in node.client.stop(time.monotonic()):
        node.send(message)
    while node.unsent:
        node.step(0.05)
    os.close(head.life_writer)
    head.life_writer = -1
    assert head.wait() == 0
    head.start()
    assert len(all_tasks(node.register())) == 20_000


def test_an_interrupt_does_not_end_it_and_a_termination_writes_what_came(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    head.process.send_signal(signal.SIGINT)
    assert node.operate(JOB).ok
    head.process.send_signal(signal.SIGTERM)
    assert head.wait() == 0
    head.start()
    assert [j.label for j in jobs(nodes(head).register())] == ["analysis.ipynb"]


def test_it_ends_when_no_node_comes_or_comes_back(start: Start, nodes: Nodes) -> None:
    head = start("--patience", "0.3")
    assert head.wait() == 0
    head = start("--patience", "0.3")
    node = nodes(head).register()
    node.disconnect()
    node.register()
    assert node.operate(JOB).ok
    node.disconnect()
    assert head.wait() == 0
    assert "no node is connected" in head.log.read_text()


def test_a_directory_has_one_head(start: Start, nodes: Nodes, tmp_path: Path) -> None:
    first = start()
    second = start()
    assert second.wait() == 3
    assert "another head serves" in second.log.read_text()
    assert nodes(first).register().operate(JOB).ok
    first.kill()
    assert (tmp_path / "head.sock").exists()
    second.start()
    assert nodes(second).register().operate(JOB).ok


def test_a_database_that_is_none_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "gcs.sqlite").write_bytes(b"this is no database, but long enough to look like one" * 100)
    head = start()
    assert head.wait() == 4
    assert f"cannot use the database {head.database}: file is not a database" in head.log.read_text()


def test_a_database_of_another_version_is_left_alone(start: Start, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "gcs.sqlite")
    db.execute("PRAGMA user_version=99")
    db.close()
    head = start()
    assert head.wait() == 4
    assert "schema 99" in head.log.read_text()


def test_a_long_path_is_no_problem_for_the_head(start: Start, tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    head = start(directory=directory)
    assert (directory / "head.sock").is_socket()
    assert head.process.poll() is None


def test_it_is_small_and_stays_small(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    idle = proportional_memory(head.process.pid)
    event = task_event(1)
    for _ in range(100):
        node.client.tasks.extend([event] * 1000)
        node.step()
    node.write_all()
    loaded = proportional_memory(head.process.pid)
    assert idle <= 20e6, f"{idle / 1e6:.1f} MB idle"
    assert loaded <= 30e6, f"{loaded / 1e6:.1f} MB after 100,000 tasks"


# -- what is acknowledged is on disk


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_head_loses_nothing_that_it_acknowledged(start: Start, nodes: Nodes, seed: int) -> None:
    random = Random(seed)
    head = start()
    node = nodes(head, batch=20, window=20_000).register()
    number, job_numbers = 0, []
    for _ in range(6):
        for _ in range(random.randrange(40)):
            for _ in range(random.randrange(60)):
                number += 1
                node.client.tasks.append(task_event(number))
            node.step()
        context = object()
        node.client.operate(JOB, time.monotonic(), context)
        for _ in range(random.randrange(4)):
            node.step()
        head.kill()
        acknowledged = node.client.acknowledged
        assert stored(head) == list(range(1, len(stored(head)) + 1))
        assert len(stored(head)) >= acknowledged
        head.start()
        node.register()
        node.until(lambda wanted=context: wanted in node.settled)  # type: ignore[misc]
        job_numbers.append(msgspec.msgpack.decode(node.settled[context].data))
    node.write_all()
    assert [number_of(e) for e in all_tasks(node)] == list(range(1, number + 1))
    assert job_numbers == [1, 2, 3, 4, 5, 6]
    assert [j.job for j in jobs(node)] == job_numbers


def test_a_batch_sent_twice_is_stored_once(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    batch = Batch(1, 1, 1, msgspec.msgpack.encode([task_event(1)]), b"")
    for _ in range(3):
        node.send(batch)
        node.until(lambda: node.client.acknowledged == 1)
        node.register()
    assert stored(head) == [1]


def test_a_full_disk_stops_acknowledgements_and_nothing_else(start: Start, nodes: Nodes) -> None:
    """The head's own limit on file sizes stands in for the disk's end: writing fails beyond it, as on a full disk."""
    head = start()
    node = nodes(head).register()
    node.client.tasks.append(task_event(1))
    node.write_all()
    used = max(p.stat().st_size for p in head.directory.iterdir())
    resource.prlimit(head.process.pid, resource.RLIMIT_FSIZE, (used, resource.RLIM_INFINITY))
    number = 1
    while not node.client.trouble:
        for _ in range(200):
            number += 1
            node.client.tasks.append(task_event(number))
        assert node.step(0.01)
    assert str(head.database) in node.client.trouble
    assert node.client.backlog
    context = object()
    node.client.operate(JOB, time.monotonic(), context)
    assert node.query("head").ok, "questions are still answered"
    assert node.query("tasks").ok
    assert context not in node.settled
    assert head.process.poll() is None
    resource.prlimit(
        head.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    node.write_all()
    node.until(lambda: context in node.settled)
    assert not node.client.trouble
    assert [number_of(e) for e in all_tasks(node)] == list(range(1, number + 1))
    log = head.log.read_text()
    assert log.count("cannot write") == 1
    assert "make room on that disk" in log
    assert "can write again" in log


def test_a_head_that_cannot_write_still_ends(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    used = max(p.stat().st_size for p in head.directory.iterdir())
    resource.prlimit(head.process.pid, resource.RLIMIT_FSIZE, (used, resource.RLIM_INFINITY))
    node.client.tasks.extend(task_event(n) for n in range(2000))
    node.until(lambda: bool(node.client.trouble))
    head.process.send_signal(signal.SIGTERM)
    assert head.wait() == 0
    assert "unwritten events" in head.log.read_text()


def test_history_is_bounded_and_the_newest_stay(start: Start, nodes: Nodes) -> None:
    bound = 2_000_000
    head = start("--history-bytes", str(bound))
    node = nodes(head).register()
    total = 60_000
    for first in range(0, total, 1000):
        node.client.tasks.extend(task_event(n) for n in range(first, first + 1000))
        node.write_all()
    numbers = [number_of(e) for e in all_tasks(node)]
    assert numbers == list(range(numbers[0], total))
    assert 5_000 < len(numbers) < 20_000
    assert head.database.stat().st_size < 1.5 * bound


# -- who may speak


def test_one_incarnation_of_a_node_at_a_time(start: Start, nodes: Nodes) -> None:
    head = start()
    old = nodes(head, "n1", 1).register()
    assert old.operate(ActorNamed("ns", "counter", b"a" * 16, b"info", 1)).ok
    assert old.operate(JOB).ok
    new = nodes(head, "n1", 2).register()
    while old.step(0.05):
        pass
    old.register()
    assert "was declared dead or replaced by 2" in old.client.refused
    assert [j.ended for j in jobs(new)] == [1.0]
    assert new.page("named_actors").rows == []
    assert new.operate(NodeState("n1", 1, DEAD)).ok is False
    assert new.operate(NodeState("n1", 2, DRAINING, "preempted")).ok
    assert [row[:3] for row in new.page("nodes").rows] == [["n1", 2, DRAINING]]
    new.register()
    assert [row[2] for row in new.page("nodes").rows] == [DRAINING]


def test_a_head_serves_one_cluster(start: Start, nodes: Nodes) -> None:
    head = start()
    nodes(head).register()
    stranger = nodes(head, "n2", 1, b"another-cluster").register()
    assert CLUSTER.hex() in stranger.client.refused


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (b"\xff\xff\xff\xff", "a frame of"),
        (b"\x05\x00\x00\x00hello", "protocol error"),
        (encode_frame([["not", "a", "message"]]), "protocol error"),
        (encode_frame([Batch(1, 1, 0, b"", b"")]), "Batch before RegisterNode"),
        (encode_frame([RegisterNode(PROTOCOL, "n", 1, 1, CLUSTER, {})] * 2), "a second RegisterNode"),
        (
            encode_frame([RegisterNode(PROTOCOL, "n", 1, 1, CLUSTER, {}), Batch(2, 1, 0, b"", b"")]),
            "a batch of incarnation 2",
        ),
        (
            encode_frame(
                [
                    RegisterNode(PROTOCOL, "n", 1, 1, CLUSTER, {}),
                    Batch(1, 1, 0, b"", b""),
                    Batch(1, 3, 0, b"", b""),
                ]
            ),
            "batch 3 came where 2 was expected",
        ),
    ],
)
def test_who_breaks_the_protocol_is_cut_off_alone(
    start: Start, nodes: Nodes, what: bytes, words: str
) -> None:
    head = start()
    node = nodes(head).register()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(head.directory / "head.sock"))
        sock.sendall(what)
        while sock.recv(4096):
            pass
    assert words in head.log.read_text()
    assert node.operate(JOB).ok


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(start: Start, nodes: Nodes) -> None:
    head = start()
    # Let the other user through to the socket, as a badly set up directory would.
    head.directory.chmod(0o711)
    (head.directory / "head.sock").chmod(0o666)
    code = (
        f"import os, socket; os.chdir({str(head.directory)!r}); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect('head.sock'); s.settimeout(30); assert s.recv(1) == b''"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
    assert "refused a connection of user 65534" in head.log.read_text()
    assert nodes(head).register().operate(JOB).ok


# -- what can be asked


def jobs(node: NodeSide, **chosen: Any) -> list[JobRecord]:
    return msgspec.convert(node.page("jobs", **chosen).rows, list[JobRecord])


def test_tables_survive_a_kill_and_can_be_asked_for(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    assert msgspec.msgpack.decode(node.operate(JOB).data) == 1
    assert node.operate(EndJob(1, True, 9.0)).ok
    assert node.operate(NameBind("notebook", "model", b"o" * 20, 1, "cell-1")).data == b""
    assert node.operate(NameBind("notebook", "model", b"p" * 20, 1, "cell-2")).data == b"o" * 20
    assert node.operate(ActorNamed("notebook", "counter", b"a" * 16, b"info", 1)).ok
    assert node.operate(ActorNamed("notebook", "counter", b"b" * 16, b"other", 1)).data == b"info"
    assert node.operate(PutFunction(b"f" * 16, "work", b"pickled" * 1000)).ok
    for _ in range(2):
        assert jobs(node) == [
            JobRecord(1, "notebook", "analysis.ipynb", 4711, "driver", "node-a", 5.0, 9.0, True)
        ]
        assert jobs(node, session="other") == []
        assert node.page("names", name="model").rows == [["notebook", "model", b"p" * 20, 1, "cell-2", 2]]
        assert [row[2] for row in node.page("named_actors", namespace="notebook").rows] == [b"a" * 16]
        assert node.page("functions").rows == [[b"f" * 16, "work", 7000]]
        assert node.query("function", b"f" * 16).data == b"pickled" * 1000
        assert [(row[0], row[2]) for row in node.page("nodes").rows] == [("node-a", ALIVE)]
        head.kill()
        head.start()
        node.register()
    facts = msgspec.msgpack.decode(node.query("head").data)
    assert (facts["pid"], facts["database"], facts["trouble"]) == (head.process.pid, str(head.database), "")


def test_an_unknown_question_names_the_known_ones(start: Start, nodes: Nodes) -> None:
    settled = nodes(start()).register().query("taskz")
    assert settled.error == "ValueError"
    assert "'taskz'" in settled.data.decode()
    assert "tasks" in settled.data.decode()


def test_a_malformed_argument_is_an_error_of_the_question_only(start: Start, nodes: Nodes) -> None:
    node = nodes(start()).register()
    for what in ("tasks", "jobs"):
        settled = node.query(what, {"limit": "many", "session": 3})
        assert settled.error == "ValueError"
        assert what in settled.data.decode()
    assert node.operate(JOB).ok


def test_tasks_can_be_narrowed_limited_and_paged(start: Start, nodes: Nodes) -> None:
    node = nodes(start(), batch=10).register()
    for number in range(100):
        name, state = ("even", FAILED) if number % 2 == 0 else ("odd", CANCELLED)
        node.client.tasks.append(task_event(number, name, state, job=number // 50, cell=f"c{number // 10}"))
        node.step()
    node.write_all()
    assert [number_of(e) for e in node.tasks(name="even", limit=5)][-5:] == [90, 92, 94, 96, 98]
    assert [number_of(e) for e in node.tasks(state="CANCELLED", job=1, cell="c7")] == [71, 73, 75, 77, 79]
    assert [number_of(e) for e in node.tasks(task=task_event(42).task)] == [42]
    assert node.tasks(parent=b"nobody") == []
    newest = node.page("tasks", limit=30)
    assert newest.older
    assert [number_of(e) for e in all_tasks(node, limit=7)] == list(range(100))


def test_an_answer_holds_all_that_happened_before_the_question(start: Start, nodes: Nodes) -> None:
    node = nodes(start(), interval=3600.0).register()
    for number in range(1, 50):
        node.client.tasks.append(task_event(number))
        assert {number_of(e) for e in node.tasks()} == set(range(1, number + 1))
    page = node.page("summary")
    summed = sum(row.tasks for row in msgspec.convert(page.rows, list[PhaseRow]))
    assert summed + sum(len(msgspec.msgpack.decode(blob)) for _, blob in page.history) == 49


def test_facts_are_told_apart_by_kind(start: Start, nodes: Nodes) -> None:
    node = nodes(start()).register()
    node.client.facts += [
        ObjectEvent(b"o" * 20, "SEALED", 1.0, 100),
        ActorEvent(b"a" * 16, "ALIVE", 2.0, "Counter", session="s1"),
        WorkerEvent(4711, "STARTED", 3.0),
        ActorEvent(b"b" * 16, "DEAD", 4.0, "Counter", session="s2", reason="killed"),
    ]
    node.write_all()
    (batch,) = node.page("actors").history
    assert [e[1] for e in msgspec.msgpack.decode(batch[1])] == [b"a" * 16, b"b" * 16]
    (batch,) = node.page("actors", session="s2").history
    assert [e[1] for e in msgspec.msgpack.decode(batch[1])] == [b"b" * 16]
    (batch,) = node.page("workers").history
    assert [e[1] for e in msgspec.msgpack.decode(batch[1])] == [4711]


def test_the_summary_adds_up_phases_once(start: Start, nodes: Nodes) -> None:
    head = start()
    node = nodes(head).register()
    for rounds in (1, 2):
        node.client.tasks += [task_event(n) for n in range(10)] + [
            task_event(99, "bad", FAILED, error="ValueError", started=0.0)
        ]
        node.write_all()
        work, bad = msgspec.convert(node.page("summary").rows, list[PhaseRow])
        n = 10 * rounds
        assert work == PhaseRow("work", n, n, 0, 0, 0, 1.0 * n, 2.0 * n, 3.0 * n, 4.0 * n, 5.0 * n)
        assert bad == PhaseRow(
            "bad", rounds, 0, rounds, 0, 0, 1.0 * rounds, 2.0 * rounds, 0.0, 0.0, 5.0 * rounds
        )
