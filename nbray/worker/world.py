"""The task's world in a worker: the submitting notebook's working directory, environment and import path (design section 3)."""

from __future__ import annotations

import os
import sys

import msgspec


class World(msgspec.Struct, array_like=True):
    """What `nbray.api.world` found in the driver. ``path``: its ``sys.path``; the first entry may be "", the working directory."""

    directory: str
    environment: dict[str, str]
    path: list[str]


class Own:
    """What a worker keeps whatever world comes: variables (GPUs, ``runtime_env``), ``defaults`` of variables (threads), a working directory, import path
    in front.
    """

    def __init__(self) -> None:
        self.defaults: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self.directory = ""
        self.path: list[str] = []


own = Own()


def encode(world: World) -> bytes:
    return msgspec.msgpack.encode(world)


def apply(blob: bytes) -> None:
    """Take on a world. A directory that is gone is left alone: the task that needs it says so itself."""
    world = msgspec.msgpack.decode(blob, type=World)
    try:
        os.chdir(own.directory or world.directory)
    except OSError:
        pass
    environment = {**own.defaults, **world.environment, **own.environment}
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    path = [*own.path, *(entry for entry in world.path if entry not in own.path)]
    kept = [entry for entry in sys.path if entry not in path]
    sys.path[:] = path + kept
