"""Who holds an object, and that it goes when nobody does: refs inside of values, borrowed refs, dropped in any order."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.objects.states import await_empty, eventually, memory, objects

LARGE = 100_000


@pytest.fixture(autouse=True)
def nbray(shared_cluster: Any) -> Iterator[Any]:
    """Each test leaves nothing in the store."""
    yield shared_cluster
    await_empty()


@pytest.mark.parametrize("size", [10, LARGE], ids=["inline", "arena"])
def test_a_ref_inside_a_value_keeps_its_object(nbray: Any, size: int) -> None:
    inner = nbray.put(np.arange(size))
    name = inner.hex()
    outer = nbray.put({"deep": [1, (inner,)]})
    del inner
    eventually(
        lambda: [h.partition(" ")[0] for h in objects()[name]["holders"]] == ["object"], "only the outer"
    )
    assert nbray.get(nbray.get(outer)["deep"][1][0]).sum() == np.arange(size).sum()
    del outer
    eventually(lambda: name not in objects(), "it goes with the outer one")


def test_survivors_of_a_dropped_container_are_held(nbray: Any) -> None:
    outer = nbray.put([nbray.put(np.full(LARGE, n)) for n in range(10)])
    inner = nbray.get(outer)
    kept = inner[3]
    del inner, outer
    eventually(lambda: len(objects()) == 1, "all but one are freed")
    assert nbray.get(kept)[0] == 3


def test_dropping_in_every_order(nbray: Any) -> None:
    """A chain of three containers, a borrowed ref of each, a second ref of the innermost: dropped in all orders, what is left can be read."""
    for order in itertools.permutations(range(4)):
        leaf = nbray.put(np.full(LARGE, 7))
        middle = nbray.put([leaf])
        top = nbray.put({"middle": middle})
        held: list[Any] = [top, nbray.get(top)["middle"], nbray.get(nbray.get(top)["middle"])[0], leaf]
        del leaf, middle, top
        for gone in order:
            held[gone] = None
            if held[0] is not None:
                assert nbray.get(nbray.get(nbray.get(held[0])["middle"])[0])[0] == 7
            if held[1] is not None:
                assert nbray.get(nbray.get(held[1])[0])[0] == 7
            for ref in held[2:]:
                assert ref is None or nbray.get(ref)[0] == 7


def test_a_task_returns_refs_that_it_made(nbray: Any) -> None:
    @nbray.remote
    def make(count: int) -> list[Any]:
        return [nbray.put(np.full(LARGE, n)) for n in range(count)]

    outer = make.remote(3)
    first, second, third = nbray.get(outer)
    del outer, second
    assert (nbray.get(first)[0], nbray.get(third)[0]) == (0, 2)
    eventually(lambda: len(objects()) == 2, "the dropped one and the container are freed")


def test_a_task_returns_the_refs_of_its_children_and_its_arguments(nbray: Any) -> None:
    @nbray.remote
    def value(n: int) -> Any:
        return np.full(LARGE, n)

    @nbray.remote
    def parent(given: list[Any]) -> dict[str, Any]:
        return {"child": value.remote(1), "given": given[0]}

    outer = parent.remote([value.remote(2)])
    found = nbray.get(outer)
    del outer
    assert nbray.get(found["child"])[0] == 1
    assert nbray.get(found["given"])[0] == 2


def test_an_actor_keeps_borrowed_refs_after_the_call(nbray: Any) -> None:
    @nbray.remote
    class Keeper:
        def __init__(self, boxed: list[Any]) -> None:
            self.refs = boxed

        def add(self, box: dict[str, Any]) -> None:
            self.refs.append(box["ref"])

        def total(self) -> float:
            return float(sum(nbray.get(ref)[0] for ref in self.refs))

        def take(self) -> Any:
            return self.refs.pop()

        def forget(self) -> None:
            self.refs.clear()

    keeper = Keeper.remote([nbray.put(np.full(LARGE, 1))])
    for number in range(2, 5):
        nbray.get(keeper.add.remote({"ref": nbray.put(np.full(LARGE, number))}))
    assert nbray.get(keeper.total.remote()) == 10
    nested = nbray.get(keeper.take.remote())
    assert nbray.get(nested)[0] == 4
    assert nbray.get(keeper.total.remote()) == 6
    nbray.get(keeper.forget.remote())
    eventually(
        lambda: sum(row["size_bytes"] > LARGE for row in objects().values()) == 1,
        "only what was taken is left",
    )
    assert nbray.get(nested)[0] == 4


def test_refs_go_through_many_hands(nbray: Any) -> None:
    @nbray.remote
    def hand(box: list[Any], steps: int) -> Any:
        return hand.remote(box, steps - 1) if steps else box[0]

    found: Any = hand.remote([nbray.put(np.full(LARGE, 5))], 6)
    while not isinstance(found, np.ndarray):
        found = nbray.get(found)
    assert found[0] == 5
    del found


def test_ten_thousand_refs_in_one_object(nbray: Any) -> None:
    @nbray.remote
    def many() -> list[Any]:
        return [nbray.put(n) for n in range(10_000)]

    outer = many.remote()
    refs = nbray.get(outer)
    assert nbray.get(refs) == list(range(10_000))
    kept = refs[::1000]
    del refs, outer
    eventually(lambda: memory()["objects"] == 10, "all others are freed")
    assert nbray.get(kept) == list(range(0, 10_000, 1000))


def test_fire_and_forget(nbray: Any) -> None:
    @nbray.remote
    class Log:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def note(self, n: int) -> None:
            self.seen.append(n)

        def all(self) -> list[int]:
            return sorted(self.seen)

    log = Log.remote()

    @nbray.remote
    def work(log: Any, n: int, large: Any) -> Any:
        log.note.remote(n)
        return np.full(LARGE, n)

    for n in range(20):
        work.remote(log, n, np.zeros(LARGE))
    eventually(lambda: nbray.get(log.all.remote()) == list(range(20)), "all tasks have run")


def test_an_argument_outlives_the_drivers_ref_until_the_task_has_run(nbray: Any) -> None:
    @nbray.remote
    def first(x: Any) -> float:
        return float(x.sum())

    large = nbray.put(np.ones(LARGE))
    slow = first.remote(large)
    results = [first.remote(large) for _ in range(20)]
    del large
    assert nbray.get(results) == [LARGE] * 20
    assert nbray.get(slow) == LARGE


def test_results_of_failed_and_cancelled_tasks_leave_nothing(nbray: Any) -> None:
    @nbray.remote
    def fail(x: Any, box: list[Any]) -> None:
        raise ValueError(f"no {x[0]}")

    refs = [fail.remote(nbray.put(np.ones(LARGE)), [nbray.put(1)]) for _ in range(5)]
    for ref in refs:
        with pytest.raises(ValueError, match="no 1"):
            nbray.get(ref)
    depending = fail.remote(refs[0], [])
    with pytest.raises(ValueError, match="no 1"):
        nbray.get(depending)
    del refs, ref, depending


def test_many_returns_of_which_some_are_dropped(nbray: Any) -> None:
    @nbray.remote(num_returns=4)
    def four() -> Any:
        return [np.full(LARGE, n) if n % 2 else n for n in range(4)]

    a, b, c, d = four.remote()
    del b, c
    assert (nbray.get(a), nbray.get(d)[0]) == (0, 3)


def test_items_of_a_generator_that_nobody_takes(nbray: Any) -> None:
    @nbray.remote(num_returns="streaming")
    def items() -> Iterator[Any]:
        for n in range(10):
            yield np.full(LARGE, n)

    stream = items.remote()
    assert nbray.get(next(stream))[0] == 0
    third = [next(stream) for _ in range(2)][1]
    del stream
    assert nbray.get(third)[0] == 2


def test_a_freed_object_says_so(nbray: Any) -> None:
    for value in (1, np.ones(LARGE)):
        ref = nbray.put(value)
        other = nbray.put([ref])
        nbray.get(ref)
        nbray.free([ref])
        with pytest.raises(nbray.exceptions.ObjectFreedError, match=r"released by free\(\)") as caught:
            nbray.get(ref)
        assert repr(ref)[10:-1] in str(caught.value)

        @nbray.remote
        def use(x: Any) -> Any:
            return x

        with pytest.raises(nbray.exceptions.ObjectFreedError):
            nbray.get(use.remote(ref))
        with pytest.raises(nbray.exceptions.ObjectFreedError):
            nbray.get(nbray.get(other)[0])
        del caught
    eventually(lambda: memory()["used"] == 0, "its memory is free although refs are held")
    nbray.free(nbray.put(2))


def test_free_waits_for_views(nbray: Any) -> None:
    ref = nbray.put(np.ones(LARGE))
    view = nbray.get(ref)
    nbray.free(ref)
    others = [nbray.put(np.zeros(LARGE)) for _ in range(3)]
    assert view.sum() == LARGE
    with pytest.raises(nbray.exceptions.ObjectFreedError):
        nbray.get(ref)
    del view, others
    eventually(lambda: memory()["used"] == 0, "its memory is free")


def test_free_before_the_value_is_there(nbray: Any) -> None:
    @nbray.remote
    def value(x: Any) -> Any:
        return x

    ref = value.remote(np.ones(LARGE))
    nbray.free(ref)
    with pytest.raises(nbray.exceptions.ObjectFreedError):
        nbray.get(ref)


def test_a_ref_from_out_of_band(nbray: Any) -> None:
    import pickle

    ref = nbray.put(np.ones(LARGE))
    data = pickle.dumps(ref)
    again = pickle.loads(data)
    del ref
    assert nbray.get(again).sum() == LARGE
    del again
    gc.collect()
    eventually(lambda: not objects(), "the object is freed")
    with pytest.raises(nbray.exceptions.ObjectLostError, match="not known to this cluster"):
        nbray.get(pickle.loads(data))


def test_a_cycle_of_python_objects_with_refs(nbray: Any) -> None:
    box: list[Any] = [nbray.put(np.ones(LARGE))]
    box.append(box)
    outer = nbray.put({"box": box})
    found = nbray.get(outer)["box"]
    assert found[1] is found
    assert nbray.get(found[0]).sum() == LARGE
    found.append(found)


def test_a_process_that_dies_holds_nothing(nbray: Any) -> None:
    @nbray.remote(max_retries=0)
    def die(box: list[Any]) -> None:
        import os

        array = nbray.get(box[0])
        mine = nbray.put(np.zeros(LARGE))
        assert array.sum() == LARGE
        assert mine
        os._exit(3)

    ref = nbray.put(np.ones(LARGE))
    with pytest.raises(nbray.exceptions.WorkerCrashedError):
        nbray.get(die.remote([ref]))
    eventually(lambda: len(objects()) == 1, "what the dead process made is freed")
    assert nbray.get(ref).sum() == LARGE
