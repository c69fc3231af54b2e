"""Values to bytes and back: fast for tiny values, without copies for large ones. Used by drivers and workers, never by the node.

A value travels as (kind, data, refs): ``data`` is laid out as ``kind`` says, ``refs`` are the ids of the object refs inside the value, each
once, in the order in which they were met.

===========  ==========================================================================================================================
kind         data
===========  ==========================================================================================================================
PICKLE       a pickle (protocol 5)
BUFFERS      u32 length of the pickle, u32 number of buffers, u64 length of each buffer; the pickle; the buffers. The first buffer begins
             at the next multiple of 64, as does each later one: arrays in the arena are aligned to a cache line
BYTES        the value, which is a ``bytes``
ARROW        a pyarrow.Table as an Arrow IPC stream, which any Arrow library maps without a copy
ARROW_BATCH  a pyarrow.RecordBatch, likewise
ERROR        the pickle of an exception
===========  ==========================================================================================================================

Arguments are a value too, of one of three forms: no bytes at all (a call without arguments); a tuple (positional arguments); or a list
``[args, kwargs, places]`` with None where an argument was a ref, and in ``places`` the position or keyword of each, in the order of
``Serialized.deps``. The refs *inside* arguments are ``refs``, as in any value.

Arrays read from a read-only buffer are read-only, from a writable one writable, whatever they were when they were written.
"""

from __future__ import annotations

import pickle
import sys
import threading
from io import BytesIO
from struct import Struct
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from nbray.errors import NbrayError, NotInitializedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nbray.api.refs import ObjectRef

PICKLE, BUFFERS, BYTES, ARROW, ERROR, ARROW_BATCH = range(6)

ALIGNMENT = 64
OUT_OF_BAND = 1024
"""Bytes from which on a buffer is kept apart from the pickle."""
LARGE_BYTES = 16 << 10
"""Bytes from which on an argument that is a ``bytes`` or ``bytearray`` is kept apart from the pickle."""

_ATOMS = frozenset({int, float, bool, type(None), str, bytes, complex})
_CONTAINERS = frozenset({tuple, list, dict})
_SHALLOW = 16
_PICKLED = (PICKLE, ERROR)
_HEAD = Struct("<II")
_PADDING = bytes(ALIGNMENT)
_SMALL_ARRAY = b"small_array"
_dumps, _loads = pickle.dumps, pickle.loads


class _Memory(Protocol):
    def write_view(self, offset: int, size: int) -> memoryview: ...

    def copy_in(self, offset: int, buffers: Iterable[memoryview], *, warm: bool = True) -> int: ...


class Serialized(msgspec.Struct, gc=False):
    """A value ready to be sent: ``size`` bytes when laid out as its ``kind`` says, by `flat` or in place by `write_into`.

    ``refs``: ids of the refs in it, None if there are none. ``deps``: ids of the arguments that are refs (`serialize_args`). The buffers
    are those of the value itself: it must not be changed before the bytes are written.
    """

    kind: int
    inband: bytes
    size: int
    refs: list[bytes] | None = None
    deps: list[bytes] | None = None
    buffers: list[memoryview] | None = None
    table: Any = None

    def flat(self) -> bytes:
        """The bytes, for a value that travels in a message."""
        if self.table is not None:
            import pyarrow as pa

            sink = pa.BufferOutputStream()
            _write_arrow(sink, self.table)
            data: bytes = sink.getvalue().to_pybytes()
            return data
        if self.buffers is None:
            return self.inband
        return b"".join(self._parts(self.buffers))

    def write_into(self, memory: _Memory, offset: int, *, warm: bool = True) -> None:
        """Write the bytes to ``offset`` of the arena, where the caller owns ``size`` bytes; one pass, no copy on the way.

        ``warm``: as in `SharedMemory.copy_in`.
        """
        if self.table is not None:
            import pyarrow as pa

            sink = pa.FixedSizeBufferWriter(pa.py_buffer(memory.write_view(offset, self.size)))
            sink.set_memcopy_threads(2)
            _write_arrow(sink, self.table)
        else:
            memory.copy_in(
                offset, (memoryview(self.inband),) if self.buffers is None else self._parts(self.buffers)
            )

    def _parts(self, buffers: list[memoryview]) -> list[memoryview]:
        lengths = [buffer.nbytes for buffer in buffers]
        head = (
            _HEAD.pack(len(self.inband), len(lengths)) + _lengths(len(lengths)).pack(*lengths) + self.inband
        )
        parts = [memoryview(head + _PADDING[: -len(head) % ALIGNMENT])]
        for buffer, length in zip(buffers, lengths, strict=True):
            parts.append(buffer)
            if length % ALIGNMENT:
                parts.append(memoryview(_PADDING)[: -length % ALIGNMENT])
        if lengths[-1] % ALIGNMENT:
            parts.pop()
        return parts


