"""The notebook's side of the names that the cluster holds for it: tells the node when the notebook lets go of one.

A name is held as long as the notebook's variable is the object that came back. After each cell the variables are compared by identity; what was
bound anew or deleted is let go of (``del df`` frees).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.notebook.following import Follower

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.notebook.lineage import Trace
    from nbray.notebook.remote_cell import Run

_ABSENT = object()


@dataclass
class Gathered:
    """What names of a fan-out stand for: the results of its runs of one cell."""

    results: list[Any]


class HeldNames(Follower):
    """Which names of this kernel's run the cluster holds, and as what."""

    def __init__(self, namespace: dict[str, Any], trace: Trace) -> None:
        self._namespace = namespace
        self._trace = trace
        self._held: dict[str, Any] = {}
        """Name -> the value, or a weak reference of it."""
        self.left_behind: dict[str, str] = {}
        """Names that cells have bound to what could not be sent -> why."""
        self.late: Container[str] = ()
        """Names that a cell in the background will bind: the notebook does not have them now."""
        self._engine: Any = None
        self._runs = 0

    def connected(self, engine: Any) -> None:
        """This process has joined a cluster."""
        self._engine = engine
        self._held.clear()
        self._runs = 0

    @property
    def version(self) -> int:
        """Of the newest run of a cell; a later kernel run's are larger."""
        return int(self._engine.welcome.job) << 32 | self._runs if self._engine is not None else 0

    def next_version(self) -> int:
        """Of a new binding."""
        self._runs += 1
        return self.version

    # -- runs of cells

    def prepared(self, run: Run) -> None:
        if self._connected():
            self._runs += 1
            run.prepared.task.version = self.version

    def submitted(self, run: Run) -> None:
        if self._connected() and run.ref is not None:
            self._engine.expect_names(run.ref, run.prepared.task.version, run.names, self._trace.origin(run))

    def left(self, names: Mapping[str, str]) -> None:
        """Names that a cell has bound to what could not be sent, and why."""
        self.left_behind.update(names)

    def bound(self, run: Run, names: Collection[str], deleted: Collection[str]) -> None:
        for name in names:
            self.left_behind.pop(name, None)
        for name in deleted:
            self._held.pop(name, None)
        if run.state == "done":
            self.hold({name: self._namespace[name] for name in names if name in self._namespace})

    def promised(self, run: Run, names: Collection[str]) -> None:
        # That the notebook has put them aside does not mean that it lets go.
        for name in names:
            self._held.pop(name, None)

    def rebound(self, names: Collection[str]) -> None:
        self.release(names)

    def gather(self, names: Iterable[str], refs: Sequence[ObjectRef[Any] | None]) -> None:
        """These names will be lists: of what each of these runs of a cell binds (``refs`` of their results, in the order of the lists; None: not
        submitted yet). To be called again when there are more.
        """
        if not self._connected():
            return
        self._runs += 1
        held = self._engine.put(Gathered(list(refs)))
        self._engine.bind_names(self.version, dict.fromkeys(names, (held, 0)), ())

    # -- the notebook's variables

    def hold(self, values: Mapping[str, Any]) -> None:
        """These variables are what the cluster holds under their names."""
        for name, value in values.items():
            try:
                self._held[name] = weakref.ref(value)
            except TypeError:
                self._held[name] = value

    def held(self) -> list[str]:
        """The names that the cluster holds for this run of the kernel, as far as they have come back."""
        return list(self._held)

    def look(self) -> list[str]:
        """Compare: the names that the notebook has bound anew or deleted since they were held; the cluster lets go of them."""
        namespace = self._namespace
        gone = []
        for name, known in self._held.items():
            if name in self.late:
                continue
            value = namespace.get(name, _ABSENT)
            if known is not value and not (
                value is not None and type(known) is weakref.ref and known() is value
            ):
                gone.append(name)
        if gone:
            self.release(gone)
        return gone

    def release(self, names: Iterable[str]) -> None:
        """The cluster lets go of these names, and does not bind them when a cell ends that was submitted before now."""
        names = list(names)
        for name in names:
            self._held.pop(name, None)
        if names and self._connected():
            self._engine.unbind_names(names, self.version)

    def _connected(self) -> bool:
        runtime = context.current()
        return runtime is not None and runtime.engine is self._engine and not self._engine.closed
