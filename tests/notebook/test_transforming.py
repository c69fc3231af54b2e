"""The short way from a cell to Python gives what IPython gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from nbray.notebook.transforming import plain_python


@pytest.fixture
def shell() -> Any:
    """The part of IPython's shell that transforms."""
    manager = TransformerManager()
    post: list[Any] = []

    def transform_cell(cell: str) -> str:
        text: str = manager.transform_cell(cell)
        lines = text.splitlines(keepends=True)
        for transform in post:
            lines = transform(lines)
        return "".join(lines)

    return SimpleNamespace(
        input_transformer_manager=manager, input_transformers_post=post, transform_cell=transform_cell
    )


CELLS = [
    "x = 1", "x = 1\n", "x = 1\n\n\n", "\nx = 1", "  x = 1", "def f():\n    return 1\n\nf()", "a = b % 2\nc != d", "%time f()", "!ls", "x = !ls", "x = %magic y",
    "f?", "??f", "/f 1", ",f a b", ";f a", "In [1]: x = 1", ">>> x = 1\n>>> y = 2", "... x", "text = '''\n%not a magic\n! no\n'''", "if x:\n    !ls\nelse:\n    y",
    "x =", "'open", "'''open", "(1,", "def f(:\n  pass", "x y z", "$a", "a\\\n  b", "if x:\n\ty\n        z", "print 'x'", "f(\n/2)", "x = [\n,\n]", "x\n;", "\\", "a = 1\r\nb = 2", "for i in y: print(i);", "await f()", "'\\n?'", "x = 1 # why?", "@f\nclass A: ...", "", "\n", "# only this", "x: int", "s = f'{x!r}'", "a = (1,\n  2)", "\tx",
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_it_is_what_ipython_makes_of_it(shell: Any, cell: str) -> None:
    assert plain_python(shell, cell) == shell.transform_cell(cell)


def test_the_users_own_transformations_are_asked(shell: Any) -> None:
    shell.input_transformers_post.append(lambda lines: [line.replace("one", "1") for line in lines])
    assert plain_python(shell, "x = one") == "x = 1\n"
