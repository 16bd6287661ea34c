"""One export job from order to result: a version's own files, or its adapter merged into its base as a standard Hugging Face directory.

Knows files, models and events; no database, no worker.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelRefused, BaseModelUnavailable
from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype
from server.basemodels.merging import attach_adapter, merge_adapter
from server.basemodels.quantization import dequantize_in_place
from server.basemodels.sources import BaseModelSource
from server.childprocess import Emit, Signals, measure_peak_memory
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.events import Finalizing, ResultReady, Started
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import ExportOrder
from server.domain.specs import ExportFormat
from server.domain.techniques import Quantization
from server.storage.artefacts import MANIFEST_NAME, Artefact, ArtefactInvalid, ArtefactStore, Described, DiskFull
from server.training.artefact import SPACE_RESERVE_BYTES, WEIGHTS_NAME, describe_libraries
from server.training.card import CARD_FACTS, CARD_NAME, CardForm, write_model_card
from server.training.mergecheck import MergeCheck, compare, rounded_weights, take_logits
from server.training.signals import Stopped, check_stop
from server.training.techniques.factors import PARAMETERS_NAME
from server.training.techniques.prompts import ENCODER_NAME

# What a version holds beside its tokenizer.
ADAPTER_FILES = frozenset({"adapter_config.json", WEIGHTS_NAME, ENCODER_NAME, PARAMETERS_NAME, CARD_NAME, MANIFEST_NAME})
# The type of merged weights, and the one instead where rounding to it would lose too much of the adapter.
EXPORTED_DTYPE, WIDE_DTYPE = torch.bfloat16, torch.float32
MAX_SHARD_SIZE = "5GB"
# A merge holds the weights as float32, once, and little beside them.
MERGE_BYTES_PER_PARAMETER, MEMORY_RESERVE_BYTES = 4, 256 << 20
# Texts whose every token's logits are compared, beside the version's own golden conversation.
PROBE_TEXTS = ("The capital of France is Paris, and the river that flows through it is", "def add(a, b):\n    return", "1, 2, 3, 4, 5,")


def run_export(order: ExportOrder, store: ArtefactStore, source: BaseModelSource, emit: Emit, signals: Signals) -> None:
    """Do the job of the order; returns early, with nothing written, once told to stop. Raises JobFailure for what cannot work.

    An export has nothing to save on its way: asked to pause it goes on.
    """
    began = time.perf_counter()
    try:
        version = store.open(order.version_path, order.version_manifest_sha256)
        emit(Started(total_steps=1))
        if order.spec.format is ExportFormat.MERGED and version.description.get("kind") != "model":
            artefact, check = _export_merged(order, store, source, version, emit, signals)
            metrics = check.metrics
        else:
            artefact, metrics = _export_files(order, store, version, emit), {}
        emit(_describe_result(order, artefact, version, metrics, began))
    except Stopped:
        return
    except (BaseModelUnavailable, BaseModelRefused, NotFound) as error:
        raise JobFailure(
            FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Make the base model that the version was trained on available here."
        ) from error
    except DiskFull as error:
        raise JobFailure(FailureReason.DISK_FULL, str(error), "Free space under MODEL_STORAGE_PATH, then export again.") from error
    except ArtefactInvalid as error:
        raise JobFailure(FailureReason.ARTIFACT_INVALID, str(error), "The version's files are damaged: train it again.") from error


def _export_files(order: ExportOrder, store: ArtefactStore, version: Artefact, emit: Emit) -> Artefact:
    """Write a version's files as they are: a peft directory, or the whole model that full fine-tuning made."""
    if order.spec.format is ExportFormat.ADAPTER and version.description.get("kind") == "model":
        raise JobFailure(
            FailureReason.ARTIFACT_INVALID,
            "The version was trained whole: there is no adapter to export.",
            "Export it as MERGED, which gives its files as they are.",
        )
    store.require_space(version.size_bytes + SPACE_RESERVE_BYTES)
    emit(Finalizing())

    def fill(directory: Path) -> Mapping[str, Described]:
        _copy_files(version, directory, leave_out=frozenset({MANIFEST_NAME}))
        form = CardForm.MODEL if version.description.get("kind") == "model" else CardForm.ADAPTER
        if CARD_NAME not in version.files:
            _write_card(version, directory, form, {})
        return _describe_files(order, version)

    return store.write(order.artifact_path, fill)


def _export_merged(
    order: ExportOrder, store: ArtefactStore, source: BaseModelSource, version: Artefact, emit: Emit, signals: Signals
) -> tuple[Artefact, MergeCheck]:
    revision = version.description.get("base_revision")
    base = source.resolve(order.spec.base_model, str(revision) if revision else None)
    parameters = _count_parameters(base.directory)
    store.require_space(parameters * EXPORTED_DTYPE.itemsize + SPACE_RESERVE_BYTES)
    tokenizer = load_tokenizer(version.directory)
    check_stop(signals)
    merged, check = _merge(_load_base(base.directory, version, parameters), version, _list_probes(version, tokenizer))
    check.require_exactness()
    dtype = EXPORTED_DTYPE if check.keeps_rounded else WIDE_DTYPE
    store.require_space(parameters * dtype.itemsize + SPACE_RESERVE_BYTES)
    check_stop(signals)
    emit(Finalizing())

    def fill(directory: Path) -> Mapping[str, Described]:
        _write_model(merged.to(dtype), tokenizer, version, directory)  # type: ignore[arg-type]  # transformers types `to` for its own wrappers
        _copy_files(version, directory, leave_out=ADAPTER_FILES)
        _write_card(version, directory, CardForm.MERGED, check.metrics)
        return {**_describe_files(order, version), "weights_dtype": str(dtype).removeprefix("torch.")}

    return store.write(order.artifact_path, fill), check


