"""`nbray.progress`: what it returns, what it shows in a script, what it refuses."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from nbray.api import progress as module
from nbray.errors import GetTimeoutError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_waits_counts_and_returns_the_refs(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nbray = shared_cluster
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)

    @nbray.remote
    def f(n: int) -> int:
        if n == 3:
            raise ValueError(n)
        return n

    refs = [f.remote(n) for n in range(10)]
    assert nbray.progress(refs, label="numbers") == refs
    (line,) = err.getvalue().splitlines()
    assert line.startswith(f"numbers [{'#' * 30}] 10 of 10 done, 1 failed, ")
    assert nbray.get(nbray.progress(refs[:3])) == [0, 1, 2]
    assert nbray.progress([]) == []


def test_a_terminal_gets_one_line(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nbray = shared_cluster
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)

    @nbray.remote
    def nap() -> None:
        import time

        time.sleep(0.1)

    nbray.progress([nap.remote() for _ in range(8)])
    text = err.getvalue()
    assert text.count("\n") == 1
    assert 3 <= text.count("\r") <= 12
    assert "left" in text or "done" in text
    assert "8 of 8 done" in text.rpartition("\r")[2]


def test_time_is_up(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nbray = shared_cluster
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    @nbray.remote
    def slow() -> None:
        import time

        time.sleep(30)

    ref = slow.remote()
    with pytest.raises(GetTimeoutError, match=r"1 of 1 are not ready after 0\.2 s"):
        nbray.progress([ref], timeout=0.2)
    nbray.cancel(ref)


def test_what_is_no_list_of_refs(shared_cluster: Any) -> None:
    with pytest.raises(TypeError, match="takes a list of refs, not int"):
        shared_cluster.progress(1)
    with pytest.raises(TypeError, match="has 'x'"):
        shared_cluster.progress(["x"])


def test_without_times_for_static_notebooks() -> None:
    text, page = module._drawn("a <b>", 5, 10, 0, None, ended=True)
    assert text == f"a <b> [{'#' * 15}{'-' * 15}] 5 of 10 done"
    assert "a &lt;b&gt;" in page
