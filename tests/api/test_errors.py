"""The table of errors: each class has its row, details say what a program can use, and a status always fits into trailers."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

from server.api.errors import (
    MAX_STATUS_BYTES,
    STATUS_CODES,
    code_of,
    find_status_code,
    status_from_data,
    status_from_error,
    status_from_incident,
)
from server.domain.errors import (
    ErrorData,
    FailedPrecondition,
    FieldViolation,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from tests.api.trouble import read_detail


def walk_error_classes(root: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from walk_error_classes(kind)


@pytest.mark.parametrize("kind", list(walk_error_classes()))
def test_every_error_class_has_the_code_that_it_names(kind: type[ServiceError]) -> None:
    assert find_status_code(kind("x")).name == kind.code


def test_the_table_has_no_row_without_a_class() -> None:
    assert set(STATUS_CODES) <= set(walk_error_classes())


def test_an_error_outside_the_table_is_not_guessed() -> None:
    with pytest.raises(LookupError):
        find_status_code(ServiceError("x"))


def test_every_bad_field_is_named() -> None:
    violations = [FieldViolation("parameters.learning_rate", "must be above 0"), FieldViolation("display_name", "must not be empty")]
    status = status_from_error(InvalidInput.of(violations))
    bad = read_detail(status, error_details_pb2.BadRequest)
    info = read_detail(status, error_details_pb2.ErrorInfo)
    assert bad is not None
    assert info is not None
    assert [(entry.field, entry.description) for entry in bad.field_violations] == [(v.field, v.description) for v in violations]
    assert (info.reason, info.domain) == ("INVALID_INPUT", "modeltraining")
    assert code_of(status) is grpc.StatusCode.INVALID_ARGUMENT


def test_what_to_wait_for_is_told() -> None:
    retry = read_detail(status_from_error(Unavailable("The engine is starting.", retry_after_seconds=2.5)), error_details_pb2.RetryInfo)
    assert retry is not None
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


def test_a_failed_precondition_and_a_full_quota_name_their_subject() -> None:
    failed = read_detail(
        status_from_error(FailedPrecondition("In use.", reason="MODEL_IN_USE", metadata={"used_by": "job_1"})),
        error_details_pb2.PreconditionFailure,
    )
    full = read_detail(status_from_error(ResourceExhausted("Full.", metadata={"queue": "generations"})), error_details_pb2.QuotaFailure)
    assert failed is not None
    assert full is not None
    assert (failed.violations[0].type, failed.violations[0].subject) == ("MODEL_IN_USE", "job_1")
    assert full.violations[0].subject == "generations"


@pytest.mark.parametrize("letter", ["a", "ش", "\U0001f600", "\ud800"])
def test_a_status_fits_into_trailers_whatever_is_in_it(letter: str) -> None:
    violations = [FieldViolation(f"inline_records[{place}]", letter * 1_000) for place in range(10_000)]
    status = status_from_error(InvalidInput.of(violations))
    assert status.ByteSize() <= MAX_STATUS_BYTES
    bad = read_detail(status, error_details_pb2.BadRequest)
    assert bad is not None
    named = len(bad.field_violations) - 1
    assert named > 0
    assert bad.field_violations[-1].description == f"And {10_000 - named:,} more."


def test_an_incident_says_nothing_but_its_id() -> None:
    status = status_from_incident("1234")
    info = read_detail(status, error_details_pb2.ErrorInfo)
    assert info is not None
    assert (code_of(status), dict(info.metadata)) == (grpc.StatusCode.INTERNAL, {"incident_id": "1234"})
    assert len(status.details) == 1


def test_a_stored_error_keeps_its_code() -> None:
    assert code_of(status_from_data(ErrorData("CANCELLED", "JOB_CANCELLED", "x"))) is grpc.StatusCode.CANCELLED
    assert code_of(status_from_data(ErrorData("NO_SUCH_CODE", "X", "x"))) is grpc.StatusCode.UNKNOWN


def test_not_found_shows_what_was_asked_for_but_not_all_of_it() -> None:
    assert len(status_from_error(NotFound.of("model", "x" * 100_000)).message) < 300
