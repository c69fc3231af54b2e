"""What type checkers see: the user's own signatures and results. Checked by mypy over the tests, where `assert_type` is a check."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, assert_type

import nbray
from nbray import ActorClass, ObjectRef, ObjectRefGenerator


@nbray.remote
def text(n: int, *, sign: str = "+") -> str:
    return sign * n


@nbray.remote(num_cpus=2)
def numbers(n: int) -> Iterator[int]:
    yield n


@nbray.remote(num_returns=2)
def pair() -> tuple[int, str]:
    return 1, "a"


class Plain:
    def method(self) -> int:
        return 1


def _types(ref: ObjectRef[int]) -> None:
    assert_type(text.remote(3), ObjectRef[str])
    assert_type(text.remote(ref), ObjectRef[str])
    assert_type(nbray.get(text.remote(3)), str)
    assert_type(nbray.get([text.remote(3)]), list[str])
    assert_type(numbers.remote(3), ObjectRefGenerator[int])
    assert_type(pair.remote(), Any)
    assert_type(nbray.put(3), ObjectRef[int])
    assert_type(nbray.remote(Plain), ActorClass[Plain])
    assert_type(list(nbray.map(str, [1])), list[str])
    assert_type(list(nbray.map(len, ["a"], "return")), list[int | Exception])


async def _awaited(ref: ObjectRef[int]) -> None:
    assert_type(await ref, int)


def test_signature_survives_decoration() -> None:
    assert list(inspect.signature(text).parameters) == ["n", "sign"]
    assert inspect.unwrap(text) is text.__wrapped__
