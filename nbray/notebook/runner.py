"""Runs a notebook's cell in a worker: the function that ``%%remote`` submits, and what travels to it and back.

The cell is compiled with the name and the line numbers that it has in the notebook, runs in a module of its own that is ``__main__``
while it runs (as in the notebook, so that dataclasses, pickle and doctest find what they look for), and what it bound goes back.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import io
import linecache
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbray import preferences
from nbray.api.reports import Report, describe
from nbray.notebook import changes, kept, shell, transfer
from nbray.notebook.stored import unchanged
from nbray.notebook.transfer import Parcel
from nbray.store.serialization import Raw
from nbray.worker.display import display, flush_figures

RESULT = "__nbray_value__"
"""Where the value of the last expression waits; no notebook uses such a name."""

FAILED_LIMIT = 4 * 1024 * 1024
"""Bytes of bound values that come back with an error; they travel inside the error."""

_PLACEHOLDER = object()
"""The value of a name that exists in the notebook and that the cell, if at all, deletes."""


@dataclass
class CellTask:
    """A cell and what it needs.

    ``source``: plain Python, with as many empty lines before it as lines stand before it in the notebook's cell; ``filename``: what the
    notebook's tracebacks call the cell; ``flags``: compiler flags (``from __future__``). ``inputs``: captured values. ``placeholders``: names that exist but whose values the cell does not read.
    ``binds``: names that it may bind; ``imports``: dotted modules that it imports; ``out``: names that are wanted, None for all. ``display``: whether the last value is.
    """

    source: str
    filename: str
    flags: int
    inputs: Parcel
    placeholders: tuple[str, ...]
    binds: tuple[str, ...]
    imports: tuple[str, ...]
    out: tuple[str, ...] | None
    display: bool
    version: int = 0
    """Of this run of the cell, for the names that it binds (`nbray.messages.Names`)."""
    late: tuple[tuple[str, ...], ...] = ()
    """Names that come from the results of other cells: those of the first one passed to `run_cell`, of the second, ..."""
    shows: bool = False
    """Whether the last value is displayed from there, because nobody waits for it."""
    watched: tuple[str, ...] = ()
    """Inputs of which is said when the cell has changed them without binding them; smallest first."""


@dataclass
class CellResult:
    """``values``: what the cell bound, and under `RESULT` its last value. ``deleted``: names it deleted. ``left``: names that stay, with the
    reason. ``text``: repr of a last value that cannot be sent. ``missing``: names of ``out`` that the cell has not bound. ``parts``: refs of further
    parcels of values; ``homes``: name -> position of its parcel among these, -1 for ``values``; ``sizes``: bytes by name, -1 for modules.
    """

    values: Parcel
    deleted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    missing: list[str] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)
    homes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """Names whose values the cell has changed without binding them."""


class CellError(Exception):
    """A cell raised. Its text is that of the user's exception; the exception and what the cell bound before are inside."""

    def __init__(self, text: str, report: Report, result: CellResult, cell: str = "") -> None:
        """``cell``: label of the cell that raised."""
        super().__init__(text)
        self.report = report
        self.result = result
        self.cell = cell

    def __reduce__(self) -> tuple[Any, ...]:
        return CellError, (*self.args, self.report, self.result, self.cell)


def run_cell(task: CellTask, *given: Raw) -> CellResult:
    """Run a cell, its inputs in private memory. Raises CellError for what its code raises; KeyboardInterrupt when the cell is cancelled.

    ``given``: results of the cells that make the names of ``task.late``, then what ``task.inputs`` has in the store.
    """
    from nbray.api import context

    made = [each.value() for each in given[: len(task.late)]]
    stored = given[len(task.late) :]
    try:
        result = execute(task, transfer.carried_types(), context.require().engine.put, made, stored)
    finally:
        preferences.of_this_worker.renew()
    kept.announce(task.version, result)
    return result


def run_item(task: Raw, item: Parcel, *given: Raw) -> CellResult:
    """As `run_cell`, for one of many items: ``item`` has what the cell gets beside its inputs."""
    from nbray.api import context

    cell: CellTask = task.value()
    made = [each.value() for each in given[: len(cell.late)]]
    stored = given[len(cell.late) :]
    return execute(cell, transfer.carried_types(), context.require().engine.put, made, stored, item)


run_item.takes_raw_arguments = True  # type: ignore[attr-defined]
run_cell.takes_raw_arguments = True  # type: ignore[attr-defined]  # see nbray.worker.executor


