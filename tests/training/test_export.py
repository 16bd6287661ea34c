"""Exports of every technique against plain transformers and peft and against what the engine serves; and what cannot be exported."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.basemodels import merging
from server.basemodels.sources import BaseModelSource
from server.childprocess import Signals
from server.domain.events import ChildEvent, ResultReady
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import ExportOrder
from server.domain.specs import ExportFormat, ExportSpec
from server.domain.techniques import AdaLora, FullTechnique, LoraInitialization, LoraTechnique, PTuning, QloraTechnique, Technique
from server.storage.artefacts import Artefact, ArtefactStore, Described
from server.training import export, mergecheck
from server.training.export import run_export
from tests.inference.asking import ask, collect
from tests.inference.engines import make_engine
from tests.inference.versions import continue_plainly, load_plain, load_reference, make_version
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import Workplace

# peft says so of every AdaLoRA that it loads: it looks for the pattern's names among the layers before it has adapters in them.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
PROMPT = [5, 60, 70, 200, 33, 8, 14]
OUT = "default/exports/exp_1"
MERGEABLE = ("lora", "dora", "adalora", "vera", "oft", "ia3", "layer_norm_tuning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose numbers are bf16's, as published models' are."""
    return round_to_bf16(build_tiny_causal_model(tmp_path_factory.mktemp("models") / "llama"))


def round_to_bf16(directory: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def make_small(storage: Path, base: Path, technique: str, **described: Described) -> Artefact:
    """Make a version as far from its base as training takes it."""
    return make_version(storage, "version", base, technique, scale=0.2, described=described)


def make_source(base: Path, tmp_path: Path) -> BaseModelSource:
    return BaseModelSource(tmp_path / "cache", allowed_local_roots=(base.parent,))


def make_order(version: Artefact, base: Path, form: ExportFormat) -> ExportOrder:
    return ExportOrder("job_1", 1, ExportSpec(str(base), 1, form), version.path, version.manifest_sha256, OUT)


def run(version: Artefact, base: Path, tmp_path: Path, form: ExportFormat, stop: bool = False) -> Sequence[ChildEvent]:
    events: list[ChildEvent] = []
    signals = Signals(lambda: stop, lambda: False)
    run_export(make_order(version, base, form), ArtefactStore(tmp_path), make_source(base, tmp_path), events.append, signals)
    return events


def read_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0].float()
    return logits


@pytest.mark.parametrize("technique", MERGEABLE)
def test_a_merged_export_is_a_plain_model_that_says_what_the_adapter_says(technique: str, base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, technique)
    events = run(version, base, tmp_path, ExportFormat.MERGED)
    assert [event.kind for event in events] == ["started", "finalizing", "result_ready"]
    directory = tmp_path / OUT
    exported = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert exported.dtype == torch.bfloat16
    expected = read_logits(load_reference(version, base))
    assert (expected - read_logits(load_plain(base))).abs().max() > 0.05, "the version must do something, or this shows nothing"
    difference = (read_logits(load_plain(directory)) - expected).abs()
    assert difference.mean() < 0.02 * expected.std()
    result = events[-1]
    assert isinstance(result, ResultReady)
    assert result.manifest_sha256 == ArtefactStore(tmp_path).open(OUT).manifest_sha256
    assert 0 <= result.metrics["merge_mean_logit_difference"] < 1e-4 < result.metrics["merge_rounded_mean_logit_difference"] < 0.02


async def test_the_exported_model_is_what_the_engine_serves(base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, "dora")
    run(version, base, tmp_path, ExportFormat.MERGED)
    engine = make_engine({"llama": base, "exported": tmp_path / OUT}, tmp_path)
    engine.start()
    served, exported = [
        await collect(engine.generate(ask("Who keeps the maps?", model=model, adapter=adapter, logprobs=0)))
        for model, adapter in (("llama", "version"), ("exported", None))
    ]
    assert exported.text == served.text
    ours, theirs = ([p.chosen.logprob for delta in answer.deltas for p in delta.logprobs] for answer in (exported, served))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    await engine.stop()


