"""Which notebook this is, and whether its kernel ends for good.

Measured on ipykernel 6.31, 7.3 and 7.4: when a front end restarts or shuts a kernel down, the kernel keeps the message that asked for it, and
the handlers of ``atexit`` still see it. ``exit()`` in a cell leaves none. SIGTERM and SIGKILL (a crash, ``shutdown_kernel(now=True)``, the
end of nbval) run no handler at all: then the cluster sees a connection that ends without a word.
"""

from __future__ import annotations

import os
from typing import Any

from nbray import config
from nbray.api import context


def session_name(shell: Any, given: str = "") -> str:
    """What names the notebook: its path (from Jupyter's servers or VS Code), else what the user gave, else the kernel's id.

    A restart keeps the kernel's id. "" outside of a kernel.
    """
    named = config.settings().session or shell.user_ns.get("__vsc_ipynb_file__") or given
    return str(named) if named else kernel_id(shell)


def kernel_id(shell: Any) -> str:
    """``kernel-<uuid>`` of the connection file, "" where there is none."""
    kernel = getattr(shell, "kernel", None)
    app = getattr(kernel, "parent", None)
    file = str(getattr(app, "connection_file", "") or "")
    return os.path.splitext(os.path.basename(file))[0]


def may_come_back(shell: Any) -> bool:
    """Whether a front end is there that restarts kernels, so that a connection lost without a word may be a crash to recover from.

    Jupyter's servers and VS Code say so; headless runs (nbclient, nbval, papermill) and scripts have nobody to come back to.
    """
    return bool(config.settings().session or shell.user_ns.get("__vsc_ipynb_file__"))


def ended_for_restart(shell: Any) -> bool | None:
    """At exit: True if the kernel is being restarted, False if it is shut down, None if nobody asked for either (``exit()``, a script)."""
    message = getattr(getattr(shell, "kernel", None), "_shutdown_message", None)
    if message is None:
        return None
    return bool(message["content"].get("restart"))


def stop_at_exit(shell: Any) -> bool | None:
    """At exit: whether the cluster ends with this process; None for the usual rule (it does, unless it was started with ``keep``).

    A restart keeps it. So does ``exit()`` in a notebook, after which the server starts the kernel again. Where a server shuts kernels down (because
    somebody closes the notebook, because they are idle, because it ends itself: they look the same), named results go to disk first.
    """
    restart = ended_for_restart(shell)
    comes_back = may_come_back(shell) if restart is None else restart
    runtime = context.current()
    if runtime is not None and not comes_back and may_come_back(shell):
        engine: Any = runtime.engine
        engine.saves = True
    return False if comes_back else None
