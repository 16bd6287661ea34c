"""Answers to fixed prompts by the model as it is now, for the job's log: greedy, so that only the weights change them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from server.basemodels.errors import RenderingRefused
from server.basemodels.loading import count_context_tokens
from server.basemodels.rendering import find_stop_token_ids, render
from server.domain.events import Warned
from server.domain.generation import ChatMessage, Role
from server.domain.specs import TrainingParameters
from server.training.randomness import untouched_random_state

# Every architecture has it, and one query against cached keys gains nothing from another kind.
GENERATING_ATTENTION = "eager"
REFUSED = "SAMPLE_PROMPT_REFUSED"
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Sampler:
    """Prompts as token ids, ready to be put to the model again and again."""

    model: PeftModel | PreTrainedModel
    causal: PreTrainedModel  # the same without adapters' wrapping
    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, list[int]]
    max_tokens: int

    def answer(self, check: Callable[[], None]) -> list[tuple[str, str]]:
        """Give each prompt with its answer. `check` may raise between tokens; random numbers and mode stay as they were."""
        was_training = self.model.training
        attention = self.causal.config._attn_implementation
        self.model.eval()
        self.causal.set_attn_implementation(GENERATING_ATTENTION)
        try:
            with torch.no_grad(), untouched_random_state():
                return [(prompt, self._generate(ids, check)) for prompt, ids in self.prompts.items()]
        finally:
            self.causal.set_attn_implementation(attention)
            self.model.train(was_training)

    def _generate(self, ids: list[int], check: Callable[[], None]) -> str:
        stops = sorted(find_stop_token_ids(self.tokenizer))
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            do_sample=False, num_beams=1, max_new_tokens=self.max_tokens, eos_token_id=stops, pad_token_id=stops[0]
        )
        prompt = torch.tensor([ids], device=self.model.device)
        generate = cast(Callable[..., torch.Tensor], self.model.generate)
        generated = generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Check(check)]),
        )
        return str(self.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True))


class _Check(StoppingCriteria):
    """Looks between tokens whether to go on."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Stop nothing, but let the check raise."""
        self._check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def make_sampler(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainingParameters, warn: Callable[[Warned], None]
) -> Sampler | None:
    """Render the sample prompts, each as a user's only message; None without any. One that the model cannot be asked is warned of."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal, PreTrainedModel)
    room = count_context_tokens(causal) - settings.sample_tokens
    prompts = {}
    for prompt in settings.sample_prompts:
        try:
            ids = render(tokenizer, (ChatMessage(Role.USER, prompt),), add_generation_prompt=True).token_ids
        except RenderingRefused as error:
            warn(Warned(REFUSED, f'The sample prompt "{prompt[:SHOWN_CHARACTERS]}" is left out: {error}'))
            continue
        if len(ids) > room:
            left_out = f"is left out: it has {len(ids)} tokens, and the context has room for {room}."
            warn(Warned(REFUSED, f'The sample prompt "{prompt[:SHOWN_CHARACTERS]}" {left_out}'))
            continue
        prompts[prompt] = ids
    return Sampler(model, causal, tokenizer, prompts, settings.sample_tokens) if prompts else None
