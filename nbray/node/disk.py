"""The node's disk work, in one helper thread: objects to spill files and back. The loop only queues and collects."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from nbray import platform
from nbray.store.memory import SharedMemory
from nbray.store.spill import SpillFiles


class Disk:
    """``wake`` is readable when `finished` has something to say."""

    def __init__(self, directory: str, memory: SharedMemory) -> None:
        self._files = SpillFiles(directory, memory)
        self._pool: ThreadPoolExecutor | None = None
        self._finished: deque[tuple[str, bytes, str]] = deque()
        self._lock = threading.Lock()
        self.wake, self._waker = platform.pipe(blocking=False)

    def spill(self, object_id: bytes, offset: int, size: int) -> None:
        self._submit("spill", object_id, offset, size)

    def restore(self, object_id: bytes, offset: int, size: int) -> None:
        self._submit("restore", object_id, offset, size)

    def delete(self, object_id: bytes) -> None:
        self._submit("delete", object_id, 0, 0)

    def finished(self) -> list[tuple[str, bytes, str]]:
        """What has been done since the last call: ("spill" or "restore", object id, error text or "")."""
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            pass
        done = []
        while self._finished:
            done.append(self._finished.popleft())
        return done

    def _submit(self, what: str, object_id: bytes, offset: int, size: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "nbray-disk")
        self._pool.submit(self._work, what, object_id, offset, size)

    def _work(self, what: str, object_id: bytes, offset: int, size: int) -> None:
        error = ""
        try:
            if what == "spill":
                self._files.spill(object_id, offset, size)
            elif what == "restore":
                self._files.restore(object_id, offset, size)
            else:
                self._files.delete(object_id)
                return
        except Exception as problem:  # noqa: BLE001  (whatever it is becomes the error of who waits for the object)
            error = str(problem) or type(problem).__name__
        self._finished.append((what, object_id, error))
        try:
            os.write(self._waker, b"x")
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Forget all spilled objects."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        os.close(self.wake)
        os.close(self._waker)
