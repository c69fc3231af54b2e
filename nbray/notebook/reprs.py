"""How refs and handles are displayed where output has to be the same in every run: without their ids."""

from __future__ import annotations

from typing import Any


def without_ids(shell: Any) -> None:
    """Display refs, generators and handles of actors without what differs from run to run."""
    formatter = shell.display_formatter.formatters["text/plain"]
    formatter.for_type_by_name(
        "nbray.api.refs", "ObjectRef", lambda _ref, printer, _: printer.text("ObjectRef(...)")
    )
    formatter.for_type_by_name(
        "nbray.api.refs",
        "ObjectRefGenerator",
        lambda _stream, printer, _: printer.text("ObjectRefGenerator(...)"),
    )
    formatter.for_type_by_name("nbray.api.actor", "ActorHandle", _handle)


def _handle(handle: Any, printer: Any, _cycle: bool) -> None:
    name = f", name={handle._nbray_name!r}" if handle._nbray_name else ""
    printer.text(f"ActorHandle({handle._nbray_table.class_name}{name})")