def execute(
    task: CellTask,
    carried: tuple[type, ...] = (),
    store: Callable[[Parcel], Any] | None = None,
    made: Sequence[CellResult] = (),
    stored: Sequence[Raw] = (),
    item: Parcel | None = None,
) -> CellResult:
    """As `run_cell`; needs no cluster. ``store``: puts a parcel on the cluster, where a part of the result is worth an object of its own."""
    module = types.ModuleType("__main__")
    namespace = module.__dict__
    threads = threading.active_count()
    failure: CellError | None = None
    with _as_main(module):
        namespace.update(dict.fromkeys(task.placeholders, _PLACEHOLDER))
        for source, names in zip(made, task.late, strict=True):
            _receive(source, names, namespace)
        namespace.update(transfer.unpack(task.inputs, namespace, stored, refresh_classes=True))
        if item is not None:
            namespace.update(transfer.unpack(item, namespace, refresh_classes=True))
        before = dict(namespace)
        watch = changes.Watch(
            task.watched,
            namespace,
            changes.dumper(functools.partial(_pickler, namespace, carried)),
            unchanged,
        )
        try:
            try:
                _run(task, namespace)
            finally:
                # Also what was plotted before an error; a figure that is sent back must not be one that is still to be shown.
                flush_figures()
            if task.shows and namespace.get(RESULT) is not None:
                display(namespace.pop(RESULT))
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  (SystemExit too: it must not end the worker)
            changed = watch.changed(namespace)
            failure = _failure(task, error, before, namespace, carried)
            failure.result.changed = changed
            traceback.clear_frames(error.__traceback__)
        else:
            changed = watch.changed(namespace)
            result = _result(task, before, namespace, carried, store)
            result.changed = changed
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() <= threads:
        # Functions of the cell and their globals are a cycle, and may hold large inputs until the collector comes by.
        namespace.clear()
    if failure is not None:
        raise failure
    return result


def _pickler(
    namespace: dict[str, Any], carried: tuple[type, ...], file: io.BytesIO
) -> transfer.NamespacePickler:
    return _Comparing(file, namespace, carried)


class _Comparing(transfer.NamespacePickler):
    """For pictures of values: without what an object merely remembers having computed, for that changes when it is looked at."""

    def reducer_override(self, value: Any) -> Any:
        kind: Any = type(value)
        remembered = changes.remembered(kind)
        if remembered:
            reduced = value.__reduce_ex__(5)
            if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
                state = {name: each for name, each in reduced[2].items() if name not in remembered}
                return (*reduced[:2], state, *reduced[3:])
        return super().reducer_override(value)


def _receive(result: CellResult, names: Iterable[str], namespace: dict[str, Any]) -> None:
    """Put names that another cell has bound into the namespace."""
    from nbray.api import context

    parcels = [result.values]
    homes = {result.homes.get(name, -1) for name in names}
    parts = [part for home, part in enumerate(result.parts) if home in homes]
    if parts:
        parcels += context.require().engine.get(parts, None, writable=True)
    for parcel in parcels:
        values = transfer.unpack(parcel, namespace, refresh_classes=True)
        for name in values:
            namespace.pop(name, None)
        namespace.update({name: value for name, value in values.items() if name in names})


@contextlib.contextmanager
def _as_main(module: types.ModuleType) -> Iterator[None]:
    kept = sys.modules.get("__main__")
    names = shell.cell_builtins(module.__dict__)
    replaced = {name: getattr(builtins, name) for name in names if hasattr(builtins, name)}
    hook = sys.breakpointhook
    sys.modules["__main__"] = module
    for name, value in names.items():
        setattr(builtins, name, value)
    sys.breakpointhook = shell.no_breakpoint
    try:
        yield
    finally:
        sys.breakpointhook = hook
        for name in names:
            if name in replaced:
                setattr(builtins, name, replaced[name])
            else:
                delattr(builtins, name)
        if kept is not None:
            sys.modules["__main__"] = kept


def _run(task: CellTask, namespace: dict[str, Any]) -> None:
    lines = task.source.splitlines(keepends=True)
    linecache.cache[task.filename] = (len(task.source), None, lines, task.filename)
    code = _compiled(task.source, task.filename, task.flags, task.display)
    if code.co_flags & inspect.CO_COROUTINE:
        import asyncio

        asyncio.run(eval(code, namespace))
    else:
        exec(code, namespace)


@functools.lru_cache(maxsize=32)
def _compiled(source: str, filename: str, flags: int, display: bool) -> types.CodeType:
    """The cell, its last value (``display``) bound to `RESULT`. Kept for cells that run again and for the items of ``--map``."""
    tree = ast.parse(source, filename)
    last = tree.body[-1] if tree.body else None
    if display and isinstance(last, ast.Expr):
        target = ast.copy_location(ast.Name(RESULT, ast.Store()), last)
        tree.body[-1] = ast.copy_location(ast.Assign([target], last.value), last)
    flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code: types.CodeType = compile(tree, filename, "exec", flags=flags, dont_inherit=True)
    return code


