"""Names that a cell in the background is going to bind.

While such a name is *late* the notebook does not have it. A later cell that reads it gets a statement before its first one that waits and binds
(an interrupt there stops the cell, one in a hook of IPython's would be swallowed); a cell that runs on the cluster is given the ref
instead and waits there. There are no stand-ins for values: ``isinstance``, ``is`` and code in C see what the cell has made.
"""

from __future__ import annotations

import ast
import functools
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.errors import NbrayError, TaskError
from nbray.notebook import failing
from nbray.notebook.capture import analyse

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.notebook.cockpit import Cockpit
    from nbray.notebook.remote_cell import Run

_KNOWN_MAGICS = frozenset({"", "time", "timeit", "capture", "remote", "cluster"})
"""Magics whose code is looked at as code, or that wait in their own way or speak of names, not of their values."""

_WORD = re.compile(r"[^\W\d]\w*")
_current: list[LateNames] = []


class Promise:
    """A cell that runs, and the names it is going to bind. ``title``: what people call the cell; ``run``: where its ``ref`` is."""

    def __init__(self, run: Run, names: Iterable[str]) -> None:
        self.run = run
        self.names = dict.fromkeys(names)
        self.before: dict[str, Any] = {}
        """What the notebook had under these names."""

    @property
    def title(self) -> str:
        return self.run.cell.title

    def read_later(self) -> list[str]:
        """Global names that the functions and classes of its cell read when they are called."""
        from nbray.notebook.transfer import code_globals

        prepared: Any = self.run.prepared
        if prepared is None:
            return []  # It was started by an earlier run of the kernel.
        code = compile(prepared.task.source, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        inner = [code_globals(const) for const in code.co_consts if isinstance(const, types.CodeType)]
        return sorted(set().union(*inner))

    @property
    def ref(self) -> ObjectRef[Any]:
        assert self.run.ref is not None
        return self.run.ref


class LateNames:
    """Of one notebook."""

    def __init__(self, cockpit: Cockpit) -> None:
        self._cockpit = cockpit
        self._late: dict[str, Promise] = {}
        self._before: dict[str, list[Promise]] = {}
        """Earlier promises of a name that a later one is to bind: if it does not, they hold again."""
        self._transformer = _Transformer(self)

    def load(self) -> None:
        """Look at the notebook's cells from now on."""
        self._cockpit.shell.ast_transformers.append(self._transformer)
        _current.append(self)

    def unload(self) -> None:
        """The opposite; what is late stays away."""
        self._cockpit.shell.ast_transformers.remove(self._transformer)
        _current.remove(self)

    def __contains__(self, name: object) -> bool:
        return name in self._late

    def __len__(self) -> int:
        return len(self._late)

    def promises(self) -> list[Promise]:
        """Those of which a name is still late, oldest first."""
        return list(dict.fromkeys(sorted(self._late.values(), key=lambda promise: promise.run.began)))

    def promise(self, run: Run, names: Iterable[str]) -> None:
        """These names of the notebook are late from now on: ``run`` (submitted) binds them."""
        made = Promise(run, names)
        namespace = self._cockpit.shell.user_ns
        for name in made.names:
            earlier = self._late.get(name)
            if earlier is not None:
                del earlier.names[name]
                self._before.setdefault(name, []).append(earlier)
            if name in namespace:
                made.before[name] = namespace.pop(name)
            self._late[name] = made
        for follower in self._cockpit.followers:
            follower.promised(run, made.names)

    def look(self) -> None:
        """Between cells: names that the notebook has bound itself are no longer late, those of cells that have succeeded are bound."""
        if not self._late:
            return
        namespace = self._cockpit.shell.user_ns
        self._let_go([name for name in self._late if name in namespace])
        runtime = context.current()
        if runtime is None or runtime.engine.closed:
            self._drop_all()
            return
        for promise in self.promises():
            if promise.run.state == "done":
                self._settle(promise)

    def _let_go(self, names: Collection[str]) -> None:
        """The notebook has bound or deleted these names itself: they are not late any more."""
        mine = [name for name in names if name in self._late]
        for name in mine:
            promise = self._late.pop(name)
            promise.names.pop(name, None)
            promise.before.pop(name, None)
            self._before.pop(name, None)
        if mine:
            for follower in self._cockpit.followers:
                follower.rebound(mine)

    def _drop_all(self) -> None:
        """The cluster is gone, and with it what would have come."""
        namespace = self._cockpit.shell.user_ns
        for name, promise in self._late.items():
            if name in promise.before:
                namespace.setdefault(name, promise.before[name])
        self._late.clear()
        self._before.clear()

    # -- reading

    def bring(self, *names: str) -> None:
        """Wait for these names and bind them. Raises what the cell that makes them raised; KeyboardInterrupt leaves them late."""
        for name in names:
            while name in self._late:
                self._settle(self._late[name], name)

    def clear(self, *names: str) -> None:
        """These names are about to be deleted: they need not come."""
        for name in names:
            if name in self._late:
                self._cockpit.shell.user_ns[name] = None
        self._let_go(names)

    def read_by(self, names: Iterable[str]) -> list[str]:
        """Which late names the code that reads ``names`` needs, itself or in functions and classes of the notebook."""
        return reached(names, self._cockpit.shell.user_ns, self._late)

    def inputs(self, names: Iterable[str]) -> list[Promise]:
        """Who makes these late names."""
        return list(dict.fromkeys(self._late[name] for name in names if name in self._late))

    def _settle(self, promise: Promise, name: str = "") -> None:
        """Wait for a promise and bind what it brings."""
        from nbray.notebook import outcome
        from nbray.notebook.runner import CellError

        engine = context.require().engine
        cockpit = self._cockpit
        wanted = name or next(iter(promise.names), "")
        try:
            with cockpit.status.waiting_for(f"{wanted} of {promise.title}"):
                result = engine.get([promise.ref], None, writable=True)[0]
        except KeyboardInterrupt as interrupt:
            failing.shown_as(
                interrupt,
                [
                    f"KeyboardInterrupt: waiting for {wanted} was stopped; {promise.title}, which makes it, goes on"
                ],
            )
            raise
        except NbrayError as error:
            cause = error.cause if isinstance(error, TaskError) else None
            back = outcome.read(cockpit, cause.result) if isinstance(cause, CellError) else None
            self._take(promise, back)
            title = f"{wanted} comes from {promise.title}, which failed:"
            raise outcome.failed(cockpit, error, back, title) from None
        promise.run.state = "done"
        self._take(promise, outcome.read(cockpit, result))

    def _take(self, promise: Promise, back: Any) -> None:
        """Bind what a promise has brought; for what it has not, the notebook keeps what it had."""
        from nbray.notebook import outcome

        cockpit, namespace = self._cockpit, self._cockpit.shell.user_ns
        late = [name for name in promise.names if self._late.get(name) is promise]
        arrived = {} if back is None else {*back.values, *back.deleted}
        for name in late:
            del self._late[name]
            earlier = self._before.pop(name, [])
            if name in arrived:
                continue
            if name in promise.before:
                namespace[name] = promise.before[name]
            if earlier:
                self._late[name] = earlier.pop()
                self._late[name].names[name] = None
                if earlier:
                    self._before[name] = earlier
        promise.names.clear()
        promise.before.clear()
        if back is not None:
            outcome.bind(cockpit, promise.run, back, only=late)
            if back.value is not None and promise.run.state == "done":
                cockpit.show_value(promise.run.cell, back.value)
        promise.run.ref = None


# -- what a cell reads


class _Transformer(ast.NodeTransformer):
    """Puts before a cell's first statement the one that waits for the late names it reads. IPython calls `visit` for each cell."""

    def __init__(self, late: LateNames) -> None:
        self._late = late

    def visit(self, node: ast.AST) -> Any:
        if not len(self._late) or not isinstance(node, ast.Module) or not node.body:
            return node
        names = analyse(ast.unparse(_Blinded().visit(ast.parse(ast.unparse(node)))))
        words = [*names.reads, *_words_of_magics(node)]
        read = [name for name in self._late.read_by(words) if name not in names.only_deleted]
        deleted = [name for name in names.only_deleted if name in self._late]
        calls = [_call(verb, found) for verb, found in (("bring", read), ("clear", deleted)) if found]
        at = 0
        while at < len(node.body) and (_is_text(node.body[at]) or _is_future(node.body[at])):
            at += 1
        at = min(at, len(node.body) - 1)
        for call in calls:
            node.body.insert(at, ast.fix_missing_locations(ast.copy_location(call, node.body[at])))
        return node


class _Blinded(ast.NodeTransformer):
    """Takes away what ``%%remote`` and ``%remote`` are to run: they wait in their own way."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _magic(node) == "remote":
            node.args = []
        return node


def _magic(node: ast.Call) -> str:
    """The magic that a call runs, or nothing."""
    first = node.args[0] if node.args else None
    if (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in ("run_line_magic", "run_cell_magic")
        and isinstance(first, ast.Constant)
    ):
        return str(first.value)
    return ""


def _call(verb: str, names: list[str]) -> ast.stmt:
    # No name of the notebook is used, so none can be in the way.
    text = f"__import__('nbray.notebook.late', fromlist=['late']).{verb}({', '.join(map(repr, names))})"
    return ast.parse(text).body[0]


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _words_of_magics(tree: ast.AST) -> Iterator[str]:
    """Words in the text that is passed to magics and shell commands; any of them may be a name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        texts = [
            word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        verb = node.func.attr
        if verb in ("system", "getoutput") or _magic(node) not in _KNOWN_MAGICS:
            for text in texts:
                yield from _WORD.findall(text)


def bring(*names: str) -> None:
    """What the statement that is put before a cell calls."""
    _current[-1].bring(*names)


def clear(*names: str) -> None:
    """What the statement before a cell calls for names that it deletes."""
    _current[-1].clear(*names)


def reached(
    names: Iterable[str], namespace: Mapping[str, Any], wanted: Collection[str] | Mapping[str, Any]
) -> list[str]:
    """Which of the ``wanted`` names are among ``names``, or read by functions and classes of the namespace that are reached from them."""
    from nbray.notebook.transfer import code_globals

    found: dict[str, None] = {}
    pending, seen = list(names), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in wanted:
            found[name] = None
        elif name in namespace:
            for code in _codes(namespace[name], namespace):
                pending.extend(code_globals(code))
    return sorted(found)


def _codes(value: Any, namespace: Mapping[str, Any], depth: int = 3) -> Iterator[types.CodeType]:
    """The code of the namespace's own functions that using this value may run."""
    if isinstance(value, types.FunctionType):
        if value.__globals__ is namespace:
            yield value.__code__
        inner = [getattr(value, "__wrapped__", None)]
    elif isinstance(value, type):
        inner = list(vars(value).values()) if value.__module__ == "__main__" else []
    elif isinstance(value, (staticmethod, classmethod)):
        inner = [value.__func__]
    elif isinstance(value, property):
        inner = [value.fget, value.fset, value.fdel]
    elif isinstance(value, functools.partial):
        inner = [value.func]
    elif isinstance(value, types.MethodType):
        inner = [value.__func__]
    else:
        target: Callable[[], Any] | None = getattr(type(value), "__nbray_target__", None)
        inner = [value.__nbray_target__] if target is not None else [type(value)]
        if target is None and type(value).__module__ != "__main__":
            return
    if depth:
        for one in inner:
            yield from _codes(one, namespace, depth - 1)
