"""``get``, ``put``, ``wait``, ``cancel``, ``free``: results, orders, limits, and what is refused in which words."""

# mypy: disable-error-code="attr-defined"
# (mypy does not look at what a class decorator returns)

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbray
from nbray.errors import (
    GetTimeoutError,
    ObjectFreedError,
    SerializationError,
    TaskCancelledError,
    WorkerCrashedError,
)


@nbray.remote
def double(x: int) -> int:
    return 2 * x


@nbray.remote
def fail() -> None:
    raise ValueError("boom")


@nbray.remote
def hold(gate: str, value: Any = None) -> Any:
    """Waits until the file is there."""
    deadline = time.monotonic() + 30
    while not Path(gate).exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


@pytest.fixture
def gate(tmp_path: Path) -> str:
    return str(tmp_path / "open")


def open_gate(gate: str) -> None:
    Path(gate).touch()


# -- get


def test_order_and_duplicates(shared_cluster: Any) -> None:
    refs = [double.remote(i) for i in range(4)]
    assert nbray.get(refs[::-1]) == [6, 4, 2, 0]
    assert nbray.get([refs[1], refs[1]]) == [2, 2]
    assert nbray.get([]) == []


def test_first_error_comes_at_once(shared_cluster: Any, gate: str) -> None:
    waiting = hold.remote(gate)
    start = time.monotonic()
    with pytest.raises(ValueError, match="boom"):
        nbray.get([waiting, fail.remote()])
    assert time.monotonic() - start < 20
    open_gate(gate)
    assert nbray.get(waiting) is None


def test_timeout(shared_cluster: Any, gate: str) -> None:
    waiting = hold.remote(gate, 5)
    for timeout in (0, 0.05):
        with pytest.raises(GetTimeoutError, match=f"{timeout:g} s"):
            nbray.get(waiting, timeout=timeout)
    with pytest.raises(TimeoutError):
        nbray.get([waiting, nbray.put(1)], timeout=0)
    open_gate(gate)
    assert nbray.get(waiting, timeout=20) == 5
    assert nbray.get(waiting, timeout=0) == 5


def test_wrong_arguments_of_get(shared_cluster: Any) -> None:
    ref = nbray.put(1)
    for wrong in (3, "ref", (ref,), {ref}, None):
        with pytest.raises(ValueError, match=re.escape(type(wrong).__name__)):
            nbray.get(wrong)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"get\(list\(refs\)\)"):
        nbray.get((ref,))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"list has 3 \(int\)"):
        nbray.get([ref, 3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds >= 0"):
        nbray.get(ref, timeout=-1)
    with pytest.raises(TypeError, match="expected seconds"):
        nbray.get(ref, timeout="1")  # type: ignore[call-overload]


def test_generators_are_returned_unchanged(shared_cluster: Any) -> None:
    @nbray.remote
    def items() -> Any:
        yield 1

    stream = items.remote()
    assert nbray.get(stream) is stream
    assert nbray.get(next(stream)) == 1


def test_arrays_are_shared_and_read_only(shared_cluster: Any) -> None:
    array = np.arange(100_000)
    ref = nbray.put(array)
    view = nbray.get(ref)
    assert np.array_equal(view, array)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    private = nbray.get(ref, writable=True)
    private[0] = 7
    assert nbray.get(ref)[0] == 0


def test_futures_and_await(shared_cluster: Any, gate: str) -> None:
    waiting = hold.remote(gate, 9)
    future = waiting.future()
    assert isinstance(future, Future)
    assert not future.done()
    open_gate(gate)
    assert future.result(20) == 9
    with pytest.raises(ValueError, match="boom"):
        fail.remote().future().result(20)

    async def gather() -> list[int]:
        return list(await asyncio.gather(double.remote(1), double.remote(2)))

    assert asyncio.run(gather()) == [2, 4]


def test_interrupt_in_get(shared_cluster: Any, gate: str) -> None:
    import signal

    waiting = hold.remote(gate, 3)
    timer = threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT))
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        nbray.get(waiting)
    assert time.monotonic() - start < 2
    timer.join()
    assert nbray.get(double.remote(2)) == 4
    open_gate(gate)
    assert nbray.get(waiting) == 3


