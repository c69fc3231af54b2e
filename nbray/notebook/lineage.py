"""Feeds the lineage of a notebook's variables (`nbray.state.lineage`) with the runs of its cells, local and remote, and says what is stale.

It costs a local cell a fraction of a millisecond: the syntax tree is the one that IPython has made, values are looked at only as far as that is
cheap, and large cells are left out.
"""

from __future__ import annotations

import ast
import hashlib
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from nbray.notebook.following import Follower
from nbray.state.lineage import Cell, Input, Lineage

if TYPE_CHECKING:
    from nbray.notebook.capture import CellNames
    from nbray.notebook.cockpit import CellRun
    from nbray.notebook.remote_cell import Run

LONGEST = 20_000
"""Characters of a cell that is looked at."""

MOST_NAMES = 200
"""Names of one cell that are followed."""

REMEMBERED = 100
"""Analyses of cells that are kept for when they run again."""

EXACT = 64 * 1024
"""Bytes of an array that are all looked at; of larger ones, samples."""

SOURCE_LIMIT = 64 * 1024
"""Characters of a cell's source that the cluster keeps with the names it binds."""


class Origin(msgspec.Struct):
    """How a cell made what the cluster holds, as the cluster keeps it: the cell's identity and source, and per name read who made that."""

    key: str
    digest: str
    title: str
    source: str
    inputs: dict[str, str]


class Trace(Follower):
    """Of one notebook. ``say``: shows a line in the cell that runs; ``hints``: whether stale results are told."""

    def __init__(self, shell: Any, say: Callable[[str], None], hints: bool) -> None:
        self.lineage = Lineage()
        self.hints = hints
        self._shell = shell
        self._say = say
        self._tree: ast.Module | None = None
        self._source = ""
        self._analyses: dict[str, CellNames] = {}
        self._inputs: weakref.WeakKeyDictionary[Run, tuple[Input, ...]] = weakref.WeakKeyDictionary()
        """Of remote runs."""
        self._listener = _Listener(self)

    def load(self) -> None:
        self._shell.ast_transformers.append(self._listener)

    def unload(self) -> None:
        self._shell.ast_transformers.remove(self._listener)

    # -- local cells

    def parsed(self, tree: ast.Module) -> None:
        """IPython has parsed the cell that is about to run."""
        self._tree = tree

    def began(self) -> None:
        """A cell begins."""
        self._tree = None

    def ended_cell(self, cell: CellRun, failed: bool) -> None:
        """A cell has ended; what it has read and bound is remembered."""
        tree, self._tree = self._tree, None
        source = cell.source
        if tree is None or failed or len(source) > LONGEST:
            return
        if source.startswith("%%") and not source.startswith("%%time"):
            return
        names = self._analyses.get(cell.digest)
        if names is None:
            names = self._analyse(tree, cell.digest)
        namespace = self._shell.user_ns
        read = [name for name in names.reads if name in namespace]
        if len(read) + len(names.binds) > MOST_NAMES:
            return
        inputs = self.lineage.inputs(reached(read, namespace))
        if self.hints and inputs:
            self._hint(read)
        bound = {name: known(namespace[name]) for name in names.binds if name in namespace}
        gone = [name for name in names.deletes if name not in namespace]
        self.lineage.ran(identity(cell), source, inputs, bound, gone)

    def _analyse(self, tree: ast.Module, digest: str) -> CellNames:
        from nbray.notebook.capture import analyse_tree

        if len(self._analyses) >= REMEMBERED:
            self._analyses.clear()
        found = self._analyses[digest] = analyse_tree(tree)
        return found

    def _hint(self, names: Iterable[str]) -> None:
        for stale in self.lineage.hints(names):
            self._say(f"{stale.text} (%cluster start --no-stale-hints turns this off)")

    # -- remote cells

    def prepared(self, run: Run) -> None:
        read = [name for name in run.prepared.task.inputs.names if name in self.lineage.current]
        self._inputs[run] = self.lineage.inputs(read)
        if self.hints and not run.options.quiet:
            self._hint(read)

    def origin(self, run: Run) -> bytes:
        """What the cluster keeps beside the names that this run binds."""
        cell = identity(run.cell)
        inputs = {
            read.name: version.cell.title
            for read in self._inputs.get(run, ())
            if (version := self.lineage.version(read.name, read.number)) is not None
        }
        return msgspec.msgpack.encode(
            Origin(cell.key, cell.digest, cell.title, run.cell.source[:SOURCE_LIMIT], inputs)
        )

    def bound(self, run: Run, names: Collection[str], deleted: Collection[str]) -> None:
        if run.origin:
            self.restore(names, run.origin)
            return
        namespace = self._shell.user_ns
        values = {name: known(namespace[name]) for name in names if name in namespace}
        self.lineage.ran(
            identity(run.cell),
            run.cell.source,
            self._inputs.get(run, ()),
            values,
            deleted,
            remote=True,
        )

    # -- after a restart of the kernel

    def restore(self, names: Iterable[str], origin: bytes) -> None:
        """Names that came back from the cluster, and how they had been made."""
        namespace = self._shell.user_ns
        bound = {name: known(namespace[name]) for name in names if name in namespace}
        if origin:
            made = msgspec.msgpack.decode(origin, type=Origin)
            cell = Cell(made.key, made.digest, made.title)
            self.lineage.ran(cell, made.source, self.lineage.inputs(made.inputs), bound, remote=True)


