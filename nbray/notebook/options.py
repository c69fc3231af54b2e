"""The options of a cell that runs on the cluster: from the line of ``%%remote``, or from the arguments of `nbray.remote_cell`."""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass, field
from typing import Any

from nbray.api import options as task_options
from nbray.notebook import arguments
from nbray.notebook.arguments import BadUsageError, Parser

_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\S)+""")


@dataclass(frozen=True)
class CellOptions:
    """``out``: names that are brought back, None for all that the cell binds; ``also``: names that are sent although the analysis does not see
    them. ``task``: options of the task, as `nbray.remote` takes them. ``timeout``: seconds until the cell is cancelled. ``quiet``: nbray says
    nothing of its own. ``background``: the notebook does not wait; ``on_interrupt``: "cancel", or "detach", which makes a cell that the notebook
    waits for one in the background. ``local``: it runs in the notebook; ``name``: what the task is called, else the cell; ``stream``: output appears while
    the cell runs; ``progress_after``: seconds after which the status line appears, else the usual time. ``over``: a name and the expression of the
    items for each of which the cell runs; ``items``: these, where there is no expression.
    """

    out: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    timeout: float | None = None
    quiet: bool = False
    background: bool = False
    on_interrupt: str = "cancel"
    dry_run: bool = False
    """Say what would be sent, and run nothing."""
    local: bool = False
    name: str = ""
    stream: bool = True
    progress_after: float | None = None
    over: tuple[str, str] | None = None
    items: tuple[Any, ...] | None = None
    task: dict[str, Any] = field(default_factory=dict)


def parser() -> Parser:
    """The command line of ``%%remote``."""
    made = Parser("%%remote", "Run this cell on the cluster, as if it ran here.")
    _add_cell_flags(made)
    _add_flags(made)
    return made


def line_parser() -> Parser:
    """The flags of ``%remote``; the expression follows them."""
    made = Parser("%remote", "Compute the expression on the cluster: x = %remote f(3)")
    _add_flags(made)
    return made


def _add_cell_flags(made: Parser) -> None:
    """What makes sense for cells only."""
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
        "-a",
        "--async",
        dest="background",
        action="store_true",
        help="run in the background: a later cell that reads what this one binds waits for it",
    )
    add(
        "--map",
        dest="over",
        metavar="NAME=ITEMS",
        help="run the cell once for each item, with NAME bound to it; what it binds comes back as lists",
    )
    add(
        "--on-interrupt",
        choices=("cancel", "detach"),
        default="cancel",
        help="what an interrupt does with the cell: end it, or let it go on in the background",
    )
    add("--local", action="store_true", help="run it in the notebook, to use breakpoint() or input()")
    made.kinds["out"] = "bound"


def _add_flags(made: Parser) -> None:
    """What an expression may have, too."""
    add = made.add_argument
    add(
        "-i",
        "--in",
        dest="also",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="send these names too (what eval and the like read is not seen)",
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
    add("--priority", type=_signed, metavar="N", help="larger is more urgent (0)")
    add(
        "--resources",
        nargs="+",
        action="extend",
        metavar="NAME=N",
        help="other resources that the cell takes, for instance TPU=1",
    )
    add(
        "--options",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="further options of the task, as nbray.remote takes them",
    )
    add("-n", "--name", metavar="NAME", help="what the task is called in tables and output")
    add(
        "--dry-run",
        action="store_true",
        help="show what would be sent, why, and what would be refused; run nothing",
    )
    add("--no-stream", dest="stream", action="store_false", help="show what it prints when it has ended")
    add(
        "--progress-after",
        type=arguments.amount,
        metavar="S",
        help="show the status line after S seconds (0.3)",
    )
    add("-q", "--quiet", action="store_true", help="say nothing but what the cell says")
    made.kinds["also"] = "variables"


def split_cell_line(line: str, made: Parser) -> list[str]:
    """The words of ``%%remote``'s line; what follows ``--map`` is Python, up to the next flag, and keeps its quotes."""
    if "--map" not in line:
        return arguments.split(line)
    flags = "|".join(re.escape(flag) for flag in sorted(made.flags(), key=len, reverse=True))
    match = re.search(rf"(?:^|\s)--map[\s=]+(.*?)\s*(?=\s(?:{flags})(?:[\s=]|$)|$)", line)
    if match is None:
        return arguments.split(line)
    python = match[1].strip()
    if len(python) > 1 and python[0] == python[-1] and python[0] in "'\"":
        python = python[1:-1]
    return [*arguments.split(line[: match.start()]), *arguments.split(line[match.end() :]), f"--map={python}"]


