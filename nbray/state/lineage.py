"""Which run of which cell made what a notebook's variables are, out of what: a fold over the runs of cells, local ones too. Pure.

A cell is known by its id (its source's hash where the front end gives none), never by ``In[n]``. Each time a cell binds a name, the name gets
a new *version*; a version remembers those that its cell has read. It is *stale* when a cell that made one of them ran again, and what it
made then is another value. A name that another cell binds is another thing: that makes nothing stale.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MOST_VERSIONS = 2_000
"""Versions that are remembered; the oldest that nothing current was made of are forgotten first."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell as it ran: ``key``: its identity, ``digest``: of its source, ``title``: what people call it (``In[3]``)."""

    key: str
    digest: str
    title: str


@dataclass(frozen=True, slots=True)
class Input:
    """A name that a cell has read: which version, and what stands for its content."""

    name: str
    number: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Version:
    """What a name is. ``content``: equal for equal values, as far as that could be seen cheaply; else for equal code run on equal inputs."""

    name: str
    number: int
    cell: Cell
    inputs: tuple[Input, ...]
    content: bytes
    remote: bool


@dataclass(frozen=True, slots=True)
class Stale:
    """``name`` (of version ``number``) was made by cell ``maker`` from a ``cause`` that cell ``by`` has made anew since; ``content`` of that.
    ``direct``: whether the cell has read it itself.
    """

    name: str
    number: int
    maker: str
    cause: str
    by: str
    content: bytes
    direct: bool

    @property
    def text(self) -> str:
        """For people."""
        way = "from" if self.direct else "of what goes back to"
        return f"{self.name} is stale: {self.maker} made it {way} an earlier {self.cause}, which {self.by} has changed since"


class Lineage:
    """The variables of one notebook."""

    def __init__(self) -> None:
        self.current: dict[str, Version] = {}
        self.sources: dict[str, str] = {}
        """Digest -> source of the cells that made what is remembered."""
        self._versions: dict[tuple[str, int], Version] = {}
        self._numbers: dict[str, int] = {}
        self._said: set[tuple[str, int, str, bytes]] = set()

    # -- what happens

    def inputs(self, names: Iterable[str]) -> tuple[Input, ...]:
        """What a cell that reads these names now is made of; names that no cell has bound are left out."""
        current = self.current
        return tuple(
            Input(name, found.number, found.content)
            for name in dict.fromkeys(names)
            if (found := current.get(name)) is not None
        )

    def ran(
        self,
        cell: Cell,
        source: str,
        inputs: tuple[Input, ...],
        bound: Mapping[str, bytes | None],
        deleted: Iterable[str] = (),
        *,
        remote: bool = False,
    ) -> None:
        """A cell has ended. ``bound``: name -> what is known of the value (equal for equal values), None if that cannot be said cheaply."""
        for name in deleted:
            self.current.pop(name, None)
        if not bound:
            return
        made_of = hashlib.blake2b(cell.digest.encode(), digest_size=12)
        for read in inputs:
            made_of.update(read.name.encode() + b"\0" + read.content)
        provenance = made_of.digest()
        self.sources[cell.digest] = source
        for name, known in bound.items():
            number = self._numbers[name] = self._numbers.get(name, 0) + 1
            content = b"=" + known if known is not None else b"~" + provenance
            version = Version(name, number, cell, inputs, content, remote)
            self.current[name] = self._versions[name, number] = version
        if len(self._versions) > MOST_VERSIONS:
            self._forget()

    def gone(self, names: Iterable[str]) -> None:
        """The notebook has these names no longer."""
        for name in names:
            self.current.pop(name, None)

    # -- questions

    def version(self, name: str, number: int) -> Version | None:
        """A version by its number, if it is remembered."""
        return self._versions.get((name, number))

    def stale(self, name: str) -> Stale | None:
        """Why this name is stale, None if it is not."""
        seen: set[str] = set()
        stack = [name]
        while stack:
            version = self.current.get(stack.pop())
            if version is None or version.name in seen:
                continue
            seen.add(version.name)
            for read in version.inputs:
                now = self.current.get(read.name)
                if now is None or read.name == version.name:
                    continue
                if now.number == read.number:
                    stack.append(read.name)
                    continue
                then = self._versions.get((read.name, read.number))
                if then is not None and then.cell.key == now.cell.key and now.content != read.content:
                    made = self.current[name]
                    return Stale(
                        name,
                        made.number,
                        made.cell.title,
                        read.name,
                        now.cell.title,
                        now.content,
                        version is made,
                    )
        return None

    def hints(self, names: Iterable[str]) -> list[Stale]:
        """Results of remote cells among these names that are stale; each is told once per change."""
        found = []
        for name in names:
            version = self.current.get(name)
            if version is None or not version.remote or not version.inputs:
                continue
            stale = self.stale(name)
            if stale is None:
                continue
            key = (stale.name, stale.number, stale.cause, stale.content)
            if key not in self._said:
                self._said.add(key)
                found.append(stale)
        return found

    # -- inside

    def _forget(self) -> None:
        """Keep what the current versions are made of, and the newest of the rest."""
        kept: dict[tuple[str, int], None] = {}
        waiting = deque((v.name, v.number) for v in self.current.values())
        while waiting and len(kept) < MOST_VERSIONS // 2:
            key = waiting.popleft()
            version = self._versions.get(key)
            if version is None or key in kept:
                continue
            kept[key] = None
            waiting.extend((read.name, read.number) for read in version.inputs)
        others = [key for key in self._versions if key not in kept]
        for key in others[: max(len(others) - MOST_VERSIONS // 4, 0)]:
            del self._versions[key]
        digests = {version.cell.digest for version in self._versions.values()}
        self.sources = {digest: text for digest, text in self.sources.items() if digest in digests}
        self._said = {said for said in self._said if (said[0], said[1]) in self._versions}
