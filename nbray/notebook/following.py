"""Who wants to know about runs of cells: the status line, the names that the session holds, lineage.

`Cockpit.followers` is the list of them; `RemoteCells` calls each at the points below, in the notebook's main thread unless said otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbray.notebook.remote_cell import Run


class Follower:
    """Follows runs of cells; override what you need. What these methods raise is the cell's error, so they should not."""

    def prepared(self, run: Run) -> None:
        """The cell is analysed and packed (``run.prepared``), nothing is sent yet; the cluster is there."""

    def submitted(self, run: Run) -> None:
        """The cell's task is on its way: ``run.ref``. ``run.names``: what it may bind."""

    def watch(self, run: Run) -> AbstractContextManager[None]:
        """Entered before the notebook blocks for the cell, left after it, also when that raises."""
        return contextlib.nullcontext()

    def bound(self, run: Run, names: Collection[str], deleted: Collection[str]) -> None:
        """Values of ``run.ref`` are in the notebook under these names, and those were deleted; also what a cell that failed had bound."""

    def promised(self, run: Run, names: Collection[str]) -> None:
        """The cell goes on in the background: until it has bound these names the notebook does not have them."""

    def rebound(self, names: Collection[str]) -> None:
        """The notebook has bound or deleted these promised names itself: it does not want those that come any more."""

    def ended(self, run: Run) -> None:
        """The run is over: ``run.state`` is "done", "failed" or "cancelled". A background run ends in another thread."""


@contextlib.contextmanager
def watching(followers: list[Follower], run: Run) -> Iterator[None]:
    """All of them watch a run."""
    with contextlib.ExitStack() as stack:
        for follower in followers:
            stack.enter_context(follower.watch(run))
        yield
