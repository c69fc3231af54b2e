"""How much output goes on at once, and what is kept of the rest: pure machines, time passed in.

Tasks may print faster than anybody reads. The whole of it goes to log files (``nbray.logs``); what travels from a process to the next one is
bounded here: `Bucket` is the bound, `Feed` holds back what exceeds it, counts it, and always delivers the last lines of each task.
"""

from __future__ import annotations

from collections import OrderedDict

from nbray.messages import Output

TEXT_RATE = 256 * 1024
"""Bytes of text per second that one process sends on for long."""

TEXT_BURST = 1024 * 1024

MESSAGE_BYTES = 128
"""What a message costs besides its text."""

END_RATE = 256 * 1024
"""Bytes per second for the last lines of tasks that have ended, beside `TEXT_RATE`."""

END_BURST = 512 * 1024

TAIL = 4096
"""Characters kept of what a task wrote last."""

HELD = 256
"""Tasks whose last lines a feed keeps; of more tasks it keeps the number only."""


class Bucket:
    """An allowance that refills: ``rate`` per second, ``burst`` at most. Within t seconds never more than burst + rate x t is taken."""

    __slots__ = ("burst", "level", "rate", "since")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self.level = burst
        self.since = 0.0

    def refill(self, now: float) -> float:
        """What may be taken now."""
        if now > self.since:
            self.level = min(self.burst, self.level + (now - self.since) * self.rate)
            self.since = now
        return self.level

    def take(self, now: float, amount: float) -> bool:
        """Take it, if it is there. More than the whole burst is given when the bucket is full, and owed."""
        level = self.refill(now)
        if level < amount and level < self.burst:
            return False
        self.level = level - amount
        return True

    def give_back(self, amount: float) -> None:
        """Some of it was not used."""
        self.level = min(self.burst, self.level + amount)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `take` would succeed."""
        return max(0.0, (min(amount, self.burst) - self.refill(now)) / self.rate)


class _Held:
    """What was held back of one task: ``lines`` counted, the end of the text kept. ``tasks``: other tasks of which nothing is left."""

    __slots__ = ("cell", "ended", "lines", "name", "parts", "size", "tasks")

    def __init__(self, name: str, cell: str) -> None:
        self.name = name
        self.cell = cell
        self.lines = 0
        self.tasks = 0
        self.parts: list[tuple[str, str]] = []
        self.size = 0
        self.ended = False

    def add(self, stream: str, text: str) -> None:
        if len(text) >= TAIL:
            for _, old in self.parts:
                self.lines += old.count("\n")
            self.parts.clear()
            cut = _line_start(text, len(text) - TAIL)
            self.lines += text.count("\n", 0, cut)
            text = text[cut:]
            self.size = 0
        if self.parts and self.parts[-1][0] == stream:
            self.parts[-1] = (stream, self.parts[-1][1] + text)
        else:
            self.parts.append((stream, text))
        self.size += len(text)
        if self.size > 4 * TAIL:
            self._shorten()

    def _shorten(self) -> None:
        while self.size > TAIL:
            stream, first = self.parts[0]
            if self.size - len(first) >= TAIL:
                cut = len(first)
            else:
                cut = _line_start(first, self.size - TAIL)
            self.lines += first.count("\n", 0, cut)
            self.size -= cut
            if cut == len(first):
                del self.parts[0]
            else:
                self.parts[0] = (stream, first[cut:])
                if cut == 0 or self.size <= TAIL:
                    break

    def messages(self, task: bytes) -> list[Output]:
        self._shorten()
        found = [Output(task, stream, text, self.name, 0, self.cell) for stream, text in self.parts]
        if not found:
            found = [Output(task, "stdout", "", self.name, 0, self.cell)]
        found[0].skipped = self.lines
        found[0].tasks = self.tasks
        return found


def _line_start(text: str, at: int) -> int:
    """Where to cut a text at or after ``at``: after an end of line, if there is one."""
    if at <= 0:
        return 0
    end = text.find("\n", at - 1)
    return at if end < 0 or end + 1 >= len(text) else end + 1


class Feed:
    """The output of one process's tasks on its way: within the allowance as it comes; beyond it, counted, and the last lines when there is room again.

    A text that was held back goes before any later one of its task, so the order within a task is kept.
    """

    def __init__(self) -> None:
        self.bucket = Bucket(TEXT_RATE, TEXT_BURST)
        self.ends = Bucket(END_RATE, END_BURST)
        self.held: OrderedDict[bytes, _Held] = OrderedDict()

    def text(self, now: float, message: Output) -> list[Output]:
        """What to send on when a task has written something."""
        held = self.held.get(message.task)
        if held is None:
            if self.bucket.take(now, len(message.text) + MESSAGE_BYTES):
                return [message]
            held = self.held[message.task] = _Held(message.name, message.cell)
            held.add(message.stream, message.text)
            return self._bounded()
        held.add(message.stream, message.text)
        if self.bucket.refill(now) >= self.bucket.burst / 4:
            return self._release(now, message.task, self.bucket)
        return []

    def ended(self, now: float, task: bytes) -> list[Output]:
        """What to send on when a task has ended: its last lines, if some were held back."""
        held = self.held.get(task)
        if held is None:
            return []
        held.ended = True
        sent = self._release(now, task, self.ends)
        for message in sent:
            message.end = True
        return sent

    def tick(self, now: float) -> list[Output]:
        """What there is room for now."""
        found: list[Output] = []
        for task in list(self.held):
            held = self.held[task]
            ended = held.ended
            sent = self._release(now, task, self.ends if ended else self.bucket)
            for message in sent:
                message.end = ended
            found += sent
        return found

    def _release(self, now: float, task: bytes, bucket: Bucket) -> list[Output]:
        held = self.held[task]
        messages = held.messages(task)
        size = sum(len(message.text) + MESSAGE_BYTES for message in messages)
        if not bucket.take(now, size):
            return []
        del self.held[task]
        return messages

    def _bounded(self) -> list[Output]:
        """The oldest of too many tasks becomes a number in the next one."""
        if len(self.held) > HELD:
            _, old = self.held.popitem(last=False)
            oldest = next(iter(self.held.values()))
            oldest.tasks += 1 + old.tasks
            oldest.lines += old.lines + sum(text.count("\n") for _, text in old.parts)
        return []
