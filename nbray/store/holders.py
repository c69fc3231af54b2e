"""Who holds an object: sets, never counts (protocol section 2).

A holder is a process (its connection's number, int), or a task, a container object or a name (bytes). Adding and removing are idempotent. Nearly
every object has one holder at a time, so a set of one is stored as the holder itself and the empty set as None: 200 bytes less per object.
"""

from __future__ import annotations

from collections.abc import Iterable

Holder = int | bytes
Holders = Holder | set[Holder] | None


def add(holders: Holders, holder: Holder) -> Holders:
    """The set with ``holder``; the old one must not be used any more."""
    if holders is None or holders == holder:
        return holder
    if isinstance(holders, set):
        holders.add(holder)
        return holders
    return {holders, holder}


def remove(holders: Holders, holder: Holder) -> Holders:
    """The set without ``holder``; the old one must not be used any more."""
    if isinstance(holders, set):
        holders.discard(holder)
        if len(holders) == 1:
            return next(iter(holders))
        return holders
    return None if holders == holder else holders


def contains(holders: Holders, holder: Holder) -> bool:
    """Whether ``holder`` is in the set."""
    return holder in holders if isinstance(holders, set) else holders == holder and holders is not None


def each(holders: Holders) -> Iterable[Holder]:
    """The holders in an order that does not depend on hashing: processes first."""
    if holders is None:
        return ()
    if isinstance(holders, set):
        return sorted(holders, key=lambda h: (isinstance(h, bytes), h))
    return (holders,)
