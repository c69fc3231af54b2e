"""Objects on disk while the memory is needed for others: one file per object in the node's spill directory.

To be called from the node's disk thread, never from its loop. Nothing is synced: what is here does not outlive the node anyway.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from typing import TYPE_CHECKING

from nbray import platform
from nbray.errors import DiskFullError, ObjectLostError

if TYPE_CHECKING:
    from nbray.store.memory import SharedMemory

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What file systems say that sendfile does not work with.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class SpillFiles:
    """The spilled objects of a node. ``bytes``: what their files take. Safe to share between threads, one at a time per object."""

    def __init__(self, directory: str, memory: SharedMemory) -> None:
        """Files go to ``directory``, which is made when the first object is spilled, from and to ``memory``."""
        self.directory = directory
        self.bytes = 0
        self._memory = memory
        self._sizes: dict[bytes, int] = {}
        self._checksums: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __contains__(self, object_id: bytes) -> bool:
        return object_id in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def spill(self, object_id: bytes, offset: int, size: int) -> None:
        """Write a sealed object of the arena to its file; does nothing when it is there from before, for sealed bytes never change.

        Raises DiskFullError, and OSError for whatever else a disk may do; then there is no file.
        """
        if self._sizes.get(object_id) == size:
            return
        path = self.path(object_id)
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                self._write(file, offset, size)
            finally:
                os.close(file)
        except OSError as error:
            self._unlink(path)
            if error.errno in _FULL:
                raise DiskFullError(self._full(size, error)) from error
            raise
        # At 4 GB/s it costs less than the disk; a wrong value that nobody notices costs more than anything.
        checksum = zlib.crc32(self._memory.read_view(offset, size))
        with self._lock:
            self._sizes[object_id] = size
            self._checksums[object_id] = checksum
            self.bytes += size

    def restore(self, object_id: bytes, offset: int, size: int) -> None:
        """Read a spilled object into a block of the arena; its file stays until `delete`.

        Raises ObjectLostError when the file is gone, shorter than the object or changed, OSError when the disk cannot read it.
        """
        path = self.path(object_id)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ObjectLostError(
                f"the object was moved to disk, and its file {path} is gone: did something clean up {self.directory}?"
            ) from error
        try:
            read = self._read(file, offset, size)
        finally:
            os.close(file)
        if read != size:
            raise ObjectLostError(
                f"the object was moved to disk, and its file {path} has {read} bytes instead of {size}"
            )
        if zlib.crc32(self._memory.read_view(offset, size)) != self._checksums.get(object_id):
            raise ObjectLostError(
                f"the object was moved to disk, and its file {path} is not what was written: something changed it, or the disk fails"
            )

    def delete(self, object_id: bytes) -> None:
        """Remove the file of an object, if there is one."""
        with self._lock:
            size = self._sizes.pop(object_id, None)
            if size is None:
                return
            del self._checksums[object_id]
            self.bytes -= size
        self._unlink(self.path(object_id))

    def close(self) -> None:
        """Remove all files and, if nothing else is in it, the directory. Idempotent."""
        for object_id in list(self._sizes):
            self.delete(object_id)
        try:
            os.rmdir(self.directory)
        except OSError:
            pass  # never made, or somebody else's files are in it

    def path(self, object_id: bytes) -> str:
        """Where the file of an object is, if it has one."""
        return os.path.join(self.directory, object_id.hex())

    def _write(self, file: int, offset: int, size: int) -> None:
        done = 0
        if platform.LINUX:
            # From one page cache to the other: half again as fast as through a mapping whose pages this process has yet to meet.
            try:
                while done < size:
                    done += os.sendfile(file, self._memory.fd, offset + done, size - done)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        while done < size:
            done += os.pwrite(file, self._memory.read_view(offset + done, size - done), done)

    def _read(self, file: int, offset: int, size: int) -> int:
        done = 0
        if platform.LINUX:
            # A descriptor of its own, because the position of the arena's is shared with every process that got it.
            target = os.open(f"/proc/self/fd/{self._memory.fd}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.lseek(target, offset, os.SEEK_SET)
                while done < size and (read := os.sendfile(target, file, done, size - done)):
                    done += read
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            finally:
                os.close(target)
        view = self._memory.write_view(offset, size)
        while done < size and (read := os.preadv(file, [view[done:]], done)):
            done += read
        return done

    def _full(self, size: int, error: OSError) -> str:
        try:
            disk = os.statvfs(self.directory)
            room = f"has {disk.f_bavail * disk.f_frsize / 1e6:.1f} MB free"
        except OSError:
            room = "is gone"
        return (
            f"the object store is full and an object of {size / 1e6:.1f} MB cannot be moved to disk: {error.strerror}. "
            f"The spill directory {self.directory} {room} and holds {self.bytes / 1e6:.1f} MB of {len(self._sizes)} objects. "
            "Free disk space, drop refs (del), or start the cluster with a larger store."
        )

    @staticmethod
    def _unlink(path: str) -> None:
        try:
            os.unlink(path)
        except OSError:
            pass  # never made, or removed by somebody else
