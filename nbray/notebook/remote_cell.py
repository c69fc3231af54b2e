"""``%%remote``: a cell prepared, submitted, waited for, and its names bound. One `RemoteCells` per notebook, one `Run` per run of a cell."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from nbray.api import context
from nbray.errors import GetTimeoutError, NbrayError, SerializationError, TaskError
from nbray.notebook import failing, following
from nbray.notebook.cockpit import CellRun, Cockpit
from nbray.notebook.commands import lifetime
from nbray.notebook.options import CellOptions

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.api.remote import RemoteFunction
    from nbray.notebook.cell import Prepared, Returned
    from nbray.notebook.runner import CellError, CellResult

FUTURE_FLAGS = 0xFFF0000
"""Compiler flags of ``from __future__`` statements of earlier cells; IPython keeps others beside them."""


class Run:
    """One run of a cell on the cluster.

    ``cell``: the notebook's cell it belongs to; ``name``: its task's; ``prepared``: what is sent; ``names``: those it may bind or delete, known
    before it runs; ``ref``: of its `CellResult`, from `RemoteCells.submit` on. ``state``: "prepared", "running", then "done", "failed" or
    "cancelled". ``began``: when it was submitted (monotonic seconds).
    """

    def __init__(self, cell: CellRun, options: CellOptions, prepared: Prepared) -> None:
        self.cell = cell
        self.options = options
        self.prepared = prepared
        self.name = cell.title
        task = prepared.task
        self.names: tuple[str, ...] = task.binds if task.out is None else task.out
        self.ref: ObjectRef[CellResult] | None = None
        self.state = "prepared"
        self.began = 0.0


class RemoteCells:
    """Runs cells of one notebook on the cluster."""

    def __init__(self, shell: Any, cockpit: Cockpit) -> None:
        self._ip = shell
        self.cockpit = cockpit
        self._runner: RemoteFunction[Any, Any] | None = None

    def run(self, cell: str, options: CellOptions) -> Any:
        """Run ``cell`` (as the notebook has it); its last value. Raises what it raises; BadUsageError for names that are none."""
        run = self.prepare(cell, options)
        try:
            result = self.wait(run)
            back = self._returned(result)
            run.state = "done"
            self.bind(run, back)
        finally:
            self.end(run)
        return back.value

    # -- before it runs

    def prepare(self, cell: str, options: CellOptions) -> Run:
        """Analyse a cell and pack what it reads; the cluster is there afterwards. Raises SyntaxError, SerializationError, NameError."""
        prepared = self._prepared(cell, options)
        self._connect(options)
        run = Run(self.cockpit.cell, options, prepared)
        for follower in self.cockpit.followers:
            follower.prepared(run)
        return run

    def _connect(self, options: CellOptions) -> None:
        if context.current() is None:
            card = lifetime.start(self.cockpit, lifetime.start_parser().parse_args([]))
            if not options.quiet:
                self.cockpit.say(
                    f"{card.text.splitlines()[0]} for this cell (%cluster status, %cluster stop)"
                )

    def _prepared(self, cell: str, options: CellOptions) -> Prepared:
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
                also=options.also,
                out=options.out,
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
        if prepared.blind and not options.also and not options.quiet:
            call, line = prepared.blind[0]
            self.cockpit.say(
                f"{call} in line {line} may read names that cannot be seen from here; send them with -i NAME"
            )
        return prepared

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

    def submit(self, run: Run) -> None:
        """Send it. Raises UnschedulableError and the like."""
        self.cockpit.router.own(run.cell.label, run.name)
        run.began = time.monotonic()
        run.ref = self._remote_function(run).remote(run.prepared.task)
        run.state = "running"
        for follower in self.cockpit.followers:
            follower.submitted(run)

    def _remote_function(self, run: Run) -> RemoteFunction[Any, Any]:
        if self._runner is None:
            from nbray.api.remote import RemoteFunction
            from nbray.notebook.runner import run_cell

            self._runner = RemoteFunction(run_cell, {})
        return self._runner.options(name=run.name, **run.options.task)

    # -- while it runs

    def wait(self, run: Run) -> CellResult:
        """Submit it if that has not been done, and block until it has ended. Raises what it raises.

        An interrupt, and the end of its time, cancel it with all that it has started.
        """
        from nbray.notebook.runner import CellError

        engine = context.require().engine
        try:
            if run.ref is None:
                self.submit(run)
            assert run.ref is not None
            with following.watching(self.cockpit.followers, run):
                result: CellResult = engine.get([run.ref], run.options.timeout, writable=True)[0]
        except KeyboardInterrupt as interrupt:
            self._cancel(run)
            failing.shown_as(
                interrupt, ["KeyboardInterrupt: the cell is cancelled, with the tasks that it started"]
            )
            raise
        except GetTimeoutError:
            self._cancel(run)
            raise failing.briefly(
                GetTimeoutError(
                    f"the cell was cancelled because it did not end within {run.options.timeout:g} s (--timeout)"
                )
            ) from None
        except TaskError as error:
            run.state = "failed"
            if isinstance(error.cause, CellError):
                self._fail(run, error, error.cause)
            raise failing.briefly(error) from None
        except NbrayError as error:
            run.state = "failed"
            raise failing.briefly(error) from None
        return result

    def _cancel(self, run: Run) -> None:
        run.state = "cancelled"
        if run.ref is not None:
            context.require().engine.cancel(run.ref, False, True)

    # -- after it has run

    def _fail(self, run: Run, error: TaskError, failure: CellError) -> NoReturn:
        """Raise what the cell raised, after binding what it had bound until then."""
        from nbray.notebook import render
        from nbray.notebook.cell import returned

        back = returned(failure.result, self._ip.user_ns)
        self.bind(run, back)
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

    def _returned(self, result: CellResult) -> Returned:
        from nbray.notebook.cell import returned

        try:
            return returned(result, self._ip.user_ns)
        except Exception as error:
            text = f"the cell ran, but what it bound cannot be read here: {type(error).__name__}: {error}"
            raise failing.briefly(SerializationError(text)) from error

    def bind(self, run: Run, back: Returned) -> None:
        """Put what came back into the notebook, and say what did not."""
        self._ip.push(back.values)
        for name in back.deleted:
            self._ip.user_ns.pop(name, None)
        for follower in self.cockpit.followers:
            follower.bound(run, back.values, back.deleted)
        if not run.options.quiet:
            for note in back.notes:
                self.cockpit.say(note)

    def end(self, run: Run) -> None:
        """The run is over; the notebook lets its result go."""
        if run.state in ("prepared", "running"):
            run.state = "failed"
        for follower in self.cockpit.followers:
            follower.ended(run)
        run.ref = None
