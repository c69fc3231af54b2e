"""The zygote: a process that has imported what workers need and forks them in 2 ms (design section 3).

Single-threaded when it forks, and it uses nothing it has imported: no thread pool, no random state, no Arrow memory is inherited. It reaps its
workers and reports how they ended. When it ends, the kernel ends the workers and their process groups. When packages are installed, another zygote takes its place and it ends with its last worker. When its node has ended, so do the workers and all that they have started, then the zygote.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the functions behind ``signal``: those make enums, which costs each worker memory pages
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from nbray import platform

BLAS_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS",
)  # fmt: skip
WORKER_FDS = 6
_SIGCHLD = int(signal.SIGCHLD)

END_SECONDS = 2.0
"""Seconds for which a zygote that ends waits for what it has killed."""


def _import_ahead() -> None:
    """What every worker needs."""
    import cloudpickle
    import msgspec

    import nbray.api.actor
    import nbray.api.failures
    import nbray.api.functions
    import nbray.store.classes
    import nbray.worker.main

    _ = cloudpickle, msgspec, nbray


def _import_numeric() -> None:
    """What most workers need, but none needs to start. BLAS libraries size their thread pools at import: one thread here, the task's number after the fork."""
    chosen = {name: os.environ.get(name) for name in BLAS_VARIABLES}
    for name in BLAS_VARIABLES:
        os.environ[name] = "1"
    import numpy as np
    import numpy.random

    _ = np
    for name, value in chosen.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Zygote:
    """Forks on request until the node's socket closes."""

    def __init__(self, told: dict[str, Any]) -> None:
        from nbray.worker.main import Common, run_worker

        self.run_worker = run_worker
        self.common = Common(told)
        self.node = socket.socket(fileno=told["socket"])
        self.pids: dict[int, int] = {}
        """Worker -> pid, of those that are not reaped."""
        self.numbers: dict[int, int] = {}
        self.complete = False
        """Whether all is imported. The first worker is forked before: what it runs may not need the rest, and imports it if it does."""
        self.retired = False
        """Whether another zygote forks the workers from now on."""
        self.life_read, self.life_write = platform.pipe(blocking=True)
        """Only this process holds the second one: the first says when it has ended."""
        self.wake_read, self.wake_write = platform.pipe(blocking=False)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.node, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == self.wake_read:
                        os.read(self.wake_read, 4096)
                        self._reap()
                    elif not self._serve():
                        return
                if self.pids and not self.complete:
                    self._complete()
                if self.retired and not self.pids:
                    return
        except (BrokenPipeError, ConnectionResetError):
            return  # The node has ended between two packets.
        finally:
            self._end_all()

    def _complete(self) -> None:
        self.complete = True
        _import_numeric()
        self.common.inherit()
        gc.collect()
        gc.freeze()

    def _serve(self) -> bool:
        from nbray.worker.zygote_protocol import FORK, MESSAGE, RETIRE, decode_order

        data, fds, _, _ = socket.recv_fds(self.node, MESSAGE.size, WORKER_FDS)
        if not data:
            return False
        kind, number, sent, group = decode_order(data)
        if kind == FORK:
            self._fork(number, fds)
        elif kind == RETIRE:
            self.retired = True
        elif (pid := self.pids.get(number)) is not None:
            _send_signal(pid, sent, group)
        return True

    def _fork(self, number: int, fds: list[int]) -> None:
        from nbray.worker.zygote_protocol import encode_exited, encode_forked

        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            # Too many processes, or no memory: the node tries again later.
            sys.stderr.write(f"no worker could be forked: {error}\n")
            pid = -1
        if pid == 0:
            self._become_worker(number, fds, parent)
        for fd in fds:
            os.close(fd)
        if pid < 0:
            self.node.send(encode_exited(number, 0, 1 << 8))
            return
        try:
            os.setpgid(pid, pid)
        except OSError:
            pass  # The child has done it, or is gone.
        self.pids[number] = pid
        self.numbers[pid] = number
        self.node.send(encode_forked(number, pid))

    def _become_worker(self, number: int, fds: list[int], parent: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            _signal.signal(_SIGCHLD, _signal.SIG_DFL)
            os.setpgid(0, 0)
            platform.end_group_with(self.life_read)
            os.close(self.life_write)
            os.close(self.life_read)
            os.close(self.node.detach())
            os.close(self.wake_read)
            os.close(self.wake_write)
            status = self.run_worker(number, fds, self.common, parent)
        except BaseException:  # noqa: BLE001  (it goes to the log; a child must never return into the zygote's loop)
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        from nbray.worker.zygote_protocol import encode_exited

        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            number = self.numbers.pop(pid, None)
            if number is None:
                # Something that a worker had started and that has outlived it.
                os.waitpid(pid, 0)
                continue
            # What the worker's code has started ends with it; while the worker is a zombie its group's number cannot be another's.
            _send_signal(pid, signal.SIGKILL, True)
            _, status = os.waitpid(pid, 0)
            del self.pids[number]
            self.node.send(encode_exited(number, pid, status))

    def _end_all(self) -> None:
        """End the workers and whatever they have started, also what has left their process groups: it comes to us when its parent ends."""
        for pid in self.pids.values():
            _send_signal(pid, signal.SIGKILL, True)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            for pid in platform.children_of_this_process():
                _send_signal(pid, signal.SIGKILL, pid in self.numbers)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _send_signal(pid: int, number: int, group: bool) -> None:
    """Signal a child, or its group; a child that does not lead its group yet is signalled alone."""
    for send in (os.killpg, os.kill) if group else (os.kill,):
        try:
            send(pid, number)
        except (ProcessLookupError, PermissionError):
            continue
        return


def main(argv: Sequence[str]) -> None:
    """Be a zygote, told what it is by a JSON object in ``argv[0]``."""
    gc.disable()
    told = json.loads(argv[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    platform.set_process_title("nbray zygote")
    platform.adopt_orphans()
    _import_ahead()
    zygote = Zygote(told)
    gc.freeze()
    zygote.run()
