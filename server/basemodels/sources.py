"""Where base models come from: packaged weights, a local directory, the hub. Gives a verified local directory; knows no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from server.basemodels.errors import BaseModelUnavailable
from server.basemodels.hub import HubModels
from server.basemodels.inspection import check_cross_encoder, check_directory, fingerprint_directory
from server.basemodels.packaged import PACKAGED_MODELS, PackagedModel
from server.basemodels.shapes import read_shape
from server.domain.catalogue import find_base_model
from server.domain.errors import NotFound
from server.domain.shapes import ModelShape

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class SourceKind(StrEnum):
    """Where a directory came from."""

    PACKAGED = "packaged"
    LOCAL = "local"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A base model that lies on this machine. `revision` ties a result to exactly these weights."""

    base_model: str
    revision: str
    directory: Path
    kind: SourceKind


class BaseModelSource:
    """Resolves base models and embedding models by alias, hub id or absolute path, in this order: packaged, local, hub."""

    def __init__(
        self,
        cache_path: Path,
        *,
        allowed_local_roots: Sequence[Path] = (),
        aliases: Mapping[str, str] | None = None,
        hub_token: str | None = None,
        hub_endpoint: str | None = None,
        offline: bool = False,
    ) -> None:
        self._cache_path = cache_path
        self._allowed_local_roots = [root.resolve() for root in allowed_local_roots]
        self._aliases = dict(aliases or {})
        self._hub = HubModels(cache_path / "hub", token=hub_token, endpoint=hub_endpoint, offline=offline)

    def resolve(self, base_model: str, revision: str | None = None) -> ResolvedModel:
        """Give the verified directory of a base model; converts or downloads at first use.

        `revision` is that of an earlier `resolve`: of the hub that commit is taken; other models must not have changed since.
        Raises NotFound (no such model), BaseModelUnavailable (cannot be had here now), BaseModelRefused (unsafe to load).
        """
        name = self.canonical_name(base_model)
        if packaged := PACKAGED_MODELS.get(name):
            resolved = self._resolve_packaged(packaged)
        elif name.startswith("/"):
            resolved = self._resolve_local(name)
        elif HUB_ID.fullmatch(name) is None or ".." in name or "--" in name:
            raise NotFound.of("base model", base_model)
        else:
            resolved = self._resolve_hub(name, revision)
        if revision is not None and resolved.revision != revision:
            raise BaseModelUnavailable(
                f"{name} is not what it was: its files have changed since. Put them back, or train on what they are now.",
                reason="BASE_MODEL_CHANGED",
            )
        return resolved

    def read_shape(self, base_model: str) -> ModelShape | None:
        """Give the shape of a model of the catalogue or of one whose files lie here; None where nothing is known of it yet.

        Raises as `resolve` does.
        """
        name = self.canonical_name(base_model)
        if known := find_base_model(name):
            return known.shape
        directory = self._local_directory(name) if name.startswith("/") else self._hub.find_cached(name)
        return read_shape(directory, name) if directory else None

    def check(self, base_model: str) -> None:
        """Check without converting or downloading whether `resolve` can work; the hub is asked about a model that is not cached.

        Raises as `resolve` does.
        """
        name = self.canonical_name(base_model)
        if packaged := PACKAGED_MODELS.get(name):
            packaged.locate()
        elif name.startswith("/"):
            check_directory(self._local_directory(name), name)
        elif HUB_ID.fullmatch(name) is None or ".." in name or "--" in name:
            raise NotFound.of("base model", base_model)
        elif not self.is_present(name):
            self._hub.ask(name)

    def check_cross_encoder(self, model: str) -> None:
        """Raise as `check`, and BaseModelRefused for one whose files lie here and say that it gives no one score for a pair of texts."""
        self.check(model)
        name = self.canonical_name(model)
        packaged = PACKAGED_MODELS.get(name)
        directory = packaged.locate() if packaged else self._find_local(name) if name.startswith("/") else self._hub.find_cached(name)
        if directory is not None:
            check_cross_encoder(directory, model)

    def canonical_name(self, base_model: str) -> str:
        """Give the hub id or path that an alias stands for; anything else stays."""
        return self._aliases.get(base_model, base_model)

    def is_present(self, base_model: str) -> bool:
        """Tell whether the model can be loaded here now, without the hub."""
        name = self.canonical_name(base_model)
        if packaged := PACKAGED_MODELS.get(name):
            try:
                packaged.locate()
            except BaseModelUnavailable:
                return False
            return True
        if name.startswith("/"):
            return self._find_local(name) is not None
        return self._hub.is_present(name)

    def _resolve_packaged(self, packaged: PackagedModel) -> ResolvedModel:
        if not packaged.is_gguf:
            return ResolvedModel(packaged.base_model, packaged.revision, packaged.verify(), SourceKind.PACKAGED)
        # A late import: the conversion needs torch, and whoever only asks about models (the API process) must stay without it.
        from server.basemodels.conversion import convert_packaged

        directory = convert_packaged(packaged, self._cache_path / "converted")
        return ResolvedModel(packaged.base_model, packaged.revision, directory, SourceKind.PACKAGED)

    def _find_local(self, name: str) -> Path | None:
        directory = Path(name).resolve()
        allowed = any(directory.is_relative_to(root) for root in self._allowed_local_roots)
        return directory if allowed and directory.is_dir() else None

    def _local_directory(self, name: str) -> Path:
        directory = self._find_local(name)
        if directory is None:
            # The same answer for what is missing and what is not allowed: callers cannot feel their way through the disk.
            raise NotFound.of("base model", name)
        return directory

    def _resolve_local(self, name: str) -> ResolvedModel:
        directory = self._local_directory(name)
        check_directory(directory, name)
        return ResolvedModel(name, f"fingerprint:{fingerprint_directory(directory)}", directory, SourceKind.LOCAL)

    def _resolve_hub(self, name: str, revision: str | None) -> ResolvedModel:
        directory = self._hub.fetch(name, revision)
        check_directory(directory, name, may_ignore_code=True)
        return ResolvedModel(name, directory.name, directory, SourceKind.HUB)
