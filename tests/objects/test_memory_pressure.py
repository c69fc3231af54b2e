"""Near the machine's memory limit the newest task that may be tried again is ended, before the kernel ends something.

The limit and what is used of it are files laid out as a container has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objects.states import eventually, memory

MB = 1 << 20
LIMIT = 1024 * MB


class Machine:
    """A machine with 1 GB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        meminfo = f"MemTotal: {64 * LIMIT // 1024} kB\nMemFree: 1 kB\nMemAvailable: {60 * LIMIT // 1024} kB\n"
        for name, text in {
            "proc/meminfo": meminfo,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/memory.max": f"{LIMIT}\n",
            "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 0\n",
        }.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.use(0.5)

    def use(self, share: float) -> None:
        new = self.root / "new"
        new.write_text(f"{int(LIMIT * share)}\n")
        new.replace(self.root / "sys/fs/cgroup/memory.current")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path / "machine")
    monkeypatch.setenv("NBRAY_CGROUP_ROOT", str(found.root))
    return found


@pytest.fixture
def nbray(machine: Machine) -> Iterator[Any]:
    import nbray

    nbray.init(num_cpus=4, object_store_memory=64 * MB, name="tight")
    try:
        yield nbray
    finally:
        nbray.shutdown()


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


class Place:
    """Where tasks write that they run, and see that they may end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def pids(self, name: str) -> list[int]:
        return [
            int(path.name.rpartition("-")[2])
            for path in sorted(self.folder.glob(f"{name}-*"), key=os.path.getmtime)
        ]

    def release(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def hog(folder: Path, name: str, size: int) -> int:
    import time

    data = np.ones(size, dtype=np.uint8)
    (folder / f"{name}-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)
    return int(data.sum())


def test_the_newest_retriable_task_is_ended_and_tried_again_and_then_fails(
    nbray: Any, machine: Machine, place: Place
) -> None:
    task = nbray.remote(hog)
    old = task.options(max_retries=1, name="old").remote(place.folder, "old", 100 * MB)
    eventually(lambda: place.pids("old"), "the first task runs")
    tiny = task.options(max_retries=0, name="tiny").remote(place.folder, "tiny", 100)
    new = task.options(max_retries=1, name="new").remote(place.folder, "new", 100 * MB)
    eventually(lambda: place.pids("new") and place.pids("tiny"), "the others run")
    for attempt in range(2):
        eventually(lambda: len(place.pids("new")), "an attempt runs")
        pid = place.pids("new")[attempt]
        machine.use(0.985)
        eventually(partial(ended, pid), "it is ended")
        machine.use(0.5)
        if attempt == 0:
            eventually(lambda: len(place.pids("new")) == 2, "it is tried again")
    with pytest.raises(nbray.exceptions.OutOfMemoryError) as caught:
        nbray.get(new)
    text = str(caught.value)
    assert "new was the newest task that may be tried again and used 0." in text
    assert "(0.98 of 1.00 GB)" in text
    assert "Its largest variables: data (ndarray, 100.0 MB)" in text, text
    assert "in 2 attempts; max_retries=1 allows no further attempt" in text
    assert len(place.pids("old")) == 1
    place.release()
    assert nbray.get([old, tiny]) == [100 * MB, 100]


def test_nothing_more_starts_until_there_is_room(nbray: Any, machine: Machine, place: Place) -> None:
    task = nbray.remote(hog)
    old = task.options(name="old", max_retries=0).remote(place.folder, "old", 100 * MB)
    eventually(lambda: place.pids("old"), "the first task runs")
    new = task.options(name="new").remote(place.folder, "new", 100 * MB)
    pid = eventually(lambda: place.pids("new"), "the second runs")[0]
    machine.use(0.985)
    eventually(partial(ended, pid), "it is ended")
    machine.use(0.96)
    eventually(lambda: nbray.state.tasks(name="new", state="QUEUED").num_rows, "its second attempt is queued")
    place.release()
    # Memory is scarce still, but nothing else runs any more: the task may.
    assert nbray.get([old, new]) == [100 * MB, 100 * MB]
    assert len(place.pids("new")) == 2


def test_an_actor_is_not_ended_before_a_task(nbray: Any, machine: Machine, place: Place) -> None:
    @nbray.remote(max_restarts=1)
    class Holder:
        def __init__(self) -> None:
            self.data = np.ones(200 * MB, dtype=np.uint8)

        def work(self, folder: Path) -> int:
            return hog(folder, "actor", 100)

    task = nbray.remote(hog).options(max_retries=0, name="task").remote(place.folder, "task", 100 * MB)
    eventually(lambda: place.pids("task"), "the task runs")
    holder = Holder.remote()
    call = holder.work.remote(place.folder)
    pid = eventually(lambda: place.pids("actor"), "the call runs")[0]
    machine.use(0.985)
    with pytest.raises(nbray.exceptions.OutOfMemoryError):
        nbray.get(task)
    machine.use(0.5)
    assert not ended(pid)
    place.release()
    assert nbray.get(call) == 100


def test_the_store_shrinks_first(nbray: Any, machine: Machine, place: Place) -> None:
    refs = [nbray.put(np.full(4 * MB, n, dtype=np.uint8)) for n in range(8)]
    before = memory()["used"]
    task = nbray.remote(hog).options(max_retries=0).remote(place.folder, "task", 100)
    eventually(lambda: place.pids("task"), "the task runs")
    machine.use(0.955)
    eventually(lambda: memory()["used"] <= before - 12 * MB, "objects have moved to disk")
    machine.use(0.5)
    place.release()
    assert nbray.get(task) == 100
    assert all(int(nbray.get(ref)[5]) == n for n, ref in enumerate(refs))


GLOBAL_TEXT = "x" * (7 * MB)


class Held:
    def __init__(self) -> None:
        self.blocks = [np.ones(MB, dtype=np.uint8) for _ in range(30)]
        self.small = 1


def holder(folder: Path) -> int:
    """Holds something of every kind."""
    import pandas as pd

    held = Held()
    table = pd.DataFrame({"a": np.ones(2 * MB), "b": np.ones(2 * MB, dtype=np.float32)})
    rows = {number: bytes(100_000) for number in range(50)}
    return inner(folder, np.ones(2 * MB)) + len(held.blocks) + len(table) + len(rows) + len(GLOBAL_TEXT)


def inner(folder: Path, values: Any) -> int:
    copied = values
    return hog(folder, "holder", 100) + len(copied)


def test_the_error_names_what_lies_in_objects_containers_and_globals(
    nbray: Any, machine: Machine, place: Place
) -> None:
    ref = nbray.remote(holder).options(max_retries=0).remote(place.folder)
    eventually(lambda: place.pids("holder"), "the task runs")
    machine.use(0.985)
    with pytest.raises(nbray.exceptions.OutOfMemoryError) as caught:
        nbray.get(ref)
    assert (
        "Its largest variables: held.blocks (list, 30.0 MB), table (DataFrame, 24.0 MB), values in inner (ndarray, 16.0 MB), "
        "GLOBAL_TEXT (str, 7.0 MB), rows (dict, 4.8 MB)."
    ) in str(caught.value), str(caught.value)


def test_the_calls_of_an_actor_name_their_variables(nbray: Any, machine: Machine, place: Place) -> None:
    @nbray.remote
    class Threads:
        def __init__(self) -> None:
            self.cache = np.ones(3 * MB, dtype=np.uint8)

        def work(self, folder: Path, name: str) -> int:
            mine = np.ones(2 * MB, dtype=np.uint8)
            return hog(folder, name, 100) + len(mine)

    @nbray.remote
    class Coroutines:
        async def work(self, folder: Path) -> None:
            import asyncio

            awaited = np.ones(5 * MB, dtype=np.uint8)
            (folder / f"async-{os.getpid()}").touch()
            await asyncio.sleep(1000)
            assert awaited[0]

    for actor, call, expected in (
        (
            Threads.options(max_concurrency=2),
            "thread",
            "GLOBAL_TEXT (str, 7.0 MB), self.cache (ndarray, 3.0 MB), mine (ndarray, 2.0 MB)",
        ),
        (Coroutines.options(), "async", "awaited (ndarray, 5.0 MB)"),
    ):
        handle = actor.remote()
        ref = handle.work.remote(place.folder, *(["thread"] if call == "thread" else []))
        eventually(partial(place.pids, call), "the call runs")
        machine.use(0.985)
        with pytest.raises(nbray.exceptions.ActorDiedError) as caught:
            nbray.get(ref)
        machine.use(0.5)
        assert expected in str(caught.value), str(caught.value)


def test_code_that_keeps_the_interpreter_is_ended_all_the_same(
    nbray: Any, machine: Machine, place: Place
) -> None:
    @nbray.remote(max_retries=0)
    def busy(folder: Path) -> int:
        (folder / f"busy-{os.getpid()}").touch()
        return sum(range(100_000_000_000))

    ref = busy.remote(place.folder)
    eventually(lambda: place.pids("busy"), "the task runs")
    machine.use(0.985)
    with pytest.raises(nbray.exceptions.OutOfMemoryError, match="did not let go of the interpreter"):
        nbray.get(ref)
