"""Worker processes die: what ran is tried again or fails with an error that says what happened; what waited loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError
from tests.processes.tools import alive, node_of, until, wait_ended, workers


def attempts(path: Path) -> list[int]:
    """Pids that have run a task, in order."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_killed_task_is_retried_up_to_its_limit(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @cluster.remote(max_retries=2)
    def stubborn(survive: int) -> int:
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        while len(attempts(notes)) < survive:
            time.sleep(0.01)
        return len(attempts(notes))

    ref = stubborn.remote(3)
    for number in (1, 2):
        until(lambda: len(attempts(notes)) >= number)  # noqa: B023
        os.kill(attempts(notes)[-1], signal.SIGKILL)
    assert cluster.get(ref, timeout=30) == 3
    assert len(set(attempts(notes))) == 3


def test_error_after_the_last_attempt_names_task_and_signal(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @cluster.remote(max_retries=1)
    def doomed() -> None:
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerCrashedError) as caught:
        cluster.get(doomed.remote(), timeout=30)
    assert len(attempts(notes)) == 2
    text = str(caught.value)
    assert "doomed" in text
    assert "SIGKILL" in text
    assert "2 attempts" in text
    assert "max_retries=1" in text


def test_leaving_by_os_exit_and_crashing(cluster: Any) -> None:
    @cluster.remote(max_retries=0)
    def leaves() -> None:
        os._exit(7)

    @cluster.remote(max_retries=0)
    def crashes() -> None:
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(WorkerCrashedError, match=r"leaves.*exit status 7"):
        cluster.get(leaves.remote(), timeout=30)
    with pytest.raises(WorkerCrashedError, match=r"crashes.*SIGSEGV"):
        cluster.get(crashes.remote(), timeout=30)


