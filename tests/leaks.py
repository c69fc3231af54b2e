"""What a test left behind: processes, runtime files, temporary files, shared memory, threads.

Rules: a process belongs to a test session when its environment or command line carries the session's folder
(every process started by a test inherits it), or when the test process is its parent. What was there before
a test, and what descends from that (a shared cluster growing a worker), is not the test's.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")

# Helpers of the standard library that live until the interpreter ends, by design.
INTERPRETER_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "loky.backend")

# Parent of all kernel threads, which have no command line at all.
KERNEL_THREADS = 2

# In the middle of exec, usually for some microseconds, a process has no command line either.
SECONDS_OF_EXEC = 0.2

# Folders that a kernel makes for its debugger and never removes.
FOREIGN_TEMP_PREFIXES = ("ipykernel_",)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(PROC) if name.isdigit()]
    except OSError:
        return []


def _state_and_parent(pid: int) -> tuple[str, int]:
    """State letter and parent of a process; ("", 0) once it is gone."""
    # The name, in parentheses, may itself hold spaces and parentheses.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (fields[0].decode(), int(fields[1])) if len(fields) > 1 else ("", 0)


def _identity(pid: int) -> tuple[bytes, bytes]:
    """Command line and environment of a process; empty if it has ended."""
    deadline = time.monotonic() + SECONDS_OF_EXEC
    while True:
        if command := _read(f"/proc/{pid}/cmdline"):
            return command, _read(f"/proc/{pid}/environ")
        state, parent = _state_and_parent(pid)
        if state in ("", "Z", "X") or parent in (0, KERNEL_THREADS) or time.monotonic() > deadline:
            return b"", b""
        os.sched_yield()


def _own_children() -> list[int]:
    children: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        children += map(int, _read(f"/proc/self/task/{thread}/children").split())
    return children


@dataclass(frozen=True)
class Snapshot:
    """What existed at one moment. `connected`: this process was attached to a cluster."""

    pids: frozenset[int]
    paths: frozenset[str]
    fds: frozenset[tuple[int, str]]
    threads: frozenset[int]
    connected: bool


@dataclass
class Leftovers:
    """What exists now and should not; false when there is nothing."""

    processes: dict[int, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.processes or self.paths or self.others)

    def __str__(self) -> str:
        lines = [f"  process {pid}: {title}" for pid, title in self.processes.items()]
        lines += [f"  file {path}" for path in self.paths]
        lines += [f"  {other}" for other in self.others]
        return "\n".join(lines)


class LeakCheck:
    """Finds what was left behind under one session's folder.

    `folder` is short, private to the session, and named in the environment of every process it starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "run"
        self.temp = folder / "tmp"
        # Folders of single tests inside `runtime`, looked into one by one.
        self.private: set[Path] = set()
        self._marker = os.fsencode(folder)
        # Reading every environment of the machine each time would cost more than the tests.
        self._strangers = frozenset(_pids())

    # -- what is there now

    def _ours(self) -> dict[int, str]:
        """Our live processes and their titles, without this one."""
        alive = _pids()
        self._strangers = self._strangers.intersection(alive)
        children = set(_own_children()) if alive else set()
        ours: dict[int, str] = {}
        for pid in alive:
            if pid in self._strangers or pid == os.getpid():
                continue
            command, environment = _identity(pid)
            if pid not in children and self._marker not in command and self._marker not in environment:
                continue
            title = command.replace(b"\0", b" ").decode(errors="replace").strip()
            # What has ended has no command line; whether it is reaped is its parent's business.
            if title and not any(helper in title for helper in INTERPRETER_HELPERS):
                ours[pid] = title
        return ours

    def _paths(self) -> frozenset[str]:
        found: list[str] = []
        for folder in (self.runtime, self.temp, *sorted(self.private)):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                found += [
                    entry.path
                    for entry in entries
                    if Path(entry.path) not in self.private
                    and not entry.name.startswith(FOREIGN_TEMP_PREFIXES)
                ]
        return frozenset(found)

    def _fds(self) -> Iterator[tuple[int, str]]:
        """Descriptors of this process that reach into a cluster: its memory, its files, its sockets."""
        if not PROC.is_dir():
            return
        prefix = str(self.folder)
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:"):
                address = _unix_address(int(name))
                if prefix in address:
                    yield int(name), f"{target} {address}"
            elif target.startswith((prefix, "/memfd:")):
                yield int(name), target

    def snapshot(self) -> Snapshot:
        """What exists now."""
        return Snapshot(
            pids=frozenset(self._ours()),
            paths=self._paths(),
            fds=frozenset(self._fds()),
            threads=frozenset(thread.ident or 0 for thread in threading.enumerate()),
            connected=_connected(),
        )

    # -- what should not be

    def leftovers(self, before: Snapshot) -> Leftovers:
        """What exists now, did not exist `before`, and does not belong to something that did."""
        found = Leftovers()
        for pid, title in self._ours().items():
            if pid not in before.pids and not self._descends_from(pid, before.pids):
                found.processes[pid] = title
        found.paths = sorted(self._paths() - before.paths)
        if before.connected:
            return found
        if _connected():
            found.others.append("nbray is still initialised in the test process: call nbray.shutdown()")
        found.others += [f"descriptor {fd}: {target}" for fd, target in set(self._fds()) - before.fds]
        found.others += [
            f"thread {thread.name!r}"
            for thread in threading.enumerate()
            if thread.name.startswith("nbray") and thread.ident not in before.threads
        ]
        return found

    def wait(self, before: Snapshot, seconds: float) -> Leftovers:
        """Leftovers that outlive `seconds`; returns as soon as there are none."""
        found = self.leftovers(before)
        if not found:
            return found
        deadline = time.monotonic() + seconds
        # A view of shared memory may hang in a reference cycle of the test, an exception's traceback say.
        gc.collect()
        while (found := self.leftovers(before)) and (left := deadline - time.monotonic()) > 0:
            _wait_for_exit(found.processes, left if found.processes else min(left, 0.01))
        return found

    def remove(self, found: Leftovers) -> None:
        """End and delete leftovers, so that the next test starts clean."""
        if _connected() and found.others:
            with contextlib.suppress(Exception):
                sys.modules["nbray"].shutdown()
        for pid in found.processes:
            if pid in self._ours():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if found.processes:
            _wait_for_exit(found.processes, 2.0, every=True)
        for path in found.paths:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                Path(path).unlink(missing_ok=True)

    def forget_private(self) -> None:
        """Delete the folders of the test that has just been checked."""
        for path in self.private:
            shutil.rmtree(path, ignore_errors=True)
        self.private.clear()

    @staticmethod
    def _descends_from(pid: int, ancestors: frozenset[int]) -> bool:
        while pid > 1 and pid != os.getpid():
            if pid in ancestors:
                return True
            pid = _state_and_parent(pid)[1]
        return False


