"""A client's end of its connection: many threads send and wait, one at a time reads, an interrupt never tears a message.

The thread that waits does the reading itself: handing a message from a reader thread to a waiter costs more than the message. When several wait, one
reads for all and wakes the others. A background thread reads only while nobody waits, and sends what finalizers and output have left behind.

Interrupts: SIGINT in the main thread raises KeyboardInterrupt only while it waits in ``recv``, never between taking bytes from the socket and
keeping them, nor in the middle of a send. Bytes are moved from the socket into a deque by one call into C, which no signal handler can split.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the functions behind ``signal``: those make enums, for microseconds
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

from nbray import platform
from nbray.transport.frames import FrameReader, encode_frame
from nbray.transport.pace import Pace
from nbray.transport.spinning import spin

_SIGINT = int(signal.SIGINT)
_READ = 1 << 16  # Above 128 KB every read would map and unmap its buffer: three system calls more.
_ONE_READ = (_READ,)
_SLICE_SECONDS = 0.25
"""Longest time in one ``recv``: bounds what a signal that comes right before the system call can cost."""

FULL = 64
"""Messages after which they are sent although the program may add more."""

SOON = 0.003
"""Seconds within which the background thread sends what the program has left unsent."""

AWAY = 0.02
"""Seconds after the last activity of the program before the background thread reads."""

WATCH = 0.05
"""Seconds between looks of the background thread while another thread waits for messages."""

TIDY = 0.1
"""Seconds between looks for what can be given back."""

_IDLE_SECONDS = 2.0
"""The same in workers, which are interrupted by their node and ended by it if that is missed.
"""


class Interrupts:
    """Defers SIGINT of the main thread while the link must not be disturbed. A worker has its own kind of it."""

    def __init__(self) -> None:
        self.waiting = False
        self.depth = 0
        self._pending = False
        self._main = threading.main_thread().ident
        self._before: Any = None
        self._handler = self._arrived

    def enter(self) -> bool:
        """Begin to defer; False in threads that get no signals (then `leave` must not be called)."""
        if threading.get_ident() != self._main:
            return False
        if self.depth == 0:
            # An interrupt before the second call raises with nothing changed, after it none does.
            before = _signal.getsignal(_SIGINT)
            self._pending = False
            if callable(before):
                self._before = before
                _signal.signal(_SIGINT, self._handler)
            else:
                self._before = None
        self.depth += 1
        return True

    def leave(self) -> None:
        """End deferring: an interrupt that came meanwhile is raised now."""
        if self.depth > 1:
            self.depth -= 1
            return
        self.depth = 0
        before = self._before
        if before is not None:
            _signal.signal(_SIGINT, before)
            if self._pending:
                self._pending = False
                before(_SIGINT, None)

    def raise_pending(self) -> None:
        """At a safe point: raise what has come."""
        if self._pending:
            self._pending = False
            if self._before is not None:
                self._before(_SIGINT, None)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            self.waiting = False
            self._before(number, frame)
        else:
            self._pending = True


def greet(
    sock: socket.socket, hello: Any, incoming: Any, answers: tuple[type, ...]
) -> tuple[Any, list[Any], FrameReader[Any]]:
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
        spins: bool = False,
    ) -> None:
        """``spins``: a wait that will be short spins before it sleeps (`nbray.transport.pace`); needs a second CPU."""
        self.sock = sock
        self._pace = Pace() if spins else None
        self.out = out
        self.dead = ""
        self.tidy: Callable[[], bool] = lambda: False
        """Called by the background thread after sending; True: call again soon."""
        self.after_read: Callable[[], None] = lambda: None
        """Called after messages were taken in, in the thread that has read, when others may read again."""
        self.on_wake: dict[int, Callable[[], None]] = {}
        """What the background thread does when a byte of this value comes through `wake_descriptor` (a signal's number, say)."""
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
        self._waiters: list[int] = []
        self.active = 0.0
        """When the program last used the link (monotonic seconds)."""
        self.cold = True
        """Whether the background thread sleeps until something happens, so that it has to be woken."""
        self.background = background_reads
        # In a worker only a run that takes unexpectedly long keeps results from being sent: no need to look often.
        self._soon = SOON if background_reads else AWAY
        self.reader = 0
        """The thread that alone reads, because it goes on reading whatever the others do (0: whoever waits reads)."""
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = platform.pipe(blocking=False)
        self._closed = False
        self._pid = os.getpid()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        self._unsent = memoryview(b"")
        """What is left of the frame that is being sent."""
        sock.settimeout(None)
        # A timeout in the kernel instead of poll before each recv: one system call less per message. Workers wait at leisure.
        pause = _SLICE_SECONDS if background_reads else _IDLE_SECONDS
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(pause), int(pause % 1 * 1e6))
        )

    # -- sending

    def flush(self) -> None:
        """Send all of ``out``. The main thread can be interrupted while the node takes nothing in; what is left goes with the next flush."""
        shielded = self.interrupts.enter()
        try:
            self._flush(shielded)
        finally:
            if shielded:
                self.interrupts.leave()

    def _flush(self, shielded: bool = False) -> None:
        if self.dead:
            return
        with self._send_lock:
            self._before_send()
            out = self.out
            while self._unsent or out:
                if not self._unsent:
                    batch = out[:4096]
                    del out[: len(batch)]
                    self._unsent = memoryview(encode_frame(batch))
                try:
                    sent = self.sock.send(self._unsent, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    self._await_room(shielded)
                    continue
                except OSError as error:
                    # What the node has said last may say why.
                    self.poll_now()
                    self._die(f"the connection to the node broke: {error}")
                    return
                self._unsent = self._unsent[sent:]

    def _await_room(self, shielded: bool) -> None:
        """The node is busy, or holds drivers back until its history is written."""
        if shielded:
            self.interrupts.raise_pending()
            self.interrupts.waiting = True
        self._room.poll(_SLICE_SECONDS * 1000)
        self._waited(shielded)

    def _waited(self, shielded: bool) -> None:
        """A wait is over. In another thread than that which gets interrupts this says nothing of its waits."""
        if shielded:
            self.interrupts.waiting = False

    def later(self) -> None:
        """Messages were appended that need not go at once: they go with the next wait, when there are many, or from the background thread."""
        self.active = time.monotonic()
        if len(self.out) >= FULL:
            self.flush()
        elif self.cold:
            self.arm()

    def arm(self) -> None:
        """Have the background thread send soon. Safe in finalizers: no locks."""
        if not self.cold:
            return
        self.cold = False
        self.active = time.monotonic()
        if self._thread is None and not self._closed:
            self._start()
        try:
            os.write(self._wake_write, b"x")
        except OSError:
            pass

    # -- waiting

    def wait(self, satisfied: Callable[[], bool], deadline: float | None) -> bool:
        """Until ``satisfied()``; False when ``deadline`` (monotonic seconds) has passed. Raises KeyboardInterrupt in the main thread.

        Ends early (returning ``satisfied()``) when the peer is gone: look at `dead`.
        """
        interrupts = self.interrupts
        shielded = interrupts.enter()
        self._waiters.append(1)
        began = time.monotonic()
        try:
            self._flush(shielded)
            while not satisfied():
                if self.dead:
                    return satisfied()
                if shielded:
                    interrupts.raise_pending()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return self._last_look(satisfied)
                reads = self.reader in (0, threading.get_ident())
                if reads and self._read_lock.acquire(blocking=False):
                    try:
                        # Who held the lock may have read what this thread waits for.
                        if not satisfied():
                            self._read(left, shielded)
                    finally:
                        self._end_reading()
                    self.after_read()
                else:
                    self._follow(satisfied, left, shielded)
            return True
        finally:
            self._waiters.pop()
            self.active = now = time.monotonic()
            if self._pace is not None:
                self._pace.waited(now - began)
            if shielded:
                interrupts.leave()

    def _last_look(self, satisfied: Callable[[], bool]) -> bool:
        """The time is up: what has arrived already still counts."""
        self.poll_now()
        return satisfied()

    def _end_reading(self) -> None:
        """Others may read, and look at what this thread has read."""
        self._read_lock.release()
        if self._followers:
            self._notify()

    def _notify(self) -> None:
        with self._came:
            self._came.notify_all()

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
                self._waited(shielded)
                self._followers -= 1

    def _read(self, left: float | None, shielded: bool) -> None:
        if left is not None and left < _SLICE_SECONDS:
            if shielded:
                self.interrupts.waiting = True
            found = self._poll.poll(max(left, 0) * 1000)
            self._waited(shielded)
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
                if self._pace is not None and not self._followers:
                    spin(self._pace, self._poll.poll)
                chunks.extend(map(self.sock.recv, _ONE_READ))
                if shielded:
                    self.interrupts.waiting = False
            except BlockingIOError:
                self._waited(shielded)
                return
            except OSError as error:
                self._waited(shielded)
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
                self._end_reading()
            self.after_read()

    def take(self, unless: Callable[[], bool]) -> None:
        """Wait for messages for a while and take them in, unless another thread has brought something: for a loop that does nothing else."""
        if self._read_lock.acquire(blocking=False):
            try:
                if not unless():
                    self._take(False)
            finally:
                self._end_reading()
            self.after_read()
        else:
            self._follow(unless, None, False)

    def _die(self, why: str) -> None:
        if not self.dead:
            self.dead = why
            self._lost()
        self._notify()

    # -- the background thread

    def read_in_background(self) -> None:
        """From now on messages are taken in also while no thread waits."""
        self.background = True
        self.cold = True
        self.active = 0.0
        self.arm()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="nbray-link", daemon=True)
        self._thread.start()

    @property
    def waited_for(self) -> bool:
        """Whether some thread of the program waits for messages."""
        return bool(self._waiters)

    @property
    def wake_descriptor(self) -> int:
        """A byte written here wakes the background thread."""
        return self._wake_write

    def start(self) -> None:
        """Start the background thread now."""
        if self._thread is None:
            self._start()

    def _run(self) -> None:
        """Three gaits: while the program uses the link, look every few milliseconds for what it left unsent; while it waits, leave the socket to it; else
        sleep until something comes or `arm` wakes. Never fights the program for the interpreter.
        """
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        watching = False
        tidied = 0.0
        again = False
        while not self._ends():
            now = time.monotonic()
            reading = False
            if self._waiters:
                pause: float | None = WATCH
            elif now - self.active < AWAY:
                pause = self._soon
            else:
                self.cold = True
                reading = self.background and not self.reader and not self.dead
                pause = TIDY if again else None
                if self.out or now - self.active < AWAY or self._waiters:
                    pause = 0.0
            if reading != watching:
                watching = reading
                if reading:
                    poll.register(self.sock, select.POLLIN)
                else:
                    poll.unregister(self.sock)
            events = poll.poll(None if pause is None else pause * 1000)
            if self._ends():
                return
            self.cold = False
            for fd, _ in events:
                if fd == self._wake_read:
                    try:
                        woken = os.read(fd, 4096)
                    except BlockingIOError:
                        continue
                    for byte, action in self.on_wake.items():
                        if byte in woken:
                            action()
                            self._flush()
                elif time.monotonic() - self.active >= AWAY:
                    self._read_aside()
            if self.dead:
                continue
            now = time.monotonic()
            if now - tidied >= TIDY or not events:
                if now - tidied >= TIDY:
                    tidied = now
                    again = self.tidy()
                else:
                    # What finalizers have noted since then has not been looked at.
                    again = True
                self._flush()

    def _ends(self) -> bool:
        return self._closed

    def _read_aside(self) -> None:
        """Take in what has come, unless somebody does."""
        if self._read_lock.acquire(blocking=False):
            try:
                if self._poll.poll(0) and not self.dead:
                    self._take(False)
            finally:
                self._end_reading()
            self.after_read()

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
