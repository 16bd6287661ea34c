"""The same small fine-tuning over tiny models of every promised family, with and without chat template and pad token."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.basemodels.errors import BaseModelRefused
from server.basemodels.loading import load_causal_model, load_tokenizer
from server.basemodels.rendering import PROBE, render
from server.domain.techniques import (
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraTechnique,
    PrefixTuning,
    PromptTuning,
    QloraTechnique,
    Technique,
)
from server.storage.artefacts import ArtefactStore
from server.training.artefact import try_result
from tests.tiny_models import ALL_FAMILIES, build_tiny_causal_model
from tests.training.technique_cases import CASES, Session, logits_of_plain_libraries

# Families whose attention takes functions and whose scores and logits are not capped.
PACKED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "gpt_neox"}
TECHNIQUES: dict[str, Technique] = {
    "full": FullTechnique(),
    "lora": LoraTechnique(rank=4),
    "qlora": QloraTechnique(LoraTechnique(rank=4)),
    "prompt tuning": PromptTuning(virtual_tokens=4),
    "prefix tuning": PrefixTuning(virtual_tokens=4),
    "ia3": Ia3(),
    "layer norm tuning": LayerNormTuning(),
}


@pytest.fixture(scope="module", params=sorted(ALL_FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_family_is_trained_saved_and_loaded_by_plain_libraries(technique: str, base: Path, tmp_path: Path) -> None:
    session = Session.open(base, TECHNIQUES[technique])
    assert session.network.packed == (base.name in PACKED)
    losses = session.train(range(1, 5))
    assert losses[-1] < losses[0]
    artefact = session.save(ArtefactStore(tmp_path), "result", base)
    got = logits_of_plain_libraries(artefact, base, session.batch)
    torch.testing.assert_close(got, session.logits(), rtol=1e-4, atol=1e-4)
    assert try_result(artefact, base, torch.float32, torch.device("cpu")).largest > 0


@pytest.mark.parametrize("technique", ["lora", "prompt tuning", "prefix tuning"])
def test_packed_losses_are_those_of_one_record_at_a_time(technique: str, base: Path) -> None:
    packed = Session.open(base, TECHNIQUES[technique])
    alone = Session.open(base, TECHNIQUES[technique], packing=False)
    assert not alone.network.packed
    torch.testing.assert_close(packed.network.token_losses(packed.batch), alone.network.token_losses(alone.batch), rtol=1e-4, atol=1e-4)


def test_a_model_without_chat_template_is_trained_and_told_what_to_stop_at(base: Path, tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "models" / base.name, base.name, chat_template=False)
    session = Session.open(directory, TECHNIQUES["lora"])
    session.train([1, 2])
    artefact = session.save(ArtefactStore(tmp_path / "storage"), "result", directory)
    tokenizer = load_tokenizer(artefact.directory)
    assert tokenizer.chat_template
    assert render(tokenizer, PROBE).token_ids == artefact.description["golden_token_ids"]
    assert try_result(artefact, directory, torch.float32, torch.device("cpu")).largest > 0


def test_a_tokenizer_gets_a_pad_token_that_is_not_its_end_token(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "llama")
    torch.save(load_causal_model(directory, dtype=torch.float32).state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(BaseModelRefused, match="no causal language model"):
        load_causal_model(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "of_its_own"])
def test_code_that_comes_with_a_model_is_never_run(kind: str, tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "llama")
    trap, path = tmp_path / "ran", directory / "config.json"
    (directory / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Trap: pass\nclass TrapConfig: pass\n")
    auto = {"AutoConfig": "modeling_trap.TrapConfig", "AutoModelForCausalLM": "modeling_trap.Trap"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind, "auto_map": auto}))
    if kind == "llama":  # transformers has its own
        load_causal_model(directory, dtype=torch.float32)
    else:
        with pytest.raises(BaseModelRefused):
            load_causal_model(directory, dtype=torch.float32)
    assert not trap.exists()


def test_a_weight_that_the_files_lack_is_not_made_up(tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelRefused, match=r"differ in model\.norm\.weight"):
        load_causal_model(directory, dtype=torch.float32)


def test_every_technique_has_a_case() -> None:
    from typing import get_args

    assert {type(case) for case in CASES.values()} == set(get_args(Technique))
