"""What people type and what they are told: arguments, cards, tracebacks, output marks. No cluster."""

from __future__ import annotations

import argparse
import linecache
import types
from dataclasses import replace

import pytest

from nbray import config, diagnose
from nbray.api.reports import Frame, Report
from nbray.messages import Output
from nbray.notebook import arguments, cards, commands, render
from nbray.notebook.arguments import BadUsageError
from nbray.notebook.cards import Facts, Status
from nbray.notebook.options import parser as remote_parser
from nbray.notebook.output import Router
from nbray.worker.display import bundle

FACTS = Facts(
    "default",
    {"CPU": 20_000, "GPU": 0, "memory": 10**13},
    8 << 30,
    2 << 30,
    "/run/log",
    "/tmp/spill",
    "/run/dir",
    1800.0,
)


# -- arguments


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500 << 20),
        ("64k", 64 << 10),
        ("123", 123),
        ("1TB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert arguments.size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2PB", "two", "1 000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write for instance"):
        arguments.size(text)


def test_numbers() -> None:
    assert (arguments.amount("2"), arguments.amount("0.5"), arguments.whole("3")) == (2, 0.5, 3)
    for wrong in ("-1", "nan", "inf", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.amount(wrong)
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.whole("1.5")


@pytest.mark.parametrize("line", ["-o a,b", "-o a, b", "-o a b", "-o a -o b", "--out a,b"])
def test_names_in_every_way_people_write_them(line: str) -> None:
    assert arguments.names(remote_parser().read(arguments.split(line)).out) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--num-cpu 2", "did you mean --num-cpus?"),
        ("--retry 2", "did you mean --retries?"),
        ("--num-cpus two", "'two' should be a number"),
        ("--num-cpus", "expected one argument"),
        ("x = 1", "'x' is one word too many"),
        ("--memory lots", "500MB"),
        ("-o 'a", "No closing quotation"),
    ],
)
def test_what_cannot_be_understood_says_what_would_be(line: str, hint: str) -> None:
    with pytest.raises(BadUsageError) as caught:
        remote_parser().read(arguments.split(line))
    assert hint in str(caught.value)


def test_a_name_must_be_one() -> None:
    with pytest.raises(BadUsageError, match=r"'x\.y' is not a variable's name"):
        arguments.names(["x.y"])


@pytest.mark.parametrize("name", commands.WHERE)
def test_every_subcommand_has_a_parser_with_help(name: str) -> None:
    parser = commands.find(name).parser()
    assert parser.prog == f"%cluster {name}"
    assert len(parser.format_help().splitlines()) > 1
    with pytest.raises(BadUsageError):
        parser.read(["--no-such-flag"])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 kB"), (5 << 20, "5.0 MB"), (300 << 30, "300 GB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert arguments.human(count) == text


# -- cards


def test_the_start_card_says_what_matters() -> None:
    card = cards.start_card(replace(FACTS, started=0.42))
    assert "started in 0.42 s" in card.text
    for word in (
        "2 CPUs",
        "8.0 GB",
        "2.0 GB",
        "/run/log",
        "/tmp/spill",
        "/run/dir",
        "restart",
        "30 min",
        "%cluster stop",
    ):
        assert word in card.text
        assert word in card.html


def test_a_static_card_has_nothing_that_changes() -> None:
    text = cards.start_card(FACTS, static=True).text
    assert "2 CPUs" in text
    for word in ("GB", "/run", "/tmp"):
        assert word not in text
    assert list(cards.start_card(FACTS).bundle(static=True)) == ["text/plain"]


def test_names_on_cards_are_no_html() -> None:
    card = cards.start_card(Facts("<b>", {"CPU": 10_000, "tpu": 5_000}, 0, 0, "", "", "", 90.0))
    assert "&lt;b&gt;" in card.html
    assert "1 CPU, 0.5 tpu" in card.text
    assert "90 s" in card.text


def test_status_and_list() -> None:
    status = Status({"CPU": 0.5}, {"RUNNING": 1, "FINISHED": 30}, 2, 3, 1, 5 << 20)
    text = cards.status_card(FACTS, status, [("logs", "/run/log", 2048)]).text
    for words in (
        "0.5 of 2 free",
        "1 running, 30 finished",
        "5.0 MB of 2.0 GB in 1 object",
        "/run/log (2.0 kB)",
    ):
        assert words in text
    listed = cards.list_card([FACTS], [7200.0], "/run/dir").text
    assert "default (this notebook)  2 CPUs, 2 h old, /run/dir" in listed
    assert "No cluster" in cards.list_card([], [], "").text


# -- tracebacks


def test_frames_show_cells_and_lines() -> None:
    linecache.cache["<a cell>"] = (0, None, [f"line {n}\n" for n in range(1, 9)], "<a cell>")
    report = Report(
        "ValueError",
        ["ValueError: bad"],
        [Frame("<a cell>", 4, "<module>", ""), Frame("/lib/x.py", 9, "f", "raise it")],
    )
    lines = render.traceback_lines(report, lambda name: "Cell In[3]" if name == "<a cell>" else None, "there")
    assert lines[2:9] == [
        "Cell In[3], line 4",
        "      2 line 2",
        "      3 line 3",
        "----> 4 line 4",
        "      5 line 5",
        "      6 line 6",
        "",
    ]
    assert lines[9:] == ["File /lib/x.py, line 9, in f", "----> 9 raise it", "", "ValueError: bad", "there"]
    coloured = render.traceback_lines(report, lambda name: None, "there", render.Style(True))
    assert "\x1b[31mValueError\x1b[0m: bad" in coloured
    del linecache.cache["<a cell>"]


