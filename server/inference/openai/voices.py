"""Tokenizers and templates of models whose weights another process holds, and what may be asked of a version there. Blocking."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import AutoConfig, GenerationConfig

from server.basemodels.errors import BaseModelRefused
from server.basemodels.loading import load_tokenizer, read_context_tokens
from server.domain.errors import Unimplemented
from server.domain.generation import ModelReference
from server.inference.adapterfiles import PLAIN_VALUES, read_config, read_tensors, unsupported_adapter
from server.inference.plans import Addition, VersionFiles, make_plan, name_version
from server.inference.prompts import PromptBuilder
from server.inference.voice import Voice, check_golden_tokens

# Adapters of a higher rank would be merged by the embedded engine, which nobody can do from outside.
MAX_RANK = 512
# A tokenizer takes some 50 MB; versions share their base's seldom.
MAX_KEPT_VOICES = 64
# Options of a LoRA adapter that servers are known to have passed over without a word.
SILENT_OPTIONS = ("rank_pattern", "alpha_pattern")


class ResolvedBase(Protocol):
    """Where what describes a base model lies (basemodels' ResolvedModel)."""

    @property
    def directory(self) -> Path:
        """A directory with its configuration and tokenizer."""


class BaseModelDescriptions(Protocol):
    """Finds base models (basemodels' BaseModelSource)."""

    def resolve(self, base_model: str, revision: str | None = None) -> ResolvedBase:
        """Give a verified directory, of that revision where one is named. Raises ServiceError."""


@dataclass(frozen=True)
class Spoken:
    """A model as it is spoken to. `adapter` is the name and the directory of the version that answers; None: the base model does."""

    voice: Voice
    context_tokens: int
    vocabulary_size: int
    adapter: tuple[str, Path] | None = None


class Voices:
    """Opens models for speaking; keeps those that were opened last. From any thread, one at a time."""

    def __init__(self, base_models: BaseModelDescriptions, versions: VersionFiles) -> None:
        self._base_models, self._versions = base_models, versions
        self._kept: dict[str, tuple[str, Spoken]] = {}

    def find(self, reference: ModelReference) -> Spoken | None:
        """Give a model that was opened before."""
        kept = self._kept.get(_name(reference))
        return None if kept is None else kept[1]

    def open(self, reference: ModelReference) -> Spoken:
        """Read a model's tokenizer and check a version's files. Raises ServiceError: what is wrong, or what no server could do."""
        if (known := self.find(reference)) is not None:  # while this call waited for its turn
            return known
        spoken = self._open_base(reference.base_model, None) if reference.adapter_path is None else self._open_version(reference)
        self._kept[_name(reference)] = (reference.model_id, spoken)
        while len(self._kept) > MAX_KEPT_VOICES:
            del self._kept[next(iter(self._kept))]
        return spoken

    def forget(self, model_id: str) -> None:
        """Drop all of a model."""
        for name in [name for name, (owner, _) in list(self._kept.items()) if owner == model_id]:
            self._kept.pop(name, None)

    def _open_base(self, base_model: str, revision: str | None) -> Spoken:
        directory = self._base_models.resolve(base_model, revision).directory
        generation_config = GenerationConfig.from_pretrained(directory) if (directory / "generation_config.json").exists() else None
        return Spoken(Voice.make(load_tokenizer(directory), generation_config), read_context_tokens(directory), _count_tokens(directory))

    def _open_version(self, reference: ModelReference) -> Spoken:
        plan = make_plan(reference, self._versions, MAX_RANK)
        if plan.addition is not Addition.LOW_RANK:
            raise _refuse("only LoRA adapters can be added there")
        if plan.weights.quantization is not None:
            raise _refuse(f"it was trained over weights in {plan.weights.quantization.value}, which the server's are not")
        opened = self._versions.open(reference.adapter_path or "", reference.manifest_sha256)
        config = read_config(opened.directory)
        if config.get("peft_type") != "LORA":
            raise _refuse(f"it is no LoRA adapter but {config.get('peft_type')}")
        for option in SILENT_OPTIONS:
            if config.get(option) not in PLAIN_VALUES:
                raise unsupported_adapter(option)
        read_tensors(opened.directory)
        base = self._open_base(reference.base_model, plan.weights.revision or None)
        voice = base.voice
        if (opened.directory / "tokenizer_config.json").exists():
            voice = Voice.make(load_tokenizer(opened.directory))
        check_golden_tokens(PromptBuilder(voice.tokenizer), opened.description)
        return Spoken(voice, base.context_tokens, base.vocabulary_size, (plan.name, opened.directory))


def _name(reference: ModelReference) -> str:
    return reference.base_model if reference.adapter_path is None else name_version(reference)


def _count_tokens(directory: Path) -> int:
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelRefused("The model's directory holds no configuration that can be read.", reason="MODEL_INVALID") from error


def _refuse(why: str) -> Unimplemented:
    return Unimplemented(f"The server of this base model cannot serve this version: {why}.", reason="ADAPTER_NOT_SUPPORTED")
