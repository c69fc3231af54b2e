"""Whether packages were installed, upgraded or removed since this process last looked (design section 3: "an install after start renews the zygote").

What is watched are the directories on ``sys.path`` that hold installed packages. Any installer changes such a directory itself, so that its time of
modification tells that it is worth a closer look: one system call per directory. What Python does there by itself (``__pycache__``) does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

NAMES = ("site-packages", "dist-packages")
_RECORDS = (".dist-info", ".egg-info")
_LONGEST = 20_000
"""Entries of a directory that are looked at."""
_LONGEST_OTHER = 2_000
"""The same for a directory with another name, which may be the user's own, full of data."""


def package_directories(search: Iterable[object]) -> list[str]:
    """Those directories of a ``sys.path`` that are known by their names to hold installed packages."""
    return [entry for entry in search if isinstance(entry, str) and os.path.basename(entry) in NAMES]


def modified(directories: Iterable[str]) -> int:
    """When the last of these directories was modified: nanoseconds, 0 if there is none."""
    return max(map(_modified, directories), default=0)


def _modified(directory: str) -> int:
    try:
        return os.stat(directory).st_mtime_ns
    except OSError:
        return 0


def _packages(directory: str) -> frozenset[tuple[str, int]]:
    """What is installed in a directory: names, and of each record of an installer when it was written."""
    named = os.path.basename(directory) in NAMES
    left = _LONGEST if named else _LONGEST_OTHER
    found = set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                left -= 1
                if not left:
                    break
                if entry.name.endswith(_RECORDS):
                    found.add((entry.name, entry.stat().st_mtime_ns))
                elif named and entry.name != "__pycache__":
                    found.add((entry.name, 0))
    except OSError:
        pass
    return frozenset(found)


class _Place:
    __slots__ = ("changed", "modified", "packages")

    def __init__(self, directory: str) -> None:
        self.modified = _modified(directory)
        self.packages = _packages(directory)
        self.changed = 0

    def look(self, directory: str) -> bool:
        now = _modified(directory)
        if now == self.modified:
            return False
        self.modified = now
        packages = _packages(directory)
        if packages == self.packages:
            return False
        self.packages = packages
        self.changed = now
        return True


class InstalledWatch:
    """Notices installs. ``shared``: the directories from which the cluster's own processes have loaded what they hold."""

    def __init__(self, shared: Iterable[str]) -> None:
        self._shared = list(shared)
        self._places = {directory: _Place(directory) for directory in self._shared}
        self.shared = max((place.modified for place in self._places.values()), default=0)
        """When the last package was installed in the shared directories, as far as is known: nanoseconds."""

    def look(self, search: Iterable[str]) -> bool:
        """Look again, at the directories of ``search`` (absolute ones) too. Whether something was installed."""
        places = self._places
        found = False
        for directory in (*self._shared, *search):
            place = places.get(directory)
            if place is None:
                places[directory] = _Place(directory)
            elif place.look(directory):
                found = True
                if directory in self._shared:
                    self.shared = max(self.shared, place.changed)
        return found

    def changes(self) -> list[tuple[str, int]]:
        """Where something was installed since the first look: what makes a worker useless that is older than that."""
        return [
            (directory, place.changed) for directory, place in sorted(self._places.items()) if place.changed
        ]
