"""What the extension remembers of one notebook: the cell that runs now, and where output of earlier ones belongs."""

from __future__ import annotations

import functools
import hashlib
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbray import config
from nbray.api import context, functions, progress, session, world
from nbray.errors import NbrayError
from nbray.notebook import failing, lifecycle, reprs, stored
from nbray.notebook.cards import Card
from nbray.notebook.following import Follower
from nbray.notebook.graphs import Graphs
from nbray.notebook.interrupting import Interrupts
from nbray.notebook.late import LateNames
from nbray.notebook.lineage import Trace
from nbray.notebook.names import HeldNames
from nbray.notebook.output import Router
from nbray.notebook.status import Status

if TYPE_CHECKING:
    from nbray.notebook.over_items import OverItems
    from nbray.notebook.remote_cell import RemoteCells


@dataclass(frozen=True)
class CellRun:
    """One execution of a cell. ``number`` is what ``In[n]`` shows; the identity of the cell is its id and its source, of the run ``run``."""

    number: int
    cell_id: str
    digest: str
    run: str
    source: str

    @property
    def label(self) -> str:
        """The opaque name under which the cluster knows it."""
        return f"In[{self.number}] {self.cell_id or '-'} {self.digest} {self.run}"

    @property
    def title(self) -> str:
        """What people call it."""
        return f"In[{self.number}]"