NO_ARGS = Serialized(PICKLE, b"", 0)
"""The arguments of a call without any."""


def serialize(value: Any, name: str = "the value") -> Serialized:
    """Make a value ready to be sent. Raises SerializationError, which says which part of ``name`` cannot be."""
    kind = type(value)
    if kind is bytes:
        return Serialized(BYTES, value, len(value))
    if kind in _ATOMS or (kind in _CONTAINERS and len(value) <= _SHALLOW and _is_shallow(kind, value)):
        data = _dumps(value, 5)
        return Serialized(PICKLE, data, len(data))
    if kind is list and type(value[0]) is (_ref_class or _known_ref_class()):
        serialized = _serialize_refs(value)
        if serialized is not None:
            return serialized
    if kind is bytearray and len(value) >= LARGE_BYTES:
        return pickle_value(_Whole(value))
    if kind.__module__ == "pyarrow.lib" and kind.__name__ in {"Table", "RecordBatch"}:
        arrow = _serialize_arrow(value)
        if arrow is not None:
            return arrow
    try:
        return pickle_value(value)
    except (NbrayError, MemoryError):
        raise
    except Exception as error:
        from nbray.store.culprit import explain

        raise explain(error, value, name) from error


def serialize_args(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[..., Any] | str | None = None
) -> Serialized:
    """Make the arguments of a call ready to be sent; those that are refs become ``deps``.

    ``function`` names the function, and the argument by its parameter, in the SerializationError that this may raise.
    """
    if not kwargs:
        if not args:
            return NO_ARGS
        if _ATOMS.issuperset(map(type, args)):
            data = _dumps(args, 5)
            if len(data) < LARGE_BYTES:
                return Serialized(PICKLE, data, len(data))
    if _ref_class is None:
        _find_classes()
    deps: list[bytes] = []
    places: list[int | str] = []
    positional = tuple([_argument(value, place, deps, places) for place, value in enumerate(args)])
    keywords = {place: _argument(value, place, deps, places) for place, value in kwargs.items()}
    form = [positional, keywords, places] if deps or keywords else positional
    try:
        if _is_shallow(tuple, positional) and _is_shallow(dict, keywords):
            data = _dumps(form, 5)
            serialized = Serialized(PICKLE, data, len(data))
        else:
            serialized = pickle_value(form)
    except (NbrayError, MemoryError):
        raise
    except Exception as error:
        from nbray.store.culprit import explain_arguments

        raise explain_arguments(error, args, kwargs, function) from error
    serialized.deps = deps or None
    return serialized


def deserialize(
    kind: int, data: bytes | memoryview, refs: Sequence[Any] | None = None, *, writable: bool | None = None
) -> Any:
    """The value; arrays and tables are views of ``data``. ``refs``: the `ObjectRef` objects for ``Serialized.refs``, in that order.

    ``writable``: whether arrays in the value can be written; by default as ``data`` can. Bytes are copied for that once, a read-only
    memoryview must not be passed with it. Raises what the user's classes raise while they are made again.
    """
    if kind in _PICKLED:
        if refs is None and type(data) is bytes and (not writable or _SMALL_ARRAY not in data):
            return _loads(data)
        return _load(data, None, refs, _is_writable(data) if writable is None else writable)
    if kind == BYTES:
        return data if type(data) is bytes else bytes(data)
    if kind == BUFFERS:
        if writable is None:
            writable = _is_writable(data)
        view = memoryview(bytearray(data) if writable and type(data) is bytes else data)
        length, count = _HEAD.unpack_from(view)
        lengths = _lengths(count)
        start = _HEAD.size + lengths.size
        buffers = []
        at = start + length
        for size in lengths.unpack_from(view, _HEAD.size):
            at += -at % ALIGNMENT
            buffers.append(view[at : at + size])
            at += size
        return _load(view[start : start + length], buffers, refs, writable)
    if kind in {ARROW, ARROW_BATCH}:
        import pyarrow as pa

        reader = pa.ipc.open_stream(pa.py_buffer(data))
        return reader.read_all() if kind == ARROW else reader.read_next_batch()
    raise ValueError(f"unknown kind of payload: {kind!r} (this nbray knows 0 to {ARROW_BATCH})")


