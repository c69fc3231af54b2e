"""The node's disk work, in one helper thread: objects to spill files and back. The loop only queues and collects."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbray import platform
from nbray.node.names import Save
from nbray.store import saved
from nbray.store.memory import SharedMemory
from nbray.store.spill import SpillFiles

if TYPE_CHECKING:
    from nbray.node.machine import NodeConfig


class Disk:
    """``wake`` is readable when `finished` has something to say."""

    def __init__(self, directory: str, memory: SharedMemory) -> None:
        self._memory = memory
        self._files = SpillFiles(directory, memory)
        self._pool: ThreadPoolExecutor | None = None
        self._finished: deque[tuple[str, bytes, str]] = deque()
        self._lock = threading.Lock()
        self.wake, self._waker = platform.pipe(blocking=False)

    def spill(self, object_id: bytes, offset: int, size: int) -> None:
        self._submit("spill", object_id, offset, size)

    def restore(self, object_id: bytes, offset: int, size: int) -> None:
        self._submit("restore", object_id, offset, size)

    def save(self, effect: Save, config: NodeConfig) -> None:
        """Write a value where it outlives the cluster."""
        self._queue(self._save, effect, config)

    def delete(self, object_id: bytes) -> None:
        self._submit("delete", object_id, 0, 0)

    def finished(self) -> list[tuple[str, bytes, str]]:
        """What has been done since the last call: ("spill", "restore" or "save", object id, error text or "")."""
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            pass
        done = []
        while self._finished:
            done.append(self._finished.popleft())
        return done

    def _submit(self, what: str, object_id: bytes, offset: int, size: int) -> None:
        self._queue(self._work, what, object_id, offset, size)

    def _queue(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "nbray-disk")
        self._pool.submit(work, *arguments)

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
        self._report(what, object_id, error)

    def _report(self, what: str, object_id: bytes, error: str) -> None:
        self._finished.append((what, object_id, error))
        try:
            os.write(self._waker, b"x")
        except BlockingIOError:
            pass

    def _save(self, effect: Save, config: NodeConfig) -> None:
        error = ""
        try:
            with self._opened(effect) as source:
                place = saved.folder(config.data, effect.session)
                path = os.path.join(place, effect.object.hex() + saved.SUFFIX)
                # A sealed value never changes, and who asked for it to be kept may not have asked for it to go.
                kept = effect.kept or saved.is_kept(path)
                crc = saved.checksum(source, effect.offset, effect.size)
                header = saved.Header(
                    effect.session, effect.names, effect.kind, effect.size, crc, kept, config.name,
                    config.details.get("python", ""), time.time(),
                )  # fmt: skip
                saved.write(path, header, source, effect.offset)
            saved.supersede(config.data, header, path)
        except Exception as problem:  # noqa: BLE001  (whatever it is, the value is not saved)
            error = str(problem) or type(problem).__name__
        self._report("save", effect.object, error)

    @contextmanager
    def _opened(self, effect: Save) -> Iterator[int]:
        """A file that has the value's bytes at ``effect.offset``."""
        if effect.data is not None:
            with tempfile.TemporaryFile() as file:
                file.write(effect.data)
                file.flush()
                yield file.fileno()
        elif effect.spilled:
            with open(self._files.path(effect.object), "rb") as file:
                yield file.fileno()
        else:
            yield self._memory.fd

    def expire(self, directory: str) -> None:
        """Remove saved values that nobody has come back for."""
        self._queue(saved.expire, directory)

    def close(self) -> None:
        """Forget all spilled objects."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        os.close(self.wake)
        os.close(self._waker)
