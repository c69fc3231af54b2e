"""The clusters of this user on this machine: their directories, who is alive, starting one.

Every cluster has a directory with its sockets, its log and ``cluster.json``; a node that lives holds a lock on ``lock`` in it, so a stale directory of a
crashed run is told from a live one without trusting pids. There is one default cluster per user and Python environment.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nbray import config as configuration
from nbray import ids, platform
from nbray.config import Settings
from nbray.errors import NbrayError

SOCKET_LIMIT = 100
"""Longest path of a Unix socket, bytes (the kernel's limit is 108)."""

START_SECONDS = 30.0
STOP_SECONDS = 10.0
MIN_STORE = 16 << 20


@dataclass(frozen=True)
class Paths:
    """Where the files of one cluster lie. ``spill``: on a local disk; everything else below ``directory``."""

    directory: str
    spill: str

    @property
    def node_socket(self) -> str:
        return os.path.join(self.directory, "node.sock")

    @property
    def head_socket(self) -> str:
        return os.path.join(self.directory, "head.sock")

    @property
    def log(self) -> str:
        return os.path.join(self.directory, "log")

    @property
    def database(self) -> str:
        return os.path.join(self.spill, "gcs.sqlite")

    @property
    def record(self) -> str:
        return os.path.join(self.directory, "cluster.json")

    def lock(self) -> int:
        """Take the lock that says a node lives here; keep the descriptor open. Raises BlockingIOError when another one does."""
        fd = os.open(os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def announce(self, told: dict[str, Any], pid: int) -> None:
        """Write the discovery file, whole or not at all."""
        record = {
            "name": told["name"],
            "pid": pid,
            "node": told["node"],
            "paths": asdict(self),
            "resources": told["resources"],
            "store_limit": told["store_limit"],
            "created": time.time(),
            "host": socket.gethostname(),
            "boot": platform.boot_id(),
            "python": sys.executable,
            "details": told["details"],
        }
        temporary = self.record + ".new"
        with open(temporary, "w") as file:
            json.dump(record, file)
        os.replace(temporary, self.record)

    def remove(self) -> None:
        """Remove all files of the cluster."""
        shutil.rmtree(self.spill, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class ClusterRecord:
    """A cluster as its discovery file tells. ``alive``: its node holds the lock."""

    name: str
    pid: int
    node: str
    paths: Paths
    resources: dict[str, int]
    store_limit: int
    created: float
    python: str
    alive: bool
    details: dict[str, str] = field(default_factory=dict)


# -- directories


def runtime_root(settings: Settings) -> str:
    """The private directory that holds all clusters of this user. Raises NbrayError when there is nowhere to put it."""
    user = f"nbray-{os.getuid()}"
    candidates = []
    if settings.runtime_dir:
        candidates.append(settings.runtime_dir)
    else:
        if settings.user_runtime_dir:
            candidates.append(os.path.join(settings.user_runtime_dir, "nbray"))
        candidates += [os.path.join(place, user) for place in (settings.temp_dir, "/tmp", "/var/tmp", "/dev/shm") if place]
    reasons = []
    for candidate in candidates:
        if len(os.path.join(candidate, "x" * 24, "node.sock")) > SOCKET_LIMIT:
            reasons.append(f"{candidate}: too long for a Unix socket")
            continue
        try:
            private_directory(candidate)
            probe = tempfile.TemporaryFile(dir=candidate)
            with probe:
                probe.write(b"x" * 4096)
                probe.flush()
        except OSError as error:
            reasons.append(f"{candidate}: {error.strerror or error}")
            continue
        return candidate
    raise NbrayError(
        "there is no directory for nbray's sockets: " + "; ".join(reasons) + ". Set NBRAY_RUNTIME_DIR to a short path of a directory that you can write."
    )


def private_directory(path: str) -> None:
    """Make a directory that only this user can enter, or check that it is one. Raises OSError."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(20, f"{path} is not a directory (a link is not followed)")
    if found.st_uid != os.getuid():
        raise PermissionError(13, f"{path} belongs to user {found.st_uid}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.chmod(path, 0o700)


def spill_root(settings: Settings) -> str:
    """A directory on a local disk for spilled objects and the database."""
    if settings.spill_dir:
        os.makedirs(settings.spill_dir, mode=0o700, exist_ok=True)
        return settings.spill_dir
    places = [place for place in (settings.temp_dir, "/tmp", "/var/tmp") if place and os.access(place, os.W_OK | os.X_OK)]
    for place in places:
        if platform.filesystem_kind(place) == "local":
            return place
    return places[0] if places else runtime_root(settings)


def directory_name(name: str) -> str:
    """Name of a cluster's directory: clusters of different Python environments do not meet."""
    environment = ids.content_id(f"{sys.prefix} {sys.version_info[:2]}".encode(), 3).hex()
    return f"{name[:12]}-{environment}"


# -- discovery


def _records(root: str) -> Iterator[ClusterRecord]:
    for entry in sorted(Path(root).glob("*/cluster.json")):
        try:
            told = json.loads(entry.read_text())
            paths = Paths(**told["paths"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        yield ClusterRecord(
            told["name"], told["pid"], told["node"], paths, told["resources"], told["store_limit"], told["created"], told["python"],
            _alive(paths, told.get("boot", "")), told.get("details", {}),
        )  # fmt: skip


def _alive(paths: Paths, boot: str) -> bool:
    if boot != platform.boot_id():
        return False
    try:
        os.close(paths.lock())
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def list_clusters(settings: Settings | None = None) -> list[ClusterRecord]:
    """The live clusters of this user; what crashed runs have left behind is removed."""
    found = []
    for record in _records(runtime_root(settings or configuration.settings())):
        if record.alive:
            found.append(record)
        else:
            record.paths.remove()
    return found


def find_cluster(name: str, settings: Settings | None = None) -> ClusterRecord | None:
    """The live cluster of that name in this Python environment (an empty name: the default one)."""
    settings = settings or configuration.settings()
    wanted = directory_name(name or settings.cluster or "default")
    for record in list_clusters(settings):
        if os.path.basename(record.paths.directory) == wanted:
            return record
    return None


# -- start and stop


def start_cluster(
    name: str,
    resources: dict[str, int],
    store_limit: int,
    *,
    cluster: bytes,
    details: dict[str, str],
    memory_limit: int,
    settings: Settings,
    spares: int,
) -> ClusterRecord:
    """Start a node (and with it head and zygote) and wait until it listens.

    Raises NbrayError with the end of its log when it does not come up.
    """
    root = runtime_root(settings)
    directory = os.path.join(root, directory_name(name))
    with _starting(root):
        known = find_cluster(name, settings)
        if known is not None:
            return known
        shutil.rmtree(directory, ignore_errors=True)
        private_directory(directory)
        spill = os.path.join(spill_root(settings), f"nbray-{os.getuid()}-{ids.content_id(directory.encode(), 4).hex()}")
        shutil.rmtree(spill, ignore_errors=True)
        private_directory(spill)
        paths = Paths(directory, spill)
        ready, told_ready = os.pipe()
        told = {
            "ready_fd": told_ready,
            "log": paths.log,
            "log_level": settings.log,
            "paths": asdict(paths),
            "node": ids.content_id(cluster + b"node", 8).hex(),
            "name": name,
            "cluster": cluster.hex(),
            "resources": resources,
            "store_limit": store_limit,
            "span": store_limit // 4096 * 4096 * 8,
            "details": details,
            "ttl": settings.ttl,
            "memory_limit": memory_limit,
            "portable": settings.portable,
            "spares": spares,
        }
        try:
            with open(paths.log, "ab") as log:
                process = subprocess.Popen(
                    python_command("nbray.node.server", json.dumps(told)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[told_ready],
                    start_new_session=True,
                    cwd="/",
                    env=configuration.child_environment(),
                )
            os.close(told_ready)
            came = _await_byte(ready, START_SECONDS)
        finally:
            os.close(ready)
        _children.append(process)
        if not came:
            process.kill()
            process.wait()
            tail = Path(paths.log).read_text(errors="replace")[-2000:]
            paths.remove()
            raise NbrayError(f"the node process did not start; the end of its log:\n{tail}")
    record = find_cluster(name, settings)
    if record is None:
        raise NbrayError(f"the node process ended right after its start; see {paths.log}")
    return record


_children: list[subprocess.Popen[bytes]] = []
"""Nodes that this process has started: kept so that they are reaped when they have ended."""


def reap() -> None:
    """Collect the exit status of nodes that have ended."""
    _children[:] = [process for process in _children if process.poll() is None]


def python_command(module: str, *arguments: str) -> list[str]:
    """Run a module of nbray in a fresh interpreter that imports nothing from the working directory or the user's paths.

    ``-P`` keeps a ``token.py`` beside the notebook from shadowing the standard library; the directory of nbray itself is added last.
    """
    here = str(Path(__file__).resolve().parent.parent)
    extra = [here]
    msgspec_home = _home_of("msgspec")
    if msgspec_home and msgspec_home != here:
        extra.append(msgspec_home)
    code = (
        f"import sys; sys.path.extend(p for p in {extra!r} if p not in sys.path); "
        f"import runpy; sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=False)"
    )
    return [sys.executable, "-P", "-c", code, *arguments]


def _home_of(package: str) -> str:
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve().parent.parent) if file else ""


def _await_byte(fd: int, seconds: float) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(int(seconds * 1000))) and bool(os.read(fd, 1))


class _starting:
    """Holds the lock under which clusters are started, so that two notebooks do not start the same one at once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._fd = -1

    def __enter__(self) -> None:
        # The directory itself is locked: a lock file would have to stay behind for ever.
        self._fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NbrayError(f"another process has been starting a cluster for {START_SECONDS:g} s; try again") from None
                time.sleep(0.02)
            else:
                return

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def wait_gone(record: ClusterRecord, seconds: float = STOP_SECONDS) -> bool:
    """Wait until the node has ended; False when it has not within ``seconds``."""
    watch = None
    try:
        watch = platform.process_descriptor(record.pid)
    except ProcessLookupError:
        reap()
        return True
    if watch is not None:
        import select

        poll = select.poll()
        poll.register(watch, select.POLLIN)
        gone = bool(poll.poll(int(seconds * 1000)))
        os.close(watch)
    else:
        deadline = time.monotonic() + seconds
        while (gone := not _alive(record.paths, platform.boot_id())) is False and time.monotonic() < deadline:
            time.sleep(0.01)
    reap()
    return gone


def stop_cluster(record: ClusterRecord) -> None:
    """End a cluster from outside, whoever uses it. Raises NbrayError when it does not end."""
    try:
        os.kill(record.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    if not wait_gone(record):
        raise NbrayError(f"cluster {record.name!r} (pid {record.pid}) did not end within {STOP_SECONDS:g} s; see {record.paths.log}")
