"""Tiny models of each family, adapters made by peft, and an engine over them."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from server.inference.engine import EmbeddedEngine
from tests.inference.engines import make_engine
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
        peft.save_pretrained(str(target))
    return target


@pytest.fixture
async def engine(tiny: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    """An engine that knows the base model "llama"; adapters lie in tmp_path."""
    made = make_engine({"llama": tiny("llama")}, tmp_path)
    made.start()
    yield made
    await made.stop()
