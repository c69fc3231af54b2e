"""The function that runs is the one in the notebook now.

`FunctionExport` pickles a function (or class) with what it captures, names the pickle by its content, and keeps that up to date:

- At every submission it compares, by identity, what the function's global names and closure cells refer to, through helper functions and classes
  that travel by value too. A rebound, new or deleted name makes a new pickle. That costs 0.1 to 1 µs.
- What is changed in place (a list, an array, a class) keeps its identity. Once per notebook cell (*epoch*) a function that captures such values is
  pickled again; if the bytes are the same it stays the same version.

What travels by value and what by reference (functions and classes of importable modules) is cloudpickle's decision.
"""

from __future__ import annotations

import dis
import functools
import linecache
import pickle
import re
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from threading import RLock
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.api import context
from nbray.errors import SerializationError

if TYPE_CHECKING:
    from nbray.api.options import Environment
    from nbray.engine.base import Engine
    from nbray.messages import TaskClass

WARN_BYTES = 10 * 2**20
LIMIT_BYTES = 512 * 2**20
"""Largest pickled function. Ray refuses at 100 MB; here the record of the function in the cluster's database bounds it (SQLite: 1 GB)."""

SOURCE_LIMIT = 256 * 1024

RetryExceptions = tuple[type[BaseException], ...] | None

_IMMUTABLE: frozenset[type] = frozenset({
    bool, bytes, complex, float, int, range, slice, str, type(None), type(Ellipsis), type(NotImplemented), re.Pattern,
    types.BuiltinFunctionType, types.GenericAlias, types.MethodDescriptorType, types.MethodWrapperType, types.UnionType, types.WrapperDescriptorType,
})  # fmt: skip

# By name, so that the modules need not be imported.
_IMMUTABLE_NAMES = frozenset({
    ("datetime", "date"), ("datetime", "datetime"), ("datetime", "time"), ("datetime", "timedelta"), ("datetime", "timezone"), ("decimal", "Decimal"),
    ("fractions", "Fraction"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "PurePosixPath"), ("uuid", "UUID"), ("numpy", "ufunc"), ("nbray.api.refs", "ObjectRef"),
})  # fmt: skip

_LARGE_TUPLE = 100


class Version:
    """One state of a function: its pickle and the content id of that. ``blob`` is None where this process got it from the cluster."""

    __slots__ = ("blob", "function_id")

    def __init__(self, function_id: bytes, blob: bytes | None) -> None:
        self.function_id = function_id
        self.blob = blob


