"""The options of tasks, actors and methods: one table each, checked where they are given.

A wrong option is refused when the decorator or ``.options()`` runs, not when the task does: the message names what was passed, what is expected
and, for a misspelt name, the nearest valid one. Unknown names and impossible values raise ValueError, values of a wrong type TypeError, as in
Ray. Amounts of resources leave here in units of 1/10000, the ledger's unit.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from nbray import ids
from nbray.messages import STREAMING

UNIT = 10_000
"""Ledger units in one CPU, GPU, byte of memory or custom resource."""

TASK_RETRIES = 3
ASYNC_CONCURRENCY = 1000
"""``max_concurrency`` of an actor with ``async def`` methods, unless given."""

INFINITE = -1
"""``max_retries``, ``max_restarts``, ``max_task_retries``: without limit."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(error: type[Exception], name: str, value: object, expected: str) -> Exception:
    return error(f"{name}={_shown(value)} ({type(value).__name__}): expected {expected}")


# -- checks of single values: (name, value) -> the value as nbray keeps it


def amount(name: str, value: Any) -> int | float:
    """A number >= 0 with at most four decimals. Raises TypeError or ValueError."""
    expected = "a number >= 0 in steps of 0.0001, for instance 1 or 0.5"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refuse(TypeError, name, value, expected)
    number = operator.index(value) if isinstance(value, Integral) else float(value)
    if not 0 <= number < float("inf"):
        raise _refuse(ValueError, name, value, expected)
    units = number * UNIT
    if abs(units - round(units)) > 1e-6 * max(1.0, units):
        raise _refuse(
            ValueError, name, value, f"{expected}; the nearest possible one is {round(units) / UNIT:g}"
        )
    return number


def _gpus(name: str, value: Any) -> int | float:
    number = amount(name, value)
    if number > 1 and number != int(number):
        raise _refuse(ValueError, name, value, "a fraction of one GPU, or a whole number of GPUs")
    return number


