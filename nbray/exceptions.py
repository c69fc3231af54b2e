"""The exceptions of nbray under the names of ``ray.exceptions`` too, so that ``except`` clauses of Ray programs work unchanged."""

from nbray.errors import (
    ActorAlreadyExistsError,
    ActorDiedError,
    ActorError,
    ActorUnavailableError,
    DeadlockError,
    DiskFullError,
    GcsUnavailableError,
    GetTimeoutError,
    NbrayError,
    NodeDiedError,
    NotInitializedError,
    ObjectFreedError,
    ObjectLostError,
    OutOfMemoryError,
    PendingCallsLimitExceededError,
    RuntimeEnvError,
    SerializationError,
    StoreFullError,
    TaskCancelledError,
    TaskError,
    UnschedulableError,
    WorkerCrashedError,
)

RayError = NbrayError
RayTaskError = TaskError
RayActorError = ActorError
ActorHandleNotFoundError = ActorDiedError
ActorUnschedulableError = UnschedulableError
TaskUnschedulableError = UnschedulableError
ObjectStoreFullError = StoreFullError
OutOfDiskError = DiskFullError
ObjectReconstructionFailedError = ObjectLostError
OwnerDiedError = ObjectLostError
PendingCallsLimitExceeded = PendingCallsLimitExceededError
RuntimeEnvSetupError = RuntimeEnvError
RaySystemError = NbrayError

__all__ = [
    "ActorAlreadyExistsError",
    "ActorDiedError",
    "ActorError",
    "ActorHandleNotFoundError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "DeadlockError",
    "DiskFullError",
    "GcsUnavailableError",
    "GetTimeoutError",
    "NbrayError",
    "NodeDiedError",
    "NotInitializedError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectStoreFullError",
    "OutOfDiskError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceeded",
    "PendingCallsLimitExceededError",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "RuntimeEnvError",
    "RuntimeEnvSetupError",
    "SerializationError",
    "StoreFullError",
    "TaskCancelledError",
    "TaskError",
    "TaskUnschedulableError",
    "UnschedulableError",
    "WorkerCrashedError",
]
