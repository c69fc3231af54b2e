"""Waits that could never end raise an error that names the circle; waits that can, do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.objects.states import eventually

SECONDS = 10.0


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[Any]:
    """A cluster with one CPU, one GPU and two of a resource of its own."""
    import nbray

    nbray.init(num_cpus=1, num_gpus=1, resources={"license": 2}, name="one")
    try:
        yield nbray
    finally:
        nbray.shutdown()


@pytest.fixture
def nbray(one_cpu: Any) -> Any:
    return one_cpu


def deadlock(nbray: Any, ref: Any) -> str:
    start = time.monotonic()
    with pytest.raises(nbray.exceptions.DeadlockError) as caught:
        nbray.get(ref, timeout=SECONDS * 3)
    assert time.monotonic() - start < SECONDS
    return str(caught.value)


def test_an_actor_that_waits_for_its_own_queued_call(nbray: Any) -> None:
    @nbray.remote
    class Selfish:
        def outer(self, me: Any) -> Any:
            return nbray.get(me.inner.remote())

        def inner(self) -> int:
            return 1

    selfish = Selfish.remote()
    text = deadlock(nbray, selfish.outer.remote(selfish))
    assert "Selfish.inner" in text
    assert "is queued at its actor behind" in text
    assert "Selfish.outer" in text
    assert "waits in get or wait for" in text
    assert nbray.get(selfish.inner.remote()) == 1


def test_two_actors_that_call_one_another(nbray: Any) -> None:
    @nbray.remote
    class Side:
        def meet(self, mine: Any, other: Any) -> Any:
            return nbray.get(other.answer.remote(other, mine))

        def answer(self, mine: Any, other: Any) -> Any:
            return nbray.get(other.end.remote())

        def end(self) -> int:
            return 1

    left, right = Side.remote(), Side.remote()
    text = deadlock(nbray, left.meet.remote(left, right))
    for name in ("Side.meet", "Side.answer", "Side.end"):
        assert name in text
    assert nbray.get([left.end.remote(), right.end.remote()]) == [1, 1]


@pytest.mark.parametrize("options", [{"num_gpus": 1}, {"resources": {"license": 2}}], ids=["gpu", "license"])
def test_a_child_needs_what_its_blocked_parent_holds(nbray: Any, options: dict[str, Any]) -> None:
    @nbray.remote(**options)
    def child() -> int:
        return 1

    @nbray.remote(**options)
    def parent() -> Any:
        return nbray.get(child.remote())

    text = deadlock(nbray, parent.remote())
    assert "child" in text
    assert "parent" in text
    assert ("1 GPU" if "num_gpus" in options else "2 license") in text
    assert "held by" in text
    assert nbray.get(child.remote()) == 1


def test_the_error_can_be_caught_and_the_program_goes_on(nbray: Any) -> None:
    @nbray.remote(num_gpus=1)
    def child() -> int:
        return 1

    @nbray.remote(num_gpus=1)
    def parent() -> Any:
        ref = child.remote()
        try:
            nbray.get(ref)
        except nbray.exceptions.DeadlockError:
            return [ref]
        return None

    boxed = nbray.get(parent.remote(), timeout=SECONDS)
    assert nbray.get(boxed[0], timeout=SECONDS) == 1


def test_wait_is_a_wait_too(nbray: Any) -> None:
    @nbray.remote
    class Selfish:
        def outer(self, me: Any) -> Any:
            return len(nbray.wait([me.inner.remote()])[0])

        def inner(self) -> int:
            return 1

    selfish = Selfish.remote()
    deadlock(nbray, selfish.outer.remote(selfish))


def test_a_wait_with_a_timeout_is_left_to_it(nbray: Any) -> None:
    """It can end: nothing is wrong with looking for a while."""

    @nbray.remote
    class Patient:
        def outer(self, me: Any) -> tuple[int, int]:
            ref = me.inner.remote()
            ready, waiting = nbray.wait([ref], timeout=1.2)
            return len(ready), len(waiting)

        def inner(self) -> int:
            return 1

    patient = Patient.remote()
    assert nbray.get(patient.outer.remote(patient), timeout=SECONDS) == (0, 1)


def test_an_idle_actor_holds_what_its_maker_asks_for(nbray: Any) -> None:
    @nbray.remote(num_gpus=1)
    class Holder:
        def ready(self) -> int:
            return 1

    @nbray.remote(num_gpus=1)
    def child() -> int:
        return 2

    @nbray.remote
    def parent() -> Any:
        holder = Holder.remote()
        nbray.get(holder.ready.remote())
        return nbray.get(child.remote())

    text = deadlock(nbray, parent.remote())
    assert "1 GPU" in text
    assert nbray.get(child.remote(), timeout=SECONDS) == 2


def test_items_of_a_generator_that_cannot_start(nbray: Any) -> None:
    @nbray.remote(num_gpus=1, num_returns="streaming")
    def items() -> Iterator[int]:
        yield 1

    @nbray.remote(num_gpus=1)
    def parent(how: str) -> Any:
        stream = items.remote()
        return nbray.wait([stream]) if how == "wait" else [nbray.get(ref) for ref in stream]

    for how in ("wait", "next"):
        deadlock(nbray, parent.remote(how))


# -- no false alarms


def test_waiting_for_one_of_several_of_which_another_cannot_come(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote(num_cpus=0)
    def slow() -> int:
        while not gate.exists():
            time.sleep(0.01)
        return 7

    @nbray.remote
    class Actor:
        def inner(self) -> int:
            return 1

        def outer(self, me: Any) -> Any:
            own = me.inner.remote()
            ready, _ = nbray.wait([own, slow.remote()])
            return nbray.get(ready[0])

    actor = Actor.remote()
    ref = actor.outer.remote(actor)
    ready, _ = nbray.wait([ref], timeout=1.3)
    assert not ready
    gate.touch()
    assert nbray.get(ref, timeout=SECONDS) == 7


def test_a_generator_in_a_task_on_one_cpu(nbray: Any) -> None:
    @nbray.remote(num_returns="streaming")
    def items() -> Iterator[int]:
        yield from range(5)

    @nbray.remote
    def total(how: str) -> int:
        stream = items.remote()
        if how == "wait":
            nbray.wait([stream])
        return sum(nbray.get(ref) for ref in stream)

    assert nbray.get([total.remote("wait"), total.remote("next")], timeout=SECONDS) == [10, 10]


def test_deep_nesting_on_one_cpu(nbray: Any) -> None:
    @nbray.remote
    def depth(n: int) -> int:
        return 0 if n == 0 else 1 + nbray.get(depth.remote(n - 1))

    assert nbray.get(depth.remote(30), timeout=60) == 30


def test_wide_nesting_on_one_cpu(nbray: Any) -> None:
    @nbray.remote
    def leaf(n: int) -> int:
        return n

    @nbray.remote
    def middle(n: int) -> int:
        return sum(nbray.get([leaf.remote(n * 10 + i) for i in range(10)]))

    @nbray.remote
    def top() -> int:
        return sum(nbray.get([middle.remote(n) for n in range(10)]))

    assert nbray.get(top.remote(), timeout=60) == sum(range(100))


def test_a_task_waits_for_a_call_that_runs(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote(num_cpus=0)
    class Slow:
        def work(self) -> int:
            while not gate.exists():
                time.sleep(0.01)
            return 5

    @nbray.remote
    def ask(slow: Any) -> int:
        return nbray.get(slow.work.remote()) + 1

    slow = Slow.remote()
    ref = ask.remote(slow)
    # Longer than the node looks for circles, twice.
    ready, _ = nbray.wait([ref], timeout=1.3)
    assert not ready
    gate.touch()
    assert nbray.get(ref, timeout=SECONDS) == 6


def test_waiting_for_a_resource_that_somebody_else_will_give_back(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"

    @nbray.remote(num_cpus=0, resources={"license": 2})
    def holder() -> int:
        while not gate.exists():
            time.sleep(0.01)
        return 1

    @nbray.remote(num_cpus=0, resources={"license": 1})
    def child() -> int:
        return 2

    @nbray.remote
    def parent() -> Any:
        return nbray.get(child.remote())

    first = holder.remote()
    second = parent.remote()
    ready, _ = nbray.wait([second], timeout=1.3)
    assert not ready
    gate.touch()
    assert nbray.get([first, second], timeout=SECONDS) == [1, 2]


def test_waiting_for_workers_to_start(nbray: Any) -> None:
    """Each of these blocks at once, so that each needs a process more."""

    @nbray.remote
    def chain(n: int) -> int:
        return n if n == 0 else nbray.get(chain.remote(n - 1))

    assert nbray.get([chain.remote(6) for _ in range(5)], timeout=60) == [0] * 5


def test_an_async_actor_may_call_itself(nbray: Any) -> None:
    @nbray.remote
    class Async:
        async def outer(self, me: Any) -> int:
            return (await me.inner.remote()) + 1

        async def inner(self) -> int:
            return 1

    actor = Async.remote()
    assert nbray.get(actor.outer.remote(actor), timeout=SECONDS) == 2


def test_a_threaded_actor_may_call_itself(nbray: Any) -> None:
    @nbray.remote(max_concurrency=2)
    class Threaded:
        def outer(self, me: Any) -> int:
            return nbray.get(me.inner.remote()) + 1

        def inner(self) -> int:
            return 1

    actor = Threaded.remote()
    assert nbray.get(actor.outer.remote(actor), timeout=SECONDS) == 2


def test_a_call_back_to_the_actor_that_waits_elsewhere(nbray: Any) -> None:
    """The actor's own method does not wait: it hands the ref back."""

    @nbray.remote
    class Boss:
        def start(self, me: Any) -> list[Any]:
            return [helper.remote(me)]

        def fact(self) -> int:
            return 42

    @nbray.remote
    def helper(boss: Any) -> int:
        return nbray.get(boss.fact.remote())

    boss = Boss.remote()
    assert nbray.get(nbray.get(boss.start.remote(boss))[0], timeout=SECONDS) == 42


