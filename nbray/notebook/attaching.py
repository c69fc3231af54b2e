"""What earlier runs of this notebook's kernel have left on the cluster, and how it comes back: ``%cluster attach``, ``%cluster fetch``.

A new kernel sees nothing of it until somebody asks, so that Restart & Run All starts clean.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import config, logs
from nbray.errors import NbrayError, SerializationError, TaskCancelledError, TaskError
from nbray.events import NameRow
from nbray.gcs.messages import ActorRecord
from nbray.notebook.arguments import did_you_mean, human
from nbray.store import saved
from nbray.store.saved import Saved

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

MISSED = 16 * 1024
"""Characters of each cell's output that are shown of what came while no kernel was there."""

READY = frozenset({"READY", "SPILLED"})


@dataclass
class Left:
    """What is there: names with a value, values on disk, names that running tasks will bind, names whose value is lost, named actors."""

    kept: list[NameRow] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    running: list[NameRow] = field(default_factory=list)
    lost: list[NameRow] = field(default_factory=list)
    actors: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.kept or self.saved or self.running or self.lost or self.actors)

    def names(self) -> set[str]:
        """Every name of it."""
        on_disk = {name.name for one in self.saved for name in one.header.names}
        return on_disk | {row.name for row in (*self.kept, *self.running, *self.lost)}

    def only(self, names: Iterable[str]) -> Left:
        """The part of it with these names; all actors."""
        chosen = set(names)
        return Left(
            [row for row in self.kept if row.name in chosen],
            [one for one in self.saved if chosen & {name.name for name in one.header.names}],
            [row for row in self.running if row.name in chosen],
            [row for row in self.lost if row.name in chosen],
            self.actors,
        )

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
    if left.saved:
        names = sum(name.size >= 0 for one in left.saved for name in one.header.names)
        size = human(sum(one.header.size for one in left.saved))
        parts.append(f"{names} result{'s' * (names != 1)} on disk, {size}")
    if left.running:
        parts.append(f"{left.tasks()} task{'s' * (left.tasks() != 1)} running")
    if left.actors:
        parts.append(f"{len(left.actors)} named actor{'s' * (len(left.actors) != 1)}")
    if left.lost:
        parts.append(f"{len(left.lost)} lost")
    return f"From earlier runs of this notebook: {', '.join(parts)}: %cluster attach" if parts else ""


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
            for row in self._engine.query("origins", self._session)
        ]

    def left(self) -> Left:
        """What earlier runs have left."""
        rows = self.rows()
        left = sort(rows, self.job, self._actors())
        on_cluster = {row.name for row in rows}
        left.saved = [
            one for one in self.saved() if not on_cluster.issuperset(name.name for name in one.header.names)
        ]
        return left

    @property
    def job(self) -> int:
        """The number of this run of the kernel."""
        return int(self._engine.welcome.job)

    def saved(self) -> list[Saved]:
        """What is on disk of this notebook's results."""
        directory = config.settings().data_dir
        return saved.find(directory, self._session) if directory else []

    def _actors(self) -> list[str]:
        """Names of this session's actors that an earlier run has made."""
        page = self._engine.query("named_actors", {"session": self._session})
        rows = [msgspec.convert(row, type=ActorRecord, strict=False) for row in page["rows"]]
        return [row.name for row in rows if row.job != self.job]

    def bind_actors(self, names: Sequence[str]) -> list[str]:
        """Bind handles of named actors under their names, where these are names and free; those that are bound."""
        from nbray import get_actor

        if names:
            self._engine.take_names((), names)
        namespace = self._cockpit.shell.user_ns
        bound = [name for name in names if name.isidentifier() and name not in namespace]
        for name in bound:
            namespace[name] = get_actor(name)
        return bound

    def follow(self, running: Sequence[NameRow]) -> None:
        """Names that tasks of earlier runs are going to bind are late from now on."""
        from nbray.notebook import background, earlier

        by_task: dict[bytes, list[NameRow]] = {}
        for row in running:
            by_task.setdefault(row.task, []).append(row)
        self._engine.take_names([row.name for row in running])
        for rows in by_task.values():
            names = tuple(row.name for row in rows)
            run = earlier.EarlierRun(
                rows[0], names, self._engine.ref(rows[0].object), self._cockpit.cell.label
            )
            self._cockpit.router.adopt(rows[0].cell)
            self._cockpit.late.promise(run, names)
            background.watch(self._cockpit, run)

    def missed(self, kept: Iterable[str], running: Iterable[str]) -> list[tuple[str, str]]:
        """The last output of cells, (label, text): of those that have ended since the kernel was lost, of ``running`` ones all."""
        away = self._engine.query("away", self._session)
        directory = self._engine.details().get("logs", "")
        if away is None or not directory:
            return []
        since = time.time() - away
        whole = set(running)
        wanted = {*kept, *whole}
        texts: dict[str, list[str]] = {}
        for record in logs.read(directory, lambda _task, cell: cell in wanted):
            if record.time >= since or record.cell in whole:
                texts.setdefault(record.cell, []).append(record.text)
        return [(label, _tail("".join(parts))) for label, parts in texts.items()]

    def explain(self, lost: Sequence[NameRow]) -> dict[str, str]:
        """Why these names have no value; the next time they are not told again."""
        failed = {
            row.name: f"{cell_title(row.cell)} failed while no kernel was there: {row.why.removeprefix('CellError: ')}"
            for row in lost
            if row.state == "FAILED"
        }
        failed.update(self.bind([row for row in lost if row.state != "FAILED"])[1])
        self._engine.take_names(list(failed))
        return failed

    def keep(self, names: Sequence[str]) -> None:
        """Have the node write these names' values to disk. Raises NbrayError naming those that cannot be written, and why."""
        problems = [f"{name}: {why}" for name, why in self._engine.query("keep", list(names)) if why]
        if problems:
            raise NbrayError(f"not written to disk: {'; '.join(problems)}")

    def bind_saved(
        self, entries: Sequence[Saved], wanted: Collection[str]
    ) -> tuple[list[NameRow], dict[str, str]]:
        """Bring values back from disk, and have the cluster hold them again."""
        came: list[NameRow] = []
        failed: dict[str, str] = {}
        for one in entries:
            names = [name for name in one.header.names if name.name in wanted]
            if not names:
                continue
            try:
                content = self._content(one)
                values = self._unpacked(content)
            except Exception as error:  # noqa: BLE001  (whatever a user's class raises)
                why = f"{type(error).__name__}: {error}" if not isinstance(error, NbrayError) else str(error)
                failed.update({name.name: " ".join(why.split()) for name in names})
                continue
            held = self._engine.put(content)
            here = [name for name in names if name.name in values]
            self._engine.bind_names(
                self._cockpit.names.next_version(), {name.name: (held, name.size) for name in here}, ()
            )
            self._bound({name.name: values[name.name] for name in here}, {n.name: n.origin for n in here})
            came += [
                NameRow(
                    self._session, n.name, held._id, b"", self.job, n.cell, n.version, n.size, "READY", True
                )
                for n in here
            ]
            if not one.header.kept and len(here) == len(one.header.names):
                saved.remove(one.path)
        return came, failed

    @staticmethod
    def _content(one: Saved) -> Any:
        from nbray.store import serialization

        return serialization.deserialize(one.header.kind, memoryview(saved.read(one)), None, writable=True)

    def _bound(self, values: Mapping[str, Any], origins: Mapping[str, bytes]) -> None:
        self._cockpit.shell.user_ns.update(values)
        self._cockpit.names.hold(values)
        for name, origin in origins.items():
            self._cockpit.trace.restore([name], origin)

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
            here = [row for row in same if row.name in values]
            failed.update(
                {row.name: "its cell has not bound it after all" for row in same if row not in here}
            )
            self._bound({row.name: values[row.name] for row in here}, {row.name: row.origin for row in here})
            came += here
        self._engine.take_names([row.name for row in came])
        return came, failed

    def _values(self, object_id: bytes) -> dict[str, Any]:
        """The values in an object that names stand for. Waits for one that is still made. Raises what making it raised."""
        content = self._engine.get([self._engine.ref(object_id)], None, writable=True)[0]
        try:
            return self._unpacked(content)
        except NbrayError:
            raise
        except Exception as error:
            text = f"it cannot be read here: {type(error).__name__}: {error}"
            raise SerializationError(text) from error

    def _unpacked(self, content: Any) -> dict[str, Any]:
        return unpacked(self._engine, content, self._cockpit.shell.user_ns)


