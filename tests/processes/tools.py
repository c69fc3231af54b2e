"""Looking at, waiting for and ending the processes of a cluster."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 30.0
"""Seconds until a test gives up waiting; the machine may be busy with something else."""

REPOSITORY = Path(__file__).resolve().parents[2]


def until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE) -> Any:
    """Wait until ``condition()`` is true; its value."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {seconds:g} s: {what or getattr(condition, '__name__', condition)}"
            )
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def wait_ended(pid: int, seconds: float = PATIENCE) -> float:
    """Wait for the end of a process; seconds that took."""
    started = time.monotonic()
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0.0
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise AssertionError(f"process {pid} ({title(pid)}) has not ended within {seconds:g} s")
    finally:
        os.close(watch)
    return time.monotonic() - started


def title(pid: int) -> str:
    """What ``ps`` shows; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Pids of the direct children."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except OSError:
        pass
    return found


def descendants(pid: int) -> list[int]:
    """Pids of children, their children, ..."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def node_of(nbray: Any) -> int:
    """Pid of the node that this process is connected to."""
    from nbray.api import context

    return int(context.require().engine.details()["node_pid"])


def daemons(node: int) -> dict[str, int]:
    """Pids of a node's "nbray head" and "nbray zygote"."""
    return {name: pid for pid in children(node) if (name := title(pid)).startswith("nbray ")}


def daemon(node: int, name: str) -> int:
    """The pid of "head" or "zygote", once it is there."""
    return int(until(lambda: daemons(node).get(f"nbray {name}"), f"the {name} runs"))


def workers(node: int) -> list[int]:
    """Pids of the workers of a node."""
    return children(daemon(node, "zygote"))


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def sockets_listening_on_tcp(pids: list[int]) -> list[str]:
    """What of these processes listens on TCP."""
    inodes = set()
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(line)
    return found


class Script:
    """A Python program in a process of its own, talked to by lines."""

    def __init__(
        self,
        path: Path,
        code: str,
        *arguments: str,
        cwd: Path | None = None,
        variables: Mapping[str, str | None] | None = None,
        python: Path | None = None,
        **more: str,
    ) -> None:
        path.write_text(PRELUDE + code)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **more}
        for name, value in (variables or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        self.process = subprocess.Popen(
            [str(python or sys.executable), str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd or path.parent,
            env=environment,
        )
        self.output = b""
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, prefix: str, seconds: float = PATIENCE) -> str:
        """The rest of the next line that begins with ``prefix``."""
        deadline = time.monotonic() + seconds
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                text = line.decode(errors="replace")
                if text.startswith(prefix):
                    return text[len(prefix) :].strip()
                continue
            if not self._read(deadline):
                raise AssertionError(
                    f"no line {prefix!r} within {seconds:g} s; the output:\n{self.output.decode(errors='replace')}"
                )

    def _read(self, deadline: float) -> bool:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        data = os.read(fd, 1 << 16)
        self.output += data
        self._rest += data
        return bool(data)

    def say(self, text: str) -> None:
        """A line for its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def end(self, seconds: float = PATIENCE) -> str:
        """Wait until it has ended; all that it has written."""
        assert self.process.stdout is not None and self.process.stdin is not None
        deadline = time.monotonic() + seconds
        self.process.stdin.close()
        while self._read(deadline):
            pass
        self.process.wait(max(deadline - time.monotonic(), 0.1))
        return self.output.decode(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass


PRELUDE = """
import os, signal, sys, time
import nbray

def hear():
    line = sys.stdin.readline()
    if not line:
        os._exit(9)
    return line.strip()

def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
"""


@contextmanager
def script(
    path: Path,
    code: str,
    *arguments: str,
    cwd: Path | None = None,
    variables: Mapping[str, str | None] | None = None,
    python: Path | None = None,
    **more: str,
) -> Iterator[Script]:
    """A `Script` that is ended with the block. ``variables`` of its environment: None is one that it does not have; ``more`` of them."""
    running = Script(path, code, *arguments, cwd=cwd, variables=variables, python=python, **more)
    try:
        yield running
    finally:
        running.kill()
