"""Filters on documents' metadata."""

from google.protobuf.struct_pb2 import ListValue, Value
from modeltraining.v1 import retrieval_pb2

from server.api.mappers.documents import value_from_proto
from server.domain.retrieval import MetadataCondition, MetadataFilter, MetadataValue
from server.services.validation import Violations

Message = retrieval_pb2.MetadataFilter
Bound = int | float | str
MAX_VALUES = 1_000
NOT_PLAIN = "must be a text, a number or a boolean"


def filter_to_proto(where: MetadataFilter) -> Message:
    """Write a filter."""
    return Message(conditions=[_condition_to_proto(condition) for condition in where])


def filter_from_proto(message: Message, found: Violations, field: str) -> MetadataFilter:
    """Read a filter. Notes tests that are missing, and values that metadata cannot have."""
    read = [_condition_from_proto(each, found, f"{field}.conditions[{place}]") for place, each in enumerate(message.conditions)]
    return tuple(read)


def _condition_to_proto(condition: MetadataCondition) -> Message.Condition:
    if condition.exists is not None:
        return Message.Condition(key=condition.key, exists=condition.exists)
    if condition.equals is not None:
        return Message.Condition(key=condition.key, equals=_value_to_proto(condition.equals))
    if condition.any_of:
        return Message.Condition(key=condition.key, any_of=ListValue(values=[_value_to_proto(value) for value in condition.any_of]))
    least, most = (None if bound is None else _value_to_proto(bound) for bound in (condition.at_least, condition.at_most))
    return Message.Condition(key=condition.key, range=Message.Condition.Range(at_least=least, at_most=most))


def _value_to_proto(value: MetadataValue) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)


def _condition_from_proto(message: Message.Condition, found: Violations, field: str) -> MetadataCondition:
    match message.WhichOneof("test"):
        case "equals":
            return MetadataCondition(message.key, equals=_read(message.equals, found, f"{field}.equals"))
        case "any_of":
            return MetadataCondition(message.key, any_of=_read_list(message.any_of, found, f"{field}.any_of"))
        case "range":
            return _range_from_proto(message, found, f"{field}.range")
        case "exists":
            return MetadataCondition(message.key, exists=message.exists)
        case _:
            found.add(field, "must have one of equals, any_of, range and exists")
            return MetadataCondition(message.key)


def _range_from_proto(message: Message.Condition, found: Violations, field: str) -> MetadataCondition:
    given = message.range
    least = _read_bound(given.at_least, found, f"{field}.at_least") if given.HasField("at_least") else None
    most = _read_bound(given.at_most, found, f"{field}.at_most") if given.HasField("at_most") else None
    if not given.HasField("at_least") and not given.HasField("at_most"):
        found.add(field, "must have at_least, at_most or both")
    elif least is not None and most is not None and isinstance(least, str) != isinstance(most, str):
        found.add(field, "must have two numbers or two texts")
    return MetadataCondition(message.key, at_least=least, at_most=most)


def _read(value: Value, found: Violations, field: str) -> MetadataValue | None:
    plain = value_from_proto(value)
    if plain is None:
        found.add(field, NOT_PLAIN)
    return plain


def _read_bound(value: Value, found: Violations, field: str) -> Bound | None:
    plain = value_from_proto(value)
    if plain is None or isinstance(plain, bool):
        found.add(field, "must be a number or a text")
        return None
    return plain


def _read_list(values: ListValue, found: Violations, field: str) -> tuple[MetadataValue, ...]:
    if not 1 <= len(values.values) <= MAX_VALUES:
        found.add(field, f"must have 1 to {MAX_VALUES:,} values, not {len(values.values)}")
        return ()
    read = [_read(value, found, f"{field}[{place}]") for place, value in enumerate(values.values)]
    return tuple(value for value in read if value is not None)
