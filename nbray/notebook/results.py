"""The results that the cluster holds under notebooks' names, in plain Python: `attach`, `fetch`, `keep`, `names`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from nbray.api import context
from nbray.errors import NbrayError
from nbray.events import NameRow
from nbray.notebook import attaching
from nbray.notebook.arguments import human

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit


def attach(*names: str) -> str:
    """Bind what earlier runs of this notebook's kernel have left, or of it only ``names``; as ``%cluster attach``. Says what came and what did not.

    Raises RuntimeError outside of a notebook, ValueError for names that are not there.
    """
    from nbray.notebook.commands import results

    return results.attach(_cockpit("attach"), list(names))


def fetch(*names: str) -> Any:
    """Bind and return what the cluster holds under these names, waiting for what is still made; as ``%cluster fetch``. One value, or a tuple.

    Raises RuntimeError outside of a notebook, ValueError for names that are not there, NbrayError for values that cannot be brought here.
    """
    from nbray.notebook.commands import results

    cockpit = _cockpit("fetch")
    results.fetch(cockpit, list(names))
    values = tuple(cockpit.shell.user_ns[name] for name in names)
    return values[0] if len(values) == 1 else values


def keep(*names: str, forget: bool = False) -> list[str]:
    """Write what the cluster holds under these names to disk, from where `attach` brings it back after a reboot; as ``%cluster keep``.

    ``forget``: remove them from the disk instead. Returns the names that are on disk. Raises RuntimeError outside of a notebook, ValueError for names
    that are not there, NbrayError for values that cannot be written.
    """
    from nbray.notebook.commands import results

    there = (results.forget if forget else results.keep)(_cockpit("keep"), list(names))
    return sorted({name.name for one in there for name in one.header.names})


def _cockpit(verb: str) -> Cockpit:
    from nbray.notebook.extension import cockpit_of

    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    found = cockpit_of(shell) if shell is not None else None
    if found is None:
        raise RuntimeError(
            f"nbray.{verb}() is for notebooks in which %load_ext nbray has run; nbray.names('book.ipynb') reads a notebook's results from anywhere"
        )
    return found


class Results(Mapping[str, Any]):
    """The names of one notebook and what the cluster holds under them; a value is read when it is asked for, as a private copy."""

    def __init__(self, session: str, rows: list[NameRow]) -> None:
        self.session = session
        self._rows = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> Any:
        row = self._rows.get(name)
        if row is None:
            near = difflib.get_close_matches(name, self._rows, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._rows) or 'none'}"
            raise KeyError(f"{self.session} has no name {name!r}; {hint}")
        engine: Any = context.require().engine
        namespace: dict[str, Any] = {"__name__": "__main__"}
        content = engine.get([engine.ref(row.object)], None, writable=True)[0]
        namespace.update(attaching.unpacked(engine, content, namespace))
        if name not in namespace:
            raise NbrayError(f"the cell that makes {name} in {self.session} has not bound it after all")
        return namespace[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        lines = [
            f"  {row.name}: {'running' if row.task else human(max(row.size, 0))}, {attaching.cell_title(row.cell)}"
            for row in self._rows.values()
        ]
        return "\n".join([f"names of {self.session}" + (":" if lines else ": none"), *lines])


def names(notebook: str = "") -> Results:
    """What the cluster holds under the names of a notebook (by its path, or the end of it; default: this one), in this process's cluster.

    Raises ValueError when no notebook, or more than one, is called so.
    """
    engine: Any = context.require().engine
    rows = [msgspec.convert(row, type=NameRow, strict=False) for row in engine.query("held")]
    own = str(engine.details()["session"])
    sessions = sorted({row.session for row in rows} | {own})
    wanted = notebook or own
    found = [session for session in sessions if session == wanted] or [
        session for session in sessions if session.endswith("/" + wanted.removeprefix("./"))
    ]
    if len(found) != 1:
        what = "several notebooks" if found else "no notebook"
        raise ValueError(
            f"{what} on this cluster {'are' if found else 'is'} called {wanted!r}; those with results: {', '.join(found or sessions)}"
        )
    newest: dict[str, NameRow] = {}
    for row in rows:
        if row.session == found[0] and row.state != "LOST" and row.size >= 0:
            known = newest.get(row.name)
            if known is None or known.task or (not row.task and row.version > known.version):
                newest[row.name] = row
    return Results(found[0], list(newest.values()))
