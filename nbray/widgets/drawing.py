"""A graph as text and as an SVG for saved notebooks. Pure.

GitHub, nbviewer and nbconvert strip style sheets and scripts, so the SVG has presentation attributes only. Its colours can be read on white and on black.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from nbray.events import CANCELLED, FAILED, FINISHED, RETRIED, RUNNING, TASK_STATES
from nbray.state.graph import STATEFUL, Graph, Group, summary
from nbray.state.layout import Layered

LARGE = 120
"""Tasks above which groups are drawn."""

LIMIT = 200_000
"""Bytes of an SVG, at most."""

COLOURS = ("#9aa0a6", "#d3a11f", "#79aee8", "#2f7de1", "#34a058", "#d6453f", "#94739f", "#e07b39")
"""By state (`nbray.events.TASK_STATES`)."""

GLYPHS = ("○", "◔", "◑", "▶", "✓", "✕", "–", "↻")
"""By state, for those who do not see the colours."""

_ORDER = (FAILED, RETRIED, RUNNING, 2, 1, 0, CANCELLED, FINISHED)
"""In which order states are drawn side by side: what needs a look comes first."""

_FONT = 'font-family="system-ui, sans-serif"'
_INK = "#808890"
_MOST_GROUPS = 60
_WIDEST = 1000.0
_WRAP = 16
"""Rows of a column of tasks, after which it goes on beside itself."""
_MOST_LINES = 40


def text(graph: Graph, title: str) -> str:
    """The graph in a few lines: a summary, then one line per group."""
    lines = [f"{title}: {summary(graph.counts())}"]
    groups = graph.groups[:_MOST_LINES]
    width = max((len(_name(group)) for group in groups), default=0)
    lines += [f"  {_name(group):<{width}}  {summary(group.counts)}" for group in groups]
    if len(graph.groups) > len(groups):
        lines.append(f"  and {len(graph.groups) - len(groups):,} more functions")
    return "\n".join(lines)


def svg(graph: Graph, title: str, command: str) -> str:
    """A picture of at most `LIMIT` bytes. ``command``: what shows it live again."""
    if 0 < len(graph) <= LARGE:
        drawn = _tasks(graph, title, command)
        if len(drawn.encode()) <= LIMIT:
            return drawn
    return _groups(graph, title, command)


def _name(group: Group) -> str:
    return f"{group.name} ({group.title})" if group.title else group.name


def _clipped(said: str, length: int) -> str:
    return said if len(said) <= length else f"{said[: length - 1]}…"


def _page(width: float, height: float, title: str, said: str, command: str, body: Sequence[str]) -> str:
    name = html.escape(f"{title}: {said}")
    width = max(width, 8.0 * len(name) + 40, 420)
    shrunk = min(1.0, _WIDEST / width)
    foot = f'<text x="16" y="{height + 62:g}" {_FONT} font-size="11" fill="{_INK}">Live again: {html.escape(command)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * shrunk:g}" height="{(height + 76) * shrunk:g}" viewBox="0 0 {width:g} {height + 76:g}" role="img">'
        f'<title>{name}</title><text x="16" y="24" {_FONT} font-size="13" font-weight="600" fill="{_INK}">{name}</text>'
        f'<g transform="translate(16 40)">{"".join(body)}</g>{foot}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: int, width: float = 1.2) -> str:
    dash = {0: "", 1: ' stroke-dasharray="2 3"', STATEFUL: ' stroke-dasharray="7 3"'}[kind]
    bend = max(12.0, (x2 - x1) / 2)
    return (
        f'<path d="M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}" fill="none" stroke="{_INK}" '
        f'stroke-opacity="0.55" stroke-width="{width:g}"{dash}/>'
    )


def _tasks(graph: Graph, title: str, command: str) -> str:
    layout = Layered()
    for parents in graph.parents():
        layout.place(parents)
    wide, high, step_x, step_y = 104.0, 22.0, 140.0, 30.0
    starts, x = [], 0.0
    for column in range(max(layout.columns) + 1):
        starts.append(x)
        highest = max(row for at, row in zip(layout.columns, layout.rows, strict=True) if at == column)
        x += step_x * (highest // _WRAP + 1)
    places = [
        (starts[column] + row // _WRAP * step_x, row % _WRAP * step_y)
        for column, row in zip(layout.columns, layout.rows, strict=True)
    ]
    body = [
        _line(
            places[source][0] + wide,
            places[source][1] + high / 2,
            places[target][0],
            places[target][1] + high / 2,
            kind,
        )
        for source, target, kind in zip(graph.sources, graph.targets, graph.edge_kinds, strict=True)
    ]
    for node, (x, y) in enumerate(places):
        group, state = graph.groups[graph.groups_of[node]], graph.states[node]
        told = f"{_name(group)}: {TASK_STATES[state].lower()}" + (
            f", {graph.errors[node]}" if node in graph.errors else ""
        )
        body.append(
            f'<g><title>{html.escape(told)}</title><rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="{11 if group.actor else 4}" '
            f'fill="{COLOURS[state]}" fill-opacity="0.22" stroke="{COLOURS[state]}" stroke-width="1.4"/>'
            f'<text x="{x + 7:g}" y="{y + 15:g}" {_FONT} font-size="11" fill="{COLOURS[state]}">{GLYPHS[state]} '
            f"{html.escape(_clipped(group.name, 14))}</text></g>"
        )
    width = max(x for x, _ in places) + wide + 32
    height = max(y for _, y in places) + high
    return _page(width, height, title, summary(graph.counts()), command, body)


def _groups(graph: Graph, title: str, command: str) -> str:
    shown = min(len(graph.groups), _MOST_GROUPS)
    parents: list[list[int]] = [[] for _ in range(shown)]
    for source, target, _ in graph.group_edges:
        if source < target < shown:
            parents[target].append(source)
    layout = Layered()
    for each in parents:
        layout.place(each)
    wide, high, step_x, step_y = 190.0, 46.0, 250.0, 64.0
    places = [
        (column * step_x, row * step_y) for column, row in zip(layout.columns, layout.rows, strict=True)
    ]
    body = []
    for (source, target, kind), count in graph.group_edges.items():
        if source < shown and target < shown:
            (x1, y1), (x2, y2) = places[source], places[target]
            width = min(6.0, 1.0 + len(str(count)))
            body.append(_line(x1 + wide, y1 + high / 2, x2, y2 + high / 2, kind, width))
    for number, (x, y) in enumerate(places):
        body.append(_box(graph.groups[number], x, y, wide, high))
    if len(graph.groups) > shown:
        y = max((y for _, y in places), default=0) + step_y
        body.append(
            f'<text x="0" y="{y + 14:g}" {_FONT} font-size="12" fill="{_INK}">and {len(graph.groups) - shown:,} more functions</text>'
        )
        places.append((0, y))
    width = max((x for x, _ in places), default=0) + wide + 32
    height = max((y for _, y in places), default=0) + high
    return _page(width, height, title, summary(graph.counts()), command, body)


def _box(group: Group, x: float, y: float, wide: float, high: float) -> str:
    parts = [
        f"<g><title>{html.escape(f'{_name(group)}: {summary(group.counts)}')}</title>",
        (
            f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="{10 if group.actor else 5}" fill="{_INK}" fill-opacity="0.08" '
            f'stroke="{_INK}"/>'
        ),
        f'<text x="{x + 10:g}" y="{y + 19:g}" {_FONT} font-size="12" font-weight="600" fill="{_INK}">{html.escape(_clipped(group.name, 24))}</text>',
        f'<text x="{x + wide - 10:g}" y="{y + 19:g}" {_FONT} font-size="11" text-anchor="end" fill="{_INK}">{html.escape(group.title)}</text>',
    ]
    at, total = x + 10, max(1, group.size)
    for state in _ORDER:
        part = (wide - 60) * group.counts[state] / total
        if part:
            parts.append(
                f'<rect x="{at:.4g}" y="{y + 28:g}" width="{max(part, 1.5):.4g}" height="9" fill="{COLOURS[state]}"/>'
            )
            at += part
    parts.append(
        f'<text x="{x + wide - 8:g}" y="{y + 36:g}" {_FONT} font-size="11" text-anchor="end" fill="{_INK}">{group.size:,}</text></g>'
    )
    return "".join(parts)
