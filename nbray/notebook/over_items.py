"""``%%remote --map x=files``: a cell that runs once per item, and ``%cluster retry``."""

from __future__ import annotations

import functools
import reprlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.api.options import UNIT
from nbray.errors import GetTimeoutError, NbrayError, SerializationError, TaskCancelledError, TaskError
from nbray.notebook import background, failing, fanout, following, outcome
from nbray.notebook.fanout import Failure, FanOut

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.api.remote import RemoteFunction
    from nbray.notebook.cell import Returned
    from nbray.notebook.cockpit import Cockpit
    from nbray.notebook.options import CellOptions
    from nbray.notebook.remote_cell import RemoteCells, Run

PER_CPU = 8
"""Items on their way for each CPU: enough to keep workers busy, few enough for the store."""


GATHER_SECONDS = 2.0
"""Seconds between two times that the session is told which items are on their way."""


class ItemsFailedError(NbrayError):
    """Some items of a cell failed. ``failures``: position of the item -> its exception. The others have run, and what they bound is there."""

    def __init__(self, text: str, failures: dict[int, BaseException] | None = None) -> None:
        super().__init__(text)
        self.failures = failures or {}


class OverItems:
    """A cell that ran, or runs, once per item."""

    def __init__(self, cells: RemoteCells, cell: str, options: CellOptions) -> None:
        assert options.over is not None
        self._cells = cells
        self._cockpit: Cockpit = cells.cockpit
        self._cell = cell
        self._options = options
        self.name, expression = options.over
        self.title = cells.cockpit.cell.title
        self.items = self._evaluate(expression) if options.items is None else list(options.items)
        self._placed = cells.placed(cell)
        self.names: tuple[str, ...] = ()
        self.lists: dict[str, list[Any]] = {}
        self._fan: FanOut[Returned] = FanOut(len(self.items), 1)
        self._refs: dict[int, ObjectRef[Any]] = {}
        self._shown: list[str] = []
        self._gathered = False
        self._gathered_at = 0.0

    def _evaluate(self, expression: str) -> list[Any]:
        shell, late = self._cockpit.shell, self._cockpit.late
        try:
            if len(late):
                from nbray.notebook.capture import analyse

                late.bring(*late.read_by(analyse(expression).reads))
            return list(eval(expression, shell.user_ns))
        except (SyntaxError, NameError, TypeError) as error:
            raise failing.briefly(
                type(error)(f"--map {self.name}={expression}: {error}")
                if not isinstance(error, SyntaxError)
                else SyntaxError(f"--map {self.name}={expression}: {error.msg}")
            ) from None

    @property
    def unfinished(self) -> int:
        """Items that have no value."""
        return self._fan.count - len(self._fan.values)

    def run(self) -> Any:
        """Run the cell for each item; the list of its last values. Raises ItemsFailedError at the end, when the lists are bound."""
        run = self._prepare()
        engine = context.require().engine
        cpus = engine.details()["resources"].get("CPU", 0) / UNIT
        self._fan = FanOut(len(self.items), max(16, int(PER_CPU * cpus)))
        self._shown = [_short(item) for item in self.items]
        return self._drive(run)

    def again(self) -> Any:
        """Run it for the items that have no value, as the notebook is now, and fill the lists."""
        run = self._prepare()
        self._fan.again()
        self._gathered = False
        return self._drive(run)

    def _prepare(self) -> Run:
        run = self._cells.prepare(self._cell, self._options, given=(self.name,), placed=self._placed)
        # Each item's run binds a part of a list, and that is no name of the session's.
        run.prepared.task.version = 0
        self.names = tuple(name for name in run.names if name != self.name)
        return run

    def _drive(self, run: Run) -> Any:
        from nbray.notebook.runner import run_item

        cockpit = self._cockpit
        engine = context.require().engine
        function = self._cells.remote_function(run, run_item)
        shared = engine.put(run.prepared.task)
        run.began, run.state = time.monotonic(), "running"
        deadline = None if self._options.timeout is None else run.began + self._options.timeout
        try:
            for follower in cockpit.followers:
                follower.submitted(run)
            with self._cells.streaming(run), following.watching(cockpit.followers, run):
                self._wait(run, function, shared, deadline)
            run.state = "done"
        except KeyboardInterrupt as interrupt:
            self._stop(run, interrupted=True)
            done = len(self._fan.values)
            text = f"KeyboardInterrupt: {done} of {self._fan.count} items are done"
            failing.shown_as(interrupt, [f"{text}; %cluster retry runs the others"])
            raise
        except GetTimeoutError:
            self._stop(run)
            raise failing.briefly(GetTimeoutError(background.out_of_time(run))) from None
        finally:
            value = self._bind(run)
            self._cells.end(run)
        if self._fan.failures:
            raise self._failure()
        self._let_go()
        return value

    def _let_go(self) -> None:
        """All items have values: what the notebook deletes from now on is not kept here."""
        self._fan = FanOut(0, 1)
        self._refs.clear()
        self.lists = {}
        self.items = []

    def _stop(self, run: Run, *, interrupted: bool = False) -> None:
        run.state = "cancelled"
        engine: Any = context.require().engine
        cancel = functools.partial(engine.cancel_cell, run.cell.label)
        if interrupted:
            self._cockpit.interrupts.unless_restart(cancel)
        else:
            cancel()
        self._fan.abandon()

    # -- the items

    def _wait(
        self, run: Run, function: RemoteFunction[Any, Any], shared: ObjectRef[Any], deadline: float | None
    ) -> None:
        fan = self._fan
        engine = context.require().engine
        waiting: list[ObjectRef[Any]] = []
        while fan.open:
            while (index := fan.take()) is not None:
                ref = self._submit(run, function, shared, index)
                if ref is not None:
                    self._refs[index] = ref
                    fan.began(ref, index)
                    waiting.append(ref)
            self._gather()
            if not waiting:
                continue
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, waiting = engine.wait(waiting, 1, left, True)
            if not ready:
                raise GetTimeoutError("the cell's time is over")
            more, waiting = engine.wait(waiting, len(waiting), 0, True) if waiting else ([], [])
            for ref in (*ready, *more):
                self._take(ref)

    def _submit(
        self, run: Run, function: RemoteFunction[Any, Any], shared: ObjectRef[Any], index: int
    ) -> ObjectRef[Any] | None:
        from nbray.notebook import transfer

        try:
            packed = transfer.pack(
                (),
                self._cockpit.shell.user_ns,
                carried=transfer.carried_types(),
                extra={self.name: self.items[index]},
            )
            if packed.left:
                raise SerializationError(f"the item cannot be sent: {next(iter(packed.left.values()))}")
        except NbrayError as error:
            self._fan.refused(index, Failure(f"{type(error).__name__}: {error}", "", error))
            return None
        inputs = [promise.ref for promise in run.inputs]
        ref: ObjectRef[Any] = function.remote(shared, packed.parcel, *inputs, *run.prepared.stored)
        return ref

    def _take(self, ref: ObjectRef[Any]) -> None:
        """An item has ended."""
        from nbray.notebook.runner import CellError

        engine = context.require().engine
        try:
            done = outcome.read(self._cockpit, engine.get([ref], None, writable=True)[0])
        except NbrayError as error:
            text, place, back = f"{type(error).__name__}: {error}", "", None
            cause = error.cause if isinstance(error, TaskError) else None
            if isinstance(cause, CellError):
                text = cause.report.lines[-1] if cause.report.lines else cause.report.kind
                place = self._place(cause)
                back = outcome.read(self._cockpit, cause.result)
            self._fan.failed(ref, Failure(text, place, outcome.failed(self._cockpit, error, back)))
        else:
            self._fan.done(ref, done)

    def _place(self, cause: Any) -> str:
        if not cause.report.frames:
            return ""
        frame = cause.report.frames[-1]
        named = self._cockpit.shell.compile.format_code_name(frame.filename)
        return f"{' '.join(named) if named else frame.filename}, line {frame.line}"

    def _gather(self) -> None:
        """The session holds the lists that the items will make, whatever becomes of this process: those submitted until some seconds ago."""
        complete = len(self._refs) == self._fan.count
        now = time.monotonic()
        if self._gathered or not (complete or now - self._gathered_at > GATHER_SECONDS):
            return
        self._gathered, self._gathered_at = complete, now
        self._cockpit.names.gather(self.names, [self._refs.get(index) for index in range(self._fan.count)])

    # -- the end

    def _bind(self, run: Run) -> Any:
        """Bind the lists, or fill those that are bound; the list of the last values."""
        fan = self._fan
        results: list[Any] = []
        for index in range(fan.count):
            failure = fan.failures.get(index)
            results.append(
                failure.error
                if failure is not None
                else TaskCancelledError(f"item {index} has not run to its end")
            )
        found = [fan.values.get(index) for index in range(fan.count)]
        # Also what only the execution has shown to be bound; what is first seen comes first.
        names = dict.fromkeys(self.names)
        for back in found:
            names.update(dict.fromkeys(back.values if back is not None else ()))
        names.pop(self.name, None)
        made = fanout.lists(names, results, [None if back is None else back.values for back in found])
        namespace = self._cockpit.shell.user_ns
        fresh: dict[str, list[Any]] = {}
        for name, values in made.items():
            known = self.lists.get(name)
            if known is not None and namespace.get(name) is known:
                known[:] = values
            elif known is None:
                fresh[name] = self.lists[name] = values
            elif not self._options.quiet:
                self._cockpit.say(f"{name} was bound anew since then, and is not filled")
        self._cockpit.shell.push(fresh)
        for follower in self._cockpit.followers:
            follower.bound(run, fresh, ())
        notes = dict.fromkeys(note for back in found if back is not None for note in back.notes)
        for note in notes if not self._options.quiet else ():
            self._cockpit.say(note)
        last = [result if back is None else back.value for result, back in zip(results, found, strict=True)]
        return last if any(back is not None and back.value is not None for back in found) else None

    def _failure(self) -> ItemsFailedError:
        fan = self._fan
        grouped = fanout.groups(fan.failures.items())
        title = f"{len(fan.failures)} of {fan.count} failed"
        lines = fanout.told(self.name, self._shown, grouped)
        error = ItemsFailedError(
            "\n".join([title, *lines]), {index: failure.error for index, failure in fan.failures.items()}
        )
        shown = getattr(grouped[0][0].error, "_render_traceback_", None)
        above = [*shown(), ""] if shown is not None else []
        kept = ", ".join(self.lists) or "nothing"
        end = f"The others are in {kept}, with the error in place of each that failed. %cluster retry runs those again."
        failing.shown_as(error, [*above, f"ItemsFailedError: {title}", *lines, end])
        return error


