"""Actors: classes whose instances live in processes of their own, handles to them, and what an actor can do to itself.

What a handle knows of its actor's class is a *method table*, made from the class when an actor is created and carried by the handle wherever it
goes (`MethodTable`), so that a handle works in processes that never saw the class. A handle counts as a reference to the result of the actor's
creation: the actor lives while anyone holds one. Weak handles (`nbray.get_actor`, an actor's own, those of detached actors) do not count.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from nbray import ids
from nbray.api import context, options
from nbray.api.arguments import KINDS, Arguments, name_culprit, signature_of
from nbray.api.functions import FunctionExport, Version, register
from nbray.engine.base import Engine
from nbray.errors import ActorDiedError, PendingCallsLimitExceededError, SerializationError
from nbray.messages import ACTOR_CALL, CREATE_ACTOR, STREAMING, ActorInfo, ActorOptions, TaskClass

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_TABLES_LIMIT = 1000

_METHOD_OPTIONS = "__nbray_method__"


# -- what methods an actor has


class _Entry(msgspec.Struct, array_like=True, omit_defaults=True):
    """One method in an encoded table. ``parameters``: (name, kind, has default) without ``self``; None where they are unknown."""

    num_returns: int = 1
    group: str = ""
    max_task_retries: int = 0
    retry_exceptions: bool = False
    is_async: bool = False
    is_generator: bool = False
    backpressure: int = 0
    parameters: list[tuple[str, int, bool]] | None = None


class _Encoded(msgspec.Struct, array_like=True):
    """A method table as it travels: ``ActorOptions.methods``, ``ActorInfo.methods``, opaque to the node."""

    function: bytes
    methods: dict[str, _Entry]
    groups: list[str]


_decode_table = msgspec.msgpack.Decoder(_Encoded).decode
_encode_table = msgspec.msgpack.Encoder().encode


class _Method:
    """A method of an actor class with one set of options, and its number at the engine that it was last called through."""

    __slots__ = ("arguments", "bound", "entry", "name", "shapes", "table", "variants")

    def __init__(self, table: MethodTable, name: str, entry: _Entry) -> None:
        self.table = table
        self.name = name
        self.entry = entry
        self.bound: tuple[Engine | None, int] = (None, 0)
        self.arguments = Arguments(f"{table.class_name}.{name}", self.signature)
        self.shapes = self.arguments.shapes
        self.variants: dict[bytes, _Method] = {}

    def bind(self, engine: Engine) -> tuple[Engine | None, int]:
        entry = self.entry
        spec = TaskClass(
            kind=ACTOR_CALL,
            function=self.table.function_id,
            name=f"{self.table.class_name}.{self.name}",
            resources={},
            num_returns=entry.num_returns,
            max_retries=entry.max_task_retries,
            retry_exceptions=entry.retry_exceptions,
            backpressure=entry.backpressure,
            concurrency_group=entry.group,
        )
        self.bound = (engine, engine.register(spec, None))
        return self.bound

    def signature(self) -> inspect.Signature | None:
        if self.entry.parameters is None:
            return None
        return inspect.Signature([
            inspect.Parameter(name, KINDS[kind], default=... if has_default else inspect.Parameter.empty)
            for name, kind, has_default in self.entry.parameters
        ])  # fmt: skip

    def variant(self, given: Mapping[str, Any]) -> _Method:
        what = f"method {self.table.class_name}.{self.name}"
        checked = options.check(options.METHOD, given, what)
        entry = msgspec.structs.replace(self.entry)
        if "num_returns" in checked:
            entry.num_returns = options.returns(checked, entry.is_generator, what)
        if "concurrency_group" in checked:
            entry.group = _known_group(checked["concurrency_group"], self.table.groups, what)
        entry.max_task_retries = checked.get("max_task_retries", entry.max_task_retries)
        entry.backpressure = checked.get("_generator_backpressure_num_objects", entry.backpressure)
        retry = checked.get("retry_exceptions", entry.retry_exceptions)
        if isinstance(retry, tuple):
            raise ValueError(
                f"{what}: a list of retry_exceptions is part of the class: give it to the decorator of the method, "
                "@nbray.method(retry_exceptions=[...]); here it can be True or False"
            )
        entry.retry_exceptions = retry
        key = _encode_table(entry)
        known = self.variants.get(key)
        if known is None:
            known = self.variants[key] = _Method(self.table, self.name, entry)
        return known


class MethodTable:
    """What a handle knows of its actor's class. ``encoded``: the form that travels."""

    __slots__ = ("class_name", "encoded", "function_id", "groups", "methods", "mode")

    def __init__(self, class_name: str, mode: str, encoded: bytes) -> None:
        decoded = _decode_table(encoded)
        self.class_name = class_name
        self.mode = mode
        self.encoded = encoded
        self.function_id = decoded.function
        self.groups = decoded.groups
        self.methods = {name: _Method(self, name, entry) for name, entry in decoded.methods.items()}
        for name in BUILT_IN:
            self.methods[name] = _Method(self, name, _Entry())

    @staticmethod
    def of(class_name: str, mode: str, encoded: bytes) -> MethodTable:
        """The table for an encoded one; handles of one class share it."""
        key = (class_name, mode, encoded)
        table = _tables.get(key)
        if table is None:
            if len(_tables) >= _TABLES_LIMIT:
                _tables.clear()
            table = _tables[key] = MethodTable(*key)
        return table


