"""The result of a fine-tuning: written as peft and transformers read it, loaded back into fresh weights and shown to do something."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelRefused
from server.basemodels.loading import load_causal_model, load_tokenizer
from server.basemodels.quantization import FourBits
from server.basemodels.rendering import PROBE, effective_template, find_stop_token_ids, hash_template, render
from server.basemodels.sources import ResolvedModel
from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import Quantization
from server.storage.artefacts import Artefact, ArtefactStore, Described
from server.training.card import CARD_FACTS, CARD_NAME, CardFacts, write_model_card
from server.training.techniques.full import FullTrained
from server.training.techniques.trained import Trained

WEIGHTS_NAME = "adapter_model.safetensors"
# The tokenizer's files, and room for the file system.
SPACE_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Effect:
    """How much training changed the base model's logits for the probe: the largest and the mean absolute difference."""

    largest: float
    mean: float


def save_result(
    store: ArtefactStore,
    path: str,
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    base: ResolvedModel,
    facts: Mapping[str, Described],
    card: CardFacts | None = None,
) -> Artefact:
    """Write weights, tokenizer, template and card; the manifest ties them to the base model's revision and to golden token ids.

    An adapter belongs on the base model's weights or, where the manifest names a quantization, on what 4 bits keep of them.
    """
    store.require_space(sum(parameter.nbytes for parameter in trained.parameters.values()) + SPACE_RESERVE_BYTES)

    def fill(directory: Path) -> Mapping[str, Described]:
        if isinstance(trained.model, PeftModel):
            for config in trained.model.peft_config.values():
                # By name: the directory that the base was loaded from means nothing elsewhere.
                config.base_model_name_or_path = base.base_model
                config.revision = None
        trained.save(directory)
        (directory / CARD_NAME).unlink(missing_ok=True)
        tokenizer.chat_template = effective_template(tokenizer)
        tokenizer.save_pretrained(directory)
        told = _write_card(directory, replace(card, template_sha256=hash_template(tokenizer))) if card else {}
        return {
            "kind": trained.kind,
            "quantization": trained.quantization.value if trained.quantization else "",
            "double_quantization": trained.double_quantization,
            "base_model": base.base_model,
            "base_revision": base.revision,
            "template_sha256": hash_template(tokenizer),
            "golden_token_ids": render(tokenizer, PROBE).token_ids,
            "stop_token_ids": sorted(find_stop_token_ids(tokenizer)),
            **told,
            **facts,
        }

    return store.write(path, fill)


def _write_card(directory: Path, card: CardFacts) -> Mapping[str, Described]:
    """Write the card; give its facts for the manifest, from where an export takes them."""
    (directory / CARD_NAME).write_text(write_model_card(card), encoding="utf-8")
    return {"card": CARD_FACTS.encode(card).decode()}


def try_result(artefact: Artefact, base_directory: Path, dtype: torch.dtype, device: torch.device) -> Effect:
    """Load a result as serving will: the tokenizer gives the golden ids, every tensor is consumed, the logits differ from the base's.

    Raises JobFailure(ARTIFACT_INVALID) when any of it fails.
    """
    tokenizer = load_tokenizer(artefact.directory)
    golden = cast(list[int], artefact.description["golden_token_ids"])
    if render(tokenizer, PROBE).token_ids != golden:
        raise _invalid("The saved tokenizer and template do not give the token ids that were trained.")
    ids = torch.tensor([golden], device=device)
    quantization = artefact.description.get("quantization")
    # In 4 bits it computes what serving does with the values that these keep, in a quarter of the memory.
    held = FourBits(Quantization(str(quantization)), bool(artefact.description.get("double_quantization"))) if quantization else None
    base = load_causal_model(base_directory, dtype=dtype, device=device, held=held)
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False).logits.float()
        if artefact.description["kind"] == FullTrained.kind:
            del base  # two whole models need not fit into memory
            tuned: torch.nn.Module = _load_whole(artefact.directory, dtype, device)
        else:
            tuned = PeftModel.from_pretrained(base, str(artefact.directory), is_trainable=False)
            _check_adapter_consumed(tuned, artefact.directory / WEIGHTS_NAME)
        # Virtual tokens may have places in front.
        after = tuned(input_ids=ids, use_cache=False).logits.float()[:, -len(golden) :]
    difference = (after - before).abs()
    effect = Effect(float(difference.max()), float(difference.mean()))
    if not torch.isfinite(after).all() or effect.largest == 0.0:
        raise _invalid("The trained weights do not change what the base model answers.")
    return effect


def _check_adapter_consumed(model: PeftModel, weights: Path) -> None:
    """Compare every tensor of the file with what the model now holds under that name."""
    if model.active_peft_config.is_prompt_learning:
        held = {"prompt_embeddings": model.get_parameter("prompt_encoder.default.embedding.weight").detach()}
    else:
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(weights, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    if lost := sorted(held.keys() - found.keys()):
        raise _invalid(f"The file of weights holds fewer tensors than the model needs: {lost[0]} is not there.")
    for name, tensor in found.items():
        if name not in held or not torch.equal(held[name].cpu(), tensor.to(held[name].dtype)):
            raise _invalid(f"The tensor {name} was not taken up by the model.")


def _load_whole(directory: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    try:
        return load_causal_model(directory, dtype=dtype, device=device, exact=True)
    except BaseModelRefused as error:
        raise _invalid(f"The trained model cannot be loaded: {error}") from error


def _invalid(message: str) -> JobFailure:
    return JobFailure(FailureReason.ARTIFACT_INVALID, message, "Start the job again; if it fails again, raise learning_rate or epochs.")


def describe_libraries() -> dict[str, Any]:
    """Give the versions of what trained, for the manifest."""
    from importlib.metadata import version

    return {f"{name}_version": version(name) for name in ("torch", "transformers", "peft")}
