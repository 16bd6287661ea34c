"""Checks of plain values. A `Violations` gathers every bad field of a request, so that a caller hears of all at once."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from server.domain.errors import FieldViolation, InvalidInput
from server.domain.generation import ChatMessage, GenerationParameters, OutputConstraint, Role
from server.domain.retrieval import MAX_CANDIDATES, MetadataFilter, RetrievalOverrides, RetrievalSettings

Number = TypeVar("Number", int, float)

MAX_NAME_CHARACTERS = 200
MAX_DESCRIPTION_CHARACTERS = 2_000
MAX_LABELS = 64
MAX_LABEL_KEY_CHARACTERS = 63
MAX_LABEL_VALUE_CHARACTERS = 255
MAX_REQUEST_ID_CHARACTERS = 128
MAX_GENERATED_TOKENS = 131_072  # the longest context among the promised models
MAX_PROMPT_CHARACTERS = 2_000_000
MAX_MESSAGES = 1_000
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 16
MAX_TOOLS = 128
MAX_TOOL_NAME_CHARACTERS = 128
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1_024
MAX_BIAS = 100
MAX_SCHEMA_CHARACTERS = 100_000
MAX_REGEX_CHARACTERS = 10_000
MAX_TOP_K = 1_000
MAX_CONTEXT_TOKENS = 131_072
MAX_WEIGHT = 100
MAX_CONDITIONS = 32
MAX_KEY_CHARACTERS = 128
MAX_VALUE_CHARACTERS = 10_000
MAX_SEED = 2**31 - 1
MAX_LOGPROBS = 20
MAX_MODEL_CHARACTERS = 512
MAX_RERANK_SECONDS = 60
MAX_SEQUENCE = 2**31 - 1  # of an event in a job's log


class Violations:
    """Gathers the bad fields of one request."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Note a bad field by its proto path."""
        self.found.append(FieldViolation(field, description))

    def extend(self, error: InvalidInput, prefix: str) -> None:
        """Note what another check found, below `prefix`."""
        for violation in error.data.violations:
            self.add(f"{prefix}{violation.field}", violation.description)

    def raise_if_any(self) -> None:
        """Raise InvalidInput with all that was noted."""
        if self.found:
            raise InvalidInput.of(self.found)

    def number(self, field: str, value: Number | None, low: float, high: float, *, above: bool = False) -> None:
        """Demand low <= value <= high (low < value where `above`). None was left out and is fine; NaN and infinity never are."""
        if value is None:
            return
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            start = f"above {low:g}" if above else f"from {_plain(low)}"
            self.add(field, f"must be {start} to {_plain(high)}, not {_plain(value)}")

    def text(self, field: str, value: str, most: int, *, least: int = 0) -> None:
        """Demand a text of least..most characters that PostgreSQL can keep."""
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            self.add(field, "must not contain NUL characters or halves of surrogate pairs")
        elif len(value.strip()) < least:
            self.add(field, "must not be empty")
        elif len(value) > most:
            self.add(field, f"must have at most {most:,} characters, not {len(value):,}")

    def labels(self, labels: Mapping[str, str]) -> None:
        """Demand short keys and values, and not too many."""
        if len(labels) > MAX_LABELS:
            self.add("labels", f"must be at most {MAX_LABELS}, not {len(labels)}")
        for key, value in labels.items():
            self.text(f"labels[{key[:MAX_LABEL_KEY_CHARACTERS]!r}]", key, MAX_LABEL_KEY_CHARACTERS, least=1)
            self.text(f"labels[{key[:MAX_LABEL_KEY_CHARACTERS]!r}]", value, MAX_LABEL_VALUE_CHARACTERS)

    def name(self, display_name: str, description: str, request_id: str = "") -> None:
        """Check what every creation carries."""
        self.text("display_name", display_name, MAX_NAME_CHARACTERS, least=1)
        self.text("description", description, MAX_DESCRIPTION_CHARACTERS)
        self.text("request_id", request_id, MAX_REQUEST_ID_CHARACTERS)


def _plain(value: float) -> str:
    is_whole = math.isfinite(value) and value == int(value) and abs(value) < 1e16
    return f"{int(value):,}" if is_whole else f"{value:g}"


