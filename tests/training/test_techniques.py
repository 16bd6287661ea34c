"""Each technique trains, is stopped and goes on bit for bit, and gives a result that plain transformers and peft load."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from server.basemodels.loading import load_causal_model
from server.domain.jobs import JobFailure
from server.domain.techniques import AdaLora, LoraTechnique
from server.storage.artefacts import ArtefactInvalid, ArtefactStore
from server.training.artefact import try_result
from server.training.batches import MicroBatch, make_micro_batch
from server.training.checkpoint import Position, load_checkpoint, save_checkpoint
from server.training.optimiser import read_master
from tests.tiny_models import build_tiny_causal_model
from tests.training.technique_cases import CASES, TOTAL_STEPS, Session, logits_of_plain_libraries, make_records

HALF = TOTAL_STEPS // 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "storage")


def snapshot(session: Session) -> dict[str, torch.Tensor]:
    masters = {name: read_master(session.optimiser, parameter) for name, parameter in session.trained.parameters.items()}
    return {name: tensor.detach().clone() for name, tensor in {**masters, **session.trained.state()}.items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(case: str, dtype: torch.dtype, base: Path, store: ArtefactStore) -> None:
    whole = Session.open(base, CASES[case], dtype=dtype)
    start = snapshot(whole)
    assert {parameter.grad_dtype for parameter in whole.trained.parameters.values()} == {torch.float32}
    first = whole.train(range(1, HALF + 1))
    save_checkpoint(store, "half", whole.trained, whole.optimiser, Position(step=HALF), "job")
    second = whole.train(range(HALF + 1, TOTAL_STEPS + 1))
    torch.manual_seed(99)
    # Another seed: whatever is drawn at the start must come from the checkpoint.
    other = Session.open(base, CASES[case], dtype=dtype, seed=3 if case == "vera" else 4)
    position = load_checkpoint(store, "half", other.trained, other.optimiser, "job")
    assert other.train(range(position.step + 1, TOTAL_STEPS + 1)) == second
    assert_same(snapshot(other), snapshot(whole))
    assert second[-1] < first[0]
    assert any(not torch.equal(tensor, start[name]) for name, tensor in snapshot(whole).items())


@pytest.mark.parametrize("case", CASES)
def test_plain_libraries_load_the_result_and_give_its_logits(case: str, base: Path, store: ArtefactStore) -> None:
    session = Session.open(base, CASES[case])
    untouched = session.logits()
    session.train(range(1, TOTAL_STEPS + 1))
    artefact = session.save(store, "result", base)
    got = logits_of_plain_libraries(artefact, base, session.batch)
    torch.testing.assert_close(got, session.logits(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, untouched, rtol=1e-3, atol=1e-3)
    assert try_result(artefact, base, torch.float32, torch.device("cpu")).largest > 0


@pytest.mark.parametrize("case", CASES)
def test_packed_and_fused_gradients_are_those_of_pefts_own_forward_pass(case: str, base: Path) -> None:
    packed = Session.open(base, CASES[case])
    packed.train([1])  # away from factors of zero
    assert packed.network.packed
    plain = Session.open(base, CASES[case], packing=False)
    plain.trained.load_state(packed.trained.state())
    with torch.no_grad():
        for name, parameter in plain.trained.parameters.items():
            parameter.copy_(packed.trained.parameters[name])
    # The classes before fusing: the second model runs nothing of ours.
    for module in plain.network.model.modules():
        if type(module).__module__ == "server.training.fused" and type(module).__name__ != "FusedRmsNorm":
            module.__class__ = type(module).__bases__[0]
    packed.network.model.eval()
    plain.network.model.eval()
    loss = torch.zeros(())
    model, ids, places = plain.network.model, torch.split(packed.batch.token_ids, list(packed.batch.lengths)), packed.batch.predictors
    logits = torch.cat([model(input_ids=record[None]).logits[0, -len(record) :] for record in ids])
    loss = cross_entropy(logits[places].float(), packed.batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    got = packed.gradients()
    expected = {name: p.grad for name, p in plain.trained.parameters.items() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in got.values()) > 1e-6
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_version_is_started_from(case: str, base: Path, store: ArtefactStore) -> None:
    session = Session.open(base, CASES[case])
    session.train(range(1, TOTAL_STEPS + 1))
    artefact = session.save(store, "result", base)
    fresh = Session.open(base, CASES[case], seed=3 if case == "vera" else 4)
    fresh.trained.warm_start(artefact.directory)
    torch.testing.assert_close(fresh.logits(), session.logits(), rtol=1e-4, atol=1e-4)
    other = CASES["ia3" if case != "ia3" else "oft"]
    with pytest.raises(JobFailure, match="cannot start from the weights"):
        Session.open(base, other).trained.warm_start(artefact.directory)


def test_a_version_of_another_rank_is_not_started_from(base: Path, store: ArtefactStore) -> None:
    artefact = Session.open(base, LoraTechnique(rank=4)).save(store, "result", base)
    with pytest.raises(JobFailure, match="has shape"):
        Session.open(base, LoraTechnique(rank=8)).trained.warm_start(artefact.directory)


def test_a_checkpoint_of_another_technique_changes_nothing(base: Path, store: ArtefactStore) -> None:
    session = Session.open(base, CASES["lora"])
    save_checkpoint(store, "lora", session.trained, session.optimiser, Position(), "job")
    other = Session.open(base, CASES["pissa"])
    before = snapshot(other)
    with pytest.raises(ArtefactInvalid, match="not those of this job"):
        load_checkpoint(store, "lora", other.trained, other.optimiser, "job")
    assert_same(snapshot(other), before)


def test_adalora_spreads_the_target_rank_over_the_layers(base: Path) -> None:
    session = Session.open(base, AdaLora(initial_rank=6, target_rank=3))
    session.train(range(1, TOTAL_STEPS + 1))
    kept = [int(p.count_nonzero()) for name, p in session.trained.parameters.items() if "lora_E" in name]
    assert sum(kept) == 3 * len(kept)
    assert len(set(kept)) > 1
    penalty = session.trained.penalty()
    assert penalty is not None
    assert float(penalty) > 0


@pytest.mark.parametrize(("initial", "steps"), [(3, TOTAL_STEPS), (6, 1), (6, 4), (6, 5)])
def test_adalora_takes_any_number_of_steps_and_equal_ranks(initial: int, steps: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.technique_cases.TOTAL_STEPS", steps)
    session = Session.open(base, AdaLora(initial_rank=initial, target_rank=3))
    assert len(session.train(range(1, steps + 1))) == steps


def test_updates_too_small_for_sixteen_bits_are_not_lost(base: Path) -> None:
    session = Session.open(base, CASES["full"], dtype=torch.bfloat16)
    weight = next(p for name, p in session.trained.parameters.items() if "down_proj" in name)
    before = weight.detach().clone()
    session.optimiser.param_groups[0].update(lr=1.0, weight_decay=2**-11)  # of each weight: less than half of the last place of bfloat16
    for _ in range(64):
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
        session.optimiser.step()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), before.float() * (1 - 2**-11) ** 64, rtol=2**-8, atol=0)


def test_gradients_of_micro_batches_add_up_in_float32(base: Path) -> None:
    session = Session.open(base, CASES["full"], dtype=torch.bfloat16)
    records = make_records(300)
    batches = [make_micro_batch(records, indices) for indices in ((0, 1), (2, 3), (4, 5, 6))]

    def gradients(chosen: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
        session.optimiser.zero_grad()
        for batch in chosen:
            session.network.sum_loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {name: p.grad.clone() for name, p in session.trained.parameters.items() if p.grad is not None}

    alone, together = [gradients([batch]) for batch in batches], gradients(batches)
    assert together.keys() == session.trained.parameters.keys()
    for name, gradient in together.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, alone[0][name] + alone[1][name] + alone[2][name])


def test_a_whole_model_is_saved_in_the_type_of_its_base(tmp_path: Path, store: ArtefactStore) -> None:
    directory = build_tiny_causal_model(tmp_path / "llama")
    load_causal_model(directory, dtype=torch.bfloat16).save_pretrained(directory)
    session = Session.open(directory, CASES["full"], dtype=torch.float32)
    session.train([1])
    artefact = session.save(store, "result", directory)
    assert next(iter(load_causal_model(artefact.directory, dtype="auto").parameters())).dtype == torch.bfloat16  # type: ignore[arg-type]
    assert session.network.packed  # saving leaves the model as it was
    assert torch.isfinite(session.network.sum_loss(session.batch))


def test_a_tensor_that_is_missing_from_a_whole_model_is_found(base: Path, store: ArtefactStore) -> None:
    session = Session.open(base, CASES["full"])
    session.train([1])
    artefact = session.save(store, "result", base)
    path = artefact.directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(JobFailure, match="down_proj"):
        try_result(artefact, base, torch.float32, torch.device("cpu"))
