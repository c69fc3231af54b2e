"""What does a cell need from the notebook, and what does it bind? Pure analysis of source text; nothing is executed.

Rules (a) to (d) of the notebook facts, section 4: ``x += 1`` and ``del x`` need the old ``x``; a name that is both read and assigned is
needed unless it is *definitely* bound before every read; names come back whatever binds them. When in doubt a name counts as read: one
that is sent in vain costs time, one that is missing breaks the cell.
"""

# ruff: noqa: N802, N815  (methods are found by the names of ast's node classes)

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_BLIND_CALLS = ("eval", "exec", "globals", "locals", "vars")
_SWALLOWING = ("suppress", "raises", "assertRaises")
"""Context managers that end an exception: what their block binds is not certain afterwards."""

_SHELL_TEXT = ("system", "getoutput", "getoutput_lines")
_BRACES = re.compile(r"(?<!\{)\{([^{}]+)\}(?!\})")
_DOLLAR = re.compile(r"(?<!\$)\$([A-Za-z_]\w*)")
_AT = re.compile(r"@([A-Za-z_]\w*)")


@dataclass(frozen=True)
class CellNames:
    """What a cell does with the notebook's names.

    ``reads``: names read before the cell has surely bound them, with the line of the first read. ``deletes``: names it may delete;
    ``only_deleted``: those of the reads that are merely deleted, so that their value does not matter. ``binds``: names the cell may bind. ``submodules``: dotted attribute chains per root
    name (``xml`` -> ``dom.minidom``), which may be submodules. ``imports``: dotted names of ``import a.b`` statements. ``blind``: calls
    that may read names which cannot be seen, as (call, line).
    """

    reads: Mapping[str, int]
    deletes: tuple[str, ...]
    only_deleted: frozenset[str]
    binds: tuple[str, ...]
    submodules: Mapping[str, frozenset[str]]
    imports: tuple[str, ...]
    blind: tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=64)
def analyse(source: str, filename: str = "<cell>") -> CellNames:
    """Names of a cell's (transformed, so plain Python) source. Raises SyntaxError."""
    return analyse_tree(ast.parse(source, filename))


def analyse_tree(tree: ast.Module) -> CellNames:
    """As `analyse`, of a cell that is parsed already."""
    walk = _Walk()
    walk.statements(tree.body)
    walk.finish()
    deleted = frozenset(name for name in walk.reads if name in walk.deleted and name not in walk.loaded)
    return CellNames(
        reads=walk.reads,
        deletes=tuple(walk.deleted),
        only_deleted=deleted,
        binds=tuple(walk.binds),
        submodules={root: frozenset(chains) for root, chains in walk.chains.items()},
        imports=tuple(walk.imports),
        blind=tuple(walk.blind),
    )


def is_silenced(source: str) -> bool:
    """Whether the cell's last statement ends with ``;``, which keeps its value from being displayed."""
    if ";" not in source:
        return False
    last = ""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.DEDENT)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in skipped:
                last = token.string
    except (tokenize.TokenError, SyntaxError):
        return False
    return last == ";"


def names_in_text(text: str) -> list[str]:
    """Names that IPython expands in ``!command {expression} $name``."""
    found: list[str] = []
    for expression in _BRACES.findall(text):
        try:
            tree = ast.parse(expression.partition("!")[0].strip() or "0", mode="eval")
        except SyntaxError:
            continue
        found += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return found + _DOLLAR.findall(text)


def names_in_query(text: str) -> list[str]:
    """Names that pandas looks up in the caller's frame: ``df.query("size > @limit")``."""
    return _AT.findall(text)


@dataclass
class _Scope:
    """A function's or class's names inside the cell; ``bound`` is what a class body has surely bound so far."""

    kind: str
    local: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    """Declared ``global``."""
    bound: set[str] = field(default_factory=set)


