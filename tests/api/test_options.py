"""Options of tasks, actors and methods: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nbray.api import options
from nbray.messages import STREAMING


def refused(error: type[Exception], table: Any = options.TASK, **given: Any) -> str:
    with pytest.raises(error) as caught:
        options.check(table, given, "function f")
    return str(caught.value)


def test_values_are_kept_and_none_means_default() -> None:
    given = {"num_cpus": 0.5, "max_retries": -1, "name": "x", "num_gpus": None, "resources": {"TPU": 1}}
    checked = options.check(options.TASK, given, "function f")
    assert checked == {"num_cpus": 0.5, "max_retries": -1, "name": "x", "resources": {"TPU": 1}}


def test_misspelt_name_gets_the_nearest() -> None:
    text = refused(ValueError, num_cpu=1)
    assert "function f" in text
    assert "'num_cpu'" in text
    assert "Did you mean 'num_cpus'?" in text
    assert "max_retries" in text


def test_option_of_another_kind_is_named_as_such() -> None:
    assert "option of actors" in refused(ValueError, max_restarts=1)
    assert "option of tasks" in refused(ValueError, options.ACTOR, max_retries=1)


def test_options_that_only_ray_has() -> None:
    assert "does not have Ray's option 'accelerator_type'" in refused(ValueError, accelerator_type="T4")


@pytest.mark.parametrize("value", ["2", [1], True, None.__class__])
def test_amounts_of_wrong_type(value: object) -> None:
    text = refused(TypeError, num_cpus=value)
    assert repr(value) in text
    assert type(value).__name__ in text


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 0.00001, 1 / 3])
def test_amounts_that_cannot_be(value: float) -> None:
    assert "steps of 0.0001" in refused(ValueError, num_cpus=value)


@pytest.mark.parametrize("value", [0, 0.1, 0.1 + 0.2, 0.0001, 12.5, 1000, np.float64(0.5), np.int64(2)])
def test_amounts_that_can_be(value: float) -> None:
    checked = options.check(options.TASK, {"num_cpus": value}, "function f")
    assert options.resource_units(checked, 1).get("CPU", 0) == round(float(value) * 10_000)


def test_fractions_of_several_gpus_are_refused() -> None:
    assert "whole number of GPUs" in refused(ValueError, num_gpus=1.5)
    assert options.check(options.TASK, {"num_gpus": 0.25}, "f") == {"num_gpus": 0.25}


@pytest.mark.parametrize(
    ("name", "option"), [("CPU", "num_cpus"), ("GPU", "num_gpus"), ("cpu", "num_cpus"), ("memory", "memory")]
)
def test_resources_with_an_option_of_their_own(name: str, option: str) -> None:
    assert f"{option}=1" in refused(ValueError, resources={name: 1})


def test_units_are_sorted_and_without_zeros() -> None:
    checked = options.check(
        options.TASK, {"resources": {"Z": 1, "A": 0.5, "B": 0}, "num_cpus": 0, "memory": 100}, "f"
    )
    units = options.resource_units(checked, 1)
    assert list(units.items()) == [("A", 5_000), ("Z", 10_000), ("memory", 1_000_000)]
    assert options.resource_units({}, 1) == {"CPU": 10_000}


def test_giving_an_amount_of_zero_is_giving_one() -> None:
    assert options.gives_resources({"num_cpus": 0})
    assert not options.gives_resources({"name": "x"})


@pytest.mark.parametrize("name", ["max_retries", "max_calls", "priority", "num_returns"])
def test_whole_numbers(name: str) -> None:
    refused(TypeError, **{name: 1.5})
    refused(TypeError, **{name: True})
    refused(ValueError, **{name: 2**40})


def test_bounds_of_whole_numbers() -> None:
    assert "-1 for no limit" in refused(ValueError, max_retries=-2)
    refused(ValueError, max_calls=-1)
    refused(ValueError, num_returns=-1)
    assert options.check(options.TASK, {"priority": -5}, "f") == {"priority": -5}


def test_retry_exceptions() -> None:
    assert options.check(options.TASK, {"retry_exceptions": [ValueError]}, "f")["retry_exceptions"] == (
        ValueError,
    )
    assert "int" in refused(TypeError, retry_exceptions=[int])
    refused(TypeError, retry_exceptions=ValueError)


def test_num_returns_of_generators() -> None:
    assert options.returns({}, True, "f") == STREAMING
    assert options.returns({}, False, "f") == 1
    assert options.returns({"num_returns": 3}, True, "f") == 3
    with pytest.raises(ValueError, match="generator function"):
        options.returns({"num_returns": "streaming"}, False, "function f")
    assert '"streaming"' in refused(ValueError, num_returns="dynamic")


def test_some_options_are_for_the_decorator_only() -> None:
    groups = {"concurrency_groups": {"io": 1}}
    assert options.check(options.ACTOR, groups, "class C", decorator=True) == groups
    with pytest.raises(ValueError, match="decorator only"):
        options.check(options.ACTOR, groups, "class C")


def test_lifetime_and_strategy() -> None:
    assert "detached" in refused(ValueError, options.ACTOR, lifetime="forever")
    assert "SPREAD" in refused(ValueError, scheduling_strategy="PACK")


# -- runtime_env


def environment(**content: Any) -> Any:
    checked = options.check(options.TASK, {"runtime_env": content}, "function f")["runtime_env"]
    assert isinstance(checked, options.Environment)
    return msgspec.msgpack.decode(checked.blob)


def test_environment_is_named_by_content(tmp_path: Path) -> None:
    first = options.environment("runtime_env", {"env_vars": {"B": "2", "A": "1"}})
    second = options.environment("runtime_env", {"env_vars": {"A": "1", "B": "2"}, "py_modules": []})
    other = options.environment("runtime_env", {"env_vars": {"A": "1"}})
    assert first == second
    assert first != other
    assert options.environment("runtime_env", {}) is None


def test_environment_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "mod.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    content = environment(working_dir="sub", py_modules=["mod.py", tmp_path])
    assert content["working_dir"] == str(tmp_path / "sub")
    assert content["py_modules"] == [str(tmp_path / "mod.py"), str(tmp_path)]


def test_environment_takes_imported_modules(tmp_path: Path) -> None:
    assert environment(py_modules=[msgspec])["py_modules"] == [str(Path(msgspec.__file__).parent)]
    assert "loaded from a file" in refused(ValueError, runtime_env={"py_modules": [types.ModuleType("made")]})


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"pip": ["numpy"]}, ValueError, "there is no key 'pip'"),
        ({"env_var": {}}, ValueError, "Did you mean 'env_vars'"),
        ({"env_vars": ["A"]}, TypeError, "dict of strings"),
        ({"env_vars": {"A": 1}}, TypeError, "['A'] (str: int)"),
        ({"working_dir": "/nowhere/at/all"}, ValueError, "there is no /nowhere/at/all"),
        ({"working_dir": "s3://bucket/x"}, ValueError, "local directory"),
        ({"working_dir": 3}, TypeError, "path of a directory"),
        ({"py_modules": "x"}, TypeError, "list of paths"),
        ("env", TypeError, "expected a dict"),
    ],
)
def test_environments_that_are_refused(content: Any, error: type[Exception], words: str) -> None:
    assert words in refused(error, runtime_env=content)


def test_values_of_variables_stay_out_of_messages() -> None:
    text = refused(TypeError, runtime_env={"env_vars": {"TOKEN": b"secret"}})
    assert "TOKEN" in text
    assert "secret" not in text
