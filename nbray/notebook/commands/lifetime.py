"""``%cluster start stop status list doctor``: whether there is a cluster, and what it is."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from nbray.api import context
from nbray.notebook import arguments, attaching, cards, facts, lifecycle
from nbray.notebook.arguments import Parser
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, bare, described


def add_size_flags(parser: Parser) -> None:
    """The flags that say how large a new cluster is; ``nbray start`` has the same."""
    add = parser.add_argument
    add("--cpus", type=arguments.amount, metavar="N", help="CPUs (all that this process may use)")
    add("--gpus", type=arguments.amount, metavar="N", help="GPUs")
    add(
        "--store-memory",
        type=arguments.size,
        metavar="SIZE",
        help="size of the object store, for instance 2GB (30 %% of the memory)",
    )
    add("--name", metavar="NAME", help="name of the cluster (default)")
    add(
        "--seed",
        type=arguments.whole,
        metavar="N",
        help="repeat a run: random generators in tasks are seeded from this",
    )


def start_parser() -> Parser:
    """The command line of ``%cluster start``."""
    parser = Parser("%cluster start", described("start"))
    add_size_flags(parser)
    add = parser.add_argument
    add("--session", metavar="NAME", help="name of this notebook, where the front end does not tell it")
    add("--keep", action="store_true", help="keep the cluster when the notebook ends")
    add("--no-stale-hints", action="store_true", help="do not tell which results are stale")
    return parser


def _stop_parser() -> Parser:
    parser = Parser("%cluster stop", described("stop"))
    parser.add_argument("--force", action="store_true", help="even if other notebooks use it")
    return parser


def start(cockpit: Cockpit, options: argparse.Namespace) -> cards.Card:
    """Start a cluster, or join the one that runs; the card that tells about it. Raises what `nbray.init` raises."""
    connected = context.current()
    if options.no_stale_hints:
        cockpit.trace.hints = False
    if connected is not None:
        here = facts.of_runtime(connected)
        notes = facts.differences(here, options)
        return cards.start_card(
            here, notes or ["(%cluster start again changes nothing)"], static=cockpit.static
        )
    found = facts.running(options.name or "")
    began = time.perf_counter()
    runtime = facts.connect(
        options, lifecycle.session_name(cockpit.shell, options.session or ""), keep=options.keep
    )
    seconds = time.perf_counter() - began
    here = replace(facts.of_runtime(runtime), started=None if found else seconds, keep=options.keep)
    notes = facts.differences(here, options) if found else []
    attacher = attaching.Attacher(cockpit)
    # A new cluster has nothing yet, and its head may need a moment before it answers.
    left = attacher.left() if found else attaching.Left(saved=attacher.saved())
    notes += filter(None, [attaching.offer(left)])
    return cards.start_card(here, notes, static=cockpit.static)


def _start(cockpit: Cockpit, options: argparse.Namespace) -> None:
    cockpit.show(start(cockpit, options))


def _status(cockpit: Cockpit, options: argparse.Namespace) -> None:
    runtime = context.current()
    if runtime is None:
        _list(cockpit, options)
        return
    here = facts.of_runtime(runtime)
    cockpit.show(cards.status_card(here, facts.status(), facts.paths(here), static=cockpit.static))


def _stop(cockpit: Cockpit, options: argparse.Namespace) -> None:
    cockpit.say(facts.stop(lifecycle.session_name(cockpit.shell), force=options.force))


def _list(cockpit: Cockpit, _options: argparse.Namespace) -> None:
    runtime = context.current()
    here = facts.of_runtime(runtime).directory if runtime is not None else ""
    records = facts.clusters()
    cockpit.show(
        cards.list_card(
            [known for known, _ in records], [cards.age_of(created) for _, created in records], here
        )
    )


def _doctor(cockpit: Cockpit, _options: argparse.Namespace) -> None:
    from nbray import diagnose

    cockpit.show(cards.Card(diagnose.report(facts.front_end(cockpit.shell)), ""))


COMMANDS = {
    "start": Command(start_parser, _start),
    "status": Command(bare("status"), _status),
    "stop": Command(_stop_parser, _stop),
    "list": Command(bare("list"), _list),
    "doctor": Command(bare("doctor"), _doctor),
}