@pytest.mark.cluster(num_cpus=1)
def test_tasks_behind_a_killed_one_run_exactly_once(cluster: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    @cluster.remote(max_retries=0)
    def work(number: int, die: bool = False) -> int:
        with ran.open("a") as file:
            file.write(f"{number}\n")
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    # Short enough that the next ones are given to the worker ahead.
    cluster.get([work.remote(-1) for _ in range(50)], timeout=30)
    ran.unlink()
    for _ in range(5):
        refs = [work.remote(number, number == 3) for number in range(200)]
        cluster.wait(refs, num_returns=len(refs), timeout=30)
        failed = []
        for number, ref in enumerate(refs):
            try:
                assert cluster.get(ref, timeout=30) == number
            except WorkerCrashedError:
                failed.append(number)
        lines = [int(line) for line in ran.read_text().split()]
        ran.unlink()
        assert sorted(lines) == list(range(200)), "each has run once"
        # The result of one that had just ended before may have been lost with the worker.
        assert 3 in failed
        assert set(failed) <= {0, 1, 2, 3}


@pytest.mark.cluster(num_cpus=1)
def test_results_do_not_wait_for_the_task_behind(cluster: Any) -> None:
    @cluster.remote
    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    # Short so far: the slow one is given to the worker together with those before it.
    cluster.get([work.remote(0.0) for _ in range(200)], timeout=30)
    refs = [work.remote(0.0) for _ in range(5)]
    slow = work.remote(10.0)
    began = time.monotonic()
    assert cluster.get(refs, timeout=30) == [0.0] * 5
    assert time.monotonic() - began < 5
    cluster.cancel(slow)


@pytest.mark.cluster(num_cpus=2)
def test_many_kills_under_load(cluster: Any) -> None:
    @cluster.remote(max_retries=-1)
    def square(number: int) -> int:
        time.sleep(0.002)
        return number * number

    node = node_of(cluster)
    refs = [square.remote(number) for number in range(600)]
    for _ in range(15):
        cluster.wait(refs, num_returns=1, timeout=30)
        for pid in workers(node)[:1]:
            os.kill(pid, signal.SIGKILL)
            wait_ended(pid)
        refs = refs[20:]
    assert cluster.get(refs, timeout=60) == [number * number for number in range(300, 600)]


def test_idle_workers_killed(cluster: Any) -> None:
    @cluster.remote
    def pid() -> int:
        return os.getpid()

    first = cluster.get(pid.remote(), timeout=30)
    for worker in workers(node_of(cluster)):
        os.kill(worker, signal.SIGKILL)
    assert cluster.get(pid.remote(), timeout=30) != first


def test_output_of_a_crash_reaches_the_driver(cluster: Any, capfd: pytest.CaptureFixture[str]) -> None:
    @cluster.remote(max_retries=0)
    def last_words() -> None:
        os.write(2, b"the last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerCrashedError):
        cluster.get(last_words.remote(), timeout=30)
    seen = ""

    def there() -> bool:
        nonlocal seen
        captured = capfd.readouterr()
        seen += captured.out + captured.err
        return "the last words" in seen

    until(there)
    assert "last_words" in seen


def test_large_last_words_are_read_to_the_end(cluster: Any) -> None:
    @cluster.remote(max_retries=0)
    def many() -> None:
        for _ in range(300):
            cluster.put(bytes(10_000))
        os._exit(0)

    # Megabytes of messages may lie in the socket when the process has ended.
    for _ in range(5):
        with pytest.raises(WorkerCrashedError):
            cluster.get(many.remote(), timeout=30)


def test_what_a_task_has_started_ends_with_its_worker(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote(max_retries=0)
    def spawns() -> tuple[int, int, int]:
        command = [sys.executable, "-c", "import time; time.sleep(1000)"]
        own = subprocess.Popen(command)
        apart = subprocess.Popen(command, start_new_session=True)
        forked = os.fork()
        if forked == 0:
            time.sleep(1000)
        return own.pid, apart.pid, forked

    @cluster.remote
    def nothing() -> None:
        return None

    own, apart, forked = cluster.get(spawns.remote(), timeout=30)
    assert alive(own)
    assert alive(apart)
    assert alive(forked)
    node = node_of(cluster)
    for worker in workers(node):
        os.kill(worker, signal.SIGKILL)
    wait_ended(own)
    wait_ended(forked)
    # Its own session: it may live as long as the cluster, not longer.
    assert cluster.get(nothing.remote(), timeout=30) is None
    cluster.shutdown()
    wait_ended(apart, 5)


def test_killed_actor_dies_with_an_error(cluster: Any) -> None:
    @cluster.remote
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def up(self) -> int:
            self.count += 1
            return self.count

        def pid(self) -> int:
            return os.getpid()

        def wait(self) -> None:
            time.sleep(1000)

    counter = Counter.remote()
    assert cluster.get(counter.up.remote(), timeout=30) == 1
    pid = cluster.get(counter.pid.remote(), timeout=30)
    running, queued = counter.wait.remote(), counter.up.remote()
    os.kill(pid, signal.SIGKILL)
    for ref in (running, queued, counter.up.remote()):
        with pytest.raises(ActorDiedError, match=r"Counter.*SIGKILL"):
            cluster.get(ref, timeout=30)


def test_actor_restarts_with_fresh_state(cluster: Any) -> None:
    import numpy as np

    start = np.arange(200_000)

    @cluster.remote(max_restarts=2)
    class Counter:
        def __init__(self, values: Any, ref: Any, small: int) -> None:
            self.count = int(values.sum()) + len(ref) + small

        def up(self) -> int:
            self.count += 1
            return self.count

        def pid(self) -> int:
            return os.getpid()

    text = cluster.put("x" * 100_000)
    counter = Counter.remote(start, text, 5)
    # What the constructor was given must be there again when it runs again.
    first = int(start.sum()) + 100_000 + 6
    del start, text
    pids = set()
    for _ in range(3):
        assert cluster.get(counter.up.remote(), timeout=30) == first
        pid = cluster.get(counter.pid.remote(), timeout=30)
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
        wait_ended(pid)
    assert len(pids) == 3
    with pytest.raises(ActorDiedError):
        cluster.get(counter.up.remote(), timeout=30)


def test_calls_of_a_restarting_actor(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @cluster.remote(max_restarts=-1)
    class Fragile:
        def __init__(self) -> None:
            self.calls = 0

        def die_once(self) -> int:
            with notes.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if len(attempts(notes)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(attempts(notes))

        def count(self) -> int:
            self.calls += 1
            return self.calls

    fragile = Fragile.remote()
    broken = fragile.die_once.remote()
    behind = [fragile.count.remote() for _ in range(20)]
    with pytest.raises(ActorUnavailableError, match="SIGKILL"):
        cluster.get(broken, timeout=30)
    # They had not started, so they are not failed, and run in order.
    assert cluster.get(behind, timeout=30) == list(range(1, 21))

    notes.unlink()
    retried = fragile.die_once.options(max_task_retries=1).remote()
    assert cluster.get(retried, timeout=30) == 2
    assert len(attempts(notes)) == 2


def test_actor_whose_constructor_kills_it(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @cluster.remote(max_restarts=2)
    class Doomed:
        def __init__(self) -> None:
            with notes.open("a") as file:
                file.write(f"{os.getpid()}\n")
            os._exit(3)

        def call(self) -> None: ...

    doomed = Doomed.remote()
    with pytest.raises(ActorDiedError, match="exit status 3"):
        cluster.get(doomed.call.remote(), timeout=30)
    assert len(attempts(notes)) == 3


def test_kill_without_and_with_restart(cluster: Any) -> None:
    @cluster.remote(max_restarts=1)
    class Actor:
        def pid(self) -> int:
            return os.getpid()

    actor = Actor.remote()
    first = cluster.get(actor.pid.remote(), timeout=30)
    cluster.kill(actor, no_restart=False)
    second = cluster.get(actor.pid.remote(), timeout=30)
    assert second != first
    cluster.kill(actor)
    with pytest.raises(ActorDiedError, match=r"nbray\.kill"):
        cluster.get(actor.pid.remote(), timeout=30)
    wait_ended(second)
