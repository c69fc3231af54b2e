"""``init`` and ``shutdown``: joining a cluster, starting one when there is none, and leaving it."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbray import clusters, ids, platform
from nbray import config as configuration
from nbray.api import context
from nbray.clusters import MIN_STORE, ClusterRecord
from nbray.errors import NbrayError, NodeDiedError
from nbray.scheduler.resources import CPU, GPU, MEMORY, UNIT, readable, units

if TYPE_CHECKING:
    from nbray.engine.local import LocalEngine
    from nbray.messages import Output

STORE_SHARE = 0.3
"""Share of the memory that the object store may take (design section 3)."""

HELLO_SECONDS = 65.0
MAX_SPARES = 4


class ClusterInfo(Mapping[str, Any]):
    """What ``init`` returns: facts about the cluster, as a mapping; usable as a context manager that shuts down at its end."""

    def __init__(self, facts: Mapping[str, Any], started: bool) -> None:
        self._facts = dict(facts)
        self.started = started
        """Whether ``init`` has started the cluster; False: it was there."""

    def __getitem__(self, key: str) -> Any:
        return self._facts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __enter__(self) -> ClusterInfo:
        return self

    def __exit__(self, *_: object) -> None:
        shutdown()

    def __repr__(self) -> str:
        verb = "started" if self.started else "joined"
        return f"<nbray cluster {self._facts.get('name')!r}, {verb}: {readable(self._facts.get('resources', {}))}>"


def init(
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_memory: int | None = None,
    *,
    name: str | None = None,
    seed: int | None = None,
    address: str | None = None,
    namespace: str | None = None,
    ignore_reinit_error: bool = False,
    session: str | None = None,
    keep: bool = False,
    log_to_driver: bool = True,
    **unknown: Any,
) -> ClusterInfo:
    """Connect this process to a cluster on this machine, starting one when there is none.

    ``num_cpus``, ``num_gpus``: what the cluster may use (default: what this process may use; GPUs: those that are visible). ``resources``: custom ones, in
    any unit. ``object_store_memory``: bytes (default 30 % of memory). ``name``: which cluster; there is one default cluster per user and Python environment.
    ``seed``: random state of tasks repeats from run to run. ``address``: "local" always starts a cluster of its own, "auto" never starts one, else a
    cluster's name. ``session``: who we are to the cluster (a notebook; default: a session of this process's own). ``keep``: the cluster stays when this
    process ends cleanly. ``log_to_driver``: show what tasks print.

    Raises RuntimeError when connected already, ValueError or TypeError for arguments that do not fit (naming the nearest valid one), ConnectionError
    when there is no cluster to join.
    """
    _check_arguments(
        unknown,
        resources,
        seed,
        {"name": name, "address": address, "namespace": namespace, "session": session},
    )
    runtime = context.current()
    if runtime is not None and runtime.pid == os.getpid() and not runtime.worker:
        if not ignore_reinit_error:
            raise RuntimeError(
                f"this process is connected to the cluster {runtime.engine.details()['name']!r} already; call nbray.shutdown() first, or pass "
                "ignore_reinit_error=True to go on with it"
            )
        return ClusterInfo(runtime.engine.details(), False)
    platform.require_supported()
    settings = configuration.settings()
    asked = _asked(num_cpus, num_gpus, resources, object_store_memory)
    if address in ("local", "auto"):
        wanted = name or (f"local-{os.getpid()}" if address == "local" else "")
    else:
        wanted = name or address or ""
    session = session or (_name_session() if _name_session is not None else "") or None
    label = session or f"{os.path.basename(sys.argv[0] or 'python')} (pid {os.getpid()})"
    while True:
        record = clusters.find_cluster(wanted, settings)
        if record is None and address not in (None, "local"):
            alive = ", ".join(sorted(r.name for r in clusters.list_clusters(settings))) or "none"
            raise ConnectionError(
                f"no cluster {wanted or 'default'!r} runs here (running: {alive}); nbray.init() without address starts one"
            )
        started = False
        if record is None:
            record, started = _start(wanted or settings.cluster or "default", asked, seed, settings)
        if asked and not started:
            _compare(record, asked)
        from nbray.messages import DRIVER

        try:
            engine = connect(
                record, DRIVER, session or f"process-{os.getpid()}", label, namespace or "", keep
            )
        except NodeDiedError:
            # One that was about to end when we found it: the next one is ours.
            if started or not clusters.wait_gone(record):
                raise
        except BaseException:
            if started:
                clusters.stop_cluster(record)
            raise
        else:
            break
    if log_to_driver:
        engine.on_output = print_output
    runtime = context.Runtime(
        engine, namespace=namespace or session or f"process-{os.getpid()}-{engine.welcome.job}"
    )
    from nbray.api import readonly
    from nbray.api.world import WorldWatch

    watch = WorldWatch(engine, runtime)
    engine.before_submit = watch.check
    global _keep, _decide, _registered
    _keep = keep
    _decide = None
    context.install(runtime)
    engine.link.start()
    readonly.watch()
    if not _registered:
        _registered = True
        atexit.register(_at_exit)
    return ClusterInfo(engine.details(), started)


def _check_arguments(unknown: dict[str, Any], resources: Any, seed: Any, texts: dict[str, Any]) -> None:
    if unknown:
        import difflib
        import inspect

        given = next(iter(unknown))
        valid = [name for name in inspect.signature(init).parameters if name != "unknown"]
        close = difflib.get_close_matches(given, valid, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}? It" if close else "it"
        raise TypeError(f"nbray.init() has no argument {given!r}: {hint} takes {', '.join(valid)}")
    if resources is not None and not isinstance(resources, Mapping):
        raise TypeError(
            f"resources={resources!r} should be a dict of amounts by name, for instance {{'tpu': 2}}"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed={seed!r} should be a whole number")
    for name, value in texts.items():
        if value is not None and not (isinstance(value, str) and value):
            raise TypeError(f"{name}={value!r} should be a text that is not empty, or be left out")


def _asked(num_cpus: Any, num_gpus: Any, resources: Mapping[str, Any] | None, store: Any) -> dict[str, float]:
    asked: dict[str, float] = {}
    for name, value, least in (
        ("num_cpus", num_cpus, 0),
        ("num_gpus", num_gpus, 0),
        ("object_store_memory", store, MIN_STORE),
    ):
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} should be a number of at least {least}")
        asked[name] = value
    for key, amount in (resources or {}).items():
        if key in (CPU, GPU):
            raise ValueError(f"resources={{{key!r}: ...}}: use num_{key.lower()}s= for this one")
        if not isinstance(amount, int | float) or amount < 0:
            raise ValueError(
                f"resources={{{key!r}: {amount!r}}}: the amount should be a number of at least 0"
            )
        asked["resource:" + key] = amount
    return asked


def _start(
    name: str, asked: dict[str, float], seed: int | None, settings: configuration.Settings
) -> tuple[ClusterRecord, bool]:
    cpus = asked.get("num_cpus", platform.available_cpus(settings.cpu_limit or None, settings.cgroup_root))
    memory = platform.available_memory(settings.memory_limit or None, settings.cgroup_root)
    gpus = asked.get("num_gpus", _visible_gpus(settings.cuda_devices))
    store = int(
        asked.get("object_store_memory", settings.store_memory or max(memory * STORE_SHARE, MIN_STORE))
    )
    amounts = units({CPU: cpus, GPU: gpus, MEMORY: max(memory - store, 0)})
    amounts.update(
        units(
            {
                key.removeprefix("resource:"): value
                for key, value in asked.items()
                if key.startswith("resource:")
            }
        )
    )
    cluster = ids.content_id(f"seed {seed}".encode()) if seed is not None else os.urandom(16)
    details = {"python": sys.version.split()[0], "seed": "" if seed is None else str(seed)}
    return clusters.start_cluster(
        name, amounts, store, cluster=cluster, details=details, memory_limit=settings.memory_limit, settings=settings,
        spares=max(1, min(int(cpus), MAX_SPARES)), meanwhile=_import_the_rest,
    )  # fmt: skip


def _import_the_rest() -> None:
    """What this process needs to use a cluster, imported while the cluster starts."""
    import nbray.api.readonly
    import nbray.api.remote
    import nbray.api.verbs
    import nbray.api.world
    import nbray.engine.local
    import nbray.store.classes

    _ = nbray


def _visible_gpus(chosen: str | None) -> int:
    """GPUs that this process may use; ``chosen``: its CUDA_VISIBLE_DEVICES."""
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in {"", "-1"}])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def _compare(record: ClusterRecord, asked: dict[str, float]) -> None:
    """A cluster that runs has the size it has: say so instead of ignoring what was asked."""
    has = {
        "num_cpus": record.resources.get(CPU, 0) / UNIT,
        "num_gpus": record.resources.get(GPU, 0) / UNIT,
        "object_store_memory": record.store_limit,
    }
    for key, amount in record.resources.items():
        has["resource:" + key] = amount / UNIT
    different = [
        f"{key.removeprefix('resource:')}={value:g} (it has {has.get(key, 0):g})"
        for key, value in asked.items()
        if has.get(key, 0) != value
    ]
    if different:
        raise ValueError(
            f"the cluster {record.name!r} runs already and cannot be changed to {', '.join(different)}: stop it first (nbray.shutdown(), %cluster stop), "
            "leave these arguments out, or start another one with name="
        )


def connect(
    record: ClusterRecord,
    role: str = "",
    session: str = "",
    label: str = "",
    namespace: str = "",
    keep: bool = False,
) -> LocalEngine:
    """A connection to a cluster's node, an observer's unless ``role`` says another. Raises NodeDiedError when the node does not answer."""
    from nbray.engine.local import LocalEngine
    from nbray.messages import OBSERVER, PROTOCOL, Hello

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        sock.settimeout(HELLO_SECONDS)
        sock.connect(record.paths.node_socket)
        _, fds, _, _ = socket.recv_fds(sock, 1, 2)
        if len(fds) < 2:
            raise ConnectionError("it closed the connection")
        hello = Hello(PROTOCOL, role or OBSERVER, os.getpid(), session, 0, keep, label, namespace)
        engine = LocalEngine(sock, fds[0], hello, life=fds[1])
    except BaseException as error:
        sock.close()
        for fd in fds:
            os.close(fd)
        if not isinstance(error, OSError):
            raise
        raise NodeDiedError(
            f"the cluster {record.name!r} (pid {record.pid}) does not answer: {error}; its log: {record.paths.log}"
        ) from error
    engine.welcome.details.update(
        node_pid=str(record.pid), directory=record.paths.directory, spill=record.paths.spill, log=record.paths.log,
        failed_log=record.paths.last_log, session=session,
        store=str(record.store_limit),
    )  # fmt: skip
    return engine


def print_output(message: Output) -> None:
    """Show what a task printed, where there is no notebook: the name of the task in front of each line."""
    stream = sys.stderr if message.stream == "stderr" else sys.stdout
    name = f"({message.name or 'worker'} pid={message.pid}) "
    text = message.text
    if message.stream == "display":
        text = str(json.loads(text).get("data", {}).get("text/plain", ""))
    if message.skipped:
        stream.write(
            f"{name}... {message.skipped:,} lines are not shown; nbray.state.logs({ids.short(message.task)!r}) has them\n"
        )
    # A progress bar that writes over itself is one line.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    stream.write("".join(f"{name}{line}\n" for line in (lines if lines[-1] else lines[:-1])))
    stream.flush()


_keep = False
_registered = False
_decide: Callable[[], bool | None] | None = None


_name_session: Callable[[], str] | None = None


def name_session(name: Callable[[], str] | None) -> None:
    """``name()`` says who this process is to a cluster where ``init`` is not told: the notebook. None: a session of the process's own."""
    global _name_session
    _name_session = name