class Cockpit:
    """One notebook's side of the cluster. Made when the extension is loaded."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.static = config.settings().static
        self.router = Router(shell, plain=self.static, headless=not lifecycle.may_come_back(shell))
        self.trace = Trace(shell, self.say, config.settings().stale_hints)
        self.names = HeldNames(shell.user_ns, self.trace)
        self.status = Status(self)
        self.followers: list[Follower] = [self.trace, self.names, self.status]
        self.interrupts = Interrupts(shell, self._say_in)
        self.late = LateNames(self)
        self.graphs = Graphs(self)
        self.cells: RemoteCells | None = None
        self.over_items: list[OverItems] = []
        """The last cells that ran once per item."""
        self.names.late = self.late
        self._kernel = secrets.token_hex(4)
        self.told_changed: set[str] = set()
        """Names of which was said that a cell has changed them on the cluster only."""
        self._runs = 0
        self._attached: context.Runtime | None = None
        self.cell = self._begin("", "", 0)

    def load(self) -> None:
        """Listen to the shell's cells and to clusters that this process joins."""
        self.graphs.load()
        self.shell.events.register("pre_run_cell", self.before_cell)
        self.shell.events.register("post_run_cell", self.after_cell)
        self.late.load()
        self.interrupts.load()
        self.trace.load()
        world.note_modules()
        if self.static:
            reprs.without_ids(self.shell)
        self._showtraceback = self.shell.showtraceback
        self.shell.showtraceback = self._show_error
        progress.make_bar = self.status.bar
        session.name_session(functools.partial(lifecycle.session_name, self.shell))
        context.on_install.append(self.attach)
        runtime = context.current()
        if runtime is not None:
            self.attach(runtime)

    def unload(self) -> None:
        """The opposite of `load`."""
        self.shell.events.unregister("pre_run_cell", self.before_cell)
        self.shell.events.unregister("post_run_cell", self.after_cell)
        self.late.unload()
        self.interrupts.unload()
        self.graphs.unload()
        self.trace.unload()
        self.status.close()
        progress.make_bar = None
        if self.shell.__dict__.get("showtraceback") == self._show_error:
            del self.shell.showtraceback
        context.on_install.remove(self.attach)
        session.name_session(None)
        runtime = context.current()
        if runtime is not None and runtime is self._attached:
            engine: Any = runtime.engine
            if engine.on_output is not None:
                engine.on_output = session.print_output
            session.decide_exit(lambda: None)
        self._attached = None

    def before_cell(self, info: Any) -> None:
        """A cell begins: what it submits is its own, and functions are looked at anew for changes."""
        self.interrupts.begin()
        self.cell = self._begin(info.raw_cell or "", getattr(info, "cell_id", None) or "", self._number(info))
        runtime = context.current()
        if runtime is not None and runtime is self._attached:
            runtime.epoch += 1
            engine: Any = runtime.engine
            engine.set_origin(self.cell.label)
        self.trace.began()
        self.status.begin(self.cell)
        self.late.look()

    def after_cell(self, result: Any) -> None:
        """A cell has ended. If by an interrupt, what it started is cancelled; its modules are noted as they are, before anybody edits them;
        what functions captured and it has rebound is let go.
        """
        self.interrupts.end(self.cell.label, result)
        self.router.flush(self.cell.label)
        self.status.end(failed=not result.success)
        self.router.flush(
            self.cell.label, ended=True, late=self.router.headless and self.status.goes_on(self.cell.label)
        )
        self.late.look()
        world.note_modules()
        functions.release_stale()
        stored.sweep()
        self.names.look()
        self.trace.ended_cell(self.cell, not result.success)

    def _number(self, info: Any) -> int:
        """What ``In[n]`` will show. Newer versions of IPython have counted up when the cell begins; the history is written later in all."""
        history = getattr(self.shell, "history_manager", None)
        if info.store_history and history is not None:
            return len(history.input_hist_raw)
        return int(self.shell.execution_count)

    def _begin(self, source: str, cell_id: str, number: int) -> CellRun:
        self._runs += 1
        digest = hashlib.blake2b(source.encode(errors="replace"), digest_size=6).hexdigest()
        cell = CellRun(number, cell_id, digest, f"{self._kernel}-{self._runs}", source)
        self.router.remember(cell.label)
        return cell

    def attach(self, runtime: context.Runtime) -> None:
        """This process has joined a cluster: its output comes here, its tasks belong to the cell that runs."""
        engine: Any = runtime.engine
        if engine.on_output is not None:  # else nbray.init(log_to_driver=False)
            engine.on_output = self._on_output
        engine.set_origin(self.cell.label)
        self.names.connected(engine)
        self.status.connected()
        session.decide_exit(functools.partial(lifecycle.stop_at_exit, self.shell))
        if not lifecycle.may_come_back(self.shell):
            # nbval and others end their kernels by SIGKILL.
            engine.set_transient(True)
        self._attached = runtime

    def is_own(self, label: str) -> bool:
        """Whether a cell's label is of this run of the kernel."""
        return label.rpartition(" ")[2].partition("-")[0] == self._kernel

    def say(self, text: str, cell: CellRun | None = None) -> None:
        """One line of nbray's own, in the cell that runs or in another one."""
        self.router.display((cell or self.cell).label, {"text/plain": f"nbray: {text}"})

    def _say_in(self, text: str, label: str) -> None:
        self.router.display(label, {"text/plain": f"nbray: {text}"})

    def show_value(self, cell: CellRun, value: Any) -> None:
        """The last value of a cell, in it."""
        data, metadata = self.shell.display_formatter.format(value)
        self.router.display(cell.label, data, metadata)

    def show(self, card: Card) -> None:
        """A card, in the cell that runs."""
        self.router.display(self.cell.label, card.bundle(static=self.static))

    def _show_error(self, exc_tuple: Any = None, *args: Any, **options: Any) -> None:
        """IPython asks errors how they want to be shown, except these two kinds."""
        error = exc_tuple[1] if exc_tuple else sys.exc_info()[1]
        render = getattr(error, "_render_traceback_", None)
        if render is None and isinstance(error, NbrayError):
            kind, error, _ = self.shell._get_exc_info(exc_tuple)
            named = failing.shown_class(error)
            self.shell._showtraceback(
                named, failing.shown_value(error), failing.rendered(self.shell, error, static=self.static)
            )
        elif render is None and isinstance(error, KeyboardInterrupt) and failing.met_in_nbray(error):
            kind, error, _ = self.shell._get_exc_info(exc_tuple)
            self.shell._showtraceback(kind, error, failing.rendered(self.shell, error, static=self.static))
        elif render is not None and isinstance(error, SyntaxError | BaseExceptionGroup):
            kind, error, _ = self.shell._get_exc_info(exc_tuple)
            self.shell._showtraceback(kind, error, render())
        else:
            self._showtraceback(exc_tuple, *args, **options)
        if error is not None:
            failing.open_to_debugger(self.shell, error)

    def _on_output(self, message: Any) -> None:
        self.router.receive(message)
