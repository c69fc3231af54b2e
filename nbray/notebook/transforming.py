"""From what stands in a cell to plain Python, as IPython does it."""

from __future__ import annotations

import linecache
import re
import sys
from types import FrameType
from typing import Any

_CHANGED = re.compile(r"[%!?]|^[ \t]*(?:[,;/]|In \[|>>>|\.\.\.)", re.MULTILINE)
"""What is in every cell that IPython changes, and in some that it does not."""

_CLEANERS, _LINES, _TOKENS = 4, 1, 4
"""How many transformations IPython has of each kind; the user may have added some."""


def plain_python(shell: Any, cell: str) -> str:
    """What ``shell.transform_cell`` makes of a cell. Looking at its every token takes 0.1 ms, which a cell without magics is spared."""
    manager = shell.input_transformer_manager
    usual = (
        len(manager.cleanup_transforms) <= _CLEANERS
        and len(manager.line_transforms) <= _LINES
        and len(manager.token_transformers) <= _TOKENS
        and not shell.input_transformers_post
    )
    if usual and cell.strip() and cell[0] not in " \t\n\r\f" and _CHANGED.search(cell) is None:
        return cell if cell.endswith("\n") else cell + "\n"
    transformed: str = shell.transform_cell(cell)
    return transformed


def filename_of(shell: Any, code: str, number: int, raw: str, *, running: bool) -> str:
    """The name of the cell's file, under which tracebacks and debuggers find ``code`` from now on.

    ``running``: whether ``raw`` is the whole cell that runs. ipykernel's names are hashes of it, made in Python (0.1 ms for 1000 characters); that one
    has been made already, when the cell began.
    """
    name = _running_name(shell, number) if running else None
    if name is None:
        made: str = shell.compile.cache(code, number, raw_code=raw)
        return made
    entry = len(code), None, [f"{line}\n" for line in code.splitlines()], name
    linecache.cache[name] = entry
    # IPython 8 keeps them there, too.
    getattr(linecache, "_ipython_cache", {})[name] = entry
    return name


def _running_name(shell: Any, number: int) -> str | None:
    if not type(shell.compile).__module__.startswith("ipykernel."):
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and frame.f_globals is shell.user_ns:
            return code.co_filename if shell.compile._filename_map.get(code.co_filename) == number else None
        frame = frame.f_back
    return None
