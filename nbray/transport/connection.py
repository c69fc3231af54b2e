"""The node's end of a connection: a non-blocking socket, frames in, frames out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from nbray.transport.frames import FrameReader

_READ = 1 << 16
"""Bytes per read: above 128 KB the allocator would map and unmap memory each time, three system calls more."""


class Connection:
    """Frames over one Unix socket, never blocking. ``messages``: the type or union of what may come in."""

    __slots__ = ("_reader", "_waiting", "closed", "number", "sock", "unsent")

    def __init__(self, sock: socket.socket, number: int, messages: Any) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.number = number
        self.closed = False
        self.unsent = 0
        self._reader: FrameReader[Any] = FrameReader(messages)
        self._waiting: list[memoryview] = []

    def receive(self) -> list[Any] | None:
        """The messages that have arrived, None when the peer has closed (or does not speak the protocol)."""
        try:
            data = self.sock.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        return self._reader.feed(data)

    def drain(self) -> Iterator[list[Any]]:
        """All messages that have arrived, however many reads that takes."""
        while True:
            try:
                data = self.sock.recv(_READ)
            except OSError:
                return
            if not data:
                return
            yield self._reader.feed(data)

    def send(self, frame: bytes) -> bool:
        """Send a frame, or keep what does not fit into the socket now; False if there is a rest (then call `flush` when writable)."""
        if self._waiting:
            self._waiting.append(memoryview(frame))
            self.unsent += len(frame)
            return False
        try:
            sent = self.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.closed = True
            return True
        if sent == len(frame):
            return True
        self._waiting.append(memoryview(frame)[sent:])
        self.unsent = len(frame) - sent
        return False

    def flush(self) -> bool:
        """Send on; True when nothing is left."""
        while self._waiting:
            first = self._waiting[0]
            try:
                sent = self.sock.send(first)
            except BlockingIOError:
                return False
            except OSError:
                self.closed = True
                self._waiting.clear()
                self.unsent = 0
                return True
            self.unsent -= sent
            if sent < len(first):
                self._waiting[0] = first[sent:]
                return False
            del self._waiting[0]
        return True

    def close(self) -> None:
        self.sock.close()
