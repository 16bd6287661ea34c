"""Generation: what is asked, pieces of text, the whole answer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from modeltraining.v1 import generation_pb2, inference_service_pb2, message_pb2

from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.generation import (
    ChatMessage,
    Delta,
    GenerationFinished,
    GenerationParameters,
    HistoryPolicy,
    ModelReference,
    OutputConstraint,
    PositionLogprobs,
    Priority,
    Role,
    Timings,
    TokenUsage,
)
from server.domain.records import ToolCall
from server.services.generating import AnswerFinished, Choice, Generation
from server.services.inference_service import Rendering
from server.services.requests import CreateBatchGeneration, Generate
from server.services.validation import Violations

ROLES = ", ".join(role.value for role in Role)

PromptMessage = inference_service_pb2.CountTokensRequest | inference_service_pb2.RenderPromptRequest
GenerateMessage = inference_service_pb2.GenerateRequest | inference_service_pb2.StreamGenerateRequest
FinishReason = inference_service_pb2.GenerateResponse.FinishReason


def generate_from_proto(message: GenerateMessage, found: Violations) -> Generate:
    """Read a generation."""
    return Generate(
        model_id=message.model_id,
        parameters=parameters_from_proto(message.parameters),
        version=message.version if message.HasField("version") else None,
        prompt=message.prompt if message.HasField("prompt") else None,
        messages=messages_from_proto(message.messages, found),
        timeout_seconds=message.timeout_seconds if message.HasField("timeout_seconds") else None,
        tools=tuple(message.tools),
        history=history_from_proto(message.history, found),
        echo_prompt=message.echo_prompt,
        priority=enum_from_proto(generation_pb2.Priority, "PRIORITY", message.priority, Priority, found, "priority") or Priority.NORMAL,
    )


def prompt_from_proto(message: PromptMessage, found: Violations) -> Generate:
    """Read a prompt that is only counted or rendered."""
    wanted = Generate(
        model_id=message.model_id,
        parameters=GenerationParameters(),
        version=message.version if message.HasField("version") else None,
        prompt=message.prompt if message.HasField("prompt") else None,
        messages=messages_from_proto(message.messages, found),
        tools=tuple(message.tools),
    )
    if isinstance(message, inference_service_pb2.CountTokensRequest):
        return wanted
    parameters = GenerationParameters(max_tokens=message.max_tokens if message.HasField("max_tokens") else None)
    return replace(wanted, parameters=parameters, history=history_from_proto(message.history, found))


def history_from_proto(number: generation_pb2.HistoryPolicy.ValueType, found: Violations) -> HistoryPolicy:
    """Read what becomes of a history that is too long; unset, it is refused."""
    policy = enum_from_proto(generation_pb2.HistoryPolicy, "HISTORY_POLICY", number, HistoryPolicy, found, "history")
    return policy or HistoryPolicy.REFUSE


def messages_from_proto(messages: Iterable[message_pb2.Message], found: Violations) -> Sequence[ChatMessage]:
    """Read a conversation. Notes unknown roles, and takes the one that is due instead, so that the other turns can be checked too."""
    turns: list[ChatMessage] = []
    for place, message in enumerate(messages):
        try:
            role = Role(message.role)
        except ValueError:
            found.add(f"messages[{place}].role", f"must be one of {ROLES}, not {message.role[:40]!r}")
            role = Role.ASSISTANT if turns and turns[-1].role is Role.USER else Role.USER
        calls = tuple(ToolCall(call.name, call.arguments, call.id) for call in message.tool_calls)
        turns.append(ChatMessage(role, message.content, calls, message.name, message.tool_call_id))
    return turns


def parameters_from_proto(message: generation_pb2.GenerationParameters) -> GenerationParameters:
    """Read sampling parameters; what was left out takes the domain's default."""
    default = GenerationParameters()
    return GenerationParameters(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        min_p=message.min_p if message.HasField("min_p") else default.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else default.repetition_penalty,
        presence_penalty=message.presence_penalty if message.HasField("presence_penalty") else default.presence_penalty,
        frequency_penalty=message.frequency_penalty if message.HasField("frequency_penalty") else default.frequency_penalty,
        stop=tuple(message.stop),
        seed=message.seed if message.HasField("seed") else None,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        n=message.n if message.HasField("n") else default.n,
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        constraint=constraint_from_proto(message.constraint) if message.HasField("constraint") else None,
    )


def parameters_to_proto(parameters: GenerationParameters) -> generation_pb2.GenerationParameters:
    """Write sampling parameters as they count; what is unlimited or off by being left out stays unset."""
    constraint = parameters.constraint
    form = {"json_schema": constraint.json_schema} if constraint and constraint.json_schema else {}
    form |= {"regex": constraint.regex} if constraint and constraint.regex else {}
    return generation_pb2.GenerationParameters(
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        stop=parameters.stop,
        seed=parameters.seed,
        logprobs=parameters.logprobs,
        n=parameters.n,
        stop_token_ids=parameters.stop_token_ids,
        logit_bias=parameters.logit_bias,
        constraint=generation_pb2.OutputConstraint(**form) if constraint else None,
    )


