"""The command ``nbray``: start, look at and stop clusters from a terminal. The same things as ``%cluster`` in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from nbray.notebook.arguments import Parser

USAGE = """\
usage: nbray COMMAND [FLAGS]

  start    start a cluster on this machine, and leave it running
  stop     stop a cluster
  status   what a cluster has, and where its files are
  list     the clusters of this user
  where    the line that each running task is at, also while a notebook is busy
  doctor   one block of text about this installation, to paste into a bug report

nbray COMMAND --help shows the flags of a command; nbray --version the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status (2: it could not be understood, 1: it failed)."""
    from nbray.errors import NbrayError
    from nbray.notebook.arguments import BadUsageError, did_you_mean

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        import nbray

        print(f"nbray {nbray.__version__}")
        return 0
    name, *rest = words
    try:
        if name not in COMMANDS:
            raise BadUsageError(f"nbray has no command {name!r}{did_you_mean(name, COMMANDS)}")
        make, run = COMMANDS[name]
        parser = make()
        if "-h" in rest or "--help" in rest:
            print(parser.format_help(), end="")
            return 0
        return run(parser.read(rest))
    except BadUsageError as error:
        print(error, file=sys.stderr)
        return 2
    except (NbrayError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser(name: str, description: str) -> Parser:
    from nbray.notebook.arguments import Parser

    return Parser(f"nbray {name}", description)


def _start_parser() -> Parser:
    from nbray.notebook.commands.lifetime import add_size_flags

    parser = _parser("start", "Start a cluster on this machine, and leave it running.")
    add_size_flags(parser)
    return parser


def _stop_parser() -> Parser:
    parser = _parser("stop", "Stop a cluster.")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="name of the cluster (default)")
    parser.add_argument("--all", action="store_true", help="stop every cluster of this user")
    parser.add_argument("--force", action="store_true", help="even if notebooks use it")
    return parser


def _status_parser() -> Parser:
    return _named_parser("status", "What a cluster has, and where its files are.")


def _named_parser(command: str, description: str) -> Parser:
    parser = _parser(command, description)
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="name of the cluster (default)")
    return parser


def _start(options: argparse.Namespace) -> int:
    from nbray.api import session
    from nbray.notebook import cards, facts

    found = facts.running(options.name or "")
    here = facts.of_runtime(facts.connect(options, keep=True))
    session.shutdown(stop=False)
    print(f"Cluster {here.name!r} {'was running already' if found else 'is running'}: {cards.power(here)}")
    for what, path, _ in facts.paths(here):
        print(f"  {what:<7}  {path}")
    for note in facts.differences(here, options) if found else []:
        print(note)
    print("Notebooks and scripts of this Python environment join it. Stop it: nbray stop")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from nbray import clusters
    from nbray.api import session

    if options.all:
        records = clusters.list_clusters()
    else:
        record = clusters.find_cluster(options.name)
        records = [record] if record is not None else []
    if not records:
        name = f" {options.name!r}" if options.name else ""
        print(f"No cluster{name} is running.")
        return 1 if options.name else 0
    for record in records:
        if options.force:
            clusters.stop_cluster(record)
        else:
            session.init(name=record.name)
            session.shutdown(stop=True)
        print(f"Cluster {record.name!r} is stopped.")
    return 0


def _status(options: argparse.Namespace) -> int:
    from nbray import clusters
    from nbray.notebook import cards, facts

    record = clusters.find_cluster(options.name)
    if record is None:
        print("No cluster is running." if not options.name else f"No cluster {options.name!r} is running.")
        return 1
    here = facts.of_record(record)
    print(f"Cluster {here.name!r}: {cards.power(here)}, pid {record.pid}")
    for what, path, size in facts.paths(here):
        print(f"  {what:<7}  {path} ({size} bytes)")
    return 0


def _where(options: argparse.Namespace) -> int:
    import os

    from nbray import clusters, ids
    from nbray.api.session import connect
    from nbray.state.explaining import duration, places

    record = clusters.find_cluster(options.name)
    if record is None:
        print("No cluster is running." if not options.name else f"No cluster {options.name!r} is running.")
        return 1
    engine = connect(record)
    try:
        rows = places(engine.query)
    finally:
        engine.shutdown(stop=False)
    for row in rows:
        cell = row.cell.partition(" ")[0]
        print(
            f"{ids.short(row.task)}  {row.name}{f' of {cell}' if cell and cell != row.name else ''}  {duration(row.seconds)}  pid {row.pid}"
        )
        for file, line, function in row.frames or [
            ("(it does not answer: in a call that keeps the interpreter)", 0, "")
        ]:
            # ipykernel gives code of cells such names.
            place = "a cell" if os.path.basename(os.path.dirname(file)).startswith("ipykernel_") else file
            print(f"    {place}, line {line}, in {function}" if line else f"    {place}")
    if not rows:
        print("No task is running.")
    return 0


def _list(_options: argparse.Namespace) -> int:
    from nbray.notebook import cards, facts

    records = facts.clusters()
    print(
        cards.list_card([known for known, _ in records], [cards.age_of(made) for _, made in records], "").text
    )
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from nbray import diagnose

    print(diagnose.report())
    return 0


COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[argparse.Namespace], int]]] = {
    "start": (_start_parser, _start),
    "stop": (_stop_parser, _stop),
    "status": (_status_parser, _status),
    "where": (lambda: _named_parser("where", "The line that each running task is at."), _where),
    "list": (lambda: _parser("list", "The clusters of this user on this machine."), _list),
    "doctor": (lambda: _parser("doctor", "One block of text about this installation."), _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
