"""Cancelling tasks and calls before, while and after they run."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nbray.exceptions import TaskCancelledError
from tests.processes.tools import PATIENCE, alive, until, wait_ended


def cancelled(nbray: Any, ref: Any, seconds: float = PATIENCE) -> float:
    """Expect that ``get`` says it was cancelled; seconds that took."""
    began = time.monotonic()
    with pytest.raises(TaskCancelledError):
        nbray.get(ref, timeout=seconds)
    return time.monotonic() - began


@pytest.mark.cluster(num_cpus=1)
def test_queued_task(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def holds(path: Path) -> int:
        until(path.exists)
        return 1

    @cluster.remote
    def ran(path: Path) -> None:
        path.touch()

    first = holds.remote(tmp_path / "go")
    second, third = ran.remote(tmp_path / "second"), ran.remote(tmp_path / "third")
    cluster.cancel(second)
    cancelled(cluster, second, 5)
    (tmp_path / "go").touch()
    assert cluster.get(first, timeout=30) == 1
    assert cluster.get(third, timeout=30) is None
    assert not (tmp_path / "second").exists()


@pytest.mark.cluster(num_cpus=1)
def test_prefetched_tasks(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote(max_retries=0)
    def work(number: int, path: Path | None = None) -> int:
        if path is not None:
            path.touch()
            until((path.parent / "go").exists)
        return number

    # Short, so that the next ones are given to the worker ahead.
    cluster.get([work.remote(number) for number in range(100)], timeout=30)
    first = work.remote(0, tmp_path / "begun")
    refs = [work.remote(number) for number in range(1, 40)]
    until((tmp_path / "begun").exists)
    for ref in refs[::2]:
        cluster.cancel(ref)
    for ref in refs[::2]:
        cancelled(cluster, ref, 10)
    (tmp_path / "go").touch()
    assert cluster.get([first, *refs[1::2]], timeout=30) == [0, *range(2, 40, 2)]


def test_running_task_gets_an_interrupt_in_its_own_code(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def sleeps(path: Path) -> None:
        try:
            path.touch()
            time.sleep(1000)
        except KeyboardInterrupt:
            (path.parent / "interrupted").write_text(str(os.getpid()))
            raise

    @cluster.remote
    def computes(path: Path) -> None:
        path.touch()
        while True:
            sum(range(1000))

    @cluster.remote
    def pid() -> int:
        return os.getpid()

    for function in (sleeps, computes):
        begun = tmp_path / "begun"
        ref = function.remote(begun)
        until(begun.exists)
        began = time.monotonic()
        cluster.cancel(ref)
        cancelled(cluster, ref, 10)
        # Not by the end of its worker, which would take two seconds.
        assert time.monotonic() - began < 1.9
        begun.unlink()
    worker = int((tmp_path / "interrupted").read_text())
    assert alive(worker)
    assert cluster.get([pid.remote() for _ in range(20)], timeout=30)


def test_task_that_waits_for_others(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def sleeps(path: Path) -> None:
        path.write_text(str(os.getpid()))
        time.sleep(1000)

    @cluster.remote
    def waits(path: Path) -> None:
        cluster.get(sleeps.remote(path))

    for recursive in (True, False):
        inner = tmp_path / f"inner{recursive}"
        ref = waits.remote(inner)
        until(lambda: inner.exists() and inner.read_text())  # noqa: B023
        cluster.cancel(ref, recursive=recursive)
        cancelled(cluster, ref, 10)
        states = cluster.state.tasks()
        if recursive:
            until(lambda: "RUNNING" not in cluster.state.tasks()["state"].to_pylist())
        else:
            running = [
                n
                for n, s in zip(states["name"].to_pylist(), states["state"].to_pylist(), strict=True)
                if s == "RUNNING"
            ]
            assert len(running) == 1
            assert "sleeps" in running[0]


def test_children_submitted_after_the_cancel_are_refused(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def child(path: Path) -> None:
        path.touch()

    @cluster.remote
    def parent(path: Path) -> None:
        try:
            path.touch()
            time.sleep(1000)
        except KeyboardInterrupt:
            child.remote(path.parent / "child")
            time.sleep(0.2)
            raise

    ref = parent.remote(tmp_path / "begun")
    until((tmp_path / "begun").exists)
    cluster.cancel(ref)
    cancelled(cluster, ref, 10)
    until(lambda: set(cluster.state.tasks()["state"].to_pylist()) == {"CANCELLED"})
    assert not (tmp_path / "child").exists()


def test_loop_in_c_is_ended_with_its_worker(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def stuck(path: Path) -> None:
        path.write_text(str(os.getpid()))
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        sum(range(10**12))

    ref = stuck.remote(tmp_path / "pid")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    began = time.monotonic()
    cluster.cancel(ref)
    cancelled(cluster, ref, 20)
    assert 1.5 < time.monotonic() - began < 10
    wait_ended(int((tmp_path / "pid").read_text()))


def test_task_that_catches_the_interrupt(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def stubborn(path: Path) -> str:
        try:
            path.touch()
            time.sleep(1000)
        except KeyboardInterrupt:
            pass
        return "all the same"

    ref = stubborn.remote(tmp_path / "begun")
    until((tmp_path / "begun").exists)
    cluster.cancel(ref)
    # First of Finished and Cancelled wins; this one has finished.
    try:
        assert cluster.get(ref, timeout=20) == "all the same"
    except TaskCancelledError:
        pass


def test_force(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote(max_retries=5)
    def stuck(path: Path) -> None:
        path.write_text(str(os.getpid()))
        while True:
            try:
                time.sleep(1000)
            except KeyboardInterrupt:
                pass

    ref = stuck.remote(tmp_path / "pid")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    began = time.monotonic()
    cluster.cancel(ref, force=True)
    cancelled(cluster, ref, 20)
    assert time.monotonic() - began < 1.9
    wait_ended(int((tmp_path / "pid").read_text()))


def test_finished_task_stays_finished(cluster: Any) -> None:
    @cluster.remote
    def one() -> int:
        return 1

    ref = one.remote()
    assert cluster.get(ref, timeout=30) == 1
    for force in (False, True):
        cluster.cancel(ref, force=force)
    assert cluster.get(ref, timeout=30) == 1
    assert cluster.get(one.remote(), timeout=30) == 1


def test_cancel_at_once_and_at_any_moment(cluster: Any) -> None:
    """Whether a task is queued, on its way to a worker, being unpickled or over: it is cancelled or finished, never stuck, and no other is hit."""

    @cluster.remote
    def work(number: int) -> int:
        time.sleep(0.003)
        return number

    results = {"finished": 0, "cancelled": 0}
    for round_ in range(60):
        bystander, ref = work.remote(-1), work.remote(round_)
        time.sleep(round_ % 12 * 0.001)
        cluster.cancel(ref)
        try:
            assert cluster.get(ref, timeout=10) == round_
            results["finished"] += 1
        except TaskCancelledError:
            results["cancelled"] += 1
        assert cluster.get(bystander, timeout=10) == -1
    assert results["cancelled"] > 0


class Slow:
    """A value whose unpickling takes a while, tells when it begins, and must not be interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        def load(path: Path) -> int:
            path.touch()
            end = time.monotonic() + 0.5
            try:
                while time.monotonic() < end:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                (path.parent / "torn").touch()
                raise
            return 5

        return load, (self.path,)


