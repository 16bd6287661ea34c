"""What such servers answer, as far as it is looked at. Recorded from vLLM 0.32; `matched_stop` is how SGLang says `stop_reason`."""

from collections.abc import AsyncGenerator, AsyncIterator

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from server.domain.errors import Unavailable

# An event holds a token or some, with at most 20 others and their probabilities.
MAX_EVENT_BYTES = 1 << 20
DATA, DONE = b"data:", b"[DONE]"


class Problem(BaseModel):
    """What went wrong. `code` is an HTTP status with vLLM; others have words there."""

    message: str = ""
    code: int | str | None = None


class Logprobs(BaseModel):
    """Log probabilities of the tokens of one event; the likeliest ones of each place, where asked for."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(BaseModel):
    """A piece of the answer. `stop_reason` is the stop string or token that ended it; None where the model's own end token did."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = Field(default=None, validation_alias=AliasChoices("stop_reason", "matched_stop"))
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    """Token counts."""

    completion_tokens: int


class Event(BaseModel):
    """One event of a stream."""

    choices: list[Choice] = Field(default_factory=list)
    usage: Usage | None = None
    error: Problem | None = None


class Card(BaseModel):
    """A model that is served: a base model, or an adapter with its `parent`. `root` is where its files came from."""

    id: str
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class Cards(BaseModel):
    """All models that are served."""

    data: list[Card]


class Failure(BaseModel):
    """The body of an error: an object in vLLM and OpenAI, flat in SGLang."""

    error: Problem | None = None
    message: str = ""


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[Event]:
    """Read server-sent events up to the closing one. Raises Unavailable for what is none; a stream that is cut just ends."""
    pending = b""
    async for piece in pieces:
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if not line.startswith(DATA):
                continue  # blank lines, comments that keep the connection alive, and names of events
            data = line[len(DATA) :].strip()
            if data == DONE:
                return
            yield read_event(data)
        if len(pending) > MAX_EVENT_BYTES:
            raise make_nonsense()


def read_event(data: bytes) -> Event:
    """Read one event. Raises Unavailable for what is none."""
    try:
        return Event.model_validate_json(data)
    except ValidationError as error:
        raise make_nonsense() from error


def make_nonsense() -> Unavailable:
    """Say that the server does not keep to the protocol."""
    return Unavailable("The server of this model answered something else than the protocol has.", reason="ENGINE_FAILED")
