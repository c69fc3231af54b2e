"""`nbray.util.ActorPool`."""

# mypy: disable-error-code="attr-defined"
# (mypy does not look at what a class decorator returns)

from __future__ import annotations

from typing import Any

import pytest

import nbray
from nbray.errors import GetTimeoutError


@nbray.remote(num_cpus=0)
class Doubler:
    def double(self, x: int) -> int:
        return 2 * x

    async def wait(self) -> None:
        import asyncio

        await asyncio.sleep(60)


@pytest.fixture
def pool(shared_cluster: Any) -> Any:
    return nbray.util.ActorPool([Doubler.remote(), Doubler.remote()])


def test_map(pool: Any) -> None:
    assert list(pool.map(lambda a, v: a.double.remote(v), range(10))) == [2 * i for i in range(10)]
    assert sorted(pool.map_unordered(lambda a, v: a.double.remote(v), range(10))) == [
        2 * i for i in range(10)
    ]


def test_submit_and_next(pool: Any) -> None:
    for i in range(4):
        pool.submit(lambda a, v: a.double.remote(v), i)
    assert not pool.has_free()
    assert [pool.get_next() for _ in range(4)] == [0, 2, 4, 6]
    assert pool.has_free()
    assert not pool.has_next()
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_timeouts(pool: Any) -> None:
    pool.submit(lambda a, _: a.wait.remote(), None)
    with pytest.raises(GetTimeoutError):
        pool.get_next(timeout=0.01)
    with pytest.raises(TimeoutError):
        pool.get_next_unordered(timeout=0.01)
    assert pool.has_next()
    assert pool.get_next(timeout=0.01, ignore_if_timedout=True) is None
    assert not pool.has_next()


def test_push_and_pop(pool: Any) -> None:
    first = pool.pop_idle()
    second = pool.pop_idle()
    assert pool.pop_idle() is None
    pool.submit(lambda a, v: a.double.remote(v), 4)
    assert not pool.has_next()
    pool.push(first)
    assert pool.get_next() == 8
    with pytest.raises(ValueError, match="in the pool"):
        pool.push(first)
    pool.push(second)
    with pytest.raises(TypeError, match="expected the ref"):
        pool.submit(lambda a, v: v, 1)
