"""What a user installs: the built wheel, in an environment that cannot see the source tree."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {"__pycache__"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive, which is built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build in place could pick up leftovers, and leaves some.
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", ".*cache", ".ipynb_checkpoints")
    for entry in ("nbray", "tests", "tools", "notebooks", "benchmarks"):
        if (ROOT / entry).is_dir():
            shutil.copytree(ROOT / entry, source / entry, ignore=ignore)
    for file in [
        *ROOT.glob("*.md"),
        *(ROOT / name for name in ("pyproject.toml", "constraints.txt", "LICENSE", "Makefile")),
    ]:
        shutil.copy(file, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` folder of an environment that holds the wheel, and the dependencies by reference."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        built,
        cwd=folder,
    )
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # A folder named in a .pth file has its own .pth files ignored, the editable install's among them.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(libraries) + "\n")
    yield python.parent
    shutil.rmtree(folder)


def test_the_wheel_is_pure_python(built: Path) -> None:
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".c", ".pyx"))] == []


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nbray").rglob("*")
        if path.is_file() and not NOT_SHIPPED.intersection(path.parts)
    }
    with zipfile.ZipFile(built) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "nbray/py.typed" in shipped
    assert shipped == expected


def test_the_metadata_says_what_is_needed(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "# nbray" in metadata.get_payload()
    required = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert all(">=" in entry for entry in required), required
    assert not [entry for entry in required if entry.startswith(("ray", "dask", "torch", "nodejs"))]


def test_it_imports_from_anywhere_and_not_from_the_source_tree(clean: Path, tmp_path: Path) -> None:
    where = run(clean / "python", "-c", "import nbray; print(nbray.__file__)", cwd=tmp_path).strip()
    assert where.startswith(str(clean.parent))
    paths = run(clean / "python", "-c", "import sys; print('\\n'.join(sys.path))", cwd=tmp_path).splitlines()
    assert str(ROOT) not in paths


def test_the_command_exists_and_explains_itself(clean: Path, tmp_path: Path) -> None:
    text = run(clean / "nbray", "--help", cwd=tmp_path)
    for word in ("start", "stop", "status", "list", "doctor"):
        assert word in text
    assert run(clean / "python", "-m", "nbray", "--help", cwd=tmp_path).split() == text.split()


def test_a_cluster_of_the_installed_package_runs_a_task(clean: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import nbray\n"
        "nbray.init(num_cpus=1)\n"
        "@nbray.remote\n"
        "def where():\n"
        "    import nbray\n"
        "    return nbray.__file__\n"
        "print(nbray.get(where.remote(), timeout=60))\n"
        "nbray.shutdown()\n"
    )
    assert run(clean / "python", program, cwd=tmp_path).strip().startswith(str(clean.parent))
