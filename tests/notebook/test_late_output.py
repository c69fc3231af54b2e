"""Output that comes after its cell has ended, hundreds of times: always in the cell that started the task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, Run, is_idle

pytestmark = pytest.mark.slow

TRIES = 300

SETUP = """
import nbray, os, sys, time
from pathlib import Path
begun = Path({begun!r})
begun.touch()

@nbray.remote(num_cpus=0.1)
def late(number, kind):
    # The cell that starts the task is over when the one after it has begun.
    while begun.stat().st_size <= number + 1: time.sleep(0.001)
    word = f"<{{number}}>"
    if kind == 0: print(word)
    elif kind == 1: print(word, file=sys.stderr)
    elif kind == 2: nbray_display(word)
    elif kind == 3:
        import logging
        logging.getLogger("late").warning(word)
    elif kind == 4:
        print(word[:1], end=""); sys.stdout.flush(); print(word[1:])

def nbray_display(word):
    from IPython.display import display
    display({{"text/plain": word}}, raw=True)
"""

CELL = "with begun.open('a') as f: f.write('x')\nref = late.remote({number}, {kind})\nprint('here {number}')"
BACKGROUND = "%%remote -a -q --num-cpus 0.1\nwhile begun.stat().st_size <= {number} + 1: time.sleep(0.001)\nprint('<{number}>')"
LOCAL = "with begun.open('a') as f: f.write('x')"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    # With a front end, that is: where nobody looks after a cell's end, late output takes another way.
    environment = {"JPY_SESSION_NAME": "late.ipynb"}
    with Kernel(environment, cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        yield k


def said(run: Run) -> str:
    """All that a cell shows."""
    return "".join(
        message["content"].get("text") or str(message["content"].get("data"))
        for message in run.messages
        if message["msg_type"] in ("stream", "display_data")
    )


def late_messages(run: Run) -> int:
    """How many messages came after the kernel had said that the cell was done."""
    ends = [
        index
        for index, message in enumerate(run.messages)
        if message["content"].get("execution_state") == "idle"
    ]
    return len(run.messages) - ends[0] - 1


def test_always_in_its_own_cell(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.run(SETUP.format(begun=str(tmp_path / "begun"))).error is None
    runs = []
    for number in range(TRIES):
        kind = number % 6
        if kind == 5:
            # The magic's own cell cannot say that it has begun.
            kernel.start(LOCAL)
            runs.append(kernel.start(BACKGROUND.format(number=number)))
        else:
            runs.append(kernel.start(CELL.format(number=number, kind=kind)))
    last = kernel.start(LOCAL)
    kernel.read_until([*runs, last], lambda: is_idle(last), timeout=120)
    tokens = [f"<{number}>" for number in range(TRIES)]

    kernel.read_until(runs, lambda: all(token in said(run) for token, run in zip(tokens, runs, strict=True)))
    wrong = [
        (number, other)
        for number, run in enumerate(runs)
        for other, token in enumerate(tokens)
        if other != number and token in said(run)
    ]
    assert wrong == []
    for number, run in enumerate(runs):
        assert number % 6 == 5 or f"here {number}\n" in said(run)
        assert late_messages(run) > 0