def unpacked(engine: Any, content: Any, namespace: dict[str, Any]) -> dict[str, Any]:
    """The values by name in what a name stands for; functions among them are over ``namespace``. Raises what unpickling raises."""
    from nbray.notebook import transfer
    from nbray.notebook.cell import returned
    from nbray.notebook.names import Gathered
    from nbray.notebook.runner import CellResult

    if isinstance(content, CellResult):
        return returned(content, namespace).values
    if isinstance(content, Gathered):
        each = [_item(engine, ref, namespace) for ref in content.results]
        names = dict.fromkeys(name for values in each if isinstance(values, dict) for name in values)
        return {
            name: [values.get(name) if isinstance(values, dict) else values for values in each]
            for name in names
        }
    values: dict[str, Any] = transfer.unpack(content, namespace)
    return values


def _item(engine: Any, ref: Any, namespace: dict[str, Any]) -> dict[str, Any] | Exception:
    """What one item of a fan-out has bound, or the error that it has raised."""
    from nbray.notebook.cell import returned
    from nbray.notebook.runner import CellError

    if ref is None:
        return TaskCancelledError("the kernel was gone before this item was submitted")
    try:
        return returned(engine.get([ref], None, writable=True)[0], namespace).values
    except NbrayError as error:
        cause = error.cause if isinstance(error, TaskError) else None
        raised = returned(cause.result, namespace).value if isinstance(cause, CellError) else None
        return raised if isinstance(raised, Exception) else error


