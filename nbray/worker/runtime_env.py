"""What a task's ``runtime_env`` asks for, in the worker process that was made for it: variables, a working directory, modules."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from nbray.errors import RuntimeEnvError

_REFERENCE = re.compile(r"\$\{(\w+)\}")


class Asked(msgspec.Struct):
    """The checked ``runtime_env``, as `nbray.api.options.environment` packs it. Paths are absolute."""

    env_vars: dict[str, str]
    working_dir: str
    py_modules: list[str]


def decode(blob: bytes) -> Asked:
    """What was asked for."""
    return msgspec.msgpack.decode(blob, type=Asked)


def set_up(asked: Asked) -> dict[str, str]:
    """See that everything is there; the modules, as names and the files or packages they are loaded from.

    Raises RuntimeEnvError naming the key, what was asked for and what is wrong with it. Values of variables never appear.
    """
    for name, value in asked.env_vars.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise RuntimeEnvError(
                f"runtime_env['env_vars'][{name!r}]: expected a variable that can be set; its name may not be empty or contain '=', and neither "
                "name nor value a null character"
            )
    if asked.working_dir:
        folder = Path(asked.working_dir)
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "does not exist any more"
            raise RuntimeEnvError(
                f"runtime_env['working_dir']={asked.working_dir!r}: {what}. Make it again, or name another one."
            )
        if not os.access(folder, os.R_OK | os.X_OK):
            raise RuntimeEnvError(
                f"runtime_env['working_dir']={asked.working_dir!r}: it may not be read or entered (permissions)"
            )
    return dict(_module(path) for path in asked.py_modules)


def _module(text: str) -> tuple[str, str]:
    path = Path(text)
    if path.is_dir():
        if not path.name.isidentifier():
            raise RuntimeEnvError(
                f"runtime_env['py_modules']: {text!r} cannot be imported, because {path.name!r} is not a name of a module"
            )
        return path.name, str(path)
    if path.suffix == ".py" and path.is_file():
        return path.stem, str(path)
    what = "is neither a package (a directory) nor a .py file" if path.exists() else "does not exist any more"
    raise RuntimeEnvError(f"runtime_env['py_modules']: {text!r} {what}")


def add_variables(asked: Asked, environment: dict[bytes, bytes]) -> None:
    """Add the variables to an environment; ``${NAME}`` in a value stands for what NAME has been so far, as in Ray."""
    before = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    for name, value in asked.env_vars.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            continue
        text = _REFERENCE.sub(lambda found: before.get(found[1], ""), value)
        environment[os.fsencode(name)] = os.fsencode(text)
