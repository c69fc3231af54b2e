"""The driver's world, as its tasks are to see it: what changes in it is noticed at the next submission (design section 3).

Working directory, environment, ``sys.path``, the libraries' options (`nbray.preferences`; looked at once per cell), what is installed, and the user's own modules (those that come neither with Python nor from an installed
package) as this process has loaded them. A module's source is taken when it is first seen (in a notebook: after the cell that imports it) and again when it was reloaded: what is edited on disk and not reloaded
is not what runs here, so it is not what runs in tasks.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
import threading
import time
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from nbray import ids
from nbray.api import functions
from nbray.config import WORLDS
from nbray.installed import InstalledWatch
from nbray.messages import World as WorldMessage
from nbray.preferences import Collector
from nbray.worker.modules import standard_names
from nbray.worker.world import Module, World, encode

if TYPE_CHECKING:
    from nbray.api.context import Runtime
    from nbray.engine.local import LocalEngine

_NEVER = frozenset({"__main__", "__mp_main__", "nbray"})
"""Top-level names that are nobody's modules: what is in ``__main__`` travels by value, nbray is there already."""

INSTALLED_LOOK = 0.02
"""Seconds between looks at what is installed while tasks are submitted; a new cell looks at once."""


class WorldWatch:
    """Tells the node when the world has changed. `check` is called before each submission: about 1 µs."""

    def __init__(self, engine: LocalEngine, runtime: Runtime) -> None:
        self._engine = engine
        self._runtime = runtime
        self._lock = threading.Lock()
        self._modules = _modules
        self._known: dict[bytes, None] = {}
        """The last `WORLDS` of them: those that the node has, which counts in the same way."""
        self._sent = (b"", b"", 0)
        self._installed: InstalledWatch | None = None
        self._search: list[str] = []
        self._due = 0.0
        self._directory = ""
        self._environment: dict[bytes, bytes] = {}
        self._path: list[str] = []
        self._trace = (0, "", 0)
        self._last: Any = None
        """The ``__spec__`` in that trace: while it is kept, no other object has its identity."""
        self._found: list[Module] = []
        self._standard = b""
        self._collector = Collector()
        self._epoch = -1

    def check(self) -> None:
        """Notice changes. A reload leaves its trace in ``sys.modules``: the module becomes the last one there, with a new ``__spec__``."""
        modules = sys.modules
        if time.monotonic() >= self._due:
            self._look_at_packages()
        try:
            last = next(reversed(modules))
            if (
                os.getcwd() == self._directory
                and os.environ._data == self._environment  # type: ignore[attr-defined]
                and sys.path == self._path
                and (len(modules), last, id(getattr(modules[last], "__spec__", None))) == self._trace
                and self._runtime.epoch == self._epoch
            ):
                return
        except (OSError, RuntimeError, KeyError):
            pass  # No directory any more, or another thread is importing: look closely.
        with self._lock:
            self._look()

    def _look_at_packages(self) -> None:
        with self._lock:
            if self._installed is not None and self._installed.look(self._search):
                self._look()
            self._due = time.monotonic() + INSTALLED_LOOK

    def _look(self) -> None:
        """What has changed is sent before it is remembered, so that no thread submits into a world that the node does not know."""
        epoch = self._runtime.epoch
        try:
            directory = os.getcwd()
        except OSError:
            directory = self._directory or "/"
        environment: dict[bytes, bytes] = dict(os.environ._data)  # type: ignore[attr-defined]
        search = list(sys.path)
        loaded = list(sys.modules.items())
        if trace_of(loaded) != self._trace:
            self._found = self._modules.look(loaded, epoch != self._epoch)
            self._standard = self._modules.standard(loaded)
        elif epoch != self._epoch:
            self._found = self._modules.look_again()
        trace = self._modules.trace
        found = self._found
        main = sys.modules.get("__main__")
        self._search = [os.path.join(directory, entry) for entry in search if type(entry) is str]
        if self._installed is None:
            shared = self._engine.welcome.details.get("packages", "")
            self._installed = InstalledWatch(filter(None, shared.split(os.pathsep)))
        self._installed.look(self._search)
        installed = self._installed.shared
        blob = encode(
            World(
                os.fsencode(directory),
                environment,
                [os.fsencode(entry) for entry in self._search],
                found,
                self._standard,
                _main(main, directory),
                self._runtime.namespace,
                self._collector.collect(functions.pickle_alone),
            )
        )
        world = ids.content_id(blob, 8)
        process = ids.content_id(
            self._engine.welcome.execution
            + msgspec.msgpack.encode((self._modules.changed(), self._installed.changes())),
            8,
        )
        if (world, process, installed) != self._sent:
            sources = [module.source for module in found if module.source]
            for module in found:
                if module.source:
                    self._engine.add_blob(module.source, self._modules.sources[module.source], module.name)
            self._engine.machine.out.append(
                WorldMessage(
                    world, b"" if world in self._known else blob, process, sources or None, installed
                )
            )
            self._known.pop(world, None)
            self._known[world] = None
            if len(self._known) > WORLDS:
                del self._known[next(iter(self._known))]
            self._sent = (world, process, installed)
        self._directory, self._environment, self._path = directory, environment, search
        self._trace = trace
        self._last = getattr(loaded[-1][1], "__spec__", None)
        self._epoch = epoch


