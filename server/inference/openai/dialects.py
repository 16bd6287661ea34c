"""What each kind of server takes beyond OpenAI's own completions, and how it is said. What one cannot do is refused, never left out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from server.domain.errors import FieldViolation, Unimplemented
from server.domain.generation import GenerationRequest, OutputConstraint, Priority
from server.inference.openai.messages import Card
from server.inference.voice import Prepared

# Lower is earlier at vLLM. Servers with another policy than `--scheduling-policy priority` refuse these by themselves.
PRIORITIES: Mapping[Priority, int] = {Priority.LOW: 1, Priority.NORMAL: 0, Priority.HIGH: -1}


class Dialect(StrEnum):
    """What a server's completions take. VLLM is also what Ray Serve LLM and llm-d pass on; OPENAI is what all have in common."""

    VLLM = "VLLM"
    SGLANG = "SGLANG"
    OPENAI = "OPENAI"


@dataclass(frozen=True, slots=True)
class Order:
    """A request on its way to a server: what it asks for, what was made of it, and the tokens that end its answer."""

    request: GenerationRequest
    prepared: Prepared
    stop_ids: Sequence[int]


def recognise(cards: Sequence[Card]) -> Dialect:
    """Tell by whom the models are owned, which these servers fill in with their own name."""
    owners = {card.owned_by.upper() for card in cards}
    return next((dialect for dialect in (Dialect.VLLM, Dialect.SGLANG) if dialect.value in owners), Dialect.OPENAI)


def write_body(dialect: Dialect, served_name: str, order: Order) -> Mapping[str, object]:
    """Write a request for a completion. The prompt goes as tokens: no second template or tokenizer applies. Raises Unimplemented."""
    _refuse(_list_unknown(dialect, order.request))
    parameters = order.request.parameters
    body: dict[str, object] = {
        "model": served_name,
        "prompt": list(order.prepared.prompt.token_ids),
        "max_tokens": order.prepared.max_new_tokens,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "presence_penalty": parameters.presence_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "seed": order.prepared.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if parameters.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in parameters.logit_bias.items()}
    if parameters.logprobs is not None:
        body["logprobs"] = parameters.logprobs
    if dialect is Dialect.OPENAI:
        return {**body, "stop": list(parameters.stop)} if parameters.stop else body
    return {**body, **_write_extras(dialect, order)}


def _write_extras(dialect: Dialect, order: Order) -> Mapping[str, object]:
    parameters, constraint = order.request.parameters, order.request.parameters.constraint
    extras: dict[str, object] = {
        # Named even where they are off: a server's own default may be the model's generation_config.json.
        "top_k": parameters.top_k or -1,
        "min_p": parameters.min_p,
        "repetition_penalty": parameters.repetition_penalty,
        "stop_token_ids": sorted({*order.stop_ids, *parameters.stop_token_ids}),
        # Stop strings are looked for here: these servers hold back text for them, but not its log probabilities, which would tell.
        # The counts that come with each event are what an answer that ends here has used.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if dialect is Dialect.VLLM and parameters.logprobs is not None:
        extras["return_tokens_as_token_ids"] = True  # two tokens may have the same text
    if order.request.priority is not Priority.NORMAL:
        extras["priority"] = PRIORITIES[order.request.priority]
    if constraint is not None:
        extras |= _write_constraint(dialect, constraint)
    return extras


def _write_constraint(dialect: Dialect, constraint: OutputConstraint) -> Mapping[str, object]:
    if dialect is Dialect.SGLANG:
        return {"regex": constraint.regex} if constraint.regex else {"json_schema": constraint.json_schema}
    form = {"regex": constraint.regex} if constraint.regex else {"json": json.loads(constraint.json_schema)}
    return {"structured_outputs": form}


def _list_unknown(dialect: Dialect, request: GenerationRequest) -> Sequence[str]:
    """Name what a request asks for and a server of this kind would not take, or would take and ignore."""
    parameters = request.parameters
    asked = {
        "parameters.top_k": parameters.top_k != 0,
        "parameters.min_p": parameters.min_p != 0.0,
        "parameters.repetition_penalty": parameters.repetition_penalty != 1.0,
        "parameters.stop_token_ids": bool(parameters.stop_token_ids),
        "parameters.constraint": parameters.constraint is not None,
        "priority": request.priority is not Priority.NORMAL,
    }
    match dialect:
        case Dialect.VLLM:
            return []
        case Dialect.SGLANG:
            # Its priorities may go up or down, which only its own command line knows.
            return ["priority"] if asked["priority"] else []
        case _:
            return [name for name, is_asked in asked.items() if is_asked]


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise Unimplemented(
            f"The server of this model does not take {', '.join(names)}.",
            reason="NOT_SUPPORTED_BY_ENGINE",
            violations=[FieldViolation(name, "is not taken by the server of this model") for name in names],
        )
