"""The options of a cell that runs on the cluster: from the line of ``%%remote``, or from the arguments of `nbray.remote_cell`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from nbray.notebook import arguments
from nbray.notebook.arguments import Parser


@dataclass(frozen=True)
class CellOptions:
    """``out``: names that are brought back, None for all that the cell binds; ``also``: names that are sent although the analysis does not see
    them. ``task``: options of the task, as `nbray.remote` takes them. ``timeout``: seconds until the cell is cancelled. ``quiet``: nbray says
    nothing of its own. ``background``: the notebook does not wait; ``on_interrupt``: "cancel", or "detach", which makes a cell that the notebook
    waits for one in the background.
    """

    out: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    timeout: float | None = None
    quiet: bool = False
    background: bool = False
    on_interrupt: str = "cancel"
    dry_run: bool = False
    """Say what would be sent, and run nothing."""
    task: dict[str, Any] = field(default_factory=dict)


def parser() -> Parser:
    """The command line of ``%%remote``."""
    made = Parser("%%remote", "Run this cell on the cluster, as if it ran here.")
    add = made.add_argument
    add(
        "-o",
        "--out",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="bring back these names only (default: all that the cell binds)",
    )
    add(
        "-i",
        "--in",
        dest="also",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="send these names too (what eval and the like read is not seen)",
    )
    add(
        "-a",
        "--async",
        dest="background",
        action="store_true",
        help="run in the background: a later cell that reads what this one binds waits for it",
    )
    add("--num-cpus", type=arguments.amount, metavar="N", help="CPUs that the cell takes (1)")
    add("--num-gpus", type=arguments.amount, metavar="N", help="GPUs that the cell takes (0)")
    add("--memory", type=arguments.size, metavar="SIZE", help="memory that the cell takes, for instance 2GB")
    add("--timeout", type=arguments.amount, metavar="S", help="cancel the cell after S seconds")
    add(
        "--retries",
        type=arguments.whole,
        metavar="N",
        help="run the cell again, up to N times, if it raises or its process dies (0)",
    )
    add(
        "--on-interrupt",
        choices=("cancel", "detach"),
        default="cancel",
        help="what an interrupt does with the cell: end it, or let it go on in the background",
    )
    add(
        "--dry-run",
        action="store_true",
        help="show what would be sent, why, and what would be refused; run nothing",
    )
    add("-q", "--quiet", action="store_true", help="say nothing but what the cell says")
    made.kinds |= {"out": "bound", "also": "variables"}
    return made


def read(given: argparse.Namespace) -> CellOptions:
    """What `parser` has read. Raises BadUsageError for names that are none."""
    out = arguments.names(given.out)
    task: dict[str, Any] = {
        key: getattr(given, key)
        for key in ("num_cpus", "num_gpus", "memory")
        if getattr(given, key) is not None
    }
    task["max_retries"] = given.retries or 0
    if given.retries:
        task["retry_exceptions"] = True
    return CellOptions(
        out=None if out is None else tuple(out),
        also=tuple(arguments.names(given.also) or ()),
        timeout=given.timeout,
        quiet=given.quiet,
        background=given.background,
        on_interrupt=given.on_interrupt,
        dry_run=given.dry_run,
        task=task,
    )
