"""The user's modules in a worker: those that the driver has loaded are imported from the sources that it has loaded.

What the driver sends wins over what is on disk by now, so that a module that was edited and not reloaded behaves in tasks as it does in the
notebook. The same goes for names that a user's file and the standard library share, such as ``token``: a task gets the one that the driver has.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import marshal
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbray.worker.world import Module, World


class _SentLoader(SourceFileLoader):
    """Loads what the driver has sent: the source of a module, or its compiled code where the source was edited before nbray saw it."""

    def __init__(self, name: str, path: str, sent: bytes) -> None:
        super().__init__(name, path)
        self._sent = sent

    def get_code(self, fullname: str) -> CodeType:
        if self._sent.startswith(importlib.util.MAGIC_NUMBER):
            code: CodeType = marshal.loads(self._sent[16:])
            return code
        return self.source_to_code(self._sent, self.path)

    def get_source(self, fullname: str) -> str:
        return (
            ""
            if self._sent.startswith(importlib.util.MAGIC_NUMBER)
            else importlib.util.decode_source(self._sent)
        )


def standard_names() -> list[str]:
    """Modules of the standard library that come from files, in an order that driver and worker share."""
    return sorted(sys.stdlib_module_names)


class Finder:
    """First on ``sys.meta_path``. ``blobs``: what the node has sent, by content id."""

    def __init__(self, blobs: dict[bytes, bytes]) -> None:
        self.fixed: dict[str, str] = {}
        """Modules that the ``runtime_env`` names, and their files or packages."""
        self.folder = ""
        """The working directory that the ``runtime_env`` names: its modules are preferred."""
        self._blobs = blobs
        self._entries: dict[str, Module] = {}
        self._loaded: dict[str, bytes] = {}
        self._standard = {name: at for at, name in enumerate(standard_names())}
        """Positions in `World.standard`. Looked up one by one: making a set of all names would cost each worker memory pages."""
        self._bits = b""
        self._born = 0.0
        self._inherited: frozenset[str] = frozenset()
        paths = sysconfig.get_paths()
        self._library = [
            *dict.fromkeys(
                [paths["stdlib"], paths["platstdlib"], os.path.join(paths["platstdlib"], "lib-dynload")]
            )
        ]

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def inherit(self) -> None:
        """In the zygote: what is loaded now is what workers inherit, but not that some directory does not exist."""
        self._inherited = frozenset(sys.modules)
        for entry in [entry for entry, finder in sys.path_importer_cache.items() if finder is None]:
            del sys.path_importer_cache[entry]

    def begin(self) -> None:
        """The worker begins: what is imported from now on is as young as its file."""
        self._born = time.time()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the import system asks for it; None leaves the module to the other finders."""
        top = name.partition(".")[0]
        if top in self.fixed:
            return _spec_of(name, self.fixed[name]) if name in self.fixed else None
        if self.folder:
            found = PathFinder.find_spec(top, [self.folder])
            if found is not None and found.loader is not None:
                return found if name == top else None
        entry = self._entries.get(name)
        if entry is not None:
            return self._spec(entry)
        if path is None and self._is_standard(name):
            return PathFinder.find_spec(name, self._library)
        return None

    def _is_standard(self, name: str) -> bool:
        """Whether the driver has this module, and has it from the standard library."""
        at = self._standard.get(name)
        return at is not None and at >> 3 < len(self._bits) and bool(self._bits[at >> 3] >> (at & 7) & 1)

    def invalidate_caches(self) -> None:
        """Nothing is cached."""

    def _spec(self, entry: Module) -> ModuleSpec | None:
        file = os.fsdecode(entry.file)
        sent = self._blobs.get(entry.source)
        places = None if entry.places is None else [os.fsdecode(place) for place in entry.places]
        loader: Any = None
        if sent is not None:
            # What the disk still has is compiled once for all workers.
            loader = (
                SourceFileLoader(entry.name, file)
                if _read(file) == sent
                else _SentLoader(entry.name, file, sent)
            )
            self._loaded[entry.name] = entry.source
        elif not os.path.exists(file):
            return None
        return importlib.util.spec_from_file_location(
            entry.name, file, loader=loader, submodule_search_locations=places
        )

    def take_on(self, world: World, *, replace: bool) -> bool:
        """Offer the modules of a world. With ``replace``, loaded ones that are not the driver's are unloaded; whether there were any."""
        self._bits = world.standard
        entries = {module.name: module for module in world.modules}
        if not replace:
            self._entries.update((name, entry) for name, entry in entries.items() if name not in sys.modules)
            return False
        self._entries = entries
        unloaded = False
        for name, entry in entries.items():
            loaded = sys.modules.get(name)
            if (
                loaded is None
                or self._loaded.get(name) == entry.source
                or name.partition(".")[0] in self.fixed
            ):
                continue
            if name in self._inherited and name.partition(".")[0] not in sys.stdlib_module_names:
                # An installed package that the user develops and the zygote has imported, numpy say: a process cannot load it twice.
                continue
            file = getattr(loaded, "__file__", None)
            if file != os.fsdecode(entry.file):
                # A module of the standard library, say, whose name the user's file has: who imported it before keeps it.
                del sys.modules[name]
                unloaded = True
            elif self._is_as_sent(file, entry):
                self._loaded[name] = entry.source
            else:
                self._unload_all()
                return True
        return unloaded

    def _is_as_sent(self, file: str, entry: Module) -> bool:
        """Whether a module that was imported from disk here, before the driver did so, is what the driver has."""
        try:
            unchanged = os.stat(file).st_ctime < self._born
        except OSError:
            return False
        sent = self._blobs.get(entry.source)
        return unchanged and (sent is None or _read(file) == sent)

    def _unload_all(self) -> None:
        """Unload all of the user's modules, because they have imported from one another."""
        for name in [name for name in sys.modules if name in self._entries or name in self._loaded]:
            del sys.modules[name]
        self._loaded.clear()


def _spec_of(name: str, path: str) -> ModuleSpec | None:
    """Of a module that is named by its file or package directory."""
    if not os.path.isdir(path):
        return importlib.util.spec_from_file_location(name, path)
    start = os.path.join(path, "__init__.py")
    if os.path.exists(start):
        return importlib.util.spec_from_file_location(name, start, submodule_search_locations=[path])
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [path]
    return spec


def _read(file: str) -> bytes | None:
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except OSError:
        return None


class Main(ModuleType):
    """``__main__`` in a worker: the names of the notebook or script that the running function knows.

    The standard pickler, and so ``multiprocessing``, looks the functions of a notebook up here.
    """

    def __init__(self) -> None:
        super().__init__("__main__")
        self.__spec__ = None
        self._running = [None]

    def take_on(self, name: str, file: bytes) -> None:
        """Name and file of the driver's ``__main__``: what a spawned process imports before it unpickles."""
        self.__spec__ = ModuleSpec(name, None) if name else None
        if file:
            self.__file__ = os.fsdecode(file)
        elif "__file__" in vars(self):
            del self.__file__

    @property
    def running(self) -> list[Any]:
        """Its one item is the function or class that runs; whoever runs another one puts it there."""
        return vars(self)["_running"]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            target: Any = self.running[0]
            for each in (target, *vars(target).values()) if isinstance(target, type) else (target,):
                names = getattr(each, "__globals__", {})
                if name in names:
                    return names[name]
            if getattr(target, "__name__", None) == name:
                return target
        raise AttributeError(
            f"module '__main__' has no attribute {name!r} in this task: the task's function does not mention that name"
        )
