"""The contract of `nbray.engine.base.Engine`: what every engine must do, tested through the seam alone.

Another engine joins by one more entry in ``ENGINES``.
"""

from __future__ import annotations

import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from nbray import ids
from nbray.api import session
from nbray.clusters import find_cluster
from nbray.engine.base import Engine
from nbray.errors import GetTimeoutError, NotInitializedError, TaskCancelledError, TaskError
from nbray.messages import ACTOR_CALL, CREATE_ACTOR, DRIVER, STREAMING, TASK, ActorOptions, TaskClass
from nbray.scheduler.resources import UNIT

SECONDS = 30.0


Connect = Callable[[], Engine]


def _local() -> Iterator[Connect]:
    with session.init(num_cpus=2):
        record = find_cluster("")
        assert record is not None
        yield lambda: session.connect(record, DRIVER, "contract", "contract suite", "contract")


ENGINES = {"local": _local}


@pytest.fixture(params=sorted(ENGINES), scope="module")
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    yield from ENGINES[request.param]()


@pytest.fixture(scope="module")
def engine(connect: Connect) -> Iterator[Engine]:
    made = connect()
    yield made
    made.shutdown(stop=False)


class Counter:
    """The actor of this suite."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


def task(engine: Engine, function: Any, **options: Any) -> int:
    """The engine's number for a function."""
    blob = cloudpickle.dumps((function, None, {}))
    spec = TaskClass(TASK, ids.content_id(blob), function.__name__, {"CPU": UNIT}, **options)
    return engine.register(spec, blob)


def counter(engine: Engine, start: int, name: str = "") -> tuple[bytes, Any, int]:
    """A new actor: its id, the reference that keeps it alive, the number of its method ``add``."""
    blob = cloudpickle.dumps((Counter, None, {}))
    content = ids.content_id(blob)
    made = engine.register(
        TaskClass(CREATE_ACTOR, content, "Counter.__init__", {"CPU": UNIT}, max_retries=0), blob
    )
    options = ActorOptions("Counter", "serial", actor_name=name, namespace="contract")
    actor, _ = engine.create_actor(made, options, (start,), {})
    add = engine.register(TaskClass(ACTOR_CALL, content, "add", {}, max_retries=0), blob)
    return actor, engine.hold_actor(actor), add


def identity(value: Any) -> Any:
    return value


def fail(text: str) -> None:
    raise ValueError(text)


def three() -> tuple[int, int, int]:
    return 1, 2, 3


def count_up(stop: int) -> Iterator[int]:
    yield from range(stop)


def wait_for_ever() -> None:
    threading.Event().wait()


def test_every_verb_is_there(engine: Engine) -> None:
    abstract = {
        name for name, member in inspect.getmembers(Engine) if getattr(member, "__isabstractmethod__", False)
    }
    assert abstract
    assert not inspect.isabstract(type(engine))


def test_a_task_returns_its_value(engine: Engine) -> None:
    number = task(engine, identity)
    assert engine.get(
        [engine.submit(number, ("x",), {}), engine.submit(number, (), {"value": 2})], SECONDS
    ) == ["x", 2]


def test_equal_specs_have_equal_numbers(engine: Engine) -> None:
    assert task(engine, identity) == task(engine, identity)
    assert task(engine, identity) != task(engine, identity, priority=1)


def test_a_ref_as_argument_is_its_value_a_ref_inside_stays_a_ref(engine: Engine) -> None:
    number = task(engine, identity)
    ref = engine.put("inner")
    assert engine.get([engine.submit(number, (ref,), {})], SECONDS) == ["inner"]
    ((inside,),) = engine.get([engine.submit(number, ([ref],), {})], SECONDS)
    assert inside == ref
    assert engine.get([inside], SECONDS) == ["inner"]


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 3_000_000])
def test_values_of_every_size(engine: Engine, size: int) -> None:
    value = bytes(size)
    number = task(engine, identity)
    ref = engine.put(value)
    assert (
        engine.get([ref, engine.submit(number, (value,), {}), engine.submit(number, (ref,), {})], SECONDS)
        == [value] * 3
    )