def _main(main: ModuleType | None, directory: str) -> tuple[str, bytes]:
    """Name (of ``python -m``) and file of ``__main__``, as ``multiprocessing`` tells them to a process that it spawns."""
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    return spec.name if spec is not None else "", os.fsencode(os.path.join(directory, file)) if isinstance(
        file, str
    ) else b""


def trace_of(loaded: list[tuple[str, Any]]) -> tuple[int, str, int]:
    """What importing and reloading change: how many modules there are, the last one's name and identity of its ``__spec__``."""
    last, module = loaded[-1]
    return len(loaded), last, id(getattr(module, "__spec__", None))


class _Seen:
    """A module of the user's: its `Module` record, and by what a newer version is recognised."""

    __slots__ = ("codes", "module", "record", "spec")

    def __init__(self, module: ModuleType, record: Module) -> None:
        self.module = module
        self.spec = module.__spec__
        self.record = record
        self.codes = _codes(module)


class UserModules:
    """The user's modules among those that this process has loaded, and what was loaded of each."""

    def __init__(self) -> None:
        self.sources: dict[bytes, bytes] = {}
        """What was loaded, by content id: source text, or (see `_loaded`) compiled code."""
        self._seen: dict[str, _Seen] = {}
        self._foreign: dict[str, int] = {}
        self._first: dict[str, bytes] = {}
        self._libraries = _libraries()
        self._standard_names = standard_names()
        self._lock = threading.Lock()
        self.trace = (0, "", 0)
        """`trace_of` what was loaded at the last look."""
        self._last: Any = None
        """That ``__spec__``: while it is kept, no other object has its identity."""

    def look(self, loaded: list[tuple[str, Any]], closely: bool) -> list[Module]:
        """The user's modules among ``loaded``, sorted by name. ``closely``: look for functions whose code was replaced in place, too."""
        with self._lock:
            self._last = getattr(loaded[-1][1], "__spec__", None)
            self.trace = trace_of(loaded)
            found = self._look(loaded, closely)
        return [found[name].record for name in sorted(found)]

    def look_again(self) -> list[Module]:
        """As `look` closely, when nothing was loaded since: among thousands of modules only the user's are looked at."""
        modules = sys.modules
        with self._lock:
            found = self._look([(name, modules[name]) for name in list(self._seen) if name in modules], True)
        return [found[name].record for name in sorted(found)]

    def _look(self, loaded: list[tuple[str, Any]], closely: bool) -> dict[str, _Seen]:
        foreign, seen = self._foreign, self._seen
        found: dict[str, _Seen] = {}
        for name, module in loaded:
            if foreign.get(name) == id(module):
                continue
            known = seen.get(name)
            if known is None or known.module is not module or known.spec is not module.__spec__:
                record = self._record(name, module)
                if record is None:
                    foreign[name] = id(module)
                    continue
                known = _Seen(module, record)
            elif closely:
                codes = _codes(module)
                if any(known.codes.get(key, code) != code for key, code in codes.items()):
                    # `%autoreload` replaces the code of functions without reloading their module.
                    known = _Seen(module, self._record(name, module) or known.record)
                known.codes = codes
            found[name] = known
        self._seen = found
        for name, known in found.items():
            self._first.setdefault(name, known.record.source)
        return found

    def changed(self) -> list[tuple[str, bytes]]:
        """Modules of which another version is loaded than the one first seen: what makes a worker that has the first one useless."""
        return [
            (name, known.record.source)
            for name, known in sorted(self._seen.items())
            if known.record.source != self._first[name]
        ]

    def standard(self, loaded: list[tuple[str, Any]]) -> bytes:
        """One bit for each name of the standard library that is loaded and not the user's."""
        names = dict(loaded)
        seen = self._seen
        bits = bytearray(len(self._standard_names) // 8 + 1)
        for at, name in enumerate(self._standard_names):
            if name in names and name not in seen:
                bits[at >> 3] |= 1 << (at & 7)
        return bytes(bits)

    def _record(self, name: str, module: Any) -> Module | None:
        """None for a module that is not the user's."""
        if name.partition(".")[0] in _NEVER or not isinstance(module, ModuleType):
            return None
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or module.__spec__ is None or not file.endswith((".py", ".so")):
            return None
        file = os.path.abspath(file)
        if (
            file.startswith(self._libraries)
            or f"{os.sep}site-packages{os.sep}" in file
            or f"{os.sep}dist-packages{os.sep}" in file
        ):
            return None
        places = getattr(module, "__path__", None)
        source = _loaded(file, module.__spec__.cached) if file.endswith(".py") else None
        content = b""
        if source is not None:
            content = ids.content_id(source)
            self.sources[content] = source
        return Module(
            name,
            os.fsencode(file),
            None if places is None else [os.fsencode(place) for place in places],
            content,
        )


def _libraries() -> tuple[str, ...]:
    """Directories of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(sorted({os.path.join(os.path.abspath(path), "") for path in found}))


def _loaded(file: str, cached: str | None) -> bytes | None:
    """What this process has loaded from a file: its source; or, where the file was edited after it was loaded, the code that Python has cached."""
    try:
        with open(file, "rb") as stream:
            source = stream.read()
            edited = os.fstat(stream.fileno())
    except OSError:
        return None
    if cached is None or sys.dont_write_bytecode or not os.access(os.path.dirname(cached), os.W_OK):
        return source
    try:
        with open(cached, "rb") as stream:
            code = stream.read()
    except OSError:
        return source
    # PEP 552: magic number, flags (0: the next two say what the code was compiled from), time of modification, size.
    head = [int.from_bytes(code[at : at + 4], "little") for at in (4, 8, 12)]
    same = head == [0, int(edited.st_mtime) & 0xFFFF_FFFF, edited.st_size & 0xFFFF_FFFF]
    return code if code[:4] == importlib.util.MAGIC_NUMBER and head[0] == 0 and not same else source


def _codes(module: ModuleType) -> dict[int, int]:
    """Which code the functions of a module have, by identity."""
    found: dict[int, int] = {}
    name = module.__name__
    for value in list(vars(module).values()):
        members = (
            list(vars(value).values()) if isinstance(value, type) and value.__module__ == name else (value,)
        )
        for each in members:
            if isinstance(each, FunctionType) and each.__module__ == name:
                found[id(each)] = id(each.__code__)
    return found


_modules = UserModules()
"""One for the life of this process: what was loaded of a module is known from before the first cluster."""


def note_modules() -> None:
    """Take the sources of modules that were loaded since the last look; worth calling after each cell. 10 µs when there are none."""
    loaded = list(sys.modules.items())
    if trace_of(loaded) != _modules.trace:
        _modules.look(loaded, False)
