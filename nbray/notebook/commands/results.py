"""``%cluster attach fetch``: what the cluster holds under the notebook's names."""

from __future__ import annotations

import argparse

from nbray.api import context
from nbray.errors import NbrayError
from nbray.notebook import arguments, attaching
from nbray.notebook.arguments import BadUsageError, Parser
from nbray.notebook.attaching import Attacher
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described, lifetime


def _attach_parser() -> Parser:
    parser = Parser("%cluster attach", described("attach"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="bind these only (default: all)")
    return parser


def _fetch_parser() -> Parser:
    parser = Parser("%cluster fetch", described("fetch"))
    parser.add_argument("names", nargs="+", metavar="NAME", help="names that the cluster holds")
    return parser


def _attacher(cockpit: Cockpit) -> Attacher:
    if context.current() is None:
        lifetime.start(cockpit, lifetime.start_parser().parse_args([]))
    return Attacher(cockpit)


def attach(cockpit: Cockpit, names: list[str] | None = None) -> str:
    """Bind what earlier runs of the kernel have left (or of it only ``names``, also where the notebook has its own); what to say about it."""
    attacher = _attacher(cockpit)
    left = attacher.left()
    namespace = cockpit.shell.user_ns
    rows = left.kept
    own: list[str] = []
    if names:
        rows = [attaching.find([*left.kept, *left.running, *left.lost], name) for name in names]
        left.running = [row for row in left.running if row.name in names]
        left.lost = [row for row in left.lost if row.name in names]
        rows = [row for row in rows if row.state in attaching.READY]
    else:
        own = [row.name for row in rows if row.name in namespace]
        rows = [row for row in rows if row.name not in namespace]
    came, failed = attacher.bind(rows)
    _, why = attacher.bind(left.lost)
    return attaching.told(came, own, {**failed, **why}, left)


def _attach(cockpit: Cockpit, options: argparse.Namespace) -> None:
    cockpit.say(attach(cockpit, arguments.names(options.names) or None))


def fetch(cockpit: Cockpit, names: list[str]) -> None:
    """Bind what the cluster holds under these names, waiting for what is still made.

    Raises ValueError for a name that it does not hold, and what making a value raised.
    """
    attacher = _attacher(cockpit)
    rows = attacher.rows()
    found = []
    for name in names:
        why = cockpit.names.left_behind.get(name)
        if why is not None and all(row.name != name for row in rows):
            raise NbrayError(
                f"{name} was not kept: {why}. Change the cell so that it binds something that can be sent "
                "(the data instead of the object that reads it), or use it in the cell that makes it."
            )
        found.append(attaching.find(rows, name))
    _, failed = attacher.bind(found)
    for name, why in failed.items():
        raise NbrayError(f"{name} cannot be brought here: {why}")


def _fetch(cockpit: Cockpit, options: argparse.Namespace) -> None:
    names = arguments.names(options.names) or []
    if not names:
        raise BadUsageError("%cluster fetch: which names?")
    fetch(cockpit, names)


COMMANDS = {
    "attach": Command(_attach_parser, _attach),
    "fetch": Command(_fetch_parser, _fetch),
}