# -- what can never run


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"num_cpus": 3}, "3 CPU"),
        ({"num_gpus": 2}, "2 GPU"),
        ({"resources": {"tpu": 1}}, "1 tpu"),
        ({"resources": {"license": 2.5}}, "2.5 license"),
        ({"memory": 1 << 50}, "1048576.00 GiB memory"),
    ],
)
def test_resources_that_no_node_has(nbray: Any, options: dict[str, Any], asked: str) -> None:
    @nbray.remote(**options)
    def task() -> None: ...

    @nbray.remote(**options)
    class Actor:
        def method(self) -> None: ...

    for ref in (task.remote(), Actor.remote().method.remote()):
        start = time.monotonic()
        with pytest.raises(nbray.exceptions.UnschedulableError) as caught:
            nbray.get(ref, timeout=SECONDS)
        assert time.monotonic() - start < 2
        text = str(caught.value)
        assert asked in text
        assert "1 CPU" in text
        assert "2 license" in text
        assert "nbray.init" in text
        del caught


# -- order and revocation


def test_what_waits_behind_a_polling_task_runs_elsewhere(nbray: Any) -> None:
    """The first task polls an actor for a flag that the second, dispatched ahead behind it, sets."""

    @nbray.remote(num_cpus=0)
    class Flag:
        def __init__(self) -> None:
            self.value = False

        def set(self) -> None:
            self.value = True

        def get(self) -> bool:
            return self.value

    @nbray.remote
    def step(flag: Any, what: str) -> int:
        if what == "poll":
            polls = 1
            while not nbray.get(flag.get.remote()):
                polls += 1
            return polls
        if what == "set":
            nbray.get(flag.set.remote())
        return 0

    flag = Flag.remote()
    # Short so far, so that tasks are dispatched ahead.
    nbray.get([step.remote(flag, "") for _ in range(200)])
    results = [step.remote(flag, what) for what in ("poll", "", "set", "")]
    assert nbray.get(results, timeout=SECONDS)[0] >= 1


