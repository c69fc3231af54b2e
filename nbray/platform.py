"""What differs between operating systems, in one place: every Linux facility that nbray uses, with a portable way where there is one.

Nothing here reads environment variables (``nbray.config`` does); limits come in as arguments. Functions that read ``/proc`` and ``/sys``
take ``root``, so that tests can lay out the files of any container.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

LINUX = sys.platform == "linux"

_FALLOC_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_MADV_POPULATE_WRITE = 23
_MAP_SHARED, _MAP_PRIVATE = 0x01, 0x02
_PROT_READ_WRITE = 0x01 | 0x02
_PR_SET_PDEATHSIG = 1
_F_SETSIG = 10
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = 4096
_PAGES_AT_ONCE = 1 << 18


def require_supported(system: str = sys.platform) -> None:
    """Raises OSError where nbray cannot run, with the way out."""
    if system in {"win32", "cygwin"}:
        raise OSError(
            "nbray does not run on Windows itself. It does in WSL 2: run `wsl --install` once, then install Python and nbray in the Linux "
            "terminal that this gives you and open the notebook from there."
        )


@cache
def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    long, pointer, size = ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, long)
    libc.munmap.argtypes = (pointer, size)
    libc.madvise.argtypes = (pointer, size, ctypes.c_int)
    if LINUX:
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, long, long)
    return libc


def _error(what: str) -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


# -- memory that processes share ----------------------------------------------------------------------------------------------------


def shared_file(span: int, *, portable: bool = False, directory: str | None = None) -> int:
    """File descriptor of ``span`` sparse bytes without a name: a memfd, or (``portable``, or not on Linux) an unlinked file in ``directory``.

    The pages of a memfd come from memory whatever the size of ``/dev/shm``; those of a file must be reserved with `reserve` before they are
    written, since a full disk would end the writer with SIGBUS. Raises OSError.
    """
    if LINUX and not portable:
        import fcntl

        fd = os.memfd_create("nbray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, span)
        # A client that could shrink the file would end every other process that reads it.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd
    import tempfile

    fd, path = tempfile.mkstemp(prefix="nbray-", dir=directory)
    os.unlink(path)
    os.ftruncate(fd, span)
    return fd


def reserve(fd: int, offset: int, length: int) -> None:
    """Make sure that writing these bytes of a file cannot fail for lack of space. Raises OSError (ENOSPC)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, length)
        return
    zeros = bytes(1 << 20)
    for at in range(offset, offset + length, len(zeros)):
        os.pwrite(fd, zeros[: offset + length - at], at)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the memory or disk space of these bytes back; they read as zeros. False where the file system cannot."""
    if not LINUX:
        return False
    if _libc().fallocate(fd, _FALLOC_KEEP_SIZE_AND_PUNCH_HOLE, offset, length) == 0:
        return True
    error = _error(f"cannot punch a hole of {length} bytes at {offset}")
    if error.errno in {errno.EOPNOTSUPP, errno.ENOSYS}:
        return False
    raise error


def populate(address: int, length: int) -> bool:
    """Back the pages at ``address`` (page-aligned) by memory ahead of their first write, without the interpreter lock.

    False where the kernel cannot (before Linux 5.14): the first write then does it, page by page.
    """
    return LINUX and _libc().madvise(address, length, _MADV_POPULATE_WRITE) == 0


def map_private(fd: int, offset: int, length: int) -> int:
    """Address of a writable copy-on-write mapping of a file (``offset`` page-aligned): a page is copied when it is first written.

    Unlike ``mmap.mmap`` it keeps no descriptor. Raises OSError.
    """
    address = _libc().mmap(None, length, _PROT_READ_WRITE, _MAP_PRIVATE, fd, offset)
    if address in {None, 2**64 - 1}:
        raise _error(f"cannot map {length} bytes privately")
    return int(address)


def unmap(address: int, length: int) -> None:
    """End a mapping made by `map_private`."""
    _libc().munmap(address, length)


def unwritten(address: int, length: int) -> bool | None:
    """Whether memory of a mapping made by `map_private` is the file's still; None where the system does not tell. 4 ms for 1 GB.

    A page that was written is the process's own. See the kernel's admin-guide/mm/pagemap: bit 63 present, 62 swapped, 61 of a file or shared.
    """
    if not LINUX or not length:
        return None
    import numpy as np

    page = mmap.PAGESIZE
    first, last = address // page, (address + length - 1) // page + 1
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(first, last, _PAGES_AT_ONCE):
                count = min(_PAGES_AT_ONCE, last - start)
                data = os.pread(fd, count * 8, start * 8)
                if len(data) != count * 8:
                    return None
                bits = np.frombuffer(data, np.uint64) >> np.uint64(61)
                if ((bits > 1) & (bits & np.uint64(1) == 0)).any():
                    return False
        finally:
            os.close(fd)
    except OSError:
        return None
    return True


# -- processes ----------------------------------------------------------------------------------------------------------------------


def pipe(*, blocking: bool) -> tuple[int, int]:
    """(read end, write end) of a pipe that programs started from here do not inherit."""
    if hasattr(os, "pipe2"):
        return os.pipe2(os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK))
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, blocking)
    return ends


class Poller:
    """Which descriptors are ready: the face of `select.epoll` (masks are the same bits, timeouts in seconds) over `select.poll`."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """(descriptor, mask) of those that are ready; waits up to ``timeout`` seconds, rounded up to milliseconds, for one."""
        return self._poll.poll(-(-timeout * 1000 // 1))


def poller(*, portable: bool = False) -> Poller | select.epoll:
    """A `select.epoll` (one call costs the same with a thousand descriptors), or (``portable``, or not on Linux) a `Poller`."""
    return Poller() if portable or not hasattr(select, "epoll") else select.epoll()


def set_parent_death_signal(number: int) -> bool:
    """Have the kernel send this signal to the calling process when its parent thread ends. False where that does not exist.

    The parent may have ended before: compare ``os.getppid()`` afterwards.
    """
    return LINUX and _libc().prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) == 0


def end_group_with(pipe: int) -> int:
    """Have the kernel end the process group of the calling process, which leads it, when nobody holds the other end of ``pipe`` (its read end) any more.

    The group is ended however busy this process is, and before it could be told by `set_parent_death_signal`, which ends it alone. Returns the
    descriptor that this lasts for; -1 where it cannot be done.
    """
    if not LINUX:
        return -1
    import fcntl

    try:
        # The owner of a pipe's signal belongs to the open file, and this one is shared with the processes that inherited it.
        own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | fcntl.FASYNC)
    return own


def adopt_orphans() -> bool:
    """Become the parent of what the children of this process leave behind when they end. False where that does not exist."""
    return LINUX and _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def children_of_this_process() -> list[int]:
    """Pids of the children of all threads; empty where the system does not tell."""
    found: list[int] = []
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def process_descriptor(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where there are none. Raises ProcessLookupError."""
    if not LINUX or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EPERM}:
            return None
        raise