def split_line(line: str, made: Parser) -> tuple[list[str], str]:
    """The words of the flags at the start of a line, and the expression after them."""
    arguments_of = {flag: action.nargs for action in made._actions for flag in action.option_strings}
    words: list[str] = []
    rest = line.strip()
    while match := _WORD.match(rest):
        flag, equals, _ = match[0].partition("=")
        looks = flag in arguments_of or (flag.startswith("--") and flag[2:3].isalpha())
        if not looks:
            break
        count = 1 if equals or flag not in arguments_of or arguments_of[flag] == 0 else 2
        for _ in range(count):
            word = _WORD.match(rest)
            if word is None:
                break
            words += arguments.split(word[0])
            rest = rest[word.end() :].lstrip()
    return words, rest


def read(given: argparse.Namespace) -> CellOptions:
    """What `parser` has read. Raises BadUsageError for names that are none, and for what cannot go together."""
    found = vars(given)
    out = arguments.names(found.get("out"))
    task: dict[str, Any] = {
        key: found[key] for key in ("num_cpus", "num_gpus", "memory", "priority") if found[key] is not None
    }
    task["max_retries"] = given.retries or 0
    if given.retries:
        task["retry_exceptions"] = True
    resources = dict(_pair(text, "--resources", "TPU=1") for text in given.resources or ())
    if resources:
        task["resources"] = {name: _number(name, value) for name, value in resources.items()}
    for text in given.options or ():
        key, value = _pair(text, "--options", "max_calls=1")
        task[key] = _literal(value)
    over = found.get("over")
    options = CellOptions(
        out=None if out is None else tuple(out),
        also=tuple(arguments.names(given.also) or ()),
        timeout=given.timeout,
        quiet=given.quiet,
        background=found.get("background", False),
        on_interrupt=found.get("on_interrupt", "cancel"),
        local=found.get("local", False),
        name=given.name or "",
        stream=given.stream,
        progress_after=given.progress_after,
        over=None if over is None else _pair(over, "--map", "x=files"),
        dry_run=found.get("dry_run", False),
        task=task,
    )
    check(options)
    return options


def check(options: CellOptions) -> None:
    """Raises BadUsageError for options that cannot be had, or not together."""
    if options.over is not None and not options.over[0].isidentifier():
        raise BadUsageError(
            f"--map: {options.over[0]!r} is not a variable's name; write for instance --map x=files"
        )
    if options.local and (options.background or options.over is not None):
        raise BadUsageError("--local runs the cell here and now; take -a or --map away")
    if options.over is not None and (options.background or options.on_interrupt == "detach"):
        raise BadUsageError(
            "--map is driven by the notebook and cannot run in the background; in a cell of its own, nbray.map or @nbray.remote can"
        )
    if options.on_interrupt not in ("cancel", "detach"):
        raise BadUsageError(f"on_interrupt={options.on_interrupt!r}: expected 'cancel' or 'detach'")
    own = {"num_returns": "a cell has one result", "name": "use --name"}
    for key, why in own.items():
        if key in options.task:
            raise BadUsageError(f"--options {key}: {why}")
    try:
        task_options.check(task_options.TASK, options.task, "%%remote")
    except (TypeError, ValueError) as error:
        raise BadUsageError(str(error)) from None


def _signed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number") from None


def _pair(text: str, flag: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise BadUsageError(f"{flag} {text!r}: expected NAME=VALUE, for instance {flag} {example}")
    return name.strip(), value.strip()


def _number(name: str, text: str) -> float:
    try:
        return arguments.amount(text)
    except argparse.ArgumentTypeError as error:
        raise BadUsageError(f"--resources {name}: {error}") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
