"""The result of a fine-tuning: written as peft and transformers read it, loaded back into fresh weights and shown to do something."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import load_causal_model, load_tokenizer
from server.basemodels.rendering import PROBE, effective_template, find_stop_token_ids, hash_template, render
from server.basemodels.sources import ResolvedModel
from server.domain.jobs import FailureReason, JobFailure
from server.storage.artefacts import Artefact, ArtefactStore, Described
from server.training.card import CARD_FACTS, CARD_NAME, CardFacts, write_model_card

WEIGHTS_NAME = "adapter_model.safetensors"
# The adapter's weights and the tokenizer's files, and room for the file system.
SPACE_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Effect:
    """How much the adapter changes the base model's logits for the probe: the largest and the mean absolute difference."""

    largest: float
    mean: float


def save_result(
    store: ArtefactStore,
    path: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base: ResolvedModel,
    facts: Mapping[str, Described],
    card: CardFacts | None = None,
) -> Artefact:
    """Write adapter, tokenizer, template and card; the manifest ties them to the base model's revision and to golden token ids."""
    adapter_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    store.require_space(adapter_bytes + SPACE_RESERVE_BYTES)

    def fill(directory: Path) -> Mapping[str, Described]:
        for config in model.peft_config.values():
            # By name: the directory that the base was loaded from means nothing elsewhere.
            config.base_model_name_or_path = base.base_model
            config.revision = None
        model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
        (directory / CARD_NAME).unlink(missing_ok=True)
        tokenizer.chat_template = effective_template(tokenizer)
        tokenizer.save_pretrained(directory)
        told = _write_card(directory, replace(card, template_sha256=hash_template(tokenizer))) if card else {}
        return {
            "kind": "adapter",
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
    base = load_causal_model(base_directory, dtype=dtype, device=device)
    ids = torch.tensor([golden], device=device)
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False).logits.float()
        adapted = PeftModel.from_pretrained(base, str(artefact.directory), is_trainable=False)
        _check_consumed(adapted, artefact.directory / WEIGHTS_NAME)
        after = adapted(input_ids=ids, use_cache=False).logits.float()
    difference = (after - before).abs()
    effect = Effect(float(difference.max()), float(difference.mean()))
    if not torch.isfinite(after).all() or effect.largest == 0.0:
        raise _invalid("The trained adapter does not change what the base model answers.")
    return effect


def _check_consumed(model: PeftModel, weights: Path) -> None:
    """Compare every tensor of the file with what the model now holds under that name."""
    held = {_plain_name(name): parameter for name, parameter in model.named_parameters()}
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            parameter = held.get(_plain_name(name))
            if parameter is None or not torch.equal(parameter.detach().cpu(), file.get_tensor(name).to(parameter.dtype)):
                raise _invalid(f"The adapter's tensor {name} was not taken up by the base model.")
    adapters = {name for name in held if "lora_" in name}
    if not names or len(adapters) != len(names):
        raise _invalid("The adapter's file holds fewer tensors than the model needs.")


def _plain_name(name: str) -> str:
    """Strip the adapter's name, which peft puts into parameter names and leaves out in files."""
    return name.replace(".default.", ".")


def _invalid(message: str) -> JobFailure:
    return JobFailure(FailureReason.ARTIFACT_INVALID, message, "Start the job again; if it fails again, raise learning_rate or epochs.")


def describe_libraries() -> dict[str, Any]:
    """Give the versions of what trained, for the manifest."""
    from importlib.metadata import version

    return {f"{name}_version": version(name) for name in ("torch", "transformers", "peft")}
