"""``%%remote --local``: the cell runs in the notebook, where a debugger and ``input()`` have somebody to talk to."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from nbray.notebook.arguments import BadUsageError


def run(source: str, filename: str, namespace: dict[str, Any], flags: int = 0) -> Any:
    """Run plain Python in ``namespace``; the value of its last expression. Raises what it raises; BadUsageError for a top-level ``await``."""
    __tracebackhide__ = True
    tree = ast.parse(source, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    body = compile(tree, filename, "exec", flags=flags, dont_inherit=True)
    tail = None
    if isinstance(last, ast.Expr):
        tail = compile(ast.Expression(last.value), filename, "eval", flags=flags, dont_inherit=True)
    if any(code is not None and code.co_flags & inspect.CO_COROUTINE for code in (body, tail)):
        raise BadUsageError(
            "--local cannot run a top-level await: take the %%remote line away (or comment it out) and run the cell"
        )
    exec(body, namespace)
    return None if tail is None else eval(tail, namespace)