def _short(item: Any) -> str:
    try:
        return reprlib.repr(item)
    except Exception:  # noqa: BLE001  (a user's __repr__ may raise anything)
        return f"<{type(item).__name__}>"


def run(cells: RemoteCells, cell: str, options: CellOptions) -> Any:
    """Run ``cell`` once for each item of ``options.over``; the list of its last values."""
    __tracebackhide__ = True
    made = OverItems(cells, cell, options)
    cells.cockpit.over_items.append(made)
    del cells.cockpit.over_items[:-KEPT]
    return made.run()


KEPT = 5
"""Cells over items that ``%cluster retry`` knows."""


def find(known: Sequence[OverItems], title: str = "") -> OverItems:
    """The newest of a notebook's cells over items, or that of ``title``. Raises ValueError if there is none, or if all its items have values."""
    if not known:
        raise ValueError("no cell has run over items: %%remote --map x=files")
    found = [each for each in known if not title or each.title == title]
    if not found:
        raise ValueError(f"{title} has not run over items; {', '.join(each.title for each in known)} has")
    newest = found[-1]
    if not newest.unfinished:
        others = [each.title for each in known if each.unfinished]
        hint = f"; {', '.join(others)} has items without: %cluster retry {others[-1]}" if others else ""
        raise ValueError(f"nothing to run again: all items of {newest.title} have values{hint}")
    return newest