_tables: dict[tuple[str, str, bytes], MethodTable] = {}


def method(*targets: Any, **given: Any) -> Callable[[F], F]:
    """Options of one method of an actor class: ``@nbray.method(num_returns=2)``.

    ``num_returns``, ``concurrency_group``, ``max_task_retries``, ``retry_exceptions``. Raises ValueError or TypeError naming a wrong one.
    """
    if targets or not given:
        raise TypeError("nbray.method needs options given by name, for instance @nbray.method(num_returns=2)")
    checked = options.check(options.METHOD, given, "method", decorator=True)

    def decorate(function: F) -> F:
        setattr(function, _METHOD_OPTIONS, checked)
        return function

    return decorate


def _methods_of(kind: type) -> Iterator[tuple[str, Any, bool]]:
    """Name, function, and whether its first parameter is bound, of all that can be called on an actor of this class."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        found.update(vars(base))
    for name, value in found.items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        callable_ = isinstance(function, FunctionType) or isinstance(
            getattr(function, "__wrapped__", None), FunctionType
        )
        if (
            callable_
            and not isinstance(function, type)
            and name not in _NO_METHODS
            and not hasattr(ActorHandle, name)
        ):
            yield name, function, not isinstance(value, staticmethod)


_NO_METHODS = frozenset({"__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__"})


def _parameters(function: Any, bound: bool) -> list[tuple[str, int, bool]] | None:
    signature = signature_of(function)
    if signature is None:
        return None
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return [(each.name, int(each.kind), each.default is not inspect.Parameter.empty) for each in parameters]


def _known_group(group: str, groups: list[str], what: str) -> str:
    if group not in groups:
        close = difflib.get_close_matches(group, groups, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"the class has {', '.join(map(repr, groups)) or 'none'}"
        )
        raise ValueError(
            f"{what}: there is no concurrency group {group!r}; {hint} (@nbray.remote(concurrency_groups={{...}}))"
        )
    return group


def _entries(kind: type, given: Mapping[str, Any]) -> dict[str, _Entry]:
    groups = list(given.get("concurrency_groups") or ())
    entries = {}
    for name, function, bound in _methods_of(kind):
        own: Mapping[str, Any] = getattr(function, _METHOD_OPTIONS, {})
        what = f"method {kind.__name__}.{name}"
        code = inspect.unwrap(function)
        generator = inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code)
        group = own.get("concurrency_group", "")
        entries[name] = _Entry(
            num_returns=options.returns(own, generator, what),
            group=_known_group(group, groups, what) if group else "",
            max_task_retries=own.get("max_task_retries", given.get("max_task_retries", 0)),
            # A list stays with the method (`retry_exceptions_of`): its classes may be the user's.
            retry_exceptions=own.get("retry_exceptions") is True,
            is_async=inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code),
            is_generator=generator,
            backpressure=own.get("_generator_backpressure_num_objects", 0),
            parameters=_parameters(function, bound),
        )
    return entries


def retry_exceptions_of(method: Any) -> tuple[type[BaseException], ...] | None:
    """In the worker: the list of exceptions that a method was decorated with as ``retry_exceptions``."""
    given = getattr(method, _METHOD_OPTIONS, {}).get("retry_exceptions")
    return given if isinstance(given, tuple) else None


# -- handles


class ActorMethod:
    """A method of an actor: ``handle.method.remote(...)`` submits a call and returns its `ObjectRef` at once."""

    __slots__ = ("_handle", "_method")

    def __init__(self, handle: ActorHandle[Any], method: _Method) -> None:
        self._handle = handle
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit a call; returns at once, with the same results as `RemoteFunction.remote`.

        Calls of one process to one actor run in the order of submission (unless the actor is async or threaded). Raises TypeError (arguments
        that the method does not take), SerializationError, PendingCallsLimitExceededError; an actor that is dead shows in the result.
        """
        called, handle = self._method, self._handle
        if kwargs or len(args) not in called.shapes:
            called.arguments.check(args, kwargs)
        engine = context.require().engine
        if engine is not handle._nbray_engine:
            raise ActorDiedError(
                f"{handle!r} belongs to a cluster that this process is no longer connected to; create the actor again"
            )
        bound = called.bound
        if bound[0] is not engine:
            bound = called.bind(engine)
        if handle._nbray_pending is not None:
            return handle._nbray_call_limited(called, args, kwargs)
        try:
            return engine.call(handle._nbray_id, bound[1], args, kwargs)
        except SerializationError as error:
            raise name_culprit(error, args, kwargs, self) from error.__cause__

    def options(self, **given: Any) -> ActorMethod:
        """The same method with other options: ``num_returns``, ``concurrency_group``, ``max_task_retries``, ``retry_exceptions``."""
        return ActorMethod(self._handle, self._method.variant(given))

    @property
    def __signature__(self) -> inspect.Signature:
        return self._method.signature() or inspect.Signature()

    @property
    def __name__(self) -> str:
        return self._method.name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self._method.name} runs in the actor's process: call .{self._method.name}.remote(...)"
        )

    def __repr__(self) -> str:
        return f"<ActorMethod {self._method.name} of {self._handle!r}>"


