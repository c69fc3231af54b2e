"""What a peer says before it closes a connection is heard, also by somebody who is about to send."""

from __future__ import annotations

import socket
from typing import Any

from nbray.messages import NodeToClient, Shutdown, Unpin
from nbray.transport.frames import FrameReader, encode_frame
from nbray.transport.link import Interrupts, Link


def test_who_cannot_send_any_more_hears_why() -> None:
    ours, theirs = socket.socketpair()
    heard: list[Any] = []
    lost: list[str] = []
    link = Link(
        ours, FrameReader(NodeToClient), [], heard.extend, lambda: None, lambda: lost.append(link.dead), Interrupts(),
        background_reads=False,
    )  # fmt: skip
    try:
        theirs.sendall(encode_frame([Shutdown("it was stopped by SIGTERM")]))
        theirs.close()
        link.out.append(Unpin([b"object"], [1]))
        link.flush()
        assert heard == [Shutdown("it was stopped by SIGTERM")]
        assert len(lost) == 1
        assert link.dead
    finally:
        link.close()
