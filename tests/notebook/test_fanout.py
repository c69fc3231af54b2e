"""``%%remote --map``: a cell that runs once per item."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbray.notebook.fanout import Failure, FanOut, groups, lists, told
from tests.notebook.kernels import Kernel, Run

slow = pytest.mark.slow


# -- bookkeeping


def failure(text: str, place: str = "") -> Failure:
    return Failure(text, place, ValueError(text))


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_item_ends_once_and_the_window_holds(count: int, window: int, random: object) -> None:
    fan: FanOut[int] = FanOut(count, window)
    running: list[int] = []
    rounds = 0
    while fan.open or (rounds < 2 and fan.failures):
        if not fan.open:
            rounds += 1
            assert fan.again() == sorted(set(range(count)) - set(fan.values))
        index = fan.take()
        if index is not None:
            if random.random() < 0.1:  # type: ignore[attr-defined]
                fan.refused(index, failure("no"))
            else:
                fan.began(("key", index), index)
                running.append(index)
            assert len(running) <= window
            continue
        if not running:
            assert not fan.open
            continue
        index = running.pop(random.randrange(len(running)))  # type: ignore[attr-defined]
        if random.random() < 0.3:  # type: ignore[attr-defined]
            assert fan.failed(("key", index), failure("bad")) == index
        else:
            assert fan.done(("key", index), index * 10) == index
    assert set(fan.values) | set(fan.failures) == set(range(count))
    assert not set(fan.values) & set(fan.failures)
    assert all(value == index * 10 for index, value in fan.values.items())
    assert fan.missing() == []


def test_what_is_abandoned_is_missing_and_can_be_done_again() -> None:
    fan: FanOut[str] = FanOut(4, 2)
    for _ in range(2):
        index = fan.take()
        assert index is not None
        fan.began(index, index)
    fan.done(1, "b")
    fan.abandon()
    assert (fan.open, fan.missing()) == (False, [0, 2, 3])
    assert fan.again() == [0, 2, 3]


def test_failures_are_grouped() -> None:
    failures = {7: failure("A"), 2: failure("B"), 3: failure("A"), 9: failure("A", "elsewhere")}
    grouped = groups(failures.items())
    assert [indices for _, indices in grouped] == [[3, 7], [2], [9]]
    shown = [str(i) for i in range(10)]
    assert told("x", shown, grouped) == [
        "2 x A",
        "    x = 3, 7",
        "1 x B",
        "    x = 2",
        "1 x A (elsewhere)",
        "    x = 9",
    ]
    many = groups((i, failure("A")) for i in range(8))
    assert told("x", shown, many)[1] == "    x = 0, 1, 2, 3, 4 and 3 more"


def test_lists() -> None:
    assert lists(["a", "b"], ["r0", "r1", "r2"], [{"a": 1}, None, {"a": 3, "b": 4}]) == {
        "a": [1, "r1", 3],
        "b": [None, "r1", 4],
    }


# -- in a kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        assert k.run("import nbray, os, time\nfrom pathlib import Path").error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


@slow
def test_lists_of_what_it_binds(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "files = ['a', 'b', 'c']\nx = 'mine'\nsuffix = '!'\ndef shout(t): return t.upper() + suffix"
        )
    )
    run = ok(kernel.run("%%remote --map x=files\nloud = shout(x)\npid = os.getpid()\n(x, loud)"))
    assert run.result == "[('a', 'A!'), ('b', 'B!'), ('c', 'C!')]"
    assert (
        kernel.run("(loud, x, type(pid) is list and os.getpid() not in pid)").result
        == "(['A!', 'B!', 'C!'], 'mine', True)"
    )
    ok(kernel.run("%%remote --map n=range(100) -o square\nsquare = n * n; other = 1"))
    assert (
        kernel.run("(square == [n * n for n in range(100)], 'other' in globals())").result == "(True, False)"
    )
    assert ok(kernel.run("%%remote --map n=[]\nnothing = n")).result is None
    assert kernel.run("nothing").result == "[]"


@slow
def test_items_of_all_kinds(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "import numpy as np\nclass P:\n    def __init__(self, v): self.v = v\nitems = [P(1), np.ones(200_000), len, lambda: 3]"
        )
    )
    run = ok(
        kernel.run(
            "%%remote --map i=items\ni.v if isinstance(i, P) else float(i.sum()) if isinstance(i, np.ndarray) else i('ab') if i is len else i()"
        )
    )
    assert run.result == "[1, 200000.0, 2, 3]"
    run = kernel.run("import threading\nbad = [1, threading.Lock()]\n%remote 1")
    run = kernel.run("%%remote --map i=bad\nj = i")
    assert (run.error, "1 of 2 failed" in run.traceback) == ("ItemsFailedError", True)
    assert kernel.run("%%remote --map i=nowhere\ni").error == "NameError"


@slow
def test_failures_are_told_and_run_again(kernel: Kernel, tmp_path: Path) -> None:
    ok(kernel.run(f"folder = Path({str(tmp_path)!r})\n(folder / 'bad').touch()"))
    cell = "%%remote --map n=range(20)\ndouble = 2 * n\nif n % 8 == 1 and (folder / 'bad').exists():\n    raise OSError('broken')\ndone = n\n(folder / f'ran{n}').touch()"
    run = kernel.run(cell)
    assert run.error == "ItemsFailedError"
    assert "3 of 20 failed" in run.traceback
    assert f"3 x OSError: broken (Cell In[{run.number}], line 4)\n    n = 1, 9, 17" in run.traceback
    assert "nbray/" not in run.traceback
    assert (
        kernel.run("same = done\n([type(d).__name__ for d in done[:3]], done[2:5])").result
        == "(['int', 'OSError', 'int'], [2, 3, 4])"
    )
    assert kernel.run("(type(done[1]) is OSError, str(done[1]))").result == "(True, 'broken')"
    assert "3 of 20 failed" in kernel.run("%cluster retry").traceback
    for path in tmp_path.iterdir():
        path.unlink()
    ok(kernel.run("%cluster retry"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ran1", "ran17", "ran9"]
    assert (
        kernel.run("(done == list(range(20)), same is done, double == [2 * n for n in range(20)])").result
        == "(True, True, True)"
    )
    run = kernel.run("%cluster retry")
    assert "nothing to run again" in run.traceback


@slow
def test_retry_uses_the_notebook_as_it_is_now(kernel: Kernel) -> None:
    ok(kernel.run("def inverse(v): return 1 / v"))
    assert kernel.run("%%remote --map v=[1, 0, 2]\nresult = inverse(v)").error == "ItemsFailedError"
    ok(kernel.run("def inverse(v): return 1 / v if v else 'none'"))
    ok(kernel.run("%cluster retry"))
    assert kernel.run("result").result == "[1.0, 'none', 0.5]"


@slow
def test_an_interrupt_keeps_what_is_done(kernel: Kernel, tmp_path: Path) -> None:
    ok(kernel.run(f"folder = Path({str(tmp_path)!r})"))
    run = kernel.start(
        "%%remote --map n=range(200)\nif n >= 3:\n    (folder / 'there').touch()\n    if not (folder / 'go').exists(): time.sleep(60)\nkept = n"
    )
    kernel.read_until([run], lambda: (tmp_path / "there").exists())
    began = time.monotonic()
    kernel.interrupt()
    kernel.finish(run)
    assert time.monotonic() - began < 2.0
    assert run.error == "KeyboardInterrupt"
    assert "of 200 items are done; %cluster retry runs the others" in run.traceback
    assert (
        kernel.run("(kept[:2], isinstance(kept[50], Exception), len(kept))").result == "([0, 1], True, 200)"
    )
    (tmp_path / "go").touch()
    ok(kernel.run("%cluster retry"))
    assert kernel.run("kept == list(range(200))").result == "True"
