"""Secrets in the environment, in arguments and in what cells capture are in no file that nbray writes and in nothing that it shows."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow


@pytest.fixture
def words() -> list[str]:
    """Drawn anew, so that no file of before has them."""
    return [f"planted-{index}-{secrets.token_hex(8)}" for index in range(4)]


def files(directory: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()


def forms(word: str) -> list[bytes]:
    """How a text may be written into a file."""
    return [word.encode(), word.encode("utf-16-le"), word.encode().hex().encode(), word[::-1].encode()]


def test_no_secret_leaves_the_processes(runtime_dir: Path, tmp_path: Path, words: list[str]) -> None:
    in_environment, set_later, argument, captured = words
    environment = {
        "PLANTED_KEY": in_environment,
        "NBRAY_LOG": "DEBUG",
        "NBRAY_SPILL_DIR": str(tmp_path / "spill"),
    }
    (tmp_path / "words.json").write_text(json.dumps([set_later, argument, captured]))
    cells = [
        "%load_ext nbray\n%cluster start --cpus 2",
        "import json, os, nbray\nlater, argument, captured = json.load(open('words.json'))\nos.environ['PLANTED_LATER'] = later",
        "@nbray.remote\ndef look(word, token=None): return len(word), 'PLANTED_KEY' in os.environ, len(os.environ['PLANTED_LATER'])",
        "look_back = nbray.get([look.remote(argument), look.remote(argument, token=argument), look.remote([argument] * 10_000)])",
        "@nbray.remote\nclass Holder:\n    def __init__(self, word): self.word = word\n    def check(self, word): return self.word == word",
        "holder = Holder.remote(argument)\nnbray.get(holder.check.remote(argument))",
        "@nbray.remote(max_retries=1, retry_exceptions=True)\ndef fail(word): return 1 / 0",
        "fail_ref = fail.remote(argument)\ntry: nbray.get(fail_ref)\nexcept ZeroDivisionError: pass",
        "%%remote\nsize = len(captured), len(os.environ['PLANTED_KEY'])",
        "%%remote --dry-run\nlen(captured)",
        "%%remote\nconfig = {'password': captured}\nconfig['password'].missing",
        "import threading\nbundle = {'password': captured, 'lock': threading.Lock()}",
        "%%remote\nbundle",
        "ref = nbray.put(captured)\nheld = nbray.put({'key': captured, 'pad': bytes(100_000)})",
        "%cluster tasks", "%cluster objects", "%cluster actors", "%cluster status", "%cluster doctor", "%cluster list", "%cluster where",
        "%cluster why fail_ref",
        "print(nbray.state.tasks().to_pandas().to_string())\nprint(nbray.state.objects().to_pandas().to_string())",
        "look, fail, holder, ref",
    ]  # fmt: skip
    with Kernel(environment, cwd=str(tmp_path)) as kernel:
        runs: list[Run] = [kernel.run(cell) for cell in cells]
        assert kernel.run("look_back[0][1:] == (True, len(later)), size").result is not None
        # What the head has is on disk now.
        kernel.run("nbray.state.tasks()")
        shown = json.dumps(
            [[m["content"] for m in run.messages if m["msg_type"] != "execute_input"] for run in runs]
        )
        found = [
            (str(path), word)
            for directory in (runtime_dir, tmp_path / "spill")
            for path, data in files(directory)
            for word in words
            if any(form in data for form in forms(word))
        ]
        databases = [
            path
            for directory in (runtime_dir, tmp_path / "spill")
            for path, data in files(directory)
            if data.startswith(b"SQLite format 3")
        ]
        logs = [path for path, data in files(runtime_dir) if "log" in path.name or "log" in path.parent.name]
        assert found == []
        assert [word for word in words if word in shown] == []
        assert databases
        assert logs
    assert {run.error for run in runs} == {None, "AttributeError", "SerializationError"}
