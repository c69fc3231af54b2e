"""Results on disk that outlive their cluster: one file per object below the user's data directory, in a folder per notebook.

A node writes them without unpickling anything: before it ends because nobody uses it, and when somebody asks for it (``%cluster keep``). A kernel reads
them back into a later cluster. A file is a line that says what it is, the length of a header, the header (msgpack), the value's bytes as they lay in the store.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from io import BufferedReader

import msgspec

from nbray import ids
from nbray.errors import ObjectLostError
from nbray.events import SavedName

MAGIC = b"nbray saved value 1\n"
LENGTH = struct.Struct("<I")
SUFFIX = ".value"

UNCLAIMED_DAYS = 30.0
"""Days after which files that were written because a cluster ended are removed."""

FREE_SHARE = 0.1
"""Share of the disk that must stay free."""


class Header(msgspec.Struct):
    """``kept``: somebody asked for it, so it stays until somebody says otherwise. ``kind``, ``size``, ``crc``: of the bytes. ``time``: seconds of the wall clock."""

    session: str
    names: list[SavedName]
    kind: int
    size: int
    crc: int
    kept: bool
    cluster: str
    python: str
    time: float


class Saved(msgspec.Struct):
    """A file and what it says of itself."""

    path: str
    header: Header
    start: int


def folder(directory: str, session: str) -> str:
    """Where the results of a notebook lie."""
    return os.path.join(directory, "results", ids.content_id(session.encode(), 8).hex())


def write(path: str, header: Header, source: int, offset: int) -> None:
    """Write ``header.size`` bytes of the file ``source`` at ``offset``. Raises OSError; then there is no file."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    disk = os.statvfs(os.path.dirname(path))
    free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if free - header.size < whole * FREE_SHARE:
        raise OSError(errno.ENOSPC, f"only {free / 2**30:.1f} GB are free on the disk of {path}")
    encoded = msgspec.msgpack.encode(header)
    part = f"{path}.{os.getpid()}.part"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(file, MAGIC + LENGTH.pack(len(encoded)) + encoded)
            done = 0
            while done < header.size:
                block = os.pread(source, min(header.size - done, 1 << 22), offset + done)
                if not block:
                    raise OSError(errno.EIO, "the value's bytes end too early")
                done += os.write(file, block)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(part, path)
    except OSError:
        remove(part)
        raise


def checksum(source: int, offset: int, size: int) -> int:
    """Of the bytes that are to be written."""
    crc = done = 0
    while done < size and (block := os.pread(source, min(size - done, 1 << 22), offset + done)):
        crc = zlib.crc32(block, crc)
        done += len(block)
    return crc


def find(directory: str, session: str = "") -> list[Saved]:
    """The results of a notebook (or of all), oldest first. Files that cannot be read are left out."""
    top = os.path.join(directory, "results")
    found = []
    for place in [folder(directory, session)] if session else list(_subfolders(top)):
        for name in _listed(place):
            if name.endswith(SUFFIX):
                path = os.path.join(place, name)
                try:
                    found.append(_head(path))
                except (OSError, ValueError):
                    continue
    return sorted(found, key=lambda saved: saved.header.time)


def is_kept(path: str) -> bool:
    """Whether this file is there because somebody asked for it."""
    try:
        return _head(path).header.kept
    except (OSError, ValueError):
        return False


def read(saved: Saved) -> bytearray:
    """The value's bytes. Raises ObjectLostError when they are not what was written."""
    data = bytearray(saved.header.size)
    try:
        with _open(saved.path) as file:
            file.seek(saved.start)
            count = file.readinto(data)
    except OSError as error:
        raise ObjectLostError(f"the file {saved.path} cannot be read: {error}") from error
    if count != len(data) or zlib.crc32(data) != saved.header.crc:
        raise ObjectLostError(
            f"the file {saved.path} is not what was written: something changed it, or the disk fails"
        )
    return data


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except OSError:
        pass  # somebody else was faster


def supersede(directory: str, header: Header, path: str) -> None:
    """Remove files of this notebook whose names are all among those that ``path`` now has, unless somebody asked for them."""
    newer = {name.name for name in header.names}
    for saved in find(directory, header.session):
        if (
            saved.path != path
            and not saved.header.kept
            and newer.issuperset(n.name for n in saved.header.names)
        ):
            remove(saved.path)


def expire(directory: str) -> None:
    """Remove what nobody has come back for."""
    oldest = time.time() - UNCLAIMED_DAYS * 86400
    for saved in find(directory):
        if not saved.header.kept and saved.header.time < oldest:
            remove(saved.path)
    for place in _subfolders(os.path.join(directory, "results")):
        try:
            os.rmdir(place)
        except OSError:
            continue  # not empty


def _open(path: str) -> BufferedReader:
    """A file that only this user can have written: what is in it will be unpickled. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        os.close(fd)
        raise PermissionError(errno.EPERM, f"others can write {path}")
    return os.fdopen(fd, "rb")


def _head(path: str) -> Saved:
    with _open(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no saved value")
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        header = msgspec.msgpack.decode(file.read(length), type=Header)
    return Saved(path, header, len(MAGIC) + LENGTH.size + length)


def _listed(place: str) -> list[str]:
    try:
        return sorted(os.listdir(place))
    except OSError:
        return []


def _subfolders(top: str) -> Iterator[str]:
    for name in _listed(top):
        yield os.path.join(top, name)
