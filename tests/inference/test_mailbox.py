"""What a reader finds who comes late: everything, in few events, none of them over what a gRPC client takes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from server.api.mappers.generation import delta_to_proto
from server.domain.generation import Delta, FinishReason, GenerationFinished, PositionLogprobs, Timings, TokenEvent, TokenUsage
from server.inference.mailbox import MAX_JOINED_CHARACTERS, Mailbox
from server.inference.sampling import Choice
from server.inference.transcript import Transcript
from server.inference.wire import GENERATE_REPLY

CLIENTS_LIMIT_BYTES = 4 << 20  # gRPC's default for what a client receives
END = GenerationFinished(FinishReason.LENGTH, TokenUsage(1, 1), Timings(0.0, 0.0, 0.0), max_tokens=1, seed=0)


async def read_late(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """Put all events, then read."""
    mailbox = Mailbox()
    for event in events:
        mailbox.put(event)
    return [event async for event in mailbox.read()]


def list_logprobs(events: Sequence[TokenEvent]) -> list[PositionLogprobs]:
    return [position for event in events if isinstance(event, Delta) for position in event.logprobs]


def join_texts(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_no_event_is_over_what_a_client_takes_and_nothing_is_lost(tiny: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    transcript, size = Transcript(tokenizer, ()), len(tokenizer)
    events: list[TokenEvent] = []
    for number in range(16_000):
        top = [(number * place % size, -place - 1 / (number + 3)) for place in range(1, 21)]
        events += transcript.add(Choice(top[0][0], top[0][1], top), is_end=False, is_last=number == 15_999)
    whole = Delta(join_texts(events), list_logprobs(events))
    assert len(whole.logprobs) == 16_000
    assert delta_to_proto(whole).ByteSize() > CLIENTS_LIMIT_BYTES, "as one event it would be too large"
    read = await read_late([*events, END])
    *deltas, end = read
    assert end is END
    assert (join_texts(deltas), list_logprobs(deltas)) == (whole.text, whole.logprobs)
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta_to_proto(delta).ByteSize() < CLIENTS_LIMIT_BYTES / 4
        assert len(GENERATE_REPLY.encode(delta)) < CLIENTS_LIMIT_BYTES
    assert len(deltas) < 40, "as few as the limit allows"


async def test_a_text_as_long_as_a_context_is_one_event_and_a_longer_one_is_cut(tiny: Callable[[str], Path]) -> None:
    word = " خريطة\r\n"
    words = MAX_JOINED_CHARACTERS // len(word)
    (only, _) = await read_late([*[Delta(word)] * words, END])
    assert only == Delta(word * words)
    first, rest, _ = await read_late([*[Delta(word)] * (words + 1), END])
    assert (first, rest) == (Delta(word * words), Delta(word))
    assert delta_to_proto(only).ByteSize() < CLIENTS_LIMIT_BYTES / 4
