"""``nbray.map``: order, laziness, bounds, batches, errors at their place."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbray
from nbray.api.mapping import _Sizes
from nbray.errors import SerializationError, TaskError, WorkerCrashedError


def square(x: int) -> int:
    return x * x


def picky(x: int) -> int:
    if x % 3 == 2:
        raise ValueError(f"bad {x}")
    return x


def test_results_in_order(shared_cluster: Any) -> None:
    assert list(nbray.map(square, range(1000))) == [x * x for x in range(1000)]
    assert list(nbray.map(lambda x: x + 1, [])) == []
    assert list(nbray.map(str, iter("abc"))) == ["a", "b", "c"]


def test_remote_functions_and_options(shared_cluster: Any) -> None:
    @nbray.remote(num_cpus=0.5, name="given")
    def where(_: int) -> tuple[str | None, int]:
        return nbray.get_runtime_context().get_task_name(), os.getpid()

    found = list(nbray.map(where, range(5)))
    assert {name for name, _ in found} == {"given"}
    assert os.getpid() not in {pid for _, pid in found}
    other = list(nbray.map(where, range(2), name="other"))
    assert {name for name, _ in other} == {"other"}


def test_infinite_items_are_taken_as_needed(shared_cluster: Any) -> None:
    items = itertools.count()
    results = nbray.map(square, items, window=10)
    assert list(itertools.islice(results, 25)) == [x * x for x in range(25)]
    assert next(items) <= 35
    results.close()  # type: ignore[attr-defined]


def test_fixed_batches(shared_cluster: Any) -> None:
    def pid_of(_: int) -> str | None:
        return nbray.get_runtime_context().get_task_id()

    tasks = list(nbray.map(pid_of, range(10), batch=4))
    assert [len(list(group)) for _, group in itertools.groupby(tasks)] == [4, 4, 2]


def test_tiny_items_are_batched(shared_cluster: Any) -> None:
    def task(_: int) -> str | None:
        return nbray.get_runtime_context().get_task_id()

    assert len(set(nbray.map(task, range(20_000)))) < 2000


def test_refs_stand_for_their_values(shared_cluster: Any) -> None:
    refs = [nbray.put(i) for i in range(20)]
    assert list(nbray.map(square, refs)) == [i * i for i in range(20)]  # type: ignore[arg-type]


def test_arrays(shared_cluster: Any) -> None:
    arrays = [np.full(3000, i) for i in range(40)]
    found = list(nbray.map(lambda a: a * 2, arrays))
    assert all(np.array_equal(array * 2, result) for array, result in zip(arrays, found, strict=True))


# -- errors


def test_error_is_raised_at_its_place(shared_cluster: Any) -> None:
    results = nbray.map(picky, range(10))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="bad 2") as caught:
        next(results)
    assert isinstance(caught.value, TaskError)
    assert "in picky" in str(caught.value)
    assert "mapping.py" not in str(caught.value)
    assert list(results) == []


@pytest.mark.parametrize("batch", [None, 1, 4, 100])
def test_errors_are_returned_in_their_place(shared_cluster: Any, batch: int | None) -> None:
    found = list(nbray.map(picky, range(10), on_error="return", batch=batch))
    assert [str(each).rpartition(": ")[2] if isinstance(each, ValueError) else each for each in found] == [
        0, 1, "bad 2", 3, 4, "bad 5", 6, 7, "bad 8", 9,
    ]  # fmt: skip


def test_an_item_that_kills_its_worker_fails_alone(shared_cluster: Any) -> None:
    def dies(x: int) -> int:
        if x == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    found = list(nbray.map(dies, range(8), on_error="return", batch=4, max_retries=0))
    assert [x for x in found if not isinstance(x, Exception)] == [0, 1, 2, 3, 4, 6, 7]
    assert isinstance(found[5], WorkerCrashedError)


def test_unpicklable_items_and_results_fail_alone(shared_cluster: Any) -> None:
    items: list[Any] = [1, threading.Lock(), 3]
    found = list(nbray.map(lambda x: x, items, on_error="return", batch=3))
    assert [found[0], found[2]] == [1, 3]
    assert isinstance(found[1], SerializationError)
    found = list(nbray.map(lambda x: iter(()) if x == 1 else (i for i in "x") if x == 2 else x, range(4), on_error="return", batch=4))  # fmt: skip
    assert [found[0], found[3]] == [0, 3]
    assert isinstance(found[2], SerializationError)


def test_retries_of_exceptions(shared_cluster: Any, tmp_path: Path) -> None:
    def flaky(x: int) -> int:
        mark = tmp_path / str(x)
        if not mark.exists():
            mark.touch()
            raise OSError("first time")
        return x

    assert list(nbray.map(flaky, range(6), retry_exceptions=[OSError])) == list(range(6))
    with pytest.raises(OSError, match="first time"):
        list(nbray.map(flaky, range(6, 8)))


def test_errors_of_the_items_themselves(shared_cluster: Any) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        list(nbray.map(square, items()))


# -- what is refused


def test_wrong_arguments() -> None:
    async def coroutine(x: int) -> int:
        return x

    def generator(x: int) -> Iterator[int]:
        yield x

    cases: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
        (ValueError, "on_error", (square, []), {"on_error": "ignore"}),
        (TypeError, "window", (square, []), {"window": 1.5}),
        (ValueError, "at least one", (square, []), {"batch": 0}),
        (TypeError, "iterable", (square, 3), {}),
        (TypeError, "takes a function", (3, []), {}),
        (ValueError, "async def", (coroutine, []), {}),
        (ValueError, "generator", (generator, []), {}),
        (ValueError, "num_cpus", (square, []), {"num_cpu": 1}),
        (ValueError, "num_returns", (square, []), {"num_returns": 2}),
    ]
    for error, words, arguments, named in cases:
        with pytest.raises(error, match=words):
            nbray.map(*arguments, **named)


# -- bounds


def test_closing_cancels_what_is_under_way(shared_cluster: Any, tmp_path: Path) -> None:
    def slow(x: int) -> int:
        (tmp_path / str(x)).touch()
        while x:
            time.sleep(0.005)
        return x

    results = nbray.map(slow, range(10), window=3)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert nbray.get(nbray.remote(square).remote(3), timeout=20) == 9


def test_batch_sizes_are_learned() -> None:
    sizes = _Sizes(None, 100_000)
    assert sizes.next() == 1
    sizes.learn(1, 1e-6, 100)
    assert sizes.next() == 8
    for _ in range(6):
        sizes.learn(sizes.next(), 1e-6, 100)
    assert sizes.next() == 10_000
    sizes.learn(10_000, 1e-3, 100)
    assert sizes.next() == 10
    sizes.learn(10, 1e-6, 2**20)
    assert sizes.next() == 4
    slow = _Sizes(None, 1000)
    slow.learn(1, 5.0, 10)
    assert slow.next() == 1
    assert _Sizes(7, 1000).next() == 7


@pytest.mark.slow
def test_a_million_items_in_bounded_memory(shared_cluster: Any) -> None:
    import resource

    count = 1_000_000
    next(nbray.map(square, range(1)))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(nbray.map(square, range(count))) == (count - 1) * count * (2 * count - 1) // 6
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MB"
