"""The one rendering of conversations to token ids, for training, preview and serving alike.

Works on the text that the chat template writes and finds each assistant turn in it by rendering the turns before it, so it
needs no {% generation %} marks. What cannot be found faithfully is refused, never guessed.
"""

import hashlib
import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from server.basemodels.encoding import Encoder, MarkedText, MarkedTurn, Rendered
from server.basemodels.errors import RenderingRefused
from server.domain.generation import ChatMessage, Role
from server.domain.records import Turn, TurnRole

# For models without a chat template of their own. The assistant's turn gets its end token from `render`.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
PROBE = (ChatMessage(Role.USER, "Hello"), ChatMessage(Role.ASSISTANT, "Hello"))
SYSTEM_TURN_DROPPED = "SYSTEM_TURN_DROPPED"
TOOLS_DROPPED = "TOOLS_DROPPED"

Message = ChatMessage | Turn


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> Rendered:
    """Render a conversation through the chat template, with one BOS at most, as the template says.

    Training renders whole conversations the same way, serving with `add_generation_prompt` all but the answer: the ids that
    serving feeds are the ids that training saw before the answer. Raises RenderingRefused.
    """
    renderer = Renderer(tokenizer)
    return renderer.encoder.encode(renderer.lay_out(messages, add_generation_prompt=add_generation_prompt))


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Give the tokens that end an answer: the tokenizer's end token and the one that closes the template's assistant turn."""
    rendered = render(tokenizer, PROBE)
    assert isinstance(tokenizer.eos_token_id, int)
    return frozenset({rendered.token_ids[rendered.spans[-1].end - 1], tokenizer.eos_token_id})


def effective_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the chat template that `render` uses: the tokenizer's own, or the fallback."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else FALLBACK_TEMPLATE


def hash_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the SHA-256 of the effective template, by which a version is tied to it."""
    return hashlib.sha256(effective_template(tokenizer).encode()).hexdigest()


