"""How a reference is served: which weights it needs in memory, and what is added to them for its requests. Loads nothing itself.

Weights are shared wherever they can be: by all low-rank adapters, prompts and prefixes of a base model, and of a base model in 4 bits.
Whatever changes the weights themselves (a whole model, DoRA, OFT, IA3, normalisation layers) is a model of its own.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from server.domain.errors import FailedPrecondition
from server.domain.generation import ModelReference
from server.domain.techniques import Quantization
from server.inference.adapterfiles import LOW_RANK_READERS, bound_rank, read_config, unsupported_adapter


class Described(Protocol):
    """What is known of an artefact before its files are looked at (storage's Manifest)."""

    @property
    def description(self) -> Mapping[str, object]:
        """What its writer said of it."""


class Opened(Described, Protocol):
    """An artefact whose every file was checked (storage's Artefact)."""

    @property
    def directory(self) -> Path:
        """Where it lies."""


class VersionFiles(Protocol):
    """The files of versions (storage's ArtefactStore). Blocking; raises ServiceError where they are gone or damaged."""

    def read_manifest(self, path: str, manifest_sha256: str | None = None, /) -> Described:
        """Read what an artefact must be."""

    def open(self, path: str, manifest_sha256: str | None = None, /) -> Opened:
        """Check an artefact's files."""


class Addition(StrEnum):
    """What is added to the weights for the requests of a version."""

    NOTHING = "NOTHING"
    LOW_RANK = "LOW_RANK"
    EMBEDDINGS = "EMBEDDINGS"  # learned virtual tokens
    KEY_VALUES = "KEY_VALUES"  # learned keys and values of every layer


@dataclass(frozen=True)
class Weights:
    """Names weights in memory. With a `version` (its name among all) they are that version's own: merged, or trained whole.

    `revision` is the base model's: what was trained on one is never put on another. Empty where the base model has no part in them.
    """

    base_model: str
    revision: str = ""
    quantization: Quantization | None = None
    double_quantization: bool = False
    version: str = ""
    model_id: str = ""

    @property
    def variant(self) -> str:
        """What tells these weights from the plain base model's, for people; empty for those."""
        if self.version:
            return f"{self.model_id} {self.version[:12]}"
        return "" if self.quantization is None else f"{self.quantization.value}{' double' if self.double_quantization else ''}"


@dataclass(frozen=True)
class ServingPlan:
    """How a version is served. `name` is that of the version, which stands for the same files for ever; empty for a base model."""

    name: str
    weights: Weights
    addition: Addition = Addition.NOTHING
    is_merged: bool = False

    @property
    def needs_base(self) -> bool:
        """Tell whether the base model's weights have a part in what is served; in a version that was trained whole they have none."""
        return self.is_merged or not self.weights.version


PROMPT_ADDITIONS = {"PROMPT_TUNING": Addition.EMBEDDINGS, "P_TUNING": Addition.EMBEDDINGS, "PREFIX_TUNING": Addition.KEY_VALUES}
MERGED_METHODS = frozenset({"IA3", "OFT", "LN_TUNING"})


def make_plan(reference: ModelReference, files: VersionFiles, max_ranks: int) -> ServingPlan:
    """Look at a version's manifest and configuration and decide. Low-rank adapters over `max_ranks` are merged. Blocking.

    A version without a base revision in its manifest gets a plan without one: it goes with what the base model is now.
    Raises what `files` raises, FailedPrecondition (ADAPTER_INVALID) and Unimplemented (ADAPTER_NOT_SUPPORTED).
    """
    assert reference.adapter_path is not None
    name, path, seal = name_version(reference), reference.adapter_path, reference.manifest_sha256
    description = files.read_manifest(path, seal).description
    if description.get("kind") == "model":
        return ServingPlan(name, Weights(reference.base_model, version=name, model_id=reference.model_id))
    quantization, is_double = _read_quantization(description)
    base = Weights(reference.base_model, str(description.get("base_revision") or ""), quantization, is_double)
    config = read_config(files.open(path, seal).directory)
    method = str(config.get("peft_type"))
    if method in LOW_RANK_READERS and not config.get("use_dora") and bound_rank(config) <= max_ranks:
        return ServingPlan(name, base, Addition.LOW_RANK)
    if method in PROMPT_ADDITIONS:
        return ServingPlan(name, base, PROMPT_ADDITIONS[method])
    if method in LOW_RANK_READERS or method in MERGED_METHODS:
        return ServingPlan(name, replace(base, version=name, model_id=reference.model_id), is_merged=True)
    raise unsupported_adapter(f"method {method}")


def plan_base(base_model: str, revision: str) -> ServingPlan:
    """Plan a base model as it is."""
    return ServingPlan("", Weights(base_model, revision))


def name_version(reference: ModelReference) -> str:
    """Name a version by all that decides its content, so that a name never stands for other weights later."""
    parts = (reference.base_model, reference.model_id, str(reference.version), str(reference.adapter_path), str(reference.manifest_sha256))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_quantization(description: Mapping[str, object]) -> tuple[Quantization | None, bool]:
    named = str(description.get("quantization") or "")
    try:
        return (Quantization(named), bool(description.get("double_quantization"))) if named else (None, False)
    except ValueError:
        raise FailedPrecondition(f"The version was trained on weights in {named!r}, unknown here.", reason="ADAPTER_INVALID") from None
