"""What the node and its zygote say to each other: fixed-size packets, descriptors beside them.

Signals to workers go through the zygote, which is their parent: until it has reaped a worker nobody else can have its pid.
"""

from __future__ import annotations

from struct import Struct

MESSAGE = Struct("<iiii")
FORK, SIGNAL, RETIRE = 1, 2, 5
_FORKED, _EXITED = 3, 4
_NAMES = {_FORKED: "forked", _EXITED: "exited"}


def encode_fork(number: int) -> bytes:
    """Fork a worker that says hello with this number; its descriptors come along."""
    return MESSAGE.pack(FORK, number, 0, 0)


def encode_signal(number: int, signal: int, *, group: bool) -> bytes:
    """Send this signal to a worker, or to all that belongs to its process group."""
    return MESSAGE.pack(SIGNAL, number, signal, group)


def encode_retire() -> bytes:
    """No more workers will be asked for: end with the last one."""
    return MESSAGE.pack(RETIRE, 0, 0, 0)


def decode_order(data: bytes) -> tuple[int, int, int, bool]:
    """(`FORK`, `SIGNAL` or `RETIRE`, worker, signal, whether to its group)."""
    kind, number, signal, group = MESSAGE.unpack(data)
    return kind, number, signal, bool(group)


def encode_forked(number: int, pid: int) -> bytes:
    """The worker runs."""
    return MESSAGE.pack(_FORKED, number, pid, 0)


def encode_exited(number: int, pid: int, status: int) -> bytes:
    """The worker has ended; pid 0: it could not be forked."""
    return MESSAGE.pack(_EXITED, number, pid, status)


def decode(data: bytes) -> tuple[str, int, int, int]:
    """What the zygote says: ("forked" or "exited", worker, pid, wait status)."""
    kind, number, pid, status = MESSAGE.unpack(data)
    return _NAMES[kind], number, pid, status
