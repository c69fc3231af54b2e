"""How a notebook wants its libraries: plot styles, print options, warning filters, log levels and the like, which are to hold in tasks, too.

The driver tells what differs from the libraries' defaults (`Collector`); a worker takes that on when it has the library, or as soon as it imports it
(`Preferences`). Libraries that the driver has not loaded are not asked, and none is imported for this.
"""

from __future__ import annotations

import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Options = dict[str, Any]
"""By name, as the library calls them."""

_ABSENT = object()


class Library:
    """One library's options. ``module``: the name by which it is known to be loaded."""

    module = ""

    def read(self, module: Any) -> Options:
        """All that may travel, as it is now."""
        raise AssertionError

    def defaults(self, module: Any) -> Options:
        """What is not worth telling."""
        raise AssertionError

    def write(self, module: Any, options: Options) -> None:
        """Set some of them; what this version does not know is left out. May raise anything."""
        raise AssertionError


class _Matplotlib(Library):
    """rcParams, but for those that say where figures go: that is the worker's business."""

    module = "matplotlib"

    def read(self, module: Any) -> Options:
        return self._plain(module.rcParams)

    def defaults(self, module: Any) -> Options:
        return self._plain(module.rcParamsDefault)

    @staticmethod
    def _plain(params: Any) -> Options:
        # Not by its own methods: looking at "backend" would load one.
        return {
            name: value
            for name, value in dict.items(params)
            if not name.startswith(
                ("backend", "interactive", "toolbar", "webagg", "tk.", "macosx", "figure.hooks")
            )
        }

    def write(self, module: Any, options: Options) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in options.items():
                if name in module.rcParams:
                    module.rcParams[name] = value


class _Pandas(Library):
    module = "pandas"

    def read(self, module: Any) -> Options:
        found: Options = {}
        self._flatten("", self._config()._global_config, found)
        return found

    def defaults(self, module: Any) -> Options:
        return {name: option.defval for name, option in self._config()._registered_options.items()}

    @staticmethod
    def _config() -> Any:
        return sys.modules["pandas._config.config"]

    def _flatten(self, prefix: str, options: Mapping[str, Any], found: Options) -> None:
        for name, value in options.items():
            if type(value) is dict:
                self._flatten(f"{prefix}{name}.", value, found)
            else:
                found[prefix + name] = value

    def write(self, module: Any, options: Options) -> None:
        known = self._config()._registered_options
        with warnings.catch_warnings():
            # Of options that will be gone one day.
            warnings.simplefilter("ignore")
            for name, value in options.items():
                if name in known:
                    module.set_option(name, value)


class _Numpy(Library):
    """How arrays print, and what floating-point errors do."""

    module = "numpy"

    _DEFAULTS = {
        "edgeitems": 3, "threshold": 1000, "floatmode": "maxprec", "precision": 8, "suppress": False, "linewidth": 75, "nanstr": "nan",
        "infstr": "inf", "sign": "-", "formatter": None, "legacy": False, "override_repr": None,
        "err:divide": "warn", "err:over": "warn", "err:under": "ignore", "err:invalid": "warn",
    }  # fmt: skip

    def read(self, module: Any) -> Options:
        errors = {f"err:{name}": value for name, value in module.geterr().items()}
        return {**module.get_printoptions(), **errors}

    def defaults(self, module: Any) -> Options:
        return self._DEFAULTS

    def write(self, module: Any, options: Options) -> None:
        known = module.get_printoptions()
        prints = {name: value for name, value in options.items() if name in known}
        errors = {name[4:]: value for name, value in options.items() if name.startswith("err:")}
        if prints:
            module.set_printoptions(**prints)
        if errors:
            module.seterr(**errors)


class _Sklearn(Library):
    module = "sklearn"

    _DEFAULTS = {
        "assume_finite": False, "working_memory": 1024, "print_changed_only": True, "display": "diagram", "pairwise_dist_chunk_size": 256,
        "enable_cython_pairwise_dist": True, "array_api_dispatch": False, "transform_output": "default", "enable_metadata_routing": False,
        "skip_parameter_validation": False,
    }  # fmt: skip

    def read(self, module: Any) -> Options:
        found: Options = module.get_config()
        return found

    def defaults(self, module: Any) -> Options:
        return self._DEFAULTS

    def write(self, module: Any, options: Options) -> None:
        known = module.get_config()
        module.set_config(**{name: value for name, value in options.items() if name in known})


