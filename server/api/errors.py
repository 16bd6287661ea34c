"""From an error to google.rpc.Status: the one table of codes, and the details that go with each. Knows nothing of how it is sent."""

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from server.domain.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ErrorData,
    FailedPrecondition,
    InvalidInput,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
    Unimplemented,
)

ERROR_DOMAIN = "modeltraining"

STATUS_CODES: Mapping[type[ServiceError], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    LeaseLost: grpc.StatusCode.ABORTED,
}

# A status travels in trailers, of which clients take 8 KiB by default: base64 adds a third, and the message is there twice,
# the second time with each byte that is not ASCII as three characters.
MAX_MESSAGE_BYTES = 600
MAX_STATUS_BYTES = 3_000
MAX_VIOLATION_BYTES = 300

INTERNAL_MESSAGE = "Something went wrong on our side. Name the incident to whoever runs this service."


def find_status_code(error: ServiceError) -> grpc.StatusCode:
    """Look an error up in the table by its class or the nearest class that it is made from."""
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    raise LookupError(f"{type(error).__name__} is in no row of the table of errors")


def status_from_error(error: ServiceError) -> status_pb2.Status:
    """Make the status that a caller gets for a failure with a meaning."""
    return _make_status(find_status_code(error), error.data)


def status_from_data(data: ErrorData) -> status_pb2.Status:
    """Make the status of an error that is stored with a job or a model."""
    return _make_status(grpc.StatusCode.__members__.get(data.code, grpc.StatusCode.UNKNOWN), data)


def status_from_incident(incident_id: str) -> status_pb2.Status:
    """Make the status of a failure that means nothing to a caller: only its incident id, which the log explains."""
    return _make_status(grpc.StatusCode.INTERNAL, ErrorData("INTERNAL", "INTERNAL", INTERNAL_MESSAGE, {"incident_id": incident_id}))


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """Give the gRPC code that stands in a status."""
    return next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)


def _make_status(code: grpc.StatusCode, data: ErrorData) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=_shorten(data.message, MAX_MESSAGE_BYTES))
    _add(status, error_details_pb2.ErrorInfo(reason=data.reason, domain=ERROR_DOMAIN, metadata=_shorten_values(data.metadata)))
    if data.retry_after_seconds is not None:
        _add(status, error_details_pb2.RetryInfo(retry_delay=_duration(data.retry_after_seconds)))
    subject = next(iter(data.metadata.values()), "")
    description = _shorten(data.message, MAX_VIOLATION_BYTES)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        failed = error_details_pb2.PreconditionFailure.Violation(type=data.reason, subject=_shorten(subject, 128), description=description)
        _add(status, error_details_pb2.PreconditionFailure(violations=[failed]))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=_shorten(subject, 128), description=description)
        _add(status, error_details_pb2.QuotaFailure(violations=[exceeded]))
    if data.violations:
        _add(status, _make_bad_request(data, MAX_STATUS_BYTES - status.ByteSize()))
    return status


def _make_bad_request(data: ErrorData, room_bytes: int) -> error_details_pb2.BadRequest:
    """Name the bad fields, as many as fit; the last entry counts the others."""
    request = error_details_pb2.BadRequest()
    for place, violation in enumerate(data.violations):
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=_shorten(violation.field, 128), description=_shorten(violation.description, MAX_VIOLATION_BYTES)
        )
        if request.ByteSize() + entry.ByteSize() + 128 > room_bytes:
            left = len(data.violations) - place
            request.field_violations.add(field="", description=f"And {left:,} more.")
            break
        request.field_violations.append(entry)
    return request


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _shorten(text: str, most_bytes: int) -> str:
    """Cut a text to a number of UTF-8 bytes; halves of surrogate pairs, which protobuf refuses, become question marks."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= most_bytes:
        return encoded.decode()
    return encoded[: most_bytes - 3].decode("utf-8", "ignore") + "…"


def _shorten_values(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: _shorten(value, MAX_VIOLATION_BYTES) for key, value in metadata.items()}
