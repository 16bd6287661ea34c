"""Plain values: times, enums by their names, what was left out."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from server.services.validation import Violations

Member = TypeVar("Member", bound=StrEnum)
Number = TypeVar("Number", bound=int)


class ProtoEnum(Protocol[Number]):
    """The wrapper of a generated enum."""

    def Name(self, number: Number) -> str:  # noqa: N802  # protobuf's name
        """Give the name of a number. Raises ValueError."""

    def Value(self, name: str) -> Number:  # noqa: N802  # protobuf's name
        """Give the number of a name. Raises ValueError."""


def time_to_proto(time: datetime | None) -> Timestamp | None:
    """Write a time; None stays unset."""
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time.astimezone(UTC))
    return stamp


def enum_to_proto(kind: ProtoEnum[Number], prefix: str, value: str | None) -> Number:
    """Write a domain enum (RUNNING) as the contract's (STATE_RUNNING); None or an empty value is UNSPECIFIED."""
    return kind.Value(f"{prefix}_{value or 'UNSPECIFIED'}")


def enum_from_proto(
    kind: ProtoEnum[Number], prefix: str, number: Number, member: type[Member], found: Violations, field: str
) -> Member | None:
    """Read a contract's enum; UNSPECIFIED is None. Notes a number that the contract does not name, or that is not built yet."""
    try:
        name = kind.Name(number).removeprefix(f"{prefix}_")
    except ValueError:
        found.add(field, f"has no value {number}")
        return None
    if name == "UNSPECIFIED":
        return None
    try:
        return member(name)
    except ValueError:
        found.add(field, f"{name} is not available in this version; use {' or '.join(value.value for value in member)}")
        return None
