"""Many threads and coroutines of one process, in the driver and in tasks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objects.states import await_empty, eventually

SECONDS = 20.0
THREADS = 32


@pytest.fixture(autouse=True)
def nbray(shared_cluster: Any) -> Iterator[Any]:
    yield shared_cluster
    await_empty()


def in_threads(work: Any, count: int = THREADS) -> list[Any]:
    """Results of ``work(number)`` in as many threads, all of which begin at once; raises the first error."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result(SECONDS * 2) for future in [pool.submit(begin, n) for n in range(count)]]


def test_32_threads_submit_and_get(nbray: Any) -> None:
    @nbray.remote
    def add(a: int, b: int) -> int:
        return a + b

    def work(number: int) -> int:
        found = 0
        for n in range(15):
            found += nbray.get(add.remote(number, n), timeout=SECONDS)
        refs = [add.remote(number, n) for n in range(30)]
        assert nbray.get(refs, timeout=SECONDS) == [number + n for n in range(30)]
        return found

    assert in_threads(work) == [15 * number + sum(range(15)) for number in range(THREADS)]


def test_32_threads_do_all_kinds_of_things(nbray: Any) -> None:
    @nbray.remote
    def double(x: Any) -> Any:
        return x * 2

    @nbray.remote
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def add(self, n: int) -> int:
            self.count += n
            return self.count

    counter = Counter.remote()

    def work(number: int) -> None:
        draw = random.Random(number)
        for step in range(8):
            kind = draw.choice(["put", "large", "wait", "actor", "chain", "poll"])
            if kind == "put":
                assert nbray.get(double.remote(nbray.put(step)), timeout=SECONDS) == step * 2
            elif kind == "large":
                found = nbray.get(double.remote(np.full(20_000, number)), timeout=SECONDS)
                assert found.shape == (20_000,)
                assert (found == number * 2).all()
            elif kind == "wait":
                refs = [double.remote(n) for n in range(5)]
                ready: list[Any] = []
                while refs:
                    done, refs = nbray.wait(refs, num_returns=1, timeout=SECONDS)
                    assert done
                    ready += done
                assert sorted(nbray.get(ready)) == [0, 2, 4, 6, 8]
            elif kind == "actor":
                nbray.get(counter.add.remote(1), timeout=SECONDS)
                counter.add.remote(-1)
            elif kind == "chain":
                ref = double.remote(1)
                for _ in range(5):
                    ref = double.remote(ref)
                assert nbray.get(ref, timeout=SECONDS) == 64
            else:
                ref = double.remote(step)
                deadline = time.monotonic() + SECONDS
                while not nbray.wait([ref], timeout=0)[0]:
                    assert time.monotonic() < deadline
                assert nbray.get(ref, timeout=0) == step * 2

    in_threads(work)
    assert nbray.get(counter.add.remote(0)) == 0