def decide_exit(stop: Callable[[], bool | None]) -> None:
    """At the end of this process ``stop()`` says whether the cluster ends with it; None: the usual rule (it does, unless ``keep``)."""
    global _decide
    _decide = stop


def _at_exit() -> None:
    runtime = context.current()
    if runtime is None or runtime.worker or runtime.pid != os.getpid():
        return
    decided = _decide() if _decide is not None else None
    if decided is False:
        # A kernel restart: leave without a goodbye, so that the session's work goes on.
        context.clear()
        engine: Any = runtime.engine
        engine.set_transient(False)
        engine.link.close()
        return
    try:
        shutdown(stop=False if _keep else None)
    except (NbrayError, OSError, RuntimeError):
        pass


def shutdown(*, stop: bool | None = None, force: bool = False) -> None:
    """Leave the cluster: what this session runs and holds ends, but for detached actors. Idempotent.

    ``stop``: None: the cluster ends too, unless somebody else uses it. False: it goes on. True: it ends; if somebody else uses it and not ``force``,
    RuntimeError says who, and this process stays connected.
    """
    runtime = context.current()
    if runtime is None or runtime.pid != os.getpid():
        return
    details = runtime.engine.details()
    try:
        ends = runtime.engine.shutdown(stop=True if force and stop is None else stop, force=force)
    except NbrayError as refused:
        if "in use" in str(refused):
            raise RuntimeError(str(refused).removeprefix("in use: ")) from None
        raise
    finally:
        if not _is_connected(runtime):
            context.clear()
            for hook in runtime.on_close:
                hook()
    if ends:
        clusters.wait_gone(_record_of(details))
    else:
        clusters.reap()


def _is_connected(runtime: context.Runtime) -> bool:
    return not getattr(runtime.engine, "closed", "closed")


def _record_of(details: Mapping[str, Any]) -> ClusterRecord:
    paths = clusters.Paths(details["directory"], details["spill"])
    return ClusterRecord(details["name"], int(details["node_pid"]), "", paths, {}, 0, 0.0, "", True, {})


def is_initialized() -> bool:
    """Whether this process is connected to a cluster."""
    runtime = context.current()
    return runtime is not None and runtime.pid == os.getpid()
