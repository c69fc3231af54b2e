"""``%graph`` in a kernel: the widget, what it is sent and when, and the picture that stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbray.widgets.frames import HEADER, RESET
from tests.notebook.kernels import Kernel, Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("runtime_dir")]

BEGIN = "%load_ext nbray\nimport nbray, time, os\n%cluster start --cpus 2"
TASKS = """
@nbray.remote
def step(*x): return 1
@nbray.remote
def gate(path):
    while not os.path.exists(path): time.sleep(0.01)
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """As a Jupyter server starts it: with somebody who may look."""
    with Kernel({"JPY_SESSION_NAME": "graph.ipynb"}) as kernel:
        kernel.run(BEGIN)
        kernel.run(TASKS)
        yield kernel


def opened(run: Run) -> str:
    """The id of the widget that a cell shows."""
    (shown,) = [data for data in run.shown() if WIDGET in data]
    assert list(shown) == ["text/plain", WIDGET, "image/svg+xml"]
    return str(shown[WIDGET]["model_id"])


def say(kernel: Kernel, widget: str, **content: Any) -> None:
    data = {"comm_id": widget, "data": {"method": "custom", "content": content}}
    kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", data))


class View:
    """What a front end would see of one widget."""

    def __init__(self, kernel: Kernel, widget: str) -> None:
        self.kernel = kernel
        self.widget = widget
        self.frames: list[tuple[int, ...]] = []
        self._seen = 0
        self.run = Run("nothing")

    def collect(self, *runs: Run) -> None:
        messages = [m for run in (*runs, self.run) for m in run.messages] + self.kernel.others
        self.frames = [
            HEADER.unpack_from(buffer)
            for m in sorted(messages, key=lambda m: m["header"]["date"])
            if m["msg_type"] == "comm_msg" and m["content"]["comm_id"] == self.widget
            for buffer in m["buffers"]
        ]

    def until(self, *runs: Run, nodes: int) -> None:
        """Read until the frames since the last reset have told of so many tasks."""

        def there() -> bool:
            self.collect(*runs)
            last = max((n for n, f in enumerate(self.frames) if f[1] & RESET), default=len(self.frames))
            return sum(f[4] for f in self.frames[last:]) >= nodes

        self.kernel.read_until([*runs, self.run], there)


