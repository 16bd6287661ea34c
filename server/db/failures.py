"""What PostgreSQL's errors mean to a caller. Whatever is not named here is a fault of ours and stays as it is."""

from psycopg import Error
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.domain.errors import InvalidInput, ResourceExhausted, ServiceError, Unavailable

RETRY_AFTER_SECONDS = 1.0
# Characters that no text column holds (NUL, half a surrogate pair), numbers out of range, vectors of another dimension.
_BAD_VALUES = frozenset({"22021", "22P02", "22P05", "22003", "22000"})
# Deadlock, lock or statement took too long: the same may well succeed a moment later.
_PASSING = frozenset({"40001", "40P01", "55P03", "57014"})
_DISK_FULL = "53100"


class ValueNotStorable(ValueError):
    """A value was refused before PostgreSQL saw it."""


def translate_failure(error: Exception) -> ServiceError | None:
    """Give the error that a caller should see instead, or None."""
    # Values are bound inside or outside of SQLAlchemy's own error handling.
    cause = error.orig if isinstance(error, StatementError) else error
    if isinstance(cause, ValueNotStorable | UnicodeEncodeError):
        return _bad_value()
    if isinstance(error, PoolTimeout):
        return Unavailable("The database is busy. Try again.", reason="DATABASE_BUSY", retry_after_seconds=RETRY_AFTER_SECONDS)
    if isinstance(error, DBAPIError) and isinstance(error.orig, Error):
        return _translate_sqlstate(error, error.orig.sqlstate)
    return None


def _translate_sqlstate(error: DBAPIError, sqlstate: str | None) -> ServiceError | None:
    # psycopg refuses a NUL itself, without a state.
    if sqlstate in _BAD_VALUES or (sqlstate is None and type(error).__name__ == "DataError"):
        return _bad_value()
    if sqlstate in _PASSING:
        return Unavailable("The database is busy. Try again.", reason="DATABASE_BUSY", retry_after_seconds=RETRY_AFTER_SECONDS)
    if sqlstate == _DISK_FULL:
        return ResourceExhausted("The database's disk is full.", reason="DISK_FULL")
    if error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError"):
        return Unavailable(
            "The database is not answering. Try again.", reason="DATABASE_UNAVAILABLE", retry_after_seconds=RETRY_AFTER_SECONDS
        )
    return None


def _bad_value() -> InvalidInput:
    return InvalidInput("A text or number in the request is one that cannot be stored.", reason="VALUE_NOT_STORABLE")


def violated_constraint(error: DBAPIError) -> str:
    """Name the constraint that an IntegrityError tells of, or give an empty text."""
    return (error.orig.diag.constraint_name or "") if isinstance(error.orig, Error) else ""
