"""The zygote: a process that has imported what workers need and forks them in 2 ms (design section 3).

Single-threaded when it forks, and it uses nothing it has imported: no thread pool, no random state, no Arrow memory is inherited. It reaps its
workers and reports how they ended, and ends with its node.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any

BLAS_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS",
)  # fmt: skip
WORKER_FDS = 6


def _import_ahead() -> None:
    """What nearly every worker needs. BLAS libraries size their thread pools at import: one thread here, the task's number after the fork."""
    chosen = {name: os.environ.get(name) for name in BLAS_VARIABLES}
    for name in BLAS_VARIABLES:
        os.environ[name] = "1"
    import cloudpickle
    import msgspec
    import numpy
    import numpy.random

    import nbray.api.actor
    import nbray.api.failures
    import nbray.api.functions
    import nbray.worker.main

    _ = cloudpickle, msgspec, numpy, nbray
    for name, value in chosen.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Zygote:
    """Forks on request until the node's socket closes."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.node = socket.socket(fileno=told["socket"])
        self.workers: dict[int, int] = {}
        self.wake_read, self.wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.node, select.POLLIN)
        poll.register(self.wake_read, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.wake_read:
                    os.read(self.wake_read, 4096)
                    self._reap()
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        from nbray.worker.zygote_protocol import MESSAGE, decode_fork, encode_forked

        data, fds, _, _ = socket.recv_fds(self.node, MESSAGE.size, WORKER_FDS)
        if not data:
            return False
        number = decode_fork(data)
        pid = os.fork()
        if pid == 0:
            self._become_worker(number, fds)
        try:
            os.setpgid(pid, pid)
        except OSError:
            pass  # The child has done it, or is gone.
        for fd in fds:
            os.close(fd)
        self.workers[pid] = number
        self.node.send(encode_forked(number, pid))
        return True

    def _become_worker(self, number: int, fds: list[int]) -> None:
        from nbray.worker.main import run_worker

        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            self.node.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            status = run_worker(number, fds, self.told, os.getppid())
        except BaseException:
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
            try:
                # What the worker's code has started ends with it; while the worker is a zombie its group's number cannot be another's.
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            _, status = os.waitpid(pid, 0)
            number = self.workers.pop(pid, None)
            if number is not None:
                self.node.send(encode_exited(number, pid, status))


def main() -> None:
    """Entry point: ``python -P -m nbray.worker.zygote``, told what it is by a JSON object in argv[1]."""
    told = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from nbray import platform

    platform.set_process_title("nbray zygote")
    platform.set_parent_death_signal(signal.SIGKILL)
    _import_ahead()
    gc.collect()
    gc.freeze()
    Zygote(told).run()



if __name__ == "__main__":
    main()
