"""The cases. Each is written once over an adapter and returns one value per window for each of its rows (benchmarks/rows.py).

Names and definitions are those of Ray's microbenchmarks (`ray/_private/ray_perf.py`, `timeit` of `ray_microbenchmark_helpers.py`),
except that arrays are touched before they are timed: pages of `np.zeros` that nobody wrote are read from cache.

Started by benchmarks.run as `python -m benchmarks.suite --system NAME --cases JSON ...`; the functions of this module live in
`__main__` then, as a notebook's do.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from benchmarks import magic, processes
from benchmarks.adapters import CPUS, Adapter, UnsupportedError, adapter
from benchmarks.rows import GROUP_OF
from benchmarks.session import Reporter

Figures = dict[str, list[float]]

EIGHT_MB = 8_000_000
HUNDRED_MB = 100_000_000
_CHUNKS = 100


# ---- what runs in workers -------------------------------------------------------------------------------------------------------


def ok() -> bytes:
    return b"ok"


def plus_one(value: int) -> int:
    return value + 1


def touch(array: Any) -> float:
    return float(array[-1])


def make_array(size: int) -> Any:
    return np.ones(size, np.uint8)


def hold_cpu(folder: str, index: int) -> None:
    """Occupies a CPU until the file `go` appears; says so by a file of its own."""
    Path(folder, f"held-{index}").touch()
    while Path(folder).exists() and not Path(folder, "go").exists():
        time.sleep(0.002)


class Echo:
    def small_value(self) -> bytes:
        return b"ok"


class AsyncEcho:
    async def small_value(self) -> bytes:
        return b"ok"

    async def small_value_with_arg(self, value: Any) -> bytes:
        return b"ok"


def remote_world(api: Any) -> SimpleNamespace:
    """The remote functions and classes of Ray's microbenchmarks, made with `api` (Ray's module or one with its API)."""
    small_value = api.remote(ok)

    @api.remote(num_cpus=0)
    class Actor:
        def small_value(self) -> bytes:
            return b"ok"

        def small_value_arg(self, value: Any) -> bytes:
            return b"ok"

        def small_value_batch(self, count: int) -> None:
            api.get([small_value.remote() for _ in range(count)])

    @api.remote(num_cpus=0)
    class Client:
        def __init__(self, servers: list[Any]) -> None:
            self.servers = servers

        def small_value_batch(self, count: int) -> None:
            api.get([server.small_value.remote() for server in self.servers for _ in range(count)])

        def small_value_batch_arg(self, count: int) -> None:
            value = api.put(0)
            api.get([server.small_value_arg.remote(value) for server in self.servers for _ in range(count)])

    def call_all(actors: list[Any], count: int) -> None:
        api.get([actors[i % len(actors)].small_value.remote() for i in range(count)])

    def put_small() -> None:
        for _ in range(100):
            api.put(0)

    def put_large() -> None:
        array = np.ones(80 << 20, np.uint8)
        for _ in range(10):
            api.put(array)

    def make_refs() -> list[Any]:
        return [api.put(1) for _ in range(10_000)]

    return SimpleNamespace(
        Actor=Actor,
        AsyncActor=api.remote(AsyncEcho),
        Client=Client,
        call_all=api.remote(call_all),
        put_small=api.remote(put_small),
        put_large=api.remote(put_large),
        make_refs=api.remote(make_refs),
        # As many servers as Ray's benchmark makes on this machine.
        servers=max((os.cpu_count() or 1) // 2, 1),
    )


# ---- the frame of a case --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A started system and how to time it."""

    system: Adapter
    tree: int
    warm_up_s: float
    window_s: float
    windows: int
    scale: float

    @cached_property
    def world(self) -> SimpleNamespace:
        return remote_world(self.system.api)

    def rate(self, call: Callable[[], object], multiplier: float = 1) -> list[float]:
        """Ray's `timeit`: calls per second times `multiplier`, one value per window; only the lengths of windows differ."""
        start = time.perf_counter()
        count = 0
        while count == 0 or time.perf_counter() - start < self.warm_up_s:
            call()
            count += 1
        # A call that takes longer than several windows is a window of its own, and needs no further one.
        windows = self.windows if time.perf_counter() - start < 5 * self.window_s * count else 1
        step = count // 10 + 1
        values = []
        for _ in range(windows):
            count = 0
            start = time.perf_counter()
            while count == 0 or time.perf_counter() - start < self.window_s:
                for _ in range(step):
                    call()
                count += step
            values.append(multiplier * count / (time.perf_counter() - start))
        return values


@dataclass(frozen=True)
class Case:
    name: str
    rows: tuple[str, ...]
    run: Callable[[Bench], Figures]


CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Callable[[Bench], list[float]]], Callable[[Bench], list[float]]]:
    """Registers a case of one row."""

    def register(run: Callable[[Bench], list[float]]) -> Callable[[Bench], list[float]]:
        CASES[name] = Case(name, (name,), lambda bench: {name: run(bench)})
        return run

    return register


def cases_of(group: str) -> list[str]:
    """The names of the cases of that group, in the order of the table."""
    return [each.name for each in CASES.values() if GROUP_OF[each.rows[0]] == group]


# ---- tasks ----------------------------------------------------------------------------------------------------------------------


@case("single client tasks sync")
def tasks_sync(bench: Bench) -> list[float]:
    submit, get = bench.system.task(ok), bench.system.get
    return bench.rate(lambda: get(submit()))


@case("single client tasks async")
def tasks_async(bench: Bench) -> list[float]:
    submit, get = bench.system.task(ok), bench.system.get
    return bench.rate(lambda: get([submit() for _ in range(1_000)]), 1_000)


@case("single client tasks and get batch")
def tasks_and_get_batch(bench: Bench) -> list[float]:
    submit, get = bench.system.task(ok), bench.system.get
    return bench.rate(lambda: get([submit() for _ in range(1_000)]))


@case("multi client tasks async")
def multi_client_tasks(bench: Bench) -> list[float]:
    actors = [bench.world.Actor.remote() for _ in range(4)]
    get = bench.system.get
    return bench.rate(lambda: get([a.small_value_batch.remote(10_000) for a in actors]), 40_000)


@case("nested: one task making 500")
def nested(bench: Bench) -> list[float]:
    submit, get = bench.system.nested(ok), bench.system.get
    return bench.rate(lambda: get(submit(500)), 500)


@case("chain of 200 dependent tasks")
def chain(bench: Bench) -> list[float]:
    submit, get = bench.system.chained(plus_one), bench.system.get

    def call() -> None:
        ref = submit(0)
        for _ in range(199):
            ref = submit(ref)
        if get(ref) != 200:
            raise AssertionError("the chain lost a link")

    return bench.rate(call, 200)


@case("single client wait 1k refs")
def wait(bench: Bench) -> list[float]:
    submit, drain = bench.system.task(ok), bench.system.drain
    return bench.rate(lambda: drain([submit() for _ in range(1_000)]))


@case("8 MB argument by value")
def argument_by_value(bench: Bench) -> list[float]:
    submit, get, array = bench.system.task(touch), bench.system.get, np.ones(EIGHT_MB, np.uint8)
    return bench.rate(lambda: get(submit(array)))


@case("8 MB argument by ref")
def argument_by_ref(bench: Bench) -> list[float]:
    submit, get, array = bench.system.task(touch), bench.system.get, np.ones(EIGHT_MB, np.uint8)
    put = bench.system.put
    return bench.rate(lambda: get(submit(put(array))))


@case("8 MB result")
def large_result(bench: Bench) -> list[float]:
    submit, get = bench.system.task(make_array), bench.system.get
    return bench.rate(lambda: get(submit(EIGHT_MB)))


# ---- actors ---------------------------------------------------------------------------------------------------------------------


def _calls(bench: Bench, actor: Any, method: str, count: int, argument: bool = False) -> list[float]:
    call, get = bench.system.method(actor, method), bench.system.get
    try:
        if count == 1:
            return bench.rate(lambda: get(call()))
        if argument:
            return bench.rate(lambda: get([call(i) for i in range(count)]), count)
        return bench.rate(lambda: get([call() for _ in range(count)]), count)
    finally:
        bench.system.kill(actor)


@case("1:1 actor calls sync")
def actor_sync(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(Echo), "small_value", 1)


@case("1:1 actor calls async")
def actor_async(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(Echo), "small_value", 1_000)


@case("1:1 actor calls concurrent")
def actor_concurrent(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(Echo, max_concurrency=16), "small_value", 1_000)


@case("1:n actor calls async")
def one_to_n(bench: Bench) -> list[float]:
    world, get = bench.world, bench.system.get
    servers = [world.Actor.remote() for _ in range(world.servers)]
    client = world.Client.remote(servers)
    return bench.rate(lambda: get(client.small_value_batch.remote(5_000)), 5_000 * len(servers))


@case("n:n actor calls async")
def n_to_n(bench: Bench) -> list[float]:
    world, get = bench.world, bench.system.get
    servers = [world.Actor.remote() for _ in range(world.servers)]
    return bench.rate(lambda: get([world.call_all.remote(servers, 5_000) for _ in range(4)]), 4 * 5_000)


