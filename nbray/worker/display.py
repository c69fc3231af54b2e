"""What tasks show: displays, updates and ``clear_output``, from the built-in ``display``, from IPython's own in any module, and from matplotlib.

They leave a worker as an `Output` with the stream "display" whose text is JSON: ``kind`` (display_data, update_display_data or clear_output),
``data``, ``metadata``, ``transient`` (``display_id``), or ``wait``. IPython is not imported for that; where the user's code imports it, its display
machinery is made to end here, with its own formatters.
"""

from __future__ import annotations

import base64
import builtins
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.api import progress
from nbray.flow import Bucket
from nbray.messages import Output

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from nbray.worker.output import Channel

DISPLAY = "display"
DISPLAY_BYTES = (4 * 2**20, 16 * 2**20)
"""Rate per second and burst of what a worker displays; who displays more waits."""

DISPLAY_MESSAGES = (100, 300)

WIDGET = "application/vnd.jupyter.widget-view+json"
GENERATED = 32
"""Digits of the ids that IPython makes: they are unique, others are made so."""

_channel: Channel | None = None
_pace = (Bucket(*DISPLAY_BYTES), Bucket(*DISPLAY_MESSAGES))
_shown: dict[tuple[bytes, str], None] = {}
"""(task, display id) of what was displayed here under an id that the user chose."""


def install(channel: Channel) -> None:
    """Displays of this worker go out there."""
    global _channel
    _channel = channel
    # IPython has it in notebooks, so functions that are written there use it.
    builtins.display = display  # type: ignore[attr-defined]
    progress.make_bar = _bar
    known = sys.modules.get(_AfterImport.name)
    if known is not None:
        _adopt_ipython(known)
    else:
        sys.meta_path.insert(0, _AfterImport())


def _bar() -> progress.Bar:
    display_id = os.urandom(16).hex()

    def show(data: dict[str, str], update: bool) -> None:
        publish(data, transient={"display_id": display_id}, update=update)

    return progress.DisplayBar(show, seconds=0.3, plain=False)


# -- out


def publish(
    data: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    transient: Mapping[str, Any] | None = None,
    update: bool = False,
) -> None:
    """Show a bundle of representations, or replace what was shown under ``transient["display_id"]``."""
    shown = {kind: _jsonable(value) for kind, value in data.items() if value is not None}
    channel = _channel
    task = channel.task() if channel is not None else None
    if channel is None or task is None or channel.forked:
        sys.stdout.write(f"{shown.get('text/plain', '')}\n")
        return
    if shown.pop(WIDGET, None) is not None:
        # A widget lives in the kernel of its front end; here it would be a picture that nothing moves.
        text = str(shown.get("text/plain", "a widget")).partition("(")[0]
        shown = {
            "text/plain": f"({text}: widgets need the notebook's own process; show them in a cell without %%remote)"
        }
    known = dict(transient or {})
    display_id = str(known.get("display_id") or "")
    if display_id:
        known["display_id"] = display_id = _unique(task.task, display_id, update)
    kind = "update_display_data" if update else "display_data"
    text = json.dumps(
        {"kind": kind, "data": shown, "metadata": dict(metadata or {}), "transient": known}, default=str
    )
    if not (update and channel.waits(display_id)):
        _wait_for_room(len(text))
    message = Output(task.task, DISPLAY, text, task.name, 0, task.cell)
    channel.show(message, display_id, update=update, plain=str(shown.get("text/plain", "")))


def clear_output(wait: bool = False) -> None:
    """Clear the output of the cell, at once or (``wait``) when there is something new."""
    channel = _channel
    task = channel.task() if channel is not None else None
    if channel is not None and task is not None and not channel.forked:
        text = json.dumps({"kind": "clear_output", "wait": bool(wait)})
        channel.clear(Output(task.task, DISPLAY, text, task.name, 0, task.cell))


def _unique(task: bytes, display_id: str, update: bool) -> str:
    """The id of a display in the notebook: tasks that choose the same one do not meet.

    An id that this task has not displayed is somebody else's: of a handle that was passed here.
    """
    if len(display_id) == GENERATED and all(c in "0123456789abcdef" for c in display_id):
        return display_id
    if update and (task, display_id) not in _shown:
        return display_id
    if len(_shown) >= 10_000:
        _shown.clear()
    _shown[task, display_id] = None
    return f"{ids.short(task)}-{display_id}"