class _Pending:
    """Calls of a handle with ``max_pending_calls`` that may be unfinished."""

    __slots__ = ("calls", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: list[Any] = []


class ActorHandle(Generic[T]):
    """A handle to an actor. Its attributes are the class's methods; can be sent to tasks and other actors. Equal if of the same actor."""

    __slots__ = (
        "__weakref__", "_nbray_engine", "_nbray_hold", "_nbray_id", "_nbray_name", "_nbray_namespace", "_nbray_pending", "_nbray_table",
    )  # fmt: skip

    __nbray_handle__ = True

    def __init__(
        self,
        engine: Engine,
        actor: bytes,
        table: MethodTable,
        hold: Any = None,
        *,
        name: str = "",
        namespace: str = "",
        max_pending: int = 0,
    ) -> None:
        """``hold``: the reference by which this handle keeps the actor alive; None for a weak handle."""
        self._nbray_engine = engine
        self._nbray_id = actor
        self._nbray_table = table
        self._nbray_hold = hold
        self._nbray_name = name
        self._nbray_namespace = namespace
        self._nbray_pending = _Pending(max_pending) if max_pending > 0 else None

    @staticmethod
    def weak(engine: Engine, info: ActorInfo) -> ActorHandle[Any]:
        """A handle that does not keep its actor alive."""
        table = MethodTable.of(info.class_name, info.mode, info.methods)
        return ActorHandle(engine, info.actor, table, name=info.name, namespace=info.namespace)

    def __getattr__(self, name: str) -> ActorMethod:
        found = self._nbray_table.methods.get(name)
        if found is None:
            raise AttributeError(self._nbray_unknown(name))
        return ActorMethod(self, found)

    def _nbray_unknown(self, name: str) -> str:
        table = self._nbray_table
        text = f"the actor class {table.class_name} has no method {name!r}"
        if name.startswith("_"):
            return text
        names = [each for each in table.methods if each not in BUILT_IN]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names)) or 'none'}"
        return f"{text}; {hint} Its attributes can be reached through methods only."

    def _nbray_call_limited(self, called: _Method, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        pending, engine = self._nbray_pending, self._nbray_engine
        assert pending is not None
        if len(pending.calls) >= pending.limit:
            _, pending.calls = engine.wait(pending.calls, len(pending.calls), 0, False)
            if len(pending.calls) >= pending.limit:
                raise PendingCallsLimitExceededError(
                    f"{len(pending.calls)} calls of {self!r} wait for the actor, which is its max_pending_calls; wait for some of them "
                    "before the next, or raise the limit"
                )
        # A call without results is made to have one: its end would show nowhere else.
        watched = called if called.entry.num_returns else called.variant({"num_returns": 1})
        number = watched.bound[1] if watched.bound[0] is engine else watched.bind(engine)[1]
        result = engine.call(self._nbray_id, number, args, kwargs)
        if called.entry.num_returns != STREAMING:
            pending.calls.append(result[0] if isinstance(result, list) else result)
        return result if called.entry.num_returns else None

    def __dir__(self) -> list[str]:
        return sorted(name for name in self._nbray_table.methods if name not in BUILT_IN)

    def __hash__(self) -> int:
        return hash(self._nbray_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._nbray_id == self._nbray_id

    def __repr__(self) -> str:
        named = f", name={self._nbray_name!r}" if self._nbray_name else ""
        return f"ActorHandle({self._nbray_table.class_name}, {ids.short(self._nbray_id)}{named})"

    def __reduce__(self) -> tuple[Any, ...]:
        table = self._nbray_table
        limit = self._nbray_pending.limit if self._nbray_pending else 0
        state = (
            self._nbray_id,
            table.class_name,
            table.mode,
            table.encoded,
            self._nbray_name,
            self._nbray_namespace,
            limit,
        )
        return _rebuild, (state, self._nbray_hold)


def _rebuild(state: tuple[bytes, str, str, bytes, str, str, int], hold: Any) -> ActorHandle[Any]:
    actor, class_name, mode, encoded, name, namespace, limit = state
    engine = context.require().engine
    table = MethodTable.of(class_name, mode, encoded)
    return ActorHandle(engine, actor, table, hold, name=name, namespace=namespace, max_pending=limit)


# -- classes


class ActorClass(Generic[T]):
    """A class whose instances are actors. ``C.remote(...)`` creates one and returns its handle at once. The class itself is ``C.__wrapped__``."""

    __name__: str
    __wrapped__: type[T]

    def __init__(self, kind: type[T], given: Mapping[str, Any]) -> None:
        """``given``: checked options (`nbray.api.options`)."""
        self._set_up(kind, dict(given), None)

    def _set_up(self, kind: type[T], given: dict[str, Any], export: FunctionExport | None) -> None:
        functools.update_wrapper(self, kind, updated=())
        self._class = kind
        self._options = given
        self._name = kind.__name__
        self._entries = _entries(kind, given)
        if given.get("get_if_exists") and not given.get("name"):
            raise ValueError(
                f"{self._title}: get_if_exists=True needs a name: the actor to get is the one of that name"
            )
        self._export = export or FunctionExport(kind, self._title)
        self._environment = given.get("runtime_env")
        self._arguments = Arguments(self._name, lambda: signature_of(kind))
        self._shapes = self._arguments.shapes
        self._bound: tuple[Any, Version | None, int, Any, Any] = (None, None, 0, None, None)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle[T]:
        """Create an actor; returns its handle at once.

        What the constructor raises shows in the results of the first calls, as ActorDiedError. Raises ActorAlreadyExistsError (its name is
        taken), TypeError (arguments that the constructor does not take), SerializationError.
        """
        if kwargs or len(args) not in self._shapes:
            self._arguments.check(args, kwargs)
        runtime = context.require()
        version = self._export.current(runtime.epoch)
        bound = self._bound
        if bound[1] is not version or bound[0] is not runtime:
            bound = self._bind(runtime, version)
        _, _, number, actor_options, table = bound
        engine = runtime.engine
        try:
            actor, info = engine.create_actor(number, actor_options, args, kwargs)
        except SerializationError as error:
            raise name_culprit(error, args, kwargs, self._class) from error.__cause__
        if info is not None and info.actor != actor:
            return ActorHandle.weak(engine, info)
        hold = None if actor_options.detached else engine.hold_actor(actor)
        return ActorHandle(
            engine,
            actor,
            table,
            hold,
            name=actor_options.actor_name,
            namespace=actor_options.namespace,
            max_pending=self._options.get("max_pending_calls", 0),
        )

    def options(self, **given: Any) -> ActorClass[T]:
        """The same class with other options; see `nbray.remote` for which there are. Raises ValueError or TypeError naming a wrong one."""
        checked = options.check(options.ACTOR, given, self._title)
        variant: ActorClass[T] = ActorClass.__new__(ActorClass)
        variant._set_up(self._class, {**self._options, **checked}, self._export)
        return variant

    def _bind(self, runtime: context.Runtime, version: Version) -> tuple[Any, Version | None, int, Any, Any]:
        given = self._options
        mode, concurrency = self._concurrency()
        encoded = _encode_table(
            _Encoded(version.function_id, self._entries, list(given.get("concurrency_groups") or ()))
        )
        actor_options = ActorOptions(
            class_name=self._name,
            mode=mode,
            max_restarts=given.get("max_restarts", 0),
            max_task_retries=given.get("max_task_retries", 0),
            max_concurrency=concurrency,
            groups=dict(given.get("concurrency_groups") or {}),
            actor_name=given.get("name", ""),
            namespace=given.get("namespace") or runtime.namespace,
            get_if_exists=given.get("get_if_exists", False),
            detached=given.get("lifetime") == "detached",
            methods=encoded,
            hold_resources=options.gives_resources(given),
        )
        spec = TaskClass(
            kind=CREATE_ACTOR,
            function=version.function_id,
            name=f"{self._name}.__init__",
            resources=options.resource_units(given, default_cpus=1),
            max_retries=0,
            priority=given.get("priority", 0),
            environment=self._environment.id if self._environment else b"",
        )
        number = register(runtime.engine, spec, version, self._environment)
        self._bound = (runtime, version, number, actor_options, MethodTable.of(self._name, mode, encoded))
        return self._bound

    def _concurrency(self) -> tuple[str, int]:
        given = self._options.get("max_concurrency")
        if any(entry.is_async for entry in self._entries.values()):
            return "async", given or options.ASYNC_CONCURRENCY
        threaded = (given or 1) > 1 or bool(self._options.get("concurrency_groups"))
        return ("threaded" if threaded else "serial"), given or 1

    @property
    def _title(self) -> str:
        return f"class {self._name}"

    @property
    def __nbray_target__(self) -> type[T]:
        """What is pickled when a function mentions this class: looked into by `nbray.api.functions`."""
        return self._class

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._class)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        # A class that inherits from an actor class inherits from the class, and is itself remote only when decorated.
        return (self._class,)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self._name} is an actor class: {self._name}.remote(...) creates an actor, {self._name}.__wrapped__(...) an object in this process."
        )

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={value!r}" for name, value in self._options.items() if name != "runtime_env"
        )
        return f"<ActorClass {self._name}{f' ({given})' if given else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # As state, because a class may mention itself in its methods.
        return _empty, (), (self._class, self._options)

    def __setstate__(self, state: tuple[type[T], dict[str, Any]]) -> None:
        # Set up when it is first used: what it is made of may itself be in the middle of being unpickled.
        self.__dict__["_state"] = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.pop("_state", None)
        if state is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        target, given = state
        self._set_up(target, given, None)
        return getattr(self, name)


