"""When a wait spins before it sleeps."""

from __future__ import annotations

from nbray.transport.pace import REST, SPIN, Pace


def paced(*waits: float) -> Pace:
    pace = Pace()
    for wait in waits:
        pace.waited(wait)
    return pace


def test_nothing_is_known_at_first() -> None:
    assert not Pace().spins(0.0)


def test_short_waits_lead_to_spinning_and_long_ones_end_it() -> None:
    pace = paced(*[SPIN / 2] * 10)
    assert pace.spins(0.0)
    pace.waited(60.0)
    assert not pace.spins(0.0)
    for _ in range(10):
        pace.waited(SPIN / 2)
    assert pace.spins(0.0), "one long wait must not be remembered for ever"


def test_one_long_wait_among_short_ones_counts_no_more_than_its_share() -> None:
    assert not paced(*[SPIN / 2] * 10, 1e9).spins(0.0)
    assert paced(1e9, *[SPIN / 2] * 10).spins(0.0)


def test_no_spinning_while_others_want_the_cpu() -> None:
    pace = paced(*[SPIN / 2] * 10)
    pace.gave_way(SPIN / 2, 5.0)
    assert pace.spins(5.0), "a look of ordinary length is no reason"
    pace.gave_way(15 * SPIN, 5.0)
    assert not pace.spins(5.0)
    assert not pace.spins(5.0 + REST / 2)
    assert pace.spins(5.0 + REST)
