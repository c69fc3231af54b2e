"""The arena against a dumb model: what is handed out never overlaps, the limit holds, freed memory can be had again."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbray.store.arena import PAGE, Arena, Block

LIMIT = 64 * PAGE
SIZES = st.one_of(
    st.integers(0, PAGE), st.integers(PAGE, 8 * PAGE), st.integers(1, 64).map(lambda pages: pages * PAGE)
)


class ArenaAndModel(RuleBasedStateMachine):
    """The model: which byte belongs to whom, and which pages the kernel has given memory to."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(LIMIT)
        self.blocks: list[Block] = []
        self.resident: set[int] = set()
        self.random = random.Random(0)

    @rule(size=SIZES, client=st.integers(0, 3))
    def allocate(self, size: int, client: int) -> None:
        used = self.arena.used
        block = self.arena.allocate(size, client)
        for offset, length in self.arena.take_punches():
            assert offset % PAGE == length % PAGE == 0
            pages = set(range(offset // PAGE, (offset + length) // PAGE))
            assert pages <= self.resident, "punched pages that had no memory"
            self.resident -= pages
        if block is None:
            assert used + max(size, PAGE) > LIMIT - PAGE, f"refused {size} bytes with {used} of {LIMIT} used"
            return
        assert block.size >= size
        assert block.client == client
        assert block.offset % (PAGE if block.size >= PAGE else 64) == 0
        for other in self.blocks:
            assert block.offset + block.size <= other.offset or other.offset + other.size <= block.offset
        self.resident |= set(range(block.offset // PAGE, (block.offset + block.size + PAGE - 1) // PAGE))
        self.blocks.append(block)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.arena.free(self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1))))

    @rule(pages=st.integers(0, 70))
    def cool(self, pages: int) -> None:
        warm = self.arena.warm
        assert self.arena.cool(pages * PAGE) == min(pages * PAGE, warm)
        for offset, length in self.arena.take_punches():
            self.resident -= set(range(offset // PAGE, (offset + length) // PAGE))

    @invariant()
    def sound(self) -> None:
        self.arena.check()
        assert len(self.resident) * PAGE == self.arena.used + self.arena.warm <= LIMIT


ArenaAndModel.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestArenaAndModel = ArenaAndModel.TestCase


def test_a_freed_block_is_the_next_one_of_its_client() -> None:
    arena = Arena(LIMIT)
    mine, theirs = arena.allocate(4 * PAGE, client=1), arena.allocate(4 * PAGE, client=2)
    assert mine is not None
    assert theirs is not None
    arena.free(mine)
    arena.free(theirs)
    again = arena.allocate(4 * PAGE, client=1)
    assert again is not None
    assert again.offset == mine.offset
    assert again.warm
    assert not mine.warm, "fresh from the kernel"
    other = arena.allocate(4 * PAGE, client=3)
    assert other is not None
    assert other.offset == theirs.offset, "warm memory of another client is better than none"
    assert not other.warm, "but not in this client's page table"


def test_the_best_fit_is_taken_not_the_first() -> None:
    arena = Arena(LIMIT)
    wide, wall, narrow, _end = (arena.allocate(pages * PAGE, 0) for pages in (8, 1, 3, 1))
    assert wide is not None
    assert wall is not None
    assert narrow is not None
    arena.free(wide)
    arena.free(narrow)
    taken = arena.allocate(3 * PAGE, 0)
    assert taken is not None
    assert taken.offset == narrow.offset


def test_least_recently_used_memory_is_given_back_to_make_room() -> None:
    arena = Arena(8 * PAGE)
    old, wall, new = (arena.allocate(pages * PAGE, 0) for pages in (3, 1, 3))
    assert old is not None
    assert wall is not None
    assert new is not None
    arena.free(old)
    arena.free(new)
    block = arena.allocate(4 * PAGE, 0)
    assert block is not None
    assert arena.take_punches() == [(old.offset, 3 * PAGE)]
    assert arena.take_punches() == []


def test_fragmentation_costs_no_memory() -> None:
    arena = Arena(LIMIT)
    blocks = [arena.allocate(PAGE, 0) for _ in range(64)]
    assert arena.allocate(PAGE, 0) is None
    for block in blocks[::2]:
        assert block is not None
        arena.free(block)
    half = arena.allocate(32 * PAGE, 0)
    assert half is not None, "32 single pages are free, and so are 32 together"
    arena.check()


def test_warm_runs_that_were_pushed_together_serve_a_request_in_a_tight_span() -> None:
    arena = Arena(4 * PAGE, span=4 * PAGE)
    blocks = [arena.allocate(PAGE, client) for client in range(4)]
    for block in blocks:
        assert block is not None
        arena.free(block)
    whole = arena.allocate(4 * PAGE, 9)
    assert whole is not None
    assert whole.offset == 0
    assert arena.take_punches() == [(0, 4 * PAGE)]


def test_small_blocks_share_pages() -> None:
    arena = Arena(LIMIT)
    blocks = [arena.allocate(100, 0) for _ in range(64)]
    assert arena.used == 2 * PAGE, "64 times 128 bytes"
    for block in blocks:
        assert block is not None
        arena.free(block)
    assert arena.used == 0
    assert arena.warm == 2 * PAGE


def test_what_can_never_fit_is_told_apart_from_what_does_not_fit_now() -> None:
    arena = Arena(LIMIT)
    assert arena.fits(LIMIT)
    assert not arena.fits(LIMIT + 1)
    with pytest.raises(ValueError, match="can never fit"):
        arena.allocate(LIMIT + 1, 0)
    held = arena.allocate(PAGE, 0)
    assert held is not None
    assert arena.allocate(LIMIT, 0) is None
    arena.free(held)
    assert arena.allocate(LIMIT, 0) is not None


def test_freeing_twice_is_an_error() -> None:
    arena = Arena(LIMIT)
    block = arena.allocate(PAGE, 0)
    assert block is not None
    arena.free(block)
    with pytest.raises(ValueError, match="not in use"):
        arena.free(block)
    with pytest.raises(ValueError, match="negative"):
        arena.allocate(-1, 0)
    with pytest.raises(ValueError, match="limit of at least"):
        Arena(100)


def test_the_check_sees_overlapping_blocks() -> None:
    arena = Arena(LIMIT)
    block = arena.allocate(2 * PAGE, 0)
    assert block is not None
    block.size += PAGE
    with pytest.raises(AssertionError, match="overlap"):
        arena.check()
