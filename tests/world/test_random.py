"""Random state: distinct across tasks, equal on retry, whatever ran in the worker before."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbray.worker.adoption import Seeder, cannot_draw, plain
from tests.world.drivers import run_script

numpy_random: Any = np.random


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.random(), np.random.standard_normal()


def test_tasks_draw_different_numbers(shared_cluster: Any) -> None:
    drawn = shared_cluster.get([shared_cluster.remote(draw).remote() for _ in range(500)])
    assert len({number for numbers in drawn for number in numbers}) == 1500
    assert 0.45 < np.mean([uniform for uniform, _, _ in drawn]) < 0.55
    assert 0.45 < np.mean([uniform for _, uniform, _ in drawn]) < 0.55
    assert abs(np.mean([normal for _, _, normal in drawn])) < 0.15


def test_a_retry_draws_the_same_numbers(shared_cluster: Any, tmp_path: Path) -> None:
    @shared_cluster.remote(max_retries=2, retry_exceptions=True)
    def again() -> Any:
        numbers = draw()
        with open(tmp_path / "drawn", "a") as file:
            file.write(f"{numbers}\n")
        attempt = shared_cluster.get_runtime_context().get_attempt()
        if attempt == 0:
            raise OSError("once more")
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbers

    numbers = shared_cluster.get(again.remote())
    assert (tmp_path / "drawn").read_text() == f"{numbers}\n" * 3


_SCRIPT = """
import json, random, sys
import nbray
import numpy as np

@nbray.remote
def draw(noise):
    for _ in range(noise):  # an odd number of normal numbers leaves half a pair behind
        np.random.standard_normal()
    return random.random(), np.random.random(), np.random.standard_normal(), hash("text")

@nbray.remote
def quiet(x):
    return x

@nbray.remote
def outer():
    return random.random(), nbray.get([draw.remote(0) for _ in range(3)])

@nbray.remote
class Dice:
    def __init__(self):
        self.first = random.random()
    def roll(self):
        return self.first, random.random(), np.random.random()

