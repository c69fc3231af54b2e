"""What names of sessions hold, in the machine of a node: no processes."""

from __future__ import annotations

import msgspec
import pytest

from nbray.gcs.client import GcsClient
from nbray.gcs.messages import PROTOCOL, RegisterNode
from nbray.messages import DRIVER, Bound, Bye, Create, Drop, Free, Put, Query, Reply, Seal, Take, Unbind
from nbray.node import names as held
from nbray.node.machine import NodeConfig, NodeMachine
from nbray.node.names import Save
from nbray.node.peer import Peer

CLUSTER = b"cluster of tests"


class Node:
    """A node without a shell, and drivers that speak to it."""

    def __init__(self, data: str = "") -> None:
        config = NodeConfig("node", "test", CLUSTER, {"CPU": 10_000}, 1 << 20, 1 << 23, ttl=10.0, data=data)
        gcs = GcsClient(RegisterNode(PROTOCOL, "node", 1, 1, CLUSTER, {}))
        self.machine = NodeMachine(config, gcs, 100.0)
        self.count = 0

    def driver(self, session: str = "book", job: int = 1) -> Peer:
        self.count += 1
        peer = self.machine.connected(self.count)
        peer.role, peer.session, peer.job, peer.cell = DRIVER, session, job, f"In[{job}] - digest k-1"
        self.machine.drivers += 1
        return peer

    def say(self, peer: Peer, *messages: object) -> None:
        self.machine.receive(peer, messages, 100.0)
        self.machine.settle(100.0)
        self.machine.check()

    def put(self, peer: Peer, number: int, refs: list[bytes] | None = None) -> bytes:
        """A small object that only its names will hold."""
        object_id = bytes(19) + bytes([number])
        self.say(peer, Put(object_id, 3, b"x" * 10, refs))
        return object_id

    def bind(self, peer: Peer, version: int, **names: bytes) -> None:
        self.say(
            peer,
            Bound(b"", 0, version, list(names), list(names.values()), [10] * len(names), []),
            Drop(list(names.values())),
        )

    def there(self, object_id: bytes) -> bool:
        return object_id in self.machine.objects.objects

    def names(self, session: str = "") -> dict[str, str]:
        return {row.name: row.state for row in self.machine.names.rows(session)}

    def saves(self) -> list[Save]:
        return [effect for effect in self.machine.effects if isinstance(effect, Save)]


def test_a_name_holds_its_object_until_it_is_unbound() -> None:
    node = Node()
    driver = node.driver()
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value, same=value)
    node.say(driver, Unbind(["x"], 1))
    assert node.there(value)
    node.say(driver, Unbind(["same"], 1))
    assert not node.there(value)
    assert node.names() == {}


def test_a_later_binding_lets_the_earlier_object_go_and_an_earlier_one_changes_nothing() -> None:
    node = Node()
    driver = node.driver()
    first, second, late = (node.put(driver, number) for number in (1, 2, 3))
    node.bind(driver, 1, x=first)
    node.bind(driver, 3, x=second)
    assert not node.there(first)
    node.bind(driver, 2, x=late)
    assert node.there(second)
    assert not node.there(late)
    node.say(driver, Unbind(["x"], 2))
    assert node.there(second)


def test_a_crash_takes_no_name_and_a_goodbye_does() -> None:
    node = Node()
    driver = node.driver()
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value)
    node.machine.disconnected(driver, 100.0)
    node.machine.tick(100.0 + 3600.0)
    assert node.names("book") == {"x": "READY"}
    again = node.driver(job=2)
    node.machine._leave(again)
    assert not node.there(value)


def test_keep_outlasts_a_goodbye() -> None:
    node = Node()
    driver = node.driver()
    driver.keep = True
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value)
    node.machine._leave(driver)
    assert node.names() == {"x": "READY"}


def test_free_takes_the_names_with_it() -> None:
    node = Node()
    driver = node.driver()
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value, y=value)
    node.say(driver, Free([value]))
    assert node.names() == {}
    assert not node.there(value)


def test_sessions_do_not_meet() -> None:
    node = Node()
    one, other = node.driver("one"), node.driver("other", 2)
    mine, theirs = node.put(one, 1), node.put(other, 2)
    node.bind(one, 1, x=mine)
    node.bind(other, 1, x=theirs)
    node.say(one, Unbind(["x"], 9))
    assert node.there(theirs)
    assert node.names("other") == {"x": "READY"}
    assert node.machine.name_of(held._holder(("other", "x"))) == "variable x of other"


