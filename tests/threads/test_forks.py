"""Children that user code forks, and that outlive the task: what they look at stays, and nobody waits for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objects.states import await_empty, eventually, memory, objects

MB = 1 << 20
SECONDS = 20.0


@pytest.fixture
def nbray() -> Iterator[Any]:
    """A cluster with one CPU and a store of 32 MB, in which memory is soon used again."""
    import nbray

    nbray.init(num_cpus=1, object_store_memory=32 * MB, name="forks")
    try:
        yield nbray
    finally:
        nbray.shutdown()


class Children:
    """Where forked children of tasks write what they see, when they are told to look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pid(self) -> int:
        return int(
            eventually(
                lambda: (self.folder / "pid").exists() and (self.folder / "pid").read_text(), "a child"
            )
        )

    def look(self) -> str:
        """What the child says when it looks now; it ends afterwards."""
        (self.folder / "look").touch()
        pid = self.pid()
        eventually(lambda: ended(pid), "the child has ended")
        return (self.folder / "seen").read_text()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    found = Children(tmp_path)
    yield found
    if (tmp_path / "pid").exists() and not ended(found.pid()):
        os.kill(found.pid(), signal.SIGKILL)


def watch(folder: Path, array: Any) -> None:
    """In the child: wait until told, then write down what is there."""
    (folder / "new").write_text(str(os.getpid()))
    (folder / "new").rename(folder / "pid")
    while not (folder / "look").exists():
        time.sleep(0.005)
    (folder / "new").write_text(f"{array.min()} {array.max()}")
    (folder / "new").rename(folder / "seen")


def fork(folder: Path, array: Any) -> None:
    if os.fork() == 0:
        try:
            watch(folder, array)
        finally:
            os._exit(0)


def overwrite(nbray: Any) -> list[Any]:
    """Use all of the store that can be used."""
    return [nbray.put(np.full(4 * MB // 8, 1000 + n)) for n in range(12)]


@pytest.mark.parametrize("how", ["get", "input", "multiprocessing"])
def test_a_child_of_a_task_sees_what_it_saw(nbray: Any, children: Children, how: str) -> None:
    @nbray.remote
    def task(folder: Path, array: Any, box: list[Any]) -> int:
        seen = nbray.get(box[0]) if how == "get" else array
        if how == "multiprocessing":
            child = multiprocessing.get_context("fork").Process(target=watch, args=(folder, seen))
            child.start()
            # Else it is waited for when this process ends.
            multiprocessing.process._children.discard(child)  # type: ignore[attr-defined]
        else:
            fork(folder, seen)
        return os.getpid()

    @nbray.remote
    def other() -> int:
        return os.getpid()

    ref = nbray.put(np.full(4 * MB // 8, 7))
    name = ref.hex()
    worker = nbray.get(task.remote(children.folder, ref if how != "get" else 0, [ref]))
    pid = children.pid()
    del ref
    refs = overwrite(nbray)
    # The worker goes on, with the child beside it.
    assert nbray.get([other.remote() for _ in range(20)]) == [worker] * 20
    assert not ended(pid)
    assert objects()[name]["holders"] == [f"views in worker {worker}"]
    assert children.look() == "7 7"
    eventually(lambda: name not in objects(), "with the child its view is gone")
    assert [int(nbray.get(ref)[0]) for ref in refs] == list(range(1000, 1012))
    del refs
    await_empty()


def test_a_child_of_the_driver_sees_what_it_saw(nbray: Any, children: Children) -> None:
    ref = nbray.put(np.full(4 * MB // 8, 7))
    name = ref.hex()
    child = multiprocessing.get_context("fork").Process(target=watch, args=(children.folder, nbray.get(ref)))
    child.start()
    del ref
    children.pid()
    refs = overwrite(nbray)
    assert objects()[name]["holders"] == [f"views in driver {os.getpid()}"]
    assert children.look() == "7 7"
    child.join()
    assert child.exitcode == 0
    del refs
    await_empty()


def test_a_child_that_outlives_its_worker_sees_what_it_saw(nbray: Any, children: Children) -> None:
    @nbray.remote
    def task(folder: Path, array: Any) -> int:
        if os.fork() == 0:
            os.setsid()
            try:
                watch(folder, array)
            finally:
                os._exit(0)
        return os.getpid()

    worker = nbray.get(task.remote(children.folder, nbray.put(np.full(4 * MB // 8, 7))))
    pid = children.pid()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: ended(worker), "the worker is gone")
    refs = overwrite(nbray)
    assert not ended(pid)
    assert children.look() == "7 7"
    del refs
    await_empty()


@pytest.mark.parametrize("apart", [False, True], ids=["in the worker's group", "in a session of its own"])
def test_a_child_ends_with_the_cluster_at_the_latest(children: Children, apart: bool) -> None:
    import nbray

    nbray.init(num_cpus=1, object_store_memory=32 * MB, name="forks")
    try:

        @nbray.remote
        def task(folder: Path, array: Any) -> None:
            if os.fork() == 0:
                if apart:
                    os.setsid()
                try:
                    watch(folder, array)
                finally:
                    os._exit(0)

        nbray.get(task.remote(children.folder, nbray.put(np.full(4 * MB // 8, 7))))
        pid = children.pid()
    finally:
        start = time.monotonic()
        nbray.shutdown()
    assert time.monotonic() - start < 5
    eventually(lambda: ended(pid), "the child has ended")


def test_a_child_that_returns_from_the_task(nbray: Any, tmp_path: Path) -> None:
    """Both return; only the parent's result counts, and the child runs nothing of what comes after."""

    @nbray.remote
    def both(folder: Path) -> str:
        if os.fork() == 0:
            return "child"
        return "parent"

    @nbray.remote
    def note(folder: Path, n: int) -> int:
        with (folder / "log").open("a") as file:
            file.write(f"{n}\n")
        return n

    nbray.get([note.remote(tmp_path, n) for n in range(100)])
    refs = [both.remote(tmp_path), *[note.remote(tmp_path, n) for n in range(100, 130)]]
    assert nbray.get(refs, timeout=SECONDS) == ["parent", *range(100, 130)]
    lines = (tmp_path / "log").read_text().split()
    assert sorted(map(int, lines)) == list(range(130))
    del refs
    await_empty()


def test_many_forks_leave_nothing(nbray: Any) -> None:
    @nbray.remote
    def task(array: Any, mine: int) -> int:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(int(array[0]))
            os.waitpid(child, 0)
        return len(os.listdir("/proc/self/fd")) - before

    ref = nbray.put(np.full(4 * MB // 8, 7))
    nbray.get([task.remote(ref, n) for n in range(5)], timeout=SECONDS)
    # Their pipes are closed a moment after the children have ended.
    eventually(lambda: nbray.get(task.remote(ref, 9)) <= 21, "descriptors are given back")
    assert memory()["used"] <= 5 * MB
