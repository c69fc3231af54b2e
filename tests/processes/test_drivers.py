"""Drivers come, share a cluster, leave in every way there is; what stays and what ends with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes.tools import REPOSITORY, Script, alive, descendants, script, until, wait_ended

START = """
nbray.init(num_cpus=2)
from nbray.api import context
print("node", context.require().engine.details()["node_pid"])
"""


def started(driver: Script) -> int:
    """Pid of the node that a script with `START` has started."""
    return int(driver.line("node"))


def gone(node: int, folder: Path, seconds: float = 10.0) -> None:
    """The node and all that it has started end, and leave no file."""
    below = descendants(node)
    wait_ended(node, seconds)
    for pid in below:
        wait_ended(pid, 5)
    assert list(folder.iterdir()) == []


def test_killed_driver_then_another_then_time_to_live(runtime_dir: Path, tmp_path: Path) -> None:
    first = (
        START
        + """
@nbray.remote
def work(path):
    open(path + ".begun", "w").close()
    time.sleep(1)
    open(path, "w").write("done")
    time.sleep(1000)

@nbray.remote
class Counter:
    def __init__(self):
        self.n = 0
    def up(self):
        self.n += 1
        return self.n

counter = Counter.options(name="counter", lifetime="detached", namespace="shared").remote()
nbray.get(counter.up.remote())
ref = work.remote(sys.argv[1])
until(lambda: os.path.exists(sys.argv[1] + ".begun"))
print("ready")
time.sleep(1000)
"""
    )
    second = """
info = nbray.init(address="auto", namespace="shared")
assert not info.started
counter = nbray.get_actor("counter")
print("counted", nbray.get(counter.up.remote(), timeout=20))

@nbray.remote
def double(x):
    return 2 * x

print("doubled", nbray.get([double.remote(i) for i in range(5)], timeout=20))
nbray.shutdown(stop=False)
"""
    with script(tmp_path / "first.py", first, str(tmp_path / "mark"), NBRAY_TTL="3") as driver:
        node = started(driver)
        driver.line("ready")
        os.kill(driver.pid, signal.SIGKILL)
    # Its task goes on.
    until((tmp_path / "mark").exists)
    with script(tmp_path / "second.py", second) as other:
        assert other.line("counted") == "2"
        assert other.line("doubled") == "[0, 2, 4, 6, 8]"
        other.end()
        assert other.process.returncode == 0
    assert alive(node)
    # Work runs for another 1000 s: that is what keeps it.
    with script(tmp_path / "third.py", 'nbray.init(address="auto")\nnbray.shutdown(stop=True)') as last:
        last.end()
        assert last.process.returncode == 0, last.output
    gone(node, runtime_dir)


def test_time_to_live_of_an_idle_cluster(runtime_dir: Path, tmp_path: Path) -> None:
    with script(tmp_path / "driver.py", START + "time.sleep(1000)", NBRAY_TTL="3") as driver:
        node = started(driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.process.wait()
        killed = time.monotonic()
        gone(node, runtime_dir, 20)
        assert time.monotonic() - killed >= 2.5


ENDS = {
    "end of the script": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise ValueError('the end')",
    "a thread that goes on": "import threading; threading.Thread(target=time.sleep, args=(0.5,)).start()",
    "work that runs": "refs = [work.remote() for _ in range(10)]",
    "an object that is held": "import numpy; a = nbray.get(nbray.put(numpy.ones(10**6)))",
    "shutdown": "nbray.shutdown()",
    "an interrupt": "os.kill(os.getpid(), signal.SIGINT); time.sleep(10)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_end_of_a_script_leaves_nothing_at_once(runtime_dir: Path, tmp_path: Path, end: str) -> None:
    code = (
        START
        + """
@nbray.remote
def work():
    time.sleep(1000)

@nbray.remote
def quick():
    return 1
