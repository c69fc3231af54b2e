"""Narrow places: containers, odd environments, hostile or broken directories; and who may connect."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nbray
from nbray import clusters, config
from nbray.errors import NbrayError
from tests.processes.tools import (
    alive,
    children,
    daemon,
    descendants,
    node_of,
    script,
    sockets_listening_on_tcp,
    title,
    until,
    wait_ended,
    workers,
)

WORK = """
info = nbray.init(**eval(sys.argv[1] if len(sys.argv) > 1 else "{}"))

@nbray.remote
def square(x):
    return x * x

@nbray.remote
def total(array):
    return float(array.sum())

import numpy as np
assert nbray.get([square.remote(n) for n in range(10)], timeout=40) == [n * n for n in range(10)]
array = np.ones(1_000_000)
assert nbray.get(total.remote(nbray.put(array)), timeout=40) == 1e6
details = dict(info)
print("directory", details["directory"])
print("spill", details["spill"])
print("cpus", nbray.cluster_resources()["CPU"])
print("memory", nbray.cluster_resources()["memory"])
print("fine")
"""


def container(root: Path, *, quota: str, memory: str, version: int = 2) -> Path:
    """The files by which a container knows its limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       67108864 kB\nMemAvailable:   50331648 kB\n")
    if version == 2:
        (root / "proc/self/cgroup").write_text("0::/\n")
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "cpu.max").write_text(f"{quota} 100000\n")
        (group / "memory.max").write_text(f"{memory}\n")
        (group / "memory.current").write_text("1000000\n")
        (group / "memory.stat").write_text("inactive_file 0\n")
    else:
        (root / "proc/self/cgroup").write_text("4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
        for controllers, files in (
            ("cpu,cpuacct", {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}),
            (
                "memory",
                {
                    "memory.limit_in_bytes": memory,
                    "memory.usage_in_bytes": "1000000",
                    "memory.stat": "total_inactive_file 0",
                },
            ),
        ):
            directory = root / "sys/fs/cgroup" / controllers
            directory.mkdir(parents=True)
            for name, text in files.items():
                (directory / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_container_are_respected(runtime_dir: Path, tmp_path: Path, version: int) -> None:
    root = container(tmp_path / "root", quota="100000", memory=str(1 << 30), version=version)
    with script(tmp_path / "driver.py", WORK, NBRAY_CGROUP_ROOT=str(root)) as driver:
        assert driver.line("cpus") == "1.0"
        memory = float(driver.line("memory"))
        driver.end()
    # Of one gigabyte, the store has 30 percent.
    assert 0.69 * 2**30 < memory < 0.71 * 2**30


def test_limits_of_a_hosting_platform(runtime_dir: Path, tmp_path: Path) -> None:
    with script(tmp_path / "driver.py", WORK, CPU_LIMIT="1.5", MEM_LIMIT=str(2 << 30)) as driver:
        assert driver.line("cpus") == "1.0"
        assert 1.3 * 2**30 < float(driver.line("memory")) < 1.5 * 2**30
        driver.end()


ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "portable": {"NBRAY_PORTABLE": "1"},
    "no runtime directory of the user": {"XDG_RUNTIME_DIR": None},
    "dead proxy": {
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
    },
    "no home": {"HOME": None, "USER": None, "LOGNAME": None},
    "home that is not there": {"HOME": "/nonexistent"},
    "C locale": {"LC_ALL": "C", "LANG": None},
    "few variables": {"PATH": None, "TERM": None},
    "start-up hooks": {"PYTHONSTARTUP": "/nonexistent.py", "PYTHONINSPECT": None, "PYTHONWARNINGS": "ignore"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_odd_environments(runtime_dir: Path, tmp_path: Path, environment: dict[str, str | None]) -> None:
    with script(tmp_path / "driver.py", WORK, "dict(num_cpus=2)", variables=environment) as driver:
        text = driver.end()
    assert "fine" in text, text
    assert driver.process.returncode == 0, text
    assert list(runtime_dir.iterdir()) == []


def test_portable_mode_end_to_end(runtime_dir: Path, tmp_path: Path) -> None:
    code = """
import numpy as np
info = nbray.init(num_cpus=2, object_store_memory=64 << 20)
node = int(info["node_pid"])
print("arena", [os.readlink(f"/proc/{node}/fd/{fd}") for fd in os.listdir(f"/proc/{node}/fd") if "memfd" in os.readlink(f"/proc/{node}/fd/{fd}")])

@nbray.remote
class Holder:
    def __init__(self):
        self.parts = []
    def keep(self, part):
        self.parts.append(float(part[0]))
        return len(self.parts)
    def sum(self):
        return sum(self.parts)

holder = Holder.remote()
# Twice as much as the store holds: some of it must go to disk and come back.
refs = [nbray.put(np.full(1_000_000, float(n))) for n in range(16)]
assert [nbray.get(ref, timeout=40)[0] for ref in refs] == [float(n) for n in range(16)]
assert nbray.get([holder.keep.remote(ref) for ref in refs], timeout=40) == list(range(1, 17))
assert nbray.get(holder.sum.remote(), timeout=40) == 120.0
array = nbray.get(refs[3], writable=True, timeout=40)
array[0] = 7
assert nbray.get(refs[3], timeout=40)[0] == 3.0
print("fine")
"""
    with script(tmp_path / "driver.py", code, NBRAY_PORTABLE="1") as driver:
        assert driver.line("arena") == "[]"
        text = driver.end()
    assert "fine" in text, text
    assert list(runtime_dir.iterdir()) == []


def test_directory_with_a_long_path_is_not_used(runtime_dir: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 25) / "run"
    deep.mkdir(parents=True)
    variables: dict[str, str | None] = {
        "NBRAY_RUNTIME_DIR": None,
        "XDG_RUNTIME_DIR": str(deep),
        "TMPDIR": str(runtime_dir),
    }
    with script(tmp_path / "driver.py", WORK, variables=variables) as driver:
        directory = driver.line("directory")
        text = driver.end()
    assert "fine" in text
    assert directory.startswith(str(runtime_dir))
    assert list(deep.iterdir()) == []
    # What was asked for by name is not silently replaced.
    with pytest.raises(NbrayError, match=r"too long.*NBRAY_RUNTIME_DIR"):
        clusters.runtime_root(config.settings({"NBRAY_RUNTIME_DIR": str(deep)}))
    for entry in runtime_dir.iterdir():
        entry.rmdir()


class TestDirectories:
    """What `nbray.clusters` does with directories that cannot be used, as an unprivileged user sees them."""

    def test_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        with pytest.raises(OSError, match="not a directory"):
            clusters.private_directory(str(tmp_path / "link"))

    def test_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError):
            clusters.private_directory(str(tmp_path / "file"))

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
    def test_foreign_directory_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 12345, 12345)
        with pytest.raises(PermissionError, match="user 12345"):
            clusters.private_directory(str(tmp_path / "theirs"))

    def test_open_directory_is_closed_to_others(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o755)
        clusters.private_directory(str(tmp_path / "open"))
        assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700

    def test_error_names_every_place_and_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NbrayError, match=r"file: .*NBRAY_RUNTIME_DIR"):
            clusters.runtime_root(config.settings({"NBRAY_RUNTIME_DIR": str(tmp_path / "file")}))

    def test_place_without_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(directory: str) -> None:
            if directory.startswith(str(tmp_path)) or directory in {"/tmp", "/var/tmp"}:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(clusters, "_probe", full)
        with pytest.raises(NbrayError, match="No space left"):
            clusters.runtime_root(config.settings({"NBRAY_RUNTIME_DIR": str(tmp_path / "run")}))
        with pytest.raises(NbrayError, match=r"NBRAY_SPILL_DIR=.*No space left"):
            clusters.spill_root(config.settings({"NBRAY_SPILL_DIR": str(tmp_path / "spill")}))


