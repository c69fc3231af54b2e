"""The Interrupt button: the prompt comes back, what the cell started ends, everything else goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow

PROMPT = 2.0
"""Seconds within which the prompt must be back on a busy machine (0.3 s where nothing else runs)."""

HELPERS = """
import nbray, os, time
from pathlib import Path
folder = Path({folder!r})
def mark(name): (folder / name).touch()
@nbray.remote
def slow(name):
    try:
        mark(name)
        time.sleep(60)
    finally: mark(name + '-ended')
@nbray.remote
def gated(name):
    mark(name)
    while not (folder / (name + '-go')).exists(): time.sleep(0.01)
    return name
@nbray.remote
def stubborn(name):
    (folder / name).write_text(str(os.getpid()))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try: time.sleep(60)
        except KeyboardInterrupt: mark(name + '-heard')
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel({"JPY_SESSION_NAME": "interrupts.ipynb"}, cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        yield k


@pytest.fixture
def folder(kernel: Kernel, tmp_path: Path) -> Path:
    """Where the tasks of `HELPERS` leave their marks."""
    assert kernel.run(HELPERS.format(folder=str(tmp_path))).error is None
    return tmp_path


def until(kernel: Kernel, runs: list[Run], *paths: Path) -> None:
    kernel.read_until(runs, lambda: all(path.exists() for path in paths), timeout=20.0)


def interrupt(kernel: Kernel, run: Run) -> float:
    """Press the button; seconds until the prompt is back."""
    began = time.monotonic()
    kernel.interrupt()
    kernel.finish(run)
    seconds = time.monotonic() - began
    assert seconds < PROMPT
    return seconds


BLOCKED = [
    "%%remote\nref = slow.remote('a')\nnbray.get(ref)",
    "nbray.get(slow.remote('a'))",
    "refs = [slow.remote('a') for _ in range(1)]\nnbray.wait(refs, num_returns=1)",
    "list(nbray.map(slow.__wrapped__, ['a']))",
    "ref = slow.remote('a')\ntime.sleep(60)",
    "%%time\nnbray.get(slow.remote('a'))",
    "%%time\n%%remote\nslow.__wrapped__('a')",
    "%%capture seen\n%%remote\nslow.__wrapped__('a')",
]


@pytest.mark.parametrize("cell", BLOCKED)
def test_the_cells_tasks_end_and_the_queue_is_stopped(kernel: Kernel, folder: Path, cell: str) -> None:
    run = kernel.start(cell)
    queued = kernel.start("mark('queued')")
    until(kernel, [run], folder / "a")
    interrupt(kernel, run)
    assert run.error == "KeyboardInterrupt"
    kernel.finish(queued)
    assert queued.reply["status"] in ("aborted", "error")
    until(kernel, [run], folder / "a-ended")
    assert not (folder / "queued").exists()
    assert kernel.run("%%remote --num-cpus 2\n'next'").result == "'next'"


def test_tasks_of_earlier_cells_go_on(kernel: Kernel, folder: Path) -> None:
    assert kernel.run("early = gated.remote('early')").error is None
    until(kernel, [], folder / "early")
    run = kernel.start("late = slow.remote('late')\nnbray.get(early)")
    until(kernel, [run], folder / "late")
    interrupt(kernel, run)
    assert run.error == "KeyboardInterrupt"
    until(kernel, [run], folder / "late-ended")
    kernel.read_until([run], lambda: any("are cancelled" in data["text/plain"] for data in run.shown()))
    (folder / "early-go").touch()
    assert kernel.run("nbray.get(early)").result == "'early'"
    assert kernel.run("nbray.get(late)").error == "TaskCancelledError"


def test_nothing_is_said_if_the_cell_has_started_nothing(kernel: Kernel, folder: Path) -> None:
    assert kernel.run("early = gated.remote('early')").error is None
    run = kernel.start("mark('here')\nnbray.get(early)")
    until(kernel, [run], folder / "here")
    interrupt(kernel, run)
    assert run.shown() == []
    (folder / "early-go").touch()
    assert kernel.run("nbray.get(early)").result == "'early'"


def test_queued_tasks_by_the_thousand(kernel: Kernel, folder: Path) -> None:
    run = kernel.start("refs = [slow.remote(f'x{i}') for i in range(1000)]\nmark('all')\nnbray.get(refs)")
    until(kernel, [run], folder / "all", folder / "x0")
    interrupt(kernel, run)
    assert run.error == "KeyboardInterrupt"
    assert kernel.run("%%remote --num-cpus 2\n'next'").result == "'next'"
    assert not (folder / "x999").exists()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("cell", ["%%remote\nstubborn.__wrapped__('s')", "nbray.get(stubborn.remote('s'))"])
@pytest.mark.parametrize("again", [False, True])
def test_who_does_not_listen_is_ended_after_a_while_or_by_a_second_press(
    kernel: Kernel, folder: Path, cell: str, again: bool
) -> None:
    run = kernel.start(cell)
    until(kernel, [run], folder / "s")
    began = time.monotonic()
    interrupt(kernel, run)
    until(kernel, [run], folder / "s-heard")
    pid = int((folder / "s").read_text())
    if again:
        kernel.interrupt()
    kernel.read_until([run], lambda: gone(pid))
    assert again or time.monotonic() - began >= 2.0
    assert not again or time.monotonic() - began < 1.9
    assert kernel.run("%%remote --num-cpus 2\n'next'").result == "'next'"


def test_an_interrupt_of_an_idle_kernel_does_nothing(kernel: Kernel, folder: Path) -> None:
    for _ in range(3):
        kernel.interrupt()
    assert kernel.run("mark('idle')\n1 + 1").result == "2"


def test_a_running_method_of_an_actor_is_spared(kernel: Kernel, folder: Path) -> None:
    ok = kernel.run(
        "@nbray.remote\nclass Keeper:\n    def __init__(self): self.n = 0\n    def work(self):\n        self.n += 1\n        mark('working')\n"
        "        while not (folder / 'work-go').exists(): time.sleep(0.01)\n        self.n += 10\n        return self.n\n    def count(self): return self.n\n"
        "keeper = Keeper.remote()"
    )
    assert ok.error is None
    run = kernel.start("running, queued = keeper.work.remote(), keeper.work.remote()\nnbray.get(running)")
    until(kernel, [run], folder / "working")
    interrupt(kernel, run)
    kernel.interrupt()
    assert kernel.run("nbray.get(queued)").error == "TaskCancelledError"
    (folder / "work-go").touch()
    assert kernel.run("nbray.get(keeper.count.remote())").result == "11"


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("await slow.remote('a')", "CancelledError"),
        ("import asyncio\nawait asyncio.gather(slow.remote('a'), slow.remote('b'))", "CancelledError"),
        ("import asyncio\nref = slow.remote('a')\nawait asyncio.sleep(60)", "CancelledError"),
        ("import asyncio\nawait asyncio.sleep(0)\nnbray.get(slow.remote('a'))", "KeyboardInterrupt"),
    ],
)
def test_cells_that_await(kernel: Kernel, folder: Path, cell: str, error: str) -> None:
    run = kernel.start(cell)
    until(kernel, [run], folder / "a")
    interrupt(kernel, run)
    assert run.error == error
    until(kernel, [run], folder / "a-ended")
    assert kernel.run("1 + 1").result == "2"


def test_a_cancellation_that_is_no_interrupt_cancels_nothing(kernel: Kernel, folder: Path) -> None:
    cell = "import asyncio\nkept = gated.remote('kept')\nawait asyncio.sleep(0)\nraise asyncio.CancelledError"
    assert kernel.run(cell).error == "CancelledError"
    (folder / "kept-go").touch()
    assert kernel.run("nbray.get(kept)").result == "'kept'"


def test_an_interrupt_in_a_finalizer_is_not_lost(kernel: Kernel, folder: Path) -> None:
    cell = "class D:\n    def __del__(self):\n        mark('in')\n        time.sleep(60)\nd = D()\ndel d\ntime.sleep(60)"
    run = kernel.start(cell)
    until(kernel, [run], folder / "in")
    interrupt(kernel, run)
    assert run.error == "KeyboardInterrupt"


def test_the_traceback_is_that_of_the_notebooks_lines(kernel: Kernel, folder: Path) -> None:
    run = kernel.start("def waits(ref):\n    return nbray.get(ref)\nwaits(slow.remote('a'))")
    until(kernel, [run], folder / "a")
    interrupt(kernel, run)
    assert "in waits" in run.traceback
    assert "nbray/" not in run.traceback
