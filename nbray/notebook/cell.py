"""A cell on its way to the cluster and back, seen from the notebook: what is sent, and what becomes of what returns."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.errors import SerializationError
from nbray.notebook import changes, transfer
from nbray.notebook.capture import CellNames, analyse
from nbray.notebook.runner import RESULT, CellResult, CellTask
from nbray.notebook.stored import Inputs, of_this_process
from nbray.notebook.transfer import Packed, Parcel, RefusedError

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef

_SHELLS_OWN = ("get_ipython", "exit", "quit", "open", "display")
"""Names that IPython puts into every notebook; a worker has its own."""


@dataclass
class Prepared:
    """A cell, ready to be submitted, and what was found out about it: bytes per captured name, and calls that may read unseen names.

    ``stored``: further arguments of the task, after those for ``task.late``; ``inputs``: what is sent (both: after `settle`).
    """

    task: CellTask
    sizes: Mapping[str, int]
    blind: tuple[tuple[str, int], ...]
    packed: Packed
    names: CellNames
    stored: Sequence[ObjectRef[Any]] = ()
    inputs: Inputs = field(default_factory=Inputs)

    def settle(self) -> None:
        """Put large values into the store of this process's cluster, or find them there. Once, before it is submitted. Raises StoreFullError."""
        store = of_this_process()
        if store is not None and self.packed.placement is not None:
            placement = self.packed.settle(store)
            self.stored, self.inputs = placement.refs, placement.inputs


def prepare(
    source: str,
    filename: str,
    namespace: dict[str, Any],
    *,
    also: Sequence[str] = (),
    out: Sequence[str] | None = None,
    hidden: Mapping[str, Any] | None = None,
    flags: int = 0,
    display: bool = True,
    carried: tuple[type, ...] = (),
    apart: bool = False,
    strict: bool = True,
    given: Sequence[str] = (),
) -> Prepared:
    """What has to be sent to run ``source`` (plain Python) as if in ``namespace``.

    ``also``: names to send that the analysis cannot see; ``out``: names that are wanted, None for all; ``hidden``: names that the shell
    itself put into the namespace; ``given``: names that the cell gets otherwise; ``apart``: large values may lie in the store, see `Prepared.settle`; without ``strict``
    values that cannot be sent are in ``packed.refused``, and the cell is not to be submitted. Raises SyntaxError, NameError (a name of
    ``also`` does not exist), SerializationError (a value cannot be sent: names the variable and says why).
    """
    names = analyse(source, filename)
    own = set(given)
    own.update(
        name
        for name in _SHELLS_OWN
        if hidden is not None and name in hidden and namespace.get(name) is hidden[name]
    )
    for name in also:
        if name not in namespace:
            raise NameError(
                f"-i {name}: there is no variable of that name in the notebook{nearest(name, namespace)}"
            )
    wanted = [name for name in dict.fromkeys([*also, *names.reads]) if name in namespace and name not in own]
    unread = {name for name in names.only_deleted if name not in also}
    sent = [name for name in wanted if name not in unread]
    placeholders = tuple(name for name in names.deletes if name in namespace and name not in sent)
    try:
        packed = transfer.pack(
            sent, namespace, carried=carried, follow=lambda name: name not in own, strict=strict, apart=apart
        )
    except RefusedError as refused:
        raise _refusal(refused, namespace) from None
    packed.parcel.imports = _submodules(names, namespace)
    dotted = tuple(name for name in names.imports if "." in name)
    task = CellTask(
        source,
        filename,
        flags,
        packed.parcel,
        placeholders,
        names.binds,
        dotted,
        None if out is None else tuple(out),
        display,
        watched=_watched(packed, names, namespace),
    )
    return Prepared(task, packed.sizes, names.blind, packed, names)


def _watched(packed: Packed, names: CellNames, namespace: Mapping[str, Any]) -> tuple[str, ...]:
    """What the cell may change in place without binding it, smallest first."""
    found = [
        (size, name)
        for name, size in packed.sizes.items()
        if size <= changes.LIMIT and name not in names.binds and changes.may_change(namespace[name])
    ]
    return tuple(name for _, name in sorted(found))


def _submodules(names: CellNames, namespace: Mapping[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for root, chains in names.submodules.items():
        value = namespace.get(root)
        if isinstance(value, types.ModuleType) and transfer.is_importable_module(value):
            found.update(dict.fromkeys(transfer.submodules(value, chains)))
    return list(found)


def _refusal(refused: RefusedError, namespace: dict[str, Any]) -> SerializationError:
    from nbray.notebook.refusals import explain

    return explain(refused.__cause__ or refused, refused.value, refused.name, refused.needed_by, namespace)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the name that looks most like this one, or nothing."""
    close = difflib.get_close_matches(name, [str(other) for other in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Returned:
    """What came back: values to bind, names to delete, the last value (None: nothing to display), and what to say about the rest.

    ``changed``: names whose values the cell has changed without binding them, so that the notebook's are as they were. ``left``: names whose values
    could not be sent, and why.
    """

    values: dict[str, Any]
    deleted: list[str]
    value: Any
    notes: list[str]
    changed: list[str]
    left: dict[str, str]


class Shown:
    """Stands for a last value that could not be sent: displays as it did there."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def returned(result: CellResult, namespace: dict[str, Any]) -> Returned:
    """The values of a cell, their functions over ``namespace``, which itself is not changed."""
    parcels = [result.values]
    if result.parts:
        parcels += context.require().engine.get(result.parts, None, writable=True)
    store = of_this_process()
    values: dict[str, Any] = {}
    for parcel in parcels:
        values.update(transfer.unpack(parcel, namespace))
        if store is not None:
            store.came(parcel.buffers)
    value = values.pop(RESULT, None)
    notes = []
    for name, why in result.left.items():
        kept = f" (the notebook keeps the {name} it has)" if name in namespace else ""
        notes.append(f"{name} could not be brought here{kept}: {why}")
    notes += [f"-o {name}: the cell has not bound that name" for name in result.missing]
    if result.text is not None:
        value = Shown(result.text)
    return Returned(values, result.deleted, value, notes, result.changed, result.left)


def changed_note(names: Sequence[str]) -> str:
    """What to say of them."""
    one = len(names) == 1
    return (
        f"{', '.join(names)} changed on the cluster only: bind {'it' if one else 'them'} in the cell ({names[0]} = {names[0]}) "
        f"or return {'it' if one else 'them'}"
    )


def empty() -> Parcel:
    """A parcel without values."""
    return Parcel([], b"", [], [])
