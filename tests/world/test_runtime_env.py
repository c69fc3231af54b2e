"""``runtime_env``: variables, a working directory, modules; each in processes of its own, and errors as results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import nbray.exceptions


def look() -> tuple[str, str | None, int]:
    return os.getcwd(), os.environ.get("NBT_WORD"), os.getpid()


def test_variables(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBT_WORD", "driver's")
    monkeypatch.setenv("NBT_BASE", "base")
    task = shared_cluster.remote(look)
    own = task.options(runtime_env={"env_vars": {"NBT_WORD": "${NBT_BASE}/own"}})
    refs = [task.remote(), own.remote(), task.remote(), own.remote()]
    words = [word for _, word, _ in shared_cluster.get(refs)]
    assert words == ["driver's", "base/own", "driver's", "base/own"]
    monkeypatch.setenv("NBT_BASE", "changed")
    assert shared_cluster.get(own.remote())[1] == "changed/own"


def test_different_environments_are_different_processes(shared_cluster: Any) -> None:
    task = shared_cluster.remote(look)
    kinds = [task, *(task.options(runtime_env={"env_vars": {"NBT_WORD": str(i)}}) for i in range(2))]
    pids = [{shared_cluster.get(kind.remote())[2] for _ in range(6)} for kind in kinds]
    assert not pids[0] & pids[1]
    assert not pids[1] & pids[2]
    assert not pids[0] & pids[2]


def test_what_a_task_changes_is_restored_to_its_environment(shared_cluster: Any, tmp_path: Path) -> None:
    environment = {"env_vars": {"NBT_WORD": "own"}, "working_dir": str(tmp_path)}

    @shared_cluster.remote(runtime_env=environment)
    def change() -> int:
        os.chdir("/")
        del os.environ["NBT_WORD"]
        return os.getpid()

    task = shared_cluster.remote(look).options(runtime_env=environment)
    changed = {shared_cluster.get(change.remote()) for _ in range(4)}
    found = {shared_cluster.get(task.remote()) for _ in range(4)}
    assert {(place, word) for place, word, _ in found} == {(str(tmp_path), "own")}
    assert {pid for _, _, pid in found} & changed


def test_working_directory(shared_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the current directory, and its modules come before those of the same name that the driver has loaded."""
    for name, word in (("driver", "driver's"), ("work", "working directory's")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nbt_both.py").write_text(f"WORD = {word!r}")
    (tmp_path / "work" / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(str(tmp_path / "driver"))
    import nbt_both  # type: ignore[import-not-found]

    def use() -> Any:
        import nbt_both

        return nbt_both.WORD, Path("data.txt").read_text() if Path("data.txt").exists() else None

    task = shared_cluster.remote(use)
    own = task.options(runtime_env={"working_dir": str(tmp_path / "work")})
    assert shared_cluster.get([task.remote(), own.remote(), task.remote()]) == [
        ("driver's", None),
        ("working directory's", "data"),
        ("driver's", None),
    ]
    assert nbt_both.WORD == "driver's"
    del sys.modules["nbt_both"]


def test_modules(shared_cluster: Any, tmp_path: Path) -> None:
    package = tmp_path / "src" / "nbt_package"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from nbt_package.sub import deep")
    (package / "sub" / "deep.py").write_text("WORD = 'deep'")
    (tmp_path / "src" / "nbt_beside.py").write_text("")
    (tmp_path / "nbt_single.py").write_text("WORD = 'single'")

    @shared_cluster.remote(runtime_env={"py_modules": [str(package), str(tmp_path / "nbt_single.py")]})
    def use() -> Any:
        import nbt_package  # type: ignore[import-not-found]
        import nbt_single  # type: ignore[import-not-found]

        try:
            import nbt_beside  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            beside = False
        else:
            beside = True
        return nbt_package.deep.WORD, nbt_single.WORD, beside

    assert shared_cluster.get(use.remote()) == ("deep", "single", False)


def test_actors_and_what_tasks_submit(shared_cluster: Any) -> None:
    class Guest:
        def __init__(self) -> None:
            self.first = look()

        def look(self) -> Any:
            return self.first[:2], look()[:2]

    environment = {"env_vars": {"NBT_WORD": "own"}}
    guest = shared_cluster.remote(Guest).options(runtime_env=environment).remote()
    first, now = shared_cluster.get(guest.look.remote())
    assert first == now == (os.getcwd(), "own")

    inner = shared_cluster.remote(look)

    @shared_cluster.remote(runtime_env=environment)
    def outer() -> Any:
        other = inner.options(runtime_env={"env_vars": {"NBT_WORD": "other"}})
        return [word for _, word, _ in shared_cluster.get([inner.remote(), other.remote()])]

    assert shared_cluster.get(outer.remote()) == ["own", "other"]


def test_an_environment_that_cannot_be_had_is_the_task_s_error(shared_cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    task = shared_cluster.remote(look).options(runtime_env={"working_dir": str(folder)})
    folder.rmdir()
    for _ in range(3):
        with pytest.raises(
            nbray.exceptions.RuntimeEnvError, match=r"working_dir.*work.*does not exist any more"
        ):
            shared_cluster.get(task.remote())
    folder.mkdir()
    assert shared_cluster.get(task.remote())[0] == str(folder)


def test_errors_name_the_key_and_never_a_value(shared_cluster: Any, tmp_path: Path) -> None:
    module = tmp_path / "nbt_gone.py"
    module.write_text("")
    task = shared_cluster.remote(look)
    gone = task.options(runtime_env={"py_modules": [str(module)]})
    module.unlink()
    with pytest.raises(nbray.exceptions.RuntimeEnvError, match=r"py_modules.*nbt_gone.py.*does not exist"):
        shared_cluster.get(gone.remote())
    with pytest.raises(nbray.exceptions.RuntimeEnvError, match=r"env_vars.*A=B") as caught:
        shared_cluster.get(task.options(runtime_env={"env_vars": {"A=B": "secret word"}}).remote())
    assert "secret word" not in str(caught.value)
    assert shared_cluster.get(task.remote())[0] == os.getcwd()


def test_an_actor_whose_environment_cannot_be_had_dies_saying_so(shared_cluster: Any, tmp_path: Path) -> None:
    class Guest:
        def look(self) -> Any:
            return look()

    folder = tmp_path / "work"
    folder.mkdir()
    kind = shared_cluster.remote(Guest).options(runtime_env={"working_dir": str(folder)})
    folder.rmdir()
    guest = kind.remote()
    with pytest.raises(
        (nbray.exceptions.RuntimeEnvError, nbray.exceptions.ActorDiedError), match="working_dir"
    ):
        shared_cluster.get(guest.look.remote())
