"""Checks of plain values: every bad field at once, none too many."""

import math
from dataclasses import replace

import pytest

from server.domain.errors import InvalidInput
from server.domain.generation import ChatMessage, GenerationParameters, OutputConstraint, Role
from server.domain.records import ToolCall
from server.domain.retrieval import MetadataCondition, RetrievalOverrides
from server.domain.specs import Objective, ParametersRequest
from server.domain.techniques import FullTechnique, LoraTechnique, Technique
from server.services.training_parameters import FineTuneDefaults, check_parameters, resolve_parameters
from server.services.validation import Violations, check_generation, check_messages, check_retrieval, check_tools


def fields_of(found: Violations) -> list[str]:
    return [violation.field for violation in found.found]


def test_every_absurd_training_number_is_named_at_once() -> None:
    found = Violations()
    check_parameters(
        found, ParametersRequest(epochs=1e9, batch_size=0, learning_rate=math.nan, seed=-1, warmup_ratio=math.inf, weight_decay=-1.0)
    )
    names = ["epochs", "batch_size", "learning_rate", "warmup_ratio", "weight_decay", "seed"]
    assert fields_of(found) == [f"parameters.{name}" for name in names]
    with pytest.raises(InvalidInput) as refusal:
        found.raise_if_any()
    assert len(refusal.value.data.violations) == len(names)


def test_two_ways_to_say_the_same_are_refused() -> None:
    found = Violations()
    check_parameters(found, ParametersRequest(epochs=1, max_steps=5, warmup_steps=1, warmup_ratio=0.1))
    assert fields_of(found) == ["parameters.warmup_ratio", "parameters.max_steps"]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        (GenerationParameters(temperature=-1), "temperature"), (GenerationParameters(temperature=math.nan), "temperature"),
        (GenerationParameters(max_tokens=10**9), "max_tokens"), (GenerationParameters(max_tokens=0), "max_tokens"),
        (GenerationParameters(top_p=0), "top_p"), (GenerationParameters(top_p=1.1), "top_p"), (GenerationParameters(top_k=-1), "top_k"),
        (GenerationParameters(min_p=2), "min_p"), (GenerationParameters(stop=("",)), "stop[0]"),
        (GenerationParameters(stop=("x",) * 17), "stop"),
        (GenerationParameters(n=0), "n"), (GenerationParameters(n=17), "n"), (GenerationParameters(n=2, temperature=0), "n"),
        (GenerationParameters(stop_token_ids=(-1,)), "stop_token_ids[0]"), (GenerationParameters(logit_bias={5: 101}), "logit_bias[5]"),
        (GenerationParameters(logit_bias={-5: 1}), "logit_bias"), (GenerationParameters(constraint=OutputConstraint()), "constraint"),
        (GenerationParameters(constraint=OutputConstraint(regex="x" * 10_001)), "constraint.regex"),
        (GenerationParameters(logprobs=100), "logprobs"), (GenerationParameters(seed=-1), "seed"),
    ],
)  # fmt: skip
def test_absurd_sampling_is_refused(parameters: GenerationParameters, field: str) -> None:
    found = Violations()
    check_generation(found, parameters)
    assert fields_of(found) == [f"parameters.{field}"]


def test_sane_values_are_let_through() -> None:
    found = Violations()
    check_generation(found, GenerationParameters(max_tokens=1, temperature=0, top_p=1, top_k=5, stop=("\n",), seed=0))
    check_parameters(found, ParametersRequest(epochs=0.5, learning_rate=1e-5, warmup_ratio=0))
    check_retrieval(found, RetrievalOverrides(top_k=1, similarity_threshold=-1))
    check_messages(
        found, [ChatMessage(Role.SYSTEM, "s"), ChatMessage(Role.USER, "u"), ChatMessage(Role.ASSISTANT, "a"), ChatMessage(Role.USER, "u")]
    )
    found.raise_if_any()


@pytest.mark.parametrize(
    "roles", [[Role.ASSISTANT], [Role.SYSTEM], [Role.USER, Role.USER], [Role.USER, Role.SYSTEM, Role.USER], [Role.USER, Role.ASSISTANT]]
)
def test_turns_out_of_order_are_refused(roles: list[Role]) -> None:
    found = Violations()
    check_messages(found, [ChatMessage(role, "x") for role in roles])
    assert found.found


CALL = ToolCall("find_map", '{"town": "Sanmara"}', "c1")


