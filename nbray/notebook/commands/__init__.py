"""The subcommands of ``%cluster``, found by name; a module of this package holds those that belong together.

Each module has ``COMMANDS``: name -> `Command`. It is imported when one of them is asked for, so ``%load_ext nbray`` stays light.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbray.notebook.arguments import BadUsageError, Parser, did_you_mean

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit


@dataclass(frozen=True)
class Command:
    """``parser``: makes the command line's parser; ``run``: does it, for the notebook of that cockpit, and returns the value of the line, if any."""

    parser: Callable[[], Parser]
    run: Callable[[Cockpit, argparse.Namespace], Any]


_MODULES: dict[str, dict[str, str]] = {
    "lifetime": {
        "start": "start a cluster on this machine, or join the one that runs",
        "stop": "stop the cluster",
        "status": "what the cluster does, and where its files are",
        "list": "the clusters of this user on this machine",
        "doctor": "one block of text about this installation, to paste into a bug report",
    },
    "tables": {
        "tasks": "what has run, runs and waits, as a frame",
        "actors": "the actors, as a frame",
        "objects": "the values on the cluster and who holds them, as a frame",
        "where": "the line that each running task is at",
    },
    "control": {
        "why": "why a task waits or was slow, why a value is still in memory, or is not there",
        "cancel": "stop tasks, with what they have started",
        "free": "release values, whoever holds them",
    },
    "again": {
        "retry": "run the items of %%remote --map that failed again, and fill the lists",
    },
    "logs": {
        "logs": "the whole of what a cell or a task has printed",
    },
    "results": {
        "attach": "bind what an earlier run of this notebook's kernel has left on the cluster",
        "fetch": "bring back what the cluster holds under a name",
        "keep": "write results to disk, from where they come back after a reboot; without names: what is there",
    },
}
"""Module of this package -> its subcommands, each with what it does."""
WHERE: dict[str, str] = {name: module for module, names in _MODULES.items() for name in names}
"""Subcommand -> module of this package."""
SUMMARIES: dict[str, str] = {name: what for names in _MODULES.values() for name, what in names.items()}
"""Subcommand -> what it does, in the order in which ``%cluster help`` shows them."""

HELP_WORDS = ("help", "-h", "--help")


def find(name: str) -> Command:
    """The subcommand of that name. Raises BadUsageError naming the nearest."""
    if name not in WHERE:
        raise BadUsageError(f"%cluster has no subcommand {name!r}{did_you_mean(name, WHERE)}")
    commands: dict[str, Command] = importlib.import_module(f"{__name__}.{WHERE[name]}").COMMANDS
    return commands[name]


def overview() -> str:
    """What ``%cluster help`` and ``%cluster?`` show."""
    width = max(map(len, SUMMARIES))
    return "\n".join(
        [
            "%cluster SUBCOMMAND [FLAGS]",
            "",
            *(f"  {name:<{width}}  {what}" for name, what in SUMMARIES.items()),
            "",
            "%cluster SUBCOMMAND --help shows the flags of one; %%remote? is about cells that run on the cluster.",
        ]
    )


def help_text(words: list[str]) -> str | None:
    """Help if a command line asks for it (``help``, ``help start``, ``start --help``), else None. Raises BadUsageError for an unknown subcommand."""
    name, *rest = words or [""]
    if name in HELP_WORDS:
        return find(rest[0]).parser().format_help() if rest else overview()
    if any(word in ("-h", "--help") for word in rest):
        return find(name).parser().format_help()
    return None


def bare(name: str) -> Callable[[], Parser]:
    """Parser of a subcommand without flags."""
    return lambda: Parser(f"%cluster {name}", described(name))


def described(name: str) -> str:
    """What a subcommand does, as a sentence."""
    what = SUMMARIES[name]
    return f"{what[:1].upper()}{what[1:]}."
