"""Frames: a u32 length (little endian) and a msgpack array of messages. No I/O here.

A whole flush is one frame: encoding a list costs a tenth of encoding its messages one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct
from typing import Any, Generic, TypeVar

import msgspec

M = TypeVar("M")

_LENGTH = Struct("<I")
_encode = msgspec.msgpack.Encoder().encode
_encode_into = msgspec.msgpack.Encoder().encode_into
FRAME_LIMIT = 1 << 30


def encode_frame(messages: Sequence[Any]) -> bytes:
    """One frame with all of ``messages``."""
    body = _encode(messages)
    return _LENGTH.pack(len(body)) + body


@cache
def decoder(kind: Any) -> Callable[[memoryview], list[Any]]:
    """Decodes a frame of messages of ``kind``. Made once per process and kind: msgspec looks at every field of every message."""
    decode: Callable[[memoryview], list[Any]] = msgspec.msgpack.Decoder(list[kind]).decode
    return decode


class FrameReader(Generic[M]):
    """Turns the bytes of a stream, in whatever pieces they come, into lists of messages of ``kind`` (a type or union msgspec can decode)."""

    __slots__ = ("_decode", "_need", "_parts", "_rest", "_size")

    def __init__(self, kind: Any) -> None:
        self._decode: Callable[[memoryview], list[M]] = decoder(kind)
        self._rest = b""
        self._parts: list[bytes] = []
        self._size = 0
        self._need = 0

    def feed(self, data: bytes) -> list[M]:
        """All messages completed by ``data``. Raises ValueError for a frame that cannot be one."""
        if self._need:
            self._parts.append(data)
            self._size += len(data)
            if self._size < self._need:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
            self._need = 0
        elif self._rest:
            data = self._rest + data
        self._rest = b""
        at, end = 0, len(data)
        messages: list[M] = []
        while end - at >= 4:
            size: int = _LENGTH.unpack_from(data, at)[0]
            if size > FRAME_LIMIT:
                raise ValueError(
                    f"a frame of {size} bytes was announced; the limit is {FRAME_LIMIT}: the peer does not speak this protocol"
                )
            stop = at + 4 + size
            if stop > end:
                if size > 1 << 16:
                    self._parts.append(data[at:])
                    self._size = end - at
                    self._need = size + 4
                    return messages
                break
            found = self._decode(memoryview(data)[at + 4 : stop])
            messages = messages + found if messages else found
            at = stop
        if at < end:
            self._rest = data[at:]
        return messages
