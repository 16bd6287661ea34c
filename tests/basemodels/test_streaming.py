"""A model that goes into 4 bits while it is read is the one that was quantised whole, and its wide weights are never in memory together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.basemodels.errors import BaseModelRefused
from server.basemodels.loading import load_causal_model
from server.basemodels.quantization import FourBits, QuantizedLinear, is_quantized, quantize
from server.domain.techniques import Quantization
from tests.tiny_models import build_tiny_causal_model

IDS = torch.arange(1, 20)[None]
HELD = FourBits(Quantization.NF4, double=True)
# Loads the model at argv[1], in 4 bits while reading or after it (argv[2]); prints the bytes of its linear weights in bfloat16 and the
# growth of the process's peak. The first, small load pays for what any load imports.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from server.basemodels.loading import load_causal_model
from server.basemodels.quantization import FourBits, QuantizedLinear, quantize
from server.childprocess import measure_peak_memory
from server.domain.techniques import Quantization
held = FourBits(Quantization.NF4, True)
def load(path, streaming):
    model = load_causal_model(Path(path), dtype=torch.bfloat16, held=held if streaming else None)
    if not streaming:
        quantize(model, held)
    return model
load(sys.argv[2], sys.argv[3] == "streaming")
before = measure_peak_memory()
model = load(sys.argv[1], sys.argv[3] == "streaming")
wide = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
print(json.dumps({"wide": wide, "grown": measure_peak_memory() - before}))
"""


@pytest.mark.parametrize("family", ["llama", "qwen2", "falcon", "phi3"])
def test_what_is_read_into_four_bits_is_what_the_whole_model_gives(tmp_path: Path, family: str) -> None:
    directory = build_tiny_causal_model(tmp_path / family, family)
    streamed, whole = load_causal_model(directory, dtype=torch.float32, held=HELD), load_causal_model(directory, dtype=torch.float32)
    quantize(whole, HELD)
    expected = whole.state_dict()
    assert streamed.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.state_dict().items())
    with torch.no_grad():
        assert torch.equal(streamed(IDS).logits, whole(IDS).logits)
    assert is_quantized(streamed)
    # To transformers it is a plain model: it can be moved, trained and saved.
    assert not getattr(streamed, "is_quantized", False)
    assert not hasattr(streamed.config, "quantization_config")


def test_each_layer_is_noted_with_its_weight_as_it_is_read(tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "llama")
    plain = dict(load_causal_model(directory, dtype=torch.float32).named_parameters())
    seen: list[str] = []

    def note(name: str, weight: torch.Tensor, layer: QuantizedLinear) -> None:
        assert torch.equal(weight, plain[f"{name}.weight"])
        assert layer.quant_state is not None
        seen.append(name)

    load_causal_model(directory, dtype=torch.float32, held=FourBits(Quantization.FP4, double=False, note=note))
    assert len(seen) == len(set(seen)) == 14


def test_a_weight_that_the_files_lack_is_refused_here_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = build_tiny_causal_model(tmp_path / "llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelRefused, match="up_proj"):
        load_causal_model(directory, dtype=torch.float32, held=HELD)


def test_the_wide_weights_are_never_in_memory_together(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]  # transformers'
    model.to_empty(device="cpu").save_pretrained(tmp_path / "wide")
    build_tiny_causal_model(tmp_path / "small")
    grown = {}
    for way in ("streaming", "whole"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "wide"), str(tmp_path / "small"), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["wide"] > 380e6
        grown[way] = found["grown"] / found["wide"]
    # 4 bits are 0.26 of 16 with their scales; beside them one layer exists as it is read, and what the allocator keeps: 0.49 was seen.
    assert grown["streaming"] < 0.6
    assert grown["whole"] > 1.0
