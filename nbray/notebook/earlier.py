"""Cells that an earlier run of this notebook's kernel has submitted and that still run, as runs that this kernel can wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbray.notebook.cockpit import CellRun
from nbray.notebook.options import CellOptions
from nbray.notebook.remote_cell import Run

if TYPE_CHECKING:
    from nbray.api.refs import ObjectRef
    from nbray.events import NameRow


@dataclass(frozen=True)
class EarlierCell(CellRun):
    """What it shows appears in the cell ``shown``."""

    shown: str = ""

    @property
    def label(self) -> str:
        return self.shown


class EarlierRun(Run):
    """``row``: one of its names as the cluster knows it; ``names``: those that this notebook wants; ``ref``: of its result."""

    def __init__(self, row: NameRow, names: tuple[str, ...], ref: ObjectRef[Any], shown: str) -> None:
        title, cell_id, digest, run = (*row.cell.split(" "), "", "", "", "")[:4]
        number = int(title[3:-1]) if title[3:-1].isdigit() else 0
        self.cell = EarlierCell(number, "" if cell_id == "-" else cell_id, digest, run, "", shown)
        self.options = CellOptions(quiet=True)
        self.name = self.cell.title
        self.names = names
        self.ref = ref
        self.origin = row.origin
        self.state = "running"
        self.began = time.monotonic() - row.age
        self.inputs = []
        self.left = True
        self.timed_out = False
        self.alarm = None
