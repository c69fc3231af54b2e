"""What earlier runs of this notebook's kernel have left on the cluster, and how it comes back: ``%cluster attach``, ``%cluster fetch``.

A new kernel sees nothing of it until somebody asks, so that Restart & Run All starts clean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from nbray.errors import NbrayError
from nbray.events import NameRow
from nbray.notebook.arguments import did_you_mean, human

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

READY = frozenset({"READY", "SPILLED"})


@dataclass
class Left:
    """What is there: names with a value, names that running tasks will bind, names whose value is lost, named actors."""

    kept: list[NameRow] = field(default_factory=list)
    running: list[NameRow] = field(default_factory=list)
    lost: list[NameRow] = field(default_factory=list)
    actors: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.kept or self.running or self.lost or self.actors)

    def tasks(self) -> int:
        """How many tasks run that will bind names."""
        return len({row.task for row in self.running})


def sort(rows: Iterable[NameRow], job: int, actors: Sequence[str] = ()) -> Left:
    """Of all names of a session, those that an earlier run of the kernel has left (``job`` is this one's; another that is connected keeps its own)."""
    left = Left(actors=sorted(actors))
    for row in rows:
        if row.job == job or row.live:
            continue
        if row.task:
            left.running.append(row)
        elif row.state in READY:
            left.kept.append(row)
        else:
            left.lost.append(row)
    for found in (left.kept, left.running, left.lost):
        found.sort(key=lambda row: row.version)
    return left


def offer(left: Left) -> str:
    """One line for the start card; empty when there is nothing."""
    results = [row for row in left.kept if row.size >= 0]
    parts = []
    if results:
        size = human(sum(row.size for row in results))
        parts.append(f"{len(results)} result{'s' * (len(results) != 1)} kept, {size}")
    if left.running:
        parts.append(f"{left.tasks()} task{'s' * (left.tasks() != 1)} running")
    if left.actors:
        parts.append(f"{len(left.actors)} named actor{'s' * (len(left.actors) != 1)}")
    if left.lost:
        parts.append(f"{len(left.lost)} lost")
    return f"From before the kernel's restart: {', '.join(parts)}: %cluster attach" if parts else ""


def cell_title(label: str) -> str:
    """``In[3]`` of a cell's label."""
    return label.partition(" ")[0] or "a cell"


class Attacher:
    """Looks at and brings back what earlier runs of one notebook's kernel have left."""

    def __init__(self, cockpit: Cockpit) -> None:
        from nbray.api import context

        self._cockpit = cockpit
        self._engine: Any = context.require().engine
        self._session = str(self._engine.details()["session"])

    def rows(self) -> list[NameRow]:
        """All names of this session."""
        return [
            msgspec.convert(row, type=NameRow, strict=False)
            for row in self._engine.query("held", self._session)
        ]

    def left(self) -> Left:
        """What earlier runs have left."""
        return sort(self.rows(), int(self._engine.welcome.job))

    def bind(self, rows: Sequence[NameRow]) -> tuple[list[NameRow], dict[str, str]]:
        """Bring these names' values into the notebook: those that came, and why others did not."""
        came: list[NameRow] = []
        failed: dict[str, str] = {}
        by_object: dict[bytes, list[NameRow]] = {}
        for row in rows:
            by_object.setdefault(row.object, []).append(row)
        for object_id, same in by_object.items():
            try:
                values = self._values(object_id)
            except NbrayError as error:
                failed.update({row.name: " ".join(str(error).split()) for row in same})
                continue
            for row in same:
                if row.name in values:
                    self._cockpit.shell.user_ns[row.name] = values[row.name]
                    came.append(row)
                else:
                    failed[row.name] = "its cell has not bound it after all"
        self._engine.take_names([row.name for row in came])
        namespace = self._cockpit.shell.user_ns
        self._cockpit.names.hold({row.name: namespace[row.name] for row in came})
        for row in came:
            self._cockpit.trace.restore([row.name], row.origin)
        return came, failed

    def _values(self, object_id: bytes) -> dict[str, Any]:
        """The values in an object that names stand for. Waits for one that is still made. Raises what making it raised."""
        from nbray.errors import SerializationError
        from nbray.notebook import transfer
        from nbray.notebook.cell import returned
        from nbray.notebook.names import Gathered
        from nbray.notebook.runner import CellResult

        content = self._engine.get([self._engine.ref(object_id)], None, writable=True)[0]
        namespace = self._cockpit.shell.user_ns
        try:
            if isinstance(content, CellResult):
                return returned(content, namespace).values
            if isinstance(content, Gathered):
                results = self._engine.get(content.results, None, writable=True)
                each = [returned(result, namespace).values for result in results]
                return {
                    name: [values.get(name) for values in each]
                    for name in dict.fromkeys(n for v in each for n in v)
                }
            return transfer.unpack(content, namespace)
        except NbrayError:
            raise
        except Exception as error:
            text = f"it cannot be read here: {type(error).__name__}: {error}"
            raise SerializationError(text) from error


def find(rows: Sequence[NameRow], name: str) -> NameRow:
    """The row of a name, the newest if a task is about to bind it again. Raises ValueError naming the nearest."""
    found = [row for row in rows if row.name == name]
    if not found:
        raise ValueError(
            f"the cluster holds nothing under the name {name!r}{did_you_mean(name, [row.name for row in rows])}"
        )
    return max(found, key=lambda row: row.version)


def told(came: Sequence[NameRow], own: Sequence[str], failed: dict[str, str], left: Left) -> str:
    """What to say after attaching: per cell what came back with sizes, what is still made, what is lost and why."""
    lines = []
    by_cell: dict[str, list[NameRow]] = {}
    for row in came:
        by_cell.setdefault(row.cell, []).append(row)
    for label, rows in by_cell.items():
        names = ", ".join(row.name if row.size < 0 else f"{row.name} ({human(row.size)})" for row in rows)
        lines.append(f"{cell_title(label)}: {names}")
    running: dict[bytes, list[NameRow]] = {}
    for row in left.running:
        running.setdefault(row.task, []).append(row)
    lines += [
        f"{cell_title(rows[0].cell)}: still running; it will bind {', '.join(row.name for row in rows)}"
        for rows in running.values()
    ]
    if own:
        lines.append(
            f"not bound, because this notebook has its own: {', '.join(own)} (%cluster fetch NAME binds the kept one)"
        )
    lines += [f"lost: {name}: {why}" for name, why in failed.items()]
    if left.actors:
        lines.append(f"actors: {', '.join(left.actors)}")
    if not lines:
        return "nothing is left from earlier runs of this notebook's kernel"
    head = f"attached {len(came)} name{'s' * (len(came) != 1)}"
    return "\n".join([head, *(f"  {line}" for line in lines)])
