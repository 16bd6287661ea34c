"""Where base models come from: packaged weights, a local directory, the hub. Gives a verified local directory; knows no torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from server.basemodels.errors import BaseModelUnavailable
from server.basemodels.inspection import check_directory, fingerprint_directory
from server.basemodels.packaged import PACKAGED_MODELS, PackagedModel
from server.domain.errors import NotFound

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Weights as safetensors and what describes them: nothing pickled, no code.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab.txt", "merges.txt"]
HUB_FILES_REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "onnx/*", "openvino/*", "*.gguf"]
HUB_TIMEOUT_SECONDS = 10.0
HUB_CHECK_SECONDS = 5.0  # somebody waits for the answer


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
        self._hub_token = hub_token
        self._hub_endpoint = hub_endpoint
        self._offline = offline

    def resolve(self, base_model: str) -> ResolvedModel:
        """Give the verified directory of a base model; converts or downloads at first use.

        Raises NotFound (no such model), BaseModelUnavailable (cannot be had here now), BaseModelRefused (unsafe to load).
        """
        name = self.canonical_name(base_model)
        if packaged := PACKAGED_MODELS.get(name):
            return self._resolve_packaged(packaged)
        if name.startswith("/"):
            return self._resolve_local(name)
        if HUB_ID.fullmatch(name) is None or ".." in name or "--" in name:
            raise NotFound.of("base model", base_model)
        return self._resolve_hub(name)

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
            self._ask_hub(name)

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
        return any((self._hub_path / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))

    @property
    def _hub_path(self) -> Path:
        return self._cache_path / "hub"

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

    def _resolve_hub(self, name: str) -> ResolvedModel:
        directory = self._download(name)
        check_directory(directory, name, may_ignore_code=True)
        # The hub's cache names a snapshot's directory after its commit.
        return ResolvedModel(name, directory.name, directory, SourceKind.HUB)

    def _ask_hub(self, name: str) -> None:
        """Raise where the hub does not know the model, keeps it from us, or cannot be reached."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        with self._explain_hub_errors(name):
            if self._offline:
                raise OfflineModeIsEnabled(name)
            HfApi(self._hub_endpoint, token=self._hub_token or False).model_info(name, timeout=HUB_CHECK_SECONDS)

    def _download(self, name: str) -> Path:
        # A late import: an HTTP client that is needed only for models from the hub.
        from huggingface_hub import snapshot_download

        with self._explain_hub_errors(name):
            return Path(
                snapshot_download(
                    name,
                    cache_dir=self._hub_path,
                    allow_patterns=HUB_FILES,
                    ignore_patterns=HUB_FILES_REFUSED,
                    token=self._hub_token or False,
                    endpoint=self._hub_endpoint,
                    local_files_only=self._offline,
                    etag_timeout=HUB_TIMEOUT_SECONDS,
                )
            )

    @contextmanager
    def _explain_hub_errors(self, name: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            yield
        except GatedRepoError:
            raise BaseModelUnavailable(
                f"{name} is gated: accept its licence on the hub and set HF_TOKEN for this server.", reason="BASE_MODEL_GATED"
            ) from None
        except RepositoryNotFoundError:
            raise NotFound.of("base model", name) from None
        except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError):
            where = (
                "is not in the cache and the hub is switched off"
                if self._offline
                else "could not be fetched: the hub cannot be reached from here"
            )
            raise BaseModelUnavailable(f"{name} {where}.") from None
