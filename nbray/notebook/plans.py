"""``%%remote --dry-run``: what a cell would send, why, and what would be refused. Nothing runs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbray.notebook import refusals, transfer
from nbray.notebook.arguments import human
from nbray.notebook.capture import CellNames
from nbray.notebook.cards import Card

_HEAD = ("name", "type", "size", "why")


@dataclass(frozen=True)
class Item:
    """A name that a cell needs. ``size``: bytes as it is sent, None for what travels by its name (modules, ``kind`` then names the module);
    ``why``: where it is read; ``refused``: why it cannot be sent, or "".
    """

    name: str
    kind: str
    size: int | None
    why: str
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """``items``: what would be sent, largest first, then what would be refused. ``binds``: names that would come back. ``late``: names that
    come from cells in the background. ``blind``: calls that may read what cannot be seen, as (call, line).
    """

    items: Sequence[Item]
    binds: Sequence[str]
    late: Sequence[str]
    blind: Sequence[tuple[str, int]]

    @property
    def size(self) -> int:
        """Bytes altogether."""
        return sum(item.size or 0 for item in self.items)

    def card(self) -> Card:
        """As a table, in text and HTML."""
        rows = [
            (item.name, item.kind, "by name" if item.size is None else human(item.size), item.why)
            for item in self.items
            if not item.refused
        ]
        refused = [item for item in self.items if item.refused]
        title = self._title(len(rows), len(refused))
        notes = [f"{item.name}: {item.refused}" for item in refused]
        notes += [
            f"{call} in line {line} may read names that cannot be seen from here; send them with -i NAME"
            for call, line in self.blind
        ]
        if self.late:
            notes.append(f"{', '.join(self.late)}: from cells in the background, on the cluster")
        notes.append(
            f"comes back: {', '.join(self.binds)}" if self.binds else "nothing comes back but the last value"
        )
        return Card(_text(title, rows, notes), _html(title, rows, notes, len(refused)))

    def _title(self, sent: int, refused: int) -> str:
        names = f"{sent} name{'' if sent == 1 else 's'}, {human(self.size)}" if sent else "nothing"
        return f"This cell would send {names}" + (f", and {refused} would be refused" if refused else "")


def plan(
    names: CellNames,
    packed: transfer.Packed,
    namespace: dict[str, Any],
    also: Sequence[str],
    out: Sequence[str] | None,
    late: Sequence[str] = (),
) -> Plan:
    """What `packed`, made without ``strict``, means."""
    items = [
        Item(name, refusals.type_name(type(namespace[name])), size, _why(name, names, packed.needed_by, also))
        for name, size in packed.sizes.items()
        if name in namespace
    ]
    items.sort(key=lambda item: (-(item.size or 0), item.name))
    items += [
        Item(name, f"module {module}", None, _why(name, names, packed.needed_by, also))
        for name, module in sorted(packed.parcel.modules.items())
    ]
    for name, error in packed.refused.items():
        value = namespace[name]
        why = refusals.reason(error, value, name, namespace)
        items.append(
            Item(name, refusals.type_name(type(value)), None, _why(name, names, packed.needed_by, also), f"{refusals.describe(value)}, {_why(name, names, packed.needed_by, also)}: {why}")
        )  # fmt: skip
    return Plan(items, names.binds if out is None else out, late, names.blind)


def _why(name: str, names: CellNames, needed_by: Mapping[str, str], also: Sequence[str]) -> str:
    if name in names.reads:
        return f"read in line {names.reads[name]}"
    return f"read by {needed_by[name]}" if name in needed_by else "-i" if name in also else "read"


def _text(title: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    lines = [title]
    if rows:
        widths = [max(len(row[at]) for row in (_HEAD, *rows)) for at in range(len(_HEAD))]
        lines += [
            "  ".join(
                cell.rjust(width) if at == 2 else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (_HEAD, *rows)
        ]
    return "\n".join([*lines, *notes])


def _html(title: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str], refused: int) -> str:
    align = ("left", "left", "right", "left")
    head = "".join(f'<th style="text-align:{a}">{name}</th>' for name, a in zip(_HEAD, align, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{a}">{html.escape(cell)}</td>' for cell, a in zip(row, align, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    below = "".join(
        f"<div>{'&#9888; ' if at < refused else ''}{html.escape(note)}</div>" for at, note in enumerate(notes)
    )
    return f"<div><b>{html.escape(title)}</b></div>{table}{below}"