def test_a_view_gets_the_whole_then_what_changes_and_nothing_when_it_leaves(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.run("nbray.get([step.remote() for _ in range(5)])")
    view = View(kernel, opened(kernel.run("%graph")))
    say(kernel, view.widget, kind="hello")
    view.until(nodes=5)
    run = kernel.start(f"refs = [step.remote() for _ in range(7)] + [gate.remote({str(tmp_path / 'go')!r})]")
    view.until(run, nodes=13)
    kernel.finish(run)
    say(kernel, view.widget, kind="whole")
    before = len(view.frames)
    view.until(run, nodes=13)

    def more() -> bool:
        view.collect(run)
        return len(view.frames) > before

    kernel.read_until([run, view.run], more)
    whole = next(frame for frame in view.frames[before:] if frame[1] & RESET)
    assert (whole[3], whole[4]) == (0, 13)
    sequences = [frame[2] for frame in view.frames]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
    (tmp_path / "go").touch()
    say(kernel, view.widget, kind="bye")
    kernel.run("nbray.get(refs)")
    kernel.run("time.sleep(0.3)")
    view.collect(run)
    quiet = len(view.frames)
    after = kernel.run("nbray.get([step.remote() for _ in range(20)]); time.sleep(0.5)")
    view.collect(run, after)
    assert len(view.frames) == quiet


def test_a_view_is_fed_while_a_cell_blocks_though_it_cannot_be_heard(kernel: Kernel, tmp_path: Path) -> None:
    view = View(kernel, opened(kernel.run("%graph")))
    go = tmp_path / "go"
    run = kernel.start(f"nbray.get([step.remote() for _ in range(30)] + [gate.remote({str(go)!r})])")
    say(kernel, view.widget, kind="hello")
    view.until(run, nodes=31)
    assert not [m for m in run.messages if m["msg_type"] == "execute_reply"]
    go.touch()
    assert kernel.finish(run).error is None


def test_freezing_leaves_a_picture_with_no_widget(kernel: Kernel) -> None:
    first = kernel.run("a = step.remote(step.remote()); nbray.get(a)")
    shown = kernel.run("%graph a")
    opened(shown)
    kernel.run("%graph --freeze")
    updates = [
        m["content"]
        for m in [*shown.messages, *kernel.others]
        if m["msg_type"] == "update_display_data" and "image/svg+xml" in m["content"]["data"]
    ]
    assert len(updates) == 1
    assert set(updates[0]["data"]) == {"text/plain", "image/svg+xml"}
    assert updates[0]["data"]["text/plain"] == (
        f"What made a: 2 tasks: 2 finished\n  step (In[{first.number}])  2 tasks: 2 finished"
    )
    assert "Live again: %graph a" in updates[0]["data"]["image/svg+xml"]


def test_where_nobody_looks_pictures_come_instead(kernel: Kernel) -> None:
    shown = kernel.run("%graph")
    opened(shown)
    time.sleep(2.5)
    kernel.run("nbray.get([step.remote() for _ in range(3)])")

    def pictured() -> bool:
        return any(
            m["msg_type"] == "update_display_data" and "3 tasks: 3 finished" in str(m["content"]["data"])
            for m in [*shown.messages, *kernel.others]
        )

    kernel.read_until([shown], pictured)


def test_words_that_mean_nothing(kernel: Kernel) -> None:
    run = kernel.run("%graph nowhere")
    assert run.error == "UsageError"
    assert "nowhere" in run.text("stderr") + run.traceback
    assert kernel.run("nbray.graph('nowhere')").error == "ValueError"
    kernel.run("%cluster stop")
    assert kernel.run("%unload_ext nbray").error is None


def test_when_the_cluster_ends_the_picture_of_what_was_seen_last_stays(kernel: Kernel) -> None:
    kernel.run("nbray.get([step.remote() for _ in range(4)])")
    shown = kernel.run("%graph")
    view = View(kernel, opened(shown))
    say(kernel, view.widget, kind="hello")
    view.until(nodes=4)
    kernel.run("%cluster stop")

    def pictured() -> bool:
        return any(
            m["msg_type"] == "update_display_data" and "4 tasks: 4 finished" in str(m["content"]["data"])
            for m in [*shown.messages, *view.run.messages, *kernel.others]
        )

    kernel.read_until([shown, view.run], pictured)
    assert kernel.run("1").error is None


def test_without_anywidget_there_is_a_picture(kernel: Kernel) -> None:
    kernel.run("import sys; sys.modules['anywidget'] = None")
    said, shown = kernel.run("%graph").shown()
    assert "pip install anywidget" in said["text/plain"]
    assert set(shown) == {"text/plain", "image/svg+xml"}


def test_headless_runs_show_pictures_only_and_bring_them_up_to_date() -> None:
    with Kernel() as kernel:
        kernel.run(BEGIN)
        kernel.run(TASKS)
        (first,) = kernel.run("%graph").shown()
        assert set(first) == {"text/plain", "image/svg+xml"}
        run = kernel.run("nbray.get([step.remote() for _ in range(9)])")
        updates = [m["content"]["data"] for m in run.messages if m["msg_type"] == "update_display_data"]
        pictures = [data for data in updates if "image/svg+xml" in data]
        assert "9 tasks: 9 finished" in pictures[-1]["text/plain"]
        assert not [m for m in run.messages if m["msg_type"].startswith("comm")]


def test_static_notebooks_get_one_display_that_is_the_same_in_every_run() -> None:
    said = []
    for _ in range(2):
        with Kernel({"NBRAY_STATIC": "1"}) as kernel:
            kernel.run(BEGIN)
            kernel.run(TASKS)
            kernel.run("nbray.get(step.remote(step.remote()))")
            run = kernel.run("%graph")
            assert not [m for m in run.messages if m["msg_type"].startswith(("comm", "update"))]
            said.append(run.shown())
            after = kernel.run("nbray.get(step.remote())")
            assert not [m for m in after.messages if m["msg_type"] == "update_display_data"]
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_in_a_script_there_is_a_picture(shared_cluster: Any, tmp_path: Path) -> None:
    import nbray

    @nbray.remote
    def doubled(x: int) -> int:
        return 2 * x

    assert nbray.get(doubled.remote(doubled.remote(2))) == 8
    shown = nbray.graph()
    assert shown is not None
    assert "doubled  2 tasks: 2 finished" in repr(shown)
    shown.save(tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_text() == shown._repr_svg_()
