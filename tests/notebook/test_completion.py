"""Completion of the magics' lines: as a function, and as a kernel answers to a front end."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nbray.notebook import commands, completion
from nbray.notebook.commands import overview
from tests.notebook.kernels import LIMIT, Kernel


def cockpit(**names: Any) -> Any:
    return SimpleNamespace(shell=SimpleNamespace(user_ns=names, user_ns_hidden={"exit": 1}))


def found(line: str, cell: str = "", **names: Any) -> list[str]:
    answer = completion.complete(cockpit(**names), cell or line, line)
    assert answer is not None
    return answer[1]


@pytest.mark.parametrize(
    "line", ["x = 1", "cluster", "%cluster", "print('%cluster ')", "%%time", "%remote f(x"]
)
def test_other_lines_are_left_alone(line: str) -> None:
    assert completion.complete(cockpit(), line, line) is None


def test_subcommands() -> None:
    assert found("%cluster st") == ["start", "stop", "status"]
    assert set(found("%cluster ")) == {*commands.WHERE, "help"}
    assert found("table = %cluster ta") == ["tasks"]
    assert found("%cluster help dia") == []
    assert found("%cluster help doc") == ["doctor"]
    assert found("%cluster nonsense ") == []


def test_flags_and_their_values() -> None:
    assert found("%cluster start --k") == ["--keep"]
    assert "--help" in found("%cluster status --h")
    assert set(found("%cluster start ")) >= {"--cpus", "--keep"}
    assert found("%cluster tasks --state fin") == ["finished"]
    assert found("%%remote --num-c") == ["--num-cpus"]
    assert "-o" in found("%%remote -")
    assert found("%remote --ti") == ["--timeout"]


def test_names_after_out_and_in() -> None:
    cell = "%%remote -o mo\nmodel = fit(train)\nfor row in rows:\n    pass\ndef helper(): pass\nx == 3"
    assert found("%%remote -o ", cell) == ["model", "row", "helper"]
    assert completion.complete(cockpit(), cell, "%%remote -o helper,mo") == ("mo", ["model"])
    assert found("%%remote -i tr", cell, train=1, truth=2, _hidden=3, exit=4) == ["train", "truth"]
    assert found("%%remote -i train -q --memory ", cell, train=1) == []


@pytest.mark.parametrize("name", commands.WHERE)
def test_every_subcommand_has_help_and_known_kinds(name: str) -> None:
    parser = commands.find(name).parser()
    text = parser.format_help()
    assert text.startswith(f"usage: %cluster {name}")
    assert " ".join(commands.described(name).split()) in " ".join(text.split())
    assert name in overview()
    assert all(action.help for action in parser._actions)
    assert set(parser.kinds.values()) <= set(completion.KINDS)
    assert set(parser.kinds) <= {action.dest for action in parser._actions}


# -- in a kernel


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with Kernel() as k:
        assert k.run("%load_ext nbray\n%cluster start --cpus 1").error is None
        yield k


def asked(kernel: Kernel, code: str, cursor: int | None = None) -> list[str]:
    cursor = len(code) if cursor is None else cursor
    message = kernel.client.complete(code, cursor)
    while True:
        reply = kernel.client.get_shell_msg(timeout=LIMIT)
        if reply["parent_header"].get("msg_id") == message:
            content = reply["content"]
            start, end = content["cursor_start"], content["cursor_end"]
            return [code[:start] + match + code[end:cursor] for match in content["matches"]]


@pytest.mark.slow
def test_a_kernel_completes_lines_and_nothing_else_is_mixed_in(kernel: Kernel) -> None:
    assert asked(kernel, "%cluster st") == ["%cluster start", "%cluster stop", "%cluster status"]
    assert asked(kernel, "%cluster start --ke") == ["%cluster start --keep"]
    cell = "%%remote -o mod\nmodel = 1"
    assert asked(kernel, cell, 15) == ["%%remote -o model"]
    assert "import nbray" in asked(kernel, "import nbra")


@pytest.mark.slow
def test_a_kernel_completes_names_and_ids(kernel: Kernel) -> None:
    run = kernel.run(
        "import nbray\nsquare = nbray.remote(lambda x: x * x)\nnine = square.remote(3); plain = 1\nnbray.get(nine)"
    )
    assert run.result == "9"
    assert asked(kernel, "%cluster why ni") == ["%cluster why nine"]
    assert f"%cluster cancel In[{run.number}]" in asked(kernel, "%cluster cancel ")
    assert asked(kernel, f"%cluster cancel In[{run.number}") == [f"%cluster cancel In[{run.number}]"]
    short = kernel.run("from nbray import ids; print(ids.short(nine.task_id()))").text().strip()
    assert f"%cluster why {short}" in asked(kernel, f"%cluster why {short[:4]}")


@pytest.mark.slow
def test_help_of_magics(kernel: Kernel) -> None:
    for code, words in {"%cluster?": ["start", "doctor"], "%%remote?": ["--num-cpus", "--out"]}.items():
        run = kernel.run(code)
        text = "".join(page["data"]["text/plain"] for page in run.reply["payload"])
        for word in words:
            assert word in text
