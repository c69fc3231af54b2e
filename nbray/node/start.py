"""Where a node's process starts: zygote and head first, then what the node itself imports, so that the three get ready side by side."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

from nbray.clusters import Paths
from nbray.installed import modified, package_directories
from nbray.node.children import Children
from nbray.store.memory import SharedMemory


def main(argv: Sequence[str]) -> None:
    """Run a node, told what it is by a JSON object in ``argv[0]``."""
    told = json.loads(argv[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Kept open as long as this process lives: it locks the spill directory.
    os.set_inheritable(told["spill_fd"], False)
    paths = Paths(**told["paths"])
    lock = paths.lock()
    packages = package_directories(sys.path)
    # Before anybody imports any of them.
    installed = modified(packages)
    memory = SharedMemory.create(told["span"], portable=told["portable"], directory=paths.spill)
    children = Children(paths, memory.fd, told["span"], told["node"], bytes.fromhex(told["cluster"]))

    from nbray.node.server import serve

    serve(told, paths, memory, children, packages, installed)
    os.close(lock)
