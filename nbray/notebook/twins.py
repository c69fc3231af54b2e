"""The magics as plain functions: for linters and editors, which do not look into cells that begin with ``%%``, and for scripts."""

from __future__ import annotations

import dataclasses
import linecache
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nbray.api import context
from nbray.notebook import arguments, commands, options
from nbray.notebook.arguments import BadUsageError
from nbray.notebook.cockpit import CellRun, Cockpit
from nbray.notebook.options import CellOptions
from nbray.notebook.remote_cell import RemoteCells

_plain: dict[int, PlainCells] = {}
"""Of scripts: id of a module's namespace -> what runs its cells."""


def remote_cell(
    source: str,
    *,
    out: Sequence[str] | str | None = None,
    also: Sequence[str] | str = (),
    background: bool = False,
    on_interrupt: str = "cancel",
    over: Mapping[str, Iterable[Any]] | None = None,
    timeout: float | None = None,
    retries: int = 0,
    name: str = "",
    local: bool = False,
    dry_run: bool = False,
    stream: bool = True,
    progress_after: float | None = None,
    quiet: bool = False,
    **task: Any,
) -> Any:
    """What ``%%remote`` does, for code in a string: run it on the cluster as if it ran here; the value of its last expression.

    It sees the names of the notebook (in a script: of the module that calls), and what it binds is bound there. ``out``, ``also``: names, in a list or separated
    by commas. ``over``: ``{"x": files}`` runs it once per item. Other arguments are those of ``%%remote`` and, in ``task``, of `nbray.remote`
    (``num_cpus``, ``memory`` in bytes, ...). Raises what the code raises, SyntaxError, SerializationError (a value cannot be sent),
    ValueError for options that mean nothing.
    """
    __tracebackhide__ = True
    if over is not None and len(over) != 1:
        raise ValueError(
            f'over={dict(over)!r}: expected one name with its items, for instance over={{"x": files}}'
        )
    given = {key: value for key, value in task.items() if value is not None}
    given["max_retries"] = retries
    if retries:
        given["retry_exceptions"] = True
    chosen = CellOptions(
        out=None if out is None else _names(out),
        also=_names(also),
        timeout=timeout,
        quiet=quiet,
        background=background,
        on_interrupt=on_interrupt,
        dry_run=dry_run,
        local=local,
        name=name,
        stream=stream,
        progress_after=progress_after,
        over=None if over is None else (next(iter(over)), ""),
        items=None if over is None else tuple(next(iter(over.values()))),
        task=given,
    )
    cells = _cells(sys._getframe(1).f_globals)
    try:
        options.check(chosen)
        return cells.run(source, chosen)
    except BadUsageError as error:
        raise ValueError(str(error)) from None


def cluster(line: str = "status") -> Any:
    """What ``%cluster`` does with this line: ``nbray.cluster("start --cpus 2")``. Its value, if it has one (a frame).

    Raises ValueError for a line that means nothing.
    """
    try:
        words = arguments.split(line)
        command = commands.find(words[0] if words else "status")
        given = command.parser().read(words[1:])
        return command.run(_cells(sys._getframe(1).f_globals).cockpit, given)
    except BadUsageError as error:
        raise ValueError(str(error)) from None


def _names(given: Sequence[str] | str) -> tuple[str, ...]:
    try:
        return tuple(arguments.names([given] if isinstance(given, str) else list(given)) or ())
    except BadUsageError as error:
        raise ValueError(str(error)) from None


def _cells(namespace: dict[str, Any]) -> RemoteCells:
    """Of this notebook, with the extension loaded; or of the module whose namespace this is."""
    shell = notebook()
    if shell is not None:
        from nbray.notebook import extension

        extension.load_ipython_extension(shell)
        cockpit = extension.cockpit_of(shell)
        assert cockpit is not None
        assert cockpit.cells is not None
        return cockpit.cells
    known = _plain.get(id(namespace))
    if known is None:
        known = _plain[id(namespace)] = PlainCells(namespace)
    return known


def notebook() -> Any:
    """IPython's shell, if this process has one."""
    module = sys.modules.get("IPython.core.getipython")
    return module.get_ipython() if module is not None else None


class PlainCells(RemoteCells):
    """Runs code of a script on the cluster."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        shell = _PlainShell(namespace)
        super().__init__(shell, Cockpit(shell))

    def run(self, cell: str, options: CellOptions) -> Any:
        if options.background or options.on_interrupt == "detach":
            raise ValueError(
                "background=True needs a notebook, whose later cells wait for the names; in a script use @nbray.remote, or a thread"
            )
        cockpit = self.cockpit
        cockpit.cell = CellRun(cockpit.cell.number + 1, "", "", "", "")
        cockpit.router.remember(cockpit.cell.label)
        try:
            return super().run(cell, dataclasses.replace(options, name=options.name or "remote_cell"))
        except Exception as error:
            shown = getattr(error, "_render_traceback_", None)
            if shown is not None:
                error.add_note("\n".join(shown()))
            raise

    def placed(self, cell: str) -> tuple[str, str]:
        filename = f"<remote_cell {self.cockpit.cell.number}>"
        linecache.cache[filename] = (len(cell), None, cell.splitlines(keepends=True), filename)
        return cell, filename

    def _connect(self, options: CellOptions) -> None:
        context.require()


class _PlainShell:
    """What `RemoteCells` needs of IPython's shell, where there is none."""

    colors = "nocolor"
    execution_count = 0
    history_manager = None

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.user_ns = namespace
        self.user_ns_hidden: dict[str, Any] = {}
        self.compile = self
        self.flags = 0
        self.ast_transformers: list[Any] = []
        self.SyntaxTB = types.SimpleNamespace(structured_traceback=lambda _kind, error, _frames: [str(error)])

    def format_code_name(self, _filename: str) -> None:
        return None

    def push(self, values: Mapping[str, Any]) -> None:
        self.user_ns.update(values)