def _jsonable(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _wait_for_room(size: int) -> None:
    volume, number = _pace
    while True:
        now = time.monotonic()
        wait = max(volume.wait(now, size), number.wait(now, 1))
        if wait <= 0:
            volume.take(now, size)
            number.take(now, 1)
            return
        time.sleep(min(wait, 0.2))


# -- the built-in display


class DisplayHandle:
    """What ``display(..., display_id=...)`` returns: shows and updates one display."""

    def __init__(self, display_id: str) -> None:
        self.display_id = display_id

    def display(self, value: Any, **options: Any) -> None:
        """Show a value under this id once more."""
        display(value, display_id=self.display_id, **options)

    def update(self, value: Any, **options: Any) -> None:
        """Show a value instead of what is shown."""
        display(value, display_id=self.display_id, update=True, **options)

    def __repr__(self) -> str:
        return f"<DisplayHandle display_id={self.display_id}>"


def display(
    *values: Any,
    raw: bool = False,
    display_id: Any = None,
    metadata: Mapping[str, Any] | None = None,
    transient: Mapping[str, Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    clear: bool = False,
    update: bool = False,
    **options: Any,
) -> Any:
    """Show values in the cell, in order with what it prints: as IPython's ``display``, and by it where the user's code has imported it.

    ``raw``: the values are bundles of representations. ``display_id``: True, or a text: returns a handle whose ``update`` replaces what is shown.
    Raises TypeError for ``update`` without an id.
    """
    ipython = sys.modules.get("IPython.core.display_functions")
    if ipython is not None and _channel is not None:
        given = {"raw": raw, "display_id": display_id, "transient": transient, "include": include} | options
        return ipython.display(
            *values, metadata=metadata, exclude=exclude, clear=clear, update=update, **given
        )
    if clear:
        clear_output(wait=True)
    known = dict(transient or {})
    if display_id:
        known["display_id"] = os.urandom(16).hex() if display_id is True else str(display_id)
    if update and "display_id" not in known:
        raise TypeError("display(update=True) needs the display_id of what is to be replaced")
    if not values and display_id:
        values, raw = ({},), True
    for value in values:
        data, own = (dict(value), {}) if raw else bundle(value)
        if include:
            data = {kind: part for kind, part in data.items() if kind in include}
        if exclude:
            data = {kind: part for kind, part in data.items() if kind not in exclude}
        publish(data, {**own, **(metadata or {})}, transient=known, update=update)
    return DisplayHandle(known["display_id"]) if display_id else None


_METHODS = {
    "text/html": "_repr_html_",
    "text/markdown": "_repr_markdown_",
    "text/latex": "_repr_latex_",
    "image/svg+xml": "_repr_svg_",
    "image/png": "_repr_png_",
    "image/jpeg": "_repr_jpeg_",
    "application/json": "_repr_json_",
    "application/javascript": "_repr_javascript_",
}


def bundle(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The representations of a value that its class offers, as Jupyter's messages hold them (binary ones as base64 text), and their metadata."""
    found: dict[str, Any] = {}
    about: dict[str, Any] = {}
    offered = _call(value, "_repr_mimebundle_")
    if isinstance(offered, tuple):
        offered, described = offered
        about.update(described or {})
    if isinstance(offered, dict):
        found.update(offered)
    for kind, method in _METHODS.items():
        data = None if kind in found else _call(value, method)
        if isinstance(data, tuple):
            data, about[kind] = data
        if data is not None:
            found[kind] = data
    if type(value).__module__ == "matplotlib.figure" and hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", bbox_inches="tight")
        found["image/png"] = picture.getvalue()
    found.setdefault("text/plain", repr(value))
    return {kind: _jsonable(data) for kind, data in found.items() if data is not None}, about


def _call(value: Any, method: str) -> Any:
    # A class has the methods of its instances; they are not about the class.
    if isinstance(value, type) or not callable(function := getattr(value, method, None)):
        return None
    try:
        return function()
    except Exception:  # noqa: BLE001  (as IPython: a representation that fails is left out)
        return None


# -- IPython's own


class _AfterImport:
    """A finder that waits for the module with IPython's shell."""

    name = "IPython.core.interactiveshell"

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _adopt_ipython(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _adopt_ipython(module: Any) -> None:
    """Give IPython a shell whose displays are the task's. It has no history, magics or input."""
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.events import EventManager, available_events
    from IPython.core.formatters import DisplayFormatter
    from traitlets.config import Configurable

    class Publisher(DisplayPublisher):
        """Where IPython's displays end."""

        def publish(
            self,
            data: Mapping[str, Any],
            metadata: Mapping[str, Any] | None = None,
            source: Any = None,
            *,
            transient: Mapping[str, Any] | None = None,
            update: bool = False,
            **kwargs: Any,
        ) -> None:
            publish(data, metadata, transient=transient, update=update)

        def clear_output(self, wait: bool = False) -> None:
            clear_output(wait)

    class WorkerShell(module.InteractiveShell):  # type: ignore[misc]
        """What ``IPython.get_ipython()`` returns in a task."""

        def __init__(self) -> None:
            Configurable.__init__(self)
            self.configurables: list[Any] = []
            self.user_ns: dict[str, Any] = {}
            self.events = EventManager(self, available_events)
            self.display_formatter = DisplayFormatter(parent=self)
            self.display_pub = Publisher(parent=self)  # type: ignore[no-untyped-call]

        def showtraceback(self, *_args: Any, **_options: Any) -> None:
            import traceback

            traceback.print_exc()

        def run_line_magic(self, magic_name: str, line: str, _stack_depth: int = 1) -> Any:
            return _remote_shell().run_line_magic(magic_name, line)

        def run_cell_magic(self, magic_name: str, line: str, cell: str) -> Any:
            return _remote_shell().run_cell_magic(magic_name, line, cell)

        def system(self, command: str) -> None:
            _remote_shell().system(command)

        def getoutput(self, command: str, split: bool = True, depth: int = 0) -> Any:
            return _remote_shell().getoutput(command, split, depth)

    module.InteractiveShell._instance = WorkerShell()


def _remote_shell() -> Any:
    """What a cell's own ``get_ipython()`` returns."""
    get = getattr(builtins, "get_ipython", None)
    if get is None:
        raise RuntimeError(
            "magics and shell commands of IPython work in a cell, not in a task that runs elsewhere"
        )
    return get()


# -- matplotlib


def flush_figures() -> None:
    """Show the figures that are open, and close them: what a notebook does at the end of a cell."""
    if "matplotlib.pyplot" not in sys.modules:
        return
    helpers: Any = sys.modules["matplotlib._pylab_helpers"]
    if not helpers.Gcf.figs:
        return
    inline: Any = sys.modules.get("matplotlib_inline.backend_inline")
    if inline is not None:
        inline.flush_figures()
        return
    pyplot: Any = sys.modules["matplotlib.pyplot"]
    try:
        for manager in helpers.Gcf.get_all_fig_managers():
            display(manager.canvas.figure)
    finally:
        pyplot.close("all")
