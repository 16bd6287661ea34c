"""What turns requests to tokens and back, wherever the weights are computed: tokenizer, chat template, end tokens, forms."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import GenerationConfig, PreTrainedTokenizerBase

from server.basemodels.quoting import Quoter
from server.domain.errors import FailedPrecondition, InvalidInput, ServiceError
from server.domain.generation import GenerationParameters, GenerationRequest
from server.inference.constraints import Form, FormReader
from server.inference.prompts import DEFAULT_NEW_TOKENS, BuiltPrompt, PromptBuilder
from server.services.generating import draw_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A request that was found good: its prompt, and what it left open."""

    prompt: BuiltPrompt
    max_new_tokens: int
    seed: int
    form: Form | None


@dataclass(frozen=True)
class Voice:
    """What turns requests to tokens and back: a tokenizer, its chat template, the tokens that end an answer, and forms for answers."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    prompts: PromptBuilder
    forms: FormReader

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> "Voice":
        """Find out how answers end. Without `generation_config` the model's own list of end tokens does not count."""
        prompts = PromptBuilder(tokenizer)
        stop_ids = find_stop_ids(tokenizer, prompts, generation_config)
        return cls(tokenizer, stop_ids, prompts, FormReader(tokenizer, stop_ids))

    def prepare(self, request: GenerationRequest, context_tokens: int, vocabulary_size: int) -> Prepared:
        """Render the prompt and fix what the request left open. Blocking. Raises InvalidInput where no room for an answer is left."""
        prompt, parameters = self.prompts.build(request, context_tokens), request.parameters
        tokens = len(prompt.token_ids)
        room = context_tokens - tokens
        if room < 1:
            description = f"has {tokens} tokens, and the model's context is {context_tokens}, one of which the answer needs"
            raise InvalidInput.field("messages" if request.prompt is None else "prompt", description, "PROMPT_TOO_LONG")
        check_token_ids(parameters, vocabulary_size)
        seed = parameters.seed if parameters.seed is not None else draw_seed()
        form = None if parameters.constraint is None else self.forms.read(parameters.constraint)
        return Prepared(prompt, min(parameters.max_tokens or DEFAULT_NEW_TOKENS, room), seed, form)

    @cached_property
    def quoter(self) -> Quoter:
        """What quotes the texts of others for this tokenizer and template; made at first use."""
        return Quoter(self.tokenizer)


def check_token_ids(parameters: GenerationParameters, vocabulary_size: int) -> None:
    """Refuse ids that this model has no token for. Raises InvalidInput."""
    for name, token_ids in (("stop_token_ids", parameters.stop_token_ids), ("logit_bias", tuple(parameters.logit_bias))):
        foreign = [token_id for token_id in token_ids if not 0 <= token_id < vocabulary_size]
        if foreign:
            description = f"has {foreign[0]}, and this model's tokens are 0 to {vocabulary_size - 1}"
            raise InvalidInput.field(f"parameters.{name}", description, "TOKEN_UNKNOWN")


def check_golden_tokens(prompts: PromptBuilder, described: Mapping[str, object]) -> None:
    """Raise FailedPrecondition where a version's tokenizer and template read the probe in other tokens than when it was trained."""
    golden = described.get("golden_token_ids")
    if golden and prompts.render_probe() != golden:
        raise FailedPrecondition(
            "The version's tokenizer and chat template give other tokens here than in training: the libraries differ from those that"
            " made it.",
            reason="TOKENS_CHANGED",
        )


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, prompts: PromptBuilder, generation_config: GenerationConfig | None) -> frozenset[int]:
    """Gather the tokens that end an answer: the tokenizer's end, the end of an assistant turn, and the model's own list."""
    end = tokenizer.eos_token_id
    found = {end} if isinstance(end, int) else set(end or [])
    try:
        found |= prompts.find_stop_ids()
    except ServiceError:
        # A base model's template that cannot even render a probe: prompts still work, and end at the end token.
        logger.warning("the chat template renders no probe: only the end token ends an answer")
    listed = generation_config.eos_token_id if generation_config is not None else None
    return frozenset(found | ({listed} if isinstance(listed, int) else set(listed or [])))
