"""Remote functions on a real cluster."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import nbray
from nbray.errors import (
    SerializationError,
    TaskError,
    UnschedulableError,
    WorkerCrashedError,
)


@nbray.remote
def add(x: int, y: int = 1) -> int:
    """Add two numbers."""
    return x + y


@nbray.remote
def identity(value: Any) -> Any:
    return value


@nbray.remote
def fail(text: str) -> None:
    raise ValueError(text)


# -- the decorator


def test_decorated_functions_keep_their_looks() -> None:
    assert add.__name__ == "add"
    assert add.__doc__ == "Add two numbers."
    assert add.__wrapped__(2) == 3
    assert str(inspect.signature(add)) == "(x: 'int', y: 'int' = 1) -> 'int'"
    assert "add" in repr(add)


def test_direct_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"add\.remote\(\.\.\.\)"):
        add(1)


def test_decorator_needs_names() -> None:
    with pytest.raises(TypeError, match="bare"):
        nbray.remote()
    with pytest.raises(TypeError, match="given by name"):
        nbray.remote(add.__wrapped__, num_cpus=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not 3"):
        nbray.remote(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="remote already"):
        nbray.remote(add)


def test_async_function_is_refused() -> None:
    async def work() -> None:
        pass

    with pytest.raises(ValueError, match="async def"):
        nbray.remote(work)


def test_wrong_options_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="num_cpus"):
        nbray.remote(num_cpu=1)(add.__wrapped__)
    with pytest.raises(ValueError, match="function add"):
        add.options(max_retries=-5)
    with pytest.raises(ValueError, match="generator function"):
        add.options(num_returns="streaming")


def test_options_are_remembered() -> None:
    assert add.options(num_cpus=2) is add.options(num_cpus=2)
    assert add.options(num_cpus=2) is not add.options(num_cpus=True + 2)
    assert add.options(resources={"A": 1})._spec.resources == {"A": 10_000, "CPU": 10_000}


def test_wrong_arguments_are_refused_at_once(shared_cluster: Any) -> None:
    for wrong in (lambda: add.remote(), lambda: add.remote(1, 2, 3), lambda: add.remote(1, z=2)):
        with pytest.raises(TypeError, match=r"add\.remote\(\): .*signature is add\(x"):
            wrong()
    with pytest.raises(TypeError, match="multiple values"):
        add.remote(1, x=2)


# -- calls


def test_calls(shared_cluster: Any) -> None:
    assert nbray.get(add.remote(1)) == 2
    assert nbray.get(add.remote(1, 2)) == 3
    assert nbray.get(add.remote(x=5, y=6)) == 11
    assert nbray.get([add.remote(i) for i in range(50)]) == list(range(1, 51))


def test_callables_of_all_kinds(shared_cluster: Any) -> None:
    assert nbray.get(nbray.remote(functools.partial(add.__wrapped__, y=10)).remote(1)) == 11
    absolute: Any = nbray.remote(abs)
    assert nbray.get(absolute.remote(-3)) == 3
    assert nbray.get(nbray.remote(lambda x: x * 2).remote(4)) == 8

    class Adder:
        def __init__(self, n: int) -> None:
            self.n = n

        def __call__(self, x: int) -> int:
            return x + self.n

        def method(self, x: int) -> int:
            return x - self.n

    assert nbray.get(nbray.remote(Adder(3)).remote(1)) == 4
    assert nbray.get(nbray.remote(Adder(3).method).remote(1)) == -2


def test_refs_as_arguments(shared_cluster: Any) -> None:
    three = add.remote(1, 2)
    assert nbray.get(add.remote(three, y=three)) == 6
    kept = nbray.get(identity.remote([three]))
    assert isinstance(kept[0], nbray.ObjectRef)
    assert nbray.get(kept[0]) == 3


def test_runs_elsewhere_in_the_same_place(shared_cluster: Any) -> None:
    pid, folder = nbray.get(nbray.remote(lambda: (os.getpid(), os.getcwd())).remote())
    assert pid != os.getpid()
    assert folder == os.getcwd()


def test_num_returns(shared_cluster: Any) -> None:
    @nbray.remote(num_returns=2)
    def pair() -> tuple[int, int]:
        return 1, 2

    first, second = pair.remote()
    assert nbray.get([second, first]) == [2, 1]
    assert pair.options(num_returns=0).remote() is None
    assert nbray.get(pair.options(num_returns=1).remote()) == (1, 2)
    with pytest.raises(ValueError, match=r"num_returns=3.*returned 2"):
        nbray.get(pair.options(num_returns=3).remote())


def test_generator(shared_cluster: Any) -> None:
    @nbray.remote
    def count(n: int) -> Any:
        for i in range(n):
            if i == 3:
                raise KeyError(i)
            yield i

    stream = count.remote(2)
    assert isinstance(stream, nbray.ObjectRefGenerator)
    assert [nbray.get(ref) for ref in stream] == [0, 1]
    with pytest.raises(StopIteration):
        next(stream)
    refs = list(count.remote(5))
    assert [nbray.get(ref) for ref in refs[:3]] == [0, 1, 2]
    assert len(refs) == 4
    with pytest.raises(KeyError):
        nbray.get(refs[3])
    assert nbray.get(count.options(num_returns=2).remote(2)) == [0, 1]


def test_nested_tasks(shared_cluster: Any) -> None:
    @nbray.remote
    def fibonacci(n: int) -> int:
        if n < 2:
            return n
        return sum(nbray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert nbray.get(fibonacci.remote(6)) == 8


def test_task_returns_a_ref(shared_cluster: Any) -> None:
    @nbray.remote
    def outer() -> Any:
        return add.remote(1, 1)

    inner = nbray.get(outer.remote())
    assert isinstance(inner, nbray.ObjectRef)
    assert nbray.get(inner) == 2


def test_remote_functions_can_be_arguments(shared_cluster: Any) -> None:
    @nbray.remote
    def call(function: Any, x: int) -> Any:
        return nbray.get(function.remote(x))

    assert nbray.get(call.remote(add.options(name="other"), 4)) == 5


def test_name_and_context(shared_cluster: Any) -> None:
    @nbray.remote(name="given")
    def where() -> tuple[Any, ...]:
        found = nbray.get_runtime_context()
        return (
            found.get_task_name(),
            found.get_actor_id(),
            found.get_node_id(),
            len(found.get_task_id() or ""),
        )

    name, actor, node, length = nbray.get(where.remote())
    assert (name, actor, length) == ("given", None, 32)
    assert node == nbray.get_runtime_context().get_node_id()
    assert nbray.get_runtime_context().get_task_id() is None


# -- what goes wrong


def test_own_exception_class(shared_cluster: Any) -> None:
    class Mine(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a}+{b}")
            self.total = a + b

    @nbray.remote
    def work() -> None:
        raise Mine(1, 2)

    with pytest.raises(Mine) as caught:
        nbray.get(work.remote())
    assert caught.value.total == 3
    assert isinstance(caught.value, TaskError)


def test_repeated_gets_do_not_grow_tracebacks(shared_cluster: Any) -> None:
    ref = fail.remote("boom")
    depths = []
    for _ in range(3):
        with pytest.raises(ValueError, match="boom") as caught:
            nbray.get(ref)
        depths.append(len(caught.traceback))
        assert caught.value.__context__ is None
    assert depths == [2, 2, 2]


def test_dependents_fail_with_the_cause(shared_cluster: Any) -> None:
    with pytest.raises(ValueError, match="task fail"):
        nbray.get(add.remote(fail.remote("first")))


def test_error_through_a_nested_get(shared_cluster: Any) -> None:
    @nbray.remote
    def outer() -> None:
        nbray.get(fail.remote("inner"))

    with pytest.raises(ValueError, match="inner") as caught:
        nbray.get(outer.remote())
    assert type(caught.value.cause) is ValueError  # type: ignore[attr-defined]
    text = str(caught.value)
    assert "verbs.py" not in text
    assert "nbray.get(fail.remote" in text


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_would_end_a_process_ends_the_task_only(shared_cluster: Any, kind: type[BaseException]) -> None:
    @nbray.remote(max_retries=0)
    def leave() -> None:
        raise kind("bye")

    with pytest.raises(TaskError, match=kind.__name__):
        nbray.get(leave.remote())
    assert nbray.get(add.remote(1)) == 2


def test_unpicklable_result(shared_cluster: Any) -> None:
    @nbray.remote
    def lazy() -> Any:
        return (i for i in range(3))

    with pytest.raises(SerializationError, match="return value of lazy"):
        nbray.get(lazy.remote())


def test_unpicklable_argument_is_named(shared_cluster: Any) -> None:
    with pytest.raises(SerializationError, match=r"argument 1 \('value'\) of identity.*generator"):
        identity.remote(i for i in range(3))
    with pytest.raises(SerializationError, match=r"argument 'value' of identity.*lock"):
        identity.remote(value=threading.Lock())


def test_retries_of_exceptions(shared_cluster: Any, tmp_path: Path) -> None:
    marks = tmp_path / "marks"

    @nbray.remote(max_retries=2, retry_exceptions=[OSError])
    def flaky(times: int, kind: type[Exception]) -> int:
        with marks.open("a") as file:
            file.write("x")
        tried = len(marks.read_text())
        if tried <= times:
            raise kind("not yet")
        return tried

    assert nbray.get(flaky.remote(2, FileNotFoundError)) == 3
    marks.unlink()
    with pytest.raises(OSError, match="not yet"):
        nbray.get(flaky.remote(9, OSError))
    assert len(marks.read_text()) == 3
    marks.unlink()
    with pytest.raises(KeyError):
        nbray.get(flaky.remote(1, KeyError))
    marks.unlink()
    assert nbray.get(flaky.options(retry_exceptions=True).remote(1, KeyError)) == 2
    marks.unlink()
    with pytest.raises(OSError, match="not yet"):
        nbray.get(flaky.options(retry_exceptions=False).remote(1, OSError))


def test_killed_worker(shared_cluster: Any, tmp_path: Path) -> None:
    marks = tmp_path / "marks"

    @nbray.remote(max_retries=1)
    def dies(times: int) -> str:
        with marks.open("a") as file:
            file.write("x")
        if len(marks.read_text()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    assert nbray.get(dies.remote(1)) == "alive"
    marks.unlink()
    with pytest.raises(WorkerCrashedError, match="dies"):
        nbray.get(dies.remote(5))
    assert len(marks.read_text()) == 2


def test_impossible_resources(shared_cluster: Any) -> None:
    with pytest.raises(UnschedulableError, match="1000 CPU"):
        nbray.get(add.options(num_cpus=1000).remote(1))
    with pytest.raises(UnschedulableError, match="TPU"):
        nbray.get(add.options(resources={"TPU": 1}).remote(1))


def test_fractions_of_cpus_run_side_by_side(shared_cluster: Any) -> None:
    @nbray.remote(num_cpus=0.25)
    def meet(folder: str, me: int, others: int) -> int:
        (Path(folder) / str(me)).touch()
        deadline = time.monotonic() + 30
        while len(os.listdir(folder)) < others:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return me

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert nbray.get([meet.remote(folder, i, 8) for i in range(8)]) == list(range(8))


def test_environment_variables_of_a_task(shared_cluster: Any) -> None:
    @nbray.remote(runtime_env={"env_vars": {"NBRAY_TEST_VALUE": "given"}})
    def read() -> str | None:
        return os.environ.get("NBRAY_TEST_VALUE")

    @nbray.remote
    def plain() -> str | None:
        return os.environ.get("NBRAY_TEST_VALUE")

    assert nbray.get([read.remote(), plain.remote(), read.remote()]) == ["given", None, "given"]


def test_modules_of_a_task(shared_cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "nbray_test_module_x.py").write_text("value = 7\n")

    @nbray.remote(runtime_env={"py_modules": [str(tmp_path)], "working_dir": str(tmp_path)})
    def read() -> tuple[int, str]:
        import nbray_test_module_x  # type: ignore[import-not-found]

        return nbray_test_module_x.value, os.getcwd()

    assert nbray.get(read.remote()) == (7, str(tmp_path))


def test_max_calls(shared_cluster: Any) -> None:
    @nbray.remote(max_calls=1)
    def pid() -> int:
        return os.getpid()

    assert len({nbray.get(pid.remote()) for _ in range(3)}) == 3
