"""The cluster as the notebook sees it: connecting to one, and what cards say about it."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from nbray import clusters as discovery
from nbray import config, platform
from nbray.api import context
from nbray.clusters import ClusterRecord
from nbray.notebook import lifecycle
from nbray.notebook.arguments import human
from nbray.notebook.cards import UNITS, Facts, Status


def of_record(record: ClusterRecord) -> Facts:
    """A cluster as its discovery file tells."""
    settings = config.settings()
    return Facts(
        name=record.name,
        resources=record.resources,
        memory=platform.available_memory(settings.memory_limit or None, settings.cgroup_root),
        store=record.store_limit,
        log=record.paths.log,
        spill=record.paths.spill,
        directory=record.paths.directory,
        ttl=settings.ttl,
    )


def of_runtime(runtime: context.Runtime) -> Facts:
    """The cluster that this process is connected to."""
    details = runtime.engine.details()
    name = str(details.get("name", ""))
    record = discovery.find_cluster(name)
    if record is not None:
        return of_record(record)
    resources: Mapping[str, int] = details.get("resources", {})
    return Facts(name, resources, 0, 0, str(details.get("log", "")), "", "", config.settings().ttl)


def running(name: str) -> bool:
    """Whether a cluster of that name lives."""
    return discovery.find_cluster(name) is not None


def clusters() -> list[tuple[Facts, float]]:
    """This user's clusters, and when each was made (seconds of the wall clock)."""
    return [(of_record(record), record.created) for record in discovery.list_clusters()]


def connect(
    options: argparse.Namespace, session: str | None = None, *, keep: bool = False
) -> context.Runtime:
    """Start a cluster, or join the one that runs. ``session``: the notebook's name, None for a session of this process's own."""
    from nbray.api.session import init

    # A cluster that runs has the size it has: `differences` says where that is not what was asked for.
    found = running(options.name or "")
    init(
        num_cpus=None if found else options.cpus,
        num_gpus=None if found else options.gpus,
        object_store_memory=None if found else options.store_memory,
        name=options.name,
        seed=options.seed,
        session=session or None,
        keep=keep,
    )
    return context.require()


def differences(here: Facts, options: argparse.Namespace) -> list[str]:
    """What was asked for and is not what runs."""
    found = []
    for flag, asked, name in (("--cpus", options.cpus, "CPU"), ("--gpus", options.gpus, "GPU")):
        has = here.resources.get(name, 0) / UNITS
        if asked is not None and asked != has:
            found.append(f"{flag} {asked:g}: it has {has:g}")
    if options.store_memory is not None and options.store_memory != here.store:
        found.append(f"--store-memory {human(options.store_memory)}: it has {human(here.store)}")
    if options.name is not None and options.name != here.name:
        found.append(f"--name {options.name}: this notebook is connected to {here.name!r}")
    if options.seed is not None:
        found.append(f"--seed {options.seed}: the seed is set when a cluster starts")
    if not found:
        return []
    return [
        f"It runs already and keeps what it has. Asked for {'; '.join(found)}. For another one: %cluster stop, then start."
    ]


def stop(session: str, *, force: bool) -> str:
    """Stop the cluster of this notebook; what to tell about it. Raises RuntimeError when others use it and not ``force``."""
    from nbray.api.session import shutdown

    runtime = context.current()
    if runtime is None:
        if not running(""):
            return "no cluster is running"
        # The cluster itself knows whether other notebooks use it.
        anything = argparse.Namespace(cpus=None, gpus=None, store_memory=None, name=None, seed=None)
        runtime = connect(anything, session)
    name = str(runtime.engine.details().get("name", ""))
    shutdown(stop=True, force=force)
    return f"cluster {name!r} is stopped"


def status() -> Status:
    """What the cluster does now."""
    from nbray.state import views

    ask = context.require().engine.query
    nodes = views.nodes(ask)
    available: Counter[str] = Counter()
    for resources in nodes["available"]:
        available.update(dict(resources))
    tasks: Counter[str] = Counter()
    counts = views.counts(ask)
    for state, number in zip(counts["state"], counts["tasks"], strict=True):
        tasks[state] += number
    objects = views.objects(ask)
    workers = views.workers(ask, 1)
    actors = views.actors(ask, 1000)
    return Status(
        available=available,
        tasks=tasks,
        actors=sum(state != "DEAD" for state in actors["state"]),
        workers=sum(state != "ENDED" for state in workers["state"]),
        objects=len(objects["object_id"]),
        used=sum(size or 0 for size in objects["size_bytes"]),
    )


def paths(here: Facts) -> list[tuple[str, str, int]]:
    """(what, path, bytes on disk) of everything this cluster and those before it have written."""
    data = config.settings().data_dir
    results = os.path.join(data, "results") if data else ""
    places = [("logs", here.log), ("spill", here.spill), ("runtime", here.directory)]
    if os.path.isdir(results):
        places.append(("results", results))
    return [(what, path, _size(path)) for what, path in places if path]


def _size(path: str) -> int:
    """Bytes of a file, or of what lies in a directory."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_blocks * 512
            except OSError:
                continue
    return total


def _front_end(shell: Any) -> str:
    """What runs the kernel, as far as the kernel can tell: Jupyter's servers do not say which page is open."""
    if "google.colab" in sys.modules:
        return "Colab"
    if shell.user_ns.get("__vsc_ipynb_file__"):
        return "VS Code"
    if config.settings().session:
        return "a Jupyter server"
    return "none that restarts kernels (a headless run)" if lifecycle.kernel_id(shell) else "a terminal"


def front_end(shell: Any) -> dict[str, str]:
    """What shows the notebook, for `nbray doctor`."""
    return {
        "front end": _front_end(shell),
        "notebook": lifecycle.session_name(shell, "") or "(not a notebook)",
        "shell": type(shell).__name__,
        "restart may come": str(lifecycle.may_come_back(shell)),
    }
