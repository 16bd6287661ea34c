"""Batches of requests over tiny models, stepped by hand, and what transformers itself says."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from server.domain.errors import ServiceError
from server.domain.generation import Delta, GenerationParameters
from server.inference.batching import Batch, BatchLimits
from server.inference.generations import Generation
from server.inference.library import LoadedModel, LoadingOptions, WeightFiles, load_model
from server.inference.plans import ServingPlan, Weights
from server.inference.sampling import SamplingState
from server.inference.transcript import Transcript

LIMITS = BatchLimits(max_rows=6, max_waiting=4, cache_tokens=2048, prompt_tokens_per_step=16)
_names: Iterator[int] = count()


def load(directory: Path, limits: BatchLimits = LIMITS) -> LoadedModel:
    """Load a tiny model in float32."""
    return load_model(WeightFiles(directory), ServingPlan("", Weights("tiny")), LoadingOptions(limits, dtype=torch.float32))


def make_generation(model: LoadedModel, prompt_ids: Sequence[int], tokens: int = 12, **parameters: object) -> Generation:
    """Make a request that is greedy unless told otherwise, and ends at its length."""
    chosen = GenerationParameters(**{"temperature": 0.0, **parameters})  # type: ignore[arg-type]
    return Generation(
        f"g{next(_names)}", prompt_ids, tokens, frozenset(), SamplingState(chosen, 0, prompt_ids), Transcript(model.voice.tokenizer, ())
    )


def run(batch: Batch, *generations: Generation) -> dict[str, list[int]]:
    """Give what each says when all come at once."""
    for generation in generations:
        batch.submit(generation)
    said = Recorder(generations)
    while batch.has_work:
        said.take(batch)
    return said.tokens


class Recorder:
    """Notes each generation's tokens while a batch steps, and their log probabilities where those were asked for."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.watched = list(generations)
        self.tokens: dict[str, list[int]] = {g.request_id: [] for g in generations}
        self.logprobs = defaultdict[str, list[float]](list)
        self.errors: dict[str, ServiceError] = {}

    def take(self, batch: Batch) -> None:
        """Step once."""
        before = {g.request_id: g.generated_tokens for g in self.watched}
        for output in batch.step():
            if isinstance(output.event, ServiceError):
                self.errors[output.generation.request_id] = output.event
            elif isinstance(output.event, Delta) and output.event.logprobs:
                self.logprobs[output.generation.request_id] += [position.chosen.logprob for position in output.event.logprobs]
        for g in self.watched:
            grown = g.generated_tokens - before[g.request_id]
            assert grown <= 2, "a prompt's first token and one decoding step at most"
            if grown:
                self.tokens[g.request_id].append(g.last_token)


def reference_tokens(directory: Path, prompt_ids: Sequence[int], tokens: int) -> list[int]:
    """Give what transformers' generate says."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=[], pad_token_id=0)
    return list(output[0, len(prompt_ids) :].tolist())


def make_prompts(count_: int, longest: int = 60) -> list[list[int]]:
    """Make prompts of 3 tokens and more."""
    generator = torch.Generator().manual_seed(7)
    lengths = [3 + (longest - 3) * i // max(1, count_ - 1) for i in range(count_)]
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in lengths]
