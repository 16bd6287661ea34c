"""The one rendering of conversations to token ids, for training, preview and serving alike.

Works on the text that the chat template writes and finds each assistant turn in it by rendering the turns before it, so it
needs no {% generation %} marks. What cannot be found faithfully is refused, never guessed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import RenderingRefused
from server.domain.generation import ChatMessage, Role
from server.domain.records import Record

# For models without a chat template of their own. The assistant's turn gets its end token from `render`.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
PROBE = (ChatMessage(Role.USER, "Hello"), ChatMessage(Role.ASSISTANT, "Hello"))


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """An assistant turn's tokens, [start, end): its content and, last, its end token."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids; `spans` says which of them are trained."""

    token_ids: list[int]
    spans: tuple[TrainedSpan, ...] = ()

    @property
    def trained_mask(self) -> tuple[bool, ...]:
        """One flag per token: whether the loss counts its prediction."""
        mask = [False] * len(self.token_ids)
        for span in self.spans:
            mask[span.start : span.end] = [True] * (span.end - span.start)
        return tuple(mask)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A text and the places in it, in characters, where an assistant turn starts and ends."""

    text: str
    turns: tuple[tuple[int, int], ...]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> Rendered:
    """Render a conversation through the chat template, with one BOS at most, as the template says.

    Training calls it on whole conversations, serving with `add_generation_prompt` on all but the answer: the ids that serving
    feeds are the ids that training saw before the answer. Raises RenderingRefused.
    """
    pieces = _lay_out(tokenizer, messages, add_generation_prompt)
    return _tokenize(tokenizer, pieces)


def render_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str | None = None) -> Rendered:
    """Render a prompt that is continued as it is, without chat template; with a completion, that and the end token are trained."""
    start = _default_bos(tokenizer) + prompt
    if completion is None:
        return _tokenize(tokenizer, _Pieces(start, ()))
    text = start + completion + str(tokenizer.eos_token)
    return _tokenize(tokenizer, _Pieces(text, ((len(start), len(text)),)))


def render_record(tokenizer: PreTrainedTokenizerBase, record: Record) -> Rendered:
    """Render a training record of either form. Raises RenderingRefused."""
    if record.is_completion:
        prompt, completion = record.messages
        return render_completion(tokenizer, prompt.content, completion.content)
    return render(tokenizer, record.messages)


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Give the tokens that end an answer: the tokenizer's end token and the one that closes the template's assistant turn."""
    rendered = render(tokenizer, PROBE)
    return frozenset({rendered.token_ids[rendered.spans[-1].end - 1], _end_id(tokenizer)})


def effective_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the chat template that `render` uses: the tokenizer's own, or the fallback."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else FALLBACK_TEMPLATE


