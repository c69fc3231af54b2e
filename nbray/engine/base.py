"""The one seam to a cluster: what the API needs from whatever runs the work.

``nbray.api`` turns decorators, options and calls into the verbs below; an engine carries them out. `LocalEngine` (``nbray.engine.local``) speaks
to the bundled runtime. Every engine must pass the contract suite in ``tests/engine``.

An engine is shared by all threads of its process. Every wait takes a timeout or can be interrupted from the main thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbray.api.refs import ObjectRef, ObjectRefGenerator
    from nbray.messages import ActorInfo, ActorOptions, TaskClass


class Engine(ABC):
    """A connection to a cluster. ``closed``: why it cannot be used any more, empty while it can."""

    closed: str = ""

    # -- tasks

    @abstractmethod
    def register(self, spec: TaskClass, blob: bytes | None) -> int:
        """Number under which submissions refer to ``spec``. ``blob``: the pickled function named by ``spec.function``, None if registered before.

        Equal specs get equal numbers.
        """

    @abstractmethod
    def add_blob(self, content: bytes, blob: bytes | None, name: str = "") -> None:
        """Make a blob (a pickled function, an environment) known to the cluster under its content id."""

    @abstractmethod
    def submit(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Submit a task of class ``number``; returns at once.

        Returns an `ObjectRef`, a list of them (``num_returns > 1``), None (0) or an `ObjectRefGenerator` (STREAMING).
        Raises SerializationError (naming the argument), NodeDiedError, NotInitializedError.
        """

    # -- actors

    @abstractmethod
    def create_actor(
        self, number: int, options: ActorOptions, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, ActorInfo | None]:
        """Create an actor: its id, and for a named one what the cluster knows under that name.

        Raises ActorAlreadyExistsError (name taken and not ``get_if_exists``).
        """

    @abstractmethod
    def call(self, actor: bytes, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method; same results as `submit`. Calls of one process to one actor run in the order of submission."""

    @abstractmethod
    def hold_actor(self, actor: bytes) -> ObjectRef[Any]:
        """The reference by which a handle keeps its actor alive: to the return value of the actor's creation."""

    @abstractmethod
    def kill_actor(self, actor: bytes, no_restart: bool) -> None: ...

    @abstractmethod
    def get_actor(self, name: str, namespace: str) -> ActorInfo:
        """Raises ValueError when there is no such actor."""

    # -- objects

    @abstractmethod
    def dropped(self, object_id: bytes) -> None:
        """A counted ref is gone. Called by finalizers, at any moment, in any thread: it must only take note."""

    @abstractmethod
    def ref(self, object_id: bytes) -> ObjectRef[Any]:
        """A ref made from a bare id (one that came out of band); the process holds the object from now on."""

    @abstractmethod
    def put(self, value: Any) -> ObjectRef[Any]: ...

    @abstractmethod
    def get(
        self, refs: Sequence[ObjectRef[Any]], timeout: float | None, *, writable: bool = False
    ) -> list[Any]:
        """Values in the order of ``refs`` (duplicates allowed). Raises the first error at once, GetTimeoutError after ``timeout`` seconds."""

    @abstractmethod
    def wait(
        self, refs: Sequence[ObjectRef[Any]], num_returns: int, timeout: float | None, fetch_local: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """(ready, not ready), both in input order, at most ``num_returns`` ready. Arguments are checked by the caller."""

    def failed(self, refs: Sequence[ObjectRef[Any]]) -> int:
        """How many of these refs, which are ready, are known here to be errors."""
        del refs
        return 0

    @abstractmethod
    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the value; cancelling it does not cancel the task."""

    @abstractmethod
    def next_item(self, generator: ObjectRefGenerator[Any], timeout: float | None) -> ObjectRef[Any] | None:
        """Next item of a streaming generator, None at its end."""

    @abstractmethod
    def free(self, refs: Sequence[ObjectRef[Any]]) -> None: ...

    # -- control

    @abstractmethod
    def cancel(self, ref: ObjectRef[Any] | ObjectRefGenerator[Any], force: bool, recursive: bool) -> None: ...

    @abstractmethod
    def query(self, what: str, argument: Any = None) -> Any:
        """Facts and tables by name (``nbray.state``): plain data (lists, dicts, numbers, strings, bytes)."""

    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """What the cluster is: name, node id, session, resources, paths."""

    @abstractmethod
    def shutdown(self, *, stop: bool | None = None, force: bool = False) -> bool:
        """Disconnect; refs and handles become invalid. Idempotent. Returns whether the cluster ends.

        ``stop``: None: it ends unless somebody else uses it. True: it ends; with somebody else there and not ``force`` NbrayError says
        who, and this engine stays connected. False: it goes on.
        """
