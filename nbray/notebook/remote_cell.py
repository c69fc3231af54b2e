"""``%%remote``: a cell prepared, submitted, waited for, and its names bound. One `RemoteCells` per notebook, one `Run` per run of a cell."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.errors import GetTimeoutError, NbrayError, TaskError
from nbray.notebook import background, failing, following, outcome
from nbray.notebook.cockpit import CellRun, Cockpit
from nbray.notebook.commands import lifetime
from nbray.notebook.options import CellOptions
from nbray.notebook.transforming import filename_of, plain_python

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.api.remote import RemoteFunction
    from nbray.notebook.cell import Prepared
    from nbray.notebook.late import Promise
    from nbray.notebook.runner import CellResult

FUTURE_FLAGS = 0xFFF0000
"""Compiler flags of ``from __future__`` statements of earlier cells; IPython keeps others beside them."""


class Run:
    """One run of a cell on the cluster.

    ``cell``: the notebook's cell it belongs to; ``name``: its task's; ``prepared``: what is sent; ``names``: those it may bind or delete, known
    before it runs; ``ref``: of its `CellResult`, from `RemoteCells.submit` on. ``state``: "prepared", "running", then "done", "failed" or
    "cancelled". ``began``: when it was submitted (monotonic seconds). ``inputs``: the cells in the background that it
    depends on; ``left``: whether it is in the background itself.
    """

    origin = b""
    """Of a run that an earlier kernel has submitted: what that has told the cluster about it."""

    def __init__(self, cell: CellRun, options: CellOptions, prepared: Prepared) -> None:
        self.cell = cell
        self.options = options
        self.prepared = prepared
        self.name = options.name or cell.title
        task = prepared.task
        self.names: tuple[str, ...] = task.binds if task.out is None else task.out
        self.ref: ObjectRef[CellResult] | None = None
        self.state = "prepared"
        self.began = 0.0
        self.inputs: list[Promise] = []
        self.left = False
        self.timed_out = False
        self.alarm: threading.Timer | None = None


class RemoteCells:
    """Runs cells of one notebook on the cluster."""

    def __init__(self, shell: Any, cockpit: Cockpit) -> None:
        self._ip = shell
        self.cockpit = cockpit
        cockpit.cells = self
        self._remote: dict[Callable[..., Any], RemoteFunction[Any, Any]] = {}

    def run(self, cell: str, options: CellOptions) -> Any:
        """Run ``cell`` (as the notebook has it); its last value. Raises what it raises; BadUsageError for names that are none."""
        __tracebackhide__ = True
        if options.dry_run:
            self._show_plan(cell, options)
            return None
        if options.local:
            return self._run_here(cell)
        if options.over is not None:
            from nbray.notebook import over_items

            return over_items.run(self, cell, options)
        run = self.prepare(cell, options)
        try:
            if options.background:
                self.submit(run)
                background.leave(self.cockpit, run)
                return None
            result = self.wait(run)
            if result is None:
                return None
            back = outcome.read(self.cockpit, result)
            run.state = "done"
            outcome.bind(self.cockpit, run, back)
        finally:
            if not run.left:
                self.end(run)
        return back.value

    def _run_here(self, cell: str) -> Any:
        """Run it as a plain cell; its last value."""
        from nbray.notebook.capture import is_silenced
        from nbray.notebook.local import run

        __tracebackhide__ = True
        source, filename = self.placed(cell)
        shell = self._ip
        names = self.cockpit.late
        if len(names):
            from nbray.notebook.capture import analyse

            names.bring(*names.read_by(analyse(source).reads))
        value = run(source, filename, shell.user_ns, shell.compile.flags & FUTURE_FLAGS)
        return None if is_silenced(cell) else value

    # -- before it runs

    def prepare(
        self,
        cell: str,
        options: CellOptions,
        given: Sequence[str] = (),
        placed: tuple[str, str] | None = None,
    ) -> Run:
        """Analyse a cell and pack what it reads, but for names that are ``given`` to it otherwise; the cluster is there afterwards.

        ``placed``: what `placed` has said of it. Raises SyntaxError, SerializationError, NameError.
        """
        prepared, inputs = self._prepared(cell, options, given, placed)
        self._connect(options)
        try:
            prepared.settle()
        except NbrayError as error:
            raise failing.briefly(error) from None
        run = Run(self.cockpit.cell, options, prepared)
        run.inputs = inputs
        for follower in self.cockpit.followers:
            follower.prepared(run)
        return run

    def _show_plan(self, cell: str, options: CellOptions) -> None:
        from nbray.notebook.plans import plan

        given = () if options.over is None else options.over[:1]
        prepared, inputs = self._prepared(cell, options, given)
        late = [name for promise in inputs for name in promise.names]
        made = plan(prepared.names, prepared.packed, self._ip.user_ns, options.also, options.out, late)
        self.cockpit.show(made.card())

    def _connect(self, options: CellOptions) -> None:
        if context.current() is None:
            card = lifetime.start(self.cockpit, lifetime.start_parser().parse_args([]))
            if not options.quiet:
                first, *_, last = card.text.splitlines()
                self.cockpit.say(f"{first} for this cell (%cluster status, %cluster stop)")
                if last.endswith("%cluster attach"):
                    self.cockpit.say(last)

    def _prepared(
        self,
        cell: str,
        options: CellOptions,
        given: Sequence[str] = (),
        placed: tuple[str, str] | None = None,
    ) -> tuple[Prepared, list[Promise]]:
        from nbray.notebook import transfer
        from nbray.notebook.capture import is_silenced
        from nbray.notebook.cell import prepare

        shell = self._ip
        source, filename = placed or self.placed(cell)
        try:
            inputs, also = self._late_inputs(source, options, given)
            prepared = prepare(
                source,
                filename,
                shell.user_ns,
                also=also,
                out=options.out,
                hidden=shell.user_ns_hidden,
                flags=shell.compile.flags & FUTURE_FLAGS,
                display=not is_silenced(cell),
                carried=transfer.carried_types(),
                apart=True,
                strict=not options.dry_run,
                given=given,
            )
        except SyntaxError as error:
            failing.shown_as(error, shell.SyntaxTB.structured_traceback(type(error), error, []))
            raise
        except (NbrayError, NameError) as error:
            raise failing.briefly(error) from None
        if prepared.blind and not (options.also or options.quiet or options.dry_run):
            call, line = prepared.blind[0]
            self.cockpit.say(
                f"{call} in line {line} may read names that cannot be seen from here; send them with -i NAME"
            )
        prepared.task.late = tuple(tuple(promise.names) for promise in inputs)
        prepared.task.shows = options.background
        return prepared, inputs

    def _late_inputs(
        self, source: str, options: CellOptions, given: Sequence[str]
    ) -> tuple[list[Promise], list[str]]:
        """The cells in the background that make what this one reads, and the names to send that its analysis does not see."""
        late = self.cockpit.late
        if not len(late):
            return [], list(options.also)
        from nbray.notebook.capture import analyse

        reads = [name for name in analyse(source).reads if name not in given]
        inputs = late.inputs(late.read_by([*options.also, *reads]))
        also = dict.fromkeys(name for name in options.also if name not in late)
        for promise in inputs:
            # Functions that it makes will look for these names here.
            also.update(dict.fromkeys(name for name in promise.read_later() if name in self._ip.user_ns))
        return inputs, list(also)

    def placed(self, cell: str) -> tuple[str, str]:
        """The cell as plain Python, with as many empty lines before it as there are in the notebook, and its file's name."""
        number = self.cockpit.cell.number
        whole = self.cockpit.cell.source
        at = whole.rfind(cell.rstrip("\n")) if cell.strip() else -1
        above = whole[:at] if at >= 0 else ""
        body = plain_python(self._ip, cell)
        # IPython takes empty lines away from the start.
        text = cell.lstrip()
        above += (
            cell[: len(cell) - len(text)].rpartition("\n")[0] + "\n"
            if "\n" in cell[: len(cell) - len(text)]
            else ""
        )
        # Tracebacks and debuggers look the lines up under this name; IPython has put only its own call of the magic there.
        filename = filename_of(self._ip, above + body, number, whole if at >= 0 else cell, running=at >= 0)
        return "\n" * above.count("\n") + body, filename

    def submit(self, run: Run) -> None:
        """Send it. Raises UnschedulableError and the like."""
        from nbray.notebook.runner import run_cell

        self.cockpit.router.own(run.cell.label, run.name)
        run.began = time.monotonic()
        run.ref = self.remote_function(run, run_cell).remote(
            run.prepared.task, *[promise.ref for promise in run.inputs], *run.prepared.stored
        )
        run.state = "running"
        for follower in self.cockpit.followers:
            follower.submitted(run)

    def remote_function(self, run: Run, function: Callable[..., Any]) -> RemoteFunction[Any, Any]:
        """A function of `nbray.notebook.runner`, with the options of a run."""
        if function not in self._remote:
            from nbray.api.remote import RemoteFunction

            self._remote[function] = RemoteFunction(function, {})
        return self._remote[function].options(name=run.name, **run.options.task)

    # -- while it runs

    def wait(self, run: Run) -> CellResult | None:
        """Submit it if that has not been done, and block until it has ended. Raises what it raises.

        An interrupt, and the end of its time, cancel it with all that it has started; or the interrupt only ends the waiting (None).
        """
        engine = context.require().engine
        try:
            if run.ref is None:
                self.submit(run)
            assert run.ref is not None
            with self.streaming(run), following.watching(self.cockpit.followers, run):
                result: CellResult = engine.get([run.ref], run.options.timeout, writable=True)[0]
        except KeyboardInterrupt as interrupt:
            if run.options.on_interrupt == "detach" and run.ref is not None:
                background.leave(self.cockpit, run)
                return None
            if run.ref is not None:
                ref = run.ref
                self.cockpit.interrupts.unless_restart(lambda: engine.cancel(ref, False, True))
            run.state = "cancelled"
            failing.shown_as(
                interrupt, ["KeyboardInterrupt: the cell is cancelled, with the tasks that it started"]
            )
            raise
        except GetTimeoutError:
            self._cancel(run)
            raise failing.briefly(GetTimeoutError(background.out_of_time(run))) from None
        except NbrayError as error:
            run.state = "failed"
            raise self._failed(run, error) from None
        return result

    @contextlib.contextmanager
    def streaming(self, run: Run) -> Iterator[None]:
        """Unless its output is wanted as it comes, hold it back until the end."""
        if run.options.stream:
            yield
            return
        router = self.cockpit.router
        router.hold(run.cell.label)
        try:
            yield
        finally:
            router.release(run.cell.label)

    def _cancel(self, run: Run) -> None:
        run.state = "cancelled"
        if run.ref is not None:
            context.require().engine.cancel(run.ref, False, True)

    # -- after it has run

    def _failed(self, run: Run, error: NbrayError) -> Exception:
        """What to raise for the error of a task, after binding what the cell had bound until then."""
        from nbray.notebook.runner import CellError

        cause = error.cause if isinstance(error, TaskError) else None
        back, title = None, ""
        if isinstance(cause, CellError):
            back = outcome.read(self.cockpit, cause.result)
            if cause.cell in ("", run.cell.label):
                outcome.bind(self.cockpit, run, back)
            else:
                title = f"This cell needs what {cause.cell.split()[0]} makes, and that failed:"
        return outcome.failed(self.cockpit, error, back, title)

    def end(self, run: Run) -> None:
        """The run is over; the notebook lets its result go."""
        if run.state in ("prepared", "running"):
            run.state = "failed"
        for follower in self.cockpit.followers:
            follower.ended(run)
        run.ref = None