def _memory(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refuse(TypeError, name, value, "a number of bytes, for instance 2 * 2**30 for 2 GiB")
    if not 0 <= float(value) < 2**60:
        raise _refuse(ValueError, name, value, "a number of bytes >= 0, for instance 2 * 2**30 for 2 GiB")
    return operator.index(value) if isinstance(value, Integral) else int(float(value))


def _resources(name: str, value: Any) -> dict[str, int | float]:
    if not isinstance(value, Mapping):
        raise _refuse(TypeError, name, value, 'a dict of amounts, for instance {"TPU": 1}')
    own = {"cpu": "num_cpus", "gpu": "num_gpus", "memory": "memory"}
    checked: dict[str, int | float] = {}
    for key, wanted in value.items():
        if not isinstance(key, str) or not key:
            raise _refuse(TypeError, f"{name} key", key, 'the name of a resource, for instance "TPU"')
        if key.lower() in own:
            raise ValueError(
                f"{name}={_shown(dict(value))}: {key!r} has an option of its own, {own[key.lower()]}={_shown(wanted)}"
            )
        checked[key] = amount(f"{name}[{key!r}]", wanted)
    return checked


def _integer(name: str, value: Any, least: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refuse(TypeError, name, value, expected)
    number = operator.index(value)
    if not least <= number < 2**31:
        raise _refuse(ValueError, name, value, expected)
    return number


def _whole(least: int, expected: str) -> Callable[[str, Any], int]:
    return lambda name, value: _integer(name, value, least, expected)


_retries = _whole(INFINITE, "a whole number >= 0, or -1 for no limit")
_count = _whole(1, "a whole number >= 1")
_limit = _whole(0, "a whole number >= 0, where 0 means no limit")
_pending = _whole(-1, "a whole number >= 0, where 0 and -1 mean no limit")
_priority = _whole(
    -(2**31), "a whole number of at most 31 bits, where larger is more urgent and the default is 0"
)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(TypeError, name, value, "True or False")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(TypeError, name, value, "a string")
    if not value:
        raise _refuse(ValueError, name, value, "a string that is not empty")
    return value


def _retry_exceptions(name: str, value: Any) -> bool | tuple[type[BaseException], ...]:
    expected = "True, False, or a list of exception classes"
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple):
        raise _refuse(TypeError, name, value, expected)
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise _refuse(TypeError, f"{name} item", item, "an exception class, for instance OSError")
    return tuple(value)


def _num_returns(name: str, value: Any) -> int | str:
    expected = 'a whole number >= 0, or "streaming" for a generator function'
    if value == "streaming":
        return "streaming"
    if isinstance(value, str):
        hint = '; "dynamic" is the old name of "streaming"' if value == "dynamic" else ""
        raise _refuse(ValueError, name, value, expected + hint)
    return _integer(name, value, 0, expected)


def _lifetime(name: str, value: Any) -> str:
    if value not in ("detached", "non_detached"):
        raise _refuse(ValueError, name, value, '"detached" (lives until it is killed) or "non_detached"')
    return str(value)


def _groups(name: str, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise _refuse(TypeError, name, value, 'a dict of concurrency limits, for instance {"io": 2}')
    return {
        _text(f"{name} key", group): _count(f"{name}[{group!r}]", limit) for group, limit in value.items()
    }


def _strategy(name: str, value: Any) -> str:
    if value not in ("DEFAULT", "SPREAD"):
        raise _refuse(ValueError, name, value, '"DEFAULT" or "SPREAD"')
    return str(value)


# -- runtime_env


@dataclass(frozen=True, slots=True)
class Environment:
    """What a task's worker process needs besides the notebook's own world. ``blob``: msgpack of env_vars, working_dir, py_modules."""

    id: bytes
    blob: bytes


RUNTIME_ENV_KEYS = ("env_vars", "working_dir", "py_modules")


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise _refuse(TypeError, name, value, "the path of a directory")
    text = os.fspath(value)
    if not isinstance(text, str) or "://" in text:
        raise _refuse(
            ValueError, name, value, "the path of a local directory; remote addresses are not supported"
        )
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise _refuse(ValueError, name, value, f"a path that exists; there is no {path}")
    return str(path)


def _directory(name: str, value: Any) -> str:
    path = _path(name, value)
    if not Path(path).is_dir():
        raise _refuse(ValueError, name, value, f"a directory; {path} is a file")
    return path


def _module_path(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        places = list(getattr(value, "__path__", None) or ()) or [getattr(value, "__file__", None)]
        if places[0] is None:
            raise _refuse(ValueError, name, value, "a module that was loaded from a file")
        return _path(name, places[0])
    return _path(name, value)


def environment(name: str, value: Any) -> Environment | None:
    """A ``runtime_env``, checked; None when it asks for nothing.

    ``env_vars``: strings to strings; ``working_dir``: a local directory; ``py_modules``: local paths or imported modules. Paths become
    absolute. Values of variables never appear in messages. Raises TypeError or ValueError naming the key.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            f'{name} ({type(value).__name__}): expected a dict, for instance {{"env_vars": {{"TOKEN": "..."}}}}'
        )
    for key in value:
        if key not in RUNTIME_ENV_KEYS:
            raise ValueError(f"{name}: there is no key {key!r}. {_nearest(key, RUNTIME_ENV_KEYS)}")
    variables = value.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{name}['env_vars'] ({type(variables).__name__}): expected a dict of strings to strings"
        )
    for key, content in variables.items():
        if not isinstance(key, str) or not isinstance(content, str):
            raise TypeError(
                f"{name}['env_vars'][{key!r}] ({type(key).__name__}: {type(content).__name__}): expected a string for a string"
            )
    modules = value.get("py_modules") or []
    if not isinstance(modules, list | tuple):
        raise _refuse(TypeError, f"{name}['py_modules']", modules, "a list of paths or modules")
    folder = value.get("working_dir")
    if not variables and not modules and folder is None:
        return None
    content = {
        "env_vars": {key: variables[key] for key in sorted(variables)},
        "working_dir": "" if folder is None else _directory(f"{name}['working_dir']", folder),
        "py_modules": [
            _module_path(f"{name}['py_modules'][{i}]", module) for i, module in enumerate(modules)
        ],
    }
    blob = msgspec.msgpack.encode(content)
    return Environment(ids.content_id(blob), blob)


# -- the tables

Check = Callable[[str, Any], Any]

_RESOURCES: dict[str, Check] = {
    "num_cpus": amount,
    "num_gpus": _gpus,
    "memory": _memory,
    "resources": _resources,
    "runtime_env": environment,
    "scheduling_strategy": _strategy,
}

_RESULTS: dict[str, Check] = {
    "num_returns": _num_returns,
    "retry_exceptions": _retry_exceptions,
    "_generator_backpressure_num_objects": _limit,
}

TASK: dict[str, Check] = {
    **_RESOURCES,
    **_RESULTS,
    "max_retries": _retries,
    "max_calls": _limit,
    "name": _text,
    "priority": _priority,
}

ACTOR: dict[str, Check] = {
    **_RESOURCES,
    "name": _text,
    "namespace": _text,
    "lifetime": _lifetime,
    "get_if_exists": _boolean,
    "max_restarts": _retries,
    "max_task_retries": _retries,
    "max_concurrency": _count,
    "max_pending_calls": _pending,
    "concurrency_groups": _groups,
    "priority": _priority,
}

METHOD: dict[str, Check] = {
    **_RESULTS,
    "concurrency_group": _text,
    "max_task_retries": _retries,
}

_DECORATOR_ONLY = {
    "concurrency_groups": "the class's methods name the groups",
}

_OF_RAY = frozenset({
    "accelerator_type",
    "allow_out_of_order_execution",
    "enable_task_events",
    "fallback_strategy",
    "label_selector",
    "object_store_memory",
    "placement_group",
    "placement_group_bundle_index",
    "placement_group_capture_child_tasks",
    "tensor_transport",
    "_labels",
    "_metadata",
})  # fmt: skip


def _nearest(given: object, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(given), list(valid), n=1, cutoff=0.6)
    names = ", ".join(name for name in valid if not name.startswith("_"))
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Valid ones: {names}"


def check(
    table: Mapping[str, Check], given: Mapping[str, Any], what: str, *, decorator: bool = False
) -> dict[str, Any]:
    """The options ``given``, each checked against ``table`` (`TASK`, `ACTOR` or `METHOD`); None leaves an option at its default.

    ``what``: for messages, for instance "task f". Raises ValueError (unknown name, impossible value) or TypeError (wrong type).
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        test = table.get(name)
        if test is None:
            if name in _OF_RAY:
                raise ValueError(
                    f"{what}: nbray does not have Ray's option {name!r}. {_nearest(name, table)}"
                )
            elsewhere = [
                kind
                for kind, other in (("tasks", TASK), ("actors", ACTOR), ("methods", METHOD))
                if name in other
            ]
            hint = f" It is an option of {' and '.join(elsewhere)}." if elsewhere else ""
            raise ValueError(f"{what}: there is no option {name!r}.{hint} {_nearest(name, table)}")
        if not decorator and name in _DECORATOR_ONLY:
            raise ValueError(
                f"{what}: {name} can be given to the decorator only, @nbray.remote({name}=...), because {_DECORATOR_ONLY[name]}"
            )
        if value is not None:
            try:
                checked[name] = test(name, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{what}: {error}") from None
    return checked


# -- what the engine is told


def resource_units(options: Mapping[str, Any], default_cpus: int) -> dict[str, int]:
    """Resources of checked ``options`` in units of 1/10000, zero amounts left out, sorted by name."""
    wanted: dict[str, int | float] = dict(options.get("resources") or {})
    wanted["CPU"] = options.get("num_cpus", default_cpus)
    wanted["GPU"] = options.get("num_gpus", 0)
    wanted["memory"] = options.get("memory", 0)
    return {name: round(wanted[name] * UNIT) for name in sorted(wanted) if wanted[name]}


def gives_resources(options: Mapping[str, Any]) -> bool:
    """Whether the user gave any amount: an actor then holds its resources for life, as in Ray."""
    return any(options.get(name) is not None for name in ("num_cpus", "num_gpus", "memory", "resources"))


def returns(options: Mapping[str, Any], generator: bool, what: str) -> int:
    """``num_returns`` for the engine: `STREAMING` by default for a generator function, else 1. Raises ValueError."""
    given = options.get("num_returns")
    if given is None:
        return STREAMING if generator else 1
    if given == "streaming":
        if not generator:
            raise ValueError(f'{what}: num_returns="streaming" needs a generator function, one with `yield`')
        return STREAMING
    assert isinstance(given, int)
    return given
