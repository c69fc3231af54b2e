"""What a fresh worker takes on when it becomes one of a session: threads of numeric libraries, GPUs, environment, random state."""

from __future__ import annotations

import os
import random
import sys
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.worker.world import own
from nbray.worker.zygote import BLAS_VARIABLES

if TYPE_CHECKING:
    from nbray.engine.local import LocalEngine
    from nbray.messages import Adopt


def adopt(message: Adopt, engine: LocalEngine, blobs: dict[bytes, bytes]) -> None:
    """Become a worker of ``message.session``."""
    if message.gpus:
        own.environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, message.gpus))
    set_threads(message.cpus)
    if message.blob:
        from nbray.worker import runtime_env

        runtime_env.apply(message.blob)


def set_threads(count: int) -> None:
    """Threads of BLAS and OpenMP, unless the user has chosen: the libraries that the zygote has loaded were told one."""
    if any(os.environ.get(name) for name in BLAS_VARIABLES):
        return
    for name in BLAS_VARIABLES:
        own.defaults[name] = os.environ[name] = str(count)
    if count > 1 and "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)


def seed_task(cluster: bytes, task: bytes) -> None:
    """Seed the global generators for a task: distinct across tasks, equal across its attempts, whatever ran here before (design section 3)."""
    seed = ids.task_seed(cluster, task)
    random.seed(int.from_bytes(seed, "little"))
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed([int.from_bytes(seed[at : at + 4], "little") for at in range(0, 16, 4)])
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(int.from_bytes(seed[:8], "little"))