def deserialize_args(
    kind: int,
    data: bytes | memoryview,
    refs: Sequence[Any] | None = None,
    values: Sequence[Any] = (),
    *,
    writable: bool | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call; ``values`` are those of ``Serialized.deps``, in that order."""
    if not data:
        return (), {}
    form = deserialize(kind, data, refs, writable=writable)
    if type(form) is tuple:
        return form, {}
    args, kwargs, places = form
    if places:
        filled = list(args)
        for place, value in zip(places, values, strict=True):
            if type(place) is int:
                filled[place] = value
            else:
                kwargs[place] = value
        args = tuple(filled)
    return args, kwargs


class Raw:
    """An argument that was a ref, as it lies in memory: for functions that say ``takes_raw_arguments``. ``data`` is private, if it can be written at all."""

    __slots__ = ("data", "kind", "refs")

    def __init__(self, kind: int, data: bytes | memoryview, refs: Sequence[Any] | None) -> None:
        self.kind = kind
        self.data = data
        self.refs = refs

    def value(self) -> Any:
        """What `deserialize` makes of it, as if the function did not take raw arguments."""
        writable = True if type(self.data) is bytes else None
        return deserialize(self.kind, self.data, self.refs, writable=writable)


def _is_shallow(kind: type, value: Any) -> bool:
    """Whether a container has nothing in it that needs more than the plain pickler."""
    atoms = _ATOMS.issuperset
    return atoms(map(type, value)) and (kind is not dict or atoms(map(type, value.values())))


# -- refs inside values -------------------------------------------------------------------------------------------------------------


class _Active(threading.local):
    """What the innermost serialization or deserialization of this thread is about."""

    writer: Any = None
    refs: Sequence[Any] | None = None
    writable = False


_active = _Active()


def reduce_ref(ref: ObjectRef[Any]) -> tuple[Any, ...]:
    """What ``ObjectRef.__reduce__`` returns: the number of the ref in the value that is being serialized.

    Outside of nbray's own serialization (somebody pickles a ref to a file, or into bytes that a user's class keeps) its id, out of band.
    """
    writer = _active.writer
    if writer is None:
        return restore_ref, (ref._id,)
    if writer.refs is None:
        writer.refs = {}
    return nth_ref, (writer.refs.setdefault(ref._id, len(writer.refs)),)


def nth_ref(index: int) -> Any:
    """The ref of that number in the value that is being deserialized by this thread."""
    refs = _active.refs
    if refs is None:
        raise pickle.UnpicklingError(
            "this pickle was made while nbray serialized a value and refers to that value's object refs; it cannot be read by itself"
        )
    return refs[index]


def all_refs() -> list[Any]:
    """The refs of the value that is being deserialized by this thread, when it is nothing but a list of them."""
    return list(_active.refs or ())


class _AllRefs:
    def __reduce__(self) -> tuple[Any, ...]:
        return all_refs, ()


def _known_ref_class() -> type | None:
    _find_classes()
    return _ref_class


def _serialize_refs(value: list[Any]) -> Serialized | None:
    """A list of refs, each once, without a call per ref; None for any other list."""
    if set(map(type, value)) != {_ref_class}:
        return None
    for engine in {id(ref._engine): ref._engine for ref in value}.values():
        if engine.closed:
            raise _foreign(next(ref for ref in value if ref._engine is engine))
    refs = [ref._id for ref in value]
    if len(set(refs)) != len(refs):
        return None
    data = _dumps(_AllRefs(), 5)
    return Serialized(PICKLE, data, len(data), refs)


def _foreign(ref: ObjectRef[Any]) -> NbrayError:
    return NotInitializedError(
        f"{ref!r} belongs to a cluster that has ended ({ref._engine.closed}): run the code that made it again"
    )


def restore_ref(object_id: bytes) -> Any:
    """A ref that was pickled out of band: valid only in a process connected to the cluster that has the object."""
    from nbray.api import context

    engine: Any = context.require().engine
    return engine.ref(object_id)


# -- pickle -------------------------------------------------------------------------------------------------------------------------


class _Whole:
    """Marks a ``bytes`` or ``bytearray`` whose content is to be kept apart from the pickle; comes back as it was."""

    __slots__ = ("value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self.value = value


class _Writable:
    """Presents the memory of a read-only array as writable, so that the pickle does not say that whoever reads it may not write."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: Any) -> None:
        self.array = array
        data = (array.__array_interface__["data"][0], False)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (array.nbytes,), "data": data}


