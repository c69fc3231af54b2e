"""Where a notebook holds objects of the cluster: variables and ``Out[n]`` with refs, handles, or arrays that lie in the object store."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.api.machine import LOCATED
from nbray.notebook import stored, targets

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

COLUMNS = 100
"""Columns of a frame that are looked at."""


def names_by_object(cockpit: Cockpit) -> dict[bytes, list[str]]:
    """Object -> the variables and ``Out[n]`` of the notebook through which it is held."""
    found: dict[bytes, list[str]] = {}
    regions = _regions()
    for name, value in _values(cockpit):
        objects = dict.fromkeys(targets.refs_in(value))
        if regions:
            objects |= dict.fromkeys(_viewed(value, regions))
        for each in objects:
            found.setdefault(each, []).append(name)
    return found


def _values(cockpit: Cockpit) -> Iterator[tuple[str, Any]]:
    namespace = cockpit.shell.user_ns
    for name in targets.variables(cockpit):
        if name not in ("In", "Out"):
            yield name, namespace[name]
    outputs = namespace.get("Out")
    if isinstance(outputs, Mapping):
        for number, value in list(outputs.items()):
            yield f"Out[{number}]", value


def _regions() -> list[tuple[int, int, bytes]]:
    """(first address, one after the last, object) of what this process looks at in the object store."""
    engine: Any = context.require().engine
    base = engine.memory.address
    kept = stored.of_this_process()
    return ([] if kept is None else kept.objects()) + [
        (base + entry.offset, base + entry.offset + entry.size, object_id)
        for object_id, entry in list(engine.entries.items())
        if entry.state == LOCATED and entry.views
    ]


def _viewed(value: Any, regions: list[tuple[int, int, bytes]]) -> Iterator[bytes]:
    for address in (id(value), *_addresses(value)):
        for start, end, object_id in regions:
            if start <= address < end:
                yield object_id


def _addresses(value: Any) -> Iterator[int]:
    """Where the data of an array, a frame or a table begin. Only libraries that are imported already are asked."""
    numpy, pandas, arrow = (sys.modules.get(name) for name in ("numpy", "pandas", "pyarrow"))
    if numpy is not None and isinstance(value, numpy.ndarray):
        yield int(value.__array_interface__["data"][0])
    elif pandas is not None and isinstance(value, pandas.Series):
        yield from _addresses(value.to_numpy(copy=False) if value.dtype != object else None)
    elif pandas is not None and isinstance(value, pandas.DataFrame):
        for column in range(min(COLUMNS, value.shape[1])):
            yield from _addresses(value.iloc[:, column])
    elif arrow is not None and isinstance(value, arrow.Table):
        for column in value.columns[:COLUMNS]:
            for chunk in column.chunks[:1]:
                yield from (buffer.address for buffer in chunk.buffers() if buffer is not None)
