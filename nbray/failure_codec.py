"""How errors travel: the bytes of a value of kind ERROR.

A payload is a msgpack array. ``["!", class name, text, extra]`` is an error of nbray itself, made by any process, also those that never unpickle
users' bytes (node, head). ``["u", ...]``, a `UserFailure`, is an exception of the user's code: made by ``nbray.api.failures`` in the worker; its
``cause`` is a pickle that only drivers and workers open. Nodes read the texts of both.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from nbray import errors


class SystemFailure(msgspec.Struct, array_like=True, tag="!", gc=False):
    """An error of nbray itself. ``name``: of a class of ``nbray.errors``; ``extra``: attributes of the exception, plain values."""

    name: str
    text: str
    extra: dict[str, int | float | str | bool | None] = {}


class UserFailure(msgspec.Struct, array_like=True, tag="u", gc=False):
    """An exception of the user's code.

    ``cause``: how to make the exception again (``nbray.api.failures``), empty if that is impossible; ``why``: then the reason. ``name``: its
    class's name; ``text``: its str; ``traceback``: the user's frames. ``task``, ``node``, ``pid``, ``attempt``: where it ran. ``actor``: the
    name of the actor class whose constructor it ended, else empty. ``report``: frames, lines and variables (``nbray.api.reports``), opened only by
    who shows or debugs it.
    """

    cause: bytes
    why: str
    name: str
    text: str
    traceback: str
    task: str
    node: str
    pid: int
    attempt: int = 0
    actor: str = ""
    report: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[SystemFailure | UserFailure] = msgspec.msgpack.Decoder(
    SystemFailure | UserFailure
)
_decode = _decoder.decode


def encode_system_error(
    class_name: str, text: str, extra: Mapping[str, int | float | str | bool | None] | None = None
) -> bytes:
    """Payload of an error of nbray itself; ``class_name``: of a class of ``nbray.errors``."""
    return _encode(SystemFailure(class_name, text, dict(extra or {})))


def encode_user_failure(failure: UserFailure) -> bytes:
    """Payload of an exception of the user's code."""
    return _encode(failure)


def read(data: bytes) -> SystemFailure | UserFailure:
    """What a payload says, without making an exception of it; safe in every process."""
    return _decode(data)


def summary(data: bytes) -> tuple[str, str]:
    """Name of the exception's class and the first line of its text, for tables and events."""
    failure = _decode(data)
    return failure.name, failure.text.partition("\n")[0]


def decode_error(data: bytes) -> Exception:
    """A fresh exception for a payload; it may unpickle what the user's code raised, so call it in drivers and workers only."""
    failure = _decode(data)
    if isinstance(failure, UserFailure):
        from nbray.api import failures

        return failures.revive(failure, data)
    return system_error(failure.name, failure.text, failure.extra)


def system_error(name: str, text: str, extra: Mapping[str, object] | None = None) -> Exception:
    """The exception of class ``name`` of ``nbray.errors`` (or of the built-in ValueError, TypeError, ...) with ``text``."""
    kind = getattr(errors, name, None) or getattr(__import__("builtins"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return errors.NbrayError(f"{name}: {text}")
    error = kind(text)
    for attribute, value in (extra or {}).items():
        setattr(error, attribute, value)
    return error
