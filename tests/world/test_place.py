"""Working directory, environment and import path of tasks are those of their driver at the time of their submission."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest


def place() -> tuple[str, str | None]:
    return os.getcwd(), os.environ.get("NBT_WORD")


def test_changes_apply_to_tasks_submitted_afterwards(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = shared_cluster.remote(place)
    before = os.getcwd()
    monkeypatch.delenv("NBT_WORD", raising=False)
    refs = [task.remote() for _ in range(20)]
    monkeypatch.chdir(tmp_path)
    refs += [task.remote() for _ in range(20)]
    monkeypatch.setenv("NBT_WORD", "one")
    refs += [task.remote() for _ in range(20)]
    monkeypatch.setenv("NBT_WORD", "two")
    refs += [task.remote() for _ in range(20)]
    monkeypatch.delenv("NBT_WORD")
    refs += [task.remote() for _ in range(20)]
    here = str(tmp_path)
    expected = [(before, None), (here, None), (here, "one"), (here, "two"), (here, None)]
    assert shared_cluster.get(refs) == [each for each in expected for _ in range(20)]


def test_what_a_task_changes_does_not_reach_the_next_one(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBT_WORD", "kept")

    @shared_cluster.remote
    def change() -> tuple[str, str | None]:
        os.environ["NBT_OTHER"] = "left behind"
        del os.environ["NBT_WORD"]
        os.chdir("/")
        return place()

    @shared_cluster.remote
    def change_and_fail() -> None:
        os.environb[b"NBT_OTHER"] = b"left behind"
        os.fchdir(os.open("/", os.O_RDONLY))
        raise LookupError("after the change")

    @shared_cluster.remote
    def look() -> tuple[str, str | None, str | None, str]:
        shown = subprocess.run(
            ["sh", "-c", "pwd; echo $NBT_WORD $NBT_OTHER"], stdout=subprocess.PIPE, check=True
        )
        return *place(), os.environ.get("NBT_OTHER"), shown.stdout.decode()

    here = os.getcwd()
    for _ in range(4):
        assert shared_cluster.get(change.remote()) == ("/", None)
        with pytest.raises(LookupError):
            shared_cluster.get(change_and_fail.remote())
        assert shared_cluster.get(look.remote()) == (here, "kept", None, f"{here}\nkept\n")


def test_bytes_that_are_no_text_survive(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    monkeypatch.setitem(os.environb, b"NBT_WORD", b"\xfe")

    @shared_cluster.remote
    def look() -> tuple[bytes, bytes]:
        return os.getcwdb(), os.environb[b"NBT_WORD"]

    assert shared_cluster.get(look.remote()) == (folder, b"\xfe")


def test_a_directory_that_is_gone_is_no_error_until_it_is_used(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = shared_cluster.remote(os.environ.get)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("NBT_WORD", "there")
    assert shared_cluster.get(task.remote("NBT_WORD")) == "there"


def test_relative_entries_of_the_path_mean_the_driver_s_directory(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "nbt_relative.py").write_text("WORD = 'found'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["parts", *sys.path])

    @shared_cluster.remote
    def look() -> str:
        import nbt_relative  # type: ignore[import-not-found]

        return nbt_relative.WORD

    ref = look.remote()
    monkeypatch.chdir("/")
    assert shared_cluster.get(ref) == "found"


def test_nested_tasks_live_in_the_world_of_the_driver(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = shared_cluster.remote(place)

    @shared_cluster.remote
    def outer() -> Any:
        os.chdir("/")
        os.environ["NBT_WORD"] = "outer's own"
        found = []

        def in_a_thread() -> None:
            found.append(shared_cluster.get(inner.remote()))

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        return [shared_cluster.get(inner.remote()), *found]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBT_WORD", "driver's")
    ref = outer.remote()
    monkeypatch.chdir("/")
    assert shared_cluster.get(ref) == [(str(tmp_path), "driver's")] * 2


def test_an_actor_keeps_its_place_and_can_import_what_comes_later(
    shared_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Guest:
        def __init__(self) -> None:
            self.first = place()
            os.environ["NBT_WORD"] = "the actor's"

        def look(self) -> Any:
            return self.first, place()

        def imported(self) -> str:
            import nbt_late  # type: ignore[import-not-found]

            return nbt_late.WORD

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBT_WORD", "driver's")
    guest = shared_cluster.remote(Guest).remote()
    first = (str(tmp_path), "driver's")
    assert shared_cluster.get(guest.look.remote()) == (first, (str(tmp_path), "the actor's"))
    monkeypatch.chdir("/")
    monkeypatch.setenv("NBT_WORD", "later")
    late = tmp_path / "late"
    late.mkdir()
    (late / "nbt_late.py").write_text("WORD = 'late'")
    monkeypatch.syspath_prepend(str(late))
    assert shared_cluster.get(guest.look.remote()) == (first, (str(tmp_path), "the actor's"))
    assert shared_cluster.get(guest.imported.remote()) == "late"


def test_an_unchanged_world_costs_about_a_microsecond(shared_cluster: Any) -> None:
    """Against what the machine needs for the parts of it that are the operating system's and Python's own."""
    import time

    from nbray.api import context

    runtime = context.require()
    engine: Any = runtime.engine
    check = engine.before_submit

    def seconds(what: Any) -> float:
        best = 1.0
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(2000):
                what()
            best = min(best, time.perf_counter() - start)
        return best / 2000

    environment = dict(os.environ._data)  # type: ignore[attr-defined]
    least = seconds(os.getcwd) + seconds(lambda: environment == os.environ._data)  # type: ignore[attr-defined]
    assert seconds(check) < 3 * least + 0.5e-6
