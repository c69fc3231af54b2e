"""Output that comes after its cell has ended, where whoever runs the notebook takes no notice of that: nbclient, and so papermill and nbconvert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow


def executed(folder: Path, *cells: str) -> list[dict[str, Any]]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    return list(notebook.cells)


def shown(cell: dict[str, Any]) -> str:
    """All text of a cell's outputs."""
    found = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        found.append(output.get("text") or data.get("text/plain", ""))
    return "\n".join(found)


def test_late_output_is_in_the_saved_notebook_in_its_cell(runtime_dir: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = executed(
        tmp_path,
        "%load_ext nbray\n%cluster start --cpus 1\nimport nbray, os, time",
        f"@nbray.remote\ndef late():\n    while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n    print('it is late')\n    display('shown late')\nref = late.remote()",
        f"open({str(gate)!r}, 'w').close()\nnbray.get(ref)",
        "%%remote -a\nimport time\ntime.sleep(0.2)\nfive = 5",
        "five",
    )
    assert "it is late" in shown(cells[1])
    assert "shown late" in shown(cells[1])
    for cell in (cells[2], cells[4]):
        assert "late" not in shown(cell)


def test_a_flood_is_folded_at_the_end_of_its_cell(runtime_dir: Path, tmp_path: Path) -> None:
    cells = executed(
        tmp_path,
        "%load_ext nbray\n%cluster start --cpus 1\nimport nbray",
        "@nbray.remote\ndef flood():\n    for i in range(100_000): print('line', i)\nnbray.get(flood.remote())",
    )
    text = shown(cells[1])
    assert len(text) < 300_000
    assert "lines folded, %cluster logs In[2] shows all" in text
    assert "line 99999" in text
