"""Whether a wait is likely to be so short that spinning costs less than being woken. Pure.

A process that sleeps is woken in 5 to 50 µs (a virtual CPU that idles has to be woken by its host first), which is most of a round trip of
100 µs with four wake-ups. So while waits are short, one that begins looks again and again for its end before it sleeps, for `SPIN` seconds at
most, and lets others have the CPU between two looks. Where others want it, a sleeper is served sooner than who gives way: then there is no
spinning for a while.
"""

from __future__ import annotations

SPIN = 0.0002
"""Seconds of looking before a wait sleeps."""

REST = 0.2
"""Seconds without spinning after others have wanted the CPU."""

_SHORT = 2 * SPIN
_MOST = 8 * SPIN
_WEIGHT = 0.25


class Pace:
    """How long the last waits took, and whether the CPU is wanted by others."""

    __slots__ = ("_mean", "_rests_until")

    def __init__(self) -> None:
        self._mean = _MOST
        self._rests_until = 0.0

    def waited(self, seconds: float) -> None:
        """A wait took so long."""
        self._mean += _WEIGHT * (min(seconds, _MOST) - self._mean)

    def gave_way(self, seconds: float, now: float) -> None:
        """Between two looks others have had the CPU for so long."""
        if seconds > SPIN:
            self._rests_until = now + REST

    def spins(self, now: float) -> bool:
        """Whether a wait that begins now should spin."""
        return self._mean < _SHORT and now >= self._rests_until
