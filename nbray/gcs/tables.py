"""The tables of the GCS as a pure fold: nothing but `Tables` writes them, and every write is a compare-and-swap on one row.

Each operation returns its reply together with the rows it changed; the reply may leave the process only after the rows are on disk
(``nbray.gcs.storage``), and a head that starts again rebuilds the same tables from the rows. A row is (table, key, value) with
bytes for key and value, so that tables can be split by the hash of their keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, assert_never

import msgspec

from nbray.gcs.messages import (
    ALIVE,
    DEAD,
    DRAINING,
    PROTOCOL,
    ActorNamed,
    ActorRecord,
    ActorRemoved,
    EndJob,
    FunctionRecord,
    JobRecord,
    NameBind,
    NameRecord,
    NameUnbind,
    NodeRecord,
    NodeState,
    Op,
    Operation,
    PutFunction,
    RegisterJob,
    RegisterNode,
    TableFilter,
)

FUNCTION_BLOBS = "function_blobs"
"""The table of pickled functions: on disk only, `Tables` keeps their names and sizes."""

SEQUENCES = "sequences"
"""The table of the last batch admitted from each node."""

_JOBS = "jobs"
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.decode
R = TypeVar("R")


class Row(NamedTuple):
    """A row as it is on disk; value None: it is deleted."""

    table: str
    key: bytes
    value: bytes | None


class Outcome(NamedTuple):
    """What an operation answers and what it changed."""

    ok: bool
    data: bytes
    rows: list[Row]


class Tables:
    """Nodes, jobs, names of actors, names of objects, functions and counters of one cluster, and who was answered what."""

    def __init__(self, rows: Iterable[tuple[str, bytes, bytes]] = ()) -> None:
        self.cluster = b""
        self.nodes: dict[str, NodeRecord] = {}
        self.jobs: dict[int, JobRecord] = {}
        self.actors: dict[tuple[str, str], ActorRecord] = {}
        self.names: dict[tuple[str, str], NameRecord] = {}
        self.functions: dict[bytes, FunctionRecord] = {}
        self.counters: dict[str, int] = {}
        self._sequences: dict[str, int] = {}
        self._replies: dict[str, dict[int, tuple[bool, bytes]]] = {}
        for table, key, value in rows:
            self._load(table, key, value)

    # -- nodes

    def register(self, node: RegisterNode) -> tuple[str, list[Row]]:
        """Admit a node's connection: (why not, or empty; the changed rows)."""
        if node.protocol != PROTOCOL:
            return (
                f"the node speaks protocol {node.protocol}, the head {PROTOCOL}: stop the cluster and start it again",
                [],
            )
        if self.cluster and node.cluster != self.cluster:
            return f"this head serves cluster {self.cluster.hex()}, not {node.cluster.hex()}", []
        rows: list[Row] = []
        if not self.cluster:
            self.cluster = node.cluster
            rows.append(Row("cluster", b"id", node.cluster))
        known = self.nodes.get(node.node)
        if known is not None and (
            node.incarnation < known.incarnation
            or (node.incarnation == known.incarnation and known.state == DEAD)
        ):
            return (
                f"incarnation {node.incarnation} of node {node.node} was declared dead or replaced by {known.incarnation}",
                [],
            )
        state, reason = ALIVE, ""
        if known is not None and node.incarnation == known.incarnation:
            state, reason = known.state, known.reason
        elif known is not None:
            rows += self._bury(node.node, node.time)
            rows += [Row("replies", _encode((node.node, n)), None) for n in self._replies.pop(node.node, {})]
            self._sequences.pop(node.node, None)
            rows.append(Row(SEQUENCES, node.node.encode(), None))
        record = NodeRecord(node.node, node.incarnation, state, node.pid, node.resources, node.socket, reason)
        self.nodes[node.node] = record
        rows.append(Row("nodes", node.node.encode(), _encode(record)))
        return "", rows

    def sequence(self, node: str) -> int:
        """The last batch admitted from this node's current incarnation."""
        return self._sequences.get(node, 0)

    def admit(self, node: str, sequence: int) -> Row | None:
        """Take a batch in: the row that goes into its transaction, or None if it was admitted before."""
        if sequence <= self._sequences.get(node, 0):
            return None
        self._sequences[node] = sequence
        return Row(SEQUENCES, node.encode(), _encode(sequence))

    # -- operations

    def operate(self, node: str, op: Op) -> Outcome:
        """Carry out an operation of a registered node; one that it sent before is answered as it was then."""
        replies = self._replies.setdefault(node, {})
        known = replies.get(op.request)
        if known is not None:
            return Outcome(*known, [])
        settled = [n for n in replies if n <= op.settled]
        for number in settled:
            del replies[number]
        outcome = self.apply(node, op.operation)
        replies[op.request] = outcome[:2]
        outcome.rows.extend(Row("replies", _encode((node, number)), None) for number in settled)
        outcome.rows.append(Row("replies", _encode((node, op.request)), _encode(outcome[:2])))
        return outcome

    def apply(self, node: str, operation: Operation) -> Outcome:
        """Carry out an operation on behalf of a node."""
        match operation:
            case RegisterJob():
                return self._register_job(node, operation)
            case EndJob():
                job = self.jobs.get(operation.job)
                if job is None or job.ended:
                    return Outcome(False, b"", [])
                return Outcome(True, b"", [self._end_job(job, operation.time, operation.clean)])
            case ActorNamed():
                return self._name_actor(node, operation)
            case ActorRemoved():
                actor = self.actors.get((operation.namespace, operation.name))
                if actor is None or actor.actor != operation.actor:
                    return Outcome(False, b"", [])
                return Outcome(True, b"", [self._remove_actor(actor)])
            case NameBind():
                return self._bind(operation)
            case NameUnbind():
                name = self.names.get((operation.session, operation.name))
                if name is None or (operation.object and operation.object != name.object):
                    return Outcome(False, b"" if name is None else name.object, [])
                del self.names[operation.session, operation.name]
                return Outcome(
                    True, name.object, [Row("names", _encode((operation.session, operation.name)), None)]
                )
            case NodeState():
                return self._set_state(operation)
            case PutFunction():
                if operation.function in self.functions:
                    return Outcome(False, b"", [])
                function = FunctionRecord(operation.function, operation.name, len(operation.blob))
                self.functions[operation.function] = function
                blob = Row(FUNCTION_BLOBS, operation.function, operation.blob)
                return Outcome(True, b"", [Row("functions", operation.function, _encode(function)), blob])
            case _:
                assert_never(operation)

    # -- questions

    def select(self, what: str, chosen: TableFilter) -> list[Any] | None:
        """The records of a table that match, None if there is no such table."""
        session, namespace, name = chosen.session, chosen.namespace, chosen.name
        match what:
            case "nodes":
                return [r for r in self.nodes.values() if not name or r.node == name]
            case "jobs":
                return [r for r in self.jobs.values() if not session or r.session == session]
            case "named_actors":
                return [
                    r
                    for r in self.actors.values()
                    if (not session or r.session == session)
                    and (not namespace or r.namespace == namespace)
                    and (not name or r.name == name)
                ]
            case "names":
                return [
                    r
                    for r in self.names.values()
                    if (not session or r.session == session) and (not name or r.name == name)
                ]
            case "functions":
                return [r for r in self.functions.values() if not name or r.name == name]
        return None

    # -- inside

    def _load(self, table: str, key: bytes, value: bytes) -> None:
        match table:
            case "cluster":
                self.cluster = value
            case "nodes":
                self.nodes[key.decode()] = _decode(value, type=NodeRecord)
            case "jobs":
                job = _decode(value, type=JobRecord)
                self.jobs[job.job] = job
            case "actors":
                actor = _decode(value, type=ActorRecord)
                self.actors[actor.namespace, actor.name] = actor
            case "names":
                name = _decode(value, type=NameRecord)
                self.names[name.session, name.name] = name
            case "functions":
                self.functions[key] = _decode(value, type=FunctionRecord)
            case "counters":
                self.counters[key.decode()] = _decode(value, type=int)
            case "sequences":
                self._sequences[key.decode()] = _decode(value, type=int)
            case "replies":
                node, number = _decode(key, type=tuple[str, int])
                self._replies.setdefault(node, {})[number] = _decode(value, type=tuple[bool, bytes])
            case _:
                raise ValueError(
                    f"the database has a table {table!r} that this version of nbray does not know"
                )

    def _register_job(self, node: str, operation: RegisterJob) -> Outcome:
        number = self.counters.get(_JOBS, 0) + 1
        self.counters[_JOBS] = number
        job = JobRecord(
            number, operation.session, operation.label, operation.pid, operation.role, node, operation.time
        )
        self.jobs[number] = job
        rows = [Row("counters", _JOBS.encode(), _encode(number)), Row("jobs", _encode(number), _encode(job))]
        return Outcome(True, _encode(number), rows)

    def _end_job(self, job: JobRecord, time: float, clean: bool) -> Row:
        # A job that ended at an unknown time must still count as ended.
        ended = msgspec.structs.replace(job, ended=time or job.started or 1.0, clean=clean)
        self.jobs[job.job] = ended
        return Row("jobs", _encode(job.job), _encode(ended))

    def _name_actor(self, node: str, operation: ActorNamed) -> Outcome:
        key = operation.namespace, operation.name
        known = self.actors.get(key)
        if known is not None and known.actor != operation.actor:
            return Outcome(False, known.info, [])
        actor = ActorRecord(
            operation.namespace,
            operation.name,
            operation.actor,
            operation.info,
            operation.job,
            operation.session,
            operation.detached,
            node,
        )
        self.actors[key] = actor
        return Outcome(True, b"", [Row("actors", _encode(key), _encode(actor))])

    def _remove_actor(self, actor: ActorRecord) -> Row:
        key = actor.namespace, actor.name
        del self.actors[key]
        return Row("actors", _encode(key), None)

    def _bind(self, operation: NameBind) -> Outcome:
        key = operation.session, operation.name
        before = self.names.get(key)
        version = 1 if before is None else before.version + 1
        name = NameRecord(
            operation.session, operation.name, operation.object, operation.job, operation.cell, version
        )
        self.names[key] = name
        return Outcome(
            True, b"" if before is None else before.object, [Row("names", _encode(key), _encode(name))]
        )

    def _set_state(self, operation: NodeState) -> Outcome:
        known = self.nodes.get(operation.node)
        valid = operation.state in (ALIVE, DRAINING, DEAD)
        if known is None or not valid or known.incarnation != operation.incarnation or known.state == DEAD:
            return Outcome(False, b"", [])
        record = msgspec.structs.replace(known, state=operation.state, reason=operation.reason)
        self.nodes[operation.node] = record
        rows = [Row("nodes", operation.node.encode(), _encode(record))]
        if operation.state == DEAD:
            rows += self._bury(operation.node, operation.time)
        return Outcome(True, b"", rows)

    def _bury(self, node: str, time: float) -> list[Row]:
        jobs = [
            self._end_job(job, time, False)
            for job in list(self.jobs.values())
            if job.node == node and not job.ended
        ]
        return jobs + [
            self._remove_actor(actor) for actor in list(self.actors.values()) if actor.node == node
        ]
