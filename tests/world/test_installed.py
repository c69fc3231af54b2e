"""What is installed after the start of a cluster is what later tasks use, also where the cluster's own processes had loaded the version before."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.tools import daemon, node_of, script, until, wait_ended, workers

REPOSITORY = Path(__file__).resolve().parents[2]


def install(site: Path, name: str, version: str, text: str = "") -> None:
    """What an installer does: the files of the version before go, those of this one come, and a record of it."""
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    record = site / f"{name}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    package = site / name
    if text or not package.exists():
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir()
        (package / "__init__.py").write_text(text or f"__version__ = {version!r}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages of the user's, as ``pip install --target`` fills it."""
    folder = tmp_path / "packages"
    folder.mkdir()
    install(folder, "nbt_first", "1.0")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("nbt_")]:
        del sys.modules[name]


def version_of(name: str) -> Any:
    return importlib.import_module(name).__version__, os.getpid()


def test_later_tasks_use_the_new_version_and_an_actor_of_before_keeps_its_own(
    cluster: Any, site: Path
) -> None:
    install(site, "nbt_pack", "1.0")
    look = cluster.remote(version_of)

    @cluster.remote
    class Keeper:
        def __init__(self) -> None:
            self.seen = [version_of("nbt_pack")[0]]

        def look(self) -> list[str]:
            self.seen.append(version_of("nbt_pack")[0])
            return self.seen

    keeper = Keeper.remote()
    assert cluster.get(keeper.look.remote()) == ["1.0", "1.0"]
    before = cluster.get([look.remote("nbt_pack") for _ in range(4)])
    assert {version for version, _ in before} == {"1.0"}
    # Installers are programs: they take longer than the watch looks away.
    code = f"from pathlib import Path; from tests.world.test_installed import install; install(Path({str(site)!r}), 'nbt_pack', '2.0', '__version__ = 2')"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    after = cluster.get([look.remote("nbt_pack") for _ in range(4)])
    assert {version for version, _ in after} == {2}
    assert {pid for _, pid in after}.isdisjoint(pid for _, pid in before)
    for _, pid in before:
        wait_ended(pid)
    assert cluster.get(keeper.look.remote()) == ["1.0", "1.0", "1.0"]


def test_files_that_python_writes_are_no_installation(cluster: Any, site: Path) -> None:
    look = cluster.remote(version_of)
    before = {pid for _, pid in cluster.get([look.remote("nbt_first") for _ in range(4)])}
    (site / "__pycache__").mkdir()
    (site / "data.csv").write_text("1\n")
    for _ in range(2):
        cluster.api.context.require().epoch += 1
        cluster.get([look.remote("nbt_first") for _ in range(4)])
    assert before & {pid for _, pid in cluster.get([look.remote("nbt_first") for _ in range(4)])}


RENEWED = """
nbray.init(num_cpus=2, name="renewed")
import cloudpickle

@nbray.remote
def look():
    import cloudpickle
    return cloudpickle.__version__, os.getpid(), os.getppid()

@nbray.remote
class Keeper:
    def __init__(self):
        self.count = 0

    def look(self):
        import cloudpickle
        self.count += 1
        return self.count, cloudpickle.__version__, os.getpid(), os.getppid()

@nbray.remote
def slow(folder):
    import cloudpickle
    open(folder + "/started", "w").close()
    until(lambda: os.path.exists(folder + "/go"))
    return cloudpickle.__version__, os.getpid(), os.getppid()

keeper = Keeper.remote()
first = nbray.get([look.remote() for _ in range(4)])
kept = nbray.get(keeper.look.remote())
running = slow.remote(sys.argv[1])
until(lambda: os.path.exists(sys.argv[1] + "/started"))
print("first", __import__("json").dumps([first, kept]), flush=True)
hear()
nbray.api.context.require().epoch += 1
second = nbray.get([look.remote() for _ in range(4)])
print("second", __import__("json").dumps([second, nbray.get(keeper.look.remote())]), flush=True)
hear()
open(sys.argv[1] + "/go", "w").close()
print("third", __import__("json").dumps([nbray.get(running), nbray.get(keeper.look.remote())]), flush=True)
hear()
nbray.kill(keeper)
print("fourth", __import__("json").dumps(nbray.get([look.remote() for _ in range(4)])), flush=True)
hear()
"""