def test_32_threads_wait_for_the_same_refs(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote
    def late(n: int) -> Any:
        while not gate.exists():
            time.sleep(0.005)
        return np.full(10_000, n)

    refs = [late.remote(n) for n in range(2)]
    timer = threading.Timer(0.2, gate.touch)
    timer.start()
    found = in_threads(lambda number: int(nbray.get(refs[number % 2], timeout=SECONDS)[-1]))
    timer.join()
    assert found == [number % 2 for number in range(THREADS)]


def test_a_reader_that_leaves_wakes_another(nbray: Any, tmp_path: Path) -> None:
    """The thread that reads for all has what it waits for; the others' values come later."""

    @nbray.remote
    def after(path: Path, n: int) -> int:
        while not path.exists():
            time.sleep(0.002)
        if n + 1 < 8:
            (tmp_path / str(n + 1)).touch()
        return n

    refs = [after.options(num_cpus=0.1).remote(tmp_path / str(n), n) for n in range(8)]
    order: list[int] = []

    def work(number: int) -> None:
        if number == 8:
            (tmp_path / "0").touch()
        else:
            order.append(nbray.get(refs[number], timeout=SECONDS))

    in_threads(work, 9)
    assert sorted(order) == list(range(8))


def test_values_come_to_a_thread_while_another_is_busy(nbray: Any) -> None:
    """Nobody reads for a while: what was submitted runs nevertheless."""

    @nbray.remote
    def one() -> int:
        return 1

    refs = [one.remote() for _ in range(10)]
    eventually(lambda: nbray.state.tasks(name="one", state="FINISHED").num_rows >= 10, "they have run")
    assert nbray.get(refs, timeout=0) == [1] * 10


# -- timeouts


def test_timeouts(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote
    def late() -> int:
        while not gate.exists():
            time.sleep(0.005)
        return 3

    ref = late.remote()
    for timeout, least in ((0, 0.0), (0.05, 0.05), (0.3, 0.3)):
        start = time.monotonic()
        with pytest.raises(nbray.exceptions.GetTimeoutError, match="The tasks go on"):
            nbray.get(ref, timeout=timeout)
        assert nbray.wait([ref], timeout=timeout) == ([], [ref])
        assert least * 2 <= time.monotonic() - start < least * 2 + 1
    gate.touch()
    assert nbray.wait([ref], timeout=None) == ([ref], [])
    assert nbray.get(ref, timeout=None) == 3
    assert nbray.get(ref, timeout=0) == 3


def test_timeouts_in_tasks(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote
    def late() -> int:
        while not gate.exists():
            time.sleep(0.005)
        return 3

    @nbray.remote
    def ask(box: list[Any]) -> tuple[str, int, int]:
        try:
            nbray.get(box[0], timeout=0.05)
        except TimeoutError as error:
            name = type(error).__name__
        ready = len(nbray.wait(box, timeout=0.05)[0])
        gate.touch()
        return name, ready, nbray.get(box[0], timeout=SECONDS)

    assert nbray.get(ask.remote([late.remote()]), timeout=SECONDS) == ("GetTimeoutError", 0, 3)


# -- threads in tasks


def test_threads_of_a_task_submit_and_get(nbray: Any) -> None:
    """As many as there are CPUs or more: their waits give the task's CPU back, or nothing would run."""

    @nbray.remote
    def square(n: int) -> int:
        return n * n

    @nbray.remote(num_cpus=2)
    def parent(count: int) -> list[int]:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda n: nbray.get(square.remote(n)), range(count)))

    assert nbray.get(parent.remote(16), timeout=SECONDS) == [n * n for n in range(16)]


def test_ids_of_what_threads_of_tasks_make_are_their_own(nbray: Any) -> None:
    @nbray.remote
    def parent(first: int) -> list[int]:
        found: list[Any] = []

        def work(n: int) -> None:
            for i in range(20):
                found.append((first + n * 20 + i, nbray.put(first + n * 20 + i)))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({ref for _, ref in found}) == 80
        return [1 for value, ref in found if nbray.get(ref) == value]

    assert nbray.get([parent.remote(1000 * n) for n in range(4)], timeout=SECONDS) == [[1] * 80] * 4


def test_a_thread_that_outlives_its_task(nbray: Any, tmp_path: Path) -> None:
    @nbray.remote
    def start() -> int:
        def work() -> None:
            while not (tmp_path / "go").exists():
                time.sleep(0.005)
            (tmp_path / "done").write_text(str(nbray.get(nbray.put(41)) + 1))

        threading.Thread(target=work).start()
        return 1

    @nbray.remote
    def other(n: int) -> int:
        return n

    assert nbray.get(start.remote()) == 1
    assert nbray.get([other.remote(n) for n in range(50)]) == list(range(50))
    (tmp_path / "go").touch()
    eventually(
        lambda: (tmp_path / "done").exists() and (tmp_path / "done").read_text() == "42", "it has ended"
    )
    assert nbray.get([other.remote(n) for n in range(50)]) == list(range(50))


# -- asyncio


def test_await(nbray: Any) -> None:
    @nbray.remote
    def add(a: int, b: int) -> int:
        return a + b

    @nbray.remote
    def fail() -> None:
        raise KeyError("missing")

    async def main() -> None:
        assert await add.remote(1, 2) == 3
        assert await asyncio.gather(*[add.remote(n, 1) for n in range(1000)]) == list(range(1, 1001))
        with pytest.raises(KeyError):
            await fail.remote()
        large = nbray.put(np.arange(100_000))
        assert (await large)[-1] == 99_999
        again = add.remote(2, 2)
        assert [await again, await again, nbray.get(again)] == [4, 4, 4]

    asyncio.run(main())


def test_as_completed(nbray: Any) -> None:
    @nbray.remote
    def value(n: int) -> int:
        return n

    async def main() -> list[int]:
        refs = [asyncio.ensure_future(_as_coroutine(value.remote(n))) for n in range(50)]
        return [await following for following in asyncio.as_completed(refs)]

    assert sorted(asyncio.run(main())) == list(range(50))
    futures = [value.remote(n).future() for n in range(50)]
    assert sorted(f.result() for f in concurrent.futures.as_completed(futures, SECONDS)) == list(range(50))


async def _as_coroutine(ref: Any) -> Any:
    return await ref


def test_futures(nbray: Any) -> None:
    @nbray.remote
    def value(n: int) -> int:
        if n < 0:
            raise ValueError(n)
        return n

    assert value.remote(3).future().result(SECONDS) == 3
    assert isinstance(value.remote(-1).future().exception(SECONDS), ValueError)
    called: list[int] = []
    future = value.remote(4).future()
    future.add_done_callback(lambda f: called.append(f.result()))
    eventually(lambda: called == [4], "the callback was called")
    ready = nbray.put(5)
    assert ready.future().result(0.5) == 5


def test_a_ref_may_go_while_its_future_is_awaited(nbray: Any) -> None:
    @nbray.remote
    def value(n: int) -> Any:
        return np.full(20_000, n)

    futures = [value.remote(n).future() for n in range(10)]
    assert [int(f.result(SECONDS)[0]) for f in futures] == list(range(10))


def test_cancelling_an_await_leaves_the_task(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote
    def late() -> int:
        while not gate.exists():
            time.sleep(0.005)
        return 3

    async def main() -> None:
        ref = late.remote()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_as_coroutine(ref), 0.1)
        waiting = asyncio.ensure_future(_as_coroutine(ref))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.touch()
        assert await ref == 3

    asyncio.run(main())


def test_generators_with_async_for(nbray: Any) -> None:
    @nbray.remote(num_returns="streaming")
    def items(n: int) -> Iterator[int]:
        yield from range(n)

    async def consume(n: int) -> list[int]:
        return [await ref async for ref in items.remote(n)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*[consume(n) for n in range(5)])

    assert asyncio.run(main()) == [list(range(n)) for n in range(5)]


def test_await_in_tasks_and_actors(nbray: Any) -> None:
    @nbray.remote
    def leaf(n: int) -> int:
        return n + 1

    @nbray.remote
    def task(n: int) -> int:
        async def inner() -> int:
            return sum(await asyncio.gather(*[leaf.remote(i) for i in range(n)]))

        return asyncio.run(inner())

    @nbray.remote
    class Async:
        async def work(self, n: int) -> int:
            return sum(await asyncio.gather(*[leaf.remote(i) for i in range(n)]))

        async def quick(self) -> int:
            return 1

    # The same workers must go on to serve after that.
    for _ in range(3):
        assert nbray.get([task.remote(10) for _ in range(6)], timeout=SECONDS) == [55] * 6
        assert nbray.get([leaf.remote(n) for n in range(50)], timeout=SECONDS) == list(range(1, 51))
    actor = Async.remote()
    refs = [actor.work.remote(10) for _ in range(10)] + [actor.quick.remote() for _ in range(50)]
    assert nbray.get(refs, timeout=SECONDS) == [55] * 10 + [1] * 50


def test_an_async_actor_awaits_while_others_call_it(nbray: Any) -> None:
    @nbray.remote
    class Meeting:
        def __init__(self) -> None:
            self.here = asyncio.Event()

        async def wait(self, box: list[Any]) -> int:
            await self.here.wait()
            return (await box[0]) + 1

        async def arrive(self) -> None:
            self.here.set()

    @nbray.remote
    def value() -> int:
        return 1

    meeting = Meeting.remote()
    waiting = [meeting.wait.remote([value.remote()]) for _ in range(20)]
    nbray.get(meeting.arrive.remote(), timeout=SECONDS)
    assert nbray.get(waiting, timeout=SECONDS) == [2] * 20


def test_an_event_loop_and_threads_side_by_side(nbray: Any) -> None:
    @nbray.remote
    def value(n: int) -> int:
        return n

    async def gather(number: int) -> list[int]:
        return await asyncio.gather(*[value.remote(number + n) for n in range(50)])

    def work(number: int) -> None:
        if number % 2:
            assert asyncio.run(gather(number)) == [number + n for n in range(50)]
        else:
            refs = [value.remote(number + n) for n in range(50)]
            assert nbray.get(refs, timeout=SECONDS) == [number + n for n in range(50)]

    in_threads(work, 8)
