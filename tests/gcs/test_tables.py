"""The tables against a model of plain dicts, and against themselves rebuilt from the rows they said to keep."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbray.gcs.messages import (
    ALIVE,
    DEAD,
    DRAINING,
    PROTOCOL,
    ActorNamed,
    ActorRemoved,
    EndJob,
    NameBind,
    NameUnbind,
    NodeState,
    Op,
    Operation,
    PutFunction,
    RegisterJob,
    RegisterNode,
    TableFilter,
)
from nbray.gcs.tables import FUNCTION_BLOBS, Row, Tables

KINDS = ("nodes", "jobs", "named_actors", "names", "functions")
CLUSTER = b"cluster"

few = st.sampled_from
sessions, names, ids = few(["s1", "s2"]), few(["model", "data", "x"]), few([b"a" * 16, b"b" * 16, b"c" * 16])
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(
        RegisterJob,
        session=sessions,
        label=st.just("nb"),
        pid=st.integers(1, 9),
        role=st.just("driver"),
        time=st.just(1.0),
    ),
    st.builds(EndJob, job=st.integers(1, 4), clean=st.booleans(), time=few([0.0, 2.0])),
    st.builds(
        ActorNamed,
        namespace=sessions,
        name=names,
        actor=ids,
        info=ids,
        job=st.integers(1, 4),
        session=sessions,
    ),
    st.builds(ActorRemoved, namespace=sessions, name=names, actor=ids),
    st.builds(NameBind, session=sessions, name=names, object=ids, job=st.integers(1, 4)),
    st.builds(NameUnbind, session=sessions, name=names, object=st.one_of(st.just(b""), ids)),
    st.builds(
        NodeState,
        node=few(["n1", "n2"]),
        incarnation=few([1, 2]),
        state=few([ALIVE, DRAINING, DEAD, "odd"]),
        time=st.just(3.0),
    ),
    st.builds(PutFunction, function=ids, name=names, blob=ids),
)
registrations = st.builds(
    RegisterNode,
    protocol=st.just(PROTOCOL),
    node=few(["n1", "n2"]),
    incarnation=st.integers(1, 3),
    pid=st.just(7),
    cluster=st.just(CLUSTER),
    resources=st.just({"CPU": 20000}),
    time=st.just(2.5),
)
steps = st.lists(st.one_of(st.tuples(few(["n1", "n2"]), operations), registrations), max_size=40)


class Disk:
    """The rows as the database would hold them."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, bytes], bytes] = {}

    def keep(self, rows: list[Row]) -> None:
        for table, key, value in rows:
            if value is None:
                self.rows.pop((table, key), None)
            else:
                self.rows[table, key] = value

    def load(self) -> Tables:
        return Tables((t, k, v) for (t, k), v in self.rows.items() if t != FUNCTION_BLOBS)


