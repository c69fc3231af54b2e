"""The end of a worker costs as much as what it held, however much others hold."""

from __future__ import annotations

import time

from nbray import ids
from nbray.gcs.client import GcsClient
from nbray.gcs.messages import PROTOCOL as GCS_PROTOCOL
from nbray.gcs.messages import RegisterNode
from nbray.messages import DRIVER, PROTOCOL, WORKER, Create, Created, Get, Hello, Hold, Put, Seal
from nbray.node.machine import NodeConfig, NodeMachine

MB = 1 << 20


def machine() -> NodeMachine:
    config = NodeConfig("node", "test", b"cluster", {"CPU": 10_000}, 64 * MB, 512 * MB, spares=1)
    registration = RegisterNode(GCS_PROTOCOL, "node", 1, 1, b"cluster", {"CPU": 10_000})
    return NodeMachine(config, GcsClient(registration), 0.0)


def name(number: int, owner: int) -> bytes:
    return number.to_bytes(8, "little") + owner.to_bytes(8, "little") + ids.FIRST_INDEX


def test_the_end_of_a_worker_looks_at_nothing_of_others() -> None:
    node = machine()
    driver, worker = node.connected(1), node.connected(2)
    node.receive(driver, [Hello(PROTOCOL, DRIVER, 10, "session")], 0.0)
    node.receive(worker, [Hello(PROTOCOL, WORKER, 20, "", 1)], 0.0)
    node.receive(driver, [Put(name(n, 1), 0, b"value") for n in range(100_000)], 0.0)
    shared = name(7, 1)
    node.receive(worker, [Put(name(n, 2), 0, b"value") for n in range(5)], 0.0)
    node.receive(worker, [Hold([shared, name(8, 1)]), Get([name(99, 3)])], 0.0)
    # One that it holds and has pinned, and one that it has not written to the end.
    large, unfinished = name(10, 2), name(11, 2)
    for request, (object_id, size) in enumerate(((large, MB), (unfinished, MB)), 1):
        node.receive(worker, [Create(request, object_id, size)], 0.0)
        node.settle(0.0)
    assert [type(message) for message in worker.out].count(Created) == 2
    node.receive(worker, [Seal(large, 0), Get([large])], 0.0)
    node.settle(0.0)
    node.check()
    assert node.objects.arena.used == 2 * MB

    objects = node.objects.objects
    started = time.perf_counter()
    assert not [entry for entry in list(objects.values()) if entry.holders == -1]
    walk = time.perf_counter() - started
    started = time.perf_counter()
    node.worker_exited(1, "was ended", [], 1.0)
    node.memory_released(worker.number, 1.0)
    node.settle(1.0)
    took = time.perf_counter() - started
    node.check()
    assert len(objects) == 100_000
    assert objects[shared].holders == 1
    assert node.objects.arena.used == 0
    assert took < walk / 3, f"{took * 1e6:.0f} µs, a look at all objects takes {walk * 1e6:.0f} µs"
