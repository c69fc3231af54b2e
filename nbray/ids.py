"""Identity: every id is computed from what it names, never drawn (protocol section 1).

All ids are plain ``bytes``; their length says what they are.

=============  =====  ==================================================================
id             bytes  made of
=============  =====  ==================================================================
execution      12     blake2b(task id, attempt); a driver's is given by the GCS at connect
task, actor    16     execution id of the parent + counter (u32, little endian)
actor call     32     execution id of the caller + counter + actor id
object         20/36  task or call id + index (u32); ``put`` objects use index ``PUT_INDEX``
=============  =====  ==================================================================

A retried task has a new execution id and so new ids for its children, while its return values, named by the task id
alone, keep theirs.
"""

from __future__ import annotations

try:
    # What hashlib gives, too, which would load OpenSSL: 4 ms in each process.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b
from itertools import count
from struct import Struct

EXECUTION_BYTES = 12
TASK_BYTES = 16
CALL_BYTES = 32
PUT_INDEX = 0xFFFF_FFFF

_U32 = Struct("<I")
_u32 = _U32.pack
FIRST_INDEX = _u32(0)


def content_id(data: bytes, size: int = 16) -> bytes:
    """Hash of ``data``, ``size`` bytes: names functions and environments by content."""
    return blake2b(data, digest_size=size).digest()


def execution_id(task_id: bytes, attempt: int) -> bytes:
    """Id of one execution of a task: 12 bytes."""
    return blake2b(task_id + _u32(attempt), digest_size=EXECUTION_BYTES).digest()


def driver_execution_id(cluster_id: bytes, job: int) -> bytes:
    """Execution id of the driver of job number ``job``: 12 bytes, equal for equal cluster id and job number."""
    return blake2b(cluster_id + b"driver" + _u32(job), digest_size=EXECUTION_BYTES).digest()


def return_id(task_id: bytes, index: int) -> bytes:
    """Id of return value (or generator item) ``index`` of a task or call."""
    return task_id + _u32(index)


def task_of(object_id: bytes) -> bytes:
    """The task, call or put that made the object: the id without its index."""
    return object_id[:-4]


def index_of(object_id: bytes) -> int:
    """Index of the object among its task's return values, ``PUT_INDEX`` for a put."""
    index: int = _U32.unpack_from(object_id, len(object_id) - 4)[0]
    return index


def is_put(object_id: bytes) -> bool:
    """Whether the object was made by ``put`` (or holds the large arguments of a call)."""
    return object_id[-4:] == b"\xff\xff\xff\xff"


def actor_of(call_id: bytes) -> bytes:
    """The actor id embedded in a call id, or in the id of an object that a call returns."""
    return call_id[TASK_BYTES:CALL_BYTES]


def task_seed(cluster_id: bytes, task_id: bytes) -> bytes:
    """40 bytes that seed the random state of a task: distinct across tasks, equal across its attempts."""
    return blake2b(cluster_id + task_id, digest_size=40).digest()


class IdSource:
    """Computes the ids of what one execution makes: children, actors, calls, puts. Safe to share between threads."""

    __slots__ = ("_next", "execution")

    def __init__(self, execution: bytes) -> None:
        self.execution = execution
        self._next = count().__next__

    def task_id(self) -> bytes:
        return self.execution + _u32(self._next())

    def call_id(self, actor_id: bytes) -> bytes:
        return self.execution + _u32(self._next()) + actor_id

    def put_id(self) -> bytes:
        return self.execution + _u32(self._next()) + b"\xff\xff\xff\xff"


def short(any_id: bytes) -> str:
    """The form of an id shown to people: eight hexadecimal digits that tell the ids of one run apart."""
    if len(any_id) > CALL_BYTES or len(any_id) == TASK_BYTES + 4:
        return short(task_of(any_id)) + (f".{index_of(any_id)}" if not is_put(any_id) else "")
    return content_id(any_id, 4).hex()
