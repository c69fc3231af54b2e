"""Errors of remote code: the notebook's own lines, and ``%debug`` in the frames that were there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from nbray.api import reports
from tests.notebook.kernels import ANSI, Kernel, is_idle

SETUP = """import nbray, threading, os
import numpy as np
class Point:
    def __init__(self, x): self.x = x
    def __repr__(self): return f"Point({self.x})"
def inner(x):
    half = x / 2
    where = Point(half); lock = threading.Lock(); large = np.zeros(1_000_000); environment = os.environ
    return 1 / x
@nbray.remote
def outer(x):
    doubled = [x, x]
    return inner(doubled[0])
@nbray.remote
def nested():
    deeper = "yes"
    return nbray.get(outer.remote(0))
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with Kernel({"MY_API_KEY": "sesame-sesame"}) as k:
        assert k.run("%load_ext nbray\n%cluster start --cpus 2").error is None
        assert k.run(SETUP).error is None
        yield k


def debug(kernel: Kernel, *commands: str) -> list[str]:
    """What ``%debug`` answers to each command."""
    run = kernel.start("%debug")
    answers: list[str] = []
    waiting = [*commands, "quit"]
    while True:
        try:
            request = kernel.client.get_stdin_msg(timeout=0.05)
        except Exception:
            request = None
        kernel.read([run], 0.05)
        if request is not None:
            kernel.read_until([run], lambda: True)
            while kernel.read([run], 0.2) is not None:
                pass
            answers.append(ANSI.sub("", run.text() + run.text("stderr")))
            kernel.client.input(waiting.pop(0))
        if is_idle(run):
            break
    kernel.client.get_shell_msg(timeout=10)
    return [after.removeprefix(before) for before, after in pairwise(answers)]


@pytest.mark.slow
def test_a_tasks_error_shows_the_notebooks_lines_only(kernel: Kernel) -> None:
    run = kernel.run("x = 0\nnbray.get(outer.remote(x))")
    text = run.traceback
    assert f"Cell In[{run.number}], line 2\n" in text
    assert "in task outer:\nCell In[2], line 13, in outer" in text
    assert "Cell In[2], line 9, in inner" in text
    assert "----> 9     return 1 / x" in text
    assert text.splitlines()[-2] == "ZeroDivisionError: division by zero"
    assert text.splitlines()[-1].startswith("This ran on the cluster (task outer, worker pid ")
    for word in ("nbray/", "site-packages", "ipykernel", "verbs.py"):
        assert word not in text
    (message,) = [m["content"] for m in run.messages if m["msg_type"] == "error"]
    assert (message["ename"], message["evalue"]) == ("ZeroDivisionError", "division by zero")


@pytest.mark.slow
def test_tasks_inside_tasks_awaits_and_errors_of_nbray(kernel: Kernel) -> None:
    text = kernel.run("nbray.get(nested.remote())").traceback
    assert text.index("in task nested:") < text.index("in task outer:") < text.index("division by zero")
    assert text.count("ZeroDivisionError: division by zero") == 1
    assert "local.py" not in kernel.run("await outer.remote(0)").traceback
    late = kernel.run("nbray.get(nbray.remote(lambda: threading.Event().wait()).remote(), timeout=0.01)")
    assert late.error == "GetTimeoutError"
    assert "verbs.py" not in late.traceback
    assert "----> 1 nbray.get(" in late.traceback


@pytest.mark.slow
@pytest.mark.parametrize("code", ["nbray.get(outer.remote(0))", "%%remote\nouter_is = 'there'\ninner(0)"])
def test_debug_opens_the_remote_frames(kernel: Kernel, code: str) -> None:
    assert kernel.run("1 + '1'").error == "TypeError"
    assert "ZeroDivisionError" in str(kernel.run(code).error)
    told = debug(
        kernel,
        "p x, half",
        "p where",
        "p lock",
        "p large",
        "p environment",
        "p inner.__name__",
        "up",
        "p list(locals())",
        "where",
    )
    assert "(0, 0.0)" in told[0]
    assert "Point(0.0)" in told[1]
    assert "lock" in told[2]
    assert "ndarray of shape (1000000,), too large to be sent" in told[3]
    assert "the environment, which does not travel" in told[4]
    assert "'inner'" in told[5]
    assert ("doubled" if "remote(" in code else "outer_is") in told[7]
    assert "1 / x" in told[8]
    assert "sesame" not in "".join(told)


