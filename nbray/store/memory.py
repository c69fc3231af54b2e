"""The memory of a node's object store as one process sees it: one shared mapping, views that pin, private copies on write.

A process maps the whole (sparse) file once. A value is read through a *pinned* view: a read-only memoryview whose underlying object calls
back when the last view, slice, numpy array or Arrow buffer made from it is gone; until then the node must not reuse the block.
A *private* view can be written: its pages are copied when they are written, and no other process sees that.

A forked child has the mapping and the views too; its copies never call back, for it is not the process that the pin was counted for.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from nbray import platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np

PAGE = mmap.PAGESIZE

_MAP_NORESERVE = 0x4000 if platform.LINUX else 0
_CHUNK = 1 << 20
_PARALLEL = 8 << 20
_MOST_THREADS = 4
_PIECE = (
    64 << 20
)  # An interrupt of the program waits for one piece to be copied: 0.1 s into pages that nobody has touched.
_COPIED_AT_ONCE = 64 << 10

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class SharedMemory:
    """A process's mapping of the arena; ``fd`` is the file behind it, to hand on to other processes, ``span`` its length in bytes."""

    __slots__ = ("_array", "_map", "_portable", "_readonly", "_touched", "_view", "fd", "span")

    def __init__(self, fd: int, span: int, *, portable: bool = False) -> None:
        """Map ``span`` bytes of ``fd`` and own the descriptor. Raises OSError."""
        self.fd = fd
        self.span = span
        self._portable = portable
        self._map = mmap.mmap(fd, span, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
        self._view = memoryview(self._map)
        self._readonly = self._view.toreadonly()
        self._array: np.ndarray[Any, Any] | None = None
        self._touched = bytearray((span + _CHUNK - 1) // _CHUNK)

    @classmethod
    def create(cls, span: int, *, portable: bool = False, directory: str | None = None) -> Self:
        """New memory of ``span`` bytes, none of them backed yet: anonymous, or (``portable``) an unlinked file in ``directory``."""
        portable = portable or not platform.LINUX
        return cls(
            platform.shared_file(span, portable=portable, directory=directory), span, portable=portable
        )

    @classmethod
    def attach(cls, fd: int, span: int, life: int = -1) -> Self:
        """The memory behind a descriptor received from the node; the descriptor then belongs to this object.

        ``life``: a descriptor that is closed when nothing in this process looks at the memory any more; forked children have it as they have the mapping.
        """
        found = cls(fd, span)
        if life >= 0:
            weakref.finalize(found._map, os.close, life).atexit = False
        return found

    def reserve(self, offset: int, size: int) -> None:
        """To be called by the node before it hands out a block: afterwards writing it cannot fail. Raises OSError (ENOSPC)."""
        if self._portable:
            platform.reserve(self.fd, offset, size)

    def punch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give the memory of (offset, length) ranges back to the system."""
        for offset, length in ranges:
            platform.punch_hole(self.fd, offset, length)

    def populate(self, offset: int, size: int) -> None:
        """Back whole pages by memory and enter them into this process's page table, without the interpreter lock."""
        start = (offset + PAGE - 1) // PAGE * PAGE
        end = (offset + size) // PAGE * PAGE
        if end > start and platform.populate(self.address + start, end - start):
            self._touched[start // _CHUNK : (end - 1) // _CHUNK + 1] = b"\1" * (
                (end - 1) // _CHUNK + 1 - start // _CHUNK
            )

    def write_view(self, offset: int, size: int) -> memoryview:
        """The bytes themselves, writable, not pinned: for the producer of a block, until it is sealed."""
        return self._view[offset : offset + size]

    def read_view(self, offset: int, size: int) -> memoryview:
        """The bytes themselves, read-only, not pinned."""
        return self._readonly[offset : offset + size]

    def pinned(self, offset: int, size: int, release: Callable[[], None]) -> memoryview:
        """Read-only view; ``release`` is called once, in any thread, when nothing made from it is left (not in forked children)."""
        return memoryview(_new_pin(self._readonly, offset, size, release))

    def private(self, offset: int, size: int, release: Callable[[], None]) -> memoryview:
        """Writable view that only this process sees changed; ``release`` as in `pinned`, since unwritten pages are still the shared ones.

        Small ones are copied, which is cheaper than to map them; they release before this returns.
        """
        if size > _COPIED_AT_ONCE:
            try:
                return memoryview(_new_private(self.fd, offset, size, release, self._readonly))
            except OSError:
                pass  # as many mappings as a process may have (65530 by default)
        copy = bytearray(self._readonly[offset : offset + size])
        release()
        return memoryview(copy)

    def copy_in(self, offset: int, buffers: Iterable[memoryview], *, warm: bool = True) -> int:
        """Write buffers (contiguous, of bytes) one after the other from ``offset`` on; returns the offset after the last.

        Large ones are copied without the interpreter lock; into pages this process has not touched yet, by several threads, since there the
        kernel's work is what takes the time (1.2 GB/s a thread, against 13 into warm pages). ``warm``: whether the pages, if this process
        ever touched them, are still the same (`Block.warm`).
        """
        view = self._view
        for buffer in buffers:
            size = buffer.nbytes
            if size < _CHUNK:
                view[offset : offset + size] = buffer
            else:
                self._copy_large(offset, buffer, size, warm)
            offset += size
        return offset

    @staticmethod
    def original(owner: Any, address: int, size: int) -> memoryview:
        """What a private view shows as long as nobody writes to it. ``owner``: of its memory, which begins at or before ``address``."""
        start = owner.offset + address - owner.__array_interface__["data"][0]
        found: memoryview = owner.whole[start : start + size]
        return found

    def close(self) -> None:
        """Close the descriptor and the mapping; views that are still held stay readable until they are gone. Idempotent."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        # Arrays made from a buffer hold only a reference to it, so closing the map under them would be an end by SIGSEGV:
        # it ends when nothing refers to it any more.
        del self._array, self._readonly, self._view, self._map

    def _bytes(self) -> np.ndarray[Any, Any]:
        if self._array is None:
            import numpy as np

            self._array = np.frombuffer(self._view, np.uint8)
        return self._array

    @property
    def address(self) -> int:
        """Where the mapping begins in this process."""
        return int(self._bytes().ctypes.data)

    def _copy_large(self, offset: int, buffer: memoryview, size: int, warm: bool) -> None:
        import numpy as np

        source = np.frombuffer(buffer, np.uint8)
        for start in range(0, size, _PIECE):
            piece = source[start : start + _PIECE]
            self._copy_piece(offset + start, piece, len(piece), warm)

    def _copy_piece(self, offset: int, source: np.ndarray[Any, Any], size: int, warm: bool) -> None:
        import numpy as np

        target = self._bytes()[offset : offset + size]
        first, last = offset // _CHUNK, (offset + size - 1) // _CHUNK + 1
        cold = self._touched.count(0, first, last) * _CHUNK if warm else size
        self._touched[first:last] = b"\1" * (last - first)
        threads = min(_MOST_THREADS, size // (_PARALLEL // 2), _cpus()) if cold >= _PARALLEL else 1
        if threads <= 1:
            np.copyto(target, source)
            return
        edges = [size * part // threads // PAGE * PAGE for part in range(threads)] + [size]
        helpers = [
            threading.Thread(target=np.copyto, args=(target[start:end], source[start:end]), daemon=True)
            for start, end in pairwise(edges[1:])
        ]
        try:
            for helper in helpers:
                helper.start()
            np.copyto(target[: edges[1]], source[: edges[1]])
        finally:
            _join(helpers)


def _join(helpers: list[threading.Thread]) -> None:
    """Wait for all of them, also when this thread is interrupted: then the block is given back, and nobody may write to it any more."""
    interrupt: BaseException | None = None
    for helper in helpers:
        while helper.is_alive():
            try:
                helper.join()
            except BaseException as error:  # noqa: BLE001  (raised when the last one has ended)
                interrupt = error
    if interrupt is not None:
        raise interrupt


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_new_pin: Callable[[memoryview, int, int, Callable[[], None]], Any]
_new_private: Callable[[int, int, int, Callable[[], None], memoryview], Any]


def _define() -> None:
    """Make the two kinds of owner of a foreign buffer: arrays, for only numpy gives a Python 3.11 class a buffer and a finalizer.

    Later: importing numpy takes longer than everything else that a process does before it needs its first pin.
    """
    global _new_pin, _new_private
    import numpy as np

    new_array = np.ndarray.__new__
    byte = np.dtype(np.uint8)

    class Pin(np.ndarray):
        __slots__ = ("forks", "release")

        forks: int
        release: Callable[[], None]

        def __del__(self) -> None:
            if self.forks == _forks:
                self.release()

    class Mapping:
        __slots__ = (
            "__array_interface__", "__weakref__", "forks", "length", "offset", "release", "start", "whole",
        )  # fmt: skip

        def __init__(
            self, start: int, offset: int, size: int, release: Callable[[], None], whole: memoryview
        ) -> None:
            self.start = start
            self.offset = offset
            skipped = offset % PAGE
            # What is not written is still the shared memory.
            self.whole = whole
            self.length = size + skipped
            self.__array_interface__ = {
                "version": 3,
                "typestr": "|u1",
                "shape": (size,),
                "data": (start + skipped, False),
            }
            self.forks = _forks
            self.release = release

        def __del__(self) -> None:
            platform.unmap(self.start, self.length)
            if self.forks == _forks:
                self.release()

    def new_pin(whole: memoryview, offset: int, size: int, release: Callable[[], None]) -> Any:
        pin: Any = new_array(Pin, (size,), byte, whole, offset)
        pin.release = release
        pin.forks = _forks
        return pin

    def new_private(fd: int, offset: int, size: int, release: Callable[[], None], whole: memoryview) -> Any:
        skipped = offset % PAGE
        start = platform.map_private(fd, offset - skipped, size + skipped)
        return np.asarray(Mapping(start, offset, size, release, whole))

    _new_pin, _new_private = new_pin, new_private


def _define_then_pin(whole: memoryview, offset: int, size: int, release: Callable[[], None]) -> Any:
    _define()
    return _new_pin(whole, offset, size, release)


def _define_then_map(fd: int, offset: int, size: int, release: Callable[[], None], whole: memoryview) -> Any:
    _define()
    return _new_private(fd, offset, size, release, whole)


_new_pin, _new_private = _define_then_pin, _define_then_map
