"""Memory is tried before the first step, in the ways a job allows; the trial changes no number, and a real lack of memory is typed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from server.domain.events import Warned
from server.domain.techniques import FullTechnique, LoraTechnique, Technique
from server.training.batches import MicroBatch, find_heaviest_groups
from server.training.memory import list_ways, settle_memory
from server.training.objectives.objective import Objective, TokenLosses
from server.training.objectives.supervised import Supervised
from server.training.state import MICRO_BATCH_TOKENS, Way
from tests.training.building import make_parameters, make_sequences
from tests.training.test_loop import Builder, builder, settings_of  # noqa: F401 -- a fixture


@pytest.mark.parametrize(
    ("asked", "ways"),
    [
        ({}, [Way(MICRO_BATCH_TOKENS, False), Way(MICRO_BATCH_TOKENS // 2, False), Way(MICRO_BATCH_TOKENS // 2, True)]),
        ({"micro_batch_tokens": 600, "retry_out_of_memory": False}, [Way(600, False), Way(600, True)]),
        ({"gradient_checkpointing": True}, [Way(MICRO_BATCH_TOKENS, True), Way(MICRO_BATCH_TOKENS // 2, True)]),
        ({"gradient_checkpointing": False}, [Way(MICRO_BATCH_TOKENS, False), Way(MICRO_BATCH_TOKENS // 2, False)]),
        ({"gradient_checkpointing": False, "retry_out_of_memory": False}, [Way(MICRO_BATCH_TOKENS, False)]),
    ],
)
def test_memory_is_tried_as_asked_then_in_half_then_with_less_kept(asked: dict[str, object], ways: list[Way]) -> None:
    assert list_ways(replace(make_parameters(), **asked), can_recompute=True) == ways  # type: ignore[arg-type]  # names are checked by replace
    kept = [way for way in ways if not way.recomputes]
    assert not kept or list_ways(replace(make_parameters(), **asked), can_recompute=False) == kept  # type: ignore[arg-type]  # the same


def test_the_heaviest_groups_have_the_longest_record_and_the_most_tokens() -> None:
    records = make_sequences((600, 40, 500, 30, 490, 20))
    assert find_heaviest_groups(records, 8, 1000) == [[0], [2, 4]]
    assert find_heaviest_groups(records, 1, 1000) == [[0]]
    assert find_heaviest_groups(records, 8, 2000) == [[0, 2, 4]]


@pytest.mark.parametrize("technique", [LoraTechnique(rank=4, alpha=8.0, dropout=0.2), FullTechnique()], ids=["lora", "full"])
def test_the_trial_changes_no_number(builder: Builder, technique: Technique) -> None:  # noqa: F811 -- a fixture
    trial = builder.build(settings_of(weight_decay=0.5), technique=technique)
    before = {name: parameter.detach().clone() for name, parameter in trial.run.trained.parameters.items()}
    buffers = [tensor.clone() for tensor in trial.run.network.model.state_dict().values()]
    random = torch.get_rng_state()
    settle_memory(trial.run)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trial.run.trained.parameters.items())
    assert all(torch.equal(a, b) for a, b in zip(trial.run.network.model.state_dict().values(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not trial.run.optimiser.state
    assert all(parameter.grad is None for parameter in trial.run.network.model.parameters())
    assert trial.events == []


class Hungry:
    """Supervised training that runs out of memory with more than so many tokens, as torch says it."""

    needs_reference: ClassVar[bool] = False

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self.tried: list[int] = []

    def count(self, batch: MicroBatch) -> float:
        return Supervised().count(batch)

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        self.tried.append(batch.token_count)
        if batch.token_count > self._most_tokens:
            torch.empty(1 << 60, dtype=torch.uint8)
        return Supervised().sum_loss(network, batch)


def test_half_the_tokens_are_taken_where_the_whole_does_not_fit(builder: Builder) -> None:  # noqa: F811 -- a fixture
    trial = builder.build(settings_of(micro_batch_tokens=256))
    trial.run.objective = hungry = Hungry(128)
    settle_memory(trial.run)
    assert trial.run.way == Way(128, recomputes=False)
    (warned,) = trial.events
    assert isinstance(warned, Warned)
    assert warned.code == "MEMORY_SHORT"
    assert "128 tokens instead of 256" in warned.message
    trial.train()
    assert max(hungry.tried[1:]) <= 128
    whole = builder.build(settings_of(micro_batch_tokens=256))
    whole.train()
    assert trial.steps[-1].loss == pytest.approx(whole.steps[-1].loss, rel=1e-5)


def test_memory_that_runs_out_in_a_later_step_is_met_in_the_same_way(builder: Builder) -> None:  # noqa: F811 -- a fixture
    """Dropout is drawn again as it was drawn: but for the order of sums the step is the one that did not fit."""
    technique = LoraTechnique(rank=4, alpha=8.0, dropout=0.2)
    trials = [builder.build(settings_of(micro_batch_tokens=1), technique=technique) for _ in range(2)]
    objectives: tuple[Objective, ...] = (Supervised(), Failing(third=1))
    for trial, objective in zip(trials, objectives, strict=True):
        torch.manual_seed(3)
        settle_memory(trial.run)
        trial.run.objective = objective
        trial.train()
    calm, short = trials
    assert [event.code for event in short.events if isinstance(event, Warned)] == ["MEMORY_SHORT"]
    assert [step.loss for step in short.steps] == [step.loss for step in calm.steps]


class Failing(Hungry):
    """Runs out of memory once, at its third micro-batch."""

    def __init__(self, third: int) -> None:
        super().__init__(1 << 30)
        self._left = 3 * third

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        loss = super().sum_loss(network, batch)
        self._left -= 1
        if self._left == 0:
            torch.empty(1 << 60, dtype=torch.uint8)
        return loss


def test_a_real_lack_of_memory_is_met_with_less_or_typed(tmp_path: Path) -> None:
    """In another process under RLIMIT_DATA, where torch's own allocations fail."""
    # What is freed then no longer counts at once: a heap that is trimmed still counts, for this limit, as it was.
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.limited_job", str(tmp_path), "0.75", "0.25"],
        capture_output=True, text=True, timeout=250, check=False, env=mapped,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    whole, short, refused = (json.loads(line) for line in done.stdout.splitlines())
    assert (whole["done"], whole["warnings"]) == (True, [])
    assert (short["done"], bool(short["warnings"])) == (True, True)
    assert short["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert refused["reason"] == "OUT_OF_MEMORY"
    assert "max_sequence_tokens" in refused["suggestion"]
