"""What the notebook says about a cluster: the card of its start, its status, the list of clusters. Short text, and the same as HTML."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nbray.notebook.arguments import human

UNITS = 10_000
"""Resources are counted in parts of 1/10000 (`nbray.messages.TaskClass`)."""


@dataclass(frozen=True)
class Facts:
    """A cluster as its card shows it. Sizes in bytes, ``resources`` in units of 1/10000; ``started``: seconds that the start took, None if it
    was there before; ``ttl``: seconds it lives on alone.
    """

    name: str
    resources: Mapping[str, int]
    memory: int
    store: int
    log: str
    spill: str
    directory: str
    ttl: float
    keep: bool = False
    started: float | None = None


@dataclass(frozen=True)
class Card:
    """Text, and the same as HTML (empty: the text will do)."""

    text: str
    html: str

    def bundle(self, *, static: bool = False) -> dict[str, str]:
        """Representations to display; a static one is plain."""
        return (
            {"text/plain": self.text}
            if static or not self.html
            else {"text/plain": self.text, "text/html": self.html}
        )


def counted(number: float, noun: str) -> str:
    """``1 CPU``, ``2 CPUs``, ``0.5 CPU``."""
    return f"{number:g} {noun}{'' if number <= 1 else 's'}"


def power(facts: Facts) -> str:
    """``4 CPUs, 1 GPU``: what can be asked for."""
    parts = [counted(facts.resources.get("CPU", 0) / UNITS, "CPU")]
    if facts.resources.get("GPU"):
        parts.append(counted(facts.resources["GPU"] / UNITS, "GPU"))
    parts += [
        f"{amount / UNITS:g} {name}"
        for name, amount in sorted(facts.resources.items())
        if name not in ("CPU", "GPU", "memory")
    ]
    return ", ".join(parts)


def start_card(facts: Facts, notes: Sequence[str] = (), *, static: bool = False) -> Card:
    """What was started (or found running), where its files are, what becomes of it, how to stop it.

    ``static``: without anything that differs from run to run or from machine to machine.
    """
    lived = (
        "was running already; this notebook joined it"
        if facts.started is None
        else f"started in {facts.started:.2f} s"
    )
    if static:
        lived = "was running already" if facts.started is None else "started"
    title = f"Cluster {facts.name!r} {lived}"
    if static:
        rows = [("size", power(facts))]
    else:
        rows = [
            (
                "size",
                f"{power(facts)}, {human(facts.memory)} memory, object store {human(facts.store)} of it",
            ),
            ("logs", facts.log),
            ("spill", facts.spill),
            ("runtime", facts.directory),
        ]
    rows.append(("restart", "a restart of the kernel keeps it and what runs on it"))
    rows.append(("end", _end(facts)))
    rows.append(("stop", "%cluster stop"))
    return _card(title, rows, notes)


def _end(facts: Facts) -> str:
    alone = _duration(facts.ttl)
    if facts.keep:
        return f"it stays when the notebook ends (--keep), and stops {alone} after its last notebook and task"
    return f"it stops with the notebook; after a crash it waits {alone} for you to come back"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"


def _card(title: str, rows: Sequence[tuple[str, str]], notes: Sequence[str]) -> Card:
    width = max(len(name) for name, _ in rows)
    text = "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows), *notes])
    cells = "".join(
        f'<tr><td style="text-align:left;opacity:.7">{html.escape(name)}</td>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    after = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return Card(text, f"<div><strong>{html.escape(title)}</strong><table>{cells}</table>{after}</div>")


@dataclass(frozen=True)
class Status:
    """What a cluster does now. ``available`` as ``Facts.resources``; ``tasks``: state -> how many; ``objects``, ``used``: number, bytes."""

    available: Mapping[str, float]
    tasks: Mapping[str, int]
    actors: int
    workers: int
    objects: int
    used: int


_STATES = ("RUNNING", "DISPATCHED", "QUEUED", "WAITING", "FINISHED", "FAILED", "CANCELLED")


def status_card(
    facts: Facts, status: Status, paths: Iterable[tuple[str, str, int]], *, static: bool = False
) -> Card:
    """``paths``: (what, path, bytes on disk)."""
    cpus = facts.resources.get("CPU", 0) / UNITS
    free = status.available.get("CPU", 0.0)
    done = [f"{status.tasks[state]} {state.lower()}" for state in _STATES if status.tasks.get(state)]
    rows = [
        ("CPUs", f"{free:g} of {cpus:g} free" if not static else f"{cpus:g}"),
        ("tasks", ", ".join(done) or "none yet"),
        ("actors", str(status.actors)),
    ]
    if not static:
        rows += [
            ("workers", f"{status.workers} processes"),
            ("store", f"{human(status.used)} of {human(facts.store)} in {counted(status.objects, 'object')}"),
            *((what, f"{path} ({human(size)})") for what, path, size in paths),
        ]
    return _card(f"Cluster {facts.name!r}", rows, ())


def list_card(clusters: Sequence[Facts], ages: Sequence[float], here: str) -> Card:
    """This user's clusters; ``here``: the directory of the one this notebook is connected to."""
    if not clusters:
        return Card(
            "No cluster is running. Start one: %cluster start",
            "<div>No cluster is running. Start one: <code>%cluster start</code></div>",
        )
    rows = [
        (
            facts.name + (" (this notebook)" if facts.directory == here else ""),
            f"{power(facts)}, {_age(age)} old, {facts.directory}",
        )
        for facts, age in zip(clusters, ages, strict=True)
    ]
    return _card(counted(len(clusters), "cluster"), rows, ())


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def age_of(created: float) -> float:
    """Seconds since a moment of the wall clock."""
    return time.time() - created