seed = json.loads(sys.argv[1])
nbray.init(num_cpus=json.loads(sys.argv[2]), seed=seed)
dice = Dice.remote()
refs = [draw.remote(i % 4) if i % 3 else quiet.remote(i) for i in range(60)]
print(json.dumps([nbray.get(refs), nbray.get(outer.remote()), nbray.get([dice.roll.remote() for _ in range(3)])]))
"""


def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    """Whatever the number of workers; without a seed each run is another one."""
    script = tmp_path / "main.py"
    script.write_text(_SCRIPT)
    first = run_script(script, "7", "1")
    assert run_script(script, "7", "2") == first
    assert run_script(script, "8", "2") != first
    assert run_script(script, "null", "2") != run_script(script, "null", "2")


def test_a_task_that_seeds_leaves_nothing_behind(shared_cluster: Any) -> None:
    @shared_cluster.remote
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        np.random.standard_normal()
        np.random.set_state(("MT19937", np.full(624, 1, np.uint32), 5, 1, 0.5))

    @shared_cluster.remote
    def swap() -> None:
        numpy_random.set_bit_generator(np.random.PCG64(1))

    @shared_cluster.remote
    def look() -> Any:
        return numpy_random.get_bit_generator().state["bit_generator"], *draw()

    seen = set()
    for _ in range(4):
        shared_cluster.get([seed.remote(), swap.remote(), seed.remote()])
        kind, *numbers = shared_cluster.get(look.remote())
        assert kind == "MT19937"
        assert 0.5 not in numbers
        seen.update(numbers)
    assert len(seen) == 12


def test_generators_without_a_seed_are_fresh(shared_cluster: Any) -> None:
    @shared_cluster.remote(max_retries=1, retry_exceptions=True)
    def fresh() -> float:
        return float(np.random.default_rng().random())

    assert len(set(shared_cluster.get([fresh.remote() for _ in range(20)]))) == 20


def test_seeding_is_a_function_of_cluster_and_task() -> None:
    states = []
    before = random.getstate(), np.random.get_state()
    try:
        for seeder, task in (
            (Seeder(b"c" * 16), b"t"),
            (Seeder(b"c" * 16), b"t"),
            (Seeder(b"c" * 16), b"u"),
            (Seeder(b"d" * 16), b"t"),
        ):
            np.random.standard_normal()
            seeder.seed(task)
            states.append(
                (
                    random.random(),
                    random.gauss(0, 1),
                    *np.random.random(700).tolist(),
                    float(np.random.standard_normal()),
                )
            )
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    assert states[0] == states[1]
    assert len({number for state in states[1:] for number in state}) == 3 * 703


def test_numpy_s_generator_is_filled_with_sound_numbers() -> None:
    """Streams of neighbouring tasks are neither biased nor correlated."""
    before = random.getstate(), np.random.get_state()
    try:
        seeder = Seeder(b"c" * 16)
        streams = []
        for task in range(300):
            seeder.seed(task.to_bytes(16, "little"))
            streams.append(np.random.random(1000) - 0.5)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    table = np.array(streams)
    scale = 12.0 / 1000
    between = (table @ table.T) * scale
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 6 / np.sqrt(1000)
    assert np.abs(table.mean(axis=0)).max() < 6 / np.sqrt(12 * 300)
    assert np.abs(table[:, :-1] * table[:, 1:] * 12).mean(axis=1).max() < 1.0


SECRET = 1


def _functions() -> Any:
    def constant() -> bytes:
        return b"ok"

    def arithmetic(x: int, y: Any = 2) -> Any:
        def double(z: Any) -> Any:
            return 2 * z

        return [double(x) + y for _ in (1, 2)]

    def global_name() -> int:
        return SECRET

    def attribute(x: Any) -> Any:
        return x.real

    def default(x: Any = random.random) -> Any:
        return x()

    def inner() -> Any:
        def deeper() -> float:
            return random.random()

        return deeper()

    def imports() -> Any:
        import random as other

        return other

    cell = random.random

    def closure() -> Any:
        return cell()

    return [constant, arithmetic], [
        global_name,
        attribute,
        default,
        inner,
        imports,
        closure,
        random.random,
        random.Random,
    ]


def test_which_functions_need_no_seed() -> None:
    safe, unsafe = _functions()
    assert [cannot_draw(function) for function in safe] == [True] * len(safe)
    assert [cannot_draw(function) for function in unsafe] == [False] * len(unsafe)


@pytest.mark.parametrize(
    "value", [(1, 2.5, "text", None), ([1, {"a": (True, b"x")}],), (2**200, {1, 2}, bytearray(b"y"))]
)
def test_arguments_that_are_mere_data(value: Any) -> None:
    from nbray.store.serialization import serialize

    packed = serialize(value)
    assert plain(packed.kind, packed.flat())


@pytest.mark.parametrize(
    "value", [(random.random,), (draw,), (random.Random(1),), (len,), (np.float64(1),), (np.arange(3000),)]
)
def test_arguments_that_could_draw(value: Any) -> None:
    from nbray.store.serialization import serialize

    packed = serialize(value)
    assert not plain(packed.kind, packed.flat())


def test_an_argument_that_draws_is_seeded_for(shared_cluster: Any) -> None:
    class Drawing:
        def __add__(self, other: Any) -> Any:
            return random.random()

    @shared_cluster.remote
    def add(x: Any) -> Any:
        return x + 1

    drawn = shared_cluster.get([add.remote(Drawing()) for _ in range(50)])
    assert len(set(drawn)) == 50
    assert shared_cluster.get(add.remote(1)) == 2


_FIRST = """
import json, sys
import nbray

@nbray.remote
def loaded():
    return "numpy" in sys.modules

@nbray.remote
def draw():
    import numpy as np
    return np.random.random(), np.random.standard_normal()

nbray.init(num_cpus=1, seed=3)
print(json.dumps([nbray.get(loaded.remote()), *nbray.get(draw.remote())]))
nbray.shutdown()
"""


def test_the_first_worker_waits_for_no_package_and_draws_what_any_other_does(tmp_path: Path) -> None:
    """It is forked before numpy is imported; a task that imports it finds it seeded."""
    script = tmp_path / "first.py"
    script.write_text(_FIRST)
    first, again = run_script(script), run_script(script)
    assert first == again
    assert first[0] is False
    assert 0 < first[1] < 1


_LATE = """
import json, sys
from nbray.worker.adoption import Seeder

late = Seeder(b"c" * 16)
late.seed(b"t")
assert "numpy" not in sys.modules and "numpy.random" not in sys.modules
import numpy.random
drawn = [numpy.random.random(), numpy.random.standard_normal()]
numpy.random.random(1000)
Seeder(b"c" * 16).seed(b"t")
assert drawn == [numpy.random.random(), numpy.random.standard_normal()]
late.seed(b"t")
assert drawn == [numpy.random.random(), numpy.random.standard_normal()]
late.seed(b"u")
print(json.dumps(drawn != [numpy.random.random(), numpy.random.standard_normal()]))
"""


def test_numpy_imported_within_a_task_is_seeded_as_before_it(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(_LATE)
    assert run_script(script) is True
