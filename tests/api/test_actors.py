"""Actors on a real cluster: handles, order, lifetime, names, modes, ends."""

# mypy: disable-error-code="attr-defined"
# (mypy does not look at what a class decorator returns)

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbray
from nbray.errors import (
    ActorAlreadyExistsError,
    ActorDiedError,
    ActorUnavailableError,
    PendingCallsLimitExceededError,
    SerializationError,
)


@nbray.remote
class Counter:
    """Counts."""

    step = 1

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int = 1) -> int:
        """Add to it."""
        self.value += amount
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise KeyError("inside")

    @nbray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.value, -self.value

    def count(self, n: int) -> Iterator[int]:
        for i in range(n):
            self.value += 1
            yield i

    @staticmethod
    def fixed(x: int) -> int:
        return x * 10

    @classmethod
    def name_of(cls) -> str:
        return cls.__name__

    def leave(self) -> None:
        nbray.exit_actor()

    def __len__(self) -> int:
        return self.value


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time limit"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- classes and handles


def test_class_keeps_its_looks() -> None:
    assert Counter.__name__ == "Counter"
    assert Counter.__doc__ == "Counts."
    assert str(inspect.signature(Counter)) == "(start: 'int' = 0) -> 'None'"
    assert Counter.__wrapped__(3).add() == 4
    assert repr(Counter.options(num_cpus=1)) == "<ActorClass Counter (num_cpus=1)>"


def test_class_is_not_called() -> None:
    with pytest.raises(TypeError, match=r"Counter\.remote\(\.\.\.\)"):
        Counter()


def test_inheriting_from_an_actor_class(shared_cluster: Any) -> None:
    class Plain(Counter):
        def add(self, amount: int = 1) -> int:
            return super().add(amount * 2)

    assert Plain(1).add() == 3
    assert nbray.get(nbray.remote(Plain).remote(1).add.remote()) == 3


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="max_restart"):
        Counter.options(max_restart=1)
    with pytest.raises(ValueError, match="get_if_exists=True needs a name"):
        Counter.options(get_if_exists=True)
    with pytest.raises(TypeError, match="given by name"):
        nbray.method(lambda self: 1)
    with pytest.raises(ValueError, match="num_return"):
        nbray.method(num_return=2)
    with pytest.raises(ValueError, match=r"no concurrency group 'ioo'.*did you mean 'io'"):

        @nbray.remote(concurrency_groups={"io": 1})
        class _Grouped:
            @nbray.method(concurrency_group="ioo")
            def m(self) -> None: ...


def test_calls(shared_cluster: Any) -> None:
    counter = Counter.remote(5)
    assert nbray.get(counter.add.remote()) == 6
    assert nbray.get(counter.add.remote(amount=4)) == 10
    assert nbray.get(counter.pair.remote()) == [10, -10]
    assert nbray.get(counter.fixed.remote(3)) == 30
    assert nbray.get(counter.name_of.remote()) == "Counter"
    assert nbray.get(counter.__len__.remote()) == 10
    assert nbray.get(counter.pid.remote()) != os.getpid()


def test_handle(shared_cluster: Any) -> None:
    counter = Counter.remote()
    assert repr(counter).startswith("ActorHandle(Counter, ")
    assert {"add", "pair", "fixed"} <= set(dir(counter))
    assert "__init__" not in dir(counter)
    assert str(inspect.signature(counter.add)) == "(amount=Ellipsis)"
    with pytest.raises(AttributeError, match=r"no method 'ad'; did you mean 'add'"):
        _ = counter.ad
    with pytest.raises(AttributeError, match="through methods only"):
        _ = counter.value
    with pytest.raises(TypeError, match=r"\.add\.remote"):
        counter.add()
    assert counter != Counter.remote()


def test_wrong_arguments_are_refused_at_once(shared_cluster: Any) -> None:
    with pytest.raises(TypeError, match=r"Counter\.remote\(\): too many"):
        Counter.remote(1, 2)
    counter = Counter.remote()
    for wrong in (
        lambda: counter.add.remote(1, 2),
        lambda: counter.add.remote(x=1),
        lambda: counter.fixed.remote(),
    ):
        with pytest.raises(TypeError, match=r"Counter\.\w+\.remote\(\)"):
            wrong()
    with pytest.raises(SerializationError, match=r"argument 1 \('amount'\)"):
        counter.add.remote(threading.Lock())