def hash_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the SHA-256 of the effective template, by which a version is tied to it."""
    return hashlib.sha256(effective_template(tokenizer).encode()).hexdigest()


def _lay_out(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], add_generation_prompt: bool) -> _Pieces:
    text = _apply_template(tokenizer, messages, add_generation_prompt)
    turns: list[tuple[int, int]] = []
    shift = 0  # how much longer the text has become by end tokens put in
    for place, message in enumerate(messages):
        if message.role is not Role.ASSISTANT:
            continue
        found = _find_turn(tokenizer, messages, place, text, shift)
        if found is None and add_generation_prompt:
            continue  # nothing is trained here: what the template makes of earlier turns is its own affair
        if found is None:
            raise RenderingRefused(
                f"The chat template of the base model writes the assistant's turn {place} differently once more turns follow; "
                "split the conversation into one record per answer.",
                reason="TEMPLATE_REWRITES_TURNS",
            )
        start, end = found
        closed = _close_turn(tokenizer, text[start:end])
        text = text[:start] + closed + text[end:]
        shift += len(closed) - (end - start)
        turns.append((start, start + len(closed)))
    return _Pieces(text, tuple(turns))


def _find_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], place: int, text: str, shift: int
) -> tuple[int, int] | None:
    """Find one assistant turn in the whole text, `shift` characters right of where the template wrote it; None if it is rewritten."""
    before = _apply_template(tokenizer, messages[:place], add_generation_prompt=True)
    through = _apply_template(tokenizer, messages[: place + 1], add_generation_prompt=False)
    start = len(before) + shift
    # Only the common part: some templates write an end of text after the last turn alone.
    end = start + _count_common(through[len(before) :], text[start:])
    # With end tokens put in, the text's beginning no longer is the template's; its turns up to here were compared one by one.
    prefix_holds = through.startswith(before) and (shift > 0 or text.startswith(before))
    return (start, end) if prefix_holds and messages[place].content.strip() in text[start:end] else None


def _count_common(first: str, second: str) -> int:
    """Count the characters that both texts begin with."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def _close_turn(tokenizer: PreTrainedTokenizerBase, turn: str) -> str:
    """Put the end token behind a turn that the template leaves open: a model that is never shown an end never stops."""
    ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    if set(ids) & _special_ids(tokenizer):
        return turn
    content = turn.rstrip()
    return content + str(tokenizer.eos_token) + turn[len(content) :]


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], add_generation_prompt: bool) -> str:
    template = effective_template(tokenizer)
    start = _default_bos(tokenizer) if template == FALLBACK_TEMPLATE else ""
    plain = [{"role": message.role.value, "content": message.content} for message in messages]
    try:
        # transformers runs the template in jinja's immutable sandbox.
        text = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise RenderingRefused(
            f"The chat template of the base model refuses this conversation: {str(error)[:200]}", reason="TEMPLATE_REFUSES"
        ) from error
    return start + str(text)


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the BOS that this tokenizer puts before plain text, or nothing."""
    bos = tokenizer.bos_token
    if bos is None:
        return ""
    ids = tokenizer("a")["input_ids"]
    return str(bos) if ids and ids[0] == tokenizer.bos_token_id else ""


def _tokenize(tokenizer: PreTrainedTokenizerBase, pieces: _Pieces) -> Rendered:
    """Tokenise the text so that what stands before each answer has the same ids whether or not the answer follows.

    The whole text is tokenised at once; only where a token would straddle a border, the text is cut there.
    """
    ids: list[int] = []
    cut = 0
    rest = _encode(tokenizer, pieces.text)
    spans: list[TrainedSpan] = []
    for start, end in pieces.turns:
        places = []
        for border in (start, end):
            head = _encode(tokenizer, pieces.text[cut:border])
            if rest[: len(head)] != head:
                ids += head
                cut, head, rest = border, [], _encode(tokenizer, pieces.text[border:])
            places.append(len(ids) + len(head))
        spans.append(TrainedSpan(places[0], places[1]))
    ids += rest
    spans = [TrainedSpan(span.start, _end_of_content(tokenizer, ids, span)) for span in spans]
    return _drop_double_bos(tokenizer, ids, spans)


def _end_of_content(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], span: TrainedSpan) -> int:
    """Move a span's end behind its last special token: the line break that a template writes after it is not learnt."""
    special = _special_ids(tokenizer)
    last = max((place for place in range(span.start, span.end) if ids[place] in special), default=None)
    if last is None:
        raise RenderingRefused("An assistant turn has no end token after rendering.", reason="END_TOKEN_NOT_TRAINED")
    return last + 1


def _drop_double_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: Sequence[TrainedSpan]) -> Rendered:
    bos = tokenizer.bos_token_id
    doubled = bos is not None and ids[:2] == [bos, bos]
    if doubled:
        ids, spans = ids[1:], [TrainedSpan(span.start - 1, span.end - 1) for span in spans]
    return Rendered(ids, tuple(spans))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(token_id) for token_id in tokenizer.all_special_ids}


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id
