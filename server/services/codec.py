"""Domain dataclasses to JSON and back: for database columns, child processes and the engine's socket."""

from functools import cached_property
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypeForm

from server.domain.events import ChildEvent, LoggedPayload
from server.domain.orders import Order
from server.domain.specs import Spec

T = TypeVar("T")


class Codec(Generic[T]):
    """Reads and writes one type, which may be a union of dataclasses told apart by their `kind`: `Codec[Job](Job)`."""

    def __init__(self, kind: TypeForm[T]) -> None:
        self._kind = kind

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._kind)

    def encode(self, value: T) -> bytes:
        """Write UTF-8 JSON on one line."""
        return self._adapter.dump_json(value)

    def decode(self, data: bytes | str) -> T:
        """Read what `encode` wrote. Raises ValueError when it has another form."""
        try:
            return cast(T, self._adapter.validate_json(data))
        except ValidationError as error:
            raise ValueError(f"not a {self._kind}: {error.error_count()} problems, first {error.errors()[0]}") from error

    def to_json(self, value: T) -> Any:
        """Give the plain lists, dicts and scalars of a value, for a JSONB column."""
        return self._adapter.dump_python(value, mode="json")

    def from_json(self, data: object) -> T:
        """Read what `to_json` gave."""
        return cast(T, self._adapter.validate_python(data))


ORDER = Codec[Order](Order)
CHILD_EVENT = Codec[ChildEvent](ChildEvent)
LOGGED_PAYLOAD = Codec[LoggedPayload](LoggedPayload)
SPEC = Codec[Spec](Spec)