class _Logging(Library):
    """Levels of the loggers, and the root's handlers that write to the terminal: without one nothing below WARNING is seen."""

    module = "logging"

    def read(self, module: Any) -> Options:
        root = module.root
        found: Options = {"": root.level, "disable": root.manager.disable}
        for name, logger in list(root.manager.loggerDict.items()):
            level = getattr(logger, "level", 0)
            if level:
                found[f"of {name}"] = level
        handlers = []
        for handler in root.handlers:
            # Exactly: those that write to a file are the notebook's own.
            if type(handler) is module.StreamHandler and handler.formatter is None:
                handlers.append((None, None, handler.level))
            elif type(handler) is module.StreamHandler and type(handler.formatter) is module.Formatter:
                handlers.append((handler.formatter._fmt, handler.formatter.datefmt, handler.level))
        found["handlers"] = handlers
        return found

    def defaults(self, module: Any) -> Options:
        return {"": module.WARNING, "disable": 0, "handlers": []}

    def write(self, module: Any, options: Options) -> None:
        for name, value in options.items():
            if name == "":
                module.root.setLevel(value)
            elif name == "disable":
                module.disable(value)
            elif name == "handlers":
                self._set_handlers(module, value)
            else:
                module.getLogger(name[3:]).setLevel(module.NOTSET if value is _ABSENT else value)

    @staticmethod
    def _set_handlers(module: Any, handlers: list[tuple[str | None, str | None, int]]) -> None:
        root = module.root
        for handler in [
            each for each in root.handlers if isinstance(getattr(each, "stream", None), _StandardError)
        ]:
            root.removeHandler(handler)
        # A task that has made its own would say everything twice.
        if not root.handlers:
            for form, dates, level in handlers:
                made = module.StreamHandler(_StandardError())
                made.setLevel(level)
                made.setFormatter(module.Formatter(form, dates))
                root.addHandler(made)


class _StandardError:
    """What is the standard error at that moment: each task has its own."""

    def write(self, text: str) -> int:
        """As a file's."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """As a file's."""
        sys.stderr.flush()


class _Warnings(Library):
    """The filters; classes by name, because a task need not have loaded the library that a class is from."""

    module = "warnings"

    _STANDARD = (
        ("default", None, ("builtins", "DeprecationWarning"), "__main__", 0),
        ("ignore", None, ("builtins", "DeprecationWarning"), None, 0),
        ("ignore", None, ("builtins", "PendingDeprecationWarning"), None, 0),
        ("ignore", None, ("builtins", "ImportWarning"), None, 0),
        ("ignore", None, ("builtins", "ResourceWarning"), None, 0),
    )

    def read(self, module: Any) -> Options:
        return {"filters": [self._named(each) for each in module.filters]}

    @staticmethod
    def _named(entry: Any) -> tuple[Any, ...]:
        action, message, category, place, line = entry
        return (
            action,
            getattr(message, "pattern", message),
            (category.__module__, category.__qualname__),
            getattr(place, "pattern", place),
            line,
        )

    def defaults(self, module: Any) -> Options:
        return {"filters": list(self._STANDARD)}

    def write(self, module: Any, options: Options) -> None:
        wanted = [tuple(entry) for entry in options["filters"]]
        # Filters of libraries that only the worker has loaded say which message they are about.
        own = [
            entry for entry in module.filters if (entry[1] or entry[3]) and self._named(entry) not in wanted
        ]
        made = [found for found in map(self._made, wanted) if found is not None]
        module.filters[:] = made + own
        module._filters_mutated() if hasattr(
            module, "_filters_mutated"
        ) else module._filters_mutated_lock_held()

    @staticmethod
    def _made(entry: tuple[Any, ...]) -> tuple[Any, ...] | None:
        action, message, (home, name), place, line = entry
        category: Any = sys.modules.get(home)
        for part in name.split("."):
            category = getattr(category, part, None)
        if not isinstance(category, type):
            return None
        return (
            action,
            # As plain texts where Python has them so.
            re.compile(message, re.IGNORECASE) if message else None,
            category,
            "__main__" if place == "__main__" else re.compile(place) if place else None,
            line,
        )


class _Locale(Library):
    module = "locale"

    def read(self, module: Any) -> Options:
        return {
            name: module.setlocale(getattr(module, name))
            for name in ("LC_NUMERIC", "LC_TIME", "LC_COLLATE", "LC_MONETARY")
        }

    def defaults(self, module: Any) -> Options:
        return dict.fromkeys(("LC_NUMERIC", "LC_TIME", "LC_COLLATE", "LC_MONETARY"), "C")

    def write(self, module: Any, options: Options) -> None:
        for name, value in options.items():
            try:
                module.setlocale(getattr(module, name), value)
            except module.Error:
                continue  # this machine does not have it


class _Decimal(Library):
    """The context of the main thread."""

    module = "decimal"

    _NAMES = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")

    def read(self, module: Any) -> Options:
        current = module.getcontext()
        traps = sorted(signal.__name__ for signal, on in current.traps.items() if on)
        return {**{name: getattr(current, name) for name in self._NAMES}, "traps": traps}

    def defaults(self, module: Any) -> Options:
        return {
            "prec": 28, "rounding": "ROUND_HALF_EVEN", "Emin": -999999, "Emax": 999999, "capitals": 1, "clamp": 0,
            "traps": ["DivisionByZero", "InvalidOperation", "Overflow"],
        }  # fmt: skip

    def write(self, module: Any, options: Options) -> None:
        current = module.getcontext()
        for name, value in options.items():
            if name == "traps":
                for signal in current.traps:
                    current.traps[signal] = signal.__name__ in value
            else:
                setattr(current, name, value)


