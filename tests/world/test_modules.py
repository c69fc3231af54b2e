"""The user's own modules in tasks are those that the driver has loaded."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbray.api.world import note_modules
from tests.world.drivers import run_script


class Folder:
    """The folder of a notebook. Modules that the test imports from it are forgotten afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._time = 1_700_000_000

    def write(self, name: str, text: str) -> None:
        """Write a file, each time with a later time of modification: an editor is slower than a test."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        self._time += 10
        os.utime(file, (self._time, self._time))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(sys.modules)
    yield Folder(tmp_path)
    for name in set(sys.modules) - set(before):
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def load(name: str) -> Any:
    """Import a module in a cell of its own."""
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    note_modules()
    return module


def test_a_function_of_a_module_beside_the_notebook(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_plain.py", "def word(x):\n    return 'plain', x")
    task = shared_cluster.remote(load("nbt_plain").word)
    assert shared_cluster.get([task.remote(i) for i in range(3)]) == [
        ("plain", 0),
        ("plain", 1),
        ("plain", 2),
    ]


def test_an_edited_and_reloaded_module_is_seen_by_later_tasks(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_edited.py", "def word():\n    return 'first'")
    module = load("nbt_edited")

    @shared_cluster.remote
    def look() -> Any:
        return module.word(), os.getpid()

    earlier = [look.remote() for _ in range(4)]
    assert {word for word, _ in shared_cluster.get(earlier)} == {"first"}
    for round_ in range(3):
        folder.write("nbt_edited.py", f"def word():\n    return 'edit {round_}'")
        importlib.reload(module)
        assert {word for word, _ in shared_cluster.get([look.remote() for _ in range(4)])} == {
            f"edit {round_}"
        }
    pids = {pid for _, pid in shared_cluster.get(earlier)}
    assert pids.isdisjoint(pid for _, pid in shared_cluster.get([look.remote() for _ in range(4)]))


def test_tasks_submitted_before_a_reload_see_the_version_of_then(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_order.py", "WORD = 'old'")
    module = load("nbt_order")

    @shared_cluster.remote
    def look() -> str:
        return str(module.WORD)

    refs = [look.remote() for _ in range(30)]
    folder.write("nbt_order.py", "WORD = 'new'")
    importlib.reload(module)
    refs += [look.remote() for _ in range(30)]
    assert shared_cluster.get(refs) == ["old"] * 30 + ["new"] * 30


def test_edited_and_not_reloaded_is_as_in_the_driver(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_stale.py", "WORD = 'loaded'\ndef word():\n    return WORD")
    module = load("nbt_stale")

    @shared_cluster.remote
    def look() -> Any:
        import nbt_stale  # type: ignore[import-not-found]

        return nbt_stale.word(), module.WORD, nbt_stale.__file__

    folder.write("nbt_stale.py", "WORD = 'edited'\ndef word():\n    return WORD")
    file = str(folder.path / "nbt_stale.py")
    assert shared_cluster.get([look.remote() for _ in range(4)]) == [("loaded", "loaded", file)] * 4
    (folder.path / "nbt_stale.py").unlink()
    assert shared_cluster.get(look.remote())[0] == "loaded"


def test_a_task_may_import_a_module_before_the_driver_does(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_later.py", "WORD = 'when the task came'")

    @shared_cluster.remote
    def look() -> str:
        import nbt_later  # type: ignore[import-not-found]

        return str(nbt_later.WORD)

    assert set(shared_cluster.get([look.remote() for _ in range(4)])) == {"when the task came"}
    folder.write("nbt_later.py", "WORD = 'when the driver came'")
    load("nbt_later")
    assert set(shared_cluster.get([look.remote() for _ in range(8)])) == {"when the driver came"}


def test_packages(shared_cluster: Any, folder: Folder) -> None:
    folder.write("nbt_pack/__init__.py", "from nbt_pack.part import word\nNAME = __name__")
    folder.write("nbt_pack/part.py", "from . import sub\ndef word():\n    return sub.deep.WORD")
    folder.write("nbt_pack/sub/__init__.py", "from . import deep")
    folder.write("nbt_pack/sub/deep.py", "WORD = 'deep'")
    folder.write("nbt_pack/lazy.py", "WORD = 'lazy'")
    folder.write("nbt_pack/data.txt", "data")
    folder.write("nbt_space/inner.py", "WORD = 'no __init__'")
    package = load("nbt_pack")
    inner = load("nbt_space.inner")

    @shared_cluster.remote
    def look() -> Any:
        import pkgutil

        import nbt_pack.lazy  # type: ignore[import-not-found]

        return (
            package.word(),
            nbt_pack.lazy.WORD,
            package.NAME,
            inner.WORD,
            pkgutil.get_data("nbt_pack", "data.txt"),
        )

    assert shared_cluster.get(look.remote()) == ("deep", "lazy", "nbt_pack", "no __init__", b"data")
    folder.write("nbt_pack/sub/deep.py", "WORD = 'deeper'")
    importlib.reload(sys.modules["nbt_pack.sub.deep"])
    assert shared_cluster.get(look.remote())[0] == "deeper"


def test_instances_of_a_module_s_class_come_and_go(shared_cluster: Any, folder: Folder) -> None:
    folder.write(
        "nbt_kinds.py",
        "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n    def swap(self):\n        return Pair(self.b, self.a)\n"
        "class Trouble(Exception):\n    pass\n",
    )
    module = load("nbt_kinds")

    @shared_cluster.remote
    def swap(pair: Any) -> Any:
        return pair.swap()

    @shared_cluster.remote
    def fail() -> None:
        raise module.Trouble("as in the module")

    pair = shared_cluster.get(swap.remote(module.Pair(1, 2)))
    assert type(pair) is module.Pair
    assert (pair.a, pair.b) == (2, 1)
    with pytest.raises(module.Trouble, match="as in the module"):
        shared_cluster.get(fail.remote())


def test_new_modules_do_not_cost_the_workers(shared_cluster: Any, folder: Folder) -> None:
    @shared_cluster.remote
    def look(name: str) -> Any:
        return importlib.import_module(name).__name__, os.getpid()

    pids = set()
    for name in ("nbt_one", "nbt_two", "nbt_three"):
        folder.write(f"{name}.py", "")
        load(name)
        found, pid = shared_cluster.get(look.remote(name))
        assert found == name
        pids.add(pid)
    assert len(pids) <= 2


def test_edited_before_nbray_came(folder: Folder, tmp_path: Path) -> None:
    """The driver has loaded a version that is on disk no more when nbray first looks: it is in Python's cache."""
    folder.write("nbt_early.py", "WORD = 'loaded'")
    folder.write(
        "main.py",
        "import json, os, nbt_early, nbray\n"
        "open('nbt_early.py', 'w').write('WORD = 123456789')\n"
        "@nbray.remote\n"
        "def look():\n"
        "    return nbt_early.WORD\n"
        "nbray.init(num_cpus=1)\n"
        "print(json.dumps(nbray.get(look.remote())))\n",
    )
    assert run_script(tmp_path / "main.py", environment={"PYTHONDONTWRITEBYTECODE": ""}) == "loaded"