def test_what_waits_behind_a_task_that_computes_for_long_runs_elsewhere(nbray: Any, tmp_path: Path) -> None:
    """It never blocks in nbray: only its time tells."""
    gate = tmp_path / "go"

    @nbray.remote(num_cpus=0.5)
    def step(what: str) -> str:
        if what == "spin":
            deadline = time.monotonic() + SECONDS
            while not gate.exists():
                assert time.monotonic() < deadline, "nobody opened the gate"
        elif what == "open":
            gate.touch()
        return what

    nbray.get([step.remote("") for _ in range(200)])
    names = ["spin", *[""] * 14, "open"]
    assert nbray.get([step.remote(name) for name in names], timeout=SECONDS * 2) == names


def test_a_larger_priority_goes_first(nbray: Any, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    log = tmp_path / "log"

    @nbray.remote
    def hold() -> None:
        while not gate.exists():
            time.sleep(0.005)

    @nbray.remote
    def note(name: str) -> None:
        with log.open("a") as file:
            file.write(name)

    holding = hold.remote()
    eventually(lambda: nbray.state.tasks(name="hold", state="RUNNING").num_rows, "the CPU is taken")
    refs = [
        note.options(priority=priority).remote(name)
        for name, priority in zip("abcdef", (0, 5, -1, 5, 9, 0), strict=True)
    ]
    gate.touch()
    nbray.get([holding, *refs], timeout=SECONDS)
    assert log.read_text() == "ebdafc"


def test_a_waited_for_task_goes_before_what_was_queued_earlier(nbray: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    gate = tmp_path / "go"

    @nbray.remote
    def note(name: str) -> str:
        with log.open("a") as file:
            file.write(name)
        return name

    @nbray.remote
    def parent() -> str:
        while not gate.exists():
            time.sleep(0.005)
        return nbray.get(note.remote("c"))

    first = parent.remote()
    eventually(lambda: nbray.state.tasks(name="parent", state="RUNNING").num_rows, "the parent runs")
    rest = [note.remote("x") for _ in range(20)]
    eventually(lambda: nbray.state.tasks(name="note", state="QUEUED").num_rows >= 20, "the others are queued")
    gate.touch()
    assert nbray.get(first, timeout=SECONDS) == "c"
    nbray.get(rest, timeout=SECONDS)
    assert log.read_text().startswith("c")


def test_the_number_of_processes_follows_depth_not_breadth(nbray: Any) -> None:
    @nbray.remote
    def leaf(n: int) -> int:
        return n

    @nbray.remote
    def wide(n: int) -> int:
        return sum(nbray.get([leaf.remote(i) for i in range(n)]))

    assert nbray.get([wide.remote(100) for _ in range(30)], timeout=60) == [4950] * 30
    alive = [row for row in nbray.state.workers().to_pylist() if row["state"] != "ENDED"]
    # One that runs leaves, the parents that wait, spares; without order it would be thirty parents at once.
    assert len(alive) < 50
