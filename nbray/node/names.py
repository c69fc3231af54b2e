"""What the names of notebooks stand for: holders of objects that no process's end takes away. Pure; part of the node's machine.

A cell that runs on the cluster binds names of its notebook's session when it succeeds. The node holds what they stand for until the notebook binds
or deletes the name itself (`Unbind`), another cell binds it, somebody frees the value, or the session ends on purpose: not when the
kernel dies. Each run of a cell has a ``version``, larger than those of all runs before it, so that a slow cell never takes a name back from
one that was submitted later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from nbray import ids
from nbray.events import NameRow, SavedName
from nbray.failure_codec import summary
from nbray.gcs.messages import NameBind, NameUnbind
from nbray.messages import Reply
from nbray.store import holders as holder_sets
from nbray.store import objects as store

if TYPE_CHECKING:
    from nbray import messages as m
    from nbray.node.machine import NodeMachine
    from nbray.node.peer import Peer
    from nbray.scheduler.task import Task
    from nbray.store.objects import Object

_PREFIX = b"name\0"
"""Holders that are names start with this; ids are 16, 20, 32 or 36 bytes, which these need not differ from: no id has this prefix but by chance."""

_SAVER = -2
"""Who pins objects while they are written to disk."""

FAILURES = 100
"""Failed tasks that are remembered for kernels that are away."""

SAVED_LIMIT = 8 << 30
"""Bytes that a cluster saves at its end; the newest results first."""

Key = tuple[str, str]


@dataclass(slots=True, frozen=True)
class Save:
    """Write a value where it outlives the cluster; report with `Names.saved`. Its bytes: ``data``, or in the spilled copy, or in the arena at ``offset``."""

    object: bytes
    session: str
    names: list[SavedName]
    kind: int
    size: int
    offset: int
    data: bytes | None
    spilled: bool
    kept: bool


@dataclass(slots=True)
class _Saving:
    """Values that are being saved. ``errors``: those that could not be, and why; ``done`` is called when ``left`` are none."""

    left: dict[bytes, None]
    errors: dict[bytes, str]
    done: Callable[[dict[bytes, str]], None]


class Binding:
    """What a name stands for. ``size``: bytes of its own share of the object, -1 for a module."""

    __slots__ = ("cell", "job", "object", "origin", "size", "version")

    def __init__(
        self, object_id: bytes, version: int, job: int, cell: str, size: int, origin: bytes = b""
    ) -> None:
        self.object = object_id
        self.version = version
        self.job = job
        self.cell = cell
        self.size = size
        self.origin = origin


class Expected:
    """A task that will bind names when it succeeds. ``dropped``: those that the notebook has bound itself since."""

    __slots__ = ("dropped", "job", "names", "origin", "session", "version")

    def __init__(self, session: str, version: int, job: int, names: list[str], origin: bytes) -> None:
        self.session = session
        self.version = version
        self.job = job
        self.names = names
        self.origin = origin
        self.dropped: set[str] = set()


class Names:
    """The names of all sessions."""

    def __init__(self, node: NodeMachine) -> None:
        self.node = node
        self.bound: dict[Key, Binding] = {}
        self.expected: dict[bytes, Expected] = {}
        self.announced: dict[bytes, m.Bound] = {}
        """What running tasks say they will have bound, until they end."""
        self.failures: dict[bytes, tuple[Expected, str, str]] = {}
        """Tasks that failed while their kernel was away: what they would have bound, their cell, and why."""
        self.away: dict[str, float] = {}
        """Session -> when its kernel was lost without a goodbye, the last time."""
        self.saving: list[_Saving] = []
        """Values on their way to disk."""
        self.remade: dict[bytes, None] = {}
        """Tasks that run again only because a value was lost: the names are what they were."""

    # -- messages

    def on_names(self, peer: Peer, message: m.Names) -> None:
        if message.task in self.node.tasks.tasks:
            self.expected[message.task] = Expected(
                peer.session, message.version, peer.job, message.names, message.origin
            )

    def on_bound(self, peer: Peer, message: m.Bound) -> None:
        worker = peer.worker
        if worker is not None and any(
            task.id == message.task and task.attempt == message.attempt for task in worker.pending
        ):
            self.announced[message.task] = message
        elif worker is None and not message.task:
            for name, object_id, size in zip(message.names, message.objects, message.sizes, strict=True):
                binding = Binding(object_id, message.version, peer.job, peer.cell, size)
                self._bind((peer.session, name), binding)

    def on_unbind(self, peer: Peer, message: m.Unbind) -> None:
        for name in message.names:
            self._unbind((peer.session, name), message.version)

    def on_take(self, peer: Peer, message: m.Take) -> None:
        for name in message.names:
            binding = self.bound.get((peer.session, name))
            if binding is not None and binding.job != peer.job:
                binding.job = peer.job
                self._record((peer.session, name), binding)
        for expected in self.expected.values():
            if expected.session == peer.session and not expected.dropped.issuperset(expected.names):
                expected.job = peer.job if set(expected.names) & set(message.names) else expected.job
        for task_id, (expected, _, _) in list(self.failures.items()):
            if expected.session == peer.session and set(expected.names) & set(message.names):
                del self.failures[task_id]
        if message.actors:
            self.node.actors.take(peer, message.actors)

    # -- to disk

    def on_keep(self, peer: Peer, message: m.Query) -> None:
        """Answered by (name, why it could not be saved or "") of each name, once all is done."""
        names = msgspec.msgpack.decode(message.argument, type=list[str])
        number, request, session = peer.number, message.request, peer.session

        def done(errors: dict[bytes, str]) -> None:
            answer = []
            for name in names:
                binding = self.bound.get((session, name))
                unknown = "the cluster does not hold it"
                answer.append((name, unknown if binding is None else errors.get(binding.object, "")))
            asker = self.node.peers.get(number)
            if asker is not None:
                self.node.send(asker, Reply(request, "", msgspec.msgpack.encode(answer)))

        objects = [found.object for name in names if (found := self.bound.get((session, name))) is not None]
        self._save(session, objects, done, kept=True)

    def worth_saving(self, session: str = "") -> bool:
        """Whether names of this session (of any) hold something that can be saved."""
        return bool(self.node.config.data) and any(not session or key[0] == session for key in self.bound)

    def save_all(self, done: Callable[[], None], only: str = "") -> None:
        """Save what names (``only`` of this session) stand for, as far as it fits, and call ``done``."""
        found = [item for item in self.bound.items() if not only or item[0][0] == only]
        newest = sorted(found, key=lambda item: (-item[1].job, -item[1].version))
        chosen: dict[str, list[bytes]] = {}
        size = 0
        for (session, _), binding in newest:
            entry = self.node.objects.objects.get(binding.object)
            same = chosen.setdefault(session, [])
            if entry is None or binding.object in same or size + entry.size > SAVED_LIMIT:
                continue
            size += entry.size
            same.append(binding.object)
        left = len(chosen) if self.node.config.data else 0
        if not left:
            done()
            return

        def one_done(_errors: dict[bytes, str]) -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for session, objects in chosen.items():
            self._save(session, objects, one_done, kept=False)

    def saved(self, object_id: bytes, error: str) -> None:
        """The shell has saved this value, or could not."""
        self.node.objects.unpin(object_id, _SAVER, 1)
        for saving in list(self.saving):
            if object_id in saving.left:
                del saving.left[object_id]
                if error:
                    saving.errors[object_id] = error
                if not saving.left:
                    self.saving.remove(saving)
                    saving.done(saving.errors)
                break

    def _save(
        self, session: str, objects: list[bytes], done: Callable[[dict[bytes, str]], None], *, kept: bool
    ) -> None:
        errors: dict[bytes, str] = {}
        effects: list[Save] = []
        for object_id in dict.fromkeys(objects):
            entry = self.node.objects.objects[object_id]
            if entry.is_error:
                errors[object_id] = "its value is lost"
            elif entry.refs:
                errors[object_id] = "it mentions other objects of the cluster (refs or handles)"
            elif not self.node.config.data:
                errors[object_id] = "there is no directory for it; set NBRAY_DATA_DIR"
            elif entry.sealed:
                effects.append(self._effect(session, entry, kept))
        if not effects:
            done(errors)
            return
        self.saving.append(_Saving({effect.object: None for effect in effects}, errors, done))
        self.node.effects += effects

    def _effect(self, session: str, entry: Object, kept: bool) -> Save:
        found = [(key[1], self.bound[key]) for key in self._names_of(entry) if key[0] == session]
        names = [SavedName(name, b.cell, b.version, b.size, b.origin) for name, b in found]
        spilled = entry.state in (store.SPILLED, store.RESTORING)
        data = entry.data if entry.state == store.INLINE else None
        offset = 0
        if entry.block is not None and not spilled:
            self.node.objects.pin(entry, _SAVER)
            offset = entry.block.offset
        return Save(entry.id, session, names, entry.kind, entry.size, offset, data, spilled, kept)

    # -- what happens to tasks and objects

    def finished(self, task: Task) -> None:
        """The task has succeeded with what it announced; its values are there, or are sealed right after this."""
        message = self.announced.pop(task.id)
        expected = self.expected.pop(task.id, None)
        if task.id in self.remade:
            return
        job = expected.job if expected is not None else self.node.job_of(task)
        origin = expected.origin if expected is not None else b""
        returned = ids.return_id(task.id, 0)
        for name, object_id, size in zip(message.names, message.objects, message.sizes, strict=True):
            if expected is None or name not in expected.dropped:
                binding = Binding(object_id or returned, message.version, job, task.cell, size, origin)
                self._bind((task.session, name), binding)
        for name in message.deleted:
            self._unbind((task.session, name), message.version)

    def ended(self, task: Task) -> None:
        """The task is over: what it has not bound, it will not bind."""
        self.expected.pop(task.id, None)
        self.announced.pop(task.id, None)
        self.remade.pop(task.id, None)

    def failed(self, task: Task, error: bytes) -> None:
        """The task has failed: whoever attaches later wants to know."""
        expected = self.expected[task.id]
        if all(peer.job != expected.job for peer in self.node.peers.values()):
            name, text = summary(error)
            self.failures[task.id] = expected, task.cell, f"{name}: {text}"
            if len(self.failures) > FAILURES:
                del self.failures[next(iter(self.failures))]

    def freed(self, entry: Object) -> None:
        """Somebody has released the value: its names stand for nothing."""
        for key in list(self._names_of(entry)):
            self._unbind(key, self.bound[key].version)

    def end_session(self, session: str) -> None:
        """The notebook has ended on purpose."""
        for key in [key for key in self.bound if key[0] == session]:
            self._unbind(key, self.bound[key].version)
        for task_id in [i for i, (expected, _, _) in self.failures.items() if expected.session == session]:
            del self.failures[task_id]
        for expected in self.expected.values():
            if expected.session == session:
                expected.dropped.update(expected.names)

    # -- questions

    def name_of(self, holder: bytes) -> str:
        """For people: the variable that holds an object, "" if the holder is no name."""
        if not holder.startswith(_PREFIX):
            return ""
        session, _, name = holder[len(_PREFIX) :].decode().rpartition("\0")
        return f"variable {name} of {session}"

    def rows(self, session: str = "", *, origins: bool = False) -> list[NameRow]:
        """What names stand for and what running tasks will bind, in this session or all; ``origins``: also how they were made."""
        jobs = {peer.job for peer in self.node.peers.values() if peer.job}
        rows = []
        for (owner, name), binding in self.bound.items():
            if not session or owner == session:
                entry = self.node.objects.objects.get(binding.object)
                state = "LOST" if entry is None or entry.is_error else _STATES.get(entry.state, "READY")
                live = binding.job in jobs
                rows.append(
                    NameRow(
                        owner,
                        name,
                        binding.object,
                        b"",
                        binding.job,
                        binding.cell,
                        binding.version,
                        binding.size,
                        state,
                        live,
                        binding.origin if origins else b"",
                    )
                )
        for task_id, expected in self.expected.items():
            task = self.node.tasks.tasks.get(task_id)
            if task is not None and (not session or expected.session == session):
                cell, version, live = task.cell, expected.version, expected.job in jobs
                rows += [
                    NameRow(
                        expected.session,
                        name,
                        ids.return_id(task_id, 0),
                        task_id,
                        expected.job,
                        cell,
                        version,
                        0,
                        "RUNNING",
                        live,
                        expected.origin if origins else b"",
                        self.node.now - task.submitted,
                    )
                    for name in expected.names
                    if name not in expected.dropped
                ]
        for task_id, (expected, cell, why) in self.failures.items():
            if not session or expected.session == session:
                live, owner, job = expected.job in jobs, expected.session, expected.job
                for name in expected.names:
                    known = self.bound.get((owner, name))
                    if name in expected.dropped or (known is not None and known.version > expected.version):
                        continue
                    row = NameRow(
                        owner,
                        name,
                        ids.return_id(task_id, 0),
                        b"",
                        job,
                        cell,
                        expected.version,
                        0,
                        "FAILED",
                        live,
                    )
                    row.why = why
                    rows.append(row)
        return rows

    def check(self) -> None:
        """Assert that names and holders agree."""
        for key, binding in self.bound.items():
            entry = self.node.objects.objects.get(binding.object)
            assert entry is not None, f"{key} stands for an object that is gone"
            assert holder_sets.contains(entry.holders, _holder(key)), f"{key} does not hold its object"
        for entry in self.node.objects.objects.values():
            for key in self._names_of(entry):
                assert self.bound[key].object == entry.id, f"{key} holds two objects"
        for task_id in [*self.expected, *self.announced, *self.remade]:
            assert task_id in self.node.tasks.tasks, (
                f"names wait for task {ids.short(task_id)}, which has ended"
            )

    # -- inside

    def _names_of(self, entry: Object) -> Iterator[Key]:
        for holder in holder_sets.each(entry.holders):
            if isinstance(holder, bytes) and holder.startswith(_PREFIX):
                session, _, name = holder[len(_PREFIX) :].decode().rpartition("\0")
                yield session, name

    def _bind(self, key: Key, binding: Binding) -> None:
        before = self.bound.get(key)
        entry = self.node.objects.objects.get(binding.object)
        if entry is None or (before is not None and before.version > binding.version):
            return
        holder = _holder(key)
        entry.holders = holder_sets.add(entry.holders, holder)
        self.bound[key] = binding
        if before is not None and before.object != binding.object:
            self._let_go(before, holder)
        self._record(key, binding)

    def _unbind(self, key: Key, version: int) -> None:
        waiting = self.expected.values()
        for expected in (*waiting, *(failed[0] for failed in self.failures.values())):
            if expected.session == key[0] and expected.version <= version:
                expected.dropped.add(key[1])
        binding = self.bound.get(key)
        if binding is None or binding.version > version:
            return
        del self.bound[key]
        self._let_go(binding, _holder(key))
        self.node.operate(NameUnbind(*key), None)

    def _let_go(self, binding: Binding, holder: bytes) -> None:
        entry = self.node.objects.objects.get(binding.object)
        if entry is not None:
            self.node.values.release(entry, holder)

    def _record(self, key: Key, binding: Binding) -> None:
        self.node.operate(NameBind(*key, binding.object, binding.job, binding.cell), None)


_STATES = {store.SPILLED: "SPILLED", store.RESTORING: "SPILLED"}


def _holder(key: Key) -> bytes:
    return _PREFIX + f"{key[0]}\0{key[1]}".encode()
