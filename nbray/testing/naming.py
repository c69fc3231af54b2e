"""Names of sessions in simulated runs: which tasks bind which, and that no older run of a cell takes a name back."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.messages import Bound, Names, Run, Take, Unbind
from nbray.testing.world import BrokenInvariantError

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.node.machine import NodeMachine
    from nbray.testing.clients import SimClient

_NAMES = ("x", "y", "z")
_ALL = 1 << 62


class Naming:
    """Half of the runs have names. Draws from a source of its own, so that runs without them are what they would be."""

    def __init__(self, seed: int) -> None:
        self._random = Random(f"names {seed}")
        self.on = self._random.random() < 0.5
        self._versions: dict[int, int] = {}
        self._tasks: dict[bytes, tuple[int, list[str]]] = {}
        """What the arguments of a cell's task would say."""
        self._seen: dict[tuple[str, str], int] = {}

    def submitted(self, driver: SimClient, task: bytes) -> None:
        """A driver has submitted a task: perhaps it is a cell that binds names; perhaps the notebook has bound some itself meanwhile."""
        if not self.on or self._random.random() > 0.4:
            return
        version = self._versions[driver.number] = self._versions.get(driver.number, 0) + 1
        names = self._random.sample(_NAMES, self._random.randint(1, 3))
        self._tasks[task] = version, names
        out = driver.machine.out
        out.append(Names(task, version, names))
        if self._random.random() < 0.3:
            out.append(Unbind([self._random.choice(_NAMES)], version))
        if self._random.random() < 0.1:
            out.append(Take([self._random.choice(_NAMES)]))

    def bound(self, worker: SimClient, run: Run, contained: list[ObjectRef[Any]]) -> None:
        """A task that is about to report success says what its names stand for."""
        known = self._tasks.get(run.task)
        if known is None:
            return
        version, names = known
        objects = [contained[0]._id if contained and self._random.random() < 0.3 else b"" for _ in names]
        gone = [name for name in _NAMES if name not in names and self._random.random() < 0.1]
        worker.machine.out.append(
            Bound(run.task, run.attempt, version, names, objects, [1] * len(names), gone)
        )

    def leave(self, driver: SimClient) -> None:
        """The notebook lets go of all its names."""
        if self.on:
            driver.machine.out.append(Unbind(list(_NAMES), _ALL))

    def check(self, machine: NodeMachine) -> None:
        """Versions of a bound name only grow."""
        for key, binding in machine.names.bound.items():
            if binding.version < self._seen.get(key, 0):
                raise BrokenInvariantError(
                    f"{key} is version {binding.version} again, after {self._seen[key]} (object {ids.short(binding.object)})"
                )
            self._seen[key] = binding.version
