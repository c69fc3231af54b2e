"""The words of status lines, summaries, hints and failure cards."""

from __future__ import annotations

from typing import Any

from nbray import ids
from nbray.events import CellRow, FailureRow
from nbray.notebook import figures
from nbray.notebook.figures import Usage

TASK = bytes(16)
OTHER = bytes(range(16))


def row(**given: Any) -> CellRow:
    values: dict[str, Any] = {
        "cell": "In[7] id digest run", "submitted": 100, "finished": 100, "failed": 0, "cancelled": 0, "ran": 100, "seconds": 12.4, "out": 0,
        "read": 0, "first": 10.0, "last": 13.3, "now": 13.3, "running": [], "failures": [],
    }  # fmt: skip
    return CellRow(**(values | given))


def test_live() -> None:
    workers = [(1, TASK), (2, OTHER), (3, TASK), (4, TASK)]
    text = figures.live(row(submitted=100, finished=85, failed=1, running=workers, now=18.6), 8.6)
    named = f"{ids.short(TASK)}, {ids.short(OTHER)}, {ids.short(TASK)}, ..."
    assert text == f"4 running ({named}), 10 queued, 85 done, 1 failed; 8.6 s, about 1.0 s left"
    one = figures.live(row(submitted=1, finished=0, running=[(1, TASK)]), 0.4)
    assert one == f"1 running ({ids.short(TASK)}); 400 ms"
    assert figures.live(row(submitted=1, finished=0), 1.0) == "1 queued; 1.0 s"


def test_others() -> None:
    assert figures.others("", [row(finished=97)], 2.0) == "waiting for tasks of In[7]: 3 left; 2.0 s"
    assert figures.others("x of In[7]", [], 2.0) == "waiting for x of In[7]; 2.0 s"
    assert figures.waited("", figures.cells([row()]), 2.0) == "waited 2.0 s for tasks of In[7]"


def test_summary() -> None:
    assert figures.summary(row(out=3 << 20), "in 1.2 GB (reused)") == (
        "100 tasks: 12.4 s of work in 3.3 s (3.8x), in 1.2 GB (reused), out 3.0 MB"
    )
    assert figures.summary(row(submitted=1, finished=1, ran=1, seconds=3.2)) == "3.2 s of work in 3.3 s"
    assert figures.summary(row(finished=90, failed=3, read=1 << 30)) == (
        "100 tasks: 12.4 s of work in 3.3 s (3.8x), in 1.0 GB, 3 failed, 7 still running or queued"
    )
    assert figures.summary(row(submitted=1, finished=0, cancelled=1, ran=0)) == "1 cancelled"


def test_hints() -> None:
    usage = Usage(4.0)
    assert figures.hint(row(), usage) == ""
    small = row(submitted=10_000, finished=10_000, ran=10_000, seconds=2.0)
    assert figures.hint(small, usage) == "tasks take 0.2 ms: nbray.map(f, items) sends many at once"
    usage.add(7.6, 2.0, 1)
    assert "a task used 3.8 cores: numeric libraries (BLAS) already used all 4" in figures.hint(row(), usage)
    one = Usage(64.0)
    one.add(7.6, 2.0, 1)
    assert figures.hint(row(), one) == ""


def test_equal_errors_are_one_line_with_a_count() -> None:
    failures = [
        FailureRow("KeyError", "'x'", 1, 0, TASK, "g"),
        FailureRow("ValueError", "bad file", 500, 20, TASK, "f"),
        FailureRow("OSError", "", 0, 2, TASK, "h"),
    ]
    card = figures.failures_card(row(submitted=1000, finished=400, failed=530, failures=failures))
    assert card.text.splitlines() == [
        "530 of 1,000 tasks failed",
        "  500 x ValueError: bad file (first f de45d748, and 20 that depended on them)",
        "  2 x OSError (in something that they depended on; first h de45d748)",
        "  1 x KeyError: 'x' (g de45d748)",
        "  7 x other errors",
    ]
    assert "<" in card.html and "ValueError: bad file" in card.html


def test_bundles_are_escaped() -> None:
    data = figures.shown("a < b", "c")
    assert data["text/plain"] == "a < b\n  hint: c"
    assert "a &lt; b" in data["text/html"]