def test_many_threads(shared_cluster: Any) -> None:
    def work(n: int) -> list[int]:
        return nbray.get([double.remote(n + i) for i in range(20)])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(32))) == [[2 * (n + i) for i in range(20)] for n in range(32)]


# -- put


def test_put(shared_cluster: Any) -> None:
    values: list[Any] = [0, None, b"x" * 100_000, {"a": [1, (2.5, "z")]}, {1, 2}]
    refs = [nbray.put(value) for value in values]
    assert nbray.get(refs) == values
    assert nbray.put(1) != nbray.put(1)


def test_put_of_what_cannot_be(shared_cluster: Any) -> None:
    with pytest.raises(TypeError, match=r"nbray\.put\(\[ref\]\)"):
        nbray.put(nbray.put(1))
    with pytest.raises(SerializationError, match="lock"):
        nbray.put({"a": [threading.Lock()]})


def test_refs_in_values_keep_theirs_alive(shared_cluster: Any) -> None:
    outer = nbray.put([double.remote(4)])
    assert nbray.get(nbray.get(outer)[0]) == 8


def test_free(shared_cluster: Any) -> None:
    ref = nbray.put(np.zeros(50_000))
    nbray.free(ref)
    with pytest.raises(ObjectFreedError, match="free"):
        nbray.get(ref)
    with pytest.raises(TypeError, match="ObjectRef"):
        nbray.free(3)  # type: ignore[arg-type]


# -- wait


def test_wait(shared_cluster: Any, gate: str) -> None:
    waiting = hold.remote(gate)
    done = double.remote(1)
    nbray.get(done)
    assert nbray.wait([waiting, done]) == ([done], [waiting])
    assert nbray.wait([waiting, done], num_returns=2, timeout=0) == ([done], [waiting])
    assert nbray.wait([waiting], timeout=0.05) == ([], [waiting])
    failed = fail.remote()
    assert nbray.wait([waiting, failed], timeout=20) == ([failed], [waiting])
    open_gate(gate)
    assert nbray.wait([waiting, done], num_returns=2) == ([waiting, done], [])


def test_wait_gives_at_most_what_was_asked_in_order(shared_cluster: Any) -> None:
    refs = [double.remote(i) for i in range(5)]
    nbray.get(refs)
    assert nbray.wait(refs, num_returns=2) == (refs[:2], refs[2:])
    assert nbray.wait([]) == ([], [])


def test_wait_takes_generators(shared_cluster: Any, gate: str) -> None:
    @nbray.remote
    def items(gate: str) -> Any:
        yield 1
        deadline = time.monotonic() + 30
        while not Path(gate).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    stream, waiting = items.remote(gate), hold.remote(gate)
    ready, rest = nbray.wait([waiting, stream], timeout=20)
    assert ready == [stream]
    assert rest == [waiting]
    open_gate(gate)
    assert nbray.get(list(stream)) == [1]


def test_wrong_arguments_of_wait(shared_cluster: Any) -> None:
    ref, other = nbray.put(1), nbray.put(2)
    for error, words, arguments, named in [
        (TypeError, r"wait\(\[ref\]\)", ref, {}),
        (TypeError, "list of refs", (ref,), {}),
        (TypeError, r"has 3 \(int\)", [ref, 3], {}),
        (ValueError, "more than once", [ref, other, ref], {}),
        (ValueError, "1 to 2", [ref, other], {"num_returns": 3}),
        (ValueError, "1 to 2", [ref, other], {"num_returns": 0}),
        (TypeError, "whole number", [ref], {"num_returns": 1.0}),
        (ValueError, "seconds >= 0", [ref], {"timeout": -0.1}),
        (TypeError, "expected seconds", [ref], {"timeout": "x"}),
    ]:
        with pytest.raises(error, match=words):
            nbray.wait(arguments, **named)  # type: ignore[arg-type]


