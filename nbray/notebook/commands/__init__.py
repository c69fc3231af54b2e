"""The subcommands of ``%cluster``, found by name; a module of this package holds those that belong together.

Each module has ``COMMANDS``: name -> `Command`. It is imported when one of them is asked for, so ``%load_ext nbray`` stays light.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbray.notebook.arguments import BadUsageError, Parser, did_you_mean

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit


@dataclass(frozen=True)
class Command:
    """``parser``: makes the command line's parser; ``run``: does it, for the notebook of that cockpit."""

    parser: Callable[[], Parser]
    run: Callable[[Cockpit, argparse.Namespace], None]


_MODULES: dict[str, tuple[str, ...]] = {
    "lifetime": ("start", "status", "stop", "list", "doctor"),
}
WHERE: dict[str, str] = {name: module for module, names in _MODULES.items() for name in names}
"""Subcommand -> module of this package."""


def find(name: str) -> Command:
    """The subcommand of that name. Raises BadUsageError naming the nearest."""
    if name not in WHERE:
        raise BadUsageError(f"%cluster has no subcommand {name!r}{did_you_mean(name, WHERE)}")
    commands: dict[str, Command] = importlib.import_module(f"{__name__}.{WHERE[name]}").COMMANDS
    return commands[name]


def bare(name: str, description: str) -> Callable[[], Parser]:
    """Parser of a subcommand without flags."""
    return lambda: Parser(f"%cluster {name}", description)