def check_generation(found: Violations, parameters: GenerationParameters, prefix: str = "parameters.") -> None:
    """Check the sampling parameters."""
    number = found.number
    number(f"{prefix}max_tokens", parameters.max_tokens, 1, MAX_GENERATED_TOKENS)
    number(f"{prefix}temperature", parameters.temperature, 0, 2)
    number(f"{prefix}top_p", parameters.top_p, 0, 1, above=True)
    number(f"{prefix}top_k", parameters.top_k, 0, MAX_TOP_K)
    number(f"{prefix}min_p", parameters.min_p, 0, 1)
    number(f"{prefix}repetition_penalty", parameters.repetition_penalty, 0, 10, above=True)
    number(f"{prefix}presence_penalty", parameters.presence_penalty, -2, 2)
    number(f"{prefix}frequency_penalty", parameters.frequency_penalty, -2, 2)
    number(f"{prefix}seed", parameters.seed, 0, MAX_SEED)
    number(f"{prefix}logprobs", parameters.logprobs, 0, MAX_LOGPROBS)
    if len(parameters.stop) > MAX_STOP_STRINGS:
        found.add(f"{prefix}stop", f"must be at most {MAX_STOP_STRINGS} texts, not {len(parameters.stop)}")
    for place, stop in enumerate(parameters.stop[:MAX_STOP_STRINGS]):
        if not stop:
            found.add(f"{prefix}stop[{place}]", "must not be empty")
        found.text(f"{prefix}stop[{place}]", stop, MAX_STOP_CHARACTERS)
    _check_choices(found, parameters, prefix)
    _check_tokens(found, parameters, prefix)
    if parameters.constraint is not None:
        _check_constraint(found, parameters.constraint, f"{prefix}constraint")


def _check_choices(found: Violations, parameters: GenerationParameters, prefix: str) -> None:
    found.number(f"{prefix}n", parameters.n, 1, MAX_CHOICES)
    if parameters.n > 1 and parameters.temperature == 0:
        found.add(f"{prefix}n", "must be 1 at temperature 0: all answers would be the same")