@case("n:n actor calls with arg async")
def n_to_n_with_argument(bench: Bench) -> list[float]:
    world, get = bench.world, bench.system.get
    servers = [world.Actor.remote() for _ in range(world.servers)]
    clients = [world.Client.remote([server]) for server in servers]
    return bench.rate(
        lambda: get([client.small_value_batch_arg.remote(1_000) for client in clients]), 1_000 * len(clients)
    )


@case("1:1 async-actor calls sync")
def async_actor_sync(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(AsyncEcho), "small_value", 1)


@case("1:1 async-actor calls async")
def async_actor_async(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(AsyncEcho), "small_value", 1_000)


@case("1:1 async-actor calls with args async")
def async_actor_with_arguments(bench: Bench) -> list[float]:
    return _calls(bench, bench.system.actor(AsyncEcho), "small_value_with_arg", 1_000, argument=True)


@case("1:n async-actor calls async")
def one_to_n_async(bench: Bench) -> list[float]:
    world, get = bench.world, bench.system.get
    servers = [world.AsyncActor.remote() for _ in range(world.servers)]
    client = world.Client.remote(servers)
    return bench.rate(lambda: get(client.small_value_batch.remote(5_000)), 5_000 * len(servers))


@case("n:n async-actor calls async")
def n_to_n_async(bench: Bench) -> list[float]:
    world, get = bench.world, bench.system.get
    servers = [world.AsyncActor.remote() for _ in range(world.servers)]
    return bench.rate(lambda: get([world.call_all.remote(servers, 5_000) for _ in range(4)]), 4 * 5_000)


@case("create + call + kill an actor")
def actor_life(bench: Bench) -> list[float]:
    system = bench.system

    def call() -> None:
        actor = system.actor(Echo)
        system.get(system.method(actor, "small_value")())
        system.kill(actor)

    return bench.rate(call)


# ---- objects --------------------------------------------------------------------------------------------------------------------


@case("single client get calls")
def get_small(bench: Bench) -> list[float]:
    get, ref = bench.system.get, bench.system.put(0)
    return bench.rate(lambda: get(ref))


@case("single client put calls")
def put_small(bench: Bench) -> list[float]:
    put = bench.system.put
    return bench.rate(lambda: put(0))


@case("multi client put calls")
def multi_client_put(bench: Bench) -> list[float]:
    task, get = bench.world.put_small, bench.system.get
    return bench.rate(lambda: get([task.remote() for _ in range(10)]), 1_000)


@case("put 100 MB")
def put_large(bench: Bench) -> list[float]:
    put, array = bench.system.put, np.ones(HUNDRED_MB, np.uint8)
    return bench.rate(lambda: put(array), HUNDRED_MB / 1e9)


@case("get 100 MB")
def get_large(bench: Bench) -> list[float]:
    get, ref = bench.system.get, bench.system.put(np.ones(HUNDRED_MB, np.uint8))
    return bench.rate(lambda: get(ref))


@case("single client put gigabytes")
def put_gigabytes(bench: Bench) -> list[float]:
    put, array = bench.system.put, np.ones(100 << 20, np.int64)
    return bench.rate(lambda: put(array), array.nbytes / 1e9)


@case("multi client put gigabytes")
def multi_client_put_gigabytes(bench: Bench) -> list[float]:
    task, get = bench.world.put_large, bench.system.get
    return bench.rate(lambda: get([task.remote() for _ in range(10)]), 10 * 10 * (80 << 20) / 1e9)


@case("single client get object containing 10k refs")
def get_refs(bench: Bench) -> list[float]:
    get, ref = bench.system.get, bench.world.make_refs.remote()
    if len(get(ref)) != 10_000:
        raise AssertionError("refs were lost")
    return bench.rate(lambda: get(ref))


# ---- the notebook ---------------------------------------------------------------------------------------------------------------


def magic_overhead(bench: Bench) -> Figures:
    """In a kernel with a cluster of its own: the one of this process would only share the CPUs with it."""
    if bench.system.name != "nbray":
        raise UnsupportedError
    count = max(int(100 * bench.scale), 30)
    found: Figures = {name: [] for name in _MAGIC_SIZES}
    with magic.Notebook(CPUS) as notebook:
        for _ in range(bench.windows):
            for name, size in _MAGIC_SIZES.items():
                found[name].append(magic.overhead_ms(notebook.pairs(size, count)))
    return found


_MAGIC_SIZES = {
    "magic overhead of %%remote": 8 * magic.KB,
    "magic overhead of %%remote, 7 MB captured": 7 * magic.MB,
}


# ---- a million tasks ------------------------------------------------------------------------------------------------------------


def _books(bench: Bench) -> int:
    """Bytes (PSS) of every process that keeps the books: the driver and all others that do not run tasks."""
    gc.collect()
    cluster = [p for p in processes.cluster(bench.tree) if not bench.system.is_worker(processes.title(p))]
    return processes.pss([psutil.Process(), *cluster])


