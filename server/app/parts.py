"""What several roles are built from: the storage, base models, torch. Imported where it is used: not every role loads all of it."""

from typing import TYPE_CHECKING

from server.domain.base_models import BASE_MODELS
from server.domain.catalogue import EMBEDDING_MODELS
from server.domain.cross_encoders import CROSS_ENCODERS
from server.settings import Settings

if TYPE_CHECKING:
    from server.basemodels.sources import BaseModelSource
    from server.storage.artefacts import ArtefactStore
    from server.storage.files import LocalFiles
    from server.storage.mirror import Mirror
    from server.storage.objects import RemoteObjects

WEIGHT_HASHES = "weight-hashes"  # of embedding models, below the cache: a few kilobytes each


def open_objects(settings: Settings) -> "RemoteObjects | None":
    """Give the remote storage, or None where the storage is a directory."""
    from server.storage.objects import RemoteObjects

    return RemoteObjects(settings.storage_url) if settings.storage_url else None


def _open_mirror(settings: Settings, objects: "RemoteObjects") -> "Mirror":
    from server.storage.mirror import Mirror

    settings.storage_path.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.storage_path, objects, settings.storage_cache_bytes)


def open_artefacts(settings: Settings) -> "ArtefactStore":
    """Give the store of finished models and results."""
    from server.storage.artefacts import ArtefactStore
    from server.storage.remote import RemoteArtefactStore

    objects = open_objects(settings)
    return RemoteArtefactStore(_open_mirror(settings, objects)) if objects else ArtefactStore(settings.storage_path)


def open_files(settings: Settings) -> "LocalFiles":
    """Give the store of uploaded files."""
    from server.storage.files import LocalFiles
    from server.storage.remote_files import RemoteFiles

    objects = open_objects(settings)
    return RemoteFiles(_open_mirror(settings, objects)) if objects else LocalFiles(settings.storage_path)


def check_storage(settings: Settings) -> str | None:
    """Say why the storage cannot be used; None where it can."""
    from server.domain.errors import ServiceError

    objects = open_objects(settings)
    try:
        if objects is not None:
            objects.check()
    except ServiceError as error:
        return f"MODEL_STORAGE_PATH: {error}"
    return None


def prepare_torch(settings: Settings) -> None:
    """Set what holds for all of torch in this process."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # bars have no place in a log of JSON lines
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)


def make_source(settings: Settings) -> "BaseModelSource":
    """Give what finds base models, by hub name, alias or path."""
    from server.basemodels.sources import BaseModelSource

    return BaseModelSource(
        settings.cache_path,
        allowed_local_roots=settings.local_models_paths,
        aliases=dict(_list_aliases()),
        hub_token=settings.hub_token,
        hub_endpoint=settings.hub_endpoint,
    )


def _list_aliases() -> list[tuple[str, str]]:
    bases = [(alias, model.base_model_id) for model in BASE_MODELS for alias in model.aliases]
    cross_encoders = [(alias, model.cross_encoder_id) for model in CROSS_ENCODERS for alias in model.aliases]
    return bases + cross_encoders + [(alias, model.embedding_model_id) for model in EMBEDDING_MODELS for alias in model.aliases]
