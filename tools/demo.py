"""Run a notebook for real, as a user's front end would, and say what it did.

The executed copy is saved under build/demo/; the notebook itself is not touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
WIDTH = min(shutil.get_terminal_size((100, 24)).columns, 120)
SHOWN_LINES = 4
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def headline(source: str) -> str:
    """What a cell does: its magic, or its first line of code that is no comment or import."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("#", "import ", "from "))]
    return (code or lines or ["(empty)"])[0]


def lines_of(output: Any) -> list[str]:
    """The lines a person would read of one cell output; pictures by their kind."""
    if output.output_type == "stream":
        text = output.text
    elif output.output_type == "error":
        text = f"{output.ename}: {output.evalue}"
    else:
        pictures = [kind for kind in output.data if kind.startswith("image/")]
        text = f"[{pictures[0]}]" if pictures else output.data.get("text/plain", "")
    # A carriage return overwrites its line, a progress bar does it often.
    lines = [line.rsplit("\r", 1)[-1] for line in ANSI.sub("", text).splitlines()]
    return [line for line in lines if line.strip()]


class Narrator:
    """Prints each cell as it ends."""

    def __init__(self, notebook: Any) -> None:
        self.numbers = {
            index: number
            for number, index in enumerate(
                (index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"), start=1
            )
        }
        self.started = 0.0

    def start(self, cell: Any, cell_index: int) -> None:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            print(f"\n{shorten(cell.source.splitlines()[0].lstrip('# '), WIDTH)}", flush=True)
        self.started = time.monotonic()

    def done(self, cell: Any, cell_index: int, **_: Any) -> None:
        if cell_index not in self.numbers:
            return
        seconds = time.monotonic() - self.started
        label = f"  [{self.numbers[cell_index]:>2}/{len(self.numbers)}] {seconds:6.2f} s  "
        print(label + shorten(headline(cell.source), WIDTH - len(label)), flush=True)
        lines = [line for output in cell.outputs for line in lines_of(output)]
        for line in lines[:SHOWN_LINES]:
            print(f"                    {shorten(line, WIDTH - 20)}")
        if len(lines) > SHOWN_LINES:
            print(f"                    … {len(lines) - SHOWN_LINES} more lines")


def run(source: Path, target: Path, timeout: int) -> int:
    """Execute `source` into `target`; returns the exit status."""
    notebook: Any = nbformat.read(source, as_version=4)
    narrator = Narrator(notebook)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(source.parent)}},
        on_cell_start=narrator.start,
        on_cell_executed=narrator.done,
    )
    # A cluster of the demo's own: the user's is neither joined nor stopped.
    os.environ.setdefault("NBRAY_CLUSTER", "demo")
    started = time.monotonic()
    failure: CellExecutionError | None = None
    try:
        client.execute()
    except CellExecutionError as error:
        failure = error
    seconds = time.monotonic() - started
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    cells = len(narrator.numbers)
    print()
    if failure is not None:
        print(f"A cell failed after {seconds:.1f} s:\n\n{ANSI.sub('', str(failure)).strip()}\n")
    else:
        print(f"{cells} cells ran in {seconds:.1f} s, kernel start and end included.")
    print(f"Executed copy: {target.relative_to(ROOT)}")
    print("Open it live:  make lab")
    return 1 if failure is not None else 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--timeout", type=int, default=300, help="seconds that one cell may take (300)")
    options = parser.parse_args()
    source = options.notebook.resolve()
    if not source.is_file():
        sys.exit(f"demo: there is no notebook {options.notebook}")
    print(f"Running {source.relative_to(ROOT)} in a kernel of {sys.executable}")
    return run(source, ROOT / "build" / "demo" / source.name, options.timeout)


if __name__ == "__main__":
    sys.exit(main())