_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class _Locals(ast.NodeVisitor):
    """The names that a function's body binds, without those of the scopes inside it."""

    def __init__(self) -> None:
        self.stored: dict[str, None] = {}
        self.shared: set[str] = set()
        self.outer: set[str] = set()
        self._in_comprehension = 0

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load) and not self._in_comprehension:
            self.stored[node.id] = None

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        # An assignment expression binds in the function around a comprehension, not in the comprehension.
        self.stored[node.target.id] = None
        self.visit(node.value)

    def visit_Global(self, node: ast.Global) -> None:
        self.shared.update(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self.outer.update(node.names)

    def visit_Import(self, node: ast.Import) -> None:
        self.stored.update((alias.asname or alias.name.partition(".")[0], None) for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.stored.update((alias.asname or alias.name, None) for alias in node.names if alias.name != "*")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.stored[node.name] = None
        for outer in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outer)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for outer in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outer)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.stored[node.name] = None
        for outer in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(outer)

    def _visit_comprehension(self, node: _Comprehension) -> None:
        self._in_comprehension += 1
        self.generic_visit(node)
        self._in_comprehension -= 1

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.stored[node.name] = None
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        if node.name:
            self.stored[node.name] = None
        self.generic_visit(node)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        if node.name:
            self.stored[node.name] = None

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self.stored[node.rest] = None
        self.generic_visit(node)


def _unbound_by(nodes: Iterable[ast.AST]) -> set[str]:
    """Names of the cell's own scope that these statements may delete (``except ... as e`` deletes ``e``)."""
    found: set[str] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
            found.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        pending.extend(ast.iter_child_nodes(node))
    return found


_Bound = set[str] | None
"""Names surely bound at a point of the cell; None where the point cannot be reached."""


def _join(states: Iterable[_Bound]) -> _Bound:
    reachable = [state for state in states if state is not None]
    if not reachable:
        return None
    return set.intersection(*reachable)