def _tail(text: str) -> str:
    """Its last part, from the start of a line."""
    if len(text) <= MISSED:
        return text
    cut = text.find("\n", len(text) - MISSED) + 1
    return f"... {text.count(chr(10), 0, cut)} earlier lines: %cluster logs\n{text[cut:]}"


def find(rows: Sequence[NameRow], name: str) -> NameRow:
    """The row of a name, the newest if a task is about to bind it again. Raises ValueError naming the nearest."""
    found = [row for row in rows if row.name == name]
    if not found:
        raise ValueError(
            f"the cluster holds nothing under the name {name!r}{did_you_mean(name, [row.name for row in rows])}"
        )
    return max(found, key=lambda row: row.version)


def disk_text(entries: Sequence[Saved], *, static: bool = False) -> str:
    """What is on disk, a line per file; ``static``: without what differs from run to run."""
    if not entries:
        return "nothing of this notebook's results is on disk"
    lines = []
    for one in entries:
        names = ", ".join(name.name for name in one.header.names)
        where = cell_title(one.header.names[0].cell) if one.header.names else ""
        why = "kept" if one.header.kept else "from a cluster that ended"
        line = f"{names} ({human(one.header.size)}), {where}, {why}"
        lines.append(
            line
            if static
            else f"{line}, {time.strftime('%d %b %H:%M', time.localtime(one.header.time))}: {one.path}"
        )
    return "\n".join(["On disk:", *(f"  {line}" for line in lines)])


def told(came: Sequence[NameRow], own: Sequence[str], failed: dict[str, str], left: Left) -> str:
    """What to say after attaching: per cell what came back with sizes, what is still made, what is lost and why."""
    lines = []
    by_cell: dict[str, list[NameRow]] = {}
    for row in came:
        by_cell.setdefault(row.cell, []).append(row)
    for label, rows in by_cell.items():
        names = ", ".join(row.name if row.size <= 0 else f"{row.name} ({human(row.size)})" for row in rows)
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
    reasons: dict[str, list[str]] = {}
    for name, why in failed.items():
        reasons.setdefault(why, []).append(name)
    lines += [f"lost: {', '.join(names)}: {why}" for why, names in reasons.items()]
    if left.actors:
        lines.append(f"actors: {', '.join(left.actors)}")
    if not lines:
        return "nothing is left from earlier runs of this notebook's kernel"
    head = f"attached {len(came)} name{'s' * (len(came) != 1)}"
    return "\n".join([head, *(f"  {line}" for line in lines)])
