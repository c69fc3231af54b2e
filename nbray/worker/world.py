"""The task's world in a worker: the submitting notebook's working directory, environment, import path and modules (design section 3).

A task sees the world as it was when it was submitted, and leaves none of its own changes of directory and environment to the next one. An actor
takes on a world once, before its constructor: later its directory and environment are its own, and only what can be imported still grows.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import preferences
from nbray.api import context
from nbray.errors import RuntimeEnvError
from nbray.worker import adoption, modules, runtime_env

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from nbray.messages import Adopt
    from nbray.messages import World as WorldMessage


class Module(msgspec.Struct, array_like=True):
    """A module of the user's that the driver has loaded. ``places``: where a package looks for its parts; ``source``: content id, or empty."""

    name: str
    file: bytes
    places: list[bytes] | None
    source: bytes


class World(msgspec.Struct, array_like=True):
    """What `nbray.api.world` found in the driver. File names and variables are bytes, because they need not be text.

    ``path``: its ``sys.path``, absolute. ``standard``: one bit for each of `standard_names` that it has loaded from the standard library.
    ``main``: name and file of its ``__main__``. ``namespace``: where it looks for named actors. ``preferences``: by library, see
    `nbray.preferences`.
    """

    directory: bytes
    environment: dict[bytes, bytes]
    path: list[bytes]
    modules: list[Module]
    standard: bytes
    main: tuple[str, bytes]
    namespace: str = ""
    preferences: dict[str, bytes] = msgspec.field(default_factory=dict)


_decode = msgspec.msgpack.Decoder(World).decode


def encode(world: World) -> bytes:
    """As it travels."""
    return msgspec.msgpack.encode(world)


_touched = False
"""Whether the running code has changed the working directory or the environment."""


class _Environ(os._Environ):  # type: ignore[type-arg]
    """``os.environ`` in a worker: notices when it is changed, so that a task that changes nothing costs nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        global _touched
        _touched = True
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        global _touched
        _touched = True
        super().__delitem__(key)


def _noticed(change: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(change)
    def changed(*args: Any, **kwargs: Any) -> None:
        global _touched
        _touched = True
        change(*args, **kwargs)

    return changed


def _no_input(prompt: object = "", /) -> str:
    """In place of the function ``input``, which would say no more than that the input has ended. Raises EOFError."""
    raise EOFError(
        f"input({str(prompt)!r}) was called in a task, which has no keyboard: ask in the notebook and pass the answer as an argument "
        "(sys.stdin is empty there, as /dev/null is)"
    )


def _watch() -> None:
    os.environ.__class__ = _Environ
    os.environb.__class__ = _Environ
    os.chdir = _noticed(os.chdir)
    os.fchdir = _noticed(os.fchdir)


class _Arrivals:
    """First on ``sys.meta_path``: a library whose options the notebook has set gets them when it has been imported."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the import system asks for it: what the other finders find, with a loader that tells."""
        if path is not None or self._looking or name not in preferences.LIBRARIES:
            return None
        self._looking = True
        try:
            for finder in sys.meta_path:
                spec = finder.find_spec(name, path, target) if finder is not self else None
                if spec is not None:
                    return _telling(spec)
        finally:
            self._looking = False
        return None

    def invalidate_caches(self) -> None:
        """Nothing is cached."""


def _telling(spec: ModuleSpec) -> ModuleSpec:
    loader: Any = spec.loader
    load = getattr(loader, "exec_module", None)
    if load is None or isinstance(loader, type):
        return spec

    def exec_module(module: ModuleType) -> None:
        load(module)
        preferences.of_this_worker.loaded(spec.name)

    loader.exec_module = exec_module
    return spec


def _raw(environ: os._Environ[bytes]) -> dict[bytes, bytes]:
    """The variables without a check and a copy of each."""
    found: dict[bytes, bytes] = environ._data  # type: ignore[attr-defined]
    return found


