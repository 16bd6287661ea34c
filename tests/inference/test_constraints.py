"""Answers in a given form: whatever a random model would say, the text keeps to the schema or the expression."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # it has no stubs that are installed
import pytest
from transformers import AutoTokenizer

from server.domain.errors import FailedPrecondition, InvalidInput
from server.domain.generation import FinishReason, OutputConstraint
from server.inference.constraints import FormReader
from server.inference.engine import EmbeddedEngine
from tests.inference.asking import ask, collect

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["map", "house"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "count", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_json_keeps_to_its_schema(engine: EmbeddedEngine, temperature: float) -> None:
    constraint = OutputConstraint(json_schema=json.dumps(SCHEMA))
    for seed in range(1 if temperature == 0 else 3):
        answer = await collect(engine.generate(ask("The river", max_tokens=300, temperature=temperature, seed=seed, constraint=constraint)))
        assert answer.end.finish_reason is FinishReason.STOP
        value = json.loads(answer.text)
        jsonschema.validate(value, SCHEMA)
        assert list(value) == list(SCHEMA["properties"])  # type: ignore[call-overload]  # a dict of dicts


async def test_a_regular_expression_matches_the_whole_text(engine: EmbeddedEngine) -> None:
    pattern = r"(yes|no), [0-9]{4}-[0-9]{2} (خريطة|بيت)"
    answer = await collect(engine.generate(ask("The river", max_tokens=80, constraint=OutputConstraint(regex=pattern), logprobs=0)))
    assert re.fullmatch(pattern, answer.text), answer.text
    free = await collect(engine.generate(ask("The river", max_tokens=80)))
    assert not re.fullmatch(pattern, free.text)


async def test_forms_do_not_touch_the_other_requests_of_a_batch(engine: EmbeddedEngine) -> None:
    alone = (await collect(engine.generate(ask("The river", max_tokens=30)))).text
    free = engine.generate(ask("The river", max_tokens=30))
    await anext(free)
    bound = await collect(engine.generate(ask("The river", max_tokens=10, constraint=OutputConstraint(regex="a{6}"))))
    assert bound.text == "aaaaaa"
    rest = await collect(free)
    assert alone.endswith(rest.text)


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (OutputConstraint(regex="(a|b"), "regex"),
        (OutputConstraint(regex="a(?=b)"), "regex"),
        (OutputConstraint(json_schema="{"), "json_schema"),
        (OutputConstraint(json_schema='{"type": "strang"}'), "json_schema"),
        (OutputConstraint(json_schema='{"$ref": "https://example.com/schema.json"}'), "json_schema"),
        (OutputConstraint(json_schema="[" * 100_000), "json_schema"),
    ],
)
async def test_what_is_no_form_is_refused_by_name(engine: EmbeddedEngine, constraint: OutputConstraint, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await collect(engine.generate(ask("The river", constraint=constraint)))
    assert refused.value.reason == "CONSTRAINT_INVALID"
    assert refused.value.data.violations[0].field == f"parameters.constraint.{field}"


async def test_a_form_that_outgrows_the_parser_fails_its_own_request_only(engine: EmbeddedEngine) -> None:
    steady = engine.generate(ask("The river", max_tokens=200, logit_bias={1: -100.0}))
    await anext(steady)
    constraint = OutputConstraint(regex="(.*(a|e|i)[a-z ]{1,90}.*[n-z].{1,200}){30}x")
    with pytest.raises(FailedPrecondition) as failed:
        await collect(engine.generate(ask("The river", max_tokens=400, temperature=2.0, seed=1, constraint=constraint)))
    assert failed.value.reason == "CONSTRAINT_FAILED"
    assert (await collect(steady)).end.usage.completion_tokens == 200


def test_a_form_that_is_too_large_is_refused_at_once(tiny: Callable[[str], Path]) -> None:
    reader = FormReader(AutoTokenizer.from_pretrained(tiny("llama")), frozenset({1}))
    with pytest.raises(InvalidInput):
        reader.read(OutputConstraint(json_schema=json.dumps({"enum": [f"{number:09}" * 30 for number in range(40_000)]})))
