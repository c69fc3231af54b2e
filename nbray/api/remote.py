"""Remote functions and the decorator that makes them.

The hot path is `RemoteFunction.remote`: check the shape of the arguments, ask the export whether the function is still what it was, submit. All
else (options, pickling, registering with the engine) happens once per version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar, overload

from msgspec.structs import replace

from nbray.api import context, options
from nbray.api.actor import ActorClass
from nbray.api.arguments import Arguments, name_culprit, signature_of
from nbray.api.functions import FunctionExport, Version, register
from nbray.errors import SerializationError
from nbray.messages import TASK, TaskClass

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef, ObjectRefGenerator

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_VARIANTS_LIMIT = 100

_Bound = tuple[Any, Version | None, int, Callable[[int, tuple[Any, ...], Mapping[str, Any]], Any]]
_UNBOUND: _Bound = (None, None, 0, lambda number, args, kwargs: None)


class RemoteFunction(Generic[P, R]):
    """A function whose calls run in the cluster. ``f.remote(...)`` submits a call and returns its `ObjectRef` at once.

    The function itself is ``f.__wrapped__``.
    """

    __name__: str
    __wrapped__: Callable[P, Any]

    def __init__(self, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
        """``given``: checked options (`nbray.api.options`)."""
        self._set_up(function, dict(given), None)

    def _set_up(
        self, function: Callable[..., Any], given: dict[str, Any], export: FunctionExport | None
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._options = given
        self._name = str(given.get("name") or getattr(function, "__name__", type(function).__name__))
        returns = options.returns(given, _is_generator(function), self._title)
        self._export = export or FunctionExport(function, self._title, _allow_list(given))
        gpus = given.get("num_gpus", 0)
        self._environment = given.get("runtime_env")
        self._spec = TaskClass(
            kind=TASK,
            function=b"",
            name=self._name,
            resources=options.resource_units(given, default_cpus=1),
            num_returns=returns,
            max_retries=given.get("max_retries", options.TASK_RETRIES),
            retry_exceptions=given.get("retry_exceptions") is True,
            # A process that has used a GPU keeps its memory: it ends with the task.
            max_calls=given.get("max_calls", 1 if gpus else 0),
            priority=given.get("priority", 0),
            environment=self._environment.id if self._environment else b"",
            backpressure=given.get("_generator_backpressure_num_objects", 0),
        )
        self._arguments = Arguments(self._name, lambda: signature_of(function))
        self._shapes = self._arguments.shapes
        self._variants: dict[Any, RemoteFunction[P, Any]] = {}
        self._bound = _UNBOUND

    @overload
    def remote(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def remote(self, *args: Any, **kwargs: Any) -> R: ...

    # The second form lets type checkers accept refs in place of values; the first is what editors complete.
    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit a call; returns at once.

        Arguments that are refs are replaced by their values before the function runs; refs inside of other values stay refs.
        Returns an `ObjectRef`; a list of them with ``num_returns=n``; None with ``num_returns=0``; an `ObjectRefGenerator` for a generator
        function. Raises TypeError (arguments that the function does not take), SerializationError (what cannot be pickled).
        """
        if kwargs or len(args) not in self._shapes:
            self._arguments.check(args, kwargs)
        runtime = context.require()
        version = self._export.current(runtime.epoch)
        bound = self._bound
        if bound[1] is not version or bound[0] is not runtime:
            bound = self._bind(runtime, version)
        try:
            return bound[3](bound[2], args, kwargs)
        except SerializationError as error:
            raise name_culprit(error, args, kwargs, self._function) from error.__cause__

    def options(self, **given: Any) -> RemoteFunction[P, Any]:
        """The same function with other options; see `nbray.remote` for which there are. Raises ValueError or TypeError naming a wrong one."""
        try:
            key = tuple((name, type(value), value) for name, value in given.items())
            known = self._variants.get(key)
        except TypeError:  # unhashable, such as resources={...}
            key, known = None, None
        if known is not None:
            return known
        checked = options.check(options.TASK, given, self._title)
        variant: RemoteFunction[P, Any] = RemoteFunction.__new__(RemoteFunction)
        export = (
            self._export if checked.get("retry_exceptions") in {None, self._export.retry_exceptions} else None
        )
        variant._set_up(self._function, {**self._options, **checked}, export)
        variant._arguments, variant._shapes = self._arguments, self._shapes
        if key is not None:
            if len(self._variants) >= _VARIANTS_LIMIT:
                self._variants.clear()
            self._variants[key] = variant
        return variant

    def _bind(self, runtime: context.Runtime, version: Version) -> _Bound:
        spec = replace(self._spec, function=version.function_id)
        number = register(runtime.engine, spec, version, self._environment)
        bound: _Bound = (runtime, version, number, runtime.engine.submit)
        self._bound = bound
        return bound

    @property
    def _title(self) -> str:
        return f"function {self._name}"

    @property
    def __nbray_target__(self) -> Callable[..., Any]:
        """What is pickled when a function that mentions this one is: looked into by `nbray.api.functions`."""
        return self._function

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{self._name} is a remote function: call {self._name}.remote(...) to run it in the cluster, or "
            f"{self._name}.__wrapped__(...) to run it here."
        )

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={value!r}" for name, value in self._options.items() if name != "runtime_env"
        )
        return f"<RemoteFunction {self._name}{f' ({given})' if given else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # As state, because a function that submits itself is among its own globals.
        return _empty, (), (self._function, self._options)

    def __setstate__(self, state: tuple[Callable[..., Any], dict[str, Any]]) -> None:
        # Set up when it is first used: what it is made of may itself be in the middle of being unpickled.
        self.__dict__["_state"] = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.pop("_state", None)
        if state is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        target, given = state
        self._set_up(target, given, None)
        return getattr(self, name)


