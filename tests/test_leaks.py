"""The leak check finds what it is for, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import LeakCheck

SLEEP = [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"]


@pytest.fixture
def check() -> Iterator[LeakCheck]:
    with tempfile.TemporaryDirectory(prefix="leak") as folder:
        path = Path(folder)
        (path / "run").mkdir()
        (path / "tmp").mkdir()
        yield LeakCheck(path)


def test_nothing_left_behind_is_reported_as_nothing(check: LeakCheck) -> None:
    before = check.snapshot()
    assert not check.wait(before, 0.0)


def test_an_orphan_is_found_by_its_environment_and_ended(check: LeakCheck) -> None:
    before = check.snapshot()
    starter = (
        "import os, subprocess;"
        f"p = subprocess.Popen({SLEEP!r}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,"
        " start_new_session=True);"
        "p.stdout.readline(); print(p.pid, flush=True); os._exit(0)"
    )
    # The orphan lives as long as this end of its standard input does.
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", starter],
            stdin=read,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "NBRAY_RUNTIME_DIR": str(check.runtime)},
        )
        orphan = int(done.stdout)
        found = check.leftovers(before)
        assert list(found.processes) == [orphan]
        assert str(orphan) in str(found)
        check.remove(found)
        assert not check.wait(before, 5.0)
    finally:
        os.close(read)
        os.close(write)


def test_a_child_without_the_environment_is_found(check: LeakCheck) -> None:
    before = check.snapshot()
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = check.leftovers(before)
        child.communicate()
    assert list(found.processes) == [child.pid]
    assert not check.leftovers(before)


def test_what_descends_from_something_older_is_not_the_tests(check: LeakCheck) -> None:
    parent_code = (
        f"import subprocess, sys; sys.stdin.readline(); p = subprocess.Popen({SLEEP!r}, stdin=subprocess.PIPE);"
        "sys.stdin.read(); p.communicate()"
    )
    environment = {**os.environ, "NBRAY_RUNTIME_DIR": str(check.runtime)}
    with subprocess.Popen(
        [sys.executable, "-c", parent_code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        before = check.snapshot()
        assert parent.pid in before.pids
        parent.stdin.write(b"go\n")
        parent.stdin.flush()
        parent.stdout.readline()
        assert not check.leftovers(before)
        parent.communicate()


def test_the_wait_ends_when_the_process_does(check: LeakCheck) -> None:
    before = check.snapshot()
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        start = time.monotonic()
        child.stdin.close()
        assert not check.wait(before, 30.0)
        assert time.monotonic() - start < 10.0


def test_files_and_sockets_are_found_and_removed(check: LeakCheck) -> None:
    before = check.snapshot()
    (check.temp / "spilled").mkdir()
    (check.temp / "spilled" / "object").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(check.runtime / "node.sock"))
        server.listen()
        client.connect(str(check.runtime / "node.sock"))
        found = check.leftovers(before)
        assert found.paths == [str(check.runtime / "node.sock"), str(check.temp / "spilled")]
        assert len(found.others) == 2, found
    check.remove(found)
    assert not check.leftovers(before)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory without a name is Linux's")
def test_shared_memory_is_found(check: LeakCheck) -> None:
    before = check.snapshot()
    fd = os.memfd_create("nbray-arena")
    found = check.leftovers(before)
    os.close(fd)
    assert ["memfd" in other for other in found.others] == [True]
    assert not check.leftovers(before)


def test_a_private_folder_is_looked_into(check: LeakCheck) -> None:
    before = check.snapshot()
    private = check.runtime / "t1"
    private.mkdir()
    check.private.add(private)
    assert not check.leftovers(before)
    (private / "socket").touch()
    assert check.leftovers(before).paths == [str(private / "socket")]
    check.forget_private()
    assert not private.exists()


def test_runtime_dir_is_the_environments(runtime_dir: Path) -> None:
    assert os.environ["NBRAY_RUNTIME_DIR"] == str(runtime_dir)
    assert runtime_dir.stat().st_mode & 0o777 == 0o700
    assert len(str(runtime_dir)) < 60


def test_the_check_costs_little(check: LeakCheck) -> None:
    seconds = []
    for _ in range(5):
        start = time.process_time()
        check.leftovers(check.snapshot())
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.02
