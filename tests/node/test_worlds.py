"""A node keeps the worlds that somebody may return to, and no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nbray.config import WORLDS
from nbray.gcs.client import GcsClient
from nbray.gcs.messages import PROTOCOL as GCS_PROTOCOL
from nbray.gcs.messages import RegisterNode
from nbray.messages import (
    CREATE_ACTOR,
    DRIVER,
    PROTOCOL,
    TASK,
    ActorOptions,
    CreateActor,
    Drop,
    Hello,
    Register,
    Submit,
    TaskClass,
    World,
)
from nbray.node.machine import MOST_WORLDS, NodeConfig, NodeMachine


def world(number: int) -> bytes:
    return b"world %d" % number


def task(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_worlds_are_kept_for_clients_tasks_actors_and_lineage() -> None:
    config = NodeConfig("node", "test", b"cluster", {"CPU": 10_000}, 1 << 24, 1 << 27, spares=0)
    registration = RegisterNode(GCS_PROTOCOL, "node", 1, 1, b"cluster", {"CPU": 10_000})
    node = NodeMachine(config, GcsClient(registration), 0.0)
    driver = node.connected(1)
    node.receive(driver, [Hello(PROTOCOL, DRIVER, 10, "session")], 0.0)
    node.receive(driver, [Register(0, TaskClass(TASK, b"f", "work", {"CPU": 10_000}))], 0.0)
    node.receive(driver, [Register(1, TaskClass(CREATE_ACTOR, b"f", "make", {"CPU": 10_000}))], 0.0)
    node.receive(driver, [World(world(0), b"blob"), Submit(task(1), 0, 0, b"")], 0.0)
    creation = CreateActor(Submit(task(2), 1, 0, b""), ActorOptions("Kind", "serial"))
    node.receive(driver, [World(world(1), b"blob"), creation], 0.0)
    for number in range(2, 10 * MOST_WORLDS):
        node.receive(driver, [World(world(number), b"blob")], 0.0)
    assert len(node.worlds) <= MOST_WORLDS
    assert {world(0), world(1)} <= set(node.worlds), "a task and an actor need them"
    last = range(10 * MOST_WORLDS - WORLDS, 10 * MOST_WORLDS)
    assert {world(number) for number in last} <= set(node.worlds), "the driver does not send them again"
    # Without the result of the task nobody can ask for it to be made again.
    node.tasks.cancel(node.tasks.tasks[task(1)])
    node.receive(driver, [Drop([task(1) + bytes(4)])], 1.0)
    for number in range(MOST_WORLDS):
        node.receive(driver, [World(world(-1 - number), b"blob")], 1.0)
    assert world(0) not in node.worlds
    assert world(1) in node.worlds


def test_a_directory_of_long_ago_is_returned_to(cluster: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    @cluster.remote
    def where() -> str:
        return os.getcwd()

    places = [tmp_path / str(number) for number in range(MOST_WORLDS + 10)]
    for place in places:
        place.mkdir()
        os.chdir(place)
        ref = where.remote()
    assert cluster.get(ref) == str(places[-1])
    for place in (*places[:2], *places[-2:], places[0]):
        os.chdir(place)
        assert cluster.get(where.remote()) == str(place)
