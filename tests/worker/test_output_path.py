"""What tasks print, on the way to their driver, with real processes: in order, bounded, never lost from the logs, never in the way of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from nbray.api import context
from nbray.messages import Output


@pytest.fixture
def came(shared_cluster: Any) -> Iterator[list[Output]]:
    """What the driver is told."""
    engine: Any = context.require().engine
    found: list[Output] = []
    before, engine.on_output = engine.on_output, found.append
    yield found
    engine.on_output = before


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Take in messages until the condition holds."""
    engine: Any = context.require().engine
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        engine.link.wait(condition, time.monotonic() + 0.05)
    return condition()


def text(found: list[Output], name: str) -> str:
    return "".join(message.text for message in found if message.name == name and message.stream != "display")


def test_output_comes_before_the_result(shared_cluster: Any, came: list[Output]) -> None:
    @shared_cluster.remote
    def f(n: int) -> int:
        print("task", n)
        return n

    for n in range(20):
        assert shared_cluster.get(f.remote(n)) == n
        assert text(came, "f").endswith(f"task {n}\n")


def test_a_flood_is_bounded_and_its_end_comes_with_the_result(
    shared_cluster: Any, came: list[Output]
) -> None:
    @shared_cluster.remote
    def flood(n: int) -> int:
        for i in range(n):
            print("line", i, "x" * 50)
        print("end")
        return n

    assert shared_cluster.get(flood.remote(200_000)) == 200_000
    assert sum(len(message.text) for message in came) < 3_000_000
    assert text(came, "flood").endswith("end\n")
    assert sum(m.text.count("\n") + m.skipped for m in came if m.name == "flood") == 200_001
    table = shared_cluster.state.logs()
    mine = [
        line
        for line, name in zip(table["text"].to_pylist(), table["name"].to_pylist(), strict=True)
        if name == "flood"
    ]
    assert mine == [f"line {i} {'x' * 50}" for i in range(200_000)] + ["end"]


def test_programs_that_flood_are_bounded_too(shared_cluster: Any, came: list[Output]) -> None:
    @shared_cluster.remote
    def program() -> str:
        import subprocess

        subprocess.run("seq 1 1000000; echo the end", shell=True, check=True)
        return "done"

    began = time.monotonic()
    assert shared_cluster.get(program.remote()) == "done"
    assert time.monotonic() - began < 20
    assert wait_for(lambda: text(came, "program").endswith("the end\n"))
    assert sum(len(message.text) for message in came) < 3_000_000
    assert sum(m.text.count("\n") + m.skipped for m in came if m.name == "program") == 1_000_001


def test_a_driver_that_does_not_read_costs_the_node_no_memory(
    shared_cluster: Any, came: list[Output]
) -> None:
    @shared_cluster.remote
    def chatter(seconds: float) -> int:
        end, lines = time.time() + seconds, 0
        while time.time() < end:
            for _ in range(100):
                print("x" * 200)
            lines += 100
        print("the last line")
        return lines

    engine: Any = context.require().engine
    node = psutil.Process(int(engine.details()["node_pid"]))
    refs = [chatter.remote(4.0) for _ in range(2)]
    engine.link.flush()
    before = node.memory_info().rss
    most = before
    # Nobody reads while this thread has the lock.
    with engine.link._read_lock:
        for _ in range(40):
            time.sleep(0.1)
            most = max(most, node.memory_info().rss)
    counts = shared_cluster.get(refs, timeout=30)
    assert most - before < 24 * 2**20
    assert wait_for(lambda: text(came, "chatter").count("the last line\n") == 2)
    assert wait_for(
        lambda: sum(m.text.count("\n") + m.skipped for m in came if m.name == "chatter") == sum(counts) + 2
    )


def test_many_small_tasks_that_print(shared_cluster: Any, came: list[Output]) -> None:
    @shared_cluster.remote
    def small(n: int) -> int:
        print("small", n)
        return n

    assert shared_cluster.get([small.remote(n) for n in range(5000)]) == list(range(5000))
    mine = [m for m in came if m.name == "small"]
    assert wait_for(lambda: sum(m.text.count("\n") + m.skipped for m in came if m.name == "small") == 5000), (
        len(mine)
    )
