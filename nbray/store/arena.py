"""Who may use which bytes of the shared memory: a pure allocator, no I/O.

The arena is a wide, sparse range of offsets (``span``, 8 times the limit) of which at most ``limit`` bytes are backed by memory at any
time. Every page is in one of three states:

* *used*: part of a block that somebody owns;
* *warm*: free but still backed by memory. Writing there is 5 to 50 times faster than into pages the kernel has yet to find and clear, the
  most so for the process that used them last and has them in its page table;
* *cold*: not backed by memory; all of the span at first.

A request takes the best-fitting warm run of the same client, else that of any client, else cold pages; when those would exceed the limit,
the least recently used warm runs are made cold first (`Arena.take_punches` tells the shell which). Because offsets are plentiful,
fragmentation costs offsets, never memory.

Invariants (`Arena.check`): blocks never overlap; used + warm <= limit; used + warm + cold = span.
Blocks of a page or more are page-aligned, whole pages; smaller ones share a page with blocks of the same power of two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from itertools import pairwise

PAGE = 4096
ALIGNMENT = 64

_COLD = -1
_SPAN_FACTOR = 8


class Block:
    """Bytes ``offset .. offset + size`` of the arena; ``size`` is what was asked for, rounded up; ``client``: who asked.

    ``warm``: whether the same client was the last to use these pages, and so has them in its page table.
    """

    __slots__ = ("client", "offset", "size", "warm")

    def __init__(self, offset: int, size: int, client: int, warm: bool) -> None:
        self.offset = offset
        self.size = size
        self.client = client
        self.warm = warm

    def __repr__(self) -> str:
        return f"Block({self.offset}, {self.size}, client={self.client})"


class _Run:
    """Free neighbouring pages of one kind: warm and last used by ``client``, or cold."""

    __slots__ = ("client", "length", "start")

    def __init__(self, start: int, length: int, client: int) -> None:
        self.start = start
        self.length = length
        self.client = client


class _BySize:
    """Runs found by best fit: O(log of the number of distinct lengths)."""

    __slots__ = ("_lengths", "_runs")

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._runs: dict[int, OrderedDict[int, _Run]] = {}

    def add(self, run: _Run) -> None:
        same = self._runs.get(run.length)
        if same is None:
            same = self._runs[run.length] = OrderedDict()
            insort(self._lengths, run.length)
        same[run.start] = run

    def remove(self, run: _Run) -> None:
        same = self._runs[run.length]
        del same[run.start]
        if not same:
            del self._runs[run.length]
            del self._lengths[bisect_left(self._lengths, run.length)]

    def best(self, length: int) -> _Run | None:
        """The shortest run of at least ``length`` bytes, of equals the one freed last (the likeliest to be in a cache)."""
        at = bisect_left(self._lengths, length)
        if at == len(self._lengths):
            return None
        same = self._runs[self._lengths[at]]
        return same[next(reversed(same))]

    def __bool__(self) -> bool:
        return bool(self._lengths)


class Arena:
    """Allocator of a shared memory. ``limit``: bytes that may be backed by memory; ``span``: bytes of offsets (both in whole pages)."""

    def __init__(self, limit: int, span: int | None = None) -> None:
        """Raises ValueError when ``limit`` is below a page or ``span`` below ``limit``."""
        self._limit = limit // PAGE * PAGE
        self._span = self._limit * _SPAN_FACTOR if span is None else span // PAGE * PAGE
        if self._limit < PAGE or self._span < self._limit:
            raise ValueError(
                f"an arena needs a limit of at least {PAGE} bytes and a span of at least the limit: {limit=}, {span=}"
            )
        self._used = 0
        self._warm = 0
        self._blocks: dict[int, Block] = {}
        self._starts: dict[int, _Run] = {}
        self._ends: dict[int, _Run] = {}
        self._cold_by_size = _BySize()
        self._warm_by_size = _BySize()
        self._own_by_size: dict[int, _BySize] = {}
        self._oldest_first: OrderedDict[int, _Run] = OrderedDict()
        self._punches: list[tuple[int, int]] = []
        # Pages cut into pieces of one size: piece size -> page -> offsets of its free pieces.
        self._cut: dict[int, OrderedDict[int, list[int]]] = {}
        self._add(_Run(0, self._span, _COLD))

    @property
    def limit(self) -> int:
        """Most bytes that may be used and warm together."""
        return self._limit

    @property
    def span(self) -> int:
        """All offsets lie below this."""
        return self._span

    @property
    def used(self) -> int:
        """Bytes of pages that hold blocks."""
        return self._used

    @property
    def warm(self) -> int:
        """Bytes of free pages that are backed by memory."""
        return self._warm

    def fits(self, size: int) -> bool:
        """Whether a block of ``size`` bytes could be had if everything else were freed."""
        return _round(size) <= self._limit

    def allocate(self, size: int, client: int) -> Block | None:
        """A block of at least ``size`` bytes for ``client`` (a number >= 0), or None when it does not fit now: free something first.

        Raises ValueError when it never will (see `fits`), or for a negative size or client.
        """
        if size < 0 or client < 0:
            raise ValueError(f"size and client must not be negative: {size=}, {client=}")
        rounded = _round(size)
        if rounded > self._limit:
            raise ValueError(
                f"a block of {size} bytes can never fit into an arena limited to {self._limit} bytes"
            )
        if rounded < PAGE:
            offset = self._take_piece(rounded, client)
            if offset is None:
                return None
            warm = True
        else:
            run = self._take(rounded, client)
            if run is None:
                return None
            offset = run.start
            warm = run.client == client
        block = self._blocks[offset] = Block(offset, rounded, client, warm)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; its pages stay warm. Raises ValueError when it is not in use."""
        if self._blocks.get(block.offset) is not block:
            raise ValueError(f"{block} is not in use: it was freed before, or belongs to another arena")
        del self._blocks[block.offset]
        if block.size >= PAGE:
            self._give_back(block.offset, block.size, block.client)
            return
        page = block.offset // PAGE * PAGE
        pages = self._cut[block.size]
        pieces = pages.setdefault(page, [])
        pieces.append(block.offset)
        if len(pieces) == PAGE // block.size:
            del pages[page]
            self._give_back(page, PAGE, block.client)

    def take_punches(self) -> list[tuple[int, int]]:
        """(offset, length) of pages that became cold since the last call.

        The caller gives their memory back to the kernel before it hands out the block that was allocated.
        """
        if not self._punches:
            return []
        punches: list[tuple[int, int]] = []
        for offset, length in sorted(self._punches):
            if punches and sum(punches[-1]) == offset:
                punches[-1] = (punches[-1][0], punches[-1][1] + length)
            else:
                punches.append((offset, length))
        self._punches = []
        return punches

    def cool(self, length: int) -> int:
        """Make up to ``length`` bytes of warm pages cold, least recently used first; returns how many (whole pages)."""
        before = self._warm
        self._punch(min(_pages(length), self._warm))
        return before - self._warm

    def check(self) -> None:
        """Assert the invariants; looks at every block, for tests."""
        regions = [(run.start, run.length) for run in self._starts.values()]
        used_pages = {
            page
            for block in self._blocks.values()
            if block.size < PAGE
            for page in [block.offset // PAGE * PAGE]
        }
        regions += [(page, PAGE) for page in used_pages]
        regions += [(block.offset, block.size) for block in self._blocks.values() if block.size >= PAGE]
        at = 0
        for start, length in sorted(regions):
            assert start == at, f"gap or overlap at {at}, next region at {start}"
            assert length > 0, f"empty region at {start}"
            assert (start | length) % PAGE == 0, f"region {start} of {length} bytes is not whole pages"
            at = start + length
        assert at == self._span, f"regions end at {at}, not at the span {self._span}"
        small = sorted((block.offset, block.size) for block in self._blocks.values() if block.size < PAGE)
        for (offset, size), (following, _) in pairwise(small):
            assert offset + size <= following, f"small blocks overlap at {following}"
        warm = sum(run.length for run in self._starts.values() if run.client != _COLD)
        cold = sum(run.length for run in self._starts.values() if run.client == _COLD)
        assert warm == self._warm, f"warm is {self._warm}, runs add up to {warm}"
        assert self._used + warm + cold == self._span, "used + warm + cold is not the span"
        assert self._used + self._warm <= self._limit, (
            f"used {self._used} + warm {self._warm} exceed the limit {self._limit}"
        )
        for run in self._starts.values():
            assert self._ends[run.start + run.length] is run, "a run is not found by its end"
            after = self._starts.get(run.start + run.length)
            assert after is None or after.client != run.client, (
                f"runs of one kind meet at {run.start + run.length}"
            )

    # -- small blocks

    def _take_piece(self, size: int, client: int) -> int | None:
        pages = self._cut.setdefault(size, OrderedDict())
        if not pages:
            run = self._take(PAGE, client)
            if run is None:
                return None
            pages[run.start] = list(range(run.start + PAGE - size, run.start - 1, -size))
        page = next(reversed(pages))
        pieces = pages[page]
        offset = pieces.pop()
        if not pieces:
            del pages[page]
        return offset

    # -- pages

    def _take(self, length: int, client: int) -> _Run | None:
        """Pages for a block: the run they are cut from the start of, which is no longer free."""
        own = self._own_by_size.get(client)
        run = (own.best(length) if own is not None else None) or self._warm_by_size.best(length)
        if run is None:
            excess = self._used + self._warm + length - self._limit
            if excess > self._warm:
                return None
            if excess > 0:
                self._punch(excess)
            run = self._cold_by_size.best(length)
            if run is None:
                # Only with a tight span: blocks in use and warm runs leave no cold run of this length.
                self._punch(self._warm)
                run = self._cold_by_size.best(length)
                if run is None:
                    return None
        self._remove(run)
        if run.length > length:
            self._add(_Run(run.start + length, run.length - length, run.client))
        self._used += length
        return run

    def _give_back(self, start: int, length: int, client: int) -> None:
        self._used -= length
        self._add(_Run(start, length, client))

    def _punch(self, length: int) -> None:
        while length > 0:
            run = self._oldest_first[next(iter(self._oldest_first))]
            self._remove(run)
            cut = min(length, run.length)
            rest = run.length - cut
            if rest:
                self._add(_Run(run.start, rest, run.client), oldest=True)
            self._add(_Run(run.start + rest, cut, _COLD))
            self._punches.append((run.start + rest, cut))
            length -= cut

    def _add(self, run: _Run, *, oldest: bool = False) -> None:
        """Insert a free run, joined with neighbours of its kind."""
        before = self._ends.get(run.start)
        if before is not None and before.client == run.client:
            self._remove(before)
            run.start = before.start
            run.length += before.length
        after = self._starts.get(run.start + run.length)
        if after is not None and after.client == run.client:
            self._remove(after)
            run.length += after.length
        self._starts[run.start] = run
        self._ends[run.start + run.length] = run
        if run.client == _COLD:
            self._cold_by_size.add(run)
            return
        self._warm += run.length
        self._warm_by_size.add(run)
        own = self._own_by_size.get(run.client)
        if own is None:
            own = self._own_by_size[run.client] = _BySize()
        own.add(run)
        self._oldest_first[run.start] = run
        if oldest:
            self._oldest_first.move_to_end(run.start, last=False)

    def _remove(self, run: _Run) -> None:
        del self._starts[run.start]
        del self._ends[run.start + run.length]
        if run.client == _COLD:
            self._cold_by_size.remove(run)
            return
        self._warm -= run.length
        self._warm_by_size.remove(run)
        own = self._own_by_size[run.client]
        own.remove(run)
        if not own:
            del self._own_by_size[run.client]
        del self._oldest_first[run.start]


def _pages(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE


def _round(size: int) -> int:
    """Whole pages, or below a page a power of two of at least ``ALIGNMENT``."""
    if size > PAGE // 2:
        return _pages(size)
    return max(ALIGNMENT, 1 << (size - 1).bit_length()) if size else ALIGNMENT
