"""Values on their way between the notebook and the process that runs a cell.

A cell behaves as if it ran in the notebook, so the names it gets must hang together as they do there: two names for one object stay one
object, and a function sees the *current* global names of the namespace it lands in, not a private copy. So all values of a cell go
through one pickler, which takes functions of the namespace apart (code, defaults, closure) and leaves their globals out; what those
functions read is sent as names of its own. At the other end they are put together over that end's namespace.

The bytes of arrays are kept out of the pickle (protocol 5), so that they travel through the object store without a copy; refs and actor
handles are kept out too, so that the engine sees them and counts them.
"""

from __future__ import annotations

import dis
import functools
import importlib
import io
import pickle
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import cloudpickle

from nbray.notebook.capture import names_in_query
from nbray.notebook.stored import APART, Placement, StoredInputs
from nbray.store import classes as _classes  # noqa: F401  (for what it makes picklable)
from nbray.store import serialization
from nbray.store.serialization import Raw

IN_BAND = 4096
"""Buffers below this many bytes stay in the pickle: aligning and describing them apart costs more than copying."""

_FIRST = (type(None), bool, int, float, complex, str, bytes, tuple)


class UnsendableError(Exception):
    """A value that no other process can have; the text says why and what to do instead."""


class RefusedError(Exception):
    """A name of `pack` cannot be sent. ``name``, ``value``, ``needed_by`` (a function that reads it, or ""); ``__cause__`` says why."""

    def __init__(self, name: str, value: Any, needed_by: str) -> None:
        super().__init__(name)
        self.name = name
        self.value = value
        self.needed_by = needed_by


@dataclass
class Parcel:
    """Named values, ready for the engine.

    ``head``: one pickle after the other, in the order of ``names``; ``buffers``: the large ones' bytes, out of band; ``carried``: refs,
    for the engine's own pickler; ``modules``: name -> module to import; ``imports``: further modules to import;
    ``size``: bytes altogether.
    """

    names: list[str]
    head: Any
    buffers: list[Any]
    carried: list[Any]
    modules: dict[str, str] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    size: int = 0
    wholes: list[int] = field(default_factory=list)
    """Which of the stored arguments are values that the pickles refer to; those hold bytes of ``buffers``, too (`nbray.notebook.stored`)."""


@dataclass
class Packed:
    """A parcel and what could not go into it: name -> why."""

    parcel: Parcel
    left: dict[str, str]
    refused: dict[str, Exception]
    """name -> what its packing raised, for those of ``left``."""
    sizes: dict[str, int]
    needed_by: dict[str, str]
    """name -> the function that reads it, for names that the cell itself does not mention."""
    carrying: set[str]
    """Names whose values mention refs."""
    out_of_band: dict[str, int]
    """Bytes of each value that are not in the pickle itself."""
    pickler: NamespacePickler
    """Knows what it has met."""
    placement: Placement | None = None

    def settle(self, store: StoredInputs) -> Placement:
        """Put the large values into the store, or find them there. Raises StoreFullError."""
        placement = self.placement
        assert placement is not None
        parcel = self.parcel
        parcel.buffers = placement.settle(store, parcel.head.raw().nbytes, parcel.buffers)
        parcel.wholes = placement.wholes
        return placement


def pack(
    names: Iterable[str],
    namespace: dict[str, Any],
    *,
    carried: tuple[type, ...] = (),
    extra: Mapping[str, Any] | None = None,
    follow: Callable[[str], bool] | None = None,
    strict: bool = False,
    apart: bool = False,
) -> Packed:
    """Pack the values of ``names``, and of every further name of the namespace that their functions read and ``follow`` agrees to.

    ``carried``: types whose instances the engine's own pickler must see. ``extra``: values that have no name in the namespace. Names
    that cannot be sent are in ``left`` and the rest is complete; or, if ``strict``, the first of them raises RefusedError. ``apart``: large
    values may be put into the store; `Packed.settle` has to be called then.
    """
    wanted = dict.fromkeys(names)
    left: dict[str, str] = {}
    refused: dict[str, Exception] = {}
    needed_by: dict[str, str] = {}
    while True:
        attempt = _Attempt(wanted, namespace, carried, extra or {}, follow, left, needed_by, apart)
        failed = attempt.run()
        if failed is None:
            if not attempt.late:
                return attempt.packed(refused)
            # Unpickling an instance may call its methods (hash, setstate): now that all names are known, what they read goes first.
            wanted.update(dict.fromkeys(attempt.needed_by))
            needed_by.update(attempt.needed_by)
            continue
        name, error = failed
        if strict:
            raise RefusedError(name, namespace.get(name), attempt.needed_by.get(name, "")) from error
        # The pickler's memo knows objects that the failed part mentioned first, so start afresh without that name.
        left[name] = reason(error)
        refused[name] = error