def test_a_name_that_is_taken_belongs_to_the_later_job() -> None:
    node = Node()
    driver = node.driver()
    node.bind(driver, 1, x=node.put(driver, 1))
    node.machine.disconnected(driver, 100.0)
    later = node.driver(job=2)
    (row,) = node.machine.names.rows()
    assert (row.job, row.live) == (1, False)
    node.say(later, Take(["x"]))
    (row,) = node.machine.names.rows()
    assert (row.job, row.live) == (2, True)


def test_the_head_is_told() -> None:
    node = Node()
    driver = node.driver()
    node.bind(driver, 1, x=node.put(driver, 1))
    node.say(driver, Unbind(["x"], 1))
    told = [type(r.message.operation).__name__ for r in node.machine.gcs._requests.values()]  # type: ignore[union-attr]
    assert told == ["NameBind", "NameUnbind"]


# -- to disk


def answer(node: Node, peer: Peer) -> list[list[str]]:
    (reply,) = [message for message in peer.out if isinstance(message, Reply)]
    peer.out.clear()
    return msgspec.msgpack.decode(reply.data, type=list[list[str]])


def test_keep_saves_each_object_once_and_answers_when_it_is_done() -> None:
    node = Node("/data")
    driver = node.driver()
    value, other = node.put(driver, 1), node.put(driver, 2)
    node.bind(driver, 1, x=value, y=value, z=other)
    node.say(driver, Query(7, "keep", msgspec.msgpack.encode(["x", "y", "nothing"])))
    (save,) = node.saves()
    assert ([name.name for name in save.names], save.data, save.kept) == (["x", "y"], b"x" * 10, True)
    assert not driver.out
    node.machine.names.saved(value, "")
    assert answer(node, driver) == [["x", ""], ["y", ""], ["nothing", "the cluster does not hold it"]]


def test_keep_says_what_cannot_be_saved() -> None:
    node = Node("/data")
    driver = node.driver()
    inner = node.put(driver, 1)
    node.bind(driver, 1, x=node.put(driver, 2, [inner]), y=node.put(driver, 3))
    node.say(driver, Query(7, "keep", msgspec.msgpack.encode(["x", "y"])))
    node.machine.names.saved(bytes(19) + b"\3", "No space left on device")
    assert answer(node, driver) == [
        ["x", "it mentions other objects of the cluster (refs or handles)"],
        ["y", "No space left on device"],
    ]
    elsewhere = Node()
    driver = elsewhere.driver()
    elsewhere.bind(driver, 1, x=elsewhere.put(driver, 1))
    elsewhere.say(driver, Query(7, "keep", msgspec.msgpack.encode(["x"])))
    assert answer(elsewhere, driver) == [["x", "there is no directory for it; set NBRAY_DATA_DIR"]]


def test_what_is_being_saved_stays_where_it_is() -> None:
    node = Node("/data")
    driver = node.driver()
    large = bytes(19) + b"\1"
    node.say(driver, Create(1, large, 100_000))
    node.say(driver, Seal(large, 3))
    node.bind(driver, 1, x=large)
    node.say(driver, Query(7, "keep", msgspec.msgpack.encode(["x"])))
    (save,) = node.saves()
    assert (save.size, save.data) == (100_000, None)
    node.say(driver, Unbind(["x"], 1))
    assert node.there(large)
    node.machine.names.saved(large, "")
    assert not node.there(large)


def test_before_its_time_is_over_a_cluster_saves_what_names_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node("/data")
    driver = node.driver()
    old, new = node.put(driver, 1), node.put(driver, 2)
    node.bind(driver, 1, old=old)
    node.bind(driver, 2, new=new)
    node.machine.disconnected(driver, 100.0)
    node.machine.effects.clear()
    monkeypatch.setattr(held, "SAVED_LIMIT", 15)
    node.machine.tick(111.0)
    (save,) = node.saves()
    assert ([name.name for name in save.names], save.kept) == (["new"], False)
    assert not node.machine.stopping
    node.machine.tick(112.0)
    node.machine.names.saved(new, "")
    assert "nobody used it" in node.machine.stopping


def test_a_goodbye_may_save_first() -> None:
    node = Node("/data")
    driver, other = node.driver(), node.driver("other", 2)
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value)
    node.say(driver, Bye(1, True, False, True, True))
    assert not node.machine.stopping
    (save,) = node.saves()
    assert save.session == "book"
    node.machine.names.saved(value, "")
    assert not node.there(value)
    node.say(other, Bye(1, True, False, True, True))
    assert node.machine.stopping


def test_somebody_who_comes_while_it_saves_keeps_the_cluster() -> None:
    node = Node("/data")
    driver = node.driver()
    value = node.put(driver, 1)
    node.bind(driver, 1, x=value)
    node.machine.disconnected(driver, 100.0)
    node.machine.tick(111.0)
    node.driver(job=2)
    node.machine.names.saved(value, "")
    assert not node.machine.stopping
