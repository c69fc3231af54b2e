"""Objects to disk and back: same bytes, sizes accounted, errors that say what to do, nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbray import platform
from nbray.errors import DiskFullError, ObjectLostError
from nbray.store.memory import SharedMemory
from nbray.store.spill import SpillFiles

MB = 1 << 20


@pytest.fixture(params=["sendfile", "portable"])
def files(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SpillFiles]:
    memory = SharedMemory.create(64 * MB)
    if request.param == "portable":
        monkeypatch.setattr(platform, "LINUX", False)
    spill = SpillFiles(str(tmp_path / "spill"), memory)
    yield spill
    spill.close()
    assert not (tmp_path / "spill").exists()
    memory.close()


def fill(files: SpillFiles, offset: int, size: int, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    files._memory.copy_in(offset, [data.data])
    return data.tobytes()


@pytest.mark.parametrize("size", [0, 1, 4097, 5 * MB + 3])
def test_what_was_spilled_comes_back_elsewhere(files: SpillFiles, size: int) -> None:
    data = fill(files, 64, size, seed=size)
    files.spill(b"a" * 20, 64, size)
    assert files.bytes == size
    files._memory.write_view(0, 16 * MB)[:] = bytes(16 * MB)
    files.restore(b"a" * 20, 20 * MB, size)
    assert bytes(files._memory.read_view(20 * MB, size)) == data
    assert bytes(files._memory.read_view(20 * MB + size, 64)) == bytes(64), "wrote past the object"
    files.delete(b"a" * 20)
    assert files.bytes == len(files) == 0
    assert os.listdir(files.directory) == []


def test_sizes_are_those_of_what_is_there(files: SpillFiles) -> None:
    fill(files, 0, 3000, seed=1)
    files.spill(b"a", 0, 1000)
    files.spill(b"b", 1000, 2000)
    files.spill(b"a", 0, 1000)
    assert files.bytes == 3000
    assert b"a" in files
    assert sum(entry.stat().st_size for entry in os.scandir(files.directory)) == 3000
    files.delete(b"a")
    files.delete(b"a")
    files.delete(b"unknown")
    assert files.bytes == 2000
    assert b"a" not in files


def test_nobody_else_can_read_them(files: SpillFiles) -> None:
    files.spill(b"a", 0, 10)
    assert os.stat(files.directory).st_mode & 0o777 == 0o700
    assert os.stat(os.path.join(files.directory, b"a".hex())).st_mode & 0o777 == 0o600


def test_a_missing_or_cut_file_is_a_lost_object(files: SpillFiles) -> None:
    fill(files, 0, 1000, seed=1)
    files.spill(b"a", 0, 1000)
    path = os.path.join(files.directory, b"a".hex())
    os.truncate(path, 10)
    with pytest.raises(ObjectLostError, match="has 10 bytes instead of 1000"):
        files.restore(b"a", 8192, 1000)
    os.unlink(path)
    with pytest.raises(ObjectLostError, match="is gone: did something clean up"):
        files.restore(b"a", 8192, 1000)
    files.delete(b"a")
    assert files.bytes == 0


def test_several_threads_at_once(files: SpillFiles) -> None:
    expected = {number: fill(files, number * MB, MB, seed=number) for number in range(8)}
    wrong: list[Any] = []

    def work(number: int) -> None:
        name = bytes([number])
        files.spill(name, number * MB, MB)
        files.restore(name, (number + 16) * MB, MB)
        if bytes(files._memory.read_view((number + 16) * MB, MB)) != expected[number]:
            wrong.append(number)
        files.delete(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert files.bytes == 0


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    memory = SharedMemory.create(MB)
    other = tmp_path / "other"
    other.write_text("mine")
    files = SpillFiles(str(tmp_path), memory)
    files.spill(b"a", 0, 10)
    files.close()
    files.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]
    memory.close()


FULL_DISK = """
import resource, signal, sys
from nbray.errors import DiskFullError
from nbray.store.memory import SharedMemory
from nbray.store.spill import SpillFiles
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
memory = SharedMemory.attach(int(sys.argv[1]), 64 << 20)
files = SpillFiles(sys.argv[2], memory)
files.spill(b"a", 0, 500_000)
try:
    files.spill(b"b", 0, 5_000_000)
except DiskFullError as error:
    print(error, files.bytes, b"b" in files)
files.restore(b"a", 0, 500_000)
files.close()
"""


def test_a_disk_that_takes_no_more_is_said_so(tmp_path: Path) -> None:
    """A file size limit makes the write fail half-way, as a full disk does."""
    memory = SharedMemory.create(64 * MB)
    memory.copy_in(0, [memoryview(bytes(5_000_000))])
    spill = tmp_path / "spill"
    arguments = [sys.executable, "-c", FULL_DISK, str(memory.fd), str(spill)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, pass_fds=[memory.fd])
    memory.close()
    assert done.returncode == 0, done.stderr
    assert "an object of 5.0 MB cannot be moved to disk" in done.stdout
    assert str(spill) in done.stdout
    assert "holds 0.5 MB of 1 objects" in done.stdout
    assert done.stdout.strip().endswith("500000 False")
    assert not spill.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left_is_said_so(tmp_path: Path) -> None:
    memory = SharedMemory.create(MB)
    files = SpillFiles(str(tmp_path), memory)
    os.symlink("/dev/full", os.path.join(files.directory, b"b".hex()))
    memory.copy_in(0, [memoryview(b"x" * 5000)])
    with pytest.raises(DiskFullError, match=os.strerror(errno.ENOSPC)):
        files.spill(b"b", 0, 5000)
    assert files.bytes == 0
    assert list(tmp_path.iterdir()) == []
    memory.close()


def test_other_failures_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    memory = SharedMemory.create(MB)
    (tmp_path / "file").write_text("")
    files = SpillFiles(str(tmp_path / "file"), memory)
    with pytest.raises(FileExistsError):
        files.spill(b"a", 0, 10)
    files.close()
    memory.close()