def environment_with_a_copy(folder: Path, name: str) -> tuple[Path, Path]:
    """A virtual environment that has a package of its own, and everything else from here; its interpreter and that directory."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    here = sysconfig.get_paths()["purelib"]
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "all.pth").write_text(f"{here}\n{REPOSITORY}\n")
    shutil.copytree(Path(here) / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    install(site, name, "1.0")
    return folder / "bin" / "python", site


def upgrade(site: Path, name: str, version: str) -> None:
    file = site / name / "__init__.py"
    new = site / name / "__init__.new"
    new.write_text(file.read_text() + f"\n__version__ = {version!r}\n")
    new.replace(file)
    install(site, name, version)


def test_a_package_of_the_zygote_is_upgraded(tmp_path: Path) -> None:
    python, site = environment_with_a_copy(tmp_path / "env", "cloudpickle")
    upgrade(site, "cloudpickle", "0.1")
    with script(tmp_path / "driver.py", RENEWED, str(tmp_path), python=python) as driver:
        first, kept = json.loads(driver.line("first "))
        assert {version for version, _, _ in first} == {"0.1"}
        old = {parent for _, _, parent in first}
        assert len(old) == 1
        upgrade(site, "cloudpickle", "0.2")
        driver.say("go on")
        second, still = json.loads(driver.line("second "))
        assert {version for version, _, _ in second} == {"0.2"}
        assert {parent for _, _, parent in second}.isdisjoint(old)
        assert still == [2, "0.1", kept[2], kept[3]]
        driver.say("go on")
        ran, still = json.loads(driver.line("third "))
        assert ran[0] == "0.1" and {ran[2]} == old
        assert still == [3, "0.1", kept[2], kept[3]]
        wait_ended(ran[1])
        assert Path(f"/proc/{old.copy().pop()}").exists(), "the old zygote stays for the actor"
        driver.say("go on")
        fourth = json.loads(driver.line("fourth "))
        assert {version for version, _, _ in fourth} == {"0.2"}
        wait_ended(kept[2])
        wait_ended(old.pop())
        driver.say("end")
        driver.end()


def test_a_driver_that_comes_later_renews_too_and_one_that_comes_again_does_not(tmp_path: Path) -> None:
    python, site = environment_with_a_copy(tmp_path / "env", "cloudpickle")
    upgrade(site, "cloudpickle", "0.1")
    look = """
nbray.init(name="later", keep=True)
@nbray.remote
def look():
    import cloudpickle
    return cloudpickle.__version__, os.getpid(), os.getppid()
print("saw", __import__("json").dumps(nbray.get(look.remote())), flush=True)
if hear() == "stop":
    nbray.shutdown(stop=True)
"""
    zygotes = []
    with script(tmp_path / "first.py", look, python=python) as first:
        zygotes.append(json.loads(first.line("saw ")))
        upgrade(site, "cloudpickle", "0.2")
        for name in ("second", "third"):
            with script(tmp_path / f"{name}.py", look, python=python) as later:
                zygotes.append(json.loads(later.line("saw ")))
                later.say("leave")
                later.end()
        first.say("stop")
        first.end()
    assert [version for version, _, _ in zygotes] == ["0.1", "0.2", "0.2"]
    assert zygotes[0][2] != zygotes[1][2] == zygotes[2][2]


def test_an_environment_that_is_broken_for_a_while(tmp_path: Path) -> None:
    """In the middle of an upgrade a zygote cannot start; it is tried again until it can."""
    python, site = environment_with_a_copy(tmp_path / "env", "cloudpickle")
    upgrade(site, "cloudpickle", "0.1")
    code = """
nbray.init(name="broken", num_cpus=1)
@nbray.remote
def look():
    import cloudpickle
    return cloudpickle.__version__, os.getppid()
print("saw", nbray.get(look.remote())[0], flush=True)
print("log", nbray.api.context.require().engine.details()["log"], flush=True)
hear()
nbray.api.context.require().epoch += 1
ref = look.remote()
nbray.wait([ref], timeout=0)
print("asked", flush=True)
print("saw", nbray.get(ref)[0], flush=True)
"""
    with script(tmp_path / "driver.py", code, python=python) as driver:
        assert driver.line("saw ") == "0.1"
        log = Path(driver.line("log "))
        (site / "cloudpickle").rename(site / "cloudpickle.away")
        (site / "cloudpickle").mkdir()
        (site / "cloudpickle" / "__init__.py").write_text("raise ImportError('half installed')\n")
        install(site, "cloudpickle", "0.2")
        driver.say("go on")
        driver.line("asked")
        until(lambda: "half installed" in log.read_text(), "a zygote has tried to start")
        shutil.rmtree(site / "cloudpickle")
        (site / "cloudpickle.away").rename(site / "cloudpickle")
        upgrade(site, "cloudpickle", "0.3")
        assert driver.line("saw ") == "0.3"
        driver.end()


def test_the_old_zygote_may_die(cluster: Any, site: Path) -> None:
    """Its workers are gone with it; those of the new one are not."""

    @cluster.remote(max_restarts=1)
    class Keeper:
        def where(self) -> Any:
            return os.getpid(), os.getppid()

    keeper = Keeper.remote()
    pid, old = cluster.get(keeper.where.remote())
    node = node_of(cluster)
    assert old == daemon(node, "zygote")
    engine: Any = cluster.api.context.require().engine
    from nbray.messages import World

    # As a driver that has seen an installation says it: these directories are not ours to change.
    engine.machine.out.append(World(b"later", b"", b"", None, 1 << 62))
    engine.link.flush()
    _, new = cluster.get(cluster.remote(lambda: (os.getpid(), os.getppid())).remote())
    assert new != old
    later = cluster.get(cluster.remote(lambda: os.getpid()).remote())
    os.kill(old, 9)
    wait_ended(pid)
    where = cluster.get(keeper.where.remote())
    assert where[0] != pid and where[1] == new
    assert later in workers(node)
