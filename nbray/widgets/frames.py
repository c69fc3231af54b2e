"""Changes of a graph as packed binary frames; ``extension/src/frames.ts`` reads them. Pure.

A frame, little endian (u: unsigned integer, f: float, then its bits)::

    header  u32[10]  magic, flags, sequence, first node, nodes, first edge, edges, changes, bytes of words, 0
            f64      the moment of the frame
    nodes   u32 group
    edges   u32 source, u32 target
    changes u32 node, f32 start, f32 run time
    nodes   u8 kind
    edges   u8 kind
    changes u8 state, u8 attempt
    words   JSON: {"groups": [[name, title, actor], ...], "errors": {node: class}}, either may be missing

Each line is one array per column, new nodes and edges are numbered on from the first one. A new node is also a change, and comes with all edges to it. Times are seconds since the
graph's origin, run times seconds; -1 for what has not happened. `RESET` means: forget what you have. Sequence numbers count up by one;
who misses one asks for the whole.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nbray.state.graph import Graph

MAGIC = 0x3147424E
RESET = 1
HEADER = struct.Struct("<10Id")
MOST = 8_000
"""Changes of one frame, and edges unless one node has more: it stays below 256 KB."""


@dataclass
class Mark:
    """How much of a graph somebody has: so many nodes, edges, groups; the sequence number of the next frame."""

    nodes: int = 0
    edges: int = 0
    groups: int = 0
    sequence: int = 0


def frames(
    graph: Graph, mark: Mark, changed: Sequence[int], *, origin: float, now: float, reset: bool = False
) -> list[bytes]:
    """What brings a reader from ``mark`` (which moves on) to the graph's present. ``changed``: older nodes that have changed; may hold new ones.

    ``origin``, ``now``: seconds of the host's monotonic clock. ``reset``: the reader is to start from nothing. Empty when there is nothing to say.
    """
    if reset:
        mark.nodes = mark.edges = mark.groups = 0
    older = [] if reset else [node for node in changed if node < mark.nodes]
    found: list[bytes] = []
    first = reset
    while first or older or mark.nodes < len(graph) or mark.groups < len(graph.groups):
        changes = older[:MOST]
        older = older[MOST:]
        last = mark.nodes if older else min(len(graph), mark.nodes + MOST - len(changes))
        over = mark.edges + MOST
        if over < len(graph.targets):
            # A reader places a node when it comes: all edges to it are in its frame.
            last = max(min(last, graph.targets[over]), min(last, mark.nodes + 1))
        changes += range(mark.nodes, last)
        stop = mark.edges
        while stop < len(graph.targets) and graph.targets[stop] < last:
            stop += 1
        found.append(_frame(graph, mark, changes, last, stop, origin, now, RESET if first else 0))
        first = False
    return found


def _frame(
    graph: Graph, mark: Mark, changes: list[int], last: int, stop: int, origin: float, now: float, flags: int
) -> bytes:
    nodes, edges = slice(mark.nodes, last), slice(mark.edges, stop)
    words: dict[str, object] = {}
    if mark.groups < len(graph.groups):
        words["groups"] = [
            [group.name, group.title, int(group.actor)] for group in graph.groups[mark.groups :]
        ]
    errors = {str(node): graph.errors[node] for node in changes if node in graph.errors}
    if errors:
        words["errors"] = errors
    text = msgspec.json.encode(words) if words else b""
    started = array("f", [graph.started[n] - origin if graph.started[n] else -1.0 for n in changes])
    seconds = array("f", [graph.seconds(n) if graph.finished[n] else -1.0 for n in changes])
    header = HEADER.pack(
        MAGIC, flags, mark.sequence, mark.nodes, last - mark.nodes, mark.edges, stop - mark.edges, len(changes), len(text), 0, now - origin,
    )  # fmt: skip
    data = b"".join(
        (
            header,
            graph.groups_of[nodes].tobytes(),
            graph.sources[edges].tobytes(),
            graph.targets[edges].tobytes(),
            array("I", changes).tobytes(),
            started.tobytes(),
            seconds.tobytes(),
            graph.kinds[nodes],
            graph.edge_kinds[edges],
            bytes([graph.states[n] for n in changes]),
            bytes([graph.attempts[n] for n in changes]),
            text,
        )
    )
    mark.nodes, mark.edges, mark.groups, mark.sequence = last, stop, len(graph.groups), mark.sequence + 1
    return data
