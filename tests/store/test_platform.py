"""What the operating system says, read from files that the tests lay out as a container would."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbray import platform

GB = 1 << 30
UNLIMITED = "9223372036854771712"


def machine(root: Path, cgroup: str, files: dict[str, str], total: int = 64 * GB, free: int = 48 * GB) -> str:
    meminfo = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {free // 1024} kB\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_the_bare_machine(tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    assert platform.available_cpus(root=root) == 16
    assert platform.available_memory(root=root) == 64 * GB
    assert platform.memory_in_use(root=root) == (16 * GB, 64 * GB)


def test_limits_given_by_the_hub_count(tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    assert platform.available_cpus(2.5, root=root) == 2
    assert platform.available_cpus(0.5, root=root) == 1
    assert platform.available_cpus(99, root=root) == 16
    assert platform.available_memory(4 * GB, root=root) == 4 * GB
    assert platform.memory_in_use(20 * GB, root=root) == (16 * GB, 20 * GB)


def test_cgroup_2_with_its_own_namespace(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/\n",
        {
            "sys/fs/cgroup/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/memory.max": f"{8 * GB}\n",
            "sys/fs/cgroup/memory.current": f"{5 * GB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {1 * GB}\nactive_file 7\n",
        },
    )
    assert platform.available_cpus(root=root) == 2
    assert platform.available_memory(root=root) == 8 * GB
    assert platform.memory_in_use(root=root) == (4 * GB, 8 * GB)
    assert platform.memory_in_use(5 * GB, root=root) == (4 * GB, 5 * GB)


def test_cgroup_2_nested_the_tightest_level_holds(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/system.slice/jupyter.service\n",
        {
            "sys/fs/cgroup/system.slice/jupyter.service/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/jupyter.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/jupyter.service/memory.current": f"{GB}\n",
            "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{2 * GB}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{GB + GB // 2}\n",
            "sys/fs/cgroup/memory.stat": "",
        },
    )
    assert platform.available_cpus(root=root) == 4
    assert platform.available_memory(root=root) == 2 * GB
    assert platform.memory_in_use(root=root) == (GB + GB // 2, 2 * GB)


def test_cgroup_1_in_a_container_that_sees_the_hosts_path(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n",
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"cache 5\ninactive_file 9\ntotal_inactive_file {GB}\n",
        },
    )
    assert platform.available_cpus(root=root) == 3
    assert platform.available_memory(root=root) == 3 * GB
    assert platform.memory_in_use(root=root) == (GB, 3 * GB)


def test_cgroup_1_without_limits(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "5:cpu:/\n4:memory:/user\n",
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/user/memory.limit_in_bytes": f"{UNLIMITED}\n",
            "sys/fs/cgroup/memory/user/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{UNLIMITED}\n",
        },
    )
    assert platform.available_cpus(root=root) == 16
    assert platform.available_memory(root=root) == 64 * GB
    assert platform.memory_in_use(root=root) == (16 * GB, 64 * GB)
    assert platform.memory_in_use(2 * GB, root=root) == (GB, 2 * GB), (
        "against the hub's limit: the cgroup, not the host"
    )


def test_a_fraction_of_a_cpu_is_one(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "20000 100000\n"})
    assert platform.available_cpus(root=root) == 1


def test_this_machine_answers() -> None:
    assert platform.available_memory() > 1 << 20
    used, total = platform.memory_in_use()
    assert 0 < used < total
    assert len(platform.boot_id()) == 36
    assert platform.filesystem_kind("/proc") == "local"
    if os.path.ismount("/dev/shm"):
        assert platform.filesystem_kind("/dev/shm") == "tmpfs"
    with pytest.raises(FileNotFoundError):
        platform.filesystem_kind("/nowhere/at/all")
    assert platform.boot_id("/nowhere") == ""


def test_memory_of_processes() -> None:
    shared, own = platform.resident_memory(os.getpid()), platform.proportional_memory(os.getpid())
    assert 1 << 20 < own <= shared * 1.1
    process = subprocess.Popen(["true"])
    process.wait()
    assert platform.proportional_memory(process.pid) == 0


def test_the_end_of_a_process_is_seen() -> None:
    process = subprocess.Popen(["sleep", "60"])
    watch = platform.process_descriptor(process.pid)
    assert watch is not None
    assert select.select([watch], [], [], 0)[0] == []
    process.kill()
    assert select.select([watch], [], [], 10)[0] == [watch]
    process.wait()
    os.close(watch)
    with pytest.raises(ProcessLookupError):
        platform.process_descriptor(process.pid)


def test_a_child_ends_with_its_parent() -> None:
    child = (
        "import os, signal, sys\n"
        "from nbray import platform\n"
        "assert platform.set_parent_death_signal(signal.SIGKILL)\n"
        "print(os.getpid(), flush=True)\n"
        "signal.pause()\n"
    )
    parent = (
        "import signal, subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "print(p.stdout.readline().decode(), end='', flush=True)\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    watch = platform.process_descriptor(int(process.stdout.readline()))
    assert watch is not None
    process.kill()
    process.wait()
    process.stdout.close()
    assert select.select([watch], [], [], 10)[0] == [watch]
    os.close(watch)


def test_the_first_to_go_when_memory_runs_out(tmp_path: Path) -> None:
    score = tmp_path / "proc/self/oom_score_adj"
    score.parent.mkdir(parents=True)
    score.write_text("200\n")
    assert platform.raise_out_of_memory_score(500, str(tmp_path))
    assert score.read_text().strip() == "500"
    assert platform.raise_out_of_memory_score(300, str(tmp_path))
    assert score.read_text().strip() == "500", "only ever raised"
    assert not platform.raise_out_of_memory_score(300, str(tmp_path / "nowhere"))


def test_the_other_end_of_a_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert platform.peer_credentials(left) == (os.getpid(), os.getuid())


def test_windows_is_told_the_way_out() -> None:
    with pytest.raises(OSError, match="wsl --install"):
        platform.require_supported("win32")
    platform.require_supported()


def test_memory_that_a_file_system_reserves(tmp_path: Path) -> None:
    fd = platform.shared_file(1 << 24, portable=True, directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(fd).st_blocks == 0
    platform.reserve(fd, 4096, 1 << 20)
    assert os.fstat(fd).st_blocks * 512 >= 1 << 20
    assert platform.punch_hole(fd, 4096, 1 << 20)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)
    with pytest.raises(OSError, match="punch a hole"):
        platform.punch_hole(fd, 0, 4096)


def test_process_titles() -> None:
    script = "from nbray import platform; platform.set_process_title('nbray test'); print(open('/proc/self/cmdline').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nbray test")


def test_importing_it_is_cheap() -> None:
    script = (
        "import os, sys\nbefore = set(sys.modules)\nimport nbray.platform\n"
        "print(sorted(set(sys.modules) - before - {'nbray', 'nbray.platform'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"ctypes", "psutil", "tempfile", "socket"}.isdisjoint(eval(done.stdout))


def test_a_poller_says_what_an_epoll_says() -> None:
    read, write = platform.pipe(blocking=False)
    pollers = [platform.poller(portable=portable) for portable in (False, True)]
    try:
        for poller in pollers:
            poller.register(read, select.POLLIN)
            poller.register(write, select.POLLIN)
            assert poller.poll(0) == []
            poller.modify(write, select.POLLIN | select.POLLOUT)
            assert poller.poll(0.001) == [(write, select.POLLOUT)]
            poller.unregister(write)
        os.write(write, b"x")
        assert [poller.poll(5.0) for poller in pollers] == [[(read, select.POLLIN)]] * 2
    finally:
        os.close(read)
        os.close(write)


def test_a_poller_does_not_wake_before_its_time() -> None:
    poller = platform.poller(portable=True)
    began = time.monotonic()
    assert poller.poll(0.0004) == []
    assert time.monotonic() - began >= 0.0004


def test_pipes_are_not_inherited() -> None:
    for blocking in (True, False):
        ends = platform.pipe(blocking=blocking)
        for end in ends:
            assert not os.get_inheritable(end)
            assert os.get_blocking(end) is blocking
            os.close(end)