class _Attempt:
    def __init__(
        self,
        wanted: Iterable[str],
        namespace: dict[str, Any],
        carried: tuple[type, ...],
        extra: Mapping[str, Any],
        follow: Callable[[str], bool] | None,
        left: dict[str, str],
        needed_by: dict[str, str],
        apart: bool,
    ) -> None:
        self._namespace = namespace
        self._extra = extra
        self._follow = follow
        self._left = left
        self._seen = {name for name in wanted if name in namespace}
        self._code: deque[str] = deque()
        self._plain: deque[str] = deque()
        self._data: deque[str] = deque()
        self._file = io.BytesIO()
        self._placement = Placement() if apart else None
        self._pickler = NamespacePickler(self._file, namespace, carried, self._placement)
        self._parcel = Parcel([], b"", self._pickler.buffers, self._pickler.carried)
        self.needed_by = dict(needed_by)
        self.late = False
        self._sizes: dict[str, int] = {}
        self._out_of_band: dict[str, int] = {}
        self._carrying: set[str] = set()
        for name in wanted:
            if name in namespace:
                self._enqueue(name)

    def _enqueue(self, name: str) -> None:
        # Functions and classes first: unpickling an instance may already call its methods, and those read plain values.
        if name in self._left:
            return
        value = self._namespace[name]
        if isinstance(value, (types.FunctionType, type)):
            self._code.append(name)
        elif isinstance(value, _FIRST):
            self._plain.append(name)
        else:
            self._data.append(name)

    def run(self) -> tuple[str, Exception] | None:
        """Pack everything; the first name that cannot be sent, and why."""
        for name, value in self._extra.items():
            if name not in self._left:
                failure = self._dump(name, value)
                if failure is not None:
                    return name, failure
        while self._code or self._plain or self._data:
            name = (self._code or self._plain or self._data).popleft()
            value = self._namespace[name]
            if is_importable_module(value):
                self._parcel.modules[name] = value.__name__
                continue
            failure = self._dump(name, value)
            if failure is not None:
                return name, failure
        return None

    def _dump(self, name: str, value: Any) -> Exception | None:
        apart = self._pickler.out_of_band
        before = self._file.tell() + apart + self._pickler.elsewhere
        carried = len(self._pickler.carried)
        try:
            if self._placement is not None and type(value) in (bytes, str) and len(value) >= APART:
                self._pickler.dump(self._pickler.whole(value))
            else:
                self._pickler.dump(value)
        except Exception as error:  # noqa: BLE001  (whatever a user's __reduce__ raises)
            return error
        self._sizes[name] = self._file.tell() + self._pickler.out_of_band + self._pickler.elsewhere - before
        self._out_of_band[name] = self._pickler.out_of_band - apart
        self._parcel.names.append(name)
        if len(self._pickler.carried) > carried:
            self._carrying.add(name)
        for needed in sorted(self._pickler.take_needed()):
            if (
                needed in self._namespace
                and needed not in self._seen
                and (self._follow is None or self._follow(needed))
            ):
                self._seen.add(needed)
                self.needed_by[needed] = name
                self.late = self.late or not isinstance(value, (types.FunctionType, type, *_FIRST))
                self._enqueue(needed)
        return None

    def packed(self, refused: dict[str, Exception]) -> Packed:
        # Its bytes, not a view: a file that is collected while a view of it lives raises.
        self._parcel.head = pickle.PickleBuffer(self._file.getvalue())
        self._parcel.size = self._file.tell() + self._pickler.out_of_band + self._pickler.elsewhere
        return Packed(
            self._parcel,
            self._left,
            refused,
            self._sizes,
            self.needed_by,
            self._carrying,
            self._out_of_band,
            self._pickler,
            self._placement,
        )