def small_array(data: bytes, code: Any, shape: tuple[int, ...], order: Any) -> Any:
    """An array that was pickled with its content."""
    import numpy as np

    return np.ndarray(shape, code, bytearray(data) if _active.writable else data, 0, None, order)


def _argument(value: Any, place: int | str, deps: list[bytes], places: list[int | str]) -> Any:
    kind = type(value)
    if kind is _ref_class:
        deps.append(value._id)
        places.append(place)
        return None
    if (kind is bytes or kind is bytearray) and len(value) >= LARGE_BYTES:
        return _Whole(value)
    return value


_ref_class: type | None = None
_array_class: type | None = None


def _find_classes() -> None:
    """Look the classes up that are treated apart: not imported here because one imports this module, and the other is heavy."""
    global _ref_class, _array_class
    _ref_class = getattr(sys.modules.get("nbray.api.refs"), "ObjectRef", None)
    _array_class = getattr(sys.modules.get("numpy"), "ndarray", None)


def pickle_value(value: Any) -> Serialized:
    """Pickle a value whatever it is; raises what the pickling raises."""
    file = BytesIO()
    buffers = _Buffers()
    writer = _new_writer(file, 5, buffers)
    active = _active
    outer = active.writer
    active.writer = writer
    try:
        writer.dump(value)
    finally:
        active.writer = outer
    data = file.getvalue()
    refs = list(writer.refs) if writer.refs else None
    if not buffers:
        return Serialized(PICKLE, data, len(data), refs)
    size = _HEAD.size + _lengths(len(buffers)).size + len(data)
    for buffer in buffers:
        size += -size % ALIGNMENT + buffer.nbytes
    return Serialized(BUFFERS, data, size, refs, None, buffers)


def _load(
    data: bytes | memoryview, buffers: list[memoryview] | None, refs: Sequence[Any] | None, writable: bool
) -> Any:
    active = _active
    outer = active.refs, active.writable
    active.refs = refs if refs is not None else ()
    active.writable = writable
    try:
        return _loads(data, buffers=buffers)
    finally:
        active.refs, active.writable = outer


def _is_writable(data: bytes | memoryview) -> bool:
    return type(data) is memoryview and not data.readonly


def _lengths(count: int) -> Struct:
    return _LENGTHS[count] if count < len(_LENGTHS) else Struct(f"<{count}Q")


_LENGTHS = [Struct(f"<{count}Q") for count in range(16)]


class _Buffers(list[memoryview]):
    """What a pickler keeps apart from the pickle."""

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer goes into the pickle, for it is small."""
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND:
            return True
        self.append(view)
        return False


_new_writer: Callable[[BytesIO, int, _Buffers], Any]


def _define_writer(file: BytesIO, protocol: int, buffers: _Buffers) -> Any:
    """Make the pickler's class, then one of it. Later: cloudpickle takes 30 ms to import and tiny values do not need it."""
    global _new_writer
    import copyreg

    import cloudpickle

    from nbray.store.classes import keep_original

    reduce_code = cloudpickle.Pickler.reducer_override
    is_class = issubclass

    class Writer(cloudpickle.Pickler):  # type: ignore[misc]
        """Does in C what need not be Python, and begins cloudpickle's own part at the first function: a small dict takes half the time."""

        __init__ = pickle.Pickler.__init__
        dump = pickle.Pickler.dump
        proto = protocol
        globals_ref: dict[int, dict[str, Any]] | None = None
        refs: dict[bytes, int] | None = None

        def reducer_override(self, value: Any) -> Any:
            kind = type(value)
            if kind is _ref_class:
                refs = self.refs
                if refs is None:
                    refs = self.refs = {}
                if value._engine.closed:
                    raise _foreign(value)
                return nth_ref, (refs.setdefault(value._id, len(refs)),)
            if kind is FunctionType or is_class(kind, type):
                if value is nth_ref or value is small_array or value is _array_class:
                    return NotImplemented  # importable everywhere: cloudpickle takes 2 µs to find that out
                if self.globals_ref is None:
                    self.globals_ref = {}
                return keep_original(reduce_code(self, value))
            if kind is _array_class:
                return _reduce_array(value)
            if kind is _Whole:
                return type(value.value), (pickle.PickleBuffer(value.value),)
            if kind.__module__ == "pyarrow.lib":
                return reduce_arrow(value)
            return NotImplemented

    known = -1

    def new_writer(file: BytesIO, protocol: int, buffers: _Buffers) -> Any:
        nonlocal known
        if len(copyreg.dispatch_table) != known:
            # cloudpickle's own table is a ChainMap, which costs a microsecond for each instance of a class.
            Writer.dispatch_table = dict(cloudpickle.Pickler.dispatch_table)
            known = len(copyreg.dispatch_table)
        if _ref_class is None or _array_class is None:
            _find_classes()
        return Writer(file, protocol, buffer_callback=buffers)

    _new_writer = new_writer
    return new_writer(file, protocol, buffers)


