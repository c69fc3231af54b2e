"""What a function drags along, by size: said when a pickled function is huge."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from nbray.store.culprit import largest_captures

huge = np.zeros(1 << 20)
small = {"a": 1}
lock = threading.Lock()


def uses(data: Any = (1, 2, 3), *, option: str = "x" * 1000) -> Any:
    def inner() -> Any:
        return small

    return huge, inner, lock, unknown  # type: ignore[name-defined]  # noqa: F821


class Model:
    def fit(self) -> Any:
        return huge


def closure(assign: bool) -> Any:
    table = list(range(1000))
    if assign:
        later = 1

    def f() -> Any:
        return table, later

    return f


def test_globals_defaults_and_closures_by_size() -> None:
    names = [name for name, _ in largest_captures(uses)]
    assert names[:2] == ["huge", "option"]
    assert set(names) == {"huge", "option", "data", "small"}
    assert largest_captures(uses)[0][1] > 8 << 20
    assert [name for name, _ in largest_captures(closure(False))] == ["table"]
    assert [name for name, _ in largest_captures(closure(True))] == ["table", "later"]
    assert largest_captures(Model)[0][0] == "huge"


def test_methods_carry_their_object() -> None:
    model = Model()
    model.weights = np.zeros(1000)  # type: ignore[attr-defined]
    captures = dict(largest_captures(model.fit))
    assert captures["self"] > 8000
    assert "huge" in captures


def test_what_has_no_code_carries_nothing() -> None:
    assert largest_captures(len) == []
    assert largest_captures(3) == []
