"""What a node starts: the head of its host and the zygote that forks the workers.

Both end with the node: the head has the read end of a pipe and the zygote a socket whose other ends only the node holds. When the zygote ends before the
node, its workers are ended by the kernel and become children of the node, which ends what they have started and reaps it all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time

from nbray import config, platform
from nbray.clusters import Paths, python_command
from nbray.worker.zygote_protocol import MESSAGE, decode, encode_fork, encode_retire, encode_signal

END_SECONDS = 2.0
"""Seconds that head and zygote have for ending by themselves."""


class Children:
    """The head and the zygote of a node."""

    def __init__(self, paths: Paths, arena: int, span: int, node: str, cluster: bytes) -> None:
        """``arena``: descriptor of the store's memory, ``span`` bytes; ``node``, ``cluster``: ids."""
        self._paths = paths
        self._arena = arena
        self._span = span
        self._node = node
        self._cluster = cluster
        self._life_read, self._life_write = platform.pipe(blocking=True)
        self._retired: dict[socket.socket, subprocess.Popen[bytes]] = {}
        """Zygotes of before an installation, which end with their last worker."""
        self.head_watch: int | None = None
        """Readable when the head has ended."""
        platform.adopt_orphans()
        self._start_zygote()
        self.start_head()

    # -- the zygote

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told = {
            "socket": theirs.fileno(),
            "arena": self._arena,
            "span": self._span,
            "cluster": self._cluster.hex(),
            "node": self._node,
            "log": self._paths.log,
        }
        # With the same hashes of text in all workers, also of another zygote or of a later run with the same seed, sets have the same order.
        hashes = str(int.from_bytes(self._cluster[:4], "little"))
        self.zygote_process = self._spawn(
            python_command("nbray.worker.zygote", json.dumps(told)),
            [theirs.fileno(), self._arena],
            {"PYTHONHASHSEED": hashes} | config.child_environment(),
        )
        theirs.close()
        ours.setblocking(False)
        self.zygote = ours

    def start_zygote(self) -> None:
        """Start another one after the last has ended."""
        self._start_zygote()

    def renew_zygote(self) -> None:
        """Start another one for the workers to come; this one goes on for those that it has forked."""
        self._tell(encode_retire(), [])
        self._retired[self.zygote] = self.zygote_process
        self._start_zygote()

    def zygote_ended(self, zygote: socket.socket, workers: list[int]) -> None:
        """A zygote, this one or a retired one, has ended: reap it, its workers (these pids) and what they have left behind."""
        process = self._retired.pop(zygote, self.zygote_process)
        zygote.close()
        process.kill()
        process.wait()
        self._reap_orphans(workers)

    def _reap_orphans(self, workers: list[int]) -> None:
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            ours = {
                process.pid for process in (self.head_process, self.zygote_process, *self._retired.values())
            }
            orphans = [pid for pid in platform.children_of_this_process() if pid not in ours]
            if not orphans:
                return
            for pid in orphans:
                # A child that is not reaped keeps its number, so this can hit nobody else.
                for end in (os.killpg, os.kill) if pid in workers else (os.kill,):
                    try:
                        end(pid, signal.SIGKILL)
                    except (ProcessLookupError, PermissionError):
                        continue
                    break
            for pid in orphans:
                try:
                    os.waitpid(pid, 0)
                except ChildProcessError:
                    pass

    def fork(self, number: int, sock: socket.socket, fds: list[int]) -> None:
        """Have a worker forked with these descriptors (its end of the connection, token pipe, interrupt pipe, life pipe); they are closed here."""
        self._tell(encode_fork(number), [sock.fileno(), *fds])
        sock.close()
        for fd in fds:
            os.close(fd)

    def signal(self, number: int, what: int, *, group: bool) -> None:
        """Send a signal to a worker or its process group, if it has not ended."""
        packet = encode_signal(number, what, group=group)
        self._tell(packet, [])
        for zygote in self._retired:
            # Only the one that has forked it knows its number.
            self._tell(packet, [], zygote)

    def _tell(self, packet: bytes, fds: list[int], zygote: socket.socket | None = None) -> None:
        zygote = zygote or self.zygote
        try:
            try:
                socket.send_fds(zygote, [packet], fds)
            except BlockingIOError:
                zygote.setblocking(True)
                socket.send_fds(zygote, [packet], fds)
                zygote.setblocking(False)
        except OSError:
            pass  # The zygote is gone; its end-of-file starts another one, and its workers are reported as ended.

    def zygote_messages(self, zygote: socket.socket) -> list[tuple[str, int, int, int]]:
        """What a zygote reports: ("forked" or "exited" or "gone", worker, pid, wait status)."""
        found: list[tuple[str, int, int, int]] = []
        while True:
            try:
                data = zygote.recv(MESSAGE.size)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                found.append(("gone", 0, 0, 0))
                return found
            found.append(decode(data))

    # -- the head

    def start_head(self) -> None:
        self.head_process = self._spawn(
            python_command(
                "nbray.gcs.server",
                "--dir",
                self._paths.directory,
                "--database",
                self._paths.database,
                "--life-fd",
                str(self._life_read),
            ),
            [self._life_read],
        )
        self.head_watch = platform.process_descriptor(self.head_process.pid)

    def head_ended(self) -> bool:
        """Whether the head is gone; if so it is reaped, and `start_head` may be called."""
        if self.head_process.poll() is None:
            return False
        if self.head_watch is not None:
            os.close(self.head_watch)
            self.head_watch = None
        return True

    def _spawn(
        self, command: list[str], fds: list[int], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with open(self._paths.log, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                start_new_session=True,
                cwd="/",
            )

    # -- the end

    def close(self, *, workers: bool) -> None:
        """End both, with the workers if there may be any, and wait for them."""
        os.close(self._life_write)
        for zygote in (self.zygote, *self._retired):
            zygote.close()
        if not workers:
            # It may still import what its first worker would need.
            self.zygote_process.kill()
        deadline = time.monotonic() + END_SECONDS
        for process in (self.zygote_process, *self._retired.values(), self.head_process):
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._reap_orphans([])
        os.close(self._life_read)
        if self.head_watch is not None:
            os.close(self.head_watch)
            self.head_watch = None
