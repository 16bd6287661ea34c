"""Every failure that a caller can meet. Errors are data: a code, a stable reason, a sentence and what else helps.

ServiceError
├── InvalidInput        INVALID_ARGUMENT     each bad field at once
├── NotFound            NOT_FOUND            also for what belongs to somebody else
├── AlreadyExists       ALREADY_EXISTS       a request_id used again with another body
├── FailedPrecondition  FAILED_PRECONDITION  in use, finished, not ready
├── ResourceExhausted   RESOURCE_EXHAUSTED   a limit or a full queue; may say when to try again
├── Unavailable         UNAVAILABLE          a part is down; may say when to try again
├── DeadlineExceeded    DEADLINE_EXCEEDED
├── Unimplemented       UNIMPLEMENTED        promised by the contract, not built yet
└── LeaseLost           ABORTED              another worker owns the job now; never reaches a client

An error crosses a process border as `ErrorData` and is raised there as the same class again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its proto path (`parameters.learning_rate`) and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorData:
    """An error as it is stored and sent: what `google.rpc.Status` with its details is made of."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[FieldViolation] = ()
    retry_after_seconds: float | None = None


class ServiceError(Exception):
    """A failure with a meaning for the caller. Subclasses fix the code; `reason` is stable UPPER_SNAKE."""

    code: ClassVar[str] = "UNKNOWN"
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.data = ErrorData(
            self.code, reason or self.default_reason, message, dict(metadata or {}), tuple(violations), retry_after_seconds
        )

    @property
    def reason(self) -> str:
        """The stable UPPER_SNAKE name of what happened."""
        return self.data.reason


class InvalidInput(ServiceError):
    """The request is wrong in itself; `violations` names every bad field."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_INPUT"

    @classmethod
    def of(cls, violations: Sequence[FieldViolation], reason: str | None = None) -> "InvalidInput":
        """Make one error of all bad fields."""
        return cls("; ".join(f"{v.field}: {v.description}" for v in violations), reason=reason, violations=violations)

    @classmethod
    def field(cls, name: str, description: str, reason: str | None = None) -> "InvalidInput":
        """Make the error of a single bad field."""
        return cls.of([FieldViolation(name, description)], reason)


class NotFound(ServiceError):
    """There is no such thing for this caller."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"

    @classmethod
    def of(cls, kind: str, name: str) -> "NotFound":
        """Say that no `kind` ("model", "job", …) has this id."""
        shown = name if len(name) <= 200 else name[:200] + "…"
        return cls(f"There is no {kind} {shown!r}.", reason=f"{kind.upper().replace(' ', '_')}_NOT_FOUND", metadata={"id": shown})


class AlreadyExists(ServiceError):
    """The request_id was used with another body."""

    code = "ALREADY_EXISTS"
    default_reason = "REQUEST_ID_REUSED"


class FailedPrecondition(ServiceError):
    """The request is fine, the state of things is not: in use, finished, not ready."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(ServiceError):
    """A limit is reached or a queue is full."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(ServiceError):
    """A part of the service is down or starting."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The caller's time is over."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(ServiceError):
    """The contract promises it, this version does not do it yet."""

    code = "UNIMPLEMENTED"
    default_reason = "NOT_IMPLEMENTED_YET"


class LeaseLost(ServiceError):
    """Another worker owns the job now: stop, write nothing."""

    code = "ABORTED"
    default_reason = "LEASE_LOST"


ERROR_CLASSES: Mapping[str, type[ServiceError]] = {
    cls.code: cls
    for cls in (
        InvalidInput,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Unimplemented,
        LeaseLost,
    )
}


def error_from_data(data: ErrorData) -> ServiceError:
    """Make the exception again that `data` was taken from; an unknown code becomes Unavailable."""
    return ERROR_CLASSES.get(data.code, Unavailable)(
        data.message,
        reason=data.reason,
        metadata=data.metadata,
        violations=data.violations,
        retry_after_seconds=data.retry_after_seconds,
    )
