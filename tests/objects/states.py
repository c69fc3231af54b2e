"""What the node knows of objects, and waiting until it knows something else."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 8.0


def eventually(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """The first true value of ``condition()``; fails with its last value when there is none within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what} (last: {found!r})"
        time.sleep(0.01)
    return found


def memory() -> dict[str, int]:
    """Bytes and numbers of the node's store."""
    from nbray.api import context

    found: dict[str, int] = context.require().engine.query("memory")
    return found


def objects() -> dict[str, dict[str, Any]]:
    """Hex id -> size_bytes, state and holders of all objects of the node."""
    import nbray

    return {row["object_id"]: row for row in nbray.state.objects().to_pylist()}


def await_empty() -> None:
    """Nothing is left in the node's table, and none of the arena or the disk is in use."""

    def used() -> dict[str, int]:
        found = memory()
        return {name: found[name] for name in ("objects", "used", "inline", "spilled") if found[name]}

    gc.collect()
    deadline = time.monotonic() + SECONDS
    while used() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not used(), f"{used()} left: {objects()}"


def in_store(address: int) -> bool:
    """Whether an address of this process lies in a shared mapping of the arena (in a private one: False)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_, name = line.split(maxsplit=5) if len(line.split()) > 5 else (*line.split(), "")
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return mode.endswith("s") and "memfd" in name
    return False