def _tenths(seconds: list[float]) -> float:
    """Speed of the last tenth of the chunks relative to that of the first one."""
    tenth = max(len(seconds) // 10, 1)
    return statistics.median(seconds[:tenth]) / statistics.median(seconds[-tenth:])


def tasks_dropped(bench: Bench) -> Figures:
    """All tasks in chunks that are submitted and got; their refs are dropped."""
    system, chunk = bench.system, int(bench.system.tasks * bench.scale) // _CHUNKS
    submit, get = system.task(ok), system.get
    for _ in range(3):
        get([submit() for _ in range(chunk)])
    before = processes.settled(lambda: _books(bench))
    seconds = []
    for _ in range(_CHUNKS):
        start = time.perf_counter()
        get([submit() for _ in range(chunk)])
        seconds.append(time.perf_counter() - start)
    after = processes.settled(lambda: _books(bench))
    tasks, row = chunk * _CHUNKS, "many tasks, refs dropped"
    return {
        row: [tasks / sum(seconds)],
        f"{row}: last tenth / first tenth": [_tenths(seconds)],
        f"{row}: memory per finished task": [(after - before) / tasks],
    }


def tasks_queued(bench: Bench) -> Figures:
    """All tasks queued behind tasks that hold every CPU, then run; their refs are held until the end."""
    system, chunk = bench.system, int(bench.system.tasks * bench.scale) // _CHUNKS
    # The queue of all systems takes a million, with the tasks that hold the CPUs.
    chunks = [chunk] * (_CHUNKS - 1) + [chunk - CPUS]
    submit, hold, get = system.task(ok), system.task(hold_cpu), system.get
    for _ in range(3):
        get([submit() for _ in range(chunk)])
    before = processes.settled(lambda: _books(bench))
    folder = tempfile.mkdtemp(prefix="nbray-bench-")
    try:
        holders = [hold(folder, index) for index in range(CPUS)]
        while len(os.listdir(folder)) < CPUS:
            time.sleep(0.005)
        refs, submitting = [], []
        for size in chunks:
            start = time.perf_counter()
            refs.append([submit() for _ in range(size)])
            submitting.append(time.perf_counter() - start)
        Path(folder, "go").touch()
        running = []
        for each in refs:
            start = time.perf_counter()
            get(each)
            running.append(time.perf_counter() - start)
        get(holders)
        after = processes.settled(lambda: _books(bench))
    finally:
        shutil.rmtree(folder)
    tasks = sum(chunks)
    return {
        "many tasks queued: submit": [tasks / sum(submitting)],
        "many tasks queued: submit, last tenth / first tenth": [_tenths(submitting)],
        "many tasks queued: run": [tasks / sum(running)],
        "many tasks queued: run, last tenth / first tenth": [_tenths(running)],
        "many tasks queued, refs held: memory per finished task": [(after - before) / tasks],
    }


for _case in (
    Case("magic overhead of %%remote", tuple(_MAGIC_SIZES), magic_overhead),
    Case(
        "many tasks, refs dropped",
        (
            "many tasks, refs dropped",
            "many tasks, refs dropped: last tenth / first tenth",
            "many tasks, refs dropped: memory per finished task",
        ),
        tasks_dropped,
    ),
    Case(
        "many tasks queued",
        (
            "many tasks queued: submit",
            "many tasks queued: submit, last tenth / first tenth",
            "many tasks queued: run",
            "many tasks queued: run, last tenth / first tenth",
            "many tasks queued, refs held: memory per finished task",
        ),
        tasks_queued,
    ),
):
    CASES[_case.name] = _case


# ---- a session ------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", required=True)
    parser.add_argument("--cases", required=True, help="JSON list of names")
    parser.add_argument("--report", type=int, required=True, help="file descriptor for the results")
    parser.add_argument(
        "--tree", type=int, required=True, help="pid of the process whose descendants are the system"
    )
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--window", type=float, default=1.0)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor for the number of tasks of the group 'million'"
    )
    options = parser.parse_args()
    reporter = Reporter(options.report)
    system = adapter(options.system)
    reporter.begin("start")
    system.load()
    system.start()
    bench = Bench(system, options.tree, options.warm_up, options.window, options.windows, options.scale)
    for name in json.loads(options.cases):
        reporter.begin(name)
        try:
            reporter.figures(name, CASES[name].run(bench))
        except UnsupportedError:
            reporter.unsupported(name)
        except Exception:
            reporter.failed(name, traceback.format_exc())
    reporter.begin("stop")
    system.stop()
    reporter.done()


if __name__ == "__main__":
    main()
