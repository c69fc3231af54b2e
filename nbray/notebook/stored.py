"""Large values that a notebook's cells read: put into the store once, and used again by later cells until they change.

Whether a value has changed is never guessed. What cannot change (views of the store, Arrow data, bytes, text) is known by its identity. What came
from the cluster lies in a private mapping of the store, whose page table says whether anything was written to. Everything else is compared
with its copy in the store, byte by byte: that is exact, and 4 times as fast as the fastest cryptographic hash (7 GB/s against 1.9, ARCHITECTURE).
"""

from __future__ import annotations

import pickle
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbray import platform
from nbray.api import context
from nbray.errors import NbrayError, StoreFullError
from nbray.store.memory import SharedMemory

if TYPE_CHECKING:
    import numpy as np

    from nbray.api.refs import ObjectRef

APART = 1 << 20
"""Bytes from which on a buffer, a table or a text may be an object of its own."""

COMPARED = 8 << 20
"""Bytes of changeable buffers in one cell up to which they are simply sent again."""

SHARE = 16
"""The store's address space, which is 8 times its memory, divided by what one notebook's values may take of it."""

_PIECE = 1 << 18
_STEPS = 64

Slice = tuple[int, int, int]
"""Bytes of an argument of the task: its position, the offset (below 0: from its end), and how many."""


@dataclass
class Inputs:
    """What a cell is sent, in bytes. ``size``: all of it; ``reused``: what the store had already; ``stored``: what it keeps from now on;
    ``compared``: what was looked at for changes, which took ``seconds``.
    """

    size: int = 0
    reused: int = 0
    stored: int = 0
    compared: int = 0
    seconds: float = 0.0

    def words(self) -> str:
        """For people: ``in 1.2 GB (reused; looking for changes took 0.09 s)``; empty for less than a megabyte."""
        from nbray.notebook.arguments import human

        if self.size < APART:
            return ""
        notes = []
        if self.reused:
            notes.append(
                "reused" if self.reused >= 0.99 * self.size else f"{human(self.reused)} of them reused"
            )
        if self.seconds >= 0.01:
            notes.append(f"looking for changes took {self.seconds:.2f} s")
        return f"in {human(self.size)}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass
class _Kept:
    """A value in the store. ``owner``: a weak reference to what owns its memory here, or itself (``strong``) where that cannot be referred to weakly."""

    ref: ObjectRef[Any]
    size: int
    owner: Any
    strong: bool = False
    fixed: bool = False
    """It cannot change."""

    def alive(self) -> bool:
        # Two references: this one and that of the call.
        return sys.getrefcount(self.owner) > 2 if self.strong else self.owner() is not None