def test_arguments_are_read_to_the_end(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def takes(value: int, path: Path) -> None:
        path.touch()
        time.sleep(1000)

    ref = takes.remote(Slow(tmp_path / "reading"), tmp_path / "begun")
    until((tmp_path / "reading").exists)
    began = time.monotonic()
    cluster.cancel(ref)
    cancelled(cluster, ref, 20)
    assert time.monotonic() - began < 1.9, "the interrupt comes when the user's code begins"
    assert not (tmp_path / "torn").exists()
    assert not (tmp_path / "begun").exists()


def test_interrupt_for_a_task_that_is_over_hits_no_other(cluster: Any) -> None:
    @cluster.remote
    def quick() -> int:
        return 1

    @cluster.remote
    def slow() -> int:
        time.sleep(0.05)
        return 2

    for _ in range(30):
        first = quick.remote()
        others = [slow.remote() for _ in range(2)]
        cluster.cancel(first)
        assert cluster.get(others, timeout=20) == [2, 2]


# -- actors


def test_queued_calls_are_dropped(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    class Actor:
        def __init__(self) -> None:
            self.calls: list[int] = []

        def wait(self, path: Path) -> None:
            until(path.exists)

        def note(self, number: int) -> list[int]:
            self.calls.append(number)
            return self.calls

    actor = Actor.remote()
    first = actor.wait.remote(tmp_path / "go")
    refs = [actor.note.remote(number) for number in range(5)]
    cluster.cancel(refs[1])
    cluster.cancel(refs[3])
    cancelled(cluster, refs[1], 10)
    cancelled(cluster, refs[3], 10)
    (tmp_path / "go").touch()
    cluster.get(first, timeout=20)
    assert cluster.get(refs[4], timeout=20) == [0, 2, 4]


def test_running_method_is_not_interrupted_but_can_look(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    class Actor:
        def __init__(self) -> None:
            self.rounds = 0

        def loop(self, path: Path) -> str:
            while not cluster.get_runtime_context().is_canceled():
                self.rounds += 1
                path.touch()
                time.sleep(0.01)
            return "saw it"

        def rounds_made(self) -> int:
            return self.rounds

    actor = Actor.remote()
    ref = actor.loop.remote(tmp_path / "begun")
    until((tmp_path / "begun").exists)
    cluster.cancel(ref)
    try:
        assert cluster.get(ref, timeout=20) == "saw it"
    except TaskCancelledError:
        pass
    # Its state is as it left it.
    assert cluster.get(actor.rounds_made.remote(), timeout=20) > 0


def test_async_method_is_cancelled(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    class Actor:
        def __init__(self) -> None:
            self.seen = 0

        async def sleeps(self, path: Path) -> None:
            path.touch()  # noqa: ASYNC240
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                self.seen += 1
                raise

        async def cancels(self) -> int:
            return self.seen

    actor = Actor.remote()
    ref = actor.sleeps.remote(tmp_path / "begun")
    until((tmp_path / "begun").exists)
    cluster.cancel(ref)
    cancelled(cluster, ref, 10)
    assert cluster.get(actor.cancels.remote(), timeout=20) == 1


def test_generator(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote(num_returns="streaming")
    def counts(path: Path) -> Any:
        for number in range(10**9):
            yield number
            path.touch()
            time.sleep(0.01)

    generator = counts.remote(tmp_path / "begun")
    assert cluster.get(next(generator), timeout=20) == 0
    until((tmp_path / "begun").exists)
    cluster.cancel(generator)

    def drain() -> None:
        for ref in generator:
            cluster.get(ref, timeout=20)

    with pytest.raises(TaskCancelledError):
        drain()
