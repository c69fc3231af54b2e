"""Bookkeeping of a cell that runs once per item: what is submitted when, what is done, what failed and how that is told. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

ITEMS_SHOWN = 5
"""Items that are named per error; the others are counted."""


@dataclass(frozen=True)
class Failure:
    """Why an item has no value. ``text``: the last line of the error; ``place``: the user's line that raised it, as people call it."""

    text: str
    place: str
    error: BaseException


class FanOut(Generic[V]):
    """``count`` items, of which at most ``window`` are submitted and not done. A key stands for a submission of an item."""

    def __init__(self, count: int, window: int) -> None:
        self.count = count
        self._window = window
        self._todo = deque(range(count))
        self._running: dict[Hashable, int] = {}
        self.values: dict[int, V] = {}
        self.failures: dict[int, Failure] = {}

    def take(self) -> int | None:
        """The next item to submit, None if none is left or enough are on their way; `began` or `refused` must follow."""
        if not self._todo or len(self._running) >= self._window:
            return None
        return self._todo.popleft()

    def began(self, key: Hashable, index: int) -> None:
        """The item is submitted."""
        self._running[key] = index

    def refused(self, index: int, failure: Failure) -> None:
        """The item could not be submitted."""
        self.failures[index] = failure

    def done(self, key: Hashable, value: V) -> int:
        """A submission has ended well; its item."""
        index = self._running.pop(key)
        self.values[index] = value
        return index

    def failed(self, key: Hashable, failure: Failure) -> int:
        """A submission has failed; its item."""
        index = self._running.pop(key)
        self.failures[index] = failure
        return index

    @property
    def open(self) -> bool:
        """Whether something is still to come."""
        return bool(self._todo or self._running)

    def abandon(self) -> None:
        """Nothing more is wanted; what has not ended is `missing`."""
        self._todo.clear()
        self._running.clear()

    def missing(self) -> list[int]:
        """Items without value and without error."""
        return [
            index for index in range(self.count) if index not in self.values and index not in self.failures
        ]

    def again(self) -> list[int]:
        """Begin anew with the items that have no value; which these are."""
        indices = [index for index in range(self.count) if index not in self.values]
        self.failures.clear()
        self._running.clear()
        self._todo = deque(indices)
        return indices


def groups(failures: Iterable[tuple[int, Failure]]) -> list[tuple[Failure, list[int]]]:
    """Failures that say the same, most frequent first: the first of each, and its items in order."""
    found: dict[tuple[str, str], tuple[Failure, list[int]]] = {}
    for index, failure in sorted(failures, key=lambda pair: pair[0]):
        found.setdefault((failure.text, failure.place), (failure, []))[1].append(index)
    return sorted(found.values(), key=lambda group: (-len(group[1]), group[1][0]))


def told(name: str, shown: Sequence[str], grouped: Sequence[tuple[Failure, list[int]]]) -> list[str]:
    """Lines that tell of failed items. ``shown``: each item, as short text."""
    lines = []
    for failure, indices in grouped:
        place = f" ({failure.place})" if failure.place else ""
        lines.append(f"{len(indices)} x {failure.text}{place}")
        items = ", ".join(shown[index] for index in indices[:ITEMS_SHOWN])
        more = f" and {len(indices) - ITEMS_SHOWN} more" if len(indices) > ITEMS_SHOWN else ""
        lines.append(f"    {name} = {items}{more}")
    return lines


def lists(
    names: Iterable[str], results: Sequence[object], values: Sequence[dict[str, object] | None]
) -> dict[str, list[object]]:
    """name -> one value per item: what the item bound, None if it did not, and for an item without values what ``results`` has for it."""
    return {
        name: [
            result if found is None else found.get(name)
            for result, found in zip(results, values, strict=True)
        ]
        for name in names
    }
