"""The other end of a connection, as the node's machine sees it: what it registered, what is to be sent to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbray.node.counts import CellCount
    from nbray.node.pool import Worker
    from nbray.scheduler.task import Kind


class Peer:
    """A driver, a worker or an observer. ``number`` is never used twice; as a holder it stands for the process."""

    __slots__ = (
        "cell", "count", "environment", "execution", "held", "job", "keep", "kinds", "label", "namespace", "number", "out", "pid", "process", "role", "session",
        "transient", "unsent", "urgent", "worker", "world", "worlds",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.role = ""
        self.pid = 0
        self.session = ""
        self.namespace = ""
        self.label = ""
        self.job = 0
        self.keep = False
        self.transient = False
        """Nobody comes back for it when its connection is lost."""
        self.execution = b""
        self.world = b""
        self.worlds: dict[bytes, None] = {}
        """The last `WORLDS` that it was in, which it need not send again."""
        self.process = b""
        self.environment = b""
        """Of a worker: the ``runtime_env`` that it was made for, which what its tasks submit inherits."""
        self.cell = ""
        self.held: dict[bytes, None] | None = None
        """Of a worker: what it holds and waits for (and perhaps more), so that its end costs no look at all other objects. Drivers end too seldom."""
        self.count: CellCount | None = None
        """Where the tasks of that cell are counted, once there is one."""
        self.kinds: dict[int, Kind] = {}
        self.out: list[Any] = []
        self.unsent = 0
        """Bytes that the shell could not send yet; it keeps this up to date."""
        self.urgent = False
        """Whether there is something in ``out`` that the peer waits for."""
        self.worker: Worker | None = None

    def __repr__(self) -> str:
        return f"<Peer {self.number} {self.role} pid {self.pid}>"
