"""A distributed Python runtime that lives in the notebook: tasks, actors and shared objects, with Ray's API.

    import nbray

    @nbray.remote
    def f(x):
        return x + 1

    nbray.get([f.remote(i) for i in range(4)])

Names are imported when they are first used, so that importing nbray costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbray import exceptions, state, util
    from nbray.api import actor
    from nbray.api.actor import ActorClass, ActorHandle, exit_actor, method
    from nbray.api.mapping import map_items as map  # noqa: A004  (a name of the API)
    from nbray.api.progress import progress
    from nbray.api.refs import ObjectRef, ObjectRefGenerator
    from nbray.api.remote import RemoteFunction, remote
    from nbray.api.session import init, shutdown
    from nbray.api.verbs import (
        available_resources,
        cancel,
        cluster_resources,
        free,
        get,
        get_actor,
        get_gpu_ids,
        get_runtime_context,
        is_initialized,
        kill,
        nodes,
        put,
        wait,
    )
    from nbray.notebook.graphs import graph
    from nbray.notebook.results import attach, fetch, keep, names
    from nbray.notebook.twins import cluster, remote_cell
    from nbray.state.timeline import timeline

__version__ = "0.1.0"

_HOMES = {
    "api.actor": ("ActorClass", "ActorHandle", "exit_actor", "method"),
    "api.mapping": ("map",),
    "api.progress": ("progress",),
    "api.refs": ("ObjectRef", "ObjectRefGenerator"),
    "api.remote": ("RemoteFunction", "remote"),
    "api.session": ("init", "shutdown"),
    "api.verbs": (
        "available_resources",
        "cancel",
        "cluster_resources",
        "free",
        "get",
        "get_actor",
        "get_gpu_ids",
        "get_runtime_context",
        "is_initialized",
        "kill",
        "nodes",
        "put",
        "wait",
    ),
    "notebook.graphs": ("graph",),
    "notebook.results": ("attach", "fetch", "keep", "names"),
    "notebook.twins": ("cluster", "remote_cell"),
    "state.timeline": ("timeline",),
}
# In its module it would shadow the built-in function.
_NAMED_ELSEWHERE = {"map": "map_items"}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# Ray has exit_actor in a module of this name.
_SUBMODULES = {"actor": "api.actor", "exceptions": "exceptions", "state": "state", "util": "util"}

__all__ = [
    "ActorClass",
    "ActorHandle",
    "ObjectRef",
    "ObjectRefGenerator",
    "RemoteFunction",
    "actor",
    "attach",
    "available_resources",
    "cancel",
    "cluster",
    "cluster_resources",
    "exceptions",
    "exit_actor",
    "fetch",
    "free",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "graph",
    "init",
    "is_initialized",
    "keep",
    "kill",
    "map",
    "method",
    "names",
    "nodes",
    "progress",
    "put",
    "remote",
    "remote_cell",
    "shutdown",
    "state",
    "timeline",
    "util",
    "wait",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is not None:
        found = getattr(import_module(f"nbray.{home}"), _NAMED_ELSEWHERE.get(name, name))
    elif name in _SUBMODULES:
        found = import_module(f"nbray.{_SUBMODULES[name]}")
    else:
        raise AttributeError(f"module 'nbray' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """What ``%load_ext nbray`` calls."""
    from nbray.notebook.extension import load_ipython_extension as load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What ``%unload_ext nbray`` calls."""
    from nbray.notebook.extension import unload_ipython_extension as unload

    unload(shell)