class _Listener(ast.NodeTransformer):
    """IPython calls `visit` with each cell that it has parsed; changes nothing."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Module):
            self._trace.parsed(node)
        return node


def identity(cell: CellRun) -> Cell:
    """A cell by its id, or by its source where there is none."""
    return Cell(cell.cell_id or cell.digest, cell.digest, cell.title)


def reached(names: Iterable[str], namespace: dict[str, Any]) -> Iterator[str]:
    """These names, and those that functions of the namespace among them read."""
    from nbray.notebook.transfer import code_globals

    waiting = list(names)
    seen = dict.fromkeys(waiting)
    while waiting and len(seen) < MOST_NAMES:
        value = namespace.get(waiting.pop())
        if type(value) is types.FunctionType and value.__globals__ is namespace:
            for name in code_globals(value.__code__):
                if name in namespace and name not in seen:
                    seen[name] = None
                    waiting.append(name)
    return iter(seen)


def known(value: Any) -> bytes | None:
    """Equal for equal values, where that is cheap to say; else None."""
    digest = hashlib.blake2b(digest_size=12)
    return digest.digest() if _add(digest, value, 3) else None


_ATOMS = (int, float, complex, bool, type(None), str, bytes)


def _add(digest: Any, value: Any, depth: int) -> bool:
    """Add a value to the digest; False if that would cost too much, or cannot be done."""
    kind = type(value)
    digest.update(kind.__name__.encode())
    if kind in _ATOMS:
        if kind in (str, bytes) and len(value) > EXACT:
            return False
        digest.update(repr(value).encode(errors="replace"))
        return True
    if kind in (tuple, list) and depth and len(value) <= 100:
        return all(_add(digest, item, depth - 1) for item in value)
    if kind is dict and depth and len(value) <= 50:
        return all(
            _add(digest, key, depth - 1) and _add(digest, item, depth - 1) for key, item in value.items()
        )
    if kind is types.FunctionType:
        _add_code(digest, value.__code__)
        return depth > 0 and _add(digest, value.__defaults__ or (), depth - 1)
    if kind is types.ModuleType:
        digest.update(value.__name__.encode())
        return True
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        return _add_array(digest, value)
    return False


def _add_code(digest: Any, code: types.CodeType) -> None:
    """What code does, wherever it stands."""
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode(errors="replace"))


def _add_array(digest: Any, array: Any) -> bool:
    if array.dtype.hasobject:
        return False
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    if array.nbytes <= EXACT:
        digest.update(array.tobytes())
        return True
    if not array.flags.c_contiguous:
        return False
    flat = array.reshape(-1)
    # Spread over all of it: a result that is computed anew differs nearly everywhere.
    digest.update(flat[:: max(flat.size // 1024, 1)].tobytes())
    digest.update(flat[-64:].tobytes())
    return True
