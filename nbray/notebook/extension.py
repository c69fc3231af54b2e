"""``%load_ext nbray``: registers the magics and looks after the cells' output. Loading and unloading may be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

_MAGICS = (("cell", "remote"), ("line", "remote"), ("line", "cluster"), ("line", "graph"))
_loaded: dict[int, Cockpit] = {}
_completing: dict[int, Callable[[], None]] = {}
"""What ends the completion of a loaded extension's magics."""


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython."""
    if id(shell) in _loaded:
        return
    from nbray.notebook import completion
    from nbray.notebook.cockpit import Cockpit
    from nbray.notebook.magics import NbrayMagics

    cockpit = Cockpit(shell)
    cockpit.load()
    shell.register_magics(NbrayMagics(shell, cockpit))
    _completing[id(shell)] = completion.register(cockpit)
    _loaded[id(shell)] = cockpit


def unload_ipython_extension(shell: Any) -> None:
    """Called by IPython; a cluster that runs goes on."""
    cockpit = _loaded.pop(id(shell), None)
    if cockpit is None:
        return
    cockpit.unload()
    _completing.pop(id(shell))()
    magics = shell.magics_manager.magics
    for kind, name in _MAGICS:
        magics[kind].pop(name, None)


def cockpit_of(shell: Any) -> Cockpit | None:
    """The loaded extension's memory of a notebook."""
    return _loaded.get(id(shell))
