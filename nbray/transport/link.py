"""A client's end of its connection: many threads send and wait, one at a time reads, an interrupt never tears a message.

The thread that waits does the reading itself: handing a message from a reader thread to a waiter costs more than the message. When several wait, one
reads for all and wakes the others. A background thread reads only while nobody waits, and sends what finalizers and output have left behind.

Interrupts: SIGINT in the main thread raises KeyboardInterrupt only while it waits in ``recv``, never between taking bytes from the socket and
keeping them, nor in the middle of a send. Bytes are moved from the socket into a deque by one call into C, which no signal handler can split.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from nbray.transport.frames import FrameReader, encode_frame

_READ = 1 << 18
_ONE_READ = (_READ,)
_SLICE_SECONDS = 0.25
"""Longest time in one ``recv``: bounds what a signal that comes right before the system call can cost."""

BURST = 0.0005
"""Seconds within which messages are collected before they are sent."""

FULL = 512
"""Messages after which they are sent whatever the time."""

TIDY = 0.05
"""Seconds after which the background thread sends what is left."""

AWAY = 0.02
"""Seconds after the last activity of the program before the background thread reads."""


class Interrupts:
    """Defers SIGINT of the main thread while the link must not be disturbed. A worker has its own kind of it."""

    def __init__(self) -> None:
        self.waiting = False
        self.depth = 0
        self._pending = False
        self._main = threading.main_thread().ident
        self._before: Any = None

    def enter(self) -> bool:
        """Begin to defer; False in threads that get no signals (then `leave` must not be called)."""
        if threading.get_ident() != self._main:
            return False
        self.depth += 1
        if self.depth == 1:
            self._before = signal.getsignal(signal.SIGINT)
            if callable(self._before):
                signal.signal(signal.SIGINT, self._arrived)
        return True

    def leave(self) -> None:
        """End deferring: an interrupt that came meanwhile is raised now."""
        self.depth -= 1
        if self.depth == 0:
            before = self._before
            if callable(before):
                signal.signal(signal.SIGINT, before)
            if self._pending:
                self._pending = False
                if callable(before):
                    before(signal.SIGINT, None)

    def raise_pending(self) -> None:
        """At a safe point: raise what has come."""
        if self._pending:
            self._pending = False
            if callable(self._before):
                self._before(signal.SIGINT, None)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            self.waiting = False
            self._before(number, frame)
        else:
            self._pending = True


def greet(sock: socket.socket, hello: Any, incoming: Any, answers: tuple[type, ...]) -> tuple[Any, list[Any], FrameReader[Any]]:
    """Say ``hello``; the node's answer, what came along with it, and the reader that has the bytes after that.

    Raises OSError when the node does not answer.
    """
    sock.sendall(encode_frame([hello]))
    reader: FrameReader[Any] = FrameReader(incoming)
    while True:
        data = sock.recv(1 << 16)
        if not data:
            raise ConnectionError("it closed the connection")
        messages = reader.feed(data)
        for index, message in enumerate(messages):
            if isinstance(message, answers):
                return message, messages[index + 1 :], reader


class Link:
    """Frames over a blocking Unix socket.

    ``out``: the list that messages to send are appended to, by any thread. ``receive`` gets the messages that have come, in the thread that reads.
    ``before_send`` may append more to ``out``. ``lost`` is called once when the peer is gone; afterwards `dead` says why.
    """

    def __init__(
        self,
        sock: socket.socket,
        reader: FrameReader[Any],
        out: list[Any],
        receive: Callable[[list[Any]], None],
        before_send: Callable[[], None],
        lost: Callable[[], None],
        interrupts: Interrupts,
        *,
        background_reads: bool,
    ) -> None:
        self.sock = sock
        self.out = out
        self.dead = ""
        self.tidy: Callable[[], bool] = lambda: False
        """Called by the background thread after sending; True: call again soon."""
        self._reader = reader
        self._receive = receive
        self._before_send = before_send
        self._lost = lost
        self.interrupts = interrupts
        self._chunks: deque[bytes] = deque()
        self._read_lock = threading.Lock()
        self._send_lock = threading.RLock()
        self._came = threading.Condition(threading.Lock())
        self._followers = 0
        self._sent_at = 0.0
        self.active = 0.0
        """When the program last used the link (monotonic seconds)."""
        self._armed = False
        self.background = background_reads
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closed = False
        self._pid = os.getpid()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        sock.settimeout(None)
        # A timeout in the kernel instead of poll before each recv: one system call less per message.
        seconds = int(_SLICE_SECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, int((_SLICE_SECONDS - seconds) * 1e6)))

    # -- sending

    def flush(self) -> None:
        """Send all of ``out``. Raises ConnectionError when the peer is gone."""
        shielded = self.interrupts.enter()
        try:
            self._flush()
        finally:
            if shielded:
                self.interrupts.leave()

    def _flush(self) -> None:
        with self._send_lock:
            self._before_send()
            out = self.out
            self._sent_at = time.monotonic()
            while out:
                batch = out[:4096]
                del out[: len(batch)]
                try:
                    self.sock.sendall(encode_frame(batch))
                except OSError as error:
                    self._die(f"the connection to the node broke: {error}")
                    return

    def later(self) -> None:
        """Messages were appended that need not go at once: send when the burst is over."""
        self.active = now = time.monotonic()
        if now - self._sent_at > BURST or len(self.out) > FULL:
            self.flush()
        elif not self._armed:
            self.arm()

    def arm(self) -> None:
        """Have the background thread send soon. Safe in finalizers: no locks."""
        self._armed = True
        if self._pid == os.getpid():
            try:
                os.write(self._wake_write, b"x")
            except OSError:
                pass
            if self._thread is None and not self._closed:
                self._start()

    # -- waiting

    def wait(self, satisfied: Callable[[], bool], deadline: float | None) -> bool:
        """Until ``satisfied()``; False when ``deadline`` (monotonic seconds) has passed. Raises KeyboardInterrupt in the main thread.

        Ends early (returning ``satisfied()``) when the peer is gone: look at `dead`.
        """
        interrupts = self.interrupts
        shielded = interrupts.enter()
        try:
            self._flush()
            while not satisfied():
                if self.dead:
                    return satisfied()
                if shielded:
                    interrupts.raise_pending()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return self._last_look(satisfied)
                if self._read_lock.acquire(blocking=False):
                    try:
                        self._read(left, shielded)
                    finally:
                        self._read_lock.release()
                        if self._followers:
                            with self._came:
                                self._came.notify_all()
                else:
                    self._follow(satisfied, left, shielded)
            return True
        finally:
            self.active = time.monotonic()
            if shielded:
                interrupts.leave()

    def _last_look(self, satisfied: Callable[[], bool]) -> bool:
        """The time is up: what has arrived already still counts."""
        if self._read_lock.acquire(blocking=False):
            try:
                if self._poll.poll(0):
                    self._take(False)
            finally:
                self._read_lock.release()
        return satisfied()

    def _follow(self, satisfied: Callable[[], bool], left: float | None, shielded: bool) -> None:
        """Another thread reads: wait for it, for a while."""
        slice_ = _SLICE_SECONDS if left is None else min(left, _SLICE_SECONDS)
        with self._came:
            self._followers += 1
            try:
                if not satisfied():
                    if shielded:
                        self.interrupts.waiting = True
                    self._came.wait(min(slice_, 0.02))
            finally:
                self.interrupts.waiting = False
                self._followers -= 1

    def _read(self, left: float | None, shielded: bool) -> None:
        if left is not None and left < _SLICE_SECONDS:
            if shielded:
                self.interrupts.waiting = True
            found = self._poll.poll(max(left, 0) * 1000)
            self.interrupts.waiting = False
            if not found:
                return
        self._take(shielded)

    def _take(self, shielded: bool) -> None:
        """One recv and what follows from it. The caller has the read lock."""
        chunks = self._chunks
        if not chunks:
            try:
                if shielded:
                    self.interrupts.waiting = True
                chunks.extend(map(self.sock.recv, _ONE_READ))
                self.interrupts.waiting = False
            except BlockingIOError:
                self.interrupts.waiting = False
                return
            except OSError as error:
                self.interrupts.waiting = False
                self._die(f"the connection to the node broke: {error}")
                return
        while chunks:
            data = chunks.popleft()
            if not data:
                self._die("the node has closed the connection")
                return
            messages = self._reader.feed(data)
            if messages:
                self._receive(messages)

    def poll_now(self) -> None:
        """Take in what has arrived, without waiting."""
        if self._read_lock.acquire(blocking=False):
            try:
                while not self.dead and self._poll.poll(0):
                    self._take(False)
            finally:
                self._read_lock.release()

    def _die(self, why: str) -> None:
        if not self.dead:
            self.dead = why
            self._lost()
        with self._came:
            self._came.notify_all()

    # -- the background thread

    def read_in_background(self) -> None:
        """From now on messages are taken in also while no thread waits."""
        self.background = True
        self.arm()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="nbray-link", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start the background thread now."""
        if self._thread is None:
            self._start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        reading = False
        again = False
        while not self._closed:
            if self.background and not self.dead and not reading:
                poll.register(self.sock, select.POLLIN)
                reading = True
            elif self.dead and reading:
                poll.unregister(self.sock)
                reading = False
            events = poll.poll(100 if again else 1000 if self._armed else None)
            if self._closed:
                return
            woken = any(fd == self._wake_read for fd, _ in events)
            if woken:
                try:
                    os.read(self._wake_read, 4096)
                except BlockingIOError:
                    pass
            readable = reading and len(events) > woken
            if readable:
                idle = time.monotonic() - self.active
                if idle < AWAY and not self.dead:
                    # The program is using the link and will read: do not fight it for the interpreter.
                    time.sleep(AWAY - idle)
                if self._read_lock.acquire(blocking=False):
                    try:
                        if self._poll.poll(0) and not self.dead:
                            self._take(False)
                    finally:
                        self._read_lock.release()
                    if self._followers:
                        with self._came:
                            self._came.notify_all()
                else:
                    time.sleep(AWAY)
            if woken or again or self._armed:
                if self._armed:
                    time.sleep(BURST * 2)
                self._armed = False
                if not self.dead:
                    again = self.tidy()
                    self._flush()

    def close(self) -> None:
        """Close the connection; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.dead = self.dead or "disconnected"
        thread = self._thread
        if self._pid == os.getpid():
            try:
                os.write(self._wake_write, b"x")
            except OSError:
                pass
            if thread is not None and thread is not threading.current_thread():
                thread.join(2.0)
        self.sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
