"""What a cell has changed in place: the notebook's own value stays as it was, so the cell's end says so.

A cell's inputs are private copies. ``model.fit(x)`` on the cluster changes a copy, and without ``model = model`` nothing comes back. In the
process of the cell the values that it was given are pictured before and after it runs; values of more than a megabyte are not looked at.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LIMIT = 1 << 20
"""Bytes of a value, when it is sent, up to which it is looked at."""

PICKLED = 2 << 20
"""Bytes of all values together that are pictured by pickling them, which takes some 10 ms."""

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

_FIXED: tuple[type, ...] = (
    *_ATOMS,
    range,
    slice,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    dt.date,
    dt.time,
    dt.timedelta,
    dt.tzinfo,
    decimal.Decimal,
    fractions.Fraction,
    enum.Enum,
    pathlib.PurePath,
    re.Pattern,
)

_FIXED_MODULES = ("pyarrow.", "nbray.")

_CONTAINERS: tuple[type, ...] = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.defaultdict)  # fmt: skip


Mapped = Callable[[Any], Callable[[], bool] | None]
"""For an array: what tells whether it shows still what it showed at first; None for an array in ordinary memory."""


def may_change(value: Any) -> bool:
    """Whether a value can be changed in place, as far as its type tells."""
    kind = type(value)
    if isinstance(value, _FIXED) or kind.__module__.startswith(_FIXED_MODULES):
        return False
    if kind is tuple or kind is frozenset:
        return not _ATOMS.issuperset(map(type, value))
    return not (kind.__module__ in ("numpy", "numpy.dtypes") and kind.__name__ != "ndarray")


@functools.cache
def remembered(kind: Any) -> frozenset[str]:
    """Attributes in which instances of a class keep what was computed when it was first asked for."""
    if kind.__module__ == "builtins":
        return frozenset()
    found = {
        name
        for base in kind.__mro__
        for name, attribute in vars(base).items()
        if isinstance(attribute, functools.cached_property)
    }
    if kind.__module__.startswith("pandas."):
        found.add("_cache")
    return frozenset(found)


class Watch:
    """The values of some names as they are before a cell runs."""

    def __init__(
        self,
        names: Iterable[str],
        namespace: Mapping[str, Any],
        dump: Callable[[Any], bytes],
        mapped: Mapped | None = None,
    ) -> None:
        """``names``: smallest value first; ``dump``: the bytes of a value, equal for a value that has not changed; ``mapped``: tells of arrays
        whether they are what they were at first, if it can.
        """
        self._dump = dump
        self._mapped = mapped
        self._room = PICKLED
        self._before: dict[str, tuple[Any, Any]] = {}
        for name in names:
            value = namespace.get(name)
            picture = self._picture(value)
            if picture is not None:
                self._before[name] = value, picture

    def changed(self, namespace: Mapping[str, Any]) -> list[str]:
        """Those whose value is the same object and has changed."""
        self._room = 2 * PICKLED
        return [
            name
            for name, (value, picture) in self._before.items()
            if namespace.get(name) is value and not self._is_still(value, picture)
        ]

    def _picture(self, value: Any) -> Any:
        """Something to compare with later; None where there is nothing."""
        kind = type(value)
        try:
            if kind in _CONTAINERS and _holds_atoms(value):
                return value.copy()
            if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and not value.dtype.hasobject:
                is_first = self._mapped(value) if self._mapped is not None else None
                return _Mapped(value, is_first) if is_first is not None else value.copy()
            if kind.__module__.startswith("pandas") and kind.__name__ in ("DataFrame", "Series"):
                return value.copy()
            if self._room <= 0:
                return None
            data = self._dump(value)
            self._room -= len(data)
        except Exception:  # noqa: BLE001  (whatever a user's class does when it is looked at: the cell is to run)
            return None
        return data

    def _is_still(self, value: Any, picture: Any) -> bool:
        kind = type(value)
        try:
            if type(picture) is bytes:
                data = self._dump(value) if self._room > 0 else picture
                self._room -= len(data)
                return data == picture
            if type(picture) is _Mapped:
                return picture.is_still(value)
            if kind.__name__ == "ndarray":
                same: bool = (
                    value.shape == picture.shape
                    and value.dtype == picture.dtype
                    and value.tobytes() == picture.tobytes()
                )
                return same
            if kind in _CONTAINERS:
                if kind is dict and list(value) != list(picture):
                    return False
                return bool(value == picture)
            # A frame's blocks may be rearranged by looking at it.
            return bool(value.equals(picture))
        except Exception:  # noqa: BLE001  (what cannot be compared any more is not what it was)
            return False


class _Mapped:
    """An array that shows a private mapping of the store: nothing is copied before, and mostly nothing read after."""

    def __init__(self, array: Any, is_first: Callable[[], bool]) -> None:
        self._layout = _layout(array)
        self._is_first = is_first

    def is_still(self, array: Any) -> bool:
        """Whether the array is as it was."""
        return self._layout == _layout(array) and self._is_first()


def _layout(array: Any) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.__array_interface__["data"][0]


def dumper(make: Callable[[io.BytesIO], Any]) -> Callable[[Any], bytes]:
    """Pickles by ``make(file)``, whose ``buffers`` are what it keeps apart."""

    def dump(value: Any) -> bytes:
        file = io.BytesIO()
        pickler = make(file)
        pickler.dump(value)
        return b"".join([file.getvalue(), *(buffer.raw() for buffer in pickler.buffers)])

    return dump


def _holds_atoms(value: Any) -> bool:
    atoms = _ATOMS.issuperset
    return isinstance(value, bytearray) or (
        atoms(map(type, value)) and (not isinstance(value, dict) or atoms(map(type, value.values())))
    )
