"""From a request to the tokens that a model is given: through its chat template, within a limit of time, and within its context."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from server.basemodels.encoding import MarkedText
from server.basemodels.errors import RenderingRefused
from server.basemodels.rendering import PROBE, TOOLS_DROPPED, Renderer, find_stop_token_ids, render
from server.domain.errors import InvalidInput
from server.domain.generation import ChatMessage, GenerationRequest, HistoryPolicy, Role
from server.inference.timelimit import run_within

T = TypeVar("T")
# Templates take milliseconds; 1,000 turns that are each laid out anew some seconds.
TEMPLATE_SECONDS = 5.0
# A template that hung is not tried again before: each attempt keeps a core and Python's lock busy for as long as it may take.
TEMPLATE_PAUSE_SECONDS = 60.0
# What a request without max_tokens gets, where the context has room for it.
DEFAULT_NEW_TOKENS = 512
# Of a context too short for that, so much is kept for the answer where old turns make way for it.
ANSWER_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """What the model is given. `dropped_messages` were left out of the history, oldest first."""

    text: str
    token_ids: Sequence[int]
    dropped_messages: int = 0


class PromptBuilder:
    """Builds prompts with one tokenizer and its chat template; from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._paused_until = 0.0

    def build(self, request: GenerationRequest, context_tokens: int) -> BuiltPrompt:
        """Render a request; where its policy allows it, without the oldest turns that leave no room. Blocking.

        Raises InvalidInput where the prompt is empty, RenderingRefused where the template does not take it.
        """
        renderer = Renderer(self._tokenizer)
        if request.prompt is not None:
            built = _encode(renderer, renderer.lay_out_plain(request.prompt), 0)
        else:
            built = self._lay_out(renderer, request, 0)
            wanted = min(request.parameters.max_tokens or DEFAULT_NEW_TOKENS, max(1, int(context_tokens * ANSWER_SHARE)))
            if request.history is HistoryPolicy.DROP_OLDEST and len(built.token_ids) + wanted > context_tokens:
                built = self._drop_oldest(renderer, request, context_tokens - wanted)
        if not built.token_ids:
            raise InvalidInput.field("messages" if request.prompt is None else "prompt", "is empty", "PROMPT_EMPTY")
        return built

    def find_stop_ids(self) -> frozenset[int]:
        """Give the tokens that end an answer, as the template closes it. Raises RenderingRefused."""
        return self._limit(lambda: find_stop_token_ids(self._tokenizer))

    def render_probe(self) -> list[int]:
        """Render the probe by whose tokens a version is tied to its template. Raises RenderingRefused."""
        return self._limit(lambda: render(self._tokenizer, PROBE)).token_ids

    def _drop_oldest(self, renderer: Renderer, request: GenerationRequest, room: int) -> BuiltPrompt:
        """Leave out as few of the oldest exchanges as make the rest fit, found by halving; all but the last where none does."""
        starts = _list_starts(request.messages)
        low, high = min(1, len(starts) - 1), len(starts) - 1
        best = self._lay_out(renderer, request, starts[high])
        while low < high:
            middle = (low + high) // 2
            tried = self._lay_out(renderer, request, starts[middle])
            if len(tried.token_ids) <= room:
                best, high = tried, middle
            else:
                low = middle + 1
        return best

    def _lay_out(self, renderer: Renderer, request: GenerationRequest, dropped: int) -> BuiltPrompt:
        """Render the conversation without its first `dropped` messages after the system turn."""
        messages = list(request.messages)
        system = 1 if messages[0].role is Role.SYSTEM else 0
        kept = messages[:system] + messages[system + dropped :]
        marked = self._limit(lambda: renderer.lay_out(kept, tools=request.tools, add_generation_prompt=True))
        if TOOLS_DROPPED in marked.notes:
            raise InvalidInput.field("tools", "cannot be given to this model: its chat template writes none", "TOOLS_NOT_SUPPORTED")
        return _encode(renderer, marked, dropped)

    def _limit(self, work: Callable[[], T]) -> T:
        if time.monotonic() < self._paused_until:
            raise _refuse_slow()
        try:
            return run_within(TEMPLATE_SECONDS, work)
        except TimeoutError:
            self._paused_until = time.monotonic() + TEMPLATE_PAUSE_SECONDS
            raise _refuse_slow() from None


def _encode(renderer: Renderer, marked: MarkedText, dropped: int) -> BuiltPrompt:
    return BuiltPrompt(marked.text, renderer.encoder.encode(marked).token_ids, dropped)


def _list_starts(messages: Sequence[ChatMessage]) -> Sequence[int]:
    """Give how many messages after the system turn may be left out: up to each of the user's turns."""
    turns = messages[1:] if messages[0].role is Role.SYSTEM else messages
    return [place for place, message in enumerate(turns) if message.role is Role.USER] or [0]


def _refuse_slow() -> RenderingRefused:
    return RenderingRefused(f"The model's chat template took longer than {TEMPLATE_SECONDS:g} s.", reason="TEMPLATE_TOO_SLOW")
