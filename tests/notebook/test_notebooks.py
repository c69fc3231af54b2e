"""The notebooks that people run: every cell, every output that can be the same twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebook.test_kernel import gone, node_pids, wait_for

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_the_outputs_that_it_was_saved_with(notebook: Path, runtime_dir: Path) -> None:
    """All outputs are compared that are not marked."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-W",
        "default",
    ]
    done = subprocess.run(
        [*command, "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "100", str(notebook)],
        cwd=ROOT,
        env={**os.environ, "NBRAY_STATIC": "1", "NBRAY_TTL": "2"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert wait_for(lambda: all(gone(pid) for pid in node_pids(runtime_dir)))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_tidily(notebook: Path) -> None:
    saved = json.loads(notebook.read_text())
    numbers = [cell["execution_count"] for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1)), "restart the kernel, run all cells, save"
    assert saved["metadata"]["kernelspec"]["name"] == "python3"
    assert str(ROOT) not in notebook.read_text()
    assert notebook.stat().st_size < 60_000
