"""``%%remote``: a cell prepared, submitted, waited for, and its names bound. One `RemoteCells` per notebook."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from nbray.api import context
from nbray.errors import GetTimeoutError, NbrayError, SerializationError, TaskError
from nbray.notebook import arguments, failing
from nbray.notebook.arguments import Parser
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import lifetime

if TYPE_CHECKING:
    from nbray.api.remote import RemoteFunction
    from nbray.notebook.cell import Returned
    from nbray.notebook.runner import CellError

FUTURE_FLAGS = 0xFFF0000
"""Compiler flags of ``from __future__`` statements of earlier cells; IPython keeps others beside them."""


def parser() -> Parser:
    """The command line of ``%%remote``."""
    made = Parser("%%remote", "Run this cell on the cluster, as if it ran here.")
    add = made.add_argument
    add(
        "-o",
        "--out",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="bring back these names only (default: all that the cell binds)",
    )
    add(
        "-i",
        "--in",
        dest="also",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="send these names too (what eval and the like read is not seen)",
    )
    add("--num-cpus", type=arguments.amount, metavar="N", help="CPUs that the cell takes (1)")
    add("--num-gpus", type=arguments.amount, metavar="N", help="GPUs that the cell takes (0)")
    add("--memory", type=arguments.size, metavar="SIZE", help="memory that the cell takes, for instance 2GB")
    add("--timeout", type=arguments.amount, metavar="S", help="cancel the cell after S seconds")
    add(
        "--retries",
        type=arguments.whole,
        metavar="N",
        help="run the cell again, up to N times, if it raises or its process dies (0)",
    )
    add("-q", "--quiet", action="store_true", help="say nothing but what the cell says")
    return made


class RemoteCells:
    """Runs cells of one notebook on the cluster."""

    def __init__(self, shell: Any, cockpit: Cockpit) -> None:
        self._ip = shell
        self.cockpit = cockpit
        self._runner: RemoteFunction[Any, Any] | None = None

    def run(self, cell: str, options: argparse.Namespace) -> Any:
        """Run ``cell`` (as the notebook has it); its last value. Raises what it raises; BadUsageError for names that are none."""
        out, also = arguments.names(options.out), arguments.names(options.also)
        task, name = self._prepare(cell, out, also or [], options)
        runtime = self._connected(options)
        run = self._remote_function(options, name)
        self.cockpit.router.own(self.cockpit.cell.label, name)
        back = self._wait(runtime.engine, functools.partial(run.remote, task), options)
        self._bind(back, quiet=options.quiet)
        return back.value

    def _connected(self, options: argparse.Namespace) -> context.Runtime:
        runtime = context.current()
        if runtime is None:
            card = lifetime.start(self.cockpit, lifetime.start_parser().parse_args([]))
            if not options.quiet:
                self.cockpit.say(
                    f"{card.text.splitlines()[0]} for this cell (%cluster status, %cluster stop)"
                )
            runtime = context.require()
        return runtime

    def _prepare(
        self, cell: str, out: list[str] | None, also: list[str], options: argparse.Namespace
    ) -> tuple[Any, str]:
        from nbray.notebook import transfer
        from nbray.notebook.capture import is_silenced
        from nbray.notebook.cell import prepare

        shell = self._ip
        source, filename = self._placed(cell)
        try:
            prepared = prepare(
                source,
                filename,
                shell.user_ns,
                also=also,
                out=out,
                hidden=shell.user_ns_hidden,
                flags=shell.compile.flags & FUTURE_FLAGS,
                display=not is_silenced(cell),
                carried=transfer.carried_types(),
            )
        except SyntaxError as error:
            failing.shown_as(error, shell.SyntaxTB.structured_traceback(type(error), error, []))
            raise
        except (NbrayError, NameError) as error:
            raise failing.briefly(error) from None
        if prepared.blind and not also and not options.quiet:
            call, line = prepared.blind[0]
            self.cockpit.say(
                f"{call} in line {line} may read names that cannot be seen from here; send them with -i NAME"
            )
        return prepared.task, self.cockpit.cell.title

    def _placed(self, cell: str) -> tuple[str, str]:
        """The cell as plain Python, with as many empty lines before it as there are in the notebook, and its file's name."""
        compiler, number = self._ip.compile, self.cockpit.cell.number
        whole = self.cockpit.cell.source
        at = whole.rfind(cell.rstrip("\n")) if cell.strip() else -1
        above = whole[:at] if at >= 0 else ""
        body = self._ip.transform_cell(cell)
        # IPython takes empty lines away from the start.
        text = cell.lstrip()
        above += (
            cell[: len(cell) - len(text)].rpartition("\n")[0] + "\n"
            if "\n" in cell[: len(cell) - len(text)]
            else ""
        )
        # Tracebacks and debuggers look the lines up under this name; IPython has put only its own call of the magic there.
        filename = compiler.cache(above + body, number, raw_code=whole if at >= 0 else cell)
        return "\n" * above.count("\n") + body, filename

    def _remote_function(self, options: argparse.Namespace, name: str) -> RemoteFunction[Any, Any]:
        if self._runner is None:
            from nbray.api.remote import RemoteFunction
            from nbray.notebook.runner import run_cell

            self._runner = RemoteFunction(run_cell, {})
        retries = options.retries or 0
        given: dict[str, Any] = {"name": name, "max_retries": retries}
        if retries:
            given["retry_exceptions"] = True
        for key in ("num_cpus", "num_gpus", "memory"):
            if getattr(options, key) is not None:
                given[key] = getattr(options, key)
        return self._runner.options(**given)

    def _wait(self, engine: Any, submit: Callable[[], Any], options: argparse.Namespace) -> Returned:
        from nbray.notebook.cell import returned
        from nbray.notebook.runner import CellError

        ref = None
        try:
            ref = submit()
            result = engine.get([ref], options.timeout, writable=True)[0]
        except KeyboardInterrupt as interrupt:
            if ref is not None:
                engine.cancel(ref, False, True)
            failing.shown_as(
                interrupt, ["KeyboardInterrupt: the cell is cancelled, with the tasks that it started"]
            )
            raise
        except GetTimeoutError:
            engine.cancel(ref, False, True)
            raise failing.briefly(
                GetTimeoutError(
                    f"the cell was cancelled because it did not end within {options.timeout:g} s (--timeout)"
                )
            ) from None
        except TaskError as error:
            if isinstance(error.cause, CellError):
                self._fail(error, error.cause, quiet=options.quiet)
            raise failing.briefly(error) from None
        except NbrayError as error:
            raise failing.briefly(error) from None
        try:
            return returned(result, self._ip.user_ns)
        except Exception as error:
            text = f"the cell ran, but what it bound cannot be read here: {type(error).__name__}: {error}"
            raise failing.briefly(SerializationError(text)) from error

    def _fail(self, error: TaskError, failure: CellError, *, quiet: bool) -> NoReturn:
        """Raise what the cell raised, after binding what it had bound until then."""
        from nbray.notebook import render
        from nbray.notebook.cell import returned

        back = returned(failure.result, self._ip.user_ns)
        self._bind(back, quiet=quiet)
        where = "This ran on the cluster"
        if not self.cockpit.static:
            where += f" (task {error.task}, worker pid {error.pid}, node {error.node})"
        style = render.Style(coloured=self._ip.colors.lower() != "nocolor")
        lines = render.traceback_lines(failure.report, self._cell_name, where, style)
        raised = back.value if isinstance(back.value, BaseException) else TaskError(*failure.args)
        raised.__traceback__ = None
        failing.shown_as(raised, lines)
        raise raised

    def _cell_name(self, filename: str) -> str | None:
        named = self._ip.compile.format_code_name(filename)
        return None if named is None else " ".join(named)

    def _bind(self, back: Returned, *, quiet: bool) -> None:
        self._ip.push(back.values)
        for name in back.deleted:
            self._ip.user_ns.pop(name, None)
        if not quiet:
            for note in back.notes:
                self.cockpit.say(note)
