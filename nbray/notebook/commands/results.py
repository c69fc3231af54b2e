"""``%cluster attach fetch keep``: what the cluster holds under the notebook's names."""

from __future__ import annotations

import argparse

from nbray.api import context
from nbray.errors import NbrayError
from nbray.notebook import arguments, attaching, cards
from nbray.notebook.arguments import BadUsageError, Parser, did_you_mean
from nbray.notebook.attaching import Attacher
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described, lifetime
from nbray.store import saved
from nbray.store.saved import Saved


def _attach_parser() -> Parser:
    parser = Parser("%cluster attach", described("attach"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="bind these only (default: all)")
    parser.kinds["names"] = "names"
    return parser


def _fetch_parser() -> Parser:
    parser = Parser("%cluster fetch", described("fetch"))
    parser.add_argument("names", nargs="+", metavar="NAME", help="names that the cluster holds")
    parser.kinds["names"] = "names"
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
    on_disk = {name.name for one in left.saved for name in one.header.names}
    if names:
        rows = [*left.kept, *left.running, *left.lost]
        for name in names:
            if name not in on_disk:
                attaching.find(rows, name)
        left = left.only(names)
        own: list[str] = []
    else:
        late = cockpit.late
        has = {name for name in left.names() if name in namespace or name in late}
        own = sorted(has & {*(row.name for row in left.kept), *on_disk})
        left = left.only(left.names() - has)
    came, failed = attacher.bind(left.kept)
    back, why = attacher.bind_saved(left.saved, on_disk & left.names())
    failed.update(why)
    failed.update(attacher.explain(left.lost))
    attacher.follow(left.running)
    left.actors = attacher.bind_actors(left.actors)
    running = {row.cell for row in left.running}
    for label, text in attacher.missed({row.cell for row in left.kept}, running):
        when = "so far" if label in running else "while no kernel was there"
        cockpit.say(f"{attaching.cell_title(label)} {when}:\n{text}")
    modules = {row.name for row in left.kept if row.size < 0}
    return attaching.told([*came, *back], [name for name in own if name not in modules], failed, left)


def _attach(cockpit: Cockpit, options: argparse.Namespace) -> None:
    cockpit.say(attach(cockpit, arguments.names(options.names) or None))


def _keep_parser() -> Parser:
    parser = Parser("%cluster keep", described("keep"))
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="names that the cluster holds (default: list what is on disk)",
    )
    parser.kinds["names"] = "names"
    parser.add_argument("--forget", action="store_true", help="remove these names from the disk instead")
    return parser


def keep(cockpit: Cockpit, names: list[str]) -> list[Saved]:
    """Write what the cluster holds under these names to disk; all that is on disk of this notebook's results.

    Raises ValueError for a name that the cluster does not hold, NbrayError for a value that cannot be written.
    """
    attacher = _attacher(cockpit)
    if names:
        rows = attacher.rows()
        for name in names:
            row = attaching.find(rows, name)
            if row.task:
                raise ValueError(
                    f"{name} is still being made by {attaching.cell_title(row.cell)}; keep it when it is there"
                )
        attacher.keep(names)
    return attacher.saved()


def forget(cockpit: Cockpit, names: list[str]) -> list[Saved]:
    """Remove files with these names from the disk; what is left there. Raises ValueError for a name that is not there."""
    attacher = _attacher(cockpit)
    there = attacher.saved()
    known = {name.name for one in there for name in one.header.names}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {name!r} on disk{did_you_mean(name, known)}")
    for one in there:
        if {name.name for name in one.header.names} & set(names):
            saved.remove(one.path)
    return attacher.saved()


def _keep(cockpit: Cockpit, options: argparse.Namespace) -> None:
    names = arguments.names(options.names) or []
    if options.forget and not names:
        raise BadUsageError("%cluster keep --forget: which names?")
    there = forget(cockpit, names) if options.forget else keep(cockpit, names)
    cockpit.show(cards.Card(attaching.disk_text(there, static=cockpit.static), ""))


def fetch(cockpit: Cockpit, names: list[str]) -> None:
    """Bind what the cluster holds under these names, waiting for what is still made.

    Raises ValueError for a name that it does not hold, and what making a value raised.
    """
    attacher = _attacher(cockpit)
    rows = attacher.rows()
    found = []
    cockpit.late.bring(*names)
    for name in names:
        if name in cockpit.names.held() and all(row.name != name or row.job == attacher.job for row in rows):
            continue  # It has just come, or was here.
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
    "keep": Command(_keep_parser, _keep),
}