def test_frames_of_libraries_are_short() -> None:
    for path in (
        "/x/.venv/lib/python3.11/site-packages/sklearn/base.py",
        "/usr/lib/python3.12/sklearn/base.py",
    ):
        report = Report("E", ["E"], [Frame(path, 7, "fit", "return fit()")])
        lines = render.traceback_lines(report, lambda name: None)
        assert lines[2:] == ["File sklearn/base.py, line 7, in fit", "----> 7 return fit()", "", "E"]


def test_deep_recursion_is_shortened() -> None:
    report = Report(
        "RecursionError",
        ["RecursionError: deep"],
        [Frame("/x.py", n, "f", "f()") for n in range(80)],
        left_out=920,
    )
    lines = render.traceback_lines(report, lambda name: None)
    assert len(lines) < 300
    assert "... 920 frames left out ..." in lines


# -- output outside of a kernel


def test_output_is_marked_with_its_task(capsys: pytest.CaptureFixture[str]) -> None:
    router = Router(types.SimpleNamespace())
    router.remember("cell")
    router.own("cell", "In[1]")
    for cell, stream, text, name, pid, task in (
        ("cell", "stdout", "own\n", "In[1]", 1, b"a"),
        ("cell", "stdout", "one\ntwo", "f", 7, b"b"),
        ("cell", "stdout", " more\n", "f", 7, b"b"),
        ("cell", "stdout", "half", "f", 7, b"b"),
        ("cell", "stdout", "other\n", "f", 8, b"c"),
        ("gone", "stderr", "late\n", "g", 9, b"d"),
        ("cell", "display", '{"data": {"text/plain": "shown"}}', "f", 7, b"b"),
        ("cell", "stdout", "", "f", 7, b"b"),
    ):
        router.receive(Output(task, stream, text, name, pid, cell))
        router.flush("cell")
    out, err = capsys.readouterr()
    assert out == "own\n(f, pid 7) one\n(f, pid 7) two more\n(f, pid 7) half\n(f, pid 8) other\nshown\n"
    assert err == "(g, pid 9) late\n"


def test_plain_marks_have_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    router = Router(types.SimpleNamespace(), plain=True)
    router.remember("cell")
    router.receive(Output(b"b", "stdout", "x\n", "f", 7, "cell"))
    assert capsys.readouterr().out == "(f) x\n"


def test_only_so_many_cells_are_remembered() -> None:
    router = Router(types.SimpleNamespace())
    for number in range(3000):
        router.remember(str(number))
        router.own(str(number), "t")
    assert len(router._parents) == len(router._own) == 1000


# -- displays


def test_bundles() -> None:
    class Rich:
        def _repr_html_(self) -> str:
            return "<i>rich</i>"

        def _repr_png_(self) -> bytes:
            return b"\x89PNG"

        def _repr_svg_(self) -> str:
            raise ValueError("broken")

        def _repr_latex_(self) -> None:
            return None

        def __repr__(self) -> str:
            return "rich"

    assert bundle(Rich())[0] == {"text/html": "<i>rich</i>", "image/png": "iVBORw==", "text/plain": "rich"}
    assert list(bundle(Rich)[0]) == ["text/plain"]
    assert bundle([1]) == ({"text/plain": "[1]"}, {})


# -- doctor


def test_doctor_is_one_block(runtime_dir: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy:1")
    monkeypatch.setenv("NBRAY_SOME_TOKEN", "secret")
    text = diagnose.report({"notebook": "x.ipynb"})
    for word in (
        "python",
        "cloudpickle",
        "CPUs",
        "memory",
        "cgroup",
        "runtime",
        "spill",
        "/dev/shm",
        "none is running",
        "proxy:1",
        "x.ipynb",
    ):
        assert word in text
    assert "secret" not in text
    assert text.startswith("```text\n")
    assert text.endswith("\n```")


def test_doctor_says_what_is_wrong(runtime_dir: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBRAY_TTL", "soon")
    assert "PROBLEM: the environment variable NBRAY_TTL='soon' should be a number" in diagnose.report()
    monkeypatch.delenv("NBRAY_TTL")
    monkeypatch.setenv("NBRAY_RUNTIME_DIR", "/proc/no/such/place")
    assert "PROBLEM: no directory for runtime" in diagnose.report()


def test_proxies_lose_their_passwords() -> None:
    shown = config.notable_environment(
        {"HTTP_PROXY": "http://u:p@h:1", "HOME": "/x", "NBRAY_TTL": "3", "no_proxy": "a,b"}
    )
    assert shown == {"HTTP_PROXY": "h:1", "NBRAY_TTL": "3", "no_proxy": "a,b"}
