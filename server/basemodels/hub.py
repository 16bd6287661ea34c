"""Models of the Hugging Face hub: asked about, downloaded once, and kept at the commit that was taken first. Knows no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.basemodels.errors import BaseModelUnavailable
from server.domain.errors import NotFound

# Weights as safetensors and what describes them: nothing pickled, no code.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab.txt", "merges.txt"]
HUB_FILES_REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "onnx/*", "openvino/*", "*.gguf"]
HUB_TIMEOUT_SECONDS = 10.0
HUB_CHECK_SECONDS = 5.0  # somebody waits for the answer
PIN_NAME = "pinned-commit"


class HubModels:
    """The hub's models below one cache directory."""

    def __init__(self, path: Path, *, token: str | None, endpoint: str | None, offline: bool) -> None:
        self._path = path
        self._token = token
        self._endpoint = endpoint
        self._offline = offline

    def is_present(self, name: str) -> bool:
        """Tell whether the model can be loaded without the hub."""
        return any((self._repository(name) / "snapshots").glob("*/config.json"))

    def find_cached(self, name: str) -> Path | None:
        """Give the directory of the pinned commit, if it lies here whole."""
        commit = self._read_pin(name)
        return self._repository(name) / "snapshots" / commit if commit else None

    def ask(self, name: str) -> None:
        """Raise NotFound or BaseModelUnavailable where the hub does not know the model, keeps it from us, or cannot be reached."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        with self._explain_errors(name):
            if self._offline:
                raise OfflineModeIsEnabled(name)
            HfApi(self._endpoint, token=self._token or False).model_info(name, timeout=HUB_CHECK_SECONDS)

    def fetch(self, name: str, commit: str | None) -> Path:
        """Give the directory of `commit`, named after it; None takes the one that was taken first, now if there is none yet.

        What is trained on a base model must find the same weights later: the newest commit is taken once and kept.
        Raises NotFound, BaseModelUnavailable.
        """
        pinned = self._read_pin(name)
        if pinned and commit in (None, pinned):
            return self._repository(name) / "snapshots" / pinned
        directory = self._download(name, commit)
        if pinned is None:
            self._write_pin(name, directory.name)
        return directory

    def _repository(self, name: str) -> Path:
        return self._path / f"models--{name.replace('/', '--')}"

    def _read_pin(self, name: str) -> str | None:
        try:
            commit = (self._repository(name) / PIN_NAME).read_text().strip()
        except OSError:
            return None
        return commit if (self._repository(name) / "snapshots" / commit / "config.json").exists() else None

    def _write_pin(self, name: str, commit: str) -> None:
        """Written after a whole download only: a half one is never taken for the model."""
        aside = self._repository(name) / f"{PIN_NAME}.partial"
        aside.write_text(commit)
        aside.replace(self._repository(name) / PIN_NAME)

    def _download(self, name: str, commit: str | None) -> Path:
        # A late import: an HTTP client that is needed only for models from the hub.
        from huggingface_hub import snapshot_download

        with self._explain_errors(name):
            return Path(
                snapshot_download(
                    name,
                    revision=commit,
                    cache_dir=self._path,
                    allow_patterns=HUB_FILES,
                    ignore_patterns=HUB_FILES_REFUSED,
                    token=self._token or False,
                    endpoint=self._endpoint,
                    local_files_only=self._offline,
                    etag_timeout=HUB_TIMEOUT_SECONDS,
                )
            )

    @contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
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