def test_names_of_the_standard_library(tmp_path: Path) -> None:
    """Files that shadow the standard library: a task gets what the driver has, and nbray's own processes never see them."""
    for name in ("token", "calendar", "queue", "statistics", "select", "random"):
        (tmp_path / f"{name}.py").write_text(f"WORD = 'own {name}'")
    script = tmp_path / "main.py"
    script.write_text(
        "import json, sys\n"
        "here = sys.path.pop(0)\n"
        "import calendar, queue, select, tokenize, random\n"
        "import nbray\n"
        "sys.path.insert(0, here)\n"
        "del sys.modules['token']\n"
        "import token\n"
        "@nbray.remote\n"
        "def look():\n"
        "    import calendar, queue, select, statistics, token as inside, pandas\n"
        "    return [hasattr(calendar, 'month_name'), hasattr(queue, 'Queue'), hasattr(select, 'poll'), statistics.WORD,\n"
        "            token.WORD, inside.WORD, len(pandas.DataFrame({'a': [1]}))]\n"
        "@nbray.remote\n"
        "def draw():\n"
        "    import random\n"
        "    return random.WORD\n"
        "nbray.init(num_cpus=1)\n"
        "found = nbray.get([look.remote() for _ in range(3)])\n"
        "assert found[0] == found[1] == found[2], found\n"
        "del sys.modules['random']\n"
        "import random\n"
        "print(json.dumps([*found[0], nbray.get(draw.remote())]))\n"
    )
    assert run_script(script) == [
        True,
        True,
        True,
        "own statistics",
        "own token",
        "own token",
        1,
        "own random",
    ]


