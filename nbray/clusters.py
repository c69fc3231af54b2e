"""The clusters of this user on this machine: their directories, who is alive, starting one.

Every cluster has a directory with its sockets, its log and ``cluster.json``; a node that lives holds a lock on ``lock`` in it, so a stale directory of a
crashed run is told from a live one without trusting pids. There is one default cluster per user and Python environment.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from nbray import config as configuration
from nbray import ids, platform
from nbray.config import Settings
from nbray.errors import NbrayError

SOCKET_LIMIT = 100
"""Longest path of a Unix socket, bytes (the kernel's limit is 108)."""

ENDING = ".ending-"
"""In the names of directories that are being removed."""

START_SECONDS = 30.0
STOP_SECONDS = 10.0
PROBE_BYTES = 64 << 10
MIN_STORE = 16 << 20


class Paths(NamedTuple):
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
    def logs(self) -> str:
        """Directory of what tasks print (``nbray.logs``)."""
        return os.path.join(self.spill, "logs")

    @property
    def last_log(self) -> str:
        """Where the log of a node that failed is kept, until the next one fails: in the runtime root, not in the cluster's own directory."""
        return os.path.join(os.path.dirname(self.directory), "failed.log")

    def keep_log(self) -> None:
        """The node fails: keep its log."""
        import shutil

        try:
            shutil.copyfile(self.log, self.last_log)
        except OSError:
            pass  # It cannot be helped: there is nowhere left to say so.

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
            "paths": self._asdict(),
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
        """Remove all files of the cluster. They vanish at once under their names, so that a new cluster of the same name does not meet them."""
        for path in (self.spill, self.directory):
            aside = f"{path}{ENDING}{os.getpid()}"
            try:
                os.rename(path, aside)
            except OSError:
                aside = path
            _remove_tree(aside)


class ClusterRecord(NamedTuple):
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
    details: dict[str, str]


# -- directories

OWN_FILE = "lock"
"""In a spill directory: locked as long as its node lives."""

EMPTY_SECONDS = 60.0
"""Age from which on an empty spill directory is nobody's any more."""


def runtime_root(settings: Settings) -> str:
    """The private directory that holds all clusters of this user. Raises NbrayError when there is nowhere to put it."""
    user = f"nbray-{os.getuid()}"
    candidates = []
    if settings.runtime_dir:
        candidates.append(settings.runtime_dir)
    else:
        if settings.user_runtime_dir:
            candidates.append(os.path.join(settings.user_runtime_dir, "nbray"))
        candidates += [
            os.path.join(place, user)
            for place in (settings.temp_dir, "/tmp", "/var/tmp", "/dev/shm")
            if place
        ]
    reasons = []
    for candidate in candidates:
        if len(os.path.join(candidate, "x" * 24, "node.sock")) > SOCKET_LIMIT:
            reasons.append(f"{candidate}: too long for a Unix socket")
            continue
        try:
            private_directory(candidate)
            _probe(candidate)
        except OSError as error:
            reasons.append(f"{candidate}: {error.strerror or error}")
            continue
        return candidate
    raise NbrayError(
        "there is no directory for nbray's sockets: "
        + "; ".join(reasons)
        + ". Set NBRAY_RUNTIME_DIR to a short path of a directory that you can write."
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
    """A directory on a local disk, with room, for spilled objects and the database. Raises NbrayError when there is none."""
    if settings.spill_dir:
        try:
            os.makedirs(settings.spill_dir, mode=0o700, exist_ok=True)
            _probe(settings.spill_dir)
        except OSError as error:
            raise NbrayError(
                f"NBRAY_SPILL_DIR={settings.spill_dir} cannot be written: {error.strerror or error}"
            ) from None
        return settings.spill_dir
    usable, reasons = [], []
    for place in (settings.temp_dir, "/tmp", "/var/tmp", runtime_root(settings)):
        if not place or place in usable:
            continue
        try:
            _probe(place)
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
            continue
        if platform.filesystem_kind(place) == "local":
            return place
        usable.append(place)
    if not usable:
        raise NbrayError(
            "there is no directory for spilled objects and the database: "
            + "; ".join(reasons)
            + ". Make room, or set NBRAY_SPILL_DIR to a directory on a local disk that you can write."
        )
    return usable[0]


def _own_spill(path: str) -> int:
    """Make a cluster's spill directory anew; the descriptor of the lock that says that it is in use."""
    lock = os.path.join(path, OWN_FILE)
    while True:
        _remove_tree(path)
        private_directory(path)
        fd = -1
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(lock).st_ino == os.fstat(fd).st_ino:
                return fd
        except (BlockingIOError, FileNotFoundError):
            pass  # Somebody has taken it for an abandoned one before it was locked.
        except OSError:
            if fd < 0:
                raise
            return fd  # A file system without locks: nobody else gets one either, so nobody removes it.
        if fd >= 0:
            os.close(fd)


def _remove_abandoned(root: str) -> None:
    """Remove spill directories of this user whose nodes are gone, also where nothing else tells of them any more."""
    prefix = f"nbray-{os.getuid()}-"
    try:
        with os.scandir(root) as entries:
            found = [entry.path for entry in entries if entry.name.startswith(prefix)]
    except OSError:
        return
    for path in found:
        try:
            about = os.lstat(path)
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                _remove_if_abandoned(path, about.st_mtime)
        except OSError:
            continue  # It is being removed, or not ours to judge.


def _remove_if_abandoned(path: str, modified: float) -> None:
    _, ending, pid = path.rpartition(ENDING)
    if ending and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
        _remove_tree(path)
        return
    try:
        fd = os.open(os.path.join(path, OWN_FILE), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if time.time() - modified > EMPTY_SECONDS:
            os.rmdir(path)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = f"{path}{ENDING}{os.getpid()}"
        os.rename(path, aside)
        _remove_tree(aside)
    finally:
        os.close(fd)


def _probe(directory: str) -> None:
    """Raises OSError when nothing can be written there: no permission, read-only, full."""
    path = os.path.join(directory, f".nbray-probe-{os.urandom(8).hex()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.unlink(path)
        data = memoryview(bytes(PROBE_BYTES))
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def _remove_tree(path: str) -> None:
    """Remove a directory and what is in it, as far as that can be done."""
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def directory_name(name: str) -> str:
    """Name of a cluster's directory: clusters of different Python environments do not meet."""
    environment = ids.content_id(f"{sys.prefix} {sys.version_info[:2]}".encode(), 3).hex()
    return f"{name[:12]}-{environment}"


# -- discovery


def _records(root: str) -> Iterator[ClusterRecord]:
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return
    for name in names:
        directory = os.path.join(root, name)
        try:
            with open(os.path.join(directory, "cluster.json")) as file:
                told = json.load(file)
            # Where the file lies counts, not what it says: a directory that is being removed has another name by now.
            paths = Paths(directory, told["paths"]["spill"])
            alive = (
                ENDING not in paths.directory
                and told["boot"] == platform.boot_id()
                and _locked(paths.directory)
            )
            yield ClusterRecord(
                told["name"],
                told["pid"],
                told["node"],
                paths,
                told["resources"],
                told["store_limit"],
                told["created"],
                told["python"],
                alive,
                told.get("details", {}),
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _locked(directory: str) -> bool:
    """Whether a node lives in this directory."""
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: several that look at the same time must not take each other for the node.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def list_clusters(settings: Settings | None = None) -> list[ClusterRecord]:
    """The live clusters of this user."""
    return [record for record in _records(runtime_root(settings or configuration.settings())) if record.alive]


def _remove_stale(root: str) -> None:
    """Remove what crashed runs have left behind. The caller holds the starting lock."""
    for record in list(_records(root)):
        if not record.alive and not _is_running(record):
            # Only where the spill directory is the cluster's own; the file may be anybody's invention.
            if os.path.basename(record.paths.spill).startswith(f"nbray-{os.getuid()}-"):
                _remove_tree(record.paths.spill)
            _remove_tree(record.paths.directory)


def _is_running(record: ClusterRecord) -> bool:
    """Whether a directory that is being removed still has somebody who removes it."""
    _, _, pid = record.paths.directory.rpartition(ENDING)
    return pid.isdigit() and os.path.exists(f"/proc/{pid}")


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
    meanwhile: Callable[[], None],
) -> tuple[ClusterRecord, bool]:
    """Start a node (and with it head and zygote) and wait until it listens; call ``meanwhile`` before waiting. False: somebody else has just started it.

    Raises NbrayError with the end of its log when it does not come up.
    """
    root = runtime_root(settings)
    directory = os.path.join(root, directory_name(name))
    deadline = time.monotonic() + STOP_SECONDS
    with _Starting(root), _InterruptsLater() as interrupts:
        known = find_cluster(name, settings)
        if known is not None:
            return known, False
        _remove_stale(root)
        while _locked(directory):
            # One that ends has no record any more, but is not gone yet.
            if interrupts.held:
                interrupts.deliver()
            if time.monotonic() > deadline:
                raise NbrayError(f"the node in {directory} neither works nor ends; see {directory}/log")
            time.sleep(0.01)
        root_of_spill = spill_root(settings)
        _remove_abandoned(root_of_spill)
        spill = os.path.join(
            root_of_spill, f"nbray-{os.getuid()}-{ids.content_id(directory.encode(), 4).hex()}"
        )
        try:
            _remove_tree(directory)
            private_directory(directory)
            spill_lock = _own_spill(spill)
        except OSError as error:
            _remove_tree(directory)
            raise NbrayError(f"the directories of the cluster cannot be made: {error}") from error
        paths = Paths(directory, spill)
        ready, told_ready = os.pipe()
        told = {
            "ready_fd": told_ready,
            "spill_fd": spill_lock,
            "log": paths.log,
            "log_level": settings.log,
            "paths": paths._asdict(),
            "node": ids.content_id(cluster + b"node", 8).hex(),
            "name": name,
            "cluster": cluster.hex(),
            "resources": resources,
            "store_limit": store_limit,
            "store_patience": settings.store_patience,
            "head_patience": settings.head_patience,
            "data": settings.data_dir,
            "span": store_limit // 4096 * 4096 * configuration.SPAN,
            "details": details,
            "ttl": settings.ttl,
            "memory_limit": memory_limit,
            "limits_root": settings.cgroup_root,
            "portable": settings.portable,
            "spares": spares,
        }
        try:
            with open(paths.log, "ab") as log:
                process = subprocess.Popen(
                    python_command("nbray.node.start", json.dumps(told)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[told_ready, spill_lock],
                    start_new_session=True,
                    cwd="/",
                    env=configuration.child_environment(),
                )
        except OSError as error:
            os.close(ready)
            paths.remove()
            raise NbrayError(f"the node process could not be started: {error}") from error
        finally:
            os.close(told_ready)
            os.close(spill_lock)
        came = False
        try:
            meanwhile()
            interrupts.deliver()
            came = _await_byte(ready, START_SECONDS)
        finally:
            # Also after Ctrl-C: a node that nobody has waited for would live on until its time is over.
            os.close(ready)
            if not came:
                process.kill()
                process.wait()
                with open(paths.log, errors="replace") as log:
                    tail = log.read()[-2000:]
                paths.remove()
        if not came:
            raise NbrayError(f"the node process did not start; the end of its log:\n{tail}")
        _children.append(process)
    record = find_cluster(name, settings)
    if record is None:
        raise NbrayError(f"the node process ended right after its start; see {paths.log}")
    return record, True


_children: list[subprocess.Popen[bytes]] = []
"""Nodes that this process has started: kept so that they are reaped when they have ended."""


def reap() -> None:
    """Collect the exit status of nodes that have ended."""
    _children[:] = [process for process in _children if process.poll() is None]


def python_command(module: str, *arguments: str) -> list[str]:
    """Run the ``main`` of a module of nbray in a fresh interpreter that imports nothing from the working directory or the user's paths.

    ``-P`` keeps a ``token.py`` beside the notebook from shadowing the standard library; the directory of nbray itself is added last.
    """
    here = _home_of("nbray")
    extra = [here]
    if (msgspec_home := _home_of("msgspec")) not in ("", here):
        extra.append(msgspec_home)
    code = (
        # Another nbray may be installed where this interpreter looks first: the daemons must be of the caller's.
        f"import sys; sys.path.insert(0, {here!r}); import nbray; del sys.path[0]; "
        f"sys.path.extend(p for p in {extra!r} if p not in sys.path); "
        f"from {module} import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-P", "-c", code, *arguments]


def _home_of(package: str) -> str:
    """The directory that a package is imported from; found, not imported, where it is not yet."""
    module = sys.modules.get(package) or importlib.util.find_spec(package)
    file = getattr(module, "__file__", None) or getattr(module, "origin", None)
    return os.path.dirname(os.path.dirname(os.path.realpath(file))) if file else ""


def _await_byte(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(int(seconds * 1000))) and bool(os.read(fd, 1))


class _InterruptsLater:
    """Between `__enter__` and `deliver` or the end, an interrupt of the main thread waits: nobody would know of a node that has just been started,
    and not every extension module survives one in the middle of its import.
    """

    def __init__(self) -> None:
        self.held: list[Any] = []
        self._handler: Any = None

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda *told: self.held.append(told))
            self._handler = handler
        return self

    def deliver(self) -> None:
        """Raises KeyboardInterrupt if one has come, and from now on."""
        handler, self._handler = self._handler, None
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
            if self.held:
                handler(*self.held.pop())

    def __exit__(self, *_: object) -> None:
        self.deliver()


class _Starting:
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
                    raise NbrayError(
                        f"another process has been starting a cluster for {START_SECONDS:g} s; try again"
                    ) from None
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
    try:
        deadline = time.monotonic() + seconds
        if watch is not None:
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            gone = bool(poll.poll(int(seconds * 1000)))
        else:
            while not (gone := not _locked(record.paths.directory)) and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        if watch is not None:
            os.close(watch)
    reap()
    return gone


def stop_cluster(record: ClusterRecord) -> None:
    """End a cluster from outside, whoever uses it. Raises NbrayError when it does not end."""
    try:
        watch = platform.process_descriptor(record.pid)
    except ProcessLookupError:
        return
    try:
        # Looked at again now that the process cannot be taken for another: a pid in a file may be anybody's by now.
        if not _locked(record.paths.directory):
            return
        if watch is not None:
            signal.pidfd_send_signal(watch, signal.SIGTERM)
        else:
            os.kill(record.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    finally:
        if watch is not None:
            os.close(watch)
    if not wait_gone(record):
        raise NbrayError(
            f"cluster {record.name!r} (pid {record.pid}) did not end within {STOP_SECONDS:g} s; see {record.paths.log}"
        )
