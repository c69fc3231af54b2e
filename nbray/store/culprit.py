"""Why a value cannot be sent, for people: finds the part of it that cannot be pickled, and what to do instead.

Used after pickling failed, so it may take its time (bounded): it pickles parts of the value one by one and follows those that fail.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any

from nbray.errors import SerializationError
from nbray.store import serialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_MOST_TRIES = 2000
_MOST_STEPS = 50

_ADVICE: dict[str, str] = {
    "generator": "Send list(...) of it, or the arguments to make it from.",
    "async_generator": "Send the arguments to make it from.",
    "coroutine": "Await it first and send its result.",
    "TextIOWrapper": "Send the path and open the file inside the task.",
    "BufferedReader": "Send the path and open the file inside the task.",
    "BufferedWriter": "Send the path and open the file inside the task.",
    "BufferedRandom": "Send the path and open the file inside the task.",
    "FileIO": "Send the path and open the file inside the task.",
    "frame": "Send what you need of it as text or numbers.",
    "traceback": "Send what you need of it as text, for instance traceback.format_exc().",
    "mappingproxy": "Send dict(...) of it.",
    "dict_keys": "Send list(...) of it.",
    "dict_values": "Send list(...) of it.",
    "dict_items": "Send list(...) of it.",
    "ReferenceType": "Send the object itself instead of a weak reference to it.",
    "WeakKeyDictionary": "Send dict(...) of it.",
    "WeakValueDictionary": "Send dict(...) of it.",
}
_DEFAULT_ADVICE = "Make it inside the task, keep it in an actor, or leave it out of what is sent (a class can do so with __getstate__)."


def explain(error: Exception, value: Any, name: str) -> SerializationError:
    """The error to raise for ``value``, called ``name``, which cannot be pickled because of ``error``."""
    if isinstance(error, RecursionError) or "recursion" in str(error):
        return SerializationError(
            f"{name} cannot be sent to another process: it is of type {_type_name(value)} and nested too deeply to be pickled "
            "(a linked list, or a tree of thousands of levels). Send a flat form of it, for instance a list or an array."
        )
    path, culprit, reason = _find(value, error)
    kind = _type_name(culprit)
    what = f"it is of type {kind}" if not path else f"its part {_with_path(name, path)} is of type {kind}"
    advice = _ADVICE.get(type(culprit).__name__, _DEFAULT_ADVICE)
    return SerializationError(
        f"{name} cannot be sent to another process: {what}, which cannot be pickled ({_one_line(reason)}). {advice}"
    )


def explain_arguments(
    error: Exception,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    function: Callable[..., Any] | str | None,
) -> SerializationError:
    """As `explain`, for the first argument of a call that cannot be pickled, under its parameter's name."""
    called = function if isinstance(function, str) else getattr(function, "__name__", "")
    names = _parameters(function)
    of = f" of {called}" if called else ""
    for place, value in enumerate(args):
        failure = _failure(value)
        if failure is not None:
            known = f" ({names[place]!r})" if place < len(names) else ""
            return explain(failure, value, f"argument {place + 1}{known}{of}")
    for key, value in kwargs.items():
        failure = _failure(value)
        if failure is not None:
            return explain(failure, value, f"argument {key!r}{of}")
    return SerializationError(f"the arguments{of} cannot be sent to another process: {_one_line(error)}")


def largest_captures(function: Any) -> list[tuple[str, int]]:
    """(variable, bytes when pickled) of what a function drags along: globals and closure it reads, defaults; largest first."""
    sizes = []
    for name, value in _captures(function):
        try:
            sizes.append((name, serialization.serialize(value).size))
        except Exception:  # noqa: BLE001  (what cannot be pickled is not what makes a pickle large)
            continue
    return sorted(sizes, key=lambda pair: -pair[1])


def advice(value: Any, default: str) -> str:
    """What to do with a value of a type that cannot be pickled."""
    return _ADVICE.get(type(value).__name__, default)


def _find(value: Any, error: Exception) -> tuple[str, Any, Exception]:
    return locate(value, error, _failure, lambda part: False)


def locate(
    value: Any,
    error: BaseException,
    fails: Callable[[Any], Exception | None],
    known: Callable[[Any], bool],
) -> tuple[str, Any, Any]:
    """Path to the deepest part for which ``fails`` finds an error, that part, and its error; nothing is looked for inside of what is ``known``."""
    path = ""
    tries = 0
    seen = {id(value)}
    for _ in range(_MOST_STEPS):
        if known(value):
            break
        for step, part in _parts(value):
            if id(part) in seen:
                continue
            tries += 1
            if tries > _MOST_TRIES:
                return path, value, error
            failure = fails(part)
            if failure is not None:
                seen.add(id(part))
                path, value, error = path + step, part, failure
                break
        else:
            break
    return path, value, error


def _failure(value: Any) -> Exception | None:
    try:
        serialization.pickle_value(value)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is why the value cannot be sent)
        return error
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each with how it is reached."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f" key {_short(key)}", key
            yield f"[{_short(key)}]", item
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(value, set | frozenset):
        for item in value:
            yield f" member {_short(item)}", item
    elif isinstance(value, types.FunctionType):
        for name, item in _captures(value):
            yield f" variable {name!r}", item
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        for index, item in enumerate(value.args):
            yield f".args[{index}]", item
        for name, item in value.keywords.items():
            yield f".keywords[{name!r}]", item
    elif isinstance(value, type):
        for name, item in vars(value).items():
            if not name.startswith("__") or isinstance(item, types.FunctionType):
                yield f".{name}", item
    if not isinstance(value, type | types.FunctionType | types.ModuleType):
        yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseException):
        for index, item in enumerate(value.args):
            yield f".args[{index}]", item
    kind: Any = type(value)
    if kind.__getstate__ is not object.__getstate__ or kind.__reduce__ is not object.__reduce__:
        # The class itself says what is pickled.
        try:
            reduced = value.__reduce_ex__(5)
        except Exception:  # noqa: BLE001  (then the value itself is the culprit)
            return
        if isinstance(reduced, tuple):
            for part in reduced[1:3]:
                if isinstance(part, dict):
                    yield from ((f".{key}", item) for key, item in part.items())
                elif isinstance(part, tuple):
                    yield from ((f" part {index}", item) for index, item in enumerate(part))
        return
    yield from ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def _captures(function: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that a function carries when it is pickled by value."""
    function = inspect.unwrap(function) if callable(function) else function
    if isinstance(function, type):
        for item in vars(function).values():
            if isinstance(item, types.FunctionType):
                yield from _captures(item)
        return
    if isinstance(function, types.MethodType):
        yield "self", function.__self__
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, default in zip(
        reversed(list(_parameters(function))), reversed(function.__defaults__ or ()), strict=False
    ):
        yield name, default
    yield from (function.__kwdefaults__ or {}).items()


def _global_names(code: types.CodeType) -> list[str]:
    import dis

    names = {
        instruction.argval: None
        for instruction in dis.get_instructions(code)
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_global_names(constant))
    return list(names)


def _parameters(function: Any) -> list[str]:
    """Names of the positional parameters, as far as they can be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in signature.parameters.items() if parameter.kind in positional]


def _type_name(value: Any) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ in {"builtins", "__main__"}
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _with_path(name: str, path: str) -> str:
    return f"{name}{path}" if not name.startswith(("argument", "the value")) else path.strip()


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (a broken repr must not hide the error that is being explained)
        return f"<{type(value).__name__}>"
    return text if len(text) <= 40 else text[:37] + "..."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
