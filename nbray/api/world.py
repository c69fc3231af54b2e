"""The driver's world, as its tasks are to see it: what changes in it is noticed at the next submission (design section 3)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from nbray import ids
from nbray.messages import World as WorldMessage
from nbray.worker import world as worlds

if TYPE_CHECKING:
    from nbray.engine.local import LocalEngine


class WorldWatch:
    """Tells the node when the working directory, the environment or ``sys.path`` has changed. Called before each submission: about 1 µs."""

    def __init__(self, engine: LocalEngine, namespace: str) -> None:
        self._engine = engine
        self._namespace = namespace
        self._directory = ""
        self._environment: dict[bytes, bytes] = {}
        self._path: list[str] = []
        self._known: set[bytes] = set()

    def check(self) -> None:
        try:
            directory = os.getcwd()
        except OSError:
            directory = self._directory
        environment: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
        if directory == self._directory and environment == self._environment and sys.path == self._path:
            return
        self._directory = directory
        self._environment = dict(environment)
        self._path = list(sys.path)
        path = [entry or directory for entry in self._path]
        blob = worlds.encode(worlds.World(directory, dict(os.environ), path, self._namespace))
        world = ids.content_id(blob, 8)
        self._engine.machine.out.append(WorldMessage(world, b"" if world in self._known else blob))
        self._known.add(world)
