"""``nbray.state.why`` and ``nbray.state.where`` on a real cluster."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def hold(seconds: float, *_: Any) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
    return seconds


def running(nbray: Any, count: int) -> None:
    while nbray.state.tasks(state="RUNNING").num_rows < count:
        nbray.wait([nbray.put(0)], timeout=0.01)


def test_where_answers_while_the_users_code_computes(cluster: Any) -> None:
    nbray = cluster
    ref = nbray.remote(hold).remote(60)
    running(nbray, 1)
    asked = time.monotonic()
    (row,) = nbray.state.where().to_pylist()
    assert time.monotonic() - asked < 10
    # The task may be about to import its module, and a machine with much else to do may need longer than the answer waits.
    while row["function"] != "hold":
        (row,) = nbray.state.where().to_pylist()
    assert row["file"] == __file__
    assert 12 < row["line"] < 18
    nbray.cancel(ref)
    with pytest.raises(nbray.exceptions.TaskCancelledError):
        nbray.get(ref)
    assert nbray.state.where().num_rows == 0


def test_where_sees_coroutines_and_threads(cluster: Any) -> None:
    nbray = cluster

    @nbray.remote
    class Waiter:
        async def nap(self) -> None:
            import asyncio

            await asyncio.sleep(60)

    @nbray.remote(max_concurrency=2)
    class Threads:
        def nap(self) -> None:
            time.sleep(60)

    waiter, threads = Waiter.remote(), Threads.remote()
    calls = [waiter.nap.remote(), threads.nap.remote(), threads.nap.remote()]
    running(nbray, 2)
    seen: list[str] = []
    while len(seen) < 3:
        seen = sorted(str(row["function"]) for row in nbray.state.where().to_pylist() if row["function"])
    assert seen == ["nap", "nap", "sleep"]
    for actor in (waiter, threads):
        nbray.kill(actor)
    for call in calls:
        with pytest.raises(nbray.exceptions.NbrayError):
            nbray.get(call)


def test_why(cluster: Any) -> None:
    nbray = cluster
    task = nbray.remote(hold)
    busy = [task.remote(60), task.remote(60)]
    running(nbray, 2)
    third = task.remote(0, task.remote(0))
    text = nbray.state.why(third)
    assert "waits for the result of hold" in text
    assert "waits for 1 CPU: 0 CPU free" in text
    assert "hold the rest; it is next" in text
    for ref in busy:
        nbray.cancel(ref)
    assert nbray.get(third) == 0
    text = nbray.state.why(third)
    assert "held by driver" in text
    assert "hold (" in text and "finished" in text


def test_where_in_a_terminal(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from nbray.cli import main

    ref = cluster.remote(hold).remote(60)
    running(cluster, 1)
    shown = ""
    while f"{__file__}, line " not in shown:
        assert main(["where"]) == 0
        shown = capsys.readouterr().out
    assert "  hold  " in shown
    cluster.cancel(ref)
    with pytest.raises(cluster.exceptions.TaskCancelledError):
        cluster.get(ref)
    assert main(["where"]) == 0
    assert capsys.readouterr().out == "No task is running.\n"
