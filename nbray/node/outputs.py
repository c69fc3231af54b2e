"""What tasks print, on its way through a node to the drivers of their session. Bounded: output never fills the node nor delays results. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbray.flow import TAIL, Feed
from nbray.messages import DRIVER, Output

if TYPE_CHECKING:
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.node.pool import Worker

WINDOW = 1024 * 1024
"""Unsent bytes of a driver's connection above which text is held back for it: it does not read."""

PICTURE_WINDOW = 32 * 1024 * 1024
"""The same for what tasks display."""

LATE = 1000
"""Tasks whose last text is kept for a driver that does not read."""


class Outputs:
    """Forwards what workers say, and what they write below Python."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.late: dict[int, dict[bytes, Output]] = {}
        """Driver -> task -> its last text, of those that could not be forwarded."""
        self.raw: dict[int, tuple[Peer, Feed]] = {}
        """Per worker whose raw output exceeds the allowance: what is held back of it."""

    def on_output(self, peer: Peer, message: Output) -> None:
        """A worker's message goes to every driver of its session."""
        message.pid = peer.pid
        for other in self.node.peers.values():
            if other.role == DRIVER and other.session == peer.session:
                self._forward(other, message)

    def _forward(self, driver: Peer, message: Output) -> None:
        late = self.late.get(driver.number)
        if message.stream == "display":
            if driver.unsent <= PICTURE_WINDOW:
                self.node.send(driver, message)
            return
        if late is None and driver.unsent <= WINDOW:
            self.node.send(driver, message)
            return
        if late is None:
            late = self.late[driver.number] = {}
        self._keep(late, message)

    def _keep(self, late: dict[bytes, Output], message: Output) -> None:
        """The last text of each task; what it replaces is counted."""
        kept = Output(
            message.task, message.stream, message.text, message.name, message.pid, message.cell,
            message.skipped, message.tasks, message.end,
        )  # fmt: skip
        before = late.pop(message.task, None)
        if before is None and len(late) >= LATE:
            before = late.pop(next(iter(late)))
            kept.tasks += 1
        if before is not None:
            kept.skipped += before.skipped + before.text.count("\n")
            kept.tasks += before.tasks
        if len(kept.text) > TAIL:
            kept.skipped += kept.text.count("\n", 0, -TAIL)
            kept.text = kept.text[-TAIL:]
        late[message.task] = kept

    def settle(self) -> None:
        """Drivers that read again get what was kept for them. Call it only while there is something ``late``."""
        for number in list(self.late):
            driver = self.node.peers.get(number)
            if driver is None:
                del self.late[number]
            elif driver.unsent <= WINDOW // 2:
                for message in self.late.pop(number).values():
                    self.node.send(driver, message)

    # -- below Python

    def raw_output(self, worker: Worker, stream: str, text: str) -> Output | None:
        """A worker wrote to its file descriptors, which carry no task: it is the one that runs there now. None if nobody will see it."""
        peer = worker.peer
        if peer is None or not peer.session:
            return None
        # What a task wrote right before its end may be read after its report.
        task = worker.pending[0] if worker.pending else worker.last
        message = (
            Output(b"", stream, text)
            if task is None
            else Output(task.id, stream, text, task.name, worker.pid, task.cell)
        )
        known = self.raw.get(worker.number)
        feed = known[1] if known is not None else Feed()
        self.raw[worker.number] = (peer, feed)
        for sent in feed.text(self.node.now, message):
            self.on_output(peer, sent)
        return message

    def tick(self, now: float) -> float:
        """Send what there is room for by now; seconds until the next look. Call it only while there is something ``raw``."""
        waiting = False
        for number, (peer, feed) in list(self.raw.items()):
            for message in feed.tick(now):
                self.on_output(peer, message)
            if feed.held:
                waiting = True
            elif feed.bucket.refill(now) >= feed.bucket.burst:
                del self.raw[number]
            else:
                waiting = True
        return 0.1 if waiting else 5.0

    def ended(self, task: bytes, worker: Worker) -> None:
        """A task has ended: the last lines that it wrote below Python go before its result."""
        known = self.raw.get(worker.number)
        if known is not None:
            for message in known[1].ended(self.node.now, task):
                self.on_output(known[0], message)

    def worker_gone(self, number: int) -> None:
        """What a worker that has ended had written last goes out."""
        known = self.raw.pop(number, None)
        if known is not None:
            for task in list(known[1].held):
                for message in known[1].ended(self.node.now, task):
                    self.on_output(known[0], message)
