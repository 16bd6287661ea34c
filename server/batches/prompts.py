"""From a record of a dataset to what a model is asked: the record without its answer."""

from dataclasses import replace

from server.datafiles.reading import NumberedRecord
from server.domain.datasets import RecordKind
from server.domain.generation import ChatMessage, GenerationParameters, GenerationRequest, Priority, Role
from server.domain.orders import BatchOrder
from server.domain.records import Record, RecordInvalid, Turn, TurnRole
from server.services.validation import MAX_SEED


def make_request(order: BatchOrder, numbered: NumberedRecord) -> GenerationRequest:
    """Ask for the record's answer, below everybody else's requests. Raises RecordInvalid for a record that is none, or no prompt."""
    record = numbered.record
    if isinstance(record, RecordInvalid):
        raise record
    if record.kind in (RecordKind.PREFERENCE, RecordKind.RETRIEVAL):
        raise RecordInvalid("WRONG_RECORD_KIND", f"The record is of kind {record.kind.value}: there is nothing to answer.")
    asked = GenerationRequest(
        request_id=f"{order.job_id}.{numbered.number}",
        model=order.model,
        parameters=_seed(order.spec.parameters, numbered.number),
        priority=Priority.LOW,
        history=order.spec.history,
    )
    if (prompt := _find_prompt(record)) is not None:
        return replace(asked, prompt=prompt)
    return replace(asked, messages=_find_messages(record), tools=record.tools)


def _seed(parameters: GenerationParameters, number: int) -> GenerationParameters:
    """Give each record, and each of its answers, a seed of its own that depends on nothing else."""
    first = (parameters.seed or 0) + (number - 1) * parameters.n
    return replace(parameters, seed=first % (MAX_SEED + 1))


def _find_prompt(record: Record) -> str | None:
    """Give the text to continue as it is; None for a conversation."""
    if record.text and not record.turns:
        return record.text
    return record.turns[0].content if record.is_plain and len(record.turns) <= 2 else None


def _find_messages(record: Record) -> tuple[ChatMessage, ...]:
    """Give the turns up to the last one of the user or a tool: what the assistant says after it is the answer, and left out."""
    turns = list(record.turns)
    while turns and turns[-1].role is TurnRole.ASSISTANT:
        turns.pop()
    if not turns:
        raise RecordInvalid("NOTHING_TO_ANSWER", "The record has no turn of the user.")
    return tuple(_write_message(turn) for turn in turns)


def _write_message(turn: Turn) -> ChatMessage:
    # A name says which tool answers; of other turns no template reads it.
    named = (turn.name, turn.call_id) if turn.role is TurnRole.TOOL else ("", "")
    return ChatMessage(Role(turn.role.value), turn.content, turn.tool_calls, *named)
