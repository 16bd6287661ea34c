"""The fast ways through a model give the model's own numbers: packed records, fused layers, chunked losses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from server.basemodels.loading import load_causal_model
from server.datafiles.tokens import TokenizedRecords
from server.domain.jobs import JobFailure
from server.domain.techniques import LoraTechnique
from server.training.attention import MAX_EXPLICIT_TOKENS, attend_packed, attend_record
from server.training.batches import MicroBatch, make_micro_batch
from server.training.loss import sum_cross_entropy, token_cross_entropies
from server.training.network import Network
from server.training.techniques.apply import apply_technique
from server.training.techniques.trained import find_trainable
from tests.tiny_models import FAMILIES, build_tiny_causal_model

LENGTHS = (40, 9, 23, 64, 5, 31, 17, 12)


def make_records(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> TokenizedRecords:
    records = TokenizedRecords()
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        records.append(ids, tuple(place >= length // 2 for place in range(length)))
    return records


def build_network(directory: Path, family: str, *, dropout: float = 0.0) -> Network:
    model = load_causal_model(build_tiny_causal_model(directory / family, family), dtype=torch.float32)
    adapted = apply_technique(model, LoraTechnique(rank=4, alpha=8.0, dropout=dropout), seed=3, total_steps=1).model
    network = Network(adapted)
    with torch.no_grad():  # adapters start without effect; give them one
        for name, parameter in find_trainable(adapted).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    return network


def gradients(network: Network, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    network.model.zero_grad()
    trained = sum(batch.trained_count for batch in batches)
    for batch in batches:
        (network.sum_loss(batch) / trained).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return {name: parameter.grad.clone() for name, parameter in find_trainable(network.model).items() if parameter.grad is not None}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return build_network(tmp_path_factory.mktemp("network"), request.param)


def causal_of(model: nn.Module) -> PreTrainedModel:
    assert isinstance(model, PeftModel)
    causal = model.get_base_model()
    assert isinstance(causal, PreTrainedModel)
    return causal


def vocabulary_of(network: Network) -> int:
    return int(causal_of(network.model).config.get_text_config().vocab_size)


def test_packed_records_give_the_loss_of_the_models_own_forward_pass(network: Network) -> None:
    records = make_records(vocabulary_of(network))
    got = network.sum_loss(make_micro_batch(records, range(len(records))))
    causal = causal_of(network.model)
    causal.set_attn_implementation("eager")
    expected = torch.zeros(())
    for index in range(len(records)):
        ids = torch.tensor(records.token_ids(index))[None].long()
        mask = torch.tensor(records.trained_mask(index))
        expected = expected + cross_entropy(causal(input_ids=ids).logits[0, :-1][mask[1:]], ids[0, 1:][mask[1:]], reduction="sum")
    if network.packed:
        causal.set_attn_implementation("packed_records")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_do_not_depend_on_how_a_step_is_split(network: Network, size: int) -> None:
    records = make_records(vocabulary_of(network))
    whole = gradients(network, [make_micro_batch(records, range(8))])
    parts = gradients(network, [make_micro_batch(records, range(start, start + size)) for start in range(0, 8, size)])
    assert whole.keys() == parts.keys()
    assert len(whole) > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_architectures_that_take_attention_functions_are_packed(tmp_path: Path) -> None:
    assert {family: build_network(tmp_path, family).packed for family in FAMILIES} == {
        "llama": True, "mistral": True, "qwen2": True, "gemma": True, "falcon": False,
    }  # fmt: skip


def test_an_architecture_with_attention_of_another_kind_keeps_its_own_forward_pass(tmp_path: Path) -> None:
    gemma = Gemma2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32
    )
    network = Network(apply_technique(Gemma2ForCausalLM(gemma), LoraTechnique(rank=2), seed=0, total_steps=1).model)
    assert not network.packed
    batch = make_micro_batch(make_records(300), range(8))
    assert torch.isfinite(network.sum_loss(batch))


def test_fused_layers_give_the_gradients_of_pefts_own(tmp_path: Path) -> None:
    network = build_network(tmp_path, "llama")
    records = make_records(vocabulary_of(network))
    fused = gradients(network, [make_micro_batch(records, range(8))])
    plain = load_causal_model(tmp_path / "llama", dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.load_state_dict(network.model.state_dict())
    loss, trained = torch.zeros(()), 0
    for index in range(8):
        ids, mask = torch.tensor(records.token_ids(index))[None].long(), torch.tensor(records.trained_mask(index))
        loss = loss + cross_entropy(adapted(input_ids=ids).logits[0, :-1][mask[1:]], ids[0, 1:][mask[1:]], reduction="sum")
        trained += int(mask.sum())
    (loss / trained).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for name, parameter in find_trainable(adapted).items():
        assert parameter.grad is not None
        torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_dropout_of_adapters_is_applied_in_training_only(tmp_path: Path) -> None:
    network = build_network(tmp_path, "llama", dropout=0.5)
    batch = make_micro_batch(make_records(vocabulary_of(network)), range(8))
    with torch.no_grad():
        network.model.train()
        assert network.sum_loss(batch) != network.sum_loss(batch)
        network.model.eval()
        assert network.sum_loss(batch) == network.sum_loss(batch)


@pytest.mark.parametrize("length", [1, 33, MAX_EXPLICIT_TOKENS + 8])
@pytest.mark.parametrize("window", [None, 16])
def test_a_record_attends_as_torch_attends(length: int, window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    upstream = torch.randn(6, length, 8, dtype=torch.float64)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) & (distance < (window or length))
    expected = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=allowed, scale=0.3, enable_gqa=True)[0]
    got = attend_record(query, key, value, 0.3, window)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(
        torch.autograd.grad(got, (query, key, value), upstream), torch.autograd.grad(expected, (query, key, value), upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_records_that_lie_end_to_end_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 8) for heads in (4, 2, 2))
    before, _ = attend_packed(nn.Identity(), query, key, value, None, record_lengths=(12, 18))
    key[:, :, :12], value[:, :, :12] = 100.0, -100.0
    after, _ = attend_packed(nn.Identity(), query, key, value, None, record_lengths=(12, 18))
    assert torch.equal(before[:, 12:], after[:, 12:])
    assert not torch.equal(before[:, :12], after[:, :12])


def make_head_inputs(bias: bool) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, requires_grad=True)
    return hidden, nn.Linear(16, 50, bias=bias), torch.randint(50, (7,)), torch.rand(7)


def assert_same_gradients(got: torch.Tensor, expected: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_the_chunked_loss_is_the_weighted_cross_entropy(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.training.loss.BLOCK_ROWS", 16)  # of 50
    hidden, head, targets, weights = make_head_inputs(bias)
    expected = (cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    got = sum_cross_entropy(hidden, head, targets, weights, rows)
    torch.testing.assert_close(got, expected)
    assert_same_gradients(got * 0.5, expected * 0.5, (hidden, *head.parameters()))


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_the_losses_of_tokens_take_any_upstream_gradient(rows: int, bias: bool) -> None:
    hidden, head, targets, weights = make_head_inputs(bias)
    expected = cross_entropy(head(hidden), targets, reduction="none")
    got = token_cross_entropies(hidden, head, targets, rows)
    torch.testing.assert_close(got, expected)
    assert_same_gradients(torch.sigmoid(got @ weights), torch.sigmoid(expected @ weights), (hidden, *head.parameters()))


def test_weights_and_losses_of_tokens_agree_with_the_sum(network: Network) -> None:
    batch = make_micro_batch(make_records(vocabulary_of(network)), range(8))
    weights = torch.linspace(0.1, 2.0, batch.trained_count)
    weighted = network.sum_loss(replace(batch, weights=weights))
    torch.testing.assert_close(weighted, (network.token_losses(batch) * weights).sum(), rtol=1e-5, atol=1e-4)
    assert not torch.isclose(weighted, network.sum_loss(batch))


def test_layers_that_do_not_exist_are_a_failure_with_advice(tmp_path: Path) -> None:
    model = load_causal_model(build_tiny_causal_model(tmp_path / "llama"), dtype=torch.float32)
    with pytest.raises(JobFailure, match="no linear layers named no_such_layer"):
        apply_technique(model, LoraTechnique(target_modules=("no_such_layer",)), seed=0, total_steps=1)
    with pytest.raises(JobFailure, match="no linear layers named r_proj"):  # which peft passes over beside one that exists
        apply_technique(model, LoraTechnique(target_modules=("q_proj", "r_proj")), seed=0, total_steps=1)