def batch_from_proto(message: inference_service_pb2.CreateBatchGenerationRequest, found: Violations) -> CreateBatchGeneration:
    """Read what is to be answered, and how."""
    return CreateBatchGeneration(
        model_id=message.model_id,
        dataset_id=message.dataset_id,
        parameters=parameters_from_proto(message.parameters),
        version=message.version if message.HasField("version") else None,
        history=history_from_proto(message.history, found),
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def constraint_from_proto(message: generation_pb2.OutputConstraint) -> OutputConstraint:
    """Read a form; one without any is refused by the checks."""
    return OutputConstraint(message.json_schema, message.regex)


def generation_to_proto(generation: Generation) -> inference_service_pb2.GenerateResponse:
    """Write a whole answer, or several."""
    first, finished = generation.choices[0], generation.finished
    return inference_service_pb2.GenerateResponse(
        text=first.text,
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", first.finished.finish_reason),
        usage=usage_to_proto(finished.usage),
        model_id=generation.model.model_id,
        version=generation.model.version,
        timings=timings_to_proto(finished.timings),
        logprobs=[logprobs_to_proto(position) for position in first.logprobs],
        seed=first.finished.seed,
        choices=[choice_to_proto(place, choice) for place, choice in enumerate(generation.choices)] if len(generation.choices) > 1 else [],
        rendered_prompt=first.finished.rendered_prompt,
        dropped_message_count=first.finished.dropped_messages,
        effective_parameters=parameters_to_proto(finished.parameters),
    )


def choice_to_proto(index: int, choice: Choice) -> inference_service_pb2.GenerateResponse.Choice:
    """Write one of several answers."""
    return inference_service_pb2.GenerateResponse.Choice(
        index=index,
        text=choice.text,
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", choice.finished.finish_reason),
        seed=choice.finished.seed,
        completion_tokens=choice.finished.usage.completion_tokens,
        logprobs=[logprobs_to_proto(position) for position in choice.logprobs],
    )


def delta_to_proto(delta: Delta, choice: int = 0) -> inference_service_pb2.Delta:
    """Write a piece of text."""
    logprobs = [logprobs_to_proto(position) for position in delta.logprobs]
    return inference_service_pb2.Delta(text=delta.text, logprobs=logprobs, choice=choice)


def finished_to_proto(finished: AnswerFinished, model: ModelReference) -> inference_service_pb2.StreamGenerateResponse.Finished:
    """Write the end of a streamed answer, or of several."""
    first = finished.choices[0]
    return inference_service_pb2.StreamGenerateResponse.Finished(
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", first.finish_reason),
        usage=usage_to_proto(finished.usage),
        model_id=model.model_id,
        version=model.version,
        timings=timings_to_proto(finished.timings),
        seed=first.seed,
        choices=[choice_end_to_proto(place, end) for place, end in enumerate(finished.choices)] if len(finished.choices) > 1 else [],
        rendered_prompt=first.rendered_prompt,
        dropped_message_count=first.dropped_messages,
        effective_parameters=parameters_to_proto(finished.parameters),
    )


def choice_end_to_proto(index: int, end: GenerationFinished) -> inference_service_pb2.StreamGenerateResponse.ChoiceEnd:
    """Write how one of several answers ended."""
    return inference_service_pb2.StreamGenerateResponse.ChoiceEnd(
        index=index,
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", end.finish_reason),
        seed=end.seed,
        completion_tokens=end.usage.completion_tokens,
    )


def count_to_proto(rendering: Rendering) -> inference_service_pb2.CountTokensResponse:
    """Write how long a prompt is."""
    return inference_service_pb2.CountTokensResponse(
        prompt_tokens=len(rendering.prompt.token_ids),
        context_tokens=rendering.prompt.context_tokens,
        model_id=rendering.model.model_id,
        version=rendering.model.version,
    )


def rendering_to_proto(rendering: Rendering) -> inference_service_pb2.RenderPromptResponse:
    """Write what a model would be given."""
    return inference_service_pb2.RenderPromptResponse(
        text=rendering.prompt.text,
        token_ids=rendering.prompt.token_ids,
        prompt_tokens=len(rendering.prompt.token_ids),
        context_tokens=rendering.prompt.context_tokens,
        dropped_message_count=rendering.prompt.dropped_messages,
        model_id=rendering.model.model_id,
        version=rendering.model.version,
    )


def usage_to_proto(usage: TokenUsage) -> generation_pb2.Usage:
    """Write token counts."""
    return generation_pb2.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def timings_to_proto(timings: Timings) -> generation_pb2.GenerationTimings:
    """Write how long a generation took."""
    return generation_pb2.GenerationTimings(
        queue_seconds=timings.queue_seconds,
        first_token_seconds=timings.first_token_seconds,
        total_seconds=timings.total_seconds,
        load_seconds=timings.load_seconds,
        adapter_load_seconds=timings.adapter_load_seconds,
    )


def logprobs_to_proto(position: PositionLogprobs) -> generation_pb2.TokenLogprob:
    """Write a token with the likeliest ones in its place."""
    return generation_pb2.TokenLogprob(
        token=position.chosen.token,
        logprob=position.chosen.logprob,
        alternatives=[generation_pb2.TokenLogprob.Alternative(token=item.token, logprob=item.logprob) for item in position.top],
    )