def _empty() -> ActorClass[Any]:
    return ActorClass.__new__(ActorClass)


# -- inside of an actor


class ActorExit(BaseException):
    """Raised by `exit_actor`; the worker ends the actor when it meets it. Not an Exception: no user's ``except`` is to catch it."""


def exit_actor() -> NoReturn:
    """End the actor whose method calls this, after this call. Queued calls fail with ActorDiedError; it is not restarted.

    Raises TypeError outside of an actor.
    """
    task = context.current_task.get()
    if task is None or not task.actor:
        raise TypeError(
            "exit_actor() ends the actor that calls it, and this code does not run in an actor; nbray.kill(handle) ends another one"
        )
    raise ActorExit


def _ready(_instance: Any) -> bool:
    return True


def _call(instance: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(instance, *args, **kwargs)


def _terminate(_instance: Any) -> None:
    exit_actor()


BUILT_IN: dict[str, Callable[..., Any]] = {
    "__ray_ready__": _ready,
    "__ray_call__": _call,
    "__ray_terminate__": _terminate,
}
"""Methods that every actor has; the worker calls them with the instance as first argument."""


def resolve_method(instance: Any, name: str) -> Callable[..., Any]:
    """In the worker: the method of that name. Raises AttributeError."""
    built_in = BUILT_IN.get(name)
    if built_in is not None:
        return functools.partial(built_in, instance)
    found: Callable[..., Any] = getattr(instance, name)
    return found


_own: ActorInfo | None = None


def become(actor: bytes, settings: ActorOptions) -> None:
    """In the worker: this process is now that actor."""
    global _own
    _own = ActorInfo(
        actor, settings.class_name, settings.mode, settings.methods, settings.actor_name, settings.namespace
    )


def own_handle() -> ActorHandle[Any] | None:
    """A weak handle to the actor that this process is; None in other processes."""
    return ActorHandle.weak(context.require().engine, _own) if _own is not None else None


def own_info() -> ActorInfo | None:
    """What this process is as an actor; None in other processes."""
    return _own
