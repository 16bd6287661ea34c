"""Conditions on documents' metadata as SQL, in words that the index over metadata answers where it can."""

import json
from collections.abc import Sequence
from typing import Any

from server.domain.retrieval import MetadataCondition, MetadataFilter

# A test of one document, and the value that it compares with.
_Test = tuple[str, Any]


def build_conditions(where: MetadataFilter) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Build the conditions of a filter, with their parameters. JSON's 1 equals 1.0, and neither equals true."""
    conditions: list[str] = []
    values: dict[str, Any] = {}
    for place, condition in enumerate(where):
        key = f"key_{place}"
        for number, (test, value) in enumerate(_list_tests(condition)):
            name = f"value_{place}_{number}"
            conditions.append(test.format(field=f"documents.metadata -> :{key}", key=key, value=name))
            values[name] = value
            if f":{key}" in conditions[-1]:
                values[key] = condition.key
    return tuple(conditions), values


def _list_tests(condition: MetadataCondition) -> Sequence[_Test]:
    if condition.exists is not None:
        return [("jsonb_exists(documents.metadata, :{key}) = :{value}", condition.exists)]
    if condition.equals is not None:
        # Values are scalars: to contain one is to equal it, and the index finds what contains it.
        return [("documents.metadata @> CAST(:{value} AS jsonb)", json.dumps({condition.key: condition.equals}))]
    bounds = {">=": condition.at_least, "<=": condition.at_most}
    given = [(sign, json.dumps(bound)) for sign, bound in bounds.items() if bound is not None]
    if not given:
        return [("documents.metadata @> ANY(CAST(:{value} AS jsonb[]))", [json.dumps({condition.key: one}) for one in condition.any_of])]
    # Values of another type than the bound's are outside, whatever order jsonb gives to types.
    of_type = "jsonb_typeof({field}) = jsonb_typeof(CAST(:{value} AS jsonb)) AND {field} %s CAST(:{value} AS jsonb)"
    return [(of_type % sign, bound) for sign, bound in given]