def _load_base(directory: Path, version: Artefact, parameters: int) -> PreTrainedModel:
    """Load the weights that the version was trained on as float32: where they were held in 4 bits, what 4 bits keep of them."""
    needed, free = parameters * MERGE_BYTES_PER_PARAMETER + MEMORY_RESERVE_BYTES, psutil.virtual_memory().available
    if free < needed:
        raise JobFailure(
            FailureReason.OUT_OF_MEMORY,
            f"Merging in float32 needs {needed / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are free.",
            "Export the adapter instead, or let other jobs end first.",
        )
    quantization = str(version.description.get("quantization") or "")
    if not quantization:
        return load_causal_model(directory, dtype=torch.float32)
    # Quantised from the type that training loads, so that each weight falls on the same of its 16 values.
    model = load_causal_model(directory, dtype=preferred_dtype())
    dequantize_in_place(model, Quantization(quantization), bool(version.description.get("double_quantization")))
    model.to(torch.float32)  # type: ignore[arg-type]  # transformers types `to` for its own wrappers only
    return model


def _merge(model: PreTrainedModel, version: Artefact, probes: Sequence[Sequence[int]]) -> tuple[PreTrainedModel, MergeCheck]:
    """Merge, and compare the logits in float32 and with rounded weights to those of the adapter beside its base."""
    plain = take_logits(model, probes)
    try:
        adapted = attach_adapter(model, version.directory)
        expected = take_logits(adapted, probes)
        merged = merge_adapter(adapted)
    except FailedPrecondition as error:
        raise JobFailure(FailureReason.ARTIFACT_INVALID, str(error), "Export the version as ADAPTER.") from error
    exact = compare(take_logits(merged, probes), expected)
    with rounded_weights(merged, EXPORTED_DTYPE):
        rounded = compare(take_logits(merged, probes), expected)
    return merged, MergeCheck(exact, rounded, effect=compare(plain, expected), spread=float(expected.std()))


def _list_probes(version: Artefact, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    golden = cast(list[int], version.description.get("golden_token_ids") or [])
    texts = [list(tokenizer(text).input_ids) for text in PROBE_TEXTS]
    return [probe for probe in (golden, *texts) if probe]


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: Artefact, directory: Path) -> None:
    """Write weights, configuration, and a generation configuration that ends answers where training ended them."""
    stops = cast(list[int], version.description.get("stop_token_ids") or [])
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id = stops or tokenizer.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    if not settings.do_sample and any(getattr(settings, name, None) is not None for name in ("temperature", "top_p", "top_k", "min_p")):
        # Published files set these without saying do_sample; transformers reads such a file, and refuses to write it.
        settings.do_sample = True
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)


def _copy_files(version: Artefact, directory: Path, leave_out: frozenset[str]) -> None:
    for name in version.files:
        if name not in leave_out:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(version.directory / name, directory / name)


def _write_card(version: Artefact, directory: Path, form: CardForm, metrics: Mapping[str, float]) -> None:
    """Write the version's card in the export's form. Versions of the first release know too little for one: they get a line."""
    told = version.description.get("card")
    if isinstance(told, str):
        facts = CARD_FACTS.decode(told.encode())
        text = write_model_card(replace(facts, form=form, metrics={**facts.metrics, **metrics}))
    else:
        text = f"---\nbase_model: {version.description.get('base_model', '')}\n---\n"
    (directory / CARD_NAME).write_text(text, encoding="utf-8")


def _describe_files(order: ExportOrder, version: Artefact) -> dict[str, Described]:
    kept = ("technique", "base_model", "base_revision", "template_sha256", "golden_token_ids", "stop_token_ids")
    described = {name: version.description[name] for name in kept if name in version.description}
    return {"kind": "export", "format": order.spec.format.value, "version_manifest_sha256": version.manifest_sha256, **described}


def _describe_result(order: ExportOrder, artefact: Artefact, version: Artefact, metrics: Mapping[str, float], began: float) -> ResultReady:
    return ResultReady(
        artifact_path=order.artifact_path,
        manifest_sha256=artefact.manifest_sha256,
        size_bytes=artefact.size_bytes,
        base_revision=str(version.description.get("base_revision", "")),
        metrics=metrics,
        compute_seconds=time.perf_counter() - began,
        peak_memory_bytes=measure_peak_memory(),
        library_versions={name.removesuffix("_version"): str(version) for name, version in describe_libraries().items()},
        template_sha256=str(version.description.get("template_sha256", "")),
    )


def _count_parameters(directory: Path) -> int:
    """Count the numbers in a directory's safetensors by their headers."""
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118 -- not a mapping
    return count
