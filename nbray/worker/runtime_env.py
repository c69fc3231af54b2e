"""The option ``runtime_env`` in a worker: variables, working directory and modules that stay whatever world its tasks bring along."""

from __future__ import annotations

import os

import msgspec

from nbray.worker import world as worlds


class Content(msgspec.Struct):
    """What ``nbray.api.options.environment`` encodes; paths are absolute."""

    env_vars: dict[str, str] = {}
    working_dir: str = ""
    py_modules: list[str] = []


def apply(blob: bytes) -> None:
    """Take on an environment, for the rest of this worker's life."""
    content = msgspec.msgpack.decode(blob, type=Content)
    own = worlds.own
    own.environment.update(content.env_vars)
    own.directory = content.working_dir
    own.path = [
        *([content.working_dir] if content.working_dir else []),
        *map(_import_directory, content.py_modules),
    ]


def _import_directory(path: str) -> str:
    """The entry of ``sys.path`` that makes a module file, a package, or the modules in a directory importable."""
    is_module = os.path.isfile(path) or os.path.isfile(os.path.join(path, "__init__.py"))
    return os.path.dirname(path) if is_module else path