def test_a_shadowing_file_under_pythonpath_does_not_reach_the_daemons(tmp_path: Path) -> None:
    (tmp_path / "resource.py").write_text("raise RuntimeError('a daemon has imported this')")
    (tmp_path / "queue.py").write_text(
        "from _queue import Empty, SimpleQueue\nclass Queue: pass\nWORD = 'own'"
    )
    script = tmp_path / "main.py"
    script.write_text(
        "import json, nbray\nimport queue\n"
        "@nbray.remote\ndef look():\n    return queue.WORD\n"
        "nbray.init(num_cpus=1)\nprint(json.dumps(nbray.get(look.remote())))\n"
    )
    assert run_script(script, environment={"PYTHONPATH": str(tmp_path)}) == "own"


@pytest.mark.parametrize("how", ["script", "module", "elsewhere"])
def test_main_modules(tmp_path: Path, how: str) -> None:
    """Functions of ``__main__`` and of modules beside it, whatever directory the script is started from."""
    package = tmp_path / "nbt_app"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def double(x):\n    return 2 * x")
    (package / "main.py").write_text(
        "import json, sys\n"
        "import nbray\n"
        "try:\n    from .helper import double\n"
        "except ImportError:\n    from helper import double\n"
        "LEVEL = 3\n"
        "class Box:\n    def __init__(self, x):\n        self.x = x\n"
        "@nbray.remote\n"
        "def through(box):\n    return Box(double(box.x) + LEVEL)\n"
        "if __name__ == '__main__':\n"
        "    nbray.init(num_cpus=1)\n"
        "    direct = nbray.remote(double)\n"
        "    back = nbray.get(through.remote(Box(1)))\n"
        "    assert type(back) is Box\n"
        "    print(json.dumps([nbray.get(direct.remote(4)), back.x]))\n"
    )
    if how == "module":
        assert run_script(package / "main.py", cwd=tmp_path, module="nbt_app.main") == [8, 5]
    else:
        assert run_script(package / "main.py", cwd=Path("/") if how == "elsewhere" else package) == [8, 5]


def test_autoreload(tmp_path: Path) -> None:
    """IPython replaces the code of functions in place, or reloads; tasks of the next cell see the new version."""
    (tmp_path / "nbt_auto.py").write_text("LEVEL = 1\ndef word():\n    return 'first'\n")
    script = tmp_path / "main.py"
    script.write_text(
        "import json, os, time\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance(colors='nocolor')\n"
        "def cell(text):\n    result = shell.run_cell(text)\n    result.raise_error()\n    return result.result\n"
        "def edit(text):\n"
        "    open('nbt_auto.py', 'w').write(text)\n"
        "    later = time.time() + edit.ahead\n    edit.ahead += 10\n    os.utime('nbt_auto.py', (later, later))\n"
        "edit.ahead = 10\n"
        "cell('%load_ext nbray')\n"
        "cell('%load_ext autoreload\\n%autoreload 2')\n"
        "cell('import sys; sys.path.insert(0, \".\"); import nbt_auto, nbray; nbray.init(num_cpus=1)')\n"
        "cell('look = nbray.remote(lambda: (nbt_auto.word(), nbt_auto.LEVEL))')\n"
        "found = [cell('nbray.get(look.remote())')]\n"
        "edit('LEVEL = 1\\ndef word():\\n    return \\'second\\'\\n')\n"
        "found.append(cell('nbray.get(look.remote())'))\n"
        "edit('LEVEL = 2\\ndef word():\\n    return \\'third\\'\\n')\n"
        "found.append(cell('nbray.get(look.remote())'))\n"
        "cell('nbray.shutdown()')\n"
        "print(json.dumps(found))\n"
    )
    assert run_script(script) == [["first", 1], ["second", 1], ["third", 2]]


def test_what_is_installed_after_the_start_is_there(
    shared_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that pip puts where the import path leads already, in workers that have looked there before."""
    target = tmp_path / "site-packages"
    target.mkdir()
    monkeypatch.syspath_prepend(str(target))

    @shared_cluster.remote
    def look() -> str | None:
        try:
            import nbt_installed  # type: ignore[import-not-found]
        except ImportError:
            return None
        return str(nbt_installed.WORD)

    assert shared_cluster.get([look.remote() for _ in range(4)]) == [None] * 4
    source = tmp_path / "source"
    source.mkdir()
    (source / "nbt_installed.py").write_text("WORD = 'installed'")
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['hatchling']\nbuild-backend = 'hatchling.build'\n"
        "[project]\nname = 'nbt-installed'\nversion = '1'\n"
        "[tool.hatch.build.targets.wheel]\ninclude = ['nbt_installed.py']\n"
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
    ]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    assert shared_cluster.get([look.remote() for _ in range(4)]) == ["installed"] * 4
