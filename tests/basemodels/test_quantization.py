"""Weights in 4 bits: what is trained on them is what is served on their round-tripped values."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers import PreTrainedModel

from server.basemodels import quantization as module
from server.basemodels.loading import load_causal_model
from server.basemodels.quantization import FourBits, QuantizedLinear, dequantize_in_place, quantize
from server.domain.techniques import Quantization
from tests.tiny_models import build_tiny_causal_model

IDS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")  # with biases


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_causal_model(directory, dtype=dtype)


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("double", [True, False])
def test_round_tripped_weights_compute_what_four_bits_compute(directory: Path, quantization: Quantization, double: bool) -> None:
    in_four_bits, round_tripped, plain = load(directory), load(directory), load(directory)
    quantize(in_four_bits, FourBits(quantization, double))
    dequantize_in_place(round_tripped, quantization, double)
    with torch.no_grad():
        expected = in_four_bits(IDS).logits
        assert torch.equal(round_tripped(IDS).logits, expected)
        assert not torch.allclose(plain(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("double", [True, False])
def test_what_is_quantised_in_slices_is_what_bitsandbytes_gives(
    quantization: Quantization, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_WEIGHTS", 1 << 12)
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(1))
    data, state = module._quantize(weight, quantization, double)
    expected, theirs = quantize_4bit(weight, blocksize=module.BLOCK_SIZE, compress_statistics=double, quant_type=quantization.value.lower())
    assert torch.equal(data, expected)
    packed, expected_packed = state.as_dict(packed=True), theirs.as_dict(packed=True)
    assert packed.keys() == expected_packed.keys()
    assert all(torch.equal(tensor, expected_packed[name]) for name, tensor in packed.items())
    assert torch.equal(dequantize_4bit(data, state), dequantize_4bit(expected, theirs))


def test_every_linear_layer_but_the_output_head_is_held_in_four_bits(directory: Path) -> None:
    model = load(directory)
    quantize(model, FourBits(Quantization.NF4, True))
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, layer in linears.items() if not isinstance(layer, QuantizedLinear)} == {"lm_head"}
    for layer in linears.values():
        if isinstance(layer, QuantizedLinear):
            assert layer.weight.nbytes == layer.in_features * layer.out_features // 2


def test_gradients_pass_through_as_through_the_round_tripped_weight() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    layer = QuantizedLinear.of(plain, Quantization.NF4, True, torch.float32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    got = layer(x)
    expected = nn.functional.linear(x, layer.dequantize(), plain.bias)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0])


def test_evaluating_changes_nothing_of_what_is_trained(directory: Path) -> None:
    model = load(directory, torch.bfloat16)
    quantize(model, FourBits(Quantization.NF4, True))
    model.train()
    before = model(IDS).logits
    model.train(False)
    with torch.no_grad():
        model(IDS)
    model.train()
    assert torch.equal(model(IDS).logits, before)


def test_the_compute_type_is_that_of_the_product_alone(directory: Path) -> None:
    wide, narrow = load(directory), load(directory)
    quantize(wide, FourBits(Quantization.NF4, False))
    quantize(narrow, FourBits(Quantization.NF4, False, torch.bfloat16))
    with torch.no_grad():
        got, expected = narrow(IDS).logits, wide(IDS).logits
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)


def test_a_model_without_linear_layers_is_refused(directory: Path) -> None:
    model = load(directory)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layers"):
        quantize(model, FourBits(Quantization.NF4, True))