def _connected() -> bool:
    nbray = sys.modules.get("nbray")
    is_initialized = getattr(nbray, "is_initialized", None)
    return bool(is_initialized and is_initialized())


def _unix_address(fd: int) -> str:
    """Names of both ends of a Unix socket, as far as they have one; "" for any other descriptor."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return ""
        with socket.socket(fileno=os.dup(fd)) as end:
            if end.family != socket.AF_UNIX:
                return ""
            names = [end.getsockname()]
            with contextlib.suppress(OSError):
                names.append(end.getpeername())
    except OSError:
        return ""
    return " ".join(os.fsdecode(name) for name in names if name)


def _wait_for_exit(pids: dict[int, str], seconds: float, *, every: bool = False) -> None:
    """Wait until one (or `every`) of the processes has ended, `seconds` at most."""
    poll = select.poll()
    handles: list[int] = []
    try:
        for pid in pids:
            with contextlib.suppress(OSError):
                handles.append(os.pidfd_open(pid))
                poll.register(handles[-1], select.POLLIN)
        deadline = time.monotonic() + seconds
        waiting = len(handles)
        while True:
            ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            for handle, _ in ended:
                poll.unregister(handle)
            waiting -= len(ended)
            if not every or waiting <= 0 or not ended:
                return
    finally:
        for handle in handles:
            os.close(handle)