class FunctionExport:
    """A function or class on its way to workers: its pickle, and whether that is still true.

    The pickle holds ``(target, retry_exceptions, sources)``: which exceptions allow another attempt travels with the function, for their classes
    may be the user's; ``sources`` are those of notebook cells, so that tracebacks show their lines. Safe to share between threads.
    """

    __slots__ = (
        "__weakref__",
        "_epoch",
        "_hot",
        "_lock",
        "_version",
        "_watch",
        "name",
        "retry_exceptions",
        "target",
    )

    def __init__(self, target: Any, name: str, retry_exceptions: RetryExceptions = None) -> None:
        self.target = target
        self.name = name
        self.retry_exceptions = retry_exceptions
        self._version = Version(b"", None)
        self._epoch = -1
        self._watch: _Watch | None = None
        self._hot: _Watch | None = None
        """The watch, if there is anything that each submission has to look at."""
        # The user's own __reduce__ may call the function that is being pickled.
        self._lock = RLock()
        _exports.add(self)

    def current(self, epoch: int) -> Version:
        """The function as it is now; the same object as long as nothing has changed.

        Raises SerializationError (something captured cannot be pickled, or the whole is too large). Warns above 10 MB.
        """
        if epoch == self._epoch:
            hot = self._hot
            if hot is None or hot.intact():
                return self._version
        return self._refresh(epoch)

    def _refresh(self, epoch: int) -> Version:
        with self._lock:
            watch = self._watch
            if watch is None or not watch.intact() or not watch.code_intact():
                # Before pickling, so that what another thread rebinds meanwhile is noticed afterwards.
                watch = _Watch(self.target)
                origin = _origins.get(self.target) if self._watch is None and _weakly(self.target) else None
                if origin is not None and origin[1] == self.retry_exceptions:
                    self._adopt(Version(origin[0], None), watch)
                else:
                    self._export(watch)
            elif epoch != self._epoch and watch.mutable and self._export(watch):
                # Through what has changed in place other names may be reached now.
                self._adopt(self._version, _Watch(self.target))
            self._epoch = epoch
            return self._version

    def _export(self, watch: _Watch) -> bool:
        """Pickle the function; whether it is another one than before."""
        blob = self._pickle(watch)
        function_id = ids.content_id(blob)
        changed = function_id != self._version.function_id
        if changed and len(blob) > WARN_BYTES:
            self._warn_of_size(len(blob))
        self._adopt(Version(function_id, blob) if changed else self._version, watch)
        return changed

    def _adopt(self, version: Version, watch: _Watch) -> None:
        self._version = version
        self._watch = watch
        self._hot = watch if watch.hot else None

    def _pickle(self, watch: _Watch) -> bytes:
        try:
            blob = pickle_alone((self.target, self.retry_exceptions, _sources(watch)))
        except SerializationError:
            raise
        except Exception as error:
            from nbray.store.culprit import explain

            raise explain(error, self.target, self.name) from error
        if len(blob) > LIMIT_BYTES:
            most = f"more than {LIMIT_BYTES / 2**20:.0f} MB, the most that a function may take"
            raise SerializationError(self._size_text(len(blob), most))
        return blob

    def _warn_of_size(self, size: int) -> None:
        _warn(self._size_text(size, "which every worker that runs it has to receive and unpickle"))

    def _size_text(self, size: int, what: str) -> str:
        from nbray.store.culprit import largest_captures

        large = [
            (name, each)
            for name, each in largest_captures(getattr(self.target, "__nbray_target__", self.target))
            if each >= max(size // 10, 1)
        ][:3]
        parts = ", ".join(f"{name!r} ({_megabytes(each)})" for name, each in large)
        because = f" because of what it captures: {parts}" if parts else ""
        example = large[0][0] if large else "data"
        return (
            f"{self.name} takes {_megabytes(size)} pickled, {what}{because}. "
            f"Put large values into the store once and pass the ref as an argument: ref = nbray.put({example})."
        )


def register(engine: Engine, spec: TaskClass, version: Version, environment: Environment | None) -> int:
    """The engine's number for ``spec``, which names ``version`` and ``environment``."""
    if environment is not None:
        engine.add_blob(environment.id, environment.blob, "runtime_env")
    return engine.register(spec, version.blob)


def load_function(blob: bytes, function_id: bytes) -> tuple[Any, RetryExceptions]:
    """In a worker: the function or class and its allow-list for retries. Raises whatever unpickling raises."""
    target, retry_exceptions, sources = pickle.loads(blob)
    for filename, text in sources.items():
        linecache.cache.setdefault(filename, (len(text), None, text.splitlines(keepends=True), filename))
    if _weakly(target):
        # A task that submits its own function need not pickle it again.
        _origins[target] = (function_id, retry_exceptions)
    return target, retry_exceptions


def release_stale() -> None:
    """Let go of values that functions captured and the notebook has rebound since; worth calling after each cell."""
    for export in list(_exports):
        watch = export._watch
        if watch is not None and not watch.intact():
            watch.forget()


_exports: weakref.WeakSet[FunctionExport] = weakref.WeakSet()
_origins: weakref.WeakKeyDictionary[Any, tuple[bytes, RetryExceptions]] = weakref.WeakKeyDictionary()


def _weakly(target: Any) -> bool:
    return isinstance(target, types.FunctionType | type)


# -- what a function depends on


class _Watch:
    """What the global names and cells that a function reads refer to, by identity.

    Values that can be referred to weakly are (arrays, frames, instances): the notebook's ``del df`` frees them. ``mutable``: something captured
    can change and keep its identity.
    """

    __slots__ = ("_absent", "_cells", "_codes", "_dead", "_kept", "_names", "_weak", "mutable")

    def __init__(self, target: Any) -> None:
        self.mutable = False
        self._kept: list[Any] = []
        self._weak: list[weakref.ref[Any]] = []
        self._dead: list[Any] = []
        namespaces: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        cells: dict[int, Any] = {}
        self._codes: list[tuple[Any, Any, Any, Any]] = []
        todo: list[Any] = [target]
        seen: dict[int, Any] = {}
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, types.FunctionType):
                if not travels_by_value(value):
                    continue
                names = namespaces.setdefault(id(value.__globals__), (value.__globals__, {}))[1]
                for name in global_names(value.__code__):
                    if name not in names:
                        names[name] = None
                        if name in value.__globals__:
                            todo.append(value.__globals__[name])
                for cell in value.__closure__ or ():
                    cells[id(cell)] = cell
                    todo.extend(_contents(cell))
                todo.extend(value.__defaults__ or ())
                todo.extend((value.__kwdefaults__ or {}).values())
                todo.extend(vars(value).values())
                self._codes.append((value, value.__code__, value.__defaults__, value.__kwdefaults__))
            else:
                self._look_into(value, todo)
        self._names = []
        self._absent = []
        for namespace, wanted in namespaces.values():
            present = [name for name in wanted if name in namespace]
            absent = frozenset(name for name in wanted if name not in namespace)
            if present:
                # Twice where there is one, because itemgetter then gives no tuple.
                getter = itemgetter(*present) if len(present) > 1 else itemgetter(present[0], present[0])
                values = getter(namespace)
                self._keep(values)
                self._names.append((namespace, getter, tuple(map(id, values))))
            if absent:
                self._absent.append((namespace.keys().isdisjoint, absent))
        self._cells = []
        for cell in cells.values():
            content = _contents(cell)
            self._keep(content)
            self._cells.append((cell, id(content[0]) if content else None))

    @property
    def hot(self) -> bool:
        """Whether there are names or cells that could be rebound."""
        return bool(self._names or self._absent or self._cells)

    def intact(self) -> bool:
        """Whether all names and cells refer to what they referred to."""
        if self._dead:
            return False
        try:
            for namespace, getter, identities in self._names:
                if tuple(map(id, getter(namespace))) != identities:
                    return False
        except KeyError:
            return False
        for disjoint, absent in self._absent:
            if not disjoint(absent):
                return False
        for cell, identity in self._cells:
            content = _contents(cell)
            if (id(content[0]) if content else None) != identity:
                return False
        return True

    def code_intact(self) -> bool:
        """Whether no function got other code or defaults (as ``%autoreload`` gives them)."""
        return all(
            function.__code__ is code
            and function.__defaults__ is defaults
            and function.__kwdefaults__ is keywords
            for function, code, defaults, keywords in self._codes
        )

    def codes(self) -> Iterator[types.CodeType]:
        """The code of all functions that travel by value."""
        return (code for _, code, _, _ in self._codes)

    def forget(self) -> None:
        """Keep nothing alive; the watch is not intact from now on."""
        self._dead.append(None)
        self._kept.clear()
        self._weak.clear()

    def _keep(self, values: Iterable[Any]) -> None:
        dead = self._dead
        for value in values:
            if not isinstance(value, types.FunctionType | types.ModuleType | type):
                try:
                    self._weak.append(weakref.ref(value, dead.append))
                    continue
                except TypeError:
                    pass
            self._kept.append(value)

    def _look_into(self, value: Any, todo: list[Any]) -> None:
        kind = type(value)
        if kind in _IMMUTABLE or (kind.__module__, kind.__qualname__) in _IMMUTABLE_NAMES:
            return
        if kind is tuple or kind is frozenset:
            if len(value) > _LARGE_TUPLE:
                self.mutable = True
            else:
                todo.extend(value)
            return
        if kind is types.ModuleType:
            self.mutable = self.mutable or _registered_by_value(value.__name__)
            return
        if issubclass(kind, type):
            if travels_by_value(value):
                self.mutable = True
                todo.extend(value.__bases__)
                todo.extend(_functions_of(value))
            return
        target = getattr(kind, "__nbray_target__", None)
        if target is not None:
            todo.append(value.__nbray_target__)
            return
        self.mutable = True
        todo.append(kind)
        if isinstance(value, types.MethodType):
            todo.extend((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            todo.extend((value.func, *value.args, *value.keywords.values()))
        elif kind.__module__ == "functools":
            todo.append(getattr(value, "__wrapped__", None))


def travels_by_value(value: Any) -> bool:
    """Whether cloudpickle sends a function or class with its code, instead of as the name of a module's attribute."""
    module_name = getattr(value, "__module__", None)
    if not module_name or module_name == "__main__":
        return True
    found: Any = sys.modules.get(module_name)
    if found is None:
        return True
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
        if found is None:
            return True
    return found is not value or _registered_by_value(module_name)


def _registered_by_value(module_name: str) -> bool:
    cloudpickle = sys.modules.get("cloudpickle")
    registered = cloudpickle.list_registry_pickle_by_value() if cloudpickle is not None else ()
    return any(module_name == name or module_name.startswith(f"{name}.") for name in registered)


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, nested functions included, reads or writes as globals, in the order of their first use."""
    known = _names_of_code.get(id(code))
    if known is not None and known[0] is code:
        return known[1]
    names = {
        instruction.argval: None
        for instruction in dis.get_instructions(code)
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"}
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    if len(_names_of_code) > 10_000:
        _names_of_code.clear()
    _names_of_code[id(code)] = (code, tuple(names))
    return tuple(names)


_names_of_code: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}


def _contents(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def _functions_of(kind: type) -> Iterator[Any]:
    for value in vars(kind).values():
        if isinstance(value, staticmethod | classmethod):
            yield value.__func__
        elif isinstance(value, property):
            yield from (part for part in (value.fget, value.fset, value.fdel) if part is not None)
        elif isinstance(value, types.FunctionType | type):
            yield value


# -- pickling


def pickle_alone(value: Any) -> bytes:
    """A pickle that is not part of a value in the store, by value where cloudpickle does so. Raises what pickling raises.

    Refs and handles in it are nobody's argument, and whoever reads it may still want them: they live as long as this process's connection,
    as in Ray.
    """
    pickler = _new_pickler()
    pickler.dump(value)
    captured = pickler.captured
    runtime = context.current()
    if captured and runtime is not None:
        if not _pinned:
            runtime.on_close.append(_pinned.clear)
        _pinned.update(captured)
    blob: bytes = pickler.file.getvalue()
    return blob


_pinned: dict[bytes, Any] = {}

_new_pickler: Callable[[], Any]


def _define_pickler() -> Any:
    """Make the pickler's class. Later: cloudpickle takes 30 ms to import."""
    global _new_pickler
    import io

    import cloudpickle

    from nbray.api.refs import ObjectRef
    from nbray.store.classes import keep_original

    cached = type(functools.lru_cache(len))

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self) -> None:
            self.file = io.BytesIO()
            self.captured: dict[bytes, Any] = {}
            super().__init__(self.file, 5)

        def reducer_override(self, value: Any) -> Any:
            kind = type(value)
            if kind is ObjectRef:
                self.captured[value._id] = value
            elif kind is cached and travels_by_value(value.__wrapped__):
                # By itself it is pickled as the name of a variable of __main__, which in a worker is another module.
                return _make_cached, (value.__wrapped__, value.cache_parameters())
            return keep_original(super().reducer_override(value))

    _new_pickler = Pickler
    return Pickler()


_new_pickler = _define_pickler


def _make_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _sources(watch: _Watch) -> dict[str, str]:
    """Sources of notebook cells among the code that travels, which no worker can read from a file; by file name."""
    found: dict[str, str] = {}
    room = SOURCE_LIMIT
    for code in watch.codes():
        entry = linecache.cache.get(code.co_filename)
        # Entries with a time of modification are files; those of one element are not loaded yet.
        if entry is not None and len(entry) == 4 and entry[1] is None and code.co_filename not in found:
            text = "".join(entry[2])
            room -= len(text)
            if room >= 0:
                found[code.co_filename] = text
    return found


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB"


def _warn(text: str) -> None:
    """A warning that points at the user's line."""
    frame = sys._getframe(1)
    level = 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nbray."):
        frame = frame.f_back
        level += 1
    warnings.warn(text, UserWarning, stacklevel=level)