def test_an_error_is_an_instance_of_the_users_class(engine: Engine) -> None:
    number = task(engine, fail)
    with pytest.raises(ValueError, match="the reason") as caught:
        engine.get([engine.submit(number, ("the reason",), {})], SECONDS)
    assert isinstance(caught.value, TaskError)


def test_a_dependent_of_a_failed_task_fails_with_its_error(engine: Engine) -> None:
    failed = engine.submit(task(engine, fail), ("first",), {})
    with pytest.raises(ValueError, match="first"):
        engine.get([engine.submit(task(engine, identity), (failed,), {})], SECONDS)


def test_the_first_error_is_raised_without_waiting_for_the_rest(engine: Engine) -> None:
    never = engine.submit(task(engine, wait_for_ever), (), {})
    failed = engine.submit(task(engine, fail), ("soon",), {})
    with pytest.raises(ValueError, match="soon"):
        engine.get([never, failed], SECONDS)
    engine.cancel(never, True, True)
    with pytest.raises(TaskCancelledError):
        engine.get([never], SECONDS)


def test_several_returns(engine: Engine) -> None:
    refs = engine.submit(task(engine, three, num_returns=3), (), {})
    assert engine.get(list(reversed(refs)), SECONDS) == [3, 2, 1]
    assert engine.submit(task(engine, three, num_returns=0), (), {}) is None


def test_a_stream_ends(engine: Engine) -> None:
    generator = engine.submit(task(engine, count_up, num_returns=STREAMING), (5,), {})
    assert [engine.get([ref], SECONDS)[0] for ref in generator] == [0, 1, 2, 3, 4]
    assert engine.next_item(generator, SECONDS) is None


def test_get_and_wait_keep_their_timeouts(engine: Engine) -> None:
    never = engine.submit(task(engine, wait_for_ever), (), {})
    done = engine.put(1)
    with pytest.raises(GetTimeoutError):
        engine.get([never], 0.05)
    assert engine.wait([never, done], 2, 0.05, True) == ([done], [never])
    assert engine.wait([never, done], 1, None, True) == ([done], [never])
    engine.cancel(never, True, True)
    assert engine.wait([never], 1, SECONDS, True) == ([never], [])


def test_calls_of_one_caller_run_in_order(engine: Engine) -> None:
    actor, kept, add = counter(engine, 100)
    refs = [engine.call(actor, add, (1,), {}) for _ in range(200)]
    assert engine.get(refs, SECONDS) == list(range(101, 301))
    del kept


def test_a_named_actor_is_found_until_it_is_killed(engine: Engine) -> None:
    actor, kept, add = counter(engine, 0, "counter of the contract")
    assert engine.get_actor("counter of the contract", "contract").actor == actor
    with pytest.raises(ValueError, match="another name"):
        engine.get_actor("another name", "contract")
    engine.kill_actor(actor, True)
    with pytest.raises(Exception, match="dead"):
        engine.get([engine.call(actor, add, (1,), {})], SECONDS)
    del kept


def test_futures_and_frees(engine: Engine) -> None:
    ref = engine.submit(task(engine, identity), ([1, 2],), {})
    assert engine.future(ref).result(SECONDS) == [1, 2]
    engine.free([ref])
    with pytest.raises(Exception, match="free"):
        engine.get([ref], SECONDS)


def test_many_threads_share_an_engine(engine: Engine) -> None:
    number = task(engine, identity)
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = engine.get(
            [engine.submit(number, (index * 1000 + i,), {}) for i in range(50)], SECONDS
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(SECONDS)
    assert results == {index: [index * 1000 + i for i in range(50)] for index in range(8)}


def test_queries_are_plain_data(engine: Engine) -> None:
    told = engine.query("resources")
    assert told["total"]["CPU"] == 2 * UNIT
    assert pickle.loads(pickle.dumps(told)) == told
    assert engine.details()["name"]


def test_shutdown_is_idempotent_and_final(connect: Connect) -> None:
    engine = connect()
    ref = engine.put(1)
    engine.shutdown(stop=False)
    engine.shutdown(stop=False)
    with pytest.raises(NotInitializedError):
        engine.get([ref], 1.0)
    with pytest.raises(NotInitializedError):
        engine.put(2)