_new_writer = _define_writer


def _reduce_array(array: Any) -> Any:
    import numpy as np

    dtype = array.dtype
    if dtype.hasobject:
        return NotImplemented
    flags = array.flags
    if not flags.c_contiguous and not flags.f_contiguous:
        array = np.ascontiguousarray(array)
        flags = array.flags
    order = "C" if flags.c_contiguous else "F"
    # The text of a type is read 10 times faster than its pickle; structured, user-defined and annotated types need theirs.
    code = (
        dtype.str if dtype.kind in "biufcSUmM" and dtype.isbuiltin != 2 and dtype.metadata is None else dtype
    )
    if array.nbytes < OUT_OF_BAND:
        return small_array, (array.tobytes("A"), code, array.shape, order)
    if flags.writeable:
        flat = (array if order == "C" else array.T).reshape(-1).view(np.uint8)
    else:
        flat = np.asarray(_Writable(array))
    return np.ndarray, (array.shape, code, pickle.PickleBuffer(flat), 0, None, order)


# -- Arrow --------------------------------------------------------------------------------------------------------------------------


def _serialize_arrow(value: Any) -> Serialized | None:
    """None for what the IPC format does not bring back as it was: types that are defined in Python."""
    import pyarrow as pa

    if any(_has_extension(field.type) for field in value.schema):
        return None
    sink = pa.MockOutputStream()
    try:
        _write_arrow(sink, value)
    except pa.ArrowNotImplementedError:
        return None
    kind = ARROW if isinstance(value, pa.Table) else ARROW_BATCH
    return Serialized(kind, b"", sink.size(), table=value)


def read_slice(form: str, data: Any) -> Any:
    """An Arrow value that was a part of a larger one."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
    if form == "Table":
        return table
    if form == "RecordBatch":
        return table.to_batches()[0]
    return table.column(0) if form == "ChunkedArray" else table.column(0).chunk(0)


def reduce_arrow(value: Any) -> Any:
    """Pyarrow pickles the whole of what a slice is a part of: a thousand slices of a table would be a thousand tables."""
    import pyarrow as pa

    if not isinstance(value, pa.Table | pa.RecordBatch | pa.ChunkedArray | pa.Array):
        return NotImplemented
    size = value.nbytes
    if not size or value.get_total_buffer_size() < 2 * size + LARGE_BYTES:
        return NotImplemented
    form = next(
        kind.__name__
        for kind in (pa.Table, pa.RecordBatch, pa.ChunkedArray, pa.Array)
        if isinstance(value, kind)
    )
    if form == "ChunkedArray":
        value = pa.table({"": value})
    elif form == "Array":
        value = pa.record_batch({"": value})
    if any(_has_extension(field.type) for field in value.schema):
        return NotImplemented
    sink = pa.BufferOutputStream()
    try:
        _write_arrow(sink, value)
    except pa.ArrowNotImplementedError:
        return NotImplemented
    return read_slice, (form, pickle.PickleBuffer(sink.getvalue()))


def _has_extension(kind: Any) -> bool:
    import pyarrow as pa

    return isinstance(kind, pa.BaseExtensionType) or any(
        _has_extension(kind.field(index).type) for index in range(kind.num_fields)
    )


def _write_arrow(sink: Any, value: Any) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, value.schema) as writer:
        writer.write(value)
