"""What the node and its zygote say to each other: fixed-size packets, descriptors beside them."""

from __future__ import annotations

from struct import Struct

MESSAGE = Struct("<iiii")
_FORK, _FORKED, _EXITED = 1, 2, 3
_NAMES = {_FORKED: "forked", _EXITED: "exited"}


def encode_fork(number: int) -> bytes:
    return MESSAGE.pack(_FORK, number, 0, 0)


def decode_fork(data: bytes) -> int:
    """The number of the worker to fork."""
    number: int = MESSAGE.unpack(data)[1]
    return number


def encode_forked(number: int, pid: int) -> bytes:
    return MESSAGE.pack(_FORKED, number, pid, 0)


def encode_exited(number: int, pid: int, status: int) -> bytes:
    return MESSAGE.pack(_EXITED, number, pid, status)


def decode(data: bytes) -> tuple[str, int, int, int]:
    """(what, worker, pid, wait status)."""
    kind, number, pid, status = MESSAGE.unpack(data)
    return _NAMES[kind], number, pid, status
