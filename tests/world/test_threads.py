"""Threads of numeric libraries: as many as the task has CPUs, unless the user has chosen."""

from __future__ import annotations

import os
from typing import Any

import pytest

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def threads() -> tuple[set[int], list[str | None]]:
    import numpy as np
    from threadpoolctl import threadpool_info

    np.ones((50, 50)) @ np.ones((50, 50))
    return {pool["num_threads"] for pool in threadpool_info()}, [os.environ.get(name) for name in VARIABLES]


def test_threads_are_the_task_s_cpus(shared_cluster: Any) -> None:
    task = shared_cluster.remote(threads)
    for cpus in (1, 2, 1, 0.5):
        count = max(1, int(cpus))
        assert shared_cluster.get(task.options(num_cpus=cpus).remote()) == ({count}, [str(count)] * 4)


def test_threads_of_an_actor(shared_cluster: Any) -> None:
    class Guest:
        def look(self) -> Any:
            return threads()

    guest = shared_cluster.remote(Guest).options(num_cpus=2).remote()
    assert shared_cluster.get(guest.look.remote()) == ({2}, ["2"] * 4)


def test_what_the_user_has_set_stays(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = shared_cluster.remote(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert shared_cluster.get(task.remote()) == ({2}, [None, "2", None, None])
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert shared_cluster.get(task.remote()) == ({2}, ["2", "1", "1", "1"])
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert shared_cluster.get(task.remote()) == ({1}, ["1"] * 4)


def test_without_a_gpu_none_is_visible(shared_cluster: Any) -> None:
    @shared_cluster.remote
    def look() -> Any:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), shared_cluster.get_gpu_ids()

    assert shared_cluster.get(look.remote()) == ("", [])
