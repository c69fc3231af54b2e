"""The layers, read from the source: who may import what, who may read the environment, what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nbray"

# State machines without I/O: same inputs, same outputs, so that a simulation can drive them.
PURE = [
    "scheduler/*.py",
    "store/arena.py",
    "store/objects.py",
    "store/holders.py",
    "flow.py",
    "node/actors.py",
    "node/counts.py",
    "node/outputs.py",
    "notebook/folding.py",
    "node/deadlock.py",
    "node/machine.py",
    "node/looks.py",
    "node/names.py",
    "node/peer.py",
    "node/pool.py",
    "node/scarcity.py",
    "node/tasks.py",
    "node/values.py",
    "node/watching.py",
    "gcs/client.py",
    "gcs/tables.py",
    "worker/machine.py",
]
# Ids, messages, errors: what everybody may import. Constants of config are arguments by another name.
VOCABULARY = [
    "ids.py",
    "errors*.py",
    "exceptions.py",
    "failure*.py",
    "events.py",
    "config.py",
    "**/messages.py",
]
IMPURE_MODULES = {
    "asyncio",
    "concurrent",
    "IPython",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "sqlite3",
    "subprocess",
    "threading",
    "time",
    "uuid",
}

# Read by everybody or by the outermost layer only; each may look upwards for the reason given.
MAY_IMPORT_NOTEBOOK = {
    "__init__.py": "`%load_ext nbray` calls its load_ipython_extension",
    "__main__.py": "the outermost layer",
    "cli.py": "the outermost layer",
}

MAY_READ_ENVIRONMENT = {
    "config.py": "the one place that knows the names of settings",
    "notebook/line_magics.py": "%env in a cell is about the environment",
    "api/world.py": "takes the notebook's environment along, as data",
    "worker/world.py": "makes a worker's environment the notebook's",
    "worker/zygote.py": "keeps numeric libraries to one thread while it imports them",
}

HEAVY = ("numpy", "pandas", "pyarrow", "grpc", "IPython", "cloudpickle", "ipywidgets", "anywidget", "sqlite3")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, inside of functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def offenders(path: Path, forbidden: set[str]) -> list[str]:
    return [
        f"{name(path)}:{line}: {module}"
        for line, module in imported(path)
        if any(module == bad or module.startswith(f"{bad}.") for bad in forbidden)
    ]


def pure_files() -> list[Path]:
    return sorted(path for pattern in PURE for path in PACKAGE.glob(pattern))


def test_machines_do_no_io() -> None:
    found = [line for path in pure_files() for line in offenders(path, IMPURE_MODULES)]
    assert not found, "pure machines get time, randomness and I/O as arguments:\n" + "\n".join(found)


def test_every_pattern_of_the_pure_list_names_files() -> None:
    assert [pattern for pattern in PURE if not list(PACKAGE.glob(pattern))] == []


def file_of(module: str) -> Path | None:
    """The file inside the package that a dotted name (of a module, or of something in one) leads to."""
    parts = module.split(".")
    if parts[0] != "nbray":
        return None
    for stop in (len(parts), len(parts) - 1):
        path = PACKAGE.joinpath(*parts[1:stop])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def test_machines_import_no_shell() -> None:
    """What a machine imports of nbray is another machine or does no I/O either."""
    vocabulary = {path for pattern in VOCABULARY for path in PACKAGE.glob(pattern)}
    allowed = vocabulary | set(pure_files()) | set(PACKAGE.rglob("__init__.py"))
    found = [
        f"{name(path)}:{line}: {module}"
        for path in pure_files()
        for line, module in imported(path)
        if (target := file_of(module)) is not None and target not in allowed
    ]
    assert not found, "pure machines import only each other and the vocabulary:\n" + "\n".join(found)


def test_only_the_ray_engine_imports_ray() -> None:
    found = [line for path in sources() if name(path) != "engine/ray.py" for line in offenders(path, {"ray"})]
    assert not found, "Ray is reached through nbray/engine/ray.py:\n" + "\n".join(found)


def test_nobody_below_imports_the_notebook() -> None:
    found = [
        line
        for path in sources()
        if name(path) not in MAY_IMPORT_NOTEBOOK and not name(path).startswith(("notebook/", "widgets/"))
        for line in offenders(path, {"nbray.notebook", "nbray.widgets"})
    ]
    assert not found, "the notebook is on top; facts reach it through nbray.state:\n" + "\n".join(found)


def reads_environment(path: Path) -> list[str]:
    names = {"environ", "environb", "getenv", "getenvb"}
    found = []
    for node in ast.walk(tree(path)):
        attribute = (
            isinstance(node, ast.Attribute)
            and node.attr in names
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
        from_os = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in names for alias in node.names)
        )
        if attribute or from_os:
            assert isinstance(node, ast.Attribute | ast.ImportFrom)
            found.append(f"{name(path)}:{node.lineno}")
    return found


def test_settings_come_from_one_module() -> None:
    found = [
        line
        for path in sources()
        if name(path) not in MAY_READ_ENVIRONMENT
        for line in reads_environment(path)
    ]
    assert not found, "environment variables are read in nbray/config.py only:\n" + "\n".join(found)


def test_exceptions_to_the_rules_are_still_needed() -> None:
    gone = [entry for entry in MAY_READ_ENVIRONMENT if not reads_environment(PACKAGE / entry)]
    assert not gone, f"these no longer read the environment, take them off the list: {gone}"


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["nbray", "nbray.notebook"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    code = f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(run_python(code, tmp_path)) == []


def best_of(count: int, code: str, cwd: Path) -> float:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run_python(code, cwd)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_import_takes_a_fraction_of_a_second(tmp_path: Path) -> None:
    """At most 0.3 s where an interpreter starts in 20 ms; a slower machine may take as many times longer."""
    bare = best_of(3, "pass", tmp_path)
    whole = best_of(3, "import nbray", tmp_path)
    assert whole - bare <= max(0.3, 15 * bare), (
        f"import nbray took {whole - bare:.3f} s (python alone {bare:.3f} s)"
    )
