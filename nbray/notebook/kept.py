"""In the process that ran a cell: which object each name that it bound will stand for on the cluster.

The names of a cell's result share one object, so that two names for one value stay two names for one value. A large value that shares nothing with
the others becomes an object of its own: the notebook can let go of it alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.notebook.runner import CellResult
    from nbray.notebook.transfer import Packed, Parcel

APART = 1 << 20
"""Bytes of buffers from which on a value is worth an object of its own."""

LOOKED_AT = 10_000
"""Objects inside of a value up to which it is looked at whether it shares one of them."""

_IMMUTABLE = (
    str,
    bytes,
    int,
    float,
    complex,
    tuple,
    frozenset,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    types.CodeType,
)


def divide(
    packed: Packed, repack: Callable[[Iterable[str], Mapping[str, Any]], Packed], extra: Mapping[str, Any]
) -> tuple[Packed, dict[str, Parcel]]:
    """What stays together, and by name the large values that do not. ``packed``: all of it, ``repack``: packs some of its names and of ``extra``."""
    names = [name for name in packed.parcel.names if name not in extra]
    large = [name for name in names if packed.out_of_band.get(name, 0) >= APART]
    if not large or len(names) + len(packed.parcel.modules) < 2:
        return packed, {}
    alone = {name: repack([name], {}) for name in large}
    parts = {name: one for name, one in alone.items() if one.parcel.names == [name] and not one.left}
    rest_names = [name for name in (*packed.parcel.modules, *names) if name not in parts]
    present = {name: value for name, value in extra.items() if name in packed.parcel.names}
    rest = repack(rest_names, present)
    contents = {name: _mutable(one) for name, one in parts.items()}
    inside = _mutable(rest)
    shared = {
        name
        for name, found in contents.items()
        if found is None
        or inside is None
        or not found.isdisjoint(inside)
        or any(other is None or not found.isdisjoint(other) for n, other in contents.items() if n != name)
    }
    if shared:
        parts = {name: one for name, one in parts.items() if name not in shared}
        if not parts:
            return packed, {}
        rest = repack([name for name in (*packed.parcel.modules, *names) if name not in parts], present)
    return rest, {name: one.parcel for name, one in parts.items()}


def _mutable(packed: Packed) -> set[int] | None:
    """Identities of the changeable objects inside; None: too many to look at."""
    memo: dict[int, tuple[int, Any]] = packed.pickler.memo.copy()
    if len(memo) > LOOKED_AT:
        return None
    return {
        identity
        for identity, (_, value) in memo.items()
        if not isinstance(value, _IMMUTABLE) and not type(value).__name__.endswith("DType")
        and not type(value).__name__.endswith("Dtype")
    }  # fmt: skip


def announce(version: int, result: CellResult) -> None:
    """Tell the node what this cell's names will stand for once its task has ended well."""
    from nbray.api import context

    runtime = context.current()
    if runtime is None or not version:
        return
    engine: Any = runtime.engine
    values: dict[str, tuple[ObjectRef[Any] | None, int]] = {
        name: (result.parts[index] if index >= 0 else None, result.sizes.get(name, 0))
        for name, index in result.homes.items()
    }
    engine.bind_names(version, values, result.deleted)


def homes(parcels: Iterable[Parcel], hidden: str) -> dict[str, int]:
    """Name -> position of the parcel that it is in; modules too, but not ``hidden``."""
    return {
        name: index
        for index, parcel in enumerate(parcels)
        for name in (*parcel.modules, *parcel.names)
        if name != hidden
    }