def test_a_version_on_4_bits_is_merged_into_what_4_bits_keep(base: Path, tmp_path: Path) -> None:
    described: dict[str, Described] = {"quantization": "NF4", "double_quantization": True}
    version = make_small(tmp_path, base, "lora", **described)
    run(version, base, tmp_path, ExportFormat.MERGED)
    exported = read_logits(load_plain(tmp_path / OUT))
    on_rounded, on_plain = (
        read_logits(load_reference(version, base)),
        read_logits(PeftModel.from_pretrained(load_plain(base), version.directory)),
    )
    assert (exported - on_rounded).abs().mean() < 0.02 * on_rounded.std()
    assert (exported - on_plain).abs().mean() > 3 * (exported - on_rounded).abs().mean()


def test_a_merged_export_has_all_that_a_hub_model_has(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "100KB")
    version = make_small(tmp_path, base, "lora", base_revision=make_source(base, tmp_path).resolve(str(base)).revision)
    run(version, base, tmp_path, ExportFormat.MERGED)
    directory = tmp_path / OUT
    names = {file.name for file in directory.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not any("adapter" in name for name in names)
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    assert generation["pad_token_id"] is not None
    ours, theirs = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(version.directory)
    assert ours.chat_template == theirs.chat_template
    for file in directory.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
        assert str(base) not in file.read_text() or file.name == "manifest.json"
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert all(tensors.get_tensor(name).dtype == torch.bfloat16 for name in tensors.keys())  # noqa: SIM118 -- not a mapping


@pytest.mark.parametrize("technique", ["adalora", "prefix_tuning", "oft"])
def test_an_adapter_export_is_the_version_as_plain_peft_loads_it(technique: str, base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, technique)
    events = run(version, base, tmp_path, ExportFormat.ADAPTER)
    assert [event.kind for event in events] == ["started", "finalizing", "result_ready"]
    exported = ArtefactStore(tmp_path).open(OUT)
    model = PeftModel.from_pretrained(load_plain(base), exported.directory).eval()
    torch.testing.assert_close(read_logits(model), read_logits(load_reference(version, base)), atol=0, rtol=0)
    assert "README.md" in exported.files
    AutoTokenizer.from_pretrained(exported.directory)


def test_a_whole_version_exports_as_itself_and_has_no_adapter(base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, "full")
    run(version, base, tmp_path, ExportFormat.MERGED)
    torch.testing.assert_close(read_logits(load_plain(tmp_path / OUT)), read_logits(load_plain(version.directory)), atol=0, rtol=0)
    with pytest.raises(JobFailure, match="no adapter"):
        run(version, base, tmp_path, ExportFormat.ADAPTER)


@pytest.mark.parametrize("technique", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_cannot_be_merged(technique: str, base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, technique)
    with pytest.raises(JobFailure, match="Virtual tokens are no part of any weight") as failure:
        run(version, base, tmp_path, ExportFormat.MERGED)
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID
    assert not (tmp_path / OUT).exists()


def test_a_merge_that_forgets_a_layer_is_refused_with_the_figures(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = make_small(tmp_path, base, "lora")
    whole = merging._adapted_layers
    monkeypatch.setattr(merging, "_adapted_layers", lambda adapted: list(whole(adapted))[1:])
    with pytest.raises(JobFailure, match=r"differ by \d.* at most") as failure:
        run(version, base, tmp_path, ExportFormat.MERGED)
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID
    assert not (tmp_path / OUT).exists()


def test_where_bf16_would_lose_the_adapter_the_export_is_float32(base: Path, tmp_path: Path) -> None:
    """Few steps move weights by less than bf16 tells apart: rounded, most of this adapter would be lost."""
    version = make_version(tmp_path, "version", base, "lora", scale=0.0003)
    expected = read_logits(PeftModel.from_pretrained(load_plain(base), version.directory))
    run(version, base, tmp_path, ExportFormat.MERGED)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / OUT, dtype="auto")
    assert exported.dtype == torch.float32
    effect = (read_logits(load_plain(base)) - expected).abs().mean()
    assert (read_logits(exported) - expected).abs().mean() < 0.01 * effect
    assert ArtefactStore(tmp_path).open(OUT).description["weights_dtype"] == "float32"


def test_numbers_that_are_not_finite_are_never_within_a_tolerance() -> None:
    lost = mergecheck.Difference(float("nan"), float("nan"))
    with pytest.raises(JobFailure):
        mergecheck.MergeCheck(lost, lost, lost, spread=1.0).require_exactness()


def test_another_revision_of_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, "lora", base_revision="another")
    with pytest.raises(JobFailure) as failure:
        run(version, base, tmp_path, ExportFormat.MERGED)
    assert failure.value.reason is FailureReason.BASE_MODEL_UNAVAILABLE


def test_a_damaged_version_is_refused_before_anything_is_said(base: Path, tmp_path: Path) -> None:
    version = make_small(tmp_path, base, "lora")
    (version.directory / "adapter_config.json").write_text("{}")
    with pytest.raises(JobFailure, match="file adapter_config") as failure:
        run(version, base, tmp_path, ExportFormat.ADAPTER)
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID


def test_a_merge_without_memory_for_it_is_refused_with_the_figures(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MEMORY_RESERVE_BYTES", 1 << 50)
    with pytest.raises(JobFailure, match="GiB") as failure:
        run(make_small(tmp_path, base, "lora"), base, tmp_path, ExportFormat.MERGED)
    assert failure.value.reason is FailureReason.OUT_OF_MEMORY


def test_a_stopped_export_leaves_nothing(base: Path, tmp_path: Path) -> None:
    events = run(make_small(tmp_path, base, "lora"), base, tmp_path, ExportFormat.MERGED, stop=True)
    assert [event.kind for event in events] == ["started"]
    assert not (tmp_path / OUT).exists()


@pytest.mark.parametrize(
    "technique",
    [
        QloraTechnique(LoraTechnique(rank=4, alpha=8.0, initialization=LoraInitialization.LOFTQ)),
        LoraTechnique(rank=4, alpha=8.0, initialization=LoraInitialization.PISSA, rank_stabilized=True),
        AdaLora(initial_rank=4, target_rank=2),
        PTuning(virtual_tokens=4),
        FullTechnique(),
    ],
    ids=lambda technique: technique.kind,
)
async def test_what_training_made_is_served_and_exported_as_plain_peft_has_it(technique: Technique, tmp_path: Path) -> None:
    workplace = Workplace.build(tmp_path)
    workplace.order = replace(workplace.order, spec=replace(workplace.order.spec, technique=technique))
    base, storage = round_to_bf16(Path(workplace.order.spec.base_model)), tmp_path / "storage"
    result = workplace.train()[-1]
    assert isinstance(result, ResultReady)
    version = workplace.store.open(result.artifact_path, result.manifest_sha256)
    tokenizer = AutoTokenizer.from_pretrained(version.directory)
    prompt = "Who keeps the river?"
    expected, logprobs = continue_plainly(load_reference(version, base), tokenizer(prompt).input_ids, 6)
    engine = make_engine({str(base): base}, storage)
    engine.start()
    answer = await collect(engine.generate(ask(prompt, model=str(base), adapter=version.path, max_tokens=6, logprobs=0)))
    await engine.stop()
    chosen = [position.chosen for delta in answer.deltas for position in delta.logprobs]
    assert [position.token for position in chosen] == [tokenizer.decode([token]) for token in expected[: len(chosen)]]
    torch.testing.assert_close([position.logprob for position in chosen], logprobs[: len(chosen)], atol=2e-4, rtol=2e-4)
    form = ExportFormat.ADAPTER if isinstance(technique, PTuning) else ExportFormat.MERGED
    run(version, base, storage, form)
    exported = ArtefactStore(storage).open(OUT).directory
    relation = "base_model_relation: merge" in (exported / "README.md").read_text()
    assert relation == (form is ExportFormat.MERGED and not isinstance(technique, FullTechnique))
    is_adapter = form is ExportFormat.ADAPTER
    # Servers like vLLM load every safetensors file of a directory.
    assert is_adapter or [file.name for file in exported.glob("*.safetensors")] == ["model.safetensors"]
    model = PeftModel.from_pretrained(load_plain(base), exported).eval() if is_adapter else load_plain(exported)
    difference = (read_logits(model) - read_logits(load_reference(version, base))).abs()
    assert difference.mean() < 0.02 * read_logits(model).std()