nbray.get(quick.remote())
"""
        + end
    )
    with script(tmp_path / "driver.py", code) as driver:
        node = started(driver)
        driver.end()
        # Not later: whoever waits for the script finds nothing of it.
        assert not alive(node)
        assert list(runtime_dir.iterdir()) == []


def test_keep(runtime_dir: Path, tmp_path: Path) -> None:
    code = 'nbray.init(num_cpus=2, keep=True)\nfrom nbray.api import context\nprint("node", context.require().engine.details()["node_pid"])'
    with script(tmp_path / "driver.py", code, NBRAY_TTL="60") as driver:
        node = started(driver)
        driver.end()
    assert alive(node)
    with script(tmp_path / "other.py", 'info = nbray.init()\nprint("started", info.started)') as other:
        # Who joins a cluster that was to be kept ends it only when asked to.
        assert other.line("started") == "False"
        other.end()
    if alive(node):
        with script(tmp_path / "last.py", "nbray.init(address='auto'); nbray.shutdown(stop=True)") as last:
            last.end()
    gone(node, runtime_dir)


def test_no_cluster_to_join(runtime_dir: Path) -> None:
    import nbray

    with pytest.raises(ConnectionError, match="no cluster"):
        nbray.init(address="auto")
    with pytest.raises(ConnectionError, match=r"elsewhere.*running: none"):
        nbray.init(address="elsewhere")


PEER = """
info = nbray.init(address=sys.argv[1] if len(sys.argv) > 1 else None)
from nbray.api import context
print("node", context.require().engine.details()["node_pid"])

@nbray.remote
def work(name, seconds):
    time.sleep(seconds)
    return name

@nbray.remote
class Counter:
    def __init__(self):
        self.n = 0
    def up(self):
        self.n += 1
        return self.n
"""


def test_two_drivers_two_sessions(runtime_dir: Path, tmp_path: Path) -> None:
    first = (
        PEER.replace("nbray.init(", "nbray.init(num_cpus=2, ")
        + """
counter = Counter.remote()
nbray.get(counter.up.remote())
running = work.remote("first", 3)
time.sleep(0.2)
print("ready")
hear()
print("result", nbray.get(running, timeout=20), nbray.get(counter.up.remote(), timeout=20))
hear()
try:
    nbray.shutdown(stop=True)
except RuntimeError as error:
    print("refused", error)
print("still", nbray.get(counter.up.remote(), timeout=20))
hear()
nbray.shutdown(stop=True, force=True)
print("stopped")
"""
    )
    second = (
        PEER
        + """
counter = Counter.remote()
print("mine", nbray.get(counter.up.remote(), timeout=20))
refs = [work.remote("second", 1000) for _ in range(2)]
nbray.shutdown()
print("left")
"""
    )
    third = (
        PEER
        + """
print("ready")
hear()
try:
    nbray.get(work.remote("third", 1000), timeout=20)
except BaseException as error:
    print("error", type(error).__name__, error)
"""
    )
    with script(tmp_path / "first.py", first) as one:
        node = started(one)
        one.line("ready")
        with script(tmp_path / "second.py", second, "auto") as two:
            assert started(two) == node
            assert two.line("mine") == "1", "an actor of its own"
            # It leaves, with what it runs; the other one's work goes on.
            two.line("left")
            two.end()
            assert two.process.returncode == 0
        one.say("go on")
        assert one.line("result") == "first 2"
        with script(tmp_path / "third.py", third, "auto") as three:
            three.line("ready")
            one.say("try to stop")
            refused = one.line("refused")
            assert "third.py" in refused
            assert "force" in refused
            assert one.line("still") == "3"
            one.say("stop")
            three.say("run")
            one.line("stopped")
            text = three.line("error")
            assert "NotInitializedError" in text or "NodeDiedError" in text
            three.end()
        one.end()
        gone(node, runtime_dir)


def test_fair_share(runtime_dir: Path, tmp_path: Path) -> None:
    code = (
        PEER
        + """
