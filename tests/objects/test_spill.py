"""More data than memory: objects move to disk and back, and what happens when they cannot."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objects.states import await_empty, eventually, memory, objects

MB = 1 << 20
STORE = 32 * MB
PIECE = 4 * MB
PATIENCE = 1.0


@pytest.fixture(scope="module")
def small_store() -> Iterator[Any]:
    """A cluster with two CPUs and a store of 32 MB whose patience is a second."""
    import nbray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBRAY_STORE_PATIENCE", str(PATIENCE))
        nbray.init(num_cpus=2, object_store_memory=STORE, name="small")
    try:
        yield nbray
    finally:
        nbray.shutdown()


@pytest.fixture(autouse=True)
def nbray(small_store: Any) -> Iterator[Any]:
    """Each test leaves nothing in the store nor on the disk."""
    yield small_store
    await_empty()
    eventually(lambda: not spilled_files(small_store), "the spill files are removed")


def spill_folder(nbray: Any) -> Path:
    from nbray.api import context

    return Path(context.require().engine.details()["spill"])


def spilled_files(nbray: Any) -> list[Path]:
    return [path for path in spill_folder(nbray).iterdir() if len(path.name) >= 40]


def piece(number: int, size: int = PIECE) -> Any:
    return np.full(size // 8, number, dtype=np.int64)


def right(array: Any, number: int) -> bool:
    return bool((array == number).all())


def test_six_times_more_data_than_memory(nbray: Any) -> None:
    refs = [nbray.put(piece(n)) for n in range(50)]
    assert memory()["used"] <= STORE
    assert memory()["spilled"] >= 200 * MB - STORE - PIECE
    assert sum(row["state"] == "SPILLED" for row in objects().values()) >= 50 - STORE // PIECE
    for _ in range(2):
        for number, ref in enumerate(refs):
            assert right(nbray.get(ref), number)
    # What was on disk before is not written again.
    assert memory()["spilled_total"] <= 50 * (PIECE + 4096)


def test_what_is_read_most_stays_in_memory(nbray: Any) -> None:
    hot = nbray.put(piece(7))
    cold = nbray.put(piece(8))
    rest = []
    for number in range(20):
        rest.append(nbray.put(piece(number)))
        assert right(nbray.get(hot), 7)
    rows = objects()
    assert rows[hot.hex()]["state"] == "ARENA"
    assert rows[cold.hex()]["state"] == "SPILLED"
    assert right(nbray.get(cold), 8)


def test_inputs_that_were_spilled_before_the_task_runs(nbray: Any) -> None:
    @nbray.remote
    def total(*arrays: Any) -> int:
        return int(sum(array.sum() for array in arrays))

    refs = [nbray.put(piece(n)) for n in range(30)]
    results = [total.remote(*refs[n : n + 3]) for n in range(0, 30, 3)]
    assert nbray.get(results) == [(3 * n + 3) * (PIECE // 8) for n in range(0, 30, 3)]


def test_many_tasks_with_large_arguments(nbray: Any) -> None:
    """By value: each lies in the store until its task has run."""

    @nbray.remote
    def first_and_last(array: Any, n: int) -> tuple[int, int, int]:
        array += 1
        return int(array[0]), int(array[-1]), n

    results = [first_and_last.remote(piece(n), n) for n in range(60)]
    assert nbray.get(results) == [(n + 1, n + 1, n) for n in range(60)]


def test_results_larger_than_the_room_that_is_left(nbray: Any) -> None:
    @nbray.remote
    def make(n: int) -> Any:
        return piece(n, 12 * MB)

    refs = [make.remote(n) for n in range(12)]
    assert all(right(nbray.get(ref), n) for n, ref in enumerate(refs))


def test_chains_of_large_values(nbray: Any) -> None:
    @nbray.remote
    def more(array: Any) -> Any:
        return array + 1

    refs = [nbray.put(piece(0)) for _ in range(10)]
    for _ in range(4):
        refs = [more.remote(ref) for ref in refs]
    assert all(right(nbray.get(ref), 4) for ref in refs)


def test_an_actor_gets_spilled_arguments_in_order(nbray: Any) -> None:
    @nbray.remote
    class Log:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def note(self, array: Any) -> None:
            self.seen.append(int(array[0]))

        def all(self) -> list[int]:
            return self.seen

    refs = [nbray.put(piece(n)) for n in range(20)]
    log = Log.remote()
    for n in range(20):
        log.note.remote(refs[n])
        log.note.remote(np.array([100 + n]))
    assert nbray.get(log.all.remote()) == [x for n in range(20) for x in (n, 100 + n)]


def test_tasks_that_put_and_get_more_than_memory(nbray: Any) -> None:
    @nbray.remote
    def many(seed: int) -> bool:
        refs = [nbray.put(piece(seed + n)) for n in range(10)]
        return all(right(nbray.get(ref), seed + n) for n, ref in enumerate(refs))

    assert all(nbray.get([many.remote(100 * n) for n in range(4)]))


def test_nested_tasks_with_large_values(nbray: Any) -> None:
    @nbray.remote
    def leaf(array: Any) -> Any:
        return array * 2

    @nbray.remote
    def parent(array: Any) -> Any:
        children = [leaf.remote(array + n) for n in range(3)]
        return sum(nbray.get(child).copy() for child in children)

    refs = [parent.remote(piece(n)) for n in range(6)]
    assert all(right(nbray.get(ref), 6 * n + 6) for n, ref in enumerate(refs))


def test_a_value_larger_than_the_store_is_refused_at_once(nbray: Any) -> None:
    start = time.monotonic()
    with pytest.raises(nbray.exceptions.StoreFullError, match=r"40\.0 MB does not fit .* 32\.0 MB in all"):
        nbray.put(piece(1, 40 * MB))

    @nbray.remote
    def make(_: Any = None) -> Any:
        return piece(1, 40 * MB)

    with pytest.raises(nbray.exceptions.StoreFullError, match=r"40\.0 MB does not fit"):
        nbray.get(make.remote())
    with pytest.raises(nbray.exceptions.StoreFullError, match=r"40\.0 MB does not fit"):
        make.remote(piece(1, 40 * MB))
    assert time.monotonic() - start < 5


def test_full_of_arrays_in_use(nbray: Any) -> None:
    refs = [nbray.put(piece(n)) for n in range(6)]
    held = [nbray.get(ref) for ref in refs]
    start = time.monotonic()
    with pytest.raises(nbray.exceptions.StoreFullError) as caught:
        nbray.put(piece(9, 3 * PIECE))
    assert PATIENCE * 0.9 < time.monotonic() - start < PATIENCE + 10
    text = str(caught.value)
    assert "no room for 12.0 MB in the object store (24.0 MB of 32.0 MB used)" in text
    assert f"4.0 MB in use by driver {os.getpid()}" in text
    # What is not in use goes to disk, and room that is made is used.
    small = nbray.put(piece(10))
    other = nbray.put(piece(11))
    assert right(nbray.get(small), 10)
    assert all(right(array, n) for n, array in enumerate(held))
    del held[3:], caught
    large = nbray.put(piece(12, 3 * PIECE))
    assert right(nbray.get(large), 12)
    assert right(nbray.get(other), 11)


def test_a_request_waits_for_room_that_another_process_makes(nbray: Any) -> None:
    @nbray.remote
    class Reader:
        def read(self, refs: list[Any]) -> None:
            self.arrays = nbray.get(refs)

        def forget(self) -> None:
            self.arrays = []

    @nbray.remote
    def large() -> int:
        return int(nbray.get(nbray.put(piece(3, 16 * MB)))[0])

    reader = Reader.remote()
    nbray.get(reader.read.remote([nbray.put(piece(n)) for n in range(7)]))
    waiting = large.remote()
    eventually(lambda: nbray.state.tasks(name="large").to_pylist()[-1:][0]["state"] == "RUNNING", "it runs")
    nbray.get(reader.forget.remote())
    assert nbray.get(waiting) == 3


def test_a_task_whose_inputs_cannot_be_in_memory_together(nbray: Any) -> None:
    @nbray.remote
    def use(*arrays: Any) -> int:
        return len(arrays)

    refs = [nbray.put(piece(n)) for n in range(12)]
    with pytest.raises(nbray.exceptions.StoreFullError, match=r"no room for 4\.0 MB"):
        nbray.get(use.remote(*refs))
    assert nbray.get(use.remote(*refs[:3])) == 3


@contextlib.contextmanager
def full_disk(nbray: Any) -> Iterator[None]:
    """The node cannot write files above 64 KB, as on a full disk."""
    from nbray.api import context

    pid = int(context.require().engine.details()["node_pid"])
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_full_disk(nbray: Any) -> None:
    refs = [nbray.put(piece(n)) for n in range(7)]
    with full_disk(nbray):
        with pytest.raises(nbray.exceptions.DiskFullError) as caught:
            nbray.put(piece(9, 2 * PIECE))
        text = str(caught.value)
        assert "cannot be moved to disk" in text
        assert str(spill_folder(nbray)) in text
        assert "Free disk space" in text
        assert all(right(nbray.get(ref), n) for n, ref in enumerate(refs))
        del refs[:4]
        again = nbray.put(piece(9, 2 * PIECE))
        assert right(nbray.get(again), 9)
    more = [nbray.put(piece(n)) for n in range(10)]
    assert all(right(nbray.get(ref), n) for n, ref in enumerate(more))
    assert right(nbray.get(again), 9)


def test_a_get_of_more_at_once_than_the_store_holds_says_how_to_go_on(nbray: Any) -> None:
    refs = [nbray.put(np.full(PIECE // 8, n)) for n in range(12)]
    started = time.monotonic()
    with pytest.raises(nbray.exceptions.StoreFullError) as caught:
        nbray.get(refs)
    # Nothing was waited for that cannot come.
    assert time.monotonic() - started < PATIENCE
    assert "the object store holds 32.0 MB in all" in str(caught.value)
    assert "12 values at once, 48.0 MB or more" in str(caught.value)
    assert "for ref in refs: use(nbray.get(ref))" in str(caught.value)
    assert [int(nbray.get(ref)[5]) for ref in refs] == list(range(12))
    # The same one many times takes its room once.
    assert [int(array[5]) for array in nbray.get([refs[0]] * 20)] == [0] * 20

    @nbray.remote
    def all_at_once(refs: list[Any]) -> str:
        try:
            nbray.get(refs)
        except nbray.exceptions.StoreFullError as error:
            return str(error)
        return ""

    assert "one by one" in nbray.get(all_at_once.remote(refs))


def test_a_get_of_results_that_turn_out_to_be_too_much(nbray: Any) -> None:
    @nbray.remote
    def make(n: int) -> Any:
        return np.full(PIECE // 8, n)

    refs = [make.remote(n) for n in range(12)]
    with pytest.raises(nbray.exceptions.StoreFullError, match=r"no room for 4\.0 MB .* one by one"):
        nbray.get(refs)
    assert [int(nbray.get(ref)[5]) for ref in refs] == list(range(12))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_small_disk(runtime_dir: Any, tmp_path: Path) -> None:
    """A tmpfs of 12 MB as spill directory, in a process of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "nbray-test", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    program = (
        "import nbray, numpy as np\n"
        "nbray.init(num_cpus=1, object_store_memory=32 << 20, name='disk')\n"
        "refs = []\n"
        "try:\n"
        "    for n in range(20): refs.append(nbray.put(np.full(1 << 19, n)))\n"
        "except nbray.exceptions.DiskFullError as error:\n"
        "    print(error)\n"
        "assert 8 <= len(refs) <= 11, len(refs)\n"
        "del refs[:5]\n"
        "refs += [nbray.put(np.full(1 << 19, n)) for n in range(5, 8)]\n"
        "assert all(int(nbray.get(ref)[5]) >= 0 for ref in refs)\n"
        "print('usable')\n"
    )
    try:
        done = subprocess.run(
            [os.sys.executable, "-c", program],  # type: ignore[attr-defined]
            env={**os.environ, "NBRAY_SPILL_DIR": str(place)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert done.stdout.splitlines()[-1:] == ["usable"], done.stderr
    assert "No space left on device" in done.stdout
    assert str(place) in done.stdout


@pytest.mark.parametrize("damage", ["deleted", "truncated", "changed"])
def test_a_damaged_spill_file_is_made_again_by_its_task(nbray: Any, damage: str) -> None:
    @nbray.remote
    def make(n: int, box: list[Any]) -> Any:
        return piece(n)

    @nbray.remote
    def first(array: Any) -> int:
        return int(array[0])

    kept = nbray.put(1)
    refs = [make.remote(n, [kept]) for n in range(12)]
    nbray.wait(refs, num_returns=len(refs))
    names = {ref.hex(): n for n, ref in enumerate(refs)}
    eventually(lambda: len(spilled_files(nbray)) >= 4, "some are on disk")
    hurt = [path for path in spilled_files(nbray) if objects()[path.name]["state"] == "SPILLED"]
    assert len(hurt) >= 2
    for path in hurt:
        _damage(path, damage)
    numbers = [names[path.name] for path in hurt]
    # One through an input, the others through get.
    assert nbray.get(first.remote(refs[numbers[0]])) == numbers[0]
    assert all(right(nbray.get(ref), n) for n, ref in enumerate(refs))
    attempts = {row["attempt"] for row in nbray.state.tasks(name="make").to_pylist()}
    assert 1 in attempts


def _damage(path: Path, damage: str) -> None:
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 1000)
    else:
        with path.open("r+b") as file:
            file.seek(MB)
            file.write(b"\xff" * 100)


def test_a_damaged_spill_file_of_a_put_is_lost_and_says_so(nbray: Any) -> None:
    refs = [nbray.put(piece(n)) for n in range(12)]
    hurt = [path for path in spilled_files(nbray) if objects()[path.name]["state"] == "SPILLED"]
    path = hurt[0]
    path.unlink()
    ref = next(ref for ref in refs if ref.hex() == path.name)

    @nbray.remote
    def use(array: Any) -> int:
        return int(array[0])

    with pytest.raises(nbray.exceptions.ObjectLostError, match="made by put") as caught:
        nbray.get(use.remote(ref))
    assert str(path) in str(caught.value)
    with pytest.raises(nbray.exceptions.ObjectLostError):
        nbray.get(ref)
    assert sum(right(nbray.get(other), n) for n, other in enumerate(refs) if other != ref) == 11
    del caught


def test_a_damaged_result_of_an_actor_or_of_a_task_without_its_input_is_lost(nbray: Any) -> None:
    @nbray.remote
    class Maker:
        def make(self, n: int) -> Any:
            return piece(n)

    @nbray.remote
    def copy(array: Any) -> Any:
        return array.copy()

    maker = Maker.remote()
    refs = [maker.make.remote(n) for n in range(4)]
    refs += [copy.remote(nbray.put(piece(n))) for n in range(4, 8)]
    nbray.wait(refs, num_returns=8)
    rest = [nbray.put(piece(n)) for n in range(8, 16)]
    files = {path.name: path for path in spilled_files(nbray)}
    for ref, why in ((refs[0], "an actor's method made it"), (refs[4], "its inputs are gone")):
        files[ref.hex()].unlink()
        with pytest.raises(nbray.exceptions.ObjectLostError, match=why):
            nbray.get(ref)
    assert right(nbray.get(refs[1]), 1)
    del rest


def test_small_values_that_outgrow_the_nodes_table(nbray: Any) -> None:
    """Above 256 MB in all, small values go to the arena and from there to disk."""

    @nbray.remote
    def many(first: int, count: int) -> list[Any]:
        return [nbray.put((first + n).to_bytes(4, "little") * 4000) for n in range(count)]

    outer = [many.remote(first, 2500) for first in range(0, 20_000, 2500)]
    refs = [ref for boxed in outer for ref in nbray.get(boxed)]
    eventually(lambda: memory()["inline"] <= 256 * MB, "the rest has moved")
    found = memory()
    assert found["inline"] + found["used"] + found["spilled"] >= 20_000 * 16_000
    assert found["used"] <= STORE
    sample = [*range(0, 20_000, 97), 19_999]
    assert all(nbray.get(refs[n]) == n.to_bytes(4, "little") * 4000 for n in sample)