class _Walk:
    """Follows the cell in the order of execution and keeps the set of names that are surely bound.

    Bodies of functions run later, at the earliest when the statement after them runs; so those of consecutive ``def`` statements are
    looked at together, with all their names bound (`finish` looks at what is left at the end).
    """

    def __init__(self) -> None:
        self.reads: dict[str, int] = {}
        self.loaded: set[str] = set()
        self.deleted: dict[str, None] = {}
        self.binds: dict[str, None] = {}
        self.chains: dict[str, set[str]] = {}
        self.imports: dict[str, None] = {}
        self.blind: list[tuple[str, int]] = []
        self._bound: _Bound = set()
        self._scopes: list[_Scope] = []
        self._later: list[tuple[_FunctionNode, list[_Scope]]] = []
        self._breaks: list[list[_Bound]] = []
        self._block = 0

    # -- statements

    def statements(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            if self._later and not isinstance(
                statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Import, ast.ImportFrom)
            ):
                self.finish()
            self._statement(statement)

    def finish(self) -> None:
        later, self._later = self._later, []
        for node, scopes in later:
            self._function_body(node, scopes)

    def _statement(self, node: ast.stmt) -> None:
        if not self._scopes:
            handler = _handler("_flow_", type(node))  # type: ignore[arg-type]  # mypy: AST may not be hashable
            if handler is not None:
                handler(self, node)
                return
        self._block += 1
        self._node(node)
        self._block -= 1

    def _branch(self, body: Iterable[ast.stmt], start: _Bound) -> _Bound:
        """The state after ``body`` when it begins with ``start``."""
        self._bound = None if start is None else set(start)
        self.statements(body)
        self.finish()
        return self._bound

    def _flow_If(self, node: ast.If) -> None:
        self._node(node.test)
        start = self._bound
        self._bound = _join([self._branch(node.body, start), self._branch(node.orelse, start)])

    def _flow_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._node(node.iter)
        self._loop(node, None)

    _flow_AsyncFor = _flow_For

    def _flow_While(self, node: ast.While) -> None:
        if self._bound is not None:
            self._bound -= _unbound_by(node.body)
        self._node(node.test)
        self._loop(node, node.test)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, test: ast.expr | None) -> None:
        start: _Bound = None if self._bound is None else self._bound - _unbound_by(node.body)
        self._breaks.append([])
        self._bound = None if start is None else set(start)
        if not isinstance(node, ast.While):
            self._node(node.target)
        self._branch(node.body, self._bound)
        breaks = self._breaks.pop()
        endless = isinstance(test, ast.Constant) and bool(test.value)
        self._bound = _join([*breaks, self._branch(node.orelse, None if endless else start)])

    def _flow_Break(self, _node: ast.Break) -> None:
        if self._breaks:
            self._breaks[-1].append(self._bound)
        self._bound = None

    def _flow_Continue(self, _node: ast.Continue) -> None:
        self._bound = None

    def _flow_Raise(self, node: ast.Raise) -> None:
        self._children(node)
        self._bound = None

    def _flow_Try(self, node: ast.Try) -> None:
        start = self._bound
        inside: list[ast.AST] = [*node.body]
        interrupted: _Bound = None if start is None else start - _unbound_by(inside)
        ends = [self._branch([*node.body, *node.orelse], start)]
        for handler in node.handlers:
            self._bound = None if interrupted is None else set(interrupted)
            if handler.type is not None:
                self._node(handler.type)
            if handler.name:
                self._bind(handler.name)
                self.deleted.setdefault(handler.name)
            end = self._branch(handler.body, self._bound)
            ends.append(end - {handler.name} if end is not None and handler.name else end)
        after = _join(ends)
        if node.finalbody:
            before: _Bound = (
                None if start is None else start - _unbound_by([*inside, *node.orelse, *node.handlers])
            )
            end = self._branch(node.finalbody, before)
            if after is None or end is None or before is None:
                after = None
            else:
                after = (after - _unbound_by(node.finalbody)) | (end - before)
        self._bound = after

    _flow_TryStar = _flow_Try

    def _flow_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self._node(item.context_expr)
            if item.optional_vars is not None:
                self._node(item.optional_vars)
        start = self._bound
        end = self._branch(node.body, start)
        if any(_swallows(item.context_expr) for item in node.items):
            end = None if start is None else start - _unbound_by(node.body)
        self._bound = end

    _flow_AsyncWith = _flow_With

    def _flow_Match(self, node: ast.Match) -> None:
        self._node(node.subject)
        start = self._bound
        ends: list[_Bound] = []
        certain = False
        for case in node.cases:
            self._bound = None if start is None else set(start)
            self._node(case.pattern)
            if case.guard is not None:
                self._node(case.guard)
            ends.append(self._branch(case.body, self._bound))
            certain = certain or (
                case.guard is None and isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
            )
        self._bound = _join(ends if certain else [*ends, start])

    # -- names

    def _bind(self, name: str) -> None:
        scope = self._scopes[-1] if self._scopes else None
        if scope is None:
            self.binds.setdefault(name)
            if self._bound is not None:
                self._bound.add(name)
        elif name in scope.shared:
            self.binds.setdefault(name)
        elif scope.kind == "class" and self._block <= 1:
            scope.bound.add(name)

    def _is_local(self, name: str) -> bool:
        for depth, scope in enumerate(reversed(self._scopes)):
            if scope.kind == "class":
                # A class body is seen by itself only, not by the functions in it; a name of its own that it has not bound it looks up globally.
                if depth == 0 and (name in scope.bound or name in scope.shared or name in scope.local):
                    return name in scope.bound and name not in scope.shared
                continue
            if name in scope.shared:
                return False
            if name in scope.local:
                return True
        return False

    def _read(self, name: str, line: int, *, load: bool = True) -> None:
        if self._is_local(name):
            return
        if load:
            self.loaded.add(name)
        if self._bound is None or name in self._bound:
            return
        self.reads.setdefault(name, line)

    # -- expressions and everything else

    def _node(self, node: ast.AST) -> None:
        handler = _handler("_on_", type(node))  # type: ignore[arg-type]
        if handler is not None:
            handler(self, node)
        else:
            self._children(node)

    def _children(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            else:
                self._node(child)

    def _on_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._read(node.id, node.lineno)
        elif isinstance(node.ctx, ast.Store):
            self._bind(node.id)
        elif self._scopes and self._scopes[-1].kind == "class" and node.id not in self._scopes[-1].shared:
            # A class body deletes names of its own only.
            self._scopes[-1].bound.discard(node.id)
        else:
            self._read(node.id, node.lineno, load=False)
            self._unbind(node.id)

    def _unbind(self, name: str) -> None:
        if not self._is_local(name):
            self.deleted.setdefault(name)
            if self._bound is not None:
                self._bound.discard(name)

    def _on_Assign(self, node: ast.Assign) -> None:
        self._node(node.value)
        for target in node.targets:
            self._node(target)

    def _on_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._read(node.target.id, node.lineno)
        self._node(node.value)
        self._node(node.target)

    def _on_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._node(node.value)
        self._node(node.annotation)
        if node.value is not None or not isinstance(node.target, ast.Name):
            self._node(node.target)

    def _on_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._node(node.value)
        scopes = self._scopes
        # The name belongs to the scope around all comprehensions.
        kept = len(scopes)
        while kept and scopes[kept - 1].kind == "comprehension":
            kept -= 1
        self._scopes = scopes[:kept]
        self._bind(node.target.id)
        self._scopes = scopes

    def _maybe(self, nodes: Iterable[ast.AST]) -> None:
        """Expressions that may not be evaluated: what they bind is not certain."""
        self._block += 1
        for node in nodes:
            start = None if self._bound is None else set(self._bound)
            self._node(node)
            self._bound = start
        self._block -= 1

    def _on_For(self, node: ast.For | ast.AsyncFor) -> None:
        """In a function or class: the loop may have no turn."""
        self._node(node.iter)
        self._maybe([node.target, *node.body, *node.orelse])

    _on_AsyncFor = _on_For

    def _on_match_case(self, node: ast.match_case) -> None:
        self._maybe([node.pattern, *([node.guard] if node.guard is not None else []), *node.body])

    def _on_BoolOp(self, node: ast.BoolOp) -> None:
        self._node(node.values[0])
        self._maybe(node.values[1:])

    def _on_IfExp(self, node: ast.IfExp) -> None:
        self._node(node.test)
        self._maybe([node.body, node.orelse])

    def _on_Compare(self, node: ast.Compare) -> None:
        self._node(node.left)
        self._node(node.comparators[0])
        self._maybe(node.comparators[1:])

    def _on_Assert(self, node: ast.Assert) -> None:
        self._maybe([node.test, *([node.msg] if node.msg is not None else [])])

    def _on_comprehension_scope(self, node: _Comprehension) -> None:
        first = node.generators[0]
        self._node(first.iter)
        local = _Locals()
        for generator in node.generators:
            local.visit(generator.target)
        self._scopes.append(_Scope("comprehension", set(local.stored)))
        start = None if self._bound is None else set(self._bound)
        for generator in node.generators:
            if generator is not first:
                self._node(generator.iter)
            for condition in generator.ifs:
                self._node(condition)
        if isinstance(node, ast.DictComp):
            self._node(node.key)
            self._node(node.value)
        else:
            self._node(node.elt)
        self._scopes.pop()
        # The loop may have no turn.
        self._bound = start

    _on_ListComp = _on_SetComp = _on_DictComp = _on_GeneratorExp = _on_comprehension_scope

    def _on_Lambda(self, node: ast.Lambda) -> None:
        self._arguments(node.args)
        self._function_body(node, list(self._scopes))

    def _on_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self._node(decorator)
        self._arguments(node.args)
        scopes = list(self._scopes)
        self._enter_type_parameters(node)
        self._annotations(node)
        inner = list(self._scopes)
        self._scopes = scopes
        self._bind(node.name)
        if scopes:
            self._function_body(node, inner)
        else:
            self._later.append((node, inner))

    _on_AsyncFunctionDef = _on_FunctionDef

    def _arguments(self, arguments: ast.arguments) -> None:
        for default in (*arguments.defaults, *arguments.kw_defaults):
            if default is not None:
                self._node(default)

    def _enter_type_parameters(self, node: Any) -> None:
        """Their scope, if there are any, and what their bounds and defaults read; the caller leaves the scope."""
        parameters = getattr(node, "type_params", ())
        if parameters:
            self._scopes.append(_Scope("function", {parameter.name for parameter in parameters}))
        for parameter in parameters:
            self._children(parameter)

    def _annotations(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for argument in _all_arguments(node.args):
            if argument.annotation is not None:
                self._node(argument.annotation)
        if node.returns is not None:
            self._node(node.returns)

    def _function_body(self, node: _FunctionNode, scopes: list[_Scope]) -> None:
        local = _Locals()
        body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
        for child in body:
            local.visit(child)
        names = set(local.stored) | {argument.arg for argument in _all_arguments(node.args)}
        kept, start, block = self._scopes, None if self._bound is None else set(self._bound), self._block
        self._scopes = [*scopes, _Scope("function", names - local.shared - local.outer, local.shared)]
        for child in body:
            self._node(child)
        self._scopes, self._bound, self._block = kept, start, block

    def _on_ClassDef(self, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self._node(decorator)
        scopes = list(self._scopes)
        self._enter_type_parameters(node)
        for base in (*node.bases, *(keyword.value for keyword in node.keywords)):
            self._node(base)
        local = _Locals()
        for child in node.body:
            local.visit(child)
        block, self._block = self._block, 0
        self._scopes.append(_Scope("class", set(local.stored), local.shared))
        for child in node.body:
            self._statement(child)
        self._scopes, self._block = scopes, block
        self._bind(node.name)

    def _on_TypeAlias(self, node: Any) -> None:
        self._bind(node.name.id)
        scopes = list(self._scopes)
        self._enter_type_parameters(node)
        self._node(node.value)
        self._scopes = scopes

    def _on_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.setdefault(alias.name)
            self._bind(alias.asname or alias.name.partition(".")[0])

    def _on_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name != "*":
                self._bind(alias.asname or alias.name)

    def _on_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._block += 1
        if node.name:
            self._bind(node.name)
            if self._scopes and node.name in self._scopes[-1].shared:
                self.deleted.setdefault(node.name)
        self._children(node)
        self._block -= 1

    def _on_MatchAs(self, node: ast.MatchAs) -> None:
        self._children(node)
        if node.name:
            self._bind(node.name)

    def _on_MatchStar(self, node: ast.MatchStar) -> None:
        if node.name:
            self._bind(node.name)

    def _on_MatchMapping(self, node: ast.MatchMapping) -> None:
        self._children(node)
        if node.rest:
            self._bind(node.rest)

    def _on_Attribute(self, node: ast.Attribute) -> None:
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and not self._is_local(inner.id):
            self.chains.setdefault(inner.id, set()).add(".".join(reversed(parts)))
        self._node(node.value)

    def _on_Call(self, node: ast.Call) -> None:
        self._children(node)
        text = next(
            (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), None
        )
        if isinstance(node.func, ast.Name) and node.func.id in _BLIND_CALLS:
            self._blind_call(node, node.func.id, text)
        elif isinstance(node.func, ast.Attribute):
            self._method_call(node, node.func, text)

    def _blind_call(self, node: ast.Call, name: str, text: str | None) -> None:
        bound = self._bound or set()
        if name in bound or self._is_local(name):
            return
        if name in ("eval", "exec") and text is not None:
            self._text_reads(text, node.lineno)
        elif name in ("eval", "exec", "globals") or not node.args:
            self.blind.append((f"{name}(...)", node.lineno))

    def _method_call(self, node: ast.Call, function: ast.Attribute, text: str | None) -> None:
        if _is_get_ipython(function.value):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if function.attr in _SHELL_TEXT and text is not None:
                for name in names_in_text(text):
                    self._read(name, node.lineno)
            elif function.attr in ("run_line_magic", "run_cell_magic"):
                for line in texts[1:]:
                    self._text_reads(line, node.lineno)
                    for name in names_in_text(line):
                        self._read(name, node.lineno)
        elif function.attr in ("query", "eval") and text is not None:
            for name in names_in_query(text):
                self._read(name, node.lineno)

    def _text_reads(self, text: str, line: int) -> None:
        """Names read by code that the cell holds as text (``eval("a + b")``, ``%time f(a)``)."""
        try:
            inner = analyse(text)
        except SyntaxError:
            return
        for name in inner.reads:
            self._read(name, line)


@functools.cache
def _handler(what: str, kind: Any) -> Callable[[_Walk, Any], None] | None:
    found: Callable[[_Walk, Any], None] | None = getattr(_Walk, what + kind.__name__, None)
    return found


def _swallows(expression: ast.expr) -> bool:
    if isinstance(expression, ast.Call):
        expression = expression.func
    name = expression.attr if isinstance(expression, ast.Attribute) else getattr(expression, "id", "")
    return name in _SWALLOWING


def _is_get_ipython(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "get_ipython"


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    single = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *single]
