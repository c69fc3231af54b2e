"""``%%remote`` and ``%cluster``: what a person types, turned into calls of the API."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand

from nbray.api import context
from nbray.errors import GetTimeoutError, NbrayError, SerializationError, TaskError
from nbray.notebook import arguments, cards, lifecycle
from nbray.notebook.arguments import BadUsageError, Parser, did_you_mean
from nbray.notebook.cockpit import Cockpit

if TYPE_CHECKING:
    from nbray.api.remote import RemoteFunction
    from nbray.notebook.cell import Returned
    from nbray.notebook.runner import CellError

FUTURE_FLAGS = 0xFFF0000
"""Compiler flags of ``from __future__`` statements of earlier cells; IPython keeps others beside them."""


def remote_parser() -> Parser:
    """The command line of ``%%remote``."""
    parser = Parser("%%remote", "Run this cell on the cluster, as if it ran here.")
    add = parser.add_argument
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
    return parser


def _start_parser() -> Parser:
    parser = Parser("%cluster start", "Start a cluster on this machine, or join the one that runs.")
    add = parser.add_argument
    add("--cpus", type=arguments.amount, metavar="N", help="CPUs (all that this process may use)")
    add("--gpus", type=arguments.amount, metavar="N", help="GPUs")
    add(
        "--store-memory",
        type=arguments.size,
        metavar="SIZE",
        help="size of the object store, for instance 2GB (30 %% of the memory)",
    )
    add("--name", metavar="NAME", help="name of the cluster (default)")
    add(
        "--seed",
        type=arguments.whole,
        metavar="N",
        help="repeat a run: random generators in tasks are seeded from this",
    )
    add("--session", metavar="NAME", help="name of this notebook, where the front end does not tell it")
    add("--keep", action="store_true", help="keep the cluster when the notebook ends")
    return parser


def _stop_parser() -> Parser:
    parser = Parser("%cluster stop", "Stop the cluster.")
    parser.add_argument("--force", action="store_true", help="even if other notebooks use it")
    return parser


def _bare(name: str, description: str) -> Callable[[], Parser]:
    return lambda: Parser(f"%cluster {name}", description)


SUBCOMMANDS: dict[str, Callable[[], Parser]] = {
    "start": _start_parser,
    "status": _bare("status", "What the cluster does, where its files are."),
    "stop": _stop_parser,
    "list": _bare("list", "The clusters of this user on this machine."),
    "doctor": _bare("doctor", "One block of text about this installation, to paste into a bug report."),
}


def _help(parser: argparse.ArgumentParser) -> str:
    return parser.format_help().replace("usage: ", "", 1)


@magics_class
class NbrayMagics(Magics):
    """The magics of ``%load_ext nbray``."""

    def __init__(self, shell: Any, cockpit: Cockpit) -> None:
        super().__init__(shell)
        self._ip = shell
        self.cockpit = cockpit
        self._parser = remote_parser()
        self._runner: RemoteFunction[Any, Any] | None = None

    # -- %%remote

    @no_var_expand
    @cell_magic
    def remote(self, line: str, cell: str) -> Any:
        """Run this cell on the cluster."""
        with _usage():
            options = self._parser.read(arguments.split(line))
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
            card = self._start(_start_parser().parse_args([]))
            if not options.quiet:
                self._say(f"{card.text.splitlines()[0]} for this cell (%cluster status, %cluster stop)")
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
            _render(error, shell.SyntaxTB.structured_traceback(type(error), error, []))
            raise
        except (NbrayError, NameError) as error:
            raise _briefly(error) from None
        if prepared.blind and not also and not options.quiet:
            call, line = prepared.blind[0]
            self._say(
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
            _render(interrupt, ["KeyboardInterrupt: the cell is cancelled, with the tasks that it started"])
            raise
        except GetTimeoutError:
            engine.cancel(ref, False, True)
            raise _briefly(
                GetTimeoutError(
                    f"the cell was cancelled because it did not end within {options.timeout:g} s (--timeout)"
                )
            ) from None
        except TaskError as error:
            if isinstance(error.cause, CellError):
                self._fail(error, error.cause, quiet=options.quiet)
            raise _briefly(error) from None
        except NbrayError as error:
            raise _briefly(error) from None
        try:
            return returned(result, self._ip.user_ns)
        except Exception as error:
            text = f"the cell ran, but what it bound cannot be read here: {type(error).__name__}: {error}"
            raise _briefly(SerializationError(text)) from error

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
        _render(raised, lines)
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
                self._say(note)

    def _say(self, text: str) -> None:
        self.cockpit.router.display(self.cockpit.cell.label, {"text/plain": f"nbray: {text}"})

    # -- %cluster

    @line_magic
    def cluster(self, line: str) -> None:
        """Start, look at and stop clusters."""
        with _usage():
            words = arguments.split(line)
            name = words[0] if words else "status"
            if name not in SUBCOMMANDS:
                raise BadUsageError(f"%cluster has no subcommand {name!r}{did_you_mean(name, SUBCOMMANDS)}")
            options = SUBCOMMANDS[name]().read(words[1:])
        try:
            getattr(self, f"_do_{name}")(options)
        except (NbrayError, RuntimeError, ValueError) as error:
            raise _briefly(error) from None

    def _show(self, card: cards.Card) -> None:
        self.cockpit.router.display(self.cockpit.cell.label, card.bundle(static=self.cockpit.static))

    def _do_start(self, options: argparse.Namespace) -> None:
        self._show(self._start(options))

    def _start(self, options: argparse.Namespace) -> cards.Card:
        from nbray.notebook import facts

        connected = context.current()
        if connected is not None:
            here = facts.of_runtime(connected)
            notes = facts.differences(here, options)
            return cards.start_card(
                here, notes or ["(%cluster start again changes nothing)"], static=self.cockpit.static
            )
        found = facts.running(options.name or "")
        began = time.perf_counter()
        runtime = facts.connect(
            options, lifecycle.session_name(self._ip, options.session or ""), keep=options.keep
        )
        seconds = time.perf_counter() - began
        here = replace(facts.of_runtime(runtime), started=None if found else seconds, keep=options.keep)
        notes = facts.differences(here, options) if found else []
        return cards.start_card(here, notes, static=self.cockpit.static)

    def _do_status(self, _options: argparse.Namespace) -> None:
        from nbray.notebook import facts

        runtime = context.current()
        if runtime is None:
            self._do_list(_options)
            return
        here = facts.of_runtime(runtime)
        self._show(cards.status_card(here, facts.status(), facts.paths(here), static=self.cockpit.static))

    def _do_stop(self, options: argparse.Namespace) -> None:
        from nbray.notebook import facts

        self._say(facts.stop(lifecycle.session_name(self._ip), force=options.force))

    def _do_list(self, _options: argparse.Namespace) -> None:
        from nbray.notebook import facts

        runtime = context.current()
        here = facts.of_runtime(runtime).directory if runtime is not None else ""
        records = facts.clusters()
        self._show(
            cards.list_card(
                [known for known, _ in records], [cards.age_of(created) for _, created in records], here
            )
        )

    def _do_doctor(self, _options: argparse.Namespace) -> None:
        from nbray import diagnose
        from nbray.notebook import facts

        self._show(cards.Card(diagnose.report(facts.front_end(self._ip)), ""))


NbrayMagics.remote.__doc__ = f"Run this cell on the cluster, as if it ran here.\n\n{_help(remote_parser())}"
NbrayMagics.cluster.__doc__ = "Start, look at and stop clusters.\n\n" + "\n".join(
    _help(make()) for make in SUBCOMMANDS.values()
)


@contextlib.contextmanager
def _usage() -> Any:
    try:
        yield
    except BadUsageError as error:
        raise UsageError(str(error)) from None


def _render(error: BaseException, lines: list[str]) -> None:
    """Have IPython show these lines for the error, instead of the frames of the magic."""
    with contextlib.suppress(AttributeError):
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


def _briefly(error: Exception) -> Exception:
    """An error of nbray's own: its class and its text say all, frames of the magic would hide them."""
    name = "TaskError" if isinstance(error, TaskError) else type(error).__name__
    _render(error, f"{name}: {error}".splitlines())
    return error
