"""What this machine allows: the bare star and the copy into warm shared pages, with nothing else in the way.

The star is driver -> node -> worker -> node -> driver over Unix sockets with msgspec frames and an epoll loop: no errors,
references, events or resources. nbray's one-at-a-time tasks are measured against it, its `put` of a large array against the copy.

Run: `python -m benchmarks.limit`
"""

import argparse
import itertools
import json
import mmap
import os
import pickle
import select
import signal
import socket
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

DEPTHS = (1, 2, 16)
WORKERS = 2

ENCODE = msgspec.msgpack.Encoder().encode
DECODE = msgspec.msgpack.Decoder().decode
LENGTH = struct.Struct("<I")


class Connection:
    """Frames over one stream socket: u32 little-endian length, then a msgpack body."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""
        self._out: list[bytes] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> list[Any]:
        """All whole messages of one `recv`. Raises EOFError when the other side has closed."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise EOFError
        data = self._rest + data
        view = memoryview(data)
        at, messages = 0, []
        while len(data) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(data, at)
            end = at + LENGTH.size + size
            if end > len(data):
                break
            messages.append(DECODE(view[at + LENGTH.size : end]))
            at = end
        self._rest = data[at:]
        return messages

    def queue(self, message: Sequence[Any]) -> None:
        body = ENCODE(message)
        self._out += LENGTH.pack(len(body)), body

    def flush(self) -> None:
        if self._out:
            self.sock.sendall(b"".join(self._out))
            self._out.clear()


def work(node: Connection) -> None:
    """A worker: unpickle the arguments, call, pickle the result, for ever."""
    while True:
        for task, arguments in node.receive():
            positional, keyword = pickle.loads(arguments)
            node.queue((task, pickle.dumps(_ok(*positional, **keyword), 5)))
        node.flush()


def schedule(driver: Connection, workers: list[Connection], depth: int) -> None:
    """A node: hands each worker at most `depth` tasks ahead and passes results on, for ever."""
    poll, load, waiting = select.epoll(), dict.fromkeys(workers, 0), deque[Any]()
    by_fd = {connection.fileno(): connection for connection in (driver, *workers)}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    while True:
        for fd, _ in poll.poll():
            source = by_fd[fd]
            messages = source.receive()
            if source is driver:
                waiting.extend(messages)
            else:
                load[source] -= len(messages)
                for message in messages:
                    driver.queue(message)
        for worker in workers:
            while waiting and load[worker] < depth:
                worker.queue(waiting.popleft())
                load[worker] += 1
            worker.flush()
        driver.flush()


def measure(depth: int, tasks: int = 20_000) -> tuple[float, float]:
    """(round trips per second one at a time, tasks per second in batches of 1,000) with `depth` tasks ahead per worker."""
    ours, theirs = socket.socketpair()
    pairs = [socket.socketpair() for _ in range(WORKERS)]
    pids = [_fork(work, Connection(far)) for _, far in pairs]
    pids.append(_fork(schedule, Connection(theirs), [Connection(near) for near, _ in pairs], depth))
    node, counter = Connection(ours), itertools.count()
    done: dict[bytes, bytes] = {}

    def submit() -> bytes:
        task = next(counter).to_bytes(16, "little")
        node.queue((task, pickle.dumps(((), {}), 5)))
        return task

    def get(task: bytes) -> Any:
        while task not in done:
            node.flush()
            done.update(node.receive())
        return pickle.loads(done.pop(task))

    try:
        for _ in range(500):
            get(submit())
        trips = max(tasks // 7, 1)
        start = time.perf_counter()
        for _ in range(trips):
            get(submit())
        one = trips / (time.perf_counter() - start)
        batches = max(tasks // 1_000, 1)
        start = time.perf_counter()
        for _ in range(batches):
            for task in [submit() for _ in range(1_000)]:
                get(task)
        many = batches * 1_000 / (time.perf_counter() - start)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for sock in (ours, theirs, *itertools.chain.from_iterable(pairs)):
            sock.close()
    return one, many


def copy_bandwidth(size: int = 100_000_000, copies: int = 10) -> float:
    """GB/s (10^9 bytes) of copying a touched array of `size` bytes into memfd pages that this process has touched before: median."""
    fd = os.memfd_create("limit")
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size, mmap.MAP_SHARED) as shared:
            source, target = np.ones(size, np.uint8), np.frombuffer(shared, np.uint8)
            target[:] = 0
            seconds = []
            for _ in range(copies):
                start = time.perf_counter()
                np.copyto(target, source)
                seconds.append(time.perf_counter() - start)
            # A mapping with a live view cannot be closed.
            del target
    finally:
        os.close(fd)
    return size / statistics.median(seconds) / 1e9


def star(tasks: int = 20_000) -> dict[str, float]:
    """`round trips` (1/s, median over the depths, which do not matter for it) and `tasks` (1/s, best depth)."""
    pairs = [measure(depth, tasks) for depth in DEPTHS]
    return {
        "round trips": statistics.median(one for one, _ in pairs),
        "tasks": max(many for _, many in pairs),
    }


def _ok() -> bytes:
    return b"ok"


def _fork(run: Callable[..., None], *args: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run(*args)
        except (EOFError, KeyboardInterrupt, ConnectionError):
            pass
        finally:
            os._exit(0)
    return pid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks per depth (default 20000)")
    parser.add_argument("--json", choices=["star", "copy"], help="only that, as one JSON object")
    options = parser.parse_args()
    if options.json:
        figures = star(options.tasks) if options.json == "star" else {"warm copy": copy_bandwidth()}
        print(json.dumps(figures))
        return
    for depth in DEPTHS:
        one, many = measure(depth, options.tasks)
        print(
            f"prefetch depth {depth:2}: {one:9,.0f} round trips/s, {many:9,.0f} tasks/s in batches of 1,000"
        )
    print(f"copy of 100 MB into warm shared pages: {copy_bandwidth():.1f} GB/s")


if __name__ == "__main__":
    main()