# -- cancel


def test_cancel_running(shared_cluster: Any, gate: str, tmp_path: Path) -> None:
    started = tmp_path / "started"

    @nbray.remote(max_retries=3)
    def work() -> None:
        started.touch()
        while True:
            time.sleep(0.005)

    ref = work.remote()
    while not started.exists():
        time.sleep(0.005)
    nbray.cancel(ref)
    with pytest.raises(TaskCancelledError, match="work"):
        nbray.get(ref, timeout=20)
    assert nbray.get(double.remote(3)) == 6


def test_cancel_queued_and_dependents(shared_cluster: Any, gate: str) -> None:
    running = [hold.remote(gate) for _ in range(2)]
    queued = double.remote(1)
    dependent = double.remote(queued)
    nbray.cancel(queued)
    for ref in (queued, dependent):
        with pytest.raises(TaskCancelledError):
            nbray.get(ref, timeout=20)
    open_gate(gate)
    nbray.get(running)


def test_cancel_with_force(shared_cluster: Any, tmp_path: Path) -> None:
    started = tmp_path / "started"

    @nbray.remote
    def stubborn() -> None:
        started.touch()
        while True:
            try:
                time.sleep(1)
            except KeyboardInterrupt:
                pass

    ref = stubborn.remote()
    while not started.exists():
        time.sleep(0.005)
    nbray.cancel(ref, force=True)
    with pytest.raises((TaskCancelledError, WorkerCrashedError)):
        nbray.get(ref, timeout=20)


def test_cancel_reaches_children(shared_cluster: Any, tmp_path: Path) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"

    @nbray.remote
    def child() -> None:
        try:
            started.touch()
            while True:
                time.sleep(0.005)
        except KeyboardInterrupt:
            ended.touch()
            raise

    @nbray.remote
    def parent() -> None:
        nbray.get(child.remote())

    ref = parent.remote()
    while not started.exists():
        time.sleep(0.005)
    nbray.cancel(ref)
    with pytest.raises(TaskCancelledError):
        nbray.get(ref, timeout=20)
    deadline = time.monotonic() + 20
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_cancel_of_what_has_finished(shared_cluster: Any) -> None:
    ref = double.remote(1)
    assert nbray.get(ref) == 2
    nbray.cancel(ref)
    assert nbray.get(ref) == 2


def test_cancel_of_actor_calls(shared_cluster: Any, gate: str) -> None:
    @nbray.remote
    class Waiting:
        async def wait(self) -> None:
            await asyncio.sleep(60)

        def pid(self) -> int:
            return os.getpid()

    waiting = Waiting.remote()
    pid = nbray.get(waiting.pid.remote())
    call = waiting.wait.remote()
    with pytest.raises(ValueError, match=r"nbray\.kill"):
        nbray.cancel(call, force=True)
    nbray.cancel(call)
    with pytest.raises(TaskCancelledError):
        nbray.get(call, timeout=20)
    assert nbray.get(waiting.pid.remote()) == pid


def test_wrong_arguments_of_cancel(shared_cluster: Any) -> None:
    for wrong in (3, [nbray.put(1)]):
        with pytest.raises(TypeError, match=r"cancel\(\) takes the ref"):
            nbray.cancel(wrong)  # type: ignore[arg-type]


# -- questions about the cluster


def test_cluster_facts(shared_cluster: Any) -> None:
    assert nbray.is_initialized()
    assert nbray.cluster_resources()["CPU"] == 2
    assert nbray.available_resources()["CPU"] <= 2
    (node,) = nbray.nodes()
    assert node["Alive"] is True
    assert node["Resources"]["CPU"] == 2
    assert node["NodeID"] == nbray.get_runtime_context().get_node_id()
    assert nbray.get_gpu_ids() == []
