"""Exceptions on their way from a worker to ``get``: class, arguments, attributes, traceback, pickling, and what cannot be kept."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import traceback
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nbray import errors, exceptions
from nbray.api import failures
from nbray.api.failures import allows_retry, describe_failure, user_traceback
from nbray.errors import ActorDiedError, TaskError
from nbray.failure_codec import decode_error, encode_system_error, read, summary


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travel(error: BaseException, **more: Any) -> Any:
    """The exception as ``get`` raises it."""
    return decode_error(describe_failure(raised(error), task="f", node="n1", pid=42, **more))


class Custom(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.code = code

    @property
    def doubled(self) -> int:
        return self.code * 2


class Slotted(Exception):
    __slots__ = ("extra",)
    extra: int


class Reduced(Exception):
    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return Reduced, (self.value + 1,)


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Strange(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_instance_of_both_classes() -> None:
    error = travel(ValueError("boom", 3))
    assert isinstance(error, ValueError)
    assert isinstance(error, TaskError)
    assert type(error).__name__ == "TaskError(ValueError)"
    assert error.args == ("boom", 3)
    assert type(error.cause) is ValueError
    assert (error.task, error.node, error.pid) == ("f", "n1", 42)


def test_text_names_task_node_and_pid_and_ends_with_the_error() -> None:
    text = str(travel(ValueError("boom")))
    assert text.splitlines()[0] == "task f (pid 42, node n1)"
    assert text.splitlines()[1] == "Traceback (most recent call last):"
    assert text.endswith("ValueError: boom")
    assert "attempt 3" in str(travel(ValueError("boom"), attempt=2))


def test_constructor_is_not_called_again() -> None:
    error = travel(Custom(7, "bad"))
    assert isinstance(error, Custom)
    assert error.code == 7
    assert error.doubled == 14
    assert error.args == ("bad (7)",)


def test_attributes_outside_of_the_dict() -> None:
    missing = travel(FileNotFoundError(2, "No such file", "/x"))
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "/x")
    code = travel(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"))
    assert (code.encoding, code.object, code.reason) == ("utf-8", b"\xff", "bad byte")
    with_slot = Slotted("x")
    with_slot.extra = 5
    assert travel(with_slot).extra == 5
    assert travel(urllib.error.HTTPError("http://x", 404, "gone", None, None)).code == 404  # type: ignore[arg-type]


def test_key_error_keeps_its_key() -> None:
    error = travel(KeyError("x"))
    assert error.args == ("x",)
    assert str(error).endswith("KeyError: 'x'")


def test_own_reduce_is_respected() -> None:
    error = travel(Reduced(1))
    assert isinstance(error, Reduced)
    assert error.value == 2


def test_notes_are_kept() -> None:
    noted = ValueError("boom")
    noted.add_note("try this")
    error = travel(noted)
    assert error.__notes__ == ["try this"]
    assert "try this" in str(error)


@pytest.mark.parametrize("cause", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)])
def test_what_would_end_the_caller_is_plain(cause: BaseException) -> None:
    error = travel(cause)
    assert type(error).__name__ == "TaskError"
    assert not isinstance(error, type(cause))
    assert isinstance(error, TaskError)
    assert type(error.cause) is type(cause)
    assert type(cause).__name__ in str(error)


def test_class_that_cannot_be_subclassed_is_plain() -> None:
    error = travel(Final("x"))
    assert not isinstance(error, Final)
    assert isinstance(error.cause, Final)
    assert error.args == ("x",)


def test_unpicklable_arguments_become_text() -> None:
    error = travel(ValueError("bad", threading.Lock()))
    assert isinstance(error, ValueError)
    assert error.args[0] == "bad"
    assert "lock" in error.args[1]


def test_unpicklable_attribute_is_left_out() -> None:
    broken = ValueError("bad")
    broken.guard = threading.Lock()  # type: ignore[attr-defined]
    broken.kept = 1  # type: ignore[attr-defined]
    error = travel(broken)
    assert isinstance(error, ValueError)
    assert error.kept == 1  # type: ignore[attr-defined]
    assert not hasattr(error, "guard")


def test_huge_exception_travels_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "CAUSE_LIMIT", 1000)
    error = travel(ValueError(b"x" * 10_000))
    assert type(error).__name__ == "TaskError"
    assert "could not be brought here" in str(error)
    assert "ValueError" in str(error)


def test_class_that_is_missing_here_travels_as_text() -> None:
    payload = describe_failure(raised(Custom(1, "x")), task="f", node="n", pid=1)
    error = decode_error(payload.replace(b"Custom", b"Cvstom"))
    assert type(error).__name__ == "TaskError"
    assert "could not be brought here" in str(error)


def test_broken_str() -> None:
    error = travel(Strange())
    assert isinstance(error, Strange)
    assert "Strange" in str(error)


def test_group_can_be_split() -> None:
    group = ExceptionGroup("several", [ValueError("a"), KeyError("b")])
    error = travel(group)
    assert isinstance(error, ExceptionGroup)
    values, rest = error.split(ValueError)
    assert values is not None
    assert rest is not None
    assert [type(each) for each in values.exceptions] == [ValueError]
    assert [type(each) for each in rest.exceptions] == [KeyError]
    with pytest.raises(ExceptionGroup) as caught:
        try:
            raise error
        except* ValueError:
            pass
    assert [type(each) for each in caught.value.exceptions] == [KeyError]


def test_fresh_object_each_time_without_a_chain() -> None:
    payload = describe_failure(raised(ValueError("boom")), task="f", node="n", pid=1)
    first, second = decode_error(payload), decode_error(payload)
    assert first is not second
    assert type(first) is type(second)
    assert first.__traceback__ is None
    assert first.__cause__ is None
    assert first.__suppress_context__


def test_pickles_and_copies() -> None:
    error = travel(Custom(7, "bad"))
    error.add_note("seen")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert other.code == 7
        assert str(other) == str(error)
        assert other.__notes__ == ["seen"]


def test_error_of_an_inner_task_keeps_its_class_and_shows_both_tracebacks() -> None:
    inner = travel(ValueError("boom"))
    outer = travel(inner)
    assert type(outer).__name__ == "TaskError(ValueError)"
    assert type(outer.cause) is ValueError
    assert str(outer).count("Traceback (most recent call last)") == 2
    assert str(outer).endswith("ValueError: boom")


def test_system_error_inside_of_a_task() -> None:
    error = travel(errors.GetTimeoutError("too late"))
    assert isinstance(error, TaskError)
    assert isinstance(error, TimeoutError)


def test_constructor_of_an_actor() -> None:
    error = travel(ValueError("boom"), actor="Counter")
    assert isinstance(error, ActorDiedError)
    assert isinstance(error, ValueError)
    assert type(error).__name__ == "ActorDiedError(ValueError)"
    assert str(error).splitlines()[0] == "the constructor of actor Counter raised (pid 42, node n1)"


def test_attributes_of_other_classes_pass_through() -> None:
    class Lazy(Exception):
        def __getattr__(self, name: str) -> str:
            if name.startswith("lazy_"):
                return name
            raise AttributeError(name)

    error = travel(Lazy("x"))
    assert error.lazy_one == "lazy_one"
    with pytest.raises(AttributeError):
        _ = error.other


# -- tracebacks


def failing(depth: int) -> None:
    if depth:
        failing(depth - 1)
    raise ValueError("deep")


def test_only_the_users_frames_remain() -> None:
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(asyncio.run, in_coroutine()).exception()
    assert error is not None
    text = user_traceback(error)
    names = [line.split(" in ")[1] for line in text.splitlines() if line.startswith("  File")]
    assert names == ["in_coroutine", "failing", "failing"]
    assert "failing(depth - 1)" in text


async def in_coroutine() -> None:
    failing(1)


def test_frames_of_nbray_are_left_out() -> None:
    try:
        failures._make(None, (), {}, {})  # type: ignore[arg-type]
    except AttributeError as caught:
        text = user_traceback(caught)
    assert "test_frames_of_nbray_are_left_out" in text
    assert "failures.py" not in text.replace("test_failures.py", "")


def test_libraries_below_the_users_code_stay() -> None:
    import json

    try:
        json.loads("{")
    except ValueError as caught:
        text = user_traceback(caught)
    assert "raw_decode" in text


def test_chains_stay() -> None:
    try:
        try:
            failing(0)
        except ValueError as first:
            raise KeyError("second") from first
    except KeyError as caught:
        text = user_traceback(caught)
    assert "direct cause" in text
    assert text.index("ValueError: deep") < text.index("KeyError: 'second'")


def test_without_frames_there_is_no_header() -> None:
    assert user_traceback(ValueError("bare")) == "ValueError: bare"


def test_endless_recursion_is_short() -> None:
    def endless() -> None:
        endless()

    try:
        endless()
    except RecursionError as caught:
        text = user_traceback(caught)
    assert "Previous line repeated" in text
    assert len(text) < 3000


def test_printed_by_python() -> None:
    error = travel(ValueError("boom"))
    printed = "".join(traceback.format_exception(error))
    assert printed.startswith("nbray.exceptions.TaskError(ValueError): task f (pid 42, node n1)")
    assert printed.count("ValueError: boom") == 1


# -- retries


def test_allows_retry() -> None:
    assert not allows_retry(ValueError(), None)
    assert not allows_retry(ValueError(), False)
    assert allows_retry(ValueError(), True)
    assert not allows_retry(SystemExit(), True)
    assert allows_retry(FileNotFoundError(), (OSError, KeyError))
    assert not allows_retry(ValueError(), (OSError,))


# -- errors of nbray itself


def test_system_errors() -> None:
    error = decode_error(encode_system_error("WorkerCrashedError", "worker 7 was killed", {"pid": 7}))
    assert type(error) is errors.WorkerCrashedError
    assert str(error) == "worker 7 was killed"
    assert error.pid == 7  # type: ignore[attr-defined]


def test_built_in_and_unknown_names() -> None:
    assert type(decode_error(encode_system_error("ValueError", "x"))) is ValueError
    unknown = decode_error(encode_system_error("SomethingNew", "x"))
    assert type(unknown) is errors.NbrayError
    assert "SomethingNew" in str(unknown)
    assert type(decode_error(encode_system_error("KeyboardInterrupt", "x"))) is errors.NbrayError


def test_summaries_need_no_unpickling() -> None:
    payload = describe_failure(raised(Custom(1, "first\nsecond")), task="f", node="n", pid=1)
    assert summary(payload.replace(b"Custom", b"Cvstom")) == ("Cvstom", "first")
    assert summary(encode_system_error("StoreFullError", "full\nmore")) == ("StoreFullError", "full")
    assert read(payload).name == "Custom"


def test_names_of_ray() -> None:
    assert exceptions.RayTaskError is TaskError
    assert exceptions.RayActorError is errors.ActorError
    assert sorted(exceptions.__all__) == exceptions.__all__
    for name in exceptions.__all__:
        assert issubclass(getattr(exceptions, name), errors.NbrayError)
    mine = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.NbrayError)
    }
    assert mine <= set(exceptions.__all__)
