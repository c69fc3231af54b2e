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
from tests.processes.tools import REPOSITORY, script

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


DRIVER = """
import multiprocessing
import numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.threads.test_forks import fork

nbray.init(name="forks")
forked, kept, private = (nbray.put(np.full(4 * (1 << 20) // 8, 7)) for _ in range(3))
array, view = nbray.get([forked, kept])
writable = nbray.get(private, writable=True)
names = [ref.hex() for ref in (forked, kept, private)]
fork(Path(sys.argv[1]), array)
del array, forked, kept, private
print("names", *names, flush=True)
hear()
nbray.shutdown(stop=False)
print("left", flush=True)
hear()
print("sees", view.min(), view.max(), writable.min(), writable.max(), flush=True)
del view, writable
hear()
"""


def test_what_a_driver_and_its_child_look_at_stays_after_the_driver_has_left(
    nbray: Any, children: Children, tmp_path: Path
) -> None:
    with script(tmp_path / "driver.py", DRIVER, str(children.folder), str(REPOSITORY)) as driver:
        forked, kept, private = driver.line("names ").split()
        children.pid()
        driver.say("leave")
        driver.line("left")
        refs = overwrite(nbray)
        assert {forked, kept, private} <= set(objects())
        driver.say("look")
        assert driver.line("sees ") == "7 7 7 7"
        # The memory of all that it has looked at is let go of together.
        assert {forked, kept, private} <= set(objects())
        assert children.look() == "7 7"
        eventually(lambda: not {forked, kept, private} & set(objects()), "nobody looks any more")
        driver.say("end")
        driver.end()
    del refs
    await_empty()


def test_what_the_child_of_a_killed_driver_looks_at_stays(
    nbray: Any, children: Children, tmp_path: Path
) -> None:
    with script(tmp_path / "driver.py", DRIVER, str(children.folder), str(REPOSITORY)) as driver:
        forked, *_ = driver.line("names ").split()
        pid = children.pid()
        driver.kill()
        # That is noticed although the child has inherited the connection.
        eventually(lambda: "that has ended" in str(objects()[forked]["holders"]), "the node has noticed")
        refs = overwrite(nbray)
        assert not ended(pid)
        assert forked in objects()
        assert children.look() == "7 7"
        eventually(lambda: "views" not in str(objects().get(forked, "")), "nobody looks any more")
    del refs