class StoredInputs:
    """What one notebook has in the store of one cluster."""

    def __init__(self, engine: Any, budget: int | None = None) -> None:
        """``budget``: bytes that are kept at most; by default half the store."""
        self.engine = engine
        self._budget = engine.welcome.span // SHARE if budget is None else budget
        self._kept: dict[Hashable, _Kept] = {}
        self._origins: dict[bytes, tuple[ObjectRef[Any], weakref.ref[Any]]] = {}

    @property
    def size(self) -> int:
        """Bytes that are kept for later cells."""
        return sum(kept.size for kept in list(self._kept.values()))

    def objects(self) -> list[tuple[int, int, bytes]]:
        """Where in this process's memory is what the store keeps for it: first address, one after the last, object; (id, id + 1, object) for
        what is known as a whole.
        """
        found = []
        for key, kept in list(self._kept.items()):
            if isinstance(key, tuple) and isinstance(key[0], int):
                found.append((key[0], key[0] + kept.size, kept.ref._id))
            elif isinstance(key, tuple):
                found.append((key[1], key[1] + 1, kept.ref._id))
        return found

    def sweep(self) -> None:
        """Let go of what the notebook has not any more; what can be referred to weakly goes by itself."""
        for key, kept in list(self._kept.items()):
            if not kept.alive():
                self._kept.pop(key, None)

    def forget(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._origins.clear()

    def came(self, buffers: Iterable[Any]) -> None:
        """These have just been read: as long as they live (and pin the object that they are private views of) it may be sent in their place."""
        for root in map(_root, buffers):
            object_id = _object(root)
            if object_id is not None and object_id not in self._origins:
                ref = self.engine.another_ref(object_id)
                if ref is not None:
                    self._origins[object_id] = (ref, weakref.ref(root, _Forget(self._origins, object_id)))

    # -- what a placement asks for

    def original(self, object_id: bytes) -> ObjectRef[Any] | None:
        """A ref of an object that a view shows, if this process may use it."""
        origin = self._origins.get(object_id)
        return origin[0] if origin is not None else self.engine.another_ref(object_id)

    def find(self, key: Hashable, owner: Any) -> _Kept | None:
        """What is kept under ``key`` for that owner."""
        kept = self._kept.get(key)
        if kept is None or (kept.owner if kept.strong else kept.owner()) is not owner:
            return None
        # Used last.
        self._kept[key] = self._kept.pop(key)
        return kept

    def put(self, key: Hashable, value: Any, size: int, owner: Any, *, fixed: bool = False) -> _Kept:
        """Put a value into the store, and keep it if it fits the budget. Raises StoreFullError."""
        self._kept.pop(key, None)
        while self._kept and self.size + size > self._budget:
            self._kept.pop(next(iter(self._kept)))
        try:
            ref = self.engine.put(value)
        except StoreFullError:
            if not self._kept:
                raise
            self.forget()
            ref = self.engine.put(value)
        try:
            kept = _Kept(ref, size, weakref.ref(owner, _Forget(self._kept, key)), fixed=fixed)
        except TypeError:
            kept = _Kept(ref, size, owner, strong=True, fixed=fixed)
        if size <= self._budget:
            self._kept[key] = kept
        return kept


_stored: StoredInputs | None = None


def of_this_process() -> StoredInputs | None:
    """What this process's notebook has in the store of the cluster that it is connected to; None while it is not."""
    global _stored
    runtime = context.current()
    # Other engines send all anew.
    if runtime is None or not hasattr(runtime.engine, "another_ref"):
        return None
    if _stored is None or _stored.engine is not runtime.engine:
        _stored = StoredInputs(runtime.engine)
        runtime.on_close.append(_stored.forget)
    return _stored


def sweep() -> None:
    """To be called after each cell: let go of what it has deleted."""
    if _stored is not None:
        _stored.sweep()


class _Forget:
    """Called when the owner of a value is gone: takes the value out, unless another owner's has taken its place."""

    __slots__ = ("_key", "_values")

    def __init__(self, values: dict[Any, Any], key: Any) -> None:
        self._values = values
        self._key = key

    def __call__(self, owner: weakref.ref[Any]) -> None:
        kept = self._values.get(self._key)
        if kept is not None and (kept.owner if isinstance(kept, _Kept) else kept[1]) is owner:
            self._values.pop(self._key, None)


class Placement:
    """The large values of one cell, collected while it is packed; `settle` puts them where they belong."""

    def __init__(self) -> None:
        self.refs: list[ObjectRef[Any]] = []
        """Arguments of the task, in the order that `Slice` and the list of `wholes` refer to."""
        self.wholes: list[int] = []
        """Positions of the values for which `take` was called, among ``refs``."""
        self.inputs = Inputs()
        self._store: StoredInputs
        self._values: list[tuple[Any, int]] = []
        self._numbers: dict[int, int] = {}
        self._places: dict[bytes, int] = {}
        self._copies: dict[int, tuple[Hashable, Any]] = {}

    def take(self, value: Any, size: int) -> int:
        """An unchangeable value of ``size`` bytes is an object of its own: its number among the `wholes`."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._values)
            self._values.append((value, size))
        return number

    def copied(self, copy: np.ndarray[Any, Any], original: np.ndarray[Any, Any]) -> None:
        """``copy`` was made to have the items of ``original`` side by side."""
        interface = original.__array_interface__
        key = (interface["data"][0], original.shape, original.strides, interface["typestr"])
        self._copies[_address(copy)] = (key, _root(original))

    def settle(self, store: StoredInputs, head: int, buffers: Sequence[pickle.PickleBuffer]) -> list[Any]:
        """Each of the buffers, or the `Slice` where it is. ``head``: bytes of the pickle. Raises StoreFullError."""
        self._store = store
        store.sweep()
        self.inputs.size = head
        self.wholes = [self._whole(value, size) for value, size in self._values]
        found: list[Any] = list(buffers)
        views = [buffer.raw() for buffer in buffers]
        self.inputs.size += sum(view.nbytes for view in views)
        left: list[int] = []
        for at, view in enumerate(views):
            if view.nbytes >= APART:
                place = self._from_store(view)
                if place is None:
                    left.append(at)
                else:
                    found[at] = place
        if sum(views[at].nbytes for at in left) >= COMPARED:
            for at in left:
                found[at] = self._stored(views[at])
        return found

    def _whole(self, value: Any, size: int) -> int:
        key = ("value", id(value))
        kept = self._store.find(key, value)
        if kept is None:
            kept = self._store.put(key, value, size, value, fixed=True)
            self.inputs.stored += size
        else:
            self.inputs.reused += size
        self.inputs.size += size
        return self._place(kept.ref)

    def _place(self, ref: ObjectRef[Any]) -> int:
        place = self._places.get(ref._id)
        if place is None:
            place = self._places[ref._id] = len(self.refs)
            self.refs.append(ref)
        return place

    def _from_store(self, view: memoryview) -> Slice | None:
        """Where memory that was read from the store is there, if it is as it was."""
        root = _root(view)
        object_id = _object(root)
        if object_id is None:
            return None
        address, size = _address(view), view.nbytes
        start = root.__array_interface__["data"][0]
        fixed = _is_fixed(root)
        ref = self._store.original(object_id)
        if ref is None:
            if not fixed:
                return None
            # Nobody holds the object any more but this view: from now on its copy is what is used.
            return self._known((address, size), view, root) or self._new((address, size), view, root)
        if not fixed and not platform.unwritten(address, size):
            first = SharedMemory.original(root, address, size)
            if not self._same(view, first):
                return None
        self.inputs.reused += size
        return self._place(ref), address - start, size

    def _stored(self, view: memoryview) -> Slice:
        address = _address(view)
        key, owner = self._copies.get(address, ((address, view.nbytes), None))
        if owner is None:
            owner = _root(view)
        return self._known(key, view, owner) or self._new(key, view, owner)

    def _known(self, key: Hashable, view: memoryview, owner: Any) -> Slice | None:
        kept = self._store.find(key, owner)
        if kept is None:
            return None
        size = view.nbytes
        if not kept.fixed:
            try:
                _, memory = self._store.engine.raw(kept.ref)
            except NbrayError:
                # Somebody has freed it.
                return None
            if not self._same(view, memory[-size:]):
                return None
        self.inputs.reused += size
        return self._place(kept.ref), -size, size

    def _new(self, key: Hashable, view: memoryview, owner: Any) -> Slice:
        import numpy as np

        size = view.nbytes
        fixed = _object(owner) is not None and _is_fixed(owner)
        kept = self._store.put(key, np.frombuffer(view, np.uint8), size, owner, fixed=fixed)
        self.inputs.stored += size
        return self._place(kept.ref), -size, size

    def _same(self, one: memoryview, other: memoryview) -> bool:
        import numpy as np

        began = time.perf_counter()
        size = one.nbytes
        even = size // 8 * 8
        left, right = (np.frombuffer(view[:even], np.uint64) for view in (one, other))
        self.inputs.compared += size
        try:
            # Pieces that fit the cache: the result of comparing them does, too.
            return one[even:] == other[even:] and all(
                np.array_equal(left[at : at + _PIECE // 8], right[at : at + _PIECE // 8])
                for at in range(0, len(left), _PIECE // 8)
            )
        finally:
            self.inputs.seconds += time.perf_counter() - began


def _address(buffer: Any) -> int:
    import numpy as np

    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


def _root(view: Any) -> Any:
    """What owns the memory that a view shows."""
    value = view
    for _ in range(_STEPS):
        if hasattr(value, "forks"):
            break
        following: Any = value.obj if isinstance(value, memoryview) else getattr(value, "base", None)
        if following is None:
            break
        value = following
    return value


def _object(root: Any) -> bytes | None:
    """The object of the store whose memory that is."""
    release: Callable[[], None] | None = getattr(root, "release", None)
    found = getattr(release, "args", (None,))[0] if hasattr(root, "forks") else None
    return found if isinstance(found, bytes) else None


def unchanged(array: np.ndarray[Any, Any]) -> Callable[[], bool] | None:
    """For an array that shows a private mapping of the store: what tells whether it is as it was read. None for every other array."""
    root = _root(array)
    flags = array.flags
    if not hasattr(root, "whole") or not (flags.c_contiguous or flags.f_contiguous):
        return None
    address, size = int(array.__array_interface__["data"][0]), array.nbytes
    first = SharedMemory.original(root, address, size)
    return lambda: platform.unwritten(address, size) is True or first == array.tobytes("A")


def _is_fixed(root: Any) -> bool:
    """Whether memory of the store is shown read-only; else it is a private copy on write."""
    flags = getattr(root, "flags", None)
    return flags is not None and not flags.writeable