def test_options_of_methods(shared_cluster: Any) -> None:
    counter = Counter.remote(1)
    first, second = counter.pair.options(num_returns=2).remote()
    assert nbray.get([first, second]) == [1, -1]
    assert nbray.get(counter.pair.options(num_returns=1).remote()) == (1, -1)
    assert counter.pair.options(num_returns=0).remote() is None
    with pytest.raises(ValueError, match="generator"):
        counter.pair.options(num_returns="streaming")
    with pytest.raises(ValueError, match="concurrency group"):
        counter.pair.options(concurrency_group="io")


def test_order_of_calls_with_late_arguments(shared_cluster: Any) -> None:
    @nbray.remote
    def slow(folder: str) -> int:
        deadline = time.monotonic() + 20
        while not (Path(folder) / "go").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return 100

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counter = Counter.remote()
        first = counter.add.remote(slow.remote(folder))
        second = counter.add.remote()
        ready, _ = nbray.wait([first, second], timeout=0.1)
        assert ready == []
        (Path(folder) / "go").touch()
        assert nbray.get([first, second]) == [100, 101]


def test_handles_travel(shared_cluster: Any) -> None:
    @nbray.remote
    def use(handles: list[Any]) -> int:
        return sum(nbray.get([handle.add.remote() for handle in handles]))

    counter = Counter.remote()
    assert nbray.get(use.remote([counter, counter])) == 3
    again = nbray.get(nbray.put({"handle": counter}))["handle"]
    assert again == counter
    assert hash(again) == hash(counter)
    assert nbray.get(again.add.remote()) == 3
    plain = pickle.loads(pickle.dumps(counter))
    assert plain == counter
    assert nbray.get(plain.add.remote()) == 4


def test_handle_in_a_closure(shared_cluster: Any) -> None:
    counter = Counter.remote()

    @nbray.remote
    def use() -> int:
        return nbray.get(counter.add.remote())

    assert nbray.get(use.remote()) == 1


def test_made_in_a_task(shared_cluster: Any) -> None:
    @nbray.remote
    def make(start: int) -> Any:
        made = Counter.remote(start)
        nbray.get(made.add.remote())
        return {"counter": made}

    counter = nbray.get(make.remote(5))["counter"]
    pid = nbray.get(counter.pid.remote())
    assert nbray.get(counter.add.remote()) == 7
    del counter
    gc.collect()
    until(lambda: not is_alive(pid))


def test_actors_that_call_actors(shared_cluster: Any) -> None:
    @nbray.remote
    class Front:
        def __init__(self, back: Any) -> None:
            self.back = back

        def add(self, n: int) -> int:
            return nbray.get(self.back.add.remote(n))

    front = Front.remote(Counter.remote(1))
    assert nbray.get([front.add.remote(i) for i in range(4)]) == [1, 2, 4, 7]


def test_generator_method(shared_cluster: Any) -> None:
    counter = Counter.remote()
    assert [nbray.get(ref) for ref in counter.count.remote(4)] == [0, 1, 2, 3]
    assert nbray.get(counter.add.remote(0)) == 4


def test_error_keeps_the_actor_alive(shared_cluster: Any) -> None:
    counter = Counter.remote(1)
    with pytest.raises(KeyError) as caught:
        nbray.get(counter.fail.remote())
    assert "task Counter.fail" in str(caught.value)
    assert nbray.get(counter.add.remote()) == 2


def test_error_of_the_constructor(shared_cluster: Any) -> None:
    @nbray.remote
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no start")

        def method(self) -> None: ...

    with pytest.raises(ActorDiedError, match="constructor of actor Broken") as caught:
        nbray.get(Broken.remote().method.remote())
    assert isinstance(caught.value, ValueError)
    assert "in __init__" in str(caught.value)