def test_tools_answer_after_the_assistant_called_them() -> None:
    found = Violations()
    asked = [ChatMessage(Role.USER, "u"), ChatMessage(Role.ASSISTANT, "", (CALL,)), ChatMessage(Role.TOOL, "found", call_id="c1")]
    check_messages(found, asked)
    check_messages(found, [*asked, ChatMessage(Role.TOOL, "more"), ChatMessage(Role.ASSISTANT, "a"), ChatMessage(Role.USER, "u")])
    check_tools(found, ['{"type": "function", "function": {"name": "find_map"}}', '{"name": "other"}'], has_messages=True)
    found.raise_if_any()
    check_messages(found, asked, allows_tools=False)
    assert fields_of(found) == ["messages[2].role"]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([ChatMessage(Role.USER, "u"), ChatMessage(Role.TOOL, "t")], "messages[1].role"),
        ([ChatMessage(Role.USER, "u"), ChatMessage(Role.ASSISTANT, "a"), ChatMessage(Role.TOOL, "t")], "messages[2].role"),
        ([ChatMessage(Role.USER, "u"), ChatMessage(Role.ASSISTANT, "", (CALL,)), ChatMessage(Role.USER, "u")], "messages[2].role"),
        ([ChatMessage(Role.USER, "u", (CALL,))], "messages[0].tool_calls"),
        ([ChatMessage(Role.USER, "u", name="x")], "messages[0].name"),
        (
            [ChatMessage(Role.USER, "u"), ChatMessage(Role.ASSISTANT, "", (ToolCall("f", "[1]"),)), ChatMessage(Role.TOOL, "t")],
            "messages[1].tool_calls[0].arguments",
        ),
    ],
)
def test_tools_out_of_place_are_refused(messages: list[ChatMessage], field: str) -> None:
    found = Violations()
    check_messages(found, messages)
    assert fields_of(found) == [field]


@pytest.mark.parametrize("tool", ["{", "[]", '{"function": {}}', '{"function": {"name": 7}}'])
def test_what_names_no_tool_is_refused(tool: str) -> None:
    found = Violations()
    check_tools(found, [tool], has_messages=True)
    assert fields_of(found) == ["tools[0]"]
    check_tools(found, [], has_messages=False)
    check_tools(found, ['{"name": "f"}'], has_messages=False)
    assert fields_of(found) == ["tools[0]", "tools"]


def test_search_settings_out_of_range_are_refused() -> None:
    found = Violations()
    bad = RetrievalOverrides(top_k=0, similarity_threshold=2, max_context_tokens=0, dense_weight=-1, lexical_weight=math.nan, filter=())
    check_retrieval(found, replace(bad, max_chunks_per_document=-1, mmr_lambda=1.5))
    names = ["top_k", "similarity_threshold", "max_context_tokens", "dense_weight", "lexical_weight"]
    names += ["max_chunks_per_document", "mmr_lambda", "filter.conditions"]
    assert fields_of(found) == [f"retrieval.{name}" for name in names]


@pytest.mark.parametrize(
    ("condition", "field"),
    [
        (MetadataCondition(" ", exists=True), "key"),
        (MetadataCondition("k" * 129, exists=True), "key"),
        (MetadataCondition("k", equals="\0"), "equals"),
        (MetadataCondition("k", any_of=("a", "\ud800")), "any_of"),
        (MetadataCondition("k", at_least=math.inf), "range.at_least"),
    ],
)
def test_conditions_that_the_database_cannot_ask_are_refused(condition: MetadataCondition, field: str) -> None:
    found = Violations()
    check_retrieval(found, RetrievalOverrides(filter=(MetadataCondition("fine", equals=1), condition)))
    assert fields_of(found) == [f"retrieval.filter.conditions[1].{field}"]


def test_texts_that_the_database_cannot_keep_are_refused() -> None:
    found = Violations()
    found.text("a", "x\0", 10)
    found.text("b", "\ud800", 10)
    found.text("c", "x" * 11, 10)
    found.text("d", "  ", 10, least=1)
    assert fields_of(found) == ["a", "b", "c", "d"]


def test_what_was_left_out_takes_the_deployments_defaults() -> None:
    resolved = resolve_parameters(ParametersRequest(), FineTuneDefaults(batch_size=8, learning_rate=3e-4), LoraTechnique(), records=100)
    assert (resolved.batch_size, resolved.learning_rate) == (8, 3e-4)
    assert resolved.warmup_steps == 2  # 5 % of 38 steps
    chosen = ParametersRequest(batch_size=4, learning_rate=1e-4, seed=0)
    asked = resolve_parameters(chosen, FineTuneDefaults(8, 3e-4), LoraTechnique(), records=100)
    assert (asked.batch_size, asked.learning_rate) == (4, 1e-4)


def test_without_a_deployments_default_the_rate_suits_technique_and_objective() -> None:
    def rate(technique: Technique, objective: Objective) -> float:
        return resolve_parameters(ParametersRequest(objective=objective), FineTuneDefaults(8, None), technique, records=100).learning_rate

    assert rate(LoraTechnique(), Objective.SUPERVISED) == 1e-3
    assert rate(FullTechnique(), Objective.SUPERVISED) < rate(LoraTechnique(), Objective.SUPERVISED)
    assert rate(LoraTechnique(), Objective.DPO) < rate(LoraTechnique(), Objective.SUPERVISED) / 10


def test_preference_pairs_are_trained_by_preference_and_the_best_is_kept_where_it_can_be_known() -> None:
    defaults = FineTuneDefaults(8, None)
    pairs = resolve_parameters(ParametersRequest(), defaults, LoraTechnique(), 100, pairs=True, held_out=True)
    assert (pairs.objective, pairs.keep_best) == (Objective.DPO, True)
    plain = resolve_parameters(ParametersRequest(), defaults, LoraTechnique(), 100)
    assert (plain.objective, plain.keep_best) == (Objective.SUPERVISED, False)
