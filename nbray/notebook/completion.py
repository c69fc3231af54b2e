"""Completion of the lines of ``%cluster``, ``%%remote`` and ``%remote``: subcommands, flags, and the names and ids that fit.

A matcher of IPython (8.6 and later): it answers for these lines alone, and then nobody else adds to the list.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nbray.api import context
from nbray.notebook import commands, options
from nbray.notebook.arguments import Parser

if TYPE_CHECKING:
    from nbray.notebook.cockpit import Cockpit

_LINE = re.compile(r"^\s*(?:[\w\s,.\[\]'\"]+=\s*)?(?P<magic>%cluster|%%remote|%remote)(?P<rest>\s.*)$")
_BOUND = re.compile(
    r"^\s*(?:(?:async\s+)?def\s+(\w+)|class\s+(\w+)|(\w+)\s*(?::[^=\n]+)?=(?!=)|for\s+(\w+)\s+in\b|with\b.*\bas\s+(\w+))",
    re.MULTILINE,
)
NEWEST = 100
"""Tasks that have ended whose ids are offered."""


def complete(cockpit: Cockpit, cell: str, line: str) -> tuple[str, list[str]] | None:
    """(what is replaced, by what) for ``line``, which ends at the cursor; None for a line that is none of ours. ``cell``: all of the cell."""
    match = _LINE.match(line)
    if match is None:
        return None
    words = match["rest"].split()
    fragment = "" if line[-1:].isspace() else words.pop()
    if match["magic"] == "%cluster":
        if not words:
            return fragment, _starting(fragment, [*commands.WHERE, "help"])
        if words[0] in commands.HELP_WORDS:
            return fragment, _starting(fragment, commands.WHERE)
        if words[0] not in commands.WHERE:
            return fragment, []
        parser, words = commands.find(words[0]).parser(), words[1:]
        more = ["--help"]
    else:
        parser, more = options.parser(), []
        if match["magic"] == "%remote":
            if not fragment.startswith("-"):
                return None  # An expression: Python's own completion.
            parser = options.line_parser()
    return _of_parser(cockpit, cell, parser, words, fragment, more)


def _of_parser(
    cockpit: Cockpit, cell: str, parser: Parser, words: list[str], fragment: str, more: list[str]
) -> tuple[str, list[str]]:
    flags = [*parser.flags(), *more]
    if fragment.startswith("-"):
        return fragment, _starting(
            fragment, [flag for flag in flags if flag.startswith("--")] if fragment != "-" else flags
        )
    action = _expected(parser, words)
    if action is None:
        return fragment, flags if not fragment else []
    if action.choices:
        return fragment, _starting(fragment, map(str, action.choices))
    fragment = fragment.rpartition(",")[2]
    kind = parser.kinds.get(action.dest, "")
    found = _starting(fragment, KINDS[kind](cockpit, cell)) if kind else []
    return fragment, found if found or fragment or action.option_strings else flags


def _expected(parser: Parser, words: list[str]) -> argparse.Action | None:
    """The argument that the next word is for."""
    for word in reversed(words):
        flag = next((action for action in parser._actions if word in action.option_strings), None)
        if flag is None:
            continue
        takes_more = flag.nargs in ("+", "*") or (flag.nargs is None and word is words[-1])
        if takes_more:
            return flag
        break
    return next((action for action in parser._actions if not action.option_strings), None)


def _starting(fragment: str, words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word.startswith(fragment)))


# -- what there is


def _variables(cockpit: Cockpit, _cell: str) -> list[str]:
    from nbray.notebook import targets

    return sorted(targets.variables(cockpit))


def _bound(cockpit: Cockpit, cell: str) -> list[str]:
    """Names that the cell binds, as far as it can be seen in code that is not finished."""
    return [name for match in _BOUND.findall(cell) for name in match if name] or _variables(cockpit, cell)


def _names(_cockpit: Cockpit, _cell: str) -> list[str]:
    from nbray.notebook import targets

    return sorted({row.name for row in targets.held_rows()}) if context.current() is not None else []


def _referring(cockpit: Cockpit) -> list[str]:
    from nbray.notebook import targets

    namespace = cockpit.shell.user_ns
    return [
        name for name in _variables(cockpit, "") if next(targets.refs_in(namespace[name]), None) is not None
    ]


def _tasks(cockpit: Cockpit, _cell: str) -> list[str]:
    from nbray import ids
    from nbray.notebook import targets
    from nbray.state import views

    runtime = context.current()
    if runtime is None:
        return []
    events = [event for _, event in views.task_events(runtime.engine.query, {}, NEWEST)]
    cells = {targets.cell_title(event.cell) for event in events if event.session == targets.session()}
    return [
        *_referring(cockpit),
        *sorted(cells - {""}),
        *(ids.short(event.task) for event in reversed(events)),
    ]


def _objects(cockpit: Cockpit, cell: str) -> list[str]:
    from nbray import ids
    from nbray.notebook import targets

    if context.current() is None:
        return []
    return [
        *_referring(cockpit),
        *_names(cockpit, cell),
        *(ids.short(row.object) for row in targets.object_rows()[:NEWEST]),
    ]


def _anything(cockpit: Cockpit, cell: str) -> list[str]:
    return [*_tasks(cockpit, cell), *_objects(cockpit, cell)]


def _clusters(_cockpit: Cockpit, _cell: str) -> list[str]:
    from nbray.clusters import list_clusters

    return [record.name for record in list_clusters()]


KINDS: dict[str, Callable[[Cockpit, str], list[str]]] = {
    "variables": _variables,
    "bound": _bound,
    "names": _names,
    "tasks": _tasks,
    "objects": _objects,
    "anything": _anything,
    "clusters": _clusters,
}
"""What `Parser.kinds` may say of an argument."""


# -- IPython


def register(cockpit: Cockpit) -> Callable[[], None]:
    """Have IPython ask; call what is returned to end it."""
    completer = getattr(cockpit.shell, "Completer", None)
    matchers: list[Any] | None = getattr(completer, "custom_matchers", None)
    if matchers is None:
        return lambda: None
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher(identifier="nbray")  # type: ignore[untyped-decorator]
    def nbray_matcher(asked: Any) -> dict[str, Any]:
        try:
            found = complete(cockpit, asked.full_text, asked.text_until_cursor.rpartition("\n")[2])
        except Exception:  # noqa: BLE001  (a cluster that does not answer must not break typing)
            found = None
        if found is None:
            return {"completions": []}
        fragment, words = found
        return {
            "completions": [SimpleCompletion(text=word, type="magic") for word in words],
            "matched_fragment": fragment,
            "suppress": True,
            "ordered": True,
        }

    matchers.append(nbray_matcher)

    def end() -> None:
        if nbray_matcher in matchers:
            matchers.remove(nbray_matcher)

    return end