class Renderer:
    """Lays conversations out as texts with their answers marked, and holds the encoder for them. For one tokenizer, many records."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = effective_template(tokenizer)
        self._bos = _default_bos(tokenizer)
        self.encoder = Encoder(tokenizer)
        self._endings = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self.encoder.special_ids)))

    def lay_out_plain(self, prompt: str, completion: str | None = None, weight: float = 1.0) -> MarkedText:
        """Lay out a prompt and what continues it, its end token put behind."""
        start = self._bos + prompt
        if completion is None:
            return MarkedText(start)
        text = start + completion + str(self._tokenizer.eos_token)
        return MarkedText(text, (MarkedTurn(len(start), len(text), weight),))

    def lay_out(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[str] = (),
        trained: AbstractSet[int] | None = None,
        add_generation_prompt: bool = False,
    ) -> MarkedText:
        """Write a conversation by the template and mark the assistant's turns. Those not in `trained` (None: all) get no weight.

        Raises RenderingRefused.
        """
        written = text = self.apply_template(messages, tools, add_generation_prompt)
        turns: list[MarkedTurn] = []
        shift = 0  # how much longer the text has become by end tokens put in
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            weight = message.weight if isinstance(message, Turn) else 1.0
            if trained is not None and place not in trained:
                weight = 0.0
            is_last = place == len(messages) - 1 and not add_generation_prompt
            found = self._find_turn(messages, place, text, shift, tools, written if is_last else None)
            if found is None and (add_generation_prompt or not weight):
                continue  # nothing is trained here: what the template makes of earlier turns is its own affair
            if found is None:
                raise RenderingRefused(
                    f"The chat template of the base model writes the assistant's turn {place} differently once more turns follow; "
                    "split the conversation into one record per answer, or train on the last answer only.",
                    reason="TEMPLATE_REWRITES_TURNS",
                )
            start, end = found
            closed = self._close_turn(text[start:end])
            text = text[:start] + closed + text[end:]
            shift += len(closed) - (end - start)
            turns.append(MarkedTurn(start, start + len(closed), weight))
        notes = _find_dropped(messages, text)
        if tools and self._drops_tools(messages, tools, written, add_generation_prompt):
            notes += (TOOLS_DROPPED,)
        return MarkedText(text, tuple(turns), notes)

    def apply_template(self, messages: Sequence[Message], tools: Sequence[str] = (), add_generation_prompt: bool = False) -> str:
        """Write a conversation as the template does. Raises RenderingRefused."""
        start = self._bos if self._template == FALLBACK_TEMPLATE else ""
        try:
            # transformers runs the template in jinja's immutable sandbox.
            text = self._tokenizer.apply_chat_template(
                [_to_template(message) for message in messages],
                tools=[json.loads(tool) for tool in tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise RenderingRefused(
                f"The chat template of the base model refuses this conversation: {str(error)[:200]}", reason="TEMPLATE_REFUSES"
            ) from error
        return start + str(text)

    def _drops_tools(self, messages: Sequence[Message], tools: Sequence[str], written: str, add_generation_prompt: bool) -> bool:
        """Tell whether the template leaves a tool out. A name may stand in the text by chance: without tools it must be another text."""
        names_are_written = all(_name_tool(tool) in written for tool in tools)
        return not names_are_written or self.apply_template(messages, (), add_generation_prompt) == written

    def _find_turn(
        self, messages: Sequence[Message], place: int, text: str, shift: int, tools: Sequence[str], whole: str | None
    ) -> tuple[int, int] | None:
        """Find one assistant turn in the text, `shift` characters right of where the template wrote it; None if it is rewritten.

        `whole` is what the template writes up to this turn, where that is known already.
        """
        before = self.apply_template(messages[:place], tools, add_generation_prompt=True)
        through = whole if whole is not None else self.apply_template(messages[: place + 1], tools)
        start = len(before) + shift
        # Only the common part: some templates write an end of text after the last turn alone.
        end = start + _count_common(through[len(before) :], text[start:])
        # With end tokens put in, the text's beginning no longer is the template's; its turns up to here were compared one by one.
        prefix_holds = through.startswith(before) and (shift > 0 or text.startswith(before))
        return (start, end) if prefix_holds and _says(messages[place], text[start:end]) else None

    def _close_turn(self, turn: str) -> str:
        """Put the end token behind a turn that the template leaves open: a model that is never shown an end never stops."""
        content = turn.rstrip()
        if content.endswith(self._endings) or set(self.encoder.plain_ids(turn[-MAX_CLOSING_CHARACTERS:])) & self.encoder.special_ids:
            return turn
        return content + str(self._tokenizer.eos_token) + turn[len(content) :]


# An end token stands at the end of a turn; before that only the answer's own words do.
MAX_CLOSING_CHARACTERS = 200


def _says(message: Message, text: str) -> bool:
    """Tell whether the text has the message's words and calls."""
    return message.content.strip() in text and all(call.name in text for call in message.tool_calls)


def _find_dropped(messages: Sequence[Message], text: str) -> tuple[str, ...]:
    """Find what the template leaves out of a conversation's turns without a word."""
    if messages and messages[0].role == "system" and messages[0].content.strip() not in text:
        return (SYSTEM_TURN_DROPPED,)
    return ()


def _name_tool(tool: str) -> str:
    value = json.loads(tool)
    function = value.get("function", value)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _count_common(first: str, second: str) -> int:
    """Count the characters that both texts begin with."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])


def _to_template(message: Message) -> dict[str, Any]:
    """Write a message as chat templates expect it: JSON of any depth where it has calls."""
    plain: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", **({"id": call.call_id} if call.call_id else {})}
            | {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.role in (TurnRole.TOOL, Role.TOOL):
        plain |= {key: value for key, value in (("name", message.name), ("tool_call_id", message.call_id)) if value}
    return plain


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the BOS that this tokenizer puts before plain text, or nothing."""
    bos = tokenizer.bos_token
    if bos is None:
        return ""
    ids = tokenizer("a")["input_ids"]
    return str(bos) if ids and ids[0] == tokenizer.bos_token_id else ""
