"""What user code in a task may do with processes and threads, and its standard input."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.world.drivers import run_script

OFFSET = 10


def add(x: int) -> int:
    return x + OFFSET


def _send(connection: Any, value: Any) -> None:
    connection.send(value() if callable(value) else value)
    connection.close()


def in_a_child(what: Any) -> Any:
    """What a function returns in a forked child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send, args=(theirs, what))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_of_processes(shared_cluster: Any, method: str) -> None:
    @shared_cluster.remote
    def pooled() -> list[int]:
        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(add, range(4))

    assert shared_cluster.get(pooled.remote()) == [10, 11, 12, 13]


def test_a_pool_of_a_function_of_the_notebook(tmp_path: Path) -> None:
    """Functions of ``__main__`` are known to the standard pickler in a task, and to the processes that a script's tasks spawn."""
    script = tmp_path / "main.py"
    script.write_text(
        "import json, multiprocessing, nbray\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "OFFSET = 10\n"
        "def add(x):\n    return x + OFFSET\n"
        "class Box:\n    def __init__(self, x):\n        self.x = x\n"
        "def boxed(box):\n    return Box(box.x + 1)\n"
        "@nbray.remote\n"
        "def pooled(method):\n"
        "    context = multiprocessing.get_context(method)\n"
        "    with context.Pool(2) as pool, ProcessPoolExecutor(2, context) as executor:\n"
        "        boxes = executor.map(boxed, [Box(i) for i in range(2)])\n"
        "        return pool.map(add, range(3)), [type(box) is Box and box.x for box in boxes]\n"
        "@nbray.remote\n"
        "class Guest:\n"
        "    def pooled(self):\n"
        "        with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "            return pool.map(add, range(2))\n"
        "if __name__ == '__main__':\n"
        "    nbray.init(num_cpus=1)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        own = pool.map(add, [1])\n"
        "    print(json.dumps([own, nbray.get(pooled.remote('fork')), nbray.get(pooled.remote('spawn')), nbray.get(Guest.remote().pooled.remote())]))\n"
    )
    each = [[10, 11, 12], [1, 2]]
    assert run_script(script) == [[11], each, each, [10, 11]]


def test_a_forked_child_cannot_use_its_parent_s_cluster(shared_cluster: Any) -> None:
    @shared_cluster.remote
    def inner() -> int:
        return 1

    @shared_cluster.remote
    def outer() -> Any:
        ref = shared_cluster.put(list(range(10)))

        def use() -> str:
            found = []
            for what in (inner.remote, lambda: shared_cluster.get(ref), lambda: shared_cluster.put(1)):
                try:
                    what()
                except shared_cluster.exceptions.NotInitializedError as error:
                    found.append(str(error))
            return "\n".join(found)

        return in_a_child(use), shared_cluster.get(ref), shared_cluster.get(inner.remote())

    said, own, result = shared_cluster.get(outer.remote())
    assert said.count("forked") >= 3, said
    assert "nbray.init()" in said
    assert (own, result) == (list(range(10)), 1)


def test_a_child_prints_and_changes_its_own_place(
    shared_cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @shared_cluster.remote
    def parent() -> str:
        def child() -> str:
            print("the child prints", flush=True)
            os.chdir("/")
            os.environ["NBT_WORD"] = "child's"
            return os.getcwd()

        assert in_a_child(child) == "/"
        assert "NBT_WORD" not in os.environ
        return os.getcwd()

    assert shared_cluster.get(parent.remote()) == os.getcwd()
    said = ""
    for _ in range(100):
        said += "".join(capfd.readouterr())
        if "the child prints" in said:
            break
        shared_cluster.get(shared_cluster.remote(add).remote(1))
    assert said.count("the child prints") == 1


def test_threads_and_subprocesses(shared_cluster: Any) -> None:
    @shared_cluster.remote
    def busy() -> Any:
        found: list[int] = []
        workers = [threading.Thread(target=lambda i=i: found.append(add(i))) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        said = subprocess.run(
            [sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True
        )
        return sorted(found), said.stdout.strip()

    assert shared_cluster.get(busy.remote()) == ([10, 11, 12, 13], "42")


def test_standard_input_is_empty(shared_cluster: Any) -> None:
    @shared_cluster.remote
    def read() -> Any:
        return (
            sys.stdin.read(),
            os.read(0, 10),
            subprocess.run(["cat"], stdout=subprocess.PIPE, check=True).stdout,
        )

    @shared_cluster.remote
    def ask() -> str:
        return input("How many? ")

    assert shared_cluster.get(read.remote()) == ("", b"", b"")
    with pytest.raises(EOFError, match=r"How many.*no keyboard.*argument"):
        shared_cluster.get(ask.remote())