def _bound(task: CellTask, before: dict[str, Any], namespace: dict[str, Any]) -> list[str]:
    """Names that the cell has bound: those it says it binds, and those whose object is another one now.

    An assignment that does not change the object (``x += [1]``) is seen by its syntax only; one in a branch that was not taken then
    brings an equal value back.
    """
    binds = set(task.binds)
    absent = object()
    return [
        name
        for name, value in namespace.items()
        if name != RESULT
        and value is not _PLACEHOLDER
        and not (name.startswith("__") and name.endswith("__") and name not in binds)
        and (name in binds or before.get(name, absent) is not value)
    ]


def _result(
    task: CellTask,
    before: dict[str, Any],
    namespace: dict[str, Any],
    carried: tuple[type, ...],
    store: Callable[[Parcel], Any] | None,
) -> CellResult:
    bound = _bound(task, before, namespace)
    wanted = bound if task.out is None else [name for name in task.out if name in namespace]
    missing = [name for name in task.out or () if name not in namespace]
    value = namespace.pop(RESULT, None)
    extra = {} if value is None else {RESULT: value}
    mine = set(bound)
    # A function that comes back reads its helpers by name: those that this cell made have to come along.

    def pack(names: Iterable[str], more: Mapping[str, Any]) -> transfer.Packed:
        return transfer.pack(names, namespace, carried=carried, extra=more, follow=mine.__contains__)

    packed = pack(wanted, extra)
    text = _text(value) if RESULT in packed.left else None
    left = {name: why for name, why in packed.left.items() if name != RESULT}
    sizes = {**packed.sizes, **dict.fromkeys(packed.parcel.modules, -1)}
    apart: dict[str, Parcel] = {}
    if store is not None:
        packed, apart = kept.divide(packed, pack, extra)
    packed.parcel.imports = _imported_submodules(task, packed.parcel.modules)
    result = CellResult(packed.parcel, _deleted(before, namespace), left, text, missing, sizes=sizes)
    if apart and store is not None:
        # Together they would keep one another alive.
        parcels = [packed.parcel, *apart.values()]
        result.parts = [store(parcel) for parcel in parcels]
        result.values = Parcel([], b"", [], [])
        result.homes = kept.homes(parcels, RESULT)
    else:
        result.homes = dict.fromkeys(kept.homes([packed.parcel], RESULT), -1)
    return result


def _deleted(before: dict[str, Any], namespace: dict[str, Any]) -> list[str]:
    return [name for name in before if name not in namespace and not name.startswith("__")]


def _imported_submodules(task: CellTask, modules: dict[str, str]) -> list[str]:
    """``import a.b`` binds ``a`` only, but makes ``a.b`` work."""
    roots = set(modules.values())
    return [name for name in task.imports if name.partition(".")[0] in roots and name in sys.modules]


def _failure(
    task: CellTask,
    error: BaseException,
    before: dict[str, Any],
    namespace: dict[str, Any],
    carried: tuple[type, ...],
) -> CellError:
    namespace.pop(RESULT, None)
    names = _bound(task, before, namespace)
    if task.out is not None:
        names = [name for name in names if name in task.out]
    report = describe(error)
    left: dict[str, str] = {}
    while True:
        packed = transfer.pack(
            names, namespace, carried=carried, extra={RESULT: error}, follow=set(names).__contains__
        )
        left.update(packed.left)
        refused = {
            name: "it mentions refs of a cell that failed" for name in packed.carrying if name != RESULT
        }
        if packed.parcel.size > FAILED_LIMIT and packed.sizes:
            largest = max(
                (name for name in packed.sizes if name != RESULT), key=packed.sizes.__getitem__, default=""
            )
            if largest:
                refused[largest] = (
                    f"the cell failed, and {packed.sizes[largest] / 2**20:.0f} MB are too much for an error"
                )
        if not refused:
            break
        left.update(refused)
        names = [name for name in names if name not in refused]
    if packed.carrying or packed.parcel.size > FAILED_LIMIT:
        packed = transfer.pack((), namespace)
    left.pop(RESULT, None)
    result = CellResult(packed.parcel, _deleted(before, namespace), left)
    return CellError("\n".join(report.lines), report, result, _cell())


def _cell() -> str:
    """Label of the notebook's cell that runs."""
    from nbray.api import context

    running = context.current_task.get()
    return running.cell if running is not None else ""


def _text(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001
        return f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= 10_000 else text[:10_000] + "..."
