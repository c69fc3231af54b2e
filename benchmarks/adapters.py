"""One face for nbray and its peers, so that each case of the suite is written once.

What a peer has no equivalent for raises `UnsupportedError`; the table leaves that cell blank. Nothing is imported before `load`,
which the cold start measures.
"""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

CPUS = 2

Submit = Callable[..., Any]


class UnsupportedError(Exception):
    """The system has no equivalent of what the case does."""


class Adapter(ABC):
    """A system under test with `CPUS` CPUs.

    `tasks` is how many tasks the cases of the group "million" use; peers get fewer, since their figures there are per task too.
    """

    name: str
    module: str
    distribution: str
    tasks: int

    @abstractmethod
    def load(self) -> None:
        """Imports the system."""

    @abstractmethod
    def start(self) -> None:
        """Starts it, as its users do, with `CPUS` CPUs."""

    @abstractmethod
    def stop(self) -> None:
        """Stops it and everything it started."""

    def is_worker(self, title: str) -> bool:
        """Whether the process of that title runs tasks (and is no part of what keeps the books)."""
        return True

    @property
    def api(self) -> Any:
        """The module, if it has Ray's API; raises UnsupportedError otherwise."""
        raise UnsupportedError

    @abstractmethod
    def task(self, function: Callable[..., Any]) -> Submit:
        """What submits `function`: arguments -> ref."""

    @abstractmethod
    def get(self, refs: Any) -> Any:
        """The value of a ref, or the list of values of a list of refs."""

    def put(self, value: Any) -> Any:
        raise UnsupportedError

    @abstractmethod
    def drain(self, refs: list[Any]) -> None:
        """Takes the refs one by one as they finish, the way the system offers it."""

    def nested(self, child: Callable[[], Any]) -> Submit:
        """What submits a task that makes n tasks of `child` and waits for them: n -> ref."""
        raise UnsupportedError

    def chained(self, function: Callable[[Any], Any]) -> Submit:
        """Like `task`, for an argument that is a ref of a task that has not run yet."""
        return self.task(function)

    def actor(self, cls: type, max_concurrency: int | None = None) -> Any:
        """Makes an actor, returns its handle."""
        raise UnsupportedError

    def method(self, handle: Any, name: str) -> Submit:
        """What calls that method of the actor: arguments -> ref. The attribute is looked up at every call, as users write it."""
        raise UnsupportedError

    def kill(self, handle: Any) -> None:
        raise UnsupportedError


class RayLike(Adapter):
    """Anything with the API of Ray Core."""

    def load(self) -> None:
        self._api = importlib.import_module(self.module)

    def start(self) -> None:
        self._api.init(num_cpus=CPUS)

    def stop(self) -> None:
        self._api.shutdown()

    @property
    def api(self) -> Any:
        return self._api

    def task(self, function: Callable[..., Any]) -> Submit:
        submit: Submit = self._api.remote(function).remote
        return submit

    def get(self, refs: Any) -> Any:
        return self._api.get(refs)

    def put(self, value: Any) -> Any:
        return self._api.put(value)

    def drain(self, refs: list[Any]) -> None:
        # Ray's benchmark asks for the local copy only once per ref (issue 30375 of ray-project/ray).
        fetch = True
        while refs:
            _, refs = self._api.wait(refs, fetch_local=fetch)
            fetch = False

    def nested(self, child: Callable[[], Any]) -> Submit:
        api, remote = self._api, self._api.remote(child)

        def parent(count: int) -> int:
            return len(api.get([remote.remote() for _ in range(count)]))

        return self.task(parent)

    def actor(self, cls: type, max_concurrency: int | None = None) -> Any:
        remote = self._api.remote(cls)
        return (
            remote.remote()
            if max_concurrency is None
            else remote.options(max_concurrency=max_concurrency).remote()
        )

    def method(self, handle: Any, name: str) -> Submit:
        return lambda *arguments: getattr(handle, name).remote(*arguments)

    def kill(self, handle: Any) -> None:
        self._api.kill(handle)


class Nbray(RayLike):
    name = module = distribution = "nbray"
    tasks = 1_000_000

    def is_worker(self, title: str) -> bool:
        return title.startswith(("nbray worker", "nbray zygote"))


class Ray(RayLike):
    name = module = distribution = "ray"
    tasks = 50_000

    def load(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        super().load()

    def start(self) -> None:
        self._api.init(num_cpus=CPUS, logging_level="ERROR")

    def is_worker(self, title: str) -> bool:
        return title.startswith("ray::") and "Agent" not in title


class Dask(Adapter):
    """dask.distributed with one process per CPU and one thread in each."""

    name, module, distribution = "dask", "distributed", "distributed"
    tasks = 20_000

    def load(self) -> None:
        self._distributed = importlib.import_module("distributed")

    def start(self) -> None:
        self._client = self._distributed.Client(
            n_workers=CPUS, threads_per_worker=1, processes=True, dashboard_address=None
        )

    def stop(self) -> None:
        cluster = self._client.cluster
        self._client.close()
        cluster.close()

    def task(self, function: Callable[..., Any]) -> Submit:
        submit = self._client.submit
        return lambda *arguments: submit(function, *arguments, pure=False)

    def get(self, refs: Any) -> Any:
        if not isinstance(refs, list):
            return refs.result()
        # Actor calls return futures of their own kind, which `gather` does not take.
        if all(isinstance(ref, self._distributed.Future) for ref in refs):
            return self._client.gather(refs)
        return [ref.result() for ref in refs]

    def put(self, value: Any) -> Any:
        return self._client.scatter(value, hash=False)

    def drain(self, refs: list[Any]) -> None:
        for _ in self._distributed.as_completed(refs):
            pass

    def nested(self, child: Callable[[], Any]) -> Submit:
        def parent(count: int) -> int:
            from distributed import worker_client

            with worker_client() as client:
                return len(client.gather([client.submit(child, pure=False) for _ in range(count)]))

        return self.task(parent)

    def actor(self, cls: type, max_concurrency: int | None = None) -> Any:
        if max_concurrency is not None:
            raise UnsupportedError
        return self._client.submit(cls, actor=True, pure=False).result()

    def method(self, handle: Any, name: str) -> Submit:
        def call(*arguments: Any) -> Any:
            return getattr(handle, name)(*arguments)

        return call

    def kill(self, handle: Any) -> None:
        # A dask actor lives as long as its future.
        handle._future.release()


class Pool(Adapter):
    """`concurrent.futures.ProcessPoolExecutor` of the interpreter that runs nbray."""

    name, module, distribution = "pool", "concurrent.futures", ""
    tasks = 100_000

    def load(self) -> None:
        self._futures = importlib.import_module("concurrent.futures")

    def start(self) -> None:
        self._pool = self._futures.ProcessPoolExecutor(CPUS)

    def stop(self) -> None:
        self._pool.shutdown()

    def task(self, function: Callable[..., Any]) -> Submit:
        submit = self._pool.submit
        return lambda *arguments: submit(function, *arguments)

    def get(self, refs: Any) -> Any:
        return [ref.result() for ref in refs] if isinstance(refs, list) else refs.result()

    def chained(self, function: Callable[[Any], Any]) -> Submit:
        raise UnsupportedError

    def drain(self, refs: list[Any]) -> None:
        for _ in self._futures.as_completed(refs):
            pass


ADAPTERS: dict[str, type[Adapter]] = {adapter.name: adapter for adapter in (Nbray, Ray, Dask, Pool)}


def adapter(name: str) -> Adapter:
    """The adapter of that name, nothing imported yet."""
    return ADAPTERS[name]()
