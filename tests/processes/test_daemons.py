"""The head, the zygote and the node die while work goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nbray.exceptions import NodeDiedError, WorkerCrashedError
from tests.processes.tools import (
    alive,
    children,
    daemon,
    daemons,
    descendants,
    node_of,
    resident,
    until,
    wait_ended,
    workers,
)

# -- the head


def test_killed_head_is_replaced_and_nothing_is_lost(cluster: Any) -> None:
    @cluster.remote
    def square(number: int) -> int:
        return number * number

    node = node_of(cluster)
    done = 0
    for round_ in range(4):
        refs = [square.remote(number) for number in range(100)]
        if round_ % 2:
            # What they did is recorded, or about to be.
            cluster.get(refs, timeout=30)
        head = daemon(node, "head")
        os.kill(head, signal.SIGKILL)
        assert cluster.get(refs, timeout=30) == [number * number for number in range(100)]
        done += 100
        until(lambda: daemons(node).get("nbray head", head) != head, "another head runs")  # noqa: B023
        tasks = cluster.state.tasks()
        finished = [
            state
            for name, state in zip(tasks["name"].to_pylist(), tasks["state"].to_pylist(), strict=True)
            if name.endswith("square")
        ]
        assert finished.count("FINISHED") == done


def test_calls_that_need_the_head_wait_for_it(cluster: Any) -> None:
    @cluster.remote
    class Named:
        def call(self) -> int:
            return 5

    node = node_of(cluster)
    for number in range(3):
        head = daemon(node, "head")
        os.kill(head, signal.SIGKILL)
        # The name is recorded by the head before the handle is returned.
        actor = Named.options(name=f"actor {number}").remote()
        assert cluster.get(actor.call.remote(), timeout=30) == 5
        assert cluster.get(cluster.get_actor(f"actor {number}").call.remote(), timeout=30) == 5


def test_job_numbers_go_on(cluster: Any) -> None:
    from nbray import clusters
    from nbray.api.session import connect
    from nbray.messages import DRIVER

    node = node_of(cluster)
    (record,) = clusters.list_clusters()
    jobs = []
    for number in range(3):
        engine = connect(record, DRIVER, f"session {number}", f"driver {number}")
        jobs.append(engine.details()["job"])
        engine.shutdown(stop=False)
        head = daemon(node, "head")
        os.kill(head, signal.SIGKILL)
        wait_ended(head)
    assert jobs == sorted(set(jobs)), "no number is given twice"


def test_head_that_is_killed_again_and_again(cluster: Any) -> None:
    @cluster.remote
    def square(number: int) -> int:
        return number * number

    node = node_of(cluster)
    stop = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not stop.wait(0.02):
            head = daemons(node).get("nbray head")
            if head is not None:
                try:
                    os.kill(head, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        refs = [square.remote(number) for number in range(2000)]
        assert cluster.get(refs, timeout=60) == [number * number for number in range(2000)]
        until(lambda: kills >= 5)
    finally:
        stop.set()
        thread.join()
    tasks = cluster.state.tasks()
    assert tasks["state"].to_pylist().count("FINISHED") == 2000
    # It is not started anew without a pause for ever.
    until(lambda: "nbray head" in daemons(node))


def test_shutdown_while_the_head_is_gone(runtime_dir: Path) -> None:
    import nbray

    nbray.init(num_cpus=1)
    node = node_of(nbray)
    below = descendants(node)
    os.kill(daemon(node, "head"), signal.SIGKILL)
    began = time.monotonic()
    nbray.shutdown()
    assert time.monotonic() - began < 5
    for pid in (node, *below, *descendants(node)):
        wait_ended(pid, 5)
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.slow
def test_history_that_cannot_be_written_slows_submissions_down(cluster: Any) -> None:
    """The node keeps at most 64 MB that the head has not acknowledged (protocol section 8)."""
    from nbray import clusters
    from nbray.api.session import connect

    # Ten kilobytes of history each.
    @cluster.remote(name="n" * 10_000)
    def work() -> None:
        return None

    node = node_of(cluster)
    head = daemon(node, "head")
    done = 0

    def submit() -> None:
        nonlocal done
        while done < 12_000:
            cluster.get([work.remote() for _ in range(200)])
            done += 200

    cluster.get(work.remote(), timeout=30)
    memory = resident(node)
    os.kill(head, signal.SIGSTOP)
    thread = threading.Thread(target=submit, daemon=True)
    try:
        thread.start()

        def held_up() -> bool:
            before = done
            time.sleep(1.0)
            return done == before and done > 3000

        until(held_up, seconds=60)
        assert done < 10_000
        assert resident(node) - memory < 200 << 20
        # Others are served: what they ask makes no history.
        (record,) = clusters.list_clusters()
        observer = connect(record)
        assert observer.query("memory")["objects"] >= 0
        observer.shutdown(stop=False)
    finally:
        os.kill(head, signal.SIGCONT)
    thread.join(60)
    assert done == 12_000


# -- the zygote


def test_killed_zygote_is_replaced(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @cluster.remote(max_retries=1)
    def patient(path: Path) -> int:
        with path.open("a") as file:
            file.write("x")
        while path.read_text() != "xx":
            time.sleep(0.01)
        return os.getpid()

    @cluster.remote(max_retries=0)
    def impatient(path: Path) -> None:
        path.write_text("x")
        time.sleep(1000)

    @cluster.remote(max_restarts=1)
    class Counter:
        def __init__(self) -> None:
            self.n = 0

        def up(self) -> int:
            self.n += 1
            return self.n

    node = node_of(cluster)
    counter = Counter.remote()
    assert cluster.get(counter.up.remote(), timeout=30) == 1
    first, second = patient.remote(notes), impatient.remote(tmp_path / "other")
    until(lambda: notes.exists() and (tmp_path / "other").exists())
    zygote, old = daemon(node, "zygote"), workers(node)
    os.kill(zygote, signal.SIGKILL)
    for pid in (zygote, *old):
        wait_ended(pid, 10)
    assert cluster.get(first, timeout=30) not in old
    with pytest.raises(WorkerCrashedError, match="impatient"):
        cluster.get(second, timeout=30)
    assert cluster.get(counter.up.remote(), timeout=30) == 1
    assert daemon(node, "zygote") != zygote
    assert not [pid for pid in children(node) if not alive(pid)], "no zombies"


def test_what_workers_started_ends_when_the_zygote_is_killed(cluster: Any) -> None:
    import subprocess
    import sys

    @cluster.remote
    def spawns() -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid

    @cluster.remote
    def one() -> int:
        return 1

    started = cluster.get(spawns.remote(), timeout=30)
    os.kill(daemon(node_of(cluster), "zygote"), signal.SIGKILL)
    wait_ended(started, 10)
    assert cluster.get(one.remote(), timeout=30) == 1


def test_zygote_killed_under_load(cluster: Any) -> None:
    @cluster.remote(max_retries=-1)
    def square(number: int) -> int:
        time.sleep(0.001)
        return number * number

    node = node_of(cluster)
    refs = [square.remote(number) for number in range(1000)]
    for count in (100, 300, 500):
        cluster.wait(refs, num_returns=count, timeout=60)
        zygote = daemon(node, "zygote")
        os.kill(zygote, signal.SIGKILL)
        wait_ended(zygote)
    assert cluster.get(refs, timeout=60) == [number * number for number in range(1000)]


# -- the node


def _blocked_get(nbray: Any, wait: Any) -> None:
    nbray.get(wait)


def _blocked_wait(nbray: Any, wait: Any) -> None:
    while True:
        nbray.wait([wait], timeout=1)


def _puts(nbray: Any, _wait: Any) -> None:
    while True:
        nbray.put(bytes(1_000_000))


def _small_puts(nbray: Any, _wait: Any) -> None:
    while True:
        nbray.put(1)


def _submissions(nbray: Any, _wait: Any) -> None:
    @nbray.remote
    def nothing() -> None:
        return None

    while True:
        nothing.remote()


def _future(nbray: Any, wait: Any) -> None:
    wait.future().result()


def _awaits(nbray: Any, wait: Any) -> None:
    import asyncio

    async def main() -> None:
        await wait

    asyncio.run(main())


def _queries(nbray: Any, _wait: Any) -> None:
    while True:
        nbray.state.tasks()


def _generator(nbray: Any, _wait: Any) -> None:
    @nbray.remote
    def endless() -> Any:
        while True:
            yield 1
            time.sleep(0.01)

    for ref in endless.options(num_returns="streaming").remote():
        nbray.get(ref)


@pytest.mark.parametrize(
    "occupation",
    [_blocked_get, _blocked_wait, _puts, _small_puts, _submissions, _future, _awaits, _queries, _generator],
)
def test_death_of_the_node_is_an_error_everywhere(runtime_dir: Path, occupation: Any) -> None:
    import nbray

    nbray.init(num_cpus=2)
    try:

        @nbray.remote
        def blocked() -> None:
            time.sleep(1000)

        node = node_of(nbray)
        wait = blocked.remote()
        below = descendants(node)
        caught: list[BaseException] = []
        ended: list[float] = []
        busy = threading.Event()

        def occupied() -> None:
            busy.set()
            try:
                occupation(nbray, wait)
            except BaseException as error:
                caught.append(error)
            ended.append(time.monotonic())

        thread = threading.Thread(target=occupied, daemon=True)
        thread.start()
        busy.wait()
        time.sleep(0.2)
        below = descendants(node)
        killed = time.monotonic()
        os.kill(node, signal.SIGKILL)
        thread.join(20)
        assert not thread.is_alive(), "it hangs"
        assert ended[0] - killed < 5
        assert isinstance(caught[0], NodeDiedError), repr(caught[0])
        assert str(node) in str(caught[0])
        # Whatever is tried next says so too.
        for verb in (
            lambda: nbray.get(wait),
            lambda: nbray.put(1),
            lambda: blocked.remote(),
            lambda: nbray.state.nodes(),
        ):
            with pytest.raises(NodeDiedError):
                verb()
        for pid in below:
            wait_ended(pid, 10)
    finally:
        nbray.shutdown()
    # The next start does not mind what the dead one has left, and removes it.
    nbray.init(num_cpus=1)
    try:

        @nbray.remote
        def one() -> int:
            return 1

        assert nbray.get(one.remote(), timeout=30) == 1
        assert node_of(nbray) != node
    finally:
        nbray.shutdown()
    assert list(runtime_dir.iterdir()) == []


def test_a_task_that_waits_ends_with_the_node(runtime_dir: Path) -> None:
    import nbray

    nbray.init(num_cpus=2)
    try:

        @nbray.remote
        def waits(refs: list[Any]) -> None:
            nbray.get(refs)

        @nbray.remote
        def sleeps() -> None:
            time.sleep(1000)

        nested = waits.remote([sleeps.remote()])
        node = node_of(nbray)
        until(lambda: len(workers(node)) >= 2)
        below = descendants(node)
        os.kill(node, signal.SIGKILL)
        for pid in below:
            wait_ended(pid, 10)
        with pytest.raises(NodeDiedError):
            nbray.get(nested)
    finally:
        nbray.shutdown()
    from nbray import clusters

    assert clusters.list_clusters() == []
    with pytest.raises(ConnectionError):
        nbray.init(address="auto")
    nbray.init(num_cpus=1)
    nbray.shutdown()
    assert list(runtime_dir.iterdir()) == []


def test_clients_that_come_and_go_do_no_harm(cluster: Any) -> None:
    import socket

    from nbray import clusters

    @cluster.remote
    def one() -> int:
        return 1

    (record,) = clusters.list_clusters()
    for number in range(50):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(record.paths.node_socket)
            if number % 3 == 1:
                sock.sendall(b"\x07\x00\x00\x00nonsense that is no message at all")
            elif number % 3 == 2:
                sock.sendall(b"\xff\xff\xff\xff")
    assert cluster.get(one.remote(), timeout=30) == 1


def test_nothing_is_left_when_node_and_zygote_are_killed_at_the_same_instant(
    runtime_dir: Path, tmp_path: Path
) -> None:
    """Not even what busy workers had started, and what that had started in its turn."""
    import subprocess
    import sys

    import nbray

    nbray.init(num_cpus=2)
    try:

        @nbray.remote(max_retries=0)
        def spawns(name: str, *, busy: bool) -> None:
            code = (
                "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
                f"open({str(tmp_path / name)!r} + '.new', 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
                f"os.rename({str(tmp_path / name)!r} + '.new', {str(tmp_path / name)!r}); time.sleep(1000)"
            )
            process = subprocess.Popen([sys.executable, "-c", code])
            if busy:
                while process.pid:
                    # Within C, and without letting go of the interpreter.
                    sum(range(10_000_000))
            process.wait()

        refs = [spawns.remote("busy", busy=True), spawns.remote("waits", busy=False)]
        started = []
        for name in ("busy", "waits"):
            until((tmp_path / name).exists, f"{name} has started something")
            started += list(map(int, (tmp_path / name).read_text().split()))
        node = node_of(nbray)
        zygote = daemon(node, "zygote")
        below = descendants(node)
        assert set(started) <= set(below)
        # Stopped first, so that neither can do anything between the two signals.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (node, zygote):
                os.kill(pid, number)
        for pid in below:
            wait_ended(pid, 10)
        with pytest.raises(NodeDiedError):
            nbray.get(refs)
    finally:
        nbray.shutdown()
    nbray.init(num_cpus=1)
    nbray.shutdown()
    assert list(runtime_dir.iterdir()) == []


def test_calls_that_need_a_head_that_does_not_come_back_fail_after_a_while(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database cannot be opened; when it can again, everything goes on."""
    import nbray
    from nbray.exceptions import GcsUnavailableError

    monkeypatch.setenv("NBRAY_HEAD_PATIENCE", "1")
    nbray.init(num_cpus=1)
    try:

        @nbray.remote
        def square(number: int) -> int:
            return number * number

        @nbray.remote
        class Named:
            def call(self) -> int:
                return 7

        first = Named.options(name="first").remote()
        assert nbray.get(first.call.remote()) == 7
        node = node_of(nbray)
        head = daemon(node, "head")
        database = Path(nbray.api.context.require().engine.details()["spill"]) / "gcs.sqlite"
        # The node must not start another one before that cannot work.
        os.kill(node, signal.SIGSTOP)
        os.kill(head, signal.SIGKILL)
        wait_ended(head)
        aside = database.with_name("aside")
        database.rename(aside)
        database.mkdir()
        os.kill(node, signal.SIGCONT)
        started = time.monotonic()
        for call in (
            lambda: Named.options(name="second").remote(),
            lambda: nbray.state.tasks(),
        ):
            with pytest.raises(GcsUnavailableError):
                call()
        assert time.monotonic() - started < 8
        # Whatever needs no head works all the time.
        assert nbray.get([square.remote(number) for number in range(20)]) == [n * n for n in range(20)]
        assert nbray.get(first.call.remote()) == 7
        database.rmdir()
        aside.rename(database)
        until(lambda: "nbray head" in daemons(node), "a head runs again")
        assert nbray.get(nbray.get_actor("first").call.remote(), timeout=30) == 7
        names = nbray.state.tasks()["name"].to_pylist()
        assert len([name for name in names if name.endswith("square")]) == 20
    finally:
        nbray.shutdown()
    assert list(runtime_dir.iterdir()) == []
