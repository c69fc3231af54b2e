"""The command ``nbray``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbray.cli import COMMANDS, main
from tests.notebook.test_kernel import gone, node_pids, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 2, "usage: nbray COMMAND"),
        (["--help"], 0, "usage: nbray COMMAND"),
        (["--version"], 0, "nbray 0."),
        (["strat"], 2, "did you mean start?"),
        (["start", "--cpu", "2"], 2, "did you mean --cpus?"),
        (["start", "--cpus", "none"], 2, "'none' should be a number"),
        (["stop", "a", "b"], 2, "'b' is one word too many"),
        (["list"], 0, "No cluster is running"),
        (["status"], 1, "No cluster is running"),
        (["status", "mine"], 1, "No cluster 'mine' is running"),
        (["stop"], 0, "No cluster is running"),
        (["where"], 1, "No cluster is running"),
        (["doctor"], 0, "packages"),
    ],
)
def test_words_and_status(
    words: list[str], status: int, text: str, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    out, err = capsys.readouterr()
    assert text in (err if status == 2 and words else out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: nbray {name}" in capsys.readouterr().out


@pytest.fixture
def terminal(runtime_dir: Path) -> Iterator[Path]:
    """A runtime directory in which nothing runs afterwards."""
    yield runtime_dir
    main(["stop", "--all", "--force"])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbray.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_from_the_terminal(terminal: Path) -> None:
    started = run("start", "--cpus", "1", "--name", "mine")
    assert started.returncode == 0, started.stderr
    assert "Cluster 'mine' is running: 1 CPU" in started.stdout
    (pid,) = node_pids(terminal)
    again = run("start", "--cpus", "3", "--name", "mine")
    assert "was running already" in again.stdout
    assert "--cpus 3: it has 1" in again.stdout
    assert str(terminal) in run("status", "mine").stdout
    assert "mine" in run("list").stdout
    assert f"pid {pid}" in run("doctor").stdout
    script = "import nbray\nnbray.init(name='mine')\nprint(nbray.get(nbray.remote(lambda: 6 * 7).remote()))\nnbray.shutdown(stop=False)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "42\n", done.stderr
    assert not gone(pid)
    stopped = run("stop", "mine")
    assert (stopped.returncode, stopped.stdout) == (0, "Cluster 'mine' is stopped.\n"), stopped.stderr
    assert wait_for(lambda: gone(pid))
    assert run("stop", "mine").returncode == 1


@pytest.mark.slow
def test_a_cluster_in_use_is_stopped_by_force_only(terminal: Path) -> None:
    hold = "import nbray, sys\nnbray.init(num_cpus=1, session='busy.ipynb')\nprint('up', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "up\n"
        (pid,) = node_pids(terminal)
        refused = run("stop")
        assert refused.returncode == 1
        assert "busy.ipynb" in refused.stderr
        assert "--force" in refused.stderr
        assert not gone(pid)
        assert run("stop", "--force").returncode == 0
        assert wait_for(lambda: gone(pid))


@pytest.mark.slow
def test_plain_ipython_without_a_kernel(terminal: Path, tmp_path: Path) -> None:
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "for cell in ('%load_ext nbray', '%cluster start --cpus 1', 'a = 2', '%%remote\\nprint(\"there\")\\nb = a * 21\\nb', '%%remote\\n1 / 0', '%cluster stop'):\n"
        "    result = shell.run_cell(cell, store_history=True)\n"
        "print('b is', shell.user_ns['b'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "IPYTHONDIR": str(tmp_path), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "Cluster 'default' started",
        "there\n",
        "Out[4]: 42",
        "ZeroDivisionError",
        "is stopped",
        "b is 42",
    ):
        assert words in done.stdout, done.stdout
    assert "nbray/notebook" not in done.stdout


@pytest.mark.slow
def test_loading_the_extension_is_light(tmp_path: Path) -> None:
    """At most 0.3 s on top of IPython where an interpreter starts in 20 ms; nothing heavy comes in."""
    code = (
        "import sys, time\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "start = time.perf_counter()\n"
        "shell.run_line_magic('load_ext', 'nbray')\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = [m for m in ('numpy', 'pandas', 'pyarrow', 'grpc', 'cloudpickle', 'ipywidgets', 'anywidget', 'sqlite3') if m in sys.modules]\n"
        "print(seconds, 'cluster' in shell.magics_manager.magics['line'], *heavy)\n"
    )
    env = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()
        for _ in range(3)
    ]
    for _, registered, *heavy in runs:
        assert registered == "True"
        # IPython's own history is kept in SQLite.
        assert set(heavy) <= {"sqlite3"}
    assert min(float(r[0]) for r in runs) < 0.3