def _check_tokens(found: Violations, parameters: GenerationParameters, prefix: str) -> None:
    """Check what names tokens by id; whether a model has them only its engine knows."""
    if len(parameters.stop_token_ids) > MAX_STOP_TOKENS:
        found.add(f"{prefix}stop_token_ids", f"must be at most {MAX_STOP_TOKENS}, not {len(parameters.stop_token_ids)}")
    for place, token_id in enumerate(parameters.stop_token_ids[:MAX_STOP_TOKENS]):
        found.number(f"{prefix}stop_token_ids[{place}]", token_id, 0, 2**31 - 1)
    if len(parameters.logit_bias) > MAX_BIASED_TOKENS:
        found.add(f"{prefix}logit_bias", f"must name at most {MAX_BIASED_TOKENS} tokens, not {len(parameters.logit_bias)}")
        return
    for token_id, bias in parameters.logit_bias.items():
        found.number(f"{prefix}logit_bias", token_id, 0, 2**31 - 1)
        found.number(f"{prefix}logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_constraint(found: Violations, constraint: OutputConstraint, field: str) -> None:
    if not constraint.json_schema and not constraint.regex:
        found.add(field, "must have a json_schema or a regex, and not an empty one")
    found.text(f"{field}.json_schema", constraint.json_schema, MAX_SCHEMA_CHARACTERS)
    found.text(f"{field}.regex", constraint.regex, MAX_REGEX_CHARACTERS)


def check_messages(found: Violations, messages: Sequence[ChatMessage], *, allows_tools: bool = True) -> None:
    """Demand an optional system turn, then user and assistant in turn, ending with the user.

    Where tools are allowed, their answers stand between an assistant's turn with calls and its next one, and may be last.
    """
    if len(messages) > MAX_MESSAGES:
        found.add("messages", f"must be at most {MAX_MESSAGES}, not {len(messages)}")
        return
    system = bool(messages) and messages[0].role is Role.SYSTEM
    last: ChatMessage | None = None
    for place, message in enumerate(messages):
        _check_message(found, message, f"messages[{place}]")
        if place == 0 and system:
            continue
        due = _find_due_roles(last)
        if message.role is Role.TOOL and not allows_tools:
            found.add(f"messages[{place}].role", "must not be tool here")
        elif message.role not in due:
            expected = " or ".join(role.value for role in due)
            description = f"is {message.role.value} where {expected} is due: user and assistant speak in turn"
            found.add(f"messages[{place}].role", description)
        last = message
    if messages and (last is None or last.role not in (Role.USER, Role.TOOL)):
        found.add("messages", "must end with a message of the user or of a tool")


def _find_due_roles(last: ChatMessage | None) -> Sequence[Role]:
    if last is None:
        return (Role.USER,)
    if last.role is Role.TOOL:
        return (Role.ASSISTANT, Role.TOOL)
    if last.role is Role.ASSISTANT:
        return (Role.TOOL,) if last.tool_calls else (Role.USER,)
    return (Role.ASSISTANT,)


def _check_message(found: Violations, message: ChatMessage, field: str) -> None:
    found.text(f"{field}.content", message.content, MAX_PROMPT_CHARACTERS, least=0 if message.tool_calls else 1)
    if message.tool_calls and message.role is not Role.ASSISTANT:
        found.add(f"{field}.tool_calls", "only the assistant calls tools")
    if (message.name or message.call_id) and message.role is not Role.TOOL:
        found.add(f"{field}.{'name' if message.name else 'tool_call_id'}", "only a tool's answer has one")
    found.text(f"{field}.name", message.name, MAX_TOOL_NAME_CHARACTERS)
    found.text(f"{field}.tool_call_id", message.call_id, MAX_TOOL_NAME_CHARACTERS)
    if len(message.tool_calls) > MAX_TOOLS:
        found.add(f"{field}.tool_calls", f"must be at most {MAX_TOOLS}, not {len(message.tool_calls)}")
    for place, call in enumerate(message.tool_calls[:MAX_TOOLS]):
        here = f"{field}.tool_calls[{place}]"
        found.text(f"{here}.id", call.call_id, MAX_TOOL_NAME_CHARACTERS)
        found.text(f"{here}.name", call.name, MAX_TOOL_NAME_CHARACTERS, least=1)
        found.text(f"{here}.arguments", call.arguments, MAX_PROMPT_CHARACTERS)
        if _parse_object(call.arguments) is None:
            found.add(f"{here}.arguments", "must be a JSON object as text")


def check_tools(found: Violations, tools: Sequence[str], *, has_messages: bool) -> None:
    """Demand JSON objects that name their tool, and a conversation that they belong to."""
    if tools and not has_messages:
        found.add("tools", "go with messages, not with a prompt")
    if len(tools) > MAX_TOOLS:
        found.add("tools", f"must be at most {MAX_TOOLS}, not {len(tools)}")
        return
    for place, tool in enumerate(tools):
        found.text(f"tools[{place}]", tool, MAX_SCHEMA_CHARACTERS)
        value = _parse_object(tool)
        function = value.get("function", value) if value is not None else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            found.add(f"tools[{place}]", "must be a JSON object as text with the name of a function")


def _parse_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_retrieval(found: Violations, retrieval: RetrievalOverrides, prefix: str = "retrieval.") -> None:
    """Check search settings."""
    found.number(f"{prefix}top_k", retrieval.top_k, 1, MAX_TOP_K)
    found.number(f"{prefix}similarity_threshold", retrieval.similarity_threshold, -1, 1)
    found.number(f"{prefix}similarity_percentile", retrieval.similarity_percentile, 0, 100)
    if retrieval.similarity_threshold is not None and retrieval.similarity_percentile is not None:
        found.add(f"{prefix}similarity_percentile", "must not be set where similarity_threshold is: one of them rules")
    found.number(f"{prefix}max_context_tokens", retrieval.max_context_tokens, 1, MAX_CONTEXT_TOKENS)
    found.number(f"{prefix}dense_weight", retrieval.dense_weight, 0, MAX_WEIGHT)
    found.number(f"{prefix}lexical_weight", retrieval.lexical_weight, 0, MAX_WEIGHT)
    found.number(f"{prefix}max_chunks_per_document", retrieval.max_chunks_per_document, 0, MAX_TOP_K)
    found.number(f"{prefix}mmr_lambda", retrieval.mmr_lambda, 0, 1)
    if retrieval.rerank is not None:
        found.text(f"{prefix}rerank.model", retrieval.rerank.model, MAX_MODEL_CHARACTERS)
        found.number(f"{prefix}rerank.candidates", retrieval.rerank.candidates, 0, MAX_CANDIDATES)
        found.number(f"{prefix}rerank.timeout_seconds", retrieval.rerank.timeout_seconds, 0, MAX_RERANK_SECONDS, above=True)
    if retrieval.filter is not None:
        _check_filter(found, retrieval.filter, f"{prefix}filter.conditions")


def check_settings(found: Violations, settings: RetrievalSettings, prefix: str = "retrieval.") -> None:
    """Check what a request's and a model's settings make together."""
    if settings.rerank is not None and settings.candidate_count < settings.top_k:
        fewest = f"must be at least top_k, which is {settings.top_k:,}, not {settings.rerank.candidates:,}"
        found.add(f"{prefix}rerank.candidates", fewest)


def _check_filter(found: Violations, where: MetadataFilter, field: str) -> None:
    if not 1 <= len(where) <= MAX_CONDITIONS:
        found.add(field, f"must be 1 to {MAX_CONDITIONS}, not {len(where)}")
        return
    for place, condition in enumerate(where):
        here = f"{field}[{place}]"
        found.text(f"{here}.key", condition.key, MAX_KEY_CHARACTERS, least=1)
        values = {
            "equals": [condition.equals],
            "any_of": condition.any_of,
            "range.at_least": [condition.at_least],
            "range.at_most": [condition.at_most],
        }
        for name, given in values.items():
            for value in given:
                if isinstance(value, str):
                    found.text(f"{here}.{name}", value, MAX_VALUE_CHARACTERS)
                elif isinstance(value, float) and not math.isfinite(value):
                    found.add(f"{here}.{name}", "must be finite")