def raise_out_of_memory_score(amount: int, root: str = "/") -> bool:
    """Make the kernel prefer this process (0..1000) when memory runs out; False where it cannot be done."""
    try:
        file = os.open(os.path.join(root, "proc/self/oom_score_adj"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.pwrite(file, b"%d" % max(int(os.read(file, 16)), amount), 0)
    except (OSError, ValueError):
        return False
    finally:
        os.close(file)
    return True


def set_process_title(title: str) -> None:
    """What ``ps`` and ``top`` show for this process."""
    from setproctitle import setproctitle

    setproctitle(title)


def peer_credentials(connection: socket.socket) -> tuple[int, int] | None:
    """(pid, user id) of the process at the other end of a Unix socket; None where the system does not tell."""
    import socket
    import struct

    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def proportional_memory(pid: int, root: str = "/") -> int:
    """Bytes of memory of a process, shared pages divided among those that share them (PSS); resident bytes where the kernel does not tell.

    0 for a process that has ended.
    """
    try:
        with open(os.path.join(root, f"proc/{pid}/smaps_rollup"), "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resident_memory(pid, root)


def resident_memory(pid: int, root: str = "/") -> int:
    """Bytes of memory of a process, shared pages included (RSS); 0 for a process that has ended. Two microseconds, where PSS takes a thousand."""
    try:
        with open(os.path.join(root, f"proc/{pid}/statm"), "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        if LINUX:
            return 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


# -- the machine --------------------------------------------------------------------------------------------------------------------


def available_cpus(limit: float | None = None, root: str = "/") -> int:
    """CPUs this process may use, at least 1: the least of affinity, cgroup quota (rounded down) and ``limit`` (``CPU_LIMIT``)."""
    counts = [
        float(len(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else float(os.cpu_count() or 1)
    ]
    for directory in _cgroups("cpu", root):
        version1 = [
            _word(directory, "cpu.cfs_quota_us") or "-1",
            _word(directory, "cpu.cfs_period_us") or "100000",
        ]
        quota, period = _words(directory, "cpu.max") or version1
        if quota != "max" and int(quota) > 0:
            counts.append(int(quota) / int(period))
    if limit is not None and limit > 0:
        counts.append(limit)
    return max(1, int(min(counts)))


def available_memory(limit: int | None = None, root: str = "/") -> int:
    """Bytes of memory this process and its children may use: the least of RAM, cgroup limits and ``limit`` (``MEM_LIMIT``)."""
    sizes = [_meminfo(root)["MemTotal"]]
    for directory in _cgroups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            word = _word(directory, name)
            if word is not None and word != "max":
                sizes.append(int(word))
    if limit is not None and limit > 0:
        sizes.append(limit)
    return min(sizes)


def memory_in_use(limit: int | None = None, root: str = "/") -> tuple[int, int]:
    """(bytes used, bytes available in all) of whichever is closest to its limit: the host or a cgroup this process is in.

    Memory that the kernel can take back at once (the page cache of files) does not count. With ``limit`` (``MEM_LIMIT``), which nobody but
    the reader enforces, the use of the innermost cgroup is held against it too.
    """
    info = _meminfo(root)
    levels = [(info["MemTotal"] - info["MemAvailable"], info["MemTotal"])]
    innermost: int | None = None
    for directory in _cgroups("memory", root):
        for usage, maximum, reclaimable in (
            ("memory.current", "memory.max", "inactive_file"),
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        ):
            current, most = _word(directory, usage), _word(directory, maximum)
            if current is None:
                continue
            used = max(0, int(current) - _statistic(directory, reclaimable))
            if innermost is None:
                innermost = used
            if most is not None and most != "max" and int(most) <= info["MemTotal"]:
                levels.append((used, int(most)))
    if limit is not None and limit > 0:
        levels.append((levels[0][0] if innermost is None else innermost, limit))
    return max(levels, key=lambda level: level[0] / level[1])


def boot_id(root: str = "/") -> str:
    """Differs between two boots of a machine, so that files of an earlier boot are known as such; empty where there is none."""
    try:
        with open(os.path.join(root, "proc/sys/kernel/random/boot_id")) as file:
            return file.read().strip()
    except OSError:
        return ""


_TMPFS = {0x0102_1994, 0x8584_58F6}
_NETWORK = {
    0x6969,  # nfs
    0x517B,  # smb
    0xFE53_4D42,  # smb2
    0xFF53_4D42,  # cifs
    0x0BD0_0BD0,  # lustre
    0x00C3_6400,  # ceph
    0x4750_4653,  # gpfs
    0x1983_0326,  # beegfs
    0x5346_414F,  # afs
    0x0102_1997,  # 9p
    0x6573_5546,  # fuse: s3fs, gcsfuse, sshfs
}


def filesystem_kind(path: str) -> Literal["tmpfs", "network", "local"]:
    """Where a directory lies: in memory, on another machine, or on a local disk (also when that cannot be told). Raises OSError."""
    if not LINUX:
        os.stat(path)
        return "local"
    import ctypes

    # struct statfs begins with the type as a long on every Linux; the rest of it is not read.
    statistics = (ctypes.c_long * 64)()
    if _libc().statfs(os.fsencode(path), statistics) != 0:
        raise _error(f"cannot look at the file system of {path}")
    kind = statistics[0] & 0xFFFF_FFFF
    return "tmpfs" if kind in _TMPFS else "network" if kind in _NETWORK else "local"


def _cgroups(controller: str, root: str) -> Iterator[str]:
    """Directories of the cgroups this process is in, innermost first, for version 1 and 2; a limit of any of them holds.

    In a container without a cgroup namespace ``/proc/self/cgroup`` gives the path on the host, while the mount shows the container's own
    cgroup as its root: so ancestors that are not there are skipped and the mount itself always is looked at.
    """
    try:
        with open(os.path.join(root, "proc/self/cgroup")) as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    paths: list[tuple[str, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths += [("sys/fs/cgroup", path), ("sys/fs/cgroup/unified", path)]
        elif controller in controllers.split(","):
            paths += [(f"sys/fs/cgroup/{controllers}", path), (f"sys/fs/cgroup/{controller}", path)]
    seen = set()
    for mount, path in paths or [("sys/fs/cgroup", "/"), (f"sys/fs/cgroup/{controller}", "/")]:
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            directory = os.path.join(root, mount, *parts[:depth])
            if directory not in seen and os.path.isdir(directory):
                seen.add(directory)
                yield directory


def _words(directory: str, name: str) -> list[str] | None:
    try:
        with open(os.path.join(directory, name)) as file:
            return file.read().split() or None
    except OSError:
        return None


def _word(directory: str, name: str) -> str | None:
    words = _words(directory, name)
    return words[0] if words else None


def _statistic(directory: str, name: str) -> int:
    words = _words(directory, "memory.stat") or []
    for key, value in zip(words[::2], words[1::2], strict=False):
        if key == name:
            return int(value)
    return 0


def _meminfo(root: str) -> dict[str, int]:
    """``MemTotal`` and ``MemAvailable`` in bytes."""
    sizes: dict[str, int] = {}
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in {"MemTotal", "MemAvailable"}:
                    sizes[name] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    if len(sizes) == 2:
        return sizes
    import psutil

    memory = psutil.virtual_memory()
    return {"MemTotal": int(memory.total), "MemAvailable": int(memory.available)}