def test_built_in_methods(shared_cluster: Any) -> None:
    counter = Counter.remote(3)
    assert nbray.get(counter.__ray_ready__.remote()) is True
    assert nbray.get(counter.__ray_call__.remote(lambda self, n: self.value + n, 4)) == 7
    pid = nbray.get(counter.pid.remote())
    counter.__ray_terminate__.remote()
    until(lambda: not is_alive(pid))
    with pytest.raises(ActorDiedError):
        nbray.get(counter.add.remote())


# -- lifetime


def test_ends_with_its_last_handle(shared_cluster: Any) -> None:
    counter = Counter.remote()
    pid = nbray.get(counter.pid.remote())
    last = counter.add.remote()
    del counter
    gc.collect()
    assert nbray.get(last) == 1
    until(lambda: not is_alive(pid))


def test_lives_while_a_stored_handle_does(shared_cluster: Any) -> None:
    counter = Counter.remote()
    pid = nbray.get(counter.pid.remote())
    stored = nbray.put([counter])
    del counter
    gc.collect()
    assert nbray.get(nbray.get(stored)[0].add.remote()) == 1
    del stored
    gc.collect()
    until(lambda: not is_alive(pid))


def test_lives_while_a_task_has_its_handle(shared_cluster: Any, tmp_path: Path) -> None:
    @nbray.remote
    def use(handle: Any, go: str) -> int:
        deadline = time.monotonic() + 20
        while not Path(go).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return nbray.get(handle.add.remote())

    counter = Counter.remote(6)
    result = use.remote(counter, str(tmp_path / "go"))
    del counter
    gc.collect()
    nbray.wait([result], timeout=0.3)
    (tmp_path / "go").touch()
    assert nbray.get(result) == 7


def test_kill(shared_cluster: Any) -> None:
    counter = Counter.remote()
    pid = nbray.get(counter.pid.remote())
    nbray.kill(counter)
    with pytest.raises(ActorDiedError, match=r"Counter.*killed by nbray\.kill"):
        nbray.get(counter.add.remote())
    until(lambda: not is_alive(pid))
    with pytest.raises(ValueError, match=r"nbray\.cancel"):
        nbray.kill(counter.add.remote())


def test_exit_actor(shared_cluster: Any) -> None:
    counter = Counter.remote()
    pid = nbray.get(counter.pid.remote())
    with pytest.raises(ActorDiedError, match="exit_actor"):
        nbray.get(counter.leave.remote())
    with pytest.raises(ActorDiedError):
        nbray.get(counter.add.remote())
    until(lambda: not is_alive(pid))
    with pytest.raises(TypeError, match="does not run in an actor"):
        nbray.exit_actor()


def test_death_of_its_process(shared_cluster: Any) -> None:
    counter = Counter.remote()
    os.kill(nbray.get(counter.pid.remote()), signal.SIGKILL)
    with pytest.raises(ActorDiedError, match="SIGKILL"):
        nbray.get(counter.add.remote())


