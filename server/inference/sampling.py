"""Choosing the next token of every row of a batch at once. Each request has random numbers of its own, whatever else is in the batch.

Order as in transformers: penalties, bias and form, temperature, top-k, top-p, min-p. One uniform number per token, read off the
distribution in vocabulary order, so that rounding differences between batches seldom change a choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from server.domain.generation import GenerationParameters
from server.inference.constraints import Form

# top-p looks among so many of the likeliest tokens first, and sorts the whole vocabulary only where they do not reach it.
NUCLEUS_CANDIDATES = 1024


@dataclass
class SamplingState:
    """What sampling knows of one request: its parameters, its random numbers, the tokens so far, and the form that they keep."""

    parameters: GenerationParameters
    seed: int
    prompt_ids: Sequence[int]
    form: Form | None = None
    generator: torch.Generator = field(init=False)
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def is_greedy(self) -> bool:
        """True at temperature 0."""
        return self.parameters.temperature <= 0

    @property
    def has_penalties(self) -> bool:
        """True where some penalty is not neutral."""
        p = self.parameters
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def shapes_scores(self) -> bool:
        """True where the scores are not taken as the model gives them."""
        return self.has_penalties or bool(self.parameters.logit_bias) or self.form is not None

    def record(self, token_id: int) -> None:
        """Note a token that was generated."""
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        if self.form is not None:
            self.form.advance(token_id)


@dataclass(frozen=True)
class Choice:
    """The chosen token; where asked for, its log probability and the likeliest tokens with theirs, as the model gives them."""

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def choose_tokens(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[Choice]:
    """Choose one token per row of logits [rows, vocabulary]. Rows whose logits are not finite, or whose form fails, give token -1."""
    scores = logits.float()
    # NaN and infinity show in the largest score, and so does a row of nothing but -inf: a twelfth of the time of logsumexp.
    finite = torch.isfinite(scores.amax(dim=-1)).tolist()
    raw = scores
    if any(state.shapes_scores for state in states):
        scores = scores.clone()
        for row, state in enumerate(states):
            if state.shapes_scores:
                _shape(scores[row], state)
    chosen = scores.argmax(dim=-1)
    sampled = [row for row, state in enumerate(states) if not state.is_greedy and finite[row]]
    if sampled:
        everyone = len(sampled) == len(states)
        drawn = _sample(scores if everyone else scores[sampled], [states[row] for row in sampled])
        chosen[torch.tensor(sampled, device=chosen.device)] = drawn
    token_ids = chosen.tolist()
    choices = []
    for row, state in enumerate(states):
        is_lost = not finite[row] or (state.form is not None and state.form.has_failed)
        token_id = -1 if is_lost else int(token_ids[row])
        choices.append(_describe(raw[row], token_id, state.parameters.logprobs))
    return choices


def _shape(scores: torch.Tensor, state: SamplingState) -> None:
    """Apply penalties, bias and form in place to one row."""
    if state.has_penalties:
        _penalise(scores, state)
    bias = state.parameters.logit_bias
    if bias:
        scores[torch.tensor(list(bias), device=scores.device)] += torch.tensor(list(bias.values()), device=scores.device)
    if state.form is not None:
        state.form.mask(scores)


def _penalise(scores: torch.Tensor, state: SamplingState) -> None:
    """Apply penalties in place to one row. Repetition (CTRL, arXiv 1909.05858) counts the prompt too; presence and frequency do not."""
    parameters = state.parameters
    if parameters.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*state.prompt_ids, *state.counts}), device=scores.device)
        known = scores[seen]
        scores[seen] = torch.where(known > 0, known / parameters.repetition_penalty, known * parameters.repetition_penalty)
    if state.counts and (parameters.presence_penalty or parameters.frequency_penalty):
        generated = torch.tensor(list(state.counts), device=scores.device)
        counts = torch.tensor(list(state.counts.values()), dtype=scores.dtype, device=scores.device)
        scores[generated] -= parameters.presence_penalty + parameters.frequency_penalty * counts


def _sample(scores: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    parameters = [state.parameters for state in states]
    temperatures = torch.tensor([p.temperature for p in parameters], dtype=torch.float64).clamp(min=1e-6)
    # Divided in float64 against the largest score: tiny temperatures do not overflow.
    shifted = (scores - scores.amax(dim=-1, keepdim=True)).double() / temperatures.to(scores.device).unsqueeze(1)
    scaled = keep_candidates(shifted.float(), parameters)
    cumulative = torch.softmax(scaled, dim=-1).double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=state.generator, dtype=torch.float64) for state in states])
    targets = uniform.to(scores.device) * cumulative[:, -1:]
    # right=True: the first token whose cumulative probability is above the target, which never is one of probability 0.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def keep_candidates(scores: torch.Tensor, parameters: Sequence[GenerationParameters]) -> torch.Tensor:
    """Set to -inf what top-k, top-p and min-p exclude, per row of scores [rows, vocabulary] after temperature."""
    vocabulary = scores.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in parameters]
    if any(top_k):
        best = scores.topk(max(top_k), dim=-1).values
        for row, k in enumerate(top_k):
            if k:
                scores[row].masked_fill_(scores[row] < best[row, k - 1], float("-inf"))
    for row, p in enumerate(parameters):
        if p.top_p < 1.0:
            _keep_nucleus(scores[row], p.top_p)
    min_p = torch.tensor([p.min_p for p in parameters], device=scores.device).unsqueeze(1)
    if bool((min_p > 0).any()):
        # p < min_p * p_max, as logits: normalisation cancels out.
        scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + min_p.log(), float("-inf"))
    return scores


def _keep_nucleus(scores: torch.Tensor, top_p: float) -> None:
    """Keep, in place, the fewest likeliest tokens of one row whose probabilities reach top_p (arXiv 1904.09751)."""
    normaliser = scores.logsumexp(dim=-1)
    for count in (min(NUCLEUS_CANDIDATES, scores.shape[0]), scores.shape[0]):
        best = scores.topk(count).values
        cumulative = (best - normaliser).exp().double().cumsum(dim=-1)
        reached = torch.nonzero(cumulative >= top_p)
        if len(reached):
            scores.masked_fill_(scores < best[int(reached[0])], float("-inf"))
            return


def _describe(raw: torch.Tensor, token_id: int, wanted: int | None) -> Choice:
    if wanted is None or token_id < 0:
        return Choice(token_id)
    logprobs = raw.log_softmax(dim=-1)
    best = logprobs.topk(min(wanted, logprobs.shape[0])) if wanted > 0 else None
    top = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token_id, float(logprobs[token_id]), [(int(i), float(v)) for i, v in top])
