"""Simulated time: one heap of events, streams between processes, one source of randomness, a log with a digest.

Nothing here or above it looks at a real clock, at threads or at another source of randomness, so a seed always replays the same run, whatever
PYTHONHASHSEED is. Order is kept within a stream and nowhere else: what two processes say to a third arrives as drawn latencies have it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import Any

STORY_LINES = 40
"""Last lines of the log that a failure shows."""


class BrokenInvariantError(AssertionError):
    """The simulation found what must never be."""


class World:
    """Time, randomness and the log of one run. ``echo`` is called with each line of the log as it is written."""

    def __init__(self, seed: int, echo: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 1000.0
        self.steps = 0
        self.lines: deque[str] = deque(maxlen=STORY_LINES)
        self.echo = echo
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._digest = blake2b(digest_size=8)

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        """Call this ``delay`` seconds from now (what is due at the same time goes in the order of these calls)."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + max(delay, 0.0), self._sequence, call, args))

    def step(self) -> bool:
        """The next event; False when there is none."""
        if not self._heap:
            return False
        self.now, _, call, args = heapq.heappop(self._heap)
        self.steps += 1
        call(*args)
        return True

    def log(self, text: str) -> None:
        line = f"{self.now - 1000.0:11.6f} {text}"
        self._digest.update(line.encode())
        self.lines.append(line)
        if self.echo is not None:
            self.echo(line)

    def echo_only(self, text: str) -> None:
        """A line for who reads along; it is not part of the log."""
        if self.echo is not None:
            self.echo(f"{self.now - 1000.0:11.6f}   {text}")

    def digest(self) -> str:
        """Of the log so far."""
        return self._digest.hexdigest()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Stream:
    """One direction of a connection: keeps order, delays. ``slow``: seconds that a message may take at most."""

    def __init__(self, world: World, deliver: Callable[[list[Any]], None], slow: float) -> None:
        self.world = world
        self.flight: deque[list[Any]] = deque()
        self._deliver = deliver
        self._slow = slow
        self._last = 0.0
        self._cut = False

    def send(self, messages: list[Any]) -> None:
        if self._cut:
            return
        world = self.world
        latency = (
            world.random.uniform(0.00001, 0.00005)
            if world.chance(0.8)
            else world.random.uniform(0.0, self._slow)
        )
        self._last = max(self._last, world.now + latency)
        self.flight.append(messages)
        world.after(self._last - world.now, self._arrive)

    def _arrive(self) -> None:
        if not self._cut:
            self._deliver(self.flight.popleft())

    def cut(self) -> list[list[Any]]:
        """Nothing is delivered any more; what was under way."""
        self._cut = True
        rest = list(self.flight)
        self.flight.clear()
        return rest
