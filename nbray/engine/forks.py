"""Children that the user's code forks: what they look at stays, as long as they live.

A child shares the memory that its parent looks at, but may not use the parent's connection. The end of a pipe that only the child and its
own children hold tells when nobody of them looks any more.
"""

from __future__ import annotations

import os
import select

from nbray import platform


class Forks:
    """The children of one process that may look at objects. Truth: whether there are any."""

    def __init__(self) -> None:
        self._beginning: tuple[int, int, list[bytes]] | None = None
        self._living: list[tuple[int, list[bytes]]] = []

    def __bool__(self) -> bool:
        return bool(self._living)

    def begin(self, viewed: list[bytes]) -> None:
        """Right before a fork: the child will look at these objects."""
        self._beginning = None
        if viewed:
            try:
                self._beginning = (*platform.pipe(blocking=True), viewed)
            except OSError:
                return

    def end(self, *, child: bool) -> list[bytes]:
        """Right after it, on both sides: the objects that the child looks at."""
        beginning, self._beginning = self._beginning, None
        if beginning is None:
            return []
        read, write, viewed = beginning
        if child:
            os.close(read)
        else:
            os.close(write)
            self._living.append((read, viewed))
        return viewed

    def ended(self) -> list[bytes]:
        """Objects that children looked at who have ended since the last call, once per child."""
        poll = select.poll()
        for read, _ in self._living:
            poll.register(read, select.POLLIN)
        ends = {fd for fd, _ in poll.poll(0)}
        found: list[bytes] = []
        for fork in [fork for fork in self._living if fork[0] in ends]:
            self._living.remove(fork)
            os.close(fork[0])
            found += fork[1]
        return found

    def close(self) -> None:
        """Nobody needs to know any more."""
        for read, _ in self._living:
            os.close(read)
        self._living.clear()