def _allow_list(given: Mapping[str, Any]) -> tuple[type[BaseException], ...] | None:
    """A list of ``retry_exceptions`` travels with the function, for its classes may be the user's."""
    allowed = given.get("retry_exceptions")
    return allowed if isinstance(allowed, tuple) else None


def _empty() -> RemoteFunction[Any, Any]:
    return RemoteFunction.__new__(RemoteFunction)


def _is_generator(function: Callable[..., Any]) -> bool:
    function = inspect.unwrap(function) if not isinstance(function, functools.partial) else function
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


class RemoteDecorator(Protocol):
    """``@nbray.remote(num_cpus=2)``: what turns a function or class into a remote one."""

    @overload
    def __call__(self, target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, target: Callable[P, Generator[T, Any, Any]], /
    ) -> RemoteFunction[P, ObjectRefGenerator[T]]: ...
    @overload
    def __call__(self, target: Callable[P, Iterator[T]], /) -> RemoteFunction[P, ObjectRefGenerator[T]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Callable[P, T], /) -> RemoteFunction[P, ObjectRef[T]]: ...


class AnyReturnsDecorator(Protocol):
    """``@nbray.remote(num_returns=n)``: what ``.remote()`` returns depends on n."""

    def __call__(self, target: Callable[P, Any], /) -> RemoteFunction[P, Any]: ...


@overload
def remote(target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
@overload
def remote(target: Callable[P, Generator[T, Any, Any]], /) -> RemoteFunction[P, ObjectRefGenerator[T]]: ...  # type: ignore[overload-overlap]
@overload
def remote(target: Callable[P, Iterator[T]], /) -> RemoteFunction[P, ObjectRefGenerator[T]]: ...  # type: ignore[overload-overlap]
@overload
def remote(target: Callable[P, T], /) -> RemoteFunction[P, ObjectRef[T]]: ...
@overload
def remote(*, num_returns: int | str, **others: Any) -> AnyReturnsDecorator: ...
@overload
def remote(
    *,
    num_cpus: float | None = ...,
    num_gpus: float | None = ...,
    memory: float | None = ...,
    resources: Mapping[str, float] | None = ...,
    runtime_env: Mapping[str, Any] | None = ...,
    name: str | None = ...,
    priority: int | None = ...,
    max_retries: int | None = ...,
    retry_exceptions: bool | list[type[BaseException]] | None = ...,
    max_calls: int | None = ...,
    max_restarts: int | None = ...,
    max_task_retries: int | None = ...,
    max_concurrency: int | None = ...,
    max_pending_calls: int | None = ...,
    concurrency_groups: Mapping[str, int] | None = ...,
    lifetime: str | None = ...,
    namespace: str | None = ...,
    get_if_exists: bool | None = ...,
    scheduling_strategy: str | None = ...,
    **others: Any,
) -> RemoteDecorator: ...


def remote(*targets: Any, **given: Any) -> Any:
    """Make a function remote, or a class an actor class.

    Bare (``@nbray.remote``) or with options (``@nbray.remote(num_cpus=2)``). Options of both: ``num_cpus``, ``num_gpus``, ``memory`` (bytes),
    ``resources`` ({name: amount}), ``name``, ``priority`` (larger is more urgent), ``runtime_env``. Of functions: ``num_returns``,
    ``max_retries``, ``retry_exceptions``, ``max_calls``. Of classes: ``max_restarts``, ``max_task_retries``, ``max_concurrency``,
    ``concurrency_groups``, ``max_pending_calls``, ``lifetime``, ``namespace``, ``get_if_exists``.

    Raises ValueError or TypeError naming what is wrong.
    """
    if len(targets) == 1 and not given:
        return _decorate(targets[0], {})
    if targets or not given:
        raise TypeError(
            "use the decorator bare, @nbray.remote, or with options given by name, for instance @nbray.remote(num_cpus=2)"
        )
    return lambda target: _decorate(target, given)


def _decorate(target: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(target, RemoteFunction | ActorClass):
        raise TypeError(f"{target!r} is remote already; .options(...) gives it other options")
    if isinstance(target, type):
        checked = options.check(options.ACTOR, given, f"class {target.__name__}", decorator=True)
        return ActorClass(target, checked)
    if not callable(target):
        raise TypeError(f"nbray.remote needs a function or a class, not {target!r} ({type(target).__name__})")
    name = getattr(target, "__name__", type(target).__name__)
    if inspect.iscoroutinefunction(target):
        raise ValueError(
            f"function {name} is `async def`; a task runs one function from start to end in a process of its own. "
            "Use a plain `def` (with asyncio.run(...) inside if needed), or a class with async methods, which becomes an async actor."
        )
    checked = options.check(options.TASK, given, f"function {name}", decorator=True)
    return RemoteFunction(target, checked)
