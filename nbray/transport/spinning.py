"""Spinning before a wait sleeps; whether it is worth it is `nbray.transport.pace`'s decision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from nbray.transport.pace import SPIN, Pace

T = TypeVar("T")


def spin(pace: Pace, ready: Callable[[float], list[T]]) -> list[T]:
    """What is ready, as soon as something is, for a while; nothing at once if ``pace`` is against it. ``ready``: a poll that takes a timeout."""
    clock = time.monotonic
    now = clock()
    if not pace.spins(now):
        return []
    until = now + SPIN
    while now < until:
        found = ready(0)
        if found:
            return found
        os.sched_yield()
        before, now = now, clock()
        pace.gave_way(now - before, now)
    return []
