"""What becomes of tasks when no worker process can be started."""

from __future__ import annotations

import msgspec

from nbray import messages as m
from nbray.errors import WorkerCrashedError
from nbray.failure_codec import decode_error
from nbray.gcs.client import GcsClient, Settled
from nbray.gcs.messages import PROTOCOL, RegisterNode
from nbray.node.machine import STARTS, NodeConfig, NodeMachine
from nbray.node.peer import Peer
from nbray.node.pool import Fork


class Node:
    """A node's machine with one driver; workers start or do not, as the test says."""

    def __init__(self) -> None:
        self.now = 1.0
        gcs = GcsClient(RegisterNode(PROTOCOL, "n", 1, 1, b"c", {}, ""))
        config = NodeConfig("n", "x", b"c" * 16, {"CPU": 20_000}, 1 << 24, 1 << 27)
        self.machine = NodeMachine(config, gcs, self.now)
        self.driver = self.machine.connected(1)
        self.machine.receive(self.driver, [m.Hello(m.PROTOCOL, m.DRIVER, 1, "session")], self.now)
        contexts = [request.context for request in gcs._requests.values()]
        gcs._requests.clear()
        self.machine.gcs_settled(
            [Settled(context, "", True, msgspec.msgpack.encode(1)) for context in contexts], self.now
        )

    def submit(self, task: bytes) -> None:
        spec = m.TaskClass(m.TASK, b"f" * 16, "work", {"CPU": 10_000})
        self.machine.receive(
            self.driver,
            [
                m.Function(b"f" * 16, b"blob"),
                m.Register(0, spec),
                m.Submit(task, 0, 0, b""),
                m.Get([task + bytes(4)]),
            ],
            self.now,
        )

    def forks(self) -> list[int]:
        """The workers that are to be started now."""
        self.machine.settle(self.now)
        found = [effect.worker for effect in self.machine.effects if isinstance(effect, Fork)]
        self.machine.effects.clear()
        return found

    def end_starts(self, count: int) -> list[int]:
        """That many workers end before they say hello; those that are being started then."""
        starting = self.forks()
        for _ in range(count):
            self.machine.worker_exited(starting.pop(0), "left with exit status 1", [], self.now)
            starting += self.forks()
        return starting

    def said(self, peer: Peer, kind: type) -> list[object]:
        return [message for message in peer.out if type(message) is kind]


def test_tasks_fail_when_no_worker_lives_long_enough_to_say_hello() -> None:
    node = Node()
    task = bytes(15) + b"\1"
    node.submit(task)
    starting = node.end_starts(STARTS - 1)
    assert not node.said(node.driver, m.Value), "the next one might live"
    node.machine.worker_exited(starting[0], "left with exit status 1", [], node.now)
    node.machine.settle(node.now)
    (value,) = node.said(node.driver, m.Value)
    assert isinstance(value, m.Value)
    error = decode_error(value.data)
    assert isinstance(error, WorkerCrashedError)
    assert "work could not be run" in str(error)
    assert "left with exit status 1" in str(error)
    node.machine.check()


def test_a_worker_that_starts_makes_up_for_those_that_did_not() -> None:
    node = Node()
    for task in (b"\1", b"\2"):
        node.submit(bytes(15) + task)
    for number in node.end_starts(STARTS - 1)[:1]:
        peer = node.machine.connected(100 + number)
        node.machine.receive(peer, [m.Hello(m.PROTOCOL, m.WORKER, 1000 + number, "", number)], node.now)
    node.end_starts(STARTS - 1)
    assert not node.said(node.driver, m.Value), "the starts before the one that worked were counted"
    node.machine.check()
