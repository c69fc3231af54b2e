"""What must not grow: descriptors, memory, processes, files, over many starts, actors, workers and tasks."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nbray
from nbray.api import context
from tests.processes.tools import (
    alive,
    children,
    daemon,
    descendants,
    descriptors,
    node_of,
    resident,
    until,
    wait_ended,
    workers,
)


def zombies(pid: int) -> list[int]:
    return [
        child
        for child in (*children(pid), *[c for d in children(pid) for c in children(d)])
        if not alive(child)
    ]


def settled(measure: Any, seconds: float = 5.0) -> int:
    """A number once it has stopped falling."""
    last, since = measure(), time.monotonic()
    deadline = time.monotonic() + seconds
    while time.monotonic() - since < 0.3 and time.monotonic() < deadline:
        time.sleep(0.02)
        now = measure()
        if now < last:
            last, since = now, time.monotonic()
    return int(last)


@pytest.mark.slow
def test_fifty_starts(runtime_dir: Path) -> None:
    @nbray.remote
    def one() -> int:
        return 1

    def cycle(number: int) -> None:
        nbray.init(num_cpus=1)
        if number % 5 == 0:
            assert nbray.get(one.remote(), timeout=30) == 1
        nbray.shutdown()

    for number in range(3):
        cycle(number)
    gc.collect()
    fds, threads = descriptors(os.getpid()), threading.active_count()
    began = time.monotonic()
    for number in range(50):
        cycle(number)
    took = time.monotonic() - began
    gc.collect()
    assert descriptors(os.getpid()) <= fds
    assert threading.active_count() <= threads
    assert list(runtime_dir.iterdir()) == []
    assert not [pid for pid in children(os.getpid()) if not alive(pid)]
    assert took < 100


@pytest.mark.slow
def test_five_hundred_actors(runtime_dir: Path) -> None:
    nbray.init(num_cpus=2)
    try:

        @nbray.remote
        class Counter:
            def __init__(self, start: int) -> None:
                self.n = start

            def up(self) -> int:
                self.n += 1
                return self.n

        node = node_of(nbray)
        zygote = daemon(node, "zygote")

        def churn(count: int) -> None:
            for number in range(count):
                actor = Counter.remote(number)
                assert nbray.get(actor.up.remote(), timeout=30) == number + 1
                if number % 2:
                    nbray.kill(actor)
                del actor

        churn(50)
        before = {pid: settled(partial(descriptors, pid)) for pid in (node, zygote, os.getpid())}
        memory = resident(node)
        churn(450)
        until(lambda: len(workers(node)) <= 6, "the actors' workers have ended")
        for pid, count in before.items():
            assert settled(partial(descriptors, pid)) <= count + 12, pid
        assert resident(node) - memory < 8 << 20
        assert until(lambda: not zombies(node))
        # Nothing of a dead actor that nobody refers to is kept.
        actors = context.require().engine.query("memory")["objects"]
        assert actors < 20
    finally:
        nbray.shutdown()


@pytest.mark.slow
def test_a_thousand_workers(runtime_dir: Path) -> None:
    nbray.init(num_cpus=2)
    try:

        @nbray.remote(max_calls=1)
        def once() -> int:
            return os.getpid()

        node = node_of(nbray)
        zygote = daemon(node, "zygote")
        nbray.get([once.remote() for _ in range(50)], timeout=60)
        before = {pid: settled(partial(descriptors, pid)) for pid in (node, zygote)}
        memory = {pid: resident(pid) for pid in (node, zygote)}
        pids: set[int] = set()
        for _ in range(10):
            pids |= set(nbray.get([once.remote() for _ in range(100)], timeout=100))
        assert len(pids) > 900, "each in a process of its own"
        for pid, count in before.items():
            assert settled(partial(descriptors, pid)) <= count + 12, pid
            assert resident(pid) - memory[pid] < 8 << 20, pid
        until(lambda: not zombies(node))
    finally:
        nbray.shutdown()


@pytest.mark.slow
def test_two_hundred_thousand_tasks(runtime_dir: Path) -> None:
    nbray.init(num_cpus=2)
    try:

        @nbray.remote
        def nothing(x: int) -> int:
            return x

        node = node_of(nbray)

        def run(count: int) -> None:
            for _ in range(count // 5000):
                nbray.get([nothing.remote(number) for number in range(5000)], timeout=100)

        run(40_000)
        engine: Any = context.require().engine
        gc.collect()
        pids = (node, daemon(node, "head"), os.getpid())
        before = {pid: settled(partial(resident, pid)) for pid in pids}
        run(160_000)
        gc.collect()
        grown = {pid: settled(partial(resident, pid)) - before[pid] for pid in pids}
        # The bound of the design is 1 KB per task; these have nothing that would have to stay at all.
        assert grown[pids[0]] < 16 << 20, grown
        assert grown[pids[1]] < 32 << 20, grown
        assert grown[pids[2]] < 16 << 20, grown
        assert engine.query("memory")["objects"] < 20
        assert len(engine.entries) < 20
    finally:
        nbray.shutdown()


def test_drivers_that_come_and_go(cluster: Any) -> None:
    """Connections of others leave nothing in the node."""
    from nbray import clusters
    from nbray.api.session import connect
    from nbray.messages import DRIVER

    (record,) = clusters.list_clusters()
    node = node_of(cluster)

    def visit(number: int) -> None:
        engine = connect(record, DRIVER, f"visitor {number}", f"visitor {number}")
        for _ in range(5):
            engine.put(number)
        if number % 2:
            engine.shutdown(stop=False)
        else:
            engine.link.close()
            engine.memory.close()

    for number in range(5):
        visit(number)
    before = settled(lambda: descriptors(node))
    mine = descriptors(os.getpid())
    for number in range(60):
        visit(number)
    assert settled(lambda: descriptors(node)) <= before + 1
    gc.collect()
    assert descriptors(os.getpid()) <= mine


def test_killed_workers_leave_no_descriptors(cluster: Any) -> None:
    @cluster.remote(max_retries=-1)
    def work(number: int) -> int:
        return number

    node = node_of(cluster)
    zygote = daemon(node, "zygote")

    def kill_all() -> None:
        for pid in workers(node):
            os.kill(pid, signal.SIGKILL)
            wait_ended(pid)
        assert cluster.get(work.remote(1), timeout=30) == 1
        until(lambda: len(workers(node)) >= 3)

    kill_all()
    before = [settled(partial(descriptors, pid)) for pid in (node, zygote)]
    for _ in range(15):
        kill_all()
    after = [settled(partial(descriptors, pid)) for pid in (node, zygote)]
    # A worker more or less, with its eight.
    assert after[0] <= before[0] + 10
    assert after[1] <= before[1]
    until(lambda: not zombies(node))


def test_head_and_zygote_restarts_leave_no_descriptors(cluster: Any) -> None:
    @cluster.remote(max_retries=-1)
    def one() -> int:
        return 1

    node = node_of(cluster)

    def restart() -> None:
        for name in ("head", "zygote"):
            pid = daemon(node, name)
            os.kill(pid, signal.SIGKILL)
            wait_ended(pid)
            until(lambda: daemon(node, name) != pid)  # noqa: B023
        assert cluster.get(one.remote(), timeout=30) == 1
        cluster.state.tasks()
        until(lambda: len(workers(node)) >= 3)

    restart()
    before = settled(lambda: descriptors(node))
    for _ in range(5):
        restart()
    assert settled(lambda: descriptors(node)) <= before + 10
    until(lambda: not zombies(node))


def test_shutdown_is_quick_and_complete(runtime_dir: Path) -> None:
    times = []
    for number in range(5):
        nbray.init(num_cpus=2)

        @nbray.remote
        def sleeps() -> None:
            time.sleep(1000)

        @nbray.remote
        class Actor:
            async def wait(self) -> None:
                await __import__("asyncio").sleep(1000)

        node = node_of(nbray)
        if number:
            actor = Actor.remote()
            refs = [sleeps.remote() for _ in range(20)]
            refs.append(actor.wait.remote())
            nbray.put(bytes(10_000_000))
            if number > 2:
                until(lambda: len(workers(node)) >= 3)  # noqa: B023
        family = [node, *descendants(node)]
        began = time.monotonic()
        nbray.shutdown()
        times.append(time.monotonic() - began)
        for pid in family:
            assert not alive(pid)
        assert list(runtime_dir.iterdir()) == []
    # 0.3 s is the target; a busy machine gets more.
    assert sorted(times)[2] < 1.0, times
