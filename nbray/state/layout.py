"""An append-only layered layout: nodes come one by one and never move. The same as ``extension/src/layout.ts``, pinned by shared fixtures.

A node's column is one more than the largest column of its parents, its row the rounded mean of their rows, or the nearest free one. Global layout
engines took seconds for 1,000 nodes; this takes about a microsecond per node, whatever the number, so that a graph can be drawn while it grows.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Column:
    """Which rows are taken: ``up`` and ``down`` lead from a taken row towards the next free one, with path compression.

    Looking row by row for a free one would be quadratic when one task has many children.
    """

    __slots__ = ("down", "up")

    def __init__(self) -> None:
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}

    def take_nearest(self, wanted: int) -> int:
        above = _end(self.up, wanted)
        below = _end(self.down, wanted)
        row = above if below < 0 or above - wanted <= wanted - below else below
        self.up[row] = row + 1
        self.down[row] = row - 1
        return row


def _end(links: dict[int, int], start: int) -> int:
    end = start
    while end in links:
        end = links[end]
    while start != end:
        following = links[start]
        links[start] = end
        start = following
    return end


class Layered:
    """Places of nodes, numbered in the order of `place`. ``columns``, ``rows``: of each node, both from 0."""

    def __init__(self) -> None:
        self.columns: list[int] = []
        self.rows: list[int] = []
        self._taken: list[_Column] = []

    def place(self, parents: Sequence[int]) -> int:
        """Place the next node, whose parents (nodes placed before; may repeat) are given. Returns its number."""
        column = 0
        total = 0
        for parent in parents:
            column = max(column, self.columns[parent] + 1)
            total += self.rows[parent]
        count = len(parents)
        wanted = (2 * total + count) // (2 * count) if count else 0
        while len(self._taken) <= column:
            self._taken.append(_Column())
        self.columns.append(column)
        self.rows.append(self._taken[column].take_nearest(wanted))
        return len(self.columns) - 1
