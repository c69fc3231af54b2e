"""Shared memory: views pin as long as anything made from them lives, private copies stay private, forked children never call back."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nbray import platform
from nbray.store.memory import PAGE, SharedMemory

MB = 1 << 20


class Releases:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture(params=[False, True], ids=["memfd", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[SharedMemory]:
    shared = SharedMemory.create(256 * MB, portable=request.param, directory=str(tmp_path))
    shared.reserve(0, 32 * MB)
    yield shared
    shared.close()


def in_child(work: object) -> int:
    """Run a function in a forked child; its exit status (1 when it raised)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()  # type: ignore[operator]
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_one_process_writes_another_reads(memory: SharedMemory) -> None:
    end = memory.copy_in(PAGE, [memoryview(b"left "), memoryview(b"right")])
    assert end == PAGE + 10

    def child() -> None:
        attached = SharedMemory.attach(os.dup(memory.fd), memory.span)
        assert bytes(attached.read_view(PAGE, 10)) == b"left right"
        attached.copy_in(0, [memoryview(b"answer")])
        attached.close()

    assert in_child(child) == 0
    assert bytes(memory.read_view(0, 6)) == b"answer"


@pytest.mark.parametrize("size", [1, MB - 1, MB, 9 * MB + 17, 24 * MB])
def test_copies_of_all_sizes_arrive(memory: SharedMemory, size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for warm in (True, True, False):  # into untouched pages, into warm ones, into pages that were taken away
        memory.write_view(0, 32 * MB)[:] = bytes(32 * MB)
        end = memory.copy_in(PAGE + 64, [source.data, memoryview(b"!")], warm=warm)
        assert end == PAGE + 64 + size + 1
        assert np.array_equal(np.frombuffer(memory.read_view(PAGE + 64, size), np.uint8), source)
        assert bytes(memory.read_view(PAGE + 64 + size, 2)) == b"!\0"


def test_an_interrupted_copy_writes_no_more_afterwards(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is interrupted gives the block back: its helpers must have ended by then."""
    running = threading.Event()
    proceed = threading.Event()
    copied = []
    bare_copy = np.copyto

    def copy(target: Any, source: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            running.wait()
            threading.Timer(0.01, proceed.set).start()
            raise KeyboardInterrupt
        running.set()
        proceed.wait()
        bare_copy(target, source)
        copied.append(target.size)

    monkeypatch.setattr(np, "copyto", copy)
    monkeypatch.setattr("nbray.store.memory._cpus", lambda: 2)
    source = np.ones(16 * MB, np.uint8)
    with pytest.raises(KeyboardInterrupt):
        memory.copy_in(0, [source.data])
    assert copied == [8 * MB]


def test_a_pin_lasts_as_long_as_anything_made_from_it(memory: SharedMemory) -> None:
    memory.copy_in(0, [memoryview(bytes(range(100)))])
    makers = {
        "view": lambda view: view,
        "slice": lambda view: view[10:20],
        "slice of a slice": lambda view: view[10:50][1:3],
        "cast": lambda view: view.cast("B", (10, 10)),
        "array": lambda view: np.frombuffer(view, np.uint8),
        "array of another type": lambda view: np.frombuffer(view, np.uint8)[:8].view(np.int64),
        "slice of an array": lambda view: np.frombuffer(view, np.uint8)[::3],
        "array over a slice": lambda view: np.ndarray((3,), np.uint8, view[4:]),
        "arrow buffer": lambda view: pa.py_buffer(view),
        "slice of an arrow buffer": lambda view: pa.py_buffer(view).slice(5),
        "arrow array": lambda view: pa.Array.from_buffers(pa.uint8(), 4, [None, pa.py_buffer(view)]),
        "iterator": lambda view: iter(view),
    }
    for name, make in makers.items():
        released = Releases()
        made = make(memory.pinned(0, 100, released))
        gc.collect()
        assert released.count == 0, name
        del made
        assert released.count == 1, name


def test_a_pinned_view_cannot_be_written(memory: SharedMemory) -> None:
    view = memory.pinned(0, 100, Releases())
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    array = np.frombuffer(view, np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


@pytest.mark.parametrize("size", [100, 64 << 10, (64 << 10) + 1, 3 * MB])
def test_a_private_view_is_written_alone(memory: SharedMemory, size: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    offset = 64 + PAGE
    memory.copy_in(offset, [source.data])
    released = Releases()
    view = memory.private(offset, size, released)
    array = np.frombuffer(view, np.uint8)
    assert np.array_equal(array, source)
    array += 1
    view[size - 1] = 7
    assert np.array_equal(np.frombuffer(memory.read_view(offset, size), np.uint8), source)
    other = memory.private(offset, size, Releases())
    assert np.array_equal(np.frombuffer(other, np.uint8), source)
    assert array[0] == np.uint8(int(source[0]) + 1 & 255)
    del view
    gc.collect()
    tail = array[-1:]
    del array
    assert released.count == (1 if size <= 64 << 10 else 0), "small ones are copies and need no pin"
    assert tail[0] == 7
    del tail
    assert released.count == 1


def test_private_views_take_no_descriptors(memory: SharedMemory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    views = [memory.private(0, MB, Releases()) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(views) == 50


def test_where_no_mapping_is_left_a_private_view_is_a_copy(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.copy_in(0, [memoryview(b"shared")])

    def none_left(fd: int, offset: int, length: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(platform, "map_private", none_left)
    released = Releases()
    view = memory.private(0, MB, released)
    assert released.count == 1
    view[0] = 0
    assert bytes(view[1:6]) == b"hared"
    assert bytes(memory.read_view(0, 6)) == b"shared"


def test_a_forked_child_reads_on_and_never_calls_back(memory: SharedMemory) -> None:
    memory.copy_in(0, [memoryview(b"held")])
    released = Releases()
    reader, writer = os.pipe()

    def call_back() -> None:
        released()
        os.write(writer, b"x")

    pinned: list[memoryview] = [memory.pinned(0, 4, call_back), memory.private(0, MB, call_back)]

    def child() -> None:
        assert bytes(pinned[0]) == b"held"
        pinned[1][0] = 1
        pinned.clear()

    assert in_child(child) == 0
    assert bytes(pinned[1][:4]) == b"held"
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    pinned.clear()
    assert released.count == 2
    os.close(reader)
    os.close(writer)


def test_punched_memory_goes_back_and_reads_as_zeros(memory: SharedMemory) -> None:
    memory.copy_in(0, [memoryview(bytes([9]) * (8 * MB))])
    before = os.fstat(memory.fd).st_blocks
    memory.punch([(0, 2 * MB), (4 * MB, MB)])
    assert os.fstat(memory.fd).st_blocks <= before - 3 * MB // 512
    view = memory.read_view(0, 8 * MB)
    assert view[0] == view[2 * MB - 1] == view[4 * MB] == 0
    assert view[2 * MB] == view[5 * MB] == 9


def test_nothing_is_backed_by_memory_before_it_is_used() -> None:
    shared = SharedMemory.create(8 << 30)
    assert os.fstat(shared.fd).st_blocks == 0
    shared.populate(10, 5 * MB)
    assert 0 < os.fstat(shared.fd).st_blocks * 512 <= 5 * MB
    shared.close()


def test_the_memfd_cannot_be_shrunk_under_the_others() -> None:
    shared = SharedMemory.create(MB)
    with pytest.raises(OSError, match="not permitted") as caught:
        os.ftruncate(shared.fd, 0)
    assert caught.value.errno == errno.EPERM
    shared.close()


def test_views_outlive_close(memory: SharedMemory) -> None:
    memory.copy_in(0, [memoryview(b"still here")])
    released = Releases()
    shared = SharedMemory.attach(os.dup(memory.fd), memory.span)
    view, private = shared.pinned(0, 10, released), shared.private(0, MB, released)
    shared.close()
    shared.close()
    del shared
    gc.collect()
    assert bytes(view) == bytes(private[:10]) == b"still here"
    del view, private
    assert released.count == 2


def test_a_killed_writer_leaves_the_memory_usable(memory: SharedMemory) -> None:
    def child() -> None:
        memory.copy_in(0, [memoryview(b"partly")])
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    memory.copy_in(0, [memoryview(b"again!")])
    assert bytes(memory.read_view(0, 6)) == b"again!"
