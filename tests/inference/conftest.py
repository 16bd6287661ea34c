"""Tiny models of each family, adapters made by peft, and an engine over them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from server.domain.errors import NotFound
from server.domain.generation import (
    ChatMessage,
    Delta,
    GenerationFinished,
    GenerationParameters,
    GenerationRequest,
    ModelReference,
    Role,
    TokenEvent,
)
from server.inference.batching import BatchLimits
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions
from tests.tiny_models import build_tiny_causal_model

LINEARS = {
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "default": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny products are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the directory of a tiny model of a family, made once."""
    root, made = tmp_path_factory.mktemp("tiny"), dict[str, Path]()

    def build(family: str) -> Path:
        if family not in made:
            made[family] = build_tiny_causal_model(root / family, family)
        return made[family]

    return build


def save_adapter(base: Path, target: Path, *, rank: int, seed: int, modules: Sequence[str] = LINEARS["default"], **options: object) -> Path:
    """Save a random adapter as peft does after training; large enough to change what a tiny model says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), **options)  # type: ignore[arg-type]
        peft = get_peft_model(model, config)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(target)
    return target


@dataclass(frozen=True)
class Resolved:
    """What a resolver gives."""

    directory: Path


@dataclass(frozen=True)
class Directories:
    """Resolves base models by a table."""

    table: dict[str, Path]

    def resolve(self, base_model: str) -> Resolved:
        """Look a name up."""
        if base_model not in self.table:
            raise NotFound.of("base model", base_model)
        return Resolved(self.table[base_model])


def make_engine(table: dict[str, Path], storage: Path, limits: BatchLimits | None = None, max_model_bytes: int = 1 << 30) -> EmbeddedEngine:
    """Make an engine over tiny models in float32."""
    return EmbeddedEngine(
        base_models=Directories(table),
        resolve_adapter=lambda reference: storage / (reference.adapter_path or ""),
        embedder=None,
        options=LoadingOptions(limits or BatchLimits(max_rows=8, max_waiting=8, cache_tokens=4096), dtype=torch.float32),
        max_model_bytes=max_model_bytes,
    )


@pytest.fixture
async def engine(tiny: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    """An engine that knows the base model "llama"; adapters lie in tmp_path."""
    made = make_engine({"llama": tiny("llama")}, tmp_path)
    made.start()
    yield made
    await made.stop()


def ask(prompt: str, *, name: str = "r", model: str = "llama", adapter: str | None = None, **parameters: object) -> GenerationRequest:
    """Make a request that is greedy unless told otherwise."""
    chosen = GenerationParameters(**{"temperature": 0.0, "max_tokens": 16, **parameters})  # type: ignore[arg-type]
    reference = ModelReference("mdl_tiny" if adapter else model, model, version=1 if adapter else None, adapter_path=adapter)
    return GenerationRequest(name, reference, chosen, prompt=prompt)


def ask_chat(content: str, **parameters: object) -> GenerationRequest:
    """Make a chat request."""
    chosen = GenerationParameters(**{"temperature": 0.0, "max_tokens": 16, **parameters})  # type: ignore[arg-type]
    return GenerationRequest("r", ModelReference("llama", "llama"), chosen, messages=(ChatMessage(Role.USER, content),))


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    deltas: Sequence[Delta]
    end: GenerationFinished


async def collect(events: AsyncIterator[TokenEvent]) -> Answer:
    """Read a stream to its end."""
    deltas: list[Delta] = []
    async for event in events:
        if isinstance(event, GenerationFinished):
            return Answer("".join(d.text for d in deltas), deltas, event)
        deltas.append(event)
    raise AssertionError("the stream ended without GenerationFinished")


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
