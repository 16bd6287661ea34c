"""Where adapters start: the function is unchanged or nearer to the weights, and the factors are those of the method."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from server.basemodels.loading import load_causal_model
from server.basemodels.quantization import QuantizedLinear
from server.training.attention import attend_record
from server.training.techniques.factors import Factors
from server.training.techniques.initialization import InputSketch, factor_orthonormal, factor_principal
from server.training.techniques.lora import ADAPTER, lora_layers
from tests.tiny_models import build_tiny_causal_model
from tests.training.technique_cases import CASES, Session

RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_model(tmp_path_factory.mktemp("models") / "llama")


def product(factors: Factors) -> torch.Tensor:
    return factors.up @ factors.down


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 40)])
def test_principal_factors_are_the_best_approximation(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :RANK] * values[:RANK] @ right[:RANK]
    torch.testing.assert_close(2.0 * product(factor_principal(weight, RANK, 2.0)), best, rtol=1e-3, atol=1e-3)


def test_orthonormal_factors_are_those_of_the_qr_decomposition() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    factors = factor_orthonormal(weight, RANK)
    torch.testing.assert_close(factors.up.t() @ factors.up, torch.eye(RANK))
    torch.testing.assert_close(product(factors), factors.up @ factors.up.t() @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["lora", "dora", "pissa", "olora", "eva"])
def test_the_start_changes_no_logits(case: str, base: Path) -> None:
    session = Session.open(base, CASES[case])
    model = load_causal_model(base, dtype=torch.float32)
    with torch.no_grad():
        records = [model(input_ids=ids[None]).logits[0] for ids in torch.split(session.batch.token_ids, list(session.batch.lengths))]
    torch.testing.assert_close(session.logits(), torch.cat(records)[session.batch.predictors], rtol=1e-4, atol=1e-4)


def test_what_four_bits_lose_is_partly_made_up_for(base: Path) -> None:
    plain = dict(load_causal_model(base, dtype=torch.float32).named_parameters())
    session = Session.open(base, CASES["loftq"])
    layers = lora_layers(session.trained.peft)
    assert len(layers) == 14
    for name, layer in layers.items():
        quantized = layer.get_base_layer()
        assert isinstance(quantized, QuantizedLinear)
        lost = plain[f"{name}.weight"] - quantized.dequantize()
        added = layer.get_delta_weight(ADAPTER)
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        best = left[:, :RANK] * values[:RANK] @ right[:RANK]
        assert (lost - added).norm() <= 1.01 * (lost - best).norm()
        assert (lost - added).norm() < lost.norm()


def test_a_sketch_finds_the_directions_in_which_inputs_vary() -> None:
    torch.manual_seed(0)
    planted = torch.linalg.qr(torch.randn(64, RANK))[0]
    sketch = InputSketch(RANK, 64, torch.Generator().manual_seed(0))
    for _ in range(3):
        sketch.add(torch.randn(2, 50, RANK) * torch.tensor([9.0, 8.0, 7.0, 6.0]) @ planted.t() + 0.01 * torch.randn(2, 50, 64))
    directions = sketch.directions()
    torch.testing.assert_close(directions @ directions.t(), torch.eye(RANK), rtol=0, atol=1e-4)
    assert torch.linalg.svdvals(directions @ planted).min() > 0.999


def test_eva_reads_the_inputs_of_the_records(base: Path) -> None:
    session, standard = Session.open(base, CASES["eva"]), Session.open(base, CASES["lora"])
    for layers, orthonormal in ((lora_layers(session.trained.peft), True), (lora_layers(standard.trained.peft), False)):
        for layer in layers.values():
            down = layer.get_parameter(f"lora_A.{ADAPTER}.weight")
            assert torch.allclose(down @ down.t(), torch.eye(RANK), atol=1e-3) == orthonormal


@pytest.mark.parametrize("window", [None, 9])
def test_tokens_before_a_record_are_seen_by_all_of_it(window: int | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 12, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 5 + 12, 8, dtype=torch.float64) for _ in range(2))
    distance = torch.arange(5, 17)[:, None] - torch.arange(17)
    allowed = (distance >= 0) & (distance < (window or 17))
    expected = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=allowed, scale=0.3, enable_gqa=True)[0]
    torch.testing.assert_close(attend_record(query, key, value, 0.3, window), expected)