@pytest.mark.slow
def test_debug_goes_through_tasks_inside_tasks(kernel: Kernel) -> None:
    assert kernel.run("nbray.get(nested.remote())").error is not None
    told = debug(kernel, "up", "p doubled", "up", "p deeper", "up", "p __name__")
    assert "[0, 0]" in told[1]
    assert "'yes'" in told[3]
    assert "'__main__'" in told[5]


# -- reports


def fail(**values: Any) -> reports.Report:
    def raising() -> None:
        secret, nested, ref = values["secret"], {"a": [values["secret"]]}, 5  # noqa: F841
        raise ValueError("no")

    try:
        raising()
    except ValueError as error:
        return reports.decode(reports.encode(reports.describe(error)))
    raise AssertionError


def test_secrets_of_the_environment_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "open-sesame")
    report = fail(secret="open-sesame")
    assert b"open-sesame" not in reports.encode(report)
    values = reports.Values(report.frames[-1].values)
    assert (
        repr(values["nested"]) == "<left out: it has the value of the environment variable SOME_TOKEN in it>"
    )
    assert values["ref"] == 5


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBRAY_LOCALS", "0")
    assert all(not frame.values for frame in fail(secret="x").frames)


def test_what_is_captured_is_bounded() -> None:
    def deep(n: int) -> None:
        values = list(range(3000))  # noqa: F841
        if n:
            deep(n - 1)
        raise ValueError

    try:
        deep(500)
    except ValueError as error:
        report = reports.describe(error)
    assert len(report.frames) == 2 * reports.FRAMES
    assert report.left_out == 502 - 2 * reports.FRAMES
    assert len(reports.encode(report)) < reports.TOTAL_LIMIT + 64 * 1024


def test_thousands_of_failures_alike_capture_their_variables_a_few_times() -> None:
    def raising(n: int) -> None:
        raise ValueError(n)

    captured = 0
    for n in range(reports.OFTEN + 5):
        try:
            raising(n)
        except ValueError as error:
            captured += bool(reports.describe(error).frames[-1].values)
    assert captured == reports.OFTEN


def test_values_that_cannot_be_pickled_and_huge_ones() -> None:
    lock, words, text = threading.Lock(), ["w"] * 10**6, "t" * 10**6
    try:
        raise ValueError
    except ValueError as error:
        values = reports.Values(reports.describe(error).frames[-1].values)
    assert repr(values["lock"]) == repr(lock)
    assert repr(values["words"]).startswith(f"<list of length {len(words)}, too large")
    assert len(repr(values["text"])) < 200 < len(text)


def test_frames_are_made_again() -> None:
    inner = reports.Report("E", [], [reports.Frame(os.__file__, 7, "deep", "", [("v", "text", b"")])])
    report = reports.Report("E", [], [reports.Frame("cell", 3, "<module>", "")], inner=inner)
    found = reports.traceback_of(report, {"name": 1})
    assert found is not None and found.tb_next is not None
    assert (found.tb_lineno, found.tb_frame.f_code.co_name) == (3, "<module>")
    last = found.tb_next
    assert (last.tb_lineno, last.tb_frame.f_code.co_filename, last.tb_frame.f_code.co_name) == (
        7,
        os.__file__,
        "deep",
    )
    assert repr(last.tb_frame.f_locals["v"]) == "text"
    assert last.tb_frame.f_globals["name"] == 1
    assert last.tb_next is None