def _as_another_user(function: Any) -> str:
    """What ``function()`` returns, or the error it raises, in a child with another uid."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # The child does nothing that another thread could have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            try:
                text = repr(function())
            except BaseException as error:
                text = repr(error)
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


@as_root
def test_temporary_directory_that_cannot_be_written(runtime_dir: Path, tmp_path: Path) -> None:
    """Read-only places are passed over; when all are, the error says so."""
    closed = Path("/tmp") / f"nbray-test-{os.getpid()}"
    closed.mkdir(mode=0o755)
    try:

        def find() -> str:
            return clusters.runtime_root(
                config.settings({"XDG_RUNTIME_DIR": str(closed), "TMPDIR": str(closed)})
            )

        assert _as_another_user(find) == repr("/tmp/nbray-12345")
        told = _as_another_user(
            lambda: clusters.runtime_root(config.settings({"NBRAY_RUNTIME_DIR": str(closed / "run")}))
        )
        assert "Permission denied" in told
        assert "NBRAY_RUNTIME_DIR" in told
    finally:
        closed.rmdir()
        Path("/tmp/nbray-12345").rmdir()


@as_root
def test_another_user_is_refused(cluster: Any, tmp_path: Path) -> None:
    (record,) = clusters.list_clusters()
    below = [record.paths.directory, record.paths.node_socket, record.paths.head_socket]
    assert stat.S_IMODE(os.lstat(below[0]).st_mode) == 0o700
    assert all(stat.S_IMODE(os.lstat(path).st_mode) == 0o600 for path in below[1:])
    assert stat.S_IMODE(os.lstat(record.paths.spill).st_mode) == 0o700

    def connect(path: str) -> Any:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(path)
            return sock.recv(1)

    for path in below[1:]:
        assert "PermissionError" in _as_another_user(partial(connect, path))
    # Even if somebody has opened the doors, who connects is looked at.
    parents = [parent for parent in Path(below[1]).parents if not os.lstat(parent).st_mode & 0o001]
    modes = {parent: stat.S_IMODE(parent.stat().st_mode) for parent in parents}
    for parent in parents:
        parent.chmod(modes[parent] | 0o011)
    try:
        for path in below[1:]:
            os.chmod(path, 0o666)
            assert _as_another_user(partial(connect, path)) == "b''", "accepted, looked at, closed"
    finally:
        for parent, mode in modes.items():
            parent.chmod(mode)

    @cluster.remote
    def one() -> int:
        return 1

    assert cluster.get(one.remote(), timeout=30) == 1


def test_stale_directory_of_a_crashed_run(runtime_dir: Path, tmp_path: Path) -> None:
    nbray.init(num_cpus=1)
    node = node_of(nbray)
    (record,) = clusters.list_clusters()
    below = descendants(node)
    os.kill(node, signal.SIGKILL)
    for pid in (node, *below):
        wait_ended(pid, 10)
    nbray.shutdown()
    assert os.path.exists(record.paths.record)
    assert clusters.list_clusters() == []
    # One of another name, a half-removed one, and one from before the last boot.
    other = runtime_dir / "other-123456"
    other.mkdir(mode=0o700)
    text = Path(record.paths.record).read_text()
    (other / "cluster.json").write_text(text.replace(record.paths.directory, str(other)))
    half = runtime_dir / f"old-123456{clusters.ENDING}999999999"
    half.mkdir(mode=0o700)
    (half / "cluster.json").write_text(text)
    broken = runtime_dir / "broken-123456"
    broken.mkdir(mode=0o700)
    (broken / "cluster.json").write_text("{")
    nbray.init(num_cpus=1)
    try:
        assert [path.name for path in runtime_dir.iterdir() if path.name != broken.name] == [
            Path(record.paths.directory).name
        ]
        assert not other.exists()
        assert not half.exists()
    finally:
        nbray.shutdown()
    (broken / "cluster.json").unlink()
    broken.rmdir()
    assert not os.path.exists(record.paths.spill)


STARTED = """
info = dict(nbray.init(num_cpus=1, object_store_memory=16 << 20))
print("node", info["node_pid"])
print("directory", info["directory"])
print("spill", info["spill"])
hear()
"""


def test_spill_directory_of_a_crashed_run_whose_runtime_directory_is_gone(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    runtime = [tmp_path / name for name in ("a", "b", "c")]

    def start(number: int) -> Any:
        return script(
            tmp_path / f"{number}.py", STARTED, NBRAY_RUNTIME_DIR=str(runtime[number]), NBRAY_SPILL_DIR=str(spill)
        )  # fmt: skip

    with start(0) as alive_one, start(1) as crashing:
        kept = Path(alive_one.line("spill "))
        node, directory = int(crashing.line("node ")), Path(crashing.line("directory "))
        lost = Path(crashing.line("spill "))
        assert lost != kept
        below = descendants(node)
        os.kill(node, signal.SIGKILL)
        for pid in (node, *below):
            wait_ended(pid, 10)
        crashing.kill()
        shutil.rmtree(directory)
        # What the removal of another one has left, what never got any further, and what is somebody's.
        half = spill / f"nbray-{os.getuid()}-00000001{clusters.ENDING}999999999"
        (half / "logs").mkdir(parents=True)
        early, new = spill / f"nbray-{os.getuid()}-00000002", spill / f"nbray-{os.getuid()}-00000003"
        foreign = spill / "nbray-data"
        for path in (early, new, foreign):
            path.mkdir()
        os.utime(early, (1, 1))
        os.utime(foreign, (1, 1))
        assert (lost / "gcs.sqlite").exists()
        with start(2) as later:
            assert Path(later.line("spill ")).exists()
            assert not lost.exists()
            assert not half.exists()
            assert not early.exists()
            assert kept.exists() and new.exists() and foreign.exists()
            later.say("end")
            later.end()
        alive_one.say("end")
        alive_one.end()
    assert sorted(path.name for path in spill.iterdir()) == sorted([new.name, foreign.name])


def test_nothing_listens_on_tcp_and_nothing_lies_beside_the_script(runtime_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "work"
    home.mkdir()
    # Names of the standard library in the working directory shadow nothing in the daemons.
    for name in ("selectors.py", "sqlite3.py", "setproctitle.py"):
        (home / name).write_text("raise ImportError('the wrong one')\n")
    code = WORK + "hear()\n"
    with script(tmp_path / "driver.py", code, cwd=home) as driver:
        directory = Path(driver.line("directory"))
        driver.line("fine")
        (record,) = clusters.list_clusters()
        family = [record.pid, *descendants(record.pid)]
        assert len(family) >= 4
        assert sockets_listening_on_tcp(family) == []
        assert directory.parent == runtime_dir
        driver.say("end")
        driver.end()
    assert sorted(path.name for path in home.iterdir()) == ["selectors.py", "setproctitle.py", "sqlite3.py"]


def test_titles_scores_sessions(cluster: Any, tmp_path: Path) -> None:
    @cluster.remote
    def a_task(path: Path) -> tuple[int, int, bool, str]:
        path.touch()
        until((path.parent / "go").exists)
        with open("/proc/self/oom_score_adj") as file:
            score = int(file.read())
        return os.getpid(), score, bool(sys.flags.safe_path), os.getcwd()

    @cluster.remote
    class Keeper:
        def hold(self, path: Path) -> int:
            path.touch()
            until((path.parent / "go").exists)
            return os.getpid()

    keeper = Keeper.remote()
    refs = [a_task.remote(tmp_path / "task"), keeper.hold.remote(tmp_path / "actor")]
    until(lambda: (tmp_path / "task").exists() and (tmp_path / "actor").exists())
    node = node_of(cluster)
    head, zygote = daemon(node, "head"), daemon(node, "zygote")
    assert title(node) == "nbray node"
    titles = sorted(title(pid) for pid in workers(node))
    assert all(name.startswith("nbray worker") for name in titles)
    assert any(name.endswith("a_task") and name.startswith("nbray worker: ") for name in titles), titles
    assert any(name.endswith("Keeper.hold") for name in titles), titles
    (tmp_path / "go").touch()
    pid, score, safe, directory = cluster.get(refs, timeout=30)[0]
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert score >= max(own, 500)
    assert safe
    assert directory == os.getcwd()
    for daemon_pid in (node, head, zygote):
        assert os.getsid(daemon_pid) == daemon_pid, "leader of a session of its own"
        assert int(Path(f"/proc/{daemon_pid}/oom_score_adj").read_text()) == own
        assert os.readlink(f"/proc/{daemon_pid}/cwd") != os.getcwd()
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) == pid


def test_too_many_processes(runtime_dir: Path, tmp_path: Path) -> None:
    """A fork that fails is tried again; nothing dies of it."""
    nbray.init(num_cpus=4)
    try:

        @nbray.remote
        def work(number: int) -> int:
            return number

        node = node_of(nbray)
        zygote = daemon(node, "zygote")
        until(lambda: len(workers(node)) >= 3)
        import resource

        before = resource.prlimit(zygote, resource.RLIMIT_NOFILE)
        # The descriptors of another worker cannot be received.
        resource.prlimit(zygote, resource.RLIMIT_NOFILE, (4, before[1]))
        for pid in workers(node):
            os.kill(pid, signal.SIGKILL)
            wait_ended(pid)
        ref = work.remote(5)
        log = Path(clusters.list_clusters()[0].paths.log)
        until(lambda: "before it said hello" in log.read_text())
        resource.prlimit(zygote, resource.RLIMIT_NOFILE, before)
        assert nbray.get(ref, timeout=40) == 5
        assert daemon(node, "zygote") == zygote
        until(lambda: all(alive(pid) for pid in children(zygote)))
    finally:
        nbray.shutdown()
