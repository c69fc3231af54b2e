"""GPUs: a task sees those that it was given, and no others. Needs none: a cluster is told that it has two."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def gpus() -> Iterator[Any]:
    """A cluster that is told to have two GPUs."""
    import nbray

    nbray.init(num_cpus=4, num_gpus=2, name="gpus")
    yield nbray
    nbray.shutdown()


def _meet(folder: Path, own: str, count: int) -> None:
    """Wait until ``count`` tasks run at once."""
    (folder / own).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline, f"{count} tasks never ran at once"
        time.sleep(0.005)


def test_ids_are_exclusive(gpus: Any, tmp_path: Path) -> None:
    @gpus.remote(num_gpus=1)
    def look(own: str) -> Any:
        _meet(tmp_path, own, 2)
        return gpus.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()

    found = gpus.get([look.remote("a"), look.remote("b")])
    assert sorted(ids for ids, _, _ in found) == [[0], [1]]
    assert all(visible == str(ids[0]) for ids, visible, _ in found)
    more = gpus.get([look.remote("c"), look.remote("d")])
    assert len({pid for _, _, pid in found + more}) == 4, (
        "a process that has used a GPU keeps its memory: one task each"
    )


def test_fractions_share_one(gpus: Any, tmp_path: Path) -> None:
    @gpus.remote(num_gpus=0.5)
    def look(own: str) -> Any:
        _meet(tmp_path, own, 4)
        return gpus.get_gpu_ids()

    found = gpus.get([look.remote(own) for own in "abcd"])
    assert sorted(found) == [[0], [0], [1], [1]]


def test_several_for_one_task_and_actors(gpus: Any) -> None:
    @gpus.remote(num_gpus=2)
    def both() -> Any:
        return gpus.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    class Guest:
        def __init__(self) -> None:
            self.first = gpus.get_gpu_ids()

        def look(self) -> Any:
            return self.first, gpus.get_gpu_ids(), gpus.get_runtime_context().get_accelerator_ids()

    assert gpus.get(both.remote()) == ([0, 1], "0,1")
    kind = gpus.remote(Guest).options(num_gpus=1)
    guests = [kind.remote(), kind.remote()]
    found = gpus.get([guest.look.remote() for guest in guests])
    assert sorted(first for first, _, _ in found) == [[0], [1]]
    assert all(first == now and named == {"GPU": [str(first[0])]} for first, now, named in found)


def test_ids_count_among_the_visible_ones(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    @gpus.remote(num_gpus=2)
    def both() -> Any:
        return gpus.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    assert gpus.get(both.remote()) == ([0, 1], "3,5")


def test_gpus_are_chosen_before_the_user_s_modules_are_imported(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nbt_cuda.py").write_text(
        "import os\nSEEN = os.environ.get('CUDA_VISIBLE_DEVICES')\ndef seen():\n    return SEEN"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import nbt_cuda  # type: ignore[import-not-found]

    assert gpus.get(gpus.remote(nbt_cuda.seen).options(num_gpus=2).remote()) == "0,1"
    del sys.modules["nbt_cuda"]
