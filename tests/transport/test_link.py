"""Threads that share a link: what one does is not to be felt by the others."""

from __future__ import annotations

import socket
import threading
import time

from nbray.messages import NodeToClient
from nbray.transport.frames import FrameReader
from nbray.transport.link import Interrupts, Link


def test_a_wait_in_another_thread_leaves_the_main_threads_open_to_interrupts() -> None:
    here, there = socket.socketpair()
    interrupts = Interrupts()
    reader: FrameReader[object] = FrameReader(NodeToClient)
    link = Link(
        here,
        reader,
        [],
        lambda messages: None,
        lambda: None,
        lambda: None,
        interrupts,
        background_reads=True,
    )
    try:
        # As the main thread does when it reads: the lock is its own, and a signal may raise.
        with link._read_lock:
            interrupts.waiting = True
            for seconds in (0.0, 0.03):
                deadline = time.monotonic() + seconds
                other = threading.Thread(target=link.wait, args=(lambda: False, deadline))
                other.start()
                other.join()
                assert interrupts.waiting
    finally:
        link.close()
        there.close()