def unpack(
    parcel: Parcel, namespace: dict[str, Any], stored: Sequence[Raw] = (), *, refresh_classes: bool = False
) -> dict[str, Any]:
    """The values by name; functions among them have ``namespace`` as their globals, which gets nothing else but the modules they may need.

    ``stored``: the arguments that came with the parcel. With ``refresh_classes`` a class that this process knows already is given the state that was sent (a worker runs one cell after the
    other); else it stays as it is here. Raises what importing the modules or unpickling raises.
    """
    for name in parcel.imports:
        importlib.import_module(name)
    values: dict[str, Any] = {
        name: importlib.import_module(module) for name, module in parcel.modules.items()
    }
    buffers = _buffers(parcel.buffers, stored)
    unpickler = pickle.Unpickler(io.BytesIO(_writable(parcel.head)), buffers=buffers)
    outer = getattr(_receiving, "end", None)
    wholes = [stored[place].value() for place in parcel.wholes]
    _receiving.end = _End(namespace, parcel.carried, refresh_classes, wholes)
    try:
        for name in parcel.names:
            values[name] = unpickler.load()
            if refresh_classes:
                # A cell's process: what is unpickled later may call functions that read this name.
                namespace[name] = values[name]
    finally:
        _receiving.end = outer
    return values


def _buffers(buffers: Sequence[Any], stored: Sequence[Raw]) -> list[memoryview]:
    found: list[memoryview] = []
    seen: list[tuple[int, int, int]] = []
    for buffer in buffers:
        if not isinstance(buffer, tuple):
            found.append(_writable(buffer))
            continue
        place, start, size = buffer
        memory = memoryview(stored[place].data)
        start = start if start >= 0 else len(memory) + start
        view = _writable(memory[start : start + size])
        if any(place == other and start < end and at < start + size for other, at, end in seen):
            # Two arrays of the notebook show the same memory; here each is to be changed for itself.
            view = memoryview(bytearray(view))
        seen.append((place, start, start + size))
        found.append(view)
    return found


def _writable(buffer: Any) -> memoryview:
    """The buffer, or a copy of a read-only one (small values travel inline): inputs and results are the receiver's own."""
    view = memoryview(buffer)
    return memoryview(bytearray(view)) if view.readonly else view


def carried_types() -> tuple[type, ...]:
    """Types whose instances the engine's own pickler must see, to count them (an actor's handle contains a ref)."""
    from nbray.api.refs import ObjectRef

    return (ObjectRef,)


def is_importable_module(value: Any) -> bool:
    """Whether a value is a module that another process gets by importing it."""
    return (
        isinstance(value, types.ModuleType)
        and sys.modules.get(value.__name__) is value
        and not _was_made_here(value)
    )


def _was_made_here(module: Any) -> bool:
    """Whether a module is known in this process only, although ``sys.modules`` has it."""
    name = module.__name__
    made = module.__spec__ is None and "." not in name and name != "__main__"
    return made and not hasattr(module, "__file__") and not hasattr(module, "__path__")


def submodules(root: types.ModuleType, chains: Iterable[str]) -> list[str]:
    """Which attribute chains of a module are imported submodules: those have to be imported where the chain is used."""
    found: dict[str, None] = {}
    for chain in sorted(chains):
        name = root.__name__
        for part in chain.split("."):
            name = f"{name}.{part}"
            if name not in sys.modules:
                break
            found[name] = None
    return list(found)


def reason(error: BaseException) -> str:
    """Why a value cannot be sent, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


_GLOBAL_OPERATIONS = frozenset(
    dis.opmap[name]
    for name in ("LOAD_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    if name in dis.opmap
)
_code_globals: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()


def code_globals(code: types.CodeType) -> frozenset[str]:
    """The global names that a code object and those inside it read."""
    known = _code_globals.get(code)
    if known is None:
        found = {step.argval for step in dis.get_instructions(code) if step.opcode in _GLOBAL_OPERATIONS}
        asks = "query" in code.co_names or "eval" in code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found |= code_globals(constant)
            elif asks and isinstance(constant, str):
                found.update(names_in_query(constant))
        known = _code_globals[code] = frozenset(found)
    return known


class _Apart:
    """Collects the buffers that are large enough."""

    def __init__(self) -> None:
        self.found: list[pickle.PickleBuffer] = []
        self.size = 0

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer goes into the pickle."""
        try:
            size = buffer.raw().nbytes
        except BufferError:
            return True
        if size < IN_BAND:
            return True
        self.found.append(buffer)
        self.size += size
        return False


class NamespacePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles values of a namespace; functions of that namespace without their globals (see the module)."""

    def __init__(
        self,
        file: io.BytesIO,
        namespace: dict[str, Any],
        carried: tuple[type, ...],
        placement: Placement | None = None,
    ) -> None:
        # No method of its own: values would live until the collector finds the cycle.
        self._apart = _Apart()
        super().__init__(file, protocol=5, buffer_callback=self._apart)
        self._namespace = namespace
        self._types = carried
        self._needed: set[str] = set()
        self._checked: set[type] = set()
        self.carried: list[Any] = []
        self.elsewhere = 0
        """Bytes of values that will be objects of their own."""
        self._placement = placement
        self._wholes: dict[int, _Whole] = {}

    @property
    def buffers(self) -> list[pickle.PickleBuffer]:
        """What is kept apart from the pickle."""
        return self._apart.found

    @property
    def out_of_band(self) -> int:
        """Bytes of ``buffers``."""
        return self._apart.size

    def take_needed(self) -> set[str]:
        """Global names read by the functions pickled since the last call."""
        needed, self._needed = self._needed, set()
        return needed

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is types.FunctionType:
            if value.__globals__ is self._namespace:
                return self._reduce_function(value)
        elif kind is types.CellType:
            try:
                return _empty_cell, (), (value.cell_contents,), None, None, _fill_cell
            except ValueError:
                return _empty_cell, ()
        elif kind is functools._lru_cache_wrapper:
            wrapped = value.__wrapped__
            if getattr(wrapped, "__globals__", None) is self._namespace:
                return _cached, (wrapped, value.cache_parameters())
        elif isinstance(value, type):
            reduced = super().reducer_override(value)
            if isinstance(reduced, tuple) and len(reduced) == 6:
                return (*reduced[:5], functools.partial(_fill_class, reduced[5]))
            return reduced
        elif kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            return _reduce_array(value, self._placement)
        elif kind is types.ModuleType and sys.modules.get(value.__name__) is value and _was_made_here(value):
            raise UnsendableError("no other process can import the module: it has no file")
        elif kind.__module__ == "pyarrow.lib":
            return self._reduce_arrow(value)
        elif kind is _Whole:
            return _from_stored, (value.number,)
        elif self._placement is not None and _holds_arrow(kind):
            state = {
                name: each for name, each in value.__dict__.items() if name not in ("_pa_array", "_cache")
            }
            return _extension_array, (kind, value._pa_array, state)
        elif isinstance(value, self._types):
            self.carried.append(value)
            return _from_carried, (len(self.carried) - 1,)
        elif (
            isinstance(value, BaseException) and getattr(kind, "__reduce__", None) is BaseException.__reduce__
        ):
            # Not by a call of the class, whose __init__ need not accept what it has passed on to Exception.
            return _exception, (kind, value.args), value.__dict__ or None
        elif kind not in self._checked:
            refuse(value)
            self._checked.add(kind)
        return super().reducer_override(value)

    def whole(self, value: Any) -> _Whole:
        """What to pickle in place of a large text: a pickler does not ask about texts."""
        found = self._wholes.get(id(value))
        if found is None:
            found = self._wholes[id(value)] = _Whole(self._take(value, len(value)))
        return found

    def _take(self, value: Any, size: int) -> int:
        assert self._placement is not None
        self.elsewhere += size
        return self._placement.take(value, size)

    def _reduce_arrow(self, value: Any) -> Any:
        if self._placement is not None:
            import pyarrow as pa

            if isinstance(value, pa.Table | pa.RecordBatch | pa.ChunkedArray | pa.Array):
                size = value.nbytes
                if size >= APART:
                    return _from_stored, (self._take(value, size),)
        return serialization.reduce_arrow(value)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        self._needed |= code_globals(function.__code__)
        state = {
            "__qualname__": function.__qualname__,
            "__module__": function.__module__,
            "__doc__": function.__doc__,
            "__defaults__": function.__defaults__,
            "__kwdefaults__": function.__kwdefaults__,
            "__annotations__": function.__annotations__,
            "__dict__": function.__dict__,
        }
        if sys.version_info >= (3, 12):
            state["__type_params__"] = function.__type_params__
        return (
            _function,
            (function.__code__, function.__name__, function.__closure__),
            state,
            None,
            None,
            _fill_function,
        )


class _Memory:
    """The memory of a read-only array, presented as writable: the copy that is made of it may be written."""

    def __init__(self, array: Any) -> None:
        self.base = array
        data = (array.__array_interface__["data"][0], False)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (array.nbytes,), "data": data}


class _Whole:
    """Stands for a large text while it is pickled."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def _holds_arrow(kind: type) -> bool:
    """Whether it is one of pandas' arrays of Arrow data: those make their data anew for each pickle."""
    return kind.__name__.startswith(
        ("ArrowExtensionArray", "ArrowStringArray")
    ) and kind.__module__.startswith("pandas.")


