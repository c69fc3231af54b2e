"""What is known of values for lineage, cheaply, and which names a cell reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbray.notebook.lineage import EXACT, known, reached


def function(source: str, name: str = "f") -> Any:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


SAME: list[tuple[Any, Any]] = [
    (1, 1),
    ("text", "text"),
    ([1, (2.5, None)], [1, (2.5, None)]),
    ({"a": [1, 2]}, {"a": [1, 2]}),
    (np.arange(10), np.arange(10)),
    (np.arange(100_000.0), np.arange(100_000.0)),
    (np, np),
    (function("def f(x): return x + 1"), function("\n\ndef f(x): return x + 1")),
]
OTHER: list[tuple[Any, Any]] = [
    (1, 2),
    (1, 1.0),
    (1, True),
    ("text", b"text"),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"b": 1}),
    (np.arange(10), np.arange(10.0)),
    (np.arange(10), np.arange(10).reshape(2, 5)),
    (np.arange(100_000.0), np.arange(100_000.0) + 1e-9),
    (function("def f(x): return x + 1"), function("def f(x): return x + 2")),
    (function("def f(x): return x + 1"), function("def f(x): return x - 1")),
    (function("def f(x, y=1): return x"), function("def f(x, y=2): return x")),
    (function("def f(x): return [y + 1 for y in x]"), function("def f(x): return [y + 2 for y in x]")),
]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_equal_values_are_known_to_be_equal(one: Any, two: Any) -> None:
    assert known(one) == known(two)
    assert known(one) is not None


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_different_values_are_known_to_differ(one: Any, two: Any) -> None:
    assert known(one) != known(two)


class Anything:
    pass


UNKNOWN: list[Any] = [
    Anything(),
    [Anything()],
    "x" * (EXACT + 1),
    list(range(1000)),
    np.array([Anything()]),
    np.ones((300, 300))[:, ::2],
    [[[[[1]]]]],
]


@pytest.mark.parametrize("value", UNKNOWN)
def test_what_would_cost_too_much_is_not_known(value: Any) -> None:
    assert known(value) is None


def test_names_that_functions_read_are_reached() -> None:
    namespace: dict[str, Any] = {"rate": 2, "other": 3, "unread": 4}
    exec("def inner(x): return x * rate\ndef outer(x): return inner(x) + other + missing", namespace)
    assert sorted(reached(["outer"], namespace)) == ["inner", "other", "outer", "rate"]
    assert list(reached(["unread"], namespace)) == ["unread"]
