"""Hangs that the simulator found, once more with real processes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest


@pytest.mark.slow
def test_get_waits_for_one_ref_longer_than_the_bytes_of_another_are_kept(cluster: Any) -> None:
    @cluster.remote
    def slow() -> int:
        time.sleep(0.7)
        return 1

    large = cluster.put(np.ones(100_000))
    waited = slow.remote()
    one, ones = cluster.get([waited, large], timeout=10)
    assert one == 1
    assert ones.sum() == 100_000


@pytest.mark.slow
@pytest.mark.cluster(num_cpus=1)
def test_a_generator_that_waits_for_its_consumer_leaves_the_cpu_to_others(cluster: Any) -> None:
    @cluster.remote(num_returns="streaming", _generator_backpressure_num_objects=1)
    def count() -> Any:
        yield from range(4)

    @cluster.remote
    def other() -> int:
        return 7

    assert [(cluster.get(item), cluster.get(other.remote(), timeout=10)) for item in count.remote()] == [
        (0, 7),
        (1, 7),
        (2, 7),
        (3, 7),
    ]


@pytest.mark.slow
def test_an_actor_restarts_with_an_argument_whose_last_ref_is_gone(cluster: Any) -> None:
    @cluster.remote(max_restarts=1, max_task_retries=1)
    class Keeper:
        def __init__(self, values: Any) -> None:
            self.total = float(values.sum())

        def get(self) -> float:
            return self.total

        def pid(self) -> int:
            import os

            return os.getpid()

    keeper = Keeper.remote(cluster.put(np.ones(50_000)))
    assert cluster.get(keeper.get.remote()) == 50_000
    before = cluster.get(keeper.pid.remote())
    cluster.kill(keeper, no_restart=False)
    assert cluster.get(keeper.get.remote(), timeout=20) == 50_000
    assert cluster.get(keeper.pid.remote()) != before


@pytest.mark.slow
def test_a_task_takes_the_items_of_a_generator_that_has_not_made_them_yet(cluster: Any) -> None:
    @cluster.remote(num_returns="streaming")
    def count() -> Any:
        for index in range(3):
            time.sleep(0.05)
            yield index

    @cluster.remote
    def consume() -> list[int]:
        return [cluster.get(item) for item in count.remote()]

    assert cluster.get(consume.remote(), timeout=20) == [0, 1, 2]


@pytest.mark.slow
def test_a_worker_asks_again_for_a_result_that_it_has_let_go_of(cluster: Any) -> None:
    @cluster.remote
    def make() -> int:
        return 5

    @cluster.remote
    def box() -> list[Any]:
        return [make.remote()]

    @cluster.remote
    def unbox(refs: list[Any]) -> int:
        return int(cluster.get(refs[0]))

    boxed = box.remote()
    # One CPU's worth of workers: the one that made the result meets it again.
    refs = cluster.get(boxed)
    assert [cluster.get(unbox.remote(refs), timeout=10) for _ in range(4)] == [5] * 4
