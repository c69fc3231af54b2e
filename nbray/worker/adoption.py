"""What a worker takes on for a task: threads of numeric libraries, GPUs, random state."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sys
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.store.serialization import PICKLE
from nbray.worker.zygote import BLAS_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec

OPENMP = b"OMP_NUM_THREADS"
"""The variable that numeric libraries look at when their own is not set."""

_VARIABLES = [os.fsencode(name) for name in BLAS_VARIABLES]
_GPUS = b"CUDA_VISIBLE_DEVICES"

# -- threads and GPUs


def environment(base: dict[bytes, bytes], cpus: int, gpus: tuple[int, ...]) -> dict[bytes, bytes]:
    """The environment of a worker: the driver's, with thread counts unless the user has chosen them, and with the GPUs that it was given.

    Where the driver itself sees some GPUs only, the ids that were given count among those.
    """
    found = dict(base)
    if not found.get(OPENMP):
        for name in _VARIABLES:
            if not found.get(name):
                found[name] = b"%d" % cpus
    visible = [part.strip() for part in found.get(_GPUS, b"").split(b",") if part.strip()]
    found[_GPUS] = b",".join(visible[gpu] if gpu < len(visible) else b"%d" % gpu for gpu in gpus)
    return found


_threads = 1
"""What the libraries that are loaded were told, or will read in the environment when they are."""


def set_threads(found: dict[bytes, bytes]) -> None:
    """Make numeric libraries that are loaded already follow the environment; those that are loaded later read it themselves."""
    global _threads
    count = _first_number(found.get(b"OPENBLAS_NUM_THREADS")) or _first_number(found.get(OPENMP)) or 1
    if count == _threads:
        return
    _threads = count
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)


def _first_number(text: bytes | None) -> int:
    first = (text or b"").partition(b",")[0].strip()
    return int(first) if first.isdigit() else 0


# -- random state

_WORDS = 312
"""Words of 64 bits in the state of numpy's global generator."""
_SKIPPED = 16
"""Outputs after which the state of SFC64 is mixed (its author uses 12)."""
_START = 624
"""Position of a Mersenne Twister that has to mix its state before the next output: where every seeding ends."""
_ONE = (1).to_bytes(8, "little")


class Seeder:
    """Seeds the global generators for a task: distinct across tasks, equal across its attempts, whatever ran here before (design section 3)."""

    def __init__(self, cluster: bytes) -> None:
        self._cluster = cluster
        self._seed_python = super(random.Random, random._inst).seed
        self._python: Any = random._inst
        self._numpy: _NumpySeeder | None = None
        self._late: bytes | None = None
        """The seed for numpy, should the running task import it."""
        if "numpy.random" not in sys.modules:
            sys.meta_path.insert(0, _Late("numpy.random", self.loaded))
        self._torch: bytes | None = None
        """The same for torch."""
        if "torch" not in sys.modules:
            sys.meta_path.insert(0, _Late("torch", self._seed_torch))

    def seed(self, task: bytes) -> None:
        """6 µs; torch's generators too, where it is loaded."""
        seed = ids.task_seed(self._cluster, task)
        # What random.seed does, without looking at what kind of seed it has got.
        self._seed_python(int.from_bytes(seed[:16], "little"))
        self._python.gauss_next = None
        modules = sys.modules
        if "numpy.random" in modules:
            if self._numpy is None:
                self._numpy = _NumpySeeder(modules["numpy.random"])
            self._numpy.seed(seed[16:])
        else:
            self._late = seed[16:]
        self._torch = seed[:8]
        if "torch" in modules:
            self._seed_torch()

    def _seed_torch(self) -> None:
        torch: Any = sys.modules.get("torch")
        if self._torch is not None and hasattr(torch, "manual_seed"):
            torch.manual_seed(int.from_bytes(self._torch, "little"))

    def loaded(self) -> None:
        """numpy.random has just been imported: by a task, perhaps, whose seed is known."""
        self._numpy = _NumpySeeder(sys.modules["numpy.random"])
        if self._late is not None:
            self._numpy.seed(self._late)


class _Late:
    """First on ``sys.meta_path`` until a module is imported that the zygote did not have: calls back then."""

    def __init__(self, module: str, loaded: Callable[[], None]) -> None:
        self._module = module
        self._loaded = loaded

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the import system asks for it."""
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self._loaded()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


class _NumpySeeder:
    """Seeds ``numpy.random``'s global generator with 192 bits.

    ``numpy.random.seed`` takes 32 bits (two of 100,000 tasks would share one) or an array, in 9 µs. Here the state of its Mersenne Twister is
    filled, through the interface that numpy has for other languages, from SFC64, one of numpy's generators, which is seeded as numpy seeds it.
    """

    def __init__(self, numpy_random: Any) -> None:
        import ctypes

        self._random = numpy_random
        self._mtrand = numpy_random.mtrand
        self._generator = numpy_random.mtrand._rand._bit_generator
        self._source = numpy_random.SFC64(0)
        self._raw = self._source.random_raw

        def memory(generator: Any, size: int) -> memoryview:
            return memoryview((ctypes.c_char * size).from_address(generator.ctypes.state_address)).cast("B")

        self._source_state = memory(self._source, 32)
        state = memory(self._generator, _WORDS * 8 + 4)
        # The letter that stands for 64 bits is another one on other systems.
        self._key = state[: _WORDS * 8].cast(self._raw(1).dtype.char)
        self._position = state[_WORDS * 8 :].cast("i")
        self._first = -1

    def seed(self, seed: bytes) -> None:
        """``seed``: 24 bytes."""
        numpy_random = self._random
        key, position = self._key, self._position
        if self._mtrand._rand._bit_generator is not self._generator:
            numpy_random.set_bit_generator(self._generator)
            position[0] = 0
        if position[0] != _START or key[0] != self._first:
            # It was used: this drops the second of a pair of normal numbers, which lies elsewhere.
            numpy_random.seed(0)
        self._source_state[:] = seed + _ONE
        words = self._raw(_SKIPPED + _WORDS)
        key[:] = words.data[_SKIPPED:]
        position[0] = _START
        self._first = key[0]


# -- tasks that need no seed


def cannot_draw(function: Any) -> bool:
    """Whether a function, given `plain` arguments, cannot come near a random generator: it names no global, attribute or module, nor does any
    function inside of it, it captures nothing, and the defaults of its parameters are constants.
    """
    return (
        type(function) is FunctionType
        and not function.__closure__
        and all(
            type(value) in _CONSTANTS
            for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        )
        and _names_nothing(function.__code__)
    )


_CONSTANTS = frozenset({int, float, bool, str, bytes, complex, type(None)})


def _names_nothing(code: CodeType) -> bool:
    return not code.co_names and all(
        _names_nothing(each) for each in code.co_consts if isinstance(each, CodeType)
    )


_LOOKS_UP = re.compile(rb"[\x82-\x84\x93]").search


def plain(kind: int, args: bytes) -> bool:
    """Whether pickled arguments hold nothing but numbers, text, bytes and containers of them (False for some that do).

    Everything else needs one of pickle's opcodes that look something up by name.
    """
    return kind == PICKLE and _LOOKS_UP(args) is None
