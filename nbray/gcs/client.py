"""The node's side of the GCS: events kept until they are acknowledged, requests kept until they are answered.

Pure: the node's loop does the I/O. It appends events to `GcsClient.tasks` and `GcsClient.facts` (nothing else on the hot path), sends
what `GcsClient.output` returns, and passes what comes in to `GcsClient.receive`. When the connection is lost it connects again
and calls `GcsClient.connected`: what the head does not have is then sent again, in order (protocol section 8).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from nbray.events import Fact, Page, TaskEvent
from nbray.gcs.messages import (
    Ack,
    Batch,
    HeadToNode,
    NodeRegistered,
    NodeToHead,
    Op,
    Operation,
    OpReply,
    Query,
    QueryReply,
    RegisterNode,
    Stop,
    Trouble,
)

_encode = msgspec.msgpack.Encoder().encode
_decode_page = msgspec.msgpack.Decoder(Page).decode

EVENT_BYTES = 256
"""What an event that is in no batch yet counts as, about."""

_TASKS, _FACTS = frozenset({"tasks", "summary"}), frozenset({"actors", "workers"})


class Settled(NamedTuple):
    """A request that has got its answer, or never will.

    ``context``: what the caller gave with the request. ``error``: empty, or the name of a class of ``nbray.errors`` and ``data`` its text.
    ``ok`` and ``data``: as `OpReply`; for a query ``data`` is the answer, and ``page`` the same, decoded, where the answer is a `Page`.
    """

    context: Any
    error: str
    ok: bool
    data: bytes
    page: Page | None = None


class _Request:
    __slots__ = ("context", "deadline", "message", "pending", "sent")

    def __init__(
        self, message: Op | Query, context: Any, deadline: float, pending: list[Batch] | None
    ) -> None:
        self.message = message
        self.context = context
        self.deadline = deadline
        self.pending = pending
        self.sent = False


class GcsClient:
    """What one incarnation of a node knows of its conversation with the head.

    ``batch`` events or ``interval`` seconds close a batch, whatever is first. At most ``window`` bytes are under way unacknowledged, so that a
    head that cannot write does not fill up either; above ``limit`` bytes of backlog `full` asks the node to slow submissions down.
    A request not answered within ``patience`` seconds fails with GcsUnavailableError.
    """

    def __init__(
        self,
        registration: RegisterNode,
        *,
        batch: int = 1000,
        interval: float = 0.05,
        window: int = 2 << 20,
        limit: int = 64 << 20,
        patience: float = 60.0,
    ) -> None:
        self.tasks: list[TaskEvent] = []
        """Append the record of each ended task here."""
        self.facts: list[Fact] = []
        """Append all other events here."""
        self.registered = False
        """The head has accepted this incarnation on the current connection."""
        self.refused = ""
        """Why the head wants nothing to do with this incarnation: the node has to end."""
        self.trouble = ""
        """What keeps the head from writing, empty if nothing."""
        self.acknowledged = 0
        """Sequence number of the last batch known to be on the head's disk."""
        self.backlog = 0
        """Bytes of the batches that are not acknowledged."""
        self._registration = registration
        self._batch, self._interval, self._window, self._limit, self._patience = (
            batch,
            interval,
            window,
            limit,
            patience,
        )
        self._batches: deque[Batch] = deque()
        self._unsent = 0
        self._under_way = 0
        self._sequence = 0
        self._close_at = 0.0
        self._requests: dict[int, _Request] = {}
        self._next_request = 1
        self._waiting = False

    # -- what the node does

    @property
    def full(self) -> bool:
        """So much is unacknowledged that submissions should wait."""
        return self.backlog + EVENT_BYTES * len(self.tasks) >= self._limit

    def operate(self, operation: Operation, now: float, context: Any = None) -> int:
        """Ask for an operation; its `Settled` comes from `receive` or `expire`. Operations are carried out in this order."""
        number = self._next_request
        settled = next((n for n, r in self._requests.items() if isinstance(r.message, Op)), number) - 1
        return self._request(Op(number, settled, operation), now, context, None)

    def query(self, what: str, argument: bytes, now: float, context: Any = None) -> int:
        """Ask a question (``what`` and ``argument`` as in `Query`).

        A Page of history in the answer includes what the head does not have: all that was appended until `receive` settled the question.
        """
        pending = list(self._batches) if what in _TASKS or what in _FACTS else None
        return self._request(Query(self._next_request, what, argument), now, context, pending)

    def output(self, now: float) -> list[NodeToHead]:
        """What to send now, in order. Cheap when there is nothing; call it whenever the loop is about to wait."""
        tasks, facts = self.tasks, self.facts
        if (tasks or facts) and (now >= self._close_at or len(tasks) + len(facts) >= self._batch):
            self._close(now)
        if not self.registered or not (self._unsent or self._waiting):
            return []
        messages: list[NodeToHead] = list(self._take(self._window))
        if self._waiting:
            self._waiting = False
            for request in self._requests.values():
                if not request.sent:
                    request.sent = True
                    messages.append(request.message)
        return messages

    def deadline(self) -> float | None:
        """When `output` and `expire` should be called next, None for not before something happens."""
        times = [r.deadline for r in self._requests.values()]
        if self.tasks or self.facts:
            times.append(self._close_at)
        return min(times, default=None)

    def stop(self, now: float, reason: str = "") -> list[NodeToHead]:
        """All that the head does not have, and the request to end; the head answers by closing the connection when all is on disk."""
        self._close(now)
        return [*self._take(None), Stop(reason)]

    # -- what happens to it

    def connected(self) -> list[NodeToHead]:
        """There is a new connection: the first messages on it."""
        self.registered = False
        return [self._registration]

    def disconnected(self) -> None:
        """The connection is gone: nothing is under way any more."""
        self.registered = False

    def receive(self, messages: Iterable[HeadToNode]) -> list[Settled]:
        """Take in what the head said; the requests that this settles."""
        settled: list[Settled] = []
        for message in messages:
            if type(message) is Ack:
                self._acknowledge(message.sequence)
            elif type(message) is OpReply:
                request = self._requests.pop(message.request, None)
                if request is not None:
                    settled.append(Settled(request.context, "", message.ok, message.data))
            elif type(message) is QueryReply:
                request = self._requests.get(message.request)
                if request is not None:
                    if request.pending is not None:
                        self._close(self._close_at)
                    del self._requests[message.request]
                    settled.append(_answer(request, message, self._registration.node))
            elif type(message) is NodeRegistered:
                self._start(message)
            elif type(message) is Trouble:
                self.trouble = message.text
        return settled

    def expire(self, now: float) -> list[Settled]:
        """The requests whose patience has run out; they are not sent again."""
        late = [n for n, r in self._requests.items() if r.deadline <= now]
        return [
            Settled(self._requests.pop(n).context, "GcsUnavailableError", False, self._excuse()) for n in late
        ]

    # -- inside

    def _request(self, message: Op | Query, now: float, context: Any, pending: list[Batch] | None) -> int:
        self._requests[message.request] = _Request(message, context, now + self._patience, pending)
        self._next_request += 1
        self._waiting = True
        return message.request

    def _close(self, now: float) -> None:
        tasks, facts = self.tasks, self.facts
        if not tasks and not facts:
            return
        self._sequence += 1
        batch = Batch(
            self._registration.incarnation,
            self._sequence,
            len(tasks),
            _encode(tasks) if tasks else b"",
            _encode(facts) if facts else b"",
        )
        tasks.clear()
        facts.clear()
        self._batches.append(batch)
        for request in self._requests.values():
            if request.pending is not None:
                request.pending.append(batch)
        self._unsent += 1
        self.backlog += _size(batch)
        self._close_at = now + self._interval

    def _take(self, window: int | None) -> list[Batch]:
        """The next unsent batches, as many as the window allows (all, without one): at least one if nothing is under way."""
        first = len(self._batches) - self._unsent
        batches: list[Batch] = []
        while self._unsent and (window is None or not self._under_way or self._under_way < window):
            batch = self._batches[first + len(batches)]
            batches.append(batch)
            self._unsent -= 1
            self._under_way += _size(batch)
        return batches

    def _acknowledge(self, sequence: int) -> None:
        batches = self._batches
        self.acknowledged = max(self.acknowledged, sequence)
        while batches and batches[0].sequence <= sequence:
            size = _size(batches[0])
            if len(batches) == self._unsent:
                # Written by the head on an earlier connection whose acknowledgement was lost with it.
                self._unsent -= 1
            else:
                self._under_way -= size
            self.backlog -= size
            batches.popleft()

    def _start(self, message: NodeRegistered) -> None:
        if message.error:
            self.refused = message.error
            return
        self.registered = True
        self._unsent = len(self._batches)
        self._under_way = 0
        self._acknowledge(message.sequence)
        self.trouble = ""
        for request in self._requests.values():
            request.sent = False
        self._waiting = bool(self._requests)

    def _excuse(self) -> bytes:
        what = (
            f"it cannot write: {self.trouble}"
            if self.trouble
            else "it is restarted automatically; the cluster's log says why it ended"
        )
        return (
            f"the head process did not answer within {self._patience:g} s ({what}). Running tasks go on; repeat the call later."
        ).encode()


def _size(batch: Batch) -> int:
    return len(batch.tasks) + len(batch.facts) + 64


def _answer(request: _Request, message: QueryReply, node: str) -> Settled:
    if message.error:
        return Settled(request.context, "ValueError", False, message.error.encode())
    what = request.message.what if isinstance(request.message, Query) else ""
    if what in ("function", "head"):
        return Settled(request.context, "", True, message.data)
    page = _decode_page(message.data)
    if request.pending:
        newer = [(b.tasks if what in _TASKS else b.facts) for b in _since(request.pending, page.sequence)]
        page.history.extend((node, blob) for blob in newer if blob)
        return Settled(request.context, "", True, _encode(page), page)
    return Settled(request.context, "", True, message.data, page)


def _since(batches: Sequence[Batch], sequence: int) -> list[Batch]:
    return [batch for batch in batches if batch.sequence > sequence]
