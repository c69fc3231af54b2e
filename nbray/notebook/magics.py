"""``%%remote`` and ``%cluster``: what a person types, handed to what carries it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand

from nbray.errors import NbrayError
from nbray.notebook import arguments, commands, failing, graphs, options, remote_cell
from nbray.notebook.arguments import BadUsageError, Parser
from nbray.notebook.cards import Card
from nbray.notebook.cockpit import Cockpit


@magics_class
class NbrayMagics(Magics):
    """The magics of ``%load_ext nbray``."""

    def __init__(self, shell: Any, cockpit: Cockpit) -> None:
        super().__init__(shell)
        self.cockpit = cockpit
        self._cells = remote_cell.RemoteCells(shell, cockpit)
        self._parser = options.parser()
        self._line_parser = options.line_parser()

    @no_var_expand
    @line_cell_magic
    def remote(self, line: str, cell: str | None = None) -> Any:
        """Run this cell on the cluster, or compute this expression there."""
        __tracebackhide__ = True
        with _usage():
            if cell is not None:
                words = options.split_cell_line(line, self._parser)
                return self._cells.run(cell, options.read(self._parser.read(words)))
            words, expression = options.split_line(line, self._line_parser)
            given = options.read(self._line_parser.read(words))
            if not expression:
                raise BadUsageError("%remote: what should be computed? For instance: x = %remote f(3)")
            return self._cells.run(expression, given)

    @line_magic
    def cluster(self, line: str) -> Any:
        """Start, look at and stop clusters."""
        with _usage():
            words = arguments.split(line)
            text = commands.help_text(words)
            if text is not None:
                self.cockpit.show(Card(text, ""))
                return None
            command = commands.find(words[0] if words else "status")
            given = command.parser().read(words[1:])
        try:
            with _usage():
                return command.run(self.cockpit, given)
        except (NbrayError, RuntimeError, ValueError) as error:
            if hasattr(error, "_render_traceback_"):
                raise  # It knows how it wants to be shown.
            raise failing.briefly(error) from None

    @line_magic
    def graph(self, line: str) -> None:
        """Show the task graph."""
        try:
            with _usage():
                given = graphs.parser().read(arguments.split(line))
                self.cockpit.graphs.run(given.what, freeze=given.freeze)
        except (NbrayError, RuntimeError) as error:
            if hasattr(error, "_render_traceback_"):
                raise
            raise failing.briefly(error) from None


def help_of(parser: Parser) -> str:
    """A parser's help, as documentation of a magic."""
    return parser.format_help().replace("usage: ", "", 1)


NbrayMagics.remote.__doc__ = (
    f"Run this cell on the cluster, as if it ran here.\n\n{help_of(options.parser())}"
)
NbrayMagics.cluster.__doc__ = commands.overview()
NbrayMagics.graph.__doc__ = help_of(graphs.parser())


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except BadUsageError as error:
        raise UsageError(str(error)) from None