class _Recursion(Library):
    module = "sys"

    def read(self, module: Any) -> Options:
        return {"recursion": module.getrecursionlimit()}

    def defaults(self, module: Any) -> Options:
        return {"recursion": 1000}

    def write(self, module: Any, options: Options) -> None:
        module.setrecursionlimit(options["recursion"])


LIBRARIES: dict[str, Library] = {
    library.module: library
    for library in (
        _Matplotlib(), _Pandas(), _Numpy(), _Sklearn(), _Logging(), _Warnings(), _Locale(), _Decimal(), _Recursion(),
    )
}  # fmt: skip
"""By the module that is to be loaded."""


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # noqa: BLE001  (whatever somebody put there)
        return False


def _differences(current: Options, base: Options) -> Options:
    return {name: value for name, value in current.items() if not _same(value, base.get(name, _ABSENT))}


class Collector:
    """The driver's side: what differs from the defaults, pickled by library."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Options, bytes]] = {}

    def collect(self, pickled: Callable[[Any], bytes]) -> dict[str, bytes]:
        """Differences of the libraries that are loaded, each library's as ``pickled`` pickles them. 0.1 ms; nothing is pickled unless it changed."""
        if threading.current_thread() is not threading.main_thread():
            # Contexts and error states of other threads are their own.
            return {name: blob for name, (_, blob) in sorted(self._known.items()) if blob}
        found: dict[str, bytes] = {}
        for name, library in sorted(LIBRARIES.items()):
            module = sys.modules.get(name)
            if module is None:
                continue
            try:
                current = library.read(module)
                known = self._known.get(name)
                if known is None or known[0] != current:
                    blob = _pickle(_differences(current, library.defaults(module)), pickled)
                    self._known[name] = current, blob
                else:
                    blob = known[1]
            except Exception:  # noqa: BLE001  (a version that keeps them elsewhere, or is being imported by another thread)
                continue
            if blob:
                found[name] = blob
        return found


def _pickle(options: Options, pickled: Callable[[Any], bytes]) -> bytes:
    if not options:
        return b""
    try:
        return pickled(options)
    except Exception:  # noqa: BLE001  (one of them is a function over something that cannot be sent, say)
        kept: Options = {}
        for name, value in options.items():
            try:
                pickled(value)
            except Exception:  # noqa: BLE001
                continue
            kept[name] = value
        return pickled(kept) if kept else b""


class Preferences:
    """A worker's side: takes on what a world says, and remembers how things were."""

    def __init__(self) -> None:
        self._wanted: dict[str, bytes] = {}
        self._applied: dict[str, bytes] = {}
        self._originals: dict[str, Options] = {}
        self._expected: dict[str, Options] = {}

    def take_on(self, wanted: dict[str, bytes]) -> None:
        """From now on; libraries that are not loaded wait for `loaded`."""
        self._wanted = wanted
        for name in LIBRARIES:
            module = sys.modules.get(name)
            if module is not None and not _is_loading(module):
                self._set(name, module)

    def loaded(self, name: str) -> None:
        """The module has just been imported."""
        module = sys.modules.get(name)
        if module is not None:
            self._set(name, module)
        if name != "warnings" and "warnings" in self._wanted:
            # Now there are the classes of its warnings.
            self._applied.pop("warnings", None)
            self._set("warnings", warnings)

    def renew(self) -> None:
        """After a cell: what it has set for itself is not left to the next one."""
        for name, expected in list(self._expected.items()):
            module, library = sys.modules.get(name), LIBRARIES[name]
            try:
                current = library.read(module)
                if current == expected:
                    continue
                changed = _differences(expected, current)
                changed |= {key: _ABSENT for key in current.keys() - expected.keys() if key.startswith("of ")}
                if changed:
                    library.write(module, changed)
            except Exception:  # noqa: BLE001  (whatever the cell has done to the library)
                continue

    def _set(self, name: str, module: ModuleType) -> None:
        blob = self._wanted.get(name, b"")
        if self._applied.get(name, b"") == blob and name in self._expected:
            return
        library = LIBRARIES[name]
        try:
            options: Options = pickle.loads(blob) if blob else {}
            originals = self._originals.setdefault(name, {})
            current = library.read(module)
            base = library.defaults(module)
            again = {key: value for key, value in originals.items() if key not in options}
            for key in options:
                originals.setdefault(key, current.get(key, base.get(key, _ABSENT)))
            if again or options:
                library.write(module, {**again, **options})
            self._applied[name] = blob
            self._expected[name] = library.read(module)
        except Exception:  # noqa: BLE001  (another version of the library: it goes without)
            self._applied[name] = blob


of_this_worker = Preferences()
"""A driver does not use it."""


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