def _reduce_array(array: Any, placement: Placement | None = None) -> Any:
    """Read-only arrays (views of the object store) arrive writable: inputs and results are private copies."""
    flags = array.flags
    if array.dtype.hasobject:
        return NotImplemented
    import numpy as np

    if not (flags.c_contiguous or flags.f_contiguous):
        if array.nbytes < IN_BAND:
            return NotImplemented
        copy = np.ascontiguousarray(array)
        if placement is not None:
            placement.copied(copy, array)
        return np.ndarray, (
            copy.shape,
            copy.dtype,
            pickle.PickleBuffer(cast(Any, copy.reshape(-1).view(np.uint8))),
            0,
            None,
            "C",
        )
    if flags.writeable:
        return NotImplemented
    order = "C" if flags.c_contiguous else "F"
    return np.ndarray, (
        array.shape,
        array.dtype,
        pickle.PickleBuffer(cast(Any, np.asarray(_Memory(array)))),
        0,
        None,
        order,
    )


def refuse(value: Any) -> None:
    """Raises UnsendableError for values that a pickler would take although they mean nothing elsewhere."""
    if isinstance(value, io.IOBase) and not isinstance(value, (io.BytesIO, io.StringIO)):
        raise UnsendableError("an open file belongs to this process")
    for base in type(value).__mro__:
        if base.__name__ == "Widget" and base.__module__.startswith("ipywidgets."):
            raise UnsendableError("a widget lives in the notebook")
        if base.__name__ == "InteractiveShell" and base.__module__.startswith("IPython."):
            raise UnsendableError("the notebook's own shell lives in the notebook")


# -- the receiving end: called by the unpickler -------------------------------------------------------------------------------


@dataclass
class _End:
    namespace: dict[str, Any]
    carried: list[Any]
    refresh_classes: bool
    wholes: list[Any]


_receiving = threading.local()


def _here() -> _End:
    end: _End | None = getattr(_receiving, "end", None)
    if end is None:
        raise pickle.UnpicklingError(
            "a part of a notebook cell's values was unpickled outside of nbray.notebook.transfer.unpack"
        )
    return end


def _function(
    code: types.CodeType, name: str, closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    return types.FunctionType(code, _here().namespace, name, None, closure)


def _fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    function.__dict__.update(state.pop("__dict__"))
    for name, value in state.items():
        setattr(function, name, value)


def _empty_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, contents: tuple[Any]) -> None:
    cell.cell_contents = contents[0]


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def _from_carried(index: int) -> Any:
    return _here().carried[index]


def _from_stored(number: int) -> Any:
    return _here().wholes[number]


def _extension_array(kind: Any, data: Any, state: dict[str, Any]) -> Any:
    array = kind.__new__(kind)
    array.__dict__.update(state, _pa_array=data, _cache={})
    return array


def _fill_class(fill: Callable[[type, Any], Any], cls: type, state: tuple[dict[str, Any], Any]) -> None:
    # cloudpickle finds the class by its tracker when this process made it, or has received it before.
    known = all(name in vars(cls) for name in state[0])
    if not known or _here().refresh_classes:
        fill(cls, state)