class Surroundings:
    """The world of this worker: takes on what the node sends, when the run that it is for begins, and restores it after each task."""

    def __init__(self, blobs: dict[bytes, bytes]) -> None:
        self.changes: deque[tuple[int, bytes]] = deque()
        """Worlds to take on, each with the number of the first run that it is for."""
        self.problem = ""
        """Why the environment that the task asks for cannot be had."""
        self.gpus: tuple[int, ...] = ()
        self._coming = b""
        self._own_path = list(sys.path)
        self._world: World | None = None
        self._environment: dict[bytes, bytes] = {}
        self._cpus = 1
        self._asked: runtime_env.Asked | None = None
        self._known: set[bytes] = set()
        self._finder = modules.Finder(blobs)
        self._finder.install()
        sys.meta_path.insert(0, _Arrivals())
        self._zone = os.environb.get(b"TZ")
        self.main = modules.Main()
        sys.modules["__main__"] = self.main
        builtins.input = _no_input
        _watch()

    def inherit(self) -> None:
        """In the zygote, when it has imported something."""
        self._finder.inherit()
        # Their own values are looked at once for all workers.
        preferences.of_this_worker.take_on({})

    def begin(self) -> None:
        """In the worker itself, after the fork."""
        self._finder.begin()

    def adopt(self, message: Adopt) -> None:
        """Become a worker of a session, with these GPUs, threads and this ``runtime_env``."""
        self.gpus = tuple(message.gpus)
        self._cpus = message.cpus
        if message.blob:
            self._asked = runtime_env.decode(message.blob)
            self._set_up()
        self._take_on_environment()

    def coming(self, message: WorldMessage) -> None:
        """The next run, and those behind it, are submitted from this world."""
        self._coming = message.blob

    def arrived(self, run: int) -> None:
        """A run has come; it is dispatched but need not begin yet."""
        if self._coming:
            self.changes.append((run, self._coming))
            self._coming = b""

    def enter(self, run: int) -> bool:
        """Take on the world of a run that begins. True when modules were unloaded, so that functions that use them have to be loaded again."""
        changes = self.changes
        world: World | None = None
        while changes and changes[0][0] <= run:
            world = _decode(changes.popleft()[1])
        if world is None:
            return False
        if self._world is not None:
            # Directories of the first one have not been looked into yet, and those of packages tell by their time when something was installed.
            importlib.invalidate_caches()
        self._world = world
        runtime = context.current()
        if runtime is not None:
            runtime.namespace = world.namespace
        unloaded = self._finder.take_on(world, replace=True)
        self.main.take_on(*world.main)
        self._take_on_path(world)
        self._take_on_environment()
        self._set_up()
        self.restore()
        preferences.of_this_worker.take_on(world.preferences)
        return unloaded

    def extend(self, message: WorldMessage) -> None:
        """A later world of an actor's callers: what it can import grows."""
        if message.world in self._known:
            return
        self._known.add(message.world)
        world = _decode(message.blob)
        importlib.invalidate_caches()
        self._finder.take_on(world, replace=False)
        for entry in world.path:
            if os.fsdecode(entry) not in sys.path:
                sys.path.append(os.fsdecode(entry))

    @staticmethod
    def touched() -> bool:
        """Whether the task has changed the directory or the environment."""
        return _touched

    def restore(self) -> None:
        """Put directory and environment back to what the world says."""
        global _touched
        environ = os.environb
        zone = environ.get(b"TZ")
        now = dict(_raw(environ))
        for name in now:
            if name not in self._environment:
                del environ[name]
        for name, value in self._environment.items():
            if now.get(name) != value:
                environ[name] = value
        if not zone == self._zone == environ.get(b"TZ"):
            self._zone = environ.get(b"TZ")
            time.tzset()
        if self._world is not None:
            directory: bytes | str = self._world.directory
            if self._asked is not None and self._asked.working_dir and not self.problem:
                directory = self._asked.working_dir
            try:
                os.chdir(directory)
            except OSError:
                pass  # It is gone: a task that needs it says so itself.
        _touched = False

    def check(self) -> None:
        """Look again whether the ``runtime_env`` can be had. Raises RuntimeEnvError saying why not."""
        self._set_up()
        if self.problem:
            raise RuntimeEnvError(self.problem)
        self.restore()

    # -- the parts

    def _set_up(self) -> None:
        if self._asked is None:
            return
        try:
            found = runtime_env.set_up(self._asked)
        except RuntimeEnvError as error:
            self.problem = str(error)
            return
        self.problem = ""
        self._finder.fixed = found
        self._finder.folder = self._asked.working_dir
        if self._asked.working_dir and sys.path[:1] != [self._asked.working_dir]:
            sys.path.insert(0, self._asked.working_dir)

    def _take_on_path(self, world: World) -> None:
        path = [os.fsdecode(entry) for entry in world.path]
        sys.path[:] = path + [entry for entry in self._own_path if entry not in path]

    def _take_on_environment(self) -> None:
        base = self._world.environment if self._world is not None else dict(_raw(os.environb))
        self._environment = adoption.environment(base, self._cpus, self.gpus)
        if self._asked is not None:
            runtime_env.add_variables(self._asked, self._environment)
        if self._world is None:
            self.restore()
        adoption.set_threads(self._environment)
