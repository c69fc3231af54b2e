"""What a node starts: the head of its host and the zygote that forks the workers.

Both end with the node: each has the read end of a pipe whose other end only the node holds (and the zygote's workers die with their parent).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING

from nbray import platform
from nbray.clusters import Paths, python_command
from nbray.worker.zygote_protocol import MESSAGE, decode, encode_fork

if TYPE_CHECKING:
    from nbray.node.machine import NodeConfig


class Children:
    """The head and the zygote of a node."""

    def __init__(self, paths: Paths, arena: int, config: NodeConfig) -> None:
        self._paths = paths
        self._arena = arena
        self._config = config
        self._life_read, self._life_write = os.pipe2(os.O_CLOEXEC)
        self._start_zygote()
        self._start_head()

    # -- the zygote

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told = {"socket": theirs.fileno(), "arena": self._arena, "span": self._config.span, "node": self._config.node, "log": self._paths.log}
        os.set_inheritable(self._arena, True)
        self.zygote_process = self._spawn(python_command("nbray.worker.zygote", json.dumps(told)), [theirs.fileno(), self._arena])
        os.set_inheritable(self._arena, False)
        theirs.close()
        ours.setblocking(False)
        self.zygote = ours

    def restart_zygote(self) -> None:
        self.zygote.close()
        self.zygote_process.kill()
        self.zygote_process.wait()
        self._start_zygote()

    def fork(self, number: int, sock: socket.socket, fds: list[int]) -> None:
        """Have a worker forked with these descriptors (its end of the connection, token pipe, interrupt pipe, life pipe); they are closed here."""
        try:
            socket.send_fds(self.zygote, [encode_fork(number)], [sock.fileno(), *fds])
        except BlockingIOError:
            self.zygote.setblocking(True)
            socket.send_fds(self.zygote, [encode_fork(number)], [sock.fileno(), *fds])
            self.zygote.setblocking(False)
        except OSError:
            pass  # The zygote is gone; its end-of-file starts another one, and this worker is reported as ended.
        sock.close()
        for fd in fds:
            os.close(fd)

    def zygote_messages(self) -> list[tuple[str, int, int, int]]:
        """What the zygote reports: ("forked" or "exited" or "gone", worker, pid, wait status)."""
        found = []
        while True:
            try:
                data = self.zygote.recv(MESSAGE.size)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                found.append(("gone", 0, 0, 0))
                return found
            found.append(decode(data))

    # -- the head

    def _start_head(self) -> None:
        self.head_process = self._spawn(
            python_command(
                "nbray.gcs.server", "--dir", self._paths.directory, "--database", self._paths.database, "--life-fd", str(self._life_read)
            ),
            [self._life_read],
        )
        self.head_watch = platform.process_descriptor(self.head_process.pid)

    def restart_head(self) -> None:
        """After it has ended."""
        if self.head_watch is not None:
            os.close(self.head_watch)
        self.head_process.wait()
        self._start_head()

    def _spawn(self, command: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
        with open(self._paths.log, "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds, start_new_session=True, cwd="/")

    # -- the end

    def close(self) -> None:
        """End both and wait for them."""
        os.close(self._life_write)
        self.zygote.close()
        for process in (self.zygote_process, self.head_process):
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(self._life_read)
