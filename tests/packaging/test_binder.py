"""``binder/``: what repo2docker would make of it, as far as it can be seen without Docker; and an installation from the same files."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDER = ROOT / "binder"
KNOWN = {"requirements.txt", "runtime.txt", "start", "apt.txt", "postBuild", "environment.yml"}

pytestmark = pytest.mark.slow


def test_its_files_are_those_that_repo2docker_reads() -> None:
    assert {path.name for path in BINDER.iterdir()} <= KNOWN
    assert not (ROOT / ".binder").exists()  # only one of the two is looked at
    version = re.fullmatch(r"python-(3\.\d+)\n", (BINDER / "runtime.txt").read_text())
    assert version is not None
    assert f'"Programming Language :: Python :: {version[1]}"' in (ROOT / "pyproject.toml").read_text()
    lines = [
        line for line in (BINDER / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert lines == ["-c ../constraints.txt", ".[demo]"]


def test_start_runs_what_it_is_given(tmp_path: Path) -> None:
    start = BINDER / "start"
    assert os.access(start, os.X_OK)
    environment = {"PATH": os.environ["PATH"]}
    shown = subprocess.run(
        [start, "sh", "-c", "echo $NBRAY_STORE_MEMORY $0", "x y"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert shown.stdout == "268435456 x y\n"
    kept = subprocess.run(
        [start, "printenv", "NBRAY_STORE_MEMORY"],
        env={**environment, "NBRAY_STORE_MEMORY": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout == "5\n"


@pytest.mark.skipif(shutil.which("repo2docker") is None, reason="repo2docker is not installed")
def test_repo2docker_makes_an_image_of_it() -> None:
    done = subprocess.run(
        ["repo2docker", "--no-build", "--debug", str(ROOT)], capture_output=True, text=True, check=True
    )
    text = done.stdout + done.stderr
    for words in (
        "python=3.12",
        'install --no-cache-dir -r "binder/requirements.txt"',
        'R2D_ENTRYPOINT="${REPO_DIR}/binder/start"',
    ):
        assert words in text


@pytest.mark.timeout(300)
def test_the_first_notebook_runs_where_its_files_were_installed(tmp_path: Path) -> None:
    """The dependencies are those of this environment, by reference: nothing is downloaded."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    packages = next((home / "lib").glob("python*")) / "site-packages"
    (packages / "behind.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = str(home / "bin" / "python")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignore)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*install, "-r", "binder/requirements.txt"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [python, "-P", "-c", "import nbray; print(nbray.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(packages)), where.stdout
    execute = (
        "import nbformat; from nbclient import NotebookClient; made = nbformat.read('01-first-cluster.ipynb', 4);"
        "NotebookClient(made).execute(); nbformat.write(made, 'done.ipynb')"
    )
    run = [str(source / "binder" / "start"), python, "-c", execute]
    done = subprocess.run(
        run,
        cwd=source / "notebooks",
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = nbformat.read(source / "notebooks" / "done.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    text = str([cell.get("outputs") for cell in made.cells])
    assert "97.3% right" in text
