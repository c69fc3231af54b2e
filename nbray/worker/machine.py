"""Which run a worker may start next. Pure: no I/O, no clock.

Runs come through the socket, in order; permission to start one that was dispatched ahead comes as a byte through the token pipe, which the node can
read too: a byte that the node has read back is a run that will never start here (protocol section 5). The two ways are not in step. A token may be
there before its run, and the `Revoke` of a run after the token of a later one; so a token in hand is kept until its run comes, runs in front of that
which need a token have been taken back, and runs that need none start whenever they are in front.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from nbray.messages import Exit, Register, Revoke, Run, Shutdown, TaskClass

NO_TOKEN = -1


class WorkerMachine:
    """The dispatched runs of one worker. The shell calls `take_in` with what the node said, `next_run` when it could start something."""

    __slots__ = ("kinds", "leaving", "queue", "token")

    def __init__(self) -> None:
        self.queue: deque[Run] = deque()
        self.kinds: dict[int, TaskClass] = {}
        self.leaving = False
        """The node wants this worker to end after what it has."""
        self.token = NO_TOKEN
        """A token that was read and whose run has not come yet."""

    def take_in(self, message: Any) -> bool:
        """What the node said about runs; False when the message is about something else."""
        kind = type(message)
        if kind is Run:
            self.queue.append(message)
        elif kind is Register:
            self.kinds[message.number] = message.spec
        elif kind is Revoke:
            runs = set(message.runs)
            kept = [run for run in self.queue if run.run not in runs]
            self.queue.clear()
            self.queue.extend(kept)
        elif kind is Exit or kind is Shutdown:
            self.leaving = True
        else:
            return False
        return True

    @property
    def wants_token(self) -> bool:
        """The run in front may start when its token is read: put that into ``token``."""
        return bool(self.queue) and self.token < 0

    @property
    def done(self) -> bool:
        """Nothing is left to run and nothing more will come."""
        return self.leaving and not self.queue

    def next_run(self) -> Run | None:
        """The run to start now; None when there is none, or its token has to be read first (`wants_token`)."""
        queue = self.queue
        while queue:
            if queue[0].started:
                return queue.popleft()
            token = self.token
            if token < 0:
                return None
            run = queue.popleft()
            if run.run & 0xFF == token:
                self.token = NO_TOKEN
                return run
        return None
