"""The real SmolLM2 from its package: converted once, whole or not at all, and able to answer."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from server.basemodels.conversion import SEAL_NAME, convert_packaged, is_sealed, written_aside
from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype
from server.basemodels.packaged import PACKAGED_MODELS
from server.basemodels.rendering import find_stop_token_ids, render
from server.domain.generation import ChatMessage, Role

SMOLLM2 = PACKAGED_MODELS["HuggingFaceTB/SmolLM2-135M-Instruct"]
# What the hub's SmolLM2-135M-Instruct renders for one user turn: it puts its own system turn first.
PUBLISHED_RENDERING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    # Two at once: one converts, the other waits for the lock and finds it done.
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: convert_packaged(SMOLLM2, root), range(2))
    assert first == second
    assert [path.name for path in root.iterdir() if path.is_dir()] == [first.name]
    return first


class TestConvertedSmolLM2:
    def test_the_weights_are_plain_bfloat16_safetensors(self, converted: Path) -> None:
        config = json.loads((converted / "config.json").read_text())
        assert "quantization_config" not in config
        assert (config["dtype"], config["pad_token_id"], config["eos_token_id"]) == ("bfloat16", 0, 2)
        model = load_causal_model(converted, dtype=torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_the_prompt_is_the_published_one(self, converted: Path) -> None:
        tokenizer = load_tokenizer(converted)
        prompt = render(tokenizer, [ChatMessage(Role.USER, "What is the capital of France?")], add_generation_prompt=True)
        assert tokenizer.decode(prompt.token_ids) == PUBLISHED_RENDERING
        assert find_stop_token_ids(tokenizer) == {2}

    def test_it_knows_the_capital_of_france(self, converted: Path) -> None:
        tokenizer = load_tokenizer(converted)
        model = load_causal_model(converted, dtype=preferred_dtype())
        prompt = render(tokenizer, [ChatMessage(Role.USER, "What is the capital of France?")], add_generation_prompt=True)
        answer = model.generate(torch.tensor([prompt.token_ids]), max_new_tokens=10, do_sample=False)  # type: ignore[operator]
        assert tokenizer.decode(answer[0, len(prompt.token_ids) :]) == "The capital of France is Paris.<|im_end|>"

    def test_a_damaged_conversion_is_noticed(self, converted: Path) -> None:
        assert is_sealed(converted)
        path = converted / "tokenizer_config.json"
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        assert not is_sealed(converted)
        path.write_bytes(whole)
        assert is_sealed(converted)


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def break_off() -> None:
        with written_aside(tmp_path / "model") as aside:
            (aside / "config.json").write_text("{}")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_conversion_is_sealed_with_its_hashes(tmp_path: Path) -> None:
    with written_aside(tmp_path / "model") as aside:
        (aside / "config.json").write_text("{}")
    assert is_sealed(tmp_path / "model")
    assert list(json.loads((tmp_path / "model" / SEAL_NAME).read_text())) == ["config.json"]
