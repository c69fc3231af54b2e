"""Random state of torch, which is not installed here: a module that takes its place notes the seeds that it is given."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FAKE_TORCH = """
seeds = []

def manual_seed(seed):
    seeds.append(seed)
"""


@pytest.mark.parametrize("where", ["in the task", "in the notebook"])
def test_torch_s_generators_are_seeded(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    monkeypatch.syspath_prepend(str(tmp_path))
    drop = tmp_path / "tried"
    if where == "in the notebook":
        torch = importlib.import_module("torch")
        monkeypatch.delitem(sys.modules, "torch")
        monkeypatch.setitem(sys.modules, "torch", torch)

    @cluster.remote(max_retries=1, retry_exceptions=True)
    def seeds(fails: bool = False) -> Any:
        import torch

        if fails and not drop.exists():
            drop.write_text(str(torch.seeds[-1]))
            raise OSError("once more")
        return os.getpid(), list(torch.seeds)

    found = cluster.get([seeds.remote() for _ in range(40)])
    last = [of_this_worker[-1] for _, of_this_worker in found]
    assert len(set(last)) == 40, "each task has its own"
    firsts = {pid: of_this_worker[0] for pid, of_this_worker in found}
    assert len(set(firsts.values())) == len(firsts), "also the first of each worker"
    _, again = cluster.get(seeds.remote(True))
    assert str(again[-1]) == drop.read_text(), "and the same when it is tried again"
