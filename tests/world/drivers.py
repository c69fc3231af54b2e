"""Drivers as users have them: scripts in a folder of their own, run by a fresh interpreter with a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

_numbers = count()


def run_script(
    script: Path,
    *arguments: str,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    module: str = "",
) -> Any:
    """Run a script (or, with ``-m``, a module); what it prints last, which must be JSON."""
    command = [sys.executable, *(["-m", module] if module else [str(script)]), *arguments]
    done = subprocess.run(
        command,
        cwd=cwd or script.parent,
        env={**os.environ, "NBRAY_CLUSTER": f"t{next(_numbers)}", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
