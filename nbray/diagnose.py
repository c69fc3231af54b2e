"""``nbray doctor``: one block of text about an installation and its machine, and what looks wrong. Nothing in it is secret."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from nbray import clusters, config, platform
from nbray.config import Settings

PACKAGES = (
    "nbray", "cloudpickle", "msgspec", "numpy", "pandas", "pyarrow", "psutil", "grpcio", "ipython", "ipykernel", "ipywidgets", "anywidget",
    "jupyter_client", "jupyterlab", "notebook",
)  # fmt: skip

LOW_MEMORY = 1 << 30
LOW_DISK = 1 << 30
GIB = 1 << 30


def report(more: Mapping[str, str] | None = None) -> str:
    """The block. ``more``: further lines, name -> text. Never raises for what is wrong: it says so."""
    problems: list[str] = []
    try:
        settings = config.settings()
    except ValueError as error:
        problems.append(str(error))
        settings = config.settings({})
    rows = [
        *_software(),
        *_machine(settings, problems),
        *_places(settings, problems),
        *_clusters(settings, problems),
        *((name, value) for name, value in config.notable_environment().items()),
        *(more or {}).items(),
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["```text", *(f"{name:<{width}}  {value}" for name, value in rows)]
    lines.append("")
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["no problem found"]
    return "\n".join([*lines, "```"])


def _software() -> list[tuple[str, str]]:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    python = ".".join(map(str, sys.version_info[:3]))
    half = (len(versions) + 1) // 2
    return [
        ("python", f"{python} ({sys.implementation.name}), {sys.executable}"),
        ("packages", ", ".join(versions[:half])),
        ("", ", ".join(versions[half:])),
    ]


def _machine(settings: Settings, problems: list[str]) -> list[tuple[str, str]]:
    system = os.uname()
    try:
        platform.require_supported()
    except OSError as error:
        problems.append(str(error))
    memory = platform.available_memory(settings.memory_limit or None, settings.cgroup_root)
    used, limit = platform.memory_in_use(settings.memory_limit or None, settings.cgroup_root)
    if memory < LOW_MEMORY:
        problems.append(
            f"only {memory / GIB:.2f} GiB of memory may be used; ask for a larger machine or container"
        )
    if used > 0.9 * limit:
        problems.append(
            f"{used / GIB:.1f} of {limit / GIB:.1f} GiB of memory are in use: tasks will be ended near the limit"
        )
    cpus = platform.available_cpus(settings.cpu_limit or None, settings.cgroup_root)
    return [
        ("system", f"{system.sysname} {system.release} {system.machine}"),
        ("cgroup", _attempt(lambda: _first_line("/proc/self/cgroup"))),
        ("CPUs", f"{cpus} may be used, the machine has {os.cpu_count()}"),
        (
            "memory",
            f"{memory / GIB:.1f} GiB may be used, {used / GIB:.1f} of {limit / GIB:.1f} GiB are in use",
        ),
    ]


def _places(settings: Settings, problems: list[str]) -> list[tuple[str, str]]:
    rows = []
    for what, find in (("runtime", clusters.runtime_root), ("spill", clusters.spill_root)):
        try:
            path = find(settings)
            kind = platform.filesystem_kind(path)
            free = shutil.disk_usage(path).free
        except Exception as error:  # noqa: BLE001  (a report goes on)
            problems.append(f"no directory for {what}: {error}")
            rows.append((what, "none"))
            continue
        rows.append((what, f"{path} ({kind}, {free / GIB:.1f} GiB free)"))
        if what == "spill" and kind != "local":
            problems.append(
                f"spilled objects go to {path}, which is {kind}: set NBRAY_SPILL_DIR to a directory on a local disk"
            )
        if free < LOW_DISK:
            problems.append(f"{path} has only {free / GIB:.2f} GiB left")
    rows.append(
        (
            "/dev/shm",
            _attempt(lambda: f"{shutil.disk_usage('/dev/shm').total / GIB:.2f} GiB (nbray does not use it)"),
        )
    )
    return rows


def _clusters(settings: Settings, problems: list[str]) -> list[tuple[str, str]]:
    try:
        found = clusters.list_clusters(settings)
    except Exception as error:  # noqa: BLE001
        problems.append(f"cannot look for clusters: {error}")
        return []
    if not found:
        return [("cluster", "none is running")]
    now = time.time()
    return [
        (
            "cluster",
            f"{each.name}: pid {each.pid}, {(now - each.created) / 60:.0f} min old, {each.paths.directory}",
        )
        for each in found
    ]


def _first_line(path: str) -> str:
    with open(path) as file:
        return file.readline().strip()


def _attempt(find: Callable[[], Any]) -> str:
    try:
        return str(find())
    except Exception as error:  # noqa: BLE001
        return f"unknown ({type(error).__name__})"