class Model:
    """What the operations promise, in the plainest form."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[int, str]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.actors: dict[tuple[str, str], tuple[bytes, bytes, str]] = {}
        self.names: dict[tuple[str, str], bytes] = {}
        self.functions: dict[bytes, bytes] = {}

    def bury(self, node: str) -> None:
        for job in self.jobs:
            if job["node"] == node and not job["ended"]:
                job["ended"] = True
        self.actors = {k: v for k, v in self.actors.items() if v[2] != node}

    def register(self, node: str, incarnation: int) -> bool:
        known, state = self.nodes.get(node, (0, ALIVE))
        if incarnation < known or (incarnation == known and state == DEAD):
            return False
        if incarnation > known:
            if known:
                self.bury(node)
            self.nodes[node] = (incarnation, ALIVE)
        return True

    def apply(self, node: str, operation: Operation) -> tuple[bool, bytes]:
        match operation:
            case RegisterJob():
                self.jobs.append({"node": node, "session": operation.session, "ended": False})
                return True, msgspec.msgpack.encode(len(self.jobs))
            case EndJob():
                if operation.job > len(self.jobs) or self.jobs[operation.job - 1]["ended"]:
                    return False, b""
                self.jobs[operation.job - 1]["ended"] = True
                return True, b""
            case ActorNamed():
                key = operation.namespace, operation.name
                if key in self.actors and self.actors[key][0] != operation.actor:
                    return False, self.actors[key][1]
                self.actors[key] = operation.actor, operation.info, node
                return True, b""
            case ActorRemoved():
                key = operation.namespace, operation.name
                if key not in self.actors or self.actors[key][0] != operation.actor:
                    return False, b""
                del self.actors[key]
                return True, b""
            case NameBind():
                before = self.names.get((operation.session, operation.name), b"")
                self.names[operation.session, operation.name] = operation.object
                return True, before
            case NameUnbind():
                before = self.names.get((operation.session, operation.name), b"")
                if not before or operation.object not in (b"", before):
                    return False, before
                del self.names[operation.session, operation.name]
                return True, before
            case NodeState():
                known, state = self.nodes.get(operation.node, (0, DEAD))
                if known != operation.incarnation or state == DEAD or operation.state == "odd":
                    return False, b""
                self.nodes[operation.node] = known, operation.state
                if operation.state == DEAD:
                    self.bury(operation.node)
                return True, b""
            case PutFunction():
                if operation.function in self.functions:
                    return False, b""
                self.functions[operation.function] = operation.blob
                return True, b""


def everything(tables: Tables) -> dict[str, Any]:
    return {kind: sorted(tables.select(kind, TableFilter()) or [], key=repr) for kind in KINDS}


@given(steps)
def test_tables_do_what_the_model_does_and_can_be_rebuilt_after_every_step(
    script: list[tuple[str, Operation] | RegisterNode],
) -> None:
    tables, disk, model = Tables(), Disk(), Model()
    for step in script:
        if isinstance(step, RegisterNode):
            error, rows = tables.register(step)
            assert (error == "") == model.register(step.node, step.incarnation), error
        else:
            ok, data, rows = tables.apply(*step)
            assert (ok, data) == model.apply(*step)
        disk.keep(rows)
        assert everything(disk.load()) == everything(tables)
    assert {k: (r.incarnation, r.state) for k, r in tables.nodes.items()} == model.nodes
    assert [(j.node, j.session, bool(j.ended)) for j in tables.jobs.values()] == [
        (j["node"], j["session"], j["ended"]) for j in model.jobs
    ]
    assert {k: (r.actor, r.info, r.node) for k, r in tables.actors.items()} == model.actors
    assert {k: r.object for k, r in tables.names.items()} == model.names
    assert {k: v for (t, k), v in disk.rows.items() if t == FUNCTION_BLOBS} == model.functions


@given(st.lists(operations, min_size=1, max_size=20), st.data())
def test_an_operation_sent_again_is_answered_as_before_and_changes_nothing(
    script: list[Operation], data: st.DataObject
) -> None:
    tables, disk = Tables(), Disk()
    answers: list[tuple[bool, bytes]] = []
    settled = 0
    for number, operation in enumerate(script, 1):
        settled = data.draw(st.integers(settled, number - 1))
        ok, answer, rows = tables.operate("n1", Op(number, settled, operation))
        answers.append((ok, answer))
        disk.keep(rows)
        if data.draw(st.booleans()):
            tables = disk.load()
        before = everything(tables)
        again = data.draw(st.integers(settled + 1, number))
        assert tables.operate("n1", Op(again, settled, script[again - 1])) == (*answers[again - 1], [])
        assert everything(tables) == before
    kept = [k for (t, k) in disk.rows if t == "replies"]
    assert len(kept) == len(script) - settled


def test_job_numbers_never_come_back() -> None:
    tables, disk = Tables(), Disk()
    numbers = []
    for _ in range(3):
        _, data, rows = tables.apply("n1", RegisterJob("s", "nb", 1, "driver"))
        disk.keep(rows)
        numbers.append(msgspec.msgpack.decode(data))
        tables = disk.load()
    assert numbers == [1, 2, 3]


def node(incarnation: int = 1, cluster: bytes = CLUSTER, protocol: int = PROTOCOL) -> RegisterNode:
    return RegisterNode(protocol, "n1", incarnation, 7, cluster, {})


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (node(1), "incarnation 1 of node n1 was declared dead or replaced by 2"),
        (node(2, cluster=b"other"), f"serves cluster {CLUSTER.hex()}, not {b'other'.hex()}"),
        (node(2, protocol=PROTOCOL + 1), "stop the cluster and start it again"),
    ],
)
def test_a_node_that_is_refused_is_told_why(late: RegisterNode, words: str) -> None:
    tables = Tables()
    assert tables.register(node(2))[0] == ""
    error, rows = tables.register(late)
    assert words in error
    assert rows == []


def test_batches_are_admitted_once_and_a_new_incarnation_counts_anew() -> None:
    tables, disk = Tables(), Disk()
    disk.keep(tables.register(node(1))[1])
    for sequence in (1, 2, 3):
        row = tables.admit("n1", sequence)
        assert row is not None
        disk.keep([row])
    assert tables.admit("n1", 2) is None
    again = disk.load()
    assert again.sequence("n1") == 3
    assert again.admit("n1", 3) is None
    disk.keep(again.register(node(2))[1])
    assert again.sequence("n1") == disk.load().sequence("n1") == 0


def test_select_narrows_by_what_is_given() -> None:
    tables = Tables()
    for session, name in (("s1", "x"), ("s1", "y"), ("s2", "x")):
        tables.apply("n1", NameBind(session, name, b"o" * 20, 1))
        tables.apply("n1", ActorNamed(session, name, b"a" * 16, b"", 1, session))
    for kind in ("names", "named_actors"):
        found = tables.select(kind, TableFilter(session="s1"))
        assert found is not None
        assert [r.name for r in found] == ["x", "y"]
        found = tables.select(kind, TableFilter(session="s2", name="x"))
        assert found is not None
        assert [(r.session, r.name) for r in found] == [("s2", "x")]
    assert tables.select("unheard of", TableFilter()) is None


def test_a_row_of_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="'planets'"):
        Tables([("planets", b"k", b"v")])