def test_restarts(shared_cluster: Any) -> None:
    counter = Counter.options(max_restarts=1, max_task_retries=-1).remote(10)
    assert nbray.get(counter.add.remote()) == 11
    os.kill(nbray.get(counter.pid.remote()), signal.SIGKILL)
    assert nbray.get(counter.add.remote()) == 11
    os.kill(nbray.get(counter.pid.remote()), signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        nbray.get(counter.add.remote())


def test_call_in_flight_is_lost_without_task_retries(shared_cluster: Any) -> None:
    @nbray.remote(max_restarts=1)
    class Fragile:
        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def restarted(self) -> bool:
            return nbray.get_runtime_context().was_current_actor_reconstructed

    fragile = Fragile.remote()
    assert nbray.get(fragile.restarted.remote()) is False
    with pytest.raises(ActorUnavailableError, match="max_task_retries"):
        nbray.get(fragile.die.remote())
    assert nbray.get(fragile.restarted.remote()) is True


def test_retry_exceptions_of_a_method(shared_cluster: Any) -> None:
    @nbray.remote
    class Flaky:
        def __init__(self) -> None:
            self.calls = 0

        @nbray.method(max_task_retries=2, retry_exceptions=[OSError])
        def listed(self, kind: type[Exception]) -> int:
            self.calls += 1
            if self.calls < 3:
                raise kind("again")
            return self.calls

        def plain(self) -> int:
            self.calls += 1
            raise OSError("once")

    assert nbray.get(Flaky.remote().listed.remote(OSError)) == 3
    with pytest.raises(KeyError):
        nbray.get(Flaky.remote().listed.remote(KeyError))
    with pytest.raises(OSError, match="once"):
        nbray.get(Flaky.remote().plain.remote())


# -- names


def test_names(shared_cluster: Any) -> None:
    counter = Counter.options(name="tally").remote(1)
    assert "name='tally'" in repr(counter)
    found = nbray.get_actor("tally")
    assert found == counter
    assert nbray.get(found.add.remote()) == 2
    with pytest.raises(ActorAlreadyExistsError, match="tally"):
        Counter.options(name="tally").remote()
    same = Counter.options(name="tally", get_if_exists=True).remote(50)
    assert same == counter
    assert nbray.get(same.add.remote()) == 3
    nbray.kill(counter)
    with pytest.raises(ValueError, match="tally"):
        nbray.get_actor("tally")
    fresh = Counter.options(name="tally", get_if_exists=True).remote(50)
    assert nbray.get(fresh.add.remote()) == 51


def test_names_inside_of_tasks(shared_cluster: Any) -> None:
    @nbray.remote
    def use() -> int:
        return nbray.get(nbray.get_actor("seen").add.remote())

    counter = Counter.options(name="seen").remote()
    assert nbray.get(use.remote()) == 1
    assert nbray.get(counter.add.remote()) == 2


def test_namespaces(shared_cluster: Any) -> None:
    counter = Counter.options(name="apart", namespace="other").remote()
    assert nbray.get_actor("apart", namespace="other") == counter
    with pytest.raises(ValueError, match="apart"):
        nbray.get_actor("apart")
    for wrong in ("", None, 3):
        with pytest.raises(ValueError, match="name of an actor"):
            nbray.get_actor(wrong)  # type: ignore[arg-type]


def test_weak_handle_does_not_keep_it_alive(shared_cluster: Any) -> None:
    counter = Counter.options(name="weak").remote()
    pid = nbray.get(counter.pid.remote())
    found = nbray.get_actor("weak")
    del counter
    gc.collect()
    until(lambda: not is_alive(pid))
    with pytest.raises(ActorDiedError):
        nbray.get(found.add.remote())


def test_detached(shared_cluster: Any) -> None:
    counter = Counter.options(name="stays", lifetime="detached").remote(4)
    assert nbray.get(counter.add.remote()) == 5
    del counter
    gc.collect()
    again = nbray.get_actor("stays")
    assert nbray.get(again.add.remote()) == 6
    nbray.kill(again)


# -- modes


def test_async_actor_runs_methods_side_by_side(shared_cluster: Any) -> None:
    @nbray.remote
    class Meeting:
        def __init__(self) -> None:
            self.event = asyncio.Event()

        async def wait(self) -> str:
            await self.event.wait()
            return "met"

        async def arrive(self) -> None:
            self.event.set()

        async def numbers(self, n: int) -> Any:
            for i in range(n):
                await asyncio.sleep(0)
                yield i

        def plain(self) -> int:
            return 5

    meeting = Meeting.remote()
    waiting = [meeting.wait.remote() for _ in range(20)]
    nbray.get(meeting.arrive.remote())
    assert nbray.get(waiting) == ["met"] * 20
    assert nbray.get(meeting.plain.remote()) == 5
    assert [nbray.get(ref) for ref in meeting.numbers.remote(3)] == [0, 1, 2]


def test_async_actor_leaves(shared_cluster: Any) -> None:
    @nbray.remote
    class Leaving:
        async def leave(self) -> None:
            nbray.exit_actor()

        async def pid(self) -> int:
            return os.getpid()

    leaving = Leaving.remote()
    pid = nbray.get(leaving.pid.remote())
    with pytest.raises(ActorDiedError, match="exit_actor"):
        nbray.get(leaving.leave.remote())
    until(lambda: not is_alive(pid))


def test_errors_of_async_methods(shared_cluster: Any) -> None:
    @nbray.remote
    class Failing:
        async def fail(self) -> None:
            await asyncio.sleep(0)
            raise KeyError("async")

    with pytest.raises(KeyError) as caught:
        nbray.get(Failing.remote().fail.remote())
    assert "in fail" in str(caught.value)
    assert "executor.py" not in str(caught.value)


def test_async_actor_awaits_refs(shared_cluster: Any) -> None:
    @nbray.remote
    class Awaiting:
        async def total(self, refs: list[Any]) -> int:
            return sum(await asyncio.gather(*refs)) + await refs[0]

    @nbray.remote
    def one() -> int:
        return 1

    assert nbray.get(Awaiting.remote().total.remote([one.remote(), one.remote()])) == 3


def test_threaded_actor(shared_cluster: Any) -> None:
    @nbray.remote(max_concurrency=3)
    class Threaded:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(3)

        def meet(self) -> bool:
            self.barrier.wait(20)
            return True

    threaded = Threaded.remote()
    assert nbray.get([threaded.meet.remote() for _ in range(3)]) == [True] * 3


def test_blocked_group_does_not_block_others(shared_cluster: Any) -> None:
    @nbray.remote(concurrency_groups={"io": 1, "work": 1})
    class Grouped:
        def __init__(self) -> None:
            self.event = threading.Event()

        @nbray.method(concurrency_group="io")
        def wait(self) -> bool:
            return self.event.wait(20)

        @nbray.method(concurrency_group="work")
        def go(self) -> str:
            self.event.set()
            return "gone"

        def any(self) -> str:
            return "default"

    grouped = Grouped.remote()
    waiting = grouped.wait.remote()
    assert nbray.get(grouped.any.remote()) == "default"
    assert nbray.get(grouped.any.options(concurrency_group="work").remote()) == "default"
    assert nbray.get(grouped.go.remote()) == "gone"
    assert nbray.get(waiting) is True


def test_max_pending_calls(shared_cluster: Any) -> None:
    @nbray.remote(max_concurrency=4, max_pending_calls=2)
    class Busy:
        def __init__(self) -> None:
            self.event = threading.Event()

        def wait(self) -> bool:
            return self.event.wait(20)

        def go(self) -> None:
            self.event.set()

    busy = Busy.remote()
    first = busy.wait.remote()
    second = busy.wait.options(num_returns=0).remote()
    assert second is None
    with pytest.raises(PendingCallsLimitExceededError, match="2 calls"):
        busy.wait.remote()
    # The limit is of the handle; another one has its own.
    other = pickle.loads(pickle.dumps(busy))
    other.go.remote()
    assert nbray.get(first) is True
    until(lambda: nbray.get(busy.go.remote()) is None)


def test_actor_that_asks_for_resources_holds_them(shared_cluster: Any) -> None:
    free = nbray.available_resources().get("CPU", 0)
    idle = [Counter.remote() for _ in range(3)]
    nbray.get([each.add.remote() for each in idle])
    until(lambda: nbray.available_resources().get("CPU", 0) == free)
    holding = Counter.options(num_cpus=1).remote()
    nbray.get(holding.add.remote())
    assert nbray.available_resources().get("CPU", 0) == free - 1
    nbray.kill(holding)
    until(lambda: nbray.available_resources().get("CPU", 0) == free)


def test_own_handle(shared_cluster: Any) -> None:
    @nbray.remote
    class Selfish:
        def me(self) -> Any:
            return nbray.get_runtime_context().current_actor

        def name(self) -> str | None:
            return nbray.get_runtime_context().get_actor_name()

    selfish = Selfish.options(name="selfish").remote()
    assert nbray.get(selfish.me.remote()) == selfish
    assert nbray.get(selfish.name.remote()) == "selfish"
    with pytest.raises(RuntimeError, match="does not run in an actor"):
        _ = nbray.get_runtime_context().current_actor


def test_class_that_mentions_itself(shared_cluster: Any) -> None:
    class Tree:
        def __init__(self, depth: int) -> None:
            self.children = [tree.remote(depth - 1) for _ in range(2)] if depth else []

        def size(self) -> int:
            return 1 + sum(nbray.get([child.size.remote() for child in self.children]))

    tree = nbray.remote(Tree)
    assert nbray.get(tree.remote(1).size.remote()) == 3
