"""What the cluster does and did, as Arrow tables.

``nbray.state.tasks().to_pandas()`` gives a data frame. Ids are hexadecimal text, times seconds (moments: of the host's monotonic clock), what has not
happened is null. Nothing is collected for these tables until somebody asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from nbray.api.refs import ObjectRef

__all__ = [
    "actors",
    "logs",
    "nodes",
    "objects",
    "summary",
    "tasks",
    "where",
    "where_time_went",
    "why",
    "workers",
]


def tasks(
    *,
    limit: int | None = 10_000,
    name: str = "",
    state: str = "",
    session: str = "",
    job: int = 0,
    cell: str = "",
) -> pa.Table:
    """Tasks and actor calls, one row per attempt: the newest ``limit`` that have ended (None: all), then up to as many that have not.

    The other arguments choose those that have this value. Columns: task_id name state node_id pid attempt; seconds in each phase:
    waiting_for_inputs queued starting running sealing; kind error job session cell parent_id actor_id input_ids returns size_bytes; moments:
    submitted inputs_ready dispatched started finished sealed. States: WAITING (for inputs) QUEUED (for resources) DISPATCHED RUNNING FINISHED FAILED
    CANCELLED RETRIED. Raises ValueError for a state that does not exist or a negative limit.
    """
    from nbray.state import views

    _check(limit, state)
    chosen = {"name": name, "state": state, "session": session, "job": job, "cell": cell}
    return _table("tasks", views.tasks(_ask, chosen, limit))


def objects() -> pa.Table:
    """The objects that exist. Columns: object_id size_bytes state node_ids holders."""
    from nbray.state import views

    return _table("objects", views.objects(_ask))


def actors(*, limit: int | None = 10_000) -> pa.Table:
    """Actors, dead ones too. Columns: actor_id class_name name state node_id pid restarts namespace job reason.

    States: PENDING ALIVE RESTARTING DEAD. ``limit``: how many of the newest changes of state to look through.
    """
    from nbray.state import views

    _check(limit)
    return _table("actors", views.actors(_ask, limit))


def workers(*, limit: int | None = 10_000) -> pa.Table:
    """Worker processes, ended ones too. Columns: pid state task session kind node_id memory_bytes reason.

    States: STARTING IDLE RUNNING BLOCKED ENDED.
    """
    from nbray.state import views

    _check(limit)
    return _table("workers", views.workers(_ask, limit))


def nodes() -> pa.Table:
    """The nodes. Columns: node_id state resources available pid socket."""
    from nbray.state import views

    return _table("nodes", views.nodes(_ask))


def where() -> pa.Table:
    """Where the code of running tasks is: asks their processes, 1 s at most. Columns: task_id name cell pid seconds blocked file line function.

    One row per task, of the innermost frame of the user's code; file, line and function are null where a process has not answered.
    """
    from nbray.state.explaining import places

    rows = places(_ask)
    last = [row.frames[-1] if row.frames else (None, None, None) for row in rows]
    columns: dict[str, list[Any]] = {
        "task_id": [row.task.hex() for row in rows],
        "name": [row.name for row in rows],
        "cell": [row.cell for row in rows],
        "pid": [row.pid for row in rows],
        "seconds": [row.seconds for row in rows],
        "blocked": [row.blocked for row in rows],
        "file": [file for file, _, _ in last],
        "line": [line for _, line, _ in last],
        "function": [function for _, _, function in last],
    }
    return _table("places", columns)


def why(ref: ObjectRef[Any]) -> str:
    """Why a value is not there yet, took long, or is still in memory: what its task waits for, where its time went, who holds it."""
    import time

    import msgspec

    from nbray.api.context import require
    from nbray.events import FINISHED, ObjectRow, Page
    from nbray.state import views
    from nbray.state.explaining import Explainer

    ask = require().engine.query
    events = {event.task: event for _, event in views.task_events(ask, {}, 10_000)}
    page = msgspec.convert(ask("objects", None), Page)
    rows = [row for _, rows in page.live for row in msgspec.convert(rows, list[ObjectRow])]
    row = next((row for row in rows if row.object == ref.binary()), None)
    explain = Explainer(ask, events.values(), time.monotonic())
    lines = explain.object(row, ref.binary(), row.holders if row is not None else ())
    maker = events.get(ref.task_id())
    if (
        row is not None
        and row.state not in ("PENDING", "ERROR")
        and maker is not None
        and maker.state >= FINISHED
    ):
        lines += explain.task(maker)
    return "\n".join(lines)


def summary() -> pa.Table:
    """How many tasks of each name are in each state. Columns: name state tasks."""
    from nbray.state import views

    return _table("summary", views.counts(_ask))


def logs(which: str = "", *, tail: int | None = None) -> pa.Table:
    """What tasks have printed, one row per line, all of it, however much of it was shown where it was printed.

    ``which``: a cell (``In[7]``), a task's id (as `tasks` has it, or the short form that notebooks show; its start will do), or "" for everything.
    ``tail``: the last so many lines only. Columns: time (seconds of the wall clock) task_id name pid stream cell text; within a task in order.
    Raises ValueError for another ``which``, or a negative ``tail``.
    """
    from nbray import logs as files
    from nbray.api.context import require
    from nbray.state.lines import lines, wanted

    if tail is not None and tail < 1:
        raise ValueError(f"tail={tail!r}: pass a number of lines, 1 or more, or None for all")
    chosen = wanted(which)
    found = lines(files.read(require().engine.details()["logs"], chosen))
    found = found if tail is None else found[-tail:]
    return _table(
        "logs",
        {
            "time": [line.time for line in found],
            "task_id": [line.task.hex() or None for line in found],
            "name": [line.name or None for line in found],
            "pid": [line.pid for line in found],
            "stream": [line.stream for line in found],
            "cell": [line.cell or None for line in found],
            "text": [line.text for line in found],
        },
    )


def where_time_went() -> pa.Table:
    """Where the tasks that have ended spent their time, per name, the costliest first.

    Columns: name, numbers of attempts: tasks finished failed cancelled retried, and seconds, added up over them: waiting_for_inputs, queued (for a
    CPU), starting (from the node to the user's first line), running, sealing (of results), total.
    """
    from nbray.state import views

    return _table("phases", views.phases(_ask))


def _ask(what: str, argument: Any) -> Any:
    from nbray.api.context import require

    return require().engine.query(what, argument)


def _check(limit: int | None, state: str = "") -> None:
    from nbray.events import TASK_STATES

    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: pass a number of rows, 1 or more, or None for all")
    if state and state not in TASK_STATES:
        from difflib import get_close_matches

        near = get_close_matches(state.upper(), TASK_STATES, 1, 0.0)[0]
        raise ValueError(
            f"there is no task state {state!r}: did you mean {near!r}? There are {', '.join(TASK_STATES)}"
        )


def _table(kind: str, columns: dict[str, list[Any]]) -> pa.Table:
    import pyarrow as pa

    special: dict[str, pa.DataType] = {
        "blocked": pa.bool_(),
        "node_ids": pa.list_(pa.string()),
        "holders": pa.list_(pa.string()),
        "input_ids": pa.list_(pa.string()),
        "resources": pa.map_(pa.string(), pa.float64()),
        "available": pa.map_(pa.string(), pa.float64()),
    }
    # Given, not inferred: a table without rows has the same types as one with many.
    integers = {
        "pid",
        "attempt",
        "job",
        "returns",
        "size_bytes",
        "restarts",
        "memory_bytes",
        "tasks",
        "line",
        "finished",
        "failed",
        "cancelled",
        "retried",
    }
    floats = {"waiting_for_inputs", "queued", "starting", "running", "sealing", "total"}
    floats |= {"submitted", "inputs_ready", "dispatched", "started", "sealed", "seconds"}
    if kind == "logs":
        floats.add("time")
    if kind == "tasks":
        integers.remove("finished")
        floats.add("finished")
    types = {name: pa.int64() for name in integers} | {name: pa.float64() for name in floats} | special
    return pa.table(
        {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    )
