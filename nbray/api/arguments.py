"""Whether a call's arguments fit, checked where the call is made instead of in the worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nbray.errors import SerializationError

_SHAPES_LIMIT = 1000

KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)
"""Kinds of parameters by their number."""


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature, None where there is none (some built-in functions and classes)."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def name_culprit(
    error: SerializationError, args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[..., Any]
) -> SerializationError:
    """The error with the name of the parameter whose argument cannot be sent; the engine knows only its place."""
    from nbray.store.culprit import explain_arguments

    cause = error.__cause__
    return explain_arguments(cause if isinstance(cause, Exception) else error, args, kwargs, function)


class Arguments:
    """The calls that a function takes. Whether one fits depends on the number of its arguments and their names only: its *shape*.

    ``shapes``: those that are known to fit; a call by position has its length as shape, so that the hot path is ``len(args) in shapes``.
    """

    __slots__ = ("_name", "_signature", "shapes")

    def __init__(self, name: str, signature: Callable[[], inspect.Signature | None]) -> None:
        """``signature`` is called once a new shape is met."""
        self._name = name
        self._signature = signature
        self.shapes: set[int | tuple[int | str, ...]] = set()

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises TypeError, with the signature, when the call does not fit."""
        shape: int | tuple[int | str, ...] = (len(args), *kwargs) if kwargs else len(args)
        if shape in self.shapes:
            return
        signature = self._signature()
        if signature is not None:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{self._name}.remote(): {error}; its signature is {self._name}{signature}"
                ) from None
        if len(self.shapes) >= _SHAPES_LIMIT:
            self.shapes.clear()
        self.shapes.add(shape)