print("ready")
hear()
refs = [work.remote(str(i), 0.05) for i in range(int(sys.argv[2]))]
first = time.monotonic()
nbray.get(refs, timeout=60)
print("end", time.monotonic())
hear()
"""
    )
    with script(tmp_path / "keeper.py", "nbray.init(num_cpus=2)\nprint('ready')\nhear()") as keeper:
        keeper.line("ready")
        with (
            script(tmp_path / "many.py", code, "auto", "100") as many,
            script(tmp_path / "few.py", code, "auto", "20") as few,
        ):
            many.line("ready")
            few.line("ready")
            many.say("go")
            time.sleep(0.5)
            few.say("go")
            # Behind the other one's queue it would have to wait for all of it.
            few_end = float(few.line("end"))
            many_end = float(many.line("end"))
            assert few_end < many_end - 0.5
            for each in (few, many):
                each.say("end")
                each.end()
        keeper.say("end")
        keeper.end()
    until(lambda: list(runtime_dir.iterdir()) == [])


def test_simultaneous_starts_make_one_cluster(runtime_dir: Path, tmp_path: Path) -> None:
    code = "hear()\n" + PEER + 'print("sum", nbray.get(work.remote(7, 0), timeout=30))\nhear()\n'
    drivers = [Script(tmp_path / f"driver{number}.py", code) for number in range(4)]
    try:
        for driver in drivers:
            driver.say("go")
        nodes = {started(driver) for driver in drivers}
        assert len(nodes) == 1
        for driver in drivers:
            assert driver.line("sum") == "7"
        for driver in drivers:
            driver.say("end")
        for driver in drivers:
            driver.end()
        gone(nodes.pop(), runtime_dir)
    finally:
        for driver in drivers:
            driver.kill()


def test_start_while_another_ends(runtime_dir: Path, tmp_path: Path) -> None:
    code = PEER + 'print("sum", nbray.get(work.remote(7, 0), timeout=30))\n'
    for _ in range(3):
        drivers = [Script(tmp_path / f"driver{number}.py", code) for number in range(3)]
        try:
            for driver in drivers:
                text = driver.end(60)
                assert driver.process.returncode == 0, text
                assert "sum 7" in text
        finally:
            for driver in drivers:
                driver.kill()
    until(lambda: list(runtime_dir.iterdir()) == [])


def test_interrupted_start_leaves_nothing(runtime_dir: Path, tmp_path: Path) -> None:
    code = """
import threading
seconds = float(sys.argv[1])
print("begin")
try:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    nbray.init(num_cpus=1)
    time.sleep(seconds)
except KeyboardInterrupt:
    pass
"""
    for seconds in (0.0, 0.02, 0.05, 0.08, 0.12, 0.2):
        with script(tmp_path / "driver.py", code, str(seconds)) as driver:
            text = driver.end()
            assert driver.process.returncode == 0, text
        until(lambda: list(runtime_dir.iterdir()) == [], f"nothing is left after {seconds}", 10)


def _notebook(path: Path, *cells: str) -> None:
    content = {
        "cells": [
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"c{number}",
                "metadata": {},
                "outputs": [],
                "source": cell,
            }
            for number, cell in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_nbconvert_leaves_nothing(runtime_dir: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.ipynb"
    _notebook(
        book,
        "%load_ext nbray",
        "%cluster start --cpus 2",
        "%%remote\nx = 6 * 7",
        "assert x == 42",
        "import os\nfrom nbray.api import context\nopen('pid', 'w').write(context.require().engine.details()['node_pid'])",
    )
    command = [
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        str(book),
        "--output",
        "done",
    ]
    done = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    node = int((tmp_path / "pid").read_text())
    assert not alive(node)
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.slow
def test_pytest_run_leaves_nothing(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        """
import nbray

@nbray.remote
def f(x):
    return x + 1

def test_it():
    assert nbray.get(f.remote(1)) == 2

def test_fails():
    assert nbray.get(f.remote(1)) == 3
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    done = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert list(runtime_dir.iterdir()) == []


def test_driver_that_only_disconnects(runtime_dir: Path, tmp_path: Path) -> None:
    """A kernel that restarts leaves without a word: what its session runs goes on."""
    code = (
        START
        + """
from nbray.api import session
session.decide_exit(lambda: False)
@nbray.remote
def work(path):
    time.sleep(0.5)
    open(path, "w").write("done")
ref = work.remote(sys.argv[1])
"""
    )
    with script(tmp_path / "driver.py", code, str(tmp_path / "mark"), NBRAY_TTL="1") as driver:
        node = started(driver)
        driver.end()
        assert driver.process.returncode == 0, driver.output
    assert alive(node)
    until((tmp_path / "mark").exists)
    gone(node, runtime_dir, 20)


def test_cluster_stopped_from_outside(cluster: Any) -> None:
    from nbray import clusters

    @cluster.remote
    def work() -> None:
        time.sleep(1000)

    ref = work.remote()
    (record,) = clusters.list_clusters()
    began = time.monotonic()
    clusters.stop_cluster(record)
    assert time.monotonic() - began < 5
    with pytest.raises(cluster.exceptions.NbrayError, match=r"SIGTERM|ended"):
        cluster.get(ref, timeout=10)
