"""One request on its way through a batch: what it asks for, where it stands, and what it took."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from server.domain.generation import FinishReason, GenerationFinished, Priority, Timings, TokenUsage
from server.inference.lora import NamedAdapter
from server.inference.sampling import SamplingState
from server.inference.transcript import Transcript

# A priority is a head start on those that arrived earlier, in seconds: so whoever waits comes first at some time.
HEAD_START_SECONDS: Mapping[Priority, float] = {Priority.LOW: -30.0, Priority.NORMAL: 0.0, Priority.HIGH: 10.0}


@dataclass(eq=False)
class Generation:
    """One request on its way through a batch. `request_id` is the batch's name for it; `adapter` None is the bare base.

    `prefix` [layers, 2 x key heads, tokens, head size] is what the cache holds before the prompt: a version's virtual tokens. Choices of
    one answer have the same `choice_of`; they keep `prompt_logits` [1, vocabulary], those after the prompt, for others that come later.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    sampling: SamplingState
    transcript: Transcript
    adapter: NamedAdapter | None = None
    prefix: torch.Tensor | None = None
    priority: Priority = Priority.NORMAL
    received_seconds: float = field(default_factory=time.monotonic)
    load_seconds: float = 0.0
    adapter_load_seconds: float = 0.0
    dropped_messages: int = 0
    rendered_prompt: str | None = None
    choice_of: str = ""
    prompt_logits: torch.Tensor | None = None
    queued_seconds: float = field(default_factory=time.monotonic)
    started_seconds: float = 0.0
    first_token_seconds: float = 0.0
    row: int = -1
    cached_tokens: int = 0
    generated_tokens: int = 0
    last_token: int = -1

    @property
    def turn_seconds(self) -> float:
        """Its place among those that wait, smallest first."""
        return self.queued_seconds - HEAD_START_SECONDS[self.priority]

    @property
    def adapter_name(self) -> str | None:
        """The pool's name for its adapter."""
        return None if self.adapter is None else self.adapter.name

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens before the prompt."""
        return 0 if self.prefix is None else self.prefix.shape[2]

    @property
    def reserved_tokens(self) -> int:
        """Cache tokens that it may come to need."""
        return self.prefix_tokens + len(self.prompt_ids) + self.max_new_tokens

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens that the model has not seen yet."""
        return self.prefix_tokens + len(self.prompt_ids) - self.cached_tokens

    def shares_prompt(self, other: "Generation") -> bool:
        """Tell whether another's prompt, once read, stands for its own: both are choices of one answer, by the same weights."""
        if not self.choice_of or self.choice_of != other.choice_of:
            return False
        return self.adapter_name == other.adapter_name and self.prefix is other.prefix and self.prompt_ids == other.prompt_ids

    def finish(self, reason: FinishReason) -> GenerationFinished:
        """Make the final event."""
        end, start = time.monotonic(), self.received_seconds
        queued = self.started_seconds - self.queued_seconds
        timings = Timings(queued, self.first_token_seconds - start, end - start, self.load_seconds, self.adapter_load_seconds)
        usage = TokenUsage(len(self.prompt_ids), self.generated_tokens)
        seed, dropped = self.sampling.seed, self.dropped_messages
        return GenerationFinished(reason, usage, timings, self.max_new_tokens, seed, dropped, self.rendered_prompt)
