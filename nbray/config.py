"""Every setting that comes from outside, read in one place: no other module reads environment variables.

=====================  =============================================================================================
``NBRAY_TTL``          seconds that a cluster without drivers and work lives on (1800)
``NBRAY_RUNTIME_DIR``  directory of sockets and discovery files (default: a private one below the user's runtime directory)
``NBRAY_SPILL_DIR``    directory on a local disk for spilled objects and the GCS's database (default: the temp directory)
``NBRAY_DATA_DIR``     directory of results that outlive their cluster (default: below the user's data directory)
``NBRAY_STORE_MEMORY`` bytes of the object store (default: 30 % of the memory this process may use)
``NBRAY_STORE_PATIENCE``  seconds that a request for memory in a full store waits (10)
``NBRAY_HEAD_PATIENCE``  seconds that calls wait for a head that is gone, before they fail with GcsUnavailableError (60)
``NBRAY_CLUSTER``      name of the cluster to start or join
``NBRAY_PORTABLE``     1: use no Linux-only mechanism where a portable one exists
``NBRAY_STALE_HINTS``  0: notebooks do not tell which results are stale
``NBRAY_STATIC``       1: plain, deterministic output in notebooks
``NBRAY_LOCALS``       0: errors of tasks do not carry local variables (for ``%debug``)
``NBRAY_LOG``          log level of the daemons (WARNING)
``NBRAY_CGROUP_ROOT``  where ``/proc`` and ``/sys`` with the limits of this machine lie (/); for tests of containers
``CPU_LIMIT``, ``MEM_LIMIT``  limits set by hosting platforms (JupyterHub)
``JPY_SESSION_NAME``   path of the notebook, set by Jupyter's servers
=====================  =============================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

INLINE_LIMIT = 16 * 1024
"""Bytes up to which values travel in messages and live in the node's table; larger ones go to the arena (protocol section 10)."""

SPAN = 8
"""Addresses of the arena per byte that may be used of it (protocol section 10)."""

INLINE_TOTAL = 256 * 1024 * 1024
"""Bytes of such values per node above which the oldest move into the arena (protocol section 10)."""

PUSH_WINDOW = 8 * 1024 * 1024
"""Unsent bytes per connection above which the node stops pushing results (protocol section 5)."""

PENDING_LIMIT = 1_000_000
"""Unfinished tasks of one process above which ``.remote()`` waits."""

WORLDS = 64
"""Worlds of one client that its node keeps for it: to one that it has not used since as many others it sends the whole again."""

PREFETCH = 16
"""Tasks dispatched ahead to a worker when the function's mean time is under 1 ms (protocol section 5: depth 16 gives 3x of depth 1)."""

PREFETCH_PATIENCE = 0.01
"""Seconds after which the unstarted tasks behind a running one are taken back."""

CANCEL_GRACE = 2.0
"""Seconds between the interrupt of a cancelled task and the end of its worker (protocol section 9)."""

HEAD_PATIENCE = 60.0
"""Seconds that calls wait for a head that is gone (protocol section 7)."""

NODE_PATIENCE = 5.0
"""Seconds more that a client waits for its node, which says itself that the head is gone."""

IDLE_PIN = 0.1
"""Seconds after which a process gives back pins that no view uses."""


class Settings(NamedTuple):
    """The environment's settings, with defaults."""

    ttl: float = 1800.0
    runtime_dir: str = ""
    spill_dir: str = ""
    data_dir: str = ""
    store_memory: int = 0
    store_patience: float = 10.0
    head_patience: float = HEAD_PATIENCE
    cluster: str = ""
    portable: bool = False
    static: bool = False
    capture_locals: bool = True
    stale_hints: bool = True
    log: str = "WARNING"
    cpu_limit: float = 0.0
    memory_limit: int = 0
    session: str = ""
    temp_dir: str = ""
    user_runtime_dir: str = ""
    cuda_devices: str | None = None
    cgroup_root: str = "/"


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name}={text!r} should be a number, for instance {name}={default:g}"
        ) from None


def settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process. Raises ValueError naming a variable that cannot be read."""
    env = os.environ if environment is None else environment
    return Settings(
        ttl=_number(env, "NBRAY_TTL", 1800.0),
        runtime_dir=env.get("NBRAY_RUNTIME_DIR", ""),
        spill_dir=env.get("NBRAY_SPILL_DIR", ""),
        data_dir=env.get("NBRAY_DATA_DIR", "") or _data_home(env),
        store_memory=int(_number(env, "NBRAY_STORE_MEMORY", 0)),
        store_patience=_number(env, "NBRAY_STORE_PATIENCE", 10.0),
        head_patience=_number(env, "NBRAY_HEAD_PATIENCE", HEAD_PATIENCE),
        cluster=env.get("NBRAY_CLUSTER", ""),
        portable=env.get("NBRAY_PORTABLE", "") not in ("", "0"),
        static=env.get("NBRAY_STATIC", "") not in ("", "0"),
        capture_locals=env.get("NBRAY_LOCALS", "") != "0",
        stale_hints=env.get("NBRAY_STALE_HINTS", "1") != "0",
        log=env.get("NBRAY_LOG", "WARNING"),
        cpu_limit=_number(env, "CPU_LIMIT", 0.0),
        memory_limit=int(_number(env, "MEM_LIMIT", 0)),
        session=env.get("JPY_SESSION_NAME", ""),
        temp_dir=env.get("TMPDIR", ""),
        user_runtime_dir=env.get("XDG_RUNTIME_DIR", ""),
        cuda_devices=env.get("CUDA_VISIBLE_DEVICES"),
        cgroup_root=env.get("NBRAY_CGROUP_ROOT", "/"),
    )


def _data_home(env: Mapping[str, str]) -> str:
    """Where this user's programs keep data, "" where there is no home."""
    home = env.get("XDG_DATA_HOME", "") or os.path.join(env.get("HOME", ""), ".local", "share")
    return os.path.join(home, "nbray") if os.path.isabs(home) else ""


def child_environment() -> dict[str, str]:
    """The environment for daemons: the caller's, without proxies (nothing of nbray's goes through one) and without Python's start-up hooks."""
    dropped = {
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "PYTHONSTARTUP",
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONINSPECT",
    }
    return {k: v for k, v in os.environ.items() if k not in dropped and k.lower() not in dropped}


_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
SECRET_LENGTH = 6
"""Shorter values occur by chance."""


def secret_values(environment: Mapping[str, str] | None = None) -> dict[bytes, str]:
    """Values of the environment variables whose names sound secret, each with its name: nothing that has one in it may be shown."""
    env = os.environ if environment is None else environment
    return {
        value.encode(errors="surrogateescape"): name
        for name, value in env.items()
        if len(value) >= SECRET_LENGTH and _SECRET.search(name)
    }


def notable_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `nbray doctor` shows of the environment: nbray's settings, limits, proxies (without passwords) and thread counts."""
    env = os.environ if environment is None else environment
    names = {
        "CPU_LIMIT",
        "MEM_LIMIT",
        "TMPDIR",
        "XDG_RUNTIME_DIR",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "JPY_SESSION_NAME",
    }
    proxies = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
    shown = {}
    for name in sorted(env):
        if name in names or (name.startswith("NBRAY_") and "TOKEN" not in name and "SECRET" not in name):
            shown[name] = env[name]
        elif name.lower() in proxies:
            shown[name] = env[name].rpartition("@")[2]
    return shown
