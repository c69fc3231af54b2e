"""Real head processes for the tests, and a node's side that talks to them over the socket."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nbray.events import FINISHED, Page, TaskEvent
from nbray.gcs.client import GcsClient, Settled
from nbray.gcs.messages import PROTOCOL, HeadToNode, NodeToHead, Operation, RegisterNode
from nbray.transport.frames import FrameReader, encode_frame

CLUSTER = b"cluster-of-tests"
PATIENCE = 30.0


def task_event(number: int, name: str = "work", state: int = FINISHED, **fields: Any) -> TaskEvent:
    """The record of task ``number``; equal numbers give equal records."""
    start = float(number)
    values: dict[str, Any] = {
        "task": number.to_bytes(16, "little"),
        "name": name,
        "kind": 0,
        "state": state,
        "attempt": 0,
        "pid": 4711,
        "job": 1,
        "session": "notebook",
        "cell": "cell-1",
        "function": b"f" * 16,
        "parent": b"d" * 12,
        "actor": b"",
        "deps": None,
        "returns": 1,
        "size": 5,
        "error": "",
        "submitted": start + 1.0,
        "inputs_ready": start + 2.0,
        "dispatched": start + 4.0,
        "started": start + 7.0,
        "finished": start + 11.0,
        "sealed": start + 16.0,
    }
    return TaskEvent(**(values | fields))


def number_of(event: TaskEvent) -> int:
    return int.from_bytes(event.task, "little")


class HeadProcess:
    """A head process of a directory; can be killed and started again."""

    def __init__(self, directory: Path, *options: str, life: bool = False) -> None:
        self.directory = directory
        self.database = directory / "gcs.sqlite"
        self.log = directory / "head.log"
        self._options = options
        self._life = life
        self.life_writer = -1
        self.process: subprocess.Popen[bytes] = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        reader, writer = os.pipe()
        passed = [writer]
        options = list(self._options)
        if self._life:
            life_reader, self.life_writer = os.pipe()
            passed.append(life_reader)
            options += ["--life-fd", str(life_reader)]
        command = [
            sys.executable,
            "-P",
            "-m",
            "nbray.gcs.server",
            "--dir",
            str(self.directory),
            "--database",
            str(self.database),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(writer), *options],
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=passed,
                start_new_session=True,
            )
        for fd in passed:
            os.close(fd)
        ready = os.read(reader, 1)
        os.close(reader)
        if ready != b"R":
            self.process.wait(PATIENCE)
        return self.process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.life_writer >= 0:
            os.close(self.life_writer)
        for path in self.directory.iterdir():
            path.unlink()


class NodeSide:
    """The I/O of a node around `GcsClient`: a blocking little loop with one connection."""

    def __init__(
        self,
        directory: Path,
        node: str = "node-a",
        incarnation: int = 1,
        cluster: bytes = CLUSTER,
        **options: Any,
    ) -> None:
        self.registration = RegisterNode(
            PROTOCOL, node, incarnation, os.getpid(), cluster, {"CPU": 20000}, time=1.0
        )
        self.client = GcsClient(self.registration, **{"interval": 0.0, **options})
        self.settled: dict[Any, Settled] = {}
        self._path = directory / "head.sock"
        self._sock: socket.socket | None = None
        self._out = b""
        self._reader: FrameReader[HeadToNode] = FrameReader(HeadToNode)

    def connect(self) -> None:
        self.disconnect()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(self._path))
        self._sock.setblocking(False)
        self._reader = FrameReader(HeadToNode)
        self._out = encode_frame(self.client.connected())

    def disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self.client.disconnected()

    close = disconnect

    @property
    def unsent(self) -> int:
        return len(self._out)

    def step(self, timeout: float = 0.0) -> bool:
        """Send and receive once; False when the head has closed the connection."""
        assert self._sock is not None
        messages = self.client.output(time.monotonic())
        if messages:
            self._out += encode_frame(messages)
        readable, writable, _ = select.select([self._sock], [self._sock] if self._out else [], [], timeout)
        try:
            if writable:
                self._out = self._out[self._sock.send(self._out) :]
            data = self._sock.recv(1 << 18) if readable else None
        except ConnectionError:
            data = b""
        if data == b"":
            self.disconnect()
            return False
        for settled in self.client.receive(self._reader.feed(data) if data else []):
            self.settled[settled.context] = settled
        return True

    def send(self, message: NodeToHead) -> None:
        """Put a message of the test's own behind what is to be sent."""
        self._out += encode_frame([message])

    def until(self, done: Callable[[], bool]) -> None:
        """Run the loop until this holds; fails the test when the connection ends or it takes too long."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"nothing came in {PATIENCE} s"
            assert self.step(0.05), "the head closed the connection"

    def register(self) -> NodeSide:
        self.connect()
        self.until(lambda: self.client.registered or bool(self.client.refused))
        return self

    def operate(self, operation: Operation) -> Settled:
        context = object()
        self.client.operate(operation, time.monotonic(), context)
        self.until(lambda: context in self.settled)
        return self.settled.pop(context)

    def query(self, what: str, argument: object = None) -> Settled:
        context = object()
        data = (
            argument
            if isinstance(argument, bytes)
            else b""
            if argument is None
            else msgspec.msgpack.encode(argument)
        )
        self.client.query(what, data, time.monotonic(), context)
        self.until(lambda: context in self.settled)
        return self.settled.pop(context)

    def page(self, what: str, **argument: Any) -> Page:
        settled = self.query(what, argument or None)
        assert settled.page is not None, settled
        return settled.page

    def tasks(self, **argument: Any) -> list[TaskEvent]:
        return [
            e
            for _, blob in self.page("tasks", **argument).history
            for e in msgspec.msgpack.decode(blob, type=list[TaskEvent])
        ]

    def write_all(self) -> None:
        """Until everything appended is acknowledged."""
        self.until(lambda: not self.client.backlog and not self.client.tasks and not self.client.facts)
